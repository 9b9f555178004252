"""`EventRunner`: from the bytes of a message to the handlers of its event."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from keven_core.kafka.abstracts.event_handler import EventHandler
from keven_core.kafka.abstracts.message_runner import MessageRunner

__all__ = ["EventRunner"]


class EventRunner(MessageRunner):
    """Decodes messages into events and calls their handlers.

    Arguments:
        event_names: the events to handle; None: every event that has a handler.
        event_handler: called with each event, sync or async; None (or EventHandler.handle_events): the registered
            handlers.
        all_events: `event_handler` also gets events that are not in `event_names`, as their class or generic.
    """

    handlers = EventHandler

    def __init__(
        self,
        event_names: Iterable[object] | None = None,
        event_handler: Callable[[Any], Any] | None = None,
        all_events: bool = False,
    ) -> None:
        super().__init__(event_names, event_handler, all_events)
