"""The compiled producer: values go to librdkafka without a copy and are released by their delivery reports.

Ownership: each message has a Shipment that owns a reference to value, key and DeliveryAccount until its delivery
report; if produce() fails it is released at once. librdkafka reads the caller's bytes from its own threads meanwhile,
so only immutable bytes are accepted here.
Threads: produce(), serve() and wait() may be called from any thread; close() once, by the owner.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from keven_core._native.handle cimport Client, error_of, error_of_object, new_conf
from keven_core._native.library cimport alive, api
from rdkafka cimport *

import time
import warnings

from keven_core.kafka import errors

cdef extern from "unistd.h" nogil:
    int usleep(unsigned int microseconds)

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL


NOT_DELIVERED = "not delivered"
POSSIBLY_DELIVERED = "possibly delivered"


@cython.final
cdef class DeliveryAccount:
    """Counts what became of the messages of one sender: pending = produced - delivered - failed.

    `failures` keeps the first `keep_failures` failed messages as (topic, value, key, KafkaError, outcome) tuples;
    outcome is "not delivered" or "possibly delivered". Changed under the GIL, readable from any thread.
    """

    def __init__(self, Py_ssize_t keep_failures=10):
        self.keep_failures = keep_failures
        self.failures = []

    @property
    def untaken(self):
        """Failed messages that take_failures() has not handed out yet."""
        return self.failed - self.taken

    @property
    def pending(self):
        """Messages whose delivery report has not come yet."""
        return self.produced - self.delivered - self.failed

    def take_failures(self):
        """(number of failed messages, the kept ones) since the last call."""
        count, kept = self.failed - self.taken, self.failures
        self.taken = self.failed
        self.failures = []
        return count, kept


cdef void _free_shipment(Shipment *shipment) noexcept:
    Py_XDECREF(shipment.value)
    Py_XDECREF(shipment.key)
    Py_XDECREF(shipment.account)
    free(shipment)
    alive.deliveries -= 1


cdef rd_kafka_headers_t *_new_headers(object headers) except NULL:
    cdef rd_kafka_headers_t *native
    cdef const char *name
    cdef Py_ssize_t name_size
    native = api.headers_new(len(headers))
    try:
        for pair in headers:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str) or not (
                    pair[1] is None or isinstance(pair[1], bytes)):
                raise errors.UsageError(
                    f"a header has to be a (str, bytes or None) pair, not {type(pair).__name__}: {pair!r:.80}")
            name = PyUnicode_AsUTF8AndSize(pair[0], &name_size)
            if pair[1] is None:
                api.header_add(native, name, name_size, NULL, 0)
            else:
                api.header_add(native, name, name_size, PyBytes_AS_STRING(pair[1]), PyBytes_GET_SIZE(pair[1]))
    except BaseException:
        api.headers_destroy(native)
        raise
    return native


@cython.no_gc_clear
cdef class Producer(Client):
    """A Kafka producer.

    Arguments:
        options: librdkafka settings, str to str; log queue and delivery events are set here.
        on_event: called with each tuple of Client._serve (errors, logs, statistics, token requests), in whichever
            thread served the producer.
    """

    def __cinit__(self):
        self.kind = "producer"

    def __init__(self, dict options not None, on_event=None):
        cdef rd_kafka_conf_t *conf
        if self.handle is not None:
            raise errors.UsageError("a Producer can't be initialized twice")
        self.on_event = on_event
        conf = new_conf({**options, "log.queue": "true"})
        api.conf_set_events(conf, RD_KAFKA_EVENT_DR | RD_KAFKA_EVENT_LOG | RD_KAFKA_EVENT_ERROR | RD_KAFKA_EVENT_STATS
                            | RD_KAFKA_EVENT_OAUTHBEARER_TOKEN_REFRESH)
        self._start(RD_KAFKA_PRODUCER, conf)

    def __dealloc__(self):
        if not self.closed and self.handle is not None and not self.handle.forked():
            warnings.warn("unclosed producer: call close()", ResourceWarning, stacklevel=1)
        if self.handle is not None and not self.handle.forked():
            if not self.closed:
                self._release_pending()
            self._drop_queues()

    cdef void _release_pending(self) noexcept:
        """Take back what is on its way, for a producer that was never closed: its values are ours to release."""
        cdef rd_kafka_event_t *event
        cdef rd_kafka_t *rk = self.handle.rk
        with nogil:
            api.purge(rk, RD_KAFKA_PURGE_F_QUEUE | RD_KAFKA_PURGE_F_INFLIGHT)
        while api.outq_len(rk) > 0:
            with nogil:
                event = api.queue_poll(self.main_queue, 20)
            if event == NULL:
                continue
            if api.event_type(event) == RD_KAFKA_EVENT_DR:
                try:
                    self._on_deliveries(event)
                except Exception:
                    pass  # a destructor has nobody to tell
            api.event_destroy(event)

    def produce(self, str topic not None, bytes value, DeliveryAccount account not None, *, bytes key=None,
                headers=None, int partition=-1, long long timestamp_ms=0, int timeout_ms=0):
        """Hand one message to librdkafka, without a copy.

        When its queue is full, waits up to `timeout_ms` with the GIL released and then raises QueueFullError.
        `value` None is a tombstone. Raises MessageTooLargeError, UnknownTopicError, KafkaError; nothing is queued then.
        """
        cdef rd_kafka_vu_t vus[7]
        cdef size_t count = 0
        cdef Py_ssize_t size
        cdef rd_kafka_t *rk = self._rk()
        cdef rd_kafka_headers_t *native = NULL
        cdef rd_kafka_error_t *error
        cdef Shipment *shipment
        cdef int code
        memset(vus, 0, sizeof(vus))
        vus[0].vtype = RD_KAFKA_VTYPE_TOPIC
        vus[0].u.cstr = PyUnicode_AsUTF8AndSize(topic, &size)
        vus[1].vtype = RD_KAFKA_VTYPE_PARTITION
        vus[1].u.i32 = partition
        count = 2
        if value is not None:
            vus[count].vtype = RD_KAFKA_VTYPE_VALUE
            vus[count].u.mem.ptr = PyBytes_AS_STRING(value)
            vus[count].u.mem.size = PyBytes_GET_SIZE(value)
            count += 1
        if key is not None:
            vus[count].vtype = RD_KAFKA_VTYPE_KEY
            vus[count].u.mem.ptr = PyBytes_AS_STRING(key)
            vus[count].u.mem.size = PyBytes_GET_SIZE(key)
            count += 1
        if timestamp_ms > 0:
            vus[count].vtype = RD_KAFKA_VTYPE_TIMESTAMP
            vus[count].u.i64 = timestamp_ms
            count += 1
        shipment = <Shipment *>malloc(sizeof(Shipment))
        if shipment == NULL:
            raise MemoryError()
        alive.deliveries += 1
        Py_INCREF(value)
        Py_INCREF(key)
        Py_INCREF(account)
        shipment.value = <PyObject *>value
        shipment.key = <PyObject *>key
        shipment.account = <PyObject *>account
        vus[count].vtype = RD_KAFKA_VTYPE_OPAQUE
        vus[count].u.ptr = shipment
        count += 1
        deadline = time.monotonic() + timeout_ms / 1000
        # Counted before the GIL is released: its report can be served by another thread before produceva returns.
        account.produced += 1
        try:
            if headers:
                native = _new_headers(headers)
                vus[count].vtype = RD_KAFKA_VTYPE_HEADERS
                vus[count].u.headers = native
                count += 1
            while True:
                self._rk()
                self.handle.calls += 1
                with nogil:
                    error = api.produceva(rk, vus, count)
                self.handle.calls -= 1
                if error == NULL:
                    break
                code = api.error_code(error)
                if code != RD_KAFKA_RESP_ERR__QUEUE_FULL:
                    if code == 10:  # MSG_SIZE_TOO_LARGE
                        api.error_destroy(error)
                        raise errors.MessageTooLargeError(
                            f"a message of {len(value)} bytes for {topic} is larger than message.max.bytes allows; "
                            f"raise KEVEN_MAX_MESSAGE_BYTES and the topic's max.message.bytes, or send less")
                    raise error_of_object(error, f"a message for {topic} was refused")
                api.error_destroy(error)
                if time.monotonic() >= deadline:
                    raise errors.QueueFullError(
                        f"the send queue stayed full for {timeout_ms} ms; the message for {topic} was not queued")
                self.serve(50)
        except BaseException:
            # rdkafka.h, rd_kafka_produceva: on error the message and its headers stay the caller's.
            if native != NULL:
                api.headers_destroy(native)
            account.produced -= 1
            _free_shipment(shipment)
            raise

    cdef int _on_deliveries(self, rd_kafka_event_t *event) except -1:
        cdef const rd_kafka_message_t *messages[256]
        cdef size_t n, i
        while True:
            n = api.event_message_array(event, messages, 256)
            for i in range(n):
                self._report(messages[i])
            if n < 256:
                return 0

    cdef int _report(self, const rd_kafka_message_t *message) except -1:
        cdef Shipment *shipment = <Shipment *>message._private
        cdef DeliveryAccount account = <DeliveryAccount>shipment.account
        if message.err == 0:
            account.delivered += 1
        else:
            account.failed += 1
            if len(account.failures) < account.keep_failures:
                topic = api.topic_name(message.rkt).decode()
                possibly = api.message_status(message) == RD_KAFKA_MSG_STATUS_POSSIBLY_PERSISTED
                account.failures.append((
                    topic, <object>shipment.value, <object>shipment.key,
                    error_of(message.err, topic, NULL, False),
                    POSSIBLY_DELIVERED if possibly else NOT_DELIVERED))
        _free_shipment(shipment)
        return 0

    def serve(self, int timeout_ms=0):
        """Account delivery reports and pass on events; waits up to `timeout_ms` for the first, GIL released."""
        self._rk()
        self.handle.calls += 1
        try:
            events = self._serve()
            if events is None and timeout_ms:
                self._wait(timeout_ms)
                events = self._serve()
        finally:
            self.handle.calls -= 1
        if events is not None and self.on_event is not None:
            for event in events:
                self.on_event(event)

    def wait(self, DeliveryAccount account not None, double timeout_s):
        """Wait until nothing of `account` is pending; returns whether that was so within `timeout_s`, GIL released.

        In slices of 50 ms at most: another thread may have taken the very report that this one waits for.
        """
        deadline = time.monotonic() + timeout_s
        self.serve(0)
        while account.produced - account.delivered - account.failed > 0:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self.serve(min(50, int(left * 1000) + 1))
        return True

    @property
    def queued(self):
        """Messages and requests in librdkafka's queues, delivery reports not yet served included."""
        return api.outq_len(self._rk())

    def close(self, int timeout_ms=10_000):
        """Send what is pending, at most `timeout_ms`, then free everything; returns how many messages were not sent.

        Those are reported as failed to their accounts. Blocks, GIL released. May be called twice.
        """
        cdef rd_kafka_t *rk
        cdef int left
        if self.closed:
            return 0
        rk = self._rk()
        deadline = time.monotonic() + timeout_ms / 1000
        while api.outq_len(rk) > 0 and time.monotonic() < deadline:
            with nogil:
                api.flush(rk, 0)
            self.serve(50)
            PyErr_CheckSignals()
        # From here on every call of another thread is refused; those under way end by themselves within their slice.
        self.closed = True
        while self.handle.calls:
            with nogil:
                usleep(200)
        left = api.outq_len(rk)
        if left:
            with nogil:
                api.purge(rk, RD_KAFKA_PURGE_F_QUEUE | RD_KAFKA_PURGE_F_INFLIGHT)
            while api.outq_len(rk) > 0:
                if self._serve() is None:
                    self._wait(20)
        self._drop_queues()
        self.handle.destroy(max(1000, int((deadline - time.monotonic()) * 1000)))
        self.handle = None
        return left
