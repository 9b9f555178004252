"""One broker process: started, signalled and reaped by whoever started it, and by nobody else."""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from keven_core.testing._broker_process.errors import KafkaStartError

__all__ = ["BrokerProcess", "end_process", "log_tail", "process_identity", "wait_until_stopped"]

_WATCHER = Path(__file__).with_name("watch.py")
_TAIL_LINES = 30
_TAIL_BYTES = 64 * 1024


class BrokerProcess:
    """A running command whose output goes to a log file.

    Not thread-safe: one thread calls its methods.

    Attributes:
        pid: process id of the command itself (not of the watcher).

    Args:
        command: program and arguments.
        log_path: file to which standard output and error are appended.
        detached: False (default): the process is killed when this Python process ends, however it ends (`watch.py`).
            True: it goes on after this process has ended; the caller has to remember `pid`.
        wipe: folder to remove if this Python process ends without `close` (None: none); not when detached.
    """

    def __init__(self, command: list[str], log_path: Path, *, detached: bool = False, wipe: Path | None = None) -> None:
        self._detached = detached
        self._popen: subprocess.Popen[bytes]
        if detached:
            with log_path.open("ab") as log:
                self._popen = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            self.pid = self._popen.pid
            return
        # -I -S: neither the environment nor site-packages; the watcher needs only the standard library.
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_WATCHER), str(log_path), str(wipe or "-"), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Its own session: Ctrl-C in the terminal must not end the broker before the tests that use it.
            start_new_session=True,
        )
        self.pid = self._read_pid(command)

    def _read_pid(self, command: list[str]) -> int:
        assert self._popen.stdout is not None
        readable, _, _ = select.select([self._popen.stdout], [], [], 20)
        line = self._popen.stdout.readline() if readable else b""
        if not line:
            self._popen.kill()
            self._popen.wait()
            raise KafkaStartError(f"could not start {command[0]}: its watcher ended with code {self._popen.returncode}")
        return int(line)

    @property
    def is_alive(self) -> bool:
        """True until the process has ended (a stopped one, SIGSTOP, is alive)."""
        return self._popen.poll() is None

    @property
    def returncode(self) -> int | None:
        """Exit code as a shell tells it (128 + n for signal n), None while the process lives."""
        code = self._popen.poll()
        return 128 - code if code is not None and code < 0 else code

    def send(self, signal_number: signal.Signals) -> None:
        """Send a signal; does nothing when the process has ended."""
        if self._detached:
            self._popen.send_signal(signal_number)
            return
        assert self._popen.stdin is not None
        # Broken pipe: the watcher ended because the process did. ValueError: close() was called.
        with suppress(BrokenPipeError, ValueError):
            self._popen.stdin.write(b"%d\n" % int(signal_number))
            self._popen.stdin.flush()

    def wait(self, timeout_s: float) -> bool:
        """Wait until the process has ended; False if it still lives after that time. Blocks."""
        try:
            self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """End the process with SIGKILL if it still lives, and free the pipes. Blocks until it is gone; idempotent."""
        if self.is_alive:
            self.send(signal.SIGKILL)
            if not self.wait(20):
                raise KafkaStartError(f"process {self.pid} is still there 20 s after SIGKILL: it hangs in the kernel")
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                # Closing flushes a command that nobody will read any more.
                with suppress(BrokenPipeError):
                    pipe.close()


def process_identity(pid: int) -> str | None:
    """Return a string that only this very process has, None if there is none with that number.

    A process number alone is not enough: after a reboot, or after some ten thousand starts, it belongs to another.
    """
    found = _state_and_identity(pid)
    # Z: it has ended, and its parent has not asked for its exit code yet.
    return None if found is None or found[0] in "ZX" else found[1]


def wait_until_stopped(pid: int, timeout_s: float) -> bool:
    """Wait until a process that got SIGSTOP really stands still: the signal takes its time. Blocks.

    Returns:
        False if it still runs after that time, or is gone.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = _state_and_identity(pid)
        if found is None or found[0] == "T":
            return found is not None
        time.sleep(0.002)
    return False


def _state_and_identity(pid: int) -> tuple[str, str] | None:
    """Return the letter for its state and what identifies the process, as `ps` and /proc tell them."""
    if Path("/proc/self/stat").exists():  # Linux; a small container may have no ps
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        # Fields after the command in parentheses, which may hold anything: proc_pid_stat(5). State is the third
        # field of the line, the start time in clock ticks since boot the 22nd.
        fields = stat.rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return fields[0], f"{boot} {fields[19]}"
    answer = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True)
    state, _, started = answer.stdout.strip().partition(" ")
    return (state[0], started.strip()) if state else None


def end_process(pid: int, identity: str, *, grace_s: float) -> bool:
    """End a process that this one did not start: SIGTERM, and SIGKILL after `grace_s` seconds. Blocks.

    Returns:
        False if the process was no longer there (nothing is signalled then).
    """
    if process_identity(pid) != identity:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    killed = False
    while process_identity(pid) == identity:
        if not killed and time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            killed = True
        elif killed and time.monotonic() > deadline + 20:
            raise KafkaStartError(f"process {pid} is still there 20 s after SIGKILL: it hangs in the kernel")
        # No way to wait for a process that is not our child, on Linux and macOS alike.
        time.sleep(0.05)
    return True


def log_tail(log_path: Path, lines: int = _TAIL_LINES) -> str:
    """Return the last lines of a log file, or a note that there is none."""
    try:
        with log_path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join(text.splitlines()[-lines:]) or "(the log is empty)"
