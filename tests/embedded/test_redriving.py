"""Redrive on an embedded broker: what is written where, what is committed, rates, failures, and the command line."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from embedded_support import (
    DEAD,
    QUICK,
    Message,
    Stored,
    committed,
    event,
    group_server,
    live,
    quick,
    read,
    send,
    topics,
    values,
    wait_until,
)

from keven_core.kafka._redriving import Run
from keven_core.kafka.abstracts.event_handler import EventHandler
from keven_core.kafka.errors import (
    BrokerUnavailableError,
    CommitError,
    RedriveError,
    UnknownTopicError,
)
from keven_core.kafka.redrive import REDRIVE_COUNT, Redrive, RedriveReport
from keven_core.testing import EmbeddedKafka

ORDERS = "orders"
PARKING = "parking"
TOO_LARGE, NOT_COORDINATOR, NOT_ALLOWED = 10, 16, 30


@pytest.fixture
def kafka(embedded_kafka: EmbeddedKafka) -> EmbeddedKafka:
    topics(embedded_kafka, ORDERS, PARKING, partitions=2)
    return embedded_kafka


def from_orders(number: int, *more: tuple[str, bytes], partition: int = 1, name: str = "A") -> Message:
    """A letter of a record that came from a partition of ORDERS."""
    headers = [
        ("traceparent", b"00-1"),
        ("kafka_dlt-original-topic", ORDERS.encode()),
        ("kafka_dlt-original-partition", struct.pack(">i", partition)),
        ("kafka_dlt-original-timestamp", struct.pack(">q", 1_700_000_000_000 + number)),
        ("kafka_dlt-exception-fqcn", b"shop.OrderError"),
        ("kafka_dlt-exception-message", b"no stock"),
        *more,
    ]
    return Message(event(name, number=number), b"k", headers, 1_700_000_000_000 + number)


def redrive(kafka: EmbeddedKafka, **options: Any) -> RedriveReport:
    return Redrive(DEAD, **options).run(settings=quick(kafka))


def numbers(found: list[Stored]) -> list[int]:
    return [json.loads(entry.value or b"")["number"] for entry in found]


GROUP = Redrive(DEAD).group_id


def test_copies_go_home_with_what_was_theirs(kafka: EmbeddedKafka) -> None:
    send(kafka, DEAD, *map(from_orders, range(5)))
    send(kafka, DEAD, *map(from_orders, range(5, 8)), Message(None, b"gone", from_orders(8).headers), partition=1)
    report = redrive(kafka)
    assert (report.read, report.matched, report.redriven, report.complete) == (9, 9, 9, True)
    assert report.by_origin == {(ORDERS, "shop.OrderError"): {"redriven": 9}}
    found = read(kafka, ORDERS)
    assert len(found) == 9
    assert {entry.partition for entry in found} == {1}
    tombstone = next(entry for entry in found if entry.key == b"gone")
    assert tombstone.value is None
    found.remove(tombstone)
    assert sorted(numbers(found)) == list(range(8))
    for entry in found:
        number = numbers([entry])[0]
        assert entry.key == b"k"
        assert entry.timestamp[1] == 1_700_000_000_000 + number
        assert entry.headers == [("traceparent", b"00-1"), (REDRIVE_COUNT, b"1")]
    assert numbers([entry for entry in found if numbers([entry])[0] < 5]) == list(range(5))  # in order
    assert committed(kafka, GROUP, DEAD) == {0: 5, 1: 4}
    assert len(read(kafka, DEAD)) == 9  # they stay


def test_the_next_run_goes_on_and_another_group_reads_again(kafka: EmbeddedKafka) -> None:
    send(kafka, DEAD, from_orders(0), from_orders(1, name="B"))
    assert redrive(kafka, event_names="A").skipped == {"event": 1}
    # What was skipped has been passed.
    again = redrive(kafka)
    assert (again.read, again.complete) == (0, True)
    send(kafka, DEAD, from_orders(2))
    assert redrive(kafka).redriven == 1
    assert numbers(read(kafka, ORDERS)) == [0, 2]
    assert redrive(kafka, event_names="B", from_beginning=True).redriven == 1
    assert redrive(kafka, event_names="B", group_id="other").redriven == 1
    assert numbers(read(kafka, ORDERS)) == [0, 2, 1, 1]


def test_offsets_of_letters_that_have_gone_are_no_position(kafka: EmbeddedKafka) -> None:
    import confluent_kafka

    send(kafka, DEAD, from_orders(0))
    client = confluent_kafka.Consumer({"bootstrap.servers": kafka.bootstrap_servers, "group.id": GROUP, **QUICK})
    client.commit(offsets=[confluent_kafka.TopicPartition(DEAD, 0, 50)], asynchronous=False)
    client.close()
    assert redrive(kafka).redriven == 1


def test_a_dry_run_writes_and_commits_nothing(kafka: EmbeddedKafka) -> None:
    send(kafka, DEAD, from_orders(0), from_orders(1, (REDRIVE_COUNT, b"3")), Message(b"stray"))
    kafka.requests()
    report = redrive(kafka, dry_run=True, parking_topic=PARKING)
    assert {"OffsetCommit", "Produce"}.isdisjoint(kafka.requests())
    assert (report.dry_run, report.redriven, report.parked, report.left) == (True, 1, 1, {"no origin": 1})
    assert read(kafka, ORDERS) == read(kafka, PARKING) == []
    assert committed(kafka, GROUP, DEAD) == {}
    # The real run does what the dry one has said.
    real = redrive(kafka, parking_topic=PARKING)
    assert real.by_origin == report.by_origin
    assert len(read(kafka, ORDERS)) == len(read(kafka, PARKING)) == 1


@pytest.mark.logs_errors
def test_a_record_that_fails_again_and_again_is_parked(kafka: EmbeddedKafka, handler_registry: Any) -> None:
    """The whole way: server, dead-letter topic, redrive, and round again."""
    seen: list[int] = []

    class Order(EventHandler):
        event_name = "ORDER"

        def handle_event(self, event: Any) -> None:
            seen.append(event.number)
            raise ValueError("not in stock")

    send(kafka, ORDERS, Message(event("ORDER", number=7), b"k", [("traceparent", b"00-1")]), partition=1)
    with live(group_server(kafka, ORDERS)):
        for count in range(1, 4):
            wait_until(lambda count=count: len(values(kafka, DEAD)) == count, "it is dead-lettered")
            report = redrive(kafka, max_redrives=2, parking_topic=PARKING)
            assert report.read == 1
            assert (report.redriven, report.parked) == ((1, 0) if count < 3 else (0, 1))
    assert seen == [7, 7, 7]
    [parked] = read(kafka, PARKING)
    assert parked.value == event("ORDER", number=7)
    assert parked.header(REDRIVE_COUNT) == b"2"
    assert parked.header("traceparent") == b"00-1"
    assert parked.header("kafka_dlt-exception-message") == b"not in stock"
    # Each time it was a record of its own, so its letter names its own offset.
    origins = [struct.unpack(">q", entry.header("kafka_dlt-original-offset") or b"")[0] for entry in read(kafka, DEAD)]
    assert origins == [0, 1, 2]


def test_what_goes_nowhere_is_reported(kafka: EmbeddedKafka) -> None:
    gone = Message(b"x", None, [("kafka_dlt-original-topic", b"no-such-topic")])
    send(kafka, DEAD, Message(b"stray"), gone, from_orders(0, (REDRIVE_COUNT, b"3")), from_orders(1))
    report = redrive(kafka)
    assert report.left == {"no origin": 1, "no topic no-such-topic": 1, "redriven 3 times or more": 1}
    assert numbers(read(kafka, ORDERS)) == [1]
    assert committed(kafka, GROUP, DEAD) == {0: 4}


def test_another_topic_takes_them_all(kafka: EmbeddedKafka) -> None:
    send(kafka, DEAD, Message(b"stray"), from_orders(0))
    assert redrive(kafka, to_topic=PARKING).redriven == 2
    found = {entry.value: entry.headers for entry in read(kafka, PARKING)}
    assert found[b"stray"] == [(REDRIVE_COUNT, b"1")]
    assert ("kafka_dlt-original-topic", ORDERS.encode()) in found[event("A", number=0)]


# --- the rate, by a clock of the test --------------------------------------------------------------------------------


class Clock(Event):
    """Time goes on only while somebody waits for the event."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.waits: list[float] = []
        self.stop_after = -1

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.now += timeout
        self.waits.append(timeout)
        if len(self.waits) == self.stop_after:
            self.set()
        return self.is_set()


def test_the_rate_is_kept_and_what_waits_is_committed_first(kafka: EmbeddedKafka) -> None:
    send(kafka, DEAD, *map(from_orders, range(8)), Message(b"stray"))
    clock = Clock()
    seen: list[dict[int, int]] = []

    def now() -> float:
        seen.append(committed(kafka, GROUP, DEAD))
        return clock.now

    settings = quick(kafka, commit_interval_ms=1000)
    Run(Redrive(DEAD, rate=2), settings, kafka.bootstrap_servers, clock, now).run()
    # Seven pauses for eight copies; what is left waits for nobody.
    assert clock.waits == [0.5] * 7
    # Never more than a second's worth is at risk while it waits.
    assert [entry.get(0, 0) for entry in seen[-1:]] == [9]
    assert {2, 4, 6} <= {entry.get(0, 0) for entry in seen}


def test_stopped_while_it_waits_it_ends_in_order(kafka: EmbeddedKafka) -> None:
    send(kafka, DEAD, *map(from_orders, range(8)))
    clock = Clock()
    clock.stop_after = 3
    report = Run(Redrive(DEAD, rate=2), quick(kafka), kafka.bootstrap_servers, clock, lambda: clock.now).run()
    assert (report.redriven, report.complete) == (3, False)
    assert committed(kafka, GROUP, DEAD) == {0: 3}
    assert redrive(kafka).redriven == 5
    assert numbers(read(kafka, ORDERS)) == list(range(8))


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_copy_that_is_refused_stops_the_run_and_its_offset_stays(kafka: EmbeddedKafka) -> None:
    send(kafka, DEAD, *map(from_orders, range(4)))
    send(kafka, DEAD, from_orders(4), partition=1)
    settings = quick(kafka, batch_size=2)
    kafka.push_errors("Produce", [0, TOO_LARGE])
    with pytest.raises(RedriveError, match=r"letter\(s\) of kafka_server\.svc\.dead could not be copied: \[") as raised:
        Redrive(DEAD).run(settings=settings)
    error = raised.value
    assert error.name == ""
    assert "was not delivered" in str(error)
    assert "their offsets stay: run it again" in str(error)
    assert error.failed_count == len(error.letters) == error.report.failed >= 1
    assert error.failures[0].topic == ORDERS
    known = committed(kafka, GROUP, DEAD)
    assert known
    for partition, offset in error.letters:
        assert known.get(partition, 0) <= offset
    kafka.clear_errors("Produce")
    assert redrive(kafka).complete
    assert sorted(set(numbers(read(kafka, ORDERS)))) == list(range(5))


def test_a_copy_that_cant_even_be_queued_is_named_too(kafka: EmbeddedKafka, monkeypatch: Any) -> None:
    monkeypatch.setattr("keven_core.kafka._copies._LARGEST_MESSAGE_BYTES", "1000")
    large = from_orders(1)
    large.value = b"x" * 2000
    send(kafka, DEAD, from_orders(0), large, from_orders(2))
    with pytest.raises(RedriveError, match=r"could not be copied: \[0\] @ 1; ") as raised:
        redrive(kafka)
    assert raised.value.letters == [(0, 1)]
    assert (raised.value.report.redriven, raised.value.report.failed) == (1, 1)
    assert committed(kafka, GROUP, DEAD) == {0: 1}


def test_two_runs_of_a_group_at_once_are_noticed(kafka: EmbeddedKafka) -> None:
    send(kafka, DEAD, *map(from_orders, range(4)))
    clock = Clock()
    settings = quick(kafka)

    def now() -> float:
        if len(clock.waits) == 2:
            clock.waits.append(0)
            Redrive(DEAD).run(settings=settings)  # the other one
        return clock.now

    with pytest.raises(CommitError, match=r"were changed by somebody else .* one redrive of a group at a time"):
        Run(Redrive(DEAD, rate=2), settings, kafka.bootstrap_servers, clock, now).run()
    assert committed(kafka, GROUP, DEAD) == {0: 4}


def test_a_commit_that_is_refused_is_an_error(kafka: EmbeddedKafka) -> None:
    send(kafka, DEAD, from_orders(0))
    kafka.push_errors("OffsetCommit", [NOT_ALLOWED] * 20)
    with pytest.raises(CommitError, match=r"could not be committed: .* will be copied again") as raised:
        redrive(kafka)
    assert raised.value.offsets == [(DEAD, 0, 1)]


def test_a_coordinator_that_moves_is_waited_for(kafka: EmbeddedKafka) -> None:
    send(kafka, DEAD, *map(from_orders, range(3)))
    kafka.push_errors("OffsetFetch", [NOT_COORDINATOR] * 3)
    kafka.push_errors("OffsetCommit", [NOT_COORDINATOR])
    assert redrive(kafka).redriven == 3
    assert committed(kafka, GROUP, DEAD) == {0: 3}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to_topic": "nowhere"}, "to_topic='nowhere' does not exist on .*: create it, or check the name"),
        ({"parking_topic": "nowhere", "dry_run": True}, "parking_topic='nowhere' does not exist"),
    ],
)
def test_targets_that_are_missing_are_told_before_anything_is_written(
    kafka: EmbeddedKafka, options: dict[str, Any], words: str
) -> None:
    send(kafka, DEAD, from_orders(0))
    with pytest.raises(UnknownTopicError, match=words):
        redrive(kafka, **options)
    assert committed(kafka, GROUP, DEAD) == {}


def test_a_dead_letter_topic_that_is_missing_is_told(kafka: EmbeddedKafka) -> None:
    with pytest.raises(
        UnknownTopicError, match=r"dead-letter topic no\.such\.dead does not exist on .*: check the name"
    ):
        Redrive("no.such.dead").run(settings=quick(kafka))


@pytest.mark.logs_errors
def test_no_broker_is_told(kafka: EmbeddedKafka, monkeypatch: Any) -> None:
    monkeypatch.setattr("keven_core.kafka._redriving._TRY_S", 0.2)
    monkeypatch.setattr("keven_core.kafka._redriving._QUERY_S", 0.5)
    kafka.broker_down()
    with pytest.raises(BrokerUnavailableError, match=r"the topics at .* can't be listed"):
        redrive(kafka)


def test_a_partition_that_stays_silent_ends_the_run(kafka: EmbeddedKafka, monkeypatch: Any) -> None:
    send(kafka, DEAD, from_orders(0))
    monkeypatch.setattr("keven_core.kafka._redriving._PATIENCE_S", 0.5)
    kafka.push_errors("Fetch", [-195] * 1000)
    with pytest.raises(TimeoutError, match=r"nothing came for 0\.5 s, and the end is not reached"):
        redrive(kafka)


# --- the command line ------------------------------------------------------------------------------------------------


def command(kafka: EmbeddedKafka, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "keven_core.kafka.redrive", *arguments],
        env={**os.environ, "KAFKA": kafka.bootstrap_servers, "KEVEN_CREATE_TOPICS": "false"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_line(kafka: EmbeddedKafka, tmp_path: Path) -> None:
    send(kafka, DEAD, from_orders(0), from_orders(1, name="B"), Message(b"stray"))
    filters = ("--event", "A", "--event", "C", "--exception", "OrderError", "--since", "2023-01-01T00:00:00Z")
    dry = command(kafka, tmp_path, DEAD, "--dry-run", "--json", *filters)
    assert (dry.returncode, dry.stderr) == (0, "")
    told = json.loads(dry.stdout)
    assert (told["dry_run"], told["read"], told["redriven"]) == (True, 3, 1)
    assert told["skipped"] == {"event": 1, "exception": 1}
    real = command(kafka, tmp_path, DEAD)
    assert (real.returncode, real.stderr) == (3, "")  # the stray one is left
    assert real.stdout.splitlines()[1] == "3 read, 3 matched: 2 redriven, 0 parked, 1 left, 0 failed"
    assert numbers(read(kafka, ORDERS)) == [0, 1]
    wrong = command(kafka, tmp_path, DEAD, "--to", "nowhere")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.startswith("error: to_topic='nowhere' does not exist on ")
