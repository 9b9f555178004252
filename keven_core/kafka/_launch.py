"""Launches a server in a process of its own: a fresh interpreter, never a fork of one with live clients.

The worker imports the main script under the name `__mp_main__`, as multiprocessing's spawn does, so that the handlers
defined there are registered. A script without a `__main__` guard reaches the launching call again in the worker: there
the call ends the import of the script, and the server starts with the handlers above it.

The worker holds the read end of a pipe. When the launching process dies, the pipe closes and the worker stops in order;
after 3 s it is ended.
"""

from __future__ import annotations

import atexit
import os
import pickle
import runpy
import struct
import subprocess
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

from keven_core.kafka import _supervised
from keven_core.kafka.errors import LaunchError

__all__ = ["ORPHAN_GRACE_S", "ServerProcess", "launch", "packed", "read_part", "spawn"]

# How long a process goes on, to end in order, when the one that launched it is gone.
ORPHAN_GRACE_S = 3.0

# Set in a worker while it imports the main script.
_importing_main = False

_live: set[ServerProcess] = set()


class _MainImported(BaseException):
    """Ends the import of the main script in a worker; not an Exception, so that no handler of the script catches it."""


class ServerProcess:
    """A server in a process of its own; the surface of multiprocessing.Process that services use.

    As there, the launching process waits at its exit for servers that still run.
    """

    def __init__(self, name: str, popen: subprocess.Popen[bytes], pipe: int) -> None:
        self.name = name
        self._popen = popen
        self._pipe = pipe
        _live.add(self)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._popen.pid

    @property
    def exitcode(self) -> int | None:
        """None while it runs; 0 after an end in order with everything committed; -N after signal N.

        After an error that has ended it the `exit_code` of that: 3 a handler was cut off, as the time was over; 4 what
        was handled is not confirmed as committed; 5 a handler was cut off by a second signal; 1 any other.
        """
        code = self._popen.poll()
        if code is not None:
            self._release()
        return code

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        """Wait until it ends, at most `timeout` seconds; tell by `exitcode` which it was."""
        try:
            self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            return
        self._release()

    def terminate(self) -> None:
        """Ask it to end in order (SIGTERM): finish the batch in hand, commit, leave the group."""
        if self.is_alive():
            self._popen.terminate()

    def kill(self) -> None:
        """End it at once (SIGKILL); what was not committed is handled again by others.

        Workers of a supervisor are not killed: they end in order, within 5 s.
        """
        if self.is_alive():
            self._popen.kill()

    def _release(self) -> None:
        if self in _live:
            _live.discard(self)
            os.close(self._pipe)

    def __repr__(self) -> str:
        return f"<ServerProcess {self.name!r} pid={self.pid} exitcode={self.exitcode}>"


def _join_all() -> None:
    for process in list(_live):
        process.join()


def _disown_in_child() -> None:
    # The workers belong to the parent: a forked child must neither wait for them nor keep their pipes open.
    for process in list(_live):
        process._release()


atexit.register(_join_all)
os.register_at_fork(after_in_child=_disown_in_child)


def _main_location() -> dict[str, str]:
    """How a worker finds the main script: {"module": name} or {"path": file}."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    # `python folder` and `python app.zip` have a spec too, without a name that could be imported.
    if spec is not None and spec.name != "__main__":
        return {"module": spec.name}
    path = getattr(main, "__file__", None)
    if path is None or not os.path.exists(path):
        raise LaunchError(
            "a server process can only be started from a script or module, since it imports that to find the handlers; "
            "`python -c`, standard input and notebooks have none: put the handlers and the call into a file"
        )
    return {"path": os.path.abspath(path)}


def launch(name: str, target: Callable[..., Any], kwargs: dict[str, Any]) -> ServerProcess:
    """Run target(**kwargs) in a new process that has imported the main script; returns its handle at once.

    `target` has to be importable and `kwargs` picklable. Raises LaunchError when there is no script to import.
    """
    return ServerProcess(name, *spawn("keven_core.kafka._launch", *packed(target, kwargs)))


def packed(target: Callable[..., Any], kwargs: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Where a worker finds the main script, and what it is to run there; raises LaunchError as launch() does."""
    if _importing_main:
        raise _MainImported
    header = {"argv": sys.argv, "main": _main_location()}
    try:
        return header, pickle.dumps((target, kwargs))
    except Exception as error:
        raise LaunchError(f"the arguments of the server process can't be pickled: {error}") from error


def spawn(
    module: str, header: dict[str, Any], payload: bytes, *, fds: Iterable[int] = (), new_session: bool = False
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a fresh interpreter that runs work() of a module; returns it and the pipe that keeps it going.

    Arguments:
        header, payload: what work() reads from the pipe.
        fds: open files that it inherits, under the same numbers.
        new_session: keep what a terminal sends to its foreground processes, like Ctrl-C, from it.

    Raises LaunchError when it ends before it has read that.
    """
    read_end, write_end = os.pipe()
    code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import work; work({read_end})"
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
    try:
        popen = subprocess.Popen(
            [sys.executable, *flags, "-c", code], pass_fds=[read_end, *fds], start_new_session=new_session
        )
    except BaseException:
        os.close(write_end)
        raise
    finally:
        os.close(read_end)
    # Not inherited by other children: only this process's end keeps the worker going.
    data = pickle.dumps(header)
    try:
        with os.fdopen(os.dup(write_end), "wb") as pipe:
            for part in (data, payload):
                pipe.write(struct.pack(">Q", len(part)) + part)
    except BrokenPipeError:
        os.close(write_end)
        code_of_it = popen.wait()
        raise LaunchError(f"the server process ended at once, with exit code {code_of_it}") from None
    return popen, write_end


def read_part(fd: int) -> bytes:
    """The next part of what the launching process has written; in the launched one."""

    def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = os.read(fd, size - len(data))
            if not part:
                raise SystemExit("the launching process ended before the server started")
            data += part
        return data

    return exactly(struct.unpack(">Q", exactly(8))[0])


def _import_main(main: dict[str, str]) -> None:
    global _importing_main
    module = types.ModuleType("__mp_main__")
    _importing_main = True
    try:
        if "module" in main:
            module.__dict__.update(runpy.run_module(main["module"], run_name="__mp_main__", alter_sys=True))
        else:
            _run_path(main["path"], module)
    except _MainImported as ended:
        # The classes of a script that was cut short live in its frame's globals, which pickle has to find by name.
        trace = ended.__traceback__
        while trace is not None:
            if trace.tb_frame.f_globals.get("__name__") == "__mp_main__":
                module.__dict__.update(trace.tb_frame.f_globals)
                break
            trace = trace.tb_next
    finally:
        _importing_main = False
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module


def _run_path(path: str, module: types.ModuleType) -> None:
    module.__file__ = path
    sys.modules["__mp_main__"] = module
    with open(path, "rb") as source:
        code = compile(source.read(), path, "exec")
    exec(code, module.__dict__)


def work(fd: int) -> None:
    """The worker's main function: import the main script, then run the server until it ends."""
    from keven_core._native import lifeline

    os.set_inheritable(fd, False)
    header = pickle.loads(read_part(fd))  # from the launching process, over a pipe that nobody else holds
    sys.argv[:] = header["argv"]
    payload = read_part(fd)
    lifeline.hold(fd, int(ORPHAN_GRACE_S * 1000))
    with _supervised.life(header.get("supervised")):
        _import_main(header["main"])
        target, kwargs = pickle.loads(payload)
        target(**kwargs)
