"""Launchers of command servers: sync (blocks), async (a coroutine), or processes of their own.

    from keven_core.kafka.commands.server import start_command_receiver_server

    start_command_receiver_server(server_name="my_command_server")

Import the modules that define the handlers first: the dispatch table is built when the server starts. Everything that
is said of the event servers' launchers holds for these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from keven_core.kafka._launch import ServerProcess
from keven_core.kafka._launchers import default_topics, io_server_of, launch_workers
from keven_core.kafka.abstracts.command_handler import CommandHandler
from keven_core.kafka.abstracts.commandreceiver_server import AllCommandsReceiverServer, CommandReceiverServer
from keven_core.kafka.kinds import COMMANDS

__all__ = [
    "setup_command_receiver",
    "start_all_commands_receiver_server",
    "start_all_commands_receiver_server_async",
    "start_command_receiver_process",
    "start_command_receiver_server",
    "start_command_receiver_server_async",
]


def setup_command_receiver(
    auto_reprocess_errors: bool = False,
    io_server: Any = None,
    server_name: str = "keven",
    timeout: float | None = None,
    reraise_exceptions: bool = False,
    log_exceptions: bool = True,
    topics: Iterable[str] | None = None,
    **options: Any,
) -> CommandReceiverServer:
    """Make, but do not start, a server of the registered handlers.

    Arguments:
        io_server: a server of the service's own; None: a KafkaConsumerServer with client and group id `server_name`.
            With one, arguments that say otherwise than its attributes are ignored, with a DeprecationWarning.
        topics: None: `keven_commands`, and `keven_commands_<name>` of each command that has a handler.
        options: further keyword arguments of KafkaConsumerServer; the other arguments are among them too.
    """
    options.update(
        auto_reprocess_errors=auto_reprocess_errors,
        timeout=timeout,
        reraise_exceptions=reraise_exceptions,
        log_exceptions=log_exceptions,
    )
    return _command_server(server_name, io_server, topics, options)


def start_command_receiver_server(
    server_name: str,
    io_server: Any = None,
    auto_reprocess_errors: bool = False,
    max_poll_interval: float = 180,
    auto_start: bool = True,
    *,
    topics: Iterable[str] | None = None,
    **options: Any,
) -> CommandReceiverServer:
    """Run the registered handlers in this thread until the server ends; blocks. Returns the server.

    Arguments:
        server_name: client id and consumer group.
        io_server: as setup_command_receiver() has it.
        auto_reprocess_errors: see KafkaConsumerServer.
        max_poll_interval: seconds that a handler may take before the server loses its partitions.
        auto_start: False: return the server at once; start it by start_sync() or `await start()`.
        topics: None: `keven_commands`, `keven_commands_<name>` of each command that has a handler, and foreign topics.
        options: further keyword arguments of KafkaConsumerServer.

    Ends and raises as start_events_receiver_server().
    """
    options.update(auto_reprocess_errors=auto_reprocess_errors, max_poll_interval=max_poll_interval)
    server = _command_server(server_name, io_server, topics, options)
    if auto_start:
        server.start_sync()
    return server


async def start_command_receiver_server_async(
    server_name: str,
    io_server: Any = None,
    auto_reprocess_errors: bool = False,
    max_poll_interval: float = 180,
    *,
    topics: Iterable[str] | None = None,
    **options: Any,
) -> None:
    """As start_command_receiver_server(), in the running event loop; cancelling it stops the server in order."""
    options.update(auto_reprocess_errors=auto_reprocess_errors, max_poll_interval=max_poll_interval)
    await _command_server(server_name, io_server, topics, options).start()


def start_command_receiver_process(
    server_name: str,
    io_server: Any = None,
    auto_reprocess_errors: bool = False,
    max_poll_interval: float = 180,
    *,
    topics: Iterable[str] | None = None,
    processes: int = 1,
    supervised: bool | None = None,
    **options: Any,
) -> ServerProcess:
    """Run start_command_receiver_server() in processes of its own; returns the handle of one at once.

    Arguments, supervision and errors as start_events_receiver_process() has them.
    """
    arguments = {
        "io_server": io_server,
        "auto_reprocess_errors": auto_reprocess_errors,
        "max_poll_interval": max_poll_interval,
        "topics": None if topics is None else list(topics),
        **options,
    }
    return launch_workers(
        start_command_receiver_server, server_name, arguments, processes=processes, supervised=supervised
    )


def start_all_commands_receiver_server(
    server_name: str,
    io_server: Any = None,
    *,
    command_handler: Callable[[Any], Any] | None = None,
    **options: Any,
) -> None:
    """Run a server of every command: `keven_commands` and `^keven_commands_.*`; blocks.

    `command_handler` gets each command, those without a class as generic commands; None: the registered handlers. Else
    as start_command_receiver_server().
    """
    _all_commands_server(server_name, io_server, command_handler, options).start_sync()


async def start_all_commands_receiver_server_async(
    server_name: str,
    io_server: Any = None,
    *,
    command_handler: Callable[[Any], Any] | None = None,
    **options: Any,
) -> None:
    """As start_all_commands_receiver_server(), in the running event loop."""
    await _all_commands_server(server_name, io_server, command_handler, options).start()


def _command_server(
    server_name: str, io_server: Any, topics: Iterable[str] | None, options: dict[str, Any]
) -> CommandReceiverServer:
    io_server = io_server_of(COMMANDS, server_name, io_server, topics, default_topics(COMMANDS), options)
    return CommandReceiverServer(io_server, None, CommandHandler.handle_commands)


def _all_commands_server(
    server_name: str, io_server: Any, command_handler: Callable[[Any], Any] | None, options: dict[str, Any]
) -> AllCommandsReceiverServer:
    topics = [COMMANDS.topic, COMMANDS.all_topics_pattern]
    io_server = io_server_of(COMMANDS, server_name, io_server, None, topics, options)
    return AllCommandsReceiverServer(io_server, command_handler)
