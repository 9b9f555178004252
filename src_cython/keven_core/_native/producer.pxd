"""Declarations of producer.pyx."""

from cpython.object cimport PyObject
from libc.stdint cimport int32_t, int64_t, uint64_t

from keven_core._native.handle cimport Client
from keven_core._native.outbox cimport Account, Extra, Loop, Sender, Slot
from rdkafka cimport *


cdef class Producer(Client)


cdef class DeliveryAccount:
    cdef Account *account
    cdef int64_t taken
    cdef int64_t untold
    cdef readonly list failures
    cdef readonly Py_ssize_t keep_failures
    cdef readonly object on_delivery
    cdef bint told_of_all
    cdef bint announce
    cdef bint raises
    cdef bint numbered
    cdef Producer producer
    cdef list reports  # what on_delivery is to be told: (place, Delivery)
    cdef uint64_t places  # reports that were begun
    cdef int telling  # those that are not finished

    cdef void _told(self, Slot *slot) noexcept
    cdef list _take_reports(self)


cdef class Topic:
    cdef rd_kafka_topic_t *rkt
    cdef readonly str name


cdef class LoopGate:
    cdef Producer producer
    cdef object loop
    cdef list done
    cdef Loop *native
    cdef int read_fd
    cdef int write_fd
    cdef bint hurries            # the sender is to be told of messages at the end of this turn

    cdef void _shut(self) noexcept
    cdef int hurry(self) except -1


cdef class Producer(Client):
    cdef dict __dict__
    cdef Sender *sender
    cdef dict topics
    cdef list gates
    cdef list reporting          # accounts with deliveries that their callback has not been told of
    cdef int64_t announced       # failed messages that on_failure is to be told of
    cdef object first_failure
    cdef uint64_t seen_pushed
    cdef int linger_ms
    cdef readonly bint attended  # an attendant heeds the events, so that waiting threads need not

    cdef Topic topic(self, str name)
    cdef int append(self, Account *account, Account *scope, rd_kafka_topic_t *rkt, object owner, const char *data,
                    Py_ssize_t size, object key, Extra *extra) except -1
    cdef bint has_room(self, Account *account, Py_ssize_t size) noexcept
    cdef bint wait_for_room(self, Account *account, Py_ssize_t size, double timeout_s) except -1
    cdef void collect(self, Py_ssize_t limit) noexcept
    cdef void _take_back(self, Slot *slot) noexcept
    cdef void _pass_events(self) except *
    cdef LoopGate gate_of(self, object loop)
    cdef int _await_all(self, double deadline) except -1
    cdef int _halt(self) noexcept


cdef list pairs_of(object headers)
cdef Extra *new_extra(object headers, int64_t timestamp_ms, int32_t partition) except NULL
cdef void set_waiter(Extra *extra, object future, LoopGate gate) noexcept
cdef void free_extra(Extra *extra) noexcept
