"""Handlers of events: subclass `EventHandler`, or decorate a function with `@event_handler(...)`.

    class Welcome(EventHandler):
        event_name = "CUSTOMER_JOINED"

        def handle_event(self, event):
            ...

A handler is registered when its class is defined. One instance per class and process is made when a server starts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from keven_core.kafka._calls import as_unary
from keven_core.kafka.abstracts.metaclass.base_handler_meta import EVENT_REGISTRY, BaseHandlerMeta, register_handler
from keven_core.kafka.envelope import name_of
from keven_core.kafka.errors import RegistrationError
from keven_core.kafka.registry import HandlerRegistry
from keven_core.kafka.retry import RetryPolicy
from keven_core.kafka.routing import compose, handlers_call

__all__ = ["EventHandler", "EventHandlerMeta", "LongRunningEventHandler", "event_handler"]

Function = TypeVar("Function", bound=Callable[..., Any])


class EventHandlerMeta(BaseHandlerMeta):
    """Registers event handlers, by `event_name` or foreign `topic`."""

    name_attribute = "event_name"
    handle_method = "handle_event"
    registry = EVENT_REGISTRY


class EventHandler(metaclass=EventHandlerMeta):
    """Base of event handlers.

    Class attributes:
        event_name: what is handled: a str, a member of any str enum, or an EventNames member.
        topic: instead of `event_name`: a foreign topic, whose values are not envelopes.
        value_type: for a foreign topic: any type that msgspec decodes; bytes (the default): not decoded.
        codec: for a foreign topic: "json" or "msgpack"; None tells them apart by the first byte.
        retry_policy: a RetryPolicy for records that it fails to handle; None: see keven_core.kafka.retry.
        auto_register: False in a class body keeps that class out of the registry (for base classes).
        batch_size: for a handler of lists: how many events at most; 500 by default.
        batch_wait_ms: for a handler of lists: how long, in milliseconds, its first event waits for others; 100 by
            default.

    A class that defines `handle_batch(self, events)` instead of handle_event gets lists: in the order of their
    partitions, one list after the other (with order="none" several at once). It may be async. It returns None when all
    are done, or a list with None, an outcome or an exception for each event; it may raise BatchError(index), or
    anything else: then all have failed.

    A class that also defines `handle_tombstone(self, record)` gets the records that have no value; else those are
    skipped and counted. `keven_core.kafka.record.current_record()` gives key, headers, timestamp and position.
    """

    event_name: ClassVar[Any] = None
    topic: ClassVar[str | None] = None
    value_type: ClassVar[Any] = None
    codec: ClassVar[str | None] = None
    retry_policy: ClassVar[RetryPolicy | None] = None
    auto_register: ClassVar[bool] = True
    batch_size: ClassVar[int] = 500
    batch_wait_ms: ClassVar[int] = 100
    long_running: ClassVar[bool] = False
    _pre_hooks: ClassVar[list[Callable[..., Any]]] = []
    _post_hooks: ClassVar[list[Callable[..., Any]]] = []

    @abstractmethod
    def handle_event(self, event: Any) -> Any:
        """Handle one event; may be `async def`.

        Called in the server's thread (async: in its event loop), one event of a partition at a time, in order. While it
        runs nothing else is polled, so it should return well within max_poll_interval. Its offset is stored only after
        all handlers of the event have returned. An exception sends the record to the retry or the dead-letter topic; an
        Outcome (keven_core.kafka.outcomes), returned or raised, says which. The same event can come again after a
        restart or rebalance.
        """

    @classmethod
    def register_function(cls, event_name: object, func: Callable[..., Any]) -> None:
        """Register a plain or async function as a handler of `event_name`."""
        register_handler(type(cls).registry, func, event_name)

    @classmethod
    def register_pre_handler_hook(cls, func: Callable[..., Any]) -> None:
        """Call `func` before the handlers of each event: with the event if it takes an argument, else without.

        On EventHandler itself: for every event; on a subclass: for the events of that handler. A hook that raises is a
        failure of the record, whose handlers then do not run. Hooks are read when a server starts.
        """
        cls._own("_pre_hooks").append(func)

    @classmethod
    def register_post_handler_hook(cls, func: Callable[..., Any]) -> None:
        """Call `func` after the handlers of each event, also when one has raised; else as register_pre_handler_hook."""
        cls._own("_post_hooks").append(func)

    @classmethod
    def _own(cls, attribute: str) -> list[Callable[..., Any]]:
        if attribute not in vars(cls):
            setattr(cls, attribute, [])
        hooks: list[Callable[..., Any]] = vars(cls)[attribute]
        return hooks

    @classmethod
    def hooks(cls, attribute: str) -> list[Callable[..., Any]]:
        """Hooks of this class, those of its bases first; `attribute` is "_pre_hooks" or "_post_hooks"."""
        return [hook for base in reversed(cls.__mro__) for hook in vars(base).get(attribute, ())]

    @classmethod
    def execute_pre_handler_hooks(cls, event: Any = None) -> Any:
        """Run the pre-handler hooks that are registered on this class.

        Returns None; an awaitable when one of them is async.
        """
        return compose([], [as_unary(hook) for hook in cls.hooks("_pre_hooks")], [])(event)

    @classmethod
    def execute_post_handler_hooks(cls, event: Any = None) -> Any:
        """Run the post-handler hooks that are registered on this class, each also when one before it has raised.

        Returns None; an awaitable when one of them is async.
        """
        return compose([], [], [as_unary(hook) for hook in cls.hooks("_post_hooks")])(event)

    @classmethod
    def handle_events(cls, event: Any) -> Any:
        """Run the registered handlers of any object with an `event_name`, in this thread.

        Returns None; an awaitable when one of the handlers is async. Without a handler nothing happens.
        """
        call = handlers_call(type(cls).registry, cls, name_of(event.event_name))
        return call(event) if call is not None else None

    @classmethod
    def handle_all_events(cls, event: Any) -> Any:
        """As handle_events(): the handler that an all-events server uses by default."""
        return cls.handle_events(event)

    @classmethod
    def events_with_handlers(cls) -> list[str]:
        """Lower-case names of the events that have a handler."""
        return [name.lower() for name in type(cls).registry.names()]

    @classmethod
    def get_handler_count(cls, event_name: object) -> int:
        """How many handlers an event has."""
        return len(type(cls).registry.handlers_of(name_of(event_name)))

    @classmethod
    def registry_of(cls) -> HandlerRegistry:
        """The registry that this family of handlers belongs to."""
        return type(cls).registry


class LongRunningEventHandler(EventHandler):
    """Base of handlers that need so long for an event that the server has to poll meanwhile.

    A synchronous one runs in a worker thread, so that the server keeps its place in the group however long it takes.
    """

    auto_register = False
    long_running = True

    @abstractmethod
    def long_running_handle_event(self, event: Any) -> Any:
        """Handle one event; as handle_event() otherwise, but for the thread."""

    def handle_event(self, event: Any) -> Any:
        """The same as long_running_handle_event()."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Make handle_event() the same method, so that it is async if that is."""
        super().__init_subclass__(**options)
        own = vars(cls).get("long_running_handle_event")
        if own is not None:
            cls.handle_event = own  # type: ignore[method-assign]  # which is what this method is for


def event_handler(
    event_name: object = None,
    *,
    topic: str | None = None,
    value_type: Any = None,
    codec: str | None = None,
    retry_policy: RetryPolicy | None = None,
    batch_size: int | None = None,
    batch_wait_ms: int = 100,
) -> Callable[[Function], Function]:
    """Register the decorated function, plain or async, for an event or a foreign topic; it stays callable as it is.

    Arguments and errors as the class attributes of EventHandler; with a `batch_size` it takes lists.
    """
    if (event_name is None) == (topic is None):
        raise RegistrationError("@event_handler takes an event name or topic=..., and not both")
    if topic is None:
        name_of(event_name)  # at once: without parentheses the function itself would be taken for the name

    def decorate(func: Function) -> Function:
        register_handler(
            EVENT_REGISTRY,
            func,
            event_name,
            topic=topic,
            value_type=value_type,
            codec=codec,
            retry_policy=retry_policy,
            batch_size=batch_size,
            batch_wait_ms=batch_wait_ms,
        )
        return func

    return decorate
