"""The metaclass that registers handler classes as they are defined; events and commands share it."""

from __future__ import annotations

from abc import ABCMeta
from typing import Any, ClassVar

from keven_core.kafka.envelope import name_of
from keven_core.kafka.errors import RegistrationError
from keven_core.kafka.registry import Handler, HandlerRegistry
from keven_core.kafka.retry import policy_of
from keven_core.kafka.topics import check_event_name, check_topic

__all__ = ["EVENT_REGISTRY", "BaseHandlerMeta", "register_handler"]

_LARGEST_BATCH = 100_000
_LONGEST_WAIT_MS = 3_600_000

EVENT_REGISTRY = HandlerRegistry("event")


class BaseHandlerMeta(ABCMeta):
    """Registers each class that names what it handles, unless its body says `auto_register = False`.

    A subclass says with `name_attribute` and `handle_method` which attribute names the event and which method handles
    it, and with `registry` where its classes go. A class with `handle_batch` takes lists.
    """

    name_attribute: ClassVar[str]
    handle_method: ClassVar[str]
    batch_method: ClassVar[str] = "handle_batch"
    registry: ClassVar[HandlerRegistry]

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> None:
        """Register the class; raises RegistrationError."""
        super().__init__(name, bases, namespace, **options)
        meta = type(cls)
        takes_lists = hasattr(cls, meta.batch_method)
        if takes_lists:
            cls.__abstractmethods__ = cls.__abstractmethods__ - {meta.handle_method}
        if not any(isinstance(base, BaseHandlerMeta) for base in bases) or not namespace.get("auto_register", True):
            return
        event_name = getattr(cls, meta.name_attribute, None)
        topic = getattr(cls, "topic", None)
        if event_name is None and topic is None:
            return
        where = f"{cls.__module__}.{cls.__qualname__}"
        if event_name is not None and topic is not None:
            raise RegistrationError(
                f"{where} has both {meta.name_attribute} and topic: a handler is for an event or for a foreign topic"
            )
        if takes_lists and not getattr(getattr(cls, meta.handle_method), "__isabstractmethod__", False):
            raise RegistrationError(
                f"{where} defines both {meta.handle_method} and {meta.batch_method}: a handler takes single events, "
                f"or in lists"
            )
        if getattr(cls, "__abstractmethods__", None):
            missing = ", ".join(sorted(cls.__abstractmethods__))
            raise RegistrationError(
                f"{where} is for {event_name or topic!r} but does not define {missing}; a base class that must not be "
                f"registered says `auto_register = False`"
            )
        register_handler(
            meta.registry,
            cls,
            event_name,
            topic=topic,
            value_type=getattr(cls, "value_type", None),
            codec=getattr(cls, "codec", None),
            retry_policy=getattr(cls, "retry_policy", None),
            batch_size=getattr(cls, "batch_size", None) if takes_lists else None,
            batch_wait_ms=getattr(cls, "batch_wait_ms", 0),
            long_running=getattr(cls, "long_running", False),
        )

    @staticmethod
    def get_event_registry() -> dict[str, list[Any]]:
        """Event name to its handler classes and functions, in registration order."""
        return {
            name: [handler.target for handler in EVENT_REGISTRY.handlers_of(name)] for name in EVENT_REGISTRY.names()
        }


def register_handler(
    registry: HandlerRegistry,
    target: Any,
    event_name: object = None,
    *,
    topic: str | None = None,
    value_type: Any = None,
    codec: str | None = None,
    retry_policy: Any = None,
    batch_size: int | None = None,
    batch_wait_ms: int = 0,
    long_running: bool = False,
) -> None:
    """Register a handler class or function for an event name, or for a foreign topic.

    Raises RegistrationError, and ConfigurationError for a topic name that Kafka does not accept.
    """
    where = f"{target.__module__}.{target.__qualname__}"
    kind: dict[str, Any] = {
        "retry_policy": policy_of(retry_policy, where),
        "batch_size": 0 if batch_size is None else _within("batch_size", batch_size, 1, _LARGEST_BATCH, where),
        "batch_wait_ms": _within("batch_wait_ms", batch_wait_ms, 0, _LONGEST_WAIT_MS, where),
        "long_running": long_running,
    }
    if topic is None:
        registry.register(Handler(check_event_name(name_of(event_name)), target, **kind))
        return
    if codec not in (None, "json", "msgpack"):
        raise RegistrationError(f"codec {codec!r} of the handler for {topic!r}: 'json', 'msgpack' or None are allowed")
    registry.register(
        Handler(
            check_topic(topic),
            target,
            foreign=True,
            value_type=bytes if value_type is None else value_type,
            codec=codec,
            **kind,
        )
    )


def _within(name: str, value: Any, low: int, high: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RegistrationError(f"{name}={value!r:.80} of {where}: {low} to {high} is allowed")
    return value
