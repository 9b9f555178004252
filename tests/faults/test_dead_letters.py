"""Failing records under faults: each is handled or has its copy in the dead-letter topic before its offset moves on."""

from collections.abc import Callable

import pytest
from real_services import Load, Services, Worker, judge, origin, read_topic, wait_until

from keven_core.testing.proxy import FETCH, PRODUCE
from keven_core.testing.real_kafka import RealKafka

pytestmark = pytest.mark.real_kafka

EVERY = 5


def letters_of(kafka: RealKafka, topic: str) -> list[tuple[int, int]]:
    """(partition, offset) of the origin of each dead letter, in order."""
    return [origin(letter) for letter in read_topic(kafka.direct_bootstrap_servers, f"kafka_server.{topic}.dead")]


def cut_connections(kafka: RealKafka, worker: Worker) -> None:
    proxy = kafka.proxies[0]
    for _ in range(4):
        assert proxy.cut() > 0
        fetches = proxy.requests_seen[FETCH]
        worker.wait_for(lambda fetches=fetches: proxy.requests_seen[FETCH] > fetches, "it fetches again")
        worker.wait_for_more()


def lose_answers(kafka: RealKafka, worker: Worker) -> None:
    """The broker has written the copies, and the dead-letter producer never learns: it sends them again."""
    proxy = kafka.proxies[0]
    before = proxy.requests_hit[PRODUCE]
    proxy.cut_on_api(PRODUCE, on="response", times=3)
    worker.wait_for(lambda: proxy.requests_hit[PRODUCE] >= before + 3, "three answers are lost")
    worker.wait_for_more()


def kill_the_broker(kafka: RealKafka, worker: Worker) -> None:
    kafka.kill()
    kafka.restart()
    worker.wait_for_more(200)


@pytest.mark.parametrize(
    ("fault", "asynchronous"),
    [
        (cut_connections, False),
        (lose_answers, True),
        (kill_the_broker, False),
        pytest.param(cut_connections, True, marks=pytest.mark.soak),
        pytest.param(lose_answers, False, marks=pytest.mark.soak),
        pytest.param(kill_the_broker, True, marks=pytest.mark.soak),
    ],
)
def test_copies_survive(
    own_kafka: RealKafka,
    own_services: Services,
    own_topic: str,
    fault: Callable[[RealKafka, Worker], None],
    asynchronous: bool,
) -> None:
    with Load(own_kafka.direct_bootstrap_servers, own_topic, 4, rate=300) as load:
        worker = own_services.worker(
            "worker", fails_every=EVERY, asynchronous=asynchronous, rdkafka="reconnect.backoff.max.ms=500"
        )
        worker.wait_for_more(100)
        fault(own_kafka, worker)
        load.stop()
    check(own_kafka, own_topic, load, [worker], rewritten=fault is not lose_answers)


def test_copies_survive_kill_9_of_the_consumer(own_kafka: RealKafka, own_services: Services, own_topic: str) -> None:
    workers: list[Worker] = []
    with Load(own_kafka.direct_bootstrap_servers, own_topic, 4, rate=300) as load:
        for number in range(3):
            worker = own_services.worker(f"worker-{number}", fails_every=EVERY, work_s=0.001)
            workers.append(worker)
            worker.wait_for_count(100)
            worker.kill()
        load.stop()
    workers.append(own_services.worker("last", fails_every=EVERY))
    check(own_kafka, own_topic, load, workers, rewritten=True)


def check(kafka: RealKafka, topic: str, load: Load, workers: list[Worker], *, rewritten: bool) -> None:
    """`rewritten`: a copy may be there twice, since its record came again."""
    failing = {key for key, number in load.acknowledged.items() if number % EVERY == 0}
    handled = {key: number for key, number in load.acknowledged.items() if number % EVERY}
    wait_until(lambda: not judge(handled, workers).lost, "what can be handled is handled")
    wait_until(lambda: failing <= set(letters_of(kafka, topic)), "what fails is dead-lettered")
    workers[-1].stop()
    verdict = judge(handled, workers)
    assert not verdict.lost, verdict
    assert not verdict.invented, verdict
    assert not verdict.disordered, verdict
    letters = letters_of(kafka, topic)
    assert set(letters) == failing
    if not rewritten:
        assert len(letters) == len(failing)  # the producer is idempotent
