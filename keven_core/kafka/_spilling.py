"""What stands between a KafkaBatchLogger with `spill_dir` and its producer: messages that wait in files.

    "overflow"  log() -> producer, and while that is full or the files hold something: log() -> files -> producer
    "always"    log() -> files -> producer, a write-ahead log

What is in memory is of one time at most: log() goes past the files again when all that went past them before has been
answered. So at the end it can be put into the files at one place, before what overflowed later.

A record leaves the files when the broker has acknowledged it, or when its failure is handed back to the application.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from keven_core.kafka.config import Settings
from keven_core.kafka.errors import ClosedError, Delivery, KafkaError, KevenError, QueueFullError
from keven_core.kafka.logs import RateLimiter, one_line
from keven_core.kafka.spill import SpillRecord, SpillStore

if TYPE_CHECKING:
    from keven_core._native.producer import DeliveryAccount

__all__ = ["BATCH_RECORDS", "Spilling", "is_passing"]

logger = logging.getLogger("keven_core.kafka")

# Records that are read and handed over together, and waited for together.
BATCH_RECORDS = 1000
_BATCH_BYTES = 1 << 20
# Batches under way at once.
_BATCHES = 16
_TICK_S = 0.02
_RETRY_S = 1.0

# Failures that say nothing against the message itself: it waits for better times.
_PASSING = frozenset(
    {"_PURGE_QUEUE", "_PURGE_INFLIGHT", "_MSG_TIMED_OUT", "_TIMED_OUT", "_TRANSPORT", "_ALL_BROKERS_DOWN", "_FATAL"}
)


class Spilling:
    """The files of one logger, and the thread that sends what is in them.

    Arguments:
        folder: see SpillStore.
        always: whether every message goes through the files.
        send: hands a record to the producer, counted in an account; may wait for room, raises KevenError.
        new_account: makes such an account.
        collect: brings the counts of accounts up to date; raises ClosedError when the producer is gone for good.
        passed: how many messages that went past the files are pending.
        divert: told whether log() has to come here with every message.
        tell: the application's on_delivery; told of what has come to its end, but for what take_back() returns.
    """

    def __init__(
        self,
        folder: str,
        settings: Settings,
        *,
        always: bool,
        send: Callable[[SpillRecord, DeliveryAccount], None],
        new_account: Callable[[], DeliveryAccount],
        collect: Callable[[], None],
        passed: Callable[[], int],
        divert: Callable[[bool], None],
        tell: Callable[[list[Delivery]], None],
    ) -> None:
        self.folder = folder
        self.kept_count = 0
        self.delivered_count = 0
        self.failures: list[Delivery] = []
        self.failed_count = 0
        self._always = always
        self._send = send
        self._new_account = new_account
        self._collect = collect
        self._passed = passed
        self._divert = divert
        self._tell = tell
        self._limiter = RateLimiter(3, 10.0)
        self._store = SpillStore(folder, max_bytes=settings.spill_bytes, fsync=settings.spill_fsync)
        self._first_own: int | None = None
        self._under_way: deque[tuple[DeliveryAccount, list[tuple[int, SpillRecord]]]] = deque()
        # Order: between an append and what log() does next. Re-entrant: what the store warns of may be logged to it.
        self._lock = threading.RLock()
        self._woken = threading.Event()
        self._handing = False  # a batch is between the files and the producer
        self._ended = False
        self.closed = False
        self._reported = 0  # failed messages that take_back() was given
        self._place = self._store.reserve()  # in the files, of what goes past them
        self._left_over: list[Delivery] = []  # what came back at the end, to be put there
        self._divert(always or self._store.pending_count > 0)
        self._thread = threading.Thread(target=self._run, name="keven-spill", daemon=True)
        self._thread.start()

    @property
    def pending_count(self) -> int:
        """Messages in the files that are not known to be delivered, those of earlier processes included."""
        return self._store.pending_count

    def keep(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        headers: Any,
        timestamp_ms: int | None,
        *,
        overflow: bool = False,
    ) -> bool:
        """Write a message to the files, behind all others; false: they are empty, so it may go to the producer.

        With `overflow` it is written in any case. Raises SpillFullError, SpillError.
        """
        record = _record(topic, value, key, headers, timestamp_ms)
        with self._lock:
            if not (self._always or overflow or self._store.untaken_count or self._handing or self._passed()):
                self._place = self._store.reserve()
                self._divert(False)
                return False
            sequence = self._store.append(record)
            if self._first_own is None:
                self._first_own = sequence
            self.kept_count += 1
            self._divert(True)
        self._woken.set()
        return True

    def wait(self, timeout_s: float) -> bool:
        """Wait until the files are empty; whether they are within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._store.pending_count:
            if time.monotonic() >= deadline or not self._thread.is_alive():
                return False
            self._woken.set()
            time.sleep(0.005)
        return True

    def take_back(self, deliveries: list[Delivery]) -> list[Delivery]:
        """Messages that went past the files: those that could not be sent for now go to the files, behind all others.

        Returns the others. On a thread of the producer.
        """
        told = []
        for delivery in deliveries:
            if not is_passing(delivery) or not self._take_one_back(delivery):
                told.append(delivery)
        failed = [delivery for delivery in told if delivery.error is not None]
        if failed:
            self._fail(failed)
        self._reported += sum(delivery.error is not None for delivery in deliveries)
        return told

    def _take_one_back(self, delivery: Delivery) -> bool:
        topic, value, key, _, _, headers, timestamp_ms = delivery
        with self._lock:
            if self._ended and not self.closed:
                self._left_over.append(delivery)
                return True
        try:
            self.keep(topic, value, key, headers, timestamp_ms, overflow=True)
        except KevenError as error:  # the files are full, or closed
            if self._limiter.admit("back") is not None:
                logger.error("a message that could not be sent can't go to %s either: %s", self.folder, one_line(error))
            return False
        self.kept_count -= 1  # it was counted when it was logged
        return True

    def await_reports(self, failed: int) -> None:
        """Wait a moment until take_back() was given all of so many failed messages."""
        deadline = time.monotonic() + 1
        while self._reported < failed and time.monotonic() < deadline:
            time.sleep(0.002)

    def take_failures(self) -> tuple[int, list[Delivery]]:
        """(number of records that were refused, the first of them) since the last call."""
        with self._lock:
            count, kept = self.failed_count, self.failures
            self.failed_count, self.failures = 0, []
        return count, kept

    def end(self) -> None:
        """Send nothing more. What is under way may still come back, until close()."""
        with self._lock:
            self._ended = True
        self._woken.set()

    def close(self, failed: int) -> None:
        """Settle what has come back, and leave the rest to the next process. After the producer has ended.

        `failed` is how many messages that went past the files were not delivered.
        """
        if threading.current_thread() is not self._thread:
            self._thread.join(5)
        self.await_reports(failed)
        self._settle()
        with self._lock:
            self.closed = True
        try:
            lost = self._put_away(self._left_over)
            if lost:
                self._fail(lost)
                self._tell(lost)
        finally:
            self._store.close()

    def _put_away(self, deliveries: list[Delivery]) -> list[Delivery]:
        """Write what came back at the end to its place in the files; returns what they would not take."""
        if not deliveries:
            return []
        records = [_record(topic, value, key, headers, ms) for topic, value, key, _, _, headers, ms in deliveries]
        try:
            return deliveries[self._store.insert(self._place, records) :]
        except KevenError as error:
            logger.error("%d message(s) that could not be sent are lost: %s", len(deliveries), one_line(error))
            return deliveries

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended:
            try:
                if not self._step():
                    self._woken.wait(_TICK_S if self._under_way else 1.0)
                    self._woken.clear()
            except ClosedError:
                return
            except (KevenError, OSError) as error:
                logger.error("messages in %s wait: %s", self.folder, one_line(error))
                time.sleep(_RETRY_S)

    def _step(self) -> bool:
        """Send the next batch; whether there was one."""
        self._collect()
        self._settle()
        if len(self._under_way) >= _BATCHES:
            return False
        with self._lock:
            batch = self._store.take(BATCH_RECORDS, _BATCH_BYTES)
            self._handing = bool(batch)
        if batch:
            self._hand_over(batch)
        with self._lock:
            self._handing = False
        return bool(batch)

    def _hand_over(self, batch: list[tuple[int, SpillRecord]]) -> None:
        account = self._new_account()
        sent: list[tuple[int, SpillRecord]] = []
        self._under_way.append((account, sent))
        for sequence, record in batch:
            while not self._ended:
                try:
                    self._send(record, account)
                    sent.append((sequence, record))
                    break
                except QueueFullError:
                    self._collect()
                except ClosedError:
                    raise
                except KevenError as error:
                    self._refused(sequence, record, error)
                    break

    def _refused(self, sequence: int, record: SpillRecord, error: KevenError) -> None:
        """A record that can't even be handed over, too large for example: it is handed back."""
        cause = error if isinstance(error, KafkaError) else KafkaError(str(error), name=type(error).__name__)
        story = Delivery(
            record.topic, record.value, record.key, cause, "not delivered", record.headers or [], record.timestamp_ms
        )
        self._fail([story])
        self._tell([story])
        self._store.settle(sequence)

    def _fail(self, stories: list[Delivery]) -> None:
        """Count what was handed back, for take_failures(), and log it."""
        first = stories[0]
        if self._limiter.admit(f"failed {first.topic}") is not None:
            logger.error(
                "%d message(s) for %s, whose logger has its files in %s, were %s: %s",
                len(stories),
                one_line(first.topic),
                one_line(self.folder),
                first.outcome,
                one_line(first.error),
            )
        with self._lock:
            self.failed_count += len(stories)
            self.failures += stories[: max(0, 10 - len(self.failures))]

    def _settle(self) -> None:
        """Let go of what has come back, oldest batch first; what could not be sent for now is sent again."""
        while self._under_way and self._under_way[0][0].pending == 0:
            account, sent = self._under_way.popleft()
            _, stories = account.take_failures()
            again: list[tuple[int, SpillRecord]] = []
            # By content: of records that are alike in everything it does not matter which one failed.
            failed: dict[Any, list[Delivery]] = {}
            for delivery in stories:
                failed.setdefault(_content(delivery), []).append(delivery)
            for sequence, record in sent:
                alike = failed.get(_content(record)) if failed else None
                story = alike.pop() if alike else None
                if story is not None and is_passing(story):
                    again.append((sequence, record))
                    continue
                if story is not None:
                    self._fail([story])
                elif self._first_own is not None and sequence >= self._first_own:
                    self.delivered_count += 1
                self._store.settle(sequence)
            if again and not self._ended:
                self._hand_over(again)


def is_passing(delivery: Delivery) -> bool:
    """Whether a message could only not be sent for now."""
    return delivery.error is not None and delivery.error.name in _PASSING


def _record(topic: str, value: Any, key: Any, headers: Any, timestamp_ms: int | None) -> SpillRecord:
    """As it is written: subclasses of str and bytes, which a logger takes too, as what they are."""
    pairs = headers.items() if hasattr(headers, "items") else headers or ()
    plain = [(str(name), None if content is None else bytes(content)) for name, content in pairs] or None
    return SpillRecord(str(topic), None if value is None else bytes(value), key, plain, timestamp_ms or 0)


def _content(message: SpillRecord | Delivery) -> tuple[Any, ...]:
    return message.topic, message.value, message.key, tuple(message.headers or ()), message.timestamp_ms
