"""The payload of all benchmarks: JSON envelopes of about 250 bytes, the same for every contestant.

A topic holds, in each partition: one BENCH_START, its share of the events, one BENCH_END. The two markers let a handler
of keven_core's own server say when the first and the last message were there, so that the measured handler does nothing
at all. Rivals read the same topics, markers included.
"""

from __future__ import annotations

import datetime
import itertools
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from keven_core.kafka.events.event import Event

PARTITIONS = 4
# Consecutive messages of one partition on the topic: records arrive in runs, as from a real producer.
RUN = 100
# Names on the topic "mixed", which shows what the number of registered events costs.
MIXED_NAMES = [f"MIXED_EVENT_{index}" for index in range(10)]
KINDS = ("json", "spaces", "msgpack", "protobuf", "formats", "mixed", "keyed")
# On the topic "keyed": different keys, so that records of one key are rare among those in flight.
KEYS = 10_000


class OrderPlaced(Event):
    """The event that is measured."""

    event_name = "ORDER_PLACED"
    order_id: int
    customer: str = ""


class BenchStart(Event):
    """The first record of each partition."""

    event_name = "BENCH_START"


class BenchEnd(Event):
    """The last record of each partition."""

    event_name = "BENCH_END"


def make_event_class(name: str) -> Any:
    """An event class like OrderPlaced, of another name."""
    body = {
        "__module__": __name__,
        "__qualname__": name,
        "__annotations__": {"order_id": int, "customer": str},
        "event_name": name,
        "customer": "",
    }
    return type(Event)(name, (Event,), body)


def encoder(kind: str) -> Callable[[Any], bytes]:
    """How a kind of topic writes an event."""
    if kind == "msgpack":
        return msgspec.msgpack.encode
    if kind in ("protobuf", "formats"):
        from benchmarks import _envelope

        _envelope.register()
        codecs = itertools.cycle(["protobuf"] if kind == "protobuf" else ["json", "msgpack", "protobuf"])
        return lambda event: event.serialize(next(codecs))
    if kind == "spaces":
        return lambda event: json.dumps(msgspec.to_builtins(event)).encode()
    return msgspec.json.encode


def values(kind: str, count: int) -> Iterator[tuple[str, bytes]]:
    """(event name, value) of `count` distinct events, the same ones at every call."""
    encode = encoder(kind)
    rng = random.Random(20_240_229)
    classes = [make_event_class(name) for name in MIXED_NAMES] if kind == "mixed" else [OrderPlaced]
    events = [cls(order_id=0, originator="bench-service") for cls in classes]
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    for index in range(count):
        event = events[0] if len(events) == 1 else events[rng.randrange(len(events))]
        digits = f"{rng.getrandbits(128):032x}"
        event.uuid = f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
        event.created = start + datetime.timedelta(microseconds=1001 * index + 1)
        event.order_id = 1_000_000 + index
        event.customer = f"Customer {digits[:3]}"
        yield event.event_name, encode(event)


def key_of(kind: str, index: int) -> bytes | None:
    """The key of the event with this index."""
    return b"customer-%d" % (index % KEYS) if kind == "keyed" else None


def partition_of(index: int) -> int:
    """Where the event with this index goes."""
    return index // RUN % PARTITIONS


def on_topic(kind: str, count: int) -> Iterator[tuple[int, str, bytes, bytes | None]]:
    """Everything on a topic, as (partition, event name, value, key), in the order in which it is produced."""
    encode = encoder(kind)
    for partition in range(PARTITIONS):
        yield partition, BenchStart.event_name, encode(BenchStart()), None
    for index, (name, value) in enumerate(values(kind, count)):
        yield partition_of(index), name, value, key_of(kind, index)
    for partition in range(PARTITIONS):
        yield partition, BenchEnd.event_name, encode(BenchEnd()), None
