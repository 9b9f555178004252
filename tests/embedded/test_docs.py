"""The examples of the documentation run as they stand there, in order, one script per document."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
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


def test_schema_page_runs(tmp_path):
    shop, in_code = (code for _, code in python_blocks("docs/schema.md"))
    (tmp_path / "shop.py").write_text(shop)
    page = (ROOT / "docs" / "schema.md").read_text()
    commands = re.findall(r"^    python -m (keven_core .*)$", page, re.M)
    assert len(commands) == 4
    printed = {command.split()[2]: module(command, tmp_path) for command in commands}
    assert printed["show"].startswith("event ORDER_PLACED, topic keven_events_order_placed, key order_id\n")
    assert printed["check"] == "schema/keven.json, backward: 0 breaking, 0 compatible\n"
    assert json.loads(printed["asyncapi"])["info"] == {"title": "shop", "version": "1.2.3"}
    (tmp_path / "in_code.py").write_text(in_code)
    assert module("in_code", tmp_path) == "keven.json, full: 0 breaking, 0 compatible\n"
    changed = shop.replace("order_id: int\n", "order_id: str\n    note: str = ''\n")
    (tmp_path / "shop.py").write_text(changed)
    (report,) = re.findall(r"^    (schema/keven.json, .*\n(?:      .*\n)+)", page, re.M)
    assert module(commands[2], tmp_path, code=1) == textwrap.dedent("    " + report)
    (test,) = re.findall(r"^    (import shop\n(?:\n|    .*\n)+)", page, re.M)
    (tmp_path / "test_shop.py").write_text(textwrap.dedent("    " + test))
    for source, code in ((changed, 1), (shop, 0)):
        (tmp_path / "shop.py").write_text(source)
        out = module("pytest -q -p no:cacheprovider test_shop.py", tmp_path, code=code)
        assert ("BREAKING    event ORDER_PLACED.order_id: integer became string" in out) == (code == 1)


def module(command: str, folder: Path, code: int = 0) -> str:
    """What `python -m command` prints, in a folder of its own; it has to exit with that code."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # a module that changes twice in one second
    arguments = [sys.executable, "-m", *command.split()]
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def generated_envelope(folder: Path) -> None:
    """What protoc would have generated."""
    (folder / "shop_pb2.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests' / 'support')!r})\n"
        "from envelopes import envelope_class\nEnvelope = envelope_class()\n"
    )


def test_codec_examples_run(embedded_kafka, tmp_path):
    embedded_kafka.create_topic("keven_events_order_placed", 1)
    generated_envelope(tmp_path)
    environment = {
        **os.environ,
        "KAFKA": embedded_kafka.bootstrap_servers,
        "KEVEN_CREATE_TOPICS": "false",
    }
    shown = run(tmp_path / "codecs.py", "\n".join(code for _, code in python_blocks("docs/codecs.md")), environment)
    assert shown.splitlines() == [
        "1 of Ada, by old",
        "2 of Bob, by new",
        """b'{"order_id":3,"customer":""}'""",
        """b'ORDER_PLACED|u-4|{"order_id":4,"customer":""}'""",
    ]
    assert (values(embedded_kafka, "keven_events_order_placed")[2] or b"").startswith(b"\n\x0cORDER_PLACED")


def test_publishing_examples_run(embedded_kafka, tmp_path):
    for topic in ("keven_events_order_paid", "keven_commands_send_receipt"):
        embedded_kafka.create_topic(topic)
    environment = {**os.environ, "KAFKA": embedded_kafka.bootstrap_servers, "KEVEN_CREATE_TOPICS": "false"}
    blocks = python_blocks("docs/publishing.md")
    assert len(blocks) == 2
    said = run(tmp_path / "publishing.py", "\n".join(code for _, code in blocks), environment)
    assert "1 sent by the relay" in said
    assert len(values(embedded_kafka, "keven_events_order_paid")) == 4
    assert len(values(embedded_kafka, "keven_commands_send_receipt")) == 1


def test_old_style_examples_run(tmp_path):
    blocks = python_blocks("docs/old-style.md")
    assert len(blocks) >= 4
    run(tmp_path / "old_style.py", "\n".join(code for _, code in blocks), dict(os.environ))


def test_migration_examples_run(tmp_path):
    generated_envelope(tmp_path)
    blocks = python_blocks("docs/migration.md")
    assert len(blocks) == 2
    run(tmp_path / "migration.py", "\n".join(code for _, code in blocks), dict(os.environ))


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
