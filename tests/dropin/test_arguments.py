"""What arguments of the original's interface do, where no other test shows it; shown_by.json tells which one does."""

import asyncio
import contextvars
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from envelopes import envelope_class

from keven_core.kafka import publishing
from keven_core.kafka.abstracts import MessagePublisher
from keven_core.kafka.abstracts.command_handler import (
    CommandHandler,
    LongRunningCommandHandler,
    command_handler,
    long_running_command_handler,
)
from keven_core.kafka.abstracts.commandreceiver_server import AllCommandsReceiverServer, CommandReceiverServer
from keven_core.kafka.abstracts.consumer_server import KafkaConsumerServer
from keven_core.kafka.abstracts.event_handler import (
    EventHandler,
    LongRunningEventHandler,
    long_running_event_handler,
)
from keven_core.kafka.abstracts.eventreceiver_server import AllEventsReceiverServer, EventReceiverServer
from keven_core.kafka.abstracts.message import Message
from keven_core.kafka.abstracts.message_server import MessageReceiverServer
from keven_core.kafka.commands import (
    Command,
    CommandNames,
    CommandPublisher,
    CommandRunner,
    GenericCommand,
    PickledCommand,
    clear_command_publishers,
    dont_send_commands_on_commit,
    keven_dispatch_command,
    keven_dispatch_command_now,
    keven_flush_command_cache,
    last_publisher,
    send_commands_on_commit,
    set_publisher,
)
from keven_core.kafka.commands import server as commands_server
from keven_core.kafka.details import BasicDetail
from keven_core.kafka.errors import UsageError
from keven_core.kafka.events import server as events_server
from keven_core.kafka.events.event import Event, EventNames, PickledEvent
from keven_core.kafka.events.logger import keven_log_event, keven_set_publisher
from keven_core.kafka.events.publisher import EventPublisher
from keven_core.kafka.events.runner import EventRunner
from keven_core.kafka.kinds import COMMANDS, EVENTS
from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger
from keven_core.kafka.publishing import outbox
from keven_core.testing import dispatch

pytestmark = pytest.mark.usefixtures("handler_registry")

EVENT, OTHER_EVENT = b'{"event_name":"ONE"}', b'{"event_name":"TWO"}'
COMMAND, OTHER_COMMAND = b'{"command_name":"ONE"}', b'{"command_name":"TWO"}'


class Replay:
    """An io_server of a service's own: hands over what it was given, and nothing more."""

    client_id = "replay"

    def __init__(self, *messages: bytes) -> None:
        self.messages = messages
        self.runners: list[Any] = []

    def add_runner(self, runner: Any) -> None:
        self.runners.append(runner)

    async def run_server(self) -> None:
        for message in self.messages:
            for runner in self.runners:
                result = runner.run(message)
                if inspect.isawaitable(result):
                    await result


class Kept:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.got: list[tuple[str | None, Any]] = []

    def log(self, data: bytes, topic: str | None = None) -> None:
        fields = msgspec.json.decode(data)
        self.got.append((topic, fields.get("number")))


@pytest.fixture
def numbered() -> Any:
    """An event and a command, each with a number."""

    class Raised(Event):
        event_name = "RAISED"
        number: int = 0

    class Ordered(Command):
        command_name = "ORDERED"
        auto_create_command_events = False
        number: int = 0

    return Raised, Ordered


@pytest.fixture
def kept() -> Iterator[Kept]:
    """What is published in this test."""
    logger = Kept()
    context = contextvars.copy_context()
    keven_set_publisher(EventPublisher(logger))
    set_publisher(CommandPublisher(logger))
    yield logger
    keven_set_publisher(None)
    set_publisher(None)
    publishing._place.set(context.get(publishing._place))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[KafkaConsumerServer]:
    """The consumers that were started, none of which has looked for a broker."""
    servers: list[KafkaConsumerServer] = []

    async def run_server(self: KafkaConsumerServer) -> None:
        servers.append(self)

    monkeypatch.setattr(KafkaConsumerServer, "start_sync", lambda self: servers.append(self))
    monkeypatch.setattr(KafkaConsumerServer, "run_server", run_server)
    return servers


def finished(result: Any) -> Any:
    """What a launcher has returned; the end of its run if that is a coroutine, or a server that was not started."""
    if inspect.iscoroutine(result):
        return asyncio.run(result)
    if isinstance(result, MessageReceiverServer):
        result.start_sync()
    return result


def setup_event_listener(server_name: str, io_server: Any = None, **options: Any) -> Any:
    """With the order of arguments that the launchers have."""
    return events_server.setup_event_listener(False, io_server, server_name, **options)


def setup_command_receiver(server_name: str, io_server: Any = None, **options: Any) -> Any:
    return commands_server.setup_command_receiver(False, io_server, server_name, **options)


def start_command_receiver_server(server_name: str, *arguments: Any, **options: Any) -> None:
    """Its result is a server that has run already."""
    commands_server.start_command_receiver_server(server_name, *arguments, **options)


EVENT_LAUNCHERS: list[Callable[..., Any]] = [
    setup_event_listener,
    events_server.start_events_receiver_server,
    events_server.start_events_receiver_server_async,
    events_server.start_all_events_receiver_server,
    events_server.start_all_events_receiver_server_async,
]
COMMAND_LAUNCHERS: list[Callable[..., Any]] = [
    setup_command_receiver,
    start_command_receiver_server,
    commands_server.start_command_receiver_server_async,
    commands_server.start_all_commands_receiver_server,
    commands_server.start_all_commands_receiver_server_async,
]


def by_name(launchers: list[Callable[..., Any]]) -> Any:
    return pytest.mark.parametrize("launcher", launchers, ids=lambda launcher: launcher.__name__)


# --- launchers -------------------------------------------------------------------------------------------------------


@by_name(EVENT_LAUNCHERS)
def test_event_launchers_run_an_io_server_of_the_services_own(launcher: Callable[..., Any]) -> None:
    got: list[str] = []
    EventHandler.register_function("ONE", lambda event: got.append(event.event_name))
    finished(launcher("svc", Replay(EVENT, OTHER_EVENT)))
    assert got == ["ONE"]


@by_name(COMMAND_LAUNCHERS)
def test_command_launchers_run_an_io_server_of_the_services_own(launcher: Callable[..., Any], kept: Kept) -> None:
    got: list[str] = []
    CommandHandler.register_function("ONE", lambda command: got.append(command.command_name))
    finished(launcher("svc", Replay(COMMAND, OTHER_COMMAND)))
    assert got == ["ONE"]


@by_name([*EVENT_LAUNCHERS, *COMMAND_LAUNCHERS])
def test_the_server_name_is_client_and_group(launcher: Callable[..., Any], started: list[KafkaConsumerServer]) -> None:
    finished(launcher("svc"))
    (server,) = started
    assert (server.client_id, server.group_id) == ("svc", "svc")


# Those of the original that take it, and what it is by default.
@by_name(
    [
        events_server.start_events_receiver_server,
        events_server.start_events_receiver_server_async,
        start_command_receiver_server,
        commands_server.start_command_receiver_server_async,
    ]
)
def test_launchers_pass_auto_reprocess_errors_on(
    launcher: Callable[..., Any], started: list[KafkaConsumerServer]
) -> None:
    finished(launcher("svc"))
    finished(launcher("svc", None, True))
    assert [bool(server._policies()) for server in started] == [False, True]


@by_name([start_command_receiver_server, commands_server.start_command_receiver_server_async])
def test_launchers_pass_max_poll_interval_on(launcher: Callable[..., Any], started: list[KafkaConsumerServer]) -> None:
    finished(launcher("svc"))
    finished(launcher("svc", None, False, 600))
    assert [server._plan().max_poll_interval_s for server in started] == [180, 600]


@by_name([events_server.start_all_events_receiver_server, events_server.start_all_events_receiver_server_async])
def test_include_audit_adds_the_audit_topic(launcher: Callable[..., Any], started: list[KafkaConsumerServer]) -> None:
    finished(launcher("svc"))
    finished(launcher("svc", None, True))
    everything = ["keven_events", "^keven_events_.*"]
    assert [server.topics for server in started] == [everything, [*everything, "keven_events.audit"]]


@pytest.mark.parametrize(
    ("setup", "topics"),
    [
        (events_server.setup_event_listener, ["keven_events", "keven_events.audit"]),
        (commands_server.setup_command_receiver, ["keven_commands", "keven_commands_one"]),
    ],
)
def test_what_setting_up_a_listener_passes_on(setup: Callable[..., Any], topics: list[str]) -> None:
    CommandHandler.register_function("ONE", print)
    usual, other = (
        setup(*arguments).io_server
        for arguments in [(False, None, "usual"), (True, None, "other", 0.5, True, False, ["own"])]
    )
    assert (usual.client_id, other.client_id) == ("usual", "other")
    assert (usual.topics, other.topics) == (topics, ["own"])
    assert [bool(server._policies()) for server in (usual, other)] == [False, True]
    plans = [server._plan() for server in (usual, other)]
    assert [plan.timeout_s for plan in plans] == [None, 0.5]
    assert [plan.reraise_exceptions for plan in plans] == [False, True]
    assert [plan.log_exceptions for plan in plans] == [True, False]


@pytest.mark.parametrize(
    ("call", "ignored"),
    [
        (lambda own: events_server.setup_event_listener(True, own, "svc", 5), "auto_reprocess_errors=True, timeout=5"),
        (lambda own: events_server.start_events_receiver_server("svc", own, topics=["t"]), r"topics=\['t'\]"),
        (lambda own: events_server.start_all_events_receiver_server("svc", own, True), "include_audit=True"),
        (lambda own: commands_server.setup_command_receiver(False, own, "svc", log_exceptions=False), "log_exceptions"),
        (lambda own: commands_server.start_command_receiver_server("svc", own, False, 600), "max_poll_interval=600"),
        (lambda own: commands_server.start_all_commands_receiver_server("svc", own, until_end=1), "until_end=1"),
    ],
)
def test_what_an_io_server_of_the_services_own_cant_heed_is_named(call: Callable[..., Any], ignored: str) -> None:
    text = rf"{ignored}.* is ignored, as an io_server is given: set it on the Replay, or leave io_server out"
    with pytest.warns(DeprecationWarning, match=text) as caught:
        call(Replay())
    assert caught[0].filename == __file__


def test_what_an_io_server_says_itself_is_no_reason_to_warn() -> None:
    own = KafkaConsumerServer("t", auto_reprocess_errors=True, timeout=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        events_server.setup_event_listener(True, own, "svc", timeout=5)
        events_server.setup_event_listener(False, Replay(), "svc")


SERVICE = """
import os, sys
from keven_core.kafka import CommandHandler, EventHandler
from keven_core.kafka.{family}.server import {launcher}

class Replay:
    client_id = "replay"

    def add_runner(self, runner):
        self.runner = runner

    async def run_server(self):
        self.runner.run({message!r})

def handle(message):
    print("handled", os.getpid(), flush=True)

EventHandler.register_function("ONE", handle)
CommandHandler.register_function("ONE", handle)
process = {launcher}("svc", Replay())
print("process", process.pid, repr(process), flush=True)
process.join()
sys.exit(process.exitcode)
"""


@pytest.mark.parametrize(
    ("family", "launcher", "message"),
    [
        ("events", "start_events_receiver_process", EVENT),
        ("commands", "start_command_receiver_process", COMMAND),
    ],
)
def test_a_process_runs_an_io_server_of_the_services_own(
    tmp_path: Path, family: str, launcher: str, message: bytes
) -> None:
    script = tmp_path / "service.py"
    script.write_text(SERVICE.format(family=family, launcher=launcher, message=message))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines["process"].split()[0] == lines["handled"]
    assert "'svc'" in lines["process"]


@pytest.mark.parametrize(
    ("family", "module"), [(EventHandler, events_server), (CommandHandler, commands_server)], ids=["events", "commands"]
)
def test_a_handler_server_process_has_the_name(family: Any, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []

    def launch(target: Callable[..., Any], server_name: str, arguments: Any, **more: Any) -> str:
        launched.append((target, server_name, arguments["io_server"]))
        return "the handle"

    monkeypatch.setattr(module, "launch_workers", launch)
    assert family.create_handler_server_process("svc") == "the handle"
    starts = {EventHandler: "start_events_receiver_server", CommandHandler: "start_command_receiver_server"}
    assert launched == [(getattr(module, starts[family]), "svc", None)]


# --- servers and runners ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assigned", [False, True])
@pytest.mark.parametrize("mode", ["start", "start_sync"])
def test_a_message_server_connects_runner_and_io_server(assigned: bool, mode: str) -> None:
    class Runner:
        def __init__(self) -> None:
            self.got: list[bytes] = []

        def run(self, message: bytes) -> None:
            self.got.append(message)

    runner, own = Runner(), Replay(b"1", b"2")
    server = MessageReceiverServer(runner) if assigned else MessageReceiverServer(runner, own)
    if assigned:
        with pytest.raises(ValueError, match=r"no io_server: give one, or call assign_io_server\(\)"):
            finished(getattr(server, mode)())
        server.assign_io_server(own)
    finished(getattr(server, mode)())
    assert runner.got == [b"1", b"2"]


FAMILIES = pytest.mark.parametrize(
    ("some", "every", "runner", "messages"),
    [
        (EventReceiverServer, AllEventsReceiverServer, EventRunner, (EVENT, OTHER_EVENT)),
        (CommandReceiverServer, AllCommandsReceiverServer, CommandRunner, (COMMAND, OTHER_COMMAND)),
    ],
    ids=["events", "commands"],
)


@FAMILIES
def test_receiver_servers_hand_names_to_a_handler(some: Any, every: Any, runner: Any, messages: Any) -> None:
    got: list[str] = []

    def handle(message: Any) -> None:
        got.append(getattr(message, message.kind.name_field))

    some(Replay(*messages), {"TWO"}, handle).start_sync()
    assert got == ["TWO"]
    every(Replay(*messages), handle).start_sync()
    assert got == ["TWO", "ONE", "TWO"]


@FAMILIES
def test_a_runner_calls_its_handler_with_the_names_it_takes(
    some: Any, every: Any, runner: Any, messages: Any, kept: Kept
) -> None:
    def name_of(message: Any) -> str:
        return str(getattr(message, message.kind.name_field))

    def ran(**arguments: Any) -> list[Any]:
        made = runner(**arguments)
        return [made.run(message) for message in messages]

    noun = runner.handlers.kind_of().noun
    by = {f"{noun}_names": {"ONE"}, f"{noun}_handler": name_of}
    assert ran(**by) == ["ONE", None]
    assert ran(**by, **{f"all_{noun}s": True}) == ["ONE", "TWO"]
    registered: list[str] = []
    runner.handlers.register_function("TWO", lambda message: registered.append(name_of(message)))
    assert ran() == [None, None]
    assert registered == ["TWO"]


# --- handlers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decorator", [command_handler, long_running_command_handler])
def test_a_command_handler_may_send_at_once(decorator: Any, numbered: Any) -> None:
    raised, _ = numbered

    def fail(command: Any) -> None:
        keven_log_event(raised(number=1))
        raise ZeroDivisionError

    decorator("HELD")(fail)
    decorator("SENT", delay_commands_and_events=False)(fail)
    topics = {
        name: [message.topic for message in dispatch(b'{"command_name":"%s"}' % name, topic="keven_commands").published]
        for name in (b"HELD", b"SENT")
    }
    assert "keven_events_raised" not in topics[b"HELD"]
    assert "keven_events_raised" in topics[b"SENT"]


def test_long_running_functions_may_show_their_exceptions_too() -> None:
    shown: list[Exception] = []

    def fail(message: Any) -> None:
        raise ValueError("bad")

    long_running_command_handler("FAILS", exception_handler=shown.append)(fail)
    long_running_event_handler("FAILS", capture_exception_handler=shown.append)(fail)
    for value, topic in ((b'{"command_name":"FAILS"}', "keven_commands"), (b'{"event_name":"FAILS"}', "keven_events")):
        assert dispatch(value, topic=topic).outcome == "dead"
    assert [str(error) for error in shown] == ["bad", "bad"]


def test_long_running_functions_ask_for_a_thread() -> None:
    assert not EventRunner().blocks_long()
    long_running_event_handler("ONE")(print)
    assert EventRunner().blocks_long()
    assert not CommandRunner().blocks_long()
    long_running_command_handler("ONE")(print)
    assert CommandRunner().blocks_long()


@pytest.mark.parametrize("base", [LongRunningEventHandler, LongRunningCommandHandler])
def test_a_thread_manager_is_said_to_be_of_no_use(base: Any) -> None:
    assert base.thread_manager is None
    with pytest.warns(DeprecationWarning, match=r"thread_manager is not used: .*as many as `workers` says; remove it"):
        type(base)("Slow", (base,), {"thread_manager": object(), "auto_register": False})


# --- messages --------------------------------------------------------------------------------------------------------


def test_event_and_command_are_messages() -> None:
    assert issubclass(Event, Message)
    assert issubclass(Command, Message)
    assert (Event.kind, Command.kind) == (EVENTS, COMMANDS)


def test_now_goes_past_what_waits(kept: Kept, numbered: Any) -> None:
    raised, ordered = numbered
    with outbox():
        raised(number=1).log()
        ordered(number=2).dispatch()
        raised(number=3).log(now=True)
        ordered(number=4).dispatch(now=True)
        keven_dispatch_command_now(ordered(number=5))
        assert [number for _, number in kept.got] == [3, 4, 5]
    assert [number for _, number in kept.got] == [3, 4, 5, 1, 2]


def test_commands_on_commit_until_it_is_taken_back(kept: Kept, numbered: Any) -> None:
    _, ordered = numbered
    send_commands_on_commit()
    keven_dispatch_command(ordered(number=1))
    dont_send_commands_on_commit()
    keven_dispatch_command(ordered(number=2))
    assert kept.got == [("keven_commands_ordered", 2)]
    assert keven_flush_command_cache() == 1
    assert kept.got[1:] == [("keven_commands_ordered", 1)]


def test_the_publisher_of_commands_is_the_last_that_was_set_until_all_are_cleared(kept: Kept, numbered: Any) -> None:
    own = CommandPublisher(Kept())
    set_publisher(own)
    assert last_publisher() is own
    keven_dispatch_command(numbered[1](number=1))
    assert (own.logger.got, kept.got) == ([("keven_commands_ordered", 1)], [])
    clear_command_publishers()
    assert isinstance(last_publisher().logger, KafkaLogger)


def test_publishers_write_with_their_logger(numbered: Any) -> None:
    raised, ordered = numbered
    logger = Kept()
    EventPublisher(logger).log_event(raised(number=1))
    CommandPublisher(logger).dispatch_command(ordered(number=2))
    either = MessagePublisher(logger)
    either.publish(raised(number=3))
    either.publish(ordered(number=4), "own")
    assert logger.got == [
        ("keven_events_raised", 1),
        ("keven_commands_ordered", 2),
        ("keven_events_raised", 3),
        ("own", 4),
    ]
    with pytest.raises(UsageError, match="can't tell whether a dict is an event or a command: use EventPublisher"):
        either.topic_of({})


def test_commands_by_name_and_from_the_wire(numbered: Any) -> None:
    _, ordered = numbered
    for make in (Command.from_name, Command.from_name_string):
        assert type(make("ordered")) is ordered
        assert make("NEVER_HEARD_OF").command_name == CommandNames.NOT_INSTALLED
        assert [make(name).command_name for name in CommandNames] == list(CommandNames)
    read = Command.from_bytes(ordered(number=5, initiated_by_user_id=7).serialize())
    assert (type(read), read.number, read.initiated_by_user_id) == (ordered, 5, 7)
    assert isinstance(Command.from_bytes(b'{"command_name":"OTHER"}'), GenericCommand)


@pytest.mark.parametrize("base", ["Raised", "Ordered"])
def test_messages_from_a_protobuf_envelope(numbered: Any, base: str) -> None:
    cls = {made.__name__: made for made in numbered}[base]
    kind = cls.kind
    name = getattr(cls, kind.name_field)
    envelope = envelope_class("string")(name=name, uuid="u", namespace="north", payload=b'{"number":5}')
    read = (Event if base == "Raised" else Command).from_protobuf(envelope)
    assert (type(read), read.number, read.uuid, read.namespace) == (cls, 5, "u", "north")


def test_a_command_makes_the_handler_that_it_belongs_to(numbered: Any) -> None:
    class Handler(CommandHandler):
        command_name = "ORDERED"

        def handle_command(self, command: Any) -> None: ...

    command = numbered[1](number=5)
    handler = command.create_handler()
    assert (type(handler), handler.command) == (Handler, command)


@pytest.mark.parametrize("base", [PickledEvent, PickledCommand])
def test_a_payload_is_serialized_and_parsed(base: Any) -> None:
    name_field = base.kind.name_field
    cls = type(base)("Paid", (base,), {name_field: "PAID", "__module__": __name__})
    paid, read = cls(BasicDetail(amount=5)), cls()
    payload = paid.serialize_payload()
    assert msgspec.json.decode(payload) == {"amount": 5}
    read.parse_payload(payload)
    assert read.details == BasicDetail(amount=5)


@pytest.mark.parametrize("base", [Event, Command])
def test_what_init_takes_is_its_payload(base: Any) -> None:
    def __init__(self: Any, number: int = 0) -> None:
        self.number = number

    cls = type(base)("Old", (base,), {base.kind.name_field: "OLD", "__module__": __name__, "__init__": __init__})
    made, read = cls(5), cls()
    read.parse_payload(made.serialize_payload())
    assert read.number == 5


def test_names_that_every_service_knows() -> None:
    assert [name.value for name in EventNames if not name.startswith("CMD_")] == [
        "NONE",
        "NOT_INSTALLED",
        "PRINT_EVENT",
        "TEST",
    ]
    assert [name.value for name in CommandNames] == ["NONE", "NOT_INSTALLED", "PRINT_COMMAND", "TEST"]


def test_command_names_can_be_extended_at_run_time() -> None:
    script = (
        "import aenum\n"
        "from keven_core.kafka.commands import Command, CommandNames\n"
        "aenum.extend_enum(CommandNames, 'SHIP', 'SHIP')\n"
        "class Ship(Command):\n"
        "    command_name = CommandNames.SHIP\n"
        "print(type(Command.from_name(CommandNames.SHIP)).__name__, CommandNames('SHIP') is CommandNames.SHIP)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "Ship True\n"), done.stderr


# --- loggers ---------------------------------------------------------------------------------------------------------


def test_flush_waits_as_long_as_the_batch_loggers_timeout_says() -> None:
    class StandIn:
        def __init__(self) -> None:
            self.flushed: list[float] = []

        def flush(self, timeout: float) -> int:
            self.flushed.append(timeout)
            return 0

    stand_in = StandIn()
    for log in (KafkaBatchLogger(topic="t"), KafkaBatchLogger(topic="t", timeout=0.2)):
        log.producer = stand_in
        log.flush()
    assert stand_in.flushed == [30, 0.2]
