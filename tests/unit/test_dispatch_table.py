"""From bytes to a route: what the compiled dispatch table identifies, refuses, and passes over."""

import itertools
import json
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from keven_core._native.dispatch import DispatchTable, Route, check_name
from keven_core.kafka.abstracts.event_handler import EventHandler, event_handler
from keven_core.kafka.errors import InternalError, UndecodableError
from keven_core.kafka.events.event import Event, GenericEvent
from keven_core.kafka.routing import build_table

LONG_NAME = "L" * 40  # needs str 8 in MessagePack
NAMES = ["ORDER_PLACED", "ORDER_PAID", "A", LONG_NAME, "with.dot-1"]


class Value(msgspec.Struct):
    """Stands for an event of any name: the tag is checked by msgspec in the real ones."""

    number: int = 0
    data: Any = None


def _tagged(name: str) -> type:
    return msgspec.defstruct(
        f"Tagged_{name}".replace(".", "_").replace("-", "_"),
        [("number", int, 0), ("data", Any, None)],
        tag=name,
        tag_field="event_name",
    )


class _NameOnly(msgspec.Struct):
    event_name: str | None = None


def make_route(name: str, **options: Any) -> Route:
    cls = _tagged(name)
    return Route(
        name,
        lambda value: None,
        decode_json=msgspec.json.Decoder(cls).decode,
        decode_msgpack=msgspec.msgpack.Decoder(cls).decode,
        **options,
    )


def make_table(names: list[str] = NAMES, **options: Any) -> DispatchTable:
    json_name, msgpack_name = msgspec.json.Decoder(_NameOnly).decode, msgspec.msgpack.Decoder(_NameOnly).decode
    return DispatchTable(
        [make_route(name) for name in names],
        name_json=lambda data: json_name(data).event_name,
        name_msgpack=lambda data: msgpack_name(data).event_name,
        **options,
    )


TABLE = make_table()


def resolved(value: bytes, *arguments: Any, table: DispatchTable = TABLE) -> tuple[str | None, Any]:
    route, decoded = table.resolve(value, *arguments)
    return (None, None) if route is None else (route.name, decoded)


# --- MessagePack by hand, to choose among its encodings ---------------------------------------------------------------


def pack_map(size: int, width: int) -> bytes:
    if width == 4:
        return bytes([0x80 | size])
    return b"\xde" + struct.pack(">H", size) if width == 16 else b"\xdf" + struct.pack(">I", size)


def pack_str(text: str, width: int) -> bytes:
    data = text.encode()
    if width == 5:
        return bytes([0xA0 | len(data)]) + data
    head, layout = {8: (b"\xd9", ">B"), 16: (b"\xda", ">H"), 32: (b"\xdb", ">I")}[width]
    return head + struct.pack(layout, len(data)) + data


# --- identification by the first field -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "style",
    [
        {"separators": (",", ":")},
        {"separators": (", ", ": ")},
        {"separators": (" , ", " : ")},
        {"indent": 2},
        {"indent": "\t"},
    ],
    ids=["compact", "spaces", "more spaces", "indented", "tabs"],
)
def test_json_is_identified_with_and_without_spaces(name: str, style: dict[str, Any]) -> None:
    value = json.dumps({"event_name": name, "number": 5}, **style).encode()
    for space in (b"", b" ", b"\r\n\t "):
        found, decoded = resolved(space + value)
        assert (found, decoded.number) == (name, 5)
        assert TABLE.name_of(space + value, "t") == name


@pytest.mark.parametrize(
    ("name", "str_width"),
    [(name, width) for name in NAMES for width in (5, 8, 16, 32) if width > 5 or len(name) < 32],
)
@pytest.mark.parametrize("map_width", [4, 16, 32])
def test_messagepack_is_identified_in_every_encoding(name: str, map_width: int, str_width: int) -> None:
    value = (
        pack_map(2, map_width) + pack_str("event_name", 5) + pack_str(name, str_width) + pack_str("number", 5) + b"\x05"
    )
    found, decoded = resolved(value)
    assert (found, decoded.number) == (name, 5)
    # Found without decoding, in the encodings that encoders choose for names.
    assert TABLE.name_of(value, "t") == (name if str_width in (5, 8) else None)


def test_the_name_of_the_field_may_be_encoded_long() -> None:
    value = pack_map(2, 4) + pack_str("event_name", 8) + pack_str("A", 5) + pack_str("number", 16) + b"\x05"
    assert resolved(value)[0] == "A"


@pytest.mark.parametrize(
    "value",
    [
        b'{"number":5,"event_name":"ORDER_PAID"}',
        b'{"event_name":"ORDER\\u005fPAID","number":5}',
        b'{"event\\u005fname":"ORDER_PAID","number":5}',
        b'{"event_name":"ORDER_PAI\\u0044","number":5}',
    ],
)
def test_what_the_quick_look_cant_see_is_found_by_decoding(value: bytes) -> None:
    found, decoded = resolved(value)
    assert (found, decoded.number) == ("ORDER_PAID", 5)


def test_the_name_may_come_last_in_messagepack() -> None:
    value = msgspec.msgpack.encode({"number": 5, "event_name": "ORDER_PAID"})
    assert resolved(value)[0] == "ORDER_PAID"


def test_names_that_are_prefixes_of_others_are_apart() -> None:
    table = make_table(["ORDER", "ORDER_PLACED", "ORDER_PLACED_TWICE", "O"])
    for name in ("ORDER_PLACED_TWICE", "ORDER", "O", "ORDER_PLACED", "ORDER"):
        value = msgspec.json.encode({"event_name": name})
        assert resolved(value, table=table)[0] == name
        assert resolved(msgspec.msgpack.encode({"event_name": name}), table=table)[0] == name
    for name in ("ORDER_", "ORDER_PLACE", "ORDER_PLACED_", "order"):
        assert resolved(msgspec.json.encode({"event_name": name}), table=table) == (None, None)


def test_runs_of_one_event_and_changes_between_events() -> None:
    # The event that matched last is compared first.
    for name in ["A", "A", "ORDER_PAID", "ORDER_PAID", "NOBODYS", "ORDER_PAID", "A", LONG_NAME, "ORDER_PLACED"]:
        for encode in (msgspec.json.encode, msgspec.msgpack.encode):
            expected = name if name in NAMES else None
            assert resolved(encode({"event_name": name, "number": 1}))[0] == expected


@pytest.mark.parametrize("name", ["NOBODYS", "../../etc/passwd", "a b", "x" * 249, "näh", "order_placed", "A\u2028"])
def test_unknown_names_are_passed_over_without_being_decoded(name: str) -> None:
    for rest in (b',"number":"not a number"}', b", this is not even JSON"):
        value = b'{"event_name":' + json.dumps(name, ensure_ascii=False).encode() + rest
        assert resolved(value) == (None, None)


def test_a_thousand_routes() -> None:
    names = [f"EVENT_{number:04}" for number in range(1000)] + [f"E{number}" for number in range(1000)]
    table = make_table(names)
    for name in names:
        assert resolved(msgspec.json.encode({"event_name": name, "number": 3}), table=table)[0] == name
        assert resolved(msgspec.msgpack.encode({"event_name": name, "number": 3}), table=table)[0] == name
    for number in range(1000, 2000):
        assert resolved(b'{"event_name":"EVENT_%d"}' % number, table=table) == (None, None)


def test_an_empty_table_passes_over_everything_named() -> None:
    assert resolved(b'{"event_name":"A"}', table=make_table([])) == (None, None)


# --- the order of identification -------------------------------------------------------------------------------------


def _bound_table() -> DispatchTable:
    return make_table(["ORDER_PLACED", "ORDER_PAID"], bound={"keven_events_order_placed": make_route("ORDER_PLACED")})


BOUND = "keven_events_order_placed"


def test_a_bound_topic_needs_no_name() -> None:
    route, decoded = _bound_table().resolve(b'{"number":5}', BOUND)
    assert (route.name, decoded.number) == ("ORDER_PLACED", 5)
    with pytest.raises(UndecodableError, match=r"has no event_name, and its topic is not bound"):
        _bound_table().resolve(b'{"number":5}', "keven_events")


def test_the_name_of_the_value_wins_over_the_bound_topic() -> None:
    table = _bound_table()
    assert resolved(b'{"event_name":"ORDER_PAID","number":5}', BOUND, table=table)[0] == "ORDER_PAID"
    assert resolved(b'{"event_name":"NOBODYS","number":5}', BOUND, table=table) == (None, None)


def test_a_value_that_is_wrong_for_its_own_name_is_refused_on_a_bound_topic() -> None:
    with pytest.raises(UndecodableError, match=r"ORDER_PLACED: Expected `int`, got `str` - at `\$\.number`"):
        _bound_table().resolve(b'{"event_name":"ORDER_PLACED","number":"x"}', BOUND)


def test_the_first_field_wins_over_the_header() -> None:
    headers = [("event_name", b"ORDER_PAID")]
    assert resolved(b'{"event_name":"A","number":5}', None, headers)[0] == "A"
    assert resolved(b'{"event_name":"A","number":5}', None, [("event_name", b"NOBODYS")])[0] == "A"


def test_the_header_spares_decoding_what_nobody_handles() -> None:
    undecodable = b'{"number": this is not JSON'
    assert resolved(undecodable, None, [("event_name", b"NOBODYS")]) == (None, None)
    with pytest.raises(UndecodableError):
        TABLE.resolve(undecodable, None, [("event_name", b"ORDER_PAID")])


def test_the_last_header_of_several_counts() -> None:
    headers = [("event_name", b"NOBODYS"), ("other", b"x"), ("event_name", b"ORDER_PAID")]
    assert resolved(b'{"number":1,"event_name":"ORDER_PAID"}', None, headers)[0] == "ORDER_PAID"


def test_a_header_alone_does_not_name_a_value() -> None:
    with pytest.raises(UndecodableError, match=r"has no event_name"):
        TABLE.resolve(b'{"number":5}', None, [("event_name", b"ORDER_PAID")])


def test_the_tag_wins_over_a_header_that_differs() -> None:
    assert resolved(b'{"number":1,"event_name":"A"}', None, [("event_name", b"ORDER_PAID")])[0] == "A"


def test_a_header_without_a_value_says_nothing() -> None:
    assert resolved(b'{"number":1,"event_name":"A"}', None, [("event_name", None)])[0] == "A"


def test_a_header_that_is_no_text_names_what_nobody_handles() -> None:
    assert resolved(b'{"number":1,"event_name":"A"}', None, [("event_name", b"\xff\xfe")]) == (None, None)


def test_a_header_with_control_characters_is_refused() -> None:
    with pytest.raises(UndecodableError, match=r"control characters"):
        TABLE.resolve(b'{"number":1,"event_name":"A"}', None, [("event_name", b"A\n")])


# --- names that are refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag", [b"5", b"null", b"false", b"[]", b"{}", b'["ORDER_PAID"]', b'{"event_name":"A"}', b"1.5"]
)
def test_a_tag_that_is_no_string_is_refused(tag: bytes) -> None:
    value = b'{"event_name":' + tag + b',"number":5}'
    with pytest.raises(UndecodableError):
        TABLE.resolve(value)
    with pytest.raises(UndecodableError):
        TABLE.resolve(msgspec.msgpack.encode(json.loads(value)))


@pytest.mark.parametrize("text", ["A\\n", "A\\u0000", "\\u001b[31mA", "A\\u007f", "\\tA"])
def test_a_name_with_control_characters_is_refused(text: str) -> None:
    value = b'{"event_name":"' + text.encode() + b'"}'
    with pytest.raises(UndecodableError, match=r"the event name has control characters") as caught:
        TABLE.resolve(value)
    assert str(caught.value).isprintable()
    with pytest.raises(UndecodableError, match=r"the event name has control characters"):
        TABLE.resolve(msgspec.msgpack.encode(json.loads(value)))


def test_an_empty_name_is_refused() -> None:
    for encode in (msgspec.json.encode, msgspec.msgpack.encode):
        with pytest.raises(UndecodableError, match=r"the event name is empty"):
            TABLE.resolve(encode({"event_name": ""}))


@pytest.mark.parametrize("size", [250, 300, 70_000])
def test_a_name_that_is_too_long_is_refused_and_not_repeated_in_full(size: int) -> None:
    for encode in (msgspec.json.encode, msgspec.msgpack.encode):
        with pytest.raises(UndecodableError, match=r"the event name is longer than 249 characters") as caught:
            TABLE.resolve(encode({"event_name": "N" * size}))
        assert len(str(caught.value)) < 200


def test_check_name() -> None:
    check_name("ORDER_PLACED")
    check_name("x" * 249)
    for name in ("", "x" * 250, "a\x1f", "a\x7f", "\n"):
        with pytest.raises(UndecodableError):
            check_name(name)


# --- values that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b" ",
        b"null",
        b"5",
        b'"text"',
        b"[]",
        b"{",
        b"{}",
        b'{"event_name"',
        b'{"event_name":',
        b'{"event_name":"A',
        b"\x00",
        b"\x80",
        b"\xc1",
        b"\xff\xff\xff",
        b"\x81\xaaevent_name",
        b"\xde\x00",
        b"\xdf",
        b"not JSON at all, but long enough to be looked at",
    ],
)
def test_values_that_are_no_envelope_are_refused(value: bytes) -> None:
    with pytest.raises(UndecodableError):
        TABLE.resolve(value)
    assert TABLE.name_of(value, "t") is None


@pytest.mark.parametrize("name", ["ORDER_PLACED", LONG_NAME])
@pytest.mark.parametrize("codec", [msgspec.json, msgspec.msgpack], ids=["json", "msgpack"])
def test_truncated_values_are_refused_wherever_they_end(name: str, codec: Any) -> None:
    value = codec.encode({"event_name": name, "number": 70_000, "data": ["text", {"a": 1.5}]})
    assert resolved(value)[0] == name
    for size in range(len(value)):
        with pytest.raises(UndecodableError):
            TABLE.resolve(value[:size])


@pytest.mark.parametrize("value", [None, "text", bytearray(b'{"event_name":"A"}'), memoryview(b"{}"), 5])
def test_only_bytes_are_resolved(value: Any) -> None:
    with pytest.raises(TypeError):
        TABLE.resolve(value)


def test_wrong_types_are_refused_with_the_event_and_the_place() -> None:
    with pytest.raises(UndecodableError, match=r"^ORDER_PAID: .*Expected `int`, got `str` - at `\$\.number`"):
        TABLE.resolve(b'{"event_name":"ORDER_PAID","number":"x"}')


def test_invalid_utf8_is_refused() -> None:
    with pytest.raises(UndecodableError):
        TABLE.resolve(b'{"event_name":"ORDER_PAID","data":"\xff\xfe"}')


def test_a_second_tag_that_differs_is_refused() -> None:
    with pytest.raises(UndecodableError, match=r"Invalid value 'A'"):
        TABLE.resolve(b'{"event_name":"ORDER_PAID","event_name":"A"}')


def test_the_size_limit() -> None:
    table = make_table(max_payload_bytes=1000)
    assert table.max_payload_bytes == 1000
    frame = len(b'{"event_name":"A","data":""}')
    for padding, refused in ((1000 - frame, False), (1001 - frame, True)):
        value = b'{"event_name":"A","data":"' + b"x" * padding + b'"}'
        if refused:
            with pytest.raises(
                UndecodableError, match=r"the value has 1001 bytes, more than KEVEN_MAX_PAYLOAD_BYTES=1000"
            ):
                table.resolve(value)
        else:
            assert resolved(value, table=table)[0] == "A"
    # The slow way looks before it decodes the name.
    with pytest.raises(UndecodableError, match=r"more than KEVEN_MAX_PAYLOAD_BYTES"):
        table.resolve(b'{"data":"' + b"x" * 1000 + b'","event_name":"A"}')


# --- depth -----------------------------------------------------------------------------------------------------------

PADDING = "p" * 600  # short values are not looked at: they can't be deep enough to hurt


def _json_lists(levels: int) -> bytes:
    return b'{"event_name":"A","data":' + b"[" * levels + b"1" + b"]" * levels + b',"pad":"%s"}' % PADDING.encode()


def _json_objects(levels: int) -> bytes:
    return b'{"event_name":"A","data":' + b'{"a":' * levels + b"1" + b"}" * levels + b',"pad":"%s"}' % PADDING.encode()


def _packed(data: bytes) -> bytes:
    return (
        pack_map(3, 4)
        + pack_str("event_name", 5)
        + pack_str("A", 5)
        + pack_str("data", 5)
        + data
        + pack_str("pad", 5)
        + pack_str(PADDING, 16)
    )


def _packed_lists(levels: int) -> bytes:
    return _packed(b"\x91" * levels + b"\x01")


def _packed_long_lists(levels: int) -> bytes:
    return _packed(b"\xdc\x00\x01" * (levels // 2) + b"\xdd\x00\x00\x00\x01" * (levels - levels // 2) + b"\x01")


def _packed_maps(levels: int) -> bytes:
    return _packed(b"\x81\xa1a" * levels + b"\x01")


def _packed_long_maps(levels: int) -> bytes:
    return _packed(b"\xde\x00\x01\x01" * (levels // 2) + b"\xdf\x00\x00\x00\x01\x01" * (levels - levels // 2) + b"\x01")


DEEP: list[Callable[[int], bytes]] = [
    _json_lists,
    _json_objects,
    _packed_lists,
    _packed_long_lists,
    _packed_maps,
    _packed_long_maps,
]


@pytest.mark.parametrize("build", DEEP, ids=lambda build: build.__name__)
def test_the_depth_limit_is_200_with_the_envelope(build: Callable[[int], bytes]) -> None:
    for total in (199, 200):
        assert resolved(build(total - 1))[0] == "A"
    for total in (201, 202, 10_000):
        with pytest.raises(UndecodableError, match=r"nested deeper than 200 levels"):
            TABLE.resolve(build(total - 1))


@pytest.mark.parametrize("build", DEEP, ids=lambda build: build.__name__)
def test_depth_is_looked_at_before_the_slow_way_decodes_the_name(build: Callable[[int], bytes]) -> None:
    value = build(9_999)
    start = value.index(b"event_name")
    unnamed = value[:start] + b"event-name" + value[start + 10 :]
    with pytest.raises(UndecodableError, match=r"nested deeper than 200 levels"):
        TABLE.resolve(unnamed)


@pytest.mark.parametrize("build", DEEP, ids=lambda build: build.__name__)
def test_depth_of_a_truncated_value_is_no_crash(build: Callable[[int], bytes]) -> None:
    value = build(150)
    for size in range(512, len(value) - 1, 7):
        with pytest.raises(UndecodableError):
            TABLE.resolve(value[:size])
    with pytest.raises(UndecodableError):
        TABLE.resolve(build(10_000)[:5_000])


def test_brackets_in_strings_are_no_depth() -> None:
    for text in ("[" * 10_000, '{"a":[' * 1000, '\\"[' * 1000, "\\" * 999 + '"' + "[{" * 500):
        found, decoded = resolved(msgspec.json.encode({"event_name": "A", "data": text}))
        assert (found, decoded.data) == ("A", text)
        found, decoded = resolved(msgspec.msgpack.encode({"event_name": "A", "data": text}))
        assert (found, decoded.data) == ("A", text)


def test_bytes_that_look_like_containers_are_no_depth() -> None:
    for data in (b"\x91" * 10_000, b"\xdd" * 300, 2**63, [0x9191919191919191] * 300, -1.5, [None, True] * 400):
        found, decoded = resolved(msgspec.msgpack.encode({"event_name": "A", "data": data}))
        assert (found, decoded.data) == ("A", data)


EXTENSIONS = {
    "fixext 1": b"\xd4\x05\x91",
    "fixext 2": b"\xd5\x05\x91\x91",
    "fixext 4": b"\xd6\x05" + b"\x91" * 4,
    "fixext 8": b"\xd7\x05" + b"\x91" * 8,
    "fixext 16": b"\xd8\x05" + b"\x91" * 16,
    "ext 8": b"\xc7\x03\x05\x91\x91\x91",
    "ext 16": b"\xc8\x00\x03\x05\x91\x91\x91",
    "ext 32": b"\xc9\x00\x00\x00\x03\x05\x91\x91\x91",
}
SCALAR_ENCODINGS = {
    "float 32": b"\xca" + b"\x91" * 4,
    "float 64": b"\xcb\x3f" + b"\x91" * 7,
    "uint 8": b"\xcc\x91",
    "uint 16": b"\xcd\x91\x91",
    "uint 32": b"\xce" + b"\x91" * 4,
    "uint 64": b"\xcf" + b"\x91" * 8,
    "int 8": b"\xd0\x91",
    "int 16": b"\xd1\x91\x91",
    "int 32": b"\xd2" + b"\x91" * 4,
    "int 64": b"\xd3" + b"\x91" * 8,
    "bin 8": b"\xc4\x02\x91\x91",
    "bin 16": b"\xc5\x00\x02\x91\x91",
    "bin 32": b"\xc6\x00\x00\x00\x02\x91\x91",
}


@pytest.mark.parametrize("name", [*EXTENSIONS, *SCALAR_ENCODINGS])
def test_every_encoding_is_walked_over_to_its_end(name: str) -> None:
    one = {**EXTENSIONS, **SCALAR_ENCODINGS}[name]
    # A byte too few or too many and each would be taken for a list within the last one.
    found, decoded = resolved(_packed(b"\xdc\x01\x2c" + one * 300))
    assert found == "A"
    assert len(decoded.data) == 300
    deep = _packed(b"\x92" * 150 + (one + b"\x92") * 60 + one + b"\x01" * 211)
    with pytest.raises(UndecodableError, match=r"nested deeper than 200 levels"):
        TABLE.resolve(deep)


def test_many_small_containers_are_no_depth() -> None:
    data = [[[]]] * 5_000
    for encode in (msgspec.json.encode, msgspec.msgpack.encode):
        assert resolved(encode({"event_name": "A", "data": data}))[0] == "A"


def test_a_messagepack_container_that_claims_to_be_huge_is_refused() -> None:
    for head in (
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
    ):
        value = _packed(head + b"\x91" * 700)
        with pytest.raises(UndecodableError):
            TABLE.resolve(value)


# --- any bytes at all ------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=40)
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5)
)
SPACE = st.text(" \t\r\n", max_size=3)


def _never_crashes(value: bytes, topic: str | None = None) -> str | None:
    """Resolve; the name of the route, or None. Nothing but UndecodableError may come out."""
    try:
        return resolved(value, topic)[0]
    except UndecodableError:
        return None


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes(value: bytes) -> None:
    _never_crashes(value)
    TABLE.name_of(value, "t")


PREFIXES = [
    b'{"event_name":"',
    b'{"event_name": "ORDER_PAID"',
    b'{"event_name":"ORDER_PAID","data":',
    b"\x83\xaaevent_name",
    b"\x83\xaaevent_name\xaaORDER_PAID\xa4data",
    b"\xde\x00\x03\xaaevent_name\xd9",
    b"\xdf\x00\x00\x00\x03\xaaevent_name\xd9\x28",
]


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(PREFIXES), st.binary(max_size=900))
@example(b"\x83\xaaevent_name", b"")
@example(b"\x83\xaaevent_name", b"\xd9")
@example(b"\x83\xaaevent_name", b"\xd9\xff")
@example(b"\x83\xaaevent_name\xaaORDER_PAID\xa4data", b"\xdd" * 700)
def test_random_bytes_after_a_good_beginning(prefix: bytes, rest: bytes) -> None:
    _never_crashes(prefix + rest)
    TABLE.name_of(prefix + rest, "t")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([*NAMES, "NOBODYS"]),
    st.dictionaries(st.text(max_size=8), TREES, max_size=4),
    st.integers(0, 4),
    st.sampled_from([{}, {"indent": 1}, {"separators": (" ,\n", "\t: ")}, {"ensure_ascii": False}]),
    SPACE,
)
def test_any_envelope_is_identified_in_both_codecs(
    name: str, fields: dict[str, Any], place: int, style: dict[str, Any], space: str
) -> None:
    assume(not {"event_name", "number", "data"} & fields.keys())
    entries = list(fields.items())
    entries.insert(place, ("event_name", name))
    value = dict(entries)
    expected = name if name in NAMES else None
    try:
        packed = msgspec.msgpack.encode(value)
    except OverflowError:
        packed = None
    assert resolved((space + json.dumps(value, **style)).encode("utf-8", "surrogatepass"))[0] == expected
    if packed is not None:
        assert resolved(packed)[0] == expected


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damaged_values_are_decoded_or_refused(data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from([msgspec.json, msgspec.msgpack]))
    value = bytearray(codec.encode({"event_name": "ORDER_PAID", "number": 7, "data": [{"a": "b" * 20}] * 20}))
    for _ in range(data.draw(st.integers(1, 4))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    _never_crashes(bytes(value))
    _never_crashes(bytes(value), BOUND)


def _depth(tree: Any) -> int:
    if isinstance(tree, dict):
        return 1 + max((_depth(value) for value in tree.values()), default=0)
    if isinstance(tree, list):
        return 1 + max((_depth(value) for value in tree), default=0)
    return 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TREES, st.integers(180, 220), st.booleans())
def test_the_depth_that_is_computed_is_the_depth_that_is_there(tree: Any, levels: int, as_map: bool) -> None:
    assume(_depth(tree) == 0 or tree)  # an empty innermost container costs nothing in MessagePack
    nested = tree
    for level in range(levels):
        nested = {"k": nested} if as_map and level % 2 else [nested]
    value = {"event_name": "A", "data": nested, "pad": PADDING}
    too_deep = _depth(value) > 200
    try:
        encoded = [msgspec.json.encode(value), msgspec.msgpack.encode(value)]
    except OverflowError:
        encoded = [msgspec.json.encode(value)]
    for number, data in enumerate(encoded):
        try:
            refused = False
            TABLE.resolve(data)
        except UndecodableError as error:
            refused = "nested deeper" in str(error)
        if number == 0 or _depth(value) not in (200, 201):
            assert refused == too_deep


# --- routes of other kinds -------------------------------------------------------------------------------------------


def test_everything_goes_to_one_route_undecoded() -> None:
    route = Route("*", lambda value: None, raw=True)
    table = DispatchTable((), everything=route)
    for value in (b"", b"\x00", b'{"event_name":"A"}'):
        assert table.resolve(value) == (route, value)


def test_unnamed_events_go_to_their_own_route() -> None:
    unnamed = Route("*", lambda value: None, decode_json=msgspec.json.decode, decode_msgpack=msgspec.msgpack.decode)
    table = make_table(["A"], unnamed=unnamed)
    assert resolved(b'{"event_name":"A"}', table=table)[0] == "A"
    assert resolved(b'{"event_name":"B","x":1}', table=table) == ("*", {"event_name": "B", "x": 1})
    assert resolved(b'{"x":1,"event_name":"B"}', table=table)[0] == "*"
    with pytest.raises(UndecodableError):
        table.resolve(b'{"x":1}')


def test_a_route_needs_decoders_unless_it_is_raw() -> None:
    with pytest.raises(InternalError, match=r"the route 'A' has no decoders"):
        Route("A", print, decode_json=msgspec.json.decode)


def test_routes_say_what_they_are() -> None:
    route = Route("A", print, raw=True, is_async=True, with_topic=True)
    assert (route.name, route.call, route.raw, route.is_async, route.with_topic) == ("A", print, True, True, True)
    assert repr(route) == "<Route A async raw>"


def test_name_of_takes_the_topics_event_where_the_value_names_none() -> None:
    table = _bound_table()
    assert table.name_of(b'{"number":1}', BOUND) == "ORDER_PLACED"
    assert table.name_of(None, BOUND) == "ORDER_PLACED"
    assert table.name_of(None, "keven_events") is None
    assert table.name_of(b'{"event_name":"NOBODYS"}', "keven_events") == "NOBODYS"
    assert table.name_of(b'{"event_name":"\xff\xfe is no text"}', "keven_events") == "\ufffd\ufffd is no text"


# --- tables that are built from the registry -------------------------------------------------------------------------


@pytest.mark.usefixtures("handler_registry")
class TestBuildTable:
    def test_events_are_bound_to_their_topics(self) -> None:
        class OrderPlaced(Event):
            event_name = "ORDER_PLACED"
            order_id: int

        event_handler("ORDER_PLACED")(lambda event: None)
        event_handler("NO.CLASS")(lambda event: None)
        table = build_table(EventHandler)
        assert sorted(table.routes) == ["NO.CLASS", "ORDER_PLACED"]
        assert sorted(table.bound) == ["keven_events_no.class", "keven_events_order_placed"]
        assert isinstance(table.resolve(b'{"order_id":5}', "keven_events_order_placed")[1], OrderPlaced)
        generic = table.resolve(b'{"order_id":5}', "keven_events_no.class")[1]
        assert isinstance(generic, GenericEvent)
        assert (generic.event_name, generic.order_id) == ("NO.CLASS", 5)
        with pytest.raises(UndecodableError):
            table.resolve(b'{"order_id":5}', "keven_events")

    def test_only_the_wanted_names(self) -> None:
        for name in ("A", "B", "C"):
            event_handler(name)(lambda event: None)
        event_handler(topic="shop.raw")(lambda value: None)
        table = build_table(EventHandler, names=["c", "A", "NOBODYS"])
        assert sorted(table.routes) == ["A", "C"]
        assert "shop.raw" not in table.bound
        assert "shop.raw" in build_table(EventHandler).bound

    def test_one_handler_for_all_events(self) -> None:
        class OrderPlaced(Event):
            event_name = "ORDER_PLACED"
            order_id: int

        got: list[Any] = []
        table = build_table(EventHandler, handler=got.append, all_messages=True)
        for value in (b'{"event_name":"ORDER_PLACED","order_id":5}', b'{"event_name":"OTHER","x":1}'):
            route, decoded = table.resolve(value)
            route.call(decoded)
        assert [type(event) for event in got] == [OrderPlaced, GenericEvent]
        assert [event.event_name for event in got] == ["ORDER_PLACED", "OTHER"]

    def test_one_handler_for_some_events(self) -> None:
        table = build_table(EventHandler, names=["A"], handler=print)
        assert resolved(b'{"event_name":"A"}', table=table)[0] == "A"
        assert resolved(b'{"event_name":"B"}', table=table) == (None, None)

    @pytest.mark.parametrize("topic", [None, "keven_events", "keven_events_one"])
    @pytest.mark.parametrize("given", ["one", "One", "ONE"])
    @pytest.mark.parametrize("sent", ["ONE", None])
    def test_a_name_that_nobody_has_registered_is_found_in_upper_case(
        self, given: str, sent: str | None, topic: str | None
    ) -> None:
        sent = sent or given
        table = build_table(EventHandler, names=[given], handler=print)
        route, decoded = table.resolve(b'{"event_name":"%s"}' % sent.encode(), topic)
        assert route is not None
        assert decoded.event_name == sent

    def test_the_limit_reaches_the_table(self) -> None:
        assert build_table(EventHandler, max_payload_bytes=12345).max_payload_bytes == 12345

    def test_a_thousand_registered_handlers(self) -> None:
        for number in range(1000):
            event_handler(f"EVENT_{number}")(lambda event: None)
        table = build_table(EventHandler)
        assert len(table.routes) == len(table.bound) == 1000
        for number in itertools.chain(range(0, 1000, 7), [999]):
            assert resolved(b'{"event_name":"EVENT_%d"}' % number, table=table)[0] == f"EVENT_{number}"
