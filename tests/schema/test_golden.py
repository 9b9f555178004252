"""Bytes of every released shape are read as they were meant, and this release writes what it said it would."""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from shapes import CODECS, ENVELOPE, GOLDEN, EnvelopeOnly, Line, OrderPlaced, content, envelope_fields, shapes

import keven_core
from keven_core.kafka.abstracts.event_handler import EventHandler, event_handler
from keven_core.kafka.events.event import Event, GenericEvent
from keven_core.kafka.message import decoders_of
from keven_core.testing import dispatch

RELEASES = sorted(folder.name for folder in GOLDEN.iterdir())
FILES = sorted(file for release in RELEASES for file in (GOLDEN / release).iterdir() if file.suffix)


def decode(file: Path) -> Any:
    """The event in a golden file, by the way that a server goes."""
    got: list[Any] = []
    name = shapes()[file.stem].event_name
    with EventHandler.registry_of().isolated():
        event_handler(name)(got.append)
        result = dispatch(file.read_bytes())
    assert result.outcome == "done", result.error
    return got[0]


def test_this_release_is_kept() -> None:
    assert keven_core.__version__ in RELEASES, "run `python tests/schema/shapes.py VERSION` for the new release"


@pytest.mark.parametrize("release", RELEASES)
def test_every_shape_is_kept_in_both_codecs(release: str) -> None:
    kept = {file.name for file in (GOLDEN / release).iterdir()} - {"envelope_fields"}
    assert kept == {f"{name}.{codec}" for name in shapes() for codec in CODECS}


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_released_bytes_are_read_as_they_were_meant(file: Path) -> None:
    event, expected = decode(file), shapes()[file.stem]
    assert type(event) is type(expected)
    if isinstance(event, GenericEvent):
        assert event.event_name == "SCHEMA_UNKNOWN"
        assert event.fields == {"number": -5, "nested": {"list": [1, None, "ä"]}}
    else:
        assert content(event) == content(expected)
    for name in ENVELOPE:
        assert getattr(event, name) == getattr(expected, name)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", shapes())
def test_this_release_writes_the_bytes_that_it_is_known_for(name: str, codec: str) -> None:
    kept = (GOLDEN / keven_core.__version__ / f"{name}.{codec}").read_bytes()
    assert shapes()[name].serialize(codec) == kept


@pytest.mark.parametrize("release", RELEASES)
def test_no_field_of_the_envelope_has_gone_or_changed_its_type(release: str) -> None:
    released = json.loads((GOLDEN / release / "envelope_fields").read_text())
    now = envelope_fields()
    assert {name: now.get(name) for name in released} == released


def test_every_field_of_the_envelope_has_a_default() -> None:
    event = msgspec.json.decode(b'{"event_name":"SCHEMA_ENVELOPE_ONLY"}', type=EnvelopeOnly)
    assert (event.originator, event.source_command_uuid, event.namespace, event.is_audit_event) == ("", None, "", False)
    assert event.uuid
    assert event.created.tzinfo is not None


@pytest.mark.parametrize("codec", [msgspec.json, msgspec.msgpack], ids=["json", "msgpack"])
def test_unknown_fields_are_ignored_at_every_level(codec: Any) -> None:
    value = {
        "event_name": OrderPlaced.event_name,
        "new_in_the_envelope": {"a": [1, 2, {"b": None}]},
        "order_id": 5,
        "lines": [{"sku": "a", "count": 1, "new_in_the_line": True}],
        "new_at_the_end": 1.5,
    }
    decoded = decoders_of(OrderPlaced)[codec is msgspec.msgpack](codec.encode(value))
    assert (decoded.order_id, decoded.lines) == (5, [Line("a", 1)])


@pytest.mark.usefixtures("handler_registry")
@pytest.mark.parametrize("codec", CODECS)
def test_an_older_release_reads_what_a_newer_one_writes(codec: str) -> None:
    """The next release adds a field with a default: both directions of a rolling update."""

    class NewerOrderPlaced(Event):
        event_name = OrderPlaced.event_name
        order_id: int
        added_later: list[int] = []

    written = NewerOrderPlaced(order_id=7, added_later=[1, 2], namespace="eu").serialize(codec)
    read = decoders_of(OrderPlaced)[codec == "msgpack"](written)
    assert (read.order_id, read.namespace, read.customer) == (7, "eu", "")
    older = (GOLDEN / RELEASES[0] / f"order_placed.{codec}").read_bytes()
    again = decoders_of(NewerOrderPlaced)[codec == "msgpack"](older)
    assert (again.order_id, again.added_later, again.namespace) == (2**53 + 1, [], "shop/eu")


def test_a_changed_type_is_refused_and_not_guessed() -> None:
    decode_json = decoders_of(OrderPlaced)[0]
    for wrong in (b'"5"', b"5.5", b"null", b"true", b"[5]"):
        with pytest.raises(msgspec.ValidationError, match=r"\$\.order_id"):
            decode_json(b'{"event_name":"SCHEMA_ORDER_PLACED","order_id":%s}' % wrong)


def test_a_time_keeps_its_instant() -> None:
    created = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    event = EnvelopeOnly(created=created)
    for codec in CODECS:
        read = decoders_of(EnvelopeOnly)[codec == "msgpack"](event.serialize(codec))
        assert read.created == created
        assert read.created.tzinfo is not None
