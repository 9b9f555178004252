"""What decodes an old-style event or command: one compiled decoder for each class and codec, set up here once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import UNSET

from keven_core._native.oldstyle import AttributesDecoder, DetailsDecoder, PayloadDecoder
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

__all__ = ["decoder_of"]

Decode = Callable[[Any], Any]


def decoder_of(cls: Any, decoder: Any) -> Decode:
    """The decode function of an old-style class; `decoder` is msgspec.json.Decoder or msgspec.msgpack.Decoder."""
    decode = decoder(cls).decode
    initialize = _initialize(cls)
    if has_own_payload(cls):
        return PayloadDecoder(decode, initialize).decode
    if issubclass(cls, Pickled):
        return _details_decoder(cls, decode, initialize)
    return _attributes_decoder(cls, decoder, decode, initialize)


def _initialize(cls: Any) -> tuple[Any, ...] | None:
    """What is to run on a message whose envelope is set: the service's own `__init__`, if it needs no arguments."""
    make_details = builder_of(cls.detail_class).make_or_none if issubclass(cls, Pickled) else None
    init = cls.__init__
    if init not in (OldStyle.__init__, Pickled.__init__) and takes_no_arguments(init, None):
        return cls, envelope_of(cls), init, make_details
    if make_details is not None and has_own_payload(cls):
        # parse_payload() may count on details.
        return cls, envelope_of(cls), lambda message: None, make_details
    return None


def _details_decoder(cls: Any, decode: Decode, initialize: tuple[Any, ...] | None) -> Decode:
    builder = builder_of(cls.detail_class)
    decode_message = DetailsDecoder(
        decode,
        initialize,
        build=builder.build,
        detail_class=builder.detail_class if builder.is_simple else None,
        make=None if builder.takes_dict else builder.make,
        names_to_look_at=builder.names_to_look_at,
    ).decode
    names = cls.large_attributes
    if not names:
        return decode_message

    def decode_with_files(data: Any) -> Any:
        message = decode_message(data)
        offloads = {} if message._wire_offloads is UNSET else message._wire_offloads
        message._wire_offloads = manager_of(cls).arrived(message.details, offloads, names)
        return message

    return decode_with_files


def _attributes_decoder(cls: Any, decoder: Any, decode: Decode, initialize: tuple[Any, ...] | None) -> Decode:
    known = tuple(sorted(known_attributes(cls)))
    builder = builder_of(cls)
    decode_all = decoder(dict[str, Any]).decode
    # Known attributes by a struct of their own, which costs a third of what a dict does.
    slots = tuple(f"value_{index}" for index in range(len(known)))
    renamed = dict(zip(slots, known, strict=True))
    struct = msgspec.defstruct("Attributes", [(slot, Any, UNSET) for slot in slots], rename=renamed, gc=False)

    def fill(message: Any, attributes: dict[str, Any], data: Any) -> None:
        if data is not None:
            unknown, message._wire_attributes = message._wire_attributes, UNSET
            found = decode_all(data)
            taken = cls.__struct_fields__
            attributes.update({name: found[name] for name in unknown if name in found and name not in taken})
        builder.fill(message, attributes)

    return AttributesDecoder(
        decode,
        initialize,
        known=known,
        slots=slots,
        decode_known=decoder(struct).decode,
        fill=fill,
        is_simple=builder.is_simple and builder.names_to_look_at.isdisjoint(known),
    ).decode
