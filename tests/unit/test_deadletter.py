"""Copies of failed records: names and encodings of their headers, first origin, last reason, no growth; sending."""

from typing import Any

import pytest

from keven_core._native.message import Record
from keven_core.kafka._copies import CopyPublisher, refused, unanswered
from keven_core.kafka.deadletter import attempt_of, dead_letter_headers, due_ms_of, retry_headers
from keven_core.kafka.errors import DeadLetterError, UndecodableError


class ShopError(Exception):
    pass


def _record(**changes: Any) -> Record:
    arguments: dict[str, Any] = {
        "value": b"{}",
        "key": b"k",
        "headers": [("trace", b"t"), ("empty", b""), ("none", None), ("trace", b"u")],
        "timestamp_ms": 1_700_000_000_123,
        "timestamp_type": 1,
    }
    return Record("shop.orders", 3, 4_294_967_301, **{**arguments, **changes})


def _caused() -> Exception:
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise ShopError("outer") from inner
    except ShopError as error:
        return error


def test_names_order_and_encodings_to_the_byte() -> None:
    assert dead_letter_headers(_record(), _caused(), "shop-group") == [
        ("trace", b"t"),
        ("empty", b""),
        ("none", None),
        ("trace", b"u"),
        ("kafka_dlt-original-topic", b"shop.orders"),
        ("kafka_dlt-original-partition", b"\x00\x00\x00\x03"),
        ("kafka_dlt-original-offset", b"\x00\x00\x00\x01\x00\x00\x00\x05"),
        ("kafka_dlt-original-timestamp", b"\x00\x00\x01\x8b\xcf\xe5\x68\x7b"),
        ("kafka_dlt-original-timestamp-type", b"CreateTime"),
        ("kafka_dlt-original-consumer-group", b"shop-group"),
        ("kafka_dlt-exception-fqcn", f"{__name__}.ShopError".encode()),
        ("kafka_dlt-exception-message", b"outer"),
        ("kafka_dlt-exception-cause-fqcn", b"builtins.KeyError"),
    ]


@pytest.mark.parametrize(("kind", "name"), [(0, b"NoTimestampType"), (1, b"CreateTime"), (2, b"LogAppendTime")])
def test_timestamp_types(kind: int, name: bytes) -> None:
    headers = dict(dead_letter_headers(_record(timestamp_type=kind), ShopError(), "g"))
    assert headers["kafka_dlt-original-timestamp-type"] == name


def test_a_record_without_timestamp() -> None:
    headers = dict(dead_letter_headers(_record(timestamp_ms=-1, timestamp_type=0), ShopError(), "g"))
    assert headers["kafka_dlt-original-timestamp"] == b"\xff" * 8


def test_an_exception_without_cause_names_none() -> None:
    error = ShopError("x")
    error.__context__ = KeyError("only the context")
    assert "kafka_dlt-exception-cause-fqcn" not in dict(dead_letter_headers(_record(), error, "g"))


def test_the_text_is_one_short_line() -> None:
    headers = dict(dead_letter_headers(_record(), ShopError("a\nb\x1b[0m" + "x" * 5000), "g"))
    text = headers["kafka_dlt-exception-message"]
    assert text is not None
    assert text.startswith(b"a\\nb\\x1b[0mxxx")
    assert len(text) == 1000


def test_an_exception_whose_text_cant_be_had_does_not_stop_the_server() -> None:
    class BrokenError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    headers = dict(dead_letter_headers(_record(), BrokenError(), "g"))
    assert b"BrokenError" in (headers["kafka_dlt-exception-message"] or b"")


def test_text_that_is_no_utf8_is_escaped() -> None:
    headers = dict(dead_letter_headers(_record(), ShopError("\udcff"), "g"))
    assert headers["kafka_dlt-exception-message"] == b"\\udcff"


def test_the_first_origin_and_the_last_reason_are_kept_and_nothing_grows() -> None:
    record = _record()
    sizes = []
    for attempt in range(10):
        error: Exception = ShopError(f"attempt {attempt}") if attempt % 2 else UndecodableError(f"attempt {attempt}")
        headers = dead_letter_headers(record, error, f"group-{attempt}")
        names = [name for name, _ in headers]
        assert len([name for name in names if name.startswith("kafka_dlt-")]) == len(
            {name for name in names if name.startswith("kafka_dlt-")}
        )
        assert dict(headers)["kafka_dlt-original-topic"] == b"shop.orders"
        assert dict(headers)["kafka_dlt-original-offset"] == b"\x00\x00\x00\x01\x00\x00\x00\x05"
        assert dict(headers)["kafka_dlt-original-consumer-group"] == b"group-0"
        assert dict(headers)["kafka_dlt-exception-message"] == f"attempt {attempt}".encode()
        sizes.append(len(headers))
        # It comes back from the dead-letter topic and fails there again.
        record = Record(f"kafka_server.{attempt}.dead", 0, attempt, value=b"{}", headers=headers, timestamp_ms=5)
    assert len(set(sizes)) == 1


def test_a_cause_that_is_gone_leaves_no_trace() -> None:
    first = dead_letter_headers(_record(), _caused(), "g")
    second = dead_letter_headers(_record(headers=first), ShopError("second"), "g")
    assert "kafka_dlt-exception-cause-fqcn" in dict(first)
    assert "kafka_dlt-exception-cause-fqcn" not in dict(second)


def test_what_the_policy_decided_by_is_said_too() -> None:
    headers = dict(dead_letter_headers(_record(), ShopError("no stock"), "g", why="tried 4 times"))
    assert headers["kafka_dlt-exception-message"] == b"no stock (tried 4 times)"


# --- Kafka's own dialect ---------------------------------------------------------------------------------------------


def test_the_dialect_of_share_groups() -> None:
    first = dead_letter_headers(_record(headers=[("trace", b"t")]), ShopError("one"), "g", dialect="kafka")
    assert first == [
        ("trace", b"t"),
        ("__dlq.errors.topic", b"shop.orders"),
        ("__dlq.errors.partition", b"3"),
        ("__dlq.errors.offset", b"4294967301"),
        ("__dlq.errors.group", b"g"),
        ("__dlq.errors.delivery.count", b"1"),
        ("__dlq.errors.message", f"{__name__}.ShopError: one".encode()),
    ]
    again = Record("dead", 0, 9, value=b"{}", headers=first, attempt=4)
    second = dead_letter_headers(again, ShopError("two"), "h", dialect="kafka", why="tried 4 times")
    assert second[:5] == first[:5]  # the first origin
    assert second[5:] == [
        ("__dlq.errors.delivery.count", b"4"),
        ("__dlq.errors.message", f"{__name__}.ShopError: two (tried 4 times)".encode()),
    ]


def test_a_record_that_has_nothing_but_an_old_count_gets_one_count() -> None:
    record = _record(headers=[("__dlq.errors.delivery.count", b"1")])
    names = [name for name, _ in dead_letter_headers(record, ShopError("x"), "g", dialect="kafka")]
    assert names.count("__dlq.errors.delivery.count") == 1


# --- records that wait -----------------------------------------------------------------------------------------------


def _waiting(record: Record, error: Exception, handlers: tuple[str, ...] = ()) -> Record:
    """The record of the retry topic."""
    headers = retry_headers(
        record, error, due_ms=1_700_000_030_000, first_failure_ms=1_700_000_000_500, handlers=handlers
    )
    return Record(
        "kafka_server.svc.retry",
        0,
        77,
        value=record.value,
        key=record.key,
        headers=headers,
        timestamp_ms=1_700_000_000_600,
        timestamp_type=1,
    )


def test_a_waiting_record_to_the_byte() -> None:
    assert _waiting(_record(headers=[("trace", b"t")]), ShopError("x"), ("m.A", "m.B")).headers == [
        ("trace", b"t"),
        ("kafka_original-topic", b"shop.orders"),
        ("kafka_original-partition", b"\x00\x00\x00\x03"),
        ("kafka_original-offset", b"\x00\x00\x00\x01\x00\x00\x00\x05"),
        ("kafka_original-timestamp", b"\x00\x00\x01\x8b\xcf\xe5\x68\x7b"),
        ("kafka_original-timestamp-type", b"CreateTime"),
        ("kafka_exception-fqcn", f"{__name__}.ShopError".encode()),
        ("kafka_exception-message", b"x"),
        ("retry_topic-attempts", b"\x00\x00\x00\x02"),
        ("retry_topic-backoff-timestamp", b"\x01\x8b\xcf\xe5\xdd\x30"),
        ("keven_first-failure-timestamp", b"\x00\x00\x01\x8b\xcf\xe5\x69\xf4"),
        ("keven_retry-handlers", b"m.A,m.B"),
    ]


@pytest.mark.parametrize("handlers", [(), ("m.A",), ("m.A", "m.B")])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_handler_sees_the_record_as_it_was(handlers: tuple[str, ...], kind: int) -> None:
    record = _record(timestamp_type=kind, timestamp_ms=-1 if kind == 0 else 5)
    for number in range(2, 5):
        waiting = _waiting(record, _caused(), handlers)
        found = attempt_of(waiting)
        assert found is not None
        assert (due_ms_of(waiting), found.record.first_failure_ms) == (1_700_000_030_000, 1_700_000_000_500)
        assert found.handlers == handlers
        again = found.record
        assert again.attempt == number
        for name in ("topic", "partition", "offset", "timestamp_ms", "timestamp_type", "key", "value", "headers"):
            assert getattr(again, name) == getattr(_record(timestamp_type=kind, timestamp_ms=record.timestamp_ms), name)
        record = again
    # In the end its dead letter is that of the record where it first was.
    assert dead_letter_headers(record, ShopError("x"), "g") == dead_letter_headers(
        _record(timestamp_type=kind, timestamp_ms=record.timestamp_ms), ShopError("x"), "g"
    )


def test_a_tombstone_waits_too() -> None:
    found = attempt_of(_waiting(_record(value=None), ShopError("x")))
    assert found is not None
    assert found.record.value is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda headers: [],
        lambda headers: [entry for entry in headers if entry[0] != "kafka_original-topic"],
        lambda headers: [entry for entry in headers if entry[0] != "retry_topic-backoff-timestamp"],
        lambda headers: [(name, b"?" if name.endswith("-type") else value) for name, value in headers],
        lambda headers: [(name, b"\xff" if name.endswith("-topic") else value) for name, value in headers],
        lambda headers: [(name, b"" if name.endswith("-topic") else value) for name, value in headers],
        lambda headers: [(name, b"\0\0\0\0" if name.endswith("attempts") else value) for name, value in headers],
        lambda headers: [(name, b"\x7f" * 40 if name.endswith("attempts") else value) for name, value in headers],
        lambda headers: [(name, b"\x7f" * 40 if name.endswith("partition") else value) for name, value in headers],
    ],
)
def test_what_is_not_such_a_copy_is_told_apart(spoil: Any) -> None:
    good = _waiting(_record(), ShopError("x"))
    assert attempt_of(good) is not None
    assert attempt_of(Record("t", 0, 1, value=b"{}", headers=spoil(good.headers), timestamp_ms=5)) is None


def test_what_does_not_say_when_it_is_due_is_due_at_once() -> None:
    assert due_ms_of(Record("t", 0, 1, value=b"{}")) == 0
    assert due_ms_of(Record("t", 0, 1, headers=[("retry_topic-backoff-timestamp", None)])) == 0


# --- sending ---------------------------------------------------------------------------------------------------------


def test_nothing_is_made_before_the_first_failure() -> None:
    copies = CopyPublisher({}, print)
    assert copies.account is None
    assert copies.take() is None
    copies.serve()
    copies.close(0)


def test_a_copy_that_cant_be_queued_names_the_record() -> None:
    copies = CopyPublisher({"bootstrap.servers": "127.0.0.1:1", "message.max.bytes": "1000"}, None)
    try:
        with pytest.raises(DeadLetterError, match=r"^shop\.orders \[3\] @ 4294967301 can't be copied .* stays"):
            copies.publish("kafka_server.svc.dead", _record(value=b"x" * 2000), [], 0)
        copies.publish("kafka_server.svc.dead", _record(value=b"x"), [("a", b"b")], 5)
        account = copies.take()
        assert account is not None
        assert account.pending == 1
        assert copies.account is None
        assert refused(account) is None
        assert not copies.wait(account, 0.01)
    finally:
        copies.close(100)
    failure = refused(account)
    assert failure is not None
    assert failure.failed_count == 1
    assert failure.failures[0].value == b"x"
    assert "their offsets stay" in str(failure)
    assert unanswered(3).failed_count == 3
