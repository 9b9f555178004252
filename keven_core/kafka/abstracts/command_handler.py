"""Handlers of commands: subclass `CommandHandler`, or decorate a function with `@command_handler(...)`.

    class Ship(CommandHandler):
        command_name = "SHIP_ORDER"

        def handle_command(self, command):
            ...

Everything that holds for handlers of events holds for these; but a command has one handler. A second one is called too,
with a warning, and is refused with KEVEN_STRICT=1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from keven_core.kafka._around import Around
from keven_core.kafka.abstracts.message_handler import MessageHandler, handler_decorator, share_long_running_method
from keven_core.kafka.abstracts.metaclass.base_handler_meta import BaseHandlerMeta, register_handler
from keven_core.kafka.commands.command import Command
from keven_core.kafka.commands.command_event import CommandPhase
from keven_core.kafka.commands.reports import Reports, is_reported, report_of
from keven_core.kafka.errors import UsageError
from keven_core.kafka.kinds import COMMANDS
from keven_core.kafka.retry import RetryPolicy

__all__ = [
    "CommandHandler",
    "CommandHandlerMeta",
    "LongRunningCommandHandler",
    "command_handler",
    "long_running_command_handler",
]

Function = TypeVar("Function", bound=Callable[..., Any])


class CommandHandlerMeta(BaseHandlerMeta):
    """Registers command handlers, by `command_name` or foreign `topic`."""

    kind = COMMANDS


class CommandHandler(MessageHandler, metaclass=CommandHandlerMeta):
    """Base of command handlers; MessageHandler has the further class attributes.

    `command_name` says what is handled: a str, a member of any str enum, or a CommandNames member. Around each call the
    server publishes the events that tell how far the command is (see keven_core.kafka.commands.command_event).
    """

    command_name: ClassVar[Any] = None
    command: Command | None = None

    @abstractmethod
    def handle_command(self, command: Any) -> Any:
        """Handle one command; may be `async def`. Called as EventHandler.handle_event() is."""

    @classmethod
    def register_function(cls, command_name: object, func: Callable[..., Any]) -> None:
        """Register a plain or async function as a handler of `command_name`."""
        register_handler(COMMANDS, func, command_name)

    @classmethod
    def handle_commands(cls, command: Any) -> Any:
        """Run the registered handlers of any object with a `command_name`, in this thread.

        Returns None; an awaitable when one of the handlers is async. Without a handler nothing happens.
        """
        return cls._handle(command)

    @classmethod
    def handle_all_commands(cls, command: Any) -> Any:
        """As handle_commands(): the handler that an all-commands server uses by default."""
        return cls._handle(command)

    @classmethod
    def commands_with_handlers(cls) -> list[str]:
        """Lower-case names of the commands that have a handler."""
        return cls.names_with_handlers()

    @classmethod
    def arounds_of(cls, name: str) -> list[Around]:
        """What stands around each handler: the reports."""
        return [Reports(name)] if is_reported(name) else []

    def start_event(self, get_old_event: bool = False) -> Any:
        """The event that says that the handler's command (see Command.create_handler) is started; not published.

        With `get_old_event` it has the older spelling of its name.
        """
        return report_of(self._own_command(), CommandPhase.STARTED, old_name=get_old_event)

    def error_event(self, get_old_event: bool = False, error: BaseException | None = None) -> Any:
        """The event that says that the handler's command has failed with `error`; else as start_event()."""
        return report_of(self._own_command(), CommandPhase.ERRORED, error, old_name=get_old_event)

    def complete_event(self, get_old_event: bool = False) -> Any:
        """The event that says that the handler's command is completed; else as start_event()."""
        return report_of(self._own_command(), CommandPhase.COMPLETED, old_name=get_old_event)

    def _own_command(self) -> Command:
        if self.command is None:
            raise UsageError(
                f"this {type(self).__qualname__} belongs to no command: command.create_handler() makes one that does"
            )
        return self.command


class LongRunningCommandHandler(CommandHandler):
    """Base of handlers that need so long for a command that the server has to poll meanwhile.

    A synchronous one runs in a worker thread, so that the server keeps its place in the group however long it takes.
    """

    auto_register = False
    long_running = True
    thread_manager: ClassVar[Any] = None  # the original's; not used

    @abstractmethod
    def long_running_handle_command(self, command: Any) -> Any:
        """Handle one command; as handle_command() otherwise, but for the thread."""

    def handle_command(self, command: Any) -> Any:
        """The same as long_running_handle_command()."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Make handle_command() the same method."""
        super().__init_subclass__(**options)
        share_long_running_method("command", cls)


def command_handler(
    command_name: object = None,
    delay_commands_and_events: bool = True,
    exception_handler: Callable[[Exception], Any] | None = None,
    *,
    topic: str | None = None,
    value_type: Any = None,
    codec: str | None = None,
    retry_policy: RetryPolicy | None = None,
    batch_size: int | None = None,
    batch_wait_ms: int = 100,
) -> Callable[[Function], Function]:
    """Register the decorated function, plain or async, for a command or a foreign topic; it stays callable as it is.

    Arguments and errors as the class attributes of CommandHandler (`exception_handler` is its
    `capture_exception_handler`); with a `batch_size` it takes lists.
    """
    return handler_decorator(
        COMMANDS,
        command_name,
        delay_commands_and_events=delay_commands_and_events,
        capture_exception_handler=exception_handler,
        topic=topic,
        value_type=value_type,
        codec=codec,
        retry_policy=retry_policy,
        batch_size=batch_size,
        batch_wait_ms=batch_wait_ms,
    )


def long_running_command_handler(
    command_name: object = None,
    delay_commands_and_events: bool = True,
    exception_handler: Callable[[Exception], Any] | None = None,
    **options: Any,
) -> Callable[[Function], Function]:
    """As command_handler(), for a function that needs so long that the server has to poll meanwhile."""
    return handler_decorator(
        COMMANDS,
        command_name,
        delay_commands_and_events=delay_commands_and_events,
        capture_exception_handler=exception_handler,
        long_running=True,
        **options,
    )
