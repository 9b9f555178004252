"""Decode and dispatch over prepared batches, look-up, log(): each as a ratio to plain Python."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks._events import OrderPlaced, values
from benchmarks.micro import _plain, _ratios
from keven_core._native.consumer import Consumer
from keven_core._native.dispatch import DispatchTable, Route
from keven_core._native.producer import DeliveryAccount, Producer
from keven_core.kafka.config import Settings
from keven_core.kafka.details import BasicDetail
from keven_core.kafka.events.event import Event, PickledEvent
from keven_core.kafka.logger import KafkaBatchLogger
from keven_core.kafka.message import decoders_of
from keven_core.testing.embedded import EmbeddedKafka

BATCH = 1000
# Batches on the topic, read from the start again when they are through: the embedded Kafka keeps 5 MB a partition.
BATCHES = 15
pytestmark = pytest.mark.benchmark(timer=_ratios.clock, disable_gc=True, warmup=False)


class Handler:
    def handle_event(self, event: Any) -> None:
        pass


handle = Handler().handle_event
decode_json, decode_msgpack = decoders_of(OrderPlaced)


def route(name: str) -> Route:
    return Route(name, handle, decode_json=decode_json, decode_msgpack=decode_msgpack)


class Batches:
    """Batches of a topic on the embedded Kafka, a fresh one for every round."""

    def __init__(self, kafka: EmbeddedKafka, kind: str, table: DispatchTable) -> None:
        self.topic = f"micro-{kind}"
        self.values = [value for _, value in values(kind, BATCH)]
        settings = Settings(kafka_address=kafka.bootstrap_servers)
        self._fill(kafka, settings)
        options = settings.consumer_options(
            kafka.bootstrap_servers,
            "micro",
            f"micro-{kind}",
            max_poll_interval_s=180,
            session_timeout_s=6,
            heartbeat_interval_s=2,
            commit=False,
            partition_eof=False,
        )
        self.consumer = Consumer(options, table, self._fail, batch_size=BATCH, store_offsets=False)
        self.left = 0

    def _fill(self, kafka: EmbeddedKafka, settings: Settings) -> None:
        try:
            kafka.create_topic(self.topic, 1)
        except Exception:  # another test has made and filled it
            return
        producer = Producer(settings.producer_options(kafka.bootstrap_servers, "micro", linger_ms=5))
        account = DeliveryAccount()
        for value in self.values * BATCHES:
            producer.produce(self.topic, value, account, partition=0)
        assert producer.wait(account, 10)
        producer.close()

    @staticmethod
    def _fail(record: Any, stage: str, error: Exception) -> None:
        raise error

    def prepare(self) -> None:
        """Have a whole batch in hand, nothing of it handled."""
        self.consumer.finish_batch()
        if not self.left:
            self.consumer.assign([(self.topic, 0, 0)], manual=True)
            self.left = BATCHES
        self.left -= 1
        deadline = time.monotonic() + 10
        count = 0
        while count < BATCH:
            count = self.consumer.top_up() if count else self.consumer.fetch(100)
            assert time.monotonic() < deadline, f"{count} of {BATCH} messages came"


@pytest.fixture(params=["json", "spaces", "msgpack"])
def batches(request: pytest.FixtureRequest, kafka: EmbeddedKafka) -> Iterator[Batches]:
    found = Batches(kafka, request.param, DispatchTable([route("ORDER_PLACED")]))
    yield found
    found.consumer.close()


@pytest.fixture
def unhandled(kafka: EmbeddedKafka) -> Iterator[Batches]:
    found = Batches(kafka, "json", DispatchTable([route("OTHER_EVENT")]))
    yield found
    found.consumer.close()


def test_decode_and_dispatch(pair: _ratios.Pair, batches: Batches) -> None:
    decode = decode_msgpack if batches.topic.endswith("msgpack") else decode_json
    pair(
        batches.consumer.run,
        lambda: _plain.decode_and_handle(batches.values, decode, handle),
        setup=batches.prepare,
    )


def test_skip(pair: _ratios.Pair, unhandled: Batches) -> None:
    pair(
        unhandled.consumer.run,
        lambda: _plain.decode_and_handle(unhandled.values, decode_json, handle),
        setup=unhandled.prepare,
    )


@pytest.mark.parametrize("registered", [10, 1000])
def test_look_up(pair: _ratios.Pair, registered: int) -> None:
    # The value names an event that nobody handles, so resolve() identifies it, looks it up and is done.
    data = [value for _, value in values("json", BATCH)]
    table = DispatchTable([route(f"EVENT_{index}") for index in range(registered)])
    routes = {f"EVENT_{index}".encode(): index for index in range(registered)}
    resolve = table.resolve

    def look_up() -> None:
        for value in data:
            resolve(value)

    pair(look_up, lambda: _plain.look_up(data, routes))


def test_log(pair: _ratios.Pair, kafka: EmbeddedKafka) -> None:
    kafka.create_topic("micro-log", 1)
    data = [value for _, value in values("json", BATCH)]
    plain = _plain.PlainLogger("micro-log")

    def log_plain() -> None:
        log = plain.log
        for value in data:
            log(value)

    with KafkaBatchLogger(topic="micro-log", settings=Settings(kafka_address=kafka.bootstrap_servers)) as logger:

        def log_all() -> None:
            log = logger.log
            for value in data:
                log(value)

        def setup() -> None:
            logger.flush()
            plain.queue.clear()

        pair(log_all, log_plain, setup=setup)


class OldByHand(Event):
    event_name = "MICRO_BY_HAND"

    def __init__(self, order_id: Any = None) -> None:
        super().__init__()
        self.order_id = order_id

    def serialize_payload(self) -> str:
        return str(self.order_id)

    def parse_payload(self, payload: Any) -> None:
        self.order_id = payload


class OldPickled(PickledEvent):
    event_name = "MICRO_PICKLED"


def old_style(kind: str) -> Event:
    """An old-style event with what the typed one has, and the least code that a service can have."""
    order = typed_order()
    made = OldByHand(order.order_id) if kind == "by_hand" else OldPickled(BasicDetail(**own_fields(order)))
    for name in Event.__struct_fields__:
        setattr(made, name, getattr(order, name))
    return made


def typed_order() -> OrderPlaced:
    [(_, value)] = values("json", 1)
    order: OrderPlaced = decode_json(value)
    return order


def own_fields(order: OrderPlaced) -> dict[str, Any]:
    return {name: getattr(order, name) for name in order.__struct_fields__ if name not in Event.__struct_fields__}


@pytest.mark.parametrize("codec", ["json", "msgpack"])
@pytest.mark.parametrize("kind", ["by_hand", "pickled"])
def test_old_style_to_typed(pair: _ratios.Pair, kind: str, codec: str) -> None:
    old, typed = old_style(kind), typed_order()
    data, typed_data = [old.serialize(codec)] * BATCH, [typed.serialize(codec)] * BATCH
    decode_old, decode_typed = (decoders_of(type(event))[codec == "msgpack"] for event in (old, typed))
    pair(
        lambda: _plain.decode_and_handle(data, decode_old, handle),
        lambda: _plain.decode_and_handle(typed_data, decode_typed, handle),
        limit=3.0,
    )
