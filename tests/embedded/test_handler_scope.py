"""What handlers write: acknowledged before the offsets of their records are stored, found in threads, captured."""

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from embedded_support import (
    MODES,
    Live,
    committed,
    event,
    group_server,
    live,
    logged,
    numbered,
    quick,
    read,
    send,
    stays,
    topics,
    values,
    wait_until,
)

from keven_core._native.logger import HandlerScope
from keven_core.kafka.abstracts.event_handler import event_handler
from keven_core.kafka.errors import DeliveryError, KafkaError, KafkaTimeoutError
from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger
from keven_core.kafka.topics import dead_letter_topic
from keven_core.testing import EmbeddedKafka, dispatch

MSG_SIZE_TOO_LARGE = 10
ASYNC = pytest.mark.parametrize("is_async", [False, True], ids=["def", "async-def"])


# librdkafka logs each refused connection.
pytestmark = pytest.mark.logs_errors


@pytest.fixture
def cluster(embedded_kafka: Any) -> Any:
    """Where records come from."""
    topics(embedded_kafka, "in")
    return embedded_kafka


@pytest.fixture
def out() -> Iterator[EmbeddedKafka]:
    """Where handlers write to: a cluster of its own, which can be away while offsets are committed."""
    with EmbeddedKafka() as kafka:
        kafka.create_topic("out")
        yield kafka


@pytest.fixture
def log(out: EmbeddedKafka) -> KafkaBatchLogger:
    made = KafkaBatchLogger(topic="out", settings=quick(out, idempotence=False))
    made.log(b"connected")
    made.flush()
    return made


@pytest.fixture
def serve(cluster: Any) -> Callable[..., Any]:
    """A server that commits often."""

    def make(**options: Any) -> Any:
        settings = quick(cluster, idempotence=False, commit_interval_ms=50, **options.pop("settings", {}))
        # A member that comes back waits for session_timeout - 1 s on the embedded broker.
        given = {"session_timeout": 1.5, "heartbeat_interval": 0.1, **options}
        return group_server(cluster, "in", settings=settings, **given)

    return make


def copying(log: Any, handled: list[int], *, is_async: bool = False) -> None:
    """A handler that copies each record with a logger."""
    if is_async:

        @event_handler("COPY")
        async def acopy(event: Any) -> None:
            await asyncio.sleep(0)
            log.log(b"%d" % event.number)
            handled.append(event.number)

    else:

        @event_handler("COPY")
        def copy(event: Any) -> None:
            log.log(b"%d" % event.number)
            handled.append(event.number)


def feed(kafka: Any, start: int, end: int) -> None:
    send(kafka, "in", *(event("COPY", number=number) for number in range(start, end)))


# --- offsets ---------------------------------------------------------------------------------------------------------


@MODES
@ASYNC
def test_offsets_wait_until_what_was_written_is_acknowledged(
    out: EmbeddedKafka,
    cluster: Any,
    handler_registry: Any,
    log: KafkaBatchLogger,
    serve: Any,
    mode: str,
    is_async: bool,
) -> None:
    if mode == "sync" and is_async:
        pytest.skip("a server with async handlers runs a loop in either case")
    handled: list[int] = []
    copying(log, handled, is_async=is_async)
    with live(serve(), mode):
        feed(cluster, 0, 5)
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 5}, "the first are committed")
        out.broker_down()
        feed(cluster, 5, 10)
        wait_until(lambda: len(handled) == 10, "handling goes on")
        assert stays(lambda: committed(cluster, "svc", "in") == {0: 5}, 0.4)
        out.broker_up()
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 10}, "the rest is committed")
    assert values(out, "out") == [b"connected", *numbered(10)]
    assert handled == list(range(10))


@MODES
def test_batches_are_pipelined(
    out: EmbeddedKafka, cluster: Any, handler_registry: Any, log: KafkaBatchLogger, serve: Any, mode: str
) -> None:
    handled: list[int] = []
    copying(log, handled)
    with live(serve(settings={"batch_size": 1}), mode):
        feed(cluster, 0, 1)
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 1}, "it runs")
        out.broker_down()
        feed(cluster, 1, 30)
        # Batch after batch is handled, though nothing of the first one is acknowledged.
        wait_until(lambda: len(handled) == 30, "they are handled")
        assert committed(cluster, "svc", "in") == {0: 1}
        out.broker_up()
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 30}, "all are committed")
    assert values(out, "out") == [b"connected", *numbered(30)]


def test_a_bounded_number_of_batches_waits(
    out: EmbeddedKafka, cluster: Any, handler_registry: Any, log: KafkaBatchLogger, serve: Any
) -> None:
    handled: list[int] = []
    copying(log, handled)
    with live(serve(settings={"batch_size": 1})):
        feed(cluster, 0, 1)
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 1}, "it runs")
        out.broker_down()
        feed(cluster, 1, 101)
        wait_until(lambda: len(handled) == 101, "as many wait as may wait for long")
        time.sleep(1.1)  # from then on they have waited long
        feed(cluster, 101, 150)
        assert stays(lambda: len(handled) <= 102, 0.4)
        out.broker_up()
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 150}, "all are committed")
    assert handled == list(range(150))


@pytest.mark.logs_errors
@MODES
def test_a_refused_message_ends_the_server_and_its_record_comes_again(
    out: EmbeddedKafka, cluster: Any, handler_registry: Any, log: KafkaBatchLogger, serve: Any, mode: str
) -> None:
    handled: list[int] = []
    copying(log, handled)
    running = Live(serve(), mode)
    wait_until(running.server.ready, "it has partitions")
    feed(cluster, 0, 3)
    wait_until(lambda: committed(cluster, "svc", "in") == {0: 3}, "they are committed")
    out.broker_down()
    feed(cluster, 3, 4)
    wait_until(lambda: handled == [0, 1, 2, 3], "it is handled")
    out.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
    out.broker_up()
    running.join()
    assert isinstance(running.error, DeliveryError)
    assert [entry.value for entry in running.error.failures] == [b"3"]
    assert "will be handled again" in str(running.error)
    assert committed(cluster, "svc", "in") == {0: 3}
    with pytest.raises(DeliveryError):
        log.flush()
    with live(serve(), mode):
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 4}, "it is handled again")
    assert handled == [0, 1, 2, 3, 3]
    assert values(out, "out") == [b"connected", *numbered(4)]


@MODES
def test_stop_waits_for_what_was_written(
    out: EmbeddedKafka, cluster: Any, handler_registry: Any, log: KafkaBatchLogger, serve: Any, mode: str
) -> None:
    handled: list[int] = []
    copying(log, handled)
    running = Live(serve(), mode)
    wait_until(running.server.ready, "it has partitions")
    out.broker_down()
    feed(cluster, 0, 5)
    wait_until(lambda: len(handled) == 5, "they are handled")
    running.server.stop()
    assert stays(lambda: not running.ended, 0.3)
    out.broker_up()
    running.join()
    assert running.error is None
    assert committed(cluster, "svc", "in") == {0: 5}
    assert values(out, "out") == [b"connected", *numbered(5)]


@pytest.mark.logs_errors
def test_stop_gives_up_in_time_and_keeps_the_offsets(
    out: EmbeddedKafka, cluster: Any, handler_registry: Any, log: KafkaBatchLogger, serve: Any
) -> None:
    handled: list[int] = []
    copying(log, handled)
    running = Live(serve(settings={"close_timeout_ms": 1000}), "sync")
    wait_until(running.server.ready, "it has partitions")
    out.broker_down()
    feed(cluster, 0, 5)
    wait_until(lambda: len(handled) == 5, "they are handled")
    started = time.monotonic()
    running.server.stop()
    running.join()
    assert time.monotonic() - started < 6
    assert isinstance(running.error, DeliveryError)
    assert running.error.failed_count == 5
    assert committed(cluster, "svc", "in") == {}


@MODES
def test_what_was_handled_before_a_seek_is_not_stored_after_it(
    out: EmbeddedKafka, cluster: Any, handler_registry: Any, log: KafkaBatchLogger, serve: Any, mode: str
) -> None:
    handled: list[int] = []
    copying(log, handled)
    with live(serve(), mode) as running:
        out.broker_down()
        feed(cluster, 0, 5)
        wait_until(lambda: len(handled) == 5, "they are handled")
        running.server.pause([("in", 0)])
        running.server.seek("in", 0, 2)
        out.broker_up()
        assert log.flush() == 6
        # Stored would be 5, for records that are to be handled again.
        assert stays(lambda: committed(cluster, "svc", "in") == {}, 0.4)
        running.server.resume([("in", 0)])
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 5}, "they are handled again")
    assert handled == [0, 1, 2, 3, 4, 2, 3, 4]


def test_an_acknowledged_logger_in_a_handler_waits_itself(
    out: EmbeddedKafka, cluster: Any, handler_registry: Any, serve: Any
) -> None:
    single = KafkaLogger(topic="out", settings=quick(out, idempotence=False))
    handled: list[int] = []
    copying(single, handled)
    with live(serve()):
        feed(cluster, 0, 5)
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 5}, "they are committed")
    assert values(out, "out") == numbered(5)


def test_alog_in_async_handlers(out: EmbeddedKafka, cluster: Any, handler_registry: Any, serve: Any) -> None:
    single = KafkaLogger(topic="out", settings=quick(out, idempotence=False))

    @event_handler("COPY")
    async def copy(event: Any) -> None:
        await asyncio.gather(*(single.alog(b"%d/%d" % (event.number, part)) for part in range(3)))

    with live(serve(), "async"):
        feed(cluster, 0, 5)
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 5}, "they are committed")
    assert len(set(values(out, "out"))) == 15


@pytest.mark.parametrize("way", ["log", "log_many", "alog"])
@pytest.mark.parametrize("heeds", [True, False], ids=["caught", "uncaught"])
def test_a_refusal_that_was_raised_in_a_handler_is_the_handlers(
    out: EmbeddedKafka, cluster: Any, handler_registry: Any, serve: Any, way: str, heeds: bool
) -> None:
    """Caught, the record is handled; uncaught, it is dead-lettered. Either way its offset is stored, once."""
    single = KafkaLogger(topic="out", settings=quick(out, idempotence=False))
    single.log(b"connected")
    handled: list[int] = []

    async def write(value: bytes) -> None:
        if way == "log":
            single.log(value)
        elif way == "log_many":
            single.log_many([value])
        else:
            await single.alog(value)

    @event_handler("COPY")
    async def copy(event: Any) -> None:
        if event.number == 2:
            out.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
        try:
            await write(b"%d" % event.number)
        except DeliveryError:
            if not heeds:
                raise
        handled.append(event.number)

    with live(serve(), "async"):
        feed(cluster, 0, 5)
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 5}, "all are committed")
    assert values(out, "out") == [b"connected", b"0", b"1", b"3", b"4"]
    dead = [entry.value for entry in read(cluster, dead_letter_topic("svc"))] if not heeds else []
    assert dead == ([] if heeds else [event("COPY", number=2)])
    assert handled == ([0, 1, 2, 3, 4] if heeds else [0, 1, 3, 4])


@pytest.mark.parametrize("gives_up", ["cancelled", "timed out"])
def test_a_refusal_that_the_handler_did_not_wait_for_ends_the_server(
    out: EmbeddedKafka, cluster: Any, handler_registry: Any, serve: Any, gives_up: str
) -> None:
    single = KafkaLogger(topic="out", timeout=0.2, settings=quick(out, idempotence=False))
    single.log(b"connected")
    gave_up: list[str] = []

    @event_handler("COPY")
    async def copy(event: Any) -> None:
        try:
            await asyncio.wait_for(single.alog(b"%d" % event.number), 0.1 if gives_up == "cancelled" else 5)
        except KafkaTimeoutError:
            gave_up.append("timed out")
        except asyncio.TimeoutError:
            gave_up.append("cancelled")

    running = Live(serve(), "async")
    wait_until(running.server.ready, "it has partitions")
    out.broker_down()
    feed(cluster, 0, 1)
    wait_until(lambda: gave_up == [gives_up], "the handler goes on")
    out.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
    out.broker_up()
    running.join()
    assert isinstance(running.error, DeliveryError)
    assert committed(cluster, "svc", "in") == {}


def test_threads_with_the_handlers_context_count(
    out: EmbeddedKafka, cluster: Any, handler_registry: Any, log: KafkaBatchLogger, serve: Any
) -> None:
    done: list[int] = []

    @event_handler("COPY")
    def copy(event: Any) -> None:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(log.log, b"%d" % event.number))
        thread.start()
        thread.join()
        done.append(event.number)

    with live(serve()):
        out.broker_down()
        feed(cluster, 0, 3)
        wait_until(lambda: len(done) == 3, "they are handled")
        assert stays(lambda: committed(cluster, "svc", "in") == {}, 0.4)
        out.broker_up()
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 3}, "they are committed")


def test_threads_without_it_and_the_application_itself_do_not(
    out: EmbeddedKafka, cluster: Any, handler_registry: Any, log: KafkaBatchLogger, serve: Any
) -> None:
    done: list[int] = []

    @event_handler("COPY")
    def copy(event: Any) -> None:
        thread = threading.Thread(target=log.log, args=(b"%d" % event.number,))
        thread.start()
        thread.join()
        done.append(event.number)

    with live(serve()):
        out.broker_down()
        log.log(b"beside")
        feed(cluster, 0, 3)
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 3}, "nothing waits")
        assert log.pending_count == 4
        out.broker_up()
        assert log.flush() == 5


@pytest.mark.logs_errors
def test_what_was_written_before_a_handler_failed_is_waited_for_too(
    out: EmbeddedKafka, cluster: Any, handler_registry: Any, log: KafkaBatchLogger, serve: Any
) -> None:
    @event_handler("COPY")
    def copy(event: Any) -> None:
        log.log(b"%d" % event.number)
        raise ZeroDivisionError

    with logged() as lines, live(serve()) as running:
        out.broker_down()
        feed(cluster, 0, 1)
        wait_until(lambda: running.server.counts().get("dead_lettered") == 1 or lines, "it is copied")
        assert stays(lambda: committed(cluster, "svc", "in") == {}, 0.4)
        out.broker_up()
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 1}, "it is committed")
    assert values(out, "out") == [b"connected", b"0"]


# --- the scope itself ------------------------------------------------------------------------------------------------


def test_a_scope_counts_what_is_written_while_it_is_entered(cluster: Any, log: KafkaBatchLogger) -> None:
    scope = HandlerScope()
    log.log(b"before")
    entered = scope.enter()
    try:
        log.log(b"1")
        log.log(b"2", key="k", headers={"a": b"b"})
        first = scope.take()
        log.log(b"3")
    finally:
        scope.leave(entered)
    log.log(b"after")
    assert (first.produced, scope.account.produced) == (2, 1)
    assert scope.wait(first, 10)
    assert scope.wait(scope.account, 10)
    assert (first.delivered, first.failed, scope.account.delivered) == (2, 0, 1)
    assert log.flush() == 6  # the logger counts them as well


def test_scopes_of_two_contexts_do_not_mix(cluster: Any, log: KafkaBatchLogger) -> None:
    scopes = [HandlerScope(), HandlerScope()]

    def work(scope: HandlerScope, count: int) -> None:
        entered = scope.enter()
        for _ in range(count):
            log.log(b"x")
        scope.leave(entered)

    threads = [threading.Thread(target=work, args=(scope, 100 * (n + 1))) for n, scope in enumerate(scopes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [scope.account.produced for scope in scopes] == [100, 200]
    assert log.flush() == 301
    for scope in scopes:
        scope.collect()
    assert [scope.account.delivered for scope in scopes] == [100, 200]


def test_a_scope_keeps_the_first_failures(out: EmbeddedKafka, cluster: Any, log: KafkaBatchLogger) -> None:
    scope = HandlerScope()
    entered = scope.enter()
    out.broker_down()
    for message in numbered(20):
        log.log(message)
    scope.leave(entered)
    assert not scope.wait(scope.account, 0.05)
    out.broker_up()
    assert scope.wait(scope.account, 10)
    assert (scope.account.delivered, scope.account.failures) == (20, [])


def test_dispatch_captures_what_handlers_write(handler_registry: Any) -> None:
    batch, single = KafkaBatchLogger("127.0.0.1:1", topic="a"), KafkaLogger("127.0.0.1:1", topic="b")

    @event_handler("ASK")
    def ask(event: Any) -> None:
        batch.log(b"1", key="k", headers=[("h", b"v")])
        single.log("2", topic="c")
        assert single.log_many([b"3"]) == 0
        batch.flush()
        thread = threading.Thread(target=contextvars.copy_context().run, args=(batch.log, b"4"))
        thread.start()
        thread.join()

    result = dispatch(event("ASK"))
    assert result.error is None
    assert [(m.topic, m.value, m.key, m.headers) for m in result.published] == [
        ("a", b"1", b"k", [("h", b"v")]),
        ("c", b"2", None, []),
        ("b", b"3", None, []),
        ("a", b"4", None, []),
    ]
    assert (batch.produced_count, batch.pending_count) == (0, 0)  # no producer was made


def test_dispatch_captures_what_async_handlers_write(handler_registry: Any) -> None:
    single = KafkaLogger("127.0.0.1:1", topic="b")

    @event_handler("ASK")
    async def ask(event: Any) -> None:
        await asyncio.gather(*(single.alog(message) for message in numbered(3)))

    result = dispatch(event("ASK"))
    assert result.error is None
    assert [message.value for message in result.published] == numbered(3)


def test_errors_of_messages_are_the_handlers_own(handler_registry: Any) -> None:
    log = KafkaBatchLogger("127.0.0.1:1")

    @event_handler("ASK")
    def ask(event: Any) -> None:
        log.log(b"x")  # no topic

    result = dispatch(event("ASK"))
    assert "no topic" in str(result.error)
    assert not isinstance(result.error, KafkaError)
