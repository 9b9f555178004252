"""SIGTERM at random moments, handlers that take too long, and what the exit code says."""

import asyncio
import os
import random
import re
import signal
import threading
import time
from typing import Any

import pytest
from real_services import COOPERATIVE, EAGER, KIP_848, Load, Services, committed, load_value, quicken_group, send

from keven_core.kafka.abstracts.consumer_server import KafkaConsumerServer
from keven_core.kafka.config import Settings
from keven_core.kafka.record import current_record

pytestmark = pytest.mark.real_kafka

BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def _server(kafka: Any, topic: str, handle: Any, protocol: str, **options: Any) -> KafkaConsumerServer:
    entries = {"reconnect.backoff.max.ms": "300"}
    if protocol:
        name, _, value = protocol.partition("=")
        entries[name] = value
    settings = Settings(kafka_address=kafka.bootstrap_servers, rdkafka_options=entries, commit_interval_ms=200)
    return KafkaConsumerServer(topic, client_id=topic, runners=[handle], settings=settings, **options)


@BOTH
@pytest.mark.parametrize(
    ("protocol", "cycles"),
    [
        pytest.param(EAGER, 5, id="eager"),
        *(
            pytest.param(protocol, 100, id=f"soak {name}", marks=[pytest.mark.soak, pytest.mark.timeout(600)])
            for protocol, name in ((EAGER, "eager"), (COOPERATIVE, "cooperative-sticky"), (KIP_848, "kip-848"))
        ),
    ],
)
def test_sigterm_at_random_moments(kafka: Any, topic: str, protocol: str, cycles: int, asynchronous: bool) -> None:
    """While it connects, joins, handles, commits: what was handled is committed, and nothing is handled twice."""
    seed = int(os.environ.get("KEVEN_SEED", "20"))
    draw = random.Random(seed)
    got: list[tuple[int, int]] = []
    if protocol == KIP_848:
        quicken_group(kafka.bootstrap_servers, topic)

    def note() -> None:
        record = current_record()
        got.append((record.partition, record.offset))

    def handle(message: bytes) -> None:
        note()
        time.sleep(0.0005)

    async def handle_async(message: bytes) -> None:
        await asyncio.sleep(0.0005)
        note()

    with Load(kafka.bootstrap_servers, topic, 4, rate=600) as load:
        for cycle in range(cycles):
            server = _server(kafka, topic, handle_async if asynchronous else handle, protocol)
            moment_s = draw.uniform(0, 0.6)
            ended = threading.Event()

            def interrupt(server: Any = server, moment_s: float = moment_s, ended: threading.Event = ended) -> None:
                while server._session is None:
                    time.sleep(0.001)
                if not ended.wait(moment_s):  # a moment of the run, whatever it is doing then
                    os.kill(os.getpid(), signal.SIGTERM)

            # Until the server takes it, nobody may.
            before = signal.signal(signal.SIGTERM, lambda number, frame, server=server: server.stop())
            killer = threading.Thread(target=interrupt)
            killer.start()
            try:
                server.start_sync()
            finally:
                ended.set()
                killer.join()
                signal.signal(signal.SIGTERM, before)
            known = committed(kafka.bootstrap_servers, topic)
            handled = {partition: offset + 1 for partition, offset in got}
            assert known == handled, f"seed {seed}, cycle {cycle}, after {moment_s} s"
        load.stop()
    _server(kafka, topic, handle_async if asynchronous else handle, protocol, until_end=True).start_sync()
    assert len(got) == len(set(got)), f"seed {seed}: handled twice"
    assert set(got) == set(load.acknowledged), f"seed {seed}"


def test_an_async_handler_that_is_cut_off_shows_in_the_exit_code(kafka: Any, services: Services, topic: str) -> None:
    send(kafka.bootstrap_servers, topic, [load_value(number) for number in range(3)], partition=0)
    env = {"KEVEN_DRAIN_TIMEOUT_MS": "500"}
    worker = services.worker("worker", work_s=60, asynchronous=True, env=env)
    worker.wait_for_err("at work")
    worker.terminate()
    assert worker.wait(10) == 3, worker.tail()
    assert re.search(rf"DrainError: KEVEN_DRAIN_TIMEOUT_MS=500 has passed: unfinished: {topic} \[0\] @ 0;", worker.err)
    assert committed(kafka.bootstrap_servers, topic) == {}


HANGS = """
import asyncio, logging, sys
from keven_core.kafka import event_handler
from keven_core.kafka.events.server import start_events_receiver_process

logging.basicConfig(level=logging.INFO)

@event_handler("LOAD")
async def handle(event):
    if event.id == 2:
        print("hangs", flush=True)
        await asyncio.sleep(60)

process = start_events_receiver_process(server_name=sys.argv[1], topics=[sys.argv[1]])
print(process.pid, flush=True)
process.join()
print("exit code", process.exitcode, flush=True)
"""


@pytest.mark.soak
@pytest.mark.parametrize("twice", [False, True], ids=["deadline", "second signal"])
def test_the_exit_code_of_a_launched_process(kafka: Any, services: Services, topic: str, twice: bool) -> None:
    send(kafka.bootstrap_servers, topic, [load_value(number) for number in range(4)], partition=0)
    env = {"KEVEN_DRAIN_TIMEOUT_MS": "60000" if twice else "500"}
    service = services.run_script("service", HANGS, topic, env=env)
    service.wait_for(lambda: "hangs" in service.out, "the handler hangs")
    pid = int(re.findall(r"\d+", service.out)[0])
    os.kill(pid, signal.SIGINT)
    if twice:
        service.wait_for_err("finishing the batch in hand")
        os.kill(pid, signal.SIGINT)
    service.wait(20)
    assert f"exit code {5 if twice else 3}" in service.out, service.tail()
    assert f"unfinished: {topic} [0] @ 2;" in service.err
    # What was handled before is committed.
    assert committed(kafka.bootstrap_servers, topic) == {0: 2}


@pytest.mark.parametrize("crew", ["threads", "tasks"])
def test_a_thousand_in_flight_are_drained_and_the_next_process_goes_on(
    kafka: Any, services: Services, topic: str, crew: str
) -> None:
    """The end takes hardly longer than the longest handler, and so does the new beginning than the assignment.

    benchmarks/restart.py has the figures; the bounds here are for a machine that runs other tests too.
    """
    send(kafka.bootstrap_servers, topic, [load_value(number) for number in range(4000)], partition=0)
    options: dict[str, Any] = {"order": "none", "work_s": 2}
    if crew == "threads":
        options["workers"] = 1000
    else:
        options |= {"asynchronous": True, "max_in_flight": 1000}
    worker = services.worker("worker", **options)
    worker.wait_for(lambda: worker.err.count("at work") >= 1000, "a thousand are in flight")
    began = time.monotonic()
    worker.stop()
    took_s = time.monotonic() - began
    assert took_s < 2 + 3, worker.tail()
    assert worker.count >= 1000
    assert committed(kafka.bootstrap_servers, topic) == {0: worker.count}
    successor = services.worker("successor", **options)
    successor.wait_for_err("assigned: ")
    first_s = successor.wait_for_err("at work")
    assert first_s < 3, successor.tail()
    print(f"{crew}: drained in {took_s:.2f} s of which the handlers may take 2; first record after {first_s:.2f} s")
    successor.stop()
