"""Who handles the records in flight: threads of a synchronous server, tasks of an asynchronous one, or the owner."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from keven_core.kafka import record as record_module
from keven_core.kafka._calls import escaped_cancellation
from keven_core.kafka.errors import UsageError
from keven_core.kafka.publishing import HandlerOutbox

if TYPE_CHECKING:
    from keven_core._native.flow import Flow, Worker

__all__ = ["Tasks", "Threads", "task_in"]

Result = TypeVar("Result")

# How long a cancelled handler may take to end; then it is left behind.
_CANCEL_S = 1.0


def _new_worker(flow: Flow, base_context: contextvars.Context) -> tuple[Worker, contextvars.Context]:
    """A worker, and the context that each of its records starts with: current_record() asks the worker."""
    from keven_core._native.flow import Worker

    context = base_context.copy()
    worker = Worker(flow, context)
    context.run(record_module._source.set, worker)
    outbox = HandlerOutbox(worker)
    context.run(outbox.enter)
    worker.set_outbox(outbox)
    return worker, context


def task_in(
    loop: asyncio.AbstractEventLoop,
    context: contextvars.Context,
    work: Callable[[contextvars.Context | None], Coroutine[Any, Any, Result]],
) -> asyncio.Task[Result]:
    """A task of work(context) in that context; work(None) on Python 3.10, in a copy of it that nobody can name."""
    if sys.version_info >= (3, 11):
        return loop.create_task(work(context), context=context)
    return context.run(loop.create_task, work(None))


class Threads:
    """Worker threads; without any, the owner's thread does their work. All methods are for the owner's thread."""

    def __init__(self, flow: Flow, base_context: contextvars.Context, count: int) -> None:
        self._flow = flow
        self._idle = 0
        self._news = threading.Condition()
        self._owner = _new_worker(flow, base_context)[0] if count == 0 else None
        self._threads = [
            threading.Thread(
                target=self._work, args=_new_worker(flow, base_context)[:1], daemon=True, name=f"keven-worker-{number}"
            )
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def has_work(self) -> bool:
        """Whether the owner has to do something itself, and must not wait."""
        return self._owner is not None and self._flow.ready > 0

    def work(self) -> None:
        """See to it that what is ready is handled; the owner's own worker handles it before this returns."""
        if self._owner is not None:
            self._owner.run(True)
        elif self._flow.ready:
            with self._news:
                if self._idle:
                    self._news.notify(min(self._idle, self._flow.ready))

    def _work(self, worker: Worker) -> None:
        flow = self._flow
        while True:
            try:
                worker.run()
            except BaseException as error:
                flow.fail(error)
                return
            with self._news:
                while not flow.ready and not flow.closing:
                    self._idle += 1
                    self._news.wait()
                    self._idle -= 1
                if flow.closing:
                    return

    def dismiss(self) -> None:
        """End the threads that do nothing; a handler that still runs can't be ended, and is left behind."""
        self._flow.stop_starting()
        with self._news:
            self._news.notify_all()
        deadline = time.monotonic() + (0.1 if self._flow.running else _CANCEL_S)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


class Tasks:
    """Worker tasks. All methods are for the loop's thread.

    Arguments:
        on_failure: called with what ended a worker that should not have ended.
        threads: of a pool for synchronous handlers; 0: they run in the loop.
    """

    def __init__(
        self,
        flow: Flow,
        base_context: contextvars.Context,
        count: int,
        threads: int,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._flow = flow
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._pool = ThreadPoolExecutor(threads, "keven-worker") if threads else None
        if self._pool is not None:
            flow.set_offload(self._offload)
        self._tasks: set[asyncio.Task[bool]] = set()
        for _ in range(count):
            self._start(*_new_worker(flow, base_context))

    def _offload(self, call: Callable[[Any], Any], value: Any) -> Any:
        return self._loop.run_in_executor(self._pool, contextvars.copy_context().run, call, value)

    def _start(self, worker: Worker, base: contextvars.Context) -> None:
        task = task_in(self._loop, base.copy(), lambda context: worker.serve(context, self._rest, escaped_cancellation))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._on_done(task, worker, base))

    def _on_done(self, task: asyncio.Task[bool], worker: Worker, base: contextvars.Context) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            if not self._flow.closing:
                self._on_failure(UsageError("a worker task of the server was cancelled by something else"))
            return
        error = task.exception()
        if error is not None:
            self._on_failure(error)
        elif task.result():
            self._start(worker, base)

    async def _rest(self) -> None:
        """Wait until something is ready; what is ready already comes after the loop's other tasks."""
        if self._flow.ready:
            await asyncio.sleep(0)
            return
        news = self._loop.create_future()
        self._idle.append(news)
        await news

    def work(self) -> None:
        """Wake as many workers as there are records ready."""
        idle = self._idle
        for _ in range(min(len(idle), self._flow.ready)):
            news = idle.popleft()
            if not news.done():
                news.set_result(None)

    async def dismiss(self) -> None:
        """End the workers; handlers that still run are cancelled: their records are neither done nor failed."""
        self._flow.stop_starting()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_S)
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
