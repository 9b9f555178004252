"""The producers that the loggers of a process share: one per set of settings, made at the first message.

After a fork the child makes its own; the parent's pending messages stay the parent's. At interpreter exit what is
pending is sent for a bounded time, and what could not be sent is named on stderr.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from keven_core.kafka.config import Settings
from keven_core.kafka.errors import (
    AuthenticationError,
    BrokerUnavailableError,
    ClosedError,
    ConfigurationError,
    Delivery,
    KafkaError,
    KafkaTimeoutError,
    refused_credentials,
)
from keven_core.kafka.logs import RateLimiter, log_client_line, one_line

if TYPE_CHECKING:
    from keven_core._native.producer import Producer

__all__ = ["SharedProducer", "close_producers", "shared_producer"]

logger = logging.getLogger("keven_core.kafka")

_EXIT_FLUSH_S = 5.0
_BUSY_MS = 50
_IDLE_MS = 60_000
_LOOK_UP_MS = 300
# UNKNOWN_TOPIC_OR_PART
_UNKNOWN_TOPIC = 3
# Between two tries to look topics up while no broker answers.
_LOOK_UP_AGAIN_S = 1.0
# How long refused credentials are believed in; librdkafka tries again after 10 s at most.
_REFUSED_S = 30.0

_Key = tuple[tuple[str, str], ...]

_lock = threading.Lock()
_producers: dict[_Key, SharedProducer] = {}


class SharedProducer:
    """A producer with its attendant: the thread that heeds what the producer has to say, and looks topics up.

    May be used from many threads. The attendant ends when the producer is closed.
    """

    def __init__(self, settings: Settings, address: str, options: dict[str, str], key: _Key) -> None:
        from keven_core._native.producer import Producer

        self.settings = settings
        self._address = address
        self._key = key
        self._limiter = RateLimiter(3, 10.0)
        self._new_topics: set[str] = set()
        self._look_up_after = 0.0
        # Why the brokers have refused the credentials; None: they have not, or have taken messages since.
        self.refused: AuthenticationError | None = None
        self._refused_at = 0.0
        self.client: Producer = Producer(options, self._on_event)
        self.client.on_topic = self._on_topic
        self.client.on_failure = self._on_failure
        self._attendant = threading.Thread(target=self._attend, name="keven-producer", daemon=True)
        self._attendant.start()

    def check_credentials(self) -> None:
        """Raise AuthenticationError when the brokers have refused the credentials: nothing will ever be sent."""
        if self.refused is not None:
            raise self.refused

    def close(self, timeout_ms: int) -> int:
        """Send what is pending, at most `timeout_ms`, and free the producer; returns how many were not sent."""
        left = self.client.close(timeout_ms)
        with _lock:
            if _producers.get(self._key) is self:
                del _producers[self._key]
        if threading.current_thread() is not self._attendant:
            self._attendant.join(1)
        return left

    def _on_topic(self, topic: str) -> None:
        self._new_topics.add(topic)
        self.client.call_attendant()

    def _attend(self) -> None:
        busy = True
        while True:
            try:
                refused = self.refused
                busy = self.client.attend(_BUSY_MS if busy or self._new_topics else _IDLE_MS)
                if self.refused is refused and (not busy or time.monotonic() - self._refused_at > _REFUSED_S):
                    self.refused = None  # nothing waits any more, or they are not refused any more
                if self._new_topics and time.monotonic() >= self._look_up_after:
                    self._look_up()
            except ClosedError:
                return
            except Exception:
                if self._limiter.admit("attendant") is not None:
                    logger.exception("the producer's attendant goes on after an error")

    def _look_up(self) -> None:
        """See that topics exist: those that are missing are created if KEVEN_CREATE_TOPICS allows it.

        Asking also connects the producer, whose first message would otherwise wait for librdkafka's next 1 s tick.
        """
        topics = set(self._new_topics)
        try:
            found = self.client.metadata(_LOOK_UP_MS, used_only=True)
            missing = [topic for topic in topics if found.get(topic) == -_UNKNOWN_TOPIC]
            if missing and self.settings.create_topics:
                from keven_core.kafka.admin import create_topics

                create_topics(self.settings, self._address, missing)
        except (BrokerUnavailableError, KafkaTimeoutError):
            self._look_up_after = time.monotonic() + _LOOK_UP_AGAIN_S
            return
        except KafkaError as error:
            # Not allowed to list or create: the broker's answer to the messages themselves will tell.
            logger.warning("topic(s) %s could not be looked up or created: %s", ", ".join(topics), one_line(error))
        self._new_topics -= topics

    def _on_failure(self, count: int, first: Delivery) -> None:
        if self._limiter.admit(f"failed {first.topic}") is not None:
            logger.error(
                "%d message(s) for %s were %s: %s", count, one_line(first.topic), first.outcome, one_line(first.error)
            )

    def _on_event(self, event: tuple[Any, ...]) -> None:
        if event[0] == "log":
            if event[1] > 6 or self._limiter.admit(f"log {event[2]}") is not None:
                log_client_line(logger, *event[1:])
        elif event[0] == "error":
            refused = refused_credentials(event[1])
            if refused is not None:
                self.refused, self._refused_at = refused, time.monotonic()
            if self._limiter.admit(event[1].name) is not None:
                logger.warning("producer: %s", one_line(event[1]))
        elif event[0] == "token":
            from keven_core.kafka._client_events import set_token

            try:
                set_token(self.client, self.settings.oauth_token, event[1])
            except ConfigurationError as error:
                logger.error("%s", one_line(error))


def shared_producer(
    settings: Settings, options: dict[str, str], address: str, *, owner: object = None
) -> SharedProducer:
    """The producer of this process for these options; a new one when librdkafka has given the last one up.

    With an `owner` it is shared with nobody else.
    """
    key = (*sorted(options.items()), ("owner", str(id(owner) if owner is not None else "")))
    with _lock:
        producer = _producers.get(key)
        if producer is not None and producer.client.fatal:
            logger.error("a producer can't go on and is replaced; what it had under way is reported as failed")
            producer.client.replaced = True
            threading.Thread(target=producer.close, args=(0,), name="keven-close", daemon=True).start()
            producer = None
        if producer is None or producer.client.closed:
            producer = _producers[key] = SharedProducer(settings, address, options, key)
        return producer


def close_producers(address: str, timeout_ms: int = 1000) -> None:
    """Close the producers of a cluster that is about to end; their loggers can't be used any more."""
    with _lock:
        keys = [key for key in _producers if ("bootstrap.servers", address) in key]
        closing = [_producers.pop(key) for key in keys]
    for producer in closing:
        producer.close(timeout_ms)


@atexit.register
def _close_all() -> None:
    producers = list(_producers.values())
    if not producers:
        return
    from keven_core._native.producer import untold_failures

    deadline = time.monotonic() + _EXIT_FLUSH_S
    before = untold_failures()
    lost = 0
    for producer in producers:
        try:
            lost += producer.close(max(100, int((deadline - time.monotonic()) * 1000)))
        except KafkaError as error:
            print(f"keven_core: while closing a producer: {error}", file=sys.stderr)
    if lost:
        print(f"keven_core: {lost} message(s) could not be sent before the process ended", file=sys.stderr)
    # What was lost just now is among the failures, but for messages whose logger tells of them itself.
    untold = max(before, untold_failures() - lost)
    if untold > 0:
        print(f"keven_core: {untold} message(s) were not delivered, and no flush() asked for them", file=sys.stderr)


def _forget_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # it may have been held by a thread that did not come along
    _inherited.extend(_producers.values())
    _producers.clear()


# Kept, never used: dropping the parent's clients in the child would finalize them there.
_inherited: list[SharedProducer] = []

os.register_at_fork(after_in_child=_forget_in_child)
