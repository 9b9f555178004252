"""What holds for every test: the compiled modules are the ones under test, and no thread's exception goes unnoticed."""

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))

from builds import compiled_modules, wrong_builds


def pytest_configure(config: pytest.Config) -> None:
    # Brokers live for seconds here: compiling their code well takes longer than it saves. Without the second compiler
    # a broker takes 4 s of processor time until it answers instead of 6.5 s (Java 17).
    os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1")
    # An exception that nobody could catch, in a thread or in __dealloc__, fails the test that it happened in.
    config.addinivalue_line("filterwarnings", "error::pytest.PytestUnhandledThreadExceptionWarning")
    config.addinivalue_line("filterwarnings", "error::pytest.PytestUnraisableExceptionWarning")
    # The plugin comes with the installed package; without an installation it is taken from the source tree.
    if not config.pluginmanager.hasplugin("keven_core"):
        config.pluginmanager.import_plugin("keven_core.testing.pytest_plugin")


def pytest_sessionstart(session: pytest.Session) -> None:
    # What a script has put into the background with "&" starts with SIGINT ignored, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        problems = wrong_builds(compiled_modules(), os.environ.get("KEVEN_EXPECTED_BUILD"))
    except ImportError as error:
        problems = [str(error)]
    if problems:
        raise pytest.UsageError("the compiled modules are not the ones under test:\n" + "\n".join(problems))
