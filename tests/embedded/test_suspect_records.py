"""The compiled loop under a supervisor: what it says to have in hand, and how it meets suspects."""

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from embedded_support import Feeder, topics, wait_until

from keven_core._native.consumer import Consumer
from keven_core._native.dispatch import DispatchTable, Route
from keven_core._native.message import Record
from keven_core._native.suspects import Suspects
from keven_core.kafka.errors import WorkerDiedError
from keven_core.testing import EmbeddedKafka

COUNT = 6


@pytest.fixture
def sides() -> Iterator[tuple[Suspects, Suspects]]:
    """The supervisor's and the worker's."""
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), Suspects.SIZE)
        yield Suspects(file.fileno(), fresh=True), Suspects(file.fileno())


Failure = tuple[Record, str, Exception]


@contextmanager
def consuming(
    kafka: EmbeddedKafka, worker: Suspects, handle: Callable[[Any], Any], **options: Any
) -> Iterator[tuple[Consumer, list[Failure]]]:
    """A consumer at the beginning of both partitions of a topic with COUNT records each, all of them in hand."""
    topics(kafka, "t", partitions=2)
    with Feeder(kafka) as feeder:
        for offset in range(COUNT):
            for partition in range(2):
                feeder.send("t", b"%d/%d" % (partition, offset), partition)
        feeder.wait()
    failures: list[Failure] = []
    table = DispatchTable((), everything=Route("*", handle, raw=True, is_async=asyncio.iscoroutinefunction(handle)))
    settings = {"bootstrap.servers": kafka.bootstrap_servers, "group.id": "g", "enable.auto.commit": "false"}
    consumer = Consumer(
        {**settings, "fetch.wait.max.ms": "10"},
        table,
        lambda *failure: failures.append(failure),
        suspects=worker,
        **options,
    )
    try:
        consumer.assign([("t", 0, 0), ("t", 1, 0)], True)
        wait_until(lambda: consumer.fetch(50) == 2 * COUNT, "all records are in hand")
        yield consumer, failures
    finally:
        consumer.close(2000)


def place_of(value: bytes) -> tuple[str, int, int]:
    partition, offset = map(int, value.split(b"/"))
    return ("t", partition, offset)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_the_record_in_hand_is_known_to_the_supervisor(
    embedded_kafka: EmbeddedKafka, sides: tuple[Suspects, Suspects], is_async: bool
) -> None:
    supervisor, worker = sides
    seen = []

    def handle(value: bytes) -> None:
        assert list(supervisor.in_hand().values()) == [place_of(value)]
        seen.append(value)
        if value.endswith(b"3"):
            raise ValueError("on purpose")

    async def handle_later(value: bytes) -> None:
        handle(value)
        await asyncio.sleep(0)
        assert list(supervisor.in_hand().values()) == [place_of(value)]

    async def run(consumer: Consumer) -> None:
        while (pending := consumer.run_in_task(None)) is not None:
            assert pending is not consumer.RETIRE
            try:
                await pending
            except ValueError as error:
                consumer.failed(error)

    with consuming(embedded_kafka, worker, handle_later if is_async else handle) as (consumer, failures):
        assert supervisor.beats > 0
        assert supervisor.in_hand() == {}
        if is_async:
            asyncio.run(run(consumer))
        else:
            consumer.run()
        assert supervisor.in_hand() == {}
        consumer.finish_batch()
        assert len(seen) == 2 * COUNT
        assert [str(failure[2]) for failure in failures] == ["on purpose"] * 2


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError], ids=lambda error: error.__name__)
def test_what_ends_the_process_leaves_its_record_in_hand(
    embedded_kafka: EmbeddedKafka, sides: tuple[Suspects, Suspects], error: type[BaseException]
) -> None:
    supervisor, worker = sides

    def handle(value: bytes) -> None:
        if value == b"1/2":
            raise error

    with consuming(embedded_kafka, worker, handle) as (consumer, failures):
        if error is MemoryError:  # of a handler it is a failure like others
            consumer.run()
            assert [type(failure[2]) for failure in failures] == [MemoryError]
            assert supervisor.in_hand() == {}
        else:
            with pytest.raises(error):
                consumer.run()
            assert failures == []
            assert list(supervisor.in_hand().values()) == [("t", 1, 2)]
        consumer.finish_batch()


def test_a_condemned_record_fails_without_being_handled(
    embedded_kafka: EmbeddedKafka, sides: tuple[Suspects, Suspects]
) -> None:
    supervisor, worker = sides
    supervisor.write_suspects([("t", 1, 2, 3, True, "it was killed by SIGKILL"), ("other", 1, 4, 3, True, "")])
    seen: list[bytes] = []
    with consuming(embedded_kafka, worker, seen.append) as (consumer, failures):
        consumer.run()
        assert b"1/2" not in seen
        assert len(seen) == 2 * COUNT - 1
        (record, stage, error) = failures[0]
        assert (record.topic, record.partition, record.offset, stage) == ("t", 1, 2, "handle")
        assert isinstance(error, WorkerDiedError)
        assert str(error) == (
            "worker processes have died with it 3 times, the last time: it was killed by SIGKILL; it was not handled "
            "again"
        )
        consumer.finish_batch()
        counts = consumer.ledger()["t", 1]
        assert (counts["received"], counts["done"], counts["dead"], counts["in_flight"]) == (COUNT, COUNT - 1, 1, 0)


def test_a_suspect_is_handled_alone_and_only_when_admitted(
    embedded_kafka: EmbeddedKafka, sides: tuple[Suspects, Suspects]
) -> None:
    supervisor, worker = sides
    supervisor.write_suspects([("t", 0, 2, 1, False, "it died"), ("t", 0, 3, 2, False, "it died")])
    seen: list[bytes] = []
    with consuming(embedded_kafka, worker, seen.append) as (consumer, failures):
        batches = []
        for _ in range(20):
            before = len(seen)
            consumer.run()
            # Not admitted: it stays where it is, however often it is tried.
            again = len(seen)
            if consumer.suspect_ahead:
                consumer.run()
                assert len(seen) == again
                assert supervisor.in_hand() == {}
            consumer.finish_batch()
            if len(seen) > before:
                batches.append(seen[before:])
            if consumer.suspect_ahead:
                consumer.admit_suspect()
            if not consumer.in_hand:
                break
        assert [b"0/2"] in batches
        assert [b"0/3"] in batches
        assert sorted(seen) == sorted(b"%d/%d" % (p, o) for p in range(2) for o in range(COUNT))
        assert [value for value in seen if value.startswith(b"0")] == [b"0/%d" % offset for offset in range(COUNT)]
        assert failures == []
