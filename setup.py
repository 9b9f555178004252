"""Builds the compiled modules of keven_core._native.

The project's data stands in pyproject.toml. Switches, all read from the environment:

KEVEN_DEBUG=1      -O0 -g and Cython's bounds and None checks
KEVEN_ANNOTATE=1   an HTML report of each compiled module beside its source (yellow: talks to Python)
KEVEN_COVERAGE=1   line tracing, for coverage of the .pyx files
KEVEN_SANITIZE=    address: AddressSanitizer and UndefinedBehaviorSanitizer (`make asan`); thread: ThreadSanitizer
                   (`make tsan`)
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

SOURCES = Path("src_cython")


def switched_on(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1", ""):
        raise SystemExit(f"{name}={value!r} is not a switch: set it to 1 or leave it out")
    return value == "1"


SANITIZERS = {
    "": [],
    # Cython calls functions through casted pointers by design: -fsanitize=function would only report those.
    "address": ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread", "-fno-omit-frame-pointer"],
}

debug = switched_on("KEVEN_DEBUG")
sanitizer = os.environ.get("KEVEN_SANITIZE", "")
if sanitizer not in SANITIZERS:
    raise SystemExit(f"KEVEN_SANITIZE={sanitizer!r} is not known: set it to address or thread, or leave it out")
coverage = switched_on("KEVEN_COVERAGE")

compile_args = ["-O0", "-g", "-UNDEBUG"] if debug or sanitizer else ["-O3", "-g1"]
compile_args += SANITIZERS[sanitizer]
macros = [("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1")] if coverage else []

extensions = [
    Extension(
        ".".join(source.relative_to(SOURCES).with_suffix("").parts),
        [str(source)],
        extra_compile_args=compile_args,
        extra_link_args=SANITIZERS[sanitizer],
        define_macros=macros,
    )
    for source in sorted(SOURCES.glob("keven_core/_native/*.pyx"))
]

setup(
    ext_modules=cythonize(
        extensions,
        include_path=[str(SOURCES)],
        # Cython does not see that directives have changed, so each kind of build has generated files of its own.
        build_dir="build/cython" + "-debug" * debug + "-coverage" * coverage,
        annotate=switched_on("KEVEN_ANNOTATE"),
        compiler_directives={
            "language_level": 3,
            "binding": True,
            # Checked in every build: it costs the hot loop nothing, which walks C arrays, and tuples come from callers.
            "boundscheck": True,
            "wraparound": False,
            "nonecheck": debug,
            "initializedcheck": debug,
            "linetrace": coverage,
        },
    ),
)
