"""kill -9 of the consumer under load, again and again; and the proof that the oracle finds what it is there for."""

import pytest
from real_services import KIP_848, Load, Services, Worker, assert_delivered, judge, wait_until, wait_until_all_handled

from keven_core.testing.real_kafka import RealKafka

pytestmark = pytest.mark.real_kafka

KILLS = 3

# The mistake that the oracle has to find: offsets are committed first, and the handlers run afterwards.
COMMITS_FIRST = """
from keven_core._native import consumer as module

waiting = []

class WrongWayRound:
    def __init__(self, *args, **kwargs):
        self._consumer = RealConsumer(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._consumer, name)

    def run(self):
        self._consumer.run()
        self._consumer.finish_batch()
        self._consumer.commit(5000)
        while waiting:
            time.sleep(work_s)
            note(*waiting.pop(0))

def put_off(self, event):
    waiting.append((event, current_record()))

RealConsumer, module.Consumer = module.Consumer, WrongWayRound
Handler.handle_event = put_off
"""


def killed_under_load(
    kafka: RealKafka, services: Services, topic: str, *, planted: str = "", protocol: str = ""
) -> tuple[Load, list[Worker]]:
    """Kill the only consumer some times in the middle of its work, and let a last one handle the rest."""
    workers = []
    with Load(kafka.direct_bootstrap_servers, topic, 4, rate=500) as load:
        for kill in range(KILLS):
            worker = services.worker(f"victim-{kill}", work_s=0.001, planted=planted, protocol=protocol)
            workers.append(worker)
            worker.wait_for_count(150)
            sent = load.acknowledged_count
            worker.kill()
            # The fault happened while traffic flowed.
            assert worker.count >= 150
            assert worker.returncode == -9
            wait_until(lambda sent=sent: load.acknowledged_count > sent, "messages are sent on")
        load.stop()
    last = services.worker("last", planted=planted, protocol=protocol)
    if not planted:
        wait_until_all_handled(load, *workers, last)
    else:
        last.wait_for(lambda: last.handled and last.handled[-1].number >= load.sent - 4, "the last has come to the end")
    last.stop()
    return load, [*workers, last]


@pytest.mark.parametrize("protocol", ["", KIP_848], ids=["classic", "kip-848"])
def test_kill_9_loses_nothing(own_kafka: RealKafka, own_services: Services, own_topic: str, protocol: str) -> None:
    load, workers = killed_under_load(own_kafka, own_services, own_topic, protocol=protocol)
    assert_delivered(load.acknowledged, *workers, repeats=None)


def test_the_oracle_finds_a_commit_before_the_handler(
    own_kafka: RealKafka, own_services: Services, own_topic: str
) -> None:
    load, workers = killed_under_load(own_kafka, own_services, own_topic, planted=COMMITS_FIRST)
    verdict = judge(load.acknowledged, workers)
    assert verdict.lost, f"the oracle is blind: {verdict}"
    with pytest.raises(AssertionError, match="lost"):
        assert_delivered(load.acknowledged, *workers, repeats=None)
