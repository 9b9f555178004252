"""on_assign, on_revoke and on_lost on real Kafka, in each group protocol; static members."""

import itertools
import json
import os
import re
import signal
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest
from real_services import (
    COOPERATIVE,
    EAGER,
    KIP_848,
    PROTOCOLS,
    Load,
    Service,
    Services,
    committed,
    load_value,
    members_of,
    quicken_group,
    send,
    wait_until,
)

pytestmark = pytest.mark.real_kafka

SOAK = pytest.mark.soak

HOOKED = """
import json, logging, os, sys, time
from keven_core.kafka import current_record, event_handler
from keven_core.kafka.events.server import start_events_receiver_server

topic, asynchronous = sys.argv[1], sys.argv[2] == "True"
options = json.loads(sys.argv[3])
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

def say(kind, places):
    os.write(1, (json.dumps([kind, time.monotonic_ns(), places]) + "\\n").encode())

@event_handler("LOAD")
def handle(event):
    record = current_record()
    say("handled", {record.partition: record.offset})

def hook(kind):
    def call(server, partitions):
        known = server.committed()
        say(kind, {entry.partition: [entry.offset, known[entry.topic, entry.partition]] for entry in partitions})

    async def call_async(server, partitions):
        call(server, partitions)

    return call_async if asynchronous else call

hooks = {"on_" + kind: hook(kind) for kind in ("assign", "revoke", "lost")}
start_events_receiver_server(server_name=topic, topics=[topic], **hooks, **options)
"""


@dataclass
class Entry:
    """A line of a service's journal: `places` is by partition."""

    kind: str
    at_ns: int
    places: dict[int, Any]


class Hooked:
    """A service whose hooks and handler keep a journal on standard output."""

    def __init__(self, service: Service) -> None:
        self.service = service

    @property
    def journal(self) -> list[Entry]:
        lines = [json.loads(line) for line in self.service.out.splitlines(keepends=True) if line.endswith("\n")]
        return [Entry(kind, at_ns, {int(key): place for key, place in places.items()}) for kind, at_ns, places in lines]

    def of(self, kind: str) -> list[Entry]:
        return [entry for entry in self.journal if entry.kind == kind]

    @property
    def owned(self) -> set[int]:
        owned: set[int] = set()
        for entry in self.journal:
            if entry.kind == "assign":
                owned |= set(entry.places)
            elif entry.kind != "handled":
                owned -= set(entry.places)
        return owned

    def stop(self) -> None:
        self.service.stop()

    def check(self, *, lost: bool = False) -> dict[int, list[tuple[int, int]]]:
        """Whether the hooks were called as promised; when each partition was owned, in nanoseconds."""
        owned: dict[int, int] = {}
        position: dict[int, int] = {}
        spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for entry in self.journal:
            for partition, place in entry.places.items():
                if entry.kind == "assign":
                    assert partition not in owned, self.service.tail()
                    owned[partition] = entry.at_ns
                    position.pop(partition, None)
                elif entry.kind == "handled":
                    assert partition in owned, self.service.tail()
                    position[partition] = place + 1
                else:
                    assert lost or entry.kind == "revoke", self.service.tail()
                    offset, known = place
                    assert offset == position.get(partition, -1001), self.service.tail()
                    if entry.kind == "revoke" and partition in position:
                        assert known == offset, self.service.tail()
                    spans[partition].append((owned.pop(partition), entry.at_ns))
        assert not owned or self.service.returncode is None, self.service.tail()
        return spans


def _start(
    services: Services, name: str, protocol: str, asynchronous: bool = False, instance: str = "", **options: Any
) -> Hooked:
    entries = [protocol, f"group.instance.id={instance}" if instance else "", "reconnect.backoff.max.ms=300"]
    if protocol == KIP_848:
        quicken_group(services.direct_address, services.group)
    options = {"session_timeout": 2, "heartbeat_interval": 0.3, **options}
    env = {"KEVEN_RDKAFKA_OPTIONS": ",".join(filter(None, entries)), "KEVEN_COMMIT_INTERVAL_MS": "60000"}
    arguments = (services.group, str(asynchronous), json.dumps(options))
    return Hooked(services.run_script(name, HOOKED, *arguments, env=env))


@pytest.mark.parametrize(
    ("protocol", "asynchronous"),
    [
        pytest.param(EAGER, False, id="eager sync"),
        pytest.param(KIP_848, True, id="kip-848 async"),
        pytest.param(EAGER, True, id="eager async", marks=SOAK),
        pytest.param(COOPERATIVE, False, id="cooperative-sticky sync", marks=SOAK),
        pytest.param(COOPERATIVE, True, id="cooperative-sticky async", marks=SOAK),
        pytest.param(KIP_848, False, id="kip-848 sync", marks=SOAK),
    ],
)
def test_hooks_in_rebalances_under_load(
    kafka: Any, services: Services, topic: str, protocol: str, asynchronous: bool
) -> None:
    with Load(kafka.bootstrap_servers, topic, 4) as load:
        first = _start(services, "first", protocol, asynchronous)
        first.service.wait_for(lambda: len(first.of("handled")) > 50, "the first handles records")
        second = _start(services, "second", protocol, asynchronous)
        second.service.wait_for(lambda: len(second.of("handled")) > 50, "the second handles records")
        wait_until(lambda: len(first.owned) == len(second.owned) == 2, "each has two partitions")
        first.stop()
        second.service.wait_for(lambda: len(second.owned) == 4, "the second has taken over")
        load.stop()
        second.service.wait_for(
            lambda: (
                {partition: end for entry in second.of("handled") for partition, end in entry.places.items()}
                == {partition: end - 1 for partition, end in load.ends().items()}
            ),
            "all is handled",
        )
        second.stop()
    assert committed(kafka.bootstrap_servers, topic) == load.ends()
    assert first.of("revoke"), first.service.tail()
    assert not first.owned, first.service.tail()
    assert not second.owned, second.service.tail()
    # What one has given up the other gets, and not before.
    spans = [first.check(), second.check()]
    for partition in range(4):
        ordered = sorted(span for each in spans for span in each[partition])
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ordered)), ordered
    handled = [place for each in (first, second) for entry in each.of("handled") for place in entry.places.items()]
    assert len(handled) == len(set(handled)) == len(load.acknowledged)


@SOAK
@PROTOCOLS
def test_partitions_that_are_lost(kafka: Any, services: Services, topic: str, protocol: str) -> None:
    """The first does not run for longer than its session lasts; when it goes on its partitions are another's."""
    send(kafka.bootstrap_servers, topic, [load_value(number) for number in range(20)], partition=0)
    first = _start(services, "first", protocol)
    first.service.wait_for(lambda: len(first.of("handled")) == 20, "the first handles records")
    os.kill(first.service.pid, signal.SIGSTOP)
    second = _start(services, "second", protocol)
    second.service.wait_for(lambda: len(second.owned) == 4, "the second has all partitions")
    os.kill(first.service.pid, signal.SIGCONT)
    first.service.wait_for(lambda: first.of("lost"), "the first is told")
    (lost,) = first.of("lost")
    assert set(lost.places) == {0, 1, 2, 3}
    # Nothing of it could be committed.
    assert lost.places[0] == [20, -1]
    assert not first.of("revoke")
    first.service.wait_for(lambda: first.owned, "the first is a member again")
    first.stop()
    second.stop()
    first.check(lost=True)
    second.check()


RAISES = """
import sys
from keven_core.kafka import event_handler
from keven_core.kafka.events.server import start_events_receiver_server

@event_handler("LOAD")
def handle(event):
    print("handled", flush=True)

def refuse(server, partitions):
    raise RuntimeError(f"{len(partitions)} partitions are too many")

start_events_receiver_server(server_name=sys.argv[1], topics=[sys.argv[1]], **{sys.argv[2]: refuse})
"""


@pytest.mark.soak
@pytest.mark.parametrize("hook", ["on_assign", "on_revoke"])
def test_an_exception_of_a_hook_ends_the_script(kafka: Any, services: Services, topic: str, hook: str) -> None:
    send(kafka.bootstrap_servers, topic, [load_value(1)], partition=0)
    service = services.run_script("service", RAISES, topic, hook)
    if hook == "on_revoke":
        service.wait_for(lambda: "handled" in service.out, "the record")
        service.terminate()
    assert service.wait(20) == 1, service.tail()
    assert "RuntimeError: 4 partitions are too many" in service.err
    assert service.out.count("handled") == (hook == "on_revoke")
    assert committed(kafka.bootstrap_servers, topic) == ({0: 1} if hook == "on_revoke" else {})
    assert members_of(kafka.bootstrap_servers, topic) == 0  # it has left


# --- static members --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "protocol",
    [
        pytest.param(EAGER, id="eager"),
        pytest.param(COOPERATIVE, id="cooperative-sticky", marks=SOAK),
        pytest.param(KIP_848, id="kip-848", marks=SOAK),
    ],
)
def test_a_static_member_that_restarts_costs_the_others_nothing(
    kafka: Any, services: Services, topic: str, protocol: str
) -> None:
    session = {"session_timeout": 15, "heartbeat_interval": 0.3}
    first = _start(services, "first", protocol, instance="one", **session)
    first.service.wait_for(lambda: len(first.owned) == 4, "the first has all partitions")
    second = _start(services, "second", protocol, instance="two", **session)
    wait_until(lambda: len(first.owned) == len(second.owned) == 2, "each has two partitions")
    had = second.owned
    changes = len(first.journal)
    second.stop()
    send(kafka.bootstrap_servers, topic, [load_value(1)], partition=min(had))
    again = _start(services, "again", protocol, instance="two", **session)
    again.service.wait_for(lambda: again.of("handled"), "its record was waiting for it")
    assert again.owned == had
    assert len(first.journal) == changes, first.service.tail()
    again.stop()
    first.stop()


@pytest.mark.parametrize(
    ("protocol", "fenced"),
    [
        pytest.param(EAGER, "first", id="eager"),
        pytest.param(COOPERATIVE, "first", id="cooperative-sticky", marks=SOAK),
        pytest.param(KIP_848, "second", id="kip-848", marks=SOAK),
    ],
)
def test_two_members_with_one_name(kafka: Any, services: Services, topic: str, protocol: str, fenced: str) -> None:
    """Classic groups fence the older one; under KIP-848 the newer one is refused. Either says so, and ends."""
    first = _start(services, "first", protocol, instance="same")
    first.service.wait_for(lambda: len(first.owned) == 4, "the first has all partitions")
    send(kafka.bootstrap_servers, topic, [load_value(number) for number in range(3)], partition=0)
    first.service.wait_for(lambda: len(first.of("handled")) == 3, "the first handles records")
    second = _start(services, "second", protocol, instance="same")
    members = {"first": first, "second": second}
    out = members.pop(fenced)
    (stays,) = members.values()
    assert out.service.wait(20) == 1, out.service.tail()
    last = out.service.err.strip().splitlines()[-1]
    reason = "FENCED_INSTANCE_ID" if fenced == "first" else "UNRELEASED_INSTANCE_ID"
    assert re.search(rf"KafkaError: the consumer can't go on: .*instance.*\({reason}\)", last), out.service.tail()
    if fenced == "first":
        # Its partitions are another's, so it is told of their loss.
        assert [entry.kind for entry in out.journal if entry.kind != "handled"] == ["assign", "lost"]
        out.check(lost=True)
    stays.service.wait_for(lambda: len(stays.owned) == 4, "the other one goes on")
    stays.stop()
