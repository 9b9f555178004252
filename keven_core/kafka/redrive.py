"""Redrive: copy dead letters back to where they came from, or to another topic.

    python -m keven_core.kafka.redrive kafka_server.orders.dead --event ORDER_PLACED --dry-run

    report = Redrive("kafka_server.orders.dead", event_names="ORDER_PLACED", rate=50).run()

It copies: Kafka keeps the letters for as long as their topic does. What has been dealt with is known by the committed
offsets of a consumer group, which move past all letters that were read, those that a filter leaves out included;
`from_beginning`, or another `group_id`, reads them again. As those of every idle group they expire on the broker
(offsets.retention.minutes, 7 days by default); then a run starts at the first letter.

A copy has the letter's value and key, its original timestamp, and its headers but for those that dead-lettering added:

                               back to its origin    to another topic    to the parking topic
    kafka_dlt-exception-*      removed               removed             stay
    kafka_dlt-original-*       removed               stay                stay
    keven_redrive-count        one more              one more            stays
    all others, traceparent    stay                  stay                stay

So a record that comes back to its origin starts afresh: if it fails again, its next letter names its new offset, where
Spring's rule "the first origin is kept" would name the old one for ever. In another topic the origin is still news. A
parked letter stays a letter: it can be looked at, and redriven from there. Back in its origin a copy gets the partition
that it came from, where its consumer expects it, if there still is one; elsewhere its key decides. With its original
timestamp a copy can be older than its topic keeps records (retention.ms) or takes them (then it fails:
message.timestamp.before.max.ms).

Dialects that are understood: Spring's (kafka_dlt-*, and kafka_original-*, kafka_exception-* of its retry topics; big-
endian numbers) and that of the brokers' share groups (__dlq.errors.*, KIP-1191; text). What retry topics add
(retry_topic-*, kafka_deliveryAttempt, keven_retry-*) counts attempts, which start afresh too: it goes with the origin.

This module decides; keven_core.kafka._redriving reads, writes and commits.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime
from enum import Enum
from functools import cached_property
from threading import Event
from typing import TYPE_CHECKING, Any

import msgspec

from keven_core.kafka.codecs import codec_of, names_codec
from keven_core.kafka.config import Settings
from keven_core.kafka.envelope import name_decoders
from keven_core.kafka.errors import ConfigurationError
from keven_core.kafka.kinds import EVENTS, KINDS
from keven_core.kafka.logs import one_line
from keven_core.kafka.topics import check_topic

if TYPE_CHECKING:
    from keven_core._native.dispatch import DispatchTable

__all__ = ["REDRIVE_COUNT", "Copy", "Decision", "Letter", "Redrive", "RedriveReport", "decide"]

REDRIVE_COUNT = "keven_redrive-count"

Headers = tuple[tuple[str, "bytes | None"], ...]

_ORIGIN_TOPIC = ("kafka_dlt-original-topic", "kafka_original-topic", "__dlq.errors.topic")
_ORIGIN_PARTITION = ("kafka_dlt-original-partition", "kafka_original-partition")
_ORIGIN_TIMESTAMP = ("kafka_dlt-original-timestamp", "kafka_original-timestamp")
_EXCEPTION = ("kafka_dlt-exception-fqcn", "kafka_exception-fqcn", "kafka_dlt-key-exception-fqcn")
_CAUSE = ("kafka_dlt-exception-cause-fqcn", "kafka_exception-cause-fqcn")
_KAFKA_TEXT = "__dlq.errors.message"
_TEXT = (
    "kafka_dlt-exception-message",
    "kafka_exception-message",
    "kafka_dlt-key-exception-message",
    _KAFKA_TEXT,
)

# What dead-lettering adds, by the beginnings of the headers' names.
_REASON_HEADERS = (
    "kafka_dlt-exception-",
    "kafka_dlt-key-exception-",
    "kafka_exception-",
    "__dlq.errors.delivery.count",
    _KAFKA_TEXT,
)
_ORIGIN_HEADERS = (
    "kafka_dlt-original-",
    "kafka_original-",
    "kafka_deliveryAttempt",
    "retry_topic-",
    "keven_first-failure-timestamp",
    "keven_retry-handlers",
    "__dlq.errors.",
)

_CLASS_FIRST = re.compile(r"([A-Za-z_][\w.$<>]*\.[\w$<>]+): ")

# msgspec recurses once per level of nesting; fewer openings than this can't nest deeper than is safe.
_MAX_OPENINGS = 200
_OPENINGS = {True: re.compile(rb"[{\[]"), False: re.compile(rb"[\x80-\x9f\xdc-\xdf]")}


@dataclass(frozen=True)
class Redrive:
    """What is to be copied where. A plain value, checked when it is made; run() does it.

    Arguments:
        dead_letter_topic: the topic whose letters are read, `kafka_server.<client id>.dead` of a server.
        to_topic: where copies go; None: each to the topic that it came from. A letter whose origin can't be told is
            left and reported then, as is one whose origin does not exist any more.
        parking_topic: where letters go that have been redriven `max_redrives` times; None: they are left and reported.
            It is created if it is missing and KEVEN_CREATE_TOPICS allows it; no other topic is.
        max_redrives: how often a record is sent back before it counts as hopeless; 3 by default. Its header
            keven_redrive-count tells how often it was.
        origin_topics, event_names, exceptions, keys: filters, each a name or several. A letter is copied if every
            filter that is given lets it pass. An exception is named by its class, with its module or without, and may
            be the cause of the one that was raised; a key given as str is UTF-8.
        text: a filter: part of the exception's text.
        since, until: a filter: when the record was first written, from `since` on and before `until`. Without a time
            zone: the local one.
        rate: copies a second at most; None: no limit.
        dry_run: nothing is written and committed, only reported.
        from_beginning: start at the first letter instead of where the group is.
        group_id: the consumer group whose offsets tell what was dealt with; `keven-redrive.<dead_letter_topic>` by
            default. One run of a group at a time: a second one is stopped when it commits.

    Raises ConfigurationError when a value is not allowed.
    """

    dead_letter_topic: str
    _: KW_ONLY
    to_topic: str | None = None
    parking_topic: str | None = None
    max_redrives: int = 3
    origin_topics: Collection[str] = ()
    event_names: Collection[str] = ()
    exceptions: Collection[str] = ()
    text: str = ""
    keys: Collection[bytes | str] = ()
    since: datetime | None = None
    until: datetime | None = None
    rate: float | None = None
    dry_run: bool = False
    from_beginning: bool = False
    group_id: str = ""

    def __post_init__(self) -> None:
        check_topic(self.dead_letter_topic)
        for name in ("to_topic", "parking_topic"):
            topic = getattr(self, name)
            if topic is not None and check_topic(topic) == self.dead_letter_topic:
                raise ConfigurationError(
                    f"{name}={topic!r} is the topic that is read: letters would come back for ever; name another one"
                )
        if not isinstance(self.max_redrives, int) or isinstance(self.max_redrives, bool) or self.max_redrives < 0:
            raise ConfigurationError(f"max_redrives={self.max_redrives!r} is not allowed: a whole number, 0 or more")
        if self.rate is not None and not (_is_number(self.rate) and 0 < self.rate < math.inf):
            raise ConfigurationError(f"rate={self.rate!r} is not allowed: copies a second, more than 0; None: no limit")
        for name in ("since", "until"):
            if not isinstance(getattr(self, name), datetime | None):
                raise ConfigurationError(f"{name}={getattr(self, name)!r} is not allowed: a datetime, or None")
        if self.since and self.until and self.since.timestamp() >= self.until.timestamp():
            raise ConfigurationError(f"since={self.since} is not before until={self.until}: no letter could match")
        if not isinstance(self.text, str):
            raise ConfigurationError(f"text={self.text!r:.80} is not allowed: a str, part of the exception's text")
        self._set("origin_topics", frozenset(map(check_topic, self._several("origin_topics", str))))
        self._set("event_names", frozenset(map(EVENTS.name_of, self._several("event_names", str, Enum))))
        self._set("exceptions", frozenset(self._several("exceptions", str)))
        keys = self._several("keys", str, bytes)
        self._set("keys", frozenset(key.encode() if isinstance(key, str) else key for key in keys))
        self._set("group_id", self.group_id or f"keven-redrive.{self.dead_letter_topic}")

    def _several(self, name: str, *kinds: type) -> Collection[Any]:
        given = getattr(self, name)
        entries = (given,) if isinstance(given, kinds) else given
        if not isinstance(entries, Collection) or not all(isinstance(entry, kinds) for entry in entries):
            allowed = " or ".join(kind.__name__ for kind in kinds)
            raise ConfigurationError(f"{name}={given!r:.80} is not allowed: {allowed}, or a list of them")
        return entries

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen: this is its constructor

    def run(
        self, *, kafka_address: str | None = None, settings: Settings | None = None, stop: Event | None = None
    ) -> RedriveReport:
        """Copy what is there now, in the calling thread, and tell what was done.

        Blocks until everything up to the ends of the partitions, as of the start, has been dealt with; copies that fail
        again and come back meanwhile are left to the next run. The offset of a letter is committed when the broker has
        acknowledged its copy, every KEVEN_BATCH_SIZE letters or KEVEN_COMMIT_INTERVAL_MS, whichever comes first: a run
        that was killed, or has raised, is resumed by the next one of its group, and only what was not committed is
        copied twice. Setting `stop`, from any thread or a signal handler, ends the run in order after the letter in
        hand: what is under way is acknowledged and committed.

        Arguments:
            kafka_address: host:port of the brokers, comma-separated; the environment variable KAFKA wins.
            settings: a Settings object; None: from the environment.

        Raises RedriveError, naming the letters, when copies are not acknowledged: their offsets stay; CommitError;
        UnknownTopicError, BrokerUnavailableError, AuthenticationError and other KafkaErrors.
        """
        from keven_core.kafka._redriving import Run

        # Copies keep their bytes, so a KEVEN_CODEC that only the service has registered does not matter.
        given = Settings.from_env(codec="json") if settings is None else settings
        return Run(self, given, given.address(kafka_address), stop or Event()).run()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- letters ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Letter:
    """A dead letter, and what its headers tell. None: they don't."""

    partition: int
    offset: int
    value: bytes | None = None
    key: bytes | None = None
    headers: Headers = ()
    written_ms: int = -1

    @cached_property
    def _values(self) -> dict[str, bytes]:
        return {name: value for name, value in self.headers if value is not None}  # the last of a name counts

    def _first(self, names: tuple[str, ...]) -> bytes | None:
        return next((self._values[name] for name in names if name in self._values), None)

    def _text(self, names: tuple[str, ...]) -> str | None:
        value = self._first(names)
        return None if value is None else value.decode("utf-8", "replace")

    @cached_property
    def origin_topic(self) -> str | None:
        """The topic that it came from. Never one of Kafka's own: whoever may write letters could name them."""
        topic = self._text(_ORIGIN_TOPIC)
        with contextlib.suppress(ConfigurationError):
            return None if topic is None or topic.startswith("__") else check_topic(topic)
        return None

    @property
    def origin_partition(self) -> int | None:
        """The partition that it came from."""
        number = _big_endian(self._first(_ORIGIN_PARTITION))
        return _decimal(self._values.get("__dlq.errors.partition")) if number is None else number

    @property
    def timestamp_ms(self) -> int:
        """When the record was first written, in ms since the epoch; negative: unknown."""
        original = _big_endian(self._first(_ORIGIN_TIMESTAMP))
        return self.written_ms if original is None else original

    @property
    def exception(self) -> str | None:
        """Class of the exception, with its module. In the brokers' dialect our servers put it before the text."""
        named = _CLASS_FIRST.match(self._text((_KAFKA_TEXT,)) or "")
        return self._text(_EXCEPTION) or (named[1] if named else None)

    @property
    def cause(self) -> str | None:
        """Class of that exception's cause."""
        return self._text(_CAUSE)

    @property
    def text(self) -> str:
        """The exception's text, or what the broker says instead."""
        return self._text(_TEXT) or ""

    @property
    def redrive_count(self) -> int:
        """How often the record was sent back before."""
        return _decimal(self._values.get(REDRIVE_COUNT)) or 0

    @property
    def event_name(self) -> str | None:
        """The event or command, told as consumers do: by the value's first field, the header, the whole value.

        So a value that can't be decoded has one too, if it begins with its name. A value of a codec has one where the
        codec is registered.
        """
        found = (table.name_of(self.value, self.origin_topic, self.headers) for table in _name_tables())
        name = next(filter(None, found), None)
        if name is None and "event_name" in self._values:
            name = self._values["event_name"].decode("utf-8", "replace")
        return name or _decoded_name(self.value)


def _big_endian(value: bytes | None) -> int | None:
    """A number as Java writes it, of any length; None if there is none, or it is negative."""
    number = int.from_bytes(value, "big", signed=True) if value and len(value) <= 8 else -1
    return number if number >= 0 else None


def _decimal(value: bytes | None) -> int | None:
    return int(value) if value and value.isdigit() and len(value) < 10 else None


def _name_tables() -> list[DispatchTable]:
    from keven_core._native.dispatch import DispatchTable

    tables = []
    for kind in KINDS:  # anew for each letter, since a table keeps the codecs that it has found; that takes 2 us
        name_json, name_msgpack = name_decoders(kind.name_field)
        tables.append(
            DispatchTable(
                name_field=kind.name_field,
                name_json=name_json,
                name_msgpack=name_msgpack,
                codec_of=codec_of,
                names_codec=names_codec,
            )
        )
    return tables


def _decoded_name(value: bytes | None) -> str | None:
    if not value:
        return None
    is_json = value[0] < 0x80
    if len(_OPENINGS[is_json].findall(value)) > _MAX_OPENINGS:
        return None
    for kind in KINDS:
        decode_json, decode_msgpack = name_decoders(kind.name_field)
        with contextlib.suppress(msgspec.MsgspecError, ValueError):
            name = decode_json(value) if is_json else decode_msgpack(value)
            if name is not None:
                return name
    return None


# --- decisions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copy:
    """Where a copy goes, and its headers. Partition -1: the key decides."""

    topic: str
    partition: int
    headers: Headers


@dataclass(frozen=True)
class Decision:
    """What becomes of a letter.

    Attributes:
        outcome: "redriven", "parked", "skipped" (a filter leaves it out) or "left" (it matches, and can't go anywhere).
        why: of a letter that is skipped, the filter; of one that is left, the reason.
        copy: None: none is made.
    """

    outcome: str
    why: str = ""
    copy: Copy | None = None


def decide(letter: Letter, plan: Redrive, topics: Mapping[str, int]) -> Decision:
    """What becomes of a letter; `topics` are those that exist, with their numbers of partitions."""
    skipping = _skipping_filter(letter, plan)
    if skipping is not None:
        return Decision("skipped", skipping)
    if letter.redrive_count >= plan.max_redrives:
        if plan.parking_topic is None:
            return Decision("left", f"redriven {plan.max_redrives} times or more")
        return Decision("parked", copy=Copy(plan.parking_topic, -1, letter.headers))
    target = plan.to_topic or letter.origin_topic
    if target is None:
        return Decision("left", "no origin")
    if target == plan.dead_letter_topic:
        return Decision("left", "its origin is this topic")
    if target not in topics:
        return Decision("left", f"no topic {target}")
    partition = letter.origin_partition if target == letter.origin_topic else None
    if partition is None or partition >= topics[target]:
        partition = -1
    return Decision("redriven", copy=Copy(target, partition, _headers_for(letter, target)))


def _skipping_filter(letter: Letter, plan: Redrive) -> str | None:
    since_ms = plan.since.timestamp() * 1000 if plan.since else -math.inf
    until_ms = plan.until.timestamp() * 1000 if plan.until else math.inf
    passes = {
        "origin": not plan.origin_topics or letter.origin_topic in plan.origin_topics,
        "key": not plan.keys or letter.key in plan.keys,
        "time": since_ms <= letter.timestamp_ms < until_ms,
        "exception": not plan.exceptions or any(name in plan.exceptions for name in _class_names(letter)),
        "text": plan.text in letter.text,
        "event": not plan.event_names or letter.event_name in plan.event_names,
    }
    return next((name for name, passed in passes.items() if not passed), None)


def _class_names(letter: Letter) -> set[str]:
    classes = {name for name in (letter.exception, letter.cause) if name}
    return classes | {re.split(r"[.$]", name)[-1] for name in classes}


def _headers_for(letter: Letter, target: str) -> Headers:
    added = _REASON_HEADERS + (_ORIGIN_HEADERS if target == letter.origin_topic else ())
    kept = tuple(pair for pair in letter.headers if pair[0] != REDRIVE_COUNT and not pair[0].startswith(added))
    return (*kept, (REDRIVE_COUNT, b"%d" % (letter.redrive_count + 1)))


# --- the report ------------------------------------------------------------------------------------------------------

_OUTCOMES = ("redriven", "parked", "left", "failed", "skipped")


@dataclass
class RedriveReport:
    """What a run has done, or, after a dry run, would do. Counts are of letters.

    Attributes:
        read: all that were read; `matched`: those that every filter lets pass.
        redriven, parked: copied, and acknowledged by the broker.
        failed: their copies were not acknowledged; their offsets stay.
        skipped: by the first filter that leaves them out.
        left: by the reason why they match and go nowhere.
        by_origin: (origin topic, exception) to outcome to count; "?" stands for what is not known.
        complete: whether the run came to the ends of the partitions.
    """

    dead_letter_topic: str
    group_id: str
    dry_run: bool = False
    complete: bool = False
    read: int = 0
    matched: int = 0
    redriven: int = 0
    parked: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    by_origin: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)

    def count(self, letter: Letter, outcome: str, why: str = "") -> None:
        """Add a letter whose fate is known."""
        self.read += 1
        self.matched += outcome != "skipped"
        if outcome in ("skipped", "left"):
            getattr(self, outcome)[why] += 1
        else:
            setattr(self, outcome, getattr(self, outcome) + 1)
        group = (letter.origin_topic or "?", one_line(letter.exception or "?", 100))
        self.by_origin.setdefault(group, Counter())[outcome] += 1

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON; `by_origin` as a list of rows."""
        rows = [
            {"origin_topic": origin, "exception": exception, **{name: counts[name] for name in _OUTCOMES}}
            for (origin, exception), counts in sorted(self.by_origin.items())
        ]
        return {**vars(self), "by_origin": rows}

    def __str__(self) -> str:
        rest = "" if self.complete else "; it did not come to the end"
        lines = [
            f"{self.dead_letter_topic}, group {self.group_id}"
            + (": dry run, nothing was written" if self.dry_run else "")
            + rest,
            f"{self.read} read, {self.matched} matched: {self.redriven} redriven, {self.parked} parked, "
            f"{self.left.total()} left, {self.failed} failed",
        ]
        lines += [f"{count} skipped by the filter {name}" for name, count in sorted(self.skipped.items())]
        lines += [f"{count} left: {why}" for why, count in sorted(self.left.items())]
        if not self.read and self.complete:
            lines.append("no letter since the group's last run: from_beginning, or another group, reads all again")
        return "\n".join([*lines, *self._table()])

    def _table(self) -> list[str]:
        if not self.by_origin:
            return []
        rows: list[tuple[str, ...]] = [("origin topic", "exception", *_OUTCOMES)]
        rows += [(*key, *(str(counts[name]) for name in _OUTCOMES)) for key, counts in sorted(self.by_origin.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join(
                cell.ljust(width) if index < 2 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]


if __name__ == "__main__":
    import sys

    from keven_core.kafka._redrive_cli import main

    sys.exit(main())
