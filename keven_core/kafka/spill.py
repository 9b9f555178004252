"""Records that wait on disk for Kafka: a bounded queue in files, which outlives the process. No Kafka in here.

    <folder>/<store>/lock                     held with flock while the store is open
    <folder>/<store>/<number>.spill           segments; numbered by the ns of their birth, so by name they are in order
    <folder>/<store>-<number>.spill.damaged   a segment in which something could not be read, kept for people to see

    segment = head mark record*                  (integers are little-endian)
    head    = "KVSPILL" version:u8               (1)
    mark    = settled:u64 rest:u32 crc:u32       (all before the offset `settled` is done, `rest` records begin there,
                                                  0xffffffff: unknown, still written to; crc32 of these 12 bytes)
    record  = length:u32 crc:u32 payload         (crc32 of the payload begun with the length: zeros are no record)
    payload = msgpack array of topic, value, key, headers, timestamp_ms

A store takes over the segments of dead ones by renaming them into its own sub-folder, and changes nothing in them but
the mark. A mark that is lost or torn only means that records are given out again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import struct
import threading
import time
import warnings
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from keven_core.kafka.errors import (
    ClosedError,
    ConfigurationError,
    ForkedProcessError,
    KevenError,
    MessageTooLargeError,
    QueueFullError,
)
from keven_core.kafka.logs import one_line

__all__ = ["Place", "SpillError", "SpillFullError", "SpillRecord", "SpillStore"]

logger = logging.getLogger("keven_core.kafka")

_HEAD = b"KVSPILL\x01"
_MARK = struct.Struct("<QI")
_FRAME = struct.Struct("<II")
_START = len(_HEAD) + _MARK.size + 4  # where the first record is
_UNKNOWN = 0xFFFFFFFF

_MIN_BYTES = 64 << 10
_SEGMENT_BYTES = 8 << 20
_RECORD_BYTES = 1 << 30  # of one payload; librdkafka's message.max.bytes ends at 10^9
_CHUNK = 256 << 10  # read at once: the memory that reading takes, apart from what it gives
_MARK_S = 1.0  # between two notes of what is settled: how much comes twice after a crash
_OFFSET_BITS = 48  # of a sequence number; above them is the segment, counted from 1 in each store

_STORE_NAME = re.compile(r"\d{20}-\d+\Z")
_SEGMENT_NAME = re.compile(r"\d{20}\.spill\Z")
_OPEN = os.O_RDWR | os.O_NOFOLLOW
_FOLDER = os.O_RDONLY | os.O_DIRECTORY
# Reading such a file will not go better another time: it is gone, was replaced by a link, or the disk is broken.
_LOST = (errno.ENOENT, errno.ELOOP, errno.EIO)


class SpillError(KevenError, OSError):
    """The file system would not write or read a record; `errno` says why. A record to be written was not taken."""


class SpillFullError(QueueFullError):
    """The files have reached max_bytes. The record was not taken."""


class SpillRecord(NamedTuple):
    """One message to send; timestamp_ms 0: none."""

    topic: str
    value: bytes | None
    key: bytes | None = None
    headers: list[tuple[str, bytes | None]] | None = None
    timestamp_ms: int = 0


class Place(NamedTuple):
    """A place between records, see SpillStore.reserve()."""

    name: str  # of the segment that would be there
    base: int  # of that segment


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(SpillRecord).decode


class _Segment:
    """One file and how far it is written, read and settled; offsets are in bytes, `index` and `count` in records."""

    def __init__(self, name: str, fd: int, size: int, base: int) -> None:
        self.name = name
        self.fd = fd  # -1: closed; only the segments being written to and read from are open
        self.size = size
        self.base = base  # an offset plus this is the sequence number of the record there
        self.count = 0
        self.index = 0
        self.read_at = _START
        self.out: dict[int, int] = {}  # offset to index of what was taken and is not settled, in order
        self.damaged = False
        self.marked = (_START, _UNKNOWN)
        self.buffer = memoryview(b"")
        self.buffer_at = 0

    def opened(self, folder: int) -> int:
        if self.fd < 0:
            self.fd = os.open(self.name, _OPEN, dir_fd=folder)
        return self.fd

    def release(self) -> None:
        self.buffer, self.buffer_at = memoryview(b""), 0
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def window(self, at: int, length: int, folder: int) -> memoryview:
        """`length` bytes from an offset; fewer when they are not there, or can't be read ever."""
        begin = at - self.buffer_at
        if begin < 0 or begin + length > len(self.buffer):
            wanted = max(length, min(_CHUNK, self.size - at))
            try:
                data = os.pread(self.opened(folder), wanted, at)
            except OSError as error:
                if error.errno not in _LOST:
                    raise
                data = b""
            self.buffer, self.buffer_at, begin = memoryview(data), at, 0
        return self.buffer[begin : begin + length]

    def frame(self, at: int, folder: int) -> tuple[int, int] | None:
        """Length and checksum of the record at an offset; None: no record that fits into the file is there."""
        head = self.window(at, _FRAME.size, folder)
        if len(head) < _FRAME.size:
            return None
        length, crc = _FRAME.unpack(head)
        return (length, crc) if 0 < length <= min(self.size - at - _FRAME.size, _RECORD_BYTES) else None

    def walk(self, folder: int) -> int:
        """How many records follow read_at, by their lengths alone."""
        count, at = 0, self.read_at
        while (frame := self.frame(at, folder)) is not None:
            at += _FRAME.size + frame[0]
            count += 1
        return count

    def mark(self, folder: int, written_to: bool) -> None:
        """Note in the file what is settled; not in a damaged one, where that would hide what could not be read."""
        settled, index = next(iter(self.out.items())) if self.out else (self.read_at, self.index)
        mark = (settled, _UNKNOWN if written_to else self.count - index)
        if mark == self.marked or self.damaged:
            return
        was_open = self.fd >= 0
        with contextlib.suppress(OSError):  # records come twice then, see the head of this module
            os.pwrite(self.opened(folder), _sealed(*mark), len(_HEAD))
            self.marked = mark
        if not was_open:
            self.release()


class SpillStore:
    """A queue of records in files. Each store has files of its own, also when several use one folder.

    Arguments:
        folder: where stores make their sub-folders; it is created, for this user alone, when it is missing. What dead
            processes left there is taken over now and given out first, oldest first.
        max_bytes: how much the files may take, what was taken over included; 64 KiB or more. Damaged files that were
            put aside don't count.
        fsync: when records are forced to the disk, so that they survive a power cut too; what was written survives
            the process anyway. "never": when the system sees fit. "always": before append() returns. "interval": in
            the first append() or take() that comes fsync_interval_ms or more after the last time.
        now: the clock, in seconds.

    May be used from many threads; calls block for the disk. Records are given out at least once: those that were not
    settled come again after a restart, after a crash those settled in its last second may too. In a forked child
    every call but close() raises ForkedProcessError.

    Raises ConfigurationError when an argument is wrong or the folder can't be written to.
    """

    _closed = True  # until there is something to close

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        max_bytes: int,
        fsync: str = "never",
        fsync_interval_ms: int = 1000,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        _check_whole("KEVEN_SPILL_BYTES", max_bytes, _MIN_BYTES)
        _check_whole("fsync_interval_ms", fsync_interval_ms, 1)
        if fsync not in ("never", "always", "interval"):
            raise ConfigurationError(f"KEVEN_SPILL_FSYNC={fsync!r} is not known; allowed: never, always, interval")
        self.folder = os.path.abspath(folder)
        self.max_bytes = max_bytes
        self._segment_bytes = min(_SEGMENT_BYTES, max_bytes // 8)
        self._fsync = fsync
        self._interval_s = fsync_interval_ms / 1000
        self._now = now
        self._mark_at = now() + _MARK_S
        self._sync_at = now() + self._interval_s
        self._unsynced = False
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._segments: dict[int, _Segment] = {}  # by `base >> _OFFSET_BITS`, in order
        self._unread: deque[_Segment] = deque()  # not read to their end; the one being written to always is in here
        self._active: _Segment | None = None  # the one being written to
        self._born = 0  # segments and places so far
        self._adopted = 0  # of them those of dead stores, the first ones
        self._number = 0  # the highest in a name
        self._pending = self._untaken = self._bytes = self._damaged_count = self._damaged_bytes = 0
        self._warnings: list[str] = []
        self._root, self._name, self._own, self._lock_fd = _make_sub_folder(self.folder)
        self._closed = False
        _stores.add(self)
        try:
            self._adopt()
        except BaseException:
            self._abandon()
            raise
        self._warn()

    # --- writing -----------------------------------------------------------------------------------------------------

    def append(self, record: SpillRecord) -> int:
        """Write one record behind all others; returns its sequence number. Records are in order by these.

        Raises, and has taken nothing then: SpillFullError when it would pass max_bytes, MessageTooLargeError when it
        never fits, SpillError when the disk is full or fails, ClosedError after close().
        """
        payload = _encode(record)
        length = len(payload)
        data = _framed(payload)
        if length > _RECORD_BYTES or _START + len(data) > self.max_bytes:
            raise MessageTooLargeError(
                f"a message of {length} bytes for {record.topic} does not fit into KEVEN_SPILL_BYTES={self.max_bytes}"
            )
        self._check_process()
        try:
            with self._lock:
                self._check_open()
                self._sync(if_due=True)
                segment = self._segment_for(len(data))
                at = segment.size
                self._write(segment.fd, data, at)
                segment.size += len(data)
                segment.count += 1
                self._bytes += len(data)
                self._pending += 1
                self._untaken += 1
                self._unsynced = self._fsync == "interval"
                return segment.base + at
        except KevenError:
            raise
        except OSError as error:
            raise self._error("write to", error, "the message was not taken") from error

    def reserve(self) -> Place:
        """A place behind all records so far and before all that are appended from now on, for insert()."""
        self._check_process()
        try:
            with self._lock:
                self._check_open()
                if self._active is not None:
                    self._finish(self._active)
                return self._next_place()
        except OSError as error:
            raise self._error("write to", error, "nothing was written") from error

    def insert(self, place: Place, records: Sequence[SpillRecord]) -> list[int]:
        """Write records at a place that reserve() gave, once; returns the sequence numbers of those that were taken.

        Those that would pass max_bytes, and what follows them, are not. The caller has these records: they are out,
        as if take() had given them. Raises SpillError, and has taken nothing then.
        """
        self._check_process()
        data = bytearray(_HEAD + _sealed(_START, _UNKNOWN))
        out: dict[int, int] = {}
        try:
            with self._lock:
                self._check_open()
                for record in records:
                    framed = _framed(_encode(record))
                    if self._bytes + len(data) + len(framed) > self.max_bytes:
                        break
                    out[len(data)] = len(out)
                    data += framed
                if not out:
                    return []
                fd = os.open(place.name, _OPEN | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._own)
                try:
                    self._write(fd, data, 0)
                    if self._fsync != "never":
                        os.fsync(fd)
                        os.fsync(self._own)
                except OSError:
                    os.unlink(place.name, dir_fd=self._own)
                    raise
                finally:
                    os.close(fd)
                segment = self._add(place.name, -1, len(data), place.base)
                segment.out, segment.read_at = out, segment.size
                segment.count = segment.index = len(out)
                self._segments = dict(sorted(self._segments.items()))
                self._pending += len(out)
                return [place.base + at for at in out]
        except OSError as error:
            raise self._error("write to", error, "the messages were not taken") from error

    def _write(self, fd: int, data: bytes | bytearray, at: int) -> None:
        try:
            # At an offset and not at the end: what could not be cut off after a failure is written over.
            written = os.pwrite(fd, data, at)
            while written < len(data):
                written += os.pwrite(fd, data[written:], at + written)
            if self._fsync == "always":
                os.fsync(fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, at)
            raise

    def _segment_for(self, length: int) -> _Segment:
        """The segment to write the next `length` bytes to."""
        segment = self._active
        if segment is not None:
            passes_bound = self._bytes + length > self.max_bytes
            all_settled = segment.read_at == segment.size and not segment.out
            if segment.size + length > self._segment_bytes or (passes_bound and all_settled):
                self._finish(segment)
                segment = None
        if self._bytes + length + (0 if segment else _START) > self.max_bytes:
            raise SpillFullError(
                f"{self._pending} message(s) wait in {self.folder}, whose files have reached KEVEN_SPILL_BYTES="
                f"{self.max_bytes}; the message was not taken"
            )
        return segment or self._begin()

    def _begin(self) -> _Segment:
        place = self._next_place()
        fd = os.open(place.name, _OPEN | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._own)
        try:
            self._write(fd, _HEAD + _sealed(_START, _UNKNOWN), 0)
            if self._fsync != "never":
                for folder in (self._own, self._root):  # a file survives when the names that lead to it do
                    os.fsync(folder)
        except OSError:
            os.close(fd)
            os.unlink(place.name, dir_fd=self._own)
            raise
        self._active = self._add(place.name, fd, _START, place.base)
        self._unread.append(self._active)
        return self._active

    def _next_place(self) -> Place:
        self._number = max(time.time_ns(), self._number + 1)
        return Place(f"{self._number:020d}.spill", self._next_base())

    def _next_base(self) -> int:
        self._born += 1
        return self._born << _OFFSET_BITS

    def _add(self, name: str, fd: int, size: int, base: int) -> _Segment:
        segment = self._segments[base >> _OFFSET_BITS] = _Segment(name, fd, size, base)
        self._bytes += size
        return segment

    def _finish(self, segment: _Segment) -> None:
        """The active segment is not written to any more."""
        self._sync()
        self._active = None
        segment.mark(self._own, False)
        if segment.read_at == segment.size:
            self._read_out(segment)
        elif segment is not self._unread[0]:
            segment.release()

    def _sync(self, *, if_due: bool = False) -> None:
        if self._unsynced and self._active is not None and not (if_due and self._now() < self._sync_at):
            # Before: a failed fsync leaves the pages clean, so that a second one would claim what isn't so.
            self._unsynced = False
            self._sync_at = self._now() + self._interval_s
            os.fsync(self._active.fd)

    # --- reading -----------------------------------------------------------------------------------------------------

    def take(self, max_records: int, max_bytes: int) -> list[tuple[int, SpillRecord]]:
        """The next records that were not taken yet, in order, each with its sequence number for settle().

        At most `max_records`, of `max_bytes` as written, but one at least when there is one. Raises SpillError when
        a file can't be read now, and ClosedError after close(). What is damaged is passed over, counted and logged.
        """
        self._check_process()
        taken: list[tuple[int, SpillRecord]] = []
        try:
            with self._lock:
                self._check_open()
                self._sync(if_due=True)
                while self._unread and len(taken) < max_records:
                    segment = self._unread[0]
                    at = segment.read_at
                    if at == segment.size:
                        break  # the active one: any other would have been taken off
                    frame = segment.frame(at, self._own)
                    if taken and frame is not None and frame[0] > max_bytes:
                        break
                    if frame is None and segment is self._active:
                        self._finish(segment)  # nothing that is written behind the damage could be found
                    record = self._read(segment, frame)
                    if record is not None and frame is not None:
                        taken.append((segment.base + at, record))
                        max_bytes -= frame[0]
                    if segment.read_at == segment.size and segment is not self._active:
                        self._read_out(segment)
        except OSError as error:
            if not taken:  # else the next call says so
                raise self._error("read", error, "it is tried again at the next call") from error
        finally:
            self._warn()
        return taken

    def _read(self, segment: _Segment, frame: tuple[int, int] | None) -> SpillRecord | None:
        """Go past the record at read_at, whose frame is given; None: it is damaged."""
        at = segment.read_at
        if frame is None:
            # Where the next record begins can't be known. Those that were counted are missed by _read_out().
            self._damaged_count += segment.index >= segment.count
            self._damage(segment, segment.size - at, "no whole record is there")
            segment.read_at = segment.size
            return None
        length, crc = frame
        payload = segment.window(at + _FRAME.size, length, self._own)
        record = None
        if zlib.crc32(payload, length) == crc:
            with contextlib.suppress(msgspec.MsgspecError, ValueError):
                record = _decode(payload)
        if record is None:
            self._pending -= 1
            self._damaged_count += 1
            self._damage(segment, _FRAME.size + length, "the record there is not what was written")
        else:
            segment.out[at] = segment.index
        self._untaken -= 1
        segment.index += 1
        segment.read_at = at + _FRAME.size + length
        return record

    def _damage(self, segment: _Segment, size: int, what: str) -> None:
        self._damaged_bytes += size
        if not segment.damaged:
            segment.damaged = True
            self._warnings.append(
                f"spill file {self.folder}/{self._name}/{segment.name} is damaged at offset {segment.read_at}: {what}; "
                f"when its other records are done it is kept as {self.folder}/{self._name}-{segment.name}.damaged"
            )

    def _read_out(self, segment: _Segment) -> None:
        """A segment that is not written to was read to its end."""
        missing = segment.count - segment.index  # below 0: after a wrong length there seemed to be more
        if missing > 0:
            self._damaged_count += missing
            self._damage(segment, 0, f"{missing} record(s) are missing")
        self._pending -= missing
        self._untaken -= missing
        segment.count = segment.index
        self._unread.remove(segment)
        segment.release()
        if not segment.out:
            self._remove(segment)

    def settle(self, sequence: int) -> None:
        """The record is done: it was delivered, or its failure was told to whoever sent it. In any order.

        Its file is deleted with the last of its records. Of a record that is not out (settled before, never taken,
        store closed) nothing is noted.
        """
        self._check_process()
        with self._lock:
            segment = self._segments.get(sequence >> _OFFSET_BITS)
            if segment is None or segment.out.pop(sequence - segment.base, None) is None:
                return
            self._pending -= 1
            if not segment.out and segment.read_at == segment.size and segment is not self._active:
                self._remove(segment)
            elif not self._pending or self._now() >= self._mark_at:
                self._mark()
        self._warn()

    def _mark(self) -> None:
        self._mark_at = self._now() + _MARK_S
        for segment in self._segments.values():
            segment.mark(self._own, segment is self._active)
            if self._unread and segment is self._unread[0]:
                break

    def _remove(self, segment: _Segment) -> None:
        del self._segments[segment.base >> _OFFSET_BITS]
        self._bytes -= segment.size
        try:
            if segment.damaged:
                aside = f"{self._name}-{segment.name}.damaged"
                os.rename(segment.name, aside, src_dir_fd=self._own, dst_dir_fd=self._root)
            else:
                os.unlink(segment.name, dir_fd=self._own)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._warnings.append(
                f"spill file {self.folder}/{self._name}/{segment.name} can't be removed: {error.strerror}; its records "
                f"will be sent again after a restart"
            )

    # --- state -------------------------------------------------------------------------------------------------------

    def is_own(self, sequence: int) -> bool:
        """Whether a record was written by this store, and not taken over."""
        return sequence >> _OFFSET_BITS > self._adopted

    @property
    def pending_count(self) -> int:
        """Records that are not settled."""
        return self._pending

    @property
    def untaken_count(self) -> int:
        """Records that take() has yet to give."""
        return self._untaken

    @property
    def pending_bytes(self) -> int:
        """Size of the files; settled records count until their file is deleted."""
        return self._bytes

    @property
    def damaged_count(self) -> int:
        """Records found torn or corrupt while reading; at least, since what follows a wrong length can't be counted."""
        return self._damaged_count

    @property
    def damaged_bytes(self) -> int:
        """Bytes found torn or corrupt while reading."""
        return self._damaged_bytes

    def close(self) -> None:
        """Note what is settled, leave the rest to the next store in this folder. May be called twice.

        Raises SpillError when an fsync failed; the store is closed then too. Does nothing in a forked child.
        """
        if os.getpid() != self._pid:
            return
        failure: OSError | None = None
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._sync()
            except OSError as error:
                failure = error
            if self._active is not None:
                self._finish(self._active)
            self._mark()
            if not self._segments:
                _remove_sub_folder(self._root, self._name, self._own)
            self._abandon()
        self._warn()
        if failure is not None:
            raise self._error("write to", failure, "a power cut may cost the last messages") from failure

    def _abandon(self) -> None:
        """Close the files as they are. Closing a forked child's copies leaves the parent's lock in place."""
        self._closed = True
        _stores.discard(self)
        for segment in self._segments.values():
            segment.release()
        self._segments.clear()
        for fd in (self._lock_fd, self._own, self._root):
            os.close(fd)

    def __del__(self) -> None:
        if not self._closed:
            text = f"a spill store in {self.folder} was not closed"
            warnings.warn(text, ResourceWarning, stacklevel=2, source=self)
            self._abandon()

    def _check_process(self) -> None:
        # Before the lock is taken: a thread that did not come along may hold it.
        if os.getpid() != self._pid:
            raise ForkedProcessError("this spill store was made before os.fork(): make a new one in the child")

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this spill store is closed: make a new one")

    def _error(self, action: str, error: OSError, result: str) -> SpillError:
        return SpillError(error.errno, f"can't {action} the spill folder {self.folder}: {error.strerror}; {result}")

    def _warn(self) -> None:
        # Never under the lock: a log handler may write to Kafka, and so come back to this store.
        with contextlib.suppress(IndexError):
            while self._warnings:
                logger.warning("%s", one_line(self._warnings.pop(0), 1000))

    # --- start -------------------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Move the segments of dead stores here."""
        numbers: set[int] = set()
        for name in _names(self._root, _STORE_NAME, os.DirEntry.is_dir):
            try:
                if name != self._name:
                    self._take_over(name, numbers)
            except FileNotFoundError:
                pass  # another store was quicker
            except OSError as error:
                self._warnings.append(f"messages left in {self.folder}/{name} can't be taken over: {error.strerror}")
        self._number = max(numbers, default=0)
        for number in sorted(numbers):
            try:
                self._load(f"{number:020d}.spill")
            except OSError as error:
                self._warnings.append(
                    f"spill file {self.folder}/{self._name}/{number:020d}.spill can't be read: {error.strerror}"
                )
        self._adopted = self._born

    def _take_over(self, name: str, numbers: set[int]) -> None:
        with contextlib.ExitStack() as stack:
            folder = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=self._root)
            stack.callback(os.close, folder)
            lock = _try_lock(folder)
            if lock is None:
                return
            stack.callback(os.close, lock)
            for segment in _names(folder, _SEGMENT_NAME, os.DirEntry.is_file):
                number = int(segment[:20])
                while number in numbers:  # renaming would replace the other
                    number += 1
                os.rename(segment, f"{number:020d}.spill", src_dir_fd=folder, dst_dir_fd=self._own)
                numbers.add(number)
            _remove_sub_folder(self._root, name, folder)

    def _load(self, name: str) -> None:
        fd = os.open(name, _OPEN, dir_fd=self._own)
        segment = self._add(name, fd, os.fstat(fd).st_size, self._next_base())
        self._unread.append(segment)
        head = bytes(segment.window(0, _START, self._own))
        if len(head) < _START or not head.startswith(_HEAD):
            segment.read_at = 0
            if segment.size:
                self._read(segment, None)
        else:
            mark: tuple[int, int] = _MARK.unpack_from(head, len(_HEAD))
            if head.endswith(_sealed(*mark)):
                segment.marked = mark
            settled, rest = segment.marked
            segment.read_at = min(settled, segment.size)
            segment.count = segment.walk(self._own) if rest == _UNKNOWN else rest
            self._pending += segment.count
            self._untaken += segment.count
            if settled > segment.size and rest:
                self._read(segment, None)
        if segment.read_at == segment.size:
            self._read_out(segment)
        segment.release()


def _framed(payload: bytes) -> bytes:
    """The bytes of a record."""
    return _FRAME.pack(len(payload), zlib.crc32(payload, len(payload))) + payload


def _sealed(settled: int, rest: int) -> bytes:
    """The bytes of a mark."""
    mark = _MARK.pack(settled, rest)
    return mark + zlib.crc32(mark).to_bytes(4, "little")


def _check_whole(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigurationError(f"{name}={value!r:.80} is not allowed: give a whole number of {low} or more")


def _make_sub_folder(folder: str) -> tuple[int, str, int, int]:
    """Descriptor of the folder; name and descriptor of a new sub-folder; descriptor of its lock, which is held."""
    root = -1
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        root = os.open(folder, _FOLDER)
        for _ in range(100):
            name = f"{time.time_ns():020d}-{os.getpid()}"
            # Both mean to try again: in another container a process with the same pid was quicker, or another store
            # took the sub-folder for a dead one's before it was locked.
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.mkdir(name, 0o700, dir_fd=root)
                own = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=root)
                lock = _try_lock(own)
                if lock is not None:
                    return root, name, own, lock
                os.close(own)
        raise FileNotFoundError(errno.ENOENT, "what is made in it vanishes")
    except OSError as error:
        if root >= 0:
            os.close(root)
        is_file = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "it is not a folder" if is_file else error.strerror
        raise ConfigurationError(
            f"spill_dir={folder!r} can't be used: {reason}; name a folder, or one to be made, in which this user may "
            f"make folders and lock files"
        ) from error


def _try_lock(folder: int) -> int | None:
    """A descriptor that holds the lock of a sub-folder; None: someone else holds it, or the sub-folder is no more."""
    fd = os.open("lock", _OPEN | os.O_CREAT, 0o600, dir_fd=folder)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:  # else the holder has removed it meanwhile
            return fd
    except BlockingIOError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _remove_sub_folder(root: int, name: str, folder: int) -> None:
    """Remove a sub-folder whose lock is held, unless there is something of others in it."""
    with contextlib.suppress(OSError):
        os.unlink("lock", dir_fd=folder)
        os.rmdir(name, dir_fd=root)


def _names(folder: int, pattern: re.Pattern[str], is_kind: Callable[..., bool]) -> list[str]:
    """What lies in a folder and has such a name and kind, links excluded, sorted."""
    with os.scandir(folder) as entries:
        return sorted(
            entry.name for entry in entries if pattern.match(entry.name) and is_kind(entry, follow_symlinks=False)
        )


_stores: weakref.WeakSet[SpillStore] = weakref.WeakSet()


def _abandon_in_child() -> None:
    # A lock lasts until its last copy is closed: a child that outlives its parent would keep the records from others.
    for store in list(_stores):
        store._abandon()


os.register_at_fork(after_in_child=_abandon_in_child)
