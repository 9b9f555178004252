"""Runs contestants in interleaved rounds, each round in a fresh process, and sums up what they say."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_ROUND_TIMEOUT_S = 600


@dataclass
class Contestant:
    """One thing that is measured.

    Attributes:
        name: as it stands in the tables and in `--only`.
        target: "module:function" that a child process calls with the specification of the round.
        config: how it is configured, for people.
        topic: which kind of topic it reads.
        options: what the target needs to know beside address, topic and count.
        needs: a module without which it is skipped.
        skipped: why it is not run; empty: it is.
    """

    name: str
    target: str
    config: str
    topic: str = "json"
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ""
    skipped: str = ""

    def __post_init__(self) -> None:
        if self.needs and importlib.util.find_spec(self.needs) is None:
            self.skipped = f"{self.needs} is not installed"


Rounds = dict[str, list[dict[str, Any]]]


def run_child(target: str, *, timeout_s: float = _ROUND_TIMEOUT_S, **spec: Any) -> dict[str, Any]:
    """Run one round in a child process and return what it measured. Raises RuntimeError with its error output."""
    argument = json.dumps({"target": target, **spec})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._child", argument],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    if done.returncode:
        raise RuntimeError(f"{target} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def interleave(
    contestants: Iterable[Contestant],
    rounds: int,
    run: Callable[[Contestant, int], dict[str, Any]],
    on_round: Callable[[str], None] = lambda line: None,
) -> Rounds:
    """Run every contestant once per round, each round starting with another one, so that drift hits all alike."""
    runnable = [contestant for contestant in contestants if not contestant.skipped]
    results: Rounds = {contestant.name: [] for contestant in runnable}
    for number in range(rounds):
        first = number * max(1, len(runnable) // max(1, rounds)) % max(1, len(runnable))
        for contestant in runnable[first:] + runnable[:first]:
            started = time.monotonic()
            result = run(contestant, number)
            results[contestant.name].append(result)
            on_round(f"round {number + 1}/{rounds} {contestant.name}: {time.monotonic() - started:.1f} s")
    return results


@dataclass(frozen=True)
class Spread:
    """Median and range of the rounds."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        found = list(values)
        return Spread(statistics.median(found), min(found), max(found), len(found))


def spread(rounds: list[dict[str, Any]], metric: str) -> Spread:
    """The spread of one figure over the rounds."""
    return Spread.of(entry[metric] for entry in rounds)


def ratio(results: Rounds, above: str, below: str, metric: str) -> Spread | None:
    """The spread of above/below, taken round by round; None when one of them was not run."""
    if not results.get(above) or not results.get(below):
        return None
    return Spread.of(a[metric] / b[metric] for a, b in zip(results[above], results[below], strict=True))
