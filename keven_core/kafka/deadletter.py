"""Dead letters: which headers a copy carries, and the publisher that sends it.

The dialect is Spring's (kafka_dlt-*), which user interfaces look for. The first origin is kept when a record fails
again; only the last exception is. Value, key and timestamp are the original's.
"""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING, Any

from keven_core.kafka.errors import DeadLetterError, KafkaError, delivery_error
from keven_core.kafka.logs import one_line

if TYPE_CHECKING:
    from keven_core._native.message import Record
    from keven_core._native.producer import Producer

__all__ = ["DeadLetterPublisher", "dead_letter_headers"]

Headers = list[tuple[str, "bytes | None"]]

_TIMESTAMP_TYPES = ("NoTimestampType", "CreateTime", "LogAppendTime")
_MESSAGE_LIMIT = 1000  # characters of an exception's text


def _class_name(error: BaseException) -> bytes:
    cls = type(error)
    return f"{cls.__module__}.{cls.__qualname__}".encode()


def dead_letter_headers(record: Record, error: BaseException, group_id: str) -> Headers:
    """The headers of a record's dead-letter copy: its own, then origin and reason."""
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
        ("kafka_dlt-exception-message", one_line(error, _MESSAGE_LIMIT).encode()),
    ]
    if error.__cause__ is not None:
        reason.append(("kafka_dlt-exception-cause-fqcn", _class_name(error.__cause__)))
    kept = [(name, value) for name, value in record.headers if not name.startswith("kafka_dlt-exception-")]
    present = {name for name, _ in kept}
    return kept + [(name, value) for name, value in origin if name not in present] + reason


class DeadLetterPublisher:
    """Copies failed records to one topic, on a producer of its own that is made at the first failure.

    Owner thread only. A copy counts once the broker has acknowledged it: see pending() and failure().
    """

    def __init__(self, topic: str, group_id: str, options: dict[str, str], on_event: Any) -> None:
        self.topic = topic
        self._group_id = group_id
        self._options = options
        self._on_event = on_event
        self._producer: Producer | None = None
        self._account: Any = None

    def publish(self, record: Record, error: BaseException) -> None:
        """Submit the copy of a record. Raises DeadLetterError when it can't even be queued."""
        from keven_core._native.producer import DeliveryAccount, Producer

        if self._producer is None:
            self._producer = Producer(self._options, self._on_event)
            self._account = DeliveryAccount()
            # Connects now: the first copy would otherwise wait for librdkafka's next 1 s tick.
            with contextlib.suppress(KafkaError):
                self._producer.metadata(1000)
        try:
            self._producer.produce(
                self.topic,
                record.value,
                self._account,
                key=record.key,
                headers=dead_letter_headers(record, error, self._group_id),
                timestamp_ms=max(record.timestamp_ms, 0),
            )
        except Exception as cause:
            raise DeadLetterError(
                f"{record.topic} [{record.partition}] @ {record.offset} can't be copied to its dead-letter topic "
                f"{self.topic}: {cause}; the offset stays"
            ) from cause

    def pending(self) -> int:
        """Copies that the broker has not answered yet."""
        return self._account.pending if self._account is not None else 0

    def unsettled(self) -> bool:
        """Whether copies were submitted whose outcome has not been taken by failure() or is still to come."""
        return self._account is not None and (self._account.pending > 0 or self._account.untaken > 0)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the answers, GIL released; whether all have come."""
        return self._producer is None or self._producer.wait(self._account, timeout_s)

    def serve(self) -> None:
        """Take answers that have come, without waiting."""
        if self._producer is not None:
            self._producer.serve(0)

    def failure(self) -> DeadLetterError | None:
        """What the broker refused since the last call, as one error; None: nothing."""
        if self._account is None or not self._account.untaken:
            return None
        cause = delivery_error(*self._account.take_failures())
        return DeadLetterError(
            f"{cause.failed_count} record(s) could not be copied to their dead-letter topic {self.topic} "
            f"({cause.failures[0].outcome}: {cause.failures[0].error}); their offsets stay, and they will be handled "
            f"again",
            cause.failures,
            cause.failed_count,
        )

    def unanswered(self) -> DeadLetterError | None:
        """What the broker has not answered yet, as an error; None: nothing."""
        if not self.pending():
            return None
        return DeadLetterError(
            f"{self.pending()} copy(ies) of failed records were not acknowledged by {self.topic} in time; their "
            f"offsets stay, and they will be handled again",
            failed_count=self.pending(),
        )

    def set_token(self, source: Any) -> None:
        """Apply `source(client)` to the producer, for OAUTHBEARER tokens."""
        if self._producer is not None:
            source(self._producer)

    def close(self, timeout_ms: int) -> None:
        """Free the producer."""
        if self._producer is not None:
            self._producer.close(timeout_ms)
            self._producer = None
