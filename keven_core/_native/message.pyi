import sys
from collections.abc import Iterable
from typing import NoReturn, TypeVar, final, overload

_Default = TypeVar("_Default")

@final
class Payload:
    def __init__(self, *args: object, **kwargs: object) -> NoReturn: ...
    def __len__(self) -> int: ...
    if sys.version_info >= (3, 12):
        def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Record:
    def __init__(
        self,
        topic: str,
        partition: int,
        offset: int,
        *,
        value: bytes | None = None,
        key: bytes | None = None,
        headers: Iterable[tuple[str, bytes | None]] | None = None,
        timestamp_ms: int = -1,
        timestamp_type: int = 0,
        attempt: int = 1,
    ) -> None: ...
    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp_ms(self) -> int: ...
    @property
    def timestamp_type(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> list[tuple[str, bytes | None]]: ...
    @property
    def attempt(self) -> int: ...
    @overload
    def header(self, name: str, default: None = None) -> bytes | None: ...
    @overload
    def header(self, name: str, default: _Default) -> bytes | _Default | None: ...
