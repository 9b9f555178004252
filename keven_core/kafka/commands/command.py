"""Commands: `CommandNames`, the base class `Command`, its phases, and the generic command.

    class ShipOrder(Command):
        command_name = "SHIP_ORDER"
        order_id: int

Each command has three events that tell how far it is, see keven_core.kafka.commands.command_event.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar

import msgspec

from keven_core.kafka.commands.command_event import CommandPhase, add_reports, phase_event_name
from keven_core.kafka.details import BasicDetail
from keven_core.kafka.kinds import COMMANDS
from keven_core.kafka.message import GenericMessage, Message
from keven_core.kafka.oldstyle import Pickled

__all__ = ["BasicDetail", "Command", "CommandNames", "CommandPhase", "GenericCommand", "PickledCommand"]


class CommandNames(str, Enum):
    """Names of commands that every service knows; a service adds its own in an enum of its own, as with EventNames."""

    NONE = "NONE"
    NOT_INSTALLED = "NOT_INSTALLED"
    PRINT_COMMAND = "PRINT_COMMAND"
    TEST = "TEST"


class Command(Message, kind=COMMANDS, gc=False, kw_only=True):
    """Base of typed commands: the envelope's fields (see Message), and the command's own.

    `initiated_by_user_id` says on whose behalf it was given. `auto_create_command_events = False` in a class body means
    that no events are made of the command.
    """

    command_name: ClassVar[str]
    classes: ClassVar[dict[str, type[Command]]]
    auto_create_command_events: ClassVar[bool] = True

    initiated_by_user_id: int | str | None = None

    def set_uuid(self, uuid: object) -> None:
        """Give it this uuid."""
        self.uuid = str(uuid)

    def get_uuid(self) -> str:
        """Its uuid."""
        return self.uuid

    @classmethod
    def from_name_string(cls, name: str) -> Any:
        """The same as from_name()."""
        return cls.from_name(name)

    def dispatch(self, now: bool = False) -> None:
        """Publish it: keven_dispatch_command(), or keven_dispatch_command_now()."""
        from keven_core.kafka.commands.logger import keven_dispatch_command, keven_dispatch_command_now

        (keven_dispatch_command_now if now else keven_dispatch_command)(self)

    @classmethod
    def get_event_name(cls, phase: CommandPhase, command_name: object = None, old_name: bool = True) -> str:
        """The name of the event that tells of a phase of this command, or of the one that is named.

        With `old_name` in the older spelling (`CMD_SHIP_START`), which means the same as the newer one
        (`CMD_SHIP_STARTED`) wherever a handler is registered or an event is read.
        """
        name = cls.command_name if command_name is None else COMMANDS.name_of(command_name)
        return phase_event_name(phase, name, old_name=old_name)


class GenericCommand(GenericMessage, Command, dict=True):
    """A command that has no class of its own: its remaining fields are attributes, and all of them stand in `fields`.

    A field whose name is taken by Command's own attributes is found in `fields` only.
    """

    fields: dict[str, Any] = msgspec.field(default_factory=dict)


COMMANDS.generic_class = GenericCommand
COMMANDS.on_name = add_reports


class PickledCommand(Pickled, Command):
    """An old-style command whose content are the attributes of `details`, an object of its `detail_class`."""
