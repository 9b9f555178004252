"""Log lines: on one line whatever is in them, and not more than so many."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keven_core.kafka.logs import RateLimiter, log_client_line, one_line


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# --- one_line --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text", "plain text"),
        ("two\nlines", "two\\nlines"),
        ("back\rover", "back\\rover"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("tab\there", "tab\\there"),
        ("nul\x00", "nul\\x00"),
        ("\x85\u2028\u2029", "\\x85\\u2028\\u2029"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
        ("näh, 漢字", "näh, 漢字"),
        ("", ""),
    ],
)
def test_control_characters_are_escaped(text: str, expected: str) -> None:
    assert one_line(text) == expected


@given(st.text(st.characters(), max_size=400), st.integers(3, 350))
def test_any_text_becomes_one_printable_line_within_the_limit(text: str, limit: int) -> None:
    shown = one_line(text, limit)
    assert len(shown) <= limit
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1


def test_what_is_cut_says_so() -> None:
    assert one_line("x" * 300) == "x" * 300
    assert one_line("x" * 301) == "x" * 297 + "..."
    assert one_line("\n" * 200) == "\\n" * 148 + "\\..."


def test_a_huge_text_is_cut_before_it_is_escaped() -> None:
    text = "\x00" * 50_000_000
    assert len(one_line(text)) == 300


def test_exceptions_are_shown_by_their_text() -> None:
    assert one_line(ValueError("a\nb")) == "a\\nb"


def test_an_exception_that_cant_be_shown_is_named() -> None:
    class BrokenError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text for you")

    shown = one_line(BrokenError())
    assert "BrokenError" in shown
    assert "RuntimeError" in shown


# --- RateLimiter -----------------------------------------------------------------------------------------------------


def test_so_many_per_period_then_quiet() -> None:
    clock = Clock()
    limiter = RateLimiter(3, 10.0, clock)
    assert [limiter.admit("a") for _ in range(6)] == [0, 0, 0, None, None, None]
    clock.now += 9.999
    assert limiter.admit("a") is None
    clock.now += 0.001
    assert limiter.admit("a") == 4
    assert [limiter.admit("a") for _ in range(3)] == [0, 0, None]


def test_what_was_kept_quiet_is_told_once_however_long_ago() -> None:
    clock = Clock()
    limiter = RateLimiter(1, 10.0, clock)
    assert [limiter.admit("a") for _ in range(3)] == [0, None, None]
    clock.now += 1000
    assert limiter.admit("a") == 2
    clock.now += 1000
    assert limiter.admit("a") == 0


def test_keys_are_counted_apart() -> None:
    clock = Clock()
    limiter = RateLimiter(1, 10.0, clock)
    assert [limiter.admit(key) for key in ("a", "b", "a", "b", "c")] == [0, 0, None, None, 0]


def test_the_period_starts_with_the_first_and_not_with_the_last() -> None:
    clock = Clock()
    limiter = RateLimiter(1, 10.0, clock)
    assert limiter.admit("a") == 0
    for _ in range(9):
        clock.now += 1
        assert limiter.admit("a") is None
    clock.now += 1
    assert limiter.admit("a") == 9


def test_the_real_clock_is_monotonic_time() -> None:
    limiter = RateLimiter(1, 0.0)
    assert [limiter.admit("a") for _ in range(3)] == [0, 0, 0]


# --- librdkafka's lines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("syslog", "expected"),
    [
        (0, logging.CRITICAL),
        (2, logging.CRITICAL),
        (3, logging.ERROR),
        (4, logging.WARNING),
        (5, logging.INFO),
        (6, logging.INFO),
        (7, logging.DEBUG),
        (99, logging.DEBUG),
        (-1, logging.CRITICAL),
    ],
)
def test_levels_of_librdkafka(syslog: int, expected: int, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("keven_core.test")
    caplog.set_level(logging.DEBUG, logger.name)
    log_client_line(logger, syslog, "FAIL", "broker\n\x1b[0mdown 100%s")
    (record,) = caplog.records
    assert record.levelno == expected
    assert record.getMessage() == "librdkafka FAIL: broker\\n\\x1b[0mdown 100%s"
