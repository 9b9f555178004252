"""Fixtures of the embedded tests: nothing is left behind, and no error goes unnoticed."""

import gc
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from embedded_support import wait_until

from keven_core._native.library import live_objects


def pytest_configure(config: Any) -> None:
    config.addinivalue_line("markers", "logs_errors: the test expects errors in the log")
    config.addinivalue_line("markers", "leaves_clients: the test abandons clients on purpose")


@pytest.fixture
def topic(embedded_kafka: Any) -> str:
    """A topic with one partition."""
    embedded_kafka.create_topic("t")
    return "t"


@pytest.fixture(autouse=True)
def _no_unexpected_errors(request: Any, caplog: Any) -> Iterator[None]:
    """An error that was only logged fails the test."""
    yield
    if request.node.get_closest_marker("logs_errors"):
        return
    errors = [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.levelno >= logging.ERROR and record.name.startswith(("keven_core", "asyncio"))
    ]
    assert not errors, "errors were logged: " + "\n".join(errors)


@pytest.fixture(autouse=True)
def _nothing_left(request: Any, _no_unexpected_errors: None) -> Iterator[None]:
    """Every native object that a test makes is gone after it."""
    before = live_objects()
    yield
    if request.node.get_closest_marker("leaves_clients"):
        return

    def settled() -> bool:
        gc.collect()
        return live_objects() == before

    wait_until(settled, f"native objects are freed, before: {before}", 5)
