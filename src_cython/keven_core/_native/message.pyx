"""One consumed message as Python sees it: a Record (copied facts) or a Payload (the value, in place)."""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t
from libc.string cimport memcmp, memcpy, memset, strlen

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
@cython.no_gc  # it refers to text, bytes and numbers only; many of them may be held, and each would cost the collector
cdef class Record:
    """The facts of one consumed message. A copy: it may be kept as long as wanted.

    Attributes:
        topic, partition, offset: where it stands.
        timestamp_ms: milliseconds since the epoch, -1 if the message has none.
        timestamp_type: 0 not available, 1 set by the producer, 2 set by the broker.
        key: bytes, or None.
        value: bytes, or None for a tombstone.
        headers: list of (name, value) tuples in wire order; a value is bytes or None.
        size_bytes: of value, key, and the headers' names and values.
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
        self.unpacked = list(headers or ())
        self.timestamp_ms = timestamp_ms
        self.timestamp_type = timestamp_type
        self.attempt = attempt
        self.first_failure_ms = first_failure_ms

    @property
    def headers(self):
        cdef list found
        if self.unpacked is None:
            found = _unpacked(self.packed)
            if self.unpacked is None:  # else another thread came first: all get the same list
                self.unpacked = found
                self.packed = None
        return self.unpacked

    @property
    def size_bytes(self):
        cdef Py_ssize_t size = (len(self.value) if self.value is not None else 0) + (
            len(self.key) if self.key is not None else 0)
        cdef _Header header
        if self.unpacked is None:
            header = _before(self.packed)
            while _next(&header):
                size += header.name_size + header.value_size
            return size
        return size + sum(len(name.encode("utf-8", "replace")) + len(value or b"") for name, value in self.unpacked)

    def header(self, str name, default=None):
        """The last header of that name (Kafka allows several), or `default`."""
        cdef _Header header
        cdef bytes wanted
        if self.unpacked is None:
            wanted = name.encode("utf-8", "replace")
            header = _before(self.packed)
            found = default
            while _next(&header):
                if header.name_size == len(wanted) and memcmp(header.name, PyBytes_AS_STRING(wanted), len(wanted)) == 0:
                    found = _value_of(&header)
            return found
        for key, value in reversed(self.unpacked):
            if key == name:
                return value
        return default

    def __repr__(self):
        return f"<Record {self.topic} [{self.partition}] @ {self.offset}>"


# Headers are kept as one bytes object until somebody looks at them: for each, the sizes of name and value (two
# uint32_t, NO_VALUE where there is none), then both. A list of tuples costs the collector, and few handlers ask for it.
cdef enum:
    SIZES = 8

cdef uint32_t NO_VALUE = 0xFFFFFFFF  # no value is that long: messages have at most 10^9 bytes


cdef struct _Header:
    const char *rest         # what follows it
    Py_ssize_t rest_size
    const char *name
    uint32_t name_size
    const char *value        # NULL: it has none
    uint32_t value_size


cdef _Header _before(bytes packed) noexcept:
    """Where _next() goes on to the first header; `packed` has to stay alive."""
    cdef _Header header
    memset(&header, 0, sizeof(header))
    header.rest = PyBytes_AS_STRING(packed)
    header.rest_size = PyBytes_GET_SIZE(packed)
    return header


cdef bint _next(_Header *header) noexcept nogil:
    """Go on to the first header of what is left, if there is one."""
    cdef uint32_t sizes[2]
    cdef Py_ssize_t taken
    if header.rest_size == 0:
        return False
    memcpy(sizes, header.rest, SIZES)
    header.name = header.rest + SIZES
    header.name_size = sizes[0]
    header.value = NULL
    header.value_size = 0
    if sizes[1] != NO_VALUE:
        header.value = header.name + sizes[0]
        header.value_size = sizes[1]
    taken = SIZES + <Py_ssize_t>header.name_size + header.value_size
    header.rest += taken
    header.rest_size -= taken
    return True


cdef _value_of(_Header *header):
    return PyBytes_FromStringAndSize(header.value, header.value_size) if header.value != NULL else None


cdef list _unpacked(bytes packed):
    cdef _Header header = _before(packed)
    cdef list found = []
    while _next(&header):
        found.append((header.name[:header.name_size].decode("utf-8", "replace"), _value_of(&header)))
    return found


cdef bytes _packed_headers(rd_kafka_message_t *message):
    """The headers of a message, packed."""
    cdef rd_kafka_headers_t *headers = NULL
    cdef const char *name
    cdef const void *value
    cdef size_t size
    cdef size_t index = 0
    cdef size_t total = 0
    cdef uint32_t sizes[2]
    cdef bytes packed
    cdef char *to
    if api.message_headers(message, &headers) != 0:
        return b""
    while api.header_get_all(headers, index, &name, &value, &size) == 0:
        total += SIZES + strlen(name) + (size if value != NULL else 0)
        index += 1
    packed = PyBytes_FromStringAndSize(NULL, total)
    to = PyBytes_AS_STRING(packed)
    index = 0
    while api.header_get_all(headers, index, &name, &value, &size) == 0:
        sizes[0] = strlen(name)
        sizes[1] = size if value != NULL else NO_VALUE
        memcpy(to, sizes, SIZES)
        memcpy(to + SIZES, name, sizes[0])
        to += SIZES + sizes[0]
        if value != NULL:
            memcpy(to, value, size)
            to += size
        index += 1
    return packed


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
    record.packed = _packed_headers(message)
    return record
