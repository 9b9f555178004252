"""Waiting for a condition with a deadline; the tests never sleep for a fixed time."""

import time
from collections.abc import Callable
from typing import TypeVar

import psutil
import pytest

Result = TypeVar("Result")


def wait_until(condition: Callable[[], Result], timeout_s: float = 10.0, what: str = "") -> Result:
    """Ask `condition` again and again until it is true, and return what it gave; fail the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s} s: {what or getattr(condition, '__name__', condition)}")
        time.sleep(0.005)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; nobody may have asked yet for the exit code of an orphan."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
