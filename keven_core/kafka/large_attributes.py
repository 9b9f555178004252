"""Large attributes of details lie in files: `large_attributes = ["text"]` of a pickled event or command.

A str or bytes attribute of more than KEVEN_LARGE_ATTRIBUTE_BYTES is written to

    <KEVEN_LARGE_ATTRIBUTE_DIR>/<day of the message>/<uuid>_<attribute>.la

and the message carries the path within the folder, the size and a checksum. On arrival the attribute holds the path of
the file, and `details.offloads` lists the names of such attributes; `event.load_large_attributes()` reads them in.

Every process that writes or reads such messages has to see the same folder. Nothing is ever deleted here: remove the
folders of days that no consumer can still need.

What comes over the wire can name files of that folder only, of that very form, that are no links and have the checksum.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import logging
import os
import re
import stat
import tempfile
import uuid
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import msgspec

from keven_core.kafka.config import Settings
from keven_core.kafka.errors import MessageTooLargeError, UndecodableError, UsageError

__all__ = ["LargeAttributeManager", "Offload", "manager_of"]

logger = logging.getLogger("keven_core.kafka")

_PATH = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(-[0-9a-f]{16})?/[0-9A-Za-z-]{1,64}_\w{1,128}\.la", re.ASCII)
_CHUNK = 1 << 20
_VARIABLES = ("KEVEN_LARGE_ATTRIBUTE_DIR", "KEVEN_LARGE_ATTRIBUTE_BYTES", "KEVEN_LARGE_ATTRIBUTE_TOTAL_BYTES")


class Offload(msgspec.Struct, frozen=True, gc=False):
    """What a message says of an attribute that lies in a file.

    Attributes:
        path: within the folder, with slashes.
        size_bytes: of the file.
        sha256: of the file, in hexadecimal.
        is_text: whether the attribute was a str (the file is its UTF-8) or bytes.
    """

    path: str
    size_bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: str
    is_text: bool = True


class LargeAttributeManager:
    """Writes attributes into a folder and finds them there.

    Arguments:
        folder: where; made when the first attribute is written. None: a folder of this user under the system's folder
            for temporary files, which other machines do not see and a restart may empty.
        threshold_bytes: attributes of more than that go into a file.
        total_bytes: how much those of one message may have together.

    A service that keeps them elsewhere subclasses it and sets `large_attribute_manager` of its events.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        threshold_bytes: int = 1 << 20,
        total_bytes: int = 1 << 30,
    ) -> None:
        self._is_default = folder is None
        self.folder = Path(folder) if folder is not None else Path(tempfile.gettempdir()) / _default_name()
        self.threshold_bytes = threshold_bytes
        self.total_bytes = total_bytes

    # --- writing -----------------------------------------------------------------------------------------------------

    def offload(self, message: Any, details: Any, names: Iterable[str]) -> dict[str, Offload]:
        """Write the large ones of the named attributes of `details` into files: by name, what the message is to say.

        Called by serialize(), in its thread; blocks until the files are on the disk. Raises MessageTooLargeError when
        they are more than total_bytes, and UsageError when the folder can't be written.
        """
        large: dict[str, tuple[bytes, bool]] = {}
        for name in names:
            value = getattr(details, name, None)
            if isinstance(value, (str, bytes)) and len(value) * 4 > self.threshold_bytes:
                data = value.encode() if isinstance(value, str) else value
                if len(data) > self.threshold_bytes:
                    large[name] = data, isinstance(value, str)
        total = sum(len(data) for data, _ in large.values())
        if total > self.total_bytes:
            raise MessageTooLargeError(
                f"{type(message).__qualname__}: the large attributes {', '.join(large)} have {total} bytes together, "
                f"more than KEVEN_LARGE_ATTRIBUTE_TOTAL_BYTES={self.total_bytes}"
            )
        return {name: self._write(message, name, *content) for name, content in large.items()}

    def still_in_files(self, details: Any, offloads: dict[str, Offload]) -> dict[str, Offload]:
        """Those of `offloads`, with which a message has arrived, that `details` still refers to: for sending it on."""
        return {
            name: offload
            for name, offload in offloads.items()
            if getattr(details, name, None) == str(self.folder / offload.path)
        }

    def _write(self, message: Any, name: str, data: bytes, is_text: bool) -> Offload:
        created = message.created
        day = (created if isinstance(created, datetime.date) else datetime.datetime.now()).strftime("%Y-%m-%d")
        digest = hashlib.sha256(data).hexdigest()
        path = f"{day}/{message.uuid}_{name}.la"
        if not _PATH.fullmatch(path):
            raise UsageError(
                f"{type(message).__qualname__}: {path!r:.200} can't be the file of the large attribute {name}; a uuid "
                f"has letters, digits and hyphens, an attribute letters, digits and underscores"
            )
        if self._is_default:
            _warn_of_default(self.folder)
        try:
            if not self._is_free(self.folder / path, data):
                # The message was written before with another content, which is still wanted.
                path = f"{day}-{digest[:16]}/{message.uuid}_{name}.la"
            self._write_file(self.folder / path, data)
        except OSError as error:
            raise UsageError(f"the large attribute {name} can't be written to {self.folder}: {error}") from error
        return Offload(path, len(data), digest, is_text)

    @staticmethod
    def _is_free(target: Path, data: bytes) -> bool:
        """Whether there is no such file, or one with the same content."""
        try:
            return target.stat().st_size == len(data) and target.read_bytes() == data
        except FileNotFoundError:
            return True

    def _write_file(self, target: Path, data: bytes) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_owner()
        target.parent.mkdir(mode=0o700, exist_ok=True)
        # Another name first, so that nobody ever sees half a file under the right one.
        part = target.with_name(f".{uuid.uuid4().hex}.part")
        try:
            with open(part, "xb", opener=_private) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(part, target)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        parent = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)

    def _check_owner(self) -> None:
        # Under /tmp somebody else could have made the folder first.
        if self._is_default and self.folder.stat(follow_symlinks=False).st_uid != os.getuid():
            raise PermissionError(f"{self.folder} belongs to another user; set KEVEN_LARGE_ATTRIBUTE_DIR")

    # --- reading -----------------------------------------------------------------------------------------------------

    def arrived(self, details: Any, offloads: dict[str, Offload], names: Iterable[str]) -> dict[str, Offload]:
        """Check the files that a message names, then let `details` refer to them; returns what it refers to.

        Called while a message is decoded, in that thread. Raises UndecodableError: no such file, not of the folder, a
        link, another size or checksum, or more than total_bytes.
        """
        allowed = set(names)
        listed = getattr(details, "offloads", None)
        if isinstance(listed, list) and listed and not offloads:
            # As older producers write it: names only, the attributes hold absolute paths, and there is no checksum.
            for name in listed:
                if not isinstance(name, str) or name not in allowed:
                    raise UndecodableError(
                        f"{name!r:.80} is none of its large attributes: {', '.join(sorted(allowed))}"
                    )
            offloads = {name: self._older(details, name) for name in dict.fromkeys(listed)}
        if sum(offload.size_bytes for offload in offloads.values()) > self.total_bytes:
            raise UndecodableError(
                f"its large attributes are more than KEVEN_LARGE_ATTRIBUTE_TOTAL_BYTES={self.total_bytes}"
            )
        for name, offload in offloads.items():
            if name not in allowed:
                raise UndecodableError(f"{name!r:.80} is none of its large attributes: {', '.join(sorted(allowed))}")
            self.read(offload, name)
            setattr(details, name, str(self.folder / offload.path))
        if details is not None:
            details.offloads = list(offloads)
        return offloads

    def _older(self, details: Any, name: str) -> Offload:
        try:
            path = Path(getattr(details, name)).relative_to(self.folder).as_posix()
            if not path.endswith(f"_{name}.la"):
                raise ValueError
        except (TypeError, ValueError, AttributeError):
            raise UndecodableError(f"the file of the large attribute {name!r:.80} is not in {self.folder}") from None
        with self._opened(path, name) as file:
            data = file.read(self.total_bytes + 1)
        return Offload(path, len(data), hashlib.sha256(data).hexdigest(), True)

    def load(self, details: Any, offloads: dict[str, Offload]) -> None:
        """Read the files that `details` refers to into its attributes. Blocks. Raises UndecodableError."""
        for name, offload in self.still_in_files(details, offloads).items():
            data = self.read(offload, name)
            try:
                setattr(details, name, data.decode() if offload.is_text else data)
            except UnicodeDecodeError as error:
                raise UndecodableError(f"the file of the large attribute {name!r:.80} is no text: {error}") from error
        details.offloads = []

    def read(self, offload: Offload, name: str) -> bytes:
        """The content of a file, checked. Raises UndecodableError."""
        if offload.size_bytes > self.total_bytes:
            raise UndecodableError(
                f"the large attribute {name!r:.80} has {offload.size_bytes} bytes, more than "
                f"KEVEN_LARGE_ATTRIBUTE_TOTAL_BYTES={self.total_bytes}"
            )
        with self._opened(offload.path, name) as file:
            data: bytes = file.read(offload.size_bytes + 1)
        if len(data) != offload.size_bytes or offload.sha256 != hashlib.sha256(data).hexdigest():
            raise UndecodableError(
                f"the file of the large attribute {name!r:.80} is not what was written: {offload.path}"
            )
        return data

    def _opened(self, path: str, name: str) -> Any:
        if not _PATH.fullmatch(path):
            raise UndecodableError(
                f"the large attribute {name!r:.80} names {path!r:.200}, which can't be a file of {self.folder}"
            )
        day, _, file_name = path.partition("/")
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._check_owner()
            folder = os.open(self.folder / day, flags | os.O_DIRECTORY)
            try:
                number = os.open(file_name, flags | os.O_NONBLOCK, dir_fd=folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise UndecodableError(
                f"the file of the large attribute {name!r:.80} can't be read: {error.strerror} ({path} in "
                f"{self.folder}); writer and reader have to see the same KEVEN_LARGE_ATTRIBUTE_DIR"
            ) from error
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise UndecodableError(f"the large attribute {name!r:.80} names {path!r}, which is no plain file")
        return os.fdopen(number, "rb")


def _default_name() -> str:
    return f"keven-large-attributes-{os.getuid()}"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


@cache
def _warn_of_default(folder: Path) -> None:
    logger.warning(
        "large attributes are written to %s: other machines don't see it and a restart may empty it; set "
        "KEVEN_LARGE_ATTRIBUTE_DIR",
        folder,
    )


def manager_of(message_class: Any) -> LargeAttributeManager:
    """The manager of a class of messages: its own, or the one that the environment describes."""
    own: LargeAttributeManager | None = message_class.large_attribute_manager
    return own if own is not None else _from_environment(tuple(os.environ.get(name) for name in _VARIABLES))


@cache  # by what the environment says
def _from_environment(values: tuple[str | None, ...]) -> LargeAttributeManager:
    settings = Settings.from_env()
    return LargeAttributeManager(
        settings.large_attribute_dir,
        threshold_bytes=settings.large_attribute_bytes,
        total_bytes=settings.large_attribute_total_bytes,
    )
