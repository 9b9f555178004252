"""`Message`, the base of events and commands: the envelope's fields, and how values become messages."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

import msgspec

from keven_core.kafka.codecs import BUILT_IN, ProtobufEnvelopeCodec, codec_named
from keven_core.kafka.envelope import MessageMeta, dataclass_transform
from keven_core.kafka.errors import KevenError, UndecodableError, UsageError
from keven_core.kafka.kinds import MessageKind

__all__ = ["GenericMessage", "Message", "decoders_of", "encode_by", "envelope_decoder", "generic_decoders"]


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
        """The message as it goes over the wire; `codec` is "json", "msgpack" or the name of a registered one.

        Raises UsageError for a message without a name, or that the codec can't take; ConfigurationError for a codec
        that is not registered.
        """
        kind = type(self).kind
        if not getattr(self, kind.name_field):
            raise UsageError(f"{type(self).__qualname__} has no {kind.name_field}, so nobody could tell what it is")
        if codec not in BUILT_IN:
            return encode_by(codec, self)
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

    @classmethod
    def from_protobuf(cls, envelope: Any) -> Any:
        """The event or command in a protobuf envelope: an object of the class that protoc has generated for a service.

        The class has the fields that ProtobufEnvelopeCodec asks for. Raises ConfigurationError if it has not, and
        UndecodableError for a content that can't be read.
        """
        message_class: Any = type(envelope)
        codec = _protobuf_codec(message_class)
        try:
            name, fields, payload = codec.decode(envelope.SerializeToString())
            return envelope_decoder(cls.kind, name)(name, fields, payload)
        except UndecodableError:
            raise
        except Exception as error:
            raise UndecodableError(f"the envelope can't be decoded: {type(error).__name__}: {error}") from error

    def create_handler(self) -> Any:
        """A new instance of the first handler class of this event or command, which has it as `event` or `command`.

        Raises UsageError if it has none.
        """
        kind = type(self).kind
        name = getattr(self, kind.name_field)
        for handler in kind.registry.handlers_of(kind.name_of(name)):
            if handler.is_class:
                made = handler.target()
                setattr(made, kind.noun, self)
                return made
        raise UsageError(f"{name} has no handler class")


@cache  # bounded by the program's own classes
def _protobuf_codec(message_class: Any) -> ProtobufEnvelopeCodec:
    return ProtobufEnvelopeCodec(message_class)


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
        """The message as it goes over the wire, with every field that it came with; `codec` is as of other messages."""
        if codec not in BUILT_IN:
            return encode_by(codec, self)
        name_field = type(self).kind.name_field
        own = {
            name: getattr(self, name) for name in _envelope_of(type(self).kind).__struct_fields__ if name != name_field
        }
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


# --- envelopes of other codecs ---------------------------------------------------------------------------------------

# What a codec's envelope has fields for; the rest of a message is its payload.
ENVELOPE_FIELDS = tuple(Message.__struct_fields__)
# The generic message's field for a payload that is no JSON object.
_PAYLOAD = "payload"


def envelope_decoder(kind: MessageKind, name: str | None) -> Callable[[str, dict[str, Any], bytes], Any]:
    """A function that makes a message of what a codec has read: its name, fields of the envelope, payload.

    It gives an object of the class of `name`. An old-style one parses the payload, which it gets as bytes; else that is
    the JSON of its own fields. Without a class it is a generic message; `name` None: under whatever name was read.
    Raises what decoding raises.
    """
    from keven_core._native.dispatch import check_nesting

    cls = kind.classes.get(name) if name is not None else None
    if cls is None:

        def decode_generic(found: str, fields: dict[str, Any], payload: bytes) -> Any:
            own = _own_fields(payload, check_nesting)
            return _generic(kind, {**own, **fields, kind.name_field: name or found}, None)

        return decode_generic
    if cls.is_old_style:
        decode_msgpack = decoders_of(cls)[1]
        own_name = kind.name_of(getattr(cls, kind.name_field))

        def parse(found: str, fields: dict[str, Any], payload: bytes) -> Any:
            # By the class's own decoder, so that the envelope is checked, and set when `__init__` runs.
            message = decode_msgpack(msgspec.msgpack.encode({**fields, kind.name_field: own_name}))
            message.parse_payload(payload)
            return message

        return parse
    decode_json = decoders_of(cls)[0]
    encode = msgspec.json.Encoder().encode
    opening = b'{"' + kind.name_field.encode() + b'":' + encode(name)

    def decode_typed(found: str, fields: dict[str, Any], payload: bytes) -> Any:
        # Put together as our own flat JSON, the envelope's fields last, so that they count; it is read once, by the
        # decoder that JSON has. What is malformed stays so: its braces would have to match in what it becomes.
        own = payload.strip()
        if own[:1] != b"{" or own[-1:] != b"}":
            if own:
                raise UndecodableError(f"{name}: the payload has to be the JSON object of its fields")
            own = b"{}"
        parts = [opening]
        for part in (own[1:-1].strip(), encode(fields)[1:-1]):
            if part:
                parts += (b",", part)
        parts.append(b"}")
        value = b"".join(parts)
        check_nesting(value)
        return decode_json(value)

    return decode_typed


def _own_fields(payload: bytes, check_nesting: Callable[[bytes], None]) -> dict[str, Any]:
    """The fields of a payload that is a JSON object; of others, one field that holds it."""
    if not payload:
        return {}
    try:
        check_nesting(payload)
        own = msgspec.json.decode(payload)
    except (ValueError, UndecodableError):
        own = None
    return own if isinstance(own, dict) else {_PAYLOAD: payload}


def _take_apart(message: Any) -> tuple[str, dict[str, Any], bytes]:
    """The reverse, for a codec's encode(): (name, fields of the envelope, payload)."""
    kind: MessageKind = type(message).kind
    name = getattr(message, kind.name_field)
    fields = {field: getattr(message, field) for field in ENVELOPE_FIELDS}
    if message.is_old_style:
        payload = message.serialize_payload()
        fields = {field: str(value) if isinstance(value, uuid.UUID) else value for field, value in fields.items()}
        if getattr(message, "is_audit_event", False):
            fields["is_audit_event"] = True  # a typed event has it in its payload
        return kind.name_of(name), fields, payload.encode() if isinstance(payload, str) else bytes(payload or b"")
    if isinstance(message, GenericMessage) and list(message.fields) == [_PAYLOAD]:
        payload = message.fields[_PAYLOAD]
        if isinstance(payload, bytes):
            return name, fields, payload
    flat = msgspec.json.decode(message.serialize("json"), type=dict[str, msgspec.Raw])
    for field in (kind.name_field, *ENVELOPE_FIELDS):
        flat.pop(field, None)
    if not getattr(message, "is_audit_event", True):
        del flat["is_audit_event"]  # the default; old consumers know nothing of it
    return name, fields, msgspec.json.encode(flat)


def encode_by(codec: str, message: Any) -> bytes:
    """A message in a registered codec. Raises ConfigurationError if there is none, UsageError if it can't take it."""
    try:
        return codec_named(codec).encode(*_take_apart(message))
    except KevenError:
        raise
    except Exception as error:
        raise UsageError(
            f"the codec {codec!r} can't encode {type(message).__qualname__}: {type(error).__name__}: {error}"
        ) from error
