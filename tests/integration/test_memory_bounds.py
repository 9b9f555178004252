"""Memory of a server whose handlers are 100 times slower than what comes: its settings bound it, not the backlog.

KEVEN_TEST_MEMORY_S says how many seconds the long runs take.
"""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from real_services import DEADLINE_S, Services, Worker

from keven_core.kafka.config import Settings

pytestmark = pytest.mark.real_kafka

SIZE_BYTES = 4000
PARTITIONS = 4
BACKLOG = 75_000  # 300 MB
SOAK_S = int(os.environ.get("KEVEN_TEST_MEMORY_S", "600"))
# What the allocator, the heads of messages and the handlers' own objects take beside the values that are held.
OVERHEAD_MB = 15

# Worker options: 50 records a second, where tens of thousands come.
PLAIN: dict[str, Any] = {"work_s": 0.02}
IN_FLIGHT: dict[str, Any] = {"asynchronous": True, "order": "key", "max_in_flight": 100, "work_s": 2.0}


def memory_mb(worker: Worker, name: str) -> float:
    """Memory of a process in MB: "VmRSS" now, "VmHWM" at its peak."""
    [kib] = re.findall(rf"^{name}:\s+(\d+) kB$", Path(f"/proc/{worker.pid}/status").read_text(), re.MULTILINE)
    return int(kib) * 1024 / 1e6


def offer(address: str, topic: str, count: int) -> None:
    """Write records of 4 KB with 10 000 keys, as fast as it goes."""
    producer = Producer({"bootstrap.servers": address, "linger.ms": 20, "queue.buffering.max.kbytes": 65_536})
    padding = b"x" * SIZE_BYTES
    for number in range(count):
        value = b'{"event_name":"LOAD","id":%d,"padding":"%s"}' % (number, padding)
        while True:
            try:
                producer.produce(topic, value, b"%d" % (number % 10_000), partition=number % PARTITIONS)
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(DEADLINE_S) == 0


def bound_mb(options: dict[str, Any]) -> float:
    """What the settings allow to be held at once."""
    settings = Settings()
    held = settings.prefetch_bytes + settings.prefetch_bytes // 4  # and a response on its way there
    held += settings.batch_size * SIZE_BYTES
    if "max_in_flight" in options:
        window = min(32 << 20, max(2000, 4 * options["max_in_flight"]) * SIZE_BYTES)
        held += window * (1 + PARTITIONS)  # each partition of which nothing lands for a second can hold one besides
    return held / 1e6 + OVERHEAD_MB


@pytest.mark.parametrize("watched_s", [3, pytest.param(SOAK_S, marks=[pytest.mark.soak, pytest.mark.timeout(1200)])])
@pytest.mark.parametrize("options", [PLAIN, IN_FLIGHT], ids=["plain", "in flight"])
def test_a_backlog_is_left_on_the_broker(
    kafka: Any, services: Services, topic: str, options: dict[str, Any], watched_s: int
) -> None:
    worker = services.worker("worker", **options)
    worker.wait_for_err("assigned: ")
    idle_mb = memory_mb(worker, "VmRSS")
    count = max(BACKLOG, 60 * watched_s)
    offer(kafka.bootstrap_servers, topic, count)
    assert worker.count * 100 < count, "the handlers are not slow enough"
    worker.wait_for_more(50 * watched_s, 2 * watched_s + DEADLINE_S)
    growth_mb = memory_mb(worker, "VmHWM") - idle_mb
    bound = bound_mb(options)
    print(f"{worker.count} of {count} handled; idle {idle_mb:.1f} MB, growth {growth_mb:.1f} MB, bound {bound:.1f} MB")
    assert growth_mb < bound
    worker.stop()
