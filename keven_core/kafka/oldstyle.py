"""Old-style events and commands: plain classes with an `__init__`, payloads written by hand, pickled details.

    class OrderPlaced(Event):                       class PaymentReceived(PickledEvent):
        event_name = "ORDER_PLACED"                     event_name = "PAYMENT_RECEIVED"
                                                        detail_class = PaymentDetail
        def __init__(self, order_id=None, **envelope):
            super().__init__(**envelope)
            self.order_id = order_id

A class is old-style when its body has `__init__`, `serialize_payload` or `parse_payload`, or a base of it is. It is a
struct of the envelope's fields with a `__dict__`, made under a metaclass of its own, so that typed classes pay
nothing for it. On the wire it is the same flat object; after the envelope comes

    payload, payload_bytes    what serialize_payload() has returned, str or bytes, if the service has overridden it;
                              parse_payload() gets the same
    details, offloads         the attributes of `details` of a pickled message, and which of them lie in files
    its own attributes        otherwise; `py/attributes` lists those the class does not tell of (known_attributes)

On arrival `__init__` runs if it needs no arguments, then the envelope is set, then the payload.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
from msgspec import UNSET, UnsetType

from keven_core.kafka.codecs import BUILT_IN
from keven_core.kafka.details import BasicDetail, DetailBuilder, takes_no_arguments
from keven_core.kafka.envelope import MessageMeta
from keven_core.kafka.errors import RegistrationError, UndecodableError, UsageError
from keven_core.kafka.kinds import MessageKind
from keven_core.kafka.large_attributes import Offload, manager_of
from keven_core.kafka.plain_data import all_to_plain, attributes_of, check_depth, own_slots, sendable, to_plain

__all__ = ["OldStyle", "OldStyleMeta", "Pickled", "prepare"]

# Struct fields that hold what came over the wire until it is parsed.
_PAYLOAD_FIELDS: dict[str, tuple[str, Any]] = {
    "_wire_payload": ("payload", str),
    "_wire_payload_bytes": ("payload_bytes", bytes),
}
_DETAIL_FIELDS: dict[str, tuple[str, Any]] = {
    "details": ("details", Any),
    "_wire_offloads": ("offloads", dict[str, Offload]),
}
_ATTRIBUTE_FIELDS: dict[str, tuple[str, Any]] = {"_wire_attributes": ("py/attributes", list[str])}

_make_struct = type(msgspec.Struct).__call__
_copy_struct: Callable[[Any], Any] = operator.attrgetter("__copy__")(msgspec.Struct)


class OldStyleMeta(MessageMeta):
    """Makes the struct by msgspec's constructor, then runs the class's own `__init__` on it."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new message: the envelope's defaults, then `__init__`."""
        message = _make_struct(cls)
        message._begin()
        message.__init__(*args, **kwargs)
        return message


class OldStyle:
    """Mixed into old-style classes by their metaclass; what they inherit beside Event or Command."""

    __slots__ = ()
    is_old_style: ClassVar[bool] = True
    kind: ClassVar[MessageKind]

    def __init__(self, **envelope: Any) -> None:
        """Set fields of the envelope, each given by its name: namespace, originator, created ..."""
        if not envelope:
            return
        cls: Any = type(self)
        fields = envelope_of(cls)
        for name, value in envelope.items():
            if name not in fields:
                raise TypeError(
                    f"{cls.__qualname__}.__init__() got an unexpected keyword argument {name!r}; the envelope "
                    f"has {', '.join(fields)}"
                )
            setattr(self, name, value)

    def _begin(self) -> None:
        """Before `__init__`, which need not call that of its base."""

    # --- the payload, for services to override -----------------------------------------------------------------------

    def serialize_payload(self) -> Any:
        """What the message carries beside the envelope; by default its attributes as JSON text.

        Override it together with parse_payload(), which is called with what it has returned; None: nothing is carried.
        """
        return msgspec.json.encode(self._own_attributes(binary=False)).decode()

    def parse_payload(self, payload: str | bytes) -> None:
        """Take over what serialize_payload() has returned where the message came from.

        Called in the thread that decodes, once for each message. An exception makes the record undecodable.
        """
        check_depth(payload)
        try:
            attributes = msgspec.json.decode(payload)
        except ValueError as error:
            raise UndecodableError(f"the payload is no JSON: {error}") from error
        if type(attributes) is not dict:
            raise UndecodableError(f"the payload is no JSON object but {type(attributes).__name__}")
        cls: Any = type(self)
        builder_of(cls).fill(self, _own_only(cls, attributes))

    # --- the wire ----------------------------------------------------------------------------------------------------

    def serialize(self, codec: str = "json") -> bytes:
        """The message as it goes over the wire; `codec` is "json", "msgpack" or the name of a registered one.

        By a registered codec, what serialize_payload() returns is its payload. Raises UsageError for a message without
        a name, and for one that holds what is no data.
        """
        cls: Any = type(self)
        name_field = cls.kind.name_field
        name = getattr(self, name_field)
        if not name:
            raise UsageError(f"{cls.__qualname__} has no {name_field}, so nobody could tell what it is")
        if codec not in BUILT_IN:
            from keven_core.kafka.message import encode_by

            return encode_by(codec, self)
        carried = self._carried(binary=codec == "msgpack")
        slots = _carrying_slots(cls)
        if slots and name_field not in vars(self):
            # Nothing but fields of the struct: a copy of it is encoded, which is faster and leaves this one alone.
            flat: Any = _copy_struct(self)
            for on_wire, slot in slots:
                setattr(flat, slot, carried.get(on_wire, UNSET))
            if None in _text_getter(cls)(self):
                for field in _text_fields(cls):
                    setattr(flat, field, getattr(self, field) or "")
        else:
            flat = {name_field: cls.kind.name_of(name)}
            for field, value in zip(envelope_of(cls), envelope_getter(cls)(self), strict=True):
                flat[field] = "" if value is None and field in _text_fields(cls) else value
            flat.update(carried)
        try:
            return msgspec.msgpack.encode(flat) if codec == "msgpack" else msgspec.json.encode(flat)
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"{cls.__qualname__} can't be written as {codec}: {error}") from error

    def _carried(self, *, binary: bool) -> dict[str, Any]:
        """What stands on the wire after the envelope."""
        cls: Any = type(self)
        if not has_own_payload(cls):
            own = self._own_attributes(binary=binary)
            unknown = [name for name in own if name not in known_attributes(cls)]
            return {"py/attributes": unknown, **own} if unknown else own
        payload = self.serialize_payload()
        if isinstance(payload, str):
            return {"payload": payload}
        if payload is None:
            return {}
        if not isinstance(payload, (bytes, bytearray, memoryview)):
            raise UsageError(
                f"{cls.__qualname__}.serialize_payload() has returned a {type(payload).__name__}; str, bytes or None "
                f"are allowed"
            )
        return {"payload_bytes": payload}

    def _own_attributes(self, *, binary: bool) -> dict[str, Any]:
        cls: Any = type(self)
        own = {name: value for name, value in vars(self).items() if name != cls.kind.name_field}
        return all_to_plain(sendable(cls, own, cls.__qualname__), where=cls.__qualname__, binary=binary)

    @classmethod
    def blank(cls) -> Any:
        """A new message by `__init__` if that needs no arguments, else without it."""
        if takes_no_arguments(cls.__init__, None):
            return cls()
        message = _make_struct(cls)
        message._begin()
        return message

    @classmethod
    def wire_decoders(cls) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """(JSON, MessagePack) functions that decode a value into this class."""
        from keven_core.kafka._oldstyle_decoding import decoder_of

        return decoder_of(cls, msgspec.json.Decoder), decoder_of(cls, msgspec.msgpack.Decoder)

    # --- as plain objects --------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        cls: Any = type(self)
        fields = {name: getattr(self, name) for name in cls.__struct_fields__ if not name.startswith("_wire_")}
        fields.update(vars(self))
        return f"{cls.__qualname__}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        cls: Any = type(self)
        return _rebuilt, (cls, {name: getattr(self, name) for name in cls.__struct_fields__}, vars(self))

    def __copy__(self) -> Any:
        make, (cls, fields, attributes) = self.__reduce__()
        return make(cls, fields, attributes)


def _rebuilt(cls: Any, fields: dict[str, Any], attributes: dict[str, Any]) -> Any:
    """A copy of a message: by none of its own code."""
    message = _make_struct(cls, **fields)
    message.__dict__.update(attributes)
    return message


class Pickled(OldStyle):
    """Base of PickledEvent and PickledCommand: what it carries are the attributes of `details`.

    Class attributes:
        detail_class: the class of the details; BasicDetail by default. It alone decides what is built on arrival.
        large_attributes: names of str and bytes attributes of the details that are put into a file when they are large;
            see keven_core.kafka.large_attributes.
        large_attribute_manager: where those files are kept; None: as the settings say.
    """

    if TYPE_CHECKING:
        details: Any
        _wire_offloads: Any
        large_attributes: ClassVar[Sequence[str]]
    else:
        __slots__ = ()
    detail_class: ClassVar[Any] = BasicDetail

    def __init__(self, details: Any = None, **envelope: Any) -> None:
        super().__init__(**envelope)
        if details is not None:
            self.details = details

    def _begin(self) -> None:
        self.details = builder_of(self.detail_class).make_or_none()

    def serialize_payload(self) -> Any:
        """The details as JSON text; of those in files, their paths, and `offloads`, their names.

        Raises UsageError when one that has arrived as bytes still lies in its file: load_large_attributes() is missing.
        """
        cls: Any = type(self)
        names = [name for name in cls.large_attributes if isinstance(getattr(self.details, name, None), str)]
        if not names:
            return msgspec.json.encode(self._plain_details(binary=False)).decode()
        offloads = self._offload(names)
        plain = self._plain_details(binary=False, left_out=("offloads", *offloads))
        for name, offload in offloads.items():
            if not offload.is_text:
                raise UsageError(
                    f"{cls.__qualname__}.details.{name} lies in a file, which a payload can only say of text: call "
                    f"load_large_attributes() before it is sent on"
                )
            plain[name] = str(manager_of(cls).folder / offload.path)
        plain["offloads"] = list(offloads)
        return msgspec.json.encode(plain).decode()

    def parse_payload(self, payload: str | bytes) -> None:
        """Take the details from JSON text, also from text that jsonpickle has written."""
        text = payload if isinstance(payload, str) else bytes(payload).decode()
        self.details = builder_of(self.detail_class).build(text)
        cls: Any = type(self)
        if cls.large_attributes:
            # Whichever way it has come: what it refers to is in the folder, or it is refused.
            self._wire_offloads = manager_of(cls).arrived(self.details, {}, cls.large_attributes)

    def load_large_attributes(self) -> None:
        """Read the attributes that lie in files into `details`, which lists none of them any more. Blocks.

        Raises UndecodableError when a file is gone or is not what was written.
        """
        if self._wire_offloads is not UNSET:
            manager_of(type(self)).load(self.details, self._wire_offloads)
            self._wire_offloads = UNSET

    def _carried(self, *, binary: bool) -> dict[str, Any]:
        cls: Any = type(self)
        if has_own_payload(cls):
            return super()._carried(binary=binary)
        if isinstance(self.details, str):
            # As JSON text, which is what text in the place of the details is taken for.
            return {"details": msgspec.json.encode(self.details).decode()}
        names = cls.large_attributes
        if not names:
            return {"details": self._plain_details(binary=binary)}
        offloads = self._offload(names)
        plain = self._plain_details(binary=binary, left_out=("offloads", *offloads))
        return {"details": plain, "offloads": offloads} if offloads else {"details": plain}

    def _offload(self, names: Sequence[str]) -> dict[str, Offload]:
        """Those of the named attributes that lie in files, after the large ones have been put there."""
        manager = manager_of(type(self))
        offloads = manager.offload(self, self.details, names)
        if self._wire_offloads is UNSET:
            return offloads
        return {**manager.still_in_files(self.details, self._wire_offloads), **offloads}

    def _plain_details(self, *, binary: bool, left_out: tuple[str, ...] = ()) -> Any:
        details, where = self.details, f"{type(self).__qualname__}.details"
        if isinstance(details, dict) and not builder_of(self.detail_class).checks_fields:
            # Said to be a dict: an object of the detail_class would be made of one that looks like its attributes.
            return {"py/dict": [to_plain(pair, where=where, binary=binary) for pair in map(list, details.items())]}
        attributes = None if isinstance(details, _NO_ATTRIBUTES) else attributes_of(details, where)
        if attributes is None:
            return to_plain(details, where=where, binary=binary)
        if left_out:
            attributes = {name: value for name, value in attributes.items() if name not in left_out}
        return all_to_plain(attributes, where=where, binary=binary)


# What is written by what it contains, also when it is a subclass that has attributes.
_NO_ATTRIBUTES = (dict, list, tuple, set, frozenset, str, bytes, int, float, enum.Enum)


# --- facts of a class, looked up once --------------------------------------------------------------------------------


@cache  # bounded by the program's own classes
def envelope_of(cls: Any) -> tuple[str, ...]:
    """The fields of the envelope."""
    return tuple(name for name in cls.__struct_fields__ if not name.startswith("_wire_") and name != "details")


@cache
def envelope_getter(cls: Any) -> Callable[[Any], tuple[Any, ...]]:
    return operator.attrgetter(*envelope_of(cls))


@cache
def _text_fields(cls: Any) -> frozenset[str]:
    """Fields that are written as "" when a service has set them to None."""
    root = next(base for base in cls.__mro__ if "kind" in vars(base))
    return frozenset(field.name for field in msgspec.structs.fields(root) if field.type is str)


@cache
def _text_getter(cls: Any) -> Callable[[Any], tuple[Any, ...]]:
    return operator.attrgetter(*_text_fields(cls))


@cache
def _carrying_slots(cls: Any) -> tuple[tuple[str, str], ...]:
    """(name on the wire, field) of what the message carries, where that is fields only and not its own attributes."""
    if not getattr(cls, cls.kind.name_field) or not (has_own_payload(cls) or issubclass(cls, Pickled)):
        return ()
    slots = {**_PAYLOAD_FIELDS, **_DETAIL_FIELDS, **_ATTRIBUTE_FIELDS}
    return tuple((on_wire, slot) for slot, (on_wire, _) in slots.items() if slot in cls.__struct_fields__)


@cache
def has_own_payload(cls: Any) -> bool:
    """Whether a service has overridden how its payload is written or read."""
    own = (OldStyle, Pickled)
    return any(
        name in vars(base)
        for base in cls.__mro__
        if base not in own
        for name in ("serialize_payload", "parse_payload")
    )  # fmt: skip


@cache
def known_attributes(cls: Any) -> frozenset[str]:
    """Attributes that a class tells of: those that `__init__` sets without arguments, and those with annotations."""
    # Only their names count, so that it does not matter whether what they say can be looked up.
    known = {name for base in cls.annotated.__mro__ for name in vars(base).get("__annotations__", ())}
    if takes_no_arguments(cls.__init__, None):
        known.update(vars(cls()))
    return frozenset(known.difference(cls.__struct_fields__, (cls.kind.name_field,)))


@cache
def builder_of(cls: Any) -> DetailBuilder:
    """What builds details, or sets attributes of an event itself."""
    return DetailBuilder(cls if cls is not None else BasicDetail)


def _own_only(cls: Any, attributes: dict[str, Any]) -> dict[str, Any]:
    taken = cls.__struct_fields__
    name_field = cls.kind.name_field
    return {name: value for name, value in attributes.items() if name != name_field and name not in taken}


# --- making the class ------------------------------------------------------------------------------------------------


def prepare(
    bases: tuple[type, ...], namespace: dict[str, Any], options: dict[str, Any], where: str
) -> tuple[tuple[type, ...], Callable[[Any], None]]:
    """Ready the body of an old-style class for msgspec: (its bases, what completes the class once it is made).

    Called by MessageMeta. Raises RegistrationError.
    """
    bodies = {name: namespace.pop(name) for name in ("__init__",) if name in namespace}
    # Annotations are remarks about attributes here, not fields; they are kept where msgspec does not look.
    remarks = {name: namespace.pop(name) for name in tuple(namespace) if name.startswith("__annotat")}
    bases_remarks = tuple(vars(base)["annotated"] for base in bases if "annotated" in vars(base))
    bodies["annotated"] = type("annotated", bases_remarks, {"__module__": namespace.get("__module__"), **remarks})
    if not any(issubclass(base, OldStyle) for base in bases):
        first = next(index for index, base in enumerate(bases) if isinstance(base, MessageMeta))
        bases = (*bases[:first], OldStyle, *bases[first:])
    # msgspec takes no base that has an __init__ in its own body, but one that has inherited it.
    bases = tuple(_wrapped(base) if _is_mixin_with_init(base) else base for base in bases)
    present = {name for base in bases if isinstance(base, MessageMeta) for name in base.__struct_fields__}
    wire = _PAYLOAD_FIELDS if _carries_payload(bases, namespace) else {}
    if any(issubclass(base, Pickled) for base in bases):
        wire = {**wire, **_DETAIL_FIELDS}
    wire = wire or _ATTRIBUTE_FIELDS
    fields = {name: of for name, of in wire.items() if name not in present}
    namespace["__annotations__"] = {
        name: type_ if type_ is Any else type_ | UnsetType for name, (_, type_) in fields.items()
    }
    namespace.update({name: msgspec.field(default=UNSET, name=wire_name) for name, (wire_name, _) in fields.items()})
    options.update(dict=True, eq=False, weakref=True, gc=True)

    def complete(cls: Any) -> None:
        required = [
            name
            for name, default in zip(cls.__struct_fields__, _defaults(cls), strict=True)
            if default is msgspec.NODEFAULT
        ]
        if required:
            raise RegistrationError(
                f"{where} has an __init__ or a payload of its own, and a base whose field {required[0]!r} has no "
                f"default: give it one"
            )
        for name, value in bodies.items():
            setattr(cls, name, value)
        if issubclass(cls, Pickled) and cls.large_attributes and not _takes_any(cls.detail_class, "offloads"):
            raise RegistrationError(
                f"{where} has large_attributes, and its detail_class {cls.detail_class.__qualname__} has no attribute "
                f"offloads, which lists those that lie in files: give it one, offloads: list[str]"
            )

    return bases, complete


def _takes_any(detail_class: Any, name: str) -> bool:
    """Whether objects of a class can have an attribute of that name."""
    return bool(detail_class is None or detail_class.__dictoffset__ or name in own_slots(detail_class))


def _is_mixin_with_init(base: type) -> bool:
    return not isinstance(base, MessageMeta) and "__init__" in vars(base)


@cache  # bounded by the program's own classes
def _wrapped(base: type) -> type:
    return type(base)(base.__name__, (base,), {"__slots__": (), "__module__": base.__module__})


def _defaults(cls: Any) -> tuple[Any, ...]:
    missing = len(cls.__struct_fields__) - len(cls.__struct_defaults__)
    return (*[msgspec.NODEFAULT] * missing, *cls.__struct_defaults__)


def _carries_payload(bases: tuple[type, ...], namespace: dict[str, Any]) -> bool:
    return (
        "serialize_payload" in namespace
        or "parse_payload" in namespace
        or any(has_own_payload(base) for base in bases)
    )  # fmt: skip
