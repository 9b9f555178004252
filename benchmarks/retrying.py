"""Records that fail into the retry topic: what the others lose by it.

    python -m benchmarks.retrying [--messages N] [--rounds N] [--quick] [--json P] [--svg P]

One of 100 events fails the first time that it is handled, and is copied to the retry topic. Counted are the others,
from the first to the last, against a server of the same settings without failures. "later": what has failed is due
after the run, so it is copied and held; "at once": it is due after 0.1 s, so attempts are made between the new ones.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks import _report, _topics
from benchmarks._broker import broker
from benchmarks._harness import Contestant, Rounds, interleave, ratio, run_child, spread
from benchmarks._report import Target, console
from benchmarks.consume import Run
from benchmarks.in_flight import IN_FLIGHT

_FAILS_EVERY = 100
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sync": (
        "a handler that does nothing, one record after the other",
        {"is_async": False, "work_us": 0, "server": {}},
    ),
    "sync, 10 µs": (
        "a handler that works for 10 µs, one record after the other",
        {"is_async": False, "work_us": 10, "server": {}},
    ),
    "in flight": (
        f'a handler that awaits 1 ms, order="key", max_in_flight={IN_FLIGHT}, uvloop',
        {"is_async": True, "server": {"order": "key", "max_in_flight": IN_FLIGHT}},
    ),
}
_FAILURES = {
    "no failures": {"fails_every": 0, "retry_interval": 600},
    "1 % later": {"fails_every": _FAILS_EVERY, "retry_interval": 600},
    "1 % at once": {"fails_every": _FAILS_EVERY, "retry_interval": 0.1},
}


def contestants() -> list[Contestant]:
    """All of them."""
    return [
        Contestant(
            f"{kind}, {failures}",
            "benchmarks._retrying:run_server",
            config,
            "keyed",
            {**options, **_FAILURES[failures]},
        )
        for kind, (config, options) in _KINDS.items()
        for failures in _FAILURES
    ]


def one_round(run: Run, contestant: Contestant) -> dict[str, Any]:
    """A round of one contestant, its failures checked."""
    result = run_child(contestant.target, **run.spec(contestant.topic, **contestant.options))
    failed = run.messages // _FAILS_EVERY if contestant.options["fails_every"] else 0
    if result["failed"] > failed or result["dead"] or (failed and not result["failed"]):
        raise RuntimeError(f"{contestant.name}: {result} instead of {failed} events that failed once")
    return result


def targets(results: Rounds) -> list[Target]:
    """The figures to reach."""
    return [
        Target(
            f"{kind}: good records with {failures} / none failing (wall)",
            0.9,
            ratio(results, f"{kind}, {failures}", f"{kind}, no failures", "wall_rate"),
            also=f"CPU: {_report.plain(ratio(results, f'{kind}, {failures}', f'{kind}, no failures', 'cpu_rate'))}",
        )
        for kind in _KINDS
        for failures in list(_FAILURES)[1:]
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 also when targets are missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrying", description=__doc__)
    parser.add_argument("--messages", type=int, default=500_000, help="events per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="100 000 events, 2 rounds")
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--svg", help="draw the wall rates there")
    options = parser.parse_args(arguments)
    if options.quick:
        options.messages, options.rounds = min(options.messages, 100_000), min(options.rounds, 2)
    chosen = contestants()
    with broker() as address:
        facts = _report.machine(address)
        _report.print_machine(facts)
        run = Run(address, options.messages, options.quick)
        try:
            _topics.ensure(address, "keyed", options.messages)
            results = interleave(
                chosen,
                options.rounds,
                lambda contestant, number: one_round(run, contestant),
                lambda line: console.print(f"[dim]{line}[/dim]"),
            )
        finally:
            _topics.drop_groups(address, run.groups)
            _topics.drop_copies(address, run.groups)
    _report.print_table(
        "Good records: median (range) of the rounds",
        ("contestant", "configuration", "msg/s, wall", "msg per CPU s of the owner thread", "tried again meanwhile"),
        [
            (
                entry.name,
                entry.config,
                _report.in_thousands(spread(results[entry.name], "wall_rate")),
                _report.in_thousands(spread(results[entry.name], "cpu_rate")),
                _report.plain(spread(results[entry.name], "tried_again"), 0),
            )
            for entry in chosen
        ],
    )
    found = targets(results)
    _report.print_targets(f"Targets: {options.messages:,} events, {options.rounds} rounds", found)
    if options.json:
        _report.write_json(
            options.json,
            {
                "machine": facts,
                "messages": options.messages,
                "rounds": results,
                "targets": [entry.as_json() for entry in found],
            },
        )
    if options.svg:
        bars = {f"keven {name}": spread(rounds, "wall_rate") for name, rounds in results.items()}
        _report.write_svg(options.svg, f"Good records, {options.messages:,} events", "messages per second", bars)
    return 0


if __name__ == "__main__":
    sys.exit(main())
