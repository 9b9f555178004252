"""Events and commands: what they share is written once, and what tells the two apart stands here.

kind      name field     topics
EVENTS    event_name     keven_events, keven_events_<name>, keven_events.audit
COMMANDS  command_name   keven_commands, keven_commands_<name>
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Callable, Iterator
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
        on_name: called with each name that gets a class or a handler; None: nobody asks.
    """

    noun: str
    topic: str
    audit_topic: str | None
    registry: HandlerRegistry
    classes: dict[str, Any] = field(default_factory=dict)
    generic_class: Any = None
    on_name: Callable[[str], None] | None = None

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

    def add_alias(self, alias: str, name: str) -> None:
        """From now on `alias` is another spelling of `name`."""
        self.registry.add_alias(alias, name)

    def publisher_class(self) -> Any:
        """EventPublisher or CommandPublisher."""
        module = importlib.import_module(f"keven_core.kafka.{self.noun}s.publisher")
        return getattr(module, f"{self.noun.capitalize()}Publisher")

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
        """The plain string of a name given as str or as a member of a str enum, or what it is an alias of.

        Raises RegistrationError for anything else.
        """
        value = name.value if isinstance(name, enum.Enum) else name
        if not isinstance(value, str) or not value:
            raise RegistrationError(f"{self.a_noun} name has to be a str or a member of a str enum, not {name!r:.80}")
        return self.registry.aliases.get(str(value), str(value))

    def named(self, name: str) -> None:
        """A class or a handler is there for a name."""
        if self.on_name is not None:
            self.on_name(name)

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
