"""Handlers that wait: many records in flight, against a bare event loop and against one record after the other.

    python -m benchmarks.in_flight [--messages N] [--rounds N] [--quick] [--json P]

Each handler awaits 1 ms. The server reads 4 partitions with 10 000 keys, order="key", max_in_flight=1000; the bare loop
runs 1 000 tasks without Kafka, in the same rounds.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks import _report, _topics
from benchmarks._broker import broker
from benchmarks._harness import Contestant, Rounds, Spread, interleave, ratio, run_child, spread
from benchmarks._report import Target, console
from benchmarks.consume import Run

IN_FLIGHT = 1000
# One after the other, 1 ms each: enough for a rate.
_SEQUENTIAL = 2000


def contestants() -> list[Contestant]:
    """All of them."""
    server = "benchmarks._in_flight:run_server"
    at_once = {"server": {"order": "key", "max_in_flight": IN_FLIGHT}}
    return [
        Contestant("bare loop", "benchmarks._in_flight:run_bare", f"{IN_FLIGHT} tasks, uvloop, no Kafka"),
        Contestant("in flight", server, f'order="key", max_in_flight={IN_FLIGHT}, uvloop', "keyed", at_once),
        Contestant("sequential", server, "the default: one record after the other", "keyed", {"server": {}}),
        Contestant("sync path", "benchmarks._keven:run_server", "a handler that does nothing, for its CPU"),
    ]


def one_round(run: Run, contestant: Contestant) -> dict[str, Any]:
    """A round of one contestant."""
    wanted = _SEQUENTIAL if contestant.name == "sequential" else run.messages
    more = {**contestant.options, "wanted": wanted, "tasks": IN_FLIGHT}
    return run_child(contestant.target, **run.spec(contestant.topic, **more))


def _cpu_us(results: Rounds, name: str) -> list[float]:
    return [1e6 / entry["cpu_rate"] for entry in results[name]]


def targets(results: Rounds) -> list[Target]:
    """The figures to reach."""
    allowed = [
        flight / (bare + 3 * sync)
        for flight, bare, sync in zip(
            _cpu_us(results, "in flight"), _cpu_us(results, "bare loop"), _cpu_us(results, "sync path"), strict=True
        )
    ]
    return [
        Target("in flight / bare loop (wall)", 0.7, ratio(results, "in flight", "bare loop", "wall_rate")),
        Target("CPU in flight / (bare loop + 3 x sync path)", 1.0, Spread.of(allowed), at_most=True),
        Target("in flight / sequential (wall)", 100, ratio(results, "in flight", "sequential", "wall_rate"), digits=0),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 also when targets are missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.in_flight", description=__doc__)
    parser.add_argument("--messages", type=int, default=200_000, help="events per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="100 000 events, 2 rounds")
    parser.add_argument("--json", help="write the results there")
    options = parser.parse_args(arguments)
    if options.quick:
        options.messages, options.rounds = min(options.messages, 100_000), min(options.rounds, 2)
    chosen = contestants()
    with broker() as address:
        facts = _report.machine(address)
        _report.print_machine(facts)
        run = Run(address, options.messages, options.quick)
        try:
            for kind in ("keyed", "json"):
                _topics.ensure(address, kind, options.messages)
            results = interleave(
                chosen,
                options.rounds,
                lambda contestant, number: one_round(run, contestant),
                lambda line: console.print(f"[dim]{line}[/dim]"),
            )
        finally:
            _topics.drop_groups(address, run.groups)
    rows = [
        (
            entry.name,
            entry.config,
            _report.in_thousands(spread(results[entry.name], "wall_rate")),
            _report.plain(Spread.of(_cpu_us(results, entry.name))),
        )
        for entry in chosen
    ]
    _report.print_table(
        "In flight: median (range) of the rounds",
        ("contestant", "configuration", "msg/s, wall", "owner thread's CPU, µs/msg"),
        rows,
    )
    found = targets(results)
    _report.print_targets(f"Targets: {options.messages:,} events, {options.rounds} rounds", found)
    if options.json:
        _report.write_json(
            options.json,
            {"machine": facts, "rounds": results, "targets": [entry.as_json() for entry in found]},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
