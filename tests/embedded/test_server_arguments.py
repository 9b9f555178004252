"""Each argument of KafkaConsumerServer has its effect, in sync and async servers."""

import asyncio
import contextvars
import datetime
import logging
import threading
import time
from typing import Any

import pytest
from embedded_support import (
    CLIENT,
    DEAD,
    DEADLINE_S,
    MODES,
    Feeder,
    Live,
    Server,
    committed,
    event,
    group_server,
    live,
    numbered,
    quick,
    read,
    reading_server,
    run,
    send,
    topics,
    values,
    wait_until,
)

from keven_core.kafka.abstracts.consumer_server import PrintRunner, Runner
from keven_core.kafka.abstracts.event_handler import event_handler
from keven_core.kafka.config import Settings
from keven_core.kafka.errors import ClosedError, ConfigurationError, UsageError
from keven_core.kafka.events.event import Event
from keven_core.kafka.events.runner import EventRunner
from keven_core.kafka.record import current_record
from keven_core.testing import EmbeddedKafka

# A member that comes back waits for session_timeout - 1 s on the embedded broker.
REJOIN: dict[str, Any] = {"session_timeout": 2, "heartbeat_interval": 0.4}


# --- which topics, which broker, which names -------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("given", ["a", ["a", "b"]], ids=["str", "list"])
def test_topics_are_read_by_name(embedded_kafka: Any, mode: str, given: Any) -> None:
    topics(embedded_kafka, "a", "b", "c", partitions=2)
    for name in "abc":
        send(embedded_kafka, name, name.encode(), partition=1)
    got: list[bytes] = []
    run(reading_server(embedded_kafka, given, got.append), mode)
    assert sorted(got) == ([b"a"] if given == "a" else [b"a", b"b"])


@MODES
@pytest.mark.parametrize("use_group", [False, True])
def test_topics_are_read_by_pattern(embedded_kafka: Any, mode: str, use_group: bool) -> None:
    topics(embedded_kafka, "orders_eu", "orders_us", "other_orders_x")
    for name in ("orders_eu", "orders_us", "other_orders_x"):
        send(embedded_kafka, name, name.encode())
    got: list[bytes] = []
    run(reading_server(embedded_kafka, "^orders_.*", got.append, use_group=use_group), mode)
    assert sorted(got) == [b"orders_eu", b"orders_us"]


def test_topics_that_no_broker_would_take_are_refused(embedded_kafka: Any) -> None:
    for bad in ("with space", "^unclosed(", "", 5):
        with pytest.raises(ConfigurationError):
            Server([bad])
    with pytest.raises(ConfigurationError, match="no topics"):
        run(reading_server(embedded_kafka, [], print), "sync")


@MODES
@pytest.mark.parametrize(
    ("variable", "honor_env", "wanted"),
    [(True, True, "variable"), (True, False, "argument"), (False, True, "argument")],
    ids=["KAFKA wins", "honor_env=False", "no KAFKA"],
)
def test_the_broker_is_the_variable_then_the_argument(
    embedded_kafka: Any, monkeypatch: Any, mode: str, variable: bool, honor_env: bool, wanted: str
) -> None:
    with EmbeddedKafka() as other:
        for kafka, name in ((embedded_kafka, b"variable"), (other, b"argument")):
            topics(kafka, "t")
            send(kafka, "t", name)
        monkeypatch.setenv("KEVEN_CREATE_TOPICS", "false")
        monkeypatch.delenv("KAFKA", raising=False)
        if variable:
            monkeypatch.setenv("KAFKA", embedded_kafka.bootstrap_servers)
        got: list[bytes] = []
        server = reading_server(
            embedded_kafka,
            "t",
            got.append,
            settings=None,
            bootstrap_servers=other.bootstrap_servers,
            honor_env=honor_env,
        )
        run(server, mode)
        assert got == [wanted.encode()]


@MODES
@pytest.mark.logs_errors
def test_client_id_and_group_id_name_client_group_and_dead_letter_topic(embedded_kafka: Any, mode: str) -> None:
    embedded_kafka.create_topic("t")
    embedded_kafka.create_topic("kafka_server.me.dead")
    send(embedded_kafka, "t", b"bad")
    names: list[str] = []

    def handle(message: bytes) -> None:
        names.append(server._running().consumer.name)  # type: ignore[union-attr]
        raise ValueError

    server = group_server(embedded_kafka, "t", handle, client_id="me", group_id="ours", until_end=True)
    run(server, mode)
    assert names[0].startswith("me#consumer")
    assert values(embedded_kafka, "kafka_server.me.dead") == [b"bad"]
    assert committed(embedded_kafka, "ours", "t") == {0: 1}
    assert committed(embedded_kafka, "me", "t") == {}


def test_client_and_group_stand_in_for_each_other() -> None:
    assert Server("t", client_id="c").group_id == "c"
    assert Server("t", group_id="g").client_id == "g"


# --- runners ---------------------------------------------------------------------------------------------------------


class Collector(Runner):
    def __init__(self) -> None:
        self.got: list[Any] = []
        self.calls = self.got  # a test double may well have an attribute of this name

    def run(self, message: bytes, topic: str | None = None) -> None:
        self.got.append((message, topic))


class AsyncCollector(Collector):
    async def run(self, message: bytes, topic: str | None = None) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self.got.append((message, topic))


@MODES
@pytest.mark.parametrize("pass_topic_param", [False, True])
@pytest.mark.parametrize("kinds", ["object", "callable", "async object", "async callable", "several", "mixed"])
def test_every_runner_gets_every_message(embedded_kafka: Any, mode: str, pass_topic_param: bool, kinds: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(5))
    called: list[Any] = []

    def function(message: bytes, topic: str | None = None) -> None:
        called.append((message, topic))

    async def coroutine(message: bytes, topic: str | None = None) -> None:
        await asyncio.sleep(0)
        called.append((message, topic))

    collectors: dict[str, list[Any]] = {
        "object": [Collector()],
        "callable": [function],
        "async object": [AsyncCollector()],
        "async callable": [coroutine],
        "several": [Collector(), Collector(), function],
        "mixed": [Collector(), AsyncCollector(), coroutine],
    }
    runners = collectors[kinds]
    server = reading_server(embedded_kafka, "t", runners[:-1], pass_topic_param=pass_topic_param)
    server.add_runner(runners[-1])
    run(server, mode)
    wanted = [(value, "t" if pass_topic_param else None) for value in numbered(5)]
    for runner in runners:
        assert getattr(runner, "got", called) == wanted
    assert server.counts()["done"] == 5


@MODES
def test_a_runner_without_topic_parameter_is_called_without(embedded_kafka: Any, mode: str, capsys: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"printed")
    run(reading_server(embedded_kafka, "t", PrintRunner()), mode)
    run(reading_server(embedded_kafka, "t", PrintRunner(), pass_topic_param=True), mode)
    assert capsys.readouterr().out == "b'printed'\nt: b'printed'\n"


@MODES
@pytest.mark.logs_errors
def test_the_other_runners_run_when_one_raises(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"x")
    last = Collector()

    def failing(message: bytes) -> None:
        raise ValueError("first")

    server = reading_server(embedded_kafka, "t", [failing, last])
    run(server, mode)
    assert last.got == [(b"x", None)]
    assert server.counts()["dead"] == 1
    assert values(embedded_kafka, DEAD) == [b"x"]


@MODES
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("pass_topic_param", [False, True])
def test_an_event_runner_beside_another_runner(
    embedded_kafka: Any, handler_registry: Any, mode: str, is_async: bool, pass_topic_param: bool
) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", event("SEEN", number=1), event("UNSEEN"))
    seen: list[Any] = []
    if is_async:

        @event_handler("SEEN")
        async def handle_async(event: Any) -> None:
            await asyncio.sleep(0)
            seen.append(event.number)

    else:

        @event_handler("SEEN")
        def handle(event: Any) -> None:
            seen.append(event.number)

    other = Collector()
    server = reading_server(embedded_kafka, "t", [EventRunner(), other], pass_topic_param=pass_topic_param)
    run(server, mode)
    assert (seen, len(other.got)) == ([1], 2)
    assert server.counts()["dead"] == 0


def test_a_server_without_runner_does_not_start(embedded_kafka: Any) -> None:
    with pytest.raises(ConfigurationError, match="no runner"):
        run(reading_server(embedded_kafka, "t", []), "sync")


# --- what happens to offsets and failures ----------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("no_commit", [False, True])
def test_no_commit_neither_stores_nor_commits(embedded_kafka: Any, mode: str, no_commit: bool) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    got: list[bytes] = []
    run(group_server(embedded_kafka, "t", got.append, no_commit=no_commit, until_end=True), mode)
    assert got == numbered(3)
    assert committed(embedded_kafka, CLIENT, "t") == ({} if no_commit else {0: 3})


@MODES
def test_timeout_ends_a_server_that_gets_nothing(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"only")
    times: list[float] = []
    server = group_server(embedded_kafka, "t", lambda message: times.append(time.monotonic()), timeout=0.4)
    run(server, mode)
    assert len(times) == 1
    assert time.monotonic() - times[0] >= 0.4
    assert committed(embedded_kafka, CLIENT, "t") == {0: 1}


@MODES
def test_without_timeout_an_idle_server_goes_on(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    got: list[bytes] = []
    with live(reading_server(embedded_kafka, "t", got.append, until_end=False), mode) as running:
        idle_until = time.monotonic() + 0.8
        wait_until(lambda: running.ended or time.monotonic() > idle_until, "the time is over")
        assert not running.ended
        send(embedded_kafka, "t", b"late")
        wait_until(lambda: got, "the record")


@MODES
@pytest.mark.logs_errors
def test_reraise_exceptions_ends_the_server_after_the_record_was_accounted(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(5))
    got: list[bytes] = []

    def handle(message: bytes) -> None:
        got.append(message)
        if message == b"2":
            raise LookupError("no such thing")

    server = group_server(embedded_kafka, "t", handle, reraise_exceptions=True)
    with pytest.raises(LookupError, match="no such thing"):
        run(server, mode)
    assert got == numbered(3)
    assert values(embedded_kafka, DEAD) == [b"2"]
    assert committed(embedded_kafka, CLIENT, "t") == {0: 3}
    assert (server.counts()["done"], server.counts()["dead"]) == (2, 1)


@pytest.mark.logs_errors
def test_reraise_exceptions_holds_for_async_handlers(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))

    async def handle(message: bytes) -> None:
        await asyncio.sleep(0)
        raise LookupError("no such thing")

    server = group_server(embedded_kafka, "t", handle, reraise_exceptions=True)
    with pytest.raises(LookupError):
        run(server, "async")
    assert committed(embedded_kafka, CLIENT, "t") == {0: 1}
    assert values(embedded_kafka, DEAD) == [b"0"]


@MODES
@pytest.mark.logs_errors
def test_reraise_exceptions_does_not_end_the_server_over_bad_data(
    embedded_kafka: Any, handler_registry: Any, mode: str
) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"{not json", event("GOOD"))
    got: list[Any] = []
    event_handler("GOOD")(got.append)
    server = reading_server(embedded_kafka, "t", reraise_exceptions=True)
    run(server, mode)
    assert len(got) == 1
    assert values(embedded_kafka, DEAD) == [b"{not json"]


@MODES
@pytest.mark.logs_errors
@pytest.mark.parametrize("log_exceptions", [True, False])
def test_log_exceptions_decides_on_the_log_not_on_the_dead_letter(
    embedded_kafka: Any, handler_registry: Any, caplog: Any, mode: str, log_exceptions: bool
) -> None:
    class Shipped(Event):
        event_name = "SHIPPED"

    @event_handler("SHIPPED")
    def handle(event: Any) -> None:
        raise LookupError("no such parcel")

    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", event("SHIPPED"))
    run(reading_server(embedded_kafka, "t", log_exceptions=log_exceptions), mode)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(lines) == (1 if log_exceptions else 0)
    for part in ("t [0] @ 0", "SHIPPED", "no such parcel", "Traceback", "in handle", DEAD):
        assert not log_exceptions or part in lines[0]
    assert values(embedded_kafka, DEAD) == [event("SHIPPED")]


@MODES
def test_group_timings_become_librdkafka_properties_that_it_takes(
    embedded_kafka: Any, monkeypatch: Any, mode: str
) -> None:
    given: list[dict[str, str]] = []
    original = Settings.consumer_options

    def spy(self: Settings, *args: Any, **kwargs: Any) -> dict[str, str]:
        given.append(original(self, *args, **kwargs))
        return given[-1]

    monkeypatch.setattr(Settings, "consumer_options", spy)
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"x")
    got: list[bytes] = []
    server = group_server(
        embedded_kafka,
        "t",
        got.append,
        max_poll_interval=45,
        session_timeout=7.5,
        heartbeat_interval=1.5,
        until_end=True,
    )
    run(server, mode)
    assert got == [b"x"]
    wanted = {"max.poll.interval.ms": "45000", "session.timeout.ms": "7500", "heartbeat.interval.ms": "1500"}
    assert wanted.items() <= given[0].items()


def test_group_timings_are_left_out_under_the_new_protocol() -> None:
    settings = Settings(rdkafka_options={"group.protocol": "consumer"})
    options = settings.consumer_options(
        "host:1",
        "c",
        "g",
        max_poll_interval_s=180,
        session_timeout_s=6,
        heartbeat_interval_s=2,
        commit=True,
        partition_eof=False,
    )
    assert not {"session.timeout.ms", "heartbeat.interval.ms"} & options.keys()
    assert options["max.poll.interval.ms"] == "180000"


def test_group_timings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="heartbeat_interval"):
        Server("t", session_timeout=2, heartbeat_interval=2)
    with pytest.raises(ConfigurationError, match=r"max\.poll\.interval|max_poll_interval"):
        # Also what only librdkafka can tell is found before anything connects.
        run(Server("t", runners=[print], settings=Settings(), max_poll_interval=1, session_timeout=6), "sync")


def test_heartbeats_are_sent_as_often_as_asked(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    embedded_kafka.requests()
    with live(group_server(embedded_kafka, "t", print, heartbeat_interval=0.05)):
        wait_until(lambda: embedded_kafka.requests().get("Heartbeat", 0) > 5, "heartbeats", 8)


@MODES
@pytest.mark.parametrize("use_group", [True, False])
def test_on_assign_topics_sees_and_moves_the_start(embedded_kafka: Any, mode: str, use_group: bool) -> None:
    topics(embedded_kafka, "t", partitions=2)
    send(embedded_kafka, "t", *numbered(10))
    send(embedded_kafka, "t", b"other", partition=1)
    got: list[bytes] = []
    seen: list[Any] = []

    def on_assign(given_server: Any, partitions: list[Any]) -> None:
        seen.append((given_server, [(entry.topic, entry.partition) for entry in partitions]))
        for entry in partitions:
            if entry.partition == 0:
                entry.offset = 7

    server = reading_server(embedded_kafka, "t", got.append, use_group=use_group, on_assign_topics=on_assign)
    run(server, mode)
    assert seen == [(server, [("t", 0), ("t", 1)])]
    assert sorted(got) == [b"7", b"8", b"9", b"other"]


@MODES
@pytest.mark.logs_errors
def test_without_committed_offsets_nothing_is_retried(embedded_kafka: Any, caplog: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"x")

    def failing(message: bytes) -> None:
        raise ValueError

    run(reading_server(embedded_kafka, "t", failing, auto_reprocess_errors=True), mode)
    assert values(embedded_kafka, DEAD) == [b"x"]
    assert "svc commits no offsets, so failed records are not retried" in caplog.text


@pytest.mark.parametrize(
    "given", [{"max_retries": 5}, {"retry_interval": 1}, {"retry_detail": {"t": {"max_retries": 1}}}], ids=str
)
def test_retries_without_auto_reprocess_errors_are_warned_about(embedded_kafka: Any, caplog: Any, given: Any) -> None:
    topics(embedded_kafka, "t")
    for more in (given, {**given, "auto_reprocess_errors": True}, {}):
        caplog.clear()
        run(reading_server(embedded_kafka, "t", print, **more), "sync")
        warned = "mean nothing without auto_reprocess_errors=True: what fails is dead-lettered at once" in caplog.text
        assert warned == (more is given)


# --- where to start, when to end -------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("use_group", [True, False])
def test_start_earliest_reads_from_the_beginning_also_what_is_committed(
    embedded_kafka: Any, mode: str, use_group: bool
) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(4))
    run(group_server(embedded_kafka, "t", lambda message: None, until_end=True, **REJOIN), mode)
    assert committed(embedded_kafka, CLIENT, "t") == {0: 4}
    got: list[bytes] = []
    run(reading_server(embedded_kafka, "t", got.append, use_group=use_group, **REJOIN), mode)
    assert got == numbered(4)


@MODES
def test_start_stored_goes_on_where_the_group_was(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(4))
    got: list[bytes] = []
    server = group_server(embedded_kafka, "t", got.append, until_end=True, **REJOIN)
    run(server, mode)
    send(embedded_kafka, "t", b"new")
    run(server, mode)  # a server may be run again
    assert got == [*numbered(4), b"new"]


@pytest.mark.parametrize("reset", ["earliest", "latest"])
def test_start_stored_without_a_group_means_what_a_new_group_gets(embedded_kafka: Any, reset: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(4))
    got: list[bytes] = []
    settings = quick(embedded_kafka, auto_offset_reset=reset)
    run(reading_server(embedded_kafka, "t", got.append, start="stored", settings=settings), "sync")
    assert got == ([] if reset == "latest" else numbered(4))


@MODES
@pytest.mark.parametrize("use_group", [True, False])
def test_start_latest_reads_only_what_comes(embedded_kafka: Any, mode: str, use_group: bool) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(4))
    got: list[bytes] = []
    server = reading_server(embedded_kafka, "t", got.append, start="latest", use_group=use_group, until_end=False)
    with live(server, mode), Feeder(embedded_kafka) as feeder:

        def arrives() -> bool:
            # The end is looked up after the assignment, so the first ones may come before it.
            feeder.send("t", b"new")
            feeder.wait()
            return bool(got)

        wait_until(arrives, "a new record")
    assert set(got) == {b"new"}


@MODES
def test_start_at_a_time_asks_the_broker_for_the_offset(embedded_kafka: Any, mode: str) -> None:
    # The embedded broker answers every time with the end; tests/integration has the times.
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(4))
    embedded_kafka.requests()
    got: list[bytes] = []
    now = datetime.datetime.now(datetime.timezone.utc)
    run(reading_server(embedded_kafka, "t", got.append, start=now), mode)
    assert got == []
    assert embedded_kafka.requests()["ListOffsets"] >= 2  # by time, and the end


@MODES
@pytest.mark.parametrize("use_group", [True, False])
def test_start_at_given_offsets(embedded_kafka: Any, mode: str, use_group: bool) -> None:
    topics(embedded_kafka, "t", partitions=2)
    send(embedded_kafka, "t", *numbered(4))
    send(embedded_kafka, "t", *numbered(2, start=100), partition=1)
    got: list[bytes] = []
    run(reading_server(embedded_kafka, "t", got.append, start={("t", 0): 3}, use_group=use_group), mode)
    # A partition that is not in the mapping starts where it would have.
    assert sorted(got) == [b"100", b"101", b"3"]


@pytest.mark.parametrize(
    "start", ["beginning", datetime.datetime(2024, 1, 1), {("t", 0): -5}, {"t": 1}, 5, None], ids=repr
)
def test_start_positions_that_mean_nothing_are_refused(start: Any) -> None:
    with pytest.raises(ConfigurationError, match="start="):
        Server("t", start=start)


@MODES
@pytest.mark.parametrize("use_group", [True, False])
def test_until_end_means_the_end_as_it_was_at_the_start(embedded_kafka: Any, mode: str, use_group: bool) -> None:
    topics(embedded_kafka, "t", "empty", partitions=2)
    send(embedded_kafka, "t", *numbered(5))
    got: list[bytes] = []
    with Feeder(embedded_kafka) as feeder:

        def handle(message: bytes) -> None:
            got.append(message)
            feeder.send("t", b"later")
            feeder.wait()

        server = reading_server(embedded_kafka, ["t", "empty"], handle, use_group=use_group)
        run(server, mode)
    assert got == numbered(5)
    assert server.counts()["received"] == 5
    if use_group:
        assert committed(embedded_kafka, CLIENT, "t") == {0: 5}


@MODES
def test_until_end_of_what_is_done_ends_at_once(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    run(reading_server(embedded_kafka, "t", lambda message: None), mode)  # empty
    send(embedded_kafka, "t", *numbered(3))
    got: list[bytes] = []
    for _ in range(2):  # the second time everything is committed
        run(group_server(embedded_kafka, "t", got.append, until_end=True, **REJOIN), mode)
    assert got == numbered(3)


@MODES
def test_without_a_group_nothing_is_joined_and_nothing_committed(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t", partitions=3)
    for partition in range(3):
        send(embedded_kafka, "t", b"x", partition=partition)
    embedded_kafka.requests()
    got: list[bytes] = []
    run(reading_server(embedded_kafka, "t", got.append), mode)
    assert len(got) == 3
    assert not {"JoinGroup", "OffsetCommit"} & embedded_kafka.requests().keys()
    assert committed(embedded_kafka, CLIENT, "t") == {}


# --- hooks of the run ------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("is_async", [False, True])
def test_on_start_and_on_stop_run_in_order_around_the_handlers(embedded_kafka: Any, mode: str, is_async: bool) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"x")
    steps: list[str] = []

    def hook(name: str) -> Any:
        def call() -> None:
            steps.append(name)

        async def call_async() -> None:
            await asyncio.sleep(0)
            steps.append(name)

        return call_async if is_async else call

    server = reading_server(
        embedded_kafka,
        "t",
        lambda message: steps.append("record"),
        on_start=[hook("start 1"), hook("start 2")],
        on_stop=[hook("stop 1"), hook("stop 2")],
    )
    run(server, mode)
    assert steps == ["start 1", "start 2", "record", "stop 1", "stop 2"]


@MODES
@pytest.mark.logs_errors
def test_on_stop_runs_after_a_failure_too(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"x")
    steps: list[str] = []

    def failing(message: bytes) -> None:
        raise LookupError("the handler")

    server = reading_server(
        embedded_kafka, "t", failing, reraise_exceptions=True, on_stop=lambda: steps.append("stopped")
    )
    with pytest.raises(LookupError, match="the handler"):
        run(server, mode)
    assert steps == ["stopped"]


@MODES
def test_a_failing_on_start_keeps_the_server_from_starting(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"x")
    got: list[bytes] = []

    def failing() -> None:
        raise LookupError("no database")

    server = reading_server(embedded_kafka, "t", got.append, on_start=failing)
    with pytest.raises(LookupError, match="no database"):
        run(server, mode)
    assert got == []


@MODES
@pytest.mark.parametrize("handler_is_async", [False, True])
@pytest.mark.parametrize("hook_is_async", [False, True])
def test_what_on_start_sets_is_seen_by_every_handler(
    embedded_kafka: Any, mode: str, handler_is_async: bool, hook_is_async: bool
) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(3))
    seen: list[str] = []

    def start() -> None:
        variable.set("set")

    async def start_async() -> None:
        variable.set("set")

    def handle(message: bytes) -> None:
        seen.append(variable.get())

    async def handle_async(message: bytes) -> None:
        await asyncio.sleep(0)
        seen.append(variable.get())

    server = reading_server(
        embedded_kafka,
        "t",
        handle_async if handler_is_async else handle,
        on_start=start_async if hook_is_async else start,
        on_stop=lambda: seen.append(variable.get()),
    )
    contextvars.copy_context().run(run, server, mode)
    assert seen == ["set"] * 4


# --- embedding: stop, with, two servers, from other threads ----------------------------------------------------------


@MODES
@pytest.mark.parametrize("name", ["stop", "terminate"])
def test_stop_from_another_thread_ends_in_order(embedded_kafka: Any, mode: str, name: str) -> None:
    topics(embedded_kafka, "t")
    got: list[bytes] = []
    server = group_server(embedded_kafka, "t", got.append)
    running = Live(server, mode)
    wait_until(server.ready, "the assignment")
    send(embedded_kafka, "t", *numbered(3))
    wait_until(lambda: len(got) == 3, "the records")
    started = time.monotonic()
    getattr(server, name)()
    running.join()
    assert running.error is None
    assert time.monotonic() - started < 5
    assert committed(embedded_kafka, CLIENT, "t") == {0: 3}


@MODES
def test_stop_from_a_handler_finishes_the_batch_in_hand(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", *numbered(10))
    got: list[bytes] = []

    def handle(message: bytes) -> None:
        got.append(message)
        server.stop()

    server = group_server(embedded_kafka, "t", handle)
    run(server, mode)
    assert got == numbered(len(got))
    assert committed(embedded_kafka, CLIENT, "t") == {0: len(got)}


@MODES
def test_stop_before_the_start_ends_the_run_at_once(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    server = group_server(embedded_kafka, "t", print)
    server.stop()
    run(server, mode)


@MODES
@pytest.mark.logs_errors
def test_stop_while_the_broker_cannot_be_reached(caplog: Any, mode: str) -> None:
    caplog.set_level(logging.WARNING, "keven_core")
    with EmbeddedKafka() as kafka:
        address = kafka.bootstrap_servers  # nobody listens there any more
    server = Server("t", runners=[print], settings=Settings(kafka_address=address), client_id=CLIENT)
    running = Live(server, mode)
    wait_until(lambda: any("can't be reached" in record.getMessage() for record in caplog.records), "the warning")
    assert address in next(text for text in caplog.messages if "can't be reached" in text)
    started = time.monotonic()
    server.stop()
    running.join()
    assert running.error is None
    assert time.monotonic() - started < 5


def test_with_runs_the_server_in_a_thread(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    threads: list[threading.Thread] = []
    server = group_server(embedded_kafka, "t", lambda message: threads.append(threading.current_thread()))
    with server as entered:
        assert entered is server
        send(embedded_kafka, "t", b"x")
        wait_until(lambda: threads, "the record")
        with pytest.raises(UsageError, match="already running"):
            server.__enter__()
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()
    assert committed(embedded_kafka, CLIENT, "t") == {0: 1}
    with pytest.raises(ClosedError):
        server.assignment()


@pytest.mark.logs_errors
def test_with_raises_what_ended_the_server(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"x")
    failed = threading.Event()

    def failing(message: bytes) -> None:
        failed.set()
        raise LookupError("the handler")

    options: dict[str, Any] = {"reraise_exceptions": True, "until_end": False}
    with pytest.raises(LookupError, match="the handler"):
        with reading_server(embedded_kafka, "t", failing, **options):
            assert failed.wait(DEADLINE_S)
    with pytest.raises(KeyError, match="the body"):
        with reading_server(embedded_kafka, "t", failing, **options):
            raise KeyError("the body")


def test_async_with_runs_the_server_in_a_task(embedded_kafka: Any) -> None:
    import uvloop

    topics(embedded_kafka, "t")
    got: list[Any] = []

    async def body() -> None:
        arrived = asyncio.Event()

        async def handle(message: bytes) -> None:
            got.append((message, asyncio.get_running_loop()))
            arrived.set()

        server = group_server(embedded_kafka, "t", handle)
        async with server as entered:
            assert entered is server
            await asyncio.get_running_loop().run_in_executor(None, send, embedded_kafka, "t", b"x")
            await asyncio.wait_for(arrived.wait(), DEADLINE_S)
            assert got == [(b"x", asyncio.get_running_loop())]
            with pytest.raises(UsageError, match="already running"):
                await server.__aenter__()

    uvloop.run(body())
    assert committed(embedded_kafka, CLIENT, "t") == {0: 1}


@pytest.mark.logs_errors
def test_async_with_raises_what_ended_the_server(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", b"x")

    async def body(raising: bool) -> None:
        failed = asyncio.Event()

        async def failing(message: bytes) -> None:
            failed.set()
            raise LookupError("the handler")

        async with reading_server(embedded_kafka, "t", failing, reraise_exceptions=True, until_end=False):
            if raising:
                raise KeyError("the body")
            await asyncio.wait_for(failed.wait(), DEADLINE_S)

    with pytest.raises(LookupError, match="the handler"):
        asyncio.run(body(False))
    with pytest.raises(KeyError, match="the body"):
        asyncio.run(body(True))


def test_a_server_runs_once_at_a_time(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "t")
    server = group_server(embedded_kafka, "t", print)
    with live(server):
        with pytest.raises(UsageError, match="already running"):
            server.start_sync()


@MODES
def test_two_servers_in_one_process(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "a", "b")
    got: dict[str, list[Any]] = {"a": [], "b": []}
    servers = [
        group_server(
            embedded_kafka,
            name,
            lambda message, name=name: got[name].append((message, current_record().topic)),
            client_id=f"client-{name}",
        )
        for name in "ab"
    ]
    with live(servers[0], mode), live(servers[1], mode):
        for name in "ab":
            send(embedded_kafka, name, *numbered(20))
        wait_until(lambda: all(len(found) == 20 for found in got.values()), "all records")
    for name in "ab":
        assert got[name] == [(value, name) for value in numbered(20)]
        assert committed(embedded_kafka, f"client-{name}", name) == {0: 20}


def test_two_async_servers_in_one_loop(embedded_kafka: Any) -> None:
    topics(embedded_kafka, "a", "b")
    got: list[Any] = []
    for name in "ab":
        send(embedded_kafka, name, *numbered(300))

    async def both() -> None:
        arrived = {name: asyncio.Event() for name in "ab"}

        async def handle(message: bytes) -> None:
            topic = current_record().topic
            arrived[topic].set()
            # Neither gets beyond its first record while the other has none.
            await asyncio.wait_for(arrived["b" if topic == "a" else "a"].wait(), 20)
            got.append((topic, message))

        await asyncio.gather(
            *(reading_server(embedded_kafka, name, handle, client_id=name).run_server() for name in "ab")
        )

    asyncio.run(both())
    for name in "ab":
        assert [message for topic, message in got if topic == name] == numbered(300)


def test_handlers_cannot_be_registered_while_a_server_runs(embedded_kafka: Any, handler_registry: Any) -> None:
    from keven_core.kafka.errors import RegistrationError

    topics(embedded_kafka, "t")
    event_handler("EARLY")(lambda event: None)
    with live(group_server(embedded_kafka, "t")):

        def late_handler(event: Any) -> None: ...

        with pytest.raises(RegistrationError, match="late_handler"):
            event_handler("LATE")(late_handler)
    event_handler("AFTERWARDS")(lambda event: None)


@MODES
def test_partitions_are_paused_and_resumed_from_another_thread(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t", partitions=2)
    got: list[Any] = []
    server = group_server(embedded_kafka, "t", lambda message: got.append((current_record().partition, message)))
    with live(server, mode), Feeder(embedded_kafka) as feeder:
        assert sorted(server.assignment()) == [("t", 0), ("t", 1)]
        server.pause([("t", 0)])
        for number in numbered(50):
            feeder.send("t", number, 0)
            feeder.send("t", number, 1)
        feeder.wait()
        wait_until(lambda: len(got) == 50, "the partition that runs")
        # What is fetched after the other partition's last record: nothing of the paused one was among it.
        feeder.send("t", b"last", 1)
        wait_until(lambda: got[-1] == (1, b"last"), "the last of it")
        assert {partition for partition, _ in got} == {1}
        server.resume([("t", 0)])
        wait_until(lambda: len(got) == 101, "the partition that was paused")
    assert [message for partition, message in got if partition == 0] == numbered(50)
    assert committed(embedded_kafka, CLIENT, "t") == {0: 50, 1: 51}


@MODES
def test_position_stored_and_committed_can_be_read_from_another_thread(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t", partitions=2)
    got: list[bytes] = []
    settings = quick(embedded_kafka, commit_interval_ms=50)
    server = group_server(embedded_kafka, "t", got.append, settings=settings)
    with live(server, mode):
        assert server.position() == {("t", 0): -1, ("t", 1): -1}
        send(embedded_kafka, "t", *numbered(5), partition=1)
        wait_until(lambda: server.position()["t", 1] == 5, "the position")
        wait_until(lambda: server.committed()["t", 1] == 5, "the background commit")
        assert committed(embedded_kafka, CLIENT, "t") == {1: 5}
        assert server.ledger()["t", 1]["done"] == 5


@MODES
def test_seek_from_another_thread_goes_back_and_forth(embedded_kafka: Any, mode: str) -> None:
    topics(embedded_kafka, "t")
    got: list[bytes] = []
    server = group_server(embedded_kafka, "t", got.append)
    with live(server, mode):
        send(embedded_kafka, "t", *numbered(10))
        wait_until(lambda: len(got) == 10, "the records")
        server.seek("t", 0, 4)
        wait_until(lambda: len(got) == 16, "the records again")
        server.pause([("t", 0)])
        send(embedded_kafka, "t", *numbered(4, start=10))
        server.seek("t", 0, 12)
        server.resume([("t", 0)])
        wait_until(lambda: len(got) == 18, "the records after the gap")
        assert server.position() == {("t", 0): 14}
    assert got == [*numbered(10), *numbered(6, start=4), b"12", b"13"]
    assert committed(embedded_kafka, CLIENT, "t") == {0: 14}


@MODES
def test_unknown_partitions_are_refused_in_the_callers_thread(embedded_kafka: Any, mode: str) -> None:
    from keven_core.kafka.errors import KafkaError

    topics(embedded_kafka, "t")
    got: list[bytes] = []
    with live(group_server(embedded_kafka, "t", got.append), mode) as running:
        with pytest.raises(KafkaError, match="nowhere"):
            running.server.seek("nowhere", 0, 5)
        with pytest.raises(KafkaError, match="nowhere"):
            running.server.pause([("nowhere", 0)])
        send(embedded_kafka, "t", b"x")
        wait_until(lambda: got, "the server goes on")
    for call in (running.server.assignment, running.server.position, lambda: running.server.seek("t", 0, 1)):
        with pytest.raises(ClosedError):
            call()


def test_what_stands_in_a_topic_is_what_was_sent(embedded_kafka: Any) -> None:
    """The reader of these tests is itself right."""
    topics(embedded_kafka, "t")
    send(embedded_kafka, "t", None, b"", b"x")
    assert [entry.value for entry in read(embedded_kafka, "t")] == [None, b"", b"x"]
