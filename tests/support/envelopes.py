"""Protobuf envelopes as services have them, generated here from what protoc would read:

message Envelope {
  string name = 1;
  string namespace = 2;
  string originator = 3;
  google.protobuf.Timestamp created = 4;   // or string, or double
  string uuid = 5;
  string source_command_uuid = 6;
  bytes payload = 7;
}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2

FIELDS = ("name", "namespace", "originator", "created", "uuid", "source_command_uuid", "payload")
CREATED_TYPES = ("string", "double", "google.protobuf.Timestamp")

_FIELD = descriptor_pb2.FieldDescriptorProto
_TYPES = {
    "string": _FIELD.TYPE_STRING,
    "bytes": _FIELD.TYPE_BYTES,
    "double": _FIELD.TYPE_DOUBLE,
    "float": _FIELD.TYPE_FLOAT,
    "int64": _FIELD.TYPE_INT64,
}


def envelope_class(
    created: str = "google.protobuf.Timestamp",
    *,
    numbers: Sequence[int] = (1, 2, 3, 4, 5, 6, 7),
    payload: str = "bytes",
    more: tuple[str, ...] = (),
    without: str = "",
    types: dict[str, str] | None = None,
) -> Any:
    """The generated class.

    Arguments:
        created, payload: their types.
        numbers: of the fields, in the order of FIELDS and `more`.
        more: further string fields.
        without: a field that is left out.
        types: of other fields.
    """
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    source = descriptor_pb2.FileDescriptorProto(
        name="shop.proto", package="shop", syntax="proto3", dependency=["google/protobuf/timestamp.proto"]
    )
    message = source.message_type.add(name="Envelope")
    kinds = {"created": created, "payload": payload, **(types or {})}
    last = max(numbers)
    for index, name in enumerate((*FIELDS, *more)):
        if name == without:
            continue
        number = numbers[index] if index < len(numbers) else last + 1 + index
        field = message.field.add(name=name, number=number, label=_FIELD.LABEL_OPTIONAL)
        kind = kinds.get(name, "string")
        if kind.startswith("repeated "):
            field.label, kind = _FIELD.LABEL_REPEATED, kind.removeprefix("repeated ")
        if kind in _TYPES:
            field.type = _TYPES[kind]
        else:
            field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".{kind}"
    pool.Add(source)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("shop.Envelope"))
