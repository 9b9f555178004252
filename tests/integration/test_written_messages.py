"""What loggers say when Kafka refuses or does not answer, and how they meet Java's producers."""

import asyncio
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
)
from real_services import admin_of, change_password, read_topic, topics_of, wait_until

from keven_core.kafka._producers import close_producers
from keven_core.kafka.config import Settings
from keven_core.kafka.errors import (
    AuthenticationError,
    AuthorizationError,
    Delivery,
    DeliveryError,
    KafkaTimeoutError,
    UnknownTopicError,
)
from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger
from keven_core.testing._broker_process.jars import fetch_jars, find_java
from keven_core.testing.proxy import PRODUCE
from keven_core.testing.real_kafka import RealKafka

pytestmark = pytest.mark.real_kafka

# Of the loggers here; an error that is told in time comes much earlier.
TIMEOUT_S = 30
WELL_BEFORE_S = 12

MakeSettings = Callable[..., Settings]


@pytest.fixture
def settings(own_kafka: RealKafka, own_make_topic: Callable[..., str]) -> Iterator[MakeSettings]:
    """Makes settings for a listener of the own broker; producers end before the topics do."""
    addresses = set()

    def make(kind: str = "plaintext", mechanism: str = "SCRAM-SHA-256", **given: Any) -> Settings:
        """`given`: environment variables in upper case, fields of Settings otherwise."""
        options = own_kafka.client_config(kind, mechanism=mechanism)
        environ = {
            "KAFKA": options["bootstrap.servers"],
            "KEVEN_SECURITY_PROTOCOL": options["security.protocol"],
            "KEVEN_SASL_MECHANISM": options.get("sasl.mechanism", ""),
            "KEVEN_SASL_USERNAME": options.get("sasl.username", ""),
            "KEVEN_SASL_PASSWORD": options.get("sasl.password", ""),
            "KEVEN_SSL_CA_FILE": options.get("ssl.ca.location", ""),
            "KEVEN_RDKAFKA_OPTIONS": "reconnect.backoff.max.ms=300",
        }
        addresses.add(environ["KAFKA"])
        environ |= {name: str(value) for name, value in given.items() if name.isupper()}
        return Settings.from_env(environ, **{name: value for name, value in given.items() if not name.isupper()})

    yield make
    own_kafka.proxies[0].restore()
    own_kafka.resume()
    for address in addresses:
        close_producers(address)


def values_of(kafka: RealKafka, topic: str) -> list[bytes | None]:
    return [message.value() for message in read_topic(kafka.direct_bootstrap_servers, topic)]


def outcome_of(call: Callable[[], Any]) -> object:
    """What a call returns, or the error that it raises."""
    try:
        return call()
    except Exception as error:
        return error


class Clock:
    """Fails the test when what is in its block takes as long as a timeout."""

    def __enter__(self) -> "Clock":
        self._started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        took_s = time.monotonic() - self._started
        assert took_s < WELL_BEFORE_S, f"the error was not told before {took_s:.1f} s"


# --- topics ----------------------------------------------------------------------------------------------------------


def test_a_topic_that_does_not_exist(own_kafka: RealKafka, own_topic: str, settings: MakeSettings) -> None:
    """Without KEVEN_CREATE_TOPICS its messages fail, and only they; flush(), log() and on_delivery say so."""
    missing = f"{own_topic}-missing"
    mine = settings(KEVEN_CREATE_TOPICS=False)
    told: list[Delivery] = []
    batch = KafkaBatchLogger(topic=own_topic, settings=mine, timeout=TIMEOUT_S, on_delivery=told.extend)
    for number in range(20):
        batch.log(b"%d" % number)
        batch.log(b"lost %d" % number, topic=missing, key="k")
    single = KafkaLogger(topic=missing, settings=mine, timeout=TIMEOUT_S)
    alone: list[object] = []
    beside = threading.Thread(target=lambda: alone.append(outcome_of(lambda: single.log(b"lost"))))
    beside.start()
    with Clock(), pytest.raises(DeliveryError) as caught:
        batch.flush()
    beside.join(WELL_BEFORE_S)
    assert caught.value.failed_count == 20
    assert [each.value for each in caught.value.failures] == [b"lost %d" % number for number in range(10)]
    assert {(each.topic, each.key, each.outcome) for each in caught.value.failures} == {
        (missing, b"k", "not delivered")
    }
    assert all(isinstance(each.error, UnknownTopicError) for each in caught.value.failures)
    assert missing in str(caught.value)
    assert batch.flush() == 20
    wait_until(lambda: len(told) >= 40, "on_delivery was told of all", 5)
    assert {each.value for each in told if each.error is not None} == {b"lost %d" % number for number in range(20)}
    assert {each.value for each in told if each.error is None} == {b"%d" % number for number in range(20)}
    [error] = alone
    assert isinstance(error, DeliveryError)
    assert missing in str(error)
    assert isinstance(error.failures[0].error, UnknownTopicError)
    assert error.failures[0].outcome == "not delivered"
    assert sorted(values_of(own_kafka, own_topic)) == sorted(b"%d" % number for number in range(20))
    assert missing not in topics_of(own_kafka.direct_bootstrap_servers)


def test_missing_topics_are_created(own_kafka: RealKafka, own_topic: str, settings: MakeSettings) -> None:
    with Clock():
        KafkaLogger(topic=f"{own_topic}-single", settings=settings(), timeout=TIMEOUT_S).log(b"1")
        batch = KafkaBatchLogger(topic=f"{own_topic}-batch", settings=settings(), timeout=TIMEOUT_S)
        for number in range(100):
            batch.log(b"%d" % number)
            batch.log(b"%d" % number, topic=f"{own_topic}-other")
        assert batch.flush() == 200

        async def alog() -> None:
            async_logger = KafkaLogger(topic=f"{own_topic}-alog", settings=settings(), timeout=TIMEOUT_S)
            await asyncio.gather(*(async_logger.alog(b"%d" % number) for number in range(100)))

        asyncio.run(alog())
    assert values_of(own_kafka, f"{own_topic}-single") == [b"1"]
    for name in ("batch", "other", "alog"):
        found = [int(value or b"") for value in values_of(own_kafka, f"{own_topic}-{name}")]
        assert found == list(range(100))


# --- credentials and permissions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [AclOperation.WRITE, AclOperation.DESCRIBE], ids=["write", "describe"])
def test_no_permission(
    own_kafka: RealKafka, own_make_topic: Callable[..., str], settings: MakeSettings, operation: AclOperation
) -> None:
    """Only the messages of the forbidden topic fail."""
    allowed, forbidden = own_make_topic(1), own_make_topic(1)
    admin = admin_of(own_kafka.direct_bootstrap_servers)
    rule = (ResourceType.TOPIC, forbidden, ResourcePatternType.LITERAL, "User:keven", "*", operation)
    [made] = admin.create_acls([AclBinding(*rule, AclPermissionType.DENY)]).values()
    made.result(20)
    there = AclBindingFilter(*rule, AclPermissionType.DENY)
    wait_until(lambda: admin.describe_acls(there).result(20), "the broker has learnt of the rule", 20)
    try:
        mine = settings("sasl", KEVEN_CREATE_TOPICS=False)
        batch = KafkaBatchLogger(topic=allowed, settings=mine, timeout=TIMEOUT_S)
        for number in range(10):
            batch.log(b"%d" % number)
            batch.log(b"forbidden", topic=forbidden)
        with Clock(), pytest.raises(DeliveryError, match=forbidden) as caught:
            batch.flush()
        assert caught.value.failed_count == 10
        assert {each.topic for each in caught.value.failures} == {forbidden}
        assert {each.outcome for each in caught.value.failures} == {"not delivered"}
        assert all(isinstance(each.error, AuthorizationError) for each in caught.value.failures)
        assert batch.flush() == 10
        single = KafkaLogger(topic=forbidden, settings=mine, timeout=TIMEOUT_S)
        with Clock(), pytest.raises(DeliveryError, match=forbidden) as caught:
            single.log(b"forbidden")
        assert isinstance(caught.value.failures[0].error, AuthorizationError)
        single.log(b"allowed", topic=allowed)
    finally:
        [gone] = admin.delete_acls([there]).values()
        gone.result(20)
    assert values_of(own_kafka, allowed) == [*(b"%d" % number for number in range(10)), b"allowed"]
    assert values_of(own_kafka, forbidden) == []


def calls(topic: str, mine: Settings) -> dict[str, Callable[[], Any]]:
    """The ways to log a message and to learn what became of it."""

    def single() -> KafkaLogger:
        return KafkaLogger(topic=topic, settings=mine, timeout=TIMEOUT_S)

    def flush() -> None:
        batch = KafkaBatchLogger(topic=topic, settings=mine, timeout=TIMEOUT_S)
        batch.log(b"x")
        batch.flush()

    async def aflush() -> None:
        batch = KafkaBatchLogger(topic=topic, settings=mine, timeout=TIMEOUT_S)
        batch.log(b"x")
        await batch.aflush()

    return {
        "log": lambda: single().log(b"x"),
        "log_many": lambda: single().log_many([b"x", b"y"]),
        "alog": lambda: asyncio.run(single().alog(b"x")),
        "flush": flush,
        "aflush": lambda: asyncio.run(aflush()),
    }


def refused(topic: str, mine: Settings) -> dict[str, str]:
    """Try all ways at the same time; what the AuthenticationError of each says. Each has to come well in time."""
    told: dict[str, str] = {}

    def attempt(way: str, call: Callable[[], Any]) -> None:
        outcome = outcome_of(call)
        told[way] = f"{type(outcome).__name__}: {outcome}"

    ways = calls(topic, mine)
    threads = [threading.Thread(target=attempt, args=entry) for entry in ways.items()]
    with Clock():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S * 2)
    assert told.keys() == ways.keys()
    assert all(text.startswith("AuthenticationError: ") for text in told.values()), told
    return told


@pytest.mark.parametrize(
    ("kind", "mechanism"), [("sasl", "PLAIN"), ("sasl", "SCRAM-SHA-256"), ("sasl_ssl", "SCRAM-SHA-512")]
)
def test_a_wrong_password(
    own_kafka: RealKafka, own_topic: str, settings: MakeSettings, kind: str, mechanism: str
) -> None:
    told = refused(own_topic, settings(kind, mechanism, KEVEN_SASL_PASSWORD="guess"))
    assert "guess" not in str(told)
    assert values_of(own_kafka, own_topic) == []


def test_a_broker_that_is_not_trusted(own_kafka: RealKafka, own_topic: str, settings: MakeSettings) -> None:
    """Its certificate is signed by nobody whom this machine knows."""
    told = refused(own_topic, settings("ssl", KEVEN_SSL_CA_FILE=""))
    assert all("certificate" in text for text in told.values()), told
    assert values_of(own_kafka, own_topic) == []


@pytest.mark.parametrize(("kind", "mechanism"), [("sasl", "PLAIN"), ("ssl", ""), ("sasl_ssl", "SCRAM-SHA-512")])
def test_right_credentials(
    own_kafka: RealKafka, own_topic: str, settings: MakeSettings, kind: str, mechanism: str
) -> None:
    for call in calls(own_topic, settings(kind, mechanism)).values():
        call()
    assert sorted(values_of(own_kafka, own_topic)) == [b"x"] * 5 + [b"y"]


def test_a_password_that_is_put_right(own_kafka: RealKafka, own_topic: str, settings: MakeSettings) -> None:
    """The refusal is forgotten once messages are delivered: a slow answer later is no refusal."""
    mine = settings("sasl")
    batch = KafkaBatchLogger(topic=own_topic, settings=mine, timeout=TIMEOUT_S)
    single = KafkaLogger(topic=own_topic, settings=mine, timeout=TIMEOUT_S)
    change_password(own_kafka, "changed")
    try:
        batch.log(b"early")
        for wait in (batch.flush, lambda: single.log(b"also early")):
            with Clock(), pytest.raises(AuthenticationError):
                wait()
    finally:
        change_password(own_kafka, "keven-secret")

    def there() -> bool:
        return sorted(values_of(own_kafka, own_topic)) == [b"also early", b"early"]

    wait_until(there, "what could not be sent is sent")
    assert batch.flush() == 1
    single.log(b"in time")
    producers = [logger._made[os.getpid()][0] for logger in (batch, single)]
    wait_until(lambda: [producer.refused for producer in producers] == [None, None], "the refusal is forgotten", 5)
    own_kafka.pause()
    results: list[object] = []

    batch.log(b"late")
    began = time.monotonic()
    threads = [
        threading.Thread(target=lambda call=call: results.append(outcome_of(call)))
        for call in (batch.flush, lambda: single.log(b"late too"))
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: time.monotonic() - began > 1 or results, "the broker stands still for a second")
    own_kafka.resume()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert {str(each) for each in results} == {"2", "None"}
    assert sorted(values_of(own_kafka, own_topic)) == [b"also early", b"early", b"in time", b"late", b"late too"]


def test_oauthbearer(own_kafka: RealKafka, own_topic: str, settings: MakeSettings) -> None:
    """The token callback is called by the producers' attendants, and again before the token expires."""
    threads = []

    def token(config: str) -> tuple[str, float, str]:
        threads.append(threading.current_thread())
        return unsigned_token(3.0)

    for call in calls(own_topic, settings("oauthbearer", oauth_token=token)).values():
        call()
    assert sorted(values_of(own_kafka, own_topic)) == [b"x"] * 5 + [b"y"]
    # Two producers: one lingers, the other does not.
    assert len(set(threads)) == 2
    assert {thread.name for thread in threads} == {"keven-producer"}
    wait_until(lambda: min(map(threads.count, set(threads))) >= 2, "other tokens are asked for", 10)


def unsigned_token(lifetime_s: float) -> tuple[str, float, str]:
    import base64
    import json

    def encoded(data: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(data).encode()).decode().rstrip("=")

    now = time.time()
    claims = {"sub": "keven", "iat": now, "exp": now + lifetime_s}
    return f"{encoded({'alg': 'none'})}.{encoded(claims)}.", now + lifetime_s, "keven"


def test_oauthbearer_without_a_token(own_topic: str, settings: MakeSettings) -> None:
    def token(config: str) -> tuple[str, float, str]:
        raise RuntimeError("the identity provider is away")

    told = refused(own_topic, settings("oauthbearer", oauth_token=token))
    assert all("the identity provider is away" in text for text in told.values()), told


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages time out after 2 s instead of 300 s; there is no setting for it."""
    options_of = Settings.logger_options

    def logger_options(self: Settings, address: str, *, linger_ms: int) -> dict[str, str]:
        return options_of(self, address, linger_ms=linger_ms) | {"message.timeout.ms": "2000"}

    monkeypatch.setattr(Settings, "logger_options", logger_options)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("sent", [False, True], ids=["never sent", "answer lost"])
def test_messages_that_time_out(own_kafka: RealKafka, own_topic: str, settings: MakeSettings, sent: bool) -> None:
    """Whether they may be there is told apart; afterwards the loggers go on."""
    proxy, mine = own_kafka.proxies[0], settings()
    batch = KafkaBatchLogger(topic=own_topic, settings=mine, timeout=TIMEOUT_S)
    single = KafkaLogger(topic=own_topic, settings=mine, timeout=TIMEOUT_S)
    batch.log(b"before")
    assert batch.flush() == 1
    single.log(b"before")
    if sent:
        proxy.drop_api(PRODUCE, on="response")
    else:
        proxy.cut(refuse=True)
    for number in range(5):
        batch.log(b"batch %d" % number, key=b"k")
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda call=call: results.append(outcome_of(call)))
        for call in (
            batch.flush,
            lambda: single.log(b"single"),
            lambda: single.log_many([b"many", b"more"]),
            lambda: asyncio.run(single.alog(b"alog")),
        )
    ]
    with Clock():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [type(error) for error in results] == [DeliveryError] * 4, results
    failures = [each for error in results for each in error.failures]
    assert sorted(error.failed_count for error in results) == [1, 1, 2, 5]
    assert {each.outcome for each in failures} == {"possibly delivered" if sent else "not delivered"}
    assert all(isinstance(each.error, KafkaTimeoutError) for each in failures)
    assert {each.value for each in failures if each.key == b"k"} == {b"batch %d" % number for number in range(5)}
    proxy.restore()
    proxy.cut()
    batch.log(b"after")
    assert batch.flush() == 2
    single.log(b"after")
    there = values_of(own_kafka, own_topic)
    failed = {each.value for each in failures}
    assert sorted(value or b"" for value in there if value not in failed) == [b"after", b"after", b"before", b"before"]
    # Some may be there twice: librdkafka sends what has not timed out itself again when a message of its batch has.
    assert set(there) & failed == (failed if sent else set())


def test_loggers_that_give_up_waiting(own_kafka: RealKafka, own_topic: str, settings: MakeSettings) -> None:
    """KafkaTimeoutError says that the message may still arrive; and it does, once."""
    proxy, mine = own_kafka.proxies[0], settings()
    batch = KafkaBatchLogger(topic=own_topic, settings=mine, timeout=0.5)
    single = KafkaLogger(topic=own_topic, settings=mine, timeout=0.5)
    proxy.cut(refuse=True)
    batch.log(b"flush")

    async def alog() -> None:
        async def expect(value: bytes) -> None:
            with pytest.raises(KafkaTimeoutError, match="may still arrive"):
                await single.alog(value)

        await asyncio.gather(expect(b"alog 1"), expect(b"alog 2"))

    with Clock():
        with pytest.raises(KafkaTimeoutError, match="may still arrive"):
            single.log(b"log")
        with pytest.raises(KafkaTimeoutError, match="may still arrive"):
            single.log_many([b"log_many 1", b"log_many 2"])
        with pytest.raises(KafkaTimeoutError, match="still being sent"):
            batch.flush()
        asyncio.run(alog())
    proxy.restore()
    wanted = [b"alog 1", b"alog 2", b"flush", b"log", b"log_many 1", b"log_many 2"]
    wait_until(lambda: sorted(values_of(own_kafka, own_topic)) == wanted, "they arrive")
    assert batch.flush(TIMEOUT_S) == 1


def test_alog_in_one_event_loop_after_another(own_kafka: RealKafka, own_topic: str, settings: MakeSettings) -> None:
    """Each loop has deadlines of its own, whatever another one that has ended, or still runs, waited for."""
    proxy = own_kafka.proxies[0]
    single = KafkaLogger(topic=own_topic, settings=settings(), timeout=1)
    asyncio.run(single.alog(b"acknowledged"))
    proxy.cut(refuse=True)

    async def expect(value: bytes) -> bool:
        with pytest.raises(KafkaTimeoutError):
            await asyncio.wait_for(single.alog(value), 10)
        return True

    results: list[bool] = []
    for number in range(2):
        results.append(asyncio.run(expect(b"%d" % number)))
    threads = [
        threading.Thread(target=lambda number=number: results.append(asyncio.run(expect(b"%d" % number))))
        for number in range(2, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [True] * 5
    proxy.restore()
    single.timeout = TIMEOUT_S
    asyncio.run(single.alog(b"and on"))


def test_what_alog_waited_for_is_let_go(own_kafka: RealKafka, own_topic: str, settings: MakeSettings) -> None:
    """A message that was acknowledged is not remembered until its time-out would have come."""
    import gc

    single = KafkaLogger(topic=own_topic, settings=settings(), timeout=TIMEOUT_S)

    async def alog() -> None:
        await asyncio.gather(*(single.alog(b"x") for _ in range(2000)))
        deadline = time.monotonic() + 5
        while sum(isinstance(each, asyncio.Future) for each in gc.get_objects()) > 200:
            assert time.monotonic() < deadline, "they are still there"
            await single.alog(b"more")

    asyncio.run(alog())


# --- messages that are too large for the topic -----------------------------------------------------------------------


def test_a_message_that_is_too_large_for_the_topic(
    own_kafka: RealKafka, own_make_topic: Callable[..., str], settings: MakeSettings
) -> None:
    """Allowed by the client, refused by the broker: it alone fails, and the order of the others stays."""
    topic = own_make_topic(1, {"max.message.bytes": 10_000})
    mine = settings(KEVEN_LOG_BATCH_BYTES=5000, KEVEN_COMPRESSION="none")
    told: list[Delivery] = []
    batch = KafkaBatchLogger(topic=topic, settings=mine, timeout=TIMEOUT_S, on_delivery=told.extend)
    large = {100: b"a" * 50_000, 101: b"b" * 20_000, 400: b"c" * 50_000}
    for number in range(500):
        if number in large:
            batch.log(large[number], key=b"large", headers={"number": b"%d" % number})
        batch.log(b"%d" % number)
    with Clock(), pytest.raises(DeliveryError, match="3 messages were not delivered") as caught:
        batch.flush()
    assert caught.value.failed_count == 3
    assert [each.value for each in caught.value.failures] == list(large.values())
    for number, each in zip(large, caught.value.failures, strict=True):
        assert (each.topic, each.key, each.outcome) == (topic, b"large", "not delivered")
        assert each.headers == [("number", b"%d" % number)]
        assert each.error is not None
        assert each.error.name == "MSG_SIZE_TOO_LARGE"
    assert "aaaa" not in str(caught.value)
    assert batch.flush() == 500
    assert values_of(own_kafka, topic) == [b"%d" % number for number in range(500)]
    wait_until(lambda: len(told) >= 503, "on_delivery was told of all", 5)
    assert [each.value for each in told if each.error is None] == [b"%d" % number for number in range(500)]
    assert [each.value for each in told if each.error is not None] == list(large.values())


def test_a_single_message_that_is_too_large_for_the_topic(
    own_kafka: RealKafka, own_make_topic: Callable[..., str], settings: MakeSettings
) -> None:
    topic = own_make_topic(1, {"max.message.bytes": 10_000})
    single = KafkaLogger(
        topic=topic, settings=settings(KEVEN_LOG_BATCH_BYTES=5000, KEVEN_COMPRESSION="none"), timeout=TIMEOUT_S
    )
    large = b"a" * 50_000
    with Clock():
        single.log(b"0")
        with pytest.raises(DeliveryError, match="MSG_SIZE_TOO_LARGE") as caught:
            single.log(large)
        assert [each.value for each in caught.value.failures] == [large]
        with pytest.raises(DeliveryError) as caught:
            single.log_many([b"1", large, b"2"])
        assert caught.value.failed_count == 1
        assert [each.value for each in caught.value.failures] == [large]

        async def alog() -> list[Any]:
            return await asyncio.gather(*map(single.alog, (b"3", large, b"4")), return_exceptions=True)

        before, refused, after = asyncio.run(alog())
    assert (before, after) == (None, None)
    assert isinstance(refused, DeliveryError)
    assert [each.value for each in refused.failures] == [large]
    assert values_of(own_kafka, topic) == [b"%d" % number for number in range(5)]


# --- Java ------------------------------------------------------------------------------------------------------------


def test_one_key_is_one_partition_for_java_too(
    own_kafka: RealKafka, own_make_topic: Callable[..., str], settings: MakeSettings
) -> None:
    """Written by Java's console producer, from the broker's own jars, and by each of the loggers."""
    java, jars = find_java(), fetch_jars()
    assert java is not None
    topic, partitions = own_make_topic(7), 7
    keys = ["k", "ab", "abc", "abcd", "Schlüssel", "ключ", "鍵", "😀", " ", "k" * 1000, *map(str, range(150))]
    command = [java, "-Xmx128m", "-XX:TieredStopAtLevel=1", "-Dfile.encoding=UTF-8", "-cp", f"{jars}/*"]
    command += ["org.apache.kafka.tools.ConsoleProducer", "--topic", topic]
    command += ["--bootstrap-server", own_kafka.direct_bootstrap_servers]
    command += ["--reader-property", "parse.key=true", "--reader-property", "key.separator=|"]
    answer = subprocess.run(
        command, input="".join(f"{key}|java\n" for key in keys).encode(), capture_output=True, timeout=60
    )
    assert answer.returncode == 0, answer.stderr.decode()
    batch = KafkaBatchLogger(topic=topic, settings=settings(), timeout=TIMEOUT_S)
    for key in keys:
        batch.log(b"batch", key=key)
        batch.log(b"batch with headers", key=key.encode(), headers={"trace": b"1"})
    batch.flush()

    async def alog() -> None:
        single = KafkaLogger(topic=topic, settings=settings(), timeout=TIMEOUT_S)
        await asyncio.gather(*(single.alog(b"alog", key=key) for key in keys))

    asyncio.run(alog())
    places: dict[bytes | None, set[int | None]] = {}
    for value in (b"java", b"batch", b"batch with headers", b"alog"):
        written = [
            message for message in read_topic(own_kafka.direct_bootstrap_servers, topic) if message.value() == value
        ]
        assert sorted(message.key() or b"" for message in written) == sorted(key.encode() for key in keys)
        for message in written:
            places.setdefault(message.key(), set()).add(message.partition())
    assert all(len(found) == 1 for found in places.values()), places
    assert {partition for found in places.values() for partition in found} == set(range(partitions))
