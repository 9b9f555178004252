"""Events of three types through registered handlers, on real Kafka where there is one, else on the embedded one.

    python -m keven_core.demo [--events N]

Prints a progress bar, then rate, counts, latency and the ledger; exits with 1 if produced = handled + skipped does not
hold.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from keven_core.kafka.abstracts.consumer_server import KafkaConsumerServer
from keven_core.kafka.abstracts.event_handler import EventHandler
from keven_core.kafka.config import Settings
from keven_core.kafka.errors import ClosedError
from keven_core.kafka.events.event import Event
from keven_core.kafka.events.runner import EventRunner
from keven_core.kafka.logger import KafkaBatchLogger

PARTITIONS = 16
# The embedded Kafka keeps about 5 MB a partition: the producer is never further ahead than this.
MAX_AHEAD = 20_000


class OrderPlaced(Event):
    """An order came in."""

    event_name = "DEMO_ORDER_PLACED"
    key_field = "order_id"
    sent_ns: int
    order_id: int
    customer: str = ""


class PaymentReceived(Event):
    """A payment came in."""

    event_name = "DEMO_PAYMENT_RECEIVED"
    key_field = "order_id"
    sent_ns: int
    order_id: int
    amount: float


class ParcelScanned(Event):
    """A parcel passed a scanner; nobody handles it, so it is skipped and counted."""

    event_name = "DEMO_PARCEL_SCANNED"
    sent_ns: int
    parcel: str


@dataclass
class Seen:
    """What the handlers have seen."""

    counts: dict[str, int] = field(default_factory=dict)
    latencies_ns: list[int] = field(default_factory=list)

    def note(self, event: Any) -> None:
        """Count an event; every 50th also gives a latency."""
        count = self.counts.get(event.event_name, 0) + 1
        self.counts[event.event_name] = count
        if not count % 50:
            self.latencies_ns.append(time.time_ns() - event.sent_ns)


SEEN = Seen()


class Orders(EventHandler):
    """Handles orders."""

    event_name = OrderPlaced.event_name

    def handle_event(self, event: OrderPlaced) -> None:
        """Note the order."""
        SEEN.note(event)


class Payments(EventHandler):
    """Handles payments."""

    event_name = PaymentReceived.event_name

    def handle_event(self, event: PaymentReceived) -> None:
        """Note the payment."""
        SEEN.note(event)


@contextlib.contextmanager
def a_kafka() -> Iterator[tuple[str, str, Settings]]:
    """Kafka to use: (what it is, topic, settings); KAFKA first, then `make kafka`, then embedded."""
    from keven_core.testing.embedded import EmbeddedKafka
    from keven_core.testing.real_kafka import running_kafka

    topic = f"keven_demo_{time.time_ns()}"
    address = os.environ.get("KAFKA") or running_kafka()
    if address:
        from keven_core.kafka.admin import create_topics

        settings = Settings.from_env(kafka_address=address)
        create_topics(settings, address, [topic], partitions=PARTITIONS)
        yield f"Kafka at {address}", topic, settings
        return
    with EmbeddedKafka() as kafka:
        kafka.create_topic(topic, PARTITIONS)
        yield "embedded Kafka (run `make kafka` for a real one)", topic, kafka.settings()


def produce(count: int, topic: str, settings: Settings, handled: Any, stop: threading.Event) -> None:
    """Publish `count` events, never further ahead of what has been handled than MAX_AHEAD."""
    with KafkaBatchLogger(topic=topic, settings=settings) as logger:
        for number in range(count):
            now = time.time_ns()
            kind = number % 10
            event: Event
            if kind < 6:
                event = OrderPlaced(order_id=number, customer=f"customer {number % 997}", sent_ns=now)
            elif kind < 9:
                event = PaymentReceived(order_id=number, amount=number / 100, sent_ns=now)
            else:
                event = ParcelScanned(parcel=f"P{number:09d}", sent_ns=now)
            logger.log(event)
            if not number % 1000:
                while number - handled() > MAX_AHEAD and not stop.is_set():
                    time.sleep(0.001)
            if stop.is_set():
                return


def percentile(sorted_values: list[int], share: float) -> float:
    """The value below which `share` of the sorted values lie; 0 without values."""
    return float(sorted_values[min(len(sorted_values) - 1, int(len(sorted_values) * share))]) if sorted_values else 0.0


def is_assigned(server: KafkaConsumerServer) -> bool:
    """Whether the server has joined its group and owns every partition."""
    try:
        return len(server.assignment()) == PARTITIONS
    except ClosedError:
        return False  # it is still connecting


def totals_of(server: KafkaConsumerServer) -> dict[str, int]:
    """The ledger of all partitions, added up."""
    totals: dict[str, int] = {}
    for counts in server.ledger().values():
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + count
    return totals


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m keven_core.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--events", type=int, default=200_000, help="how many events (default 200000)")
    count = parser.parse_args(arguments).events
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Table
    except ImportError:
        print("the demo needs rich: pip install 'keven-core[demo]'", file=sys.stderr)
        return 2
    console = Console()
    with a_kafka() as (what, topic, settings):
        console.print(f"{count} events of three types through {what}, {PARTITIONS} partitions")
        server = KafkaConsumerServer(
            topic, client_id=topic, runners=[EventRunner()], settings=settings, start="earliest"
        )
        totals: dict[str, int] = {}

        def accounted() -> int:
            try:
                totals.update(totals_of(server))
            except ClosedError:
                return 0  # it is still connecting
            return totals.get("received", 0) - totals.get("in_flight", 0)

        stop = threading.Event()
        producer = threading.Thread(target=produce, args=(count, topic, settings, accounted, stop), daemon=True)
        columns = (TextColumn("handled"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        began: float | None = None
        with server, Progress(*columns, console=console) as progress:
            bar = progress.add_task("handled", total=count)
            deadline = time.monotonic() + 60
            while not is_assigned(server) and time.monotonic() < deadline:
                time.sleep(0.01)
            producer.start()
            last = 0
            while last < count and time.monotonic() < deadline:
                time.sleep(0.02)
                now = accounted()
                if now and began is None:
                    began = time.monotonic()
                if now != last:
                    deadline = time.monotonic() + 30
                last = now
                progress.update(bar, completed=now)
            seconds = time.monotonic() - (began or time.monotonic())
            stop.set()
            producer.join()
        handled, skipped = totals.get("done", 0), totals.get("skipped", 0)
        latencies = sorted(SEEN.latencies_ns)
        table = Table("figure", "value", title="keven_core demo")
        table.add_row("rate, producer in the same process", f"{count / max(seconds, 1e-9):,.0f} events/s")
        for name, number in sorted(SEEN.counts.items()):
            table.add_row(f"handled {name}", f"{number:,}")
        table.add_row(f"skipped {ParcelScanned.event_name} (no handler)", f"{skipped:,}")
        for share in (0.5, 0.95, 0.99):
            table.add_row(
                f"latency p{share * 100:.0f}, under full load", f"{percentile(latencies, share) / 1e6:.1f} ms"
            )
        balanced = count == handled + skipped == sum(SEEN.counts.values()) + skipped
        sign = "=" if balanced else "≠"
        table.add_row("ledger: produced = handled + skipped", f"{count:,} {sign} {handled:,} + {skipped:,}")
        console.print(table)
    return 0 if balanced else 1


if __name__ == "__main__":
    sys.exit(main())
