"""The inside of the fault proxy: one connection, its two directions, and the faults in force.

Everything here runs in the proxy's own thread.
"""

import errno
import random
import selectors
import socket
import struct
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from keven_core.testing._kafka_frames import FrameScanner, NotKafka, RequestLog

__all__ = ["ApiFault", "Connection", "Counters", "Direction", "Faults", "Pipe", "Shared"]

Direction = Literal["up", "down"]
"""Up: client to broker. Down: broker to client."""

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_RECEIVE_BYTES = 256 * 1024
# What waits in a direction before its sender is left to wait: enough to keep the socket busy, and with a delay in
# force as much as is under way in 0.3 s at 100 MB/s.
_QUEUE_BYTES = 1 << 20
_DELAYED_QUEUE_BYTES = 32 << 20
_SEND_PIECES = 64  # per system call; far below IOV_MAX, 1024 on Linux and macOS
_BURST_S = 0.02  # how much of a second's bandwidth may go out in one piece
# struct linger {1, 0}: close() sends a reset and throws away what is not sent yet, socket(7).
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass
class Counters:
    """What happened so far; written by the proxy's thread, read by any."""

    connections: int = 0
    cut_connections: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_swallowed: int = 0
    requests_seen: Counter[int] = field(default_factory=Counter)
    requests_hit: Counter[int] = field(default_factory=Counter)


@dataclass
class ApiFault:
    """What happens to the requests, or the responses, of one API.

    Attributes:
        action: what.
        seconds: for "delay".
        times: how often it still happens; None: always.
    """

    action: Literal["delay", "drop", "cut"]
    seconds: float = 0.0
    times: int | None = None


@dataclass
class Faults:
    """The faults in force. A new object means that all is well."""

    delays: dict[Direction, tuple[float, float]] = field(default_factory=dict)
    holes: set[Direction] = field(default_factory=set)
    swallow: bool = True
    bytes_per_s: float | None = None
    lifetime_s: tuple[float, float] | None = None
    apis: dict[tuple[int, Direction], ApiFault] = field(default_factory=dict)


@dataclass
class Shared:
    """What the connections of one proxy share."""

    selector: selectors.BaseSelector
    kafka: bool
    random: random.Random
    faults: Faults = field(default_factory=Faults)
    counters: Counters = field(default_factory=Counters)
    connections: "set[Connection]" = field(default_factory=set)
    buffer: bytearray = field(default_factory=lambda: bytearray(_RECEIVE_BYTES))
    # Bandwidth is that of the line, so all connections draw from one bucket per direction: bytes, time of last refill.
    buckets: dict[Direction, tuple[float, float]] = field(default_factory=dict)

    def allowance(self, direction: Direction, now: float) -> float:
        """Return how many bytes may go out now."""
        rate = self.faults.bytes_per_s
        if rate is None:
            return float("inf")
        most = max(1.0, rate * _BURST_S)
        tokens, filled = self.buckets.get(direction, (most, now))
        tokens = min(most, tokens + (now - filled) * rate)
        self.buckets[direction] = (tokens, now)
        return tokens

    def spend(self, direction: Direction, sent: int) -> None:
        """Take what was sent out of the bucket."""
        if self.faults.bytes_per_s is not None:
            tokens, filled = self.buckets[direction]
            self.buckets[direction] = (tokens - sent, filled)


class Pipe:
    """One direction of one connection: reads from a socket, keeps the order, writes to the other socket.

    Attributes:
        wake_at: time at which to call `flush` again, None if only a socket event matters.
    """

    def __init__(self, connection: "Connection", source: socket.socket, target: socket.socket, up: bool) -> None:
        self.direction: Direction = "up" if up else "down"
        self.source = source
        self.target = target
        self.wake_at: float | None = None
        self._connection = connection
        self._shared = connection.shared
        self._scanner = FrameScanner(connection.requests, is_response=not up) if self._shared.kafka else None
        self._queue: deque[tuple[float, memoryview]] = deque()
        self._queued_bytes = 0
        self._last_due = 0.0
        self._dropping = False  # the frame under way is being dropped
        self._ended = False  # the source has sent its last byte
        self.finished = False  # and the target knows
        self._target_full = False

    @property
    def _in_hole(self) -> bool:
        return self.direction in self._shared.faults.holes

    def wants_to_read(self) -> bool:
        """True if bytes from the source can be taken."""
        if self._ended:
            return False
        if self._in_hole:
            return self._shared.faults.swallow
        delayed = self._queue and self._queue[-1][0] > self._queue[0][0]
        return self._queued_bytes < (_DELAYED_QUEUE_BYTES if delayed or self._is_delayed() else _QUEUE_BYTES)

    def wants_to_write(self) -> bool:
        """True if bytes wait for room in the target."""
        return self._target_full and not self._in_hole

    def _is_delayed(self) -> bool:
        return self.direction in self._shared.faults.delays

    def receive(self, now: float) -> None:
        """Take what the source has, apply the faults, pass on what is due."""
        try:
            count = self.source.recv_into(self._shared.buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._connection.reset()
            return
        if not count:
            self._ended = True
            self.flush(now)
            return
        data = memoryview(self._shared.buffer)[:count]
        if self._in_hole:
            self._swallow(count)
            return
        due = now
        if self._is_delayed():
            seconds, jitter = self._shared.faults.delays[self.direction]
            due += max(0.0, seconds + self._shared.random.uniform(-jitter, jitter))
        if self._take(data, due, now):
            self.flush(now)
            self._keep_rest()

    def _take(self, data: memoryview, due: float, now: float) -> bool:
        """Queue the bytes that are to be passed on; False if the connection was cut over them."""
        if self._scanner is None:
            self._put(data, due)
            return True
        try:
            for segment, api_key in self._scanner.scan(data):
                if api_key is not None:
                    fault = self._fault_of(api_key)
                    self._dropping = fault is not None and fault.action == "drop"
                    if fault is not None and fault.action == "cut":
                        self.flush(now)  # what came before it was sent in good order
                        self._connection.cut()
                        return False
                    if fault is not None and fault.action == "delay":
                        # Kafka answers in order, so everything behind it waits too.
                        self._last_due = max(self._last_due, due + fault.seconds)
                if self._dropping:
                    self._shared.counters.bytes_swallowed += len(segment)
                else:
                    self._put(segment, due)
        except NotKafka:
            # TLS or another protocol: from here on the bytes pass as they are.
            kept, rest = self._scanner.take_partial(), data[self._scanner.position :]
            self._scanner = None
            if kept:
                self._put(memoryview(kept), due)
            self._put(rest, due)
        return True

    def _fault_of(self, api_key: int) -> ApiFault | None:
        counters, apis = self._shared.counters, self._shared.faults.apis
        if self.direction == "up":
            counters.requests_seen[api_key] += 1
        fault = apis.get((api_key, self.direction))
        if fault is None:
            return None
        counters.requests_hit[api_key] += 1
        if fault.times is not None:
            fault.times -= 1
            if fault.times <= 0:
                del apis[api_key, self.direction]
        return fault

    def _put(self, data: memoryview, due: float) -> None:
        self._last_due = max(self._last_due, due)
        self._queue.append((self._last_due, data))
        self._queued_bytes += len(data)

    def _keep_rest(self) -> None:
        """Copy what still lies in the receive buffer, which the next read overwrites."""
        for index in range(len(self._queue) - 1, -1, -1):
            due, data = self._queue[index]
            if data.obj is not self._shared.buffer:
                break
            self._queue[index] = (due, memoryview(bytes(data)))

    def flush(self, now: float) -> None:
        """Send what is due, as far as the target and the bandwidth allow."""
        self.wake_at = None
        if self._connection.is_closed or self._connection.is_connecting:
            return
        if self._in_hole:
            if self._shared.faults.swallow and self._queue:
                self._swallow(self._queued_bytes)
                self._queue.clear()
                self._queued_bytes = 0
            return
        self._target_full = False
        while self._queue and self._queue[0][0] <= now:
            allowed = self._shared.allowance(self.direction, now)
            if allowed < 1:
                self.wake_at = now + _BURST_S / 4
                return
            pieces = list(self._due_pieces(now, allowed))
            try:
                sent = self.target.sendmsg(pieces)
            except (BlockingIOError, InterruptedError):
                self._target_full = True
                return
            except OSError:
                self._connection.reset()
                return
            self._shared.spend(self.direction, sent)
            self._sent(sent)
        if self._queue:
            self.wake_at = self._queue[0][0]
        elif self._ended and not self.finished:
            self.finished = True
            with suppress(OSError):
                self.target.shutdown(socket.SHUT_WR)

    def _due_pieces(self, now: float, allowed: float) -> Iterator[memoryview]:
        for count, (due, data) in enumerate(self._queue):
            if due > now or count == _SEND_PIECES or allowed < 1:
                return
            piece = data if len(data) <= allowed else data[: int(allowed)]
            allowed -= len(piece)
            yield piece

    def _sent(self, sent: int) -> None:
        counters = self._shared.counters
        if self.direction == "up":
            counters.bytes_up += sent
        else:
            counters.bytes_down += sent
        self._queued_bytes -= sent
        while sent:
            due, data = self._queue[0]
            if len(data) > sent:
                self._queue[0] = (due, data[sent:])
                return
            sent -= len(data)
            self._queue.popleft()

    def _swallow(self, count: int) -> None:
        self._shared.counters.bytes_swallowed += count
        self._connection.is_torn = True

    def hurry(self) -> None:
        """Make everything that waits due now: its delay has been lifted."""
        self._queue = deque((0.0, data) for _, data in self._queue)
        self._last_due = 0.0


class Connection:
    """A client's connection and the one to the broker that belongs to it.

    Attributes:
        is_torn: bytes of it were swallowed, so it can never work again.
        dies_at: time at which it is cut, None if never.
    """

    def __init__(self, shared: Shared, client: socket.socket, upstream: tuple[str, int], dies_at: float | None) -> None:
        self.shared = shared
        self.requests = RequestLog()
        self.is_torn = False
        self.is_closed = False
        self.is_connecting = True
        self.dies_at = dies_at
        self._client = client
        self._broker = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        for each in (client, self._broker):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.up = Pipe(self, client, self._broker, up=True)
        self.down = Pipe(self, self._broker, client, up=False)
        self._masks: dict[socket.socket, int] = {client: 0, self._broker: 0}
        shared.connections.add(self)
        if self._broker.connect_ex(upstream) not in (0, errno.EINPROGRESS):
            self.reset()
        else:
            self.watch()

    def handle(self, ready: socket.socket, mask: int, now: float) -> None:
        """Do what a socket is ready for."""
        if self.is_connecting and ready is self._broker:
            if self._broker.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self.reset()
                return
            self.is_connecting = False
            self.up.flush(now)
        for pipe in (self.up, self.down):
            if mask & WRITE and pipe.target is ready:
                pipe.flush(now)
            if mask & READ and pipe.source is ready and not self.is_closed and pipe.wants_to_read():
                pipe.receive(now)
        self.watch()

    def tick(self, now: float) -> None:
        """Do what has become due."""
        if self.dies_at is not None and self.dies_at <= now:
            self.cut()
            return
        for pipe in (self.up, self.down):
            if pipe.wake_at is not None and pipe.wake_at <= now:
                pipe.flush(now)
        self.watch()

    def next_wake(self) -> float | None:
        """Return the time at which `tick` has something to do, None if it has nothing."""
        times = [at for at in (self.up.wake_at, self.down.wake_at, self.dies_at) if at is not None]
        return min(times) if times else None

    def recheck(self, now: float) -> None:
        """Act on changed faults."""
        for pipe in (self.up, self.down):
            pipe.flush(now)
        self.watch()

    def watch(self) -> None:
        """Tell the selector what to wait for now; close when both directions have come to their end."""
        if self.is_closed:
            return
        if self.up.finished and self.down.finished:
            self._close()
            return
        self._watch(self._client, self.up.wants_to_read(), self.down.wants_to_write())
        if self.is_connecting:
            self._watch(self._broker, False, True)
        else:
            self._watch(self._broker, self.down.wants_to_read(), self.up.wants_to_write())

    def _watch(self, sock: socket.socket, read: bool, write: bool) -> None:
        mask = (READ if read else 0) | (WRITE if write else 0)
        before = self._masks[sock]
        if mask == before:
            return
        self._masks[sock] = mask
        if not mask:
            self.shared.selector.unregister(sock)
        elif before:
            self.shared.selector.modify(sock, mask, self)
        else:
            self.shared.selector.register(sock, mask, self)

    def cut(self) -> None:
        """Reset both sides on purpose."""
        if not self.is_closed:
            self.shared.counters.cut_connections += 1
            self.reset()

    def reset(self) -> None:
        """Close both sides with a reset, as after an error; pending bytes are lost."""
        if self.is_closed:
            return
        for sock in (self._client, self._broker):
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._close()

    def _close(self) -> None:
        self.is_closed = True
        self.shared.connections.discard(self)
        for sock, mask in self._masks.items():
            if mask:
                self.shared.selector.unregister(sock)
            sock.close()
