"""Faults of many kinds in random order, under load, with members that come, go and are killed; nothing is lost.

The seed is printed, so that a run can be repeated: KEVEN_TEST_SEED. The short run is one of the suite; the long one is
for `make soak`: KEVEN_TEST_FAULTS says how many faults.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable

import pytest
from real_services import (
    COOPERATIVE,
    KIP_848,
    PROTOCOLS,
    Load,
    Services,
    Worker,
    heal,
    judge,
    wait_until_all_handled,
)

from keven_core.testing.proxy import FETCH, HEARTBEAT, OFFSET_COMMIT
from keven_core.testing.real_kafka import RealKafka

pytestmark = pytest.mark.real_kafka

RATE = 300
PARTITIONS = 6


class Chaos:
    """One run: two members under load, one fault after the other, and what each did is counted."""

    def __init__(self, kafka: RealKafka, services: Services, topic: str, protocol: str, seed: int) -> None:
        self.kafka = kafka
        self.proxy = kafka.proxies[0]
        self.services = services
        self.topic = topic
        self.protocol = protocol
        self.random = random.Random(seed)
        self.happened: Counter[str] = Counter()
        self.all: list[Worker] = []
        self.alive: list[Worker] = []
        self.load = Load(kafka.direct_bootstrap_servers, topic, PARTITIONS, rate=RATE)

    def start(self) -> Worker:
        worker = self.services.worker(
            f"worker-{len(self.all)}",
            protocol=self.protocol,
            rdkafka="socket.timeout.ms=3000,reconnect.backoff.max.ms=500",
            asynchronous=self.random.random() < 0.5,
            work_s=self.random.choice([0, 0.0005]),
            env={"KEVEN_COMMIT_INTERVAL_MS": "250", "KEVEN_CLOSE_TIMEOUT_MS": "5000"},
        )
        self.all.append(worker)
        self.alive.append(worker)
        return worker

    # --- the faults; each says that it happened

    def cut(self) -> None:
        assert self.proxy.cut() >= 0

    def short_lives(self) -> None:
        self.proxy.lifetime(0.2, 1.0)
        self.flow(0.5)

    def black_hole(self) -> None:
        self.proxy.black_hole(swallow=self.random.random() < 0.5)
        self.pass_time(self.random.uniform(0.5, 4))

    def delay(self) -> None:
        self.proxy.delay(self.random.uniform(0.05, 0.3), 0.05)
        self.flow(0.5)

    def lost_commits(self) -> None:
        self.hit(OFFSET_COMMIT)

    def lost_fetches(self) -> None:
        self.hit(FETCH)

    def lost_heartbeats(self) -> None:
        if self.protocol != KIP_848:
            self.hit(HEARTBEAT)

    def hit(self, api: int) -> None:
        fault = self.random.choice([self.proxy.drop_api, self.proxy.cut_on_api])
        fault(api, on=self.random.choice(["request", "response"]), times=2)
        before = self.proxy.requests_hit[api]
        self.until(lambda: self.proxy.requests_hit[api] > before, f"a request of API {api} is hit")

    def kill_a_member(self) -> None:
        worker = self.alive.pop(self.random.randrange(len(self.alive)))
        worker.kill()
        self.start()

    def stop_a_member(self) -> None:
        worker = self.random.choice(self.alive)
        # Before that it is still importing, and ends as any Python program does.
        worker.wait_for_err("assigned:")
        self.alive.remove(worker)
        worker.send_signal(self.random.choice([signal.SIGTERM, signal.SIGINT]))
        self.start()
        self.has_ended(worker)

    def has_ended(self, worker: Worker) -> None:
        """It has ended in order. Its last commit may have met another fault, or a rebalance; then it says so."""
        code = worker.wait(30)
        assert code == 0 or "CommitError" in worker.err, worker.tail()

    def one_more_member(self) -> None:
        if len(self.alive) < 4:
            self.start()
        else:
            self.stop_a_member()

    def freeze_a_member(self) -> None:
        """SIGSTOP past its session: others take over, and what it does when it wakes up must not count."""
        worker = self.random.choice(self.alive)
        worker.send_signal(signal.SIGSTOP)
        self.pass_time(3)
        worker.send_signal(signal.SIGCONT)

    def kill_the_broker(self) -> None:
        self.kafka.kill()
        self.kafka.restart()

    def pause_the_broker(self) -> None:
        self.kafka.pause()
        self.pass_time(self.random.uniform(0.5, 3))
        self.kafka.resume()

    # --- how time passes

    def pass_time(self, seconds: float) -> None:
        time.sleep(seconds)  # the length of a fault, not a wait for something

    def handled(self) -> int:
        return sum(worker.count for worker in self.all)

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"not within 60 s: {what}\n" + "\n".join(w.tail() for w in self.alive)
            for worker in self.alive:
                assert worker.returncode is None, f"{worker.name} has ended by itself\n{worker.tail()}"
            time.sleep(0.02)

    def flow(self, seconds: float) -> None:
        """Traffic flows: as many records are handled as come in so many seconds."""
        wanted = self.handled() + int(RATE * seconds)
        self.until(lambda: self.handled() >= wanted, "records are handled")

    def run(self, faults: int) -> None:
        kinds = [
            self.cut, self.short_lives, self.black_hole, self.delay, self.lost_commits, self.lost_fetches,
            self.lost_heartbeats, self.kill_a_member, self.stop_a_member, self.one_more_member, self.freeze_a_member,
            self.pause_the_broker,
        ]  # fmt: skip
        with self.load:
            self.start()
            self.start()
            self.flow(1)
            for number in range(faults):
                # Each kind in turn, in another order each time; the broker is killed now and then.
                if number % len(kinds) == 0:
                    self.random.shuffle(kinds)
                kind = self.kill_the_broker if number % 25 == 24 else kinds[number % len(kinds)]
                kind()
                self.happened[kind.__name__] += 1
                heal(self.kafka)
                self.flow(0.3)  # by itself
            self.load.stop()
        wait_until_all_handled(self.load, *self.all)
        for worker in self.alive:
            worker.terminate()
            self.has_ended(worker)


def run(kafka: RealKafka, services: Services, topic: str, protocol: str, faults: int, seed: int) -> None:
    print(f"KEVEN_TEST_SEED={seed}")
    chaos = Chaos(kafka, services, topic, protocol, seed)
    chaos.run(faults)
    verdict = judge(chaos.load.acknowledged, chaos.all)
    print(f"{sum(chaos.happened.values())} faults: {dict(chaos.happened)}")
    print(f"{chaos.load.sent} sent, {verdict}")
    assert sum(chaos.happened.values()) == faults
    assert not verdict.lost, verdict
    assert not verdict.invented, verdict
    assert not verdict.disordered, verdict
    # Each fault can repeat what was handled since the last commit, in each partition.
    assert len(verdict.repeated) <= faults * RATE * 4, verdict


@pytest.mark.soak  # until it has passed ten times in a row on a loaded machine
def test_chaos(own_kafka: RealKafka, own_services: Services, own_make_topic: Callable[..., str]) -> None:
    topic = own_make_topic(PARTITIONS)
    own_services.group = topic
    seed = int(os.environ.get("KEVEN_TEST_SEED", "20250101"))
    run(own_kafka, own_services, topic, COOPERATIVE, 12, seed)


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
@PROTOCOLS
def test_long_chaos(
    own_kafka: RealKafka, own_services: Services, own_make_topic: Callable[..., str], protocol: str
) -> None:
    topic = own_make_topic(PARTITIONS)
    own_services.group = topic
    seed = int(os.environ.get("KEVEN_TEST_SEED", str(random.randrange(1 << 31))))
    run(own_kafka, own_services, topic, protocol, int(os.environ.get("KEVEN_TEST_FAULTS", "200")), seed)
