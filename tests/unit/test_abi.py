"""The binding's declarations against librdkafka's own: no header is compiled against, so here they are compared."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from builds import ROOT

from keven_core._native import library

PXD = ROOT / "src_cython/keven_core/_native/library.pxd"
DECLARATIONS = ROOT / "src_cython/rdkafka.pxd"


def _fields_of_api() -> list[str]:
    body = re.search(r"^cdef struct Api:\n((?:[ \t].*\n|\n)+)", PXD.read_text(), re.MULTILINE)
    assert body is not None
    without_comments = re.sub(r"#.*", "", body[1])
    # A field is a pointer to a function: its name stands as (*name)(.
    return re.findall(r"\(\*(\w+)\)\(", without_comments)


def _header() -> Path | None:
    for folder in (Path("/usr/include"), Path("/usr/local/include"), ROOT / "build/rdkafka-headers"):
        if (folder / "librdkafka/rdkafka.h").exists():
            return folder
    return None


HEADER = _header()
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_header = pytest.mark.skipif(
    HEADER is None, reason="no rdkafka.h here: apt-get install librdkafka-dev, or run tools/rdkafka-headers"
)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here: apt-get install build-essential")


def _compile_and_run(source: str, folder: Path) -> str:
    (folder / "probe.c").write_text(source)
    subprocess.run(
        [str(COMPILER), "-I", str(HEADER), "-o", str(folder / "probe"), str(folder / "probe.c")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return subprocess.run([str(folder / "probe")], check=True, capture_output=True, text=True).stdout


# --- the table of functions ------------------------------------------------------------------------------------------


def test_the_symbols_stand_in_the_order_of_the_fields() -> None:
    fields = _fields_of_api()
    assert len(fields) > 80
    assert fields == library.SYMBOLS


def test_no_symbol_stands_twice() -> None:
    assert len(set(library.SYMBOLS)) == len(library.SYMBOLS)


def test_every_symbol_is_used() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "src_cython/keven_core/_native").glob("*.pyx"))
    assert [name for name in library.SYMBOLS if not re.search(rf"\bapi\.{name}\b", sources)] == []


def test_the_library_is_the_one_of_confluent_kafka() -> None:
    import confluent_kafka

    assert library.version() == confluent_kafka.libversion()[0]
    assert confluent_kafka.libversion()[1] >= library.MINIMUM_VERSION
    maps = Path("/proc/self/maps")
    if maps.exists():
        copies = {line.split()[-1] for line in maps.read_text().splitlines() if "librdkafka" in line}
        assert len(copies) == 1, f"more than one librdkafka in the process: {copies}"


@needs_header
def test_every_symbol_is_declared_in_the_header() -> None:
    assert HEADER is not None
    text = (HEADER / "librdkafka/rdkafka.h").read_text() + (HEADER / "librdkafka/rdkafka_mock.h").read_text()
    missing = [name for name in library.SYMBOLS if not re.search(rf"\brd_kafka_{name}\s*\(", text)]
    version = re.search(r"#define\s+RD_KAFKA_VERSION\s+(0x[0-9a-fA-F]+)", text)
    assert version is not None
    # Functions that are younger than the header that is installed here (Debian 12 has that of 2.0.2).
    younger = {
        "UserScramCredentialUpsertion_new",
        "UserScramCredentialAlteration_destroy",
        "message_leader_epoch",
        "topic_partition_set_leader_epoch",
        "mock_group_initial_rebalance_delay_ms",
        "mock_start_request_tracking",
        "mock_get_requests",
        "mock_request_api_key",
        "mock_request_destroy_array",
    }
    assert set(missing) <= (younger if int(version[1], 16) < library.MINIMUM_VERSION else set())


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_the_layouts_name_every_public_struct() -> None:
    declared = set(re.findall(r"ctypedef struct (rd_kafka_\w+_t):", DECLARATIONS.read_text()))
    layouts = set(library.struct_layout())
    # The header has a tag only for this one.
    assert {name.replace("struct rd_kafka_err_desc", "rd_kafka_err_desc_t") for name in layouts} <= declared
    assert declared - layouts - {"rd_kafka_err_desc_t"} <= {"rd_kafka_metadata_broker_t"}  # never looked into


@needs_header
@needs_compiler
def test_sizes_and_offsets_are_those_of_the_header(tmp_path: Path) -> None:
    layouts = library.struct_layout()
    lines = []
    for struct_name, members in layouts.items():
        for member in members:
            # The compiler's own name of a member that the binding calls something else.
            what = f"sizeof({struct_name})" if member == "sizeof" else f"offsetof({struct_name}, {member})"
            lines.append(f'printf("{struct_name}|{member}|%zu\\n", (size_t){what});')
    source = (
        "#include <stddef.h>\n#include <stdio.h>\n#include <librdkafka/rdkafka.h>\n"
        "int main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
    )
    found: dict[str, dict[str, int]] = {}
    for line in _compile_and_run(source, tmp_path).splitlines():
        struct_name, member, number = line.split("|")
        found.setdefault(struct_name, {})[member] = int(number)
    # Newer versions append members to the metadata, which librdkafka allocates: only a prefix has to agree there.
    for grows in ("rd_kafka_metadata_t",):
        assert found[grows].pop("sizeof") >= layouts[grows].pop("sizeof")
    assert found == layouts
    assert sum(map(len, layouts.values())) > 30


@needs_header
@needs_compiler
def test_constants_are_those_of_the_header(tmp_path: Path) -> None:
    block = re.search(r"^cdef enum:\n((?:[ \t].*\n|\n)+)", DECLARATIONS.read_text(), re.MULTILINE)
    assert block is not None
    entries = re.findall(r"^\s+(RD_KAFKA_\w+) = (\S+)$", block[1], re.MULTILINE)
    constants = {name: int(value, 0) for name, value in entries}
    assert len(constants) > 50
    assert HEADER is not None
    text = (HEADER / "librdkafka/rdkafka.h").read_text()
    for younger in ("RD_KAFKA_SCRAM_MECHANISM_SHA_256",):  # than the header
        if younger not in text:
            del constants[younger]
    lines = [f'printf("{name} %lld\\n", (long long){name});' for name in constants]
    head = "#include <stdio.h>\n#include <librdkafka/rdkafka.h>\nint main(void) {\n"
    output = _compile_and_run(head + "\n".join(lines) + "\nreturn 0;\n}\n", tmp_path)
    assert {name: int(value) for name, value in (line.split() for line in output.splitlines())} == constants


@needs_header
@needs_compiler
def test_signatures_are_those_of_the_header(tmp_path: Path) -> None:
    """Each function of the header is assigned to a pointer of the type that library.pxd declares."""
    assert HEADER is not None
    (tmp_path / "librdkafka").mkdir()
    known = ""
    for name in ("rdkafka.h", "rdkafka_mock.h"):
        text = (HEADER / "librdkafka" / name).read_text()
        # The binding declares enumerations as int, which they are to the ABI; here they have to be so by name too.
        text = re.sub(r"typedef enum(?: \w+)?\s*(\{[^}]*\})\s*(\w+);", r"enum \1; typedef int \2;", text)
        (tmp_path / "librdkafka" / name).write_text(text)
        known += text
    body = re.search(r"^cdef struct Api:\n((?:[ \t].*\n|\n)+)", PXD.read_text(), re.MULTILINE)
    assert body is not None
    declarations = re.sub(r"\s+", " ", re.sub(r"#.*", "", body[1])).split("noexcept nogil")
    lines = []
    for declaration in filter(None, (part.strip() for part in declarations)):
        match = re.match(r"(.+)\(\*(\w+)\)\((.*)\)$", declaration)
        assert match is not None, declaration
        result, name, parameters = match.groups()
        if re.search(rf"\brd_kafka_{name}\s*\(", known):  # else younger than the header
            lines.append(f"{result}(*p_{name})({parameters or 'void'}) = rd_kafka_{name}; (void)p_{name};")
    assert len(lines) > 80
    callback = "(rd_kafka_t *, int, rd_kafka_topic_partition_list_t *, void *)"
    (tmp_path / "signatures.c").write_text(
        "#include <stdio.h>\n#include <stdint.h>\n#include <sys/types.h>\n"
        "#include <librdkafka/rdkafka.h>\n#include <librdkafka/rdkafka_mock.h>\n"
        f"typedef void (*rebalance_cb_t){callback};\ntypedef void (*offset_commit_cb_t){callback};\n"
        "typedef int32_t (*partitioner_t)"
        "(const rd_kafka_topic_t *, const void *, size_t, int32_t, void *, void *);\n"
        "typedef int (*resolve_cb_t)"
        "(const char *, const char *, const struct addrinfo *, struct addrinfo **, void *);\n"
        "typedef rd_kafka_interceptor_f_on_new_t *on_new_t;\n"
        "typedef rd_kafka_interceptor_f_on_thread_start_t *on_thread_start_t;\n"
        "typedef rd_kafka_interceptor_f_on_response_received_t *on_response_received_t;\n"
        "typedef struct rd_kafka_err_desc rd_kafka_err_desc_t;\n"
        "int main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
    )
    command = [str(COMPILER), "-I", str(tmp_path), "-fsyntax-only", "-Werror=incompatible-pointer-types"]
    result = subprocess.run(
        [*command, str(tmp_path / "signatures.c")], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )
    assert result.returncode == 0, result.stderr
