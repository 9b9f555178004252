"""Codecs: what reads and writes the values of a topic that old producers or consumers still share.

    codec = register_codec(ProtobufEnvelopeCodec(ShopEnvelope))   # where handlers are defined

JSON and MessagePack need none, and go on beside one on the same topic. On a topic that has a codec, a value is told
apart so:

    {"event_name":"..., or so in MessagePack: as this library writes it
    header `content-type`      JSON's, MessagePack's or the codec's own: it decides; another one is not heeded
    "{", whitespace "{"        JSON
    map, first key a string    MessagePack
    anything else              the codec's

The first byte of protobuf may be white space, or what a map begins with in MessagePack. A value that begins like both
is JSON or MessagePack only if all of it is (`DispatchTable.is_coded`).
"""

from __future__ import annotations

import datetime
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import msgspec

from keven_core.kafka.errors import ConfigurationError, RegistrationError
from keven_core.kafka.topics import check_topic

__all__ = ["Codec", "ProtobufEnvelopeCodec", "codec_named", "codec_names", "codec_of", "isolated", "register_codec"]

BUILT_IN = ("json", "msgpack")

_JSON_TYPE = re.compile(r"(application|text)/(json|[^;\s]+\+json)\Z")
_MSGPACK_TYPE = re.compile(r"application/((x-|vnd\.)?msgpack|[^;\s]+\+msgpack)\Z")

# RFC 6838 allows 127 characters for each half of a type; what is longer says nothing that is known here.
_LONGEST_TYPE = 512

Envelope = tuple[str, dict[str, Any], bytes]


@runtime_checkable
class Codec(Protocol):
    """A wire format of events and commands beside JSON and MessagePack.

    One object serves all servers and loggers of a process, in many threads at once: it keeps no state of a message.

    Attributes:
        name: what KEVEN_CODEC and serialize() call it.
        content_type: what the header `content-type` of its values says, if they have one.
        headers_first: optional; True for a format whose values may begin as ours do, with `{"event_name":`. Then the
            header is looked at for these too, which costs more than decoding them.
    """

    name: str
    content_type: str

    def decode(self, value: bytes) -> Envelope:
        """Take a value apart: (event name, fields of the envelope, payload).

        Called in the thread that handles the record; must not block. Fields are named as Message's are: `uuid`,
        `originator`, `created` (datetime or RFC 3339 text), `source_command_uuid`, `namespace`; those that the value
        lacks are left out. An empty name stands for the one that the topic is bound to. Whatever it raises makes the
        record undecodable: it is dead-lettered.

        The payload of a typed event is the JSON object of its own fields, or empty; an old-style class gets the bytes
        as they are in parse_payload(), and `is_audit_event` from the fields if it is there.
        """

    def encode(self, name: str, fields: dict[str, Any], payload: bytes) -> bytes:
        """The reverse. `created` is a datetime; fields that are None are left out.

        An old-style event's `is_audit_event` is among the fields when it is true; ProtobufEnvelopeCodec has no place
        for it, and the class's own default counts where the event arrives.
        """


class _Registry:
    """The codecs of the process, each with its topics; thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.codecs: dict[str, Codec] = {}
        self.topics: dict[str | None, str] = {}  # topic, ^pattern or None for all, to the codec's name


_registry = _Registry()


def register_codec(codec: Codec, topics: str | Iterable[str] | None = None) -> Codec:
    """Let servers read, and loggers write, a format of the service's own; returns the codec.

    Arguments:
        codec: see Codec; one of the same name, of an earlier import, is replaced.
        topics: on which topics it may be read: names, or regular expressions that start with ^; None: on all that carry
            events or commands. Where a topic is named by several, its own name comes first, then patterns, then None.

    Call it when the service starts, beside the definitions of its handlers, so that worker processes have it too; a
    server that runs already is not changed. Reading needs nothing else. To write with it, set KEVEN_CODEC to its name.
    Raises RegistrationError for what is no codec, for a name or content type that is taken, and for a topic that has
    another codec; ConfigurationError for what is no topic.
    """
    name, content_type = getattr(codec, "name", None), getattr(codec, "content_type", None)
    where = f"{type(codec).__module__}.{type(codec).__qualname__}"
    if isinstance(codec, type) or not isinstance(codec, Codec):
        raise RegistrationError(
            f"{codec!r:.120} is no codec: an object with name, content_type, decode() and encode() is needed"
        )
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in BUILT_IN:
        raise RegistrationError(
            f"{name!r:.80} can't be the name of {where}: letters, digits, dots, underscores and hyphens are allowed, "
            f"but not {' and '.join(BUILT_IN)}"
        )
    if not isinstance(content_type, str) or not re.fullmatch(r"[^\s;/]+/[^\s;/]+", content_type):
        raise RegistrationError(f"{content_type!r:.80} of {where} is no content type: type/subtype is needed")
    if _JSON_TYPE.match(content_type.lower()) or _MSGPACK_TYPE.match(content_type.lower()):
        raise RegistrationError(f"{content_type!r} can't be the content type of {where}: it means a built-in codec")
    named = [topics] if isinstance(topics, str) else list(topics) if topics is not None else [None]
    keys = [None if topic is None else check_topic(topic, pattern_allowed=True) for topic in named]
    with _registry.lock:
        for key in keys:
            other = _registry.topics.get(key)
            if other not in (None, name):
                what = "all topics" if key is None else repr(key)
                raise RegistrationError(f"{where} ({name!r}) can't be the codec of {what}: {other!r} is that already")
        _registry.codecs[name] = codec
        for key in [key for key, other in _registry.topics.items() if other == name]:
            del _registry.topics[key]
        _registry.topics.update(dict.fromkeys(keys, name))
    return codec


def codec_names() -> tuple[str, ...]:
    """What KEVEN_CODEC may be: the built-in ones and what is registered now."""
    return (*BUILT_IN, *_registry.codecs)


def codec_named(name: str) -> Codec:
    """A registered codec; raises ConfigurationError."""
    codec = _registry.codecs.get(name)
    if codec is None:
        raise ConfigurationError(
            f"there is no codec {name!r:.80}: {', '.join(codec_names())} are known; "
            f"call register_codec() when the service starts"
        )
    return codec


def codec_of(topic: str | None) -> Codec | None:
    """The codec of a topic beside JSON and MessagePack; None: it has none."""
    with _registry.lock:
        name = _registry.topics.get(topic)
        if name is None and topic is not None:
            patterns = (key for key in _registry.topics if key is not None and key.startswith("^"))
            name = _registry.topics.get(next((key for key in patterns if re.match(key, topic)), None))
        return None if name is None else _registry.codecs[name]


@contextmanager
def isolated() -> Iterator[None]:
    """Inside, no codec is registered; afterwards all are as they were. For tests."""
    with _registry.lock:
        saved = _registry.codecs, _registry.topics
        _registry.codecs, _registry.topics = {}, {}
    try:
        yield
    finally:
        with _registry.lock:
            _registry.codecs, _registry.topics = saved


def names_codec(content_type: bytes, own_type: str) -> bool | None:
    """Whether a header means the codec whose content type is `own_type`; False: JSON or MessagePack; None: neither."""
    return _names_codec(content_type, own_type) if len(content_type) <= _LONGEST_TYPE else None


@lru_cache(maxsize=256)  # bounded: the texts come from the wire
def _names_codec(content_type: bytes, own_type: str) -> bool | None:
    text = content_type.decode("latin-1").partition(";")[0].strip().lower()
    if text == own_type.lower():
        return True
    return False if _JSON_TYPE.match(text) or _MSGPACK_TYPE.match(text) else None


# --- protobuf --------------------------------------------------------------------------------------------------------

# FieldDescriptor.TYPE_DOUBLE; nothing is imported, since the service brings protobuf along with its class.
_DOUBLE = 1
_TIMESTAMP = "google.protobuf.Timestamp"
_TEXTS = ("name", "namespace", "originator", "uuid", "source_command_uuid")
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)


class ProtobufEnvelopeCodec:
    """A service's own protobuf envelope, by the class that protoc has generated for it.

    Arguments:
        message_class: has the fields `name`, `namespace`, `originator`, `uuid`, `source_command_uuid` (string),
            `created` (string in ISO 8601, double in seconds since the epoch, or google.protobuf.Timestamp;
            without a time zone it is taken for UTC) and `payload` (bytes or string). Other fields are ignored, and not
            written.
        name: what KEVEN_CODEC calls it.
        content_type: what the header `content-type` says.

    Raises ConfigurationError when the class has not these fields. Needs the package `protobuf`, which the generated
    class needs as well.
    """

    def __init__(
        self, message_class: Any, *, name: str = "protobuf", content_type: str = "application/x-protobuf"
    ) -> None:
        self.name = name
        self.content_type = content_type
        self.message_class = message_class
        where = getattr(message_class, "__qualname__", repr(message_class))
        fields = getattr(getattr(message_class, "DESCRIPTOR", None), "fields_by_name", None)
        if fields is None:
            raise ConfigurationError(f"{where!r:.80} is no class that protoc has generated: it has no DESCRIPTOR")
        missing = [field for field in (*_TEXTS, "created", "payload") if field not in fields]
        if missing:
            raise ConfigurationError(f"{where} can't be an envelope: it has no field {', '.join(missing)}")
        empty = message_class()
        for field in (*_TEXTS, "payload"):
            allowed = (str, bytes) if field == "payload" else (str,)
            if not isinstance(getattr(empty, field), allowed):
                raise ConfigurationError(
                    f"{where}.{field} has to be a single {'bytes or ' * (len(allowed) - 1)}string field"
                )
        self._parse: Callable[[bytes], Any] = message_class.FromString
        self._text_payload = isinstance(empty.payload, str)
        self._timestamp = getattr(getattr(empty.created, "DESCRIPTOR", None), "full_name", None) == _TIMESTAMP
        self._number = fields["created"].type == _DOUBLE and isinstance(empty.created, float)
        if not (self._timestamp or self._number or isinstance(empty.created, str)):
            raise ConfigurationError(
                f"{where}.created has to be a single string, double or {_TIMESTAMP}; others need a Codec of your own"
            )

    def __repr__(self) -> str:
        return f"<ProtobufEnvelopeCodec {self.name}: {self.message_class.DESCRIPTOR.full_name}>"

    def decode(self, value: bytes) -> Envelope:
        """See Codec.decode. Raises google.protobuf.message.DecodeError, and ValueError for a wrong `created`."""
        envelope = self._parse(value)
        fields: dict[str, Any] = {}
        if text := envelope.uuid:
            fields["uuid"] = text
        if text := envelope.originator:
            fields["originator"] = text
        if text := envelope.namespace:
            fields["namespace"] = text
        if text := envelope.source_command_uuid:
            fields["source_command_uuid"] = text
        if self._timestamp:
            if envelope.HasField("created"):
                fields["created"] = self._from_timestamp(envelope.created)
        elif created := envelope.created:
            fields["created"] = self._from_seconds(created) if self._number else self._from_text(created)
        payload = envelope.payload
        return envelope.name, fields, payload.encode() if self._text_payload else payload

    def encode(self, name: str, fields: dict[str, Any], payload: bytes) -> bytes:
        """See Codec.encode. Raises ValueError or TypeError for what the class can't hold."""
        given = {key: fields[key] for key in _TEXTS if fields.get(key) is not None}
        envelope = self.message_class(
            **{**given, "name": name}, payload=payload.decode() if self._text_payload else payload
        )
        created = fields.get("created")
        if created is not None:
            if created.tzinfo is None:
                created = created.replace(tzinfo=datetime.timezone.utc)
            if self._timestamp:
                since = created - _EPOCH
                envelope.created.seconds = since.days * 86_400 + since.seconds
                envelope.created.nanos = since.microseconds * 1000
            else:
                envelope.created = created.timestamp() if self._number else created.isoformat()
        encoded: bytes = envelope.SerializeToString()
        return encoded

    @staticmethod
    def _from_timestamp(created: Any) -> datetime.datetime:
        try:
            return _EPOCH + datetime.timedelta(seconds=created.seconds, microseconds=created.nanos // 1000)
        except OverflowError:
            raise ValueError(f"created is out of range: {created.seconds} s") from None

    @staticmethod
    def _from_seconds(created: float) -> datetime.datetime:
        try:
            return datetime.datetime.fromtimestamp(created, datetime.timezone.utc)
        except (OverflowError, OSError, ValueError):
            raise ValueError(f"created is out of range: {created} s") from None

    @staticmethod
    def _from_text(created: str) -> datetime.datetime:
        try:
            moment = msgspec.convert(created, datetime.datetime)
        except msgspec.ValidationError:
            raise ValueError("created is not in ISO 8601") from None
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=datetime.timezone.utc)
