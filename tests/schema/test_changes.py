"""What counts as compatible is what msgspec reads: verdicts are held against real bytes, in both codecs."""

import dataclasses
import datetime
import decimal
import enum
import uuid
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta

from keven_core.kafka.errors import ConfigurationError
from keven_core.kafka.schema import Change, compare
from keven_core.kafka.schema.snapshot import schemas_of

UTC = datetime.timezone.utc


class Color(enum.Enum):
    RED = "red"


class MoreColors(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Point(msgspec.Struct):
    x: int


class PointOnly(msgspec.Struct, forbid_unknown_fields=True):
    x: int


class PointWithDefault(msgspec.Struct):
    x: int = 0


class Point3(msgspec.Struct):
    x: int
    y: int
    z: int = 0


class TaggedPoint(msgspec.Struct, tag="point"):
    x: int


class Circle(msgspec.Struct, tag="circle"):
    radius: float


class Tree(msgspec.Struct):
    children: list["Tree"] = []
    size: int = 0


class WiderTree(msgspec.Struct):
    children: list["WiderTree"] = []
    size: float = 0


class Row(msgspec.Struct, array_like=True):
    x: int
    y: str = ""


class LongerRow(msgspec.Struct, array_like=True):
    x: int
    y: str = ""
    z: int = 0


class Mapping(TypedDict):
    x: int


@dataclasses.dataclass
class Data:
    x: int


# A type, and values that show how far it reaches.
TYPES: dict[str, tuple[Any, list[Any]]] = {
    "null": (None, [None]),
    "bool": (bool, [True]),
    "int": (int, [1, -5, 10**6]),
    "small int": (Annotated[int, Meta(ge=0, lt=10)], [0, 9]),
    "positive int": (Annotated[int, Meta(gt=0)], [1, 10**6]),
    "even int": (Annotated[int, Meta(multiple_of=2)], [-5 * 2, 10**6]),
    "float": (float, [1.5, -1e300]),
    "str": (str, ["", "abcd", "red"]),
    "short str": (Annotated[str, Meta(max_length=3)], ["", "abc", "red"]),
    "pattern": (Annotated[str, Meta(pattern="^r")], ["red", "rest"]),
    "datetime": (datetime.datetime, [datetime.datetime(2024, 1, 1), datetime.datetime(2024, 1, 1, tzinfo=UTC)]),
    "aware datetime": (Annotated[datetime.datetime, Meta(tz=True)], [datetime.datetime(2024, 1, 1, tzinfo=UTC)]),
    "naive datetime": (Annotated[datetime.datetime, Meta(tz=False)], [datetime.datetime(2024, 1, 1)]),
    "date": (datetime.date, [datetime.date(2024, 1, 1)]),
    "time": (datetime.time, [datetime.time(1), datetime.time(1, tzinfo=UTC)]),
    "aware time": (Annotated[datetime.time, Meta(tz=True)], [datetime.time(1, tzinfo=UTC)]),
    "naive time": (Annotated[datetime.time, Meta(tz=False)], [datetime.time(1)]),
    "duration": (datetime.timedelta, [datetime.timedelta(days=1, seconds=3)]),
    "uuid": (uuid.UUID, [uuid.UUID(int=1)]),
    "decimal": (decimal.Decimal, [decimal.Decimal("1.50")]),
    "bytes": (bytes, [b"a\xff", b""]),
    "color": (Color, [Color.RED]),
    "more colors": (MoreColors, list(MoreColors)),
    "level": (Level, [Level.LOW]),
    "literal str": (Literal["red", "green"], ["red", "green"]),
    "literal mixed": (Literal["red", 1, None], ["red", 1, None]),
    "optional int": (int | None, [None, 1, -5, 10**6]),
    "int or str": (int | str, [1, -5, 10**6, "", "abc", "red"]),
    "float or null": (float | None, [None, 1.5]),
    "list": (list[int], [[], [1], [1, 1, 10**6]]),
    "list of float": (list[float], [[], [1.5]]),
    "list of anything": (list[Any], [[], [None, "a"], [1]]),
    "short list": (Annotated[list[int], Meta(max_length=2)], [[], [1, 1]]),
    "set": (set[int], [set(), {1, 2, 3}]),
    "frozenset": (frozenset[int], [frozenset(), frozenset({1, 2, 3})]),
    "tuple": (tuple[int, int], [(1, 2)]),
    "tuple of three": (tuple[int, int, str], [(1, 2, "a")]),
    "dict": (dict[str, int], [{}, {"x": 1, "by": 2}]),
    "dict of float": (dict[str, float], [{}, {"x": 1.5}]),
    "dict by int": (dict[int, int], [{}, {1: 1}]),
    "dict by short str": (dict[Annotated[str, Meta(max_length=1)], int], [{}, {"x": 1, "y": 1}]),
    "dict of two": (Annotated[dict[str, int], Meta(min_length=2)], [{"x": 1, "b": 2}, {"a": 1, "by": 2}]),
    "point": (Point, [Point(1)]),
    "point only": (PointOnly, [PointOnly(1)]),
    "point3": (Point3, [Point3(1, 2, 3)]),
    "tagged point": (TaggedPoint, [TaggedPoint(1)]),
    "shape": (TaggedPoint | Circle, [TaggedPoint(1), Circle(1.5)]),
    "point or null": (Point | None, [Point(1), None]),
    "tree": (Tree, [Tree([Tree([], 2)], 1)]),
    "wider tree": (WiderTree, [WiderTree([WiderTree([], 2.5)], 1)]),
    "row": (Row, [Row(1, "a")]),
    "longer row": (LongerRow, [LongerRow(1, "a", 2)]),
    "typed dict": (Mapping, [{"x": 1}]),
    "dataclass": (Data, [Data(1)]),
    "anything": (Any, [None, "abc", 1.5, [1], {"a": None}, {"x": 1}, True]),
}

STRUCTS = {"point", "point only", "point3", "tagged point", "tree", "wider tree", "typed dict", "dataclass"}


def is_careful(old: str, new: str) -> bool:
    """Pairs that may be refused though msgspec reads them: a missing tag, a dict that happens to have the fields."""
    dicts = [name.startswith("dict") for name in (old, new)]
    return "tagged point" in (old, new) or (any(dicts) and bool({old, new} & STRUCTS))


def snapshot(given_type: Any) -> dict[str, Any]:
    schemas, types = schemas_of({"t": given_type}, "#/types/")
    return {"format": 1, "types": types, "topics": {"t": {"topic": "t", "handlers": ["h"], "schema": schemas["t"]}}}


def changes(old: Any, new: Any) -> list[Change]:
    return compare(snapshot(old), snapshot(new))


def reads(values: list[Any], new: Any) -> bool:
    for codec in (msgspec.json, msgspec.msgpack):
        for value in values:
            try:
                codec.decode(codec.encode(value), type=new)
            except msgspec.ValidationError:
                return False
    return True


@pytest.mark.parametrize("old", TYPES)
def test_a_change_of_type_is_breaking_exactly_if_msgspec_can_not_read_it(old: str) -> None:
    old_type, old_values = TYPES[old]
    wrong = {}
    for new, (new_type, new_values) in TYPES.items():
        found = changes(old_type, new_type)
        backward = not any(change.is_breaking("backward") for change in found)
        forward = not any(change.is_breaking("forward") for change in found)
        real = (reads(old_values, new_type), reads(new_values, old_type))
        if (backward, forward) != real and not (is_careful(old, new) and backward <= real[0] and forward <= real[1]):
            wrong[new] = f"said {(backward, forward)}, is {real}: {[str(change) for change in found]}"
    assert not wrong, "\n".join(f"{old} -> {new}: {text}" for new, text in wrong.items())


def test_what_breaks_is_the_other_way_round_for_the_other_direction() -> None:
    for old, (old_type, _) in TYPES.items():
        for new, (new_type, _) in TYPES.items():
            there, back = changes(old_type, new_type), changes(new_type, old_type)
            assert any(change.is_breaking("backward") for change in there) == any(
                change.is_breaking("forward") for change in back
            ), (old, new)


# --- structs ---------------------------------------------------------------------------------------------------------

# Field name to (name in TYPES, whether it has a default).
Fields = dict[str, tuple[str, bool]]
fields = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.sampled_from(sorted(TYPES)), st.booleans()), max_size=5
)


def struct(given_fields: Fields) -> Any:
    """Under one name whatever the fields are, as an event is."""
    entries: list[Any] = []
    for name, (kind, optional) in given_fields.items():
        found, (first, *_) = TYPES[kind]
        default = msgspec.field(default_factory=lambda first=first: first)
        entries.append((name, found, default) if optional else (name, found))
    return msgspec.defstruct("Order", entries, kw_only=True, tag="ORDER", tag_field="event_name")


def written(given_fields: Fields, codec: Any) -> list[bytes]:
    """Bytes of it: with every field, once for each of its values, and with the required ones only."""
    tag = {"event_name": "ORDER"}
    kinds = {name: TYPES[kind][1] for name, (kind, _) in given_fields.items()}
    full = [
        {**tag, **{name: values[number % len(values)] for name, values in kinds.items()}}
        for number in range(max(map(len, kinds.values()), default=1))
    ]
    needed = {name: kinds[name][-1] for name, (_, optional) in given_fields.items() if not optional}
    return [codec.encode(value) for value in (*full, {**tag, **needed})]


@settings(deadline=None, max_examples=150)
@given(fields)
def test_a_struct_is_compatible_with_itself(given_fields: Fields) -> None:
    assert changes(struct(given_fields), struct(given_fields)) == []


@settings(deadline=None, max_examples=150)
@given(fields, st.sampled_from(sorted(TYPES)))
def test_a_field_with_a_default_can_come_and_go(given_fields: Fields, kind: str) -> None:
    more: Fields = {**given_fields, "new": (kind, True)}
    for old, new in ((given_fields, more), (more, given_fields)):
        (change,) = changes(struct(old), struct(new))
        assert change.path == "topic t.new"
        assert not change.is_breaking("full")


@settings(deadline=None, max_examples=150)
@given(fields, st.sampled_from(sorted(TYPES)))
def test_a_field_without_a_default_breaks_old_records_when_it_comes_and_old_readers_when_it_goes(
    given_fields: Fields, kind: str
) -> None:
    more: Fields = {**given_fields, "new": (kind, False)}
    (come,) = changes(struct(given_fields), struct(more))
    (gone,) = changes(struct(more), struct(given_fields))
    assert (come.breaks, gone.breaks) == ({"backward"}, {"forward"})


@settings(deadline=None, max_examples=400)
@given(fields, fields)
def test_whatever_is_called_compatible_is_read(old: Fields, new: Fields) -> None:
    found = changes(struct(old), struct(new))
    for codec in (msgspec.json, msgspec.msgpack):
        if not any(change.is_breaking("backward") for change in found):
            for data in written(old, codec):
                codec.decode(data, type=struct(new))
        if not any(change.is_breaking("forward") for change in found):
            for data in written(new, codec):
                codec.decode(data, type=struct(old))


# --- words -----------------------------------------------------------------------------------------------------------


class Line(msgspec.Struct):
    sku: str
    price: float = 0.0


class NewLine(msgspec.Struct):
    sku: str
    price: decimal.Decimal
    note: str = ""


class Order(msgspec.Struct):
    lines: list[Line]
    by_name: dict[str, Line | None] = {}
    count: int = 0
    old: int = 0


class NewOrder(msgspec.Struct, forbid_unknown_fields=True):
    lines: list[NewLine]
    by_name: dict[str, NewLine | None] = {}
    count: int | None = 1
    colors: tuple[Color, ...] = ()


def test_changes_are_told_by_path_and_in_words() -> None:
    assert [f"{change} {sorted(change.breaks)}" for change in changes(Order, NewOrder)] == [
        "topic t: unknown fields are refused now []",
        'topic t.by_name{}.note: added with default "" []',
        "topic t.by_name{}.price: default 0.0 removed ['backward']",
        "topic t.by_name{}.price: number became decimal ['forward']",
        "topic t.colors: added with default [] []",
        "topic t.count: default 0 became default 1 []",
        "topic t.count: integer became integer | null ['forward']",
        'topic t.lines[].note: added with default "" []',
        "topic t.lines[].price: default 0.0 removed ['backward']",
        "topic t.lines[].price: number became decimal ['forward']",
        "topic t.old: removed ['backward']",
    ]


ALIKE = "names differ only in case, dots and underscores"


def test_fields_of_an_array_are_known_by_their_places() -> None:
    def row(*names: str) -> Any:
        return msgspec.defstruct("Place", [(name, int, 0) for name in names], array_like=True, tag=True)

    assert [str(change) for change in changes(row("x", "y"), row("y", "x")) if change.is_breaking("full")] == [
        "topic t: x moved from place 1 to 2",
        "topic t: y moved from place 2 to 1",
    ]
    assert not [change for change in changes(row("x", "y"), row("x", "y", "z")) if change.breaks]


def entry(**given_entry: Any) -> dict[str, Any]:
    return {"topic": "t", "key_field": None, "handlers": [], "schema": {}, **given_entry}


def events(**entries: dict[str, Any]) -> dict[str, Any]:
    return {"format": 1, "types": {}, "events": entries}


@pytest.mark.parametrize(
    ("old", "new", "told", "breaks"),
    [
        (events(A=entry()), events(), "event A: removed", True),
        (events(), events(A=entry()), "event A: added", False),
        (events(A=entry()), {"format": 1, "types": {}}, "event A: removed", True),
        (events(A=entry(handlers=["h"])), events(A=entry()), "event A: handler h removed", True),
        (events(A=entry()), events(A=entry(handlers=["h"])), "event A: handler h added", False),
        (events(A=entry()), events(A=entry(topic="u")), "event A: its topic t became u", True),
        (
            events(A=entry(codec="json")),
            events(A=entry(codec="msgpack")),
            "event A: its codec json became msgpack",
            True,
        ),
        (
            events(A=entry()),
            events(A=entry(key_field="id")),
            "event A: key_field None became id: records of one key change partitions",
            False,
        ),
        (
            events(ORDER_PLACED=entry()),
            events(Order_Placed=entry()),
            "event ORDER_PLACED: can't be told apart from Order_Placed: " + ALIKE,
            True,
        ),
        (
            events(A_B=entry()),
            events(**{"A_B": entry(), "a.b": entry()}),
            "event A_B: can't be told apart from a.b: " + ALIKE,
            True,
        ),
        (
            events(A=entry(schema={"x-opaque": "shop.Money"})),
            events(A=entry(schema={"x-opaque": "shop.Amount"})),
            "event A: shop.Money became shop.Amount",
            True,
        ),
    ],
)
def test_registrations(old: dict[str, Any], new: dict[str, Any], told: str, breaks: bool) -> None:
    (change,) = compare(old, new)
    assert str(change) == told
    assert [change.is_breaking(direction) for direction in ("backward", "forward", "full")] == [breaks] * 3


def test_another_direction_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="direction='sideways' is not allowed: backward, forward, full"):
        Change("event A", "added").is_breaking("sideways")
