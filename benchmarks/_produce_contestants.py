"""Who takes part in benchmarks/produce.py, how they are configured, and what is shown of them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks._harness import Contestant, Rounds, spread
from benchmarks._produce import in_words

COMPRESSIONS = ("none", "lz4", "zstd")
_KEVEN = "benchmarks._produce_keven"
_RIVALS = "benchmarks._produce_rivals"
_LATENCY = "benchmarks._produce_latency"
_C_LOOP = "benchmarks._c_loop"

# The same for all: nothing lost, nothing twice.
_SAFE = {"acks": "all", "idempotence": True}
# For throughput: what proved fastest, for the C loop in batches and lingering, for each of them in the queue's length.
_FAST = {
    **_SAFE,
    "linger_ms": 5,
    "log_batch_bytes": 1_000_000,
    "log_batch_messages": 10_000,
    "log_queue_bytes": 1 << 30,
    "log_queue_messages": 100_000,
}
_LARGE = {**_SAFE, "linger_ms": 5, "max_message_bytes": 2_000_000, "log_queue_messages": 100_000}
_LARGE_QUEUE = 64 << 20
_AT_ONCE = {**_SAFE, "linger_ms": 0, "compression": "none"}
_POLL_GRID: dict[str, list[Any]] = {"poll_every": [1, 10, 100, 1000, 10_000]}
# The AIOProducer looks at its buffer every 0.1 s at most, however short the timeout is.
_AIO_GRID: dict[str, list[Any]] = {"batch_size": [1, 50, 200, 1000], "linger_ms": [0, 1], "buffer_timeout": [0.01]}
# What the rivals are tuned over, and by which figure.
_GRIDS: dict[str, tuple[dict[str, list[Any]], str]] = {
    "confluent log": (_POLL_GRID, "log_us"),
    "confluent lz4": (_POLL_GRID, "wall_rate"),
    "AIOProducer": (_AIO_GRID, "wall_rate"),
    "AIOProducer polled": (_AIO_GRID, "wall_rate"),
    "aiokafka": ({"batch_bytes": [16384, 131_072, 1_000_000], "linger_ms": [0, 1, 5]}, "wall_rate"),
}
_RUN = 50_000
# Rates that differ by less can't be told apart on a shared machine.
_TIE = 0.05
# Cores: with fewer idle, whoever sends is held up by whoever else runs; with more taken by others, rates say little.
_IDLE, _NOISE = 0.3, 0.3
_TASKS = 1000
_RATE = 100


@dataclass(frozen=True)
class Group:
    """Contestants of one table: title, kinds of topics, what all are set to, columns as (title, metric, digits)."""

    title: str
    topics: tuple[str, ...]
    settings: dict[str, Any]
    columns: tuple[tuple[str, str, int], ...]


GROUPS = (
    Group(
        "App thread, CPU µs a message",
        ("log",),
        {**_FAST, "compression": "lz4"},
        (("calls", "log_us", 3), ("with flush() at the end", "all_us", 3)),
    ),
    Group(
        "Throughput",
        COMPRESSIONS,
        _FAST,
        (
            ("msg/s, wall", "wall_rate", 0),
            ("app thread CPU µs/msg", "owner_us", 2),
            ("process CPU µs/msg", "process_cpu_us", 2),
            ("broker CPU µs/msg", "broker_us", 2),
            ("idle share", "idle_share", 2),
        ),
    ),
    Group(
        "Messages of 1 MB",
        ("1 MB",),
        _LARGE,
        (("in flight, MB", "in_flight_mb", 0), ("growth, MB", "growth_mb", 1), ("ratio", "growth_share", 2)),
    ),
    Group(
        f"Awaited one by one, {_TASKS} in flight",
        ("alog",),
        _AT_ONCE,
        (
            ("msg/s, wall", "wall_rate", 0),
            ("loop CPU µs/msg", "owner_us", 1),
            ("process CPU µs/msg", "process_cpu_us", 1),
        ),
    ),
    Group(
        f"One acknowledged message at a time, {_RATE}/s, ms",
        ("latency",),
        _AT_ONCE,
        tuple(
            (f"{name} {figure}", f"{name}_{figure}_ms", 2)
            for name in ("keven", "confluent")
            for figure in ("p50", "p99", "max")
        ),
    ),
)


def _cost() -> list[Contestant]:
    options: dict[str, Any] = {"settings": {**_FAST, "compression": "lz4"}, "run": _RUN}
    runs = f"runs of {_RUN:,}"
    return [
        Contestant("keven log", f"{_KEVEN}:run_cost", f"KafkaBatchLogger.log(), {runs}", "log", options),
        Contestant("confluent log", f"{_RIVALS}:run_cost", f"produce() and poll(0), {runs}", "log", options),
        Contestant(
            "c loop log", f"{_C_LOOP}:run_cost", f"rd_kafka_produce() and rd_kafka_poll(), {runs}", "log", options
        ),
    ]


def _throughput(kind: str) -> list[Contestant]:
    options = {"settings": {**_FAST, "compression": kind}}
    words = f"compression.type={kind}"
    confluent = f"{_RIVALS}:run_throughput"
    found = [
        Contestant(f"c loop {kind}", f"{_C_LOOP}:run_throughput", words, kind, options),
        Contestant(f"keven {kind}", f"{_KEVEN}:run_throughput", words, kind, options),
        Contestant(f"confluent {kind}", confluent, words, kind, options),
    ]
    if kind == "lz4":
        defaults = f"librdkafka's defaults, compression.type={kind}"
        found += [
            Contestant(
                f"confluent counted {kind}",
                confluent,
                f"on_delivery counts; {words}",
                kind,
                {**options, "counted": True},
            ),
            Contestant(f"confluent batch {kind}", f"{_RIVALS}:run_batches", f"produce_batch(); {words}", kind, options),
            Contestant(f"confluent defaults {kind}", confluent, defaults, kind, {**options, "defaults": True}),
            Contestant(
                f"confluent documented {kind}",
                confluent,
                f"as its documentation does it: on_delivery, poll(0) after each message; {defaults}",
                kind,
                {**options, "defaults": True, "counted": True, "poll_every": 1},
            ),
        ]
    return found


def _large() -> list[Contestant]:
    found = []
    for who, module in (("keven", _KEVEN), ("confluent", _RIVALS)):
        for name, mode, compression, count, queue, words in (
            ("1 MB", "made", "none", 300, _LARGE_QUEUE, "300 made one after the other"),
            ("1 MB lz4", "made", "lz4", 300, _LARGE_QUEUE, "the same"),
            ("1 MB held", "held", "none", 300, _LARGE_QUEUE, "300 that the caller holds, before and after"),
            ("1 MB shared", "shared", "none", 1000, 2 << 30, "1000 references to one"),
        ):
            settings = {**_LARGE, "compression": compression, "log_queue_bytes": queue}
            options = {"settings": settings, "mode": mode, "count": count}
            config = f"{words}; compression.type={compression}, queue of {queue >> 20} MiB"
            found.append(Contestant(f"{who} {name}", f"{module}:run_large", config, "1 MB", options))
    return found


def _alog() -> list[Contestant]:
    options = {"settings": _AT_ONCE, "tasks": _TASKS}
    aio, aiokafka = f"{_RIVALS}:run_aio", f"{_RIVALS}:run_aiokafka"
    return [
        Contestant("keven alog", f"{_KEVEN}:run_alog", "KafkaLogger.alog(), uvloop", "alog", options),
        Contestant("AIOProducer", aio, "produce(), uvloop", "alog", options, needs="confluent_kafka.aio"),
        Contestant(
            "AIOProducer polled",
            aio,
            "the same, and a task that serves delivery reports all the time",
            "alog",
            {**options, "poll": True},
            needs="confluent_kafka.aio",
        ),
        Contestant(
            "aiokafka linger 0",
            aiokafka,
            "send_and_wait(), uvloop, linger 0, other settings at their defaults",
            "alog",
            {**options, "batch_bytes": 16384},
            needs="aiokafka",
        ),
        Contestant("aiokafka", aiokafka, "send_and_wait(), uvloop", "alog", options, needs="aiokafka"),
    ]


def _latency() -> list[Contestant]:
    options = {"settings": _AT_ONCE, "rate": _RATE}
    words = "keven: KafkaLogger.log(); confluent: produce() and flush(); by turns in one process"
    return [Contestant("latency", f"{_LATENCY}:run_latency", words, "latency", options)]


def contestants() -> list[Contestant]:
    """All of them; the configuration of the tuned rivals is filled in by configure()."""
    return [*_cost(), *(each for kind in COMPRESSIONS for each in _throughput(kind)), *_large(), *_alog(), *_latency()]


def soak() -> Contestant:
    """The logger whose memory is watched: a queue that fills at once, so that its size is not taken for growth."""
    settings = {**_FAST, "compression": "lz4", "log_queue_bytes": 64 << 20}
    return Contestant(
        "keven soak", f"{_KEVEN}:run_soak", in_words(settings), "soak", {"settings": settings, "messages": 20_000}
    )


def merged(options: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """Options with those of a point of a grid, of which settings go where settings are."""
    settings = dict(options["settings"])
    settings |= {name: value for name, value in point.items() if name in settings}
    return {**options, **{name: value for name, value in point.items() if name not in settings}, "settings": settings}


def _tuned_as(contestant: Contestant) -> str:
    """Whose tuning a contestant takes over; empty: nobody's."""
    if contestant.skipped or contestant.name in _GRIDS:
        return "" if contestant.skipped else contestant.name
    polls = contestant.target.startswith(_RIVALS) and contestant.topic in COMPRESSIONS
    return "confluent lz4" if polls and "poll_every" not in contestant.options else ""


def configure(
    tune: Callable[[Contestant, dict[str, list[Any]], str], dict[str, Any]], chosen: list[Contestant]
) -> None:
    """Tune the rivals among those chosen and write down what was found."""
    named = {contestant.name: contestant for contestant in contestants()}
    for name, (grid, metric) in _GRIDS.items():
        tuned = [contestant for contestant in chosen if _tuned_as(contestant) == name]
        if not tuned:
            continue
        point = tune(named[name], grid, metric)
        words = ", ".join(f"{key}={value}" for key, value in point.items())
        for contestant in tuned:
            contestant.options = merged(contestant.options, point)
            contestant.config = f"{contestant.config}, {words}"


def _cores(entry: dict[str, Any]) -> tuple[float, float, float]:
    """Cores that the broker took in a round, that others took, neither client nor broker, and that were idle."""
    cores = os.cpu_count() or 1
    client, broker = (entry[name] * entry["wall_rate"] / 1e6 for name in ("process_cpu_us", "broker_us"))
    idle = entry["idle_share"] * cores
    return broker, max(0.0, cores - client - broker - idle), idle


def limits(results: Rounds) -> list[str]:
    """For each compression: whether the contestants tie, and who had the cores while the C loop ran."""
    lines = []
    for kind in COMPRESSIONS:
        names = [name for name in (f"c loop {kind}", f"keven {kind}", f"confluent {kind}") if results.get(name)]
        if f"c loop {kind}" not in names:
            continue
        rates = {name: spread(results[name], "wall_rate").median for name in names}
        tied = [name for name in names if rates[name] >= (1 - _TIE) * max(rates.values())]
        broker, others, idle = map(statistics.median, zip(*map(_cores, results[names[0]]), strict=True))
        verdict = ""
        if others > _NOISE:
            verdict = ": not an idle machine, trust the CPU figures only"
        elif idle < _IDLE:
            verdict = ": the cores are the limit, so rates are as total CPU a message, the broker's included"
        lines.append(
            f"{kind}: {' and '.join(tied)} {'tie' if len(tied) > 1 else 'leads'}; while the C loop runs the broker has "
            f"{broker:.2f} of {os.cpu_count()} cores, others {others:.2f}, idle {idle:.2f}{verdict}"
        )
    return lines
