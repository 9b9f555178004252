"""Tools for testing services and this library: embedded and real Kafka, faults, dispatch without a broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keven_core._lazy import lazy_attributes

if TYPE_CHECKING:
    from keven_core.testing.dispatching import DispatchResult, PublishedMessage, dispatch
    from keven_core.testing.embedded import EmbeddedKafka
    from keven_core.testing.proxy import FaultProxy
    from keven_core.testing.real_kafka import RealKafka

__all__ = [
    "DispatchResult",
    "EmbeddedKafka",
    "FaultProxy",
    "PublishedMessage",
    "RealKafka",
    "dispatch",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "keven_core.testing.dispatching": ("DispatchResult", "PublishedMessage", "dispatch"),
        "keven_core.testing.embedded": ("EmbeddedKafka",),
        "keven_core.testing.proxy": ("FaultProxy",),
        "keven_core.testing.real_kafka": ("RealKafka",),
    },
)
