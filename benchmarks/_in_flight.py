"""Contestants of benchmarks/in_flight.py: handlers that wait, in a server and in a bare event loop."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks._events import OrderPlaced
from benchmarks._keven import SERVER_NAME, settings_of
from benchmarks._meter import Meter

PAUSE_S = 0.001


def run_server(spec: dict[str, Any]) -> dict[str, Any]:
    """A server whose async handler awaits 1 ms; `server` are its further arguments, `wanted` ends it."""
    from keven_core.kafka import EventHandler, setup_event_listener

    meter = Meter()
    wanted = spec["wanted"]
    handled = 0

    class Waiting(EventHandler):
        event_name = OrderPlaced.event_name

        async def handle_event(self, event: Any) -> None:
            nonlocal handled
            if not handled and not meter.running:
                meter.start()
            await asyncio.sleep(PAUSE_S)
            handled += 1
            if handled == wanted:
                meter.stop()
                server.stop()

    server = setup_event_listener(
        server_name=SERVER_NAME,
        group_id=spec["group"],
        topics=[spec["topic"]],
        settings=settings_of(spec),
        **spec["server"],
    )
    server.start_sync()
    return meter.result(wanted)


def run_bare(spec: dict[str, Any]) -> dict[str, Any]:
    """As many tasks in a loop without Kafka, each awaiting 1 ms again and again."""
    import uvloop

    meter = Meter()
    left = spec["wanted"]

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await asyncio.sleep(PAUSE_S)

    async def main() -> None:
        meter.start()
        await asyncio.gather(*(work() for _ in range(spec["tasks"])))
        meter.stop()

    uvloop.run(main())
    return meter.result(spec["wanted"])
