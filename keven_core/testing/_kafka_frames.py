"""Cuts a Kafka byte stream into requests or responses without copying it, for the fault proxy.

Grammar (Kafka protocol guide, "Protocol primitive types" and "Common request and response structure"):

    request  = length:int32 api_key:int16 api_version:int16 correlation_id:int32 ...     length counts from api_key on
    response = length:int32 correlation_id:int32 ...                                 length counts from correlation_id

All integers are big-endian. Responses come in the order of their requests (the broker sees to that, one connection at
a time); a request may have none (Produce with acks=0).
"""

import struct
from collections import deque
from collections.abc import Callable, Iterator

__all__ = ["FrameScanner", "NotKafka", "RequestLog", "Segment"]

_REQUEST = struct.Struct(">ihhi")
_RESPONSE = struct.Struct(">ii")
# socket.request.max.bytes is 100 MB by default. The bound must be below 0x16030000 (369 MB): a TLS handshake record
# starts with the bytes 16 03.
_LONGEST_REQUEST = 256 << 20
_LONGEST_RESPONSE = 1 << 30
_HIGHEST_API_KEY = 1000

Segment = tuple[memoryview, int | None]
"""Bytes of the stream, and the API key of the request that starts with them (None: they go on with the one before)."""


class NotKafka(Exception):
    """The bytes cannot be Kafka's: TLS, or another protocol."""


class RequestLog:
    """Which requests of one connection wait for their response: correlation id and API key, in order.

    Bounded by what the client has in flight; requests without a response are dropped when a later one is answered.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, int]] = deque()

    def sent(self, correlation_id: int, api_key: int) -> None:
        """Remember a request."""
        self._waiting.append((correlation_id, api_key))

    def answered(self, correlation_id: int) -> int:
        """Return the API key of the request with that id, -1 if there is none."""
        for position, (waiting_id, api_key) in enumerate(self._waiting):
            if waiting_id == correlation_id:
                for _ in range(position + 1):
                    self._waiting.popleft()
                return api_key
        return -1


class FrameScanner:
    """Finds where frames start in a stream that arrives in arbitrary pieces.

    Args:
        requests: the log that this connection's two directions share.
        is_response: True for the direction broker to client.
    """

    def __init__(self, requests: RequestLog, *, is_response: bool) -> None:
        self._requests = requests
        self._read_head: Callable[[memoryview, int], tuple[int, int]] = (
            self._response_head if is_response else self._request_head
        )
        self._head_size = _RESPONSE.size if is_response else _REQUEST.size
        self._partial = b""  # a frame's head that has not come in full; shorter than 12 bytes
        self._left = 0  # bytes of the current frame still to come
        self.position = 0  # how much of the data given to `scan` has been yielded or kept back

    def scan(self, data: memoryview) -> Iterator[Segment]:
        """Yield the bytes as segments, each within one frame. A head that is not complete is kept for the next call.

        Raises:
            NotKafka: the stream is something else. `take_partial` has what was kept back, and from `position` on the
                data have not been yielded.
        """
        self.position = 0
        if self._partial:
            missing = self._head_size - len(self._partial)
            if len(data) < missing:
                self._partial += bytes(data)
                self.position = len(data)
                return
            # Joined with the kept bytes; the rest of this piece follows as it is.
            head = memoryview(self._partial + bytes(data[:missing]))
            frame_bytes, api_key = self._read_head(head, 0)
            self._partial = b""
            self._left = frame_bytes - self._head_size
            self.position = missing
            yield head, api_key
        end = len(data)
        while self.position < end:
            start = self.position
            first: int | None = None
            if not self._left:
                if end - start < self._head_size:
                    self._partial = bytes(data[start:])
                    self.position = end
                    return
                self._left, first = self._read_head(data, start)
            piece = min(self._left, end - start)
            self._left -= piece
            self.position = start + piece
            yield data[start : start + piece], first

    def take_partial(self) -> bytes:
        """Return the bytes kept back, and forget them."""
        partial, self._partial = self._partial, b""
        return partial

    def _request_head(self, data: memoryview, position: int) -> tuple[int, int]:
        length, api_key, _, correlation_id = _REQUEST.unpack_from(data, position)
        if not 8 <= length <= _LONGEST_REQUEST or not 0 <= api_key <= _HIGHEST_API_KEY:
            raise NotKafka
        self._requests.sent(correlation_id, api_key)
        return length + 4, api_key

    def _response_head(self, data: memoryview, position: int) -> tuple[int, int]:
        length, correlation_id = _RESPONSE.unpack_from(data, position)
        if not 4 <= length <= _LONGEST_RESPONSE:
            raise NotKafka
        return length + 4, self._requests.answered(correlation_id)
