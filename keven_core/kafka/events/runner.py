"""`EventRunner`: from the bytes of a message to the handlers of its event."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from keven_core.kafka._batches import single_call
from keven_core.kafka._calls import is_async
from keven_core.kafka.abstracts.event_handler import EventHandler
from keven_core.kafka.config import Settings
from keven_core.kafka.envelope import name_of
from keven_core.kafka.events.event import Event
from keven_core.kafka.retry import RetryPolicy, policy_of
from keven_core.kafka.routing import build_table, handlers_call

__all__ = ["EventRunner"]


class EventRunner:
    """Decodes messages into events and calls their handlers.

    Arguments:
        event_names: the events to handle; None: every event that has a handler.
        event_handler: called with each event, sync or async; None (or EventHandler.handle_events): the registered
            handlers.
        all_events: `event_handler` also gets events that are not in `event_names`, as their class or generic.

    A KafkaConsumerServer whose only runner this is takes dispatch_table() and runs it compiled; run() is the same for
    one message at a time, in any thread.
    """

    def __init__(
        self,
        event_names: Iterable[object] | None = None,
        event_handler: Callable[[Any], Any] | None = None,
        all_events: bool = False,
    ) -> None:
        self.event_names = None if event_names is None else [name_of(name) for name in event_names]
        self.event_handler = event_handler
        self.all_events = all_events
        self.registry = EventHandler.registry_of()
        self._table: Any = None

    def _own_handler(self) -> Callable[[Any], Any] | None:
        # EventHandler's own dispatchers mean "the registered handlers", which are then called without a detour.
        dispatchers = (EventHandler.handle_events, EventHandler.handle_all_events)
        return None if self.event_handler in dispatchers else self.event_handler

    def dispatch_table(self, settings: Settings | None = None) -> Any:
        """The frozen DispatchTable of this runner, built from what is registered now."""
        limit = (settings or Settings.from_env()).max_payload_bytes
        return build_table(
            EventHandler,
            names=self.event_names,
            handler=self._own_handler(),
            all_events=self.all_events,
            max_payload_bytes=limit,
        )

    def policies(self) -> dict[str, list[tuple[str, RetryPolicy]]]:
        """By event name or foreign topic: (handler's name, its retry policy), then that of the event's class as ""."""
        found: dict[str, list[tuple[str, RetryPolicy]]] = {}
        if self._own_handler() is None:
            for handler in self.registry.handlers():
                if handler.retry_policy is not None:
                    found.setdefault(handler.name, []).append((handler.qualified_name, handler.retry_policy))
        for name, cls in Event.classes.items():
            policy = policy_of(getattr(cls, "retry_policy", None), f"{cls.__module__}.{cls.__qualname__}")
            if policy is not None:
                found.setdefault(name, []).append(("", policy))
        return found

    def blocks_long(self) -> bool:
        """Whether a synchronous handler needs a thread of its own, so that the server can go on polling."""
        if self._own_handler() is not None:
            return False
        return any(
            handler.long_running and not is_async(self.registry.instance_of(handler).handle_event)
            for handler in self.registry.handlers()
        )

    def some_handlers(self, name: str, handlers: tuple[str, ...]) -> Callable[[Any], Any] | None:
        """What calls only these of the registered handlers of an event or foreign topic; None: there are none."""
        if self._own_handler() is not None:
            return None
        foreign = name in self.registry.foreign_topics()
        return handlers_call(self.registry, EventHandler, name, foreign=foreign, only=handlers)

    def calls(self) -> list[Callable[[Any], Any]]:
        """Everything that this runner may call, to tell whether an event loop is needed."""
        handler = self._own_handler()
        if handler is not None:
            return [handler]
        table = self.dispatch_table(Settings())  # its limits do not matter here, so the environment is left alone
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
        return single_call(route)(event)
