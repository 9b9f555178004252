"""Events that tell how far a command is: its reports.

    CMD_<COMMAND NAME>_STARTED     a handler is about to run (again, with each attempt)
    CMD_<COMMAND NAME>_ERRORED     a handler has failed, or has dead-lettered it
    CMD_<COMMAND NAME>_COMPLETED   a handler has ended, or has skipped it

The names come into being with the command's class or its first handler, as members of EventNames too, and with them an
event class each; a class of the service's own under such a name takes its place. The older spellings (_START, _ERROR,
_COMPLETE) mean the same: as members, where handlers are registered, and in events that are read.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar

from keven_core.kafka.events.event import Event, EventNames, add_names
from keven_core.kafka.kinds import EVENTS

__all__ = ["CommandErrorEvent", "CommandEvent", "CommandPhase", "add_reports", "phase_event_name"]


class CommandPhase(str, Enum):
    """How far a command is."""

    STARTED = "STARTED"
    ERRORED = "ERRORED"
    COMPLETED = "COMPLETED"


_OLD_SUFFIXES = {CommandPhase.STARTED: "START", CommandPhase.ERRORED: "ERROR", CommandPhase.COMPLETED: "COMPLETE"}


class CommandEvent(Event):
    """A command was started or completed; its uuid is `source_command_uuid`.

    `initiated_by_user_id` is the command's.
    """

    command_name: ClassVar[str] = ""
    made: ClassVar[bool] = False

    initiated_by_user_id: int | str | None = None


class CommandErrorEvent(CommandEvent):
    """A handler of the command has failed.

    `error_message` is the exception's text, `error_type` its class.
    """

    error_message: str = ""
    error_type: str = ""


def phase_event_name(phase: CommandPhase, command_name: str, *, old_name: bool = False) -> str:
    """The name of a command's report."""
    phase = CommandPhase(phase)
    return f"CMD_{command_name.upper()}_{_OLD_SUFFIXES[phase] if old_name else phase.value}"


def add_reports(command_name: str) -> None:
    """Make the names and classes of a command's reports known, once or more often."""
    for phase in CommandPhase:
        name, old_name = (phase_event_name(phase, command_name, old_name=old) for old in (False, True))
        add_names(EventNames, name, old_name)
        EVENTS.add_alias(old_name, name)
        if name in EVENTS.classes:
            continue
        base: Any = CommandErrorEvent if phase is CommandPhase.ERRORED else CommandEvent
        body = {key: getattr(base, key) for key in ("__module__", "__qualname__", "__doc__")}
        type(base)(base.__name__, (base,), {**body, "event_name": name, "command_name": command_name, "made": True})
