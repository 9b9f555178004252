"""Latency and idle cost: how old an event is when its handler sees it, and what a server costs that has nothing to do.

    python -m benchmarks.latency [--rate N] [--seconds N] [--rounds N] [--quick] [--json P]

A producer in a process of its own sends `rate` messages a second, evenly paced, linger 0, acks=1; each carries the time
at which it was produced, by a clock that all processes of this host share. keven_core's servers and a confluent poll()
loop take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks import _report, _topics
from benchmarks._broker import broker
from benchmarks._harness import ROOT, Contestant, Rounds, Spread, interleave, ratio, run_child, spread
from benchmarks._report import Target, console

_TOPIC = "keven-bench-latency"
_IDLE_TOPIC = "keven-bench-idle"
_START_TIMEOUT_S = 60


def contestants() -> list[Contestant]:
    """Who takes part in the latency rounds."""
    server = "benchmarks._latency:run_server"
    return [
        Contestant("poll", "benchmarks._latency:run_poll", "confluent poll(1.0) loop, keven's fetch settings"),
        Contestant(
            "poll defaults",
            "benchmarks._latency:run_poll",
            "the same on librdkafka's defaults",
            options={"defaults": True},
        ),
        Contestant("keven sync", server, "the server, default settings"),
        Contestant("keven async", server, "the server, `async def` handler, uvloop", options={"is_async": True}),
    ]


class Run:
    """One run: an address, a rate, a time."""

    def __init__(self, address: str, rate: int, seconds: float) -> None:
        self.address = address
        self.rate = rate
        self.seconds = seconds
        self.groups: list[str] = []

    def spec(self, topic: str, **more: Any) -> dict[str, Any]:
        """What every child is told."""
        self.groups.append(f"keven-bench-{os.getpid()}-{len(self.groups)}-{time.time_ns()}")
        return {
            "address": self.address,
            "topic": topic,
            "group": self.groups[-1],
            "rate": self.rate,
            "seconds": self.seconds,
            **more,
        }

    def round(self, contestant: Contestant, number: int) -> dict[str, Any]:
        """Start the consumer, wait until it is ready, then produce; returns what the consumer measured."""
        spec = self.spec(_TOPIC, **contestant.options)
        argument = json.dumps({"target": contestant.target, **spec})
        consumer = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._child", argument], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            assert consumer.stdout is not None
            if consumer.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{contestant.name} ended before it was ready")
            # Its position is asked from the broker after the assignment; the pacer's start leaves it time, too.
            time.sleep(1)
            sent = run_child("benchmarks._latency:pace", **spec)
            output, _ = consumer.communicate(timeout=_START_TIMEOUT_S)
        except BaseException:
            consumer.kill()
            consumer.wait()
            raise
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        if result["messages"] != sent["messages"]:
            raise RuntimeError(f"{contestant.name} saw {result['messages']} of {sent['messages']} messages")
        result["pacer_worst_ms"] = sent["worst_delay_ms"]
        return result

    def idle(self, rounds: int, seconds: float) -> dict[str, Spread]:
        """Percent of a core that idle servers take."""
        found: dict[str, list[float]] = {"keven sync": [], "keven async": []}
        for _ in range(rounds):
            for name, percents in found.items():
                spec = {**self.spec(_IDLE_TOPIC, is_async=name.endswith("async")), "seconds": seconds}
                percents.append(run_child("benchmarks._latency:run_idle", **spec)["core_percent"])
        return {name: Spread.of(percents) for name, percents in found.items()}


def targets(results: Rounds, idle: dict[str, Spread]) -> list[Target]:
    """The figures to reach, met or missed."""
    found = [Target(f"idle {name}, % of a core", 1.0, figure, True) for name, figure in idle.items()]
    for metric, label in (("p50_ms", "p50"), ("p99_ms", "p99")):
        for name in ("keven sync", "keven async"):
            defaults = ratio(results, name, "poll defaults", metric)
            found.append(
                Target(
                    f"{label}, {name} / poll()",
                    1.1,
                    ratio(results, name, "poll", metric),
                    True,
                    also=f"against poll() on defaults: {_report.plain(defaults)}",
                )
            )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 also when targets are missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--rate", type=int, default=1000, help="messages per second (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=10, help="of each round, the first one not counted (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 4 seconds")
    parser.add_argument("--json", help="write the results there")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds = min(options.rounds, 2), min(options.seconds, 4)
    with broker() as address:
        facts = _report.machine(address)
        _report.print_machine(facts)
        run = Run(address, options.rate, options.seconds)
        _topics.create(address, _TOPIC)
        _topics.create(address, _IDLE_TOPIC)
        chosen = contestants()
        try:
            idle = run.idle(1 if options.quick else 3, min(options.seconds, 10))
            results = interleave(chosen, options.rounds, run.round, lambda line: console.print(f"[dim]{line}[/dim]"))
        finally:
            _topics.drop_groups(address, run.groups)
    rows = []
    for contestant in chosen:
        rounds = results[contestant.name]
        rows.append(
            (
                contestant.name,
                contestant.config,
                *(_report.plain(spread(rounds, metric)) for metric in ("p50_ms", "p99_ms", "max_ms")),
                f"{spread(rounds, 'cpu_share').median:.1%}",
            )
        )
    _report.print_table(
        f"Produce to handler at {options.rate} messages/s, ms: median (range) of {options.rounds} rounds",
        ("contestant", "configuration", "p50", "p99", "max", "CPU"),
        rows,
    )
    _report.print_targets("Targets", targets(results, idle))
    if options.json:
        _report.write_json(
            options.json,
            {
                "machine": facts,
                "rate": options.rate,
                "seconds": options.seconds,
                "rounds": results,
                "idle": {name: figure.__dict__ for name, figure in idle.items()},
                "targets": [entry.as_json() for entry in targets(results, idle)],
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
