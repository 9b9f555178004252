"""Where a run starts and where it ends, on real Kafka: by time, by offset, and everything that is there now."""

import json
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest
from confluent_kafka import Producer
from real_services import Load, Services, committed, load_value

pytestmark = pytest.mark.real_kafka

# Prints what it handles; its options are JSON in the second argument, a time as seconds, offsets as [topic, n, offset].
READER = """
import json, logging, sys
from datetime import datetime, timezone
from keven_core.kafka import current_record, event_handler
from keven_core.kafka.events.server import start_events_receiver_server

logging.basicConfig(level=logging.INFO)
options = json.loads(sys.argv[2])
start = options.pop("start", "stored")
if isinstance(start, (int, float)):
    start = datetime.fromtimestamp(start, timezone.utc)
elif isinstance(start, list):
    start = {(topic, partition): offset for topic, partition, offset in start}

handled = []

@event_handler("LOAD")
def handle(event):
    handled.append((current_record().partition, event.id))

start_events_receiver_server(
    server_name=sys.argv[1], topics=[sys.argv[1]], session_timeout=2, heartbeat_interval=0.5, start=start, **options
)
print(json.dumps(handled))
"""


def read(services: Services, topic: str, name: str = "reader", **options: Any) -> list[list[int]]:
    """What a run handles until it ends by itself."""
    service = services.run_script(name, READER, topic, json.dumps(options))
    assert service.wait() == 0, service.tail()
    handled: list[list[int]] = json.loads(service.out)
    return handled


def fill(kafka: Any, topic: str) -> None:
    """Ten records in each of two partitions, one each 1000 s of 2001."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})
    for number in range(20):
        stamp = int(datetime(2001, 1, 1, tzinfo=timezone.utc).timestamp() + number // 2 * 1000) * 1000
        producer.produce(topic, load_value(number), partition=number % 2, timestamp=stamp)
    assert producer.flush(30) == 0


@pytest.fixture
def filled(kafka: Any, make_topic: Callable[..., str]) -> str:
    topic = make_topic(2, {"message.timestamp.before.max.ms": 9223372036854775807, "retention.ms": -1})
    fill(kafka, topic)
    return topic


EACH = [[number % 2, number] for number in range(20)]


@pytest.mark.parametrize("use_group", [True, False], ids=["group", "alone"])
def test_until_end_handles_what_was_there(kafka: Any, services: Services, filled: str, use_group: bool) -> None:
    assert sorted(read(services, filled, until_end=True, use_group=use_group)) == sorted(EACH)
    assert committed(kafka.bootstrap_servers, filled) == ({0: 10, 1: 10} if use_group else {})
    # Again: nothing new for the group, everything for the reader without one.
    again = read(services, filled, "again", until_end=True, use_group=use_group)
    assert sorted(again) == ([] if use_group else sorted(EACH))


@pytest.mark.parametrize("use_group", [True, False], ids=["group", "alone"])
def test_start_by_time(services: Services, filled: str, use_group: bool) -> None:
    start = datetime(2001, 1, 1, tzinfo=timezone.utc).timestamp() + 6500
    assert sorted(read(services, filled, until_end=True, use_group=use_group, start=start)) == sorted(EACH[14:])


def test_start_by_a_time_after_the_last_record(kafka: Any, services: Services, filled: str) -> None:
    start = datetime(2001, 6, 1, tzinfo=timezone.utc).timestamp()
    assert read(services, filled, until_end=True, start=start) == []


@pytest.mark.parametrize("use_group", [True, False], ids=["group", "alone"])
def test_start_by_offset(services: Services, filled: str, use_group: bool) -> None:
    start = [[filled, 0, 8], [filled, 1, 5]]
    expected = [[0, 16], [0, 18], [1, 11], [1, 13], [1, 15], [1, 17], [1, 19]]
    assert sorted(read(services, filled, until_end=True, use_group=use_group, start=start)) == expected


def test_start_earliest_again_although_everything_is_committed(kafka: Any, services: Services, filled: str) -> None:
    assert len(read(services, filled, until_end=True)) == 20
    assert committed(kafka.bootstrap_servers, filled) == {0: 10, 1: 10}
    assert sorted(read(services, filled, "again", until_end=True, start="earliest")) == sorted(EACH)


def test_until_end_does_not_run_after_a_load_that_goes_on(
    kafka: Any, services: Services, make_topic: Callable[..., str]
) -> None:
    topic = make_topic(4)
    with Load(kafka.bootstrap_servers, topic, 4, rate=500) as load:
        handled = read(services, topic, until_end=True)
        assert load.sent > len(handled)
        load.stop()
    rest = read(services, topic, "rest", until_end=True)
    assert sorted(number for _, number in handled + rest) == list(range(load.sent))


def test_until_end_of_an_empty_topic(services: Services, topic: str) -> None:
    assert read(services, topic, until_end=True) == []


def test_no_commit(kafka: Any, services: Services, filled: str) -> None:
    for name in ("reader", "again"):
        assert sorted(read(services, filled, name, until_end=True, no_commit=True)) == sorted(EACH)
    assert committed(kafka.bootstrap_servers, filled) == {}


def test_timeout_ends_a_quiet_run(services: Services, filled: str) -> None:
    assert sorted(read(services, filled, timeout=1)) == sorted(EACH)
