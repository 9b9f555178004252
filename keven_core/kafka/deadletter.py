"""Which headers copies of failed records carry: dead letters, and records that wait for another attempt.

Dead letters speak Spring's dialect by default (kafka_dlt-*), which user interfaces look for, or that of Kafka's own
share groups (__dlq.errors.*, KIP-1191). The first origin is kept when a record fails again; only the last exception is.
Waiting records carry what Spring's retry topics carry, and the names of the handlers that are to run again.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from keven_core.kafka.logs import one_line

if TYPE_CHECKING:
    from keven_core._native.message import Record

__all__ = ["Attempt", "attempt_of", "dead_letter_headers", "retry_headers"]

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
    origin: Headers = [
        ("kafka_dlt-original-topic", record.topic.encode()),
        ("kafka_dlt-original-partition", struct.pack(">i", record.partition)),
        ("kafka_dlt-original-offset", struct.pack(">q", record.offset)),
        ("kafka_dlt-original-timestamp", struct.pack(">q", record.timestamp_ms)),
        ("kafka_dlt-original-timestamp-type", _TIMESTAMP_TYPES[record.timestamp_type].encode()),
        ("kafka_dlt-original-consumer-group", group_id.encode()),
    ]
    reason: Headers = [
        ("kafka_dlt-exception-fqcn", _class_name(error)),
        ("kafka_dlt-exception-message", _text(error, why)),
    ]
    if error.__cause__ is not None:
        reason.append(("kafka_dlt-exception-cause-fqcn", _class_name(error.__cause__)))
    return _joined(record, origin, "kafka_dlt-exception-", reason)


def _text(error: BaseException, why: str) -> bytes:
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
    kept = [(name, value) for name, value in record.headers if name != "__dlq.errors.delivery.count"]
    return _joined(record, origin, "__dlq.errors.message", reason, kept)


def _joined(
    record: Record, origin: Headers, last_only: str, reason: Headers, headers: Headers | None = None
) -> Headers:
    """A record's headers without those that start with `last_only`, what it has not of `origin` yet, and `reason`."""
    kept = [entry for entry in (headers or record.headers) if not entry[0].startswith(last_only)]
    present = {name for name, _ in kept}
    return kept + [entry for entry in origin if entry[0] not in present] + reason


# --- records that wait for another attempt ---------------------------------------------------------------------------

_ORIGIN = "kafka_original-"
_ATTEMPTS = "retry_topic-attempts"
_DUE = "retry_topic-backoff-timestamp"
_FIRST_FAILURE = "keven_first-failure-timestamp"
_HANDLERS = "keven_retry-handlers"
_OF_RETRIES = (_ORIGIN, "kafka_exception-", "retry_topic-", _FIRST_FAILURE, _HANDLERS)


@dataclass(frozen=True)
class Attempt:
    """What a copy in a retry topic says.

    Attributes:
        record: the record as it first was: its topic, partition, offset, timestamp and own headers; `record.attempt`
            counts from 2 on.
        due_ms: when it is to be handled, milliseconds since the epoch.
        first_failure_ms: when it failed for the first time.
        handlers: names of the handlers that are to run; empty: all.
    """

    record: Record
    due_ms: int
    first_failure_ms: int
    handlers: tuple[str, ...]


def retry_headers(
    record: Record,
    error: BaseException,
    group_id: str,
    *,
    due_ms: int,
    first_failure_ms: int,
    handlers: tuple[str, ...],
) -> Headers:
    """The headers of a record's copy in the retry topic; `record` is what a handler saw."""
    headers: Headers = [
        *record.headers,
        (_ORIGIN + "topic", record.topic.encode()),
        (_ORIGIN + "partition", struct.pack(">i", record.partition)),
        (_ORIGIN + "offset", struct.pack(">q", record.offset)),
        (_ORIGIN + "timestamp", struct.pack(">q", record.timestamp_ms)),
        (_ORIGIN + "timestamp-type", _TIMESTAMP_TYPES[record.timestamp_type].encode()),
        ("kafka_exception-fqcn", _class_name(error)),
        ("kafka_exception-message", one_line(error, _MESSAGE_LIMIT).encode()),
        (_ATTEMPTS, struct.pack(">i", record.attempt + 1)),
        (_DUE, _minimal(due_ms)),
        (_FIRST_FAILURE, struct.pack(">q", first_failure_ms)),
    ]
    if handlers:
        headers.append((_HANDLERS, ",".join(handlers).encode()))
    return headers


def attempt_of(copy: Record) -> Attempt | None:
    """What a record of a retry topic says; None: it is not a copy that retry_headers() was written for."""
    from keven_core._native.message import Record

    said = {name: value for name, value in copy.headers if name.startswith(_OF_RETRIES)}
    try:
        kind = (said[_ORIGIN + "timestamp-type"] or b"").decode()
        record = Record(
            (said[_ORIGIN + "topic"] or b"").decode(),
            int.from_bytes(said[_ORIGIN + "partition"] or b"", "big", signed=True),
            int.from_bytes(said[_ORIGIN + "offset"] or b"", "big", signed=True),
            value=copy.value,
            key=copy.key,
            headers=[entry for entry in copy.headers if not entry[0].startswith(_OF_RETRIES)],
            timestamp_ms=int.from_bytes(said[_ORIGIN + "timestamp"] or b"", "big", signed=True),
            timestamp_type=_TIMESTAMP_TYPES.index(kind),
            attempt=int.from_bytes(said[_ATTEMPTS] or b"", "big", signed=True),
        )
        due_ms = int.from_bytes(said[_DUE] or b"", "big")
        first = said.get(_FIRST_FAILURE)
        handlers = (said.get(_HANDLERS) or b"").decode()
    except (KeyError, ValueError, OverflowError):
        return None
    if not record.topic or record.attempt < 1:
        return None
    first_failure_ms = int.from_bytes(first, "big", signed=True) if first else copy.timestamp_ms
    return Attempt(record, due_ms, first_failure_ms, tuple(filter(None, handlers.split(","))))


def _minimal(number: int) -> bytes:
    """As Java's BigInteger.toByteArray(): big-endian, as short as it can be, with room for the sign."""
    return number.to_bytes(number.bit_length() // 8 + 1, "big", signed=True)
