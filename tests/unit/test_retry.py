"""Retry policies and the decision after each failure: plain functions, so nothing here waits."""

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keven_core.kafka.errors import ConfigurationError, UndecodableError, UsageError
from keven_core.kafka.outcomes import DeadLetter, Retry
from keven_core.kafka.retry import (
    Exponential,
    GiveUp,
    Policies,
    RetryPolicy,
    TryAgain,
    decide,
    detail_policies,
    policy_of,
)

NOW_MS = 1_700_000_000_000


class ShopError(Exception):
    pass


FAILURE, USUAL = ShopError(), RetryPolicy()
# Of types that are not allowed.
TEXT_IN_A_LIST: Any = [1, "2"]
TEXT: Any = "5"


def after(error: Exception = FAILURE, policy: RetryPolicy | None = USUAL, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"attempt": 1, "first_failure_ms": NOW_MS, "now_ms": NOW_MS, "draw": 0.0}
    return decide(error, policy, **{**arguments, **changes})


# --- delays ----------------------------------------------------------------------------------------------------------


def test_defaults_are_three_retries_30_seconds_apart() -> None:
    assert [after(attempt=attempt) for attempt in (1, 2, 3)] == [TryAgain(NOW_MS + 30_000)] * 3
    assert after(attempt=4) == GiveUp("tried 4 times")


@pytest.mark.parametrize(
    ("backoff", "delays"),
    [
        (5, [5, 5, 5, 5]),
        ([1, 10.5, 60], [1, 10.5, 60, 60]),
        (Exponential(first_s=2, factor=3, cap_s=50, jitter=0), [2, 6, 18, 50]),
        (Exponential(first_s=0, jitter=0), [0, 0, 0, 0]),
    ],
    ids=["fixed", "list", "exponential", "at once"],
)
def test_delays(backoff: Any, delays: list[float]) -> None:
    policy = RetryPolicy(max_retries=4, backoff=backoff)
    assert [policy.delay_s(retry, 0.5) for retry in (1, 2, 3, 4)] == delays


@given(
    first_s=st.floats(0, 1000),
    factor=st.floats(1, 100),
    cap_s=st.floats(0, 86_400),
    jitter=st.floats(0, 1),
    draw=st.floats(0, 1),
    retry=st.integers(1, 1_000_000),
)
def test_exponential_delays_stay_within_their_bounds(
    first_s: float, factor: float, cap_s: float, jitter: float, draw: float, retry: int
) -> None:
    backoff = Exponential(first_s=first_s, factor=factor, cap_s=cap_s, jitter=jitter)
    delay = backoff.delay_s(retry, draw)
    assert 0 <= delay <= cap_s
    steady = Exponential(first_s=first_s, factor=factor, cap_s=cap_s, jitter=0)
    assert steady.delay_s(retry, draw) * (1 - jitter) <= delay * (1 + 1e-9) + 1e-9
    assert steady.delay_s(retry, draw) <= steady.delay_s(retry + 1, draw)


# --- decisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (DeadLetter("never"), ""),
        (UndecodableError("not JSON"), "such errors are not retried"),
        (UsageError("it returned a generator"), "such errors are not retried"),
    ],
)
def test_what_no_policy_retries(error: Exception, why: str) -> None:
    assert after(error) == GiveUp(why)


def test_without_a_policy_nothing_is_retried() -> None:
    assert after(policy=None) == GiveUp()
    assert after(Retry(after=5), policy=None) == GiveUp("no retry policy holds for it")


def test_fatal_exceptions() -> None:
    assert after(fatal=True) == GiveUp("such errors are not retried")


def test_a_handler_may_say_when_but_not_how_often() -> None:
    assert after(Retry(after=90)) == TryAgain(NOW_MS + 90_000)
    assert after(Retry(after=timedelta(minutes=2))) == TryAgain(NOW_MS + 120_000)
    assert after(Retry()) == TryAgain(NOW_MS + 30_000)
    assert after(Retry(after=0), attempt=4) == GiveUp("tried 4 times")


def test_a_budget_ends_retries() -> None:
    policy = RetryPolicy(max_retries=100, backoff=30, total_s=60)
    assert after(policy=policy, now_ms=NOW_MS + 30_000, attempt=2) == TryAgain(NOW_MS + 60_000)
    decision = after(policy=policy, now_ms=NOW_MS + 30_001, attempt=2)
    assert decision == GiveUp("tried 2 times, and the next one would be later than 60 s")


def test_no_retries() -> None:
    assert after(policy=RetryPolicy(max_retries=0)) == GiveUp()


# --- which policy ----------------------------------------------------------------------------------------------------

DEFAULT, TOPIC, FIRST, SECOND, EVENT = (RetryPolicy(number) for number in (1, 2, 3, 4, 5))


@pytest.mark.parametrize(
    ("name", "topic", "handlers", "expected"),
    [
        ("A", "t", ("m.First",), FIRST),
        ("A", "t", ("m.Second",), SECOND),
        ("A", "t", (), FIRST),
        ("A", "t", ("m.Third",), EVENT),
        ("B", "t", (), TOPIC),
        (None, "t", (), TOPIC),
        ("B", "u", (), DEFAULT),
    ],
)
def test_the_nearest_policy_holds(name: str | None, topic: str, handlers: tuple[str, ...], expected: Any) -> None:
    by_name = {"A": [("m.First", FIRST), ("m.Second", SECOND), ("", EVENT)], "B": []}
    policies = Policies(DEFAULT, {"t": TOPIC}, by_name)
    assert policies.of(name, topic, handlers) is expected


def test_whether_there_is_any() -> None:
    assert not Policies()
    assert not Policies(by_name={"A": []})
    assert Policies(DEFAULT)
    assert Policies(by_topic={"t": TOPIC})
    assert Policies(by_name={"A": [("", EVENT)]})


def test_retry_detail() -> None:
    own = RetryPolicy(2, 1, in_place=True)
    detail: Any = {
        "a": {"retry_interval": 5},
        "b": {"max_retries": 9},
        "c": {"retry_interval": 1, "max_retries": 0},
        "d": own,
    }
    assert detail_policies(detail, RetryPolicy(3, 30)) == {
        "a": RetryPolicy(3, 5),
        "b": RetryPolicy(9, 30),
        "c": RetryPolicy(0, 1),
        "d": own,
    }
    with pytest.raises(ConfigurationError, match=r"retry_detail\['a'\] has 'interval'"):
        detail_policies({"a": {"interval": 5}}, RetryPolicy())


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RetryPolicy(max_retries=-1), r"max_retries=-1\): 0 or more"),
        (lambda: RetryPolicy(max_retries=True), r"max_retries=True"),
        (lambda: RetryPolicy(backoff=-1), r"backoff\)=-1: 0 to 31622400 seconds"),
        (lambda: RetryPolicy(backoff=[]), "at least one delay"),
        (lambda: RetryPolicy(backoff=TEXT_IN_A_LIST), "backoff"),
        (lambda: RetryPolicy(backoff=TEXT), "backoff"),
        (lambda: RetryPolicy(total_s=float("nan")), "total_s"),
        (lambda: Exponential(first_s=-1), "first_s"),
        (lambda: Exponential(cap_s=1e12), "cap_s"),
        (lambda: Exponential(factor=0.5), r"factor=0\.5\): 1 to 100"),
        (lambda: Exponential(jitter=2), r"jitter=2\): 0 to 1"),
        (lambda: policy_of({"max_retries": 3}, "shop.Handler"), r"of shop\.Handler: a RetryPolicy or None"),
    ],
)
def test_values_that_are_not_allowed(make: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        make()


@pytest.mark.parametrize("seconds", [-1, float("inf"), float("nan"), "5", True])
def test_delays_that_a_handler_must_not_ask_for(seconds: Any) -> None:
    with pytest.raises(UsageError, match=r"^Retry\(after="):
        Retry(after=seconds)
