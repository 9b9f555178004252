"""The plain Python that the compiled code is compared with; changing it changes every stored ratio."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def decode_and_handle(values: Iterable[bytes], decode: Callable[[bytes], Any], handle: Callable[[Any], Any]) -> None:
    """Decode each value and call its handler: the least that any consumer has to do."""
    for data in values:
        handle(decode(data))


def look_up(values: Iterable[bytes], routes: Mapping[bytes, Any]) -> int:
    """Find each value's route by the name that is its first field."""
    found = 0
    for data in values:
        if routes.get(data[15 : data.index(b'"', 15)]) is not None:
            found += 1
    return found


class PlainLogger:
    """Takes messages as a logger would: checks the type, notes topic and value, counts."""

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.queue: deque[tuple[str, bytes]] = deque()
        self.count = 0

    def log(self, data: object, topic: str | None = None) -> None:
        """Take one message."""
        if not isinstance(data, bytes):
            raise TypeError(type(data).__name__)
        self.queue.append((topic or self.topic, data))
        self.count += 1
