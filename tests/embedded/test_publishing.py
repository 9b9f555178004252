"""Publishing: outboxes of threads, tasks and handlers, publishers, what becomes of messages that were not accepted."""

import asyncio
import contextvars
import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from embedded_support import MODES, committed, event, group_server, live, quick, send, topics, values, wait_until

from keven_core.kafka import publishing
from keven_core.kafka.abstracts.delayed import DelayedCommandsAndEvents
from keven_core.kafka.abstracts.event_handler import EventHandler, event_handler
from keven_core.kafka.commands.command import Command
from keven_core.kafka.commands.logger import (
    clear_command_publishers,
    get_write_cache,
    keven_dispatch_command,
    keven_flush_command_cache,
    send_commands_on_commit,
    set_publisher,
)
from keven_core.kafka.commands.publisher import CommandPublisher
from keven_core.kafka.errors import DeliveryError, PublishError, QueueFullError, UsageError
from keven_core.kafka.events.event import Event
from keven_core.kafka.events.logger import (
    keven_clear_event_publishers,
    keven_dont_send_events_on_commit,
    keven_flush_event_cache,
    keven_get_write_cache,
    keven_last_publisher,
    keven_log_event,
    keven_log_event_now,
    keven_send_events_on_commit,
    keven_set_publisher,
)
from keven_core.kafka.events.publisher import EventPublisher
from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger
from keven_core.kafka.outcomes import Skip
from keven_core.kafka.publishing import outbox
from keven_core.testing import dispatch

MSG_SIZE_TOO_LARGE = 10

LEAVES_AN_EVENT = """
from keven_core.kafka.events.event import Event
from keven_core.kafka.events.logger import keven_log_event, keven_send_events_on_commit

class Left(Event):
    event_name = "LEFT"

keven_send_events_on_commit()
keven_log_event(Left())
"""

FORKS_MEANWHILE = """
import os, signal, sys, threading
from keven_core.kafka.events.logger import keven_last_publisher
from keven_core.kafka.kinds import MessageKind

making, forked = threading.Event(), threading.Event()
publisher_class = MessageKind.publisher_class

def slowly(kind):
    if threading.current_thread() is not threading.main_thread():
        making.set()
        forked.wait()
    return publisher_class(kind)

MessageKind.publisher_class = slowly
threading.Thread(target=keven_last_publisher).start()
making.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    print(type(keven_last_publisher()).__name__, flush=True)
    os._exit(0)
status = os.waitpid(child, 0)[1]
forked.set()
sys.exit(status != 0)
"""

# Handlers fail here.
pytestmark = pytest.mark.logs_errors


class Kept:
    """A logger that keeps what it is given, and refuses the numbers in `refuses`."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.refuses: set[int] = set()
        self.lock = threading.Lock()

    def log(self, data: bytes, topic: str | None = None) -> None:
        number = int(data.split(b'"number":')[1].split(b"}")[0])
        if number in self.refuses:
            raise QueueFullError(f"no room for {number}")
        with self.lock:
            self.lines.append(f"{topic}:{number}")

    @property
    def numbers(self) -> list[int]:
        return [int(line.rsplit(":", 1)[1]) for line in self.lines]


@pytest.fixture
def kinds(handler_registry: Any) -> tuple[type[Any], type[Any]]:
    """An event and a command, each with a number."""

    class Raised(Event):
        event_name = "RAISED"
        number: int = 0

    class Ordered(Command):
        command_name = "ORDERED"
        auto_create_command_events = False
        number: int = 0

    return Raised, Ordered


@pytest.fixture
def raised(kinds: Any) -> Callable[[int], Any]:
    return lambda number: kinds[0](number=number)


@pytest.fixture
def kept() -> Iterator[Kept]:
    logger = Kept()
    context = contextvars.copy_context()
    keven_set_publisher(EventPublisher(logger), everywhere=True)
    set_publisher(CommandPublisher(logger), everywhere=True)
    yield logger
    keven_clear_event_publishers()
    clear_command_publishers()
    publishing._place.set(context.get(publishing._place))


# --- the cache of a thread or task -----------------------------------------------------------------------------------


def test_without_an_outbox_messages_go_out_at_once(kept: Kept, raised: Any, kinds: Any) -> None:
    keven_log_event(raised(1))
    keven_log_event_now(raised(2))
    keven_dispatch_command(kinds[1](number=3))
    raised(4).log()
    kinds[1](number=5).dispatch(now=True)
    assert kept.lines == [
        "keven_events_raised:1",
        "keven_events_raised:2",
        "keven_commands_ordered:3",
        "keven_events_raised:4",
        "keven_commands_ordered:5",
    ]


def test_on_commit_is_for_its_kind_and_until_it_is_taken_back(kept: Kept, raised: Any, kinds: Any) -> None:
    keven_send_events_on_commit()
    keven_log_event(raised(1))
    keven_dispatch_command(kinds[1](number=2))
    assert kept.numbers == [2]
    assert [entry.number for entry in keven_get_write_cache()] == [1]
    send_commands_on_commit()
    keven_dispatch_command(kinds[1](number=3))
    assert keven_flush_event_cache() == 1
    assert kept.numbers == [2, 1]
    keven_log_event(raised(4))
    keven_dont_send_events_on_commit()
    keven_log_event(raised(5))
    assert kept.numbers == [2, 1, 5]
    assert keven_flush_event_cache() == 1
    assert keven_flush_command_cache() == 1
    assert kept.numbers == [2, 1, 5, 4, 3]


def test_the_write_cache_is_a_list(kept: Kept, raised: Any, kinds: Any) -> None:
    send_commands_on_commit()
    keven_dispatch_command(kinds[1](number=9))
    cache = keven_get_write_cache()
    assert cache == []
    one, two, three = raised(1), raised(2), raised(3)
    cache.append(two)
    cache.insert(0, one)
    cache.extend([three])
    assert cache == [one, two, three]
    assert cache[1:] == [two, three]
    del cache[0]
    cache[0] = one
    assert keven_get_write_cache() == [one, three]
    cache.insert(-9, two)
    assert cache == [two, one, three]
    cache.clear()
    assert keven_flush_event_cache() == 0
    assert [entry.number for entry in get_write_cache()] == [9]
    with pytest.raises(UsageError, match="an event is published here, not Ordered"):
        cache.append(kinds[1]())


def test_threads_have_caches_of_their_own(kept: Kept, raised: Any) -> None:
    keven_send_events_on_commit()
    keven_log_event(raised(1))
    thread = threading.Thread(target=lambda: keven_log_event(raised(2)))
    thread.start()
    thread.join()
    assert kept.numbers == [2]
    assert len(keven_get_write_cache()) == 1


def test_tasks_have_flags_of_their_own_and_share_what_encloses_them(kept: Kept, raised: Any) -> None:
    async def on_commit(number: int) -> None:
        keven_send_events_on_commit()
        keven_log_event(raised(number))
        await asyncio.sleep(0)  # the other one has its turn
        assert [entry.number for entry in keven_get_write_cache()] == [number]
        keven_flush_event_cache()

    async def child(number: int) -> None:
        keven_log_event(raised(number))
        async with outbox():
            await asyncio.sleep(0)
            keven_log_event(raised(number + 1))

    async def run() -> None:
        await asyncio.gather(on_commit(1), on_commit(2))
        assert sorted(kept.numbers) == [1, 2]
        async with outbox() as box:
            await asyncio.gather(child(10), child(20))
            assert len(box) == 4
            assert len(kept.numbers) == 2
        assert sorted(kept.numbers[2:]) == [10, 11, 20, 21]

    asyncio.run(run())


@pytest.mark.parametrize("taken_back", [False, True])
def test_tasks_that_ask_for_it_have_caches_of_their_own_whatever_they_were_started_with(
    kept: Kept, raised: Any, taken_back: bool
) -> None:
    keven_send_events_on_commit()
    keven_log_event(raised(0))
    if taken_back:
        keven_dont_send_events_on_commit()

    async def part(number: int) -> None:
        keven_log_event(raised(number))

    async def request(number: int, commits: bool) -> None:
        keven_send_events_on_commit()
        await asyncio.gather(part(number), asyncio.to_thread(keven_log_event, raised(number + 1)))
        await asyncio.sleep(0.01)  # the others have their turn
        assert sorted(entry.number for entry in keven_get_write_cache()) == [number, number + 1]
        if commits:
            assert keven_flush_event_cache() == 2

    async def run() -> None:
        await asyncio.gather(request(10, True), request(20, False), request(30, True))

    asyncio.run(run())
    assert sorted(kept.numbers) == [10, 11, 30, 31]
    assert keven_flush_event_cache() == 1
    assert kept.numbers[-1] == 0


# --- outbox() --------------------------------------------------------------------------------------------------------


def test_a_block_sends_in_order_when_it_ends_well(kept: Kept, raised: Any, kinds: Any) -> None:
    with outbox():
        keven_log_event(raised(1))
        keven_dispatch_command(kinds[1](number=2))
        keven_log_event(raised(3))
        assert kept.lines == []
    assert kept.numbers == [1, 2, 3]


def test_a_block_that_raises_sends_nothing(kept: Kept, raised: Any, caplog: Any) -> None:
    caplog.set_level("DEBUG", "keven_core.kafka")
    with pytest.raises(ZeroDivisionError), DelayedCommandsAndEvents():
        keven_log_event(raised(1))
        raise ZeroDivisionError
    keven_log_event(raised(2))
    assert kept.numbers == [2]
    assert "1 message(s) are not sent" in caplog.text


def test_blocks_within_blocks_are_savepoints(kept: Kept, raised: Any) -> None:
    with outbox():
        keven_log_event(raised(1))
        with outbox():
            keven_log_event(raised(2))
        with pytest.raises(ZeroDivisionError), outbox():
            keven_log_event(raised(3))
            raise ZeroDivisionError
        keven_log_event(raised(4))
        assert kept.numbers == []
    assert kept.numbers == [1, 2, 4]


def test_a_block_in_use_is_refused(kept: Kept) -> None:
    with outbox() as box, pytest.raises(UsageError, match="in use"), box:
        pass


def test_what_a_task_raises_after_the_block_goes_out_at_once(kept: Kept, raised: Any) -> None:
    async def run() -> None:
        ended = asyncio.Event()

        async def late() -> None:
            await ended.wait()
            keven_log_event(raised(2))

        async with outbox():
            task = asyncio.create_task(late())
            keven_log_event(raised(1))
        ended.set()
        await task

    asyncio.run(run())
    assert kept.numbers == [1, 2]


def test_what_was_not_accepted_stays_and_can_be_flushed_again(kept: Kept, raised: Any, kinds: Any) -> None:
    kept.refuses = {2}
    with (
        pytest.raises(PublishError, match=r"3 of 4 message.*RAISED, ORDERED.*no room for 2") as caught,
        outbox() as box,
    ):
        keven_log_event(raised(1))
        keven_log_event(raised(2))
        keven_log_event(raised(3))
        keven_dispatch_command(kinds[1](number=4))
    assert isinstance(caught.value.__cause__, QueueFullError)
    assert [entry.number for entry in caught.value.messages] == [2, 3, 4]
    assert [entry.number for entry in box.messages] == [2, 3, 4]
    kept.refuses.clear()
    assert box.flush() == 3
    assert kept.numbers == [1, 2, 3, 4]


# --- publishers ------------------------------------------------------------------------------------------------------


def test_publishers_are_set_per_thread_and_cleared_everywhere(kept: Kept, raised: Any) -> None:
    own = Kept()
    mine = EventPublisher(own)
    keven_set_publisher(mine)
    assert keven_last_publisher() is mine
    found = []
    thread = threading.Thread(target=lambda: found.append(keven_last_publisher().logger))
    thread.start()
    thread.join()
    assert found == [kept]
    keven_log_event(raised(1))
    assert (own.numbers, kept.numbers) == ([1], [])
    keven_clear_event_publishers()
    assert keven_last_publisher() is keven_last_publisher()
    assert isinstance(keven_last_publisher().logger, KafkaLogger)


def test_any_object_with_log_event_is_a_publisher(kept: Kept, raised: Any) -> None:
    class Own:
        def __init__(self) -> None:
            self.given: list[int] = []

        def log_event(self, event: Any, topic: str | None = None) -> None:
            self.given.append(event.number)

    own = Own()
    keven_set_publisher(own)
    with outbox():
        keven_log_event(raised(1))
    keven_log_event_now(raised(2))
    assert own.given == [1, 2]


def test_what_is_no_event_is_refused(kept: Kept, kinds: Any) -> None:
    with pytest.raises(UsageError, match="an event is published here, not Ordered"):
        keven_log_event(kinds[1]())
    with pytest.raises(UsageError, match="has no event_name"):
        keven_log_event(Event())


@pytest.mark.parametrize("before", ["a look at the cache", "events on commit"])
def test_what_comes_after_the_block_is_not_kept_in_a_cache_that_nobody_flushes(
    kept: Kept, raised: Any, kinds: Any, before: str
) -> None:
    async def run() -> None:
        ended = asyncio.Event()

        async def late() -> None:
            await ended.wait()
            keven_dispatch_command(kinds[1](number=2))
            with outbox():
                keven_dispatch_command(kinds[1](number=3))

        if before == "events on commit":
            keven_send_events_on_commit()
        else:
            get_write_cache()
        async with outbox():
            task = asyncio.create_task(late())
            keven_dispatch_command(kinds[1](number=1))
        ended.set()
        await task

    asyncio.run(run())
    assert kept.numbers == [1, 2, 3]


def test_a_block_that_ends_out_of_order_leaves_the_others_alone(kept: Kept, raised: Any) -> None:
    def block() -> Iterator[None]:
        with outbox():
            keven_log_event(raised(1))
            yield

    generator = block()
    next(generator)
    with outbox():
        assert next(generator, None) is None
        assert kept.numbers == [1]
        keven_log_event(raised(2))
        assert kept.numbers == [1]
    assert kept.numbers == [1, 2]
    keven_log_event(raised(3))
    assert kept.numbers == [1, 2, 3]


def test_what_a_block_has_raised_is_sent_though_its_task_is_cancelled(kept: Kept, raised: Any, caplog: Any) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        busy = threading.Event()
        loop.set_default_executor(ThreadPoolExecutor(1))
        blocked = loop.run_in_executor(None, busy.wait)

        async def work(*numbers: int) -> None:
            async with outbox():
                for number in numbers:
                    keven_log_event(raised(number))

        tasks = [asyncio.create_task(work(1)), asyncio.create_task(work(2, 3))]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        assert [type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == (
            [asyncio.CancelledError] * 2
        )
        busy.set()
        await blocked
        await loop.shutdown_default_executor()
        await asyncio.sleep(0)

    kept.refuses = {3}
    asyncio.run(run())
    assert kept.numbers == [1, 2]
    assert "1 of 2 message(s) were not sent" in caplog.text


def test_what_waits_for_a_flush_that_never_comes_is_told(kept: Kept, raised: Any, caplog: Any) -> None:
    def work() -> None:
        keven_send_events_on_commit()
        keven_log_event(raised(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    gc.collect()
    assert "1 message(s) are lost (RAISED)" in caplog.text


def test_a_process_that_ends_tells_what_waits_for_a_flush() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LEAVES_AN_EVENT], capture_output=True, text=True, check=True, timeout=60
    )
    assert "1 message(s) are lost (LEFT)" in ended.stderr


def test_a_child_makes_publishers_whatever_held_the_parents(kept: Kept) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FORKS_MEANWHILE], capture_output=True, text=True, check=True, timeout=60
    )
    assert ended.stdout == "EventPublisher\n"


@pytest.mark.parametrize("how", ["subclass of the logger", "log of one", "log_event of one"])
def test_a_flush_goes_through_what_a_service_has_put_in_place(kept: Kept, raised: Any, how: str) -> None:
    class Own(KafkaLogger):
        def log(self, data: Any, topic: str | None = None) -> None:
            kept.log(data.serialize(), topic)

    publisher = EventPublisher(Own() if how == "subclass of the logger" else KafkaLogger())
    if how == "log of one":
        publisher.logger.log = lambda data, topic: kept.log(data.serialize(), topic)
    elif how == "log_event of one":
        publisher.log_event = lambda event: kept.log(event.serialize())  # type: ignore[method-assign, assignment, misc]
    keven_set_publisher(publisher)
    with outbox():
        keven_log_event(raised(1))
    assert kept.numbers == [1]


@pytest.mark.parametrize("wrong", [KafkaLogger(), CommandPublisher(None), print])
def test_what_is_no_publisher_is_refused(kept: Kept, raised: Any, wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"has no log_event\(\).*EventPublisher"):
        keven_set_publisher(wrong)
    with pytest.raises(UsageError, match=r"has no log_event\(\)"):
        keven_set_publisher(wrong, everywhere=True)
    keven_log_event(raised(1))
    assert kept.numbers == [1]


# --- with a broker ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(embedded_kafka: Any, handler_registry: Any) -> Any:
    topics(embedded_kafka, "in", "keven_events_raised", "keven_commands_ordered")
    return embedded_kafka


@pytest.fixture
def publisher(cluster: Any) -> Iterator[None]:
    """Publishers that write to the cluster, for handlers: with a KafkaBatchLogger."""
    batch = KafkaBatchLogger(settings=quick(cluster, idempotence=False))
    keven_set_publisher(EventPublisher(batch), everywhere=True)
    set_publisher(CommandPublisher(batch), everywhere=True)
    yield
    keven_clear_event_publishers()
    clear_command_publishers()


def numbers(kafka: Any, topic: str = "keven_events_raised") -> list[int]:
    return [int((value or b"").split(b'"number":')[1].split(b"}")[0]) for value in values(kafka, topic)]


def test_a_flush_waits_for_the_broker_and_keeps_what_it_refused(cluster: Any, kinds: Any, raised: Any) -> None:
    keven_set_publisher(EventPublisher(KafkaLogger(settings=quick(cluster, idempotence=False))))
    try:
        with outbox():
            for number in range(100):
                keven_log_event(raised(number))
        assert numbers(cluster) == list(range(100))
        cluster.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
        with pytest.raises(PublishError) as caught, outbox() as box:
            keven_log_event(raised(100))
        assert isinstance(caught.value.__cause__, DeliveryError)
        assert box.flush() == 1
        assert numbers(cluster) == list(range(101))
    finally:
        keven_clear_event_publishers()


WAYS = pytest.mark.parametrize(
    "options",
    [{}, {"order": "partition", "max_in_flight": 10}, {"order": "partition", "workers": 2}],
    ids=["plain", "flow", "threads"],
)


@MODES
@WAYS
@pytest.mark.parametrize("is_async", [False, True], ids=["def", "async-def"])
def test_what_a_handler_raises_goes_out_only_if_it_succeeds(
    cluster: Any, publisher: None, raised: Any, mode: str, options: Any, is_async: bool
) -> None:
    if is_async and (mode == "sync" or "workers" in options):
        pytest.skip("the same as another case")
    seen: list[int] = []

    def raise_one(number: int) -> None:
        keven_log_event(raised(number))
        with outbox():
            keven_log_event(raised(number + 1000))
        seen.append(number)
        if number % 3 == 1:
            raise ZeroDivisionError
        if number % 3 == 2:
            raise Skip("not wanted")

    if is_async:

        async def part(number: int) -> None:
            await asyncio.sleep(0)
            raise_one(number)

        @event_handler("COPY")
        async def acopy(event: Any) -> None:
            await asyncio.gather(part(event.number))

    else:

        @event_handler("COPY")
        def copy(event: Any) -> None:
            raise_one(event.number)

    with live(group_server(cluster, "in", settings=quick(cluster, commit_interval_ms=50), **options), mode):
        send(cluster, "in", *(event("COPY", number=number) for number in range(30)))
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 30}, "all are committed")
    expected = [number for first in range(0, 30, 3) for number in (first, first + 1000)]
    assert numbers(cluster) == expected
    assert sorted(seen) == list(range(30))


def test_of_several_handlers_each_has_its_own(cluster: Any, publisher: None, raised: Any) -> None:
    @event_handler("COPY")
    def first(event: Any) -> None:
        keven_log_event(raised(1))

    @event_handler("COPY")
    def second(event: Any) -> None:
        keven_log_event(raised(2))
        raise ZeroDivisionError

    class Third(EventHandler):
        event_name = "COPY"
        delay_commands_and_events = False

        def handle_event(self, event: Any) -> None:
            keven_log_event(raised(3))
            raise ZeroDivisionError

    result = dispatch(event("COPY", number=0), topic="in")
    assert result.outcome == "dead"
    assert [message.topic for message in result.published] == ["keven_events_raised"] * 2
    assert [b'"number":1' in (entry.value or b"") for entry in result.published] == [True, False]
    assert b'"number":3' in (result.published[1].value or b"")


def test_handlers_that_are_called_without_a_server(kept: Kept, raised: Any) -> None:
    fails = True

    @event_handler("RAISED")
    def copy(event: Any) -> None:
        keven_log_event(raised(event.number + 1))
        if fails:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        EventHandler.handle_events(raised(1))
    assert kept.numbers == []
    fails = False
    EventHandler.handle_events(raised(2))
    assert kept.numbers == [3]
    with outbox():
        EventHandler.handle_events(raised(3))
        assert kept.numbers == [3]
    assert kept.numbers == [3, 4]


@pytest.mark.parametrize("options", [{}, {"order": "key"}], ids=["plain", "flow"])
def test_a_handler_whose_messages_are_refused_has_failed(cluster: Any, kept: Kept, raised: Any, options: Any) -> None:
    kept.refuses = {2}

    @event_handler("COPY")
    def copy(event: Any) -> None:
        keven_log_event(raised(event.number))

    server = group_server(cluster, "in", settings=quick(cluster, commit_interval_ms=50), **options)
    with live(server) as running:
        send(cluster, "in", *(event("COPY", number=number) for number in range(4)))
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 4}, "all are committed")
        assert running.server.counts()["dead"] == 1
    assert sorted(kept.numbers) == [0, 1, 3]


def test_a_batch_sends_if_one_of_its_records_is_done(cluster: Any, publisher: None, raised: Any) -> None:
    class Batch(EventHandler):
        event_name = "COPY"
        batch_size = 3
        batch_wait_ms = 20

        def handle_batch(self, events: Any) -> Any:
            for entry in events:
                keven_log_event(raised(entry.number))
            if events[0].number < 3:
                return None
            if events[0].number < 6:
                return [None, ZeroDivisionError(), None]
            raise ZeroDivisionError

    with live(group_server(cluster, "in", settings=quick(cluster, commit_interval_ms=50))):
        send(cluster, "in", *(event("COPY", number=number) for number in range(9)))
        wait_until(lambda: committed(cluster, "svc", "in") == {0: 9}, "all are committed")
    assert numbers(cluster) == [0, 1, 2, 3, 4, 5]
