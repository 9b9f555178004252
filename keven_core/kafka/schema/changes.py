"""What has changed between two snapshots, and which readers that breaks. Plain functions of two values, no I/O.

Two schemas are compared as writer and reader, in both directions at once:

    backward    can the new classes read what the old ones wrote?
    forward     can the old classes read what the new ones write?

A value counts as readable if msgspec decodes it in JSON and in MessagePack: a date is a str in both, bytes and times
with a zone are in JSON only. A field with a default may be missing, one without may not; fields that a reader does not
know are ignored, unless its struct forbids them.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from keven_core.kafka.errors import ConfigurationError
from keven_core.kafka.topics import folded

__all__ = ["BACKWARD", "DIRECTIONS", "Change", "alternatives", "compare", "kind_of", "spell"]

Node = Mapping[str, Any]
Types = Mapping[str, Node]

BACKWARD, FORWARD = "backward", "forward"
BOTH = frozenset((BACKWARD, FORWARD))
DIRECTIONS = {BACKWARD: frozenset((BACKWARD,)), FORWARD: frozenset((FORWARD,)), "full": BOTH}

# Keywords of our own, for what msgspec leaves out: a type that only its class can decode; a time that is described as a
# plain string; the type of a dict's keys, if it is not str; the tag of a struct; the names of fields that stand in an
# array.
OPAQUE, TYPE, KEYS, TAG, FIELDS = "x-opaque", "x-type", "x-keys", "x-tag", "x-fields"

# What reads what, besides its own kind: in JSON and in MessagePack.
_READ_AS = {
    "integer": ("number", "decimal"),
    "number": ("decimal",),
    "date": ("string",),
    "duration": ("string",),
    "uuid": ("string",),
    "decimal": ("string",),
    "time": ("string",),
    "aware time": ("string", "time"),
    "naive time": ("string", "time"),
    "aware datetime": ("datetime",),
    "naive datetime": ("string", "datetime"),
}
_KINDS = {"date-time": "aware datetime", "time": "aware time", "partial-time": "naive time"}
_KINDS |= {name: name for name in ("date", "duration", "uuid", "decimal")}

_AT_LEAST = ("minLength", "minItems", "minProperties")
_AT_MOST = ("maxLength", "maxItems", "maxProperties")
_LOW, _HIGH = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_BOUNDS = (*_LOW, *_HIGH, *_AT_LEAST, *_AT_MOST, "multipleOf", "pattern")


@dataclass(frozen=True)
class Change:
    """One difference between two snapshots.

    Attributes:
        path: what it is about, such as "event ORDER_PLACED.lines[].price".
        text: what has become of it.
        breaks: the directions that it breaks: "backward", "forward", both or none.
    """

    path: str
    text: str
    breaks: frozenset[str] = frozenset()

    def is_breaking(self, direction: str = BACKWARD) -> bool:
        """Whether it breaks `direction`: "backward", "forward" or "full". Raises ConfigurationError for others."""
        if direction not in DIRECTIONS:
            raise ConfigurationError(f"direction={direction!r} is not allowed: {', '.join(DIRECTIONS)}")
        return not self.breaks.isdisjoint(DIRECTIONS[direction])

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Everything that differs between two snapshots, sorted by path; see keven_core.kafka.schema.snapshot."""
    comparison = _Comparison(old["types"], new["types"])
    sections = sorted((old.keys() | new.keys()) - {"format", "types"})
    found = [
        change
        for section in sections
        for change in _section(comparison, section, old.get(section, {}), new.get(section, {}))
    ]
    return sorted(found, key=lambda change: (change.path, change.text))


def _section(comparison: _Comparison, section: str, old: Types, new: Types) -> Iterator[Change]:
    noun = section.removesuffix("s")
    spellings = defaultdict(set)
    for name in old.keys() | new.keys():
        spellings[folded(name)].add(name)
    for names in spellings.values():
        if len(names) > 1:
            first, *others = sorted(names)
            text = f"can't be told apart from {', '.join(others)}: names differ only in case, dots and underscores"
            yield Change(f"{noun} {first}", text, BOTH)
            continue
        (name,) = names
        path = f"{noun} {name}"
        if name not in new:
            yield Change(path, "removed", BOTH)
        elif name not in old:
            yield Change(path, "added")
        else:
            yield from _entry(comparison, path, old[name], new[name])


def _entry(comparison: _Comparison, path: str, old: Node, new: Node) -> Iterator[Change]:
    if old["topic"] != new["topic"]:
        yield Change(path, f"its topic {old['topic']} became {new['topic']}", BOTH)
    if old.get("codec") != new.get("codec"):
        yield Change(path, f"its codec {old.get('codec')} became {new.get('codec')}", BOTH)
    if old.get("key_field") != new.get("key_field"):
        text = f"key_field {old.get('key_field')} became {new.get('key_field')}: records of one key change partitions"
        yield Change(path, text)
    for handler in sorted(set(old["handlers"]) - set(new["handlers"])):
        yield Change(path, f"handler {handler} removed", BOTH)
    for handler in sorted(set(new["handlers"]) - set(old["handlers"])):
        yield Change(path, f"handler {handler} added")
    yield from comparison.walk(old["schema"], new["schema"], path)


class _Comparison:
    """Walks two schemas side by side."""

    def __init__(self, old_types: Types, new_types: Types) -> None:
        self._old_types, self._new_types = old_types, new_types
        self._under_way: set[tuple[int, int]] = set()

    def walk(self, old: Node, new: Node, path: str) -> Iterator[Change]:
        """The changes between two nodes. Where types contain themselves, a pair that is under way has been seen."""
        pair = (id(_resolve(old, self._old_types)), id(_resolve(new, self._new_types)))
        if pair in self._under_way:
            return
        self._under_way.add(pair)
        try:
            yield from self._unions(old, new, path)
        finally:
            self._under_way.remove(pair)

    def _unions(self, old: Node, new: Node, path: str) -> Iterator[Change]:
        olds = {_family(node): node for node in alternatives(old, self._old_types)}
        news = {_family(node): node for node in alternatives(new, self._new_types)}
        gone, come = olds.keys() - news.keys(), news.keys() - olds.keys()
        if gone or come:
            backward = all(any(self._reads(olds[name], node, BACKWARD) for node in news.values()) for name in gone)
            forward = all(any(self._reads(node, news[name], FORWARD) for node in olds.values()) for name in come)
            yield _became(path, spell(old, self._old_types), spell(new, self._new_types), backward, forward)
        for family in sorted(olds.keys() & news.keys()):
            yield from self._pair(olds[family], news[family], path)

    def _reads(self, old: Node, new: Node, direction: str) -> bool:
        """Whether one of the two reads the other, in this direction."""
        writer, reader = (old, new) if direction == BACKWARD else (new, old)
        if _shape(writer) or _shape(reader):
            return _is_any(reader) or not any(direction in change.breaks for change in self._pair(old, new, ""))
        return _accepts(writer, reader)

    def _pair(self, old: Node, new: Node, path: str) -> Iterator[Change]:
        shapes = (_shape(old), _shape(new))
        if shapes == ("struct", "struct"):
            yield from self._structs(old, new, path)
        elif shapes == ("dict", "dict"):
            yield from self._dicts(old, new, path)
        elif shapes == ("array", "array"):
            yield from self._arrays(old, new, path)
        elif shapes == ("struct", "dict"):
            yield _became(path, "a struct", "a dict", self._dict_reads(new, old, BACKWARD), False)
        elif shapes == ("dict", "struct"):
            yield _became(path, "a dict", "a struct", False, self._dict_reads(old, new, FORWARD))
        elif _leaf(old) != _leaf(new):
            yield _became(path, spell(old), spell(new), _accepts(old, new), _accepts(new, old))

    def _structs(self, old: Node, new: Node, path: str) -> Iterator[Change]:
        olds, news = old["properties"], new["properties"]
        needed_before, needed = set(old.get("required", ())), set(new.get("required", ()))
        closed_before, closed = old.get("additionalProperties") is False, new.get("additionalProperties") is False
        if closed != closed_before:
            yield Change(path, f"unknown fields are {'refused' if closed else 'ignored'} now")
        for name in sorted(olds.keys() | news.keys()):
            field = f"{path}.{name}"
            if name not in news:
                yield Change(field, "removed", _breaks(not closed, name not in needed_before))
                continue
            default = _default(news[name])
            if name not in olds:
                text = "added without a default" if name in needed else f"added with {default}"
                yield Change(field, text, _breaks(name not in needed, not closed_before))
                continue
            if name in needed - needed_before:
                yield Change(field, f"{_default(olds[name])} removed", _breaks(False, True))
            elif name in needed_before - needed:
                yield Change(field, f"{default} given", _breaks(True, False))
            elif default != _default(olds[name]):
                yield Change(field, f"{_default(olds[name])} became {default}")
            yield from self.walk(olds[name], news[name], field)

    def _dicts(self, old: Node, new: Node, path: str) -> Iterator[Change]:
        yield from _bounds_change(old, new, path)
        same_type = old.get(KEYS) == new.get(KEYS)
        olds, news = ({"type": "string", **node.get("propertyNames", {})} for node in (old, new))
        if not same_type or _leaf(olds) != _leaf(news):
            before, after = (f"keys {node.get(KEYS) or spell(names)}" for node, names in ((old, olds), (new, news)))
            fits = (same_type and _accepts(olds, news), same_type and _accepts(news, olds))
            yield _became(path, before, after, *fits)
        yield from self.walk(old.get("additionalProperties", {}), new.get("additionalProperties", {}), f"{path}{{}}")

    def _dict_reads(self, mapping: Node, struct: Node, direction: str) -> bool:
        """A dict reads a struct if all fields fit; a struct can't read any dict."""
        entry, fields = mapping.get("additionalProperties", {}), struct["properties"]
        sizes = {"minProperties": len(struct.get("required", ())), "maxProperties": len(fields)}
        if mapping.keys() & {KEYS, "propertyNames"} or not _bounds_fit(sizes, mapping):
            return False
        pairs = [(field, entry) if direction == BACKWARD else (entry, field) for field in fields.values()]
        return not any(direction in change.breaks for pair in pairs for change in self.walk(*pair, ""))

    def _arrays(self, old: Node, new: Node, path: str) -> Iterator[Change]:
        yield from _bounds_change(old, new, path)
        news = new.get(FIELDS, ())
        for index, name in enumerate(old.get(FIELDS, ())):
            if name in news and news.index(name) != index:
                # Readable as ever where the types are alike, and something else.
                yield Change(path, f"{name} moved from place {index + 1} to {news.index(name) + 1}", BOTH)
        count = max(len(old.get("prefixItems", ())), len(new.get("prefixItems", ())))
        for index in range(count + 1):
            before, after = _item(old, index), _item(new, index)
            if before is not None and after is not None:
                yield from self.walk(before, after, f"{path}[{index if index < count else ''}]")


def _breaks(backward_fits: bool, forward_fits: bool) -> frozenset[str]:
    return frozenset(name for name, fits in ((BACKWARD, backward_fits), (FORWARD, forward_fits)) if not fits)


def _became(path: str, before: str, after: str, backward_fits: bool, forward_fits: bool) -> Change:
    return Change(path, f"{before} became {after}", _breaks(backward_fits, forward_fits))


def _default(node: Node) -> str:
    return f"default {json.dumps(node['default'], ensure_ascii=False)}" if "default" in node else "a default"


# --- nodes -----------------------------------------------------------------------------------------------------------


def _resolve(node: Node, types: Types) -> Node:
    return types[node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def alternatives(node: Node, types: Types) -> list[Node]:
    """What a value can be: the members of a union, enums by the type of their values, or the node itself."""
    node = _resolve(node, types)
    if "anyOf" in node:
        members = [member for part in node["anyOf"] for member in alternatives(part, types)]
        return [member for member in members if _is_any(member)][:1] or members
    if "enum" in node:
        by_type: dict[type, list[Any]] = {}
        for value in node["enum"]:
            by_type.setdefault(type(value), []).append(value)
        return [{"enum": values} if values != [None] else {"type": "null"} for values in by_type.values()]
    return [node]


def _is_any(node: Node) -> bool:
    return not node.keys() & {"type", "enum", "anyOf", "$ref", OPAQUE}


def _shape(node: Node) -> str:
    if "properties" in node:
        return "struct"
    return {"object": "dict", "array": "array"}.get(node.get("type", ""), "")


def kind_of(node: Node) -> str:
    """What a node that is no union describes: "string", "date", "integer", "array", "any", "opaque" ..."""
    if OPAQUE in node:
        return "opaque"
    if "enum" in node:
        return {str: "string", int: "integer", float: "number", bool: "boolean"}[type(node["enum"][0])]
    if "contentEncoding" in node:
        return "bytes"
    kind = node.get("type", "any")
    return str(node.get(TYPE) or _KINDS.get(node.get("format", ""), kind) if kind == "string" else kind)


def _family(node: Node) -> str:
    """A union has one member of each: so does msgspec tell them apart."""
    if node.get("type") == "string":
        return "string"
    return f"{kind_of(node)} {node[TAG]}" if TAG in node else kind_of(node)


def _item(node: Node, index: int) -> Node | None:
    """An array's item; None: it has no such item, or ignores it."""
    prefix = node.get("prefixItems", ())
    if index < len(prefix):
        found: Node = prefix[index]
        return found
    return (node.get("items") or None) if prefix else node.get("items", {})


def _leaf(node: Node) -> tuple[Any, ...]:
    values = sorted(node["enum"]) if "enum" in node else None
    return (kind_of(node), values, node.get(OPAQUE), *map(node.get, _BOUNDS))


def _accepts(writer: Node, reader: Node) -> bool:
    """Whether whatever one leaf writes is read by the other."""
    if _is_any(reader):
        return True
    if "enum" in writer:
        return all(_accepts_value(value, reader) for value in writer["enum"])
    if "enum" in reader:
        return False
    kind, wanted = kind_of(writer), kind_of(reader)
    if kind == "opaque" or wanted == "opaque":
        return writer.get(OPAQUE) == reader.get(OPAQUE)
    return (kind == wanted or wanted in _READ_AS.get(kind, ())) and _bounds_fit(writer, reader)


def _accepts_value(value: Any, reader: Node) -> bool:
    if "enum" in reader:
        return value in reader["enum"] and type(value) is type(reader["enum"][0])
    if isinstance(value, str):
        fits = _bounds_fit({"minLength": len(value), "maxLength": len(value), "pattern": reader.get("pattern")}, reader)
        return kind_of(reader) == "string" and fits and re.search(reader.get("pattern", ""), value) is not None
    exactly = {"minimum": value, "maximum": value, "multipleOf": value}
    return kind_of(reader) in ("integer", "number", "decimal") and _bounds_fit(exactly, reader)


def _bounds_fit(writer: Node, reader: Node) -> bool:
    step, wanted_step = writer.get("multipleOf"), reader.get("multipleOf")
    return (
        all(writer.get(name, 0) >= reader.get(name, 0) for name in _AT_LEAST)
        and all(writer.get(name, math.inf) <= reader.get(name, math.inf) for name in _AT_MOST)
        and _limit(writer, _LOW, 1) >= _limit(reader, _LOW, 1)
        and _limit(writer, _HIGH, -1) >= _limit(reader, _HIGH, -1)
        and (wanted_step is None or (step is not None and step % wanted_step == 0))
        and reader.get("pattern") in (None, writer.get("pattern"))
    )


def _limit(node: Node, keywords: tuple[str, str], sign: int) -> tuple[float, bool]:
    """The strictest limit, upper ones negated: (limit, whether it is excluded itself)."""
    given = [(sign * node[name], name == keywords[1]) for name in keywords if name in node]
    return max(given, default=(-math.inf, False))


def _bounds_change(old: Node, new: Node, path: str) -> Iterator[Change]:
    if any(old.get(name) != new.get(name) for name in _BOUNDS):
        fits = (_bounds_fit(old, new), _bounds_fit(new, old))
        yield _became(path, _spell_bounds(old) or "any size", _spell_bounds(new) or "any size", *fits)


def _spell_bounds(node: Node) -> str:
    return ", ".join(f"{name} {node[name]}" for name in _BOUNDS if name in node)


def spell(node: Node, types: Types | None = None) -> str:
    """A node in words: "integer | null", "array of Line"."""
    if "$ref" in node and "enum" not in (types or {}).get(node["$ref"].rpartition("/")[2], {}):
        return str(node["$ref"].rpartition("/")[2])
    node = _resolve(node, types or {})
    if "anyOf" in node:
        return " | ".join(spell(part, types) for part in node["anyOf"])
    if "enum" in node:
        return "one of " + ", ".join(json.dumps(value, ensure_ascii=False) for value in node["enum"])
    shape, bounds = _shape(node), _spell_bounds(node)
    if shape == "array" and "prefixItems" in node:
        text = f"({', '.join(spell(part, types) for part in node['prefixItems'])})"
        return text
    if shape == "array":
        text = f"array of {spell(node.get('items', {}), types)}"
    elif shape == "dict":
        text = f"dict of {spell(node.get('additionalProperties', {}), types)}"
    else:
        text = shape or str(node.get(OPAQUE) or {"any": "anything"}.get(kind_of(node), kind_of(node)))
    return f"{text} ({bounds})" if bounds else text
