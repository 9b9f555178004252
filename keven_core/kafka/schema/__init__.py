"""Schema and registration compatibility: may this release of a service read what the last one wrote?

    python -m keven_core schema update shop.events shop.handlers      writes schema/keven.json, to be committed
    python -m keven_core schema check shop.events shop.handlers       exits with 1 when something breaks

    from keven_core.kafka.schema import check
    assert not check("schema/keven.json").breaking

changes     compares two snapshots, as pure functions
snapshot    makes one of what is registered
golden      bytes of every event, kept and decoded
files       the committed files: check() and update()
asyncapi    the same registry as an AsyncAPI 3 document
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from keven_core._lazy import lazy_attributes

if TYPE_CHECKING:
    from keven_core.kafka.schema.asyncapi import asyncapi_document
    from keven_core.kafka.schema.changes import Change, compare
    from keven_core.kafka.schema.files import Report, check, update
    from keven_core.kafka.schema.snapshot import take_snapshot

__all__ = ["Change", "Report", "asyncapi_document", "check", "compare", "take_snapshot", "update"]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "keven_core.kafka.schema.asyncapi": ("asyncapi_document",),
        "keven_core.kafka.schema.changes": ("Change", "compare"),
        "keven_core.kafka.schema.files": ("Report", "check", "update"),
        "keven_core.kafka.schema.snapshot": ("take_snapshot",),
    },
)
