"""One run of a consumer server, from connect to close, written once for sync and async servers.

`Session.steps()` is a generator that decides; it yields operations and is told their results. The drivers of
keven_core.kafka._drivers carry them out, so rebalance, settlement and shutdown exist once for both.

Order at the end: finish what was started, store, commit with a deadline, leave the group, free.
"""

from __future__ import annotations

import contextvars
import logging
import os
import threading
import time
from asyncio import CancelledError
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from keven_core.kafka import _supervised
from keven_core.kafka import record as record_module
from keven_core.kafka._attempts import Attempts
from keven_core.kafka._client_events import ClientEvents
from keven_core.kafka._copies import CopyPublisher, copy_options
from keven_core.kafka._drivers import DISMISS, FETCH, WORK, Call, Hook, Rest, Steps, Stopped, fulfil
from keven_core.kafka._failures import Failures, FloodBreaker, log_failure
from keven_core.kafka._ledger import discrepancies
from keven_core.kafka._plan import Plan, TopicPartition
from keven_core.kafka._promises import Promises, StoredOffset
from keven_core.kafka._topic_setup import prepare_topics
from keven_core.kafka._watchdog import Watchdog
from keven_core.kafka.deadletter import Attempt
from keven_core.kafka.errors import (
    ClosedError,
    CommitError,
    DeliveryError,
    DrainError,
    ForkedProcessError,
    KafkaError,
    LedgerError,
)
from keven_core.kafka.logs import RateLimiter, one_line
from keven_core.kafka.outcomes import Outcome
from keven_core.kafka.publishers import write_to
from keven_core.kafka.publishing import HandlerOutbox

if TYPE_CHECKING:
    from keven_core._native.consumer import Consumer
    from keven_core._native.flow import Flow
    from keven_core._native.logger import HandlerScope
    from keven_core._native.message import Record

__all__ = ["Session"]

logger = logging.getLogger("keven_core.kafka")

# How often events of the main queue (errors, logs, tokens) are looked at while messages keep coming.
_ATTEND_S = 0.1
# How often brokers are made known again while a member of a group has no partitions.
_MEETING_S = 3.0
_OFFSET_QUERY_MS = 10_000
_COPY_WAIT_S = 60.0
# How long the others are waited for before a record of the retry topic is handled that a worker has died with.
_SUSPECT_WAIT_S = 30.0
# What a broker answers to a commit while it waits for members to take note of a new generation of the group.
_REARRANGING = ("ILLEGAL_GENERATION", "REBALANCE_IN_PROGRESS", "STALE_MEMBER_EPOCH")
_RECOMMIT_S = 0.05
_LOGICAL_OFFSETS = {"stored": -1001, "earliest": -2, "latest": -1}


class Session:
    """A run of a server. Made and run by its owner thread; stop(), post() and the readers are for any thread."""

    def __init__(self, plan: Plan, owner: Any) -> None:
        self.plan = plan
        self.owner = owner
        self.consumer: Consumer | None = None
        self.stopping = False
        self._hurried = False
        self.cut: DrainError | None = None  # set when what runs is not waited for any longer
        self.heed_stop: Callable[[], object] | None = None  # called by stop() and cut_off(), in any thread
        self._stopped_at = 0.0
        self._drain_s = plan.settings.drain_timeout_ms / 1000
        self._events = ClientEvents(plan)
        self._next_meeting = 0.0
        self.batch_timeout_ms = plan.settings.batch_timeout_ms
        self._close_timeout_s = plan.settings.close_timeout_ms / 1000
        self._owner_thread: int | None = None
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._limiter = RateLimiter(5, 10.0)
        self._copies: CopyPublisher | None = None
        self._failures: Failures | None = None
        self._attempts: Attempts | None = None
        self.flow: Flow | None = None
        self._supervised = _supervised.claim()
        self.next_due_s: float | None = None
        self._paused_by_service: set[tuple[str, int]] = set()
        self._scope: HandlerScope | None = None
        self._promises: Promises | None = None
        self._raise_after_batch: BaseException | None = None
        self._unstarted: set[tuple[str, int]] = set()
        self._starting: set[tuple[str, int]] = set()
        self._last_message = time.monotonic()
        self._last_attended = 0.0
        self.base_context = contextvars.copy_context()
        self._ended = False
        self._pid = os.getpid()

    # --- any thread --------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask the run to end after the batch in hand. Returns at once; also from a signal handler."""
        if not self.stopping:
            self._stopped_at = time.monotonic()
            self.stopping = True
            if self.heed_stop is not None:
                self.heed_stop()
        consumer = self.consumer
        if consumer is not None:
            consumer.look_at_clock()
            consumer.wake()

    @property
    def drain_left_s(self) -> float:
        """How long, after stop(), what is in hand may still be gone on with."""
        return self._stopped_at + self._drain_s - time.monotonic()

    def records_in_hand(self) -> list[tuple[str, int, int]]:
        """(topic, partition, offset) of what is being handled. From any thread."""
        again, consumer = self._attempts.in_hand if self._attempts is not None else None, self.consumer
        if again is not None:
            return [(again.topic, again.partition, again.offset)]
        if self.flow is not None:
            return self.flow.unfinished()
        found = consumer.position_in_hand() if consumer is not None else None
        return [] if found is None else [found]

    def cut_off(self, why: str, exit_code: int) -> None:
        """Begin nothing more, and don't wait for what runs: an async handler is cancelled, a sync one only named.

        Owner thread, also in a signal handler there.
        """
        self._hurried = True
        records = self.records_in_hand()
        if not records or self.consumer is None:
            return
        names = ", ".join(f"{topic} [{partition}] @ {offset}" for topic, partition, offset in records)
        self.cut = DrainError(
            f"{why}: unfinished: {names}; what was not finished is neither done nor failed and will be handled again",
            records,
            exit_code=exit_code,
        )
        logger.warning("%s", one_line(self.cut, 1000))
        self.consumer.end_batch()
        if self.heed_stop is not None:
            self.heed_stop()

    def drain_is_over(self) -> None:
        """Cut off what still runs after KEVEN_DRAIN_TIMEOUT_MS. Owner thread."""
        if self.cut is None:
            self.cut_off(f"KEVEN_DRAIN_TIMEOUT_MS={self.plan.settings.drain_timeout_ms} has passed", 3)

    def refuse_in_child(self) -> None:
        """Raise ForkedProcessError in a forked child: its threads did not come along, so nobody would answer."""
        if os.getpid() != self._pid:
            raise ForkedProcessError(
                "this server was started before os.fork() and can't be used in the child: start one there, or start "
                "workers with start_events_receiver_process()"
            )

    def post(self, func: Callable[[], Any]) -> Any:
        """Run `func` on the owner thread between two batches and return its result; at once when called there."""
        self.refuse_in_child()
        if threading.get_ident() == self._owner_thread:
            return func()
        future: Future[Any] = Future()
        self._commands.append((func, future))
        if self._ended:
            self._refuse_commands()
        elif self.consumer is not None:
            self.consumer.wake()
        return future.result()

    def _refuse_commands(self) -> None:
        while self._commands:
            self._commands.popleft()[1].set_exception(ClosedError("the server is not running"))

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """Go on at another offset. Owner thread only."""
        if self.consumer is None:
            raise ClosedError("the server is not running")
        self.consumer.seek([(topic, partition, offset)])
        if self._promises is not None:
            # What was handled before the seek must not be stored after it.
            self._promises.drop([(topic, partition)])
        if self._attempts is not None:
            self._attempts.drop([(topic, partition)])

    def pause(self, partitions: list[tuple[str, int]]) -> None:
        """Stop fetching partitions because the service says so. Owner thread only."""
        if self.consumer is None:
            raise ClosedError("the server is not running")
        self.consumer.pause(partitions)
        self._paused_by_service.update(partitions)

    def resume(self, partitions: list[tuple[str, int]]) -> None:
        """Fetch them again. Owner thread only."""
        if self.consumer is None:
            raise ClosedError("the server is not running")
        self._paused_by_service.difference_update(partitions)
        # Those that are held for what is in flight of them are resumed when that is less.
        self.consumer.resume([key for key in partitions if self.flow is None or not self.flow.holds(*key)])

    def record_in_hand(self) -> Record:
        """The record that is being handled; for current_record()."""
        if self._attempts is not None and self._attempts.in_hand is not None:
            return self._attempts.in_hand
        if self.consumer is None:
            raise LookupError("no record is being handled")
        return self.consumer.record_in_hand()

    @property
    def handling(self) -> bool:
        """Whether a handler runs; for the outbox of what it publishes."""
        if self._attempts is not None and self._attempts.in_hand is not None:
            return True
        return self.consumer is not None and self.consumer.in_handler

    # --- steps -------------------------------------------------------------------------------------------------------

    def steps(self) -> Steps:
        """The run itself: yields operations, see the module docstring."""
        self._owner_thread = threading.get_ident()
        failure: BaseException | None = None
        started: list[Callable[[], Any]] = []
        under_way: Future[Any] | None = None
        try:
            for hook in self.plan.on_start:
                yield Hook(hook)
            started = self.plan.on_stop
            consumer = self._connect()
            yield from prepare_topics(self.plan, consumer, self._events, self._beat)
            yield from self._take_position()
            watchdog = Watchdog(self, self.plan.max_poll_interval_s)
            watchdog.start()
            try:
                yield from self._consume()
            finally:
                watchdog.close()
        except Stopped as stopped:
            under_way = stopped.call
        except CancelledError as error:
            failure = self.cut or error
        except BaseException as error:
            failure = error
        try:
            if under_way is None:
                yield from self._shut_down(failure)
            else:
                self._free_after(under_way)
        except BaseException as error:
            # What ended the run is more telling than what closing it met.
            if failure is None:
                failure = error
            else:
                logger.error("while shutting down: %s", one_line(error, 1000))
        for hook in started:
            try:
                yield Hook(hook)
            except BaseException as error:
                failure = failure or error
        self._ended = True
        if self._scope is not None:
            self._scope.leave()
        self._refuse_commands()
        if failure is not None:
            raise failure

    def _connect(self) -> Consumer:
        from keven_core._native.consumer import Consumer
        from keven_core._native.logger import HandlerScope

        plan = self.plan
        commit = plan.use_group and not plan.no_commit
        options = plan.settings.consumer_options(
            plan.address,
            plan.client_id,
            plan.group_id,
            max_poll_interval_s=plan.max_poll_interval_s,
            session_timeout_s=plan.session_timeout_s,
            heartbeat_interval_s=plan.heartbeat_interval_s,
            commit=commit,
            partition_eof=plan.until_end,
        )
        if self._supervised is not None and plan.use_group:
            options = self._supervised.consumer_options(options)
        # What on_start has set is seen by every handler; what a handler sets, by none but itself.
        self.base_context = contextvars.copy_context()
        self.base_context.run(record_module._source.set, self)
        outbox = HandlerOutbox(self)
        self.base_context.run(write_to, self.plan.settings, self.plan.address)
        self.base_context.run(outbox.enter)
        self._scope = HandlerScope()
        self.base_context.run(self._scope.enter)
        producer_options = copy_options(plan.settings, plan.address, plan.client_id, timeout_s=_COPY_WAIT_S / 2)
        self._copies = CopyPublisher(producer_options, self._events.on_event)
        self._promises = Promises(self._scope, self._copies)
        self._failures = Failures(
            self._copies,
            plan.policies,
            FloodBreaker(plan.settings.dead_letters_in_a_row, plan.settings.dead_letters_percent),
            group_id=plan.group_id,
            dead_letter_topic=plan.dead_letter_topic,
            retry_topic=plan.retry_topic,
            dialect=plan.settings.dead_letter_dialect,
            fatal=plan.settings.listed("fatal_exceptions"),
            retryable=plan.settings.listed("retryable_exceptions"),
        )
        suspects = self._supervised.suspects if self._supervised is not None else None
        self.consumer = Consumer(
            options,
            plan.table,
            self._on_failure,
            batch_size=plan.settings.batch_size,
            store_offsets=commit,
            context=self.base_context,
            parks=[plan.retry_topic] if plan.policies.any_by_topic else [],
            on_parked=lambda copy, leader_epoch: attempts.hold(copy, leader_epoch),
            suspects=suspects,
            outbox=outbox,
        )
        if plan.flow is not None:
            from keven_core._native.flow import Flow

            self.flow = Flow(self.consumer, plan.flow.order, window=plan.flow.window)
        self._attempts = attempts = Attempts(
            self.consumer,
            plan.table,
            self.flow,
            plan.retry_topic,
            plan.some_handlers,
            self._on_failure,
            lambda: self.stopping,
            suspects,
            self._clear_the_way,
        )
        self._events.consumer, self._events.copies = self.consumer, self._copies
        self._events.serve()
        if self.stopping:
            raise Stopped
        return self.consumer

    def _take_position(self) -> Steps:
        plan = self.plan
        consumer = self.consumer
        assert consumer is not None
        if plan.use_group:
            consumer.subscribe(plan.topics)
            return
        import re

        found = yield Call(lambda: consumer.metadata(10_000), patient=True)
        partitions = [
            (topic, partition, -1001)
            for topic, count in found.items()
            if any(topic == name or (name.startswith("^") and re.match(name, topic)) for name in plan.topics)
            for partition in range(max(count, 0))
        ]
        yield from self._assign(partitions, manual=True)

    def _consume(self) -> Steps:
        plan = self.plan
        consumer = self.consumer
        assert consumer is not None
        attempts = self._attempts
        assert attempts is not None
        self._last_message = time.monotonic()
        if self._supervised is not None:
            self._supervised.consuming()
        while not self.stopping or self._may_finish():
            count = consumer.in_hand if self.stopping else (yield FETCH)
            if count or self.flow is not None:
                yield WORK
                yield from self._settle_or_raise()
                if consumer.suspect_ahead:
                    yield from self._commit_before_suspect()
                    consumer.admit_suspect()
            now = time.monotonic()
            if count:
                self._last_message = now
            if consumer.noted:
                yield from self._heed_notes()
            if attempts.used:
                yield from self._try_again(attempts)
            self.next_due_s = self._next_due_s(attempts)
            if plan.until_end and self._nothing_left(attempts):
                return
            if not count or now - self._last_attended > _ATTEND_S:
                self._last_attended = now
                self._attend()
                self._hold_back()
                self._keep_promises()
                if self._unstarted:
                    yield from self._start_again()
                if plan.timeout_s is not None and now - self._last_message > plan.timeout_s:
                    logger.info("no message for %s s: the server ends", plan.timeout_s)
                    return

    def _may_finish(self) -> bool:
        """Whether, after stop(), the batch in hand is gone on with: the last record has half of the time for itself."""
        assert self.consumer is not None
        if self.flow is not None:
            return False
        return self.consumer.in_hand > 0 and self.drain_left_s > self._drain_s / 2 and not self._hurried

    def _nothing_left(self, attempts: Attempts) -> bool:
        assert self.consumer is not None
        return not attempts and (self.flow is None or self.flow.idle) and self.consumer.ended_partitions()

    def _next_due_s(self, attempts: Attempts) -> float | None:
        """How long the driver may wait for messages, because something else is due then."""
        due = [attempts.next_due_s() if attempts.used else None, self.flow.tend() if self.flow is not None else None]
        return min((entry for entry in due if entry is not None), default=None)

    def _settle_or_raise(self) -> Steps:
        if self.flow is not None:
            self.flow.settle()
        failure = yield from self._settle(_COPY_WAIT_S)
        if failure is not None:
            raise failure
        self._raise_what_ends_it()

    def _settle(self, timeout_s: float) -> Generator[Any, Any, KafkaError | None]:
        """Store the offsets of what was handled, or leave them with the promises; returns why that did not do.

        Neither what handlers have written nor copies of failed records are waited for, unless too many batches wait.
        """
        consumer, promises = self.consumer, self._promises
        assert consumer is not None
        assert promises is not None
        if self.flow is None and not promises.made:
            consumer.finish_batch()
            return None
        # Workers may go on meanwhile. What they had written for these offsets was written before this, so that the
        # promises know of it after this.
        first_failures = consumer.first_failures()
        offsets = consumer.finish_batch_unstored()
        return (yield from self._promise(offsets, first_failures, timeout_s))

    def _promise(
        self, offsets: list[StoredOffset], first_failures: Mapping[tuple[str, int], int], timeout_s: float
    ) -> Generator[Any, Any, KafkaError | None]:
        """Store offsets, at once or when what was written for them is acknowledged; returns why that did not do."""
        consumer, promises = self.consumer, self._promises
        assert consumer is not None
        assert promises is not None
        if not promises.made:
            consumer.store(offsets)
            return None
        if offsets or first_failures or self.flow is None or not promises.waits:
            promises.add(offsets, first_failures)
        if promises.too_many:
            return (yield from self._await_promises(timeout_s, all_of_them=False))
        self._keep_promises()
        return None

    def _try_again(self, attempts: Attempts) -> Steps:
        """Handle the records of the retry topic that are due."""
        if (yield from attempts.handle_due()):
            self._last_message = time.monotonic()
            failure = yield from self._promise(*attempts.take_finished(), _COPY_WAIT_S)
            if failure is not None:
                raise failure
            self._raise_what_ends_it()

    def _raise_what_ends_it(self) -> None:
        failure, self._raise_after_batch = self._raise_after_batch, None
        if failure is not None:
            raise failure

    def _hold_back(self) -> None:
        """Pause partitions that would hold up the others; resume them. Late and seldom: it throws prefetch away."""
        if self.flow is None:
            return
        assert self.consumer is not None
        pause, resume = self.flow.hold_back()
        if pause:
            logger.info("paused, for what was fetched of them is enough for now: %s", _names(pause))
            self.consumer.pause(pause)
        resume = [partition for partition in resume if partition not in self._paused_by_service]
        if resume:
            self.consumer.resume(resume)

    def _keep_promises(self) -> None:
        """Store the offsets of batches whose handlers' messages have been acknowledged. Raises DeliveryError."""
        assert self.consumer is not None
        if self._promises is not None and self._promises.made:
            self.consumer.store(self._promises.due())

    def _await_promises(self, timeout_s: float, *, all_of_them: bool) -> Generator[Any, Any, KafkaError | None]:
        """Wait until the oldest batch, or all, can be stored, and store them; returns why that is not so."""
        promises = self._promises
        assert promises is not None
        deadline = time.monotonic() + timeout_s
        if all_of_them and promises.made:
            promises.add([], {})  # what was written since the last batch
        try:
            self._keep_promises()
            while promises.too_many or (all_of_them and promises.unkept()):
                now = time.monotonic()
                if self.stopping:
                    deadline = min(deadline, now + self._close_timeout_s)
                if now >= deadline:
                    if self.consumer is not None:
                        self.consumer.store(promises.give_up())
                    return promises.unkept()
                self._beat()
                yield Call(lambda: promises.wait(0.1))
                self._keep_promises()
        except DeliveryError as error:
            return error
        return None

    # --- under a supervisor ------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        if self._supervised is not None:
            self._supervised.suspects.beat()

    def _commit_before_suspect(self) -> Steps:
        """Commit what is done, since the next record may end this process: then it alone is handled again."""
        consumer = self.consumer
        assert consumer is not None
        failure = yield from self._await_promises(_COPY_WAIT_S, all_of_them=True)
        if failure is not None:
            raise failure
        try:
            yield Call(lambda: consumer.commit(self.plan.settings.close_timeout_ms))
        except CommitError as error:
            self._events.warn("commit", "before a record that a worker has died with: %s", error)

    def _clear_the_way(self) -> Steps:
        """Before a suspect among the records that are tried again: let all others end, and commit them."""
        flow, attempts = self.flow, self._attempts
        assert attempts is not None
        deadline = time.monotonic() + _SUSPECT_WAIT_S
        while flow is not None and not flow.idle and not self.stopping and time.monotonic() < deadline:
            flow.tend()
            yield WORK
            yield from self._settle_or_raise()
            attempts.take_answers()
            self._beat()
            yield Rest(0.05)
        failure = yield from self._promise(*attempts.take_finished(), _COPY_WAIT_S)
        if failure is not None:
            raise failure
        yield from self._commit_before_suspect()

    # --- rebalance ---------------------------------------------------------------------------------------------------

    def _heed_notes(self) -> Steps:
        """Act on what the callbacks noted. The batch in hand is finished and stored by now."""
        consumer = self.consumer
        assert consumer is not None
        for kind, partitions, detail in consumer.take_notes():
            if kind == "assign":
                logger.info("assigned: %s", _names(partitions))
                yield from self._assign(partitions)
            elif kind == "revoke":
                logger.info("%s: %s", "lost" if detail else "revoked", _names(partitions))
                gone = [entry[:2] for entry in partitions]
                if not detail:
                    yield from self._finish_running(time.monotonic() + self._close_timeout_s / 2, gone)
                    late = yield from self._await_promises(self._close_timeout_s, all_of_them=True)
                    if late is not None:
                        logger.warning("at revocation: %s", one_line(late, 1000))
                    try:
                        yield Call(lambda: consumer.commit(self.plan.settings.close_timeout_ms))
                    except CommitError as error:
                        logger.warning("at revocation: %s", one_line(error, 1000))
                yield from self._give_up(partitions, lost=bool(detail))
            elif detail is not None:
                self._events.warn("commit", "background commit failed, it will be repeated: %s", detail)

    def _give_up(self, partitions: list[tuple[str, int, int]], *, lost: bool) -> Steps:
        """Unassign partitions of which everything was done that could be. The hook is told before."""
        consumer = self.consumer
        assert consumer is not None
        gone = [entry[:2] for entry in partitions]
        if self._promises is not None:
            self._promises.drop(gone)
        if self._attempts is not None:
            self._attempts.drop(gone)
        try:
            yield from self._tell_of_loss(gone, lost=lost)
        finally:
            try:
                consumer.unassign(partitions)
            except KafkaError as error:
                if not lost:
                    raise
                logger.info("giving up lost partitions: %s", error)

    def _tell_of_loss(self, partitions: Iterable[tuple[str, int]], *, lost: bool) -> Steps:
        """Call on_revoke, or on_lost, for those of the partitions that on_assign was called for."""
        hook = self.plan.on_lost if lost else self.plan.on_revoke
        assert self.consumer is not None
        known = self.consumer.offsets()
        told = [
            TopicPartition(*key, known[key][0] if known[key][0] >= 0 else _LOGICAL_OFFSETS["stored"])
            for key in partitions
            if key in known
        ]
        if hook is not None and told:
            yield Hook(partial(hook, self.owner, told))

    def _assign(self, partitions: list[tuple[str, int, int]], *, manual: bool = False) -> Steps:
        plan = self.plan
        consumer = self.consumer
        assert consumer is not None
        # A start position holds for the first time that this run gets a partition; then the committed offset counts.
        fresh = [entry for entry in partitions if entry[:2] not in self._starting]
        waiting = [entry for entry in partitions if entry[0] == plan.retry_topic]
        starts = yield from self._start_offsets([entry for entry in fresh if entry not in waiting])
        starts.update((yield from self._start_of_waiting(waiting)))
        self._starting.update(entry[:2] for entry in partitions)
        placed = [
            TopicPartition(topic, partition, starts.get((topic, partition), offset))
            for topic, partition, offset in partitions
        ]
        if plan.on_assign_topics is not None:
            plan.on_assign_topics(self.owner, placed)
        if plan.until_end:
            for topic, partition, _ in fresh:
                _, high = yield Call(partial(consumer.watermarks, topic, partition, _OFFSET_QUERY_MS))
                consumer.set_end(topic, partition, high)
        consumer.assign([(entry.topic, entry.partition, entry.offset) for entry in placed], manual=manual)
        if self._attempts is not None:
            self._attempts.assigned([entry[:2] for entry in partitions])
        if plan.on_assign is not None and placed:
            yield Hook(partial(plan.on_assign, self.owner, placed))

    def _finish_running(self, deadline: float, partitions: list[tuple[str, int]] | None = None) -> Steps:
        """Let the workers finish what they have of these partitions, or of all; give up what they have not begun."""
        flow = self.flow
        if flow is None:
            return
        assert self._attempts is not None
        gone = None if partitions is None else set(partitions)
        flow.drop_tail(gone)
        while True:
            self._beat()
            yield WORK
            yield from self._settle_or_raise()
            if self._attempts.used:
                yield from self._try_again(self._attempts)
            left = deadline - time.monotonic()
            if left <= 0 or self.cut is not None or not flow.busy(gone):
                break
            yield Rest(min(0.1, left))
        if self.cut is None:
            yield from self._settle_or_raise()  # what has landed meanwhile

    def _start_again(self) -> Steps:
        """Assign partitions anew whose committed offset could not be had, so that librdkafka asks for it again."""
        consumer = self.consumer
        assert consumer is not None
        positions = {key: entry[0] for key, entry in consumer.offsets().items()}
        again = [(topic, partition, -1001) for topic, partition in self._unstarted if (topic, partition) in positions]
        self._unstarted.clear()
        if not again:
            return
        try:
            yield Call(lambda: consumer.commit(self.plan.settings.close_timeout_ms))
        except CommitError as error:
            self._events.warn("commit", "before partitions are assigned anew: %s", error)
        if consumer.rebalance_protocol() == "COOPERATIVE":
            consumer.unassign(again)
            consumer.assign(again)
        else:
            # An eager assignment is only ever replaced as a whole; the others go on where they are.
            waiting = {entry[:2] for entry in again}
            rest = [(*key, offset if offset >= 0 else -1001) for key, offset in positions.items() if key not in waiting]
            consumer.assign(again + rest)

    def _start_offsets(self, partitions: list[tuple[str, int, int]]) -> Generator[Any, Any, dict[tuple[str, int], int]]:
        start = self.plan.start
        consumer = self.consumer
        assert consumer is not None
        if not partitions or start == "stored":
            # Without a group nothing is committed, so "stored" means what a new group would get.
            if not self.plan.use_group:
                reset = self.plan.settings.auto_offset_reset
                return {
                    entry[:2]: _LOGICAL_OFFSETS["latest" if reset == "latest" else "earliest"] for entry in partitions
                }
            return {}
        if isinstance(start, str):
            return {entry[:2]: _LOGICAL_OFFSETS[start] for entry in partitions}
        if isinstance(start, datetime):
            stamp = int(start.timestamp() * 1000)
            asked = [(topic, partition, stamp) for topic, partition, _ in partitions]
            found = yield Call(lambda: consumer.offsets_for_times(asked, _OFFSET_QUERY_MS))
            return {entry[:2]: entry[2] for entry in found}
        return {entry[:2]: start[entry[:2]] for entry in partitions if entry[:2] in start}

    def _start_of_waiting(
        self, partitions: list[tuple[str, int, int]]
    ) -> Generator[Any, Any, dict[tuple[str, int], int]]:
        """Where the retry topic is read from: whatever `start` says, nothing that waits there is passed over."""
        consumer = self.consumer
        assert consumer is not None
        # With "earliest" librdkafka starts there by itself where nothing is committed.
        if not partitions or self.plan.settings.auto_offset_reset == "earliest":
            return {}
        keys = [entry[:2] for entry in partitions]
        found = yield Call(lambda: consumer.committed(keys, _OFFSET_QUERY_MS))
        return {entry[:2]: _LOGICAL_OFFSETS["earliest"] for entry in found if entry[2] < 0}

    # --- attention ---------------------------------------------------------------------------------------------------

    def _attend(self) -> None:
        """Commands from other threads, errors, logs, tokens."""
        while self._commands:
            func, future = self._commands.popleft()
            fulfil(future, func)
        self._events.serve()
        consumer = self.consumer
        assert consumer is not None
        self._meet_brokers(consumer)
        for topic, partition, error in consumer.take_errors():
            said = self._events.on_partition_error(topic, error)
            if said and topic is not None and "fetch committed offset" in str(error):
                # librdkafka does not ask again (rdkafka_assignment.c): it would stay assigned and never start.
                self._unstarted.add((topic, partition))

    def _meet_brokers(self, consumer: Consumer) -> None:
        """Without partitions for a while: perhaps the client knows no brokers any more, and has to be told of them.

        A broker that comes back may name none in its first answer; librdkafka then forgets all of them, for ever
        (librdkafka#5301).
        """
        now = time.monotonic()
        if now < self._next_meeting:
            return
        self._next_meeting = now + _MEETING_S
        if self._events.connected and self.plan.use_group and not consumer.assignment():
            consumer.add_brokers(self.plan.address)

    def _on_failure(self, record: Record, stage: str, error: Exception, attempt: Attempt | None = None) -> Any:
        """A record has failed: submit its copy, say so; what became of it.

        Called from the hot path, on the owner thread; with `attempt` for a record of the retry topic. For one that is
        to be tried again in its place: in how many seconds, when it failed first, and what is to handle it then.
        """
        if self.cut is not None:
            raise self.cut from error  # of being cut off
        consumer, failures = self.consumer, self._failures
        assert consumer is not None
        assert failures is not None
        name = self._name_of(record)
        in_a_row = consumer.failures_in_a_row if attempt is None else 1
        verdict = failures.decide(
            record, error, name=name, attempt=attempt, in_a_row=in_a_row, finished=consumer.finished
        )
        if self.plan.log_exceptions:
            quiet = self._limiter.admit(f"{verdict.outcome} {stage}")
            if quiet is not None:
                kind = self.plan.table.name_field.removesuffix("_name")
                log_failure(record, stage, error, kind, name, verdict, quiet)
        raised = stage == "handle" and not isinstance(error, Outcome)
        ends = verdict.flood or (error if self.plan.reraise_exceptions and raised else None)
        if ends is not None:
            self._raise_after_batch = ends
            if attempt is None and self.flow is None:
                consumer.end_batch()
        if verdict.outcome == "held":
            handlers = getattr(error, "failed_handlers", ())
            some = self.plan.some_handlers(name, handlers) if name is not None and handlers else None
            return verdict.delay_s, verdict.first_failure_ms, some
        return verdict.outcome

    def _name_of(self, record: Record) -> str | None:
        bound = self.plan.table.bound.get(record.topic)
        if bound is not None:
            return bound.name
        return self.plan.table.name_of(record.value, record.topic, record.headers) if record.value is not None else None

    # --- end ---------------------------------------------------------------------------------------------------------

    def _free_after(self, call: Future[Any]) -> None:
        """Free the client once a call that was given up has returned: librdkafka must not be freed under it.

        Such calls are made before the server joins its group, so there is nothing to store, commit or leave.
        """
        consumer = self.consumer
        if consumer is not None:
            call.add_done_callback(lambda _: consumer.close(1000))

    def _shut_down(self, failure: BaseException | None) -> Steps:
        """Finish, store, commit, leave, free. `failure` is what has ended the run, if it was not to end."""
        consumer, copies = self.consumer, self._copies
        if consumer is None or copies is None:
            return
        self.stop()
        problems: list[BaseException] = []
        try:
            yield from self._finish_running(self._stopped_at + self._drain_s)
        except BaseException as error:
            problems.append(error)
        if self.flow is not None and self.flow.busy():
            self.drain_is_over()
            if self.cut is not None and failure is None:
                problems.append(self.cut)
        yield DISMISS
        if self._attempts is not None:
            self._attempts.drop()
        now = time.monotonic()
        # A handler that took longer than it may leaves a second for the commit of what it did.
        deadline = max(now + 1, min(now, self._stopped_at + self._drain_s) + self._close_timeout_s)
        try:
            unkept = yield from self._settle(deadline - now)
        except DeliveryError as error:
            unkept = error
        unkept = unkept or (yield from self._await_promises(deadline - now, all_of_them=True))
        if unkept is not None:
            problems.append(unkept)
        if consumer.in_hand:
            logger.info("%d fetched records are left for the next server", consumer.in_hand)
        for kind, partitions, lost in consumer.take_notes():
            if kind == "revoke" and lost:
                deadline += yield from self._timed(self._give_up(partitions, lost=True), problems)
        if not self.plan.no_commit and self.plan.use_group:
            try:
                yield from self._commit_last(deadline)
            except CommitError as error:
                problems.append(error)
        # After a fatal error, such as a static member's that another one has replaced, nothing is its own any more.
        lost = consumer.assignment_lost or (isinstance(failure, KafkaError) and failure.fatal)
        parting = self._tell_of_loss(consumer.assignment(), lost=lost)
        deadline += yield from self._timed(parting, problems)
        if self.flow is not None:
            self.flow.clear()  # what nobody has finished is given up
        wrong = discrepancies(consumer.ledger(), consumer.offsets()) if failure is None else []
        if wrong:
            problems.append(LedgerError("the ledger does not add up: " + "; ".join(wrong) + "; please report it"))
        left = yield Call(lambda: consumer.close(_left_ms(deadline)))
        if not left:
            logger.warning(
                "Kafka at %s did not answer within %d ms: the group was left without its confirmation",
                self.plan.address,
                self.plan.settings.close_timeout_ms,
            )
        yield Call(lambda: copies.close(_left_ms(deadline)))
        if problems:
            for problem in problems[1:]:
                logger.error("while shutting down: %s", one_line(problem, 1000))
            raise problems[0]

    def _commit_last(self, deadline: float) -> Steps:
        """Commit what is stored; again and again while the group is being rearranged, which takes no commits then."""
        consumer = self.consumer
        assert consumer is not None
        while True:
            try:
                yield Call(lambda: consumer.commit(_left_ms(deadline)))
                return
            except CommitError as error:
                passing = error.name in _REARRANGING and not consumer.assignment_lost
                if not passing or time.monotonic() >= deadline:
                    raise
            yield Rest(_RECOMMIT_S)

    def _timed(self, steps: Steps, problems: list[BaseException]) -> Generator[Any, Any, float]:
        """Steps of the end that call hooks: how long they took; what they raise is added to the problems."""
        began = time.monotonic()
        try:
            yield from steps
        except BaseException as error:
            problems.append(error)
        return time.monotonic() - began


def _names(partitions: Iterable[tuple[Any, ...]]) -> str:
    return ", ".join(f"{topic} [{partition}]" for topic, partition, *_ in partitions) or "nothing"


def _left_ms(deadline: float) -> int:
    return max(100, int((deadline - time.monotonic()) * 1000))
