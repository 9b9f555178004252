from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, final

from keven_core._native.handle import Client, _ClientEvent
from keven_core.kafka.errors import KafkaError

_Outcome: TypeAlias = Literal["not delivered", "possibly delivered"]
_Failure: TypeAlias = tuple[str, bytes | None, bytes | None, KafkaError, _Outcome]

NOT_DELIVERED: Literal["not delivered"]
POSSIBLY_DELIVERED: Literal["possibly delivered"]

@final
class DeliveryAccount:
    def __init__(self, keep_failures: int = 10) -> None: ...
    @property
    def produced(self) -> int: ...
    @property
    def delivered(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def untaken(self) -> int: ...
    @property
    def failures(self) -> list[_Failure]: ...
    @property
    def keep_failures(self) -> int: ...
    @property
    def pending(self) -> int: ...
    def take_failures(self) -> tuple[int, list[_Failure]]: ...

class Producer(Client):
    on_event: Callable[[_ClientEvent], object] | None
    def __init__(self, options: dict[str, str], on_event: Callable[[Any], object] | None = None) -> None: ...
    def produce(
        self,
        topic: str,
        value: bytes | None,
        account: DeliveryAccount,
        *,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes | None]] | None = None,
        partition: int = -1,
        timestamp_ms: int = 0,
        timeout_ms: int = 0,
    ) -> None: ...
    def serve(self, timeout_ms: int = 0) -> None: ...
    def wait(self, account: DeliveryAccount, timeout_s: float) -> bool: ...
    @property
    def queued(self) -> int: ...
    def close(self, timeout_ms: int = 10_000) -> int: ...
