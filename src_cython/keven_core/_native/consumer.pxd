"""Declarations of consumer.pyx."""

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint64_t

from keven_core._native.dispatch cimport Route
from keven_core._native.membership cimport Account, Membership
from keven_core._native.message cimport Payload
from keven_core._native.returns cimport Batch, Returns
from rdkafka cimport *


cdef enum:
    # Of both engines. Shorter values are copied when what is decoded keeps views of them: a view pins its whole fetch
    # response (1 MB).
    SHARE_FROM = 32768
    # How many records ahead of the current one the payload is asked for: their lines are in the other core's cache,
    # 0.2 us away. Measured: 4 to 8 are alike, 2 is too late.
    AHEAD = 6
    # Shorter values can be neither too large nor dangerously deep, so they are decoded unchecked.
    UNCHECKED = 512
    # Finished messages that may wait for the broker thread to free them, with what librdkafka keeps for each of them.
    RETURNED_BYTES = 8 << 20
    MESSAGE_OVERHEAD = 320
    # What is to be done at a record that is a suspect.
    HANDLE = 0
    ACCOUNTED = 1
    WAIT = 2


cdef object result_error(str name, object result)
cdef object take_exception()


cdef class Consumer(Membership):
    cdef rd_kafka_queue_t *queue
    cdef Returns *returns       # owned by the handle
    cdef Batch *batch
    cdef rd_kafka_message_t **messages  # those of the batch
    cdef size_t bytes           # of the values that were handled of it
    cdef Py_ssize_t batch_size
    cdef Py_ssize_t index       # of the record in hand
    cdef object on_failure
    cdef object on_parked
    cdef object outbox          # of what handlers publish; it is looked at only when there is something in it
    cdef list published         # its messages
    cdef list row_errors
    cdef Payload window         # shows the value of the record in hand to its decoder
    cdef Payload payload        # the value of the record in hand, when what was decoded keeps views of it
    cdef object base_context
    cdef readonly object flow   # the Flow that takes the batches over; None: they are handled here
    cdef object context
    cdef bint store_offsets
    cdef bint in_task
    cdef bint handling          # there is a record in hand
    cdef readonly bint awaiting  # it is the worker task's turn to await what its handler has returned
    cdef bint ended
    cdef int64_t slice_end_ms   # when run() has to come back
    cdef int64_t looked_ms      # when the clock was looked at last
    cdef int stride             # records from one look to the next
    cdef int until_look
    cdef Py_ssize_t next_failure  # index of the record that would go on with the failures in a row
    cdef Account *admitted      # of the suspect that may be handled now
    cdef int64_t admitted_offset
    cdef readonly bint suspect_ahead
    cdef readonly uint64_t failures_in_a_row
    cdef readonly uint64_t finished       # messages that were accounted
    cdef readonly uint64_t polls
    cdef readonly uint64_t store_refused

    cdef void _drop_consumer_queue(self) noexcept
    cdef rd_kafka_message_t *_in_hand(self) noexcept
    cdef void _advance(self, Account *account, rd_kafka_message_t *message) noexcept
    cdef object _run(self)
    cdef Account *_next_account(self, rd_kafka_message_t *message) except? NULL
    cdef bint _is_past_end(self, Account *account, rd_kafka_message_t *message) noexcept
    cdef PyObject *_decode(self, Route route, PyObject *value, rd_kafka_message_t *message) noexcept
    cdef PyObject *_decode_copy(self, Route route, rd_kafka_message_t *message) noexcept
    cdef PyObject *_decode_by_codec(self, Account *account, rd_kafka_message_t *message, void **found) except? NULL
    cdef int _hand_over(self) except -1
    cdef PyObject *_call_with_topic(self, Route route, rd_kafka_message_t *message, PyObject *value) noexcept
    cdef void *_identify(self, Account *account, rd_kafka_message_t *message, bint named) except? NULL
    cdef bint _acceptable(self, Account *account, rd_kafka_message_t *message) except -1
    cdef PyObject *_decode_failed(self, Account *account, rd_kafka_message_t *message, void **found) except? NULL
    cdef object _find_route(self, rd_kafka_message_t *message, bint named, void **found)
    cdef object _find_route_by_codec(self, Account *account, rd_kafka_message_t *message, void **found)
    cdef object _decode_otherwise(self, Account *account, rd_kafka_message_t *message, object error, void **found,
                                  PyObject **value)
    cdef void *_tombstone_route(self, Account *account, rd_kafka_message_t *message) noexcept
    cdef bint _plain_result(self, Account *account, rd_kafka_message_t *message, Route route,
                            object result) except -1
    cdef bint _sent(self, Account *account, rd_kafka_message_t *message) except -1
    cdef object _tombstone(self, Account *account, rd_kafka_message_t *message)
    cdef int _failed(self, Account *account, rd_kafka_message_t *message, str stage, object error) except -1
    cdef int _park(self, Account *account, rd_kafka_message_t *message) except -1
    cdef int _at_suspect(self, Account *account, rd_kafka_message_t *message) except -1
    cdef int _error_row(self, rd_kafka_message_t *message) except -1
    cdef void _start_slice(self) noexcept
    cdef bint _slice_over(self) noexcept
    cdef int _finish(self, list unstored) except -1
    cdef int _store(self, rd_kafka_topic_partition_list_t *parts) noexcept
    cdef int _release(self, Py_ssize_t count) noexcept
    cdef void _give_back(self, Py_ssize_t count) noexcept nogil
