"""`python -m keven_core schema`: the command line of keven_core.kafka.schema."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from typing import Any

from keven_core.kafka.errors import KevenError
from keven_core.kafka.schema.asyncapi import asyncapi_document
from keven_core.kafka.schema.changes import BACKWARD, DIRECTIONS, spell
from keven_core.kafka.schema.files import DEFAULT_PATH, check, update
from keven_core.kafka.schema.snapshot import take_snapshot

__all__ = ["main"]

_FINE, _BREAKING, _USAGE = 0, 1, 2


def main(arguments: list[str] | None = None, prog: str = "python -m keven_core schema") -> int:
    """Run the command line; return the exit code: 0 fine, 1 something breaks, 2 wrong arguments, modules or files."""
    options = _parser(prog).parse_args(arguments)
    try:
        for module in options.modules:
            _import(module)
        code: int = options.run(options)
        return code
    except KevenError as error:
        print(f"error: {error}", file=sys.stderr)
        return _USAGE


class _NotImported(KevenError):
    """A module that was named can't be imported."""


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:
        raise _NotImported(
            f"{module} can't be imported: {type(error).__name__}: {error}; name modules as `import` does, from the "
            f"folder that they are found in"
        ) from error


def _check(options: argparse.Namespace) -> int:
    report = check(options.file, options.direction)
    print(report)
    if report.breaking:
        print("if that is meant: `update --allow-breaking` takes it for the new state", file=sys.stderr)
        return _BREAKING
    if options.up_to_date and not report.is_current:
        print("not up to date: `update` writes it", file=sys.stderr)
        return _BREAKING
    return _FINE


def _update(options: argparse.Namespace) -> int:
    report = update(options.file, options.direction, allow_breaking=options.allow_breaking)
    print(report)
    if report.breaking and not options.allow_breaking:
        print("nothing was written; if that is meant: --allow-breaking", file=sys.stderr)
        return _BREAKING
    return _FINE


def _show(options: argparse.Namespace) -> int:
    snapshot = take_snapshot()
    for section in sorted(snapshot.keys() - {"format", "types"}):
        for name, entry in snapshot[section].items():
            print("\n".join(_lines(section.removesuffix("s"), name, entry, snapshot["types"])))
    return _FINE


def _lines(noun: str, name: str, entry: dict[str, Any], types: dict[str, Any]) -> list[str]:
    place = [] if entry["topic"] == name else [f"topic {entry['topic']}"]
    place += [f"key {entry['key_field']}"] if entry["key_field"] else []
    lines = [", ".join([f"{noun} {name}", *place])]
    node = types.get(entry["schema"].get("$ref", "").rpartition("/")[2], entry["schema"])
    for field, schema in node.get("properties", {"value": entry["schema"]}).items():
        default = f" = {json.dumps(schema['default'], ensure_ascii=False)}" if "default" in schema else ""
        optional = "" if default or field in node.get("required", [field]) else " = ..."
        lines.append(f"  {field}: {spell(schema, types)}{default}{optional}")
    return lines + [f"  handled by {handler}" for handler in entry["handlers"]]


def _asyncapi(options: argparse.Namespace) -> int:
    print(json.dumps(asyncapi_document(options.title or options.modules[0], options.service_version), indent=2))
    return _FINE


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Compares registered events and handlers with a committed snapshot of them.",
        epilog="Exit codes: 0 fine, 1 something breaks, 2 wrong arguments, modules or files.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help_text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help_text, description=help_text)
        added.add_argument("modules", nargs="+", metavar="MODULE", help="imported, so that it registers")
        added.set_defaults(run=run)
        return added

    checking = command("check", _check, "fail if something breaks; old golden bytes have to be decoded")
    checking.add_argument("--up-to-date", action="store_true", help="fail also if `update` would change the files")
    updating = command("update", _update, "write the snapshot and add golden bytes, unless something breaks")
    updating.add_argument("--allow-breaking", action="store_true", help="write it all the same")
    for one in (checking, updating):
        one.add_argument("--file", default=DEFAULT_PATH, metavar="PATH", help="the snapshot (%(default)s)")
        one.add_argument(
            "--direction",
            choices=DIRECTIONS,
            default=BACKWARD,
            help="backward: new classes read old records; forward: old classes read new ones (%(default)s)",
        )
    command("show", _show, "print what is registered")
    document = command("asyncapi", _asyncapi, "print an AsyncAPI 3 document of what is registered")
    document.add_argument("--title", metavar="TEXT", help="the service's name; default: the first module's")
    document.add_argument("--service-version", default="unversioned", metavar="TEXT", help="(%(default)s)")
    return parser
