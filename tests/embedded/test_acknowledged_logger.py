"""KafkaLogger: each message acknowledged, by log(), log_many() and alog(), in loops, threads and through `producer`."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop
from embedded_support import logged, numbered, quick, values, wait_until

from keven_core.kafka.errors import (
    DeliveryError,
    KafkaTimeoutError,
    MessageTooLargeError,
    QueueFullError,
    UsageError,
)
from keven_core.kafka.logger import KafkaLogger

MSG_SIZE_TOO_LARGE = 10

RUNS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


@pytest.fixture
def make(embedded_kafka: Any, topic: str) -> Callable[..., KafkaLogger]:
    """Loggers without a producer id, which costs the embedded broker half a second."""

    def make_logger(timeout: float = 10, **changes: Any) -> KafkaLogger:
        settings = quick(embedded_kafka, idempotence=False, **changes)
        return KafkaLogger(topic=topic, timeout=timeout, settings=settings)

    return make_logger


class Elsewhere:
    """A coroutine function that runs in an event loop of another thread until released."""

    def __init__(self, main: Any) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._main = main
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = asyncio.run(self._main())
        except BaseException as error:
            self.error = error

    def join(self) -> Any:
        self.thread.join(20)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.result


# --- log(), log_many() -----------------------------------------------------------------------------------------------


def test_log_many_returns_how_many_were_acknowledged(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger]
) -> None:
    log = make()
    assert log.log_many([]) == 0
    assert log.log_many(iter(numbered(500))) == 500
    assert values(embedded_kafka, topic) == numbered(500)


@pytest.mark.logs_errors
def test_log_many_names_what_was_refused_and_the_rest_has_been_delivered(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger]
) -> None:
    log = make(log_batch_messages=5)
    log.log(b"connected")
    embedded_kafka.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
    with pytest.raises(DeliveryError) as caught:
        log.log_many(numbered(100))
    failed = [entry.value for entry in caught.value.failures]
    count = caught.value.failed_count
    assert 1 <= count <= 5
    assert failed == numbered(count)
    assert {(entry.outcome, str(entry.error)) for entry in caught.value.failures} == {
        ("not delivered", "Broker: Message size too large (MSG_SIZE_TOO_LARGE)")
    }
    assert values(embedded_kafka, topic) == [b"connected", *numbered(100)[count:]]
    assert log.log_many([b"c", b"d"]) == 2


def test_log_many_waits_for_what_came_before_a_message_that_is_refused_at_once(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger]
) -> None:
    log = make(max_message_bytes=2000)
    with pytest.raises(MessageTooLargeError):
        log.log_many([b"1", b"2", b"x" * 3000, b"3"])
    assert values(embedded_kafka, topic) == [b"1", b"2"]
    with pytest.raises(UsageError, match="a message has to be"):
        log.log_many([b"3", object()])
    assert values(embedded_kafka, topic) == [b"1", b"2", b"3"]


def test_log_many_is_bounded_by_the_queue(embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger]) -> None:
    log = make(log_queue_messages=10)
    assert log.log_many(numbered(200)) == 200
    assert values(embedded_kafka, topic) == numbered(200)


@pytest.mark.logs_errors
def test_log_times_out_and_says_that_the_message_may_arrive(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger]
) -> None:
    log = make(timeout=0.2)
    log.log(b"connected")
    embedded_kafka.broker_down()
    started = time.monotonic()
    with pytest.raises(KafkaTimeoutError, match="may still arrive"):
        log.log(b"late")
    assert 0.2 <= time.monotonic() - started < 5
    embedded_kafka.broker_up()
    wait_until(lambda: values(embedded_kafka, topic) == [b"connected", b"late"], "it arrives all the same")


def test_many_threads_wait_for_their_own_message(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger]
) -> None:
    log = make()

    def work(thread: int) -> None:
        for number in range(50):
            log.log(b"%d/%d" % (thread, number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    found = [value or b"" for value in values(embedded_kafka, topic)]
    assert len(found) == len(set(found)) == 400
    for number in range(8):
        mine = [int(value.split(b"/")[1]) for value in found if value.startswith(b"%d/" % number)]
        assert mine == list(range(50))


# --- alog() ----------------------------------------------------------------------------------------------------------


@RUNS
def test_a_thousand_messages_are_awaited_together(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger], run: Any
) -> None:
    log = make()

    async def main() -> float:
        await log.alog(b"connected")
        embedded_kafka.set_latency(200)
        started = time.monotonic()
        await asyncio.gather(*(log.alog(message) for message in numbered(1000)))
        return time.monotonic() - started

    assert 0.2 <= run(main()) < 5  # not one after the other: that takes 200 s
    embedded_kafka.set_latency(0)
    found = values(embedded_kafka, topic)
    assert found[0] == b"connected"
    assert sorted(found[1:], key=lambda value: int(value or b"")) == numbered(1000)


@RUNS
def test_messages_of_one_task_keep_their_order(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger], run: Any
) -> None:
    log = make()

    async def one_task(name: int) -> None:
        for number in range(50):
            await log.alog(b"%d/%d" % (name, number), key="k", headers={"n": b"1"})

    async def main() -> None:
        await asyncio.gather(*(one_task(name) for name in range(10)))

    run(main())
    found = [value or b"" for value in values(embedded_kafka, topic)]
    assert len(found) == len(set(found)) == 500
    for name in range(10):
        assert [v for v in found if v.startswith(b"%d/" % name)] == [b"%d/%d" % (name, n) for n in range(50)]


@RUNS
def test_messages_go_out_although_the_loop_is_busy(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger], run: Any
) -> None:
    log = make()

    async def main() -> None:
        await log.alog(b"connected")
        tasks = [asyncio.ensure_future(log.alog(message)) for message in numbered(20)]
        asyncio.get_running_loop().call_soon(arrived)  # after the tasks, before the end of that turn
        await asyncio.gather(*tasks)

    def arrived() -> None:
        wait_until(lambda: len(values(embedded_kafka, topic)) == 21, "all arrive while nothing else runs in the loop")

    run(main())


@RUNS
def test_the_loop_goes_on_while_a_message_is_awaited(
    embedded_kafka: Any, make: Callable[..., KafkaLogger], run: Any
) -> None:
    log = make()

    async def main() -> int:
        await log.alog(b"connected")
        embedded_kafka.set_latency(300)
        awaited = asyncio.ensure_future(log.alog(b"x"))
        turns = 0
        while not awaited.done():
            await asyncio.sleep(0.01)
            turns += 1
        await awaited
        return turns

    assert run(main()) >= 10


@pytest.mark.logs_errors
@RUNS
def test_a_message_that_is_not_answered_in_time(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger], run: Any
) -> None:
    log = make(timeout=0.3)

    async def main() -> None:
        await log.alog(b"connected")
        embedded_kafka.broker_down()
        started = time.monotonic()
        found = await asyncio.gather(log.alog(b"1"), log.alog(b"2"), return_exceptions=True)
        assert [type(error) for error in found] == [KafkaTimeoutError] * 2
        assert 0.28 <= time.monotonic() - started < 5
        embedded_kafka.broker_up()

    run(main())
    wait_until(lambda: values(embedded_kafka, topic) == [b"connected", b"1", b"2"], "they arrive all the same")


@pytest.mark.logs_errors
def test_messages_time_out_one_after_the_other(embedded_kafka: Any, make: Callable[..., KafkaLogger]) -> None:
    log = make(timeout=0.3)
    ended: list[float] = []

    async def late(after: float, started: float) -> None:
        await asyncio.sleep(after)
        with pytest.raises(KafkaTimeoutError):
            await log.alog(b"x")
        ended.append(time.monotonic() - started - after)

    async def main() -> None:
        await log.alog(b"connected")
        embedded_kafka.broker_down()
        await asyncio.gather(*(late(after, time.monotonic()) for after in (0, 0.1, 0.2, 0.4)))

    asyncio.run(main())
    embedded_kafka.broker_up()
    assert len(ended) == 4
    assert all(0.29 <= seconds < 2 for seconds in ended)


@pytest.mark.logs_errors
def test_timeouts_still_fire_after_a_loop_ended_with_messages_under_way(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger]
) -> None:
    log = make(timeout=0.3)

    async def abandon() -> None:
        await log.alog(b"connected")
        embedded_kafka.broker_down()
        log.submit(b"abandoned", loop=asyncio.get_running_loop())
        task = asyncio.ensure_future(log.alog(b"cancelled"))
        await asyncio.sleep(0)
        assert not task.done()

    async def second() -> None:
        with pytest.raises(KafkaTimeoutError):
            await asyncio.wait_for(log.alog(b"late"), 5)

    asyncio.run(abandon())
    asyncio.run(second())
    embedded_kafka.broker_up()
    wanted = [b"connected", b"abandoned", b"cancelled", b"late"]
    wait_until(lambda: values(embedded_kafka, topic) == wanted, "all arrive")
    asyncio.run(log.alog(b"and on"))


def test_a_loop_that_ended_is_not_kept(make: Callable[..., KafkaLogger]) -> None:
    log = make()
    for number in range(5):
        asyncio.run(log.alog(b"%d" % number))
    assert len(log._deadlines) == 1


def test_done_messages_are_not_kept_until_their_deadline(make: Callable[..., KafkaLogger]) -> None:
    log = make(timeout=60)

    async def main() -> None:
        for message in numbered(300):
            await log.alog(message)
        [deadlines] = log._deadlines.values()
        until = time.monotonic() + 10
        while deadlines._waiting:
            assert time.monotonic() < until
            await asyncio.sleep(0.01)

    asyncio.run(main())


@pytest.mark.logs_errors
@RUNS
def test_cancelling_gives_up_waiting_but_the_message_arrives(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger], run: Any
) -> None:
    log = make()

    async def main() -> None:
        await log.alog(b"connected")
        embedded_kafka.set_latency(300)
        tasks = [asyncio.ensure_future(log.alog(message)) for message in numbered(10)]
        await asyncio.sleep(0.05)
        for task in tasks[::2]:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in found[::2]] == [asyncio.CancelledError] * 5
        assert found[1::2] == [None] * 5
        embedded_kafka.set_latency(0)
        await log.alog(b"and on")

    run(main())
    assert values(embedded_kafka, topic) == [b"connected", *numbered(10), b"and on"]


@pytest.mark.logs_errors
def test_a_refused_message_raises_where_it_is_awaited_and_nowhere_else(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger]
) -> None:
    log = make()

    async def main() -> None:
        await log.alog(b"connected")
        embedded_kafka.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
        with pytest.raises(DeliveryError, match="size too large") as caught:
            await log.alog(b"refused", key="k", headers=[("a", b"1")], timestamp_ms=5)
        [entry] = caught.value.failures
        assert (entry.value, entry.key, entry.headers, entry.timestamp_ms) == (b"refused", b"k", [("a", b"1")], 5)
        await log.alog(b"taken")

    with logged() as lines:
        asyncio.run(main())
    assert not any("not delivered" in line for line in lines)
    account = log.deliveries
    assert account is not None
    assert (account.failed, account.failures) == (1, [])  # nobody would take them
    assert values(embedded_kafka, topic) == [b"connected", b"taken"]


@pytest.mark.logs_errors
def test_headers_of_refused_messages_always_come_back(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger]
) -> None:
    """The answer may be taken by one thread before another has returned from handing the message over."""
    log = make()
    headers = [("a", b"1")]

    async def main() -> None:
        for _ in range(1000):
            embedded_kafka.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
            with pytest.raises(DeliveryError) as caught:
                await log.alog(b"refused", headers=headers)
            assert caught.value.failures[0].headers == headers

    asyncio.run(main())


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"data": object()}, "a message has to be"),
        ({"data": None}, "tombstone"),
        ({"data": b"x", "headers": [("a", "text")]}, "header"),
        ({"data": b"x", "key": 5}, "key"),
        ({"data": b"x", "timestamp_ms": -1}, "timestamp_ms"),
        ({"data": b"x", "topic": "not a topic"}, "not a topic name"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_can_not_be_sent_raises_at_once(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger], given: dict[str, Any], error: str
) -> None:
    log = make()
    with pytest.raises(UsageError, match=error):
        asyncio.run(log.alog(**given))
    asyncio.run(log.alog(b"good"))
    assert values(embedded_kafka, topic) == [b"good"]


@RUNS
def test_a_full_queue_is_awaited(embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger], run: Any) -> None:
    log = make(log_queue_messages=10)

    async def main() -> None:
        await asyncio.gather(*(log.alog(message) for message in numbered(100)))

    run(main())
    assert sorted(values(embedded_kafka, topic), key=lambda value: int(value or b"")) == numbered(100)


@pytest.mark.logs_errors
def test_a_queue_that_stays_full_is_an_error(embedded_kafka: Any, make: Callable[..., KafkaLogger]) -> None:
    log = make(timeout=0.3, log_queue_messages=5)

    async def main() -> list[Any]:
        await log.alog(b"connected")
        embedded_kafka.broker_down()
        return await asyncio.gather(*(log.alog(message) for message in numbered(7)), return_exceptions=True)

    found = asyncio.run(main())
    embedded_kafka.broker_up()
    assert [type(error) for error in found] == [KafkaTimeoutError] * 5 + [QueueFullError] * 2


def test_two_loops_in_two_threads(embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger]) -> None:
    log = make()
    settled: list[tuple[str, str]] = []

    def main(name: str) -> Callable[[], Any]:
        async def one(number: int) -> None:
            await log.alog(b"%s/%d" % (name.encode(), number))
            settled.append((name, threading.current_thread().name))

        async def run() -> None:
            threading.current_thread().name = f"loop {name}"
            for start in range(0, 300, 30):
                await asyncio.gather(*(one(number) for number in range(start, start + 30)))

        return run

    loops = [Elsewhere(main(name)) for name in ("a", "b")]
    for loop in loops:
        loop.join()
    assert all(thread == f"loop {name}" for name, thread in settled)
    found = values(embedded_kafka, topic)
    assert len(found) == len(set(found)) == 600


@pytest.mark.logs_errors
def test_two_loops_time_out_each_for_itself(embedded_kafka: Any, make: Callable[..., KafkaLogger]) -> None:
    log = make(timeout=0.4)
    log.log(b"connected")
    embedded_kafka.broker_down()
    threads: list[tuple[int, int]] = []

    def main(after: float) -> Callable[[], Any]:
        async def run() -> float:
            started = time.monotonic()
            await asyncio.sleep(after)
            future = log.submit(b"watched", loop=asyncio.get_running_loop())
            # What settles a future runs its callbacks through call_soon(), which must be called in the loop's thread.
            asyncio.get_running_loop().set_debug(True)
            with pytest.raises(KafkaTimeoutError):
                await log.alog(b"x")
            threads.append((threading.get_ident(), id(future)))
            return time.monotonic() - started - after

        return run

    loops = [Elsewhere(main(after)) for after in (0, 0.2)]
    seconds = [loop.join() for loop in loops]
    embedded_kafka.broker_up()
    assert all(0.39 <= each < 3 for each in seconds)
    assert len({thread for thread, _ in threads}) == 2


@pytest.mark.logs_errors
@RUNS
def test_a_loop_that_is_closed_while_messages_are_under_way(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger], run: Any
) -> None:
    log = make()

    async def main() -> None:
        await log.alog(b"connected")
        embedded_kafka.set_latency(200)
        for message in numbered(20):
            log.submit(message, loop=asyncio.get_running_loop())

    run(main())
    embedded_kafka.set_latency(0)
    log.log(b"and on")
    run(log.alog(b"in another loop"))
    assert values(embedded_kafka, topic) == [b"connected", *numbered(20), b"and on", b"in another loop"]
    gc.collect()


def test_a_stand_in_answers_at_once(make: Callable[..., KafkaLogger]) -> None:
    log = make()
    stand_in = StandIn()
    log.producer = stand_in
    log.log(b"1")
    assert log.log_many([b"2", b"3"]) == 0  # nothing was acknowledged by a broker
    asyncio.run(log.alog(b"4", key="k"))
    assert [value for _, value, _ in stand_in.produced] == [b"1", b"2", b"3", b"4"]
    assert stand_in.produced[-1][2] == {"key": b"k"}
    assert stand_in.flushed == [log.timeout] * 4
    stand_in.error = "no such topic"
    with pytest.raises(DeliveryError, match=r"was not delivered: no such topic"):
        log.log(b"5")


class StandIn:
    """Takes what is produced; like a producer of confluent-kafka."""

    def __init__(self) -> None:
        self.produced: list[tuple[str, bytes | None, dict[str, Any]]] = []
        self.flushed: list[float] = []
        self.error: str | None = None

    def produce(self, topic: str, value: bytes | None, *, on_delivery: Any, **more: Any) -> None:
        self.produced.append((topic, value, more))
        on_delivery(self.error, None)

    def flush(self, timeout: float) -> int:
        self.flushed.append(timeout)
        return 0


# --- through `producer` ----------------------------------------------------------------------------------------------


@pytest.fixture
def slow(embedded_kafka: Any) -> Iterator[Any]:
    yield embedded_kafka
    embedded_kafka.set_latency(0)


def test_flush_of_the_producer_waits_for_what_was_produced_through_it(
    slow: Any, topic: str, make: Callable[..., KafkaLogger]
) -> None:
    log = make()
    assert log.producer.flush() == 0
    log.log(b"connected")
    slow.set_latency(1000)
    started = time.monotonic()
    for message in numbered(20):
        log.producer.produce(topic, message, key=b"k", headers=[("a", b"1")])
    assert time.monotonic() - started < 0.9
    assert log.producer.flush(0) == 20
    assert log.producer.flush(10) == 0
    assert time.monotonic() - started >= 1
    slow.set_latency(0)
    assert values(slow, topic) == [b"connected", *numbered(20)]


@pytest.mark.logs_errors
def test_what_was_produced_through_it_and_refused_is_logged(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaLogger]
) -> None:
    log = make()
    log.log(b"connected")
    embedded_kafka.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
    with logged() as lines:
        log.producer.produce(topic, b"x")
        assert log.producer.flush() == 0
        wait_until(lambda: any("1 message(s) for t were not delivered" in line for line in lines), "it is logged")


def test_a_callback_of_the_producer_is_refused_clearly(make: Callable[..., KafkaLogger], topic: str) -> None:
    with pytest.raises(UsageError, match=r"KafkaBatchLogger\(on_delivery="):
        make().producer.produce(topic, b"x", on_delivery=print)
