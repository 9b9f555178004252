"""Codecs of a service's own: what is theirs on a mixed topic, what a protobuf envelope carries, and what is refused."""

import contextlib
import datetime
import json
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from envelopes import CREATED_TYPES, FIELDS, envelope_class
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from keven_core.kafka import codecs
from keven_core.kafka.abstracts.command_handler import command_handler
from keven_core.kafka.abstracts.event_handler import EventHandler, event_handler
from keven_core.kafka.codecs import Codec, ProtobufEnvelopeCodec, codec_named, codec_of, register_codec
from keven_core.kafka.commands import Command
from keven_core.kafka.config import Settings
from keven_core.kafka.deadletter import dead_letter_headers
from keven_core.kafka.errors import ConfigurationError, RegistrationError, UndecodableError, UsageError
from keven_core.kafka.events.event import Event, GenericEvent, PickledEvent
from keven_core.kafka.events.runner import EventRunner
from keven_core.kafka.redrive import Letter
from keven_core.kafka.routing import build_table
from keven_core.testing import dispatch

UTC = datetime.timezone.utc
MOMENT = datetime.datetime(2026, 1, 2, 3, 4, 5, 678_901, UTC)
CREATED = pytest.mark.parametrize("created", CREATED_TYPES)
# Field numbers whose tags begin as JSON or MessagePack may: white space, map headers with a string behind them.
LIKE_JSON = [(1, 2, 3, 4, 5, 6, 7), (2, 3, 4, 5, 6, 7, 1), (7, 6, 5, 4, 3, 2, 1), (4, 3, 2, 1, 5, 6, 7)]
LIKE_MSGPACK = [(16 + 0, 17, 18, 19, 20, 21, 22), (2560, 2561, 2562, 2563, 2564, 2565, 2566)]


@pytest.fixture(autouse=True)
def _alone(handler_registry: Any) -> None:
    pass


def placed_class() -> Any:
    class OrderPlaced(Event):
        event_name = "ORDER_PLACED"
        order_id: int
        customer: str = ""
        lines: list[dict[str, Any]] = []  # msgspec copies it
        when: datetime.datetime | None = None
        blob: bytes = b""

    event_handler("ORDER_PLACED")(lambda event: None)
    return OrderPlaced


def resolve(value: bytes, topic: str = "keven_events", headers: Any = None) -> Any:
    """What a server makes of a value; UndecodableError."""
    return build_table(EventHandler).resolve(value, topic, headers)[1]


class Pipes:
    """A codec of a service's own: name|uuid|payload."""

    name = "pipes"
    content_type = "application/x-pipes"

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def decode(self, value: bytes) -> tuple[str, dict[str, Any], bytes]:
        self.seen.append(value)
        name, uuid, payload = value.split(b"|", 2)
        return name.decode(), {"uuid": uuid.decode()} if uuid else {}, payload

    def encode(self, name: str, fields: dict[str, Any], payload: bytes) -> bytes:
        return b"|".join((name.encode(), fields["uuid"].encode(), payload))


# --- registration ----------------------------------------------------------------------------------------------------


def test_topics_are_named_by_name_pattern_or_not_at_all() -> None:
    class Other(Pipes):
        name = "other"

    class Third(Pipes):
        name = "third"

    everywhere, some, one = Pipes(), Other(), Third()
    assert register_codec(everywhere) is everywhere
    register_codec(some, "^keven_events_order_.*")
    register_codec(one, ["keven_events_order_paid", "keven_events"])
    assert codec_of("keven_events_x") is everywhere
    assert codec_of(None) is everywhere
    assert codec_of("keven_events_order_placed") is some
    assert codec_of("keven_events_order_paid") is one
    assert codec_of("keven_events") is one
    assert codec_named("other") is some
    register_codec(some, "elsewhere")  # as after a reload
    assert codec_of("keven_events_order_placed") is everywhere
    with codecs.isolated():
        assert codec_of("keven_events") is None


def test_a_topic_without_a_codec_has_none() -> None:
    register_codec(Pipes(), "keven_events")
    assert codec_of("keven_events_x") is None
    assert codec_of(None) is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": "json"}, r"'json' can't be the name of .*Pipes: letters.* are allowed, but not json and msgpack"),
        ({"name": ""}, "can't be the name"),
        ({"name": None}, "can't be the name"),
        ({"name": "a b"}, "can't be the name"),
        ({"content_type": "protobuf"}, "'protobuf' of .*Pipes is no content type: type/subtype is needed"),
        ({"content_type": None}, "is no content type"),
        ({"content_type": "Application/JSON"}, "can't be the content type of .*Pipes: it means a built-in codec"),
        ({"content_type": "application/x-msgpack"}, "it means a built-in codec"),
    ],
)
def test_what_can_be_no_codec(changes: dict[str, Any], text: str) -> None:
    codec = Pipes()
    for name, value in changes.items():
        setattr(codec, name, value)
    with pytest.raises(RegistrationError, match=text):
        register_codec(codec)
    assert codec_of("keven_events") is None


def test_a_codec_is_an_object_with_both_methods() -> None:
    class Half:
        name = "half"
        content_type = "application/x-half"

        def decode(self, value: bytes) -> Any: ...

    for wrong in (Half(), Pipes, None, "json"):
        with pytest.raises(RegistrationError, match="is no codec: an object with name, content_type, decode"):
            register_codec(wrong)  # type: ignore[arg-type]
    assert isinstance(Pipes(), Codec)
    assert isinstance(ProtobufEnvelopeCodec(envelope_class()), Codec)


def test_two_codecs_of_one_topic_are_refused() -> None:
    register_codec(Pipes())
    with pytest.raises(RegistrationError, match=r"\('protobuf'\) can't be the codec of all topics: 'pipes' is that"):
        register_codec(ProtobufEnvelopeCodec(envelope_class()))
    register_codec(Pipes(), "keven_events")
    with pytest.raises(RegistrationError, match="can't be the codec of 'keven_events': 'pipes' is that already"):
        register_codec(ProtobufEnvelopeCodec(envelope_class()), ["x", "keven_events"])
    with pytest.raises(ConfigurationError, match="is not a topic name"):
        register_codec(Pipes(), "a topic")


def test_the_setting_takes_registered_names() -> None:
    with pytest.raises(ConfigurationError, match=r"^KEVEN_CODEC='pipes' is not known; allowed: json, msgpack$"):
        Settings.from_env({"KEVEN_CODEC": "pipes"})
    register_codec(Pipes())
    made = Settings.from_env({"KEVEN_CODEC": "pipes"})
    assert made.codec == "pipes"
    with codecs.isolated():
        assert pickle.loads(pickle.dumps(made)) == made  # as for a worker process, which has yet to register it
    with pytest.raises(ConfigurationError, match=r"^KEVEN_CODEC='pipe' is not known; allowed: json, msgpack, pipes$"):
        Settings.from_env({"KEVEN_CODEC": "pipe"})


def test_serialize_by_a_codec_that_is_not_registered() -> None:
    for event in (placed_class()(order_id=1), GenericEvent()):
        vars_name = "x" if isinstance(event, GenericEvent) else None
        if vars_name:
            vars(event)["event_name"] = vars_name
        with pytest.raises(ConfigurationError, match=r"there is no codec 'pipes': json, msgpack are known; call"):
            event.serialize("pipes")


# --- protobuf envelopes ----------------------------------------------------------------------------------------------


def test_an_envelope_has_to_have_the_fields() -> None:
    for field in FIELDS:
        with pytest.raises(ConfigurationError, match=f"can't be an envelope: it has no field {field}$"):
            ProtobufEnvelopeCodec(envelope_class(without=field))
    for given_types, text in [
        ({"uuid": "bytes"}, "Envelope.uuid has to be a single string field"),
        ({"name": "int64"}, "Envelope.name has to be a single string field"),
        ({"namespace": "repeated string"}, "Envelope.namespace has to be a single string field"),
        ({"payload": "double"}, "Envelope.payload has to be a single bytes or string field"),
        ({"created": "int64"}, "Envelope.created has to be a single string, double or google.protobuf.Timestamp;"),
        ({"created": "float"}, "Envelope.created has to be a single"),
        ({"created": "repeated double"}, "Envelope.created has to be a single"),
        ({"created": "shop.Envelope"}, "Envelope.created has to be a single"),
    ]:
        with pytest.raises(ConfigurationError, match=text):
            ProtobufEnvelopeCodec(envelope_class(types=given_types))
    for wrong in (Pipes, None, Event):
        with pytest.raises(ConfigurationError, match="is no class that protoc has generated"):
            ProtobufEnvelopeCodec(wrong)


def texts() -> st.SearchStrategy[str]:
    return st.text(st.characters(codec="utf-8"), max_size=20)


names = st.from_regex(r"[A-Za-z0-9._-]{1,40}", fullmatch=True)
moments = st.datetimes(datetime.datetime(1971, 1, 1), datetime.datetime(2200, 1, 1), timezones=st.just(UTC))


@CREATED
@given(
    name=names,
    uuid=texts(),
    originator=texts(),
    namespace=texts(),
    source=texts() | st.none(),
    moment=moments,
    payload=st.binary(max_size=300),
)
def test_what_an_envelope_carries_comes_back(
    created: str,
    name: str,
    uuid: str,
    originator: str,
    namespace: str,
    source: str | None,
    moment: datetime.datetime,
    payload: bytes,
) -> None:
    codec = ProtobufEnvelopeCodec(CLASSES[created])
    fields = {
        "uuid": uuid,
        "originator": originator,
        "namespace": namespace,
        "source_command_uuid": source,
        "created": moment,
    }
    value = codec.encode(name, fields, payload)
    found_name, found, found_payload = codec.decode(value)
    assert (found_name, found_payload) == (name, payload)
    assert abs(found.pop("created") - fields.pop("created")) <= datetime.timedelta(
        microseconds=2 if created == "double" else 0
    )
    assert found == {key: text for key, text in fields.items() if text}


CLASSES = {created: envelope_class(created) for created in CREATED_TYPES}


def test_what_is_not_set_is_left_out() -> None:
    for cls in CLASSES.values():
        assert ProtobufEnvelopeCodec(cls).decode(cls(name="N").SerializeToString()) == ("N", {}, b"")


def test_created_as_text() -> None:
    codec = ProtobufEnvelopeCodec(CLASSES["string"])
    for text, expected in [
        ("2026-01-02T03:04:05.678901", MOMENT),
        ("2026-01-02 03:04:05.678901", MOMENT),  # str(datetime.utcnow())
        ("2026-01-02T03:04:05.678901Z", MOMENT),
        ("2026-01-02T04:04:05.678901+01:00", MOMENT),
    ]:
        found = codec.decode(CLASSES["string"](name="N", created=text).SerializeToString())[1]["created"]
        assert found == expected
        assert found.tzinfo is not None
    naive = codec.encode("N", {"created": MOMENT.replace(tzinfo=None)}, b"")
    assert CLASSES["string"].FromString(naive).created == "2026-01-02T03:04:05.678901+00:00"


@pytest.mark.parametrize(
    ("created", "value"),
    [
        ("string", "yesterday"),
        ("string", "2026-13-01T00:00:00"),
        ("double", float("nan")),
        ("double", float("inf")),
        ("double", 1e300),
        ("google.protobuf.Timestamp", 1 << 62),
        ("google.protobuf.Timestamp", -(1 << 62)),
    ],
)
def test_a_created_that_is_no_time_is_told(created: str, value: Any) -> None:
    placed_class()
    cls = CLASSES[created]
    register_codec(ProtobufEnvelopeCodec(cls))
    envelope = cls(name="ORDER_PLACED")
    if created == "google.protobuf.Timestamp":
        envelope.created.seconds = value
    else:
        envelope.created = value
    with pytest.raises(UndecodableError, match=r"^protobuf: ValueError: created is (out of range: |not in ISO 8601$)"):
        resolve(envelope.SerializeToString())


@CREATED
def test_events_both_ways(created: str) -> None:
    order = placed_class()(
        order_id=7,
        customer="Zoë",
        lines=[{"a": [1, None]}],
        when=MOMENT,
        blob=b"\x00\xff",
        originator="shop",
        namespace="eu",
        source_command_uuid="c-1",
        created=MOMENT,
    )
    cls = CLASSES[created]
    register_codec(ProtobufEnvelopeCodec(cls))
    value = order.serialize("protobuf")
    # As an old consumer reads it.
    old = cls.FromString(value)
    assert (old.name, old.namespace, old.originator) == ("ORDER_PLACED", "eu", "shop")
    assert (old.uuid, old.source_command_uuid) == (order.uuid, "c-1")
    assert json.loads(old.payload) == {
        "order_id": 7,
        "customer": "Zoë",
        "lines": [{"a": [1, None]}],
        "when": "2026-01-02T03:04:05.678901Z",
        "blob": "AP8=",
    }
    for topic in ("keven_events", "keven_events_order_placed"):
        assert resolve(value, topic) == order
    result = dispatch(order, codec="protobuf")
    assert (result.outcome, result.error) == ("done", None)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), created=st.sampled_from(["string", "google.protobuf.Timestamp"]))
def test_typed_events_come_back_from_every_codec(data: Any, created: str) -> None:
    with codecs.isolated(), EventHandler.kind_of().isolated():
        cls = placed_class()
        register_codec(ProtobufEnvelopeCodec(CLASSES[created]))
        order = data.draw(
            st.builds(
                cls,
                order_id=st.integers(-(2**63), 2**63 - 1),
                customer=texts(),
                lines=st.lists(st.dictionaries(texts(), st.none() | st.booleans() | texts()), max_size=3),
                when=st.none() | moments,
                blob=st.binary(max_size=20),
                uuid=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
                originator=texts(),
                namespace=texts(),
                source_command_uuid=st.none() | st.text(st.characters(codec="utf-8"), min_size=1),
                created=moments,
                is_audit_event=st.booleans(),
            )
        )
        table = build_table(EventHandler)
        for codec in ("json", "msgpack", "protobuf"):
            for topic in ("keven_events", "keven_events_order_placed"):
                assert table.resolve(order.serialize(codec), topic)[1] == order


def test_a_payload_as_text_and_fields_of_its_own() -> None:
    cls = envelope_class(payload="string", more=("added_later",))
    register_codec(ProtobufEnvelopeCodec(cls))
    order = placed_class()(order_id=7, customer="Zoë")
    value = order.serialize("protobuf")
    assert isinstance(cls.FromString(value).payload, str)
    assert resolve(value) == order
    newer = cls.FromString(value)
    newer.added_later = "?"
    assert resolve(newer.SerializeToString()) == order
    older = envelope_class(payload="string").FromString(newer.SerializeToString())  # keeps it as unknown
    assert resolve(older.SerializeToString()) == order


def test_the_envelope_counts_where_the_payload_repeats_it() -> None:
    placed_class()
    cls = CLASSES["string"]
    register_codec(ProtobufEnvelopeCodec(cls))
    payload = b' { "event_name":"ORDER_PLACED", "uuid": "theirs", "originator": "theirs", "order_id":1 } '
    event = resolve(cls(name="ORDER_PLACED", uuid="ours", payload=payload).SerializeToString())
    assert (event.uuid, event.originator, event.order_id) == ("ours", "theirs", 1)
    with pytest.raises(UndecodableError, match=r"^protobuf: ORDER_PLACED: ValidationError: Invalid value 'OTHER'"):
        resolve(cls(name="ORDER_PLACED", payload=b'{"order_id":1,"event_name":"OTHER"}').SerializeToString())


def test_an_event_without_fields_needs_no_payload() -> None:
    class Pinged(Event):
        event_name = "PINGED"

    event_handler("PINGED")(lambda event: None)
    cls = CLASSES["string"]
    register_codec(ProtobufEnvelopeCodec(cls))
    for payload in (b"", b" ", b"{}", b"{ }"):
        assert resolve(cls(name="PINGED", uuid="u", payload=payload).SerializeToString()).uuid == "u"


malformed = [
    b"no JSON",
    b"[1]",
    b'{"order_id":1',
    b'"order_id":1}',
    b'{"order_id":1},{"customer":"x"}',
    b'{"order_id":1}}',
    b'{"order_id":1,}',
    b'{,"order_id":1}',
    b'{"order_id":1,"customer":"x}',
    b'{"order_id":1,"lines":[{"a":1}',
    b'{"order_id":1,"x":{"y":1}',
    b'{"order_id":"1"}',
    b"{}",
    b"{",
    b'{"order_id":1,"lines":' + b"[" * 600 + b"]" * 600 + b"}",
]


@pytest.mark.parametrize("payload", malformed, ids=lambda payload: payload[:30].decode())
@pytest.mark.parametrize("uuid", ["", "u-1"])
def test_malformed_payloads_are_refused(payload: bytes, uuid: str) -> None:
    placed_class()
    cls = CLASSES["string"]
    register_codec(ProtobufEnvelopeCodec(cls))
    with pytest.raises(UndecodableError, match=r"^(protobuf: )?ORDER_PLACED: |nested deeper than 200 levels"):
        resolve(cls(name="ORDER_PLACED", uuid=uuid, payload=payload).SerializeToString())


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text('{}[]",: \\ab1', max_size=40))
def test_a_payload_counts_only_if_it_is_json_by_itself(text: str) -> None:
    with codecs.isolated(), EventHandler.kind_of().isolated():
        placed_class()
        cls = CLASSES["string"]
        register_codec(ProtobufEnvelopeCodec(cls))
        payload = ('{"order_id":1,"customer":' + text + "}").encode()
        try:
            parsed = json.loads(payload)
        except ValueError:
            parsed = None
        value = cls(name="ORDER_PLACED", uuid="u", payload=payload).SerializeToString()
        try:
            event = resolve(value)
        except UndecodableError:
            return
        assert parsed is not None
        assert (event.order_id, event.customer, event.uuid) == (parsed["order_id"], parsed["customer"], "u")


def test_events_without_a_class_are_generic() -> None:
    event_handler("LEGACY")(lambda event: None)
    cls = CLASSES["google.protobuf.Timestamp"]
    register_codec(ProtobufEnvelopeCodec(cls))
    value = cls(name="LEGACY", uuid="u", namespace="eu", payload=b'{"a":1,"b":[2]}').SerializeToString()
    event = resolve(value)
    assert isinstance(event, GenericEvent)
    assert (event.event_name, event.uuid, event.namespace, event.fields) == ("LEGACY", "u", "eu", {"a": 1, "b": [2]})
    assert event.a == 1
    assert cls.FromString(event.serialize("protobuf")).payload == b'{"a":1,"b":[2]}'
    for payload in (b"5:x", b"[1]", b"\x80\x04N.", b"[" * 5000):
        event = resolve(cls(name="LEGACY", uuid="u", payload=payload).SerializeToString())
        assert event.fields == {"payload": payload}
        assert cls.FromString(event.serialize("protobuf")).payload == payload
    assert resolve(cls(name="LEGACY", uuid="u").SerializeToString()).fields == {}


class PlainCodec:
    """Fields and payload as JSON, `created` as text."""

    name = "plain"
    content_type = "application/x-plain"

    def decode(self, value: bytes) -> tuple[str, dict[str, Any], bytes]:
        name, fields, payload = json.loads(value.removeprefix(b"plain"))
        return name, fields, payload.encode()

    def encode(self, name: str, fields: dict[str, Any], payload: bytes) -> bytes:
        return b"plain" + json.dumps([name, fields, payload.decode()], default=str).encode()


def test_the_envelope_of_an_old_style_event_is_checked() -> None:
    class StockChanged(Event):
        event_name = "STOCK_CHANGED"

        def __init__(self, article: Any = None, **envelope: Any) -> None:
            super().__init__(**envelope)
            self.article = article

    event_handler("STOCK_CHANGED")(lambda event: None)
    register_codec(PlainCodec())
    event = StockChanged("screw", is_audit_event=True, namespace="eu")
    found = resolve(event.serialize("plain"))
    assert (found.article, found.is_audit_event, found.namespace) == ("screw", True, "eu")
    assert (found.uuid, found.created) == (event.uuid, event.created)
    event.is_audit_event = False
    assert b"is_audit_event" not in event.serialize("plain")
    for field, value in (("created", "yesterday"), ("uuid", 5), ("namespace", ["eu"])):
        with pytest.raises(UndecodableError, match=field):
            resolve(b"plain" + json.dumps(["STOCK_CHANGED", {field: value}, "{}"]).encode())


def test_a_class_that_parses_its_payload_gets_it_as_it_is() -> None:
    class StockChanged(Event):
        event_name = "STOCK_CHANGED"

        def __init__(self, article: str | None = None, change: int = 0) -> None:
            super().__init__(originator="init")
            self.article = article
            self.change = change

        def serialize_payload(self) -> str:
            return f"{self.article}:{self.change}"

        def parse_payload(self, payload: Any) -> None:
            text = payload.decode() if isinstance(payload, bytes) else payload
            self.article, change = text.split(":")
            self.change = int(change)

    event_handler("STOCK_CHANGED")(lambda event: None)
    cls = CLASSES["double"]
    register_codec(ProtobufEnvelopeCodec(cls))
    event = resolve(cls(name="STOCK_CHANGED", uuid="u", namespace="eu", payload=b"screw:-3").SerializeToString())
    assert (event.article, event.change, event.uuid, event.namespace) == ("screw", -3, "u", "eu")
    again = cls.FromString(event.serialize("protobuf"))
    # The envelope counts, whatever __init__ did, as with JSON.
    assert (again.payload, again.uuid, again.originator) == (b"screw:-3", "u", "")
    found = Event.from_bytes(event.serialize("protobuf"))
    assert (found.article, found.change, found.created) == ("screw", -3, event.created)
    assert found.serialize("json") == event.serialize("json")
    with pytest.raises(UndecodableError, match=r"^protobuf: STOCK_CHANGED: ValueError: not enough values"):
        resolve(cls(name="STOCK_CHANGED", payload=b"screw").SerializeToString())


def test_pickled_details_are_the_payload() -> None:
    class PaymentReceived(PickledEvent):
        event_name = "PAYMENT_RECEIVED"

    event_handler("PAYMENT_RECEIVED")(lambda event: None)
    cls = CLASSES["string"]
    register_codec(ProtobufEnvelopeCodec(cls))
    event = PaymentReceived()
    event.details.amount = 5
    value = event.serialize("protobuf")
    assert json.loads(cls.FromString(value).payload) == {"amount": 5}
    found = resolve(value)
    assert (type(found), found.details.amount, found.uuid) == (PaymentReceived, 5, event.uuid)
    broken = cls(name="PAYMENT_RECEIVED", payload=b"\x80\x04cos\nsystem\n(S'true'\ntR.").SerializeToString()
    with pytest.raises(UndecodableError):  # it is never unpickled
        resolve(broken)


def test_from_bytes_reads_codecs_too() -> None:
    cls = CLASSES["string"]
    order = placed_class()(order_id=1)
    other = cls(name="OTHER", payload=b'{"a":1}').SerializeToString()
    with pytest.raises(UndecodableError, match="neither a JSON nor a MessagePack object"):
        Event.from_bytes(other)
    register_codec(ProtobufEnvelopeCodec(cls))
    assert Event.from_bytes(order.serialize("protobuf")) == order
    assert Event.from_bytes(other).fields == {"a": 1}


def test_what_a_class_cant_hold_is_the_callers_error() -> None:
    register_codec(ProtobufEnvelopeCodec(CLASSES["string"]))
    order = placed_class()(order_id=1, originator=5)
    with pytest.raises(UsageError, match=r"^the codec 'protobuf' can't encode .*OrderPlaced: TypeError: "):
        order.serialize("protobuf")


def test_an_audit_event_says_so() -> None:
    register_codec(ProtobufEnvelopeCodec(CLASSES["string"]))
    order = placed_class()(order_id=1, is_audit_event=True)
    assert resolve(order.serialize("protobuf")).is_audit_event


# --- which value is whose --------------------------------------------------------------------------------------------


def test_a_header_wins() -> None:
    placed_class()
    codec = Pipes()
    register_codec(codec)
    ours = b'{"event_name":"ORDER_PLACED","order_id":1}'
    later = b'{"order_id":1,"event_name":"ORDER_PLACED"}'
    theirs = b'ORDER_PLACED|u|{"order_id":2}'
    packed = msgspec.msgpack.encode({"event_name": "ORDER_PLACED", "order_id": 3})

    def header(text: bytes | None, *before: bytes) -> Any:
        return [*(("content-type", value) for value in before), ("content-type", text)]

    assert resolve(theirs).order_id == 2
    for text in (b"application/x-pipes", b"Application/X-Pipes; charset=utf-8"):
        assert resolve(theirs, headers=header(text)).order_id == 2
        for value in (b" " + ours, later, msgspec.msgpack.encode(msgspec.json.decode(later))):
            with pytest.raises(UndecodableError, match=r"^pipes: ValueError: "):
                resolve(value, headers=header(text))
    for text in (
        b"application/json",
        b"text/json",
        b"application/vnd.shop.order+json;v=2",
        b"application/msgpack",
        b"application/x-msgpack",
        b"application/vnd.msgpack",
    ):
        codec.seen.clear()
        for value, expected in ((ours, 1), (packed, 3)):
            assert resolve(value, headers=header(text)).order_id == expected
        with pytest.raises(UndecodableError, match="the value can't be decoded"):
            resolve(theirs, headers=header(text))
        assert codec.seen == []
    # What begins with its name is ours, and the headers are not looked at, unless the codec's may begin so.
    for value, expected in ((ours, 1), (packed, 3)):
        assert resolve(value, headers=header(b"application/x-pipes")).order_id == expected
    codec.headers_first = True
    for value in (ours, packed):
        with pytest.raises(UndecodableError, match=r"^pipes: ValueError: "):
            resolve(value, headers=header(b"application/x-pipes"))
        assert resolve(value, headers=header(b"application/json")).order_id in (1, 3)
    # A text that is longer than any type decides nothing.
    assert resolve(ours, headers=header(b"application/x-pipes" * 1000)).order_id == 1
    # What it does not know, or nothing, decides nothing; the last of several counts.
    for text in (b"application/octet-stream", b"", b"\xff", None):
        assert resolve(ours, headers=header(text)).order_id == 1
        assert resolve(theirs, headers=header(text)).order_id == 2
    assert resolve(theirs, headers=header(b"application/x-pipes", b"application/json")).order_id == 2


def test_topics_without_the_codec_do_not_ask_it() -> None:
    placed_class()
    codec = Pipes()
    register_codec(codec, "keven_events_order_placed")
    theirs = b'ORDER_PLACED|u|{"order_id":2}'
    assert resolve(theirs, "keven_events_order_placed").order_id == 2
    with pytest.raises(UndecodableError, match="neither a JSON nor a MessagePack object, see register_codec"):
        resolve(theirs, "keven_events", [("content-type", b"application/x-pipes")])
    assert len(codec.seen) == 1


def test_foreign_topics_have_no_codec() -> None:
    register_codec(Pipes())
    event_handler(topic="prices", value_type=list[int])(lambda value: None)
    event_handler(topic="lines")(lambda value: None)
    assert resolve(b"[1,2]", "prices") == [1, 2]
    assert resolve(b"a|b|c", "lines") == b"a|b|c"


def test_events_that_nobody_handles_are_passed_over() -> None:
    placed_class()
    register_codec(ProtobufEnvelopeCodec(CLASSES["string"]))
    assert resolve(CLASSES["string"](name="OTHER").SerializeToString()) is None
    runner = EventRunner(all_events=True, event_handler=lambda event: event.event_name)
    assert runner.run(CLASSES["string"](name="OTHER", payload=b"x").SerializeToString()) == "OTHER"


def test_other_spellings_and_commands_are_heeded() -> None:
    class ShipOrder(Command):
        command_name = "SHIP_ORDER"
        order_id: int

    cls = CLASSES["string"]
    register_codec(ProtobufEnvelopeCodec(cls))
    got: list[Any] = []
    command_handler("SHIP_ORDER")(got.append)
    order = ShipOrder(order_id=1, initiated_by_user_id=5)
    assert dispatch(order, codec="protobuf").outcome == "done"
    assert got == [order]
    event_handler("CMD_SHIP_ORDER_STARTED")(got.append)
    for name in ("CMD_SHIP_ORDER_STARTED", "CMD_SHIP_ORDER_START"):
        EventRunner().run(cls(name=name, uuid="u").SerializeToString())
    assert [(event.event_name, event.uuid) for event in got[1:]] == [("CMD_SHIP_ORDER_STARTED", "u")] * 2


def test_a_bound_topic_names_what_has_no_name() -> None:
    placed_class()
    cls = CLASSES["string"]
    register_codec(ProtobufEnvelopeCodec(cls))
    value = cls(uuid="u", payload=b'{"order_id":5}').SerializeToString()
    assert resolve(value, "keven_events_order_placed").order_id == 5
    with pytest.raises(UndecodableError, match="protobuf: the value has no event_name, and its topic is not bound"):
        resolve(value)


@pytest.mark.parametrize(
    ("decode", "text"),
    [
        (lambda value: 1 / 0, r"^bad: ZeroDivisionError: division by zero$"),
        (lambda value: ("N", {}), r"^bad: ValueError: "),
        (lambda value: None, r"^bad: TypeError: "),
        (lambda value: (b"N", {}, b""), r"^bad: TypeError: decode\(\) has to return \(str, dict, bytes\)$"),
        (lambda value: ("ORDER_PLACED", [], b""), r"decode\(\) has to return"),
        (lambda value: ("ORDER_PLACED", {}, "text"), r"decode\(\) has to return"),
        (lambda value: ("ORDER_PLACED", {"uuid": object()}, b"{}"), r"^bad: ORDER_PLACED: TypeError: "),
        (lambda value: ("ORDER_PLACED", {1: 2}, b'{"order_id":"x"}'), r"^bad: ORDER_PLACED: ValidationError: "),
        (lambda value: ("a\nb", {}, b""), "the event name has control characters"),
        (lambda value: ("x" * 300, {}, b""), "the event name is longer than 249"),
        (lambda value: value.decode("ascii"), r"^bad: UnicodeDecodeError: "),
    ],
)
def test_whatever_a_codec_does_is_an_undecodable_record(decode: Callable[[bytes], Any], text: str) -> None:
    placed_class()
    codec: Any = Pipes()
    codec.name, codec.decode = "bad", decode
    register_codec(codec)
    with pytest.raises(UndecodableError, match=text):
        resolve(b"\xff\x01")


def test_values_that_are_too_large_are_not_shown_to_a_codec() -> None:
    codec = Pipes()
    register_codec(codec)
    with pytest.raises(UndecodableError, match="more than KEVEN_MAX_PAYLOAD_BYTES=1024"):
        build_table(EventHandler, max_payload_bytes=1024).resolve(b"N||" + b"x" * 2000, "keven_events")
    with pytest.raises(UndecodableError, match="the value is empty"):
        resolve(b"")
    assert codec.seen == []


def test_a_dead_letter_has_its_name_where_the_codec_is_registered() -> None:
    cls = CLASSES["string"]
    value = cls(name="ORDER_PLACED", payload=b"?").SerializeToString()
    table = build_table(EventHandler)
    assert table.name_of(value, "keven_events") is None
    from keven_core._native.message import Record

    record = Record("keven_events", 0, 7, value=value)
    letter = Letter(0, 1, value, None, tuple(dead_letter_headers(record, ValueError("x"), "shop")), written_ms=1)
    assert letter.event_name is None
    register_codec(ProtobufEnvelopeCodec(cls), "keven_events")
    assert letter.event_name == "ORDER_PLACED"
    table = build_table(EventHandler)
    assert table.name_of(value, "keven_events") == "ORDER_PLACED"
    assert table.name_of(value, "keven_events_x") is None
    assert table.name_of(b"\x0a\xff", "keven_events") is None
    assert table.name_of(b'{"event_name":"OTHER"}', "keven_events") == "OTHER"


# --- ambiguous bytes -------------------------------------------------------------------------------------------------


class _Spy:
    """Says which of a mixed topic's values reached the codec."""

    def __init__(self, cls: Any) -> None:
        self.inner = ProtobufEnvelopeCodec(cls)
        self.name, self.content_type = self.inner.name, self.inner.content_type
        self.asked = 0

    def decode(self, value: bytes) -> Any:
        self.asked += 1
        return self.inner.decode(value)

    def encode(self, name: str, fields: dict[str, Any], payload: bytes) -> bytes:
        return self.inner.encode(name, fields, payload)


_NUMBERED = {numbers: envelope_class("double", numbers=numbers) for numbers in (*LIKE_JSON, *LIKE_MSGPACK)}
envelopes = st.fixed_dictionaries(
    {},
    optional={
        "namespace": texts(),
        "originator": texts(),
        "uuid": texts(),
        "source_command_uuid": texts(),
        "created": st.floats(0, 1e10, allow_nan=False),
        "payload": st.one_of(
            st.binary(max_size=300),
            st.dictionaries(texts(), st.integers() | texts(), max_size=4).map(lambda d: json.dumps(d).encode()),
            # As long as white space: tag and length, then the payload, look like JSON after a newline.
            st.sampled_from([b'{"a":  1}', b'{"a":   1}', b'{"a":      1}', b'{"event_name":"OTHER","a":  1}  ']),
        ),
    },
)


@pytest.fixture
def everything() -> Iterator[Any]:
    return EventRunner(all_events=True, event_handler=lambda event: event)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers=st.sampled_from(list(_NUMBERED)), name=names, fields=envelopes)
@example(numbers=(2, 3, 4, 5, 6, 7, 1), name="N", fields={"payload": b'{"a":  1}'})  # 0x0a 0x09 {"a": ...
@example(numbers=(1, 2, 3, 4, 5, 6, 7), name="a" * 0x20, fields={})
def test_every_envelope_is_read_as_protobuf(numbers: Any, name: str, fields: dict[str, Any]) -> None:
    cls = _NUMBERED[numbers]
    value = cls(name=name, **fields).SerializeToString()
    with codecs.isolated():
        spy = _Spy(cls)
        register_codec(spy)
        event = EventRunner(all_events=True, event_handler=lambda event: event).run(value)
    assert spy.asked == 1
    assert event.event_name == name
    assert event.namespace == fields.get("namespace", "")


def test_the_examples_are_ambiguous_indeed() -> None:
    firsts = {cls(name="N", payload=b'{"a":  1}').SerializeToString()[:1] for cls in _NUMBERED.values()}
    assert {b"\n", b"\x82"} <= firsts
    value = _NUMBERED[2, 3, 4, 5, 6, 7, 1](name="N", payload=b'{"a":  1}').SerializeToString()
    assert value.startswith(b'\n\t{"a":  1}')
    like_a_map = _NUMBERED[LIKE_MSGPACK[1]](name="N").SerializeToString()
    assert like_a_map[0] == 0x82
    assert 0xA0 <= like_a_map[1] <= 0xBF


objects = st.fixed_dictionaries(
    {"event_name": names},
    optional={
        "uuid": texts(),
        "originator": texts(),
        "a": st.recursive(
            st.none() | st.booleans() | st.integers(-(2**60), 2**60) | texts(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(), inner, max_size=3),
            max_leaves=8,
        ),
    },
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=objects,
    numbers=st.sampled_from(list(_NUMBERED)),
    space=st.text(" \n\r\t", max_size=4),
    first=st.booleans(),
    packed=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_json_and_messagepack_are_never_mistaken(
    value: dict[str, Any], numbers: Any, space: str, first: bool, packed: bool, indent: int | None
) -> None:
    given_value = value if first else dict(reversed(value.items()))
    data = (
        msgspec.msgpack.encode(given_value)
        if packed
        else space.encode() + json.dumps(given_value, indent=indent).encode()
    )
    with codecs.isolated():
        spy = _Spy(_NUMBERED[numbers])
        register_codec(spy)
        event = EventRunner(all_events=True, event_handler=lambda event: event).run(data)
    assert spy.asked == 0
    assert event.event_name == value["event_name"]
    assert event.fields.get("a") == value.get("a")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), codec=st.sampled_from(["json", "msgpack", "protobuf"]), created=st.sampled_from(CREATED_TYPES))
def test_mutated_bytes_are_an_event_or_undecodable_and_import_nothing(data: Any, codec: str, created: str) -> None:
    with codecs.isolated(), EventHandler.kind_of().isolated():
        cls = placed_class()
        register_codec(ProtobufEnvelopeCodec(CLASSES[created]))
        order = cls(order_id=7, customer="Ada", lines=[{"a": 1}], created=MOMENT, uuid="u-1")
        value = bytearray(order.serialize(codec))
        table = build_table(EventHandler)
        assert table.resolve(bytes(value), "keven_events")[1] == order
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(value)))
            change = data.draw(st.sampled_from(["set", "cut", "insert"]))
            if change == "set":
                value[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
            elif change == "cut":
                del value[at:]
            else:
                value[at:at] = data.draw(st.binary(max_size=6))
        before = set(sys.modules)
        for topic in ("keven_events", "keven_events_order_placed"):
            with contextlib.suppress(UndecodableError):
                found = table.resolve(bytes(value), topic)[1]
                assert found is None or type(found) is cls
        assert set(sys.modules) == before


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=60))
def test_any_bytes_are_an_event_or_undecodable(value: bytes) -> None:
    with codecs.isolated(), EventHandler.kind_of().isolated():
        register_codec(ProtobufEnvelopeCodec(CLASSES["string"]))
        runner = EventRunner(all_events=True, event_handler=lambda event: event)
        try:
            event = runner.run(value)
        except UndecodableError:
            return
        assume(event is not None)
        assert event.event_name


def test_registration_from_several_threads() -> None:
    def register(number: int) -> None:
        for again in range(50):
            codec = Pipes()
            codec.name = f"codec{number}"
            register_codec(codec, [f"topic{number}", f"topic{number}.{again}"])
            assert codec_of(f"topic{number}") is codec

    threads = [threading.Thread(target=register, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codecs.codec_names()[2:]
    assert len(codecs.codec_names()) == 6
