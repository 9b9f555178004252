"""Sends copies of failed records: dead letters, and records that wait for another attempt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from keven_core.kafka.errors import DeadLetterError, DeliveryError, KafkaError, delivery_error

if TYPE_CHECKING:
    from keven_core._native.message import Record
    from keven_core._native.producer import DeliveryAccount, Producer
    from keven_core.kafka.config import Settings

__all__ = ["COPY_TOPIC_CONFIG", "CopyPublisher", "copy_options", "refused", "unanswered"]

# librdkafka's maximum: whatever was accepted where a record comes from has to fit where its copy goes, headers too.
_LARGEST_MESSAGE_BYTES = "1000000000"

# Of topics that are made for copies.
COPY_TOPIC_CONFIG = {"max.message.bytes": _LARGEST_MESSAGE_BYTES}


def copy_options(settings: Settings, address: str, client_id: str, *, timeout_s: float) -> dict[str, str]:
    """librdkafka properties of a producer of copies, which gives one up after `timeout_s` seconds."""
    return {
        **settings.producer_options(address, client_id, linger_ms=5),
        "message.timeout.ms": str(int(timeout_s * 1000)),
        "message.max.bytes": _LARGEST_MESSAGE_BYTES,
    }


class CopyPublisher:
    """Copies failed records to other topics, on a producer of its own that is made at the first failure.

    Owner thread only, but for wait(). `account` counts the copies since the last take(): a record is safe once its
    copy has been acknowledged.
    """

    def __init__(self, options: dict[str, str], on_event: Any) -> None:
        from keven_core._native.producer import DeliveryAccount, Producer

        self._make_producer: Callable[[], Producer] = lambda: Producer(options, on_event)
        self._make_account: Callable[[], DeliveryAccount] = DeliveryAccount
        self._producer: Producer | None = None
        self.account: DeliveryAccount | None = None

    def publish(self, topic: str, record: Record, headers: Any, timestamp_ms: int) -> None:
        """Submit a copy; `timestamp_ms` 0: now. Raises DeadLetterError when it can't even be queued."""
        producer = self._producer
        is_new = producer is None
        if producer is None:
            producer = self._producer = self._make_producer()
        if self.account is None:
            self.account = self._make_account()
        try:
            producer.produce(
                topic, record.value, self.account, key=record.key, headers=headers, timestamp_ms=timestamp_ms
            )
        except Exception as cause:
            raise DeadLetterError(
                f"{record.topic} [{record.partition}] @ {record.offset} can't be copied to {topic}: {cause}; the "
                f"offset stays"
            ) from cause
        if is_new:
            # Connects now: the copy would otherwise wait for librdkafka's next 1 s tick.
            with contextlib.suppress(KafkaError):
                producer.metadata(1000, used_only=True)

    def take(self) -> DeliveryAccount | None:
        """The account of what was submitted so far, if anything; what follows is counted in a new one."""
        account, self.account = self.account, None
        return account

    def wait(self, account: DeliveryAccount, timeout_s: float) -> bool:
        """Wait until nothing of an account is pending, GIL released; whether that was so in time."""
        return self._producer is None or self._producer.wait(account, timeout_s)

    def serve(self) -> None:
        """Take answers that have come, without waiting."""
        if self._producer is not None:
            self._producer.serve(0)

    def set_token(self, source: Any) -> None:
        """Apply `source(client)` to the producer, for OAUTHBEARER tokens."""
        if self._producer is not None:
            source(self._producer)

    def close(self, timeout_ms: int) -> None:
        """Free the producer."""
        if self._producer is not None:
            self._producer.close(timeout_ms)
            self._producer = None


def refused(account: DeliveryAccount) -> DeadLetterError | None:
    """What the broker refused of the copies that an account counts, as one error; None: nothing."""
    if not account.failed:
        return None
    cause: DeliveryError = delivery_error(account.failed, account.failures)
    first = cause.failures[0]
    return DeadLetterError(
        f"{cause.failed_count} failed record(s) could not be copied to {first.topic} ({first.outcome}: {first.error}); "
        f"their offsets stay, and they will be handled again",
        cause.failures,
        cause.failed_count,
    )


def unanswered(count: int) -> DeadLetterError:
    """The error for copies that the broker has not acknowledged in time."""
    return DeadLetterError(
        f"{count} copy(ies) of failed records were not acknowledged in time; their offsets stay, and they will be "
        f"handled again",
        failed_count=count,
    )
