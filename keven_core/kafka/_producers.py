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
_LOOK_UP_MS = 3000
# Between two tries to look a topic up while no broker answers: each costs the caller up to _LOOK_UP_MS.
_LOOK_UP_AGAIN_S = 30.0

_lock = threading.Lock()
_producers: dict[tuple[tuple[str, str], ...], SharedProducer] = {}


class SharedProducer:
    """A producer, the topics that it is known to have, and what it has to say. May be used from many threads."""

    def __init__(self, settings: Settings, address: str, options: dict[str, str]) -> None:
        from keven_core._native.producer import Producer

        self._settings = settings
        self._address = address
        self._limiter = RateLimiter(3, 10.0)
        self._topics: set[str] = set()
        self._topics_lock = threading.Lock()
        self._look_up_after = 0.0
        self._refused: AuthenticationError | None = None
        self.client: Producer = Producer(options, self._on_event)

    def prepare(self, topic: str) -> None:
        """Make sure, once, that a topic exists: it is created when it is missing and KEVEN_CREATE_TOPICS allows it.

        Asking also connects the producer, whose first message would otherwise wait for librdkafka's next 1 s tick.
        Blocks up to 3 s; without an answer the message is queued all the same, and its topic looked up again later.
        Raises AuthenticationError when the brokers refuse the credentials.
        """
        if topic in self._topics:
            return
        with self._topics_lock:
            if topic in self._topics or time.monotonic() < self._look_up_after:
                return
            try:
                found = self.client.metadata(_LOOK_UP_MS)
                if found.get(topic, -3) < 0 and self._settings.create_topics:
                    from keven_core.kafka.admin import create_topics

                    create_topics(self._settings, self._address, [topic])
            except (BrokerUnavailableError, KafkaTimeoutError):
                self.client.serve(0)
                if self._refused is not None:
                    raise self._refused from None
                self._look_up_after = time.monotonic() + _LOOK_UP_AGAIN_S
                return
            except KafkaError as error:
                # Not allowed to list or create: the broker's answer to the message itself will tell.
                logger.warning("topic %s could not be looked up or created: %s", topic, one_line(error))
            self._topics.add(topic)

    def _on_event(self, event: tuple[Any, ...]) -> None:
        if event[0] == "log":
            if event[1] > 6 or self._limiter.admit(f"log {event[2]}") is not None:
                log_client_line(logger, *event[1:])
        elif event[0] == "error":
            self._refused = refused_credentials(event[1]) or self._refused
            if self._limiter.admit(event[1].name) is not None:
                logger.warning("producer: %s", one_line(event[1]))
        elif event[0] == "token":
            from keven_core.kafka._session import set_token

            set_token(self.client, self._settings.oauth_token, event[1])


def shared_producer(settings: Settings, address: str, linger_ms: int) -> SharedProducer:
    """The producer of this process for these settings."""
    options = settings.producer_options(address, "keven-logger", linger_ms=linger_ms)
    key = tuple(sorted(options.items()))
    with _lock:
        producer = _producers.get(key)
        if producer is None or producer.client.closed:
            producer = _producers[key] = SharedProducer(settings, address, options)
        return producer


def close_producers(address: str, timeout_ms: int = 1000) -> None:
    """Close the producers of a cluster that is about to end; their loggers can't be used any more."""
    with _lock:
        keys = [key for key in _producers if ("bootstrap.servers", address) in key]
        closing = [_producers.pop(key) for key in keys]
    for producer in closing:
        producer.client.close(timeout_ms)


@atexit.register
def _close_all() -> None:
    deadline = time.monotonic() + _EXIT_FLUSH_S
    for producer in list(_producers.values()):
        try:
            lost = producer.client.close(max(100, int((deadline - time.monotonic()) * 1000)))
        except KafkaError as error:
            print(f"keven_core: while closing a producer: {error}", file=sys.stderr)
            continue
        if lost:
            print(f"keven_core: {lost} message(s) could not be sent before the process ended", file=sys.stderr)


def _forget_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # it may have been held by a thread that did not come along
    _inherited.extend(_producers.values())
    _producers.clear()


# Kept, never used: dropping the parent's clients in the child would finalize them there.
_inherited: list[SharedProducer] = []

os.register_at_fork(after_in_child=_forget_in_child)
