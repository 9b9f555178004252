"""What asyncio promises holds inside handlers: tasks, timeouts, cancellation, context variables; and around them."""

import asyncio
import contextvars
import itertools
import sys
import threading
import time
from typing import Any

import pytest
import uvloop
from embedded_support import (
    CLIENT,
    DEAD,
    DEADLINE_S,
    MODES,
    Feeder,
    Message,
    committed,
    event,
    group_server,
    live,
    numbered,
    quick,
    read,
    reading_server,
    run,
    send,
    topics,
    values,
    wait_until,
)

from keven_core.kafka.abstracts.event_handler import EventHandler, event_handler
from keven_core.kafka.record import current_record

since_311 = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 brought it")

LOOPS = pytest.mark.parametrize("loop_run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


# --- tasks, timeouts, cancellation -----------------------------------------------------------------------------------


@LOOPS
def test_a_handler_runs_in_a_task_of_the_servers_loop(embedded_kafka: Any, loop_run: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    seen: list[Any] = []

    async def handle(message: bytes) -> None:
        task = asyncio.current_task()
        await asyncio.sleep(0)
        seen.append((asyncio.current_task() is task, task in asyncio.all_tasks(), asyncio.get_running_loop()))

    async def main() -> None:
        server_task = asyncio.create_task(reading_server(embedded_kafka, "t", handle).run_server())
        await server_task
        assert seen == [(True, True, asyncio.get_running_loop())] * 3

    loop_run(main())


@since_311
@LOOPS
def test_asyncio_timeout_works_in_a_handler(embedded_kafka: Any, loop_run: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"slow", b"fast", b"slow", b"fast")
    seen: list[Any] = []

    async def handle(message: bytes) -> None:
        try:
            async with asyncio.timeout(0.02):
                await asyncio.sleep(DEADLINE_S if message == b"slow" else 0)
        except TimeoutError:
            seen.append("timeout")
        else:
            seen.append(message)

    server = reading_server(embedded_kafka, "t", handle)
    loop_run(server.run_server())
    assert seen == ["timeout", b"fast", "timeout", b"fast"]
    assert server.counts()["done"] == 4


@since_311
@pytest.mark.logs_errors
def test_a_timeout_that_escapes_fails_only_its_record(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"slow", b"fast")
    seen: list[Any] = []

    async def handle(message: bytes) -> None:
        async with asyncio.timeout(0.02):
            await asyncio.sleep(DEADLINE_S if message == b"slow" else 0)
        seen.append(message)

    run(reading_server(embedded_kafka, "t", handle), "async")
    assert seen == [b"fast"]
    [dead] = read(embedded_kafka, DEAD)
    assert (dead.value, dead.header("kafka_dlt-exception-fqcn")) == (b"slow", b"builtins.TimeoutError")


@since_311
@pytest.mark.logs_errors
def test_task_groups_work_in_a_handler(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    seen: list[Any] = []

    async def child(message: bytes, number: int) -> None:
        await asyncio.sleep(0)
        if message == b"1" and number == 1:
            raise ValueError("one child")
        seen.append((message, number))

    async def handle(message: bytes) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(child(message, number))

    server = reading_server(embedded_kafka, "t", handle)
    run(server, "async")
    assert [entry for entry in seen if entry[0] != b"1"] == [
        (b"0", 0),
        (b"0", 1),
        (b"0", 2),
        (b"2", 0),
        (b"2", 1),
        (b"2", 2),
    ]
    assert (server.counts()["done"], values(embedded_kafka, DEAD)) == (2, [b"1"])


@LOOPS
def test_wait_for_and_cancelled_subtasks_work_in_a_handler(embedded_kafka: Any, loop_run: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    seen: list[str] = []

    async def handle(message: bytes) -> None:
        try:
            await asyncio.wait_for(asyncio.sleep(DEADLINE_S), 0.01)
        except asyncio.TimeoutError:
            seen.append("timeout")
        task = asyncio.create_task(asyncio.sleep(DEADLINE_S))
        await asyncio.sleep(0)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            seen.append("cancelled")
        assert await asyncio.gather(asyncio.sleep(0, 1), asyncio.sleep(0, 2)) == [1, 2]

    server = reading_server(embedded_kafka, "t", handle)
    loop_run(server.run_server())
    assert seen == ["timeout", "cancelled"] * 3
    assert server.counts()["done"] == 3


@since_311
@pytest.mark.logs_errors
@pytest.mark.parametrize("handlers", ["one", "several"])
def test_a_cancellation_that_a_handler_lets_escape_fails_only_its_record(
    embedded_kafka: Any, handler_registry: Any, monkeypatch: pytest.MonkeyPatch, handlers: str
) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", event("A", number=0), event("A", number=1), event("A", number=2))
    seen: list[Any] = []
    monkeypatch.setattr(EventHandler, "_post_hooks", [])

    @event_handler("A")
    async def handle(event: Any) -> None:
        if event.number == 1:
            task = asyncio.create_task(asyncio.sleep(DEADLINE_S))
            task.cancel()
            await task
        seen.append(event.number)

    if handlers == "several":

        @event_handler("A")
        async def other(event: Any) -> None:
            seen.append(("other", event.number))

        EventHandler.register_post_handler_hook(lambda event: seen.append(("after", event.number)))

    server = reading_server(embedded_kafka, "t")
    run(server, "async")
    if handlers == "several":
        rest = [(name, number) for number in range(3) for name in ("other", "after")]
        assert [entry for entry in seen if isinstance(entry, tuple)] == rest
    assert [entry for entry in seen if isinstance(entry, int)] == [0, 2]
    [dead] = read(embedded_kafka, DEAD)
    assert dead.value == event("A", number=1)
    assert b"CancelledError" in (dead.header("kafka_dlt-exception-message") or b"")
    assert server.counts()["dead"] == 1


@pytest.mark.logs_errors
def test_a_handler_that_fails_after_waiting_fails_only_its_record(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(4))
    seen: list[bytes] = []

    async def handle(message: bytes) -> None:
        await asyncio.sleep(0)
        if message in (b"1", b"2"):
            raise ValueError(message)
        seen.append(message)

    server = reading_server(embedded_kafka, "t", handle)
    run(server, "async")
    assert seen == [b"0", b"3"]
    assert values(embedded_kafka, DEAD) == [b"1", b"2"]


def test_records_of_a_partition_are_handled_one_after_the_other(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(100))
    seen: list[bytes] = []
    running = 0

    async def handle(message: bytes) -> None:
        nonlocal running
        running += 1
        assert running == 1
        for _ in range(int(message) % 3):
            await asyncio.sleep(0)
        seen.append(message)
        running -= 1

    run(reading_server(embedded_kafka, "t", handle), "async")
    assert seen == numbered(100)


def test_the_record_in_hand_is_known_while_its_handler_waits(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *(Message(b"x" * size, key=b"%d" % size) for size in (1, 40_000, 5)))
    seen: list[Any] = []

    async def handle(message: bytes) -> None:
        await asyncio.sleep(0)
        record = current_record()
        seen.append((record.key, record.offset, record.value == message))

    run(reading_server(embedded_kafka, "t", handle), "async")
    assert seen == [(b"1", 0, True), (b"40000", 1, True), (b"5", 2, True)]


# --- context variables -----------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("is_async", [False, True])
def test_what_a_handler_sets_is_not_seen_by_the_next_record(embedded_kafka: Any, mode: str, is_async: bool) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(6))
    seen: list[str] = []

    def handle(message: bytes) -> None:
        seen.append(variable.get())
        if int(message) % 2 == 0:
            variable.set(f"by {message!r}")

    async def handle_async(message: bytes) -> None:
        seen.append(variable.get())
        await asyncio.sleep(0)
        if int(message) % 2 == 0:
            variable.set(f"by {message!r}")
        await asyncio.sleep(0)

    run(reading_server(embedded_kafka, "t", handle_async if is_async else handle), mode)
    assert seen == ["unset"] * 6


@MODES
@pytest.mark.logs_errors
def test_nothing_leaks_between_sync_async_and_tombstone_handlers(
    embedded_kafka: Any, handler_registry: Any, mode: str
) -> None:
    topics(embedded_kafka, "t")
    key = [("event_name", b"SYNC")]
    messages = [
        event("SYNC"),
        event("ASYNC"),
        Message(None, headers=key),
        event("SYNC"),
        event("RAISES"),
        event("ASYNC"),
    ]
    send(embedded_kafka, "t", *messages, *messages)
    seen: list[tuple[str, str]] = []

    def look(name: str) -> None:
        seen.append((name, variable.get()))
        variable.set(name)

    class Sync(EventHandler):
        event_name = "SYNC"

        def handle_event(self, event: Any) -> None:
            look("sync")

        def handle_tombstone(self, record: Any) -> None:
            look("tombstone")

    class Async(EventHandler):
        event_name = "ASYNC"

        async def handle_event(self, event: Any) -> None:
            look("async")
            await asyncio.sleep(0)

    @event_handler("RAISES")
    def raises(event: Any) -> None:
        look("raises")
        raise ValueError

    run(reading_server(embedded_kafka, "t"), mode)
    assert seen == [(name, "unset") for name in ("sync", "async", "tombstone", "sync", "raises", "async")] * 2


@LOOPS
@pytest.mark.parametrize("changes", [False, True])
def test_one_worker_task_serves_until_a_handler_changes_a_variable(
    embedded_kafka: Any, loop_run: Any, changes: bool
) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(500))
    tasks: list[Any] = []

    async def handle(message: bytes) -> None:
        tasks.append(asyncio.current_task())
        if int(message) % 2:
            await asyncio.sleep(0)
        if changes:
            variable.set(str(message))

    loop_run(reading_server(embedded_kafka, "t", handle).run_server())
    assert len(tasks) == 500
    assert len(set(map(id, tasks))) == (500 if changes else 1)


def test_a_variable_set_and_reset_leaves_the_worker_as_it_was(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(50))
    seen: list[str] = []

    async def handle(message: bytes) -> None:
        token = variable.set("inside")
        await asyncio.sleep(0)
        seen.append(variable.get())
        variable.reset(token)

    run(reading_server(embedded_kafka, "t", handle), "async")
    assert seen == ["inside"] * 50


def test_tasks_that_a_handler_leaves_behind_keep_their_context(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    seen: list[str] = []
    tasks: list[asyncio.Task[None]] = []

    async def later() -> None:
        await asyncio.sleep(0)
        seen.append(variable.get())

    async def handle(message: bytes) -> None:
        variable.set(message.decode())
        tasks.append(asyncio.create_task(later()))

    async def stop() -> None:
        await asyncio.gather(*tasks)

    run(reading_server(embedded_kafka, "t", handle, on_stop=stop), "async")
    assert sorted(seen) == ["0", "1", "2"]


# --- the loop around -------------------------------------------------------------------------------------------------


@LOOPS
@pytest.mark.parametrize("is_async", [False, True])
def test_other_tasks_make_progress_under_load(embedded_kafka: Any, loop_run: Any, is_async: bool) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(10_000))
    handled = 0
    turns: list[int] = []  # how many records were handled when the other task had its turn

    def handle(message: bytes) -> None:
        nonlocal handled
        handled += 1

    async def handle_async(message: bytes) -> None:
        handle(message)

    async def main() -> None:
        server = reading_server(
            embedded_kafka, "t", handle_async if is_async else handle, settings=quick(embedded_kafka, batch_size=100)
        )
        task = asyncio.create_task(server.run_server())
        while not task.done():
            turns.append(handled)
            await asyncio.sleep(0)
        await task

    loop_run(main())
    assert handled == 10_000
    # A turn after each batch: never more than a batch between two turns.
    assert max(after - before for before, after in itertools.pairwise(turns)) <= 100


def test_an_idle_server_costs_nothing_but_wakes_at_once(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    got: list[float] = []
    server = reading_server(embedded_kafka, "t", lambda message: got.append(time.monotonic()), until_end=False)
    with live(server, "async"), Feeder(embedded_kafka) as feeder:
        for _ in range(5):
            count, sent = len(got), time.monotonic()
            feeder.send("t", b"x")
            wait_until(lambda: len(got) > count, "the record")  # noqa: B023
            assert got[-1] - sent < 0.45  # not the 0.5 s of a slice


@LOOPS
def test_cancelling_run_server_stops_in_order_and_commits(embedded_kafka: Any, loop_run: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(5))
    got: list[bytes] = []
    stopped: list[bool] = []

    async def main() -> None:
        server = group_server(embedded_kafka, "t", got.append, on_stop=lambda: stopped.append(True))
        task = asyncio.create_task(server.run_server())
        deadline = time.monotonic() + DEADLINE_S
        while len(got) < 5 and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    loop_run(main())
    assert (got, stopped) == (numbered(5), [True])
    assert committed(embedded_kafka, CLIENT, "t") == {0: 5}


@LOOPS
def test_wait_for_around_run_server_bounds_it(embedded_kafka: Any, loop_run: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(5))
    got: list[bytes] = []

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(group_server(embedded_kafka, "t", got.append).run_server(), 1.5)

    loop_run(main())
    assert got == numbered(5)
    assert committed(embedded_kafka, CLIENT, "t") == {0: 5}


@LOOPS
def test_cancelling_waits_for_the_handler_and_cancelling_again_cancels_it(embedded_kafka: Any, loop_run: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    seen: list[str] = []
    rejoin: dict[str, Any] = {"session_timeout": 2, "heartbeat_interval": 0.4}

    async def main(times: int) -> None:
        entered, release = asyncio.Event(), asyncio.Event()

        async def handle(message: bytes) -> None:
            seen.append(f"begin {message.decode()}")
            entered.set()
            try:
                await release.wait()
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise
            seen.append(f"end {message.decode()}")

        settings = quick(embedded_kafka, batch_size=1)
        task = asyncio.create_task(group_server(embedded_kafka, "t", handle, settings=settings, **rejoin).run_server())
        await asyncio.wait_for(entered.wait(), DEADLINE_S)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0.05)
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    loop_run(main(1))
    assert seen == ["begin 0", "end 0"]
    assert committed(embedded_kafka, CLIENT, "t") == {0: 1}
    seen.clear()
    loop_run(main(2))
    # The record whose handler was cancelled is not accounted: it comes again.
    assert seen == ["begin 1", "cancelled"]
    assert committed(embedded_kafka, CLIENT, "t") == {0: 1}


@LOOPS
def test_stop_waits_for_a_handler_that_is_suspended(embedded_kafka: Any, loop_run: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    seen: list[bytes] = []

    async def main() -> None:
        entered, release = asyncio.Event(), asyncio.Event()

        async def handle(message: bytes) -> None:
            entered.set()
            await release.wait()
            seen.append(message)

        server = group_server(embedded_kafka, "t", handle, settings=quick(embedded_kafka, batch_size=1))
        task = asyncio.create_task(server.run_server())
        await asyncio.wait_for(entered.wait(), DEADLINE_S)
        threading.Thread(target=server.stop).start()
        done, _ = await asyncio.wait([task], timeout=0.3)
        assert not done
        release.set()
        await task

    loop_run(main())
    assert seen == [b"0"]
    assert committed(embedded_kafka, CLIENT, "t") == {0: 1}


def test_a_sync_start_runs_async_handlers_in_a_loop_of_its_own(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"x")
    loops: list[Any] = []

    async def handle(message: bytes) -> None:
        await asyncio.sleep(0)
        loops.append(asyncio.get_running_loop())

    reading_server(embedded_kafka, "t", handle).start_sync()
    assert isinstance(loops[0], uvloop.Loop)


def test_a_sync_start_without_anything_async_runs_no_loop(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"x")
    seen: list[Any] = []

    def handle(message: bytes) -> None:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        seen.append(threading.current_thread())

    reading_server(embedded_kafka, "t", handle).start_sync()
    assert seen == [threading.current_thread()]


def test_a_batch_is_waited_for_without_blocking_the_loop(embedded_kafka: Any) -> None:
    """KEVEN_BATCH_TIMEOUT_MS in an async server: other tasks run meanwhile."""
    topics(embedded_kafka, "t")
    batches: list[int] = []

    async def main() -> None:
        settings = quick(embedded_kafka, batch_timeout_ms=150)
        server = reading_server(embedded_kafka, "t", lambda message: None, settings=settings, until_end=False)
        task = asyncio.create_task(server.run_server())
        while not server.ready():
            await asyncio.sleep(0.001)
        consumer = server._session.consumer  # type: ignore[union-attr]
        with Feeder(embedded_kafka) as feeder:
            for number in range(20):
                feeder.send("t", b"x")
                feeder.wait()
                await asyncio.sleep(0.001 if number else 0.02)
        while server.counts()["done"] < 20:
            batches.append(consumer.polls)
            await asyncio.sleep(0.001)
        server.stop()
        await task

    uvloop.run(main())
    assert len(batches) > 5  # the loop had its turns while the batch was waited for
