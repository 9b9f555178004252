"""Golden bytes: examples of every event and command as its class writes them, which every later release has to decode.

Examples are made from the schema, the same ones each time: every field has a value, containers hold one item, and there
are as many examples as the widest union has members, so that each of them occurs. Where a value can't be guessed (a
pattern, a custom type) the field's `Meta(examples=[...])` is taken.
"""

from __future__ import annotations

import base64
import datetime
import math
from collections.abc import Mapping
from typing import Any

import msgspec

from keven_core.kafka.message import decoders_of
from keven_core.kafka.schema.changes import KEYS, OPAQUE, alternatives, kind_of
from keven_core.kafka.schema.snapshot import Described

__all__ = ["Bytes", "bytes_of", "undecodable"]

# One example in both codecs, as a golden file keeps it: {"json": text, "msgpack": base64}.
Bytes = dict[str, str]

_TEXTS = {
    "aware datetime": "2020-02-29T12:30:45.678901Z",
    "naive datetime": "2020-02-29T12:30:45.678901",
    "datetime": "2020-02-29T12:30:45.678901Z",
    "aware time": "12:30:45.678901Z",
    "naive time": "12:30:45.678901",
    "time": "12:30:45.678901",
    "date": "2020-02-29",
    "duration": "P1DT30S",
    "uuid": "00000000-0000-4000-8000-000000000001",
    "decimal": "1.50",
}
_KEYS: dict[str, str] = {"int": "1", "float": "1.5", **{kind: text for kind, text in _TEXTS.items() if " " not in kind}}


def bytes_of(message: Described, types: Mapping[str, Any]) -> list[Bytes]:
    """The golden bytes of the present class of an event or command; without a class there are none.

    Arguments:
        message, types: as `snapshot.describe` gives them.

    Raises ValueError, with the reason, when no example can be made.
    """
    if message.cls is None:
        return []
    if getattr(message.cls, "is_old_style", False):
        return [_old_style_bytes(message.cls)]
    made: list[Bytes] = []
    count = number = 0
    while number <= count:
        maker = _Examples(types, number)
        try:
            value = maker.make(message.schema)
            entry = _in_both_codecs(decoders_of(message.cls)[0](msgspec.json.encode(value)))
        except _Unknown as error:
            raise ValueError(f"no example can be made of {error}; Meta(examples=[...]) gives one") from None
        except Exception as error:  # the class's own code may raise anything
            raise ValueError(f"its class refuses the example: {error}; Meta(examples=[...]) gives another") from error
        if entry not in made:
            made.append(entry)
        number, count = number + 1, maker.count - 1
    return made


def _in_both_codecs(instance: Any) -> Bytes:
    packed = base64.b64encode(instance.serialize("msgpack")).decode()
    return {"json": instance.serialize("json").decode(), "msgpack": packed}


def _old_style_bytes(cls: Any) -> Bytes:
    """Of what its `__init__` makes without arguments: schemas don't tell what its payload is."""
    try:
        made = [_in_both_codecs(_fixed(cls())) for _ in range(2)]
    except Exception as error:
        raise ValueError(f"an old-style class is made without arguments for this: {error}") from error
    if made[0] != made[1]:
        raise ValueError("an old-style class whose payload is another one each time that it is made")
    return made[0]


def _fixed(message: Any) -> Any:
    message.uuid = _TEXTS["uuid"]
    message.created = datetime.datetime(2020, 2, 29, 12, 30, 45, 678901, tzinfo=datetime.timezone.utc)
    return message


def undecodable(cls: Any, kept: Mapping[str, str]) -> str | None:
    """Why the present class can't decode kept bytes; None: it can. `cls` is None where handlers get generic ones."""
    decode_json, decode_msgpack = decoders_of(dict[str, Any] if cls is None else cls)
    try:
        decode_json(kept["json"].encode())
        decode_msgpack(base64.b64decode(kept["msgpack"]))
    except Exception as error:  # as above; a server would dead-letter the record
        return str(error) or type(error).__name__
    return None


class _Unknown(Exception):
    """No value can be made up for what it names."""


class _Examples:
    """Makes the example number `number`; `count` is how many there are, once it has been made."""

    def __init__(self, types: Mapping[str, Any], number: int) -> None:
        self._types, self._number = types, number
        self._open: set[int] = set()
        self.count = 1

    def make(self, node: Mapping[str, Any]) -> Any:
        """An example of a node, as JSON has it. Raises _Unknown."""
        if node.get("examples"):
            return node["examples"][self._number % len(node["examples"])]
        options = alternatives(node, self._types)
        self.count = max(self.count, len(options))
        start = self._number % len(options)
        unknown = []
        for option in options[start:] + options[:start]:
            if id(option) in self._open:
                unknown.append("a type that contains itself")
                continue
            self._open.add(id(option))
            try:
                return self._value(option)
            except _Unknown as error:
                unknown.append(str(error))
            finally:
                self._open.remove(id(option))
        raise _Unknown(unknown[0])

    def _value(self, node: Mapping[str, Any]) -> Any:
        kind = kind_of(node)
        if "enum" in node:
            return node["enum"][self._number % len(node["enum"])]
        if kind == "object":
            return self._struct(node) if "properties" in node else self._dict(node)
        if kind == "array":
            return self._array(node)
        if kind in ("string", "any") and not node.get("pattern"):
            shortest = node.get("minLength", 0)
            return ("text" + "x" * max(0, shortest - 4))[: node.get("maxLength", shortest + 4)]
        if kind == "bytes":
            return base64.b64encode(b"\x00\xff" + bytes(node.get("minLength", 0) * 3 // 4)).decode()
        if kind in ("integer", "number"):
            return _number(node, 1 if kind == "integer" else 0.5)
        simple: dict[str, Any] = {"boolean": True, "null": None, **_TEXTS}
        if kind not in simple:
            raise _Unknown(str(node.get(OPAQUE, f"a {kind}")))
        return simple[kind]

    def _struct(self, node: Mapping[str, Any]) -> dict[str, Any]:
        made = {}
        for name, field in node["properties"].items():
            try:
                made[name] = self.make(field)
            except _Unknown as error:
                if name in node.get("required", ()):
                    raise _Unknown(f"{name}: {error}") from None
        return made

    def _dict(self, node: Mapping[str, Any]) -> dict[str, Any]:
        try:
            key = _KEYS.get(node.get(KEYS, "")) or self.make({"type": "string", **node.get("propertyNames", {})})
            return {key: self.make(node.get("additionalProperties", {}))} if node.get("maxProperties", 1) else {}
        except _Unknown:
            if node.get("minProperties"):
                raise
            return {}

    def _array(self, node: Mapping[str, Any]) -> list[Any]:
        made = [self.make(part) for part in node.get("prefixItems", ())]
        shortest, longest = node.get("minItems", 0), node.get("maxItems", math.inf)
        try:
            if not made and longest:
                made = [self.make(node.get("items", {}))] * max(1, shortest)
        except _Unknown:
            if shortest:
                raise
        return made


def _number(node: Mapping[str, Any], usual: float) -> float:
    step = node.get("multipleOf", usual)
    low = node.get("minimum", node.get("exclusiveMinimum"))
    high = node.get("maximum", node.get("exclusiveMaximum"))
    value = usual if low is None else low
    if high is not None and value > high:
        value = high
    if "multipleOf" in node:
        value = math.ceil(value / step) * step
    if value == node.get("exclusiveMinimum"):
        value += step
    if value == node.get("exclusiveMaximum"):
        value -= step
    return value
