"""Runs the sample service of tests/dropin, unchanged, and reads what it has observed."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "dropin"
Line = dict[str, Any]


class Sample:
    """The service in a folder of its own.

    Arguments:
        address: the broker's; one that nobody listens at will do for what needs no broker.
        name: of the servers, thus their client and group id.
    """

    def __init__(self, folder: Path, address: str, name: str = "shop") -> None:
        self.file = folder / f"{name}.jsonl"
        self.environment = {
            **os.environ,
            "KAFKA": address,
            "PYTHONPATH": str(FOLDER),
            "PYTHONUNBUFFERED": "1",
            "SAMPLE_SERVICE_NAME": name,
            "SAMPLE_SERVICE_RECORD": str(self.file),
            "SAMPLE_SERVICE_SECONDS": "6",
            "KEVEN_LARGE_ATTRIBUTE_DIR": str(folder / "large"),
        }

    def lines(self, what: str | None = None, **fields: Any) -> list[Line]:
        """What was observed so far, in the order written: the lines that have these fields."""
        if not self.file.exists():
            return []
        wanted = fields if what is None else {"what": what, **fields}
        found = [json.loads(line) for line in self.file.read_text().splitlines()]
        return [line for line in found if wanted.items() <= line.items()]

    def handlers(self) -> Counter[str]:
        """How often each handler was called, but for what wakes a worker."""
        return Counter(
            line["handler"] for line in self.lines("handled") if line["handler"] not in ("ping", "warm_cache")
        )

    def run(self, module: str, argument: str, timeout_s: float = 60) -> None:
        """Run one of its scripts to the end."""
        done = subprocess.run(
            [sys.executable, "-m", f"sample_service.{module}", argument],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    @contextmanager
    def worker(self, mode: str) -> Iterator[subprocess.Popen[str]]:
        """A worker meanwhile; ended as a terminal would, unless it has ended by itself."""
        log = self.file.with_suffix(f".{mode}.log")
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "sample_service.worker", mode],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
            try:
                yield process
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
                process.wait(30)
            except BaseException as error:
                error.add_note(log.read_text()) if hasattr(error, "add_note") else None
                raise
            finally:
                process.kill()
                process.wait()
