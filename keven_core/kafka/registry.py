"""The registry of handlers: who handles which event, in which order. No I/O, no compiled code.

Filled by the handler metaclass and by decorators while a service's modules are imported; frozen while a server runs,
because the dispatch table is built once, when it starts. Events and commands have one registry each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from keven_core.kafka.errors import RegistrationError
from keven_core.kafka.retry import RetryPolicy
from keven_core.kafka.topics import folded

__all__ = ["Handler", "HandlerRegistry"]


@dataclass(frozen=True)
class Handler:
    """One registered handler.

    Attributes:
        name: the event that it handles, or the topic of a foreign handler.
        target: the handler class, or a plain function.
        foreign: `name` is a topic with values of its own, not an event.
        value_type: what a foreign topic's values are decoded into; bytes: not decoded.
        codec: "json" or "msgpack" for a foreign topic; None: told apart by the first byte.
        retry_policy: for records that it fails to handle; None: the event's, the topic's or the server's.
        batch_size: it takes a list of up to so many events; 0: one event.
        batch_wait_ms: how long the first of a list waits for others.
        long_running: it needs so long that the server goes on polling meanwhile.
        delay_commands_and_events: what it publishes goes out only when it has succeeded.
        capture_exception_handler: shown what it fails with.
    """

    name: str
    target: Any
    foreign: bool = False
    value_type: Any = None
    codec: str | None = None
    retry_policy: RetryPolicy | None = None
    batch_size: int = 0
    batch_wait_ms: int = 0
    long_running: bool = False
    delay_commands_and_events: bool = True
    capture_exception_handler: Callable[[Exception], Any] | None = None

    @property
    def is_class(self) -> bool:
        """Whether the handler is a class, of which one instance is made; else a plain function."""
        return isinstance(self.target, type)

    @property
    def qualified_name(self) -> str:
        """Module and qualified name of the class or function."""
        return f"{self.target.__module__}.{self.target.__qualname__}"


class HandlerRegistry:
    """Handlers by event name and by foreign topic, in registration order.

    Thread-safe. A class or function that is registered again under its module and qualified name (a reload, or the main
    script in a worker) replaces its earlier self.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._lock = threading.RLock()
        self._handlers: list[Handler] = []
        self._instances: dict[Any, Any] = {}
        self._running = 0
        # Older spellings of names, by which handlers may be registered and messages may come.
        self.aliases: dict[str, str] = {}

    def add_alias(self, alias: str, name: str) -> None:
        """From now on `alias` means `name`, also for handlers that are registered already."""
        with self._lock:
            self.aliases[alias] = name
            self._handlers = [
                replace(handler, name=name) if handler.name == alias and not handler.foreign else handler
                for handler in self._handlers
            ]

    def aliases_of(self, name: str) -> list[str]:
        """Other spellings of a name."""
        return [alias for alias, other in self.aliases.items() if other == name]

    def register(self, handler: Handler) -> None:
        """Add a handler. Raises RegistrationError while a server runs, and for names equal but for case."""
        with self._lock:
            if self._running:
                raise RegistrationError(
                    f"{handler.qualified_name} can't be registered for {handler.name!r}: a server is running, and its "
                    f"dispatch table was built when it started; import the module before starting the server"
                )
            for other in self._handlers:
                if (
                    other.foreign == handler.foreign
                    and other.name != handler.name
                    and folded(other.name) == folded(handler.name)
                ):
                    raise RegistrationError(
                        f"{handler.qualified_name} is for {handler.name!r} and {other.qualified_name} for "
                        f"{other.name!r}: names that differ only in case, dots and underscores collide"
                    )
            for index, other in enumerate(self._handlers):
                same = (other.name, other.foreign) == (handler.name, handler.foreign)
                if same and other.qualified_name == handler.qualified_name and "<locals>" not in other.qualified_name:
                    self._handlers[index] = handler
                    return
            self._handlers.append(handler)

    def unregister(self, target: Any) -> None:
        """Remove every registration of a handler class or function; for tests."""
        with self._lock:
            self._handlers = [handler for handler in self._handlers if handler.target is not target]
            self._instances.pop(target, None)

    def names(self) -> list[str]:
        """Events that have a handler, in the order of their first registration."""
        with self._lock:
            return list(dict.fromkeys(handler.name for handler in self._handlers if not handler.foreign))

    def foreign_topics(self) -> list[str]:
        """Topics that have a foreign handler."""
        with self._lock:
            return list(dict.fromkeys(handler.name for handler in self._handlers if handler.foreign))

    def handlers(self) -> list[Handler]:
        """All handlers, in registration order."""
        with self._lock:
            return list(self._handlers)

    def handlers_of(self, name: str, *, foreign: bool = False) -> list[Handler]:
        """Handlers of an event or foreign topic, in registration order."""
        with self._lock:
            return [handler for handler in self._handlers if handler.name == name and handler.foreign == foreign]

    def instance_of(self, handler: Handler) -> Any:
        """The one instance of a handler class in this process, made at first use; a function is its own instance."""
        if not handler.is_class:
            return handler.target
        with self._lock:
            if handler.target not in self._instances:
                self._instances[handler.target] = handler.target()
            return self._instances[handler.target]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """While entered, register() is refused. Servers enter it; several may at once."""
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Inside, the registry starts empty; afterwards it is as it was. For tests."""
        with self._lock:
            saved = (self._handlers, self._instances, self._running)
            self._handlers, self._instances, self._running = [], {}, 0
        try:
            yield
        finally:
            with self._lock:
                self._handlers, self._instances, self._running = saved
