"""What pickled events and commands carry: plain classes, and `BasicDetail` of the package.

`PackingDetail` is the demanding one: a plain class that holds a list of another plain class and a `datetime`. A handler
gets objects of the same classes back, not dicts and strings.
"""

from keven_core.kafka.commands import BasicDetail


class PaymentDetail(BasicDetail):
    order_id = None
    amount = 0
    currency = "EUR"


class CancelDetail(BasicDetail):
    order_id = None
    reason = ""


class InvoiceDetail:
    def __init__(self, invoice_id=None, order_id=None, amount=0):
        self.invoice_id = invoice_id
        self.order_id = order_id
        self.amount = amount


class OrderLine:
    def __init__(self, article=None, quantity=0):
        self.article = article
        self.quantity = quantity


class PackingDetail:
    def __init__(self, order_id=None, lines=None, packed_at=None):
        self.order_id = order_id
        self.lines = lines or []
        self.packed_at = packed_at

    def total_quantity(self):
        return sum(line.quantity for line in self.lines)


class ScanDetail:
    def __init__(self, document_id=None, text=""):
        self.document_id = document_id
        self.text = text
