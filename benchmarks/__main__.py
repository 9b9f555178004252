"""All benchmarks one after the other: `python -m benchmarks`, which is `make bench`.

    python -m benchmarks [--quick] [--results FOLDER]

Writes consume.json, consume.svg, in_flight.json, retrying.json, retrying.svg, restart.json, restart.svg, codecs.json,
produce.json, produce.svg, latency.json and micro.json into the folder.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import codecs, consume, in_flight, latency, produce, restart, retrying
from benchmarks._broker import broker
from benchmarks._harness import ROOT


def main() -> int:
    """Run them on one broker; the exit code is that of the micro benchmarks, which fail on a regression."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="default: %(default)s")
    options = parser.parse_args()
    quick = ["--quick"] if options.quick else []
    folder: Path = options.results.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with broker() as address:
        os.environ["KAFKA"] = address
        consume.main([*quick, "--json", str(folder / "consume.json"), "--svg", str(folder / "consume.svg")])
        consume.main([*quick, "--soak"])
        in_flight.main([*quick, "--json", str(folder / "in_flight.json")])
        retrying.main([*quick, "--json", str(folder / "retrying.json"), "--svg", str(folder / "retrying.svg")])
        restart.main([*quick, "--json", str(folder / "restart.json"), "--svg", str(folder / "restart.svg")])
        codecs.main([*quick, "--json", str(folder / "codecs.json")])
        produce.main([*quick, "--json", str(folder / "produce.json"), "--svg", str(folder / "produce.svg")])
        latency.main([*quick, "--json", str(folder / "latency.json")])
    del os.environ["KAFKA"]
    micro = [sys.executable, "-m", "pytest", "-q", "benchmarks/micro", f"--benchmark-json={folder / 'micro.json'}"]
    return subprocess.run(micro, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
