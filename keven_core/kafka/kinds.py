"""Events and commands: what they share is written once, and what tells the two apart stands here.

kind      name field     topics
EVENTS    event_name     keven_events, keven_events_<name>, keven_events.audit
COMMANDS  command_name   keven_commands, keven_commands_<name>
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from keven_core.kafka.errors import RegistrationError
from keven_core.kafka.registry import HandlerRegistry
from keven_core.kafka.topics import AUDIT_TOPIC, COMMANDS_TOPIC, EVENTS_TOPIC, folded, is_topic_name

__all__ = ["COMMANDS", "EVENTS", "KINDS", "MessageKind"]


@dataclass(eq=False)
class MessageKind:
    """One family of messages.

    Attributes:
        noun: "event" or "command"; names of attributes and methods are made from it.
        topic: of the messages that have no topic of their own.
        audit_topic: of those that are marked for the audit; None: there is none.
        registry: their handlers.
        classes: the class of each name, filled as classes are defined.
        generic_class: of messages whose name has no class; set as it is defined.
    """

    noun: str
    topic: str
    audit_topic: str | None
    registry: HandlerRegistry
    classes: dict[str, Any] = field(default_factory=dict)
    generic_class: Any = None

    @property
    def name_field(self) -> str:
        """The attribute, and the first field on the wire, that names a message: "event_name"."""
        return f"{self.noun}_name"

    @property
    def placeholders(self) -> frozenset[str]:
        """Names that every service knows, whether they have a class or not."""
        return frozenset({"NONE", "NOT_INSTALLED", "TEST", f"PRINT_{self.noun.upper()}"})

    @property
    def a_noun(self) -> str:
        """For sentences: "an event"."""
        return f"{'an' if self.noun[0] in 'aeiou' else 'a'} {self.noun}"

    @property
    def all_topics_pattern(self) -> str:
        """Subscribes the topic of every name."""
        return f"^{self.topic}_.*"

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Inside, there are no handlers and no classes; afterwards they are as they were. For tests."""
        classes = dict(self.classes)
        self.classes.clear()
        try:
            with self.registry.isolated():
                yield
        finally:
            self.classes.clear()
            self.classes.update(classes)

    def topic_of(self, name: str) -> str:
        """The topic that carries one event or command."""
        return f"{self.topic}_{name.lower()}"

    def name_of(self, name: object) -> str:
        """The plain string of a name given as str or as a member of a str enum; RegistrationError otherwise."""
        value = name.value if isinstance(name, enum.Enum) else name
        if not isinstance(value, str) or not value:
            raise RegistrationError(f"{self.a_noun} name has to be a str or a member of a str enum, not {name!r:.80}")
        return str(value)

    def check_name(self, name: str) -> str:
        """Return `name` if it can be part of a topic; raise RegistrationError otherwise."""
        if not is_topic_name(f"{self.topic}_{name}"):
            raise RegistrationError(
                f"{name[:260]!r} can't be {self.a_noun} name, since it becomes part of a topic: letters, digits, dots, "
                f"underscores and hyphens are allowed, at most {249 - len(self.topic) - 1}"
            )
        if self.audit_topic is not None and folded(self.topic_of(name)) == folded(self.audit_topic):
            raise RegistrationError(
                f"{name!r} can't be {self.a_noun} name: its topic would collide with {self.audit_topic} on the broker"
            )
        return name


EVENTS = MessageKind("event", EVENTS_TOPIC, AUDIT_TOPIC, HandlerRegistry("event"))
COMMANDS = MessageKind("command", COMMANDS_TOPIC, None, HandlerRegistry("command"))
KINDS = (EVENTS, COMMANDS)
