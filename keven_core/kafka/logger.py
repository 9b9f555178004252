"""`KafkaLogger` and `KafkaBatchLogger`: write messages to Kafka, one acknowledged at a time or many.

Producers are shared by the loggers of a process that have the same settings, made at the first message, and closed at
interpreter exit; each logger counts its own messages.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING

from keven_core.kafka._producers import SharedProducer, shared_producer
from keven_core.kafka.config import Settings
from keven_core.kafka.envelope import key_of
from keven_core.kafka.errors import ClosedError, DeliveryError, KafkaError, KafkaTimeoutError, UsageError
from keven_core.kafka.events.event import Event
from keven_core.kafka.topics import check_topic, event_topic

if TYPE_CHECKING:
    from keven_core._native.producer import DeliveryAccount

__all__ = ["KafkaBatchLogger", "KafkaLogger"]

# While set, messages go into this list instead of to Kafka: (topic, value, key, headers). For keven_core.testing.
_capture: ContextVar[list[tuple[str, bytes, bytes | None, list[tuple[str, bytes | None]]]] | None] = ContextVar(
    "keven_core.captured_messages", default=None
)


def _as_bytes(data: object) -> bytes:
    if isinstance(data, bytes):
        return data
    if isinstance(data, (bytearray, memoryview)):
        return bytes(data)
    if isinstance(data, str):
        return data.encode()
    raise UsageError(f"a message has to be bytes, bytearray, memoryview, str or an Event, not {type(data).__name__}")


class _Logger:
    """What both loggers share: arguments, the producer, counts."""

    _linger_ms = 0

    def __init__(
        self,
        kafka_address: str | None = None,
        topic: str | None = None,
        timeout: float = 30,
        *,
        settings: Settings | None = None,
    ) -> None:
        self.topic = None if topic is None else check_topic(topic)
        self.timeout = timeout
        self._settings = settings
        self._address = kafka_address
        # By process, so that a forked child makes its own.
        self._made: dict[int, tuple[SharedProducer, DeliveryAccount]] = {}
        self._closed = False

    def _ready(self) -> tuple[SharedProducer, DeliveryAccount]:
        if self._closed:
            raise ClosedError("this logger is closed: make a new one")
        made = self._made.get(os.getpid())
        if made is None:
            from keven_core._native.producer import DeliveryAccount

            settings = self._settings or Settings.from_env()
            self._settings = settings
            shared = shared_producer(settings, settings.address(self._address), self._linger_ms)
            # setdefault is atomic: of threads that come here at once, all get the account of the first.
            made = self._made.setdefault(os.getpid(), (shared, DeliveryAccount()))
        return made

    def _message(self, data: object, topic: str | None) -> tuple[str, bytes, bytes | None]:
        if isinstance(data, Event):
            codec = (self._settings or Settings.from_env()).codec
            target = topic or self.topic or event_topic(data.event_name)
            return check_topic(target), data.serialize(codec), key_of(data)
        target = topic or self.topic or ""
        if not target:
            raise UsageError("the message has no topic: give the logger one, or log(data, topic=...)")
        return (check_topic(target) if topic else target), _as_bytes(data), None

    def _submit(
        self,
        data: object,
        topic: str | None,
        key: bytes | None = None,
        headers: Iterable[tuple[str, bytes | None]] | None = None,
        timestamp_ms: int | None = None,
        account: DeliveryAccount | None = None,
    ) -> bool:
        if self._closed:
            raise ClosedError("this logger is closed: make a new one")
        target, value, own_key = self._message(data, topic)
        captured = _capture.get()
        if captured is not None:
            captured.append((target, value, key or own_key, list(headers or ())))
            return False
        shared, own_account = self._ready()
        shared.prepare(target)
        try:
            shared.client.produce(
                target,
                value,
                account or own_account,
                key=key or own_key,
                headers=None if headers is None else list(headers),
                timestamp_ms=timestamp_ms or 0,
                timeout_ms=int(self.timeout * 1000),
            )
        except KafkaError as error:
            # What the broker has once said of a topic, the client answers from memory: the same error for the caller.
            raise DeliveryError(
                f"the message for {target} was not delivered: {error}",
                [(target, str(error))],
                1,
                code=error.code,
                name=error.name,
                fatal=error.fatal,
            ) from error
        return True


class KafkaLogger(_Logger):
    """Writes one message at a time: log() returns when the broker has acknowledged it.

    Arguments:
        kafka_address: host:port of the brokers, comma-separated; the environment variable KAFKA wins.
        topic: where messages go that name no topic of their own.
        timeout: seconds to wait for the acknowledgement.
        settings: a Settings object; None: from the environment at the first message.

    May be used from many threads.
    """

    def log(self, data: object, topic: str | None = None) -> None:
        """Send one message (bytes, bytearray, memoryview, str or an Event) and wait for its acknowledgement.

        Blocks up to `timeout` seconds, GIL released. Raises DeliveryError when the broker refused it,
        KafkaTimeoutError when it did not answer in time (the message may still arrive), and UsageError,
        ConfigurationError or MessageTooLargeError before anything is sent.
        """
        from keven_core._native.producer import DeliveryAccount

        account = DeliveryAccount()
        if not self._submit(data, topic, account=account):
            return
        shared, _ = self._ready()
        answered = shared.client.wait(account, self.timeout)
        if not answered:
            raise KafkaTimeoutError(
                f"the broker did not acknowledge the message within {self.timeout} s; it may still arrive",
                name="_TIMED_OUT",
            )
        count, kept = account.take_failures()
        if count:
            target, _, _, error, outcome = kept[0]
            raise DeliveryError(
                f"the message for {target} was {outcome}: {error}",
                [(target, str(error))],
                count,
                code=error.code,
                name=error.name,
            ) from error

    def close(self) -> None:
        """Refuse further messages. May be called twice."""
        self._closed = True

    def __enter__(self) -> KafkaLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class KafkaBatchLogger(_Logger):
    """Collects messages and sends them in batches; flush() waits for all of them.

    Arguments as KafkaLogger; `timeout` also bounds how long log() waits while the local queue is full. May be used from
    many threads. Nothing is dropped: what can't be delivered is counted and raised by flush().
    """

    _linger_ms = 5

    def log(
        self,
        data: object,
        topic: str | None = None,
        *,
        key: bytes | None = None,
        headers: Iterable[tuple[str, bytes | None]] | None = None,
        timestamp_ms: int | None = None,
    ) -> None:
        """Take one message (bytes, bytearray, memoryview, str or an Event); it is sent in the background.

        Bytes are not copied. Blocks only while the local queue is full, then raises QueueFullError after `timeout`.
        Raises UsageError, ConfigurationError or MessageTooLargeError when it can't be sent, and DeliveryError
        for one whose topic the broker has refused before; those are not counted and not raised by flush() again.
        """
        self._submit(data, topic, key, headers, timestamp_ms)
        made = self._made.get(os.getpid())
        if made is not None and not made[1].produced % 256:
            self._serve()

    @property
    def produced_count(self) -> int:
        """Messages taken so far."""
        made = self._made.get(os.getpid())
        return made[1].produced if made is not None else 0

    @property
    def received_count(self) -> int:
        """Messages that the broker has acknowledged."""
        made = self._serve()
        return made[1].delivered if made is not None else 0

    @property
    def pending_count(self) -> int:
        """Messages whose fate is not known yet."""
        made = self._serve()
        return made[1].pending if made is not None else 0

    def _serve(self) -> tuple[SharedProducer, DeliveryAccount] | None:
        made = self._made.get(os.getpid())
        if made is not None and not made[0].client.closed:
            made[0].client.serve(0)
        return made

    def flush(self, timeout: float | None = None) -> int:
        """Wait until every message of this logger has been answered; returns how many were acknowledged so far.

        Blocks up to `timeout` seconds (the logger's own by default), GIL released. Raises DeliveryError listing what
        the broker refused, KafkaTimeoutError when answers are still missing.
        """
        if os.getpid() not in self._made:
            return 0
        shared, account = self._ready()
        wanted = self.timeout if timeout is None else timeout
        answered = shared.client.wait(account, wanted)
        count, kept = account.take_failures()
        if count:
            raise DeliveryError(
                f"{count} message(s) were not delivered, the first: {kept[0][0]}: {kept[0][3]}",
                [(entry[0], str(entry[3])) for entry in kept],
                count,
            )
        if not answered:
            raise KafkaTimeoutError(
                f"{account.pending} message(s) were not acknowledged within {wanted} s; they are still being sent",
                name="_TIMED_OUT",
            )
        return account.delivered

    def close(self) -> None:
        """flush(), then refuse further messages. May be called twice."""
        if not self._closed:
            try:
                self.flush()
            finally:
                self._closed = True

    def __enter__(self) -> KafkaBatchLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
