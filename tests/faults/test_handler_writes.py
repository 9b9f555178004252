"""What handlers write is at the broker before their records' offsets are committed: kill -9, lost answers, refusals.

The service under test copies each record to another topic, keyed by where the record stands, and never flushes. The
oracle asks the broker alone: every record below a committed offset has its copy. Copies linger for long and offsets are
committed often, so a commit that does not wait for the copies shows.
"""

import contextlib
import json
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import KafkaException
from real_services import (
    EAGER,
    KIP_848,
    PROTOCOLS,
    Load,
    Service,
    Services,
    committed,
    load_value,
    read_topic,
    send,
    single_member_options,
    wait_until,
)

from keven_core.testing.proxy import PRODUCE
from keven_core.testing.real_kafka import RealKafka

pytestmark = pytest.mark.real_kafka

KILLS = 3
RATE = 500
PARTITIONS = 4

COPIER = '''
"""Copies LOAD events to a topic; its options are JSON in the first argument."""
import json, logging, os, sys
from keven_core.kafka import Event, EventHandler, KafkaBatchLogger, KafkaLogger, current_record
from keven_core.kafka.errors import DeliveryError
from keven_core.kafka.events.logger import keven_log_event, keven_set_publisher
from keven_core.kafka.events.server import start_events_receiver_server

options = json.loads(sys.argv[1])
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
copies = KafkaBatchLogger(topic=options["out"])
one_by_one = KafkaLogger(topic=options["out"])

if options["planted"]:
    # The mistake that the oracle has to find: offsets are stored without waiting for what handlers wrote.
    from keven_core.kafka._promises import Promises

    Promises.made = property(lambda self: False)


class Load(Event):
    event_name = "LOAD"
    id: int


class Copied(Event):
    event_name = "COPIED"
    id: int
    place: str


class ToOut:
    def log_event(self, event, topic=None):
        copies.log(b"%d" % event.id, key=event.place)


keven_set_publisher(ToOut())


def copy(event):
    record = current_record()
    if options["raises"]:
        keven_log_event(Copied(id=event.id, place=f"{record.partition}-{record.offset}"))
        if event.id % 7 == 3:
            raise ValueError("the event that it has raised must not go out")
        os.write(1, b"%d %d\\n" % (record.partition, record.offset))
        return
    value = b"%d" % event.id + options["padding"].encode() * (event.id in options["large"])
    if not options["waits"]:
        copies.log(value, key=b"%d-%d" % (record.partition, record.offset))
    else:
        try:
            one_by_one.log(value)
        except DeliveryError as error:
            logging.warning("the handler goes on after: %s", error)
            copies.log(b"instead of %d" % event.id)
    os.write(1, b"%d %d\\n" % (record.partition, record.offset))


if options["asynchronous"]:

    class Handler(EventHandler):
        event_name = "LOAD"

        async def handle_event(self, event):
            copy(event)

else:

    class Handler(EventHandler):
        event_name = "LOAD"

        def handle_event(self, event):
            copy(event)


start_events_receiver_server(
    server_name=options["group"], topics=[options["group"]], session_timeout=2, heartbeat_interval=0.5
)
logging.info("ended in order")
'''


class Copier:
    """One life of the service."""

    def __init__(
        self,
        services: Services,
        name: str,
        out: str,
        *,
        asynchronous: bool = False,
        protocol: str = EAGER,
        planted: bool = False,
        large: tuple[int, ...] = (),
        padding: str = "",
        waits: bool = False,
        raises: bool = False,
        static: bool = True,
        linger_ms: int = 300,
        **environ: str,
    ) -> None:
        options = {
            "out": out,
            "group": services.group,
            "asynchronous": asynchronous,
            "planted": planted,
            "large": large,
            "padding": padding,
            "waits": waits,
            "raises": raises,
        }
        env = {
            "KEVEN_RDKAFKA_OPTIONS": single_member_options(services, protocol, static=static),
            "KEVEN_LINGER_MS": str(linger_ms),
            "KEVEN_COMMIT_INTERVAL_MS": "100",
            **environ,
        }
        self.service: Service = services.run_script(name, COPIER, json.dumps(options), env=env)

    @property
    def count(self) -> int:
        """How many records its handler has copied, as far as it knows."""
        return self.service.out.count("\n")

    @property
    def handled(self) -> set[tuple[int, int]]:
        """(partition, offset) of those records."""
        lines = self.service.out.splitlines()
        return {(int(partition), int(offset)) for partition, offset in map(str.split, lines)}


class Broker:
    """What the broker knows of one group, its input topic (named like it) and the topic of the copies."""

    def __init__(self, kafka: RealKafka, group: str, out: str) -> None:
        self._address = kafka.direct_bootstrap_servers
        self._group = group
        self._out = out

    def committed(self) -> dict[int, int]:
        found: list[dict[int, int]] = []

        def answers() -> bool:
            with contextlib.suppress(KafkaException):  # a broker that has just started
                found.append(committed(self._address, self._group, self._group))
            return bool(found)

        wait_until(answers, "the coordinator knows the group")
        return found[0]

    def committed_count(self) -> int:
        """How many records lie below the committed offsets."""
        return sum(self.committed().values())

    def copies(self) -> dict[tuple[int, int], set[bytes | None]]:
        """The copies of each input record."""
        found: dict[tuple[int, int], set[bytes | None]] = defaultdict(set)
        for message in read_topic(self._address, self._out):
            partition, offset = (message.key() or b"").split(b"-")
            found[int(partition), int(offset)].add(message.value())
        return found

    def lost(self) -> list[tuple[int, int]]:
        """Records whose offset is committed and that have no copy: nobody will ever copy them."""
        # The offsets first: what is written after they were read is no excuse.
        below = self.committed()
        copied = self.copies()
        return [(part, at) for part, end in sorted(below.items()) for at in range(end) if (part, at) not in copied]


def all_copied(broker: Broker, load: Load) -> None:
    """Wait until each record that was sent has a copy, and see that it is the right one."""
    wait_until(lambda: set(load.acknowledged) <= set(broker.copies()), "everything is copied")
    copies = broker.copies()
    assert copies == {key: {b"%d" % number} for key, number in load.acknowledged.items()}


def killed_under_load(
    broker: Broker, kafka: RealKafka, services: Services, out: str, **options: Any
) -> tuple[Load, list[tuple[int, int]]]:
    """Kill the copier again and again in the middle of its work; the load, and what was lost at the kills."""
    lost: list[tuple[int, int]] = []
    with Load(kafka.direct_bootstrap_servers, services.group, PARTITIONS, rate=RATE) as load:
        for kill in range(KILLS):
            before = broker.committed_count()
            copier = Copier(services, f"victim-{kill}", out, **options)
            service = copier.service
            service.wait_for(lambda copier=copier: copier.count >= 200, "it copies")
            service.wait_for(lambda before=before: broker.committed_count() > before, "offsets are committed")
            # Load may have paused for longer than copies linger: the kill has to come while it flows.
            seen = copier.count
            service.wait_for(lambda copier=copier, seen=seen: copier.count >= seen + 20, "it copies on")
            sent = load.acknowledged_count
            service.kill()
            assert service.returncode == -9
            lost += broker.lost()
            # The kill hit copies that were under way.
            assert copier.handled - set(broker.copies())
            wait_until(lambda sent=sent: load.acknowledged_count > sent, "messages are sent on")
        load.stop()
    return load, lost


@pytest.mark.parametrize(
    ("asynchronous", "protocol"),
    [
        (False, EAGER),
        (True, KIP_848),
        pytest.param(True, EAGER, marks=pytest.mark.soak),
        pytest.param(False, KIP_848, marks=pytest.mark.soak),
    ],
    ids=["sync-classic", "async-kip-848", "async-classic", "sync-kip-848"],
)
def test_kill_9(
    own_kafka: RealKafka,
    own_services: Services,
    own_topic: str,
    own_make_topic: Callable[..., str],
    asynchronous: bool,
    protocol: str,
) -> None:
    out = own_make_topic(PARTITIONS, suffix="-out")
    broker = Broker(own_kafka, own_topic, out)
    options: dict[str, Any] = {"asynchronous": asynchronous, "protocol": protocol}
    load, lost = killed_under_load(broker, own_kafka, own_services, out, **options)
    assert lost == []
    last = Copier(own_services, "last", out, **options).service
    all_copied(broker, load)
    last.stop()
    assert broker.committed() == load.ends()
    assert broker.lost() == []


def test_kill_9_of_a_handler_that_raises_events(
    own_kafka: RealKafka, own_services: Services, own_topic: str, own_make_topic: Callable[..., str]
) -> None:
    """An event goes out for each record that was handled, and for none that has failed."""
    out = own_make_topic(PARTITIONS, suffix="-out")
    broker = Broker(own_kafka, own_topic, out)
    load, lost = killed_under_load(broker, own_kafka, own_services, out, raises=True)
    handled = {key: {b"%d" % number} for key, number in load.acknowledged.items() if number % 7 != 3}
    assert [key for key in lost if key in handled] == []
    last = Copier(own_services, "last", out, raises=True).service
    wait_until(lambda: set(handled) <= set(broker.copies()), "everything is copied")
    wait_until(lambda: broker.committed() == load.ends(), "all is committed")
    last.stop()
    assert broker.copies() == handled


def test_the_oracle_finds_a_commit_before_the_copy(
    own_kafka: RealKafka, own_services: Services, own_topic: str, own_make_topic: Callable[..., str]
) -> None:
    out = own_make_topic(PARTITIONS, suffix="-out")
    broker = Broker(own_kafka, own_topic, out)
    _, lost = killed_under_load(broker, own_kafka, own_services, out, planted=True)
    assert lost, "the oracle is blind"


@pytest.mark.parametrize(("on", "planted"), [("request", False), ("response", False), ("request", True)], ids=str)
def test_offsets_stay_while_the_copies_are_not_acknowledged(
    own_kafka: RealKafka,
    own_services: Services,
    own_topic: str,
    own_make_topic: Callable[..., str],
    on: Any,
    planted: bool,
) -> None:
    """Requests are lost until it is killed, or their answers until it is asked to end; handling goes on meanwhile."""
    out = own_make_topic(PARTITIONS, suffix="-out")
    broker, proxy = Broker(own_kafka, own_topic, out), own_kafka.proxies[0]
    # Batches of 50 ms, of which 100 may wait: handling goes on for some seconds.
    environ = {"KEVEN_BATCH_TIMEOUT_MS": "50", "KEVEN_CLOSE_TIMEOUT_MS": "1500"}
    with Load(own_kafka.direct_bootstrap_servers, own_topic, PARTITIONS, rate=RATE) as load:
        copier = Copier(own_services, "copier", out, planted=planted, linger_ms=5, **environ)
        service = copier.service
        service.wait_for(lambda: broker.committed_count() > 200, "offsets are committed")

        def handled_meanwhile() -> int:
            """Lose all requests, or answers, while 500 more are handled; how many were handled before."""
            hits = proxy.requests_hit[PRODUCE]
            proxy.drop_api(PRODUCE, on=on)
            seen = copier.count
            service.wait_for(lambda: proxy.requests_hit[PRODUCE] > hits, "a request is lost")
            service.wait_for(lambda: copier.count >= seen + 500, "handling goes on")
            return seen

        seen = handled_meanwhile()
        if planted:
            service.wait_for(lambda: broker.committed_count() > seen, "offsets run ahead")
            service.kill()
            assert broker.lost(), "the oracle is blind"
            return
        assert broker.committed_count() <= seen
        # By itself, as soon as answers come again.
        proxy.restore()
        assert proxy.cut() > 0
        service.wait_for(lambda: broker.committed_count() > seen + 500, "offsets are committed again")
        seen = handled_meanwhile()
        if on == "request":
            service.kill()
        else:
            service.terminate()
            assert service.wait(20) == 1, service.tail()
            assert "what handlers wrote is not on the broker, so the offsets of their records stay" in service.err
            assert "ended in order" not in service.err
        assert broker.committed_count() <= seen
        assert broker.lost() == []
        proxy.restore()
        last = Copier(own_services, "last", out).service
        load.stop()
    all_copied(broker, load)
    last.stop()
    assert broker.committed_count() == load.acknowledged_count
    assert broker.lost() == []


def test_a_copy_that_is_refused_ends_the_service(
    own_kafka: RealKafka, own_services: Services, own_topic: str, own_make_topic: Callable[..., str]
) -> None:
    """The offset stays at its record, or before, however often the service is started anew."""
    out = own_make_topic(1, {"max.message.bytes": 2000}, suffix="-out")
    broker = Broker(own_kafka, own_topic, out)
    send(own_kafka.direct_bootstrap_servers, own_topic, [load_value(number) for number in range(100)], partition=0)
    environ = {"KEVEN_LOG_BATCH_BYTES": "1000", "KEVEN_COMPRESSION": "none", "KEVEN_BATCH_SIZE": "10"}
    for life in range(2):
        service = Copier(own_services, f"life-{life}", out, large=(57,), padding="x" * 5000, **environ).service
        assert service.wait(30) == 1, service.tail()
        assert "\nkeven_core.kafka.errors.DeliveryError: what handlers wrote is not on the broker" in service.err
        assert "x" * 100 not in service.err  # no payload
        assert broker.committed().get(0, 0) <= 57
        assert broker.lost() == []
    copies = {at for _, at in broker.copies()}
    assert copies >= set(range(57))
    assert 57 not in copies


def test_a_handler_may_heed_a_refusal_itself(
    own_kafka: RealKafka, own_services: Services, own_topic: str, own_make_topic: Callable[..., str]
) -> None:
    """KafkaLogger.log() raises in the handler; one that goes on has its record's offset stored."""
    out = own_make_topic(1, {"max.message.bytes": 2000}, suffix="-out")
    send(own_kafka.direct_bootstrap_servers, own_topic, [load_value(number) for number in range(20)], partition=0)
    environ = {"KEVEN_LOG_BATCH_BYTES": "1000", "KEVEN_COMPRESSION": "none"}
    copier = Copier(own_services, "copier", out, large=(7,), padding="x" * 5000, waits=True, **environ)
    service = copier.service
    address = own_kafka.direct_bootstrap_servers
    service.wait_for(lambda: committed(address, own_topic, own_topic) == {0: 20}, "everything is committed")
    service.stop()
    values = {message.value() for message in read_topic(address, out)}
    assert values == {b"%d" % number for number in range(20) if number != 7} | {b"instead of 7"}


@PROTOCOLS
def test_a_rebalance_waits_for_the_copies(
    own_kafka: RealKafka, own_services: Services, own_topic: str, own_make_topic: Callable[..., str], protocol: str
) -> None:
    """A member gives its partitions up when the copies of what it has handled are acknowledged, and not before."""
    out = own_make_topic(PARTITIONS, suffix="-out")
    broker, proxy = Broker(own_kafka, own_topic, out), own_kafka.proxies[0]
    # Batches of 50 ms, of which 100 may wait: it goes on fetching, which a rebalance needs.
    options: dict[str, Any] = {"protocol": protocol, "static": False, "linger_ms": 5, "KEVEN_BATCH_TIMEOUT_MS": "50"}
    with Load(own_kafka.direct_bootstrap_servers, own_topic, PARTITIONS, rate=RATE) as load:
        first = Copier(own_services, "first", out, **options)
        first.service.wait_for(lambda: broker.committed_count() > 200, "offsets are committed")
        proxy.drop_api(PRODUCE, on="request")
        seen = first.count
        first.service.wait_for(lambda: first.count > seen, "it handles what it can't copy")
        second = Copier(own_services, "second", out, **options)
        first.service.wait_for(lambda: "revoked: " in first.service.err, "it is asked for partitions")
        held = first.count
        time.sleep(1.5)  # for as long nothing happens
        assert second.count == 0
        assert broker.lost() == []
        proxy.restore()
        assert proxy.cut() > 0
        second.service.wait_for(lambda: second.count > 200, "the second has partitions")
        first.service.wait_for(lambda: first.count > held + 200, "the first goes on with the others")
        assert first.handled.isdisjoint(second.handled)
        load.stop()
    all_copied(broker, load)
    first.service.stop()
    second.service.stop()
    assert first.handled | second.handled == set(load.acknowledged)
    assert broker.committed_count() == load.acknowledged_count
    assert broker.lost() == []


def test_many_batches_wait_over_an_outage_of_the_broker(
    own_kafka: RealKafka, own_services: Services, own_topic: str, own_make_topic: Callable[..., str]
) -> None:
    """kill -9 of the broker under load: what was handled meanwhile is committed afterwards, by itself."""
    out = own_make_topic(PARTITIONS, suffix="-out")
    broker = Broker(own_kafka, own_topic, out)
    with Load(own_kafka.bootstrap_servers, own_topic, PARTITIONS, rate=RATE) as load:
        copier = Copier(own_services, "copier", out, linger_ms=50)
        service = copier.service
        service.wait_for(lambda: copier.count >= 300, "it copies")
        own_kafka.kill()
        sent, began = load.sent, time.monotonic()
        wait_until(lambda: load.sent > sent + RATE, "messages pile up meanwhile")
        own_kafka.restart()
        assert broker.lost() == []
        count = copier.count
        service.wait_for(lambda: copier.count > count + 2 * RATE, "it copies again")
        assert time.monotonic() - began > 1
        load.stop()
    all_copied(broker, load)
    service.stop(signal.SIGTERM)
    assert broker.committed_count() == load.acknowledged_count
    assert broker.lost() == []
