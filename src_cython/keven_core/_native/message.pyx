"""One consumed message as Python sees it: a Record (copied facts) or a Payload (the value, in place)."""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_FromStringAndSize

from keven_core._native.handle cimport Handle
from keven_core._native.library cimport alive, api
from rdkafka cimport *


@cython.final
cdef class Payload:
    """Exports the value of a message as a read-only buffer, without a copy.

    A consumer shows one record after another to its decoders through the same Payload. When what was decoded keeps
    views of it (msgspec.Raw, memoryview fields), own() makes it the owner of its message: it then keeps message and
    client alive, so those views stay valid after the batch and after close(), and pins its whole fetch response.
    The message is destroyed by __dealloc__, in whichever thread drops the last view; librdkafka allows that.
    """

    @staticmethod
    cdef Payload of(Handle handle):
        cdef Payload payload = Payload.__new__(Payload)
        payload.handle = handle
        return payload

    cdef void own(self) noexcept:
        self.owner = True
        self.handle.payloads += 1
        alive.payloads += 1

    def __init__(self):
        raise TypeError("payloads are made by a consumer")

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.message == NULL:
            raise BufferError("this payload has no message")
        PyBuffer_FillInfo(view, self, self.message.payload, self.message.len, 1, flags)

    def __len__(self):
        return self.message.len if self.message != NULL else 0

    def __dealloc__(self):
        # In a forked child the memory is a copy and librdkafka's locks are in an unknown state: leave it alone.
        if self.owner and not self.handle.forked():
            with nogil:
                api.message_destroy(self.message)
            self.handle.payloads -= 1
            alive.payloads -= 1
            alive.messages -= 1


@cython.final
cdef class Record:
    """The facts of one consumed message. A copy: it may be kept as long as wanted.

    Attributes:
        topic, partition, offset: where it stands.
        timestamp_ms: milliseconds since the epoch, -1 if the message has none.
        timestamp_type: 0 not available, 1 set by the producer, 2 set by the broker.
        key: bytes, or None.
        value: bytes, or None for a tombstone.
        headers: list of (name, value) tuples in wire order; a value is bytes or None.
        attempt: which try to handle it this is, from 1.
        first_failure_ms: when the first one failed, milliseconds since the epoch; 0: this is the first.
    """

    def __init__(self, str topic, int partition, long long offset, *, value=None, key=None, headers=None,
                 long long timestamp_ms=-1, int timestamp_type=0, int attempt=1,
                 long long first_failure_ms=0):
        self.topic = topic
        self.partition = partition
        self.offset = offset
        self.value = value
        self.key = key
        self.headers = list(headers or ())
        self.timestamp_ms = timestamp_ms
        self.timestamp_type = timestamp_type
        self.attempt = attempt
        self.first_failure_ms = first_failure_ms

    def header(self, str name, default=None):
        """The last header of that name (Kafka allows several), or `default`."""
        for key, value in reversed(self.headers):
            if key == name:
                return value
        return default

    def __repr__(self):
        return f"<Record {self.topic} [{self.partition}] @ {self.offset}>"


cdef list _headers_of(rd_kafka_message_t *message):
    cdef rd_kafka_headers_t *headers = NULL
    cdef const char *name
    cdef const void *value
    cdef size_t size
    cdef size_t index = 0
    cdef list found = []
    if api.message_headers(message, &headers) != 0:
        return found
    while api.header_get_all(headers, index, &name, &value, &size) == 0:
        found.append((
            name.decode("utf-8", "replace"),
            PyBytes_FromStringAndSize(<const char *>value, size) if value != NULL else None,
        ))
        index += 1
    return found


cdef Record record_of(rd_kafka_message_t *message):
    cdef int timestamp_type = 0
    cdef Record record = Record.__new__(Record)
    record.topic = api.topic_name(message.rkt).decode()
    record.partition = message.partition
    record.attempt = 1
    record.first_failure_ms = 0
    record.offset = message.offset
    record.timestamp_ms = api.message_timestamp(message, &timestamp_type)
    record.timestamp_type = timestamp_type
    record.key = (
        PyBytes_FromStringAndSize(<const char *>message.key, message.key_len) if message.key != NULL else None
    )
    record.value = (
        PyBytes_FromStringAndSize(<const char *>message.payload, message.len) if message.payload != NULL else None
    )
    record.headers = _headers_of(message)
    return record
