"""Handlers of the shop's events, one of each style.

Lines (``what`` = ``handled``), one for each event received; ``type`` is the event's own class:

- ``ping``;
- ``send_invoice`` (class): ``order_id``, ``customer``, ``amount``, ``namespace``, ``originator``, ``has_uuid``,
  ``has_created``, ``command`` (uuid of the command that the event came of, or null). Then one `InvoiceSent` goes out,
  after the handler has ended, with ``invoice_id`` = ``inv-<order_id>``;
- ``count_order`` (``@event_handler``): ``order_id``. A second handler of the same event: both lines are there for
  each order, in either order;
- ``file_invoice`` (``EventHandler.register_function``): ``invoice_id``, ``order_id``, ``amount``;
- ``book_payment`` (``async def handle_event``): ``order_id``, ``amount``, ``currency``, ``in_loop`` = true;
- ``ship`` (class, nested details): ``order_id``, ``quantity``, ``lines`` (article and class of each), ``packed_at``;
- ``read_scan`` (`LongRunningEventHandler`): ``document_id``, ``length`` and ``first`` of the whole text wherever it
  lies, ``offloads``, ``thread`` = ``other``;
- ``change_stock`` (``@long_running_event_handler``): ``article``, ``change``, ``thread`` = ``other``;
- ``check_login`` (``@event_handler``, audit): ``user_id``, ``is_audit_event``;
- ``print_event``, ``test_event``: for the two names that the package brings.

``never_registered`` must not be seen: its class says ``auto_register = False``.

The hooks write ``what`` = ``hook`` with ``when`` = ``before`` or ``after``: at least one ``before`` line stands ahead
of the first line of a handler, at least one ``after`` line behind it.
"""

import asyncio

from keven_core.kafka.abstracts import long_running_event_handler
from keven_core.kafka.abstracts.event_handler import EventHandler, LongRunningEventHandler, event_handler
from keven_core.kafka.events.event import EventNames
from keven_core.kafka.events.logger import keven_log_event

from . import events
from .names import ShopEvents
from .record import handled, record, thread_kind


class SendInvoiceHandler(EventHandler):
    event_name = ShopEvents.ORDER_PLACED
    delay_commands_and_events = True

    def handle_event(self, event):
        keven_log_event(events.InvoiceSent(f"inv-{event.order_id}", event.order_id, event.amount))
        handled(
            "send_invoice",
            event,
            order_id=event.order_id,
            customer=event.customer,
            amount=event.amount,
            namespace=event.namespace,
            originator=event.originator,
            has_uuid=bool(event.uuid),
            has_created=bool(event.created),
            command=str(event.source_command_uuid) if event.source_command_uuid else None,
        )


@event_handler(ShopEvents.ORDER_PLACED)
def count_order(event):
    handled("count_order", event, order_id=event.order_id)


class NeverRegisteredHandler(EventHandler):
    event_name = ShopEvents.ORDER_PLACED
    auto_register = False

    def handle_event(self, event):
        handled("never_registered", event)


@event_handler(ShopEvents.PING)
def ping(event):
    handled("ping", event)


def file_invoice(event):
    details = event.details
    handled("file_invoice", event, invoice_id=details.invoice_id, order_id=details.order_id, amount=details.amount)


EventHandler.register_function(ShopEvents.INVOICE_SENT, file_invoice)


class BookPaymentHandler(EventHandler):
    event_name = ShopEvents.PAYMENT_RECEIVED

    async def handle_event(self, event):
        await asyncio.sleep(0)
        details = event.details
        handled(
            "book_payment",
            event,
            order_id=details.order_id,
            amount=details.amount,
            currency=details.currency,
            in_loop=asyncio.get_running_loop().is_running(),
        )


class ShipHandler(EventHandler):
    event_name = ShopEvents.ORDER_PACKED

    def handle_event(self, event):
        details = event.details
        handled(
            "ship",
            event,
            order_id=details.order_id,
            quantity=details.total_quantity(),
            lines=[[line.article, type(line).__name__] for line in details.lines],
            packed_at=details.packed_at.isoformat(),
        )


class ReadScanHandler(LongRunningEventHandler):
    event_name = ShopEvents.DOCUMENT_SCANNED

    def long_running_handle_event(self, event):
        details = event.details
        offloads = list(getattr(details, "offloads", None) or [])
        text = details.text
        if "text" in offloads:
            with open(text) as file:
                text = file.read()
        handled(
            "read_scan",
            event,
            document_id=details.document_id,
            length=len(text),
            first=text[:10],
            offloads=offloads,
            thread=thread_kind(),
        )


@long_running_event_handler(ShopEvents.STOCK_CHANGED)
def change_stock(event):
    handled("change_stock", event, article=event.article, change=event.change, thread=thread_kind())


@event_handler(ShopEvents.LOGIN_CHECKED)
def check_login(event):
    handled("check_login", event, user_id=event.user_id, is_audit_event=event.is_audit_event)


class PrintEventHandler(EventHandler):
    event_name = EventNames.PRINT_EVENT

    def handle_event(self, event):
        handled("print_event", event)


@event_handler(EventNames.TEST)
def test_event(event):
    handled("test_event", event)


def before():
    record("hook", when="before")


def after():
    record("hook", when="after")


EventHandler.register_pre_handler_hook(before)
EventHandler.register_post_handler_hook(after)
