"""What becomes of failed records, and when there are too many: decided without a broker or a clock."""

from typing import Any, NamedTuple

import pytest

from keven_core._native.message import Record
from keven_core.kafka._failures import Failures, FloodBreaker, is_one_of
from keven_core.kafka.deadletter import attempt_of
from keven_core.kafka.errors import DeadLetterFloodError, UndecodableError
from keven_core.kafka.outcomes import DeadLetter, Retry, Skip
from keven_core.kafka.retry import Policies, RetryPolicy

NOW_MS = 1_700_000_000_000
DEAD, WAITING = "kafka_server.svc.dead", "kafka_server.svc.retry"


class ShopError(Exception):
    class Stock(Exception):
        pass


class OutOfStockError(ShopError):
    pass


class Copy(NamedTuple):
    topic: str
    record: Record
    headers: dict[str, bytes | None]
    timestamp_ms: int


class Copies:
    """Stands for a CopyPublisher."""

    def __init__(self) -> None:
        self.sent: list[Copy] = []

    def publish(self, topic: str, record: Record, headers: Any, timestamp_ms: int) -> None:
        self.sent.append(Copy(topic, record, dict(headers), timestamp_ms))


def failures_of(policies: Policies, **changes: Any) -> tuple[Failures, Any]:
    copies: Any = Copies()
    options: dict[str, Any] = {
        "group_id": "g",
        "dead_letter_topic": DEAD,
        "retry_topic": WAITING,
        "dialect": "spring",
        "now_ms": lambda: NOW_MS,
        "draw": lambda: 0.0,
        "breaker": FloodBreaker(0, 100),
        **changes,
    }
    breaker = options.pop("breaker")
    return Failures(copies, policies, breaker, **options), copies


def record_of(**changes: Any) -> Record:
    arguments: dict[str, Any] = {"value": b"{}", "key": b"k", "headers": [("trace", b"t")], "timestamp_ms": 5}
    return Record("orders", 3, 42, **{**arguments, **changes})


def decide(failures: Failures, error: Exception, record: Record | None = None, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"name": "ORDER", "attempt": None, "in_a_row": 1, "finished": 0}
    return failures.decide(record or record_of(), error, **{**arguments, **changes})


def test_without_a_policy_a_record_is_dead_lettered() -> None:
    failures, copies = failures_of(Policies())
    verdict = decide(failures, ShopError("no"))
    assert (verdict.outcome, verdict.story, verdict.flood) == ("dead", f"copied to {DEAD}", None)
    [copy] = copies.sent
    assert (copy.topic, copy.record.value, copy.timestamp_ms) == (DEAD, b"{}", 5)
    assert copy.headers["kafka_dlt-exception-message"] == b"no"


def test_with_one_it_is_tried_again_until_the_policy_ends() -> None:
    failures, copies = failures_of(Policies(RetryPolicy(2, [10, 20])))
    record, attempt, stories = record_of(), None, []
    for _ in range(3):
        verdict = decide(failures, ShopError("no"), record, attempt=attempt)
        stories.append((verdict.outcome, verdict.story))
        if verdict.outcome == "retried":
            copy = copies.sent[-1]
            assert (copy.topic, copy.timestamp_ms) == (WAITING, 0)
            waiting = Record(WAITING, 0, 1, value=b"{}", headers=copy.headers.items(), timestamp_ms=NOW_MS)
            attempt = attempt_of(waiting)
            assert attempt is not None
            record = attempt.record
    assert stories == [
        ("retried", "attempt 1 of 3, again in 10 s"),
        ("retried", "attempt 2 of 3, again in 20 s"),
        ("dead", f"copied to {DEAD} (tried 3 times)"),
    ]
    headers = copies.sent[-1].headers
    assert headers["kafka_dlt-original-topic"] == b"orders"
    assert headers["kafka_dlt-exception-message"] == b"no (tried 3 times)"
    assert not [name for name in headers if name.startswith(("kafka_original", "retry_topic", "keven"))]


def test_only_handlers_that_failed_are_named() -> None:
    failures, copies = failures_of(Policies(RetryPolicy()))
    error: Any = ShopError("no")
    error.failed_handlers = ("shop.B",)
    decide(failures, error)
    assert copies.sent[-1].headers["keven_retry-handlers"] == b"shop.B"
    attempt = attempt_of(Record(WAITING, 0, 1, value=b"{}", headers=copies.sent[-1].headers.items()))
    # Alone, it raises without being named: it is still the one.
    decide(failures, ShopError("again"), attempt=attempt)
    assert copies.sent[-1].headers["keven_retry-handlers"] == b"shop.B"


def test_the_budget_counts_from_the_first_failure() -> None:
    now = [NOW_MS]
    failures, copies = failures_of(Policies(RetryPolicy(99, 40, total_s=100)), now_ms=lambda: now[0])
    attempt, outcomes = None, []
    for _ in range(3):
        record = attempt.record if attempt is not None else None
        outcomes.append(decide(failures, ShopError("no"), record, attempt=attempt).outcome)
        attempt = attempt_of(Record(WAITING, 0, 1, value=b"{}", headers=copies.sent[-1].headers.items()))
        now[0] += 40_000
    assert outcomes == ["retried", "retried", "dead"]


def test_outcomes_decide() -> None:
    failures, copies = failures_of(Policies(RetryPolicy()))
    assert decide(failures, Skip("a duplicate")).outcome == "skipped"
    assert copies.sent == []
    assert decide(failures, DeadLetter("never")).outcome == "dead"
    assert decide(failures, Retry(after=7)).story == "attempt 1 of 4, again in 7 s"
    assert decide(failures, UndecodableError("what")).outcome == "dead"


@pytest.mark.parametrize(
    ("fatal", "retryable", "error", "outcome"),
    [
        (["ShopError"], [], ShopError(), "dead"),
        (["ShopError"], [], OutOfStockError(), "dead"),
        (["OutOfStockError"], [], ShopError(), "retried"),
        ([f"{__name__}.ShopError"], [], ShopError(), "dead"),
        (["other.ShopError"], [], ShopError(), "retried"),
        (["ShopError.Stock"], [], ShopError.Stock(), "dead"),
        ([], ["OutOfStockError"], OutOfStockError(), "retried"),
        ([], ["OutOfStockError"], ShopError(), "dead"),
        ([], ["OutOfStockError"], Retry(), "retried"),
        (["OutOfStockError"], ["ShopError"], OutOfStockError(), "dead"),
        (["LookupError"], [], KeyError(), "dead"),
    ],
)
def test_classes_of_exceptions(fatal: list[str], retryable: list[str], error: Exception, outcome: str) -> None:
    failures, _ = failures_of(Policies(RetryPolicy()), fatal=fatal, retryable=retryable)
    assert decide(failures, error).outcome == outcome


def test_names_of_classes() -> None:
    assert is_one_of(KeyError(), ["builtins.KeyError"])
    assert is_one_of(KeyError(), ["LookupError"])
    assert not is_one_of(KeyError(), [])
    assert not is_one_of(KeyError(), ["Key"])


# --- floods ----------------------------------------------------------------------------------------------------------


def test_so_many_in_a_row_are_a_flood() -> None:
    failures, _ = failures_of(Policies(), breaker=FloodBreaker(3, 100))
    assert [decide(failures, ShopError("no"), in_a_row=number).flood for number in (1, 2)] == [None, None]
    flood = decide(failures, ShopError("no"), in_a_row=3).flood
    assert isinstance(flood, DeadLetterFloodError)
    assert "3 records in a row were dead-lettered (KEVEN_DEAD_LETTERS_IN_A_ROW=3)" in str(flood)
    assert isinstance(flood.__cause__, ShopError)


def test_records_that_are_retried_or_skipped_make_no_flood() -> None:
    failures, _ = failures_of(Policies(RetryPolicy()), breaker=FloodBreaker(3, 100))
    assert decide(failures, ShopError("no"), in_a_row=99).flood is None
    assert decide(failures, Skip(), in_a_row=99).flood is None


def test_a_share_of_the_last_records_is_a_flood() -> None:
    breaker = FloodBreaker(0, 50, window=100)
    for number in range(49):
        assert breaker.dead(1, number) is None
    assert breaker.dead(1, 100) is None  # half is allowed
    for number in range(50):
        assert breaker.dead(1, 100 + number) is None  # too soon to tell
    reason = breaker.dead(1, 200)
    assert reason == "51 of the last 100 records were dead-lettered (KEVEN_DEAD_LETTERS_PERCENT=50)"
    assert breaker.dead(1, 1000) is None  # it counts anew


def test_every_limit_can_be_lifted() -> None:
    breaker = FloodBreaker(0, 100, window=10)
    for number in range(30):
        assert breaker.dead(number + 1, number) is None
