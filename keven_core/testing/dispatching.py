"""`dispatch(message)`: run the handlers of an event or command without a broker, and see what came of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from keven_core.kafka import record as record_module
from keven_core.kafka._batches import single_call
from keven_core.kafka._calls import check_done
from keven_core.kafka.abstracts.command_handler import CommandHandler
from keven_core.kafka.abstracts.event_handler import EventHandler
from keven_core.kafka.envelope import key_of
from keven_core.kafka.errors import UndecodableError
from keven_core.kafka.kinds import COMMANDS, EVENTS, MessageKind
from keven_core.kafka.message import Message
from keven_core.kafka.outcomes import Retry, Skip
from keven_core.kafka.publishing import HandlerOutbox
from keven_core.kafka.routing import build_table

__all__ = ["DispatchResult", "PublishedMessage", "dispatch"]


@dataclass(frozen=True)
class PublishedMessage:
    """A message that a handler wrote with a logger or publisher."""

    topic: str
    value: bytes | None
    key: bytes | None
    headers: list[tuple[str, bytes | None]]


@dataclass(frozen=True)
class DispatchResult:
    """What became of one event or command.

    Attributes:
        outcome: "done", "skipped" (no handler, or Skip), "retry" (a handler gave Retry) or "dead" (it failed: it would
            be dead-lettered, or retried where a policy says so).
        error: why it is not done: what a handler or hook raised, the Outcome it gave, or UndecodableError.
        published: what the handlers wrote meanwhile, in order.
    """

    outcome: str
    error: Exception | None = None
    published: list[PublishedMessage] = field(default_factory=list)


class _Given:
    def __init__(self, record: Any) -> None:
        self._record = record

    def record_in_hand(self) -> Any:
        return self._record


def dispatch(
    message: Message | bytes,
    *,
    topic: str | None = None,
    key: bytes | None = None,
    headers: list[tuple[str, bytes | None]] | None = None,
    codec: str = "json",
) -> DispatchResult:
    """Encode a message, decode it as a server would, run its handlers and hooks, and say what came of it.

    Arguments:
        message: an Event, a Command, or the bytes of one (of a command, if the topic is one of commands).
        topic: where it comes from; None: the message's own topic (bytes: `keven_events`).
        key, headers: of the record, for handlers that call current_record().
        codec: "json", "msgpack" or the name of a registered one.

    Async handlers run in an event loop of their own, so it can't be called inside one that runs. What handlers write
    with KafkaLogger, KafkaBatchLogger or EventPublisher is collected instead of sent.
    """
    from keven_core._native.logger import HandlerScope
    from keven_core._native.message import Record

    if isinstance(message, Message):
        kind = type(message).kind
        value = message.serialize(codec)
        key = key if key is not None else key_of(message)
        topic = topic or kind.topic_of(getattr(message, kind.name_field))
    else:
        value, topic = message, topic or EVENTS.topic
        kind = COMMANDS if topic.startswith(COMMANDS.topic) else EVENTS
    record = Record(topic, 0, 0, value=value, key=key, headers=headers)
    scope = HandlerScope(capture=True)
    entered = scope.enter()
    source = record_module._source.set(_Given(record))
    try:
        outcome, error = _run(_HANDLERS[kind], value, topic, headers)
    finally:
        record_module._source.reset(source)
        scope.leave(entered)
    return DispatchResult(outcome, error, [PublishedMessage(*written) for written in scope.captured or ()])


_HANDLERS: dict[MessageKind, Any] = {EVENTS: EventHandler, COMMANDS: CommandHandler}


def _run(handlers: Any, value: bytes, topic: str, headers: Any) -> tuple[str, Exception | None]:
    table = build_table(handlers)
    try:
        route, decoded = table.resolve(value, topic, headers)
    except UndecodableError as error:
        return "dead", error
    if route is None:
        return "skipped", None
    try:
        call = single_call(route)
        with HandlerOutbox():
            result = call(decoded)
            if route.is_async:
                result = asyncio.run(_wait_for(result))
            check_done(call, result)
    except Skip as skip:
        return "skipped", skip
    except Retry as retry:
        return "retry", retry
    except Exception as error:
        return "dead", error
    return "done", None


async def _wait_for(awaitable: Any) -> Any:
    return await awaitable
