"""Log records to Kafka: `KafkaLogHandler` for logging, `KafkaLogProcessor` for structlog.

A record is one message with the record's timestamp; its value is one flat JSON object, in this order:

    record     = time level logger message [module function line] [process thread] [exception] [stack]
                 field* extra* [cut]
    time       text, RFC 3339 in UTC with microseconds: "2024-05-01T12:30:00.000001Z"
    level      text: "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", or one of the service's own
    line, process                                numbers; process is the pid
    logger, message, module, function, thread    texts; thread is its name
    exception, stack                             texts, as Python prints them
    field      a static field of the handler
    extra      what the call gave (`extra=` in logging, keywords in structlog), in its order
    cut        list of the fields that were cut; "*": further fields were left out

A field or extra whose name is taken (those above are, present or not) gets the prefix "extra_". Values are JSON as
msgspec writes it (bytes in base64, NaN as null); what msgspec can't encode becomes its str(). A text, or the JSON of
another value, of more than 32 Ki characters is cut and says so at its end; a record ends at 256 KiB.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import datetime
import logging
import math
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from keven_core.kafka.errors import ClosedError, ConfigurationError, DeliveryError, QueueFullError, UsageError
from keven_core.kafka.logger import KafkaBatchLogger
from keven_core.kafka.logs import RateLimiter, one_line
from keven_core.kafka.topics import check_topic

__all__ = ["KafkaLogHandler", "KafkaLogProcessor"]

# What stores of log records take: Lucene's longest term has 32 766 bytes, Loki's longest line 256 KiB.
_FIELD_LIMIT = 32 << 10
_RECORD_LIMIT = 256 << 10
_NAME_LIMIT = 256

_BASE = ("time", "level", "logger", "message", "module", "function", "line", "process", "thread", "exception", "stack")
_TAKEN = frozenset({*_BASE, "cut"})
# taskName came with Python 3.12; message and asctime are set by formatters.
_ATTRIBUTES = frozenset({*vars(logging.LogRecord("", 0, "", 0, "", None, None)), "message", "asctime", "taskName"})
# structlog's methods that are no levels.
_LEVELS = {"WARN": "WARNING", "EXCEPTION": "ERROR", "FATAL": "CRITICAL", "MSG": "INFO"}
# The modules that log about producing, and librdkafka's lines; the last stands where logging does not look for callers.
_CLIENT_MODULES = frozenset(
    {
        "_producers",
        "_spilling",
        "admin",
        "django",
        "logger",
        "logs",
        "publishing",
        "reports",
        "spill",
        "sqlalchemy",
        "(unknown file)",
    }
)


class _Here(threading.local):
    busy = False  # while this thread is in a writer: what it logs meanwhile must not come back


_here = _Here()


def _of_client(record: logging.LogRecord) -> bool:
    """Whether a record is about writing to Kafka: written there, it could lead to the next (as with `debug=msg`).

    What keven_core's servers log, of dead letters for example, is not.
    """
    return record.name.partition(".")[0] == "keven_core" and (_here.busy or record.module in _CLIENT_MODULES)


# --- JSON ------------------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception as error:  # a class of the service, whose __str__ is broken
        return f"<{type(value).__qualname__}, whose __str__ raised {type(error).__qualname__}>"


_encode = msgspec.json.Encoder(enc_hook=_text).encode


def _json(value: object) -> tuple[bytes, bool]:
    """A value's JSON, and whether it was cut."""
    if not isinstance(value, str):
        try:
            data = _encode(value)
            if len(data) <= _FIELD_LIMIT:
                return data, False
            value = data.decode()
        except Exception:  # a cycle, a key that is no text, a lone surrogate
            value = _text(value)
    shown = value if len(value) <= _FIELD_LIMIT else f"{value[:_FIELD_LIMIT]}... (cut, {len(value)} characters)"
    return _encode(shown.encode("utf-8", "backslashreplace").decode()), shown is not value


def _object(base: tuple[object, ...], *more: Iterable[tuple[Any, object]]) -> bytes:
    """The JSON of a record: values for _BASE, None where there is none, and further fields."""
    fields = {name: value for name, value in zip(_BASE, base, strict=True) if value is not None}
    for given, value in (pair for pairs in more for pair in pairs):
        name = _text(given)[:_NAME_LIMIT]
        while name in _TAKEN or name in fields:
            name = f"extra_{name}"
        fields[name] = value
    with contextlib.suppress(Exception):
        data = _encode(fields)
        if len(data) <= _FIELD_LIMIT:  # so is every field
            return data
    parts, cut, size = [], [], 0
    for name, value in fields.items():
        data, was_cut = _json(value)
        part = _json(name)[0] + b":" + data
        size += len(part) + 1
        if size > _RECORD_LIMIT:
            cut.append("*")
            break
        parts.append(part)
        if was_cut:
            cut.append(name)
    if cut:
        parts.append(b'"cut":' + _json(cut)[0])
    return b"{%b}" % b",".join(parts)


def _rendered(text: object) -> bytes:
    """The value of a message that a formatter or renderer has made."""
    data = text if isinstance(text, bytes) else _text(text).encode("utf-8", "backslashreplace")
    if len(data) <= _RECORD_LIMIT:
        return data
    return data[:_RECORD_LIMIT].decode("utf-8", "ignore").encode() + b"... (cut, %d bytes)" % len(data)


def _time_text(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _seconds(stamp: object) -> float | None:
    """A timestamp of structlog's TimeStamper since the epoch; None where it doesn't say which moment it means."""
    with contextlib.suppress(ValueError, OverflowError, OSError):
        if isinstance(stamp, str):
            moment = datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00"))  # Python 3.10 does not know the Z
            stamp = moment.timestamp() if moment.tzinfo else None
        if isinstance(stamp, (int, float)) and _time_text(stamp):
            return stamp
    return None


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # the record is worth having without its arguments
        return f"{_text(record.msg)} <its arguments raised {type(error).__qualname__}>"


def _traceback(exc_info: Any) -> str | None:
    """The text of what logging and structlog call exc_info: a tuple, an exception, or true for the one in hand."""
    if isinstance(exc_info, BaseException):
        exc_info = (type(exc_info), exc_info, exc_info.__traceback__)
    elif exc_info and not isinstance(exc_info, tuple):
        exc_info = sys.exc_info()
    return "".join(traceback.format_exception(*exc_info)).rstrip("\n") if exc_info and exc_info[1] else None


# --- writing ---------------------------------------------------------------------------------------------------------


class _Writer:
    """What handler and processor share. The arguments are explained at KafkaLogHandler."""

    def __init__(
        self,
        topic: str | None = None,
        kafka_address: str | None = None,
        *,
        logger: KafkaBatchLogger | None = None,
        fields: Mapping[str, object] | None = None,
        key: str | Callable[[Any], bytes | None] | None = None,
        flush_timeout: float = 5.0,
    ) -> None:
        if topic is None and logger is None:
            raise UsageError("log records need a topic: name one, or give a logger that has one")
        self._timeout = float(flush_timeout)  # a configuration file may have it as text
        if not 0 <= self._timeout < math.inf:
            raise ConfigurationError(f"flush_timeout={flush_timeout!r} is not a number of seconds")
        self._own = logger is None
        if logger is None:
            logger = KafkaBatchLogger(kafka_address, topic, self._timeout, on_full="drop")
        self._logger = logger
        self._topic = None if self._own or topic is None else check_topic(topic)
        self._fields = dict(fields or {})
        self._key = key
        self._ended = False
        self._seen = self._counted("dropped_count")
        self._begin()
        _writers.add(self)

    def _begin(self) -> None:
        """Start to count; once more in a forked child, where another thread may have held the lock."""
        # Held to count only, never while something logs or blocks. Reentrant, since signal handlers may log.
        self._lock = threading.RLock()
        self._limiter = RateLimiter(1, 10.0)
        self._unflushed = False
        self._told = 0  # drops that the topic knows of
        self.dropped_count = 0
        self.failed_count = 0

    def flush(self) -> None:
        """Wait until Kafka has what was written; blocks up to `flush_timeout`. From any thread. Never raises."""
        deadline = time.monotonic() + self._timeout
        self._attempt(0, self._wait, deadline)
        self._attempt(0, self._tell_drops, True)
        self._attempt(0, self._wait, deadline)

    def close(self) -> None:
        """flush(), then refuse further records; what is not acknowledged by then counts as failed. Never raises.

        Called by logging.shutdown() and at the end of the interpreter; may be called twice. A logger that was given
        stays open.
        """
        if self._ended:
            return
        self.flush()
        self._ended = True
        self._attempt(0, self._end)
        if self.dropped_count or self.failed_count:
            self._lost(0, 0, "closed", "close")

    def _write(self, source: Any, render: Callable[[], tuple[bytes, float]]) -> None:
        """Write one record, of which `render` makes the value and tells the time of its creation. Never raises."""
        if not self._attempt(1, self._put, source, render):
            self._lost(0, 1, "logged by its thread while that was writing another record")

    def _attempt(self, records: int, step: Callable[..., None], *arguments: Any) -> bool:
        """Do what may go wrong, for so many records; False: not done, as this thread is within an attempt already."""
        if _here.busy:
            return False
        try:
            _here.busy = True
            step(*arguments)
        except QueueFullError as error:
            self._lost(1, 0, error)
        except DeliveryError as error:
            self._lost(0, max(records, error.failed_count), error)
        except Exception as error:
            self._lost(0, records, error)
        finally:
            _here.busy = False
        return True

    def _put(self, source: Any, render: Callable[[], tuple[bytes, float]]) -> None:
        if self._ended:
            raise ClosedError("logged after close()")
        key: Any = self._key
        if callable(key):
            key = key(source)
        elif key is not None:
            key = source.get(key) if isinstance(source, Mapping) else getattr(source, key, None)
        self._send(*render(), key if key is None or isinstance(key, bytes) else _text(key).encode())
        if not self._see_drops():
            self._tell_drops()

    def _send(self, value: bytes, created: float, key: bytes | None = None) -> None:
        # In an empty context: it is no message of the event handler that logs, for which a server would wait and which
        # dispatch() would show.
        milliseconds = round(created * 1_000_000) // 1000
        contextvars.Context().run(self._logger.log, value, self._topic, key=key, timestamp_ms=milliseconds)
        self._unflushed = True

    def _render(self, record: logging.LogRecord) -> tuple[bytes, float]:
        base = (
            _time_text(record.created),
            record.levelname,
            record.name,
            _message(record),
            *(record.module, record.funcName, record.lineno, record.process, record.threadName),
            _traceback(record.exc_info) if record.exc_info else record.exc_text,
            record.stack_info,
        )
        extras = [pair for pair in vars(record).items() if pair[0] not in _ATTRIBUTES]
        return _object(base, self._fields.items(), extras), record.created

    def _wait(self, deadline: float) -> None:
        if self._unflushed:
            self._unflushed = False  # before: others may write meanwhile
            try:
                self._logger.flush(max(0.0, deadline - time.monotonic()))
            finally:
                self._unflushed |= self._counted("pending_count") > 0

    def _end(self) -> None:
        if self._unflushed:
            # Not closed, since that would wait again: what is pending is sent until the process ends.
            self._lost(0, self._counted("pending_count"), f"not acknowledged within {self._timeout:g} s")
        elif self._own:
            self._logger.close()

    def _counted(self, name: str) -> int:
        return int(getattr(self._logger, name, 0))

    def _see_drops(self) -> int:
        """Count what the logger has dropped by itself since the last look, and return that."""
        with self._lock:
            count = self._counted("dropped_count")
            new = count - self._seen if count >= self._seen else count  # in a forked child it may begin anew
            self._seen = count
        if new:
            self._lost(new, 0, "the send queue is full")
        return new

    def _tell_drops(self, now: bool = False) -> None:
        """Write a record about the drops of which the topic doesn't know, `now` or once in 10 s."""
        with self._lock:
            total, count = self.dropped_count, self.dropped_count - self._told
            if not count or (self._limiter.admit("tell") is None and not now):
                return
        text = "%d log record(s) were dropped: the send queue was full"
        record = logging.LogRecord("keven_core.log_handler", logging.WARNING, __file__, 0, text, (count,), None)
        record.dropped = count
        before = self._counted("dropped_count")
        self._send(*self._render(record))
        # Not by what _see_drops() returns: another thread may have counted that this very record was dropped.
        if self._counted("dropped_count") == before:
            self._told = max(self._told, total)
        self._see_drops()

    def _lost(self, dropped: int, failed: int, reason: object, what: str = "lost") -> None:
        """Count lost records and say it on stderr, never through logging: one line of a kind (`what`) in 10 s."""
        with self._lock:
            self.dropped_count += dropped
            self.failed_count += failed
            counts = f"{self.dropped_count} log record(s) dropped, {self.failed_count} failed"
            quiet = self._limiter.admit(what) is None
        if logging.raiseExceptions and not quiet and sys.stderr is not None:
            kind = f"{type(reason).__qualname__}: " if isinstance(reason, Exception) else ""
            with contextlib.suppress(Exception):  # it may be closed, or anything with a write()
                sys.stderr.write(f"keven_core.log_handler: {counts} so far; {kind}{one_line(reason)}\n")


# What says that no other formatter was set: where there is none, logging.basicConfig() sets its own.
_NO_FORMATTER = logging.Formatter()


class KafkaLogHandler(_Writer, logging.Handler):
    """A logging handler that writes each record to Kafka, as the JSON that this module's docstring shows.

    Arguments:
        topic: where records go; None: to the topic of `logger`.
        kafka_address: host:port of the brokers, comma-separated; the environment variable KAFKA wins.
        logger: a KafkaBatchLogger to write with, instead of one of the handler's own. It stays open, its `on_full` and
            `timeout` decide whether a full queue makes the service wait, and all of its drops are counted.
        level: as in logging.Handler.
        fields: further fields of every record, for example {"service": "orders"}.
        key: the message's key: a function of the LogRecord that returns bytes or None, or the name of an attribute.
        flush_timeout: seconds that flush() and close() wait at most.

    Attributes:
        dropped_count: records of this process for which there was no room in the send queue.
        failed_count: records that could not be rendered, were refused, or not acknowledged by the end of close().

    Raises UsageError or ConfigurationError for wrong arguments; nothing connects before the first record.

    Logging calls it in any thread. A record never raises, nor waits for room in the send queue: what is lost is
    counted and said on stderr at most every 10 s (not with logging.raiseExceptions off), and when there is room again
    a warning of the logger "keven_core.log_handler" tells the topic how many were `dropped`. What the Kafka client
    logs of itself is left to other handlers; what is logged by the __str__ of something logged fails. With a formatter,
    its text is the message, as with every handler, and `fields` are left to it. A forked child goes on with a
    connection of its own; since multiprocessing ends it without logging.shutdown(), call that there.
    """

    def __init__(
        self,
        topic: str | None = None,
        kafka_address: str | None = None,
        *,
        logger: KafkaBatchLogger | None = None,
        level: int | str = logging.NOTSET,
        fields: Mapping[str, object] | None = None,
        key: str | Callable[[logging.LogRecord], bytes | None] | None = None,
        flush_timeout: float = 5.0,
    ) -> None:
        _Writer.__init__(self, topic, kafka_address, logger=logger, fields=fields, key=key, flush_timeout=flush_timeout)
        logging.Handler.__init__(self, level)
        self.setFormatter(_NO_FORMATTER)

    def handle(self, record: logging.LogRecord) -> bool:
        """As logging.Handler's but without its lock, which a thread of the client that logs must not wait for."""
        passed: object = self.filter(record)
        if passed:
            self.emit(passed if isinstance(passed, logging.LogRecord) else record)
        return bool(passed)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record. Called by handle(), in the thread that logs. Never raises."""
        if not _of_client(record):
            self._write(record, lambda: self._render(record))

    def _render(self, record: logging.LogRecord) -> tuple[bytes, float]:
        if self.formatter in (None, _NO_FORMATTER):
            return super()._render(record)
        return _rendered(self.format(record)), record.created

    def close(self) -> None:
        """As _Writer.close(), and logging forgets the handler."""
        super().close()
        logging.Handler.close(self)


class KafkaLogProcessor(_Writer):
    """A structlog processor that writes each event to Kafka and passes it on as it is.

    It stands before the renderer, in a chain of structlog or of a ProcessorFormatter; behind it, what was rendered is
    written. Arguments (but `level`), attributes and promises are KafkaLogHandler's; `key` is given the event dict, or
    names an entry of it. flush() and close() as there; close() is called at the end of the interpreter.

    `event` becomes `message`; `level`, else the method's name, is written in capitals; `timestamp` becomes `time` if it
    says which moment it means; what CallsiteParameterAdder adds gets our names; `exc_info` becomes `exception`. All
    else is extra.
    """

    def __call__(self, logger: Any, method_name: str, event_dict: Any) -> Any:
        """Write an event and return it. Called by structlog, in the thread that logs. Never raises."""
        # The LogRecord that a ProcessorFormatter has in hand.
        record = event_dict.get("_record") if isinstance(event_dict, Mapping) else None
        if record is None or not _of_client(record):
            self._write(event_dict, lambda: self._render_event(logger, method_name, record, event_dict))
        return event_dict

    def _render_event(self, logger: Any, method: str, record: Any, event: Any) -> tuple[bytes, float]:
        if not isinstance(event, Mapping):
            return _rendered(event), time.time()
        rest = {name: value for name, value in event.items() if name not in ("_record", "_from_structlog")}
        created = _seconds(rest.get("timestamp"))
        if created is not None:
            del rest["timestamp"]
        else:
            created = getattr(record, "created", None) or time.time()
        level = _text(rest.pop("level", None) or getattr(record, "levelname", method)).upper()
        name = getattr(record or logger, "name", None)
        exc_info, stack_info = rest.pop("exc_info", None), rest.pop("stack_info", None)
        base = (
            _time_text(created),
            _LEVELS.get(level, level),
            _text(rest.pop("logger", None) or (name if isinstance(name, str) else "")),
            _text(rest.pop("event", None) or rest.pop("message", "")),
            rest.pop("module", getattr(record, "module", None)),
            rest.pop("func_name", getattr(record, "funcName", None)),
            rest.pop("lineno", getattr(record, "lineno", None)),
            rest.pop("process", None) or getattr(record, "process", None) or os.getpid(),
            rest.pop("thread_name", None) or getattr(record, "threadName", None) or threading.current_thread().name,
            rest.pop("exception", None) or _traceback(exc_info),
            rest.pop("stack", None) or (stack_info if isinstance(stack_info, str) else None),
        )
        return _object(base, self._fields.items(), rest.items()), created


# --- fork and exit ---------------------------------------------------------------------------------------------------

_writers: weakref.WeakSet[_Writer] = weakref.WeakSet()


def _begin_in_child() -> None:
    for writer in list(_writers):
        writer._begin()


@atexit.register  # after the producers', which is why it runs before theirs; logging.shutdown() would come too late
def _close_all() -> None:
    for writer in list(_writers):
        writer.close()


os.register_at_fork(after_in_child=_begin_in_child)
