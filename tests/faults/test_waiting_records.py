"""Records that failed once are handled in the end, whatever dies meanwhile: nothing is lost between two topics.

The service under test fails at the first attempt of every fifth record, and is given it again from the retry topic. It
prints each record that it has handled, by where it first stood; the oracle compares that with what was sent.
"""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from real_services import EAGER, KIP_848, Load, Service, Services, committed, single_member_options, wait_until

from keven_core.testing.proxy import PRODUCE
from keven_core.testing.real_kafka import RealKafka

pytestmark = pytest.mark.real_kafka

KILLS = 3
RATE = 500
PARTITIONS = 4

SERVICE = '''
"""Handles LOAD events, every fifth at the second attempt; its options are JSON in the first argument."""
import json, logging, os, sys
from keven_core.kafka import Event, EventHandler, RetryPolicy, current_record
from keven_core.kafka.events.server import start_events_receiver_server

options = json.loads(sys.argv[1])
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

if options["planted"]:
    # The mistake that the oracle has to find: offsets are stored without waiting for the copies.
    from keven_core.kafka._promises import Promises

    Promises.made = property(lambda self: False)


class Load(Event):
    event_name = "LOAD"
    id: int


def handle(event):
    record = current_record()
    if event.id % 5 == 0 and record.attempt == 1:
        raise ConnectionError("not yet")
    os.write(1, b"%d %d %d\\n" % (record.partition, record.offset, record.attempt))


class Handler(EventHandler):
    event_name = "LOAD"
    retry_policy = RetryPolicy(3, 0.3)

    if options["asynchronous"]:
        async def handle_event(self, event):
            handle(event)
    else:
        def handle_event(self, event):
            handle(event)


start_events_receiver_server(
    server_name=options["group"], topics=[options["group"]], session_timeout=2, heartbeat_interval=0.5
)
logging.info("ended in order")
'''


class Retrying:
    """One life of the service."""

    def __init__(
        self,
        services: Services,
        name: str,
        *,
        asynchronous: bool = False,
        protocol: str = EAGER,
        planted: bool = False,
        static: bool = True,
    ) -> None:
        options = {"group": services.group, "asynchronous": asynchronous, "planted": planted}
        env = {
            "KEVEN_RDKAFKA_OPTIONS": single_member_options(services, protocol, static=static),
            "KEVEN_COMMIT_INTERVAL_MS": "100",
        }
        self.service: Service = services.run_script(name, SERVICE, json.dumps(options), env=env)

    @property
    def handled(self) -> list[tuple[int, int, int]]:
        """(partition, offset, attempt) of the records that it has handled."""
        lines = self.service.out.splitlines()
        return [(int(part), int(offset), int(attempt)) for part, offset, attempt in map(str.split, lines)]

    @property
    def second_attempts(self) -> int:
        """How many records it has handled at another attempt than the first."""
        return sum(attempt > 1 for _, _, attempt in self.handled)


def missing_of(load: Load, lives: list[Retrying]) -> set[tuple[int, int]]:
    handled = {entry[:2] for life in lives for entry in life.handled}
    return set(load.acknowledged) - handled


def all_handled(load: Load, lives: list[Retrying]) -> None:
    """Wait until each record that was sent has been handled, at the attempt that it had to be."""
    wait_until(lambda: not missing_of(load, lives), "everything is handled")
    attempts: dict[tuple[int, int], set[int]] = {}
    for life in lives:
        for part, offset, attempt in life.handled:
            attempts.setdefault((part, offset), set()).add(attempt > 1)
    for key, number in load.acknowledged.items():
        assert attempts[key] == {number % 5 == 0}


@pytest.mark.parametrize(("asynchronous", "protocol"), [(False, EAGER), (True, KIP_848)], ids=["sync", "async-kip-848"])
def test_kill_9(
    own_kafka: RealKafka, own_services: Services, own_topic: str, asynchronous: bool, protocol: str
) -> None:
    lives: list[Retrying] = []
    address = own_kafka.direct_bootstrap_servers
    with Load(address, own_topic, PARTITIONS, rate=RATE) as load:
        for kill in range(KILLS):
            life = Retrying(own_services, f"victim-{kill}", asynchronous=asynchronous, protocol=protocol)
            lives.append(life)
            life.service.wait_for(lambda life=life: life.second_attempts >= 40, "records come again")
            sent = load.acknowledged_count
            # The first copies of a life are acknowledged late, and nothing is committed before.
            life.service.wait_for(
                lambda sent=sent: sum(committed(address, own_topic, own_topic).values()) >= sent, "that is committed"
            )
            sent = load.acknowledged_count
            life.service.kill()
            assert life.service.returncode == -9
            wait_until(lambda sent=sent: load.acknowledged_count > sent, "messages are sent on")
        load.stop()
    # The last kill hit records that were waiting.
    assert missing_of(load, lives)
    last = Retrying(own_services, "last", asynchronous=asynchronous, protocol=protocol)
    lives.append(last)
    all_handled(load, lives)
    last.service.stop()
    assert committed(address, own_topic, own_topic) == load.ends()
    # A kill brings back what was not committed: some commit intervals' worth.
    handled = Counter(entry[:2] for life in lives for entry in life.handled)
    assert sum(handled.values()) - len(handled) < KILLS * RATE


def killed_while_copies_are_lost(
    kafka: RealKafka, services: Services, topic: str, *, planted: bool, more: int
) -> tuple[Load, Retrying]:
    """Lose all requests with copies, let it handle so many records more, and kill it; the load and the victim."""
    proxy = kafka.proxies[0]
    with Load(kafka.direct_bootstrap_servers, topic, PARTITIONS, rate=RATE) as load:
        victim = Retrying(services, "victim", planted=planted)
        victim.service.wait_for(lambda: victim.second_attempts >= 20, "records come again")
        hits = proxy.requests_hit[PRODUCE]
        proxy.drop_api(PRODUCE, on="request")
        victim.service.wait_for(lambda: proxy.requests_hit[PRODUCE] > hits, "copies are lost")
        count = len(victim.handled)
        victim.service.wait_for(lambda: len(victim.handled) > count + more, "it goes on")
        victim.service.kill()
        proxy.restore()
        load.stop()
    return load, victim


def test_the_oracle_finds_a_commit_before_the_copy(
    own_kafka: RealKafka, own_services: Services, own_topic: str
) -> None:
    """Offsets that do not wait for copies: requests that are lost with the process take records with them."""
    load, victim = killed_while_copies_are_lost(own_kafka, own_services, own_topic, planted=True, more=300)
    last = Retrying(own_services, "last")
    address = own_kafka.direct_bootstrap_servers
    last.service.wait_for(lambda: committed(address, own_topic, own_topic) == load.ends(), "everything is committed")
    last.service.stop()
    assert missing_of(load, [victim, last]), "the oracle is blind"


def test_offsets_stay_while_copies_are_not_acknowledged(
    own_kafka: RealKafka, own_services: Services, own_topic: str
) -> None:
    """The same faults, without the mistake: what was handled meanwhile comes again, and nothing is missing."""
    load, victim = killed_while_copies_are_lost(own_kafka, own_services, own_topic, planted=False, more=20)
    last = Retrying(own_services, "last")
    all_handled(load, [victim, last])
    last.service.stop()


def test_members_share_what_waits(
    own_kafka: RealKafka, own_services: Services, own_topic: str, own_make_topic: Callable[..., str]
) -> None:
    """A member that comes, and one that goes in order: records that wait change hands."""
    options: dict[str, Any] = {"static": False}
    with Load(own_kafka.direct_bootstrap_servers, own_topic, PARTITIONS, rate=RATE) as load:
        first = Retrying(own_services, "first", **options)
        first.service.wait_for(lambda: first.second_attempts >= 20, "records come again")
        second = Retrying(own_services, "second", **options)
        second.service.wait_for(lambda: len(second.handled) > 200, "the second has partitions")
        first.service.stop()
        count = second.second_attempts
        second.service.wait_for(lambda: second.second_attempts > count + 40, "it has the retry topic too")
        load.stop()
    all_handled(load, [first, second])
    second.service.stop()
    # Nobody died, so what was handled twice had been done before an earlier record of its retry partition was due.
    handled = Counter(entry[:2] for life in (first, second) for entry in life.handled)
    assert sum(handled.values()) - len(handled) < 20
