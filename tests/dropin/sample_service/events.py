"""The shop's events.

Three ages of style: payload by hand (`Ping`, `OrderPlaced`, `StockChanged`, `LoginChecked`), pickled with details
that are filled in later (`PaymentReceived`, `PaymentBounced`, `OrderBroken`, `OrderPacked`, `DocumentScanned`), and
pickled with an ``__init__`` that fills them in (`InvoiceSent`).
"""

import json

from keven_core.kafka.commands import BasicDetail
from keven_core.kafka.events.event import Event, PickledEvent

from .details import InvoiceDetail, PackingDetail, PaymentDetail, ScanDetail
from .names import ShopEvents


class Ping(Event):
    """Sent until a worker that was just started answers: its first ``ping`` line says that it is there."""

    event_name = ShopEvents.PING


class OrderPlaced(Event):
    """An order came in. ``namespace`` is the branch of the shop, and goes through to the handlers."""

    event_name = ShopEvents.ORDER_PLACED
    namespaces = ["north", "south"]

    def __init__(self, order_id=None, customer=None, amount=0, **kwargs):
        super().__init__(**kwargs)
        self.order_id = order_id
        self.customer = customer
        self.amount = amount

    def serialize_payload(self):
        return json.dumps({"order_id": self.order_id, "customer": self.customer, "amount": self.amount})

    def parse_payload(self, payload):
        values = json.loads(payload)
        self.order_id = values["order_id"]
        self.customer = values["customer"]
        self.amount = values["amount"]


class StockChanged(Event):
    event_name = ShopEvents.STOCK_CHANGED

    def __init__(self, article=None, change=0):
        super().__init__()
        self.article = article
        self.change = change

    def serialize_payload(self):
        return f"{self.article}:{self.change}"

    def parse_payload(self, payload):
        if isinstance(payload, bytes):
            payload = payload.decode()
        article, change = payload.split(":")
        self.article = article
        self.change = int(change)


class LoginChecked(Event):
    """The audit event: goes to ``keven_events.audit``."""

    event_name = ShopEvents.LOGIN_CHECKED

    def __init__(self, user_id=None):
        super().__init__()
        self.is_audit_event = True
        self.user_id = user_id

    def serialize_payload(self):
        return json.dumps({"user_id": self.user_id})

    def parse_payload(self, payload):
        self.user_id = json.loads(payload)["user_id"]


class PaymentReceived(PickledEvent):
    event_name = ShopEvents.PAYMENT_RECEIVED
    detail_class = PaymentDetail


class PaymentBounced(PickledEvent):
    event_name = ShopEvents.PAYMENT_BOUNCED
    detail_class = BasicDetail


class OrderBroken(PickledEvent):
    event_name = ShopEvents.ORDER_BROKEN
    detail_class = BasicDetail


class OrderPacked(PickledEvent):
    event_name = ShopEvents.ORDER_PACKED
    detail_class = PackingDetail


class DocumentScanned(PickledEvent):
    """Carries a text that is put into a file when it is longer than 1 MiB."""

    event_name = ShopEvents.DOCUMENT_SCANNED
    detail_class = ScanDetail
    large_attributes = ["text"]


class InvoiceSent(PickledEvent):
    event_name = ShopEvents.INVOICE_SENT
    detail_class = InvoiceDetail

    def __init__(self, invoice_id=None, order_id=None, amount=0):
        super().__init__()
        self.details = InvoiceDetail(invoice_id=invoice_id, order_id=order_id, amount=amount)
