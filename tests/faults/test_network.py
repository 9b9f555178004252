"""The network between consumer and broker breaks under load; the proxy of the own broker breaks it.

The load goes straight to the broker, so that it goes on meanwhile. Each test shows that its faults hit the consumer's
traffic: counters of the proxy, and records handled between the faults.
"""

import time
from typing import Any

import pytest
from real_services import (
    COOPERATIVE,
    EAGER,
    KIP_848,
    PROTOCOLS,
    Load,
    Services,
    Worker,
    assert_delivered,
    committed,
    wait_until,
    wait_until_all_handled,
)

from keven_core.testing.proxy import (
    FETCH,
    HEARTBEAT,
    JOIN_GROUP,
    METADATA,
    OFFSET_COMMIT,
    OFFSET_FETCH,
    SYNC_GROUP,
    FaultProxy,
)
from keven_core.testing.real_kafka import RealKafka

pytestmark = pytest.mark.real_kafka

# A client that gives up on a silent connection after 3 s instead of 60.
IMPATIENT = "socket.timeout.ms=3000,reconnect.backoff.max.ms=500"
COMMIT_INTERVAL_MS = 250
RATE = 500


def start(services: Services, name: str = "worker", **options: Any) -> Worker:
    options = {"rdkafka": IMPATIENT, "work_s": 0.0002, **options}
    worker = services.worker(name, env={"KEVEN_COMMIT_INTERVAL_MS": str(COMMIT_INTERVAL_MS)}, **options)
    worker.wait_for_more()
    # What came while it started is handled in one go, more than the rate says; `window` does not count on it.
    handled = worker.count
    worker.wait_for(
        lambda: sum(committed(services.direct_address, services.group, services.group).values()) >= handled,
        "that is committed",
    )
    return worker


def finish(load: Load, *workers: Worker, repeats: int) -> None:
    """Everything handled and committed, an end in order, and nothing wrong."""
    load.stop()
    wait_until_all_handled(load, *workers)
    # A member that has been gone for longer than its session may hear so only now; if it ends before it is back, its
    # last commit is refused, and it says so by its exit code.
    wait_until(lambda: committed(load.address, load.topic, load.topic) == load.ends(), "all is committed")
    for worker in workers:
        worker.stop()
    assert_delivered(load.acknowledged, *workers, repeats=repeats)


def window(faults: int) -> int:
    """How many records may come again: those handled in a commit interval and its round trip, for each fault."""
    return faults * (RATE * 2 * COMMIT_INTERVAL_MS // 1000 + 200)


@PROTOCOLS
def test_connections_cut_again_and_again(
    own_kafka: RealKafka, own_services: Services, own_topic: str, protocol: str
) -> None:
    proxy, cuts = own_kafka.proxies[0], 4
    with Load(own_kafka.direct_bootstrap_servers, own_topic, 4, rate=RATE) as load:
        worker = start(own_services, protocol=protocol)
        before = proxy.cut_connections
        for _ in range(cuts):
            assert proxy.cut() > 0
            # By itself: connected again, and fetching; records that were prefetched don't count.
            fetches = proxy.requests_seen[FETCH]
            worker.wait_for(lambda fetches=fetches: proxy.requests_seen[FETCH] > fetches, "it fetches again")
            worker.wait_for_more()
        assert proxy.cut_connections >= before + cuts
        finish(load, worker, repeats=window(cuts))


def test_connections_that_live_a_second_while_members_come_and_go(
    own_kafka: RealKafka, own_services: Services, own_topic: str
) -> None:
    proxy = own_kafka.proxies[0]
    with Load(own_kafka.direct_bootstrap_servers, own_topic, 4, rate=RATE) as load:
        first = start(own_services, "first")
        before = proxy.cut_connections
        proxy.lifetime(0.5, 1.5)
        second = start(own_services, "second")
        first.wait_for_more()
        third = start(own_services, "third")
        first.terminate()
        third.wait_for_more(200)
        second.wait_for_more(200)
        assert proxy.cut_connections >= before + 5
        proxy.restore()
        first.wait(30)  # not 0 if a cut took the answer to its last commit
        load.stop()
        wait_until_all_handled(load, first, second, third)
    second.stop()
    third.stop()
    assert_delivered(load.acknowledged, first, second, third, repeats=window(proxy.cut_connections - before))


@pytest.mark.parametrize(
    ("protocol", "swallow"),
    [
        (EAGER, True),
        pytest.param(COOPERATIVE, False, marks=pytest.mark.soak),
        (KIP_848, True),
        pytest.param(EAGER, False, marks=pytest.mark.soak),
        pytest.param(COOPERATIVE, True, marks=pytest.mark.soak),
        pytest.param(KIP_848, False, marks=pytest.mark.soak),
    ],
)
def test_a_black_hole_of_some_seconds(
    own_kafka: RealKafka, own_services: Services, own_topic: str, protocol: str, swallow: bool
) -> None:
    black_hole(own_kafka.proxies[0], own_kafka, own_services, own_topic, seconds=4, swallow=swallow, protocol=protocol)


def test_a_black_hole_of_30_seconds(own_kafka: RealKafka, own_services: Services, own_topic: str) -> None:
    # The client's own time-outs, nothing tuned for the test.
    black_hole(own_kafka.proxies[0], own_kafka, own_services, own_topic, seconds=30, swallow=False, rdkafka="")


def black_hole(
    proxy: FaultProxy,
    kafka: RealKafka,
    services: Services,
    topic: str,
    *,
    seconds: float,
    swallow: bool,
    **options: Any,
) -> None:
    with Load(kafka.direct_bootstrap_servers, topic, 4, rate=RATE) as load:
        worker = start(services, **options)
        swallowed = proxy.bytes_swallowed
        proxy.black_hole(swallow=swallow)
        began, sent = time.monotonic(), load.acknowledged_count
        wait_until(lambda: time.monotonic() - began >= seconds, "the hole lasts")
        assert load.acknowledged_count - sent > RATE * seconds / 2, "no traffic while the network was gone"
        assert proxy.bytes_swallowed > swallowed or not swallow
        handled_before = worker.count
        assert handled_before < sent + RATE  # it was cut off indeed
        proxy.restore()
        worker.wait_for_more(int(RATE * seconds / 2))
        # Under KIP-848 the client hears from the broker that its session has ended, and may have handled what was sent
        # meanwhile before it does; under the classic protocol it counts the time itself.
        late = int(RATE * seconds) if options.get("protocol") == KIP_848 else 0
        finish(load, worker, repeats=window(2) + late)


@pytest.mark.soak
def test_a_slow_line(own_kafka: RealKafka, own_services: Services, own_topic: str) -> None:
    proxy = own_kafka.proxies[0]
    with Load(own_kafka.direct_bootstrap_servers, own_topic, 4, rate=RATE) as load:
        first = start(own_services, "first")
        proxy.delay(0.15, 0.1)
        seen = proxy.requests_seen[FETCH]
        second = start(own_services, "second")
        first.wait_for_more(300)
        second.wait_for_more(300)
        assert proxy.requests_seen[FETCH] > seen
        finish(load, first, second, repeats=window(1))


@pytest.mark.parametrize(
    ("api", "on", "action", "times"),
    [
        (FETCH, "response", "drop", 1),
        (FETCH, "response", "cut", 3),
        (OFFSET_COMMIT, "response", "drop", 2),
        (OFFSET_COMMIT, "request", "cut", 3),
        (HEARTBEAT, "request", "drop", 2),
    ],
    ids=lambda value: {FETCH: "fetch", OFFSET_COMMIT: "commit", HEARTBEAT: "heartbeat"}.get(value, str(value)),
)
def test_one_request_goes_wrong_under_load(
    own_kafka: RealKafka, own_services: Services, own_topic: str, api: int, on: str, action: str, times: int
) -> None:
    proxy = own_kafka.proxies[0]
    with Load(own_kafka.direct_bootstrap_servers, own_topic, 4, rate=RATE) as load:
        worker = start(own_services)
        before = proxy.requests_hit[api]
        fault = proxy.drop_api if action == "drop" else proxy.cut_on_api
        fault(api, on=on, times=times)  # type: ignore[arg-type]
        worker.wait_for(lambda: proxy.requests_hit[api] >= before + times, f"{times} requests were hit")
        proxy.restore()
        worker.wait_for_more(200)
        finish(load, worker, repeats=window(times))


@pytest.mark.parametrize(
    "api", [JOIN_GROUP, SYNC_GROUP, METADATA, OFFSET_FETCH], ids=["join", "sync", "metadata", "offset-fetch"]
)
def test_one_request_goes_wrong_while_a_member_joins(
    own_kafka: RealKafka, own_services: Services, own_topic: str, api: int
) -> None:
    proxy = own_kafka.proxies[0]
    with Load(own_kafka.direct_bootstrap_servers, own_topic, 4, rate=RATE) as load:
        first = start(own_services, "first")
        before = proxy.requests_hit[api]
        proxy.cut_on_api(api, on="response", times=2)
        second = start(own_services, "second")
        first.wait_for(lambda: proxy.requests_hit[api] >= before + 2, "the requests were hit")
        first.wait_for_more()
        finish(load, first, second, repeats=window(2))
