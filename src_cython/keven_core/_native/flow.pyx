"""Records in flight: many at once, in lanes that keep their order, with commits that leave no gap.

The plain way (Consumer.run) handles one record after the other. A Flow takes the records over instead and has them
handled by Workers: tasks of an event loop, threads, or the owner itself. A record in flight is a Flight.

Order: records of one lane are handled one after the other: those of a partition, or those of a key in its partition;
with "none" there are no lanes. The events of a batch handler are gathered; its batches are a lane of their own.

Delivery: the flights of a partition are linked in the order of their offsets. One that is accounted has landed; the
position of the partition moves on over landed flights only, so what is stored is never ahead of a record in flight.

Ownership: a flight owns its message until it lands, then it goes back to be freed as in consumer.pyx. A flight whose
partition was given up is stale: whoever comes across it next (a lane, a worker, the owner) frees it, uncounted.

Threads: intake(), settle(), tend(), drop(), submit() and clear() with the consumer's owner; a Worker with its own
thread or task. Everything holds the GIL, and nothing is left half done where it may be let go (calls into Python,
destructors): that is the only lock.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.list cimport PyList_GET_SIZE
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from libc.stdint cimport int64_t, uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

from keven_core._native.calls cimport (
    Py_REFCNT, PyContext_Enter, PyContext_Exit, keven_call, keven_now_ms, keven_prefetch_value
)
from keven_core._native.consumer cimport (
    ACCOUNTED, AHEAD, MESSAGE_OVERHEAD, RETURNED_BYTES, SHARE_FROM, UNCHECKED, WAIT, Consumer, result_error,
    take_exception
)
from keven_core._native.context cimport context_changed
from keven_core._native.dispatch cimport Route
from keven_core._native.library cimport alive, api
from keven_core._native.membership cimport UNBOUNDED, Account
from keven_core._native.message cimport Payload, Record, record_of
from keven_core._native.returns cimport free_returned, give_back, new_batch
from rdkafka cimport *

import inspect
from asyncio import CancelledError
from collections import deque
from functools import partial
from heapq import heappop, heappush

from keven_core.kafka import errors
from keven_core.kafka.outcomes import BatchError, Outcome, wrong_outcomes

cdef enum:
    # How long a worker goes on at a time: in a loop other tasks want their turn, the owner has a group to attend to.
    TASK_SLICE_MS = 20
    OWNER_SLICE_MS = 200
    # A partition of which nothing has landed for this long does not count while the others are waited for.
    STUCK_MS = 1000
    # Records of a partition from the first that has not landed on: what comes again after a crash, at most.
    SPAN = 20_000
    BUCKETS = 4096
    THREAD_HAS_NO_END = -1

cdef object RETIRE_MARK = object()
cdef object SKIPPED = object()
cdef object FAILED = object()


cdef uint64_t hash_key(uint64_t seed, const uint8_t *data, size_t size) noexcept nogil:
    cdef uint64_t h = seed ^ <uint64_t>0xcbf29ce484222325
    cdef size_t i
    for i in range(size):
        h = (h ^ data[i]) * <uint64_t>0x100000001b3
    return h ^ (h >> 29)


@cython.final
cdef class Submission:
    """A call that was submitted: what to call, for which record, and what comes back with its result."""


@cython.final
cdef class Gathering:
    """The events of one batch of a batch handler, and their flights."""

    def __dealloc__(self):
        PyMem_Free(self.members)


cdef Gathering new_gathering(Route route, Py_ssize_t capacity):
    cdef Gathering gathering = Gathering.__new__(Gathering)
    gathering.route = route
    gathering.events = []
    gathering.members = <Flight **>PyMem_Calloc(capacity, sizeof(void *))
    if gathering.members == NULL:
        raise MemoryError()
    return gathering


@cython.final
cdef class Flow:
    """The records of a consumer that are in flight.

    Arguments:
        consumer: whose batches are taken over; it gives its partitions' flights up by itself.
        order: what is handled one after the other: "partition", "key" (of a partition; records without one are in no
            order), or "none".
        window: this many records that have not landed are enough: `full`. Partitions in which nothing moves do not
            count among them, or they would hold up the others.
        window_bytes: the same for their size.
    """

    def __cinit__(self):
        self.failed = deque()
        self.answers = []
        self.due = []
        self.ended = []
        self.unpaused = set()
        self.gatherings = []
        self.buckets = <Lane **>calloc(BUCKETS, sizeof(void *))
        if self.buckets == NULL:
            raise MemoryError()

    def __init__(self, Consumer consumer not None, str order="partition", *, Py_ssize_t window=2000,
                 size_t window_bytes=32 << 20):
        if order not in ("partition", "key", "none"):
            raise errors.InternalError(f"no such order: {order}")
        self.consumer = consumer
        self.in_lanes = order != "none"
        self.by_key = order == "key"
        self.window = window
        self.window_bytes = window_bytes
        self.landed = new_batch(consumer.returns, consumer.batch_size)
        if self.landed == NULL:
            raise MemoryError()
        self.landed.count = 0
        self.taker = Worker(self, consumer.base_context)
        consumer.flow = self

    def __dealloc__(self):
        cdef Flight *flight
        cdef Lane *lane
        cdef int i
        while self.spare_flights != NULL:
            flight = self.spare_flights
            self.spare_flights = flight.behind
            free(flight)
        for i in range(BUCKETS + 1):
            while self.spare_lanes != NULL:
                lane = self.spare_lanes
                self.spare_lanes = lane.chained
                free(lane)
            if i < BUCKETS:
                self.spare_lanes = self.buckets[i]
        free(self.buckets)
        free(self.landed)

    # --- flights ------------------------------------------------------------------------------------------------------

    cdef Flight *_new_flight(self) except NULL:
        cdef Flight *flight = self.spare_flights
        if flight == NULL:
            flight = <Flight *>calloc(1, sizeof(Flight))
            if flight == NULL:
                raise MemoryError()
        else:
            self.spare_flights = flight.behind
        flight.message = NULL
        flight.payload = flight.cargo = flight.call = NULL
        flight.account = NULL
        flight.lane = NULL
        flight.behind = flight.later = NULL
        flight.first_failure_ms = 0
        flight.cell = -1
        flight.attempt = 1
        flight.state = WAITING
        flight.stale = flight.tombstone = False
        alive.flights += 1
        return flight

    cdef void _free_flight(self, Flight *flight) noexcept:
        cdef PyObject *cargo = flight.cargo
        cdef PyObject *call = flight.call
        flight.cargo = flight.call = NULL
        flight.behind = self.spare_flights
        self.spare_flights = flight
        alive.flights -= 1
        Py_XDECREF(cargo)
        Py_XDECREF(call)

    cdef void _give_back(self, rd_kafka_message_t *message, size_t size) noexcept:
        """Have a message freed by the thread that allocated it, with others."""
        cdef Batch *fresh
        self.landed.messages[self.landed.count] = message
        self.landed.count += 1
        self.landed.bytes += size + MESSAGE_OVERHEAD
        alive.messages -= 1
        if <Py_ssize_t>self.landed.count < self.consumer.batch_size:
            return
        fresh = new_batch(self.consumer.returns, self.consumer.batch_size)
        if fresh == NULL:
            self._free_landed()
            return
        give_back(self.consumer.returns, self.landed)
        self.landed = fresh
        self.landed.count = 0
        if self.consumer.returns.waiting_bytes > RETURNED_BYTES:
            free_returned(self.consumer.returns)

    def _free_landed(self):
        cdef size_t i
        for i in range(self.landed.count):
            api.message_destroy(<rd_kafka_message_t *>self.landed.messages[i])
        self.landed.count = self.landed.bytes = 0

    cdef void _free_message(self, Flight *flight) noexcept:
        """The last that is done with a flight: a destructor may let the GIL go."""
        cdef PyObject *payload = flight.payload
        cdef rd_kafka_message_t *message = flight.message
        flight.payload = NULL
        flight.message = NULL
        if payload != NULL:
            Py_DECREF(<object>payload)
        elif message != NULL:
            self._give_back(message, flight.size_bytes)

    cdef void _free(self, Flight *flight) noexcept:
        self._free_message(flight)
        self._free_flight(flight)

    cdef int _discard(self, Flight *flight) except -1:
        """Free a stale flight, whoever has come across it."""
        self._leave(flight)
        self._left_hand(flight)
        self._free(flight)
        return 0

    cdef int _shed(self, Flight *flight, list payloads) except -1:
        """As _free_message(), but the GIL is kept: a payload is freed with the list."""
        if flight.payload != NULL:
            payloads.append(<object>flight.payload)
            Py_DECREF(<object>flight.payload)
            flight.payload = NULL
            flight.message = NULL
        else:
            self._free_message(flight)
        return 0

    cdef Record _record(self, Flight *flight):
        cdef Record record = record_of(flight.message)
        record.attempt = flight.attempt
        record.first_failure_ms = flight.first_failure_ms
        return record

    # --- the supervisor -----------------------------------------------------------------------------------------------

    cdef int _enter(self, Flight *flight, int64_t place, int64_t offset) except -1:
        """A record is about to be handled. Until it is in no hand again it is suspected, should the process die."""
        if self.consumer.suspects is not None:
            flight.cell = self.consumer.suspects.enter(place, offset)
        return 0

    cdef int _left_hand(self, Flight *flight) except -1:
        if flight.cell >= 0:
            self.consumer.suspects.leave(flight.cell)
            flight.cell = -1
        return 0

    # --- intake -------------------------------------------------------------------------------------------------------

    def intake(self):
        """Take over what the consumer has in hand; owner only. What needs no handler is accounted at once."""
        cdef Consumer consumer = self.consumer
        cdef Py_ssize_t count = consumer.count
        cdef rd_kafka_message_t *message
        cdef Account *account
        cdef bint alone = False
        cdef int verdict
        if self.waits and not self.idle:
            return
        self.waits = False
        while not alone and consumer.index < count:
            message = consumer.messages[consumer.index]
            if consumer.index + AHEAD < count:
                keven_prefetch_value(consumer.messages[consumer.index + AHEAD].payload)
            account = consumer.current
            if message.err != 0 or message.rkt != consumer.current_rkt or message.partition != account.partition:
                account = consumer._next_account(message)
                if account == NULL:
                    continue
            if account.leaving:
                # It comes again, with what was given up before it.
                account.received += 1
                account.stale += 1
                consumer.index += 1
                continue
            if account.end_offset != UNBOUNDED and consumer._is_past_end(account, message):
                continue
            if message.offset <= account.last_suspect and consumer.suspects.find(
                    account.topic.decode(), account.partition, message.offset) is not None:
                # By itself: should it end the process, it is known which one it was, and nothing else comes again.
                self.waits = True
                if not self.idle:
                    return
                verdict = consumer._at_suspect(account, message)
                if verdict == WAIT:
                    return
                if verdict == ACCOUNTED:
                    self.waits = False
                    continue
                alone = True
                consumer.ended = False
            account.received += 1
            if account.parks:
                consumer._park(account, message)
                continue
            self._take(account, message)
        if not self.full and (self.load >= self.window or self.load_bytes >= self.window_bytes):
            self.full = True
            self.full_since_ms = keven_now_ms()

    cdef int _take(self, Account *account, rd_kafka_message_t *message) except -1:
        cdef Consumer consumer = self.consumer
        cdef void *found = account.bound
        cdef void *codec = NULL
        cdef bint named = False
        cdef Flight *flight
        error = None
        if message.payload == NULL:
            found = consumer._tombstone_route(account, message)
            if found == NULL:
                account.tombstones += 1
                return self._pass(account, message)
        elif account.codec != NULL and consumer.table.is_coded(
                <object>account.codec, <const char *>message.payload, message.len, message, None):
            codec = account.codec
            error = consumer._find_route_by_codec(account, message, &found)
            if found == NULL and error is None:
                account.skipped += 1
                return self._pass(account, message)
        elif found == NULL:
            found = consumer.table.peek(<const char *>message.payload, message.len, &named)
            if found == NULL:
                if not named or consumer.table.unnamed is not None:
                    error = consumer._find_route(message, named, &found)
                if found == NULL and error is None:
                    account.skipped += 1
                    return self._pass(account, message)
        flight = self._new_flight()
        flight.message = message
        flight.route = found
        flight.codec = codec
        flight.offset = message.offset
        flight.leader_epoch = api.message_leader_epoch(message)  # now that the message is in the cache
        flight.size_bytes = message.len
        flight.tombstone = message.payload == NULL
        consumer.messages[consumer.index] = NULL
        consumer.index += 1
        self._link(account, flight)
        account.open += 1
        account.open_bytes += message.len
        if not account.held:
            self.load += 1
            self.load_bytes += message.len
        if error is not None:
            return self._fail_now(flight, error)
        if (<Route>found).batch_size and not flight.tombstone:
            return self._gather(flight)
        return self._join(flight, self._lane_of(account, message.key, message.key_len))

    cdef int _pass(self, Account *account, rd_kafka_message_t *message) except -1:
        """The record in hand is accounted without a handler. It stays in the batch, to be freed with it."""
        cdef Flight *flight
        self.consumer.index += 1
        self.consumer.finished += 1
        if account.first_open == NULL:
            account.next_offset = message.offset + 1
            account.last = message
            self.consumer._touch(account)
            return 0
        flight = self._new_flight()
        flight.offset = message.offset
        flight.leader_epoch = api.message_leader_epoch(message)
        flight.state = LANDED
        self._link(account, flight)
        return 0

    cdef void _link(self, Account *account, Flight *flight) noexcept:
        flight.account = account
        account.span += 1
        if account.first_open == NULL:
            account.first_open = flight
        else:
            (<Flight *>account.last_open).later = flight
        account.last_open = flight

    # --- lanes --------------------------------------------------------------------------------------------------------

    cdef uint64_t _lane_of(self, Account *account, const void *key, size_t size) noexcept:
        """What is handled one after the other has the same number; 0: in no order."""
        if not self.in_lanes or (self.by_key and key == NULL):
            return 0
        # Two keys of the same hash share a lane, which is harmless.
        return hash_key(<uint64_t><uintptr_t>account, <const uint8_t *>key, size if self.by_key else 0) | 1

    cdef int _join(self, Flight *flight, uint64_t key) except -1:
        """Put a flight at the end of its lane; it is ready when nothing is before it."""
        cdef Lane **bucket = &self.buckets[(key >> 1) % BUCKETS]
        cdef Lane *lane
        if key == 0:
            self._push(flight)
            return 0
        lane = bucket[0]
        while lane != NULL and lane.key != key:
            lane = lane.chained
        flight.behind = NULL
        if lane != NULL:
            flight.lane = lane
            if lane.first == NULL:
                lane.first = flight
            else:
                lane.last.behind = flight
            lane.last = flight
            return 0
        lane = self.spare_lanes
        if lane == NULL:
            lane = <Lane *>calloc(1, sizeof(Lane))
            if lane == NULL:
                raise MemoryError()
        else:
            self.spare_lanes = lane.chained
        lane.key = key
        lane.first = lane.last = NULL
        lane.resting = False
        lane.chained = bucket[0]
        bucket[0] = lane
        flight.lane = lane
        self._push(flight)
        return 0

    cdef void _leave(self, Flight *flight) noexcept:
        """The next of the lane is ready."""
        cdef Lane *lane = flight.lane
        cdef Lane **link
        cdef Flight *after
        if lane == NULL:
            return
        flight.lane = NULL
        after = lane.first
        if after != NULL:
            lane.first = after.behind
            self._push(after)
            return
        link = &self.buckets[(lane.key >> 1) % BUCKETS]
        while link[0] != lane:
            link = &link[0].chained
        link[0] = lane.chained
        lane.chained = self.spare_lanes
        self.spare_lanes = lane

    cdef void _push(self, Flight *flight) noexcept:
        flight.behind = NULL
        if self.ready_first == NULL:
            self.ready_first = flight
        else:
            self.ready_last.behind = flight
        self.ready_last = flight
        self.ready += 1

    cdef Flight *_start(self) noexcept:
        """The flight that has been ready longest, for a worker; NULL: there is none."""
        cdef Flight *flight
        while self.ready_first != NULL and not self.closing:
            flight = self.ready_first
            self.ready_first = flight.behind
            self.ready -= 1
            if flight.stale:
                self._leave(flight)
                self._free(flight)
                continue
            flight.state = RUNNING
            self.running += 1
            return flight
        return NULL

    # --- landing ------------------------------------------------------------------------------------------------------

    cdef bint _has_room(self) noexcept:
        """Whether, after the window was full, enough has landed for more to be fetched."""
        return 4 * self.load <= 3 * self.window and 4 * self.load_bytes <= 3 * self.window_bytes

    cdef void _unload(self, Account *account, size_t size) noexcept:
        account.open -= 1
        account.open_bytes -= size
        account.landings += 1
        if account.held:
            return
        self.load -= 1
        self.load_bytes -= size
        if self.full and self._has_room():
            self.full = False
            self.consumer.wake()

    cdef int _land(self, Flight *flight) except -1:
        """The record is accounted: the position of its partition moves on, if no earlier record is open."""
        cdef Account *account = flight.account
        cdef PyObject *payload = flight.payload
        cdef rd_kafka_message_t *message = flight.message
        flight.payload = NULL
        flight.message = NULL
        flight.state = LANDED
        self._left_hand(flight)
        self.consumer.finished += 1
        self._unload(account, flight.size_bytes)
        if payload == NULL:
            self._give_back(message, flight.size_bytes)
        if account.first_open == flight:
            account.last = NULL
            self.consumer._touch(account)
            while flight != NULL and flight.state == LANDED:
                account.next_offset = flight.offset + 1
                account.leader_epoch = flight.leader_epoch
                account.span -= 1
                account.first_open = flight.later
                if account.first_open == NULL:
                    account.last_open = NULL
                self._free_flight(flight)
                flight = <Flight *>account.first_open
        if payload != NULL:
            Py_DECREF(<object>payload)
        return 0

    cdef void _rest(self, Flight *flight) noexcept:
        """Nothing behind it in its lane is begun."""
        flight.state = RESTING
        if flight.lane != NULL:
            flight.lane.resting = True

    cdef int _set_aside(self, Flight *flight) except -1:
        """The run ends by this flight, which stays unaccounted."""
        self._rest(flight)
        self.ended.append(<uintptr_t>flight)
        return 0

    cdef int _fail_now(self, Flight *flight, object error) except -1:
        """A record can't be decoded, which no worker was needed for."""
        flight.state = RUNNING
        self.running += 1
        return self._fail(flight, "decode", error)

    cdef int _stopped_running(self) except -1:
        self.running -= 1
        if self.running == 0 and (self.closing or self.load == 0):
            self.consumer.wake()
        return 0

    cdef int _done(self, Flight *flight) except -1:
        """A worker has handled a flight."""
        if flight.cargo != NULL:
            self._answer(flight, None)
        elif flight.stale:
            self._discard(flight)
        else:
            self._leave(flight)
            self.consumer.failures_in_a_row = 0
            flight.account.done += 1
            self._land(flight)
        return self._stopped_running()

    cdef int _answer(self, Flight *flight, object error) except -1:
        """A submitted call has been made."""
        self.answers.append(((<Submission>flight.cargo).token, error))
        self.consumer.wake()
        return self._discard(flight)

    cdef int _skip(self, Flight *flight) except -1:
        """Nobody handles what a record turned out to be."""
        if flight.stale:
            self._discard(flight)
        else:
            self._leave(flight)
            flight.account.skipped += 1
            self._land(flight)
        return self._stopped_running()

    cdef int _fail(self, Flight *flight, str stage, object error) except -1:
        """A worker has failed to handle a flight: the owner decides what becomes of it; its lane waits."""
        cdef Py_ssize_t i
        if not isinstance(error, Exception):
            # Of the interpreter's end, or what the service ends itself by: the record is not accounted.
            self.fail(error)
            if flight.cargo != NULL and isinstance(<object>flight.cargo, Gathering):
                for i in range((<Gathering>flight.cargo).count):
                    (<Gathering>flight.cargo).members[i].state = RESTING
            self._set_aside(flight)
            return self._stopped_running()
        if flight.cargo != NULL:
            self._answer(flight, error)
        elif flight.stale:
            self._discard(flight)
        else:
            self._left_hand(flight)  # handled, if not well
            self.failed.append((<uintptr_t>flight, stage, error))
            self.consumer.wake()
        return self._stopped_running()

    # --- batches ------------------------------------------------------------------------------------------------------

    cdef int _gather(self, Flight *flight) except -1:
        """Add a record to the batch of its handler that fills."""
        cdef Route route
        cdef Gathering gathering
        try:
            value = self.taker._value(flight)
        except BaseException as error:
            if isinstance(error, Exception):
                return self._fail_now(flight, error)
            self._set_aside(flight)
            raise
        if value is SKIPPED:
            flight.account.skipped += 1
            return self._land(flight)
        route = <Route>flight.route
        if not route.batch_size:
            # It names another event than its topic is for.
            return self._join(flight, self._lane_of(flight.account, flight.message.key, flight.message.key_len))
        if route.gathering is None:
            gathering = new_gathering(route, route.batch_size)
            gathering.deadline_ms = keven_now_ms() + route.batch_wait_ms
            route.gathering = gathering
            self.gatherings.append(gathering)
        else:
            gathering = <Gathering>route.gathering
        gathering.events.append(value)
        gathering.members[gathering.count] = flight
        gathering.count += 1
        if gathering.count == route.batch_size:
            self._close_gathering(gathering)
        return 0

    cdef int _close_gathering(self, Gathering gathering) except -1:
        """The batch is to be handled, after the one before it."""
        cdef Flight *carrier = self._new_flight()
        self.gatherings.remove(gathering)
        gathering.route.gathering = None
        Py_INCREF(gathering)
        carrier.cargo = <PyObject *>gathering
        return self._join(carrier, (<uint64_t><uintptr_t><void *>gathering.route.call | 1) if self.in_lanes else 0)

    cdef list _board(self, Gathering gathering):
        """The events of a batch that a worker begins with, without those whose partition was given up."""
        cdef Py_ssize_t i
        cdef Py_ssize_t kept = 0
        cdef Flight *member
        for i in range(gathering.count):
            member = gathering.members[i]
            if member.stale:
                gathering.events[i] = SKIPPED
                self._free(member)
                continue
            member.state = RUNNING
            self._enter(member, member.account.place, member.offset)
            gathering.members[kept] = member
            kept += 1
        if kept != gathering.count:
            gathering.events = [event for event in gathering.events if event is not SKIPPED]
            gathering.count = kept
        return gathering.events

    cdef int _unboard(self, Worker worker, Flight *carrier, object result, object error) except -1:
        """A batch was handled: account for each of its records by what the handler said."""
        cdef Gathering gathering = <Gathering>carrier.cargo
        cdef Py_ssize_t count = gathering.count
        cdef Py_ssize_t done = count
        cdef Py_ssize_t i
        cdef Flight *member
        name = gathering.route.name
        outcomes = None
        if error is not None and not isinstance(error, Exception):
            return self._fail(carrier, "handle", error)
        if isinstance(error, BatchError):
            if 0 <= error.index < count:
                done = error.index
                error = error.__cause__ if isinstance(error.__cause__, Exception) else error
            else:
                error = errors.UsageError(f"the handler of {name} raised BatchError({error.index}) for a batch of "
                                          f"{count} event(s): an index from 0 to {count - 1} is allowed")
                done = -1
        elif error is not None:
            done = -1
        elif result is not None:
            error = batch_result_error(name, result, count)
            if error is not None:
                done = -1
            else:
                outcomes = result
        gathering.count = 0
        for i in range(count):
            member = gathering.members[i]
            self._left_hand(member)
            if member.stale:
                self._free(member)
            elif done < 0 or i == done:
                self.running += 1
                self._fail(member, "handle", error)
            elif i > done:
                gathering.members[gathering.count] = member
                gathering.count += 1
            elif outcomes is not None and outcomes[i] is not None:
                self.running += 1
                self._fail(member, "handle", outcomes[i])
            else:
                self.consumer.failures_in_a_row = 0
                member.account.done += 1
                self._land(member)
        # The rest is a batch again, before those that wait; decoded anew, for the handler has had its events.
        count = gathering.count
        gathering.count = 0
        gathering.events = []
        for i in range(count):
            member = gathering.members[i]
            try:
                value = worker._value(member)
            except Exception as failure:
                self.running += 1
                self._fail(member, "decode", failure)
                continue
            gathering.events.append(value)
            gathering.members[gathering.count] = member
            gathering.count += 1
        if gathering.count:
            carrier.state = WAITING
            self._push(carrier)
        else:
            self._leave(carrier)
            self._free_flight(carrier)
        return self._stopped_running()

    # --- the owner ----------------------------------------------------------------------------------------------------

    def submit(self, call, value, bint is_async, Record record not None, token, int64_t place=-1, int64_t offset=-1):
        """Have call(value) made by a worker, in the lane of `record`, which current_record() shows; see take_answers().

        `is_async` says that it has to be awaited. `place` and `offset` say where its copy stands, for the supervisor.
        """
        cdef Flight *flight = self._new_flight()
        cdef Submission submission = Submission.__new__(Submission)
        cdef Account *account = self.consumer._account_of(record.topic, record.partition)
        cdef bytes key = record.key
        submission.call = call
        submission.value = value
        submission.is_async = is_async
        submission.place = place
        submission.offset = offset
        submission.record = record
        submission.token = token
        Py_INCREF(submission)
        flight.cargo = <PyObject *>submission
        self._join(flight, self._lane_of(account, <const char *>key if key is not None else NULL,
                                         len(key) if key is not None else 0))

    def set_offload(self, offload):
        """Have synchronous handlers run elsewhere for tasks: offload(call, value) returns an awaitable."""
        self.offload = offload

    def take_answers(self):
        """What became of submitted calls since the last time: (token, None or what was raised) tuples."""
        answers, self.answers = self.answers, []
        return answers

    def fail(self, error):
        """End the run with `error`, which settle() raises. For what a worker can't be blamed with."""
        self.fatal = self.fatal or error
        self.closing = True
        self.consumer.wake()

    def settle(self):
        """Decide on the records that have failed; raises what on_failure raises, and what ends the run."""
        cdef Consumer consumer = self.consumer
        cdef Flight *flight
        cdef Account *account
        if self.fatal is not None:
            fatal, self.fatal = self.fatal, None
            raise fatal
        while self.failed:
            address, stage, error = self.failed.popleft()
            flight = <Flight *><uintptr_t>address
            if flight.stale:
                self._discard(flight)
                continue
            consumer.failures_in_a_row += 1
            account = flight.account
            try:
                became = consumer.on_failure(self._record(flight), stage, error)
            except BaseException:
                self._set_aside(flight)
                raise
            if isinstance(became, tuple):
                # The next attempt comes from here, when its time has come; the lane waits for it.
                delay_s, flight.first_failure_ms, call = became
                if call is not None:
                    Py_XDECREF(flight.call)
                    Py_INCREF(call)
                    flight.call = <PyObject *>call
                flight.attempt += 1
                self._rest(flight)
                self.numbers += 1
                heappush(self.due, (keven_now_ms() + <int64_t>(delay_s * 1000), self.numbers, address))
                continue
            if became == "skipped":
                account.skipped += 1
            else:
                if became == "retried":
                    account.retried += 1
                else:
                    account.dead += 1
                if account.failed_from < 0 or flight.offset < account.failed_from:
                    account.failed_from = flight.offset
            self._leave(flight)
            self._land(flight)

    def tend(self):
        """Make ready what is due; returns in how many seconds that is to be looked at again, None: no need."""
        cdef int64_t now = keven_now_ms()
        cdef int64_t next_ms = -1
        cdef Flight *flight
        cdef Gathering gathering
        while self.due:
            if self.due[0][0] > now:
                next_ms = self.due[0][0]
                break
            flight = <Flight *><uintptr_t>heappop(self.due)[2]
            if flight.lane != NULL:
                flight.lane.resting = False
            flight.state = WAITING
            self._push(flight)
        for gathering in list(self.gatherings):
            if gathering.deadline_ms <= now:
                self._close_gathering(gathering)
            elif next_ms < 0 or gathering.deadline_ms < next_ms:
                next_ms = gathering.deadline_ms
        return None if next_ms < 0 else (next_ms - now) / 1000

    def hold_back(self):
        """Which partitions are to be paused and which to be resumed: two lists of (topic, partition).

        One of which nothing lands while the window is full would hold up the others; one whose first record takes
        its time while those behind it land would have too much come again after a crash.
        """
        cdef Account *account
        cdef int64_t now
        cdef bint stalled = False
        pause = []
        resume = [key for key in self.unpaused if self._is_assigned(key)]
        self.unpaused.difference_update(resume)
        now = keven_now_ms()
        if self.full and now - self.full_since_ms >= STUCK_MS:
            stalled = True
            self.full_since_ms = now
        for key, address in self.consumer.accounts.items():
            account = <Account *><uintptr_t>address
            if account.first_open == NULL and not account.held:
                continue
            if not account.held:
                if account.span >= SPAN or (stalled and account.open and account.landings == account.landings_seen):
                    account.held = True
                    account.held_open = account.open
                    self.load -= account.open
                    self.load_bytes -= account.open_bytes
                    pause.append(key)
            elif account.span < SPAN // 2 and (account.open <= account.held_open // 2):
                account.held = False
                self.load += account.open
                self.load_bytes += account.open_bytes
                resume.append(key)
            if stalled:
                account.landings_seen = account.landings
        if self._has_room():
            self.full = False
        return pause, resume

    def _is_assigned(self, key):
        address = self.consumer.accounts.get(key)
        return address is not None and (<Account *><uintptr_t>address).assigned

    def holds(self, str topic, int partition):
        """Whether a partition is paused for what is in flight of it."""
        return (topic, partition) in self.unpaused or self.consumer._account_of(topic, partition).held

    def hold_on(self, int timeout_ms):
        """Instead of a fetch while the window is full: wait, then take one record, to stay in the group."""
        cdef Consumer consumer = self.consumer
        cdef ssize_t n
        if timeout_ms > 0 and consumer.notes.first == NULL:
            consumer._wait(timeout_ms)
        consumer.polls += 1
        if consumer.suspects is not None:
            consumer.suspects.beat()
        if consumer.count < consumer.batch_size:
            with nogil:
                n = api.consume_batch_queue(consumer.queue, 0, consumer.messages + consumer.count, 1)
            if n > 0:
                alive.messages += n
                consumer.count += n
        return consumer.count

    def drop(self, str topic, int partition):
        """Give the flights of a partition up: what a worker has of it is no longer counted when it ends."""
        cdef Account *account = self.consumer._account_of(topic, partition)
        cdef Flight *flight = <Flight *>account.first_open
        cdef Flight *later
        cdef list payloads = []
        cdef bint rested = False
        account.first_open = account.last_open = NULL
        if not account.held:
            self.load -= account.open
            self.load_bytes -= account.open_bytes
        account.span = account.open = account.open_bytes = 0
        account.leaving = False
        if account.held:
            # librdkafka keeps a partition paused, also over an assignment.
            account.held = False
            self.unpaused.add((topic, partition))
        while flight != NULL:
            later = flight.later
            if flight.state == LANDED:
                self._free_flight(flight)
            else:
                account.stale += 1
                flight.account = NULL
                flight.stale = True
                rested = rested or flight.state == RESTING
                if flight.state != RUNNING:
                    self._shed(flight, payloads)
                elif flight.payload == NULL and flight.message != NULL:
                    # Whoever has it may be longer about it than the client lives, which payloads keep.
                    self.taker.window.message = flight.message
                    self.taker._hand_over(flight)
            flight = later
        if self.full and self.load < self.window and self.load_bytes < self.window_bytes:
            self.full = False
        if not rested:
            return
        # One that rests would hold its lane up until it is due.
        resting, self.due = self.due, []
        for entry in resting:
            flight = <Flight *><uintptr_t>entry[2]
            if not flight.stale:
                heappush(self.due, entry)
                continue
            if flight.lane != NULL:
                flight.lane.resting = False
            self._discard(flight)

    def unfinished(self):
        """The records that workers have, as (topic, partition, offset) tuples."""
        cdef Account *account
        cdef Flight *flight
        found = []
        for (topic, partition), address in self.consumer.accounts.items():
            account = <Account *><uintptr_t>address
            flight = <Flight *>account.first_open
            while flight != NULL:
                if flight.state == RUNNING:
                    found.append((topic, partition, flight.offset))
                flight = flight.later
        return found

    def stop_starting(self):
        """From now on workers take nothing up; what they have is finished."""
        self.closing = True

    def drop_tail(self, partitions=None):
        """Give up the last records of these (topic, partition) pairs, or of all, which nobody has begun.

        They come again. Those before a record that was begun stay: what is behind them would be handled twice.
        """
        cdef Account *account
        cdef Flight *flight
        cdef Flight *later
        cdef Flight *kept
        cdef list payloads = []
        for key, address in self.consumer.accounts.items():
            if partitions is not None and key not in partitions:
                continue
            account = <Account *><uintptr_t>address
            kept = NULL
            flight = <Flight *>account.first_open
            while flight != NULL:
                if flight.state != WAITING:
                    kept = flight
                flight = flight.later
            flight = kept.later if kept != NULL else <Flight *>account.first_open
            account.leaving = True
            if kept == NULL:
                account.first_open = NULL
            else:
                kept.later = NULL
            account.last_open = kept
            while flight != NULL:
                later = flight.later
                account.span -= 1
                account.stale += 1
                flight.account = NULL
                flight.stale = True
                self._unload(account, flight.size_bytes)
                self._shed(flight, payloads)
                flight = later
        for gathering in list(self.gatherings):
            self._close_gathering(gathering)

    def busy(self, partitions=None):
        """Whether records of these (topic, partition) pairs, or any at all, are handled or could be now."""
        cdef Account *account
        cdef Flight *flight
        if partitions is None and (self.running or self.failed):
            return True
        for key, address in self.consumer.accounts.items():
            if partitions is not None and key not in partitions:
                continue
            account = <Account *><uintptr_t>address
            flight = <Flight *>account.first_open
            while flight != NULL:
                if flight.state == RUNNING or (
                        flight.state == WAITING and not self.closing
                        and (flight.lane == NULL or not flight.lane.resting)):
                    return True
                flight = flight.later
        return False

    def clear(self):
        """Free everything, for the consumer closes. What workers still have is theirs: they free it when it ends."""
        cdef Lane *lane
        cdef Flight *flight
        cdef Flight *behind
        cdef Gathering gathering
        cdef int i
        self.closing = True
        for topic, partition in list(self.consumer.accounts):
            self.drop(topic, partition)
        while self.failed:
            self._free(<Flight *><uintptr_t>self.failed.popleft()[0])
        for address in self.ended:
            flight = <Flight *><uintptr_t>address
            if flight.cargo != NULL and isinstance(<object>flight.cargo, Gathering):
                self._free_members(<Gathering>flight.cargo)
            self._free(flight)
        self.ended.clear()
        for gathering in self.gatherings:
            gathering.route.gathering = None
            self._free_members(gathering)
        self.gatherings.clear()
        flight = self.ready_first
        self.ready_first = NULL
        self.ready = 0
        for i in range(BUCKETS + 1):
            while flight != NULL:
                behind = flight.behind
                if flight.cargo != NULL and isinstance(<object>flight.cargo, Gathering):
                    self._free_members(<Gathering>flight.cargo)
                flight.lane = NULL
                self._free_flight(flight)
                flight = behind
            # The lanes stay for those that workers have: without what waits in them.
            if i < BUCKETS:
                lane = self.buckets[i]
                while lane != NULL:
                    if lane.first != NULL:
                        lane.last.behind = flight
                        flight = lane.first
                        lane.first = lane.last = NULL
                    lane = lane.chained
        self._free_landed()

    cdef int _free_members(self, Gathering gathering) except -1:
        cdef Py_ssize_t i
        for i in range(gathering.count):
            self._free(gathering.members[i])
        gathering.count = 0
        return 0

    @property
    def idle(self):
        """Whether nothing is in flight, waits, or has to be settled."""
        return not (self.load or self.running or self.ready or self.failed or self.answers or self.due
                    or self.gatherings)


cdef bint any_done(Gathering gathering, object result) except -1:
    """Whether one of the records of a batch is done, by what its handler returned."""
    if result is None:
        return True
    if batch_result_error(gathering.route.name, result, gathering.count) is not None:
        return False
    return any(outcome is None for outcome in result)


cdef object batch_result_error(str name, object result, Py_ssize_t count):
    """What is wrong with what a batch handler returned: None, or a list with None or an Outcome for each event."""
    if isinstance(result, Outcome):
        return result
    if not isinstance(result, (list, tuple)):
        error = result_error(name, result)
        if error is not None:
            return error
    return wrong_outcomes(f"the batch handler of {name}", result, count)


@cython.final
@cython.no_gc_clear
cdef class Worker:
    """Takes up flights that are ready, one after the other.

    Arguments:
        context: the contextvars.Context that each record starts with.

    One thread or task at a time may use it; in an event loop all workers and the owner share the loop's thread.
    """

    # What run_in_task() returns when a handler has changed the context of its task: the task has to be replaced.
    RETIRE = RETIRE_MARK

    def __init__(self, Flow flow not None, context):
        self.flow = flow
        self.base = context
        self.published = []
        self.window = Payload.of(flow.consumer.handle)

    def __dealloc__(self):
        # Of a task that was cancelled: its record is neither done nor failed. Its message has become a payload when its
        # partition was given up; where the consumer was not even closed, it is left alone.
        cdef Flight *flight = self.flight
        if flight == NULL or not self.flow.closing:
            return
        if flight.cargo != NULL and isinstance(<object>flight.cargo, Gathering):
            self.flow._free_members(<Gathering>flight.cargo)
        self.flow._free(flight)

    def set_outbox(self, outbox):
        """Send the `messages` that handlers leave in an outbox when they have succeeded: outbox.send() or .drop()."""
        self.outbox = outbox
        self.published = outbox.messages

    @property
    def handling(self):
        """Whether a handler runs."""
        return self.flight != NULL

    def record_in_hand(self):
        """The Record that this worker handles; raises LookupError when there is none, or a batch."""
        cdef Flight *flight = self.flight
        if flight == NULL or (flight.cargo == NULL and flight.message == NULL):
            raise LookupError("no record is being handled")
        if flight.cargo == NULL:
            return self.flow._record(flight)
        if isinstance(<object>flight.cargo, Submission):
            return (<Submission>flight.cargo).record
        raise LookupError("a batch is being handled: current_records() has its records")

    def records_in_hand(self):
        """The Records that this worker handles, in the order of their events."""
        cdef Gathering gathering
        if self.flight == NULL or self.flight.cargo == NULL or not isinstance(<object>self.flight.cargo, Gathering):
            return [self.record_in_hand()]
        gathering = <Gathering>self.flight.cargo
        return [self.flow._record(gathering.members[i]) for i in range(gathering.count)
                if gathering.members[i].message != NULL]

    def run(self, bint in_owner=False):
        """Handle what is ready, in this thread; all routes must be synchronous. The owner comes back after 200 ms.

        An exception that is not an Exception ends the run: it passes through to the owner; what another thread met of
        that kind is raised by settle().
        """
        self.context = self.base.copy()
        self.in_task = False
        self.in_owner = in_owner
        PyContext_Enter(self.context)
        try:
            if self._run(OWNER_SLICE_MS if in_owner else THREAD_HAS_NO_END) is not None:
                raise errors.InternalError("a coroutine in a synchronous run")
        finally:
            PyContext_Exit(self.context)

    cpdef run_in_task(self, context, result):
        """Handle what is ready until something has to be awaited; `result` is what that was before.

        Called in the worker task, whose contextvars.Context is `context` (None on Python 3.10). Returns an awaitable;
        None when nothing is ready, or other tasks should have their turn; RETIRE.
        """
        self.context = context
        self.in_task = True
        if self.awaiting:
            self.awaiting = False
            self._finish(result)
        return self._run(TASK_SLICE_MS)

    async def serve(self, context, rest, blame):
        """Handle records until the flow closes; true: a handler has changed the context, a fresh task has to go on.

        The body of a worker task, compiled since it runs once a record.

        Arguments:
            context: as for run_in_task().
            rest: rest() is awaited when nothing is ready.
            blame: blame(CancelledError) gives what a handler has failed with that let it escape; None: this task is
                being cancelled.
        """
        cdef Flow flow = self.flow
        result = None
        while True:
            pending = self.run_in_task(context, result)
            result = None
            if pending is None:
                if flow.closing:
                    return False
                await rest()
            elif pending is RETIRE_MARK:
                return True
            else:
                try:
                    result = await pending
                except GeneratorExit:
                    raise
                except CancelledError as error:
                    failure = blame(error)
                    if failure is None:
                        raise
                    self.failed(failure)
                except BaseException as error:  # what is not an Exception ends the run, in the owner
                    self.failed(error)

    def failed(self, error):
        """What run_in_task() returned has raised `error`."""
        if not self.awaiting:
            raise errors.InternalError("failed() with no record in hand")
        self.awaiting = False
        self._failed(error)

    cdef object _run(self, int64_t slice_ms):
        cdef Flow flow = self.flow
        cdef Flight *flight
        cdef int64_t end_ms = 0
        while True:
            # With one record that is awaited nobody looks at the clock.
            if slice_ms != THREAD_HAS_NO_END:
                if end_ms == 0:
                    end_ms = 1
                elif end_ms == 1:
                    end_ms = keven_now_ms() + slice_ms
                elif keven_now_ms() >= end_ms:
                    return None
            if context_changed(self.context, self.base):
                if self.in_task:
                    return RETIRE_MARK
                PyContext_Exit(self.context)
                self.context = self.base.copy()
                PyContext_Enter(self.context)
            flight = flow._start()
            if flight == NULL:
                return None
            self.flight = flight
            try:
                result = self._call(flight)
            except BaseException as error:
                self.awaiting = False
                self._failed(error)
                if not isinstance(error, Exception) and self.in_owner:
                    flow.fatal = None
                    raise
                continue
            if self.awaiting:
                return result
            if result is FAILED:
                error, self.error = self.error, None
                self._failed(error)
                if not isinstance(error, Exception) and self.in_owner:
                    flow.fatal = None
                    raise error
            else:
                self._finish(result)

    cdef object _call(self, Flight *flight):
        cdef Route route
        self.stage = "handle"
        if flight.cargo != NULL:
            if isinstance(<object>flight.cargo, Gathering):
                route = (<Gathering>flight.cargo).route
                events = self.flow._board(<Gathering>flight.cargo)
                if not events:
                    return None
                return self._made(route.call, events, route.is_async)
            self.flow._enter(flight, (<Submission>flight.cargo).place, (<Submission>flight.cargo).offset)
            return self._made((<Submission>flight.cargo).call, (<Submission>flight.cargo).value,
                              (<Submission>flight.cargo).is_async)
        self.flow._enter(flight, flight.account.place, flight.offset)
        route = <Route>flight.route
        if flight.tombstone:
            return self._made(route.on_tombstone, self.flow._record(flight), route.tombstone_is_async)
        self.stage = "decode"
        value = self._value(flight)
        if value is SKIPPED:
            return SKIPPED
        self.stage = "handle"
        route = <Route>flight.route
        if flight.call != NULL:
            if not route.is_async:
                return self._made(<object>flight.call, value, False)
            result = (<object>flight.call)(value)
            self.awaiting = inspect.isawaitable(result)
            return result
        if route.with_topic:
            call = partial(route.call, topic=api.topic_name(flight.message.rkt).decode())
            return self._made(call, value, route.is_async)
        return self._made(route.call, [value] if route.batch_size else value, route.is_async)

    cdef inline object _made(self, object call, object value, bint is_async):
        """What call(value) gives; of a synchronous one, in an event loop that has threads for these, the awaitable."""
        cdef PyObject *called
        if self.in_task and self.flow.offload is not None and not is_async:
            result = self.flow.offload(call, value)
            self.awaiting = True
            return result
        called = keven_call(<PyObject *>call, <PyObject *>value)
        if called == NULL:
            # Not raised, or the frames here would stand in the traceback that is logged.
            self.error = take_exception()
            return FAILED
        result = <object>called
        Py_DECREF(result)
        self.awaiting = is_async
        return result

    cdef object _value(self, Flight *flight):
        """The decoded value of a record; SKIPPED when nobody handles what it turns out to be. Raises as decoding."""
        cdef Consumer consumer = self.flow.consumer
        cdef rd_kafka_message_t *message = flight.message
        cdef Account *account = flight.account
        cdef Route route = <Route>flight.route
        cdef void *found = flight.route
        cdef PyObject *value
        if flight.codec != NULL:
            coded = consumer.table.decode_by_codec(
                <object>flight.codec, PyBytes_FromStringAndSize(<const char *>message.payload, message.len), route)
            return SKIPPED if coded is None else coded[1]
        if message.len > UNCHECKED and not route.raw:
            consumer.table.check(<const char *>message.payload, message.len)
        if route.raw:
            return PyBytes_FromStringAndSize(<const char *>message.payload, message.len)
        if flight.payload != NULL:
            value = consumer._decode(route, flight.payload, message)
        elif route.copied or (route.keeps and message.len < SHARE_FROM):
            value = consumer._decode_copy(route, message)
        else:
            self.window.message = message
            value = consumer._decode(route, <PyObject *>self.window, message)
            if value != NULL and Py_REFCNT(<PyObject *>self.window) > 1:
                if message.len < SHARE_FROM:
                    route.keeps = True
                    Py_DECREF(<object>value)
                    value = consumer._decode_copy(route, message)
                if value != NULL and Py_REFCNT(<PyObject *>self.window) > 1:
                    self._hand_over(flight)
        if value == NULL:
            error = take_exception()
            if Py_REFCNT(<PyObject *>self.window) > 1:  # by a frame of the traceback, say
                self._hand_over(flight)
            error = consumer._decode_otherwise(account, message, error, &found, &value)
            if error is not None:
                raise error
            if value == NULL:
                return SKIPPED
            flight.route = found
        decoded = <object>value
        Py_DECREF(decoded)
        return decoded

    cdef void _hand_over(self, Flight *flight) noexcept:
        """Give the message to the window that shows it, because something refers to that: there is a new one."""
        if flight.payload == <PyObject *>self.window:
            return
        if flight.payload != NULL:
            self.window.keeper = <object>flight.payload
        else:
            self.window.own()
            Py_INCREF(self.window)
            flight.payload = <PyObject *>self.window
        self.window = Payload.of(self.flow.consumer.handle)

    cdef int _finish(self, object result) except -1:
        cdef Flight *flight = self.flight
        cdef Flow flow = self.flow
        self.flight = NULL
        if flight.cargo != NULL and isinstance(<object>flight.cargo, Gathering):
            if PyList_GET_SIZE(self.published):
                error = self._send(any_done((<Gathering>flight.cargo), result))
                if error is not None:
                    return flow._unboard(self, flight, None, error)
            return flow._unboard(self, flight, result, None)
        if result is not None:
            if result is SKIPPED:
                return flow._skip(flight)
            if (flight.cargo == NULL and flight.call == NULL and not flight.tombstone
                    and (<Route>flight.route).batch_size):
                error = batch_result_error((<Route>flight.route).name, result, 1)
                if error is None:
                    error = result[0]
            else:
                error = result_error((<Route>flight.route).name if flight.cargo == NULL else "the record", result)
            if error is not None:
                self._send(False)
                return flow._fail(flight, "handle", error)
        if PyList_GET_SIZE(self.published):
            error = self._send(True)
            if error is not None:
                return flow._fail(flight, "handle", error)
        return flow._done(flight)

    cdef object _send(self, bint succeeded):
        """Send or drop what a handler has published; returns what failed."""
        if PyList_GET_SIZE(self.published):
            try:
                if succeeded:
                    self.outbox.send()
            except Exception as error:
                self.outbox.drop()
                return error
            if not succeeded:
                self.outbox.drop()
        return None

    cdef int _failed(self, object error) except -1:
        cdef Flight *flight = self.flight
        self.flight = NULL
        if flight.cargo != NULL and isinstance(<object>flight.cargo, Gathering):
            # What the records before the one that has failed have led to goes out: they are done.
            failure = self._send(isinstance(error, BatchError) and 0 < error.index < (<Gathering>flight.cargo).count)
            return self.flow._unboard(self, flight, None, error if failure is None else failure)
        self._send(False)
        if isinstance(error, BatchError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        return self.flow._fail(flight, self.stage, error)
