"""A topic that JSON, MessagePack and protobuf share, against topics of one format each.

    python -m benchmarks.codecs [--messages N] [--rounds N] [--quick] [--json P]

Every third event of the shared topic is of the same format. It should take as long as the three alone: its rate is
compared with the harmonic mean of theirs, in the same round. JSON and MessagePack alone are read without a codec.
"""

from __future__ import annotations

import argparse
import statistics
import sys

from benchmarks import _report, _topics
from benchmarks._broker import broker
from benchmarks._harness import Contestant, Rounds, Spread, interleave, ratio, spread
from benchmarks._report import Target, console
from benchmarks.consume import Run

_SERVER = "benchmarks._keven:run_server"
_ALONE = ("json", "msgpack", "protobuf")


def contestants() -> list[Contestant]:
    """All of them."""
    beside = {"protobuf": True}
    return [
        Contestant("json", _SERVER, "JSON alone"),
        Contestant("msgpack", _SERVER, "MessagePack alone", "msgpack"),
        Contestant("protobuf", _SERVER, "a ProtobufEnvelopeCodec alone", "protobuf", beside, "google.protobuf"),
        Contestant("mixed", _SERVER, "the three by turns", "formats", beside, "google.protobuf"),
        Contestant("json beside", _SERVER, "JSON alone, on a topic with the codec", "json", beside, "google.protobuf"),
    ]


def targets(results: Rounds) -> list[Target]:
    """The figures to reach."""
    kept = [
        shared["wall_rate"] / statistics.harmonic_mean([one["wall_rate"] for one in alone])
        for shared, *alone in zip(results["mixed"], *(results[name] for name in _ALONE), strict=True)
    ]
    return [
        Target("mixed / harmonic mean of the three alone (wall)", 0.9, Spread.of(kept)),
        Target("JSON beside a codec / without one (wall)", 0.9, ratio(results, "json beside", "json", "wall_rate")),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 also when targets are missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codecs", description=__doc__)
    parser.add_argument("--messages", type=int, default=300_000, help="events per round (default: %(default)s)")
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
            for kind in (*_ALONE, "formats"):
                _topics.ensure(address, kind, options.messages)
            results = interleave(chosen, options.rounds, run.round, lambda line: console.print(f"[dim]{line}[/dim]"))
        finally:
            _topics.drop_groups(address, run.groups)
    rows = [
        (
            entry.name,
            entry.config,
            _report.in_thousands(spread(results[entry.name], "wall_rate")),
            _report.plain(Spread.of(1e6 / one["cpu_rate"] for one in results[entry.name])),
        )
        for entry in chosen
    ]
    _report.print_table(
        "Codecs: median (range) of the rounds",
        ("contestant", "what it reads", "msg/s, wall", "owner thread's CPU, µs/msg"),
        rows,
    )
    found = targets(results)
    _report.print_targets(f"Targets: {options.messages:,} events, {options.rounds} rounds", found)
    if options.json:
        _report.write_json(
            options.json, {"machine": facts, "rounds": results, "targets": [entry.as_json() for entry in found]}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
