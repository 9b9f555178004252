"""`EmbeddedKafka`: a Kafka cluster inside this process, for tests that need nothing but pip.

It is librdkafka's mock cluster: the real protocol on loopback ports, with errors, delays and dead brokers on request.
It keeps about 5 MB a partition and drops older data without telling the producer, so pace producers by what has been
handled; it proves error handling, not durability.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from keven_core.kafka.config import Settings

if TYPE_CHECKING:
    from keven_core._native.mock import MockCluster

__all__ = ["API_KEYS", "EmbeddedKafka"]

# Numbers of the Kafka protocol's requests, for push_errors().
API_KEYS = {
    "Produce": 0,
    "Fetch": 1,
    "ListOffsets": 2,
    "Metadata": 3,
    "OffsetCommit": 8,
    "OffsetFetch": 9,
    "FindCoordinator": 10,
    "JoinGroup": 11,
    "Heartbeat": 12,
    "LeaveGroup": 13,
    "SyncGroup": 14,
}

# The mock cluster's thread carries a command out, answers, and only then empties the pipe that woke it: a command that
# comes in between has its wake-up thrown away and waits for the next tick, 1 s (rdkafka_mock.c, io_poll). Without this
# pause that is one command in four on a busy machine; with it none was seen in 2400.
_SETTLE_S = 0.002


class EmbeddedKafka:
    """A cluster of mock brokers; a context manager. May be used from any one thread at a time.

    Arguments:
        brokers: how many; their ids are 1, 2, ...
    """

    def __init__(self, brokers: int = 1) -> None:
        self.brokers = brokers
        self._cluster: MockCluster | None = None
        self._held: dict[int, socket.socket] = {}  # by broker that is down: what keeps its port

    def start(self) -> EmbeddedKafka:
        """Start the brokers; takes milliseconds."""
        from keven_core._native.mock import MockCluster

        if self._cluster is None:
            self._cluster = MockCluster(self.brokers)
        return self

    def stop(self) -> None:
        """End the brokers; everything stored is gone. May be called twice.

        The producers of loggers that talk to them are closed first, or they would look for them until the process ends.
        """
        if self._cluster is not None:
            producers = sys.modules.get("keven_core.kafka._producers")
            if producers is not None:
                producers.close_producers(self.bootstrap_servers)
            self._cluster.close()
            self._cluster = None
            while self._held:
                self._held.popitem()[1].close()

    def __enter__(self) -> EmbeddedKafka:
        """Start the brokers."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the brokers."""
        self.stop()

    @property
    def _running(self) -> MockCluster:
        if self._cluster is None:
            raise RuntimeError("the embedded Kafka is not running: use `with EmbeddedKafka() as kafka`, or start()")
        return self._cluster

    @staticmethod
    def _command(call: Callable[..., None], *arguments: Any) -> None:
        call(*arguments)
        time.sleep(_SETTLE_S)

    @property
    def bootstrap_servers(self) -> str:
        """Addresses of the brokers, comma-separated, for clients."""
        servers: str = self._running.bootstrap_servers()
        return servers

    def settings(self, **changes: Any) -> Settings:
        """Settings for servers and loggers that talk to this cluster; `changes` as for Settings.

        Topics are not created by the server, since the embedded brokers do not take that request: use create_topic().
        """
        return Settings(kafka_address=self.bootstrap_servers, **{"create_topics": False, **changes})

    def create_topic(self, name: str, partitions: int = 1, replication_factor: int = 1) -> None:
        """Create a topic. Raises KafkaError when it exists."""
        self._command(self._running.create_topic, name, partitions, replication_factor)

    def push_errors(self, request: str, codes: Iterable[int]) -> None:
        """Answer the next requests of a kind ("Produce", "Fetch", ... see API_KEYS) with these error codes, one each.

        Kafka's own codes are positive; 0 is no error, -195 drops the connection.
        """
        self._running.push_errors(API_KEYS[request], list(codes))

    def clear_errors(self, request: str) -> None:
        """Forget what push_errors() left over for a kind of request."""
        self._running.clear_errors(API_KEYS[request])

    def requests(self) -> dict[str, int]:
        """How many requests of each kind the brokers have had since the first call; kinds as in API_KEYS."""
        names = {number: name for name, number in API_KEYS.items()}
        return {names.get(key, str(key)): count for key, count in self._running.requests().items()}

    def set_topic_error(self, name: str, code: int) -> None:
        """Answer metadata and produce requests for a topic with an error; 0 ends it."""
        self._command(self._running.set_topic_error, name, code)

    def set_latency(self, latency_ms: int, broker: int | None = None) -> None:
        """Delay every answer of a broker, or of all, by this many milliseconds."""
        for number in [broker] if broker else range(1, self.brokers + 1):
            self._command(self._running.set_rtt, number, latency_ms)

    def broker_down(self, broker: int = 1) -> None:
        """Take a broker down: connections are closed and refused."""
        self._command(self._running.set_down, broker, True)
        if broker not in self._held:
            # Otherwise the port is free, and the next cluster of this machine may get it, with this one's clients.
            host, _, port = self.bootstrap_servers.split(",")[broker - 1].rpartition(":")
            held = self._held[broker] = socket.socket()
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind((host, int(port)))

    def broker_up(self, broker: int = 1) -> None:
        """Bring a broker back."""
        if broker in self._held:
            self._held.pop(broker).close()
        self._command(self._running.set_down, broker, False)

    def set_leader(self, topic: str, partition: int, broker: int) -> None:
        """Move the leader of a partition to another broker; -1: to none (writing to it then crashes librdkafka's mock).

        Offsets of records that were written before the move can't be committed after it (FENCED_LEADER_EPOCH), which a
        real broker does not mind.
        """
        self._command(self._running.set_leader, topic, partition, broker)

    def set_coordinator(self, group: str, broker: int) -> None:
        """Move the coordinator of a consumer group to another broker."""
        self._command(self._running.set_coordinator, group, broker)
