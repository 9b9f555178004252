"""keven_core.testing: EmbeddedKafka with its faults, dispatch() without a broker, and the pytest plugin."""

import asyncio
import contextlib
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import confluent_kafka
import pytest
from embedded_support import (
    Feeder,
    committed,
    event,
    live,
    quick,
    read,
    send,
    topics,
    values,
    wait_until,
)
from embedded_support import group_server as make_group_server

from keven_core._native.library import live_objects
from keven_core.kafka.abstracts.event_handler import EventHandler, event_handler
from keven_core.kafka.errors import ClosedError, DeliveryError, KafkaError, KafkaTimeoutError, UndecodableError
from keven_core.kafka.events.event import Event
from keven_core.kafka.events.publisher import EventPublisher
from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger
from keven_core.kafka.record import current_record
from keven_core.testing import EmbeddedKafka, PublishedMessage, dispatch
from keven_core.testing.embedded import API_KEYS

# --- EmbeddedKafka ---------------------------------------------------------------------------------------------------


def test_topics_have_the_partitions_they_were_made_with(embedded_kafka: Any) -> None:
    embedded_kafka.create_topic("three", 3)
    client = confluent_kafka.Consumer({"bootstrap.servers": embedded_kafka.bootstrap_servers, "group.id": "g"})
    assert len(client.list_topics("three", timeout=10).topics["three"].partitions) == 3
    client.close()
    with pytest.raises(KafkaError, match="three"):
        embedded_kafka.create_topic("three")


def test_what_is_written_can_be_read_back(embedded_kafka: Any) -> None:
    embedded_kafka.create_topic("t", 2)
    send(embedded_kafka, "t", b"one", b"two", partition=1)
    assert [(entry.partition, entry.offset, entry.value) for entry in read(embedded_kafka, "t")] == [
        (1, 0, b"one"),
        (1, 1, b"two"),
    ]


def test_several_brokers_have_an_address_each() -> None:
    with EmbeddedKafka(brokers=3) as kafka:
        assert len(set(kafka.bootstrap_servers.split(","))) == 3


def test_start_and_stop_may_be_called_twice_and_free_everything() -> None:
    before = live_objects()
    kafka = EmbeddedKafka().start().start()
    assert live_objects()["mock_clusters"] == before["mock_clusters"] + 1
    kafka.stop()
    kafka.stop()
    assert live_objects() == before
    with pytest.raises(RuntimeError, match="not running"):
        _ = kafka.bootstrap_servers


def test_settings_point_at_the_cluster_and_take_changes(embedded_kafka: Any) -> None:
    settings = embedded_kafka.settings(batch_size=7)
    assert settings.kafka_address == embedded_kafka.bootstrap_servers
    assert (settings.batch_size, settings.create_topics) == (7, False)


def _log_until_taken(log: KafkaLogger, value: bytes) -> None:
    """The client learns with its next look at a topic that it is usable again."""

    def taken() -> bool:
        with contextlib.suppress(DeliveryError):
            log.log(value)
            return True
        return False

    wait_until(taken, "the topic is usable again")


def test_an_injected_error_reaches_the_producer(embedded_kafka: Any) -> None:
    embedded_kafka.create_topic("t")
    embedded_kafka.push_errors("Produce", [29])  # TOPIC_AUTHORIZATION_FAILED, not retried
    log = KafkaLogger(topic="t", settings=quick(embedded_kafka))
    with pytest.raises(DeliveryError) as caught:
        log.log(b"refused")
    assert caught.value.name == "TOPIC_AUTHORIZATION_FAILED"
    _log_until_taken(log, b"taken")
    assert values(embedded_kafka, "t") == [b"taken"]


def test_errors_that_were_not_used_up_can_be_cleared(embedded_kafka: Any) -> None:
    embedded_kafka.create_topic("t")
    embedded_kafka.push_errors("Produce", [29] * 5)
    embedded_kafka.clear_errors("Produce")
    KafkaLogger(topic="t", settings=quick(embedded_kafka)).log(b"taken")
    assert values(embedded_kafka, "t") == [b"taken"]


def test_a_topic_error_holds_until_it_is_taken_back(embedded_kafka: Any) -> None:
    embedded_kafka.create_topic("t")
    embedded_kafka.set_topic_error("t", 29)
    log = KafkaLogger(topic="t", settings=quick(embedded_kafka))
    for _ in range(2):
        with pytest.raises(DeliveryError):
            log.log(b"refused")
    embedded_kafka.set_topic_error("t", 0)
    _log_until_taken(log, b"taken")
    assert values(embedded_kafka, "t") == [b"taken"]


def test_latency_delays_answers(embedded_kafka: Any) -> None:
    embedded_kafka.create_topic("t")
    log = KafkaLogger(topic="t", settings=quick(embedded_kafka))
    log.log(b"connected")
    embedded_kafka.set_latency(400)
    started = time.monotonic()
    log.log(b"late")
    assert time.monotonic() - started >= 0.4
    embedded_kafka.set_latency(0)


@pytest.mark.logs_errors  # librdkafka's own, of connections that are refused
def test_a_broker_that_is_down_takes_nothing_until_it_is_up(embedded_kafka: Any) -> None:
    embedded_kafka.create_topic("t")
    log = KafkaLogger(topic="t", settings=quick(embedded_kafka))
    log.log(b"before")
    embedded_kafka.broker_down()
    log.timeout = 0.3
    with pytest.raises(KafkaTimeoutError, match="may still arrive"):
        log.log(b"meanwhile")
    embedded_kafka.broker_up()
    wait_until(lambda: values(embedded_kafka, "t") == [b"before", b"meanwhile"], "what was queued arrives")


def test_a_broker_that_is_down_keeps_its_port() -> None:
    """Or the next cluster of the machine gets it, and this one's clients, with their offsets."""
    with EmbeddedKafka(brokers=2) as kafka:
        host, port = kafka.bootstrap_servers.split(",")[1].split(":")
        kafka.broker_down(2)
        kafka.broker_down(2)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)))
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((host, int(port)))
        kafka.broker_up(2)
        socket.create_connection((host, int(port))).close()
        kafka.broker_down(2)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((host, int(port)))


def test_leaders_and_coordinators_can_be_moved() -> None:
    with EmbeddedKafka(brokers=2) as kafka:
        topics(kafka, "t")
        kafka.set_leader("t", 0, 1)
        kafka.set_coordinator("svc", 1)
        got: list[bytes] = []
        with live(make_group_server(kafka, "t", got.append)), Feeder(kafka) as feeder:
            feeder.send("t", b"before")
            wait_until(lambda: got, "the first record")
            kafka.set_leader("t", 0, 2)
            kafka.set_coordinator("svc", 2)
            feeder.send("t", b"after")
            wait_until(lambda: len(got) == 2, "the record after the move")
        assert got == [b"before", b"after"]
        assert committed(kafka, "svc", "t") == {0: 2}


def test_requests_are_counted_by_kind(embedded_kafka: Any) -> None:
    embedded_kafka.create_topic("t")
    embedded_kafka.requests()
    KafkaLogger(topic="t", settings=quick(embedded_kafka)).log(b"one")
    assert embedded_kafka.requests()["Produce"] == 1


def test_logging_to_a_cluster_that_has_ended_says_so() -> None:
    with EmbeddedKafka() as kafka:
        kafka.create_topic("t")
        log = KafkaLogger(topic="t", settings=quick(kafka))
        log.log(b"one")
    with pytest.raises(ClosedError):
        log.log(b"two")


def test_every_named_request_can_be_failed(embedded_kafka: Any) -> None:
    for request in API_KEYS:
        embedded_kafka.push_errors(request, [0])
        embedded_kafka.clear_errors(request)
    with pytest.raises(KeyError):
        embedded_kafka.push_errors("Produces", [1])


# --- dispatch() ------------------------------------------------------------------------------------------------------


@pytest.fixture
def order_placed(handler_registry: Any) -> type[Event]:
    class OrderPlaced(Event):
        event_name = "ORDER_PLACED"
        key_field = "order_id"
        order_id: int
        customer: str = ""

    return OrderPlaced


@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_dispatch_runs_the_handlers_in_order(order_placed: Any, codec: str) -> None:
    got: list[Any] = []

    class First(EventHandler):
        event_name = "ORDER_PLACED"

        def handle_event(self, event: Any) -> None:
            got.append(("first", event))

    @event_handler("ORDER_PLACED")
    def second(event: Any) -> None:
        got.append(("second", event))

    placed = order_placed(order_id=7, customer="Ada")
    result = dispatch(placed, codec=codec)
    assert (result.outcome, result.error, result.published) == ("done", None, [])
    assert got == [("first", placed), ("second", placed)]


def test_dispatch_without_a_handler_skips(order_placed: Any) -> None:
    assert dispatch(order_placed(order_id=1)).outcome == "skipped"


def test_dispatch_says_what_a_handler_raised(order_placed: Any) -> None:
    @event_handler("ORDER_PLACED")
    def failing(event: Any) -> None:
        raise LookupError("no such customer")

    result = dispatch(order_placed(order_id=1))
    assert result.outcome == "dead"
    assert isinstance(result.error, LookupError)


def test_dispatch_of_bytes_that_no_decoder_takes_is_dead(order_placed: Any) -> None:
    @event_handler("ORDER_PLACED")
    def handle(event: Any) -> None:
        pytest.fail("must not be called")

    result = dispatch(event("ORDER_PLACED", order_id="seven"))
    assert result.outcome == "dead"
    assert isinstance(result.error, UndecodableError)


def test_dispatch_awaits_async_handlers(order_placed: Any) -> None:
    got: list[Any] = []

    @event_handler("ORDER_PLACED")
    async def handle(event: Any) -> None:
        await asyncio.sleep(0)
        got.append((event.order_id, asyncio.current_task() is not None, current_record().topic))

    assert dispatch(order_placed(order_id=3)).outcome == "done"
    assert got == [(3, True, "keven_events_order_placed")]


def test_dispatch_shows_what_was_published(order_placed: Any) -> None:
    @event_handler("ORDER_PLACED")
    def handle(event: Any) -> None:
        KafkaLogger(topic="audit").log(b"seen")
        KafkaBatchLogger().log("text", topic="notes", key=b"k", headers=[("h", b"v")])
        EventPublisher(KafkaBatchLogger()).log_event(order_placed(order_id=9))

    published = dispatch(order_placed(order_id=1)).published
    assert published[:2] == [
        PublishedMessage("audit", b"seen", None, []),
        PublishedMessage("notes", b"text", b"k", [("h", b"v")]),
    ]
    assert (published[2].topic, published[2].key) == ("keven_events_order_placed", b"9")
    assert b'"order_id":9' in published[2].value


def test_dispatch_gives_the_record_in_hand(order_placed: Any) -> None:
    got: list[Any] = []

    @event_handler("ORDER_PLACED")
    def handle(event: Any) -> None:
        got.append(current_record())

    dispatch(order_placed(order_id=5), headers=[("trace", b"1")])
    dispatch(order_placed(order_id=5), key=b"own", topic="elsewhere")
    first, second = got
    assert (first.topic, first.key, first.header("trace")) == ("keven_events_order_placed", b"5", b"1")
    assert (second.topic, second.key, second.headers) == ("elsewhere", b"own", [])
    with pytest.raises(LookupError, match="outside a handler"):
        current_record()


def test_dispatch_runs_hooks_also_when_a_handler_raises(order_placed: Any) -> None:
    got: list[str] = []

    class Handler(EventHandler):
        event_name = "ORDER_PLACED"

        def handle_event(self, event: Any) -> None:
            got.append("handler")
            raise ValueError

    Handler.register_pre_handler_hook(lambda: got.append("before"))
    Handler.register_post_handler_hook(lambda event: got.append(f"after {event.order_id}"))
    assert dispatch(order_placed(order_id=2)).outcome == "dead"
    assert got == ["before", "handler", "after 2"]


def test_dispatch_to_a_foreign_topic(handler_registry: Any) -> None:
    got: list[bytes] = []

    @event_handler(topic="foreign")
    def handle(value: bytes) -> None:
        got.append(value)

    assert dispatch(b"\x00raw", topic="foreign").outcome == "done"
    assert got == [b"\x00raw"]


@pytest.mark.parametrize("kind", ["handler", "hook"])
def test_dispatch_finds_a_coroutine_that_nobody_would_await(order_placed: Any, kind: str) -> None:
    async def forgotten() -> None:
        pytest.fail("must not run")

    class Handler(EventHandler):
        event_name = "ORDER_PLACED"

        def handle_event(self, event: Any) -> Any:
            return forgotten() if kind == "handler" else None

    if kind == "hook":
        Handler.register_pre_handler_hook(lambda event: forgotten())
    result = dispatch(order_placed(order_id=1))
    if kind == "hook":
        assert result.outcome == "dead"
        assert "async def" in str(result.error)


# --- the pytest plugin -----------------------------------------------------------------------------------------------

_SERVICE_TESTS = """
import pytest
from keven_core.kafka.abstracts.event_handler import EventHandler, event_handler
from keven_core.kafka.events.event import Event
from keven_core.testing import EmbeddedKafka, dispatch


class Kept(Event):
    event_name = "KEPT"
    number: int = 0


@event_handler("KEPT")
def handle_kept(event):
    pass


addresses = set()


@pytest.mark.parametrize("turn", [1, 2])
def test_each_test_gets_a_cluster_of_its_own(embedded_kafka, turn):
    assert isinstance(embedded_kafka, EmbeddedKafka)
    embedded_kafka.create_topic("t")
    addresses.add(embedded_kafka.bootstrap_servers)
    assert len(addresses) == turn


@pytest.mark.parametrize("turn", [1, 2])
def test_the_registry_starts_empty(handler_registry, turn):
    assert EventHandler.events_with_handlers() == []
    assert Event.classes == {}

    class Mine(Event):
        event_name = "MINE"

    @event_handler("MINE")
    def handle(event):
        pass

    assert EventHandler.get_handler_count("MINE") == 1
    assert dispatch(Mine()).outcome == "done"


def test_the_registry_is_as_it_was():
    assert EventHandler.events_with_handlers() == ["kept"]
    assert list(Event.classes) == ["KEPT"]
    assert dispatch(Kept()).outcome == "done"


@pytest.mark.real_kafka
def test_the_marker_is_known():
    pass
"""


def test_plugin_fixtures_work_in_a_service(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "test_service.py").write_text(_SERVICE_TESTS)
    # Loaded by its entry point where the package is installed; by name in a bare checkout.
    installed = any(
        entry.value == "keven_core.testing.pytest_plugin" for entry in metadata.entry_points(group="pytest11")
    )
    plugin = [] if installed else ["-p", "keven_core.testing.pytest_plugin"]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--strict-markers", "-p", "no:cacheprovider", *plugin, str(tmp_path)],
        cwd=tmp_path,
        env={**_environment(), "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "6 passed" in found.stdout


def test_the_kafka_fixture_skips_with_the_reason_where_there_is_no_kafka(tmp_path: Path) -> None:
    found = _run_kafka_fixture(tmp_path, CI="")
    assert "1 skipped" in found
    assert "nothing here" in found


def test_the_kafka_fixture_fails_in_ci_where_java_is_there(tmp_path: Path) -> None:
    found = _run_kafka_fixture(tmp_path, CI="true")
    assert "1 error" in found
    assert "CI=true" in found


def _environment() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if not name.startswith(("KAFKA", "KEVEN_", "PYTEST_"))}


def _run_kafka_fixture(tmp_path: Path, **environment: str) -> str:
    import subprocess

    (tmp_path / "conftest.py").write_text(
        "import shutil\n"
        "from keven_core.testing import real_kafka\n"
        "real_kafka.unavailable_reason = lambda **_: 'nothing here'\n"
        "shutil.which = lambda name: '/usr/bin/' + name\n"
    )
    (tmp_path / "test_service.py").write_text("def test_it(kafka):\n    pass\n")
    installed = any(
        entry.value == "keven_core.testing.pytest_plugin" for entry in metadata.entry_points(group="pytest11")
    )
    plugin = [] if installed else ["-p", "keven_core.testing.pytest_plugin"]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *plugin, str(tmp_path)],
        cwd=tmp_path,
        env={**_environment(), **environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return found.stdout
