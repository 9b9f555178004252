"""`python -m keven_core COMMAND ...`: the commands for services."""

from __future__ import annotations

import importlib
import sys

__all__ = ["main"]

# Each is a module with main(arguments, prog), which returns the exit code.
COMMANDS = {
    "schema": ("keven_core.kafka.schema.cli", "are events and handlers compatible with those that were released?"),
    "redrive": ("keven_core.kafka._redrive_cli", "copy dead letters back to where they came from"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first argument names; return its exit code, 2 when there is no such command."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in COMMANDS:
        module = importlib.import_module(COMMANDS[given[0]][0])
        return int(module.main(given[1:], prog=f"python -m keven_core {given[0]}"))
    lines = ["usage: python -m keven_core COMMAND ...", ""]
    lines += [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    asked = given in (["-h"], ["--help"])
    if given and not asked:
        lines.append(f"\nerror: {given[0]!r} is not a command; allowed are {', '.join(COMMANDS)}")
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
