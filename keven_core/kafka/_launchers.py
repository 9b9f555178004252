"""What the launchers of event servers and of command servers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from keven_core.kafka._launch import ServerProcess, launch
from keven_core.kafka._supervisor import launch_supervised
from keven_core.kafka.abstracts.consumer_server import KafkaConsumerServer
from keven_core.kafka.config import Settings
from keven_core.kafka.errors import ConfigurationError
from keven_core.kafka.kinds import MessageKind

__all__ = ["consumer", "default_topics", "launch_workers"]


def default_topics(kind: MessageKind) -> list[str]:
    """The common topic, and that of each name which has a handler."""
    return [kind.topic, *(kind.topic_of(name) for name in kind.registry.names())]


def consumer(
    kind: MessageKind, server_name: str, topics: Iterable[str] | None, defaults: list[str], options: dict[str, Any]
) -> KafkaConsumerServer:
    """A consumer with client and group id `server_name`; of `defaults` and the foreign topics, if `topics` is None."""
    server = KafkaConsumerServer(
        list(defaults) if topics is None else topics,
        client_id=options.pop("client_id", server_name),
        group_id=options.pop("group_id", server_name),
        **options,
    )
    if topics is None:
        # Topics of foreign handlers are named by the service, so they have to exist.
        server.topics += [t for t in kind.registry.foreign_topics() if t not in server.topics]
        server.optional_topics |= set(defaults)
    return server


def launch_workers(
    target: Callable[..., object],
    server_name: str,
    arguments: dict[str, Any],
    *,
    processes: int,
    supervised: bool | None,
) -> ServerProcess:
    """Run target(server_name=..., **arguments) in processes of its own, see start_events_receiver_process()."""
    if supervised is None:
        supervised = processes != 1
    elif not supervised and processes != 1:
        raise ConfigurationError(f"supervised=False goes with one process only, not with processes={processes!r:.80}")
    arguments = {"server_name": server_name, **arguments}
    if not supervised:
        return launch(server_name, target, arguments)
    # Found wrong here rather than in each worker.
    io_server = arguments["io_server"]
    settings = getattr(io_server, "settings", None) or arguments.get("settings") or Settings.from_env()
    max_poll_interval_s = getattr(io_server, "max_poll_interval", None) or arguments.get("max_poll_interval", 180)
    return launch_supervised(
        server_name,
        target,
        arguments,
        processes=processes,
        settings=settings,
        max_poll_interval_s=max_poll_interval_s,
    )
