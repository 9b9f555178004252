"""Records in flight: lanes keep their order, commits leave no gap, failures and stops end well, by every crew."""

import asyncio
import contextvars
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from embedded_support import (
    DEAD,
    DEADLINE_S,
    Feeder,
    Live,
    Message,
    committed,
    event,
    group_server,
    live,
    quick,
    reading_server,
    run,
    send,
    stays,
    topics,
    values,
    wait_until,
)

from keven_core.kafka import EventHandler, LongRunningEventHandler, current_record, event_handler
from keven_core.kafka.errors import ConfigurationError, DrainError
from keven_core.kafka.outcomes import DeadLetter, Retry, Skip
from keven_core.kafka.record import current_records
from keven_core.kafka.retry import RetryPolicy
from keven_core.kafka.topics import retry_topic

TOPIC = "keven_events_order"
WAITING = retry_topic("svc")

# Options of a server by who handles its records.
CREWS: dict[str, dict[str, Any]] = {
    "threads": {"workers": 4},
    "tasks": {"max_in_flight": 4},
    "tasks with threads": {"max_in_flight": 4, "workers": 4},
}
BY_CREW = pytest.mark.parametrize("crew", CREWS)
ORDERS = pytest.mark.parametrize("order", ["partition", "key", "none"])


class ShopError(Exception):
    pass


@pytest.fixture(autouse=True)
def cluster(embedded_kafka: Any, handler_registry: Any) -> Any:
    topics(embedded_kafka, TOPIC, WAITING, partitions=3)
    return embedded_kafka


def register(handle: Callable[[Any], Any], crew: str, **options: Any) -> None:
    """Register a function that may block as a handler; for tasks as one that is awaited, in a thread of the loop."""
    if crew == "tasks":

        @event_handler("ORDER", **options)
        async def handle_async(given: Any) -> Any:
            return await asyncio.to_thread(handle, given)
    else:
        event_handler("ORDER", **options)(handle)
        if crew == "tasks with threads":

            @event_handler("OTHER")
            async def other(given: Any) -> None:
                """Makes the server one with an event loop."""


def server_of(kafka: Any, crew: str, **options: Any) -> Any:
    """A group's server."""
    changes = {"commit_interval_ms": 30, **options.pop("settings", {})}
    given = {"session_timeout": 1.5, "heartbeat_interval": 0.1, **CREWS[crew], **options}
    return group_server(kafka, options.pop("topic", TOPIC), settings=quick(kafka, **changes), **given)


def orders(kafka: Any, numbers: Any, *, partition: Any = 0, key: Any = None) -> None:
    """Write numbered orders; `partition` and `key` may be functions of the number."""
    with Feeder(kafka) as feeder:
        for number in numbers:
            place = partition(number) if callable(partition) else partition
            mark = key(number) if callable(key) else key
            feeder.send(TOPIC, Message(event("ORDER", number=number), key=mark), place)
        feeder.wait()


class Gate:
    """Numbers whose handlers wait until they are let through."""

    def __init__(self, *numbers: int) -> None:
        self._closed = {number: threading.Event() for number in numbers}
        self.waiting: set[int] = set()

    def pass_through(self, number: int) -> None:
        if number in self._closed:
            self.waiting.add(number)
            assert self._closed[number].wait(DEADLINE_S)

    def open(self, *numbers: int) -> None:
        for number in numbers or self._closed:
            self._closed[number].set()


@pytest.fixture
def gate() -> Iterator[Callable[..., Gate]]:
    made: list[Gate] = []

    def make(*numbers: int) -> Gate:
        made.append(Gate(*numbers))
        return made[-1]

    yield make
    for entry in made:
        entry.open()


def gated(gate: Callable[..., Gate], crew: str, *numbers: int) -> tuple[Gate, list[int]]:
    """A handler that notes its numbers, after these have been let through: their gate, and the notes."""
    closed = gate(*numbers)
    seen: list[int] = []

    def handle(given: Any) -> None:
        closed.pass_through(given.number)
        seen.append(given.number)

    register(handle, crew)
    return closed, seen


# --- order -----------------------------------------------------------------------------------------------------------


@BY_CREW
@ORDERS
def test_each_record_is_handled_once_and_lanes_keep_their_order(cluster: Any, crew: str, order: str) -> None:
    count, draw = 400, random.Random(7)
    pauses = [draw.random() * 0.002 for _ in range(count)]
    seen: list[tuple[int, bytes | None, int]] = []
    at_once: list[int] = []
    running = 0
    lock = threading.Lock()

    def handle(given: Any) -> None:
        nonlocal running
        record = current_record()
        with lock:
            running += 1
            at_once.append(running)
        time.sleep(pauses[given.number])
        assert current_record().offset == record.offset
        with lock:
            seen.append((record.partition, record.key, given.number))
            running -= 1

    register(handle, crew)
    orders(cluster, range(count), partition=lambda n: n % 11 % 3, key=lambda n: b"key-%d" % (n % 11))
    server = reading_server(cluster, TOPIC, order=order, **CREWS[crew])
    run(server, "sync")
    assert sorted(number for _, _, number in seen) == list(range(count))
    assert server.totals() == {"received": count, "done": count}
    assert max(at_once) == (3 if order == "partition" else 4)
    for place in {"partition": [0], "key": [1], "none": []}[order]:
        for mark in {entry[place] for entry in seen}:
            numbers = [entry[2] for entry in seen if entry[place] == mark]
            assert numbers == sorted(numbers)


@BY_CREW
def test_other_keys_flow_past_a_slow_one(cluster: Any, crew: str, gate: Any) -> None:
    closed, seen = gated(gate, crew, 0)
    orders(cluster, range(60), key=lambda n: b"key-%d" % (n % 6))
    with live(server_of(cluster, crew, order="key")):
        wait_until(lambda: len(seen) == 50, "the other keys are through")
        assert all(number % 6 for number in seen)
        closed.open()
        wait_until(lambda: committed(cluster, "svc", TOPIC) == {0: 60}, "all are committed")
    assert [number for number in seen if number % 6 == 0] == list(range(0, 60, 6))


@BY_CREW
def test_records_without_a_key_are_in_no_order(cluster: Any, crew: str, gate: Any) -> None:
    closed, seen = gated(gate, crew, 0)
    orders(cluster, range(5))
    with live(server_of(cluster, crew, order="key")):
        wait_until(lambda: sorted(seen) == [1, 2, 3, 4], "the others are through")
        closed.open()


# --- commits ---------------------------------------------------------------------------------------------------------


@BY_CREW
def test_a_record_in_flight_is_never_committed_past(cluster: Any, crew: str, gate: Any) -> None:
    closed, seen = gated(gate, crew, 3)
    orders(cluster, range(20))
    with live(server_of(cluster, crew, order="none")) as running:
        wait_until(lambda: len(seen) == 19, "the others are through")
        wait_until(lambda: committed(cluster, "svc", TOPIC) == {0: 3}, "what is before it is committed")
        wait_until(lambda: running.server.position()[TOPIC, 0] == 3, "and no more than that")
        assert running.server.totals() == {"received": 20, "done": 19, "in_flight": 1}
        assert stays(lambda: committed(cluster, "svc", TOPIC) == {0: 3})
        closed.open()
        wait_until(lambda: committed(cluster, "svc", TOPIC) == {0: 20}, "then all is")


@BY_CREW
def test_a_stop_finishes_what_runs_and_leaves_the_rest(cluster: Any, crew: str, gate: Any) -> None:
    closed, seen = gated(gate, crew, 0)
    orders(cluster, range(10), key=b"one")
    running = Live(server_of(cluster, crew, order="key"), "sync")
    wait_until(lambda: closed.waiting == {0} and running.server.totals()["received"] == 10, "it runs")
    running.server.stop()
    assert stays(lambda: not running.ended)
    closed.open()
    running.join()
    assert running.error is None
    assert seen == [0]
    assert committed(cluster, "svc", TOPIC) == {0: 1}
    assert running.server.totals() == {"received": 10, "done": 1, "stale": 9}
    with live(server_of(cluster, crew, order="key")):
        wait_until(lambda: seen == list(range(10)), "the rest comes again")


def test_a_task_that_does_not_end_is_cancelled_and_its_record_comes_again(cluster: Any) -> None:
    started: list[int] = []
    cancelled: list[int] = []

    @event_handler("ORDER")
    async def handle(given: Any) -> None:
        started.append(given.number)
        try:
            await asyncio.sleep(60 if len(started) == 1 else 0)
        except asyncio.CancelledError:
            cancelled.append(given.number)
            raise

    orders(cluster, [0])
    running = Live(server_of(cluster, "tasks", settings={"drain_timeout_ms": 400}), "sync")
    wait_until(lambda: started == [0], "it runs")
    running.server.stop()
    running.join()
    assert isinstance(running.error, DrainError)
    assert (running.error.records, running.error.exit_code) == ([(TOPIC, 0, 0)], 3)
    assert cancelled == [0]
    assert committed(cluster, "svc", TOPIC) == {}
    assert running.server.totals() == {"received": 1, "stale": 1}
    with live(server_of(cluster, "tasks")):
        wait_until(lambda: committed(cluster, "svc", TOPIC) == {0: 1}, "it comes again")


def test_a_thread_that_does_not_end_is_left_behind_and_its_record_comes_again(cluster: Any, gate: Any) -> None:
    closed = gate(0)
    register(lambda given: closed.pass_through(given.number), "threads")
    orders(cluster, [0])
    running = Live(server_of(cluster, "threads", settings={"drain_timeout_ms": 300}), "sync")
    wait_until(lambda: closed.waiting == {0}, "it runs")
    running.server.stop()
    running.join()
    assert isinstance(running.error, DrainError)
    assert running.error.records == [(TOPIC, 0, 0)]
    assert committed(cluster, "svc", TOPIC) == {}
    closed.open()
    with live(server_of(cluster, "threads")):
        wait_until(lambda: committed(cluster, "svc", TOPIC) == {0: 1}, "it comes again")


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.logs_errors
@BY_CREW
@ORDERS
def test_failures_end_as_they_should_wherever_they_happen(cluster: Any, crew: str, order: str) -> None:
    attempts: dict[int, int] = {}
    lock = threading.Lock()

    def handle(given: Any) -> Any:
        with lock:
            attempts[given.number] = attempts.get(given.number, 0) + 1
        assert current_record().attempt == attempts[given.number]
        kind = given.number % 5
        if kind == 1:
            raise ShopError(given.number)
        if kind == 2:
            return Skip()
        if kind == 3:
            raise DeadLetter("never")
        if kind == 4 and attempts[given.number] == 1:
            return Retry(after=0.05)
        return None

    register(handle, crew)
    orders(cluster, range(50), partition=lambda n: n % 3, key=lambda n: b"%d" % (n % 7))
    server = server_of(cluster, crew, order=order, auto_reprocess_errors=True, retry_interval=0.05, max_retries=1)
    with live(server):
        wait_until(lambda: sum(committed(cluster, "svc", WAITING).values()) == 20, "the copies are handled")
        wait_until(lambda: sum(committed(cluster, "svc", TOPIC).values()) == 50, "all is committed")
    assert attempts == {n: 2 if n % 5 in (1, 4) else 1 for n in range(50)}
    assert len(values(cluster, DEAD)) == 20
    assert server.totals() == {"received": 70, "done": 20, "skipped": 10, "dead": 20, "retried": 20}


@pytest.mark.logs_errors
@BY_CREW
@pytest.mark.parametrize("order", ["partition", "key"])
def test_a_retry_in_place_holds_its_lane_up_and_nothing_else(cluster: Any, crew: str, order: str) -> None:
    seen: list[tuple[int, int]] = []

    def handle(given: Any) -> None:
        attempt = current_record().attempt
        seen.append((given.number, attempt))
        if given.number == 0 and attempt < 4:
            raise ShopError

    register(handle, crew, retry_policy=RetryPolicy(5, 0.1, in_place=True))
    orders(cluster, range(20), key=lambda n: b"%d" % (n % 2), partition=lambda n: n % 2)
    server = server_of(cluster, crew, order=order)
    with live(server):
        wait_until(lambda: committed(cluster, "svc", TOPIC) == {0: 10, 1: 10}, "all is committed")
    mine = [entry for entry in seen if entry[0] % 2 == 0]
    assert mine[:4] == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert [number for number, _ in mine[4:]] == list(range(2, 20, 2))
    others = [number for number, _ in seen[: seen.index((0, 4))] if number % 2]
    assert others == list(range(1, 20, 2))
    assert server.totals() == {"received": 20, "done": 20}
    assert values(cluster, WAITING) == values(cluster, DEAD) == []


@pytest.mark.logs_errors
@BY_CREW
def test_a_retry_in_place_ends_in_the_dead_letter_topic(cluster: Any, crew: str) -> None:
    ran: list[str] = []

    def define(name: str, fails: bool) -> None:
        def handle(given: Any) -> None:
            ran.append(name)
            if fails:
                raise ShopError(name)

        handle.__qualname__ = name
        register(handle, crew, retry_policy=RetryPolicy(2, 0.02, in_place=True))

    if crew == "tasks":

        @event_handler("ORDER", retry_policy=RetryPolicy(2, 0.02, in_place=True))
        async def both(given: Any) -> None:
            ran.append("bad")
            raise ShopError
    else:
        define("good", False)
        define("bad", True)
    orders(cluster, [0, 1])
    with live(server_of(cluster, crew)):
        wait_until(lambda: committed(cluster, "svc", TOPIC) == {0: 2}, "both are committed")
    assert ran.count("bad") == 6
    assert ran.count("good") == (0 if crew == "tasks" else 2)  # only what failed runs again
    assert len(values(cluster, DEAD)) == 2


@pytest.mark.logs_errors
@BY_CREW
def test_what_can_not_be_decoded_is_dead_lettered_in_its_turn(cluster: Any, crew: str) -> None:
    seen: list[int] = []
    register(lambda given: seen.append(given.number), crew)
    for value in (event("ORDER", number=0), b"{broken", b"", None, event("NOBODYS"), event("ORDER", number=1)):
        send(cluster, TOPIC, value)
    server = server_of(cluster, crew)
    with live(server):
        wait_until(lambda: committed(cluster, "svc", TOPIC) == {0: 6}, "all is committed")
    assert sorted(seen) == [0, 1]
    assert server.totals() == {"received": 6, "done": 2, "dead": 2, "tombstones": 1, "skipped": 1}


# --- what handlers see -----------------------------------------------------------------------------------------------


@BY_CREW
def test_each_record_has_a_context_of_its_own(cluster: Any, crew: str) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="clean")
    found: list[str] = []

    def handle(given: Any) -> None:
        found.append(variable.get())
        variable.set(f"of {given.number}")

    if crew == "tasks":

        @event_handler("ORDER")
        async def handle_async(given: Any) -> None:
            handle(given)
    else:
        register(handle, crew)
    orders(cluster, range(30), partition=lambda n: n % 3)
    run(reading_server(cluster, TOPIC, **CREWS[crew]), "sync")
    assert found == ["clean"] * 30


def test_outside_a_record_there_is_none(cluster: Any) -> None:
    with pytest.raises(LookupError):
        current_records()


# --- bounds ----------------------------------------------------------------------------------------------------------


@BY_CREW
def test_a_partition_that_is_stuck_does_not_hold_up_the_others(
    cluster: Any, crew: str, gate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its records fill the window; then it is paused, and no longer counts."""
    closed, seen = gated(gate, crew, 0)
    orders(cluster, range(3000), partition=0)
    with live(server_of(cluster, crew)) as running:
        wait_until(lambda: running.server._session.flow.full, "the window is full")
        orders(cluster, range(3000, 4000), partition=1)
        wait_until(lambda: len(seen) == 1000, "the other partition is through")
        assert running.server.totals()["received"] < 3900
        closed.open()
        wait_until(lambda: committed(cluster, "svc", TOPIC) == {0: 3000, 1: 1000}, "then all is")
    assert [number for number in seen if number < 3000] == list(range(3000))


@BY_CREW
def test_what_is_in_flight_is_bounded(cluster: Any, crew: str, gate: Any) -> None:
    closed = gate(*range(5000))
    register(lambda given: closed.pass_through(given.number), crew)
    orders(cluster, range(5000), partition=lambda n: n % 3)
    with live(server_of(cluster, crew, order="none")) as running:
        wait_until(lambda: len(closed.waiting) == 4, "all workers are busy")
        wait_until(lambda: running.server._session.flow.full, "the window is full")
        assert stays(lambda: running.server.totals()["received"] <= 2300, 0.5)
        assert 2000 <= running.server.totals()["received"] <= 2300
        assert len(closed.waiting) == 4
        closed.open()
        wait_until(lambda: sum(committed(cluster, "svc", TOPIC).values()) == 5000, "then all is handled")


@BY_CREW
def test_slow_handlers_keep_their_place_in_the_group(cluster: Any, crew: str, gate: Any) -> None:
    """A handler may take longer than max_poll_interval: the server goes on polling."""
    closed = gate(0)
    register(lambda given: closed.pass_through(given.number), crew)
    orders(cluster, [0])
    server = server_of(cluster, crew, max_poll_interval=2)
    with live(server) as running:
        wait_until(lambda: closed.waiting == {0}, "it runs")
        generation = running.server._session.consumer.generation
        assert stays(lambda: running.server._session.consumer.generation == generation, 3.5)
        closed.open()
        wait_until(lambda: committed(cluster, "svc", TOPIC) == {0: 1}, "it is committed")


def test_a_long_running_handler_gets_a_thread(cluster: Any) -> None:
    threads: list[threading.Thread] = []

    class Slow(LongRunningEventHandler):
        event_name = "ORDER"

        def long_running_handle_event(self, event: Any) -> None:
            threads.append(threading.current_thread())

    orders(cluster, [0, 1])
    run(reading_server(cluster, TOPIC), "sync")
    assert len(set(threads)) == 1
    assert threads[0] is not threading.current_thread()


@pytest.mark.logs_errors
def test_what_may_block_is_in_a_thread_also_the_second_time_and_without_a_value(cluster: Any) -> None:
    seen: list[tuple[str, bool]] = []

    class Slow(EventHandler):
        event_name = "ORDER"

        def handle_event(self, given: Any) -> None:
            attempt = current_record().attempt
            seen.append((f"attempt {attempt}", threading.current_thread().name.startswith("keven-worker")))
            if attempt == 1:
                raise ShopError

        def handle_tombstone(self, record: Any) -> None:
            seen.append(("tombstone", threading.current_thread().name.startswith("keven-worker")))

    orders(cluster, [0])
    send(cluster, TOPIC, Message(None, key=b"k"))
    server = server_of(cluster, "tasks with threads", auto_reprocess_errors=True, retry_interval=0.05)
    with live(server, "async"):
        wait_until(lambda: len(seen) == 3, "all was handled")
    assert sorted(seen) == [("attempt 1", True), ("attempt 2", True), ("tombstone", True)]


# --- a rebalance -----------------------------------------------------------------------------------------------------


@BY_CREW
def test_a_revocation_waits_for_what_runs_and_drops_the_rest(
    cluster: Any, crew: str, gate: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "keven_core.kafka")
    closed, seen = gated(gate, crew, *range(6))
    orders(cluster, range(300), partition=lambda n: n % 3)
    first = Live(server_of(cluster, crew), "sync")
    wait_until(lambda: len(closed.waiting) == 3, "all partitions are busy")
    second = Live(server_of(cluster, crew), "sync")
    wait_until(lambda: "revoked: " in caplog.text, "a rebalance comes")
    closed.open()
    wait_until(lambda: second.server.ready(), "the other member has a partition")
    wait_until(lambda: sum(committed(cluster, "svc", TOPIC).values()) == 300, "all is committed")
    for running in (first, second):
        running.stop()
    # The embedded broker refuses commits during a rebalance, so some come again; real Kafka takes them, see
    # tests/integration/test_in_flight_groups.py.
    assert sorted(set(seen)) == list(range(300))
    for member in (first, second):
        assert member.server.totals().get("in_flight", 0) == 0


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "topic"}, "order='topic': 'partition', 'key' or 'none' is allowed"),
        ({"max_in_flight": 0}, "max_in_flight=0: 1 to 100000, or None, is allowed"),
        ({"max_in_flight": True}, "max_in_flight=True: 1 to 100000, or None, is allowed"),
        ({"workers": -1}, "workers=-1: 0 to 1000, or None, is allowed"),
    ],
)
def test_wrong_arguments_are_named(cluster: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        reading_server(cluster, TOPIC, **options)


def test_a_plain_server_has_no_flow(cluster: Any) -> None:
    register(lambda given: None, "threads")
    server = reading_server(cluster, TOPIC)
    run(server, "sync")
    assert server._last_session is not None
    assert server._last_session.flow is None
