"""Names of the shop's own events and commands: enums of its own beside `EventNames` and `CommandNames`.

The topics are ``keven_events_<name in lower case>`` and ``keven_commands_<name in lower case>``.
"""

from enum import Enum


class ShopEvents(str, Enum):
    PING = "PING"
    ORDER_PLACED = "ORDER_PLACED"
    ORDER_PACKED = "ORDER_PACKED"
    ORDER_BROKEN = "ORDER_BROKEN"
    PAYMENT_RECEIVED = "PAYMENT_RECEIVED"
    PAYMENT_BOUNCED = "PAYMENT_BOUNCED"
    INVOICE_SENT = "INVOICE_SENT"
    DOCUMENT_SCANNED = "DOCUMENT_SCANNED"
    STOCK_CHANGED = "STOCK_CHANGED"
    LOGIN_CHECKED = "LOGIN_CHECKED"


class ShopCommands(str, Enum):
    PLACE_ORDER = "PLACE_ORDER"
    CANCEL_ORDER = "CANCEL_ORDER"
    ARCHIVE_ORDER = "ARCHIVE_ORDER"
    PRINT_LABELS = "PRINT_LABELS"
    WARM_CACHE = "WARM_CACHE"


def event_topic(name):
    return f"keven_events_{name.value.lower()}"


LOG_TOPIC = "shop_log"
BATCH_LOG_TOPIC = "shop_batch_log"
