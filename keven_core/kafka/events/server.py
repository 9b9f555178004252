"""Launchers of event servers: sync (blocks), async (a coroutine), or a process of its own.

    from keven_core.kafka.events.server import start_events_receiver_server

    start_events_receiver_server(server_name="my_event_server")

Import the modules that define the handlers first: the dispatch table is built when the server starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from keven_core.kafka._launch import ServerProcess
from keven_core.kafka._launchers import default_topics, io_server_of, launch_workers
from keven_core.kafka.abstracts.event_handler import EventHandler
from keven_core.kafka.abstracts.eventreceiver_server import AllEventsReceiverServer, EventReceiverServer
from keven_core.kafka.kinds import EVENTS
from keven_core.kafka.topics import AUDIT_TOPIC, EVENTS_TOPIC

__all__ = [
    "setup_event_listener",
    "start_all_events_receiver_server",
    "start_all_events_receiver_server_async",
    "start_events_receiver_process",
    "start_events_receiver_server",
    "start_events_receiver_server_async",
]


def setup_event_listener(
    auto_reprocess_errors: bool = False,
    io_server: Any = None,
    server_name: str = "keven",
    timeout: float | None = None,
    reraise_exceptions: bool = False,
    log_exceptions: bool = True,
    topics: Iterable[str] | None = None,
    **options: Any,
) -> EventReceiverServer:
    """Make, but do not start, a server of the registered handlers.

    Arguments:
        io_server: a server of the service's own; None: a KafkaConsumerServer with client and group id `server_name`.
            With one, arguments that say otherwise than its attributes are ignored, with a DeprecationWarning.
        topics: None: `keven_events` and `keven_events.audit`.
        options: further keyword arguments of KafkaConsumerServer; the other arguments are among them too.
    """
    options.update(
        auto_reprocess_errors=auto_reprocess_errors,
        timeout=timeout,
        reraise_exceptions=reraise_exceptions,
        log_exceptions=log_exceptions,
    )
    return _events_server(server_name, io_server, topics, [EVENTS_TOPIC, AUDIT_TOPIC], options)


def _events_server(
    server_name: str, io_server: Any, topics: Iterable[str] | None, defaults: list[str], options: dict[str, Any]
) -> EventReceiverServer:
    io_server = io_server_of(EVENTS, server_name, io_server, topics, defaults, options)
    return EventReceiverServer(io_server, None, EventHandler.handle_events)


def start_events_receiver_server(
    server_name: str,
    io_server: Any = None,
    auto_reprocess_errors: bool = False,
    *,
    topics: Iterable[str] | None = None,
    **options: Any,
) -> None:
    """Run the registered handlers in this thread until the server ends; blocks.

    Arguments:
        server_name: client id and consumer group.
        io_server: as setup_event_listener() has it.
        auto_reprocess_errors: see KafkaConsumerServer.
        topics: None: `keven_events`, `keven_events_<name>` of each event that has a handler, and foreign topics.
        options: further keyword arguments of KafkaConsumerServer.

    SIGTERM and Ctrl-C finish the batch in hand, commit and leave the group; then it returns. Raises CommitError when
    the last commit could not be confirmed (a script ends with exit code 4), DrainError when an async handler had to be
    cut off (3: KEVEN_DRAIN_TIMEOUT_MS had passed, 5: a second signal came).
    """
    options["auto_reprocess_errors"] = auto_reprocess_errors
    _events_server(server_name, io_server, topics, default_topics(EVENTS), options).start_sync()


async def start_events_receiver_server_async(
    server_name: str,
    io_server: Any = None,
    auto_reprocess_errors: bool = False,
    *,
    topics: Iterable[str] | None = None,
    **options: Any,
) -> None:
    """As start_events_receiver_server(), in the running event loop; cancelling it stops the server in order.

    The loop is the caller's: `uvloop.run(start_events_receiver_server_async(...))` is the fast one.
    """
    options["auto_reprocess_errors"] = auto_reprocess_errors
    await _events_server(server_name, io_server, topics, default_topics(EVENTS), options).start()


def start_events_receiver_process(
    server_name: str,
    io_server: Any = None,
    auto_reprocess_errors: bool = False,
    *,
    topics: Iterable[str] | None = None,
    processes: int = 1,
    supervised: bool | None = None,
    **options: Any,
) -> ServerProcess:
    """Run start_events_receiver_server() in processes of its own; returns the handle of one at once.

    Arguments:
        processes: how many workers share the partitions.
        supervised: whether they have a supervisor; None: when they are several. A single worker without one is the
            handle's process itself.
        io_server, auto_reprocess_errors, topics, options: as start_events_receiver_server() has them, for each worker.

    A supervisor replaces workers that die, that make no progress for KEVEN_WORKER_HANG_MS, or that take more than
    KEVEN_WORKER_MEMORY_BYTES of memory. A record that three of them have died with is dead-lettered, as
    WorkerDiedError. The handle is then the supervisor's: terminate() ends all workers in order, and those that need 3 s
    longer than KEVEN_DRAIN_TIMEOUT_MS and KEVEN_CLOSE_TIMEOUT_MS together are killed; exitcode is 0 when all have ended
    in order. Whatever ends the supervisor, its workers outlive it by less than 5 s.

    The process imports the main script (or module) again to find the handlers; there, this very call ends the import,
    so handlers have to be defined or imported above it. No `__main__` guard is needed. Arguments must be picklable.
    Raises LaunchError under `python -c`, from standard input and in notebooks, and ConfigurationError for wrong
    arguments.
    """
    arguments = {
        "io_server": io_server,
        "auto_reprocess_errors": auto_reprocess_errors,
        "topics": None if topics is None else list(topics),
        **options,
    }
    return launch_workers(
        start_events_receiver_server, server_name, arguments, processes=processes, supervised=supervised
    )


def _all_events_server(
    server_name: str,
    io_server: Any,
    include_audit: bool,
    event_handler: Callable[[Any], Any] | None,
    options: dict[str, Any],
) -> Any:
    topics = [EVENTS_TOPIC, EVENTS.all_topics_pattern] + ([AUDIT_TOPIC] if include_audit else [])
    options["include_audit"] = include_audit
    io_server = io_server_of(EVENTS, server_name, io_server, None, topics, options)
    return AllEventsReceiverServer(io_server, event_handler)


def start_all_events_receiver_server(
    server_name: str,
    io_server: Any = None,
    include_audit: bool = False,
    *,
    event_handler: Callable[[Any], Any] | None = None,
    **options: Any,
) -> None:
    """Run a server of every event: `keven_events`, `^keven_events_.*` and, with `include_audit`, the audit topic.

    `event_handler` gets each event, those without a class as generic events; None: the registered handlers. Else as
    start_events_receiver_server().
    """
    _all_events_server(server_name, io_server, include_audit, event_handler, options).start_sync()


async def start_all_events_receiver_server_async(
    server_name: str,
    io_server: Any = None,
    include_audit: bool = False,
    *,
    event_handler: Callable[[Any], Any] | None = None,
    **options: Any,
) -> None:
    """As start_all_events_receiver_server(), in the running event loop."""
    await _all_events_server(server_name, io_server, include_audit, event_handler, options).start()
