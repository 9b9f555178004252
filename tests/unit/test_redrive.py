"""Redrive without a broker: what headers tell, what becomes of a letter, what a copy carries, reports, arguments."""

import json
import math
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies

from keven_core._native.library import error_descriptions
from keven_core._native.message import Record
from keven_core.kafka._redrive_cli import main
from keven_core.kafka._redriving import _PASSING, Pace
from keven_core.kafka.deadletter import dead_letter_headers, retry_headers
from keven_core.kafka.errors import ConfigurationError
from keven_core.kafka.redrive import REDRIVE_COUNT, Decision, Letter, Redrive, RedriveReport, decide

DEAD = "kafka_server.shop.dead"
ORDERS = "shop.orders"
TOPICS = {ORDERS: 4, "other": 1, "parking": 1, DEAD: 1}
OWN = (("traceparent", b"00-1"), ("unit", None), ("unit", b"mm"))
PLAN = Redrive(DEAD)


class OrderError(Exception):
    pass


def letter(*, own: Any = OWN, error: Exception | None = None, **changes: Any) -> Letter:
    """A letter as our own servers write it."""
    arguments: dict[str, Any] = {"value": b'{"event_name":"ORDER_PLACED"}', "key": b"k", "timestamp_ms": 5_000}
    arguments.update({name: changes.pop(name) for name in ("value", "key", "timestamp_ms") if name in changes})
    record = Record(ORDERS, 3, 77, headers=list(own), timestamp_type=1, **arguments)
    headers = dead_letter_headers(record, error or OrderError("no such order"), "shop")
    return Letter(0, 9, record.value, record.key, tuple(headers), **{"written_ms": 9_000, **changes})


SPRING_RETRIED = (
    ("kafka_original-topic", b"shop.orders"),
    ("kafka_original-partition", b"\x00\x00\x00\x02"),
    ("kafka_original-timestamp", b"\x01\x8b\xcf\xe5\x68\x7b"),  # as few bytes as it takes
    ("kafka_exception-fqcn", b"org.shop.Listener$FailedException"),
    ("kafka_exception-cause-fqcn", b"org.shop.StockException"),
    ("kafka_exception-message", b"out of stock"),
    ("kafka_exception-stacktrace", b"..."),
    ("kafka_dlt-original-consumer-group", b"shop"),
    ("kafka_deliveryAttempt", b"\x00\x00\x00\x03"),
    ("retry_topic-attempts", b"\x00\x00\x00\x03"),
)

SHARE_GROUP = (
    ("__dlq.errors.topic", b"shop.orders"),
    ("__dlq.errors.partition", b"2"),
    ("__dlq.errors.offset", b"77"),
    ("__dlq.errors.group", b"shop"),
    ("__dlq.errors.delivery.count", b"5"),
    ("__dlq.errors.message", b"delivery limit reached"),
)


# --- what headers tell -----------------------------------------------------------------------------------------------


def test_our_own_letters_are_understood() -> None:
    found = letter()
    assert (found.origin_topic, found.origin_partition, found.timestamp_ms) == (ORDERS, 3, 5_000)
    assert (found.exception, found.cause, found.text) == (f"{__name__}.OrderError", None, "no such order")
    assert (found.redrive_count, found.event_name) == (0, "ORDER_PLACED")


def test_letters_of_spring_retry_topics_are_understood() -> None:
    found = Letter(0, 0, headers=SPRING_RETRIED)
    assert (found.origin_topic, found.origin_partition, found.timestamp_ms) == (ORDERS, 2, 1_700_000_000_123)
    assert (found.exception, found.cause) == ("org.shop.Listener$FailedException", "org.shop.StockException")
    assert found.text == "out of stock"


def test_letters_of_share_groups_are_understood() -> None:
    found = Letter(0, 0, headers=SHARE_GROUP, written_ms=9_000)
    assert (found.origin_topic, found.origin_partition, found.timestamp_ms) == (ORDERS, 2, 9_000)
    assert (found.exception, found.cause, found.text) == (None, None, "delivery limit reached")


def test_our_own_letters_in_that_dialect_name_their_exception_too() -> None:
    record = Record(ORDERS, 3, 77, value=b"x", headers=list(OWN), timestamp_ms=5_000)
    headers = dead_letter_headers(record, OrderError("no: such"), "shop", dialect="kafka", why="tried 3 times")
    found = Letter(0, 9, b"x", headers=tuple(headers), written_ms=5_000)
    assert (found.origin_topic, found.origin_partition, found.timestamp_ms) == (ORDERS, 3, 5_000)
    assert found.exception == f"{__name__}.OrderError"
    assert found.text.endswith("no: such (tried 3 times)")
    assert decide(found, Redrive(DEAD, exceptions="OrderError"), TOPICS).outcome == "redriven"
    assert copied(found).headers == (*OWN, (REDRIVE_COUNT, b"1"))


def test_marks_of_our_retry_topics_go_with_the_origin() -> None:
    record = Record(ORDERS, 3, 77, value=b"x", headers=list(OWN), timestamp_ms=5_000, timestamp_type=1)
    headers = retry_headers(record, OrderError("x"), due_ms=9, first_failure_ms=8, handlers=("Ship",))
    assert copied(Letter(0, 9, b"x", headers=tuple(headers))).headers == (*OWN, (REDRIVE_COUNT, b"1"))


@pytest.mark.parametrize(
    "topic", [b"", b"a b", b"..", b"\xff", b"x" * 250, b"__consumer_offsets", b"__transaction_state", None]
)
def test_what_can_be_no_origin_is_none(topic: bytes | None) -> None:
    assert Letter(0, 0, headers=(("kafka_dlt-original-topic", topic),)).origin_topic is None


@pytest.mark.parametrize("value", [b"", b"\xff\xff\xff\xff", b"x" * 9, None])
def test_what_can_be_no_partition_or_time_is_not_known(value: bytes | None) -> None:
    headers = (("kafka_dlt-original-partition", value), ("kafka_dlt-original-timestamp", value))
    assert Letter(0, 0, headers=headers).origin_partition is None
    assert Letter(0, 0, headers=headers, written_ms=9).timestamp_ms == 9


@pytest.mark.parametrize("value", [b"", b"-1", b"1.5", b"x", b"9" * 5000, "²".encode(), None])
def test_a_count_that_is_none_is_zero(value: bytes | None) -> None:
    assert Letter(0, 0, headers=((REDRIVE_COUNT, value),)).redrive_count == 0


DEEP = b'{"a":' + b"[" * 100_000


@pytest.mark.parametrize(
    ("value", "headers", "name"),
    [
        (b'{"event_name":"A","x":1}', (), "A"),
        (b'{"event_name":"A","x":', (), "A"),  # what follows can't be decoded
        (b'{"event_name":"A"}', (("event_name", b"B"),), "A"),
        (msgspec.msgpack.encode({"event_name": "A"}), (), "A"),
        (b'{"x":1,"event_name":"A"}', (), "A"),
        (msgspec.msgpack.encode({"x": 1, "event_name": "A"}), (), "A"),
        (b'{"x":1}', (("event_name", b"B"),), "B"),
        (None, (("event_name", b"B"),), "B"),
        (b'{"x":1}', (), None),
        (b'{"event_name":7}', (), None),
        (b"not json", (), None),
        (b"", (), None),
        (None, (), None),
        (DEEP + b',"event_name":"A"}', (), None),
        (b"\x81\xa1a" + b"\x91" * 100_000, (), None),
    ],
)
def test_the_event_is_told_as_consumers_tell_it(value: bytes | None, headers: Any, name: str | None) -> None:
    assert Letter(0, 0, value, headers=headers).event_name == name


# --- where it goes and what it carries -------------------------------------------------------------------------------


def copied(found: Letter, plan: Redrive = PLAN) -> Any:
    decision = decide(found, plan, TOPICS)
    assert decision.outcome == "redriven", decision
    return decision.copy


def test_back_to_its_origin_it_starts_afresh() -> None:
    copy = copied(letter())
    assert (copy.topic, copy.partition) == (ORDERS, 3)
    assert copy.headers == (*OWN, (REDRIVE_COUNT, b"1"))


@pytest.mark.parametrize("headers", [SPRING_RETRIED, SHARE_GROUP])
def test_so_do_letters_of_others(headers: Any) -> None:
    copy = copied(Letter(0, 0, headers=OWN[:1] + headers + OWN[1:]))
    assert (copy.topic, copy.partition) == (ORDERS, 2)
    assert copy.headers == (*OWN, (REDRIVE_COUNT, b"1"))


def test_in_another_topic_the_origin_stays() -> None:
    copy = copied(letter(), Redrive(DEAD, to_topic="other"))
    names = [name for name, _ in copy.headers]
    assert (copy.topic, copy.partition) == ("other", -1)
    assert "kafka_dlt-original-topic" in names
    assert not any(name.startswith("kafka_dlt-exception-") for name in names)
    assert copy.headers[:3] == OWN


def test_the_origin_may_be_named_as_the_target() -> None:
    assert copied(letter(), Redrive(DEAD, to_topic=ORDERS)) == copied(letter())


def test_a_partition_that_has_gone_is_the_producers_choice() -> None:
    decision = decide(letter(), PLAN, {ORDERS: 3})
    assert decision.copy is not None
    assert decision.copy.partition == -1


def test_a_letter_without_origin_goes_where_it_is_told_or_nowhere() -> None:
    stray = Letter(0, 0, b"x", headers=OWN)
    assert decide(stray, PLAN, TOPICS) == Decision("left", "no origin")
    assert copied(stray, Redrive(DEAD, to_topic="other")).topic == "other"


def test_a_letter_whose_origin_has_gone_is_left() -> None:
    assert decide(letter(), PLAN, {}) == Decision("left", "no topic shop.orders")


def test_a_letter_that_came_from_this_very_topic_is_left() -> None:
    here = Letter(0, 0, headers=(("kafka_dlt-original-topic", DEAD.encode()),))
    assert decide(here, PLAN, TOPICS) == Decision("left", "its origin is this topic")


# --- the loop guard --------------------------------------------------------------------------------------------------


def redriven(count: int) -> Letter:
    return letter(own=(*OWN, (REDRIVE_COUNT, b"%d" % count)))


def test_the_count_goes_up_and_stands_there_once() -> None:
    headers = copied(redriven(1)).headers
    assert headers == (*OWN, (REDRIVE_COUNT, b"2"))


def test_it_is_kept_when_the_record_fails_again() -> None:
    again = letter(own=copied(letter()).headers, error=ValueError("still"))
    assert again.redrive_count == 1
    assert copied(again).headers == (*OWN, (REDRIVE_COUNT, b"2"))


def test_the_third_time_is_the_last() -> None:
    assert decide(redriven(2), PLAN, TOPICS).outcome == "redriven"
    assert decide(redriven(3), PLAN, TOPICS) == Decision("left", "redriven 3 times or more")


def test_then_it_is_parked_as_it_is() -> None:
    hopeless = redriven(3)
    decision = decide(hopeless, Redrive(DEAD, parking_topic="parking"), TOPICS)
    assert decision.outcome == "parked"
    assert decision.copy is not None
    assert (decision.copy.topic, decision.copy.partition) == ("parking", -1)
    assert decision.copy.headers == hopeless.headers
    # From there it can be redriven, if one insists.
    assert copied(hopeless, Redrive("parking", max_redrives=9)).topic == ORDERS


def test_with_no_redrives_allowed_all_are_parked() -> None:
    assert decide(letter(), Redrive(DEAD, max_redrives=0, parking_topic="parking"), TOPICS).outcome == "parked"


def test_a_filter_comes_before_the_guard() -> None:
    plan = Redrive(DEAD, event_names="OTHER", parking_topic="parking")
    assert decide(redriven(3), plan, TOPICS) == Decision("skipped", "event")


# --- filters ---------------------------------------------------------------------------------------------------------


class Names(str, Enum):
    ORDER_PLACED = "ORDER_PLACED"


def at(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, timezone.utc)


CAUSED = OrderError("outer")
CAUSED.__cause__ = KeyError("inner")


@pytest.mark.parametrize(
    ("filters", "skipping"),
    [
        ({}, None),
        ({"event_names": "ORDER_PLACED"}, None),
        ({"event_names": [Names.ORDER_PLACED, "OTHER"]}, None),
        ({"event_names": ["ORDER"]}, "event"),
        ({"origin_topics": [ORDERS]}, None),
        ({"origin_topics": "other"}, "origin"),
        ({"exceptions": "OrderError"}, None),
        ({"exceptions": [f"{__name__}.OrderError"]}, None),
        ({"exceptions": ["KeyError"]}, None),  # the cause
        ({"exceptions": ["builtins.KeyError", "X"]}, None),
        ({"exceptions": ["Error"]}, "exception"),
        ({"text": "oute"}, None),
        ({"text": "inner"}, "text"),
        ({"keys": "k"}, None),
        ({"keys": [b"k", b"l"]}, None),
        ({"keys": ["l"]}, "key"),
        ({"since": at(5_000)}, None),
        ({"since": at(5_001)}, "time"),
        ({"until": at(5_001)}, None),
        ({"until": at(5_000)}, "time"),
        ({"exceptions": "OrderError", "text": "outer", "keys": "k", "event_names": "OTHER"}, "event"),
    ],
)
def test_filters(filters: dict[str, Any], skipping: str | None) -> None:
    decision = decide(letter(error=CAUSED), Redrive(DEAD, **filters), TOPICS)
    assert decision == Decision("skipped", skipping) if skipping else decision.outcome == "redriven"


@pytest.mark.parametrize("name", ["FailedException", "StockException", "org.shop.StockException"])
def test_java_classes_have_short_names_too(name: str) -> None:
    found = Letter(0, 0, headers=SPRING_RETRIED)
    assert decide(found, Redrive(DEAD, exceptions=name), TOPICS).outcome == "redriven"


def test_a_letter_that_does_not_tell_matches_no_filter() -> None:
    bare = Letter(0, 0)
    for filters in ({"event_names": "A"}, {"exceptions": "E"}, {"text": "t"}, {"keys": ""}, {"since": at(0)}):
        assert decide(bare, Redrive(DEAD, to_topic="other", **filters), TOPICS).outcome == "skipped"


def test_times_without_a_zone_are_local() -> None:
    naive = datetime.fromtimestamp(5)
    assert decide(letter(), Redrive(DEAD, since=naive, until=naive + timedelta(milliseconds=1)), TOPICS).copy


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"to_topic": DEAD}, "to_topic='kafka_server.shop.dead' is the topic that is read"),
        ({"parking_topic": DEAD}, "parking_topic=.* is the topic that is read"),
        ({"to_topic": "a b"}, "is not a topic name"),
        ({"origin_topics": ["a b"]}, "is not a topic name"),
        ({"max_redrives": -1}, "max_redrives=-1 is not allowed: a whole number, 0 or more"),
        ({"max_redrives": True}, "max_redrives=True"),
        ({"rate": 0}, "rate=0 is not allowed: copies a second, more than 0; None: no limit"),
        ({"rate": math.nan}, "rate=nan"),
        ({"rate": math.inf}, "rate=inf"),
        ({"rate": "5"}, "rate='5'"),
        ({"since": "yesterday"}, "since='yesterday' is not allowed: a datetime"),
        ({"since": at(5), "until": at(5)}, "since=.* is not before until=.*: no letter could match"),
        ({"text": b"x"}, "text=b'x' is not allowed"),
        ({"exceptions": ValueError}, "exceptions=<class 'ValueError'> is not allowed: str, or a list of them"),
        ({"exceptions": [ValueError]}, "exceptions=.* is not allowed"),
        ({"event_names": 5}, "event_names=5 is not allowed: str or Enum, or a list of them"),
        ({"keys": [5]}, r"keys=\[5\] is not allowed: str or bytes, or a list of them"),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_allowed(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Redrive(DEAD, **arguments)


def test_the_topic_is_checked() -> None:
    with pytest.raises(ConfigurationError, match="is not a topic name"):
        Redrive("a b")


def test_each_dead_letter_topic_has_a_group_of_its_own() -> None:
    assert Redrive(DEAD).group_id == f"keven-redrive.{DEAD}"
    assert Redrive(DEAD, group_id="mine").group_id == "mine"


# --- any headers at all ----------------------------------------------------------------------------------------------

NAMES = strategies.sampled_from(
    [name for name, _ in (*SPRING_RETRIED, *SHARE_GROUP, *letter().headers)] + [REDRIVE_COUNT, "event_name", "x"]
)
VALUES = strategies.one_of(
    strategies.none(), strategies.binary(max_size=10), strategies.sampled_from([b"shop.orders", b"3", b"parking"])
)


@given(
    strategies.lists(strategies.tuples(NAMES, VALUES)),
    strategies.one_of(strategies.none(), strategies.binary(max_size=40)),
)
def test_whatever_a_letter_holds_it_is_decided_on_and_its_own_headers_stay(headers: Any, value: Any) -> None:
    found = Letter(0, 0, value, headers=tuple(headers))
    plan = Redrive(DEAD, max_redrives=2, event_names="A", parking_topic="parking")
    report = RedriveReport(DEAD, "g")
    for asked in (PLAN, plan):
        decision = decide(found, asked, TOPICS)
        report.count(found, decision.outcome, decision.why)
        if decision.copy is None:
            continue
        assert decision.copy.topic in TOPICS
        assert -1 <= decision.copy.partition < TOPICS[decision.copy.topic]
        if decision.outcome == "redriven":
            assert decision.copy.headers[-1] == (REDRIVE_COUNT, b"%d" % (found.redrive_count + 1))
            own = [pair for pair in headers if pair[0] in ("traceparent", "unit", "x", "event_name")]
            assert list(decision.copy.headers[:-1]) == own
    assert report.read == 2
    json.dumps(report.as_dict())


# --- the rate --------------------------------------------------------------------------------------------------------


def test_copies_are_spread_evenly() -> None:
    pace, now, waits = Pace(4), 100.0, []
    for _ in range(4):
        waits.append(pace.delay_s(now))
        now += waits[-1]
    assert waits == [0, 0.25, 0.25, 0.25]


def test_a_pause_is_not_made_up_for() -> None:
    pace = Pace(4)
    assert pace.delay_s(100.0) == 0
    assert pace.delay_s(200.0) == 0
    assert pace.delay_s(200.0) == 0.25


def test_without_a_rate_nothing_waits() -> None:
    pace = Pace(None)
    assert [pace.delay_s(0.0) for _ in range(3)] == [0, 0, 0]


def test_the_errors_that_pass_are_named_as_librdkafka_names_them() -> None:
    assert {name for _, name, _ in error_descriptions()} >= _PASSING


# --- the report ------------------------------------------------------------------------------------------------------


def reported() -> RedriveReport:
    report = RedriveReport(DEAD, "g", complete=True)
    report.count(letter(), "redriven")
    report.count(letter(), "redriven")
    report.count(letter(error=KeyError("x")), "parked")
    report.count(Letter(0, 0), "left", "no origin")
    report.count(letter(), "skipped", "event")
    report.count(letter(), "failed")
    return report


def test_the_report_reads_as_a_table() -> None:
    assert str(reported()).splitlines() == [
        "kafka_server.shop.dead, group g",
        "6 read, 5 matched: 2 redriven, 1 parked, 1 left, 1 failed",
        "1 skipped by the filter event",
        "1 left: no origin",
        "origin topic  exception                redriven  parked  left  failed  skipped",
        "?             ?                               0       0     1       0        0",
        "shop.orders   builtins.KeyError               0       1     0       0        0",
        "shop.orders   test_redrive.OrderError         2       0     0       1        1",
    ]


def test_the_report_as_json() -> None:
    found = json.loads(json.dumps(reported().as_dict()))
    rows = found.pop("by_origin")
    assert rows[1] == {
        "origin_topic": ORDERS,
        "exception": "builtins.KeyError",
        **{"redriven": 0, "parked": 1, "left": 0, "failed": 0, "skipped": 0},
    }
    assert found == {
        "dead_letter_topic": DEAD,
        "group_id": "g",
        "dry_run": False,
        "complete": True,
        **{"read": 6, "matched": 5, "redriven": 2, "parked": 1, "failed": 1},
        **{"skipped": {"event": 1}, "left": {"no origin": 1}},
    }


def test_what_a_letter_names_cant_pose_as_lines_of_the_report() -> None:
    report = RedriveReport(DEAD, "g", complete=True)
    headers = (("kafka_dlt-exception-fqcn", b"E\n0 failed\x1b[2J" + b"x" * 500), ("kafka_dlt-original-topic", b"a\nb"))
    report.count(Letter(0, 0, headers=headers), "redriven")
    assert len(str(report).splitlines()) == 4
    assert "\x1b" not in str(report)
    assert max(map(len, str(report).splitlines())) < 200


def test_a_report_says_what_it_is_not() -> None:
    assert "dry run, nothing was written" in str(RedriveReport(DEAD, "g", dry_run=True, complete=True))
    assert "did not come to the end" in str(RedriveReport(DEAD, "g"))
    assert "from_beginning, or another group, reads all again" in str(RedriveReport(DEAD, "g", complete=True))


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "dead_letter_topic"),
        ([DEAD, "--since", "yesterday"], "'yesterday' is not a time: 2026-01-31T12:00:00+00:00"),
        ([DEAD, "--rate", "fast"], "--rate"),
    ],
)
def test_the_command_line_refuses_what_it_does_not_know(arguments: list[str], words: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
