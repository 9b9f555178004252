"""What the shop's own tests do without a broker: ``python -m sample_service.offline SCENARIO``, a process for each.

No scenario needs ``KAFKA`` to answer. Lines, in the order written; lines with ``what`` = ``hook`` may stand between:

- ``registry``: ``what`` = ``registry`` with ``events`` (those of `EventHandler.events_with_handlers` that are named
  in `ShopEvents`, sorted: all of them), ``placed`` = 2, ``printed`` >= 1 and ``unknown`` = 0 (counts of handlers),
  ``placed_classes`` = 2, ``place_order_classes`` = 1 (lengths in the registries), ``handler_is_class`` = true. Then
  ``handled`` by ``print_event`` and by ``test_event``, each of type ``Notice``. Then ``what`` = ``no io_server``.
- ``publishing``, with a publisher of the shop's own: ``cached`` (nothing was published before it), two ``published``
  of ``ORDER_PLACED``, ``flushed cache``, one ``published`` of ``PING``, ``committing again``, one ``published`` of
  ``STOCK_CHANGED``, ``in block``, one ``published`` of ``PING``, ``end``.
- ``delayed-handler``: ``handled`` by ``send_invoice`` and ``count_order`` in either order, ``published``
  ``INVOICE_SENT`` anywhere after the line of ``send_invoice``; each once.
- ``replay``: three ``logged``, topics ``keven_events_order_placed``, ``keven_events_payment_bounced`` and
  ``keven_events``, all bytes. Then the same three through `EventReceiverServer`, whose handler is the shop's own:
  three ``replayed`` with ``name`` and ``type`` (``OrderPlaced``, ``PaymentBounced``, ``Ping``), ``value`` (41,
  ``p9``, null). Then the first and the last of them through an `EventRunner` that takes only ``ORDER_PLACED``: one
  ``ran`` of ``OrderPlaced``.
- ``commands``: ``cached``, one ``logged`` to ``keven_commands_place_order``, one ``logged`` to
  ``keven_commands_cancel_order``; ``parsed`` of type ``PlaceOrder``, ``same_uuid`` = true, ``order_id`` = 51; two
  ``replayed`` (``PlaceOrder``, ``CancelOrder``) through a `MessageReceiverServer` over a `CommandRunner`;
  ``reports``: ``started`` = ``CMD_PLACE_ORDER_STARTED``, ``errored`` = ``CMD_PLACE_ORDER_ERRORED``, ``older`` =
  ``CMD_PLACE_ORDER_ERROR``, and ``names`` = the newer and the older spelling of the completed event.
- ``logs``: with a producer of the shop's own: ``produced`` and ``flushed`` for ``one``, then for ``two`` (its topic
  is ``shop_other``), then ``produced`` ``three`` and ``four`` with at least one ``flushed`` after them, then
  ``counts``: ``produced`` = 2, ``received`` = 2.
"""

import sys

from keven_core.kafka.abstracts.consumer_server import PrintRunner
from keven_core.kafka.abstracts.delayed import DelayedCommandsAndEvents
from keven_core.kafka.abstracts.event_handler import EventHandler
from keven_core.kafka.abstracts.eventreceiver_server import EventReceiverServer
from keven_core.kafka.abstracts.message_server import MessageReceiverServer
from keven_core.kafka.abstracts.metaclass.base_handler_meta import BaseHandlerMeta
from keven_core.kafka.commands import (
    Command,
    CommandPhase,
    CommandPublisher,
    CommandRunner,
    dont_send_commands_on_commit,
    keven_dispatch_command,
    keven_dispatch_command_now,
    keven_flush_command_cache,
    send_commands_on_commit,
    set_publisher,
)
from keven_core.kafka.events import EventRunner
from keven_core.kafka.events.event import EventNames
from keven_core.kafka.events.logger import (
    keven_dont_send_events_on_commit,
    keven_flush_event_cache,
    keven_log_event,
    keven_log_event_now,
    keven_send_events_on_commit,
    keven_set_publisher,
)
from keven_core.kafka.events.publisher import EventPublisher
from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger

from . import command_handlers, event_handlers, failing_handlers  # noqa: F401  (their handlers register themselves)
from .commands import CancelOrder, PlaceOrder
from .events import OrderPlaced, PaymentBounced, Ping, StockChanged
from .names import BATCH_LOG_TOPIC, LOG_TOPIC, ShopCommands, ShopEvents
from .record import plain_name, record
from .standins import ReplayServer, StandInLogger, StandInProducer, StandInPublisher


class Notice:
    """Not an event of the package: only something with an ``event_name``."""

    def __init__(self, event_name):
        self.event_name = event_name


def registered(registry, name):
    return [cls for key, classes in registry.items() if plain_name(key) == name for cls in classes]


def check_registry():
    own_names = {name.value.lower() for name in ShopEvents}
    placed_classes = registered(BaseHandlerMeta.get_event_registry(), "ORDER_PLACED")
    record(
        "registry",
        events=sorted(own_names & set(EventHandler.events_with_handlers())),
        placed=EventHandler.get_handler_count(ShopEvents.ORDER_PLACED),
        printed=EventHandler.get_handler_count(EventNames.PRINT_EVENT),
        unknown=EventHandler.get_handler_count("NOBODY_CARES"),
        placed_classes=len(placed_classes),
        place_order_classes=len(registered(BaseHandlerMeta.get_command_registry(), "PLACE_ORDER")),
        handler_is_class=event_handlers.SendInvoiceHandler in placed_classes,
    )
    EventHandler.handle_events(Notice(EventNames.PRINT_EVENT))
    EventHandler.handle_events(Notice(EventNames.TEST))
    try:
        MessageReceiverServer(PrintRunner()).start_sync()
    except ValueError:
        record("no io_server")


def check_publishing():
    keven_set_publisher(StandInPublisher())
    keven_send_events_on_commit()
    keven_log_event(OrderPlaced(1))
    keven_log_event(OrderPlaced(2))
    record("cached")
    keven_flush_event_cache()
    record("flushed cache")
    keven_log_event_now(Ping())
    record("committing again")
    keven_dont_send_events_on_commit()
    keven_log_event(StockChanged("bolt", 1))
    with DelayedCommandsAndEvents():
        keven_log_event(Ping())
        record("in block")
    record("end")


def check_delayed_handler():
    keven_set_publisher(StandInPublisher())
    EventHandler.handle_events(OrderPlaced(61, "Ada", 610))


def replayed(event):
    value = getattr(event, "order_id", None)
    if isinstance(event, PaymentBounced):
        value = event.details.payment_id
    record("replayed", name=plain_name(event.event_name), type=type(event).__name__, value=value)


def check_replay():
    logger = StandInLogger()
    publisher = EventPublisher(logger)
    bounced = PaymentBounced()
    bounced.details.payment_id = "p9"
    publisher.log_event(OrderPlaced(41, "Ada", 410))
    publisher.log_event(bounced)
    publisher.log_event(Ping(), topic="keven_events")

    server = EventReceiverServer(ReplayServer(logger.messages), set(EventHandler.events_with_handlers()), replayed)
    server.start_sync()

    runner = EventRunner(
        event_names={"order_placed"}, event_handler=lambda event: record("ran", type=type(event).__name__)
    )
    runner.run(logger.messages[0])
    runner.run(logger.messages[2])


def check_commands():
    logger = StandInLogger()
    set_publisher(CommandPublisher(logger))
    place = PlaceOrder(51, "Eve", 510)
    send_commands_on_commit()
    keven_dispatch_command(place)
    record("cached")
    keven_flush_command_cache()
    dont_send_commands_on_commit()
    keven_dispatch_command_now(CancelOrder())

    parsed = Command.from_bytes(logger.messages[0])
    record(
        "parsed",
        type=type(parsed).__name__,
        same_uuid=str(parsed.get_uuid()) == str(place.get_uuid()),
        order_id=parsed.order_id,
    )

    runner = CommandRunner(
        command_names={name.value.lower() for name in ShopCommands},
        command_handler=lambda command: record("replayed", type=type(command).__name__),
        all_commands=True,
    )
    server = MessageReceiverServer(runner, ReplayServer(logger.messages))
    server.start_sync()

    handler = place.create_handler()
    record(
        "reports",
        started=plain_name(handler.start_event().event_name),
        errored=plain_name(handler.error_event(get_old_event=False).event_name),
        older=plain_name(handler.error_event(get_old_event=True).event_name),
        names=[
            plain_name(Command.get_event_name(CommandPhase.COMPLETED, ShopCommands.PLACE_ORDER, old_name=False)),
            plain_name(Command.get_event_name(CommandPhase.COMPLETED, ShopCommands.PLACE_ORDER)),
        ],
    )


def check_logs():
    logger = KafkaLogger(topic=LOG_TOPIC)
    logger.producer = StandInProducer()
    logger.log(b"one")
    logger.log(b"two", topic="shop_other")
    batch_logger = KafkaBatchLogger(topic=BATCH_LOG_TOPIC)
    batch_logger.producer = StandInProducer()
    batch_logger.log(b"three")
    batch_logger.log(b"four")
    batch_logger.flush()
    record("counts", produced=batch_logger.produced_count, received=batch_logger.received_count)


SCENARIOS = {
    "registry": check_registry,
    "publishing": check_publishing,
    "delayed-handler": check_delayed_handler,
    "replay": check_replay,
    "commands": check_commands,
    "logs": check_logs,
}


def main(arguments):
    if len(arguments) != 1 or arguments[0] not in SCENARIOS:
        sys.exit(f"usage: python -m sample_service.offline {'|'.join(SCENARIOS)}")
    SCENARIOS[arguments[0]]()


if __name__ == "__main__":
    main(sys.argv[1:])
