"""Redrive on real Kafka: kill -9 in the middle, SIGTERM, a parking topic that has to be made, and logging in."""

import base64
import json
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition
from real_services import Services, committed, direct_address, read_topic, send

from keven_core.kafka.config import Settings
from keven_core.kafka.errors import AuthenticationError
from keven_core.kafka.redrive import REDRIVE_COUNT, Redrive

pytestmark = pytest.mark.real_kafka

COUNT = 2000
BATCH = 50  # letters at risk: those that are not committed yet


def headers_of(topic: str, partition: int) -> list[tuple[str, bytes]]:
    return [
        ("kafka_dlt-original-topic", topic.encode()),
        ("kafka_dlt-original-partition", struct.pack(">i", partition)),
        ("kafka_dlt-exception-fqcn", b"shop.OrderError"),
    ]


def fill(address: str, dead: str, topic: str, count: int = COUNT) -> None:
    for partition in range(4):
        numbers = range(partition, count, 4)
        send(
            address,
            dead,
            [b"%d" % number for number in numbers],
            partition=partition,
            key=b"k",
            headers=headers_of(topic, partition),
        )


def count_of(address: str, topic: str) -> int:
    """How many copies there are."""
    client = Consumer({"bootstrap.servers": address, "group.id": "none", "log_level": 2})
    try:
        ends = [client.get_watermark_offsets(TopicPartition(topic, number), timeout=10) for number in range(4)]
    finally:
        client.close()
    return sum(high for _, high in ends)


def copies(address: str, topic: str) -> Counter[int]:
    return Counter(int(message.value() or b"") for message in read_topic(address, topic))


def test_kill_9_loses_nothing_and_repeats_little(
    kafka: Any, topic: str, make_topic: Callable[..., str], services: Services
) -> None:
    address = direct_address(kafka)
    dead = make_topic(4, suffix=".dead")
    fill(address, dead, topic)
    environment = {"KEVEN_BATCH_SIZE": str(BATCH), "KEVEN_COMMIT_INTERVAL_MS": "200"}
    command = ("-m", "keven_core.kafka.redrive", dead, "--json")
    group = Redrive(dead).group_id
    killed: list[int] = []
    for attempt in range(2):
        before = count_of(address, topic)
        victim = services.run(f"victim-{attempt}", *command, "--rate", "400", env=environment)
        victim.wait_for(lambda before=before: count_of(address, topic) > before + 300, "it copies")
        victim.kill()
        assert victim.returncode == -9
        killed.append(count_of(address, topic))
        # It was hit in the middle: some are copied and committed, and there is much left.
        assert 0 < sum(committed(address, group, dead).values()) < COUNT
    assert killed[0] + 300 < killed[1] < COUNT
    last = services.run("last", *command, env=environment)
    assert last.wait() == 0, last.tail()
    assert json.loads(last.out)["complete"] is True
    found = copies(address, topic)
    assert set(found) == set(range(COUNT))
    repeated = sum(found.values()) - COUNT
    assert repeated <= 2 * BATCH, f"{repeated} copied twice"
    assert committed(address, group, dead) == dict.fromkeys(range(4), COUNT // 4)
    # Each is where it came from.
    assert all(int(message.value() or b"") % 4 == message.partition() for message in read_topic(address, topic))


def test_sigterm_ends_it_in_order(kafka: Any, topic: str, make_topic: Callable[..., str], services: Services) -> None:
    address = direct_address(kafka)
    dead = make_topic(4, suffix=".dead")
    fill(address, dead, topic, 400)
    stopped = services.run("stopped", "-m", "keven_core.kafka.redrive", dead, "--rate", "100", "--json")
    stopped.wait_for(lambda: count_of(address, topic) > 20, "it copies")
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait() == 130, stopped.tail()
    told = json.loads(stopped.out)
    assert (told["complete"], told["failed"]) == (False, 0)
    assert 20 < told["redriven"] < 400
    rest = Redrive(dead).run(settings=Settings(kafka_address=address))
    assert rest.redriven == 400 - told["redriven"]
    assert set(copies(address, topic).values()) == {1}


def test_a_parking_topic_is_made_and_no_other(kafka: Any, topic: str, make_topic: Callable[..., str]) -> None:
    address = direct_address(kafka)
    dead = make_topic(1, suffix=".dead")
    hopeless = [*headers_of(topic, 0), (REDRIVE_COUNT, b"3")]
    send(address, dead, [b"1", None], key=b"k", headers=hopeless)
    send(address, dead, [b"2"], headers=headers_of(f"{dead}.gone", 0))
    report = Redrive(dead, parking_topic=f"{dead}.parked").run(settings=Settings(kafka_address=address))
    assert (report.parked, report.left) == (2, {f"no topic {dead}.gone": 1})
    parked = read_topic(address, f"{dead}.parked")
    assert [message.value() for message in parked] == [b"1", None]
    assert list(parked[0].headers() or ()) == hopeless


def token(config: str) -> tuple[str, float, str]:
    """A token as test brokers take it: signed by nobody."""

    def encoded(data: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(data).encode()).decode().rstrip("=")

    now = time.time()
    return (
        f"{encoded({'alg': 'none'})}.{encoded({'sub': 'keven', 'iat': now, 'exp': now + 3600})}.",
        now + 3600,
        "keven",
    )


def secured_settings(kafka: Any, kind: str, **changes: Any) -> Settings:
    """Settings for a listener that asks who is there."""
    options = kafka.client_config(kind)
    names = {
        "bootstrap.servers": "kafka_address",
        "security.protocol": "security_protocol",
        "sasl.mechanism": "sasl_mechanism",
        "sasl.username": "sasl_username",
        "sasl.password": "sasl_password",
        "ssl.ca.location": "ssl_ca_file",
    }
    given = {names[key]: value for key, value in options.items() if key in names}
    return Settings(**{**given, "security_protocol": options["security.protocol"].lower(), **changes})


@pytest.mark.parametrize(("kind", "more"), [("sasl_ssl", {}), ("oauthbearer", {"oauth_token": token})])
def test_it_logs_in_as_every_service(
    own_kafka: Any, own_topic: str, own_make_topic: Callable[..., str], kind: str, more: dict[str, Any]
) -> None:
    address = own_kafka.direct_bootstrap_servers
    dead = own_make_topic(1, suffix=".dead")
    send(address, dead, [b"1"], headers=headers_of(own_topic, 2))
    assert Redrive(dead).run(settings=secured_settings(own_kafka, kind, **more)).redriven == 1
    assert [message.partition() for message in read_topic(address, own_topic)] == [2]


def test_refused_credentials_are_told_soon(own_kafka: Any, own_topic: str) -> None:
    with pytest.raises(AuthenticationError):
        Redrive(own_topic).run(settings=secured_settings(own_kafka, "sasl_ssl", sasl_password="guess"))
