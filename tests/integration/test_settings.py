"""Settings whose effect only a real broker shows."""

import logging
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from real_services import (
    Load,
    Services,
    Worker,
    admin_of,
    assert_delivered,
    committed,
    load_value,
    read_topic,
    send,
    wait_until,
    wait_until_all_handled,
)

from keven_core.kafka import Event
from keven_core.kafka._producers import close_producers
from keven_core.kafka.config import Settings, _warn_once
from keven_core.kafka.errors import KafkaTimeoutError, MessageTooLargeError, QueueFullError
from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger
from keven_core.testing.proxy import PRODUCE
from keven_core.testing.pytest_plugin import skip_without_kafka
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


# --- loggers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_address(own_kafka: RealKafka, own_make_topic: Callable[..., str]) -> Iterator[str]:
    """The own broker, behind its proxy, for loggers in this process: their producers end before the topics do."""
    yield own_kafka.bootstrap_servers
    close_producers(own_kafka.bootstrap_servers)


def batch_logger(address: str, topic: str, timeout: float = 30, **environ: object) -> KafkaBatchLogger:
    """A logger of its own producer's settings that has sent a first message, so that it is connected."""
    settings = Settings.from_env({"KAFKA": address, **{name: str(value) for name, value in environ.items()}})
    logger = KafkaBatchLogger(topic=topic, settings=settings, timeout=timeout)
    logger.log(b"first")
    assert logger.flush(30) == 1
    return logger


def wait_for_acknowledgement(logger: KafkaBatchLogger) -> None:
    """Unlike flush() this leaves it to the logger when to send."""
    wait_until(lambda: logger.pending_count == 0, "everything is acknowledged")


class Batch(NamedTuple):
    """A record batch: its size in bytes, how it is compressed, who wrote it (-1: no idempotence) and its records."""

    size: int
    codec: str
    producer_id: int
    records: int


# https://kafka.apache.org/documentation/#recordbatch: baseOffset, batchLength (from the next field on),
# partitionLeaderEpoch, magic, crc, attributes, lastOffsetDelta, baseTimestamp, maxTimestamp, producerId, producerEpoch,
# baseSequence, number of records.
BATCH_HEAD = struct.Struct(">qiibIhiqqqhii")
CODECS = ("none", "gzip", "snappy", "lz4", "zstd")  # the lowest three bits of the attributes


def batches_of(kafka: RealKafka, topic: str) -> list[Batch]:
    """What a broker keeps of a topic with one partition, without the message that batch_logger() has sent.

    Brokers keep batches as producers made them, so the first segment's file shows what was sent.
    """
    data = (kafka.folder / "node-1" / "data" / f"{topic}-0" / f"{0:020}.log").read_bytes()
    found, position = [], 0
    while position < len(data):
        _, length, _, magic, _, attributes, _, _, _, producer_id, _, _, records = BATCH_HEAD.unpack_from(data, position)
        assert magic == 2
        found.append(Batch(length + 12, CODECS[attributes & 7], producer_id, records))
        position += length + 12
    assert found[0].records == 1
    return found[1:]


def test_linger_ms(own_kafka: RealKafka, own_address: str, own_make_topic: Callable[..., str]) -> None:
    """Without it a message goes out at once; with it, what comes meanwhile goes out in the same request."""
    proxy = own_kafka.proxies[0]
    requests, took_s = {}, {}
    for linger_ms in (0, 3000):
        logger = batch_logger(own_address, own_make_topic(1), KEVEN_LINGER_MS=linger_ms)
        before, started = proxy.requests_seen[PRODUCE], time.monotonic()
        for number in range(1, 11):
            logger.log(b"one of 10")
            due = started + number * 0.1
            wait_until(
                lambda due=due, logger=logger: logger.pending_count == 0 or time.monotonic() > due,  # type: ignore[misc]
                "it is acknowledged, or the next one is due",
            )
        wait_for_acknowledgement(logger)
        took_s[linger_ms] = time.monotonic() - started
        requests[linger_ms] = proxy.requests_seen[PRODUCE] - before
    assert requests[0] > 5, requests
    assert requests[3000] == 1, requests
    assert took_s[0] < 2.5, took_s
    assert took_s[3000] > 2.9, took_s


def test_log_batch_messages(own_kafka: RealKafka, own_address: str, own_make_topic: Callable[..., str]) -> None:
    proxy = own_kafka.proxies[0]
    for environ, expected in (({"KEVEN_LOG_BATCH_MESSAGES": 70}, [70] * 10), ({}, [700])):
        name = own_make_topic(1)
        logger = batch_logger(own_address, name, KEVEN_LINGER_MS=1000, **environ)
        before = proxy.requests_seen[PRODUCE]
        for number in range(700):
            logger.log(b"%d" % number)
        wait_for_acknowledgement(logger)
        assert [batch.records for batch in batches_of(own_kafka, name)] == expected
        assert proxy.requests_seen[PRODUCE] - before == len(expected)


def test_log_batch_bytes(own_kafka: RealKafka, own_address: str, own_make_topic: Callable[..., str]) -> None:
    proxy = own_kafka.proxies[0]
    for environ, fewest, most in (({"KEVEN_LOG_BATCH_BYTES": 20_000}, 11, 13), ({}, 1, 1)):
        name = own_make_topic(1)
        logger = batch_logger(own_address, name, KEVEN_LINGER_MS=1000, KEVEN_COMPRESSION="none", **environ)
        before = proxy.requests_seen[PRODUCE]
        for _ in range(200):
            logger.log(b"x" * 1000)
        wait_for_acknowledgement(logger)
        batches = batches_of(own_kafka, name)
        assert fewest <= len(batches) <= most, batches
        assert proxy.requests_seen[PRODUCE] - before == len(batches)
        assert max(batch.size for batch in batches) <= environ.get("KEVEN_LOG_BATCH_BYTES", 1_000_000)
        # One message may be larger than a batch: it is one by itself.
        logger.log(b"y" * 100_000)
        logger.log(b"z")
        wait_for_acknowledgement(logger)
        rest = batches_of(own_kafka, name)[len(batches) :]
        assert [batch.records for batch in rest] == ([1, 1] if environ else [2])


@pytest.mark.parametrize("codec", [None, *CODECS])
def test_compression(
    own_kafka: RealKafka, own_address: str, own_make_topic: Callable[..., str], codec: str | None
) -> None:
    name = own_make_topic(1)
    logger = batch_logger(own_address, name, **({"KEVEN_COMPRESSION": codec} if codec else {}))
    values = [b"%d " % number + b"compressible " * 40 for number in range(1000)]
    for value in values:
        logger.log(value)
    assert logger.flush() == 1001
    batches = batches_of(own_kafka, name)
    # A batch that would not get smaller is sent as it is: one of a single message, say.
    assert {batch.codec for batch in batches if batch.records > 10} == {codec or "lz4"}
    size, plain = sum(batch.size for batch in batches), sum(map(len, values))
    assert size > plain if codec == "none" else size < plain / 5
    assert [message.value() for message in read_topic(own_kafka.direct_bootstrap_servers, name)[1:]] == values


@pytest.mark.parametrize(
    ("environ", "idempotent"),
    [
        ({}, True),
        ({"KEVEN_IDEMPOTENCE": "true"}, True),
        ({"KEVEN_IDEMPOTENCE": "false"}, False),
        ({"KEVEN_ACKS": "1"}, False),
    ],
    ids=str,
)
def test_idempotence(
    own_kafka: RealKafka,
    own_address: str,
    own_make_topic: Callable[..., str],
    environ: dict[str, object],
    idempotent: bool,
) -> None:
    """When an acknowledgement is lost the request is sent again; then the message must not be there twice."""
    name = own_make_topic(1)
    logger = batch_logger(own_address, name, **environ)
    proxy = own_kafka.proxies[0]
    proxy.cut_on_api(PRODUCE, on="response", times=1)
    logger.log(b"sent twice")
    assert logger.flush() == 2
    assert proxy.requests_hit[PRODUCE] >= 1
    values = [message.value() for message in read_topic(own_kafka.direct_bootstrap_servers, name)]
    assert values == [b"first", b"sent twice"] + ([] if idempotent else [b"sent twice"])
    assert {batch.producer_id >= 0 for batch in batches_of(own_kafka, name)} == {idempotent}


def leader_of(address: str, topic: str) -> int:
    """The leader of partition 0, as soon as the broker that happens to be asked has heard of the topic."""
    admin = admin_of(address)
    leaders: list[int] = []

    def known() -> bool:
        partitions = admin.list_topics(topic, timeout=20).topics[topic].partitions.values()
        leaders.extend(partition.leader for partition in partitions if partition.leader >= 0)
        return bool(leaders)

    wait_until(known, f"{topic} has a leader")
    return leaders[0]


def test_acks(caplog: pytest.LogCaptureFixture) -> None:
    """Of two brokers first the one that follows is paused, then the leader: who waits for them, and who does not."""
    skip_without_kafka(own_broker=True)
    _warn_once.cache_clear()
    caplog.set_level(logging.WARNING, "keven_core.kafka")
    with RealKafka(2, heap="300m") as kafka:
        address = kafka.bootstrap_servers
        kafka.create_topic("acks", replication_factor=2)
        leader = leader_of(address, "acks")
        loggers = {acks: batch_logger(address, "acks", KEVEN_ACKS=acks) for acks in ("all", "1", "0")}
        KafkaLogger(topic="acks", settings=Settings.from_env({"KAFKA": address, "KEVEN_ACKS": "1"})).log(b"single")
        # One for each value, however many loggers there are.
        warnings = [message for message in caplog.messages if "idempotence is off" in message]
        assert [message.partition(":")[0] for message in warnings] == ["KEVEN_ACKS=1", "KEVEN_ACKS=0"]
        count = 1
        for paused, waiting in ((3 - leader, {"all"}), (leader, {"all", "1"})):
            kafka.pause(paused)
            for acks, logger in loggers.items():
                logger.log(f"{acks} {paused}")
            count += 1
            for acks, logger in loggers.items():
                if acks in waiting:
                    with pytest.raises(KafkaTimeoutError):
                        logger.flush(1)
                else:
                    assert logger.flush(1) == count
            kafka.resume(paused)
            for logger in loggers.values():
                assert logger.flush(30) == count
        expected = {b"first", b"single"} | {b"%s %d" % (acks.encode(), node) for acks in loggers for node in (1, 2)}
        wait_until(
            lambda: {message.value() for message in read_topic(address, "acks")} == expected,
            "what nobody has acknowledged is there too",
        )
        close_producers(address)


@pytest.mark.parametrize(
    ("environ", "fits"),
    [({"KEVEN_LOG_QUEUE_MESSAGES": 50}, 50), ({"KEVEN_LOG_QUEUE_BYTES": 10_240}, 10)],
    ids=str,
)
def test_the_bounds_of_the_queue(
    own_kafka: RealKafka, own_address: str, own_make_topic: Callable[..., str], environ: dict[str, object], fits: int
) -> None:
    """While no broker can be reached a logger takes so much, then log() waits for its timeout and says why."""
    name, proxy = own_make_topic(1), own_kafka.proxies[0]
    logger, other = (batch_logger(own_address, name, timeout=1, **environ) for _ in range(2))
    proxy.cut(refuse=True)
    values = [b"%04d" % number + b"x" * 1020 for number in range(fits)]
    for value in values:
        logger.log(value)
    started = time.monotonic()
    with pytest.raises(QueueFullError) as caught:
        logger.log(b"one too many")
    assert 0.9 < time.monotonic() - started < 5
    for part in (f"{fits} messages", f"{fits * 1024} bytes", *environ, name):
        assert part in str(caught.value)
    other.log(b"of another logger")  # they share the producer, and not the bounds
    proxy.restore()
    assert logger.flush(30) == 1 + fits
    assert other.flush(30) == 2
    logger.log(b"there is room again")
    assert logger.flush(30) == 2 + fits
    written = [message.value() for message in read_topic(own_kafka.direct_bootstrap_servers, name)]
    assert written == [b"first", b"first", *values, b"of another logger", b"there is room again"]


def murmur2(data: bytes) -> int:
    """org.apache.kafka.common.utils.Utils.murmur2, as an unsigned number."""
    length, factor = len(data), 0x5BD1E995
    found = 0x9747B28C ^ length
    for position in range(0, length - 3, 4):
        word = int.from_bytes(data[position : position + 4], "little") * factor & 0xFFFFFFFF
        word = (word ^ word >> 24) * factor & 0xFFFFFFFF
        found = found * factor & 0xFFFFFFFF ^ word
    rest = data[length & ~3 :]
    if rest:
        found = (found ^ int.from_bytes(rest, "little")) * factor & 0xFFFFFFFF
    found = (found ^ found >> 13) * factor & 0xFFFFFFFF
    return found ^ found >> 15


@pytest.mark.parametrize(
    ("option", "partition_of"),
    [(None, lambda key: murmur2(key) & 0x7FFFFFFF), ("partitioner=consistent", zlib.crc32)],
    ids=["default", "consistent"],
)
def test_partitioner(
    address: str, make_topic: Callable[..., str], option: str | None, partition_of: Callable[[bytes], int]
) -> None:
    # From Kafka's own UtilsTest.testMurmur2.
    known = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536, b"abc": 479470107}
    assert {key: murmur2(key) for key in known} == {key: value & 0xFFFFFFFF for key, value in known.items()}
    name, partitions = make_topic(7), 7
    logger = batch_logger(address, name, **({"KEVEN_RDKAFKA_OPTIONS": option} if option else {}))
    keys = [b"", *known, "ключ".encode(), bytes(range(128, 256)), b"k" * 1000, *(b"%d" % n for n in range(200))]
    for key in keys:
        logger.log(b"plain", key=key)
        logger.log(b"with headers", key=key, headers={"trace": b"1"})  # goes another way through librdkafka
    assert logger.flush() == 1 + 2 * len(keys)
    messages = [message for message in read_topic(address, name) if message.value() != b"first"]
    found = {(message.key(), message.partition()) for message in messages}
    assert found == {(key, partition_of(key) % partitions) for key in keys}
    assert {partition for _, partition in found} == set(range(partitions))


# --- large and compressed records, members, addresses ----------------------------------------------------------------

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
