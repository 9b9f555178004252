"""What a handler can say of a record beyond "done": returned, or raised from any depth.

    def handle_event(self, event):
        if self.partner_is_down():
            return Retry(after=60)
        if event.amount < 0:
            raise DeadLetter("a negative amount")

A handler that returns anything else is done with its record; one that raises another exception has failed, and the
server's retry policy decides.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from keven_core.kafka.errors import UsageError

__all__ = ["BatchError", "DeadLetter", "Outcome", "Retry", "Skip"]

_LONGEST_S = 366 * 86400.0


class Outcome(Exception):
    """Base of the outcomes. May be returned or raised by handlers and hooks, sync or async."""


class Retry(Outcome):
    """The record is to be handled again, later.

    Arguments:
        after: seconds, or a timedelta; None: what the retry policy says. How often, and for how long, stays the
            policy's decision: then the record is dead-lettered.
        reason: for the log and the headers of the copy.
    """

    def __init__(self, after: float | timedelta | None = None, reason: str = "the handler asked for a retry") -> None:
        if isinstance(after, timedelta):
            after = after.total_seconds()
        if after is not None and (isinstance(after, bool) or not isinstance(after, (int, float))):
            raise UsageError(f"Retry(after={after!r:.80}): seconds, a timedelta or None are allowed")
        if after is not None and not 0 <= after <= _LONGEST_S:
            raise UsageError(f"Retry(after={after!r}): 0 to {_LONGEST_S:.0f} seconds are allowed")
        super().__init__(reason)
        self.after_s = after
        self.reason = reason


class DeadLetter(Outcome):
    """The record can't be handled, now or later: it goes to the dead-letter topic at once."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Skip(Outcome):
    """The record is not to be handled: it is counted as skipped, and nothing is kept of it."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


class BatchError(Exception):
    """What a batch handler raises when it got stuck at one of its events.

    Those before `index` (from 0) are done, that one has failed, and the others come again, as a batch of their own. To
    be raised `from` the exception that says why: that one is then the event's failure.
    """

    def __init__(self, index: int, reason: str = "") -> None:
        if isinstance(index, bool) or not isinstance(index, int):
            raise UsageError(f"BatchError(index={index!r:.80}): the position of an event in its batch is allowed")
        super().__init__(reason or f"event {index} of the batch")
        self.index = index


def wrong_outcomes(who: str, result: Any, count: int) -> UsageError | None:
    """What is wrong with what a batch handler has returned for `count` events, unless that was None; None: nothing."""
    if not isinstance(result, (list, tuple)):
        kind = type(result).__name__
        return UsageError(f"{who} returned {kind}: None, or a list with None or an outcome for each event, is allowed")
    if len(result) != count:
        return UsageError(
            f"{who} returned {len(result)} outcome(s) for {count} event(s): one for each, in their order, is allowed"
        )
    for outcome in result:
        if outcome is not None and not isinstance(outcome, Exception):
            kind = type(outcome).__name__
            return UsageError(f"{who} returned a list with {kind}: None, an outcome or an exception is allowed")
    return None
