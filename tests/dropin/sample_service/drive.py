"""What the shop sends: ``python -m sample_service.drive SCENARIO``; each sends to the broker and ends by itself.

None of them flushes or waits before it ends, except where it says so: whatever was logged has to arrive all the same.
Each writes ``what`` = ``drive``, ``scenario`` when it is through. What comes of it, by worker:

- ``ping``: one `Ping`. ``events``: ``ping``.
- ``orders``: three orders, ids 1 to 3, amounts 10, 20, 30, namespace ``north``, originator ``drive``; two payments
  for orders 1 and 2 of 10 and 20 EUR; one packed order; one change of stock (``bolt``, -5). ``events``: three
  ``send_invoice``, three ``count_order``, then three ``file_invoice`` (``inv-1`` to ``inv-3``), two ``book_payment``,
  one ``ship`` (quantity 5, two lines, ``bolt`` and ``nut``, both of ``OrderLine``, packed at 2020-01-02T03:04:05),
  one ``change_stock``. The lines of one topic with one partition come in the order sent.
- ``commit``: a transaction. Orders 11 and 12 are logged for the commit, then a line ``what`` = ``before commit``,
  then the flush. Then order 13, logged at once though the transaction is still open, and order 14 after it.
  ``events``: one ``send_invoice`` for each of 11 to 14.
- ``delayed``: orders 21 and 22 in a `DelayedCommandsAndEvents` block. ``events``: one ``send_invoice`` for each.
- ``audit``: one `LoginChecked` of user 7. ``listener`` and ``all-events``: ``check_login``.
- ``scan``: two scans, ``short`` of 100 characters and ``long`` of 2 MiB. ``events``: two ``read_scan`` of ``length``
  100 and 2097152; ``offloads`` is empty for the first and ``["text"]`` for the second. Both processes see the same
  folder.
- ``failures``: payments ``p1``, ``p2`` that bounce, and broken order 9. ``retry``, while
  no other worker runs: see `failing_handlers`.
- ``commands``: `PlaceOrder` 31 by user 5, `CancelOrder` 32, `ArchiveOrder` 33, `PrintLabels` of 4, `WarmCache`, each
  with the uuid written in a line ``what`` = ``dispatched``, ``name``, ``uuid``. ``commands``: a line for each;
  ``events``: those for the reports, and ``send_invoice`` for order 31 (``namespace`` ``south``, ``command`` = the
  uuid of the `PlaceOrder`). See `command_handlers`.
- ``warm``: one `WarmCache`. ``commands``: ``warm_cache``.
- ``logs``: ``line 1`` to ``line 3`` to the log topic one by one, ``batch 1`` to ``batch 5`` to the batch log topic,
  flushed. Writes ``what`` = ``counts``, ``produced`` = 5, ``received`` = 5. ``lines``: three and five ``line`` lines.
"""

import sys
import uuid
from datetime import datetime

from keven_core.kafka.abstracts.delayed import DelayedCommandsAndEvents
from keven_core.kafka.commands import keven_dispatch_command, keven_dispatch_command_now
from keven_core.kafka.events.logger import (
    keven_dont_send_events_on_commit,
    keven_flush_event_cache,
    keven_log_event,
    keven_log_event_now,
    keven_send_events_on_commit,
)
from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger

from . import events
from .commands import ArchiveOrder, CancelOrder, PlaceOrder, PrintLabels, WarmCache
from .details import OrderLine, PackingDetail
from .names import BATCH_LOG_TOPIC, LOG_TOPIC
from .record import plain_name, record


def order(order_id):
    event = events.OrderPlaced(order_id, "Ada", order_id * 10, namespace="north")
    event.originator = "drive"
    return event


def send_ping():
    keven_log_event_now(events.Ping())


def send_orders():
    for order_id in (1, 2, 3):
        keven_log_event(order(order_id))
    for order_id in (1, 2):
        event = events.PaymentReceived()
        event.details.order_id = order_id
        event.details.amount = order_id * 10
        event.details.currency = "EUR"
        keven_log_event(event)
    event = events.OrderPacked()
    event.details = PackingDetail(1, [OrderLine("bolt", 2), OrderLine("nut", 3)], datetime(2020, 1, 2, 3, 4, 5))
    keven_log_event(event)
    keven_log_event_now(events.StockChanged("bolt", -5))


def send_commit():
    keven_send_events_on_commit()
    keven_log_event(order(11))
    keven_log_event(order(12))
    record("before commit")
    keven_flush_event_cache()
    keven_log_event_now(order(13))
    keven_dont_send_events_on_commit()
    keven_log_event(order(14))


def send_delayed():
    with DelayedCommandsAndEvents():
        keven_log_event(order(21))
        keven_log_event(order(22))


def send_audit():
    keven_log_event(events.LoginChecked(user_id=7))


def send_scan():
    for document_id, length in (("short", 100), ("long", 2 * 1024 * 1024)):
        event = events.DocumentScanned()
        event.details.document_id = document_id
        event.details.text = "x" * length
        keven_log_event(event)


def send_failures():
    for payment_id in ("p1", "p2"):
        event = events.PaymentBounced()
        event.details.payment_id = payment_id
        keven_log_event(event)
    event = events.OrderBroken()
    event.details.order_id = 9
    keven_log_event(event)


def send_commands():
    cancel = CancelOrder()
    cancel.details.order_id = 32
    cancel.details.reason = "changed my mind"
    archive = ArchiveOrder()
    archive.details.order_id = 33
    commands = [PlaceOrder(31, "Bob", 310, user_id=5), cancel, archive, PrintLabels(4), WarmCache()]
    for command in commands:
        command.set_uuid(str(uuid.uuid4()))
        record("dispatched", name=plain_name(command.command_name), uuid=str(command.get_uuid()))
    place, cancel, archive, print_labels, warm = commands
    keven_dispatch_command(place)
    keven_dispatch_command_now(cancel)
    archive.dispatch()
    print_labels.dispatch(now=True)
    keven_dispatch_command(warm)


def send_warm():
    keven_dispatch_command_now(WarmCache())


def send_logs():
    logger = KafkaLogger(topic=LOG_TOPIC)
    for number in (1, 2, 3):
        logger.log(f"line {number}".encode())
    batch_logger = KafkaBatchLogger(topic=BATCH_LOG_TOPIC)
    for number in (1, 2, 3, 4, 5):
        batch_logger.log(f"batch {number}".encode())
    batch_logger.flush()
    record("counts", produced=batch_logger.produced_count, received=batch_logger.received_count)


SCENARIOS = {
    "ping": send_ping,
    "orders": send_orders,
    "commit": send_commit,
    "delayed": send_delayed,
    "audit": send_audit,
    "scan": send_scan,
    "failures": send_failures,
    "commands": send_commands,
    "warm": send_warm,
    "logs": send_logs,
}


def main(arguments):
    if len(arguments) != 1 or arguments[0] not in SCENARIOS:
        sys.exit(f"usage: python -m sample_service.drive {'|'.join(SCENARIOS)}")
    (scenario,) = arguments
    SCENARIOS[scenario]()
    record("drive", scenario=scenario)


if __name__ == "__main__":
    main(sys.argv[1:])
