"""Everything that one run of a consumer server needs, decided before it starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from keven_core.kafka.config import Settings
from keven_core.kafka.retry import Policies

if TYPE_CHECKING:
    from keven_core._native.dispatch import DispatchTable

__all__ = ["FlowPlan", "Order", "PartitionHook", "Plan", "StartPosition", "TopicPartition"]

Order = Literal["partition", "key", "none"]
StartPosition = str | datetime | Mapping[tuple[str, int], int]


@dataclass
class TopicPartition:
    """A partition as hooks see it.

    Attributes:
        offset: where it starts, -1001: at the committed offset, -2: at the beginning, -1: at the end; changing it in
            `on_assign_topics` changes that. For on_revoke and on_lost the next offset to handle, -1001: none was.
    """

    topic: str
    partition: int
    offset: int


PartitionHook = Callable[[Any, list[TopicPartition]], Any]


@dataclass
class FlowPlan:
    """How records are handled that are in flight at once; without one they are handled one after the other.

    In an event loop `tasks` handle them, and their synchronous handlers run in `threads`, if there are any. Without a
    loop `threads` handle them; without any, the owner's.
    """

    order: Order
    tasks: int
    threads: int
    window: int


@dataclass
class Plan:
    """Everything that a run needs, decided before it starts."""

    settings: Settings
    address: str
    topics: list[str]
    optional_topics: set[str]
    client_id: str
    group_id: str
    table: DispatchTable
    dead_letter_topic: str
    retry_topic: str
    policies: Policies
    some_handlers: Callable[[str, tuple[str, ...]], Callable[[Any], Any] | None]
    flow: FlowPlan | None = None
    written_topics: Sequence[str] = ()
    use_group: bool = True
    start: StartPosition = "stored"
    until_end: bool = False
    no_commit: bool = False
    timeout_s: float | None = None
    reraise_exceptions: bool = False
    log_exceptions: bool = True
    max_poll_interval_s: float = 180
    session_timeout_s: float = 6
    heartbeat_interval_s: float = 2
    on_assign_topics: PartitionHook | None = None
    on_assign: PartitionHook | None = None
    on_revoke: PartitionHook | None = None
    on_lost: PartitionHook | None = None
    on_start: list[Callable[[], Any]] = field(default_factory=list)
    on_stop: list[Callable[[], Any]] = field(default_factory=list)
