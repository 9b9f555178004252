"""Old and new services on one topic of a real Kafka, while they move from a protobuf envelope to JSON."""

from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import Producer
from envelopes import envelope_class
from real_services import direct_address, read_topic

from keven_core.kafka import (
    Event,
    KafkaBatchLogger,
    KafkaConsumerServer,
    ProtobufEnvelopeCodec,
    Settings,
    event_handler,
    register_codec,
)
from keven_core.kafka.events.runner import EventRunner

pytestmark = pytest.mark.real_kafka

COUNT = 300


def test_both_ways(kafka: Any, make_topic: Callable[..., str], handler_registry: Any) -> None:
    class OrderPlaced(Event):
        event_name = "ORDER_PLACED"
        order_id: int

    envelope = envelope_class()
    register_codec(ProtobufEnvelopeCodec(envelope))
    address, topic = direct_address(kafka), make_topic(2)
    # The old producer, by turns with new ones of each format.
    old = Producer({"bootstrap.servers": address})
    for number in range(0, COUNT, 4):
        value = envelope(name="ORDER_PLACED", uuid=f"u-{number}", payload=b'{"order_id":%d}' % number)
        old.produce(topic, value.SerializeToString(), headers={"content-type": "application/x-protobuf"})
    assert old.flush(30) == 0
    for remainder, codec in enumerate(("json", "msgpack", "protobuf"), 1):
        settings = Settings(kafka_address=address, codec=codec)
        with KafkaBatchLogger(topic=topic, settings=settings) as log:
            for number in range(remainder, COUNT, 4):
                log.log(OrderPlaced(order_id=number, uuid=f"u-{number}"), topic=topic)
    # The new consumer reads them all.
    got: list[tuple[int, str]] = []
    event_handler("ORDER_PLACED")(lambda event: got.append((event.order_id, event.uuid)))
    server = KafkaConsumerServer(
        topic,
        client_id=topic,
        runners=[EventRunner()],
        settings=Settings(kafka_address=address),
        start="earliest",
        until_end=True,
    )
    server.start_sync()
    assert sorted(got) == [(number, f"u-{number}") for number in range(COUNT)]
    assert sum(entry["done"] for entry in server.ledger().values()) == COUNT
    # The old consumer reads those of the old producer and of the new one that writes its format.
    read = [message.value() for message in read_topic(address, topic)]
    known = [envelope.FromString(value) for value in read if value and value.startswith(b"\n\x0cORDER_PLACED")]
    assert sorted(int(entry.uuid[2:]) for entry in known) == [n for n in range(COUNT) if n % 4 in (0, 3)]
    assert all(entry.payload == b'{"order_id":%d}' % int(entry.uuid[2:]) for entry in known)
