"""Other Python producers as contestants of benchmarks/produce.py.

Where there is a choice it is made in their favour: no callback for each message, unless the name says `counted`; what
arrived is counted at the broker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from confluent_kafka import Producer

from benchmarks._produce import (
    WARM_UP,
    Window,
    keep_in_flight,
    payloads,
    rdkafka_options,
    run_log,
    send_large,
    warm_up,
)

_FULL_WAIT_S = 0.01
_POLL_S = 0.05


def _sender(producer: Producer, topic: str, poll_every: int) -> Callable[[list[bytes]], None]:
    """A loop over produce() that serves delivery reports after every so many messages and while the queue is full."""

    def again(data: bytes) -> None:
        while True:
            producer.poll(_FULL_WAIT_S)
            with suppress(BufferError):
                return producer.produce(topic, data)

    def send(values: list[bytes]) -> None:
        produce, poll = producer.produce, producer.poll
        for at in range(0, len(values), poll_every):
            for data in values[at : at + poll_every]:
                try:
                    produce(topic, data)
                except BufferError:
                    again(data)
            poll(0)

    return send


def warm_producer(spec: dict[str, Any], **more: Any) -> Producer:
    producer = Producer({**rdkafka_options(spec), **more})
    warm_up(lambda data: producer.produce(spec["topic"], data), producer.flush)
    return producer


def run_cost(spec: dict[str, Any]) -> dict[str, Any]:
    """CPU of the thread that calls produce() and poll(0), in runs that fit the queue."""
    values = payloads(spec)
    producer = warm_producer(spec)
    send = _sender(producer, spec["topic"], spec["poll_every"])
    result = run_log(send, producer.flush, values, spec["run"])
    sent = len(values) + WARM_UP
    return {**result, "sent": sent, "delivered": sent - len(producer)}


def run_throughput(spec: dict[str, Any]) -> dict[str, Any]:
    """From the first produce() to the end of flush()."""
    values = payloads(spec)
    sent = len(values) + WARM_UP
    delivered = 0

    def count(error: Any, message: Any) -> None:
        nonlocal delivered
        delivered += error is None

    window = Window(spec)
    producer = warm_producer(spec, **({"on_delivery": count} if spec.get("counted") else {}))
    send = _sender(producer, spec["topic"], spec["poll_every"])
    window.start()
    send(values)
    left = producer.flush()
    window.stop()
    return {**window.result(len(values)), "sent": sent, "delivered": delivered if spec.get("counted") else sent - left}


def run_batches(spec: dict[str, Any]) -> dict[str, Any]:
    """produce_batch() of a dict for each message, made in the loop since there is no other way to give it bytes."""
    values = payloads(spec)
    sent = len(values) + WARM_UP
    size = spec["poll_every"]
    window = Window(spec)
    producer = warm_producer(spec)
    topic = spec["topic"]
    window.start()
    for at in range(0, len(values), size):
        batch = [{"value": data} for data in values[at : at + size]]
        while batch:
            producer.produce_batch(topic, batch)
            batch = [{"value": entry["value"]} for entry in batch if "_error" in entry]
            producer.poll(_FULL_WAIT_S if batch else 0)
    left = producer.flush()
    window.stop()
    return {**window.result(len(values)), "sent": sent, "delivered": sent - left}


def run_large(spec: dict[str, Any]) -> dict[str, Any]:
    """Memory that messages of 1 MB take."""
    producer = warm_producer(spec)
    send = _sender(producer, spec["topic"], 1)
    growth = send_large(lambda data: send([data]), producer.__len__, spec)
    left = producer.flush()
    sent = spec["count"] + WARM_UP
    return {**growth.result(), "sent": sent, "delivered": sent - left}


def run_aio(spec: dict[str, Any]) -> dict[str, Any]:
    """confluent-kafka's AIOProducer, on uvloop: messages from many tasks, each acknowledged before the next.

    With `poll`, a task of its own serves delivery reports; the AIOProducer itself does that only when it hands over a
    batch, and every 0.1 s.
    """
    import uvloop
    from confluent_kafka.aio import AIOProducer

    values = payloads(spec)
    window = Window(spec)

    async def main() -> None:
        producer = AIOProducer(
            dict(rdkafka_options(spec)), batch_size=spec["batch_size"], buffer_timeout=spec["buffer_timeout"]
        )
        topic = spec["topic"]

        async def send(data: bytes) -> None:
            await (await producer.produce(topic, value=data))

        async def serve() -> None:
            while True:
                await producer.poll(_POLL_S)

        server = asyncio.create_task(serve()) if spec.get("poll") else None
        await keep_in_flight(send, values[: len(values) // 20], spec["tasks"])
        window.start()
        await keep_in_flight(send, values, spec["tasks"])
        window.stop()
        if server is not None:
            server.cancel()
            with suppress(asyncio.CancelledError):
                await server
        await producer.close()

    uvloop.run(main())
    return {**window.result(len(values)), "sent": len(values) + len(values) // 20}


def run_aiokafka(spec: dict[str, Any]) -> dict[str, Any]:
    """aiokafka's send_and_wait(), on uvloop: messages from many tasks, each acknowledged before the next."""
    import uvloop
    from aiokafka import AIOKafkaProducer

    values = payloads(spec)
    window = Window(spec)

    async def main() -> None:
        producer = AIOKafkaProducer(
            bootstrap_servers=spec["address"],
            acks="all",
            enable_idempotence=True,
            linger_ms=spec["settings"]["linger_ms"],
            max_batch_size=spec["batch_bytes"],
        )
        await producer.start()
        topic = spec["topic"]

        async def send(data: bytes) -> None:
            await producer.send_and_wait(topic, data)

        await keep_in_flight(send, values[: len(values) // 20], spec["tasks"])
        window.start()
        await keep_in_flight(send, values, spec["tasks"])
        window.stop()
        await producer.stop()

    uvloop.run(main())
    return {**window.result(len(values)), "sent": len(values) + len(values) // 20}
