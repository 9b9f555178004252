"""docker-compose.yml is valid by the Compose Specification's schema, and says what the Java broker's settings say."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from keven_core.testing._broker_process import docker_kafka, jars
from keven_core.testing._broker_process.settings import Listener, NodeSettings, server_properties

_TOP = Path(__file__).parents[2]
_COMPOSE_FILE = _TOP / "docker-compose.yml"
_SCHEMA = json.loads((_TOP / "tests" / "data" / "compose_spec.json").read_text())


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(_COMPOSE_FILE.read_text())
    return loaded


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft201909Validator:
    jsonschema.Draft201909Validator.check_schema(_SCHEMA)
    return jsonschema.Draft201909Validator(_SCHEMA)


def test_is_valid(compose: dict[str, Any], validator: jsonschema.Draft201909Validator) -> None:
    validator.validate(compose)


def _misspelt_key(file: dict[str, Any]) -> None:
    file["services"]["kafka"]["enviroment"] = file["services"]["kafka"].pop("environment")


def _port_as_mapping(file: dict[str, Any]) -> None:
    file["services"]["kafka"]["ports"] = {"9092": "9092"}


def _health_check_without_list(file: dict[str, Any]) -> None:
    file["services"]["kafka"]["healthcheck"]["retries"] = "many"


def _nested_environment(file: dict[str, Any]) -> None:
    file["services"]["kafka"]["environment"]["KAFKA_LISTENERS"] = ["a", "b"]


def _service_beside_services(file: dict[str, Any]) -> None:
    file["kafka"] = file["services"].pop("kafka")


@pytest.mark.parametrize(
    "damage",
    [
        _misspelt_key,
        _port_as_mapping,
        _health_check_without_list,
        _nested_environment,
        _service_beside_services,
    ],
)
def test_the_check_can_fail(
    compose: dict[str, Any],
    validator: jsonschema.Draft201909Validator,
    damage: Callable[[dict[str, Any]], None],
) -> None:
    damaged = copy.deepcopy(compose)
    damage(damaged)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(damaged)


def test_listens_on_loopback_only(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:")


def test_has_a_health_check(compose: dict[str, Any]) -> None:
    assert compose["services"]["kafka"]["healthcheck"]["test"][0] == "CMD"


def test_versions_agree(compose: dict[str, Any]) -> None:
    pom = Path(jars.__file__).with_name("pom.xml").read_text()
    assert re.findall(r"<artifactId>kafka[^<]*</artifactId>\s*<version>([^<]+)", pom) == [jars.KAFKA_VERSION] * 2
    assert compose["services"]["kafka"]["image"] == f"apache/kafka:{jars.KAFKA_VERSION}"


def test_the_package_starts_the_same_file() -> None:
    assert docker_kafka.COMPOSE_FILE.samefile(_COMPOSE_FILE) or (
        docker_kafka.COMPOSE_FILE.read_text() == _COMPOSE_FILE.read_text()
    )


def test_settings_are_those_of_the_java_broker(compose: dict[str, Any]) -> None:
    node = NodeSettings(1, Path("/data"), 9093, [Listener("PLAINTEXT", "PLAINTEXT", 9092, 9092)], "PLAINTEXT")
    text = server_properties(node, {1: 9093}, auto_create_topics=False, users={}, certificate=None, extra={})
    java = dict(line.split("=", 1) for line in text.splitlines())
    # The image turns KAFKA_A_B into a.b.
    container = {
        name.removeprefix("KAFKA_").replace("_", ".").lower(): value
        for name, value in compose["services"]["kafka"]["environment"].items()
        if name != "KAFKA_HEAP_OPTS"
    }
    addresses = {
        "listeners",
        "advertised.listeners",
        "listener.security.protocol.map",
        "inter.broker.listener.name",
        "log.dirs",  # the image has its own place
    }
    assert {key: value for key, value in container.items() if key not in addresses} == {
        key: value for key, value in java.items() if key not in addresses
    }
