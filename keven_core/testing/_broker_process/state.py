"""What `make kafka` has started: written down, so that other processes find it, and `stop` ends just that."""

import fcntl
import json
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from keven_core.testing._broker_process.docker_kafka import DockerKafka
from keven_core.testing._broker_process.process import end_process, process_identity

__all__ = ["FOLDER", "RunningKafka", "find_running", "locked", "wipe"]

FOLDER = ".kafka"
"""Name of the folder that holds the state file and the data, in the folder where `start` was called."""

_STATE_FILE = "state.json"


@dataclass
class RunningKafka:
    """A Kafka that `start` has launched.

    Attributes:
        bootstrap_servers: its address.
        engine: "java" or "docker".
        processes: process id and identity (`process_identity`) of each node; empty for "docker".
        logs: log file of each node; empty for "docker".
        project: Compose project; empty for "java".
    """

    bootstrap_servers: str
    engine: str
    processes: list[tuple[int, str]] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    project: str = ""

    def save(self, folder: Path) -> None:
        """Write the state file; a reader sees all of it or nothing."""
        scratch = folder / f"{_STATE_FILE}.new"
        scratch.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        scratch.replace(folder / _STATE_FILE)

    @staticmethod
    def load(folder: Path) -> "RunningKafka | None":
        """Read the state file, None if there is none or it is not ours."""
        try:
            values = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
            values["processes"] = [(int(pid), str(identity)) for pid, identity in values["processes"]]
            return RunningKafka(**values)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def is_alive(self) -> bool:
        """True if all its nodes are there."""
        if self.engine == "java":
            return all(process_identity(pid) == identity for pid, identity in self.processes)
        host, _, port = self.bootstrap_servers.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=2).close()
        except OSError:
            return False
        return True

    def end(self) -> None:
        """End its nodes, at once: their data go with them. Blocks."""
        if self.engine == "docker":
            DockerKafka(int(self.bootstrap_servers.rpartition(":")[2]), project=self.project).stop()
        for pid, identity in self.processes:
            end_process(pid, identity, grace_s=0)


def find_running(folder: Path | None = None) -> RunningKafka | None:
    """Return what `start` launched, if it is alive.

    Args:
        folder: where its state lies. None (default): `.kafka` here, or in the nearest folder above that has one.
    """
    here = Path.cwd()
    for candidate in [folder] if folder else [above / FOLDER for above in (here, *here.parents)]:
        state = RunningKafka.load(candidate)
        if state is not None:
            return state if state.is_alive else None
    return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against another `start` or `stop`; makes it if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def wipe(folder: Path) -> None:
    """Remove data and state file; what else may lie in the folder is left."""
    shutil.rmtree(folder / "data", ignore_errors=True)
    with suppress(FileNotFoundError):
        (folder / _STATE_FILE).unlink()
