"""The processes of benchmarks/latency.py: the paced producer, the consumers that note delays, the idle servers."""

from __future__ import annotations

import sys
import threading
import time
from array import array
from collections.abc import Callable
from typing import Any

import msgspec

from benchmarks._events import PARTITIONS, BenchEnd
from benchmarks._keven import SERVER_NAME, settings_of
from benchmarks._meter import now_ns, summary
from benchmarks._rivals import options_of
from keven_core.kafka.abstracts.event_handler import EventHandler
from keven_core.kafka.events.event import Event
from keven_core.kafka.events.server import setup_event_listener
from keven_core.kafka.message import decoders_of


class Timed(Event):
    """An event that says when it was produced."""

    event_name = "TIMED"
    sent_ns: int
    customer: str = ""


def say(word: str) -> None:
    """Tell the parent process how far this one is."""
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


def pace(spec: dict[str, Any]) -> dict[str, Any]:
    """Produce `rate` messages a second, evenly, for `seconds`; then the end markers."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": spec["address"], "linger.ms": 0, "acks": 1, "socket.nagle.disable": True})
    encode = msgspec.json.encode
    headers = [("event_name", b"TIMED")]
    gap_ns = 1_000_000_000 // spec["rate"]
    count = int(spec["rate"] * spec["seconds"])
    event = Timed(sent_ns=0, originator="bench-service", customer="Customer abc")
    worst = 0
    due = now_ns() + 100_000_000
    for index in range(count):
        left = due - now_ns()
        if left > 0:
            time.sleep(left / 1e9)
        event.sent_ns = now_ns()
        worst = max(worst, event.sent_ns - due)
        producer.produce(spec["topic"], encode(event), partition=index % PARTITIONS, headers=headers)
        producer.poll(0)
        due += gap_ns
    producer.flush()
    for partition in range(PARTITIONS):
        producer.produce(spec["topic"], BenchEnd().serialize(), partition=partition)
    producer.flush()
    return {"messages": count, "worst_delay_ms": worst / 1e6}


def _server(spec: dict[str, Any], on_assigned: Callable[[], None]) -> Any:
    def assigned(server: Any, partitions: list[Any]) -> None:
        on_assigned()

    return setup_event_listener(
        server_name=SERVER_NAME,
        group_id=spec["group"],
        topics=[spec["topic"]],
        settings=settings_of(spec),
        start="latest",
        on_assign_topics=assigned,
    )


def run_server(spec: dict[str, Any]) -> dict[str, Any]:
    """A keven_core server whose handler notes how old each event is; sync, or async with `is_async`."""
    delays = array("q")
    ended = 0
    server: Any = None

    def end() -> None:
        nonlocal ended
        ended += 1
        if ended == PARTITIONS:
            server.stop()

    if spec.get("is_async"):

        class AsyncNote(EventHandler):
            event_name = Timed.event_name

            async def handle_event(self, event: Timed) -> None:
                delays.append(now_ns() - event.sent_ns)
    else:

        class Note(EventHandler):
            event_name = Timed.event_name

            def handle_event(self, event: Timed) -> None:
                delays.append(now_ns() - event.sent_ns)

    class End(EventHandler):
        event_name = BenchEnd.event_name

        def handle_event(self, event: BenchEnd) -> None:
            end()

    server = _server(spec, lambda: say("ready"))
    cpu = time.process_time()
    server.start_sync()
    return {**summary(delays, spec), "cpu_share": (time.process_time() - cpu) / spec["seconds"]}


def run_poll(spec: dict[str, Any]) -> dict[str, Any]:
    """A confluent poll() loop: the same decoder, the same note."""
    from confluent_kafka import Consumer

    delays = array("q")
    consumer = Consumer({**options_of(spec), "auto.offset.reset": "latest"})
    consumer.subscribe([spec["topic"]])
    while len(consumer.assignment()) < PARTITIONS:
        consumer.poll(0.1)
    # "Latest" is resolved by the first fetch: make sure of it before the producer starts.
    for partition in consumer.assignment():
        partition.offset = consumer.get_watermark_offsets(partition)[1]
        consumer.seek(partition)
    say("ready")
    decode = decoders_of(Timed)[0]
    ended = 0
    cpu = time.process_time()
    while ended < PARTITIONS:
        message = consumer.poll(1.0)
        if message is None:
            continue
        try:
            event = decode(message.value())
        except msgspec.ValidationError:
            ended += 1
            continue
        delays.append(now_ns() - event.sent_ns)
    cpu = time.process_time() - cpu
    consumer.close()
    return {**summary(delays, spec), "cpu_share": cpu / spec["seconds"]}


def run_idle(spec: dict[str, Any]) -> dict[str, Any]:
    """A server with nothing to do: the share of a core that it takes over `seconds`."""
    if spec.get("is_async"):

        class AsyncHandler(EventHandler):
            event_name = Timed.event_name

            async def handle_event(self, event: Timed) -> None:
                pass
    else:

        class Handler(EventHandler):
            event_name = Timed.event_name

            def handle_event(self, event: Timed) -> None:
                pass

    found: dict[str, Any] = {}
    ready = threading.Event()
    server = _server(spec, ready.set)

    def watch() -> None:
        ready.wait(30)
        time.sleep(2)
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(spec["seconds"])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        found["core_percent"] = cpu / wall * 100
        server.stop()

    watcher = threading.Thread(target=watch)
    watcher.start()
    server.start_sync()
    watcher.join()
    return found
