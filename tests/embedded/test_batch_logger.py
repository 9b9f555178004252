"""KafkaBatchLogger: what log() takes, one order for all messages, bounds, outcomes, processes that end."""

import asyncio
import contextlib
import dataclasses
import datetime
import gc
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from embedded_support import logged, logging_process, numbered, quick, read, topics, values, wait_until

from keven_core._native.library import live_objects
from keven_core._native.logger import NativeLogger
from keven_core.kafka import _producers, errors
from keven_core.kafka.errors import (
    ClosedError,
    ConfigurationError,
    Delivery,
    DeliveryError,
    KafkaTimeoutError,
    MessageTooLargeError,
    QueueFullError,
    UsageError,
)
from keven_core.kafka.events.event import Event
from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger

MSG_SIZE_TOO_LARGE = 10


@pytest.fixture
def make(embedded_kafka: Any, topic: str) -> Callable[..., KafkaBatchLogger]:
    """Loggers without a producer id, which costs the embedded broker half a second."""

    def make_logger(timeout: float = 10, *, on_full: Any = "block", on_delivery: Any = None, **changes: Any) -> Any:
        settings = quick(embedded_kafka, idempotence=False, **changes)
        return KafkaBatchLogger(
            topic=topic, timeout=timeout, settings=settings, on_full=on_full, on_delivery=on_delivery
        )

    return make_logger


def connected(log: KafkaBatchLogger) -> None:
    log.log(b"connected")
    log.flush()


def fresh(size: int) -> bytes:
    """Bytes that nothing else refers to."""
    return bytes(bytearray(b"v" * size))


# --- what log() takes ------------------------------------------------------------------------------------------------


def test_log_is_the_compiled_one() -> None:
    assert KafkaBatchLogger.log is NativeLogger.log
    assert KafkaBatchLogger.submit is NativeLogger.submit


def test_the_topic_may_be_changed(embedded_kafka: Any, make: Callable[..., KafkaBatchLogger]) -> None:
    embedded_kafka.create_topic("other")
    log = make()
    log.log(b"1")
    log.topic = "other"
    assert log.topic == "other"
    log.log(b"2")
    for bad in ("not a topic", "", "^pattern", "..", "x" * 250, 5):
        with pytest.raises(ConfigurationError):
            log.topic = bad  # type: ignore[assignment]
    log.log(b"3")
    log.topic = None
    with pytest.raises(UsageError, match="no topic"):
        log.log(b"4")
    log.log(b"5", topic="t")
    log.topic = "t"
    log.log(b"6")
    assert log.flush() == 5
    assert values(embedded_kafka, "t") == [b"1", b"5", b"6"]
    assert values(embedded_kafka, "other") == [b"2", b"3"]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"data": object()}, UsageError, "a message has to be"),
    ({"data": None}, UsageError, "tombstone"),
    ({"data": "\ud800"}, UsageError, "a message has to be valid Unicode"),
    ({"topic": ""}, ConfigurationError, "not a topic name"),
    ({"topic": "a/b"}, ConfigurationError, "not a topic name"),
    ({"topic": "^a"}, ConfigurationError, "not a topic name"),
    ({"topic": "x" * 250}, ConfigurationError, "not a topic name"),
    ({"topic": 5}, ConfigurationError, "has to be a str"),
    ({"topic": ["t"]}, ConfigurationError, "has to be a str"),
    ({"key": 5}, UsageError, "a key has to be"),
    ({"key": bytearray(b"k")}, UsageError, "a key has to be"),
    ({"key": "\ud800"}, UsageError, "a key has to be valid Unicode"),
    ({"headers": 5}, UsageError, "headers have to be"),
    ({"headers": "ab"}, UsageError, "a header has to be"),
    ({"headers": [("a", "text")]}, UsageError, "a header has to be"),
    ({"headers": [("good", b"1"), ("a",)]}, UsageError, "a header has to be"),
    ({"headers": {b"a": b"1"}}, UsageError, "a header has to be"),
    ({"headers": {"a": 5}}, UsageError, "a header has to be"),
    ({"headers": [("\ud800", b"1")]}, UsageError, "valid Unicode"),
    ({"timestamp_ms": 0}, UsageError, "timestamp_ms"),
    ({"timestamp_ms": -1}, UsageError, "timestamp_ms"),
    ({"timestamp_ms": 1.5}, UsageError, "timestamp_ms"),
    ({"timestamp_ms": True}, UsageError, "timestamp_ms"),
    ({"timestamp_ms": 1 << 64}, UsageError, "timestamp_ms"),
    ({"data": b"x" * 3000}, MessageTooLargeError, "KEVEN_MAX_MESSAGE_BYTES"),
    ({"data": b"x" * 1999, "key": "kk"}, MessageTooLargeError, "KEVEN_MAX_MESSAGE_BYTES"),
]


def test_what_can_not_be_sent_raises_and_touches_nothing_else(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    log = make(max_message_bytes=2000)
    log.log(b"before")
    released = memoryview(b"abc")
    released.release()
    for given, kind, message in [*BAD, ({"data": released}, UsageError, "can't be read")]:
        counted = log.produced_count
        with pytest.raises(kind, match=message) as caught:
            log.log(**{"data": b"bad", **given})
        assert type(caught.value) is kind, given
        assert log.produced_count == counted
    log.log(b"after")
    assert log.flush() == 2
    assert values(embedded_kafka, topic) == [b"before", b"after"]


def test_a_key_a_timestamp_and_each_kind_of_headers_arrive(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    log = make()
    log.log(b"1", key="ä", headers={"ä": b"1", "none": None, "empty": b""}, timestamp_ms=1)
    log.log(b"2", key=b"", headers=[("same", b"1"), ("same", b"2")])
    log.log(b"3", headers=(pair for pair in [("generated", b"1")]))
    log.log(b"4", headers=[])
    log.log(b"5", headers={})
    log.log(b"6", timestamp_ms=1_700_000_000_000)
    log.flush()
    found = read(embedded_kafka, topic)
    assert [(entry.key, entry.headers) for entry in found] == [
        ("ä".encode(), [("ä", b"1"), ("none", None), ("empty", b"")]),
        (b"", [("same", b"1"), ("same", b"2")]),
        (None, [("generated", b"1")]),
        (None, []),
        (None, []),
        (None, []),
    ]
    assert [entry.timestamp for entry in (found[0], found[5])] == [(1, 1), (1, 1_700_000_000_000)]


def test_text_and_subclasses(embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]) -> None:
    class Text(str): ...

    class Data(bytes): ...

    class Array(bytearray): ...

    log = make()
    wanted = ["", "ascii", "ä", "\u20ac", "\U0001f600", "nul \0 inside", "ä" * 1000]
    for text in wanted:
        log.log(text)
    log.log(Text("text"), key=Text("key"))
    log.log(Data(b"data"), key=Data(b"key"))
    log.log(Array(b"array"))
    log.flush()
    found = read(embedded_kafka, topic)
    assert [entry.value for entry in found[:7]] == [text.encode() for text in wanted]
    assert [(entry.value, entry.key) for entry in found[7:]] == [(b"text", b"key"), (b"data", b"key"), (b"array", None)]


def test_buffers_may_change_once_log_has_returned(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    import array

    log = make()
    connected(log)
    embedded_kafka.set_latency(200)
    buffer = bytearray(b"0123456789")
    numbers = array.array("B", b"array")
    log.log(buffer)
    log.log(memoryview(buffer)[2:5])
    log.log(memoryview(buffer)[::2])  # not contiguous
    log.log(memoryview(numbers))
    buffer[:] = b"changed it"
    numbers[0] = 0
    buffer.clear()  # would raise while a view of it is held
    log.flush()
    embedded_kafka.set_latency(0)
    assert values(embedded_kafka, topic) == [b"connected", b"0123456789", b"234", b"02468", b"array"]


def test_immutable_ones_are_not_copied(embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]) -> None:
    log = make()
    connected(log)
    data, text = fresh(1000), "t" * 1000 + str(time.time())
    counts = [sys.getrefcount(entry) for entry in (data, text)]
    embedded_kafka.set_latency(200)
    log.log(data)
    log.log(memoryview(data)[10:20])
    log.log(text)
    assert [sys.getrefcount(entry) for entry in (data, text)] == [counts[0] + 2, counts[1] + 1]
    log.flush()
    embedded_kafka.set_latency(0)
    assert [sys.getrefcount(entry) for entry in (data, text)] == counts
    assert values(embedded_kafka, topic) == [b"connected", data, data[10:20], text.encode()]


@pytest.mark.logs_errors
def test_a_large_object_is_logged_many_times_without_growing() -> None:
    # 100 times 64 MB are under way: 6.4 GB, if anything were copied.
    log = KafkaBatchLogger(topic="t", settings=_unreachable(log_queue_bytes=1 << 40))
    data = bytes(64 << 20)
    text = "x" * (64 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(50):
        log.log(data)
        log.log(text)
    assert log.pending_count == 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 << 10  # KiB
    shared = log._made[os.getpid()][0]
    assert shared.close(100) == 100
    with pytest.raises(DeliveryError, match="100 messages"):
        log.flush()
    gc.collect()
    assert live_objects()["deliveries"] == 0


def _unreachable(**changes: Any) -> Any:
    from keven_core.kafka.config import Settings

    return Settings(
        kafka_address="127.0.0.1:1", create_topics=False, idempotence=False, max_message_bytes=100 << 20, **changes
    )


def test_a_destructor_may_log(embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]) -> None:
    log = make()
    deleted: list[int] = []

    class Data(bytes):
        def __del__(self) -> None:
            deleted.append(1)
            if len(deleted) <= 200:
                log.log(b"from a destructor")

    for number in range(200):
        log.log(Data(b"%d" % number))
    wait_until(lambda: log.flush() == 400, "what destructors have logged")
    assert len(deleted) == 200
    found = values(embedded_kafka, topic)
    assert [value for value in found if value != b"from a destructor"] == numbered(200)
    assert len(found) == 400


@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_events(
    embedded_kafka: Any, handler_registry: Any, topic: str, make: Callable[..., KafkaBatchLogger], codec: str
) -> None:
    class Typed(Event):
        event_name = "TYPED"
        key_field = "number"
        number: int
        tags: list[str] = []

    class Own(Event):
        event_name = "OWN"

        def serialize(self, codec: str = "json") -> bytes:
            return b"own " + codec.encode()

    topics(embedded_kafka, "keven_events_typed")
    log = make(codec=codec)
    typed = Typed(number=5, tags=["ä"])
    log.log(typed)
    log.log(typed, key="given")
    log.log(Own())
    log.log(typed, topic="keven_events_typed")
    log.log({"event_name": "DICT", "n": 1})
    log.flush()
    found = read(embedded_kafka, topic)
    encode = msgspec.msgpack.encode if codec == "msgpack" else msgspec.json.encode
    assert [(entry.value, entry.key) for entry in found] == [
        (typed.serialize(codec), b"5"),
        (typed.serialize(codec), b"given"),
        (b"own " + codec.encode(), None),
        (encode({"event_name": "DICT", "n": 1}), None),
    ]
    [other] = read(embedded_kafka, "keven_events_typed")
    assert (other.value, other.key) == (typed.serialize(codec), b"5")


def test_what_encoding_calls_may_log(embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]) -> None:
    log = make()

    class Zone(datetime.tzinfo):
        def utcoffset(self, when: datetime.datetime | None) -> datetime.timedelta:
            log.log({"inner": "x" * 100})
            return datetime.timedelta(0)

    @dataclasses.dataclass
    class Outer:
        text: str
        at: datetime.datetime

    log.log(Outer("y" * 50, datetime.datetime(2020, 1, 1, tzinfo=Zone())))
    log.log(b"after")
    log.flush()
    found = values(embedded_kafka, topic)
    assert found[-2:] == [b'{"text":"%s","at":"2020-01-01T00:00:00Z"}' % (b"y" * 50), b"after"]
    assert set(found[:-2]) == {b'{"inner":"%s"}' % (b"x" * 100)}


def test_an_error_while_encoding_leaves_the_next_message_whole(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    log = make()
    for _ in range(3):
        with pytest.raises(UsageError):
            log.log({"begun": "x" * 5000, "bad": object()})
        log.log({"good": 1})
    log.log({"large": "x" * (2 << 20)})
    log.log({"small": 1})
    log.flush()
    found = values(embedded_kafka, topic)
    assert found[:3] == [b'{"good":1}'] * 3
    assert (len(found[3] or b""), found[4]) == ((2 << 20) + 12, b'{"small":1}')


# --- one order -------------------------------------------------------------------------------------------------------


def log_in_each_way(log: KafkaBatchLogger, number: int) -> None:
    """One message; which way it takes through log() depends on its number."""
    match number % 6:
        case 0 | 1:
            log.log(b"%d" % number)
        case 2:
            log.log(b"%d" % number, headers={"a": b"1"})
        case 3:
            log.log(b"%d" % number, timestamp_ms=1_700_000_000_000 + number)
        case 4:
            log.log(str(number), key=b"k")
        case 5:
            log.log(number, topic="t")


def test_one_order_for_all_messages(embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]) -> None:
    log = make()
    for number in range(5000):
        log_in_each_way(log, number)
    assert log.flush() == 5000
    assert values(embedded_kafka, topic) == numbered(5000)


def test_one_order_under_a_full_queue(embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]) -> None:
    log = make(log_queue_messages=7)
    for number in range(2000):
        log_in_each_way(log, number)
    assert log.flush() == 2000
    assert values(embedded_kafka, topic) == numbered(2000)


@pytest.mark.logs_errors
def test_one_order_over_an_outage(embedded_kafka: Any, topic: str) -> None:
    # With a producer id, or the broker could not tell that it has got some already.
    log = KafkaBatchLogger(topic=topic, settings=quick(embedded_kafka))
    for number in range(3000):
        log_in_each_way(log, number)
        if number == 1000:
            embedded_kafka.broker_down()
        if number == 2000:
            embedded_kafka.broker_up()
    assert log.flush() == 3000
    found = values(embedded_kafka, topic)
    assert list(dict.fromkeys(found)) == numbered(3000)


# --- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.logs_errors
def test_the_queue_is_bounded_by_count_and_by_bytes(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    by_count = make(timeout=0.2, log_queue_messages=10)
    by_bytes = make(timeout=0.2, log_queue_bytes=1024)
    connected(by_count)
    connected(by_bytes)
    embedded_kafka.broker_down()
    for message in numbered(10):
        by_count.log(message)
    for _ in range(4):
        by_bytes.log(b"x" * 200, key=b"k" * 50)
    for log, pending in ((by_count, 10), (by_bytes, 4)):
        started = time.monotonic()
        with pytest.raises(QueueFullError, match=rf"stayed full for 0\.2 s \({pending} messages"):
            log.log(b"x" * 100)
        assert 0.19 <= time.monotonic() - started < 3
        assert log.pending_count == pending
    by_bytes.log(b"x" * 20)  # there is room for that
    embedded_kafka.broker_up()
    assert (by_count.flush(20), by_bytes.flush(20)) == (11, 6)
    assert len(values(embedded_kafka, topic)) == 17


def test_a_message_larger_than_the_bound_goes_alone(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    log = make(log_queue_bytes=1024)
    connected(log)
    embedded_kafka.set_latency(200)
    log.log(b"small")
    started = time.monotonic()
    log.log(b"x" * 5000)  # waits until the small one is delivered
    assert time.monotonic() - started >= 0.1
    assert log.pending_count == 1
    started = time.monotonic()
    log.log(b"and on")
    assert time.monotonic() - started >= 0.1
    embedded_kafka.set_latency(0)
    assert log.flush() == 4
    assert values(embedded_kafka, topic) == [b"connected", b"small", b"x" * 5000, b"and on"]


@pytest.mark.logs_errors
def test_others_run_while_a_thread_waits_for_room(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    log = make(log_queue_messages=1)
    connected(log)
    embedded_kafka.broker_down()
    log.log(b"1")
    used: list[float] = []

    def blocked() -> None:
        started = time.thread_time()
        log.log(b"2")
        used.append(time.thread_time() - started)

    thread = threading.Thread(target=blocked)
    thread.start()
    turns, deadline = 0, time.monotonic() + 0.3
    while time.monotonic() < deadline:
        turns += 1
    assert thread.is_alive()
    assert turns > 10_000  # nothing but this loop has had the interpreter
    embedded_kafka.broker_up()
    thread.join(20)
    assert log.flush() == 3
    assert used[0] < 0.2
    assert values(embedded_kafka, topic) == [b"connected", b"1", b"2"]


@pytest.mark.logs_errors
@pytest.mark.parametrize("by_function", [False, True])
def test_a_full_queue_may_drop(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger], by_function: bool
) -> None:
    dropped: list[tuple[bytes | None, str]] = []
    on_full: Any = (lambda value, topic: dropped.append((value, topic))) if by_function else "drop"
    log = make(on_full=on_full, log_queue_messages=5)
    connected(log)
    embedded_kafka.broker_down()
    started = time.monotonic()
    for message in numbered(20):
        log.log(message, headers={"a": b"1"})
    log.log("text", key="k")
    log.log(None, key="k")
    assert time.monotonic() - started < 2
    assert (log.dropped_count, log.pending_count, log.produced_count) == (17, 5, 6)
    embedded_kafka.broker_up()
    assert log.flush(20) == 6
    log.log(b"room again")
    log.flush()
    assert log.dropped_count == 17
    assert values(embedded_kafka, topic) == [b"connected", *numbered(5), b"room again"]
    wanted = [(message, "t") for message in numbered(20)[5:]] + [(b"text", "t"), (None, "t")]
    assert dropped == (wanted if by_function else [])


@pytest.mark.logs_errors
def test_a_function_for_a_full_queue_may_raise(embedded_kafka: Any, make: Callable[..., KafkaBatchLogger]) -> None:
    def on_full(value: bytes | None, topic: str) -> None:
        raise LookupError("no room")

    log = make(on_full=on_full, log_queue_messages=1)
    connected(log)
    embedded_kafka.broker_down()
    log.log(b"1")
    with pytest.raises(LookupError, match="no room"):
        log.log(b"2", headers={"a": b"1"})
    assert (log.dropped_count, log.produced_count) == (0, 2)
    embedded_kafka.broker_up()
    assert log.flush(20) == 2


def test_wrong_arguments() -> None:
    with pytest.raises(ConfigurationError, match="on_full='wait'"):
        KafkaBatchLogger(topic="t", on_full="wait")  # type: ignore[arg-type]


def test_the_dead_topic_of_one_logger_delays_no_other(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    embedded_kafka.create_topic("dead")
    embedded_kafka.set_topic_error("dead", 3)  # librdkafka gives it 30 s to appear
    dead, good = make(timeout=0.1, log_queue_messages=50), make(log_queue_messages=50)
    dead.topic = "dead"
    connected(good)
    with pytest.raises(QueueFullError):
        for message in numbered(100):
            dead.log(message)
    assert dead.pending_count == 50
    for message in numbered(500):
        good.log(message)
    assert good.flush(10) == 501
    assert dead._made[os.getpid()][0] is good._made[os.getpid()][0]  # one producer
    embedded_kafka.set_topic_error("dead", 0)
    assert dead.flush(20) == 50
    assert values(embedded_kafka, topic) == [b"connected", *numbered(500)]


# --- flush(), on_delivery --------------------------------------------------------------------------------------------


@pytest.mark.logs_errors
def test_a_failure_is_told_with_all_that_was_given(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    log = make()
    connected(log)
    embedded_kafka.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
    headers = [("a", b"1"), ("b", None)]
    log.log("text ä", key="k", headers=headers, timestamp_ms=1_700_000_000_000)
    with pytest.raises(DeliveryError) as caught:
        log.flush()
    [entry] = caught.value.failures
    assert entry[:3] == ("t", "text ä".encode(), b"k")
    assert (entry.outcome, entry.headers, entry.timestamp_ms) == ("not delivered", headers, 1_700_000_000_000)
    assert (caught.value.name, caught.value.code, caught.value.__cause__) == ("MSG_SIZE_TOO_LARGE", 10, entry.error)
    # What came back is whole: it can be logged again.
    log.log(entry.value, entry.topic, key=entry.key, headers=entry.headers, timestamp_ms=entry.timestamp_ms)
    assert log.flush() == 2
    again = read(embedded_kafka, topic)[-1]
    assert (again.value, again.key, again.headers) == ("text ä".encode(), b"k", headers)


def test_only_topics_in_use_are_looked_up(embedded_kafka: Any, make: Callable[..., KafkaBatchLogger]) -> None:
    embedded_kafka.create_topic("of.others", 3)
    log = make()
    connected(log)
    client = log._made[os.getpid()][0].client
    assert client.metadata(10_000, used_only=True) == {"t": 1}
    assert client.metadata(10_000).keys() == {"t", "of.others"}


@pytest.mark.logs_errors
def test_three_outcomes_are_told_apart(embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]) -> None:
    told: list[Delivery] = []
    log = make(on_delivery=told.extend)
    log.log(b"delivered")
    log.flush()
    embedded_kafka.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
    log.log(b"refused")
    with pytest.raises(DeliveryError):
        log.flush()
    embedded_kafka.clear_errors("Produce")
    embedded_kafka.set_latency(3000)
    log.log(b"unanswered")
    wait_until(lambda: embedded_kafka.requests().get("Produce", 0) >= 1, "it is under way")
    log._made[os.getpid()][0].close(0)
    embedded_kafka.set_latency(0)
    wait_until(lambda: len(told) == 3, "all are told of")
    assert [(entry.value, entry.outcome) for entry in told] == [
        (b"delivered", "delivered"),
        (b"refused", "not delivered"),
        (b"unanswered", "possibly delivered"),
    ]
    assert told[0].error is None
    with pytest.raises(DeliveryError):
        log.flush()


@pytest.mark.logs_errors
def test_many_threads_may_flush(embedded_kafka: Any, make: Callable[..., KafkaBatchLogger]) -> None:
    log = make()
    connected(log)
    embedded_kafka.set_latency(300)
    for message in numbered(100):
        log.log(message)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(log.flush())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    embedded_kafka.set_latency(0)
    assert found == [101] * 8


@pytest.mark.logs_errors
def test_ctrl_c_interrupts_flush(embedded_kafka: Any, make: Callable[..., KafkaBatchLogger]) -> None:
    log = make(timeout=30)
    connected(log)
    embedded_kafka.broker_down()
    log.log(b"x")
    struck: list[float] = []

    def strike() -> None:
        struck.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.2, strike)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        log.flush()
    assert time.monotonic() - struck[0] < 1.5
    embedded_kafka.broker_up()
    assert log.flush() == 2


def test_on_delivery_is_told_of_many_at_once(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    told: list[list[Delivery]] = []
    log = make(on_delivery=told.append)
    for number in range(1000):
        log.log(b"%d" % number, key=b"k", timestamp_ms=1 + number)
    log.flush()
    wait_until(lambda: sum(map(len, told)) == 1000, "all are told of")
    assert len(told) < 200
    found = [entry for deliveries in told for entry in deliveries]
    assert [entry.value for entry in found] == numbered(1000)
    assert {(entry.topic, entry.key, entry.error, entry.outcome) for entry in found} == {("t", b"k", None, "delivered")}
    assert [entry.timestamp_ms for entry in found] == list(range(1, 1001))


def test_on_delivery_is_told_in_order_although_one_report_takes_longer(
    topic: str, make: Callable[..., KafkaBatchLogger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever makes an object may let another thread run, which then takes the messages that come after it."""

    def slowly(*arguments: Any) -> Delivery:
        if arguments[1] == b"5":
            time.sleep(0.3)  # without the GIL: the other thread takes all that is left
        return Delivery(*arguments)

    monkeypatch.setattr(errors, "Delivery", slowly)
    told: list[bytes | None] = []
    log = make(on_delivery=lambda deliveries: told.extend(entry.value for entry in deliveries))
    for number in range(1000):
        log.log(b"%d" % number, key=b"k")
    assert log.flush() == 1000
    wait_until(lambda: len(told) == 1000, "all are told of")
    assert told == numbered(1000)


@pytest.mark.logs_errors
def test_an_on_delivery_that_raises_is_logged_and_hurts_nobody(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    def broken(deliveries: list[Delivery]) -> None:
        raise ZeroDivisionError("mine")

    told: list[Delivery] = []
    log, other = make(on_delivery=broken), make(on_delivery=told.extend)
    with logged() as lines:
        for number in range(30):
            log.log(b"%d" % number)
            log.flush()
        other.log(b"other")
        other.flush()
        wait_until(lambda: len(told) == 1, "the other one is told")
        wait_until(lambda: any("on_delivery of a logger failed" in line for line in lines), "it is logged")
    assert sum("on_delivery" in line for line in lines) <= 3
    embedded_kafka.set_latency(500)
    log.log(b"under way")
    log._made[os.getpid()][0].close(0)  # as EmbeddedKafka.stop() and the end of the process do
    embedded_kafka.set_latency(0)


def test_async_use(embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]) -> None:
    log = make()

    async def main() -> list[int]:
        connected(log)
        embedded_kafka.set_latency(300)
        turns = 0
        async with log as entered:
            assert entered is log
            log.log(b"1")
            flushed = asyncio.ensure_future(log.aflush())
            while not flushed.done():
                await asyncio.sleep(0.01)
                turns += 1
            assert await flushed == 2
            log.log(b"2")
        return [turns, log.received_count]

    turns, received = asyncio.run(main())
    embedded_kafka.set_latency(0)
    assert turns >= 10
    assert (received, log.closed) == (3, True)
    assert values(embedded_kafka, topic) == [b"connected", b"1", b"2"]


@pytest.mark.logs_errors
def test_aflush_raises_as_flush_does(embedded_kafka: Any, make: Callable[..., KafkaBatchLogger]) -> None:
    log = make()
    connected(log)
    embedded_kafka.broker_down()
    log.log(b"x")
    with pytest.raises(KafkaTimeoutError, match=r"1 message\(s\) were not acknowledged"):
        asyncio.run(log.aflush(0.1))
    embedded_kafka.broker_up()
    assert asyncio.run(log.aflush()) == 2


# --- another producer in place ---------------------------------------------------------------------------------------


class StandIn:
    def __init__(self) -> None:
        self.produced: list[tuple[str, bytes | None, dict[str, Any]]] = []
        self.flushed: list[float] = []

    def produce(self, topic: str, value: bytes | None, *, on_delivery: Any, **more: Any) -> None:
        self.produced.append((topic, value, more))
        on_delivery("refused" if value == b"bad" else None, None)

    def flush(self, timeout: float) -> int:
        self.flushed.append(timeout)
        return 0


def test_a_stand_in_takes_every_message(embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]) -> None:
    log = make()
    connected(log)
    stand_in = StandIn()
    log.producer = stand_in
    assert log.producer is stand_in
    log.log(b"1")
    log.log("2", key="k", headers={"a": b"1"}, timestamp_ms=5)
    log.log(b"bad")
    log.log({"n": 3}, topic="other")
    assert stand_in.produced == [
        ("t", b"1", {}),
        ("t", b"2", {"key": b"k", "headers": [("a", b"1")], "timestamp": 5}),
        ("t", b"bad", {}),
        ("other", b'{"n":3}', {}),
    ]
    assert (log.produced_count, log.received_count) == (5, 4)
    assert log.flush(3) == 4
    assert stand_in.flushed == [3]
    log.producer = None
    log.log(b"real")
    assert log.flush() == 5
    assert values(embedded_kafka, topic) == [b"connected", b"real"]


def test_its_own_producer_may_be_used_as_one(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    log = make()
    log.producer.produce(topic, b"1", b"key", headers=[("a", b"1")])
    log.producer.produce(topic, b"2")
    assert log.producer.flush() == 0
    assert log.received_count == 2
    first, second = read(embedded_kafka, topic)
    assert (first.value, first.key, first.headers, second.value) == (b"1", b"key", [("a", b"1")], b"2")


# --- producers that end ----------------------------------------------------------------------------------------------


@pytest.mark.logs_errors
def test_after_a_fatal_error_both_loggers_go_on(embedded_kafka: Any, topic: str) -> None:
    settings = quick(embedded_kafka)
    one, two = (KafkaBatchLogger(topic=topic, timeout=10, settings=settings) for _ in range(2))
    connected(one)
    connected(two)
    embedded_kafka.set_latency(500)
    one.log(b"under way", key="k")
    old = one._client()
    assert old is not None
    assert old is two._client()
    old.trigger_fatal_error(47, "for the test")
    wait_until(lambda: old.fatal or old.closed, "the error is noticed")
    embedded_kafka.set_latency(0)
    one.log(b"one goes on")
    two.log(b"two goes on")
    assert one._client() is two._client() is not old
    with pytest.raises(DeliveryError) as caught:
        wait_until(lambda: one.flush() and False, "what was under way is told of")
    [entry] = caught.value.failures
    assert (entry.value, entry.key) == (b"under way", b"k")
    assert (one.flush(), two.flush()) == (2, 2)
    wait_until(lambda: old.closed, "the old one ends")
    found = values(embedded_kafka, topic)
    assert found.count(b"one goes on") == found.count(b"two goes on") == 1
    assert len(_producers._producers) == 1


def test_a_cluster_that_ends_takes_its_loggers_along(
    make: Callable[..., KafkaBatchLogger], embedded_kafka: Any
) -> None:
    log = make()
    connected(log)
    _producers.close_producers(embedded_kafka.bootstrap_servers)
    for _ in range(2):
        with pytest.raises(ClosedError, match="make a new logger"):
            log.log(b"x")
    assert log.flush() == 1
    log.close()
    again = make()
    connected(again)


@pytest.mark.logs_errors
def test_a_producer_that_is_closed_in_the_middle_of_a_call(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    log = make()
    connected(log)
    before = live_objects()["deliveries"]

    def pairs() -> Any:
        _producers.close_producers(embedded_kafka.bootstrap_servers)
        yield ("a", b"1")

    with pytest.raises(ClosedError):
        log.log(b"lost", headers=pairs())
    assert log.pending_count == 0
    assert log.flush() == 1
    assert live_objects()["deliveries"] == before
    assert values(embedded_kafka, topic) == [b"connected"]


@pytest.mark.logs_errors
@pytest.mark.parametrize("attempt", range(5))
def test_producers_that_are_closed_while_everybody_logs(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger], attempt: int
) -> None:
    log = make(timeout=1, log_queue_messages=200)
    single = KafkaLogger(topic=topic, timeout=1, settings=quick(embedded_kafka, idempotence=False))
    connected(log)
    single.log(b"connected")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            while True:
                match number % 3:
                    case 0:
                        log.log(b"a")
                    case 1:
                        log.log(b"a", headers={"a": b"b"})
                    case 2:
                        log.log({"a": number}, key="k")
        except ClosedError:
            pass
        except BaseException as error:
            failures.append(error)

    async def many() -> None:
        while True:
            found = await asyncio.gather(*(single.alog(b"z") for _ in range(20)), return_exceptions=True)
            if any(isinstance(error, ClosedError) for error in found):
                return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    threads.append(threading.Thread(target=lambda: asyncio.run(many())))
    for thread in threads:
        thread.start()
    wait_until(lambda: log.received_count > 100 * attempt, "messages flow")
    _producers.close_producers(embedded_kafka.bootstrap_servers, 50)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert failures == []
    gc.collect()
    with contextlib.suppress(DeliveryError):
        log.flush()
    assert log.pending_count == 0


# --- processes -------------------------------------------------------------------------------------------------------


def test_what_is_pending_is_sent_when_the_process_ends(embedded_kafka: Any, topic: str) -> None:
    done = logging_process(
        embedded_kafka,
        """
log = KafkaBatchLogger(topic="t", settings=settings(linger_ms=2000))
for number in range(1000):
    log.log(b"%d" % number)
sys.exit(7)
""",
    )
    assert (done.returncode, done.stderr) == (7, "")
    assert values(embedded_kafka, topic) == numbered(1000)


def test_what_could_not_be_sent_is_named_when_the_process_ends(embedded_kafka: Any, topic: str) -> None:
    embedded_kafka.broker_down()
    started = time.monotonic()
    done = logging_process(
        embedded_kafka,
        """
import logging
logging.disable()
log = KafkaBatchLogger(topic="t", settings=settings())
for number in range(10):
    log.log(b"%d" % number)
""",
    )
    assert done.returncode == 0
    assert "keven_core: 10 message(s) could not be sent before the process ended" in done.stderr
    assert "no flush() asked" not in done.stderr
    assert 4 < time.monotonic() - started < 20
    embedded_kafka.broker_up()


@pytest.mark.parametrize("asked", [False, True])
def test_what_was_refused_and_never_asked_for_is_named_too(embedded_kafka: Any, topic: str, asked: bool) -> None:
    embedded_kafka.push_errors("Produce", [MSG_SIZE_TOO_LARGE] * 3)
    done = logging_process(
        embedded_kafka,
        f"""
import asyncio, contextlib, logging
logging.disable()
log, single = KafkaBatchLogger(topic="t", settings=settings()), KafkaLogger(topic="t", settings=settings())
# Whoever waits is told, so nothing of that is named.
for call in (lambda: single.log(b"told"), lambda: asyncio.run(single.alog(b"told"))):
    try:
        call()
    except DeliveryError:
        continue
    raise SystemExit("not refused")
log.log(b"refused")
while log.pending_count:
    time.sleep(0.01)
if {asked}:
    with contextlib.suppress(DeliveryError):
        log.flush()
""",
    )
    said = "" if asked else "keven_core: 1 message(s) were not delivered, and no flush() asked for them\n"
    assert (done.returncode, done.stderr) == (0, said)
