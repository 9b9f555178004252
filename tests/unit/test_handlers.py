"""Handlers: automatic registration, hooks, decorators, foreign topics, and how several parts become one call."""

import asyncio
import functools
import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any
from unittest.mock import MagicMock, Mock

import msgspec
import pytest

from keven_core.kafka._calls import as_unary, is_async
from keven_core.kafka.abstracts.event_handler import EventHandler, EventHandlerMeta, event_handler
from keven_core.kafka.abstracts.metaclass.base_handler_meta import BaseHandlerMeta
from keven_core.kafka.errors import ConfigurationError, RegistrationError, UsageError
from keven_core.kafka.events.event import Event, EventNames, GenericEvent
from keven_core.kafka.record import current_record
from keven_core.kafka.registry import HandlerRegistry
from keven_core.kafka.routing import build_table, compose, runners_table
from keven_core.testing import dispatch

pytestmark = pytest.mark.usefixtures("handler_registry")


@pytest.fixture(autouse=True)
def _hooks_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks on EventHandler itself are for the whole process: restore them."""
    monkeypatch.setattr(EventHandler, "_pre_hooks", [])
    monkeypatch.setattr(EventHandler, "_post_hooks", [])


class Recorder:
    """What was called, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def does(self, name: str, error: BaseException | None = None) -> Callable[[Any], None]:
        def call(event: Any) -> None:
            self.calls.append(name)
            if error is not None:
                raise error

        return call

    def awaits(self, name: str, error: BaseException | None = None) -> Callable[[Any], Any]:
        async def call(event: Any) -> None:
            await asyncio.sleep(0)
            self.calls.append(name)
            if error is not None:
                raise error

        return call


@pytest.fixture
def seen() -> Recorder:
    return Recorder()


def _handler(name: Any, call: Callable[[Any], Any], **body: Any) -> Any:
    """A handler class made as a class statement would make it."""

    def handle_event(self: Any, event: Any) -> Any:
        return call(event)

    namespace = {"__module__": __name__, "event_name": name, "handle_event": handle_event, **body}
    return EventHandlerMeta(body.pop("class_name", "Made"), (EventHandler,), namespace)


def _order(event_name: str = "ORDER_PLACED") -> Event:
    """A generic event, as one without a class of its own arrives."""
    event = GenericEvent()
    vars(event)["event_name"] = event_name
    return event


# --- registration ----------------------------------------------------------------------------------------------------


class ShopNames(str, Enum):
    PAID = "ORDER_PAID"


@pytest.mark.parametrize(
    ("given", "name"), [("PLAIN", "PLAIN"), (ShopNames.PAID, "ORDER_PAID"), (EventNames.PRINT_EVENT, "PRINT_EVENT")]
)
def test_defining_a_handler_registers_it(given: Any, name: str) -> None:
    class Handler(EventHandler):
        event_name = given

        def handle_event(self, event: Any) -> None:
            pass

    assert EventHandler.events_with_handlers() == [name.lower()]
    assert EventHandler.get_handler_count(given) == 1
    assert EventHandler.get_handler_count(name) == 1
    assert BaseHandlerMeta.get_event_registry() == {name: [Handler]}


def test_the_base_class_itself_is_not_registered(handler_registry: HandlerRegistry) -> None:
    assert EventHandler.events_with_handlers() == []
    assert EventHandler.registry_of() is handler_registry
    assert EventHandler.get_handler_count("ANYTHING") == 0


def test_a_class_that_names_nothing_is_a_base_class() -> None:
    class Base(EventHandler):
        def handle_event(self, event: Any) -> None:
            pass

    assert EventHandler.events_with_handlers() == []

    class Concrete(Base):
        event_name = "A"

    assert BaseHandlerMeta.get_event_registry() == {"A": [Concrete]}


def test_a_handler_may_have_mixins() -> None:
    class Mixin:
        def handle_event(self, event: Any) -> None:
            pass

    class Handler(Mixin, EventHandler):
        event_name = "A"

    assert BaseHandlerMeta.get_event_registry() == {"A": [Handler]}


def test_auto_register_false_holds_for_that_class_alone() -> None:
    class Base(EventHandler):
        event_name = "A"
        auto_register = False

        def handle_event(self, event: Any) -> None:
            pass

    assert EventHandler.events_with_handlers() == []

    class Concrete(Base):
        pass

    assert BaseHandlerMeta.get_event_registry() == {"A": [Concrete]}


def test_a_handler_without_handle_event_is_named() -> None:
    with pytest.raises(RegistrationError, match=r"Incomplete is for 'A' but does not define handle_event; a base"):

        class Incomplete(EventHandler):
            event_name = "A"

    assert EventHandler.events_with_handlers() == []


def test_an_abstract_handler_is_named_with_what_it_lacks() -> None:
    from abc import abstractmethod

    with pytest.raises(RegistrationError, match=r"Partial is for 'A' but does not define own_part"):

        class Partial(EventHandler):
            event_name = "A"

            def handle_event(self, event: Any) -> None:
                self.own_part()

            @abstractmethod
            def own_part(self) -> None: ...


@pytest.mark.parametrize("name", ["", "a b", "AUDIT", 5, "x" * 300])
def test_names_that_cant_be_are_refused(name: Any) -> None:
    with pytest.raises(RegistrationError):
        _handler(name, print)
    assert EventHandler.events_with_handlers() == []


def test_handlers_run_in_the_order_of_registration(seen: Recorder) -> None:
    _handler("ORDER_PLACED", seen.does("first"))
    EventHandler.register_function("ORDER_PLACED", seen.does("second"))
    event_handler("ORDER_PLACED")(seen.does("third"))
    assert EventHandler.get_handler_count("ORDER_PLACED") == 3
    assert dispatch(b'{"event_name":"ORDER_PLACED"}').outcome == "done"
    assert seen.calls == ["first", "second", "third"]


def test_one_instance_per_handler_class_and_process() -> None:
    instances = []

    class Handler(EventHandler):
        event_name = "A"

        def __init__(self) -> None:
            instances.append(self)
            self.count = 0

        def handle_event(self, event: Any) -> None:
            self.count += 1

    for _ in range(3):
        assert dispatch(b'{"event_name":"A"}').outcome == "done"
    assert [instance.count for instance in instances] == [3]


def test_registering_while_a_server_runs_names_the_class(handler_registry: HandlerRegistry) -> None:
    with handler_registry.frozen():
        with pytest.raises(RegistrationError, match=r"\.Late can't be registered for 'A': a server is running"):

            class Late(EventHandler):
                event_name = "A"

                def handle_event(self, event: Any) -> None:
                    pass

    assert EventHandler.events_with_handlers() == []


def test_the_decorator_leaves_the_function_as_it_is() -> None:
    @event_handler(EventNames.PRINT_EVENT)
    def print_it(event: Any) -> str:
        return f"printed {event}"

    assert print_it("it") == "printed it"
    assert EventHandler.get_handler_count("PRINT_EVENT") == 1


@pytest.mark.parametrize("arguments", [{}, {"event_name": "A", "topic": "shop.orders"}])
def test_the_decorator_takes_a_name_or_a_topic(arguments: dict[str, str]) -> None:
    with pytest.raises(RegistrationError, match=r"takes an event name or topic=\.\.\., and not both"):
        event_handler(**arguments)


def test_the_decorator_without_parentheses_is_refused() -> None:
    with pytest.raises(RegistrationError, match=r"an event name has to be a str"):

        @event_handler
        def handler(event: Any) -> None: ...


# --- names of handlers and of event classes ---------------------------------------------------------------------------


def test_a_handler_and_an_event_class_under_two_spellings_are_both_named() -> None:
    class OrderPlaced(Event):
        event_name = "ORDER_PLACED"

    _handler("Order_Placed", print, __qualname__="Orders")
    with pytest.raises(RegistrationError) as caught:
        build_table(EventHandler)
    assert f"{__name__}.Orders is for 'Order_Placed'" in str(caught.value)
    assert "OrderPlaced is 'ORDER_PLACED'" in str(caught.value)


def test_names_are_found_in_lower_case_as_events_with_handlers_gives_them(seen: Recorder) -> None:
    _handler("ORDER_PLACED", seen.does("handled"))
    table = build_table(EventHandler, names=EventHandler.events_with_handlers())
    assert list(table.routes) == ["ORDER_PLACED"]


# --- handle_events ---------------------------------------------------------------------------------------------------


def test_handle_events_takes_any_object_with_a_name(seen: Recorder) -> None:
    class Duck:
        event_name = EventNames.PRINT_EVENT

    _handler("PRINT_EVENT", seen.does("handled"))
    assert EventHandler.handle_events(Duck()) is None
    assert EventHandler.handle_all_events(Duck()) is None
    assert seen.calls == ["handled", "handled"]


def test_handle_events_without_a_handler_does_nothing() -> None:
    assert EventHandler.handle_events(_order()) is None


def test_handle_events_of_an_async_handler_is_awaitable(seen: Recorder) -> None:
    event_handler("ORDER_PLACED")(seen.awaits("handled"))
    asyncio.run(EventHandler.handle_events(_order()))
    assert seen.calls == ["handled"]


# --- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_run_around_all_handlers_of_an_event(seen: Recorder) -> None:
    EventHandler.register_pre_handler_hook(seen.does("pre of all"))
    EventHandler.register_post_handler_hook(seen.does("post of all"))
    one = _handler("A", seen.does("one"))
    other = _handler("A", seen.does("other"), __qualname__="Other")
    one.register_pre_handler_hook(seen.does("pre of one"))
    other.register_post_handler_hook(seen.does("post of other"))
    assert dispatch(b'{"event_name":"A"}').outcome == "done"
    assert seen.calls == ["pre of all", "pre of one", "one", "other", "post of all", "post of other"]


def test_a_hook_of_one_handler_is_not_a_hook_of_others(seen: Recorder) -> None:
    one = _handler("A", seen.does("one"))
    _handler("B", seen.does("other"), __qualname__="Other")
    one.register_pre_handler_hook(seen.does("pre"))
    one.register_post_handler_hook(seen.does("post"))
    assert dispatch(b'{"event_name":"B"}').outcome == "done"
    assert seen.calls == ["other"]
    assert EventHandler.hooks("_pre_hooks") == []


def test_a_subclass_has_the_hooks_of_its_base_and_runs_each_once(seen: Recorder) -> None:
    class Base(EventHandler):
        def handle_event(self, event: Any) -> None:
            seen.calls.append(type(self).__name__)

    Base.register_pre_handler_hook(seen.does("pre"))

    class One(Base):
        event_name = "A"

    class Two(Base):
        event_name = "A"

    assert dispatch(b'{"event_name":"A"}').outcome == "done"
    assert seen.calls == ["pre", "One", "Two"]


def test_hooks_get_the_event_if_they_take_an_argument() -> None:
    got: list[Any] = []
    EventHandler.register_pre_handler_hook(lambda: got.append("none"))
    EventHandler.register_pre_handler_hook(lambda event: got.append(event.order_id))
    EventHandler.register_pre_handler_hook(lambda event=None: got.append(event.order_id))
    EventHandler.register_pre_handler_hook(lambda *events: got.append(len(events)))
    EventHandler.register_pre_handler_hook(functools.partial(lambda prefix, event: got.append((prefix, 1)), "p"))
    _handler("A", lambda event: None)
    assert dispatch(b'{"event_name":"A","order_id":5}').outcome == "done"
    assert got == ["none", 5, 5, 1, ("p", 1)]


@pytest.mark.parametrize("style", ["does", "awaits"])
def test_post_hooks_run_when_a_handler_raises_and_its_error_remains(seen: Recorder, style: str) -> None:
    failure = ValueError("no")
    make = getattr(seen, style)
    event_handler("A")(make("first", failure))
    event_handler("A")(make("second"))
    EventHandler.register_post_handler_hook(make("post"))
    result = dispatch(b'{"event_name":"A"}')
    assert (result.outcome, result.error) == ("dead", failure)
    assert seen.calls == ["first", "second", "post"]


@pytest.mark.parametrize("style", ["does", "awaits"])
def test_a_pre_hook_that_raises_is_a_failure_and_no_handler_runs(seen: Recorder, style: str) -> None:
    failure = ValueError("no")
    make = getattr(seen, style)
    event_handler("A")(make("handler"))
    EventHandler.register_pre_handler_hook(make("pre", failure))
    EventHandler.register_pre_handler_hook(make("second pre"))
    EventHandler.register_post_handler_hook(make("post"))
    result = dispatch(b'{"event_name":"A"}')
    assert (result.outcome, result.error) == ("dead", failure)
    assert seen.calls == ["pre", "post"]


@pytest.mark.parametrize("style", ["does", "awaits"])
def test_a_post_hook_that_raises_is_a_failure_and_the_others_run(seen: Recorder, style: str) -> None:
    failure = ValueError("no")
    make = getattr(seen, style)
    event_handler("A")(make("handler"))
    EventHandler.register_post_handler_hook(make("post", failure))
    EventHandler.register_post_handler_hook(make("second post"))
    result = dispatch(b'{"event_name":"A"}')
    assert (result.outcome, result.error) == ("dead", failure)
    assert seen.calls == ["handler", "post", "second post"]


@pytest.mark.parametrize("style", ["does", "awaits"])
def test_of_several_failures_the_first_is_reported(seen: Recorder, style: str) -> None:
    make = getattr(seen, style)
    first = KeyError("first")
    event_handler("A")(make("one", first))
    event_handler("A")(make("two", ValueError("second")))
    EventHandler.register_post_handler_hook(make("post", OSError("third")))
    assert dispatch(b'{"event_name":"A"}').error is first
    assert seen.calls == ["one", "two", "post"]


@pytest.mark.parametrize(
    "mixture", [("awaits", "does", "does"), ("does", "awaits", "does"), ("does", "does", "awaits")]
)
def test_sync_and_async_parts_mix(seen: Recorder, mixture: tuple[str, str, str]) -> None:
    pre, handler, post = (getattr(seen, style) for style in mixture)
    EventHandler.register_pre_handler_hook(pre("pre"))
    event_handler("A")(handler("handler"))
    EventHandler.register_post_handler_hook(post("post"))
    assert build_table(EventHandler).routes["A"].is_async
    assert dispatch(b'{"event_name":"A"}').outcome == "done"
    assert seen.calls == ["pre", "handler", "post"]


def test_an_async_hook_without_arguments_is_awaited() -> None:
    done: list[str] = []

    async def hook() -> None:
        await asyncio.sleep(0)
        done.append("hook")

    EventHandler.register_pre_handler_hook(hook)
    event_handler("A")(lambda event: done.append("handler"))
    assert dispatch(b'{"event_name":"A"}').outcome == "done"
    assert done == ["hook", "handler"]


def test_hooks_can_be_run_by_hand(seen: Recorder) -> None:
    EventHandler.register_pre_handler_hook(seen.does("pre"))
    EventHandler.register_post_handler_hook(seen.awaits("post"))
    assert EventHandler.execute_pre_handler_hooks() is None
    asyncio.run(EventHandler.execute_post_handler_hooks(_order()))
    assert seen.calls == ["pre", "post"]


def test_an_interrupt_is_not_a_failure_of_the_record(seen: Recorder) -> None:
    event_handler("A")(seen.does("one", KeyboardInterrupt()))
    event_handler("A")(seen.does("two"))
    with pytest.raises(KeyboardInterrupt):
        dispatch(b'{"event_name":"A"}')
    assert seen.calls == ["one"]


# --- one call out of many --------------------------------------------------------------------------------------------


def test_one_handler_without_hooks_is_called_directly() -> None:
    def handler(event: Any) -> None:
        pass

    assert compose([handler], [], []) is handler
    event_handler("A")(handler)
    assert build_table(EventHandler).routes["A"].call is handler


def test_work_that_was_never_awaited_is_a_failure_not_a_success() -> None:
    done: list[str] = []

    async def work(event: Any) -> None:
        done.append("work")

    event_handler("A")(lambda event: work(event))
    event_handler("A")(lambda event: done.append("other"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = dispatch(b'{"event_name":"A"}')
    assert result.outcome == "dead"
    assert isinstance(result.error, UsageError)
    assert "declare it `async def`" in str(result.error)
    assert done == ["other"]


class AsyncCallable:
    async def __call__(self, event: Any) -> None: ...


class SyncCallable:
    func = "an attribute of its own"

    def __call__(self, event: Any) -> None: ...


async def _async_function(event: Any) -> None: ...


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (_async_function, True),
        (functools.partial(_async_function), True),
        (functools.partial(functools.partial(_async_function)), True),
        (AsyncCallable(), True),
        (functools.partial(AsyncCallable()), True),
        (AsyncCallable().__call__, True),
        (SyncCallable(), False),
        (lambda event: None, False),
        (print, False),
        (len, False),
        (SyncCallable, False),
        (Mock(), False),
        (MagicMock(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_is_async(call: Any, expected: bool) -> None:
    assert is_async(call) is expected


def test_as_unary_keeps_what_takes_the_event() -> None:
    def takes_event(event: Any) -> None: ...

    assert as_unary(takes_event) is takes_event
    assert as_unary(print) is print
    assert as_unary(lambda: 5)("event") == 5


# --- tombstones and foreign topics ------------------------------------------------------------------------------------


def test_a_handler_that_asks_for_tombstones_gets_them() -> None:
    class Asks(EventHandler):
        event_name = "A"

        def handle_event(self, event: Any) -> None: ...

        def handle_tombstone(self, record: Any) -> str:
            return f"tombstone of {record}"

    _handler("B", print)
    table = build_table(EventHandler)
    assert table.routes["A"].on_tombstone("it") == "tombstone of it"
    assert table.bound["keven_events_a"].on_tombstone("it") == "tombstone of it"
    assert table.routes["B"].on_tombstone is None


class Price(msgspec.Struct):
    sku: str
    cents: int


def test_a_foreign_topic_with_a_type_of_its_own() -> None:
    got: list[Any] = []

    class Prices(EventHandler):
        topic = "shop.prices"
        value_type = Price

        def handle_event(self, event: Any) -> None:
            got.append((event, current_record().key, current_record().header("trace")))

    assert EventHandler.events_with_handlers() == []
    assert BaseHandlerMeta.get_event_registry() == {}
    for value in (b'{"sku":"a","cents":5}', msgspec.msgpack.encode(Price("b", 6))):
        result = dispatch(value, topic="shop.prices", key=b"k", headers=[("trace", b"t")])
        assert result.outcome == "done"
    assert got == [(Price("a", 5), b"k", b"t"), (Price("b", 6), b"k", b"t")]
    dead = dispatch(b'{"sku":"a"}', topic="shop.prices")
    assert dead.outcome == "dead"
    assert "missing required field `cents`" in str(dead.error)


def test_a_foreign_topic_as_bytes_by_default() -> None:
    got: list[bytes] = []
    event_handler(topic="shop.raw")(got.append)
    for value in (b"\x00\xff not an envelope", b""):
        assert dispatch(value, topic="shop.raw").outcome == "done"
    assert got == [b"\x00\xff not an envelope", b""]


def test_a_foreign_codec_is_taken_at_its_word() -> None:
    got: list[Any] = []
    event_handler(topic="shop.numbers", value_type=int, codec="json")(got.append)
    assert dispatch(b"5", topic="shop.numbers").outcome == "done"
    assert dispatch(b"\xcd\x01\x00", topic="shop.numbers").outcome == "dead"
    event_handler(topic="shop.packed", value_type=int, codec="msgpack")(got.append)
    assert dispatch(b"5", topic="shop.packed").outcome == "done"  # 0x35: fixint 53
    assert got == [5, 53]


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(RegistrationError, match=r"codec 'avro' .* 'json', 'msgpack' or None are allowed"):
        event_handler(topic="shop.prices", codec="avro")(print)


@pytest.mark.parametrize("topic", ["", "a b", "^shop.*", "..", "x" * 250])
def test_a_foreign_topic_has_to_be_a_topic(topic: str) -> None:
    with pytest.raises(ConfigurationError):
        event_handler(topic=topic)(print)


def test_both_an_event_and_a_topic_is_refused() -> None:
    with pytest.raises(RegistrationError, match=r"Both has both event_name and topic"):

        class Both(EventHandler):
            event_name = "A"
            topic = "shop.prices"

            def handle_event(self, event: Any) -> None: ...


def test_handlers_of_one_topic_share_their_type() -> None:
    event_handler(topic="shop.prices", value_type=Price)(lambda event: None)
    event_handler(topic="shop.prices")(lambda event: None)
    with pytest.raises(RegistrationError, match=r"read topic 'shop\.prices' as different types"):
        build_table(EventHandler)


# --- runners of a service's own ---------------------------------------------------------------------------------------


class RunnerObject:
    def __init__(self, calls: list[Any]) -> None:
        self.calls_seen = calls

    def run(self, message: bytes, topic: str | None = None) -> None:
        self.calls_seen.append(("object", message, topic))


def test_every_runner_gets_every_message_undecoded() -> None:
    seen: list[Any] = []
    table = runners_table([RunnerObject(seen), lambda message: seen.append(("function", message))], pass_topic=False)
    for value in (b"", b"not an envelope"):
        route, given = table.resolve(value, "shop.orders")
        assert not route.is_async
        assert route.call(given) is None
    assert seen == [
        ("object", b"", None),
        ("function", b""),
        ("object", b"not an envelope", None),
        ("function", b"not an envelope"),
    ]


def test_runners_get_the_topic_if_asked_for() -> None:
    seen: list[Any] = []

    async def run(message: bytes, topic: str) -> None:
        seen.append(("async", message, topic))

    table = runners_table([RunnerObject(seen), run], pass_topic=True)
    route, given = table.resolve(b"x", "shop.orders")
    assert route.with_topic
    assert route.is_async
    asyncio.run(route.call(given, topic="shop.orders"))
    assert seen == [("object", b"x", "shop.orders"), ("async", b"x", "shop.orders")]


def test_a_runner_that_raises_does_not_keep_the_others_from_running() -> None:
    seen: list[Any] = []

    def fails(message: bytes) -> None:
        raise ValueError("no")

    route, given = runners_table([fails, RunnerObject(seen)], pass_topic=False).resolve(b"x")
    with pytest.raises(ValueError, match="no"):
        route.call(given)
    assert len(seen) == 1


# --- dispatch --------------------------------------------------------------------------------------------------------


def test_dispatch_of_an_event_without_a_handler() -> None:
    assert dispatch(b'{"event_name":"NOBODYS"}').outcome == "skipped"


def test_dispatch_gives_the_record_to_the_handler() -> None:
    class OrderPlaced(Event):
        event_name = "ORDER_PLACED"
        key_field = "order_id"
        order_id: int

    got: list[Any] = []
    event_handler("ORDER_PLACED")(lambda event: got.append((event, current_record())))
    assert dispatch(OrderPlaced(order_id=5), codec="msgpack").outcome == "done"
    event, record = got[0]
    assert event.order_id == 5
    assert (record.topic, record.key) == ("keven_events_order_placed", b"5")
    with pytest.raises(LookupError, match="outside a handler"):
        current_record()
