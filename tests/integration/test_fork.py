"""Clients in a forked child: a clear error there, and the parent goes on as if nothing had happened."""

import json
from typing import Any

import pytest
from real_services import Services, committed, load_value, read_topic, send, wait_until

pytestmark = pytest.mark.real_kafka

SERVER = """
import json, os, sys, threading, time
from keven_core.kafka import event_handler
from keven_core.kafka.events.server import setup_event_listener

topic = sys.argv[1]
handled = []

@event_handler("LOAD")
def handle(event):
    handled.append(event.id)
    print("handled", event.id, flush=True)

server = setup_event_listener(
    server_name=topic, topics=[topic], session_timeout=2, heartbeat_interval=0.5
).io_server


def attempt(what):
    try:
        return repr(what())
    except Exception as error:
        return type(error).__name__


with server:
    while not handled:
        time.sleep(0.01)
    child = os.fork()
    if child == 0:
        # A hang would show as well: the test waits for this process.
        answers = {
            "pause": attempt(lambda: server.pause([(topic, 0)])),
            "resume": attempt(lambda: server.resume([(topic, 0)])),
            "seek": attempt(lambda: server.seek(topic, 0, 0)),
            "stop": attempt(server.stop),
        }
        print(json.dumps({"child": answers}), flush=True)
        sys.exit(7)  # with everything that the interpreter does at its end
    _, status = os.waitpid(child, 0)
    print("child ended with", os.waitstatus_to_exitcode(status), flush=True)
    sys.stdin.readline()
print("closed in order", flush=True)
"""


def test_a_server(kafka: Any, services: Services, topic: str) -> None:
    import subprocess

    send(kafka.bootstrap_servers, topic, [load_value(1)], partition=0)
    service = services.run_script("service", SERVER, topic, stdin=subprocess.PIPE)
    service.wait_for(lambda: "child ended with" in service.out, "the child has ended", 30)
    answers = json.loads(next(line for line in service.out.splitlines() if line.startswith('{"child"')))["child"]
    assert answers == {
        "pause": "ForkedProcessError",
        "resume": "ForkedProcessError",
        "seek": "ForkedProcessError",
        "stop": answers["stop"],
    }
    assert "child ended with 7" in service.out, service.tail()
    send(kafka.bootstrap_servers, topic, [load_value(2)], partition=0)
    service.wait_for(lambda: "handled 2" in service.out, "the parent goes on")
    service.type("end")
    assert service.wait(30) == 0, service.tail()
    assert "closed in order" in service.out
    assert committed(kafka.bootstrap_servers, topic) == {0: 2}
    assert service.out.count("handled") == 2
    assert service.complaints == []


LOGGERS = """
import os, sys
from keven_core.kafka import KafkaBatchLogger, KafkaLogger

topic = sys.argv[1]
logger = KafkaLogger(topic=topic)
batch = KafkaBatchLogger(topic=topic)
logger.log(b"parent before")
batch.log(b"parent's, unsent at the fork")
child = os.fork()
if child == 0:
    try:
        logger.log(b"child")
        batch.log(b"child in a batch")
        print("child sent", batch.flush(), flush=True)
    except Exception as error:
        print("child got", type(error).__name__, flush=True)
    sys.exit(7)
_, status = os.waitpid(child, 0)
print("child ended with", os.waitstatus_to_exitcode(status), flush=True)
logger.log(b"parent after")
print("parent sent", batch.flush(), flush=True)
"""


def test_loggers(kafka: Any, services: Services, topic: str) -> None:
    """A logger makes a client of its own in the child; what the parent had under way is sent once, by the parent."""
    service = services.run_script("service", LOGGERS, topic)
    assert service.wait(60) == 0, service.tail()
    assert service.complaints == []
    assert "child ended with 7" in service.out
    assert "parent sent 1" in service.out
    values = sorted(message.value() or b"" for message in read_topic(kafka.bootstrap_servers, topic))
    parents = [b"parent after", b"parent before", b"parent's, unsent at the fork"]
    if "child got" in service.out:
        assert "child got ForkedProcessError" in service.out
        assert values == parents
    else:
        assert "child sent 1" in service.out
        assert values == sorted([b"child", b"child in a batch", *parents])


IN_HANDLER = """
import os, sys
from keven_core.kafka import current_record, event_handler
from keven_core.kafka.events.server import start_events_receiver_server

topic = sys.argv[1]

@event_handler("LOAD")
def handle(event):
    child = os.fork()
    if child == 0:
        os._exit(event.id)  # as subprocess-like libraries and multiprocessing do
    _, status = os.waitpid(child, 0)
    print("handled", event.id, os.waitstatus_to_exitcode(status), flush=True)

start_events_receiver_server(server_name=topic, topics=[topic], session_timeout=2, heartbeat_interval=0.5)
"""


def test_a_handler_that_forks(kafka: Any, services: Services, topic: str) -> None:
    send(kafka.bootstrap_servers, topic, [load_value(number) for number in range(1, 21)], partition=0)
    service = services.run_script("service", IN_HANDLER, topic)
    service.wait_for(lambda: "handled 20 20" in service.out, "all are handled")
    service.stop()
    assert service.out.splitlines() == [f"handled {number} {number}" for number in range(1, 21)]
    wait_until(lambda: committed(kafka.bootstrap_servers, topic) == {0: 20}, "all is committed", 5)


RETURNS_TO_THE_LOOP = IN_HANDLER.replace(
    "os._exit(event.id)  # as subprocess-like libraries and multiprocessing do", "return  # by mistake, into the server"
)


def test_a_child_that_returns_into_the_server_ends_with_an_error(kafka: Any, services: Services, topic: str) -> None:
    send(kafka.bootstrap_servers, topic, [load_value(1)], partition=0)
    service = services.run_script("service", RETURNS_TO_THE_LOOP, topic)
    service.wait_for(lambda: "handled 1" in service.out, "the parent has handled it", 30)
    assert "ForkedProcessError" in service.err, service.tail()
    send(kafka.bootstrap_servers, topic, [load_value(2)], partition=0)
    service.wait_for(lambda: "handled 2" in service.out, "the parent goes on", 30)
    service.stop()
    assert committed(kafka.bootstrap_servers, topic) == {0: 2}
