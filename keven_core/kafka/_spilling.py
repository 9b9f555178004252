"""What stands between a KafkaBatchLogger with `spill_dir` and its producer: messages that wait in files.

    "overflow"  log() -> producer, and while that is full or the files hold something: log() -> files -> producer
    "always"    log() -> files -> producer, a write-ahead log

What is in memory is of one time at most: log() goes past the files again when all that went past them before has been
answered. So what comes back unsent can be put into the files at one place, before what overflowed later.

When the producer gives up (a fatal error of librdkafka), everything goes to the files and nothing leaves them until all
that it had has come back; then this is sent again by the next producer, in order, and the rest after it.

A record leaves the files when the broker has acknowledged it, or when its failure is handed back to the application.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from keven_core.kafka.config import Settings
from keven_core.kafka.errors import ClosedError, Delivery, KafkaError, KevenError, QueueFullError
from keven_core.kafka.logs import RateLimiter, one_line
from keven_core.kafka.spill import Place, SpillRecord, SpillStore

if TYPE_CHECKING:
    from keven_core._native.producer import DeliveryAccount, Producer

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
    {"_PURGE_QUEUE", "_PURGE_INFLIGHT", "_MSG_TIMED_OUT", "_TIMED_OUT", "_TRANSPORT", "_ALL_BROKERS_DOWN"}
    # Of a producer that gave up; but for refused idempotence, which the next one would be refused too.
    | {"_FATAL", "_INCONSISTENT", "INVALID_PRODUCER_EPOCH", "OUT_OF_ORDER_SEQUENCE_NUMBER", "UNKNOWN_PRODUCER_ID"}
)

# A record in the files, with its sequence number.
_Stored = tuple[int, SpillRecord]


class Spilling:
    """The files of one logger, and the thread that sends what is in them.

    Arguments:
        folder: see SpillStore.
        always: whether every message goes through the files.
        send: hands a record to the producer, counted in an account; may wait for room, raises KevenError: ClosedError
            when the producer of the account is not there any more.
        producer: the one that there is now. hold() is called before it is replaced.
        new_account: makes an account, numbered and of that producer alone.
        collect: brings the counts of accounts up to date, and has a producer that gave up replaced; raises ClosedError
            when it is gone for good.
        passed: the account of messages that went past the files.
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
        producer: Callable[[], Producer],
        new_account: Callable[[Producer], DeliveryAccount],
        collect: Callable[[], None],
        passed: Callable[[], DeliveryAccount],
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
        self._producer = producer
        self._new_account = new_account
        self._collect = collect
        self._account = passed
        self._divert = divert
        self._tell = tell
        self._limiter = RateLimiter(3, 10.0)
        self._store = SpillStore(folder, max_bytes=settings.spill_bytes, fsync=settings.spill_fsync)
        self._under_way: deque[tuple[DeliveryAccount, list[_Stored]]] = deque()
        # Order: between an append and what log() does next. Re-entrant: what the store warns of may be logged to it.
        self._lock = threading.RLock()
        self._woken = threading.Event()
        self._handing = False  # a batch is between the files and the producer
        self._holds = 0  # how often a producer has given up
        self._resumed = 0  # at how many of these all that it had has come back
        self._ended = False
        self.closed = False
        self._place = self._store.reserve()  # in the files, of what goes past them
        self._reported = 0  # failed messages that take_back() was given
        self._unsent: list[tuple[int, Delivery]] = []  # of them those that are to be put there
        self._again: list[_Stored] = []  # from the files, to be sent once more
        self._divert(always or self._store.pending_count > 0)
        self._thread = threading.Thread(target=self._run, name="keven-spill", daemon=True)
        self._thread.start()

    @property
    def pending_count(self) -> int:
        """Messages in the files that are not known to be delivered, those of earlier processes included."""
        return self._store.pending_count

    @property
    def passed_count(self) -> int:
        """Messages that went past the files and whose fate is not known."""
        with self._lock:
            return self._passed() + len(self._unsent)

    def _passed(self) -> int:
        """How many messages that went past the files are under way, or on their way back."""
        account = self._account()
        return account.pending + account.failed - self._reported

    def _holding(self) -> bool:
        """Whether a producer has given up, and not all that it had has come back."""
        return self._holds > self._resumed

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
            waiting = self._holding() or self._unsent or self._again or self._handing or self._store.untaken_count
            if not (self._always or overflow or waiting or self._passed()):
                self._place = self._store.reserve()
                self._divert(False)
                return False
            self._store.append(record)
            self.kept_count += 1
            self._divert(True)
        self._woken.set()
        return True

    def wait(self, timeout_s: float) -> bool:
        """Wait until the files are empty and nothing is on its way there; whether that is so within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._holding() or self.passed_count or self._store.pending_count:
            if time.monotonic() >= deadline or not self._thread.is_alive():
                return False
            self._woken.set()
            time.sleep(0.005)
        return True

    def hold(self) -> None:
        """The producer has given up. Called before the next one is there; from any thread."""
        with self._lock:
            self._holds += 1
            self._divert(True)
        self._woken.set()

    def take_back(self, numbered: list[tuple[int, Delivery]]) -> list[Delivery]:
        """Messages that went past the files have come back: those that could not be sent for now are for the files.

        Returns the others. On a thread of the producer.
        """
        unsent: list[tuple[int, Delivery]] = []
        told: list[Delivery] = []
        with self._lock:
            for number, delivery in numbered:
                if is_passing(delivery) and not self.closed:
                    unsent.append((number, delivery))
                else:
                    told.append(delivery)
            self._unsent += unsent
            if unsent and not self._ended:
                self.hold()
            failed = [delivery for delivery in told if delivery.error is not None]
            self._reported += len(unsent) + len(failed)
        if failed:
            self._fail(failed)
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
            self._put_away(self._place)
        finally:
            self._store.close()

    def _put_away(self, place: Place) -> list[_Stored]:
        """Write what came back unsent to its place in the files; what they don't take is told of as failed."""
        with self._lock:
            unsent = [delivery for _, delivery in sorted(self._unsent, key=lambda entry: entry[0])]
        if not unsent:
            return []
        records = [_record(topic, value, key, headers, ms) for topic, value, key, _, _, headers, ms in unsent]
        sequences: list[int] = []
        try:
            sequences = self._store.insert(place, records)
        except KevenError as error:
            logger.error("%d message(s) that could not be sent are lost: %s", len(unsent), one_line(error))
        with self._lock:
            del self._unsent[: len(unsent)]
        lost = unsent[len(sequences) :]
        if lost:
            self._fail(lost)
            self._tell(lost)
        return list(zip(sequences, records, strict=False))

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ended:
            try:
                if not self._step():
                    self._woken.wait(_TICK_S if self._under_way or self._holding() else 1.0)
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
        producer = self._producer()  # before looking whether it is to be held: nothing goes to the next one unseen
        if self._again:
            self.hold()
        if self._holding():
            return self._resume(producer)
        if len(self._under_way) >= _BATCHES:
            return False
        with self._lock:
            batch = self._store.take(BATCH_RECORDS, _BATCH_BYTES)
            self._handing = bool(batch)
        self._hand_over(batch, producer)
        self._handing = False
        return bool(batch)

    def _resume(self, producer: Producer) -> bool:
        """Once all has come back from a producer that gave up, send it again; whether that is so."""
        holds = self._holds
        if self._passed() or self._under_way:
            return False
        place, self._place = self._place, self._store.reserve()
        again = sorted(self._again + self._put_away(place), key=lambda entry: entry[0])
        with self._lock:
            self._again = []
            self._handing = True
            self._resumed = holds
        self._hand_over(again, producer)
        self._handing = False
        return True

    def _hand_over(self, records: list[_Stored], producer: Producer) -> None:
        """Send records in batches; what the producer does not take because it gives up goes to the next one."""
        sent: list[_Stored] = []
        for done, (sequence, record) in enumerate(records):
            if done % BATCH_RECORDS == 0:
                account, sent = self._new_account(producer), []
                self._under_way.append((account, sent))
            while not self._ended:
                try:
                    self._send(record, account)
                    sent.append((sequence, record))
                    break
                except QueueFullError:
                    self._collect()
                except ClosedError:
                    self._again += records[done:]
                    return
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
        """Let go of what has come back, oldest batch first."""
        while self._under_way and self._under_way[0][0].pending == 0:
            account, sent = self._under_way.popleft()
            _, numbered = account.take_failures()
            failed = dict(cast(list[tuple[int, Delivery]], numbered))  # the account is a numbered one
            for number, (sequence, record) in enumerate(sent, 1):
                story = failed.get(number)
                if story is not None and is_passing(story):
                    self._again.append((sequence, record))
                    continue
                if story is not None:
                    self._fail([story])
                elif self._store.is_own(sequence):
                    self.delivered_count += 1
                self._store.settle(sequence)


def is_passing(delivery: Delivery) -> bool:
    """Whether a message could only not be sent for now."""
    return delivery.error is not None and delivery.error.name in _PASSING


def _record(topic: str, value: Any, key: Any, headers: Any, timestamp_ms: int | None) -> SpillRecord:
    """As it is written: subclasses of str and bytes, which a logger takes too, as what they are."""
    pairs = headers.items() if hasattr(headers, "items") else headers or ()
    plain = [(str(name), None if content is None else bytes(content)) for name, content in pairs] or None
    return SpillRecord(str(topic), None if value is None else bytes(value), key, plain, timestamp_ms or 0)
