"""From the bytes of a message to an old-style event or command: one function for each class and codec, made once.

msgspec makes the object and sets its envelope, which an `__init__` of the service must not change: it runs next, then the
envelope is set again, then the payload. This is the hot path of old-style messages: what a class can't need is left out
of its function.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import UNSET

from keven_core.kafka.details import takes_no_arguments
from keven_core.kafka.large_attributes import manager_of
from keven_core.kafka.oldstyle import (
    OldStyle,
    Pickled,
    builder_of,
    envelope_of,
    has_own_payload,
    known_attributes,
)
from keven_core.kafka.plain_data import DEEP

__all__ = ["decoder_of"]

Decode = Callable[[Any], Any]
Step = Callable[[Any], None]


def decoder_of(cls: Any, decoder: Any) -> Decode:
    """The decode function of an old-style class; `decoder` is msgspec.json.Decoder or msgspec.msgpack.Decoder."""
    decode = decoder(cls).decode
    initialize = _initializer(cls)
    if has_own_payload(cls):
        return _payload_decoder(decode, initialize)
    if issubclass(cls, Pickled):
        return _details_decoder(cls, decode, initialize)
    return _attributes_decoder(cls, decoder, decode, initialize)


def _initializer(cls: Any) -> Step | None:
    """Runs a service's own `__init__` on a message whose envelope is set, and leaves the envelope as it is."""
    init = cls.__init__
    if init in (OldStyle.__init__, Pickled.__init__):
        return cls._begin if issubclass(cls, Pickled) and has_own_payload(cls) else None
    if not takes_no_arguments(init, None):
        return cls._begin if issubclass(cls, Pickled) else None
    # In so many words, as dataclasses do it: a loop over the fields takes four times as long.
    fields = envelope_of(cls)
    begin = "message._begin()" if cls._begin is not OldStyle._begin else "pass"
    kept = ", ".join(f"kept_{name}" for name in fields)
    attributes = ", ".join(f"message.{name}" for name in fields)
    code = f"def initialize(message):\n {kept} = {attributes}\n {begin}\n init(message)\n {attributes} = {kept}\n"
    scope: dict[str, Any] = {"init": init}
    exec(code, scope)
    initialize: Step = scope["initialize"]
    return initialize


def _payload_decoder(decode: Decode, initialize: Step | None) -> Decode:
    def decode_message(data: Any) -> Any:
        message = decode(data)
        payload = message._wire_payload
        if initialize is not None:
            initialize(message)
        if payload is not UNSET:
            message._wire_payload = UNSET
            message.parse_payload(payload)
        elif message._wire_payload_bytes is not UNSET:
            payload, message._wire_payload_bytes = message._wire_payload_bytes, UNSET
            message.parse_payload(payload)
        return message

    return decode_message


def _details_decoder(cls: Any, decode: Decode, initialize: Step | None) -> Decode:
    builder = builder_of(cls.detail_class)
    build, is_simple = builder.build, builder.takes_dict
    make, names_to_look_at = builder.make, builder.names_to_look_at
    names = cls.large_attributes

    def decode_message(data: Any) -> Any:
        message = decode(data)
        plain = message.details
        if initialize is not None:
            initialize(message)
        if (
            is_simple
            and type(plain) is dict
            and DEEP.isdisjoint(map(type, plain.values()))
            and names_to_look_at.isdisjoint(plain)
        ):
            # As build() does, without the call: this is the usual case.
            message.details = details = make()
            details.__dict__ = plain
        elif plain is not UNSET:
            message.details = build(plain)
        elif initialize is None:
            message._begin()
        return message

    if not names:
        return decode_message

    def decode_with_files(data: Any) -> Any:
        message = decode_message(data)
        offloads = {} if message._wire_offloads is UNSET else message._wire_offloads
        message._wire_offloads = manager_of(cls).arrived(message.details, offloads, names)
        return message

    return decode_with_files


def _attributes_decoder(cls: Any, decoder: Any, decode: Decode, initialize: Step | None) -> Decode:
    known = tuple(sorted(known_attributes(cls)))
    builder = builder_of(cls)
    fill, is_simple = builder.fill, builder.is_simple and builder.names_to_look_at.isdisjoint(known)
    decode_all = decoder(dict[str, Any]).decode
    # Known attributes by a struct of their own, which costs a third of what a dict does.
    slots = [f"value_{index}" for index in range(len(known))]
    renamed = dict(zip(slots, known, strict=True))
    decode_known = decoder(
        msgspec.defstruct("Attributes", [(slot, Any, UNSET) for slot in slots], rename=renamed, gc=False)
    ).decode
    values_of = _values_getter(slots)

    def decode_message(data: Any) -> Any:
        message = decode(data)
        values = values_of(decode_known(data))
        if initialize is not None:
            initialize(message)
        unknown = message._wire_attributes
        if unknown is UNSET and is_simple and _TO_LOOK_AT.isdisjoint(map(type, values)):
            message.__dict__.update(zip(known, values))  # noqa: B905  # as many as there are known ones
            return message
        attributes = {name: value for name, value in zip(known, values, strict=True) if value is not UNSET}
        if unknown is not UNSET:
            message._wire_attributes = UNSET
            found = decode_all(data)
            taken = cls.__struct_fields__
            attributes.update({name: found[name] for name in unknown if name in found and name not in taken})
        return fill(message, attributes)

    return decode_message


_TO_LOOK_AT = DEEP | {type(UNSET)}


def _values_getter(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda found: tuple(getattr(found, name) for name in names)
