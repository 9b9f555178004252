"""The fault proxy, against an echo server and against a server that answers made-up Kafka frames. No broker."""

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial

import pytest

from keven_core.testing._kafka_frames import FrameScanner, NotKafka, RequestLog
from keven_core.testing.proxy import FETCH, METADATA, PRODUCE, FaultProxy

_DEADLINE_S = 10.0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {_DEADLINE_S} s: {what}")
        time.sleep(0.002)


def request(api_key: int, correlation_id: int, body: bytes = b"") -> bytes:
    return struct.pack(">ihhi", 8 + len(body), api_key, 9, correlation_id) + body


def response(correlation_id: int, body: bytes = b"") -> bytes:
    return struct.pack(">ii", 4 + len(body), correlation_id) + body


def receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            break
        data += piece
    return data


class Server:
    """Takes connections, and gives each to a function in a thread of its own."""

    def __init__(self, serve: Callable[["Server", socket.socket], None]) -> None:
        self.got: list[tuple[int, int, bytes]] = []  # api key, correlation id, body
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._handle, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _handle(self, sock: socket.socket) -> None:
        with sock:
            with suppress(ConnectionError):
                self._serve(self, sock)

    def close(self) -> None:
        # shutdown wakes the thread in accept(), which close() alone does not on Linux.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(_DEADLINE_S)
            assert not thread.is_alive()


def echo(_: Server, sock: socket.socket) -> None:
    while data := sock.recv(65536):
        sock.sendall(data)


def answer(server: Server, sock: socket.socket) -> None:
    """As a broker: each request gets a response that repeats its body; Produce with the body b"acks=0" gets none."""
    while head := receive(sock, 12):
        length, api_key, _, correlation_id = struct.unpack(">ihhi", head)
        body = receive(sock, length - 8)
        server.got.append((api_key, correlation_id, body))
        if body != b"acks=0":
            sock.sendall(response(correlation_id, body))


@pytest.fixture
def echo_server() -> Iterator[Server]:
    with closing(Server(echo)) as server:
        yield server


@pytest.fixture
def broker() -> Iterator[Server]:
    with closing(Server(answer)) as server:
        yield server


@pytest.fixture
def echo_proxy(echo_server: Server) -> Iterator[FaultProxy]:
    with FaultProxy("127.0.0.1", echo_server.port, kafka=False, seed=1) as proxy:
        yield proxy


@pytest.fixture
def proxy(broker: Server) -> Iterator[FaultProxy]:
    with FaultProxy("127.0.0.1", broker.port, seed=1) as proxy:
        yield proxy


def connect(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout=_DEADLINE_S)


def talk(sock: socket.socket, data: bytes) -> bytes:
    sock.sendall(data)
    return receive(sock, len(data))


# ---- the line


def test_passes_bytes_on_and_counts_them(echo_proxy: FaultProxy) -> None:
    data = random.Random(5).randbytes(5_000_000)
    with connect(echo_proxy) as sock:
        sender = threading.Thread(target=sock.sendall, args=(data,))
        sender.start()
        assert receive(sock, len(data)) == data
        sender.join()
    # A byte is counted after it was sent, so the receiver may be quicker.
    wait_until(lambda: echo_proxy.bytes_up == echo_proxy.bytes_down == len(data), "all bytes are counted")
    assert (echo_proxy.connections, echo_proxy.cut_connections, echo_proxy.bytes_swallowed) == (1, 0, 0)
    wait_until(lambda: echo_proxy.open_connections == 0, "the closed connection is forgotten")


def test_end_of_stream_goes_through_after_the_last_byte(echo_proxy: FaultProxy) -> None:
    with connect(echo_proxy) as sock:
        sock.sendall(b"last words")
        sock.shutdown(socket.SHUT_WR)
        assert receive(sock, 1000) == b"last words"


def test_cut_resets_open_connections_and_lets_new_ones_in(echo_proxy: FaultProxy) -> None:
    with connect(echo_proxy) as one, connect(echo_proxy) as two:
        assert talk(one, b"a") == b"a"
        assert talk(two, b"b") == b"b"
        assert echo_proxy.cut() == 2
        for sock in (one, two):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
    assert echo_proxy.cut_connections == 2
    with connect(echo_proxy) as sock:
        assert talk(sock, b"again") == b"again"
    assert echo_proxy.connections == 3


def test_cut_can_refuse_new_connections_until_restore(echo_proxy: FaultProxy) -> None:
    port = echo_proxy.port
    for _ in range(3):
        echo_proxy.cut(refuse=True)
        with pytest.raises(ConnectionRefusedError):
            connect(echo_proxy)
        echo_proxy.restore()
        with connect(echo_proxy) as sock:
            assert talk(sock, b"x") == b"x"
    assert echo_proxy.port == port


def test_no_one_can_take_the_port_while_connections_are_refused(echo_proxy: FaultProxy) -> None:
    echo_proxy.cut(refuse=True)
    with closing(socket.socket()) as thief, pytest.raises(OSError, match="in use"):
        thief.bind(("127.0.0.1", echo_proxy.port))


def test_black_hole_swallows_and_restore_resets_the_torn_connection(echo_proxy: FaultProxy) -> None:
    with connect(echo_proxy) as torn, connect(echo_proxy) as idle:
        assert talk(torn, b"before") == b"before"
        assert talk(idle, b"before") == b"before"
        up = echo_proxy.bytes_up
        echo_proxy.black_hole()
        torn.sendall(b"x" * 1000)
        wait_until(lambda: echo_proxy.bytes_swallowed == 1000, "the bytes are swallowed")
        with connect(echo_proxy) as fresh:  # taken, and answered by nobody
            fresh.sendall(b"hello?")
            wait_until(lambda: echo_proxy.bytes_swallowed == 1006, "a new connection's bytes are swallowed")
            fresh.settimeout(0.02)
            with pytest.raises(TimeoutError):
                fresh.recv(1)
        assert echo_proxy.bytes_up == up
        echo_proxy.restore()
        with pytest.raises(ConnectionResetError):
            torn.recv(1)
        assert talk(idle, b"after") == b"after"
    assert echo_proxy.cut_connections >= 1


def test_black_hole_in_one_direction(broker: Server, proxy: FaultProxy) -> None:
    proxy.black_hole("down")
    with connect(proxy) as sock:
        sock.sendall(request(PRODUCE, 1, b"arrives"))
        wait_until(lambda: broker.got == [(PRODUCE, 1, b"arrives")], "the request reaches the broker")
        wait_until(lambda: proxy.bytes_swallowed == len(response(1, b"arrives")), "the response is swallowed")
    assert proxy.bytes_down == 0


def test_black_hole_that_only_stalls_loses_nothing(echo_proxy: FaultProxy) -> None:
    with connect(echo_proxy) as sock:
        assert talk(sock, b"before") == b"before"
        echo_proxy.black_hole(swallow=False)
        sock.sendall(b"later")
        sock.settimeout(0.02)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        echo_proxy.restore()
        sock.settimeout(_DEADLINE_S)
        assert receive(sock, 5) == b"later"
    assert (echo_proxy.bytes_swallowed, echo_proxy.cut_connections) == (0, 0)


def test_delay_holds_back_both_directions_and_keeps_the_order(echo_proxy: FaultProxy) -> None:
    data = bytes(range(256)) * 40
    echo_proxy.delay(0.05, jitter=0.04)
    with connect(echo_proxy) as sock:
        start = time.monotonic()
        for index in range(0, len(data), 512):
            sock.sendall(data[index : index + 512])
        assert receive(sock, len(data)) == data
        assert time.monotonic() - start >= 2 * (0.05 - 0.04)
        echo_proxy.delay(0.1)
        start = time.monotonic()
        assert talk(sock, b"x") == b"x"
        assert time.monotonic() - start >= 0.2
        echo_proxy.restore()
        echo_proxy.delay(0.1, direction="up")
        start = time.monotonic()
        assert talk(sock, b"y") == b"y"
        assert time.monotonic() - start >= 0.1


def test_restore_sends_what_was_delayed_at_once(echo_proxy: FaultProxy) -> None:
    echo_proxy.delay(600)
    with connect(echo_proxy) as sock:
        sock.sendall(b"hurry")
        wait_until(lambda: echo_proxy.open_connections == 1, "the connection is open")
        sock.settimeout(0.02)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        echo_proxy.restore()
        sock.settimeout(_DEADLINE_S)
        assert receive(sock, 5) == b"hurry"


def test_bandwidth_is_that_of_the_line(echo_proxy: FaultProxy) -> None:
    echo_proxy.bandwidth(1_000_000)
    data = b"z" * 60_000
    with connect(echo_proxy) as one, connect(echo_proxy) as two:
        start = time.monotonic()
        for sock in (one, two):
            sock.sendall(data)
        for sock in (one, two):
            assert receive(sock, len(data)) == data
        # 120 kB in all, of which 20 kB may go at once.
        assert time.monotonic() - start >= 0.09


def test_lifetime_cuts_every_connection(echo_proxy: FaultProxy) -> None:
    with connect(echo_proxy) as old:
        assert talk(old, b"x") == b"x"
        echo_proxy.lifetime(0.01, 0.03)
        with connect(echo_proxy) as new:
            for sock in (old, new):
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
    assert echo_proxy.cut_connections == 2


def test_client_is_reset_when_the_broker_is_down(echo_server: Server) -> None:
    with FaultProxy("127.0.0.1", echo_server.port) as proxy:
        echo_server.close()
        ends: list[bytes] = []
        # The reset may come as early as in connect().
        with suppress(ConnectionResetError, BrokenPipeError), connect(proxy) as sock:
            ends.append(sock.recv(1))
        assert ends in ([], [b""])
        wait_until(lambda: proxy.open_connections == 0, "nothing is left of it")
        assert (proxy.connections, proxy.cut_connections) == (1, 0)


# ---- Kafka's requests


def test_counts_requests_however_they_are_cut_up(broker: Server, proxy: FaultProxy) -> None:
    def went_through(count: int) -> bool:
        return proxy.bytes_up >= count

    stream = request(METADATA, 1) + request(PRODUCE, 2, b"abc") + request(PRODUCE, 3, b"de")
    with connect(proxy) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for index, byte in enumerate(stream):
            sock.sendall(bytes([byte]))
            if index % 5 == 0:  # else the kernel may hand them over as one piece
                wait_until(partial(went_through, index - 12), "the bytes go through")
        expected = response(1) + response(2, b"abc") + response(3, b"de")
        assert receive(sock, len(expected)) == expected
    assert proxy.requests_seen == {METADATA: 1, PRODUCE: 2}
    assert broker.got == [(METADATA, 1, b""), (PRODUCE, 2, b"abc"), (PRODUCE, 3, b"de")]


def test_drop_api_swallows_requests_of_that_api_only(broker: Server, proxy: FaultProxy) -> None:
    proxy.drop_api(PRODUCE)
    with connect(proxy) as sock:
        sock.sendall(request(PRODUCE, 1, b"lost" * 100_000) + request(METADATA, 2) + request(PRODUCE, 3))
        assert receive(sock, 8) == response(2)
        wait_until(lambda: proxy.requests_hit[PRODUCE] == 2, "both are dropped")
        wait_until(lambda: proxy.bytes_swallowed == 400_012 + 12, "and counted")
        proxy.restore()
        sock.sendall(request(PRODUCE, 4))
        assert receive(sock, 8) == response(4)
    assert [(api, number) for api, number, _ in broker.got] == [(METADATA, 2), (PRODUCE, 4)]


def test_drop_api_of_responses_lets_the_broker_act(broker: Server, proxy: FaultProxy) -> None:
    proxy.drop_api(PRODUCE, on="response", times=1)
    with connect(proxy) as sock:
        sock.sendall(request(PRODUCE, 1, b"acks=0") + request(FETCH, 2) + request(PRODUCE, 3) + request(PRODUCE, 4))
        assert receive(sock, 16) == response(2) + response(4)
    assert [number for _, number, _ in broker.got] == [1, 2, 3, 4]
    assert proxy.requests_hit == {PRODUCE: 1}


def test_delay_api_holds_back_that_request_and_those_behind_it(broker: Server, proxy: FaultProxy) -> None:
    proxy.delay_api(FETCH, 0.3, times=1)
    with connect(proxy) as sock:
        start = time.monotonic()
        assert talk_frames(sock, request(METADATA, 1), response(1)) - start < 0.3
        sock.sendall(request(FETCH, 2))
        assert talk_frames(sock, request(METADATA, 3), response(2) + response(3)) - start >= 0.3
        start = time.monotonic()
        assert talk_frames(sock, request(FETCH, 4), response(4)) - start < 0.3
    assert [number for _, number, _ in broker.got] == [1, 2, 3, 4]


def talk_frames(sock: socket.socket, sent: bytes, expected: bytes) -> float:
    sock.sendall(sent)
    assert receive(sock, len(expected)) == expected
    return time.monotonic()


@pytest.mark.parametrize("where", ["request", "response"])
def test_cut_on_api(broker: Server, proxy: FaultProxy, where: str) -> None:
    proxy.cut_on_api(PRODUCE, on="request" if where == "request" else "response", times=1)
    with connect(proxy) as sock:
        talk_frames(sock, request(METADATA, 1), response(1))
        sock.sendall(request(PRODUCE, 2))
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert [number for _, number, _ in broker.got] == ([1] if where == "request" else [1, 2])
    assert (proxy.cut_connections, proxy.requests_hit) == (1, {PRODUCE: 1})
    with connect(proxy) as sock:
        talk_frames(sock, request(PRODUCE, 3), response(3))


def test_other_protocols_pass_as_they_are(echo_server: Server) -> None:
    hello = b"\x16\x03\x01\x02\x00" + bytes(range(200))  # the start of a TLS handshake
    with FaultProxy("127.0.0.1", echo_server.port) as proxy, connect(proxy) as sock:
        proxy.drop_api(PRODUCE)
        assert talk(sock, hello) == hello
        assert talk(sock, b"more") == b"more"
        assert not proxy.requests_seen


def test_frame_scanner_yields_the_stream_whatever_the_pieces() -> None:
    rng = random.Random(7)
    for _ in range(200):
        keys = [rng.randrange(80) for _ in range(rng.randrange(1, 12))]
        frames = [request(key, number, rng.randbytes(rng.choice([0, 1, 5, 300]))) for number, key in enumerate(keys)]
        stream = b"".join(frames)
        scanner = FrameScanner(RequestLog(), is_response=False)
        passed, seen, position = b"", [], 0
        while position < len(stream):
            piece = stream[position : position + rng.choice([1, 2, 11, 12, 13, 40, 1000])]
            position += len(piece)
            for segment, key in scanner.scan(memoryview(piece)):
                passed += segment
                if key is not None:
                    seen.append(key)
            assert scanner.position == len(piece)
        assert (passed, seen, scanner.take_partial()) == (stream, keys, b"")


def test_requests_without_a_response_are_forgotten() -> None:
    requests = RequestLog()
    requests.sent(1, PRODUCE)  # acks=0
    requests.sent(2, FETCH)
    assert requests.answered(2) == FETCH
    assert (requests.answered(1), requests.answered(2)) == (-1, -1)


@pytest.mark.parametrize("good", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_frame_scanner_gives_every_byte_back_when_it_is_not_kafka(good: int, size: int) -> None:
    stream = request(PRODUCE, 1, b"ok") * good + b"\xff" * 40
    scanner, passed = FrameScanner(RequestLog(), is_response=False), b""
    for position in range(0, len(stream), size):
        piece = memoryview(stream[position : position + size])
        try:
            for segment, _ in scanner.scan(piece):
                passed += segment
        except NotKafka:
            passed += scanner.take_partial() + piece[scanner.position :]
            passed += stream[position + size :]
            break
    else:
        pytest.fail("this passed for Kafka's protocol")
    assert passed == stream


# ---- use from many threads, end of life, misuse


def test_faults_may_be_switched_from_many_threads_under_load(echo_proxy: FaultProxy) -> None:
    stop = threading.Event()
    data = b"q" * 10_000
    echoed = []

    def load() -> None:
        while not stop.is_set():
            try:
                with connect(echo_proxy) as sock:
                    while not stop.is_set():
                        assert talk(sock, data) in (data, b"") or stop.is_set()
                        echoed.append(1)
            except ConnectionError:
                pass

    def trouble(seed: int) -> None:
        rng = random.Random(seed)
        faults: list[Callable[[], object]] = [
            echo_proxy.cut,
            lambda: echo_proxy.delay(0.001),
            echo_proxy.restore,
            lambda: echo_proxy.bandwidth(1e7),
        ]
        for _ in range(50):
            rng.choice(faults)()

    loads = [threading.Thread(target=load) for _ in range(3)]
    troubles = [threading.Thread(target=trouble, args=(seed,)) for seed in range(3)]
    for thread in loads + troubles:
        thread.start()
    for thread in troubles:
        thread.join(_DEADLINE_S)
        assert not thread.is_alive()
    echo_proxy.restore()
    before = len(echoed)
    wait_until(lambda: len(echoed) > before + 10, "traffic flows again")
    stop.set()
    for thread in loads:
        thread.join(_DEADLINE_S)
        assert not thread.is_alive()
    assert echo_proxy.cut_connections > 0


def test_close_ends_the_thread_and_frees_the_port(echo_server: Server) -> None:
    proxy = FaultProxy("127.0.0.1", echo_server.port, kafka=False)
    name = f"fault-proxy-{proxy.port}"
    with connect(proxy) as sock:
        assert talk(sock, b"x") == b"x"
        proxy.close()
        proxy.close()
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    assert name not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    with pytest.raises(RuntimeError, match="is closed"):
        proxy.cut()


def test_arguments_are_checked(echo_proxy: FaultProxy, proxy: FaultProxy) -> None:
    with pytest.raises(ValueError, match="seconds=-1"):
        echo_proxy.delay(-1)
    with pytest.raises(ValueError, match="black_hole"):
        echo_proxy.bandwidth(0)
    with pytest.raises(ValueError, match="in that order"):
        echo_proxy.lifetime(2, 1)
    with pytest.raises(ValueError, match="kafka=False"):
        echo_proxy.drop_api(PRODUCE)
    with pytest.raises(ValueError, match="times=0"):
        proxy.drop_api(PRODUCE, times=0)
    with pytest.raises(ValueError, match="sideways"):
        proxy.black_hole("sideways")  # type: ignore[arg-type]
