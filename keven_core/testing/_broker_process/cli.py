"""`python -m keven_core.testing.real_kafka start | stop | status`, behind `make kafka` and `make kafka-stop`."""

import argparse
import os
import sys
from pathlib import Path

from keven_core.testing._broker_process import state
from keven_core.testing._broker_process.docker_kafka import DockerKafka, docker_unavailable_reason
from keven_core.testing._broker_process.errors import KafkaStartError, KafkaUnavailable
from keven_core.testing._broker_process.java_kafka import RealKafka
from keven_core.testing._broker_process.ports import is_port_free
from keven_core.testing._broker_process.process import process_identity

__all__ = ["main"]

_USUAL_PORT = 9092


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 1 for a failure and for `status` when nothing runs."""
    parser = argparse.ArgumentParser(
        prog="python -m keven_core.testing.real_kafka", description="A real Kafka on this machine, for development."
    )
    parser.add_argument("--folder", type=Path, default=Path(state.FOLDER), help="state and data (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="start Kafka; it goes on when this command and the shell have ended")
    start.add_argument("--nodes", type=int, default=1, help="more than 1 needs Java (default: %(default)s)")
    start.add_argument("--engine", choices=["auto", "docker", "java"], default="auto")
    start.add_argument("--heap", default="1g", help="Java heap of each node (default: %(default)s)")
    start.add_argument("--auto-create-topics", action="store_true")
    commands.add_parser("stop", help="end it and remove its data")
    commands.add_parser("status", help="tell whether it runs")
    options = parser.parse_args(arguments)
    folder = options.folder.absolute()
    try:
        if options.command == "start":
            return _start(folder, options)
        return _stop(folder) if options.command == "stop" else _status(folder)
    except (KafkaUnavailable, KafkaStartError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _start(folder: Path, options: argparse.Namespace) -> int:
    if os.environ.get("KAFKA"):
        print(f"KAFKA={os.environ['KAFKA']} is set: that broker is used, nothing is started")
        return 0
    with state.locked(folder):
        running = state.find_running(folder)
        if running is None:
            _end_leftovers(folder)
            # The port that every Kafka tool tries first, if nobody has it.
            port = _USUAL_PORT if is_port_free(_USUAL_PORT) else None
            by_docker = options.engine == "docker" or (
                options.engine == "auto" and options.nodes == 1 and docker_unavailable_reason() is None
            )
            running = _start_docker(folder, port) if by_docker else _start_java(folder, port, options)
    print(f"Kafka runs at {running.bootstrap_servers} ({running.engine}); end it with the command stop")
    print(f"export KAFKA={running.bootstrap_servers}")
    return 0


def _start_java(folder: Path, port: int | None, options: argparse.Namespace) -> state.RunningKafka:
    launched: list[state.RunningKafka] = []

    def remember(kafka: RealKafka) -> None:
        # Before the brokers answer, so that `stop` finds them even if this process is killed while it waits.
        running = state.RunningKafka(
            kafka.bootstrap_servers,
            "java",
            processes=[(pid, process_identity(pid) or "") for pid in kafka.pids.values()],
            logs=[str(kafka.log_path(node)) for node in range(1, kafka.nodes + 1)],
        )
        running.save(folder)
        launched.append(running)

    kafka = RealKafka(
        options.nodes,
        data_dir=folder / "data",
        ports=[port] + [None] * (options.nodes - 1),
        heap=options.heap,
        auto_create_topics=options.auto_create_topics,
        detached=True,
        on_launch=remember,
    )
    try:
        kafka.start()
    except BaseException:
        state.wipe(folder)
        raise
    return launched[-1]


def _start_docker(folder: Path, port: int | None) -> state.RunningKafka:
    kafka = DockerKafka(port)
    kafka.start()
    running = state.RunningKafka(kafka.bootstrap_servers, "docker", project=kafka.project)
    running.save(folder)
    return running


def _end_leftovers(folder: Path) -> bool:
    """End and wipe what an earlier start left; True if there was something."""
    left = state.RunningKafka.load(folder)
    if left is not None:
        left.end()
    state.wipe(folder)
    return left is not None


def _stop(folder: Path) -> int:
    with state.locked(folder):
        print("Kafka is stopped, its data are removed" if _end_leftovers(folder) else "no Kafka was running")
    return 0


def _status(folder: Path) -> int:
    running = state.find_running(folder)
    if running is None:
        print("no Kafka is running; the command start starts one")
        return 1
    print(f"Kafka runs at {running.bootstrap_servers} ({running.engine})")
    for (pid, _), log in zip(running.processes, running.logs, strict=True):
        print(f"  process {pid}, log {log}")
    return 0
