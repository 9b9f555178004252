"""Loopback ports that stay ours from the choice until the broker listens on them, and over its restarts."""

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path
from typing import IO

from keven_core.testing._broker_process.errors import KafkaStartError

__all__ = ["PortReservation", "is_port_free"]

# Below the ranges from which the kernel takes ports for outgoing connections (Linux 32768.., macOS 49152..), so that
# no client's socket takes a port of ours while a broker is being restarted.
_FIRST, _LAST = 20_000, 32_000


class PortReservation:
    """Free ports on 127.0.0.1, reserved against every other launcher of this user until `release`.

    Asking the kernel for a free port and closing the socket again is a race: between that and the broker's bind,
    another process may get the same port. A lock file per port settles it between launchers, and a bind shows that
    nobody else listens there. The lock goes with the process, however it ends.
    """

    def __init__(self) -> None:
        self._locks: dict[int, IO[str]] = {}

    def take(self, wanted: int | None = None) -> int:
        """Reserve and return a free port.

        Args:
            wanted: that very port; None (default) takes any.

        Raises:
            KafkaStartError: the wanted port is in use, or no free one was found.
        """
        if wanted is not None:
            if not self._try(wanted):
                raise KafkaStartError(f"port {wanted} on 127.0.0.1 is in use: stop what listens there, or name another")
            return wanted
        for _ in range(1000):
            port = random.randint(_FIRST, _LAST)
            if self._try(port):
                return port
        raise KafkaStartError(f"found no free port between {_FIRST} and {_LAST} on 127.0.0.1")

    def release(self) -> None:
        """Give all ports back."""
        for lock in self._locks.values():
            lock.close()
        self._locks.clear()

    def _try(self, port: int) -> bool:
        folder = Path(tempfile.gettempdir()) / f"keven-core-ports-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = (folder / str(port)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            return False
        if not is_port_free(port):
            lock.close()
            return False
        self._locks[port] = lock
        return True


def is_port_free(port: int) -> bool:
    """True if a broker could listen on 127.0.0.1:port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As Java does: connections of an earlier broker in TIME_WAIT are no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
