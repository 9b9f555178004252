"""How brokers are found, started and ended, shown without Java, Maven or Docker."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from keven_core.testing._broker_process import cli, docker_kafka, jars, state
from keven_core.testing._broker_process.errors import KafkaStartError, KafkaUnavailable
from keven_core.testing._broker_process.ports import PortReservation, is_port_free
from keven_core.testing._broker_process.process import (
    BrokerProcess,
    end_process,
    log_tail,
    process_identity,
    wait_until_stopped,
)
from keven_core.testing.real_kafka import (
    DockerKafka,
    ExternalKafka,
    RealKafka,
    real_kafka,
    running_kafka,
    unavailable_reason,
)

_DEADLINE_S = 20.0
_SLEEP = [sys.executable, "-I", "-S", "-c", "import time; print('up', flush=True); time.sleep(600)"]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {_DEADLINE_S} s: {what}")
        time.sleep(0.005)


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def bare_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing on it but what the test puts there, and no cached jars, KAFKA or JAVA_HOME."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KAFKA", raising=False)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(jars, "_HOMEBREW", ())
    monkeypatch.chdir(tmp_path)
    return folder


# ---- what is there


def test_without_java_it_says_what_to_install(bare_path: Path) -> None:
    reason = unavailable_reason()
    assert reason is not None
    assert "there is no Java 17" in reason
    assert "openjdk-17-jre-headless and maven" in reason
    assert "Docker" in reason
    with pytest.raises(KafkaUnavailable, match="openjdk-17-jre-headless"):
        real_kafka()
    with pytest.raises(KafkaUnavailable, match="openjdk-17-jre-headless"):
        RealKafka().start()


@pytest.mark.parametrize(
    ("version", "good"),
    [("1.8.0_402", False), ("11.0.22", False), ("17", True), ("17.0.15", True), ("21-ea", True), ("25.0.1", True)],
)
def test_java_version_is_read(bare_path: Path, version: str, good: bool) -> None:
    program(bare_path, "java", f"""echo 'openjdk version "{version}" 2025-04-15' >&2""")
    assert (jars.find_java() is not None) == good
    reason = unavailable_reason()
    assert reason is not None
    assert ("Maven" if good else "older than Java 17") in reason


def test_a_java_that_only_prints_a_hint_is_none(bare_path: Path) -> None:
    program(bare_path, "java", "echo 'Unable to locate a Java Runtime.' >&2; exit 1")
    assert jars.find_java() is None


def test_with_kafka_set_that_broker_is_taken(bare_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA", "broker.example:9092")
    assert unavailable_reason() is None
    assert unavailable_reason(own_broker=True) is not None
    with real_kafka() as kafka:
        assert isinstance(kafka, ExternalKafka)
        assert kafka.bootstrap_servers == "broker.example:9092"
    with pytest.raises(KafkaUnavailable):
        real_kafka(proxied=True)  # an own broker is needed


def test_jars_are_fetched_once_and_appear_complete(bare_path: Path) -> None:
    program(
        bare_path,
        "mvn",
        """echo run >> "$XDG_CACHE_HOME/runs"
        for word; do case $word in -DoutputDirectory=*) folder=${word#*=};; esac; done
        PATH=/bin:/usr/bin; mkdir -p "$folder"; echo jar > "$folder/kafka.jar" """,
    )
    script = "from keven_core.testing._broker_process.jars import fetch_jars; print(fetch_jars())"
    at_once = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {process.communicate(timeout=_DEADLINE_S)[0].strip() for process in at_once}
    assert folders == {str(jars.fetch_jars())}
    assert (jars.fetch_jars() / "kafka.jar").exists()
    assert Path(os.environ["XDG_CACHE_HOME"], "runs").read_text() == "run\n"


def test_what_maven_says_is_in_the_error(bare_path: Path) -> None:
    program(bare_path, "mvn", "echo '[ERROR] Could not transfer artifact'; exit 1")
    with pytest.raises(KafkaUnavailable, match="Could not transfer artifact"):
        jars.fetch_jars()
    assert [path.name for path in Path(os.environ["XDG_CACHE_HOME"], "keven-core").iterdir() if path.is_dir()] == []


# ---- Docker


def test_a_docker_client_without_an_engine_is_no_docker(bare_path: Path) -> None:
    assert docker_kafka.docker_unavailable_reason() == "docker is not installed"
    program(bare_path, "docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    assert "no Docker engine" in (docker_kafka.docker_unavailable_reason() or "")
    assert unavailable_reason() is not None


def test_an_engine_without_compose_is_no_docker(bare_path: Path) -> None:
    program(bare_path, "docker", "[ $1 = info ]")
    assert "compose" in (docker_kafka.docker_unavailable_reason() or "")


def test_docker_is_used_before_java(bare_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bare_path, "docker", f'echo "$KEVEN_KAFKA_PORT $@" >> {tmp_path}/calls')
    monkeypatch.setattr(docker_kafka, "wait_until_answering", lambda *_, **__: None)
    assert unavailable_reason() is None
    with real_kafka() as kafka:
        assert isinstance(kafka, DockerKafka)
        port = int(kafka.bootstrap_servers.removeprefix("127.0.0.1:"))
    calls = [call.split() for call in (tmp_path / "calls").read_text().splitlines() if "-p" in call.split()]
    assert [call[0] for call in calls] == [str(port)] * 2
    assert [call[call.index("-f") + 2 :] for call in calls] == [["up", "-d"], ["down", "-v", "--remove-orphans"]]


def test_what_docker_says_is_in_the_error(bare_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bare_path, "docker", "case $* in *' up '*) echo 'pull access denied'; exit 18;; esac")
    with pytest.raises(KafkaStartError, match="code 18: pull access denied"), DockerKafka():
        pass


# ---- ports


def test_a_reserved_port_is_not_given_twice() -> None:
    first, second = PortReservation(), PortReservation()
    port = first.take()
    with pytest.raises(KafkaStartError, match=f"port {port} "):
        second.take(port)
    first.release()
    assert second.take(port) == port
    second.release()


def test_a_port_in_use_is_not_given() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        assert not is_port_free(port)
        with pytest.raises(KafkaStartError, match="is in use"):
            PortReservation().take(port)


# ---- processes


def test_signals_reach_the_process_and_its_end_is_seen(tmp_path: Path) -> None:
    process = BrokerProcess(_SLEEP, tmp_path / "log")
    wait_until(lambda: log_tail(tmp_path / "log") == "up", "the process runs")
    assert process.is_alive
    identity = process_identity(process.pid)
    assert identity is not None
    process.send(signal.SIGSTOP)
    assert wait_until_stopped(process.pid, _DEADLINE_S)
    process.send(signal.SIGTERM)
    assert not process.wait(0.05)  # stopped: it cannot end
    process.send(signal.SIGCONT)
    assert process.wait(_DEADLINE_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert process_identity(process.pid) != identity
    process.send(signal.SIGKILL)
    process.close()
    process.close()


def test_exit_code_and_log_of_a_process_that_ends_by_itself(tmp_path: Path) -> None:
    process = BrokerProcess(["/bin/sh", "-c", "echo bad config >&2; exit 3"], tmp_path / "log")
    assert process.wait(_DEADLINE_S)
    assert (process.returncode, log_tail(tmp_path / "log")) == (3, "bad config")
    process.close()


def test_a_program_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KafkaStartError, match="no-such-program"):
        BrokerProcess([str(tmp_path / "no-such-program")], tmp_path / "log")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None], ids=["SIGKILL", "SIGTERM", "exit"])
def test_no_broker_outlives_the_launcher(tmp_path: Path, end: signal.Signals | None) -> None:
    wiped = tmp_path / "data"
    wiped.mkdir()
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path\n"
            "from keven_core.testing._broker_process.process import BrokerProcess\n"
            f"process = BrokerProcess({_SLEEP!r}, Path({str(tmp_path / 'log')!r}), wipe=Path({str(wiped)!r}))\n"
            "print(process.pid, flush=True)\n"
            "sys.stdin.readline()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with launcher:
        assert launcher.stdout is not None
        pid = int(launcher.stdout.readline())
        identity = process_identity(pid)
        assert identity is not None
        if end is None:
            launcher.communicate("\n", timeout=_DEADLINE_S)
        else:
            launcher.send_signal(end)
        launcher.wait(_DEADLINE_S)
        wait_until(lambda: process_identity(pid) != identity, "the broker is gone")
        wait_until(lambda: not wiped.exists(), "its data are gone")


def test_end_process_takes_no_stranger_for_its_own() -> None:
    with subprocess.Popen(_SLEEP, stdout=subprocess.DEVNULL) as stranger:
        assert not end_process(stranger.pid, "another start time", grace_s=0)
        assert stranger.poll() is None
        identity = process_identity(stranger.pid)
        assert identity is not None
        assert end_process(stranger.pid, identity, grace_s=_DEADLINE_S)
        assert stranger.wait(_DEADLINE_S) == -signal.SIGTERM


# ---- command line


def test_status_and_stop_when_nothing_runs(bare_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == 1
    assert cli.main(["stop"]) == 0
    assert cli.main(["start"]) == 1
    assert "openjdk-17-jre-headless" in capsys.readouterr().err


def test_running_kafka_is_found_from_folders_below_and_only_while_it_lives(
    bare_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, below = tmp_path / ".kafka", tmp_path / "some" / "folder"
    folder.mkdir()
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert running_kafka() is None
    process = BrokerProcess(_SLEEP, tmp_path / "log", detached=True)
    running = state.RunningKafka("127.0.0.1:1", "java", [(process.pid, process_identity(process.pid) or "")], ["log"])
    running.save(folder)
    assert running_kafka() == "127.0.0.1:1"
    assert unavailable_reason() is None
    assert cli.main(["--folder", str(folder), "start"]) == 0  # it is there already
    assert "export KAFKA=127.0.0.1:1\n" in capsys.readouterr().out
    (folder / "data").mkdir()
    assert cli.main(["--folder", str(folder), "stop"]) == 0
    assert process.wait(_DEADLINE_S)
    assert running_kafka() is None
    assert not (folder / "data").exists()
    process.close()


def test_a_broken_state_file_is_no_kafka(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    assert state.RunningKafka.load(tmp_path) is None
    (tmp_path / "state.json").write_text('{"processes": [], "else": 1}')
    assert state.RunningKafka.load(tmp_path) is None


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="nodes=0"):
        RealKafka(0)
    with pytest.raises(ValueError, match="one per node"):
        RealKafka(3, ports=[9092])
    with pytest.raises(ValueError, match="kerberos"):
        RealKafka(security=["kerberos"])
    with pytest.raises(RuntimeError, match="not started"):
        _ = RealKafka().bootstrap_servers
    with pytest.raises(RuntimeError, match="not started"):
        RealKafka().kill()
