"""Names of topics: which Kafka accepts, which collide, and what belongs to what."""

import enum
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keven_core.kafka.errors import ConfigurationError, RegistrationError
from keven_core.kafka.kinds import EVENTS
from keven_core.kafka.topics import (
    AUDIT_TOPIC,
    EVENTS_TOPIC,
    check_topic,
    dead_letter_topic,
    folded,
    retry_topic,
)

ALPHABET = "abcXYZ019._-"


def test_the_names_of_the_reference() -> None:
    assert (EVENTS_TOPIC, AUDIT_TOPIC, EVENTS.all_topics_pattern) == (
        "keven_events",
        "keven_events.audit",
        "^keven_events_.*",
    )
    assert EVENTS.topic_of("ORDER_PLACED") == "keven_events_order_placed"
    assert retry_topic("shop") == "kafka_server.shop.retry"
    assert dead_letter_topic("shop") == "kafka_server.shop.dead"


@pytest.mark.parametrize("name", ["a", "A.b_c-1", "x" * 249, "...", "__consumer", "-", "0"])
def test_good_names(name: str) -> None:
    assert check_topic(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "x" * 250,
        "a b",
        "a/b",
        "ä",
        "a\n",
        "\na",
        "a\x00b",
        "a:b",
        "^a",
        "a,b",
        "a\u0660",
        "keven events",
    ],
)
def test_bad_names(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is not a topic name: 1 to 249 letters, digits, dots"):
        check_topic(name)


def test_a_bad_name_is_cut_in_the_message() -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_topic("x" * 100_000)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", [None, 5, b"topic", ["a"]])
def test_names_have_to_be_text(name: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"a topic has to be a str, not {type(name).__name__}"):
        check_topic(name)


def test_patterns_are_accepted_only_where_they_mean_something() -> None:
    assert check_topic("^keven_events_.*", pattern_allowed=True) == "^keven_events_.*"
    assert check_topic("plain", pattern_allowed=True) == "plain"
    with pytest.raises(ConfigurationError):
        check_topic("^keven_events_.*")
    with pytest.raises(ConfigurationError, match=r"is not a regular expression: "):
        check_topic("^keven_(", pattern_allowed=True)
    with pytest.raises(ConfigurationError, match=r"is not a topic name"):
        check_topic("keven_.*", pattern_allowed=True)


@given(st.text(max_size=260))
def test_what_is_accepted_is_what_kafka_accepts(name: str) -> None:
    # org.apache.kafka.common.internals.Topic.validate
    legal = re.fullmatch(r"[a-zA-Z0-9._-]+", name) is not None and len(name) <= 249 and name not in (".", "..")
    try:
        accepted = check_topic(name) == name
    except ConfigurationError:
        accepted = False
    assert accepted == legal


@given(st.text(ALPHABET, min_size=1, max_size=60))
def test_every_event_name_that_is_accepted_makes_a_topic(name: str) -> None:
    try:
        EVENTS.check_name(name)
    except RegistrationError:
        assert folded(name) == "audit"
    else:
        assert check_topic(EVENTS.topic_of(name)) == EVENTS.topic_of(name)
        assert re.match(EVENTS.all_topics_pattern, EVENTS.topic_of(name))


@given(st.text(ALPHABET, min_size=1, max_size=20), st.text(ALPHABET, min_size=1, max_size=20))
def test_names_fold_together_exactly_when_the_broker_would_refuse_their_topics(one: str, two: str) -> None:
    # Kafka: Topic.hasCollision, on topics whose names differ only in "." and "_"
    collide = EVENTS.topic_of(one).replace(".", "_") == EVENTS.topic_of(two).replace(".", "_")
    assert (folded(one) == folded(two)) == collide


def test_the_longest_event_name_makes_the_longest_topic() -> None:
    assert len(EVENTS.topic_of(EVENTS.check_name("x" * 236))) == 249
    with pytest.raises(RegistrationError, match=r"at most 236"):
        EVENTS.check_name("x" * 237)


@pytest.mark.parametrize("name", ["audit", "AUDIT", "Audit"])
def test_audit_collides_with_the_audit_topic(name: str) -> None:
    assert EVENTS.topic_of(name).replace("_", ".") == AUDIT_TOPIC.replace("_", ".")
    with pytest.raises(RegistrationError, match=r"would collide with keven_events\.audit"):
        EVENTS.check_name(name)


@pytest.mark.parametrize("client", ["a b", "", "x" * 240, "^a"])
def test_a_client_id_that_makes_no_topic_is_refused(client: str) -> None:
    for make in (retry_topic, dead_letter_topic):
        if client == "":
            assert make(client) in ("kafka_server..retry", "kafka_server..dead")
        else:
            with pytest.raises(ConfigurationError):
                make(client)


def test_a_member_of_an_enum_is_its_value() -> None:
    class Topics(str, enum.Enum):
        ORDERS = "orders"

    name = check_topic(Topics.ORDERS)
    assert (type(name), name) == (str, "orders")
