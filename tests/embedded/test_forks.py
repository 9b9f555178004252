"""Loggers across os.fork(): the child has producers of its own, which work whatever the parent's threads were doing."""

from typing import Any

import pytest
from embedded_support import logging_process, values
from sanitized import no_new_threads_in_a_forked_child

pytestmark = no_new_threads_in_a_forked_child


def test_a_forked_child_has_a_producer_of_its_own(embedded_kafka: Any, topic: str) -> None:
    done = logging_process(
        embedded_kafka,
        """
import asyncio
log, single = KafkaBatchLogger(topic="t", settings=settings()), KafkaLogger(topic="t", settings=settings())
log.log(b"parent 1")
single.log(b"parent 2")
asyncio.run(single.alog(b"parent 3"))
log.flush()
log.log(b"parent 4")
pid = os.fork()
if pid == 0:
    assert (log.produced_count, log.pending_count) == (0, 0)
    log.log(b"child 1")
    single.log(b"child 2")
    asyncio.run(single.alog(b"child 3"))
    assert single.log_many([b"child 4"]) == 1
    assert log.flush() == 1, log.received_count
    sys.exit(5)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 5, status
log.log(b"parent 5")
assert log.flush() == 3
print("done")
""",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    found = values(embedded_kafka, topic)
    wanted = [b"%s %d" % (who, n) for who, count in ((b"parent", 5), (b"child", 4)) for n in range(1, count + 1)]
    assert sorted(value or b"" for value in found) == sorted(wanted)


def test_a_fork_while_threads_log(embedded_kafka: Any, topic: str) -> None:
    done = logging_process(
        embedded_kafka,
        """
import threading
log = KafkaBatchLogger(topic="t", settings=settings())
# A fork in the middle of an import leaves the module locked in the child, by Python's own lock.
log.log(b"connected")
log.flush()
stop = threading.Event()
counts = []
def work(name):
    count = 0
    while not stop.is_set():
        log.log(b"%d/%d" % (name, count))
        count += 1
        if count % 20 == 0:
            time.sleep(0.002)  # paced: of a partition the embedded broker keeps only 5 MB, and all is counted
    counts.append(count)
threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
for thread in threads:
    thread.start()
for number in range(5):
    pid = os.fork()
    if pid == 0:
        log.log(b"child %d" % number)
        os._exit(0 if log.flush() == 1 else 1)
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
assert log.flush() == sum(counts) + 1
print(sum(counts))
""",
        timeout_s=30,
    )
    assert done.returncode == 0, done.stderr
    found = values(embedded_kafka, topic)
    assert len(found) == len(set(found)) == int(done.stdout) + 6


def test_a_fork_while_clients_connect(embedded_kafka: Any, topic: str) -> None:
    """A lock that a thread of librdkafka held would stay locked in the child: in glibc's lookups, or in OpenSSL."""
    done = logging_process(
        embedded_kafka,
        """
import signal
for number in range(20):
    # By its settings each has a producer of its own, which connects when the first message comes.
    log = KafkaBatchLogger(topic="t", settings=settings(linger_ms=number))
    log.log(b"parent %d" % number)
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        log.log(b"child %d" % number)
        os._exit(0 if log.flush() == 1 else 1)
    assert os.waitpid(pid, 0)[1] == 0, number
    assert log.flush() == 1
""",
    )
    assert (done.returncode, done.stderr) == (0, "")
    wanted = [b"%s %d" % (who, n) for who in (b"parent", b"child") for n in range(20)]
    assert sorted(value or b"" for value in values(embedded_kafka, topic)) == sorted(wanted)


def test_a_child_that_can_not_look_names_up_ends(embedded_kafka: Any, topic: str) -> None:
    """Forked while another thread of the application looks a name up, glibc leaves lookups locked in the child."""
    done = logging_process(
        embedded_kafka,
        """
import logging, signal, socket, threading
logging.disable()
def look_up():
    while True:
        socket.getaddrinfo("localhost", 9092, flags=socket.AI_ADDRCONFIG)
for _ in range(2):
    threading.Thread(target=look_up, daemon=True).start()
log = KafkaBatchLogger(topic="t", settings=settings())
for number in range(50):
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        signal.alarm(40)
        log.log(b"stuck")
        sys.exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    if time.monotonic() - started > 4:
        break
print(time.monotonic() - started)
os._exit(0)
""",
    )
    assert done.returncode == 0, done.stderr
    if not done.stderr:
        pytest.skip("no child was left without lookups: this C library has no such lock, or chance has it")
    assert done.stderr == "keven_core: 1 message(s) could not be sent before the process ended\n"
    assert float(done.stdout) < 20
