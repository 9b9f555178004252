"""Events and commands that go out with the transactions of an SQLAlchemy session.

    with Session(engine) as session, session_outbox(session):
        session.add(order)
        keven_log_event(OrderPlaced(order_id=1))
        session.commit()                                  # sent after the commit; after a rollback nothing is

A process that dies between the commit and the sending loses what was to be sent. With a table it does not: messages are
rows that are written in the same transaction, and a Relay sends them, at least once and in order.

    outbox_messages = outbox_table(metadata)

    with Session(engine) as session, session_outbox(session, outbox_messages):
        ...
        session.commit()                                  # written

    Relay(engine, outbox_messages).run(stop)              # in a process or thread of its own
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    and_,
    delete,
    event,
    func,
    insert,
    not_,
    or_,
    select,
)
from sqlalchemy.orm import Session, SessionTransaction

from keven_core.kafka.envelope import key_of
from keven_core.kafka.errors import PublishError, UsageError
from keven_core.kafka.logger import KafkaLogger
from keven_core.kafka.message import Message
from keven_core.kafka.publishing import Outbox

__all__ = ["Relay", "SessionOutbox", "outbox_table", "session_outbox", "write_messages"]

logger = logging.getLogger("keven_core.kafka")

# Between two attempts of a relay whose messages are refused.
_LONGEST_PAUSE_S = 30.0
# Keys that a relay goes round while it sends those of others: a database takes conditions of a limited size only.
_MOST_STUCK = 100
# What a relay reads at a time.
_BATCH_BYTES = 16 << 20
# Without a size MySQL's columns hold 64 KiB; others ignore it.
_MOST_BYTES = 1 << 30


def outbox_table(metadata: MetaData, name: str = "keven_outbox", schema: str | None = None) -> Table:
    """The table of messages that are to be sent, for metadata.create_all() or a migration of the service."""
    return Table(
        name,
        metadata,
        # SQLite numbers by itself only what is INTEGER.
        Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
        Column("topic", String(249), nullable=False),
        Column("key", LargeBinary(_MOST_BYTES), nullable=True),
        Column("value", LargeBinary(_MOST_BYTES), nullable=False),
        Column("created", DateTime(timezone=True), nullable=False, server_default=func.now()),
        schema=schema,
    )


def write_messages(connection: Any, table: Table, messages: list[Message]) -> None:
    """Write events and commands into an outbox table, in order, in the transaction of a Connection or Session."""
    if messages:
        # One statement for each: only so are their numbers in the order of the list on every database.
        for message in messages:
            topic = type(message).kind.publisher_class()(None).topic_of(message)
            connection.execute(insert(table).values(topic=topic, key=key_of(message), value=message.serialize()))


class SessionOutbox(Outbox):
    """Collects messages for the transactions of a session. Use session_outbox().

    Attributes:
        messages: of transactions that are committed: what Kafka did not accept stays, for flush() or the next commit.
    """

    def __init__(self, session: Session, table: Table | None = None) -> None:
        super().__init__()
        self._session = session
        self._table = table
        self._uncommitted: list[Message] = []
        self._written = 0  # so many of them are rows
        self._due = 0  # commits under way: with an open savepoint, that of the transaction brings that of the savepoint
        self._committed: SessionTransaction | None = None  # the last one
        self._savepoints: dict[SessionTransaction, int] = {}
        self._listeners: list[tuple[str, Callable[..., Any]]] = [
            ("after_transaction_create", self._on_begin),
            ("before_commit", self._on_commit_due),
            ("after_commit", self._on_committed),
            ("after_transaction_end", self._on_end),
        ]

    @property
    def waiting(self) -> list[Message]:
        """What is not committed."""
        return self._uncommitted

    def add(self, message: Message) -> None:
        """Have a message wait for the session's transaction, which begins here if nothing has begun it."""
        if not self._session.in_transaction():
            self._session.begin()
        self._uncommitted.append(message)
        self._write_due()

    def _write_due(self) -> None:
        # As late as can be, but also what the flush and the listeners of a commit raise.
        if self._table is not None and self._due and not self._session.in_nested_transaction():
            with self._session.no_autoflush:  # which would raise others in between
                write_messages(self._session, self._table, self._uncommitted[self._written :])
            self._written = len(self._uncommitted)

    def _on_begin(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.nested:
            self._savepoints[transaction] = len(self._uncommitted)

    def _on_commit_due(self, session: Session) -> None:
        self._due += 1
        self._write_due()

    def _on_committed(self, session: Session) -> None:
        self._due -= 1
        self._committed = session.get_nested_transaction() or session.get_transaction()

    def _on_end(self, session: Session, transaction: SessionTransaction) -> None:
        # The one event that every end has: a savepoint whose flush has failed, and what is closed, is not said to have
        # been rolled back.
        if transaction.parent is not None and not transaction.nested:
            return  # a flush
        start = self._savepoints.pop(transaction, 0)
        if transaction is not self._committed:
            self._due = 0
            self.drop(start)
        elif transaction.nested:
            self._write_due()
        else:
            self._settle()

    def _settle(self) -> None:
        written, self._written, self._due = self._written, 0, 0
        if self._table is not None:
            del self._uncommitted[:written]
            return
        self.messages += self._uncommitted
        self._uncommitted.clear()
        # Only now: what is raised here leaves the session ready for its next transaction.
        if self.messages:
            self.flush()

    def _enter(self) -> None:
        super()._enter()
        for name, listener in self._listeners:
            event.listen(self._session, name, listener)

    def _leave(self) -> None:
        super()._leave()
        for name, listener in self._listeners:
            event.remove(self._session, name, listener)

    def send(self) -> None:
        """The block ends: what was not committed is not sent."""
        self.drop()

    def drop(self, start: int = 0) -> None:
        """Forget what is not committed, from a position on."""
        self._written = min(self._written, start)
        self._forget(self._uncommitted, start)


def session_outbox(session: Any, table: Table | None = None) -> SessionOutbox:
    """A block whose messages go with the transactions of a session: a commit sends them, a rollback drops them.

    Arguments:
        session: a Session or AsyncSession; of a scoped session, the one of this thread or task.
        table: an outbox_table(): they are written to it as part of the transaction; None: they are sent after it.

    What a rolled back savepoint has raised is dropped alone. What is not committed when the block ends is dropped.
    Without a table commit() waits for the acknowledgements (in an AsyncSession the loop waits too) and raises
    PublishError when some were not sent: the transaction stands, and `messages` of the outbox has them for flush(),
    also after the block; the next commit tries them again, too.
    """
    if hasattr(session, "registry"):
        session = session.registry()  # of a scoped session: the outbox would follow all sessions of its factory
    session = getattr(session, "sync_session", session)
    if not isinstance(session, Session):
        raise UsageError(f"session_outbox() takes a Session or an AsyncSession, not {session!r:.80}")
    return SessionOutbox(session, table)


class Relay:
    """Sends what stands in an outbox table to Kafka, and deletes what is acknowledged.

    At least once: what was sent when it died is sent again by the next one. In the order of the rows: messages of one
    key stay in order, also when one of them is refused: those behind it wait, and what was sent together with it is
    sent again after it. Messages of other keys go on, and so do those that have no key, unless more than 100 keys and
    a whole batch are refused. Several relays may run: on PostgreSQL one of them works at a time and another takes over
    when it ends (an advisory lock, which goes with its connection); on other databases see to it that there is only
    one.

    Rows of transactions of one key are in order if those follow each other, as they do when each locks what it changes.

    Arguments:
        engine: of the database; its connection is held while a batch is sent.
        table: an outbox_table().
        logger: a KafkaLogger; None: one from the environment.
        batch_count: how many rows are sent together; fewer when they have 16 MiB.
        poll_interval_s: how long it waits when there are none, or when Kafka is away.
    """

    def __init__(
        self,
        engine: Engine,
        table: Table,
        logger: KafkaLogger | None = None,
        *,
        batch_count: int = 500,
        poll_interval_s: float = 0.5,
    ) -> None:
        # In autocommit the lock would end with the statement that takes it.
        locks = engine.dialect.name == "postgresql"
        self._engine = engine.execution_options(isolation_level="READ COMMITTED") if locks else engine
        self._table = table
        self._logger = logger if logger is not None else KafkaLogger()
        self._batch_count = batch_count
        self._poll_interval_s = poll_interval_s
        # Topics and keys of which a message was refused; the first of them, since each is a part of the next query.
        self._stuck: list[tuple[str, bytes]] = []

    def run(self, stop: threading.Event) -> None:
        """Send what comes, until `stop` is set. Blocks. Raises what the database raises; Kafka's errors are logged."""
        pause_s = self._poll_interval_s
        while not stop.is_set():
            try:
                sent = self.run_once()
            except PublishError as error:
                logger.error("%s", error)
                stop.wait(pause_s)
                pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)
                continue
            pause_s = self._poll_interval_s
            if sent == 0:
                stop.wait(pause_s)

    def run_once(self) -> int:
        """Send one batch and delete it; returns how many rows. 0: there are none, or another relay is at work.

        Blocks until the batch is acknowledged. Raises PublishError when some were not: those stay.
        """
        table = self._table
        with self._engine.begin() as connection:
            if not self._take_lock(connection):
                return 0
            rows = self._next_rows(connection)
            if not rows:
                return 0
            answers = self._logger.log_each(((row.value, row.topic, row.key) for row in rows), go_on=True)
            done: list[int] = []
            failed: list[tuple[Any, Exception | None]] = []
            stuck: dict[tuple[str, bytes], None] = {}
            for row, answer in zip(rows, answers, strict=True):
                if answer is not None:
                    failed.append((row, answer[0]))
                    if row.key is not None:
                        stuck[row.topic, row.key] = None
                elif (row.topic, row.key) not in stuck:
                    done.append(row.id)
            self._stuck = list(stuck)[:_MOST_STUCK]
            if done:
                connection.execute(delete(table).where(table.c.id.in_(done)))
        if failed:
            row, cause = failed[0]
            raise PublishError(
                f"{len(failed)} of {len(rows)} row(s) of {table.name} were not sent and stay in it; the first, id "
                f"{row.id} for {row.topic}: {cause}",
                [row.id for row, _ in failed],
            ) from cause
        return len(done)

    def _next_rows(self, connection: Any) -> list[Any]:
        """The next batch; of topics and keys that are stuck only the first row."""
        columns = self._table.c
        query = select(self._table).order_by(columns.id)
        lanes = [and_(columns.topic == topic, columns.key == key) for topic, key in self._stuck]
        rows: list[Any] = [row for lane in lanes for row in connection.execute(query.where(lane).limit(1))]
        # A row without a key is of no such lane: NULL would make the condition NULL.
        others = query.where(or_(columns.key.is_(None), not_(or_(*lanes)))) if lanes else query
        # Fetched piece by piece, since a batch of large messages would not fit into memory.
        pieces = others.limit(self._batch_count).execution_options(stream_results=True, max_row_buffer=20)
        size_bytes = 0
        with connection.execute(pieces) as found:
            for row in found:
                rows.append(row)
                size_bytes += len(row.value)
                if size_bytes >= _BATCH_BYTES:
                    break
        return sorted(rows, key=lambda row: row.id)

    def _take_lock(self, connection: Any) -> bool:
        """Whether this relay is the one that works, until its transaction ends."""
        if connection.dialect.name != "postgresql":
            return True
        number = zlib.crc32(f"keven_core outbox {self._table.fullname}".encode())
        return bool(connection.scalar(select(func.pg_try_advisory_xact_lock(number))))
