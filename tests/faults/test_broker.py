"""The broker dies, restarts or stands still under load."""

from typing import Any

import pytest
from real_services import (
    COOPERATIVE,
    EAGER,
    KIP_848,
    Load,
    Services,
    assert_delivered,
    wait_until,
    wait_until_all_handled,
)

from keven_core.testing.real_kafka import RealKafka

pytestmark = pytest.mark.real_kafka


@pytest.mark.parametrize(
    "protocol",
    [EAGER, pytest.param(COOPERATIVE, marks=pytest.mark.soak), pytest.param(KIP_848, marks=pytest.mark.soak)],
)
def test_kill_9_and_restart_of_the_broker_under_load(
    own_kafka: RealKafka, own_services: Services, own_topic: str, protocol: str
) -> None:
    options: dict[str, Any] = {"rdkafka": "reconnect.backoff.max.ms=500", "protocol": protocol}
    with Load(own_kafka.bootstrap_servers, own_topic, 4, rate=500) as load:
        worker = own_services.worker("worker", **options)
        worker.wait_for_more(200)
        pid, acknowledged = own_kafka.pids[1], load.acknowledged_count
        own_kafka.kill()
        assert own_kafka.pids == {}
        wait_until(lambda: load.sent > acknowledged + 200, "messages pile up meanwhile")
        own_kafka.restart()
        assert own_kafka.pids[1] != pid
        worker.wait_for_more(400)  # by itself
        load.stop()
        assert load.acknowledged_count > acknowledged
    wait_until_all_handled(load, worker)
    worker.stop()
    assert_delivered(load.acknowledged, worker, repeats=2000)


def test_a_broker_that_stands_still_for_a_while(own_kafka: RealKafka, own_services: Services, own_topic: str) -> None:
    with Load(own_kafka.bootstrap_servers, own_topic, 4, rate=500) as load:
        worker = own_services.worker("worker", rdkafka="socket.timeout.ms=3000")
        worker.wait_for_more(200)
        own_kafka.pause()
        acknowledged = load.acknowledged_count
        wait_until(lambda: load.sent > acknowledged + 2500, "messages pile up for 5 s")
        own_kafka.resume()
        worker.wait_for_more(2500)
        load.stop()
    wait_until_all_handled(load, worker)
    worker.stop()
    assert_delivered(load.acknowledged, worker, repeats=2000)
