"""Names of topics: which are allowed, and which belong to what.

keven_events                     every event that has no topic of its own
keven_events_<event name lower>  one event
keven_events.audit               audit events
keven_commands, keven_commands_<command name lower>
kafka_server.<client id>.retry   records that wait for another attempt
kafka_server.<client id>.dead    records that could not be handled
"""

from __future__ import annotations

import re

from keven_core.kafka.errors import ConfigurationError

EVENTS_TOPIC = "keven_events"
AUDIT_TOPIC = "keven_events.audit"
COMMANDS_TOPIC = "keven_commands"

_ALLOWED = re.compile(r"[A-Za-z0-9._-]{1,249}\Z")


def check_topic(name: object, *, pattern_allowed: bool = False) -> str:
    """Return `name` if it is a topic name that Kafka accepts; raise ConfigurationError otherwise.

    With `pattern_allowed` a regular expression that starts with ^ is accepted too, as librdkafka subscribes it.
    """
    if not isinstance(name, str):
        raise ConfigurationError(f"a topic has to be a str, not {type(name).__name__}: {name!r:.80}")
    if pattern_allowed and name.startswith("^"):
        try:
            re.compile(name)
        except re.error as error:
            raise ConfigurationError(f"topic pattern {name!r} is not a regular expression: {error}") from None
        return name
    if not is_topic_name(name):
        raise ConfigurationError(
            f"{name[:260]!r} is not a topic name: 1 to 249 letters, digits, dots, underscores and hyphens are allowed"
        )
    # An enum's member is a str too, but compiled code takes nothing but plain ones.
    return name if type(name) is str else str.__str__(name)


def is_topic_name(name: str) -> bool:
    """Whether Kafka accepts it as the name of a topic."""
    return name not in (".", "..") and _ALLOWED.match(name) is not None


def folded(name: str) -> str:
    """The form in which names collide: brokers refuse topics that differ only in dots and underscores."""
    return name.lower().replace(".", "_")


def retry_topic(client_id: str) -> str:
    """The topic of records that wait for another attempt."""
    return check_topic(f"kafka_server.{client_id}.retry")


def dead_letter_topic(client_id: str) -> str:
    """The topic of records that could not be handled."""
    return check_topic(f"kafka_server.{client_id}.dead")
