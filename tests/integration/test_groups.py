"""Consumer groups on real Kafka: members come and go under load, end in order, or are killed; nothing is lost."""

import signal
from typing import Any

import pytest
from real_services import (
    COOPERATIVE,
    EAGER,
    KIP_848,
    PROTOCOLS,
    Load,
    Services,
    Worker,
    assert_delivered,
    committed,
    members_of,
    wait_until,
    wait_until_all_handled,
)

from keven_core.testing.real_kafka import RealKafka

pytestmark = pytest.mark.real_kafka

PARTITIONS = {0, 1, 2, 3}


def partitions_of(worker: Worker) -> set[int]:
    return {entry.partition for entry in worker.handled}


def next_offsets(worker: Worker) -> dict[int, int]:
    """By partition: the offset after the last record that a worker has handled."""
    return {entry.partition: entry.offset + 1 for entry in worker.handled}


@PROTOCOLS
def test_members_join_and_leave_under_load(kafka: Any, services: Services, topic: str, protocol: str) -> None:
    options: dict[str, Any] = {"protocol": protocol}
    with Load(kafka.bootstrap_servers, topic, 4) as load:
        first = services.worker("first", **options)
        first.wait_for_more()
        second = services.worker("second", **options)
        second.wait_for_more()
        first.wait_for_more()  # both have partitions
        assert members_of(kafka.bootstrap_servers, topic) == 2
        assert partitions_of(second) < PARTITIONS
        first.stop()
        second.wait_for(lambda: partitions_of(second) == PARTITIONS, "the second has taken over all partitions")
        third = services.worker("third", **options)
        third.wait_for_more()
        second.wait_for_more()
        load.stop()
    wait_until_all_handled(load, first, second, third)
    second.stop()
    third.stop()
    # All changes were in order, so what was handled was committed before it was given away.
    assert_delivered(load.acknowledged, first, second, third, repeats=0)
    assert committed(kafka.bootstrap_servers, topic) == load.ends()


@pytest.mark.parametrize(
    ("protocol", "number", "asynchronous"),
    [
        (EAGER, signal.SIGTERM, False),
        (EAGER, signal.SIGINT, False),
        (EAGER, signal.SIGTERM, True),
        (EAGER, signal.SIGINT, True),
        (COOPERATIVE, signal.SIGTERM, False),
        (KIP_848, signal.SIGTERM, False),
        (KIP_848, signal.SIGINT, True),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_restart_goes_on_where_the_last_run_ended(
    kafka: Any, services: Services, topic: str, protocol: str, number: signal.Signals, asynchronous: bool
) -> None:
    options: dict[str, Any] = {"protocol": protocol, "asynchronous": asynchronous, "work_s": 0.0005}
    runs = []
    with Load(kafka.bootstrap_servers, topic, 4) as load:
        for name in ("first", "second"):
            run = services.worker(name, **options)
            run.wait_for_more(300)
            run.stop(number)
            assert f"{number.name}: finishing the batch in hand" in run.err
            runs.append(run)
            handled = {partition: end for each in runs for partition, end in next_offsets(each).items()}
            assert committed(kafka.bootstrap_servers, topic) == handled
        load.stop()
    last = services.worker("last", **options)
    wait_until_all_handled(load, *runs, last)
    last.stop()
    assert_delivered(load.acknowledged, *runs, last, repeats=0)


@PROTOCOLS
def test_an_end_in_the_middle_of_a_rebalance_loses_nothing(
    kafka: Any, services: Services, topic: str, protocol: str
) -> None:
    options: dict[str, Any] = {"protocol": protocol, "work_s": 0.0005}
    with Load(kafka.bootstrap_servers, topic, 4) as load:
        first = services.worker("first", **options)
        first.wait_for_more()
        second = services.worker("second", **options)
        wait_until(lambda: members_of(kafka.bootstrap_servers, topic) == 2, "the second has asked to join")
        first.terminate()
        second.terminate()
        assert (first.wait(20), second.wait(20)) == (0, 0), first.tail() + second.tail()
        load.stop()
    last = services.worker("last", **options)
    wait_until_all_handled(load, first, second, last)
    last.stop()
    assert_delivered(load.acknowledged, first, second, last, repeats=0)


@PROTOCOLS
def test_kill_9_of_a_member_under_load(
    own_kafka: RealKafka, own_services: Services, own_topic: str, protocol: str
) -> None:
    address = own_kafka.bootstrap_servers
    options: dict[str, Any] = {"protocol": protocol, "work_s": 0.001}
    with Load(address, own_topic, 4, rate=600) as load:
        survivor = own_services.worker("survivor", **options)
        survivor.wait_for_more()
        victim = own_services.worker("victim", **options)
        victim.wait_for_more(400)
        victims_own = partitions_of(victim)
        assert victims_own < PARTITIONS
        victim.kill()
        before = committed(address, own_topic)
        handled_before = survivor.count
        survivor.wait_for(lambda: partitions_of(survivor) == PARTITIONS, "the survivor has taken over")
        replacement = own_services.worker("replacement", **options)
        replacement.wait_for_more()
        load.stop()
    wait_until_all_handled(load, survivor, victim, replacement)
    survivor.stop()
    replacement.stop()
    verdict = assert_delivered(load.acknowledged, survivor, victim, replacement, repeats=None)
    assert survivor.count > handled_before
    # Only what the victim had handled and not yet committed comes again, once.
    assert {partition for partition, _ in verdict.repeated} <= victims_own
    assert all(offset >= before.get(partition, 0) for partition, offset in verdict.repeated), (verdict, before)
    assert len(verdict.repeated) == len(set(verdict.repeated))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_sigterm_against_a_stalled_broker_keeps_the_deadline_and_names_what_is_uncommitted(
    own_kafka: RealKafka, own_services: Services, own_topic: str, asynchronous: bool
) -> None:
    address = own_kafka.bootstrap_servers
    slow_commits = {"KEVEN_CLOSE_TIMEOUT_MS": "3000", "KEVEN_COMMIT_INTERVAL_MS": "600000"}
    with Load(address, own_topic, 4, count=2000) as load:
        stalled = own_services.worker("stalled", env=slow_commits, asynchronous=asynchronous)
        stalled.wait_for_count(1000)
        own_kafka.pause()
        stalled.terminate()
        took = wait_until(lambda: stalled.returncode is not None, "the stalled server ends", 15)
        own_kafka.resume()
        load.finish()
    assert stalled.returncode == 4, stalled.tail()
    assert took < 3 + 3, f"{took} s\n{stalled.tail()}"
    last_words = stalled.err.rpartition("CommitError")[2]
    for partition, offset in next_offsets(stalled).items():
        assert f"{own_topic} [{partition}] @ {offset}" in last_words, stalled.tail()
    # The group does not know that it has gone before its session ends.
    last = own_services.worker("last")
    wait_until_all_handled(load, stalled, last)
    last.stop()
    assert_delivered(load.acknowledged, stalled, last, repeats=None)


SAYS_WHEN_ALL_IS_COMMITTED = """
import sys, threading, time
from keven_core.kafka import event_handler
from keven_core.kafka.events.server import setup_event_listener

@event_handler("LOAD")
def handle(event):
    pass

server = setup_event_listener(
    server_name=sys.argv[1], topics=[sys.argv[1]], session_timeout=2, heartbeat_interval=0.5
)

def watch():
    while True:
        try:
            known = server.io_server.committed()
            if sum(known.values()) == int(sys.argv[2]):
                print("committed", flush=True)
                return
        except Exception:
            pass
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
server.start_sync()
"""


def test_sigterm_against_a_stalled_broker_with_nothing_to_commit_is_an_end_in_order(
    own_kafka: RealKafka, own_services: Services, own_topic: str
) -> None:
    env = {"KEVEN_CLOSE_TIMEOUT_MS": "3000", "KEVEN_COMMIT_INTERVAL_MS": "100"}
    with Load(own_kafka.bootstrap_servers, own_topic, 4, count=200) as load:
        load.finish()
    service = own_services.run_script("service", SAYS_WHEN_ALL_IS_COMMITTED, own_topic, "200", env=env)
    service.wait_for(lambda: "committed" in service.out, "the server knows that everything is committed")
    own_kafka.pause()
    service.terminate()
    took = wait_until(lambda: service.returncode is not None, "the stalled server ends", 15)
    own_kafka.resume()
    assert took < 3 + 3, f"{took} s\n{service.tail()}"
    assert service.returncode == 0, service.tail()
    assert "did not answer within 3000 ms" in service.err
