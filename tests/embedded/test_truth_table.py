"""Every outcome, at every point where it can come about, for every kind of handler and every order.

The cells are made from what there is: a new outcome, order or kind without an expectation fails here.
"""

import asyncio
import itertools
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from embedded_support import (
    DEAD,
    Feeder,
    Message,
    committed,
    event,
    group_server,
    live,
    quick,
    topics,
    values,
    wait_until,
)

from keven_core.kafka import EventHandler, LongRunningEventHandler, event_handler
from keven_core.kafka._plan import Order
from keven_core.kafka.outcomes import DeadLetter, Outcome, Retry, Skip
from keven_core.kafka.topics import retry_topic

pytestmark = pytest.mark.logs_errors

TOPIC, WAITING = "keven_events_order", retry_topic("svc")
POINTS = ("decode", "pre-hook", "handler", "post-hook")
# How handlers and hooks say it.
WAYS = ("returned", "raised")
ORDERS: tuple[str, ...] = ("one by one", *typing.get_args(Order))


class ShopError(Exception):
    pass


# What each outcome is made by, and what the ledger counts it as at first and, where it comes again, at last.
MADE_BY: dict[type[BaseException] | None, Callable[[], BaseException | None]] = {
    None: lambda: None,
    Retry: lambda: Retry(after=0.02),
    DeadLetter: lambda: DeadLetter("never"),
    Skip: lambda: Skip("no"),
    ShopError: ShopError,
}
COUNTED: dict[type[BaseException] | None, tuple[str, ...]] = {
    None: ("done",),
    Retry: ("retried", "done"),
    DeadLetter: ("dead",),
    Skip: ("skipped",),
    ShopError: ("retried", "done"),
}


@dataclass(frozen=True)
class Cell:
    """One record: what it comes to, where, and how that is said."""

    point: str
    outcome: type[BaseException] | None
    way: str

    @property
    def counted(self) -> tuple[str, ...]:
        return ("dead",) if self.point == "decode" else COUNTED[self.outcome]

    @property
    def handled(self) -> int:
        """How often its handler runs."""
        first = self.point in ("handler", "post-hook") or (self.point == "pre-hook" and self.outcome is None)
        return first + (len(self.counted) == 2)


def cells() -> list[Cell]:
    """All that can be: a value that can't be decoded has no other outcome, and an exception is raised."""
    made = [Cell("decode", None, "raised")]
    for point, outcome, way in itertools.product(POINTS[1:], MADE_BY, WAYS):
        if (outcome is ShopError and way == "returned") or (outcome is None and way == "raised"):
            continue
        made.append(Cell(point, outcome, way))
    return made


def test_no_outcome_is_left_out() -> None:
    assert set(MADE_BY) == set(COUNTED) == {None, ShopError, *Outcome.__subclasses__()}
    assert len(cells()) == 1 + 3 * (1 + 2 * len(Outcome.__subclasses__()) + 1)


class Doing:
    """What hooks and handlers of a run do with each cell's record, the first time that it comes there."""

    def __init__(self) -> None:
        self.cells = cells()
        self.handled: dict[int, int] = {}
        self._acted: set[tuple[str, int]] = set()

    def act(self, point: str, given: Any) -> Any:
        """Return or raise what the cell says; None elsewhere and later."""
        if point == "handler":
            self.handled[given.number] = self.handled.get(given.number, 0) + 1
        cell = self.cells[given.number]
        if cell.point != point or (point, given.number) in self._acted:
            return None
        self._acted.add((point, given.number))
        made = MADE_BY[cell.outcome]()
        if made is not None and cell.way == "raised":
            raise made
        return made

    def act_on_list(self, events: list[Any]) -> list[Any]:
        """The same for a batch handler: what is raised for one event is returned."""
        outcomes: list[Any] = []
        for given in events:
            try:
                outcomes.append(self.act("handler", given))
            except Exception as error:
                outcomes.append(error)
        return outcomes


def class_of(base: Any, name: str, method: Any) -> None:
    """Define a handler class with one method."""
    type(base)("Handler", (base,), {"event_name": "ORDER", name: method, "__module__": "shop"})


def asynchronous(act: Callable[..., Any]) -> Callable[..., Any]:
    async def act_later(*arguments: Any) -> Any:
        await asyncio.sleep(0)
        return act(*arguments)

    return act_later


# How each kind of handler is registered.
KINDS: dict[str, Callable[[Doing], Any]] = {
    "def": lambda doing: class_of(EventHandler, "handle_event", lambda self, e: doing.act("handler", e)),
    "async def": lambda doing: class_of(
        EventHandler, "handle_event", asynchronous(lambda self, e: doing.act("handler", e))
    ),
    "function": lambda doing: event_handler("ORDER")(lambda e: doing.act("handler", e)),
    "async function": lambda doing: event_handler("ORDER")(asynchronous(lambda e: doing.act("handler", e))),
    "batch": lambda doing: class_of(EventHandler, "handle_batch", lambda self, e: doing.act_on_list(e)),
    "async batch": lambda doing: class_of(
        EventHandler, "handle_batch", asynchronous(lambda self, e: doing.act_on_list(e))
    ),
    "batch function": lambda doing: event_handler("ORDER", batch_size=4, batch_wait_ms=10)(doing.act_on_list),
    "long running": lambda doing: class_of(
        LongRunningEventHandler, "long_running_handle_event", lambda self, e: doing.act("handler", e)
    ),
}


@pytest.fixture
def hooks(handler_registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks of all events, gone afterwards."""
    monkeypatch.setattr(EventHandler, "_pre_hooks", [])
    monkeypatch.setattr(EventHandler, "_post_hooks", [])


def committed_in_all(kafka: Any, topic: str) -> int:
    return sum(committed(kafka, "svc", topic).values())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_record_ends_as_its_cell_says(embedded_kafka: Any, hooks: None, kind: str, order: str) -> None:
    topics(embedded_kafka, TOPIC, WAITING, partitions=2)
    doing = Doing()
    EventHandler.register_pre_handler_hook(lambda given: doing.act("pre-hook", given))
    EventHandler.register_post_handler_hook(lambda given: doing.act("post-hook", given))
    KINDS[kind](doing)
    with Feeder(embedded_kafka) as feeder:
        for number, cell in enumerate(doing.cells):
            value = b"{broken" if cell.point == "decode" else event("ORDER", number=number)
            feeder.send(TOPIC, Message(value, key=b"%d" % (number % 5)), number % 2)
        feeder.wait()
    options: dict[str, Any] = {} if order == "one by one" else {"order": order, "max_in_flight": 4}
    server = group_server(
        embedded_kafka,
        TOPIC,
        settings=quick(embedded_kafka, commit_interval_ms=20),
        auto_reprocess_errors=True,
        retry_interval=0.02,
        session_timeout=1.5,
        heartbeat_interval=0.1,
        **options,
    )
    again = [cell for cell in doing.cells if len(cell.counted) == 2]
    with live(server):
        wait_until(lambda: committed_in_all(embedded_kafka, WAITING) == len(again), "the copies are done")
        wait_until(lambda: committed_in_all(embedded_kafka, TOPIC) == len(doing.cells), "all is committed")
    expected: dict[str, int] = {"received": len(doing.cells) + len(again)}
    for cell in doing.cells:
        for name in cell.counted:
            expected[name] = expected.get(name, 0) + 1
    assert {name: count for name, count in server.counts().items() if count} == expected
    assert len(values(embedded_kafka, DEAD)) == expected["dead"]
    assert len(values(embedded_kafka, WAITING)) == len(again)
    handled = {number: cell.handled for number, cell in enumerate(doing.cells) if cell.handled}
    assert doing.handled == handled
