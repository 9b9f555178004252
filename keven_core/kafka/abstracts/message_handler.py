"""What handlers of events and of commands share: registration, hooks, and calling them without a server."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from keven_core.kafka._around import Around
from keven_core.kafka._calls import as_unary
from keven_core.kafka.abstracts.metaclass.base_handler_meta import register_handler
from keven_core.kafka.errors import RegistrationError
from keven_core.kafka.kinds import MessageKind
from keven_core.kafka.publishing import handled
from keven_core.kafka.registry import HandlerRegistry
from keven_core.kafka.retry import RetryPolicy
from keven_core.kafka.routing import compose, handlers_call

if TYPE_CHECKING:
    from keven_core.kafka._launch import ServerProcess

__all__ = ["MessageHandler", "handler_decorator", "share_long_running_method"]

Function = TypeVar("Function", bound=Callable[..., Any])
Handler = TypeVar("Handler", bound="type[MessageHandler]")


class MessageHandler:
    """Base of EventHandler and CommandHandler, each of which has a metaclass that tells its kind.

    Class attributes:
        topic: instead of a name: a foreign topic, whose values are not envelopes.
        value_type: for a foreign topic: any type that msgspec decodes; bytes (the default): not decoded.
        codec: for a foreign topic: "json" or "msgpack"; None tells them apart by the first byte.
        retry_policy: a RetryPolicy for records that it fails to handle; None: see keven_core.kafka.retry.
        auto_register: False in a class body keeps that class out of the registry (for base classes).
        batch_size: for a handler of lists: how many messages at most; 500 by default.
        batch_wait_ms: for a handler of lists: how long, in milliseconds, its first message waits for others; 100 by
            default.
        delay_commands_and_events: what it publishes goes out only when it has succeeded; True by default.
        capture_exception_handler: a function that is shown each exception which it raises (and which is then handled
            as always), for an error tracker; None by default.

    A class that defines `handle_batch(self, messages)` instead of the method for one gets lists: in the order of their
    partitions, one list after the other (with order="none" several at once). It may be async. It returns None when all
    are done, or a list with None, an outcome or an exception for each of them; it may raise BatchError(index), or
    anything else: then all have failed.

    A class that also defines `handle_tombstone(self, record)` gets the records that have no value; else those are
    skipped and counted. `keven_core.kafka.record.current_record()` gives key, headers, timestamp and position.
    """

    topic: ClassVar[str | None] = None
    value_type: ClassVar[Any] = None
    codec: ClassVar[str | None] = None
    retry_policy: ClassVar[RetryPolicy | None] = None
    auto_register: ClassVar[bool] = True
    batch_size: ClassVar[int] = 500
    batch_wait_ms: ClassVar[int] = 100
    long_running: ClassVar[bool] = False
    delay_commands_and_events: ClassVar[bool] = True
    capture_exception_handler: ClassVar[Callable[[Exception], Any] | None] = None
    _pre_hooks: ClassVar[list[Callable[..., Any]]] = []
    _post_hooks: ClassVar[list[Callable[..., Any]]] = []

    @classmethod
    def register_pre_handler_hook(cls, func: Callable[..., Any]) -> None:
        """Call `func` before the handlers of each message: with the message if it takes an argument, else without.

        On EventHandler itself: for every event, on CommandHandler for every command; on a subclass: for those of that
        handler. A hook that raises is a
        failure of the record, whose handlers then do not run. Hooks are read when a server starts.
        """
        cls._own("_pre_hooks").append(func)

    @classmethod
    def register_post_handler_hook(cls, func: Callable[..., Any]) -> None:
        """Call `func` after the handlers of each message, also if one has raised; else as register_pre_handler_hook."""
        cls._own("_post_hooks").append(func)

    @classmethod
    def _own(cls, attribute: str) -> list[Callable[..., Any]]:
        if attribute not in vars(cls):
            setattr(cls, attribute, [])
        hooks: list[Callable[..., Any]] = vars(cls)[attribute]
        return hooks

    @classmethod
    def hooks(cls, attribute: str) -> list[Callable[..., Any]]:
        """Hooks of this class, those of its bases first; `attribute` is "_pre_hooks" or "_post_hooks"."""
        return [hook for base in reversed(cls.__mro__) for hook in vars(base).get(attribute, ())]

    @classmethod
    def execute_pre_handler_hooks(cls, message: Any = None) -> Any:
        """Run the pre-handler hooks that are registered on this class.

        Returns None; an awaitable when one of them is async.
        """
        return compose([], [as_unary(hook) for hook in cls.hooks("_pre_hooks")], [])(message)

    @classmethod
    def execute_post_handler_hooks(cls, message: Any = None) -> Any:
        """Run the post-handler hooks that are registered on this class, each also when one before it has raised.

        Returns None; an awaitable when one of them is async.
        """
        return compose([], [], [as_unary(hook) for hook in cls.hooks("_post_hooks")])(message)

    @classmethod
    def names_with_handlers(cls) -> list[str]:
        """Lower-case names of the events, or commands, that have a handler."""
        return [name.lower() for name in cls.registry_of().names()]

    @classmethod
    def get_handler_count(cls, name: object) -> int:
        """How many handlers an event or command has."""
        kind = cls.kind_of()
        return len(kind.registry.handlers_of(kind.name_of(name)))

    @classmethod
    def kind_of(cls) -> MessageKind:
        """Whether these are handlers of events or of commands."""
        kind: MessageKind = type(cls).kind  # type: ignore[attr-defined]  # of the metaclass of every subclass
        return kind

    @classmethod
    def registry_of(cls) -> HandlerRegistry:
        """The registry that this family of handlers belongs to."""
        return cls.kind_of().registry

    @classmethod
    def dispatchers(cls) -> tuple[Callable[[Any], Any], ...]:
        """The methods of the family that run the registered handlers, as `handle_events` does."""
        noun = cls.kind_of().noun
        return getattr(cls, f"handle_{noun}s"), getattr(cls, f"handle_all_{noun}s")

    @classmethod
    def arounds_of(cls, name: str) -> list[Around]:
        """What the family puts around each handler of a name."""
        return []

    @classmethod
    def create_handler_server_process(cls, name: str) -> ServerProcess:
        """Run the family's server in a process of its own, with `name` as client and group id; returns its handle.

        As start_events_receiver_process() or start_command_receiver_process() with their defaults.
        """
        from keven_core.kafka.commands.server import start_command_receiver_process
        from keven_core.kafka.events.server import start_events_receiver_process

        start = {"event": start_events_receiver_process, "command": start_command_receiver_process}
        return start[cls.kind_of().noun](name)

    @classmethod
    def _handle(cls, message: Any) -> Any:
        kind = cls.kind_of()
        call = handlers_call(cls, kind.name_of(getattr(message, kind.name_field)))
        return handled(call, message) if call is not None else None


def share_long_running_method(noun: str, cls: Any) -> None:
    """Make a subclass's handle_<noun> its long_running_handle_<noun>, so that it is async if that is."""
    if vars(cls).get("thread_manager") is not None:
        warnings.warn(
            f"{cls.__qualname__}.thread_manager is not used: the server runs long-running handlers in threads of its "
            f"own, as many as `workers` says; remove it",
            DeprecationWarning,
            stacklevel=3,
        )
    own = vars(cls).get(f"long_running_handle_{noun}")
    if own is not None:
        setattr(cls, f"handle_{noun}", own)


def handler_decorator(kind: MessageKind, name: object, **options: Any) -> Callable[[Function], Function]:
    """What registers the decorated function for a name, or for options["topic"]; it stays callable as it is."""
    decorator = f"@{kind.noun}_handler"
    topic = options.get("topic")
    if (name is None) == (topic is None):
        raise RegistrationError(f"{decorator} takes {kind.a_noun} name or topic=..., and not both")
    if topic is None:
        kind.name_of(name)  # at once: without parentheses the function itself would be taken for the name

    def decorate(func: Function) -> Function:
        register_handler(kind, func, name, **options)
        return func

    return decorate
