"""Events that tell how far a command is, under the original's path; see keven_core.kafka.commands.command_event."""

from keven_core.kafka.commands.command_event import CommandErrorEvent, CommandEvent

__all__ = ["CommandErrorEvent", "CommandEvent"]
