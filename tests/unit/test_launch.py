"""Server processes, without Kafka: how a worker finds the main script, what it imports of it, and how it ends."""

import os
import pickle
import signal
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from builds import child_environment, run_python
from waiting import is_gone, wait_until

from keven_core.kafka import _launch
from keven_core.kafka.errors import LaunchError

# What the workers of these tests run instead of a server.
TARGET = """
import itertools, json, os, signal, sys, time

def report(path, **more):
    from keven_core.kafka.abstracts.event_handler import EventHandler
    found = {"handlers": EventHandler.events_with_handlers(), "pid": os.getpid(), "argv": sys.argv[1:], **more}
    with open(path + ".part", "w") as out:
        json.dump(found, out)
    os.rename(path + ".part", path)

def until_terminated(path):
    stopped = []
    signal.signal(signal.SIGTERM, lambda *frame: stopped.append(1))
    report(path)
    while not stopped:
        time.sleep(0.01)
    report(path + ".end")

def deaf_and_busy(path):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report(path)
    # In one call into C that never lets go of the GIL.
    max(itertools.repeat(0))

def raise_error():
    raise ZeroDivisionError("on purpose")
"""

SCRIPT = """
import sys
from keven_core.kafka.abstracts.event_handler import EventHandler
from keven_core.kafka._launch import launch
import target

class Above(EventHandler):
    event_name = "ABOVE"
    def handle_event(self, event): ...

try:
    process = launch("worker", target.report, {"path": sys.argv[1]})
except Exception as error:
    print("caught", error)
    raise

class Below(EventHandler):
    event_name = "BELOW"
    def handle_event(self, event): ...

process.join()
print("ended", process.exitcode, __name__, flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "target.py").write_text(TARGET)
    return tmp_path


def _run(folder: Path, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return run_python(*arguments, cwd=folder, stdin=stdin)


def _read(path: Path) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(path.read_text())
    return found


# --- finding the main script -----------------------------------------------------------------------------------------


def _as_main(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> None:
    main = types.ModuleType("__main__")
    for name, value in attributes.items():
        setattr(main, name, value)
    monkeypatch.setitem(sys.modules, "__main__", main)


def test_a_script_is_found_by_its_absolute_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text("")
    monkeypatch.chdir(tmp_path)
    _as_main(monkeypatch, __file__="service.py", __spec__=None)
    assert _launch._main_location() == {"path": str(tmp_path / "service.py")}


def test_a_module_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _as_main(monkeypatch, __spec__=types.SimpleNamespace(name="shop.service"))
    assert _launch._main_location() == {"module": "shop.service"}


@pytest.mark.parametrize("attributes", [{}, {"__file__": "/does/not/exist.py"}, {"__file__": "<stdin>"}])
def test_without_a_script_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, attributes: dict[str, str]) -> None:
    _as_main(monkeypatch, **attributes)
    with pytest.raises(LaunchError, match=r"`python -c`, standard input and notebooks have none: put the handlers"):
        _launch._main_location()


def test_arguments_that_cant_be_pickled_are_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*arguments: Any, **options: Any) -> None:
        pytest.fail("a process was started")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    monkeypatch.setattr(_launch, "_main_location", lambda: {"path": __file__})
    with pytest.raises(LaunchError, match=r"the arguments of the server process can't be pickled: "):
        _launch.launch("worker", print, {"callback": lambda: None})


def test_while_the_worker_imports_the_script_launching_ends_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_importing_main", True)
    with pytest.raises(BaseException) as caught:  # a class of its own, not an Exception
        _launch.launch("worker", print, {})
    assert type(caught.value) is _launch._MainImported
    assert not isinstance(caught.value, Exception)


# --- the pipe --------------------------------------------------------------------------------------------------------


def test_a_part_may_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    payload = pickle.dumps(list(range(100)))
    os.write(write_end, struct.pack(">Q", len(payload)) + payload + b"the next part")
    read = os.read
    monkeypatch.setattr(_launch.os, "read", lambda fd, size: read(fd, min(size, 3)))
    try:
        assert pickle.loads(_launch.read_part(read_end)) == list(range(100))
        assert read(read_end, 100) == b"the next part"
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize("sent", [b"", b"\x00\x00", struct.pack(">Q", 10) + b"short"])
def test_a_launching_process_that_ends_early_is_noticed(sent: bytes) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, sent)
    os.close(write_end)
    try:
        with pytest.raises(SystemExit, match=r"the launching process ended before the server started"):
            _launch.read_part(read_end)
    finally:
        os.close(read_end)


# --- whole processes -------------------------------------------------------------------------------------------------


def test_a_script_without_a_guard(folder: Path) -> None:
    (folder / "service.py").write_text(SCRIPT)
    result = _run(folder, "service.py", "out.json", "-x")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "ended 0 __main__\n"
    assert result.stderr == ""
    found = _read(folder / "out.json")
    assert found["handlers"] == ["above"]
    assert found["argv"] == ["out.json", "-x"]


def test_a_module_of_a_package(folder: Path) -> None:
    package = folder / "shop"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "service.py").write_text(SCRIPT)
    result = _run(folder, "-m", "shop.service", "out.json")
    assert (result.returncode, result.stdout) == (0, "ended 0 __main__\n"), result.stderr
    assert _read(folder / "out.json")["handlers"] == ["above"]


def test_a_package_itself(folder: Path) -> None:
    package = folder / "shop"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(SCRIPT)
    result = _run(folder, "-m", "shop", "out.json")
    assert (result.returncode, result.stdout) == (0, "ended 0 __main__\n"), result.stderr
    assert _read(folder / "out.json")["handlers"] == ["above"]


def test_a_script_with_a_guard_is_imported_to_its_end(folder: Path) -> None:
    (folder / "service.py").write_text(
        "import sys\n"
        "from keven_core.kafka.abstracts.event_handler import event_handler\n"
        "from keven_core.kafka._launch import launch\n"
        "import target\n"
        "if __name__ == '__main__':\n"
        "    process = launch('worker', target.report, {'path': sys.argv[1]})\n"
        "    process.join()\n"
        "    print('ended', process.exitcode)\n"
        "event_handler('BELOW')(print)\n"
    )
    result = _run(folder, "service.py", "out.json")
    assert (result.returncode, result.stdout) == (0, "ended 0\n"), result.stderr
    assert _read(folder / "out.json")["handlers"] == ["below"]


@pytest.mark.parametrize("how", ["command", "stdin"])
def test_without_a_script_it_is_a_clear_error(folder: Path, how: str) -> None:
    source = "from keven_core.kafka._launch import launch\nlaunch('worker', print, {})\n"
    result = _run(folder, "-c", source) if how == "command" else _run(folder, "-", stdin=source)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("keven_core.kafka.errors.LaunchError: a server process can only be started from a script")


def _service(folder: Path, target: str, rest: str) -> Path:
    path = folder / "service.py"
    arguments = {} if target == "raise_error" else {"path": "out.json"}
    path.write_text(
        "import sys\nfrom keven_core.kafka._launch import launch\nimport target\n"
        f"process = launch('worker', target.{target}, {arguments})\n"
        f"{rest}"
    )
    return path


def test_terminate_lets_it_end_in_order(folder: Path) -> None:
    _service(
        folder,
        "until_terminated",
        "import os, time\n"
        "deadline = time.monotonic() + 30\n"
        "while not os.path.exists('out.json') and time.monotonic() < deadline:\n"
        "    time.sleep(0.01)\n"
        "print(process.is_alive(), process.exitcode, process.pid > 0, 'worker' in repr(process))\n"
        "process.join(0.01)\n"
        "print(process.is_alive())\n"
        "process.terminate()\n"
        "process.join()\n"
        "print(process.is_alive(), process.exitcode)\n"
        "process.terminate(), process.kill(), process.join()\n"
        "from keven_core.kafka import _launch\n"
        "print(_launch._live, os.path.exists(f'/proc/self/fd/{process._pipe}'))\n",
    )
    result = _run(folder, "service.py")
    expected = ["True None True True", "True", "False 0", "set() False"]
    assert result.stdout.splitlines() == expected, result.stderr
    assert (folder / "out.json.end").exists()


def test_kill_ends_it_at_once(folder: Path) -> None:
    _service(folder, "until_terminated", "process.kill()\nprocess.join()\nprint(process.exitcode)\n")
    result = _run(folder, "service.py")
    assert result.stdout == f"{-signal.SIGKILL}\n", result.stderr
    assert not (folder / "out.json.end").exists()


def test_an_error_in_the_worker_is_its_exit_code(folder: Path) -> None:
    _service(folder, "raise_error", "process.join()\nprint(process.exitcode)\n")
    result = _run(folder, "service.py")
    assert result.stdout == "1\n"
    assert "ZeroDivisionError: on purpose" in result.stderr


def test_the_launching_process_waits_for_it_at_its_exit(folder: Path) -> None:
    _service(folder, "report", "print('main is done')\n")
    result = _run(folder, "service.py")
    assert (result.returncode, result.stdout) == (0, "main is done\n"), result.stderr
    assert (folder / "out.json").exists()


def test_when_the_launching_process_dies_the_worker_ends_in_order(folder: Path) -> None:
    script = _service(folder, "until_terminated", "process.join()\n")
    with subprocess.Popen([sys.executable, str(script)], cwd=folder, env=child_environment()) as parent:
        wait_until((folder / "out.json").exists, 30, "the worker runs")
        parent.kill()
    wait_until((folder / "out.json.end").exists, 30, "the worker has ended in order")


def test_an_orphan_that_can_not_end_in_order_is_ended(folder: Path) -> None:
    script = _service(folder, "deaf_and_busy", "process.join()\n")
    with subprocess.Popen([sys.executable, str(script)], cwd=folder, env=child_environment()) as parent:
        wait_until((folder / "out.json").exists, 30, "the worker runs")
        parent.kill()
    pid = _read(folder / "out.json")["pid"]
    wait_until(lambda: is_gone(pid), 5, "the worker is gone")
