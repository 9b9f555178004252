"""Runs one broker as its child and kills it when the launcher is gone. Started by process.py, by file path.

A broker must not outlive the test run that started it, even if that run was killed with SIGKILL. A parent-death signal
(`prctl(PR_SET_PDEATHSIG)`) set by the launcher itself would be wrong: Linux sends it when the *thread* that forked
ends, and there is none on macOS. So this small process stands between them:

    launcher --(pipe: commands)--> watch.py --(its child)--> java

- standard input: one signal number per line, sent on to the child. Only this process signals the child and only this
  process reaps it, so a signal never reaches a stranger that got the child's number.
- standard input at its end, or another parent than at the start: the launcher is gone, the child gets SIGKILL.
- standard output: the child's process id in one line, then nothing.
- exit code: the child's; 128 + signal number if a signal ended it.
- arguments: log file, folder to remove when the launcher is gone ("-" for none), then the child's command.

Standard library only, and no import of keven_core: it starts in 20 ms.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_CHECK_PARENT_S = 0.5


def _die_with_watcher() -> None:
    """In the child, before exec: ask Linux for SIGKILL if this watcher dies. It has one thread, so that is exact."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main(log_path: str, wipe: str, command: "list[str]") -> int:
    """Run the command with its output appended to the log file; return the exit code to end with."""
    parent = os.getppid()
    # A signal handler that does nothing, plus a wake-up pipe: select returns as soon as the child ends.
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # Ctrl-C and a closed terminal are the launcher's business: it stops the broker in its own order.
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    with open(log_path, "ab") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_watcher
        )
    os.write(1, f"{child.pid}\n".encode())
    commands = b""
    while child.poll() is None:
        readable, _, _ = select.select([0, wake_read], [], [], _CHECK_PARENT_S)
        if wake_read in readable:
            os.read(wake_read, 4096)
        data = os.read(0, 4096) if 0 in readable else None
        if data == b"" or os.getppid() != parent:
            child.kill()
            child.wait()
            if wipe != "-":
                shutil.rmtree(wipe, ignore_errors=True)
            break
        commands += data or b""
        while b"\n" in commands:
            line, commands = commands.split(b"\n", 1)
            child.send_signal(int(line))
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
