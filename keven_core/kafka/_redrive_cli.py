"""`python -m keven_core redrive`, or `python -m keven_core.kafka.redrive`: the command line of Redrive."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import threading
from datetime import datetime

from keven_core.kafka.errors import KevenError, RedriveError
from keven_core.kafka.redrive import Redrive, RedriveReport

__all__ = ["main"]

_DONE, _FAILED, _LEFT, _STOPPED = 0, 1, 3, 130  # 2 is argparse's


def main(arguments: list[str] | None = None, prog: str = "python -m keven_core.kafka.redrive") -> int:
    """Run the command line; return the exit code: 0 done, 1 failed, 3 some letters were left, 130 stopped before."""
    options = vars(_parser(prog).parse_args(arguments))
    as_json, address = options.pop("json"), options.pop("kafka")
    for module in options.pop("modules"):
        importlib.import_module(module)
    stop = threading.Event()

    def end_in_order(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)  # the second one ends it at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_in_order)
    try:
        report = Redrive(**options).run(kafka_address=address, stop=stop)
    except KevenError as error:
        if isinstance(error, RedriveError):
            _print(error.report, as_json)
        print(f"error: {error}", file=sys.stderr)
        return _FAILED
    _print(report, as_json)
    if not report.complete:
        return _STOPPED
    return _LEFT if report.left else _DONE


def _print(report: RedriveReport, as_json: bool) -> None:
    print(json.dumps(report.as_dict()) if as_json else report)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Copy dead letters back to the topics that they came from, or to another one. The letters stay.",
        epilog="Connects as every service does: KAFKA, KEVEN_SECURITY_PROTOCOL, ... Exit codes: 0 done, 1 failed, "
        "2 wrong arguments, 3 some letters matched and could not go anywhere, 130 stopped by Ctrl-C or SIGTERM.",
    )
    parser.add_argument("dead_letter_topic", help="kafka_server.<client id>.dead")
    parser.add_argument("--dry-run", action="store_true", help="write and commit nothing, only report")
    parser.add_argument("--to", dest="to_topic", metavar="TOPIC", help="default: back to where each came from")
    parser.add_argument(
        "--parking", dest="parking_topic", metavar="TOPIC", help="where letters go that have come back too often"
    )
    parser.add_argument("--max-redrives", type=int, default=3, metavar="N", help="how often is that (%(default)s)")
    parser.add_argument("--rate", type=float, metavar="N", help="copies a second at most")
    parser.add_argument("--from-beginning", action="store_true", help="read again what the group has dealt with")
    parser.add_argument("--group", dest="group_id", default="", metavar="NAME", help="keeps what was dealt with")
    filters = parser.add_argument_group("filters", "a letter has to match all that are given; + can be repeated")
    for name, dest, help_text in (
        ("--origin", "origin_topics", "topic that it came from +"),
        ("--event", "event_names", "event name +"),
        ("--exception", "exceptions", "class of the exception or its cause, with its module or without +"),
        ("--key", "keys", "key of the record +"),
    ):
        filters.add_argument(name, dest=dest, action="append", default=[], metavar=name[2:].upper(), help=help_text)
    filters.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="imported first: one that registers the codec which --event needs to tell the names +",
    )
    filters.add_argument("--text", default="", help="part of the exception's text")
    filters.add_argument("--since", type=_time, metavar="TIME", help="first written then or later, ISO 8601")
    filters.add_argument("--until", type=_time, metavar="TIME", help="first written before then")
    parser.add_argument("--kafka", metavar="HOST:PORT", help="the brokers, where KAFKA is not set")
    parser.add_argument("--json", action="store_true", help="the report as one line of JSON")
    return parser


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))  # Z: Python 3.10 does not know it
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time: 2026-01-31T12:00:00+00:00, or 2026-01-31 for midnight"
        ) from None
