"""`EventPublisher`: publishes events through a logger."""

from __future__ import annotations

from typing import Any

from keven_core.kafka.kinds import EVENTS
from keven_core.kafka.publishers import MessagePublisher

__all__ = ["EventPublisher"]


class EventPublisher(MessagePublisher):
    """Writes events with a logger: a KafkaLogger, a KafkaBatchLogger, or any object with log(data, topic=...)."""

    kind = EVENTS

    def log_event(self, event: Any, topic: str | None = None) -> None:
        """Publish an event: to `topic`, else to the audit topic if it says so, else to `keven_events_<name>`.

        Blocks and raises as the logger's log(). Its key is the event's, so events of one key stay in order.
        """
        self.publish(event, topic)
