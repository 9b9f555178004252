"""Runs the tests in parts, side by side: most of their time is waiting for brokers, not work.

    python tools/test_in_parts.py

Each part is a pytest of its own over some folders of tests/, and starts the brokers that it needs for itself. While
they run, their progress comes line by line, with the part's name in front. When all have ended, each part's report
follows as pytest writes it (failures, skip reasons, summary), those of failed parts last, and then a line for each
part. The exit code is 0 if it is for every part. Ctrl-C, SIGTERM and SIGHUP end every part as Ctrl-C ends pytest.
For options use pytest itself, or PYTEST_ADDOPTS.
"""

import re
import signal
import subprocess
import sys
import threading
import time

# The launcher's own tests start a dozen brokers. They go with the faults, so that these parts take about equally long.
_LAUNCHER = "tests/integration/test_real_kafka.py"
_LONG = {
    "embedded": ["tests/embedded"],
    "integration": ["tests/integration", f"--ignore={_LAUNCHER}"],
    "faults": ["tests/faults", _LAUNCHER],
}
# Whatever is not in one of them is in the first, so that no folder is left out.
PARTS = {"others": ["tests", *(f"--ignore={folders[0]}" for folders in _LONG.values())], **_LONG}


class Part:
    """One pytest. A thread reads its output: progress is printed at once, the report is kept.

    Attributes:
        name: as in PARTS.
        report: lines from the first heading after the session's own; all lines, if it ended without a report.
        took_s: seconds from start to end.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.report: list[str] = []
        self.took_s = 0.0
        command = [sys.executable, "-m", "pytest", *PARTS[name]]
        # The note of what failed, for `pytest --lf`, is one file: each would overwrite it.
        command += ["-p", "no:cacheprovider", f"--color={'yes' if sys.stdout.isatty() else 'no'}"]
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            # Its own session: a terminal's Ctrl-C reaches it through `interrupt`, and not twice.
            start_new_session=True,
        )
        self._thread = threading.Thread(target=self._read, name=name)
        self._thread.start()

    def interrupt(self) -> None:
        """End it as Ctrl-C does: running tests are torn down, the report comes."""
        self._process.send_signal(signal.SIGINT)

    def wait(self) -> int:
        """Wait until it has ended and all output is read; return its exit code."""
        self._thread.join()
        return self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        lines, headings = [], []
        for line in self._process.stdout:
            if re.match(r"(\x1b\[[\d;]*m)*={3}", line):
                headings.append(len(lines))
            lines.append(line)
            if len(headings) < 2:
                print(f"{self.name:11} | {line}", end="", flush=True)
        self.report = lines[headings[1] :] if len(headings) > 1 else lines
        self.took_s = time.monotonic() - self._started


def main() -> int:
    """Run all parts; return the exit code: 0, 130 if it was interrupted, else the first that is not 0."""
    parts: list[Part] = []
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        for part in parts:
            part.interrupt()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    for name in PARTS:
        parts.append(Part(name))
    if interrupted:  # perhaps before the last of them was known
        interrupt()
    codes = {part: part.wait() for part in parts}
    parts.sort(key=lambda part: codes[part] != 0)
    for part in parts:
        print(f"\n{part.name}:\n{''.join(part.report)}", end="")
    print()
    for part in parts:
        outcome = f"FAILED with exit code {codes[part]}" if codes[part] else "passed"
        print(f"{part.name:11} {outcome} in {part.took_s:.0f} s")
    return 130 if interrupted else next(filter(None, codes.values()), 0)


if __name__ == "__main__":
    sys.exit(main())
