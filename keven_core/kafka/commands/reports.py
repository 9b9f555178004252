"""Publishes the reports of commands around their handlers; see keven_core.kafka.commands.command_event."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from keven_core.kafka._around import Around
from keven_core.kafka.commands.command_event import CommandErrorEvent, CommandEvent, CommandPhase, phase_event_name
from keven_core.kafka.errors import RegistrationError
from keven_core.kafka.events.event import GenericEvent
from keven_core.kafka.kinds import COMMANDS, EVENTS
from keven_core.kafka.outcomes import Retry, Skip
from keven_core.kafka.publishers import last_publisher

__all__ = ["Reports", "is_reported", "report_of", "report_topics"]

logger = logging.getLogger("keven_core.kafka")


def is_reported(command_name: str) -> bool:
    """Whether events are made of a command."""
    return bool(getattr(COMMANDS.classes.get(command_name), "auto_create_command_events", True))


def report_topics() -> list[str]:
    """Topics of the reports of all commands that have a handler."""
    return [
        EVENTS.topic_of(phase_event_name(phase, name))
        for name in COMMANDS.registry.names()
        if is_reported(name)
        for phase in CommandPhase
    ]


def report_of(command: Any, phase: CommandPhase, error: BaseException | None = None, *, old_name: bool = False) -> Any:
    """The event that tells of a phase of a command; with `old_name` under the older spelling of its name."""
    report = EVENTS.classes[phase_event_name(phase, command.command_name)]()
    report.originator, report.namespace = command.originator, command.namespace
    report.source_command_uuid = command.uuid
    if isinstance(report, CommandEvent):
        report.initiated_by_user_id = command.initiated_by_user_id
    if isinstance(report, CommandErrorEvent) and error is not None:
        report.error_message, report.error_type = str(error), type(error).__qualname__
    if old_name:
        name = phase_event_name(phase, command.command_name, old_name=True)
        return GenericEvent.from_fields({**msgspec.to_builtins(report), "event_name": name})
    return report


class Reports(Around):
    """Publishes the reports of each command around a handler's call.

    Raises RegistrationError when a class of the service's own can't be made for a report: else that would be found
    when a command has been handled.
    """

    def __init__(self, command_name: str) -> None:
        for phase in CommandPhase:
            cls = EVENTS.classes[phase_event_name(phase, command_name)]
            try:
                cls()
            except TypeError as error:
                raise RegistrationError(
                    f"{cls.__module__}.{cls.__qualname__} is made for each report of command {command_name}, and can't "
                    f"be ({error}): its fields need defaults"
                ) from error

    def begin(self, message: Any) -> None:
        """Tell that the command is started."""
        _publish(report_of(message, CommandPhase.STARTED))

    def end(self, message: Any, error: Exception | None) -> None:
        """Tell how it has ended; nothing for one that comes again."""
        if isinstance(error, Retry):
            return
        if error is None or isinstance(error, Skip):
            _publish(report_of(message, CommandPhase.COMPLETED))
            return
        try:
            _publish(report_of(message, CommandPhase.ERRORED, error))
        except Exception:
            # The command's own failure is what counts.
            logger.exception("the failure of command %s can't be reported", message.command_name)


def _publish(event: Any) -> None:
    # At once, whatever the handler's outbox is about to hold or to drop.
    last_publisher(EVENTS, acknowledged=False).log_event(event)
