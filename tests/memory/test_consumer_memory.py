"""Consumers free everything, however they end."""

import contextvars
import gc
import sys
import time
import weakref
from typing import Any

import msgspec
import pytest
from memory_support import LARGE, consumer_of, fetch_some, fill, handle_all, table_of, value_of
from waiting import wait_until

from keven_core._native.consumer import Consumer
from keven_core._native.library import live_objects
from keven_core.kafka.errors import ClosedError, ConfigurationError
from keven_core.testing import EmbeddedKafka

SIZES = pytest.mark.parametrize("size", [10, LARGE], ids=["copied", "shared"])


@SIZES
def test_handled_stored_and_closed(embedded_kafka: EmbeddedKafka, size: int) -> None:
    fill(embedded_kafka, "t", [value_of(i, size) for i in range(30)], key=b"k", headers=[("a", b"b"), ("c", None)])
    got: list[int] = []
    consumer = consumer_of(embedded_kafka, "t", table=table_of(lambda item: got.append(item.number)))
    handle_all(consumer, 30)
    assert got == list(range(30))
    assert live_objects()["messages"] == 0
    assert consumer.close(5000)


@SIZES
def test_closed_with_a_batch_that_was_never_looked_at(embedded_kafka: EmbeddedKafka, size: int) -> None:
    fill(embedded_kafka, "t", [value_of(i, size) for i in range(30)])
    consumer = consumer_of(embedded_kafka, "t", table=table_of(lambda item: None))
    count = fetch_some(consumer)
    assert live_objects()["messages"] == count
    assert consumer.close(5000)
    assert live_objects()["messages"] == 0


@SIZES
def test_closed_with_a_batch_that_was_handled_but_not_finished(embedded_kafka: EmbeddedKafka, size: int) -> None:
    fill(embedded_kafka, "t", [value_of(i, size) for i in range(30)])
    consumer = consumer_of(embedded_kafka, "t", table=table_of(lambda item: None))
    fetch_some(consumer)
    consumer.run()
    assert consumer.close(5000)
    assert live_objects()["messages"] == 0


@SIZES
def test_closed_with_prefetched_messages(embedded_kafka: EmbeddedKafka, size: int) -> None:
    fill(embedded_kafka, "t", [value_of(i, size) for i in range(30)])
    consumer = consumer_of(embedded_kafka, "t", table=table_of(lambda item: None), batch_size=1)
    assert fetch_some(consumer) == 1
    assert consumer.close(5000)


@SIZES
def test_handlers_that_raise(embedded_kafka: EmbeddedKafka, size: int) -> None:
    fill(embedded_kafka, "t", [value_of(i, size) for i in range(10)])
    failed: list[tuple[int, int, str]] = []

    def handle(item: Any) -> None:
        if item.number % 2:
            raise ValueError(item.number)

    def on_failure(record: Any, stage: str, error: Exception) -> None:
        failed.append((record.offset, len(record.value), stage))

    consumer = consumer_of(embedded_kafka, "t", table=table_of(handle), on_failure=on_failure)
    handle_all(consumer, 10)
    assert failed == [(i, len(value_of(i, size)), "handle") for i in (1, 3, 5, 7, 9)]
    assert consumer.ledger()["t", 0]["dead"] == 5
    assert consumer.close(5000)


@SIZES
def test_values_that_cant_be_decoded(embedded_kafka: EmbeddedKafka, size: int) -> None:
    bad = b'{"event_name":"ITEM","number":"no","raw":"%s"}' % (b"x" * size)
    fill(embedded_kafka, "t", [bad, value_of(1, size), bad[:-2], None, b"", value_of(5)])
    stages: list[str] = []
    consumer = consumer_of(
        embedded_kafka, "t", table=table_of(lambda item: None), on_failure=lambda r, stage, e: stages.append(stage)
    )
    handle_all(consumer, 6)
    counts = consumer.ledger()["t", 0]
    assert (counts["done"], counts["dead"], counts["tombstones"]) == (2, 3, 1)
    assert stages == ["decode"] * 3
    assert consumer.close(5000)


@SIZES
def test_a_failure_that_cant_be_reported_ends_the_batch(embedded_kafka: EmbeddedKafka, size: int) -> None:
    fill(embedded_kafka, "t", [value_of(i, size) for i in range(10)])

    def handle(item: Any) -> None:
        if item.number == 3:
            raise ValueError("no")

    def on_failure(record: Any, stage: str, error: Exception) -> None:
        raise OSError("the dead-letter topic is gone")

    consumer = consumer_of(embedded_kafka, "t", table=table_of(handle), on_failure=on_failure)
    with pytest.raises(OSError, match="dead-letter topic is gone"):
        handle_all(consumer, 10)
    assert consumer.ledger()["t", 0]["done"] == 3
    assert consumer.close(5000)


@SIZES
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_handler(embedded_kafka: EmbeddedKafka, size: int, error: type[BaseException]) -> None:
    fill(embedded_kafka, "t", [value_of(i, size) for i in range(10)])

    def handle(item: Any) -> None:
        if item.number == 3:
            raise error

    consumer = consumer_of(embedded_kafka, "t", table=table_of(handle))
    with pytest.raises(error):
        handle_all(consumer, 10)
    assert consumer.ledger()["t", 0]["done"] == 3
    consumer.finish_batch()
    assert consumer.offsets()["t", 0][:2] == (3, 3)
    assert consumer.close(5000)


def test_references_of_handlers_and_events_return(embedded_kafka: EmbeddedKafka) -> None:
    fill(embedded_kafka, "t", [value_of(i, LARGE * (i % 2)) for i in range(40)])
    error = ValueError("the same each time")

    def handle(item: Any) -> None:
        if not item.number % 5:
            raise error

    def on_failure(record: Any, stage: str, error: Exception) -> None: ...

    table = table_of(handle)
    watched = (handle, on_failure, table, table.routes["ITEM"], error)
    before = [sys.getrefcount(entry) for entry in watched]
    consumer = consumer_of(embedded_kafka, "t", table=table, on_failure=on_failure)
    handle_all(consumer, 40)
    assert consumer.close(5000)
    del consumer
    error.__traceback__ = None
    gc.collect()
    assert [sys.getrefcount(entry) for entry in watched] == before


# --- batches that take long -------------------------------------------------------------------------------------------


def _slowly(kafka: EmbeddedKafka, size: int, count: int, seconds: float) -> tuple[Consumer, list[int]]:
    """A consumer with a batch of `count` in hand whose handlers take their time, run for one slice."""
    fill(kafka, "t", [value_of(i, size) for i in range(count)])
    got: list[int] = []

    def handle(item: Any) -> None:
        time.sleep(seconds)
        got.append(item.number)

    consumer = consumer_of(kafka, "t", table=table_of(handle))
    deadline = time.monotonic() + 20
    while consumer.in_hand < count and time.monotonic() < deadline:
        fetched = consumer.fetch(100)
        assert fetched == consumer.in_hand
    consumer.run()
    return consumer, got


@SIZES
def test_a_slow_batch_is_handled_in_slices(embedded_kafka: EmbeddedKafka, size: int) -> None:
    consumer, got = _slowly(embedded_kafka, size, 12, 0.06)
    first = len(got)
    assert 1 <= first < 12
    assert consumer.finish_batch() == 1
    assert consumer.in_hand == live_objects()["messages"] == 12 - first
    with pytest.raises(LookupError):
        consumer.record_in_hand()  # none is being handled
    assert consumer.offsets()["t", 0][:2] == (first, first)
    slices = 1
    while consumer.in_hand:
        consumer.fetch(0)
        consumer.run()
        consumer.finish_batch()
        slices += 1
    assert got == list(range(12))
    assert slices > 2
    counts = consumer.ledger()["t", 0]
    assert (counts["received"], counts["done"]) == (12, 12)
    assert consumer.close(5000)


def test_a_quick_batch_is_one_slice(embedded_kafka: EmbeddedKafka) -> None:
    consumer, got = _slowly(embedded_kafka, 10, 100, 0)
    assert len(got) == 100
    assert consumer.close(5000)


@SIZES
def test_what_is_left_in_hand_goes_with_its_partition(embedded_kafka: EmbeddedKafka, size: int) -> None:
    consumer, got = _slowly(embedded_kafka, size, 12, 0.06)
    consumer.finish_batch()
    first = len(got)
    assert consumer.in_hand == 12 - first
    consumer.unassign([("t", 0)])
    assert consumer.in_hand == live_objects()["messages"] == 0
    consumer.assign([("t", 0, first)], True)
    handle_all(consumer, 12)
    assert got == list(range(12))
    assert consumer.close(5000)


@SIZES
def test_a_batch_that_is_finished_unstored_is_freed_and_stored_later(embedded_kafka: EmbeddedKafka, size: int) -> None:
    fill(embedded_kafka, "t", [value_of(i, size) for i in range(30)])
    got: list[int] = []
    consumer = consumer_of(embedded_kafka, "t", table=table_of(lambda item: got.append(item.number)), batch_size=10)
    waiting: list[tuple[str, int, int, int]] = []
    while len(got) < 30:
        fetch_some(consumer)
        consumer.run()
        waiting += consumer.finish_batch_unstored()
        assert live_objects()["messages"] == 0  # offsets may wait, messages do not
    assert [offset for _, _, offset, _ in waiting] == sorted({offset for _, _, offset, _ in waiting})
    assert (waiting[-1][:3], consumer.uncommitted()) == (("t", 0, 30), [])
    before = live_objects()["partition_lists"]
    consumer.store([])
    consumer.store(waiting[:1])
    assert consumer.uncommitted() == [waiting[0][:3]]
    consumer.store(waiting)
    consumer.store(waiting[:1])  # never back
    assert consumer.uncommitted() == [("t", 0, 30)]
    assert live_objects()["partition_lists"] == before
    assert consumer.finish_batch_unstored() == []  # nothing was handled since
    assert consumer.close(5000)
    with pytest.raises(ClosedError):
        consumer.store(waiting)


def test_offsets_of_partitions_that_were_given_up_are_not_stored(embedded_kafka: EmbeddedKafka) -> None:
    for topic in ("t", "u"):
        fill(embedded_kafka, topic, [value_of(i) for i in range(5)])
    got: list[int] = []
    consumer = consumer_of(embedded_kafka, "t", "u", table=table_of(lambda item: got.append(item.number)))
    waiting: list[tuple[str, int, int, int]] = []
    while len(got) < 10:
        fetch_some(consumer)
        consumer.run()
        waiting += consumer.finish_batch_unstored()
    consumer.assign([("t", 0, 5)], True)
    before = live_objects()["partition_lists"]
    consumer.store(waiting)
    assert {entry[:2] for entry in consumer.uncommitted()} <= {("t", 0)}
    consumer.store([("never heard of", 7, 1, -1)])
    assert live_objects()["partition_lists"] == before
    for broken in ([("t", 0)], [None], [("t", "x", 1, 2)], None, [(b"t", 0, 1, 2)]):
        with pytest.raises((TypeError, ValueError)):
            consumer.store(broken)  # type: ignore[arg-type]
    assert live_objects()["partition_lists"] == before
    assert consumer.close(5000)


def test_without_a_confirmation_the_offset_stays_at_the_first_failed_record(embedded_kafka: EmbeddedKafka) -> None:
    fill(embedded_kafka, "t", [value_of(i) for i in range(10)])
    got: list[int] = []

    def handle(item: Any) -> None:
        got.append(item.number)
        if item.number == 4:
            raise ZeroDivisionError

    def on_failure(record: Any, stage: str, error: Exception) -> None: ...

    consumer = consumer_of(embedded_kafka, "t", table=table_of(handle), on_failure=on_failure)
    while len(got) < 10:
        fetch_some(consumer)
        consumer.run()
    assert consumer.first_failures() == {("t", 0): 4}
    [entry] = consumer.finish_batch_unstored()
    assert entry[:3] == ("t", 0, 10)
    assert consumer.first_failures() == {}
    assert consumer.close(5000)


@SIZES
def test_seek_drops_what_is_left_in_hand(embedded_kafka: EmbeddedKafka, size: int) -> None:
    consumer, got = _slowly(embedded_kafka, size, 12, 0.06)
    consumer.finish_batch()
    first = len(got)
    consumer.seek([("t", 0, 10)])
    assert consumer.in_hand == 0
    handle_all(consumer, first + 2)
    assert got == [*range(first), 10, 11]
    assert consumer.close(5000)


@SIZES
def test_closed_with_a_part_of_a_batch_in_hand(embedded_kafka: EmbeddedKafka, size: int) -> None:
    consumer, _ = _slowly(embedded_kafka, size, 12, 0.06)
    consumer.finish_batch()
    assert consumer.in_hand > 0
    assert consumer.close(5000)
    assert live_objects()["messages"] == 0


# --- messages that wait to be freed -----------------------------------------------------------------------------------


def test_finished_messages_are_freed_by_the_thread_that_fetches(embedded_kafka: EmbeddedKafka) -> None:
    fill(embedded_kafka, "t", [value_of(i) for i in range(100)])
    consumer = consumer_of(embedded_kafka, "t", table=table_of(lambda item: None))
    handle_all(consumer, 100)
    assert live_objects()["messages"] == 0
    # Answers of the broker keep coming while nothing is to be had, every fetch.wait.max.ms.
    wait_until(lambda: consumer.returned_bytes == 0)
    assert consumer.close(5000)
    assert consumer.returned_bytes == 0


def test_finished_messages_do_not_pile_up_without_a_broker(embedded_kafka: EmbeddedKafka) -> None:
    topics = ["a", "b", "c", "d"]
    for topic in topics:
        fill(embedded_kafka, topic, [value_of(i, 200_000) for i in range(20)])
    consumer = consumer_of(embedded_kafka, *topics, table=table_of(lambda item: None), batch_size=1)
    fetch_some(consumer)
    # An empty answer means that everything has been fetched; then nobody frees it but the consumer itself.
    wait_until(lambda: embedded_kafka.requests().get("Fetch", 0) > 30)
    embedded_kafka.broker_down()
    sizes = []
    while True:
        consumer.run()
        consumer.finish_batch()
        sizes.append(consumer.returned_bytes)
        if not consumer.fetch(200):
            break
    assert len(sizes) == 80
    assert 7 << 20 < max(sizes) <= 8 << 20
    assert consumer.close(5000)


# --- values that outlive their batch ----------------------------------------------------------------------------------


def test_a_value_that_is_kept_is_safe_after_the_batch_and_after_close(embedded_kafka: EmbeddedKafka) -> None:
    fill(embedded_kafka, "t", [value_of(i, LARGE) for i in range(20)])
    before = live_objects()
    kept: list[Any] = []
    consumer = consumer_of(embedded_kafka, "t", table=table_of(lambda item: kept.append(item.raw)))
    handle_all(consumer, 20)
    assert live_objects()["payloads"] == 20
    del kept[5:]
    assert live_objects()["payloads"] == 5
    assert consumer.close(5000)
    # The client is gone for us, and freed with the last value.
    now = live_objects()
    assert (now["payloads"], now["clients"] - before["clients"]) == (5, 1)
    with pytest.raises(ClosedError):
        consumer.fetch(0)
    del consumer
    gc.collect()
    for raw in kept:
        assert msgspec.json.decode(raw) == "x" * LARGE
    del raw
    while kept:
        assert live_objects()["clients"] - before["clients"] == 1
        kept.pop()
    assert live_objects() == before


@SIZES
@pytest.mark.parametrize("fails", [False, True])
def test_a_decoder_that_keeps_what_it_was_given(embedded_kafka: EmbeddedKafka, size: int, fails: bool) -> None:
    from keven_core._native.dispatch import DispatchTable, Route

    values = [value_of(i, size) for i in range(6)]
    fill(embedded_kafka, "t", list(values))
    views: list[memoryview] = []
    handled: list[bytes] = []

    def decode(data: Any) -> bytes:
        views.append(memoryview(data))
        if fails:
            raise ValueError("no")
        return bytes(data)

    route = Route("ITEM", handled.append, decode_json=decode, decode_msgpack=decode)
    table = DispatchTable([route])
    failed: list[bytes] = []
    consumer = consumer_of(
        embedded_kafka, "t", table=table, on_failure=lambda record, stage, error: failed.append(record.value)
    )
    handle_all(consumer, 6)
    assert consumer.close(5000)
    assert (failed if fails else handled) == values
    # Each value was seen, some twice: those that were copied after it turned out that they are kept.
    assert {bytes(view) for view in views} == set(values)
    assert [bytes(view) for view in views][-1] == values[-1]
    views.clear()
    assert live_objects()["payloads"] == 0


def test_a_view_of_a_raw_handler_is_a_copy(embedded_kafka: EmbeddedKafka) -> None:
    from keven_core._native.dispatch import DispatchTable, Route

    fill(embedded_kafka, "t", [value_of(0, LARGE)])
    kept: list[bytes] = []
    table = DispatchTable((), everything=Route("*", kept.append, raw=True))
    consumer = consumer_of(embedded_kafka, "t", table=table)
    handle_all(consumer, 1)
    assert live_objects()["payloads"] == 0
    assert consumer.close(5000)
    assert kept == [value_of(0, LARGE)]


def test_a_kept_value_in_a_cycle_is_collected(embedded_kafka: EmbeddedKafka) -> None:
    fill(embedded_kafka, "t", [value_of(0, LARGE)])

    class Holder:
        raw: Any
        me: Any

    holders: list[Any] = []

    def handle(item: Any) -> None:
        holder = Holder()
        holder.raw, holder.me = item.raw, holder
        holders.append(weakref.ref(holder))

    gc.collect()
    gc.disable()
    try:
        consumer = consumer_of(embedded_kafka, "t", table=table_of(handle))
        handle_all(consumer, 1)
        assert consumer.close(5000)
        assert live_objects()["payloads"] == 1
    finally:
        gc.enable()
    gc.collect()
    assert holders[0]() is None
    assert live_objects()["payloads"] == 0


# --- async -----------------------------------------------------------------------------------------------------------


def _async_consumer(kafka: EmbeddedKafka, size: int, handle: Any) -> tuple[Consumer, contextvars.Context]:
    fill(kafka, "t", [value_of(i, size) for i in range(5)])
    base = contextvars.copy_context()
    consumer = consumer_of(kafka, "t", table=table_of(handle, is_async=True), context=base)
    fetch_some(consumer)
    return consumer, base.copy()


@SIZES
def test_unassigned_while_a_coroutine_is_out(embedded_kafka: EmbeddedKafka, size: int) -> None:
    async def handle(item: Any) -> None: ...

    consumer, context = _async_consumer(embedded_kafka, size, handle)
    coroutine = context.run(consumer.run_in_task, context)
    coroutine.close()
    del coroutine
    assert consumer.finish_batch() == 0
    consumer.unassign([("t", 0)])
    assert consumer.in_hand == live_objects()["messages"] == 0
    assert consumer.close(5000)


@SIZES
def test_closed_while_a_coroutine_is_out(embedded_kafka: EmbeddedKafka, size: int) -> None:
    async def handle(item: Any) -> None: ...

    consumer, context = _async_consumer(embedded_kafka, size, handle)
    coroutine = context.run(consumer.run_in_task, context)
    coroutine.close()
    assert consumer.record_in_hand().offset == 0
    assert consumer.close(5000)
    assert consumer.ledger()["t", 0]["done"] == 0


@SIZES
def test_a_coroutine_that_fails(embedded_kafka: EmbeddedKafka, size: int) -> None:
    async def handle(item: Any) -> None:
        raise ValueError(item.number)

    failed: list[int] = []
    fill(embedded_kafka, "t", [value_of(i, size) for i in range(5)])
    base = contextvars.copy_context()
    consumer = consumer_of(
        embedded_kafka,
        "t",
        table=table_of(handle, is_async=True),
        context=base,
        on_failure=lambda record, stage, error: failed.append(record.offset),
    )
    context = base.copy()
    while len(failed) < 5:
        fetch_some(consumer)
        while True:
            pending = context.run(consumer.run_in_task, context)
            assert pending is not consumer.RETIRE
            if pending is None:
                break
            with pytest.raises(ValueError) as caught:
                pending.send(None)
            consumer.failed(caught.value)
        consumer.finish_batch()
    del caught, pending
    assert failed == [0, 1, 2, 3, 4]
    assert consumer.close(5000)


# --- ends that are no ends -------------------------------------------------------------------------------------------


@SIZES
@pytest.mark.parametrize("state", ["idle", "batch in hand", "handled"])
def test_an_unclosed_consumer_warns_and_frees_everything(embedded_kafka: EmbeddedKafka, size: int, state: str) -> None:
    fill(embedded_kafka, "t", [value_of(i, size) for i in range(30)])
    before = live_objects()
    consumer = consumer_of(embedded_kafka, "t", table=table_of(lambda item: None))
    if state != "idle":
        fetch_some(consumer)
    if state == "handled":
        consumer.run()
    with pytest.warns(ResourceWarning, match="unclosed consumer"):
        del consumer
    assert live_objects() == before


def test_an_unclosed_member_of_a_group_warns_and_frees_everything(embedded_kafka: EmbeddedKafka) -> None:
    fill(embedded_kafka, "t", [value_of(i) for i in range(30)])
    before = live_objects()
    consumer = consumer_of(embedded_kafka, table=table_of(lambda item: None))
    consumer.subscribe(["t"])
    _join(consumer)
    with pytest.warns(ResourceWarning, match="unclosed consumer"):
        del consumer
    assert live_objects() == before


def _join(consumer: Consumer) -> None:
    deadline = time.monotonic() + 20
    while True:
        consumer.fetch(50)
        consumer.finish_batch()
        for kind, partitions, _ in consumer.take_notes():
            if kind == "assign":
                consumer.assign(partitions)
                return
        assert time.monotonic() < deadline, "the group was not joined"


def test_a_member_of_a_group_that_closes_with_notes_unread(embedded_kafka: EmbeddedKafka) -> None:
    fill(embedded_kafka, "t", [value_of(i) for i in range(30)])
    consumer = consumer_of(embedded_kafka, table=table_of(lambda item: None))
    consumer.subscribe(["t"])
    deadline = time.monotonic() + 20
    while not consumer.noted:
        consumer.fetch(50)
        assert time.monotonic() < deadline
    assert consumer.close(5000)


def test_many_assignments(embedded_kafka: EmbeddedKafka) -> None:
    names = [f"t{i}" for i in range(40)]
    for name in names:
        fill(embedded_kafka, name, [value_of(1)])
    consumer = consumer_of(embedded_kafka, *names, table=table_of(lambda item: None))
    handle_all(consumer, 40)
    for start in range(0, 40, 10):
        consumer.assign([(name, 0, 0) for name in names[start : start + 10]], True)
        assert len(consumer.assignment()) == 10
    consumer.unassign([])
    assert consumer.assignment() == []
    assert len(consumer.ledger()) == 40
    assert consumer.close(5000)


@pytest.mark.parametrize(
    "options",
    [
        {"no.such.property": "x"},
        {"session.timeout.ms": "99999999"},
        {"session.timeout.ms": "6000", "max.poll.interval.ms": "1000"},
        {"ssl.ca.location": "/no/such/file", "security.protocol": "ssl"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_consumer_that_could_not_be_made(options: dict[str, str]) -> None:
    before = live_objects()
    with pytest.raises(ConfigurationError):
        Consumer({"group.id": "g", **options})
    gc.collect()
    assert live_objects() == before


def test_questions_that_fail_leave_nothing(embedded_kafka: EmbeddedKafka) -> None:
    from keven_core.kafka.errors import KafkaError

    embedded_kafka.create_topic("t", 1)
    consumer = consumer_of(embedded_kafka, "t", table=table_of(lambda item: None))
    for ask in (
        lambda: consumer.pause([("nope", 5)]),
        lambda: consumer.seek([("nope", 5, 0)], 200),
        lambda: consumer.watermarks("nope", 7, 500),
        lambda: consumer.offsets_for_times([("nope", 7, 0)], 500),
    ):
        with pytest.raises(KafkaError):
            ask()
    assert consumer.committed([("t", 0)], 2000) == [("t", 0, -1001)]
    assert consumer.metadata(2000)["t"] == 1
    assert live_objects()["partition_lists"] == 0
    assert consumer.close(5000)
