"""Events and commands that go out when a transaction of Django has committed.

    with transaction.atomic(), transaction_outbox():
        order.save()
        keven_log_event(OrderPlaced(order_id=order.id))

Built on transaction.on_commit(): what was raised in a savepoint that was rolled back is not sent. A process that dies
between the commit and the sending loses what was to be sent; where that must not be, write to an outbox table in the
same transaction (keven_core.kafka.integrations.sqlalchemy).
"""

from __future__ import annotations

import logging
from types import TracebackType

from django.db import transaction

from keven_core.kafka.errors import PublishError
from keven_core.kafka.message import Message
from keven_core.kafka.publishing import Outbox

__all__ = ["TransactionOutbox", "transaction_outbox"]

logger = logging.getLogger("keven_core.kafka")


class TransactionOutbox(Outbox):
    """Collects messages whose transaction, or savepoint, is still open. Use transaction_outbox()."""

    def __init__(self, using: str | None = None) -> None:
        super().__init__()
        self._using = using
        self._dropped = 0  # blocks that have raised
        self._loose: list[Message] = []  # of no transaction

    def add(self, message: Message) -> None:
        """Have a message wait for the commit of the transaction in which it is raised."""
        if not transaction.get_connection(self._using).in_atomic_block:
            self._loose.append(message)
        dropped = self._dropped
        transaction.on_commit(lambda: self._on_commit(message, dropped), using=self._using)

    def _on_commit(self, message: Message, dropped: int) -> None:
        if dropped == self._dropped:
            self.messages.append(message)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Have what is committed sent after the commit: at once, if that has been, also when the block has raised."""
        self._leave()
        loose, self._loose = self._loose, []
        if error is None:
            transaction.on_commit(self._flush_committed, using=self._using)
            return
        self._dropped += 1
        for message in loose:
            self._take_out(message)
        try:
            self.flush()
        except PublishError as unsent:
            logger.error("%s", unsent)  # what the block has raised goes on

    def _flush_committed(self) -> None:
        self.flush()


def transaction_outbox(using: str | None = None) -> TransactionOutbox:
    """A block whose messages are sent when the transaction around it, or within it, has committed.

    Arguments:
        using: the alias of the database; None: the default one.

    Outside of a transaction they are sent at the end of the block. If the block raises, those are dropped that are of
    no transaction, or of one that is still open. The commit hook blocks until they are acknowledged, and raises
    PublishError where the transaction ends, which is committed all the same: the outbox keeps them for flush().
    """
    return TransactionOutbox(using)
