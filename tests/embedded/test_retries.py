"""Failed records come again by way of the retry topic, hold nothing up meanwhile, and end as they should."""

import asyncio
import struct
import time
from typing import Any

import jsonpickle
import pytest
from embedded_support import (
    MODES,
    Live,
    Message,
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

from keven_core._native.message import Record
from keven_core.kafka import EventHandler, current_record, event_handler
from keven_core.kafka._original_copies import original_attempt_of
from keven_core.kafka.errors import DeadLetterFloodError
from keven_core.kafka.events.event import Event
from keven_core.kafka.outcomes import DeadLetter, Retry, Skip
from keven_core.kafka.retry import RetryPolicy
from keven_core.kafka.topics import dead_letter_topic, retry_topic

pytestmark = pytest.mark.logs_errors

WAITING, DEAD = retry_topic("svc"), dead_letter_topic("svc")
HANDLERS = pytest.mark.parametrize("is_async", [False, True], ids=["def", "async-def"])


class ShopError(Exception):
    pass


@pytest.fixture(autouse=True)
def cluster(embedded_kafka: Any, handler_registry: Any) -> None:
    topics(embedded_kafka, "t", WAITING)


def retrying(kafka: Any, runners: Any = None, *, topic: Any = "t", **options: Any) -> Any:
    """A server that retries soon."""
    changes = {"commit_interval_ms": 50, **options.pop("settings", {})}
    given = {"auto_reprocess_errors": True, "retry_interval": 0.15, "session_timeout": 1.5, "heartbeat_interval": 0.1}
    return group_server(kafka, topic, runners, settings=quick(kafka, **changes), **{**given, **options})


def count_of(server: Any, topic: str) -> dict[str, int]:
    """What the ledger says of a topic, but for zeros."""
    total: dict[str, int] = {}
    for (name, _), counts in server.ledger().items():
        if name == topic:
            for key, count in counts.items():
                total[key] = total.get(key, 0) + count
    return {key: count for key, count in total.items() if count}


def register(handle: Any, name: str = "ORDER", *, is_async: bool = False, **options: Any) -> None:
    """Register a function of the event as a handler."""
    if not is_async:
        event_handler(name, **options)(handle)
        return

    @event_handler(name, **options)
    async def handle_async(event: Any) -> Any:
        await asyncio.sleep(0)
        return handle(event)


@MODES
@HANDLERS
def test_a_record_comes_again_until_it_is_handled(embedded_kafka: Any, mode: str, is_async: bool) -> None:
    seen: list[Any] = []

    def handle(event: Any) -> None:
        record = current_record()
        seen.append((record.attempt, record.topic, record.partition, record.offset, record.key, record.timestamp_ms))
        assert record.headers == [("trace", b"t")]
        assert event.number == 7
        if record.attempt < 3:
            raise ShopError("not yet")

    register(handle, is_async=is_async)
    value = event("ORDER", number=7)
    send(
        embedded_kafka, "t", b"{}", Message(value, key=b"k", headers=[("trace", b"t")], timestamp_ms=1_600_000_000_000)
    )
    with live(retrying(embedded_kafka), mode) as running:
        wait_until(lambda: len(seen) == 3, "it is handled")
        wait_until(lambda: committed(embedded_kafka, "svc", WAITING) == {0: 2}, "the attempts are committed")
        assert committed(embedded_kafka, "svc", "t") == {0: 2}
    assert seen == [(attempt, "t", 0, 1, b"k", 1_600_000_000_000) for attempt in (1, 2, 3)]
    assert count_of(running.server, "t") == {"received": 2, "dead": 1, "retried": 1}
    assert count_of(running.server, WAITING) == {"received": 2, "retried": 1, "done": 1}
    assert values(embedded_kafka, DEAD) == [b"{}"]
    # Stamped when it was written, so that the retry topic keeps it.
    assert all(copy.timestamp[1] > 1_700_000_000_000 for copy in read(embedded_kafka, WAITING))


@MODES
def test_in_the_end_it_is_dead_lettered_as_what_it_was(embedded_kafka: Any, mode: str) -> None:
    tries: list[int] = []

    def handle(event: Any) -> None:
        tries.append(current_record().attempt)
        raise ShopError(f"try {len(tries)}")

    register(handle)
    value = event("ORDER", number=7)
    send(embedded_kafka, "t", Message(value, key=b"k", headers=[("trace", b"t")], timestamp_ms=1_600_000_000_000))
    with live(retrying(embedded_kafka, max_retries=2), mode) as running:
        wait_until(lambda: values(embedded_kafka, DEAD), "it is dead-lettered")
        wait_until(lambda: committed(embedded_kafka, "svc", WAITING) == {0: 2}, "the attempts are committed")
    assert tries == [1, 2, 3]
    [letter] = read(embedded_kafka, DEAD)
    assert (letter.value, letter.key, letter.timestamp[1]) == (value, b"k", 1_600_000_000_000)
    assert letter.header("trace") == b"t"
    assert letter.header("kafka_dlt-original-topic") == b"t"
    assert letter.header("kafka_dlt-original-offset") == struct.pack(">q", 0)
    assert letter.header("kafka_dlt-exception-message") == b"try 3 (tried 3 times)"
    assert count_of(running.server, WAITING) == {"received": 2, "retried": 1, "dead": 1}


@MODES
def test_other_records_flow_past(embedded_kafka: Any, mode: str) -> None:
    seen: list[tuple[int, int]] = []

    def handle(event: Any) -> None:
        seen.append((event.number, current_record().attempt))
        if event.number % 5 == 0 and current_record().attempt == 1:
            raise ShopError

    register(handle)
    with live(retrying(embedded_kafka, retry_interval=0.4), mode):
        send(embedded_kafka, "t", *(event("ORDER", number=number) for number in range(20)))
        wait_until(lambda: len(seen) == 24, "all are handled")
        wait_until(lambda: committed(embedded_kafka, "svc", WAITING) == {0: 4}, "and committed")
    assert seen[:20] == [(number, 1) for number in range(20)]
    assert seen[20:] == [(number, 2) for number in (0, 5, 10, 15)]


@MODES
def test_what_is_due_does_not_wait_behind_what_is_not(embedded_kafka: Any, mode: str) -> None:
    seen: list[tuple[int, int]] = []
    delays = {0: 30, 1: 0.6, 2: 0.1, 3: 0}

    def handle(event: Any) -> Any:
        seen.append((event.number, current_record().attempt))
        return Retry(after=delays[event.number]) if current_record().attempt == 1 else None

    register(handle)
    send(embedded_kafka, "t", *(event("ORDER", number=number) for number in delays))
    with live(retrying(embedded_kafka), mode) as running:
        wait_until(lambda: len(seen) == 7, "three come again")
        # The first one is open, so nothing of the partition is committed.
        wait_until(lambda: count_of(running.server, WAITING).get("done") == 3, "they are counted")
        assert committed(embedded_kafka, "svc", WAITING) == {}
        assert count_of(running.server, WAITING)["in_flight"] == 1
    assert [number for number, attempt in seen if attempt == 2] == [3, 2, 1]
    # It is left to the next run.
    assert count_of(running.server, WAITING) == {"received": 4, "done": 3, "stale": 1}


@MODES
def test_what_waits_survives_a_restart(embedded_kafka: Any, mode: str) -> None:
    tries: list[int] = []

    def handle(event: Any) -> None:
        tries.append(current_record().attempt)
        if len(tries) == 1:
            raise Retry(after=1.0)

    register(handle)
    send(embedded_kafka, "t", event("ORDER"))
    with live(retrying(embedded_kafka, settings={"auto_offset_reset": "latest"}, start="earliest"), mode):
        wait_until(lambda: committed(embedded_kafka, "svc", "t") == {0: 1}, "its copy is acknowledged")
    began = time.monotonic()
    with live(retrying(embedded_kafka, settings={"auto_offset_reset": "latest"}), mode):
        wait_until(lambda: tries == [1, 2], "it comes again")
        wait_until(lambda: committed(embedded_kafka, "svc", WAITING) == {0: 1}, "and is committed")
    assert time.monotonic() - began < 10


OUTCOMES = {
    "retry": (lambda: Retry(after=0.1), "retried"),
    "dead": (lambda: DeadLetter("never"), "dead"),
    "skip": (lambda: Skip("a duplicate"), "skipped"),
}


@MODES
@HANDLERS
@pytest.mark.parametrize("raised", [True, False], ids=["raised", "returned"])
@pytest.mark.parametrize("kind", OUTCOMES)
def test_outcomes(embedded_kafka: Any, mode: str, is_async: bool, raised: bool, kind: str) -> None:
    make, counted = OUTCOMES[kind]
    attempts: list[int] = []

    def handle(event: Any) -> Any:
        attempts.append(current_record().attempt)
        if len(attempts) > 1:
            return "done"  # anything else that is returned means that
        if raised:
            raise make()
        return make()

    register(handle, is_async=is_async)
    send(embedded_kafka, "t", event("ORDER"))
    with live(retrying(embedded_kafka), mode) as running:
        wait_until(lambda: committed(embedded_kafka, "svc", "t") == {0: 1}, "it is committed")
        if kind == "retry":
            wait_until(lambda: committed(embedded_kafka, "svc", WAITING) == {0: 1}, "the other attempt too")
    assert count_of(running.server, "t") == {"received": 1, counted: 1}
    assert len(values(embedded_kafka, DEAD)) == (kind == "dead")
    assert attempts == ([1, 2] if kind == "retry" else [1])


@MODES
@HANDLERS
def test_of_several_handlers_only_those_that_failed_run_again(embedded_kafka: Any, mode: str, is_async: bool) -> None:
    ran: list[str] = []
    hooked: list[int] = []

    class Base(EventHandler):
        auto_register = False

    Base.register_post_handler_hook(lambda: hooked.append(1))

    def define(name: str, failures: int, event_name: str = "ORDER") -> None:
        def handle(self: Any, event: Any) -> Any:
            ran.append(name)
            if ran.count(name) <= failures:
                raise ShopError(name)

        async def handle_async(self: Any, event: Any) -> Any:
            return handle(self, event)

        method = handle_async if is_async and name == "B" else handle
        type(Base)(name, (Base,), {"event_name": event_name, "handle_event": method, "__module__": "shop"})

    for name, failures in {"A": 0, "B": 1, "C": 2}.items():
        define(name, failures)
    send(embedded_kafka, "t", event("ORDER"))
    with live(retrying(embedded_kafka), mode) as running:
        wait_until(lambda: ran.count("C") == 3, "all are done")
        wait_until(lambda: committed(embedded_kafka, "svc", WAITING) == {0: 2}, "and committed")
    assert ran == ["A", "B", "C", "B", "C", "C"]
    assert len(hooked) == 3
    copies = [copy.header("keven_retry-handlers") for copy in read(embedded_kafka, WAITING)]
    assert copies == [b"shop.B,shop.C", b"shop.C"]
    assert count_of(running.server, "t") == {"received": 1, "retried": 1}
    assert count_of(running.server, WAITING) == {"received": 2, "retried": 1, "done": 1}


@MODES
def test_a_record_that_all_handlers_skip_is_skipped(embedded_kafka: Any, mode: str) -> None:
    register(lambda event: Skip())
    register(lambda event: Skip() if event.number else None)
    send(embedded_kafka, "t", event("ORDER", number=0), event("ORDER", number=1))
    with live(retrying(embedded_kafka), mode) as running:
        wait_until(lambda: committed(embedded_kafka, "svc", "t") == {0: 2}, "they are committed")
    assert count_of(running.server, "t") == {"received": 2, "done": 1, "skipped": 1}


@MODES
def test_the_nearest_policy_holds(embedded_kafka: Any, mode: str) -> None:
    """A handler's own, its event's, the topic's: also where the server would retry nothing."""

    class Refund(Event):
        event_name = "REFUND"
        retry_policy = RetryPolicy(2, 0.1)

    tries: dict[str, int] = {}

    def failing(name: str) -> Any:
        def handle(event: Any) -> None:
            tries[name] = tries.get(name, 0) + 1
            raise ShopError

        return handle

    register(failing("own"), "ORDER", retry_policy=RetryPolicy(1, 0.1))
    register(failing("event"), "REFUND")
    register(failing("none"), "OTHER")
    send(embedded_kafka, "t", *(event(name) for name in ("ORDER", "REFUND", "OTHER")))
    try:
        with live(retrying(embedded_kafka, auto_reprocess_errors=False), mode):
            wait_until(lambda: len(values(embedded_kafka, DEAD)) == 3, "all are dead-lettered")
    finally:
        del Event.classes["REFUND"]
    assert tries == {"own": 2, "event": 3, "none": 1}


def test_retry_detail_is_by_topic(embedded_kafka: Any) -> None:
    embedded_kafka.create_topic("u")
    embedded_kafka.create_topic("v")
    tries: dict[str, int] = {}

    def handle(message: bytes, topic: str) -> None:
        tries[topic] = tries.get(topic, 0) + 1
        raise ShopError

    server = retrying(
        embedded_kafka,
        handle,
        topic=["t", "u", "v"],
        pass_topic_param=True,
        max_retries=1,
        retry_detail={
            "u": {"retry_interval": 0.05, "max_retries": 3},
            "v": RetryPolicy(4, 0.05, in_place=True),
        },
    )
    for name in ("t", "u", "v"):
        send(embedded_kafka, name, name.encode())
    with live(server):
        wait_until(lambda: sorted(values(embedded_kafka, DEAD)) == [b"t", b"u", b"v"], "all are dead-lettered")
    assert tries == {"t": 2, "u": 4, "v": 5}
    assert not [value for value in values(embedded_kafka, WAITING) if value == b"v"]


@MODES
def test_foreign_topics_and_tombstones_come_again_too(embedded_kafka: Any, mode: str) -> None:
    embedded_kafka.create_topic("prices")
    seen: list[Any] = []

    class Prices(EventHandler):
        topic = "prices"
        value_type = dict[str, int]

        def handle_event(self, event: Any) -> None:
            seen.append(event)
            if len(seen) == 1:
                raise ShopError

        def handle_tombstone(self, record: Any) -> None:
            seen.append((record.key, record.value, record.topic))
            if seen.count((b"k", None, "prices")) == 1:
                raise ShopError

    send(embedded_kafka, "prices", Message(b'{"eur":5}'), Message(None, key=b"k"))
    with live(retrying(embedded_kafka, topic="prices"), mode):
        wait_until(lambda: len(seen) == 4, "both come again")
        wait_until(lambda: committed(embedded_kafka, "svc", WAITING) == {0: 2}, "and are committed")
    assert seen == [{"eur": 5}, (b"k", None, "prices")] * 2


def test_what_is_no_copy_of_ours_is_dead_lettered(embedded_kafka: Any) -> None:
    seen: list[Any] = []
    register(lambda event: seen.append(event.number))
    send(embedded_kafka, WAITING, event("ORDER", number=1))
    with live(retrying(embedded_kafka)):
        wait_until(lambda: len(values(embedded_kafka, DEAD)) == 1, "it is dead-lettered")
    assert seen == []
    [letter] = read(embedded_kafka, DEAD)
    assert letter.header("kafka_dlt-exception-fqcn") == b"keven_core.kafka.errors.UndecodableError"


def test_an_event_that_nobody_handles_any_more_is_skipped(embedded_kafka: Any) -> None:
    register(lambda event: Retry(after=0.5))
    send(embedded_kafka, "t", event("ORDER"))
    with live(retrying(embedded_kafka)):
        wait_until(lambda: committed(embedded_kafka, "svc", "t") == {0: 1}, "it waits")
    EventHandler.registry_of().unregister(EventHandler.registry_of().handlers_of("ORDER")[0].target)
    register(lambda event: None, "OTHER")
    with live(retrying(embedded_kafka)) as running:
        wait_until(lambda: count_of(running.server, WAITING).get("skipped"), "it is passed over")
    assert count_of(running.server, WAITING) == {"received": 1, "skipped": 1}


@MODES
def test_handlers_that_wait_are_told_apart_by_their_context(embedded_kafka: Any, mode: str) -> None:
    """What current_record() gives in another attempt is gone when it is over."""
    seen: list[Any] = []

    def handle(event: Any) -> None:
        record = current_record()
        seen.append((record.offset, record.attempt))
        if event.number == 0 and record.attempt == 1:
            raise ShopError

    register(handle)
    with live(retrying(embedded_kafka, retry_interval=0.05), mode):
        send(embedded_kafka, "t", event("ORDER", number=0))
        wait_until(lambda: len(seen) == 2, "it comes again")
        send(embedded_kafka, "t", event("ORDER", number=1))
        wait_until(lambda: len(seen) == 3, "another one follows")
    assert seen == [(0, 1), (0, 2), (1, 1)]


@MODES
@pytest.mark.parametrize("setting", ["dead_letters_in_a_row", "dead_letters_percent"])
def test_a_flood_of_dead_letters_ends_the_server(embedded_kafka: Any, mode: str, setting: str) -> None:
    def handle(event: Any) -> None:
        if event.number >= 100:
            raise ShopError

    register(handle)
    if setting == "dead_letters_in_a_row":
        count, settings = 400, {"dead_letters_in_a_row": 30, "dead_letters_percent": 100, "batch_size": 7}
    else:
        count, settings = 12_000, {"dead_letters_in_a_row": 0, "dead_letters_percent": 50}
    for start in range(0, count, 1000):
        numbers = range(start, min(start + 1000, count))
        send(embedded_kafka, "t", *(event("ORDER", number=number) for number in numbers))
    running = Live(retrying(embedded_kafka, auto_reprocess_errors=False, settings=settings), mode)
    running.join()
    assert isinstance(running.error, DeadLetterFloodError)
    dead = len(values(embedded_kafka, DEAD))
    # Nothing is lost by it: what was handled is committed, the rest stays where it is.
    assert committed(embedded_kafka, "svc", "t") == {0: 100 + dead}
    if setting == "dead_letters_in_a_row":
        assert dead == 30
        assert isinstance(running.error.__cause__, ShopError)
    else:
        assert 9_000 < dead < 11_000


def test_kafkas_own_dialect(embedded_kafka: Any) -> None:
    register(lambda event: DeadLetter("never"))
    send(embedded_kafka, "t", event("ORDER"))
    with live(retrying(embedded_kafka, settings={"dead_letter_dialect": "kafka"})):
        wait_until(lambda: values(embedded_kafka, DEAD), "it is dead-lettered")
    [letter] = read(embedded_kafka, DEAD)
    assert letter.header("__dlq.errors.topic") == b"t"
    assert letter.header("__dlq.errors.message") == b"keven_core.kafka.outcomes.DeadLetter: never"
    assert letter.header("kafka_dlt-original-topic") is None


@MODES
def test_more_waits_than_may_be_held(embedded_kafka: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The retry topic is paused while the shelf is full, and read on afterwards: nothing is lost or handled twice."""
    monkeypatch.setattr("keven_core.kafka._attempts._SHELF_BYTES", 20_000)
    seen: list[int] = []
    most_held = 0

    def handle(event: Any) -> Any:
        nonlocal most_held
        if current_record().attempt == 1:
            return Retry(after=0.3)
        most_held = max(most_held, len(running.server._session._attempts._shelf))
        seen.append(event.number)
        return None

    register(handle)
    for start in range(0, 1000, 100):
        send(embedded_kafka, "t", *(event("ORDER", number=number) for number in range(start, start + 100)))
    with live(retrying(embedded_kafka, settings={"batch_size": 20}), mode) as running:
        wait_until(lambda: len(seen) >= 1000, "all come again")
        wait_until(lambda: committed(embedded_kafka, "svc", WAITING) == {0: 1000}, "and are committed")
    assert sorted(seen) == list(range(1000))
    assert 5 < most_held < 60


# --- what the original library has left ------------------------------------------------------------------------------


class OriginalRetryRecord:
    """As the original wrote it with jsonpickle."""

    def __init__(self, message: bytes, topic: str, failure_count: int) -> None:
        self.timestamp = 1_600_000_000.5
        self.failure_count = failure_count
        self.message = message
        self.topic = topic
        self.errors = ["ValueError: no"]


@MODES
@pytest.mark.parametrize("base85", [False, True])
def test_records_in_the_originals_retry_topic_are_handled(embedded_kafka: Any, mode: str, base85: bool) -> None:
    seen: list[Any] = []

    def handle(event: Any) -> None:
        record = current_record()
        seen.append((event.number, record.topic, record.attempt))
        if event.number == 2:
            raise DeadLetter("never")

    register(handle)
    for number in (1, 2):
        copy = OriginalRetryRecord(event("ORDER", number=number), "t", number)
        send(embedded_kafka, WAITING, jsonpickle.encode(copy, use_base85=base85, keys=True).encode())
    with live(retrying(embedded_kafka), mode) as running:
        wait_until(lambda: committed(embedded_kafka, "svc", WAITING) == {0: 2}, "both are accounted for")
    assert seen == [(1, "t", 2), (2, "t", 3)]
    assert count_of(running.server, WAITING) == {"received": 2, "done": 1, "dead": 1}
    (letter,) = read(embedded_kafka, DEAD)
    assert letter.value == event("ORDER", number=2)
    assert letter.header("kafka_dlt-original-topic") == b"t"


@pytest.mark.parametrize(
    "value",
    [
        b'{"failure_count":1,"topic":"t"}',
        b'{"failure_count":"1","topic":"t","message":"x"}',
        b'{"failure_count":1,"topic":"","message":"x"}',
        b'{"failure_count":-1,"topic":"t","message":"x"}',
        b'{"failure_count":1,"topic":"t","message":{"py/b64":"*"}}',
        b'{"failure_count":9223372036854775807,"topic":"t","message":"x"}',
        b'{"failure_count":100000000000000000000000,"topic":"t","message":"x"}',
        b'{"failure_count":1,"topic":"t","message":' + b"[" * 5000,
        b'{"failure_count":1,"topic":"t","message":{"py/reduce":[{"py/function":"os.system"},{"py/tuple":["x"]}]}}',
        b"{",
        b"",
        None,
    ],
)
def test_what_is_no_such_record_is_told_apart(value: Any) -> None:
    assert original_attempt_of(Record(WAITING, 0, 1, value=value)) is None


@pytest.mark.parametrize("message", ['"a=b"', '{"py/bytes":"a=3Db"}', '{"py/b64":"YT1i"}'])
def test_each_way_to_write_bytes_is_read(message: str) -> None:
    value = b'{"failure_count":0,"topic":"t","message":%s}' % message.encode()
    attempt = original_attempt_of(Record(WAITING, 0, 1, value=value))
    assert attempt is not None
    assert (attempt.record.value, attempt.record.attempt) == (b"a=b", 1)


@MODES
def test_whatever_stands_in_the_retry_topic_the_server_goes_on(embedded_kafka: Any, mode: str) -> None:
    register(lambda event: None)
    value = event("ORDER", number=1)
    send(
        embedded_kafka,
        WAITING,
        b'{"failure_count":1,"topic":"x","message":' + b"[" * 5000,
        b'{"failure_count":100000000000000000000000,"topic":"t","message":"x"}',
        Message(value, headers=[("retry_topic-backoff-timestamp", b"\xff" * 200)]),
        Message(value, headers=[("retry_topic-backoff-timestamp", b"\x7f" + b"\xff" * 7)]),
    )
    with live(retrying(embedded_kafka), mode):
        wait_until(lambda: committed(embedded_kafka, "svc", WAITING) == {0: 4}, "all are accounted for")
    assert len(values(embedded_kafka, DEAD)) == 4
