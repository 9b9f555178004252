"""Consume: keven_core, its limit and its rivals on the same topic, in interleaved rounds.

    python -m benchmarks.consume [--messages N] [--rounds N] [--only NAME,...] [--quick] [--soak] [--json P] [--svg P]

Real Kafka: `KAFKA=host:port` or what `make kafka` runs; else a broker is started for the run. docs/performance.md says
what is measured and how.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import os
import statistics
import sys
import time
from typing import Any

from benchmarks import _report, _topics
from benchmarks._broker import broker
from benchmarks._harness import Contestant, Rounds, Spread, interleave, ratio, run_child, spread
from benchmarks._report import Target, console

_SERVER = "benchmarks._keven:run_server"
_CONSUME = "benchmarks._rivals:run_consume"
_AIO = "benchmarks._rivals:run_aio"
_TUNE_MESSAGES = 300_000
_TUNE_REPEATS = 2
_BATCHES = (200, 1000, 10_000)
_PREFETCH_MIB = (8, 16, 64)
_MIB = 1 << 20


def contestants() -> list[Contestant]:
    """All of them; the configuration of the tuned rivals is filled in by tune()."""
    server = "the server of docs/, default settings, with a group, background commits and dead letters"
    return [
        Contestant(
            "limit",
            "benchmarks._limit:run",
            "C drain + decode and handler over bytes in memory, around a run of the server",
        ),
        Contestant("keven sync", _SERVER, server),
        Contestant("keven raw", "benchmarks._keven:run_raw", "the compiled consumer alone: no group, nothing stored"),
        Contestant("keven skip", _SERVER, "as sync, no handler for the event", options={"registered": []}),
        Contestant("keven async", _SERVER, "as sync, `async def` handler, uvloop", options={"is_async": True}),
        Contestant(
            "keven batch",
            "benchmarks._keven:run_batches",
            "as sync, `handle_batch` of up to 500 events",
            options={"batch_handler": 500},
        ),
        Contestant("keven msgpack", _SERVER, "as sync, MessagePack", topic="msgpack"),
        Contestant("keven spaces", _SERVER, "as sync, JSON with spaces after separators", topic="spaces"),
        Contestant("keven 10 events", _SERVER, "10 registered events, all on the topic", "mixed", {"registered": 10}),
        Contestant("keven 1000 events", _SERVER, "1000 registered, the same 10 on it", "mixed", {"registered": 1000}),
        Contestant("consume", _CONSUME, "", options={"headers": False}),
        Contestant("consume headers", _CONSUME, "", options={"headers": True}),
        Contestant("consume defaults", _CONSUME, "", options={"headers": False, "defaults": True}),
        Contestant("AIOConsumer", _AIO, "", needs="confluent_kafka.aio"),
        Contestant(
            "aiokafka",
            "benchmarks._rivals:run_aiokafka",
            "getmany(max_records=1000), uvloop, fetch 1 MiB a partition",
            options={"batch_size": 1000},
            needs="aiokafka",
        ),
    ]


class Run:
    """One run: an address, its topics, its groups."""

    def __init__(self, address: str, messages: int, quick: bool) -> None:
        self.address = address
        self.messages = messages
        self.quick = quick
        self.groups: list[str] = []

    def spec(self, kind: str, **more: Any) -> dict[str, Any]:
        """What every child is told."""
        self.groups.append(f"keven-bench-{os.getpid()}-{len(self.groups)}-{time.time_ns()}")
        return {
            "address": self.address,
            "topic": _topics.topic_name(kind, self.messages),
            "messages": self.messages,
            "group": self.groups[-1],
            "kind": kind,
            **more,
        }

    def round(self, contestant: Contestant, number: int) -> dict[str, Any]:
        """One round of one contestant, its count checked."""
        result = run_child(contestant.target, **self.spec(contestant.topic, **contestant.options))
        if result["messages"] != self.messages:
            raise RuntimeError(f"{contestant.name} counted {result['messages']} events instead of {self.messages}")
        if result.get("dead"):
            raise RuntimeError(f"{contestant.name}: {result['dead']} events failed")
        return result

    def tune(self, target: str, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """The fastest of a grid of batch sizes and prefetch windows, by wall rate; and the grid in words."""
        prefetches = _PREFETCH_MIB if not self.quick else _PREFETCH_MIB[1:2]
        grid = list(itertools.product(_BATCHES, prefetches))
        rates: dict[tuple[int, int], list[float]] = {point: [] for point in grid}
        for _, (batch, prefetch) in itertools.product(range(1 if self.quick else _TUNE_REPEATS), grid):
            tried = {**options, "batch_size": batch, "settings": {"prefetch_bytes": prefetch * _MIB}}
            stop_after = min(_TUNE_MESSAGES, self.messages)
            rate = run_child(target, **self.spec("json", **tried, stop_after=stop_after))["wall_rate"]
            rates[batch, prefetch].append(rate)
        medians = {point: statistics.median(found) for point, found in rates.items()}
        best = max(grid, key=lambda point: medians[point])
        words = ", ".join(f"{batch}/{prefetch} MiB {medians[batch, prefetch] / 1e3:.0f} k" for batch, prefetch in grid)
        return {"batch_size": best[0], "settings": {"prefetch_bytes": best[1] * _MIB}}, words


def configure_rivals(run: Run, chosen: list[Contestant]) -> None:
    """Tune the confluent rivals on a part of the topic and write down what was chosen."""
    names = {contestant.name for contestant in chosen if not contestant.skipped}
    found: dict[str, dict[str, Any]] = {}
    if names & {"consume", "consume headers", "consume defaults"}:
        found["consume"], grid = run.tune(_CONSUME, {"headers": False})
        console.print(f"consume() tried as batch/prefetch: {grid}")
    if "AIOConsumer" in names:
        found["AIOConsumer"], grid = run.tune(_AIO, {})
        console.print(f"AIOConsumer tried as batch/prefetch: {grid}")
    for contestant in chosen:
        tuned = found.get("AIOConsumer" if contestant.name == "AIOConsumer" else "consume")
        if tuned is None or contestant.target not in (_CONSUME, _AIO):
            continue
        contestant.options = {**contestant.options, **tuned}
        batch, window = tuned["batch_size"], tuned["settings"]["prefetch_bytes"] // _MIB
        if contestant.options.get("defaults"):
            contestant.config = f"consume({batch}), no headers, librdkafka's default settings"
        elif contestant.target == _AIO:
            contestant.config = (
                f"AIOConsumer.consume({batch}), uvloop, no headers, keven's fetch settings, {window} MiB"
            )
        else:
            reads = "header read" if contestant.options["headers"] else "no headers"
            contestant.config = f"consume({batch}), {reads}, keven's fetch settings, {window} MiB"


def both(results: Rounds, above: str, below: str, *, judged: str) -> dict[str, Any]:
    """A ratio by the judged clock, and the same by the other one in words."""
    other = "cpu_rate" if judged == "wall_rate" else "wall_rate"
    second = ratio(results, above, below, other)
    clock = "owner CPU" if other == "cpu_rate" else "wall"
    return {
        "figure": ratio(results, above, below, judged),
        "also": f"{clock}: {_report.plain(second)}" if second else "",
    }


def _of_limit(results: Rounds, metric: str) -> Spread | None:
    return spread(results["limit"], metric) if results.get("limit") else None


def targets(results: Rounds, soak: dict[str, Any] | None) -> list[Target]:
    """The figures to reach, met or missed. Rates are compared by wall clock, costs by the owner thread's CPU."""
    wall, cpu = "wall_rate", "cpu_rate"
    found = [
        Target(
            "sync / limit L (owner CPU)",
            0.90,
            _of_limit(results, "server_of_limit"),
            digits=3,
            also=f"bare consumer / L: {_report.plain(_of_limit(results, 'raw_of_limit'), 3)}",
        ),
        Target(
            "sync / consume() with headers (wall)", 1.8, **both(results, "keven sync", "consume headers", judged=wall)
        ),
        Target("sync / consume() no headers (wall)", 1.4, **both(results, "keven sync", "consume", judged=wall)),
        Target(
            "sync / consume() on defaults (wall)", 5, **both(results, "keven sync", "consume defaults", judged=wall)
        ),
        Target("skip / sync (wall)", 1.8, **both(results, "keven skip", "keven sync", judged=wall)),
        Target(
            "1000 registered / 10 (owner CPU)",
            0.95,
            **both(results, "keven 1000 events", "keven 10 events", judged=cpu),
        ),
        Target(
            "JSON with spaces / without (owner CPU)", 0.95, **both(results, "keven spaces", "keven sync", judged=cpu)
        ),
        Target("MessagePack / JSON (wall)", 1.2, **both(results, "keven msgpack", "keven sync", judged=wall)),
        Target("batches of 500 / sync (wall)", 1.15, **both(results, "keven batch", "keven sync", judged=wall)),
        Target("async / sync (wall)", 0.7, **both(results, "keven async", "keven sync", judged=wall)),
        Target("async / AIOConsumer.consume (wall)", 1.5, **both(results, "keven async", "AIOConsumer", judged=wall)),
    ]
    if results.get("keven sync"):
        found.append(
            Target("peak memory of sync, MB", 120, spread(results["keven sync"], "peak_rss_mb"), True, digits=1)
        )
    if soak is not None:
        growth = Spread.of([soak["growth"]])
        found.append(Target(f"growth over {soak['messages']:.0e} messages, %", 2, growth, True, digits=1))
    return found


def soak(run: Run, passes: int) -> dict[str, Any]:
    """Read the topic again and again in one server. Growth is from the second to the last fifth of the passes."""
    result = run_child("benchmarks._keven:run_soak", **run.spec("json", passes=passes))
    memory = result["memory"]
    part = max(1, passes // 5)
    first, last = statistics.median(memory[part : 2 * part]), statistics.median(memory[-part:])
    result["growth"] = (last / first - 1) * 100
    console.print(
        f"memory after each pass, MB: {', '.join(f'{entry:.1f}' for entry in memory)}; peak {result['peak_rss_mb']:.1f}"
    )
    return result


def show(chosen: list[Contestant], results: Rounds) -> None:
    """Print the tables of configurations and rates."""
    _report.print_table("Configurations", ("contestant", "configuration"), [(c.name, c.config or "-") for c in chosen])
    rows = []
    for contestant in chosen:
        if contestant.skipped:
            rows.append((contestant.name, f"skipped: {contestant.skipped}", "", "", ""))
            continue
        rounds = results[contestant.name]
        rows.append(
            (
                contestant.name,
                "-" if contestant.name == "limit" else _report.in_thousands(spread(rounds, "wall_rate")),
                _report.in_thousands(spread(rounds, "cpu_rate")),
                _report.plain(spread(rounds, "process_cpu_us")),
                f"{spread(rounds, 'peak_rss_mb').median:.0f}",
            )
        )
    _report.print_table(
        "Consume: median (range) of the rounds",
        ("contestant", "msg/s, wall", "msg per CPU s of the owner thread", "process CPU µs/msg", "peak MB"),
        rows,
    )
    if results.get("limit"):
        parts = {name: _report.plain(spread(results["limit"], name), 3) for name in ("drain_cpu_us", "memory_cpu_us")}
        console.print(
            f"limit: drain {parts['drain_cpu_us']} µs + decode and handler {parts['memory_cpu_us']} µs per "
            f"message of the owner thread; drain by wall clock "
            f"{_report.in_thousands(spread(results['limit'], 'wall_rate'))}/s"
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 also when targets are missed, since that is a finding and not a failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.consume", description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000, help="events per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--only", default="*", help="contestants, comma-separated; patterns allowed")
    parser.add_argument("--quick", action="store_true", help="200 000 events, 2 rounds, a small tuning grid")
    parser.add_argument("--soak", action="store_true", help="only memory over 10 passes of the topic in one server")
    parser.add_argument("--passes", type=int, default=10, help="passes of --soak (default: %(default)s)")
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--svg", help="draw the wall rates there")
    options = parser.parse_args(arguments)
    if options.quick:
        options.messages, options.rounds = min(options.messages, 200_000), min(options.rounds, 2)
    patterns = [pattern.strip() for pattern in options.only.split(",")]
    chosen = [c for c in contestants() if any(fnmatch.fnmatch(c.name, pattern) for pattern in patterns)]
    if not chosen:
        parser.error(f"--only {options.only!r} matches none of: {', '.join(c.name for c in contestants())}")
    with broker() as address:
        facts = _report.machine(address)
        _report.print_machine(facts)
        run = Run(address, options.messages, options.quick)
        try:
            if options.soak:
                _topics.ensure(address, "json", options.messages)
                memory = soak(run, options.passes)
                _report.print_targets("Targets", targets({}, memory)[-1:])
                results: Rounds = {}
            else:
                memory = None
                for kind in sorted({c.topic for c in chosen if not c.skipped}):
                    _topics.ensure(address, kind, options.messages)
                configure_rivals(run, chosen)
                results = interleave(
                    chosen, options.rounds, run.round, lambda line: console.print(f"[dim]{line}[/dim]")
                )
                show(chosen, results)
                _report.print_targets(
                    f"Targets: ratios of {options.messages:,} events, {options.rounds} rounds", targets(results, None)
                )
        finally:
            _topics.drop_groups(address, run.groups)
    if options.json:
        _report.write_json(
            options.json,
            {
                "machine": facts,
                "messages": options.messages,
                "rounds": results,
                "soak": memory,
                "configurations": {c.name: c.skipped or c.config for c in chosen},
                "targets": [entry.as_json() for entry in targets(results, memory)],
            },
        )
    if options.svg and results:
        bars = {name: spread(rounds, "wall_rate") for name, rounds in results.items() if name != "limit"}
        _report.write_svg(options.svg, f"Consume, {options.messages:,} events, wall clock", "messages per second", bars)
    return 0


if __name__ == "__main__":
    sys.exit(main())
