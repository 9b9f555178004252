"""What becomes of failed records: another attempt, the dead-letter topic, or nothing; and when there are too many."""

from __future__ import annotations

import logging
import random
import time
import traceback
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from keven_core.kafka._copies import CopyPublisher
from keven_core.kafka.deadletter import Attempt, dead_letter_headers, retry_headers
from keven_core.kafka.errors import DeadLetterFloodError
from keven_core.kafka.logs import one_line
from keven_core.kafka.outcomes import Outcome, Retry, Skip
from keven_core.kafka.retry import Policies, TryAgain, decide

if TYPE_CHECKING:
    from keven_core._native.message import Record

__all__ = ["Failures", "FloodBreaker", "Verdict", "is_one_of", "log_failure"]

logger = logging.getLogger("keven_core.kafka")


def is_one_of(error: BaseException, names: Iterable[str]) -> bool:
    """Whether the class of an exception, or a base of it, has one of the names: "module.Class", or "Class" alone."""
    given = frozenset(names)
    return bool(given) and any(
        cls.__qualname__ in given or f"{cls.__module__}.{cls.__qualname__}" in given for cls in type(error).__mro__
    )


class FloodBreaker:
    """Says when so many records are dead-lettered that the fault can't be theirs.

    Arguments:
        max_in_a_row: this many one after the other are too many; 0: any number is allowed.
        max_percent: more than this share of the last `window` records is too much; 100: any share is allowed.
    """

    def __init__(self, max_in_a_row: int, max_percent: int, window: int = 10_000) -> None:
        self._max_in_a_row = max_in_a_row
        self._max_percent = max_percent
        self._window = window
        self._since = self._dead = 0

    def dead(self, in_a_row: int, finished: int) -> str | None:
        """A record was dead-lettered; why that is too much, or None.

        Asked only then, so that good records cost nothing.

        Arguments:
            in_a_row: how many records were dead-lettered one after the other.
            finished: how many records the server has finished so far, dead or not.
        """
        self._dead += 1
        if self._max_in_a_row and in_a_row >= self._max_in_a_row:
            return f"{in_a_row} records in a row were dead-lettered (KEVEN_DEAD_LETTERS_IN_A_ROW={self._max_in_a_row})"
        # What is in hand is not among the finished ones yet.
        dead = self._dead
        handled = max(finished - self._since, dead)
        if handled < self._window:
            return None
        self._since, self._dead = finished, 0
        if dead * 100 > handled * self._max_percent:
            percent = f"KEVEN_DEAD_LETTERS_PERCENT={self._max_percent}"
            return f"{dead} of the last {handled} records were dead-lettered ({percent})"
        return None


class Verdict(NamedTuple):
    """What became of a failed record.

    Attributes:
        outcome: "dead", "retried" or "skipped", as the ledger counts it; "held": it is to be tried again in its place.
        story: for the log: where its copy went and why.
        flood: set when the server has to stop: too many are dead-lettered.
    """

    outcome: str
    story: str
    flood: DeadLetterFloodError | None = None
    delay_s: float = 0.0
    first_failure_ms: int = 0


class Failures:
    """Decides on failed records and submits their copies. Owner thread only.

    Arguments:
        now_ms: milliseconds since the epoch; draw: a random number from 0 to 1. For tests.
    """

    def __init__(
        self,
        copies: CopyPublisher,
        policies: Policies,
        breaker: FloodBreaker,
        *,
        group_id: str,
        dead_letter_topic: str,
        retry_topic: str,
        dialect: str,
        fatal: Iterable[str] = (),
        retryable: Iterable[str] = (),
        now_ms: Callable[[], int] = lambda: int(time.time() * 1000),
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._copies = copies
        self._policies = policies
        self._breaker = breaker
        self._group_id = group_id
        self._dead_letter_topic = dead_letter_topic
        self._retry_topic = retry_topic
        self._dialect = dialect
        self._fatal = frozenset(fatal)
        self._retryable = frozenset(retryable)
        self._now_ms = now_ms
        self._draw = draw

    def decide(
        self,
        record: Record,
        error: Exception,
        *,
        name: str | None,
        attempt: Attempt | None,
        in_a_row: int,
        finished: int,
    ) -> Verdict:
        """Submit the copy of a failed record, if there is to be one.

        Arguments:
            record: as the handler saw it.
            error: what the handler raised, or the Outcome that it returned.
            name: of its event, if known.
            attempt: what its copy in the retry topic said; None: it failed for the first time.
            in_a_row: how many records have failed one after the other, this one included.
            finished: how many records the server has finished so far.

        Raises DeadLetterError when the copy can't even be queued.
        """
        if isinstance(error, Skip):
            return Verdict("skipped", f"skipped: {error}")
        now_ms = self._now_ms()
        handlers: tuple[str, ...] = getattr(error, "failed_handlers", attempt.handlers if attempt is not None else ())
        policy = self._policies.of(name, record.topic, handlers)
        first_failure_ms = record.first_failure_ms or now_ms
        decision = decide(
            error,
            policy,
            attempt=record.attempt,
            first_failure_ms=first_failure_ms,
            now_ms=now_ms,
            draw=self._draw(),
            fatal=self._is_fatal(error),
        )
        if isinstance(decision, TryAgain):
            assert policy is not None
            delay_s = (decision.due_ms - now_ms) / 1000
            story = f"attempt {record.attempt} of {policy.max_retries + 1}, again in {delay_s:g} s"
            if policy.in_place and attempt is None:
                return Verdict("held", f"{story}, in its place", None, delay_s, first_failure_ms)
            headers = retry_headers(
                record, error, due_ms=decision.due_ms, first_failure_ms=first_failure_ms, handlers=handlers
            )
            # Stamped now: with the time of the original it might be too old for the retry topic to keep.
            self._copies.publish(self._retry_topic, record, headers, 0)
            return Verdict("retried", story)
        headers = dead_letter_headers(record, error, self._group_id, dialect=self._dialect, why=decision.why)
        self._copies.publish(self._dead_letter_topic, record, headers, max(record.timestamp_ms, 0))
        reason = self._breaker.dead(in_a_row, finished)
        why = f" ({decision.why})" if decision.why else ""
        return Verdict("dead", f"copied to {self._dead_letter_topic}{why}", _flood(reason, error))

    def _is_fatal(self, error: Exception) -> bool:
        if is_one_of(error, self._fatal):
            return True
        return bool(self._retryable) and not isinstance(error, Retry) and not is_one_of(error, self._retryable)


def _flood(reason: str | None, last: Exception) -> DeadLetterFloodError | None:
    if reason is None:
        return None
    error = DeadLetterFloodError(
        f"{reason}: the server stops rather than empty its topics into the dead-letter topic; find out what is wrong, "
        f"then redrive what was dead-lettered; the last one: {type(last).__name__}"
    )
    error.__cause__ = last
    return error


def log_failure(
    record: Record, stage: str, error: Exception, kind: str, name: str | None, verdict: Verdict, quiet: int
) -> None:
    """Say what became of a failed record. `kind`: "event" or "command"; `quiet`: how many others were not logged."""
    # Escaped and indented: what a payload brings into an exception's text can't pose as a line of the log.
    trace: list[str] = []
    if stage == "handle" and not isinstance(error, Outcome) and verdict.outcome == "dead":
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__)).splitlines()
    logger.log(
        logging.ERROR if verdict.outcome == "dead" else logging.WARNING,
        "%s [%d] @ %d (%s %s) failed to %s, %s: %s%s%s",
        one_line(record.topic),
        record.partition,
        record.offset,
        kind,
        one_line(name or "unknown", 100),
        stage,
        verdict.story,
        one_line(error),
        f" ({quiet} more not logged)" if quiet else "",
        "".join(f"\n    {one_line(line, 500)}" for line in trace),
    )
