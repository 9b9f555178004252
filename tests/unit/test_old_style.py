"""Old-style events: plain classes with an `__init__`, payloads by hand, pickled details; written, read, registered."""

import copy
import datetime
import decimal
import enum
import functools
import gc
import json
import pickle
import sys
import uuid
import weakref
from typing import Any

import msgspec
import pytest

from keven_core.kafka.abstracts.event_handler import EventHandler, event_handler
from keven_core.kafka.details import BasicDetail
from keven_core.kafka.envelope import MessageMeta, key_of
from keven_core.kafka.errors import RegistrationError, UndecodableError, UsageError
from keven_core.kafka.events.event import Event, EventNames, GenericEvent, PickledEvent
from keven_core.kafka.oldstyle import OldStyleMeta
from keven_core.kafka.publishing import outbox
from keven_core.testing import dispatch

CODECS = ("json", "msgpack")
pytestmark = [pytest.mark.usefixtures("handler_registry"), pytest.mark.parametrize("codec", CODECS)]


class Branch(str, enum.Enum):
    NORTH = "north"


class Line:
    def __init__(self, article: Any = None, quantity: int = 0) -> None:
        self.article = article
        self.quantity = quantity


class Packing:
    def __init__(self, order_id: Any = None, lines: Any = None) -> None:
        self.order_id = order_id
        self.lines = lines or []


class Payment(BasicDetail):
    order_id = None
    currency = "EUR"


def again(event: Any, codec: str) -> Any:
    """The event as it arrives."""
    return Event.from_bytes(event.serialize(codec))


def flat(event: Any, codec: str) -> dict[str, Any]:
    """What is on the wire."""
    found: dict[str, Any] = (msgspec.json if codec == "json" else msgspec.msgpack).decode(event.serialize(codec))
    return found


def order_class() -> Any:
    class OrderPlaced(Event):
        event_name = "ORDER_PLACED"
        namespaces = ["north", "south"]

        def __init__(self, order_id: Any = None, customer: Any = None, **envelope: Any) -> None:
            super().__init__(**envelope)
            self.order_id = order_id
            self.customer = customer

        def serialize_payload(self) -> str:
            return json.dumps([self.order_id, self.customer])

        def parse_payload(self, payload: Any) -> None:
            self.order_id, self.customer = json.loads(payload)

    return OrderPlaced


# --- payloads by hand ------------------------------------------------------------------------------------------------


def test_an_event_with_a_payload_of_its_own_comes_back(codec: str) -> None:
    order = order_class()(7, "Zoë", namespace="north")
    order.originator = "shop"
    order.source_command_uuid = uuid.UUID(int=5)
    assert flat(order, codec)["payload"] == json.dumps([7, "Zoë"])
    assert next(iter(flat(order, codec))) == "event_name"
    read = again(order, codec)
    assert type(read) is type(order)
    assert (read.order_id, read.customer, read.namespace, read.originator) == (7, "Zoë", "north", "shop")
    assert (read.uuid, read.created, read.source_command_uuid) == (order.uuid, order.created, str(uuid.UUID(int=5)))
    assert type(read).namespaces == ["north", "south"]


@pytest.mark.parametrize("payload", ["", "text \x00 ü \u2028", b"", b"\x00\xff\xfe", b"valid utf-8", None])
def test_parse_payload_gets_what_serialize_payload_gave(codec: str, payload: Any) -> None:
    seen: list[Any] = []

    class Carrier(Event):
        event_name = "CARRIER"

        def serialize_payload(self) -> Any:
            return payload

        def parse_payload(self, payload: Any) -> None:
            seen.append(payload)

    again(Carrier(), codec)
    assert seen == ([] if payload is None else [payload])
    assert not seen or type(seen[0]) is type(payload)


def test_what_serialize_payload_may_not_return_is_said(codec: str) -> None:
    class Carrier(Event):
        event_name = "CARRIER"

        def serialize_payload(self) -> Any:
            return {"a": 1}

    with pytest.raises(UsageError, match=r"Carrier.serialize_payload\(\) has returned a dict; str, bytes or None"):
        Carrier().serialize(codec)


def test_a_payload_that_cant_be_parsed_makes_the_record_undecodable(codec: str) -> None:
    cls = order_class()
    event_handler("ORDER_PLACED")(lambda event: pytest.fail("it was handled"))
    value = {"event_name": "ORDER_PLACED", "payload": "no json"}
    result = dispatch((msgspec.json if codec == "json" else msgspec.msgpack).encode(value))
    assert result.outcome == "dead"
    assert isinstance(result.error, UndecodableError)
    with pytest.raises(UndecodableError):
        cls.from_bytes(msgspec.json.encode(value))


# --- __init__ --------------------------------------------------------------------------------------------------------


def test_init_runs_before_the_envelope_and_the_payload_are_set(codec: str) -> None:
    class Login(Event):
        event_name = "LOGIN"

        def __init__(self, user: Any = None) -> None:
            super().__init__()
            self.seen_uuid = self.uuid
            self.uuid = "set by init"
            self.is_audit_event = True
            self.cache: list[int] = []
            self.user = user

        def serialize_payload(self) -> str:
            return str(self.user)

        def parse_payload(self, payload: Any) -> None:
            self.user = payload

    event = Login("ada")
    event.uuid, event.is_audit_event = "the right one", False
    first, second = again(event, codec), again(event, codec)
    assert (first.uuid, first.is_audit_event, first.user, first.cache) == ("the right one", False, "ada", [])
    assert first.seen_uuid == "the right one"
    assert first.cache is not second.cache


def test_an_init_with_required_arguments_does_not_run_on_arrival(codec: str) -> None:
    class Strict(Event):
        event_name = "STRICT"

        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

    assert again(Strict(5), codec).number == 5
    assert not hasattr(Event.from_name("STRICT"), "number")
    with pytest.raises(TypeError, match="number"):
        Strict()  # type: ignore[call-arg]


def test_an_init_need_not_call_that_of_its_base(codec: str) -> None:
    class Quiet(Event):
        event_name = "QUIET"

        def __init__(self) -> None:
            self.number = 1

    class QuietDetails(PickledEvent):
        event_name = "QUIET_DETAILS"

        def __init__(self) -> None:
            pass

    event = Quiet()
    assert uuid.UUID(event.uuid).version == 4
    assert again(event, codec).uuid == event.uuid
    details = QuietDetails()
    details.details.a = 1
    assert again(details, codec).details.a == 1


def test_unknown_arguments_name_the_envelope(codec: str) -> None:
    with pytest.raises(TypeError, match=r"OrderPlaced.__init__\(\) got .* 'colour'; the envelope has uuid, originator"):
        order_class()(colour="red")


def test_attributes_of_an_event_without_payload_methods_are_fields(codec: str) -> None:
    class Moved(Event):
        event_name = "MOVED"

        def __init__(self, article: Any = None, to: Any = None) -> None:
            super().__init__()
            self.article = article
            self.to = to

    event = Moved("bolt", datetime.date(2026, 1, 2))
    event.later = {"added": (1, 2)}  # type: ignore[attr-defined]
    wire = flat(event, codec)
    assert (wire["article"], wire["py/attributes"]) == ("bolt", ["later"])
    read = again(event, codec)
    assert (read.article, read.to, read.later) == ("bolt", datetime.date(2026, 1, 2), {"added": (1, 2)})
    assert "py/attributes" not in flat(Moved("bolt"), codec)
    assert vars(again(Moved("bolt"), codec)) == {"article": "bolt", "to": None}


def test_annotations_say_what_attributes_become(codec: str) -> None:
    class Moved(Event):
        event_name = "MOVED"
        line: Line
        branch: Branch | None = None

        def __init__(self, line: Any = None) -> None:
            super().__init__()
            self.line = line

    event = Moved(Line("bolt", 2))
    event.branch = Branch.NORTH
    read = again(event, codec)
    assert type(read.line) is Line
    assert (read.line.quantity, read.branch) == (2, Branch.NORTH)
    assert read.branch is Branch.NORTH
    assert "line" not in Moved.__struct_fields__


def test_an_attribute_that_would_hide_a_method_is_refused(codec: str) -> None:
    class Moved(Event):
        event_name = "MOVED"

        def __init__(self) -> None:
            super().__init__()
            self.serialize_payload = "hidden"  # type: ignore[method-assign, assignment]

    with pytest.raises(UsageError, match=r"Moved.serialize_payload would hide a method"):
        Moved().serialize(codec)
    value = b'{"event_name":"MOVED","py/attributes":["serialize","kind","__class__"],"serialize":1,"__class__":2}'
    read = Event.from_bytes(value)
    assert type(read) is Moved
    assert callable(read.serialize)


def test_an_attribute_may_be_called_attributes(codec: str) -> None:
    class Moved(Event):
        event_name = "MOVED"

        def __init__(self, attributes: Any = None) -> None:
            super().__init__()
            self.attributes = attributes

    event = Moved({"colour": "red"})
    event.later = 5  # type: ignore[attr-defined]
    read = again(event, codec)
    assert (read.attributes, read.later) == ({"colour": "red"}, 5)


def test_annotations_that_only_type_checkers_can_read_are_remarks(codec: str) -> None:
    class Moved(Event):
        event_name = "MOVED"
        line: "OnlyForTypeCheckers"  # type: ignore[name-defined]  # noqa: F821

        def __init__(self, article: Any) -> None:
            super().__init__()
            self.line = article

    assert "py/attributes" not in flat(Moved("bolt"), codec)
    assert again(Moved("bolt"), codec).line == "bolt"


def test_what_a_cached_property_holds_is_not_sent(codec: str) -> None:
    class Moved(Event):
        event_name = "MOVED"

        def __init__(self, width: int = 0) -> None:
            super().__init__()
            self.width = width

        @functools.cached_property
        def area(self) -> int:
            return self.width * self.width

    event = Moved(3)
    assert event.area == 9
    assert "area" not in flat(event, codec)
    assert again(event, codec).area == 9


def test_payloads_nested_too_deep_are_refused(codec: str) -> None:
    class Moved(Event):
        event_name = "MOVED"

        def __init__(self) -> None:
            super().__init__()

    for event in (Moved(), PickledEvent()):
        with pytest.raises(UndecodableError, match="nested deeper than 200 levels"):
            event.parse_payload('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


# --- pickled ---------------------------------------------------------------------------------------------------------


def test_details_come_back_as_their_class(codec: str) -> None:
    class Paid(PickledEvent):
        event_name = "PAID"
        detail_class = Payment

    event = Paid()
    event.details.order_id = 5
    event.details.extra = [decimal.Decimal("1.50"), {1: b"\xff"}, {2, 3}]
    read = again(event, codec)
    assert type(read.details) is Payment
    assert read.details == event.details
    assert read.details.currency == "EUR"
    assert flat(event, codec)["details"]["order_id"] == 5
    assert Paid(Payment(order_id=6)).details.order_id == 6


def test_objects_in_details(codec: str) -> None:
    class Packed(PickledEvent):
        event_name = "PACKED"
        detail_class = Packing

    class Stranger:
        pass

    stranger = Stranger()
    stranger.number = 1  # type: ignore[attr-defined]
    event = Packed()
    event.details = Packing(1, [Line("bolt", 2), stranger])
    line, other = again(event, codec).details.lines
    assert (type(line), line.article, line.quantity) == (Line, "bolt", 2)
    assert (type(other), other.number) == (BasicDetail, 1)


def test_details_of_a_struct_are_checked(codec: str) -> None:
    class Price(msgspec.Struct):
        cents: int
        at: datetime.datetime | None = None

    class Priced(PickledEvent):
        event_name = "PRICED"
        detail_class = Price

    event = Priced()
    assert event.details is None
    event.details = Price(5, datetime.datetime(2026, 1, 2))
    assert again(event, codec).details == event.details
    with pytest.raises(UndecodableError, match=r"the details are no .*Price: .*cents"):
        Event.from_bytes(b'{"event_name":"PRICED","details":{"cents":"five"}}')


@pytest.mark.parametrize(
    "details", [None, [1, (2,)], 5, "text", '{"a": 1}', {"a": [1]}, {1: 2}, {"py/object": "a.B"}], ids=repr
)
def test_details_that_are_no_object(codec: str, details: Any) -> None:
    class Paid(PickledEvent):
        event_name = "PAID"

    event = Paid()
    event.details = details
    assert again(event, codec).details == details


def test_details_may_be_missing(codec: str) -> None:
    class Paid(PickledEvent):
        event_name = "PAID"
        detail_class = Payment

    encode = (msgspec.json if codec == "json" else msgspec.msgpack).encode
    assert Event.from_bytes(encode({"event_name": "PAID"})).details == Payment()


def test_a_pickled_event_may_have_an_init_and_a_payload_of_its_own(codec: str) -> None:
    class Invoice(PickledEvent):
        event_name = "INVOICE"
        detail_class = Packing

        def __init__(self, order_id: Any = None) -> None:
            super().__init__()
            self.details = Packing(order_id)

    class Wrapped(Invoice):
        event_name = "WRAPPED"

        def serialize_payload(self) -> str:
            return "v1" + str(super().serialize_payload())

        def parse_payload(self, payload: Any) -> None:
            super().parse_payload(payload[2:])

    assert again(Invoice(5), codec).details.order_id == 5
    assert flat(Wrapped(6), codec)["payload"].startswith('v1{"order_id":6')
    assert again(Wrapped(6), codec).details.order_id == 6


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (print, r"Paid.details.value is a builtins.builtin_function"),
        ([open], r"Paid.details.value\[0\] is a builtins.builtin_function"),
        ({"a": {"b": Line}}, r"Paid.details.value\['a'\]\['b'\] is a builtins.type"),
        (ValueError("x"), r"Paid.details.value is a builtins.ValueError"),
        ("\ud800", r"Paid can't be written as"),
    ],
)
def test_what_is_no_data_is_refused_with_its_place(codec: str, value: Any, said: str) -> None:
    class Paid(PickledEvent):
        event_name = "PAID"

    event = Paid()
    event.details.value = value
    with pytest.raises(UsageError, match=said):
        event.serialize(codec)


def test_details_that_contain_themselves_are_refused(codec: str) -> None:
    class Paid(PickledEvent):
        event_name = "PAID"

    event = Paid()
    event.details.children = [Line(event.details)]
    with pytest.raises(UsageError, match=r"contains itself"):
        event.serialize(codec)
    shared = Line("twice is fine")
    event.details.children = [shared, shared]
    assert [line.article for line in again(event, codec).details.children] == ["twice is fine"] * 2


# --- the envelope ----------------------------------------------------------------------------------------------------


def test_the_body_may_give_another_default_to_a_field(codec: str) -> None:
    class Audited(Event):
        event_name = "AUDITED"
        is_audit_event = True
        originator = "shop"

        def __init__(self) -> None:
            super().__init__()

    class Typed(Event):
        event_name = "TYPED"
        is_audit_event = True

    for event in (Audited(), Typed()):
        assert again(event, codec).is_audit_event is True
        assert flat(event, codec)["is_audit_event"] is True
    assert Audited().originator == "shop"


def test_none_and_enums_in_the_envelope(codec: str) -> None:
    event = order_class()()
    event.originator = None
    event.namespace = Branch.NORTH
    event.created = datetime.datetime(2026, 1, 2)
    read = again(event, codec)
    assert (read.originator, read.namespace, read.created) == ("", "north", datetime.datetime(2026, 1, 2))


def test_a_nameless_event_is_not_published(codec: str) -> None:
    class Base(Event):
        def __init__(self) -> None:
            super().__init__()

    with pytest.raises(UsageError, match="Base has no event_name"):
        Base().serialize(codec)


def test_a_key_may_be_any_attribute(codec: str) -> None:
    class Keyed(Event):
        event_name = "KEYED"
        key_field = "customer"

        def __init__(self, customer: Any = None) -> None:
            super().__init__()
            self.customer = customer

    assert key_of(again(Keyed("ada"), codec)) == b"ada"


# --- as plain objects ------------------------------------------------------------------------------------------------


def test_copies_and_pickles(codec: str) -> None:
    class Paid(PickledEvent):
        event_name = "PAID"

    event = again(Paid(), codec)
    event.details.number = [1]
    event.more = 2
    for copied in (copy.copy(event), copy.deepcopy(event), type(event).__reduce__(event)[0](*event.__reduce__()[1])):
        assert type(copied) is Paid
        assert (copied.uuid, copied.details, copied.more) == (event.uuid, event.details, 2)
    assert copy.deepcopy(event).details is not event.details
    assert pickle.loads(pickle.dumps(EventNames.TEST)) is EventNames.TEST


def test_they_are_compared_and_hashed_as_objects(codec: str) -> None:
    event = order_class()(1)
    assert event != again(event, codec)
    assert len({event, event}) == 1
    assert "order_id=1" in repr(event)


def test_classes(codec: str) -> None:
    class Mixin:
        def __init__(self, **rest: Any) -> None:
            super().__init__(**rest)
            self.mixed = True

    class Mixed(Mixin, Event):
        event_name = "MIXED"

    class Derived(Mixed):
        event_name = "DERIVED"

        def __init__(self) -> None:
            super().__init__(namespace="eu")
            self.own = 1

    class Typed(Event):
        event_name = "TYPED"
        number: int = 0

    class FromTyped(Typed):
        event_name = "FROM_TYPED"

        def __init__(self) -> None:
            super().__init__(number=5)

    read = again(Derived(), codec)
    assert (read.mixed, read.own, read.namespace) == (True, 1, "eu")
    assert again(Mixed(), codec).mixed is True
    assert again(FromTyped(), codec).number == 5
    assert type(Typed) is MessageMeta
    assert type(Derived) is type(FromTyped) is OldStyleMeta
    assert isinstance(read, Event)


def test_a_required_field_of_a_base_is_refused(codec: str) -> None:
    class Typed(Event):
        number: int

    with pytest.raises(RegistrationError, match=r"Old has an __init__ .* base whose field 'number' has no default"):

        class Old(Typed):
            event_name = "OLD"

            def __init__(self) -> None:
                super().__init__()

    assert "OLD" not in Event.classes


# --- names -----------------------------------------------------------------------------------------------------------


def test_from_name(codec: str) -> None:
    cls = order_class()

    class Typed(Event):
        event_name = "TYPED"
        number: int

    assert type(Event.from_name("ORDER_PLACED")) is type(Event.from_name("order_placed")) is cls
    missing = Event.from_name("NEVER_HEARD_OF")
    assert isinstance(missing, GenericEvent)
    assert missing.event_name == EventNames.NOT_INSTALLED
    assert vars(missing)["requested_name"] == "NEVER_HEARD_OF"
    for name in (EventNames.NONE, EventNames.NOT_INSTALLED, EventNames.PRINT_EVENT, EventNames.TEST):
        placeholder = Event.from_name(name)
        assert placeholder.event_name == name
        assert again(placeholder, codec).event_name == name
    with pytest.raises(UsageError, match=r"Typed can't be made from its name alone: .*number"):
        Event.from_name("TYPED")


def test_from_bytes(codec: str) -> None:
    cls = order_class()
    read = Event.from_bytes(msgspec.json.encode({"event_name": "UNKNOWN", "a": 1}))
    assert isinstance(read, GenericEvent)
    assert vars(read)["a"] == 1
    assert type(cls.from_bytes(cls(1).serialize(codec))) is cls
    with pytest.raises(UndecodableError, match=r"'UNKNOWN', which is no .*OrderPlaced"):
        cls.from_bytes(read.serialize(codec))
    for wrong in (b"", b"{", b"\x81", b"[]", b"{}", b'{"event_name":""}', b'{"event_name":5}', b"[" * 100_000):
        with pytest.raises(UndecodableError):
            Event.from_bytes(wrong)
    with pytest.raises(UsageError, match="decoded from bytes, not from str"):
        Event.from_bytes("text")  # type: ignore[arg-type]


def test_register_event(codec: str) -> None:
    cls = order_class()
    Event.classes.clear()
    assert isinstance(again(cls(1), codec), GenericEvent)
    assert Event.register_event(cls) is cls
    assert cls.register_event() is cls
    assert type(again(cls(1), codec)) is cls
    for wrong in (Event, int, object()):
        with pytest.raises(RegistrationError, match="is no event class with an event name"):
            Event.register_event(wrong)


def test_create_handler(codec: str) -> None:
    cls = order_class()

    class Handler(EventHandler):
        event_name = "ORDER_PLACED"

        def handle_event(self, event: Any) -> None: ...

    event = cls(1)
    handler = event.create_handler()
    assert type(handler) is Handler
    assert handler.event is event
    with pytest.raises(UsageError, match="TEST has no handler class"):
        Event.from_name("TEST").create_handler()


def test_they_are_dispatched_as_others(codec: str) -> None:
    seen: list[Any] = []
    event_handler("ORDER_PLACED")(seen.append)
    result = dispatch(order_class()(9, "Ada"), codec=codec)
    assert result.outcome == "done", result.error
    assert (seen[0].order_id, seen[0].customer) == (9, "Ada")


def test_nothing_is_kept_of_what_init_has_put_into_the_envelope(codec: str) -> None:
    class Marker(str): ...

    marker = Marker("set by init")

    class Marked(Event):
        event_name = "MARKED"

        def __init__(self) -> None:
            super().__init__()
            self.uuid = marker
            if self.namespace == "fail":
                raise ValueError("it fails")

        def parse_payload(self, payload: Any) -> None:
            raise AssertionError("there is none")

        def serialize_payload(self) -> None: ...

    event = Marked()
    event.uuid = "the right one"
    value = event.serialize(codec)
    encode = (msgspec.json if codec == "json" else msgspec.msgpack).encode
    failing = encode({"event_name": "MARKED", "namespace": "fail"})
    before = sys.getrefcount(marker)
    for _ in range(100):
        read = Event.from_bytes(value)
        assert read.uuid == "the right one"
        with pytest.raises(UndecodableError, match="it fails"):
            Event.from_bytes(failing)
    gone = weakref.ref(read)
    del read
    gc.collect()
    assert gone() is None
    assert sys.getrefcount(marker) == before


def test_a_cycle_that_a_handler_makes_is_collected(codec: str) -> None:
    class Held:
        def __init__(self, event: Any) -> None:
            self.event = event

    class Attributes(Event):
        event_name = "ATTRIBUTES"

        def __init__(self, things: Any = None) -> None:
            super().__init__()
            self.things = things or []

    event = Event.from_bytes(Attributes([1]).serialize(codec))
    held = Held(event)
    event.things.append(held)
    gone = weakref.ref(held)
    del event, held
    gc.collect()
    assert gone() is None


def test_a_state_cannot_change_the_envelope(codec: str) -> None:
    class Stated(Event):
        event_name = "STATED"

        def __init__(self) -> None:
            super().__init__()
            self.size = 0

    value = {"event_name": "STATED", "uuid": "u-1", "size": 1, "py/state": {"uuid": 5, "size": 2}}
    assert Event.from_bytes(getattr(msgspec, codec).encode(value)).uuid == "u-1"


def test_an_attribute_may_be_called_kind(codec: str) -> None:
    class Kinds(Event):
        event_name = "KINDS"

        def __init__(self, kind: Any = None) -> None:
            super().__init__()
            self.kind = kind

    event = Event.from_bytes(Kinds("parcel").serialize(codec))
    assert event.kind == "parcel"
    with outbox() as box:
        event.log()
        assert len(box) == 1
        box.drop()
    with pytest.raises(UsageError, match="has no handler class"):
        event.create_handler()
