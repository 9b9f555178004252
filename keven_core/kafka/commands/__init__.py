"""Commands: names, base class, runner, publisher and launchers; each is imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keven_core._lazy import lazy_attributes

if TYPE_CHECKING:
    from keven_core.kafka.abstracts.command_handler import CommandHandler, command_handler
    from keven_core.kafka.abstracts.commandreceiver_server import AllCommandsReceiverServer, CommandReceiverServer
    from keven_core.kafka.commands.command import (
        BasicDetail,
        Command,
        CommandNames,
        CommandPhase,
        GenericCommand,
        PickledCommand,
    )
    from keven_core.kafka.commands.command_event import CommandErrorEvent, CommandEvent
    from keven_core.kafka.commands.logger import (
        clear_command_publishers,
        dont_send_commands_on_commit,
        get_write_cache,
        keven_dispatch_command,
        keven_dispatch_command_now,
        keven_flush_command_cache,
        last_publisher,
        send_commands_on_commit,
        set_publisher,
    )
    from keven_core.kafka.commands.publisher import CommandPublisher
    from keven_core.kafka.commands.runner import CommandRunner
    from keven_core.kafka.commands.server import (
        setup_command_receiver,
        start_all_commands_receiver_server,
        start_all_commands_receiver_server_async,
        start_command_receiver_process,
        start_command_receiver_server,
        start_command_receiver_server_async,
    )

__all__ = [
    "AllCommandsReceiverServer",
    "BasicDetail",
    "Command",
    "CommandErrorEvent",
    "CommandEvent",
    "CommandHandler",
    "CommandNames",
    "CommandPhase",
    "CommandPublisher",
    "CommandReceiverServer",
    "CommandRunner",
    "GenericCommand",
    "PickledCommand",
    "clear_command_publishers",
    "command_handler",
    "dont_send_commands_on_commit",
    "get_write_cache",
    "keven_dispatch_command",
    "keven_dispatch_command_now",
    "keven_flush_command_cache",
    "last_publisher",
    "send_commands_on_commit",
    "set_publisher",
    "setup_command_receiver",
    "start_all_commands_receiver_server",
    "start_all_commands_receiver_server_async",
    "start_command_receiver_process",
    "start_command_receiver_server",
    "start_command_receiver_server_async",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "keven_core.kafka.abstracts.command_handler": (
            "CommandHandler",
            "command_handler",
        ),
        "keven_core.kafka.abstracts.commandreceiver_server": (
            "AllCommandsReceiverServer",
            "CommandReceiverServer",
        ),
        "keven_core.kafka.commands.command": (
            "BasicDetail",
            "Command",
            "CommandNames",
            "CommandPhase",
            "GenericCommand",
            "PickledCommand",
        ),
        "keven_core.kafka.commands.command_event": (
            "CommandErrorEvent",
            "CommandEvent",
        ),
        "keven_core.kafka.commands.logger": (
            "clear_command_publishers",
            "dont_send_commands_on_commit",
            "get_write_cache",
            "keven_dispatch_command",
            "keven_dispatch_command_now",
            "keven_flush_command_cache",
            "last_publisher",
            "send_commands_on_commit",
            "set_publisher",
        ),
        "keven_core.kafka.commands.publisher": ("CommandPublisher",),
        "keven_core.kafka.commands.runner": ("CommandRunner",),
        "keven_core.kafka.commands.server": (
            "setup_command_receiver",
            "start_all_commands_receiver_server",
            "start_all_commands_receiver_server_async",
            "start_command_receiver_process",
            "start_command_receiver_server",
            "start_command_receiver_server_async",
        ),
    },
)
