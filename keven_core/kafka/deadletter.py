"""Which headers copies of failed records carry: dead letters, and records that wait for another attempt.

Dead letters speak Spring's dialect by default (kafka_dlt-*), which user interfaces look for, or that of Kafka's own
share groups (__dlq.errors.*, KIP-1191). The first origin is kept when a record fails again; only the last exception is.
Waiting records carry what Spring's retry topics carry, and the names of the handlers that are to run again.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from keven_core.kafka.logs import one_line

if TYPE_CHECKING:
    from keven_core._native.message import Record

__all__ = ["Attempt", "attempt_of", "dead_letter_headers", "due_ms_of", "retry_headers"]

Headers = list[tuple[str, "bytes | None"]]

_TIMESTAMP_TYPES = ("NoTimestampType", "CreateTime", "LogAppendTime")
_MESSAGE_LIMIT = 1000  # characters of an exception's text


def _class_name(error: BaseException) -> bytes:
    cls = type(error)
    return f"{cls.__module__}.{cls.__qualname__}".encode()


def dead_letter_headers(
    record: Record, error: BaseException, group_id: str, *, dialect: str = "spring", why: str = ""
) -> Headers:
    """The headers of a record's dead-letter copy: its own, then origin and reason.

    Arguments:
        dialect: "spring" or "kafka".
        why: what the retry policy decided by, added to the exception's text.
    """
    if dialect == "kafka":
        return _kafka_headers(record, error, group_id, why)
    origin = [*_origin("kafka_dlt-original-", record), ("kafka_dlt-original-consumer-group", group_id.encode())]
    reason: Headers = [
        ("kafka_dlt-exception-fqcn", _class_name(error)),
        ("kafka_dlt-exception-message", _text(error, why)),
    ]
    if error.__cause__ is not None:
        reason.append(("kafka_dlt-exception-cause-fqcn", _class_name(error.__cause__)))
    return _joined(record, origin, reason, last_only=("kafka_dlt-exception-",))


def _origin(prefix: str, record: Record) -> Headers:
    return [
        (prefix + "topic", record.topic.encode()),
        (prefix + "partition", struct.pack(">i", record.partition)),
        (prefix + "offset", struct.pack(">q", record.offset)),
        (prefix + "timestamp", struct.pack(">q", record.timestamp_ms)),
        (prefix + "timestamp-type", _TIMESTAMP_TYPES[record.timestamp_type].encode()),
    ]


def _text(error: BaseException, why: str = "") -> bytes:
    return (one_line(error, _MESSAGE_LIMIT) + (f" ({why})" if why else "")).encode()


def _kafka_headers(record: Record, error: BaseException, group_id: str, why: str) -> Headers:
    origin: Headers = [
        ("__dlq.errors.topic", record.topic.encode()),
        ("__dlq.errors.partition", str(record.partition).encode()),
        ("__dlq.errors.offset", str(record.offset).encode()),
        ("__dlq.errors.group", group_id.encode()),
    ]
    reason: Headers = [
        ("__dlq.errors.delivery.count", str(record.attempt).encode()),
        ("__dlq.errors.message", _class_name(error) + b": " + _text(error, why)),
    ]
    return _joined(record, origin, reason, last_only=tuple(name for name, _ in reason))


def _joined(record: Record, origin: Headers, reason: Headers, *, last_only: tuple[str, ...]) -> Headers:
    """A record's headers without those that start with `last_only`, what it has not of `origin` yet, and `reason`."""
    kept = [entry for entry in record.headers if not entry[0].startswith(last_only)]
    present = {name for name, _ in kept}
    return kept + [entry for entry in origin if entry[0] not in present] + reason


# --- records that wait for another attempt ---------------------------------------------------------------------------

_ORIGIN = "kafka_original-"
_ATTEMPTS = "retry_topic-attempts"
_DUE = "retry_topic-backoff-timestamp"
_FIRST_FAILURE = "keven_first-failure-timestamp"
_HANDLERS = "keven_retry-handlers"
_OF_RETRIES = (_ORIGIN, "kafka_exception-", "retry_topic-", _FIRST_FAILURE, _HANDLERS)


class Attempt(NamedTuple):
    """What a copy in a retry topic says.

    Attributes:
        record: the record as it first was: its topic, partition, offset, timestamp and own headers; `record.attempt`
            counts from 2 on.
        handlers: names of the handlers that are to run; empty: all.
    """

    record: Record
    handlers: tuple[str, ...]


def retry_headers(
    record: Record,
    error: BaseException,
    *,
    due_ms: int,
    first_failure_ms: int,
    handlers: tuple[str, ...],
) -> Headers:
    """The headers of a record's copy in the retry topic; `record` is what a handler saw."""
    headers: Headers = [
        *record.headers,
        *_origin(_ORIGIN, record),
        ("kafka_exception-fqcn", _class_name(error)),
        ("kafka_exception-message", _text(error)),
        (_ATTEMPTS, struct.pack(">i", record.attempt + 1)),
        (_DUE, _minimal(due_ms)),
        (_FIRST_FAILURE, struct.pack(">q", first_failure_ms)),
    ]
    if handlers:
        headers.append((_HANDLERS, ",".join(handlers).encode()))
    return headers


# No clock will show that time: not what this library writes.
_NEVER_MS = 2**53


def due_ms_of(copy: Record) -> int:
    """When a record of a retry topic is to be handled, milliseconds since the epoch; 0: it does not say so."""
    due_ms = int.from_bytes(copy.header(_DUE) or b"", "big")
    return due_ms if due_ms < _NEVER_MS else 0


def attempt_of(copy: Record) -> Attempt | None:
    """What a record of a retry topic says; None: it is not a copy that retry_headers() was written for."""
    said: dict[str, bytes] = {}
    own: Headers = []
    for entry in copy.headers:
        if entry[0].startswith(_OF_RETRIES):
            said[entry[0]] = entry[1] or b""
        else:
            own.append(entry)
    first = said.get(_FIRST_FAILURE)
    try:
        record = type(copy)(
            said[_ORIGIN + "topic"].decode(),
            _number(said[_ORIGIN + "partition"]),
            _number(said[_ORIGIN + "offset"]),
            value=copy.value,
            key=copy.key,
            headers=own,
            timestamp_ms=_number(said[_ORIGIN + "timestamp"]),
            timestamp_type=_TIMESTAMP_TYPES.index(said[_ORIGIN + "timestamp-type"].decode()),
            attempt=_number(said[_ATTEMPTS]),
            first_failure_ms=_number(first) if first else copy.timestamp_ms,
        )
        handlers = said.get(_HANDLERS, b"").decode()
    except (KeyError, ValueError, OverflowError):
        return None
    if not record.topic or record.attempt < 1 or _DUE not in said:
        return None
    return Attempt(record, tuple(filter(None, handlers.split(","))))


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big", signed=True)


def _minimal(number: int) -> bytes:
    """As Java's BigInteger.toByteArray(): big-endian, as short as it can be, with room for the sign."""
    return number.to_bytes(number.bit_length() // 8 + 1, "big", signed=True)
