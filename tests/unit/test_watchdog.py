"""The watchdog's policy with given times, its thread with a stand-in for the session, and the check of the ledger."""

import logging
import threading
import time
from typing import Any

import pytest
from waiting import wait_until

from keven_core.kafka._ledger import discrepancies
from keven_core.kafka._watchdog import StallWatch, Watchdog


def test_a_count_that_stands_still_is_said_once_per_stall() -> None:
    watch = StallWatch(8, 100)
    assert [watch.look(1, now) for now in (101, 108.9)] == [None, None]
    assert watch.next_look_s(108.9) == pytest.approx(0.1)
    assert watch.look(1, 109) == 8
    assert [watch.look(1, now) for now in (110, 1000)] == [None, None]
    assert watch.look(2, 1001) is None
    assert watch.next_look_s(1002) == 7
    assert watch.look(2, 1009.5) == 8.5


def test_a_count_that_moves_is_never_said() -> None:
    watch = StallWatch(8, 0)
    assert not any(watch.look(count, count * 7.9) for count in range(100))


class Stub:
    """As a session, with what the watchdog looks at; counts how often that is."""

    def __init__(self) -> None:
        self.consumer: Any = self
        self.stopping = False
        self.drain_left_s = 60.0
        self.looks = self.looks_at_clock = 0
        self.moving = True

    @property
    def polls(self) -> int:
        self.looks += 1
        return self.looks if self.moving else 0

    def look_at_clock(self) -> None:
        self.looks_at_clock += 1

    def records_in_hand(self) -> list[tuple[str, int, int]]:
        return [("t", 3, 17)]


def _watched(session: Stub, max_poll_interval_s: float) -> Watchdog:
    watchdog = Watchdog(session, max_poll_interval_s)
    watchdog.start()
    return watchdog


def test_the_thread_is_light_and_goes_away(caplog: pytest.LogCaptureFixture) -> None:
    session = Stub()
    watchdog = _watched(session, 180)
    wait_until(lambda: session.looks >= 2, 5)
    thread = next(thread for thread in threading.enumerate() if thread.name == "keven-watchdog")
    assert thread.daemon
    began = time.monotonic()
    watchdog.close()
    assert time.monotonic() - began < 0.5
    assert not thread.is_alive()
    assert session.looks == session.looks_at_clock <= 3
    assert not caplog.records


def test_a_stall_is_said_with_the_record_and_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    session = Stub()
    session.moving = False
    watchdog = _watched(session, 0.5)
    wait_until(lambda: caplog.records, 5)
    wait_until(lambda: session.looks > 10, 5)
    watchdog.close()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    for part in ("stood still for 0.4 s", "while t [3] @ 17 was being handled", "after 0.5 s (max_poll_interval)"):
        assert part in text


def test_what_outlasts_the_end_is_said_once_and_only_when_the_time_is_over(caplog: pytest.LogCaptureFixture) -> None:
    session = Stub()
    session.moving = False
    session.stopping = True
    watchdog = _watched(session, 0.1)
    time.sleep(0.3)  # nothing to wait for: it must stay quiet, though nothing is polled
    assert not caplog.records
    session.drain_left_s = -0.1
    wait_until(lambda: caplog.records, 5)
    time.sleep(0.1)
    watchdog.close()
    (record,) = caplog.records
    assert "KEVEN_DRAIN_TIMEOUT_MS" in record.getMessage()
    assert "t [3] @ 17" in record.getMessage()


def _counts(**counts: int) -> dict[str, int]:
    names = ("received", "done", "skipped", "tombstones", "dead", "retried", "stale", "in_flight")
    return {name: counts.get(name, 0) for name in names}


def test_a_ledger_that_adds_up() -> None:
    counts = _counts(received=21, done=6, skipped=5, tombstones=4, dead=3, retried=2, stale=1)
    assert discrepancies({("t", 0): counts, ("u", 1): _counts()}, {("t", 0): (21, 21, 7), ("u", 1): (-1, -1, 4)}) == []


def test_a_ledger_that_does_not() -> None:
    ledger = {
        ("lost", 0): _counts(received=3, done=2, in_flight=1),
        ("twice", 1): _counts(received=3, done=3, dead=1, in_flight=-1),
        ("from nowhere", 2): _counts(received=1, in_flight=1),
    }
    assert discrepancies(ledger, {}) == [
        "lost [0]: 3 records were received, but 2 are accounted for (2 done)",
        "twice [1]: 3 records were received, but 4 are accounted for (3 done, 1 dead)",
        "from nowhere [2]: 1 records were received, but 0 are accounted for (none)",
    ]


def test_what_is_stored_beyond_the_position_is_named() -> None:
    (found,) = discrepancies({}, {("t", 0): (5, 9, 9), ("t", 1): (5, 5, 9), ("t", 2): (5, 4, -1)})
    assert found.startswith("t [0]: the offset 9 was stored, but records are handled up to 5 only")
