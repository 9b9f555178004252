"""Handlers that take their time: a batch in hand must neither hold up the server's end nor its group membership."""

import signal
import time
from typing import Any

import pytest
from real_services import Services, assert_delivered, committed, load_value, members_of, send, wait_until

pytestmark = pytest.mark.real_kafka

BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@BOTH
def test_sigterm_is_heeded_within_the_deadline(kafka: Any, services: Services, topic: str, asynchronous: bool) -> None:
    send(kafka.bootstrap_servers, topic, [load_value(number) for number in range(400)], partition=0)
    worker = services.worker("worker", work_s=0.1, asynchronous=asynchronous, env={"KEVEN_DRAIN_TIMEOUT_MS": "2000"})
    worker.wait_for_count(10)
    began = time.monotonic()
    worker.stop(signal.SIGTERM, timeout_s=60)
    assert time.monotonic() - began < 6, worker.tail()
    # What was handled is committed, and what is left comes to the next one.
    assert committed(kafka.bootstrap_servers, topic) == {0: worker.count}
    assert worker.count < 200


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["sync", "async"])
def test_a_batch_may_take_longer_than_max_poll_interval(
    kafka: Any, services: Services, topic: str, asynchronous: bool
) -> None:
    count = 150
    send(kafka.bootstrap_servers, topic, [load_value(number) for number in range(count)], partition=0)
    worker = services.worker("worker", work_s=0.05, asynchronous=asynchronous, max_poll_interval=3)
    worker.wait_for(lambda: committed(kafka.bootstrap_servers, topic) == {0: count}, "all is handled and committed", 40)
    worker.stop()
    assert_delivered({(0, offset): offset for offset in range(count)}, worker, repeats=0)
    assert "MAX_POLL" not in worker.err
    assert "lost" not in worker.err


def test_a_member_joins_while_another_one_is_slow(kafka: Any, services: Services, topic: str) -> None:
    """The slow one is in the middle of a batch that takes 40 s; the group does not wait for that long."""
    for partition in range(4):
        send(kafka.bootstrap_servers, topic, [load_value(number) for number in range(200)], partition=partition)
    slow = services.worker("slow", work_s=0.2)
    slow.wait_for_count(5)
    other = services.worker("other", work_s=0.2)
    wait_until(lambda: members_of(kafka.bootstrap_servers, topic) == 2, "the other has asked to join")
    took = other.wait_for_count(1, 60)
    assert took < 12, f"{took} s"
    slow.stop(timeout_s=60)
    other.stop(timeout_s=60)


def test_a_second_sigterm_ends_it_at_once(kafka: Any, services: Services, topic: str) -> None:
    send(kafka.bootstrap_servers, topic, [load_value(number) for number in range(3)], partition=0)
    worker = services.worker("worker", work_s=20)
    worker.wait_for_err("at work")
    worker.terminate()
    worker.wait_for_err("finishing the batch in hand")
    worker.terminate()
    assert worker.wait(10) == -signal.SIGTERM
    assert f"SIGTERM came while the server was ending: unfinished: {topic} [0] @ 0;" in worker.err
    assert committed(kafka.bootstrap_servers, topic) == {}


def test_a_record_that_takes_longer_than_the_deadline(kafka: Any, services: Services, topic: str) -> None:
    """A sync handler is never cut off: its record is done and committed, however late."""
    send(kafka.bootstrap_servers, topic, [load_value(number) for number in range(3)], partition=0)
    worker = services.worker(
        "worker", work_s=3, env={"KEVEN_CLOSE_TIMEOUT_MS": "1000", "KEVEN_DRAIN_TIMEOUT_MS": "500"}
    )
    worker.wait_for_err("at work")
    worker.terminate()
    assert worker.wait(30) == 0, worker.tail()
    assert worker.count == 1
    assert f"(KEVEN_DRAIN_TIMEOUT_MS) has passed, while {topic} [0] @ 0 was being handled" in worker.err
    assert committed(kafka.bootstrap_servers, topic) == {0: worker.count}, worker.tail()
