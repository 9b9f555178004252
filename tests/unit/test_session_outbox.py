"""What a session's outbox sends, whichever way its transactions end; on SQLite, at the commit or through the table."""

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, event, insert, select
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.schema import CreateTable

from keven_core.kafka.errors import PublishError
from keven_core.kafka.events.event import Event
from keven_core.kafka.events.logger import keven_clear_event_publishers, keven_log_event, keven_set_publisher
from keven_core.kafka.integrations.sqlalchemy import outbox_table, session_outbox
from keven_core.kafka.publishing import outbox


class Base(DeclarativeBase):
    metadata = MetaData()


class Thing(Base):
    __tablename__ = "things"
    id: Mapped[int] = mapped_column(primary_key=True)


ORDERS = Table("orders", Base.metadata, Column("id", Integer, primary_key=True))
OUTBOX = outbox_table(Base.metadata)

pytestmark = pytest.mark.usefixtures("handler_registry")


class Publisher:
    """Takes events down, or refuses them."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.refuses = False

    def log_event(self, event: Any) -> None:
        if self.refuses:
            raise PublishError("refused", [event])
        self.sent.append(event.number)


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    made = Publisher()
    keven_set_publisher(made)
    yield made
    keven_clear_event_publishers()


@pytest.fixture
def raise_event(handler_registry: Any) -> Callable[[int], None]:
    class Raised(Event):
        event_name = "RAISED"
        number: int = 0

    return lambda number: keven_log_event(Raised(number=number))


@pytest.fixture
def engine() -> Iterator[Any]:
    made = create_engine("sqlite://")
    Base.metadata.create_all(made)
    yield made
    made.dispose()


def closed(session: Session, raised: Callable[[int], None]) -> None:
    session.execute(insert(ORDERS).values(id=1))
    raised(-1)
    session.close()
    session.execute(insert(ORDERS).values(id=2))
    raised(1)
    session.commit()


def reset(session: Session, raised: Callable[[int], None]) -> None:
    raised(-1)
    session.reset()
    raised(1)
    session.commit()


def savepoint_closed(session: Session, raised: Callable[[int], None]) -> None:
    raised(1)
    savepoint = session.begin_nested()
    raised(-1)
    savepoint.close()
    raised(2)
    session.commit()


def savepoint_left_open(session: Session, raised: Callable[[int], None]) -> None:
    raised(1)
    session.begin_nested()
    raised(2)
    session.commit()


def savepoint_within_one_that_is_rolled_back(session: Session, raised: Callable[[int], None]) -> None:
    raised(1)
    savepoint = session.begin_nested()
    raised(-1)
    with session.begin_nested():
        raised(-2)
    savepoint.rollback()
    raised(2)
    session.commit()


def block_that_raises(session: Session, raised: Callable[[int], None]) -> None:
    with pytest.raises(ZeroDivisionError), session.begin():
        raised(-1)
        raise ZeroDivisionError
    with session.begin():
        raised(1)


def statement_that_fails(session: Session, raised: Callable[[int], None]) -> None:
    session.add(Thing(id=1))
    session.commit()
    session.expunge_all()
    raised(-1)
    session.add(Thing(id=1))
    with pytest.raises(IntegrityError):
        session.flush()
    session.rollback()
    raised(1)
    session.commit()


def outbox_within(session: Session, raised: Callable[[int], None]) -> None:
    with outbox():
        raised(1)
    session.commit()


def raised_by_the_commit(session: Session, raised: Callable[[int], None]) -> None:
    def on_insert(*given: Any) -> None:
        raised(2)

    def on_commit(*given: Any) -> None:
        if not session.in_nested_transaction():
            raised(3)

    event.listen(Thing, "after_insert", on_insert)
    event.listen(session, "before_commit", on_commit)
    try:
        raised(1)
        session.add(Thing(id=1))
        session.commit()
        raised(-1)
    finally:
        event.remove(Thing, "after_insert", on_insert)
        event.remove(session, "before_commit", on_commit)


@pytest.mark.parametrize("table", [None, OUTBOX], ids=["at-commit", "table"])
@pytest.mark.parametrize(
    ("transactions", "expected"),
    [
        (closed, [1]),
        (reset, [1]),
        (savepoint_closed, [1, 2]),
        (savepoint_left_open, [1, 2]),
        (savepoint_within_one_that_is_rolled_back, [1, 2]),
        (block_that_raises, [1]),
        (statement_that_fails, [1]),
        (outbox_within, [1]),
        (raised_by_the_commit, [1, 3, 2]),
    ],
)
def test_what_is_committed_is_sent_and_nothing_else(
    engine: Any, publisher: Publisher, raise_event: Any, transactions: Any, expected: list[int], table: Any
) -> None:
    with Session(engine) as session, session_outbox(session, table):
        transactions(session, raise_event)
    with engine.connect() as connection:
        rows = connection.scalars(select(OUTBOX.c.value).order_by(OUTBOX.c.id))
        written = [msgspec.json.decode(value)["number"] for value in rows]
    assert (publisher.sent, written) == ((expected, []) if table is None else ([], expected))


def test_what_was_refused_after_a_commit_outlives_what_follows(
    engine: Any, publisher: Publisher, raise_event: Any
) -> None:
    publisher.refuses = True
    with Session(engine) as session, session_outbox(session) as box:
        raise_event(1)
        with pytest.raises(PublishError):
            session.commit()
        raise_event(2)
        session.rollback()
        assert [message.number for message in box.messages] == [1]
        raise_event(3)
    assert [message.number for message in box.messages] == [1]
    publisher.refuses = False
    assert box.flush() == 1
    assert publisher.sent == [1]


@pytest.mark.parametrize(
    ("dialect", "binary"),
    [(mysql, "BLOB(1073741824)"), (postgresql, "BYTEA"), (sqlite, "BLOB")],
    ids=["mysql", "postgresql", "sqlite"],
)
def test_large_messages_fit_into_the_table(dialect: Any, binary: str) -> None:
    made = str(CreateTable(OUTBOX).compile(dialect=dialect.dialect()))
    lines = [line.strip().rstrip(",").split(" ", 1) for line in made.splitlines() if line.startswith("\t")]
    columns = {name.strip('`"'): kind for name, kind in lines}
    assert (columns["key"], columns["value"]) == (binary, f"{binary} NOT NULL")
