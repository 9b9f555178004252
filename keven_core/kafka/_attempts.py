"""Records of the server's retry topic: held until they are due, then handled again. Owner thread only.

What waits for its time holds nothing up, whatever its place in the topic: see keven_core.kafka._shelf.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from keven_core.kafka._batches import single_call
from keven_core.kafka._calls import check_done, is_async
from keven_core.kafka._drivers import Handle
from keven_core.kafka._original_copies import original_attempt_of
from keven_core.kafka._promises import StoredOffset
from keven_core.kafka._shelf import Held, Shelf
from keven_core.kafka.deadletter import Attempt, attempt_of, due_ms_of
from keven_core.kafka.errors import UndecodableError, WorkerDiedError
from keven_core.kafka.outcomes import Outcome
from keven_core.kafka.publishing import settled

if TYPE_CHECKING:
    from keven_core._native.consumer import Consumer
    from keven_core._native.dispatch import DispatchTable
    from keven_core._native.flow import Flow
    from keven_core._native.message import Record
    from keven_core._native.suspects import Suspects

__all__ = ["Attempts"]

# What records that wait may take in memory; then no more of them are fetched.
_SHELF_BYTES = 64 << 20
# How long records that are due are handled at a time, before new ones get their turn.
_SLICE_S = 0.2
# How many may be with the workers at once: what waits for them can't be given up any more.
_MOST_SUBMITTED = 1000

Partition = tuple[str, int]


class _Work(NamedTuple):
    """What an attempt comes to: call(value), which is awaited if it is async."""

    call: Callable[[Any], Any]
    value: Any
    is_async: bool

    def checked(self) -> Any:
        """The awaitable of an async handler; else None, once check_done() has looked at the result."""
        result = self.call(self.value)
        return result if isinstance(result, Awaitable) else check_done(self.call, result)


class Attempts:
    """The records that a server tries again.

    Arguments:
        consumer, table, flow: the server's; with a flow the attempts are made by its workers.
        topic: the retry topic.
        some_handlers: what calls only these handlers of an event.
        on_failure: as Session gives it to the consumer, with the attempt.
        stopping: whether the server is to end.
        suspects: memory shared with the supervisor of this process, if it has one.
        clear_the_way: before a suspect is handled, which may end the process: steps that finish and commit the others.
    """

    def __init__(
        self,
        consumer: Consumer,
        table: DispatchTable,
        flow: Flow | None,
        topic: str,
        some_handlers: Callable[[str, tuple[str, ...]], Callable[[Any], Any] | None],
        on_failure: Callable[[Record, str, Exception, Attempt | None], Any],
        stopping: Callable[[], bool],
        suspects: Suspects | None,
        clear_the_way: Callable[[], Generator[Any, Any, None]],
    ) -> None:
        self._consumer = consumer
        self._table = table
        self._flow = flow
        self._topic = topic
        self._some_handlers = some_handlers
        self._on_failure = on_failure
        self._stopping = stopping
        self._suspects = suspects
        self._clear_the_way = clear_the_way
        self._shelf = Shelf(_SHELF_BYTES)
        self._paused = False
        self._left_paused: set[Partition] = set()
        self._submitted = 0
        self._ready: list[StoredOffset] = []
        self._first_failures: dict[Partition, int] = {}
        self.in_hand: Record | None = None
        self.used = False  # something is held, or was a moment ago

    def __len__(self) -> int:
        """How many records are held, those that workers have included."""
        return len(self._shelf) + self._submitted

    def hold(self, copy: Record, leader_epoch: int) -> None:
        """A record of the retry topic has come. Called from the hot path."""
        # What else it says is read when it is due: what is held costs the collector time. What is no copy of this
        # library is due at once.
        self.used = True
        self._shelf.put(copy, due_ms_of(copy), leader_epoch)

    def handle_due(self) -> Generator[Any, Any, int]:
        """Handle the records that are due, for a slice of time; how many were finished. See take_finished()."""
        end = time.monotonic() + _SLICE_S
        finished = self.take_answers()
        while not self._stopping() and time.monotonic() < end and self._submitted < _MOST_SUBMITTED:
            held = self._shelf.take_due(_now_ms())
            if held is None:
                break
            # What is none of the original either fails to be understood.
            attempt = attempt_of(held.record) or original_attempt_of(held.record)
            is_suspect = self._is_suspect(held.record)
            if is_suspect:
                yield from self._clear_the_way()
            if self._flow is None or is_suspect:
                finished += 1
                self._account(held, (yield from self._try_again(held, attempt)))
            elif not self._submit(self._flow, held, attempt):
                finished += 1
        self._bound_shelf()
        self.used = len(self) > 0 or self._paused
        return finished

    def take_answers(self) -> int:
        """Account for what the workers have finished; how many."""
        answers = self._flow.take_answers() if self._flow is not None else []
        for (held, attempt), error in answers:
            self._submitted -= 1
            if self._shelf.is_open(held):
                self._account(held, "done" if error is None else self._failed(held, attempt, "handle", error))
        return len(answers)

    def take_finished(self) -> tuple[list[StoredOffset], dict[Partition, int]]:
        """Offsets that may be stored since the last call, and by partition the first record that was copied again."""
        ready, self._ready = self._ready, []
        first_failures, self._first_failures = self._first_failures, {}
        return ready, first_failures

    def next_due_s(self) -> float | None:
        """In how many seconds the next record is due; None: nothing is held."""
        due_ms = self._shelf.next_due_ms
        return None if due_ms is None else max(0.0, (due_ms - _now_ms()) / 1000)

    def drop(self, partitions: Iterable[Partition] | None = None) -> None:
        """Forget what is held of partitions that are given up, or of all: it comes again, here or elsewhere."""
        gone = self._shelf.partitions() if partitions is None else list(partitions)
        if self._paused:
            self._left_paused.update(key for key in gone if key[0] == self._topic)
        for (topic, partition), count in self._shelf.drop(gone).items():
            self._consumer.settle(topic, partition, "stale", count)

    def assigned(self, partitions: Iterable[Partition]) -> None:
        """New partitions have come. librdkafka keeps one paused that was so when it went.

        No other is resumed: that would have librdkafka forget the answer on its offset that is under way.
        """
        back = self._left_paused.intersection(partitions)
        self._left_paused -= back
        if self._paused:
            self._consumer.pause(self._partitions())
        elif back:
            self._consumer.resume(list(back))

    def _account(self, held: Held, outcome: str) -> None:
        copy = held.record
        self._consumer.settle(copy.topic, copy.partition, outcome)
        if outcome in ("dead", "retried"):
            first = self._first_failures.setdefault((copy.topic, copy.partition), copy.offset)
            self._first_failures[copy.topic, copy.partition] = min(first, copy.offset)
        offset = self._shelf.done(held)
        if offset is not None:
            self._ready.append(offset)

    def _submit(self, flow: Flow, held: Held, attempt: Attempt | None) -> bool:
        """Leave an attempt to the workers; false: it is accounted already."""
        try:
            work = self._work_of(attempt)
        except Exception as error:
            self._account(held, self._failed(held, attempt, "decode", error))
            return False
        if work is None:
            self._account(held, "skipped")
            return False
        assert attempt is not None
        self._submitted += 1
        place = self._suspects.place_of(held.record.topic, held.record.partition) if self._suspects is not None else -1
        flow.submit(*work, attempt.record, (held, attempt), place, held.record.offset)
        return True

    def _try_again(self, held: Held, attempt: Attempt | None) -> Generator[Any, Any, str]:
        """Handle a record whose time has come, here; the outcome that the ledger counts."""
        stage = "decode"
        try:
            work = self._work_of(attempt)
            if work is None:
                return "skipped"
            stage = "handle"
            self.in_hand = attempt.record if attempt is not None else held.record
            result = yield from self._watched(held.record, work)
            if isinstance(result, Outcome):
                raise result
        except Exception as error:
            return self._failed(held, attempt, stage, error)
        finally:
            self.in_hand = None
        return "done"

    def _is_suspect(self, copy: Record) -> bool:
        if self._suspects is None:
            return False
        return self._suspects.find(copy.topic, copy.partition, copy.offset) is not None

    def _watched(self, copy: Record, work: _Work) -> Generator[Any, Any, Any]:
        """Handle a record as one in hand, which the supervisor knows of."""
        suspects, call = self._suspects, work.checked
        if suspects is None:
            return (yield Handle(settled(call)))
        deaths, condemned, why = suspects.find(copy.topic, copy.partition, copy.offset) or (0, False, "")
        if condemned:
            raise WorkerDiedError(deaths, why)
        cell = suspects.enter(suspects.place_of(copy.topic, copy.partition), copy.offset)
        try:
            result = yield Handle(settled(call))
        except Exception:
            suspects.leave(cell)
            raise
        suspects.leave(cell)
        return result

    def _failed(self, held: Held, attempt: Attempt | None, stage: str, error: Exception) -> str:
        record = attempt.record if attempt is not None else held.record
        outcome: str = self._on_failure(record, stage, error, attempt)
        return outcome

    def _work_of(self, attempt: Attempt | None) -> _Work | None:
        """What handles an attempt's record, with its handlers that have failed; None: nobody any more."""
        if attempt is None:
            raise UndecodableError("the record is not a copy that waits for another attempt: it lacks the headers")
        table, record = self._table, attempt.record
        if record.value is None:
            name = (record.header(table.name_field) or b"").decode("utf-8", "replace")
            route = table.bound.get(record.topic) or table.routes.get(name) or table.everything
            tombstone = route.on_tombstone if route is not None else None
            if route is None or tombstone is None:
                return None
            return _Work(tombstone, record, route.tombstone_is_async)
        route, value = table.resolve(record.value, record.topic, record.headers)
        if route is None:
            return None
        if route.with_topic:
            return _Work(functools.partial(route.call, topic=record.topic), value, route.is_async)
        some = self._some_handlers(route.name, attempt.handlers) if attempt.handlers else None
        call = some or single_call(route)
        return _Work(call, value, is_async(call))

    def _bound_shelf(self) -> None:
        """Stop fetching the retry topic while the shelf is full. Late and seldom: pausing throws prefetch away."""
        if not self._paused and self._shelf.full:
            self._consumer.pause(self._partitions())
            self._paused = True
        elif self._paused and self._shelf.has_room:
            self._consumer.resume(self._partitions())
            self._paused = False

    def _partitions(self) -> list[Partition]:
        return [key for key in self._consumer.assignment() if key[0] == self._topic]


def _now_ms() -> int:
    return int(time.time() * 1000)
