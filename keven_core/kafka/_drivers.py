"""Carries out the steps of a session: in the calling thread, or in a worker task of an event loop.

A session is a generator that yields operations and is told their results; what they mean is decided there. Here is only
how each is done: blocking calls go straight through in the sync driver and to a thread in the async one, waiting is a
poll of the consumer's pipe or a reader of the event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Callable, Generator
from concurrent import futures
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from keven_core.kafka._calls import escaped_cancellation, finished
from keven_core.kafka._crew import Tasks, Threads, task_in
from keven_core.kafka.errors import DrainError
from keven_core.kafka.outcomes import Outcome

if TYPE_CHECKING:
    from keven_core._native.consumer import Consumer
    from keven_core._native.flow import Flow
    from keven_core.kafka._plan import Plan

__all__ = [
    "DISMISS",
    "FETCH",
    "WORK",
    "Call",
    "Handle",
    "Hook",
    "Rest",
    "Steps",
    "Stopped",
    "fulfil",
    "run_async",
    "run_sync",
]

# How long an idle server sleeps at a time. Sync: bounds the delay of a signal that another thread received.
_SYNC_SLICE_MS = 100
_ASYNC_SLICE_S = 0.5
# How long records are taken over before the tasks of the loop have their turn.
_FEED_S = 0.005

Steps = Generator[Any, Any, None]

# Take a batch; the result is how many messages.
FETCH = object()
# Handle the batch in hand; with a flow: take it over, and see to it that it is handled.
WORK = object()
# End the workers of the flow, if there is one.
DISMISS = object()


@dataclass
class Call:
    """Call a function that may block; `patient`: for so long that stop() must be able to interrupt the wait."""

    func: Callable[[], Any]
    patient: bool = False


@dataclass
class Hook:
    """Call a function of the service, sync or async, where its handlers run."""

    func: Callable[[], Any]


@dataclass
class Handle:
    """Call a handler, sync or async, with a context of its own: one record by itself. The result is the handler's."""

    func: Callable[[], Any]


@dataclass
class Rest:
    """Wait until something has happened to the consumer or its flow, at most so long."""

    seconds: float


class Stopped(BaseException):
    """Raised into the steps when stop() interrupts a patient call; `call` is that call, which goes on in its thread."""

    def __init__(self, call: futures.Future[Any] | None = None) -> None:
        super().__init__()
        self.call = call


class Steppable(Protocol):
    """What a driver needs of a session.

    `next_due_s`: how long it may wait for messages at most; None: as it likes. `heed_stop`: called in any thread when
    `stopping` or `cut` is set.
    """

    plan: Plan
    consumer: Consumer | None
    flow: Flow | None
    stopping: bool
    cut: DrainError | None
    heed_stop: Callable[[], object] | None
    batch_timeout_ms: int
    next_due_s: float | None
    base_context: contextvars.Context

    def steps(self) -> Steps:
        """The operations of the run."""

    def stop(self) -> None:
        """Ask the run to end."""

    @property
    def drain_left_s(self) -> float:
        """How long, after that, a handler may still run."""

    def drain_is_over(self) -> None:
        """It still runs: cut it off."""


def fulfil(future: futures.Future[Any], func: Callable[[], Any]) -> None:
    """Settle `future` with what `func` returns or raises."""
    try:
        future.set_result(func())
    except BaseException as error:
        future.set_exception(error)


# --- sync ------------------------------------------------------------------------------------------------------------


def run_sync(session: Steppable) -> None:
    """Run a session in this thread until its end. Raises what ended it."""
    steps = session.steps()
    value: Any = None
    error: BaseException | None = None
    crew: Threads | None = None
    while True:
        try:
            step = steps.send(value) if error is None else steps.throw(error)
        except StopIteration:
            return
        value = error = None
        try:
            if step is FETCH:
                value = _fetch(session, crew)
            elif step is WORK:
                crew = _work(session, crew)
            elif step is DISMISS:
                if crew is not None:
                    crew.dismiss()
            elif isinstance(step, Rest):
                assert session.consumer is not None
                session.consumer.rest(int(step.seconds * 1000))
            elif isinstance(step, Hook):
                _run_hook(step.func)
            elif isinstance(step, Handle):
                value = session.base_context.copy().run(step.func)
            elif step.patient:
                value = _wait_patiently(session, step.func)
            else:
                value = step.func()
        except BaseException as raised:
            error = raised


def _work(session: Steppable, crew: Threads | None) -> Threads | None:
    """Handle the batch in hand, or have the crew do so, which is made when it is needed first."""
    flow = session.flow
    if flow is None:
        assert session.consumer is not None
        session.consumer.run()
        return None
    if crew is None:
        assert session.plan.flow is not None
        crew = Threads(flow, session.base_context, session.plan.flow.threads)
    flow.intake()
    crew.work()
    return crew


def _fetch(session: Steppable, crew: Threads | None) -> int:
    consumer = session.consumer
    assert consumer is not None
    slice_ms = _SYNC_SLICE_MS
    if session.next_due_s is not None:
        slice_ms = min(slice_ms, int(session.next_due_s * 1000) + 1)
    if crew is not None and session.flow is not None:
        if crew.has_work:
            slice_ms = 0
        else:
            crew.work()
        if session.flow.full or session.flow.waits:
            return session.flow.hold_on(slice_ms)
    return consumer.fetch(slice_ms, session.batch_timeout_ms)


def _run_hook(func: Callable[[], Any]) -> None:
    result = func()
    if inspect.isawaitable(result):
        asyncio.run(_await(result))


async def _await(awaitable: Any) -> Any:
    return await awaitable


def _wait_patiently(session: Steppable, func: Callable[[], Any]) -> Any:
    future: futures.Future[Any] = futures.Future()
    threading.Thread(target=fulfil, args=(future, func), daemon=True, name="keven-wait").start()
    while not futures.wait([future], timeout=_SYNC_SLICE_MS / 1000).done:
        if session.stopping:
            raise Stopped(future)
    return future.result()


# --- async -----------------------------------------------------------------------------------------------------------


async def run_async(session: Steppable) -> None:
    """Run a session in worker tasks of this loop until its end. Raises what ended it.

    One worker task goes on from record to record; it is replaced only when a handler has changed a context variable, so
    that the next record starts clean. Cancelling the caller stops the run in order and then cancels; cancelling again
    cancels the worker, and with it the handler that runs; so does the session when the time to drain is over.
    """
    driver = _AsyncDriver(session, asyncio.get_running_loop())
    cancelled = False
    try:
        driver.heed_stop()
        while not driver.finished:
            worker = driver.new_worker()
            while not worker.done():
                try:
                    await asyncio.wait([worker])
                except asyncio.CancelledError:
                    if cancelled:
                        worker.cancel()
                    cancelled = True
                    session.stop()
            worker.result()
    finally:
        driver.close()
    if cancelled:
        raise asyncio.CancelledError


async def _handle(func: Callable[[], Any]) -> Any:
    result = func()
    return await finished(result) if inspect.isawaitable(result) else result


class _AsyncDriver:
    """Where the steps stand, for the worker task that goes on with them."""

    def __init__(self, session: Steppable, loop: asyncio.AbstractEventLoop) -> None:
        self.finished = False
        self._session = session
        self._loop = loop
        self._steps = session.steps()
        self._step: Any = None
        self._value: Any = None
        self._error: BaseException | None = None
        self._context: contextvars.Context | None = None
        self._woken: asyncio.Future[None] | None = None
        self._fd: int | None = None
        self._crew: Tasks | None = None
        self._crew_failure: BaseException | None = None
        self._fed_at = 0.0  # when the loop had its turn last
        self._timer: asyncio.TimerHandle | None = None
        self._worker: asyncio.Task[None] | None = None
        self._drain: asyncio.TimerHandle | None = None
        session.heed_stop = lambda: loop.call_soon_threadsafe(self.heed_stop)

    def heed_stop(self) -> None:
        """See that handlers end in time once the session is to end."""
        session = self._session
        if session.cut is not None:
            handling = self._step is WORK and session.consumer is not None and session.consumer.awaiting
            if self._worker is not None and (handling or isinstance(self._step, Handle)):
                self._worker.cancel()
        elif session.stopping and self._drain is None:
            self._drain = self._loop.call_later(max(0.0, session.drain_left_s), session.drain_is_over)

    def close(self) -> None:
        """Leave nothing in the loop."""
        self._session.heed_stop = None
        if self._drain is not None:
            self._drain.cancel()
        self.unwatch()

    def new_worker(self) -> asyncio.Task[None]:
        """A task with a fresh context that goes on where the last one stopped."""
        self._worker = task_in(self._loop, self._session.base_context.copy(), self._work)
        return self._worker

    async def _work(self, context: contextvars.Context | None) -> None:
        self._context = context
        while True:
            if self._step is None:
                try:
                    if self._error is None:
                        self._step = self._steps.send(self._value)
                    else:
                        self._step = self._steps.throw(self._error)
                except StopIteration:
                    self.finished = True
                    return
                self._value = self._error = None
            try:
                if self._step is FETCH:
                    self._value = await self._fetch()
                elif isinstance(self._step, Rest):
                    await self._rest(self._step.seconds)
                elif self._step is DISMISS:
                    if self._crew is not None:
                        await self._crew.dismiss()
                elif self._step is WORK and self._session.flow is not None:
                    await self._feed_crew(self._session.flow)
                elif self._step is not WORK:
                    self._value = await self._perform(self._step)
                elif not await self._handle_batch():
                    return  # the next worker goes on with this batch
            except BaseException as error:
                self._error = error
            self._step = None

    async def _perform(self, step: Any) -> Any:
        # It may close the consumer, and its pipe with it.
        self.unwatch()
        if isinstance(step, Hook):
            result = step.func()
            return await result if inspect.isawaitable(result) else result
        if isinstance(step, Handle):
            return await self._session.base_context.copy().run(self._loop.create_task, _handle(step.func))
        if step.patient:
            return await self._wait_patiently(step.func)
        return await self._loop.run_in_executor(None, step.func)

    async def _feed_crew(self, flow: Flow) -> None:
        session = self._session
        if self._crew is None:
            assert session.plan.flow is not None
            self._crew = Tasks(
                flow, session.base_context, session.plan.flow.tasks, session.plan.flow.threads, self._on_crew_failure
            )
        if self._crew_failure is not None:
            raise self._crew_failure
        flow.intake()
        self._crew.work()
        # The window is filled in one turn: the workers' next one may be long. Only then the loop has its own.
        now = self._loop.time()
        if now - self._fed_at > _FEED_S:
            await asyncio.sleep(0)
            self._fed_at = self._loop.time()

    def _on_crew_failure(self, error: BaseException) -> None:
        self._crew_failure = self._crew_failure or error
        self._resume()

    async def _handle_batch(self) -> bool:
        """Handle the batch in hand; false: a handler has changed the context, so a fresh task has to go on."""
        consumer, context = self._session.consumer, self._context
        assert consumer is not None
        run_in_task = consumer.run_in_task
        while True:
            pending = run_in_task(context)
            if pending is None:
                # Other tasks of the loop get their turn between two batches.
                await asyncio.sleep(0)
                return True
            if pending is consumer.RETIRE:
                return False
            try:
                result = await pending
            except Exception as error:
                consumer.failed(error)
            except asyncio.CancelledError as error:
                failure = escaped_cancellation(error)
                if failure is None:
                    raise
                consumer.failed(failure)
            else:
                if result is not None and isinstance(result, Outcome):
                    consumer.failed(result)

    async def _fetch(self) -> int:
        session, consumer = self._session, self._session.consumer
        assert consumer is not None
        if self._crew is not None:
            self._crew.work()
            if session.flow is not None and (session.flow.full or session.flow.waits):
                await self._rest(min(_SYNC_SLICE_MS / 1000, session.next_due_s or 1.0))
                return session.flow.hold_on(0)
        fresh = not consumer.in_hand
        count = consumer.fetch(0)
        if count == 0 and not consumer.noted and not session.stopping:
            await self._rest(session.next_due_s)
            count = consumer.fetch(0)
        if count and fresh and session.batch_timeout_ms:
            await asyncio.sleep(session.batch_timeout_ms / 1000)
            count = consumer.top_up()
        return count

    async def _rest(self, seconds: float | None) -> None:
        """Wait until the consumer's pipe or the loop's slice wakes the owner, at most so long."""
        consumer = self._session.consumer
        assert consumer is not None
        self._watch(consumer.wake_fd)
        self._woken = self._loop.create_future()
        due = None if seconds is None else self._loop.call_later(seconds, self._resume)
        try:
            await self._woken
        finally:
            self._woken = None
            self._fed_at = self._loop.time()
            if due is not None:
                due.cancel()

    def _watch(self, fd: int) -> None:
        """Have the loop watch the consumer's pipe, from one step that is not a fetch to the next."""
        if self._fd is None:
            self._fd = fd
            self._loop.add_reader(fd, self._on_wake)
            self._tick()

    def unwatch(self) -> None:
        """End that."""
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            self._fd = None
            if self._timer is not None:
                self._timer.cancel()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(_ASYNC_SLICE_S, self._tick)
        self._resume()

    def _on_wake(self) -> None:
        if self._session.consumer is not None:
            self._session.consumer.drain_wake()
        self._resume()

    def _resume(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def _wait_patiently(self, func: Callable[[], Any]) -> Any:
        # Not in the loop's executor: its end would wait for a call that was given up.
        answer: futures.Future[Any] = futures.Future()
        threading.Thread(target=fulfil, args=(answer, func), daemon=True, name="keven-wait").start()
        future = asyncio.wrap_future(answer)
        while not future.done():
            await asyncio.wait([future], timeout=_SYNC_SLICE_MS / 1000)
            if self._session.stopping and not future.done():
                future.add_done_callback(lambda done: done.exception())  # its late failure interests nobody
                raise Stopped(answer)
        return future.result()
