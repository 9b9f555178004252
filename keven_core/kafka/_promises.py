"""What handlers write with any logger is acknowledged by the broker before their records' offsets may be stored.

Nothing waits for a message: a batch whose handlers have written something leaves its offsets here, and handling goes
on. They are due, batch after batch, when the broker has acknowledged what was written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from keven_core.kafka.errors import DeliveryError, delivery_error

if TYPE_CHECKING:
    from keven_core._native.logger import HandlerScope
    from keven_core._native.producer import DeliveryAccount

__all__ = ["Promises", "StoredOffset"]

# Topic, partition, offset, leader epoch.
StoredOffset = tuple[str, int, int, int]

# Batches that may wait: bounds what comes again after a crash.
_MOST_BATCHES = 100


class Promises:
    """The batches of one server whose offsets wait. Owner thread only, but for wait()."""

    def __init__(self, scope: HandlerScope) -> None:
        self._scope = scope
        self._waiting: deque[tuple[DeliveryAccount, list[StoredOffset]]] = deque()

    @property
    def made(self) -> bool:
        """Whether a batch waits, or the handlers of the one in hand have written something."""
        return bool(self._waiting) or self._scope.account.produced > 0

    @property
    def too_many(self) -> bool:
        """Whether the next batch has to wait until one is kept."""
        return len(self._waiting) >= _MOST_BATCHES

    def add(self, offsets: list[StoredOffset]) -> None:
        """Leave the offsets of the batch in hand here."""
        self._waiting.append((self._scope.take(), offsets))

    def due(self) -> list[StoredOffset]:
        """Offsets that may be stored now, oldest first. Raises DeliveryError when something was not delivered."""
        self._scope.collect()
        found: list[StoredOffset] = []
        while self._waiting and self._waiting[0][0].pending == 0:
            account, offsets = self._waiting[0]
            if account.failed:
                if found:
                    return found  # the failure is next
                raise _unkept(delivery_error(account.failed, account.failures))
            found += offsets
            self._waiting.popleft()
        return found

    def wait(self, timeout_s: float) -> bool:
        """Wait until the oldest batch is due, GIL released; whether it was within `timeout_s`. From any thread."""
        return not self._waiting or self._scope.wait(self._waiting[0][0], timeout_s)

    def unkept(self) -> DeliveryError | None:
        """What is still waited for, as an error; None: nothing."""
        pending = sum(account.pending for account, _ in self._waiting)
        if not self._waiting:
            return None
        return _unkept(DeliveryError(f"{pending} message(s) were not acknowledged in time", failed_count=pending))

    def drop(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Forget the offsets of partitions that are given up or read from elsewhere on.

        What handlers wrote is waited for all the same.
        """
        gone = set(partitions)
        for _, offsets in self._waiting:
            offsets[:] = [entry for entry in offsets if entry[:2] not in gone]


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
