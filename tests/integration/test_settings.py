"""Settings whose effect only a real broker shows."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from real_services import (
    Load,
    Services,
    Worker,
    assert_delivered,
    committed,
    load_value,
    read_topic,
    send,
    wait_until_all_handled,
)

from keven_core.kafka import Event
from keven_core.kafka._producers import close_producers
from keven_core.kafka.config import Settings
from keven_core.kafka.errors import MessageTooLargeError
from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger
from keven_core.testing.real_kafka import RealKafka

pytestmark = pytest.mark.real_kafka

MIB = 1 << 20


def test_commit_interval(kafka: Any, services: Services, topic: str) -> None:
    send(kafka.bootstrap_servers, topic, [load_value(number) for number in range(100)], partition=0)
    often = services.worker("often", group=f"{topic}-often", env={"KEVEN_COMMIT_INTERVAL_MS": "100"})
    seldom = services.worker("seldom", group=f"{topic}-seldom", env={"KEVEN_COMMIT_INTERVAL_MS": "600000"})
    often.wait_for_count(100)
    seldom.wait_for_count(100)
    often.wait_for(
        lambda: committed(kafka.bootstrap_servers, f"{topic}-often") == {0: 100}, "what was handled is committed"
    )
    assert committed(kafka.bootstrap_servers, f"{topic}-seldom") == {}
    seldom.stop()
    assert committed(kafka.bootstrap_servers, f"{topic}-seldom") == {0: 100}


def test_auto_offset_reset_earliest(kafka: Any, services: Services, topic: str) -> None:
    send(kafka.bootstrap_servers, topic, [load_value(number) for number in range(10)], partition=0)
    worker = services.worker("worker", env={"KEVEN_AUTO_OFFSET_RESET": "earliest"})
    worker.wait_for_count(10)
    worker.stop()


def test_auto_offset_reset_latest(kafka: Any, services: Services, topic: str) -> None:
    send(kafka.bootstrap_servers, topic, [load_value(number) for number in range(10)], partition=0)
    worker = services.worker("worker", env={"KEVEN_AUTO_OFFSET_RESET": "latest"})
    with Load(kafka.bootstrap_servers, topic, 1, rate=100) as load:
        worker.wait_for_count(20)
        load.stop()
    first = worker.handled[0].offset
    assert first >= 10
    worker.wait_for_count(10 + load.sent - first)
    worker.stop()
    assert [entry.offset for entry in worker.handled] == list(range(first, 10 + load.sent))


def test_auto_offset_reset_error(kafka: Any, services: Services, make_topic: Callable[..., str]) -> None:
    topic = make_topic(1)
    send(kafka.bootstrap_servers, topic, [load_value(1)])
    worker = services.worker("worker", topic, env={"KEVEN_AUTO_OFFSET_RESET": "error"})
    assert worker.wait() == 1, worker.tail()
    last = worker.err.strip().splitlines()[-1]
    assert last.startswith("keven_core.kafka.errors.OffsetOutOfRangeError: "), worker.tail()
    assert topic in last
    assert worker.count == 0
    # With a committed offset there is nothing to reset.
    first = services.worker("first", topic)
    first.wait_for_count(1)
    first.stop()
    send(kafka.bootstrap_servers, topic, [load_value(2)])
    again = services.worker("again", topic, env={"KEVEN_AUTO_OFFSET_RESET": "error"})
    again.wait_for_count(1)
    again.stop()
    assert again.handled[0].number == 2


@pytest.mark.parametrize("size", [7, 15])
def test_batch_size(kafka: Any, services: Services, make_topic: Callable[..., str], size: int) -> None:
    """Offsets are stored once per batch (that takes less than a slice), so commits come in steps of the batch size."""
    name = make_topic(1)
    send(kafka.bootstrap_servers, name, [load_value(number) for number in range(600)])
    env = {"KEVEN_BATCH_SIZE": str(size), "KEVEN_COMMIT_INTERVAL_MS": "10"}
    worker = services.worker("worker", name, group=name, env=env, work_s=0.005)
    seen: set[int] = set()

    def look() -> bool:
        seen.update(committed(kafka.bootstrap_servers, name).values())
        return len(seen - {600}) >= 3

    worker.wait_for(look, "some batches are committed")
    worker.stop()
    seen.update(committed(kafka.bootstrap_servers, name).values())
    assert {offset % size for offset in seen - {600}} == {0}, seen


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_batch_timeout(kafka: Any, services: Services, make_topic: Callable[..., str], asynchronous: bool) -> None:
    """A record waits for its batch to fill, and the records that come meanwhile are handled with it."""
    name = make_topic(1)
    workers = {
        wait_ms: services.worker(
            f"worker-{wait_ms}", name, group=f"{name}-{wait_ms}", env={"KEVEN_BATCH_TIMEOUT_MS": str(wait_ms)},
            asynchronous=asynchronous,
        )
        for wait_ms in (0, 1500)
    }  # fmt: skip
    send(kafka.bootstrap_servers, name, [load_value(0)])
    for worker in workers.values():
        worker.wait_for_count(1)
    sent_ns = time.monotonic_ns()
    send(kafka.bootstrap_servers, name, [load_value(1)])
    workers[0].wait_for_count(2)
    send(kafka.bootstrap_servers, name, [load_value(2)])
    for worker in workers.values():
        worker.wait_for_count(3)
        worker.stop()
    waited = {wait_ms: [(e.at_ns - sent_ns) / 1e9 for e in workers[wait_ms].handled[1:]] for wait_ms in workers}
    assert waited[0][0] < 1.4
    assert waited[1500][0] > 1.4
    assert waited[1500][1] - waited[1500][0] < 0.2  # in one batch


def test_prefetch_bytes(own_kafka: RealKafka, own_services: Services, own_make_topic: Callable[..., str]) -> None:
    """While a handler is busy no more is fetched than the window takes; seen from outside, at the proxy."""
    name = own_make_topic(1)
    filler = b'{"event_name":"LOAD","id":%d,"text":"' + b"x" * 100_000 + b'"}'
    send(own_kafka.direct_bootstrap_servers, name, [filler % number for number in range(400)])  # 40 MB
    proxy = own_kafka.proxies[0]
    fetched = {}
    for window in (MIB, 24 * MIB):
        before = proxy.bytes_down
        worker = own_services.worker(
            f"worker-{window}", name, group=f"{name}-{window}", work_s=600, env={"KEVEN_PREFETCH_BYTES": str(window)}
        )
        worker.wait_for(lambda before=before: proxy.bytes_down - before > MIB, "it fetches")
        fetched[window] = until_quiet(worker, lambda: proxy.bytes_down) - before
        worker.kill()
    assert fetched[MIB] < 8 * MIB, fetched
    assert 20 * MIB < fetched[24 * MIB] < 38 * MIB, fetched


def until_quiet(worker: Worker, count: Callable[[], int], quiet_s: float = 1.5) -> int:
    """The value of a counter that no longer moves, but for heartbeats."""
    last, since = count(), time.monotonic()

    def is_quiet() -> bool:
        nonlocal last, since
        if count() - last > 50_000:
            last, since = count(), time.monotonic()
        return time.monotonic() - since > quiet_s

    worker.wait_for(is_quiet, "it has fetched what it wants")
    return last


@pytest.fixture
def address(kafka: Any) -> Iterator[str]:
    """The session's Kafka, for loggers in this process: their producers end with the test."""
    yield kafka.bootstrap_servers
    close_producers(kafka.bootstrap_servers)


class Sent(Event):
    event_name = "INTEGRATION_SETTINGS_SENT"
    key_field = "number"
    number: int


@pytest.mark.parametrize(("codec", "first"), [("json", b"{"), ("msgpack", b"\x87")])
def test_codec(address: str, make_topic: Callable[..., str], codec: str, first: bytes) -> None:
    name = make_topic(1)
    settings = Settings.from_env({"KAFKA": address, "KEVEN_CODEC": codec})
    KafkaLogger(topic=name, settings=settings).log(Sent(number=1))
    [message] = read_topic(address, name)
    value = message.value()
    assert value is not None
    assert value.startswith(first) or (codec == "msgpack" and value[0] >= 0x80)
    assert message.key() == b"1"


def test_max_message_bytes(address: str, make_topic: Callable[..., str]) -> None:
    name = make_topic(1, {"max.message.bytes": 8 * MIB})
    small = Settings.from_env({"KAFKA": address, "KEVEN_MAX_MESSAGE_BYTES": str(2 * MIB)})
    with pytest.raises(MessageTooLargeError, match="KEVEN_MAX_MESSAGE_BYTES"):
        KafkaLogger(topic=name, settings=small).log(b"x" * 3 * MIB)
    large = Settings.from_env({"KAFKA": address, "KEVEN_MAX_MESSAGE_BYTES": str(4 * MIB)})
    logger = KafkaBatchLogger(topic=name, settings=large)
    logger.log(b"x" * 3 * MIB)
    assert logger.flush() == 1
    assert [len(message.value() or b"") for message in read_topic(address, name)] == [3 * MIB]


LARGE = """
import logging, sys
from keven_core.kafka import Event, event_handler
from keven_core.kafka.events.server import start_events_receiver_server

logging.basicConfig(level=logging.INFO)

class Large(Event):
    event_name = "LARGE"
    id: int
    text: str

@event_handler("LARGE")
def handle(event):
    if event.id == 2:
        raise ValueError("two")
    print("handled", event.id, len(event.text), flush=True)

start_events_receiver_server(server_name=sys.argv[1], topics=[sys.argv[1]], session_timeout=2, heartbeat_interval=0.5)
"""


def test_a_record_of_10_mb_is_handled_and_dead_lettered(
    kafka: Any, services: Services, make_topic: Callable[..., str]
) -> None:
    name, size = make_topic(1, {"max.message.bytes": 16 * MIB}), 10_000_000
    values = [b'{"event_name":"LARGE","id":%d,"text":"%s"}' % (number, b"x" * size) for number in (1, 2, 3)]
    values.append(b'{"event_name":"LARGE","id":4,"text":"' + b"y" * size)  # truncated
    values.append(b'{"event_name":"LARGE","id":5,"text":"small"}')
    send(
        kafka.bootstrap_servers, name, values, key=b"a key", headers=[("trace", b"1")],
        settings={"message.max.bytes": 12_000_000, "enable.idempotence": False, "compression.type": "none"},
    )  # fmt: skip
    service = services.run_script("service", LARGE, name)
    service.wait_for(lambda: "handled 5 5" in service.out, "the records around the bad ones are handled")
    service.stop()
    assert service.out == f"handled 1 {size}\nhandled 3 {size}\nhandled 5 5\n"
    assert committed(kafka.bootstrap_servers, name) == {0: 5}
    letters = read_topic(kafka.bootstrap_servers, f"kafka_server.{name}.dead")
    assert [letter.value() for letter in letters] == [values[1], values[3]]
    for letter, offset in zip(letters, (1, 3), strict=True):
        headers = dict(letter.headers() or ())
        assert letter.key() == b"a key"
        assert headers["trace"] == b"1"
        assert headers["kafka_dlt-original-topic"] == name.encode()
        assert headers["kafka_dlt-original-offset"] == offset.to_bytes(8, "big")
    # The log says what happened, and does not repeat 10 MB.
    assert f"{name} [0] @ 1 (event LARGE)" in service.err
    assert len(service.err) < 20_000


def test_a_value_above_max_payload_bytes_is_dead_lettered(
    kafka: Any, services: Services, make_topic: Callable[..., str]
) -> None:
    name = make_topic(1)
    values = [b'{"event_name":"LARGE","id":1,"text":"%s"}' % (b"x" * 5000), b'{"event_name":"LARGE","id":3,"text":"s"}']
    send(kafka.bootstrap_servers, name, values)
    service = services.run_script("service", LARGE, name, env={"KEVEN_MAX_PAYLOAD_BYTES": "4096"})
    service.wait_for(lambda: "handled 3 1" in service.out, "the next one is handled")
    service.stop()
    assert [letter.value() for letter in read_topic(kafka.bootstrap_servers, f"kafka_server.{name}.dead")] == values[:1]
    assert "KEVEN_MAX_PAYLOAD_BYTES=4096" in service.err


@pytest.mark.parametrize("codec", ["none", "gzip", "snappy", "lz4", "zstd"])
def test_compressed_records(kafka: Any, services: Services, topic: str, codec: str) -> None:
    values = [load_value(number) for number in range(200)]
    send(kafka.bootstrap_servers, topic, values, partition=0, settings={"compression.type": codec})
    worker = services.worker("worker")
    worker.wait_for_count(200)
    worker.stop()
    assert [entry.number for entry in worker.handled] == list(range(200))


def test_static_membership_keeps_the_partitions_over_a_restart(kafka: Any, services: Services, topic: str) -> None:
    """group.instance.id through KEVEN_RDKAFKA_OPTIONS: a restart within the session time moves nothing."""
    with Load(kafka.bootstrap_servers, topic, 4, rate=300) as load:
        others = services.worker("others", rdkafka="group.instance.id=b", session_timeout=20)
        first = services.worker("first", rdkafka="group.instance.id=a", session_timeout=20)
        first.wait_for_more()
        others.wait_for_more()
        assigned = others.err.count("assigned:")
        first.stop()
        again = services.worker("again", rdkafka="group.instance.id=a", session_timeout=20)
        again.wait_for_more()
        others.wait_for_more()
        assert others.err.count("assigned:") == assigned, others.tail()
        load.stop()
    wait_until_all_handled(load, others, first, again)
    others.stop()
    again.stop()
    assert_delivered(load.acknowledged, others, first, again, repeats=0)


def test_honor_env(kafka: Any, services: Services, topic: str) -> None:
    """KAFKA wins over an argument, unless the server is told otherwise."""
    send(kafka.bootstrap_servers, topic, [load_value(1)])
    wins = services.worker("wins", bootstrap_servers="127.0.0.1:1")
    wins.wait_for_count(1)
    wins.stop()
    loses = services.worker(
        "loses", group=f"{topic}-2", kafka="127.0.0.1:1", bootstrap_servers=kafka.bootstrap_servers, honor_env=False
    )
    loses.wait_for_count(1)
    loses.stop()
