"""Batch handlers: how lists are made up, what becomes of each event, and that nothing is lost when one fails."""

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from embedded_support import (
    DEAD,
    MODES,
    Feeder,
    Message,
    committed,
    event,
    group_server,
    live,
    quick,
    reading_server,
    run,
    send,
    topics,
    values,
    wait_until,
)

from keven_core.kafka import BatchError, EventHandler, current_record, current_records, event_handler
from keven_core.kafka.errors import RegistrationError
from keven_core.kafka.outcomes import DeadLetter, Retry, Skip
from keven_core.kafka.retry import RetryPolicy
from keven_core.kafka.topics import retry_topic
from keven_core.testing import dispatch

TOPIC = "keven_events_order"
WAITING = retry_topic("svc")
HANDLERS = pytest.mark.parametrize("is_async", [False, True], ids=["def", "async-def"])


class ShopError(Exception):
    pass


@pytest.fixture(autouse=True)
def cluster(embedded_kafka: Any, handler_registry: Any) -> Any:
    topics(embedded_kafka, TOPIC, WAITING, partitions=2)
    return embedded_kafka


def register(handle: Callable[[Any], Any], *, is_async: bool = False, name: str = "ORDER", **options: Any) -> None:
    """Register a function of a list as a handler."""
    options = {"batch_size": 10, "batch_wait_ms": 20, **options}
    if not is_async:
        event_handler(name, **options)(handle)
        return

    @event_handler(name, **options)
    async def handle_async(events: list[Any]) -> Any:
        return handle(events)


def numbers(events: list[Any]) -> list[int]:
    return [entry.number for entry in events]


def orders(kafka: Any, count: int, *, partitions: int = 1, start: int = 0) -> None:
    with Feeder(kafka) as feeder:
        for number in range(start, start + count):
            feeder.send(TOPIC, Message(event("ORDER", number=number), key=b"%d" % (number % 5)), number % partitions)
        feeder.wait()


def retrying(kafka: Any, **options: Any) -> Any:
    """A server that retries soon."""
    given = {"auto_reprocess_errors": True, "retry_interval": 0.05, "session_timeout": 1.5, "heartbeat_interval": 0.1}
    return group_server(kafka, TOPIC, settings=quick(kafka, commit_interval_ms=30), **{**given, **options})


@MODES
@HANDLERS
def test_events_come_in_lists_in_their_order(cluster: Any, mode: str, is_async: bool) -> None:
    lists: list[list[int]] = []
    register(lambda events: lists.append(numbers(events)), is_async=is_async)
    orders(cluster, 35)
    server = reading_server(cluster, TOPIC)
    run(server, mode)
    assert [number for entry in lists for number in entry] == list(range(35))
    assert [len(entry) for entry in lists] == [10, 10, 10, 5]
    assert server.totals() == {"received": 35, "done": 35}


@MODES
def test_a_class_may_take_lists(cluster: Any, mode: str) -> None:
    lists: list[list[int]] = []

    class Order(EventHandler):
        event_name = "ORDER"
        batch_size = 7
        batch_wait_ms = 10

        def handle_batch(self, events: list[Any]) -> None:
            lists.append(numbers(events))

    orders(cluster, 20)
    run(reading_server(cluster, TOPIC), mode)
    assert [len(entry) for entry in lists] == [7, 7, 6]


def test_the_first_event_waits_no_longer_than_it_should(cluster: Any) -> None:
    lists: list[list[int]] = []
    register(lambda events: lists.append(numbers(events)), batch_size=1000, batch_wait_ms=100)
    with live(retrying(cluster)):
        orders(cluster, 3)
        started = time.monotonic()
        wait_until(lambda: lists, "the list is handled")
        assert time.monotonic() - started < 5
        assert lists == [[0, 1, 2]]
        wait_until(lambda: committed(cluster, "svc", TOPIC) == {0: 3}, "and committed")


@pytest.mark.logs_errors
@MODES
@HANDLERS
def test_each_event_has_an_outcome_of_its_own(cluster: Any, mode: str, is_async: bool) -> None:
    attempts: dict[int, list[int]] = {}

    def handle(events: list[Any]) -> Any:
        outcomes: list[Any] = []
        for entry, record in zip(events, current_records(), strict=True):
            attempts.setdefault(entry.number, []).append(record.attempt)
            kinds = [None, Skip("no"), DeadLetter("never"), ShopError("bad"), Retry(after=0.05)]
            outcomes.append(kinds[entry.number % 5] if record.attempt == 1 else None)
        return outcomes

    register(handle, is_async=is_async)
    orders(cluster, 20)
    server = retrying(cluster)
    with live(server, mode):
        wait_until(lambda: sum(committed(cluster, "svc", WAITING).values()) == 8, "the copies are handled")
        wait_until(lambda: committed(cluster, "svc", TOPIC) == {0: 20}, "all is committed")
    assert attempts == {n: [1, 2] if n % 5 in (3, 4) else [1] for n in range(20)}
    assert len(values(cluster, DEAD)) == 4
    assert server.totals() == {"received": 28, "done": 12, "skipped": 4, "dead": 4, "retried": 8}


@pytest.mark.logs_errors
@MODES
@HANDLERS
@pytest.mark.parametrize("in_place", [False, True], ids=["retry topic", "in place"])
def test_a_batch_error_fails_one_and_the_rest_comes_again(
    cluster: Any, mode: str, is_async: bool, in_place: bool
) -> None:
    calls: list[list[int]] = []
    broken = {3, 4, 9}

    def handle(events: list[Any]) -> None:
        calls.append(numbers(events))
        for index, entry in enumerate(events):
            if entry.number in broken:
                broken.discard(entry.number)
                raise BatchError(index) from ShopError(entry.number)

    register(handle, is_async=is_async, retry_policy=RetryPolicy(3, 0.05, in_place=in_place))
    orders(cluster, 10)
    server = retrying(cluster)
    with live(server, mode):
        wait_until(lambda: sum(map(len, calls)) == 10 + 6 + 5 + 3, "all are handled")
        wait_until(lambda: committed(cluster, "svc", TOPIC) == {0: 10}, "all is committed")
    assert calls[:3] == [list(range(10)), list(range(4, 10)), list(range(5, 10))]
    assert sorted(map(tuple, calls[3:])) == [(3,), (4,), (9,)]
    assert len(values(cluster, WAITING)) == (0 if in_place else 3)
    assert values(cluster, DEAD) == []


@pytest.mark.logs_errors
@MODES
def test_an_exception_fails_all_of_the_list(cluster: Any, mode: str) -> None:
    calls: list[list[int]] = []

    def handle(events: list[Any]) -> None:
        calls.append(numbers(events))
        if len(events) > 1:
            raise ShopError

    register(handle)
    orders(cluster, 4)
    server = retrying(cluster)
    with live(server, mode):
        wait_until(lambda: sum(committed(cluster, "svc", WAITING).values()) == 4, "each comes again by itself")
    assert calls[0] == [0, 1, 2, 3]
    assert sorted(calls[1:]) == [[0], [1], [2], [3]]
    assert server.totals() == {"received": 8, "done": 4, "retried": 4}


@pytest.mark.logs_errors
@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([None], "returned 1 outcome(s) for 3 event(s)"),
        ([None, None, 5], "returned a list with int"),
        (7, "returned int: None, or a list"),
        (BatchError(3), "raised BatchError(3) for a batch of 3 event(s): an index from 0 to 2 is allowed"),
    ],
)
def test_what_a_handler_must_not_return_is_named(
    cluster: Any, result: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    def handle(events: list[Any]) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    register(handle)
    orders(cluster, 3)
    server = reading_server(cluster, TOPIC)
    run(server, "sync")
    assert server.totals() == {"received": 3, "dead": 3}
    assert message in caplog.text


@MODES
def test_a_batch_handler_beside_others(cluster: Any, mode: str) -> None:
    """Each gets every event, and only those that failed run again."""
    single: list[int] = []
    lists: list[list[int]] = []
    hooked: list[int] = []

    class Order(EventHandler):
        event_name = "ORDER"
        batch_size = 4
        batch_wait_ms = 10

        def handle_batch(self, events: list[Any]) -> Any:
            lists.append(numbers(events))

    Order.register_pre_handler_hook(lambda given: hooked.append(given.number))

    @event_handler("ORDER")
    def handle(given: Any) -> None:
        single.append(given.number)

    orders(cluster, 8)
    server = reading_server(cluster, TOPIC)
    run(server, mode)
    assert lists == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert single == hooked == list(range(8))
    assert server.totals() == {"received": 8, "done": 8}


@pytest.mark.logs_errors
@MODES
def test_of_several_handlers_only_the_failed_one_runs_again(cluster: Any, mode: str) -> None:
    single: list[int] = []
    lists: list[list[int]] = []

    def handle_list(events: list[Any]) -> Any:
        lists.append(numbers(events))
        return [ShopError() if entry.number == 1 and len(events) > 1 else None for entry in events]

    register(handle_list, batch_size=4)

    @event_handler("ORDER")
    def handle(given: Any) -> None:
        single.append(given.number)

    orders(cluster, 4)
    with live(retrying(cluster), mode):
        wait_until(lambda: lists[-1:] == [[1]], "it comes again")
        wait_until(lambda: sum(committed(cluster, "svc", WAITING).values()) == 1, "and is committed")
    assert lists == [[0, 1, 2, 3], [1]]
    assert single == [0, 1, 2, 3]


@MODES
@pytest.mark.parametrize("order", ["partition", "none"])
def test_lists_follow_each_other_unless_order_does_not_matter(cluster: Any, mode: str, order: str) -> None:
    at_once: list[int] = []
    running = 0
    lock = threading.Lock()

    def handle(events: list[Any]) -> None:
        nonlocal running
        with lock:
            running += 1
            at_once.append(running)
        time.sleep(0.02)
        with lock:
            running -= 1

    register(handle)
    orders(cluster, 80, partitions=2)
    server = reading_server(cluster, TOPIC, order=order, workers=4)
    run(server, mode)
    assert len(at_once) == 8
    assert max(at_once) == 1 if order == "partition" else max(at_once) > 1
    assert server.totals() == {"received": 80, "done": 80}


@MODES
def test_values_of_a_foreign_topic_come_in_lists_too(cluster: Any, mode: str) -> None:
    class Price(msgspec.Struct):
        cents: int

    seen: list[list[int]] = []

    @event_handler(topic="prices", value_type=Price, batch_size=3, batch_wait_ms=10)
    def handle(prices: list[Price]) -> None:
        seen.append([price.cents for price in prices])
        with pytest.raises(LookupError, match="current_records"):
            current_record()

    cluster.create_topic("prices", 1)
    send(cluster, "prices", *(b'{"cents":%d}' % cents for cents in range(6)))
    run(reading_server(cluster, "prices"), mode)
    assert seen == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.logs_errors
def test_what_can_not_be_decoded_is_not_in_the_list(cluster: Any) -> None:
    lists: list[list[int]] = []
    register(lambda events: lists.append(numbers(events)))
    for value in (event("ORDER", number=0), b"{broken", event("ORDER", number=1)):
        send(cluster, TOPIC, value)
    server = reading_server(cluster, TOPIC)
    run(server, "sync")
    assert lists == [[0, 1]]
    assert server.totals() == {"received": 3, "done": 2, "dead": 1}


def test_a_stop_handles_the_list_that_was_begun_and_no_more(cluster: Any) -> None:
    entered, release = threading.Event(), threading.Event()
    lists: list[list[int]] = []

    def handle(events: list[Any]) -> None:
        entered.set()
        assert release.wait(30)
        lists.append(numbers(events))

    register(handle, batch_size=10, batch_wait_ms=60_000)
    orders(cluster, 25)
    server = retrying(cluster, workers=1)
    with live(server) as running:
        assert entered.wait(30)
        server.stop()
        wait_until(lambda: server.totals().get("stale") == 15, "the rest is given up")
        release.set()
        running.join()
    assert lists == [list(range(10))]
    assert committed(cluster, "svc", TOPIC) == {0: 10}


def test_dispatch_calls_a_batch_handler_with_one_event() -> None:
    got: list[list[int]] = []
    register(lambda events: got.append(numbers(events)))
    result = dispatch(event("ORDER", number=3), topic=TOPIC)
    assert (result.outcome, got) == ("done", [[3]])


# --- registration ----------------------------------------------------------------------------------------------------


def test_a_handler_takes_single_events_or_lists() -> None:
    with pytest.raises(RegistrationError, match="both handle_event and handle_batch"):

        class Both(EventHandler):
            event_name = "ORDER"

            def handle_event(self, event: Any) -> None: ...

            def handle_batch(self, events: list[Any]) -> None: ...


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 of .*: 1 to 100000 is allowed"),
        ({"batch_size": "9"}, "batch_size='9' of .*: 1 to 100000 is allowed"),
        ({"batch_size": 5, "batch_wait_ms": -1}, "batch_wait_ms=-1 of .*: 0 to 3600000 is allowed"),
    ],
)
def test_wrong_sizes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RegistrationError, match=message):
        event_handler("ORDER", **options)(lambda events: None)
