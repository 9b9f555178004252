"""Paired measuring and the stored ratios.

A round measures plain Python and then the compiled code, back to back, by the CPU time of this thread, so a slow spell
of the machine hits both. The ratio is the median over the rounds. It is compared with baseline.json, which holds one
set of ratios for each Python version; measured again, up to twice, before it is called a regression.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STORE = Path(__file__).with_name("baseline.json")
TOLERANCE = 0.10
ROUNDS = 80
WARM_UP = 5
ATTEMPTS = 3
clock = time.thread_time


def python_version() -> str:
    """The key of this interpreter in the store."""
    return ".".join(platform.python_version_tuple()[:2])


class Ratios:
    """The stored ratios of this Python version."""

    def __init__(self, *, update: bool) -> None:
        self.update = update
        content = json.loads(STORE.read_text()) if STORE.exists() else {}
        self.stored: dict[str, float] = content.get(python_version(), {})

    def save(self, name: str, ratio: float) -> None:
        """Make a ratio the stored one."""
        content = json.loads(STORE.read_text()) if STORE.exists() else {}
        content.setdefault(python_version(), {})[name] = round(ratio, 3)
        STORE.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


class Pair:
    """One micro benchmark: `compiled` against `plain`, both for the same number of messages."""

    def __init__(self, benchmark: Any, name: str, ratios: Ratios) -> None:
        self._benchmark = benchmark
        self._name = name
        self._ratios = ratios

    def __call__(
        self,
        compiled: Callable[[], Any],
        plain: Callable[[], Any],
        *,
        setup: Callable[[], Any] = lambda: None,
        limit: float | None = None,
    ) -> None:
        """Measure, then compare with the stored ratio, and with the `limit` that it was promised to keep.

        `setup` runs before each round, unmeasured.
        """
        times: list[float] = []

        def prepare() -> None:
            setup()
            started = clock()
            plain()
            times.append(clock() - started)

        self._benchmark.pedantic(compiled, setup=prepare, rounds=ROUNDS, warmup_rounds=WARM_UP, iterations=1)
        found = _median_ratio(self._benchmark.stats.stats.data, times[-ROUNDS:])
        attempts = 1
        wanted = self._ratios.stored.get(self._name)
        while not self._ratios.update and wanted and found > wanted * (1 + TOLERANCE) and attempts < ATTEMPTS:
            attempts += 1
            found = min(found, self._again(compiled, prepare, times))
        self._benchmark.extra_info.update(ratio=round(found, 3), stored=wanted, attempts=attempts)
        if limit is not None and found > limit:
            pytest.fail(
                f"{self._name} takes {found:.3f} times as long as what it is compared with, more than {limit:g}"
            )
        if self._ratios.update:
            self._ratios.save(self._name, found)
        elif wanted is None:
            pytest.skip(
                f"no stored ratio for Python {python_version()} (measured: {found:.3f}): --update-ratios stores it"
            )
        elif found > wanted * (1 + TOLERANCE):
            pytest.fail(
                f"{self._name} takes {found:.3f} of plain Python's time, stored is {wanted:.3f}: "
                f"{found / wanted - 1:.0%} slower; if that is meant, store it with --update-ratios"
            )

    def _again(self, compiled: Callable[[], Any], prepare: Callable[[], None], times: list[float]) -> float:
        measured = []
        times.clear()
        gc.disable()
        try:
            for _ in range(ROUNDS):
                prepare()
                started = clock()
                compiled()
                measured.append(clock() - started)
        finally:
            gc.enable()
        return _median_ratio(measured, times)


def _median_ratio(measured: list[float], plain: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(measured, plain, strict=True))
