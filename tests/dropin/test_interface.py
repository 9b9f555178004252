"""Every name of the original's interface is there, with its signature: interface.json is checked line by line."""

import importlib
import inspect
import json
from enum import EnumMeta
from pathlib import Path
from typing import Any

import pytest

TABLE = json.loads((Path(__file__).parent / "interface.json").read_text())
ENTRIES = {f"{entry['module']}:{entry['name']}": entry for entry in TABLE["entries"]}
KINDS = {
    "class": inspect.isclass,
    "enum": lambda found: isinstance(found, EnumMeta),
    "function": callable,
    "method": callable,
}
# What a class needs to be made.
NEEDED = {"KafkaConsumerServer": ("topic",)}


def resolve(module: str, name: str) -> Any:
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def owner_of(entry: Any) -> Any:
    return resolve(entry["module"], entry["name"].rpartition(".")[0])


@pytest.mark.parametrize("module", [entry["module"] for entry in TABLE["modules"]])
def test_the_module_is_there(module: str) -> None:
    importlib.import_module(module)


@pytest.mark.parametrize("path", ENTRIES)
def test_the_name_is_there(path: str) -> None:
    entry = ENTRIES[path]
    if entry["kind"] == "attribute":
        owner = owner_of(entry)
        instance = owner(*NEEDED.get(owner.__name__, ()))
        assert hasattr(instance, entry["name"].rpartition(".")[2])
        return
    found = resolve(entry["module"], entry["name"])
    if entry["kind"] in KINDS:
        assert KINDS[entry["kind"]](found)
    for root in (*entry["also"], *entry.get("also_by_analogy", ())):
        assert getattr(importlib.import_module(root), entry["name"]) is found, root
    for base in entry.get("bases", ()):
        assert base in [cls.__name__ for cls in found.__mro__]


@pytest.mark.parametrize("path", [path for path, entry in ENTRIES.items() if "parameters" in entry])
def test_the_signature_is_the_same(path: str) -> None:
    entry = ENTRIES[path]
    found = resolve(entry["module"], entry["name"])
    own = list(inspect.signature(found).parameters.values())
    if entry["kind"] == "method" and inspect.isfunction(found):
        own = own[1:]  # self
    wanted = entry["parameters"]
    for position, parameter in enumerate(wanted):
        assert position < len(own), f"{parameter['name']} is missing"
        given = own[position]
        assert given.name == parameter["name"]
        assert given.kind in (given.POSITIONAL_OR_KEYWORD, given.POSITIONAL_ONLY)
        if parameter.get("kind") == "POSITIONAL_OR_KEYWORD":
            assert given.kind is given.POSITIONAL_OR_KEYWORD
        if "default" in parameter:
            assert given.default == parameter["default"]
        elif parameter.get("required") is False:
            assert given.default is not given.empty
    for further in own[len(wanted) :]:
        optional = further.kind in (further.VAR_KEYWORD, further.VAR_POSITIONAL) or further.default is not further.empty
        assert optional, f"{further.name} is required, and the original does not know it"
