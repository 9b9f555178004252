"""What type checkers make of services' code: each line of the examples says what it is revealed as, or its error.

`# R: type` behind reveal_type(...), `# E: message  [code]` behind a mistake; a line without either must pass.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from builds import ROOT

pytest.importorskip("mypy", reason="mypy is not installed: pip install 'keven-core[test]'")

EXAMPLES = sorted((Path(__file__).parent / "examples").glob("*.py"))


def expected(path: Path) -> list[str]:
    """Each remark in a file, as `line: R or E: text`."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for kind, text in re.findall(r"  # ([RE]): (.+?)(?=  # [RE]: |$)", line):
            found.append(f"{number}: {kind}: {text}")
    return found


def _plain(revealed: str) -> str:
    for module in ("builtins", "typing", "collections.abc"):
        revealed = re.sub(rf"\b{re.escape(module)}\.", "", revealed)
    return revealed


@pytest.fixture(scope="module")
def mypy_said() -> dict[str, list[str]]:
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--no-error-summary"]
    command += ["--hide-error-context", "--no-pretty", "--no-color-output", *map(str, EXAMPLES)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert result.returncode in (0, 1), result.stdout + result.stderr
    said: dict[str, list[str]] = {path.name: [] for path in EXAMPLES}
    for line in result.stdout.splitlines():
        match = re.match(r"(.+?):(\d+): (note|error): (.*)$", line)
        assert match is not None, line
        file, number, kind, text = match.groups()
        if kind == "error":
            said[Path(file).name].append(f"{number}: E: {text}")
        elif text.startswith("Revealed type is "):
            said[Path(file).name].append(f"{number}: R: {_plain(text[18:-1])}")
    return said


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4
    assert sum(len(expected(path)) for path in EXAMPLES) > 60


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_line_is_typed_as_it_says(path: Path, mypy_said: dict[str, list[str]]) -> None:
    assert sorted(mypy_said[path.name]) == sorted(expected(path))
