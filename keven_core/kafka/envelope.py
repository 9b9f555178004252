"""The wire shape of events and commands: one flat msgspec struct, its name first.

    {"event_name": "...", "uuid": "...", ... envelope fields ..., ... the event's own fields ...}

A command has `command_name` in its place.

`MessageMeta` turns a plain class body into such a struct:

    class OrderPlaced(Event):
        event_name = "ORDER_PLACED"
        key_field = "order_id"
        order_id: int
        customer: str = ""

New fields need defaults and types never change: golden bytes of every released shape are decoded in tests/schema.
Classes with an `__init__` or a payload of their own become old-style messages, see keven_core.kafka.oldstyle.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import operator
import sys
import types
import typing
import uuid
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from keven_core.kafka.errors import RegistrationError, UsageError
from keven_core.kafka.kinds import MessageKind
from keven_core.kafka.topics import folded

if TYPE_CHECKING:
    from msgspec import StructMeta
    from typing_extensions import dataclass_transform
else:
    StructMeta = type(msgspec.Struct)  # msgspec 0.19 does not export it

    def dataclass_transform(**options: Any) -> Any:
        """Nothing at run time: it tells type checkers how fields become constructor arguments (PEP 681)."""
        return lambda cls: cls


__all__ = ["MessageMeta", "dataclass_transform", "key_function", "key_of", "name_decoders", "register_class"]

# Values of these types hold no references, so they can't be part of a reference cycle.
_ATOMIC: frozenset[Any] = frozenset(
    {
        int,
        float,
        bool,
        str,
        bytes,
        type(None),
        None,
        datetime.datetime,
        datetime.date,
        datetime.time,
        datetime.timedelta,
        uuid.UUID,
        decimal.Decimal,
    }
)


_OLD_STYLE_METHODS = frozenset({"__init__", "serialize_payload", "parse_payload"})


def _is_atomic(annotation: Any) -> bool:
    if annotation in _ATOMIC:
        return True
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return True
    if origin is typing.Annotated:
        return _is_atomic(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return all(_is_atomic(part) for part in typing.get_args(annotation))
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def _holds_no_references(module: str, annotations: dict[str, Any]) -> bool:
    scope = vars(sys.modules.get(module, types))
    for annotation in annotations.values():
        resolved = annotation
        if isinstance(annotation, str):
            if annotation.startswith(("ClassVar", "typing.ClassVar")):
                continue
            try:
                # As typing.get_type_hints does: the text is the class body's own annotation, never data.
                resolved = eval(annotation, dict(scope))
            except Exception:
                return False
        if typing.get_origin(resolved) is ClassVar:
            continue
        try:
            if not _is_atomic(resolved):
                return False
        except TypeError:  # unhashable annotation
            return False
    return True


class MessageMeta(StructMeta):
    """Builds message structs and keeps the class of each name.

    The body's `event_name` becomes the struct's tag, so msgspec writes it first and refuses a wrong one. Fields are
    keyword-only, so those with defaults may come before those without. Structs whose fields can't be part of a
    reference cycle are made with gc=False: the garbage collector never visits them, which saves a third of the
    decoding time.
    """

    def __new__(
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        kind: MessageKind | None = None,
        **options: Any,
    ) -> Any:
        """Make the struct class; see the class docstring. Raises RegistrationError.

        `kind` is given by the base class of all events, and of all commands.
        """
        where = f"{namespace.get('__module__')}.{namespace.get('__qualname__')}"
        ancestors = [found for base in bases for found in base.__mro__ if isinstance(found, MessageMeta)]
        family = kind or next((found.kind for found in ancestors if hasattr(found, "kind")), None)
        if family is None or kind is not None:
            return mcls._make_base(name, bases, namespace, kind, options)
        message_name = namespace.pop(family.name_field, None)
        key_field = namespace.pop("key_field", None)
        root = next(found for found in ancestors if "kind" in vars(found))
        complete = None
        if _is_old_style(bases, namespace):
            from keven_core.kafka.oldstyle import OldStyleMeta, prepare

            mcls = OldStyleMeta
            bases, complete = prepare(bases, namespace, options, where)
        _redefine_defaults(root, namespace)
        if options.get("array_like"):
            raise RegistrationError(
                f"{where}: array_like=True leaves out the names of fields, and with it the {family.noun}'s"
            )
        if message_name is not None:
            options["tag"] = family.check_name(family.name_of(message_name))
            options["tag_field"] = family.name_field
        options.setdefault("kw_only", True)
        if "gc" not in options:
            # Never inherited: a base may hold no references where its subclass does.
            options["gc"] = bool(
                options.get("dict")
                or any(entry.startswith("__annotate_") for entry in namespace)  # deferred: Python 3.14
                or any(isinstance(base, MessageMeta) and base.__struct_config__.gc for base in bases)
                or any(base.__dictoffset__ for base in bases)  # a mixin without __slots__ gives instances a __dict__
                or not _holds_no_references(namespace.get("__module__", ""), namespace.get("__annotations__", {}))
            )
        try:
            cls: Any = super().__new__(mcls, name, bases, namespace, **options)
        except (TypeError, ValueError) as error:
            in_body = f"'{family.name_field}'" in str(error)
            hint = f"; write {family.name_field} without an annotation" if in_body else ""
            raise RegistrationError(f"{where} can't be made into a struct: {error}{hint}") from error
        if complete is not None:
            complete(cls)
        own_names = {attribute for base in root.__mro__ if isinstance(base, MessageMeta) for attribute in vars(base)}
        own_names -= set(root.__struct_fields__)
        for field in cls.__struct_fields__:
            if field in own_names:
                raise RegistrationError(
                    f"{where}: {field} can't be a field, since {root.__qualname__} has an attribute of that name; name "
                    f'it so on the wire only: `{field}_: ... = msgspec.field(name="{field}")`'
                )
        if key_field is not None:
            if complete is None and key_field not in cls.__struct_fields__:
                raise RegistrationError(
                    f"{where}: key_field {key_field!r} is not one of its fields: {', '.join(cls.__struct_fields__)}"
                )
            cls.key_field = key_field
        if message_name is not None:
            setattr(cls, family.name_field, options["tag"])
            register_class(cls, family)
        return cls

    @classmethod
    def _make_base(
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        kind: MessageKind | None,
        options: dict[str, Any],
    ) -> Any:
        """The base class of all messages, or of those of one kind."""
        cls: Any = super().__new__(mcls, name, bases, namespace, **options)
        if kind is not None:
            cls.kind = kind
            cls.classes = kind.classes
            cls.key_field = None
            setattr(cls, kind.name_field, "")
        return cls


def _is_old_style(bases: tuple[type, ...], namespace: dict[str, Any]) -> bool:
    """Whether a class has an __init__ or a payload of its own, or inherits one."""
    if not _OLD_STYLE_METHODS.isdisjoint(namespace) or any(getattr(base, "is_old_style", False) for base in bases):
        return True
    mixins = [base for base in bases if not isinstance(base, MessageMeta)]
    return any(not _OLD_STYLE_METHODS.isdisjoint(vars(found)) for base in mixins for found in base.__mro__[:-1])


def _redefine_defaults(root: Any, namespace: dict[str, Any]) -> None:
    """Take `is_audit_event = True` in a class body for what it means: another default of that field."""
    given = [name for name in root.__struct_fields__ if name in namespace]
    if not given or any(entry.startswith("__annotate_") for entry in namespace):
        return
    types_of = {field.name: field.type for field in msgspec.structs.fields(root)}
    annotations = namespace.get("__annotations__", {})
    namespace["__annotations__"] = {**annotations, **{n: types_of[n] for n in given if n not in annotations}}


def register_class(cls: Any, kind: MessageKind) -> Any:
    """Keep the class under its name; returns it.

    Raises RegistrationError when it has none, or when another one can't be told apart from it.
    """
    own_name = getattr(cls, kind.name_field, None)
    if not own_name or getattr(cls, "kind", None) is not kind:
        raise RegistrationError(f"{cls!r:.200} is no {kind.noun} class with {kind.a_noun} name")
    for name, other in kind.classes.items():
        if folded(name) != folded(own_name):
            continue
        if (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__):
            continue  # the same class again, after a reload or as __main__ of a worker
        if name == own_name and vars(other).get("made"):
            continue  # a service's own class takes the place of one that was made for it
        raise RegistrationError(
            f"{cls.__module__}.{cls.__qualname__} ({own_name!r}) and {other.__module__}.{other.__qualname__} "
            f"({name!r}) have names that can't be told apart on the wire; rename one of the {kind.noun}s"
        )
    kind.classes[own_name] = cls
    kind.named(own_name)
    return cls


@cache  # bounded by the kinds
def name_decoders(name_field: str) -> tuple[Callable[[Any], str | None], Callable[[Any], str | None]]:
    """(JSON, MessagePack) functions that give the name in a value, wherever it stands; None: it has none.

    They raise what msgspec raises.
    """
    name_only = msgspec.defstruct("NameOnly", [(name_field, str | None, None)])
    decode_json, decode_msgpack = msgspec.json.Decoder(name_only).decode, msgspec.msgpack.Decoder(name_only).decode
    return lambda data: getattr(decode_json(data), name_field), lambda data: getattr(decode_msgpack(data), name_field)


def key_of(message: Any) -> bytes | None:
    """The Kafka key of an event or command: what its `key()` method returns, else the field named by `key_field`.

    str and bytes are taken as they are; int, UUID and str enums by their text. None: no key.
    """
    find = key_function(type(message))  # type: ignore[arg-type]  # mypy: a class would not be hashable
    return None if find is None else find(message)


@cache  # bounded by the program's own classes
def key_function(cls: type) -> Callable[[Any], bytes | None] | None:
    """What finds the key of a class's messages, see key_of(); None: they have none."""
    method: Any = vars_in_mro(cls, "key")
    field: str | None = getattr(cls, "key_field", None)
    if isinstance(method, types.FunctionType):
        find: Callable[[Any], Any] = method
    elif field is not None:
        find = operator.attrgetter(field)
    else:
        return None
    return lambda message: _as_key(find(message), cls)


def _as_key(value: Any, cls: type) -> bytes | None:
    kind = type(value)
    if kind is str:
        return str(value).encode()
    if kind is int:
        return b"%d" % value
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, (int, uuid.UUID)) and not isinstance(value, bool):
        return str(value).encode()
    raise UsageError(
        f"the key of {cls.__qualname__} is a {type(value).__name__}; str, bytes, int, UUID or None are allowed"
    )


def vars_in_mro(cls: type, name: str) -> Any:
    """The attribute `name` as it stands in a class body, not bound; None if no class of the MRO defines it."""
    for base in cls.__mro__:
        if name in vars(base):
            return vars(base)[name]
    return None
