"""What every benchmark prints and writes: versions and machine, tables, JSON, an SVG plot."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._harness import Spread

console = Console(width=None if os.isatty(1) else 150, highlight=False)
_PACKAGES = ("keven-core", "confluent-kafka", "msgspec", "uvloop", "aiokafka")


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _broker_version(address: str) -> str:
    """What the brokers say of themselves: node count, and the release that their cluster metadata has."""
    from confluent_kafka.admin import AdminClient

    known = AdminClient({"bootstrap.servers": address}).list_topics(timeout=10)
    return f"{len(known.brokers)} at {address}"


def machine(address: str | None = None) -> dict[str, str]:
    """Versions and machine, for the head of a report."""
    import confluent_kafka

    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "librdkafka": confluent_kafka.libversion()[0],
    }
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if "keven-core" not in found:
        import keven_core

        found["keven-core"] = str(getattr(keven_core, "__version__", "in place"))
    if address is not None:
        found["brokers"] = _broker_version(address)
    found["kernel"] = f"{platform.system()} {platform.release()}"
    found["cpu"] = _cpu_model()
    found["cores"] = str(os.cpu_count())
    if hasattr(os, "getloadavg"):
        found["load before"] = f"{os.getloadavg()[0]:.2f}"
    return found


def print_machine(facts: Mapping[str, str]) -> None:
    """Print what machine() found."""
    console.print("  ".join(f"[bold]{key}[/bold] {value}" for key, value in facts.items()))


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table; the first column is text, the others are figures."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def in_thousands(figures: Spread | None) -> str:
    """A rate with its range, in thousands."""
    if figures is None:
        return "-"
    return f"{figures.median / 1e3:,.0f} k ({figures.low / 1e3:,.0f}..{figures.high / 1e3:,.0f})"


def plain(figures: Spread | None, digits: int = 2) -> str:
    """A figure with its range."""
    if figures is None:
        return "-"
    return f"{figures.median:.{digits}f} ({figures.low:.{digits}f}..{figures.high:.{digits}f})"


@dataclass(frozen=True)
class Target:
    """A figure that the project has set itself, and what was measured.

    Attributes:
        label: what is compared with what.
        wanted: the bound.
        at_most: whether the figure has to stay under the bound.
        figure: what was measured; None: it was not.
        also: the same by another clock, for the reader.
        digits: of the printed figures.
    """

    label: str
    wanted: float
    figure: Spread | None
    at_most: bool = False
    also: str = ""
    digits: int = 2

    @property
    def met(self) -> bool | None:
        """Whether the median is within the bound; None: not measured."""
        if self.figure is None:
            return None
        return self.figure.median <= self.wanted if self.at_most else self.figure.median >= self.wanted

    @property
    def verdict(self) -> str:
        """Met, or missed and by how much."""
        if self.figure is None:
            return "not measured"
        if self.met:
            return "met"
        if not self.wanted:
            return "missed"
        return f"missed by {abs(self.figure.median / self.wanted - 1):.1%}"

    def row(self) -> tuple[str, str, str, str, str]:
        """The target as a row of the table."""
        bound = f"{'≤' if self.at_most else '≥'} {self.wanted:g}"
        colour = {True: "green", False: "red", None: "yellow"}[self.met]
        return self.label, bound, plain(self.figure, self.digits), self.also, f"[{colour}]{self.verdict}[/{colour}]"

    def as_json(self) -> dict[str, Any]:
        """The target for the JSON report."""
        return {**asdict(self), "met": self.met, "verdict": self.verdict}


def print_targets(title: str, targets: Iterable[Target]) -> None:
    """Print the table of targets, misses included."""
    print_table(title, ("figure", "target", "median (range)", "also", "verdict"), [entry.row() for entry in targets])


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a report."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=2, default=str) + "\n")
    console.print(f"written: {target}")


def write_svg(path: str | Path, title: str, unit: str, bars: Mapping[str, Spread]) -> None:
    """Draw medians as bars with their range. Says so and goes on when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        console.print("no plot: matplotlib is not installed")
        return
    matplotlib.use("svg")
    from matplotlib import pyplot

    names = list(bars)[::-1]
    medians = [bars[name].median for name in names]
    errors = [
        [bars[name].median - bars[name].low for name in names],
        [bars[name].high - bars[name].median for name in names],
    ]
    colours = [
        "#1f6f8b" if name.startswith("keven") else "#777777" if name.startswith(("limit", "c loop")) else "#b5651d"
        for name in names
    ]
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(names) + 1.2))
    axes.barh(names, medians, xerr=errors, color=colours, ecolor="#333333", capsize=3)
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)
    console.print(f"written: {target}")
