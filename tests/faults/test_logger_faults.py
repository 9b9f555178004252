"""Loggers over broken connections and a restarted broker: what was acknowledged is there, once and in order."""

import re

import pytest
from real_services import Service, Services, read_topic

from keven_core.testing.proxy import PRODUCE
from keven_core.testing.real_kafka import RealKafka

pytestmark = pytest.mark.real_kafka

BATCH = """
import sys, time
from keven_core.kafka import KafkaBatchLogger

logger = KafkaBatchLogger(topic=sys.argv[1], timeout=60)
logger.log(b"0", key=b"k")
logger.flush()
print("first", flush=True)
sent = 1
while not sys.stdin.closed:
    for _ in range(20):
        logger.log(b"%d" % sent, key=b"k")
        sent += 1
    time.sleep(0.01)
    if sent >= int(sys.argv[2]):
        break
    print("sent", sent, logger.received_count, flush=True)
print("flushed", logger.flush(), flush=True)
"""

SINGLE = """
import sys
from keven_core.kafka import KafkaLogger
from keven_core.kafka.errors import KafkaError

logger = KafkaLogger(topic=sys.argv[1], timeout=60)
for number in range(int(sys.argv[2])):
    try:
        logger.log(b"%d" % number)
        print("ok", number, flush=True)
    except KafkaError as error:
        print("failed", number, type(error).__name__, flush=True)
print("flushed", flush=True)
"""


def received(service: Service) -> int:
    found = re.findall(r"^sent \d+ (\d+)\n", service.out, re.MULTILINE)  # the last line may still be on its way
    return int(found[-1]) if found else 0


@pytest.mark.parametrize("fault", ["cuts", "lost answers", "broker killed"])
def test_a_batch_logger(own_kafka: RealKafka, own_services: Services, own_topic: str, fault: str) -> None:
    proxy, count = own_kafka.proxies[0], 6000
    env = {"KEVEN_RDKAFKA_OPTIONS": "reconnect.backoff.max.ms=300"}
    service = own_services.run_script("logger", BATCH, own_topic, str(count), env=env)
    service.wait_for(lambda: received(service) > 100, "messages flow")
    before = received(service)
    if fault == "broker killed":
        own_kafka.kill()
        own_kafka.restart()
    else:
        for _ in range(4):
            hits = proxy.requests_hit[PRODUCE]
            if fault == "cuts":
                service.wait_for(lambda: proxy.cut() > 0, "a connection is cut")
            else:
                proxy.cut_on_api(PRODUCE, on="response", times=1)
                service.wait_for(lambda hits=hits: proxy.requests_hit[PRODUCE] > hits, "an answer is lost")
            got = received(service)
            service.wait_for(
                lambda got=got: "flushed" in service.out or received(service) > got, "it goes on by itself"
            )
    assert service.wait() == 0, service.tail()
    assert before < count
    values = [int(message.value() or b"") for message in read_topic(own_kafka.direct_bootstrap_servers, own_topic)]
    # One key, so one partition: idempotence keeps the order, and nothing is there twice.
    assert values == list(range(len(values)))
    assert f"flushed {len(values)}" in service.out
    assert len(values) >= count


@pytest.mark.parametrize("fault", ["cuts", pytest.param("broker killed", marks=pytest.mark.soak)])
def test_a_logger_knows_what_arrived(own_kafka: RealKafka, own_services: Services, own_topic: str, fault: str) -> None:
    proxy, count = own_kafka.proxies[0], 400
    env = {"KEVEN_RDKAFKA_OPTIONS": "reconnect.backoff.max.ms=300"}
    service = own_services.run_script("logger", SINGLE, own_topic, str(count), env=env)
    service.wait_for(lambda: "ok 50" in service.out, "messages flow")
    if fault == "cuts":
        for _ in range(4):
            proxy.cut()
            seen = proxy.requests_seen[PRODUCE]
            service.wait_for(
                lambda seen=seen: "flushed" in service.out or proxy.requests_seen[PRODUCE] > seen,
                "it goes on by itself",
            )
    else:
        own_kafka.kill()
        own_kafka.restart()
    assert service.wait(120) == 0, service.tail()
    assert "failed" not in service.out
    values = [int(message.value() or b"") for message in read_topic(own_kafka.direct_bootstrap_servers, own_topic)]
    assert sorted(values) == list(range(count))
