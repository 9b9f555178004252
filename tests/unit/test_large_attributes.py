"""Large attributes lie in files: written whole, found again, and nothing else of the disk can be had over the wire."""

import os
import re
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from keven_core.kafka import large_attributes
from keven_core.kafka.config import Settings
from keven_core.kafka.details import BasicDetail
from keven_core.kafka.errors import MessageTooLargeError, RegistrationError, UndecodableError, UsageError
from keven_core.kafka.events.event import Event, PickledEvent
from keven_core.kafka.large_attributes import LargeAttributeManager, manager_of
from keven_core.kafka.message import envelope_decoder

CODECS = ("json", "msgpack")
LARGE = "ü" * 600  # 1200 bytes

pytestmark = pytest.mark.usefixtures("handler_registry")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEVEN_LARGE_ATTRIBUTE_DIR", str(tmp_path / "large"))
    monkeypatch.setenv("KEVEN_LARGE_ATTRIBUTE_BYTES", "1000")
    monkeypatch.setenv("KEVEN_LARGE_ATTRIBUTE_TOTAL_BYTES", "5000")
    return tmp_path / "large"


@pytest.fixture
def scan_class() -> Any:
    class Scanned(PickledEvent):
        event_name = "SCANNED"
        large_attributes = ["text", "image"]

    return Scanned


def scan(scan_class: Any, **attributes: Any) -> Any:
    return scan_class(BasicDetail(**attributes))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("codec", CODECS)
def test_a_large_attribute_lies_in_a_file(folder: Path, scan_class: Any, codec: str) -> None:
    event = scan(scan_class, text=LARGE, image=b"\xff" * 1001, small="x" * 2000, offloads=["stale"])
    value = event.serialize(codec)
    assert event.details.text == LARGE
    day = event.created.strftime("%Y-%m-%d")
    assert [str(path.relative_to(folder)) for path in files(folder)] == [
        f"{day}/{event.uuid}_image.la",
        f"{day}/{event.uuid}_text.la",
    ]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files(folder))
    assert LARGE.encode() not in value

    read = Event.from_bytes(value)
    assert read.details.offloads == ["text", "image"]
    assert Path(read.details.text).read_text() == LARGE
    assert Path(read.details.image).read_bytes() == b"\xff" * 1001
    assert read.details.small == "x" * 2000
    read.load_large_attributes()
    assert (read.details.text, read.details.image, read.details.offloads) == (LARGE, b"\xff" * 1001, [])
    read.load_large_attributes()


@pytest.mark.parametrize("text", ["ü" * 500, "x" * 1000, "", None, 5, ["x" * 2000]])
def test_others_stay_in_the_message(folder: Path, scan_class: Any, text: Any) -> None:
    read = Event.from_bytes(scan(scan_class, text=text).serialize())
    assert (read.details.text, read.details.offloads) == (text, [])
    assert not folder.exists()


def test_an_event_that_is_sent_on_keeps_its_files(folder: Path, scan_class: Any) -> None:
    first = Event.from_bytes(scan(scan_class, text=LARGE, image=b"").serialize())
    first.details.image = b"now it is large" * 100
    second = Event.from_bytes(first.serialize())
    assert sorted(second.details.offloads) == ["image", "text"]
    second.load_large_attributes()
    assert (second.details.text, second.details.image) == (LARGE, first.details.image)
    first.details.text = "changed"
    assert Event.from_bytes(first.serialize()).details.text == "changed"


def test_the_bound(folder: Path, scan_class: Any) -> None:
    with pytest.raises(
        MessageTooLargeError,
        match=r"text, image have 6002 bytes together, more than KEVEN_LARGE_ATTRIBUTE_TOTAL_BYTES=5000",
    ):
        scan(scan_class, text="x" * 3001, image=b"y" * 3001).serialize()
    assert not folder.exists()
    offload = {"path": "2026-01-02/u_text.la", "size_bytes": 5001, "sha256": "0" * 64}
    with pytest.raises(UndecodableError, match="more than KEVEN_LARGE_ATTRIBUTE_TOTAL_BYTES=5000"):
        Event.from_bytes(wire(offloads={"text": offload}))


def wire(**fields: Any) -> bytes:
    return msgspec.json.encode({"event_name": "SCANNED", "details": {"text": ""}, **fields})


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../secret",
        "2026-01-02/../../secret",
        "2026-01-02/u_text.la/../../../secret",
        "..",
        "",
        "2026-01-02/.la",
        "2026-01-02/a\x00_text.la",
        "2026-01-02//etc/passwd_text.la",
        "./2026-01-02/u_text.la",
        "2026-01-02/u_text.la\n",
        "2026-01-02/u_tëxt.la",
        "link/u_text.la",
        "٢٠٢٦-01-02/u_text.la",
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(folder: Path, scan_class: Any, path: str) -> None:
    offload = {"path": path, "size_bytes": 6, "sha256": "0" * 64}
    with pytest.raises(UndecodableError, match=r"which can't be a file of"):
        Event.from_bytes(wire(offloads={"text": offload}))


def written(folder: Path, scan_class: Any) -> tuple[bytes, Path]:
    value = scan(scan_class, text=LARGE).serialize()
    [path] = files(folder)
    return value, path


@pytest.mark.parametrize(
    "what", ["a link", "a linked day", "a folder", "a fifo", "gone", "changed", "longer", "shorter"]
)
def test_a_file_that_is_not_what_was_written_is_refused(
    folder: Path, scan_class: Any, tmp_path: Path, what: str
) -> None:
    value, path = written(folder, scan_class)
    content = path.read_bytes()
    other = tmp_path / "other"
    if what == "a linked day":
        path.parent.rename(other)
        path.parent.symlink_to(other)
    elif what in ("changed", "longer", "shorter"):
        path.write_bytes({"changed": content[:-1] + b"x", "longer": content + b"x", "shorter": content[:-1]}[what])
    else:
        path.rename(other)
        if what == "a link":
            path.symlink_to(other)
        elif what == "a folder":
            path.mkdir()
        elif what == "a fifo":
            os.mkfifo(path)
    expected = "is not what was written" if what in ("changed", "longer", "shorter") else "can't be read|no plain file"
    with pytest.raises(UndecodableError, match=expected):
        Event.from_bytes(value)


def test_a_file_that_changes_later_is_refused_when_it_is_loaded(folder: Path, scan_class: Any) -> None:
    value, path = written(folder, scan_class)
    read = Event.from_bytes(value)
    path.write_bytes(b"x" * 1200)
    with pytest.raises(UndecodableError, match="is not what was written"):
        read.load_large_attributes()


def test_only_the_attributes_of_the_class_can_be_named(folder: Path, scan_class: Any) -> None:
    value, _ = written(folder, scan_class)
    with pytest.raises(UndecodableError, match="'tex' is none of its large attributes: image, text"):
        Event.from_bytes(value.replace(b'"text":{', b'"tex":{'))


@pytest.mark.parametrize(
    "offloads", [5, "x", {"text": 5}, {"text": {"path": "x"}}, {"text": {"path": 1, "size_bytes": 1}}]
)
def test_offloads_of_another_shape_are_refused(folder: Path, scan_class: Any, offloads: Any) -> None:
    with pytest.raises(UndecodableError):
        Event.from_bytes(wire(offloads=offloads))


def test_names_without_checksums_are_read_as_older_producers_write_them(folder: Path, scan_class: Any) -> None:
    _value, path = written(folder, scan_class)
    older = wire(details={"text": str(path), "offloads": ["text"]})
    read = Event.from_bytes(older)
    assert read.details.offloads == ["text"]
    assert Path(read.details.text).read_text() == LARGE
    for elsewhere in ("/etc/passwd", str(path.parent / ".." / ".." / "x"), "", 5, str(folder)):
        with pytest.raises(UndecodableError, match=r"is not in|can't be a file of"):
            Event.from_bytes(wire(details={"text": elsewhere, "offloads": ["text"]}))


def test_a_uuid_that_is_no_file_name_is_refused(folder: Path, scan_class: Any) -> None:
    event = scan(scan_class, text=LARGE)
    event.uuid = "../../etc/cron"
    with pytest.raises(UsageError, match="can't be the file of the large attribute text; a uuid has letters"):
        event.serialize()
    assert not folder.exists()


def test_a_failed_write_leaves_nothing(folder: Path, scan_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(large_attributes.os, "fsync", fail)
    with pytest.raises(UsageError, match=r"can't be written to .*No space left"):
        scan(scan_class, text=LARGE).serialize()
    assert files(folder) == []


def test_without_a_setting_there_is_a_folder_of_the_user_and_a_warning(
    tmp_path: Path, scan_class: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("KEVEN_LARGE_ATTRIBUTE_DIR", raising=False)
    monkeypatch.setattr(large_attributes.tempfile, "gettempdir", lambda: str(tmp_path))
    manager = LargeAttributeManager(threshold_bytes=10)
    monkeypatch.setattr(scan_class, "large_attribute_manager", manager)
    assert manager_of(scan_class) is manager
    read = Event.from_bytes(scan(scan_class, text=LARGE).serialize())
    assert Path(read.details.text).is_relative_to(tmp_path / f"keven-large-attributes-{os.getuid()}")
    assert re.search("large attributes are written to .*; set KEVEN_LARGE_ATTRIBUTE_DIR", caplog.text)
    assert stat.S_IMODE(manager.folder.stat().st_mode) == 0o700
    monkeypatch.setattr(large_attributes.os, "getuid", lambda: 12345)
    with pytest.raises(UsageError, match="belongs to another user"):
        scan(scan_class, text=LARGE).serialize()
    with pytest.raises(UndecodableError):
        Event.from_bytes(wire(offloads={"text": {"path": "2026-01-02/u_text.la", "size_bytes": 1, "sha256": ""}}))


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings()
    assert (settings.large_attribute_dir, settings.large_attribute_bytes) == (None, 1 << 20)
    assert settings.large_attribute_total_bytes == 1 << 30


@pytest.mark.parametrize("path", ["/etc/passwd", "../../etc/passwd", "/etc/../etc/passwd"])
def test_a_payload_cannot_name_a_file_elsewhere_either(folder: Path, scan_class: Any, path: str) -> None:
    payload = msgspec.json.encode({"text": path, "offloads": ["text"]})
    with pytest.raises(UndecodableError, match="is not in"):
        scan_class().parse_payload(payload)
    decode = envelope_decoder(Event.kind, "SCANNED")
    with pytest.raises(UndecodableError, match="is not in"):
        decode("SCANNED", {}, payload)


def test_a_message_that_is_written_again_with_another_content_takes_nothing_from_the_first(
    folder: Path, scan_class: Any
) -> None:
    event = scan(scan_class, text=LARGE)
    first, again = event.serialize(), event.serialize()
    event.details.text = LARGE[::-1] + "!"
    second = event.serialize()
    assert len(files(folder)) == 2
    for value, text in ((first, LARGE), (again, LARGE), (second, LARGE[::-1] + "!")):
        read = Event.from_bytes(value)
        read.load_large_attributes()
        assert read.details.text == text


def test_older_lists_of_offloads_are_confined_to_the_attribute(folder: Path, scan_class: Any) -> None:
    event = scan(scan_class, text=LARGE, image=b"\xff" * 1001)
    event.serialize()
    text, image = (str(path) for path in sorted(files(folder), key=lambda path: "image" in path.name))
    read = scan_class()
    read.parse_payload(msgspec.json.encode({"text": text, "offloads": ["text", "text"]}))
    assert read.details.offloads == ["text"]
    for plain in (
        {"text": image, "offloads": ["text"]},
        {"size": text, "offloads": ["size"]},
        {"offloads": [["text"]]},
    ):
        with pytest.raises(UndecodableError):
            scan_class().parse_payload(msgspec.json.encode(plain))
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"path": "x", "size_bytes": -2, "sha256": "", "is_text": True}, large_attributes.Offload)


def test_a_payload_says_where_they_lie_as_older_producers_do(folder: Path, scan_class: Any) -> None:
    event = scan(scan_class, text=LARGE, small="x", offloads=["stale"])
    payload = msgspec.json.decode(event.serialize_payload())
    (path,) = files(folder)
    assert payload == {"text": str(path), "small": "x", "offloads": ["text"]}
    read = envelope_decoder(Event.kind, "SCANNED")("SCANNED", {"uuid": event.uuid}, event.serialize_payload().encode())
    # It is sent on as it has come, and with another text as well.
    assert msgspec.json.decode(read.serialize_payload()) == payload
    read.load_large_attributes()
    assert read.details.text == LARGE
    read.details.text = "another"
    assert msgspec.json.decode(read.serialize_payload()) == {"text": "another", "small": "x", "offloads": []}


def test_bytes_in_a_file_are_loaded_before_they_go_into_a_payload(folder: Path, scan_class: Any) -> None:
    read = Event.from_bytes(scan(scan_class, image=b"\xff" * 1001).serialize())
    with pytest.raises(UsageError, match=r"Scanned.details.image lies in a file, .*: call load_large_attributes\(\)"):
        read.serialize_payload()
    read.load_large_attributes()
    again = scan_class()
    again.parse_payload(read.serialize_payload())
    assert again.details.image == b"\xff" * 1001


def test_details_need_a_place_for_the_names_of_those_in_files(folder: Path) -> None:
    class Closed(msgspec.Struct):
        text: str = ""

    class Open(Closed):
        offloads: list[str] = []

    with pytest.raises(RegistrationError, match=r"Closed has no attribute offloads, .*: give it one"):

        class Refused(PickledEvent):
            event_name = "REFUSED"
            detail_class = Closed
            large_attributes = ["text"]

    class Allowed(PickledEvent):
        event_name = "ALLOWED"
        detail_class = Open
        large_attributes = ["text"]

    read = Event.from_bytes(Allowed(Open(LARGE)).serialize())
    assert read.details.offloads == ["text"]
    read.load_large_attributes()
    assert read.details == Open(LARGE)
