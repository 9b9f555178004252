"""TLS and SASL against a real broker: right credentials work, wrong ones end with a clear error and an exit code."""

import shutil
import subprocess
from pathlib import Path

import pytest
from real_services import Service, Services, change_password, read_topic, send

from keven_core.testing.real_kafka import RealKafka, ThrowAwayCa

pytestmark = pytest.mark.real_kafka

# Handles one event and dead-letters another, so that consumer, dead-letter producer and topic creation all log in.
SERVICE = """
import base64, json, logging, sys, time
from keven_core.kafka import Settings, event_handler
from keven_core.kafka.events.server import start_events_receiver_server

logging.basicConfig(level=logging.INFO)

@event_handler("LOAD")
def handle(event):
    if event.id < 0:
        raise ValueError("negative")
    print("handled", event.id, flush=True)


def encoded(data):
    return base64.urlsafe_b64encode(json.dumps(data).encode()).decode().rstrip("=")


def token(config):
    now = time.time()
    claims = {"sub": "keven", "iat": now, "exp": now + 3600}
    print("token asked for", flush=True)
    return f"{encoded({'alg': 'none'})}.{encoded(claims)}.", now + 3600, "keven"


def no_token(config):
    raise RuntimeError("the identity provider is away")


extra = {"settings": Settings.from_env(oauth_token=globals()[sys.argv[2]])} if len(sys.argv) > 2 else {}
start_events_receiver_server(
    server_name=sys.argv[1], topics=[sys.argv[1]], session_timeout=2, heartbeat_interval=0.5, **extra
)
"""


def environment(kafka: RealKafka, kind: str, mechanism: str = "PLAIN", **changed: str) -> dict[str, str]:
    """What a service is told in its environment to connect to a listener of that kind."""
    options = kafka.client_config(kind, mechanism=mechanism)
    names = {
        "bootstrap.servers": "KAFKA",
        "security.protocol": "KEVEN_SECURITY_PROTOCOL",
        "sasl.mechanism": "KEVEN_SASL_MECHANISM",
        "sasl.username": "KEVEN_SASL_USERNAME",
        "sasl.password": "KEVEN_SASL_PASSWORD",
        "ssl.ca.location": "KEVEN_SSL_CA_FILE",
    }
    return {names[key]: value for key, value in options.items() if key in names} | changed


def works(kafka: RealKafka, service: Service, topic: str) -> None:
    """It handles what comes, and dead-letters what fails."""
    address = kafka.direct_bootstrap_servers
    send(address, topic, [b'{"event_name":"LOAD","id":1}', b'{"event_name":"LOAD","id":-1}'])
    service.wait_for(lambda: "handled 1" in service.out, "it handles")
    service.wait_for(lambda: "ValueError: negative" in service.err, "it reports the failure")
    service.stop()
    assert len(read_topic(address, f"kafka_server.{topic}.dead")) == 1
    assert "keven-secret" not in service.err


def fails(service: Service, error: str, *words: str) -> None:
    """It ends by itself, soon, with one clear error."""
    assert service.wait(40) == 1, service.tail()
    last = service.err.strip().splitlines()[-1]
    assert last.startswith(f"keven_core.kafka.errors.{error}: "), service.tail()
    for word in words:
        assert word in last, service.tail()
    assert "keven-secret" not in service.err
    assert "guess" not in service.err


@pytest.mark.parametrize(
    ("kind", "mechanism"),
    [
        ("sasl", "PLAIN"),
        ("sasl", "SCRAM-SHA-256"),
        ("sasl", "SCRAM-SHA-512"),
        ("ssl", ""),
        ("sasl_ssl", "SCRAM-SHA-512"),
    ],
)
def test_right_credentials(
    own_kafka: RealKafka, own_services: Services, own_topic: str, kind: str, mechanism: str
) -> None:
    service = own_services.run_script("service", SERVICE, own_topic, env=environment(own_kafka, kind, mechanism))
    works(own_kafka, service, own_topic)


def test_oauthbearer_with_a_token_callback(own_kafka: RealKafka, own_services: Services, own_topic: str) -> None:
    env = environment(own_kafka, "oauthbearer", KEVEN_SASL_MECHANISM="OAUTHBEARER")
    service = own_services.run_script("service", SERVICE, own_topic, "token", env=env)
    works(own_kafka, service, own_topic)
    assert "token asked for" in service.out


def test_oauthbearer_without_a_token_says_why(own_kafka: RealKafka, own_services: Services, own_topic: str) -> None:
    env = environment(own_kafka, "oauthbearer", KEVEN_SASL_MECHANISM="OAUTHBEARER")
    service = own_services.run_script("service", SERVICE, own_topic, "no_token", env=env)
    fails(service, "AuthenticationError", "the identity provider is away")


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256"])
@pytest.mark.parametrize("kind", ["sasl", "sasl_ssl"])
def test_a_wrong_password(
    own_kafka: RealKafka, own_services: Services, own_topic: str, kind: str, mechanism: str
) -> None:
    env = environment(own_kafka, kind, mechanism, KEVEN_SASL_PASSWORD="guess")
    fails(own_services.run_script("service", SERVICE, own_topic, env=env), "AuthenticationError")


LOGGER = """
import sys
from keven_core.kafka import KafkaLogger

KafkaLogger(topic=sys.argv[1], timeout=15).log(b"x")
"""


def test_a_wrong_password_of_a_logger(own_kafka: RealKafka, own_services: Services, own_topic: str) -> None:
    env = environment(own_kafka, "sasl", "SCRAM-SHA-256", KEVEN_SASL_PASSWORD="guess")
    service = own_services.run_script("logger", LOGGER, own_topic, env=env)
    assert service.wait(40) == 1, service.tail()
    assert "keven_core.kafka.errors.AuthenticationError: " in service.err, service.tail()
    assert "guess" not in service.err
    assert service.err.count("\n") < 60, "a flood of lines"


def test_a_mechanism_that_the_broker_does_not_offer(
    own_kafka: RealKafka, own_services: Services, own_topic: str
) -> None:
    env = environment(own_kafka, "oauthbearer", KEVEN_SASL_MECHANISM="SCRAM-SHA-256")
    env |= {"KEVEN_SASL_USERNAME": "keven", "KEVEN_SASL_PASSWORD": "keven-secret"}
    fails(own_services.run_script("service", SERVICE, own_topic, env=env), "AuthenticationError")


def test_a_broker_with_a_certificate_of_another_authority(
    own_kafka: RealKafka, own_services: Services, own_topic: str, tmp_path: Path
) -> None:
    assert own_kafka.certificate_authority is not None
    other = ThrowAwayCa(tmp_path / "other", own_kafka.certificate_authority._keytool)
    env = environment(own_kafka, "ssl", KEVEN_SSL_CA_FILE=str(other.ca_pem))
    service = own_services.run_script("service", SERVICE, own_topic, env=env)
    fails(service, "AuthenticationError", "certificate verify failed")


@pytest.mark.parametrize(
    ("content", "word"), [(None, "authority.pem"), ("not a certificate", "ssl.ca.location")], ids=["missing", "garbage"]
)
def test_a_ca_file_that_is_none(
    own_kafka: RealKafka, own_services: Services, own_topic: str, tmp_path: Path, content: str | None, word: str
) -> None:
    path = tmp_path / "authority.pem"
    if content is not None:
        path.write_text(content)
    env = environment(own_kafka, "ssl", KEVEN_SSL_CA_FILE=str(path))
    service = own_services.run_script("service", SERVICE, own_topic, env=env)
    fails(service, "ConfigurationError", word)


def client_certificate(kafka: RealKafka, folder: Path, name: str) -> dict[str, str]:
    """A certificate of the broker's authority and its key, as PEM files."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is needed to write the client's key as PEM: install the package openssl")
    authority = kafka.certificate_authority
    assert authority is not None
    store = authority.issue(name)
    key, certificate = folder / f"{name}.key", folder / f"{name}.pem"
    for options, path in ((["-nocerts", "-nodes"], key), (["-nokeys", "-clcerts"], certificate)):
        command = [openssl, "pkcs12", "-in", str(store), "-passin", f"pass:{authority.password}", *options]
        subprocess.run([*command, "-out", str(path)], check=True, capture_output=True)
    return {"KEVEN_SSL_CERTIFICATE_FILE": str(certificate), "KEVEN_SSL_KEY_FILE": str(key)}


def test_mutual_tls(own_kafka: RealKafka, own_services: Services, own_topic: str, tmp_path: Path) -> None:
    env = environment(own_kafka, "ssl", **client_certificate(own_kafka, tmp_path, "client"))
    works(own_kafka, own_services.run_script("service", SERVICE, own_topic, env=env), own_topic)


def test_a_key_that_belongs_to_another_certificate(
    own_kafka: RealKafka, own_services: Services, own_topic: str, tmp_path: Path
) -> None:
    right = client_certificate(own_kafka, tmp_path, "client")
    wrong = client_certificate(own_kafka, tmp_path, "somebody-else")
    env = environment(own_kafka, "ssl", **right | {"KEVEN_SSL_KEY_FILE": wrong["KEVEN_SSL_KEY_FILE"]})
    fails(own_services.run_script("service", SERVICE, own_topic, env=env), "ConfigurationError", "key")


def test_plaintext_against_a_tls_listener_is_said_to_be_unreachable(
    own_kafka: RealKafka, own_services: Services, own_topic: str
) -> None:
    address = environment(own_kafka, "ssl")["KAFKA"]
    service = own_services.run_script("service", SERVICE, own_topic, env={"KAFKA": address})
    service.wait_for_err("can't be reached", 20)
    service.stop()


def test_a_password_that_is_changed_back_later(own_kafka: RealKafka, own_services: Services, own_topic: str) -> None:
    """Once connected, a broker that refuses the credentials is waited for: it may be its own trouble."""
    env = environment(own_kafka, "sasl", "SCRAM-SHA-256") | {"KEVEN_RDKAFKA_OPTIONS": "reconnect.backoff.max.ms=500"}
    service = own_services.run_script("service", SERVICE, own_topic, env=env)
    send(own_kafka.direct_bootstrap_servers, own_topic, [b'{"event_name":"LOAD","id":1}'])
    service.wait_for(lambda: "handled 1" in service.out, "it handles")
    change_password(own_kafka, "changed")
    try:
        own_kafka.kill()
        own_kafka.restart()
        service.wait_for_err("Authentication", 30)
    finally:
        change_password(own_kafka, "keven-secret")
    send(own_kafka.direct_bootstrap_servers, own_topic, [b'{"event_name":"LOAD","id":2}'])
    service.wait_for(lambda: "handled 2" in service.out, "it goes on by itself")
    service.stop()
