"""Errors of the Kafka launcher."""

__all__ = ["KafkaStartError", "KafkaUnavailable"]


class KafkaUnavailable(RuntimeError):
    """No real Kafka can be had here: the text names what is missing and what to install."""


class KafkaStartError(RuntimeError):
    """A broker did not start, stop or answer in time: the text holds the end of its log."""
