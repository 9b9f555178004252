"""Produce: keven_core's loggers, their rivals and a C loop over librdkafka, in interleaved rounds.

    python -m benchmarks.produce [--messages N] [--rounds N] [--seconds N] [--only NAME,...] [--quick]
                                 [--soak [--count N]] [--json P] [--svg P]

Real Kafka: `KAFKA=host:port` or what `make kafka` runs; else a broker is started for the run. Each round has a fresh
process and a topic of its own, whose high watermarks have to show every message once. The C loop is compiled for the
run (`cc`, or what `CC` names). docs/performance.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import _c_loop, _produce, _produce_contestants, _report, _topics
from benchmarks._broker import broker
from benchmarks._harness import Contestant, Rounds, Spread, interleave, ratio, run_child, spread
from benchmarks._produce_contestants import COMPRESSIONS, GROUPS, contestants, limits
from benchmarks._report import Target, console, in_thousands, plain

_TOPIC_CONFIG = {"file.delete.delay.ms": "1000"}
# Small enough for any disk, once the broker looks (every 5 minutes, log.retention.check.interval.ms).
_SOAK_CONFIG = {**_TOPIC_CONFIG, "segment.bytes": str(16 << 20), "retention.bytes": str(64 << 20)}
_SOAK_TIMEOUT_S = 7200
_TUNE_MESSAGES = 500_000
_TUNE_MESSAGES_ALOG = 40_000
_TUNE_REPEATS = 2


class Run:
    """One run: an address, its payloads, its topics."""

    def __init__(self, address: str, folder: Path, options: argparse.Namespace) -> None:
        self.address = address
        self.messages: int = options.messages
        self.quick: bool = options.quick
        self._seconds: float = options.seconds
        self._folder = folder
        self._brokers = _produce.listening(address)
        self._topics = 0
        self.c_loop = ""
        _produce.write_payloads(folder / "payloads", self.messages)

    def build_c_loop(self, chosen: Iterable[Contestant]) -> None:
        """Compile the C loop, or skip those that need it."""
        wanted = [c for c in chosen if c.target.startswith("benchmarks._c_loop:")]
        try:
            self.c_loop = str(_c_loop.build(self._folder)) if wanted else ""
        except (OSError, subprocess.CalledProcessError) as error:
            for contestant in wanted:
                contestant.skipped = f"no C compiler: {error}"

    @contextmanager
    def topic(self, kind: str, config: dict[str, str]) -> Iterator[str]:
        """A topic for one round."""
        self._topics += 1
        name = f"keven-bench-produce-{kind.replace(' ', '-')}-{os.getpid()}-{self._topics}"
        _topics.create(self.address, name, config=config)
        try:
            yield name
        finally:
            _topics.delete(self.address, name)

    def measure(self, contestant: Contestant, **more: Any) -> dict[str, Any]:
        """One round of one contestant; what it says it sent, and saw delivered, has to be what is on the topic."""
        spec = {
            "address": self.address,
            "messages": self.messages,
            "payloads": str(self._folder / "payloads"),
            "c_loop": self.c_loop,
            "broker_pids": self._brokers,
            "seconds": self._seconds,
            **contestant.options,
            **more,
        }
        if contestant.topic == "alog":
            spec["messages"] = min(spec["messages"], max(_TUNE_MESSAGES_ALOG, self.messages // 5))
        timeout_s = _SOAK_TIMEOUT_S if contestant.topic == "soak" else 600
        config = _SOAK_CONFIG if contestant.topic == "soak" else _TOPIC_CONFIG
        with self.topic(contestant.topic, config) as topic:
            before = _topics.written(self.address, topic)
            result = run_child(contestant.target, timeout_s=timeout_s, topic=topic, **spec)
            written = _topics.written(self.address, topic) - before
        if not result["sent"] == result.get("delivered", result["sent"]) == written:
            raise RuntimeError(
                f"{contestant.name} sent {result['sent']} messages, {result.get('delivered')} were reported as "
                f"delivered, {written} are on the topic"
            )
        return result

    def round(self, contestant: Contestant, number: int) -> dict[str, Any]:
        """One round, for interleave()."""
        return self.measure(contestant)

    def tune(self, contestant: Contestant, grid: dict[str, list[Any]], metric: str) -> dict[str, Any]:
        """The best point of a grid of options, by a figure: the lowest of costs (`.._us`), the highest of rates."""
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        messages = min(self.messages, _TUNE_MESSAGES_ALOG if contestant.topic == "alog" else _TUNE_MESSAGES)
        found: list[list[float]] = [[] for _ in points]
        for _ in range(1 + (1 if self.quick else _TUNE_REPEATS)):
            for values, point in zip(found, points, strict=True):
                more = _produce_contestants.merged(contestant.options, point)
                values.append(self.measure(contestant, **{**more, "messages": messages})[metric])
        # Without the first pass, in which the broker warms up.
        medians = [statistics.median(values[1:]) for values in found]
        best = medians.index(min(medians) if metric.endswith("_us") else max(medians))
        words = ", ".join(
            f"{'/'.join(map(str, point.values()))}: {median:.3f}"
            if metric.endswith("_us")
            else f"{'/'.join(map(str, point.values()))}: {median / 1e3:.1f} k"
            for point, median in zip(points, medians, strict=True)
        )
        console.print(f"{contestant.name} tried as {'/'.join(grid)}: {words}")
        return points[best]


def both(results: Rounds, above: str, below: str) -> dict[str, Any]:
    """A ratio of rates by wall clock, and the same by the CPU of the process in words."""
    cost = ratio(results, below, above, "process_cpu_us")
    return {
        "figure": ratio(results, above, below, "wall_rate"),
        "also": f"process CPU: {plain(cost)}" if cost else "",
    }


def targets(results: Rounds, soak: dict[str, Any] | None = None) -> list[Target]:
    """The figures to reach, met or missed."""

    def one(name: str, metric: str) -> Spread | None:
        return spread(results[name], metric) if results.get(name) else None

    wall = "wall_rate"
    found = [
        Target(
            "log() of ready bytes, app thread CPU µs",
            0.12,
            one("keven log", "log_us"),
            True,
            digits=3,
            also=f"with flush(): {plain(one('keven log', 'all_us'), 3)}",
        ),
        Target(
            "confluent produce() + poll(0) / log() (app thread CPU)",
            8,
            ratio(results, "confluent log", "keven log", "log_us"),
            also=f"with flush(): {plain(ratio(results, 'confluent log', 'keven log', 'all_us'))}",
        ),
        *(
            Target(f"keven / C loop, {kind} (wall)", 0.95, **both(results, f"keven {kind}", f"c loop {kind}"))
            for kind in COMPRESSIONS
        ),
        Target("keven / confluent, lz4 (wall)", 2, **both(results, "keven lz4", "confluent lz4")),
        Target(
            "keven / confluent on defaults, lz4 (wall)", 2.5, **both(results, "keven lz4", "confluent defaults lz4")
        ),
        Target(
            "1 MB messages: growth / bytes in flight",
            1.1,
            one("keven 1 MB", "growth_share"),
            True,
            also=f"held by the caller: {plain(one('keven 1 MB held', 'growth_share'))}",
        ),
        Target("1 MB messages, lz4: growth / bytes in flight", 1.1, one("keven 1 MB lz4", "growth_share"), True),
        Target("1000 references to 1 MB: growth, MB", 64, one("keven 1 MB shared", "growth_mb"), True, digits=1),
        Target(
            "alog() / AIOProducer, 1000 in flight (wall)",
            5,
            ratio(results, "keven alog", "AIOProducer", wall),
            also=f"polled beside it: {plain(ratio(results, 'keven alog', 'AIOProducer polled', wall))}",
        ),
        *(
            Target(f"alog() / {name}, 1000 in flight (wall)", 5, ratio(results, "keven alog", name, wall))
            for name in ("aiokafka linger 0", "aiokafka")
        ),
        *(
            Target(
                f"{figure}, log() / produce() + flush()",
                1.0,
                one("latency", f"{figure}_share"),
                True,
            )
            for figure in ("p50", "p99")
        ),
    ]
    if soak is not None:
        found += [
            Target(f"growth over {soak['sent']:.0e} messages, %", 2, Spread.of([soak["growth"]]), True, digits=1),
            Target("native objects left after close()", 0, Spread.of([sum(soak["live_objects"].values())]), True),
        ]
    return found


def soak(run: Run, count: int) -> dict[str, Any]:
    """Memory of one logger over `count` messages. Growth is from the second to the last fifth of them."""
    result = run.measure(_produce_contestants.soak(), count=count)
    memory = result["memory"]
    part = max(1, len(memory) // 5)
    first, last = statistics.median(memory[part : 2 * part]), statistics.median(memory[-part:])
    result["growth"] = (last / first - 1) * 100
    fifths = [statistics.median(memory[at : at + part]) for at in range(0, len(memory), part)]
    console.print(
        f"memory in each fifth, MB: {', '.join(f'{entry:.1f}' for entry in fifths)}; peak {result['peak_rss_mb']:.1f}; "
        f"alive after close(): {result['live_objects']}"
    )
    return result


def show(chosen: list[Contestant], results: Rounds) -> None:
    """Print the configurations, and a table for each group of contestants."""
    _report.print_table("Configurations", ("contestant", "configuration"), [(c.name, c.config or "-") for c in chosen])
    for group in GROUPS:
        rows = []
        for contestant in chosen:
            if contestant.topic not in group.topics:
                continue
            if contestant.skipped:
                rows.append((contestant.name, f"skipped: {contestant.skipped}", *("" for _ in group.columns[1:])))
                continue
            rounds = results[contestant.name]
            rows.append(
                (
                    contestant.name,
                    *(
                        in_thousands(spread(rounds, metric))
                        if metric.endswith("_rate")
                        else plain(spread(rounds, metric), digits)
                        for _, metric, digits in group.columns
                    ),
                )
            )
        if rows:
            _report.print_table(
                f"{group.title}: median (range) of the rounds",
                ("contestant", *(title for title, _, _ in group.columns)),
                rows,
            )
            console.print(f"Set for all of them, where nothing else is said: {_produce.in_words(group.settings)}")
    for line in limits(results):
        console.print(line)


def compete(run: Run, chosen: list[Contestant], rounds: int) -> Rounds:
    """Tune the rivals, then run all rounds, one group after the other."""
    run.build_c_loop(chosen)
    _produce_contestants.configure(run.tune, chosen)
    results: Rounds = {}
    for topic in dict.fromkeys(contestant.topic for contestant in chosen):
        group = [contestant for contestant in chosen if contestant.topic == topic]
        if topic in COMPRESSIONS:
            # Not counted: the broker has to have seen such load before it is at its full speed.
            interleave(group[:1], 1, run.round)
        results |= interleave(group, rounds, run.round, lambda line: console.print(f"[dim]{line}[/dim]"))
    return results


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 also when targets are missed, since that is a finding and not a failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.produce", description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000, help="of each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=15, help="of each latency round (default: %(default)s)")
    parser.add_argument("--only", default="*", help="contestants, comma-separated; patterns allowed")
    parser.add_argument("--quick", action="store_true", help="200 000 messages, 2 rounds, each point tuned once")
    parser.add_argument("--soak", action="store_true", help="only memory over --count messages of one logger")
    parser.add_argument("--count", type=int, default=100_000_000, help="messages of --soak (default: %(default)s)")
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--svg", help="draw the wall rates there")
    options = parser.parse_args(arguments)
    if options.quick:
        options.messages, options.rounds = min(options.messages, 200_000), min(options.rounds, 2)
        options.seconds, options.count = min(options.seconds, 4), min(options.count, 5_000_000)
    patterns = [pattern.strip() for pattern in options.only.split(",")]
    chosen = [c for c in contestants() if any(fnmatch.fnmatch(c.name, pattern) for pattern in patterns)]
    if not chosen:
        parser.error(f"--only {options.only!r} matches none of: {', '.join(c.name for c in contestants())}")
    results: Rounds = {}
    memory = None
    with tempfile.TemporaryDirectory(prefix="keven-bench-") as folder, broker() as address:
        facts = _report.machine(address)
        _report.print_machine(facts)
        run = Run(address, Path(folder), options)
        if options.soak:
            memory = soak(run, options.count)
            _report.print_targets("Targets", targets({}, memory)[-2:])
        else:
            results = compete(run, chosen, options.rounds)
            show(chosen, results)
            _report.print_targets(f"Targets: {options.messages:,} messages, {options.rounds} rounds", targets(results))
    if options.json:
        _report.write_json(
            options.json,
            {
                "machine": facts,
                "messages": options.messages,
                "rounds": results,
                "soak": memory,
                "configurations": {c.name: c.skipped or c.config for c in chosen},
                "limits": limits(results),
                "targets": [entry.as_json() for entry in targets(results, memory)],
            },
        )
    bars = {
        c.name: spread(results[c.name], "wall_rate") for c in chosen if c.topic in COMPRESSIONS and c.name in results
    }
    if options.svg and bars:
        _report.write_svg(
            options.svg, f"Produce, {options.messages:,} messages, wall clock", "messages per second", bars
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
