"""Declarations of message.pyx."""

from rdkafka cimport *

from keven_core._native.handle cimport Handle


cdef class Payload:
    cdef Handle handle
    cdef rd_kafka_message_t *message
    cdef bint owner
    cdef object keeper        # the Payload that owns the message instead

    @staticmethod
    cdef Payload of(Handle handle)
    cdef void own(self) noexcept


cdef class Record:
    cdef readonly str topic
    cdef readonly int partition
    cdef readonly long long offset
    cdef readonly long long timestamp_ms
    cdef readonly int timestamp_type
    cdef readonly object key
    cdef readonly object value
    cdef bytes packed         # its headers until somebody looks at them
    cdef list unpacked        # afterwards
    cdef readonly int attempt
    cdef readonly long long first_failure_ms


cdef Record record_of(rd_kafka_message_t *message)
