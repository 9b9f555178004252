"""A real Kafka for tests, benchmarks and development: found, or started on this machine.

    with RealKafka() as kafka:                          # own broker: may be killed, paused, restarted
        kafka.create_topic("orders", partitions=4)
        run(kafka.bootstrap_servers)
        kafka.kill()
        kafka.restart()

    with real_kafka() as kafka: ...                     # whatever there is: KAFKA, `make kafka`, Docker, Java

    python -m keven_core.testing.real_kafka start [--nodes 3] | status | stop

A broker started here runs Apache Kafka 4.3.0 in KRaft mode and listens on loopback only. It needs Java 17+ and, the
first time, Maven; `unavailable_reason` says what is missing. Linux and macOS.
"""

import os
import sys
from pathlib import Path
from typing import Any

from keven_core.testing._broker_process.cluster import ExternalKafka, KafkaCluster
from keven_core.testing._broker_process.docker_kafka import DockerKafka, docker_unavailable_reason
from keven_core.testing._broker_process.errors import KafkaStartError, KafkaUnavailable
from keven_core.testing._broker_process.jars import KAFKA_VERSION, java_unavailable_reason
from keven_core.testing._broker_process.java_kafka import RealKafka
from keven_core.testing._broker_process.state import find_running
from keven_core.testing._broker_process.tls import ThrowAwayCa

__all__ = [
    "KAFKA_VERSION",
    "DockerKafka",
    "ExternalKafka",
    "KafkaCluster",
    "KafkaStartError",
    "KafkaUnavailable",
    "RealKafka",
    "ThrowAwayCa",
    "real_kafka",
    "running_kafka",
    "unavailable_reason",
]


def running_kafka(folder: Path | None = None) -> str | None:
    """Return the address of the Kafka that the command `start` (`make kafka`) has launched, None if it is not alive.

    Args:
        folder: where its state lies. None (default): `.kafka` here, or in the nearest folder above that has one.
    """
    running = find_running(folder)
    return running.bootstrap_servers if running else None


def unavailable_reason(*, own_broker: bool = False) -> str | None:
    """Say why no real Kafka can be had here and what to install, or None if one can. Starts nothing; no network.

    Args:
        own_broker: True asks for brokers that this process may kill (`RealKafka`), which takes Java. False (default)
            is content with the one that `KAFKA` names, a running one, or Docker.
    """
    if not own_broker and (os.environ.get("KAFKA") or running_kafka() or docker_unavailable_reason() is None):
        return None
    return java_unavailable_reason()


def real_kafka(**options: Any) -> KafkaCluster:
    """Return a real Kafka, not started yet: use it in a `with` statement. The first of these that there is:

    1. the one that the environment variable `KAFKA` names,
    2. the one that `make kafka` has started,
    3. a container, if a Docker engine runs,
    4. a broker started with Java.

    Args:
        options: arguments of `RealKafka`, e.g. `nodes=3` or `proxied=True`. With any, only 4 will do.

    Raises:
        KafkaUnavailable: there is none; the text says what to install.
    """
    if not options:
        address = os.environ.get("KAFKA") or running_kafka()
        if address:
            return ExternalKafka(address)
        if docker_unavailable_reason() is None:
            return DockerKafka()
    reason = java_unavailable_reason()
    if reason:
        raise KafkaUnavailable(reason)
    return RealKafka(**options)


if __name__ == "__main__":
    from keven_core.testing._broker_process.cli import main

    sys.exit(main())
