"""Events: names, base class, runner, publisher and launchers; each is imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keven_core._lazy import lazy_attributes

if TYPE_CHECKING:
    from keven_core.kafka.details import BasicDetail
    from keven_core.kafka.events.event import Event, EventNames, GenericEvent, PickledEvent
    from keven_core.kafka.events.logger import (
        keven_clear_event_publishers,
        keven_dont_send_events_on_commit,
        keven_flush_event_cache,
        keven_get_write_cache,
        keven_last_publisher,
        keven_log_event,
        keven_log_event_now,
        keven_send_events_on_commit,
        keven_set_publisher,
    )
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
    "BasicDetail",
    "Event",
    "EventNames",
    "EventPublisher",
    "EventRunner",
    "GenericEvent",
    "PickledEvent",
    "keven_clear_event_publishers",
    "keven_dont_send_events_on_commit",
    "keven_flush_event_cache",
    "keven_get_write_cache",
    "keven_last_publisher",
    "keven_log_event",
    "keven_log_event_now",
    "keven_send_events_on_commit",
    "keven_set_publisher",
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
        "keven_core.kafka.details": ("BasicDetail",),
        "keven_core.kafka.events.event": (
            "Event",
            "EventNames",
            "GenericEvent",
            "PickledEvent",
        ),
        "keven_core.kafka.events.logger": (
            "keven_clear_event_publishers",
            "keven_dont_send_events_on_commit",
            "keven_flush_event_cache",
            "keven_get_write_cache",
            "keven_last_publisher",
            "keven_log_event",
            "keven_log_event_now",
            "keven_send_events_on_commit",
            "keven_set_publisher",
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
