"""Records of retry topics that are not due yet, and how far each partition may be committed. No I/O, no clock."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from keven_core._native.message import Record

__all__ = ["Held", "Shelf"]

Partition = tuple[str, int]

# What a record takes beside its bytes.
_OVERHEAD_BYTES = 600


# Without `gc`: there may be many, and none of them is part of a cycle.
class Held(Struct, frozen=True, order=True, gc=False):
    """A record that waits, as it is in the retry topic: what it says is read when its time has come."""

    due_ms: int
    number: int
    record: Record
    size_bytes: int


class _Lane:
    """One partition: which offsets are held or being handled, and where the next one will be."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._ascending: list[int] = []  # a heap of what was ever open and may still be the first
        self._end = 0
        self.leader_epoch = -1

    @property
    def open_count(self) -> int:
        return len(self._open)

    def is_open(self, offset: int) -> bool:
        return offset in self._open

    def put(self, offset: int, leader_epoch: int) -> None:
        self._open.add(offset)
        heapq.heappush(self._ascending, offset)
        self._end = offset + 1
        self.leader_epoch = leader_epoch

    def done(self, offset: int) -> int | None:
        """Where everything before is done now; None: that has not changed."""
        if offset not in self._open:
            return None
        self._open.discard(offset)
        if self._ascending[0] != offset:
            return None
        while self._ascending and self._ascending[0] not in self._open:
            heapq.heappop(self._ascending)
        return self._ascending[0] if self._ascending else self._end


class Shelf:
    """Holds records until they are due, whatever their order in the partition was.

    Owner thread only. `max_bytes` bounds what is held: `full` says that no more should be fetched for now.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._number = 0
        self._heap: list[Held] = []
        self._lanes: dict[Partition, _Lane] = {}

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def full(self) -> bool:
        """Whether as much is held as may be."""
        return self._bytes >= self._max_bytes

    @property
    def has_room(self) -> bool:
        """Whether, after it was full, enough has gone for more to be fetched."""
        return self._bytes <= self._max_bytes // 2

    @property
    def next_due_ms(self) -> int | None:
        """When the next record is due; None: nothing is held."""
        return self._heap[0].due_ms if self._heap else None

    def put(self, record: Record, due_ms: int, leader_epoch: int) -> None:
        """Hold a record that has been fetched."""
        key = (record.topic, record.partition)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane()
        lane.put(record.offset, leader_epoch)
        self._number += 1
        held = Held(due_ms, self._number, record, _OVERHEAD_BYTES + record.size_bytes)
        heapq.heappush(self._heap, held)
        self._bytes += held.size_bytes

    def take_due(self, now_ms: int) -> Held | None:
        """The record that is due longest; None: none is. It stays open until done()."""
        if not self._heap or self._heap[0].due_ms > now_ms:
            return None
        held = heapq.heappop(self._heap)
        self._bytes -= held.size_bytes
        return held

    def done(self, held: Held) -> tuple[str, int, int, int] | None:
        """The record has been accounted for; the offset that its partition may be committed at now.

        Everything before that offset is done. None: an earlier record is still open, or the partition was dropped.
        """
        record = held.record
        lane = self._lanes.get((record.topic, record.partition))
        offset = lane.done(record.offset) if lane is not None else None
        if lane is None or offset is None:
            return None
        return record.topic, record.partition, offset, lane.leader_epoch

    def is_open(self, held: Held) -> bool:
        """Whether the record is not done yet and its partition was not given up."""
        lane = self._lanes.get((held.record.topic, held.record.partition))
        return lane is not None and lane.is_open(held.record.offset)

    def partitions(self) -> list[Partition]:
        """The partitions that something was held of."""
        return list(self._lanes)

    def drop(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """Forget what is held of partitions that are given up; how many records of each."""
        gone = {key: self._lanes.pop(key).open_count for key in partitions if key in self._lanes}
        if gone:
            self._heap = [held for held in self._heap if (held.record.topic, held.record.partition) not in gone]
            self._bytes = sum(held.size_bytes for held in self._heap)
            heapq.heapify(self._heap)
        return gone
