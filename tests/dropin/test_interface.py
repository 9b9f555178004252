"""Every name of the original's interface is there, with its signature: interface.json is checked line by line.

shown_by.json has for each name without parameters, and for each parameter, the tests that fail if it is without effect.
"""

import ast
import importlib
import inspect
import json
from enum import EnumMeta
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TABLE = json.loads((Path(__file__).parent / "interface.json").read_text())
ENTRIES = {f"{entry['module']}:{entry['name']}": entry for entry in TABLE["entries"]}
SHOWN_BY = json.loads((Path(__file__).parent / "shown_by.json").read_text())
ROOT = Path(__file__).parents[2]
KINDS = {
    "class": inspect.isclass,
    "enum": lambda found: isinstance(found, EnumMeta),
    "function": callable,
    "method": callable,
}
# Both families have a function of this name, so it is no name of the root.
AMBIGUOUS = {"get_write_cache", "last_publisher", "set_publisher"}
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
    if entry["kind"] in ("function", "method"):
        assert inspect.iscoroutinefunction(found) == entry.get("async", False)
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


@pytest.mark.parametrize(
    "path", [path for path, entry in ENTRIES.items() if entry["kind"] in KINDS and "." not in entry["name"]]
)
def test_the_root_has_every_class_and_function(path: str) -> None:
    entry = ENTRIES[path]
    root = importlib.import_module("keven_core.kafka")
    assert (entry["name"] in root.__all__) == (entry["name"] not in AMBIGUOUS)
    if entry["name"] not in AMBIGUOUS:
        assert getattr(root, entry["name"]) is resolve(entry["module"], entry["name"])


# --- each of them has an effect ---------------------------------------------------------------------------------------


@cache
def functions_of(file: str) -> set[str]:
    """The test functions of a file."""
    return {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_there_is_no_effect_of_what_is_not_in_the_table() -> None:
    assert list(SHOWN_BY) == list(ENTRIES)


@pytest.mark.parametrize("path", ENTRIES)
def test_each_name_and_parameter_is_shown_by_tests(path: str) -> None:
    parameters = [parameter["name"] for parameter in ENTRIES[path].get("parameters", ())]
    shown = SHOWN_BY[path] if parameters else {"": SHOWN_BY[path]}
    assert list(shown) == (parameters or [""])
    for tests in shown.values():
        assert tests, "at least one test has to be named"
        for test in tests:
            file, _, function = test.partition("::")
            assert function.startswith("test_"), test
            assert function in functions_of(file), test
