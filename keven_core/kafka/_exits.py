"""Exit codes: a script that is ended by an error of this library with a code of its own exits with that code."""

from __future__ import annotations

import sys
from types import TracebackType

from keven_core.kafka.errors import KevenError

__all__ = ["exit_with_its_code"]

_previous = None


def exit_with_its_code(
    kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """See to the exit code of an error that leaves a server, should it end the script. For ExitStack.push()."""
    global _previous
    if isinstance(error, KevenError) and error.exit_code != 1 and sys.excepthook is not _excepthook:
        _previous, sys.excepthook = sys.excepthook, _excepthook


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    assert _previous is not None
    _previous(kind, error, trace)
    if isinstance(error, KevenError) and error.exit_code != 1:
        # Python itself exits with 1, but heeds a SystemExit of the hook (pythonrun.c, _PyErr_PrintEx).
        raise SystemExit(error.exit_code)
