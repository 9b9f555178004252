"""Producers hold what they send exactly until its fate is known."""

import asyncio
import gc
import sys
import weakref
from typing import Any

import pytest
from memory_support import LARGE, producer_of
from waiting import wait_until

from keven_core._native.library import live_objects
from keven_core._native.producer import DeliveryAccount, Producer
from keven_core.kafka.errors import (
    ClosedError,
    ConfigurationError,
    KafkaError,
    KevenError,
    MessageTooLargeError,
    QueueFullError,
    UsageError,
)
from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger
from keven_core.testing import EmbeddedKafka

NOWHERE = {"bootstrap.servers": "127.0.0.1:1", "linger.ms": "0"}
SIZES = pytest.mark.parametrize("size", [10, LARGE], ids=["small", "large"])


def fresh(size: int, mark: str = "v") -> bytes:
    """Bytes that nothing else refers to."""
    return bytes(bytearray(mark.encode() * size))


@SIZES
def test_references_return_with_the_delivery_report(embedded_kafka: EmbeddedKafka, size: int) -> None:
    embedded_kafka.create_topic("t", 1)
    values, keys = [fresh(size) for _ in range(20)], [fresh(5, "k") for _ in range(20)]
    header = fresh(5, "h")
    with producer_of(embedded_kafka) as (producer, account):
        before = [sys.getrefcount(entry) for entry in (*values, *keys, header)]
        accounts = sys.getrefcount(account)
        for value, key in zip(values, keys, strict=True):
            producer.produce("t", value, account, key=key, headers=[("h", header), ("none", None)])
        del value, key
        assert live_objects()["deliveries"] > 0 or account.delivered == 20
        assert producer.wait(account, 20)
        assert (account.produced, account.delivered, account.failed) == (20, 20, 0)
        assert live_objects()["deliveries"] == 0
        assert [sys.getrefcount(entry) for entry in (*values, *keys, header)] == before
        assert sys.getrefcount(account) == accounts


def test_values_are_held_while_they_are_on_their_way() -> None:
    producer, account = Producer({**NOWHERE, "message.timeout.ms": "60000"}), DeliveryAccount()
    value, key = fresh(LARGE), fresh(10)
    before = sys.getrefcount(value), sys.getrefcount(key)
    producer.produce("t", value, account, key=key)
    assert (sys.getrefcount(value), sys.getrefcount(key)) == (before[0] + 1, before[1] + 1)
    assert account.pending == 1
    assert producer.close(100) == 1
    assert (account.pending, account.failed) == (0, 1)
    # The account keeps the first failed messages for whoever asks.
    assert account.take_failures()[1][0][1] is value
    gc.collect()
    assert (sys.getrefcount(value), sys.getrefcount(key)) == before


@SIZES
def test_closed_with_undeliverable_messages(size: int) -> None:
    before = live_objects()
    producer, account = Producer({**NOWHERE, "message.timeout.ms": "60000"}), DeliveryAccount(keep_failures=3)
    values = [fresh(size) for _ in range(50)]
    counts = [sys.getrefcount(value) for value in values]
    for value in values:
        producer.produce("t", value, account, headers=[("a", b"b")])
    del value
    assert live_objects()["deliveries"] - before["deliveries"] == 50
    assert producer.close(100) == 50
    assert (account.failed, account.pending, len(account.failures)) == (50, 0, 3)
    count, kept = account.take_failures()
    assert count == 50
    assert {type(entry[3]) for entry in kept} == {KafkaError}
    assert {entry[4] for entry in kept} == {"not delivered"}
    assert live_objects() == before
    del kept
    assert [sys.getrefcount(value) for value in values] == counts


def test_messages_that_expire(embedded_kafka: EmbeddedKafka) -> None:
    embedded_kafka.create_topic("t", 1)
    value = fresh(LARGE)
    before = sys.getrefcount(value)
    with producer_of(embedded_kafka, message_timeout_ms="300") as (producer, account):
        producer.produce("t", b"first", account)
        assert producer.wait(account, 20)
        embedded_kafka.broker_down()
        producer.produce("t", value, account)
        assert producer.wait(account, 20)
        assert (account.delivered, account.failed) == (1, 1)
        account.take_failures()
        assert sys.getrefcount(value) == before
        embedded_kafka.broker_up()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"value": b"x" * 5000}, MessageTooLargeError),
        ({"topic": "x" * 600}, KevenError),
        ({"headers": [("ok", b"ok"), ("bad", "text")]}, KevenError),
        ({"headers": [("ok", b"ok"), (b"bad", b"bytes")]}, KevenError),
        ({"headers": [("\ud800", b"x")]}, UsageError),
        ({"headers": 5}, UsageError),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else value.__name__,
)
def test_a_message_that_is_refused_is_released_at_once(
    embedded_kafka: EmbeddedKafka, arguments: dict[str, Any], error: type[Exception]
) -> None:
    value, key, header = fresh(100), fresh(10), fresh(10)
    before = [sys.getrefcount(entry) for entry in (value, key, header)]
    with producer_of(embedded_kafka, message_max_bytes="1000") as (producer, account):
        given: dict[str, Any] = {"topic": "t", "value": value, "key": key, "headers": [("h", header)], **arguments}
        topic, sent = given.pop("topic"), given.pop("value")
        try:
            producer.produce(topic, sent, account, **given)
        except error:
            pass
        else:
            # librdkafka takes a name of any length and finds out later: then the report says so.
            assert topic == "x" * 600
            assert producer.wait(account, 20)
            assert account.failed == 1
            account.take_failures()
        assert live_objects()["deliveries"] == 0
        assert account.produced == 0
    del given, sent
    gc.collect()
    assert [sys.getrefcount(entry) for entry in (value, key, header)] == before


def test_a_full_queue_refuses_and_releases() -> None:
    producer = Producer({**NOWHERE, "message.timeout.ms": "60000"})
    account = DeliveryAccount(max_messages=10)
    value = fresh(100)
    before = sys.getrefcount(value)
    for _ in range(10):
        producer.produce("t", value, account)
    assert sys.getrefcount(value) == before + 10
    for timeout_ms in (0, 120):
        with pytest.raises(QueueFullError, match=rf"stayed full for {timeout_ms} ms"):
            producer.produce("t", value, account, headers=[("a", b"b")], timeout_ms=timeout_ms)
    assert sys.getrefcount(value) == before + 10
    assert (account.produced, account.pending) == (10, 10)
    assert producer.close(50) == 10
    account.take_failures()
    assert sys.getrefcount(value) == before


def test_the_callers_own_events_handler_is_released() -> None:
    def on_event(event: Any) -> None: ...

    before = sys.getrefcount(on_event)
    producer = Producer(NOWHERE, on_event)
    producer.serve(10)
    producer.close(100)
    del producer
    gc.collect()
    assert sys.getrefcount(on_event) == before


def test_an_events_handler_that_raises_leaves_nothing() -> None:
    seen: list[Any] = []

    def on_event(event: Any) -> None:
        seen.append(event[0])
        raise ZeroDivisionError

    producer, account = Producer({**NOWHERE, "message.timeout.ms": "60000"}, on_event), DeliveryAccount()
    producer.produce("t", b"x", account)

    def raised() -> bool:
        try:
            producer.serve(50)
        except ZeroDivisionError:
            return True
        return False

    wait_until(raised, 20, "an event of an unreachable broker")
    assert seen
    while True:
        try:
            producer.close(100)
        except ZeroDivisionError:
            continue
        break
    assert account.pending == 0


@SIZES
def test_an_unclosed_producer_warns_and_frees_everything(embedded_kafka: EmbeddedKafka, size: int) -> None:
    embedded_kafka.create_topic("t", 1)
    before = live_objects()
    producer = Producer({"bootstrap.servers": embedded_kafka.bootstrap_servers, "linger.ms": "0"})
    account = DeliveryAccount()
    producer.produce("t", fresh(size), account)
    assert producer.wait(account, 20)
    with pytest.warns(ResourceWarning, match="unclosed producer"):
        del producer
    assert live_objects() == before


@SIZES
def test_an_unclosed_producer_with_messages_on_their_way_releases_them(size: int) -> None:
    before = live_objects()
    values = [fresh(size) for _ in range(20)]
    counts = [sys.getrefcount(value) for value in values]
    producer, account = Producer({**NOWHERE, "message.timeout.ms": "60000"}), DeliveryAccount()
    for value in values:
        producer.produce("t", value, account)
    del value
    with pytest.warns(ResourceWarning, match="unclosed producer"):
        del producer
    assert live_objects() == before
    account.take_failures()
    assert [sys.getrefcount(value) for value in values] == counts


def test_a_producer_that_could_not_be_made() -> None:
    before = live_objects()
    for options in ({"no.such.property": "x"}, {"linger.ms": "-1"}, {"enable.idempotence": "true", "acks": "0"}):
        with pytest.raises(ConfigurationError):
            Producer(options)
    gc.collect()
    assert live_objects() == before


def test_an_account_may_outlive_its_producer(embedded_kafka: EmbeddedKafka) -> None:
    embedded_kafka.create_topic("t", 1)
    with producer_of(embedded_kafka) as (producer, account):
        producer.produce("t", b"x", account)
        assert producer.wait(account, 20)
    assert (account.delivered, account.pending) == (1, 0)
    with pytest.raises(ClosedError):
        producer.produce("t", b"x", account)


def test_many_threads_share_a_producer(embedded_kafka: EmbeddedKafka) -> None:
    import threading

    embedded_kafka.create_topic("t", 1)
    before = live_objects()["deliveries"]
    with producer_of(embedded_kafka) as (producer, _):
        accounts = [DeliveryAccount() for _ in range(4)]

        def send(account: DeliveryAccount) -> None:
            for number in range(500):
                producer.produce("t", b"%d" % number, account, timeout_ms=5000)
                if number % 100 == 0:
                    producer.serve(0)
            assert producer.wait(account, 20)

        threads = [threading.Thread(target=send, args=(account,)) for account in accounts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert [(account.delivered, account.pending) for account in accounts] == [(500, 0)] * 4
        assert live_objects()["deliveries"] == before


# --- loggers ---------------------------------------------------------------------------------------------------------


def logger_of(kafka: EmbeddedKafka, kind: Any = KafkaBatchLogger, **options: Any) -> Any:
    changes = {name: options.pop(name) for name in list(options) if name in ("max_message_bytes", "log_queue_messages")}
    log = kind(topic="t", timeout=20, settings=kafka.settings(idempotence=False, **changes), **options)
    kafka.create_topic("t", 1)
    return log


@SIZES
def test_a_logger_holds_what_it_was_given_until_it_is_delivered(embedded_kafka: EmbeddedKafka, size: int) -> None:
    log = logger_of(embedded_kafka)
    data, key, header, text = fresh(size), fresh(10), fresh(10), "t" * size + "."
    headers = [("h", header)]
    view = memoryview(data)[: size // 2]
    before = [sys.getrefcount(entry) for entry in (data, key, header, text, headers, view)]
    held = (sys.getrefcount(data), sys.getrefcount(key))
    embedded_kafka.set_latency(100)
    for _ in range(20):
        log.log(data)
        log.log(view, key=key, headers=headers, timestamp_ms=5)
        log.log(text, key=key)
    assert (sys.getrefcount(data), sys.getrefcount(key)) == (held[0] + 40, held[1] + 40)
    assert log.flush() == 60
    embedded_kafka.set_latency(0)
    assert [sys.getrefcount(entry) for entry in (data, key, header, text, headers, view)] == before
    assert live_objects()["deliveries"] == 0


def test_what_a_logger_refuses_is_released_at_once(embedded_kafka: EmbeddedKafka) -> None:
    log = logger_of(embedded_kafka, max_message_bytes=1000)
    data, key, header = fresh(500), fresh(10), fresh(10)
    before = [sys.getrefcount(entry) for entry in (data, key, header)]
    refused: list[dict[str, Any]] = [
        {"headers": [("good", header), ("bad", "text")]},
        {"headers": [("good", header), ("\ud800", header)]},
        {"headers": {"good": header, "bad": 5}},
        {"timestamp_ms": -1, "headers": [("good", header)]},
        {"topic": "not a topic", "headers": [("good", header)]},
        {"topic": "", "headers": [("good", header)]},
        {"headers": [("good", header), ("large", header)], "data": fresh(2000)},
    ]
    for given in refused * 20:
        with pytest.raises(UsageError):
            log.log(**{"data": data, "key": key, **given})
    del refused, given
    gc.collect()
    assert [sys.getrefcount(entry) for entry in (data, key, header)] == before
    assert log.produced_count == live_objects()["deliveries"] == 0


@SIZES
def test_futures_of_an_event_loop_are_released(embedded_kafka: EmbeddedKafka, size: int) -> None:
    log = logger_of(embedded_kafka, KafkaLogger)
    data = fresh(size)
    before = sys.getrefcount(data)
    futures: list[Any] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(log.alog(data, headers={"a": b"1"}) for _ in range(50)))
        future = log.submit(data, loop=loop)
        futures.append(weakref.ref(future))
        await future

    for _ in range(3):
        asyncio.run(main())
    gc.collect()
    assert [future() for future in futures] == [None] * 3
    assert sys.getrefcount(data) == before
    assert live_objects()["deliveries"] == 0


def test_a_logger_that_is_dropped_with_messages_under_way(embedded_kafka: EmbeddedKafka) -> None:
    log = logger_of(embedded_kafka)
    log.log(b"connected")
    log.flush()
    embedded_kafka.set_latency(200)
    data = fresh(LARGE)
    before = sys.getrefcount(data)
    for _ in range(10):
        log.log(data)
    gone = weakref.ref(log)
    del log
    gc.collect()
    assert gone() is None
    other = KafkaBatchLogger(topic="t", settings=embedded_kafka.settings(idempotence=False))
    wait_until(lambda: other.log(b"x") or sys.getrefcount(data) == before, 10, "the messages come back")
    embedded_kafka.set_latency(0)
    other.flush()


def test_a_key_of_a_subclass_is_held_as_plain_bytes(embedded_kafka: EmbeddedKafka) -> None:
    class Data(bytes): ...

    log = logger_of(embedded_kafka)
    data = Data(fresh(100))
    before = sys.getrefcount(data)
    log.log(data, key=data)
    log.flush()
    assert sys.getrefcount(data) == before
