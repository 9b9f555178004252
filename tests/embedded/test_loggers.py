"""KafkaLogger, KafkaBatchLogger and EventPublisher: what arrives, what is counted, and how each failure shows."""

import asyncio
import dataclasses
import sys
import threading
import time
from typing import Any

import pytest
from embedded_support import (
    MODES,
    committed,
    event,
    group_server,
    live,
    logged,
    numbered,
    quick,
    read,
    send,
    topics,
    values,
    wait_until,
)

from keven_core.kafka.abstracts.event_handler import event_handler
from keven_core.kafka.errors import (
    ClosedError,
    ConfigurationError,
    DeliveryError,
    KafkaTimeoutError,
    MessageTooLargeError,
    QueueFullError,
    UsageError,
)
from keven_core.kafka.events.event import Event
from keven_core.kafka.events.publisher import EventPublisher
from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger

BOTH = pytest.mark.parametrize("kind", [KafkaLogger, KafkaBatchLogger])

TOPIC_AUTHORIZATION_FAILED = 29
TOPIC_EXCEPTION = 17
UNKNOWN_TOPIC_OR_PART = 3


@pytest.fixture
def placed(handler_registry: Any) -> Any:
    class OrderPlaced(Event):
        event_name = "ORDER_PLACED"
        key_field = "order_id"
        order_id: int
        customer: str = ""

    return OrderPlaced


def flushed(log: Any) -> None:
    if isinstance(log, KafkaBatchLogger):
        log.flush()


# --- what arrives ----------------------------------------------------------------------------------------------------


def test_log_returns_when_the_broker_has_acknowledged(embedded_kafka: Any, topic: str) -> None:
    log = KafkaLogger(topic=topic, settings=quick(embedded_kafka))
    log.log(b"first")
    assert values(embedded_kafka, topic) == [b"first"]
    embedded_kafka.set_latency(300)
    started = time.monotonic()
    log.log(b"second")
    assert time.monotonic() - started >= 0.3
    embedded_kafka.set_latency(0)
    assert values(embedded_kafka, topic) == [b"first", b"second"]


def test_a_batch_logger_does_not_wait_but_flush_does(embedded_kafka: Any, topic: str) -> None:
    log = KafkaBatchLogger(topic=topic, settings=quick(embedded_kafka))
    log.log(b"connected")
    log.flush()
    embedded_kafka.set_latency(1000)
    started = time.monotonic()
    for message in numbered(100):
        log.log(message)
    assert time.monotonic() - started < 0.9
    assert log.flush() == 101
    assert time.monotonic() - started >= 1
    embedded_kafka.set_latency(0)
    assert values(embedded_kafka, topic) == [b"connected", *numbered(100)]


@BOTH
def test_every_kind_of_data_is_taken(embedded_kafka: Any, topic: str, placed: Any, kind: Any) -> None:
    log = kind(topic=topic, settings=quick(embedded_kafka))
    order = placed(order_id=5)
    for data in (b"bytes", bytearray(b"bytearray"), memoryview(b"memoryview"), "str \u00e4", b"", order):
        log.log(data)
    flushed(log)
    wanted = [b"bytes", b"bytearray", b"memoryview", "str \u00e4".encode(), b"", order.serialize()]
    found = read(embedded_kafka, topic)
    assert [entry.value for entry in found] == wanted
    assert [entry.key for entry in found] == [None] * 5 + [b"5"]


@BOTH
def test_what_msgspec_can_encode_is_taken(embedded_kafka: Any, topic: str, kind: Any) -> None:
    @dataclasses.dataclass
    class Point:
        x: int
        y: int

    log = kind(topic=topic, settings=quick(embedded_kafka))
    for data in ({"a": [1, 2.5, None]}, ["list"], 5, Point(1, 2)):
        log.log(data)
    flushed(log)
    assert values(embedded_kafka, topic) == [b'{"a":[1,2.5,null]}', b'["list"]', b"5", b'{"x":1,"y":2}']


@BOTH
@pytest.mark.parametrize("data", [object(), {"a": object()}, {1j: 1}, "\ud800"], ids=repr)
def test_other_data_is_refused(embedded_kafka: Any, topic: str, kind: Any, data: Any) -> None:
    with pytest.raises(UsageError, match="a message has to be"):
        kind(topic=topic, settings=quick(embedded_kafka)).log(data)
    assert values(embedded_kafka, topic) == []


@BOTH
def test_a_tombstone_needs_a_key(embedded_kafka: Any, topic: str, kind: Any) -> None:
    with pytest.raises(UsageError, match="tombstone and needs a key"):
        kind(topic=topic, settings=quick(embedded_kafka)).log(None)
    log = KafkaBatchLogger(topic=topic, settings=quick(embedded_kafka))
    log.log(None, key="k")
    log.flush()
    [entry] = read(embedded_kafka, topic)
    assert (entry.value, entry.key) == (None, b"k")


@BOTH
def test_the_topic_is_the_calls_then_the_loggers(embedded_kafka: Any, placed: Any, kind: Any) -> None:
    topics(embedded_kafka, "own", "other", "keven_events_order_placed")
    log = kind(topic="own", settings=quick(embedded_kafka))
    log.log(b"1")
    log.log(b"2", topic="other")
    log.log(placed(order_id=1))
    flushed(log)
    assert len(values(embedded_kafka, "own")) == 2
    assert values(embedded_kafka, "other") == [b"2"]
    nowhere = kind(settings=quick(embedded_kafka))
    nowhere.log(placed(order_id=2))
    flushed(nowhere)
    assert len(values(embedded_kafka, "keven_events_order_placed")) == 1
    with pytest.raises(UsageError, match="no topic"):
        nowhere.log(b"x")
    with pytest.raises(ConfigurationError):
        nowhere.log(b"x", topic="not a topic")
    with pytest.raises(ConfigurationError):
        kind(topic="not a topic")


def test_buffers_that_change_afterwards_were_copied(embedded_kafka: Any, topic: str) -> None:
    log = KafkaBatchLogger(topic=topic, settings=quick(embedded_kafka))
    buffer = bytearray(b"before")
    embedded_kafka.set_latency(200)
    log.log(buffer)
    log.log(memoryview(buffer)[:3])
    buffer[:] = b"after!"
    log.flush()
    embedded_kafka.set_latency(0)
    assert values(embedded_kafka, topic) == [b"before", b"bef"]


def test_bytes_are_held_until_they_are_delivered_and_then_released(embedded_kafka: Any, topic: str) -> None:
    log = KafkaBatchLogger(topic=topic, settings=quick(embedded_kafka))
    log.log(b"connected")
    log.flush()
    message, key = b"x" * 1000, b"k" * 100
    counts = (sys.getrefcount(message), sys.getrefcount(key))
    embedded_kafka.set_latency(200)
    log.log(message, key=key)
    assert (sys.getrefcount(message), sys.getrefcount(key)) == (counts[0] + 1, counts[1] + 1)
    log.flush()
    assert (sys.getrefcount(message), sys.getrefcount(key)) == counts
    embedded_kafka.set_latency(0)


def test_key_headers_and_timestamp_arrive(embedded_kafka: Any, topic: str) -> None:
    log = KafkaBatchLogger(topic=topic, settings=quick(embedded_kafka))
    headers = [("a", b"1"), ("b", None), ("a", b"2")]
    log.log(b"x", key=b"k", headers=headers, timestamp_ms=1_234_567_890_123)
    log.log(b"y")
    log.flush()
    full, bare = read(embedded_kafka, topic)
    assert (full.key, full.headers, full.timestamp) == (b"k", headers, (1, 1_234_567_890_123))
    assert (bare.key, bare.headers) == (None, [])
    assert abs(bare.timestamp[1] / 1000 - time.time()) < 60
    for bad in ([("a", "text")], [("a",)], [(b"a", b"1")], ["ab"]):
        with pytest.raises(UsageError, match="header"):
            log.log(b"z", headers=bad)  # type: ignore[arg-type]
    log.flush()
    assert values(embedded_kafka, topic) == [b"x", b"y"]


def test_one_key_is_one_partition_in_order(embedded_kafka: Any) -> None:
    embedded_kafka.create_topic("t", 4)
    log = KafkaBatchLogger(topic="t", settings=quick(embedded_kafka))
    for number in range(200):
        log.log(b"%d" % number, key=b"key %d" % (number % 10))
    log.flush()
    found = read(embedded_kafka, "t")
    partitions: dict[bytes, set[int]] = {}
    order: dict[bytes, list[int]] = {}
    for entry in found:
        assert entry.key is not None
        partitions.setdefault(entry.key, set()).add(entry.partition)
        order.setdefault(entry.key, []).append(int(entry.value or b""))
    assert all(len(where) == 1 for where in partitions.values())
    assert len({min(where) for where in partitions.values()}) > 1
    assert all(numbers == sorted(numbers) for numbers in order.values())


@BOTH
@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_events_are_written_in_the_codec_of_the_settings(
    embedded_kafka: Any, topic: str, placed: Any, kind: Any, codec: str
) -> None:
    order = placed(order_id=5, customer="Ada")
    log = kind(topic=topic, settings=quick(embedded_kafka, codec=codec))
    log.log(order)
    flushed(log)
    assert values(embedded_kafka, topic) == [order.serialize(codec)]


@BOTH
def test_the_address_is_the_variable_then_the_argument(
    embedded_kafka: Any, topic: str, monkeypatch: Any, kind: Any
) -> None:
    monkeypatch.setenv("KEVEN_CREATE_TOPICS", "false")
    monkeypatch.delenv("KAFKA", raising=False)
    log = kind(embedded_kafka.bootstrap_servers, topic)
    log.log(b"by argument")
    flushed(log)
    monkeypatch.setenv("KAFKA", embedded_kafka.bootstrap_servers)
    log = kind("127.0.0.1:1", topic)
    log.log(b"by variable")
    flushed(log)
    assert values(embedded_kafka, topic) == [b"by argument", b"by variable"]


# --- counts ----------------------------------------------------------------------------------------------------------


def test_each_logger_counts_its_own_messages(embedded_kafka: Any, topic: str) -> None:
    first, second = (KafkaBatchLogger(topic=topic, settings=quick(embedded_kafka)) for _ in range(2))
    assert (first.produced_count, first.received_count, first.pending_count) == (0, 0, 0)
    assert first.flush() == 0
    first.log(b"connected")
    first.flush()
    embedded_kafka.set_latency(300)
    for number in range(10):
        (first if number % 5 else second).log(b"x")
    assert (first.produced_count, first.received_count, first.pending_count) == (9, 1, 8)
    assert (second.produced_count, second.received_count, second.pending_count) == (2, 0, 2)
    assert (first.flush(), second.flush()) == (9, 2)
    assert (first.produced_count, first.received_count, first.pending_count) == (9, 9, 0)
    embedded_kafka.set_latency(0)


def test_many_threads_may_log_at_once(embedded_kafka: Any, topic: str) -> None:
    batch = KafkaBatchLogger(topic=topic, settings=quick(embedded_kafka))
    single = KafkaLogger(topic=topic, settings=quick(embedded_kafka))
    failures: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for number in range(300):
                batch.log(b"%d/%d" % (thread, number))
                if number % 100 == 0:
                    single.log(b"single %d/%d" % (thread, number))
                    batch.flush()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert batch.flush() == 1200
    found = values(embedded_kafka, topic)
    assert len(found) == len(set(found)) == 1212


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.logs_errors
def test_flush_lists_what_was_refused_once(embedded_kafka: Any, topic: str) -> None:
    log = KafkaBatchLogger(topic=topic, settings=quick(embedded_kafka))
    log.log(b"taken")
    log.flush()
    embedded_kafka.set_latency(100)  # so that the others are in one request
    embedded_kafka.push_errors("Produce", [TOPIC_AUTHORIZATION_FAILED])
    for number in range(20):
        log.log(b"refused %d" % number)
    with pytest.raises(DeliveryError, match="20 messages were not delivered; the first, for t ") as caught:
        log.flush()
    embedded_kafka.set_latency(0)
    assert caught.value.failed_count == 20
    assert [entry.value for entry in caught.value.failures] == [b"refused %d" % number for number in range(10)]
    for entry in caught.value.failures:
        assert (entry.topic, entry.key, entry.outcome) == ("t", None, "not delivered")
        assert "authorization" in str(entry.error)
    assert "refused 1" not in str(caught.value)  # no payload
    assert log.flush() == 1
    assert (log.produced_count, log.received_count, log.pending_count) == (21, 1, 0)


@pytest.mark.logs_errors
@BOTH
@pytest.mark.parametrize("code", [TOPIC_AUTHORIZATION_FAILED, TOPIC_EXCEPTION])
def test_a_topic_that_cannot_be_used_is_an_error_naming_it(
    embedded_kafka: Any, topic: str, kind: Any, code: int
) -> None:
    embedded_kafka.set_topic_error(topic, code)
    log = kind(topic=topic, settings=quick(embedded_kafka))

    def log_one() -> None:
        log.log(b"x")
        flushed(log)

    for _ in range(2):  # from the broker's answer, and then from the client's memory of it
        with pytest.raises(DeliveryError, match=r"\bt\b") as caught:
            log_one()
        assert caught.value.failed_count == 1
        assert caught.value.failures[0][0] == "t"


def test_an_unknown_topic_times_out_for_one_message_and_is_named(embedded_kafka: Any, topic: str) -> None:
    # librdkafka gives a topic that is not there 30 s to appear.
    embedded_kafka.set_topic_error(topic, UNKNOWN_TOPIC_OR_PART)
    log = KafkaLogger(topic=topic, timeout=0.3, settings=quick(embedded_kafka))
    with pytest.raises(KafkaTimeoutError, match=r"within 0\.3 s"):
        log.log(b"x")
    embedded_kafka.set_topic_error(topic, 0)
    wait_until(lambda: values(embedded_kafka, topic) == [b"x"], "it arrives when the topic is there")


@BOTH
def test_a_message_that_is_too_large_is_refused_before_it_is_sent(embedded_kafka: Any, topic: str, kind: Any) -> None:
    log = kind(topic=topic, settings=quick(embedded_kafka, max_message_bytes=2000))
    with pytest.raises(MessageTooLargeError, match="KEVEN_MAX_MESSAGE_BYTES"):
        log.log(b"x" * 3000)
    log.log(b"x" * 1000)
    flushed(log)
    assert values(embedded_kafka, topic) == [b"x" * 1000]


def test_a_large_message_passes_by_default(embedded_kafka: Any, topic: str) -> None:
    message = bytes(range(256)) * 40_000  # 10 MB
    KafkaLogger(topic=topic, settings=quick(embedded_kafka)).log(message)
    assert values(embedded_kafka, topic) == [message]


@pytest.mark.logs_errors  # librdkafka's own, of connections that are refused
def test_flush_times_out_and_goes_on_later(embedded_kafka: Any, topic: str) -> None:
    log = KafkaBatchLogger(topic=topic, settings=quick(embedded_kafka))
    log.log(b"before")
    log.flush()
    embedded_kafka.broker_down()
    log.log(b"meanwhile")
    with pytest.raises(KafkaTimeoutError, match=r"1 message\(s\) were not acknowledged within 0\.2 s"):
        log.flush(0.2)
    assert log.pending_count == 1
    embedded_kafka.broker_up()
    assert log.flush() == 2
    assert values(embedded_kafka, topic) == [b"before", b"meanwhile"]


@pytest.mark.logs_errors
def test_a_full_queue_is_waited_for_and_then_an_error(embedded_kafka: Any, topic: str) -> None:
    log = KafkaBatchLogger(topic=topic, timeout=0.3, settings=quick(embedded_kafka))
    log.log(b"before")
    log.flush(10)
    embedded_kafka.broker_down()
    taken = 1

    def fill() -> None:
        nonlocal taken
        while taken < 1_000_000:
            log.log(b"%d" % taken)
            taken += 1

    with pytest.raises(QueueFullError, match="not queued"):
        fill()
    assert 10_000 <= taken < 1_000_000
    assert log.pending_count == taken - 1
    embedded_kafka.broker_up()
    assert log.flush(30) == taken
    log.log(b"and on")
    assert log.flush(10) == taken + 1


@pytest.mark.logs_errors
def test_an_unreachable_broker_is_said_and_costs_no_message(embedded_kafka: Any, topic: str) -> None:
    embedded_kafka.broker_down()
    log = KafkaBatchLogger(topic=topic, settings=quick(embedded_kafka))
    with logged() as lines:
        log.log(b"early")
        wait_until(lambda: any("down" in line or "Connect" in line for line in lines), "the warning")
    embedded_kafka.broker_up()
    assert log.flush() == 1
    assert values(embedded_kafka, topic) == [b"early"]


@BOTH
def test_a_closed_logger_says_so(embedded_kafka: Any, topic: str, kind: Any) -> None:
    log = kind(topic=topic, settings=quick(embedded_kafka))
    with log as entered:
        assert entered is log
        log.log(b"x")
    log.close()
    with pytest.raises(ClosedError, match="closed"):
        log.log(b"y")
    assert values(embedded_kafka, topic) == [b"x"]
    unused = kind(topic=topic, settings=quick(embedded_kafka))
    unused.close()
    with pytest.raises(ClosedError):
        unused.log(b"z")


@pytest.mark.logs_errors
def test_close_sends_what_is_pending_and_raises_what_was_refused(embedded_kafka: Any, topic: str) -> None:
    log = KafkaBatchLogger(topic=topic, settings=quick(embedded_kafka))
    for message in numbered(50):
        log.log(message)
    log.close()
    assert values(embedded_kafka, topic) == numbered(50)
    failing = KafkaBatchLogger(topic=topic, settings=quick(embedded_kafka))
    embedded_kafka.push_errors("Produce", [TOPIC_AUTHORIZATION_FAILED])
    failing.log(b"refused")
    with pytest.raises(DeliveryError):
        failing.close()
    failing.close()


def test_loggers_with_equal_settings_share_a_producer(embedded_kafka: Any, topic: str) -> None:
    from keven_core._native.library import live_objects

    KafkaBatchLogger(topic=topic, settings=quick(embedded_kafka)).log(b"x")
    clients = live_objects()["clients"]
    for _ in range(5):
        KafkaBatchLogger(topic=topic, settings=quick(embedded_kafka)).log(b"x")
    assert live_objects()["clients"] == clients


# --- EventPublisher --------------------------------------------------------------------------------------------------


@BOTH
def test_events_are_published_to_their_topic_under_their_key(embedded_kafka: Any, placed: Any, kind: Any) -> None:
    topics(embedded_kafka, "keven_events_order_placed", "keven_events.audit", "elsewhere")
    log = kind(settings=quick(embedded_kafka))
    publisher = EventPublisher(log)
    publisher.log_event(placed(order_id=1))
    publisher.log_event(placed(order_id=2, is_audit_event=True))
    publisher.log_event(placed(order_id=3), topic="elsewhere")
    flushed(log)
    for name, key in (("keven_events_order_placed", b"1"), ("keven_events.audit", b"2"), ("elsewhere", b"3")):
        [entry] = read(embedded_kafka, name)
        assert entry.key == key
        assert (entry.value or b"").startswith(b'{"event_name":"ORDER_PLACED"')


def test_a_publishers_logger_is_any_object_with_log(placed: Any) -> None:
    class StandIn:
        def __init__(self) -> None:
            self.got: list[Any] = []

        def log(self, data: Any, topic: str | None = None) -> None:
            self.got.append((data, topic))

    stand_in = StandIn()
    order = placed(order_id=1)
    EventPublisher(stand_in).log_event(order)
    assert stand_in.got == [(order.serialize(), "keven_events_order_placed")]


@MODES
def test_what_handlers_publish_is_consumed_again(
    embedded_kafka: Any, handler_registry: Any, placed: Any, mode: str
) -> None:
    topics(embedded_kafka, "in", "keven_events_order_placed")
    publisher = EventPublisher(KafkaLogger(settings=quick(embedded_kafka)))
    got: list[int] = []

    @event_handler("REQUEST")
    def request(event: Any) -> None:
        publisher.log_event(placed(order_id=event.number))

    @event_handler("ORDER_PLACED")
    def order(event: Any) -> None:
        got.append(event.order_id)

    server = group_server(embedded_kafka, ["in", "keven_events_order_placed"])
    with live(server, mode):
        send(embedded_kafka, "in", *(event("REQUEST", number=number) for number in range(5)))
        wait_until(lambda: len(got) == 5, "the events")
    assert got == list(range(5))
    assert committed(embedded_kafka, "svc", "in") == {0: 5}


def test_loggers_work_inside_an_event_loop(embedded_kafka: Any, topic: str) -> None:
    log = KafkaBatchLogger(topic=topic, settings=quick(embedded_kafka))

    async def main() -> None:
        for message in numbered(10):
            log.log(message)
            await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, log.flush)

    asyncio.run(main())
    assert values(embedded_kafka, topic) == numbered(10)
