"""Observations: one JSON object a line, appended to the file named by ``SAMPLE_SERVICE_RECORD``.

Every line has ``what`` (the kind of the observation) and ``pid`` (the process that made it). Lines of handlers have
``what`` = ``handled``, ``handler`` (the name given in the handler's docstring), ``name`` (of the event or command,
upper case) and ``type`` (the class of the object that the handler got), then fields of their own.
"""

import json
import os
import threading


def record(what, **fields):
    line = json.dumps({"what": what, "pid": os.getpid(), **fields}) + "\n"
    # One write to a file opened for appending: lines of several processes and threads stay whole.
    descriptor = os.open(os.environ["SAMPLE_SERVICE_RECORD"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def plain_name(name):
    """ORDER_PLACED, whether the name is a member of some enum or a string of either case."""
    return str(getattr(name, "name", name)).upper()


def handled(handler, event, **fields):
    record("handled", handler=handler, name=plain_name(event.event_name), type=type(event).__name__, **fields)


def handled_command(handler, command, **fields):
    fields = {"uuid": str(command.get_uuid()), **fields}
    record("handled", handler=handler, name=plain_name(command.command_name), type=type(command).__name__, **fields)


def thread_kind():
    return "main" if threading.current_thread() is threading.main_thread() else "other"
