"""The committed files: a snapshot, and the golden bytes beside it; both checked against the registry, or updated."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keven_core.kafka.errors import ConfigurationError
from keven_core.kafka.schema.changes import BACKWARD, DIRECTIONS, Change, compare
from keven_core.kafka.schema.golden import bytes_of, undecodable
from keven_core.kafka.schema.snapshot import FORMAT, describe, take_snapshot

__all__ = ["DEFAULT_PATH", "Report", "check", "golden_path", "to_text", "update"]

DEFAULT_PATH = "schema/keven.json"

_WIDTH = 120


@dataclass
class Report:
    """What a check, or an update, has found.

    Attributes:
        path: the snapshot's file.
        direction: "backward", "forward" or "full".
        changes: everything that differs from the snapshot.
        undecodable: golden bytes that the present classes can't decode, each with the reason.
        without_bytes: events and commands that no golden bytes can be made of, each with the reason.
        is_current: whether the files are what an update would write.
    """

    path: Path
    direction: str = BACKWARD
    changes: list[Change] = field(default_factory=list)
    undecodable: list[str] = field(default_factory=list)
    without_bytes: list[str] = field(default_factory=list)
    is_current: bool = True

    @property
    def breaking(self) -> list[str]:
        """What breaks, a line each; empty: nothing does."""
        return [str(change) for change in self.changes if change.is_breaking(self.direction)] + self.undecodable

    def __str__(self) -> str:
        compatible = [change for change in self.changes if not change.is_breaking(self.direction)]
        lines = [f"{self.path}, {self.direction}: {len(self.breaking)} breaking, {len(compatible)} compatible"]
        lines += [f"  BREAKING    {line}" for line in self.breaking]
        lines += [f"  compatible  {change}{_elsewhere(change)}" for change in compatible]
        lines += [f"  no golden bytes  {line}" for line in self.without_bytes]
        return "\n".join(lines)


def _elsewhere(change: Change) -> str:
    reason = {"forward": "old readers can't read it", "backward": "old records can't be read"}
    return "".join(f" [breaks {direction}: {reason[direction]}]" for direction in sorted(change.breaks))


def check(path: str | os.PathLike[str] = DEFAULT_PATH, direction: str = BACKWARD) -> Report:
    """Compare what is registered in this process with a snapshot, and decode its golden bytes. Writes nothing.

    Arguments:
        path: the snapshot's file.
        direction: "backward" (the default): the present classes have to read what older ones wrote; "forward": older
            ones have to read what the present ones write; "full": both.

    Raises ConfigurationError when the file is missing or is no snapshot, and for another direction.
    """
    return _Files(path, direction).report


def update(
    path: str | os.PathLike[str] = DEFAULT_PATH, direction: str = BACKWARD, *, allow_breaking: bool = False
) -> Report:
    """Write the snapshot of what is registered in this process, and add its golden bytes to those that are kept.

    Nothing is written when something breaks, unless `allow_breaking`; golden bytes that can't be decoded any more are
    dropped then. Arguments and errors as of check(), but for a missing file: it is made.
    """
    files = _Files(path, direction, new_allowed=True)
    if allow_breaking or not files.report.breaking:
        files.write()
    return files.report


def golden_path(path: str | os.PathLike[str]) -> Path:
    """Where the golden bytes of a snapshot are kept."""
    return Path(path).with_suffix(".golden.json")


class _Files:
    """A snapshot's two files beside what is registered now."""

    def __init__(self, path: str | os.PathLike[str], direction: str, *, new_allowed: bool = False) -> None:
        if direction not in DIRECTIONS:
            raise ConfigurationError(f"direction={direction!r} is not allowed: {', '.join(DIRECTIONS)}")
        self._path, self._golden_path = Path(path), golden_path(path)
        self._new = take_snapshot()
        self._described, self._types = describe("#/types/")
        if new_allowed and not self._path.exists():
            old, kept = {"format": FORMAT, "types": {}}, {}
        else:
            old = _read(self._path, "`python -m keven_core schema update MODULE ...` makes it")
            kept = _read(self._golden_path, f"get it back from version control: it belongs to {self._path}")
        self.report = Report(self._path, direction, compare(old, self._new))
        self._golden: dict[str, Any] = {"format": FORMAT}
        self._add_kept(kept)
        self._add_present()
        self.report.is_current = (old, kept) == (self._new, self._golden)

    def _add_kept(self, kept: Mapping[str, Any]) -> None:
        classes = {(one.section, one.name): one.cls for one in self._described}
        for section in sorted(kept.keys() - {"format"}):
            for name, entries in kept[section].items():
                for number, entry in enumerate(entries, 1):
                    registered = (section, name) in classes
                    reason = undecodable(classes[section, name], entry) if registered else "it is not registered"
                    if reason is None:
                        self._golden.setdefault(section, {}).setdefault(name, []).append(entry)
                    else:
                        where = f"{section.removesuffix('s')} {name}, golden bytes {number} of {len(entries)}"
                        self.report.undecodable.append(f"{where}: {reason}")

    def _add_present(self) -> None:
        for one in self._described:
            if one.section == "topics":  # others write them
                continue
            try:
                made = bytes_of(one, self._types)
            except ValueError as error:
                self.report.without_bytes.append(f"{one.section.removesuffix('s')} {one.name}: {error}")
                continue
            if made:
                entries = self._golden.setdefault(one.section, {}).setdefault(one.name, [])
                entries += [entry for entry in made if entry not in entries]

    def write(self) -> None:
        """Write both; a reader, or a run that is killed, never sees half a file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        for path, content in ((self._golden_path, self._golden), (self._path, self._new)):
            temporary = path.with_name(f"{path.name}.tmp")
            temporary.write_text(to_text(content), encoding="utf-8")
            temporary.replace(path)


def _read(path: Path, hint: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{path} does not exist; {hint}") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} can't be read: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigurationError(f"{path} is not a snapshot of format {FORMAT}; {hint}")
    return found


def to_text(value: Any) -> str:
    """JSON with sorted keys, in which whatever fits into a line stands on one; it ends with a newline."""
    return _lines(value, "", 0) + "\n"


def _lines(value: Any, indent: str, taken: int) -> str:
    line = json.dumps(value, ensure_ascii=False, sort_keys=True)
    if len(indent) + taken + len(line) < _WIDTH or not isinstance(value, dict | list) or not value:
        return line
    inner = indent + "  "
    if isinstance(value, list):
        parts, ends = [_lines(part, inner, 0) for part in value], "[]"
    else:
        names = {name: json.dumps(name, ensure_ascii=False) + ": " for name in sorted(value)}
        parts, ends = [text + _lines(value[name], inner, len(text)) for name, text in names.items()], "{}"
    return ends[0] + "\n" + ",\n".join(inner + part for part in parts) + "\n" + indent + ends[1]
