"""Keeps the worker processes of a server going: replaces those that die, hang or grow, and finds the record at fault.

The supervisor is a process of its own that imports neither the service nor a Kafka client. A thread of the launching
process would stand still whenever that process does (a handler of its own, the GIL, a debugger), would end with it
without having ended its workers in order, and would leave `terminate()` and `kill()` of the handle without a process.

A worker says in shared memory which records it has in hand (keven_core._native.suspects). When it dies with some, they
are suspects: every worker handles them alone, with all that came before committed. After three deaths a record is
condemned: the next worker that meets it fails it without handling it, so it ends in the dead-letter topic as usual.
What the supervisor knows of deaths is forgotten with it, and other hosts have supervisors of their own.

`Place` and `Deaths` decide, without I/O and clock; `Supervisor` carries out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from keven_core.kafka._launch import ORPHAN_GRACE_S, ServerProcess, packed, read_part, spawn
from keven_core.kafka._supervised import DUMP_SIGNAL, Phase
from keven_core.kafka.config import Settings
from keven_core.kafka.errors import ConfigurationError, LaunchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from keven_core._native.suspects import Suspects

__all__ = ["Deaths", "Limits", "Look", "Place", "Step", "exit_code", "launch_supervised"]

logger = logging.getLogger("keven_core.kafka")

# After so many deaths with it in hand a record is not handled any more.
_DEATHS = 3
# A record is suspected for so long after its last death, and at least twice as long as a worker may hang.
_REMEMBER_S = 3600.0
# When so many records were condemned within that time, the fault can't be theirs.
_MOST_CONDEMNED = 20
# Delays before a worker is started again: doubled with each failure in a row.
_FIRST_DELAY_S = 0.2
_LONGEST_DELAY_S = 30.0
# With a record in hand, of which each can kill three only: well before the session of the dead one ends, so that its
# partitions stay with this place.
_LONGEST_DELAY_WITH_SUSPECTS_S = 0.5
# A worker that has lived so long has not failed at once.
_STEADY_S = 10.0
# So often in a row a worker may die before it has asked for records; that takes a minute.
_MOST_FAILED_STARTS = 8
# How long a worker that hangs has for writing its stacks.
_DUMP_S = 0.2
# What a worker may need beyond KEVEN_DRAIN_TIMEOUT_MS and KEVEN_CLOSE_TIMEOUT_MS.
_STOP_MARGIN_S = 3.0
_TICK_S = 0.1

TopicOffset = tuple[str, int, int]


# --- policy ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What workers may do. Seconds; `hang_s` and `memory_bytes`: 0 is no limit."""

    hang_s: float
    memory_bytes: int
    stop_s: float


@dataclass(frozen=True)
class Look:
    """What is seen of a running worker: its sign of life, the records in hand by cell, its resident memory."""

    beats: int
    in_hand: Mapping[int, TopicOffset]
    rss_bytes: int


class Step(Enum):
    """What is to be done to a worker."""

    TERMINATE = "have it end in order"
    DUMP = "have it write its stacks"
    KILL = "kill it"


_SIGNALS = {Step.TERMINATE: signal.SIGTERM, Step.DUMP: DUMP_SIGNAL, Step.KILL: signal.SIGKILL}


class _State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDING = "ending"
    DYING = "dying"
    GONE = "gone"


@dataclass(frozen=True)
class End:
    """What the end of a worker means.

    Attributes:
        why: how it ended, in words.
        died: not in order: what it had in hand are suspects.
        delay_s: when the next one starts; None: there is none.
        code: set when all workers have to end: the exit code of the whole.
    """

    why: str
    died: bool
    delay_s: float | None = None
    code: int | None = None


class Place:
    """One of the workers, life after life: what is known of it, and what is to be done.

    Each method is told the time, in seconds.
    """

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._state = _State.WAITING
        self._start_at = now
        self._started = now
        self._kill_at: float | None = None
        self._stopping = False
        self._why = ""
        self._failures = 0
        self._failed_starts = 0
        self._held: dict[int, tuple[TopicOffset, float]] = {}
        self._beats = 0
        self._beat_at = now
        self.code = 0

    @property
    def gone(self) -> bool:
        """Whether there is no worker any more, and there will be none."""
        return self._state is _State.GONE

    @property
    def why(self) -> str:
        """Why the worker is being replaced; "" if it is not."""
        return self._why

    def waits(self, now: float) -> bool:
        """Whether a worker is to be started now."""
        return self._state is _State.WAITING and now >= self._start_at

    def started(self, now: float) -> None:
        """A worker was started."""
        self._state = _State.RUNNING
        self._started = self._beat_at = now
        self._kill_at = None
        self._why = ""
        self._held = {}
        self._beats = 0

    def stop(self, now: float, within_s: float | None = None) -> Step | None:
        """All workers are to end, within the time that they are given for it."""
        deadline = now + (self._limits.stop_s if within_s is None else within_s)
        self._stopping = True
        if self._state is _State.WAITING:
            self._state = _State.GONE
        if self._state in (_State.GONE, _State.DYING):
            return None
        self._kill_at = deadline if self._kill_at is None else min(self._kill_at, deadline)
        if self._state is _State.ENDING:
            return None
        self._state = _State.ENDING
        return Step.TERMINATE

    def look(self, look: Look, now: float) -> Step | None:
        """What is to be done, seeing the worker like this."""
        limits = self._limits
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._state = _State.DYING
            self._why = self._why or "it had not ended in time (KEVEN_DRAIN_TIMEOUT_MS, KEVEN_CLOSE_TIMEOUT_MS)"
            return Step.KILL
        stuck_s = self._stuck_s(look, now)
        if self._state not in (_State.RUNNING, _State.ENDING):
            return None
        if limits.memory_bytes and look.rss_bytes > limits.memory_bytes:
            taken = f"{look.rss_bytes >> 20} MiB of memory"
            self._why = f"it took {taken} (KEVEN_WORKER_MEMORY_BYTES={limits.memory_bytes})"
            if look.rss_bytes > 2 * limits.memory_bytes:
                self._state = _State.DYING
                return Step.KILL
            if self._state is _State.RUNNING:
                self._state = _State.ENDING
                return Step.TERMINATE
        if limits.hang_s and stuck_s > limits.hang_s:
            self._why = f"it made no progress for {limits.hang_s:g} s (KEVEN_WORKER_HANG_MS, max_poll_interval)"
            self._state = _State.DYING
            self._kill_at = now + _DUMP_S
            return Step.DUMP
        return None

    def _stuck_s(self, look: Look, now: float) -> float:
        """For how long the record that has been in hand longest is; without one, since the last sign of life."""
        held: dict[int, tuple[TopicOffset, float]] = {}
        for cell, record in look.in_hand.items():
            known = self._held.get(cell)
            held[cell] = known if known is not None and known[0] == record else (record, now)
        self._held = held
        if look.beats != self._beats:
            self._beats, self._beat_at = look.beats, now
        if held:
            return now - min(since for _, since in held.values())
        # Before the first sign there is the import of the service, which may take its time.
        return now - self._beat_at if look.beats else 0.0

    def ended(self, code: int, phase: int, in_hand: Iterable[TopicOffset], now: float) -> End:
        """The worker has ended; `phase` is how far it was."""
        why = self._why or _in_words(code)
        if self._stopping:
            # One that was told so before it could listen has ended in order too.
            early = code == -signal.SIGTERM and phase == Phase.STARTING
            self._state = _State.GONE
            self.code = 0 if early else code
            return End(why, died=self.code != 0)
        suspects = bool(list(in_hand))
        died = code != 0 or (phase != Phase.DONE and suspects)
        if phase in (Phase.DONE, Phase.FAILED):
            self._state = _State.GONE
            self.code = code
            return End(why, died, code=code if phase == Phase.FAILED else None)
        steady = now - self._started >= _STEADY_S
        self._failed_starts = self._failed_starts + 1 if died and phase == Phase.STARTING else 0
        if self._failed_starts >= _MOST_FAILED_STARTS:
            self._state = _State.GONE
            self.code = code
            return End(f"{why}, as {self._failed_starts} in a row before they could start", died, code=code or 1)
        self._failures = (0 if steady else self._failures) + 1
        longest_s = _LONGEST_DELAY_WITH_SUSPECTS_S if suspects else _LONGEST_DELAY_S
        delay_s = 0.0 if steady and not died else min(_FIRST_DELAY_S * 2 ** (self._failures - 1), longest_s)
        self._state = _State.WAITING
        self._start_at = now + delay_s
        return End(why, died, delay_s)


def _in_words(code: int) -> str:
    if code >= 0:
        return f"it ended with exit code {code}"
    try:
        return f"it was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"it was killed by signal {-code}"


@dataclass
class _Death:
    count: int
    why: str
    at: float


@dataclass
class Deaths:
    """Which records workers have died with. `remember_s`: for how long after the last time."""

    remember_s: float
    _of: dict[TopicOffset, _Death] = field(default_factory=dict)

    def note(self, records: Iterable[TopicOffset], why: str, now: float) -> dict[TopicOffset, int]:
        """A worker has died with these in hand; how often that is now, for each."""
        self._forget(now)
        counts = {}
        for record in records:
            known = self._of.pop(record, None)  # the last ones stand last
            counts[record] = (known.count if known is not None else 0) + 1
            self._of[record] = _Death(counts[record], why, now)
        return counts

    def suspects(self, now: float) -> list[tuple[str, int, int, int, bool, str]]:
        """All of them, for Suspects.write_suspects(); those that died last stand last."""
        self._forget(now)
        return [(*record, death.count, death.count >= _DEATHS, death.why) for record, death in self._of.items()]

    def too_many(self) -> bool:
        """Whether so many records are condemned that the fault can't be theirs."""
        return sum(death.count >= _DEATHS for death in self._of.values()) >= _MOST_CONDEMNED

    def _forget(self, now: float) -> None:
        self._of = {record: death for record, death in self._of.items() if now - death.at < self.remember_s}


def exit_code(codes: Iterable[int]) -> int:
    """That of the supervisor, by those of its workers: the first that is not 0, and 1 for a signal."""
    return next((code if code > 0 else 1 for code in codes if code), 0)


# --- launching -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What a supervisor is told."""

    name: str
    processes: int
    limits: Limits
    header: dict[str, Any]
    payload: bytes


def launch_supervised(
    name: str,
    target: Callable[..., Any],
    kwargs: dict[str, Any],
    *,
    processes: int,
    settings: Settings,
    max_poll_interval_s: float,
) -> ServerProcess:
    """Run target(**kwargs) in `processes` worker processes under a supervisor; returns the supervisor's handle at once.

    Arguments:
        settings, max_poll_interval_s: what the servers of the workers have.

    As launch() otherwise. terminate() has all workers end in order, and exitcode is 0 when all did; after kill() they
    end by themselves within 5 s.
    """
    if isinstance(processes, bool) or not isinstance(processes, int) or not 1 <= processes <= 1024:
        raise ConfigurationError(f"processes={processes!r:.80}: 1 to 1024 are allowed")
    if settings.worker_memory_bytes and not os.path.exists("/proc/self/statm"):
        raise ConfigurationError(
            "KEVEN_WORKER_MEMORY_BYTES needs /proc, which this system has not: leave it out, or set a limit outside"
        )
    limits = Limits(
        hang_s=settings.worker_hang_ms / 1000 or max_poll_interval_s,
        memory_bytes=settings.worker_memory_bytes,
        stop_s=(settings.drain_timeout_ms + settings.close_timeout_ms) / 1000 + _STOP_MARGIN_S,
    )
    job = _Job(name, processes, limits, *packed(target, kwargs))
    return ServerProcess(name, *spawn(__name__, {}, pickle.dumps(job)))


def work(fd: int) -> None:
    """The supervisor's main function; `fd` is the pipe from the launching process."""
    os.set_inheritable(fd, False)
    read_part(fd)
    job: _Job = pickle.loads(read_part(fd))  # from the launching process, over a pipe that nobody else holds
    sys.exit(Supervisor(job, fd).run())


# --- carrying out ----------------------------------------------------------------------------------------------------


@dataclass
class _Worker:
    """One life of a worker."""

    popen: subprocess.Popen[bytes]
    pipe: int
    suspects: Suspects


def _new_file() -> int:
    """A file without a name, which is gone when nobody has it open or mapped."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("keven-suspects")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _rss_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", "rb") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


class Supervisor:
    """The supervising process. `lifeline` closes when the launching process is gone."""

    def __init__(self, job: _Job, lifeline: int) -> None:
        now = time.monotonic()
        self._job = job
        self._lifeline = lifeline
        self._places = [Place(job.limits, now) for _ in range(job.processes)]
        self._workers: dict[int, _Worker] = {}
        self._deaths = Deaths(_REMEMBER_S + 2 * job.limits.hang_s)
        self._instance = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._signals: list[int] = []
        self._stopping = False
        self._code = 0

    def run(self) -> int:
        """Keep the workers going until all have ended; returns the exit code."""
        wake_read, wake_write = _pipe()
        for heeded in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(heeded, lambda number, frame: self._signals.append(number))
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        selector = selectors.DefaultSelector()
        selector.register(wake_read, selectors.EVENT_READ)
        selector.register(self._lifeline, selectors.EVENT_READ)
        while not all(place.gone for place in self._places):
            for number, place in enumerate(self._places):
                self._attend(number, place)
            for key, _ in selector.select(_TICK_S):
                if key.fd == wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_read, 4096)
                elif not os.read(self._lifeline, 4096):
                    selector.unregister(self._lifeline)
                    self._stop("the launching process is gone", ORPHAN_GRACE_S)
            self._heed_signals()
        return exit_code([self._code, *(place.code for place in self._places)])

    def _heed_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if number == signal.SIGCHLD:
                continue
            # Ctrl-C again: at once. SIGTERM may come from several sides, and means the same each time.
            again = number == signal.SIGINT and self._stopping
            self._stop(signal.Signals(number).name, 0.0 if again else None)

    def _stop(self, why: str, within_s: float | None = None) -> None:
        if not self._stopping:
            self._say(logging.INFO, "%s: the workers end", why)
        self._stopping = True
        for number, place in enumerate(self._places):
            self._carry_out(number, place.stop(time.monotonic(), within_s))

    def _attend(self, number: int, place: Place) -> None:
        """Look after one worker."""
        worker, now = self._workers.get(number), time.monotonic()
        if worker is None:
            if place.waits(now):
                self._start(number, place)
            return
        code = worker.popen.poll()
        if code is not None:
            self._bury(number, place, worker, code)
            return
        rss_bytes = _rss_bytes(worker.popen.pid) if self._job.limits.memory_bytes else 0
        look = Look(worker.suspects.beats, worker.suspects.in_hand(), rss_bytes)
        step = place.look(look, now)
        if step is not None:
            self._say(logging.WARNING, "worker %d (pid %d) is replaced: %s", number, worker.popen.pid, place.why)
            self._carry_out(number, step)

    def _start(self, number: int, place: Place) -> None:
        from keven_core._native.suspects import Suspects

        place.started(time.monotonic())
        fd = _new_file()
        try:
            os.ftruncate(fd, Suspects.SIZE)
            suspects = Suspects(fd, fresh=True)
            suspects.write_suspects(self._deaths.suspects(time.monotonic()))
            supervised = {"fd": fd, "instance": self._instance, "number": number}
            header = {**self._job.header, "supervised": supervised}
            popen, pipe = spawn("keven_core.kafka._launch", header, self._job.payload, fds=[fd], new_session=True)
        except (OSError, LaunchError) as error:
            self._judge(number, place.ended(1, Phase.STARTING, (), time.monotonic()), {}, str(error))
            return
        finally:
            os.close(fd)
        self._workers[number] = _Worker(popen, pipe, suspects)
        self._say(logging.INFO, "worker %d runs as pid %d", number, popen.pid)

    def _carry_out(self, number: int, step: Step | None) -> None:
        worker = self._workers.get(number)
        if worker is None or step is None:
            return
        worker.popen.send_signal(_SIGNALS[step])

    def _bury(self, number: int, place: Place, worker: _Worker, code: int) -> None:
        """A worker has ended: see what it died with, and when the next one starts."""
        del self._workers[number]
        os.close(worker.pipe)
        now = time.monotonic()
        in_hand = list(dict.fromkeys(worker.suspects.in_hand().values()))
        end = place.ended(code, worker.suspects.phase, in_hand, now)
        counts: dict[TopicOffset, int] = {}
        if end.died and in_hand:
            counts = self._deaths.note(in_hand, end.why, now)
            suspects = self._deaths.suspects(now)
            for other in self._workers.values():
                other.suspects.write_suspects(suspects)
        self._judge(number, end, counts, f"pid {worker.popen.pid}")

    def _judge(self, number: int, end: End, counts: dict[TopicOffset, int], who: str) -> None:
        """Say what has happened, and end everything if that has to be."""
        first = list(counts.items())[:8]
        had = ", ".join(f"{t} [{p}] @ {o} (death {count} of {_DEATHS})" for (t, p, o), count in first)
        more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
        then = "" if end.delay_s is None else f"; the next one starts in {end.delay_s:g} s"
        self._say(
            logging.WARNING if end.died or end.delay_s is not None else logging.INFO,
            "worker %d (%s) has ended: %s%s%s",
            number,
            who,
            end.why,
            f"; in hand: {had}{more}" if counts else "",
            then,
        )
        for (topic, partition, offset), count in counts.items():
            if count == _DEATHS:
                self._say(
                    logging.ERROR, "%s [%d] @ %d goes to the dead-letter topic, unhandled", topic, partition, offset
                )
        if end.code is not None:
            self._code = self._code or end.code
            self._say(logging.ERROR, "all workers end, since worker %d can't go on: %s", number, end.why)
            self._stop("a worker can't go on")
        elif self._deaths.too_many() and not self._stopping:
            self._code = 1
            self._say(
                logging.ERROR,
                "all workers end: %d records have killed %d workers each, so the fault can't be theirs",
                _MOST_CONDEMNED,
                _DEATHS,
            )
            self._stop("too many records were condemned")

    def _say(self, level: int, message: str, *details: object) -> None:
        logger.log(level, "supervisor of %s: " + message, self._job.name, *details)


def _pipe() -> tuple[int, int]:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    return read_end, write_end
