"""`EventPublisher`: publishes events through a logger."""

from __future__ import annotations

from typing import Any

from keven_core.kafka.events.event import Event
from keven_core.kafka.kinds import EVENTS
from keven_core.kafka.topics import AUDIT_TOPIC

__all__ = ["EventPublisher"]


class EventPublisher:
    """Writes events with a logger: a KafkaLogger, a KafkaBatchLogger, or any object with log(data, topic=...)."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def log_event(self, event: Event, topic: str | None = None) -> None:
        """Publish an event: to `topic`, else to the audit topic if it says so, else to `keven_events_<name>`.

        Blocks and raises as the logger's log(). Its key is the event's, so events of one key stay in order.
        """
        target = topic or (AUDIT_TOPIC if event.is_audit_event else EVENTS.topic_of(event.event_name))
        self.logger.log(event, topic=target)
