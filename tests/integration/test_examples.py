"""The specification's examples, as they stand there, each as a script of its own on a broker without any topic."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_services import Service, Services, read_topic, topics_of, wait_until

from keven_core.kafka._producers import close_producers
from keven_core.kafka.config import Settings
from keven_core.kafka.logger import KafkaLogger
from keven_core.testing.real_kafka import RealKafka

pytestmark = pytest.mark.real_kafka

HANDLER = """\
from keven_core.kafka.events.event import EventNames
from keven_core.kafka.abstracts.event_handler import EventHandler

class PrintEventHandler(EventHandler):
    event_name = EventNames.PRINT_EVENT

    def handle_event(self, event):
        print(f"PrintEventHandler received event: {event}")
"""

SERVER = """\
from keven_core.kafka.events.server import start_events_receiver_server

### Start the event receiver server with a given server name.
start_events_receiver_server(server_name="my_event_server")
"""

PROCESS = """\
from keven_core.kafka.events.server import start_events_receiver_process

### Start the event receiver server as a separate process.
process = start_events_receiver_process(server_name="my_event_server")
process.join()  # Wait for the process to finish.
"""

LOGGER = """\
from keven_core.kafka.logger import KafkaLogger

logger = KafkaLogger(topic="my_logs")
logger.log(b"Sample log message")
"""

BATCH_LOGGER = """\
from keven_core.kafka.logger import KafkaBatchLogger

batch_logger = KafkaBatchLogger(topic="my_batch_logs")
batch_logger.log(b"Batch message 1")
batch_logger.log(b"Batch message 2")
batch_logger.flush()  # Sends all queued messages.
"""

TOPICS = {"keven_events", "keven_events_print_event"}


@pytest.fixture
def services(tmp_path: Path, fresh_kafka: RealKafka) -> Iterator[Services]:
    address = fresh_kafka.direct_bootstrap_servers
    services = Services(tmp_path, address, address, "my_event_server")
    yield services
    services.close()
    close_producers(address)


def publish(address: str, text: str) -> None:
    """One PRINT_EVENT on the topic of all events and one on its own."""
    settings = Settings(kafka_address=address)
    for topic in sorted(TOPICS):
        value = f'{{"event_name":"PRINT_EVENT","text":"{text} on {topic}"}}'
        KafkaLogger(topic=topic, settings=settings).log(value.encode())


def see(service: Service, text: str) -> None:
    for topic in TOPICS:
        service.wait_for(
            lambda line=f"'{text} on {topic}'": (
                "PrintEventHandler received event: " in service.out and line in service.out
            ),
            f"the event on {topic} is printed",
        )


def test_handler_and_server(fresh_kafka: RealKafka, services: Services) -> None:
    address = fresh_kafka.direct_bootstrap_servers
    service = services.run_script("example", HANDLER + "\n" + SERVER)
    service.wait_for(lambda: topics_of(address) >= TOPICS, "the default topics are made")
    publish(address, "first")
    see(service, "first")
    service.stop()
    assert service.out.count("PrintEventHandler received event: ") == 2
    # What comes meanwhile waits for the next run; what was handled does not come again.
    publish(address, "second")
    again = services.run_script("again", HANDLER + "\n" + SERVER)
    see(again, "second")
    again.stop(signal.SIGINT)
    assert again.out.count("PrintEventHandler received event: ") == 2


def test_process_without_a_main_guard(fresh_kafka: RealKafka, services: Services) -> None:
    import psutil

    address = fresh_kafka.direct_bootstrap_servers
    for topic in TOPICS:
        fresh_kafka.create_topic(topic)
    # As in a service: a logger is in use when the process is started, and something follows the join.
    above = (
        "from keven_core.kafka.logger import KafkaLogger\n"
        'logger = KafkaLogger(topic="keven_events")\n'
        """logger.log(b'{"event_name":"PRINT_EVENT","text":"from above"}')\n"""
    )
    below = "import os\nprint('below', os.getpid())\nlogger.log(b'{}')\nprint('the logger lives')\n"
    service = services.run_script("example", above + HANDLER + "\n" + PROCESS + below)
    publish(address, "first")
    see(service, "first")
    service.wait_for(lambda: "from above" in service.out, "the script's own event is handled")
    worker = psutil.Process(service.pid).children()
    assert len(worker) == 1
    worker[0].terminate()
    assert service.wait() == 0, service.tail()
    assert service.out.count("below") == 1
    assert f"below {service.pid}" in service.out
    assert "the logger lives" in service.out
    assert not worker[0].is_running()


@pytest.mark.parametrize(
    ("script", "topic", "expected"),
    [
        (LOGGER, "my_logs", [b"Sample log message"]),
        (BATCH_LOGGER, "my_batch_logs", [b"Batch message 1", b"Batch message 2"]),
    ],
    ids=["single", "batch"],
)
def test_loggers(fresh_kafka: RealKafka, services: Services, script: str, topic: str, expected: list[bytes]) -> None:
    service = services.run_script("example", script)
    assert service.wait() == 0, service.tail()
    assert service.complaints == []
    assert [message.value() for message in read_topic(fresh_kafka.direct_bootstrap_servers, topic)] == expected


def test_services_on_one_broker_share_the_work_by_name(fresh_kafka: RealKafka, services: Services) -> None:
    """Section 4 of the specification: several services, each with its own name, each get every event."""
    address = fresh_kafka.direct_bootstrap_servers
    other = SERVER.replace("my_event_server", "another_server")
    service = services.run_script("example", HANDLER + "\n" + SERVER)
    another = services.run_script("another", HANDLER + "\n" + other)
    wait_until(lambda: topics_of(address) >= TOPICS, "the default topics are made")
    publish(address, "first")
    see(service, "first")
    see(another, "first")
    service.stop()
    another.stop()
