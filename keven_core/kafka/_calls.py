"""Calling what a service gives: handlers, hooks and runners, sync or async, and what their results mean."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from keven_core.kafka.errors import UsageError
from keven_core.kafka.outcomes import Outcome, Skip

__all__ = [
    "Verdict",
    "as_unary",
    "check_done",
    "escaped_cancellation",
    "finished",
    "is_async",
    "run_now",
    "run_or_await",
]

Call = Callable[[Any], Any]


def is_async(call: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine, also for objects with an async `__call__` and partials."""
    while isinstance(call, functools.partial):
        call = call.func
    by_class = getattr(type(call), "__call__", None)  # noqa: B004  # not to tell whether it can be called
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(by_class)


def as_unary(hook: Callable[..., Any]) -> Call:
    """`hook` as a function of the event, for hooks that take no argument; async if the hook is."""
    try:
        inspect.signature(hook).bind(None)
    except ValueError:  # a builtin without a signature
        return hook
    except TypeError:
        if not is_async(hook):
            return lambda event: hook()

        async def call_without_event(event: Any) -> None:
            await hook()

        return call_without_event
    return hook


def check_done(call: Call, result: Any) -> None:
    """Raise a result that is an outcome; refuse one that is work which has only been prepared, as the hot path does."""
    if result is None:
        return
    if isinstance(result, Outcome):
        raise result
    generator = hasattr(result, "__next__") or hasattr(result, "__anext__")
    if not generator and not isinstance(result, Awaitable):
        return
    if hasattr(result, "close"):
        result.close()
    advice = "it has a `yield`, so calling it runs nothing" if generator else "declare it `async def`"
    name = getattr(call, "__qualname__", repr(call))
    raise UsageError(f"{name} returned {type(result).__name__} instead of doing its work: {advice}")


def run_now(call: Call, event: Any) -> None:
    """Run a synchronous part of a composed call."""
    check_done(call, call(event))


async def run_or_await(call: Call, event: Any) -> None:
    """Run a part of a composed call that may be async."""
    result = call(event)
    if not isinstance(result, Awaitable):
        check_done(call, result)
        return
    result = await finished(result)
    if isinstance(result, Outcome):
        raise result


class Verdict:
    """What becomes of a record that several handlers and hooks have a say in: the first failure counts.

    The failure names the handlers that failed, for they alone run again. A record is skipped when all of its handlers
    skip it.
    """

    def __init__(self, handlers: int) -> None:
        self._handlers = handlers
        self._failure: Exception | None = None
        self._failed: list[str] = []
        self._skips: list[Skip] = []

    def handler_failed(self, name: str, error: Exception) -> None:
        if isinstance(error, Skip):
            self._skips.append(error)
            return
        self._failure = self._failure or error
        self._failed.append(name)

    def hook_failed(self, error: Exception) -> None:
        self._failure = self._failure or error

    def failure(self) -> Exception | None:
        """What the record has failed with, or the outcome that its handlers agree on; None: it is done."""
        if self._failure is not None:
            if self._failed:
                with contextlib.suppress(AttributeError, TypeError):  # an exception with slots: then all run again
                    # The service's exception: it carries the names to Failures.decide().
                    self._failure.failed_handlers = tuple(self._failed)  # type: ignore[attr-defined]
            return self._failure
        if self._skips and len(self._skips) == self._handlers:
            return self._skips[0]
        return None

    def give(self) -> None:
        failure = self.failure()
        if failure is not None:
            raise failure


def escaped_cancellation(error: asyncio.CancelledError) -> Exception | None:
    """What a handler is to be blamed with that let the cancellation of something else escape.

    None: it is the running task itself that is being cancelled. On Python 3.10 these can't be told apart, so every
    cancellation counts as the task's own.
    """
    cancelling: Callable[[], int] | None = getattr(asyncio.current_task(), "cancelling", None)
    if cancelling is None or cancelling() > 0:
        return None
    failure = RuntimeError("the handler let a CancelledError escape without having been cancelled")
    failure.__cause__ = error
    return failure


async def finished(awaitable: Awaitable[Any]) -> Any:
    """Await what a handler or hook returned; a cancellation that it lets escape counts as its failure."""
    try:
        return await awaitable
    except asyncio.CancelledError as error:
        failure = escaped_cancellation(error)
        if failure is None:
            raise
        raise failure from error
