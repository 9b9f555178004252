"""Clocks and memory of the measured process."""

from __future__ import annotations

import resource
import sys
import time
from array import array
from pathlib import Path
from typing import Any

# The host's own clock, the same in every process (CLOCK_MONOTONIC).
now_ns = time.monotonic_ns


def peak_rss_mb() -> float:
    """Peak resident memory of this process in MB (10^6 bytes)."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage(): on Linux its figure starts with that of the process which started this one.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def rss_mb() -> float:
    """Resident memory of this process now, in MB."""
    import psutil

    return float(psutil.Process().memory_info().rss) / 1e6


def summary(delays: array[int], spec: dict[str, Any]) -> dict[str, Any]:
    """Median and percentiles, in ms, of delays in ns at `rate` a second; those of the first second are left out."""
    # The first second warms up connections and caches.
    kept = sorted(delays[spec["rate"] :]) or [0]

    def at(share: float) -> float:
        return kept[min(len(kept) - 1, int(share * len(kept)))] / 1e6

    return {"messages": len(delays), "p50_ms": at(0.50), "p99_ms": at(0.99), "max_ms": kept[-1] / 1e6}


class Meter:
    """Wall, owner thread's CPU and process CPU between start() and stop(), both called in the owner thread."""

    def __init__(self) -> None:
        self.running = False
        self.wall_s = self.cpu_s = self.process_cpu_s = 0.0

    def start(self) -> None:
        """Start the clocks: the first messages are in hand."""
        self.running = True
        self._process_cpu = time.process_time()
        self._cpu = time.thread_time()
        self._wall = time.perf_counter()

    def stop(self) -> None:
        """Stop the clocks: the last message is handled."""
        self.wall_s = time.perf_counter() - self._wall
        self.cpu_s = time.thread_time() - self._cpu
        self.process_cpu_s = time.process_time() - self._process_cpu
        self.running = False

    def result(self, messages: int) -> dict[str, float]:
        """The figures of a round."""
        return {
            "messages": messages,
            "wall_rate": messages / self.wall_s,
            "cpu_rate": messages / self.cpu_s,
            "process_cpu_us": self.process_cpu_s / messages * 1e6,
            "peak_rss_mb": peak_rss_mb(),
        }
