"""KafkaBatchLogger with `spill_dir`: order, restarts, crashes, bounds and failures of what waits in files."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from builds import child_environment, run_python
from embedded_support import event, group_server, live, logged, numbered, quick, read, send, topics, values, wait_until
from sanitized import no_new_threads_in_a_forked_child

from keven_core.kafka import _producers
from keven_core.kafka._spilling import Spilling
from keven_core.kafka.abstracts.event_handler import event_handler
from keven_core.kafka.errors import (
    ClosedError,
    ConfigurationError,
    Delivery,
    DeliveryError,
    MessageTooLargeError,
    QueueFullError,
    UsageError,
)
from keven_core.kafka.logger import KafkaBatchLogger
from keven_core.kafka.spill import SpillFullError, SpillStore

# librdkafka logs each refused connection.
pytestmark = pytest.mark.logs_errors

MSG_SIZE_TOO_LARGE = 10
TOPIC_AUTHORIZATION_FAILED = 29


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spill"


@pytest.fixture
def make(embedded_kafka: Any, topic: str, folder: Path) -> Iterator[Callable[..., KafkaBatchLogger]]:
    """Loggers with a queue of five messages, closed after the test."""
    made: list[KafkaBatchLogger] = []

    def make_logger(timeout: float = 10, **options: Any) -> KafkaBatchLogger:
        names = {"on_delivery", "spill", "spill_dir"}
        changes = {name: value for name, value in options.items() if name not in names}
        given = {"spill_dir": folder, **{name: value for name, value in options.items() if name in names}}
        settings = quick(embedded_kafka, idempotence=False, **{"log_queue_messages": 5, **changes})
        made.append(KafkaBatchLogger(topic=topic, timeout=timeout, settings=settings, **given))
        return made[-1]

    yield make_logger
    for log in made:
        log.timeout = 0
        with suppress(DeliveryError):
            log.close()


def connected(log: KafkaBatchLogger) -> None:
    log.log(b"connected")
    log.flush()


def broken(log: KafkaBatchLogger) -> Any:
    """The producer of a logger, which gives up now: its producer id is said to be fenced."""
    client = log._client()
    assert client is not None
    client.trigger_fatal_error(47, "for the test")
    return client


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.spill"))


# --- overflow --------------------------------------------------------------------------------------------------------


def test_without_need_nothing_is_written(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger], folder: Path
) -> None:
    log = make(log_queue_messages=1000)
    for message in numbered(500):
        log.log(message)
    assert log.flush() == 500
    assert (log.spilled_count, files(folder)) == (0, [])
    assert values(embedded_kafka, topic) == numbered(500)


def test_what_the_queue_has_no_room_for_waits_in_files_and_follows_in_order(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger], folder: Path
) -> None:
    log = make()
    connected(log)
    embedded_kafka.broker_down()
    started = time.monotonic()
    for message in numbered(300):
        log.log(message)
    assert time.monotonic() - started < 5  # nothing waits for room
    assert (log.pending_count, log.spilled_count, log.produced_count) == (5, 295, 301)
    assert len(files(folder)) == 1
    embedded_kafka.broker_up()
    assert log.flush(30) == 301
    assert (log.pending_count, log.spilled_count) == (0, 0)
    assert values(embedded_kafka, topic) == [b"connected", *numbered(300)]


def test_order_holds_while_the_broker_comes_and_goes(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    log = make(log_queue_messages=20)
    connected(log)
    sent = 0
    for _ in range(3):
        embedded_kafka.broker_down()
        for _ in range(50):
            log.log(b"%d" % sent, key=b"k")
            sent += 1
        embedded_kafka.broker_up()
        # Before all is sent, and behind it.
        for _ in range(50):
            log.log(b"%d" % sent, key=b"k")
            sent += 1
        assert log.flush(30) == sent + 1
        log.log(b"%d" % sent, key=b"k")
        sent += 1
    log.flush()
    found = values(embedded_kafka, topic)
    assert found == [b"connected", *numbered(sent)]


def test_all_parts_of_a_message_survive_the_files(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    class Text(str): ...

    class Data(bytes): ...

    embedded_kafka.create_topic("other")
    log = make(spill="always")
    headers = [("a", b"1"), ("b", None), ("ä", b"")]
    log.log(b"x", key="k", headers=headers, timestamp_ms=1_234_567_890_123)
    log.log(None, key=b"gone")
    log.log(Data(b"sub"), key=Data(b"key"), headers={Text("h"): Data(b"v")})
    log.log(b"", topic=Text("other"))
    log.log(bytearray(b"array"), headers=[["pair", b"list"]])  # type: ignore[list-item]
    log.log("text ä")
    log.log(memoryview(b"a view")[2:])
    assert log.flush() == 7
    found = read(embedded_kafka, topic)
    assert [(entry.value, entry.key, entry.headers) for entry in found] == [
        (b"x", b"k", headers),
        (None, b"gone", []),
        (b"sub", b"key", [("h", b"v")]),
        (b"array", None, [("pair", b"list")]),
        ("text ä".encode(), None, []),
        (b"view", None, []),
    ]
    assert found[0].timestamp[1] == 1_234_567_890_123
    assert values(embedded_kafka, "other") == [b""]


@pytest.mark.parametrize("spill", ["overflow", "always"])
def test_what_the_broker_could_not_take_is_refused_before_it_is_written(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger], folder: Path, spill: str
) -> None:
    log = make(spill=spill, log_queue_messages=1)
    connected(log)
    embedded_kafka.broker_down()
    for message in numbered(3):
        log.log(message)
    wait_until(lambda: spill == "overflow" or log.pending_count == 0, "it is written")
    counts = (log.produced_count, log.spilled_count)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"headers": [("a", "text")]}, "header"),
        ({"headers": [("a",)]}, "header"),
        ({"headers": [(b"a", b"1")]}, "header"),
        ({"headers": 5}, "headers"),
        ({"headers": [("\ud800", b"1")]}, "valid Unicode"),
        ({"key": 5}, "key"),
        ({"key": "\ud800"}, "valid Unicode"),
        ({"timestamp_ms": -5}, "timestamp_ms"),
        ({"topic": "not a topic"}, "not a topic name"),
        ({"topic": ""}, "not a topic name"),
    ]
    for given, error in bad:
        with pytest.raises(UsageError, match=error):
            log.log(b"bad", **given)
    assert (log.produced_count, log.spilled_count) == counts
    embedded_kafka.broker_up()
    assert log.flush(30) == 4
    assert values(embedded_kafka, topic) == [b"connected", *numbered(3)]
    assert list(folder.glob("*.damaged")) == []


def test_a_message_that_is_too_large_is_refused_before_it_is_written(make: Callable[..., KafkaBatchLogger]) -> None:
    log = make(spill="always", max_message_bytes=2000)
    with pytest.raises(MessageTooLargeError, match="KEVEN_MAX_MESSAGE_BYTES"):
        log.log(b"x" * 3000)
    assert log.spilled_count == 0


def test_many_threads_keep_each_its_order(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    log = make(log_queue_messages=50)
    connected(log)

    def work(thread: int) -> None:
        for number in range(300):
            log.log(b"%d/%d" % (thread, number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    embedded_kafka.broker_down()
    for thread in threads:
        thread.join(30)
    embedded_kafka.broker_up()
    assert log.flush(30) == 1201
    found = [value or b"" for value in values(embedded_kafka, topic)][1:]
    assert len(found) == len(set(found)) == 1200
    for thread_number in range(4):
        mine = [int(value.split(b"/")[1]) for value in found if value.startswith(b"%d/" % thread_number)]
        assert mine == list(range(300))


# --- restarts --------------------------------------------------------------------------------------------------------


def test_close_without_a_broker_puts_what_was_in_memory_before_what_overflowed(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    log = make(timeout=0.3)
    connected(log)
    embedded_kafka.broker_down()
    for message in numbered(20):
        log.log(message, headers=[("n", message)])
    started = time.monotonic()
    log.close()  # everything is safe: no error
    assert 0.28 <= time.monotonic() - started < 5
    assert (log.pending_count, log.spilled_count) == (0, 20)
    with pytest.raises(ClosedError):
        log.log(b"x")
    embedded_kafka.broker_up()
    second = make()
    second.log(b"next")
    assert second.flush(30) == 1
    assert second.spilled_count == 0
    found = read(embedded_kafka, topic)
    assert [entry.value for entry in found] == [b"connected", *numbered(20), b"next"]
    assert [entry.header("n") for entry in found[1:-1]] == numbered(20)


def test_that_place_moves_on_when_messages_went_past_the_files_again(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger], folder: Path
) -> None:
    log = make(timeout=0.3)
    connected(log)
    embedded_kafka.broker_down()
    for message in numbered(10):
        log.log(message)
    embedded_kafka.broker_up()
    log.flush(30)
    embedded_kafka.broker_down()
    for message in numbered(10, start=10):
        log.log(message)
    assert (log.pending_count, log.spilled_count) == (5, 5)
    log.close()
    embedded_kafka.broker_up()
    second = make()
    second.log(b"next")
    second.flush(30)
    assert values(embedded_kafka, topic) == [b"connected", *numbered(20), b"next"]
    second.close()
    assert files(folder) == []


def test_what_was_under_way_from_the_files_stays_in_them(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    log = make(timeout=0.2, spill="always", log_queue_messages=1000)
    connected(log)
    embedded_kafka.broker_down()
    for message in numbered(100):
        log.log(message)
    log.close()
    assert log.spilled_count == 100
    embedded_kafka.broker_up()
    second = make()
    second.log(b"next")
    assert second.flush(30) == 1
    assert values(embedded_kafka, topic) == [b"connected", *numbered(100), b"next"]


def test_a_producer_of_a_closed_logger_is_forgotten(embedded_kafka: Any, make: Callable[..., KafkaBatchLogger]) -> None:
    before = set(_producers._producers.values())
    log = make()
    connected(log)
    [own] = set(_producers._producers.values()) - before
    log.close()
    assert own not in _producers._producers.values()
    assert own.client.closed
    log.close()


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import os, time, signal
from embedded_support import quick
from keven_core.kafka.config import Settings
from keven_core.kafka.errors import *
from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger
address, folder = sys.argv[2], sys.argv[3]
def settings(**changes):
    more = {"rdkafka_options": {"reconnect.backoff.max.ms": "100", "reconnect.backoff.ms": "10"}}
    return Settings(kafka_address=address, create_topics=False, idempotence=False, **{**more, **changes})
"""


def child(embedded_kafka: Any, folder: Path, code: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    here = str(Path(__file__).parent)
    return run_python("-c", CHILD + code, here, embedded_kafka.bootstrap_servers, str(folder), **options)


def test_the_end_of_the_process_puts_everything_in_order_too(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger], folder: Path
) -> None:
    embedded_kafka.broker_down()
    started = time.monotonic()
    done = child(
        embedded_kafka,
        folder,
        """
log = KafkaBatchLogger(topic="t", settings=settings(log_queue_messages=5), spill_dir=folder)
for number in range(20):
    log.log(b"%d" % number)
print(log.pending_count, log.spilled_count)
sys.exit(3)
""",
    )
    assert (done.returncode, done.stdout) == (3, "5 15\n"), done.stderr
    assert time.monotonic() - started < 15
    assert "no flush() asked" not in done.stderr
    assert "could not be sent" not in done.stderr
    embedded_kafka.broker_up()
    log = make()
    log.log(b"next")
    log.flush(30)
    assert values(embedded_kafka, topic) == [*numbered(20), b"next"]


def test_kill_9_costs_nothing_that_was_written_first(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger], folder: Path
) -> None:
    code = """
log = KafkaBatchLogger(topic="t", settings=settings(), spill_dir=folder, spill="always")
number = 0
while True:
    log.log(b"%d" % number)
    os.write(1, b"%d\\n" % number)
    number += 1
    time.sleep(0.0005)
"""
    here = str(Path(__file__).parent)
    arguments = [sys.executable, "-c", CHILD + code, here, embedded_kafka.bootstrap_servers, str(folder)]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=child_environment()
    ) as process:
        assert process.stdout is not None
        for _ in range(300):
            process.stdout.readline()
        embedded_kafka.broker_down()
        for _ in range(300):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        said = [line for line in process.stdout.read().splitlines() if line]
    assert process.returncode == -signal.SIGKILL
    last = int(said[-1]) if said else 599
    embedded_kafka.broker_up()
    log = make()
    log.log(b"next")
    log.flush(30)
    assert log.spilled_count == 0
    found = values(embedded_kafka, topic)
    assert found[-1] == b"next"
    numbers = [int(value or b"") for value in found[:-1]]
    assert set(range(last + 1)) <= set(numbers)
    # Twice only what was not noted as settled, and in order each time.
    firsts = list(dict.fromkeys(numbers))
    assert firsts == sorted(firsts)


@no_new_threads_in_a_forked_child
def test_a_forked_child_has_files_of_its_own(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger], folder: Path
) -> None:
    embedded_kafka.broker_down()
    done = child(
        embedded_kafka,
        folder,
        """
log = KafkaBatchLogger(topic="t", timeout=0.3, settings=settings(log_queue_messages=2), spill_dir=folder)
for number in range(6):
    log.log(b"parent %d" % number)
from keven_core.kafka import logger
logger._spill_lock.acquire()  # as a thread that does not come along
pid = os.fork()
if pid == 0:
    assert log.spilled_count == 0
    for number in range(6):
        log.log(b"child %d" % number)
    assert (log.pending_count, log.spilled_count) == (2, 4), (log.pending_count, log.spilled_count)
    log.close()
    os._exit(0)
logger._spill_lock.release()
_, status = os.waitpid(pid, 0)
assert status == 0, status
assert (log.pending_count, log.spilled_count) == (2, 4)
log.close()
print("done")
""",
        timeout_s=30,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    embedded_kafka.broker_up()
    log = make(log_queue_messages=100)
    log.log(b"next")
    log.flush(30)
    found = [value or b"" for value in values(embedded_kafka, topic)]
    assert len(found) == 13
    for name in (b"parent", b"child"):
        assert [value for value in found if value.startswith(name)] == [b"%s %d" % (name, n) for n in range(6)]


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spill", ["overflow", "always"])
def test_what_the_broker_refuses_for_good_is_handed_back(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger], spill: str
) -> None:
    told: list[Delivery] = []
    log = make(spill=spill, on_delivery=told.extend, log_queue_messages=100)
    connected(log)
    embedded_kafka.push_errors("Produce", [MSG_SIZE_TOO_LARGE])
    with logged() as lines:
        log.log(b"refused", key="k", headers=[("a", b"1")], timestamp_ms=1_234_567_890_123)
        with pytest.raises(DeliveryError) as caught:
            log.flush()
    [entry] = caught.value.failures
    assert (caught.value.failed_count, caught.value.name) == (1, "MSG_SIZE_TOO_LARGE")
    assert (entry.topic, entry.value, entry.key, entry.outcome) == ("t", b"refused", b"k", "not delivered")
    assert (entry.headers, entry.timestamp_ms) == ([("a", b"1")], 1_234_567_890_123)
    assert any("1 message(s) for t" in line and "not delivered" in line for line in lines)
    assert log.spilled_count == 0
    log.log(b"and on")
    assert log.flush() == 2
    assert values(embedded_kafka, topic) == [b"connected", b"and on"]
    wait_until(lambda: len(told) == 3, "on_delivery is told of all")
    assert sorted((entry.value or b"", entry.error is None) for entry in told) == [
        (b"and on", True),
        (b"connected", True),
        (b"refused", False),
    ]


def test_flush_counts_all_failures_of_spilled_messages_and_keeps_ten(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    embedded_kafka.create_topic("good")
    embedded_kafka.set_topic_error(topic, TOPIC_AUTHORIZATION_FAILED)
    log = make(spill="always", log_queue_messages=100)
    for message in numbered(30):
        log.log(message)
        log.log(message, topic="good")
    with pytest.raises(DeliveryError, match="30 messages were not delivered") as caught:
        log.flush()
    assert caught.value.failed_count == 30
    assert [entry.value for entry in caught.value.failures] == numbered(10)
    assert log.flush() == 30
    assert values(embedded_kafka, "good") == numbered(30)
    assert log.spilled_count == 0


def test_a_record_from_the_files_that_has_become_too_large_is_handed_back(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    told: list[Delivery] = []
    first = make(timeout=0.2, spill="always")
    connected(first)
    embedded_kafka.broker_down()
    first.log(b"x" * 3000)
    first.log(b"small")
    first.close()
    embedded_kafka.broker_up()
    second = make(max_message_bytes=2000, on_delivery=told.extend)
    second.log(b"next")
    with pytest.raises(DeliveryError) as caught:
        second.flush(30)
    assert [entry.value for entry in caught.value.failures] == [b"x" * 3000]
    assert second.spilled_count == 0
    assert values(embedded_kafka, topic) == [b"connected", b"small", b"next"]
    wait_until(lambda: len(told) == 3, "on_delivery is told of all")


def test_on_delivery_is_not_told_of_what_is_sent_again(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    told: list[Delivery] = []
    log = make(timeout=0.2, on_delivery=told.extend)
    connected(log)
    wait_until(lambda: len(told) == 1, "the first")
    embedded_kafka.broker_down()
    for message in numbered(10):
        log.log(message)
    log.close()
    assert len(told) == 1
    embedded_kafka.broker_up()
    second = make(on_delivery=told.extend)
    second.log(b"next")
    second.flush(30)
    wait_until(lambda: len(told) == 12, "the rest")
    assert [entry.value for entry in told] == [b"connected", *numbered(10), b"next"]
    assert all(entry.error is None for entry in told)


def test_a_fatal_error_costs_no_message_and_no_order(embedded_kafka: Any, topic: str, folder: Path) -> None:
    settings = quick(embedded_kafka, log_queue_messages=5)
    log = KafkaBatchLogger(topic=topic, timeout=20, settings=settings, spill_dir=folder)
    with log:
        connected(log)
        embedded_kafka.broker_down()
        for message in numbered(10):
            log.log(message, headers=[("n", message)], timestamp_ms=1_700_000_000_000)
        client = broken(log)
        wait_until(lambda: client.fatal or client.closed, "the error is noticed")
        log.log(b"10")
        # What came back is in the files; the last one is too, or has gone past them to the next producer.
        wait_until(lambda: log.spilled_count >= 10 and log.pending_count + log.spilled_count == 11, "all are there")
        embedded_kafka.broker_up()
        log.log(b"11")
        assert log.flush(30) == 13
        assert (log.produced_count, log.pending_count, log.spilled_count) == (13, 0, 0)
        log.log(b"12")  # past the files again
        wait_until(lambda: log.received_count == 14, "the last one")
    found = read(embedded_kafka, topic)
    assert [entry.value for entry in found] == [b"connected", *numbered(13)]
    assert [entry.header("n") for entry in found[1:11]] == numbered(10)
    assert files(folder) == []


def test_a_producer_that_gives_up_is_noticed_without_another_message(
    embedded_kafka: Any, topic: str, folder: Path
) -> None:
    log = KafkaBatchLogger(topic=topic, timeout=20, settings=quick(embedded_kafka), spill_dir=folder)
    with log:
        connected(log)
        embedded_kafka.broker_down()
        for message in numbered(10):
            log.log(message)
        broken(log)
        embedded_kafka.broker_up()
        assert log.flush(30) == 11
    assert values(embedded_kafka, topic) == [b"connected", *numbered(10)]


def test_close_after_a_fatal_error_leaves_all_in_order(embedded_kafka: Any, topic: str, folder: Path) -> None:
    settings = quick(embedded_kafka, log_queue_messages=5)
    log = KafkaBatchLogger(topic=topic, timeout=0.2, settings=settings, spill_dir=folder)
    connected(log)
    embedded_kafka.broker_down()
    for message in numbered(10):
        log.log(message)
    broken(log)
    log.log(b"10")
    log.close()
    assert (log.pending_count, log.spilled_count) == (0, 11)
    embedded_kafka.broker_up()
    with KafkaBatchLogger(topic=topic, timeout=20, settings=settings, spill_dir=folder) as second:
        second.log(b"next")
        second.flush()
    assert values(embedded_kafka, topic) == [b"connected", *numbered(11), b"next"]


@pytest.mark.parametrize("spill", ["overflow", "always"])
def test_order_holds_through_fatal_errors_under_load(
    embedded_kafka: Any, topic: str, folder: Path, spill: Literal["overflow", "always"]
) -> None:
    settings = quick(embedded_kafka, log_queue_messages=200)
    log = KafkaBatchLogger(topic=topic, timeout=30, settings=settings, spill_dir=folder, spill=spill)
    ended = threading.Event()
    sent = 0

    def write() -> None:
        nonlocal sent
        while not ended.is_set():
            log.log(b"%d" % sent)
            sent += 1
            if sent % 500 == 0:
                time.sleep(0.005)  # so that messages go past the files now and then

    with log:
        connected(log)
        writer = threading.Thread(target=write)
        writer.start()
        for _ in range(8):
            time.sleep(0.15)  # for messages to be under way
            wait_until(partial(getattr, broken(log), "closed"), "the producer is replaced")
        ended.set()
        writer.join()
        log.flush(60)
        assert (log.pending_count, log.spilled_count) == (0, 0)
        assert log.produced_count == log.received_count == sent + 1
    # What was under way at a producer that gave up may have arrived, and comes once more.
    first = list(dict.fromkeys(values(embedded_kafka, topic)))
    assert first == [b"connected", *numbered(sent)]


def test_a_callback_that_raises_is_logged_and_nothing_else(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    def broken(deliveries: list[Delivery]) -> None:
        raise ZeroDivisionError

    log = make(on_delivery=broken)
    with logged() as lines:
        connected(log)
        wait_until(lambda: any("on_delivery of a logger failed" in line for line in lines), "it is logged")
        embedded_kafka.broker_down()
        log.log(b"x")
        log.timeout = 0.1
        log.close()
    assert log.spilled_count == 1


# --- bounds and settings ---------------------------------------------------------------------------------------------


def test_files_that_are_full_refuse_the_message(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger], folder: Path
) -> None:
    log = make(spill_bytes=64 << 10)
    connected(log)
    embedded_kafka.broker_down()
    taken = 0

    def fill() -> None:
        nonlocal taken
        while taken < 1000:
            log.log(b"%d" % taken + b"x" * 1000)
            taken += 1

    with pytest.raises(SpillFullError, match="KEVEN_SPILL_BYTES=65536"):
        fill()
    assert 50 < taken < 70
    assert (log.produced_count, log.spilled_count) == (taken + 1, taken - 5)
    assert sum(path.stat().st_size for path in files(folder)) <= 64 << 10
    with pytest.raises(QueueFullError):
        log.log(b"x" * 1000)
    embedded_kafka.broker_up()
    assert log.flush(30) == taken + 1
    log.log(b"room again")
    log.flush()
    found = values(embedded_kafka, topic)
    assert [value[:2].strip(b"x") for value in found[1:-1] if value] == numbered(taken)


def test_close_tells_what_the_full_files_did_not_take(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    told: list[Delivery] = []
    log = make(timeout=0.2, spill_bytes=64 << 10, log_queue_messages=3, on_delivery=told.extend)
    connected(log)
    embedded_kafka.broker_down()
    for number in range(3):
        log.log(b"%d" % number + b"x" * 20_000)
    with suppress(SpillFullError):
        while True:
            log.log(b"y" * 7_000)
    with pytest.raises(DeliveryError) as caught:
        log.close()
    assert [entry.value for entry in caught.value.failures] == [b"%d" % n + b"x" * 20_000 for n in range(3)]
    wait_until(lambda: len(told) == 4, "on_delivery is told too")
    embedded_kafka.broker_up()


@pytest.mark.parametrize("fsync", ["never", "always"])
def test_fsync_is_what_the_settings_say(
    make: Callable[..., KafkaBatchLogger], monkeypatch: pytest.MonkeyPatch, fsync: str
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    log = make(spill="always", spill_fsync=fsync)
    log.log(b"first")
    before = len(synced)
    for message in numbered(5):
        log.log(message)
    assert len(synced) - before == (5 if fsync == "always" else 0)
    log.flush()


def test_the_settings_come_from_the_environment(
    embedded_kafka: Any, topic: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[SpillStore] = []
    original = SpillStore.__init__

    def init(self: SpillStore, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(SpillStore, "__init__", init)
    monkeypatch.setenv("KAFKA", embedded_kafka.bootstrap_servers)
    monkeypatch.setenv("KEVEN_CREATE_TOPICS", "false")
    monkeypatch.setenv("KEVEN_IDEMPOTENCE", "false")
    monkeypatch.setenv("KEVEN_SPILL_BYTES", "1000000")
    monkeypatch.setenv("KEVEN_SPILL_FSYNC", "interval")
    with KafkaBatchLogger(topic=topic, spill_dir=folder) as log:
        log.log(b"x")
        [store] = made
        assert (store.max_bytes, store._fsync) == (1_000_000, "interval")


def test_arguments_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="spill_dir and on_full"):
        KafkaBatchLogger(topic="t", spill_dir=tmp_path, on_full="drop")
    with pytest.raises(ConfigurationError, match="spill='sometimes'"):
        KafkaBatchLogger(topic="t", spill_dir=tmp_path, spill="sometimes")  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    log = KafkaBatchLogger("127.0.0.1:1", topic="t", spill_dir=tmp_path / "file")
    with pytest.raises(ConfigurationError, match="it is not a folder"):
        log.log(b"x")


# --- handlers, and the library's own log -----------------------------------------------------------------------------


def test_what_handlers_write_goes_past_the_files(
    embedded_kafka: Any, handler_registry: Any, topic: str, make: Callable[..., KafkaBatchLogger]
) -> None:
    topics(embedded_kafka, "in")
    log = make(spill="always", log_queue_messages=1000)
    spilled: list[int] = []

    @event_handler("COPY")
    def copy(event: Any) -> None:
        log.log(b"%d" % event.number)
        spilled.append(log.spilled_count)

    with live(group_server(embedded_kafka, "in", settings=quick(embedded_kafka, idempotence=False))):
        send(embedded_kafka, "in", *(event("COPY", number=number) for number in range(10)))
        wait_until(lambda: len(spilled) == 10, "they are handled")
    assert spilled == [0] * 10
    assert values(embedded_kafka, topic) == numbered(10)


def test_a_warning_of_the_store_may_be_logged_to_the_same_logger(
    embedded_kafka: Any, topic: str, make: Callable[..., KafkaBatchLogger], folder: Path
) -> None:
    first = make(timeout=0.2, spill="always")
    connected(first)
    embedded_kafka.broker_down()
    for message in numbered(3):
        first.log(message)
    first.close()
    [path] = files(folder)
    data = bytearray(path.read_bytes())
    data[-2] ^= 255
    path.write_bytes(data)
    embedded_kafka.broker_up()
    log = make(spill="always")

    class ToKafka(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "is damaged" in record.getMessage():
                log.log(b"warned")

    handler = ToKafka()
    logging.getLogger("keven_core").addHandler(handler)
    try:
        log.log(b"next")
        wait_until(lambda: log.spilled_count == 0, "all is sent")
        log.flush(30)
    finally:
        logging.getLogger("keven_core").removeHandler(handler)
    found = values(embedded_kafka, topic)
    assert found[:3] == [b"connected", *numbered(2)]
    assert sorted(found[3:], key=str) == [b"next", b"warned"]


def test_the_thread_ends_with_the_logger(make: Callable[..., KafkaBatchLogger]) -> None:
    log = make()
    connected(log)
    [spilling] = log._spilling.values()
    assert isinstance(spilling, Spilling)
    assert spilling._thread.is_alive()
    log.close()
    assert not spilling._thread.is_alive()
