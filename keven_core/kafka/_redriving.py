"""The I/O of a redrive: reads letters, writes copies, commits offsets, in the thread that calls Run.run().

Letters are read with confluent-kafka's consumer, whose objects stay in this module: what leaves it is bytes and str.
The consumer never joins its group, so nothing has to be waited for after a run that was killed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any

from keven_core._native.producer import DeliveryAccount
from keven_core.kafka._copies import COPY_TOPIC_CONFIG, copy_options
from keven_core.kafka._producers import shared_producer
from keven_core.kafka.admin import create_topics
from keven_core.kafka.config import Settings
from keven_core.kafka.errors import (
    AuthenticationError,
    CommitError,
    DeliveryError,
    KafkaError,
    KafkaTimeoutError,
    KevenError,
    RedriveError,
    UnknownTopicError,
    delivery_error,
    kafka_error,
    refused_credentials,
)
from keven_core.kafka.logs import RateLimiter, one_line
from keven_core.kafka.redrive import Copy, Decision, Letter, Redrive, RedriveReport, decide

__all__ = ["Pace", "Run"]

logger = logging.getLogger("keven_core.kafka")

_CLIENT_ID = "keven-redrive"
# How long Kafka may take for an answer, at each try and in all.
_TRY_S = 3.0
_QUERY_S = 10.0
_PAUSE_S = 0.1
# Errors that pass by themselves.
_PASSING = frozenset(
    {
        "COORDINATOR_LOAD_IN_PROGRESS",
        "COORDINATOR_NOT_AVAILABLE",
        "LEADER_NOT_AVAILABLE",
        "NOT_COORDINATOR",
        "NOT_LEADER_FOR_PARTITION",
        "REQUEST_TIMED_OUT",
        "_ALL_BROKERS_DOWN",
        "_TIMED_OUT",
        "_TRANSPORT",
        "_WAIT_COORD",
    }
)
# How long a partition that holds something may stay silent.
_PATIENCE_S = 60.0
# How long copies may take; librdkafka gives a message up before the wait for its answer ends.
_SEND_S = 30.0
_ANSWER_S = 60.0
_CLOSE_MS = 5000
_NAMED_LETTERS = 10


class Pace:
    """Spreads copies evenly: one every 1/rate seconds, without making up for pauses. None: no limit."""

    def __init__(self, rate: float | None) -> None:
        self._interval_s = 1 / rate if rate else 0.0
        self._next = 0.0

    def delay_s(self, now: float) -> float:
        """Take the next place; how long after `now` it is."""
        at = max(now, self._next)
        self._next = at + self._interval_s
        return at - now


class Run:
    """One run of a redrive.

    Arguments:
        plan: what to copy where.
        stop: set: end after the letter in hand; its wait() is what the rate is kept with.
        now: a monotonic clock, in seconds.
    """

    def __init__(
        self, plan: Redrive, settings: Settings, address: str, stop: Event, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._address = address
        self._stop = stop
        self._now = now
        self._pace = Pace(plan.rate)
        self._report = RedriveReport(plan.dead_letter_topic, plan.group_id, plan.dry_run)
        # What was decided since the last settlement, in order; and what became of sending it, if it was copied.
        self._unsettled: list[tuple[Letter, Decision, DeliveryAccount | KevenError | None]] = []
        self._settled_at = 0.0

    def run(self) -> RedriveReport:
        """Do it. See Redrive.run() for what it raises."""
        plan = self._plan
        with ExitStack() as stack:
            letters = stack.enter_context(closing(_Letters(plan, self._settings, self._address)))
            topics = self._with_parking_topic(letters.topics())
            letters.start(topics.get(plan.dead_letter_topic, 0))
            copies = None
            if not plan.dry_run:
                copies = stack.enter_context(closing(_Copies(self._settings, self._address)))
            self._settled_at = self._now()
            for letter in letters.until_end(self._stop):
                decision = decide(letter, plan, topics)
                sent = None
                if decision.copy is not None and copies is not None:
                    if not self._await_turn(letters, copies):
                        break
                    sent = copies.send(letter, decision.copy)
                self._unsettled.append((letter, decision, sent))
                refused = isinstance(sent, KevenError)
                if refused or len(self._unsettled) >= self._settings.batch_size or self._is_due(0):
                    self._settle(letters, copies)
            self._settle(letters, copies)
            self._report.complete = letters.ended
        return self._report

    def _with_parking_topic(self, topics: dict[str, int]) -> dict[str, int]:
        """The topics that copies can go to. Raises UnknownTopicError when one that was asked for is not there."""
        plan = self._plan
        if plan.parking_topic and plan.parking_topic not in topics and self._settings.create_topics:
            if not plan.dry_run:
                create_topics(self._settings, self._address, [plan.parking_topic], config=COPY_TOPIC_CONFIG)
            topics = {**topics, plan.parking_topic: 1}
        for name in ("to_topic", "parking_topic"):
            topic = getattr(plan, name)
            if topic is not None and topic not in topics:
                raise UnknownTopicError(
                    f"{name}={topic!r} does not exist on {self._address}: create it, or check the name",
                    name="UNKNOWN_TOPIC_OR_PART",
                )
        return topics

    def _await_turn(self, letters: _Letters, copies: _Copies) -> bool:
        """Keep the rate; False: stop was set meanwhile."""
        delay_s = self._pace.delay_s(self._now())
        if delay_s <= 0:
            return True
        if self._is_due(delay_s):
            self._settle(letters, copies)
        return not self._stop.wait(delay_s)

    def _is_due(self, delay_s: float) -> bool:
        return self._now() + delay_s - self._settled_at >= self._settings.commit_interval_ms / 1000

    def _settle(self, letters: _Letters, copies: _Copies | None) -> None:
        """Wait for the answers to the copies, then commit: in each partition up to the first that failed."""
        offsets: dict[int, int] = {}
        failed: list[tuple[Letter, KevenError]] = []
        for letter, decision, sent in self._unsettled:
            failure = copies.failure(sent) if copies is not None and sent is not None else None
            if failure is not None:
                failed.append((letter, failure))
            elif all(other.partition != letter.partition for other, _ in failed):
                offsets[letter.partition] = letter.offset + 1
            self._report.count(letter, "failed" if failure is not None else decision.outcome, decision.why)
        self._unsettled.clear()
        if offsets and not self._plan.dry_run:
            letters.commit(offsets)
        self._settled_at = self._now()
        if failed:
            raise self._failed(failed)

    def _failed(self, failed: list[tuple[Letter, KevenError]]) -> RedriveError:
        named = ", ".join(f"[{letter.partition}] @ {letter.offset}" for letter, _ in failed[:_NAMED_LETTERS])
        deliveries = [d for _, failure in failed if isinstance(failure, DeliveryError) for d in failure.failures]
        first = failed[0][1]
        error = RedriveError(
            f"{len(failed)} letter(s) of {self._plan.dead_letter_topic} could not be copied: {named}"
            f"{', ...' if len(failed) > _NAMED_LETTERS else ''}; {first}; their offsets stay: run it again, or leave "
            f"them out with a filter",
            [(letter.partition, letter.offset) for letter, _ in failed],
            failures=deliveries[:_NAMED_LETTERS],
            failed_count=len(failed),
        )
        error.__cause__ = first
        error.report = self._report
        return error


class _Copies:
    """Writes copies, on a producer of its own that is idempotent and waits for all replicas."""

    def __init__(self, settings: Settings, address: str) -> None:
        options = copy_options(settings, address, _CLIENT_ID, timeout_s=_SEND_S)
        # A topic that has gone meanwhile must not be made anew.
        self._shared = shared_producer(replace(settings, create_topics=False), options, address, owner=self)

    def send(self, letter: Letter, copy: Copy) -> DeliveryAccount | KevenError:
        """Queue a copy; returns an account of its own, or why it could not even be queued."""
        account = DeliveryAccount(keep_failures=1)
        try:
            self._shared.client.produce(
                copy.topic,
                letter.value,
                account,
                key=letter.key,
                headers=list(copy.headers),
                partition=copy.partition,
                timestamp_ms=max(letter.timestamp_ms, 0),
            )
        except KevenError as error:
            return error
        return account

    def failure(self, sent: DeliveryAccount | KevenError) -> KevenError | None:
        """Wait for the answer to a copy; returns why it failed, None when it is acknowledged. Blocks up to 60 s."""
        if isinstance(sent, KevenError):
            return sent
        deadline = time.monotonic() + _ANSWER_S
        while not self._shared.client.wait(sent, 0.2):
            self._shared.check_credentials()
            if time.monotonic() > deadline:
                raise KafkaTimeoutError(
                    f"the broker has not answered within {_ANSWER_S:g} s; offsets stay", name="_TIMED_OUT"
                )
        count, kept = sent.take_failures()
        return delivery_error(count, kept) if count else None

    def close(self) -> None:
        """Free the producer."""
        self._shared.close(_CLOSE_MS)


class _ClientLog:
    """What confluent-kafka's consumer logs to: a flood of lines becomes a few."""

    def __init__(self) -> None:
        self._limiter = RateLimiter(3, 10.0)

    def log(self, level: int, _: str, facility: str, client: str, text: str) -> None:
        """Called by the client's poll()."""
        if self._limiter.admit(facility) is not None:
            logger.log(level, "librdkafka %s: %s", facility, one_line(text, 1000))


class _Letters:
    """Reads the dead letters from where the group is to the ends as of the start."""

    def __init__(self, plan: Redrive, settings: Settings, address: str) -> None:
        from confluent_kafka import Consumer

        self._plan = plan
        self._address = address
        self._refused: AuthenticationError | None = None
        self._committed: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        options: dict[str, Any] = {
            **settings.consumer_options(
                address,
                _CLIENT_ID,
                plan.group_id,
                max_poll_interval_s=300,
                session_timeout_s=6,
                heartbeat_interval_s=2,
                commit=False,
                partition_eof=True,
            ),
            "auto.offset.reset": "earliest",
            "error_cb": self._note_error,
        }
        # It never joins, so neither the group's protocol nor a static membership concern it.
        options = {key: value for key, value in options.items() if key == "group.id" or not key.startswith("group.")}
        source = settings.oauth_token
        if source is not None:
            options["oauth_cb"] = lambda given: source(given)[:2]
        self._client = Consumer(options, logger=_ClientLog())

    @property
    def ended(self) -> bool:
        """Whether all partitions were read to their ends."""
        return not self._ends

    def topics(self) -> dict[str, int]:
        """Topics that exist, with their numbers of partitions. Blocks up to 10 s; less if credentials are refused."""
        listing = self._ask(
            lambda: self._client.list_topics(timeout=_TRY_S), f"the topics at {self._address} can't be listed"
        )
        return {name: len(topic.partitions) for name, topic in listing.topics.items() if topic.partitions}

    def start(self, partitions: int) -> None:
        """Take position. Blocks up to 10 s a partition."""
        from confluent_kafka import TopicPartition

        topic = self._plan.dead_letter_topic
        if not partitions:
            raise UnknownTopicError(
                f"the dead-letter topic {topic} does not exist on {self._address}: check the name; it is "
                f"kafka_server.<client id>.dead, and is created when its server starts",
                name="UNKNOWN_TOPIC_OR_PART",
            )
        self._committed = self._ask_committed(range(partitions))
        starts = []
        for partition, committed in self._committed.items():
            asked = TopicPartition(topic, partition)
            low, high = self._ask(
                partial(self._client.get_watermark_offsets, asked, timeout=_TRY_S), f"the ends of {topic} can't be had"
            )
            # An offset outside of what is there belongs to letters that have gone.
            start = committed if low <= committed <= high and not self._plan.from_beginning else low
            if start < high:
                self._ends[partition] = high
                starts.append(TopicPartition(topic, partition, start))
        self._client.assign(starts)

    def until_end(self, stop: Event) -> Iterator[Letter]:
        """Letters, in order in each partition, until the ends are reached or `stop` is set."""
        while self._ends and not stop.is_set():
            message = self._next(stop)
            if message is None:
                continue
            partition, offset = message.partition(), message.offset()
            end = self._ends.get(partition, 0)
            if message.error() is not None or offset >= end:
                self._finish(partition)  # the last offsets before the end hold no letters
                continue
            yield Letter(
                partition,
                offset,
                message.value(),
                message.key(),
                tuple(message.headers() or ()),
                message.timestamp()[1],
            )
            if offset + 1 >= end:
                self._finish(partition)

    def _next(self, stop: Event) -> Any:
        """The next message, or the news that a partition is at its end; None when `stop` is set."""
        deadline = time.monotonic() + _PATIENCE_S
        while not stop.is_set():
            message = self._client.poll(0.2)
            error = message.error() if message is not None else None
            if message is not None and (error is None or error.name() == "_PARTITION_EOF"):
                return message
            if error is not None and not error.retriable():
                raise kafka_error(error.code(), error.name(), f"{self._plan.dead_letter_topic}: {error.str()}")
            if self._refused is not None:
                raise self._refused
            if time.monotonic() > deadline:
                raise KafkaTimeoutError(
                    f"{self._plan.dead_letter_topic} at {self._address}: nothing came for {_PATIENCE_S:g} s, and the "
                    f"end is not reached; what was copied is committed, run it again",
                    name="_TIMED_OUT",
                )
        return None

    def _finish(self, partition: int) -> None:
        from confluent_kafka import TopicPartition

        if self._ends.pop(partition, None) is not None:
            self._client.incremental_unassign([TopicPartition(self._plan.dead_letter_topic, partition)])

    def commit(self, offsets: dict[int, int]) -> None:
        """Commit offsets by partition, and wait for the answer. Raises CommitError."""
        from confluent_kafka import TopicPartition

        topic, group = self._plan.dead_letter_topic, self._plan.group_id
        wanted = [(topic, partition, offset) for partition, offset in offsets.items()]
        found = self._ask_committed(offsets)
        if any(found[partition] != self._committed[partition] for partition in offsets):
            raise CommitError(
                f"the offsets of group {group} were changed by somebody else while {topic} was redriven: run one "
                f"redrive of a group at a time; what was copied since the last commit may be copied twice",
                wanted,
            )
        given = [TopicPartition(*entry) for entry in wanted]
        try:
            self._ask(
                lambda: _checked(self._client.commit(offsets=given, asynchronous=False)),
                f"the offsets of group {group} could not be committed",
            )
        except KafkaError as error:
            raise CommitError(
                f"{error}; what was copied since the last commit will be copied again",
                wanted,
                code=error.code,
                name=error.name,
            ) from None
        self._committed.update(offsets)

    def close(self) -> None:
        """Leave. What is not committed comes again."""
        self._client.close()

    def _ask_committed(self, partitions: Iterable[int]) -> dict[int, int]:
        from confluent_kafka import TopicPartition

        asked = [TopicPartition(self._plan.dead_letter_topic, partition) for partition in partitions]
        answers = self._ask(
            lambda: _checked(self._client.committed(asked, timeout=_TRY_S)),
            f"the offsets of group {self._plan.group_id} can't be had",
        )
        return {entry.partition: entry.offset for entry in answers}

    def _ask(self, question: Callable[[], Any], otherwise: str) -> Any:
        """Kafka's answer; asked again for up to 10 s while its brokers are away or hand their duties over."""
        from confluent_kafka import KafkaException

        deadline = time.monotonic() + _QUERY_S
        while True:
            try:
                return question()
            except KafkaException as exception:
                error = exception.args[0]
            if not self._ends:
                self._client.poll(0)  # calls _note_error; with partitions assigned it would take a letter
            if self._refused is not None:
                raise self._refused
            if error.name() not in _PASSING or time.monotonic() > deadline:
                raise kafka_error(error.code(), error.name(), f"{otherwise}: {error.str()}")
            time.sleep(_PAUSE_S)

    def _note_error(self, error: Any) -> None:
        found = refused_credentials(kafka_error(error.code(), error.name(), error.str()))
        if found is not None:
            self._refused = found
        else:
            logger.info("redrive: %s", error.str())


def _checked(answers: list[Any]) -> list[Any]:
    """Offsets as confluent-kafka gives them, each of which can be an error."""
    from confluent_kafka import KafkaException

    for entry in answers:
        if entry.error:
            raise KafkaException(entry.error)
    return answers
