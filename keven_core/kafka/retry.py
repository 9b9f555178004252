"""When a failed record is tried again: policies, and the decision after each failure. No I/O, no clock of its own.

    class Ship(EventHandler):
        event_name = "ORDER_PLACED"
        retry_policy = RetryPolicy(max_retries=8, backoff=Exponential(first_s=1, cap_s=600), total_s=86400)

A policy is looked for at the handler, then at the event's class, then among the server's `retry_detail` for the topic;
with `auto_reprocess_errors=True` all other records have the server's `retry_interval` and `max_retries`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from keven_core.kafka.errors import ConfigurationError, RecordError, UsageError
from keven_core.kafka.outcomes import DeadLetter, Retry

__all__ = ["Exponential", "GiveUp", "Policies", "RetryPolicy", "TryAgain", "decide", "detail_policies", "policy_of"]

_LONGEST_S = 366 * 86400.0


def _check_seconds(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LONGEST_S:
        raise ConfigurationError(f"{name}={value!r:.80}: 0 to {_LONGEST_S:.0f} seconds are allowed")


@dataclass(frozen=True)
class Exponential:
    """Delays that grow: first_s, first_s * factor, ..., at most cap_s.

    Arguments:
        first_s: seconds before the first retry.
        factor: from one delay to the next.
        cap_s: the longest delay.
        jitter: the share of a delay that is left to chance, 0 to 1, so that records which failed together do not all
            come back together.
    """

    first_s: float = 1.0
    factor: float = 2.0
    cap_s: float = 3600.0
    jitter: float = 0.2

    def __post_init__(self) -> None:
        """Raise ConfigurationError for numbers that are not allowed."""
        _check_seconds("Exponential(first_s)", self.first_s)
        _check_seconds("Exponential(cap_s)", self.cap_s)
        if not 1 <= self.factor <= 100:
            raise ConfigurationError(f"Exponential(factor={self.factor!r:.80}): 1 to 100 is allowed")
        if not 0 <= self.jitter <= 1:
            raise ConfigurationError(f"Exponential(jitter={self.jitter!r:.80}): 0 to 1 is allowed")

    def delay_s(self, retry: int, draw: float) -> float:
        """Seconds before the `retry`-th retry, from 1; `draw` is a random number from 0 to 1."""
        try:
            delay_s = min(self.first_s * self.factor ** (retry - 1), self.cap_s)
        except OverflowError:
            delay_s = self.cap_s if self.first_s else 0.0
        return delay_s * (1 - self.jitter * draw)


@dataclass(frozen=True)
class RetryPolicy:
    """How often and when a failed record is tried again; through the server's retry topic, where nothing waits for it.

    Arguments:
        max_retries: tries after the first one.
        backoff: seconds before each retry; or a sequence of them, of which the last one is used again; or an
            Exponential.
        total_s: seconds from the first failure on after which no retry is due any more; None: no such limit.
        in_place: True: no copy is made; the record waits in the server, and what has to be handled after it (the
            partition, or with order="key" the records of its key) waits behind it. The count of tries starts anew after
            a restart.
    """

    max_retries: int = 3
    backoff: float | Iterable[float] | Exponential = 30.0
    total_s: float | None = None
    in_place: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigurationError for what is not allowed."""
        if isinstance(self.max_retries, bool) or not isinstance(self.max_retries, int) or self.max_retries < 0:
            raise ConfigurationError(f"RetryPolicy(max_retries={self.max_retries!r:.80}): 0 or more are allowed")
        if self.total_s is not None:
            _check_seconds("RetryPolicy(total_s)", self.total_s)
        if not isinstance(self.in_place, bool):
            raise ConfigurationError(f"RetryPolicy(in_place={self.in_place!r:.80}): True or False is allowed")
        if isinstance(self.backoff, Exponential):
            return
        if isinstance(self.backoff, Iterable) and not isinstance(self.backoff, (str, bytes)):
            delays = tuple(self.backoff)
            if not delays:
                raise ConfigurationError("RetryPolicy(backoff=()): at least one delay is needed")
        else:
            delays = (self.backoff,)  # type: ignore[assignment]  # checked below
        for delay in delays:
            _check_seconds("RetryPolicy(backoff)", delay)
        object.__setattr__(self, "backoff", delays)

    def delay_s(self, retry: int, draw: float) -> float:
        """Seconds before the `retry`-th retry, from 1; `draw` is a random number from 0 to 1."""
        if isinstance(self.backoff, Exponential):
            return self.backoff.delay_s(retry, draw)
        delays: tuple[float, ...] = self.backoff  # type: ignore[assignment]  # see __post_init__
        return delays[min(retry, len(delays)) - 1]


class TryAgain(NamedTuple):
    """The record is due again at `due_ms`, milliseconds since the epoch."""

    due_ms: int


class GiveUp(NamedTuple):
    """The record is to be dead-lettered; `why` says what the policy decided by, "" if nothing is to be added."""

    why: str = ""


def decide(
    error: BaseException,
    policy: RetryPolicy | None,
    *,
    attempt: int,
    first_failure_ms: int,
    now_ms: int,
    draw: float,
    fatal: bool = False,
) -> TryAgain | GiveUp:
    """What is to become of a record that has failed.

    Arguments:
        error: what the handler raised; or the Outcome that it returned.
        policy: None: this record has none.
        attempt: the try that has failed, from 1.
        first_failure_ms, now_ms: milliseconds since the epoch.
        draw: a random number from 0 to 1.
        fatal: exceptions of this class are not to be retried.
    """
    if isinstance(error, DeadLetter):
        return GiveUp()
    if policy is None:
        return GiveUp("no retry policy holds for it" if isinstance(error, Retry) else "")
    # What is wrong with the record itself, or with the handler's use of this library, is wrong the next time too.
    if fatal or isinstance(error, (RecordError, UsageError)):
        return GiveUp("such errors are not retried")
    if attempt > policy.max_retries:
        return GiveUp(f"tried {attempt} times" if policy.max_retries else "")
    delay_s = policy.delay_s(attempt, draw)
    if isinstance(error, Retry) and error.after_s is not None:
        delay_s = error.after_s
    due_ms = now_ms + int(delay_s * 1000)
    if policy.total_s is not None and due_ms > first_failure_ms + policy.total_s * 1000:
        return GiveUp(f"tried {attempt} times, and the next one would be later than {policy.total_s:g} s")
    return TryAgain(due_ms)


def policy_of(given: Any, where: str) -> RetryPolicy | None:
    """The `retry_policy` of a handler or an event class. Raises ConfigurationError if it is none."""
    if given is None or isinstance(given, RetryPolicy):
        return given
    raise ConfigurationError(f"retry_policy={given!r:.80} of {where}: a RetryPolicy or None is allowed")


class Policies:
    """Which policy holds for a record.

    Arguments:
        default: for records that nothing else is said of; None: they are not retried.
        by_topic: `retry_detail`.
        by_name: by event name, or foreign topic: (handler's name, policy) in the handlers' order; "" is any handler.
    """

    def __init__(
        self,
        default: RetryPolicy | None = None,
        by_topic: Mapping[str, RetryPolicy] | None = None,
        by_name: Mapping[str, list[tuple[str, RetryPolicy]]] | None = None,
    ) -> None:
        self._default = default
        self._by_topic = dict(by_topic or {})
        self._by_name = {name: policies for name, policies in (by_name or {}).items() if policies}

    def __bool__(self) -> bool:
        """Whether any record may be retried."""
        return bool(self._default or self._by_topic or self._by_name)

    @property
    def any_in_place(self) -> bool:
        """Whether a policy has records wait in the server."""
        return any(policy.in_place for policy in self._all())

    @property
    def any_by_topic(self) -> bool:
        """Whether a policy has copies wait in the retry topic."""
        return any(not policy.in_place for policy in self._all())

    def _all(self) -> list[RetryPolicy]:
        named = [policy for policies in self._by_name.values() for _, policy in policies]
        return [*named, *self._by_topic.values(), *([self._default] if self._default is not None else [])]

    def of(self, name: str | None, topic: str, handlers: Iterable[str]) -> RetryPolicy | None:
        """The policy for a record of an event (None: unknown) and topic, of which these handlers failed; empty: all."""
        for handler, policy in self._by_name.get(name or "", ()):
            if not handler or not handlers or handler in handlers:
                return policy
        return self._by_topic.get(topic, self._default)


def detail_policies(
    detail: Mapping[str, RetryPolicy | Mapping[str, Any]], default: RetryPolicy
) -> dict[str, RetryPolicy]:
    """`retry_detail` of a server as policies by topic. Raises ConfigurationError."""
    found = {}
    for topic, numbers in detail.items():
        if isinstance(numbers, RetryPolicy):
            found[topic] = numbers
            continue
        unknown = set(numbers) - {"retry_interval", "max_retries"}
        if unknown:
            raise ConfigurationError(
                f"retry_detail[{topic!r}] has {', '.join(sorted(map(repr, unknown)))}: 'retry_interval' (s) and "
                f"'max_retries' are allowed"
            )
        found[topic] = RetryPolicy(
            numbers.get("max_retries", default.max_retries), numbers.get("retry_interval", default.backoff)
        )
    return found
