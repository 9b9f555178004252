"""What it costs to decode values from a copy instead of in place, by size; bears on SHARE_FROM of consumer.pyx.

    python -m benchmarks.payload_threshold [--rounds N] [--mib N] [--json P]

Values of one size fill a topic; the bare consumer reads it both ways in turns. Two shapes: one long text (decoding
makes a string of it) and msgspec.Raw (decoding keeps a view; small ones are copied then, so that a kept view never pins
a fetch response many times its size). Figures are CPU of the owner thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import msgspec

from benchmarks import _report, _topics
from benchmarks._broker import broker
from benchmarks._harness import Contestant, Spread, interleave, run_child
from keven_core.kafka.events.event import Event
from keven_core.kafka.message import decoders_of

_SIZES = [1 << power for power in range(10, 21)]
_TOPIC = "keven-bench-threshold"


class TextBlob(Event):
    event_name = "TEXT_BLOB"
    data: str


class RawBlob(Event):
    event_name = "RAW_BLOB"
    data: msgspec.Raw


def value_of(shape: str, size: int) -> bytes:
    """An envelope of about `size` bytes."""
    if shape == "text":
        return TextBlob(data="x" * max(1, size - 200)).serialize()
    return RawBlob(data=msgspec.Raw(b"[" + b"1234567," * max(1, (size - 210) // 8) + b"1]")).serialize()


def run_one(spec: dict[str, Any]) -> dict[str, Any]:
    """Read the topic once, in a child process; microseconds of the owner thread per message."""
    from benchmarks._keven import bare_options, settings_of
    from keven_core._native.consumer import Consumer
    from keven_core._native.dispatch import DispatchTable, Route

    cls = TextBlob if spec["shape"] == "text" else RawBlob
    decode_json, decode_msgpack = decoders_of(cls)
    table = DispatchTable(
        [
            Route(
                cls.event_name,
                lambda event: None,
                decode_json=decode_json,
                decode_msgpack=decode_msgpack,
                copied=spec["copied"],
            )
        ]
    )
    options = bare_options(spec, settings_of(spec))
    consumer: Any = Consumer(options, table, _fail, store_offsets=False)
    consumer.assign([(spec["topic"], 0, 0)], manual=True)
    got = 0
    while not got:
        got = consumer.fetch(100)
    started = time.thread_time()
    while True:
        consumer.run()
        consumer.finish_batch()
        if got >= spec["messages"]:
            break
        got += consumer.fetch(100)
    cpu_s = time.thread_time() - started
    consumer.close()
    return {"us": cpu_s / got * 1e6}


def _fail(record: Any, stage: str, error: Exception) -> None:
    raise error


def measure(address: str, shape: str, size: int, rounds: int, mib: int) -> dict[str, Spread]:
    """Both ways for one shape and size."""
    topic = f"{_TOPIC}-{shape}-{size}"
    count = max(32, min(20_000, (mib << 20) // size))
    _topics.create(address, topic, partitions=1)
    producer = _topics.fill_producer(address, **{"message.max.bytes": 8 << 20})
    value = value_of(shape, size)
    for _ in range(count):
        _topics.produce(producer, topic, 0, "BLOB", value)
    producer.flush()
    target = "benchmarks.payload_threshold:run_one"
    sides = [
        Contestant("copy", target, "", options={"copied": True}),
        Contestant("in place", target, "", options={"copied": False}),
    ]

    def one(contestant: Contestant, number: int) -> dict[str, Any]:
        spec = {"address": address, "topic": topic, "group": f"{_TOPIC}-{time.time_ns()}", "messages": count}
        return run_child(target, shape=shape, **spec, **contestant.options)

    found = interleave(sides, rounds, one)
    _topics.delete(address, topic)
    return {name: Spread.of(entry["us"] for entry in entries) for name, entries in found.items()}


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.payload_threshold", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--mib", type=int, default=32, help="data per topic (default: %(default)s)")
    parser.add_argument("--sizes", help="comma-separated bytes, instead of 1 KiB to 1 MiB")
    parser.add_argument("--json", help="write the results there")
    options = parser.parse_args(arguments)
    sizes = [int(size) for size in options.sizes.split(",")] if options.sizes else _SIZES
    results: dict[str, Any] = {}
    with broker() as address:
        facts = _report.machine(address)
        _report.print_machine(facts)
        for shape in ("text", "raw"):
            rows = []
            for size in sizes:
                found = measure(address, shape, size, options.rounds, options.mib)
                copy, place = found["copy"], found["in place"]
                results[f"{shape} {size}"] = {"copy": copy.median, "in place": place.median}
                rows.append(
                    (f"{size:,}", _report.plain(copy), _report.plain(place), f"{place.median / copy.median:.2f}")
                )
            _report.print_table(
                f"{shape}: µs per message of the owner thread", ("bytes", "copy", "in place", "in place/copy"), rows
            )
    if options.json:
        _report.write_json(options.json, {"machine": facts, "us_per_message": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
