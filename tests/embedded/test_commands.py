"""Commands: dispatched to one handler, and told of by events of their own. What events do as well is tested there."""

import asyncio
import logging
from enum import Enum
from typing import Any

import msgspec
import pytest
from embedded_support import (
    MODES,
    committed,
    group_server,
    live,
    logged,
    quick,
    read,
    reading_server,
    run,
    send,
    topics,
    values,
    wait_until,
)

from keven_core.kafka.abstracts import EventHandler, event_handler
from keven_core.kafka.abstracts.command_handler import (
    CommandHandler,
    LongRunningCommandHandler,
    command_handler,
    long_running_command_handler,
)
from keven_core.kafka.abstracts.commandevent import CommandErrorEvent, CommandEvent
from keven_core.kafka.abstracts.commandreceiver_server import AllCommandsReceiverServer, CommandReceiverServer
from keven_core.kafka.commands import Command, CommandNames, CommandPhase, CommandRunner, GenericCommand
from keven_core.kafka.commands.server import setup_command_receiver, start_command_receiver_server
from keven_core.kafka.config import Settings
from keven_core.kafka.errors import RegistrationError, UsageError
from keven_core.kafka.events.event import Event, EventNames
from keven_core.kafka.kinds import COMMANDS
from keven_core.kafka.outcomes import BatchError, DeadLetter, Retry, Skip
from keven_core.testing import dispatch

TOPIC = "keven_commands_ship"
STARTED, ERRORED, COMPLETED = (f"keven_events_cmd_ship_{phase}" for phase in ("started", "errored", "completed"))


@pytest.fixture(autouse=True)
def ship(handler_registry: Any) -> Any:
    class Ship(Command):
        command_name = "SHIP"
        key_field = "order"
        order: int

    return Ship


def reports(result: Any) -> list[str]:
    """Names of the events that were published, in order."""
    return [msgspec.json.decode(message.value)["event_name"] for message in result.published]


def told(kafka: Any, phase: str) -> list[Any]:
    """The events of a phase that stand in their topic."""
    cls = Event.classes[f"CMD_SHIP_{phase}"]
    return [
        msgspec.json.decode(value or b"", type=cls) for value in values(kafka, f"keven_events_cmd_ship_{phase.lower()}")
    ]


# --- on Kafka --------------------------------------------------------------------------------------------------------


@pytest.fixture
def kafka(embedded_kafka: Any) -> Any:
    topics(embedded_kafka, TOPIC, "keven_commands", STARTED, ERRORED, COMPLETED)
    return embedded_kafka


@pytest.mark.logs_errors
@MODES
@pytest.mark.parametrize("is_async", [False, True])
def test_a_command_is_handled_and_reported(kafka: Any, ship: Any, mode: str, is_async: bool) -> None:
    handled: list[int] = []

    def handle(command: Any) -> None:
        assert type(command) is ship
        handled.append(command.order)
        if command.order == 2:
            raise ValueError("no such order")

    if is_async:

        @command_handler("SHIP")
        async def handle_async(command: Any) -> None:
            await asyncio.sleep(0)
            handle(command)

    else:
        command_handler("SHIP")(handle)

    commands = [ship(order=number, initiated_by_user_id=7, namespace="north") for number in (1, 2)]
    send(kafka, TOPIC, *(command.serialize() for command in commands))
    server = group_server(kafka, TOPIC, CommandRunner(), settings=quick(kafka, commit_interval_ms=30))
    with live(server, mode):
        wait_until(lambda: committed(kafka, "svc", TOPIC) == {0: 2}, "both are handled and their reports acknowledged")
    assert handled == [1, 2]
    assert server.totals() == {"received": 2, "done": 1, "dead": 1}
    (completed,) = (
        msgspec.json.decode(value, type=Event.classes["CMD_SHIP_COMPLETED"]) for value in values(kafka, COMPLETED)
    )
    assert (completed.source_command_uuid, completed.initiated_by_user_id) == (commands[0].uuid, 7)
    assert completed.namespace == "north"
    (errored,) = (
        msgspec.json.decode(value, type=Event.classes["CMD_SHIP_ERRORED"]) for value in values(kafka, ERRORED)
    )
    assert errored.source_command_uuid == commands[1].uuid
    assert (errored.error_message, errored.error_type) == ("no such order", "ValueError")
    assert len(values(kafka, STARTED)) == 2


@MODES
def test_the_common_topic_carries_commands_too(kafka: Any, ship: Any, mode: str) -> None:
    handled: list[Any] = []
    command_handler("SHIP")(lambda command: handled.append(command.order))
    send(kafka, "keven_commands", ship(order=1).serialize(), ship(order=2).serialize("msgpack"))
    server = reading_server(kafka, ["keven_commands"], CommandRunner())
    run(server, mode)
    assert handled == [1, 2]


@MODES
def test_an_all_commands_server_gets_commands_without_a_class(kafka: Any, ship: Any, mode: str) -> None:
    got: list[Any] = []
    send(kafka, "keven_commands", ship(order=1).serialize(), b'{"command_name":"OTHER","size":3}')
    server = reading_server(kafka, ["keven_commands"], [])
    server.runners = []
    receiver = AllCommandsReceiverServer(server, got.append)
    run(receiver.io_server, mode)
    assert [type(command) for command in got] == [ship, GenericCommand]
    assert (got[1].command_name, got[1].size, got[1].fields) == ("OTHER", 3, {"size": 3})


def test_a_server_that_is_not_started_is_returned(kafka: Any, ship: Any) -> None:
    handled: list[int] = []
    command_handler("SHIP")(lambda command: handled.append(command.order))
    send(kafka, TOPIC, ship(order=1).serialize())
    server = start_command_receiver_server(
        "svc", auto_start=False, settings=quick(kafka), use_group=False, start="earliest", until_end=True
    )
    assert isinstance(server, CommandReceiverServer)
    assert set(server.io_server.topics) == {"keven_commands", TOPIC}
    assert handled == []
    server.start_sync()
    assert handled == [1]


def test_the_topics_of_reports_are_made(embedded_kafka: Any, ship: Any) -> None:
    class Quiet(Command):
        command_name = "QUIET"
        auto_create_command_events = False

    command_handler("SHIP")(print)
    command_handler("QUIET")(print)
    plan = setup_command_receiver(server_name="svc", settings=quick(embedded_kafka)).io_server._plan()
    assert plan.written_topics == [STARTED, ERRORED, COMPLETED]


@MODES
def test_a_long_running_handler_gets_a_thread(kafka: Any, ship: Any, mode: str) -> None:
    import threading

    threads: list[Any] = []

    class Slow(LongRunningCommandHandler):
        command_name = "SHIP"

        def long_running_handle_command(self, command: Any) -> None:
            threads.append(threading.current_thread())

    send(kafka, TOPIC, ship(order=1).serialize())
    run(reading_server(kafka, [TOPIC], CommandRunner()), mode)
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


# --- reports ---------------------------------------------------------------------------------------------------------


def test_names_of_reports_come_with_the_command() -> None:
    assert EventNames.CMD_SHIP_STARTED == "CMD_SHIP_STARTED"  # type: ignore[attr-defined]
    assert EventNames("CMD_SHIP_ERRORED") is EventNames.CMD_SHIP_ERRORED  # type: ignore[attr-defined]
    assert EventNames["CMD_SHIP_COMPLETE"] is EventNames.CMD_SHIP_COMPLETED  # type: ignore[attr-defined]
    assert issubclass(Event.classes["CMD_SHIP_STARTED"], CommandEvent)
    assert issubclass(Event.classes["CMD_SHIP_ERRORED"], CommandErrorEvent)


def test_names_of_reports_come_with_a_handler_too() -> None:
    command_handler("PACK")(print)
    assert EventNames.CMD_PACK_STARTED in EventNames  # type: ignore[attr-defined]
    assert "CMD_PACK_COMPLETED" in Event.classes


def test_get_event_name(ship: Any) -> None:
    class Names(str, Enum):
        PACK = "PACK"

    assert ship.get_event_name(CommandPhase.COMPLETED) == "CMD_SHIP_COMPLETE"
    assert ship.get_event_name(CommandPhase.STARTED, old_name=False) == "CMD_SHIP_STARTED"
    assert Command.get_event_name(CommandPhase.ERRORED, Names.PACK) == "CMD_PACK_ERROR"
    assert Command.get_event_name("ERRORED", command_name="pack", old_name=False) == "CMD_PACK_ERRORED"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (None, ["STARTED", "COMPLETED"]),
        (Skip("old"), ["STARTED", "COMPLETED"]),
        (Retry(after=1), ["STARTED"]),
        (DeadLetter("bad"), ["STARTED", "ERRORED"]),
        (ValueError("bad"), ["STARTED", "ERRORED"]),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("style", ["raised", "returned", "async"])
def test_each_end_has_its_report(ship: Any, outcome: Any, told: list[str], style: str) -> None:
    if style == "returned" and isinstance(outcome, ValueError):
        pytest.skip("an exception that is returned is not an outcome")

    def handle(command: Any) -> Any:
        if outcome is None or style == "returned":
            return outcome
        raise outcome

    if style == "async":

        @command_handler("SHIP")
        async def handle_async(command: Any) -> Any:
            return handle(command)

    else:
        command_handler("SHIP")(handle)
    assert reports(dispatch(ship(order=1))) == [f"CMD_SHIP_{phase}" for phase in told]


def test_each_command_of_a_list_has_its_reports(ship: Any) -> None:
    @command_handler("SHIP", batch_size=10)
    def handle(commands: Any) -> Any:
        return [ValueError("no") if command.order == 2 else None for command in commands]

    assert reports(dispatch(ship(order=1))) == ["CMD_SHIP_STARTED", "CMD_SHIP_COMPLETED"]
    assert reports(dispatch(ship(order=2))) == ["CMD_SHIP_STARTED", "CMD_SHIP_ERRORED"]


@pytest.mark.logs_errors
def test_after_a_batch_error_what_stands_behind_comes_again(kafka: Any, ship: Any) -> None:
    tries: list[list[int]] = []

    @command_handler("SHIP", batch_size=3, batch_wait_ms=1000)
    def handle(commands: Any) -> None:
        tries.append([command.order for command in commands])
        if commands[0].order == 1:
            raise BatchError(1) from ValueError("no")

    send(kafka, TOPIC, *(ship(order=number).serialize() for number in (1, 2, 3)))
    with live(group_server(kafka, TOPIC, CommandRunner(), settings=quick(kafka, commit_interval_ms=30))):
        wait_until(lambda: committed(kafka, "svc", TOPIC) == {0: 3}, "all are accounted for")
    assert tries == [[1, 2, 3], [3]]
    assert len(values(kafka, COMPLETED)) == 2
    assert len(values(kafka, ERRORED)) == 1
    assert len(values(kafka, STARTED)) == 4


def test_no_reports_of_a_command_that_says_so() -> None:
    class Quiet(Command):
        command_name = "QUIET"
        auto_create_command_events = False

    command_handler("QUIET")(lambda command: None)
    assert reports(dispatch(Quiet())) == []


@pytest.mark.parametrize("name", ["CMD_SHIP_COMPLETE", "CMD_SHIP_COMPLETED"])
@pytest.mark.parametrize("wire_name", ["CMD_SHIP_COMPLETE", "CMD_SHIP_COMPLETED"])
@pytest.mark.parametrize("topic", ["keven_events", "own"])
@pytest.mark.parametrize("codec", [msgspec.json, msgspec.msgpack])
def test_both_spellings_reach_the_same_handlers(name: str, wire_name: str, topic: str, codec: Any) -> None:
    got: list[Any] = []
    EventHandler.register_function(name, got.append)
    topic = f"keven_events_{wire_name.lower()}" if topic == "own" else topic
    result = dispatch(codec.encode({"event_name": wire_name, "source_command_uuid": "u"}), topic=topic)
    assert (result.outcome, len(got)) == ("done", 1), result
    assert (got[0].event_name, got[0].source_command_uuid) == ("CMD_SHIP_COMPLETED", "u")


def test_a_handler_of_the_older_spelling_may_come_before_the_command() -> None:
    got: list[Any] = []
    event_handler("CMD_LATER_COMPLETE")(got.append)
    assert EventHandler.get_handler_count("CMD_LATER_COMPLETE") == 1

    class Later(Command):
        command_name = "LATER"

    assert EventHandler.events_with_handlers() == ["cmd_later_completed"]
    assert EventHandler.get_handler_count("CMD_LATER_COMPLETE") == 1
    dispatch(Event.classes["CMD_LATER_COMPLETED"](source_command_uuid="u"))
    assert [event.source_command_uuid for event in got] == ["u"]


@pytest.mark.parametrize("first", [False, True])
def test_a_services_own_class_is_used_for_a_report(first: bool) -> None:
    def own() -> Any:
        class Done(Event):
            event_name = "CMD_MOVE_COMPLETED"
            where: str = "there"

        return Done

    made = own() if first else None

    class Move(Command):
        command_name = "MOVE"

    made = made or own()
    assert Event.classes["CMD_MOVE_COMPLETED"] is made
    command_handler("MOVE")(lambda command: None)
    result = dispatch(Move())
    assert msgspec.json.decode(result.published[-1].value or b"")["where"] == "there"


def test_a_services_own_class_that_no_report_can_be_made_of_is_refused_before_a_command_is_handled() -> None:
    class Moved(Event):
        event_name = "CMD_MOVE_COMPLETED"
        where: str

    handled: list[Any] = []
    command_handler("MOVE")(handled.append)
    with pytest.raises(RegistrationError, match=r"Moved is made for each report of command MOVE.*'where'.*defaults"):
        CommandRunner().dispatch_table(Settings())
    assert handled == []


def test_a_handler_that_belongs_to_a_command_builds_its_events(ship: Any) -> None:
    class Handler(CommandHandler):
        command_name = "SHIP"

        def handle_command(self, command: Any) -> None:
            pass

    handler = Handler()
    with pytest.raises(UsageError, match=r"belongs to no command: command\.create_handler\(\) makes one"):
        handler.start_event()
    handler.command = ship(order=1)
    started, completed = handler.start_event(), handler.complete_event()
    assert (started.event_name, completed.event_name) == ("CMD_SHIP_STARTED", "CMD_SHIP_COMPLETED")
    old = handler.error_event(get_old_event=True, error=ValueError("no"))
    assert (old.event_name, old.error_message, old.source_command_uuid) == (
        "CMD_SHIP_ERROR",
        "no",
        handler.command.uuid,
    )
    assert msgspec.json.decode(old.serialize())["event_name"] == "CMD_SHIP_ERROR"


# --- one handler -----------------------------------------------------------------------------------------------------


def test_a_second_handler_is_called_with_a_warning(kafka: Any, ship: Any) -> None:
    handled: list[str] = []
    command_handler("SHIP")(lambda command: handled.append("first"))
    command_handler("SHIP")(lambda command: handled.append("second"))
    send(kafka, TOPIC, ship(order=1).serialize())
    with logged() as lines:
        run(reading_server(kafka, [TOPIC], CommandRunner()), "sync")
    assert handled == ["first", "second"]
    (line,) = (line for line in lines if "handlers" in line)
    assert "command SHIP has 2 handlers" in line
    assert line.endswith("a command is done by one handler; all of them are called")


def test_a_second_handler_is_an_error_if_settings_are_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    command_handler("SHIP")(lambda command: None)
    command_handler("SHIP")(lambda command: None)
    monkeypatch.setenv("KEVEN_STRICT", "1")
    with pytest.raises(RegistrationError, match=r"SHIP has 2 handlers, .*KEVEN_STRICT is set"):
        CommandRunner().dispatch_table(Settings.from_env())


# --- registration ----------------------------------------------------------------------------------------------------


def test_events_and_commands_have_registries_of_their_own(ship: Any) -> None:
    class Both(CommandHandler):
        command_name = "SHIP"

        def handle_command(self, command: Any) -> None:
            pass

    event_handler("SHIP")(print)
    assert CommandHandler.get_handler_count("SHIP") == EventHandler.get_handler_count("SHIP") == 1
    assert CommandHandler.commands_with_handlers() == ["ship"]
    assert type(Both).get_command_registry() == {"SHIP": [Both]}
    assert type(Both).get_event_registry() == {"SHIP": [print]}


@pytest.mark.logs_errors
def test_an_exception_handler_is_shown_what_a_handler_raises(ship: Any, caplog: pytest.LogCaptureFixture) -> None:
    shown: list[Exception] = []

    def show(error: Exception) -> None:
        shown.append(error)
        raise RuntimeError("the tracker is away")

    @command_handler("SHIP", True, show)
    def handle(command: Any) -> None:
        raise Skip("no") if command.order == 2 else ValueError("bad")

    with caplog.at_level(logging.ERROR):
        result = dispatch(ship(order=1))
    assert (result.outcome, str(result.error)) == ("dead", "bad")
    assert [str(error) for error in shown] == ["bad"]
    assert "has failed itself" in caplog.text
    assert dispatch(ship(order=2)).outcome == "skipped"
    assert len(shown) == 1


def test_a_capture_exception_handler_of_a_class() -> None:
    shown: list[Exception] = []

    class Fails(EventHandler):
        event_name = "FAILS"
        capture_exception_handler = shown.append

        def handle_event(self, event: Any) -> None:
            raise ValueError("bad")

    assert dispatch(b'{"event_name":"FAILS"}').outcome == "dead"
    assert [str(error) for error in shown] == ["bad"]


@pytest.mark.parametrize("name", [CommandNames.PRINT_COMMAND, "PRINT_COMMAND"])
def test_names_are_strings_or_members(name: Any) -> None:
    long_running_command_handler(name)(print)
    (handler,) = COMMANDS.registry.handlers()
    assert (handler.name, handler.long_running) == ("PRINT_COMMAND", True)


def test_a_commands_topic_and_key(ship: Any, kafka: Any) -> None:
    from keven_core.kafka.logger import KafkaLogger

    with KafkaLogger(settings=quick(kafka, idempotence=False)) as log:
        log.log(ship(order=5))
    (stored,) = read(kafka, TOPIC)
    assert stored.key == b"5"
    assert msgspec.json.decode(stored.value or b"")["command_name"] == "SHIP"


def test_a_uuid_can_be_given(ship: Any) -> None:
    command = ship(order=1)
    command.set_uuid("u-1")
    assert (command.get_uuid(), command.uuid) == ("u-1", "u-1")
