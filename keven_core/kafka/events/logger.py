"""Publishing events: `keven_log_event` and what belongs to it.

See keven_core.kafka.publishing for when a message goes out. All of these are per thread and per task.
"""

from __future__ import annotations

from typing import Any

from keven_core.kafka import publishers, publishing
from keven_core.kafka.kinds import EVENTS

__all__ = [
    "keven_clear_event_publishers",
    "keven_dont_send_events_on_commit",
    "keven_flush_event_cache",
    "keven_get_write_cache",
    "keven_last_publisher",
    "keven_log_event",
    "keven_log_event_now",
    "keven_send_events_on_commit",
    "keven_set_publisher",
]


def keven_log_event(event: Any) -> None:
    """Publish an event: with the handler, outbox() or on-commit cache that is in effect here, else at once.

    At once it is taken by a KafkaBatchLogger (or the publisher that was set) and not waited for. Raises UsageError for
    what is no event, and what the logger's log() raises.
    """
    publishing.publish(EVENTS, event)


def keven_log_event_now(event: Any) -> None:
    """Publish an event at once, past every cache; returns when the broker has acknowledged it.

    Blocks up to 30 s and raises as KafkaLogger.log(), or as the publisher that was set.
    """
    publishing.publish_now(EVENTS, event)


def keven_send_events_on_commit() -> None:
    """From here on events wait, in this thread or task, for keven_flush_event_cache()."""
    publishing.collect_on_commit(EVENTS)


def keven_dont_send_events_on_commit() -> None:
    """From here on events go out at once, in this thread or task. What waits already goes on waiting."""
    publishing.send_at_once(EVENTS)


def keven_flush_event_cache() -> int:
    """Send the events that wait in this thread or task; returns how many.

    Blocks until they are acknowledged, or not at all in a handler. Raises PublishError: what was not sent stays in the
    cache and goes out with the next flush.
    """
    return publishing.flush_cache(EVENTS)


def keven_get_write_cache() -> publishing.WriteCache:
    """The events that wait in this thread or task, as a list; changing it changes what is sent."""
    return publishing.write_cache(EVENTS)


def keven_set_publisher(publisher: Any, *, everywhere: bool = False) -> None:
    """Have events published by `publisher`, any object with log_event(event), in this thread or task.

    What it starts with its context has it too, and so have the handlers of a server that it runs. With `everywhere`
    all threads and tasks have it that have set none of their own.
    """
    publishers.set_publisher(EVENTS, publisher, everywhere=everywhere)


def keven_last_publisher() -> Any:
    """The publisher that was set last; by default one with a KafkaLogger, made when it is first needed."""
    return publishers.last_publisher(EVENTS)


def keven_clear_event_publishers() -> None:
    """Forget the publishers that were set, in all threads and tasks."""
    publishers.clear_publishers(EVENTS)
