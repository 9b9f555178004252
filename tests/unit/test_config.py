"""Settings: parsing, bounds, combinations, what becomes of each, and that no secret is ever shown."""

import dataclasses
import itertools
import logging
import pickle
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builds import ROOT

from keven_core._native.consumer import Consumer
from keven_core._native.producer import Producer
from keven_core.kafka._producers import close_producers
from keven_core.kafka.config import ALLOWED_OPTIONS, DEFAULT_ADDRESS, Settings, _warn_once, describe_settings
from keven_core.kafka.errors import ConfigurationError, DeliveryError, KafkaTimeoutError, QueueFullError, UsageError
from keven_core.kafka.logger import KafkaBatchLogger, KafkaLogger

DESCRIBED = {entry["field"]: entry for entry in describe_settings()}
INTEGERS = [entry for entry in DESCRIBED.values() if entry["low"] is not None]
SWITCHES = [entry for entry in DESCRIBED.values() if entry["unit"] == "true | false"]
CHOICES = [entry for entry in DESCRIBED.values() if entry["choices"]]
SECRET = "s3cr3t-Pa55"

SASL = {"security_protocol": "sasl_ssl", "sasl_username": "ada", "sasl_password": SECRET}


def by_env(entry: dict[str, Any]) -> str:
    return str(entry["env"])


def consumer_options(settings: Settings, **changes: Any) -> dict[str, str]:
    arguments: dict[str, Any] = {
        "max_poll_interval_s": 180,
        "session_timeout_s": 6,
        "heartbeat_interval_s": 2,
        "commit": True,
        "partition_eof": False,
    }
    return settings.consumer_options("127.0.0.1:1", "client", "group", **{**arguments, **changes})


def logger_options(settings: Settings) -> dict[str, str]:
    return settings.logger_options("127.0.0.1:1", linger_ms=settings.linger_ms)


def all_options(settings: Settings) -> dict[str, dict[str, str]]:
    """The producer is that of retry and dead-letter copies."""
    return {
        "client": settings.client_options("127.0.0.1:1", "client"),
        "consumer": consumer_options(settings),
        "producer": settings.producer_options("127.0.0.1:1", "client", linger_ms=5),
        "logger": logger_options(settings),
    }


@pytest.fixture(autouse=True)
def _warned_of_nothing() -> Iterator[None]:
    _warn_once.cache_clear()
    yield
    _warn_once.cache_clear()


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_field_is_described() -> None:
    fields = {field.name for field in dataclasses.fields(Settings)}
    assert fields - set(DESCRIBED) == {"oauth_token"}  # given in code only; described in the documents' text
    for entry in DESCRIBED.values():
        assert entry["effect"], entry
        assert entry["env"] == "KAFKA" or entry["env"].startswith("KEVEN_"), entry
    assert len({entry["env"] for entry in DESCRIBED.values()}) == len(DESCRIBED)


def test_numbers_say_their_unit_in_the_name() -> None:
    for entry in INTEGERS:
        assert entry["unit"] in ("ms", "bytes", "messages", "records", "percent", "threads"), entry
        if entry["unit"] not in ("messages", "records", "threads"):
            assert entry["field"].endswith(f"_{entry['unit']}"), entry


def test_the_document_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "tools/settings_doc.py"))["settings_document"]()
    assert (ROOT / "docs/settings.md").read_text() == made, "run `python tools/settings_doc.py`"


@pytest.mark.parametrize("entry", DESCRIBED.values(), ids=by_env)
def test_every_setting_is_in_the_document(entry: dict[str, Any]) -> None:
    lines = (ROOT / "docs/settings.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(f"| `{entry['env']}` | `{entry['field']}` |")]
    assert len(rows) == 1
    assert entry["effect"] in rows[0]
    assert entry["kafka"] in rows[0]
    if entry["low"] is not None:
        assert f"| {entry['low']} to {entry['high']} |" in rows[0]


def test_the_documented_defaults_of_the_issue() -> None:
    expected = {
        "KAFKA": None,
        "KEVEN_BATCH_SIZE": 200,
        "KEVEN_BATCH_TIMEOUT_MS": 0,
        "KEVEN_PREFETCH_BYTES": 16 << 20,
        "KEVEN_COMMIT_INTERVAL_MS": 1000,
        "KEVEN_AUTO_OFFSET_RESET": "earliest",
        "KEVEN_CODEC": "json",
        "KEVEN_CREATE_TOPICS": True,
        "KEVEN_LINGER_MS": 5,
        "KEVEN_LOG_BATCH_BYTES": 1_000_000,
        "KEVEN_LOG_BATCH_MESSAGES": 10_000,
        "KEVEN_LOG_QUEUE_BYTES": 64 << 20,
        "KEVEN_LOG_QUEUE_MESSAGES": 200_000,
        "KEVEN_COMPRESSION": "lz4",
        "KEVEN_ACKS": "all",
        "KEVEN_IDEMPOTENCE": None,
    }
    given = {entry["env"]: entry["default"] for entry in DESCRIBED.values()}
    assert {env: given[env] for env in expected} == expected
    defaults = Settings()
    for field, entry in DESCRIBED.items():
        assert getattr(defaults, field) == entry["default"]


def test_what_the_document_calls_no_setting_has_that_value() -> None:
    text = (ROOT / "docs/settings.md").read_text().partition("## Not settings")[2]
    general, copies = (
        dict(re.findall(r"^\| `([a-z.]+)` \| `([^`]+)`", part, re.MULTILINE))
        for part in text.split("retry and dead-letter copies")
    )
    options = all_options(Settings())
    assert general.pop("enable.auto.offset.store") == "false"  # the compiled consumer sets it
    assert copies.pop("message.max.bytes") == "1000000000"  # the server sets it
    for name, value in general.items():
        assert {kind[name] for kind in options.values() if name in kind} == {value}
    for name, value in copies.items():
        assert options["producer"][name] == value
    assert not ALLOWED_OPTIONS & general.keys()
    own = {entry["kafka"] for entry in DESCRIBED.values()} | {"partitioner"}
    assert copies.keys() == OF_PRODUCERS | {"partitioner"}
    assert copies.keys() <= own
    assert not own & general.keys()


# --- reading the environment -----------------------------------------------------------------------------------------


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.from_env({}) == Settings()
    assert Settings.from_env(dict.fromkeys((entry["env"] for entry in DESCRIBED.values()), "")) == Settings()


def test_the_process_environment_is_read_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEVEN_BATCH_SIZE", "321")
    assert Settings.from_env().batch_size == 321
    assert Settings().batch_size == 200


def test_overrides_win_over_the_environment() -> None:
    settings = Settings.from_env({"KEVEN_BATCH_SIZE": "321", "KEVEN_CODEC": "msgpack"}, batch_size=7)
    assert (settings.batch_size, settings.codec) == (7, "msgpack")


@pytest.mark.parametrize("entry", INTEGERS, ids=by_env)
def test_numbers_within_and_beyond_their_bounds(entry: dict[str, Any]) -> None:
    env, field, low, high = (entry[key] for key in ("env", "field", "low", "high"))
    for value in (low, high):
        assert getattr(Settings.from_env({env: str(value)}), field) == value
        assert getattr(Settings(**{field: value}), field) == value
    for value in (low - 1, high + 1, -1 if low > 0 else -5):
        for make in (lambda value=value: Settings.from_env({env: str(value)}), lambda v=value: Settings(**{field: v})):
            with pytest.raises(ConfigurationError) as caught:
                make()
            assert str(caught.value) == f"{env}={value} is out of range; allowed: {low} to {high} {entry['unit']}"


@pytest.mark.parametrize("entry", INTEGERS, ids=by_env)
@pytest.mark.parametrize("text", ["many", "1.5", "0x10", "1e3", " ", "--1", "१x"])
def test_what_is_no_number_is_named(entry: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_env({entry["env"]: text})
    expected = f"{entry['env']}={text!r} is not a whole number; allowed: {entry['low']} to {entry['high']}"
    assert str(caught.value) == f"{expected} {entry['unit']}"


@pytest.mark.parametrize("entry", INTEGERS, ids=by_env)
@pytest.mark.parametrize("value", [1.0, True, "200", None])
def test_numbers_in_code_have_to_be_numbers(entry: dict[str, Any], value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{entry['env']}={value!r} is not a whole number; allowed: "):
        Settings(**{entry["field"]: value})


@pytest.mark.parametrize("entry", SWITCHES, ids=by_env)
def test_switches(entry: dict[str, Any]) -> None:
    env, field = entry["env"], entry["field"]
    for text, value in [(t, True) for t in ("1", "true", "TRUE", "yes", "on")] + [
        (t, False) for t in ("0", "false", "No", "off")
    ]:
        given = {"KEVEN_ALLOW_INSECURE": "true", env: text}
        assert getattr(Settings.from_env(given), field) is value
    for text in ("maybe", "2", "tru"):
        with pytest.raises(ConfigurationError, match=rf"^{env}='{text}' is not a switch: true or false$"):
            Settings.from_env({env: text})
    for wrong in (1, "true", *([] if entry["default"] is None else [None])):
        with pytest.raises(ConfigurationError, match=rf"^{env}={wrong!r} is not a switch: true or false$"):
            Settings(**{field: wrong})


@pytest.mark.parametrize("entry", CHOICES, ids=by_env)
def test_choices(entry: dict[str, Any]) -> None:
    allowed = ", ".join(entry["choices"])
    for wrong in ("nonsense", entry["choices"][0].swapcase(), entry["choices"][0] + " "):
        with pytest.raises(ConfigurationError) as caught:
            Settings.from_env({entry["env"]: wrong})
        assert str(caught.value) == f"{entry['env']}={wrong!r} is not known; allowed: {allowed}"
    with pytest.raises(ConfigurationError, match=rf"^{entry['env']}=5 is not known; allowed: "):
        Settings(**{entry["field"]: 5})


@pytest.mark.parametrize("field", ["codec", "auto_offset_reset", "security_protocol", "compression", "acks"])
def test_none_is_no_choice_where_there_is_a_default(field: str) -> None:
    with pytest.raises(ConfigurationError, match=r"=None is not known; allowed: "):
        Settings(**{field: None})


TEXTS = [
    entry
    for entry in DESCRIBED.values()
    if entry["default"] is None and not entry["choices"] and entry not in SWITCHES
]  # fmt: skip


@pytest.mark.parametrize("entry", TEXTS, ids=by_env)
def test_texts_that_librdkafka_could_not_take(entry: dict[str, Any]) -> None:
    assert getattr(Settings.from_env({entry["env"]: "téxt"}), entry["field"]) == "téxt"
    for value, reason in [
        (b"bytes", "has to be a str, not bytes"),
        (5, "has to be a str, not int"),
        (f"{SECRET}\x00", "has a NUL character in it"),
        (f"{SECRET}\udcff", "is not valid UTF-8"),
    ]:
        with pytest.raises(ConfigurationError) as caught:
            Settings(**{entry["field"]: value})
        assert str(caught.value) == f"{entry['env']} {reason}"


def test_settings_are_keyword_only_and_frozen() -> None:
    with pytest.raises(TypeError):
        Settings("127.0.0.1:1")
    with pytest.raises(TypeError):
        Settings(batchsize=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().batch_size = 5


# --- the address -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kafka", "argument", "honor_env", "expected"),
    [
        (None, None, True, DEFAULT_ADDRESS),
        (None, "given:1", True, "given:1"),
        ("env:1", "given:1", True, "env:1"),
        ("env:1", None, True, "env:1"),
        ("env:1", "given:1", False, "given:1"),
        ("env:1", None, False, DEFAULT_ADDRESS),
    ],
)
def test_kafka_wins_over_arguments(kafka: str | None, argument: str | None, honor_env: bool, expected: str) -> None:
    assert Settings(kafka_address=kafka).address(argument, honor_env=honor_env) == expected


# --- what the settings become ----------------------------------------------------------------------------------------

EVERY = {"client", "consumer", "producer", "logger"}
# What the loggers' producer and that of copies both have a value for.
OF_PRODUCERS = {"linger.ms", "compression.type", "acks", "enable.idempotence"}

# Per field: a value that is not the default, the text that librdkafka gets, and whose property it is.
EFFECTS: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "prefetch_bytes": ({"prefetch_bytes": 32 << 20}, "32768", {"consumer"}),
    "max_message_bytes": ({"max_message_bytes": 5000}, "5000", {"producer", "logger"}),
    "linger_ms": ({"linger_ms": 250}, "250", {"logger"}),
    "log_batch_bytes": ({"log_batch_bytes": 5000}, "5000", {"logger"}),
    "log_batch_messages": ({"log_batch_messages": 50}, "50", {"logger"}),
    "compression": ({"compression": "zstd"}, "zstd", {"logger"}),
    "acks": ({"acks": "1"}, "1", {"logger"}),
    "idempotence": ({"idempotence": False}, "false", {"logger"}),
    "commit_interval_ms": ({"commit_interval_ms": 250}, "250", {"consumer"}),
    "auto_offset_reset": ({"auto_offset_reset": "error"}, "error", {"consumer"}),
    "security_protocol": ({"security_protocol": "ssl"}, "ssl", EVERY),
    "sasl_mechanism": ({**SASL, "sasl_mechanism": "SCRAM-SHA-512"}, "SCRAM-SHA-512", EVERY),
    "sasl_username": ({**SASL, "sasl_mechanism": "PLAIN"}, "ada", EVERY),
    "sasl_password": ({**SASL, "sasl_mechanism": "PLAIN"}, SECRET, EVERY),
    "ssl_ca_file": ({"ssl_ca_file": __file__}, __file__, EVERY),
    "ssl_certificate_file": ({"ssl_certificate_file": __file__}, __file__, EVERY),
    "ssl_key_file": ({"ssl_key_file": __file__}, __file__, EVERY),
    "ssl_key_password": ({"ssl_key_password": SECRET}, SECRET, EVERY),
    "ssl_verify": ({"ssl_verify": False, "allow_insecure": True}, "false", EVERY),
}


def test_every_property_of_librdkafka_has_its_effect_tested() -> None:
    with_property = {field for field, entry in DESCRIBED.items() if entry["kafka"]}
    assert with_property - {"kafka_address"} == set(EFFECTS)


@pytest.mark.parametrize("field", EFFECTS)
def test_settings_become_properties(field: str) -> None:
    changes, expected, whose = EFFECTS[field]
    name = DESCRIBED[field]["kafka"]
    changed, default = all_options(Settings(**changes)), all_options(Settings())
    for kind in changed:
        if kind in whose:
            assert changed[kind][name] == expected
            assert default[kind].get(name) != expected
        elif kind == "producer" and name in OF_PRODUCERS:
            assert changed[kind][name] == default[kind][name]
        else:
            assert name not in changed[kind]


def test_the_address_and_names_are_passed_on() -> None:
    options = consumer_options(Settings())
    assert options["bootstrap.servers"] == "127.0.0.1:1"
    assert (options["client.id"], options["group.id"]) == ("client", "group")


def test_consumer_arguments_become_properties() -> None:
    options = consumer_options(
        Settings(),
        max_poll_interval_s=90.5,
        session_timeout_s=12,
        heartbeat_interval_s=3,
        commit=False,
        partition_eof=True,
    )
    assert options["max.poll.interval.ms"] == "90500"
    assert options["session.timeout.ms"] == "12000"
    assert options["heartbeat.interval.ms"] == "3000"
    assert options["enable.auto.commit"] == "false"
    assert options["enable.partition.eof"] == "true"
    assert consumer_options(Settings())["enable.auto.commit"] == "true"


def test_what_no_setting_changes() -> None:
    client, consumer, producer, logger = all_options(Settings()).values()
    for options in (client, consumer, producer, logger):
        assert options["enable.metrics.push"] == "false"
    assert consumer["check.crcs"] == "true"
    assert consumer["fetch.queue.backoff.ms"] == "1"
    assert consumer["allow.auto.create.topics"] == "false"
    assert (producer["acks"], producer["enable.idempotence"]) == ("all", "true")
    assert (producer["linger.ms"], producer["compression.type"]) == ("5", "lz4")
    for options in (producer, logger):
        assert options["partitioner"] == "murmur2_random"
        assert options["topic.metadata.propagation.max.ms"] == "5000"
        # Each logger has bounds of its own.
        assert options["queue.buffering.max.messages"] == "0"
        assert options["queue.buffering.max.kbytes"] == "2147483647"


def test_by_default_loggers_send_as_copies_are_sent_but_for_their_batches() -> None:
    _, _, producer, logger = all_options(Settings()).values()
    assert {name for name in logger if producer.get(name) != logger[name]} == {
        "client.id",
        "batch.size",
        "batch.num.messages",
        "max.in.flight.requests.per.connection",
    }
    assert producer.keys() <= logger.keys()
    assert logger["client.id"] == "keven-logger"


@pytest.mark.parametrize("prefetch", [1 << 20, 2 << 20, 16 << 20, 256 << 20])
def test_a_fetch_fits_the_prefetch_window(prefetch: int) -> None:
    options = consumer_options(Settings(prefetch_bytes=prefetch))
    assert 1 << 20 <= int(options["fetch.max.bytes"]) <= min(max(prefetch // 4, 1 << 20), 4 << 20)
    assert int(options["queued.max.messages.kbytes"]) == prefetch >> 10


def _bounds() -> list[dict[str, Any]]:
    return [{entry["field"]: entry[side]} for entry in INTEGERS for side in ("low", "high")]


@pytest.mark.parametrize("changes", [{}, *_bounds()], ids=str)
def test_librdkafka_accepts_every_bound(changes: dict[str, Any]) -> None:
    settings = Settings(**changes)
    _, consumer, *producers = all_options(settings).values()
    assert Consumer(consumer).close(2000)
    for options in producers:
        assert Producer(options).close(1000) == 0


@pytest.mark.parametrize(
    "changes",
    [
        *({"compression": choice} for choice in DESCRIBED["compression"]["choices"]),
        *({"acks": choice} for choice in DESCRIBED["acks"]["choices"]),
        *({"acks": choice, "idempotence": False} for choice in DESCRIBED["acks"]["choices"]),
        {"acks": "all", "idempotence": True},
        {"log_batch_bytes": 2_147_483_647, "max_message_bytes": 1000},
        {"log_batch_bytes": 1, "max_message_bytes": 1_000_000_000},
    ],
    ids=str,
)
def test_librdkafka_accepts_every_choice_of_loggers(changes: dict[str, Any]) -> None:
    assert Producer(logger_options(Settings(**changes))).close(1000) == 0


# --- loggers ---------------------------------------------------------------------------------------------------------


def test_batch_loggers_linger_and_single_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    options_of = Settings.logger_options

    def options(settings: Settings, address: str, *, linger_ms: int) -> dict[str, str]:
        asked.append(linger_ms)
        return options_of(settings, address, linger_ms=linger_ms)

    monkeypatch.setattr(Settings, "logger_options", options)
    settings = Settings(kafka_address="127.0.0.1:1", linger_ms=77)
    try:
        KafkaBatchLogger(topic="nowhere", settings=settings).log(b"x")
        with pytest.raises(KafkaTimeoutError):
            KafkaLogger(topic="nowhere", settings=settings, timeout=0.01).log(b"x")
    finally:
        close_producers("127.0.0.1:1", 0)
    assert asked == [77, 0]


@pytest.mark.parametrize(
    ("environ", "acks", "idempotent", "warned"),
    [
        ({}, "all", "true", 0),
        ({"KEVEN_ACKS": "all"}, "all", "true", 0),
        ({"KEVEN_IDEMPOTENCE": "true"}, "all", "true", 0),
        ({"KEVEN_IDEMPOTENCE": "false"}, "all", "false", 0),
        ({"KEVEN_ACKS": "1"}, "1", "false", 1),
        ({"KEVEN_ACKS": "0"}, "0", "false", 1),
        ({"KEVEN_ACKS": "1", "KEVEN_IDEMPOTENCE": "false"}, "1", "false", 0),
        ({"KEVEN_ACKS": "0", "KEVEN_IDEMPOTENCE": "off"}, "0", "false", 0),
    ],
)
def test_acks_decide_on_idempotence_unless_it_is_set(
    caplog: pytest.LogCaptureFixture, environ: dict[str, str], acks: str, idempotent: str, warned: int
) -> None:
    settings = Settings.from_env(environ)
    for _ in range(3):  # one warning, however many loggers there are
        options = logger_options(settings)
        assert (options["acks"], options["enable.idempotence"]) == (acks, idempotent)
        assert options["max.in.flight.requests.per.connection"] == "5"
    assert len(caplog.messages) == warned
    for message in caplog.messages:
        assert f"KEVEN_ACKS={acks}" in message
        assert "idempotence is off" in message
        assert ("lost" in message) == (acks == "0")
    # Copies of records get lost under no setting.
    producer = settings.producer_options("b:1", "c", linger_ms=5)
    assert (producer["acks"], producer["enable.idempotence"]) == ("all", "true")


@pytest.mark.parametrize("acks", ["1", "0"])
def test_idempotence_needs_the_acknowledgement_of_all(acks: str) -> None:
    for make in (
        lambda: Settings.from_env({"KEVEN_ACKS": acks, "KEVEN_IDEMPOTENCE": "true"}),
        lambda: Settings(acks=acks, idempotence=True),
    ):
        with pytest.raises(ConfigurationError, match=rf"^KEVEN_IDEMPOTENCE=true needs KEVEN_ACKS=all, not {acks}: "):
            make()


@pytest.mark.parametrize(
    ("name", "env"),
    [
        ("linger.ms", "KEVEN_LINGER_MS"),
        ("batch.size", "KEVEN_LOG_BATCH_BYTES"),
        ("batch.num.messages", "KEVEN_LOG_BATCH_MESSAGES"),
        ("compression.type", "KEVEN_COMPRESSION"),
        ("acks", "KEVEN_ACKS"),
        ("enable.idempotence", "KEVEN_IDEMPOTENCE"),
        ("message.max.bytes", "KEVEN_MAX_MESSAGE_BYTES"),
    ],
)
def test_a_property_with_a_setting_is_no_further_option(name: str, env: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^KEVEN_RDKAFKA_OPTIONS: '{name}' .*\(it has .* own: {env}\)"):
        Settings(rdkafka_options={name: "1"})


@pytest.mark.parametrize("name", ["queue.buffering.max.messages", "queue.buffering.max.kbytes"])
def test_the_shared_queue_has_no_bounds_to_set(name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^KEVEN_RDKAFKA_OPTIONS: '{name}' is not on the list"):
        Settings(rdkafka_options={name: "1"})


def test_the_partitioner_is_the_loggers_alone() -> None:
    settings = Settings.from_env({"KEVEN_RDKAFKA_OPTIONS": "partitioner=consistent"})
    client, consumer, producer, logger = all_options(settings).values()
    assert "partitioner" not in client
    assert "partitioner" not in consumer
    assert producer["partitioner"] == "murmur2_random"
    assert logger["partitioner"] == "consistent"
    assert Producer(logger).close(1000) == 0
    with pytest.raises(ConfigurationError, match=r"partitioner='nonsense'"):
        Producer(logger_options(Settings(rdkafka_options={"partitioner": "nonsense"})))


@pytest.mark.parametrize("key", [None, b"12345678"], ids=["no key", "key"])
@pytest.mark.parametrize(
    ("changes", "size", "fits"),
    [
        ({"log_queue_messages": 1}, 10, 1),
        ({"log_queue_messages": 7}, 10, 7),
        ({"log_queue_bytes": 1024}, 100, 10),
        ({"log_queue_bytes": 1024}, 256, 4),
        ({"log_queue_bytes": 1024}, 1025, 1),  # a message that is larger than the bound may be alone
        ({"log_queue_bytes": 1024, "log_queue_messages": 3}, 100, 3),
    ],
    ids=str,
)
def test_the_bounds_of_a_loggers_queue(changes: dict[str, Any], size: int, fits: int, key: bytes | None) -> None:
    settings = Settings(kafka_address="127.0.0.1:1", **changes)
    logger, other = (KafkaBatchLogger(topic="nowhere", settings=settings, timeout=0.01) for _ in range(2))
    value = b"x" * (size - len(key or b""))  # a key counts as much as a value
    try:
        for _ in range(fits):
            logger.log(value, key=key)
        with pytest.raises(QueueFullError) as caught:
            logger.log(value, key=key)
        for part in (f"{fits} messages", f"{fits * size} bytes", "KEVEN_LOG_QUEUE_MESSAGES", "KEVEN_LOG_QUEUE_BYTES"):
            assert part in str(caught.value)
        assert logger.pending_count == fits
        other.log(value, key=key)  # the producer is shared, the bounds are not
    finally:
        close_producers("127.0.0.1:1", 0)
    for each, count in ((logger, fits), (other, 1)):
        with pytest.raises(DeliveryError) as failed:
            each.flush()
        assert failed.value.failed_count == count


# --- further properties ----------------------------------------------------------------------------------------------


def test_further_properties_win_over_the_settings() -> None:
    settings = Settings.from_env(
        {"KEVEN_RDKAFKA_OPTIONS": "fetch.min.bytes=100, queued.max.messages.kbytes = 4096,debug=cgrp,fetch"}
    )
    assert settings.rdkafka_options == {
        "fetch.min.bytes": "100",
        "queued.max.messages.kbytes": "4096",
        "debug": "cgrp,fetch",
    }
    client, consumer, producer, logger = all_options(settings).values()
    assert consumer["fetch.min.bytes"] == "100"
    assert consumer["queued.max.messages.kbytes"] == "4096"
    for options in (client, consumer, producer, logger):
        assert options["debug"] == "cgrp,fetch"
    for options in (client, producer, logger):
        assert "fetch.min.bytes" not in options
        assert "queued.max.messages.kbytes" not in options


@pytest.mark.parametrize("key", sorted(ALLOWED_OPTIONS))
def test_librdkafka_knows_every_allowed_property(key: str) -> None:
    for make in (Consumer, Producer):
        text = "accepted"
        try:
            make({key: "\x01", "group.id": "g"} if make is Consumer else {key: "\x01"}).close(100)
        except ConfigurationError as error:
            text = str(error)
        assert "No such configuration property" not in text


DANGEROUS = [
    "plugin.library.paths",
    "sasl.kerberos.kinit.cmd",
    "sasl.kerberos.keytab",
    "ssl.engine.location",
    "ssl.engine.id",
    "ssl.providers",
    "ssl.ca.location",
    "ssl.key.location",
    "ssl.keystore.location",
    "ssl.key.pem",
    "ssl.certificate.pem",
    "test.mock.num.brokers",
    "test.mock.broker.rtt",
    "sasl.oauthbearer.token.endpoint.url",
    "sasl.oauthbearer.client.secret",
    "sasl.password",
    "sasl.username",
    "enable.ssl.certificate.verification",
    "ssl.endpoint.identification.algorithm",
    "enable.sasl.oauthbearer.unsecure.jwt",
    "security.protocol",
    "bootstrap.servers",
    "metadata.broker.list",
    "group.id",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "auto.offset.reset",
    "check.crcs",
    "acks",
    "enable.idempotence",
    "enable.metrics.push",
    "opaque",
    "log_cb",
    "",
    "nonsense",
]


@pytest.mark.parametrize("key", DANGEROUS)
def test_properties_that_are_not_on_the_list_are_refused_without_their_value(key: str) -> None:
    makers: list[Callable[[], Settings]] = [lambda: Settings(rdkafka_options={key: SECRET})]
    if key:
        makers.append(lambda: Settings.from_env({"KEVEN_RDKAFKA_OPTIONS": f"{key}={SECRET}"}))
    for make in makers:
        with pytest.raises(ConfigurationError) as caught:
            make()
        text = str(caught.value)
        assert text.startswith(f"KEVEN_RDKAFKA_OPTIONS: {key!r} is not on the list")
        assert "fetch.min.bytes" in text
        assert SECRET not in text


def test_a_property_with_a_setting_of_its_own_is_pointed_to() -> None:
    with pytest.raises(ConfigurationError, match=r"it has a setting of its own: KEVEN_SASL_PASSWORD"):
        Settings(rdkafka_options={"sasl.password": "x"})


@pytest.mark.parametrize("text", [SECRET, f"={SECRET}", f",{SECRET}", f"fetch.min.bytes=1,={SECRET}"])
def test_entries_that_are_no_pair_are_refused_without_being_shown(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^KEVEN_RDKAFKA_OPTIONS: entry \d is not key=value") as caught:
        Settings.from_env({"KEVEN_RDKAFKA_OPTIONS": text})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("options", [{"fetch.min.bytes": 5}, {5: "x"}, [("fetch.min.bytes", "5")], "fetch.min.bytes=5"])
def test_properties_in_code_have_to_be_texts(options: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^KEVEN_RDKAFKA_OPTIONS"):
        Settings(rdkafka_options=options)


def test_a_wrong_value_of_an_allowed_property_fails_when_the_client_is_made() -> None:
    settings = Settings(rdkafka_options={"fetch.min.bytes": "many"})
    with pytest.raises(ConfigurationError, match=r"fetch\.min\.bytes='many'"):
        Consumer(consumer_options(settings))


def test_properties_are_copied() -> None:
    options = {"fetch.min.bytes": "5"}
    settings = Settings(rdkafka_options=options)
    options["plugin.library.paths"] = "/evil.so"
    assert "plugin.library.paths" not in consumer_options(settings)


# --- the new group protocol ------------------------------------------------------------------------------------------


def test_classic_properties_are_left_out_under_the_new_protocol(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "keven_core.kafka")
    classic = {"session.timeout.ms", "heartbeat.interval.ms"}
    assert classic <= consumer_options(Settings()).keys()
    assert not caplog.records
    settings = Settings(
        rdkafka_options={"group.protocol": "consumer", "partition.assignment.strategy": "cooperative-sticky"}
    )
    options = consumer_options(settings)
    assert not (classic | {"partition.assignment.strategy", "group.protocol.type"}) & options.keys()
    assert options["group.protocol"] == "consumer"
    (line,) = caplog.messages
    for key in (*classic, "partition.assignment.strategy"):
        assert key in line
    consumer = Consumer(options)  # librdkafka refuses the classic properties here
    consumer.close(1000)


def test_classic_properties_stay_under_the_classic_protocol() -> None:
    settings = Settings(rdkafka_options={"group.protocol": "classic", "partition.assignment.strategy": "range"})
    options = consumer_options(settings)
    assert options["session.timeout.ms"] == "6000"
    assert options["partition.assignment.strategy"] == "range"


# --- security --------------------------------------------------------------------------------------------------------


def test_unverified_certificates_need_an_explicit_permission(caplog: pytest.LogCaptureFixture) -> None:
    for make in (lambda: Settings(ssl_verify=False), lambda: Settings.from_env({"KEVEN_SSL_VERIFY": "false"})):
        with pytest.raises(ConfigurationError, match=r"KEVEN_SSL_VERIFY=false .* set KEVEN_ALLOW_INSECURE=true too"):
            make()
    settings = Settings.from_env({"KEVEN_SSL_VERIFY": "false", "KEVEN_ALLOW_INSECURE": "true"})
    assert settings.client_options("b:1", "c")["enable.ssl.certificate.verification"] == "false"
    assert any("certificates are not checked" in message for message in caplog.messages)
    assert "enable.ssl.certificate.verification" not in Settings().client_options("b:1", "c")


def test_permission_alone_changes_nothing() -> None:
    assert all_options(Settings(allow_insecure=True)) == all_options(Settings())


def test_plain_without_tls_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    Settings(**{**SASL, "sasl_mechanism": "PLAIN"}).client_options("b:1", "c")
    assert not caplog.records
    settings = Settings(**{**SASL, "sasl_mechanism": "PLAIN", "security_protocol": "sasl_plaintext"})
    settings.client_options("b:1", "c")
    assert any("PLAIN without TLS" in message for message in caplog.messages)
    assert SECRET not in caplog.text


def _token(config: str) -> tuple[str, float, str]:
    return "token", 0.0, "principal"


@pytest.mark.parametrize(
    ("protocol", "mechanism", "user", "password", "token"),
    list(
        itertools.product(
            ["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"],
            [None, "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"],
            [None, "ada"],
            [None, SECRET],
            [None, _token],
        )
    ),
)
def test_every_combination_of_sasl_settings(
    protocol: str, mechanism: str | None, user: str | None, password: str | None, token: Any
) -> None:
    def make() -> Settings:
        return Settings(
            security_protocol=protocol,
            sasl_mechanism=mechanism,
            sasl_username=user,
            sasl_password=password,
            oauth_token=token,
        )

    sasl = protocol.startswith("sasl")
    if sasl != (mechanism is not None):
        problem = "needs KEVEN_SASL_MECHANISM" if sasl else "has no effect with KEVEN_SECURITY_PROTOCOL"
    elif mechanism == "OAUTHBEARER" and token is None:
        problem = "needs a token callback"
    elif sasl and mechanism != "OAUTHBEARER" and not (user and password):
        problem = "needs KEVEN_SASL_USERNAME and KEVEN_SASL_PASSWORD"
    else:
        assert make().security_protocol == protocol
        return
    with pytest.raises(ConfigurationError, match=problem) as caught:
        make()
    assert SECRET not in str(caught.value)


def _with_every_secret() -> Settings:
    return Settings(**SASL, sasl_mechanism="SCRAM-SHA-256", ssl_key_password=SECRET, oauth_token=None)


def test_secrets_are_in_no_repr() -> None:
    settings = _with_every_secret()
    for shown in (repr(settings), str(settings), f"{settings}", f"{[settings]}", f"{settings!r:.5000}"):
        assert SECRET not in shown
        assert "sasl_username='ada'" in shown
    assert "_token" not in repr(
        Settings(security_protocol="sasl_ssl", sasl_mechanism="OAUTHBEARER", oauth_token=_token)
    )


def test_secrets_are_in_no_error(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"batch_size": 0},
        {"codec": "xml"},
        {"sasl_mechanism": None},
        {"security_protocol": "plaintext"},
        {"sasl_username": None},
        {"ssl_verify": False},
        {"rdkafka_options": {"sasl.password": SECRET}},
        {"sasl_password": SECRET.encode()},
        {"sasl_password": f"{SECRET}\x00"},
        {"ssl_key_password": f"{SECRET}\udc80"},
    ]
    good = {**SASL, "sasl_mechanism": "SCRAM-SHA-256", "ssl_key_password": SECRET}
    for changes in wrong:
        with pytest.raises(ConfigurationError) as caught:
            Settings(**{**good, **changes})
        assert SECRET not in repr(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize("field", ["ssl_ca_file", "ssl_certificate_file", "ssl_key_file"])
def test_a_file_that_cant_be_read_is_named_with_its_setting(field: str) -> None:
    settings = Settings(**{field: "/no/such/file.pem"})
    with pytest.raises(ConfigurationError, match=rf"^{DESCRIBED[field]['env']}='/no/such/file\.pem' can't be read"):
        settings.client_options("b:1", "c")


def test_secrets_are_in_no_error_of_the_clients(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("this is no key\n")
    settings = Settings(**SASL, sasl_mechanism="SCRAM-SHA-256", ssl_key_password=SECRET, ssl_key_file=str(key))
    for make, options in (
        (Consumer, consumer_options(settings)),
        (Producer, settings.producer_options("b:1", "c", linger_ms=5)),
        (Producer, settings.logger_options("b:1", linger_ms=5)),
    ):
        with pytest.raises(ConfigurationError) as caught:
            make(options)
        assert "ssl.key.location" in str(caught.value)
        assert SECRET not in repr(caught.value)


def test_a_secret_that_librdkafka_refuses_is_not_shown() -> None:
    # Nothing of librdkafka's own text about such a property is passed on, since it may hold the value.
    for key in ("sasl.password.nonsense", "client.secret", "ssl.key.pem.nonsense", "some.token"):
        with pytest.raises(ConfigurationError, match=rf"does not accept the value of {key}$") as caught:
            Producer({key: SECRET})
        assert SECRET not in repr(caught.value)


def test_errors_are_both_ours_and_value_errors() -> None:
    with pytest.raises(ValueError):
        Settings(batch_size=0)
    with pytest.raises(UsageError):
        Settings(batch_size=0)


# --- travelling ------------------------------------------------------------------------------------------------------


def test_settings_travel_to_a_worker_process() -> None:
    options = {"fetch.min.bytes": "5"}
    changes: dict[str, Any] = {"batch_size": 7, "acks": "1", "idempotence": False, "rdkafka_options": options}
    settings = Settings(**changes, **SASL, sasl_mechanism="PLAIN")
    copy = pickle.loads(pickle.dumps(settings))
    assert copy == settings
    assert all_options(copy) == all_options(settings)


def test_requests_in_flight_that_idempotence_does_not_allow() -> None:
    name = "max.in.flight.requests.per.connection"
    many = Settings(rdkafka_options={name: "10"})
    with pytest.raises(ConfigurationError, match=rf"{name}=10 .* KEVEN_IDEMPOTENCE=false"):
        many.logger_options("127.0.0.1:1", linger_ms=5)
    assert name not in many.producer_options("127.0.0.1:1", "copies", linger_ms=5)
    without = Settings(rdkafka_options={name: "10"}, idempotence=False)
    assert without.logger_options("127.0.0.1:1", linger_ms=5)[name] == "10"
    assert Settings(rdkafka_options={name: "2"}).logger_options("127.0.0.1:1", linger_ms=5)[name] == "2"
