"""Events as services write them: what the type checker makes of them."""

from enum import Enum

from keven_core.kafka import Event, EventNames, GenericEvent
from keven_core.kafka.envelope import key_of
from keven_core.kafka.message import decoders_of


class OrderPlaced(Event):
    event_name = "ORDER_PLACED"
    key_field = "order_id"
    order_id: int
    customer: str = ""


class OrderPaid(OrderPlaced):
    event_name = EventNames.TEST
    amount: float  # required, after fields with defaults


class Names(str, Enum):
    SHIPPED = "ORDER_SHIPPED"


class OrderShipped(Event):
    event_name = Names.SHIPPED
    lines: list[int] = []

    def key(self) -> str:
        return str(len(self.lines))


event = OrderPlaced(order_id=5)
reveal_type(event)  # R: events.OrderPlaced
reveal_type(event.order_id)  # R: int
reveal_type(event.customer)  # R: str
reveal_type(event.created)  # R: datetime.datetime
reveal_type(event.source_command_uuid)  # R: str | None
reveal_type(event.is_audit_event)  # R: bool
reveal_type(event.event_name)  # R: str
reveal_type(OrderPlaced.key_field)  # R: str
reveal_type(event.serialize())  # R: bytes
reveal_type(key_of(event))  # R: bytes | None
reveal_type(EventNames.PRINT_EVENT.value)  # R: Literal['PRINT_EVENT']?
reveal_type(Event.classes)  # R: dict[str, type[keven_core.kafka.events.event.Event]]
reveal_type(GenericEvent().fields)  # R: dict[str, Any]
reveal_type(decoders_of(OrderPlaced)[0](b""))  # R: Any

OrderPaid(order_id=5, amount=1.5, namespace="shop")
OrderShipped()
OrderPlaced()  # E: Missing named argument "order_id" for "OrderPlaced"  [call-arg]
OrderPlaced("x", order_id=5)  # E: Too many positional arguments for "OrderPlaced"  [call-arg]
OrderPlaced(order_id="5")  # E: Argument "order_id" to "OrderPlaced" has incompatible type "str"; expected "int"  [arg-type]
OrderPlaced(order_id=5, costumer="Ada")  # E: Unexpected keyword argument "costumer" for "OrderPlaced"  [call-arg]
event.order_id = "x"  # E: Incompatible types in assignment (expression has type "str", variable has type "int")  [assignment]
event.total  # E: "OrderPlaced" has no attribute "total"  [attr-defined]


class Wrong(Event):
    event_name = 5  # E: Incompatible types in assignment (expression has type "int", base class "Event" defined the type as "str")  [assignment]
