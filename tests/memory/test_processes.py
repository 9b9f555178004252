"""Whole processes: how they end, how they fork, and that nothing grows."""

import os
import sys

import pytest
from memory_support import run_child
from sanitized import SANITIZED, no_new_threads_in_a_forked_child

# --- the end of a process --------------------------------------------------------------------------------------------

ENDS = {
    "only imported": "import keven_core.kafka.events.server, keven_core._native.consumer, keven_core._native.producer",
    "everything closed": """
from memory_support import *
with EmbeddedKafka() as kafka:
    fill(kafka, "t", [value_of(i, LARGE) for i in range(5)])
    consumer = consumer_of(kafka, "t", table=table_of(lambda item: None))
    handle_all(consumer, 5)
    assert consumer.close(5000)
from keven_core._native.library import live_objects
assert not any(live_objects().values()), live_objects()
""",
    "a consumer left open": """
from memory_support import *
kafka = EmbeddedKafka().start()
fill(kafka, "t", [value_of(i, LARGE) for i in range(5)])
consumer = consumer_of(kafka, "t", table=table_of(lambda item: None))
fetch_some(consumer)
""",
    "a consumer in a cycle": """
from memory_support import *
kafka = EmbeddedKafka().start()
fill(kafka, "t", [value_of(i) for i in range(5)])
class Service:
    pass
service = Service()
service.me, service.kafka = service, kafka
service.consumer = consumer_of(kafka, "t", table=table_of(lambda item: service))
fetch_some(service.consumer)
""",
    "a value kept to the end": """
from memory_support import *
kept = []
with EmbeddedKafka() as kafka:
    fill(kafka, "t", [value_of(i, LARGE) for i in range(5)])
    consumer = consumer_of(kafka, "t", table=table_of(lambda item: kept.append(item.raw)))
    handle_all(consumer, 5)
    assert consumer.close(5000)
""",
    "a producer left open": """
from memory_support import *
producer, account = Producer({"bootstrap.servers": "127.0.0.1:1"}), DeliveryAccount()
producer.produce("t", b"x", account)
""",
    "loggers that are not closed": """
from memory_support import *
from keven_core.kafka import KafkaBatchLogger, KafkaLogger
kafka = EmbeddedKafka().start()
kafka.create_topic("logs")
KafkaLogger(topic="logs", settings=kafka.settings()).log(b"one")
batch = KafkaBatchLogger(topic="logs", settings=kafka.settings())
for number in range(1000):
    batch.log(b"%d" % number)
batch.flush()
""",
    "a server in a thread": """
from memory_support import *
from keven_core.kafka import KafkaConsumerServer
kafka = EmbeddedKafka().start()
fill(kafka, "t", [value_of(i) for i in range(5)])
seen = []
server = KafkaConsumerServer("t", client_id="s", runners=[seen.append], settings=kafka.settings(), start="earliest")
server.__enter__()
deadline = time.monotonic() + 30
while len(seen) < 5 and time.monotonic() < deadline:
    time.sleep(0.01)
assert len(seen) == 5
""",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_process_ends_with_nothing_to_say(end: str) -> None:
    result = run_child(ENDS[end])
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_messages_that_are_lost_at_the_end_are_told() -> None:
    result = run_child(
        "import keven_core.kafka._producers as producers\n"
        "from keven_core.kafka import KafkaBatchLogger, Settings\n"
        "producers._EXIT_FLUSH_S, producers._LOOK_UP_MS = 0.2, 100\n"
        "batch = KafkaBatchLogger(topic='t', settings=Settings(kafka_address='127.0.0.1:1'))\n"
        "for number in range(3):\n"
        "    batch.log(b'x')\n"
    )
    assert result.returncode == 0, result.stderr
    assert "keven_core: 3 message(s) could not be sent before the process ended" in result.stderr


# --- fork ------------------------------------------------------------------------------------------------------------

FORK = """
import os, sys, gc, traceback, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forking a process that has threads
from memory_support import *
from keven_core._native.library import live_objects
from keven_core.kafka.errors import ForkedProcessError, KevenError

def in_child(check, hard=True):
    '''Run `check` in a forked child; its exit code is 0 when it passed.'''
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            check()
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        if hard:
            os._exit(code)
        sys.exit(code)
    deadline = time.monotonic() + 30
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return "the child hung"
        time.sleep(0.005)

def refused(call):
    try:
        call()
    except ForkedProcessError as error:
        assert "os.fork()" in str(error), error
    else:
        raise AssertionError(f"not refused: {call}")

kafka = EmbeddedKafka().start()
fill(kafka, "t", [value_of(i, LARGE * (i % 2)) for i in range(40)])
kept = []
"""

FORKS = {
    "a consumer": """
def handle(item):
    kept.append(item.raw)

consumer = consumer_of(kafka, "t", table=table_of(handle), batch_size=10)
fetch_some(consumer)

def check():
    for call in (lambda: consumer.fetch(0), consumer.serve, lambda: consumer.commit(10), lambda: consumer.metadata(10),
                 lambda: consumer.subscribe(["t"]), lambda: consumer.wake_fd, lambda: consumer.close(10)):
        refused(call)
    consumer.wake()

assert in_child(check) == 0
consumer.run()
consumer.finish_batch()
handle_all(consumer, 40)
assert consumer.close(5000)
""",
    "a consumer that the child drops": """
consumer = consumer_of(kafka, "t", table=table_of(lambda item: kept.append(item.raw)), batch_size=10)
fetch_some(consumer)
consumer.run()

def check():
    global consumer
    del consumer
    kept.clear()
    gc.collect()

assert kept
assert in_child(check) == 0
assert in_child(check, hard=False) == 0
consumer.finish_batch()
handle_all(consumer, 40)
assert consumer.close(5000)
kept.clear()
""",
    "a value that the child reads": """
consumer = consumer_of(kafka, "t", table=table_of(lambda item: kept.append(item.raw)))
handle_all(consumer, 40)

def check():
    assert len(kept) == 40
    assert bytes(kept[1]) == b'"' + b"x" * LARGE + b'"'
    kept.pop()

assert in_child(check) == 0
assert bytes(kept[39]) == b'"' + b"x" * LARGE + b'"'
assert consumer.close(5000)
kept.clear()
""",
    "a producer": """
producer, account = Producer({"bootstrap.servers": kafka.bootstrap_servers}), DeliveryAccount()
producer.produce("t", b"before", account)

def check():
    for call in (lambda: producer.produce("t", b"x", account), producer.serve, lambda: producer.wait(account, 0),
                 lambda: producer.queued, lambda: producer.close(10), lambda: producer.set_token_failure("x")):
        refused(call)

assert in_child(check) == 0
producer.produce("t", b"after", account)
assert producer.wait(account, 20)
assert account.delivered == 2
producer.close(5000)
""",
    "a cluster": """
def check():
    refused(lambda: kafka.bootstrap_servers)
    refused(lambda: kafka.create_topic("other"))
    refused(kafka.stop)

assert in_child(check) == 0
kafka.create_topic("other")
""",
    "loggers": """
from keven_core.kafka import KafkaBatchLogger, KafkaLogger
single = KafkaLogger(topic="t", settings=kafka.settings())
batch = KafkaBatchLogger(topic="t", settings=kafka.settings())
single.log(b"in the parent")
batch.log(b"in the parent")

def check():
    # A producer of the child's own; what the parent had queued is the parent's.
    batch.log(b"in the child")
    assert batch.flush(20) == 1
    single.log(b"in the child")
    from keven_core.kafka._producers import close_producers
    close_producers(address)

address = kafka.bootstrap_servers
assert in_child(check) == 0
assert batch.flush(20) == 1
single.log(b"in the parent again")
""",
    "a running server": """
import threading
from keven_core.kafka import KafkaConsumerServer
seen = []
server = KafkaConsumerServer("t", client_id="s", runners=[seen.append], settings=kafka.settings(), start="earliest")
with server:
    deadline = time.monotonic() + 30
    while len(seen) < 40 and time.monotonic() < deadline:
        time.sleep(0.01)

    def check():
        refused(lambda: server._session.consumer.fetch(0))

    assert in_child(check) == 0
    assert in_child(lambda: None, hard=False) == 0
    with producer_of(kafka) as (producer, account):
        producer.produce("t", value_of(40), account)
        assert producer.wait(account, 20)
    while len(seen) < 41 and time.monotonic() < deadline:
        time.sleep(0.01)
assert len(seen) == 41
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork here")
@pytest.mark.parametrize(
    "what",
    [pytest.param(what, marks=no_new_threads_in_a_forked_child) if what == "loggers" else what for what in FORKS],
)
def test_a_forked_child_is_refused_and_the_parent_unharmed(what: str) -> None:
    result = run_child(FORK + FORKS[what] + "\nkafka.stop()\n")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


# --- nothing grows ---------------------------------------------------------------------------------------------------

measures_memory = pytest.mark.skipif(
    sys.platform != "linux" or SANITIZED,
    reason="reads /proc, and a sanitizer keeps freed memory",
)

GROWTH = """
import os, resource, sys
from memory_support import *
from keven_core._native.library import live_objects

def rss_kib():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() // 1024

def measure(round, rounds):
    '''KiB that each of the last two thirds of the rounds has added.'''
    for _ in range(rounds // 3):
        round()
    start, descriptors = rss_kib(), len(os.listdir("/proc/self/fd"))
    for _ in range(rounds - rounds // 3):
        round()
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) > descriptors:  # the cluster is told later that a client has hung up
        assert time.monotonic() < deadline, "file descriptors leak"
        time.sleep(0.02)
    return (rss_kib() - start) / (rounds - rounds // 3)

kafka = EmbeddedKafka().start()
fill(kafka, "t", [value_of(i, LARGE * (i % 5 == 0), ) for i in range(20)])
table = table_of(lambda item: None)
"""

ROUNDS = {
    "consumers": """
def round():
    consumer = consumer_of(kafka, "t", table=table)
    handle_all(consumer, 20)
    assert consumer.close(5000)
""",
    "producers": """
def round():
    producer, account = Producer({"bootstrap.servers": kafka.bootstrap_servers, "linger.ms": "0"}), DeliveryAccount()
    producer.produce("t", b"x" * 1000, account, key=b"k", headers=[("a", b"b")])
    assert producer.wait(account, 20)
    producer.close(5000)
""",
}


@measures_memory
@pytest.mark.parametrize("what", ROUNDS)
def test_opening_and_closing_300_times_does_not_grow(what: str) -> None:
    code = GROWTH + ROUNDS[what] + "grown = measure(round, 300)\nkafka.stop()\nprint(grown)\n"
    result = run_child(code + "assert not any(live_objects().values()), live_objects()\n", timeout_s=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    # A client that leaked would be 100 KiB and more, a batch 4 KiB; allocators are never quite still.
    assert float(result.stdout) < 10, f"{what}: {result.stdout.strip()} KiB a round"


STEADY = """
values = [value_of(i, 200) for i in range(2000)]
fill(kafka, "many", values)
failures = []
def handle(item):
    if item.number % 50 == 0:
        raise ValueError("now and then")
consumer = consumer_of(kafka, "many", table=table_of(handle), on_failure=lambda record, stage, error: None)
handled = [0]
def round():
    handled[0] += len(values)
    consumer.seek([("many", 0, 0)])
    handle_all(consumer, handled[0])
"""


@measures_memory
def test_handling_the_same_messages_again_and_again_does_not_grow() -> None:
    code = GROWTH + STEADY + "grown = measure(round, 60)\nconsumer.close(5000)\nkafka.stop()\nprint(grown)\n"
    result = run_child(code + "assert not any(live_objects().values()), live_objects()\n", timeout_s=120)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert float(result.stdout) < 40, f"{result.stdout.strip()} KiB for 2000 messages"
