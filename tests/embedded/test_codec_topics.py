"""Topics that old and new services share: JSON, MessagePack and a service's protobuf side by side, end to end."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from embedded_support import (
    DEAD,
    MODES,
    Message,
    group_server,
    live,
    quick,
    read,
    reading_server,
    run,
    send,
    topics,
    wait_until,
)
from envelopes import CREATED_TYPES, envelope_class

from keven_core.kafka import (
    Event,
    EventPublisher,
    KafkaBatchLogger,
    KafkaLogger,
    ProtobufEnvelopeCodec,
    current_record,
    event_handler,
    register_codec,
)
from keven_core.kafka.errors import UsageError
from keven_core.kafka.redrive import Redrive
from keven_core.kafka.topics import retry_topic

TOPIC = "keven_events_order_placed"
SHARED = "keven_events"
WAITING = retry_topic("svc")
Envelope = envelope_class()

# The plain loop, records in flight in tasks or threads, and lists.
HOW = pytest.mark.parametrize(
    "how", [{}, {"order": "key", "max_in_flight": 8}, {"batch_size": 7}], ids=["plain", "in-flight", "batches"]
)


@pytest.fixture(autouse=True)
def cluster(embedded_kafka: Any, handler_registry: Any) -> Any:
    topics(embedded_kafka, TOPIC, SHARED, WAITING)
    register_codec(ProtobufEnvelopeCodec(Envelope))
    return embedded_kafka


@pytest.fixture
def placed() -> Any:
    class OrderPlaced(Event):
        event_name = "ORDER_PLACED"
        key_field = "order_id"
        order_id: int
        customer: str = ""

    return OrderPlaced


def old_value(number: int, **fields: Any) -> bytes:
    """As an old producer writes it."""
    envelope = Envelope(
        **{
            "name": "ORDER_PLACED",
            "namespace": "eu",
            "originator": "old",
            "uuid": f"u-{number}",
            "payload": b'{"order_id": %d, "customer": "Ada"}' % number,
            **fields,
        }
    )
    envelope.created.FromMilliseconds(1_700_000_000_000 + number)
    value: bytes = envelope.SerializeToString()
    return value


def mixed(cls: Any, count: int) -> list[Message]:
    """Values of `count` orders, in the three formats by turns, every other one with a header."""
    found = []
    for number in range(count):
        new = cls(order_id=number, customer="Ada", uuid=f"u-{number}", namespace="eu")
        value, content_type = [
            (old_value(number), b"application/x-protobuf"),
            (new.serialize("json"), b"application/json"),
            (new.serialize("msgpack"), b"application/msgpack"),
        ][number % 3]
        headers: Any = [("content-type", content_type)] if number % 2 else []
        found.append(Message(value, b"%d" % (number % 4), headers))
    return found


@HOW
@MODES
@pytest.mark.parametrize("topic", [TOPIC, SHARED])
def test_old_producers_and_new_consumers(cluster: Any, placed: Any, mode: str, how: dict[str, Any], topic: str) -> None:
    got: list[Any] = []
    options = dict(how)
    batch_size = options.pop("batch_size", 0)
    if batch_size:
        event_handler("ORDER_PLACED", batch_size=batch_size, batch_wait_ms=20)(got.extend)
    else:
        event_handler("ORDER_PLACED")(got.append)
    send(cluster, topic, *mixed(placed, 60), old_value(0, name="NOBODYS"))
    server = reading_server(cluster, topic, **options)
    run(server, mode)
    assert sorted(event.order_id for event in got) == list(range(60))
    if not options:
        assert [event.order_id for event in got] == list(range(60))
    assert all(type(event) is placed for event in got)
    assert {(event.uuid, event.namespace, event.customer) for event in got} == {
        (f"u-{number}", "eu", "Ada") for number in range(60)
    }
    old = [event for event in got if event.originator == "old"]
    assert {event.created.timestamp() for event in old} == {1_700_000_000 + n / 1000 for n in range(0, 60, 3)}
    assert server.totals() == {"received": 61, "done": 60, "skipped": 1}


@pytest.mark.parametrize("created", CREATED_TYPES)
@pytest.mark.parametrize("logger", [KafkaLogger, KafkaBatchLogger])
def test_new_producers_and_old_consumers(cluster: Any, placed: Any, logger: Any, created: str) -> None:
    old_class = envelope_class(created)
    register_codec(ProtobufEnvelopeCodec(old_class))
    with logger(settings=quick(cluster, codec="protobuf")) as log:
        orders = [placed(order_id=number, customer="Zoë", namespace="eu") for number in range(3)]
        for order in orders:
            EventPublisher(log).log_event(order)
        log.log({"no": "event"}, SHARED)  # what is no event has no envelope
    stored = read(cluster, TOPIC)
    assert [entry.key for entry in stored] == [b"0", b"1", b"2"]
    for order, entry in zip(orders, stored, strict=True):
        old = old_class.FromString(entry.value)
        assert (old.name, old.namespace, old.uuid) == ("ORDER_PLACED", "eu", order.uuid)
        assert msgspec.json.decode(old.payload) == {"order_id": order.order_id, "customer": "Zoë"}
        if created == "string":
            assert old.created == order.created.isoformat()
        else:
            seconds = old.created if created == "double" else old.created.ToMicroseconds() / 1e6
            assert seconds == pytest.approx(order.created.timestamp(), abs=1e-5)
    assert [entry.value for entry in read(cluster, SHARED)] == [b'{"no":"event"}']
    got: list[Any] = []
    event_handler("ORDER_PLACED")(got.append)
    run(reading_server(cluster, TOPIC), "sync")
    assert [event.order_id for event in got] == [0, 1, 2]
    if created != "double":
        assert got == orders


def test_an_event_that_the_class_cant_hold_is_refused_at_log(cluster: Any, placed: Any) -> None:
    with KafkaBatchLogger(settings=quick(cluster, codec="protobuf")) as log:
        with pytest.raises(UsageError, match=r"the codec 'protobuf' can't encode .*OrderPlaced: TypeError"):
            log.log(placed(order_id=1, namespace=5))
        assert log.flush() == 0


BROKEN = {
    "no protobuf": b"\x0a\xff\xff\xff",
    "truncated": old_value(1)[:-1],
    "payload": old_value(1, payload=b"no JSON"),
    "nameless": old_value(1, name=""),
    "wrong type": old_value(1, payload=b'{"order_id":"one"}'),
    "json": b'{"event_name":"ORDER_PLACED","order_id":',
    "msgpack": msgspec.msgpack.encode({"event_name": "ORDER_PLACED", "order_id": 1})[:-1],
    "empty": b"",
    "text": b"hello",
}


@pytest.mark.logs_errors
@HOW
@MODES
def test_what_cant_be_decoded_is_dead_lettered_as_it_is(
    cluster: Any, placed: Any, mode: str, how: dict[str, Any]
) -> None:
    got: list[Any] = []
    options = dict(how)
    batch_size = options.pop("batch_size", 0)
    if batch_size:
        event_handler("ORDER_PLACED", batch_size=batch_size, batch_wait_ms=20)(got.extend)
    else:
        event_handler("ORDER_PLACED")(got.append)
    for number, value in enumerate(BROKEN.values()):
        send(cluster, SHARED, Message(value, headers=[("unit", b"mm")]), old_value(number))
    server = reading_server(cluster, SHARED, use_group=True, **options)
    run(server, mode)
    assert sorted(event.order_id for event in got) == list(range(len(BROKEN)))
    assert server.totals() == {"received": 2 * len(BROKEN), "done": len(BROKEN), "dead": len(BROKEN)}
    letters = {entry.value: entry for entry in read(cluster, DEAD)}
    assert set(letters) == set(BROKEN.values())
    for kind, begins in {
        "no protobuf": b"protobuf: DecodeError: ",
        "truncated": b"protobuf: DecodeError: ",
        "payload": b"ORDER_PLACED: the payload has to be the JSON object of its fields",
        "nameless": b"protobuf: the value has no event_name, and its topic is not bound to one",
        "wrong type": b"protobuf: ORDER_PLACED: ValidationError: Expected `int`, got `str`",
        "json": b"ORDER_PLACED: DecodeError: ",
        "msgpack": b"ORDER_PLACED: DecodeError: ",
        "empty": b"the value is empty",
        "text": b"protobuf: DecodeError: ",
    }.items():
        letter = letters[BROKEN[kind]]
        assert letter.header("kafka_dlt-exception-fqcn") == b"keven_core.kafka.errors.UndecodableError", kind
        assert (letter.header("kafka_dlt-exception-message") or b"").startswith(begins), kind
        assert letter.header("unit") == b"mm"


class Raising:
    """A codec with a bug."""

    name = "raising"
    content_type = "application/x-raising"

    def decode(self, value: bytes) -> Any:
        raise RuntimeError("a bug")

    def encode(self, name: str, fields: dict[str, Any], payload: bytes) -> bytes:
        raise RuntimeError("a bug")


@pytest.mark.logs_errors
@MODES
@HOW
def test_a_codec_that_raises_ends_no_server(cluster: Any, placed: Any, mode: str, how: dict[str, Any]) -> None:
    register_codec(Raising(), SHARED)
    got: list[Any] = []
    options = {key: value for key, value in how.items() if key != "batch_size"}
    event_handler("ORDER_PLACED")(got.append)
    send(cluster, SHARED, b"x", placed(order_id=1).serialize(), b"y", placed(order_id=2).serialize("msgpack"))
    server = reading_server(cluster, SHARED, use_group=True, **options)
    run(server, mode)
    assert sorted(event.order_id for event in got) == [1, 2]
    assert server.totals() == {"received": 4, "done": 2, "dead": 2}
    assert {entry.header("kafka_dlt-exception-message") for entry in read(cluster, DEAD)} == {
        b"raising: RuntimeError: a bug"
    }
    with KafkaLogger(settings=quick(cluster, codec="raising")) as log, pytest.raises(UsageError, match="a bug"):
        log.log(placed(order_id=3))


@pytest.mark.logs_errors
@MODES
def test_retries_and_redrives_keep_the_format(cluster: Any, placed: Any, mode: str) -> None:
    attempts: list[tuple[int, int]] = []
    healthy = False

    @event_handler("ORDER_PLACED")
    def handle(event: Any) -> None:
        attempts.append((event.order_id, current_record().attempt))
        if not healthy and (event.order_id == 2 or current_record().attempt == 1):
            raise ValueError(event.order_id)

    told = [("content-type", b"application/x-protobuf")]
    sent = [Message(old_value(1)), Message(old_value(2), headers=list(told))]
    send(cluster, SHARED, *sent)
    options: dict[str, Any] = {
        "auto_reprocess_errors": True,
        "retry_interval": 0.05,
        "max_retries": 1,
        "session_timeout": 1.5,
        "heartbeat_interval": 0.1,
        "settings": quick(cluster, commit_interval_ms=30),
    }
    server = group_server(cluster, SHARED, **options)
    with live(server, mode):
        wait_until(lambda: read(cluster, DEAD), "one is dead-lettered")
    assert sorted(attempts) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    [letter] = read(cluster, DEAD)
    assert letter.value == sent[1].value
    assert letter.header("content-type") == told[0][1]
    healthy = True
    attempts.clear()
    report = Redrive(DEAD, event_names="OTHER").run(settings=quick(cluster))
    assert (report.read, report.matched) == (1, 0)
    report = Redrive(DEAD, event_names="ORDER_PLACED", from_beginning=True).run(settings=quick(cluster))
    assert (report.read, report.redriven) == (1, 1)
    assert read(cluster, SHARED)[-1].value == sent[1].value
    run(reading_server(cluster, SHARED), mode)
    assert [number for number, _ in attempts] == [1, 2, 2]


SERVICE = """
import sys

sys.path.insert(0, {support!r})
from envelopes import envelope_class

from keven_core.kafka import Event, ProtobufEnvelopeCodec, event_handler, register_codec
from keven_core.kafka.events.server import start_events_receiver_process

register_codec(ProtobufEnvelopeCodec(envelope_class()))


class OrderPlaced(Event):
    event_name = "ORDER_PLACED"
    order_id: int
    customer: str = ""


@event_handler("ORDER_PLACED")
def handle(event):
    print(event.order_id, event.originator, flush=True)


process = start_events_receiver_process(server_name="svc", until_end=True, topics=["keven_events"], {options})
process.join()
sys.exit(process.exitcode)
"""


@pytest.mark.parametrize("options", ["", "supervised=True"])
def test_launchers_need_nothing_but_the_registration(cluster: Any, tmp_path: Path, options: str) -> None:
    send(cluster, SHARED, old_value(1), old_value(2))
    support = str(Path(__file__).parents[1] / "support")
    script = tmp_path / "service.py"
    script.write_text(SERVICE.format(support=support, options=options))
    environment = {
        **os.environ,
        "KAFKA": cluster.bootstrap_servers,
        "KEVEN_CREATE_TOPICS": "false",
        "KEVEN_CODEC": "protobuf",
    }
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["1 old", "2 old"]), done.stderr
    # The command line needs to know the codec for filters by name only.
    letter = Message(old_value(3, payload=b"?"), headers=[("kafka_dlt-original-topic", SHARED.encode())])
    send(cluster, DEAD, letter)
    (tmp_path / "shop_codecs.py").write_text(
        f"import sys\nsys.path.insert(0, {support!r})\nfrom envelopes import envelope_class\n"
        "from keven_core.kafka import ProtobufEnvelopeCodec, register_codec\n"
        "register_codec(ProtobufEnvelopeCodec(envelope_class()))\n"
    )
    for more, matched in [([], '"matched": 0'), (["--import", "shop_codecs"], '"matched": 1')]:
        command = [sys.executable, "-m", "keven_core.kafka.redrive", DEAD, "--json", "--dry-run"]
        shown = subprocess.run(
            [*command, "--event", "ORDER_PLACED", *more],
            env={**environment, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert matched in shown.stdout, shown.stdout + shown.stderr
