"""The base of events and commands, under the original's path; see keven_core.kafka.message."""

from keven_core.kafka.message import Message

__all__ = ["Message"]
