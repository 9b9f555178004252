"""Fixtures of the tests that run services on a real Kafka; tests/integration and tests/faults import them."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from real_services import Services, admin_of, direct_address, heal, own_broker, topics_of, wait_until

from keven_core.testing.real_kafka import RealKafka

__all__ = ["fresh_kafka", "make_topic", "own_kafka", "own_make_topic", "own_services", "own_topic", "services", "topic"]


def _topics(kafka: Any) -> Iterator[Callable[..., str]]:
    """A function that makes a topic with a name of its own; they are deleted with all topics named after them."""
    made: list[str] = []

    def make(partitions: int = 1, config: dict[str, Any] | None = None, suffix: str = "") -> str:
        name = f"it-{uuid.uuid4().hex[:10]}{suffix}"
        made.append(name)
        kafka.create_topic(name, partitions=partitions, config=config)
        return name

    yield make
    admin = admin_of(direct_address(kafka))
    there = admin.list_topics(timeout=20).topics
    ours = [topic for topic in there if any(name in topic for name in made)]
    if ours:
        for future in admin.delete_topics(ours, operation_timeout=20).values():
            future.exception(timeout=25)


def _services(folder: Path, kafka: Any, topic_name: str) -> Iterator[Services]:
    services = Services(folder, kafka.bootstrap_servers, direct_address(kafka), topic_name)
    try:
        yield services
    finally:
        services.close()


@pytest.fixture
def make_topic(kafka: Any) -> Iterator[Callable[..., str]]:
    yield from _topics(kafka)


@pytest.fixture
def topic(make_topic: Callable[..., str]) -> str:
    """A topic with four partitions."""
    return make_topic(4)


@pytest.fixture
def services(tmp_path: Path, kafka: Any, topic: str) -> Iterator[Services]:
    """Starts child processes on the session's Kafka; their group is named like `topic`."""
    yield from _services(tmp_path, kafka, topic)


@pytest.fixture
def own_kafka() -> Iterator[RealKafka]:
    """A broker that this test may kill, pause and cut off; healed before and after."""
    kafka = own_broker()
    heal(kafka)
    yield kafka
    heal(kafka)


@pytest.fixture
def fresh_kafka(own_kafka: RealKafka) -> RealKafka:
    """The own broker without any topic."""
    address = own_kafka.direct_bootstrap_servers

    def named() -> list[str]:
        return [name for name in topics_of(address) if not name.startswith("__")]

    there = named()
    if there:
        admin = admin_of(address)
        for future in admin.delete_topics(there, operation_timeout=20).values():
            future.result(timeout=25)
        wait_until(lambda: not named(), "the broker has learnt that they are gone", 20)
    return own_kafka


@pytest.fixture
def own_make_topic(own_kafka: RealKafka) -> Iterator[Callable[..., str]]:
    for make in _topics(own_kafka):
        yield make
        heal(own_kafka)


@pytest.fixture
def own_topic(own_make_topic: Callable[..., str]) -> str:
    """A topic with four partitions on the own broker."""
    return own_make_topic(4)


@pytest.fixture
def own_services(tmp_path: Path, own_kafka: RealKafka, own_topic: str) -> Iterator[Services]:
    """Starts child processes on the own broker, through its proxy."""
    yield from _services(tmp_path, own_kafka, own_topic)
