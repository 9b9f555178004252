"""The registry of handlers by itself: order, collisions, replacement, freezing, isolation."""

import threading
from typing import Any

import pytest

from keven_core.kafka.errors import RegistrationError
from keven_core.kafka.registry import Handler, HandlerRegistry


def _function(name: str, module: str = "shop.handlers") -> Any:
    def handler(event: Any) -> None:
        pass

    handler.__module__, handler.__qualname__ = module, name
    return handler


@pytest.fixture
def registry() -> HandlerRegistry:
    return HandlerRegistry("event")


def test_handlers_and_names_keep_the_order_of_registration(registry: HandlerRegistry) -> None:
    first, second, third = (Handler(name, _function(f"f{i}")) for i, name in enumerate(["B", "A", "B"]))
    for handler in (first, second, third):
        registry.register(handler)
    assert registry.names() == ["B", "A"]
    assert registry.handlers_of("B") == [first, third]
    assert registry.handlers_of("A") == [second]
    assert registry.handlers_of("C") == []


def test_foreign_topics_are_apart_from_events(registry: HandlerRegistry) -> None:
    event, foreign = Handler("orders", _function("a")), Handler("orders", _function("b"), foreign=True)
    registry.register(event)
    registry.register(foreign)
    assert registry.names() == ["orders"]
    assert registry.foreign_topics() == ["orders"]
    assert registry.handlers_of("orders") == [event]
    assert registry.handlers_of("orders", foreign=True) == [foreign]


@pytest.mark.parametrize("other", ["order_placed", "Order.Placed", "ORDER.PLACED"])
def test_names_that_collide_as_topics_are_refused_and_both_handlers_named(
    registry: HandlerRegistry, other: str
) -> None:
    registry.register(Handler("ORDER_PLACED", _function("first")))
    with pytest.raises(RegistrationError) as caught:
        registry.register(Handler(other, _function("second")))
    text = str(caught.value)
    assert f"shop.handlers.second is for {other!r}" in text
    assert "shop.handlers.first for 'ORDER_PLACED'" in text
    assert registry.names() == ["ORDER_PLACED"]


def test_colliding_foreign_topics_are_refused_too(registry: HandlerRegistry) -> None:
    registry.register(Handler("shop.orders", _function("first"), foreign=True))
    with pytest.raises(RegistrationError, match=r"shop\.handlers\.second .* shop\.handlers\.first"):
        registry.register(Handler("shop_orders", _function("second"), foreign=True))


def test_a_function_that_is_registered_again_replaces_itself_in_place(registry: HandlerRegistry) -> None:
    registry.register(Handler("A", _function("first")))
    registry.register(Handler("A", _function("second")))
    reloaded = Handler("A", _function("first"))
    registry.register(reloaded)
    assert [handler.qualified_name for handler in registry.handlers_of("A")] == [
        "shop.handlers.first",
        "shop.handlers.second",
    ]
    assert registry.handlers_of("A")[0] is reloaded


def test_local_functions_of_one_name_are_different_handlers(registry: HandlerRegistry) -> None:
    for _ in range(2):
        registry.register(Handler("A", _function("make.<locals>.handler")))
    assert len(registry.handlers_of("A")) == 2


def test_one_handler_may_handle_several_events(registry: HandlerRegistry) -> None:
    target = _function("both")
    registry.register(Handler("A", target))
    registry.register(Handler("B", target))
    assert registry.names() == ["A", "B"]


def test_unregister_removes_every_registration(registry: HandlerRegistry) -> None:
    target, other = _function("both"), _function("other")
    for handler in (Handler("A", target), Handler("A", other), Handler("T", target, foreign=True)):
        registry.register(handler)
    registry.unregister(target)
    assert registry.names() == ["A"]
    assert registry.foreign_topics() == []
    assert [handler.target for handler in registry.handlers_of("A")] == [other]


def test_while_frozen_registering_names_the_handler_and_the_event(registry: HandlerRegistry) -> None:
    with registry.frozen():
        with pytest.raises(RegistrationError, match=r"shop\.handlers\.late can't be registered for 'A': a server is"):
            registry.register(Handler("A", _function("late")))
    registry.register(Handler("A", _function("late")))
    assert registry.names() == ["A"]


def test_frozen_by_two_servers_until_both_have_ended(registry: HandlerRegistry) -> None:
    with registry.frozen():
        with registry.frozen():
            pass
        with pytest.raises(RegistrationError):
            registry.register(Handler("A", _function("late")))
    registry.register(Handler("A", _function("late")))


def test_frozen_ends_with_an_exception(registry: HandlerRegistry) -> None:
    with pytest.raises(ZeroDivisionError):
        with registry.frozen():
            _ = 1 / 0
    registry.register(Handler("A", _function("late")))


def test_isolated_starts_empty_and_restores(registry: HandlerRegistry) -> None:
    handler = Handler("A", _function("a"))
    registry.register(handler)
    with registry.frozen():
        with registry.isolated():
            assert registry.names() == []
            registry.register(Handler("B", _function("b")))
            assert registry.names() == ["B"]
        assert registry.handlers_of("A") == [handler]
        assert registry.names() == ["A"]
        with pytest.raises(RegistrationError):
            registry.register(Handler("C", _function("c")))


def test_one_instance_per_handler_class_however_many_threads_ask(registry: HandlerRegistry) -> None:
    made: list[Any] = []
    barrier = threading.Barrier(8)

    class Target:
        def __init__(self) -> None:
            made.append(self)

    handler = Handler("A", Target)
    found: list[Any] = []

    def ask() -> None:
        barrier.wait(10)
        found.append(registry.instance_of(handler))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(made) == 1
    assert found == [made[0]] * 8


def test_a_function_is_its_own_instance(registry: HandlerRegistry) -> None:
    target = _function("f")
    assert registry.instance_of(Handler("A", target)) is target


def test_registering_from_many_threads_loses_nothing(registry: HandlerRegistry) -> None:
    def fill(number: int) -> None:
        for i in range(50):
            registry.register(Handler(f"E{number}x{i}", _function(f"f{number}x{i}")))

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(registry.names()) == 200
