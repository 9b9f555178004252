"""Handlers of the shop's commands, and of the events by which commands are reported.

Lines of command handlers (``what`` = ``handled``), one for each command received:

- ``place_order``: ``uuid``, ``order_id``, ``user_id``; then an `OrderPlaced` goes out, after the handler has ended;
- ``cancel_order``: ``uuid``, ``order_id``, ``reason``; then the handler fails: its exception reads ``order <order_id>
  is paid already``;
- ``archive_order``: ``uuid``, ``order_id``;
- ``print_labels``: ``uuid``, ``count``, ``thread`` = ``other``;
- ``warm_cache``: ``uuid``.

Lines of the handlers of reports, seen by a worker for *events*; ``uuid`` is that of the command:

- ``place_order_started``, ``place_order_completed``: one each for a `PlaceOrder`; they come over two topics, so in
  either order; ``type`` is ``CommandEvent``, as for every report but the next;
- ``cancel_order_errored``: one for a `CancelOrder`, ``error`` holds the text of the exception; ``type`` is
  ``CommandErrorEvent``. ``cancel_order_completed`` must never be seen;
- ``archive_order_complete``: one for an `ArchiveOrder`; the handler is registered under the older spelling;
- ``print_labels_completed``: one for a `PrintLabels`, after the ``print_labels`` line;
- ``warm_cache_completed`` must never be seen.
"""

from keven_core.kafka.abstracts import CommandHandler, LongRunningCommandHandler, command_handler
from keven_core.kafka.abstracts.event_handler import EventHandler, event_handler
from keven_core.kafka.commands import Command, CommandPhase
from keven_core.kafka.events.event import EventNames
from keven_core.kafka.events.logger import keven_log_event

from . import commands  # noqa: F401  (the names of the reports come with the commands)
from .events import OrderPlaced
from .names import ShopCommands
from .record import handled, handled_command, thread_kind


class PlaceOrderHandler(CommandHandler):
    command_name = ShopCommands.PLACE_ORDER

    def handle_command(self, command):
        event = OrderPlaced(command.order_id, command.customer, command.amount, namespace="south")
        event.source_command_uuid = command.get_uuid()
        keven_log_event(event)
        handled_command(
            "place_order",
            command,
            order_id=command.order_id,
            user_id=str(command.initiated_by_user_id),
        )


class CancelOrderHandler(CommandHandler):
    command_name = ShopCommands.CANCEL_ORDER

    def handle_command(self, command):
        details = command.details
        handled_command("cancel_order", command, order_id=details.order_id, reason=details.reason)
        raise ValueError(f"order {details.order_id} is paid already")


@command_handler(ShopCommands.ARCHIVE_ORDER)
def archive_order(command):
    handled_command("archive_order", command, order_id=command.details.order_id)


@command_handler(ShopCommands.WARM_CACHE, delay_commands_and_events=False)
def warm_cache(command):
    handled_command("warm_cache", command)


class PrintLabelsHandler(LongRunningCommandHandler):
    command_name = ShopCommands.PRINT_LABELS

    def long_running_handle_command(self, command):
        handled_command("print_labels", command, count=command.count, thread=thread_kind())


class PlaceOrderStarted(EventHandler):
    event_name = EventNames.CMD_PLACE_ORDER_STARTED

    def handle_event(self, event):
        handled("place_order_started", event, uuid=str(event.source_command_uuid))


class PlaceOrderCompleted(EventHandler):
    event_name = EventNames.CMD_PLACE_ORDER_COMPLETED

    def handle_event(self, event):
        handled("place_order_completed", event, uuid=str(event.source_command_uuid))


class CancelOrderErrored(EventHandler):
    event_name = EventNames.CMD_CANCEL_ORDER_ERRORED

    def handle_event(self, event):
        handled("cancel_order_errored", event, uuid=str(event.source_command_uuid), error=event.error_message)


@event_handler(EventNames.CMD_CANCEL_ORDER_COMPLETED)
def cancel_order_completed(event):
    handled("cancel_order_completed", event, uuid=str(event.source_command_uuid))


@event_handler("CMD_PRINT_LABELS_COMPLETED")
def print_labels_completed(event):
    handled("print_labels_completed", event, uuid=str(event.source_command_uuid))


@event_handler("CMD_WARM_CACHE_COMPLETED")
def warm_cache_completed(event):
    handled("warm_cache_completed", event, uuid=str(event.source_command_uuid))


def archive_order_complete(event):
    handled("archive_order_complete", event, uuid=str(event.source_command_uuid))


# By default the older spelling, CMD_ARCHIVE_ORDER_COMPLETE.
EventHandler.register_function(
    Command.get_event_name(CommandPhase.COMPLETED, command_name=ShopCommands.ARCHIVE_ORDER), archive_order_complete
)
