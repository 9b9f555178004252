"""Publishing events and commands: at once, or collected in an outbox that is sent when what led to them has succeeded.

    with outbox():
        keven_log_event(OrderPlaced(order_id=1))   # collected
        keven_dispatch_command(ShipOrder(order_id=1))
                                                   # sent here, in this order; nothing, if the block raises

Where a message goes is decided by the context (contextvars) in which it is raised, so each thread and task has its own:

1. In a handler (`delay_commands_and_events`) it waits in the outbox of the handler that runs.
2. In an `outbox()` block it waits for the end of the block. A block within another, or within a handler, is as a
   savepoint of SQL: when it ends well its messages join the outer one's; when it raises, only its own are dropped.
3. After `keven_send_events_on_commit()` it waits for `keven_flush_event_cache()`; likewise for commands. A task that
   calls it has a cache of its own, whatever it was started with. What waits when the thread, task or process ends is
   lost, with an error in the log.
4. Else it goes out at once.

Tasks and threads that are started with a copy of the context share its outbox as long as that is open; what they raise
later goes out at once, or with what encloses it.

Sent means acknowledged by the broker, outside of handlers: a flush waits for all of its messages together. In a handler
nothing waits: the offset of its record is stored only when the broker has acknowledged what it led to.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import inspect
import itertools
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar, overload

from keven_core.kafka._calls import is_async
from keven_core.kafka.errors import PublishError, UsageError
from keven_core.kafka.kinds import KINDS, MessageKind
from keven_core.kafka.message import Message
from keven_core.kafka.outcomes import Outcome
from keven_core.kafka.publishers import METHODS, MessagePublisher, Unsent, last_publisher, one_by_one

__all__ = [
    "DelayedCommandsAndEvents",
    "HandlerOutbox",
    "Outbox",
    "WriteCache",
    "begun_share",
    "collect_on_commit",
    "flush_cache",
    "handled",
    "handler_outbox",
    "outbox",
    "publish",
    "publish_now",
    "send_at_once",
    "settled",
    "undelayed",
    "write_cache",
]

logger = logging.getLogger("keven_core.kafka")

Self = TypeVar("Self", bound="Outbox")


class _Place(NamedTuple):
    """Where messages wait that are raised in a context."""

    outbox: Outbox
    kinds: frozenset[MessageKind]

    def open(self) -> _Place | None:
        """Where messages wait now: here, or when the outbox does not take any, where what encloses it has them wait."""
        place: _Place | None = self
        while place is not None and not place.outbox.collects:
            place = place.outbox._before
        return place


_place: ContextVar[_Place | None] = ContextVar("keven_core.outbox", default=None)
_ALL = frozenset(KINDS)


def _open_place() -> _Place | None:
    place = _place.get()
    return None if place is None else place.open()


# --- outboxes --------------------------------------------------------------------------------------------------------


class Outbox:
    """Events and commands that wait, in the order in which they were raised. Use `outbox()`.

    A context manager, `with` or `async with` (which does not block the event loop): it collects what is raised inside
    and sends it when the block ends without an exception.

    Attributes:
        messages: what waits. When a flush has failed, what was not accepted is still there.
    """

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._lock = threading.Lock()
        self._open = True  # until a block of it ends
        self._inside = False
        self._before: _Place | None = None

    def __len__(self) -> int:
        return len(self.messages)

    @property
    def waiting(self) -> list[Message]:
        """What can still be taken back."""
        return self.messages

    @property
    def collects(self) -> bool:
        """Whether it takes messages now."""
        return self._open

    def add(self, message: Message) -> None:
        """Have a message wait here."""
        self.messages.append(message)

    def flush(self, kind: MessageKind | None = None) -> int:
        """Send what waits, of one kind or all; returns how many messages that were.

        Outside of handlers it waits until the broker has acknowledged them. Blocks as the publisher's logger does.
        Raises PublishError when some were not accepted: these stay here, and may be flushed again. A message whose
        acknowledgement did not come in time may arrive twice then.
        """
        with self._lock:
            waiting = [message for message in self.messages if kind is None or type(message).kind is kind]
            sent: set[int] = set()
            wait = not _in_handler()
            for of_kind, group in itertools.groupby(waiting, lambda message: type(message).kind):
                messages = list(group)
                unsent = self._publish(of_kind, messages, wait)
                kept = {id(message) for message, _ in unsent}
                for message in messages:
                    if id(message) not in kept:
                        self._take_out(message)
                        sent.add(id(message))
                if unsent:
                    cause = next(error for _, error in unsent if error is not None)
                    left = [message for message in waiting if id(message) not in sent]
                    raise _publish_error(left, len(waiting), cause) from cause
            return len(waiting)

    def _publish(self, kind: MessageKind, messages: list[Message], wait: bool) -> Unsent:
        publisher = last_publisher(kind, acknowledged=wait)
        if isinstance(publisher, MessagePublisher):
            return publisher.publish_all(messages, wait=wait)
        return one_by_one(getattr(publisher, METHODS[kind.noun]), messages)

    def _take_out(self, message: Message) -> None:
        # Element by element: another thread may append meanwhile.
        for position, found in enumerate(self.messages):
            if found is message:
                del self.messages[position]
                return

    def drop(self, start: int = 0) -> None:
        """Forget what waits, from a position on."""
        self._forget(self.messages, start)

    def _forget(self, messages: list[Message], start: int) -> None:
        count = len(messages) - start
        if count > 0:
            del messages[start : start + count]
            logger.debug("%d message(s) are not sent, since what they were raised by has failed", count)

    def _outer(self) -> _Place | None:
        return None if self._before is None else self._before.open()

    def send(self) -> None:
        """Hand what waits on to the enclosing outbox; send what that does not take. Raises as flush()."""
        outer = self._outer()
        if outer is not None:
            for message in list(self.messages):
                if type(message).kind in outer.kinds:
                    outer.outbox.add(message)
                    self._take_out(message)
        if self.messages:
            self.flush()

    # --- as a context manager ----------------------------------------------------------------------------------------

    def _enter(self) -> None:
        if self._inside:
            raise UsageError("this outbox is in use: its block has to end before the next begins; make one for each")
        self._inside = self._open = True
        self._before = _place.get()
        _place.set(_Place(self, _ALL))

    def _leave(self) -> None:
        self._inside = self._open = False
        # Not reset(): the block may end in another context than it began in, as in fixtures, or while one that began
        # after it goes on, as with generators. That one is left alone.
        place = _place.get()
        if place is not None and place.outbox is self:
            _place.set(self._before)

    def __enter__(self: Self) -> Self:
        self._enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send what waits, or drop it; raises as flush()."""
        self._leave()
        if error is None:
            self.send()
        else:
            self.drop()

    async def __aenter__(self: Self) -> Self:
        self._enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """As __exit__(), in a thread of the loop's executor if there is something to send.

        Cancelling it gives up waiting, and the messages are sent; what they fail with is logged then.
        """
        self._leave()
        if error is not None:
            self.drop()
        elif self.messages and (self._outer() is not None or _in_handler()):
            self.send()  # nothing is waited for
        elif self.messages:
            context = contextvars.copy_context()
            sending = asyncio.get_running_loop().run_in_executor(None, context.run, self.send)
            try:
                # The block has ended well, and what led to its messages may be committed: they go out all the same.
                await asyncio.shield(sending)
            except asyncio.CancelledError:
                sending.add_done_callback(_tell_failure)
                raise


def _tell_failure(sending: asyncio.Future[None]) -> None:
    """Log what nobody awaits any more."""
    error = None if sending.cancelled() else sending.exception()
    if error is not None:
        logger.error("after a block whose task was cancelled: %s", error)


def outbox() -> Outbox:
    """A block that collects the events and commands raised in it and sends them, in order, when it has ended well.

    `with outbox() as box:`, or `async with`. If the block raises, nothing is sent. See the module for blocks within
    blocks. Raises PublishError at the end of the block; `box.messages` are then what was not accepted, and
    `box.flush()` tries it again.
    """
    return Outbox()


class DelayedCommandsAndEvents(Outbox):
    """The same as outbox(), under its older name."""


def _in_handler() -> bool:
    """Whether what is logged here is waited for by the offset of a record."""
    native = sys.modules.get("keven_core._native.logger")
    return native is not None and native._scope.get() is not None


def _names(messages: list[Message]) -> str:
    return ", ".join(dict.fromkeys(getattr(message, type(message).kind.name_field) for message in messages))[:300]


def _publish_error(left: list[Message], count: int, cause: Exception) -> PublishError:
    return PublishError(
        f"{len(left)} of {count} message(s) were not sent and are kept in the outbox ({_names(left)}): {cause}", left
    )


# --- what the doors of events and commands share ---------------------------------------------------------------------


def _checked(kind: MessageKind, message: Any) -> Message:
    if not isinstance(message, Message) or type(message).kind is not kind:
        raise UsageError(f"{kind.a_noun} is published here, not {type(message).__name__}")
    if not getattr(message, kind.name_field):
        raise UsageError(f"{type(message).__qualname__} has no {kind.name_field}, so nobody could tell what it is")
    return message


def publish(kind: MessageKind, message: Any) -> None:
    """Have a message wait in the current outbox, if there is one for its kind; else publish it without waiting."""
    _checked(kind, message)
    place = _open_place()
    if place is not None and kind in place.kinds:
        place.outbox.add(message)
        return
    getattr(last_publisher(kind, acknowledged=False), METHODS[kind.noun])(message)


def publish_now(kind: MessageKind, message: Any) -> None:
    """Publish a message past every outbox; returns when it is acknowledged (by default, see last_publisher)."""
    getattr(last_publisher(kind), METHODS[kind.noun])(_checked(kind, message))


class _CommitCache(Outbox):
    """What waits for a flush: of the thread or task that has asked for it, and of what that starts.

    It tells what it is never flushed of.
    """

    def __init__(self) -> None:
        super().__init__()
        task = _current_task()
        self._task = None if task is None else weakref.ref(task)
        self._pid = os.getpid()
        _caches.add(self)

    def is_of_another_task(self) -> bool:
        """Whether this came along with the context that the current task was started with."""
        task = _current_task()
        return task is not None and (self._task is None or self._task() is not task)

    def __del__(self) -> None:
        self.tell()

    def tell(self) -> None:
        """Nobody can flush it any more. Of a forked child that is the parent's affair."""
        if self.messages and self._pid == os.getpid():
            logger.error(
                "%d message(s) are lost (%s): the thread, task or process has ended in which they waited for "
                "keven_flush_event_cache() or keven_flush_command_cache()",
                len(self.messages),
                _names(self.messages),
            )
            self.messages.clear()


_caches: weakref.WeakSet[_CommitCache] = weakref.WeakSet()


@atexit.register
def _tell_at_exit() -> None:
    for cache in list(_caches):
        cache.tell()


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # there is no event loop in this thread
        return None


def _own_place() -> _Place:
    """The place of this context; an outbox of its own, that collects nothing yet, is made if there is none."""
    place = _open_place()
    if place is None:
        place = _Place(_CommitCache(), frozenset())
        _place.set(place)
    return place


def collect_on_commit(kind: MessageKind) -> None:
    """From here on messages of a kind wait in this thread or task, until flush_cache()."""
    place = _own_place()
    if isinstance(place.outbox, _CommitCache) and place.outbox.is_of_another_task():
        place = _Place(_CommitCache(), place.kinds)
    _place.set(_Place(place.outbox, place.kinds | {kind}))


def send_at_once(kind: MessageKind) -> None:
    """From here on messages of a kind go out at once in this thread or task; what waits goes on waiting."""
    place = _open_place()
    if place is not None and kind in place.kinds:
        _place.set(_Place(place.outbox, place.kinds - {kind}))


def flush_cache(kind: MessageKind) -> int:
    """Send what waits of a kind in this thread or task; returns how many. Raises as Outbox.flush()."""
    place = _open_place()
    return 0 if place is None else place.outbox.flush(kind)


class WriteCache(MutableSequence[Any]):
    """Messages of one kind that wait in an outbox, as a list of which the outbox is the truth."""

    def __init__(self, kind: MessageKind, box: Outbox) -> None:
        self._kind = kind
        self._box = box

    def _positions(self) -> list[int]:
        return [i for i, message in enumerate(self._box.waiting) if type(message).kind is self._kind]

    def _now(self) -> list[Any]:
        return [message for message in self._box.waiting if type(message).kind is self._kind]

    def __len__(self) -> int:
        return len(self._now())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._now())

    def __eq__(self, other: object) -> bool:
        return self._now() == (list(other) if isinstance(other, (list, WriteCache)) else other)

    __hash__ = None  # type: ignore[assignment]  # as a list's

    def __repr__(self) -> str:
        return repr(self._now())

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._now()[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            raise UsageError("a write cache can't be assigned to in slices: clear it and add to it")
        self._box.waiting[self._positions()[index]] = _checked(self._kind, value)

    def __delitem__(self, index: Any) -> None:
        found = self._positions()[index]
        for position in sorted([found] if isinstance(found, int) else found, reverse=True):
            del self._box.waiting[position]

    def insert(self, index: int, value: Any) -> None:
        """Have a message wait before another."""
        behind = self._positions()[index:]
        at = behind[0] if behind else len(self._box.waiting)
        self._box.waiting.insert(at, _checked(self._kind, value))


def write_cache(kind: MessageKind) -> WriteCache:
    """What waits of a kind in this thread or task."""
    return WriteCache(kind, _own_place().outbox)


# --- handlers --------------------------------------------------------------------------------------------------------


class _Handling(Protocol):
    @property
    def handling(self) -> bool: ...


class HandlerOutbox(Outbox):
    """The outbox of whoever calls handlers, for one record after the other: made once, so that it costs nothing.

    Whoever calls a handler looks into `messages` afterwards: send() when it has succeeded, drop() when it has failed.
    In a server that is compiled code, which looks at the length of that list and no more.

    `source.handling` says whether a handler runs; None: it does. When none runs, messages go out at once: they come
    from what a handler has left running. What such a thread or task raises while the next handler runs can't be told
    from that one's; what outlives its handler should have a context of its own.
    """

    def __init__(self, source: _Handling | None = None) -> None:
        super().__init__()
        self._source = source
        self._delays = True

    @property
    def collects(self) -> bool:
        """Whether a handler runs whose messages are to wait."""
        return self._open and self._delays and (self._source is None or self._source.handling)

    def enter(self) -> None:
        """Collect in this context from now on; for a context that belongs to a server."""
        _place.set(_Place(self, _ALL))

    def settle(self, result: object) -> None:
        """A handler has returned: send what it has raised, unless the result is an outcome other than done."""
        if not self.messages:
            return
        if isinstance(result, Outcome):
            self.drop()
        else:
            self.send()


def handler_outbox() -> HandlerOutbox | None:
    """The outbox of the handler that runs in this context."""
    place = _place.get()
    return place.outbox if place is not None and isinstance(place.outbox, HandlerOutbox) else None


def begun_share() -> tuple[HandlerOutbox | None, Sequence[Message]]:
    """The outbox of the handler that runs in this context, and what is in it.

    For one of several handlers of a record: what it raises goes out if it succeeds, whatever becomes of the others.
    """
    box = handler_outbox()
    return box, () if box is None else box.messages


def undelayed(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`call` of a handler whose messages go out at once."""
    if is_async(call):

        async def call_async(message: Any) -> Any:
            box = handler_outbox()
            if box is None:
                return await call(message)
            box._delays = False
            try:
                return await call(message)
            finally:
                box._delays = True

        call_async.__qualname__ = getattr(call, "__qualname__", repr(call))
        return call_async

    def call_now(message: Any) -> Any:
        box = handler_outbox()
        if box is None:
            return call(message)
        box._delays = False
        try:
            return call(message)
        finally:
            box._delays = True

    call_now.__qualname__ = getattr(call, "__qualname__", repr(call))
    return call_now


def handled(call: Callable[[Any], Any], message: Any) -> Any:
    """Call handlers outside of a server as a server would: what they raise goes out if they succeed.

    Returns what `call` returns; an awaitable for an async one.
    """
    if not is_async(call):
        with HandlerOutbox() as box:
            result = call(message)
            if inspect.isawaitable(result):
                raise UsageError(
                    f"{getattr(call, '__qualname__', call)!r} returned an awaitable: declare it `async def`"
                )
            box.settle(result)
            return result

    async def handled_async() -> Any:
        async with HandlerOutbox() as box:
            result = await call(message)
            if isinstance(result, Outcome):
                box.drop()
            return result

    return handled_async()


def settled(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call`, which handles a record, with what it raises sent or dropped; it may return an awaitable."""

    async def awaited(box: HandlerOutbox, result: Any) -> Any:
        try:
            outcome = await result
            box.settle(outcome)
        except BaseException:
            box.drop()
            raise
        return outcome

    def call_settled() -> Any:
        box = handler_outbox()
        if box is None:
            return call()
        try:
            result = call()
            if inspect.isawaitable(result):
                return awaited(box, result)
            box.settle(result)
        except BaseException:
            box.drop()
            raise
        return result

    return call_settled
