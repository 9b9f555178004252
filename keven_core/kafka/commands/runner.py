"""`CommandRunner`: from the bytes of a message to the handler of its command."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from keven_core.kafka.abstracts.command_handler import CommandHandler
from keven_core.kafka.abstracts.message_runner import MessageRunner
from keven_core.kafka.commands.reports import report_topics

__all__ = ["CommandRunner"]


class CommandRunner(MessageRunner):
    """Decodes messages into commands and calls their handlers.

    Arguments:
        command_names: the commands to handle; None: every command that has a handler.
        command_handler: called with each command, sync or async; None (or CommandHandler.handle_commands): the
            registered handlers.
        all_commands: `command_handler` also gets commands that are not in `command_names`, as their class or generic.
    """

    handlers = CommandHandler
    single_handler = True

    def __init__(
        self,
        command_names: Iterable[object] | None = None,
        command_handler: Callable[[Any], Any] | None = None,
        all_commands: bool = False,
    ) -> None:
        super().__init__(command_names, command_handler, all_commands)

    def written_topics(self) -> list[str]:
        """Topics of the events that tell how far commands are."""
        return report_topics() if self.runs_registered_handlers else []
