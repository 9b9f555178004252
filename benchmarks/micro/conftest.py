"""Fixtures of the micro benchmarks, and their option --update-ratios."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.micro import _ratios
from keven_core.testing.embedded import EmbeddedKafka


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-ratios", action="store_true", help="store the measured ratios as the new baseline")


@pytest.fixture
def pair(benchmark: Any, request: pytest.FixtureRequest) -> _ratios.Pair:
    ratios = _ratios.Ratios(update=request.config.getoption("--update-ratios"))
    return _ratios.Pair(benchmark, request.node.name.removeprefix("test_"), ratios)


@pytest.fixture(scope="module")
def kafka() -> Iterator[EmbeddedKafka]:
    with EmbeddedKafka() as cluster:
        yield cluster


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    found = [bench for bench in getattr(session, "benchmarks", []) if "ratio" in bench.extra_info]
    if found:
        terminalreporter.section("ratio to plain Python, per message (1.0: as fast as the bare loop)")
    for bench in found:
        info = bench.extra_info
        terminalreporter.write_line(f"{bench.name:45} {info['ratio']:8.3f}  stored {info['stored']}")
