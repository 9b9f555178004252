"""What becomes of each kind of record: the table of outcomes, and bad input of every kind.

Each case stands between two good records, which have to be handled in order whatever it is.
"""

import asyncio
import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from embedded_support import (
    DEAD,
    MODES,
    Feeder,
    Headers,
    Message,
    Stored,
    event,
    isolated_handlers,
    live,
    logged,
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
from keven_core.kafka.abstracts.eventreceiver_server import AllEventsReceiverServer
from keven_core.kafka.events.event import Event
from keven_core.kafka.logs import RateLimiter
from keven_core.kafka.record import current_record
from keven_core.testing import EmbeddedKafka


def register_events() -> list[Any]:
    """Events GOOD and OTHER with a handler each, and KNOWN that nobody handles; returns what the handlers have seen."""

    class Good(Event):
        event_name = "GOOD"
        number: int
        text: str = ""

    class Other(Event):
        event_name = "OTHER"
        number: int = 0

    class Known(Event):
        event_name = "KNOWN"
        number: int = 0

    found: list[Any] = []

    @event_handler("GOOD")
    def handle_good(event: Any) -> None:
        found.append((current_record().partition, event.number))

    @event_handler("OTHER")
    def handle_other(event: Any) -> None:
        found.append((current_record().partition, "other", event.number))

    return found


@pytest.fixture
def seen(handler_registry: Any) -> list[Any]:
    return register_events()


def packed(name: str, **fields: Any) -> bytes:
    """An event as MessagePack."""
    return msgspec.msgpack.encode({"event_name": name, **fields})


def deep_json(depth: int) -> bytes:
    return b'{"event_name":"GOOD","number":1,"more":' + b"[" * depth + b"]" * depth + b"}"


def deep_msgpack(depth: int) -> bytes:
    return b"\x83" + packed("GOOD", number=1)[1:] + b"\xa4more" + b"\x91" * depth + b"\x90"


@dataclass
class Case:
    """A value, its headers, and what becomes of it on a topic that is not bound to an event."""

    value: bytes | None
    outcome: str
    headers: Headers = field(default_factory=list)
    why: str = ""  # part of the reason in the dead letter


GOOD_1, GOOD_2 = event("GOOD", number=1), event("GOOD", number=2)

CASES = {
    "handled": Case(event("GOOD", number=5), "done"),
    "spaces": Case(b' \n{ "event_name" :\t"GOOD" , "number" : 5 }', "done"),
    "tag not first": Case(b'{"number":5,"event_name":"GOOD"}', "done"),
    "escaped name": Case(b'{"event_name":"G\\u004fOD","number":5}', "done"),
    "unknown fields": Case(event("GOOD", number=5, unknown={"a": [1, None]}), "done"),
    "brackets in a string": Case(event("GOOD", number=5, text="[" * 5000), "done"),
    "no handler": Case(event("KNOWN", number=5), "skipped"),
    "unknown name": Case(event("NOBODY"), "skipped"),
    "unknown name, tag not first": Case(b'{"a":1,"event_name":"NOBODY"}', "skipped"),
    "unknown name, broken": Case(b'{"event_name":"NOBODY","a":', "skipped"),
    "a path for a name": Case(event("../../../etc/passwd"), "skipped"),
    "a name that is not UTF-8": Case(b'{"event_name":"\xff\xfe"}', "skipped"),
    "unknown name in the header": Case(b"anything", "skipped", [("event_name", b"NOBODY")]),
    "tombstone": Case(None, "tombstones"),
    "tombstone of an event without tombstone handler": Case(None, "tombstones", [("event_name", b"GOOD")]),
    "empty": Case(b"", "dead", why="empty"),
    "blank": Case(b"  \n ", "dead"),
    "not JSON": Case(b"hello", "dead"),
    "truncated": Case(event("GOOD", number=5)[:-3], "dead"),
    "truncated, tag not first": Case(b'{"number":5,"event_na', "dead"),
    "two values": Case(event("GOOD", number=5) * 2, "dead"),
    "a list": Case(b"[1,2,3]", "dead"),
    "a string": Case(b'"GOOD"', "dead"),
    "null": Case(b"null", "dead"),
    "a number": Case(b"5", "dead"),
    "NaN": Case(b'{"event_name":"GOOD","number":NaN}', "dead"),
    "wrong type": Case(event("GOOD", number="five"), "dead", why="number"),
    "missing field": Case(event("GOOD"), "dead", why="number"),
    "an integer of 400 digits": Case(b'{"event_name":"GOOD","number":1' + b"0" * 400 + b"}", "done"),
    "an integer of 20 000 digits": Case(b'{"event_name":"GOOD","number":1' + b"0" * 20_000 + b"}", "dead"),
    "missing tag": Case(b'{"number":5}', "dead", why="event_name"),
    "missing tag, known name in the header": Case(b'{"number":5}', "dead", [("event_name", b"GOOD")], "event_name"),
    "null tag": Case(b'{"event_name":null,"number":5}', "dead"),
    "numeric tag": Case(b'{"event_name":7,"number":5}', "dead"),
    "empty tag": Case(b'{"event_name":"","number":5}', "dead", why="empty"),
    "name with a control character": Case(b'{"event_name":"A\\u0007B"}', "dead", why="control"),
    "name with a line break": Case(b'{"event_name":"A\\nB"}', "dead", why="control"),
    "name with a raw NUL": Case(b'{"event_name":"A\0B","number":5}', "dead"),
    "name with DEL": Case(b'{"event_name":"A\x7fB"}', "dead", why="control"),
    "name with ESC, MessagePack": Case(packed("A\x1bB"), "dead", why="control"),
    "header name with a control character": Case(b"x", "dead", [("event_name", b"A\x1bB")], "control"),
    "name too long": Case(event("N" * 300), "dead", why="longer"),
    "name too long, MessagePack": Case(packed("N" * 300), "dead", why="longer"),
    "too large": Case(event("GOOD", number=5, text="x" * 70_000), "dead", why="KEVEN_MAX_PAYLOAD_BYTES=60000"),
    "200 deep": Case(deep_json(199), "done"),
    "too deep": Case(deep_json(10_000), "dead", why="nested"),
    "too deep, one over": Case(deep_json(250), "dead", why="nested"),
    "too deep, tag last": Case(
        b'{"more":' + b"[" * 10_000 + b"]" * 10_000 + b',"event_name":"GOOD","number":1}', "dead", why="nested"
    ),
    "200 deep, MessagePack": Case(deep_msgpack(198), "done"),
    "too deep, MessagePack": Case(deep_msgpack(10_000), "dead", why="nested"),
    "field that is not UTF-8": Case(b'{"event_name":"GOOD","number":5,"text":"\xff\xfe"}', "dead"),
    "NUL bytes": Case(b"\0" * 100, "dead"),
    "byte order mark": Case(b"\xef\xbb\xbf" + event("GOOD", number=5), "dead"),
    "MessagePack": Case(packed("GOOD", number=5), "done"),
    "MessagePack, unknown": Case(packed("NOBODY"), "skipped"),
    "MessagePack, tag not first": Case(msgspec.msgpack.encode({"number": 5, "event_name": "GOOD"}), "done"),
    "MessagePack, truncated": Case(packed("GOOD", number=5, text="longer")[:-3], "dead"),
    "MessagePack, wrong type": Case(packed("GOOD", number="five"), "dead", why="number"),
    "MessagePack, missing tag": Case(msgspec.msgpack.encode({"number": 5}), "dead"),
    "MessagePack, never used byte": Case(b"\xc1", "dead"),
    "MessagePack, huge length": Case(b"\xdf\xff\xff\xff\xff\xaaevent_name\xa4GOOD", "dead"),
    "MessagePack, huge string": Case(b"\x81\xaaevent_name\xdb\xff\xff\xff\xff", "dead"),
    "MessagePack, extension": Case(b"\xc7\x05\x01abcde", "dead"),
    "all ones": Case(b"\xff" * 100, "dead"),
    "10 000 headers": Case(event("GOOD", number=5), "done", [(f"h{i}", b"v") for i in range(10_000)]),
    "10 000 headers, bad": Case(b"bad", "dead", [(f"h{i}", b"v") for i in range(10_000)]),
    "10 000 headers named event_name": Case(b"bad", "skipped", [("event_name", b"%d" % i) for i in range(10_000)]),
}


@dataclass
class Outcome:
    """What became of the three records of a case's partition."""

    seen: list[Any]
    counts: dict[str, int]
    dead: list[Stored]
    lines: list[str]


def message_of(case: Case) -> Message:
    return Message(case.value, b"the key", [("own", b"1"), ("own", None), *case.headers], 1_600_000_000_123)


def run_cases(kafka: EmbeddedKafka, topic: str, cases: dict[str, Case], mode: str) -> dict[str, Outcome]:
    """Run every case in a partition of its own, between two good records."""
    with isolated_handlers(), logged() as lines, pytest.MonkeyPatch.context() as patch:
        # Each line is looked at here; another test has the limit.
        patch.setattr(RateLimiter, "admit", lambda self, key: 0)
        seen = register_events()
        kafka.create_topic(topic, len(cases))
        kafka.create_topic(f"kafka_server.{topic}.dead", 1)
        with Feeder(kafka) as feeder:
            for partition, case in enumerate(cases.values()):
                for message in (GOOD_1, message_of(case), GOOD_2):
                    feeder.send(topic, message, partition)
            feeder.wait()
        server = reading_server(kafka, topic, client_id=topic, settings=quick(kafka, max_payload_bytes=60_000))
        run(server, mode)
        ledger = server.ledger()
        found: dict[str, Outcome] = {}
        dead = read(kafka, f"kafka_server.{topic}.dead")
        for partition, name in enumerate(cases):
            found[name] = Outcome(
                [entry[1:] for entry in seen if entry[0] == partition],
                ledger[topic, partition],
                [
                    entry
                    for entry in dead
                    if entry.header("kafka_dlt-original-partition") == struct.pack(">i", partition)
                ],
                [line for line in lines if f"{topic} [{partition}] @" in line],
            )
        assert sum(len(outcome.lines) for outcome in found.values()) == len(lines)
        return found


@pytest.fixture(scope="module")
def outcomes() -> Callable[[str, str], dict[str, Outcome]]:
    """The outcomes of all cases by topic and mode; each run is made once."""
    made: dict[tuple[str, str], dict[str, Outcome]] = {}

    def get(topic: str, mode: str) -> dict[str, Outcome]:
        if (topic, mode) not in made:
            with EmbeddedKafka() as kafka:
                made[topic, mode] = run_cases(kafka, topic, CASES if topic == "t" else BOUND_CASES, mode)
        return made[topic, mode]

    return get


@MODES
@pytest.mark.logs_errors
@pytest.mark.parametrize("name", CASES)
def test_outcome(outcomes: Any, mode: str, name: str) -> None:
    case, outcome = CASES[name], outcomes("t", mode)[name]
    assert (outcome.seen[0], outcome.seen[-1]) == ((1,), (2,))
    wanted = {
        "received": 3,
        "done": 2,
        "skipped": 0,
        "tombstones": 0,
        "dead": 0,
        "retried": 0,
        "stale": 0,
        "in_flight": 0,
    }
    wanted[case.outcome] += 1
    assert outcome.counts == wanted
    assert len(outcome.seen) == wanted["done"]
    if case.outcome != "dead":
        assert (outcome.dead, outcome.lines) == ([], [])
        return
    [copy] = outcome.dead
    # Bytes, key, headers and timestamp are the original's; origin and reason come after its headers.
    message = message_of(case)
    assert (copy.value, copy.key, copy.timestamp) == (case.value, b"the key", (1, 1_600_000_000_123))
    assert copy.headers[: len(message.headers)] == message.headers
    assert copy.headers[len(message.headers) :][:6] == [
        ("kafka_dlt-original-topic", b"t"),
        ("kafka_dlt-original-partition", struct.pack(">i", list(CASES).index(name))),
        ("kafka_dlt-original-offset", struct.pack(">q", 1)),
        ("kafka_dlt-original-timestamp", struct.pack(">q", 1_600_000_000_123)),
        ("kafka_dlt-original-timestamp-type", b"CreateTime"),
        ("kafka_dlt-original-consumer-group", b"t"),
    ]
    assert copy.header("kafka_dlt-exception-fqcn") == b"keven_core.kafka.errors.UndecodableError"
    assert case.why.encode() in (copy.header("kafka_dlt-exception-message") or b"")
    # One line, which says where and why, free of control characters.
    [line] = outcome.lines
    assert " @ 1 " in line
    assert "failed to decode" in line
    assert "kafka_server.t.dead" in line
    assert line.isprintable()
    assert len(line) < 1000


@pytest.mark.logs_errors
def test_a_flood_of_bad_records_is_a_few_lines(embedded_kafka: Any, seen: list[Any], caplog: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *(b"bad %d" % number for number in range(500)), GOOD_1)
    server = reading_server(embedded_kafka, "t")
    run(server, "sync")
    assert (seen, server.counts()["dead"]) == ([(0, 1)], 500)
    assert values(embedded_kafka, DEAD) == [b"bad %d" % number for number in range(500)]
    assert 1 <= len([record for record in caplog.records if record.levelno >= logging.ERROR]) <= 10


@MODES
@pytest.mark.logs_errors
def test_a_line_about_a_hostile_record_cannot_forge_another(
    embedded_kafka: Any, handler_registry: Any, caplog: Any, mode: str
) -> None:
    @event_handler(topic="t")
    def handle(value: bytes) -> None:
        raise ValueError("\x1b[31mforged\r\n2024-01-01 ERROR root: " + "x" * 5000)

    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", event("A\u202eB\u2028C"))
    run(reading_server(embedded_kafka, "t"), mode)
    [line] = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    first, _, trace = line.partition("\n")
    assert "\x1b" not in first
    assert "\r" not in line
    assert "\\x1b[31mforged\\r\\n2024" in first
    assert "\x1b" not in trace
    assert len(first) < 1000
    [dead] = read(embedded_kafka, DEAD)
    assert len(dead.header("kafka_dlt-exception-message") or b"") <= 1000


# --- topics that are bound to one event ------------------------------------------------------------------------------

BOUND_CASES = {
    "missing tag": Case(b'{"number":5}', "done"),
    "missing tag, MessagePack": Case(msgspec.msgpack.encode({"number": 5}), "done"),
    "the right tag": Case(event("GOOD", number=5), "done"),
    "the tag of another event": Case(event("OTHER", number=5), "done"),
    "the tag of another event, MessagePack": Case(packed("OTHER", number=5), "done"),
    "the tag of another event, wrong type": Case(event("OTHER", number="five"), "dead"),
    "the tag of an event that nobody handles": Case(event("KNOWN"), "skipped"),
    "an unknown tag": Case(event("NOBODY"), "skipped"),
    "a tag with a control character": Case(b'{"event_name":"A\\u0007"}', "dead"),
    "wrong type": Case(event("GOOD", number="five"), "dead"),
    "empty": Case(b"", "dead"),
    "not JSON": Case(b"hello", "dead"),
    "too deep": Case(deep_json(10_000), "dead"),
    "too large": Case(event("GOOD", number=5, text="x" * 70_000), "dead"),
    "tombstone": Case(None, "tombstones"),
}


@MODES
@pytest.mark.logs_errors
@pytest.mark.parametrize("name", BOUND_CASES)
def test_outcome_on_a_topic_bound_to_an_event(outcomes: Any, mode: str, name: str) -> None:
    case, outcome = BOUND_CASES[name], outcomes("keven_events_good", mode)[name]
    middle = ("other", 5) if "another event" in name else (5,)
    assert outcome.seen == [(1,), *([middle] if case.outcome == "done" else []), (2,)]
    assert outcome.counts[case.outcome] == (3 if case.outcome == "done" else 1)
    assert [entry.value for entry in outcome.dead] == ([case.value] if case.outcome == "dead" else [])


@MODES
def test_a_false_tag_on_the_topic_of_an_event_without_a_class(
    embedded_kafka: Any, handler_registry: Any, mode: str
) -> None:
    got: list[Any] = []

    @event_handler("PLAIN")
    def handle_plain(event: Any) -> None:
        got.append(("plain", event.event_name, event.number))

    @event_handler("OTHER")
    def handle_other(event: Any) -> None:
        got.append(("other", event.event_name, event.number))

    topics(embedded_kafka, "keven_events_plain")
    send(
        embedded_kafka,
        "keven_events_plain",
        event("PLAIN", number=1),
        b'{"number":2}',
        event("OTHER", number=3),
        event("NOBODY", number=4),
    )
    server = reading_server(embedded_kafka, "keven_events_plain")
    run(server, mode)
    assert got == [("plain", "PLAIN", 1), ("plain", "PLAIN", 2), ("other", "OTHER", 3)]
    assert server.counts()["skipped"] == 1


# --- tombstones ------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("is_async", [False, True])
def test_tombstones_reach_the_handler_that_asks_for_them(
    embedded_kafka: Any, handler_registry: Any, mode: str, is_async: bool
) -> None:
    got: list[Any] = []

    class Base(EventHandler):
        auto_register = False

        def handle_event(self, event: Any) -> None:
            got.append("event")

    if is_async:

        class AsyncOrders(Base):
            event_name = "ORDER"

            async def handle_tombstone(self, record: Any) -> None:
                await asyncio.sleep(0)
                got.append((record.key, record.value, record.topic, current_record().key))

    else:

        class Orders(Base):
            event_name = "ORDER"

            def handle_tombstone(self, record: Any) -> None:
                got.append((record.key, record.value, record.topic, current_record().key))

    topics(embedded_kafka, "keven_events_order", "keven_events")
    send(embedded_kafka, "keven_events_order", Message(None, b"by topic"), event("ORDER"))
    send(
        embedded_kafka,
        "keven_events",
        Message(None, b"by header", [("event_name", b"ORDER")]),
        Message(None, b"whose?"),
    )
    server = reading_server(embedded_kafka, ["keven_events_order", "keven_events"])
    run(server, mode)
    assert sorted(got, key=str) == [
        (b"by header", None, "keven_events", b"by header"),
        (b"by topic", None, "keven_events_order", b"by topic"),
        "event",
    ]
    assert (server.counts()["done"], server.counts()["tombstones"]) == (3, 1)


@MODES
@pytest.mark.logs_errors
@pytest.mark.parametrize("kind", ["raises", "returns a coroutine"])
def test_a_tombstone_handler_that_fails_has_its_record_dead_lettered(
    embedded_kafka: Any, handler_registry: Any, mode: str, kind: str
) -> None:
    async def forgotten() -> None: ...

    class Orders(EventHandler):
        event_name = "ORDER"

        def handle_event(self, event: Any) -> None: ...

        def handle_tombstone(self, record: Any) -> Any:
            if kind == "raises":
                raise ValueError("no such order")
            return forgotten()

    topics(embedded_kafka, "keven_events_order")
    send(embedded_kafka, "keven_events_order", Message(None, b"k"), event("ORDER"))
    server = reading_server(embedded_kafka, "keven_events_order")
    run(server, mode)
    [dead] = read(embedded_kafka, DEAD)
    assert (dead.value, dead.key) == (None, b"k")
    assert (server.counts()["done"], server.counts()["dead"]) == (1, 1)


# --- values of every size and kind -----------------------------------------------------------------------------------


@MODES
@pytest.mark.logs_errors
def test_a_value_of_ten_megabytes(embedded_kafka: Any, seen: list[Any], mode: str) -> None:
    """Paced, since the embedded broker keeps 5 MB of older records."""
    topics(embedded_kafka, "t")
    large = event("GOOD", number=5, text="x" * 10_000_000)
    bad = b'{"event_name":"GOOD","number":"' + b"y" * 10_000_000 + b'"}'
    server = reading_server(embedded_kafka, "t", until_end=False)
    with live(server, mode), Feeder(embedded_kafka) as feeder:
        for count, value in enumerate((GOOD_1, large, GOOD_2, bad, GOOD_1), 1):
            feeder.send("t", value)
            wait_until(lambda: sum(server.counts().values()) == 2 * count, "the record")  # noqa: B023
    assert [number for _, number in seen] == [1, 5, 2, 1]
    assert values(embedded_kafka, DEAD) == [bad]


@MODES
def test_json_and_messagepack_are_mixed_on_one_topic(embedded_kafka: Any, handler_registry: Any, mode: str) -> None:
    class Order(Event):
        event_name = "ORDER"
        number: int

    class Parcel(Event):
        event_name = "PARCEL"
        number: int

    got: list[Any] = []
    event_handler("ORDER")(got.append)
    event_handler("PARCEL")(got.append)
    sent = [(Order if number % 3 else Parcel)(number=number) for number in range(100)]
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *(entry.serialize("json" if entry.number % 2 else "msgpack") for entry in sent))
    run(reading_server(embedded_kafka, "t"), mode)
    assert got == sent


@MODES
def test_events_without_a_class_are_generic(embedded_kafka: Any, handler_registry: Any, mode: str) -> None:
    got: list[Any] = []
    event_handler("PLAIN")(got.append)
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", event("PLAIN", number=1, uuid="u"), packed("PLAIN", number=2, nested={"a": [1]}))
    run(reading_server(embedded_kafka, "t"), mode)
    first, second = got
    assert (first.event_name, first.uuid, first.number) == ("PLAIN", "u", 1)
    assert (second.number, second.fields["nested"]) == (2, {"a": [1]})


@MODES
def test_an_all_events_server_gets_every_event(embedded_kafka: Any, seen: list[Any], mode: str) -> None:
    got: list[Any] = []
    topics(embedded_kafka, "keven_events", "keven_events_good", "keven_events_nobody")
    send(embedded_kafka, "keven_events", event("KNOWN", number=1), event("NOBODY", extra=2))
    send(embedded_kafka, "keven_events_good", GOOD_1)
    send(embedded_kafka, "keven_events_nobody", event("NOBODY", extra=3))
    consumer = reading_server(embedded_kafka, ["keven_events", "^keven_events_.*"], [])
    server = AllEventsReceiverServer(consumer, lambda event: got.append((type(event).__name__, event.event_name)))
    if mode == "sync":
        server.start_sync()
    else:
        asyncio.run(server.start())
    assert sorted(got) == [
        ("GenericEvent", "NOBODY"),
        ("GenericEvent", "NOBODY"),
        ("Good", "GOOD"),
        ("Known", "KNOWN"),
    ]
    assert seen == []


class Reading(msgspec.Struct):
    sensor: str
    degrees: float


@MODES
@pytest.mark.logs_errors
@pytest.mark.parametrize("codec", [None, "json", "msgpack"])
def test_typed_foreign_topics(embedded_kafka: Any, handler_registry: Any, mode: str, codec: str | None) -> None:
    got: list[Any] = []
    event_handler(topic="sensors", value_type=Reading, codec=codec)(got.append)
    topics(embedded_kafka, "sensors")
    reading = {"sensor": "roof", "degrees": 3.5}
    sent = [msgspec.json.encode(reading), msgspec.msgpack.encode(reading), b"bad", None]
    send(embedded_kafka, "sensors", *sent)
    server = reading_server(embedded_kafka, "sensors")
    run(server, mode)
    assert got == [Reading("roof", 3.5)] * (2 if codec is None else 1)
    refused = {None: [b"bad"], "json": [sent[1], b"bad"], "msgpack": [sent[0], b"bad"]}[codec]
    assert values(embedded_kafka, DEAD) == refused
    assert server.counts()["tombstones"] == 1


@MODES
def test_raw_foreign_topics_get_the_bytes_as_they_are(embedded_kafka: Any, handler_registry: Any, mode: str) -> None:
    got: list[Any] = []

    class Raw(EventHandler):
        topic = "raw"

        def handle_event(self, value: bytes) -> None:
            got.append((value, type(value)))

    sent = [b"", b"\0\xff", event("GOOD"), b"[" * 10_000, b"x" * 100_000]
    topics(embedded_kafka, "raw")
    send(embedded_kafka, "raw", *sent)
    run(reading_server(embedded_kafka, "raw"), mode)
    assert got == [(value, bytes) for value in sent]


@MODES
def test_key_headers_and_timestamp_are_readable_in_the_handler(
    embedded_kafka: Any, handler_registry: Any, mode: str
) -> None:
    got: list[Any] = []

    @event_handler("A")
    def handle(event: Any) -> None:
        got.append(current_record())

    headers: Headers = [("trace", b"1"), ("empty", b""), ("none", None), ("trace", b"2"), ("\u00e4", b"\xff")]
    topics(embedded_kafka, "t", partitions=2)
    send(embedded_kafka, "t", event("A"), partition=1)
    send(embedded_kafka, "t", Message(event("A"), b"\0key", headers, 1_234_567_890_123), partition=1)
    run(reading_server(embedded_kafka, "t"), mode)
    plain, full = got
    assert (plain.key, plain.headers, plain.timestamp_type) == (None, [], 1)
    assert (full.topic, full.partition, full.offset) == ("t", 1, 1)
    assert (full.key, full.value, full.timestamp_ms) == (b"\0key", event("A"), 1_234_567_890_123)
    size_bytes = len(b"\0key" + event("A")) + len(b"trace1emptynonetrace2\xc3\xa4\xff")
    assert plain.size_bytes == len(event("A"))
    # Before and after its headers are unpacked.
    for _ in range(2):
        assert full.size_bytes == size_bytes
        assert (full.header("trace"), full.header("none", b"x"), full.header("missing", b"x")) == (b"2", None, b"x")
        assert (full.header("\u00e4"), full.header("empty"), full.header(""), full.header("\ud800")) == (
            b"\xff",
            b"",
            None,
            None,
        )
        assert full.headers == headers
        assert full.headers is full.headers


# --- handlers --------------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.logs_errors
@pytest.mark.parametrize("kind", ["sync", "async", "mixed"])
def test_several_handlers_run_in_order_also_when_one_raises(
    embedded_kafka: Any, handler_registry: Any, mode: str, kind: str
) -> None:
    steps: list[Any] = []

    def make(name: str, is_async: bool) -> Any:
        def handle(event: Any) -> None:
            steps.append((event.number, name))
            if name == "second" and event.number == 1:
                raise LookupError("second failed")

        async def handle_async(event: Any) -> None:
            await asyncio.sleep(0)
            handle(event)

        return handle_async if is_async else handle

    for index, name in enumerate(("first", "second", "third")):
        event_handler("A")(make(name, kind == "async" or (kind == "mixed" and index == 1)))
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *(event("A", number=number) for number in range(3)))
    server = reading_server(embedded_kafka, "t")
    run(server, mode)
    assert steps == [(number, name) for number in range(3) for name in ("first", "second", "third")]
    [dead] = read(embedded_kafka, DEAD)
    assert dead.value == event("A", number=1)
    assert dead.header("kafka_dlt-exception-fqcn") == b"builtins.LookupError"
    assert dead.header("kafka_dlt-exception-message") == b"second failed"
    assert (server.counts()["done"], server.counts()["dead"]) == (2, 1)


@MODES
@pytest.mark.logs_errors
@pytest.mark.parametrize(
    ("others", "kind"),
    [
        (others, kind)
        for others in ("alone", "with another", "with an async one")
        for kind in ("coroutine", "generator", "async generator")
        # A composed call that is async awaits what its parts return.
        if (others, kind) != ("with an async one", "coroutine")
    ],
)
def test_a_sync_handler_that_returns_work_undone_has_failed(
    embedded_kafka: Any, handler_registry: Any, mode: str, kind: str, others: str
) -> None:
    def never() -> None:
        pytest.fail("must not run")

    async def coroutine(event: Any) -> None:
        never()

    def generator(event: Any) -> Any:
        never()
        yield

    async def async_generator(event: Any) -> Any:
        never()
        yield

    @event_handler("A")
    def handle(event: Any) -> Any:
        return {"coroutine": coroutine, "generator": generator, "async generator": async_generator}[kind](event)

    after: list[Any] = []
    if others == "with another":
        event_handler("A")(after.append)
    if others == "with an async one":

        @event_handler("A")
        async def other(event: Any) -> None:
            after.append(event)

    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", event("A"), event("B"))
    server = reading_server(embedded_kafka, "t")
    run(server, mode)
    [dead] = read(embedded_kafka, DEAD)
    assert dead.header("kafka_dlt-exception-fqcn") == b"keven_core.kafka.errors.UsageError"
    advice = b"async def" if kind == "coroutine" else b"yield"
    assert advice in (dead.header("kafka_dlt-exception-message") or b"")
    assert len(after) == (0 if others == "alone" else 1)


@MODES
@pytest.mark.logs_errors
def test_hooks_run_around_the_handlers_and_a_failing_one_fails_the_record(
    embedded_kafka: Any, handler_registry: Any, mode: str
) -> None:
    steps: list[Any] = []

    class Handler(EventHandler):
        event_name = "A"

        def handle_event(self, event: Any) -> None:
            steps.append("handler")
            if event.fail == "handler":
                raise ValueError("handler")

    def before(event: Any) -> None:
        steps.append("before")
        if event.fail == "before":
            raise ValueError("before")

    def after() -> None:
        steps.append("after")

    def after_failing(event: Any) -> None:
        if event.fail == "after":
            raise ValueError("after")

    Handler.register_pre_handler_hook(before)
    Handler.register_post_handler_hook(after_failing)
    Handler.register_post_handler_hook(after)
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *(event("A", fail=fail) for fail in ("", "before", "handler", "after")))
    run(reading_server(embedded_kafka, "t"), mode)
    assert steps == ["before", "handler", "after", "before", "after", *["before", "handler", "after"] * 2]
    dead = read(embedded_kafka, DEAD)
    assert [entry.header("kafka_dlt-exception-message") for entry in dead] == [b"before", b"handler", b"after"]


@pytest.mark.logs_errors
def test_a_dead_letter_that_fails_again_keeps_its_first_origin(embedded_kafka: Any, handler_registry: Any) -> None:
    topics(embedded_kafka, "t")
    embedded_kafka.create_topic("kafka_server.second.dead")
    send(embedded_kafka, "t", b"filler", Message(b"x", b"k", [("own", b"1")], 1_234_567_890_123))

    def failing(message: bytes) -> None:
        if message == b"x":
            try:
                raise KeyError("cause")
            except KeyError as error:
                raise LookupError("again" if current_record().topic == DEAD else "first") from error

    run(reading_server(embedded_kafka, "t", failing), "sync")
    run(reading_server(embedded_kafka, DEAD, failing, client_id="second"), "sync")
    [copy] = read(embedded_kafka, "kafka_server.second.dead")
    assert (copy.value, copy.key, copy.timestamp) == (b"x", b"k", (1, 1_234_567_890_123))
    names = [name for name, _ in copy.headers]
    assert len(names) == len(set(names))
    assert copy.header("kafka_dlt-original-topic") == b"t"
    assert copy.header("kafka_dlt-original-offset") == struct.pack(">q", 1)
    assert copy.header("kafka_dlt-exception-message") == b"again"
    assert copy.header("kafka_dlt-exception-cause-fqcn") == b"builtins.KeyError"


@MODES
def test_what_is_skipped_is_not_decoded(embedded_kafka: Any, seen: list[Any], mode: str) -> None:
    """Broken bodies and bodies beyond every limit are nobody's business where the event is nobody's."""
    topics(embedded_kafka, "t")
    send(
        embedded_kafka,
        "t",
        b'{"event_name":"NOBODY",' + b"\xff" * 1000,
        b'{"event_name":"NOBODY",' + b"[" * 100_000,
        event("NOBODY", text="x" * 100_000),
        GOOD_1,
    )
    server = reading_server(embedded_kafka, "t", settings=quick(embedded_kafka, max_payload_bytes=60_000))
    run(server, mode)
    assert seen == [(0, 1)]
    assert server.counts()["skipped"] == 3


@MODES
@pytest.mark.logs_errors
def test_every_record_of_a_long_mixed_run_is_accounted_for(embedded_kafka: Any, seen: list[Any], mode: str) -> None:
    topics(embedded_kafka, "t", partitions=4)
    kinds = [GOOD_1, event("NOBODY"), None, b"bad", event("OTHER"), packed("GOOD", number=3)]
    with Feeder(embedded_kafka) as feeder:
        for number in range(3000):
            feeder.send("t", kinds[number % len(kinds)], partition=number % 4)
        feeder.wait()
    server = reading_server(embedded_kafka, "t", settings=quick(embedded_kafka, batch_size=37))
    run(server, mode)
    assert server.counts() == {
        "received": 3000,
        "done": 1500,
        "skipped": 500,
        "tombstones": 500,
        "dead": 500,
        "retried": 0,
        "stale": 0,
        "in_flight": 0,
    }
    assert len(seen) == 1500
    assert values(embedded_kafka, DEAD) == [b"bad"] * 500
