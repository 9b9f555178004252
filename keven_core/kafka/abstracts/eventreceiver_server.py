"""Servers that route events to handlers: some events, or all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from keven_core.kafka.abstracts.event_handler import EventHandler
from keven_core.kafka.abstracts.message_server import MessageReceiverServer
from keven_core.kafka.events.runner import EventRunner

__all__ = ["AllEventsReceiverServer", "EventReceiverServer"]


class EventReceiverServer(MessageReceiverServer):
    """Hands the events in `event_names` to `event_handler`.

    Arguments:
        io_server: see MessageReceiverServer.
        event_names: which events; None: every event that has a handler.
        event_handler: called with each event; None: the registered handlers.
    """

    def __init__(
        self,
        io_server: Any = None,
        event_names: Iterable[object] | None = None,
        event_handler: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(EventRunner(event_names, event_handler), io_server)


class AllEventsReceiverServer(MessageReceiverServer):
    """Hands every event to `event_handler`, also those without a class of their own (as generic events).

    With the default handler the registered handlers are called, and events without one are skipped and counted.
    """

    def __init__(self, io_server: Any = None, event_handler: Callable[[Any], Any] | None = None) -> None:
        super().__init__(EventRunner(None, event_handler or EventHandler.handle_all_events, all_events=True), io_server)
