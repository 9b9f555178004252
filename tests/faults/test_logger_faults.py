"""Loggers over broken connections and a restarted broker: what was acknowledged is there, once and in order."""

import re
import subprocess
import time
from typing import NamedTuple

import pytest
from real_services import Service, Services, read_topic

from keven_core.testing.proxy import PRODUCE
from keven_core.testing.real_kafka import RealKafka

pytestmark = pytest.mark.real_kafka

BATCH = """
import sys, threading
from keven_core.kafka import KafkaBatchLogger

logger = KafkaBatchLogger(topic=sys.argv[1], timeout=60)
ending = threading.Event()


def listen():
    sys.stdin.readline()
    ending.set()


threading.Thread(target=listen, daemon=True).start()
sent = 0
while not ending.wait(0.01):
    for _ in range(20):
        logger.log(b"%d" % sent, key=b"k")
        sent += 1
    print("sent", sent, logger.received_count, flush=True)
print("flushed", logger.flush(), "of", sent, flush=True)
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
    proxy = own_kafka.proxies[0]
    env = {"KEVEN_RDKAFKA_OPTIONS": "reconnect.backoff.max.ms=300"}
    service = own_services.run_script("logger", BATCH, own_topic, env=env, stdin=subprocess.PIPE)
    service.wait_for(lambda: received(service) > 100, "messages flow")
    if fault == "broker killed":
        own_kafka.kill()
        got = received(service)
        own_kafka.restart()
        service.wait_for(lambda: received(service) > got + 200, "it goes on by itself")
    else:
        for _ in range(4):
            hits = proxy.requests_hit[PRODUCE]
            if fault == "cuts":
                service.wait_for(lambda: proxy.cut() > 0, "a connection is cut")
            else:
                proxy.cut_on_api(PRODUCE, on="response", times=1)
                service.wait_for(lambda hits=hits: proxy.requests_hit[PRODUCE] > hits, "an answer is lost")
            got = received(service)
            service.wait_for(lambda got=got: received(service) > got + 200, "it goes on by itself")
    service.type("end")
    assert service.wait() == 0, service.tail()
    values = [int(message.value() or b"") for message in read_topic(own_kafka.direct_bootstrap_servers, own_topic)]
    # One key, so one partition: idempotence keeps the order, and nothing is there twice.
    assert values == list(range(len(values)))
    assert f"flushed {len(values)} of {len(values)}\n" in service.out


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


# --- heavy logging while the broker is gone --------------------------------------------------------------------------

MIB = 1 << 20
QUEUE_BYTES = 32 * MIB
MESSAGE_BYTES = 1024
COUNT = 90_000  # 88 MiB: much more than the queue takes

HEAVY = """
import os, sys, threading
from keven_core.kafka import KafkaBatchLogger

topic, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


logger = KafkaBatchLogger(topic=topic, timeout=150)
at_full_speed, ended = threading.Event(), threading.Event()
sent = 0


def report():
    while not ended.wait(0.1):
        # From another thread: log() may be waiting.
        print("at", sent, logger.received_count, peak(), flush=True)


def listen():
    sys.stdin.readline()
    at_full_speed.set()


threading.Thread(target=listen, daemon=True).start()
for sent in range(1, count + 1):
    # Nothing that compresses, and never the same bytes.
    logger.log(b"%010d" % (sent - 1) + os.urandom(size - 11), key=b"k")
    if sent == 1000:
        logger.flush()
        print("at rest", peak(), flush=True)
        threading.Thread(target=report, daemon=True).start()
    if sent % 200 == 0:
        at_full_speed.wait(0.02)
flushed = logger.flush()
ended.set()
print("flushed", flushed, "peak", peak(), flush=True)
"""


class At(NamedTuple):
    """Where a heavy logger is: messages taken by log(), and acknowledged."""

    sent: int
    received: int


def heavy_at(service: Service) -> At:
    found = re.findall(r"^at (\d+) (\d+) \d+\n", service.out, re.MULTILINE)
    return At(*map(int, found[-1])) if found else At(0, 0)


@pytest.mark.parametrize(
    ("fault", "seconds", "acks"),
    [
        ("swallowed", 4.0, "all"),
        pytest.param("swallowed", 15.0, "all", marks=pytest.mark.soak),
        ("killed", 0.0, "all"),
        pytest.param("swallowed", 0.0, "1", marks=pytest.mark.soak),
        pytest.param("held up", 15.0, "all", marks=pytest.mark.soak),
        pytest.param("swallowed", 60.0, "all", marks=[pytest.mark.soak, pytest.mark.timeout(300)]),
        pytest.param("held up", 60.0, "all", marks=[pytest.mark.soak, pytest.mark.timeout(300)]),
    ],
)
def test_heavy_logging_while_the_broker_is_gone(
    own_kafka: RealKafka, own_services: Services, own_topic: str, fault: str, seconds: float, acks: str
) -> None:
    """log() waits when the queue is full; memory stays within its bound; afterwards all is there, once and in order.

    Without idempotence what was under way may be there twice, and out of order.
    """
    proxy = own_kafka.proxies[0]
    env = {
        "KEVEN_LOG_QUEUE_BYTES": str(QUEUE_BYTES),
        "KEVEN_ACKS": acks,
        "KEVEN_RDKAFKA_OPTIONS": "reconnect.backoff.max.ms=500",
    }
    arguments = (own_topic, str(COUNT), str(MESSAGE_BYTES))
    service = own_services.run_script("logger", HEAVY, *arguments, env=env, stdin=subprocess.PIPE)
    service.wait_for(lambda: heavy_at(service).received > 2000, "messages flow")
    began, swallowed = time.monotonic(), proxy.bytes_swallowed
    if fault == "killed":
        own_kafka.kill()
    else:
        proxy.black_hole(swallow=fault == "swallowed")
    service.type("faster")

    # The queue fills up, and then log() waits.
    def is_full() -> bool:
        at = heavy_at(service)
        return at.sent - at.received >= QUEUE_BYTES // MESSAGE_BYTES - 1

    service.wait_for(is_full, "the queue is full")
    full = heavy_at(service)
    assert full.sent < COUNT
    lines = service.out.count("\nat ")
    service.wait_for(lambda: service.out.count("\nat ") >= lines + 10, "it waits for a second")
    service.wait_for(lambda: time.monotonic() - began >= seconds, "the broker is gone for some time", seconds + 10)
    waiting = heavy_at(service)
    assert waiting.sent <= full.sent + 1
    assert waiting.received <= full.received
    if fault == "killed":
        own_kafka.restart()
    else:
        assert proxy.bytes_swallowed > swallowed or fault != "swallowed"
        proxy.restore()
    service.wait_for(lambda: heavy_at(service).received > waiting.received, "it goes on by itself")
    assert service.wait(100) == 0, service.tail()
    assert f"flushed {COUNT} " in service.out
    messages = read_topic(own_kafka.direct_bootstrap_servers, own_topic)
    numbers = [int((message.value() or b"")[:10]) for message in messages]
    assert (numbers if acks == "all" else sorted(set(numbers))) == list(range(COUNT))
    at_rest, peak = (int(each) for each in re.findall(r"(?:at rest|peak) (\d+)", service.out))
    # Beside values: 400 bytes a message; requests under way (5 of 1 MB, copied; without idempotence they are kept to be
    # repeated as they are), the sockets' and the heap's own. A queue that is copied as a whole takes 32 MiB more.
    allowed = QUEUE_BYTES + QUEUE_BYTES // MESSAGE_BYTES * 400 + (24 if acks == "all" else 50) * MIB
    assert QUEUE_BYTES < (peak - at_rest) * 1024 < allowed, service.tail()


# --- many at once, while connections are cut -------------------------------------------------------------------------

MANY = """
import asyncio, itertools, sys, threading
from keven_core.kafka import KafkaBatchLogger, KafkaLogger

topic, way = sys.argv[1:]
numbers = itertools.count()
stopping = threading.Event()
acknowledged = 0


def listen():
    sys.stdin.readline()
    stopping.set()


def report():
    while not stopping.wait(0.02):
        print("acknowledged", acknowledged, flush=True)


async def alog():
    global acknowledged
    logger = KafkaLogger(topic=topic, timeout=60)

    async def one_after_the_other():
        global acknowledged
        while not stopping.is_set():
            await logger.alog(b"%d" % next(numbers))
            acknowledged += 1

    await asyncio.gather(*(one_after_the_other() for _ in range(1000)))


def log_many():
    global acknowledged
    logger = KafkaLogger(topic=topic, timeout=60)
    while not stopping.is_set():
        acknowledged += logger.log_many(b"%d" % number for number in itertools.islice(numbers, 500))


def in_threads(log, count):
    global acknowledged
    lock = threading.Lock()

    def run():
        global acknowledged
        while not stopping.is_set():
            log(b"%d" % next(numbers))
            with lock:
                acknowledged += 1

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def batches():
    # What is acknowledged is what flush() says; the threads log on meanwhile.
    global acknowledged
    logger = KafkaBatchLogger(topic=topic, timeout=60)

    def run():
        while not stopping.is_set():
            for _ in range(50):
                logger.log(b"%d" % next(numbers))
            logger.flush()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    while not stopping.wait(0.02):
        acknowledged = logger.received_count
    for thread in threads:
        thread.join()
    acknowledged = logger.flush()


threading.Thread(target=listen, daemon=True).start()
threading.Thread(target=report, daemon=True).start()
if way == "alog":
    asyncio.run(alog())
elif way == "log_many":
    log_many()
elif way == "threads":
    in_threads(KafkaLogger(topic=topic, timeout=60).log, 8)
else:
    batches()
print("all", acknowledged, next(numbers), flush=True)
"""


def acknowledged(service: Service) -> int:
    found = re.findall(r"^acknowledged (\d+)\n", service.out, re.MULTILINE)
    return int(found[-1]) if found else 0


@pytest.mark.parametrize("way", ["alog", "log_many", "threads", "batches"])
def test_many_at_once(own_kafka: RealKafka, own_services: Services, own_topic: str, way: str) -> None:
    """alog() with 1000 under way, log_many(), eight threads: everything arrives, once, while connections are cut."""
    proxy, cuts = own_kafka.proxies[0], 4
    env = {"KEVEN_RDKAFKA_OPTIONS": "reconnect.backoff.max.ms=300"}
    service = own_services.run_script("logger", MANY, own_topic, way, env=env, stdin=subprocess.PIPE)
    service.wait_for(lambda: acknowledged(service) > 1000, "messages flow")
    before = proxy.cut_connections
    for number in range(cuts):
        if number % 2:
            hits = proxy.requests_hit[PRODUCE]
            proxy.cut_on_api(PRODUCE, on="response", times=1)  # written, and nobody knows
            service.wait_for(lambda hits=hits: proxy.requests_hit[PRODUCE] > hits, "an answer is lost")
        else:
            service.wait_for(lambda: proxy.cut() > 0, "a connection is cut")
        got = acknowledged(service)
        service.wait_for(lambda got=got: acknowledged(service) > got + 200, "it goes on by itself")
    assert proxy.cut_connections >= before + cuts
    service.type("end")
    assert service.wait() == 0, service.tail()
    assert "Traceback" not in service.err, service.tail()
    delivered, taken = map(int, re.findall(r"^all (\d+) (\d+)$", service.out, re.MULTILINE)[0])
    assert delivered == taken
    values = [int(message.value() or b"") for message in read_topic(own_kafka.direct_bootstrap_servers, own_topic)]
    assert sorted(values) == list(range(taken))
