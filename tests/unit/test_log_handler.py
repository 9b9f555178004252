"""Log records to Kafka: the shape of the JSON, and that logging never raises, recurses, waits or loses in silence."""

import contextvars
import datetime
import io
import json
import logging
import logging.config
import logging.handlers
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
from builds import run_python

import keven_core.kafka
from keven_core.kafka import log_handler
from keven_core.kafka.errors import (
    ConfigurationError,
    DeliveryError,
    KafkaTimeoutError,
    MessageTooLargeError,
    QueueFullError,
    UsageError,
)
from keven_core.kafka.log_handler import KafkaLogHandler, KafkaLogProcessor

CREATED = 1_714_566_600.000_001  # 2024-05-01T12:30:00.000001Z


class StandIn:
    """Takes what is logged; `fails` raises what a call is to raise, `after` is called when one is taken."""

    def __init__(self) -> None:
        self.got: list[tuple[bytes, str | None, dict[str, Any]]] = []
        self.fails: Callable[[bytes], Exception | None] = lambda data: None
        self.after: Callable[[], None] = lambda: None
        self.flush_error: BaseException | None = None
        self.flushed: list[float | None] = []
        self.closed = 0
        self.pending_count = 0
        self.dropped_count = 0

    def log(self, data: bytes, topic: str | None = None, **options: Any) -> None:
        assert type(data) is bytes
        error = self.fails(data)
        if error is not None:
            raise error
        self.got.append((data, topic, options))
        self.after()

    def flush(self, timeout: float | None = None) -> int:
        self.flushed.append(timeout)
        if self.flush_error is not None:
            raise self.flush_error
        return len(self.got)

    def close(self) -> None:
        self.closed += 1

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(data) for data, _, _ in self.got]

    @property
    def messages(self) -> list[str]:
        return [record["message"] for record in self.records]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Broken:
    """Something that can't even say what it is."""

    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


@pytest.fixture
def taken() -> StandIn:
    return StandIn()


@pytest.fixture(autouse=True)
def clock(monkeypatch: Any) -> Clock:
    clock = Clock()
    limiter = log_handler.RateLimiter
    monkeypatch.setattr(log_handler, "RateLimiter", lambda count, period_s: limiter(count, period_s, clock))
    return clock


class Stderr:
    """What was written to stderr so far."""

    def __init__(self, capsys: Any) -> None:
        self._capsys = capsys
        self._text = ""

    @property
    def lines(self) -> list[str]:
        self._text += self._capsys.readouterr().err
        return self._text.splitlines()


@pytest.fixture(autouse=True)
def stderr(capsys: Any) -> Stderr:
    return Stderr(capsys)


@pytest.fixture
def app() -> logging.Logger:
    """A logger that has no parent, and so no handlers of pytest."""
    return logging.Logger("app.orders", logging.DEBUG)


@pytest.fixture
def registered() -> Iterator[logging.Logger]:
    """A logger that logging.getLogger() returns."""
    logger = logging.getLogger("app.registered")
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    yield logger
    logger.handlers.clear()


def attached(logger: logging.Logger, taken: Any, **options: Any) -> KafkaLogHandler:
    handler = KafkaLogHandler(logger=taken, **options)
    logger.addHandler(handler)
    return handler


def fixed(record: logging.LogRecord) -> logging.LogRecord:
    """A record with what differs from run to run set."""
    record.created, record.process, record.threadName = CREATED, 4711, "MainThread"
    return record


def golden_record(**changes: Any) -> logging.LogRecord:
    arguments = ("app.orders", logging.INFO, "/srv/app/orders.py", 42, "order %s of %s", (7, "Ada"), None, "place")
    record = fixed(logging.LogRecord(*arguments))
    vars(record).update(changes)
    return record


# --- the shape -------------------------------------------------------------------------------------------------------


def test_the_bytes_of_a_record(taken: StandIn) -> None:
    handler = KafkaLogHandler(logger=taken)
    handler.handle(golden_record())
    [(data, topic, options)] = taken.got
    assert data == (
        b'{"time":"2024-05-01T12:30:00.000001Z","level":"INFO","logger":"app.orders","message":"order 7 of Ada",'
        b'"module":"orders","function":"place","line":42,"process":4711,"thread":"MainThread"}'
    )
    assert topic is None
    assert options == {"key": None, "timestamp_ms": 1_714_566_600_000}


def test_the_bytes_of_a_record_with_everything(taken: StandIn) -> None:
    handler = KafkaLogHandler(logger=taken, fields={"service": "orders", "line": "A", "order": 0})
    extras: dict[str, Any] = {
        "order": 7,
        "time": "late",
        "none": None,
        "nested": {"list": [1, 2.5, True, None], "set": {3}, 4: "number"},
        "moment": datetime.datetime(2024, 5, 1, tzinfo=datetime.timezone.utc),
        "data": b"\x00\xff",
        "nan": float("nan"),
        "class": object,
        "broken": Broken(),
        "surrogate": "\ud800",
        "text": 'ä\n"',
    }
    handler.handle(golden_record(exc_text="Traceback...\nKeyError: 1", stack_info="Stack...", **extras))
    [(data, _, _)] = taken.got
    assert data == (
        b'{"time":"2024-05-01T12:30:00.000001Z","level":"INFO","logger":"app.orders","message":"order 7 of Ada",'
        b'"module":"orders","function":"place","line":42,"process":4711,"thread":"MainThread",'
        b'"exception":"Traceback...\\nKeyError: 1","stack":"Stack...","service":"orders","extra_line":"A","order":0,'
        b'"extra_order":7,"extra_time":"late","none":null,"nested":{"list":[1,2.5,true,null],"set":[3],"4":"number"},'
        b'"moment":"2024-05-01T00:00:00Z","data":"AP8=","nan":null,"class":"<class \'object\'>",'
        b'"broken":"<Broken, whose __str__ raised ValueError>","surrogate":"\\\\ud800",'
        b'"text":"\xc3\xa4\\n\\""}'
    )
    assert handler.failed_count == 0


def test_what_logging_is_told_not_to_find_out_is_left_out(taken: StandIn) -> None:
    KafkaLogHandler(logger=taken).handle(golden_record(process=None, threadName=None, funcName=None))
    assert list(taken.records[0]) == ["time", "level", "logger", "message", "module", "line"]


@pytest.mark.parametrize(
    ("created", "text", "milliseconds"),
    [
        (1_714_566_600.0, "2024-05-01T12:30:00.000000Z", 1_714_566_600_000),
        (1_714_566_600.123_456, "2024-05-01T12:30:00.123456Z", 1_714_566_600_123),
        (1_714_566_600.999_9, "2024-05-01T12:30:00.999900Z", 1_714_566_600_999),
        (1_234.567, "1970-01-01T00:20:34.567000Z", 1_234_567),
    ],
)
def test_the_time_is_that_of_the_record(taken: StandIn, created: float, text: str, milliseconds: int) -> None:
    KafkaLogHandler(logger=taken).handle(golden_record(created=created))
    assert taken.records[0]["time"] == text
    assert taken.got[0][2]["timestamp_ms"] == milliseconds


def test_a_call_of_logging_becomes_a_record(taken: StandIn, app: logging.Logger) -> None:
    attached(app, taken)
    app.warning("order %(number)s", {"number": 7}, extra={"customer": "Ada"})
    [record] = taken.records
    assert (record["level"], record["logger"], record["message"]) == ("WARNING", "app.orders", "order 7")
    assert (record["module"], record["function"]) == (
        "test_log_handler",
        "test_a_call_of_logging_becomes_a_record",
    )
    assert (record["process"], record["thread"], record["customer"]) == (os.getpid(), "MainThread", "Ada")
    assert abs(datetime.datetime.fromisoformat(record["time"].replace("Z", "+00:00")).timestamp() - CREATED) > 60


def test_exceptions_and_stacks_are_as_python_prints_them(taken: StandIn, app: logging.Logger) -> None:
    attached(app, taken)
    try:
        raise KeyError("a\nb")
    except KeyError as error:
        app.exception("failed", stack_info=True)
        wanted = logging.Formatter().formatException((KeyError, error, error.__traceback__))
    app.error("given", exc_info=ValueError("x"))
    app.error("there is none", exc_info=True)
    first, second, third = taken.records
    assert first["exception"] == wanted
    assert first["exception"].startswith("Traceback (most recent call last):\n")
    assert first["exception"].endswith("KeyError: 'a\\nb'")
    assert first["stack"].startswith("Stack (most recent call last):\n")
    assert second["exception"] == "ValueError: x"
    assert "stack" not in second
    assert "exception" not in third


def test_an_exception_that_cannot_be_shown(taken: StandIn, app: logging.Logger) -> None:
    class Shy(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    handler = attached(app, taken)
    try:
        raise Shy
    except Shy:
        app.exception("failed")
    assert "<exception str() failed>" in taken.records[0]["exception"]
    assert handler.failed_count == 0


def test_the_extras_of_an_adapter(taken: StandIn, app: logging.Logger) -> None:
    attached(app, taken)
    logging.LoggerAdapter(app, {"request": "r1", "level": "own"}).info("x")
    assert taken.records[0]["request"] == "r1"
    assert taken.records[0]["extra_level"] == "own"
    assert taken.records[0]["level"] == "INFO"


def test_attributes_of_logging_are_no_extras(taken: StandIn, app: logging.Logger) -> None:
    text = logging.StreamHandler(io.StringIO())
    text.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    app.addHandler(text)  # sets asctime, message and exc_text
    attached(app, taken)
    app.info("x")
    assert list(taken.records[0]) == [
        *("time", "level", "logger", "message", "module", "function", "line", "process", "thread")
    ]


def test_attributes_of_a_record_factory_are_extras(taken: StandIn, app: logging.Logger) -> None:
    attached(app, taken)
    factory = logging.getLogRecordFactory()

    def traced(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = factory(*args, **kwargs)
        record.trace = "t1"
        return record

    logging.setLogRecordFactory(traced)
    try:
        app.info("x")
    finally:
        logging.setLogRecordFactory(factory)
    assert taken.records[0]["trace"] == "t1"


def test_no_two_names_collide(taken: StandIn) -> None:
    handler = KafkaLogHandler(logger=taken, fields={"a": 1, "extra_time": 2, "cut": 3})
    record = golden_record(a=4, time=5, stack=6)
    vars(record)["extra_a"] = 7
    vars(record)[Broken()] = 8  # type: ignore[index]  # nothing keeps a service from this
    handler.handle(record)
    pairs = json.loads(taken.got[0][0], object_pairs_hook=list)
    assert pairs[9:] == [
        ("a", 1),
        ("extra_time", 2),
        ("extra_cut", 3),
        ("extra_a", 4),
        ("extra_extra_time", 5),
        ("extra_stack", 6),
        ("extra_extra_a", 7),
        ("<Broken, whose __str__ raised ValueError>", 8),
    ]


def test_the_record_is_not_changed(taken: StandIn) -> None:
    record = golden_record(order=7, exc_info=(ValueError, ValueError("x"), None))
    before = dict(vars(record))
    KafkaLogHandler(logger=taken, fields={"service": "a"}).handle(record)
    assert vars(record) == before


# --- what can't be written as it is ----------------------------------------------------------------------------------


def test_a_message_whose_arguments_do_not_fit_arrives_without_them(taken: StandIn, app: logging.Logger) -> None:
    handler = attached(app, taken)
    app.info("%d apples", "no")
    app.info("%s", Broken())
    app.info(Broken())
    app.info("%s %s", 1)
    assert taken.messages == [
        "%d apples <its arguments raised TypeError>",
        "%s <its arguments raised ValueError>",
        "<Broken, whose __str__ raised ValueError> <its arguments raised ValueError>",
        "%s %s <its arguments raised TypeError>",
    ]
    assert handler.failed_count == 0


def test_any_value_becomes_something(taken: StandIn, app: logging.Logger) -> None:
    class Point(msgspec.Struct):
        x: int

    class Liar:
        def __str__(self) -> str:
            return 5  # type: ignore[return-value]

    cycle: list[Any] = []
    cycle.append(cycle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    handler = attached(app, taken)
    values = [
        cycle,
        deep,
        2**100,
        {(1, 2): 3},
        {Broken(): 1},
        [Broken()],
        Point(1),
        Liar(),
        1j,
        "\udcff\x00",
        {"\ud800": 1},
    ]
    for value in values:
        app.info("x", extra={"value": value, "after": 1})
    found = [record["value"] for record in taken.records]
    assert len(found) == len(values)
    assert all(record["after"] == 1 for record in taken.records)
    assert handler.failed_count == 0
    assert found[6] == {"x": 1}
    assert found[7] == f"<{Liar.__qualname__}, whose __str__ raised TypeError>"
    assert found[8] == "1j"
    assert found[9] == "\\udcff\x00"
    while deep:  # freeing it at once would recurse
        deep = deep.pop()


def test_a_huge_message_is_cut_and_says_so(taken: StandIn, app: logging.Logger) -> None:
    handler = attached(app, taken)
    app.info("x" * 100_000_000, extra={"after": 1})
    [(data, _, _)] = taken.got
    assert len(data) < 40_000
    [record] = taken.records
    assert record["message"] == "x" * 32_768 + "... (cut, 100000000 characters)"
    assert (record["after"], record["cut"]) == (1, ["message"])
    assert handler.failed_count == 0


def test_each_field_is_cut_for_itself(taken: StandIn, app: logging.Logger) -> None:
    attached(app, taken)
    app.info("x", extra={"whole": "y" * 32_768, "list": ["a"] * 20_000, "umlauts": "\u00e4" * 40_000, "n" * 1000: 1})
    [record] = taken.records
    assert record["whole"] == "y" * 32_768
    assert record["list"].startswith('["a","a",')
    assert record["list"].endswith("... (cut, 80001 characters)")
    assert record["umlauts"] == "\u00e4" * 32_768 + "... (cut, 40000 characters)"
    assert record["n" * 256] == 1
    assert record["cut"] == ["list", "umlauts"]
    app.info("\ud800" * 40_000)
    assert taken.records[1]["message"] == "\\ud800" * 32_768 + "... (cut, 40000 characters)"


def test_a_record_ends_at_its_limit(taken: StandIn, app: logging.Logger) -> None:
    attached(app, taken)
    app.info("x", extra={f"field{number}": "y" * 32_000 for number in range(5000)})
    app.info("x", extra={f"field{number}": number for number in range(100_000)})
    app.info("\x00" * 32_768, extra={f"field{number}": "\x00" * 32_768 for number in range(3)})
    for data, _, _ in taken.got:
        assert len(data) <= (256 << 10) + 1000
    many, small, escaped = taken.records
    assert many["cut"] == small["cut"] == escaped["cut"] == ["*"]
    assert [name for name in many if name.startswith("field")] == [f"field{number}" for number in range(8)]
    assert "field5000" in small
    assert escaped["message"] == "\x00" * 32_768


def test_a_traceback_is_cut_like_any_field(taken: StandIn, app: logging.Logger) -> None:
    attached(app, taken)
    app.error("x", exc_info=ValueError("y" * 1_000_000))
    assert len(taken.got[0][0]) < 40_000
    assert taken.records[0]["cut"] == ["exception"]


# --- formatter, key, fields ------------------------------------------------------------------------------------------


def test_with_a_formatter_its_text_is_the_message(taken: StandIn, app: logging.Logger) -> None:
    handler = attached(app, taken, fields={"service": "orders"})
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s \u00e4"))
    app.info("x")
    app.info("\ud800")
    app.info("y" * 1_000_000)
    first, second, third = (data for data, _, _ in taken.got)
    assert first == "INFO x ä".encode()
    assert second == "INFO \\ud800 ä".encode()
    assert third.startswith(b"INFO yyy")
    assert third.endswith(b"y... (cut, 1000008 bytes)")
    assert len(third) < (256 << 10) + 100
    handler.setFormatter(None)
    app.info("json again")
    assert json.loads(taken.got[-1][0])["service"] == "orders"


def test_a_formatter_may_return_bytes_or_raise(taken: StandIn, app: logging.Logger, stderr: Stderr) -> None:
    class Odd(logging.Formatter):
        def format(self, record: logging.LogRecord) -> Any:
            if record.msg == "bad":
                raise ZeroDivisionError
            return b"\xff"

    handler = attached(app, taken)
    handler.setFormatter(Odd())
    app.info("x")
    app.info("bad")
    assert [data for data, _, _ in taken.got] == [b"\xff"]
    assert handler.failed_count == 1
    assert "ZeroDivisionError" in stderr.lines[0]


@pytest.mark.parametrize(
    ("key", "extra", "wanted"),
    [
        (None, {}, None),
        (lambda record: record.name.encode(), {}, b"app.orders"),
        (lambda record: None, {}, None),
        ("request", {"request": "r1"}, b"r1"),
        ("request", {"request": b"r\xff"}, b"r\xff"),
        ("request", {"request": 7}, b"7"),
        ("request", {"request": None}, None),
        ("request", {}, None),
        ("levelname", {}, b"INFO"),
    ],
)
def test_the_key(taken: StandIn, app: logging.Logger, key: Any, extra: dict[str, Any], wanted: bytes | None) -> None:
    attached(app, taken, key=key)
    app.info("x", extra=extra)
    assert taken.got[0][2]["key"] == wanted


def test_a_key_function_that_raises_costs_the_record(taken: StandIn, app: logging.Logger, stderr: Stderr) -> None:
    handler = attached(app, taken, key=lambda record: 1 // 0)
    app.info("x")
    assert (taken.got, handler.failed_count, handler.dropped_count) == ([], 1, 0)
    assert stderr.lines == [
        "keven_core.log_handler: 0 log record(s) dropped, 1 failed so far; "
        "ZeroDivisionError: integer division or modulo by zero"
    ]


def test_the_topic_is_the_argument_or_the_loggers(taken: StandIn) -> None:
    KafkaLogHandler("logs.v1", logger=taken).handle(golden_record())
    KafkaLogHandler(logger=taken).handle(golden_record())
    assert [topic for _, topic, _ in taken.got] == ["logs.v1", None]


def test_basic_config_does_not_set_its_formatter(taken: StandIn, monkeypatch: Any) -> None:
    root = logging.RootLogger(logging.INFO)
    monkeypatch.setattr(logging, "root", root)
    logging.basicConfig(handlers=[KafkaLogHandler(logger=taken)], format="%(levelname)s %(message)s")
    root.info("x")
    assert taken.messages == ["x"]


def test_levels_and_filters_hold(taken: StandIn, app: logging.Logger) -> None:
    handler = attached(app, taken, level="WARNING")
    handler.addFilter(lambda record: record.msg != "secret")
    app.info("too low")
    app.error("secret")
    app.error("x")
    assert taken.messages == ["x"]
    assert repr(handler) == "<KafkaLogHandler (WARNING)>"


@pytest.mark.parametrize("kind", [KafkaLogHandler, KafkaLogProcessor])
def test_wrong_arguments_are_refused_at_once(kind: Any, taken: StandIn) -> None:
    with pytest.raises(UsageError, match="topic"):
        kind()
    with pytest.raises(ConfigurationError, match="not a topic name"):
        kind("not a topic", logger=taken)
    for bad in (-1, float("nan"), float("inf"), "text"):
        with pytest.raises(ValueError, match=r"flush_timeout|float"):
            kind(logger=taken, flush_timeout=bad)


def test_an_unknown_level_is_refused(taken: StandIn) -> None:
    with pytest.raises(ValueError, match="Unknown level"):
        KafkaLogHandler(logger=taken, level="LOUD")


# --- never raises ----------------------------------------------------------------------------------------------------


class WeirdError(Exception):
    def __str__(self) -> str:
        raise self

    __repr__ = __str__


@pytest.mark.parametrize(
    "error",
    [
        WeirdError(),
        MessageTooLargeError("too large"),
        DeliveryError("refused", [], 1),
        MemoryError(),
        RecursionError(),
        AssertionError(),
        StopIteration(),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "why"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_are_counted_and_said(taken: StandIn, app: logging.Logger, stderr: Stderr, error: Exception) -> None:
    handler = attached(app, taken)
    taken.fails = lambda data: error
    app.info("lost")
    taken.fails = lambda data: None
    app.info("there")
    assert (taken.messages, handler.failed_count, handler.dropped_count) == (["there"], 1, 0)
    [line] = stderr.lines
    assert line.startswith("keven_core.log_handler: 0 log record(s) dropped, 1 failed so far; ")
    assert type(error).__name__ in line


def test_a_logger_whose_attributes_raise(app: logging.Logger, stderr: Stderr) -> None:
    class Bad:
        looks = 0
        pending_count = property(lambda self: 1 // 0)

        @property
        def dropped_count(self) -> int:
            self.looks += 1
            if self.looks > 1:
                raise ZeroDivisionError
            return 0

        def log(self, *args: Any, **kwargs: Any) -> None: ...
        def flush(self, timeout: Any) -> None:
            raise WeirdError

    handler = attached(app, Bad())
    app.info("x")
    handler.flush()
    handler.close()
    assert handler.failed_count == 1
    assert len(stderr.lines) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_the_process_passes(
    taken: StandIn, app: logging.Logger, stderr: Stderr, error: type[BaseException]
) -> None:
    handler = attached(app, taken)
    taken.fails = lambda data: (_ for _ in ()).throw(error)
    with pytest.raises(error):
        app.info("x")
    assert (handler.failed_count, stderr.lines) == (0, [])
    taken.fails = lambda data: None
    app.info("and on")
    assert taken.messages == ["and on"]


def test_stderr_hears_of_it_every_10_seconds(taken: StandIn, app: logging.Logger, stderr: Stderr, clock: Clock) -> None:
    handler = attached(app, taken)
    taken.fails = lambda data: RuntimeError("two\nlines")
    for _ in range(1000):
        app.info("x")
        clock.now += 0.0101
    assert [line.partition("; ")[0][-16:] for line in stderr.lines] == [" 1 failed so far", "92 failed so far"]
    assert all(line.endswith("RuntimeError: two\\nlines") for line in stderr.lines)
    assert handler.failed_count == 1000


def test_stderr_hears_nothing_when_logging_is_told_so(
    taken: StandIn, app: logging.Logger, stderr: Stderr, monkeypatch: Any
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    handler = attached(app, taken)
    taken.fails = lambda data: RuntimeError()
    app.info("x")
    handler.close()
    assert (stderr.lines, handler.failed_count) == ([], 1)


@pytest.mark.parametrize("what", ["none", "closed", "raises"])
def test_stderr_may_be_anything(taken: StandIn, app: logging.Logger, monkeypatch: Any, what: str) -> None:
    broken: Any = io.StringIO()
    broken.close()
    if what == "raises":
        broken = Broken()
    monkeypatch.setattr(sys, "stderr", None if what == "none" else broken)
    handler = attached(app, taken)
    taken.fails = lambda data: RuntimeError()
    app.info("x")
    assert handler.failed_count == 1


# --- never recurses --------------------------------------------------------------------------------------------------


def test_what_is_logged_while_a_record_is_written_does_not_come_back(
    taken: StandIn, app: logging.Logger, stderr: Stderr
) -> None:
    class Chatty:
        def __str__(self) -> str:
            app.info("from __str__ %s", self)
            return "chatty"

    other = StandIn()
    handler = attached(app, taken)
    attached(app, other)
    app.info("x", extra={"value": Chatty()})
    taken.after = lambda: app.info("from log()")
    app.info("y")
    assert taken.messages == ["x", "y"]
    assert [record["value"] for record in taken.records if "value" in record] == ["chatty"]
    assert handler.failed_count > 0
    assert "while that was writing another record" in stderr.lines[0]
    taken.after = lambda: None
    app.info("z")
    assert taken.messages == ["x", "y", "z"]


def test_a_stderr_that_logs(taken: StandIn, app: logging.Logger, monkeypatch: Any) -> None:
    class ToLogging:
        def write(self, text: str) -> None:
            app.error(text)

    monkeypatch.setattr(sys, "stderr", ToLogging())
    handler = attached(app, taken)
    taken.fails = lambda data: RuntimeError()
    for _ in range(10):
        app.info("x")
    handler.close()
    assert handler.failed_count >= 10


@pytest.mark.parametrize("module", sorted(log_handler._CLIENT_MODULES))
def test_what_the_client_logs_of_itself_is_left_to_others(taken: StandIn, module: str) -> None:
    handler = KafkaLogHandler(logger=taken)
    for name, wanted in (("keven_core.kafka", 0), ("keven_core", 0), ("keven_core2", 1), ("app", 2)):
        handler.handle(golden_record(name=name, module=module))
        assert len(taken.got) == wanted
    assert handler.failed_count == 0


def test_each_module_that_logs_is_known_here() -> None:
    # A new one has to be named in _CLIENT_MODULES if it logs about producing: its lines would go to Kafka.
    folder = Path(keven_core.kafka.__path__[0])
    logging_ones = {path.stem for path in folder.rglob("*.py") if "logging.getLogger(" in path.read_text()}
    others = {"_session", "_client_events", "_failures", "_topic_setup", "consumer_server", "_supervisor", "_watchdog"}
    others |= {"config", "_redriving", "_around", "details", "large_attributes", "message_runner"}
    assert logging_ones == (log_handler._CLIENT_MODULES - {"logs", "(unknown file)"}) | others
    assert (folder / "logs.py").exists()  # logs librdkafka's lines with the logger that it is given


@pytest.mark.parametrize("module", ["_session", "consumer_server"])
def test_what_a_server_logs_is_written(taken: StandIn, module: str) -> None:
    KafkaLogHandler(logger=taken).handle(golden_record(name="keven_core.kafka", module=module))
    assert len(taken.got) == 1


def test_what_keven_core_logs_while_a_record_is_written_counts_for_nothing(
    taken: StandIn, app: logging.Logger, stderr: Stderr
) -> None:
    # As config.py does, the first time that options are made from settings.
    handler = attached(app, taken)
    client = logging.getLogger("keven_core.kafka")
    client.addHandler(handler)
    taken.after = lambda: client.warning("the brokers' certificates are not checked")
    try:
        app.info("x")
    finally:
        client.removeHandler(handler)
    assert (taken.messages, handler.failed_count, stderr.lines) == (["x"], 0, [])


def test_a_thread_of_the_client_may_log_while_a_record_is_written(taken: StandIn, app: logging.Logger) -> None:
    handler = attached(app, taken)
    client = logging.getLogger("keven_core.kafka")
    client.addHandler(handler)
    finished: list[bool] = []

    def wait_for_the_client() -> None:
        def attend() -> None:
            client.warning("a broker is away")
            app.info("of another thread")

        taken.after = lambda: None
        thread = threading.Thread(target=attend, daemon=True)
        thread.start()
        thread.join(10)
        finished.append(not thread.is_alive())

    taken.after = wait_for_the_client
    try:
        app.info("x")
    finally:
        client.removeHandler(handler)
    assert finished == [True]
    assert sorted(taken.messages) == ["a broker is away", "of another thread", "x"]
    assert handler.failed_count == 0


def test_a_signal_handler_may_log_while_a_record_is_written(taken: StandIn, app: logging.Logger) -> None:
    handler = attached(app, taken)
    before = signal.signal(signal.SIGUSR1, lambda *_: app.info("from the signal handler"))
    try:
        taken.after = lambda: signal.raise_signal(signal.SIGUSR1)
        app.info("x")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (taken.messages, handler.failed_count) == (["x"], 1)


def test_records_are_written_in_an_empty_context(taken: StandIn, app: logging.Logger) -> None:
    # Else they would be messages of the event handler that logs: see HandlerScope.
    scope: contextvars.ContextVar[str] = contextvars.ContextVar("scope", default="none")
    seen: list[str] = []
    taken.after = lambda: seen.append(scope.get())
    attached(app, taken, key=lambda record: scope.get().encode())
    scope.set("handler")
    app.info("x")
    assert seen == ["none"]
    assert taken.got[0][2]["key"] == b"handler"


# --- drops -----------------------------------------------------------------------------------------------------------


class Full(StandIn):
    """Has a queue of so many places; raises, or drops by itself."""

    def __init__(self, room: int, *, drops: bool) -> None:
        super().__init__()
        self.room = room
        self.drops = drops

    def log(self, data: bytes, topic: str | None = None, **options: Any) -> None:
        if len(self.got) < self.room:
            super().log(data, topic, **options)
        elif self.drops:
            self.dropped_count += 1
        else:
            raise QueueFullError("full")


@pytest.mark.parametrize("drops", [False, True])
def test_drops_are_counted_and_told(app: logging.Logger, stderr: Stderr, drops: bool) -> None:
    full = Full(2, drops=drops)
    handler = attached(app, full, fields={"service": "orders"})
    for number in range(7):
        app.info("%d", number)
    assert (full.messages, handler.dropped_count, handler.failed_count) == (["0", "1"], 5, 0)
    full.room = 100
    app.info("7")
    assert full.messages == ["0", "1", "7", "5 log record(s) were dropped: the send queue was full"]
    report = full.records[-1]
    assert (report["level"], report["logger"], report["service"], report["dropped"]) == (
        *("WARNING", "keven_core.log_handler", "orders", 5),
    )
    assert list(report)[:4] == ["time", "level", "logger", "message"]
    app.info("8")
    assert len(full.got) == 5
    assert handler.dropped_count == 5
    [line] = stderr.lines
    assert line.startswith("keven_core.log_handler: 1 log record(s) dropped, 0 failed so far; ")
    assert "full" in line


def test_the_topic_is_told_every_10_seconds_and_at_flush(app: logging.Logger, clock: Clock) -> None:
    full = Full(0, drops=True)
    handler = attached(app, full)

    def drop_one() -> None:
        full.room = 0
        app.info("dropped")
        full.room = 1000
        app.info("taken")

    def told() -> list[int]:
        return [record["dropped"] for record in full.records if "dropped" in record]

    for _ in range(10):
        drop_one()
    assert told() == [1]
    clock.now += 10
    drop_one()
    assert told() == [1, 10]
    drop_one()
    handler.flush()
    assert told() == [1, 10, 1]
    handler.flush()
    assert sum(told()) == handler.dropped_count == 12


@pytest.mark.parametrize("drops", [False, True])
def test_a_report_that_finds_no_room_comes_later(app: logging.Logger, clock: Clock, drops: bool) -> None:
    full = Full(0, drops=drops)
    handler = attached(app, full)
    app.info("dropped")
    full.room = 1
    app.info("taken")  # and no room for the report
    assert full.messages == ["taken"]
    assert handler.dropped_count == 2  # the report is one too
    full.room = 100
    app.info("too soon")
    clock.now += 10
    app.info("later")
    assert full.messages == ["taken", "too soon", "later", "2 log record(s) were dropped: the send queue was full"]


def test_drops_of_a_given_logger_before_the_handler_are_not_counted(app: logging.Logger) -> None:
    full = Full(10, drops=True)
    full.dropped_count = 100
    handler = attached(app, full)
    app.info("x")
    assert handler.dropped_count == 0
    full.dropped_count = 3  # begins anew, as a forked child's may
    app.info("y")
    assert handler.dropped_count == 3


def test_many_threads(app: logging.Logger) -> None:
    full = Full(3000, drops=False)
    handler = attached(app, full)
    barrier = threading.Barrier(8)

    def work(thread: int) -> None:
        barrier.wait()
        for number in range(500):
            app.info("%d/%d", thread, number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    full.room = 10_000
    handler.flush()
    messages = full.messages
    written = [message for message in messages if "/" in message]
    assert len(written) == len(set(written))
    for thread in range(8):
        mine = [int(text.partition("/")[2]) for text in written if text.startswith(f"{thread}/")]
        assert mine == sorted(mine)
    told = sum(record["dropped"] for record in full.records if "dropped" in record)
    assert told == handler.dropped_count
    # The reports that were dropped are counted too.
    assert 4000 - len(written) <= handler.dropped_count <= 4000 - len(written) + 1
    assert handler.failed_count == 0


# --- flush and close -------------------------------------------------------------------------------------------------


def test_flush_waits_for_what_was_written_only(taken: StandIn, app: logging.Logger) -> None:
    handler = attached(app, taken, flush_timeout="2.5")
    handler.flush()
    assert taken.flushed == []
    app.info("x")
    handler.flush()
    [waited] = taken.flushed
    assert waited is not None
    assert 2 < waited <= 2.5
    handler.flush()
    assert len(taken.flushed) == 1


def test_what_flush_finds_refused_is_counted(taken: StandIn, app: logging.Logger, stderr: Stderr) -> None:
    handler = attached(app, taken)
    for _ in range(20):
        app.info("x")
    taken.flush_error = DeliveryError("7 message(s) were not delivered", [("t", "no")], 7)
    handler.flush()
    assert handler.failed_count == 7
    assert stderr.lines == [
        "keven_core.log_handler: 0 log record(s) dropped, 7 failed so far; "
        "DeliveryError: 7 message(s) were not delivered"
    ]


def test_what_is_not_acknowledged_fails_at_close_only(taken: StandIn, app: logging.Logger, stderr: Stderr) -> None:
    handler = attached(app, taken, flush_timeout=1)
    app.info("x")
    taken.flush_error = KafkaTimeoutError("1 message(s) were not acknowledged within 1 s")
    taken.pending_count = 1
    handler.flush()
    assert handler.failed_count == 0
    handler.close()
    assert handler.failed_count == 1
    assert "not acknowledged" in stderr.lines[0]
    assert stderr.lines[-1] == "keven_core.log_handler: 0 log record(s) dropped, 1 failed so far; closed"
    assert len(stderr.lines) == 2
    handler.close()
    assert len(stderr.lines) == 2


@pytest.mark.parametrize("error", [WeirdError(), RuntimeError("x"), QueueFullError("full"), OSError(5, "io")])
def test_flush_and_close_never_raise(taken: StandIn, app: logging.Logger, error: Exception) -> None:
    handler = attached(app, taken)
    app.info("x")
    taken.flush_error = error
    handler.flush()
    app.info("y")
    handler.close()


def test_after_close_records_fail(taken: StandIn, app: logging.Logger, stderr: Stderr) -> None:
    handler = attached(app, taken)
    app.info("x")
    handler.close()
    app.info("y")
    handler.flush()
    handler.close()
    assert (taken.messages, handler.failed_count, taken.closed) == (["x"], 1, 0)
    assert "logged after close()" in stderr.lines[0]
    assert len(taken.flushed) == 1


@pytest.fixture
def made(monkeypatch: Any) -> list[StandIn]:
    """The loggers that handlers make for themselves."""
    found: list[StandIn] = []

    class Made(StandIn):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()
            self.args, self.kwargs = args, kwargs
            found.append(self)

    monkeypatch.setattr(log_handler, "KafkaBatchLogger", Made)
    return found


def test_a_logger_of_its_own_drops_and_is_closed(made: list[Any], app: logging.Logger) -> None:
    handler = KafkaLogHandler("logs", "k1:9092", flush_timeout=3)
    app.addHandler(handler)
    [own] = made
    assert (own.args, own.kwargs) == (("k1:9092", "logs", 3.0), {"on_full": "drop"})
    app.info("x")
    assert own.got[0][1] is None  # its topic is the logger's
    handler.close()
    assert (len(own.flushed), own.closed) == (1, 1)


def test_a_logger_of_its_own_is_not_waited_for_twice(made: list[Any], app: logging.Logger) -> None:
    handler = KafkaLogHandler("logs")
    app.addHandler(handler)
    app.info("x")
    made[0].pending_count = 1
    made[0].flush_error = KafkaTimeoutError("late")
    handler.close()
    assert made[0].closed == 0
    assert handler.failed_count == 1


def test_dict_config(made: list[Any], registered: logging.Logger) -> None:
    config: dict[str, Any] = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(levelname)s: %(message)s"}},
        "handlers": {
            "kafka": {
                "class": "keven_core.kafka.log_handler.KafkaLogHandler",
                "level": "WARNING",
                "topic": "logs",
                "kafka_address": "k1:9092",
                "fields": {"service": "orders", "nested": {"list": [1]}},
                "key": "name",
                "flush_timeout": "1",
            },
            "plain": {"()": KafkaLogHandler, "topic": "plain", "formatter": "plain"},
        },
        "loggers": {"app.registered": {"handlers": ["kafka", "plain"], "level": "INFO", "propagate": False}},
    }
    logging.config.dictConfig(config)
    registered.info("low")
    registered.error("high")
    json_logger, plain_logger = sorted(made, key=lambda found: str(found.args[1]))
    [record] = json_logger.records
    assert (record["message"], record["service"], record["nested"]) == ("high", "orders", {"list": [1]})
    assert json_logger.got[0][2]["key"] == b"app.registered"
    assert [data for data, _, _ in plain_logger.got] == [b"INFO: low", b"ERROR: high"]
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})  # closes those of before
    assert json_logger.closed == plain_logger.closed == 1


def test_dict_config_says_what_is_wrong(made: list[Any]) -> None:
    with pytest.raises(ValueError, match="Unable to configure handler 'kafka'") as caught:
        logging.config.dictConfig(
            {"version": 1, "handlers": {"kafka": {"class": "keven_core.kafka.log_handler.KafkaLogHandler"}}}
        )
    assert isinstance(caught.value.__cause__, UsageError)


def test_handlers_of_logging_may_stand_before_it(taken: StandIn, app: logging.Logger) -> None:
    kafka = KafkaLogHandler(logger=taken)
    memory = logging.handlers.MemoryHandler(100, logging.ERROR, kafka)
    app.addHandler(memory)
    app.info("a")
    assert taken.messages == []
    app.error("b")
    assert taken.messages == ["a", "b"]
    memory.close()


def test_it_is_closed_by_logging_shutdown(taken: StandIn, app: logging.Logger) -> None:
    handler = attached(app, taken)
    app.info("x")
    logging.shutdown([lambda: handler])  # type: ignore[list-item]  # as atexit calls it, for this one only
    assert len(taken.flushed) == 1
    app.info("late")
    assert handler.failed_count == 1


# --- processes -------------------------------------------------------------------------------------------------------


SCRIPT = """
import atexit, json, logging, os, threading
atexit.register(lambda: print("exit"))  # registered first, so called last
from keven_core.kafka.log_handler import KafkaLogHandler

class StandIn:
    dropped_count = pending_count = 0
    def log(self, data, topic=None, **options):
        print(os.getpid() == parent, json.loads(data)["message"], flush=True)
    def flush(self, timeout=None):
        print("flush", flush=True)
        return 0

parent = os.getpid()
handler = KafkaLogHandler(logger=StandIn())
logging.basicConfig(handlers=[handler], level=logging.INFO)
"""


def run_script(code: str) -> subprocess.CompletedProcess[str]:
    result = run_python("-c", SCRIPT + code)
    assert result.returncode == 0, result.stderr
    return result


def test_at_the_end_of_the_process_it_is_flushed_once_and_early() -> None:
    result = run_script("logging.info('x')")
    assert result.stdout.splitlines() == ["True x", "flush", "exit"]
    assert result.stderr == ""


def test_at_the_end_of_the_process_losses_are_said() -> None:
    result = run_script("handler._logger.log = None\nlogging.info('x')\nlogging.info('y')")
    assert result.stdout.splitlines() == ["exit"]
    first, last = result.stderr.splitlines()
    assert "1 failed so far; TypeError" in first
    assert last == "keven_core.log_handler: 0 log record(s) dropped, 2 failed so far; closed"


def test_a_forked_child_goes_on_and_counts_for_itself() -> None:
    code = """
handler.dropped_count, handler.failed_count = 5, 7
held, fork_done = threading.Event(), threading.Event()

def hold():
    with handler._lock:
        held.set()
        fork_done.wait()

thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    logging.info("child")
    assert (handler.dropped_count, handler.failed_count) == (0, 0)
    handler.flush()
    os._exit(0)
fork_done.set()
thread.join()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
handler.dropped_count = handler.failed_count = 0
logging.info("parent")
"""
    result = run_script(code)
    assert result.stdout.splitlines() == ["False child", "flush", "True parent", "flush", "exit"]
    assert result.stderr == ""


def test_importing_and_making_one_loads_neither_librdkafka_nor_structlog() -> None:
    code = (
        "import sys\n"
        "from keven_core.kafka.log_handler import KafkaLogHandler, KafkaLogProcessor\n"
        "KafkaLogHandler('t'); KafkaLogProcessor('t')\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('confluent_kafka', 'structlog')])\n"
    )
    result = run_python("-c", code)
    assert (result.stdout, result.stderr) == ("[]\n", "")


# --- structlog -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _structlog_as_before() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def chain(processor: Any, *before: Any, renderer: Any = None) -> tuple[Any, structlog.testing.CapturingLogger]:
    """A logger of structlog, and what comes out of its chain."""
    out = structlog.testing.CapturingLogger()
    wrapped = structlog.wrap_logger(
        out,
        processors=[*before, processor, renderer or structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(0),
    )
    return wrapped, out


def test_the_bytes_of_an_event(taken: StandIn, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 4711)
    processor = KafkaLogProcessor(logger=taken, fields={"service": "orders"})
    event = {
        "order": 7,
        "event": "placed",
        "level": "warning",
        "logger": "app.orders",
        "timestamp": "2024-05-01T12:30:00.000001Z",
        "thread": 5,
    }
    before = dict(event)
    assert processor(None, "warning", event) is event
    assert event == before
    [(data, topic, options)] = taken.got
    assert data == (
        b'{"time":"2024-05-01T12:30:00.000001Z","level":"WARNING","logger":"app.orders","message":"placed",'
        b'"process":4711,"thread":"MainThread","service":"orders","order":7,"extra_thread":5}'
    )
    assert topic is None
    assert options == {"key": None, "timestamp_ms": 1_714_566_600_000}


def test_in_a_chain_of_structlog(taken: StandIn) -> None:
    log, out = chain(
        KafkaLogProcessor("logs", logger=taken, key="customer"),
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    )
    structlog.contextvars.bind_contextvars(request="r1")
    log.bind(customer="Ada").warning("placed", order=7)
    [call] = out.calls
    passed = json.loads(call.args[0])
    assert set(passed) == {"request", "customer", "order", "event", "level", "timestamp"}
    [record] = taken.records
    assert record["time"] == passed["timestamp"]
    assert (record["level"], record["logger"], record["message"]) == ("WARNING", "", "placed")
    assert (record["request"], record["customer"], record["order"]) == ("r1", "Ada", 7)
    assert not {"timestamp", "event"} & set(record)
    assert taken.got[0][1:] == ("logs", {"key": b"Ada", "timestamp_ms": taken.got[0][2]["timestamp_ms"]})


@pytest.mark.parametrize(
    ("method", "level"),
    [
        *(("debug", "DEBUG"), ("info", "INFO"), ("warning", "WARNING"), ("warn", "WARNING"), ("error", "ERROR")),
        *(("exception", "ERROR"), ("critical", "CRITICAL"), ("fatal", "CRITICAL"), ("msg", "INFO")),
    ],
)
def test_the_level_is_the_methods_name(taken: StandIn, method: str, level: str) -> None:
    KafkaLogProcessor(logger=taken)(None, method, {"event": "x"})
    assert taken.records[0]["level"] == level


@pytest.mark.parametrize(
    ("stamp", "time"),
    [
        ("2024-05-01T14:30:00.000001+02:00", "2024-05-01T12:30:00.000001Z"),
        (CREATED, "2024-05-01T12:30:00.000001Z"),
        (1_714_566_600, "2024-05-01T12:30:00.000000Z"),
        ("2024-05-01T14:30:00", None),
        ("12:30", None),
        (float("nan"), None),
        (1e300, None),
        ({"a": 1}, None),
    ],
)
def test_a_timestamp_that_says_which_moment_it_means(taken: StandIn, stamp: Any, time: str | None) -> None:
    KafkaLogProcessor(logger=taken)(None, "info", {"event": "x", "timestamp": stamp})
    [record] = taken.records
    if time is not None:
        assert record["time"] == time
        assert "timestamp" not in record
    else:
        assert record["time"] > "2025"
        assert "timestamp" in record


def test_exceptions_of_structlog(taken: StandIn) -> None:
    log, _ = chain(KafkaLogProcessor(logger=taken))
    rendering, _ = chain(
        KafkaLogProcessor(logger=taken),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    )
    as_dicts, _ = chain(KafkaLogProcessor(logger=taken), structlog.processors.dict_tracebacks)
    try:
        raise KeyError("a")
    except KeyError as error:
        log.exception("in hand")
        log.error("given", exc_info=error)
        rendering.exception("rendered", stack_info=True)
        as_dicts.exception("dicts")
    log.error("none", exc_info=True)
    in_hand, given, rendered, dicts, none = taken.records
    for record in (in_hand, given, rendered):
        assert record["exception"].startswith("Traceback (most recent call last):\n")
        assert record["exception"].endswith("KeyError: 'a'")
        assert "exc_info" not in record
    assert rendered["stack"].startswith("Stack (most recent call last):\n")
    assert dicts["exception"][0]["exc_type"] == "KeyError"
    assert "exception" not in none


def test_names_of_the_call_site_become_ours(taken: StandIn) -> None:
    site = structlog.processors.CallsiteParameter
    wanted = {
        *(site.MODULE, site.FUNC_NAME, site.LINENO, site.FILENAME),
        *(site.PROCESS, site.THREAD, site.THREAD_NAME),
    }
    log, _ = chain(KafkaLogProcessor(logger=taken), structlog.processors.CallsiteParameterAdder(wanted))
    log.info("x")
    [record] = taken.records
    assert (record["module"], record["function"], record["process"], record["thread"]) == (
        *("test_log_handler", "test_names_of_the_call_site_become_ours", os.getpid(), "MainThread"),
    )
    assert isinstance(record["line"], int)
    assert record["extra_thread"] == threading.get_ident()
    assert record["filename"] == "test_log_handler.py"


def test_a_renamed_event_is_the_message(taken: StandIn) -> None:
    log, _ = chain(KafkaLogProcessor(logger=taken), structlog.processors.EventRenamer("message", "_event"))
    log.info("x")
    assert taken.messages == ["x"]


def test_behind_the_renderer_it_writes_what_was_rendered(taken: StandIn) -> None:
    out = structlog.testing.CapturingLogger()
    log = structlog.wrap_logger(
        out, processors=[structlog.processors.JSONRenderer(sort_keys=True), KafkaLogProcessor(logger=taken)]
    )
    log.info("x", a=1)
    assert [data for data, _, _ in taken.got] == [b'{"a": 1, "event": "x"}']
    assert out.calls[0].args == ('{"a": 1, "event": "x"}',)


def test_in_a_processor_formatter(taken: StandIn, registered: logging.Logger) -> None:
    # structlog's events and logging's records on one way, which ends in a stream and in Kafka.
    stream = io.StringIO()
    processor = KafkaLogProcessor(logger=taken)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_log_level, structlog.stdlib.ExtraAdder()],
            processors=[
                processor,
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    registered.addHandler(handler)
    structlog.configure(
        processors=[structlog.stdlib.add_log_level, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    structlog.get_logger("app.registered").warning("by structlog", order=7)
    registered.info("by %s", "logging", extra={"order": 8})
    try:
        raise KeyError("a")
    except KeyError:
        registered.exception("failed")
    client = logging.getLogger("keven_core.kafka")
    client.addHandler(handler)
    before = len(stream.getvalue().splitlines())
    handler.handle(golden_record(name="keven_core.kafka", module="_producers"))
    client.removeHandler(handler)
    assert len(stream.getvalue().splitlines()) == before + 1  # the others see it
    handler.handle(golden_record(threadName="of a queue"))
    first, second, third, fourth = taken.records
    assert (fourth["process"], fourth["thread"], fourth["time"]) == (4711, "of a queue", "2024-05-01T12:30:00.000001Z")
    assert (first["level"], first["logger"], first["message"], first["order"]) == (
        *("WARNING", "app.registered", "by structlog", 7),
    )
    assert (second["level"], second["logger"], second["message"], second["order"]) == (
        *("INFO", "app.registered", "by logging", 8),
    )
    assert (second["module"], second["function"]) == ("test_log_handler", "test_in_a_processor_formatter")
    assert third["exception"].endswith("KeyError: 'a'")
    assert not any(name.startswith("_") for record in taken.records for name in record)
    assert processor.failed_count == 0


def test_a_processor_formatter_may_be_the_formatter_of_the_handler(taken: StandIn, app: logging.Logger) -> None:
    handler = attached(app, taken)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ]
        )
    )
    app.info("x %d", 1)
    assert taken.got[0][0] == b'{"event": "x 1"}'


def test_a_processor_never_raises_and_tells_drops(stderr: Stderr) -> None:
    full = Full(0, drops=True)
    processor = KafkaLogProcessor(logger=full, key=lambda event: event["customer"])
    log, out = chain(processor, renderer=lambda logger, method, event: "rendered")
    log.info("dropped", customer=b"Ada")
    full.room = 100
    log.info("no key")
    log.info(Broken(), customer=b"Ada", broken=Broken(), level=Broken())
    assert len(out.calls) == 3
    assert (processor.dropped_count, processor.failed_count) == (1, 1)
    event, report = full.records
    assert event["message"] == event["broken"] == "<Broken, whose __str__ raised ValueError>"
    assert (report["logger"], report["dropped"]) == ("keven_core.log_handler", 1)
    for odd in (None, 5, [], ("args", {}), b"x", "text"):
        assert processor(None, "info", odd) is odd
    processor.close()
    log.info("after", customer=b"Ada")
    assert processor.failed_count > 1
    assert re.search(
        r"keven_core.log_handler: 1 log record\(s\) dropped, \d failed so far; closed", "\n".join(stderr.lines)
    )
