"""Kafka messaging of keven_core: events, commands, handlers, servers and loggers; each is imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keven_core._lazy import lazy_attributes

if TYPE_CHECKING:
    from keven_core.kafka.abstracts.command_handler import (
        CommandHandler,
        LongRunningCommandHandler,
        command_handler,
        long_running_command_handler,
    )
    from keven_core.kafka.abstracts.commandreceiver_server import AllCommandsReceiverServer, CommandReceiverServer
    from keven_core.kafka.abstracts.consumer_server import KafkaConsumerServer, PrintRunner, Runner, TopicPartition
    from keven_core.kafka.abstracts.event_handler import (
        EventHandler,
        EventHandlerMeta,
        LongRunningEventHandler,
        event_handler,
        long_running_event_handler,
    )
    from keven_core.kafka.abstracts.eventreceiver_server import AllEventsReceiverServer, EventReceiverServer
    from keven_core.kafka.abstracts.message_server import MessageReceiverServer
    from keven_core.kafka.abstracts.metaclass.base_handler_meta import BaseHandlerMeta
    from keven_core.kafka.codecs import Codec, ProtobufEnvelopeCodec, register_codec
    from keven_core.kafka.commands.command import Command, CommandNames, CommandPhase, GenericCommand, PickledCommand
    from keven_core.kafka.commands.command_event import CommandErrorEvent, CommandEvent
    from keven_core.kafka.commands.logger import (
        clear_command_publishers,
        dont_send_commands_on_commit,
        keven_dispatch_command,
        keven_dispatch_command_now,
        keven_flush_command_cache,
        send_commands_on_commit,
    )
    from keven_core.kafka.commands.publisher import CommandPublisher
    from keven_core.kafka.commands.runner import CommandRunner
    from keven_core.kafka.commands.server import (
        setup_command_receiver,
        start_all_commands_receiver_server,
        start_all_commands_receiver_server_async,
        start_command_receiver_process,
        start_command_receiver_server,
        start_command_receiver_server_async,
    )
    from keven_core.kafka.config import Settings
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
    from keven_core.kafka.log_handler import KafkaLogHandler, KafkaLogProcessor
    from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger
    from keven_core.kafka.message import Message
    from keven_core.kafka.outcomes import BatchError, DeadLetter, Retry, Skip
    from keven_core.kafka.publishers import MessagePublisher
    from keven_core.kafka.publishing import DelayedCommandsAndEvents, Outbox, outbox
    from keven_core.kafka.record import current_record, current_records
    from keven_core.kafka.redrive import Redrive, RedriveReport
    from keven_core.kafka.retry import Exponential, RetryPolicy

__all__ = [
    "AllCommandsReceiverServer",
    "AllEventsReceiverServer",
    "BaseHandlerMeta",
    "BasicDetail",
    "BatchError",
    "Codec",
    "Command",
    "CommandErrorEvent",
    "CommandEvent",
    "CommandHandler",
    "CommandNames",
    "CommandPhase",
    "CommandPublisher",
    "CommandReceiverServer",
    "CommandRunner",
    "DeadLetter",
    "DelayedCommandsAndEvents",
    "Event",
    "EventHandler",
    "EventHandlerMeta",
    "EventNames",
    "EventPublisher",
    "EventReceiverServer",
    "EventRunner",
    "Exponential",
    "GenericCommand",
    "GenericEvent",
    "KafkaBatchLogger",
    "KafkaConsumerServer",
    "KafkaLogHandler",
    "KafkaLogProcessor",
    "KafkaLogger",
    "LongRunningCommandHandler",
    "LongRunningEventHandler",
    "Message",
    "MessagePublisher",
    "MessageReceiverServer",
    "Outbox",
    "PickledCommand",
    "PickledEvent",
    "PrintRunner",
    "ProtobufEnvelopeCodec",
    "Redrive",
    "RedriveReport",
    "Retry",
    "RetryPolicy",
    "Runner",
    "Settings",
    "Skip",
    "TopicPartition",
    "clear_command_publishers",
    "command_handler",
    "current_record",
    "current_records",
    "dont_send_commands_on_commit",
    "event_handler",
    "keven_clear_event_publishers",
    "keven_dispatch_command",
    "keven_dispatch_command_now",
    "keven_dont_send_events_on_commit",
    "keven_flush_command_cache",
    "keven_flush_event_cache",
    "keven_get_write_cache",
    "keven_last_publisher",
    "keven_log_event",
    "keven_log_event_now",
    "keven_send_events_on_commit",
    "keven_set_publisher",
    "long_running_command_handler",
    "long_running_event_handler",
    "outbox",
    "register_codec",
    "send_commands_on_commit",
    "setup_command_receiver",
    "setup_event_listener",
    "start_all_commands_receiver_server",
    "start_all_commands_receiver_server_async",
    "start_all_events_receiver_server",
    "start_all_events_receiver_server_async",
    "start_command_receiver_process",
    "start_command_receiver_server",
    "start_command_receiver_server_async",
    "start_events_receiver_process",
    "start_events_receiver_server",
    "start_events_receiver_server_async",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "keven_core.kafka.abstracts.command_handler": (
            "CommandHandler",
            "LongRunningCommandHandler",
            "command_handler",
            "long_running_command_handler",
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
        "keven_core.kafka.abstracts.event_handler": (
            "EventHandler",
            "EventHandlerMeta",
            "LongRunningEventHandler",
            "event_handler",
            "long_running_event_handler",
        ),
        "keven_core.kafka.abstracts.eventreceiver_server": (
            "AllEventsReceiverServer",
            "EventReceiverServer",
        ),
        "keven_core.kafka.abstracts.message_server": ("MessageReceiverServer",),
        "keven_core.kafka.abstracts.metaclass.base_handler_meta": ("BaseHandlerMeta",),
        "keven_core.kafka.codecs": (
            "Codec",
            "ProtobufEnvelopeCodec",
            "register_codec",
        ),
        "keven_core.kafka.commands.command": (
            "Command",
            "CommandNames",
            "CommandPhase",
            "GenericCommand",
            "PickledCommand",
        ),
        "keven_core.kafka.commands.command_event": (
            "CommandErrorEvent",
            "CommandEvent",
        ),
        "keven_core.kafka.commands.logger": (
            "clear_command_publishers",
            "dont_send_commands_on_commit",
            "keven_dispatch_command",
            "keven_dispatch_command_now",
            "keven_flush_command_cache",
            "send_commands_on_commit",
        ),
        "keven_core.kafka.commands.publisher": ("CommandPublisher",),
        "keven_core.kafka.commands.runner": ("CommandRunner",),
        "keven_core.kafka.commands.server": (
            "setup_command_receiver",
            "start_all_commands_receiver_server",
            "start_all_commands_receiver_server_async",
            "start_command_receiver_process",
            "start_command_receiver_server",
            "start_command_receiver_server_async",
        ),
        "keven_core.kafka.config": ("Settings",),
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
        "keven_core.kafka.log_handler": (
            "KafkaLogHandler",
            "KafkaLogProcessor",
        ),
        "keven_core.kafka.logger": (
            "KafkaBatchLogger",
            "KafkaLogger",
        ),
        "keven_core.kafka.message": ("Message",),
        "keven_core.kafka.outcomes": (
            "BatchError",
            "DeadLetter",
            "Retry",
            "Skip",
        ),
        "keven_core.kafka.publishers": ("MessagePublisher",),
        "keven_core.kafka.publishing": (
            "DelayedCommandsAndEvents",
            "Outbox",
            "outbox",
        ),
        "keven_core.kafka.record": (
            "current_record",
            "current_records",
        ),
        "keven_core.kafka.redrive": (
            "Redrive",
            "RedriveReport",
        ),
        "keven_core.kafka.retry": (
            "Exponential",
            "RetryPolicy",
        ),
    },
)
