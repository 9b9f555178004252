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

from keven_core.kafka.abstracts.message_handler import MessageHandler, handler_decorator, share_long_running_method
from keven_core.kafka.abstracts.metaclass.base_handler_meta import BaseHandlerMeta, register_handler
from keven_core.kafka.kinds import EVENTS
from keven_core.kafka.retry import RetryPolicy

__all__ = ["EventHandler", "EventHandlerMeta", "LongRunningEventHandler", "event_handler", "long_running_event_handler"]

Function = TypeVar("Function", bound=Callable[..., Any])


class EventHandlerMeta(BaseHandlerMeta):
    """Registers event handlers, by `event_name` or foreign `topic`."""

    kind = EVENTS


class EventHandler(MessageHandler, metaclass=EventHandlerMeta):
    """Base of event handlers; MessageHandler has the further class attributes.

    `event_name` says what is handled: a str, a member of any str enum, or an EventNames member.
    """

    event_name: ClassVar[Any] = None

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
        register_handler(EVENTS, func, event_name)

    @classmethod
    def handle_events(cls, event: Any) -> Any:
        """Run the registered handlers of any object with an `event_name`, in this thread.

        Returns None; an awaitable when one of the handlers is async. Without a handler nothing happens.
        """
        return cls._handle(event)

    @classmethod
    def handle_all_events(cls, event: Any) -> Any:
        """As handle_events(): the handler that an all-events server uses by default."""
        return cls._handle(event)

    @classmethod
    def events_with_handlers(cls) -> list[str]:
        """Lower-case names of the events that have a handler."""
        return cls.names_with_handlers()


class LongRunningEventHandler(EventHandler):
    """Base of handlers that need so long for an event that the server has to poll meanwhile.

    A synchronous one runs in a worker thread, so that the server keeps its place in the group however long it takes.
    """

    auto_register = False
    long_running = True
    thread_manager: ClassVar[Any] = None  # the original's; not used

    @abstractmethod
    def long_running_handle_event(self, event: Any) -> Any:
        """Handle one event; as handle_event() otherwise, but for the thread."""

    def handle_event(self, event: Any) -> Any:
        """The same as long_running_handle_event()."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Make handle_event() the same method."""
        super().__init_subclass__(**options)
        share_long_running_method("event", cls)


def event_handler(
    event_name: object = None,
    *,
    topic: str | None = None,
    value_type: Any = None,
    codec: str | None = None,
    retry_policy: RetryPolicy | None = None,
    batch_size: int | None = None,
    batch_wait_ms: int = 100,
    delay_commands_and_events: bool = True,
    capture_exception_handler: Callable[[Exception], Any] | None = None,
) -> Callable[[Function], Function]:
    """Register the decorated function, plain or async, for an event or a foreign topic; it stays callable as it is.

    Arguments and errors as the class attributes of EventHandler; with a `batch_size` it takes lists.
    """
    return handler_decorator(
        EVENTS,
        event_name,
        topic=topic,
        value_type=value_type,
        codec=codec,
        retry_policy=retry_policy,
        batch_size=batch_size,
        batch_wait_ms=batch_wait_ms,
        delay_commands_and_events=delay_commands_and_events,
        capture_exception_handler=capture_exception_handler,
    )


def long_running_event_handler(event_name: object = None, **options: Any) -> Callable[[Function], Function]:
    """As event_handler(), for a function that needs so long that the server has to poll meanwhile."""
    return handler_decorator(EVENTS, event_name, long_running=True, **options)
