"""Watches a running server from a thread of its own, and says when polling stands still or a handler outlasts the end.

It costs a wake-up a second. It has slow records looked at one by one; else it only speaks: what is to be done is the
service's to decide.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Protocol

from keven_core.kafka.logs import one_line

if TYPE_CHECKING:
    from keven_core._native.consumer import Consumer

__all__ = ["StallWatch", "Watchdog"]

logger = logging.getLogger("keven_core.kafka")

_SHARE = 0.8  # of max_poll_interval: then it is said


class StallWatch:
    """Says, once per stall, that a count has stood still for too long.

    Arguments:
        limit_s: how long it may.
        now: monotonic seconds, as for look().
    """

    def __init__(self, limit_s: float, now: float) -> None:
        self._limit_s = limit_s
        self._count = -1
        self._since = now
        self._said = False

    def look(self, count: int, now: float) -> float | None:
        """How long the count has stood still, when that is too long and was not said yet; else None."""
        if count != self._count:
            self._count, self._since, self._said = count, now, False
        stood_s = now - self._since
        if self._said or stood_s < self._limit_s:
            return None
        self._said = True
        return stood_s

    def next_look_s(self, now: float) -> float:
        """In how many seconds it may be too long."""
        return float("inf") if self._said else max(0.0, self._since + self._limit_s - now)


class Watched(Protocol):
    """What is looked at, from any thread."""

    consumer: Consumer | None
    stopping: bool

    @property
    def drain_left_s(self) -> float:
        """How long, after it was asked to end, its handlers may still run."""

    def records_in_hand(self) -> list[tuple[str, int, int]]:
        """(topic, partition, offset) of what is being handled."""


class Watchdog:
    """The thread that watches one session, from start() to close()."""

    def __init__(self, session: Watched, max_poll_interval_s: float) -> None:
        self._session = session
        self._interval_s = max_poll_interval_s
        self._period_s = min(1.0, max_poll_interval_s / 10)
        self._stall = StallWatch(_SHARE * max_poll_interval_s, time.monotonic())
        self._outlasted = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="keven-watchdog")

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """End that; returns when the thread has gone."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        wait_s = 0.0
        while not self._closed.wait(wait_s):
            now = time.monotonic()
            self._look(now)
            # A little late rather than a little early, which would need another look.
            wait_s = min(self._period_s, self._stall.next_look_s(now) + 0.001)

    def _look(self, now: float) -> None:
        session, consumer = self._session, self._session.consumer
        if consumer is None:
            return
        consumer.look_at_clock()
        if session.stopping:
            # Nothing is polled any more.
            if not self._outlasted and session.drain_left_s < 0:
                self._say_outlasted()
            return
        stood_s = self._stall.look(consumer.polls, now)
        if stood_s is not None:
            logger.warning(
                "polling has stood still for %.1f s, %s; after %g s (max_poll_interval) a group gives the partitions "
                "to other members, and what is in hand is handled again: find out what it waits for, split the work "
                "of that handler up, or raise max_poll_interval",
                stood_s,
                self._named(session.records_in_hand()) or "while no record was being handled (a hook, or the broker)",
                self._interval_s,
            )

    def _say_outlasted(self) -> None:
        records = self._session.records_in_hand()
        if records:
            self._outlasted = True
            logger.warning(
                "the server was to end, and the time for that (KEVEN_DRAIN_TIMEOUT_MS) has passed, %s: it ends when "
                "the handler returns; a second signal acts as it did before the server was started",
                self._named(records),
            )

    @staticmethod
    def _named(records: list[tuple[str, int, int]]) -> str:
        names = ", ".join(f"{topic} [{partition}] @ {offset}" for topic, partition, offset in records[:10])
        return f"while {one_line(names, 1000)} was being handled" if records else ""
