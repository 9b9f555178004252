"""Offsets that wait for what handlers wrote and for copies of failed records: when they are due, and when never."""

from typing import Any

import pytest

from keven_core.kafka._promises import Promises
from keven_core.kafka.errors import DeadLetterError, Delivery, DeliveryError, KafkaError

REFUSED = Delivery("out", b"v", None, KafkaError("no", code=29, name="DENIED"), "not delivered", [], 0)


class Account:
    """Stands for a DeliveryAccount."""

    def __init__(self, produced: int = 0) -> None:
        self.produced = produced
        self.pending = produced
        self.failed = 0
        self.failures: list[Delivery] = []

    def answer(self, *, failed: int = 0) -> None:
        self.pending = 0
        self.failed = failed
        self.failures = [REFUSED] * failed


class Scope:
    """Stands for a HandlerScope."""

    def __init__(self) -> None:
        self.account = Account()
        self.collected = 0
        self.waited_for: list[tuple[Account, float]] = []

    def write(self, count: int = 1) -> None:
        self.account.produced += count
        self.account.pending += count

    def take(self) -> Account:
        account, self.account = self.account, Account()
        return account

    def collect(self) -> None:
        self.collected += 1

    def wait(self, account: Account, timeout_s: float) -> bool:
        self.waited_for.append((account, timeout_s))
        return account.pending == 0


class Copies:
    """Stands for a CopyPublisher."""

    def __init__(self) -> None:
        self.account: Account | None = None
        self.waited_for: list[tuple[Account, bool]] = []

    def take(self) -> Account | None:
        account, self.account = self.account, None
        return account

    def serve(self) -> None: ...

    def wait(self, account: Account, timeout_s: float) -> bool:
        self.waited_for.append((account, timeout_s > 0))
        return account.pending == 0


def made(copies: Any = None, **options: Any) -> tuple[Promises, Any]:
    scope: Any = Scope()
    publisher: Any = copies or Copies()
    return Promises(scope, publisher, **options), scope


def batch(
    promises: Promises,
    scope: Any,
    offset: int,
    *,
    partition: int = 0,
    writes: int = 1,
    first_failures: dict[tuple[str, int], int] | None = None,
) -> Account:
    """A batch is done whose handlers have written something."""
    scope.write(writes)
    account: Account = scope.account
    promises.add([("t", partition, offset, 7)], first_failures or {})
    return account


def test_nothing_is_made_as_long_as_handlers_write_nothing() -> None:
    promises, scope = made()
    assert not promises.made
    assert promises.due() == []
    assert promises.unkept() is None
    assert promises.wait(5)
    assert scope.waited_for == []
    scope.write()
    assert promises.made  # the batch in hand has written


def test_a_batch_is_due_when_all_that_it_wrote_is_acknowledged() -> None:
    promises, scope = made()
    account = batch(promises, scope, 5, writes=2)
    assert scope.account is not account  # what follows is counted apart
    assert promises.made
    account.pending = 1
    assert promises.due() == []
    account.pending = 0
    assert promises.due() == [("t", 0, 5, 7)]
    assert promises.due() == []
    assert not promises.made
    assert scope.collected == 3  # counts are brought up to date each time


def test_a_batch_without_writes_waits_behind_one_with() -> None:
    promises, scope = made()
    first = batch(promises, scope, 5)
    batch(promises, scope, 9, writes=0)
    assert promises.due() == []
    first.answer()
    assert promises.due() == [("t", 0, 5, 7), ("t", 0, 9, 7)]


def test_batches_are_due_oldest_first() -> None:
    promises, scope = made()
    first, second, third = (batch(promises, scope, offset) for offset in (1, 2, 3))
    second.answer()
    third.answer()
    assert promises.due() == []
    first.answer()
    assert [entry[2] for entry in promises.due()] == [1, 2, 3]


def test_what_came_before_a_failure_is_due_and_then_the_failure_is_raised_again_and_again() -> None:
    promises, scope = made()
    first, second, third = (batch(promises, scope, offset) for offset in (1, 2, 3))
    first.answer()
    second.answer(failed=1)
    third.answer()
    assert [entry[2] for entry in promises.due()] == [1]
    for _ in range(2):
        with pytest.raises(DeliveryError, match="the offsets of their records stay") as caught:
            promises.due()
        assert (caught.value.failures, caught.value.failed_count) == ([REFUSED], 1)
        assert (caught.value.code, caught.value.name, caught.value.fatal) == (29, "DENIED", False)
    assert promises.made


def test_a_failure_counts_only_when_the_whole_batch_is_answered() -> None:
    promises, scope = made()
    account = batch(promises, scope, 1, writes=2)
    account.pending, account.failed, account.failures = 1, 1, [REFUSED]
    assert promises.due() == []
    account.pending = 0
    with pytest.raises(DeliveryError):
        promises.due()


def test_wait_is_for_the_oldest_batch() -> None:
    promises, scope = made()
    first = batch(promises, scope, 1)
    batch(promises, scope, 2)
    assert not promises.wait(0.5)
    first.answer()
    assert promises.wait(0.25)
    assert scope.waited_for == [(first, 0.5), (first, 0.25)]


def test_what_is_not_kept_is_counted() -> None:
    promises, scope = made()
    batch(promises, scope, 1, writes=2)
    batch(promises, scope, 2, writes=3)
    error = promises.unkept()
    assert isinstance(error, DeliveryError)
    assert error.failed_count == 5
    assert "5 message(s) were not acknowledged in time" in str(error)


def test_the_next_batch_has_to_wait_when_too_many_wait_for_long() -> None:
    now = [5.0]
    promises, scope = made(now=lambda: now[0])
    accounts = [batch(promises, scope, offset) for offset in range(99)]
    now[0] += 1
    assert not promises.too_many
    now[0] -= 0.5
    accounts.append(batch(promises, scope, 99))
    assert not promises.too_many
    now[0] += 0.5
    assert promises.too_many
    accounts[0].answer()
    assert len(promises.due()) == 1
    assert not promises.too_many


def test_offsets_of_partitions_that_are_given_up_are_forgotten_but_what_was_written_is_waited_for() -> None:
    promises, scope = made()
    first = batch(promises, scope, 1, partition=0)
    second = batch(promises, scope, 2, partition=1)
    promises.drop([("t", 0), ("other", 1)])
    assert promises.made
    second.answer()
    assert promises.due() == []
    first.answer()
    assert promises.due() == [("t", 1, 2, 7)]


def test_dropping_takes_any_iterable_once() -> None:
    promises, scope = made()
    accounts = [batch(promises, scope, offset, partition=offset % 2) for offset in range(4)]
    promises.drop(("t", number) for number in [0])
    for account in accounts:
        account.answer()
    assert [entry[:3] for entry in promises.due()] == [("t", 1, 1), ("t", 1, 3)]


# --- copies of failed records ----------------------------------------------------------------------------------------


def failed_batch(promises: Promises, scope: Any, copies: Any, offset: int, first: int, *, writes: int = 0) -> Account:
    """A batch is done in which a record has failed."""
    copies.account = account = Account(1)
    batch(promises, scope, offset, writes=writes, first_failures={("t", 0): first})
    return account


def test_a_batch_with_failed_records_waits_for_their_copies() -> None:
    copies: Any = Copies()
    promises, scope = made(copies)
    copies.account = Account(1)
    assert promises.made  # the batch in hand has failed records
    account = failed_batch(promises, scope, copies, 9, 5)
    assert copies.account is None
    assert promises.due() == []
    assert not promises.wait(1)
    account.answer()
    assert promises.wait(1)
    assert copies.waited_for == [(account, True)] * 2
    assert promises.due() == [("t", 0, 9, 7)]
    assert not promises.made


def test_a_partition_stays_at_its_first_failed_record_when_the_copy_is_refused() -> None:
    copies: Any = Copies()
    promises, scope = made(copies)
    copies.account = account = Account(1)
    scope.write(0)
    promises.add([("t", 0, 9, 7), ("t", 1, 30, 7)], {("t", 0): 5})
    batch(promises, scope, 12, writes=0)
    account.answer(failed=1)
    assert promises.due() == [("t", 0, 5, 7), ("t", 1, 30, 7)]
    for _ in range(2):
        with pytest.raises(
            DeadLetterError, match=r"1 failed record\(s\) could not be copied to out \(not delivered: no\)"
        ):
            promises.due()


def test_what_was_written_counts_more_than_a_copy() -> None:
    copies: Any = Copies()
    promises, scope = made(copies)
    account = failed_batch(promises, scope, copies, 9, 5, writes=1)
    written: Any = promises._waiting[0].written
    written.answer(failed=1)
    account.answer(failed=1)
    with pytest.raises(DeliveryError, match="what handlers wrote is not on the broker"):
        promises.due()


def test_when_the_time_is_over_the_first_failed_record_is_where_a_partition_stays() -> None:
    copies: Any = Copies()
    promises, scope = made(copies)
    failed_batch(promises, scope, copies, 9, 5)
    failed_batch(promises, scope, copies, 20, 11)
    error = promises.unkept()
    assert isinstance(error, DeadLetterError)
    assert error.failed_count == 2
    assert promises.give_up() == [("t", 0, 5, 7)]
    assert promises.give_up() == []


def test_when_the_time_is_over_and_writes_are_missing_nothing_moves() -> None:
    copies: Any = Copies()
    promises, scope = made(copies)
    failed_batch(promises, scope, copies, 9, 5, writes=2)
    error = promises.unkept()
    assert isinstance(error, DeliveryError)
    assert not isinstance(error, DeadLetterError)
    assert error.failed_count == 2
    assert promises.give_up() == []


def test_no_batches_no_offsets() -> None:
    assert made()[0].give_up() == []
