"""The launcher of real brokers and the proxy in front of them, with a broker that is really started."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient

from keven_core.testing._broker_process.ports import PortReservation
from keven_core.testing._broker_process.process import process_identity
from keven_core.testing.proxy import PRODUCE
from keven_core.testing.pytest_plugin import skip_without_kafka
from keven_core.testing.real_kafka import KafkaStartError, RealKafka

pytestmark = pytest.mark.real_kafka

_DEADLINE_S = 30.0
_SMALL: dict[str, Any] = {"heap": "256m"}


@pytest.fixture(scope="module", autouse=True)
def _java() -> None:
    skip_without_kafka(own_broker=True)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {_DEADLINE_S} s: {what}")
        time.sleep(0.02)


def quiet(settings: dict[str, Any]) -> dict[str, Any]:
    """Lost connections are what these tests are about: they need no line on standard error each."""
    return {"log_level": 2, "reconnect.backoff.max.ms": 500, **settings}


def produce(settings: dict[str, Any], topic: str, *values: bytes) -> None:
    """Produce and wait for the acknowledgement of each."""
    failed: list[KafkaError] = []

    def delivered(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            failed.append(error)

    producer = Producer(quiet({"message.timeout.ms": 30_000, **settings}))
    for value in values:
        producer.produce(topic, value, on_delivery=delivered)
    assert producer.flush(_DEADLINE_S) == 0
    assert failed == []


def consume(settings: dict[str, Any], topic: str, count: int) -> list[bytes]:
    """Read that many messages from the beginning, as a group of its own."""
    consumer = Consumer(quiet({"group.id": uuid.uuid4().hex, "auto.offset.reset": "earliest", **settings}))
    consumer.subscribe([topic])
    values: list[bytes] = []
    deadline = time.monotonic() + _DEADLINE_S
    try:
        while len(values) < count and time.monotonic() < deadline:
            message = consumer.poll(0.2)
            if message is not None:
                assert message.error() is None, message.error()
                values.append(message.value() or b"")
    finally:
        consumer.close()
    return values


@pytest.fixture(scope="module")
def kafka() -> Iterator[RealKafka]:
    with RealKafka(proxied=True, security=["sasl", "oauthbearer", "ssl", "sasl_ssl"], **_SMALL) as kafka:
        yield kafka


@pytest.fixture
def topic(kafka: RealKafka) -> Iterator[str]:
    for proxy in kafka.proxies:
        proxy.restore()
    name = f"t-{uuid.uuid4().hex[:8]}"
    kafka.create_topic(name, partitions=2, config={"retention.ms": 3_600_000})
    yield name
    kafka.delete_topic(name)


def test_a_broker_writes_a_log(kafka: RealKafka) -> None:
    # It answers a moment before it says so.
    wait_until(lambda: "Kafka Server started" in kafka.log_path(1).read_text(), "the last line of its start")


def test_topics_are_made_and_deleted(kafka: RealKafka) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    kafka.create_topic("made", partitions=3)
    assert len(admin.list_topics(timeout=10).topics["made"].partitions) == 3
    with pytest.raises(RuntimeError, match=r"cannot create topic 'made'.*exists"):
        kafka.create_topic("made")
    kafka.delete_topic("made")
    assert "made" not in admin.list_topics(timeout=10).topics
    with pytest.raises(RuntimeError, match="cannot delete topic 'made'"):
        kafka.delete_topic("made")


def test_a_message_survives_kill_and_restart(kafka: RealKafka, topic: str) -> None:
    settings = {"bootstrap.servers": kafka.bootstrap_servers}
    produce(settings, topic, b"before")
    pid = kafka.pids[1]
    kafka.kill(1)
    assert kafka.pids == {}
    kafka.restart(1)
    assert kafka.pids[1] != pid
    assert consume(settings, topic, 1) == [b"before"]
    kafka.terminate(1)
    kafka.restart(1)
    produce(settings, topic, b"after")
    assert sorted(consume(settings, topic, 2)) == [b"after", b"before"]


def test_a_paused_broker_answers_when_it_goes_on(kafka: RealKafka, topic: str) -> None:
    admin = AdminClient(quiet({"bootstrap.servers": kafka.direct_bootstrap_servers}))
    admin.list_topics(timeout=10)
    kafka.pause()
    try:
        with pytest.raises(KafkaException):
            admin.list_topics(timeout=0.5)
    finally:
        kafka.resume()
    assert topic in admin.list_topics(timeout=10).topics


def test_clients_go_through_the_proxy_and_get_over_a_cut(kafka: RealKafka, topic: str) -> None:
    proxy = kafka.proxies[0]
    settings = {"bootstrap.servers": kafka.bootstrap_servers, "enable.idempotence": True}
    assert kafka.bootstrap_servers == proxy.address
    connections, seen = proxy.connections, proxy.requests_seen[PRODUCE]
    # The broker writes the first batch, and its acknowledgement is lost with the connection.
    proxy.cut_on_api(PRODUCE, on="response", times=1)
    values = [b"%d" % number for number in range(100)]
    produce(settings, topic, *values)
    assert proxy.requests_hit[PRODUCE] >= 1
    assert proxy.requests_seen[PRODUCE] > seen + 1  # sent again
    assert proxy.connections > connections
    assert sorted(consume({"bootstrap.servers": kafka.bootstrap_servers}, topic, 100), key=int) == values


def test_a_black_hole_is_a_broker_that_does_not_answer(kafka: RealKafka, topic: str) -> None:
    proxy = kafka.proxies[0]
    errors: list[KafkaError] = []
    producer = Producer(quiet({"bootstrap.servers": kafka.bootstrap_servers, "message.timeout.ms": 700}))
    proxy.black_hole()
    producer.produce(topic, b"x", on_delivery=lambda error, _: errors.append(error) if error else None)
    wait_until(lambda: producer.flush(0.1) == 0, "the message is given up")
    assert [error.code() for error in errors] == [KafkaError._MSG_TIMED_OUT]
    assert proxy.bytes_swallowed > 0
    proxy.restore()
    produce({"bootstrap.servers": kafka.bootstrap_servers}, topic, b"y")
    assert consume({"bootstrap.servers": kafka.bootstrap_servers}, topic, 1) == [b"y"]


@pytest.mark.parametrize(
    ("kind", "mechanism"),
    [
        ("plaintext", ""),
        ("sasl", "PLAIN"),
        ("sasl", "SCRAM-SHA-256"),
        ("sasl", "SCRAM-SHA-512"),
        ("oauthbearer", ""),
        ("ssl", ""),
        ("sasl_ssl", "SCRAM-SHA-256"),
    ],
)
def test_each_listener_takes_its_clients(kafka: RealKafka, topic: str, kind: str, mechanism: str) -> None:
    settings = kafka.client_config(kind, mechanism=mechanism)
    value = f"{kind} {mechanism}".encode()
    produce(settings, topic, value)
    assert consume(settings, topic, 1) == [value]


def test_mutual_tls(kafka: RealKafka, topic: str) -> None:
    authority = kafka.certificate_authority
    assert authority is not None
    settings = kafka.client_config("ssl") | {
        "ssl.keystore.location": str(authority.issue("a-client")),
        "ssl.keystore.password": authority.password,
    }
    produce(settings, topic, b"signed")
    assert consume(settings, topic, 1) == [b"signed"]


@pytest.mark.parametrize(
    ("kind", "wrong", "expected"),
    [
        ("sasl", {"sasl.password": "guess"}, KafkaError._AUTHENTICATION),
        ("sasl", {"sasl.mechanism": "PLAIN", "sasl.password": "guess"}, KafkaError._AUTHENTICATION),
        ("ssl", {"ssl.ca.location": ""}, KafkaError._SSL),
    ],
    ids=["scram password", "plain password", "unknown authority"],
)
def test_wrong_credentials_are_refused(kafka: RealKafka, kind: str, wrong: dict[str, str], expected: int) -> None:
    errors: list[int] = []
    settings = kafka.client_config(kind) | wrong
    if not settings.get("ssl.ca.location", "x"):
        del settings["ssl.ca.location"]  # the system's own authorities
    producer = Producer(quiet({**settings, "error_cb": lambda error: errors.append(error.code())}))
    wait_until(lambda: producer.poll(0.1) >= 0 and expected in errors, f"error {expected} is reported")


def test_settings_of_an_unknown_listener_are_an_error(kafka: RealKafka) -> None:
    with pytest.raises(ValueError, match="kerberos"):
        kafka.client_config("kerberos")


@pytest.mark.parametrize(
    ("wrong", "why"), [("expired", "certificate has expired"), ("wrong-host", "IP address mismatch")]
)
def test_a_wrong_certificate_of_the_broker_is_refused(wrong: Literal["expired", "wrong-host"], why: str) -> None:
    errors: list[int] = []
    with RealKafka(security=["ssl"], server_certificate=wrong, **_SMALL) as kafka:
        settings = kafka.client_config("ssl")
        producer = Producer(quiet({**settings, "error_cb": lambda error: errors.append(error.code())}))
        wait_until(lambda: producer.poll(0.1) >= 0 and bool(errors), "an error is reported")
        assert errors[0] == KafkaError._SSL
        # librdkafka does not say what is wrong with it; Python's ssl module does.
        host, _, port = settings["bootstrap.servers"].partition(":")
        context = ssl.create_default_context(cafile=settings["ssl.ca.location"])
        with socket.create_connection((host, int(port))) as sock, pytest.raises(ssl.SSLError, match=why):
            context.wrap_socket(sock, server_hostname=host)


def test_a_broker_that_cannot_start_says_why(tmp_path: Path) -> None:
    kafka = RealKafka(config={"log.retention.ms": "soon"}, data_dir=tmp_path / "data", **_SMALL)
    with pytest.raises(KafkaStartError, match=r"log\.retention\.ms"):
        kafka.start()
    assert kafka.pids == {}


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(KafkaStartError, match=f"port {port} "), RealKafka(ports=[port], **_SMALL):
            pass


def test_a_port_that_somebody_took_meanwhile_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as thief:
        stolen: list[int] = [thief.getsockname()[1]]
        take = PortReservation.take

        def take_stolen_first(self: PortReservation, wanted: int | None = None) -> int:
            return stolen.pop() if stolen else take(self, wanted)

        monkeypatch.setattr(PortReservation, "take", take_stolen_first)
        with RealKafka(**_SMALL) as kafka:
            assert "Address already in use" in kafka.log_path(1).read_text()
            assert len(kafka.pids) == 1


def test_data_dir_keeps_the_data(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with RealKafka(data_dir=data, auto_create_topics=True, **_SMALL) as kafka:
        produce({"bootstrap.servers": kafka.bootstrap_servers}, "made-by-asking", b"kept")
        pids = dict(kafka.pids)
    assert all(process_identity(pid) is None for pid in pids.values())
    with RealKafka(data_dir=data, **_SMALL) as kafka:
        assert consume({"bootstrap.servers": kafka.bootstrap_servers}, "made-by-asking", 1) == [b"kept"]


def test_three_nodes_get_over_the_loss_of_one() -> None:
    with RealKafka(3, proxied=True, **_SMALL) as kafka:
        assert len(kafka.pids) == len(kafka.proxies) == 3
        kafka.create_topic("replicated", partitions=3, replication_factor=3)
        settings = {"bootstrap.servers": kafka.bootstrap_servers}
        produce(settings, "replicated", *[b"a"] * 30)
        kafka.kill(2)
        produce(settings, "replicated", *[b"b"] * 30)
        assert sorted(consume(settings, "replicated", 60)) == [b"a"] * 30 + [b"b"] * 30
        kafka.restart(2)
        assert len(kafka.pids) == 3
        folder = kafka.folder
    assert not folder.exists()


def test_command_line(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "KAFKA"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "keven_core.testing.real_kafka", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    started = command("start", "--engine", "java", "--heap", "256m")
    try:
        assert started.returncode == 0, started.stderr
        address = started.stdout.rpartition("export KAFKA=")[2].strip()
        status = command("status")
        assert (status.returncode, address in status.stdout) == (0, True)
        # It belongs to nobody: the command that started it has ended, and its session with it.
        assert AdminClient({"bootstrap.servers": address}).list_topics(timeout=10).brokers
        pid = int(status.stdout.partition("process ")[2].partition(",")[0])
        assert os.getsid(pid) == pid
        # Started again, it is the same.
        assert address in command("start").stdout
        assert str(pid) in command("status").stdout
    finally:
        stopped = command("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert process_identity(pid) is None
    assert command("status").returncode == 1
    assert not (tmp_path / ".kafka" / "data").exists()


def test_sigkill_of_the_launcher_ends_the_broker_and_wipes_its_data() -> None:
    script = (
        "import sys; from keven_core.testing.real_kafka import RealKafka\n"
        f"kafka = RealKafka(heap={_SMALL['heap']!r}); kafka.start()\n"
        "print(kafka.pids[1], kafka.folder, flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as launcher:
        assert launcher.stdout is not None
        pid, folder = launcher.stdout.readline().split()
        identity = process_identity(int(pid))
        assert identity is not None
        launcher.send_signal(signal.SIGKILL)
        wait_until(lambda: process_identity(int(pid)) != identity, "the broker is gone")
        wait_until(lambda: not Path(folder).exists(), "its data are gone")
