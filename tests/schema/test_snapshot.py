"""The committed files and the command line: a service of several releases, each a process or a registry of its own."""

import base64
import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from keven_core.kafka import event_handler
from keven_core.kafka.abstracts.metaclass.base_handler_meta import register_handler
from keven_core.kafka.commands.command import Command
from keven_core.kafka.errors import ConfigurationError, RegistrationError
from keven_core.kafka.events.event import Event
from keven_core.kafka.kinds import COMMANDS, KINDS
from keven_core.kafka.schema import Report, check, take_snapshot, update
from keven_core.kafka.schema.files import golden_path, to_text

pytestmark = pytest.mark.usefixtures("handler_registry")


class Line(msgspec.Struct):
    sku: str
    children: "list[Line]" = []


class Money:
    """Nothing that msgspec knows."""


def placed(body: dict[str, Any], name: str = "ORDER_PLACED") -> Any:
    """An event class of one release; `body` is field to type, or to (type, default)."""
    fields = {field: given[0] if isinstance(given, tuple) else given for field, given in body.items()}
    namespace = {
        "__module__": "shop",
        "__qualname__": f"{name.title()}Event",
        "__annotations__": fields,
        "event_name": name,
        **{field: given[1] for field, given in body.items() if isinstance(given, tuple)},
    }
    return type(Event)(f"{name.title()}Event", (Event,), namespace)


class Release:
    """Registers what a release has, in place of what the one before had."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_now(self, *events: Callable[[], Any]) -> None:
        for kind in KINDS:
            kind.classes.clear()
            for handler in kind.registry.handlers():
                kind.registry.unregister(handler.target)
        for register in events:
            register()

    def golden(self, name: str = "ORDER_PLACED", section: str = "events") -> list[dict[str, str]]:
        kept: list[dict[str, str]] = json.loads(golden_path(self.path).read_text())[section][name]
        return kept


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Release(tmp_path / "schema" / "keven.json")


FIRST = {"order_id": int, "customer": (str, "")}


def first() -> None:
    placed(FIRST)


def handled() -> None:
    event_handler("ORDER_PLACED")(print)


def test_a_first_update_makes_both_files_and_a_check_finds_nothing(release: Release) -> None:
    release.is_now(first, handled)
    assert not update(release.path).breaking
    report = check(release.path)
    assert (report.changes, report.breaking, report.is_current) == ([], [], True)
    snapshot = json.loads(release.path.read_text())
    assert snapshot == take_snapshot()
    assert snapshot["events"] == {
        "ORDER_PLACED": {
            "topic": "keven_events_order_placed",
            "key_field": None,
            "handlers": ["builtins.print"],
            "schema": {"$ref": "#/types/Order_PlacedEvent"},
        }
    }
    assert snapshot["types"]["Order_PlacedEvent"]["required"] == ["event_name", "order_id"]


def test_golden_bytes_are_what_the_class_writes_and_the_same_each_time(release: Release) -> None:
    release.is_now(first)
    update(release.path)
    texts = (release.path.read_text(), golden_path(release.path).read_text())
    update(release.path)
    assert texts == (release.path.read_text(), golden_path(release.path).read_text())
    kept = release.golden()
    assert len(kept) == 2  # source_command_uuid is a str in one, None in the other
    for entry in kept:
        event = msgspec.json.decode(entry["json"], type=Event.classes["ORDER_PLACED"])
        assert event.serialize("json").decode() == entry["json"]
        assert base64.b64encode(event.serialize("msgpack")).decode() == entry["msgpack"]
    assert entry["json"].startswith('{"event_name":"ORDER_PLACED","uuid":"text"')


def test_old_golden_bytes_stay_and_are_decoded_by_later_releases(release: Release) -> None:
    release.is_now(first)
    update(release.path)
    before = release.golden()
    release.is_now(lambda: placed({**FIRST, "note": (str | None, None)}))
    assert not update(release.path).breaking
    assert release.golden()[: len(before)] == before
    assert len(release.golden()) == len(before) + 2
    release.is_now(first)  # the field goes again: nothing is new, nothing is lost
    assert not update(release.path).breaking
    assert len(release.golden()) == len(before) + 2


def test_golden_bytes_find_what_the_schemas_do_not_say(release: Release) -> None:
    release.is_now(first)
    update(release.path)

    def picky() -> None:
        class OrderPlaced(Event):
            event_name = "ORDER_PLACED"
            order_id: int
            customer: str = ""

            def __post_init__(self) -> None:
                if self.order_id < 10:
                    raise ValueError("order_id starts at 10")

    release.is_now(picky)
    report = check(release.path)
    assert report.changes == []
    assert report.breaking == [
        f"event ORDER_PLACED, golden bytes {number} of 2: order_id starts at 10" for number in (1, 2)
    ]
    assert report.without_bytes == [
        "event ORDER_PLACED: its class refuses the example: order_id starts at 10; Meta(examples=[...]) gives another"
    ]


BREAKING: list[tuple[list[Callable[[], Any]], str]] = [
    ([lambda: placed({**FIRST, "order_id": str})], "event ORDER_PLACED.order_id: integer became string"),
    ([lambda: placed({**FIRST, "vat": int})], "event ORDER_PLACED.vat: added without a default"),
    ([lambda: placed({"order_id": int, "customer": str})], 'event ORDER_PLACED.customer: default "" removed'),
    (
        [lambda: placed({**FIRST, "customer": (Literal["Ada", ""], "")})],
        'event ORDER_PLACED.customer: string became one of "", "Ada"',
    ),
    ([], "event ORDER_PLACED: removed"),
    ([lambda: placed(FIRST, name="Order_Placed")], "event ORDER_PLACED: can't be told apart from Order_Placed"),
]
COMPATIBLE: list[tuple[list[Callable[[], Any]], str]] = [
    ([lambda: placed({**FIRST, "vat": (int, 0)})], "event ORDER_PLACED.vat: added with default 0"),
    ([lambda: placed({"order_id": int})], "event ORDER_PLACED.customer: removed"),
    ([lambda: placed({**FIRST, "order_id": float})], "event ORDER_PLACED.order_id: integer became number"),
    ([first, lambda: placed(FIRST, name="ORDER_SENT")], "event ORDER_SENT: added"),
    ([first, lambda: event_handler("ORDER_PLACED")(repr)], "event ORDER_PLACED: handler builtins.repr added"),
]


@pytest.mark.parametrize(("events", "told"), BREAKING, ids=[told for _, told in BREAKING])
def test_breaking_changes_fail(release: Release, events: list[Callable[[], Any]], told: str) -> None:
    release.is_now(first, handled)
    update(release.path)
    files = (release.path.read_text(), golden_path(release.path).read_text())
    release.is_now(*events, *([handled] if events and "apart" not in told else []))
    report = check(release.path)
    assert told in "\n".join(report.breaking)
    assert "BREAKING    " + told in str(report)
    assert update(release.path).breaking == report.breaking
    assert files == (release.path.read_text(), golden_path(release.path).read_text())
    update(release.path, allow_breaking=True)
    assert check(release.path).breaking == []
    assert check(release.path).is_current


@pytest.mark.parametrize(("events", "told"), COMPATIBLE, ids=[told for _, told in COMPATIBLE])
def test_compatible_changes_pass(release: Release, events: list[Callable[[], Any]], told: str) -> None:
    release.is_now(first, handled)
    update(release.path)
    release.is_now(*events, handled)
    report = check(release.path)
    assert report.breaking == []
    assert not report.is_current
    assert f"compatible  {told}" in str(report)
    assert not update(release.path).breaking
    assert check(release.path).is_current


def test_a_handler_that_is_gone_breaks(release: Release) -> None:
    release.is_now(first, handled)
    update(release.path)
    release.is_now(first)
    assert check(release.path).breaking == ["event ORDER_PLACED: handler builtins.print removed"]


def test_the_codec_of_a_foreign_topic_is_kept(release: Release) -> None:
    for codec in ("json", "msgpack"):
        release.is_now(lambda codec=codec: event_handler(topic="prices.v1", value_type=Line, codec=codec)(print))
        if codec == "json":
            update(release.path)
    assert "topic prices.v1: its codec json became msgpack" in check(release.path).breaking


def test_the_direction_decides_and_the_other_one_is_told(release: Release) -> None:
    release.is_now(first)
    update(release.path)
    release.is_now(lambda: placed({**FIRST, "order_id": int | None}))
    told = "event ORDER_PLACED.order_id: integer became integer | null"
    backward, forward, full = (check(release.path, direction) for direction in ("backward", "forward", "full"))
    assert backward.breaking == []
    assert f"compatible  {told} [breaks forward: old readers can't read it]" in str(backward)
    assert forward.breaking == full.breaking == [told]


def test_other_kinds_of_registrations(release: Release) -> None:
    def registers() -> None:
        event_handler(topic="prices.v1", value_type=Line, codec="json")(print)
        event_handler(topic="raw.v1")(print)
        register_handler(COMMANDS, repr, topic="raw.v1")
        event_handler("NO_CLASS")(print)
        placed({"price": (Money | None, None), "line": (Line | None, None)}, name="PRICED")
        placed({"price": Money}, name="MONEY")
        Event.classes["OLD"] = Money  # type: ignore[assignment]  # a class that is no struct
        placed({"blob": (msgspec.Raw, msgspec.Raw())}, name="RAW")

    release.is_now(registers)
    report = update(release.path)
    assert report.without_bytes == [
        f"event MONEY: no example can be made of price: {__name__}.Money; Meta(examples=[...]) gives one",
        f"event OLD: no example can be made of {__name__}.Money; Meta(examples=[...]) gives one",
        "event RAW: no example can be made of shop.RawEvent; Meta(examples=[...]) gives one",
    ]
    snapshot = take_snapshot()
    assert snapshot["topics"]["raw.v1"]["handlers"] == ["builtins.print", "builtins.repr"]
    assert snapshot["topics"]["prices.v1"]["schema"] == {"$ref": "#/types/Line"}
    assert snapshot["topics"]["raw.v1"]["schema"] == snapshot["events"]["NO_CLASS"]["schema"] == {}
    assert snapshot["events"]["OLD"]["schema"] == {"x-opaque": f"{__name__}.Money"}
    assert snapshot["events"]["RAW"]["schema"] == {"x-opaque": "shop.RawEvent"}
    assert {"x-opaque": f"{__name__}.Money"} in [
        part
        for node in snapshot["types"].values()
        for part in node.get("properties", {}).get("price", {}).get("anyOf", [])
    ]
    assert json.loads(release.golden("PRICED")[0]["json"])["line"] == {"sku": "text", "children": []}
    assert check(release.path).is_current


def test_examples_keep_the_constraints_of_their_fields(release: Release) -> None:
    constrained: dict[str, Any] = {
        "low": Annotated[int, Meta(ge=3, lt=5)],
        "above": Annotated[int, Meta(gt=3)],
        "below": Annotated[float, Meta(lt=-3)],
        "even": Annotated[int, Meta(multiple_of=4, ge=5)],
        "long": Annotated[str, Meta(min_length=9)],
        "short": Annotated[str, Meta(max_length=2)],
        "three": Annotated[list[int], Meta(min_length=3)],
        "none": Annotated[list[int], Meta(max_length=0)],
        "wide": Annotated[bytes, Meta(min_length=9)],
        "code": Annotated[str, Meta(pattern="^[A-Z]{3}$", examples=["EUR"])],
        "by_code": dict[Annotated[str, Meta(min_length=6)], int],
        "by_number": dict[int, int],
        "no_entry": Annotated[dict[str, int], Meta(max_length=0)],
    }
    release.is_now(lambda: placed(constrained))
    assert update(release.path).without_bytes == []
    assert json.loads(release.golden()[0]["json"])["code"] == "EUR"
    release.is_now(lambda: placed({"code": Annotated[str, Meta(pattern="^[A-Z]{3}$")]}))
    assert check(release.path).without_bytes == [
        "event ORDER_PLACED: no example can be made of code: a string; Meta(examples=[...]) gives one"
    ]


def test_what_is_said_about_a_class_is_no_part_of_its_snapshot(release: Release) -> None:
    def told(text: str, note: str) -> dict[str, Any]:
        cls = placed({"title": str, "description": Annotated[str, Meta(description=note, examples=[note])]})
        cls.__doc__ = text
        return take_snapshot()

    release.is_now()
    one = told("a", "b")
    release.is_now()
    assert one == told("c", "d")
    assert {"title", "description"} <= set(one["types"]["Order_PlacedEvent"]["properties"])


def test_classes_that_share_a_name_are_told_apart_by_their_events(release: Release) -> None:
    def ships() -> None:
        class ShipOrder(Command):
            command_name = "SHIP_ORDER"
            lines: list[Line] = []

    release.is_now(ships)
    assert update(release.path).without_bytes == []
    snapshot = take_snapshot()
    assert list(snapshot["events"]) == [f"CMD_SHIP_ORDER_{phase}" for phase in ("COMPLETED", "ERRORED", "STARTED")]
    for name, entry in snapshot["events"].items():
        node = snapshot["types"][entry["schema"]["$ref"].removeprefix("#/types/")]
        assert node["x-tag"] == name
        assert ("error_message" in node["properties"]) == (name == "CMD_SHIP_ORDER_ERRORED")
        assert release.golden(name)
    assert release.golden("SHIP_ORDER", "commands")[0]["json"].startswith('{"command_name":"SHIP_ORDER",')
    assert check(release.path).is_current


def test_old_style_classes_are_held_by_what_they_make_without_arguments(release: Release) -> None:
    def old_style(separator: str = ":") -> None:
        class StockChanged(Event):
            event_name = "STOCK_CHANGED"

            def __init__(self, article: str = "nail", change: int = 5) -> None:
                super().__init__()
                self.article, self.change = article, change

            def serialize_payload(self) -> str:
                return f"{self.article}{separator}{self.change}"

            def parse_payload(self, payload: str) -> None:
                self.article, change = payload.split(separator)
                self.change = int(change)

        class NeedsMore(Event):
            event_name = "NEEDS_MORE"

            def __init__(self, more: int) -> None:
                super().__init__()
                self.more = more

        class Restless(Event):
            event_name = "RESTLESS"

            def __init__(self) -> None:
                super().__init__()
                self.token = str(uuid.uuid4())

    release.is_now(old_style)
    restless, needs_more = sorted(update(release.path).without_bytes, reverse=True)
    assert restless == "event RESTLESS: an old-style class whose payload is another one each time that it is made"
    assert needs_more.startswith("event NEEDS_MORE: an old-style class is made without arguments for this: ")
    (kept,) = release.golden("STOCK_CHANGED")
    assert json.loads(kept["json"])["payload"] == "nail:5"
    assert check(release.path).is_current
    release.is_now(lambda: old_style(separator="/"))
    report = check(release.path)
    assert report.changes == []
    assert [line[:45] for line in report.breaking] == ["event STOCK_CHANGED, golden bytes 1 of 1: not"]


def test_two_types_of_one_name_are_refused(release: Release) -> None:
    twins: Any = [msgspec.defstruct("Twin", [(field, int)], module="shop") for field in "ab"]
    release.is_now(lambda: placed({"x": twins[0], "y": twins[1]}))
    with pytest.raises(RegistrationError, match=r"two classes are called shop\.Twin: a snapshot tells types by their"):
        take_snapshot()


def test_an_annotation_that_names_nothing_is_refused(release: Release) -> None:
    release.is_now(lambda: placed({"x": "Nowhere"}))
    with pytest.raises(RegistrationError, match=r"shop\.Order_PlacedEvent has an annotation that leads nowhere: name"):
        take_snapshot()


def test_files_that_are_missing_or_something_else_are_named(release: Release) -> None:
    with pytest.raises(ConfigurationError, match=r"keven.json does not exist; `python -m keven_core schema update"):
        check(release.path)
    release.is_now(first)
    update(release.path)
    golden_path(release.path).unlink()
    with pytest.raises(ConfigurationError, match=r"keven.golden.json does not exist"):
        check(release.path)
    release.path.write_text("[1]")
    with pytest.raises(ConfigurationError, match="is not a snapshot of format 1"):
        check(release.path)
    release.path.write_text("{")
    with pytest.raises(ConfigurationError, match="can't be read"):
        check(release.path)
    with pytest.raises(ConfigurationError, match="direction='up' is not allowed: backward, forward, full"):
        check(release.path, "up")


def test_the_text_of_a_file_is_sorted_and_short_things_share_a_line() -> None:
    value = {"b": {"y": 1, "x": ["ä"]}, "a": {"long": ["x" * 70, "y" * 70], "empty": {}}}
    text = to_text(value)
    assert json.loads(text) == value
    assert text.splitlines() == [
        "{",
        '  "a": {',
        '    "empty": {},',
        '    "long": [',
        f'      "{"x" * 70}",',
        f'      "{"y" * 70}"',
        "    ]",
        "  },",
        '  "b": {"x": ["ä"], "y": 1}',
        "}",
    ]


# --- the fixture -----------------------------------------------------------------------------------------------------


def test_the_fixture_passes_and_fails_with_the_report(release: Release, assert_schema_compatible: Any) -> None:
    release.is_now(first)
    update(release.path)
    assert_schema_compatible(release.path)
    release.is_now(lambda: placed({**FIRST, "order_id": int | None}))
    assert_schema_compatible(release.path)
    with pytest.raises(pytest.fail.Exception, match=r"BREAKING    event ORDER_PLACED.order_id: integer became"):
        assert_schema_compatible(release.path, direction="full")
    with pytest.raises(ConfigurationError, match="does not exist"):
        assert_schema_compatible(release.path.with_name("other.json"))


# --- the command line ------------------------------------------------------------------------------------------------

SHOP = """
from keven_core.kafka import Event, EventHandler

class OrderPlaced(Event):
    event_name = "ORDER_PLACED"
    key_field = "order_id"
    order_id: int
    customer: str = ""

class Welcome(EventHandler):
    event_name = "ORDER_PLACED"
    def handle_event(self, event): ...
"""


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "keven_core", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_the_command_line_over_two_releases(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    code, _, err = run(tmp_path, "schema", "check", "shop")
    assert (code, err.splitlines()[0][:41]) == (2, "error: schema/keven.json does not exist; "), err
    assert run(tmp_path, "schema", "update", "shop")[::2] == (0, "")
    assert sorted(file.name for file in (tmp_path / "schema").iterdir()) == ["keven.golden.json", "keven.json"]
    assert run(tmp_path, "schema", "check", "--up-to-date", "shop") == (
        0,
        "schema/keven.json, backward: 0 breaking, 0 compatible\n",
        "",
    )
    (tmp_path / "shop.py").write_text(SHOP.replace("order_id: int", "order_id: int | None"))
    assert run(tmp_path, "schema", "check", "shop")[0] == 0
    code, _, err = run(tmp_path, "schema", "check", "--up-to-date", "shop")
    assert (code, err) == (1, "not up to date: `update` writes it\n")
    assert run(tmp_path, "schema", "check", "--direction", "full", "shop")[0] == 1
    (tmp_path / "shop.py").write_text(SHOP.replace("order_id: int", "order_id: str"))
    code, out, err = run(tmp_path, "schema", "check", "shop")
    assert (code, err) == (1, "if that is meant: `update --allow-breaking` takes it for the new state\n")
    assert "BREAKING    event ORDER_PLACED.order_id: integer became string\n" in out
    code, _, err = run(tmp_path, "schema", "update", "shop")
    assert (code, err) == (1, "nothing was written; if that is meant: --allow-breaking\n")
    assert run(tmp_path, "schema", "update", "--allow-breaking", "shop")[0] == 0
    assert run(tmp_path, "schema", "check", "--up-to-date", "shop")[0] == 0


def test_what_is_registered_can_be_shown(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    code, out, err = run(tmp_path, "schema", "show", "shop")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "event ORDER_PLACED, topic keven_events_order_placed, key order_id"
    assert {
        "  order_id: integer",
        '  customer: string = ""',
        "  uuid: string = ...",
        "  source_command_uuid: string | null = null",
    } < set(lines)
    assert lines[-1] == "  handled by shop.Welcome"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "usage: python -m keven_core COMMAND"),
        (["scheme"], "error: 'scheme' is not a command; allowed are schema, redrive"),
        (["schema"], "COMMAND"),
        (["schema", "check"], "MODULE"),
        (["schema", "check", "no.such.module"], "no.such.module can't be imported: ModuleNotFoundError"),
        (["schema", "check", "broken"], "broken can't be imported: ZeroDivisionError: division by zero"),
        (["schema", "check", "json", "--direction", "up"], "invalid choice: 'up'"),
        (["redrive"], "usage: python -m keven_core redrive"),
    ],
)
def test_wrong_arguments_exit_with_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    code, out, err = run(tmp_path, *arguments)
    assert (code, out) == (2, ""), err
    assert words in err


def test_help_names_the_commands(tmp_path: Path) -> None:
    code, out, err = run(tmp_path, "--help")
    assert (code, err) == (0, "")
    assert "  schema    " in out
    assert "  redrive   " in out


def test_a_report_reads_as_lines() -> None:
    assert str(Report(Path("a.json"), without_bytes=["event A: why"])).splitlines() == [
        "a.json, backward: 0 breaking, 0 compatible",
        "  no golden bytes  event A: why",
    ]
