"""Servers that route commands to their handlers: some commands, or all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from keven_core.kafka.abstracts.command_handler import CommandHandler
from keven_core.kafka.abstracts.message_server import MessageReceiverServer
from keven_core.kafka.commands.runner import CommandRunner

__all__ = ["AllCommandsReceiverServer", "CommandReceiverServer"]


class CommandReceiverServer(MessageReceiverServer):
    """Hands the commands in `command_names` to `command_handler`.

    Arguments:
        io_server: see MessageReceiverServer.
        command_names: which commands; None: every command that has a handler.
        command_handler: called with each command; None: the registered handlers.
    """

    def __init__(
        self,
        io_server: Any = None,
        command_names: Iterable[object] | None = None,
        command_handler: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(CommandRunner(command_names, command_handler), io_server)


class AllCommandsReceiverServer(MessageReceiverServer):
    """Hands every command to `command_handler`, also those without a class of their own (as generic commands).

    With the default handler the registered handlers are called, and commands without one are skipped and counted.
    """

    def __init__(self, io_server: Any = None, command_handler: Callable[[Any], Any] | None = None) -> None:
        super().__init__(
            CommandRunner(None, command_handler or CommandHandler.handle_all_commands, all_commands=True), io_server
        )
