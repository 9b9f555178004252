"""Builds the dispatch table of a server from the registry: what a message costs is decided here, once.

An event with one handler and no hooks is routed straight to the bound method; hooks and further handlers are composed
into one call, so the hot path knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from keven_core.kafka._batches import BatchPart, compose_batch, one_of_a_batch
from keven_core.kafka._calls import Verdict, as_unary, is_async, run_now, run_or_await
from keven_core.kafka.envelope import json_event_name, msgpack_event_name
from keven_core.kafka.errors import RegistrationError
from keven_core.kafka.events.event import Event, decoders_of, generic_decoders
from keven_core.kafka.registry import Handler, HandlerRegistry
from keven_core.kafka.topics import event_topic, folded

if TYPE_CHECKING:
    from keven_core._native.dispatch import DispatchTable, Route

__all__ = ["build_table", "compose", "event_decoders", "handlers_call", "runners_table"]

Call = Callable[[Any], Any]


def compose(calls: list[Call], pre: list[Call], post: list[Call], names: list[str] | None = None) -> Call:
    """One call for all: pre-hooks, each handler in order, post-hooks.

    Every handler runs, also after one that raised; the first exception is raised at the end, with the `names` of those
    that have failed as `failed_handlers`. Post-hooks always run. A pre-hook that raises keeps the handlers from
    running. The result is async when any part is.
    """
    if len(calls) == 1 and not pre and not post:
        return calls[0]
    named = list(zip(names or [""] * len(calls), calls, strict=True))
    if any(is_async(call) for call in (*calls, *pre, *post)):
        return _compose_async(named, pre, post)

    def call_all(event: Any) -> None:
        verdict = Verdict(len(named))
        try:
            for hook in pre:
                run_now(hook, event)
        except Exception as error:
            verdict.hook_failed(error)
        else:
            for name, call in named:
                try:
                    run_now(call, event)
                except Exception as error:
                    verdict.handler_failed(name, error)
        for hook in post:
            try:
                run_now(hook, event)
            except Exception as error:
                verdict.hook_failed(error)
        verdict.give()

    return call_all


def _compose_async(named: list[tuple[str, Call]], pre: list[Call], post: list[Call]) -> Call:
    async def call_all(event: Any) -> None:
        verdict = Verdict(len(named))
        try:
            for hook in pre:
                await run_or_await(hook, event)
        except Exception as error:
            verdict.hook_failed(error)
        else:
            for name, call in named:
                try:
                    await run_or_await(call, event)
                except Exception as error:
                    verdict.handler_failed(name, error)
        for hook in post:
            try:
                await run_or_await(hook, event)
            except Exception as error:
                verdict.hook_failed(error)
        verdict.give()

    return call_all


@dataclass(frozen=True)
class _Composed:
    """One call for all handlers of an event; with a `batch_size` it takes a list of events."""

    call: Call
    batch_size: int = 0
    batch_wait_ms: int = 0

    def options(self) -> dict[str, Any]:
        """What a Route is to know of it."""
        return {
            "is_async": is_async(self.call),
            "batch_size": self.batch_size,
            "batch_wait_ms": self.batch_wait_ms,
        }


def _composed(registry: HandlerRegistry, handlers: list[Handler], base: Any) -> _Composed:
    """Handlers in one call, with the hooks of `base` and of each handler class, each once."""
    parts: list[BatchPart] = []
    pre: list[Call] = list(base.hooks("_pre_hooks"))
    post: list[Call] = list(base.hooks("_post_hooks"))
    for handler in handlers:
        call = instance = registry.instance_of(handler)
        if handler.is_class:
            meta = type(handler.target)
            call = getattr(instance, meta.batch_method if handler.batch_size else meta.handle_method)
            pre += [hook for hook in handler.target.hooks("_pre_hooks") if hook not in pre]
            post += [hook for hook in handler.target.hooks("_post_hooks") if hook not in post]
        parts.append(BatchPart(handler.qualified_name, call, handler.batch_size > 0))
    pre, post = [as_unary(hook) for hook in pre], [as_unary(hook) for hook in post]
    batches = [handler for handler in handlers if handler.batch_size]
    if not batches:
        return _Composed(compose([part.call for part in parts], pre, post, [part.name for part in parts]))
    return _Composed(
        compose_batch(parts, pre, post),
        min(handler.batch_size for handler in batches),
        min(handler.batch_wait_ms for handler in batches),
    )


def handlers_call(
    registry: HandlerRegistry, base: Any, name: str, *, foreign: bool = False, only: Container[str] | None = None
) -> Call | None:
    """The call of an event's or foreign topic's handlers for one event; None: none. `only`: of those so named."""
    handlers = registry.handlers_of(name, foreign=foreign)
    if only is not None:
        handlers = [handler for handler in handlers if handler.qualified_name in only]
    if not handlers:
        return None
    composed = _composed(registry, handlers, base)
    return one_of_a_batch(composed.call) if composed.batch_size else composed.call


def _tombstone_call(registry: HandlerRegistry, handlers: list[Handler]) -> Call | None:
    calls = [
        registry.instance_of(handler).handle_tombstone
        for handler in handlers
        if handler.is_class and hasattr(handler.target, "handle_tombstone")
    ]
    return compose(calls, [], []) if calls else None


def event_decoders(name: str, *, bound: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(JSON, MessagePack) decode functions of an event: of its own class, or generic."""
    cls = Event.classes.get(name)
    if cls is not None:
        return decoders_of(cls)
    return generic_decoders(name if bound else None)


def _make_table(
    routes: list[Route], bound: dict[str, Route], unnamed: Route | None, max_payload_bytes: int
) -> DispatchTable:
    from keven_core._native.dispatch import DispatchTable

    return DispatchTable(
        routes,
        bound=bound,
        unnamed=unnamed,
        name_json=json_event_name,
        name_msgpack=msgpack_event_name,
        max_payload_bytes=max_payload_bytes,
    )


def build_table(
    base: Any,
    *,
    names: Iterable[str] | None = None,
    handler: Call | None = None,
    all_events: bool = False,
    max_payload_bytes: int = 16 << 20,
) -> DispatchTable:
    """The dispatch table of a server.

    Arguments:
        base: the handler base class, EventHandler.
        names: events to dispatch; None: every event that has a handler, and the foreign topics.
        handler: one callable for all of them; None: the registered handlers.
        all_events: with `handler`: it also gets events that are not in `names`, as their class or generic.
        max_payload_bytes: larger values are dead-lettered.
    """
    from keven_core._native.dispatch import Route

    registry: HandlerRegistry = base.registry_of()
    routes: list[Route] = []
    bound: dict[str, Route] = {}
    _check_spelling(registry)
    wanted = registry.names() if names is None else _match_names(registry, names)
    if all_events and handler is not None:
        wanted = list(dict.fromkeys([*wanted, *Event.classes]))
    for name in wanted:
        handlers = registry.handlers_of(name)
        if handler is None and not handlers:
            continue
        composed = _composed(registry, handlers, base) if handler is None else _Composed(handler)
        tombstone = _tombstone_call(registry, handlers) if handler is None else None
        decode_json, decode_msgpack = event_decoders(name, bound=False)
        shared: dict[str, Any] = {
            "on_tombstone": tombstone,
            "tombstone_is_async": tombstone is not None and is_async(tombstone),
            **composed.options(),
        }
        call = composed.call
        routes.append(Route(name, call, decode_json=decode_json, decode_msgpack=decode_msgpack, **shared))
        decode_json, decode_msgpack = event_decoders(name, bound=True)
        bound[event_topic(name)] = Route(name, call, decode_json=decode_json, decode_msgpack=decode_msgpack, **shared)
    if names is None and handler is None:
        for topic in registry.foreign_topics():
            bound[topic] = _foreign_route(registry, base, topic)
    unnamed = None
    if all_events and handler is not None:
        decode_json, decode_msgpack = generic_decoders()
        unnamed = Route(
            "*", handler, decode_json=decode_json, decode_msgpack=decode_msgpack, is_async=is_async(handler)
        )
    return _make_table(routes, bound, unnamed, max_payload_bytes)


def _check_spelling(registry: HandlerRegistry) -> None:
    """Refuse handlers whose event has a class under another spelling: they would get generic events instead of it."""
    spelled = {folded(name): cls for name, cls in Event.classes.items()}
    for name in registry.names():
        cls = spelled.get(folded(name))
        if cls is not None and name not in Event.classes:
            raise RegistrationError(
                f"{registry.handlers_of(name)[0].qualified_name} is for {name!r} and the event class "
                f"{cls.__module__}.{cls.__qualname__} is {cls.event_name!r}: names that differ only in case, dots and "
                f"underscores collide"
            )


def _match_names(registry: HandlerRegistry, names: Iterable[str]) -> list[str]:
    # events_with_handlers() gives lower-case names, so those find the event that was registered in its own case.
    known = {name.lower(): name for name in (*Event.classes, *registry.names())}
    return [known.get(name.lower(), name) for name in names]


def _foreign_route(registry: HandlerRegistry, base: Any, topic: str) -> Route:
    from keven_core._native.dispatch import Route

    handlers = registry.handlers_of(topic, foreign=True)
    first = handlers[0]
    for other in handlers[1:]:
        if (other.value_type, other.codec) != (first.value_type, first.codec):
            raise RegistrationError(
                f"{first.qualified_name} and {other.qualified_name} read topic {topic!r} as different types: "
                f"handlers of one topic share value_type and codec"
            )
    composed = _composed(registry, handlers, base)
    call = composed.call
    tombstone = _tombstone_call(registry, handlers)
    shared: dict[str, Any] = {
        "on_tombstone": tombstone,
        "tombstone_is_async": tombstone is not None and is_async(tombstone),
        **composed.options(),
    }
    if first.value_type is bytes:
        return Route(topic, call, raw=True, **shared)
    decode_json, decode_msgpack = decoders_of(first.value_type)
    if first.codec == "json":
        decode_msgpack = decode_json
    elif first.codec == "msgpack":
        decode_json = decode_msgpack
    return Route(topic, call, decode_json=decode_json, decode_msgpack=decode_msgpack, **shared)


def runners_table(runners: list[Any], *, pass_topic: bool) -> DispatchTable:
    """The table of a user's own runners: every message goes to each of them, as bytes, without being decoded."""
    from keven_core._native.dispatch import DispatchTable, Route

    calls = [_run_of(runner) for runner in runners]
    if pass_topic:
        route = Route(
            "*", _call_each_with_topic(calls), raw=True, with_topic=True, is_async=any(is_async(call) for call in calls)
        )
    else:
        call = compose(calls, [], [])
        route = Route("*", call, raw=True, is_async=is_async(call))
    return DispatchTable((), everything=route)


def _run_of(runner: Any) -> Callable[..., Any]:
    """What to call for each message; async also for an EventRunner, whose run() is not but whose handlers may be."""
    run: Callable[..., Any] = getattr(runner, "run", runner)
    if not hasattr(runner, "dispatch_table") or not any(is_async(call) for call in runner.calls()):
        return run

    async def run_async(message: bytes, **topic: str) -> Any:
        result = run(message, **topic)
        return await result if isinstance(result, Awaitable) else result

    return run_async


def _call_each_with_topic(calls: list[Callable[..., Any]]) -> Callable[..., Any]:
    def call_all(message: bytes, topic: str) -> Any:
        return compose([_with_topic(call, topic) for call in calls], [], [])(message)

    return call_all


def _with_topic(call: Callable[..., Any], topic: str) -> Call:
    if is_async(call):

        async def call_async(message: bytes) -> Any:
            return await call(message, topic=topic)

        return call_async
    return lambda message: call(message, topic=topic)
