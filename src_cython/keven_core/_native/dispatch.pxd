"""Declarations of dispatch.pyx."""

from libc.stdint cimport uint64_t

from rdkafka cimport rd_kafka_message_t


cdef class Route:
    cdef readonly str name
    cdef readonly object call
    cdef readonly object decode_json
    cdef readonly object decode_msgpack
    cdef readonly object decode_envelope
    cdef readonly object on_tombstone
    cdef readonly bint is_async
    cdef readonly bint tombstone_is_async
    cdef readonly bint raw
    cdef readonly bint with_topic
    cdef readonly bint copied
    cdef readonly Py_ssize_t batch_size
    cdef readonly int batch_wait_ms
    cdef object gathering     # of a Flow: the batch that fills
    cdef bint keeps           # what is decoded keeps views of its value: seen by the consumer
    cdef bytes name_bytes
    cdef const char *name_data
    cdef size_t name_size


cdef struct Slot:
    uint64_t hash
    void *route  # borrowed: DispatchTable.routes keeps it


cdef struct Tag:
    # The first field's name as it stands in a value; zero bytes come behind it.
    size_t size
    char json[34]
    char msgpack[34]


cdef class DispatchTable:
    cdef readonly dict routes
    cdef readonly dict bound
    cdef readonly Route everything
    cdef readonly Route unnamed
    cdef readonly size_t max_payload_bytes
    cdef readonly str name_field
    cdef object name_json
    cdef object name_msgpack
    cdef object codec_of
    cdef object names_codec
    cdef dict codecs          # topic -> its codec or None
    cdef Slot *slots
    cdef uint64_t mask
    cdef void *last           # the Route that matched last, borrowed
    cdef char prefix[320]     # how the value that matched last began, up to the end of its name
    cdef size_t prefix_size
    cdef Tag tag

    cdef int _set_tag(self, str name_field) except -1
    cdef const char *tag_name(self) noexcept
    cdef void *find(self, const char *name, size_t size) noexcept
    cdef void *peek(self, const char *data, size_t size, bint *named) noexcept
    cdef Route identify(self, const char *data, size_t size, rd_kafka_message_t *message, object headers)
    cdef int check(self, const char *data, size_t size) except -1
    cdef int check_size(self, size_t size) except -1
    cdef object codec_for(self, str topic)
    cdef bint is_coded(self, codec, const char *data, size_t size, rd_kafka_message_t *message, headers) except -1
    cdef bint _is_whole(self, decode_name, const char *data, size_t size) except -1
    cdef object open_by_codec(self, codec, bytes value, Route bound)
    cdef object decode_by_codec(self, codec, bytes value, Route bound)
    cdef object decode(self, Route route, object value, const char *data)
    cdef object other_route(self, Route route, const char *data, size_t size)
