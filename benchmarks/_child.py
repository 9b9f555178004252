"""One round of one contestant, in a process of its own: `python -m benchmarks._child '{"target": "module:function"}'`.

Prints the result as one line of JSON. Nothing is imported here that the contestant does not need, since its memory is
measured.
"""

import importlib
import json
import sys


def main() -> None:
    spec = json.loads(sys.argv[1])
    module, _, function = spec["target"].partition(":")
    result = getattr(importlib.import_module(module), function)(spec)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
