"""tools/test_in_parts.py: every folder is run, no failure is hidden, and Ctrl-C ends all of it in order."""

import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from builds import ROOT, child_environment
from waiting import wait_until

SCRIPT = ROOT / "tools/test_in_parts.py"
PARTS = runpy.run_path(str(SCRIPT))["PARTS"]

PASSES = "def test_it(): pass\n"
SKIPS = "import pytest\ndef test_skipped(): pytest.skip('no such thing here')\n"
FAILS = "def test_wrong(): assert 1 == 2\n"
DIES = """
import os
def test_last(capfd):
    with capfd.disabled():
        print("last words", flush=True)
    os._exit(3)
"""


def test_each_file_is_in_one_part() -> None:
    files = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(files) > 60

    def runs(arguments: list[str], file: Path) -> bool:
        ignored = [each.removeprefix("--ignore=") for each in arguments if each.startswith("--ignore=")]
        return any(map(file.is_relative_to, arguments)) and not any(map(file.is_relative_to, ignored))

    for file in files:
        assert sum(runs(arguments, file) for arguments in PARTS.values()) == 1, file


def start(folder: Path, tests: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start it in a folder with these files below tests/, and those without which a part would have nothing to do."""
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -ra\n")
    for name, text in {"embedded/test_d.py": PASSES, "integration/test_real_kafka.py": "", **tests}.items():
        path = folder / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(PYTEST_ADDOPTS=""),
    )


def run(folder: Path, tests: Mapping[str, str]) -> tuple[int, str]:
    """Run it to its end; its exit code and output."""
    with start(folder, tests) as process:
        out, err = process.communicate(timeout=90)
    assert err == ""
    return process.returncode, out


def test_all_parts_pass(tmp_path: Path) -> None:
    """A folder that no part names is run with the others; skip reasons are shown."""
    files = {"integration/test_a.py": PASSES, "faults/test_b.py": PASSES, "new/test_c.py": PASSES + SKIPS}
    code, out = run(tmp_path, files)
    assert code == 0, out
    for part, name in (("integration", "integration/test_a"), ("faults", "faults/test_b"), ("others", "new/test_c")):
        assert re.search(rf"^{part} +\| tests/{name}.py \.", out, re.MULTILINE), out
    assert "no such thing here" in out
    assert out.count("1 passed") == 4
    assert re.findall(r"^(\w+) +passed in \d+ s$", out, re.MULTILINE) == [*PARTS]


def test_failures_come_last_and_fail_the_run(tmp_path: Path) -> None:
    """One test fails, one takes its pytest with it; what passed is reported before them."""
    code, out = run(tmp_path, {"unit/test_a.py": FAILS, "integration/test_b.py": PASSES, "faults/test_c.py": DIES})
    assert code == 1
    passed, _, failed = out.partition("\nothers:\n")
    assert "\nintegration:\n" in passed
    assert "assert 1 == 2" in failed
    assert "FAILED tests/unit/test_a.py::test_wrong" in failed
    # There is no report of this one: all that it wrote comes again.
    assert "last words" in failed.partition("\nfaults:\n")[2]
    assert re.findall(r"^(\w+) +(passed|FAILED with exit code \d) in \d+ s$", out, re.MULTILINE) == [
        ("embedded", "passed"),
        ("integration", "passed"),
        ("others", "FAILED with exit code 1"),
        ("faults", "FAILED with exit code 3"),
    ]


WAITS = """
import pathlib, signal, pytest

here = pathlib.Path(__file__)


@pytest.fixture
def torn_down():
    yield
    here.with_suffix(".ended").touch()


def test_it(torn_down):
    here.with_suffix(".started").touch()
    signal.pause()
"""


def test_ctrl_c_ends_all_parts_in_order(tmp_path: Path) -> None:
    names = ["unit/test_a.py", "integration/test_b.py", "faults/test_c.py", "embedded/test_d.py"]
    with start(tmp_path, dict.fromkeys(names, WAITS)) as process:
        paths = [tmp_path / "tests" / name for name in names]
        try:
            wait_until(lambda: all(path.with_suffix(".started").exists() for path in paths), 60, "all are at work")
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 130
    assert out.count("KeyboardInterrupt") >= 4
    assert all(path.with_suffix(".ended").exists() for path in paths)
