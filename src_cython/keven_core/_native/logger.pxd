"""Declarations of logger.pyx."""

from libc.stdint cimport int64_t

from keven_core._native.outbox cimport Account, Sender
from keven_core._native.producer cimport DeliveryAccount, Producer
from rdkafka cimport *


cdef class HandlerScope:
    cdef readonly list captured
    cdef readonly DeliveryAccount account
    cdef list producers
    cdef Producer last_used

    cdef int _uses(self, Producer client) except -1


cdef class NativeLogger:
    # While `sender` is set, log() takes bytes for the default topic at once.
    cdef Sender *sender
    cdef Account *account
    cdef rd_kafka_topic_t *rkt
    cdef long generation        # the fork generation in which the producer was had
    cdef Producer client
    cdef readonly DeliveryAccount deliveries
    cdef str default_topic
    cdef public double timeout
    cdef readonly bint closed
    cdef object stand_in        # a producer that a test has put in place of ours
    cdef bint detour            # a store stands between log() and the producer
    cdef bint yields            # a full queue is not waited for
    cdef dict shapes            # class of data -> how it becomes a message
    cdef bytearray buffer       # events are encoded into it
    cdef bint busy

    cdef int _connect(self) except -1
    cdef object _take(self, object data, object topic, object key, object headers, object timestamp_ms,
                      DeliveryAccount deliveries, object loop)
    cdef object _encoded(self, object data)
    cdef tuple _shape_of(self, cls)
    cdef object _divert(self, HandlerScope handler, str topic, const char *text, Py_ssize_t size, owner, key, headers,
                        timestamp_ms)
    cdef int _wait_for_room(self, Producer client, DeliveryAccount deliveries, str topic, Py_ssize_t size,
                            bint at_once) except -1
