"""Three brokers that die and come back one after the other under load: leaders and the group's coordinator move."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from in_flight import lane_of_key, load_for, start_member, wait_for_in_flight, window
from real_services import (
    COOPERATIVE,
    EAGER,
    KIP_848,
    PROTOCOLS,
    Load,
    Services,
    assert_delivered,
    committed,
    wait_until_all_handled,
)

from keven_core.testing.pytest_plugin import skip_without_kafka
from keven_core.testing.real_kafka import RealKafka

pytestmark = [pytest.mark.real_kafka, pytest.mark.soak, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RealKafka]:
    skip_without_kafka(own_broker=True)
    with RealKafka(3, heap="300m") as cluster:
        yield cluster


@PROTOCOLS
def test_each_broker_is_killed_and_restarted(cluster: RealKafka, tmp_path: Path, protocol: str) -> None:
    topic = f"rolled-{PROTOCOLS.args[1].index(protocol)}"
    cluster.create_topic(topic, partitions=6, replication_factor=3)
    address = cluster.bootstrap_servers
    services = Services(tmp_path, address, address, topic)
    options = {"protocol": protocol, "rdkafka": "reconnect.backoff.max.ms=500,socket.timeout.ms=5000"}
    try:
        with Load(address, topic, 6, rate=200) as load:
            workers = [services.worker(f"worker-{number}", **options) for number in range(2)]  # type: ignore[arg-type]
            for worker in workers:
                worker.wait_for_more()
            for node in (1, 2, 3):
                sent = load.acknowledged_count
                cluster.kill(node)
                for worker in workers:
                    worker.wait_for_more(100)  # by itself, with two brokers
                cluster.restart(node)
                for worker in workers:
                    worker.wait_for_more(100)
                assert load.acknowledged_count > sent
            load.stop()
        wait_until_all_handled(load, *workers)
        for worker in workers:
            worker.stop()
        assert_delivered(load.acknowledged, *workers, repeats=10_000)
    finally:
        services.close()


@pytest.mark.parametrize(("protocol", "crew"), [(EAGER, "threads"), (COOPERATIVE, "tasks"), (KIP_848, "tasks")])
def test_a_rolling_restart_with_records_in_flight(cluster: RealKafka, tmp_path: Path, protocol: str, crew: str) -> None:
    topic = f"in-flight-{PROTOCOLS.args[1].index(protocol)}"
    cluster.create_topic(topic, partitions=6, replication_factor=3)
    address = cluster.bootstrap_servers
    services = Services(tmp_path, address, address, topic)
    options = {"protocol": protocol, "rdkafka": "reconnect.backoff.max.ms=500,socket.timeout.ms=5000"}
    try:
        with load_for(address, topic, 6) as load:
            members = [start_member(services, f"member-{number}", crew, **options) for number in range(2)]
            for member in members:
                member.wait_for_more()
            for node in (1, 2, 3):
                sent, pid = load.acknowledged_count, cluster.pids[node]
                wait_for_in_flight(*members)
                cluster.terminate(node)  # it hands over what it leads
                for member in members:
                    member.wait_for_more(100)
                cluster.restart(node)
                assert cluster.pids[node] != pid
                for member in members:
                    member.wait_for_more(100)
                assert load.acknowledged_count > sent
            load.stop()
        wait_until_all_handled(load, *members)
        for member in members:
            member.stop()
        assert_delivered(load.acknowledged, *members, repeats=window(3 * len(members)), lane=lane_of_key)
        assert committed(address, topic, topic) == load.ends()
    finally:
        services.close()
