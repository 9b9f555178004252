"""Real Kafka in a container: one node from `docker-compose.yml`."""

import os
import shutil
import subprocess
import time
from pathlib import Path

from keven_core.testing._broker_process.cluster import KafkaCluster, wait_until_answering
from keven_core.testing._broker_process.errors import KafkaStartError, KafkaUnavailable
from keven_core.testing._broker_process.ports import PortReservation
from keven_core.testing._broker_process.settings import HOST

__all__ = ["DockerKafka", "docker_unavailable_reason"]

COMPOSE_FILE = Path(__file__).with_name("docker-compose.yml")
_ENGINE_TIMEOUT_S = 10.0
_COMMAND_TIMEOUT_S = 600.0  # the first one fetches the image
_READY_TIMEOUT_S = 120.0


def docker_unavailable_reason() -> str | None:
    """Say why Kafka cannot be started with Docker here, or None if it can. Takes some 20 ms without an engine."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    if not _succeeds(["docker", "info"]):
        return "no Docker engine answers (`docker info` fails)"
    if _compose_command() is None:
        return "docker has no compose (neither `docker compose` nor docker-compose works)"
    return None


class DockerKafka(KafkaCluster):
    """A Kafka node in a container. `start` fetches the image the first time.

    Args:
        port: on 127.0.0.1. None (default): a free one between 20000 and 32000.
        project: the Compose project's name; one that is running already is used as it is. None (default): one for
            the port.
    """

    def __init__(self, port: int | None = None, *, project: str | None = None) -> None:
        self._reservation = PortReservation()
        self._wanted_port = port
        self._wanted_project = project
        self.port = port or 0
        self.project = project or ""

    def __repr__(self) -> str:
        return f"DockerKafka({self.project or 'not started'})"

    @property
    def bootstrap_servers(self) -> str:
        """Address for clients."""
        if not self.port:
            raise RuntimeError("this Kafka is not started: call start(), or use it in a with statement")
        return f"{HOST}:{self.port}"

    def start(self) -> None:
        """Start the container and wait until Kafka answers.

        Raises:
            KafkaUnavailable: there is no Docker engine.
            KafkaStartError: the container did not start, or did not answer within 120 s; the text has its last lines.
        """
        reason = docker_unavailable_reason()
        if reason:
            raise KafkaUnavailable(f"{reason}: start Docker, or install what the Java broker needs")
        self.port = self._reservation.take(self._wanted_port)
        self.project = self._wanted_project or f"keven-kafka-{self.port}"
        try:
            self._compose("up", "-d")
            try:
                wait_until_answering(
                    self.bootstrap_servers, 1, time.monotonic() + _READY_TIMEOUT_S, still_alive=lambda: None
                )
            except KafkaStartError as error:
                last_lines = self._compose("logs", "--tail", "30")
                raise KafkaStartError(f"{error}; the container's last lines:\n{last_lines}") from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Remove the container and its data; idempotent."""
        if self.project:
            self._compose("down", "-v", "--remove-orphans")
        self._reservation.release()
        self.project = self._wanted_project or ""

    def _compose(self, *arguments: str) -> str:
        compose = _compose_command()
        if compose is None:
            raise KafkaStartError("docker has no compose any more: install the compose plugin")
        command = [*compose, "-p", self.project, "-f", str(COMPOSE_FILE), *arguments]
        environment = {**os.environ, "KEVEN_KAFKA_PORT": str(self.port)}
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S)
        output = (answer.stdout + answer.stderr).strip()
        if answer.returncode != 0:
            raise KafkaStartError(f"`{' '.join(command)}` failed with code {answer.returncode}: {output}")
        return output


def _compose_command() -> list[str] | None:
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and _succeeds([*command, "version"]):
            return command
    return None


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=_ENGINE_TIMEOUT_S).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
