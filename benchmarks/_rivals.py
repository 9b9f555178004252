"""Other Python clients as contestants: the same topic, the same msgspec decoder, the same no-op handler.

Where there is a choice it is made in their favour: no error check per message, offsets stored by the client itself when
it hands messages out (at most once), no log line, nothing counted per message.
"""

from __future__ import annotations

from typing import Any

import msgspec
from confluent_kafka import Consumer

from benchmarks._events import PARTITIONS, BenchEnd, BenchStart, OrderPlaced
from benchmarks._meter import Meter
from keven_core.kafka.config import Settings
from keven_core.kafka.message import decoders_of


class _Handler:
    def handle_event(self, event: Any) -> None:
        pass


class _AsyncHandler:
    async def handle_event(self, event: Any) -> None:
        pass


def options_of(spec: dict[str, Any]) -> dict[str, Any]:
    """librdkafka's settings of a round: keven_core's own fetch settings, or librdkafka's defaults."""
    if spec.get("defaults"):
        return {"bootstrap.servers": spec["address"], "group.id": spec["group"], "auto.offset.reset": "earliest"}
    settings = Settings(kafka_address=spec["address"], **spec.get("settings", {}))
    return dict(
        settings.consumer_options(
            spec["address"],
            "bench",
            spec["group"],
            max_poll_interval_s=180,
            session_timeout_s=6,
            heartbeat_interval_s=2,
            commit=True,
            partition_eof=False,
        )
    )


def _ignore(value: Any) -> None:
    return None


def by_header() -> dict[bytes, tuple[Any, Any]]:
    """Decoder and handler by the value of the header `event_name`."""
    return {
        OrderPlaced.event_name.encode(): (decoders_of(OrderPlaced)[0], _Handler().handle_event),
        BenchStart.event_name.encode(): (_ignore, _ignore),
        BenchEnd.event_name.encode(): (_ignore, _ignore),
    }


def run_consume(spec: dict[str, Any]) -> dict[str, Any]:
    """confluent-kafka's consume() in a loop, with or without reading the header."""
    consumer = Consumer(options_of(spec))
    consumer.subscribe([spec["topic"]])
    wanted = spec.get("stop_after") or spec["messages"] + 2 * PARTITIONS
    batch_size = spec["batch_size"]
    decode, handle, table = decoders_of(OrderPlaced)[0], _Handler().handle_event, by_header()
    refused = msgspec.ValidationError
    meter = Meter()
    got = markers = 0
    while got < wanted:
        # Never more than what is left: consume() waits for a full batch.
        batch = consumer.consume(min(batch_size, wanted - got), 1.0)
        if not meter.running:
            if not batch:
                continue
            meter.start()
        got += len(batch)
        if spec["headers"]:
            for message in batch:
                decode, handle = table[message.headers()[0][1]]
                handle(decode(message.value()))
        else:
            for message in batch:
                try:
                    handle(decode(message.value()))
                except refused:
                    markers += 1
    meter.stop()
    consumer.close()
    return meter.result(spec["messages"] if not spec.get("stop_after") else got)


def run_aio(spec: dict[str, Any]) -> dict[str, Any]:
    """confluent-kafka's AIOConsumer.consume() in a loop, on uvloop, with an `async def` handler."""
    import uvloop
    from confluent_kafka.aio import AIOConsumer

    async def main() -> dict[str, Any]:
        consumer = AIOConsumer(options_of(spec), max_workers=2)
        await consumer.subscribe([spec["topic"]])
        wanted = spec.get("stop_after") or spec["messages"] + 2 * PARTITIONS
        batch_size = spec["batch_size"]
        decode, handle = decoders_of(OrderPlaced)[0], _AsyncHandler().handle_event
        refused = msgspec.ValidationError
        meter = Meter()
        got = markers = 0
        while got < wanted:
            batch = await consumer.consume(min(batch_size, wanted - got), 1.0)
            if not meter.running:
                if not batch:
                    continue
                meter.start()
            got += len(batch)
            for message in batch:
                try:
                    await handle(decode(message.value()))
                except refused:
                    markers += 1
        meter.stop()
        await consumer.close()
        return meter.result(spec["messages"] if not spec.get("stop_after") else got)

    return uvloop.run(main())  # type: ignore[no-any-return]


def run_aiokafka(spec: dict[str, Any]) -> dict[str, Any]:
    """aiokafka's getmany() in a loop, on uvloop, with an `async def` handler."""
    import uvloop
    from aiokafka import AIOKafkaConsumer

    async def main() -> dict[str, Any]:
        consumer = AIOKafkaConsumer(
            spec["topic"],
            bootstrap_servers=spec["address"],
            group_id=spec["group"],
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=1 << 20,
            fetch_max_bytes=4 << 20,
        )
        await consumer.start()
        wanted = spec["messages"] + 2 * PARTITIONS
        decode, handle = decoders_of(OrderPlaced)[0], _AsyncHandler().handle_event
        refused = msgspec.ValidationError
        meter = Meter()
        got = markers = 0
        while got < wanted:
            batches = await consumer.getmany(timeout_ms=1000, max_records=spec["batch_size"])
            if not meter.running:
                if not batches:
                    continue
                meter.start()
            for batch in batches.values():
                got += len(batch)
                for message in batch:
                    try:
                        await handle(decode(message.value))
                    except refused:
                        markers += 1
        meter.stop()
        await consumer.stop()
        return meter.result(spec["messages"])

    return uvloop.run(main())  # type: ignore[no-any-return]
