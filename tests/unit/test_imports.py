"""Importing is light: librdkafka is loaded when the first client is made, and packages load what is asked for."""

import importlib
import json
import pkgutil
from typing import Any

import pytest
from builds import run_python

import keven_core
import keven_core.kafka
import keven_core.kafka.abstracts
import keven_core.kafka.events
import keven_core.kafka.schema
import keven_core.testing

# What no import of the library may bring along: top-level names, or modules with a dot.
HEAVY = {
    "aenum",
    "confluent_kafka",
    "ctypes",
    "django",
    "google",
    "http",
    "hypothesis",
    "keven_core.testing",
    "multiprocessing",
    "psutil",
    "pytest",
    "rich",
    "sqlalchemy",
    "unittest",
    "urllib.request",
    "uvloop",
    "xml",
}

LAZY = [
    keven_core.kafka,
    keven_core.kafka.abstracts,
    keven_core.kafka.events,
    keven_core.kafka.schema,
    keven_core.testing,
]


def _loaded(statements: str) -> set[str]:
    """Names of the modules that a fresh interpreter has after these statements."""
    code = f"import sys, json\n{statements}\nprint(json.dumps(sorted(sys.modules)))"
    result = run_python("-W", "error", "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return set(json.loads(result.stdout))


def _heavy(loaded: set[str]) -> set[str]:
    return {name for name in loaded if any(name == heavy or name.startswith(heavy + ".") for heavy in HEAVY)}


@pytest.mark.parametrize(
    "module",
    [
        "keven_core",
        "keven_core.kafka",
        "keven_core.kafka.codecs",
        "keven_core.kafka.config",
        "keven_core.kafka.events.event",
        "keven_core.kafka.events.server",
        "keven_core.kafka.commands.logger",
        "keven_core.kafka.events.logger",
        "keven_core.kafka.events.publisher",
        "keven_core.kafka.abstracts.event_handler",
        "keven_core.kafka.abstracts.consumer_server",
        "keven_core.kafka.logger",
        "keven_core.kafka.admin",
        "keven_core.kafka.redrive",
        "keven_core.kafka.schema.files",
    ],
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    assert _heavy(_loaded(f"import {module}")) == set()


def test_the_packages_by_themselves_load_next_to_nothing() -> None:
    before = _loaded("")
    loaded = _loaded("import keven_core.kafka, keven_core.kafka.events, keven_core.testing")
    ours = {name for name in loaded - before if name.startswith("keven_core")}
    assert ours == {
        "keven_core",
        "keven_core._lazy",
        "keven_core.kafka",
        "keven_core.kafka.events",
        "keven_core.testing",
    }
    assert "msgspec" not in loaded


def test_defining_events_and_handlers_and_making_a_server_and_loggers_loads_no_librdkafka() -> None:
    loaded = _loaded(
        "from keven_core.kafka import Event, EventHandler, KafkaBatchLogger, KafkaConsumerServer, KafkaLogger\n"
        "class A(Event):\n    event_name = 'A'\n"
        "class H(EventHandler):\n    event_name = 'A'\n    def handle_event(self, event): ...\n"
        "KafkaConsumerServer('topic', runners=[print]); KafkaLogger(topic='t'); KafkaBatchLogger(topic='t')\n"
        "EventHandler.handle_events(A())\n"
        "A().serialize()\n"
    )
    assert _heavy(loaded) == set()


def test_only_the_loggers_load_compiled_modules_and_only_the_first_client_librdkafka() -> None:
    events = _loaded("import keven_core.kafka.events.server, keven_core.kafka.abstracts.event_handler")
    assert not any(name.startswith("keven_core._native") for name in events)
    loggers = _loaded("import keven_core.kafka.logger")
    assert "keven_core._native.logger" in loggers
    assert "confluent_kafka" not in loggers
    loaded = _loaded("from keven_core._native.producer import Producer\nProducer({}).close(100)")
    assert "confluent_kafka.cimpl" in loaded


@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_every_public_name_of_a_package_can_be_had(package: Any) -> None:
    assert package.__all__ == sorted(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        value = getattr(package, name)
        assert value.__name__ == name
        assert vars(package)[name] is value  # kept: the next look costs nothing


@pytest.mark.parametrize("package", LAZY, ids=lambda package: package.__name__)
def test_other_names_are_attribute_errors(package: Any) -> None:
    with pytest.raises(AttributeError, match=rf"module '{package.__name__}' has no attribute 'no_such_name'"):
        _ = package.no_such_name


@pytest.mark.parametrize("first", ["abstracts", "abstracts.event_handler", "routing", "events.server", "logger"])
def test_the_decorator_is_not_mistaken_for_its_module(first: str) -> None:
    statements = f"import keven_core.kafka.{first}\nfrom keven_core.kafka.abstracts import event_handler\n"
    assert "keven_core.kafka.abstracts.event_handler" in _loaded(statements + "event_handler('A')(print)")


def test_every_module_can_be_imported_and_says_what_it_is() -> None:
    for found in pkgutil.walk_packages(keven_core.__path__, "keven_core."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        assert module.__doc__, f"{found.name} has no docstring"
