"""Records that the original library left in its retry topic: read as data, so that they are handled at a migration.

Their value is JSON: `timestamp` and `topic` of the failed message, `failure_count`, `errors`, and `message`, its bytes
as jsonpickle writes them. No type that it names is looked at.
"""

from __future__ import annotations

import base64
import quopri
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from keven_core.kafka.deadletter import Attempt
from keven_core.kafka.errors import UndecodableError

if TYPE_CHECKING:
    from keven_core._native.message import Record

__all__ = ["original_attempt_of"]

# How jsonpickle has encoded bytes over its releases.
_BYTES: dict[str, Callable[[bytes], bytes]] = {
    "py/b64": lambda text: base64.b64decode(b"".join(text.split()), validate=True),
    "py/b85": base64.b85decode,
    "py/bytes": quopri.decodestring,
}


class _Copy(msgspec.Struct):
    failure_count: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
    message: Any
    topic: str
    timestamp: Any = None
    errors: Any = None


_decode = msgspec.json.Decoder(_Copy).decode


def original_attempt_of(copy: Record) -> Attempt | None:
    """What a record of the original's retry topic says; it is due at once. None: it is none."""
    from keven_core._native.dispatch import check_nesting
    from keven_core._native.message import Record

    if copy.value is None or copy.value[:1] != b"{":
        return None
    try:
        check_nesting(copy.value)
        read = _decode(copy.value)
        value = _bytes_of(read.message)
    except (msgspec.MsgspecError, ValueError, UndecodableError):
        return None
    if not read.topic:
        return None
    record = Record(
        read.topic,
        -1,  # where it stood in its topic is not told
        -1,
        value=value,
        key=copy.key,
        headers=copy.headers,
        timestamp_ms=copy.timestamp_ms,
        timestamp_type=copy.timestamp_type,
        attempt=read.failure_count + 1,
        first_failure_ms=copy.timestamp_ms,
    )
    return Attempt(record, ())


def _bytes_of(message: Any) -> bytes:
    """Raises ValueError for what is none."""
    if isinstance(message, str):
        return message.encode()
    if isinstance(message, dict):
        for tag, decode in _BYTES.items():
            if isinstance(message.get(tag), str):
                return decode(message[tag].encode())
    raise ValueError("not bytes")
