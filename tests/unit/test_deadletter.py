"""Headers of dead letters: Spring's names and encodings, first origin, last reason, no growth."""

from typing import Any

import pytest

from keven_core._native.message import Record
from keven_core.kafka.deadletter import DeadLetterPublisher, dead_letter_headers
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


def test_nothing_is_pending_before_the_first_failure() -> None:
    publisher = DeadLetterPublisher("kafka_server.svc.dead", "g", {}, print)
    assert publisher.pending() == 0
    assert not publisher.unsettled()
    assert publisher.wait(0)
    assert publisher.failure() is None
    assert publisher.unanswered() is None
    publisher.serve()
    publisher.close(0)


def test_a_copy_that_cant_be_queued_names_the_record() -> None:
    publisher = DeadLetterPublisher(
        "kafka_server.svc.dead", "g", {"bootstrap.servers": "127.0.0.1:1", "message.max.bytes": "1000"}, None
    )
    try:
        with pytest.raises(DeadLetterError, match=r"^shop\.orders \[3\] @ 4294967301 can't be copied .* stays"):
            publisher.publish(_record(value=b"x" * 2000), ShopError("x"))
        assert publisher.pending() == 0
        publisher.publish(_record(value=b"x"), ShopError("x"))
        assert publisher.pending() == 1
        assert publisher.unsettled()
        unanswered = publisher.unanswered()
        assert unanswered is not None
        assert unanswered.failed_count == 1
    finally:
        publisher.close(100)
    failure = publisher.failure()
    assert failure is not None
    assert failure.failed_count == 1
    assert "their offsets stay" in str(failure)
    assert publisher.failure() is None
