"""Records in flight on real Kafka: members come, go and are killed while many records are handled at once."""

from collections.abc import Callable
from typing import Any

import pytest
from real_services import (
    COOPERATIVE,
    EAGER,
    KIP_848,
    Handling,
    Load,
    Services,
    assert_delivered,
    committed,
    partitions_of,
    wait_until_all_handled,
)

pytestmark = pytest.mark.real_kafka

PARTITIONS = {0, 1, 2, 3}
KEYS = 32

# Worker options by who handles the records.
CREWS: dict[str, dict[str, Any]] = {
    "threads": {"workers": 8, "work_s": 0.004},
    "tasks": {"max_in_flight": 40, "work_s": 0.02, "asynchronous": True},
}


def lane_of(order: str) -> Callable[[Handling], Any]:
    """What the records that have to be handled in order have in common."""
    return {
        "partition": lambda entry: entry.partition,
        "key": lambda entry: entry.number % KEYS,
        "none": lambda entry: (entry.partition, entry.offset),
    }[order]


@pytest.mark.parametrize(
    ("protocol", "crew", "order"),
    [
        (EAGER, "threads", "key"),
        (COOPERATIVE, "tasks", "key"),
        (KIP_848, "threads", "partition"),
        (KIP_848, "tasks", "none"),
    ],
    ids=["eager-threads-key", "cooperative-tasks-key", "kip-848-threads-partition", "kip-848-tasks-none"],
)
def test_members_join_and_leave_with_records_in_flight(
    kafka: Any, services: Services, topic: str, protocol: str, crew: str, order: str
) -> None:
    options: dict[str, Any] = {"protocol": protocol, "order": order, **CREWS[crew]}
    with Load(kafka.bootstrap_servers, topic, 4, keys=KEYS, rate=500) as load:
        first = services.worker("first", **options)
        first.wait_for_more()
        second = services.worker("second", **options)
        second.wait_for_more()
        first.wait_for_more()
        assert partitions_of(second) < PARTITIONS
        first.stop()
        second.wait_for(lambda: partitions_of(second) == PARTITIONS, "the second has taken over all partitions")
        load.stop()
    wait_until_all_handled(load, first, second)
    second.stop()
    # What ran was finished and committed before it was given away, so nothing comes again.
    assert_delivered(load.acknowledged, first, second, repeats=0, lane=lane_of(order))
    assert committed(kafka.bootstrap_servers, topic) == load.ends()


@pytest.mark.parametrize(("crew", "order"), [("threads", "key"), ("tasks", "none")])
def test_kill_9_with_records_in_flight(kafka: Any, services: Services, topic: str, crew: str, order: str) -> None:
    options: dict[str, Any] = {"order": order, **CREWS[crew]}
    with Load(kafka.bootstrap_servers, topic, 4, keys=KEYS, rate=500) as load:
        survivor = services.worker("survivor", **options)
        survivor.wait_for_more()
        victim = services.worker("victim", **options)
        victim.wait_for_more(200)
        victims_own = partitions_of(victim)
        victim.kill()
        before = committed(kafka.bootstrap_servers, topic)
        survivor.wait_for(lambda: partitions_of(survivor) == PARTITIONS, "the survivor has taken over")
        load.stop()
    wait_until_all_handled(load, survivor, victim)
    survivor.stop()
    verdict = assert_delivered(load.acknowledged, survivor, victim, repeats=None, lane=lane_of(order))
    assert {partition for partition, _ in verdict.repeated} <= victims_own
    assert all(offset >= before.get(partition, 0) for partition, offset in verdict.repeated), (verdict, before)
    assert len(verdict.repeated) == len(set(verdict.repeated))


def test_restarts_with_records_in_flight(kafka: Any, services: Services, topic: str) -> None:
    """Each run ends by SIGTERM in the middle of its work; what it began is finished and committed, the rest is not."""
    runs = []
    with Load(kafka.bootstrap_servers, topic, 4, keys=KEYS, rate=500) as load:
        for number in range(4):
            crew = ("threads", "tasks")[number % 2]
            run = services.worker(f"run-{number}", order="key", **CREWS[crew])
            run.wait_for_more(150)
            run.stop()
            runs.append(run)
        load.stop()
    last = services.worker("last", order="key", **CREWS["tasks"])
    wait_until_all_handled(load, *runs, last)
    last.stop()
    assert_delivered(load.acknowledged, *runs, last, repeats=0, lane=lane_of("key"))
    assert committed(kafka.bootstrap_servers, topic) == load.ends()
