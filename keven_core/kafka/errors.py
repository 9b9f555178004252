"""Every error that keven_core raises, in families: the caller's misuse, Kafka's answer, our own bug.

Classes that mean what a builtin means derive from that builtin too, so `except TimeoutError` works as expected.
No message ever carries configuration values or payloads.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

__all__ = [
    "AuthenticationError",
    "AuthorizationError",
    "BrokerUnavailableError",
    "ClosedError",
    "CommitError",
    "ConfigurationError",
    "DeadLetterError",
    "DeadLetterFloodError",
    "Delivery",
    "DeliveryError",
    "DrainError",
    "ForkedProcessError",
    "InternalError",
    "KafkaError",
    "KafkaTimeoutError",
    "KevenError",
    "LaunchError",
    "LedgerError",
    "MessageTooLargeError",
    "OffsetOutOfRangeError",
    "PublishError",
    "QueueFullError",
    "RecordError",
    "RedriveError",
    "RegistrationError",
    "UndecodableError",
    "UnknownTopicError",
    "UsageError",
    "WorkerDiedError",
    "delivery_error",
    "kafka_error",
    "refused_credentials",
]


class KevenError(Exception):
    """Base of every error of this library.

    Attributes:
        exit_code: what a script exits with that a server's error has ended, also one of a launched process.
    """

    exit_code: int = 1


# --- the caller's misuse ---------------------------------------------------------------------------------------------


class UsageError(KevenError):
    """The library was used in a way it does not allow; the message says what to do instead."""


class ConfigurationError(UsageError, ValueError):
    """A setting has a value that is not allowed. Raised at start, before anything connects."""


class RegistrationError(UsageError, TypeError):
    """A class or handler can't be registered; the message names it and whatever it collides with."""


class LaunchError(UsageError, RuntimeError):
    """A server can't be launched from here, for example a process from `python -c`."""


class ClosedError(UsageError, RuntimeError):
    """A client was used after close()."""


class ForkedProcessError(UsageError, RuntimeError):
    """A client made before os.fork() was used in the child: its threads did not come along."""


class QueueFullError(UsageError, BufferError, TimeoutError):
    """The local send queue stayed full past the deadline. The message that was refused was not queued."""


class MessageTooLargeError(UsageError, ValueError):
    """A message is larger than the client or the broker accepts; nothing was queued."""


# --- one record's own fault ------------------------------------------------------------------------------------------


class RecordError(KevenError):
    """Something is wrong with one record; it is dead-lettered and the batch goes on."""


class UndecodableError(RecordError, ValueError):
    """A record's value can't be decoded into its event."""


class WorkerDiedError(RecordError):
    """Worker processes have died with this record in hand, so often that it is not handled any more.

    Attributes:
        deaths: how many, as their supervisor counted.
        why: how the last one ended.
    """

    def __init__(self, deaths: int, why: str) -> None:
        super().__init__(
            f"worker processes have died with it {deaths} times, the last time: {why}; it was not handled again"
        )
        self.deaths = deaths
        self.why = why

    def __reduce__(self) -> tuple[typing.Any, ...]:
        return type(self), (self.deaths, self.why)


# --- the end of a server ---------------------------------------------------------------------------------------------


class DrainError(KevenError):
    """A server that was asked to end had to cut off a handler: the time was over, or a second signal came.

    What else was handled is committed. Exit code 3 when KEVEN_DRAIN_TIMEOUT_MS was over, 5 after a second signal.

    Attributes:
        records: (topic, partition, offset) of what was cut off: neither done nor failed, so it comes again.
    """

    records: list[tuple[str, int, int]]

    def __init__(self, message: str, records: Sequence[tuple[str, int, int]] = (), *, exit_code: int = 3) -> None:
        super().__init__(message)
        self.records = list(records)
        self.exit_code = exit_code


# --- Kafka's answer --------------------------------------------------------------------------------------------------


class KafkaError(KevenError):
    """An answer of Kafka or librdkafka.

    Attributes:
        code: librdkafka's number (negative: local to the client).
        name: librdkafka's name of it, for example "UNKNOWN_TOPIC_OR_PART".
        fatal: the client can't go on and has to be made anew.
    """

    code: int = 0
    name: str = ""
    fatal: bool = False

    def __init__(self, message: str, *, code: int = 0, name: str = "", fatal: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.name = name
        self.fatal = fatal


class KafkaTimeoutError(KafkaError, TimeoutError):
    """Kafka did not answer in time."""


class BrokerUnavailableError(KafkaError, ConnectionError):
    """No broker could be reached."""


class AuthenticationError(KafkaError, PermissionError):
    """The broker refused the credentials."""


class AuthorizationError(KafkaError, PermissionError):
    """The broker refused the operation to this user."""


class UnknownTopicError(KafkaError, LookupError):
    """A topic or partition does not exist."""


class OffsetOutOfRangeError(KafkaError, LookupError):
    """There is no valid offset to start from, and `auto_offset_reset="error"` forbids to choose one."""


class CommitError(KafkaError):
    """Offsets could not be confirmed as committed; `offsets` names them as (topic, partition, offset).

    Exit code 4.
    """

    exit_code = 4
    offsets: list[tuple[str, int, int]]

    def __init__(self, message: str, offsets: list[tuple[str, int, int]] | None = None, **kwargs: object) -> None:
        super().__init__(message, **kwargs)  # type: ignore[arg-type]  # code, name, fatal pass through
        self.offsets = offsets or []


class Delivery(typing.NamedTuple):
    """What became of one message, with all that was given for it, so that the application can keep it.

    Attributes:
        error: None when it was delivered.
        outcome: "delivered", "not delivered", or "possibly delivered": it was sent, but the answer did not come.
        timestamp_ms: as it was given; 0: it was not.
    """

    topic: str
    value: bytes | None
    key: bytes | None
    error: KafkaError | None
    outcome: str
    headers: list[tuple[str, bytes | None]]
    timestamp_ms: int


class DeliveryError(KafkaError):
    """Messages were not acknowledged by the broker.

    Attributes:
        failures: the first 10, with their payloads; on_delivery of a logger is told of all.
        failed_count: how many in all.
    """

    failures: list[Delivery]
    failed_count: int

    def __init__(
        self, message: str, failures: list[Delivery] | None = None, failed_count: int = 0, **kwargs: object
    ) -> None:
        super().__init__(message, **kwargs)  # type: ignore[arg-type]  # code, name, fatal pass through
        self.failures = failures or []
        self.failed_count = failed_count


class PublishError(KafkaError):
    """Events or commands were not sent when an outbox was flushed; they are still in it, and can be flushed again.

    Attributes:
        messages: those that were not sent, in order.
    """

    messages: list[typing.Any]

    def __init__(self, message: str, messages: Sequence[typing.Any] = ()) -> None:
        super().__init__(message)
        self.messages = list(messages)


class DeadLetterError(DeliveryError):
    """A failed record could not be copied to its dead-letter topic, so its offset stays and the server stops."""


class DeadLetterFloodError(RecordError):
    """So many records were dead-lettered that the server stopped: see KEVEN_DEAD_LETTERS_IN_A_ROW and _PERCENT."""


class RedriveError(DeliveryError):
    """Copies of dead letters were not acknowledged; their offsets stay, and the next run tries them again.

    Attributes:
        letters: (partition, offset) of each in the dead-letter topic.
        report: the RedriveReport of the run until then.
    """

    letters: list[tuple[int, int]]
    report: typing.Any = None

    def __init__(self, message: str, letters: Sequence[tuple[int, int]] = (), **kwargs: typing.Any) -> None:
        super().__init__(message, **kwargs)
        self.letters = list(letters)


# --- our bug ---------------------------------------------------------------------------------------------------------


class InternalError(KevenError):
    """An invariant of this library does not hold: please report it."""


class LedgerError(InternalError):
    """What a server has counted does not add up, or does not go with its offsets."""


def delivery_error(count: int, failures: Sequence[Delivery]) -> DeliveryError:
    """The error for `count` messages that were not delivered, of which the first are given."""
    first = failures[0]
    cause = first.error
    which = "the message" if count == 1 else f"{count} messages were not delivered; the first,"
    error = DeliveryError(
        f"{which} for {first.topic} was {first.outcome}: {cause}",
        list(failures),
        count,
        code=cause.code if cause is not None else 0,
        name=cause.name if cause is not None else "",
        fatal=cause is not None and cause.fatal,
    )
    error.__cause__ = cause
    return error


def refused_credentials(error: KafkaError) -> AuthenticationError | None:
    """The error as an AuthenticationError when it says that one side does not trust the other; else None."""
    if isinstance(error, AuthenticationError):
        return error
    # A connection lost during the handshake is an _SSL error too; only the text tells it from a certificate's.
    if error.name == "_SSL" and "certificate" in str(error):
        return AuthenticationError(str(error), code=error.code, name=error.name)
    return None


_CLASS_OF_NAME: dict[str, type[KafkaError]] = {
    "_TRANSPORT": BrokerUnavailableError,
    "_RESOLVE": BrokerUnavailableError,
    "_ALL_BROKERS_DOWN": BrokerUnavailableError,
    "_TIMED_OUT": KafkaTimeoutError,
    "_TIMED_OUT_QUEUE": KafkaTimeoutError,
    "_MSG_TIMED_OUT": KafkaTimeoutError,
    "REQUEST_TIMED_OUT": KafkaTimeoutError,
    "_AUTHENTICATION": AuthenticationError,
    "SASL_AUTHENTICATION_FAILED": AuthenticationError,
    "TOPIC_AUTHORIZATION_FAILED": AuthorizationError,
    "GROUP_AUTHORIZATION_FAILED": AuthorizationError,
    "CLUSTER_AUTHORIZATION_FAILED": AuthorizationError,
    "TRANSACTIONAL_ID_AUTHORIZATION_FAILED": AuthorizationError,
    "UNKNOWN_TOPIC_OR_PART": UnknownTopicError,
    "_UNKNOWN_TOPIC": UnknownTopicError,
    "_UNKNOWN_PARTITION": UnknownTopicError,
    "OFFSET_OUT_OF_RANGE": OffsetOutOfRangeError,
    "_AUTO_OFFSET_RESET": OffsetOutOfRangeError,
    "_NO_OFFSET": OffsetOutOfRangeError,
}


def kafka_error(code: int, name: str, message: str, *, fatal: bool = False) -> KafkaError:
    """Build the error of the class that fits librdkafka's error `name`; unknown names give a plain KafkaError."""
    return _CLASS_OF_NAME.get(name, KafkaError)(message, code=code, name=name, fatal=fatal)
