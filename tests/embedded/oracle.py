"""The no-loss oracle of the embedded tests: a load of unique ids, and what handlers have to have seen of it.

Terms as in Jepsen's tests of Kafka: an id that the broker acknowledged and that no handler has seen is *lost*; a first
delivery that comes before that of a smaller offset of its partition is a *skip*; further deliveries are duplicates.
"""

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from embedded_support import DEADLINE_S, Feeder, ends, wait_until

from keven_core.kafka.record import current_record
from keven_core.testing import EmbeddedKafka


@dataclass
class Verdict:
    """What the oracle found."""

    lost: set[int] = field(default_factory=set)
    skips: list[tuple[int, int, int]] = field(default_factory=list)
    unknown: set[int] = field(default_factory=set)
    duplicates: int = 0

    @property
    def good(self) -> bool:
        """At least once, in order."""
        return not (self.lost or self.skips or self.unknown)


class Load:
    """Writes unique ids to all partitions of a topic from a thread, paced by what was handled; a context manager.

    Arguments:
        window: how many ids may be under way; the embedded broker drops old records silently.
        total: how many ids; None: until the end of the block.
    """

    def __init__(
        self, kafka: EmbeddedKafka, topic: str, partitions: int = 1, *, window: int = 100, total: int | None = None
    ) -> None:
        self.topic = topic
        self.sent: list[int] = []
        self._partitions = partitions
        self._window = window
        self._kafka = kafka
        self._total = total
        self._lock = threading.Lock()
        self._first: dict[int, tuple[int, int]] = {}  # id -> (partition, offset) of its first delivery, in order
        self._deliveries: Counter[int] = Counter()
        self._ended = threading.Event()
        self._feeder = Feeder(kafka)
        self._thread = threading.Thread(target=self._run, name="load")

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()
        self._feeder.__exit__()

    def _run(self) -> None:
        number = 0
        while not self._ended.is_set() and number != self._total:
            if number - len(self._first) >= self._window:
                self._ended.wait(0.001)
                continue
            self._feeder.send(self.topic, b"%d" % number, number % self._partitions)
            self.sent.append(number)
            number += 1

    def handle(self, message: bytes) -> None:
        """The handler: takes note that an id was seen."""
        record = current_record()
        self.take(int(message), record.partition, record.offset)

    def take(self, number: int, partition: int = 0, offset: int = 0) -> None:
        """Take note that an id was seen."""
        with self._lock:
            self._deliveries[number] += 1
            self._first.setdefault(number, (partition, offset))

    @property
    def handled(self) -> int:
        """How many different ids have been seen."""
        return len(self._first)

    def wait_for_more(self, count: int = 50) -> None:
        """Wait until that many more ids have been seen: traffic flows."""
        wanted = self.handled + count
        wait_until(lambda: self.handled >= wanted, f"{count} more records")

    def finish(self, timeout_s: float = DEADLINE_S) -> None:
        """End the load and wait until the broker has acknowledged all of it and the handlers have seen it."""
        self.end()
        wait_until(lambda: self.handled >= len(self.sent), "the handlers see everything", timeout_s)

    def end(self) -> None:
        """End the load, once it has its total; the broker has then acknowledged it."""
        if self._total is None:
            self._ended.set()
        self._thread.join()
        self._feeder.wait()

    def verdict(self) -> Verdict:
        """Compare what was sent with what was seen."""
        found = Verdict(
            lost=set(self.sent) - self._first.keys(),
            unknown=self._first.keys() - set(self.sent),
            duplicates=sum(self._deliveries.values()) - len(self._deliveries),
        )
        last: dict[int, int] = {}
        for number, (partition, offset) in self._first.items():
            if offset < last.get(partition, -1):
                found.skips.append((number, partition, offset))
            last[partition] = max(offset, last.get(partition, -1))
        return found

    def ends(self) -> dict[int, int]:
        """The end of each partition: what has to be committed when all is done.

        Asked of the broker: a batch whose answer was cut off is sent again, and then stands there twice.
        """
        return ends(self._kafka, self.topic)

    def check(self) -> Any:
        """Fail unless everything was delivered, in order; returns the verdict."""
        found = self.verdict()
        assert found.good, found
        return found
