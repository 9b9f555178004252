"""`Message`, the base of events and commands: the envelope's fields, and how values become messages."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

import msgspec

from keven_core.kafka.envelope import MessageMeta, dataclass_transform
from keven_core.kafka.errors import UndecodableError, UsageError
from keven_core.kafka.kinds import MessageKind

__all__ = ["GenericMessage", "Message", "decoders_of", "generic_decoders"]


def _new_uuid() -> str:
    return str(uuid.uuid4())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


@dataclass_transform(kw_only_default=True, field_specifiers=(msgspec.field,))
class Message(msgspec.Struct, metaclass=MessageMeta, gc=False, kw_only=True):
    """Base of events and commands; see keven_core.kafka.envelope for how a class body becomes a struct.

    Envelope fields, all with defaults:
        uuid: identifies the message, for duplicates after a redelivery.
        originator: the service that raised it.
        created: when it was raised; aware, UTC.
        source_command_uuid: the command that led to it, if any.
        namespace: the service's own grouping of messages.

    Class attributes:
        namespaces: those that a service has, in whatever form it likes; not checked.
        large_attributes, large_attribute_manager: see keven_core.kafka.oldstyle.Pickled.
    """

    kind: ClassVar[MessageKind]
    key_field: ClassVar[str | None]
    is_old_style: ClassVar[bool] = False
    namespaces: ClassVar[Any] = ()
    large_attributes: ClassVar[Sequence[str]] = ()
    large_attribute_manager: ClassVar[Any] = None

    uuid: str = msgspec.field(default_factory=_new_uuid)
    originator: str = ""
    created: datetime.datetime = msgspec.field(default_factory=_now)
    source_command_uuid: str | None = None
    namespace: str = ""

    def serialize(self, codec: str = "json") -> bytes:
        """The message as it goes over the wire; `codec` is "json" or "msgpack".

        Raises UsageError for a message without a name.
        """
        kind = self.kind
        if not getattr(self, kind.name_field):
            raise UsageError(f"{type(self).__qualname__} has no {kind.name_field}, so nobody could tell what it is")
        return msgspec.msgpack.encode(self) if codec == "msgpack" else msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Any:
        """The event or command in the bytes of a message, in whichever codec, as its own class or as a generic one.

        Raises UndecodableError, also when it is of another class than the one this is called on.
        """
        from keven_core.kafka.routing import decode_any

        message = decode_any(cls.kind, data)
        if not isinstance(message, cls):
            raise UndecodableError(
                f"the value is a {getattr(message, cls.kind.name_field)!r:.80}, which is no {cls.__qualname__}"
            )
        return message

    @classmethod
    def from_name(cls, name: object) -> Any:
        """A new message of the class that has this name, in either case of letters.

        An old-style class that needs arguments is made without its `__init__`. A name that has no class gives a generic
        message: of that name if it is one that every service knows (NONE, NOT_INSTALLED, TEST, PRINT_...), else
        NOT_INSTALLED, with the name as `requested_name`. Raises UsageError for a typed class with required fields.
        """
        kind = cls.kind
        wanted = kind.name_of(name)
        found = kind.classes.get(wanted)
        if found is None:
            found = next((other for own, other in kind.classes.items() if own.lower() == wanted.lower()), None)
        if found is not None:
            try:
                return found.blank() if found.is_old_style else found()
            except TypeError as error:
                raise UsageError(f"{found.__qualname__} can't be made from its name alone: {error}") from error
        if wanted.upper() in kind.placeholders:
            return _generic(kind, {kind.name_field: wanted.upper()}, None)
        return _generic(kind, {kind.name_field: "NOT_INSTALLED", "requested_name": wanted}, None)

    def create_handler(self) -> Any:
        """A new instance of the first handler class of this event or command, which has it as `event` or `command`.

        Raises UsageError if it has none.
        """
        kind = self.kind
        name = getattr(self, kind.name_field)
        for handler in kind.registry.handlers_of(kind.name_of(name)):
            if handler.is_class:
                made = handler.target()
                setattr(made, kind.noun, self)
                return made
        raise UsageError(f"{name} has no handler class")


class GenericMessage:
    """Mixed into the generic event and command, whose remaining fields stand in `fields`."""

    __slots__ = ()
    kind: ClassVar[MessageKind]
    fields: dict[str, Any]

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Any:
        """The generic message of these fields, as they stand on the wire. Raises UndecodableError."""
        return _generic(cls.kind, fields, None)

    def serialize(self, codec: str = "json") -> bytes:
        """The message as it goes over the wire, with every field that it came with."""
        name_field = self.kind.name_field
        own = {name: getattr(self, name) for name in _envelope_of(self.kind).__struct_fields__ if name != name_field}
        flat = {name_field: getattr(self, name_field), **own, **self.fields}
        return msgspec.msgpack.encode(flat) if codec == "msgpack" else msgspec.json.encode(flat)


@cache  # bounded by the kinds
def _envelope_of(kind: MessageKind) -> Any:
    """What generic messages of a kind have in common, as a type of its own: their class takes any name as its tag."""
    fields: list[Any] = [(kind.name_field, str, "")]
    for field in msgspec.structs.fields(kind.generic_class):
        if field.name != "fields":
            default = (
                field.default
                if field.default_factory is msgspec.NODEFAULT
                else msgspec.field(default_factory=field.default_factory)
            )
            fields.append((field.name, field.type, default))
    return msgspec.defstruct("Envelope", fields, kw_only=True)


def _generic(kind: MessageKind, fields: dict[str, Any], bound_name: str | None) -> Any:
    envelope = _envelope_of(kind)
    known = msgspec.convert(fields, envelope)
    name = getattr(known, kind.name_field)
    if bound_name is not None and name not in ("", bound_name):
        # As a typed message refuses a wrong tag: the value is then identified by its own name.
        raise UndecodableError(f"the value is a {name!r:.80}, its topic is bound to {bound_name!r}")
    name = name or bound_name
    if not name:
        raise UndecodableError(f"the value has no {kind.name_field}")
    names = envelope.__struct_fields__
    own = {field: fields[field] for field in fields if field not in names}
    generic = kind.generic_class
    message = generic(fields=own, **{field: getattr(known, field) for field in names if field != kind.name_field})
    vars(message).update({key: value for key, value in own.items() if not hasattr(generic, key)})
    vars(message)[kind.name_field] = name
    return message


def generic_decoders(kind: MessageKind, bound_name: str | None = None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(JSON, MessagePack) functions that decode a value into the kind's generic class.

    `bound_name` is taken for values without a tag, on a topic that is bound to one event or command.
    """
    decode_json = msgspec.json.Decoder(dict[str, Any]).decode
    decode_msgpack = msgspec.msgpack.Decoder(dict[str, Any]).decode
    return (
        lambda data: _generic(kind, decode_json(data), bound_name),
        lambda data: _generic(kind, decode_msgpack(data), bound_name),
    )


@cache  # bounded by the program's own classes
def decoders_of(message_type: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(JSON, MessagePack) decode functions of a type that msgspec knows, made once."""
    if getattr(message_type, "is_old_style", False):
        decoders: tuple[Callable[..., Any], Callable[..., Any]] = message_type.wire_decoders()
        return decoders
    return msgspec.json.Decoder(message_type).decode, msgspec.msgpack.Decoder(message_type).decode
