"""Faults while many records are handled at once: nothing is lost, keys keep their order, and little comes again.

Each test shows that members had records in flight when its fault came: begun, and not handled yet. The broker's own
fault comes in test_cluster.py as well, with three of them.
"""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from in_flight import CREWS, IN_FLIGHT, lane_of_key, load_for, start_member, wait_for_in_flight, window
from real_services import (
    COOPERATIVE,
    EAGER,
    KIP_848,
    Load,
    Services,
    Worker,
    assert_delivered,
    committed,
    origin,
    partitions_of,
    read_topic,
    wait_until,
    wait_until_all_handled,
)

from keven_core.testing.proxy import FETCH
from keven_core.testing.real_kafka import RealKafka

pytestmark = pytest.mark.real_kafka

PARTITIONS = {0, 1, 2, 3}
# A client that gives up on a silent connection after 3 s instead of 60.
IMPATIENT = "socket.timeout.ms=3000,reconnect.backoff.max.ms=500"


def wait_until_shared(*members: Worker) -> None:
    """Wait until they share the partitions, and each has records in flight."""
    for member in [*members, *members]:  # the first ones have to give some up when the last one comes
        member.wait_for_more(30)
    wait_for_in_flight(*members, each=3)


def wait_until_stopped(worker: Worker) -> None:
    """Wait until each of its threads stands still: they stop one after the other, and may write a last line."""
    process = psutil.Process(worker.pid)
    states = [Path(f"/proc/{thread.id}/status") for thread in process.threads()]
    wait_until(lambda: all("\nState:\tT" in state.read_text() for state in states), "it stands still")


def wait_for_takeover(load: Load, survivor: Worker, absent: Worker) -> None:
    """Wait until `survivor` is past everything that `absent`, cut off by now, can have fetched."""
    handled = survivor.count
    survivor.wait_for(lambda: partitions_of(survivor, handled) == PARTITIONS, "all partitions are taken over")
    sent = set(load.acknowledged)
    survivor.wait_for(
        lambda: sent <= {(entry.partition, entry.offset) for entry in [*survivor.handled, *absent.handled]},
        "what was sent until then is handled",
    )


def finish(load: Load, address: str, *members: Worker, repeats: int, gone: tuple[Worker, ...] = ()) -> None:
    """Everything handled, members that end in order with everything committed, and nothing wrong."""
    load.stop()
    wait_until_all_handled(load, *members, *gone)
    for member in members:
        member.terminate()
    for member in members:
        assert member.wait() == 0, member.tail()
    assert_delivered(load.acknowledged, *members, *gone, repeats=repeats, lane=lane_of_key)
    assert committed(address, load.topic, load.topic) == load.ends()


# --- members come, go and stand still --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "rounds", "protocol", "crew"),
    [
        (2, 2, EAGER, "threads"),
        (8, 2, COOPERATIVE, "tasks"),
        pytest.param(8, 6, EAGER, "tasks", marks=pytest.mark.soak),
        pytest.param(8, 6, COOPERATIVE, "threads", marks=pytest.mark.soak),
        pytest.param(8, 6, KIP_848, "tasks", marks=pytest.mark.soak),
    ],
)
def test_half_of_the_members_is_replaced_again_and_again(
    kafka: Any,
    services: Services,
    make_topic: Callable[..., str],
    count: int,
    rounds: int,
    protocol: str,
    crew: str,
) -> None:
    services.group = topic = make_topic(2 * count)
    # So many processes start at once here that a heartbeat may be late: nobody is to lose its place by that.
    options: dict[str, Any] = {"protocol": protocol, "session_timeout": 10}
    gone: list[Worker] = []
    with load_for(kafka.bootstrap_servers, topic, 2 * count) as load:
        members = [start_member(services, f"member-{number}", crew, **options) for number in range(count)]
        for member in members:
            member.wait_for_more(20)
        for round_number in range(rounds):
            leaving, staying = members[: count // 2], members[count // 2 :]
            joining = [
                start_member(services, f"member-{round_number}-{n}", crew, **options) for n in range(len(leaving))
            ]
            joining[0].wait_for_err("assigned:")  # some join while others leave
            wait_for_in_flight(*leaving)
            acknowledged = load.acknowledged_count
            for member in leaving:
                member.terminate()
            for member in leaving:
                assert member.wait() == 0, member.tail()
            for member in joining:
                member.wait_for_more(20)
            assert load.acknowledged_count > acknowledged
            gone += leaving
            members = staying + joining
        # What ran was finished and committed before it was given away, so nothing comes again.
        finish(load, kafka.bootstrap_servers, *members, repeats=0, gone=tuple(gone))


@pytest.mark.parametrize(
    ("protocol", "crew"),
    [
        (EAGER, "threads"),
        (KIP_848, "tasks"),
        pytest.param(COOPERATIVE, "tasks", marks=pytest.mark.soak),
        pytest.param(KIP_848, "threads", marks=pytest.mark.soak),
    ],
)
def test_a_member_stands_still_past_its_session(
    kafka: Any, services: Services, topic: str, protocol: str, crew: str
) -> None:
    with load_for(kafka.bootstrap_servers, topic, 4) as load:
        still, other = (start_member(services, name, crew, protocol=protocol) for name in ("still", "other"))
        wait_until_shared(still, other)
        still.send_signal(signal.SIGSTOP)
        wait_until_stopped(still)
        begun, count = still.in_flight, still.count
        assert begun > 0
        wait_for_takeover(load, other, still)
        assert (still.in_flight, still.count) == (begun, count)
        still.send_signal(signal.SIGCONT)
        still.wait_for_err("lost: ")
        still.wait_for_more()
        finish(load, kafka.bootstrap_servers, still, other, repeats=window(1))


# --- the network -----------------------------------------------------------------------------------------------------


def test_connections_are_cut(own_kafka: RealKafka, own_services: Services, own_topic: str) -> None:
    proxy, cuts = own_kafka.proxies[0], 3
    with load_for(own_kafka.direct_bootstrap_servers, own_topic, 4) as load:
        members = [start_member(own_services, crew, crew, rdkafka=IMPATIENT) for crew in CREWS]
        wait_until_shared(*members)
        for _ in range(cuts):
            wait_for_in_flight(*members)
            assert proxy.cut() > 0
            fetches = proxy.requests_seen[FETCH]
            wait_until(lambda fetches=fetches: proxy.requests_seen[FETCH] > fetches, "they fetch again")
            for member in members:
                member.wait_for_more()
        finish(load, own_kafka.direct_bootstrap_servers, *members, repeats=window(cuts * len(members)))


@pytest.mark.parametrize(
    ("protocol", "swallow", "crew"),
    [
        (COOPERATIVE, True, "tasks"),
        pytest.param(EAGER, False, "tasks", marks=pytest.mark.soak),
        pytest.param(KIP_848, False, "threads", marks=pytest.mark.soak),
        pytest.param(KIP_848, True, "tasks", marks=pytest.mark.soak),
    ],
)
def test_a_member_falls_into_a_black_hole(
    own_kafka: RealKafka, own_services: Services, own_topic: str, protocol: str, swallow: bool, crew: str
) -> None:
    """The group gives its partitions to the other one, which has a line of its own; then it comes back."""
    proxy, direct = own_kafka.proxies[0], own_kafka.direct_bootstrap_servers
    options: dict[str, Any] = {"protocol": protocol, "rdkafka": IMPATIENT}
    with load_for(direct, own_topic, 4) as load:
        hidden = start_member(own_services, "hidden", crew, **options)
        other = start_member(own_services, "other", crew, kafka=direct, **options)
        wait_until_shared(hidden, other)
        swallowed = proxy.bytes_swallowed
        proxy.black_hole(swallow=swallow)
        wait_for_takeover(load, other, hidden)
        assert proxy.bytes_swallowed > swallowed or not swallow
        proxy.restore()
        hidden.wait_for_more()
        assert "lost: " in hidden.err
        finish(load, direct, hidden, other, repeats=window(1))


# --- the broker ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "protocol",
    [EAGER, pytest.param(COOPERATIVE, marks=pytest.mark.soak), pytest.param(KIP_848, marks=pytest.mark.soak)],
)
def test_kill_9_of_the_broker(own_kafka: RealKafka, own_services: Services, own_topic: str, protocol: str) -> None:
    with load_for(own_kafka.bootstrap_servers, own_topic, 4) as load:
        members = [start_member(own_services, crew, crew, protocol=protocol, rdkafka=IMPATIENT) for crew in CREWS]
        pid = own_kafka.pids[1]
        wait_until_shared(*members)
        own_kafka.kill()
        acknowledged = load.acknowledged_count
        wait_until(lambda: load.sent > acknowledged + 200, "messages pile up meanwhile")
        own_kafka.restart()
        assert own_kafka.pids[1] != pid
        for member in members:
            member.wait_for_more(100)  # by itself
        finish(load, own_kafka.direct_bootstrap_servers, *members, repeats=window(len(members)))


# --- mistakes that these checks find ---------------------------------------------------------------------------------

# The handler has the engine believe that a record is done as soon as it is begun: its commit comes before the work.
COMMITS_FIRST = """
tasks = set()

async def answer_at_once(self, event):
    task = asyncio.ensure_future(work(event, begin(event)))
    tasks.add(task)
    task.add_done_callback(tasks.discard)

Handler.handle_event = answer_at_once
"""

# What is in flight when partitions are revoked is dropped, and counts as done.
DROPS_WHAT_RUNS = """
from keven_core.kafka._session import Session

finish_running = Session._finish_running
dropping = False

def drop_running(self, *arguments):
    global dropping
    dropping = True
    yield from finish_running(self, *arguments)
    dropping = False

async def work(event, record):
    await asyncio.sleep(work_s)
    if not dropping:
        note(event, record)

Session._finish_running = drop_running
"""

# A record that failed is taken for one that nobody wanted.
SWALLOWS_FAILURES = """
from keven_core.kafka._session import Session

Session._on_failure = lambda self, *arguments: "skipped"
"""

EVERY = 20


@pytest.mark.parametrize(
    "planted",
    ["", COMMITS_FIRST, DROPS_WHAT_RUNS, SWALLOWS_FAILURES],
    ids=["as-it-is", "commits-first", "drops-what-runs", "swallows-failures"],
)
def test_a_revocation_and_a_kill_while_records_fail(
    own_kafka: RealKafka, own_services: Services, own_topic: str, planted: str
) -> None:
    """Each record is handled or in the dead-letter topic, unless a mistake is planted: then that is noticed."""
    direct = own_kafka.direct_bootstrap_servers
    # Records that take so long, and commits that come so often, that each mistake has its effect.
    options: dict[str, Any] = {"work_s": 0.3, "max_in_flight": 3 * IN_FLIGHT, "fails_every": EVERY, "planted": planted}
    options["env"] = {"KEVEN_COMMIT_INTERVAL_MS": "50"}
    with load_for(direct, own_topic, 4) as load:
        survivor = start_member(own_services, "survivor", **options)
        wait_for_in_flight(survivor, each=10)
        victim = start_member(own_services, "victim", **options)
        wait_until_shared(victim, survivor)
        assert "revoked: " in survivor.err
        victim.kill()
        handled = survivor.count
        assert victim.in_flight > 0
        survivor.wait_for(lambda: partitions_of(survivor, handled) == PARTITIONS, "the survivor has taken over")
        load.stop()
    survivor.wait_for(lambda: committed(direct, own_topic, own_topic) == load.ends(), "all is done, says the service")
    survivor.stop()
    dead = set(map(origin, read_topic(direct, f"kafka_server.{own_topic}.dead")))
    assert all(load.acknowledged[place] % EVERY == 0 for place in dead)
    rest = {place: number for place, number in load.acknowledged.items() if place not in dead}
    if not planted:
        assert dead
        assert_delivered(rest, survivor, victim, repeats=3 * window(1), lane=lane_of_key)
    else:
        with pytest.raises(AssertionError, match="'lost': "):
            assert_delivered(rest, survivor, victim, repeats=None, lane=lane_of_key)
