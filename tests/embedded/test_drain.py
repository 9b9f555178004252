"""The end of a server: what is in hand is finished in time, what can't be is named, and neither done nor failed."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from embedded_support import (
    CLIENT,
    DEAD,
    MODES,
    Live,
    committed,
    group_server,
    live,
    logged,
    numbered,
    quick,
    run,
    send,
    topics,
    values,
    wait_until,
)

from keven_core.kafka.errors import DrainError, LedgerError
from keven_core.kafka.topics import retry_topic

SYNC = pytest.mark.parametrize("mode", ["sync", pytest.param("async", marks=pytest.mark.soak)])
SHORT = 300  # ms, to drain in


@pytest.fixture
def own_handlers() -> Iterator[list[int]]:
    """Signal handlers of the service, which only take note."""
    noted: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, frame: noted.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    yield noted
    for number, handler in previous.items():
        signal.signal(number, handler)


async def _cancelled(message: bytes) -> None:
    await asyncio.sleep(60)


async def _fails_when_cancelled(message: bytes) -> None:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        raise ValueError("not my fault") from None


@pytest.mark.parametrize("hang", [_cancelled, _fails_when_cancelled])
def test_an_async_handler_that_takes_too_long_is_cancelled_and_named(embedded_kafka: Any, hang: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(5))
    got: list[bytes] = []
    stopped: list[float] = []

    async def handle(message: bytes) -> None:
        got.append(message)
        if message == b"2":
            await hang(message)

    settings = quick(embedded_kafka, drain_timeout_ms=SHORT)
    server = group_server(
        embedded_kafka, "t", handle, settings=settings, on_stop=lambda: stopped.append(time.monotonic())
    )
    with logged() as lines:
        running = Live(server, "async")
        wait_until(lambda: b"2" in got, "the handler hangs")
        began = time.monotonic()
        server.stop()
        running.join()
    assert SHORT / 1000 <= stopped[0] - began < 3
    error = running.error
    assert isinstance(error, DrainError)
    assert error.records == [("t", 0, 2)]
    assert error.exit_code == 3
    for text in (str(error), "\n".join(lines)):
        assert f"KEVEN_DRAIN_TIMEOUT_MS={SHORT} has passed: unfinished: t [0] @ 2;" in text
    assert got == numbered(3)
    assert server.counts()["done"] == 2
    assert server.counts()["in_flight"] == 1
    assert committed(embedded_kafka, CLIENT, "t") == {0: 2}
    assert values(embedded_kafka, DEAD) == []


def test_an_async_handler_that_returns_when_cancelled_is_done(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(5))
    got: list[bytes] = []

    async def handle(message: bytes) -> None:
        got.append(message)
        if message == b"2":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                got.append(b"tidied up")

    server = group_server(embedded_kafka, "t", handle, settings=quick(embedded_kafka, drain_timeout_ms=SHORT))
    with live(server, "async"):
        wait_until(lambda: b"2" in got, "the handler hangs")
    # And nothing is begun after it.
    assert got == [*numbered(3), b"tidied up"]
    assert committed(embedded_kafka, CLIENT, "t") == {0: 3}


def test_another_attempt_is_cut_off_too(embedded_kafka: Any) -> None:
    waiting = retry_topic(CLIENT)
    topics(embedded_kafka, "t", waiting)
    send(embedded_kafka, "t", b"x")
    attempts: list[bytes] = []

    async def handle(message: bytes) -> None:
        attempts.append(message)
        if len(attempts) == 1:
            raise ValueError
        await asyncio.sleep(60)

    server = group_server(
        embedded_kafka,
        "t",
        handle,
        settings=quick(embedded_kafka, drain_timeout_ms=SHORT),
        auto_reprocess_errors=True,
        retry_interval=0.05,
        log_exceptions=False,
    )
    running = Live(server, "async")
    wait_until(lambda: len(attempts) == 2, "the second attempt")
    server.stop()
    running.join()
    assert isinstance(running.error, DrainError)
    assert running.error.records == [("t", 0, 0)]
    assert committed(embedded_kafka, CLIENT, "t") == {0: 1}
    assert committed(embedded_kafka, CLIENT, waiting) == {}
    assert values(embedded_kafka, DEAD) == []


@MODES
def test_what_was_not_begun_in_time_is_left(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(100))
    got: list[bytes] = []
    entered = threading.Event()

    def work(message: bytes) -> None:
        got.append(message)
        entered.set()
        time.sleep(0.05)  # 100 of them take longer than there is to drain

    async def work_async(message: bytes) -> None:
        got.append(message)
        entered.set()
        await asyncio.sleep(0.05)

    handle = work if mode == "sync" else work_async
    server = group_server(embedded_kafka, "t", handle, settings=quick(embedded_kafka, drain_timeout_ms=1500))
    with live(server, mode, wait=False):
        entered.wait(10)
    assert 2 < len(got) < 60  # of 100, some 30; fewer where the machine stands still for a moment
    assert got == numbered(len(got))
    assert committed(embedded_kafka, CLIENT, "t") == {0: len(got)}


@MODES
def test_without_time_to_drain_the_record_in_hand_is_the_last(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(100))
    got: list[bytes] = []

    def handle(message: bytes) -> None:
        got.append(message)
        server.stop()
        time.sleep(0.25)  # longer than a slice

    server = group_server(embedded_kafka, "t", handle, settings=quick(embedded_kafka, drain_timeout_ms=0))
    run(server, mode)
    assert got == [b"0"]
    assert committed(embedded_kafka, CLIENT, "t") == {0: 1}


@SYNC
def test_a_sync_handler_that_takes_too_long_is_named_and_waited_for(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    got: list[bytes] = []
    with logged() as lines:

        def handle(message: bytes) -> None:
            got.append(message)
            server.stop()
            wait_until(lambda: any("KEVEN_DRAIN_TIMEOUT_MS" in line for line in lines), "it is named", 5)

        server = group_server(embedded_kafka, "t", handle, settings=quick(embedded_kafka, drain_timeout_ms=SHORT))
        run(server, mode)
    assert got == [b"0"]
    (line,) = [line for line in lines if "KEVEN_DRAIN_TIMEOUT_MS" in line]
    assert "while t [0] @ 0 was being handled" in line
    assert committed(embedded_kafka, CLIENT, "t") == {0: 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_second_signal_cuts_an_async_handler_off(embedded_kafka: Any, own_handlers: list[int], number: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))

    async def handle(message: bytes) -> None:
        if message == b"1":
            os.kill(os.getpid(), number)
            while not server._session.stopping:  # type: ignore[union-attr]
                await asyncio.sleep(0.001)
            os.kill(os.getpid(), number)
            await asyncio.sleep(60)

    server = group_server(embedded_kafka, "t", handle)
    with logged() as lines, pytest.raises(DrainError) as caught:
        run(server, "async")
    assert caught.value.records == [("t", 0, 1)]
    assert caught.value.exit_code == 5
    assert own_handlers == [number]
    assert f"{number.name} came while the server was ending: unfinished: t [0] @ 1;" in "\n".join(lines)
    assert committed(embedded_kafka, CLIENT, "t") == {0: 1}


@pytest.mark.parametrize("mode", ["sync"])
def test_a_second_signal_names_what_a_sync_handler_has_in_hand(
    embedded_kafka: Any, own_handlers: list[int], mode: str
) -> None:
    """It can't be cancelled. Nothing is begun after it, and what it raises because of the signal is no failure."""
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(5))

    class Aborted(Exception):
        pass

    def handle(message: bytes) -> None:
        if message == b"2":
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: own_handlers, "the second signal is the service's")
            raise Aborted

    with logged() as lines, pytest.raises(DrainError) as caught:
        run(group_server(embedded_kafka, "t", handle), mode)
    assert isinstance(caught.value.__cause__, Aborted)
    assert "SIGTERM came while the server was ending: unfinished: t [0] @ 2;" in "\n".join(lines)
    assert committed(embedded_kafka, CLIENT, "t") == {0: 2}
    assert values(embedded_kafka, DEAD) == []


# --- watchdog and ledger ---------------------------------------------------------------------------------------------

SHORT_POLL: dict[str, Any] = {"max_poll_interval": 1.2, "session_timeout": 1.2, "heartbeat_interval": 0.1}


def _watchdogs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "keven-watchdog"]


@pytest.mark.parametrize("kind", ["sync", *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("async", "hook"))])
def test_polling_that_stands_still_is_said_once_per_stall(embedded_kafka: Any, kind: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    got: list[bytes] = []
    with logged() as lines:

        def said() -> list[str]:
            return [line for line in lines if "polling has stood still" in line]

        def stall(message: bytes) -> None:
            before = len(said())
            wait_until(lambda: len(said()) > before, "the stall is said", 3)

        def handle(message: bytes) -> None:
            if message == b"1":
                stall(message)
            got.append(message)

        async def handle_async(message: bytes) -> None:
            if message == b"1":
                await asyncio.get_running_loop().run_in_executor(None, stall, message)
            got.append(message)

        hook = {"on_assign": lambda server, partitions: stall(b"")} if kind == "hook" else {}
        handler = {"sync": handle, "async": handle_async, "hook": got.append}[kind]
        with live(group_server(embedded_kafka, "t", handler, **SHORT_POLL, **hook), kind.replace("hook", "sync")):
            wait_until(lambda: got == numbered(3), "all is handled")
            assert len(_watchdogs()) == 1
    found = said()
    (line,) = found
    assert ("while no record was" if kind == "hook" else "while t [0] @ 1 was being handled") in line
    assert "max_poll_interval" in line
    assert 0.9 <= float(line.split("still for ")[1].split()[0]) < 1.2
    assert not _watchdogs()


@SYNC
def test_records_that_become_slow_do_not_cost_the_membership(embedded_kafka: Any, mode: str) -> None:
    """The clock is looked at after every 16th quick record; as many slow ones take longer than max_poll_interval."""
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(25))
    got: list[bytes] = []
    lost: list[Any] = []

    def handle(message: bytes) -> None:
        if len(got) >= 18:
            time.sleep(0.25)
        got.append(message)

    server = group_server(embedded_kafka, "t", handle, on_lost=lambda *args: lost.append(args), **SHORT_POLL)
    with live(server, mode):
        wait_until(lambda: len(got) >= 25, "all is handled")
    assert not lost
    assert got == numbered(25)
    assert committed(embedded_kafka, CLIENT, "t") == {0: 25}


@MODES
def test_a_miscount_is_an_error_at_the_end(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t", partitions=2)
    send(embedded_kafka, "t", *numbered(3), partition=1)
    got: list[bytes] = []
    server = group_server(embedded_kafka, "t", got.append)
    running = Live(server, mode)
    wait_until(lambda: len(got) == 3, "the records")
    session = server._session
    assert session is not None
    session.post(lambda: session.consumer.settle("t", 1, "skipped"))  # type: ignore[union-attr]
    server.stop()
    running.join()
    assert isinstance(running.error, LedgerError)
    assert "t [1]: 3 records were received, but 4 are accounted for (3 done, 1 skipped)" in str(running.error)
    assert committed(embedded_kafka, CLIENT, "t") == {1: 3}


@MODES
@pytest.mark.logs_errors
def test_what_ended_the_run_is_worse_than_a_miscount(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"x")

    def handle(message: bytes) -> None:
        server._session.consumer.settle("t", 0, "done")  # type: ignore[union-attr]
        raise ValueError("the handler's own")

    server = group_server(embedded_kafka, "t", handle, reraise_exceptions=True)
    with pytest.raises(ValueError, match="the handler's own"):
        run(server, mode)
