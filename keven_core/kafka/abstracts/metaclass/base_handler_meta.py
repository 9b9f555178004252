"""The metaclass that registers handler classes as they are defined; events and commands share it."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from typing import Any, ClassVar

from keven_core.kafka.envelope import vars_in_mro
from keven_core.kafka.errors import RegistrationError
from keven_core.kafka.kinds import COMMANDS, EVENTS, MessageKind
from keven_core.kafka.registry import Handler
from keven_core.kafka.retry import policy_of
from keven_core.kafka.topics import check_topic

__all__ = ["BaseHandlerMeta", "register_handler"]

_LARGEST_BATCH = 100_000
_LONGEST_WAIT_MS = 3_600_000


class BaseHandlerMeta(ABCMeta):
    """Registers each class that names what it handles, unless its body says `auto_register = False`.

    A subclass says by its `kind` what that is: for EVENTS the attribute is `event_name`, the method `handle_event`. A
    class with `handle_batch` takes lists.
    """

    kind: ClassVar[MessageKind]
    batch_method: ClassVar[str] = "handle_batch"

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> None:
        """Register the class; raises RegistrationError."""
        super().__init__(name, bases, namespace, **options)
        meta = type(cls)
        handle_method = meta.handle_method()
        takes_lists = hasattr(cls, meta.batch_method)
        if takes_lists:
            cls.__abstractmethods__ = cls.__abstractmethods__ - {handle_method}
        if not any(isinstance(base, BaseHandlerMeta) for base in bases) or not namespace.get("auto_register", True):
            return
        message_name = getattr(cls, meta.kind.name_field, None)
        topic = getattr(cls, "topic", None)
        if message_name is None and topic is None:
            return
        where = f"{cls.__module__}.{cls.__qualname__}"
        if message_name is not None and topic is not None:
            raise RegistrationError(
                f"{where} has both {meta.kind.name_field} and topic: a handler is for {meta.kind.a_noun} or for a "
                f"foreign topic"
            )
        if takes_lists and not getattr(getattr(cls, handle_method), "__isabstractmethod__", False):
            raise RegistrationError(
                f"{where} defines both {handle_method} and {meta.batch_method}: a handler takes single "
                f"{meta.kind.noun}s, or in lists"
            )
        if getattr(cls, "__abstractmethods__", None):
            missing = ", ".join(sorted(cls.__abstractmethods__))
            raise RegistrationError(
                f"{where} is for {message_name or topic!r} but does not define {missing}; a base class that must not "
                f"be registered says `auto_register = False`"
            )
        register_handler(
            meta.kind,
            cls,
            message_name,
            topic=topic,
            value_type=getattr(cls, "value_type", None),
            codec=getattr(cls, "codec", None),
            retry_policy=getattr(cls, "retry_policy", None),
            batch_size=getattr(cls, "batch_size", None) if takes_lists else None,
            batch_wait_ms=getattr(cls, "batch_wait_ms", 0),
            long_running=getattr(cls, "long_running", False),
            delay_commands_and_events=getattr(cls, "delay_commands_and_events", True),
            capture_exception_handler=_plain(cls, "capture_exception_handler"),
        )

    @classmethod
    def handle_method(mcls) -> str:
        """The method that handles one event or command."""
        return f"handle_{mcls.kind.noun}"

    @staticmethod
    def get_event_registry() -> dict[str, list[Any]]:
        """Event name to its handler classes and functions, in registration order."""
        return _targets(EVENTS)

    @staticmethod
    def get_command_registry() -> dict[str, list[Any]]:
        """Command name to its handler classes and functions, in registration order."""
        return _targets(COMMANDS)


def _plain(cls: type, attribute: str) -> Any:
    """A function that is a class attribute, as it stands there: it is not to be given the instance."""
    found = vars_in_mro(cls, attribute)
    return found.__func__ if isinstance(found, staticmethod) else found


def _targets(kind: MessageKind) -> dict[str, list[Any]]:
    registry = kind.registry
    return {name: [handler.target for handler in registry.handlers_of(name)] for name in registry.names()}


def register_handler(
    kind: MessageKind,
    target: Any,
    message_name: object = None,
    *,
    topic: str | None = None,
    value_type: Any = None,
    codec: str | None = None,
    retry_policy: Any = None,
    batch_size: int | None = None,
    batch_wait_ms: int = 0,
    long_running: bool = False,
    delay_commands_and_events: bool = True,
    capture_exception_handler: Callable[[Exception], Any] | None = None,
) -> None:
    """Register a handler class or function for the name of an event or command, or for a foreign topic.

    Raises RegistrationError, and ConfigurationError for a topic name that Kafka does not accept.
    """
    where = f"{target.__module__}.{target.__qualname__}"
    options: dict[str, Any] = {
        "retry_policy": policy_of(retry_policy, where),
        "batch_size": 0 if batch_size is None else _within("batch_size", batch_size, 1, _LARGEST_BATCH, where),
        "batch_wait_ms": _within("batch_wait_ms", batch_wait_ms, 0, _LONGEST_WAIT_MS, where),
        "long_running": long_running,
        "delay_commands_and_events": delay_commands_and_events,
        "capture_exception_handler": capture_exception_handler,
    }
    if topic is None:
        name = kind.check_name(kind.name_of(message_name))
        kind.registry.register(Handler(name, target, **options))
        kind.named(name)
        return
    if codec not in (None, "json", "msgpack"):
        raise RegistrationError(f"codec {codec!r} of the handler for {topic!r}: 'json', 'msgpack' or None are allowed")
    kind.registry.register(
        Handler(
            check_topic(topic),
            target,
            foreign=True,
            value_type=bytes if value_type is None else value_type,
            codec=codec,
            **options,
        )
    )


def _within(name: str, value: Any, low: int, high: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RegistrationError(f"{name}={value!r:.80} of {where}: {low} to {high} is allowed")
    return value
