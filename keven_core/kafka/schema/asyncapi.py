"""An AsyncAPI 3 document of what is registered: https://www.asyncapi.com/docs/reference/specification/v3.0.0.

    topic                               channel
    event with handlers here            operation "receive"
    event without                       operation "send": its class is here to be published
    event, value of a foreign topic     message; its payload a schema of components.schemas

Payload schemas are JSON Schema draft-07, AsyncAPI's own; msgspec speaks draft 2020-12, from which they are translated.
Retry and dead-letter topics are not in it: they belong to a server's client id, not to the registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keven_core.kafka.schema.snapshot import Described, describe

__all__ = ["asyncapi_document"]

_CONTENT_TYPES = {"json": "application/json", "msgpack": "application/vnd.msgpack"}


def asyncapi_document(title: str, version: str) -> dict[str, Any]:
    """The document, ready for JSON; `title` and `version` are the service's. Makes no connection and writes nothing."""
    described, types = describe("#/components/schemas/")
    document: dict[str, Any] = {
        "asyncapi": "3.0.0",
        "info": {"title": title, "version": version},
        "defaultContentType": _CONTENT_TYPES["json"],
        "channels": {},
        "operations": {},
        "components": {"messages": {}, "schemas": {name: _draft_07(node) for name, node in sorted(types.items())}},
    }
    for one in described:
        action, key = "receive" if one.handlers else "send", f"{one.section}.{one.name}"
        channel = document["channels"].setdefault(one.topic, {"address": one.topic, "messages": {}})
        channel["messages"][one.name] = {"$ref": f"#/components/messages/{key}"}
        operation = document["operations"][f"{action}.{key}"] = {
            "action": action,
            "channel": {"$ref": f"#/channels/{one.topic}"},
            "messages": [{"$ref": f"#/channels/{one.topic}/messages/{one.name}"}],
        }
        if one.handlers:
            operation["description"] = f"Handled by {', '.join(one.handlers)}."
        document["components"]["messages"][key] = _message(one, types)
    return document


def _message(one: Described, types: Mapping[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"name": one.name, "payload": _draft_07(one.schema)}
    if one.codec is not None:
        message["contentType"] = _CONTENT_TYPES[one.codec]
    node = types.get(one.schema.get("$ref", "").rpartition("/")[2], {})
    if "description" in node:
        message["summary"] = node["description"].strip().splitlines()[0]
    if one.key_field is not None:
        # The key is the field's text, see keven_core.kafka.envelope.key_of().
        text = f"The field {one.key_field}, as text."
        message["bindings"] = {"kafka": {"key": {"type": "string", "description": text}, "bindingVersion": "0.5.0"}}
    return message


def _draft_07(node: Any) -> Any:
    """A schema of draft 2020-12, as msgspec makes it, in draft-07 with AsyncAPI's discriminator."""
    if isinstance(node, list):
        return [_draft_07(part) for part in node]
    if not isinstance(node, Mapping):
        return node
    made = {
        name: value
        if name in ("default", "enum", "examples")
        else {field: _draft_07(part) for field, part in value.items()}
        if name == "properties"
        else _draft_07(value)
        for name, value in node.items()
    }
    if "prefixItems" in made:
        if "items" in made:
            made["additionalItems"] = made.pop("items")
        made["items"] = made.pop("prefixItems")
    if "discriminator" in made:
        made["discriminator"] = made["discriminator"]["propertyName"]
    if "$ref" in made and len(made) > 1:  # draft-07 ignores whatever stands beside a $ref
        made["allOf"] = [{"$ref": made.pop("$ref")}]
    return made
