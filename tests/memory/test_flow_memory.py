"""Records in flight free everything, wherever they are when their partition is given up or the consumer closes."""

import contextvars
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from memory_support import LARGE, Item, consumer_of, fetch_some, fill, producer_of, table_of, value_of
from waiting import wait_until

from keven_core._native.consumer import Consumer
from keven_core._native.dispatch import DispatchTable, Route
from keven_core._native.flow import Flow, Worker
from keven_core._native.message import Record
from keven_core.kafka.outcomes import BatchError
from keven_core.testing import EmbeddedKafka

SIZES = pytest.mark.parametrize("size", [10, LARGE], ids=["copied", "shared"])
COUNT = 12


class Stage:
    """A consumer whose records are brought to one place in their flight."""

    def __init__(
        self, kafka: EmbeddedKafka, size: int, handle: Any, order: Any = "partition", window: int = 2000, **route: Any
    ) -> None:
        self.became: Any = "dead"
        self.refuse: Any = None
        self.broken: list[bool] = []  # not empty: the decoder of a batch handler raises
        fill(kafka, "t", [value_of(number, size) for number in range(COUNT)], key=b"k")
        self.context = contextvars.copy_context()
        self.consumer: Consumer = consumer_of(
            kafka,
            "t",
            table=self.table(handle, **route),
            context=self.context,
            on_failure=self.on_failure,
        )
        self.flow = Flow(self.consumer, order, window=window)
        self.worker = Worker(self.flow, self.context)
        got = 0
        while got < COUNT:
            got += fetch_some(self.consumer)
            self.flow.intake()
            self.consumer.finish_batch()

    def table(self, handle: Any, **route: Any) -> DispatchTable:
        """One route, whose decoder can be broken."""
        decode, broken = msgspec.json.Decoder(Item).decode, self.broken

        def decode_if_it_works(data: Any) -> Any:
            if broken:
                raise ValueError("the decoder is broken")
            return decode(data)

        if not route.get("batch_size"):
            return table_of(handle, **route)
        made = Route("ITEM", handle, decode_json=decode_if_it_works, decode_msgpack=decode_if_it_works, **route)
        return DispatchTable([made], name_json=lambda data: None, name_msgpack=lambda data: None)

    def on_failure(self, record: Any, stage: str, error: Exception) -> Any:
        """What the owner decides on a failure."""
        return self.refuse(record, stage, error) if self.refuse is not None else self.became

    def task(self) -> Any:
        """What a task of this worker would have to await."""
        context = self.context.copy()
        return context.run(self.worker.run_in_task, context, None)

    def counts(self) -> dict[str, int]:
        return {name: count for name, count in self.consumer.ledger()["t", 0].items() if count}


def nothing(item: Any) -> None:
    pass


async def nothing_async(item: Any) -> None:
    pass


def fails(item: Any) -> None:
    raise ValueError(item)


def waiting(kafka: EmbeddedKafka, size: int) -> Stage:
    """In their lane and in the ready queue."""
    return Stage(kafka, size, nothing)


def gathering(kafka: EmbeddedKafka, size: int) -> Stage:
    """In a batch that fills, one behind it that waits for its turn, and one that a worker could take."""
    return Stage(kafka, size, nothing, batch_size=5, batch_wait_ms=60_000)


def awaited(kafka: EmbeddedKafka, size: int) -> Stage:
    """One of them with a task."""
    stage = Stage(kafka, size, nothing_async, is_async=True)
    stage.task().close()
    assert stage.worker.record_in_hand().offset == 0
    return stage


def awaited_batch(kafka: EmbeddedKafka, size: int) -> Stage:
    """Several of them with a task."""
    stage = Stage(kafka, size, nothing_async, is_async=True, batch_size=5, batch_wait_ms=60_000)
    stage.task().close()
    assert [record.offset for record in stage.worker.records_in_hand()] == list(range(5))
    return stage


def failed(kafka: EmbeddedKafka, size: int) -> Stage:
    """One has failed, and the owner has not looked at it."""
    stage = Stage(kafka, size, fails)
    stage.worker.run()
    return stage


def failed_batch(kafka: EmbeddedKafka, size: int) -> Stage:
    """One of a batch has failed, those behind it are a batch again."""

    def stuck(items: list[Any]) -> None:
        raise BatchError(2)

    stage = Stage(kafka, size, stuck, batch_size=5, batch_wait_ms=60_000)
    stage.flow.stop_starting()
    return stage


def resting(kafka: EmbeddedKafka, size: int) -> Stage:
    """One rests until its next attempt, the others wait behind it."""
    stage = Stage(kafka, size, fails)
    stage.became = (60.0, 1, nothing)
    stage.worker.run()
    stage.flow.settle()
    return stage


def behind_an_open_one(kafka: EmbeddedKafka, size: int) -> Stage:
    """All but the first have landed."""
    stage = Stage(kafka, size, nothing_async, order="none", is_async=True)
    first, context = stage.task(), stage.context.copy()
    first.close()
    other = Worker(stage.flow, stage.context)
    pending = context.run(other.run_in_task, context, None)
    while pending is not None:
        pending.close()
        pending = context.run(other.run_in_task, context, None)
    assert stage.counts() == {"received": COUNT, "done": COUNT - 1, "in_flight": 1}
    assert stage.consumer.offsets()["t", 0][0] == -1
    return stage


def submitted(kafka: EmbeddedKafka, size: int) -> Stage:
    """Beside them a call that waits, and one that is with a task."""
    stage = Stage(kafka, size, nothing_async, order="none", is_async=True)
    for number in range(2):
        stage.flow.submit(nothing_async, None, True, Record("t", 0, number, key=b"k"), object())
    for _ in range(COUNT):
        stage.task().close()
    stage.task().close()
    assert stage.worker.record_in_hand().offset == 0
    return stage


PLACES: list[Callable[[EmbeddedKafka, int], Stage]] = [
    waiting,
    gathering,
    awaited,
    awaited_batch,
    failed,
    failed_batch,
    resting,
    behind_an_open_one,
    submitted,
]
BY_PLACE = pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)


@BY_PLACE
@SIZES
def test_closed(embedded_kafka: EmbeddedKafka, place: Any, size: int) -> None:
    stage = place(embedded_kafka, size)
    assert stage.consumer.close(5000)
    counts = stage.counts()
    assert counts.pop("received") == COUNT == sum(counts.values())


@BY_PLACE
@SIZES
def test_given_up_and_closed(embedded_kafka: EmbeddedKafka, place: Any, size: int) -> None:
    stage = place(embedded_kafka, size)
    stage.consumer.unassign([("t", 0)])
    counts = stage.counts()
    assert counts.pop("received") == COUNT == sum(counts.values())
    assert stage.flow.load == 0
    assert stage.consumer.close(5000)


@BY_PLACE
@SIZES
def test_its_tail_dropped_and_closed(embedded_kafka: EmbeddedKafka, place: Any, size: int) -> None:
    stage = place(embedded_kafka, size)
    stage.flow.drop_tail()
    assert stage.consumer.close(5000)


@BY_PLACE
@SIZES
def test_sought_and_fetched_again(embedded_kafka: EmbeddedKafka, place: Any, size: int) -> None:
    stage = place(embedded_kafka, size)
    before = stage.consumer.ledger()["t", 0]["done"]
    stage.consumer.seek([("t", 0, 0)])
    got = 0
    while got < COUNT:
        got += fetch_some(stage.consumer)
        stage.flow.intake()
        stage.consumer.finish_batch()
    assert stage.consumer.ledger()["t", 0]["done"] == before
    assert stage.consumer.ledger()["t", 0]["received"] == 2 * COUNT
    assert stage.consumer.close(5000)


@SIZES
def test_an_end_in_a_thread_that_still_runs(embedded_kafka: EmbeddedKafka, size: int) -> None:
    """The consumer closes under a handler that has kept its value."""
    entered, release = threading.Event(), threading.Event()
    seen: list[int] = []

    def handle(item: Any) -> None:
        entered.set()
        assert release.wait(20)
        seen.append(len(bytes(item.raw)))

    stage = Stage(embedded_kafka, size, handle)
    thread = threading.Thread(target=stage.worker.run)
    thread.start()
    assert entered.wait(20)
    assert stage.consumer.close(5000)
    release.set()
    thread.join()
    assert seen == [size + 2]


@SIZES
def test_many_threads_share_a_flow(embedded_kafka: EmbeddedKafka, size: int) -> None:
    seen: list[int] = []
    stage = Stage(embedded_kafka, size, lambda item: seen.append(item.number), order="none")
    workers = [Worker(stage.flow, stage.context) for _ in range(4)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == list(range(COUNT))
    assert stage.consumer.offsets()["t", 0][0] == COUNT
    assert stage.flow.idle
    assert stage.consumer.close(5000)


# --- ends that nobody planned ----------------------------------------------------------------------------------------


def test_nothing_is_taken_over_behind_what_was_given_up(embedded_kafka: EmbeddedKafka) -> None:
    """Or its offset would be stored past records that nobody has handled."""
    stage = Stage(embedded_kafka, 10, nothing)
    stage.flow.drop_tail()
    fill_more(embedded_kafka, COUNT)
    fetch_some(stage.consumer)
    stage.flow.intake()
    stage.worker.run()
    stage.consumer.finish_batch()
    assert stage.consumer.offsets()["t", 0][:2] == (-1, -1)
    counts = stage.counts()
    assert counts == {"received": counts["received"], "stale": counts["received"]}
    assert stage.consumer.close(5000)


def fill_more(kafka: EmbeddedKafka, start: int) -> None:
    with producer_of(kafka) as (producer, account):
        for number in range(start, start + 3):
            producer.produce("t", value_of(number, 10), account, partition=0)
        assert producer.wait(account, 20)


@SIZES
def test_a_failure_that_cant_be_reported_keeps_its_record_open(embedded_kafka: EmbeddedKafka, size: int) -> None:
    stage = Stage(embedded_kafka, size, fails, order="none")

    def refuse(record: Any, stage: str, error: Exception) -> None:
        raise OSError("the dead-letter topic is gone")

    stage.refuse = refuse
    stage.worker.run()
    with pytest.raises(OSError, match="dead-letter topic is gone"):
        stage.flow.settle()
    stage.flow.stop_starting()
    while stage.flow.busy():
        with pytest.raises(OSError, match="dead-letter topic is gone"):
            stage.flow.settle()
    stage.consumer.finish_batch()
    assert stage.consumer.offsets()["t", 0][:2] == (-1, -1)
    assert stage.consumer.close(5000)


@SIZES
def test_an_exception_that_ends_the_run_in_a_thread_is_the_owners(embedded_kafka: EmbeddedKafka, size: int) -> None:
    def leave(item: Any) -> None:
        raise SystemExit("the end")

    stage = Stage(embedded_kafka, size, leave)
    stage.worker.run()
    assert not stage.flow.busy()
    with pytest.raises(SystemExit, match="the end"):
        stage.flow.settle()
    assert stage.counts() == {"received": COUNT, "in_flight": COUNT}
    assert stage.consumer.close(5000)


def test_a_partition_that_was_held_is_resumed_when_it_comes_back(embedded_kafka: EmbeddedKafka) -> None:
    stage = Stage(embedded_kafka, 10, nothing, window=5)
    assert stage.flow.full
    wait_until(lambda: stage.flow.hold_back() == ([("t", 0)], []), 10, "it is stuck")
    assert stage.flow.holds("t", 0)
    assert not stage.flow.full
    stage.consumer.seek([("t", 0, 0)])
    assert stage.flow.holds("t", 0)
    assert stage.flow.hold_back() == ([], [("t", 0)])
    assert not stage.flow.holds("t", 0)
    assert stage.consumer.close(5000)


def test_a_rest_that_can_not_be_decoded_again_fails_by_itself(embedded_kafka: EmbeddedKafka) -> None:
    def stuck(items: list[Any]) -> None:
        stage.broken.append(True)
        raise BatchError(0)

    stage = Stage(embedded_kafka, 10, stuck, batch_size=COUNT, batch_wait_ms=60_000)
    stage.worker.run()
    stage.flow.settle()
    assert stage.counts() == {"received": COUNT, "dead": COUNT}
    assert stage.consumer.offsets()["t", 0][0] == COUNT
    assert stage.flow.idle
    assert stage.consumer.close(5000)
