"""What the memory tests share: filled topics, consumers at their beginning, whole child processes."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from builds import run_python

from keven_core._native.consumer import Consumer
from keven_core._native.dispatch import DispatchTable, Route
from keven_core._native.producer import DeliveryAccount, Producer
from keven_core.testing import EmbeddedKafka

LARGE = 100_000  # well above the size from which values are shared instead of copied


class Item(msgspec.Struct, tag="ITEM", tag_field="event_name"):
    number: int = 0
    raw: msgspec.Raw = msgspec.Raw(b"")


def value_of(number: int, size: int = 0) -> bytes:
    return b'{"event_name":"ITEM","number":%d,"raw":"%s"}' % (number, b"x" * size)


def table_of(handle: Callable[[Any], Any], **options: Any) -> DispatchTable:
    decode_json, decode_msgpack = msgspec.json.Decoder(Item).decode, msgspec.msgpack.Decoder(Item).decode
    route = Route("ITEM", handle, decode_json=decode_json, decode_msgpack=decode_msgpack, **options)
    return DispatchTable([route], name_json=lambda data: None, name_msgpack=lambda data: None)


@contextmanager
def producer_of(kafka: EmbeddedKafka, **options: str) -> Iterator[tuple[Producer, DeliveryAccount]]:
    settings = {"bootstrap.servers": kafka.bootstrap_servers, "linger.ms": "0"}
    producer = Producer({**settings, **{key.replace("_", "."): value for key, value in options.items()}})
    try:
        yield producer, DeliveryAccount()
    finally:
        producer.close(2000)


def fill(kafka: EmbeddedKafka, topic: str, values: list[bytes | None], **options: Any) -> None:
    kafka.create_topic(topic, 1)
    with producer_of(kafka, message_max_bytes="10000000") as (producer, account):
        for value in values:
            producer.produce(topic, value, account, partition=0, **options)
        assert producer.wait(account, 20)
        assert account.delivered == len(values)


def consumer_of(kafka: EmbeddedKafka, *topics: str, table: DispatchTable | None = None, **options: Any) -> Consumer:
    """A consumer that stands at the beginning of partition 0 of each topic."""
    settings = {
        "bootstrap.servers": kafka.bootstrap_servers,
        "group.id": "memory",
        "enable.auto.commit": "false",
        "fetch.wait.max.ms": "10",
        "fetch.queue.backoff.ms": "1",
        "fetch.message.max.bytes": "10000000",
    }
    consumer = Consumer(settings, table, **options)
    consumer.assign([(topic, 0, 0) for topic in topics], True)
    return consumer


def fetch_some(consumer: Consumer, deadline_s: float = 20) -> int:
    """Fetch until there is a batch; how many messages it has."""
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        count = consumer.fetch(100)
        if count:
            return count
        consumer.serve()
    raise AssertionError("no message came")


def handle_all(consumer: Consumer, wanted: int, deadline_s: float = 20) -> None:
    """Fetch and handle until `wanted` records are accounted for."""
    deadline = time.monotonic() + deadline_s
    while sum(counts["received"] - counts["in_flight"] for counts in consumer.ledger().values()) < wanted:
        assert time.monotonic() < deadline, consumer.ledger()
        if consumer.fetch(100):
            consumer.run()
            consumer.finish_batch()


def run_child(code: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh interpreter, in this folder."""
    return run_python("-c", code, cwd=Path(__file__).parent, timeout_s=timeout_s)
