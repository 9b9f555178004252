"""The examples of the documentation run as they stand there, in order, one script per document."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from embedded_support import values

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(<!-- runs until stopped -->\n)?```python\n(.*?)```", re.S)


def python_blocks(document: str) -> list[tuple[bool, str]]:
    """(runs until stopped, code) of each Python block."""
    return [(bool(marker), code) for marker, code in BLOCK.findall((ROOT / document).read_text())]


def test_readme_examples_run(embedded_kafka, tmp_path):
    # The server example blocks until it is stopped, so the blocks before it and after it are scripts of their own.
    blocks = python_blocks("README.md")
    definitions = blocks[0][1]
    assert len(blocks) >= 8
    assert sum(stopped for stopped, _ in blocks) == 1
    for topic in (
        "keven_events",
        "keven_events_order_placed",
        "prices.v1",
        "kafka_server.my_event_server.dead",
        "telemetry",
        "audit_trail",
        "service_logs",
    ):
        embedded_kafka.create_topic(topic, 2)
    environment = {
        **os.environ,
        "KAFKA": embedded_kafka.bootstrap_servers,
        "KEVEN_CREATE_TOPICS": "false",
        "PYTHONUNBUFFERED": "1",
    }
    until_the_server = "\n".join(code for stopped, code in blocks[1:3])
    run(tmp_path / "publish.py", definitions + until_the_server, environment)
    served = run_until_lines(tmp_path / "serve.py", definitions + blocks[3][1], environment, wanted=100)
    assert {f"order {number} of Ada" for number in range(100)} == set(served)
    replayed = run(tmp_path / "replay.py", definitions + "\n".join(code for _, code in blocks[4:]), environment)
    assert "100 handled" in replayed
    assert "1000 acknowledged" in replayed
    assert "kafka_server.my_event_server.dead, group keven-redrive" in replayed
    assert values(embedded_kafka, "audit_trail") == [b'{"user":"ada","did":"log in"}']
    [line] = values(embedded_kafka, "service_logs")
    assert b'"message":"started"' in (line or b"")


def run(script: Path, code: str, environment: dict[str, str]) -> str:
    script.write_text(code)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_until_lines(script: Path, code: str, environment: dict[str, str], wanted: int) -> list[str]:
    """Run a script until it has printed that many lines, then stop it as an operator would; it has to end with 0."""
    script.write_text(code)
    process = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True)
    killer = threading.Timer(60, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        lines = [line.strip() for line in itertools.islice(process.stdout, wanted)]
        assert len(lines) == wanted, lines[-5:]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        return lines
    finally:
        killer.cancel()
        if process.poll() is None:
            process.kill()
        process.stdout.close()
        process.wait()
