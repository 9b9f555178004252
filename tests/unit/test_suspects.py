"""The memory that a worker and its supervisor share: what one writes the other reads, whatever state it is left in."""

import os
import tempfile
from collections.abc import Iterator

import pytest
from builds import run_python

from keven_core._native.suspects import Suspects


@pytest.fixture
def fd() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), Suspects.SIZE)
        yield file.fileno()


def test_records_in_hand_are_seen_from_the_other_side(fd: int) -> None:
    supervisor, worker = Suspects(fd, fresh=True), Suspects(fd)
    assert supervisor.in_hand() == {}
    place, other = worker.place_of("orders", 3), worker.place_of("größe", 0)
    assert worker.place_of("orders", 3) == place != other
    first, second = worker.enter(place, 0), worker.enter(other, 1 << 40)
    assert supervisor.in_hand() == {first: ("orders", 3, 0), second: ("größe", 0, 1 << 40)}
    worker.leave(first)
    assert list(supervisor.in_hand().values()) == [("größe", 0, 1 << 40)]
    worker.leave(second)
    assert supervisor.in_hand() == {}
    assert worker.enter(place, 1) in (first, second)


def test_what_finds_no_room_is_not_tracked(fd: int) -> None:
    supervisor, worker = Suspects(fd, fresh=True), Suspects(fd)
    place = worker.place_of("t", 0)
    cells = [worker.enter(place, offset) for offset in range(1100)]
    assert len(set(cells[:1024])) == 1024
    assert set(cells[1024:]) == {-1}
    assert len(supervisor.in_hand()) == 1024
    for cell in cells:
        worker.leave(cell)
    assert supervisor.in_hand() == {}
    with pytest.raises(ValueError, match="no record entered at 5"):
        worker.leave(5)
    with pytest.raises(ValueError, match="no record entered at 1024"):
        worker.leave(1024)
    for partition in range(5000):
        index = worker.place_of("t", partition)
        assert index == (partition if partition < 4096 else -1)
    worker.enter(worker.place_of("t", 4999), 7)
    assert worker.place_of("x" * 257, 0) == -1
    assert supervisor.in_hand() == {}


def test_signs_of_life(fd: int) -> None:
    supervisor, worker = Suspects(fd, fresh=True), Suspects(fd)
    assert (supervisor.beats, supervisor.phase) == (0, 0)
    worker.beat()
    worker.phase = 2
    assert (supervisor.beats, supervisor.phase) == (1, 2)


def test_suspects_are_seen_from_the_other_side(fd: int) -> None:
    supervisor, worker = Suspects(fd, fresh=True), Suspects(fd)
    assert worker.suspects() == []
    assert worker.find("t", 0, 5) is None
    assert worker.last_suspect("t", 0) == -1
    given = [("t", 0, 5, 1, False, "it hung"), ("t", 0, 3, 3, True, "é" * 200), ("u", 1, 9, 2, False, "")]
    supervisor.write_suspects(given)
    assert worker.suspects() == [given[0], ("t", 0, 3, 3, True, "é" * 80), given[2]]
    assert worker.find("t", 0, 5) == (1, False, "it hung")
    assert worker.find("t", 1, 5) is None
    assert [worker.last_suspect("t", 0), worker.last_suspect("u", 1), worker.last_suspect("u", 0)] == [5, 9, -1]
    supervisor.write_suspects([("t", 0, offset, 1, False, "") for offset in range(100)])
    assert [entry[2] for entry in worker.suspects()] == list(range(36, 100))
    supervisor.write_suspects([])
    assert worker.suspects() == []


def test_it_outlives_the_worker(fd: int) -> None:
    supervisor = Suspects(fd, fresh=True)
    pid = os.fork()
    if pid == 0:
        worker = Suspects(fd)
        worker.enter(worker.place_of("t", 2), 7)
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert list(supervisor.in_hand().values()) == [("t", 2, 7)]


def test_a_worker_that_wrote_nonsense_is_not_believed(fd: int) -> None:
    supervisor = Suspects(fd, fresh=True)
    for filling in (b"\xff", b"\x7f", b"\x00", b"\x41"):
        os.pwrite(fd, filling * Suspects.SIZE, 0)
        supervisor.in_hand()
        supervisor.suspects()
        supervisor.find("t", 0, 0)
        supervisor.place_of("t", 0)


def test_files_that_are_none(fd: int) -> None:
    os.ftruncate(fd, 100)
    with pytest.raises(ValueError, match="less than"):
        Suspects(fd)
    with pytest.raises(OSError):
        Suspects(-1)
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(ValueError):
            Suspects(read_end)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_misuse_is_an_exception() -> None:
    result = run_python(
        "-c",
        """
import os, tempfile
from keven_core._native.consumer import Consumer
from keven_core._native.suspects import Suspects

empty = Suspects.__new__(Suspects)
assert empty.enter(0, 0) == -1
empty.beat()
for call in (empty.in_hand, empty.suspects, lambda: empty.place_of("t", 0), lambda: empty.leave(0), lambda: empty.phase,
             lambda: empty.write_suspects([]), lambda: empty.beats):
    try:
        call()
    except ValueError as error:
        assert "never initialized" in str(error)
    else:
        raise SystemExit("not refused")
with tempfile.TemporaryFile() as file:
    os.ftruncate(file.fileno(), Suspects.SIZE)
    one = Suspects(file.fileno(), fresh=True)
    try:
        one.__init__(file.fileno())
    except ValueError:
        pass
    else:
        raise SystemExit("initialized twice")
    # Two consumers, and one that finds no room: each has a record in hand of its own.
    options = {"bootstrap.servers": "127.0.0.1:1", "group.id": "g"}
    consumers = [Consumer(options, suspects=one) for _ in range(2)]
    while one.enter(0, 0) >= 0:
        pass
    consumers.append(Consumer(options, suspects=one))
    for consumer in consumers:
        consumer.fetch(0)
        consumer.close(100)
    try:
        Consumer(options, suspects=5)
    except TypeError:
        pass
    else:
        raise SystemExit("not refused")
""",
    )
    assert result.returncode == 0, result.stderr
