"""Fills a spill folder until it is killed; run as a program: folder, then "whole" or the number of the torn record.

Writes the number of each record to stdout once append() has returned; another thread takes them, as a sender does.
"""

import os
import signal
import sys
import threading

from keven_core.kafka.spill import SpillRecord, SpillStore


def numbered(number: int) -> SpillRecord:
    """A record of which each byte can be checked."""
    return SpillRecord("topic", str(number).encode() * (number % 97 + 1), str(number).encode(), None, number)


def write(folder: str, torn: str) -> None:
    store = SpillStore(folder, max_bytes=64 << 20)
    write_whole = os.pwrite

    def write_half(fd: int, data: bytes, at: int) -> int:
        write_whole(fd, data[: len(data) // 2], at)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    wake = threading.Event()

    def take() -> None:
        while wake.wait():
            wake.clear()
            store.take(100, 1 << 20)

    if torn == "whole":
        threading.Thread(target=take, daemon=True).start()
    number = 0
    while True:
        if str(number) == torn:
            os.pwrite = write_half
        store.append(numbered(number))
        os.write(1, b"%d\n" % number)
        number += 1
        if number % 64 == 0:
            wake.set()


if __name__ == "__main__":
    write(sys.argv[1], sys.argv[2])
