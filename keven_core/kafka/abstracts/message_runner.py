"""From the bytes of a message to the handlers of its event or command; base of EventRunner and CommandRunner."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from keven_core.kafka._batches import single_call
from keven_core.kafka._calls import is_async
from keven_core.kafka.config import Settings
from keven_core.kafka.errors import RegistrationError
from keven_core.kafka.kinds import MessageKind
from keven_core.kafka.publishing import handled
from keven_core.kafka.registry import HandlerRegistry
from keven_core.kafka.retry import RetryPolicy, policy_of
from keven_core.kafka.routing import build_table, call_of, handlers_call

__all__ = ["MessageRunner"]

logger = logging.getLogger("keven_core.kafka")


class MessageRunner:
    """Decodes messages and calls their handlers.

    A subclass names the family of `handlers`, EventHandler or CommandHandler, and says whether a name is to have a
    `single_handler`.

    A KafkaConsumerServer whose only runner this is takes dispatch_table() and runs it compiled; run() is the same for
    one message at a time, in any thread.
    """

    handlers: ClassVar[Any]
    single_handler: ClassVar[bool] = False

    def __init__(
        self, names: Iterable[object] | None, handler: Callable[[Any], Any] | None, all_messages: bool
    ) -> None:
        self.kind: MessageKind = self.handlers.kind_of()
        self.names = None if names is None else [self.kind.name_of(name) for name in names]
        self.handler = handler
        self.all_messages = all_messages
        self._table: Any = None

    @property
    def registry(self) -> HandlerRegistry:
        """The handlers that it calls, which are frozen while a server runs."""
        return self.kind.registry

    @property
    def runs_registered_handlers(self) -> bool:
        """Whether it calls the registered handlers, rather than one that it was given."""
        return self._own_handler() is None

    def written_topics(self) -> list[str]:
        """Topics that messages of the runner's own go to, to be made when they are missing."""
        return []

    def _own_handler(self) -> Callable[[Any], Any] | None:
        # The family's own dispatchers mean "the registered handlers", which are then called without a detour.
        return None if self.handler in self.handlers.dispatchers() else self.handler

    def dispatch_table(self, settings: Settings | None = None) -> Any:
        """The frozen DispatchTable of this runner, built from what is registered now."""
        settings = settings or Settings.from_env()
        if self.single_handler:
            self._check_single_handlers(settings)
        return self._build(settings)

    def _build(self, settings: Settings) -> Any:
        return build_table(
            self.handlers,
            names=self.names,
            handler=self._own_handler(),
            all_messages=self.all_messages,
            max_payload_bytes=settings.max_payload_bytes,
        )

    def _check_single_handlers(self, settings: Settings) -> None:
        for name in self.registry.names() if self.runs_registered_handlers else ():
            several = [handler.qualified_name for handler in self.registry.handlers_of(name)]
            if len(several) == 1:
                continue
            problem = (
                f"{self.kind.noun} {name} has {len(several)} handlers, {', '.join(several)}: {self.kind.a_noun} is "
                f"done by one handler"
            )
            if settings.strict:
                raise RegistrationError(f"{problem}; KEVEN_STRICT is set, so no other is allowed")
            logger.warning("%s; all of them are called", problem)

    def policies(self) -> dict[str, list[tuple[str, RetryPolicy]]]:
        """By event name or foreign topic: (handler's name, its retry policy), then that of the event's class as ""."""
        found: dict[str, list[tuple[str, RetryPolicy]]] = {}
        if self._own_handler() is None:
            for handler in self.registry.handlers():
                if handler.retry_policy is not None:
                    found.setdefault(handler.name, []).append((handler.qualified_name, handler.retry_policy))
        for name, cls in self.kind.classes.items():
            policy = policy_of(getattr(cls, "retry_policy", None), f"{cls.__module__}.{cls.__qualname__}")
            if policy is not None:
                found.setdefault(name, []).append(("", policy))
        return found

    def blocks_long(self) -> bool:
        """Whether a synchronous handler needs a thread of its own, so that the server can go on polling."""
        if self._own_handler() is not None:
            return False
        return any(
            handler.long_running and not is_async(call_of(self.kind.registry, handler))
            for handler in self.registry.handlers()
        )

    def some_handlers(self, name: str, handlers: tuple[str, ...]) -> Callable[[Any], Any] | None:
        """What calls only these of the registered handlers of an event or foreign topic; None: there are none."""
        if self._own_handler() is not None:
            return None
        foreign = name in self.registry.foreign_topics()
        return handlers_call(self.handlers, name, foreign=foreign, only=handlers)

    def calls(self) -> list[Callable[[Any], Any]]:
        """Everything that this runner may call, to tell whether an event loop is needed."""
        handler = self._own_handler()
        if handler is not None:
            return [handler]
        table = self._build(Settings())  # its limits do not matter here, so the environment is left alone
        routes = [*table.routes.values(), *table.bound.values()]
        return [call for route in routes for call in (route.call, route.on_tombstone) if call is not None]

    def run(self, message: bytes | None, topic: str | None = None) -> Any:
        """Handle one message; an awaitable comes back when its handler is async. None, a tombstone, is passed over.

        Raises UndecodableError, and whatever the handler raises. An event that nobody handles is passed over.
        """
        if message is None:
            return None
        if self._table is None:
            self._table = self.dispatch_table()
        route, event = self._table.resolve(message, topic)
        if route is None:
            return None
        return handled(single_call(route), event)
