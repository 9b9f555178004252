"""Which build of the compiled modules the tests run on."""

import importlib
import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def compiled_modules() -> list[ModuleType]:
    """Every module that src_cython/ has a source for, imported."""
    names = sorted(source.stem for source in (ROOT / "src_cython/keven_core/_native").glob("*.pyx"))
    return [importlib.import_module(f"keven_core._native.{name}") for name in names]


def wrong_builds(modules: list[ModuleType], expected_folder: str | None) -> list[str]:
    """What is wrong with where the modules come from, one line each.

    `expected_folder` is the build folder that KEVEN_EXPECTED_BUILD names (see tools/with-build); None: any.
    """
    found = []
    for module in modules:
        file = module.__file__ or "nowhere"
        if not file.endswith(tuple(EXTENSION_SUFFIXES)):
            found.append(f"{module.__name__} is not a compiled module: {file}")
        elif expected_folder and not Path(file).resolve().is_relative_to(Path(expected_folder).resolve()):
            found.append(f"{module.__name__} comes from {file}, not from {expected_folder}")
    return found


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a child process that imports the same build of keven_core as this one."""
    ahead = [folder for folder in (os.environ.get("KEVEN_EXPECTED_BUILD"), str(ROOT)) if folder]
    path = [*ahead, str(ROOT / "tests/support"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **changes}


def run_python(
    *arguments: str, cwd: Path | None = None, timeout_s: float = 60, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python in a child process, with the same build of keven_core.

    Not in the working folder, which `python -c` and `-m` put before everything else.
    """
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", *arguments],
        cwd=cwd or ROOT / "tests/support",
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=child_environment(),
        input=stdin,
    )
