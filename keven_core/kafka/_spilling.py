"""What stands between a KafkaBatchLogger with `spill_dir` and its producer: messages that wait in files.

    "overflow"  log() -> producer, and while that is full or the files hold something: log() -> files -> producer
    "always"    log() -> files -> producer, a write-ahead log

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
from keven_core.kafka.logs import one_line
from keven_core.kafka.spill import SpillRecord, SpillStore

if TYPE_CHECKING:
    from keven_core._native.producer import DeliveryAccount

__all__ = ["BATCH_RECORDS", "Spilling"]

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
        divert: told whether log() has to come here with every message.
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
        divert: Callable[[bool], None],
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
        self._divert = divert
        self._store = SpillStore(folder, max_bytes=settings.spill_bytes, fsync=settings.spill_fsync)
        self._first_own: int | None = None
        self._under_way: deque[tuple[DeliveryAccount, list[tuple[int, SpillRecord]]]] = deque()
        self._lock = threading.Lock()  # order: between an append and what log() does next
        self._woken = threading.Event()
        self._handing = False  # a batch is between the files and the producer
        self._ended = False
        self.closed = False
        self._reported = 0  # failed messages that take_back() was given
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
        pairs = list(headers.items() if hasattr(headers, "items") else headers or ()) or None
        record = SpillRecord(topic, value, key, pairs, timestamp_ms or 0)
        with self._lock:
            if not (self._always or overflow or self._store.untaken_count or self._handing):
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
            topic, value, key, error, _, headers, timestamp_ms = delivery
            if error is not None and error.name in _PASSING and not self.closed:
                self.keep(topic, value, key, headers, timestamp_ms, overflow=True)
                self.kept_count -= 1  # it was counted when it was logged
            else:
                told.append(delivery)
                if error is not None:
                    self._fail([delivery])
            self._reported += error is not None
        return told

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
        """End the thread; what is under way may still come back."""
        self._ended = True
        self._woken.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(5)

    def close(self) -> None:
        """Settle what has come back, and leave the rest to the next process."""
        self.end()
        self._settle()
        self.closed = True
        self._store.close()

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
        logger.error("a message for %s in %s can't be sent: %s", record.topic, self.folder, one_line(error))
        self._fail([story])
        self._store.settle(sequence)

    def _fail(self, stories: list[Delivery]) -> None:
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
                if story is not None and story.error is not None and story.error.name in _PASSING:
                    again.append((sequence, record))
                    continue
                if story is not None:
                    self._fail([story])
                elif self._first_own is not None and sequence >= self._first_own:
                    self.delivered_count += 1
                self._store.settle(sequence)
            if again and not self._ended:
                self._hand_over(again)


def _content(message: SpillRecord | Delivery) -> tuple[Any, ...]:
    return message.topic, message.value, message.key, tuple(message.headers or ()), message.timestamp_ms
