"""What the embedded tests share: filling topics, running servers, reading what stands on the broker.

Topics and committed offsets are read with confluent-kafka's consumer, so that what is checked and what checks have
nothing in common but the broker.
"""

import logging
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import confluent_kafka
import msgspec
import pytest
import uvloop
from builds import run_python

from keven_core._native.producer import DeliveryAccount, Producer
from keven_core.kafka.abstracts.consumer_server import KafkaConsumerServer
from keven_core.kafka.config import Settings
from keven_core.kafka.errors import ClosedError
from keven_core.kafka.events.runner import EventRunner
from keven_core.kafka.kinds import COMMANDS, EVENTS
from keven_core.testing import EmbeddedKafka

DEADLINE_S = 30.0

CLIENT = "svc"
DEAD = "kafka_server.svc.dead"

# librdkafka's pauses, cut down so that tests need not wait for them.
QUICK = {
    "fetch.wait.max.ms": "10",
    "fetch.error.backoff.ms": "10",
    "reconnect.backoff.ms": "10",
    "reconnect.backoff.max.ms": "100",
    "retry.backoff.ms": "10",
    "retry.backoff.max.ms": "50",
}

MODES = pytest.mark.parametrize("mode", ["sync", "async"])

Headers = list[tuple[str, "bytes | None"]]


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Wait for a condition; fail the test when it does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s} s: {what}")
        time.sleep(0.002)


def stays(condition: Callable[[], bool], seconds: float = 0.3) -> bool:
    """Whether a condition holds over a time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not condition():
            return False
        time.sleep(0.01)
    return True


def quick(kafka: EmbeddedKafka, options: Mapping[str, str] | None = None, **changes: Any) -> Settings:
    """Settings for the embedded cluster without librdkafka's longer pauses."""
    return kafka.settings(rdkafka_options={**QUICK, **(options or {})}, **changes)


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass
class Message:
    """One message to be sent."""

    value: bytes | None
    key: bytes | None = None
    headers: Headers = field(default_factory=list)
    timestamp_ms: int = 0


class Feeder:
    """A producer that writes to chosen partitions; a context manager. `together`: so many messages go in one batch."""

    def __init__(self, kafka: EmbeddedKafka, together: int = 0) -> None:
        # A full batch goes at once; the linger is for a rest that is too large for it.
        linger_ms = 200 if together else 0
        options = quick(kafka).producer_options(kafka.bootstrap_servers, "feeder", linger_ms=linger_ms)
        if together:
            options["batch.num.messages"] = str(together)
        # Getting a producer id costs the embedded broker half a second.
        options["enable.idempotence"] = "false"
        self._producer = Producer(options)
        # A message for a topic that is looked up before the connection stands waits for librdkafka's next tick, 1 s.
        self._producer.metadata(int(DEADLINE_S * 1000))
        self.account = DeliveryAccount()

    def __enter__(self) -> "Feeder":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._producer.close(1000)

    def send(self, topic: str, message: "Message | bytes | None", partition: int = 0) -> None:
        """Queue one message."""
        given = message if isinstance(message, Message) else Message(message)
        self._producer.produce(
            topic,
            given.value,
            self.account,
            key=given.key,
            headers=given.headers,
            partition=partition,
            timestamp_ms=given.timestamp_ms,
            timeout_ms=10_000,
        )

    def wait(self) -> None:
        """Wait until the broker has acknowledged everything."""
        assert self._producer.wait(self.account, DEADLINE_S), "the broker did not acknowledge the test's messages"
        failed, kept = self.account.take_failures()
        assert not failed, kept


def send(kafka: EmbeddedKafka, topic: str, *messages: "Message | bytes | None", partition: int = 0) -> None:
    """Write messages to one partition, in order, acknowledged; all in one batch, which a consumer gets at once."""
    with Feeder(kafka, len(messages)) as feeder:
        for message in messages:
            feeder.send(topic, message, partition)
        feeder.wait()


def event(name: str, **fields: Any) -> bytes:
    """An event as JSON."""
    return msgspec.json.encode({"event_name": name, **fields})


def numbered(count: int, start: int = 0) -> list[bytes]:
    """`count` different raw messages."""
    return [b"%d" % number for number in range(start, start + count)]


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass
class Stored:
    """A message as it stands on the broker."""

    partition: int
    offset: int
    value: bytes | None
    key: bytes | None
    headers: Headers
    timestamp: tuple[int, int]

    def header(self, name: str) -> bytes | None:
        """The last header of that name."""
        return dict(self.headers).get(name)


@contextmanager
def _reader(kafka: EmbeddedKafka, group: str) -> Iterator[Any]:
    consumer = confluent_kafka.Consumer(
        {"bootstrap.servers": kafka.bootstrap_servers, "group.id": group, "enable.auto.commit": False, **QUICK}
    )
    try:
        yield consumer
    finally:
        consumer.close()


def partitions_of(consumer: Any, topic: str) -> list[Any]:
    found = consumer.list_topics(topic, timeout=DEADLINE_S).topics[topic].partitions
    return [confluent_kafka.TopicPartition(topic, number) for number in sorted(found)]


def read(kafka: EmbeddedKafka, topic: str) -> list[Stored]:
    """Everything that stands in a topic, by partition and offset."""
    found: list[Stored] = []
    with _reader(kafka, "reader") as consumer:
        wanted = 0
        starts = []
        for entry in partitions_of(consumer, topic):
            low, high = consumer.get_watermark_offsets(entry, timeout=DEADLINE_S)
            wanted += high - low
            starts.append(confluent_kafka.TopicPartition(topic, entry.partition, low))
        consumer.assign(starts)
        deadline = time.monotonic() + DEADLINE_S
        while len(found) < wanted:
            assert time.monotonic() < deadline, f"{topic} can't be read"
            message = consumer.poll(0.1)
            if message is not None and message.error() is None:
                found.append(
                    Stored(
                        message.partition(),
                        message.offset(),
                        message.value(),
                        message.key(),
                        list(message.headers() or ()),
                        message.timestamp(),
                    )
                )
    return sorted(found, key=lambda entry: (entry.partition, entry.offset))


def values(kafka: EmbeddedKafka, topic: str) -> list[bytes | None]:
    """The values that stand in a topic."""
    return [entry.value for entry in read(kafka, topic)]


def ends(kafka: EmbeddedKafka, topic: str) -> dict[int, int]:
    """The end of each partition that holds something, as the broker says."""
    with _reader(kafka, "reader") as consumer:
        parts = partitions_of(consumer, topic)
        found = {part.partition: consumer.get_watermark_offsets(part, timeout=DEADLINE_S)[1] for part in parts}
    return {partition: end for partition, end in found.items() if end > 0}


def committed(kafka: EmbeddedKafka, group: str, topic: str) -> dict[int, int]:
    """Committed offsets by partition, as the broker says; partitions without one are left out."""
    with _reader(kafka, group) as consumer:
        found = consumer.committed(partitions_of(consumer, topic), timeout=DEADLINE_S)
    return {entry.partition: entry.offset for entry in found if entry.offset >= 0}


# --- running ---------------------------------------------------------------------------------------------------------


class Server(KafkaConsumerServer):
    """A server with what tests ask for again and again."""

    def counts(self) -> dict[str, int]:
        """The ledger of the run, summed over its partitions."""
        total: dict[str, int] = {}
        for entry in self.ledger().values():
            for name, count in entry.items():
                total[name] = total.get(name, 0) + count
        return total

    def totals(self) -> dict[str, int]:
        """The same but for zeros."""
        return {name: count for name, count in self.counts().items() if count}

    def ready(self) -> bool:
        """Whether it has partitions."""
        try:
            return bool(self.assignment())
        except ClosedError:
            return False


def reading_server(kafka: EmbeddedKafka, topics: Any, runners: Any = None, **options: Any) -> Server:
    """A server that reads everything there is, without a group, and ends; the registered handlers by default."""
    defaults: dict[str, Any] = {
        "client_id": CLIENT,
        "settings": quick(kafka),
        "use_group": False,
        "start": "earliest",
        "until_end": True,
    }
    given = [EventRunner()] if runners is None else runners if isinstance(runners, list) else [runners]
    return Server(topics, runners=given, **{**defaults, **options})


def group_server(kafka: EmbeddedKafka, topics: Any, runners: Any = None, **options: Any) -> Server:
    """A server that joins its group and runs until it is stopped."""
    return reading_server(
        kafka, topics, runners, **{"use_group": True, "start": "stored", "until_end": False, **options}
    )


def run(server: Any, mode: str) -> None:
    """Run a server to its end in this thread."""
    if mode == "sync":
        server.start_sync()
    else:
        uvloop.run(server.run_server())


class Live:
    """A server that runs in a thread of the test."""

    def __init__(self, server: Any, mode: str) -> None:
        self.server = server
        self.error: BaseException | None = None
        self._mode = mode
        self._thread = threading.Thread(target=self._run, daemon=True, name="test-server")
        self._thread.start()

    def _run(self) -> None:
        try:
            run(self.server, self._mode)
        except BaseException as error:
            self.error = error

    @property
    def ended(self) -> bool:
        """Whether the run is over."""
        return not self._thread.is_alive()

    def join(self, timeout_s: float = DEADLINE_S) -> None:
        """Wait for the end of the run."""
        self._thread.join(timeout_s)
        assert self.ended, "the server did not end"

    def stop(self) -> None:
        """End the run in order; raises what ended it instead."""
        self.server.stop()
        self.join()
        if self.error is not None:
            raise self.error


@contextmanager
def live(server: Server, mode: str = "sync", *, wait: bool = True) -> Iterator[Live]:
    """Run a server meanwhile; its failure is the test's."""
    running = Live(server, mode)
    try:
        if wait:
            wait_until(lambda: server.ready() or running.ended, "the server gets its partitions")
            if running.error is not None:
                raise running.error
        yield running
    except BaseException:
        server.stop()
        running.join()
        raise
    if not running.ended:
        running.stop()
    elif running.error is not None:
        raise running.error


@contextmanager
def isolated_handlers() -> Iterator[None]:
    """As the fixture `handler_registry`, for runs that several tests share."""
    with EVENTS.isolated(), COMMANDS.isolated():
        yield


@contextmanager
def logged() -> Iterator[list[str]]:
    """Warnings and errors of the library meanwhile."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("keven_core")
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)


def topics(kafka: EmbeddedKafka, *names: str, partitions: int = 1) -> None:
    """Create topics, and the dead-letter topic of the tests' servers."""
    for name in (*names, DEAD):
        kafka.create_topic(name, partitions)


LOGGING_PROCESS = """
import os, sys, time
from keven_core.kafka.config import Settings
from keven_core.kafka.errors import *
from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger
address = sys.argv[1]
def settings(**changes):
    return Settings(kafka_address=address, create_topics=False, idempotence=False, **changes)
"""


def logging_process(embedded_kafka: Any, code: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run code that logs in a process of its own; it finds the loggers' classes and settings()."""
    return run_python("-c", LOGGING_PROCESS + code, embedded_kafka.bootstrap_servers, **options)
