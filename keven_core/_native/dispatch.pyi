from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, final

from keven_core._native.message import Record

_Decode: TypeAlias = Callable[[Any], Any]
_Headers: TypeAlias = Iterable[tuple[str, bytes | None]]

def check_name(name: str) -> None: ...
def check_nesting(value: bytes) -> None: ...

@final
class Route:
    def __init__(
        self,
        name: str,
        call: Callable[..., Any],
        *,
        decode_json: _Decode | None = None,
        decode_msgpack: _Decode | None = None,
        decode_envelope: Callable[[str, dict[str, Any], bytes], Any] | None = None,
        on_tombstone: Callable[[Record], Any] | None = None,
        is_async: bool = False,
        tombstone_is_async: bool = False,
        raw: bool = False,
        with_topic: bool = False,
        copied: bool = False,
        batch_size: int = 0,
        batch_wait_ms: int = 0,
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def call(self) -> Callable[..., Any]: ...
    @property
    def decode_json(self) -> _Decode | None: ...
    @property
    def decode_msgpack(self) -> _Decode | None: ...
    @property
    def decode_envelope(self) -> Callable[[str, dict[str, Any], bytes], Any] | None: ...
    @property
    def on_tombstone(self) -> Callable[[Record], Any] | None: ...
    @property
    def is_async(self) -> bool: ...
    @property
    def tombstone_is_async(self) -> bool: ...
    @property
    def raw(self) -> bool: ...
    @property
    def with_topic(self) -> bool: ...
    @property
    def copied(self) -> bool: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def batch_wait_ms(self) -> int: ...

@final
class DispatchTable:
    def __init__(
        self,
        routes: Iterable[Route] = (),
        *,
        bound: Mapping[str, Route] | None = None,
        everything: Route | None = None,
        unnamed: Route | None = None,
        name_field: str = "event_name",
        name_json: Callable[[bytes], str | None] | None = None,
        name_msgpack: Callable[[bytes], str | None] | None = None,
        codec_of: Callable[[str | None], Any] | None = None,
        names_codec: Callable[[bytes, str], bool | None] | None = None,
        max_payload_bytes: int = ...,
    ) -> None: ...
    @property
    def routes(self) -> dict[str, Route]: ...
    @property
    def bound(self) -> dict[str, Route]: ...
    @property
    def everything(self) -> Route | None: ...
    @property
    def unnamed(self) -> Route | None: ...
    @property
    def name_field(self) -> str: ...
    @property
    def max_payload_bytes(self) -> int: ...
    def name_of(self, value: object, topic: str | None, headers: _Headers | None = None) -> str | None: ...
    def resolve(
        self, value: bytes, topic: str | None = None, headers: _Headers | None = None
    ) -> tuple[Route, Any] | tuple[None, None]: ...
