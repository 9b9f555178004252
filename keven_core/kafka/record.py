"""What a handler can learn about the record that it handles, at no cost where nobody asks."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keven_core._native.message import Record

__all__ = ["current_record", "current_records"]

# Holds the running consumer (anything with record_in_hand()), set once per server and not per record.
_source: ContextVar[Any] = ContextVar("keven_core.record_source")


def current_record() -> Record:
    """The record that is being handled: topic, partition, offset, key, value, headers, timestamp_ms.

    To be called inside a handler, before it hands work to other threads. The result is a copy and may be kept. Raises
    LookupError outside a handler.
    """
    source = _source.get(None)
    if source is None:
        raise LookupError("current_record() was called outside a handler")
    record: Record = source.record_in_hand()
    return record


def current_records() -> list[Record]:
    """The records that are being handled, in the order of their events: for batch handlers; see current_record()."""
    source = _source.get(None)
    if source is None:
        raise LookupError("current_records() was called outside a handler")
    if not hasattr(source, "records_in_hand"):
        return [source.record_in_hand()]
    records: list[Record] = source.records_in_hand()
    return records
