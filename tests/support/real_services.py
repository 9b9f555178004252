"""Services as child processes on a real Kafka, traffic for them, and the oracle that judges what they did.

Used by tests/integration and tests/faults. A service under test is a script of its own, written into the test's folder
and run by this interpreter, so that it can be killed like any other process. Its handler appends one line to a log for
each record that it has handled, in one write to a descriptor opened with O_APPEND: a line that was written survives
kill -9, and lines of several members do not mix.

Traffic comes from confluent-kafka, not from the code under test.
"""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

import keven_core
from keven_core.testing.pytest_plugin import skip_without_kafka
from keven_core.testing.real_kafka import RealKafka

DEADLINE_S = 60.0
ROOT = Path(keven_core.__file__).parents[1]

EAGER = ""
COOPERATIVE = "partition.assignment.strategy=cooperative-sticky"
KIP_848 = "group.protocol=consumer"
PROTOCOLS = pytest.mark.parametrize(
    "protocol", [EAGER, COOPERATIVE, KIP_848], ids=["eager", "cooperative-sticky", "kip-848"]
)


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> float:
    """Wait for a condition; returns the seconds that it took. Fails the test, saying `what`, when they are too many."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > deadline_s:
            pytest.fail(f"not within {deadline_s} s: {what}")
        time.sleep(0.02)
    return time.monotonic() - started


# --- Kafka -----------------------------------------------------------------------------------------------------------

_own: list[RealKafka] = []


def own_broker() -> RealKafka:
    """A broker that tests may kill, pause and cut off, behind a FaultProxy: one for all of them, made at first use.

    It ends with this process (RealKafka sees to that). See `healed` for how a test leaves it to the next.
    """
    skip_without_kafka(own_broker=True)
    if not _own:
        kafka = RealKafka(
            proxied=True,
            security=["sasl", "oauthbearer", "ssl", "sasl_ssl"],
            heap="512m",
            # Everybody may do everything, until a test makes a rule for its topic.
            config={
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "allow.everyone.if.no.acl.found": "true",
                "super.users": "User:ANONYMOUS",
            },
        )
        kafka.start()
        _own.append(kafka)
    return _own[0]


def heal(kafka: RealKafka) -> None:
    """End all faults of the own broker, whatever state a failed test left it in."""
    for proxy in kafka.proxies:
        proxy.restore()
    if kafka.pids:
        kafka.resume()
    else:
        kafka.restart()


def admin_of(address: str, **settings: Any) -> AdminClient:
    """An AdminClient that is quiet about lost connections."""
    return AdminClient({"bootstrap.servers": address, "log_level": 2, "reconnect.backoff.max.ms": 250, **settings})


def change_password(kafka: RealKafka, password: str) -> None:
    """Give the user "keven" another password (SCRAM-SHA-256), and wait until it can log in with it."""
    info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4096)
    change = UserScramCredentialUpsertion("keven", info, password.encode())
    admin = admin_of(kafka.direct_bootstrap_servers)  # its end would be the request's
    for future in admin.alter_user_scram_credentials([change]).values():
        future.result(20)

    def logs_in() -> bool:
        settings = kafka.client_config("sasl", mechanism="SCRAM-SHA-256") | {"sasl.password": password}
        try:
            return bool(admin_of(settings.pop("bootstrap.servers"), **settings).list_topics(timeout=1).brokers)
        except KafkaException:
            return False

    # The broker's controller has written it down; what asks for passwords learns of it a moment later.
    wait_until(logs_in, "the new password is known", 20)


def direct_address(kafka: Any) -> str:
    """The address that goes past the fault proxies, where there are any."""
    return (
        str(getattr(kafka, "direct_bootstrap_servers", kafka.bootstrap_servers))
        if getattr(kafka, "proxies", None)
        else str(kafka.bootstrap_servers)
    )


def topics_of(address: str) -> set[str]:
    """Names of the topics that there are."""
    return set(admin_of(address).list_topics(timeout=10).topics)


def committed(address: str, group: str, topic: str | None = None) -> dict[int, int]:
    """Committed offsets of a group by partition, as the broker knows them; of one topic, if it is named.

    Asked by a consumer that never joins: librdkafka 2.16 crashes when an AdminClient asks (ListConsumerGroupOffsets)
    while the coordinator is still loading.
    """
    client = Consumer({"bootstrap.servers": address, "group.id": group, "enable.auto.commit": False, "log_level": 2})
    try:
        known = client.list_topics(topic, timeout=20).topics if topic else client.list_topics(timeout=20).topics
        asked = [
            TopicPartition(name, partition)
            for name, found in known.items()
            if not name.startswith("__")
            for partition in found.partitions
        ]
        answers = client.committed(asked, timeout=20)
    finally:
        client.close()
    assert not any(entry.error for entry in answers), answers
    return {entry.partition: entry.offset for entry in answers if entry.offset >= 0}


def members_of(address: str, group: str) -> int:
    """How many members a group has now."""
    admin = admin_of(address)
    answer = admin.describe_consumer_groups([group], request_timeout=10)[group].result(20)
    return len(answer.members)


def quicken_group(address: str, group: str) -> None:
    """Under KIP-848 the broker decides: heartbeats every 5 s, and a killed member keeps its partitions for 45 s."""
    settings = {"consumer.heartbeat.interval.ms": "500", "consumer.session.timeout.ms": "2000"}
    entries = [
        ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in settings.items()
    ]
    resource = ConfigResource(ResourceType.GROUP, group, incremental_configs=entries)
    admin = admin_of(address)
    admin.incremental_alter_configs([resource])[resource].result(20)


def single_member_options(services: "Services", protocol: str, *, static: bool = True) -> str:
    """KEVEN_RDKAFKA_OPTIONS of a service of which one life follows another.

    With `static` the next life takes the partitions over at once, instead of when the session of this one has ended;
    under KIP-848 its broker is told to be quick instead.
    """
    options = ["reconnect.backoff.max.ms=300", *filter(None, [protocol])]
    if protocol == KIP_848:
        quicken_group(services.direct_address, services.group)
    elif static:
        options.append("group.instance.id=the-one")
    return ",".join(options)


def read_topic(address: str, topic: str, **settings: Any) -> list[Message]:
    """Every message of a topic, from its beginning to its end as of now."""
    # The end is read first: what comes later is another call's.
    client = Consumer(
        {"bootstrap.servers": address, "group.id": "none", "enable.auto.commit": False, "log_level": 2, **settings}
    )
    try:
        known = client.list_topics(topic, timeout=10).topics[topic]
        left: dict[int, int] = {}
        for partition in known.partitions:
            low, high = client.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
            if high > low:
                left[partition] = high
        client.assign([TopicPartition(topic, partition, 0) for partition in left])
        found: list[Message] = []
        deadline = time.monotonic() + DEADLINE_S
        while left:
            if time.monotonic() > deadline:
                pytest.fail(f"{topic} could not be read to its end: {left}")
            message = client.poll(0.2)
            if message is None:
                continue
            assert message.error() is None, message.error()
            found.append(message)
            if message.offset() + 1 >= left[message.partition()]:
                left.pop(message.partition())
                client.incremental_unassign([TopicPartition(topic, message.partition())])
        return found
    finally:
        client.close()


def origin(letter: Message) -> tuple[int, int]:
    """(partition, offset) of the record that a dead letter is a copy of."""
    headers = dict(letter.headers() or ())
    partition, offset = (headers[f"kafka_dlt-original-{name}"] or b"" for name in ("partition", "offset"))
    return struct.unpack(">i", partition)[0], struct.unpack(">q", offset)[0]


def send(address: str, topic: str, values: Iterable[bytes | None], *, partition: int = -1, **options: Any) -> None:
    """Produce values and wait for the acknowledgement of each. `options`: key, headers, timestamp, settings."""
    failed: list[KafkaError] = []
    settings = options.pop("settings", {})

    def delivered(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            failed.append(error)

    # Without this linger, messages without keys spread over the partitions; with it all may go to the same one.
    spread = {"enable.idempotence": True, "sticky.partitioning.linger.ms": 0}
    producer = Producer({"bootstrap.servers": address, "log_level": 2, **spread, **settings})
    for value in values:
        producer.produce(topic, value, partition=partition, on_delivery=delivered, **options)
    assert producer.flush(DEADLINE_S) == 0
    assert failed == []


def load_value(number: int) -> bytes:
    """The event that `Load` sends and the load worker handles."""
    return b'{"event_name":"LOAD","id":%d}' % number


class Load:
    """Numbered events, sent at a steady rate until stop(): a context manager around the traffic of a test.

    Each goes to partition `number % partitions`, so that the order in a partition is known; with `keys` it has one of
    so many. The producer is idempotent and patient, so every message arrives, once, also over an outage.

    A broker that has a message already, and knows no longer where, acknowledges it without an offset
    (DUPLICATE_SEQUENCE_NUMBER, after an outage); stop() looks such messages up in the topic.
    """

    def __init__(
        self, address: str, topic: str, partitions: int, *, rate: int = 1000, count: int | None = None, keys: int = 0
    ) -> None:
        self.topic = topic
        self.sent = 0
        self.acknowledged: dict[tuple[int, int], int] = {}  # (partition, offset) -> number
        self.address = address
        self.failed: list[str] = []
        self._unplaced: set[int] = set()  # acknowledged without an offset
        self._partitions = partitions
        self._rate = rate
        self._count = count
        self._keys = keys
        self._stopping = threading.Event()
        self._producer = Producer(
            {
                "bootstrap.servers": address,
                "log_level": 2,
                "enable.idempotence": True,
                "linger.ms": 5,
                "message.timeout.ms": 120_000,
                "reconnect.backoff.max.ms": 500,
            }
        )
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def ends(self) -> dict[int, int]:
        """By partition: the offset after the last acknowledged record."""
        ends: dict[int, int] = {}
        for partition, offset in self.acknowledged:
            ends[partition] = max(ends.get(partition, 0), offset + 1)
        return ends

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        self._thread.join(DEADLINE_S)

    @property
    def acknowledged_count(self) -> int:
        """Messages that Kafka has confirmed so far."""
        return len(self.acknowledged) + len(self._unplaced)

    def stop(self) -> None:
        """Send no more, and wait until everything sent is acknowledged."""
        self._stopping.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the load was not acknowledged in time"
        assert self.failed == []
        if self._unplaced:
            numbers = {load_value(number): number for number in self._unplaced}
            for message in read_topic(self.address, self.topic):
                if (number := numbers.get(message.value())) is not None:
                    self.acknowledged[message.partition(), message.offset()] = number
            self._unplaced.clear()
        assert len(self.acknowledged) == self.sent

    def finish(self) -> None:
        """Wait until `count` messages are sent and acknowledged."""
        self._thread.join(DEADLINE_S + (self._count or 0) / self._rate)
        self.stop()

    def _run(self) -> None:
        started = time.monotonic()
        while not self._stopping.is_set() and (self._count is None or self.sent < self._count):
            due = int((time.monotonic() - started) * self._rate) + 1
            if self._count is not None:
                due = min(due, self._count)
            while self.sent < due:
                self._send(self.sent)
                self.sent += 1
            self._producer.poll(0)
            self._stopping.wait(0.005)
        self._producer.flush(DEADLINE_S)

    def _send(self, number: int) -> None:
        def delivered(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                self.failed.append(str(error))
            elif message.offset() is None:
                self._unplaced.add(number)
            else:
                self.acknowledged[message.partition(), message.offset()] = number

        while True:
            try:
                self._producer.produce(
                    self.topic,
                    load_value(number),
                    key=b"%d" % (number % self._keys) if self._keys else None,
                    partition=number % self._partitions,
                    on_delivery=delivered,
                )
                return
            except BufferError:
                self._producer.poll(0.1)


# --- services --------------------------------------------------------------------------------------------------------

LOAD_WORKER = '''
"""A service that handles LOAD events and notes each in a log; its options are JSON in the first argument."""
import asyncio, json, logging, os, sys, time
from keven_core.kafka import Event, EventHandler, KafkaConsumerServer, current_record
from keven_core.kafka.events.server import start_events_receiver_server

options = json.loads(sys.argv[1])
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
log, begun = (os.open(options[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("log", "begun"))
work_s = options["work_s"]
fails_every = options["fails_every"]


class Load(Event):
    event_name = "LOAD"
    id: int


def begin(event):
    os.write(begun, b"+")
    if work_s >= 1:
        logging.info("at work")
    return current_record()


def note(event, record):
    if fails_every and event.id % fails_every == 0:
        os.write(begun, b"-")
        raise ValueError(f"{event.id} is one of those that fail")
    os.write(log, b"%d %d %d %d\\n" % (record.partition, record.offset, event.id, time.monotonic_ns()))


if options["asynchronous"]:

    async def work(event, record):
        if work_s:
            await asyncio.sleep(work_s)
        note(event, record)

    class Handler(EventHandler):
        event_name = "LOAD"

        async def handle_event(self, event):
            await work(event, begin(event))

else:

    class Handler(EventHandler):
        event_name = "LOAD"

        def handle_event(self, event):
            record = begin(event)
            if work_s:
                time.sleep(work_s)
            note(event, record)


exec(options["planted"])  # a mistake that the oracle has to find

start_events_receiver_server(server_name=options["group"], topics=options["topics"], **options["server"])
logging.info("ended in order")
'''


@dataclass(frozen=True)
class Handling:
    """One line of a worker's log: a record that was handled."""

    member: str
    partition: int
    offset: int
    number: int
    at_ns: int


class Service:
    """A child process: a script, or Python arguments, with its output in files."""

    def __init__(self, name: str, arguments: list[str], folder: Path, env: Mapping[str, str], **options: Any) -> None:
        self.name = name
        self._out = folder / f"{name}.out"
        self._err = folder / f"{name}.err"
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("KEVEN_", "KAFKA"))}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
        environment["PYTHONUNBUFFERED"] = "1"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                env={**environment, **env},
                stdout=out,
                stderr=err,
                **{"stdin": subprocess.DEVNULL, **options},
            )
        self.pid = self._process.pid

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        """What it has written to standard error so far."""
        return self._err.read_text(errors="replace")

    @property
    def returncode(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.poll()

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def type(self, line: str) -> None:
        """Write a line to its standard input (stdin=subprocess.PIPE)."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def terminate(self) -> None:
        """SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait(20)

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait until it has ended; returns the exit code."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.name} still runs after {timeout_s} s\n{self.tail()}")

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 20.0) -> None:
        """End it in order, and see that it says so: exit code 0."""
        self.send_signal(number)
        code = self.wait(timeout_s)
        assert code == 0, f"{self.name} ended with exit code {code}\n{self.tail()}"

    def wait_for(self, condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> float:
        """Wait for a condition while it runs; its end, or too long a time, fails the test and shows its output."""
        started = time.monotonic()
        while not condition():
            if self.returncode is not None and not condition():
                pytest.fail(f"{self.name} ended with exit code {self.returncode} before: {what}\n{self.tail()}")
            if time.monotonic() - started > deadline_s:
                pytest.fail(f"not within {deadline_s} s: {what}\n{self.tail()}")
            time.sleep(0.02)
        return time.monotonic() - started

    def wait_for_err(self, text: str, deadline_s: float = DEADLINE_S) -> float:
        """Wait until `text` stands on standard error."""
        return self.wait_for(lambda: text in self.err, f"{text!r} on standard error", deadline_s)

    @property
    def complaints(self) -> list[str]:
        """What it has written to standard error, but for what a broker that has just started makes it say."""
        return [line for line in self.err.splitlines() if "GETPID" not in line]

    def tail(self) -> str:
        """The end of what it has written, for failures."""
        return f"--- {self.name} stdout ---\n{self.out[-2000:]}\n--- {self.name} stderr ---\n{self.err[-6000:]}"


def _count(log: Path, mark: bytes) -> int:
    """How often a mark stands in a file, which may not be there yet."""
    try:
        return log.read_bytes().count(mark)
    except FileNotFoundError:
        return 0


class Worker(Service):
    """A service that runs LOAD_WORKER."""

    def __init__(self, name: str, arguments: list[str], folder: Path, env: Mapping[str, str], log: Path) -> None:
        self._log = log
        super().__init__(name, arguments, folder, env)

    @property
    def in_flight(self) -> int:
        """How many records it has begun, and has neither handled yet nor failed to handle."""
        begun = self._log.with_suffix(".begun")
        return _count(begun, b"+") - _count(begun, b"-") - self.count

    @property
    def handled(self) -> list[Handling]:
        """What it has handled so far, in order."""
        try:
            lines = self._log.read_text().splitlines()
        except FileNotFoundError:
            return []
        return [Handling(self.name, *map(int, line.split())) for line in lines]

    @property
    def count(self) -> int:
        """How many records it has handled so far."""
        return _count(self._log, b"\n")

    def wait_for_count(self, count: int, deadline_s: float = DEADLINE_S) -> float:
        """Wait until it has handled so many."""
        return self.wait_for(lambda: self.count >= count, f"{self.name} has handled {count} records", deadline_s)

    def wait_for_more(self, count: int = 50, deadline_s: float = DEADLINE_S) -> float:
        """Wait until it has handled so many more than now."""
        return self.wait_for_count(self.count + count, deadline_s)


def partitions_of(worker: Worker, since: int = 0) -> set[int]:
    """Where the records are from that it has handled, but for the first `since` of them."""
    return {entry.partition for entry in worker.handled[since:]}


class Services:
    """Starts the child processes of one test and ends what is left of them."""

    def __init__(self, folder: Path, address: str, direct_address: str, group: str) -> None:
        self.folder = folder
        self.address = address
        self.direct_address = direct_address
        self.group = group
        self._started: list[Service] = []

    def script(self, name: str, text: str) -> Path:
        """Write a script into the test's folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def run(
        self, name: str, *arguments: str, env: Mapping[str, str] | None = None, kafka: str | None = None, **options: Any
    ) -> Service:
        """Start Python with these arguments; KAFKA gives the address (`kafka`, or the fixture's)."""
        service = Service(
            name, list(arguments), self.folder, {"KAFKA": kafka or self.address, **(env or {})}, **options
        )
        self._started.append(service)
        return service

    def run_script(self, name: str, text: str, *arguments: str, **options: Any) -> Service:
        """Write a script and start it."""
        return self.run(name, str(self.script(f"{name}.py", text)), *arguments, **options)

    def worker(
        self,
        name: str,
        *topics: str,
        group: str | None = None,
        env: Mapping[str, str] | None = None,
        protocol: str = EAGER,
        rdkafka: str = "",
        work_s: float = 0.0,
        asynchronous: bool = False,
        planted: str = "",
        fails_every: int = 0,
        kafka: str | None = None,
        **server: Any,
    ) -> Worker:
        """Start a load worker.

        `topics` default to the one named like the group; `protocol` and `rdkafka` are entries of
        KEVEN_RDKAFKA_OPTIONS; `planted` is run by LOAD_WORKER before its server starts; `server` are further arguments
        of the launcher. Sessions are short (2 s), so that a test of a killed member does not wait for long.
        """
        log = self.folder / f"{name}.log"
        options = {
            "log": str(log),
            "begun": str(log.with_suffix(".begun")),
            "topics": list(topics) or [self.group],
            "group": group or self.group,
            "work_s": work_s,
            "asynchronous": asynchronous,
            "planted": planted,
            "fails_every": fails_every,
            "server": server,
        }
        environment = {"KAFKA": kafka or self.address, **(env or {})}
        if protocol == KIP_848:
            quicken_group(self.direct_address, group or self.group)
        else:
            server = {"session_timeout": 2, "heartbeat_interval": 0.5, **server}
            options["server"] = server
        entries = ",".join(filter(None, [protocol, rdkafka]))
        if entries:
            environment["KEVEN_RDKAFKA_OPTIONS"] = entries
        script = self.folder / "load_worker.py"
        if not script.exists():
            self.script(script.name, LOAD_WORKER)
        worker = Worker(name, [str(script), json.dumps(options)], self.folder, environment, log)
        self._started.append(worker)
        return worker

    def close(self) -> None:
        """Kill what still runs."""
        for service in self._started:
            if service.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(service.pid, signal.SIGCONT)
                service.kill()


# --- the oracle ------------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What became of the records that were sent. Lists hold (partition, offset) pairs.

    Attributes:
        lost: acknowledged, and never handled.
        invented: handled, and never sent; or under another number.
        disordered: handled for the first time after a later record of its partition: order broken, or a skip made good.
        repeated: handled again, once for each time.
        rewinds: per partition, how often handling went back.
        handled: how many different records were handled.
    """

    lost: list[tuple[int, int]] = field(default_factory=list)
    invented: list[tuple[int, int]] = field(default_factory=list)
    disordered: list[tuple[int, int]] = field(default_factory=list)
    repeated: list[tuple[int, int]] = field(default_factory=list)
    rewinds: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    handled: int = 0

    def __str__(self) -> str:
        shown = {
            name: f"{len(found)}: {found[:10]}"
            for name in ("lost", "invented", "disordered", "repeated")
            if (found := getattr(self, name))
        }
        return f"{self.handled} handled, {shown or 'nothing wrong'}"


def judge(
    sent: Mapping[tuple[int, int], int],
    workers: Iterable[Worker],
    lane: Callable[[Handling], Any] = lambda entry: entry.partition,
) -> Verdict:
    """Compare what Kafka acknowledged, (partition, offset) to number, with what the workers handled.

    What has the same `lane` is to be handled in order. Times of all members come from one monotonic clock, so their
    order is the order of events.
    """
    verdict = Verdict()
    highest: dict[Any, int] = defaultdict(lambda: -1)
    last: dict[int, int] = defaultdict(lambda: -1)
    seen: set[tuple[int, int]] = set()
    for entry in sorted((entry for worker in workers for entry in worker.handled), key=lambda entry: entry.at_ns):
        key = (entry.partition, entry.offset)
        if sent.get(key) != entry.number:
            verdict.invented.append(key)
        if key in seen:
            verdict.repeated.append(key)
        elif entry.offset < highest[lane(entry)]:
            verdict.disordered.append(key)
        if entry.offset <= last[entry.partition]:
            verdict.rewinds[entry.partition] += 1
        seen.add(key)
        last[entry.partition] = entry.offset
        highest[lane(entry)] = max(highest[lane(entry)], entry.offset)
    verdict.lost = sorted(set(sent) - seen)
    verdict.handled = len(seen)
    return verdict


def assert_delivered(
    sent: Mapping[tuple[int, int], int],
    *workers: Worker,
    repeats: int | None = 0,
    lane: Callable[[Handling], Any] = lambda entry: entry.partition,
) -> Verdict:
    """At least once, in order, nothing skipped; at most `repeats` records again (None: any number)."""
    verdict = judge(sent, workers, lane)
    text = f"{verdict}\n" + "\n".join(worker.tail() for worker in workers)
    assert not verdict.lost, text
    assert not verdict.invented, text
    assert not verdict.disordered, text
    if repeats is not None:
        assert len(verdict.repeated) <= repeats, text
    return verdict


def wait_until_all_handled(load: Load, *workers: Worker, deadline_s: float = DEADLINE_S) -> None:
    """Wait until the workers together have handled everything that was acknowledged."""

    def rest() -> set[tuple[int, int]]:
        return set(load.acknowledged) - {(entry.partition, entry.offset) for w in workers for entry in w.handled}

    started = time.monotonic()
    while rest():
        if time.monotonic() - started > deadline_s:
            missing = sorted(rest())
            pytest.fail(
                f"not handled within {deadline_s} s: {len(missing)} records, {missing[:10]}\n"
                + "\n".join(worker.tail() for worker in workers)
            )
        time.sleep(0.1)
