"""One acknowledged message at a time, keven_core and confluent-kafka by turns: a contestant of benchmarks/produce.py.

In a module of its own, so that the other children load only what they measure.
"""

from __future__ import annotations

import itertools
import time
from array import array
from collections.abc import Callable
from typing import Any

from benchmarks._meter import now_ns, summary
from benchmarks._produce import WARM_UP, payloads
from benchmarks._produce_keven import acknowledged_logger
from benchmarks._produce_rivals import warm_producer


def by_turns(sends: dict[str, Callable[[bytes], object]], spec: dict[str, Any]) -> dict[str, Any]:
    """Call each of sends `rate` times a second, evenly and by turns, for `seconds`: how long the calls took.

    By turns in one process: what disturbs one, a pause of the broker say, disturbs the others as well. The figures are
    those of summary(), with the names before them.
    """
    values = payloads(spec)
    delays: dict[str, array[int]] = {name: array("q") for name in sends}
    gap_ns = 1_000_000_000 // (spec["rate"] * len(sends))
    turns = itertools.cycle(sends.items())
    due = now_ns() + gap_ns
    for index in range(int(spec["rate"] * spec["seconds"]) * len(sends)):
        left = due - now_ns()
        if left > 0:
            time.sleep(left / 1e9)
        data = values[index % len(values)]
        name, send = next(turns)
        started = now_ns()
        send(data)
        delays[name].append(now_ns() - started)
        # From now when late: a call that took long is not followed by a burst.
        due = max(due, started) + gap_ns
    figures = {f"{name}_{metric}": value for name in sends for metric, value in summary(delays[name], spec).items()}
    return {**figures, "sent": sum(map(len, delays.values())) + len(sends) * WARM_UP}


def run_latency(spec: dict[str, Any]) -> dict[str, Any]:
    """How long a single log() takes, and produce() with flush(): by turns."""
    producer = warm_producer(spec)
    topic = spec["topic"]

    def send(data: bytes) -> None:
        producer.produce(topic, data)
        producer.flush()

    with acknowledged_logger(spec) as logger:
        result = by_turns({"keven": logger.log, "confluent": send}, spec)
    shares = {f"{name}_share": result[f"keven_{name}_ms"] / result[f"confluent_{name}_ms"] for name in ("p50", "p99")}
    return {**result, **shares}
