"""Declarations of producer.pyx."""

from cpython.object cimport PyObject

from keven_core._native.handle cimport Client
from rdkafka cimport *


cdef struct Shipment:
    # What lives from produce() to the delivery report, as the message's opaque. Owns one reference each.
    PyObject *value
    PyObject *key
    PyObject *account


cdef class DeliveryAccount:
    cdef readonly Py_ssize_t produced
    cdef readonly Py_ssize_t delivered
    cdef readonly Py_ssize_t failed
    cdef Py_ssize_t taken
    cdef readonly list failures
    cdef readonly Py_ssize_t keep_failures


cdef class Producer(Client):
    cdef dict __dict__
    cdef void _release_pending(self) noexcept
    cdef int _report(self, const rd_kafka_message_t *message) except -1
