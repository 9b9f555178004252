"""Finds Java 17+ and the broker's jars, and fetches the jars with Maven once per user."""

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from keven_core.testing._broker_process.errors import KafkaUnavailable

__all__ = ["JAVA_AT_LEAST", "KAFKA_VERSION", "fetch_jars", "find_java", "find_keytool", "java_unavailable_reason"]

KAFKA_VERSION = "4.3.0"
"""The version of Apache Kafka that is started; `pom.xml` and `docker-compose.yml` name the same."""

JAVA_AT_LEAST = 17
"""Kafka 4 brokers need Java 17 or newer."""

_POM = Path(__file__).with_name("pom.xml")
# Homebrew does not put its Java on the PATH.
_HOMEBREW = tuple(Path(prefix) / "opt" / "openjdk" / "bin" / "java" for prefix in ("/opt/homebrew", "/usr/local"))
_FETCH_TIMEOUT_S = 600.0
_INSTALL_BOTH = (
    "install openjdk-17-jre-headless and maven (Debian, Ubuntu: apt-get install openjdk-17-jre-headless maven; "
    "macOS: brew install openjdk@17 maven), or start Docker"
)


def find_java() -> str | None:
    """Return the path of a `java` of version 17 or newer, or None; `$JAVA_HOME` is tried before `PATH`."""
    candidates = [Path(os.environ["JAVA_HOME"]) / "bin" / "java"] if os.environ.get("JAVA_HOME") else []
    on_path = shutil.which("java")
    if on_path:
        candidates.append(Path(on_path))
    candidates += _HOMEBREW
    for candidate in candidates:
        if _java_version(str(candidate)) >= JAVA_AT_LEAST:
            return str(candidate)
    return None


@functools.cache
def _java_version(java: str) -> int:
    """Return the major version of that `java`, 0 if it does not run (macOS has a `java` that only prints a hint)."""
    try:
        answer = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    # `openjdk version "17.0.15" 2025-04-15`; Java 8 calls itself "1.8.0".
    found = re.search(r'version "(\d+)(?:\.(\d+))?', answer.stderr + answer.stdout)
    if not found:
        return 0
    major = int(found.group(1))
    return int(found.group(2) or 0) if major == 1 else major


def find_keytool(java: str) -> str:
    """Return the `keytool` of that Java; it is part of every JRE."""
    beside = Path(java).resolve().with_name("keytool")
    found = str(beside) if beside.exists() else shutil.which("keytool")
    if not found:
        raise KafkaUnavailable(
            f"no keytool beside {java}: install a complete Java runtime, e.g. openjdk-17-jre-headless"
        )
    return found


def java_unavailable_reason() -> str | None:
    """Say why a broker cannot be started with Java here, or None if it can. Touches no network."""
    if find_java() is None:
        found = shutil.which("java")
        missing = f"{found} does not run, or is older than" if found else "there is no"
        return f"{missing} Java {JAVA_AT_LEAST}: {_INSTALL_BOTH}"
    if not _jar_folder().is_dir() and shutil.which("mvn") is None:
        return f"Maven (mvn) is not installed, and {_jar_folder()} with Kafka's jars does not exist: {_INSTALL_BOTH}"
    return None


def fetch_jars() -> Path:
    """Return the folder with the broker's jars, fetching them with Maven the first time (8 s, 54 MB).

    Blocks, and may touch the network. Safe to call from several processes at once: one fetches, the others wait.

    Raises:
        KafkaUnavailable: Maven is not there, or failed; its last lines are in the text.
    """
    folder = _jar_folder()
    if folder.is_dir():
        return folder
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            _copy_dependencies(folder)
    return folder


def _jar_folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # The digest makes a changed pom.xml fetch again instead of starting with yesterday's jars.
    digest = hashlib.sha256(_POM.read_bytes()).hexdigest()[:8]
    return cache / "keven-core" / f"kafka-{KAFKA_VERSION}-{digest}"


@contextmanager
def _locked(lock_path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the kernel drops it when the holder dies, however it dies."""
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _copy_dependencies(folder: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise KafkaUnavailable(f"Maven (mvn) is not installed: {_INSTALL_BOTH}")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as scratch:
        # A copy of the pom: Maven may write beside it, and an installed package may be read-only.
        pom = Path(shutil.copy(_POM, scratch))
        jars = Path(scratch) / "jars"
        command = [maven, "-q", "-B", "-f", str(pom), "dependency:copy-dependencies"]
        command += [f"-DoutputDirectory={jars}", "-DincludeScope=runtime"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise KafkaUnavailable(
                f"Maven did not fetch the jars of Kafka {KAFKA_VERSION} within {_FETCH_TIMEOUT_S:.0f} s: "
                f"check the network and Maven's mirror settings, then run: {' '.join(command)}"
            ) from error
        if answer.returncode != 0:
            tail = "\n".join((answer.stdout + answer.stderr).splitlines()[-15:])
            raise KafkaUnavailable(
                f"Maven could not fetch the jars of Kafka {KAFKA_VERSION} (exit code {answer.returncode}): "
                f"check the network and Maven's mirror settings. Its last lines:\n{tail}"
            )
        # The folder appears in one step, so its existence means that it is complete.
        jars.rename(folder)
