"""`KafkaLogger` and `KafkaBatchLogger`: write messages to Kafka, one acknowledged at a time or many.

Producers are shared by the loggers of a process that have the same settings, made at the first message, and closed at
interpreter exit; each logger counts its own messages and has bounds of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Literal

import msgspec

from keven_core._native.logger import NativeLogger
from keven_core._native.producer import DeliveryAccount
from keven_core.kafka._producers import SharedProducer, shared_producer
from keven_core.kafka._spilling import BATCH_RECORDS, Spilling, is_passing
from keven_core.kafka.codecs import BUILT_IN
from keven_core.kafka.config import Settings
from keven_core.kafka.envelope import key_function
from keven_core.kafka.errors import (
    ClosedError,
    ConfigurationError,
    Delivery,
    DeliveryError,
    KafkaTimeoutError,
    QueueFullError,
    UsageError,
    delivery_error,
)
from keven_core.kafka.logs import RateLimiter
from keven_core.kafka.message import Message
from keven_core.kafka.spill import SpillRecord

__all__ = ["KafkaBatchLogger", "KafkaLogger"]

logger = logging.getLogger("keven_core.kafka")

# How long a flush goes on before it looks whether the brokers have refused the credentials.
_SLICE_S = 0.2
# How long messages of a logger with spill_dir are still sent when the process ends, and by close() after its flush();
# the rest goes to its files.
_EXIT_SPILL_MS = 2000
_CLOSE_SPILL_MS = 100

_spill_lock = threading.Lock()


def _renew_lock() -> None:
    global _spill_lock
    _spill_lock = threading.Lock()  # it may have been held by a thread that did not come along


os.register_at_fork(after_in_child=_renew_lock)


class _Logger(NativeLogger):
    """What both loggers share: arguments, settings, the producer and its stand-in."""

    # For publishers: they hand over events and commands, with their keys, and not their bytes.
    takes_messages = True

    def __init__(
        self,
        kafka_address: str | None,
        topic: str | None,
        timeout: float,
        settings: Settings | None,
    ) -> None:
        self.topic = topic
        self.timeout = timeout
        self._settings = settings
        self._address = kafka_address
        # By process, so that a forked child counts its own.
        self._made: dict[int, tuple[SharedProducer, DeliveryAccount]] = {}
        self._encoder: Any = None
        self._standing_in: Any = None
        self._stood_in = [0, 0]  # produced and received by a stand-in
        self._stood_in_error: Any = None  # what it has reported last

    # --- what NativeLogger asks for ----------------------------------------------------------------------------------

    def _read_settings(self) -> Settings:
        if self._settings is None:
            self._settings = Settings.from_env()
        return self._settings

    def _producer_of(self, settings: Settings, address: str) -> SharedProducer:
        return shared_producer(settings, settings.logger_options(address, linger_ms=0), address)

    def _open(self) -> tuple[Any, DeliveryAccount]:
        settings = self._read_settings()
        shared = self._producer_of(settings, settings.address(self._address))
        # setdefault is atomic: of threads that come here at once, all get the account of the first.
        _, account = self._made.setdefault(os.getpid(), (shared, self._new_account()))
        self._made[os.getpid()] = (shared, account)
        return shared.client, account

    def _new_account(self, **options: Any) -> DeliveryAccount:
        settings = self._read_settings()
        return DeliveryAccount(max_messages=settings.log_queue_messages, max_bytes=settings.log_queue_bytes, **options)

    def _shape(self, cls: type) -> tuple[Any, Any, Any]:
        """How objects of a class become messages: topic or function of it, function for the key, for the value."""
        if not issubclass(cls, Message):
            return None, None, None
        codec = self._read_settings().codec
        kind, name = cls.kind, getattr(cls, cls.kind.name_field)
        own_serialize = cls.serialize is not Message.serialize or not name or codec not in BUILT_IN
        return (
            kind.topic_of(name) if name else lambda message: kind.topic_of(getattr(message, kind.name_field)),
            key_function(cls),
            (lambda message: message.serialize(codec)) if own_serialize else None,
        )

    def _encode_into(self, data: object, buffer: bytearray) -> bytearray:
        if self._encoder is None:
            codec = self._read_settings().codec
            self._encoder = (msgspec.msgpack.Encoder if codec == "msgpack" else msgspec.json.Encoder)()
        try:
            self._encoder.encode_into(data, buffer)
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(
                f"a message has to be bytes, bytearray, memoryview, str, an Event or anything that msgspec can encode, "
                f"not {type(data).__name__}: {error}"
            ) from error
        return buffer

    def _stand_in_for(
        self,
        producer: Any,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        headers: Any,
        timestamp_ms: int | None,
    ) -> None:
        more = {"key": key, "headers": headers, "timestamp": timestamp_ms}
        self._stood_in[0] += 1
        given = {name: value for name, value in more.items() if value is not None}
        producer.produce(topic, value, on_delivery=self._stand_in_delivered, **given)

    def _stand_in_delivered(self, error: Any, message: Any) -> None:
        if error is None:
            self._stood_in[1] += 1
        else:
            self._stood_in_error = error

    # --- the producer, replaceable -----------------------------------------------------------------------------------

    @property
    def producer(self) -> Any:
        """An object with `produce(topic, value, on_delivery=)` and `flush(timeout)`; a test may put another in place.

        With a stand-in every message is handed to its produce(), and flush() calls its flush(); None ends that.
        """
        return self._standing_in if self._standing_in is not None else _LoggerProducer(self)

    @producer.setter
    def producer(self, stand_in: Any) -> None:
        self._standing_in = stand_in
        self._wire()

    def _wire(self) -> None:
        """Tell the compiled part what stands between log() and the producer."""
        self._configure(stand_in=self._standing_in)

    def _await(self, account: DeliveryAccount, timeout_s: float) -> bool:
        """Wait until nothing of an account is pending, GIL released; AuthenticationError when that is hopeless."""
        shared, _ = self._made[os.getpid()]
        deadline = time.monotonic() + timeout_s
        delivered = account.delivered
        while True:
            left_s = deadline - time.monotonic()
            try:
                if shared.client.wait(account, max(0.0, min(left_s, _SLICE_S))):
                    if account.delivered > delivered:
                        shared.refused = None
                    return True
            except ClosedError:
                return account.pending == 0  # its cluster has ended
            shared.check_credentials()
            if left_s <= 0:
                return False


class KafkaLogger(_Logger):
    """Writes one message at a time: log() returns when the broker has acknowledged it.

    Arguments:
        kafka_address: host:port of the brokers, comma-separated; the environment variable KAFKA wins.
        topic: where messages go that name no topic of their own.
        timeout: seconds to wait for the acknowledgement.
        settings: a Settings object; None: from the environment at the first message.

    Its producer does not linger: a message is sent at once. May be used from many threads and event loops.
    """

    def __init__(
        self,
        kafka_address: str | None = None,
        topic: str | None = None,
        timeout: float = 30,
        *,
        settings: Settings | None = None,
    ) -> None:
        super().__init__(kafka_address, topic, timeout, settings)
        self._deadlines: dict[asyncio.AbstractEventLoop, _Deadlines] = {}
        # By process: what is written through `producer`.
        self._through_producer: dict[int, DeliveryAccount] = {}

    def _stand_in_for(self, producer: Any, topic: str, *message: Any) -> None:
        self._stood_in_error = None
        super()._stand_in_for(producer, topic, *message)
        producer.flush(self.timeout)
        if self._stood_in_error is not None:
            raise DeliveryError(f"a message to {topic} was not delivered: {self._stood_in_error}", failed_count=1)

    def _new_account(self, **options: Any) -> DeliveryAccount:
        # Whoever awaits a message is told of its failure.
        return super()._new_account(**{"keep_failures": 0, **options})

    def log(self, data: object, topic: str | None = None) -> None:  # type: ignore[override]  # waits, and takes less
        """Send one message (what KafkaBatchLogger.log takes) and wait for its acknowledgement.

        Blocks up to `timeout` seconds, GIL released. Raises DeliveryError when the broker refused it,
        KafkaTimeoutError when it did not answer in time (the message may still arrive), AuthenticationError, and
        UsageError, ConfigurationError, MessageTooLargeError or QueueFullError before anything is sent.
        """
        self._log_and_wait(data, topic)

    def log_many(self, data: Iterable[object], topic: str | None = None) -> int:
        """Send messages together and wait until all are acknowledged; returns how many.

        Blocks and raises as log(); DeliveryError names those that failed, the others have been delivered.
        """
        account = self._new_account(keep_failures=10, raises=True)
        try:
            for entry in data:
                self.submit(entry, topic, deliveries=account)
        finally:
            # Also when one is refused: what was sent before it is waited for.
            if account.produced:
                self._settle(account, f"{account.pending} message(s)")
        return account.delivered

    def log_each(
        self, data: Iterable[tuple[object, str | None, bytes | None]], *, go_on: bool = False
    ) -> list[tuple[Exception | None] | None]:
        """Send (message, topic, key) entries together, in order, and wait; for each None, or its error in a tuple.

        After one that is refused before it is sent the others are tried only with `go_on`; else their error is None.
        Blocks up to `timeout` seconds for all of them.
        """
        sent: list[DeliveryAccount | Exception | None] = []
        found: list[tuple[Exception | None] | None] = []
        entries = list(data)
        for entry, topic, key in entries:
            account = self._new_account(keep_failures=1, raises=True)
            try:
                sent.append(account if self.submit(entry, topic, key=key, deliveries=account) else None)
            except Exception as error:
                sent.append(error)
                if not go_on:
                    break
        deadline = time.monotonic() + self.timeout
        for waited in sent:
            if isinstance(waited, Exception):
                found.append((waited,))
                continue
            try:
                if waited is not None:
                    self._settle(waited, "the message", max(0.0, deadline - time.monotonic()))
                found.append(None)
            except Exception as error:
                found.append((error,))
        return found + [(None,)] * (len(entries) - len(sent))

    def _settle(self, account: DeliveryAccount, what: str, timeout_s: float | None = None) -> None:
        answered = self._await(account, self.timeout if timeout_s is None else timeout_s)
        count, kept = account.take_failures()
        if count:
            raise delivery_error(count, kept)
        if not answered:
            raise _timed_out(what, self.timeout)

    async def alog(
        self,
        data: object,
        topic: str | None = None,
        *,
        key: bytes | str | None = None,
        headers: Any = None,
        timestamp_ms: int | None = None,
    ) -> None:
        """log() for event loops: awaits the acknowledgement; the loop goes on meanwhile.

        Messages of one task or of many are under way together. Raises as log(); cancelling gives up waiting, the
        message may still arrive.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.timeout
        while True:
            try:
                future = self.submit(data, topic, key=key, headers=headers, timestamp_ms=timestamp_ms, loop=loop)
                break
            except QueueFullError:
                if loop.time() >= deadline:
                    raise
                await asyncio.sleep(0.005)
        if future is False:
            return
        deadlines = self._deadlines.get(loop)
        if deadlines is None:
            for other in list(self._deadlines):
                if other.is_closed():
                    self._deadlines.pop(other, None)
            deadlines = self._deadlines[loop] = _Deadlines(loop, lambda: self._made[os.getpid()])
        deadlines.add(deadline, future, self.timeout)
        await future

    # --- through `producer` ------------------------------------------------------------------------------------------

    def _produce(self, topic: str, value: object, key: Any, headers: Any) -> None:
        account = self._through_producer.get(os.getpid())
        if account is None:
            account = self._through_producer.setdefault(os.getpid(), self._new_account(announce=True))
        self.submit(value, topic, key=key, headers=headers, deliveries=account)

    def _await_produced(self, timeout: float | None) -> int:
        account = self._through_producer.get(os.getpid())
        if account is None or not account.produced:
            return 0
        self._await(account, self.timeout if timeout is None else timeout)
        account.take_failures()  # they were logged
        return account.pending

    def close(self) -> None:
        """Refuse further messages. May be called twice."""
        self._end()

    def __enter__(self) -> KafkaLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Deadlines:
    """What the messages of one event loop wait for, beside their answers: time-outs, refused credentials.

    One timer for all of them. In the loop's thread. `made` gives the producer and the account of the logger.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, made: Callable[[], tuple[SharedProducer, DeliveryAccount]]
    ) -> None:
        self._loop = loop
        self._made = made
        self._delivered = made()[1].delivered
        self._waiting: deque[tuple[float, asyncio.Future[None], float]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, deadline: float, future: asyncio.Future[None], timeout: float) -> None:
        waiting = self._waiting
        # What was answered is let go of at once: it is small, but the collector would look at it again and again.
        while waiting and waiting[0][1].done():
            waiting.popleft()
        waiting.append((deadline, future, timeout))
        if self._timer is None:
            self._timer = self._loop.call_at(min(deadline, self._loop.time() + _SLICE_S), self._look)

    def _look(self) -> None:
        self._timer = None
        now, waiting, (shared, account) = self._loop.time(), self._waiting, self._made()
        answered = account.delivered > self._delivered
        self._delivered = account.delivered
        while waiting and (waiting[0][1].done() or waiting[0][0] <= now):
            _, future, timeout = waiting.popleft()
            if not future.done():
                future.set_exception(_timed_out("the message", timeout))
        if shared.refused is not None:
            stuck = 0
            for deadline, future, timeout in waiting:
                if deadline - timeout + _SLICE_S > now:
                    break  # it has not waited for long, nor have those behind it
                if not future.done():
                    stuck += 1
                    future.set_exception(shared.refused)
            if answered and not stuck:
                shared.refused = None
        if waiting:
            self._timer = self._loop.call_at(min(waiting[0][0], now + _SLICE_S), self._look)


def _timed_out(what: str, timeout: float) -> KafkaTimeoutError:
    return KafkaTimeoutError(
        f"the broker did not acknowledge {what} within {timeout:g} s; it may still arrive", name="_TIMED_OUT"
    )


class KafkaBatchLogger(_Logger):
    """Collects messages and sends them in batches; flush() waits for all of them.

    Arguments:
        kafka_address, topic, settings: as of KafkaLogger.
        timeout: seconds that flush() waits, and log() while the queue is full.
        on_full: what log() does when the queue is full: "block" (up to `timeout`, then QueueFullError), "drop" the
            message, or call this function as on_full(value, topic) instead of queueing it. What is dropped is counted
            in `dropped_count`. Handlers of a server always wait.
        on_delivery: called now and then, in a thread of the producer, with a list of Delivery of messages whose fate is
            known, in the order in which it became known. It must not wait for this logger.
        spill_dir: a folder for messages that Kafka is away too long for: when the queue is full, they go to files
            there (KEVEN_SPILL_BYTES at most) and are sent in order when Kafka is back, also after a restart. It may be
            shared by loggers and processes. Messages do not time out then.
        spill: "overflow", or "always": every message is written there first and leaves when it was delivered
            (KEVEN_SPILL_FSYNC). Handlers of a server go past it: their records are kept until all is delivered.

    May be used from many threads. Nothing is dropped unless asked for: what can't be delivered is counted, logged as an
    error and raised by flush().
    """

    def __init__(
        self,
        kafka_address: str | None = None,
        topic: str | None = None,
        timeout: float = 30,
        *,
        settings: Settings | None = None,
        on_full: Literal["block", "drop"] | Callable[[bytes | None, str], Any] = "block",
        on_delivery: Callable[[list[Delivery]], Any] | None = None,
        spill_dir: str | os.PathLike[str] | None = None,
        spill: Literal["overflow", "always"] = "overflow",
    ) -> None:
        if on_full not in ("block", "drop") and not callable(on_full):
            raise ConfigurationError(f'on_full={on_full!r:.80} is not known: "block", "drop" or a function')
        if spill not in ("overflow", "always"):
            raise ConfigurationError(f'spill={spill!r:.80} is not known: "overflow" or "always"')
        if spill_dir is not None and on_full != "block":
            raise ConfigurationError("spill_dir and on_full both say what becomes of a message when the queue is full")
        super().__init__(kafka_address, topic, timeout, settings)
        self.dropped_count = 0
        self._on_delivery = on_delivery
        self._limiter = RateLimiter(3, 10.0)
        self._on_full = on_full
        self._spill_dir = None if spill_dir is None else os.fspath(spill_dir)
        self._spill_always = spill == "always"
        self._spilling: dict[int, Spilling] = {}  # by process
        self._detour = spill_dir is not None
        self._wire()

    # --- what NativeLogger asks for ----------------------------------------------------------------------------------

    def _wire(self) -> None:
        yields = self._on_full != "block" or self._spill_dir is not None
        self._configure(stand_in=self._standing_in, yields=yields, detour=self._detour)

    def _divert(self, detour: bool) -> None:
        if detour != self._detour:
            self._detour = detour
            self._wire()

    def _producer_of(self, settings: Settings, address: str) -> SharedProducer:
        options = settings.logger_options(address, linger_ms=settings.linger_ms)
        if self._spill_dir is None:
            return shared_producer(settings, options, address)
        # Of its own, so that it can be ended alone, and without an end to its patience: what waits is safe.
        return shared_producer(settings, {**options, "message.timeout.ms": "0"}, address, owner=self)

    def _open(self) -> tuple[Any, DeliveryAccount]:
        spilling = self._spilling.get(os.getpid())
        if spilling is not None:
            before = self._made[os.getpid()][0].client
            if before.fatal or before.closed:
                spilling.hold()
        client, account = super()._open()
        if self._on_delivery is not None:
            client.watch()
        if self._spill_dir is not None:
            with _spill_lock:  # two threads may come here at once
                if os.getpid() not in self._spilling:
                    try:
                        self._spilling[os.getpid()] = self._open_spill(self._spill_dir)
                    except BaseException:
                        self._made[os.getpid()][0].close(0)  # or it would stay until the process ends
                        raise
                    atexit.register(self._end_spill, _EXIT_SPILL_MS)
        return client, account

    def _open_spill(self, folder: str) -> Spilling:
        def send(record: SpillRecord, account: DeliveryAccount) -> None:
            self.submit(
                record.value,
                record.topic,
                key=record.key,
                headers=record.headers,
                timestamp_ms=record.timestamp_ms or None,
                deliveries=account,
            )

        on_delivery = None if self._on_delivery is None else self._tell_of_ends
        return Spilling(
            folder,
            self._read_settings(),
            always=self._spill_always,
            send=send,
            producer=lambda: self._made[os.getpid()][0].client,
            new_account=lambda producer: _Logger._new_account(
                self, keep_failures=BATCH_RECORDS, on_delivery=on_delivery, numbered=True, producer=producer
            ),
            collect=self._collect,
            passed=lambda: self._made[os.getpid()][1],
            divert=self._divert,
            tell=self._tell,
        )

    def _collect(self) -> None:
        client = self._made[os.getpid()][0].client
        if client.fatal:
            self._open()  # at once: what it had under way comes back when it is closed
        try:
            client.serve(0)
        except ClosedError:
            if not client.replaced:
                raise

    def _new_account(self, **options: Any) -> DeliveryAccount:
        told = None if self._on_delivery is None else self._tell
        if self._spill_dir is None:
            return super()._new_account(on_delivery=told, announce=True)
        return super()._new_account(on_delivery=self._came_back, only_failures=told is None, numbered=True)

    def _tell(self, deliveries: list[Delivery]) -> None:
        """Call on_delivery. What it raises is its own: nobody who could handle that is near."""
        if self._on_delivery is not None:
            try:
                self._on_delivery(deliveries)
            except Exception:
                if self._limiter.admit("on_delivery") is not None:
                    logger.exception("on_delivery of a logger failed, called with %d message(s)", len(deliveries))

    def _tell_of_ends(self, numbered: list[tuple[int, Delivery]]) -> None:
        """With `spill_dir`, of messages from the files: those that are sent again are not told of."""
        told = [delivery for _, delivery in numbered if not is_passing(delivery)]
        if told:
            self._tell(told)

    def _came_back(self, numbered: list[tuple[int, Delivery]]) -> None:
        """With `spill_dir`: what could not be sent for now goes to the files, the rest is told of."""
        told = self._spilling[os.getpid()].take_back(numbered)
        if told:
            self._tell(told)

    def _keep(self, topic: str, value: Any, key: Any, headers: Any, timestamp_ms: Any) -> bool:
        return self._spilling[os.getpid()].keep(topic, value, key, headers, timestamp_ms)

    def _overflow(self, topic: str, value: Any, key: Any, headers: Any, timestamp_ms: Any) -> bool:
        if self._spill_dir is not None:
            return self._spilling[os.getpid()].keep(topic, value, key, headers, timestamp_ms, overflow=True)
        if callable(self._on_full):
            self._on_full(value, topic)
        self.dropped_count += 1
        return True

    # --- counts ------------------------------------------------------------------------------------------------------

    @property
    def produced_count(self) -> int:
        """Messages taken so far, without those that were dropped."""
        account, spilling = self._collected()
        return (
            self._stood_in[0]
            + (account.produced if account is not None else 0)
            + (spilling.kept_count if spilling is not None else 0)
        )

    @property
    def received_count(self) -> int:
        """Messages that the broker has acknowledged."""
        account, spilling = self._collected()
        return (
            self._stood_in[1]
            + (account.delivered if account is not None else 0)
            + (spilling.delivered_count if spilling is not None else 0)
        )

    @property
    def pending_count(self) -> int:
        """Messages whose fate is not known yet and that are nowhere but in memory."""
        account, spilling = self._collected()
        if account is None:
            return 0
        return account.pending if spilling is None else spilling.passed_count

    @property
    def spilled_count(self) -> int:
        """Messages in the files of `spill_dir` that are not known to be delivered, those of earlier runs included."""
        spilling = self._collected()[1]
        return spilling.pending_count if spilling is not None else 0

    def _collected(self) -> tuple[DeliveryAccount | None, Spilling | None]:
        made = self._made.get(os.getpid())
        if made is None:
            return None, None
        if not made[0].client.closed:
            made[0].client.serve(0)
        return made[1], self._spilling.get(os.getpid())

    # --- end ---------------------------------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> int:
        """Wait until every message of this logger has been answered; returns how many were acknowledged so far.

        Blocks up to `timeout` seconds (the logger's own by default), GIL released. Raises DeliveryError with what
        was not delivered since the last flush, AuthenticationError, and KafkaTimeoutError when answers are missing.
        Messages in the files of `spill_dir` are waited for too, but are no error: `spilled_count` tells how many are
        there still.
        """
        wanted = self.timeout if timeout is None else timeout
        if self._standing_in is not None:
            self._standing_in.flush(wanted)
            return self.received_count
        made = self._made.get(os.getpid())
        if made is None:
            return 0
        account, spilling = made[1], self._spilling.get(os.getpid())
        deadline = time.monotonic() + wanted
        answered = self._await(account, wanted)
        if spilling is not None:
            spilling.wait(deadline - time.monotonic())
            answered = answered or account.pending == 0
        self._raise_failures(account, spilling)
        if not answered:
            spilled = f" ({self.spilled_count} more are in {self._spill_dir})" if spilling is not None else ""
            raise KafkaTimeoutError(
                f"{account.pending} message(s) were not acknowledged within {wanted:g} s; they are still being sent"
                + spilled,
                name="_TIMED_OUT",
            )
        return self.received_count

    def _raise_failures(self, account: DeliveryAccount, spilling: Spilling | None) -> None:
        count, kept = account.take_failures()
        if spilling is not None:
            spilling.await_reports(account.failed)
            count, kept = spilling.take_failures()
        if count:
            raise delivery_error(count, kept)

    async def aflush(self, timeout: float | None = None) -> int:
        """flush() for event loops: the wait is in a thread."""
        return await asyncio.get_running_loop().run_in_executor(None, self.flush, timeout)

    def close(self) -> None:
        """flush(), then refuse further messages. May be called twice.

        With `spill_dir` what could not be sent in time is no error: it is in the files, in order.
        """
        if self.closed:
            return
        made, spilling = self._made.get(os.getpid()), self._spilling.get(os.getpid())
        try:
            with contextlib.suppress(KafkaTimeoutError) if spilling is not None else contextlib.nullcontext():
                self.flush()
        finally:
            self._end()
            self._end_spill(_CLOSE_SPILL_MS)
        if made is not None and spilling is not None:
            self._raise_failures(made[1], spilling)

    def _end_spill(self, timeout_ms: int) -> None:
        """End the producer and the files: what could not be sent within the time is in the files afterwards."""
        spilling = self._spilling.get(os.getpid())
        if spilling is not None and not spilling.closed:
            atexit.unregister(self._end_spill)
            spilling.end()
            shared, account = self._made[os.getpid()]
            shared.close(timeout_ms)
            spilling.close(account.failed)

    def __enter__(self) -> KafkaBatchLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> KafkaBatchLogger:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)


class _LoggerProducer:
    """What `logger.producer` is: the logger, as code written for a producer of confluent-kafka calls it."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def produce(
        self, topic: str, value: object = None, key: Any = None, *, headers: Any = None, on_delivery: Any = None
    ) -> None:
        """Log one message, without waiting for it. What is not delivered is logged as an error."""
        if on_delivery is not None:
            raise UsageError("on_delivery is given to the logger: KafkaBatchLogger(on_delivery=...)")
        if isinstance(self._logger, KafkaLogger):
            self._logger._produce(topic, value, key, headers)
        else:
            self._logger.submit(value, topic, key=key, headers=headers)

    def flush(self, timeout: float | None = None) -> int:
        """Wait for what is pending, the logger's `timeout` by default; returns how many messages are pending still."""
        left: int = 0
        if isinstance(self._logger, KafkaLogger):
            return self._logger._await_produced(timeout)
        try:
            self._logger.flush(timeout)
        except (DeliveryError, KafkaTimeoutError):
            left = self._logger.pending_count
        return left
