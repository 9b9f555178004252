"""A script that an error of a server ends has that error's exit code, and shows the error as it would anyway."""

import subprocess
import sys

import pytest

from keven_core.kafka import errors

SCRIPT = """
import sys
from contextlib import ExitStack
from keven_core.kafka import errors
from keven_core.kafka._exits import exit_with_its_code

def own(kind, error, trace):
    print("own hook:", kind.__name__, flush=True)
    sys.__excepthook__(kind, error, trace)

sys.excepthook = own
for number in range(2):
    with ExitStack() as stack:
        stack.push(exit_with_its_code)
        try:
            with ExitStack() as inner:
                inner.push(exit_with_its_code)
                raise errors.CommitError("an earlier one, which was handled")
        except errors.CommitError:
            pass
with ExitStack() as stack:
    stack.push(exit_with_its_code)
    raise {error}
"""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("errors.DrainError('x')", 3),
        ("errors.CommitError('x')", 4),
        ("errors.DrainError('x', exit_code=5)", 5),
        ("errors.LedgerError('x')", 1),
        ("ValueError('x')", 1),
        ("SystemExit(7)", 7),
    ],
)
def test_exit_codes(error: str, code: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(error=error)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == code, ended.stderr
    if "SystemExit" in error:
        return
    name = error.partition("(")[0].removeprefix("errors.")
    assert ended.stdout.splitlines() == [f"own hook: {name}"]
    assert ended.stderr.startswith("Traceback")
    assert ended.stderr.count("Traceback") == 1
    assert ended.stderr.rstrip().endswith(f"{name}: x")


def test_errors_without_a_code_of_their_own_are_as_any_other() -> None:
    assert errors.KevenError("x").exit_code == 1
    codes = {errors.DrainError("x").exit_code, errors.CommitError("x").exit_code, 1, 0}
    assert len(codes) == 4
