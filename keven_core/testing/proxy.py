"""A TCP proxy that breaks the network on purpose, to test how clients of Kafka get over it.

    with FaultProxy("127.0.0.1", 9092) as proxy:
        client = connect(proxy.address)     # the broker must advertise this address: RealKafka(proxied=True)
        proxy.cut()                         # every connection is reset
        proxy.drop_api(PRODUCE, on="response", times=1)
        ...
        proxy.restore()

Names of the faults follow Toxiproxy. API keys are those of the Kafka protocol; the ones tests need most stand below.
"""

import os
import random
import selectors
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeVar

from keven_core.testing._proxy_pipe import ApiFault, Connection, Direction, Faults, Shared

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "ADD_PARTITIONS_TO_TXN",
    "CONSUMER_GROUP_HEARTBEAT",
    "END_TXN",
    "FETCH",
    "FIND_COORDINATOR",
    "HEARTBEAT",
    "INIT_PRODUCER_ID",
    "JOIN_GROUP",
    "METADATA",
    "OFFSET_COMMIT",
    "OFFSET_FETCH",
    "PRODUCE",
    "SYNC_GROUP",
    "TXN_OFFSET_COMMIT",
    "FaultProxy",
]

# https://kafka.apache.org/protocol, "Api Keys"
PRODUCE = 0
FETCH = 1
METADATA = 3
OFFSET_COMMIT = 8
OFFSET_FETCH = 9
FIND_COORDINATOR = 10
JOIN_GROUP = 11
HEARTBEAT = 12
SYNC_GROUP = 14
INIT_PRODUCER_ID = 22
ADD_PARTITIONS_TO_TXN = 24
END_TXN = 26
TXN_OFFSET_COMMIT = 28
CONSUMER_GROUP_HEARTBEAT = 68

_Result = TypeVar("_Result")
_COMMAND_TIMEOUT_S = 10.0
_WHERE: dict[str, Direction] = {"request": "up", "response": "down"}


class FaultProxy:
    """A proxy in front of one broker, whose faults are switched at run time.

    It starts when it is made and ends with `close`, or at the end of a `with`. Its thread moves the bytes; every
    method may be called from any thread, blocks only until that thread has carried it out, and applies to all
    connections, the present ones and new ones. A fault stays until `restore`, or until it has happened `times` times.
    Faults add up.

    The thread shares the interpreter with the code under test: some 0.1 ms of it per megabyte.

    Attributes:
        host: where it listens: "127.0.0.1".
        port: its port, chosen by the kernel and kept until `close`, also while connections are refused.

    Args:
        upstream_host: IPv4 address of the broker.
        upstream_port: port of the broker. Nobody needs to listen there yet.
        kafka: True (default): the bytes are Kafka's protocol, and faults may be tied to APIs. A connection that turns
            out to speak something else (TLS) is passed on as it is. False for another protocol.
        seed: for jitter and life times, so that a run can be repeated; None (default) is another one each time.
    """

    def __init__(self, upstream_host: str, upstream_port: int, *, kafka: bool = True, seed: int | None = None) -> None:
        self.host = "127.0.0.1"
        self._upstream = (upstream_host, upstream_port)
        self._shared = Shared(selectors.DefaultSelector(), kafka, random.Random(seed))
        # Bound and never listening: the port stays ours while the listener is closed to refuse connections.
        self._keeper = self._bound(0)
        self.port: int = self._keeper.getsockname()[1]
        self._listener: socket.socket | None = None
        self._listen()
        self._commands: deque[Callable[[], None]] = deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._shared.selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._closing = False
        self._owner_pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name=f"fault-proxy-{self.port}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"FaultProxy({self.address} -> {self._upstream[0]}:{self._upstream[1]})"

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Reset all connections and end the thread; idempotent."""
        if self._closing or os.getpid() != self._owner_pid:
            return
        self._closing = True
        self._wake()
        self._thread.join(_COMMAND_TIMEOUT_S)

    # ---- what happened

    @property
    def address(self) -> str:
        """`host:port`, for clients."""
        return f"{self.host}:{self.port}"

    @property
    def connections(self) -> int:
        """Connections taken so far."""
        return self._shared.counters.connections

    @property
    def open_connections(self) -> int:
        """Connections that are open now."""
        return len(self._shared.connections)

    @property
    def cut_connections(self) -> int:
        """Connections that a fault has reset so far."""
        return self._shared.counters.cut_connections

    @property
    def bytes_up(self) -> int:
        """Bytes passed on to the broker so far."""
        return self._shared.counters.bytes_up

    @property
    def bytes_down(self) -> int:
        """Bytes passed on to clients so far."""
        return self._shared.counters.bytes_down

    @property
    def bytes_swallowed(self) -> int:
        """Bytes that a black hole or a dropped request has swallowed so far, in both directions."""
        return self._shared.counters.bytes_swallowed

    @property
    def requests_seen(self) -> Counter[int]:
        """Requests that clients have sent so far, by API key (a copy)."""
        return Counter(self._shared.counters.requests_seen)

    @property
    def requests_hit(self) -> Counter[int]:
        """Requests and responses to which `delay_api`, `drop_api` or `cut_on_api` has happened, by API key (a copy)."""
        return Counter(self._shared.counters.requests_hit)

    # ---- faults of the line

    def cut(self, *, refuse: bool = False) -> int:
        """Reset all connections.

        Args:
            refuse: True refuses new ones (ECONNREFUSED) until `restore`. Default False: clients can come back at once.

        Returns:
            How many were cut.
        """

        def apply() -> int:
            if refuse:
                self._refuse()
            return self._cut_all()

        return self._call(apply)

    def black_hole(self, direction: Literal["both", "up", "down"] = "both", *, swallow: bool = True) -> None:
        """Pass nothing on, without closing anything; new connections are taken, and get no answer either.

        Args:
            direction: "up" (client to broker), "down", or "both" (default).
            swallow: True (default) reads and throws away, so the sender believes that its bytes arrived; connections
                that lost bytes are reset by `restore`, since the rest of their stream would make no sense. False
                stops reading, so the sender's buffers fill up as on a line that drops packets, and `restore` lets
                everything through.
        """

        def apply() -> None:
            self._shared.faults.holes |= set(_directions(direction))
            self._shared.faults.swallow = swallow

        self._change(apply)

    def delay(self, seconds: float, jitter: float = 0.0, *, direction: Literal["both", "up", "down"] = "both") -> None:
        """Hold all bytes back for a while; their order stays.

        Args:
            seconds: how long, in each direction: a request and its response take twice that.
            jitter: at most so many seconds more or less, at random (0).
            direction: "up", "down", or "both" (default).
        """
        if seconds < 0 or jitter < 0:
            raise ValueError(f"seconds={seconds}, jitter={jitter}: both must be 0 or more")

        def apply() -> None:
            for each in _directions(direction):
                self._shared.faults.delays[each] = (seconds, jitter)

        self._change(apply)

    def bandwidth(self, bytes_per_s: float) -> None:
        """Limit what goes through in a second, in each direction, over all connections together."""
        if bytes_per_s <= 0:
            raise ValueError(f"bytes_per_s={bytes_per_s}: must be above 0; use black_hole() to stop everything")

        def apply() -> None:
            self._shared.faults.bytes_per_s = bytes_per_s

        self._change(apply)

    def lifetime(self, shortest_s: float, longest_s: float) -> None:
        """Reset every connection at a random age between these two, in seconds; open ones are taken as new now."""
        if not 0 <= shortest_s <= longest_s:
            raise ValueError(f"shortest_s={shortest_s}, longest_s={longest_s}: must be 0 or more, and in that order")

        def apply() -> None:
            self._shared.faults.lifetime_s = (shortest_s, longest_s)
            for connection in self._shared.connections:
                connection.dies_at = self._death()

        self._change(apply)

    # ---- faults of one API

    def delay_api(
        self,
        api_key: int,
        seconds: float,
        *,
        on: Literal["request", "response"] = "request",
        times: int | None = None,
    ) -> None:
        """Hold the requests of one API back for a while, and with them what the same connection sends after them.

        Args:
            api_key: e.g. `FETCH`.
            seconds: how long.
            on: "request" (default), or "response": the broker acts at once and the client learns of it late.
            times: how often; None (default): until `restore`.
        """
        if seconds < 0:
            raise ValueError(f"seconds={seconds}: must be 0 or more")
        self._set_api_fault(api_key, on, ApiFault("delay", seconds, times))

    def drop_api(
        self, api_key: int, *, on: Literal["request", "response"] = "request", times: int | None = None
    ) -> None:
        """Swallow the requests of one API; everything else on the connection goes on.

        Args:
            api_key: e.g. `PRODUCE`.
            on: "request" (default): the broker never gets it. "response": the broker acts, and the client never learns.
            times: how often; None (default): until `restore`.
        """
        self._set_api_fault(api_key, on, ApiFault("drop", times=times))

    def cut_on_api(
        self, api_key: int, *, on: Literal["request", "response"] = "request", times: int | None = None
    ) -> None:
        """Reset a connection when a request of that API comes, or when its response does.

        Args:
            api_key: e.g. `END_TXN`.
            on: "request" (default): the broker never gets it. "response": the broker acts, and the client never learns.
            times: how often; None (default): until `restore`.
        """
        self._set_api_fault(api_key, on, ApiFault("cut", times=times))

    def restore(self) -> None:
        """End all faults. Bytes that wait go out at once; connections that lost bytes to a black hole are reset."""

        def apply() -> None:
            self._shared.faults = Faults()
            self._shared.buckets.clear()
            for connection in list(self._shared.connections):
                connection.dies_at = None
                if connection.is_torn:
                    connection.cut()
                for pipe in (connection.up, connection.down):
                    pipe.hurry()
            self._listen()

        self._change(apply)

    # ---- in the proxy's thread

    def _set_api_fault(self, api_key: int, on: str, fault: ApiFault) -> None:
        if not self._shared.kafka:
            raise ValueError("this proxy was made with kafka=False: it sees no requests")
        if fault.times is not None and fault.times < 1:
            raise ValueError(f"times={fault.times}: must be 1 or more, or None for always")

        def apply() -> None:
            self._shared.faults.apis[api_key, _WHERE[on]] = fault

        self._change(apply)

    def _change(self, apply: Callable[[], None]) -> None:
        def change() -> None:
            apply()
            now = time.monotonic()
            for connection in list(self._shared.connections):
                connection.recheck(now)

        self._call(change)

    def _call(self, function: Callable[[], _Result]) -> _Result:
        """Have the proxy's thread run that, wait for it, and return or raise what it did."""
        if self._closing or not self._thread.is_alive():
            raise RuntimeError(f"{self!r} is closed")
        done = threading.Event()
        results: list[_Result] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(function())
            except BaseException as error:  # handed to the caller, whatever it is
                errors.append(error)
            done.set()

        self._commands.append(run)
        self._wake()
        if not done.wait(_COMMAND_TIMEOUT_S):
            raise RuntimeError(f"{self!r} did not answer within {_COMMAND_TIMEOUT_S:.0f} s: it hangs or is closed")
        if errors:
            raise errors[0]
        return results[0]

    def _wake(self) -> None:
        # Full means that the thread will wake up anyway; a bad descriptor, that it has ended.
        with suppress(OSError):
            self._wake_write.send(b"x")

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
        finally:
            self._cut_all()
            self._refuse()
            self._keeper.close()
            self._shared.selector.close()
            self._wake_read.close()
            self._wake_write.close()

    def _turn(self) -> None:
        wakes = [at for at in (each.next_wake() for each in self._shared.connections) if at is not None]
        timeout = max(0.0, min(wakes) - time.monotonic()) if wakes else None
        events = self._shared.selector.select(timeout)
        now = time.monotonic()
        for key, mask in events:
            if isinstance(key.data, Connection):
                # Closed by an earlier event of this very turn: nothing to do any more.
                if not key.data.is_closed and isinstance(key.fileobj, socket.socket):
                    key.data.handle(key.fileobj, mask, now)
            elif key.fileobj is self._wake_read:
                self._run_commands()
            else:
                self._accept(now)
        if wakes and now >= min(wakes):
            for connection in list(self._shared.connections):
                connection.tick(now)

    def _run_commands(self) -> None:
        with suppress(BlockingIOError):
            self._wake_read.recv(4096)
        while self._commands:
            self._commands.popleft()()

    def _accept(self, now: float) -> None:
        if self._listener is None:
            return  # closed by a command of this very turn
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # the client gave up before we came
        self._shared.counters.connections += 1
        connection = Connection(self._shared, client, self._upstream, self._death(now))
        connection.watch()

    def _death(self, now: float | None = None) -> float | None:
        span = self._shared.faults.lifetime_s
        if span is None:
            return None
        return (time.monotonic() if now is None else now) + self._shared.random.uniform(*span)

    def _cut_all(self) -> int:
        connections = list(self._shared.connections)
        for connection in connections:
            connection.cut()
        return len(connections)

    def _bound(self, port: int) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        # Lets keeper and listener share the port; only the one that listens gets connections.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((self.host, port))
        return sock

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = self._bound(self.port)
            self._listener.listen(128)
            self._listener.setblocking(False)
            self._shared.selector.register(self._listener, selectors.EVENT_READ, None)

    def _refuse(self) -> None:
        if self._listener is not None:
            self._shared.selector.unregister(self._listener)
            self._listener.close()
            self._listener = None


def _directions(direction: str) -> tuple[Direction, ...]:
    if direction == "both":
        return ("up", "down")
    if direction == "up":
        return ("up",)
    if direction == "down":
        return ("down",)
    raise ValueError(f"direction={direction!r}: use 'up', 'down' or 'both'")
