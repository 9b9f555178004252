"""SIGTERM and SIGINT: in the main thread they end the server in order; elsewhere they are left alone."""

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
    MODES,
    committed,
    group_server,
    live,
    numbered,
    quick,
    run,
    send,
    topics,
    wait_until,
)

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


@pytest.fixture
def own_handlers() -> Iterator[list[int]]:
    """Signal handlers of the service, which only take note."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        noted.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    yield noted
    for number, handler in previous.items():
        signal.signal(number, handler)


def _when(condition: Any, act: Any) -> threading.Thread:
    """Act in another thread once a condition holds."""

    def wait() -> None:
        wait_until(condition, "the moment to act")
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@MODES
@SIGNALS
def test_a_signal_ends_an_idle_server_in_order(
    embedded_kafka: Any, own_handlers: list[int], mode: str, number: int
) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    got: list[bytes] = []
    during: list[Any] = []
    times: list[float] = []

    def kill() -> None:
        during.append(signal.getsignal(number))
        times.append(time.monotonic())
        os.kill(os.getpid(), number)

    server = group_server(embedded_kafka, "t", got.append)
    thread = _when(lambda: server.ready() and len(got) == 3, kill)
    run(server, mode)
    thread.join()
    assert time.monotonic() - times[0] < 5
    assert during[0] not in before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert own_handlers == []  # it was the server's
    assert committed(embedded_kafka, CLIENT, "t") == {0: 3}
    os.kill(os.getpid(), number)
    assert own_handlers == [number]  # and now it is the service's again


@MODES
@SIGNALS
def test_a_signal_lets_the_batch_in_hand_finish(
    embedded_kafka: Any, own_handlers: list[int], mode: str, number: int
) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(5))
    got: list[bytes] = []

    def handle(message: bytes) -> None:
        if not got:
            os.kill(os.getpid(), number)
        got.append(message)

    run(group_server(embedded_kafka, "t", handle), mode)
    assert got == numbered(len(got))
    assert got
    assert committed(embedded_kafka, CLIENT, "t") == {0: len(got)}


@MODES
@SIGNALS
def test_a_second_signal_acts_as_it_did_before(
    embedded_kafka: Any, own_handlers: list[int], mode: str, number: int
) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"x")
    entered = threading.Event()

    def handle(message: bytes) -> None:
        entered.set()
        wait_until(lambda: own_handlers, "the second signal")

    def kill_twice() -> None:
        os.kill(os.getpid(), number)
        wait_until(lambda: server._session is not None and server._session.stopping, "the first has been taken")
        os.kill(os.getpid(), number)

    server = group_server(embedded_kafka, "t", handle)
    thread = _when(entered.is_set, kill_twice)
    run(server, mode)
    thread.join()
    assert own_handlers == [number]
    assert committed(embedded_kafka, CLIENT, "t") == {0: 1}


@SIGNALS
def test_a_signal_ends_a_server_whose_async_handler_waits(
    embedded_kafka: Any, own_handlers: list[int], number: int
) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(2))
    got: list[bytes] = []

    async def handle(message: bytes) -> None:
        os.kill(os.getpid(), number)
        while not server._session.stopping:  # type: ignore[union-attr]
            await asyncio.sleep(0.001)
        got.append(message)

    server = group_server(embedded_kafka, "t", handle, settings=quick(embedded_kafka, batch_size=1))
    run(server, "async")
    assert got == [b"0"]
    assert committed(embedded_kafka, CLIENT, "t") == {0: 1}


@MODES
def test_signals_end_a_server_that_cannot_reach_its_broker(
    embedded_kafka: Any, own_handlers: list[int], mode: str
) -> None:
    topics(embedded_kafka, "t")
    embedded_kafka.set_latency(60_000)
    server = group_server(embedded_kafka, "t", print)
    thread = _when(
        lambda: server._session is not None and server._session.consumer is not None,
        lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    started = time.monotonic()
    run(server, mode)
    thread.join()
    assert time.monotonic() - started < 10


@MODES
@pytest.mark.parametrize("way", ["with", "thread"])
def test_in_another_thread_no_signal_handler_is_installed(
    embedded_kafka: Any, own_handlers: list[int], mode: str, way: str
) -> None:
    topics(embedded_kafka, "t")
    got: list[bytes] = []
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    server = group_server(embedded_kafka, "t", got.append)
    with server if way == "with" else live(server, mode):
        wait_until(server.ready, "the assignment")
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
        os.kill(os.getpid(), signal.SIGTERM)
        assert own_handlers == [signal.SIGTERM]
        send(embedded_kafka, "t", b"still running")
        wait_until(lambda: got, "the record")
    assert committed(embedded_kafka, CLIENT, "t") == {0: 1}


def test_keyboard_interrupt_is_kept_from_the_service_while_the_server_ends(embedded_kafka: Any) -> None:
    """With Python's own SIGINT handler in place, Ctrl-C ends the run, and no KeyboardInterrupt comes of it."""
    topics(embedded_kafka, "t")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        server = group_server(embedded_kafka, "t", print)
        thread = _when(server.ready, lambda: os.kill(os.getpid(), signal.SIGINT))
        server.start_sync()
        thread.join()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, previous)
