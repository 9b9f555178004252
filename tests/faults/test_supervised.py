"""Supervised workers on real Kafka: what kills them, what becomes of the record at fault, and that nobody is left.

The services are scripts without a `__main__` guard that start two workers.
"""

import itertools
import os
import re
import signal
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from real_services import (
    KIP_848,
    Load,
    Service,
    Services,
    committed,
    load_value,
    origin,
    quicken_group,
    read_topic,
    send,
    wait_until,
)
from waiting import is_gone

pytestmark = pytest.mark.real_kafka

SERVICE = """
import itertools, logging, os, signal, sys, time
from keven_core.kafka import current_record, event_handler
from keven_core.kafka.events.server import start_events_receiver_process

logging.basicConfig(level=logging.INFO, format="%(message)s")
topic = sys.argv[1]
kept = []

def say(text):
    os.write(1, text.encode() + b"\\n")  # in one piece: several processes write there

def poison(number): ...

@event_handler("LOAD")
def handle(event):
    record = current_record()
    where = f"{event.id} {record.partition} {record.offset} {os.getpid()} {time.monotonic()}"
    say("begin " + where)
    poison(event.id)
    say("done " + where)
"""

START = """
process = start_events_receiver_process(server_name=topic, topics=[topic], **{"processes": 2, **OPTIONS})
say(f"supervisor {process.pid}")
process.join()
say(f"exit code {process.exitcode}")
"""


@dataclass(frozen=True)
class Line:
    number: int
    partition: int
    offset: int
    pid: int
    at: float


def lines(service: Service, kind: str) -> list[Line]:
    """What the workers have begun or done, in order."""
    found = re.findall(rf"^{kind} (\d+) (\d+) (\d+) (\d+) ([\d.]+)$", service.out, re.MULTILINE)
    return [Line(int(n), int(p), int(o), int(pid), float(at)) for n, p, o, pid, at in found]


def done(service: Service) -> set[int]:
    return {line.number for line in lines(service, "done")}


def pid_of_supervisor(service: Service) -> int:
    service.wait_for(lambda: re.search(r"^supervisor \d+$", service.out, re.MULTILINE), "the supervisor is started")
    return int(re.findall(r"^supervisor (\d+)$", service.out, re.MULTILINE)[0])


def workers_of(service: Service) -> list[int]:
    return [child.pid for child in psutil.Process(pid_of_supervisor(service)).children()]


def run(services: Services, topic: str, poison: str = "", env: dict[str, str] | None = None, **options: Any) -> Service:
    text = SERVICE + poison + f"\nOPTIONS = {options!r}\n" + START
    return services.run_script("service", text, topic, env=env)


def stop(service: Service) -> float:
    """End the supervisor as its handle does; all processes have to be gone. Returns the seconds that it took."""
    pids = [pid_of_supervisor(service), *workers_of(service)]
    started = time.monotonic()
    os.kill(pids[0], signal.SIGTERM)
    service.wait_for(lambda: "exit code" in service.out, "it ends", 30)
    assert "exit code 0\n" in service.out, service.tail()
    assert all(map(is_gone, pids))
    return time.monotonic() - started


def one_for_each_partition(kafka: Any, topic: str, first: int, count: int = 40) -> None:
    for partition in range(4):
        numbers = [number for number in range(first, first + count) if number % 4 == partition]
        send(kafka.bootstrap_servers, topic, map(load_value, numbers), partition=partition)


# --- poison ----------------------------------------------------------------------------------------------------------

POISON = """
def poison(number):
    if number == 1002:
        max(itertools.repeat(0))  # never comes back, nor lets go of the GIL
    if number == 1004:
        while sum(map(len, kept)) < 10 << 30:
            kept.append(b"x" * (4 << 20))
    if number == 1001:
        if current_record().attempt == 1:
            raise ValueError("the first time")
        sys.exit("the second time")
    if number == 1005:
        raise ValueError("for ever")
"""

WHY = {
    1002: "it made no progress for 1 s",
    1004: "MiB of memory",
    1001: "it ended with exit code 1",
    1005: "for ever",
}


def test_poison_ends_in_the_dead_letter_topic(kafka: Any, services: Services, topic: str) -> None:
    one_for_each_partition(kafka, topic, 0)
    for number in (1002, 1004):
        send(kafka.bootstrap_servers, topic, [load_value(number)], partition=number % 4)
    one_for_each_partition(kafka, topic, 100)
    limits = {"KEVEN_WORKER_HANG_MS": "1000", "KEVEN_WORKER_MEMORY_BYTES": str(160 << 20)}
    # Where a record was read from is committed before its next attempt kills the worker: there is one copy of it.
    retries = {"auto_reprocess_errors": True, "max_retries": 1, "retry_interval": 0.5}
    service = run(services, topic, POISON, {**limits, "KEVEN_COMMIT_INTERVAL_MS": "50"}, **retries)
    good = {*range(40), *range(100, 140)}
    service.wait_for(lambda: done(service) >= good, "all good records are handled")
    dead = f"kafka_server.{topic}.dead"
    service.wait_for(lambda: service.err.count(f"copied to {dead}") >= 2, "two are dead")
    for number in (1001, 1005):
        send(kafka.bootstrap_servers, topic, [load_value(number)], partition=number % 4)
    service.wait_for(lambda: service.err.count(f"copied to {dead}") >= len(WHY), "all are dead")
    stop(service)
    letters = read_topic(kafka.bootstrap_servers, dead)
    assert {letter.value() for letter in letters} == set(map(load_value, WHY))
    begun = Counter(line.number for line in lines(service, "begin"))
    for letter in letters:
        number = int(re.findall(rb'"id":(\d+)', letter.value() or b"")[0])
        headers = {name: (value or b"").decode(errors="replace") for name, value in letter.headers() or ()}
        assert WHY[number] in headers["kafka_dlt-exception-message"], (number, headers)
        assert origin(letter)[0] == number % 4
        if number != 1005:
            assert headers["kafka_dlt-exception-fqcn"] == "keven_core.kafka.errors.WorkerDiedError"
            assert begun[number] == (4 if number == 1001 else 3), service.tail()
    # Where the handler hung is said.
    assert "in poison" in service.err
    # After the first death of each nothing else is handled again.
    assert max(begun[number] for number in good) <= 6, begun


def test_partitions_of_other_workers_do_not_wait(kafka: Any, services: Services, topic: str) -> None:
    poison = "def poison(number):\n    if number == 5000:\n        os._exit(0)\n"
    with Load(kafka.bootstrap_servers, topic, 4, rate=400) as load:
        service = run(services, topic, poison)
        service.wait_for(lambda: len({line.pid for line in lines(service, "done")}) == 2, "both workers work")
        service.wait_for(lambda: {line.partition for line in lines(service, "done")} == {0, 1, 2, 3}, "on all of them")
        started = time.monotonic()
        send(kafka.bootstrap_servers, topic, [load_value(5000)], partition=0)
        service.wait_for(lambda: "death 3 of 3" in service.err, "it is condemned")
        service.wait_for_err("copied to kafka_server")
        ended = time.monotonic()
        load.stop()
    service.wait_for(lambda: done(service) >= set(range(load.sent)), "everything is handled")
    stop(service)
    handled = [line for line in lines(service, "done") if started < line.at < ended]
    fell = {line.pid for line in lines(service, "begin") if line.number == 5000}
    assert len(fell) == 3
    by_partition = defaultdict(list)
    for line in handled:
        by_partition[line.partition].append(line)
    calm = [p for p, found in by_partition.items() if not {line.pid for line in found} & fell]
    assert len(calm) == 2, "one worker has kept its partitions"
    for partition in calm:
        times = [started, *(line.at for line in by_partition[partition]), ended]
        longest = max(b - a for a, b in itertools.pairwise(times))
        # Half of session_timeout: nobody waited for a session to expire, and there was no rebalance.
        assert longest < 3, (partition, longest)


# --- killed from outside ---------------------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced_and_none_outlives_its_launcher(kafka: Any, services: Services, topic: str) -> None:
    one_for_each_partition(kafka, topic, 0)
    poison = "def poison(number):\n    if number == 1000:\n        time.sleep(1000)\n"
    service = run(services, topic, poison)
    service.wait_for(lambda: done(service) >= set(range(40)), "all are handled")
    before = workers_of(service)
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    os.kill(before[1], signal.SIGTERM)
    service.wait_for(lambda: service.err.count("; the next one starts in ") == 2, "both are replaced")
    assert "it was killed by SIGKILL; the next one starts in 0.2 s" in service.err
    one_for_each_partition(kafka, topic, 40)
    service.wait_for(lambda: done(service) >= set(range(80)), "the next ones go on")
    assert not set(workers_of(service)) & set(before)
    send(kafka.bootstrap_servers, topic, [load_value(1000)])
    service.wait_for(lambda: 1000 in {line.number for line in lines(service, "begin")}, "one hangs")
    pids = [pid_of_supervisor(service), *workers_of(service)]
    service.kill()
    assert wait_until(lambda: all(map(is_gone, pids)), "nobody is left", 10) < 5
    assert "it had not ended in time" in service.err


def test_a_worker_killed_with_records_in_flight_is_replaced(kafka: Any, services: Services, topic: str) -> None:
    """Under the new group protocol, where its partitions are the other's until the next one has joined."""
    quicken_group(services.direct_address, topic)
    env = {"KEVEN_RDKAFKA_OPTIONS": KIP_848, "KEVEN_COMMIT_INTERVAL_MS": "250"}
    poison = "def poison(number):\n    time.sleep(0.1)\n"
    with Load(kafka.bootstrap_servers, topic, 4, keys=64, rate=200) as load:
        service = run(services, topic, poison, env, order="key", workers=32)
        service.wait_for(lambda: len({line.pid for line in lines(service, "done")}) == 2, "both workers work")
        service.wait_for(lambda: {line.partition for line in lines(service, "done")} == {0, 1, 2, 3}, "on all of them")
        victim = lines(service, "done")[-1].pid

        def of_victim(kind: str) -> list[Line]:
            return [line for line in lines(service, kind) if line.pid == victim]

        def in_flight() -> set[int]:
            return {line.number for line in of_victim("begin")} - {line.number for line in of_victim("done")}

        def stands_still_with_some() -> bool:
            os.kill(victim, signal.SIGSTOP)
            if len(in_flight()) > 1:
                return True
            os.kill(victim, signal.SIGCONT)
            return False

        service.wait_for(stands_still_with_some, "it has records in flight")
        acknowledged = load.acknowledged_count
        os.kill(victim, signal.SIGKILL)
        service.wait_for(lambda: is_gone(victim), "it is dead")
        before = committed(kafka.bootstrap_servers, topic)
        fell = in_flight()
        assert len(fell) > 1
        service.wait_for_err("has ended: it was killed by SIGKILL; in hand: ")
        service.wait_for(lambda: len({line.pid for line in lines(service, "done")}) == 3, "the next one works")
        assert load.acknowledged_count > acknowledged
        load.stop()
    service.wait_for(lambda: done(service) >= set(range(load.sent)), "everything is handled")
    assert victim not in workers_of(service)
    stop(service)
    assert committed(kafka.bootstrap_servers, topic) == load.ends()
    places = Counter((line.partition, line.offset) for line in lines(service, "done"))
    assert set(places) == set(load.acknowledged)
    again = [place for place, count in places.items() if count > 1]
    assert max(places.values()) <= 2
    assert set(again) <= {(line.partition, line.offset) for line in of_victim("done")}
    assert all(offset >= before.get(partition, 0) for partition, offset in again), (again, before)


def test_no_worker_outlives_its_supervisor(kafka: Any, services: Services, topic: str) -> None:
    """Not even one whose handler neither comes back nor lets go of the GIL."""
    one_for_each_partition(kafka, topic, 0)
    poison = "def poison(number):\n    if number == 20:\n        max(itertools.repeat(0))\n"
    service = run(services, topic, poison)
    service.wait_for(lambda: 20 in {line.number for line in lines(service, "begin")}, "one hangs")
    pids = workers_of(service)
    assert len(pids) == 2
    os.kill(pid_of_supervisor(service), signal.SIGKILL)
    try:
        took = wait_until(lambda: all(map(is_gone, pids)), "nobody is left", 10)
    finally:
        for pid in pids:
            if not is_gone(pid):
                os.kill(pid, signal.SIGKILL)
    assert took < 5
    service.wait_for(lambda: f"exit code {-signal.SIGKILL}" in service.out, "the handle tells")


# --- ends ------------------------------------------------------------------------------------------------------------


def test_workers_that_grow_are_replaced_in_order_until_they_end_by_themselves(
    kafka: Any, services: Services, topic: str
) -> None:
    poison = "def poison(number):\n    kept.append(b'x' * 400_000)\n    time.sleep(0.005)\n"
    one_for_each_partition(kafka, topic, 0, 600)
    # Small batches, so that the one in hand ends before twice the limit is reached.
    limits = {"KEVEN_WORKER_MEMORY_BYTES": str(130 << 20), "KEVEN_BATCH_SIZE": "20"}
    service = run(services, topic, poison, limits, until_end=True)
    service.wait_for(lambda: "exit code 0\n" in service.out, "they end")
    assert service.err.count("MiB of memory (KEVEN_WORKER_MEMORY_BYTES=136314880)") >= 2
    # In order: all that was handled was committed first, and nobody else was disturbed.
    assert Counter(line.number for line in lines(service, "done")) == Counter(range(600))
    assert "SIGKILL" not in service.err


def test_what_can_not_be_mended_ends_at_once(services: Services, topic: str) -> None:
    service = run(services, "not a topic")
    service.wait_for(lambda: "exit code 1\n" in service.out, "it ends")
    assert service.wait() == 0
    assert "ConfigurationError: 'not a topic' is not a topic name" in service.err
    assert "can't go on: it ended with exit code 1" in service.err
    assert service.err.count("the next one starts") == 0
