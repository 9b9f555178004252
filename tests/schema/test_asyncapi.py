"""The AsyncAPI document is valid by the specification's own JSON schema, and says what is registered."""

import copy
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jsonschema
import msgspec
import pytest

from keven_core.kafka import event_handler
from keven_core.kafka.events.event import Event
from keven_core.kafka.schema import asyncapi_document

_SCHEMA = json.loads((Path(__file__).parents[1] / "data" / "asyncapi_3.0.0.json").read_text())


class Price(msgspec.Struct, tag="price"):
    """What something costs."""

    amount: float


class Gift(msgspec.Struct, tag="gift"):
    reason: str = ""


class Box(msgspec.Struct):
    inner: "Box | None" = None


def on_price(event: Any) -> None: ...


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft7Validator:
    jsonschema.Draft7Validator.check_schema(_SCHEMA)
    return jsonschema.Draft7Validator(_SCHEMA)


@pytest.fixture
def document(handler_registry: Any) -> dict[str, Any]:
    class OrderPlaced(Event):
        """A customer has ordered.

        More about it.
        """

        event_name = "ORDER_PLACED"
        key_field = "order_id"
        order_id: int
        cost: Price | Gift | None = None
        first: Price = msgspec.field(default_factory=lambda: Price(1.5))
        place: tuple[float, float] = (0.0, 0.0)
        by_day: dict[int, datetime.date] = {}
        size: Literal["S", "L"] = "S"
        box: Box | None = None

    class OrderSent(Event):
        event_name = "ORDER_SENT"

    event_handler("ORDER_PLACED")(on_price)
    event_handler(topic="prices.v1", value_type=list[Price], codec="msgpack")(on_price)
    event_handler(topic="raw.v1")(on_price)
    event_handler("NO_CLASS")(on_price)
    return asyncapi_document("shop", "1.2.3")


def test_it_is_valid_by_the_official_schema(document: dict[str, Any], validator: jsonschema.Draft7Validator) -> None:
    validator.validate(document)
    validator.validate(json.loads(json.dumps(document)))


def test_an_empty_registry_is_valid_too(handler_registry: Any, validator: jsonschema.Draft7Validator) -> None:
    validator.validate(asyncapi_document("shop", "1.2.3"))


def test_all_references_lead_somewhere(document: dict[str, Any]) -> None:
    def references(node: Any) -> list[str]:
        if isinstance(node, list):
            return [found for part in node for found in references(part)]
        if not isinstance(node, dict):
            return []
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [found for part in node.values() for found in references(part)]

    found = references(document)
    assert len(found) > 15
    for reference in found:
        target = document
        for step in reference.removeprefix("#/").split("/"):
            target = target[step]


def test_it_says_what_is_registered(document: dict[str, Any]) -> None:
    assert document["info"] == {"title": "shop", "version": "1.2.3"}
    assert document["channels"]["keven_events_order_placed"] == {
        "address": "keven_events_order_placed",
        "messages": {"ORDER_PLACED": {"$ref": "#/components/messages/events.ORDER_PLACED"}},
    }
    assert {name: operation["action"] for name, operation in document["operations"].items()} == {
        "receive.events.NO_CLASS": "receive",
        "receive.events.ORDER_PLACED": "receive",
        "receive.topics.prices.v1": "receive",
        "receive.topics.raw.v1": "receive",
        "send.events.ORDER_SENT": "send",
    }
    assert document["operations"]["receive.events.ORDER_PLACED"]["description"] == f"Handled by {__name__}.on_price."
    messages = document["components"]["messages"]
    assert messages["events.ORDER_PLACED"] == {
        "name": "ORDER_PLACED",
        "summary": "A customer has ordered.",
        "payload": {"$ref": "#/components/schemas/OrderPlaced"},
        "bindings": {
            "kafka": {
                "key": {"type": "string", "description": "The field order_id, as text."},
                "bindingVersion": "0.5.0",
            }
        },
    }
    assert messages["topics.prices.v1"] == {
        "name": "prices.v1",
        "contentType": "application/vnd.msgpack",
        "payload": {"type": "array", "items": {"$ref": "#/components/schemas/Price"}},
    }
    assert messages["events.NO_CLASS"] == {"name": "NO_CLASS", "payload": {}}


def test_payload_schemas_are_draft_07_and_hold_for_what_is_written(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    properties = schemas["OrderPlaced"]["properties"]
    assert properties["place"]["items"] == [{"type": "number"}, {"type": "number"}]
    assert properties["place"]["additionalItems"] is False
    assert properties["cost"]["anyOf"][0]["discriminator"] == "type"
    payload = {"$schema": "http://json-schema.org/draft-07/schema#", **document, **schemas["OrderPlaced"]}
    payload_validator = jsonschema.Draft7Validator(payload)
    order = Event.classes["ORDER_PLACED"]
    for event in (order(order_id=1), order(order_id=2, cost=Gift(), place=(1.5, 2), by_day={1: datetime.date.today()})):
        payload_validator.validate(json.loads(event.serialize()))
    for wrong in (
        {"place": [1, 2, 3]},
        {"place": ["a", 1]},
        {"size": "M"},
        {"cost": {"type": "loan"}},
        {"order_id": ""},
    ):
        with pytest.raises(jsonschema.ValidationError):
            payload_validator.validate({**json.loads(order(order_id=1).serialize()), **wrong})


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: document.update(asyncapi="2.6.0"),
        lambda document: document["info"].pop("version"),
        lambda document: document.update(topics={}),
        lambda document: document["operations"]["send.events.ORDER_SENT"].update(action="publish"),
        lambda document: document["operations"]["send.events.ORDER_SENT"].pop("channel"),
        lambda document: document["channels"]["prices.v1"].update(adress="prices.v1"),
        lambda document: document["components"]["messages"]["events.ORDER_SENT"].update(payload=7),
        lambda document: document["components"]["schemas"]["OrderSent"].update(required="event_name"),
        lambda document: document["components"]["schemas"]["OrderSent"].update(discriminator={"propertyName": "type"}),
    ],
)
def test_the_check_can_fail(
    document: dict[str, Any], validator: jsonschema.Draft7Validator, damage: Callable[[dict[str, Any]], Any]
) -> None:
    damaged = copy.deepcopy(document)
    damage(damaged)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(damaged)
