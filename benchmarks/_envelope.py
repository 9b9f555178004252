"""The protobuf envelope of the codec benchmark, generated here as protoc would, without it:

message Envelope {
  string name = 1;
  string namespace = 2;
  string originator = 3;
  google.protobuf.Timestamp created = 4;
  string uuid = 5;
  string source_command_uuid = 6;
  bytes payload = 7;
}
"""

from __future__ import annotations

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2

from keven_core.kafka.codecs import ProtobufEnvelopeCodec, register_codec

_FIELD = descriptor_pb2.FieldDescriptorProto
_FIELDS = ("name", "namespace", "originator", "created", "uuid", "source_command_uuid", "payload")


def register() -> None:
    """Register the codec "protobuf"."""
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    source = descriptor_pb2.FileDescriptorProto(
        name="bench.proto", package="bench", syntax="proto3", dependency=["google/protobuf/timestamp.proto"]
    )
    message = source.message_type.add(name="Envelope")
    for number, name in enumerate(_FIELDS, 1):
        field = message.field.add(name=name, number=number, label=_FIELD.LABEL_OPTIONAL, type=_FIELD.TYPE_STRING)
        if name == "payload":
            field.type = _FIELD.TYPE_BYTES
        elif name == "created":
            field.type, field.type_name = _FIELD.TYPE_MESSAGE, ".google.protobuf.Timestamp"
    pool.Add(source)
    register_codec(ProtobufEnvelopeCodec(message_factory.GetMessageClass(pool.FindMessageTypeByName("bench.Envelope"))))
