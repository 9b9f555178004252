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

EVENT_REGISTRY = HandlerRegistry("event")


class BaseHandlerMeta(ABCMeta):
    """Registers each class that names what it handles, unless its body says `auto_register = False`.

    A subclass says with `name_attribute` and `handle_method` which attribute names the event and which method handles
    it, and with `registry` where its classes go.
    """

    name_attribute: ClassVar[str]
    handle_method: ClassVar[str]
    registry: ClassVar[HandlerRegistry]

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> None:
        """Register the class; raises RegistrationError."""
        super().__init__(name, bases, namespace, **options)
        meta = type(cls)
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
) -> None:
    """Register a handler class or function for an event name, or for a foreign topic.

    Raises RegistrationError, and ConfigurationError for a topic name that Kafka does not accept.
    """
    policy = policy_of(retry_policy, f"{target.__module__}.{target.__qualname__}")
    if topic is None:
        registry.register(Handler(check_event_name(name_of(event_name)), target, retry_policy=policy))
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
            retry_policy=policy,
        )
    )
