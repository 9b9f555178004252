"""Load workers that handle many records at once, and what may be expected of them; for tests on a real Kafka."""

from typing import Any

from real_services import Handling, Load, Services, Worker, wait_until

RATE = 300
KEYS = 128
IN_FLIGHT = 60
WORK_S = 0.1
COMMIT_INTERVAL_MS = 250

# Worker options by who handles the records.
CREWS: dict[str, dict[str, Any]] = {
    "threads": {"workers": IN_FLIGHT},
    "tasks": {"max_in_flight": IN_FLIGHT, "asynchronous": True},
}


def lane_of_key(entry: Handling) -> tuple[int, int]:
    """What the records that are handled one after the other have in common."""
    return entry.partition, entry.number % KEYS


def load_for(address: str, topic: str, partitions: int) -> Load:
    """Traffic that keeps two members busy: each of them has about 15 records in flight, and can do four times that."""
    return Load(address, topic, partitions, keys=KEYS, rate=RATE)


def start_member(services: Services, name: str, crew: str = "tasks", *, env: Any = None, **options: Any) -> Worker:
    """Start a member of the group that handles the records of a key in order."""
    env = {"KEVEN_COMMIT_INTERVAL_MS": str(COMMIT_INTERVAL_MS), **(env or {})}
    return services.worker(name, env=env, **{"order": "key", "work_s": WORK_S, **CREWS[crew], **options})


def window(times: int) -> int:
    """How many records may come again when members lose their place so many times, each of them counted.

    What a member has in flight then, and what it can have handled in two commit intervals: the last one, and the time
    until the broker has the commit.
    """
    return times * int(IN_FLIGHT + IN_FLIGHT / WORK_S * 2 * COMMIT_INTERVAL_MS / 1000)


def wait_for_in_flight(*members: Worker, each: int = 1) -> None:
    """Wait until each of the members has begun so many records and not handled them yet: the time for a fault."""
    wait_until(lambda: all(member.in_flight >= each for member in members), "each has records in flight")
