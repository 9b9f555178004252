"""Workers: ``python -m sample_service.worker MODE``, one for each launcher.

Each writes ``what`` = ``worker``, ``state`` = ``starting`` and its ``mode`` first, and ``state`` = ``ended`` last if
it ended by itself. `SECONDS` is ``SAMPLE_SERVICE_SECONDS``, `NAME` is ``SAMPLE_SERVICE_NAME``.

Ended by SIGINT, as a terminal would:

- ``events``: `start_events_receiver_server`; sees ``keven_events`` and a topic for each event that has a handler;
- ``all-events``: `start_all_events_receiver_server` with the audit topic;
- ``commands``: `start_command_receiver_server` with ``auto_start=False``, then ``start_sync()`` of what it returned.
  Writes ``what`` = ``server`` with ``type`` (``CommandReceiverServer``) before it starts.

Ended by themselves:

- ``events-process``, ``commands-process``: the same servers in a child process, which is joined for SECONDS, then
  terminated and joined again. The lines of the handlers bear a ``pid`` that is not the worker's. Before the end a
  line with ``what`` = ``process``: ``was_alive`` = true, ``is_alive`` = false;
- ``listener``: `setup_event_listener` with its default topics (``keven_events``, ``keven_events.audit``) and a
  timeout: ends after SECONDS without a message. Of `drive audit` it sees the audit event, of `drive orders` nothing;
- ``listener-topics``: the same with ``topics`` = those of ``ORDER_PLACED`` and ``INVOICE_SENT``, and ``await
  start()``;
- ``retry``: a consumer server of its own that retries; see `failing_handlers`. SECONDS has to be 5 or more;
- ``lines``: a `MessageReceiverServer` over a consumer server of its own, with a `Runner` that is told the topic. A
  line with ``what`` = ``line``, ``topic``, ``text`` for each record in the two log topics; within a topic in the
  order sent;
- ``lines-no-commit``: a consumer server with two runners, one of them a plain function, no server around it, no
  commit: each record gives a ``line`` with ``topic`` = null and a ``length`` line. Run twice, it sees the same again,
  provided that an unknown group starts at the earliest offset.

``retry`` and ``lines`` write ``what`` = ``assigned`` with ``topics`` when partitions are assigned. For the others,
send `drive ping` until a ``ping`` line comes (``commands``: `drive warm` and ``warm_cache``).
"""

import asyncio
import os
import sys

from keven_core.kafka.abstracts.consumer_server import KafkaConsumerServer, Runner
from keven_core.kafka.abstracts.message_server import MessageReceiverServer
from keven_core.kafka.commands import start_command_receiver_process, start_command_receiver_server
from keven_core.kafka.events.server import (
    setup_event_listener,
    start_all_events_receiver_server,
    start_events_receiver_process,
    start_events_receiver_server,
)

from . import command_handlers, event_handlers, failing_handlers  # noqa: F401  (their handlers register themselves)
from .names import BATCH_LOG_TOPIC, LOG_TOPIC, ShopEvents, event_topic
from .record import record

NAME = os.environ.get("SAMPLE_SERVICE_NAME", "shop")
SECONDS = float(os.environ.get("SAMPLE_SERVICE_SECONDS", "10"))


def on_assign(consumer, partitions):
    record("assigned", topics=sorted({partition.topic for partition in partitions}))


class LineRunner(Runner):
    def run(self, message, topic=None):
        record("line", topic=topic, text=message.decode())


def measure(message):
    record("length", length=len(message))


def run_events():
    start_events_receiver_server(server_name=NAME)


def run_all_events():
    start_all_events_receiver_server(NAME, include_audit=True)


def run_commands():
    server = start_command_receiver_server(server_name=NAME, auto_start=False)
    record("server", type=type(server).__name__)
    server.start_sync()


def watch(process):
    process.join(SECONDS)
    was_alive = process.is_alive()
    process.terminate()
    process.join()
    record("process", was_alive=was_alive, is_alive=process.is_alive())


def run_events_process():
    watch(start_events_receiver_process(server_name=NAME))


def run_commands_process():
    watch(start_command_receiver_process(server_name=NAME))


def run_listener():
    server = setup_event_listener(auto_reprocess_errors=False, io_server=None, server_name=NAME, timeout=SECONDS)
    server.start_sync()


def run_listener_topics():
    server = setup_event_listener(
        auto_reprocess_errors=False,
        io_server=None,
        server_name=NAME,
        timeout=SECONDS,
        topics=[event_topic(ShopEvents.ORDER_PLACED), event_topic(ShopEvents.INVOICE_SENT)],
    )
    asyncio.run(server.start())


def run_retry():
    broken = event_topic(ShopEvents.ORDER_BROKEN)
    io_server = KafkaConsumerServer(
        topics=[event_topic(ShopEvents.PAYMENT_BOUNCED), broken],
        client_id=NAME,
        group_id=NAME,
        auto_reprocess_errors=True,
        retry_interval=1,
        max_retries=3,
        retry_detail={broken: {"retry_interval": 1, "max_retries": 2}},
        timeout=SECONDS,
        on_assign_topics=on_assign,
    )
    server = setup_event_listener(auto_reprocess_errors=True, io_server=io_server, server_name=NAME)
    server.start_sync()


def run_lines():
    io_server = KafkaConsumerServer(
        [LOG_TOPIC, BATCH_LOG_TOPIC],
        client_id=NAME,
        group_id=NAME,
        pass_topic_param=True,
        timeout=SECONDS,
        on_assign_topics=on_assign,
    )
    server = MessageReceiverServer(LineRunner())
    server.assign_io_server(io_server)
    server.start_sync()


def run_lines_no_commit():
    io_server = KafkaConsumerServer(
        topics=[LOG_TOPIC, BATCH_LOG_TOPIC],
        client_id=NAME,
        group_id=NAME,
        runners=[LineRunner()],
        no_commit=True,
        timeout=SECONDS,
    )
    io_server.add_runner(measure)
    asyncio.run(io_server.run_server())


MODES = {
    "events": run_events,
    "all-events": run_all_events,
    "commands": run_commands,
    "events-process": run_events_process,
    "commands-process": run_commands_process,
    "listener": run_listener,
    "listener-topics": run_listener_topics,
    "retry": run_retry,
    "lines": run_lines,
    "lines-no-commit": run_lines_no_commit,
}


def main(arguments):
    if len(arguments) != 1 or arguments[0] not in MODES:
        sys.exit(f"usage: python -m sample_service.worker {'|'.join(MODES)}")
    (mode,) = arguments
    record("worker", state="starting", mode=mode)
    MODES[mode]()
    record("worker", state="ended", mode=mode)


if __name__ == "__main__":
    main(sys.argv[1:])
