"""The shapes whose bytes are kept: what every release has to go on reading, and what this release writes.

    python tests/schema/shapes.py VERSION

writes tests/schema/golden/VERSION/, once per release; a folder that exists is never written again.
"""

import datetime
import decimal
import enum
import json
import sys
import uuid
from pathlib import Path
from typing import Any

import msgspec

from keven_core.kafka.details import BasicDetail
from keven_core.kafka.events.event import Event, GenericEvent, PickledEvent
from keven_core.kafka.kinds import EVENTS
from keven_core.kafka.message import generic_decoders

GOLDEN = Path(__file__).parent / "golden"
CODECS = ("json", "msgpack")


class Channel(enum.Enum):
    WEB = "web"
    SHOP = "shop"


class Line(msgspec.Struct):
    sku: str
    count: int
    price: float = 0.0


class EnvelopeOnly(Event):
    event_name = "SCHEMA_ENVELOPE_ONLY"


class OrderPlaced(Event):
    event_name = "SCHEMA_ORDER_PLACED"
    key_field = "order_id"
    order_id: int
    customer: str = ""
    lines: list[Line] = []
    channel: Channel = Channel.WEB
    total: decimal.Decimal = decimal.Decimal(0)
    due: datetime.date | None = None
    token: uuid.UUID | None = None
    blob: bytes = b""
    tags: dict[str, str] = {}
    ratio: float | None = None


class ByHand(Event):
    event_name = "SCHEMA_BY_HAND"

    def __init__(self, payload: Any = None, **envelope: Any) -> None:
        super().__init__(**envelope)
        self.payload = payload

    def serialize_payload(self) -> Any:
        return self.payload

    def parse_payload(self, payload: Any) -> None:
        self.payload = payload


class OwnAttributes(Event):
    event_name = "SCHEMA_OWN_ATTRIBUTES"

    def __init__(self, order_id: Any = None, **envelope: Any) -> None:
        super().__init__(**envelope)
        self.order_id = order_id


class Part(BasicDetail):
    __module__ = "shapes"  # also when this file is run


class Pickled(PickledEvent):
    event_name = "SCHEMA_PICKLED"
    detail_class = Part


ENVELOPE: dict[str, Any] = {
    "uuid": "5f0c6c9e-4c2c-4c51-9f0d-0d6f5f7a2b11",
    "originator": "shop-service",
    "created": datetime.datetime(2026, 3, 4, 5, 6, 7, 891011, tzinfo=datetime.timezone.utc),
    "source_command_uuid": "0a4f8f1c-1111-4222-8333-444455556666",
    "namespace": "shop/eu",
    "is_audit_event": True,
}


def generic() -> GenericEvent:
    """A generic event, as it comes from the wire."""
    fields = {**ENVELOPE, "event_name": "SCHEMA_UNKNOWN", "number": -5, "nested": {"list": [1, None, "ä"]}}
    event = generic_decoders(EVENTS)[0](msgspec.json.encode(fields))
    assert isinstance(event, GenericEvent)
    return event


def own_attributes() -> OwnAttributes:
    """Its own attributes, and one that its class does not tell of."""
    event = OwnAttributes(7, **ENVELOPE)
    event.later = ["ä", (1, 2)]  # type: ignore[attr-defined]
    return event


def details() -> Part:
    """Every value that has a tag."""
    return Part(
        order_id=2**53 + 1,
        text='Zoë 漢字 \u2028 "quoted"',
        nothing=None,
        parts=[Part(article="bolt"), Part(article="nut")],
        moment=datetime.datetime(2026, 3, 4, 5, 6, 7, 891011),
        instant=ENVELOPE["created"],
        second_time=datetime.datetime(2026, 10, 25, 2, 30, fold=1),
        day=datetime.date(2026, 4, 1),
        time=datetime.time(1, 2, 3),
        span=datetime.timedelta(days=-1, microseconds=5),
        total=decimal.Decimal("19.00"),
        token=uuid.UUID(int=7),
        blob=b"\x00\xff\x80",
        pair=(1, ("a",)),
        ids={5},
        frozen=frozenset(["x"]),
        by_number={1: "a", (2,): {"py/object": "no tag"}},
        large=2**70,
        endless=float("inf"),
    )


def shapes() -> dict[str, Event]:
    """Every shape that is kept, by name."""
    return {
        "envelope_only": EnvelopeOnly(**ENVELOPE),
        "order_placed": OrderPlaced(
            **ENVELOPE,
            order_id=2**53 + 1,
            customer='Zoë 漢字 \u2028 "quoted"',
            lines=[Line("a-1", 2, 9.5), Line("b-2", 1)],
            channel=Channel.SHOP,
            total=decimal.Decimal("19.00"),
            due=datetime.date(2026, 4, 1),
            token=uuid.UUID(int=7),
            blob=b"\x00\xff\x80",
            tags={"a": "1", "b": ""},
            ratio=0.1,
        ),
        "order_placed_defaults": OrderPlaced(uuid=ENVELOPE["uuid"], created=ENVELOPE["created"], order_id=1),
        "generic": generic(),
        "by_hand_text": ByHand("text \u2028 ä", **ENVELOPE),
        "by_hand_bytes": ByHand(b"\x00\xff", **ENVELOPE),
        "own_attributes": own_attributes(),
        "pickled": Pickled(details(), **ENVELOPE),
    }


def envelope_fields() -> dict[str, Any]:
    """The envelope's fields and their types, as JSON Schema; defaults may change."""
    (properties,) = (schema["properties"] for schema in msgspec.json.schema(Event)["$defs"].values())
    return {
        name: {key: value for key, value in schema.items() if key != "default"} for name, schema in properties.items()
    }


def content(event: Event) -> Any:
    """What tells two events of one class apart, beside the envelope."""
    return (event, None) if not event.is_old_style else (type(event), getattr(event, "details", None), vars(event))


def main() -> None:
    """Write the bytes of a release."""
    folder = GOLDEN / sys.argv[1]
    folder.mkdir(parents=True)
    for name, event in shapes().items():
        for codec in CODECS:
            (folder / f"{name}.{codec}").write_bytes(event.serialize(codec))
    (folder / "envelope_fields").write_text(json.dumps(envelope_fields(), indent=1) + "\n")


if __name__ == "__main__":
    main()
