"""The processes of benchmarks/restart.py: a server that is ended while it is busy, and the one that comes after it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from typing import Any

from benchmarks._events import OrderPlaced
from benchmarks._keven import settings_of
from benchmarks._meter import now_ns

# Seconds that a handler takes.
_SHORTEST_S, _LONGEST_S = 0.2, 2.0


def _server(spec: dict[str, Any], **more: Any) -> Any:
    from keven_core.kafka import setup_event_listener

    return setup_event_listener(
        server_name=spec["group"], topics=[spec["topic"]], settings=settings_of(spec), **spec["server"], **more
    )


def run_drain(spec: dict[str, Any]) -> dict[str, Any]:
    """A server that gets SIGTERM when `in_flight` records are being handled; seconds until it has ended."""
    from keven_core.kafka import EventHandler

    draw = random.Random(1)
    began: dict[int, int] = {}
    signalled_ns = last_ns = longest_ns = handled = 0

    def enter(number: int) -> float:
        nonlocal signalled_ns
        began[number] = now_ns()
        if len(began) == spec["in_flight"] and not signalled_ns:
            signalled_ns = now_ns()
            os.kill(os.getpid(), signal.SIGTERM)
        return draw.uniform(_SHORTEST_S, _LONGEST_S)

    def leave(number: int) -> None:
        nonlocal last_ns, longest_ns, handled
        last_ns = now_ns()
        longest_ns = max(longest_ns, last_ns - began.pop(number))
        handled += 1

    if spec["is_async"]:

        class Waiting(EventHandler):
            event_name = OrderPlaced.event_name

            async def handle_event(self, event: Any) -> None:
                await asyncio.sleep(enter(event.order_id))
                leave(event.order_id)
    else:

        class Blocking(EventHandler):
            event_name = OrderPlaced.event_name

            def handle_event(self, event: Any) -> None:
                time.sleep(enter(event.order_id))
                leave(event.order_id)

    server = _server(spec)
    server.start_sync()
    ended_ns = now_ns()
    return {
        "handled": handled,
        "left": len(began),
        "longest_s": longest_ns / 1e9,
        "drain_s": (ended_ns - signalled_ns) / 1e9,
        "after_last_s": (ended_ns - last_ns) / 1e9,
    }


def run_start(spec: dict[str, Any]) -> dict[str, Any]:
    """A server that ends with the first record that it handles; by the clock of the host, when was what."""
    from keven_core.kafka import EventHandler

    assigned_ns = first_ns = 0

    def on_assign(server: Any, partitions: list[Any]) -> None:
        nonlocal assigned_ns
        if any(entry.topic == spec["topic"] for entry in partitions):
            assigned_ns = now_ns()

    def first() -> None:
        nonlocal first_ns
        if not first_ns:
            first_ns = now_ns()
            server.stop()

    if spec["is_async"]:

        class Waiting(EventHandler):
            event_name = OrderPlaced.event_name

            async def handle_event(self, event: Any) -> None:
                first()
    else:

        class Quick(EventHandler):
            event_name = OrderPlaced.event_name

            def handle_event(self, event: Any) -> None:
                first()

    server = _server(spec, on_assign=on_assign)
    server.start_sync()
    return {"assigned_ns": assigned_ns, "first_ns": first_ns}
