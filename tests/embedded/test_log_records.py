"""KafkaLogHandler and KafkaLogProcessor against a broker: what arrives, and what is said of what does not."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from builds import child_environment
from embedded_support import event, live, quick, read, reading_server, run, send, topics, values, wait_until
from sanitized import no_new_threads_in_a_forked_child

from keven_core.kafka.abstracts.event_handler import event_handler
from keven_core.kafka.events.event import Event
from keven_core.kafka.log_handler import KafkaLogHandler, KafkaLogProcessor
from keven_core.kafka.logger import KafkaBatchLogger
from keven_core.testing import dispatch

TOPIC_AUTHORIZATION_FAILED = 29


@pytest.fixture(autouse=True)
def topic(embedded_kafka: Any, monkeypatch: Any) -> str:
    monkeypatch.setenv("KAFKA", embedded_kafka.bootstrap_servers)
    monkeypatch.setenv("KEVEN_CREATE_TOPICS", "false")
    embedded_kafka.create_topic("logs")
    return "logs"


@pytest.fixture
def app() -> logging.Logger:
    return logging.Logger("app.orders", logging.DEBUG)


@contextlib.contextmanager
def attached(handler: logging.Handler, *loggers: logging.Logger) -> Iterator[Any]:
    """The handler at these loggers meanwhile; closed afterwards."""
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield handler
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


def records(kafka: Any, topic: str = "logs") -> list[dict[str, Any]]:
    return [json.loads(value or b"") for value in values(kafka, topic)]


def dropping(kafka: Any, messages: int, **options: Any) -> KafkaBatchLogger:
    """A logger that drops when this many messages are under way."""
    settings = quick(kafka, log_queue_messages=messages, **options)
    return KafkaBatchLogger(topic="logs", settings=settings, on_full="drop")


# --- what arrives ----------------------------------------------------------------------------------------------------


def test_every_record_arrives_once(embedded_kafka: Any, app: logging.Logger) -> None:
    handler = KafkaLogHandler("logs", fields={"service": "orders"}, key="order")

    def work(thread: int) -> None:
        for number in range(300):
            app.info("placed", extra={"order": f"{thread}/{number}"})

    with attached(handler, app):
        threads = [threading.Thread(target=work, args=(number,), name=f"worker {number}") for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        handler.flush()
        assert (handler.dropped_count, handler.failed_count) == (0, 0)
    stored = read(embedded_kafka, "logs")
    found = [json.loads(entry.value or b"") for entry in stored]
    wanted = {f"{thread}/{number}" for thread in range(4) for number in range(300)}
    assert Counter(record["order"] for record in found) == Counter(wanted)
    for entry, record in zip(stored, found, strict=True):
        assert entry.key == record["order"].encode()
        assert record["thread"] == f"worker {record['order'][0]}"
        assert (record["service"], record["message"], record["process"]) == ("orders", "placed", os.getpid())
        # The message's timestamp is the record's.
        kind, milliseconds = entry.timestamp
        assert kind == 1
        written = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime((milliseconds - 1) / 1000))
        later = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime((milliseconds + 1) / 1000))
        assert written <= record["time"][:19] <= later


def test_the_shape_survives_the_way(embedded_kafka: Any, app: logging.Logger) -> None:
    with attached(KafkaLogHandler("logs"), app):
        app.warning("caf\u00e9 %s", "\U0001f600", extra={"level": 1, "list": [1, {"a": None}]})
        try:
            raise KeyError("a")
        except KeyError:
            app.exception("failed", stack_info=True)
    first, second = records(embedded_kafka)
    assert first["message"] == "caf\u00e9 \U0001f600"
    assert (first["level"], first["extra_level"], first["list"]) == ("WARNING", 1, [1, {"a": None}])
    assert second["exception"].endswith("KeyError: 'a'")
    assert second["stack"].startswith("Stack")


def test_a_given_logger_stays_open(embedded_kafka: Any, app: logging.Logger) -> None:
    embedded_kafka.create_topic("other")
    logger = KafkaBatchLogger(topic="logs", settings=quick(embedded_kafka))
    with attached(KafkaLogHandler(logger=logger), app), attached(KafkaLogHandler("other", logger=logger), app):
        app.info("x")
    logger.log(b'{"message": "still open"}')
    logger.flush()
    assert [record["message"] for record in records(embedded_kafka)] == ["x", "still open"]
    assert [record["message"] for record in records(embedded_kafka, "other")] == ["x"]


def test_a_huge_record_arrives_cut(embedded_kafka: Any, app: logging.Logger) -> None:
    with attached(KafkaLogHandler("logs"), app) as handler:
        app.info("x" * 100_000_000)
        app.info("y")
        handler.flush()
        assert handler.failed_count == 0
    first, second = records(embedded_kafka)
    assert first["cut"] == ["message"]
    assert len(first["message"]) < 33_000
    assert second["message"] == "y"


def test_events_of_structlog_arrive(embedded_kafka: Any) -> None:
    processor = KafkaLogProcessor("logs", fields={"service": "orders"})
    out = structlog.testing.CapturingLogger()
    log = structlog.wrap_logger(
        out,
        processors=[structlog.processors.TimeStamper(fmt="iso"), processor, structlog.processors.JSONRenderer()],
    )
    for number in range(100):
        log.info("placed", order=number)
    processor.close()
    found = records(embedded_kafka)
    assert [record["order"] for record in found] == list(range(100))
    passed = [json.loads(call.args[0]) for call in out.calls]
    assert [record["time"] for record in found] == [entry["timestamp"] for entry in passed]
    assert {(record["message"], record["level"], record["service"]) for record in found} == {
        ("placed", "INFO", "orders")
    }


@no_new_threads_in_a_forked_child
def test_at_the_end_of_a_process_and_of_its_forked_child_everything_has_arrived(embedded_kafka: Any) -> None:
    script = """
import logging, os
from keven_core.kafka.log_handler import KafkaLogHandler

logging.basicConfig(handlers=[KafkaLogHandler("logs")], level=logging.INFO)
for number in range(100):
    logging.info("parent %d", number)
child = os.fork()
for number in range(100):
    logging.info("%s %d", "parent" if child else "child", 100 + number)
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    result = subprocess.run(
        [sys.executable, "-c", script], env=child_environment(), capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    wanted = [f"parent {number}" for number in range(200)] + [f"child {number}" for number in range(100, 200)]
    assert sorted(record["message"] for record in records(embedded_kafka)) == sorted(wanted)


# --- event handlers that log -----------------------------------------------------------------------------------------


def test_what_a_handler_logs_is_none_of_its_messages(
    embedded_kafka: Any, app: logging.Logger, handler_registry: Any
) -> None:
    class Placed(Event):
        event_name = "PLACED"
        number: int

    publisher = KafkaBatchLogger(topic="elsewhere", settings=quick(embedded_kafka))

    @event_handler("PLACED")
    def handle(event: Any) -> None:
        app.info("handled %d", event.number)
        publisher.log(b"message")

    with attached(KafkaLogHandler("logs"), app):
        result = dispatch(Placed(number=1))
    assert result.outcome == "done"
    assert [message.topic for message in result.published] == ["elsewhere"]
    assert [record["message"] for record in records(embedded_kafka)] == ["handled 1"]


@pytest.mark.logs_errors
def test_a_topic_that_takes_no_log_records_does_not_fail_the_record_in_hand(
    embedded_kafka: Any, app: logging.Logger, handler_registry: Any
) -> None:
    topics(embedded_kafka, "in")
    embedded_kafka.set_topic_error("logs", TOPIC_AUTHORIZATION_FAILED)
    send(embedded_kafka, "in", *(event("PLACED", number=number) for number in range(20)))

    @event_handler("PLACED")
    def handle(event: Any) -> None:
        app.info("handled %d", event.number)

    server = reading_server(embedded_kafka, "in")
    with attached(KafkaLogHandler("logs", flush_timeout=10), app) as handler:
        run(server, "sync")
        handler.flush()
        assert handler.failed_count == 20
    assert server.counts()["done"] == 20
    assert server.counts()["dead"] == 0


@pytest.mark.logs_errors
def test_what_a_server_logs_of_dead_letters_is_written(embedded_kafka: Any, handler_registry: Any) -> None:
    topics(embedded_kafka, "in")
    send(embedded_kafka, "in", event("PLACED"))

    @event_handler("PLACED")
    def handle(event: Any) -> None:
        raise KeyError("the reason")

    with attached(KafkaLogHandler("logs"), logging.getLogger("keven_core")):
        run(reading_server(embedded_kafka, "in"), "sync")
    found = [record for record in records(embedded_kafka) if record["level"] == "ERROR"]
    assert len(found) == 1
    assert "the reason" in found[0]["message"]


# --- what does not arrive --------------------------------------------------------------------------------------------


@pytest.mark.logs_errors  # librdkafka's own, of connections that are refused
def test_drops_are_counted_and_told_when_there_is_room_again(
    embedded_kafka: Any, app: logging.Logger, capsys: Any
) -> None:
    with attached(KafkaLogHandler(logger=dropping(embedded_kafka, 500), flush_timeout=30), app) as handler:
        app.info("0")
        handler.flush()
        embedded_kafka.broker_down()
        started = time.monotonic()
        for number in range(1, 3000):
            app.info("%d", number)
        assert time.monotonic() - started < 5  # nothing waits
        assert (handler.dropped_count, handler.failed_count) == (2499, 0)
        embedded_kafka.broker_up()
        handler.flush()
    found = records(embedded_kafka)
    assert [record["message"] for record in found[:-1]] == [str(number) for number in range(501)]
    report = found[-1]
    assert (report["logger"], report["level"], report["dropped"]) == ("keven_core.log_handler", "WARNING", 2499)
    assert report["message"] == "2499 log record(s) were dropped: the send queue was full"
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("keven_core.log_handler")]
    assert "1 log record(s) dropped, 0 failed so far; the send queue is full" in lines[0]
    assert "2499 log record(s) dropped, 0 failed so far; closed" in lines[-1]


def test_threads_that_fill_the_queue(embedded_kafka: Any, app: logging.Logger) -> None:
    embedded_kafka.set_latency(50)
    with attached(KafkaLogHandler(logger=dropping(embedded_kafka, 100), flush_timeout=30), app) as handler:

        def work(thread: int) -> None:
            for number in range(2000):
                app.info("%d/%d", thread, number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        handler.flush()
        dropped, failed = handler.dropped_count, handler.failed_count
    embedded_kafka.set_latency(0)
    found = records(embedded_kafka)
    reports = [record["dropped"] for record in found if "dropped" in record]
    written = [record["message"] for record in found if "dropped" not in record]
    assert len(written) == len(set(written)) < 8000
    assert failed == 0
    # A report may be dropped too, and is counted then.
    assert 0 <= dropped - (8000 - len(written)) <= 2
    assert sum(reports) >= dropped


@pytest.mark.logs_errors
def test_a_broker_that_is_away_costs_the_service_no_time_and_close_a_bounded_one(
    embedded_kafka: Any, app: logging.Logger, capsys: Any
) -> None:
    embedded_kafka.broker_down()
    started = time.monotonic()
    with attached(KafkaLogHandler(logger=dropping(embedded_kafka, 1000), flush_timeout=1), app) as handler:
        for number in range(10):
            app.info("%d", number)
        assert time.monotonic() - started < 0.9
    assert time.monotonic() - started < 4
    assert (handler.dropped_count, handler.failed_count) == (0, 10)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("keven_core.log_handler")]
    assert "10 message(s) were not acknowledged within" in lines[0]
    assert lines[-1].endswith("0 log record(s) dropped, 10 failed so far; closed")
    # What is pending is sent all the same.
    embedded_kafka.broker_up()
    wait_until(lambda: len(values(embedded_kafka, "logs")) == 10, "the records arrive")


@pytest.mark.logs_errors
def test_what_the_client_logs_of_itself_stays_out(embedded_kafka: Any, app: logging.Logger) -> None:
    # With librdkafka's debug lines, each message leads to some; written to Kafka they would never end.
    client = logging.getLogger("keven_core")
    before = client.level
    client.setLevel(logging.DEBUG)
    seen: list[str] = []
    other = logging.Handler()
    other.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    client.addHandler(other)
    settings = quick(embedded_kafka, {"debug": "msg,broker"})
    logger = KafkaBatchLogger(topic="logs", settings=settings, on_full="drop")
    try:
        with attached(KafkaLogHandler(logger=logger, flush_timeout=30), app, client) as handler:
            for number in range(20):
                app.info("%d", number)
            handler.flush()
            embedded_kafka.broker_down()
            app.info("away")
            wait_until(lambda: any("FAIL" in line or "down" in line for line in list(seen)), "the client says so")
            embedded_kafka.broker_up()
            handler.flush()
            assert (handler.dropped_count, handler.failed_count) == (0, 0)
    finally:
        client.setLevel(before)
        client.removeHandler(other)
    assert any(line.startswith("librdkafka") for line in seen)
    assert [record["message"] for record in records(embedded_kafka)] == [*map(str, range(20)), "away"]


@pytest.mark.logs_errors
def test_what_the_broker_refuses_is_counted(embedded_kafka: Any, app: logging.Logger, capsys: Any) -> None:
    embedded_kafka.set_topic_error("logs", TOPIC_AUTHORIZATION_FAILED)
    with attached(KafkaLogHandler("logs", flush_timeout=10), app) as handler:
        for number in range(20):
            app.info("%d", number)
        handler.flush()
        assert (handler.dropped_count, handler.failed_count) == (0, 20)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("keven_core.log_handler")]
    assert "authorization" in lines[0]
    assert lines[-1].endswith("20 failed so far; closed")


def test_a_record_larger_than_the_client_takes_fails_alone(embedded_kafka: Any, app: logging.Logger) -> None:
    logger = KafkaBatchLogger(topic="logs", settings=quick(embedded_kafka, max_message_bytes=2000), on_full="drop")
    with attached(KafkaLogHandler(logger=logger), app) as handler:
        app.info("x" * 3000)
        app.info("y")
        assert (handler.dropped_count, handler.failed_count) == (0, 1)
    assert [record["message"] for record in records(embedded_kafka)] == ["y"]


def test_a_cluster_that_has_ended(app: logging.Logger, capsys: Any) -> None:
    from keven_core.testing import EmbeddedKafka

    with EmbeddedKafka() as kafka:
        kafka.create_topic("logs")
        logger = KafkaBatchLogger(topic="logs", settings=quick(kafka), on_full="drop")
        handler = KafkaLogHandler(logger=logger, flush_timeout=0.2)
        app.addHandler(handler)
        app.info("x")
        handler.flush()
    handler.flush()
    handler.close()
    app.info("after")
    assert handler.failed_count == 1


def test_it_may_log_while_a_server_runs(embedded_kafka: Any, app: logging.Logger, handler_registry: Any) -> None:
    topics(embedded_kafka, "in")

    @event_handler("PLACED")
    def handle(event: Any) -> None:
        app.info("handled", extra={"number": event.number})

    with attached(KafkaLogHandler("logs", level="INFO"), app):
        with live(reading_server(embedded_kafka, "in", use_group=False, until_end=False)) as running:
            send(embedded_kafka, "in", *(event("PLACED", number=number) for number in range(50)))
            wait_until(lambda: running.server.counts().get("done") == 50, "all are handled")
    assert sorted(record["number"] for record in records(embedded_kafka)) == list(range(50))
