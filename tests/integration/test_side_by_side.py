"""Old and new processes of a service in one consumer group, and back: docs/migration.md."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from confluent_kafka import Consumer
from real_services import committed, load_value, send, wait_until

from keven_core.kafka import KafkaConsumerServer, Settings


class OldMember:
    """Consumes as the original does: poll(), handle, one synchronous commit for each message."""

    def __init__(self, address: str, group: str, topic: str) -> None:
        self.handled: list[bytes] = []
        self._consumer = Consumer(
            {
                "bootstrap.servers": address,
                "group.id": group,
                "client.id": group,
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "session.timeout.ms": 6000,
                "heartbeat.interval.ms": 2000,
                "log_level": 2,
            }
        )
        self._consumer.subscribe([topic])

    def handle(self, count: int = 1) -> None:
        """Handle up to so many messages, for a moment."""
        for _ in range(count):
            message = self._consumer.poll(0.05)
            if message is None:
                return
            if message.error() is None:
                self.handled.append(message.value())
                self._consumer.commit(message, asynchronous=False)

    def partitions(self) -> set[int]:
        return {entry.partition for entry in self._consumer.assignment()}

    def close(self) -> None:
        self._consumer.close()


@pytest.fixture
def old(kafka: Any, topic: str) -> Iterator[Callable[[], OldMember]]:
    made: list[OldMember] = []

    def make() -> OldMember:
        made.append(OldMember(kafka.bootstrap_servers, topic, topic))
        return made[-1]

    yield make
    for member in made:
        member.close()


def test_they_share_partitions_and_go_on_where_the_other_was(kafka: Any, topic: str, old: Any) -> None:
    def feed(start: int) -> None:
        send(kafka.bootstrap_servers, topic, [load_value(number) for number in range(start, start + 200)])

    def until(condition: Callable[[], bool], what: str) -> None:
        def pump() -> bool:
            member.handle(20)
            return condition()

        wait_until(pump, what)

    new: list[bytes] = []
    member = old()
    feed(0)
    until(lambda: len(member.handled) == 200, "the old member handles all")

    settings = Settings.from_env(kafka_address=kafka.bootstrap_servers, commit_interval_ms=100)
    server = KafkaConsumerServer(topic, client_id="next", group_id=topic, runners=[new.append], settings=settings)
    with server:
        until(
            lambda: len(member.partitions()) == 2 and len(server.assignment()) == 2, "each has half of the partitions"
        )
        feed(200)
        until(lambda: len(member.handled) + len(new) == 400, "both handle the next")
        assert new
        assert len(member.handled) > 200
        member.close()
        wait_until(lambda: len(server.assignment()) == 4, "the new member has all of them")
        feed(400)
        wait_until(lambda: len(member.handled) + len(new) == 600, "the new member handles the rest")

    # And back.
    feed(600)
    again = old()
    deadline = time.monotonic() + 60
    while len(again.handled) < 200 and time.monotonic() < deadline:
        again.handle(20)
    handled = [*member.handled, *new, *again.handled]
    assert sorted(handled) == sorted(load_value(number) for number in range(800)), "each once"
    assert sum(committed(kafka.bootstrap_servers, topic, topic).values()) == 800
