"""Publishing commands: `keven_dispatch_command` and what belongs to it.

See keven_core.kafka.publishing for when a message goes out. All of these are per thread and per task.
"""

from __future__ import annotations

from typing import Any

from keven_core.kafka import publishers, publishing
from keven_core.kafka.kinds import COMMANDS

__all__ = [
    "clear_command_publishers",
    "dont_send_commands_on_commit",
    "get_write_cache",
    "keven_dispatch_command",
    "keven_dispatch_command_now",
    "keven_flush_command_cache",
    "last_publisher",
    "send_commands_on_commit",
    "set_publisher",
]


def keven_dispatch_command(command: Any) -> None:
    """Publish a command: with the handler, outbox() or on-commit cache that is in effect here, else at once.

    At once it is taken by a KafkaBatchLogger (or the publisher that was set) and not waited for. Raises UsageError for
    what is no command, and what the logger's log() raises.
    """
    publishing.publish(COMMANDS, command)


def keven_dispatch_command_now(command: Any) -> None:
    """Publish a command at once, past every cache; returns when the broker has acknowledged it.

    Blocks up to 30 s and raises as KafkaLogger.log(), or as the publisher that was set.
    """
    publishing.publish_now(COMMANDS, command)


def send_commands_on_commit() -> None:
    """From here on commands wait, in this thread or task, for keven_flush_command_cache()."""
    publishing.collect_on_commit(COMMANDS)


def dont_send_commands_on_commit() -> None:
    """From here on commands go out at once, in this thread or task. What waits already goes on waiting."""
    publishing.send_at_once(COMMANDS)


def keven_flush_command_cache() -> int:
    """Send the commands that wait in this thread or task; returns how many.

    Blocks until they are acknowledged, or not at all in a handler. Raises PublishError: what was not sent stays in the
    cache and goes out with the next flush.
    """
    return publishing.flush_cache(COMMANDS)


def get_write_cache() -> publishing.WriteCache:
    """The commands that wait in this thread or task, as a list; changing it changes what is sent."""
    return publishing.write_cache(COMMANDS)


def set_publisher(publisher: Any, *, everywhere: bool = False) -> None:
    """Have commands published by `publisher`, any object with dispatch_command(command), in this thread or task.

    What it starts with its context has it too, and so have the handlers of a server that it runs. With `everywhere`
    all threads and tasks have it that have set none of their own.
    """
    publishers.set_publisher(COMMANDS, publisher, everywhere=everywhere)


def last_publisher() -> Any:
    """The publisher that was set last; by default one with a KafkaLogger, made when it is first needed."""
    return publishers.last_publisher(COMMANDS)


def clear_command_publishers() -> None:
    """Forget the publishers that were set, in all threads and tasks."""
    publishers.clear_publishers(COMMANDS)
