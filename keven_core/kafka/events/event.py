"""Events: `EventNames`, the base class `Event`, and the generic event for names without a class of their own."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Any, ClassVar

import msgspec

from keven_core.kafka.envelope import MessageMeta, dataclass_transform
from keven_core.kafka.errors import UndecodableError, UsageError

__all__ = ["Event", "EventNames", "GenericEvent", "decoders_of", "generic_decoders"]


class EventNames(str, Enum):
    """Names of events that every service knows; a service adds its own in an enum of its own, or to this one.

    Any str or str enum member is a name, so a service needs nothing from here. To extend this enum at run time:
    `aenum.extend_enum(EventNames, "ORDER_PLACED", "ORDER_PLACED")`.
    """

    NONE = "NONE"
    NOT_INSTALLED = "NOT_INSTALLED"
    PRINT_EVENT = "PRINT_EVENT"
    TEST = "TEST"


def _new_uuid() -> str:
    return str(uuid.uuid4())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


@dataclass_transform(kw_only_default=True, field_specifiers=(msgspec.field,))
class Event(msgspec.Struct, metaclass=MessageMeta, gc=False, kw_only=True):
    """Base of typed events; see keven_core.kafka.envelope for how a class body becomes a struct.

    Envelope fields, all with defaults:
        uuid: identifies the event, for duplicates after a redelivery.
        originator: the service that raised it.
        created: when it was raised; aware, UTC.
        source_command_uuid: the command that led to it, if any.
        namespace: the service's own grouping of events.
        is_audit_event: belongs to the audit topic.
    """

    event_name: ClassVar[str]
    key_field: ClassVar[str | None]
    classes: ClassVar[dict[str, type[Event]]]

    uuid: str = msgspec.field(default_factory=_new_uuid)
    originator: str = ""
    created: datetime.datetime = msgspec.field(default_factory=_now)
    source_command_uuid: str | None = None
    namespace: str = ""
    is_audit_event: bool = False

    def serialize(self, codec: str = "json") -> bytes:
        """The event as it goes over the wire; `codec` is "json" or "msgpack".

        Raises UsageError for an event without a name.
        """
        if not self.event_name:
            raise UsageError(f"{type(self).__qualname__} has no event_name, so nobody could tell what it is")
        return msgspec.msgpack.encode(self) if codec == "msgpack" else msgspec.json.encode(self)


class GenericEvent(Event, dict=True):
    """An event that has no class of its own: its remaining fields are attributes, and all of them stand in `fields`.

    A field whose name is taken by Event's own attributes is found in `fields` only.
    """

    fields: dict[str, Any] = msgspec.field(default_factory=dict)

    def serialize(self, codec: str = "json") -> bytes:
        """The event as it goes over the wire, with every field that it came with."""
        own = {name: getattr(self, name) for name in Event.__struct_fields__}
        flat = {"event_name": self.event_name, **own, **self.fields}
        return msgspec.msgpack.encode(flat) if codec == "msgpack" else msgspec.json.encode(flat)


class _EnvelopeOnly(msgspec.Struct):
    event_name: str = ""
    uuid: str = msgspec.field(default_factory=_new_uuid)
    originator: str = ""
    created: datetime.datetime = msgspec.field(default_factory=_now)
    source_command_uuid: str | None = None
    namespace: str = ""
    is_audit_event: bool = False


def _generic(fields: dict[str, Any], event_name: str | None) -> GenericEvent:
    known = msgspec.convert(fields, _EnvelopeOnly)
    if event_name is not None and known.event_name not in ("", event_name):
        # As a typed event refuses a wrong tag: the value is then identified by its own name.
        raise UndecodableError(f"the value is a {known.event_name!r:.80}, its topic is bound to {event_name!r}")
    own = {name: fields[name] for name in fields if name not in _EnvelopeOnly.__struct_fields__}
    event = GenericEvent(fields=own, **{name: getattr(known, name) for name in Event.__struct_fields__})
    name = known.event_name or event_name
    if not name:
        raise UndecodableError("the value has no event_name")
    vars(event).update({key: value for key, value in own.items() if not hasattr(GenericEvent, key)})
    vars(event)["event_name"] = name
    return event


def generic_decoders(event_name: str | None = None) -> tuple[Callable[..., Event], Callable[..., Event]]:
    """(JSON, MessagePack) functions that decode a value into a GenericEvent.

    `event_name` is taken for values without a tag, on a topic that is bound to one event.
    """
    decode_json = msgspec.json.Decoder(dict[str, Any]).decode
    decode_msgpack = msgspec.msgpack.Decoder(dict[str, Any]).decode
    return (
        lambda data: _generic(decode_json(data), event_name),
        lambda data: _generic(decode_msgpack(data), event_name),
    )


@cache  # bounded by the program's own classes
def decoders_of(message_type: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(JSON, MessagePack) decode functions of a type that msgspec knows, made once."""
    return msgspec.json.Decoder(message_type).decode, msgspec.msgpack.Decoder(message_type).decode
