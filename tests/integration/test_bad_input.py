"""Bad records among good ones on real Kafka: no crash, the good ones handled, the bad ones in the dead-letter topic."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import Producer
from real_services import Services, committed, read_topic

pytestmark = pytest.mark.real_kafka

SERVICE = """
import json, logging, sys
from keven_core.kafka import Event, event_handler
from keven_core.kafka.events.server import setup_event_listener

logging.basicConfig(level=logging.INFO)
handled = []

class Good(Event):
    event_name = "GOOD"
    id: int
    text: str = ""

@event_handler("GOOD")
def handle(event):
    handled.append(event.id)

server = setup_event_listener(
    server_name=sys.argv[1], topics=[sys.argv[1]], until_end=True, session_timeout=2, heartbeat_interval=0.5,
    on_stop=lambda: None,
)
io_server = server.io_server

@event_handler("LAST")
def last(event):
    ledger = {}
    for counts in io_server.ledger().values():
        for name, count in counts.items():
            ledger[name] = ledger.get(name, 0) + count
    print(json.dumps(ledger), flush=True)

server.start_sync()
print(json.dumps(handled), flush=True)
"""

DEEP = b'{"event_name":"GOOD","id":1,"more":' + b"[" * 10_000 + b"]" * 10_000 + b"}"
DEAD: dict[str, bytes] = {
    "not JSON": b"hello",
    "truncated": b'{"event_name":"GOOD","id":',
    "truncated msgpack": b"\x82\xaaevent_name\xa4GOOD",
    "wrong type": b'{"event_name":"GOOD","id":"one"}',
    "missing field": b'{"event_name":"GOOD"}',
    "no tag": b'{"id":1}',
    "tag of a wrong type": b'{"event_name":5,"id":1}',
    "empty": b"",
    "nested": DEEP,
    "invalid UTF-8": b'{"event_name":"GOOD","id":1,"text":"\xff\xfe"}',
    "NUL": b"\x00\x00\x00",
    "control characters in the name": b'{"event_name":"GO\\u0000OD","id":1}',
    "empty name": b'{"event_name":"","id":1}',
    "array": b'["GOOD", 1]',
    "number": b"17",
}
SKIPPED: dict[str, bytes] = {
    "unknown": b'{"event_name":"UNKNOWN","id":1}',
    "a path": b'{"event_name":"../../etc/passwd","id":1}',
    "other case": b'{"event_name":"good","id":1}',
    "as msgpack": b"\x81\xaaevent_name\xa7UNKNOWN",
}


def test_bad_records_between_good_ones(kafka: Any, services: Services, make_topic: Callable[..., str]) -> None:
    topic = make_topic(1, {"max.message.bytes": 16 << 20})
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "message.max.bytes": 15_000_000})
    sent: Counter[str] = Counter()
    good = 0

    def send(kind: str, value: bytes | None, **options: Any) -> None:
        nonlocal good
        producer.produce(topic, value, **options)
        producer.produce(topic, b'{"event_name":"GOOD","id":%d}' % good)
        good += 1
        sent[kind] += 1

    for value in DEAD.values():
        send("dead", value, key=b"a key", headers=[("a", b"1"), ("b", None)])
    for value in SKIPPED.values():
        send("skipped", value)
    send("tombstones", None, key=b"gone")
    # Headers of all sorts do no harm.
    many = [(f"h{number}", b"x" * 20) for number in range(10_000)]
    send("good", b'{"event_name":"GOOD","id":1000}', headers=many)
    send("dead", b"nonsense", headers=many)
    send("good", b'{"event_name":"GOOD","id":1001}', headers=[("event_name", b"\x00\xff"), ("", b""), ("n", None)])
    send("good", b'{ "id" : 1002 , "event_name" : "GOOD" }')
    producer.produce(topic, b'{"event_name":"LAST"}')
    assert producer.flush(30) == 0

    service = services.run_script("service", SERVICE, topic)
    assert service.wait() == 0, service.tail()
    first, second = service.out.splitlines()
    assert sorted(json.loads(second)) == [*range(good), 1000, 1001, 1002]
    ledger = json.loads(first)  # when LAST was being handled
    assert {name: ledger[name] for name in ("dead", "skipped", "tombstones", "stale")} == {
        "dead": sent["dead"], "skipped": sent["skipped"], "tombstones": 1, "stale": 0,
    }  # fmt: skip
    assert ledger["done"] == good + 3
    assert ledger["received"] == sum(sent.values()) + good + 1
    assert committed(kafka.bootstrap_servers, topic) == {0: ledger["received"]}

    letters = read_topic(kafka.bootstrap_servers, f"kafka_server.{topic}.dead")
    assert [letter.value() for letter in letters] == [*DEAD.values(), b"nonsense"]
    for letter in letters[:-1]:
        assert letter.key() == b"a key"
        headers = letter.headers() or []
        assert headers[:2] == [("a", b"1"), ("b", None)]
        names = [name for name, _ in headers]
        assert "kafka_dlt-original-offset" in names
        assert "kafka_dlt-exception-message" in names
    assert len(letters[-1].headers() or []) > 10_000
    # One line for each of the first; then they are counted.
    assert service.err.count("failed to decode") < len(DEAD)
    assert all(line.isprintable() for line in service.err.splitlines())
