"""Publishers: what writes events and commands, and which of them does so in a thread or task."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar

from keven_core.kafka.config import Settings
from keven_core.kafka.errors import UsageError
from keven_core.kafka.kinds import KINDS, MessageKind
from keven_core.kafka.message import Message

__all__ = [
    "METHODS",
    "MessagePublisher",
    "Unsent",
    "clear_publishers",
    "last_publisher",
    "one_by_one",
    "set_publisher",
    "write_to",
]

# Of messages that were not accepted: each with its error, or None when it was not tried any more.
Unsent = list[tuple[Message, "Exception | None"]]


class MessagePublisher:
    """Base of EventPublisher and CommandPublisher: writes messages of one kind with a logger.

    `logger` is a KafkaLogger, a KafkaBatchLogger, or any object with log(data, topic=...), which gets bytes.
    """

    kind: ClassVar[MessageKind]

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def publish(self, message: Any, topic: str | None = None) -> None:
        """Write a message: to `topic`, else to the audit topic if it says so, else to the topic of its name.

        Blocks and raises as the logger's log(). Its key is the message's, so that messages of one key stay in order.
        """
        self.logger.log(self._data(message), topic=topic or self.topic_of(message))

    def topic_of(self, message: Any) -> str:
        """The topic that a message goes to by itself."""
        # A publisher that is neither EventPublisher nor CommandPublisher goes by the message.
        kind: MessageKind | None = getattr(self, "kind", None) or getattr(message, "kind", None)
        if kind is None:
            raise UsageError(
                f"{type(self).__qualname__} can't tell whether a {type(message).__qualname__} is an event or a "
                f"command: use EventPublisher or CommandPublisher"
            )
        if kind.audit_topic is not None and getattr(message, "is_audit_event", False):
            return kind.audit_topic
        return kind.topic_of(kind.name_of(getattr(message, kind.name_field)))

    def _data(self, message: Any) -> Any:
        # A logger of ours encodes by itself, and takes the key from the message.
        return message if getattr(self.logger, "takes_messages", False) else message.serialize()

    def publish_all(self, messages: list[Message], *, wait: bool) -> Unsent:
        """Write messages in order; those that were not accepted come back.

        With `wait`, and a KafkaLogger, they are sent together and acknowledged when this returns.
        """
        if wait and hasattr(self.logger, "log_each") and self._is_plain():
            entries = [(message, self.topic_of(message), None) for message in messages]
            return [
                (message, error[0])
                for message, error in zip(messages, self.logger.log_each(entries), strict=True)
                if error is not None
            ]
        return one_by_one(getattr(self, METHODS[self.kind.noun]), messages)

    def _is_plain(self) -> bool:
        """Whether nothing has changed how a message is published: no subclass, and no stand-in for a method."""
        from keven_core.kafka.logger import KafkaLogger

        method = METHODS[self.kind.noun]
        steps = [
            (getattr(self, method), getattr(self.kind.publisher_class(), method)),
            (self.publish, MessagePublisher.publish),
            (self.logger.log, KafkaLogger.log),
        ]
        return all(getattr(step, "__func__", None) is usual for step, usual in steps)


# By noun: the method by which a publisher takes a message of that kind; that of a service needs no other.
METHODS = {"event": "log_event", "command": "dispatch_command"}


def one_by_one(method: Callable[[Any], Any], messages: list[Message]) -> Unsent:
    """Publish messages in order, up to the first that is not accepted; it and those behind it come back."""
    for position, message in enumerate(messages):
        try:
            method(message)
        except Exception as error:
            return [(message, error), *((later, None) for later in messages[position + 1 :])]
    return []


# By noun: the last clearing at the time, and the publisher.
_publishers: ContextVar[dict[str, tuple[object, Any]] | None] = ContextVar("keven_core.publishers", default=None)
_clearings = {kind.noun: object() for kind in KINDS}
_everywhere: dict[str, Any] = {}


def set_publisher(kind: MessageKind, publisher: Any, *, everywhere: bool = False) -> None:
    """Have messages of a kind published by `publisher` in this thread or task, and in what it starts with its context.

    With `everywhere` also in all threads and tasks that have none of their own. None takes it back. Raises UsageError
    for what lacks the method that publishes.
    """
    method = METHODS[kind.noun]
    if publisher is not None and not callable(getattr(publisher, method, None)):
        raise UsageError(
            f"{publisher!r:.80} has no {method}(), so it can't publish {kind.noun}s: "
            f"{kind.publisher_class().__name__}(logger) can"
        )
    if everywhere:
        _everywhere[kind.noun] = publisher
        return
    _publishers.set({**(_publishers.get() or {}), kind.noun: (_clearings[kind.noun], publisher)})


def clear_publishers(kind: MessageKind) -> None:
    """Forget all publishers of a kind that were set, in every thread; the default is made anew when needed."""
    _clearings[kind.noun] = object()
    _everywhere.pop(kind.noun, None)
    _by_environment.forget(kind)


def last_publisher(kind: MessageKind, *, acknowledged: bool = True) -> Any:
    """The publisher that was set last in this thread or task; else the one for everywhere; else the default.

    The default one writes with a KafkaLogger, whose log() returns when the message is acknowledged, or with a
    KafkaBatchLogger if that is not `acknowledged`. In a handler both write to the cluster that its server reads from,
    with its settings; elsewhere settings and address come from the environment.
    """
    cleared, own = (_publishers.get() or {}).get(kind.noun, (None, None))
    if own is not None and cleared is _clearings[kind.noun]:
        return own
    publisher = _everywhere.get(kind.noun)
    return publisher if publisher is not None else _defaults.get().publisher_of(kind, acknowledged)


class _Defaults:
    """The publishers that are used where none was set: made when they are first needed."""

    def __init__(self, settings: Settings | None = None, address: str | None = None) -> None:
        self._settings = settings
        self._address = address
        self._made: dict[tuple[str, bool], Any] = {}

    def publisher_of(self, kind: MessageKind, acknowledged: bool) -> Any:
        publisher = self._made.get((kind.noun, acknowledged))
        if publisher is None:
            from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger

            logger = (KafkaLogger if acknowledged else KafkaBatchLogger)(self._address, settings=self._settings)
            # setdefault is atomic, without a lock that a forked child could find locked: of threads that come here at
            # once, all get the publisher of the first.
            publisher = self._made.setdefault((kind.noun, acknowledged), kind.publisher_class()(logger))
        return publisher

    def forget(self, kind: MessageKind) -> None:
        for acknowledged in (True, False):
            self._made.pop((kind.noun, acknowledged), None)


_by_environment = _Defaults()
_defaults: ContextVar[_Defaults] = ContextVar("keven_core.default_publishers", default=_by_environment)


def write_to(settings: Settings, address: str) -> None:
    """From here on default publishers of this context write there: for a server, in the context of its handlers."""
    _defaults.set(_Defaults(settings, address))
