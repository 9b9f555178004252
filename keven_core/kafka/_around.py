"""What is done before and after a handler's call, for each message that it is given."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from keven_core.kafka._batches import cause_of, outcomes_of
from keven_core.kafka._calls import check_done, finished, is_async
from keven_core.kafka.outcomes import BatchError, Outcome
from keven_core.kafka.publishing import handler_outbox

__all__ = ["Around", "CapturedExceptions", "SettledFirst", "surrounded"]

logger = logging.getLogger("keven_core.kafka")

Call = Callable[[Any], Any]


class Around:
    """Told of each message before its handler is called, and of its end: what it has failed with, or None.

    What these raise is the handler's failure. Messages behind the one that a BatchError names have no end: they come
    again.
    """

    def begin(self, message: Any) -> None:
        """A handler is about to be called with the message."""

    def end(self, message: Any, error: Exception | None) -> None:
        """It has returned, or has failed with an exception or outcome."""


class SettledFirst(Around):
    """Innermost around a handler: what it has raised is sent before others are told that it has succeeded."""

    def end(self, message: Any, error: Exception | None) -> None:
        """Send what the handler has raised; if it has failed, its caller sees to that."""
        box = handler_outbox()
        if error is None and box is not None and box.messages:
            box.send()


class CapturedExceptions(Around):
    """Shows what a handler fails with to a function of the service, an error tracker for example."""

    def __init__(self, capture: Callable[[Exception], Any]) -> None:
        self._capture = capture

    def end(self, message: Any, error: Exception | None) -> None:
        """Show the exception; outcomes that the handler asks for are none. What the function raises is logged."""
        if error is None or isinstance(error, Outcome):
            return
        try:
            self._capture(error)
        except Exception:
            logger.exception("%r has failed itself; the handler's exception is handled as always", self._capture)


def surrounded(call: Call, arounds: list[Around], *, takes_list: bool) -> Call:
    """`call` with what stands around it, the first outermost; async if it is."""
    for around in reversed(arounds):
        call = _surround_list(call, around) if takes_list else _surround(call, around)
    return call


def _surround(call: Call, around: Around) -> Call:
    if is_async(call):

        async def call_async(message: Any) -> None:
            around.begin(message)
            try:
                check_done(call, await finished(call(message)))
            except Exception as error:
                around.end(message, error)
                raise
            around.end(message, None)

        return call_async

    def call_now(message: Any) -> None:
        around.begin(message)
        try:
            check_done(call, call(message))
        except Exception as error:
            around.end(message, error)
            raise
        around.end(message, None)

    return call_now


def _surround_list(call: Call, around: Around) -> Call:
    def ended(messages: list[Any], outcomes: list[Exception | None]) -> list[Exception | None]:
        for message, outcome in zip(messages, outcomes, strict=False):
            around.end(message, outcome)
        return outcomes

    def failed(messages: list[Any], error: Exception) -> None:
        if isinstance(error, BatchError) and 0 <= error.index < len(messages):
            ended(messages, [*([None] * error.index), cause_of(error)])
        else:
            ended(messages, [error] * len(messages))

    if is_async(call):

        async def call_async(messages: list[Any]) -> list[Exception | None]:
            for message in messages:
                around.begin(message)
            try:
                outcomes = outcomes_of(call, await finished(call(messages)), len(messages))
            except Exception as error:
                failed(messages, error)
                raise
            return ended(messages, outcomes)

        return call_async

    def call_now(messages: list[Any]) -> list[Exception | None]:
        for message in messages:
            around.begin(message)
        try:
            outcomes = outcomes_of(call, call(messages), len(messages))
        except Exception as error:
            failed(messages, error)
            raise
        return ended(messages, outcomes)

    return call_now
