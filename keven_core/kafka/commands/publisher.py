"""`CommandPublisher`: publishes commands through a logger."""

from __future__ import annotations

from typing import Any

from keven_core.kafka.kinds import COMMANDS
from keven_core.kafka.publishers import MessagePublisher

__all__ = ["CommandPublisher"]


class CommandPublisher(MessagePublisher):
    """Writes commands with a logger: a KafkaLogger, a KafkaBatchLogger, or any object with log(data, topic=...)."""

    kind = COMMANDS

    def dispatch_command(self, command: Any, topic: str | None = None) -> None:
        """Publish a command: to `topic`, else to `keven_commands_<name>`.

        Blocks and raises as the logger's log(). Its key is the command's, so commands of one key stay in order.
        """
        self.publish(command, topic)
