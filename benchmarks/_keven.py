"""keven_core as a contestant: the server that a user runs, and the bare consumer under it."""

from __future__ import annotations

from typing import Any

from benchmarks._events import MIXED_NAMES, PARTITIONS, BenchEnd, BenchStart, OrderPlaced, make_event_class
from benchmarks._meter import Meter, peak_rss_mb, rss_mb
from keven_core.kafka.abstracts.event_handler import EventHandler
from keven_core.kafka.config import Settings
from keven_core.kafka.events.server import setup_event_listener
from keven_core.kafka.message import decoders_of

SERVER_NAME = "keven-bench"


def settings_of(spec: dict[str, Any]) -> Settings:
    """The settings of a round: the defaults, but for what the specification names."""
    return Settings(kafka_address=spec["address"], **spec.get("settings", {}))


def bare_options(spec: dict[str, Any], settings: Settings) -> dict[str, str]:
    """librdkafka's settings for a consumer that is given its partitions: no group, no commits."""
    return settings.consumer_options(
        spec["address"],
        "bench",
        spec["group"],
        max_poll_interval_s=180,
        session_timeout_s=6,
        heartbeat_interval_s=2,
        commit=False,
        partition_eof=False,
    )


def total(ledger: dict[tuple[str, int], dict[str, int]]) -> dict[str, int]:
    """The ledger of all partitions together."""
    sums: dict[str, int] = {}
    for counts in ledger.values():
        for key, count in counts.items():
            sums[key] = sums.get(key, 0) + count
    return sums


def register(spec: dict[str, Any]) -> None:
    """Register the no-op handlers of a round: for the measured event, for many, or for none."""
    if spec.get("protobuf"):
        from benchmarks import _envelope

        _envelope.register()
    names = spec.get("registered", ["ORDER_PLACED"])
    if isinstance(names, int):
        names = [*MIXED_NAMES, *(f"OTHER_EVENT_{index}" for index in range(names - len(MIXED_NAMES)))]
    for name in names:
        if name != OrderPlaced.event_name:
            make_event_class(name)
        if spec.get("is_async"):

            class AsyncHandler(EventHandler):
                event_name = name

                async def handle_event(self, event: Any) -> None:
                    pass
        else:

            class Handler(EventHandler):
                event_name = name

                def handle_event(self, event: Any) -> None:
                    pass


class Markers:
    """Handlers of the markers: they run the clock and end the server, or call `on_end` at the end of each pass."""

    def __init__(self, meter: Meter) -> None:
        self.server: Any = None
        self.counts: dict[str, int] = {}
        self.ended = 0
        self.on_end: Any = None
        markers = self

        class Start(EventHandler):
            event_name = BenchStart.event_name

            def handle_event(self, event: BenchStart) -> None:
                if not meter.running and not markers.ended:
                    meter.start()

        class End(EventHandler):
            event_name = BenchEnd.event_name

            def handle_event(self, event: BenchEnd) -> None:
                markers.ended += 1
                if markers.ended % PARTITIONS == 0:
                    meter.stop()
                    markers.counts = total(markers.server.io_server.ledger())
                    if markers.on_end is not None:
                        markers.on_end()
                    else:
                        markers.server.stop()


def handled(counts: dict[str, int]) -> int:
    """Events handled or skipped when the last marker is in hand: all but the other markers."""
    return counts["done"] + counts["skipped"] - (2 * PARTITIONS - 1)


def run_batches(spec: dict[str, Any]) -> dict[str, Any]:
    """A round of the server with a batch handler, which counts for itself: the markers may be handled earlier."""
    meter = Meter()
    done = 0

    class Batches(EventHandler):
        event_name = OrderPlaced.event_name
        batch_size = spec["batch_handler"]

        def handle_batch(self, events: list[Any]) -> None:
            nonlocal done
            if not done:
                meter.start()
            done += len(events)
            if done == spec["messages"]:
                meter.stop()
                server.stop()

    server = setup_event_listener(
        server_name=SERVER_NAME, group_id=spec["group"], topics=[spec["topic"]], settings=settings_of(spec)
    )
    server.start_sync()
    return {**meter.result(done), "done": done, "skipped": 0, "dead": 0}


def run_server(spec: dict[str, Any]) -> dict[str, Any]:
    """A round of the real server: group, background commits, dead-letter producer and all."""
    meter = Meter()
    register(spec)
    markers = Markers(meter)
    markers.server = setup_event_listener(
        server_name=SERVER_NAME, group_id=spec["group"], topics=[spec["topic"]], settings=settings_of(spec)
    )
    markers.server.start_sync()
    counts = markers.counts
    return {
        **meter.result(handled(counts)),
        "done": counts["done"],
        "skipped": counts["skipped"],
        "dead": counts["dead"],
    }


def run_raw(spec: dict[str, Any]) -> dict[str, Any]:
    """A round of the bare consumer: fetch, run, finish; no server, no group, no stored offsets."""
    from keven_core._native.consumer import Consumer
    from keven_core._native.dispatch import DispatchTable, Route

    meter = Meter()
    settings = settings_of(spec)
    handler = _NoOp().handle_event
    routes = []
    for cls in (OrderPlaced, BenchStart, BenchEnd):
        decode_json, decode_msgpack = decoders_of(cls)
        routes.append(Route(cls.event_name, handler, decode_json=decode_json, decode_msgpack=decode_msgpack))
    consumer = Consumer(
        bare_options(spec, settings), DispatchTable(routes), _fail, batch_size=settings.batch_size, store_offsets=False
    )
    consumer.assign([(spec["topic"], partition, 0) for partition in range(PARTITIONS)], manual=True)
    wanted = spec["messages"] + 2 * PARTITIONS
    fetch, run, finish = consumer.fetch, consumer.run, consumer.finish_batch
    got = 0
    while not got:
        got = fetch(100)
    meter.start()
    while True:
        run()
        finish()
        if got >= wanted:
            break
        got += fetch(100)
    meter.stop()
    counts = total(consumer.ledger())
    consumer.close()
    return meter.result(counts["done"] - 2 * PARTITIONS)


class _NoOp:
    def handle_event(self, event: Any) -> None:
        pass


def _fail(record: Any, stage: str, error: Exception) -> None:
    raise error


def run_soak(spec: dict[str, Any]) -> dict[str, Any]:
    """Read the topic `passes` times in one server and note the memory after each pass."""
    import threading

    meter = Meter()
    register(spec)
    markers = Markers(meter)
    passed = threading.Event()
    markers.on_end = passed.set
    server = setup_event_listener(
        server_name=SERVER_NAME, group_id=spec["group"], topics=[spec["topic"]], settings=settings_of(spec)
    )
    markers.server = server
    memory = []

    def again() -> None:
        for number in range(spec["passes"]):
            passed.wait()
            passed.clear()
            memory.append(rss_mb())
            if number + 1 < spec["passes"]:
                for partition in range(PARTITIONS):
                    server.io_server.seek(spec["topic"], partition, 0)
        server.stop()

    watcher = threading.Thread(target=again, daemon=True)
    watcher.start()
    server.start_sync()
    watcher.join()
    return {"memory": memory, "messages": markers.counts["done"], "peak_rss_mb": peak_rss_mb()}
