"""Builds the dispatch table of a server from the registry: what a message costs is decided here, once.

An event with one handler and no hooks is routed straight to the bound method; hooks and further handlers are composed
into one call, so the hot path knows nothing of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Container, Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec

from keven_core.kafka._around import Around, CapturedExceptions, SettledFirst, surrounded
from keven_core.kafka._batches import BatchPart, compose_batch, one_of_a_batch
from keven_core.kafka._calls import Verdict, as_unary, is_async, run_now, run_or_await
from keven_core.kafka.codecs import codec_of, names_codec
from keven_core.kafka.envelope import name_decoders
from keven_core.kafka.errors import RegistrationError, UsageError
from keven_core.kafka.kinds import MessageKind
from keven_core.kafka.message import decoders_of, envelope_decoder, generic_decoders
from keven_core.kafka.publishing import begun_share, undelayed
from keven_core.kafka.registry import Handler, HandlerRegistry
from keven_core.kafka.topics import folded

if TYPE_CHECKING:
    from keven_core._native.dispatch import DispatchTable, Route

__all__ = ["build_table", "call_of", "compose", "handlers_call", "message_decoders", "runners_table"]

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
        outbox, published = begun_share()
        try:
            for hook in pre:
                run_now(hook, event)
        except Exception as error:
            verdict.hook_failed(error)
        else:
            for name, call in named:
                before = len(published)
                try:
                    run_now(call, event)
                    if outbox is not None and len(published) > before:
                        outbox.send()
                except Exception as error:
                    if outbox is not None:
                        outbox.drop(before)
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
        outbox, published = begun_share()
        try:
            for hook in pre:
                await run_or_await(hook, event)
        except Exception as error:
            verdict.hook_failed(error)
        else:
            for name, call in named:
                before = len(published)
                try:
                    await run_or_await(call, event)
                    if outbox is not None and len(published) > before:
                        outbox.send()
                except Exception as error:
                    if outbox is not None:
                        outbox.drop(before)
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


def call_of(registry: HandlerRegistry, handler: Handler) -> Call:
    """What a handler is called by: the bound method of its one instance, or the function that it is."""
    instance = registry.instance_of(handler)
    if not handler.is_class:
        function: Call = instance
        return function
    meta = type(handler.target)
    method: Call = getattr(instance, meta.batch_method if handler.batch_size else meta.handle_method())
    return method


def _arounds(base: Any, handler: Handler) -> list[Around]:
    arounds: list[Around] = [] if handler.foreign else base.arounds_of(handler.name)
    if handler.capture_exception_handler is not None:
        arounds.append(CapturedExceptions(handler.capture_exception_handler))
    return [*arounds, SettledFirst()] if arounds else []


def _composed(registry: HandlerRegistry, handlers: list[Handler], base: Any) -> _Composed:
    """Handlers in one call, with the hooks of `base` and of each handler class, each once."""
    parts: list[BatchPart] = []
    pre: list[Call] = list(base.hooks("_pre_hooks"))
    post: list[Call] = list(base.hooks("_post_hooks"))
    for handler in handlers:
        call = call_of(registry, handler)
        if not handler.delay_commands_and_events:
            call = undelayed(call)
        call = surrounded(call, _arounds(base, handler), takes_list=handler.batch_size > 0)
        if handler.is_class:
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


def handlers_call(base: Any, name: str, *, foreign: bool = False, only: Container[str] | None = None) -> Call | None:
    """The call of a name's or foreign topic's handlers for one message; None: none. `only`: of those so named."""
    registry: HandlerRegistry = base.registry_of()
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


def message_decoders(kind: MessageKind, name: str, *, bound: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(JSON, MessagePack) decode functions of an event or command: of its own class, or generic."""
    cls = kind.classes.get(name)
    if cls is not None:
        return decoders_of(cls)
    return generic_decoders(kind, name if bound else None)


def _alias_decoders(kind: MessageKind, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Decode functions of values that bear another spelling of a name. Rare, so simple rather than fast."""
    decode_json, decode_msgpack = message_decoders(kind, name, bound=True)

    def under(fields_of: Callable[..., Any], codec: Any, decode: Callable[..., Any]) -> Callable[..., Any]:
        return lambda data: decode(codec.encode({**fields_of(data), kind.name_field: name}))

    fields_json = msgspec.json.Decoder(dict[str, Any]).decode
    fields_msgpack = msgspec.msgpack.Decoder(dict[str, Any]).decode
    return under(fields_json, msgspec.json, decode_json), under(fields_msgpack, msgspec.msgpack, decode_msgpack)


def decode_any(kind: MessageKind, data: bytes) -> Any:
    """The event or command in the bytes of a message, whatever its name. Raises UndecodableError."""
    if not isinstance(data, bytes):
        raise UsageError(f"a message is decoded from bytes, not from {type(data).__name__}")
    return _any_table(kind).resolve(data)[1]


@cache  # bounded by the kinds
def _any_table(kind: MessageKind) -> DispatchTable:
    from keven_core._native.dispatch import Route

    def decode_as(codec: int) -> Call:
        # The class is looked up each time: more of them can be defined later.
        return lambda data: message_decoders(kind, names[codec](data) or "", bound=False)[codec](data)

    names = name_decoders(kind.name_field)
    route = Route(
        "*",
        lambda message: None,
        decode_json=decode_as(0),
        decode_msgpack=decode_as(1),
        decode_envelope=lambda name, *rest: envelope_decoder(kind, kind.name_of(name))(name, *rest),
    )
    return _make_table(kind, [], {}, route, 1 << 40)


def _make_table(
    kind: MessageKind, routes: list[Route], bound: dict[str, Route], unnamed: Route | None, max_payload_bytes: int
) -> DispatchTable:
    from keven_core._native.dispatch import DispatchTable

    name_json, name_msgpack = name_decoders(kind.name_field)
    return DispatchTable(
        routes,
        bound=bound,
        unnamed=unnamed,
        name_field=kind.name_field,
        name_json=name_json,
        name_msgpack=name_msgpack,
        codec_of=codec_of,
        names_codec=names_codec,
        max_payload_bytes=max_payload_bytes,
    )


def build_table(
    base: Any,
    *,
    names: Iterable[str] | None = None,
    handler: Call | None = None,
    all_messages: bool = False,
    max_payload_bytes: int = 16 << 20,
) -> DispatchTable:
    """The dispatch table of a server.

    Arguments:
        base: the handler base class, EventHandler or CommandHandler.
        names: what to dispatch; None: every name that has a handler, and the foreign topics.
        handler: one callable for all of them; None: the registered handlers.
        all_messages: with `handler`: it also gets messages that are not in `names`, as their class or generic.
        max_payload_bytes: larger values are dead-lettered.
    """
    from keven_core._native.dispatch import Route

    kind: MessageKind = base.kind_of()
    registry = kind.registry
    routes: list[Route] = []
    bound: dict[str, Route] = {}
    _check_spelling(kind)
    wanted = registry.names() if names is None else _match_names(kind, names)
    if all_messages and handler is not None:
        wanted = list(dict.fromkeys([*wanted, *kind.classes]))
    for name in wanted:
        handlers = registry.handlers_of(name)
        if handler is None and not handlers:
            continue
        composed = _composed(registry, handlers, base) if handler is None else _Composed(handler)
        tombstone = _tombstone_call(registry, handlers) if handler is None else None
        decode_json, decode_msgpack = message_decoders(kind, name, bound=False)
        shared: dict[str, Any] = {
            "on_tombstone": tombstone,
            "tombstone_is_async": tombstone is not None and is_async(tombstone),
            "decode_envelope": envelope_decoder(kind, name),
            **composed.options(),
        }
        call = composed.call
        routes.append(Route(name, call, decode_json=decode_json, decode_msgpack=decode_msgpack, **shared))
        decode_json, decode_msgpack = message_decoders(kind, name, bound=True)
        bound[kind.topic_of(name)] = Route(name, call, decode_json=decode_json, decode_msgpack=decode_msgpack, **shared)
        for alias in registry.aliases_of(name):
            decode_json, decode_msgpack = _alias_decoders(kind, name)
            route = Route(alias, call, decode_json=decode_json, decode_msgpack=decode_msgpack, **shared)
            routes.append(route)
            bound[kind.topic_of(alias)] = route
    if names is None and handler is None:
        for topic in registry.foreign_topics():
            bound[topic] = _foreign_route(registry, base, topic)
    unnamed = None
    if all_messages and handler is not None:
        decode_json, decode_msgpack = generic_decoders(kind)
        unnamed = Route(
            "*",
            handler,
            decode_json=decode_json,
            decode_msgpack=decode_msgpack,
            decode_envelope=envelope_decoder(kind, None),
            is_async=is_async(handler),
        )
    return _make_table(kind, routes, bound, unnamed, max_payload_bytes)


def _check_spelling(kind: MessageKind) -> None:
    """Refuse handlers whose event has a class under another spelling: they would get generic events instead of it."""
    spelled = {folded(name): (name, cls) for name, cls in kind.classes.items()}
    for name in kind.registry.names():
        class_name, cls = spelled.get(folded(name), (name, None))
        if class_name != name:
            raise RegistrationError(
                f"{kind.registry.handlers_of(name)[0].qualified_name} is for {name!r} and the {kind.noun} class "
                f"{cls.__module__}.{cls.__qualname__} is {class_name!r}: names that differ only in case, dots and "
                f"underscores collide"
            )


def _match_names(kind: MessageKind, names: Iterable[str]) -> list[str]:
    # events_with_handlers() gives lower-case names, so those find the event that was registered in its own case.
    known = {name.lower(): [name] for name in (*kind.classes, *kind.registry.names())}
    # One that has neither class nor handler may be spelled so, or as names usually are.
    found = (known.get(name.lower(), [name, name.upper()]) for name in names)
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


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
