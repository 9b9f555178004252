from collections.abc import Mapping, Sequence
from contextvars import ContextVar, Token
from typing import Any, TypeAlias, final

from typing_extensions import disjoint_base

from keven_core._native.producer import DeliveryAccount, Producer

_Headers: TypeAlias = Sequence[tuple[str, bytes | None]] | Mapping[str, bytes | None]

_scope: ContextVar[Any]

@final
class HandlerScope:
    def __init__(self, capture: bool = False) -> None: ...
    @property
    def captured(self) -> list[tuple[str, bytes | None, bytes | None, list[tuple[str, bytes | None]]]] | None: ...
    @property
    def account(self) -> DeliveryAccount: ...
    def enter(self) -> Token[Any]: ...
    def leave(self, token: Token[Any] | None = None) -> None: ...
    def take(self) -> DeliveryAccount: ...
    def collect(self) -> None: ...
    def wait(self, account: DeliveryAccount, timeout_s: float) -> bool: ...

@disjoint_base
class NativeLogger:
    timeout: float
    @property
    def topic(self) -> str | None: ...
    @topic.setter
    def topic(self, value: str | None) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def deliveries(self) -> DeliveryAccount | None: ...
    def log(
        self,
        data: object,
        topic: str | None = None,
        *,
        key: bytes | str | None = None,
        headers: _Headers | None = None,
        timestamp_ms: int | None = None,
    ) -> None: ...
    def submit(
        self,
        data: object,
        topic: str | None = None,
        *,
        key: bytes | str | None = None,
        headers: _Headers | None = None,
        timestamp_ms: int | None = None,
        deliveries: DeliveryAccount | None = None,
        loop: Any = None,
    ) -> Any: ...
    def _log_and_wait(self, data: object, topic: str | None) -> None: ...
    def _configure(self, *, stand_in: object = None, detour: bool = False, yields: bool = False) -> None: ...
    def _end(self) -> None: ...
    def _client(self) -> Producer | None: ...
