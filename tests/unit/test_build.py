"""The compiled modules are the ones under test, and the test harness itself notices what it promises to notice."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from builds import ROOT, child_environment, compiled_modules, run_python, wrong_builds

NAMES = {
    "library",
    "handle",
    "context",
    "message",
    "dispatch",
    "flow",
    "membership",
    "consumer",
    "producer",
    "logger",
    "mock",
    "oldstyle",
    "suspects",
    "lifeline",
}


def test_every_source_has_its_compiled_module() -> None:
    modules = compiled_modules()
    assert {module.__name__.rpartition(".")[2] for module in modules} == NAMES
    assert wrong_builds(modules, os.environ.get("KEVEN_EXPECTED_BUILD")) == []


def test_every_compiled_module_has_its_stub() -> None:
    assert {stub.stem for stub in (ROOT / "keven_core/_native").glob("*.pyi")} == NAMES


def test_a_python_module_in_place_of_a_compiled_one_is_noticed() -> None:
    fake = types.ModuleType("keven_core._native.fake")
    fake.__file__ = "/somewhere/fake.py"
    assert wrong_builds([fake], None) == ["keven_core._native.fake is not a compiled module: /somewhere/fake.py"]


def test_another_build_is_noticed(tmp_path: Path) -> None:
    problems = wrong_builds(compiled_modules(), str(tmp_path))
    assert len(problems) == len(NAMES)
    assert str(tmp_path) in problems[0]


def test_child_processes_get_the_same_build() -> None:
    ours = compiled_modules()
    names = ", ".join(module.__name__ for module in ours)
    files = "; ".join(f"print({module.__name__}.__file__)" for module in ours)
    result = run_python("-c", f"import {names}; {files}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [module.__file__ for module in ours]


HARNESS = {
    "thread": (
        "import threading\n"
        "def test_it():\n"
        "    thread = threading.Thread(target=lambda: 1 / 0)\n"
        "    thread.start()\n"
        "    thread.join()\n",
        "ZeroDivisionError",
    ),
    "unraisable": (
        "class Broken:\n    def __del__(self):\n        1 / 0\ndef test_it():\n    Broken()\n",
        "ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("case", HARNESS)
def test_an_exception_that_nobody_sees_fails_the_test(case: str, tmp_path: Path) -> None:
    source, expected = HARNESS[case]
    (tmp_path / "test_case.py").write_text(source)
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    result = run_python("-m", "pytest", "-p", "no:cacheprovider", "-q", str(tmp_path), cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert expected in result.stdout
    assert "1 failed" in result.stdout


def test_the_session_ends_at_once_on_another_build(tmp_path: Path) -> None:
    (tmp_path / "test_case.py").write_text("def test_it():\n    pass\n")
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(tmp_path)]
    environ = {**child_environment(), "KEVEN_EXPECTED_BUILD": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environ)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "not the ones under test" in result.stderr
