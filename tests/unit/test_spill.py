"""The file store of messages that wait for Kafka: order, bounds, restarts, damage, crashes, full disks, forks."""

import contextlib
import errno
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spill_writer import numbered

from keven_core.kafka import spill
from keven_core.kafka.errors import (
    ClosedError,
    ConfigurationError,
    ForkedProcessError,
    KevenError,
    MessageTooLargeError,
    QueueFullError,
)
from keven_core.kafka.spill import SpillError, SpillFullError, SpillRecord, SpillStore

WRITER = Path(__file__).parents[1] / "support" / "spill_writer.py"
SMALL = 64 << 10  # the least max_bytes: segments of 8 KiB
LARGE = 64 << 20


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spill"


@pytest.fixture
def opened(folder: Path) -> Iterator[Callable[..., SpillStore]]:
    stores = []

    def open_store(**options: Any) -> SpillStore:
        stores.append(SpillStore(folder, **{"max_bytes": LARGE, **options}))
        return stores[-1]

    yield open_store
    for store in stores:
        if store in spill._stores:
            store.close()


def crash(store: SpillStore) -> None:
    """What kill -9 leaves: the files as they are, the lock free."""
    store._abandon()


def records(*numbers: int) -> list[SpillRecord]:
    return [numbered(number) for number in numbers]


def fill(store: SpillStore, *numbers: int) -> list[int]:
    return [store.append(record) for record in records(*numbers)]


def take_all(store: SpillStore) -> list[tuple[int, SpillRecord]]:
    taken: list[tuple[int, SpillRecord]] = []
    while more := store.take(100, 1 << 20):
        taken += more
    return taken


def taken_numbers(store: SpillStore) -> list[int]:
    taken = take_all(store)
    assert [record for _, record in taken] == records(*(record.timestamp_ms for _, record in taken))
    return [record.timestamp_ms for _, record in taken]


def settle_all(store: SpillStore, taken: list[tuple[int, SpillRecord]]) -> None:
    for sequence, _ in taken:
        store.settle(sequence)


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.spill"), key=lambda path: path.name)


def put_aside(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.damaged"))


def run(code: str, *arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


# --- order and counts ------------------------------------------------------------------------------------------------


def test_records_come_in_order_and_whole(opened: Callable[..., SpillStore]) -> None:
    store = opened()
    written = [
        SpillRecord("a", b"value", b"key", [("h", b"1"), ("h", None), ("e", b"")], 1_700_000_000_123),
        SpillRecord("b", None),
        SpillRecord("ü", b"", b"", [], 0),
        SpillRecord("c" * 249, bytes(range(256)) * 8, None, None, -1),
    ]
    sequences = [store.append(record) for record in written]
    assert sequences == sorted(set(sequences))
    assert store.take(10, 1 << 20) == list(zip(sequences, written, strict=True))
    assert store.take(10, 1 << 20) == []


def test_counts(opened: Callable[..., SpillStore], folder: Path) -> None:
    store = opened()
    first, second, _ = fill(store, 1, 2, 3)
    assert (store.pending_count, store.untaken_count) == (3, 3)
    assert store.pending_bytes == segments(folder)[0].stat().st_size
    store.take(2, 1 << 20)
    assert (store.pending_count, store.untaken_count) == (3, 1)
    store.settle(second)
    store.settle(second)
    store.settle(first)
    assert (store.pending_count, store.untaken_count) == (1, 1)
    assert (store.damaged_count, store.damaged_bytes) == (0, 0)


def test_settling_what_is_not_out_is_nothing(opened: Callable[..., SpillStore]) -> None:
    store = opened()
    (sequence,) = fill(store, 1)
    for wrong in (sequence, sequence + 1, 0, -1, 1 << 80):
        store.settle(wrong)
    assert store.pending_count == 1
    assert taken_numbers(store) == [1]


def test_take_keeps_to_its_bounds_but_gives_one_at_least(opened: Callable[..., SpillStore]) -> None:
    store = opened()
    for size in (1000, 1000, 1000, 5000, 1000):
        store.append(SpillRecord("t", bytes(size)))
    assert [len(r.value or b"") for _, r in store.take(10, 2500)] == [1000, 1000]
    assert [len(r.value or b"") for _, r in store.take(1, 2500)] == [1000]
    assert [len(r.value or b"") for _, r in store.take(10, 10)] == [5000]
    assert store.take(0, 1 << 20) == []
    assert [len(r.value or b"") for _, r in store.take(10, 10)] == [1000]


def test_writing_and_taking_interleave(opened: Callable[..., SpillStore], folder: Path) -> None:
    store = opened(max_bytes=SMALL)
    given_out = 0
    for number in range(3000):
        fill(store, number)
        if number % 7 == 0:
            while more := store.take(3, 1 << 20):
                assert [r for _, r in more] == records(*range(given_out, given_out + len(more)))
                given_out += len(more)
                settle_all(store, more)
    assert given_out > 2990
    assert len(segments(folder)) <= 2


def test_records_greater_than_a_segment_and_a_chunk(opened: Callable[..., SpillStore], folder: Path) -> None:
    store = opened(max_bytes=4 << 20)
    values = [b"a" * 10, b"b" * (700 << 10), b"c" * 10, b"d" * (1 << 20)]
    for value in values:
        store.append(SpillRecord("t", value))
    crash(store)
    assert len(segments(folder)) == 4
    again = opened(max_bytes=4 << 20)
    assert [record.value for _, record in take_all(again)] == values


def test_a_backlog_is_never_loaded_whole(opened: Callable[..., SpillStore], monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened()
    for _ in range(40):
        store.append(SpillRecord("t", bytes(100 << 10)))
    read: list[int] = []
    pread = os.pread

    def watched(fd: int, size: int, at: int) -> bytes:
        read.append(size)
        return pread(fd, size, at)

    monkeypatch.setattr(os, "pread", watched)
    assert len(take_all(store)) == 40
    assert max(read) <= 256 << 10


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="no /dev/fd here")
def test_a_backlog_takes_no_file_descriptors(opened: Callable[..., SpillStore], folder: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    store = opened(max_bytes=8 << 20)
    for _ in range(140):
        store.append(SpillRecord("t", bytes(50 << 10)))
    for left in (100, 50, 0):
        store.take(store.untaken_count - left, 1 << 30)
        assert len(os.listdir("/dev/fd")) <= before + 5
    crash(store)
    again = opened(max_bytes=8 << 20)
    assert len(segments(folder)) >= 7
    assert again.untaken_count == 140
    assert len(os.listdir("/dev/fd")) <= before + 5


def test_many_threads(opened: Callable[..., SpillStore]) -> None:
    store = opened(max_bytes=1 << 20)
    seen: list[tuple[str, int]] = []

    def write(name: str) -> None:
        for number in range(1500):
            store.append(SpillRecord(name, b"x" * (number % 50), None, None, number))

    writers = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for writer in writers:
        writer.start()
    while len(seen) < 4500:
        taken = store.take(50, 1 << 20)
        seen += [(record.topic, record.timestamp_ms) for _, record in taken]
        settle_all(store, taken)
    for writer in writers:
        writer.join()
    for name in "abc":
        assert [number for topic, number in seen if topic == name] == list(range(1500))
    assert (store.pending_count, store.untaken_count) == (0, 0)


# --- bound -----------------------------------------------------------------------------------------------------------


def fill_up(store: SpillStore, size: int = 1000) -> int:
    count = 0
    with contextlib.suppress(SpillFullError):
        while True:
            store.append(SpillRecord("t", bytes(size)))
            count += 1
    return count


def test_the_bound(opened: Callable[..., SpillStore], folder: Path) -> None:
    store = opened(max_bytes=SMALL)
    count = fill_up(store)
    assert SMALL - 1100 < store.pending_bytes <= SMALL
    assert store.pending_bytes == sum(path.stat().st_size for path in segments(folder))
    with pytest.raises(
        QueueFullError, match=rf"{count} message\(s\) wait in .*KEVEN_SPILL_BYTES=65536; .* was not taken"
    ):
        store.append(SpillRecord("t", bytes(1000)))
    assert store.pending_count == count
    taken = take_all(store)
    assert len(taken) == count
    settle_all(store, taken)
    assert fill_up(store) >= count - 8


def test_what_was_taken_over_counts(opened: Callable[..., SpillStore]) -> None:
    first = opened(max_bytes=SMALL)
    count = fill_up(first)
    crash(first)
    second = opened(max_bytes=SMALL)
    assert fill_up(second) == 0
    settle_all(second, take_all(second))
    assert fill_up(second) == count


def test_a_file_that_is_all_done_does_not_hold_the_bound(opened: Callable[..., SpillStore], folder: Path) -> None:
    store = opened(max_bytes=SMALL)
    for _ in range(5):
        store.append(SpillRecord("t", bytes(60_000)))
        settle_all(store, take_all(store))
    assert len(segments(folder)) == 1


def test_the_space_of_the_file_being_written_can_be_had_back(opened: Callable[..., SpillStore], folder: Path) -> None:
    first = opened(max_bytes=SMALL)
    for _ in range(60):
        first.append(SpillRecord("t", bytes(1000)))
    crash(first)
    store = opened(max_bytes=SMALL)
    count = fill_up(store, 500)
    taken = take_all(store)
    settle_all(store, taken[60:-1])
    assert fill_up(store, 500) == 0
    settle_all(store, taken[-1:])
    assert fill_up(store, 500) == count


def test_a_record_that_never_fits(opened: Callable[..., SpillStore]) -> None:
    store = opened(max_bytes=SMALL)
    with pytest.raises(MessageTooLargeError, match="KEVEN_SPILL_BYTES=65536"):
        store.append(SpillRecord("t", bytes(SMALL)))
    assert (store.pending_count, store.pending_bytes) == (0, 0)


# --- settling and deletion -------------------------------------------------------------------------------------------


def test_a_file_goes_with_the_last_of_its_records_in_any_order(opened: Callable[..., SpillStore], folder: Path) -> None:
    store = opened(max_bytes=SMALL)
    fill(store, *range(300))
    files = segments(folder)
    assert len(files) >= 4
    taken = take_all(store)
    of_file: dict[int, list[int]] = {}
    for sequence, _ in taken:
        of_file.setdefault(sequence >> 48, []).append(sequence)
    assert len(of_file) == len(files)
    first, second, *_, latest = of_file.values()
    for sequence in second[1:] + first[:-1]:
        store.settle(sequence)
    assert segments(folder) == files
    store.settle(second[0])
    assert segments(folder) == [files[0], *files[2:]]
    store.settle(first[-1])
    assert segments(folder) == files[2:]
    # The last one is still written to.
    for sequence in latest:
        store.settle(sequence)
    assert files[-1].exists()


def test_an_untaken_record_keeps_its_file(opened: Callable[..., SpillStore], folder: Path) -> None:
    store = opened(max_bytes=SMALL)
    fill(store, *range(300))
    file = segments(folder)[0]
    crash(store)
    store = opened(max_bytes=SMALL)
    file = folder / store._name / file.name
    taken = store.take(10, 1 << 20)
    settle_all(store, taken)
    assert file.exists()


def test_what_is_settled_is_noted_once_a_second_and_when_nothing_waits(opened: Callable[..., SpillStore]) -> None:
    clock = Clock()
    store = opened(now=clock)
    fill(store, *range(10))
    taken = take_all(store)
    settle_all(store, taken[:3])
    crash(store)
    store = opened(now=clock)
    assert store.pending_count == 10, "within a second nothing was noted"
    taken = take_all(store)
    settle_all(store, taken[5:6])
    settle_all(store, taken[:2])
    clock.now += 1
    settle_all(store, taken[2:3])
    crash(store)
    store = opened(now=clock)
    assert taken_numbers(store) == list(range(3, 10)), "settled above the first one that waits: comes again"
    crash(store)
    store = opened(now=clock)
    taken = take_all(store)
    settle_all(store, taken)
    fill(store, 10)
    settle_all(store, take_all(store))
    crash(store)
    assert opened(now=clock).pending_count == 0


def test_what_is_settled_behind_a_file_that_waits(opened: Callable[..., SpillStore]) -> None:
    clock = Clock()
    store = opened(max_bytes=SMALL, now=clock)
    fill(store, *range(300))
    taken = store.take(250, 1 << 20)
    of_second = [entry for entry in taken if entry[0] >> 48 == 2]
    settle_all(store, of_second[:10])
    clock.now += 1
    settle_all(store, of_second[10:11])
    crash(store)
    numbers = taken_numbers(opened(max_bytes=SMALL))
    assert sorted(set(range(300)) - set(numbers)) == [record.timestamp_ms for _, record in of_second[:11]]


# --- restarts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [SpillStore.close, crash])
def test_a_restart_gives_out_what_waits(
    opened: Callable[..., SpillStore], folder: Path, end: Callable[[SpillStore], None]
) -> None:
    store = opened(max_bytes=SMALL)
    fill(store, *range(300))
    settle_all(store, store.take(120, 1 << 20))
    store.take(30, 1 << 20)
    end(store)
    again = opened(max_bytes=SMALL)
    waiting = again.pending_count
    assert again.untaken_count == waiting
    fill(again, 300, 301)
    numbers = taken_numbers(again)
    assert numbers == list(range(302 - len(numbers), 302))
    assert len(numbers) == waiting + 2
    assert waiting == 180 if end is SpillStore.close else 180 <= waiting <= 300
    assert len(list(folder.iterdir())) == 1
    assert again.damaged_count == 0


def test_sequences_rise_over_what_was_taken_over(opened: Callable[..., SpillStore]) -> None:
    store = opened()
    fill(store, 1, 2)
    store.close()
    again = opened()
    later = fill(again, 3)
    sequences = [sequence for sequence, _ in take_all(again)]
    assert sequences == sorted(set(sequences))
    assert sequences[-1:] == later


def test_a_restart_in_another_process(opened: Callable[..., SpillStore], folder: Path) -> None:
    store = opened()
    fill(store, 1, 2, 3)
    settle_all(store, store.take(1, 1 << 20))
    store.close()
    code = """
        import sys
        from keven_core.kafka.spill import SpillStore
        sys.path.insert(0, sys.argv[2])
        from spill_writer import numbered
        store = SpillStore(sys.argv[1], max_bytes=1 << 20)
        store.append(numbered(4))
        print([record == numbered(record.timestamp_ms) and record.timestamp_ms for _, record in store.take(9, 1 << 20)])
        """
    result = run(code, folder, WRITER.parent)
    assert (result.stdout, result.stderr) == ("[2, 3, 4]\n", "")
    assert taken_numbers(opened()) == [2, 3, 4]


def test_two_live_stores_keep_apart_and_only_a_dead_one_is_taken_over(
    opened: Callable[..., SpillStore], folder: Path
) -> None:
    one, two = opened(), opened()
    fill(one, 1, 2)
    fill(two, 11, 12)
    assert taken_numbers(one) == [1, 2]
    three = opened()
    assert three.pending_count == 0
    crash(one)
    four = opened()
    assert taken_numbers(four) == [1, 2]
    fill(two, 13)
    assert taken_numbers(two) == [11, 12, 13]
    assert len(list(folder.iterdir())) == 3


def test_of_several_dead_stores_the_oldest_comes_first(opened: Callable[..., SpillStore], folder: Path) -> None:
    stores = [opened() for _ in range(3)]
    for number, which in enumerate((2, 0, 1)):
        fill(stores[which], number * 10, number * 10 + 1)
    for store in stores:
        crash(store)
    assert taken_numbers(opened()) == [0, 1, 10, 11, 20, 21]
    assert len(list(folder.iterdir())) == 1


def test_equal_names_do_not_replace_each_other(
    opened: Callable[..., SpillStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [opened(max_bytes=SMALL) for _ in range(2)]
    monkeypatch.setattr(spill.time, "time_ns", lambda: 1000)
    for first, store in enumerate(stores):
        fill(store, *range(first, 200, 2))
        crash(store)
    monkeypatch.undo()
    numbers = taken_numbers(opened())
    assert sorted(numbers) == list(range(200))
    for remainder in range(2):
        assert [n for n in numbers if n % 2 == remainder] == list(range(remainder, 200, 2))


def test_a_clock_that_was_set_back(opened: Callable[..., SpillStore], monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(max_bytes=SMALL)
    fill(store, *range(100))
    crash(store)
    again = opened(max_bytes=SMALL)
    monkeypatch.setattr(spill.time, "time_ns", lambda: 1000)
    fill(again, *range(100, 300))
    monkeypatch.undo()
    crash(again)
    assert taken_numbers(opened()) == list(range(300))


def test_a_start_that_was_interrupted(opened: Callable[..., SpillStore], folder: Path) -> None:
    dead = opened(max_bytes=SMALL)
    fill(dead, *range(300))
    crash(dead)
    # As after a kill in the middle of taking over: some files here, some there, and a folder that has no lock yet.
    (old,) = folder.iterdir()
    young = folder / f"{2**62:020d}-1"
    young.mkdir()
    (folder / f"{2**62 + 1:020d}-1").mkdir()
    for path in segments(folder)[:2]:
        path.rename(young / path.name)
    assert old.exists()
    assert taken_numbers(opened()) == list(range(300))
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("gone", [True, False])
def test_a_new_sub_folder_that_another_store_takes_for_a_dead_one(
    opened: Callable[..., SpillStore], folder: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    flock = spill.fcntl.flock
    held: list[int] = []

    def late(fd: int, operation: int) -> None:
        (sub_folder,) = folder.iterdir()
        if gone:
            shutil.rmtree(sub_folder)
        else:
            held.append(os.open(sub_folder / "lock", os.O_RDWR))
            flock(held[0], operation)
        monkeypatch.undo()
        flock(fd, operation)

    monkeypatch.setattr(spill.fcntl, "flock", late)
    store = opened()
    fill(store, 1)
    assert [path.parent.name for path in segments(folder)] == [store._name]
    for fd in held:
        os.close(fd)


def test_a_new_sub_folder_that_another_store_removes(
    opened: Callable[..., SpillStore], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = os.mkdir
    folder.mkdir()

    def fleeting(path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        mkdir(path, mode, dir_fd=dir_fd)
        os.rmdir(path, dir_fd=dir_fd)

    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", fleeting)
        with pytest.raises(ConfigurationError, match="what is made in it vanishes"):
            opened()

    def once(path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        monkeypatch.undo()
        fleeting(path, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", once)
    assert fill(opened(), 1)


def test_leftovers_that_another_store_takes_first(
    opened: Callable[..., SpillStore],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(spill, "_names", lambda *arguments: [f"{1:020d}-1"])
    assert opened().pending_count == 0
    assert not caplog.records


def test_what_is_not_ours_is_left_alone(opened: Callable[..., SpillStore], folder: Path) -> None:
    dead = opened()
    fill(dead, 1)
    crash(dead)
    (sub_folder,) = folder.iterdir()
    foreign = [
        folder / "notes.txt",
        folder / "other" / f"{1:020d}.spill",
        sub_folder / "1.spill",
        sub_folder / f"{1:020d}.spill.bak",
    ]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    store = opened()
    taken = take_all(store)
    assert len(taken) == 1
    settle_all(store, taken)
    store.close()
    assert all(path.read_bytes() == b"mine" for path in foreign)


# --- close -----------------------------------------------------------------------------------------------------------


def test_close_leaves_nothing_when_nothing_waits(opened: Callable[..., SpillStore], folder: Path) -> None:
    store = opened()
    fill(store, 1, 2)
    settle_all(store, take_all(store))
    store.close()
    assert list(folder.iterdir()) == []
    store.close()


def test_after_close(opened: Callable[..., SpillStore]) -> None:
    store = opened()
    fill(store, 1)
    ((sequence, _),) = store.take(1, 1)
    store.close()
    store.close()
    store.settle(sequence)
    with pytest.raises(ClosedError):
        store.append(numbered(2))
    with pytest.raises(ClosedError):
        store.take(1, 1)
    assert taken_numbers(opened()) == [1]


def test_a_forgotten_store_does_not_keep_the_records(folder: Path) -> None:
    with pytest.warns(ResourceWarning, match="was not closed"):
        fill(SpillStore(folder, max_bytes=LARGE), 1)
    again = SpillStore(folder, max_bytes=LARGE)
    assert taken_numbers(again) == [1]
    again.close()


# --- damage ----------------------------------------------------------------------------------------------------------


def written_once(count: int) -> tuple[str, bytes, list[int]]:
    """The name and bytes of a segment with `count` records, and where each begins and the last one ends."""
    with tempfile.TemporaryDirectory() as folder:
        store = SpillStore(folder, max_bytes=LARGE)
        starts = [sequence & 0xFFFFFFFF for sequence in fill(store, *range(count))]
        crash(store)
        (path,) = segments(Path(folder))
        return path.name, path.read_bytes(), [*starts, path.stat().st_size]


NAME, IMAGE, STARTS = written_once(6)


@contextlib.contextmanager
def left_behind(image: bytes) -> Iterator[Path]:
    """A folder in which a dead store has left this segment."""
    with tempfile.TemporaryDirectory() as name:
        sub_folder = Path(name) / f"{1:020d}-1"
        sub_folder.mkdir()
        (sub_folder / NAME).write_bytes(image)
        yield Path(name)


def test_a_torn_tail_at_every_byte(caplog: pytest.LogCaptureFixture) -> None:
    for size in range(STARTS[-2], STARTS[-1]):
        with left_behind(IMAGE[:size]) as folder:
            caplog.clear()
            store = SpillStore(folder, max_bytes=LARGE)
            fill(store, 100)
            taken = take_all(store)
            assert [record for _, record in taken] == records(0, 1, 2, 3, 4, 100)
            torn = size - STARTS[-2]
            assert (store.damaged_count, store.damaged_bytes) == (int(torn > 0), torn)
            assert (store.pending_count, store.untaken_count) == (6, 0)
            settle_all(store, taken)
            assert [path.read_bytes() for path in put_aside(folder)] == ([IMAGE[:size]] if torn else [])
            if torn:
                assert f"{NAME} is damaged at offset {STARTS[-2]}: no whole record" in caplog.text
            assert len(caplog.records) == int(torn > 0)
            store.close()
            assert list(folder.iterdir()) == put_aside(folder)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.integers(0, len(IMAGE) * 8 - 1))
def test_a_flipped_bit_never_gives_a_wrong_record(bit: int) -> None:
    image = bytearray(IMAGE)
    image[bit // 8] ^= 1 << bit % 8
    with left_behind(bytes(image)) as folder:
        store = SpillStore(folder, max_bytes=LARGE)
        assert store.pending_count == 6 or bit // 8 >= 24 or bit // 8 < 8
        taken = take_all(store)
        numbers = [record.timestamp_ms for _, record in taken]
        assert [record for _, record in taken] == records(*numbers)
        assert numbers == sorted(set(numbers))
        assert (store.pending_count, store.untaken_count) == (len(taken), 0)
        in_mark = 8 <= bit // 8 < 24
        if in_mark:
            assert (len(taken), store.damaged_count) == (6, 0)
        else:
            assert store.damaged_count >= 1
            assert store.damaged_bytes >= 1
            before = sum(start <= bit // 8 for start in STARTS) - 1  # records that end before the bit
            assert numbers[: max(before, 0)] == list(range(max(before, 0)))
        settle_all(store, taken)
        assert [path.read_bytes() for path in put_aside(folder)] == ([] if in_mark else [image])
        store.close()
        assert store.pending_bytes == 0


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_damage_never_gives_a_wrong_record(data: st.DataObject) -> None:
    image = bytearray(IMAGE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(image)))
        image[at : at + data.draw(st.integers(0, 12))] = data.draw(st.binary(max_size=12))
    with left_behind(bytes(image)) as folder:
        store = SpillStore(folder, max_bytes=LARGE)
        fill(store, 100)
        taken = take_all(store)
        assert [record for _, record in taken] == records(*(record.timestamp_ms for _, record in taken))
        assert taken[-1][1].timestamp_ms == 100
        assert (store.pending_count, store.untaken_count) == (len(taken), 0)
        settle_all(store, taken)
        assert store.pending_count == 0
        store.close()
        assert segments(folder) == []


@pytest.mark.parametrize("where", [4, 12, -1])
def test_a_wrong_record_in_the_middle_costs_only_itself(where: int) -> None:
    image = bytearray(IMAGE)
    image[STARTS[2 if where >= 0 else 3] + where] ^= 0x40
    with left_behind(bytes(image)) as folder:
        store = SpillStore(folder, max_bytes=LARGE)
        assert taken_numbers(store) == [0, 1, 3, 4, 5]
        assert (store.damaged_count, store.damaged_bytes) == (1, STARTS[3] - STARTS[2])
        store.close()


@pytest.mark.parametrize("length", [0, 1 << 31, (1 << 32) - 1])
def test_behind_an_impossible_length_nothing_is_trusted(length: int) -> None:
    image = bytearray(IMAGE)
    image[STARTS[2] : STARTS[2] + 4] = length.to_bytes(4, "little")
    with left_behind(bytes(image)) as folder:
        store = SpillStore(folder, max_bytes=LARGE)
        assert taken_numbers(store) == [0, 1]
        assert store.damaged_count >= 1
        assert store.damaged_bytes == len(IMAGE) - STARTS[2]
        store.close()


def test_lost_records_of_a_finished_file_are_counted(
    opened: Callable[..., SpillStore], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened()
    *_, last, _ = fill(store, *range(10))
    store.close()
    (path,) = segments(folder)
    os.truncate(path, last & 0xFFFFFFFF)  # at the end of a record: only the count tells
    again = opened()
    assert again.pending_count == 10
    assert taken_numbers(again) == list(range(8))
    assert (again.damaged_count, again.pending_count, again.untaken_count) == (2, 8, 0)
    assert "2 record(s) are missing" in caplog.text


@pytest.mark.parametrize(("end", "lost"), [(SpillStore.close, 2), (crash, 1)])
def test_a_file_shorter_than_what_was_settled(
    opened: Callable[..., SpillStore], folder: Path, end: Callable[[SpillStore], None], lost: int
) -> None:
    clock = Clock()
    store = opened(now=clock)
    fill(store, *range(10))
    taken = take_all(store)
    clock.now += 1
    settle_all(store, taken[:7][::-1])
    clock.now += 1
    settle_all(store, taken[7:8])
    end(store)
    os.truncate(segments(folder)[0], taken[5][0] & 0xFFFFFFFF)
    again = opened()
    assert (again.damaged_count, again.pending_count, again.untaken_count) == (lost, 0, 0)
    assert again.damaged_bytes == 0
    assert len(put_aside(folder)) == 1


def test_a_tail_of_zeros_holds_no_records() -> None:
    with left_behind(IMAGE + bytes(5000)) as folder:
        store = SpillStore(folder, max_bytes=LARGE)
        assert taken_numbers(store) == list(range(6))
        assert (store.damaged_count, store.damaged_bytes) == (1, 5000)
        store.close()


@pytest.mark.parametrize("image", [b"KVSPILL\x02" + IMAGE[8:], IMAGE[:10], b"\x00" * 100])
def test_a_file_that_is_no_segment_is_put_aside(image: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with left_behind(image) as folder:
        store = SpillStore(folder, max_bytes=LARGE)
        assert (store.damaged_count, store.damaged_bytes, store.pending_count) == (1, len(image), 0)
        assert [path.read_bytes() for path in put_aside(folder)] == [image]
        assert "damaged at offset 0" in caplog.text
        store.close()


def test_an_empty_file_is_deleted() -> None:
    with left_behind(b"") as folder:
        store = SpillStore(folder, max_bytes=LARGE)
        assert store.damaged_count == 0
        store.close()
        assert list(folder.iterdir()) == []


def test_a_damaged_file_is_damaged_after_a_restart_too(opened: Callable[..., SpillStore]) -> None:
    image = bytearray(IMAGE)
    image[STARTS[2] : STARTS[2] + 4] = bytes(4)
    with left_behind(bytes(image)) as folder:
        store = SpillStore(folder, max_bytes=LARGE)
        settle_all(store, take_all(store)[:1])
        store.close()
        again = SpillStore(folder, max_bytes=LARGE)
        settle_all(again, take_all(again))
        assert again.damaged_count >= 1
        assert len(put_aside(folder)) == 1
        again.close()


def test_a_damaged_file_whose_damage_lies_before_what_waits() -> None:
    image = bytearray(IMAGE)
    image[STARTS[3] - 1] ^= 1
    with left_behind(bytes(image)) as folder:
        store = SpillStore(folder, max_bytes=LARGE)
        settle_all(store, take_all(store)[:4])
        store.close()
        again = SpillStore(folder, max_bytes=LARGE)
        settle_all(again, take_all(again))
        again.close()
        assert [path.read_bytes()[24:] for path in put_aside(folder)] == [image[24:]]


def test_damage_under_a_live_store(opened: Callable[..., SpillStore], folder: Path) -> None:
    store = opened()
    fill(store, 1, 2, 3)
    (path,) = segments(folder)
    os.truncate(path, 30)
    fill(store, 4)
    assert taken_numbers(store) == []
    assert (store.pending_count, store.untaken_count, store.damaged_count) == (0, 0, 4)
    fill(store, 5)
    assert taken_numbers(store) == [5]


def test_files_that_someone_has_deleted(opened: Callable[..., SpillStore], folder: Path) -> None:
    store = opened(max_bytes=SMALL)
    fill(store, *range(300))
    files = segments(folder)
    files[1].unlink()
    numbers = taken_numbers(store)
    assert numbers == sorted(set(numbers))
    assert len(numbers) + store.damaged_count == 300
    assert (store.pending_count, store.untaken_count) == (len(numbers), 0)


def test_a_record_written_by_a_log_handler(opened: Callable[..., SpillStore], folder: Path) -> None:
    store = opened(max_bytes=SMALL)
    fill(store, *range(300))
    segments(folder)[1].unlink()

    class IntoTheStore(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            store.append(numbered(1000))

    handler = IntoTheStore()
    logging.getLogger("keven_core.kafka").addHandler(handler)
    try:
        assert 1000 in taken_numbers(store)
    finally:
        logging.getLogger("keven_core.kafka").removeHandler(handler)


# --- places in between -----------------------------------------------------------------------------------------------


def test_what_is_inserted_comes_where_its_place_was_reserved(opened: Callable[..., SpillStore]) -> None:
    store = opened()
    fill(store, 1, 2)
    place = store.reserve()
    fill(store, 5, 6)
    assert len(store.insert(place, records(3, 4))) == 2
    assert (store.pending_count, store.untaken_count) == (6, 4)
    store.close()
    assert taken_numbers(opened()) == [1, 2, 3, 4, 5, 6]


def test_what_is_inserted_is_for_the_next_store_and_survives_a_crash(opened: Callable[..., SpillStore]) -> None:
    store = opened(fsync="always")
    place = store.reserve()
    taken = fill(store, 3)
    assert len(store.insert(place, records(1, 2))) == 2
    assert taken_numbers(store) == [3]
    store.settle(taken[0])
    assert store.pending_count == 2
    crash(store)
    assert taken_numbers(opened())[:2] == [1, 2]


def test_places_may_stay_empty(opened: Callable[..., SpillStore], folder: Path) -> None:
    store = opened()
    places = [store.reserve() for _ in range(3)]
    assert places == sorted(set(places))
    assert store.insert(places[1], []) == []
    assert segments(folder) == []
    store.close()
    assert list(folder.iterdir()) == []


def test_of_what_does_not_fit_the_first_are_taken(opened: Callable[..., SpillStore]) -> None:
    store = opened(max_bytes=SMALL)
    place = store.reserve()
    fill(store, 100)
    before = store.pending_bytes
    large = [SpillRecord("t", b"x" * 20_000, None, None, number) for number in range(5)]
    assert len(store.insert(place, large)) == 3
    assert before < store.pending_bytes <= SMALL
    assert store.insert(store.reserve(), large[3:]) == []
    store.close()
    assert [record.timestamp_ms for _, record in take_all(opened())] == [0, 1, 2, 100]


def test_a_failing_disk_takes_nothing_of_it(
    opened: Callable[..., SpillStore], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened()
    place = store.reserve()
    fill(store, 2)

    def fail(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(SpillError, match="the messages were not taken"):
            store.insert(place, records(1))
    assert store.pending_count == 1
    assert len(segments(folder)) == 1
    assert len(store.insert(place, records(1))) == 1
    store.close()
    assert taken_numbers(opened()) == [1, 2]
    with pytest.raises(ClosedError):
        store.insert(place, records(1))
    with pytest.raises(ClosedError):
        store.reserve()


# --- kill -9 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill_at", [1, 700, 5000])
def test_kill_loses_at_most_the_record_being_written(
    opened: Callable[..., SpillStore], folder: Path, kill_at: int
) -> None:
    writer = subprocess.Popen([sys.executable, WRITER, folder, "whole"], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    last = -1
    for line in writer.stdout:
        last = int(line) if line.endswith(b"\n") else last
        if last == kill_at:
            writer.kill()
    assert writer.wait() == -signal.SIGKILL
    writer.stdout.close()
    store = opened()
    numbers = taken_numbers(store)
    assert numbers in (list(range(last + 1)), list(range(last + 2)))
    assert store.damaged_count <= 1


def test_kill_in_the_middle_of_a_write(opened: Callable[..., SpillStore], folder: Path) -> None:
    writer = subprocess.run([sys.executable, WRITER, folder, "50"], stdout=subprocess.PIPE)
    assert writer.returncode == -signal.SIGKILL
    assert writer.stdout.split()[-1] == b"49"
    store = opened()
    assert taken_numbers(store) == list(range(50))
    assert store.damaged_count == 1


# --- failing disks ---------------------------------------------------------------------------------------------------


class FailingDisk:
    """os.pwrite that writes `room` bytes, in parts of at most `part`, and then fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, part: int = 1 << 30) -> None:
        self.room, self.part = room, part
        self.write = os.pwrite
        monkeypatch.setattr(os, "pwrite", self)

    def __call__(self, fd: int, data: bytes, at: int) -> int:
        size = min(len(data), self.part, self.room)
        if not size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= size
        return self.write(fd, data[:size], at)


def test_short_writes_are_continued(opened: Callable[..., SpillStore], monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened()
    FailingDisk(monkeypatch, 1 << 30, part=7)
    fill(store, 1, 2, 3)
    monkeypatch.undo()
    crash(store)
    again = opened()
    assert taken_numbers(again) == [1, 2, 3]
    assert again.damaged_count == 0


@pytest.mark.parametrize("room", [0, 1, 23, 24, 25, 31, 32, 40])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_full_disk(
    opened: Callable[..., SpillStore], folder: Path, monkeypatch: pytest.MonkeyPatch, room: int, fresh: bool
) -> None:
    store = opened()
    before = [] if fresh else [1, 2]
    fill(store, *before)
    size = store.pending_bytes
    disk = FailingDisk(monkeypatch, room)
    for _ in range(3):
        with pytest.raises(SpillError, match="No space left on device; the message was not taken") as caught:
            store.append(numbered(96))
        assert (caught.value.errno, isinstance(caught.value, OSError)) == (errno.ENOSPC, True)
    assert (store.pending_count, store.untaken_count) == (len(before), len(before))
    assert sum(path.stat().st_size for path in segments(folder)) == store.pending_bytes
    assert store.pending_bytes in (size, 24)
    disk.room = 1 << 30
    fill(store, 3)
    assert taken_numbers(store) == [*before, 3]
    crash(store)
    again = opened()
    assert taken_numbers(again) == [*before, 3]
    assert again.damaged_count == 0


def test_what_could_not_be_cut_off_is_written_over(
    opened: Callable[..., SpillStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened()
    fill(store, 1)

    def refuse(fd: int, size: int) -> None:
        raise OSError(errno.EIO, "no")

    disk = FailingDisk(monkeypatch, 20)
    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(SpillError):
        fill(store, 2)
    disk.room = 1 << 30
    fill(store, 3)
    monkeypatch.undo()
    crash(store)
    again = opened()
    assert taken_numbers(again) == [1, 3]
    assert again.damaged_count == 0


def test_a_limit_that_the_kernel_sets(folder: Path) -> None:
    code = """
        import resource, sys
        from keven_core.kafka.spill import SpillError, SpillRecord, SpillStore
        store = SpillStore(sys.argv[1], max_bytes=1 << 20)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        count = 0
        try:
            while True:
                store.append(SpillRecord("t", bytes(900)))
                count += 1
        except SpillError as error:
            print(error.errno, count, store.pending_count)
        store.append(SpillRecord("t", b"small"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        store.append(SpillRecord("t", bytes(900)))
        store._abandon()
        again = SpillStore(sys.argv[1], max_bytes=1 << 20)
        print(len(again.take(99, 1 << 20)), again.damaged_count)
        """
    result = run(code, folder)
    assert result.stderr == ""
    assert result.stdout == f"{errno.EFBIG} 10 10\n12 0\n"


def test_a_file_that_cant_be_opened_now_is_tried_again(
    opened: Callable[..., SpillStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(max_bytes=SMALL)
    fill(store, *range(300))
    open_file = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", refuse)
    first = store.take(1000, 1 << 20)
    assert len(first) > 10, "what was read before is given"
    with pytest.raises(SpillError, match="Too many open files; it is tried again"):
        store.take(1000, 1 << 20)
    monkeypatch.setattr(os, "open", open_file)
    assert [record for _, record in first + take_all(store)] == records(*range(300))


def test_a_file_that_cant_be_removed(
    opened: Callable[..., SpillStore], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(max_bytes=SMALL)
    fill(store, *range(150))

    def refuse(path: str, *, dir_fd: int | None = None) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "unlink", refuse)
    settle_all(store, take_all(store))
    assert "can't be removed: Read-only file system" in caplog.text
    assert store.pending_count == 0


# --- fsync -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is fsynced, "file" or "folder"."""
    calls: list[str] = []
    fsync = os.fsync

    def watched(fd: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    return calls


def test_fsync_never(opened: Callable[..., SpillStore], synced: list[str]) -> None:
    store = opened(max_bytes=SMALL)
    fill(store, *range(300))
    store.close()
    assert synced == []


def test_fsync_always(opened: Callable[..., SpillStore], synced: list[str]) -> None:
    store = opened(fsync="always")
    fill(store, 1)
    assert "folder" in synced
    synced.clear()
    fill(store, 2)
    assert synced == ["file"]
    fill(store, 3)
    assert synced == ["file"] * 2


def test_fsync_interval(opened: Callable[..., SpillStore], synced: list[str]) -> None:
    clock = Clock()
    store = opened(fsync="interval", fsync_interval_ms=500, now=clock, max_bytes=SMALL)
    fill(store, 1)
    synced.clear()
    fill(store, 2)
    clock.now += 0.4
    fill(store, 3)
    assert synced == []
    clock.now += 0.1
    store.take(1, 1)
    assert synced == ["file"]
    clock.now += 5
    store.take(1, 1)
    assert synced == ["file"], "there was nothing new"
    fill(store, 4)
    assert synced == ["file"]
    fill(store, 5)
    assert synced == ["file"] * 2, "what came before, by the next append"
    fill(store, *range(6, 300))
    assert 2 * (synced.count("file") - 2) == synced.count("folder") > 0, "and every file that is full"
    synced.clear()
    store.close()
    assert synced == ["file"]


def test_a_failed_fsync(opened: Callable[..., SpillStore], monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(fsync="always")
    fill(store, 1)

    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(SpillError, match="the message was not taken"):
            fill(store, 2)
    fill(store, 3)
    crash(store)
    clock = Clock()
    store = opened(fsync="interval", now=clock)
    assert taken_numbers(store) == [1, 3]
    fill(store, 4)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(SpillError, match="power cut"):
            store.close()
    assert taken_numbers(opened()) == [1, 3, 4]


# --- fork ------------------------------------------------------------------------------------------------------------


def test_a_forked_child_keeps_off(folder: Path) -> None:
    code = """
        import os, sys, threading
        from keven_core.kafka.errors import ForkedProcessError
        from keven_core.kafka.spill import SpillRecord, SpillStore
        store = SpillStore(sys.argv[1], max_bytes=1 << 20)
        store.append(SpillRecord("t", b"1"))
        ((sequence, _),) = store.take(1, 1)
        store._lock.acquire()  # as by a thread that is in there
        child = os.fork()
        if child == 0:
            refused = 0
            calls = [(store.append, SpillRecord("t", b"2")), (store.take, 1, 1), (store.settle, sequence)]
            for call, *arguments in calls:
                try:
                    call(*arguments)
                except ForkedProcessError:
                    refused += 1
            store.close()
            own = SpillStore(sys.argv[1], max_bytes=1 << 20)
            taken_over = own.pending_count
            own.append(SpillRecord("t", b"child"))
            if os.fork() == 0:
                own.close()
                os._exit(0)
            os.wait()
            os._exit(refused * 10 + taken_over + (own.pending_count - 1))
        store._lock.release()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        store.append(SpillRecord("t", b"3"))
        print([record.value for _, record in store.take(9, 1 << 20)], len(os.listdir(sys.argv[1])))
        store.settle(sequence)
        print(store.pending_count)
        """
    result = run(code, folder)
    assert result.stderr == ""
    assert result.stdout == "30\n[b'3'] 2\n1\n"


def test_a_child_that_outlives_its_parent_does_not_keep_the_records(
    opened: Callable[..., SpillStore], folder: Path
) -> None:
    code = """
        import os, sys
        from keven_core.kafka.spill import SpillRecord, SpillStore
        store = SpillStore(sys.argv[1], max_bytes=1 << 20)
        store.append(SpillRecord("t", b"1"))
        ready, tell = os.pipe()
        if os.fork() == 0:
            os.write(tell, b"1")
            sys.stdin.read()
            os._exit(0)
        os.read(ready, 1)
        os.write(1, b"forked")
        os._exit(0)
        """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.read(6) == b"forked"
    assert process.wait() == 0
    assert opened().pending_count == 1, "the child still lives"
    process.stdin.close()
    assert process.stdout.read() == b""
    process.stdout.close()


# --- permissions, links, arguments -----------------------------------------------------------------------------------


def test_only_this_user_may_read(opened: Callable[..., SpillStore], folder: Path) -> None:
    store = opened()
    fill(store, 1)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (sub_folder,) = folder.iterdir()
    assert stat.S_IMODE(sub_folder.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in sub_folder.iterdir()} == {
        "lock": 0o600,
        segments(folder)[0].name: 0o600,
    }


def test_links_are_not_followed(
    opened: Callable[..., SpillStore], folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / NAME).write_bytes(IMAGE)
    folder.mkdir()
    (folder / f"{1:020d}-1").symlink_to(elsewhere)
    linked = folder / f"{2:020d}-1"
    linked.mkdir()
    (linked / NAME).symlink_to(elsewhere / NAME)
    with_lock = folder / f"{3:020d}-1"
    with_lock.mkdir()
    (with_lock / "lock").symlink_to(elsewhere / "lock")
    (with_lock / NAME).write_bytes(IMAGE)
    store = opened()
    assert store.pending_count == 0
    store.close()
    assert (elsewhere / NAME).read_bytes() == IMAGE
    assert [path.name for path in elsewhere.iterdir()] == [NAME]
    assert f"{with_lock} can't be taken over" in caplog.text


def test_a_file_replaced_by_a_link(opened: Callable[..., SpillStore], folder: Path, tmp_path: Path) -> None:
    store = opened(max_bytes=SMALL)
    fill(store, *range(300))
    victim = tmp_path / "victim"
    path = segments(folder)[1]
    shutil.copy(path, victim)
    path.unlink()
    path.symlink_to(victim)
    content = victim.read_bytes()
    taken = take_all(store)
    assert len(taken) + store.damaged_count == 300
    settle_all(store, taken)
    store.close()
    assert victim.read_bytes() == content


@pytest.mark.parametrize("below", ["file", "file/below"])
def test_a_folder_that_is_none(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        ConfigurationError, match=r"spill_dir='.*file.*' can't be used: it is not a folder; name a folder"
    ):
        SpillStore(tmp_path / below, max_bytes=LARGE)


@pytest.mark.parametrize("call", ["mkdir", "open", "makedirs"])
def test_a_folder_that_cant_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(ConfigurationError, match="can't be used: Permission denied; name a folder"):
        SpillStore(tmp_path, max_bytes=LARGE)
    monkeypatch.undo()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigurationError, match="Permission denied"):
        SpillStore(tmp_path, max_bytes=LARGE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bytes": 65535}, "KEVEN_SPILL_BYTES=65535 is not allowed: give a whole number of 65536 or more"),
        ({"max_bytes": True}, "KEVEN_SPILL_BYTES=True"),
        ({"max_bytes": 1e9}, "KEVEN_SPILL_BYTES=1000000000.0"),
        ({"max_bytes": "1 GB"}, "KEVEN_SPILL_BYTES='1 GB'"),
        ({"fsync": "sometimes"}, "KEVEN_SPILL_FSYNC='sometimes' is not known; allowed: never, always, interval"),
        ({"fsync": True}, "KEVEN_SPILL_FSYNC=True"),
        ({"fsync_interval_ms": 0}, "fsync_interval_ms=0 is not allowed"),
    ],
)
def test_wrong_arguments(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        SpillStore(folder, **{"max_bytes": LARGE, **options})
    assert message in str(caught.value)
    assert not folder.exists()


def test_errors_are_what_they_mean() -> None:
    assert issubclass(SpillError, KevenError)
    assert issubclass(SpillError, OSError)
    assert issubclass(SpillFullError, QueueFullError)
    assert issubclass(ForkedProcessError, KevenError)


# --- all together ----------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_nothing_is_lost_whatever_happens(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        clock = Clock()
        store = SpillStore(name, max_bytes=SMALL, now=clock)
        written, settled = 0, set()
        out: dict[int, int] = {}
        last = -1  # given out since the last restart
        for _ in range(data.draw(st.integers(1, 60))):
            step = data.draw(
                st.sampled_from(["append", "append", "take", "settle", "settle", "second", "close", "crash"])
            )
            if step == "append":
                for _ in range(data.draw(st.integers(1, 40))):
                    with contextlib.suppress(SpillFullError):
                        store.append(SpillRecord("t", bytes(written * 7919 % 700), None, None, written))
                        written += 1
            elif step == "take":
                for sequence, record in store.take(data.draw(st.integers(1, 50)), 20_000):
                    assert record == SpillRecord(
                        "t", bytes(record.timestamp_ms * 7919 % 700), None, None, record.timestamp_ms
                    )
                    assert record.timestamp_ms > last
                    assert set(range(last + 1, record.timestamp_ms)) <= settled
                    last = record.timestamp_ms
                    out[sequence] = last
            elif step == "settle":
                for sequence in data.draw(st.permutations(sorted(out)))[: data.draw(st.integers(0, 50))]:
                    store.settle(sequence)
                    settled.add(out.pop(sequence))
            elif step == "second":
                clock.now += 1
            else:
                store.close() if step == "close" else crash(store)
                store = SpillStore(name, max_bytes=SMALL, now=clock)
                assert store.pending_count == store.untaken_count >= written - len(settled)
                out.clear()
                last = -1
            assert store.untaken_count + len(out) == store.pending_count
            assert store.pending_bytes <= SMALL
            assert store.pending_bytes == sum(path.stat().st_size for path in segments(Path(name)))
        rest = take_all(store)
        assert {record.timestamp_ms for _, record in rest} | set(out.values()) | settled == set(range(written))
        settle_all(store, rest)
        for sequence in out:
            store.settle(sequence)
        assert (store.pending_count, store.damaged_count) == (0, 0)
        store.close()
        assert os.listdir(name) == []
