"""Contestants of benchmarks/retrying.py: servers of which some records fail and are tried again."""

from __future__ import annotations

import asyncio
from time import perf_counter_ns
from typing import Any

from benchmarks._events import PARTITIONS, BenchEnd, BenchStart, OrderPlaced
from benchmarks._in_flight import PAUSE_S
from benchmarks._keven import settings_of
from benchmarks._meter import Meter


class _Fails(Exception):
    pass


def run_server(spec: dict[str, Any]) -> dict[str, Any]:
    """A server whose handlers raise for every `fails_every`-th event, the first time that they see it; 0: for none.

    Counts the good ones: those that are handled the first time. Async handlers await 1 ms, others work for `work_us`.
    """
    from keven_core.kafka import EventHandler, setup_event_listener

    meter = Meter()
    fails_every = spec["fails_every"] or 1 << 62
    wanted = spec["messages"] - spec["messages"] // fails_every
    good = ended = 0
    failed: set[int] = set()

    def fails(number: int) -> bool:
        """Of the few that may: whether this is the first time."""
        if number in failed:
            return False
        failed.add(number)
        return True

    class Start(EventHandler):
        event_name = BenchStart.event_name

        def handle_event(self, event: Any) -> None:
            if not meter.running and not meter.wall_s:
                meter.start()

    if spec["is_async"]:

        class Waiting(EventHandler):
            event_name = OrderPlaced.event_name

            async def handle_event(self, event: Any) -> None:
                nonlocal good
                await asyncio.sleep(PAUSE_S)
                if event.order_id % fails_every == 0:
                    if fails(event.order_id):
                        raise _Fails
                    return
                good += 1
                if good == wanted:
                    meter.stop()
                    server.stop()
    else:
        work_ns = spec["work_us"] * 1000

        class Quick(EventHandler):
            event_name = OrderPlaced.event_name

            def handle_event(self, event: Any) -> None:
                if work_ns:
                    end = perf_counter_ns() + work_ns
                    while perf_counter_ns() < end:
                        pass
                if event.order_id % fails_every == 0 and fails(event.order_id):
                    raise _Fails

        # They are handled in the order of their partitions, so a marker is enough to count by.
        class End(EventHandler):
            event_name = BenchEnd.event_name

            def handle_event(self, event: Any) -> None:
                nonlocal ended
                ended += 1
                if ended == PARTITIONS:
                    meter.stop()
                    server.stop()

    server = setup_event_listener(
        server_name=spec["group"],  # and with it a retry topic of its own
        topics=[spec["topic"]],
        settings=settings_of(spec),
        auto_reprocess_errors=True,
        retry_interval=spec["retry_interval"],
        **spec["server"],
    )
    server.start_sync()
    ledger = server.io_server.ledger()
    counts = [entry for (topic, _), entry in ledger.items() if topic == spec["topic"]]
    again = [entry for (topic, _), entry in ledger.items() if topic != spec["topic"]]
    return {
        **meter.result(wanted),
        "failed": sum(entry["retried"] for entry in counts),
        "dead": sum(entry["dead"] for entry in [*counts, *again]),
        "tried_again": sum(entry["done"] for entry in again),
    }
