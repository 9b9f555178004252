"""The C loop over `rd_kafka_produce` as a contestant: what librdkafka takes when nothing else costs anything.

It runs on the librdkafka that confluent-kafka brings, the one that keven_core and confluent-kafka use, too.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from ctypes import c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

from benchmarks._produce import WARM_UP, Window, payloads, rdkafka_options, run_log, warm_up

_SOURCE = Path(__file__).with_name("_c_loop.c")
_PRODUCER = 0
_FINISH_TIMEOUT_MS = 120_000
# Between two polls for delivery reports; from 10 to 10 000 all are alike.
_POLL_EVERY = 1000
# In the order of struct api in _c_loop.c.
_FUNCTIONS = ("produce", "last_error", "poll", "flush")


def build(folder: Path) -> Path:
    """Compile the loop into the folder. Raises OSError without a compiler, CalledProcessError when it fails."""
    library = folder / "c_loop.so"
    command = [os.environ.get("CC", "cc"), "-O2", "-Wall", "-shared", "-fPIC", "-o", str(library), str(_SOURCE)]
    subprocess.run(command, check=True)
    return library


class _Api(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in _FUNCTIONS]


class _Counts(ctypes.Structure):
    _fields_ = [("delivered", c_int64), ("failed", c_int64)]


class Messages:
    """Pointers to bytes and their sizes, as the loop takes them; holds the bytes."""

    def __init__(self, values: list[bytes]) -> None:
        self.count = len(values)
        self.pointers = (c_char_p * self.count)(*values)
        self.sizes = (c_size_t * self.count)(*map(len, values))


class CLoop:
    """A producer of librdkafka, driven by the compiled loop. close() ends it."""

    def __init__(self, library: str, topic: str, options: dict[str, str]) -> None:
        from confluent_kafka import cimpl

        # dlsym on the extension also searches the librdkafka that it depends on.
        self._rdkafka = ctypes.CDLL(cimpl.__file__)
        self._loop = ctypes.CDLL(library)
        self.counts = _Counts()
        self._api = _Api(*(self._address(name) for name in _FUNCTIONS))
        text = ctypes.create_string_buffer(512)
        conf = c_void_p(self._call("conf_new", c_void_p))
        for name, value in options.items():
            if self._call("conf_set", c_int, conf, name.encode(), value.encode(), text, c_size_t(len(text))):
                raise ValueError(text.value.decode())
        self._call("conf_set_opaque", None, conf, ctypes.byref(self.counts))
        self._call("conf_set_dr_msg_cb", None, conf, ctypes.cast(self._loop.on_delivery, c_void_p))
        self._client = c_void_p(self._call("new", c_void_p, _PRODUCER, conf, text, c_size_t(len(text))))
        if not self._client:
            raise ValueError(text.value.decode())
        self._topic = c_void_p(self._call("topic_new", c_void_p, self._client, topic.encode(), None))

    def _address(self, name: str) -> c_void_p:
        return ctypes.cast(getattr(self._rdkafka, f"rd_kafka_{name}"), c_void_p)

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(self._rdkafka, f"rd_kafka_{name}")
        function.restype = result
        return function(*arguments)

    def send(self, messages: Messages) -> None:
        """Hand the messages to librdkafka; they have to live until finish()."""
        error = self._loop.send_all(
            ctypes.byref(self._api),
            self._client,
            self._topic,
            messages.pointers,
            messages.sizes,
            c_int64(messages.count),
            c_int64(_POLL_EVERY),
        )
        if error:
            raise RuntimeError(f"rd_kafka_produce failed with {error}")

    def finish(self) -> None:
        """Wait until the fate of all messages is known."""
        error = self._loop.finish(ctypes.byref(self._api), self._client, _FINISH_TIMEOUT_MS)
        if error:
            raise RuntimeError(f"rd_kafka_flush failed with {error}")

    def close(self) -> None:
        """End the client."""
        self._call("topic_destroy", None, self._topic)
        self._call("destroy", None, self._client)


def _start(spec: dict[str, Any]) -> CLoop:
    loop = CLoop(spec["c_loop"], spec["topic"], rdkafka_options(spec))
    warm_up(lambda data: loop.send(Messages([data])), loop.finish)
    return loop


def run_throughput(spec: dict[str, Any]) -> dict[str, Any]:
    """From the first message handed over to the last one reported as delivered."""
    messages = Messages(payloads(spec))
    window = Window(spec)
    loop = _start(spec)
    window.start()
    loop.send(messages)
    loop.finish()
    window.stop()
    loop.close()
    return {
        **window.result(messages.count),
        "sent": messages.count + WARM_UP,
        "delivered": loop.counts.delivered,
    }


def run_cost(spec: dict[str, Any]) -> dict[str, Any]:
    """CPU of the thread that hands messages over, in runs that fit the queue."""
    values = payloads(spec)
    loop = _start(spec)
    # Pointers are made outside the clock: one set for each run, in the order in which run_log() asks for them.
    ready = iter([Messages(values[at : at + spec["run"]]) for at in range(0, len(values), spec["run"])])
    result = run_log(lambda part: loop.send(next(ready)), loop.finish, values, spec["run"])
    loop.close()
    return {**result, "sent": len(values) + WARM_UP, "delivered": loop.counts.delivered}
