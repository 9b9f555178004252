"""Events: `EventNames`, the bases `Event` and `PickledEvent`, the generic event for other names."""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar

import msgspec

from keven_core.kafka.details import BasicDetail
from keven_core.kafka.envelope import register_class
from keven_core.kafka.kinds import EVENTS
from keven_core.kafka.message import GenericMessage, Message
from keven_core.kafka.oldstyle import Pickled

__all__ = ["BasicDetail", "Event", "EventNames", "GenericEvent", "PickledEvent", "add_names"]


class EventNames(str, Enum):
    """Names of events that every service knows; a service adds its own in an enum of its own, or to this one.

    Any str or str enum member is a name, so a service needs nothing from here. To extend this enum at run time:
    `aenum.extend_enum(EventNames, "ORDER_PLACED", "ORDER_PLACED")`.
    """

    NONE = "NONE"
    NOT_INSTALLED = "NOT_INSTALLED"
    PRINT_EVENT = "PRINT_EVENT"
    TEST = "TEST"


def add_names(names: type[Enum], name: str, *aliases: str) -> None:
    """Add a member to an enum of names, as aenum.extend_enum() does; further names of it are aliases.

    Nothing happens to names that are there already.
    """
    members: dict[str, Any] = names._member_map_
    if name not in members:
        member: Any = str.__new__(names, name)  # type: ignore[type-var]
        member._name_ = member._value_ = name
        member.__objclass__ = names
        member._sort_order_ = len(names._member_names_)
        names._member_names_.append(name)
        names._value2member_map_[name] = member
        type.__setattr__(names, name, member)
        members[name] = member
    for alias in aliases:
        if alias not in members:
            type.__setattr__(names, alias, members[name])
            members[alias] = members[name]


class Event(Message, kind=EVENTS, gc=False, kw_only=True):
    """Base of typed events: the envelope's fields (see Message), and the event's own.

    `is_audit_event` says that it belongs to the audit topic.
    """

    event_name: ClassVar[str]
    classes: ClassVar[dict[str, type[Event]]]

    is_audit_event: bool = False

    def log(self, now: bool = False) -> None:
        """Publish the event; `now`: at once, even while events wait for a commit or for the end of a handler.

        As keven_log_event() and keven_log_event_now(), in this thread; blocks and raises as they do.
        """
        from keven_core.kafka.events import logger

        (logger.keven_log_event_now if now else logger.keven_log_event)(self)

    @classmethod
    def register_event(cls, event_class: Any = None) -> Any:
        """Make a class (by default this one) the one of its `event_name`, as its definition did already; returns it.

        For tests that clear the registry, and as a decorator. Raises RegistrationError: its name is taken or missing.
        """
        return register_class(event_class if event_class is not None else cls, EVENTS)


class GenericEvent(GenericMessage, Event, dict=True):
    """An event that has no class of its own: its remaining fields are attributes, and all of them stand in `fields`.

    A field whose name is taken by Event's own attributes is found in `fields` only.
    """

    fields: dict[str, Any] = msgspec.field(default_factory=dict)


EVENTS.generic_class = GenericEvent


class PickledEvent(Pickled, Event):
    """An old-style event whose content are the attributes of `details`, an object of its `detail_class`."""
