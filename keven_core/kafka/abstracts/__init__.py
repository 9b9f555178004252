"""Handlers, servers and runners that services build on; servers and runners are imported when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keven_core._lazy import lazy_attributes

# At once: the decorators have the names of their modules, which importing these would put in their place.
from keven_core.kafka.abstracts.command_handler import (
    CommandHandler,
    CommandHandlerMeta,
    LongRunningCommandHandler,
    command_handler,
    long_running_command_handler,
)
from keven_core.kafka.abstracts.event_handler import (
    EventHandler,
    EventHandlerMeta,
    LongRunningEventHandler,
    event_handler,
    long_running_event_handler,
)

if TYPE_CHECKING:
    from keven_core.kafka.abstracts.commandevent import CommandErrorEvent, CommandEvent
    from keven_core.kafka.abstracts.commandreceiver_server import AllCommandsReceiverServer, CommandReceiverServer
    from keven_core.kafka.abstracts.consumer_server import KafkaConsumerServer, PrintRunner, Runner, TopicPartition
    from keven_core.kafka.abstracts.delayed import DelayedCommandsAndEvents
    from keven_core.kafka.abstracts.eventreceiver_server import AllEventsReceiverServer, EventReceiverServer
    from keven_core.kafka.abstracts.message import Message
    from keven_core.kafka.abstracts.message_server import MessageReceiverServer
    from keven_core.kafka.publishers import MessagePublisher

__all__ = [
    "AllCommandsReceiverServer",
    "AllEventsReceiverServer",
    "CommandErrorEvent",
    "CommandEvent",
    "CommandHandler",
    "CommandHandlerMeta",
    "CommandReceiverServer",
    "DelayedCommandsAndEvents",
    "EventHandler",
    "EventHandlerMeta",
    "EventReceiverServer",
    "KafkaConsumerServer",
    "LongRunningCommandHandler",
    "LongRunningEventHandler",
    "Message",
    "MessagePublisher",
    "MessageReceiverServer",
    "PrintRunner",
    "Runner",
    "TopicPartition",
    "command_handler",
    "event_handler",
    "long_running_command_handler",
    "long_running_event_handler",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "keven_core.kafka.abstracts.commandevent": (
            "CommandErrorEvent",
            "CommandEvent",
        ),
        "keven_core.kafka.abstracts.commandreceiver_server": (
            "AllCommandsReceiverServer",
            "CommandReceiverServer",
        ),
        "keven_core.kafka.abstracts.consumer_server": (
            "KafkaConsumerServer",
            "PrintRunner",
            "Runner",
            "TopicPartition",
        ),
        "keven_core.kafka.abstracts.delayed": ("DelayedCommandsAndEvents",),
        "keven_core.kafka.abstracts.eventreceiver_server": (
            "AllEventsReceiverServer",
            "EventReceiverServer",
        ),
        "keven_core.kafka.abstracts.message": ("Message",),
        "keven_core.kafka.abstracts.message_server": ("MessageReceiverServer",),
        "keven_core.kafka.publishers": ("MessagePublisher",),
    },
)
