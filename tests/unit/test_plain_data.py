"""Values with tags: what is written comes back, what jsonpickle has written is read, and nothing is imported or run."""

import base64
import contextlib
import datetime
import decimal
import functools
import json
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keven_core.kafka.details import BasicDetail, DetailBuilder
from keven_core.kafka.errors import UndecodableError, UsageError
from keven_core.kafka.events.event import Event, PickledEvent
from keven_core.kafka.kinds import EVENTS
from keven_core.kafka.plain_data import Reader, to_plain

CODECS = {"json": msgspec.json, "msgpack": msgspec.msgpack}
UTC = datetime.timezone.utc


class Line:
    made: list[Any] = []

    def __init__(self, article: Any) -> None:
        Line.made.append(article)
        self.article = article


class Dropped:
    """Runs something when it goes, so it is no plain class."""

    def __del__(self) -> None:
        raise AssertionError("it was made")


class Slotted:
    __slots__ = ("a", "b")


class Order:
    kind = "order"

    def __init__(self, lines: Any = None) -> None:
        self.lines = lines or []

    @property
    def total(self) -> int:
        raise AssertionError("it was run")

    def cancel(self) -> str:
        return "cancelled"


class Annotated:
    first: Line
    others: "list[Line]"
    slotted: Slotted | None
    due: datetime.date
    wrong: int
    price: decimal.Decimal


class Unreadable:
    value: "NotDefinedAnywhere"  # type: ignore[name-defined]  # noqa: F821


@contextmanager
def nothing_imported() -> Iterator[None]:
    """Inside, no module may be looked for."""

    class Refuse:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            raise AssertionError(f"{name} was looked for")

    before = set(sys.modules)
    finder = Refuse()
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
    assert set(sys.modules) == before


def build(details: Any, cls: Any = Order) -> Any:
    with nothing_imported():
        return DetailBuilder(cls).build(details)


# --- what is written comes back --------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.binary(),
    st.decimals(allow_nan=False),
    st.uuids(),
    st.dates(),
    st.times(),
    st.datetimes(timezones=st.none() | st.just(UTC)),
    st.timedeltas(),
)
HASHABLE = st.one_of(SCALARS, st.tuples(SCALARS, SCALARS), st.frozensets(SCALARS))
VALUES = st.recursive(
    SCALARS,
    lambda children: st.one_of(
        st.lists(children),
        st.tuples(children, children),
        st.dictionaries(HASHABLE, children, max_size=4),
        st.dictionaries(st.sampled_from(["a", "py/object", "py/id", "py/tuple", "py/x", ""]), children),
        st.sets(HASHABLE, max_size=4),
        st.frozensets(HASHABLE, max_size=4),
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("codec", CODECS)
@given(value=VALUES)
def test_values_come_back_as_they_were(codec: str, value: Any) -> None:
    wire = CODECS[codec].encode(to_plain(value, where="it", binary=codec == "msgpack"))
    read = Reader().read(CODECS[codec].decode(wire))
    assert read == value
    assert type(read) is type(value)
    assert repr(read) == repr(value) or isinstance(value, (set, frozenset, dict, list, tuple))


@pytest.mark.parametrize(
    "value", [float("inf"), float("-inf"), 1 << 64, -(1 << 63), (1 << 64) - 1, -(1 << 63) - 1, -0.0]
)
def test_numbers_at_the_edges(value: Any) -> None:
    for codec in CODECS.values():
        assert repr(Reader().read(codec.decode(codec.encode(to_plain(value, where="it"))))) == repr(value)


def test_subclasses_are_written_as_their_base() -> None:
    import collections
    import enum

    class Text(str): ...

    class Number(enum.IntEnum):
        ONE = 1

    point = collections.namedtuple("point", "x y")(1, 2)
    value = [Text("a"), Number.ONE, point, collections.OrderedDict(a=1), bytearray(b"x"), collections.Counter("aa")]
    assert Reader().read(to_plain(value, where="it")) == ["a", 1, (1, 2), {"a": 1}, b"x", {"a": 2}]


# --- what jsonpickle has written -------------------------------------------------------------------------------------

REDUCED_UTC = {
    "py/reduce": [
        {"py/type": "datetime.timezone"},
        {"py/tuple": [{"py/reduce": [{"py/type": "datetime.timedelta"}, {"py/tuple": [0, 7200, 0]}]}]},
    ]
}
TWO_HOURS = datetime.timezone(datetime.timedelta(hours=2))


def moment(*more: Any) -> dict[str, Any]:
    return {
        "py/object": "datetime.datetime",
        "__reduce__": [{"py/type": "datetime.datetime"}, ["B+QBAgMEBQAAAA==", *more]],
    }


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (moment(), datetime.datetime(2020, 1, 2, 3, 4, 5)),
        (moment(REDUCED_UTC), datetime.datetime(2020, 1, 2, 3, 4, 5, tzinfo=TWO_HOURS)),
        (
            moment({"py/reduce": [{"py/function": "pytz._UTC"}, {"py/tuple": []}]}),
            datetime.datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC),
        ),
        (
            {"py/object": "datetime.date", "__reduce__": [{"py/type": "datetime.date"}, ["B+QBAg=="]]},
            datetime.date(2020, 1, 2),
        ),
        (
            {"py/object": "datetime.time", "__reduce__": [{"py/type": "datetime.time"}, ["AQIDAAAA"]]},
            datetime.time(1, 2, 3),
        ),
        (
            {"py/reduce": [{"py/type": "datetime.timedelta"}, {"py/tuple": [1, 5, 0]}]},
            datetime.timedelta(days=1, seconds=5),
        ),
        ({"py/reduce": [{"py/type": "decimal.Decimal"}, {"py/tuple": ["1.50"]}]}, decimal.Decimal("1.50")),
        ({"py/object": "uuid.UUID", "hex": "00000000000000000000000000000005"}, uuid.UUID(int=5)),
        ({"py/tuple": [1, {"py/tuple": []}]}, (1, ())),
        ({"py/set": [1, 2]}, {1, 2}),
        ({"py/reduce": [{"py/type": "builtins.frozenset"}, {"py/tuple": [[1]]}]}, frozenset([1])),
        ({"py/b64": "AP94"}, b"\x00\xffx"),
        ({"py/reduce": [{"py/type": "shop.Color"}, {"py/tuple": ["red"]}]}, "red"),
        ({"py/object": "shop.Gone", "py/state": {"q": 1}}, BasicDetail(q=1)),
        ({"py/object": "shop.Gone", "py/state": {"py/tuple": [None, {"q": 1}]}}, BasicDetail(q=1)),
        ({"py/object": "collections.defaultdict", "a": [1], "default_factory": {"py/type": "builtins.list"}}, None),
        (
            {
                "py/reduce": [
                    {"py/type": "collections.OrderedDict"},
                    {"py/tuple": []},
                    None,
                    None,
                    {"py/tuple": [{"py/tuple": ["a", 1]}]},
                ]
            },
            {"a": 1},
        ),
        (
            {"py/reduce": [{"py/type": "collections.deque"}, {"py/tuple": []}, None, {"py/tuple": [1]}]},
            [1],
        ),
        ({"py/object": "shop.Point", "py/newargs": {"py/tuple": [1, 2]}, "py/seq": [1, 2]}, [1, 2]),
        ({"py/object": "builtins.complex", "py/newargs": {"py/tuple": [0.0, 1.0]}}, 1j),
        ({"py/type": "os.system"}, "os.system"),
        ({"py/function": "os.system"}, "os.system"),
        ({"py/repr": "os/os.system('true')"}, "os/os.system('true')"),
    ],
    ids=str,
)
def test_values_of_jsonpickle(written: Any, meant: Any) -> None:
    read = build({"py/object": "shop.Order", "value": written}).value
    if meant is None:
        assert vars(read) == {"a": [1], "default_factory": "builtins.list"}
    else:
        assert read == meant
        assert type(read) is type(meant)


def test_fold_and_microseconds_of_a_pickled_time() -> None:
    for value in (
        datetime.datetime(2020, 12, 31, 23, 59, 58, 999999, fold=1),
        datetime.datetime(1, 1, 1),
        datetime.time(23, 1, 2, 3, fold=1),
        datetime.date(9999, 12, 31),
    ):
        state = value.__reduce_ex__(4)[1][0]  # type: ignore[index]
        name = f"datetime.{type(value).__name__}"
        plain = {"py/object": name, "__reduce__": [{"py/type": name}, [base64.b64encode(state).decode()]]}
        read = Reader().read(plain)
        assert (read, getattr(read, "fold", 0)) == (value, getattr(value, "fold", 0))


def test_a_time_zone_that_is_not_known_is_refused_and_not_dropped() -> None:
    berlin = {"py/reduce": [{"py/function": "zoneinfo.ZoneInfo._unpickle"}, {"py/tuple": ["Europe/Berlin", 1]}]}
    with pytest.raises(UndecodableError, match="its time zone is not known"):
        build({"py/object": "Order", "value": moment(berlin)})


def test_references() -> None:
    # As jsonpickle 4 writes an order with lines [l, l, other], itself, its list again, a dict and a set in between.
    text = json.dumps(
        {
            "py/object": "shop.Order",
            "lines": [{"py/object": "shop.Line", "article": 1}, {"py/id": 2}, {"py/object": "shop.Line", "article": 2}],
            "self": {"py/id": 0},
            "again": {"py/id": 1},
            "more": {"a": {"py/tuple": [{"py/set": [1]}, moment()]}},
            "moment": {"py/id": 5},
            "dict": {"py/id": 4},
        }
    )
    order = build(text)
    assert type(order) is Order
    assert order.lines[0] is order.lines[1]
    assert (order.lines[0].article, order.lines[2].article) == (1, 2)
    assert order.self is order
    assert order.again is order.lines
    assert order.moment is order.more["a"][1]
    assert order.dict is order.more
    for wrong in (99, -1, "1", None, 1.0, True):
        with pytest.raises(UndecodableError, match="refers to nothing that came before it"):
            build({"lines": [{"py/id": wrong}]})


# --- the class decides -----------------------------------------------------------------------------------------------


def test_the_class_of_the_details_is_not_the_wires_choice() -> None:
    for tag in ("os.system", "subprocess.Popen", f"{__name__}.Line", 5, None, ["x"]):
        assert type(build({"py/object": tag, "lines": []})) is Order


def test_objects_are_of_classes_beside_the_details_and_none_of_their_code_runs() -> None:
    Line.made.clear()
    lines = build(
        {"lines": [{"py/object": "old.place.Line", "article": 1, "__class__": 5, "__dict__": {"b": 1}}]}
    ).lines
    assert type(lines[0]) is Line
    assert vars(lines[0]) == {"article": 1}
    assert Line.made == []
    for name in ("Dropped", "os.system", "BasicDetail", "Event", "Any", "", "Order.cancel", "sys", "PickledEvent"):
        [made] = build({"lines": [{"py/object": f"{__name__}.{name}", "a": 1}]}).lines
        assert made == BasicDetail(a=1)


def test_methods_and_properties_are_not_set() -> None:
    order = build({"cancel": "no", "total": 5, "kind": "special", "__init__": 1, "lines": [1]})
    assert vars(order) == {"lines": [1], "kind": "special"}
    assert order.cancel() == "cancelled"


def test_annotations() -> None:
    Line.made.clear()
    plain = {
        "first": {"article": 1},
        "others": [{"py/object": "shop.Whatever", "article": 2}, {"article": 3}],
        "slotted": {"a": 1, "z": 2},
        "due": "2026-01-02",
        "wrong": "not a number",
        "price": "1.50",
        "more": {"article": 4},
    }
    made = build(plain, Annotated)
    assert [type(line) for line in (made.first, *made.others)] == [Line] * 3
    assert [line.article for line in (made.first, *made.others)] == [1, 2, 3]
    assert (type(made.slotted), made.slotted.a, hasattr(made.slotted, "z")) == (Slotted, 1, False)
    assert (made.due, made.wrong, made.price) == (datetime.date(2026, 1, 2), "not a number", decimal.Decimal("1.50"))
    assert made.more == {"article": 4}
    assert build({"slotted": None}, Annotated).slotted is None
    assert build({"value": 1}, Unreadable).value == 1


class Sealed:
    __slots__ = ("__secret", "open")

    def __init__(self, secret: Any) -> None:
        self.__secret = secret
        self.open = 1

    def secret(self) -> Any:
        return self.__secret


def test_private_slots() -> None:
    plain = to_plain(Sealed(5), where="it")
    assert plain == {"py/object": f"{__name__}.Sealed", "_Sealed__secret": 5, "open": 1}
    made: Any = Sealed.__new__(Sealed)
    assert DetailBuilder(Sealed).fill(made, plain).secret() == 5


class Rectangle:
    def __init__(self) -> None:
        self.width = 3

    def turned(self) -> int:
        return self.width

    @functools.cached_property
    def area(self) -> int:
        return self.width * self.width


def test_what_is_worked_out_is_not_sent() -> None:
    made = Rectangle()
    assert made.area == 9
    assert to_plain(made, where="it") == {"py/object": f"{__name__}.Rectangle", "width": 3}
    assert made.area == vars(made)["area"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("turned", 5, r"it.turned would hide a method of that name where it arrives: give the attribute another name"),
        ("__init__", 5, r"it.__init__ would hide a method"),
        ("py/object", "a.B", r"it has an attribute 'py/object', which can't be told from a tag"),
        pytest.param("width", 10**5000, r"it.width is too large a number: .*4300 digits", id="large number"),
    ],
)
def test_attributes_that_would_not_arrive_are_refused(name: str, value: Any, said: str) -> None:
    made = Rectangle()
    vars(made)[name] = value
    with pytest.raises(UsageError, match=said):
        to_plain(made, where="it")


def test_details_with_slots() -> None:
    made = build({"a": 1, "b": [2], "c": 3}, Slotted)
    assert (made.a, made.b) == (1, [2])
    assert to_plain(made, where="it") == {"py/object": f"{__name__}.Slotted", "a": 1, "b": [2]}


@pytest.mark.parametrize("text", ["", "{", "NaN,", "[" * 100_000, "9" * 5000, "\ud800", '{"py/decimal":"x"', "\x00"])
def test_text_that_is_no_json(text: str) -> None:
    with pytest.raises(UndecodableError):
        build(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"py/decimal": "x"},
        {"py/decimal": [1]},
        {"py/datetime": 5},
        {"py/timedelta": [1, 2, "x"]},
        {"py/timedelta": [10**12]},
        {"py/b64": "no"},
        {"py/int": "1" * 5000},
        {"py/set": [[1]]},
        {"py/dict": [1]},
        {"py/dict": [[[1], 2]]},
        {"py/tuple": 5},
        {"py/uuid": "x"},
        {"py/object": "uuid.UUID"},
        {"py/object": "datetime.datetime"},
        {"py/object": "datetime.datetime", "__reduce__": [0, ["AAAA"]]},
        {"py/object": "datetime.datetime", "__reduce__": [0, ["/////////////w=="]]},
        {"py/object": "builtins.complex"},
        {"py/reduce": [{"py/type": "datetime.timezone"}, {"py/tuple": [5]}]},
        {"py/reduce": [{"py/type": "decimal.Decimal"}]},
        {"py/reduce": [{"py/type": "builtins.set"}, {"py/tuple": [5]}]},
    ],
    ids=str,
)
def test_values_that_cant_be_made_are_undecodable(wrong: Any) -> None:
    with pytest.raises(UndecodableError):
        build({"lines": [wrong]})


# --- whatever comes --------------------------------------------------------------------------------------------------

TAG_NAMES = (
    "object id reduce state seq tuple set frozenset type function dict datetime date time timedelta newargs newargsex "
    "initargs iterator b64 decimal uuid int float x repr ref module"
)
KEYS = [f"py/{name}" for name in TAG_NAMES.split()] + ["__reduce__", "hex", "a", "__class__", "__dict__", "lines"]
NAMES = ["os.system", "datetime.datetime", "decimal.Decimal", "builtins.set", "xml.dom.minidom.Document"]

TAGGED = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=5), st.sampled_from(NAMES)),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.sampled_from(KEYS), children, max_size=4),
    max_leaves=20,
)


@given(plain=TAGGED)
@settings(max_examples=500)
def test_any_tags_are_read_or_refused(plain: Any) -> None:
    with nothing_imported():
        for cls in (Order, BasicDetail, Slotted, Annotated):
            with suppress(UndecodableError):
                DetailBuilder(cls).build(plain)


@pytest.fixture(scope="module")
def old_events() -> Iterator[dict[str, Any]]:
    with EVENTS.isolated():

        class ByHand(Event):
            event_name = "BY_HAND"

            def __init__(self, text: Any = None) -> None:
                super().__init__()
                self.text = text

            def serialize_payload(self) -> Any:
                return self.text

            def parse_payload(self, payload: Any) -> None:
                self.text = payload

        class Attributes(Event):
            event_name = "ATTRIBUTES"

            def __init__(self, number: Any = None, lines: Any = None) -> None:
                super().__init__()
                self.number = number
                self.lines = lines

        class WithDetails(PickledEvent):
            event_name = "WITH_DETAILS"
            detail_class = Order

        class Basic(PickledEvent):
            event_name = "BASIC"

        yield {cls.__name__: cls for cls in (ByHand, Attributes, WithDetails, Basic)}


@pytest.mark.parametrize("codec", CODECS)
@given(data=st.data())
def test_events_come_back(old_events: dict[str, Any], codec: str, data: st.DataObject) -> None:
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"])) | st.binary())
    by_hand = Event.from_bytes(old_events["ByHand"](text).serialize(codec))
    assert by_hand.text == text
    assert type(by_hand.text) is type(text)
    value, more = data.draw(VALUES), data.draw(VALUES)
    event = old_events["Attributes"](value, [more])
    event.more = more
    read = Event.from_bytes(event.serialize(codec))
    assert (read.number, read.lines, read.more) == (value, [more], more)
    names = st.text("abcdefgh_", min_size=1).filter(lambda name: not name.startswith("__"))
    basic = old_events["Basic"](BasicDetail(**data.draw(st.dictionaries(names, VALUES, max_size=4))))
    read = Event.from_bytes(basic.serialize(codec))
    assert read.details == basic.details
    assert (read.uuid, read.created) == (basic.uuid, basic.created)


@pytest.mark.parametrize("codec", CODECS)
@given(data=st.data())
@settings(max_examples=300)
def test_mutated_bytes_are_read_or_refused(old_events: dict[str, Any], codec: str, data: st.DataObject) -> None:
    order = old_events["WithDetails"]()
    order.details.lines = [Line(1), {1: datetime.datetime(2026, 1, 2)}, (decimal.Decimal(1),)]
    value = bytearray(
        data.draw(st.sampled_from([order, old_events["ByHand"]("text"), old_events["Attributes"](1, [2])])).serialize(
            codec
        )
    )
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(value) - 1))
        change = data.draw(st.sampled_from(["set", "cut", "insert", "name"]))
        if change == "set":
            value[place] = data.draw(st.integers(0, 255))
        elif change == "cut":
            del value[place : place + data.draw(st.integers(1, 8))]
        elif change == "insert":
            value[place:place] = data.draw(st.binary(max_size=8))
        else:
            value = value.replace(b"test_plain_data.Line", data.draw(st.sampled_from([b"os.system", b"antigravity.x"])))
        if not value:
            return
    with nothing_imported():
        with suppress(UndecodableError):
            Event.from_bytes(bytes(value))


# --- content that is made to do harm -----------------------------------------------------------------------------


def refuses(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("code of a class that the wire has named")


class Trap:
    """A neighbour of the details' class whose every method is a mistake to call."""

    __hash__ = __eq__ = __repr__ = __str__ = __iter__ = __len__ = __bool__ = refuses  # type: ignore[assignment]
    __index__ = __float__ = __complex__ = __int__ = __getitem__ = __setattr__ = refuses  # type: ignore[assignment]
    __getattribute__ = refuses  # type: ignore[assignment]


class Trapped:
    def __init__(self, content: Any = None) -> None:
        self.content = content


TRAP = {"py/object": "shop.Trap", "size": 1}


@pytest.mark.parametrize(
    "content",
    [
        {"py/set": [TRAP]},
        {"py/frozenset": [TRAP]},
        {"py/dict": [[TRAP, 1]]},
        {"py/dict": [TRAP]},
        {"py/decimal": TRAP},
        {"py/int": TRAP},
        {"py/float": TRAP},
        {"py/uuid": TRAP},
        {"py/b64": TRAP},
        {"py/datetime": TRAP},
        {"py/date": TRAP},
        {"py/timedelta": [TRAP]},
        {"py/object": "builtins.complex", "py/newargs": {"py/tuple": [TRAP, 1]}},
        *(
            {"py/reduce": [{"py/type": name}, {"py/tuple": [argument]}]}
            for name in (
                "builtins.set",
                "builtins.frozenset",
                "collections.OrderedDict",
                "collections.deque",
                "collections.defaultdict",
                "decimal.Decimal",
                "datetime.timedelta",
                "datetime.timezone",
                "copyreg.__newobj__",
                "copyreg._reconstructor",
            )
            for argument in (TRAP, [TRAP], [[TRAP, 1]])
        ),
    ],
    ids=str,
)
def test_no_code_of_a_class_runs_that_the_wire_has_named(content: Any) -> None:
    with contextlib.suppress(UndecodableError):
        DetailBuilder(Trapped).build({"content": content})


@pytest.mark.parametrize("tag", ["py/set", "py/frozenset", "py/dict"])
def test_elements_that_are_made_to_collide_are_refused(tag: str) -> None:
    numbers = [{"py/int": str(number * (2**61 - 1))} for number in range(1000)]
    content = [[number, 1] for number in numbers] if tag == "py/dict" else numbers
    with pytest.raises(UndecodableError, match="are made to collide"):
        DetailBuilder(BasicDetail).build({"content": {tag: content}})


def test_what_is_shared_again_and_again_is_not_walked_again_and_again() -> None:
    levels: list[Any] = [{"py/reduce": [{"py/type": "x.y"}, {"py/tuple": [{"py/tuple": [1, 1]}]}]}]
    for number in range(2, 42):
        twice = {"py/tuple": [{"py/id": number}, {"py/id": number}]}
        levels.append({"py/reduce": [{"py/type": "x.y"}, {"py/tuple": [twice]}]})
    with pytest.raises(UndecodableError, match="refers to a tuple"):
        DetailBuilder(BasicDetail).build({"content": levels})

    class Node(msgspec.Struct):
        children: "list[Any]" = []

    nested: dict[str, Any] = {"children": []}
    with pytest.raises(UndecodableError, match="refers to a "):
        DetailBuilder(Node).build({"children": [nested, {"py/id": 2}]})


def test_an_error_does_not_show_what_may_be_endless() -> None:
    content: Any = []
    for _ in range(40):
        content = [content]
    with pytest.raises(UndecodableError) as caught:
        DetailBuilder(BasicDetail).build({"content": {"py/uuid": {"x": content}}})
    assert len(str(caught.value)) < 400
