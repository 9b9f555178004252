"""What every Kafka that tests may use has in common, whoever runs it."""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from keven_core.testing._broker_process.errors import KafkaStartError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ExternalKafka", "KafkaCluster", "wait_until_answering"]

_ADMIN_TIMEOUT_S = 30.0


class KafkaCluster:
    """A Kafka that answers at `bootstrap_servers`; a context manager that starts and stops it.

    Its methods block, and are called from one thread at a time.
    """

    @property
    def bootstrap_servers(self) -> str:
        """Addresses for clients: `host:port`, several separated by commas."""
        raise NotImplementedError

    def start(self) -> None:
        """Start it and wait until it answers."""
        raise NotImplementedError

    def stop(self) -> None:
        """Stop what `start` started; idempotent."""
        raise NotImplementedError

    def __enter__(self) -> "Self":
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def create_topic(
        self,
        name: str,
        partitions: int = 1,
        replication_factor: int = 1,
        config: Mapping[str, object] | None = None,
    ) -> None:
        """Create a topic and wait until every partition has a leader, so that it can be used at once.

        Args:
            name: its name.
            partitions: how many (1).
            replication_factor: on how many brokers each lies (1).
            config: topic settings, e.g. `{"retention.ms": 1000}`.

        Raises:
            RuntimeError: Kafka refused (the topic exists, say), or did not answer within 30 s.
        """
        from confluent_kafka.cimpl import NewTopic

        admin = self._admin()
        topic = NewTopic(
            name,
            num_partitions=partitions,
            replication_factor=replication_factor,
            config={key: str(value) for key, value in (config or {}).items()},
        )
        self._result(admin.create_topics([topic], operation_timeout=_ADMIN_TIMEOUT_S)[name], f"create topic {name!r}")

        def has_leaders() -> bool:
            known = admin.list_topics(timeout=5).topics.get(name)
            return (
                known is not None
                and len(known.partitions) == partitions
                and all(partition.leader >= 0 for partition in known.partitions.values())
            )

        self._wait(has_leaders, f"topic {name!r} has no leader for each of its {partitions} partitions")

    def delete_topic(self, name: str) -> None:
        """Delete a topic and wait until it is gone.

        Raises:
            RuntimeError: Kafka refused (there is no such topic, say), or did not answer within 30 s.
        """
        admin = self._admin()
        self._result(admin.delete_topics([name], operation_timeout=_ADMIN_TIMEOUT_S)[name], f"delete topic {name!r}")
        self._wait(lambda: name not in admin.list_topics(timeout=5).topics, f"topic {name!r} is still there")

    def _admin_servers(self) -> str:
        return self.bootstrap_servers

    def _admin(self) -> Any:
        return _admin_client(self._admin_servers())

    def _result(self, future: Any, action: str) -> None:
        from confluent_kafka import KafkaException

        try:
            future.result(timeout=_ADMIN_TIMEOUT_S + 5)
        except (KafkaException, TimeoutError) as error:
            raise RuntimeError(f"cannot {action} at {self._admin_servers()}: {error}") from error

    def _wait(self, condition: Callable[[], bool], otherwise: str) -> None:
        from confluent_kafka import KafkaException

        deadline = time.monotonic() + _ADMIN_TIMEOUT_S
        last_error: Exception | None = None
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except KafkaException as error:
                last_error = error
            time.sleep(0.05)
        because = f" (last error: {last_error})" if last_error else ""
        raise RuntimeError(f"{otherwise} after {_ADMIN_TIMEOUT_S:.0f} s, at {self._admin_servers()}{because}")


class ExternalKafka(KafkaCluster):
    """A Kafka that somebody else runs, e.g. the one that the environment variable `KAFKA` names.

    Starting and stopping it does nothing.

    Args:
        bootstrap_servers: its addresses: `host:port`, several separated by commas.
    """

    def __init__(self, bootstrap_servers: str) -> None:
        self._bootstrap_servers = bootstrap_servers

    def __repr__(self) -> str:
        return f"ExternalKafka({self._bootstrap_servers!r})"

    @property
    def bootstrap_servers(self) -> str:
        """The addresses it was made with."""
        return self._bootstrap_servers

    def start(self) -> None:
        """Do nothing: it runs already."""

    def stop(self) -> None:
        """Do nothing: it is not ours."""


def wait_until_answering(
    bootstrap_servers: str, brokers: int, deadline: float, still_alive: Callable[[], str | None]
) -> None:
    """Wait until a metadata answer names that many brokers. Blocks.

    Args:
        bootstrap_servers: where to ask.
        brokers: how many must be in the answer.
        deadline: as `time.monotonic()` tells it.
        still_alive: called between the questions; returns why it is useless to go on, or None.

    Raises:
        KafkaStartError: nothing answered in time, or `still_alive` said that it never will.
    """
    from confluent_kafka import KafkaException

    admin = _admin_client(bootstrap_servers)
    last: object = "no answer"
    while time.monotonic() < deadline:
        reason = still_alive()
        if reason:
            raise KafkaStartError(reason)
        try:
            found = len(admin.list_topics(timeout=1).brokers)
        except KafkaException as error:
            last = error
            continue
        if found >= brokers:
            return
        last = f"{found} of {brokers} brokers are registered"
        time.sleep(0.05)
    raise KafkaStartError(f"no Kafka answers at {bootstrap_servers}: {last}")


def _admin_client(bootstrap_servers: str) -> Any:
    # Imported here: it takes 100 ms, and the launcher's other uses do not need it.
    from confluent_kafka.admin import AdminClient

    # Connections that fail while a broker starts are expected; librdkafka would write each to standard error.
    return AdminClient(
        {
            "bootstrap.servers": bootstrap_servers,
            "log_level": 2,
            "reconnect.backoff.ms": 50,
            "reconnect.backoff.max.ms": 250,
        }
    )
