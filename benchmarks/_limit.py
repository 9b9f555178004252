"""The limit L: what would be left if everything between librdkafka and the handler cost nothing.

L = 1 / (a + b), per message and CPU second of the owner thread: a, taking messages out of librdkafka and giving them
back in one C loop; b, decoding and handling the same payloads as bytes in memory in one Python loop.

A round measures a and b before and after a run of the real server, in one process, and compares that run with their
means: the speed of a shared machine changes within seconds, so what is compared has to be close together.
"""

from __future__ import annotations

import gc
import time
from typing import Any

from benchmarks import _keven
from benchmarks._events import PARTITIONS, OrderPlaced, values
from benchmarks._meter import Meter
from keven_core.kafka.message import decoders_of


class _Handler:
    def handle_event(self, event: Any) -> None:
        pass


def in_memory(payloads: list[bytes], kind: str) -> float:
    """CPU seconds per message of decode and handler, over distinct payloads."""
    decode = decoders_of(OrderPlaced)[1 if kind == "msgpack" else 0]
    handle = _Handler().handle_event
    started = time.thread_time()
    for data in payloads:
        handle(decode(data))
    return (time.thread_time() - started) / len(payloads)


def drain(spec: dict[str, Any]) -> Meter:
    """Take every message out of librdkafka without looking at it."""
    from keven_core._native.consumer import Consumer

    settings = _keven.settings_of(spec)
    consumer = Consumer(_keven.bare_options(spec, settings), batch_size=settings.batch_size, store_offsets=False)
    consumer.assign([(spec["topic"], partition, 0) for partition in range(PARTITIONS)], manual=True)
    meter = Meter()
    wanted = spec["messages"] + 2 * PARTITIONS
    got = consumer.drain(1, 30_000)
    meter.start()
    got += consumer.drain(wanted - got, 120_000)
    meter.stop()
    consumer.close()
    if got != wanted:
        raise RuntimeError(f"{got} messages drained instead of {wanted}")
    return meter


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """A round: drain, memory, bare consumer, server, memory, drain."""
    messages, kind = spec["messages"], spec.get("kind", "json")
    payloads = [value for _, value in values(kind, messages)]
    # A million bytes objects are no business of the collector in what follows.
    gc.freeze()
    in_memory(payloads[: messages // 20], kind)
    first = drain(spec)
    memory = [in_memory(payloads, kind)]
    raw = _keven.run_raw(spec)
    server = _keven.run_server(spec)
    memory.append(in_memory(payloads, kind))
    last = drain(spec)
    drain_s = (first.cpu_s + last.cpu_s) / 2 / messages
    memory_s = sum(memory) / 2
    limit = 1 / (drain_s + memory_s)
    return {
        **first.result(messages),
        "wall_rate": messages / min(first.wall_s, last.wall_s),
        "cpu_rate": limit,
        "drain_cpu_us": drain_s * 1e6,
        "memory_cpu_us": memory_s * 1e6,
        "server_of_limit": server["cpu_rate"] / limit,
        "raw_of_limit": raw["cpu_rate"] / limit,
        "server_wall_rate": server["wall_rate"],
        "server_cpu_rate": server["cpu_rate"],
    }
