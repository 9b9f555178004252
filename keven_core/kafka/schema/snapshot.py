"""The snapshot: every registered event and command with its schema, topic and handlers, as plain data for a file.

    {
      "format": 1,
      "commands": {NAME: {...}},
      "events": {NAME: {"topic": ..., "key_field": ..., "handlers": [...], "schema": {"$ref": "#/types/OrderPlaced"}}},
      "topics": {TOPIC: {"topic": ..., "key_field": null, "handlers": [...], "schema": ...}},      foreign ones
      "types": {"OrderPlaced": {"type": "object", "properties": ..., "required": [...]}, ...}
    }

Schemas are JSON Schema as msgspec makes it, without titles and descriptions, which change nothing. What msgspec can't
describe is {"x-opaque": "module.Class"}. An event or command that has handlers and no class is {}: anything.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from msgspec import inspect

from keven_core.kafka.errors import RegistrationError
from keven_core.kafka.kinds import KINDS
from keven_core.kafka.registry import Handler
from keven_core.kafka.schema.changes import FIELDS, KEYS, OPAQUE, TAG, TYPE

__all__ = ["FORMAT", "Described", "describe", "schemas_of", "take_snapshot"]

FORMAT = 1

_REMARKS = ("title", "description", "examples", "discriminator")


@dataclass(frozen=True)
class Described:
    """What one registered name is.

    Attributes:
        section: where it stands in a snapshot: "events", "commands", or "topics" for foreign ones.
        name: the event's or command's name, or the topic.
        topic: where it is published.
        cls: the class of an event or command, or the type of a foreign topic's values; None: it has none.
        handlers: module and qualified name of each, sorted.
        codec: "json" or "msgpack" for a foreign topic that says so.
        schema: its JSON Schema, with references into the types.
    """

    section: str
    name: str
    topic: str
    cls: Any = None
    handlers: tuple[str, ...] = ()
    codec: str | None = None
    schema: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key_field(self) -> str | None:
        """The field that is the key; None: it has no such field."""
        return getattr(self.cls, "key_field", None)


def take_snapshot() -> dict[str, Any]:
    """The snapshot of what is registered in this process. Sorted, and the same for the same classes.

    Raises RegistrationError for two classes of one name, and for annotations that name nothing.
    """
    described, types = describe("#/types/")
    found: dict[str, Any] = {"format": FORMAT, "types": {name: _bare(node) for name, node in types.items()}}
    for one in described:
        found.setdefault(one.section, {})[one.name] = {
            "topic": one.topic,
            "key_field": one.key_field,
            "handlers": list(one.handlers),
            "schema": _bare(one.schema),
            **({"codec": one.codec} if one.codec is not None else {}),
        }
    plain: dict[str, Any] = json.loads(json.dumps(found))  # as it comes out of a file: lists, no tuples
    return plain


def _bare(node: Any) -> Any:
    """A schema without what is only said about it."""
    if isinstance(node, list):
        return [_bare(part) for part in node]
    if not isinstance(node, dict):
        return node
    return {
        name: value
        if name in ("default", "enum")
        else {field: _bare(part) for field, part in value.items()}
        if name == "properties"
        else _bare(value)
        for name, value in node.items()
        if name not in _REMARKS
    }


# --- what is registered ----------------------------------------------------------------------------------------------


def _registered() -> Iterator[Described]:
    foreign: dict[str, list[Handler]] = {}
    for kind in KINDS:
        registry = kind.registry
        for name in {*kind.classes, *registry.names()}:
            handlers = registry.handlers_of(name)
            yield Described(f"{kind.noun}s", name, kind.topic_of(name), kind.classes.get(name), _names(handlers))
        for topic in registry.foreign_topics():
            foreign.setdefault(topic, []).extend(registry.handlers_of(topic, foreign=True))
    for topic, handlers in foreign.items():
        value_type = None if handlers[0].value_type is bytes else handlers[0].value_type
        yield Described("topics", topic, topic, value_type, _names(handlers), handlers[0].codec)


def _names(handlers: Iterable[Handler]) -> tuple[str, ...]:
    return tuple(sorted({handler.qualified_name for handler in handlers}))


def describe(types_at: str) -> tuple[list[Described], dict[str, Any]]:
    """All that is registered, sorted, and the types that its schemas refer to; both with titles and descriptions.

    `types_at` is where they find them: "#/types/".
    """
    found = sorted(_registered(), key=lambda one: (one.section, one.name))
    labelled = {f"{one.section}.{one.name}": one.cls for one in found if one.cls is not None}
    schemas, types = schemas_of(labelled, types_at)
    return [replace(one, schema=schemas.get(f"{one.section}.{one.name}", {})) for one in found], types


def schemas_of(given: Mapping[str, Any], types_at: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON Schema of each type by its label, and of the types that they refer to by name. Raises RegistrationError.

    A class of one's own keeps its name; classes that share one, as the reports of commands do, go by their labels too.
    """
    owners = Counter(_name_of(cls) for cls in {id(cls): cls for cls in given.values()}.values())
    known = {label: cls for label, cls in given.items() if _can_be_described(cls)}
    single = {label: cls for label, cls in known.items() if owners[_name_of(cls)] == 1 or not isinstance(cls, type)}
    groups = [("", single), *((f"{label}.", {label: cls}) for label, cls in known.items() if label not in single)]
    schemas = {label: _opaque(cls) for label, cls in given.items() if label not in known}
    types: dict[str, Any] = {}
    for prefix, group in groups:
        made, components = _components(group.values(), f"{types_at}{prefix}{{name}}")
        types |= {f"{prefix}{name}": node for name, node in components.items()}
        annotator = _Annotator(types)
        for info, schema in zip(inspect.multi_type_info(group.values()), made, strict=True):
            annotator.annotate(info, schema)
        schemas |= zip(group, made, strict=True)
    return schemas, dict(sorted(types.items()))


def _components(types: Iterable[Any], ref_template: str) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    try:
        return msgspec.json.schema_components(types, schema_hook=_opaque, ref_template=ref_template)
    except KeyError as error:  # how msgspec takes it
        raise RegistrationError(
            f"two classes are called {_name_of(error.args[0])}: a snapshot tells types by their names; rename one"
        ) from error
    except NameError as error:
        names = ", ".join(map(_name_of, types))
        raise RegistrationError(
            f"{names} has an annotation that leads nowhere: {error}; the name has to stand in its module"
        ) from error


def _can_be_described(given: Any) -> bool:
    try:
        _components([given], "{name}")
    except RegistrationError:  # which is a TypeError too
        raise
    except TypeError:  # a default that JSON has no form for, a union that msgspec does not decode
        return False
    return True


def _opaque(cls: Any) -> dict[str, Any]:
    return {OPAQUE: _name_of(cls)}


def _name_of(cls: Any) -> str:
    return f"{cls.__module__}.{cls.__qualname__}" if isinstance(cls, type) else str(cls)


class _Annotator:
    """Adds to schemas what msgspec leaves out of them, see keven_core.kafka.schema.changes."""

    def __init__(self, components: dict[str, Any]) -> None:
        self._components = components
        self._seen: set[str] = set()

    def annotate(self, info: Any, node: dict[str, Any]) -> None:
        """Add it to a node, and to those below it."""
        while isinstance(info, inspect.Metadata):
            info = info.type
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            if name in self._seen:
                return
            self._seen.add(name)
            node = self._components[name]
        if isinstance(info, inspect.DateTimeType | inspect.TimeType):
            zone = {True: "aware ", False: "naive ", None: ""}[info.tz]
            node[TYPE] = zone + ("datetime" if isinstance(info, inspect.DateTimeType) else "time")
        elif isinstance(info, inspect.UnionType):
            node["anyOf"].sort(key=_is_null)  # where null stands depends on msgspec's version
            for part, member in zip(sorted(info.types, key=_place), _members(node), strict=True):
                self.annotate(part, member)
        elif isinstance(info, inspect.CollectionType):
            self.annotate(info.item_type, node.get("items", {}))
        elif isinstance(info, inspect.TupleType):
            for part, member in zip(info.item_types, node.get("prefixItems", ()), strict=True):
                self.annotate(part, member)
        elif isinstance(info, inspect.DictType):
            key = info.key_type.type if isinstance(info.key_type, inspect.Metadata) else info.key_type
            if not isinstance(key, inspect.StrType | inspect.AnyType):
                node[KEYS] = type(key).__name__.removesuffix("Type").lower()
            self.annotate(info.value_type, node.get("additionalProperties", {}))
        elif hasattr(info, "fields"):
            if getattr(info, "tag", None) is not None:
                node[TAG] = info.tag
            items = node.get("prefixItems", [])[len(node.get("prefixItems", [])) - len(info.fields) :]
            if items:
                node[FIELDS] = [part.encode_name for part in info.fields]
            for index, part in enumerate(info.fields):
                self.annotate(part.type, items[index] if items else node["properties"][part.encode_name])


def _members(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part in node["anyOf"]:
        if "anyOf" in part:
            yield from _members(part)
        else:
            yield part


def _is_null(node: dict[str, Any]) -> bool:
    return node.get("type") == "null"


def _place(info: Any) -> int:
    """msgspec describes a union's structs after its other members; None is at the end."""
    while isinstance(info, inspect.Metadata):
        info = info.type
    if isinstance(info, inspect.NoneType):
        return 2
    return int(isinstance(info, inspect.StructType) and not info.array_like)
