"""At least once: when offsets are stored, what faults may cost, and that the oracle would notice a loss."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from embedded_support import (
    CLIENT,
    DEAD,
    DEADLINE_S,
    MODES,
    Live,
    committed,
    group_server,
    live,
    logged,
    numbered,
    quick,
    read,
    reading_server,
    run,
    send,
    stays,
    topics,
    values,
    wait_until,
)
from oracle import Load

from keven_core._native.library import live_objects
from keven_core.kafka._drivers import Call
from keven_core.kafka._session import Session
from keven_core.kafka.abstracts.event_handler import event_handler
from keven_core.kafka.errors import CommitError, DeadLetterError, KafkaError, OffsetOutOfRangeError
from keven_core.kafka.events.event import Event
from keven_core.testing import EmbeddedKafka

# A member that comes back waits for session_timeout - 1 s on the embedded broker.
REJOIN: dict[str, Any] = {"session_timeout": 1.5, "heartbeat_interval": 0.1}


# --- when offsets are stored -----------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("is_async", [False, True])
def test_an_offset_is_committed_only_after_its_handler_has_returned(
    embedded_kafka: Any, mode: str, is_async: bool
) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(5))
    entered, release = threading.Event(), threading.Event()

    def handle(message: bytes) -> None:
        if message == b"3":
            entered.set()
            assert release.wait(DEADLINE_S)

    async def handle_async(message: bytes) -> None:
        if message == b"3":
            entered.set()
            while not release.is_set():
                await asyncio.sleep(0.005)

    settings = quick(embedded_kafka, batch_size=1, commit_interval_ms=20)
    server = group_server(embedded_kafka, "t", handle_async if is_async else handle, settings=settings)
    with live(server, mode):
        assert entered.wait(DEADLINE_S)
        wait_until(lambda: committed(embedded_kafka, CLIENT, "t") == {0: 3}, "the commit of those before it")
        assert stays(lambda: committed(embedded_kafka, CLIENT, "t") == {0: 3})
        release.set()
        wait_until(lambda: committed(embedded_kafka, CLIENT, "t") == {0: 5}, "the commit of the rest")


@MODES
def test_nothing_of_a_batch_is_committed_before_it_is_through(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(10))
    entered, release = threading.Event(), threading.Event()
    stored: list[Any] = []

    def handle(message: bytes) -> None:
        if message == b"9":
            stored.append(server._session.consumer.offsets())  # type: ignore[union-attr]
            entered.set()
            assert release.wait(DEADLINE_S)

    settings = quick(embedded_kafka, commit_interval_ms=20, batch_timeout_ms=300)
    server = group_server(embedded_kafka, "t", handle, settings=settings)
    with live(server, mode):
        assert entered.wait(DEADLINE_S)
        assert stays(lambda: committed(embedded_kafka, CLIENT, "t") == {})
        release.set()
        wait_until(lambda: committed(embedded_kafka, CLIENT, "t") == {0: 10}, "the commit of the batch")
    assert stored == [{("t", 0): (9, -1, -1)}]  # position, stored, committed


class Ending(BaseException):
    """Neither an Exception nor one of Python's own."""


@MODES
@pytest.mark.logs_errors  # asyncio's
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, Ending])
def test_what_ends_the_process_leaves_its_record_unaccounted(
    embedded_kafka: Any, mode: str, is_async: bool, kind: type[BaseException]
) -> None:
    if is_async and mode == "sync":
        pytest.skip("a server with async handlers runs a loop in either case")
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(6))
    got: list[bytes] = []
    ending = True

    def handle(message: bytes) -> None:
        if message == b"3" and ending:
            raise kind("the end")
        got.append(message)

    async def handle_async(message: bytes) -> None:
        await asyncio.sleep(0)
        handle(message)

    def make() -> Any:
        handler = handle_async if is_async else handle
        return group_server(embedded_kafka, "t", handler, until_end=True, **REJOIN)

    with pytest.raises(kind, match="the end"):
        run(make(), mode)
    assert got == numbered(3)
    assert committed(embedded_kafka, CLIENT, "t") == {0: 3}
    assert values(embedded_kafka, DEAD) == []
    ending = False
    run(make(), mode)
    assert got == numbered(6)
    assert committed(embedded_kafka, CLIENT, "t") == {0: 6}


# --- dead letters that can't be written ------------------------------------------------------------------------------

MSG_SIZE_TOO_LARGE = 10
TOPIC_AUTHORIZATION_FAILED = 29


@MODES
@pytest.mark.logs_errors
@pytest.mark.parametrize("fault", ["topic error", "refused", "too large"])
def test_a_dead_letter_that_cannot_be_written_stops_the_server_and_keeps_the_offset(
    embedded_kafka: Any, mode: str, fault: str
) -> None:
    topics(embedded_kafka, "t")
    sent = numbered(5)
    send(embedded_kafka, "t", *sent)
    if fault == "topic error":
        embedded_kafka.set_topic_error(DEAD, TOPIC_AUTHORIZATION_FAILED)
    else:
        embedded_kafka.push_errors(
            "Produce", [TOPIC_AUTHORIZATION_FAILED if fault == "refused" else MSG_SIZE_TOO_LARGE]
        )
    got: list[bytes] = []
    failing = True

    def handle(message: bytes) -> None:
        if message == b"2" and failing:
            raise ValueError("fails")
        got.append(message)

    def make() -> Any:
        return group_server(embedded_kafka, "t", handle, until_end=True, **REJOIN)

    started = time.monotonic()
    with pytest.raises(DeadLetterError, match=r"kafka_server\.svc\.dead"):
        run(make(), mode)
    assert time.monotonic() - started < 20
    assert committed(embedded_kafka, CLIENT, "t") == {0: 2}
    # Started again, it goes on with that record; those after it may come again.
    failing = False
    embedded_kafka.set_topic_error(DEAD, 0)
    assert values(embedded_kafka, DEAD) == []
    before = len(got)
    run(make(), mode)
    assert got[before:] == sent[2:]
    assert committed(embedded_kafka, CLIENT, "t") == {0: 5}


@MODES
@pytest.mark.logs_errors
def test_a_dead_letter_is_written_before_the_offset_moves_on(mode: str) -> None:
    """The broker answers the copy late; meanwhile nothing is committed."""

    def failing(message: bytes) -> None:
        raise ValueError("fails")

    with EmbeddedKafka(brokers=2) as kafka:
        topics(kafka, "t")
        kafka.set_leader("t", 0, 1)
        kafka.set_leader(DEAD, 0, 2)
        kafka.set_coordinator(CLIENT, 1)
        send(kafka, "t", *numbered(3))
        settings = quick(kafka, commit_interval_ms=20)
        server = group_server(kafka, "t", failing, settings=settings)
        kafka.set_latency(1500, broker=2)
        with live(server, mode):
            wait_until(lambda: server.counts().get("dead") == 3, "the failures")
            assert stays(lambda: committed(kafka, CLIENT, "t") == {}, 0.5)
            kafka.set_latency(0, broker=2)
            wait_until(lambda: committed(kafka, CLIENT, "t") == {0: 3}, "the commit")
            assert sorted(values(kafka, DEAD)) == numbered(3)


# --- errors of the broker --------------------------------------------------------------------------------------------

# What has to go wrong first so that the client sends such a request in mid-run.
CAUSES = {"JoinGroup": ("Heartbeat", 25), "SyncGroup": ("Heartbeat", 25), "FindCoordinator": ("Heartbeat", 16),
          "OffsetFetch": ("Heartbeat", 25), "Metadata": ("Fetch", 6)}  # fmt: skip

FAULTS = {
    "Fetch": [6, 7, -195, 3, 6],  # not leader, timed out, disconnected, unknown topic, not leader
    "OffsetCommit": [14, 15, 16, 7, -195],  # loading, not available, not coordinator, timed out, disconnected
    "Metadata": [7, 5, -195],
    "FindCoordinator": [15, 14, -195],
    "JoinGroup": [14, 16, 25, -195],
    "SyncGroup": [27, 14],
    "Heartbeat": [16, 27, -195, 25],
    "OffsetFetch": [14, 16, -195],
}


@MODES
@pytest.mark.logs_errors
@pytest.mark.parametrize("request_name", FAULTS)
def test_errors_of_the_broker_under_load_cost_nothing(embedded_kafka: Any, mode: str, request_name: str) -> None:
    topics(embedded_kafka, "t", partitions=2)
    codes = FAULTS[request_name]
    # Metadata are asked for all the time, so that there is something to fail.
    settings = quick(embedded_kafka, {"topic.metadata.refresh.interval.ms": "50"}, commit_interval_ms=20)
    with Load(embedded_kafka, "t", 2) as load:
        server = group_server(embedded_kafka, "t", load.handle, settings=settings, **REJOIN)
        with live(server, mode):
            load.wait_for_more()
            before = embedded_kafka.requests().get(request_name, 0)
            embedded_kafka.push_errors(request_name, codes)
            cause = CAUSES.get(request_name)
            if cause is not None:
                embedded_kafka.push_errors(cause[0], [cause[1]])
            # Each error answers one request: when that many have come, all faults have happened.
            wait_until(
                lambda: embedded_kafka.requests().get(request_name, 0) >= before + len(codes),
                f"{len(codes)} failed {request_name} requests",
            )
            load.wait_for_more()
            load.finish()
            wait_until(lambda: committed(embedded_kafka, CLIENT, "t") == load.ends(), "everything is committed")
        load.check()


@MODES
def test_errors_of_the_broker_at_the_start_only_delay_it(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(5))
    embedded_kafka.requests()
    errors = {"FindCoordinator": [15, 15], "JoinGroup": [14, 27], "SyncGroup": [14], "OffsetFetch": [14]}
    for request, codes in errors.items():
        embedded_kafka.push_errors(request, codes)
    got: list[bytes] = []
    run(group_server(embedded_kafka, "t", got.append, until_end=True, **REJOIN), mode)
    assert got == numbered(5)
    assert embedded_kafka.requests()["JoinGroup"] >= 3
    assert committed(embedded_kafka, CLIENT, "t") == {0: 5}


@MODES
@pytest.mark.logs_errors
def test_a_broker_that_goes_down_and_up_under_load_costs_nothing(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t", partitions=2)
    settings = quick(embedded_kafka, commit_interval_ms=20)
    with Load(embedded_kafka, "t", 2) as load, logged() as lines:
        server = group_server(embedded_kafka, "t", load.handle, settings=settings, **REJOIN)
        with live(server, mode):
            for _ in range(3):
                load.wait_for_more()
                connections = embedded_kafka.requests().get("18", 0)  # ApiVersions, the first request of each
                embedded_kafka.broker_down()
                # All that was fetched is handled, and nothing more comes.
                wait_until(lambda: _stands_still(load), "the load stands still")
                embedded_kafka.broker_up()
                load.wait_for_more()
                assert embedded_kafka.requests()["18"] > connections
            load.finish()
            wait_until(lambda: committed(embedded_kafka, CLIENT, "t") == load.ends(), "everything is committed")
        load.check()
    assert any("can't be reached" in line for line in lines)


def _stands_still(load: Load) -> bool:
    handled = load.handled
    return stays(lambda: load.handled == handled, 0.15)


@MODES
@pytest.mark.logs_errors
def test_leaders_and_coordinators_that_move_under_load_cost_nothing(mode: str) -> None:
    with EmbeddedKafka(brokers=3) as kafka:
        topics(kafka, "t", partitions=2)
        kafka.requests()

        def move(broker: int) -> None:
            kafka.set_leader("t", 0, broker)
            kafka.set_leader("t", 1, broker % 3 + 1)
            kafka.set_coordinator(CLIENT, broker)

        move(1)
        settings = quick(kafka, commit_interval_ms=20)
        with Load(kafka, "t", 2) as load:
            server = group_server(kafka, "t", load.handle, settings=settings, **REJOIN)
            with live(server, mode):
                for broker in (2, 3, 1):
                    load.wait_for_more()
                    before = kafka.requests()["Metadata"]
                    move(broker)
                    wait_until(lambda: kafka.requests()["Metadata"] > before, "the move is noticed")  # noqa: B023
                    load.wait_for_more(300)
                load.finish()
            load.check()
        assert committed(kafka, CLIENT, "t") == load.ends()


@MODES
def test_members_that_join_and_leave_under_load_cost_nothing(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t", partitions=4)
    settings = quick(embedded_kafka, commit_interval_ms=20)
    with Load(embedded_kafka, "t", 4) as load:
        handled: dict[str, int] = {"first": 0, "second": 0}

        def member(name: str) -> Any:
            def handle(message: bytes) -> None:
                load.handle(message)
                handled[name] += 1

            return group_server(embedded_kafka, "t", handle, settings=settings, **REJOIN)

        with live(member("first"), mode) as first:
            load.wait_for_more()
            with live(member("second"), mode) as second:
                members = (first.server, second.server)
                wait_until(lambda: all(len(entry.assignment()) == 2 for entry in members), "both have partitions")
                load.wait_for_more(200)
            wait_until(lambda: len(first.server.assignment()) == 4, "the first has them again")
            load.wait_for_more()
            load.finish()
        assert handled["first"] > 0
        assert handled["second"] > 0
        load.check()
    assert committed(embedded_kafka, CLIENT, "t") == load.ends()


@MODES
def test_a_failed_background_commit_is_warned_about_and_repeated(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    settings = quick(embedded_kafka, commit_interval_ms=20)
    got: list[bytes] = []
    with logged() as lines, live(group_server(embedded_kafka, "t", got.append, settings=settings), mode):
        embedded_kafka.push_errors("OffsetCommit", [30])  # GROUP_AUTHORIZATION_FAILED, not retried by the client
        send(embedded_kafka, "t", b"0")
        wait_until(lambda: any("background commit failed" in line for line in lines), "the warning")
        send(embedded_kafka, "t", b"1")
        wait_until(lambda: committed(embedded_kafka, CLIENT, "t") == {0: 2}, "the next commit")


@MODES
def test_a_last_commit_that_is_refused_is_an_error(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    got: list[bytes] = []
    server = group_server(embedded_kafka, "t", got.append, settings=quick(embedded_kafka, commit_interval_ms=60_000))
    running = Live(server, mode)
    wait_until(lambda: len(got) == 3, "the records")
    embedded_kafka.push_errors("OffsetCommit", [30] * 20)
    server.stop()
    running.join()
    assert isinstance(running.error, CommitError)
    assert running.error.offsets == [("t", 0, 3)]
    assert "t [0] @ 3" in str(running.error)


@MODES
@pytest.mark.parametrize(
    ("code", "error"),
    [
        pytest.param(27, None, id="rebalance in progress"),
        pytest.param(113, None, id="stale member epoch"),
        # Where nobody rearranges the group, the client takes it for the loss of all its partitions.
        pytest.param(22, CommitError, id="illegal generation"),
    ],
)
def test_a_last_commit_waits_for_the_others_rebalance(
    embedded_kafka: Any, mode: str, code: int, error: type[CommitError] | None
) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    got: list[bytes] = []
    server = group_server(embedded_kafka, "t", got.append, settings=quick(embedded_kafka, commit_interval_ms=60_000))
    running = Live(server, mode)
    wait_until(lambda: len(got) == 3, "the records")
    embedded_kafka.push_errors("OffsetCommit", [code] * 4)
    stopped = time.monotonic()
    server.stop()
    running.join()
    assert time.monotonic() - stopped < 5
    if error is None:
        assert running.error is None
        assert committed(embedded_kafka, CLIENT, "t") == {0: 3}
    else:
        assert isinstance(running.error, error)


@MODES
@pytest.mark.leaves_clients
@pytest.mark.parametrize("way", ["stop", "with"])
def test_a_stalled_broker_at_the_end_is_waited_for_only_so_long(embedded_kafka: Any, mode: str, way: str) -> None:
    topics(embedded_kafka, "t", partitions=2)
    send(embedded_kafka, "t", *numbered(3))
    send(embedded_kafka, "t", b"other", partition=1)
    got: list[bytes] = []
    settings = quick(embedded_kafka, commit_interval_ms=60_000, close_timeout_ms=700)
    server = group_server(embedded_kafka, "t", got.append, settings=settings)
    times: list[float] = []

    def stall() -> None:
        with server if way == "with" else live(server, mode):
            wait_until(lambda: len(got) == 4, "the records")
            embedded_kafka.set_latency(60_000)
            times.append(time.monotonic())

    with logged() as lines, pytest.raises(CommitError) as caught:
        stall()
    assert time.monotonic() - times[0] < 5
    assert sorted(caught.value.offsets) == [("t", 0, 3), ("t", 1, 1)]
    for part in ("t [0] @ 3", "t [1] @ 1", "handled again"):
        assert part in str(caught.value)
    assert any("did not answer within 700 ms" in line for line in lines)


# --- where a new group starts ----------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("reset", ["earliest", "latest", "error"])
def test_a_group_without_offsets_starts_where_it_is_told(embedded_kafka: Any, mode: str, reset: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    got: list[bytes] = []
    settings = quick(embedded_kafka, auto_offset_reset=reset)
    server = group_server(embedded_kafka, "t", got.append, settings=settings, until_end=True)
    with pytest.raises(OffsetOutOfRangeError) if reset == "error" else contextlib.nullcontext():
        run(server, mode)
    assert got == (numbered(3) if reset == "earliest" else [])


@MODES
@pytest.mark.parametrize("reset", ["earliest", "error"])
def test_an_offset_that_is_gone_resets_or_ends(embedded_kafka: Any, mode: str, reset: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    got: list[bytes] = []
    settings = quick(embedded_kafka, auto_offset_reset=reset)
    server = reading_server(embedded_kafka, "t", got.append, settings=settings, start={("t", 0): 50}, until_end=False)
    if reset == "error":
        with pytest.raises(OffsetOutOfRangeError):
            run(server, mode)
        return
    with live(server, mode):
        wait_until(lambda: got == numbered(3), "the records from the beginning")


@MODES
@pytest.mark.logs_errors
def test_a_topic_that_is_not_there_is_an_error_naming_it(embedded_kafka: Any, mode: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("keven_core.kafka._topic_setup._TOPIC_WAIT_S", 0.3)
    topics(embedded_kafka, "t")
    embedded_kafka.set_topic_error("t", 3)
    with pytest.raises(KafkaError, match=r"topic.* t do") as caught:
        run(group_server(embedded_kafka, "t", print), mode)
    assert caught.value.name == "UNKNOWN_TOPIC_OR_PART"


# --- large payloads --------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("codec", ["json", "msgpack"])
@pytest.mark.parametrize("size", [300, 32_000, 33_000, 300_000])
def test_what_a_handler_keeps_of_a_payload_stays_intact(
    embedded_kafka: Any, handler_registry: Any, mode: str, codec: str, size: int
) -> None:
    class Document(Event):
        event_name = "DOCUMENT"
        number: int
        body: msgspec.Raw

    kept: list[Any] = []

    @event_handler("DOCUMENT")
    def handle(event: Any) -> None:
        kept.append(event)

    encode = msgspec.json.encode if codec == "json" else msgspec.msgpack.encode
    bodies = [encode([str(number) * (size - 200)]) for number in range(6)]
    topics(embedded_kafka, "t")
    for number, body in enumerate(bodies):
        send(embedded_kafka, "t", Document(number=number, body=msgspec.Raw(body)).serialize(codec))
    server = reading_server(embedded_kafka, "t", settings=quick(embedded_kafka, batch_size=2))
    run(server, mode)  # the client is closed now
    del server
    assert [bytes(event.body) for event in kept] == bodies
    shared = live_objects()["payloads"]
    assert shared == (6 if size >= 33_000 else 0)
    for event in kept[:3]:
        event.body = msgspec.Raw(b"null")
    kept.reverse()
    while kept:
        last = kept.pop()
        assert bytes(last.body) in (b"null", *bodies)
        del last
    del event
    wait_until(lambda: live_objects()["payloads"] == 0, "the payloads are freed")


# --- the oracle would notice -----------------------------------------------------------------------------------------


def _crash_and_go_on(kafka: Any, mode: str) -> Any:
    """A consumer that dies in the middle of its work and is started again; returns the oracle's verdict."""
    topics(kafka, "t", partitions=2)
    crashing = True
    with Load(kafka, "t", 2, window=1000, total=400) as load:
        load.end()

        def handle(message: bytes) -> None:
            if crashing and load.handled >= 150:
                raise SystemExit("killed")
            load.handle(message)

        settings = quick(kafka, batch_size=100, batch_timeout_ms=300)
        with pytest.raises(SystemExit, match="killed"):
            run(group_server(kafka, "t", handle, settings=settings, **REJOIN), mode)
        crashing = False
        run(group_server(kafka, "t", handle, settings=settings, until_end=True, **REJOIN), mode)
        return load.verdict()


@MODES
@pytest.mark.logs_errors  # asyncio's
def test_a_consumer_that_dies_and_comes_back_loses_nothing(embedded_kafka: Any, mode: str) -> None:
    verdict = _crash_and_go_on(embedded_kafka, mode)
    assert verdict.good, verdict


@pytest.mark.logs_errors
@pytest.mark.parametrize("planted", ["commit before handling", "account what has failed"])
def test_the_oracle_notices_a_planted_loss(embedded_kafka: Any, monkeypatch: Any, planted: str) -> None:
    if planted == "commit before handling":
        _plant_commit_before_handling(monkeypatch)
    else:
        _plant_skip_of_what_failed(monkeypatch)
    verdict = _crash_and_go_on(embedded_kafka, "sync")
    assert verdict.lost, "the planted bug was not noticed"


def _plant_commit_before_handling(monkeypatch: Any) -> None:
    """Batches are stored and committed first and handled then, as an auto-committing consumer does."""
    settle = Session._settle
    make = Session.__init__
    waiting: list[bytes] = []
    handlers: list[Callable[[bytes], None]] = []

    def make_deferring(self: Any, plan: Any, owner: Any) -> None:
        from keven_core.kafka.routing import runners_table

        handlers[:] = owner.runners
        plan.table = runners_table([waiting.append], pass_topic=False)
        make(self, plan, owner)

    def settle_first(self: Any, *args: Any) -> Any:
        failure = yield from settle(self, *args)
        yield Call(lambda: self.consumer.commit(5000))
        batch, waiting[:] = list(waiting), []
        for message in batch:
            handlers[0](message)
        return failure

    monkeypatch.setattr(Session, "__init__", make_deferring)
    monkeypatch.setattr(Session, "_settle", settle_first)
    # The planted handlers run outside the record's turn, so the oracle has to do without its position.
    monkeypatch.setattr(Load, "handle", lambda self, message: self.take(int(message)))


def _plant_skip_of_what_failed(monkeypatch: Any) -> None:
    """What ends the process counts as done: an exception handler that is too broad."""
    from keven_core.kafka import routing

    plain = routing.compose

    def swallowing(calls: Any, pre: Any, post: Any) -> Any:
        call = plain(calls, pre, post)

        def handle(message: bytes) -> None:
            try:
                call(message)
            except SystemExit as error:
                ended.append(error)

        return handle

    ended: list[BaseException] = []
    settle = Session._settle

    def settle_and_end(self: Any, *args: Any) -> Any:
        failure = yield from settle(self, *args)
        if ended:
            error = ended[0]
            ended.clear()
            raise error
        return failure

    monkeypatch.setattr(routing, "compose", swallowing)
    monkeypatch.setattr(Session, "_settle", settle_and_end)


def test_the_oracle_notices_skips_and_counts_duplicates(embedded_kafka: Any) -> None:
    load = Load(embedded_kafka, "t")
    load.sent += [0, 1, 2, 3]
    for number in (0, 2, 1, 1):
        load.take(number, 0, number)
    verdict = load.verdict()
    load._feeder.__exit__()
    assert (verdict.lost, verdict.skips, verdict.duplicates, verdict.good) == ({3}, [(1, 0, 1)], 1, False)


@pytest.mark.logs_errors
def test_dead_letters_of_a_whole_run_stand_beside_what_was_handled(embedded_kafka: Any) -> None:
    """Handled and dead-lettered together are everything, each id in exactly one of them."""
    topics(embedded_kafka, "t", partitions=2)
    with Load(embedded_kafka, "t", 2, window=1000, total=500) as load:

        def handle(message: bytes) -> None:
            if int(message) % 7 == 0:
                raise ValueError("unlucky")
            load.handle(message)

        load.end()
        server = group_server(embedded_kafka, "t", handle, until_end=True)
        run(server, "sync")
    dead = [int(entry.value or b"") for entry in read(embedded_kafka, DEAD)]
    assert sorted(dead) == list(range(0, 500, 7))
    assert load.verdict().lost == set(dead)
    assert committed(embedded_kafka, CLIENT, "t") == load.ends()
