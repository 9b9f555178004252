"""Settings: one typed object, read from the environment when a server or logger starts.

Each field of `Settings` says in its metadata which environment variable sets it, its unit, the librdkafka property it
becomes and what it does; docs/settings.md is made from the same metadata and checked against it by the tests.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from keven_core.kafka.codecs import codec_names
from keven_core.kafka.errors import ConfigurationError

__all__ = ["DEFAULT_ADDRESS", "Settings", "TokenSource", "describe_settings"]

logger = logging.getLogger("keven_core.kafka")

DEFAULT_ADDRESS = "keven-kafka:9092"

# Called with the value of sasl.oauthbearer.config; returns (token, expiry in seconds since the epoch, principal).
TokenSource = Callable[[str], tuple[str, float, str]]

_PROTOCOLS = ("plaintext", "ssl", "sasl_plaintext", "sasl_ssl")
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")

# Further librdkafka properties that the environment may set: only those that neither name files or addresses, run
# anything, nor weaken security or delivery. In code, `Settings(rdkafka_options=...)` takes the same list.
ALLOWED_OPTIONS = frozenset(
    {
        "api.version.request.timeout.ms",
        "broker.address.family",
        "broker.address.ttl",
        "client.dns.lookup",
        "client.rack",
        "connections.max.idle.ms",
        "debug",
        "fetch.error.backoff.ms",
        "fetch.max.bytes",
        "fetch.message.max.bytes",
        "fetch.min.bytes",
        "fetch.queue.backoff.ms",
        "fetch.wait.max.ms",
        "group.instance.id",
        "group.protocol",
        "group.remote.assignor",
        "isolation.level",
        "log_level",
        "max.in.flight.requests.per.connection",
        "metadata.max.age.ms",
        "partition.assignment.strategy",
        "partitioner",
        "queued.max.messages.kbytes",
        "queued.min.messages",
        "receive.message.max.bytes",
        "reconnect.backoff.max.ms",
        "reconnect.backoff.ms",
        "retry.backoff.max.ms",
        "retry.backoff.ms",
        "socket.connection.setup.timeout.ms",
        "socket.keepalive.enable",
        "socket.nagle.disable",
        "socket.receive.buffer.bytes",
        "socket.send.buffer.bytes",
        "socket.timeout.ms",
        "statistics.interval.ms",
        "topic.metadata.refresh.interval.ms",
    }
)

# Properties that the new group protocol refuses, defaults included (KIP-848).
_CLASSIC_ONLY = ("session.timeout.ms", "heartbeat.interval.ms", "partition.assignment.strategy", "group.protocol.type")


def _setting(
    default: Any,
    env: str,
    *,
    unit: str,
    effect: str,
    kafka: str = "",
    low: int | None = None,
    high: int | None = None,
    choices: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    # A default_factory, since dataclasses take a mapping for a mutable default.
    return dataclasses.field(
        default_factory=lambda: default,
        repr=not secret,
        metadata={
            "default": default,
            "env": env,
            "unit": unit,
            "kafka": kafka,
            "effect": effect,
            "low": low,
            "high": high,
            "choices": choices,
            "secret": secret,
        },
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of servers and loggers. `Settings.from_env()` reads the environment; every field can be given in code.

    Raises ConfigurationError, with name, value and what is allowed, when a value is wrong.
    """

    kafka_address: str | None = _setting(
        None,
        "KAFKA",
        unit="host:port, comma-separated",
        kafka="bootstrap.servers",
        effect="address of the brokers; wins over arguments unless the server is given honor_env=False",
    )
    batch_size: int = _setting(
        200,
        "KEVEN_BATCH_SIZE",
        unit="messages",
        low=1,
        high=100_000,
        effect="messages taken from librdkafka at a time; 50 to 500 keeps a batch in the processor's cache",
    )
    batch_timeout_ms: int = _setting(
        0,
        "KEVEN_BATCH_TIMEOUT_MS",
        unit="ms",
        low=0,
        high=60_000,
        effect="how long to wait for a fuller batch after its first record; added latency at low traffic",
    )
    prefetch_bytes: int = _setting(
        16 << 20,
        "KEVEN_PREFETCH_BYTES",
        unit="bytes",
        kafka="queued.max.messages.kbytes",
        low=1 << 20,
        high=1 << 30,
        effect="memory for fetched messages that wait to be handled; a bigger window is slower, not faster",
    )
    max_payload_bytes: int = _setting(
        16 << 20,
        "KEVEN_MAX_PAYLOAD_BYTES",
        unit="bytes",
        low=1024,
        high=1 << 30,
        effect="larger values are dead-lettered undecoded",
    )
    max_message_bytes: int = _setting(
        16 << 20,
        "KEVEN_MAX_MESSAGE_BYTES",
        unit="bytes",
        kafka="message.max.bytes",
        low=1000,
        high=1_000_000_000,
        effect="largest message that is sent; the topic's max.message.bytes has to allow it too",
    )
    commit_interval_ms: int = _setting(
        1000,
        "KEVEN_COMMIT_INTERVAL_MS",
        unit="ms",
        kafka="auto.commit.interval.ms",
        low=10,
        high=3_600_000,
        effect="how often stored offsets are committed in the background; bounds what comes again after a crash",
    )
    max_in_flight: int = _setting(
        0,
        "KEVEN_MAX_IN_FLIGHT",
        unit="records",
        low=0,
        high=100_000,
        effect="how many records a server handles at the same time; 0: one, or 100 where their order allows it",
    )
    workers: int = _setting(
        0,
        "KEVEN_WORKERS",
        unit="threads",
        low=0,
        high=1000,
        effect="threads for synchronous handlers; 0: the server's own, or up to 16 for several records in flight",
    )
    close_timeout_ms: int = _setting(
        10_000,
        "KEVEN_CLOSE_TIMEOUT_MS",
        unit="ms",
        low=100,
        high=600_000,
        effect="deadline of a server's last commit and of leaving the group, after its handlers; past it the exit code "
        "is not 0",
    )
    drain_timeout_ms: int = _setting(
        10_000,
        "KEVEN_DRAIN_TIMEOUT_MS",
        unit="ms",
        low=0,
        high=600_000,
        effect="how long handlers may run once a server is asked to end: records of the batch in hand are begun for "
        "half of it, the others are left for the next server; past it an async handler is cancelled. Together with "
        "KEVEN_CLOSE_TIMEOUT_MS below what stops the process waits for (Kubernetes: 30 s)",
    )
    auto_offset_reset: str = _setting(
        "earliest",
        "KEVEN_AUTO_OFFSET_RESET",
        unit="",
        kafka="auto.offset.reset",
        choices=("earliest", "latest", "error"),
        effect="where a group without committed offsets starts; error: the server stops instead",
    )
    codec: str = _setting(
        "json",
        "KEVEN_CODEC",
        unit="",
        choices=("json", "msgpack"),
        effect="how events are published, also by the name of a codec that was registered before (docs/codecs.md); "
        "consumers read all of them, mixed on one topic",
    )
    linger_ms: int = _setting(
        5,
        "KEVEN_LINGER_MS",
        unit="ms",
        kafka="linger.ms",
        low=0,
        # librdkafka would take more, but not as much as message.timeout.ms: 300 s.
        high=60_000,
        effect="how long KafkaBatchLogger waits for a fuller batch; added latency, and fewer and larger requests",
    )
    log_batch_bytes: int = _setting(
        1_000_000,
        "KEVEN_LOG_BATCH_BYTES",
        unit="bytes",
        kafka="batch.size",
        low=1,
        high=2_147_483_647,
        effect="largest batch of messages that is sent to a partition at once; the topic's max.message.bytes has to "
        "allow it",
    )
    log_batch_messages: int = _setting(
        10_000,
        "KEVEN_LOG_BATCH_MESSAGES",
        unit="messages",
        kafka="batch.num.messages",
        low=1,
        high=1_000_000,
        effect="most messages of such a batch",
    )
    log_queue_bytes: int = _setting(
        64 << 20,
        "KEVEN_LOG_QUEUE_BYTES",
        unit="bytes",
        low=1024,
        high=1 << 40,
        effect="values and keys that a logger may have under way; then log() waits, up to its timeout",
    )
    log_queue_messages: int = _setting(
        200_000,
        "KEVEN_LOG_QUEUE_MESSAGES",
        unit="messages",
        low=1,
        high=100_000_000,
        effect="messages that a logger may have under way; each takes about 350 bytes beside its value",
    )
    spill_bytes: int = _setting(
        1 << 30,
        "KEVEN_SPILL_BYTES",
        unit="bytes",
        low=64 << 10,
        high=1 << 50,
        effect="how much the files of a KafkaBatchLogger with spill_dir may take",
    )
    spill_fsync: str = _setting(
        "never",
        "KEVEN_SPILL_FSYNC",
        unit="",
        choices=("never", "interval", "always"),
        effect="when those files are forced to the disk, to survive a power cut too: when the system sees fit, every "
        "second, before log() returns",
    )
    large_attribute_dir: str | None = _setting(
        None,
        "KEVEN_LARGE_ATTRIBUTE_DIR",
        unit="path",
        effect="folder for attributes that are too large for a message (`large_attributes` of pickled events); writers "
        "and readers have to see the same; unset: one under the system's folder for temporary files, with a warning",
    )
    large_attribute_bytes: int = _setting(
        1 << 20,
        "KEVEN_LARGE_ATTRIBUTE_BYTES",
        unit="bytes",
        low=0,
        high=1 << 30,
        effect="larger ones of those attributes go into a file",
    )
    large_attribute_total_bytes: int = _setting(
        1 << 30,
        "KEVEN_LARGE_ATTRIBUTE_TOTAL_BYTES",
        unit="bytes",
        low=1024,
        high=1 << 40,
        effect="how much of them one message may have in files; more is refused, both written and read",
    )
    compression: str = _setting(
        "lz4",
        "KEVEN_COMPRESSION",
        unit="",
        kafka="compression.type",
        choices=("lz4", "zstd", "gzip", "snappy", "none"),
        effect="how batches are compressed",
    )
    acks: str = _setting(
        "all",
        "KEVEN_ACKS",
        unit="",
        kafka="acks",
        choices=("all", "1", "0"),
        effect="whose acknowledgement loggers wait for: of all in-sync replicas, of the leader, of nobody (messages "
        "can then be lost); retry and dead-letter copies always wait for all",
    )
    idempotence: bool | None = _setting(
        None,
        "KEVEN_IDEMPOTENCE",
        unit="true | false",
        kafka="enable.idempotence",
        effect="whether loggers write each message once and in order also when a request is repeated; unset: true "
        "with KEVEN_ACKS=all, else false",
    )
    fatal_exceptions: str = _setting(
        "",
        "KEVEN_FATAL_EXCEPTIONS",
        unit="class names, comma-separated",
        effect="exceptions of handlers whose records are dead-lettered at once, whatever the retry policy; a class "
        "stands for its subclasses too, and may be given without its module",
    )
    retryable_exceptions: str = _setting(
        "",
        "KEVEN_RETRYABLE_EXCEPTIONS",
        unit="class names, comma-separated",
        effect="if set, only records that failed with one of these are retried",
    )
    worker_hang_ms: int = _setting(
        0,
        "KEVEN_WORKER_HANG_MS",
        unit="ms",
        low=0,
        high=86_400_000,
        effect="a supervised worker that makes no progress for so long, with a record in hand or without, is killed "
        "and replaced; has to be longer than any handler takes; 0: the server's max_poll_interval (180 s)",
    )
    worker_memory_bytes: int = _setting(
        0,
        "KEVEN_WORKER_MEMORY_BYTES",
        unit="bytes",
        low=0,
        high=1 << 50,
        effect="a supervised worker whose resident memory grows beyond ends in order and is replaced; beyond twice as "
        "much it is killed; 0: no limit",
    )
    dead_letter_dialect: str = _setting(
        "spring",
        "KEVEN_DEAD_LETTER_DIALECT",
        unit="",
        choices=("spring", "kafka"),
        effect="names of the headers that say where a dead letter comes from and why: kafka_dlt-* or __dlq.errors.*",
    )
    dead_letters_in_a_row: int = _setting(
        1000,
        "KEVEN_DEAD_LETTERS_IN_A_ROW",
        unit="records",
        low=0,
        high=1_000_000_000,
        effect="the server stops when so many records are dead-lettered one after the other; 0: never",
    )
    dead_letters_percent: int = _setting(
        50,
        "KEVEN_DEAD_LETTERS_PERCENT",
        unit="percent",
        low=0,
        high=100,
        effect="the server stops when more of the last 10 000 records were dead-lettered; 100: never",
    )
    create_topics: bool = _setting(
        True,
        "KEVEN_CREATE_TOPICS",
        unit="true | false",
        effect="create the default, retry and dead-letter topics when they are missing",
    )
    strict: bool = _setting(
        False,
        "KEVEN_STRICT",
        unit="true | false",
        effect="refuse what is only warned of otherwise: a second handler for a command",
    )
    security_protocol: str = _setting(
        "plaintext",
        "KEVEN_SECURITY_PROTOCOL",
        unit="",
        kafka="security.protocol",
        choices=_PROTOCOLS,
        effect="whether connections use TLS and SASL",
    )
    sasl_mechanism: str | None = _setting(
        None, "KEVEN_SASL_MECHANISM", unit="", kafka="sasl.mechanism", choices=_MECHANISMS, effect="how clients log in"
    )
    sasl_username: str | None = _setting(
        None, "KEVEN_SASL_USERNAME", unit="", kafka="sasl.username", effect="user name for PLAIN and SCRAM"
    )
    sasl_password: str | None = _setting(
        None, "KEVEN_SASL_PASSWORD", unit="", kafka="sasl.password", secret=True, effect="password for PLAIN and SCRAM"
    )
    ssl_ca_file: str | None = _setting(
        None,
        "KEVEN_SSL_CA_FILE",
        unit="path",
        kafka="ssl.ca.location",
        effect="certificates that sign the brokers'; unset: the system's",
    )
    ssl_certificate_file: str | None = _setting(
        None,
        "KEVEN_SSL_CERTIFICATE_FILE",
        unit="path",
        kafka="ssl.certificate.location",
        effect="this client's own certificate, for mutual TLS",
    )
    ssl_key_file: str | None = _setting(
        None, "KEVEN_SSL_KEY_FILE", unit="path", kafka="ssl.key.location", effect="the key of that certificate"
    )
    ssl_key_password: str | None = _setting(
        None, "KEVEN_SSL_KEY_PASSWORD", unit="", kafka="ssl.key.password", secret=True, effect="password of that key"
    )
    ssl_verify: bool = _setting(
        True,
        "KEVEN_SSL_VERIFY",
        unit="true | false",
        kafka="enable.ssl.certificate.verification",
        effect="check the brokers' certificates and host names; false needs KEVEN_ALLOW_INSECURE=true",
    )
    allow_insecure: bool = _setting(
        False, "KEVEN_ALLOW_INSECURE", unit="true | false", effect="permit ssl_verify=False; for tests"
    )
    rdkafka_options: Mapping[str, str] = _setting(
        MappingProxyType({}),
        "KEVEN_RDKAFKA_OPTIONS",
        unit="key=value, comma-separated",
        effect="further librdkafka properties, from a checked list; they win over the other settings",
    )
    oauth_token: TokenSource | None = dataclasses.field(default=None, repr=False, metadata={})

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.metadata:
                _check(field, getattr(self, field.name))
        # A copy: nobody changes it after it was checked. A plain dict, since worker processes get settings by pickle.
        object.__setattr__(self, "rdkafka_options", dict(self.rdkafka_options))
        for key in self.rdkafka_options:
            if key not in ALLOWED_OPTIONS:
                raise ConfigurationError(
                    f"KEVEN_RDKAFKA_OPTIONS: {key!r} is not on the list of options that may be set this way"
                    f"{_hint(key)}; allowed: {', '.join(sorted(ALLOWED_OPTIONS))}"
                )
        if not self.ssl_verify and not self.allow_insecure:
            raise ConfigurationError(
                "KEVEN_SSL_VERIFY=false accepts any broker's certificate; if that is meant, set "
                "KEVEN_ALLOW_INSECURE=true too"
            )
        if self.idempotence and self.acks != "all":
            raise ConfigurationError(
                f"KEVEN_IDEMPOTENCE=true needs KEVEN_ACKS=all, not {self.acks}: leave one of them out"
            )
        self._check_sasl()

    def _check_sasl(self) -> None:
        uses_sasl = self.security_protocol.startswith("sasl")
        if uses_sasl and self.sasl_mechanism is None:
            raise ConfigurationError(
                f"KEVEN_SECURITY_PROTOCOL={self.security_protocol} needs KEVEN_SASL_MECHANISM: one of "
                f"{', '.join(_MECHANISMS)}"
            )
        if not uses_sasl and self.sasl_mechanism is not None:
            raise ConfigurationError(
                f"KEVEN_SASL_MECHANISM={self.sasl_mechanism} has no effect with KEVEN_SECURITY_PROTOCOL="
                f"{self.security_protocol}; set that to sasl_ssl or sasl_plaintext"
            )
        if self.sasl_mechanism == "OAUTHBEARER" and self.oauth_token is None:
            raise ConfigurationError(
                "KEVEN_SASL_MECHANISM=OAUTHBEARER needs a token callback, given in code: Settings(oauth_token=...)"
            )
        if uses_sasl and self.sasl_mechanism != "OAUTHBEARER" and not (self.sasl_username and self.sasl_password):
            raise ConfigurationError(
                f"KEVEN_SASL_MECHANISM={self.sasl_mechanism} needs KEVEN_SASL_USERNAME and KEVEN_SASL_PASSWORD"
            )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        """Settings from environment variables; `overrides` win over them. An empty variable counts as not set."""
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            text = environ.get(field.metadata.get("env", ""), "")
            if text:
                values[field.name] = _parse(field, text)
        return cls(**{**values, **overrides})

    def address(self, argument: str | None, *, honor_env: bool = True) -> str:
        """The brokers to connect to: KAFKA, else the argument, else the default name."""
        return (self.kafka_address if honor_env else None) or argument or DEFAULT_ADDRESS

    def listed(self, name: str) -> list[str]:
        """A comma-separated setting as a list."""
        return [entry for entry in (part.strip() for part in getattr(self, name).split(",")) if entry]

    def client_options(self, address: str, client_id: str) -> dict[str, str]:
        """librdkafka properties that consumers, producers and admin clients share. Holds secrets: never log it."""
        options = {
            "bootstrap.servers": address,
            "client.id": client_id,
            "security.protocol": self.security_protocol,
            # Metrics would be pushed to the broker without having been asked for (KIP-714).
            "enable.metrics.push": "false",
            "socket.keepalive.enable": "true",
            "socket.nagle.disable": "true",
        }
        named = {
            "sasl.mechanism": self.sasl_mechanism,
            "sasl.username": self.sasl_username,
            "sasl.password": self.sasl_password,
            "ssl.ca.location": self.ssl_ca_file,
            "ssl.certificate.location": self.ssl_certificate_file,
            "ssl.key.location": self.ssl_key_file,
            "ssl.key.password": self.ssl_key_password,
        }
        options.update({key: value for key, value in named.items() if value})
        for name in ("ssl_ca_file", "ssl_certificate_file", "ssl_key_file"):
            path = getattr(self, name)
            if path and not os.access(path, os.R_OK):
                raise ConfigurationError(f"KEVEN_{name.upper()}={path!r} can't be read: no such file, or no permission")
        if not self.ssl_verify:
            logger.warning("KEVEN_SSL_VERIFY=false: the brokers' certificates are not checked")
            options["enable.ssl.certificate.verification"] = "false"
        if self.sasl_mechanism == "PLAIN" and self.security_protocol == "sasl_plaintext":
            logger.warning("SASL PLAIN without TLS: the password crosses the network in clear")
        options.update({key: value for key, value in self.rdkafka_options.items() if key in _COMMON_OPTIONS})
        return options

    def consumer_options(
        self,
        address: str,
        client_id: str,
        group_id: str,
        *,
        max_poll_interval_s: float,
        session_timeout_s: float,
        heartbeat_interval_s: float,
        commit: bool,
        partition_eof: bool,
    ) -> dict[str, str]:
        """librdkafka properties of a consumer."""
        options = self.client_options(address, client_id)
        options.update(
            {
                "group.id": group_id,
                "enable.auto.commit": "true" if commit else "false",
                "auto.commit.interval.ms": str(self.commit_interval_ms),
                "auto.offset.reset": self.auto_offset_reset,
                "max.poll.interval.ms": str(int(max_poll_interval_s * 1000)),
                "session.timeout.ms": str(int(session_timeout_s * 1000)),
                "heartbeat.interval.ms": str(int(heartbeat_interval_s * 1000)),
                "enable.partition.eof": "true" if partition_eof else "false",
                "allow.auto.create.topics": "false",
                # Off by default in librdkafka: a damaged message would reach the decoder.
                "check.crcs": "true",
                # The default of 1000 ms makes a consumer that has filled its window pause for a second: 5x slower.
                "fetch.queue.backoff.ms": "1",
                # A window that stays in cache; the bytes bound it, not the count.
                "queued.max.messages.kbytes": str(max(1024, self.prefetch_bytes >> 10)),
                "queued.min.messages": "1000000",
                "fetch.message.max.bytes": str(1 << 20),
                "fetch.max.bytes": str(min(max(self.prefetch_bytes // 4, 1 << 20), 4 << 20)),
            }
        )
        options.update({key: value for key, value in self.rdkafka_options.items() if key not in _PRODUCER_OPTIONS})
        if options.get("group.protocol") == "consumer":
            dropped = [key for key in _CLASSIC_ONLY if options.pop(key, None) is not None]
            logger.info("group.protocol=consumer: the broker decides on %s, so they are left out", ", ".join(dropped))
        return options

    def producer_options(self, address: str, client_id: str, *, linger_ms: int) -> dict[str, str]:
        """librdkafka properties of a producer that loses nothing: of retry and dead-letter copies."""
        options = self.client_options(address, client_id)
        given = options.get(_IN_FLIGHT, "5")
        if given.isdigit() and int(given) > 5:
            del options[_IN_FLIGHT]  # for loggers that are not idempotent
        options.update(
            {
                "acks": "all",
                "enable.idempotence": "true",
                "compression.type": "lz4",
                "linger.ms": str(linger_ms),
                # As Java services partition, so that one key is one partition for all of them.
                "partitioner": "murmur2_random",
                "message.max.bytes": str(self.max_message_bytes),
                # Each sender of messages has bounds of its own; one that fills them must not stop the others.
                "queue.buffering.max.messages": "0",
                "queue.buffering.max.kbytes": "2147483647",
                # How long a topic that the brokers don't know may still be on its way to them; then its messages fail.
                "topic.metadata.propagation.max.ms": "5000",
            }
        )
        return options

    def logger_options(self, address: str, *, linger_ms: int) -> dict[str, str]:
        """librdkafka properties of a logger's producer."""
        idempotent = self.acks == "all" if self.idempotence is None else self.idempotence
        if not idempotent and self.idempotence is None:
            loss = "" if self.acks == "1" else ", or be lost without anybody being told"
            _warn_once(
                f"KEVEN_ACKS={self.acks}: idempotence is off, so messages can be written twice or out of order{loss}"
            )
        options = self.producer_options(address, "keven-logger", linger_ms=linger_ms)
        options.update(
            {
                "acks": self.acks,
                "enable.idempotence": str(idempotent).lower(),
                # librdkafka's own default without idempotence is a million: the whole queue, copied into requests.
                _IN_FLIGHT: "5",
                "compression.type": self.compression,
                "batch.size": str(self.log_batch_bytes),
                "batch.num.messages": str(self.log_batch_messages),
            }
        )
        options.update({key: value for key, value in self.rdkafka_options.items() if key in _PRODUCER_OPTIONS})
        in_flight = self.rdkafka_options.get(_IN_FLIGHT)
        if in_flight is not None:
            if idempotent and (not in_flight.isdigit() or int(in_flight) > 5):
                raise ConfigurationError(
                    f"KEVEN_RDKAFKA_OPTIONS: {_IN_FLIGHT}={in_flight} does not go with idempotence, which allows 1 to "
                    f"5: lower it, or set KEVEN_IDEMPOTENCE=false"
                )
            options[_IN_FLIGHT] = in_flight
        return options


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


_IN_FLIGHT = "max.in.flight.requests.per.connection"

# Options of loggers alone: a consumer would warn of them, and copies of messages keep what producer_options() says.
_PRODUCER_OPTIONS = frozenset({"partitioner"})

# Options that are neither the consumer's nor the loggers' alone.
_COMMON_OPTIONS = frozenset(
    key
    for key in ALLOWED_OPTIONS - _PRODUCER_OPTIONS
    if not key.startswith(("fetch.", "queued.", "group.", "partition.", "isolation.", "receive.", "client.rack"))
)


def _hint(key: str) -> str:
    from_settings = {
        field.metadata.get("kafka"): field.metadata["env"]
        for field in dataclasses.fields(Settings)
        if field.metadata.get("kafka")
    }
    return f" (it has a setting of its own: {from_settings[key]})" if key in from_settings else ""


def _parse(field: dataclasses.Field[Any], text: str) -> Any:
    env = field.metadata["env"]
    if field.type in ("int", int):
        try:
            return int(text)
        except ValueError:
            raise ConfigurationError(f"{env}={text!r} is not a whole number{_range(field)}") from None
    if field.type in ("bool", bool, "bool | None"):
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise ConfigurationError(f"{env}={text!r} is not a switch: true or false")
    if field.name == "rdkafka_options":
        options: dict[str, str] = {}
        last = ""
        for number, entry in enumerate(text.split(","), 1):
            key, separator, value = (part.strip() for part in entry.partition("="))
            if separator and key:
                options[key] = value
                last = key
            elif last and not separator:
                options[last] += f",{key}"  # a value may be a list itself: debug=cgrp,fetch
            else:
                # Not shown: somebody may have tried to set a password this way.
                raise ConfigurationError(f"{env}: entry {number} is not key=value; entries are separated by commas")
        return options
    return text


def _range(field: dataclasses.Field[Any]) -> str:
    low, high = field.metadata["low"], field.metadata["high"]
    return f"; allowed: {low} to {high} {field.metadata['unit']}" if low is not None else ""


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    meta = field.metadata
    env = meta["env"]
    shown = "<secret>" if meta["secret"] else repr(value)
    if field.type in ("int", int):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigurationError(f"{env}={shown} is not a whole number{_range(field)}")
        if not meta["low"] <= value <= meta["high"]:
            raise ConfigurationError(f"{env}={shown} is out of range{_range(field)}")
    elif field.type in ("bool", bool, "bool | None"):
        if not isinstance(value, bool) and not (value is None and "None" in str(field.type)):
            raise ConfigurationError(f"{env}={shown} is not a switch: true or false")
    elif field.name == "rdkafka_options":
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"{env}: a mapping of str to str is needed, not {type(value).__name__}")
        for key, text in value.items():
            _check_text(f"{env}: {key!r}", key)
            _check_text(f"{env}: the value of {key!r}", text)
    elif value is not None or "None" not in str(field.type):
        choices = codec_names() if field.name == "codec" else meta["choices"]
        if choices and value not in choices:
            raise ConfigurationError(f"{env}={shown} is not known; allowed: {', '.join(choices)}")
        _check_text(env, value)


def _check_text(what: str, value: object) -> None:
    """Refuse what can't be handed to librdkafka, without repeating it: it may be a secret."""
    if not isinstance(value, str):
        raise ConfigurationError(f"{what} has to be a str, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"{what} is not valid UTF-8") from None
    if "\x00" in value:
        raise ConfigurationError(f"{what} has a NUL character in it")


def describe_settings() -> list[dict[str, Any]]:
    """One dict per setting: env, default, unit, kafka (the librdkafka property), effect; the source of the docs."""
    return [
        {
            "env": field.metadata["env"],
            "field": field.name,
            "default": field.metadata["default"],
            **{key: field.metadata[key] for key in ("unit", "kafka", "effect", "choices", "low", "high")},
        }
        for field in dataclasses.fields(Settings)
        if field.metadata
    ]
