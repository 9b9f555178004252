"""Old-style events end to end: written by the loggers, read by servers, handled, dead-lettered."""

from typing import Any

import msgspec
import pytest
from embedded_support import DEAD, MODES, quick, reading_server, run, topics, values

from keven_core.kafka.abstracts.event_handler import EventHandler, event_handler
from keven_core.kafka.details import BasicDetail
from keven_core.kafka.events.event import Event, PickledEvent
from keven_core.kafka.events.publisher import EventPublisher
from keven_core.kafka.events.runner import EventRunner
from keven_core.kafka.logger import KafkaBatchLogger

pytestmark = pytest.mark.usefixtures("handler_registry")


class Line:
    def __init__(self, article: Any = None) -> None:
        self.article = article


class Packing:
    def __init__(self, lines: Any = None) -> None:
        self.lines = lines or []


def define() -> tuple[Any, Any]:
    class OrderPlaced(Event):
        event_name = "ORDER_PLACED"

        def __init__(self, order_id: Any = None, **envelope: Any) -> None:
            super().__init__(**envelope)
            self.order_id = order_id

        def serialize_payload(self) -> str:
            return str(self.order_id)

        def parse_payload(self, payload: Any) -> None:
            self.order_id = int(payload)

    class OrderPacked(PickledEvent):
        event_name = "ORDER_PACKED"
        detail_class = Packing
        large_attributes = ["note"]

    return OrderPlaced, OrderPacked


@MODES
@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_events_reach_their_handlers_as_their_classes(
    embedded_kafka: Any, mode: str, codec: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEVEN_LARGE_ATTRIBUTE_DIR", str(tmp_path))
    order, packed = define()
    names = ["keven_events_order_placed", "keven_events_order_packed", "keven_events"]
    topics(embedded_kafka, *names)
    seen: list[Any] = []

    class PlacedHandler(EventHandler):
        event_name = "ORDER_PLACED"

        async def handle_event(self, event: Any) -> None:
            seen.append((type(event), event.order_id, event.namespace))

    @event_handler("ORDER_PACKED")
    def pack(event: Any) -> None:
        with open(event.details.note) as file:
            seen.append((type(event), [(type(line), line.article) for line in event.details.lines], len(file.read())))

    with KafkaBatchLogger(settings=quick(embedded_kafka, codec=codec)) as logger:
        publisher = EventPublisher(logger)
        for number in range(3):
            publisher.log_event(order(number, namespace="north"))
        event = packed()
        event.details = Packing([Line("bolt"), Line("nut")])
        event.details.note = "x" * (1 << 21)
        publisher.log_event(event)
        publisher.log_event(order(3), topic="keven_events")
    run(reading_server(embedded_kafka, names, [EventRunner(None, None)]), mode)
    assert [entry for entry in seen if entry[0] is order and entry[2]] == [
        (order, number, "north") for number in range(3)
    ]
    assert (order, 3, "") in seen
    assert (packed, [(Line, "bolt"), (Line, "nut")], 1 << 21) in seen
    assert len(seen) == 5


@pytest.mark.logs_errors
@MODES
def test_what_cant_be_parsed_is_dead_lettered_and_the_rest_goes_on(embedded_kafka: Any, mode: str) -> None:
    order, _ = define()
    topics(embedded_kafka, "keven_events_order_placed")
    seen: list[Any] = []
    event_handler("ORDER_PLACED")(lambda event: seen.append(event.order_id))
    bad = msgspec.json.encode({"event_name": "ORDER_PLACED", "payload": "no number"})
    with KafkaBatchLogger(settings=quick(embedded_kafka), topic="keven_events_order_placed") as logger:
        for value in (order(1).serialize(), bad, order(2).serialize("msgpack")):
            logger.log(value)
    run(reading_server(embedded_kafka, "keven_events_order_placed", [EventRunner(None, None)]), mode)
    assert seen == [1, 2]
    assert values(embedded_kafka, DEAD) == [bad]


def test_details_without_a_class_of_their_own(embedded_kafka: Any) -> None:
    class Paid(PickledEvent):
        event_name = "PAID"
        detail_class = BasicDetail

    topics(embedded_kafka, "keven_events_paid")
    seen: list[Any] = []
    event_handler("PAID")(seen.append)
    paid = Paid()
    paid.details.order_id = 5
    with KafkaBatchLogger(settings=quick(embedded_kafka)) as logger:
        logger.log(paid)
    run(reading_server(embedded_kafka, "keven_events_paid", [EventRunner(None, None)]), "sync")
    assert [event.details for event in seen] == [BasicDetail(order_id=5)]
    assert seen[0].uuid == paid.uuid
