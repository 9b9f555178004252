"""Records that wait for another attempt: in which order they are due, and how far their partition may be committed."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from keven_core._native.message import Record
from keven_core.kafka._shelf import Held, Shelf

TOPIC = "kafka_server.svc.retry"


def put(shelf: Shelf, offset: int, due_ms: int, partition: int = 0, value: bytes = b"v") -> None:
    shelf.put(Record(TOPIC, partition, offset, value=value), due_ms, 7)


def take(shelf: Shelf, now_ms: int) -> Held:
    held = shelf.take_due(now_ms)
    assert held is not None
    return held


def test_what_is_due_does_not_wait_behind_what_is_not() -> None:
    shelf = Shelf(1 << 20)
    for offset, due_ms in enumerate([900, 100, 500, 100]):
        put(shelf, offset, due_ms)
    assert shelf.next_due_ms == 100
    assert shelf.take_due(99) is None
    # Those due at the same time keep their order.
    assert [take(shelf, 600).record.offset for _ in range(3)] == [1, 3, 2]
    assert shelf.take_due(600) is None
    assert shelf.next_due_ms == 900
    assert len(shelf) == 1


def test_a_partition_is_committed_up_to_its_first_open_record() -> None:
    shelf = Shelf(1 << 20)
    for offset, due_ms in [(10, 30), (11, 10), (14, 20)]:  # offsets of a partition may have gaps
        put(shelf, offset, due_ms)
    first, second, third = take(shelf, 99), take(shelf, 99), take(shelf, 99)
    assert [held.record.offset for held in (first, second, third)] == [11, 14, 10]
    assert shelf.done(first) is None  # 10 is open
    assert shelf.done(third) == (TOPIC, 0, 14, 7)
    assert shelf.done(second) == (TOPIC, 0, 15, 7)
    assert shelf.done(second) is None  # twice
    put(shelf, 15, 5)
    assert shelf.done(take(shelf, 99)) == (TOPIC, 0, 16, 7)


def test_partitions_do_not_hold_each_other_up() -> None:
    shelf = Shelf(1 << 20)
    put(shelf, 0, 10, partition=0)
    put(shelf, 5, 20, partition=1)
    first, second = take(shelf, 99), take(shelf, 99)
    assert shelf.done(second) == (TOPIC, 1, 6, 7)
    assert shelf.done(first) == (TOPIC, 0, 1, 7)


def test_partitions_that_are_given_up_are_forgotten() -> None:
    shelf = Shelf(1 << 20)
    for partition in (0, 1):
        for offset in range(3):
            put(shelf, offset, 10 + offset, partition=partition)
    in_hand = take(shelf, 99)
    assert in_hand.record.partition == 0
    assert shelf.drop([(TOPIC, 0), (TOPIC, 9)]) == {(TOPIC, 0): 3}
    assert shelf.done(in_hand) is None
    assert len(shelf) == 3
    assert shelf.partitions() == [(TOPIC, 1)]
    assert {take(shelf, 99).record.partition for _ in range(3)} == {1}
    assert shelf.next_due_ms is None


def test_what_is_held_is_bounded_by_its_bytes() -> None:
    shelf = Shelf(10_000)
    assert shelf.has_room
    assert not shelf.full
    for offset in range(10):
        put(shelf, offset, 10, value=b"x" * 1000)
    assert shelf.full
    assert not shelf.has_room
    while not shelf.has_room:
        take(shelf, 99)
    assert 0 < len(shelf) < 10
    shelf.drop([(TOPIC, 0)])
    put(shelf, 0, 1, value=b"x" * 3000)
    assert shelf.has_room


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 50)), max_size=40), st.randoms(use_true_random=False))
def test_nothing_is_committed_before_it_is_done(entries: list[tuple[int, int]], chance: Random) -> None:
    shelf = Shelf(1 << 30)
    next_offset = [0, 0, 0]
    for partition, due_ms in entries:
        put(shelf, next_offset[partition], due_ms, partition=partition)
        next_offset[partition] += 1
    taken = [take(shelf, 99) for _ in entries]
    assert [held.due_ms for held in taken] == sorted(due_ms for _, due_ms in entries)
    chance.shuffle(taken)  # they may be finished in any order
    committed = [0, 0, 0]
    open_offsets: list[set[int]] = [set(range(end)) for end in next_offset]
    for held in taken:
        partition = held.record.partition
        open_offsets[partition].discard(held.record.offset)
        offset = shelf.done(held)
        if offset is not None:
            assert offset[2] > committed[partition]
            committed[partition] = offset[2]
        assert all(left >= committed[partition] for left in open_offsets[partition])
    assert committed == next_offset
