"""Pytest fixtures: `embedded_kafka`, `kafka` (a real broker), `handler_registry`, `assert_schema_compatible`.

Installed with the package (entry point `pytest11`); nothing of it is imported before a fixture is used.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from keven_core.testing.embedded import EmbeddedKafka


def pytest_configure(config: Any) -> None:
    """Make the marker known to strict test suites."""
    config.addinivalue_line("markers", "real_kafka: needs a real Kafka broker")


@pytest.fixture
def embedded_kafka() -> Iterator[EmbeddedKafka]:
    """A fresh EmbeddedKafka with one broker for this test."""
    from keven_core.testing.embedded import EmbeddedKafka

    with EmbeddedKafka() as kafka:
        yield kafka


def skip_without_kafka(*, own_broker: bool = False) -> None:
    """Skip the test, with the reason, where no real Kafka can be had; with CI=true and Java present it fails.

    Args:
        own_broker: as `real_kafka.unavailable_reason` takes it.
    """
    from keven_core.testing.real_kafka import unavailable_reason

    reason = unavailable_reason(own_broker=own_broker)
    if reason is None:
        return
    if os.environ.get("CI") == "true" and shutil.which("java"):
        pytest.fail(f"real Kafka is needed here (CI=true and Java is present): {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def kafka() -> Iterator[Any]:
    """A real Kafka for the whole session: KAFKA, a running `make kafka`, Docker, or Java with Maven, in this order.

    Skips with the reason where none can be had; with CI=true and Java present that is a failure.
    """
    from keven_core.testing.real_kafka import real_kafka

    skip_without_kafka()
    with real_kafka() as cluster:
        yield cluster


@pytest.fixture
def handler_registry() -> Iterator[Any]:
    """Empty registries of handlers, message classes and codecs for this test, as before afterwards; gives events'."""
    from keven_core.kafka import codecs
    from keven_core.kafka.kinds import COMMANDS, EVENTS

    with EVENTS.isolated(), COMMANDS.isolated(), codecs.isolated():
        yield EVENTS.registry


@pytest.fixture
def assert_schema_compatible() -> Callable[..., None]:
    """A function that fails the test when what is registered breaks a committed snapshot or its golden bytes.

    Arguments and errors as of keven_core.kafka.schema.check(). The modules that register have to be imported before.
    """
    from keven_core.kafka.schema.files import DEFAULT_PATH, check

    def assert_compatible(path: str | os.PathLike[str] = DEFAULT_PATH, direction: str = "backward") -> None:
        __tracebackhide__ = True
        report = check(path, direction)
        if report.breaking:
            pytest.fail(str(report), pytrace=False)

    return assert_compatible
