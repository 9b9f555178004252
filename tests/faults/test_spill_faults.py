"""KafkaBatchLogger with spill_dir on a real Kafka: broker and process die; what is in the files arrives, in order.

A logger under test is a process of its own. It notes each message in a file when log() has returned, and another file
gets those that SpillStore has written, so that both are known after kill -9.
"""

import itertools
import json
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from real_services import Service, Services, read_topic, wait_until

from keven_core.kafka._producers import close_producers
from keven_core.kafka.config import Settings
from keven_core.kafka.errors import Delivery, DeliveryError, KafkaTimeoutError
from keven_core.kafka.logger import KafkaBatchLogger
from keven_core.kafka.spill import SpillFullError
from keven_core.testing.proxy import PRODUCE
from keven_core.testing.real_kafka import RealKafka

pytestmark = pytest.mark.real_kafka

KEYS = 8
NO_LIMIT = 1 << 60

SPILLER = '''
"""Logs numbers, one key for every eighth, until it is told to end; its options are JSON in the first argument."""
import json, os, signal, sys, threading
from keven_core.kafka import KafkaBatchLogger
from keven_core.kafka.spill import SpillStore

options = json.loads(sys.argv[1])


def appended(path):
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


returned, written = appended(options["returned"]), appended(options["written"])
append, pwrite = SpillStore.append, os.pwrite


def note_append(self, record):
    sequence = append(self, record)
    os.write(written, b"%d\\n" % int(record.value[:10]))
    return sequence


def write_half(fd, data, at):
    pwrite(fd, data[: len(data) // 2], at)
    os.kill(os.getpid(), signal.SIGKILL)


SpillStore.append = note_append
logger = KafkaBatchLogger(topic=options["topic"], timeout=60, spill_dir=options["folder"], spill=options["mode"])
number = options["first"]
ending = threading.Event()


def listen():
    sys.stdin.readline()
    ending.set()


def report():
    while not ending.wait(0.02):
        print("at", logger.produced_count, logger.received_count, logger.spilled_count, flush=True)


threading.Thread(target=listen, daemon=True).start()
threading.Thread(target=report, daemon=True).start()
while number < options["end"] and not ending.is_set():
    if number == options["torn"]:
        os.pwrite = write_half
    logger.log(b"%010d" % number + b"." * options["size"], key=b"k%d" % (number % 8))
    os.write(returned, b"%d\\n" % number)
    number += 1
    if number % 50 == 0:
        ending.wait(options["pause_s"])
if options["ends"] == "flush":
    print("flushed", logger.flush(), logger.spilled_count, flush=True)
    logger.close()
elif options["ends"] == "close":
    logger.timeout = 0.5
    try:
        logger.close()
    except Exception as error:
        print("close:", type(error).__name__, flush=True)
'''


class Spiller:
    """One life of a logger, and what is known of it from outside."""

    def __init__(
        self,
        services: Services,
        name: str,
        mode: str,
        *,
        first: int,
        end: int = NO_LIMIT,
        torn: int = -1,
        ends: str = "flush",
        size: int = 90,
        pause_s: float = 0.01,
        **environ: str,
    ) -> None:
        self.first = first
        self._returned = services.folder / f"{name}.returned"
        self._written = services.folder / f"{name}.written"
        options = {
            "topic": services.group,
            "folder": str(services.folder / "spill"),
            "mode": mode,
            "first": first,
            "end": end,
            "torn": torn,
            "ends": ends,
            "size": size,
            "pause_s": pause_s,
            "returned": str(self._returned),
            "written": str(self._written),
        }
        env = {"KEVEN_RDKAFKA_OPTIONS": "reconnect.backoff.max.ms=300", **environ}
        self.service: Service = services.run_script(name, SPILLER, json.dumps(options), env=env, stdin=subprocess.PIPE)

    def at(self) -> tuple[int, int, int]:
        """Messages taken, acknowledged and in the files, as the logger has counted them last."""
        found = re.findall(r"^at (\d+) (\d+) (\d+)\n", self.service.out, re.MULTILINE)
        return tuple(map(int, found[-1])) if found else (0, 0, 0)

    @property
    def returned(self) -> list[int]:
        """Messages that log() has returned for."""
        return _numbers(self._returned)

    @property
    def written(self) -> list[int]:
        """Messages that were written to the files."""
        return _numbers(self._written)

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        self.service.wait_for(condition, what)


def _numbers(path: Path) -> list[int]:
    text = path.read_text() if path.exists() else ""
    return [int(line) for line in text.split("\n")[:-1]]


def arrived(kafka: RealKafka, topic: str) -> dict[bytes, list[int]]:
    """The numbers of each key, in the order in which they stand in their partition."""
    found: dict[bytes, list[int]] = defaultdict(list)
    for message in read_topic(kafka.direct_bootstrap_servers, topic):
        found[message.key() or b""].append(int((message.value() or b"")[:10]))
    return found


def all_arrived(kafka: RealKafka, topic: str) -> set[int]:
    return {number for numbers in arrived(kafka, topic).values() for number in numbers}


def assert_in_order(found: dict[bytes, list[int]], *, lives: int) -> None:
    """Each key's numbers rise; after a process was killed some come again, from one place on, as they came before."""
    for key, numbers in found.items():
        assert {number % KEYS for number in numbers} == {int(key[1:])}
        firsts = list(dict.fromkeys(numbers))
        assert firsts == sorted(firsts), f"{key!r} is out of order"
        rewinds = sum(later <= earlier for earlier, later in itertools.pairwise(numbers))
        assert rewinds < lives, f"{key!r} went back {rewinds} times"


def left_in(services: Services) -> list[str]:
    folder = services.folder / "spill"
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "lock"]


@pytest.mark.parametrize("mode", ["always", pytest.param("overflow", marks=pytest.mark.soak)])
def test_broker_and_process_are_killed(own_kafka: RealKafka, own_services: Services, own_topic: str, mode: str) -> None:
    """The first life ends while the broker is gone, the second while it sends what is left of both."""
    proxy = own_kafka.proxies[0]
    # A short queue, so that messages overflow soon, and small batches, so that there are many.
    env = {"KEVEN_LOG_QUEUE_MESSAGES": "500", "KEVEN_LOG_BATCH_MESSAGES": "50"}
    first = Spiller(own_services, "first", mode, first=0, **env)
    first.wait_for(lambda: first.at()[1] > 500, "messages flow")
    own_kafka.kill()
    at_kill = len(first.written)
    first.wait_for(lambda: len(first.written) > at_kill + 3000, "messages are written to the files")
    acknowledged = first.at()[1]
    first.service.kill()
    assert len(first.returned) > acknowledged + 3000
    assert left_in(own_services)

    # The broker is still away: what the first has left is taken over, and what is new goes behind it.
    second = Spiller(own_services, "second", mode, first=1_000_000, pause_s=0.03, **env)
    second.wait_for(lambda: len(second.written) > 1000, "messages are written to the files")
    assert second.at()[1] == 0
    # A slow line, so that the kill comes in the middle.
    proxy.delay(0.03)
    own_kafka.restart()
    left = set(first.written[at_kill + 500 :])
    second.wait_for(lambda: left & all_arrived(own_kafka, own_topic), "it sends what the first has left")
    second.service.kill()
    assert set(second.written) - all_arrived(own_kafka, own_topic)
    proxy.restore()

    third = Spiller(own_services, "third", mode, first=2_000_000, end=2_001_000, **env)
    assert third.service.wait() == 0, third.service.tail()
    assert "flushed 1000 0" in third.service.out, third.service.tail()
    assert left_in(own_services) == []
    assert_in_order(arrived(own_kafka, own_topic), lives=3)
    there = all_arrived(own_kafka, own_topic)
    lives = (first, second, third)
    for life in lives:
        assert set(life.written) <= there
        if mode == "always":
            assert set(life.returned) <= there
        # In memory was what the queue holds, and nothing else.
        assert len(set(life.returned) - there) <= 500
    # Nobody has invented anything: at most the one message that was being logged at the kill.
    assert len(there - {number for life in lives for number in life.returned}) <= 2
    assert not any("damaged" in life.service.err for life in lives)


def test_overflow_and_recovery_of_one_process(own_kafka: RealKafka, own_services: Services, own_topic: str) -> None:
    """Nothing is killed but connections: queue, files and queue again are one sequence, and nothing comes twice."""
    proxy = own_kafka.proxies[0]
    spiller = Spiller(own_services, "logger", "overflow", first=0, KEVEN_LOG_QUEUE_MESSAGES="500")
    spiller.wait_for(lambda: spiller.at()[1] > 500, "messages flow")
    for outage in range(3):
        written, received = len(spiller.written), spiller.at()[1]
        proxy.cut(refuse=True)
        spiller.wait_for(lambda written=written: len(spiller.written) > written + 500, "messages overflow")
        assert spiller.at()[2] > 0
        proxy.restore()
        if outage == 1:
            # Again in the middle of the recovery, and with answers lost.
            hits = proxy.requests_hit[PRODUCE]
            proxy.cut_on_api(PRODUCE, on="response", times=3)
            spiller.wait_for(lambda hits=hits: proxy.requests_hit[PRODUCE] >= hits + 3, "answers are lost")
        spiller.wait_for(lambda received=received: spiller.at()[1] > received + 600, "messages flow again")
        spiller.wait_for(lambda: spiller.at()[2] == 0, "the files are empty")
        written = len(spiller.written)
        taken = spiller.at()[0]
        spiller.wait_for(lambda taken=taken: spiller.at()[0] > taken + 500, "messages flow")
        assert len(spiller.written) == written, "they go past the files again"
    spiller.service.type("end")
    assert spiller.service.wait() == 0, spiller.service.tail()
    count = len(spiller.returned)
    assert f"flushed {count} 0" in spiller.service.out
    found = arrived(own_kafka, own_topic)
    assert sorted(number for numbers in found.values() for number in numbers) == list(range(count))
    assert_in_order(found, lives=1)
    assert left_in(own_services) == []


@pytest.mark.parametrize("ends", ["", "close"], ids=["exit", "close"])
def test_an_end_in_order_while_the_broker_is_away(
    own_kafka: RealKafka, own_services: Services, own_topic: str, ends: str
) -> None:
    """What is in memory goes to the files, so that nothing is lost."""
    proxy = own_kafka.proxies[0]
    env = {"KEVEN_LOG_QUEUE_MESSAGES": "500"}
    first = Spiller(own_services, "first", "overflow", first=0, ends=ends, **env)
    first.wait_for(lambda: first.at()[1] > 500, "messages flow")
    proxy.cut(refuse=True)
    written = len(first.written)
    first.wait_for(lambda: len(first.written) > written + 100, "messages overflow")
    first.service.type("end")
    assert first.service.wait(20) == 0, first.service.tail()
    assert "could not be sent" not in first.service.err
    assert "Traceback" not in first.service.err
    proxy.restore()
    second = Spiller(own_services, "second", "overflow", first=1_000_000, end=1_000_100, **env)
    assert second.service.wait() == 0, second.service.tail()
    assert all_arrived(own_kafka, own_topic) == {*first.returned, *second.returned}
    assert_in_order(arrived(own_kafka, own_topic), lives=2)
    assert left_in(own_services) == []


def test_a_torn_last_record(own_kafka: RealKafka, own_services: Services, own_topic: str) -> None:
    """Killed in the middle of a write: that message was never taken; it is said, kept for people, and not sent."""
    proxy = own_kafka.proxies[0]
    proxy.cut(refuse=True)
    first = Spiller(own_services, "first", "always", first=0, torn=700)
    assert first.service.wait(20) == -9, first.service.tail()
    assert first.returned == list(range(700))
    proxy.restore()
    second = Spiller(own_services, "second", "always", first=1_000_000, end=1_000_100)
    assert second.service.wait() == 0, second.service.tail()
    assert re.search(r"spill file .* is damaged at offset \d+: no whole record is there", second.service.err)
    found = arrived(own_kafka, own_topic)
    numbers = sorted(number for each in found.values() for number in each)
    assert numbers == [*range(700), *range(1_000_000, 1_000_100)]
    assert_in_order(found, lives=1)
    assert [name.endswith(".spill.damaged") for name in left_in(own_services)] == [True]


# --- in this process -------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(own_kafka: RealKafka, own_topic: str, tmp_path: Path) -> Iterator[Callable[..., KafkaBatchLogger]]:
    """Makes loggers that spill into one folder, on the own broker behind its proxy."""
    made: list[KafkaBatchLogger] = []

    def make(mode: str, environ: dict[str, Any], **options: Any) -> KafkaBatchLogger:
        texts = {name: str(value) for name, value in environ.items()}
        settings = Settings.from_env(
            {
                "KAFKA": own_kafka.bootstrap_servers,
                "KEVEN_RDKAFKA_OPTIONS": "reconnect.backoff.max.ms=300",
                **texts,
            }
        )
        options = {"topic": own_topic, "timeout": 30, "spill_dir": tmp_path / "spill", "spill": mode, **options}
        made.append(KafkaBatchLogger(settings=settings, **options))
        return made[-1]

    yield make
    own_kafka.proxies[0].restore()
    for logger in made:
        logger.close()
    close_producers(own_kafka.bootstrap_servers)


def spill_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.spill"))


@pytest.mark.parametrize("mode", ["always", "overflow"])
def test_the_bound_of_the_files(
    own_kafka: RealKafka, own_topic: str, opened: Callable[..., KafkaBatchLogger], tmp_path: Path, mode: str
) -> None:
    """What does not fit is refused, at once, and is not there later; afterwards there is room again."""
    proxy = own_kafka.proxies[0]
    logger = opened(mode, {"KEVEN_SPILL_BYTES": 1 << 20, "KEVEN_LOG_QUEUE_MESSAGES": 200})
    logger.log(b"0", key=b"k")
    assert logger.flush() == 1
    number, refused = 1, []

    def fill() -> None:
        nonlocal number
        for _ in range(2):  # refused, and again
            with pytest.raises(SpillFullError, match="KEVEN_SPILL_BYTES=1048576"):
                while number < 100_000:
                    logger.log(b"%d" % number + b"." * 1000, key=b"k")
                    number += 1
            refused.append(number)
            number += 1

    for _ in range(2):
        proxy.cut(refuse=True)
        before = number
        fill()
        assert 900 < number - before < 1400
        assert spill_size(tmp_path / "spill") <= 1 << 20
        proxy.restore()
        assert logger.flush() == number - len(refused)
        assert logger.spilled_count == 0
        logger.log(b"%d" % number, key=b"k")
        number += 1
    assert logger.flush() == number - len(refused)
    found = [
        int((message.value() or b"").rstrip(b"."))
        for message in read_topic(own_kafka.direct_bootstrap_servers, own_topic)
    ]
    assert found == [each for each in range(number) if each not in refused]


@pytest.mark.parametrize("mode", ["always", "overflow"])
def test_a_message_that_the_broker_refuses_leaves_the_files(
    own_kafka: RealKafka, own_make_topic: Callable[..., str], opened: Callable[..., KafkaBatchLogger], mode: str
) -> None:
    """flush() and on_delivery tell of it; those around it are delivered in order, and it is not tried for ever."""
    topic = own_make_topic(1, {"max.message.bytes": 5000})
    told: list[Delivery] = []
    environ = {"KEVEN_LOG_BATCH_BYTES": 2000, "KEVEN_COMPRESSION": "none", "KEVEN_LOG_QUEUE_MESSAGES": 50}
    logger = opened(mode, environ, topic=topic, on_delivery=told.extend)
    proxy = own_kafka.proxies[0]
    proxy.cut(refuse=True)
    values = [b"%d" % number for number in range(300)]
    large = b"x" * 20_000
    for number, value in enumerate(values):
        logger.log(value, key=b"k")
        if number == 150:
            logger.log(large, key=b"k", headers={"trace": b"1"}, timestamp_ms=1_700_000_000_000)
    assert logger.spilled_count >= 250
    proxy.restore()
    with pytest.raises(DeliveryError) as caught:
        logger.flush()
    assert caught.value.failed_count == 1
    [failure] = caught.value.failures
    assert (failure.value, failure.key, failure.outcome) == (large, b"k", "not delivered")
    assert (failure.headers, failure.timestamp_ms) == ([("trace", b"1")], 1_700_000_000_000)
    assert failure.error is not None
    assert failure.error.name == "MSG_SIZE_TOO_LARGE"
    assert logger.flush() == 300
    assert logger.spilled_count == 0
    assert [message.value() for message in read_topic(own_kafka.direct_bootstrap_servers, topic)] == values
    wait_until(lambda: len(told) >= 301, "on_delivery was told of all", 5)
    assert [each.value for each in told if each.error is None] == values
    assert [each.value for each in told if each.error is not None] == [large]


def test_flush_waits_for_the_files(own_kafka: RealKafka, opened: Callable[..., KafkaBatchLogger]) -> None:
    logger = opened("always", {})
    proxy = own_kafka.proxies[0]
    proxy.cut(refuse=True)
    for number in range(100):
        logger.log(b"%d" % number, key=b"k")
    assert logger.flush(0.3) == 0  # no error: they are safe
    assert logger.spilled_count == 100
    assert logger.pending_count == 0
    proxy.restore()
    assert logger.flush() == 100
    assert logger.spilled_count == 0
    queued = opened("overflow", {})
    proxy.cut(refuse=True)
    queued.log(b"in memory", key=b"k")
    with pytest.raises(KafkaTimeoutError, match="still being sent"):
        queued.flush(0.3)
    proxy.restore()
    assert queued.flush() == 1
