"""The shop's commands. Each of them but `WarmCache` is reported by a started and a completed (or errored) event."""

import json

from keven_core.kafka.commands import BasicDetail, Command, PickledCommand

from .details import CancelDetail
from .names import ShopCommands


class PlaceOrder(Command):
    command_name = ShopCommands.PLACE_ORDER

    def __init__(self, order_id=None, customer=None, amount=0, user_id=None):
        super().__init__()
        self.initiated_by_user_id = user_id
        self.order_id = order_id
        self.customer = customer
        self.amount = amount

    def serialize_payload(self):
        return json.dumps([self.order_id, self.customer, self.amount])

    def parse_payload(self, payload):
        self.order_id, self.customer, self.amount = json.loads(payload)


class PrintLabels(Command):
    command_name = ShopCommands.PRINT_LABELS

    def __init__(self, count=0):
        super().__init__()
        self.count = count

    def serialize_payload(self):
        return str(self.count)

    def parse_payload(self, payload):
        self.count = int(payload)


class WarmCache(Command):
    """Too frequent to be reported: no events are made of it."""

    command_name = ShopCommands.WARM_CACHE
    auto_create_command_events = False


class CancelOrder(PickledCommand):
    command_name = ShopCommands.CANCEL_ORDER
    detail_class = CancelDetail


class ArchiveOrder(PickledCommand):
    command_name = ShopCommands.ARCHIVE_ORDER
    detail_class = BasicDetail
