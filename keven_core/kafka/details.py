"""`BasicDetail`, and how the details of a pickled event or command are built from plain data.

The event's own `detail_class` decides what is built; the wire only fills in attributes. Objects within details become

- what the annotations of `detail_class` say, else
- a class of that name that stands in the module of `detail_class` and is plain (nothing of it runs when it is built or
  dropped), else
- a BasicDetail.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import sys
import typing
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec

from keven_core.kafka.envelope import vars_in_mro
from keven_core.kafka.errors import UndecodableError
from keven_core.kafka.plain_data import DEEP, TAGS, Reader, check_depth, own_slots, reserved_names

__all__ = ["BasicDetail", "DetailBuilder", "blank"]

logger = logging.getLogger("keven_core.kafka")


class BasicDetail:
    """Details without a fixed shape: attributes are whatever is assigned. A subclass gives defaults in its body.

    `BasicDetail(order_id=5)` sets attributes. Two are equal when class and attributes are.
    """

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def takes_no_arguments(call: Callable[..., Any], *given: Any) -> bool:
    """Whether a function can be called with what is `given` alone."""
    try:
        inspect.signature(call).bind(*given)
    except (TypeError, ValueError):
        return False
    return True


@cache  # bounded by the program's own classes
def maker_of(cls: Any) -> Callable[[], Any]:
    """What makes a new object of a program's own class: its __init__ if that needs no arguments, else without it."""
    if cls.__init__ is BasicDetail.__init__ or not takes_no_arguments(cls):
        return functools.partial(cls.__new__, cls)
    made: Callable[[], Any] = cls
    return made


def blank(cls: Any) -> Any:
    """A new object, as maker_of() says."""
    return maker_of(cls)()


def set_attributes(made: Any, attributes: dict[str, Any]) -> Any:
    """Set attributes of an object as they came over the wire, running nothing of its class."""
    cls: Any = type(made)
    reserved = reserved_names(cls)
    slots = own_slots(cls)
    # The envelope of a message has been checked; what stands in a state of jsonpickle has not.
    checked = getattr(cls, "__struct_fields__", ())
    for name, value in attributes.items():
        if name in checked:
            continue
        if name in slots:
            slots[name].__set__(made, value)
        elif name not in reserved and cls.__dictoffset__:
            object.__getattribute__(made, "__dict__")[name] = value
    return made


def _is_plain(cls: Any, module: str) -> bool:
    """Whether a class can be built and dropped without anything of it being run."""
    return (
        type(cls) is type
        and cls.__module__ == module
        and vars_in_mro(cls, "__new__") is vars(object)["__new__"]
        and cls.__base__ is not None
        and all(base.__flags__ & 1 << 9 for base in cls.__mro__[:-1])
        and not hasattr(cls, "__del__")
    )


@cache  # bounded by the program's own classes
def _neighbours(cls: type) -> dict[str, Any]:
    """The plain classes in the module of a class, by name."""
    module = cls.__module__
    if module.partition(".")[0] in ("builtins", "keven_core"):
        return {}
    found = vars(sys.modules[module]).values() if module in sys.modules else ()
    return {other.__qualname__: other for other in (*found, cls) if _is_plain(other, module)}


@cache  # bounded by the program's own classes
def _hints(cls: type) -> dict[str, Callable[[Any], Any]]:
    """How the attributes that a class has annotations for are converted; an old-style message keeps them apart."""
    try:
        hints = typing.get_type_hints(getattr(cls, "annotated", cls), include_extras=True)
    except Exception as error:
        # Names that only exist for type checkers, mostly. The annotations are then what they were: remarks.
        logger.debug("the annotations of %s.%s can't be read: %s", cls.__module__, cls.__qualname__, error)
        return {}
    return {
        name: _converter(hint)
        for name, hint in hints.items()
        if hint is not Any and typing.get_origin(hint) is not typing.ClassVar
    }


def _converter(hint: Any) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        try:
            return msgspec.convert(value, hint, dec_hook=_as_annotated)
        except (TypeError, msgspec.ValidationError):
            return value  # annotations of plain classes are not checked by Python either

    return convert


def _as_annotated(cls: Any, value: Any) -> Any:
    """A value as an annotation wants it; msgspec asks for classes that it does not know."""
    if isinstance(value, cls):
        return value
    attributes = vars(value) if isinstance(value, BasicDetail) else value
    if type(attributes) is not dict or not isinstance(cls, type):
        raise TypeError
    return _with_attributes(blank(cls), attributes)


def _with_attributes(made: Any, attributes: dict[str, Any]) -> Any:
    cls: Any = type(made)
    hints = _hints(cls)
    if hints:
        attributes = {name: hints[name](item) if name in hints else item for name, item in attributes.items()}
    return set_attributes(made, attributes)


class _DetailReader(Reader):
    """Reads one object's details into `top`; None: into a dict, for a class that checks its own fields."""

    def __init__(self, owner: type, top: Any) -> None:
        super().__init__()
        self._neighbours = _neighbours(owner)
        self._top = top
        self._as_dicts = top is None
        if self._as_dicts:
            # msgspec.convert() walks the whole of it, so what is shared would be walked again and again.
            self.shared_once = self.shared_once | {list, dict}

    def begin(self, class_name: str) -> Any:
        if self._as_dicts:
            return {}
        top, self._top = self._top, None
        if top is not None:
            return top
        # Only the name within the module counts, so that modules can be moved.
        parts = class_name.split(".")
        for start in range(len(parts)):
            cls = self._neighbours.get(".".join(parts[start:]))
            if cls is not None:
                return object.__new__(cls)
        return BasicDetail()

    def fill(self, made: Any, attributes: dict[str, Any]) -> Any:
        if self._as_dicts:
            made.update(attributes)
            return made
        return _with_attributes(made, attributes)


class DetailBuilder:
    """Builds objects of one class from plain data.

    Attributes:
        detail_class: the class.
        checks_fields: it is a struct, dataclass or dict: what comes over the wire is converted to it as a whole.
        names_to_look_at: names of attributes that need a closer look: tags, and what the wire may not set.
        make: makes an object without attributes from the wire.
        is_simple: without such names, and dicts and lists among the values, an object's __dict__ takes them all.
        takes_dict: its __dict__ may be that very dict, since no __init__ sets defaults.
    """

    def __init__(self, detail_class: Any) -> None:
        self.detail_class = detail_class
        self.checks_fields = not getattr(detail_class, "is_old_style", False) and (
            issubclass(detail_class, (msgspec.Struct, dict)) or dataclasses.is_dataclass(detail_class)
        )
        self.make = maker_of(detail_class)
        self.names_to_look_at = frozenset({*reserved_names(detail_class), *TAGS, *own_slots(detail_class)})
        self.is_simple = not self.checks_fields and detail_class.__dictoffset__ != 0 and not _hints(detail_class)
        self.takes_dict = (
            self.is_simple
            and isinstance(self.make, functools.partial)
            and vars_in_mro(detail_class, "__new__") is vars(object)["__new__"]
            and not inspect.isabstract(detail_class)
        )

    def make_or_none(self) -> Any:
        """An object without attributes from the wire. None: a struct with required fields, for a service to assign."""
        try:
            return self.make()
        except TypeError:
            return None

    def build(self, plain: Any) -> Any:
        """An object of the class, with the attributes in `plain`, a dict or the JSON text of one.

        Anything else, a list for example, is given back as it was read. Raises UndecodableError.
        """
        if type(plain) is not dict:
            if type(plain) is not str:
                return Reader().read(plain)
            plain = _parsed(plain)
            if type(plain) is not dict:
                return Reader().read(plain)
        if self.checks_fields:
            content = _DetailReader(self.detail_class, None).read(_as_object(plain))
            try:
                return msgspec.convert(content, self.detail_class)
            except msgspec.ValidationError as error:
                raise UndecodableError(f"the details are no {self.detail_class.__qualname__}: {error}") from error
        return self.fill(self.make(), plain)

    def fill(self, made: Any, plain: dict[str, Any]) -> Any:
        """Set the attributes of an object to what stands in `plain`; returns it."""
        if self.is_simple and DEEP.isdisjoint(map(type, plain.values())) and self.names_to_look_at.isdisjoint(plain):
            made.__dict__.update(plain)
            return made
        return _DetailReader(self.detail_class, made).read(_as_object(plain))


def _as_object(plain: dict[Any, Any]) -> dict[Any, Any]:
    """Details without a tag, or with one that leaves open whose they are, are the attributes of an object."""
    tags = {name for name in plain if type(name) is str and name.startswith("py/")}
    return plain if tags - {"py/state", "py/seq"} else {**plain, "py/object": ""}


def _parsed(text: str) -> Any:
    check_depth(text)
    try:
        return json.loads(text)  # not msgspec: it refuses the NaN that jsonpickle writes
    except ValueError as error:
        raise UndecodableError(f"the details are no JSON: {error}") from error
