"""Values of old-style messages as plain data: what JSON and MessagePack have no word for is written with a tag.

    to_plain(value)    object -> dict, list, str, int, float, bool, None (and bytes, for MessagePack)
    Reader().read(x)   plain data -> values; also what jsonpickle has written

A tag is the one key of a dict, or stands beside attributes, and begins with `py/`:

    py/object    name of the class; the attributes of the object stand beside it
    py/datetime, py/date, py/time, py/timedelta, py/decimal, py/uuid, py/b64, py/int, py/float
    py/tuple, py/set, py/frozenset    elements
    py/dict      [key, value] pairs of a dict whose keys are not all strings

Nothing that a tag names is imported, looked up in a module or called: the values above are made by the table in here,
and what becomes of an object is up to whoever subclasses Reader. Tags of jsonpickle that mean more than data
(functions, constructors with arguments) give their data.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import enum
import functools
import inspect
import math
import types
import uuid
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec

from keven_core.kafka.errors import UndecodableError, UsageError

__all__ = [
    "DEEP",
    "TAGS",
    "Reader",
    "all_to_plain",
    "attributes_of",
    "check_depth",
    "own_slots",
    "reserved_names",
    "sendable",
    "to_plain",
]

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, or by an extension module


# --- writing ---------------------------------------------------------------------------------------------------------


@cache  # bounded by the program's own classes
def reserved_names(cls: type) -> frozenset[str]:
    """Names that the wire may not give values to: methods, properties, and what Python itself uses."""
    names = set()
    for base in cls.__mro__:
        for name, value in vars(base).items():
            if (name.startswith("__") and name.endswith("__")) or (
                hasattr(type(value), "__get__") and not inspect.ismemberdescriptor(value)
            ):
                names.add(name)
    return frozenset(names)


@cache  # bounded by the program's own classes
def own_slots(cls: type) -> dict[str, Any]:
    """What `__slots__` of a class and its bases have made, by the name that each is stored under."""
    members = (item for base in reversed(cls.__mro__) for item in vars(base).items())
    return {name: value for name, value in members if inspect.ismemberdescriptor(value)}


@cache  # bounded by the program's own classes
def _slots_of(cls: Any) -> dict[str, str] | None:
    """Attributes that a class keeps outside __dict__: the name of each on the wire; None: its objects are no data."""
    if not cls.__flags__ & _HEAP_TYPE or issubclass(cls, (type, types.ModuleType, BaseException)):
        return None
    if issubclass(cls, msgspec.Struct):
        return dict(zip(cls.__struct_fields__, cls.__struct_encode_fields__, strict=True))
    names = {name: name for name in own_slots(cls)}
    return names if names or cls.__dictoffset__ else None


@cache  # bounded by the program's own classes
def _derived(cls: type) -> frozenset[str]:
    """Attributes that hold what a class has worked out from others, and would work out again."""
    return frozenset(
        name for base in cls.__mro__ for name, value in vars(base).items()
        if isinstance(value, functools.cached_property)
    )  # fmt: skip


def attributes_of(value: Any, where: str) -> dict[str, Any] | None:
    """Attributes of an object of a class written in Python: its __dict__ and __slots__; None: it is no such object.

    As sendable() lets them through.
    """
    cls: Any = type(value)
    slots = _slots_of(cls)
    if slots is None:
        return None
    attributes: dict[str, Any] = dict(getattr(value, "__dict__", ()))
    if slots:
        own = {on_wire: getattr(value, name) for name, on_wire in slots.items() if hasattr(value, name)}
        attributes = {**own, **attributes}
    return sendable(cls, attributes, where)


def sendable(cls: type, attributes: dict[str, Any], where: str) -> dict[str, Any]:
    """The attributes of an object without those of cached properties, which are taken out of the dict.

    Raises UsageError for names that would not arrive; `where` says whose they are.
    """
    for name in _derived(cls):
        attributes.pop(name, None)
    for name in attributes:
        if type(name) is not str or name.startswith("py/"):
            raise UsageError(f"{where} has an attribute {name!r:.80}, which can't be told from a tag")
    hidden = reserved_names(cls).intersection(attributes)
    if hidden:
        raise UsageError(
            f"{where}.{min(hidden)} would hide a method of that name where it arrives: give the attribute another name"
        )
    return attributes


def to_plain(value: Any, *, where: str, binary: bool = False) -> Any:
    """A value as plain data; `where` says in errors what it is. `binary`: bytes stay bytes.

    Raises UsageError for what is no data (functions, files, locks) and for data that contains itself.
    """
    return _Writer(binary).write(value, where)


def all_to_plain(attributes: dict[str, Any], *, where: str, binary: bool = False) -> dict[str, Any]:
    """The values of a dict as plain data, whose keys are names of attributes of `where`; as to_plain()."""
    return {
        name: value
        if (cls := type(value)) is str or value is None or cls is bool or (cls is int and -_SMALL < value < _SMALL)
        else to_plain(value, where=f"{where}.{name}", binary=binary)
        for name, value in attributes.items()
    }


_SMALL = 1 << 63


class _Writer:
    def __init__(self, binary: bool) -> None:
        self._binary = binary
        self._under_way: set[int] = set()

    def write(self, value: Any, where: str) -> Any:
        cls = type(value)
        if cls is str or cls is bool or value is None:
            return value
        if cls is int:
            return value if -(1 << 63) <= value < 1 << 64 else {"py/int": _digits(value, where)}
        if cls is float:
            return value if math.isfinite(value) else {"py/float": str(value)}
        if cls is bytes and self._binary:
            return value
        write_value = _VALUES.get(cls)
        if write_value is not None:
            return write_value(value)
        if id(value) in self._under_way:
            raise UsageError(f"{where} contains itself; what goes over the wire has to end somewhere")
        self._under_way.add(id(value))
        try:
            return self._write_container(value, where)
        finally:
            self._under_way.discard(id(value))

    def _write_container(self, value: Any, where: str) -> Any:
        if isinstance(value, enum.Enum):
            return self.write(value.value, where)
        if isinstance(value, dict):
            if all(type(key) is str and not key.startswith("py/") for key in value):
                return {key: self.write(item, f"{where}[{key!r:.40}]") for key, item in value.items()}
            return {
                "py/dict": [
                    [self.write(key, f"a key of {where}"), self.write(item, f"{where}[{key!r:.40}]")]
                    for key, item in value.items()
                ]
            }
        for base, tag in _SEQUENCES:
            if isinstance(value, base):
                items = [self.write(item, f"{where}[{index}]") for index, item in enumerate(value)]
                return {tag: items} if tag else items
        for scalar in _SCALARS:
            if isinstance(value, scalar):
                return self.write(scalar.__new__(scalar, value), where)
        for base, write_value in _VALUES.items():
            if isinstance(value, base):
                return write_value(value)
        attributes = attributes_of(value, where)
        if attributes is None:
            raise UsageError(
                f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which is no data: leave it out of "
                f"what goes over the wire, or write it yourself in serialize_payload()"
            )
        plain = {name: self.write(item, f"{where}.{name}") for name, item in attributes.items()}
        return {"py/object": f"{type(value).__module__}.{type(value).__qualname__}", **plain}


def _digits(value: int, where: str) -> str:
    try:
        return str(value)
    except ValueError as error:  # Python's own limit, which holds for whoever reads it too
        raise UsageError(f"{where} is too large a number: {error}") from None


def _write_timedelta(value: datetime.timedelta) -> dict[str, Any]:
    return {"py/timedelta": [value.days, value.seconds, value.microseconds]}


def _iso(value: datetime.datetime | datetime.time) -> Any:
    # ISO 8601 has no word for `fold`, which tells the second of two equal times when a clock is set back.
    return [value.isoformat(), value.fold] if value.fold else value.isoformat()


def _from_iso(cls: Any, content: Any) -> Any:
    if type(content) is list:
        return cls.fromisoformat(content[0]).replace(fold=content[1])
    return cls.fromisoformat(content)


def _write_bytes(value: Any) -> dict[str, Any]:
    return {"py/b64": base64.b64encode(value).decode()}


_VALUES: dict[type, Callable[[Any], dict[str, Any]]] = {
    datetime.datetime: lambda value: {"py/datetime": _iso(value)},
    datetime.date: lambda value: {"py/date": value.isoformat()},
    datetime.time: lambda value: {"py/time": _iso(value)},
    datetime.timedelta: _write_timedelta,
    decimal.Decimal: lambda value: {"py/decimal": str(value)},
    uuid.UUID: lambda value: {"py/uuid": str(value)},
    bytes: _write_bytes,
    bytearray: _write_bytes,
    memoryview: _write_bytes,
}

_SCALARS: tuple[Any, ...] = (str, int, float)

_SEQUENCES: tuple[tuple[Any, str], ...] = (
    (list, ""),
    (tuple, "py/tuple"),
    (set, "py/set"),
    (frozenset, "py/frozenset"),
)


_EXACT = frozenset(
    {
        *(str, int, float, bool, complex, bytes, type(None), decimal.Decimal, uuid.UUID),
        *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone),
    }
)


# --- reading ---------------------------------------------------------------------------------------------------------


def check_depth(text: str | bytes) -> None:
    """Raise UndecodableError for JSON text that is nested so deep that reading it would end in a RecursionError."""
    from keven_core._native.dispatch import check_nesting

    check_nesting(text.encode(errors="replace") if isinstance(text, str) else bytes(text))


class Reader:
    """Reads plain data, once. A subclass says what objects become: begin() and fill()."""

    # What py/id must not refer to.
    shared_once: frozenset[type] = frozenset({tuple, set, frozenset})

    def __init__(self) -> None:
        # What `py/id` counts, as jsonpickle does: lists, dicts, objects, values that were made by a constructor.
        self._made: list[Any] = []

    def begin(self, class_name: str) -> Any:
        """A new object for `py/object`, still without attributes. Whatever `class_name` says is only data."""
        return {}

    def fill(self, made: Any, attributes: dict[str, Any]) -> Any:
        """Give an object its attributes; returns it."""
        made.update(attributes)
        return made

    def read(self, plain: Any) -> Any:
        """The value of plain data. Raises UndecodableError."""
        if type(plain) is dict:
            return self._read_dict(plain)
        if type(plain) is list:
            items: list[Any] = []
            self._made.append(items)
            items.extend([self.read(item) for item in plain])
            return items
        return plain

    def _read_dict(self, plain: dict[Any, Any]) -> Any:
        tags = [key for key in plain if type(key) is str and key.startswith("py/")]
        if not tags:
            made: dict[Any, Any] = {}
            self._made.append(made)
            made.update({key: self.read(item) for key, item in plain.items()})
            return made
        if "py/object" in plain:
            return self._read_object(plain)
        tag = tags[0]
        content = plain[tag]
        if tag == "py/id":
            return self._made_before(content)
        if tag == "py/reduce":
            return self._read_reduce(content)
        make = _MAKE.get(tag)
        if make is not None:
            exact = tag not in _COLLECTIONS
            return _made(make, self.read_items(content) if type(content) is list else content, tag, exact=exact)
        rest = {key: self.read(item) for key, item in plain.items() if key not in tags}
        # A function, a class, a module, whatever: the name of it, as text.
        return rest or self.read(content)

    def read_items(self, plain: Any) -> list[Any]:
        """The elements of a list or `py/tuple` that does not count for `py/id` itself."""
        if type(plain) is dict and len(plain) == 1:
            plain = next(iter(plain.values()))
        return [self.read(item) for item in plain] if type(plain) is list else []

    def _made_before(self, number: Any) -> Any:
        if type(number) is not int or not 0 <= number < len(self._made):
            raise UndecodableError("py/id refers to nothing that came before it")
        made = self._made[number]
        if type(made) in self.shared_once:
            # Nested, a few hundred bytes of these would be walked 2**n times by whoever hashes or copies them.
            raise UndecodableError(f"py/id refers to a {type(made).__name__}")
        return made

    def _read_object(self, plain: dict[Any, Any]) -> Any:
        class_name = plain["py/object"]
        make = _OBJECTS.get(class_name) if type(class_name) is str else None
        if make is not None:
            number = len(self._made)
            self._made.append(None)
            self._made[number] = _made(lambda value: make(self, value), plain, class_name, exact=False)
            return self._made[number]
        made = self.begin(str(class_name))
        self._made.append(made)
        attributes = self._attributes(plain)
        if not attributes and "py/seq" in plain:
            return self.read_items(plain["py/seq"])
        return self.fill(made, attributes)

    def _attributes(self, plain: dict[Any, Any]) -> dict[str, Any]:
        attributes: dict[str, Any] = {}
        for key, item in plain.items():
            if type(key) is not str:
                continue
            if not key.startswith("py/"):
                attributes[key] = self.read(item)
            elif key == "py/state":
                attributes.update(_names_of(self.read(item)))
            elif key not in ("py/object", "py/seq"):
                self.read(item)  # arguments of a constructor that does not run; what is in there counts for py/id
        return attributes

    def _read_reduce(self, content: Any) -> Any:
        parts = content if type(content) is list else []
        number = len(self._made)
        self._made.append(None)
        function = parts[0] if parts else None
        name = next(iter(function.values()), None) if type(function) is dict else function
        name = name if type(name) is str else ""
        arguments = self.read_items(parts[1]) if len(parts) > 1 else []
        make = _CONSTRUCTORS.get(name)
        if make is not None:
            made = _made(lambda values: make(*values), arguments, name, exact=name not in _COLLECTIONS)
            for items in parts[3:5]:
                made = _extended(made, self.read_items(items))
            self._made[number] = made
            return made
        if name.rpartition(".")[2] in ("__newobj__", "_reconstructor", "newobj") and arguments:
            name, arguments = arguments[0] if type(arguments[0]) is str else "", arguments[1:]
        state = _names_of(self.read(parts[2])) if len(parts) > 2 else {}
        items = [item for part in parts[3:5] for item in self.read_items(part)]
        if state or not (arguments or items):
            self._made[number] = self.fill(self.begin(name), state)
        else:
            # Not made, since that would run it: what it would have been made of. For an enum member that is its value.
            self._made[number] = items or (arguments[0] if len(arguments) == 1 else arguments)
        return self._made[number]


def _names_of(state: Any) -> dict[str, Any]:
    """The attributes in the state of an object: a dict, or (dict, slots)."""
    parts = state if type(state) in (tuple, list) else [state]
    return {name: item for part in parts if type(part) is dict for name, item in part.items() if type(name) is str}


def _extended(made: Any, items: list[Any]) -> Any:
    if type(made) is dict:
        made.update(_pairs(items))
    elif type(made) is list:
        made.extend(items)
    return made


def _made(make: Callable[[Any], Any], content: Any, tag: str, *, exact: bool) -> Any:
    """What a constructor makes of what stands behind a tag.

    It is given nothing but exact builtin types (it sees to that itself where not `exact`), so that no code of a class
    runs which the wire has named; and the error shows none of the content, which may be as large as it likes.
    """
    if exact:
        _check_exact(content, tag)
    try:
        return make(content)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        if isinstance(error, UndecodableError):
            raise
        raise UndecodableError(f"no {tag} can be made of a {type(content).__name__}: {error!s:.200}") from error


def _check_exact(value: Any, tag: str) -> None:
    """Raise UndecodableError unless a value is of builtin types, all through its lists, tuples, sets and dicts."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if type(item) in (list, tuple, set, frozenset):
            waiting.extend(item)
        elif type(item) is dict:
            waiting.extend(item.values())
        elif type(item) not in _EXACT:
            raise UndecodableError(f"no {tag} can be made of a {type(item).__name__}")


def _keys(items: Any, what: str) -> list[Any]:
    """Elements of a set or keys of a dict, that may be hashed: of builtin types, and not made to have one hash."""
    if type(items) not in (list, tuple):
        raise UndecodableError(f"no {what} can be made of a {type(items).__name__}")
    for item in items:
        if type(item) in (list, dict, set):
            raise UndecodableError(f"a {type(item).__name__} can't be in a {what}")
        _check_exact(item, what)
    if len(items) > 64 and len({hash(item) for item in items}) < len(items) // 8:
        raise UndecodableError(f"the elements of a {what} are made to collide")
    return list(items)


def _list(items: Any) -> list[Any]:
    if type(items) not in (list, tuple, set, frozenset):
        raise UndecodableError(f"no list can be made of a {type(items).__name__}")
    return list(items)


def _complex(reader: Reader, plain: dict[str, Any]) -> complex:
    parts = reader.read_items(plain["py/newargs"])
    _check_exact(parts, "complex")
    return complex(*parts)


def _set(items: Any) -> set[Any]:
    return set(_keys(items, "set"))


def _frozenset(items: Any) -> frozenset[Any]:
    return frozenset(_keys(items, "frozenset"))


def _pairs(items: Any) -> dict[Any, Any]:
    if type(items) not in (list, tuple) or any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in items):
        raise UndecodableError("the pairs of a dict are not pairs")
    _keys([pair[0] for pair in items], "dict")
    return {key: item for key, item in items}  # noqa: C416  # dict(items) would take pairs of characters too


def _zone(zone: Any) -> datetime.tzinfo | None:
    if zone is None or isinstance(zone, datetime.tzinfo):
        return zone
    raise ValueError("its time zone is not known; write it with a fixed offset or in UTC")


def _from_state(reader: Reader, plain: dict[str, Any]) -> Any:
    """datetime, date and time as jsonpickle writes them: the bytes that pickle would."""
    _, arguments = plain["__reduce__"]
    state = base64.b64decode(arguments[0], validate=True)
    zone = _zone(reader.read(arguments[1])) if len(arguments) > 1 else None
    if len(state) == 4:
        return datetime.date(state[0] * 256 + state[1], state[2], state[3])
    # Python 3.6 and later keep `fold` in the highest bit of the month, or of the hour.
    fold = state[-8 if len(state) == 10 else -6] >> 7
    micro = int.from_bytes(state[-3:], "big")
    if len(state) == 6:
        return datetime.time(state[0] & 127, state[1], state[2], micro, zone, fold=fold)
    year, month, day, hour, minute, second = state[0] * 256 + state[1], state[2] & 127, *state[3:7]
    return datetime.datetime(year, month, day, hour, minute, second, micro, zone, fold=fold)


def _timezone_of(reader: Reader, plain: dict[str, Any]) -> datetime.timezone:
    return datetime.timezone.utc


_OBJECTS: dict[str, Callable[[Reader, dict[str, Any]], Any]] = {
    "datetime.datetime": _from_state,
    "datetime.date": _from_state,
    "datetime.time": _from_state,
    "uuid.UUID": lambda reader, plain: uuid.UUID(hex=plain["hex"]),
    "dateutil.tz.tz.tzutc": _timezone_of,
    "builtins.complex": _complex,
}

_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "datetime.timedelta": datetime.timedelta,
    "datetime.timezone": datetime.timezone,
    "decimal.Decimal": lambda text: decimal.Decimal(text),
    "pytz._UTC": lambda: datetime.timezone.utc,
    "pytz._p": lambda name, seconds=0, *_: datetime.timezone(datetime.timedelta(seconds=seconds)),
    "builtins.set": lambda items=(): _set(_list(items)),
    "builtins.frozenset": lambda items=(): _frozenset(_list(items)),
    "collections.OrderedDict": lambda items=(): _pairs(items),
    "collections.defaultdict": lambda *_: {},
    "collections.deque": lambda items=(), *_: _list(items),
}

_MAKE: dict[str, Callable[[Any], Any]] = {
    "py/datetime": lambda content: _from_iso(datetime.datetime, content),
    "py/date": datetime.date.fromisoformat,
    "py/time": lambda content: _from_iso(datetime.time, content),
    "py/timedelta": lambda parts: datetime.timedelta(*parts),
    "py/decimal": lambda text: decimal.Decimal(text),
    "py/uuid": lambda text: uuid.UUID(text),
    "py/b64": lambda text: base64.b64decode(text, validate=True),
    "py/int": lambda text: int(text),
    "py/float": lambda text: float(text),
    "py/tuple": lambda items: tuple(_list(items)),
    "py/set": _set,
    "py/frozenset": _frozenset,
    "py/dict": _pairs,
}

# Those that look at what they are given themselves: their elements may be objects.
_COLLECTIONS = frozenset(
    {
        *("py/tuple", "py/set", "py/frozenset", "py/dict"),
        *("builtins.set", "builtins.frozenset"),
        *("collections.OrderedDict", "collections.deque", "collections.defaultdict"),
    }
)

DEEP = frozenset({dict, list})
"""Types of plain data that can stand for more than themselves."""

TAGS = frozenset(
    {*_MAKE, "py/object", "py/state", "py/seq", "py/id", "py/reduce", "py/newargs", "py/newargsex", "py/initargs"}
    | {"py/type", "py/function", "py/module", "py/repr", "py/ref", "py/iterator", "py/property", "py/bytes", "py/b85"}
)
"""Tags that are known, of ours and of jsonpickle."""
