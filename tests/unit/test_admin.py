"""Creating topics: a fork waits for it, since locks of the threads that do it would stay locked in the child."""

import os
import threading
import time
from collections.abc import Iterator

import pytest

from keven_core.kafka import admin
from keven_core.kafka.config import Settings

# Python 3.12 warns of what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def create() -> list[str]:
    return admin.create_topics(Settings(), "nowhere:9092", ["t"])


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A topic is being created in another thread, until this is set."""
    begun, ended = threading.Event(), threading.Event()

    def create_slowly(*_: object) -> list[str]:
        begun.set()
        ended.wait(30)
        return ["t"]

    monkeypatch.setattr(admin, "_create_topics", create_slowly)
    thread = threading.Thread(target=create)
    thread.start()
    begun.wait(30)
    yield ended
    ended.set()
    thread.join(30)


def forked() -> int:
    """Fork; returns the exit code of the child, which creates a topic too."""
    child = os.fork()
    if child == 0:
        admin._create_topics = lambda *_: ["t"]
        os._exit(0 if create() == ["t"] else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_fork_waits_for_it(ended: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "_FORK_WAITS_S", 30)
    threading.Timer(0.1, ended.set).start()
    assert forked() == 0
    assert ended.is_set()


def test_but_not_for_ever(ended: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "_FORK_WAITS_S", 0.1)
    started = time.monotonic()
    assert forked() == 0
    assert time.monotonic() - started >= 0.1
    assert not ended.is_set()
    assert admin._under_way == ["nowhere:9092"]  # in the parent it goes on
