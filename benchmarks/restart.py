"""A server that is ended while it is busy, and the one that goes on after it: how long each takes.

    python -m benchmarks.restart [--rounds N] [--quick] [--json P] [--svg P]

The first gets SIGTERM when as many records as it may have are being handled, for 0.2 to 2 s each: it finishes those,
commits, leaves its group, and ends. Then a new process of the same group is launched, and ends with the first record.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks import _report, _topics
from benchmarks._broker import broker
from benchmarks._harness import Contestant, Rounds, Spread, interleave, run_child, spread
from benchmarks._meter import now_ns
from benchmarks._report import Target, console
from benchmarks.consume import Run

_IN_FLIGHT = 1000
_MESSAGES = 100_000


def contestants() -> list[Contestant]:
    """All of them."""
    at_once = {"order": "key", "max_in_flight": _IN_FLIGHT}
    return [
        Contestant("sync", "", "the default", "keyed", {"is_async": False, "in_flight": 1, "server": {}}),
        Contestant(
            "threads",
            "",
            f'order="key", workers={_IN_FLIGHT}',
            "keyed",
            {"is_async": False, "in_flight": _IN_FLIGHT, "server": {"order": "key", "workers": _IN_FLIGHT}},
        ),
        Contestant(
            "tasks",
            "",
            f'order="key", max_in_flight={_IN_FLIGHT}, `async def` handler, uvloop',
            "keyed",
            {"is_async": True, "in_flight": _IN_FLIGHT, "server": at_once},
        ),
    ]


def one_round(run: Run, contestant: Contestant) -> dict[str, Any]:
    """One server after the other, in the same group."""
    spec = run.spec(contestant.topic, **contestant.options)
    result = run_child("benchmarks._restart:run_drain", **spec)
    if result["left"] or result["handled"] < contestant.options["in_flight"]:
        raise RuntimeError(f"{contestant.name}: {result}")
    launched_ns = now_ns()
    start = run_child("benchmarks._restart:run_start", **spec)
    return {
        **result,
        "over_longest_s": result["drain_s"] - result["longest_s"],
        "launch_s": (start["first_ns"] - launched_ns) / 1e9,
        "first_s": (start["first_ns"] - start["assigned_ns"]) / 1e9,
    }


def _of(results: Rounds, name: str, metric: str) -> Spread | None:
    return spread(results[name], metric) if results.get(name) else None


def targets(results: Rounds) -> list[Target]:
    """The figures to reach."""
    return [
        *(
            Target(
                f"{name}: drain of {entry}, beyond the longest handler, s",
                1.0,
                _of(results, name, "over_longest_s"),
                at_most=True,
                also=f"after the last handler: {_report.plain(_of(results, name, 'after_last_s'))}",
            )
            # The plain server goes on with its batch for half of the time that it may drain in.
            for name, entry in (("threads", _IN_FLIGHT), ("tasks", _IN_FLIGHT))
        ),
        *(
            Target(
                f"{name}: from the assignment to the first record, s",
                1.0,
                _of(results, name, "first_s"),
                at_most=True,
                also=f"from the launch, after the other has left: {_report.plain(_of(results, name, 'launch_s'))}",
                digits=3,
            )
            for name in results
        ),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 also when targets are missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restart", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="2 rounds")
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--svg", help="draw the seconds from launch to first record there")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = min(options.rounds, 2)
    with broker() as address:
        facts = _report.machine(address)
        _report.print_machine(facts)
        run = Run(address, _MESSAGES, options.quick)
        try:
            _topics.ensure(address, "keyed", _MESSAGES)
            results = interleave(
                contestants(),
                options.rounds,
                lambda contestant, number: one_round(run, contestant),
                lambda line: console.print(f"[dim]{line}[/dim]"),
            )
        finally:
            _topics.drop_groups(address, run.groups)
            _topics.drop_copies(address, run.groups)
    found = targets(results)
    _report.print_targets(f"Targets: {options.rounds} rounds", found)
    if options.json:
        _report.write_json(
            options.json,
            {"machine": facts, "rounds": results, "targets": [entry.as_json() for entry in found]},
        )
    if options.svg:
        bars = {f"keven {name}": spread(rounds, "launch_s") for name, rounds in results.items()}
        _report.write_svg(options.svg, "Restart: launch to first record", "seconds", bars)
    return 0


if __name__ == "__main__":
    sys.exit(main())
