"""Handlers, servers and runners that services build on; servers and runners are imported when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keven_core._lazy import lazy_attributes

# At once: the decorator has the name of its module, which importing that module would put in its place.
from keven_core.kafka.abstracts.event_handler import (
    EventHandler,
    EventHandlerMeta,
    LongRunningEventHandler,
    event_handler,
)

if TYPE_CHECKING:
    from keven_core.kafka.abstracts.consumer_server import KafkaConsumerServer, PrintRunner, Runner, TopicPartition
    from keven_core.kafka.abstracts.eventreceiver_server import AllEventsReceiverServer, EventReceiverServer
    from keven_core.kafka.abstracts.message_server import MessageReceiverServer

__all__ = [
    "AllEventsReceiverServer",
    "EventHandler",
    "EventHandlerMeta",
    "EventReceiverServer",
    "KafkaConsumerServer",
    "LongRunningEventHandler",
    "MessageReceiverServer",
    "PrintRunner",
    "Runner",
    "TopicPartition",
    "event_handler",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "keven_core.kafka.abstracts.consumer_server": (
            "KafkaConsumerServer",
            "PrintRunner",
            "Runner",
            "TopicPartition",
        ),
        "keven_core.kafka.abstracts.eventreceiver_server": (
            "AllEventsReceiverServer",
            "EventReceiverServer",
        ),
        "keven_core.kafka.abstracts.message_server": ("MessageReceiverServer",),
    },
)
