"""start_events_receiver_process on real Kafka: the handle, how the main script is found, and what ends with what."""

import os
import signal
import subprocess
from typing import Any

import psutil
import pytest
from real_services import Service, Services, send, wait_until
from waiting import is_gone

pytestmark = pytest.mark.real_kafka

HANDLER = """
import os, sys
from keven_core.kafka import event_handler
from keven_core.kafka.events.server import start_events_receiver_process

topic = sys.argv[1]

@event_handler("LOAD")
def handle(event):
    print(f"handled {event.id} in {os.getpid()}", flush=True)
"""

START = """
process = start_events_receiver_process(server_name=topic, topics=[topic])
print(f"pid {process.pid}", flush=True)
"""


def load(kafka: Any, topic: str, *numbers: int) -> None:
    send(kafka.bootstrap_servers, topic, [b'{"event_name":"LOAD","id":%d}' % number for number in numbers])


def worker_pid(service: Service) -> int:
    service.wait_for(lambda: "pid " in service.out and service.out.count("\n") > 0, "the process is started")
    return int(next(line for line in service.out.splitlines() if line.startswith("pid ")).split()[1])


def test_the_handle(kafka: Any, services: Services, topic: str) -> None:
    load(kafka, topic, 1)
    service = services.run_script(
        "script",
        HANDLER
        + START
        + """
assert process.is_alive() and process.exitcode is None, process
process.join(0.2)
assert process.is_alive() and process.exitcode is None, process
sys.stdin.readline()
process.terminate()
process.join(30)
print("ended", process.exitcode, process.is_alive(), flush=True)
process.join()

second = start_events_receiver_process(server_name=topic, topics=[topic])
sys.stdin.readline()
second.kill()
second.join()
print("killed", second.exitcode, second.is_alive(), flush=True)

third = start_events_receiver_process(server_name=topic, topics=["not a topic"])
third.join()
print("failed", third.exitcode, third.is_alive(), flush=True)
""",
        topic,
        stdin=subprocess.PIPE,
    )
    pid = worker_pid(service)
    service.wait_for(lambda: f"handled 1 in {pid}" in service.out, "the worker handles")
    service.type("go on")
    service.wait_for(lambda: "ended 0 False" in service.out, "an end in order has exit code 0")
    load(kafka, topic, 2)
    service.wait_for(lambda: "handled 2 in" in service.out, "the second worker handles")
    service.type("go on")
    service.wait_for(lambda: f"killed {-signal.SIGKILL} False" in service.out, "a killed one has not")
    service.wait_for(lambda: "failed 1 False" in service.out, "nor has one that failed")
    assert "ConfigurationError: 'not a topic' is not a topic name" in service.err
    assert service.wait() == 0, service.tail()
    assert service.out.count("handled 1 in") == 1


@pytest.mark.parametrize(
    ("arguments", "path"),
    [(["-m", "shop.service"], "shop/service.py"), (["-m", "shop"], "shop/__main__.py"), (["shop"], "shop/__main__.py")],
    ids=["module", "package", "folder"],
)
def test_other_ways_to_run_a_script(
    kafka: Any, services: Services, topic: str, arguments: list[str], path: str
) -> None:
    load(kafka, topic, 1)
    services.script("shop/__init__.py", "")
    services.script("shop/names.py", "LOAD = 'LOAD'\n")
    names = "from .names import LOAD" if "-m" in arguments else "from names import LOAD"
    text = HANDLER.replace('"LOAD"', "LOAD").replace("import os, sys", f"import os, sys\n{names}")
    services.script(path, text + START + "process.join()\n")
    service = services.run("run", *arguments, topic)
    pid = worker_pid(service)
    service.wait_for(lambda: f"handled 1 in {pid}" in service.out, "the worker handles")
    os.kill(pid, signal.SIGTERM)
    assert service.wait() == 0, service.tail()


@pytest.mark.parametrize("how", ["-c", "-"], ids=["command", "stdin"])
def test_without_a_script_there_is_a_clear_error(services: Services, topic: str, how: str) -> None:
    text = HANDLER + START
    if how == "-c":
        service = services.run("command", "-c", text, topic)
    else:
        script = services.script("typed.py", text)
        with script.open("rb") as stdin:
            service = services.run("stdin", "-", topic, stdin=stdin)
    assert service.wait() == 1, service.tail()
    last = service.err.strip().splitlines()[-1]
    assert last.startswith("keven_core.kafka.errors.LaunchError: ")
    assert "put the handlers and the call into a file" in last
    assert "handled" not in service.out


NOTHING = ""
FORKED_CHILD = """
if os.fork() == 0:
    os.execv("/bin/sleep", ["sleep", "20"])
"""
FORKED_WITHOUT_EXEC = """
import time
if os.fork() == 0:
    time.sleep(20)
    os._exit(0)
"""


@pytest.mark.parametrize("also", [NOTHING, FORKED_CHILD, FORKED_WITHOUT_EXEC], ids=["alone", "exec", "fork"])
def test_kill_9_of_the_parent_ends_the_worker(kafka: Any, services: Services, topic: str, also: str) -> None:
    load(kafka, topic, 1)
    service = services.run_script("script", HANDLER + START + also + "process.join()\n", topic)
    pid = worker_pid(service)
    service.wait_for(lambda: f"handled 1 in {pid}" in service.out, "the worker handles")
    children = psutil.Process(service.pid).children()
    service.kill()
    try:
        took = wait_until(lambda: is_gone(pid), "the worker ends by itself", 15)
    finally:
        for child in children:
            if child.is_running():
                child.kill()
    assert took < 5
    # It ended in order: what it had handled is committed.
    load(kafka, topic, 2)
    again = services.run_script("again", HANDLER + START + "process.join()\n", topic)
    again.wait_for(lambda: "handled 2 in" in again.out, "the next worker goes on")
    assert "handled 1 in" not in again.out
    os.kill(worker_pid(again), signal.SIGTERM)
    assert again.wait() == 0


def test_a_worker_with_an_async_handler(kafka: Any, services: Services, topic: str) -> None:
    load(kafka, topic, 1)
    text = HANDLER.replace("def handle", "async def handle") + START + "process.join()\nsys.exit(process.exitcode)\n"
    service = services.run_script("script", text, topic)
    pid = worker_pid(service)
    service.wait_for(lambda: f"handled 1 in {pid}" in service.out, "the worker handles")
    os.kill(pid, signal.SIGTERM)
    assert service.wait() == 0, service.tail()


def test_ctrl_c_ends_parent_and_worker_in_order(kafka: Any, services: Services, topic: str) -> None:
    load(kafka, topic, 1)
    service = services.run_script(
        "script",
        HANDLER
        + START
        + """
try:
    process.join()
except KeyboardInterrupt:
    process.join()
    print("ended", process.exitcode, flush=True)
""",
        topic,
        start_new_session=True,
    )
    pid = worker_pid(service)
    service.wait_for(lambda: f"handled 1 in {pid}" in service.out, "the worker handles")
    os.killpg(service.pid, signal.SIGINT)  # as a terminal does
    assert service.wait(20) == 0, service.tail()
    assert "ended 0" in service.out
    assert is_gone(pid)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("start_events_receiver_process(server_name=topic, io_server=lambda: None)", "can't be pickled"),
        ("start_events_receiver_process(server_name=topic, on_start=lambda: None)", "can't be pickled"),
    ],
    ids=["io_server", "hook"],
)
def test_what_cannot_be_handed_over_is_refused(services: Services, topic: str, line: str, why: str) -> None:
    service = services.run_script("script", HANDLER + line, topic)
    assert service.wait() == 1
    assert "LaunchError" in service.err
    assert why in service.err


def test_a_handler_that_cannot_be_imported_shows_in_the_worker(services: Services, topic: str) -> None:
    text = "import multiprocessing\n" + HANDLER + "if __name__ != '__main__':\n    1 / 0\n" + START
    service = services.run_script("script", text + "process.join()\nsys.exit(process.exitcode)\n", topic)
    assert service.wait() == 1, service.tail()
    assert "ZeroDivisionError" in service.err
