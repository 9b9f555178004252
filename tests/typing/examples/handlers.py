"""Handlers, hooks and decorators as services write them."""

import msgspec

from keven_core.kafka import Event, EventHandler, EventNames, current_record, event_handler
from keven_core.kafka.abstracts import event_handler as same_decorator
from keven_core.testing import dispatch


class OrderPlaced(Event):
    event_name = "ORDER_PLACED"
    order_id: int


class Price(msgspec.Struct):
    cents: int


class Sync(EventHandler):
    event_name = "ORDER_PLACED"

    def handle_event(self, event: OrderPlaced) -> None:
        reveal_type(event.order_id)  # R: int


class Async(EventHandler):
    event_name = EventNames.PRINT_EVENT

    async def handle_event(self, event: Event) -> None:
        record = current_record()
        reveal_type(record)  # R: keven_core._native.message.Record
        reveal_type(record.key)  # R: bytes | None
        reveal_type(record.headers)  # R: list[tuple[str, bytes | None]]
        reveal_type(record.header("trace"))  # R: bytes | None
        reveal_type(record.header("trace", b""))  # R: bytes | None
        record.offset = 5  # E: Property "offset" defined in "Record" is read-only  [misc]


class Foreign(EventHandler):
    topic = "shop.prices"
    value_type = Price
    codec = "json"

    def handle_event(self, event: Price) -> None: ...


@event_handler("ORDER_PLACED")
def on_order(event: OrderPlaced) -> int:
    return event.order_id


@same_decorator(topic="shop.raw")
async def on_raw(value: bytes) -> None: ...


reveal_type(on_order)  # R: def (event: handlers.OrderPlaced) -> int
reveal_type(on_raw)  # R: def (value: bytes) -> Coroutine[Any, Any, None]
reveal_type(EventHandler.events_with_handlers())  # R: list[str]
reveal_type(EventHandler.get_handler_count("ORDER_PLACED"))  # R: int
EventHandler.register_pre_handler_hook(lambda: None)
EventHandler.register_post_handler_hook(on_order)
EventHandler()  # E: Cannot instantiate abstract class "EventHandler" with abstract attribute "handle_event"  [abstract]

result = dispatch(OrderPlaced(order_id=1))
reveal_type(result.outcome)  # R: str
reveal_type(result.error)  # R: Exception | None
reveal_type(result.published[0].key)  # R: bytes | None
dispatch("ORDER_PLACED")  # E: Argument 1 to "dispatch" has incompatible type "str"; expected "Message | bytes"  [arg-type]
