"""What the contestants of benchmarks/produce.py share: settings, payloads, clocks, and how they are driven."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks._meter import Meter, peak_rss_mb, rss_mb

# Messages that connect a client, before the clocks start: it learns the topic, its partitions and its producer id.
WARM_UP = 20
LARGE = 1_000_000
# Enough for a run of run_log() to be sent and acknowledged.
_DRAIN_S = 0.2

# The fields of Settings, by which all contestants of a round are configured, as librdkafka properties.
_PROPERTIES = {
    "linger_ms": "linger.ms",
    "log_batch_bytes": "batch.size",
    "log_batch_messages": "batch.num.messages",
    "compression": "compression.type",
    "acks": "acks",
    "idempotence": "enable.idempotence",
    "log_queue_bytes": "queue.buffering.max.kbytes",
    "log_queue_messages": "queue.buffering.max.messages",
    "max_message_bytes": "message.max.bytes",
}


def rdkafka_options(spec: dict[str, Any]) -> dict[str, str]:
    """librdkafka's settings of a round, as keven_core makes them of the same fields; or its defaults."""
    options = {"bootstrap.servers": spec["address"]}
    if spec.get("defaults"):
        return {**options, "compression.type": spec["settings"]["compression"]}
    # What keven_core always sets: the partitioner of Java clients, requests not held back, no metrics for the broker.
    options |= {"partitioner": "murmur2_random", "socket.nagle.disable": "true", "enable.metrics.push": "false"}
    return {**options, **_properties(spec["settings"])}


def _properties(settings: dict[str, Any]) -> dict[str, str]:
    found = {_PROPERTIES[name]: str(value).lower() for name, value in settings.items()}
    if "log_queue_bytes" in settings:
        found["queue.buffering.max.kbytes"] = str(settings["log_queue_bytes"] // 1024)
    return found


def in_words(settings: dict[str, Any]) -> str:
    """Settings for people, as librdkafka's properties."""
    return ", ".join(f"{name}={value}" for name, value in _properties(settings).items())


def listening(address: str) -> list[int]:
    """Processes of this host that listen at the ports of an address; none when the broker runs elsewhere."""
    ports = {int(entry.rpartition(":")[2]) for entry in address.split(",")}
    with suppress(psutil.AccessDenied):
        found = psutil.net_connections("tcp")
        pids = {each.pid for each in found if each.status == psutil.CONN_LISTEN and set(each.laddr[1:]) & ports}
        return sorted(pid for pid in pids if pid)
    return []


def write_payloads(path: Path, count: int) -> None:
    """Write the values of `count` events, one a line: made once a run, since making them takes longer than sending."""
    from benchmarks import _events

    with path.open("wb") as lines:
        for _, value in _events.values("json", count):
            lines.write(value + b"\n")


def payloads(spec: dict[str, Any]) -> list[bytes]:
    """The values of a round: distinct bytes objects, the same for every contestant."""
    with Path(spec["payloads"]).open("rb") as lines:
        values = [line for line, _ in zip(map(bytes.rstrip, lines), range(spec["messages"]), strict=False)]
    # Objects of a list of that size are no business of the collector in what follows.
    gc.freeze()
    return values


def large_values() -> Callable[[int], bytes]:
    """Makes the message with a given number: 1 MB that does not compress, distinct, made by one copy."""
    import random

    tail = random.Random(1).randbytes(LARGE - 16)
    return lambda number: b"%016d" % number + tail


def warm_up(send: Callable[[bytes], object], flush: Callable[[], object]) -> None:
    """Send WARM_UP messages, one after the other."""
    for _ in range(WARM_UP):
        send(b"warm-up")
        flush()


class Window(Meter):
    """A Meter that also notes what the broker took meanwhile, and how much of the machine was idle.

    The broker's share is known when it runs on this host: `broker_pids` of the specification.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self._brokers = [psutil.Process(pid) for pid in spec["broker_pids"]]
        self.broker_s = self.idle_s = 0.0

    def _others(self) -> tuple[float, float]:
        whole = psutil.cpu_times()
        times = [process.cpu_times() for process in self._brokers]
        return sum(each.user + each.system for each in times), whole.idle + getattr(whole, "iowait", 0.0)

    def start(self) -> None:
        """Start the clocks."""
        self._before = self._others()
        super().start()

    def stop(self) -> None:
        """Stop the clocks."""
        super().stop()
        broker, idle = self._others()
        self.broker_s, self.idle_s = broker - self._before[0], idle - self._before[1]

    def result(self, messages: int) -> dict[str, float]:
        """The figures of a round."""
        return {
            **super().result(messages),
            "owner_us": self.cpu_s / messages * 1e6,
            "broker_us": self.broker_s / messages * 1e6,
            "idle_share": self.idle_s / self.wall_s / (psutil.cpu_count() or 1),
        }


def run_log(
    send: Callable[[list[bytes]], object], flush: Callable[[], object], values: list[bytes], run: int
) -> dict[str, float]:
    """CPU of the calling thread per message, in runs that fit the queue, with time between them for it to drain.

    Nothing is called while it drains, so `log_us`, that of the calls alone, has each run pay for what the run before it
    has left to the caller: releasing messages, serving delivery reports. The first run, which pays for none, is not
    counted. `all_us` has all that the thread does, flush() at the end included: what could be put off until then.
    """
    runs = [values[at : at + run] for at in range(0, len(values), run)]
    send(runs[0])
    time.sleep(_DRAIN_S)
    counted = sum(map(len, runs[1:]))
    log_s = 0.0
    began = time.thread_time()
    for part in runs[1:]:
        started = time.thread_time()
        send(part)
        log_s += time.thread_time() - started
        time.sleep(_DRAIN_S)
    flush()
    all_s = time.thread_time() - began
    return {"log_us": log_s / counted * 1e6, "all_us": all_s / counted * 1e6}


async def keep_in_flight(send: Callable[[bytes], Awaitable[object]], values: list[bytes], tasks: int) -> None:
    """Send all values from that many tasks, each awaiting one message after the other."""
    left = iter(values)

    async def work() -> None:
        for data in left:
            await send(data)

    await asyncio.gather(*(work() for _ in range(tasks)))


class Growth:
    """How far the peak of this process rises over what it holds at the start, and how much was in flight meanwhile."""

    def __init__(self) -> None:
        self.pending = 0
        # Linux: the peak starts anew from what is resident now. Elsewhere the baseline may be somewhat high.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._baseline = rss_mb()

    def note(self, pending: int) -> None:
        """Note how many messages are in flight now."""
        self.pending = max(self.pending, pending)

    def result(self) -> dict[str, float]:
        """The figures of a round."""
        growth, in_flight = peak_rss_mb() - self._baseline, self.pending * LARGE / 1e6
        return {"growth_mb": growth, "in_flight_mb": in_flight, "growth_share": growth / in_flight}


def send_large(send: Callable[[bytes], object], pending: Callable[[], int], spec: dict[str, Any]) -> Growth:
    """Send `count` messages of 1 MB, as `mode` says; the caller flushes and then asks for the result.

    made: distinct, made one after the other and dropped by the caller. Their bytes are in the growth, as they are in
        a service, so it can't be less than what is in flight; what is over 1 are copies, and buffers for batches.
    held: distinct, held by the caller since before the baseline. All growth is the client's own.
    shared: references to one object, held by the caller.
    """
    count, make = spec["count"], large_values()
    held: list[bytes] = []
    if spec["mode"] == "held":
        held = [make(number) for number in range(count)]
    elif spec["mode"] == "shared":
        held = [make(0)] * count
    growth = Growth()
    for number in range(count):
        send(held[number] if held else make(number))
        growth.note(pending())
    return growth
