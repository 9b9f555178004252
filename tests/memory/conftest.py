"""Fixtures of the memory tests: each native object that a test makes is gone after it."""

import gc
from collections.abc import Iterator

import pytest
from waiting import wait_until

from keven_core._native.library import live_objects


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail the test when a native object outlives it."""
    gc.collect()
    before = live_objects()
    yield

    def settled() -> bool:
        gc.collect()
        return live_objects() == before

    wait_until(settled, 5, f"all native objects are freed: {before} before, {live_objects()} now")
