from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, final

from typing_extensions import disjoint_base

from keven_core._native.handle import Client, _ClientEvent
from keven_core.kafka.errors import Delivery

_Headers: TypeAlias = Sequence[tuple[str, bytes | None]] | Mapping[str, bytes | None]

NOT_DELIVERED: Literal["not delivered"]
POSSIBLY_DELIVERED: Literal["possibly delivered"]

@final
class DeliveryAccount:
    def __init__(
        self,
        keep_failures: int = 10,
        *,
        max_messages: int = 0,
        max_bytes: int = 0,
        on_delivery: Callable[[list[Any]], object] | None = None,
        only_failures: bool = False,
        announce: bool = False,
        raises: bool = False,
        numbered: bool = False,
        producer: Producer | None = None,
    ) -> None: ...
    @property
    def produced(self) -> int: ...
    @property
    def delivered(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def untaken(self) -> int: ...
    @property
    def failures(self) -> list[Delivery]: ...
    @property
    def keep_failures(self) -> int: ...
    @property
    def on_delivery(self) -> Callable[[list[Any]], object] | None: ...
    @property
    def pending(self) -> int: ...
    @property
    def pending_bytes(self) -> int: ...
    def take_failures(self) -> tuple[int, list[Delivery]]: ...

@final
class Topic:
    @property
    def name(self) -> str: ...

@final
class LoopGate:
    def heed(self) -> None: ...

@disjoint_base
class Producer(Client):
    on_event: Callable[[_ClientEvent], object] | None
    on_topic: Callable[[str], object] | None
    on_failure: Callable[[int, Delivery], object] | None
    replaced: bool
    def __init__(self, options: dict[str, str], on_event: Callable[[Any], object] | None = None) -> None: ...
    @property
    def attended(self) -> bool: ...
    @property
    def fatal(self) -> bool: ...
    def produce(
        self,
        topic: str,
        value: bytes | None,
        account: DeliveryAccount,
        *,
        key: bytes | None = None,
        headers: _Headers | None = None,
        partition: int = -1,
        timestamp_ms: int = 0,
        timeout_ms: int = 0,
    ) -> None: ...
    def check_size(self, topic: str, size: int) -> None: ...
    def serve(self, timeout_ms: int = 0) -> None: ...
    def wait(self, account: DeliveryAccount, timeout_s: float) -> bool: ...
    def attend(self, timeout_ms: int) -> bool: ...
    def call_attendant(self) -> None: ...
    def watch(self) -> None: ...
    @property
    def queued(self) -> int: ...
    def close(self, timeout_ms: int = 10_000) -> int: ...

def untold_failures() -> int: ...
