"""Starts that can't succeed, or not yet: what is said, how it ends, and which topics are made."""

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from real_services import (
    KIP_848,
    PROTOCOLS,
    Service,
    Services,
    committed,
    quicken_group,
    read_topic,
    send,
    topics_of,
    wait_until,
)

from keven_core.testing.real_kafka import RealKafka

pytestmark = pytest.mark.real_kafka

UNREACHABLE = "can't be reached, trying again"


@pytest.fixture
def closed_port() -> Iterator[str]:
    """An address that refuses connections: bound, so that nobody else takes it, and never listening."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{sock.getsockname()[1]}"


def is_stoppable(service: Service, number: int = signal.SIGTERM) -> None:
    """It ends within a second. Nothing was handled, so there is nothing that could not be committed: exit code 0."""
    service.send_signal(number)
    began = time.monotonic()
    assert service.wait(20) == 0, service.tail()
    # One second, and another for an interpreter that has to end beside the other tests of this machine.
    assert time.monotonic() - began < 2.0, service.tail()
    assert "Traceback" not in service.err, service.tail()


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["sync", "async"])
def test_an_unreachable_broker_is_named_every_few_seconds(
    services: Services, closed_port: str, asynchronous: bool
) -> None:
    worker = services.worker("worker", kafka=closed_port, asynchronous=asynchronous)
    worker.wait_for_err(f"Kafka at {closed_port} {UNREACHABLE}", 10)
    took = worker.wait_for(lambda: worker.err.count(UNREACHABLE) >= 2, "it is said again", 20)
    assert 2 < took < 15
    assert "Traceback" not in worker.err
    is_stoppable(worker, signal.SIGINT if asynchronous else signal.SIGTERM)


def test_a_host_that_cannot_be_resolved_is_named(services: Services) -> None:
    worker = services.worker("worker", kafka="kafka.invalid:9092")
    worker.wait_for_err("Kafka at kafka.invalid:9092 can't be reached", 20)
    is_stoppable(worker)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_broker_that_takes_connections_and_does_not_answer(
    own_kafka: RealKafka, own_services: Services, asynchronous: bool
) -> None:
    proxy = own_kafka.proxies[0]
    proxy.black_hole()
    worker = own_services.worker("worker", asynchronous=asynchronous)
    worker.wait_for_err(UNREACHABLE, 20)
    assert proxy.bytes_swallowed > 0
    is_stoppable(worker)


def test_a_server_waits_for_a_broker_that_comes_later(
    own_kafka: RealKafka, own_services: Services, own_topic: str
) -> None:
    own_kafka.kill()
    worker = own_services.worker("worker", rdkafka="reconnect.backoff.max.ms=500")
    worker.wait_for_err(UNREACHABLE, 20)
    own_kafka.restart()
    send(own_kafka.direct_bootstrap_servers, own_topic, [b'{"event_name":"LOAD","id":1}'])
    worker.wait_for_count(1)
    worker.stop()


def test_a_stop_while_the_broker_is_asked_at_once_after_the_start(own_kafka: RealKafka, own_services: Services) -> None:
    # The first question is under way, and its answer never comes: the client must not be freed under it.
    proxy = own_kafka.proxies[0]
    proxy.black_hole()
    for attempt in range(5):
        connections = proxy.connections
        worker = own_services.worker(f"worker-{attempt}", asynchronous=attempt % 2 == 1)
        worker.wait_for(lambda before=connections: proxy.connections > before, "it connects")
        is_stoppable(worker)


EMBEDDED = """
import sys, threading
from keven_core.kafka import KafkaConsumerServer

for round in range(3):
    servers = [KafkaConsumerServer(["t"], runners=[print], client_id=f"c-{n}") for n in range(8)]
    for server in servers:
        server.__enter__()
    sys.stdin.readline()
    for server in servers:
        server.__exit__(None, None, None)
    print("stopped", flush=True)
for thread in threading.enumerate():
    if thread.name == "keven-wait":
        thread.join()
print("alive", flush=True)
"""


@pytest.mark.parametrize("answer", ["refused", "none"])
def test_embedded_servers_that_are_stopped_while_the_broker_is_asked(
    own_kafka: RealKafka, own_services: Services, closed_port: str, answer: str
) -> None:
    """The clients are freed in a process that goes on, and not under the call that was given up."""
    own_kafka.proxies[0].black_hole()
    address = closed_port if answer == "refused" else own_kafka.bootstrap_servers
    service = own_services.run_script(
        "service", EMBEDDED, kafka=address, stdin=subprocess.PIPE, env={"MALLOC_PERTURB_": "165"}
    )
    connections = own_kafka.proxies[0].connections
    for stopped in range(3):
        if answer == "refused":
            service.wait_for_err(UNREACHABLE)
        else:
            service.wait_for(
                lambda wanted=connections + 8 * (stopped + 1): own_kafka.proxies[0].connections >= wanted, "all connect"
            )
        service.type("stop")
        service.wait_for(lambda wanted=stopped + 1: service.out.count("stopped") == wanted, "they stop", 5)
    service.wait_for(lambda: "alive" in service.out, "it lives on", 30)
    assert service.wait(30) == 0, service.tail()


def test_an_unknown_topic_of_the_user_is_an_error(services: Services, topic: str) -> None:
    worker = services.worker("worker", topic, f"{topic}-unknown")
    assert worker.wait(40) == 1, worker.tail()
    last = worker.err.strip().splitlines()[-1]
    assert last.startswith("keven_core.kafka.errors.UnknownTopicError: "), worker.tail()
    assert f"{topic}-unknown" in last
    assert f"{topic}-unknown" not in topics_of(services.direct_address)


def test_an_unknown_topic_can_still_come_while_the_server_starts(
    kafka: Any, services: Services, make_topic: Callable[..., str]
) -> None:
    name = make_topic(1)
    late = f"{name}-late"
    worker = services.worker("worker", late)
    dead = f"kafka_server.{services.group}.dead"
    worker.wait_for(lambda: dead in topics_of(kafka.bootstrap_servers), "it has looked for its topics")
    kafka.create_topic(late)
    send(kafka.bootstrap_servers, late, [b'{"event_name":"LOAD","id":1}'])
    worker.wait_for_count(1)
    worker.stop()


# --- which topics are made -------------------------------------------------------------------------------------------

DEFAULT_TOPICS = """
import logging, sys
from keven_core.kafka import event_handler
from keven_core.kafka.events.server import start_events_receiver_server

logging.basicConfig(level=logging.INFO)

@event_handler(sys.argv[2])
def handle(event):
    if event.number < 0:
        raise ValueError("negative")
    print("handled", event.number, flush=True)

start_events_receiver_server(server_name=sys.argv[1], session_timeout=2, heartbeat_interval=0.5)
"""


@pytest.fixture
def event_topic(kafka: Any, topic: str) -> str:
    """The default topic of an event that nobody has used; deleted with `topic`, since its name holds that one's."""
    if "keven_events" not in topics_of(kafka.bootstrap_servers):
        kafka.create_topic("keven_events")
    return f"keven_events_{topic}"


def test_default_and_dead_letter_topics_are_created(
    kafka: Any, services: Services, topic: str, event_topic: str
) -> None:
    dead = f"kafka_server.{topic}.dead"
    service = services.run_script("service", DEFAULT_TOPICS, topic, topic.upper())
    service.wait_for(lambda: topics_of(kafka.bootstrap_servers) >= {event_topic, dead}, "its topics are made")
    send(kafka.bootstrap_servers, event_topic, [b'{"number":1}', b'{"number":-1}', b'{"number":2}'])
    service.wait_for(lambda: "handled 2" in service.out, "the events are handled")
    service.stop()
    [letter] = read_topic(kafka.bootstrap_servers, dead)
    assert letter.value() == b'{"number":-1}'


# The answer comes before the broker that the service asks knows of the topics: the lag of a busy or large cluster.
CREATES_LATE = """
import threading
from keven_core.kafka import admin

create = admin.create_topics


def create_late(settings, address, topics, **options):
    topics = list(topics)
    threading.Timer(1.5, create, (settings, address, topics), options).start()
    return topics


admin.create_topics = create_late
"""


def test_created_topics_that_the_broker_learns_of_late(
    kafka: Any, services: Services, topic: str, event_topic: str
) -> None:
    service = services.run_script("service", CREATES_LATE + DEFAULT_TOPICS, topic, topic.upper())
    service.wait_for(lambda: event_topic in topics_of(kafka.bootstrap_servers), "its topic is made")
    send(kafka.bootstrap_servers, event_topic, [b'{"number":1}'])
    service.wait_for(lambda: "handled 1" in service.out, "the event is handled", 30)
    service.stop()


def test_no_topic_is_created_when_that_is_switched_off(
    kafka: Any, services: Services, topic: str, event_topic: str
) -> None:
    dead = f"kafka_server.{topic}.dead"
    service = services.run_script("service", DEFAULT_TOPICS, topic, topic.upper(), env={"KEVEN_CREATE_TOPICS": "false"})
    service.wait_for_err("assigned: keven_events [0]")
    assert not topics_of(kafka.bootstrap_servers) & {event_topic, dead}
    # The default topic may come later.
    kafka.create_topic(event_topic)
    send(kafka.bootstrap_servers, event_topic, [b'{"number":1}'])
    service.stop()
    again = services.run_script("again", DEFAULT_TOPICS, topic, topic.upper(), env={"KEVEN_CREATE_TOPICS": "false"})
    again.wait_for(lambda: "handled 1" in again.out, "the event is handled")
    # A record that can't be copied to its dead-letter topic is not lost: the server stops, and its offset stays.
    send(kafka.bootstrap_servers, event_topic, [b'{"number":-1}'])
    assert again.wait(90) == 1, again.tail()
    assert f"DeadLetterError: 1 failed record(s) could not be copied to {dead} " in again.err
    assert committed(kafka.bootstrap_servers, topic, event_topic) == {0: 1}
    kafka.create_topic(dead)
    last = services.run_script("last", DEFAULT_TOPICS, topic, topic.upper(), env={"KEVEN_CREATE_TOPICS": "false"})
    wait_until(lambda: len(read_topic(kafka.bootstrap_servers, dead)) == 1, "it is dead-lettered by the next run")
    last.stop()
    assert committed(kafka.bootstrap_servers, topic, event_topic) == {0: 2}


ALL_EVENTS = """
import logging, sys
from keven_core.kafka.events.server import start_all_events_receiver_server

logging.basicConfig(level=logging.INFO)

def handle(event):
    if getattr(event, "run", None) == sys.argv[1]:
        print("handled", event.event_name, event.number, flush=True)

start_all_events_receiver_server(
    server_name=sys.argv[1], event_handler=handle, include_audit=True, session_timeout=2, heartbeat_interval=0.5
)
"""


@PROTOCOLS
def test_an_all_events_server_finds_topics_that_come_later(
    kafka: Any, services: Services, topic: str, event_topic: str, protocol: str
) -> None:
    """The pattern ^keven_events_.* is the client's under the classic protocol and the broker's under KIP-848."""
    address = kafka.bootstrap_servers
    options = ",".join(filter(None, [protocol, "topic.metadata.refresh.interval.ms=500"]))
    if protocol == KIP_848:
        quicken_group(address, topic)
    kafka.create_topic(f"{event_topic}-first")
    service = services.run_script("service", ALL_EVENTS, topic, env={"KEVEN_RDKAFKA_OPTIONS": options})
    service.wait_for(lambda: f"{event_topic}-first [0]" in service.err, "the topic is assigned")
    kafka.create_topic(f"{event_topic}-later")
    for number, name in enumerate(
        [f"{event_topic}-first", f"{event_topic}-later", "keven_events", "keven_events.audit"]
    ):
        value = f'{{"event_name":"SOME","run":"{topic}","number":{number}}}'
        send(address, name, [value.encode()])
    for number in range(4):
        service.wait_for(lambda n=number: f"handled SOME {n}" in service.out, f"event {number} is handled")
    service.stop()


def test_a_topic_that_is_deleted_while_it_is_consumed(kafka: Any, services: Services, topic: str) -> None:
    send(kafka.bootstrap_servers, topic, [b'{"event_name":"LOAD","id":1}'])
    worker = services.worker("worker", rdkafka="topic.metadata.refresh.interval.ms=500")
    worker.wait_for_count(1)
    kafka.delete_topic(topic)
    worker.wait_for_err("UNKNOWN_TOPIC")
    kafka.create_topic(topic, partitions=4)
    send(kafka.bootstrap_servers, topic, [b'{"event_name":"LOAD","id":2}'] * 40)
    worker.wait_for_count(2)
    worker.stop()
