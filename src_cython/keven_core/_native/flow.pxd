"""Declarations of flow.pyx."""

from cpython.object cimport PyObject
from libc.stdint cimport int32_t, int64_t, uint64_t

from keven_core._native.consumer cimport Consumer
from keven_core._native.dispatch cimport Route
from keven_core._native.membership cimport Account
from keven_core._native.message cimport Payload, Record
from keven_core._native.returns cimport Batch
from rdkafka cimport *


cdef enum State:
    WAITING   # in a lane, in the ready queue, or in a batch that fills
    RUNNING   # a worker has it, or its failure waits for the owner
    RESTING   # it has failed, and its next attempt is not due yet
    LANDED    # accounted; an earlier record of its partition is not


cdef struct Flight:
    # One record under way; or something without a record: a batch of them, or a call that was submitted.
    rd_kafka_message_t *message  # owned until it lands, or by `payload`
    PyObject *payload            # owned: the Payload that has taken the message over
    PyObject *cargo              # owned: the Gathering or the Submission that this is instead of a record
    PyObject *call               # owned: what handles its next attempt instead of the route; or NULL
    Account *account             # NULL for those, and when the partition was given up
    void *route                  # borrowed from the table
    void *codec                  # likewise: what reads its value instead of the route; NULL: the route does
    Lane *lane
    Flight *behind               # next in its lane or in the ready queue
    Flight *later                # next of its partition, in the order of offsets
    int64_t offset
    int64_t first_failure_ms
    size_t size_bytes
    int32_t leader_epoch
    int32_t cell                 # of this record in the memory shared with the supervisor; -1 none
    int attempt
    State state
    bint stale                   # its partition was given up
    bint tombstone


cdef struct Lane:
    # What has to go one after the other: one flight is under way, these wait for it.
    uint64_t key
    Lane *chained                # next of its bucket
    Flight *first
    Flight *last
    bint resting                 # that one is


cdef class Submission:
    cdef int64_t place           # of its copy, for the supervisor
    cdef int64_t offset
    cdef object call
    cdef object value
    cdef bint is_async
    cdef object token
    cdef Record record


cdef class Gathering:
    cdef Route route
    cdef list events
    cdef Flight **members
    cdef Py_ssize_t count
    cdef int64_t deadline_ms


cdef class Flow:
    cdef Consumer consumer
    cdef bint in_lanes
    cdef bint by_key
    cdef Flight *ready_first
    cdef Flight *ready_last
    cdef Lane **buckets
    cdef Flight *spare_flights
    cdef Lane *spare_lanes
    cdef Batch *landed           # messages of landed flights, to be given back
    cdef Py_ssize_t window
    cdef size_t window_bytes
    cdef size_t load_bytes
    cdef int64_t full_since_ms
    cdef object failed           # deque of (address of a flight, stage, error): for the owner
    cdef list answers            # (token, error or None) of submitted calls: for the owner
    cdef list due                # heap of (monotonic ms, number, address): flights whose next attempt is due then
    cdef list ended              # addresses of flights that have ended the run, unaccounted
    cdef set unpaused            # partitions that were held when they were given up
    cdef list gatherings         # batches that are not full yet
    cdef uint64_t numbers
    cdef Worker taker            # decodes for batches; the owner's
    cdef object offload
    cdef readonly object fatal
    cdef readonly Py_ssize_t ready    # flights that a worker could take up
    cdef readonly Py_ssize_t running  # flights that a worker has
    cdef readonly Py_ssize_t load     # records that have not landed, but for those of partitions that are held
    cdef readonly bint full
    cdef readonly bint waits    # for all that is in flight to land: a suspect is next, or under way
    cdef readonly bint closing

    cdef Flight *_new_flight(self) except NULL
    cdef void _free_flight(self, Flight *flight) noexcept
    cdef void _give_back(self, rd_kafka_message_t *message, size_t size) noexcept
    cdef void _free_message(self, Flight *flight) noexcept
    cdef void _free(self, Flight *flight) noexcept
    cdef int _discard(self, Flight *flight) except -1
    cdef int _shed(self, Flight *flight, list payloads) except -1
    cdef int _enter(self, Flight *flight, int64_t place, int64_t offset) except -1
    cdef int _left_hand(self, Flight *flight) except -1
    cdef int _take(self, Account *account, rd_kafka_message_t *message) except -1
    cdef int _pass(self, Account *account, rd_kafka_message_t *message) except -1
    cdef void _link(self, Account *account, Flight *flight) noexcept
    cdef uint64_t _lane_of(self, Account *account, const void *key, size_t size) noexcept
    cdef int _join(self, Flight *flight, uint64_t key) except -1
    cdef void _leave(self, Flight *flight) noexcept
    cdef void _push(self, Flight *flight) noexcept
    cdef Flight *_start(self) noexcept
    cdef bint _has_room(self) noexcept
    cdef void _unload(self, Account *account, size_t size) noexcept
    cdef int _land(self, Flight *flight) except -1
    cdef int _done(self, Flight *flight) except -1
    cdef int _skip(self, Flight *flight) except -1
    cdef int _fail(self, Flight *flight, str stage, object error) except -1
    cdef void _rest(self, Flight *flight) noexcept
    cdef int _answer(self, Flight *flight, object error) except -1
    cdef int _set_aside(self, Flight *flight) except -1
    cdef int _fail_now(self, Flight *flight, object error) except -1
    cdef int _stopped_running(self) except -1
    cdef int _gather(self, Flight *flight) except -1
    cdef int _close_gathering(self, Gathering gathering) except -1
    cdef list _board(self, Gathering gathering)
    cdef int _free_members(self, Gathering gathering) except -1
    cdef int _unboard(self, Worker worker, Flight *carrier, object result, object error) except -1
    cdef Record _record(self, Flight *flight)


cdef class Worker:
    cdef Flow flow
    cdef Flight *flight
    cdef Payload window
    cdef object base
    cdef object context
    cdef object error
    cdef object outbox           # of what its handlers publish
    cdef list published          # its messages
    cdef str stage
    cdef bint in_task
    cdef bint in_owner
    cdef bint awaiting

    cpdef run_in_task(self, context, result)
    cdef object _run(self, int64_t slice_ms)
    cdef object _call(self, Flight *flight)
    cdef object _made(self, object call, object value, bint is_async)
    cdef object _value(self, Flight *flight)
    cdef void _hand_over(self, Flight *flight) noexcept
    cdef int _finish(self, object result) except -1
    cdef object _send(self, bint succeeded)
    cdef int _failed(self, object error) except -1
