from collections.abc import Callable
from typing import Any, final

@final
class PayloadDecoder:
    def __init__(self, decode: Callable[[Any], Any], initialize: tuple[Any, ...] | None = None) -> None: ...
    def decode(self, data: Any) -> Any: ...

@final
class DetailsDecoder:
    def __init__(
        self,
        decode: Callable[[Any], Any],
        initialize: tuple[Any, ...] | None = None,
        *,
        build: Callable[[Any], Any],
        detail_class: Any = None,
        make: Callable[[], Any] | None = None,
        names_to_look_at: frozenset[str] = ...,
    ) -> None: ...
    def decode(self, data: Any) -> Any: ...

@final
class AttributesDecoder:
    def __init__(
        self,
        decode: Callable[[Any], Any],
        initialize: tuple[Any, ...] | None = None,
        *,
        known: tuple[str, ...],
        slots: tuple[str, ...],
        decode_known: Callable[[Any], Any],
        fill: Callable[[Any, dict[str, Any], Any], Any],
        is_simple: bool,
    ) -> None: ...
    def decode(self, data: Any) -> Any: ...
