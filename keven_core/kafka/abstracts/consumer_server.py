"""`KafkaConsumerServer`: consumes topics and hands each message to its runners, sync or async, embedded or launched."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from datetime import datetime
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from keven_core.kafka import _supervised
from keven_core.kafka._calls import is_async
from keven_core.kafka._drivers import run_async, run_sync
from keven_core.kafka._exits import exit_with_its_code
from keven_core.kafka._plan import FlowPlan, Order, PartitionHook, Plan, StartPosition, TopicPartition
from keven_core.kafka._session import Session
from keven_core.kafka.config import DEFAULT_ADDRESS, Settings
from keven_core.kafka.errors import ClosedError, ConfigurationError, UsageError
from keven_core.kafka.retry import Policies, RetryPolicy, detail_policies
from keven_core.kafka.routing import runners_table
from keven_core.kafka.topics import check_topic, dead_letter_topic, retry_topic

if TYPE_CHECKING:
    from keven_core._native.dispatch import DispatchTable

__all__ = ["KafkaConsumerServer", "PrintRunner", "Runner", "TopicPartition"]

logger = logging.getLogger("keven_core.kafka")

# max_retries and retry_interval (s) that nobody has chosen.
_DEFAULT_RETRY = (3, 30)

# Of a server whose handlers are synchronous, unless it is told how many.
_MOST_THREADS = 16


class Runner(ABC):
    """What a server hands its messages to. Any object with `run`, or a callable, will do as well."""

    @abstractmethod
    def run(self, message: bytes, topic: str | None = None) -> Any:
        """Handle one message; may be `async def`.

        Called in the server's thread or event loop, in order within a partition. `topic` is given when the server was
        made with pass_topic_param=True. An exception sends the record to the dead-letter topic.
        """


class PrintRunner(Runner):
    """Prints each message."""

    def run(self, message: bytes, topic: str | None = None) -> None:
        """Print the message, and its topic if given."""
        print(f"{topic}: {message!r}" if topic else repr(message))


class KafkaConsumerServer:
    """A Kafka consumer that hands every message to its runners.

    Arguments:
        topics: names, or regular expressions that start with ^.
        bootstrap_servers: host:port, comma-separated; the environment variable KAFKA wins, see `honor_env`.
        client_id: names the client, and its retry and dead-letter topics.
        group_id: the consumer group; the client id by default.
        runners: what handles the messages: objects with run(message), callables, or one EventRunner.
        pass_topic_param: runners are called run(message, topic=...).
        auto_reprocess_errors: True: a failed record is tried again by way of the server's retry topic; False: it is
            dead-lettered at once, unless its handler or event has a `retry_policy`.
        retry_interval: seconds until then. Like the next two it means nothing without auto_reprocess_errors, which is
            warned about.
        max_retries: how often; then it is dead-lettered.
        retry_detail: the same two by topic: {topic: {"retry_interval": seconds, "max_retries": number}}, or
            {topic: RetryPolicy}.
        no_commit: offsets are neither stored nor committed: every run starts where the last commit was.
        timeout: seconds without any message after which the server ends; None: never.
        reraise_exceptions: a runner's exception ends the server, after its record was dead-lettered.
        log_exceptions: whether failed records are logged.
        max_poll_interval: seconds that a batch may take before the group gives its partitions away.
        session_timeout, heartbeat_interval: seconds; left out under the new group protocol.
        on_assign_topics: called on_assign_topics(server, partitions) when partitions are assigned; it may change the
            `offset` of each to say where to start.
        settings: a Settings object; None: from the environment when the server starts.
        honor_env: False: `bootstrap_servers` wins over KAFKA.
        start: where to start the first time a partition is assigned: "stored" (the committed offset), "earliest",
            "latest", an aware datetime, or a mapping of (topic, partition) to offset.
        until_end: end the run when everything that was there at its start has been handled.
        order: what is handled one after the other: the records of a "partition"; those of a "key" in a partition
            (records without one: in no order); "none": nothing is.
        max_in_flight: how many records may be handled at the same time; None: KEVEN_MAX_IN_FLIGHT, or as many as the
            workers; else one, with order="key" or "none" 100. With async handlers that is the number of worker tasks.
        workers: threads for synchronous handlers; None: KEVEN_WORKERS, or none while max_in_flight is one and up to 16
            else. Without any they run in the server's own thread, one after the other.
        use_group: False: read all partitions of the topics without joining a group; nothing is committed.
        on_assign, on_revoke, on_lost: functions, sync or async, called hook(server, partitions) when the server has got
            partitions and placed their offsets, but handled nothing of them yet; when it gives partitions up, also at
            its end, after what was in hand of them was handled and committed; instead of that when they are lost
            already, so that nothing of them can be committed. See below.
        on_start, on_stop: functions without arguments, sync or async, called before the first message and after the
            last; on_stop also when the run failed.

    However many are in flight, an offset is committed only when all records before it are done. While handlers run in
    workers the server goes on polling, so that they may take as long as they like.

    Retries hold nothing up: the record's copy waits in `kafka_server.<client_id>.retry`, the records behind it are
    handled meanwhile. See keven_core.kafka.retry for policies, keven_core.kafka.outcomes for what handlers can ask for.

    Partition hooks see lists of TopicPartition, those of the server's retry topic among them. Each partition that
    on_assign was called for is handed to one of on_revoke and on_lost, once. They run in the server's thread or event
    loop, and polling stands still meanwhile, so they have to be done within max_poll_interval. An exception ends the
    server in order and is raised at its end.

    Run it with start_sync() or `await run_server()`; or embed it: `with server:` runs it in a thread, `async with
    server:` in a task. stop() ends it, from any thread, in order: finish the batch in hand, commit, leave the group.
    Raises ConfigurationError when an argument is wrong.

    Handlers may run for KEVEN_DRAIN_TIMEOUT_MS then; after half of it nothing of the batch is begun any more, but left
    for the next server. Past it an async handler is cancelled (DrainError names its record, which is neither done nor
    failed); a sync one can't be, so the server ends when it returns, and says meanwhile what it waits for.
    """

    def __init__(
        self,
        topics: str | Iterable[str],
        bootstrap_servers: str = DEFAULT_ADDRESS,
        client_id: str | None = None,
        group_id: str | None = None,
        runners: Iterable[Any] | None = None,
        pass_topic_param: bool = False,
        auto_reprocess_errors: bool = False,
        retry_interval: float = 30,
        max_retries: int = 3,
        no_commit: bool = False,
        timeout: float | None = None,
        reraise_exceptions: bool = False,
        log_exceptions: bool = True,
        max_poll_interval: float = 180,
        session_timeout: float = 6,
        heartbeat_interval: float = 2,
        retry_detail: Mapping[str, RetryPolicy | Mapping[str, Any]] | None = None,
        on_assign_topics: PartitionHook | None = None,
        *,
        settings: Settings | None = None,
        honor_env: bool = True,
        start: StartPosition = "stored",
        until_end: bool = False,
        use_group: bool = True,
        order: Order = "partition",
        max_in_flight: int | None = None,
        workers: int | None = None,
        on_assign: PartitionHook | None = None,
        on_revoke: PartitionHook | None = None,
        on_lost: PartitionHook | None = None,
        on_start: Callable[[], Any] | Iterable[Callable[[], Any]] = (),
        on_stop: Callable[[], Any] | Iterable[Callable[[], Any]] = (),
    ) -> None:
        self.topics = [topics] if isinstance(topics, str) else list(topics)
        for topic in self.topics:
            check_topic(topic, pattern_allowed=True)
        self.bootstrap_servers = bootstrap_servers
        self.client_id = client_id or group_id or "keven"
        self.group_id = group_id or self.client_id
        self.runners: list[Any] = list(runners or ())
        self.pass_topic_param = pass_topic_param
        self.auto_reprocess_errors = auto_reprocess_errors
        self.retry_interval = retry_interval
        self.max_retries = max_retries
        self.no_commit = no_commit
        self.timeout = timeout
        self.reraise_exceptions = reraise_exceptions
        self.log_exceptions = log_exceptions
        if heartbeat_interval * 2 > session_timeout:
            raise ConfigurationError(
                f"heartbeat_interval={heartbeat_interval} s is too long for session_timeout={session_timeout} s: at "
                f"most half of it is allowed, a third is usual, or one lost heartbeat costs the membership"
            )
        self.max_poll_interval = max_poll_interval
        self.session_timeout = session_timeout
        self.heartbeat_interval = heartbeat_interval
        self.retry_detail = dict(retry_detail or {})
        self.on_assign_topics = on_assign_topics
        self.settings = settings
        self.honor_env = honor_env
        self.start_position = _check_start(start)
        self.until_end = until_end
        self.use_group = use_group
        if order not in ("partition", "key", "none"):
            raise ConfigurationError(f"order={order!r:.80}: 'partition', 'key' or 'none' is allowed")
        self.order: Order = order
        self.max_in_flight = _check_number("max_in_flight", max_in_flight, 1, 100_000)
        self.workers = _check_number("workers", workers, 0, 1000)
        self.on_assign = on_assign
        self.on_revoke = on_revoke
        self.on_lost = on_lost
        self.on_start = _hooks(on_start)
        self.on_stop = _hooks(on_stop)
        # Default topics, which are created when missing; launchers add theirs.
        self.optional_topics: set[str] = set()
        self._session: Session | None = None
        self._last_session: Session | None = None
        self._stop_requested = False
        self._thread: threading.Thread | None = None
        self._task: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None

    # --- before the run ----------------------------------------------------------------------------------------------

    def add_runner(self, runner: Any) -> None:
        """Add a runner; before the server starts."""
        self.runners.append(runner)

    def _plan(self) -> Plan:
        if not self.topics:
            raise ConfigurationError("the server has no topics to consume")
        if not self.runners:
            raise ConfigurationError("the server has no runner: give runners=[...] or call add_runner()")
        settings = self.settings if self.settings is not None else Settings.from_env()
        policies = self._policies()
        waiting = retry_topic(self.client_id)
        table = self._table(settings)
        return Plan(
            settings=settings,
            address=settings.address(self.bootstrap_servers, honor_env=self.honor_env),
            topics=[*self.topics, waiting] if policies.any_by_topic else self.topics,
            optional_topics=self.optional_topics,
            written_topics=self._written_topics(),
            client_id=self.client_id,
            group_id=self.group_id,
            table=table,
            dead_letter_topic=dead_letter_topic(self.client_id),
            retry_topic=waiting,
            policies=policies,
            some_handlers=self._some_handlers,
            flow=self._flow_plan(settings, table, policies),
            use_group=self.use_group,
            start=self.start_position,
            until_end=self.until_end,
            no_commit=self.no_commit,
            timeout_s=self.timeout,
            reraise_exceptions=self.reraise_exceptions,
            log_exceptions=self.log_exceptions,
            max_poll_interval_s=self.max_poll_interval,
            session_timeout_s=self.session_timeout,
            heartbeat_interval_s=self.heartbeat_interval,
            on_assign_topics=self.on_assign_topics,
            on_assign=self.on_assign,
            on_revoke=self.on_revoke,
            on_lost=self.on_lost,
            on_start=self.on_start,
            on_stop=self.on_stop,
        )

    def _policies(self) -> Policies:
        """Which failed records are retried. Without committed offsets none: each run would begin with all of them."""
        runner = self._routing_runner()
        default = RetryPolicy(self.max_retries, self.retry_interval)
        given = self.retry_detail or (self.max_retries, self.retry_interval) != _DEFAULT_RETRY
        if given and not self.auto_reprocess_errors:
            logger.warning(
                "%s was given max_retries, retry_interval or retry_detail, which mean nothing without "
                "auto_reprocess_errors=True: what fails is dead-lettered at once",
                self.client_id,
            )
        policies = Policies(
            default if self.auto_reprocess_errors else None,
            detail_policies(self.retry_detail, default) if self.auto_reprocess_errors else None,
            runner.policies() if runner is not None and hasattr(runner, "policies") else None,
        )
        if policies and (self.no_commit or not self.use_group):
            logger.warning(
                "%s commits no offsets, so failed records are not retried but dead-lettered at once", self.client_id
            )
            return Policies()
        return policies

    def _flow_plan(self, settings: Settings, table: DispatchTable, policies: Policies) -> FlowPlan | None:
        """How several records are handled at once; None: they are not, and nothing else needs it."""
        runner = self._routing_runner()
        everything = [table.everything, table.unnamed]
        routes = [*table.routes.values(), *table.bound.values(), *(route for route in everything if route is not None)]
        largest_batch = max((route.batch_size for route in routes), default=0)
        threads = settings.workers if self.workers is None else self.workers
        if threads == 0 and runner is not None and hasattr(runner, "blocks_long") and runner.blocks_long():
            threads = 1
        in_flight = settings.max_in_flight if self.max_in_flight is None else self.max_in_flight
        if in_flight == 0:
            in_flight = threads or (1 if self.order == "partition" else 100)
        if in_flight == 1 and threads == 0 and not largest_batch and not policies.any_in_place:
            return None
        window = max(2000, 4 * in_flight, 4 * largest_batch)
        if threads == 0 and in_flight > 1 and not self.needs_loop():
            threads = _MOST_THREADS
        return FlowPlan(self.order, tasks=in_flight, threads=min(threads, in_flight), window=window)

    def _some_handlers(self, name: str, handlers: tuple[str, ...]) -> Callable[[Any], Any] | None:
        runner = self._routing_runner()
        call: Callable[[Any], Any] | None = None
        if runner is not None and hasattr(runner, "some_handlers"):
            call = runner.some_handlers(name, handlers)
        return call

    def _routing_runner(self) -> Any:
        """The runner whose table is dispatched compiled, if there is one."""
        tables = [runner for runner in self.runners if hasattr(runner, "dispatch_table")]
        return tables[0] if tables and len(self.runners) == 1 and not self.pass_topic_param else None

    def _written_topics(self) -> list[str]:
        runner = self._routing_runner()
        return runner.written_topics() if runner is not None and hasattr(runner, "written_topics") else []

    def _table(self, settings: Settings) -> Any:
        runner = self._routing_runner()
        if runner is not None:
            # The compiled path: the runner says what it dispatches, and is not called per message.
            return runner.dispatch_table(settings)
        return runners_table(self.runners, pass_topic=self.pass_topic_param)

    def needs_loop(self) -> bool:
        """Whether a handler, runner or hook is async, so that the server needs an event loop to run in."""
        hooks = [self.on_assign, self.on_revoke, self.on_lost, *self.on_start, *self.on_stop]
        calls: list[Any] = [hook for hook in hooks if hook is not None]
        for runner in self.runners:
            calls += runner.calls() if hasattr(runner, "dispatch_table") else [getattr(runner, "run", runner)]
        return any(is_async(call) for call in calls)

    # --- the run -----------------------------------------------------------------------------------------------------

    def _begin(self, stack: ExitStack) -> Session:
        if self._session is not None:
            raise UsageError("this server is already running: make another one to run two")
        registries = {runner.registry for runner in self.runners if hasattr(runner, "registry")}
        session = Session(self._plan(), self)
        stack.push(exit_with_its_code)
        for registry in registries:
            stack.enter_context(registry.frozen())
        stack.callback(self._end)
        self._session = self._last_session = session
        if self._stop_requested:
            session.stop()
        return session

    def _end(self) -> None:
        self._session = None
        self._stop_requested = False

    def start_sync(self) -> None:
        """Run until the end, in this thread; blocks.

        Returns when the run ended in order: stop(), SIGTERM, SIGINT, `timeout` or `until_end`, with everything handled
        committed. Raises CommitError when that could not be confirmed, DrainError when a handler had to be cut off,
        and whatever else ended the run; a script that ends by one of these has its `exit_code`. In the main thread
        SIGTERM and SIGINT stop the server meanwhile; a second one names what is unfinished in the log, cancels an async
        handler, and then acts as it did before the server was started. Previous signal handlers are restored. With an
        async handler it runs an event loop (uvloop) of its own.
        """
        if self.needs_loop():
            run_in_loop(self.run_server())
            return
        with ExitStack() as stack:
            session = self._begin(stack)
            stack.enter_context(SignalStop(self))
            run_sync(session)

    async def run_server(self) -> None:
        """Run until the end, in this event loop; as start_sync() otherwise. Cancelling it stops the server in order."""
        with ExitStack() as stack:
            session = self._begin(stack)
            stack.enter_context(SignalStop(self))
            await run_async(session)

    def stop(self) -> None:
        """Ask the server to end in order. Returns at once; from any thread and from signal handlers."""
        self._stop_requested = True
        if self._session is not None:
            self._session.stop()

    def _cut_off(self, why: str) -> None:
        if self._session is not None:
            self._session.cut_off(why, 5)

    def terminate(self) -> None:
        """The original's name of stop()."""
        self.stop()

    # --- embedding ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> KafkaConsumerServer:
        """Start the server in a thread of its own."""
        if self._thread is not None:
            raise UsageError("this server is already running in a thread")
        self._stop_requested = False
        self._failure = None
        self._thread = threading.Thread(target=self._run_thread, name=f"keven-{self.client_id}", daemon=True)
        self._thread.start()
        return self

    def _run_thread(self) -> None:
        try:
            self.start_sync()
        except BaseException as error:
            self._failure = error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server and wait for it; raises what ended it, unless the body raised."""
        thread, self._thread = self._thread, None
        self.stop()
        if thread is not None:
            thread.join()
        self._stop_requested = False
        if self._failure is not None and error is None:
            raise self._failure

    async def __aenter__(self) -> KafkaConsumerServer:
        """Start the server in a task of this loop."""
        if self._task is not None:
            raise UsageError("this server is already running in a task")
        self._stop_requested = False
        self._task = asyncio.get_running_loop().create_task(self.run_server())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server and wait for it; raises what ended it, unless the body raised."""
        task, self._task = self._task, None
        self.stop()
        try:
            if task is not None:
                await task
        except BaseException:
            if error is None:
                raise
        finally:
            self._stop_requested = False

    # --- while it runs -----------------------------------------------------------------------------------------------

    def _running(self) -> Session:
        session = self._session
        if session is None or session.consumer is None or session.consumer.closed:
            raise ClosedError("the server is not running")
        session.refuse_in_child()
        return session

    def assignment(self) -> list[tuple[str, int]]:
        """The (topic, partition) pairs that this server owns now. From any thread."""
        assigned: list[tuple[str, int]] = self._running().consumer.assignment()  # type: ignore[union-attr]
        return assigned

    def position(self) -> dict[tuple[str, int], int]:
        """The next offset to handle, by (topic, partition) of the assignment; -1: nothing handled yet. Any thread."""
        return {key: entry[0] for key, entry in self._running().consumer.offsets().items()}  # type: ignore[union-attr]

    def committed(self) -> dict[tuple[str, int], int]:
        """The committed offset as far as this run knows it, by (topic, partition); -1: none yet. From any thread."""
        return {key: entry[2] for key, entry in self._running().consumer.offsets().items()}  # type: ignore[union-attr]

    def ledger(self) -> dict[tuple[str, int], dict[str, int]]:
        """What became of each record, by (topic, partition), in this run or, after its end, in the last one.

        Counts that add up: received = done + skipped + tombstones + dead + retried + stale + in_flight. From any
        thread. Raises ClosedError before the first run.
        """
        session = self._last_session
        if session is None or session.consumer is None:
            raise ClosedError("the server has not run yet")
        counts: dict[tuple[str, int], dict[str, int]] = session.consumer.ledger()
        return counts

    def pause(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Stop fetching (topic, partition) pairs. From any thread; takes effect after the batch in hand."""
        session, wanted = self._running(), list(partitions)
        session.post(lambda: session.pause(wanted))

    def resume(self, partitions: Iterable[tuple[str, int]]) -> None:
        """Fetch paused (topic, partition) pairs again. From any thread."""
        session, wanted = self._running(), list(partitions)
        session.post(lambda: session.resume(wanted))

    def seek(self, topic: str, partition: int, offset: int) -> None:
        """Go on at another offset of a partition that is assigned. From any thread but from within a handler."""
        session = self._running()
        session.post(lambda: session.seek(topic, partition, offset))


def run_in_loop(coroutine: Any) -> None:
    """Run a coroutine in a new event loop: uvloop where it is installed, else asyncio's."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(coroutine)
        return
    if hasattr(uvloop, "run"):
        uvloop.run(coroutine)
    else:
        loop = uvloop.new_event_loop()
        try:
            loop.run_until_complete(coroutine)
        finally:
            loop.close()


class SignalStop:
    """While entered in the main thread, the first SIGTERM or SIGINT stops the server; elsewhere it does nothing.

    A second one cuts off what runs, and then acts as it did before.
    """

    def __init__(self, server: Any) -> None:
        self._server = server
        self._previous: dict[int, Any] = {}
        self._stopping = False

    def __enter__(self) -> SignalStop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._stopping:
            self._stopping = True
            logger.info("%s: finishing the batch in hand", name)
            _supervised.on_stop_signal()
            self._server.stop()
            return
        self._restore()
        self._server._cut_off(f"{name} came while the server was ending")
        signal.raise_signal(number)

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            if handler is not None:  # None: it was not set from Python
                signal.signal(number, handler)

    def __exit__(self, *exc_info: object) -> None:
        self._restore()


def _hooks(given: Callable[[], Any] | Iterable[Callable[[], Any]]) -> list[Callable[[], Any]]:
    return [given] if callable(given) else list(given)


def _check_number(name: str, value: int | None, low: int, high: int) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high):
        raise ConfigurationError(f"{name}={value!r:.80}: {low} to {high}, or None, is allowed")
    return value


def _check_start(start: StartPosition) -> StartPosition:
    if isinstance(start, str) and start in ("stored", "earliest", "latest"):
        return start
    if isinstance(start, datetime) and start.tzinfo is not None:
        return start
    if isinstance(start, Mapping) and all(
        isinstance(key, tuple) and len(key) == 2 and isinstance(offset, int) and offset >= 0
        for key, offset in start.items()
    ):
        return start
    raise ConfigurationError(
        f"start={start!r}: 'stored', 'earliest', 'latest', an aware datetime, or a mapping of (topic, partition) to "
        f"offset is allowed"
    )
