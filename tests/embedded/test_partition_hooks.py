"""on_assign, on_revoke, on_lost: when they are called, where, with what, and what becomes of their exceptions."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from embedded_support import (
    CLIENT,
    MODES,
    Live,
    committed,
    group_server,
    live,
    numbered,
    quick,
    reading_server,
    run,
    send,
    topics,
    wait_until,
)

from keven_core.kafka.errors import KafkaError

# Kafka's number.
UNKNOWN_MEMBER_ID = 25

COOPERATIVE = {"partition.assignment.strategy": "cooperative-sticky"}
QUICK_GROUP: dict[str, Any] = {"session_timeout": 2, "heartbeat_interval": 0.05}
# A member that was lost joins again when this session has ended on the embedded broker.
SHORT_SESSION: dict[str, Any] = {"session_timeout": 1.2, "heartbeat_interval": 0.05}


class Journal:
    """Hooks and a handler that note what happens, in order; `asynchronous`: as coroutine functions."""

    def __init__(self, asynchronous: bool = False) -> None:
        self.entries: list[Any] = []
        self.servers: set[Any] = set()
        self.threads: set[threading.Thread] = set()
        self.failing: dict[str, BaseException] = {}
        self._asynchronous = asynchronous

    def handle(self, message: bytes) -> None:
        self.entries.append(message)

    def _hook(self, kind: str) -> Callable[..., Any]:
        def note(server: Any, partitions: list[Any]) -> None:
            self.servers.add(server)
            self.threads.add(threading.current_thread())
            known = server.committed()
            places = {
                (entry.topic, entry.partition): entry.offset
                if kind == "assign"
                else (entry.offset, known[entry.topic, entry.partition])
                for entry in partitions
            }
            self.entries.append((kind, places))
            if kind in self.failing:
                raise self.failing[kind]

        async def note_later(server: Any, partitions: list[Any]) -> None:
            await asyncio.sleep(0.01)
            note(server, partitions)

        return note_later if self._asynchronous else note

    @property
    def hooks(self) -> dict[str, Any]:
        """As arguments of a server."""
        return {f"on_{kind}": self._hook(kind) for kind in ("assign", "revoke", "lost")}

    def of(self, kind: str) -> list[Any]:
        """What the hook of that kind was called with."""
        return [entry[1] for entry in self.entries if isinstance(entry, tuple) and entry[0] == kind]


HOOKS = pytest.mark.parametrize(
    ("mode", "asynchronous"), [("sync", False), ("sync", True), ("async", False), ("async", True)]
)
EACH_PROTOCOL = pytest.mark.parametrize(
    ("mode", "asynchronous", "strategy"),
    [
        pytest.param("sync", False, {}, id="sync eager", marks=pytest.mark.soak),
        # The others are seen on real Kafka.
        pytest.param("async", True, COOPERATIVE, id="async cooperative"),
        pytest.param("async", True, {}, id="async eager", marks=pytest.mark.soak),
        pytest.param("sync", False, COOPERATIVE, id="sync cooperative", marks=pytest.mark.soak),
    ],
)
SYNC = pytest.mark.parametrize("mode", ["sync", pytest.param("async", marks=pytest.mark.soak)])
TWO = pytest.mark.parametrize(("mode", "asynchronous"), [("sync", False), ("async", True)])


@HOOKS
def test_from_the_assignment_to_the_leave(embedded_kafka: Any, mode: str, asynchronous: bool) -> None:
    topics(embedded_kafka, "t", partitions=2)
    send(embedded_kafka, "t", *numbered(3))
    journal = Journal(asynchronous)
    settings = quick(embedded_kafka, commit_interval_ms=60_000)
    server = group_server(embedded_kafka, "t", journal.handle, settings=settings, **journal.hooks)
    with live(server, mode):
        wait_until(lambda: b"2" in journal.entries, "the records")
        owner = server._session._owner_thread  # type: ignore[union-attr]
    # Before the first record; and at the end everything is committed, and both partitions are the server's still.
    assert journal.entries == [
        ("assign", {("t", 0): -1001, ("t", 1): -1001}),
        *numbered(3),
        ("revoke", {("t", 0): (3, 3), ("t", 1): (-1001, -1)}),
    ]
    assert journal.servers == {server}
    assert {thread.ident for thread in journal.threads} == {owner}
    assert committed(embedded_kafka, CLIENT, "t") == {0: 3}


@MODES
def test_on_assign_sees_where_on_assign_topics_has_placed_it(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(5))
    journal = Journal()

    def place(server: Any, partitions: list[Any]) -> None:
        partitions[0].offset = 3

    options = {"use_group": False, "until_end": True, "on_assign_topics": place}
    run(reading_server(embedded_kafka, "t", journal.handle, **options, **journal.hooks), mode)
    assert journal.entries == [("assign", {("t", 0): 3}), b"3", b"4", ("revoke", {("t", 0): (5, -1)})]


@TWO
@pytest.mark.parametrize("kind", ["assign", "revoke"])
def test_an_exception_ends_the_server_in_order(embedded_kafka: Any, mode: str, asynchronous: bool, kind: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    journal = Journal(asynchronous)
    error = RuntimeError("the hook's own")
    journal.failing[kind] = error
    stopped: list[str] = []
    server = group_server(
        embedded_kafka, "t", journal.handle, **journal.hooks, on_stop=lambda: stopped.append("stopped")
    )
    running = Live(server, mode)
    if kind == "revoke":
        wait_until(lambda: b"2" in journal.entries, "the records")
        server.stop()
    running.join()
    assert running.error is error
    assert stopped == ["stopped"]
    assert len(journal.of("assign")) == len(journal.of("revoke")) == 1
    handled = [entry for entry in journal.entries if isinstance(entry, bytes)]
    assert handled == ([] if kind == "assign" else numbered(3))
    assert committed(embedded_kafka, CLIENT, "t") == ({} if kind == "assign" else {0: 3})


@EACH_PROTOCOL
def test_when_another_member_joins(embedded_kafka: Any, mode: str, asynchronous: bool, strategy: Any) -> None:
    topics(embedded_kafka, "t", partitions=2)
    for partition in (0, 1):
        send(embedded_kafka, "t", *numbered(3), partition=partition)
    first, second = Journal(asynchronous), Journal(asynchronous)
    # The embedded broker refuses commits while members join, which a real one does not.
    settings = quick(embedded_kafka, strategy, commit_interval_ms=10)
    options: dict[str, Any] = {"settings": settings, **QUICK_GROUP}
    server = group_server(embedded_kafka, "t", first.handle, **options, **first.hooks)
    with live(server, mode):
        wait_until(lambda: set(server.committed().values()) == {3}, "the records are committed")
        with live(group_server(embedded_kafka, "t", second.handle, **options, **second.hooks), mode):
            wait_until(lambda: second.of("assign"), "the second has a partition")
            revoked = first.of("revoke")[0]
            # What was given up was committed before.
            assert set(revoked.values()) == {(3, 3)}
            assert set(second.of("assign")[0]) <= set(revoked)
            assert len(revoked) == (1 if strategy else 2)
        assert not [entry for entry in second.entries if isinstance(entry, bytes)]
    for journal in (first, second):
        assert not journal.of("lost")
        taken = [key for places in journal.of("assign") for key in places]
        assert sorted(taken) == sorted(key for places in journal.of("revoke") for key in places)


@SYNC
def test_an_exception_in_a_rebalance_is_raised_and_the_hook_not_called_again(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t", partitions=2)
    send(embedded_kafka, "t", *numbered(3))
    first, second = Journal(), Journal()
    error = first.failing["revoke"] = RuntimeError("the hook's own")
    running = Live(group_server(embedded_kafka, "t", first.handle, **QUICK_GROUP, **first.hooks), mode)
    wait_until(lambda: b"2" in first.entries, "the records")
    with live(group_server(embedded_kafka, "t", second.handle, **QUICK_GROUP, **second.hooks), mode, wait=False):
        running.join()
        assert running.error is error
        assert len(first.of("revoke")) == 1
        wait_until(lambda: second.of("assign"), "the second goes on")
    assert not [entry for entry in second.entries if isinstance(entry, bytes)]


@EACH_PROTOCOL
def test_what_is_lost_is_told_as_lost(embedded_kafka: Any, mode: str, asynchronous: bool, strategy: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    journal = Journal(asynchronous)
    settings = quick(embedded_kafka, strategy, commit_interval_ms=60_000)
    server = group_server(embedded_kafka, "t", journal.handle, settings=settings, **SHORT_SESSION, **journal.hooks)
    with live(server, mode):
        wait_until(lambda: b"2" in journal.entries, "the records")
        embedded_kafka.push_errors("Heartbeat", [UNKNOWN_MEMBER_ID])
        wait_until(lambda: journal.entries.count(b"2") == 2, "the records come again")
    # Nothing could be committed when it was lost.
    assert journal.entries == [
        ("assign", {("t", 0): -1001}),
        *numbered(3),
        ("lost", {("t", 0): (3, -1)}),
        ("assign", {("t", 0): -1001}),
        *numbered(3),
        ("revoke", {("t", 0): (3, 3)}),
    ]


@pytest.mark.logs_errors
@pytest.mark.parametrize(("mode", "failing"), [("sync", False), ("async", True)])
def test_what_was_lost_before_the_end_is_told_as_lost_too(embedded_kafka: Any, mode: str, failing: bool) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"x")
    journal = Journal()
    if failing:
        journal.failing["lost"] = RuntimeError("the hook's own")

    def handle(message: bytes) -> None:
        # librdkafka's own thread hears of it while the handler runs.
        embedded_kafka.push_errors("Heartbeat", [UNKNOWN_MEMBER_ID])
        wait_until(lambda: server._session.consumer.assignment_lost, "the loss")  # type: ignore[union-attr]
        server.stop()

    settings = quick(embedded_kafka, commit_interval_ms=60_000)
    server = group_server(embedded_kafka, "t", handle, settings=settings, **SHORT_SESSION, **journal.hooks)
    running = Live(server, mode)
    running.join()
    assert [kind for kind, _ in journal.entries] == ["assign", "lost"]
    assert running.error is not None
    assert committed(embedded_kafka, CLIENT, "t") == {}


def test_an_async_hook_makes_a_server_of_sync_handlers_run_a_loop(embedded_kafka: Any) -> None:
    loops: list[Any] = []

    async def note(server: Any, partitions: list[Any]) -> None:
        loops.append(asyncio.get_running_loop())

    topics(embedded_kafka, "t")
    for name in ("on_assign", "on_revoke", "on_lost"):
        server = reading_server(embedded_kafka, "t", print, **{name: note})
        assert server.needs_loop()
    assert not reading_server(embedded_kafka, "t", print).needs_loop()
    reading_server(embedded_kafka, "t", print, on_assign=note, on_revoke=note).start_sync()
    assert len(set(loops)) == 1
    assert len(loops) == 2


@MODES
@pytest.mark.logs_errors
def test_after_a_fatal_error_the_partitions_are_lost(embedded_kafka: Any, mode: str) -> None:
    """As when a static member is fenced; it ends the server at once."""
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"x")
    journal = Journal()
    server = group_server(embedded_kafka, "t", journal.handle, settings=quick(embedded_kafka), **journal.hooks)
    running = Live(server, mode)
    wait_until(lambda: b"x" in journal.entries, "the record")
    server._session.consumer.trigger_fatal_error(82, "for the test")  # type: ignore[union-attr]
    running.join(10)
    assert isinstance(running.error, KafkaError)
    assert running.error.fatal
    assert running.error.name == "FENCED_INSTANCE_ID"
    assert "the consumer can't go on" in str(running.error)
    assert len(journal.of("lost")) == 1
    assert not journal.of("revoke")
