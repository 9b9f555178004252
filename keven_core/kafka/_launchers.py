"""What the launchers of event servers and of command servers share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from keven_core.kafka._launch import ServerProcess, launch
from keven_core.kafka._supervisor import launch_supervised
from keven_core.kafka.abstracts.consumer_server import KafkaConsumerServer
from keven_core.kafka.config import Settings
from keven_core.kafka.errors import ConfigurationError
from keven_core.kafka.kinds import MessageKind

__all__ = ["default_topics", "io_server_of", "launch_workers"]

# What the launchers' arguments are when nobody has given them.
_DEFAULTS = {
    "auto_reprocess_errors": False,
    "include_audit": False,
    "log_exceptions": True,
    "max_poll_interval": 180,
    "reraise_exceptions": False,
    "timeout": None,
    "topics": None,
}
_NOT_THERE = object()


def default_topics(kind: MessageKind) -> list[str]:
    """The common topic, and that of each name which has a handler."""
    return [kind.topic, *(kind.topic_of(name) for name in kind.registry.names())]


def io_server_of(
    kind: MessageKind,
    server_name: str,
    io_server: Any,
    topics: Iterable[str] | None,
    defaults: list[str],
    options: dict[str, Any],
) -> Any:
    """The io_server that a launcher was given; else a consumer with client and group id `server_name`.

    That one is of `defaults` and the foreign topics, if `topics` is None. To be called by what a launcher calls: the
    warning names the launcher's caller.
    """
    if io_server is not None:
        _warn_of_ignored(io_server, {**options, "topics": topics})
        return io_server
    options.pop("include_audit", None)  # it is in `defaults`
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


def _warn_of_ignored(io_server: Any, options: dict[str, Any]) -> None:
    ignored = [
        f"{name}={value!r:.80}"
        for name, value in options.items()
        if value != _DEFAULTS.get(name, _NOT_THERE) and value != getattr(io_server, name, _NOT_THERE)
    ]
    if ignored:
        warnings.warn(
            f"{', '.join(ignored)} is ignored, as an io_server is given: set it on the {type(io_server).__qualname__}, "
            f"or leave io_server out",
            DeprecationWarning,
            stacklevel=5,
        )


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
