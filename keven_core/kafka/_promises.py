"""What handlers write, and copies of failed records, are acknowledged before their records' offsets may be stored.

Nothing waits for a message: a batch whose handlers have written something, or of which records have failed, leaves its
offsets here, and handling goes on. They are due, batch after batch, when the broker has acknowledged what was written.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from keven_core.kafka._copies import refused, unanswered
from keven_core.kafka.errors import DeliveryError, delivery_error

if TYPE_CHECKING:
    from keven_core._native.logger import HandlerScope
    from keven_core._native.producer import DeliveryAccount
    from keven_core.kafka._copies import CopyPublisher

__all__ = ["Promises", "StoredOffset"]

# Topic, partition, offset, leader epoch.
StoredOffset = tuple[str, int, int, int]

# How many batches may wait that have waited so long: bounds what comes again after a crash. Younger ones are no more
# than what the next commit, a second later, would leave out.
_MOST_BATCHES = 100
_LONG_S = 1.0


@dataclass
class _Promise:
    """A batch: what its handlers wrote, copies of its failed records, and the offsets that wait for both.

    `first_failures` is where partitions stay whose copies are refused; what was written must have arrived even so.
    """

    written: DeliveryAccount
    copies: DeliveryAccount | None
    offsets: list[StoredOffset]
    first_failures: Mapping[tuple[str, int], int]
    made_at: float

    @property
    def pending(self) -> int:
        return self.written.pending + (self.copies.pending if self.copies is not None else 0)

    def failure(self) -> DeliveryError | None:
        if self.written.failed:
            return _unkept(delivery_error(self.written.failed, self.written.failures))
        return refused(self.copies) if self.copies is not None else None

    def take_safe(self) -> list[StoredOffset]:
        """What may be stored though copies are missing, once."""
        if self.written.pending or self.written.failed:
            return []
        taken, self.offsets = self.offsets, []
        return [
            (topic, partition, min(offset, self.first_failures.get((topic, partition), offset)), epoch)
            for topic, partition, offset, epoch in taken
        ]


class Promises:
    """The batches of one server whose offsets wait. Owner thread only, but for wait()."""

    def __init__(self, scope: HandlerScope, copies: CopyPublisher, now: Callable[[], float] = time.monotonic) -> None:
        self._scope = scope
        self._copies = copies
        self._now = now
        self._waiting: deque[_Promise] = deque()

    @property
    def made(self) -> bool:
        """Whether a batch waits, or the one in hand has to: something was written, or records have failed."""
        return bool(self._waiting) or self._scope.account.produced > 0 or self._copies.account is not None

    @property
    def waits(self) -> bool:
        """Whether a batch waits."""
        return bool(self._waiting)

    @property
    def too_many(self) -> bool:
        """Whether the next batch has to wait until one is kept."""
        if len(self._waiting) < _MOST_BATCHES:
            return False
        return self._now() - self._waiting[0].made_at >= _LONG_S

    def add(self, offsets: list[StoredOffset], first_failures: Mapping[tuple[str, int], int]) -> None:
        """Leave the offsets of the batch in hand here."""
        self._waiting.append(_Promise(self._scope.take(), self._copies.take(), offsets, first_failures, self._now()))

    def due(self) -> list[StoredOffset]:
        """Offsets that may be stored now, oldest first. Raises DeliveryError when something was not delivered."""
        self._scope.collect()
        self._copies.serve()
        found: list[StoredOffset] = []
        while self._waiting and self._waiting[0].pending == 0:
            first = self._waiting[0]
            failure = first.failure()
            if failure is not None:
                found += first.take_safe()
                if found:
                    return found  # the failure is next
                raise failure
            found += first.offsets
            self._waiting.popleft()
        return found

    def wait(self, timeout_s: float) -> bool:
        """Wait until the oldest batch is due, GIL released; whether it was within `timeout_s`. From any thread."""
        if not self._waiting:
            return True
        first, deadline = self._waiting[0], time.monotonic() + timeout_s
        if not self._scope.wait(first.written, timeout_s):
            return False
        return first.copies is None or self._copies.wait(first.copies, max(0.0, deadline - time.monotonic()))

    def unkept(self) -> DeliveryError | None:
        """What is still waited for, as an error; None: nothing."""
        if not self._waiting:
            return None
        pending = sum(promise.written.pending for promise in self._waiting)
        copies = [promise.copies for promise in self._waiting if promise.copies is not None and promise.copies.pending]
        if copies and not pending:
            return unanswered(sum(account.pending for account in copies))
        return _unkept(DeliveryError(f"{pending} message(s) were not acknowledged in time", failed_count=pending))

    def give_up(self) -> list[StoredOffset]:
        """The time is over: what may be stored of the oldest batch though copies of its failed records are missing."""
        return self._waiting[0].take_safe() if self._waiting else []

    def drop(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Forget the offsets of partitions that are given up or read from elsewhere on.

        What handlers wrote is waited for all the same.
        """
        gone = set(partitions)
        for promise in self._waiting:
            promise.offsets = [entry for entry in promise.offsets if entry[:2] not in gone]


def _unkept(cause: DeliveryError) -> DeliveryError:
    return DeliveryError(
        f"what handlers wrote is not on the broker, so the offsets of their records stay and they will be handled "
        f"again: {cause}",
        cause.failures,
        cause.failed_count,
        code=cause.code,
        name=cause.name,
        fatal=cause.fatal,
    )
