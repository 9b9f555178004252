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

from keven_core.kafka.errors import PublishError, UsageError
from keven_core.kafka.message import Message
from keven_core.kafka.publishing import Outbox

__all__ = ["TransactionOutbox", "transaction_outbox"]

logger = logging.getLogger("keven_core.kafka")


class TransactionOutbox(Outbox):
    """Collects messages whose transaction, or savepoint, is still open. Use transaction_outbox()."""

    def __init__(self, using: str | None = None) -> None:
        super().__init__()
        self._using = using

    def add(self, message: Message) -> None:
        """Have a message wait for the commit of the transaction in which it is raised."""
        transaction.on_commit(lambda: self.messages.append(message), using=self._using)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Have what is committed sent after the commit: at once, if that has been.

        Also when the block raises: Django forgets what waits for a transaction that is rolled back, and what is here
        belongs to one that has been committed.
        """
        self._leave()
        try:
            transaction.on_commit(self._flush_committed, using=self._using)
        except PublishError as unsent:
            if error is None:
                raise
            logger.error("%s", unsent)  # what the block has raised goes on

    async def __aenter__(self) -> TransactionOutbox:
        """Refused: the transactions of Django are synchronous."""
        raise UsageError("transactions of Django are synchronous: open this block within sync_to_async(), as they are")

    def _flush_committed(self) -> None:
        self.flush()


def transaction_outbox(using: str | None = None) -> TransactionOutbox:
    """A block whose messages are sent when the transaction around it, or within it, has committed.

    Arguments:
        using: the alias of the database; None: the default one.

    Outside of a transaction they are sent at the end of the block, also when it raises: there is nothing to roll back.
    The commit hook blocks until they are acknowledged, and raises PublishError where the transaction ends, which is
    committed all the same: the outbox keeps them for flush().
    """
    return TransactionOutbox(using)
