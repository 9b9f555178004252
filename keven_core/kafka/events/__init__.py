"""Events: names, base class, runner, publisher and launchers; each is imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keven_core._lazy import lazy_attributes

if TYPE_CHECKING:
    from keven_core.kafka.events.event import Event, EventNames, GenericEvent
    from keven_core.kafka.events.publisher import EventPublisher
    from keven_core.kafka.events.runner import EventRunner
    from keven_core.kafka.events.server import (
        setup_event_listener,
        start_all_events_receiver_server,
        start_all_events_receiver_server_async,
        start_events_receiver_process,
        start_events_receiver_server,
        start_events_receiver_server_async,
    )

__all__ = [
    "Event",
    "EventNames",
    "EventPublisher",
    "EventRunner",
    "GenericEvent",
    "setup_event_listener",
    "start_all_events_receiver_server",
    "start_all_events_receiver_server_async",
    "start_events_receiver_process",
    "start_events_receiver_server",
    "start_events_receiver_server_async",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "keven_core.kafka.events.event": (
            "Event",
            "EventNames",
            "GenericEvent",
        ),
        "keven_core.kafka.events.publisher": ("EventPublisher",),
        "keven_core.kafka.events.runner": ("EventRunner",),
        "keven_core.kafka.events.server": (
            "setup_event_listener",
            "start_all_events_receiver_server",
            "start_all_events_receiver_server_async",
            "start_events_receiver_process",
            "start_events_receiver_server",
            "start_events_receiver_server_async",
        ),
    },
)
