"""Events: from a class body to a struct whose name comes first on the wire; keys; names; generic events."""

# ruff: noqa: UP007, UP045  # the old spellings of optional and union types are tested too

import datetime
import decimal
import enum
import gc
import sys
import typing
import uuid
import weakref
from typing import Annotated, Any, ClassVar, Literal, Optional, Union

import msgspec
import pytest
from builds import run_python

from keven_core.kafka.envelope import key_of
from keven_core.kafka.errors import RegistrationError, UndecodableError, UsageError
from keven_core.kafka.events.event import Event, EventNames, GenericEvent
from keven_core.kafka.kinds import EVENTS
from keven_core.kafka.message import decoders_of, generic_decoders

ENVELOPE = ("uuid", "originator", "created", "source_command_uuid", "namespace", "is_audit_event")
FIXED = {
    "uuid": "0b7c0fb8-0d3c-4a7c-a6d9-62bb7f6c5d4f",
    "created": datetime.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.timezone.utc),
}

pytestmark = pytest.mark.usefixtures("handler_registry")


# --- the wire --------------------------------------------------------------------------------------------------------


def test_the_name_comes_first_then_the_envelope_then_the_events_own_fields() -> None:
    class OrderPlaced(Event):
        event_name = "ORDER_PLACED"
        order_id: int
        customer: str = ""

    event = OrderPlaced(order_id=7, **FIXED)
    assert event.serialize() == (
        b'{"event_name":"ORDER_PLACED","uuid":"0b7c0fb8-0d3c-4a7c-a6d9-62bb7f6c5d4f","originator":"",'
        b'"created":"2026-01-02T03:04:05.678901Z","source_command_uuid":null,"namespace":"","is_audit_event":false,'
        b'"order_id":7,"customer":""}'
    )
    packed = event.serialize("msgpack")
    assert packed.startswith(b"\x89\xaaevent_name\xacORDER_PLACED\xa4uuid")
    assert list(msgspec.msgpack.decode(packed)) == ["event_name", *ENVELOPE, "order_id", "customer"]


@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_an_event_comes_back_as_its_own_class(codec: str) -> None:
    class OrderPlaced(Event):
        event_name = "ORDER_PLACED"
        order_id: int
        customer: str = ""

    event = OrderPlaced(order_id=7, customer="Ada", namespace="shop", is_audit_event=True)
    decode = decoders_of(OrderPlaced)[codec == "msgpack"]
    decoded = decode(event.serialize(codec))
    assert type(decoded) is OrderPlaced
    assert decoded == event
    assert decoded.event_name == "ORDER_PLACED"


def test_a_wrong_name_is_refused() -> None:
    class OrderPlaced(Event):
        event_name = "ORDER_PLACED"

    for decode, encode in zip(decoders_of(OrderPlaced), (msgspec.json.encode, msgspec.msgpack.encode), strict=True):
        with pytest.raises(msgspec.ValidationError, match=r"Invalid value 'ORDER_LOST' - at `\$.event_name`"):
            decode(encode({"event_name": "ORDER_LOST"}))


def test_defaults_of_the_envelope() -> None:
    class Tick(Event):
        event_name = "TICK"

    before = datetime.datetime.now(datetime.timezone.utc)
    first, second = Tick(), Tick()
    assert before <= first.created <= datetime.datetime.now(datetime.timezone.utc)
    assert first.created.tzinfo is datetime.timezone.utc
    assert uuid.UUID(first.uuid).version == 4
    assert first.uuid != second.uuid
    assert (first.originator, first.namespace, first.source_command_uuid, first.is_audit_event) == ("", "", None, False)


def test_fields_are_keyword_only_so_that_required_ones_may_follow_defaults() -> None:
    class Base(Event):
        event_name = "BASE"
        optional: int = 0

    class Derived(Base):
        event_name = "DERIVED"
        required: int

    assert Derived(required=3).optional == 0
    with pytest.raises(TypeError, match=r"Missing required argument 'required'"):
        Derived()
    with pytest.raises(TypeError, match=r"positional"):
        Derived(3)


def test_an_event_without_a_name_is_not_published() -> None:
    class Nameless(Event):
        order_id: int = 0

    for event in (Nameless(), Event()):
        with pytest.raises(UsageError, match=rf"{type(event).__qualname__} has no event_name"):
            event.serialize()
    assert Event.classes == {}


# --- the garbage collector -------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"


class Inner(msgspec.Struct):
    child: Any = None


ATOMIC: list[Any] = [
    int,
    str,
    bytes,
    float,
    bool,
    None,
    datetime.datetime,
    datetime.timedelta,
    uuid.UUID,
    decimal.Decimal,
    Colour,
    Literal["a", "b"],
    Optional[int],
    Union[str, None, int],
    int | None,
    Annotated[int, msgspec.Meta(gt=0)],
    ClassVar[list[int]],
    "int",
    "int | None",
    "datetime.datetime",
    "typing.Optional[int]",
    "ClassVar[list[int]]",
    "typing.ClassVar[list[int]]",
]
CONTAINERS: list[Any] = [
    list,
    list[int],
    dict[str, int],
    tuple[int, ...],
    set[int],
    frozenset[int],
    Any,
    object,
    Inner,
    Optional[list[int]],
    Union[int, Inner],
    Annotated[list[int], msgspec.Meta(max_length=3)],
    typing.Sequence[int],
    msgspec.Raw,
    "list[int]",
    "Inner",
    "Optional[Inner]",
    "NotDefinedYet",
    "Optional['Inner']",
    "not even an expression",
]


def _event_class(annotation: Any, bases: tuple[type, ...] = (Event,), **options: Any) -> Any:
    namespace = {
        "__module__": __name__,
        "__qualname__": "Made",
        "__annotations__": {"field": annotation},
        "event_name": "MADE",
        "field": None,
    }
    return type(Event)("Made", bases, namespace, **options)


@pytest.mark.parametrize("annotation", ATOMIC, ids=str)
def test_events_without_references_are_not_tracked(annotation: Any) -> None:
    assert _event_class(annotation).__struct_config__.gc is False


@pytest.mark.parametrize("annotation", CONTAINERS, ids=str)
def test_events_that_can_hold_references_are_tracked(annotation: Any) -> None:
    assert _event_class(annotation).__struct_config__.gc is True


def test_a_base_without_references_says_nothing_of_its_subclass() -> None:
    base = _event_class(int)
    assert base.__struct_config__.gc is False
    assert _event_class(list[int], (base,)).__struct_config__.gc is True
    assert _event_class(int, (base,)).__struct_config__.gc is False


def test_a_subclass_of_an_event_with_references_has_them_too() -> None:
    assert _event_class(int, (_event_class(list[int]),)).__struct_config__.gc is True


def test_instances_with_a_dict_are_tracked() -> None:
    class Mixin:
        def hello(self) -> str:
            return "hello"

    class Slotted:
        __slots__ = ()

    class WithMixin(Event, Mixin):
        event_name = "WITH_MIXIN"
        number: int = 1

    assert WithMixin().hello() == "hello"
    assert WithMixin.__struct_config__.gc is True
    assert _event_class(int, dict=True).__struct_config__.gc is True
    assert _event_class(int, (Event, Slotted)).__struct_config__.gc is False
    assert GenericEvent.__struct_config__.gc is True


def test_the_class_body_has_the_last_word_on_gc() -> None:
    assert _event_class(int, gc=True).__struct_config__.gc is True


def test_cycles_through_an_event_are_collected() -> None:
    class Witness:
        pass

    class Listing(Event):
        event_name = "LISTING"
        items: list[Any] = []

    witness = Witness()
    seen = weakref.ref(witness)
    event = Listing(items=[witness])
    event.items.append(event)
    del witness, event
    gc.collect()
    assert seen() is None


# --- keys ------------------------------------------------------------------------------------------------------------


class Region(str, enum.Enum):
    NORTH = "north"


def _keyed(value: Any, annotation: Any = Any) -> Event:
    class Keyed(Event):
        event_name = "KEYED"
        key_field = "customer"
        customer: annotation

    return Keyed(customer=value)


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("Zoë", "Zoë".encode()),
        ("", b""),
        (b"\x00\xff", b"\x00\xff"),
        (42, b"42"),
        (-1, b"-1"),
        (uuid.UUID(int=1), b"00000000-0000-0000-0000-000000000001"),
        (Region.NORTH, b"north"),
        (None, None),
    ],
)
def test_key_field(value: Any, key: bytes | None) -> None:
    assert key_of(_keyed(value)) == key


@pytest.mark.parametrize("value", [1.5, True, ["a"], datetime.date(2026, 1, 1)], ids=str)
def test_a_key_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match=rf"key of .*Keyed is a {type(value).__name__}; str, bytes, int, UUID or None"):
        key_of(_keyed(value))


def test_key_method_wins_over_key_field_and_is_inherited() -> None:
    class Base(Event):
        event_name = "BASE"
        key_field = "number"
        number: int = 3

        def key(self) -> str:
            return f"n{self.number}"

    class Derived(Base):
        event_name = "DERIVED"

    assert key_of(Base()) == b"n3"
    assert key_of(Derived(number=4)) == b"n4"


def test_a_field_named_key_is_not_the_key() -> None:
    class Press(Event):
        event_name = "PRESS"
        key: str

    assert key_of(Press(key="a")) is None


def test_key_field_is_inherited_and_does_not_leak_to_others() -> None:
    class Base(Event):
        event_name = "BASE"
        key_field = "number"
        number: int = 3

    class Derived(Base):
        event_name = "DERIVED"

    class Other(Event):
        event_name = "OTHER"
        number: int = 3

    assert key_of(Derived(number=5)) == b"5"
    assert key_of(Other()) is None
    assert "key_field" not in Base.__struct_fields__


def test_a_key_field_that_does_not_exist_names_the_fields_and_registers_nothing() -> None:
    with pytest.raises(RegistrationError, match=r"Wrong: key_field 'ordre_id' is not one of its fields: .*order_id"):

        class Wrong(Event):
            event_name = "WRONG"
            key_field = "ordre_id"
            order_id: int

    assert "WRONG" not in Event.classes


# --- names -----------------------------------------------------------------------------------------------------------


class ShopNames(str, enum.Enum):
    ORDER_PLACED = "SHOP_ORDER_PLACED"


class Numbers(enum.IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("PLAIN", "PLAIN"),
        (ShopNames.ORDER_PLACED, "SHOP_ORDER_PLACED"),
        (EventNames.PRINT_EVENT, "PRINT_EVENT"),
        ("with.dots-and_more1", "with.dots-and_more1"),
    ],
)
def test_names_are_strings_or_members_of_str_enums(given: Any, expected: str) -> None:
    cls = type(Event)("Made", (Event,), {"__module__": __name__, "__qualname__": "Made", "event_name": given})
    assert cls.event_name == expected
    assert type(cls.event_name) is str
    assert EVENTS.name_of(given) == expected
    assert cls().serialize().startswith(b'{"event_name":"' + expected.encode() + b'"')
    assert Event.classes == {expected: cls}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="StrEnum came with Python 3.11")
def test_str_enum_of_the_standard_library() -> None:
    names = enum.StrEnum("Names", {"PAID": "ORDER_PAID"})
    assert EVENTS.name_of(names.PAID) == "ORDER_PAID"


@pytest.mark.parametrize("given", ["", 5, b"NAME", Numbers.ONE, ["a"], object()], ids=repr)
def test_other_names_are_refused(given: Any) -> None:
    with pytest.raises(RegistrationError, match=r"an event name has to be a str or a member of a str enum, not"):
        type(Event)("Made", (Event,), {"__module__": __name__, "__qualname__": "Made", "event_name": given})


@pytest.mark.parametrize("given", ["a b", "a/b", "../etc", "näh", "a\n", "a\x00", "x" * 237, "^a", "a:b"])
def test_names_that_no_topic_can_have_are_refused(given: str) -> None:
    with pytest.raises(RegistrationError, match=r"can't be an event name, since it becomes part of a topic"):
        type(Event)("Made", (Event,), {"__module__": __name__, "__qualname__": "Made", "event_name": given})


def test_the_longest_name() -> None:
    class Longest(Event):
        event_name = "x" * 236

    assert "x" * 236 in Event.classes


@pytest.mark.parametrize("given", ["AUDIT", "audit", "Audit"])
def test_audit_is_refused(given: str) -> None:
    with pytest.raises(RegistrationError, match=r"its topic would collide with keven_events.audit on the broker"):
        type(Event)("Made", (Event,), {"__module__": __name__, "__qualname__": "Made", "event_name": given})


@pytest.mark.parametrize("second", ["ORDER_PLACED", "Order_Placed", "order.placed", "ORDER.PLACED"])
def test_two_classes_whose_names_cant_be_told_apart_are_both_named(second: str) -> None:
    class First(Event):
        event_name = "ORDER_PLACED"

    with pytest.raises(RegistrationError) as caught:

        class Second(Event):
            event_name = second

    text = str(caught.value)
    assert f"{__name__}.test_two_classes_whose_names_cant_be_told_apart_are_both_named.<locals>.First" in text
    assert ".<locals>.Second" in text
    assert repr(second) in text
    assert "'ORDER_PLACED'" in text
    assert Event.classes == {"ORDER_PLACED": First}


def test_the_same_qualified_name_in_another_module_is_another_class() -> None:
    body = {"__qualname__": "OrderPlaced", "event_name": "ORDER_PLACED"}
    type(Event)("OrderPlaced", (Event,), {**body, "__module__": "shop.one"})
    with pytest.raises(RegistrationError, match=r"shop\.two\.OrderPlaced .* and shop\.one\.OrderPlaced"):
        type(Event)("OrderPlaced", (Event,), {**body, "__module__": "shop.two"})


def test_the_same_class_again_replaces_itself() -> None:
    body = {"__module__": "shop.one", "__qualname__": "OrderPlaced", "event_name": "ORDER_PLACED"}
    type(Event)("OrderPlaced", (Event,), dict(body))
    again = type(Event)("OrderPlaced", (Event,), dict(body))
    assert Event.classes == {"ORDER_PLACED": again}


def test_hyphens_do_not_collide_with_underscores() -> None:
    class One(Event):
        event_name = "A-B"

    class Two(Event):
        event_name = "A_B"

    assert Event.classes == {"A-B": One, "A_B": Two}


def test_event_names_can_be_extended_at_run_time() -> None:
    script = (
        "import aenum\n"
        "from keven_core.kafka.events.event import Event, EventNames\n"
        "from keven_core.kafka.abstracts.event_handler import EventHandler\n"
        "aenum.extend_enum(EventNames, 'ORDER_PLACED', 'ORDER_PLACED')\n"
        "class OrderPlaced(Event):\n"
        "    event_name = EventNames.ORDER_PLACED\n"
        "    order_id: int\n"
        "class Handler(EventHandler):\n"
        "    event_name = EventNames.ORDER_PLACED\n"
        "    def handle_event(self, event):\n"
        "        print(type(event).__name__, event.event_name, event.order_id)\n"
        "EventHandler.handle_events(OrderPlaced(order_id=5))\n"
        "print(EventNames('ORDER_PLACED') is EventNames.ORDER_PLACED, EventHandler.events_with_handlers())\n"
    )
    result = run_python("-c", script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["OrderPlaced ORDER_PLACED 5", "True ['order_placed']"]


# --- class bodies that can't be events -------------------------------------------------------------------------------


def test_post_init_works() -> None:
    class Total(Event):
        event_name = "TOTAL"
        net: int
        gross: int = 0

        def __post_init__(self) -> None:
            self.gross = self.net * 2

    assert Total(net=2).gross == 4


def test_event_name_as_a_field_is_refused() -> None:
    with pytest.raises(RegistrationError, match=r"write event_name without an annotation"):

        class Annotated(Event):
            event_name: str = "ANNOTATED"


@pytest.mark.parametrize("name", ["classes", "serialize", "key_field"])
def test_fields_named_like_the_bases_attributes_are_refused(name: str) -> None:
    body = {"__module__": __name__, "__qualname__": "Made", "__annotations__": {name: int}, "event_name": "MADE"}
    with pytest.raises(RegistrationError, match=rf"{name} can't be a field, since Event has an attribute of that name"):
        type(Event)("Made", (Event,), body)
    assert Event.classes == {}


def test_such_a_field_can_be_read_under_another_name() -> None:
    class School(Event):
        event_name = "SCHOOL"
        classes_: list[str] = msgspec.field(name="classes")

    event = msgspec.json.decode(b'{"event_name":"SCHOOL","classes":["1a"]}', type=School)
    assert event.classes_ == ["1a"]


def test_array_like_is_refused() -> None:
    with pytest.raises(RegistrationError, match=r"array_like=True leaves out the names"):

        class Positional(Event, array_like=True):
            event_name = "POSITIONAL"


# --- generic events --------------------------------------------------------------------------------------------------

WIRE = {
    "event_name": "UNKNOWN",
    "uuid": "u-1",
    "originator": "svc",
    "created": "2026-01-02T03:04:05Z",
    "order_id": 5,
    "lines": [{"sku": "a"}],
}


@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_a_generic_event_has_envelope_and_remaining_fields(codec: str) -> None:
    encode = msgspec.msgpack.encode if codec == "msgpack" else msgspec.json.encode
    event = generic_decoders(EVENTS)[codec == "msgpack"](encode(WIRE))
    assert isinstance(event, GenericEvent)
    assert isinstance(event, Event)
    assert event.event_name == "UNKNOWN"
    assert (event.uuid, event.originator, event.namespace) == ("u-1", "svc", "")
    assert (event.source_command_uuid, event.is_audit_event) == (None, False)
    assert event.created == datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)
    assert event.fields == {"order_id": 5, "lines": [{"sku": "a"}]}
    assert event.order_id == 5
    assert event.lines[0]["sku"] == "a"


@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_a_generic_event_goes_out_again_with_every_field_and_its_name_first(codec: str) -> None:
    event = generic_decoders(EVENTS)[0](msgspec.json.encode(WIRE))
    packed = event.serialize(codec)
    decoded = (msgspec.msgpack if codec == "msgpack" else msgspec.json).decode(packed)
    assert next(iter(decoded)) == "event_name"
    assert {name: decoded[name] for name in WIRE if name != "created"} == {
        k: v for k, v in WIRE.items() if k != "created"
    }
    again = generic_decoders(EVENTS)[codec == "msgpack"](packed)
    assert (again.event_name, again.created, again.fields) == (event.event_name, event.created, event.fields)


def test_two_generic_events_keep_their_own_names() -> None:
    decode = generic_decoders(EVENTS)[0]
    first, second = decode(b'{"event_name":"A"}'), decode(b'{"event_name":"B"}')
    assert (first.event_name, second.event_name) == ("A", "B")
    assert GenericEvent.event_name == ""


def test_fields_that_collide_with_attributes_are_in_fields_only() -> None:
    event = generic_decoders(EVENTS)[0](b'{"event_name":"A","fields":1,"serialize":2,"classes":3,"__class__":4,"ok":5}')
    assert event.fields == {"fields": 1, "serialize": 2, "classes": 3, "__class__": 4, "ok": 5}
    assert callable(event.serialize)
    assert type(event) is GenericEvent
    assert event.ok == 5


def test_a_generic_event_needs_a_name_unless_its_topic_is_bound() -> None:
    with pytest.raises(UndecodableError, match=r"no event_name"):
        generic_decoders(EVENTS)[0](b'{"order_id":5}')
    assert generic_decoders(EVENTS, "BOUND")[0](b'{"order_id":5}').event_name == "BOUND"
    assert generic_decoders(EVENTS, "BOUND")[0](b'{"event_name":"BOUND"}').event_name == "BOUND"
    with pytest.raises(UndecodableError, match=r"the value is a 'TAG', its topic is bound to 'BOUND'"):
        generic_decoders(EVENTS, "BOUND")[0](b'{"event_name":"TAG"}')


@pytest.mark.parametrize("value", [b"[1]", b'"text"', b"null", b'{"event_name":5}', b'{"event_name":"A","uuid":5}'])
def test_a_value_that_is_no_envelope_is_not_a_generic_event(value: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        generic_decoders(EVENTS)[0](value)


def test_decoders_are_made_once_per_type() -> None:
    assert decoders_of(Inner) is decoders_of(Inner)
