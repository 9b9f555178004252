"""A worker process that has a supervisor: what it tells it, and what it is told. The other side is _supervisor.py."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from collections.abc import Iterator
from enum import IntEnum
from types import FrameType
from typing import TYPE_CHECKING, Any

from keven_core.kafka.errors import (
    AuthenticationError,
    AuthorizationError,
    KafkaError,
    OffsetOutOfRangeError,
    UnknownTopicError,
)

if TYPE_CHECKING:
    from keven_core._native.suspects import Suspects

__all__ = ["DUMP_SIGNAL", "Phase", "Supervised", "claim", "life", "on_stop_signal"]

# Makes a worker write the stacks of its threads to standard error, also when a handler never comes back.
DUMP_SIGNAL = signal.SIGUSR2

# What Kafka answers again however often a worker is started anew.
_LASTING = (AuthenticationError, AuthorizationError, UnknownTopicError, OffsetOutOfRangeError)


class Phase(IntEnum):
    """How far a worker is."""

    STARTING = 0
    CONSUMING = 1  # it has asked for records
    DONE = 2  # the server has ended by itself, in order: it is not to be started again
    FAILED = 3  # it has ended by an error that would come again


class Supervised:
    """What a worker process has of its supervisor.

    Arguments:
        fd: the file of suspects.
        instance: a name that no other supervisor has.
        number: of the worker among those of its supervisor, from 0.
    """

    def __init__(self, fd: int, instance: str, number: int) -> None:
        from keven_core._native.suspects import Suspects

        self.suspects: Suspects = Suspects(fd)
        self._instance = instance
        self._number = number
        self.claimed = False
        self.told_to_stop = False

    def consumer_options(self, options: dict[str, str]) -> dict[str, str]:
        """librdkafka properties with static membership: who takes over from a dead worker gets its partitions at once.

        Not under the new group protocol: there the broker keeps a dead static member's partitions for its session.
        """
        if options.get("group.protocol") == "consumer":
            return options
        instance = options.get("group.instance.id") or self._instance
        return {**options, "group.instance.id": f"{instance}-{self._number}"}

    def consuming(self) -> None:
        """The server is about to ask for records."""
        self.suspects.phase = Phase.CONSUMING


_process: Supervised | None = None


@contextlib.contextmanager
def life(given: dict[str, Any] | None) -> Iterator[None]:
    """The life of a worker process, which tells its supervisor how it ended; None: it has no supervisor."""
    global _process
    if given is None:
        yield
        return
    _process = process = Supervised(**given)
    os.close(given["fd"])
    with contextlib.suppress(RuntimeError):  # no standard error: then that signal just ends it
        faulthandler.register(DUMP_SIGNAL, all_threads=True, chain=False)
    try:
        yield
    except Exception as error:
        if not isinstance(error, KafkaError) or isinstance(error, _LASTING):
            process.suspects.phase = Phase.FAILED
        raise
    finally:
        # It ends by itself now; being told so meanwhile must not look like a death.
        signal.signal(signal.SIGTERM, _ignore)
    if not process.told_to_stop:
        process.suspects.phase = Phase.DONE


def claim() -> Supervised | None:
    """What this process has of its supervisor, for the one server that it was started for; None for all others."""
    process = _process
    if process is None or process.claimed:
        return None
    process.claimed = True
    return process


def on_stop_signal() -> None:
    """A signal has stopped the server of this process: others, from the supervisor or the system, change nothing."""
    if _process is not None:
        _process.told_to_stop = True
        signal.signal(signal.SIGTERM, _ignore)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Unlike SIG_IGN this is not inherited by programs that the service starts."""
