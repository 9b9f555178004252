"""The consumer's hot path: fetch a batch without the GIL, then identify, look up, decode, call and account each record.

Ownership: a Consumer owns its fetched messages and gives each back exactly once, in finish_batch() or close(); one
whose value is still referred to after decoding is handed to its Payload instead.
Threads: one owner thread calls everything but wake(), `closed` and what Membership gives to any thread.

Delivery: at-least-once. A record's offset is stored only when all of its handlers have returned (or its dead-letter
copy is confirmed), once per batch and partition; librdkafka commits what is stored in the background.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.list cimport PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF
from libc.stdint cimport int64_t, uint8_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memmove, strcmp

from keven_core._native.calls cimport (
    Py_REFCNT, PyBytes_FromStringAndSize_raw, PyContext_Enter, PyContext_Exit, PyErr_Fetch, PyErr_NormalizeException,
    PyErr_SetObject, PyException_SetTraceback, keven_call, keven_now_ms, keven_prefetch_value
)
from keven_core._native.context cimport context_changed
from keven_core._native.dispatch cimport DispatchTable, Route
from keven_core._native.handle cimport error_of, error_of_object, free_partition_list, new_conf
from keven_core._native.library cimport alive, api
from keven_core._native.membership cimport REACHED, UNBOUNDED, Account, Membership
from keven_core._native.message cimport Payload, record_of
from keven_core._native.returns cimport (
    Batch, Returns, free_messages, free_returned, free_returns, give_back, new_batch
)
from keven_core._native.suspects cimport Suspects
from rdkafka cimport *

import contextvars
import time
import warnings

from keven_core.kafka import errors
from keven_core.kafka.outcomes import Outcome

cdef enum:
    # How long run() goes on with one batch: then the group is attended to, and the rest of the batch is next.
    SLICE_MS = 200
    # The clock costs 25 ns, so between two looks at it there are up to this many records, while they are quick.
    STRIDE = 16
    # Kafka's number for this request.
    FETCH = 1

cdef object RETIRE_MARK = object()


cdef int _on_response(rd_kafka_t *rk, int sockfd, const char *broker_name, int32_t broker_id, int16_t api_key,
                      int16_t api_version, int32_t correlation_id, size_t size, int64_t rtt, int err,
                      void *opaque) noexcept nogil:
    # On the broker thread, which holds no lock here (rdkafka_buf.c, rd_kafka_buf_callback).
    if api_key == FETCH and err == 0:
        free_returned(<Returns *>opaque)
    return 0


cdef int _on_new(rd_kafka_t *rk, const rd_kafka_conf_t *conf, void *opaque, char *errstr,
                 size_t errstr_size) noexcept nogil:
    return api.interceptor_add_on_response_received(rk, b"keven", _on_response, opaque)


cdef void _answer_while_closing(rd_kafka_t *rk, rd_kafka_event_t *event) noexcept nogil:
    # librdkafka waits for an answer to each rebalance before it leaves the group; during close any unassign is total.
    cdef rd_kafka_error_t *error
    cdef const char *protocol = api.rebalance_protocol(rk)
    if (protocol != NULL and strcmp(protocol, b"COOPERATIVE") == 0
            and api.event_error(event) == RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS):
        error = api.incremental_unassign(rk, api.event_topic_partition_list(event))
        if error != NULL:
            api.error_destroy(error)
    else:
        api.assign(rk, NULL)


cdef void _add_offset(rd_kafka_topic_partition_list_t *parts, Account *account, int64_t offset, int epoch) noexcept:
    cdef rd_kafka_topic_partition_t *part = api.topic_partition_list_add(parts, account.topic, account.partition)
    part.offset = offset
    # Without the epoch a truncated log can't be noticed after a restart (librdkafka#4442).
    api.topic_partition_set_leader_epoch(part, epoch)
    part.opaque = account


cdef void _restore_exception(object error) noexcept:
    """Set `error` as the exception that the C caller finds."""
    PyErr_SetObject(type(error), error)


cdef object result_error(str name, object result):
    """What is wrong with the result of a synchronous handler: it is an outcome, or work that is only prepared."""
    cdef bint generator = hasattr(result, "__next__") or hasattr(result, "__anext__")
    if isinstance(result, Outcome):
        return result
    if not generator and not hasattr(result, "__await__"):
        return None
    if hasattr(result, "close"):
        result.close()
    advice = "it has a `yield`, so calling it runs nothing" if generator else "declare it `async def`"
    return errors.UsageError(
        f"the handler of {name} returned {type(result).__name__} instead of doing its work: {advice}")


cdef object take_exception():
    """The exception that is set, normalized and cleared, with its traceback."""
    cdef PyObject *type = NULL
    cdef PyObject *value = NULL
    cdef PyObject *traceback = NULL
    PyErr_Fetch(&type, &value, &traceback)
    PyErr_NormalizeException(&type, &value, &traceback)
    if traceback != NULL:
        PyException_SetTraceback(value, traceback)
    error = <object>value
    Py_XDECREF(type)
    Py_XDECREF(value)
    Py_XDECREF(traceback)
    return error


@cython.final
@cython.no_gc_clear
cdef class Consumer(Membership):
    """A Kafka consumer with its batch, its accounts and its dispatch table.

    Arguments:
        options: librdkafka settings, str to str; offset store, log queue and callbacks are set here.
        table: the frozen DispatchTable; None: no dispatch (raw drain).
        on_failure: called as on_failure(record, stage, error) for a record that failed ("decode" or "handle"), in the
            owner's thread; `error` may be an Outcome. It returns what becomes of the record: "retried" or "skipped",
            anything else: dead-lettered; a copy must have been submitted then. What it raises ends the batch before
            this record, which is then not accounted.
        parks: topics whose records are not handled but handed over: on_parked(record, leader_epoch). They are counted
            by settle(), and their offsets stored by store().
        batch_size: messages per batch.
        store_offsets: false: offsets are neither stored nor committed.
        context: the contextvars.Context that handlers see a copy of; None: a copy of the current one.
        suspects: memory shared with the supervisor of this process. A suspect in it is not handled before
            admit_suspect(); one that is condemned fails without having been handled.
    """

    # What run_in_task() returns when a handler has changed the context of its task: the task has to be replaced.
    RETIRE = RETIRE_MARK

    def __cinit__(self):
        self.queue = NULL
        self.returns = NULL
        self.batch = NULL
        self.messages = NULL
        self.row_errors = []
        self.kind = "consumer"

    def __init__(self, dict options not None, DispatchTable table=None, on_failure=None, *, Py_ssize_t batch_size=200,
                 bint store_offsets=True, context=None, parks=(), on_parked=None, Suspects suspects=None,
                 outbox=None):
        cdef rd_kafka_conf_t *conf
        cdef int cell
        if self.handle is not None:
            raise errors.UsageError("a Consumer can't be initialized twice")
        self.table = table if table is not None else DispatchTable()
        self.on_failure = on_failure
        self.outbox = outbox
        self.published = outbox.messages if outbox is not None else []
        if suspects is not None:
            self.suspects = suspects
            cell = suspects.enter(-1, -1)
            if cell >= 0:
                self.cell = suspects.cell(cell)
        self.parked_topics = frozenset(parks)
        self.on_parked = on_parked
        self.batch_size = batch_size
        self.store_offsets = store_offsets
        self.base_context = contextvars.copy_context() if context is None else context
        conf = new_conf({**options, "enable.auto.offset.store": "false", "log.queue": "true"})
        self._take_callbacks(conf)
        api.conf_set_events(conf, RD_KAFKA_EVENT_LOG | RD_KAFKA_EVENT_ERROR | RD_KAFKA_EVENT_STATS
                            | RD_KAFKA_EVENT_OAUTHBEARER_TOKEN_REFRESH)
        self.returns = <Returns *>calloc(1, sizeof(Returns))
        if self.returns == NULL:
            raise MemoryError()
        self.returns.destroy = <void (*)(void *) noexcept nogil>api.message_destroy
        api.conf_interceptor_add_on_new(conf, b"keven", _on_new, self.returns)
        try:
            self._start(RD_KAFKA_CONSUMER, conf)
            self._open_pipe()
        finally:
            if self.handle is not None:
                self.handle.attached = self.returns
                self.handle.free_attached = free_returns
            else:
                free_returns(self.returns)
        self.batch = new_batch(self.returns, batch_size)
        if self.batch == NULL:
            raise MemoryError()
        self.messages = <rd_kafka_message_t **>self.batch.messages
        self.window = Payload.of(self.handle)
        with nogil:
            self.queue = api.queue_get_consumer(self.handle.rk)
        if self.queue == NULL:
            self.closed = True  # nothing to leave
            raise errors.ConfigurationError("a consumer needs group.id, also when it does not join the group")
        with nogil:
            api.queue_io_event_enable(self.queue, self.wake_write, b"c", 1)
        alive.queues += 1

    def __dealloc__(self):
        if not self.closed and self.handle is not None and not self.handle.forked():
            warnings.warn(f"unclosed consumer {self!r}: call close()", ResourceWarning, stacklevel=1)
        if self.handle is not None and not self.handle.forked():
            self._release(self.count)
            if not self.closed:
                with nogil:
                    free_returned(self.returns)
            self._drop_consumer_queue()
            self._drop_queues()
        free(self.batch)

    cdef void _drop_consumer_queue(self) noexcept:
        if self.queue != NULL:
            with nogil:
                api.queue_io_event_enable(self.queue, -1, NULL, 0)
                api.queue_destroy(self.queue)
            self.queue = NULL
            alive.queues -= 1

    # --- fetch --------------------------------------------------------------------------------------------------------

    def fetch(self, int timeout_ms, int linger_ms=0):
        """Take a batch of up to `batch_size` messages; returns how many.

        Waits up to `timeout_ms` for the first message (0: not at all) and then up to `linger_ms` for a fuller batch,
        GIL released; returns early when woken. Signal handlers run on return. What finish_batch() has left in hand is
        topped up without waiting.
        """
        cdef ssize_t n
        cdef ssize_t more
        self._rk()
        self.polls += 1
        if self.suspects is not None:
            self.suspects.beat()
        if self.count:
            return self.top_up()
        # rdkafka.h: the call returns when the array is full *or* the timeout has passed, so it is never given one to
        # wait with: the queue's I/O event wakes the pipe instead.
        with nogil:
            n = api.consume_batch_queue(self.queue, 0, self.messages, self.batch_size)
        if n == 0 and timeout_ms != 0 and self.notes.first == NULL:
            self._wait(timeout_ms)
            with nogil:
                n = api.consume_batch_queue(self.queue, 0, self.messages, self.batch_size)
        if n < 0:
            raise errors.InternalError("rd_kafka_consume_batch_queue failed")
        alive.messages += n
        self.count = n
        if linger_ms > 0 and 0 < n < self.batch_size and self.notes.first == NULL:
            with nogil:
                more = api.consume_batch_queue(self.queue, linger_ms, self.messages + n, self.batch_size - n)
            if more > 0:
                alive.messages += more
                self.count += more
        self._start_slice()
        return self.count

    def top_up(self):
        """Add what has come meanwhile to a batch in hand of which nothing was handled yet; never waits."""
        cdef ssize_t more
        self._rk()
        if self.index == 0 and self.count < self.batch_size and self.notes.first == NULL:
            with nogil:
                more = api.consume_batch_queue(self.queue, 0, self.messages + self.count, self.batch_size - self.count)
            if more > 0:
                alive.messages += more
                self.count += more
        self._start_slice()
        return self.count

    cdef inline void _start_slice(self) noexcept:
        self.looked_ms = keven_now_ms()
        self.slice_end_ms = self.looked_ms + SLICE_MS
        self.stride = self.until_look = 1

    cdef bint _slice_over(self) noexcept:
        cdef int64_t now = keven_now_ms()
        # Handlers that take their time are looked at one by one.
        self.stride = min(STRIDE, 2 * self.stride) if now - self.looked_ms < 2 else 1
        self.until_look = self.stride
        self.looked_ms = now
        return now >= self.slice_end_ms and self.index > 0

    def drain(self, Py_ssize_t wanted, int timeout_ms):
        """Take and free `wanted` messages without looking at them; returns how many came within the time.

        The ceiling that benchmarks/consume.py compares with: one C loop, GIL released.
        """
        cdef Py_ssize_t got = 0
        cdef size_t size
        cdef ssize_t n, i
        self._rk()
        deadline = time.monotonic() + timeout_ms / 1000
        while got < wanted:
            with nogil:
                while got < wanted:
                    n = api.consume_batch_queue(self.queue, 0, self.messages, self.batch_size)
                    if n <= 0:
                        break
                    size = 0
                    for i in range(n):
                        if self.messages[i].err == 0:
                            got += 1
                        size += self.messages[i].len + MESSAGE_OVERHEAD
                    self.batch.bytes = size
                    self.count = n
                    self._give_back(n)
                    self.count = 0
            if got < wanted:
                if self.notes.first != NULL:
                    return got
                self._wait(100)
                if time.monotonic() > deadline:
                    break
        return got

    # --- handle -------------------------------------------------------------------------------------------------------

    def run(self):
        """Handle records of the batch in hand, in this thread; all routes must be synchronous.

        Comes back when the batch is through, or with the first record that ends later than 200 ms after fetch().
        Each record sees a copy of the context in which the consumer was made. An exception that is not an Exception
        (KeyboardInterrupt, SystemExit) passes through, and its record is not accounted.
        """
        self.context = self.base_context.copy()
        self.in_task = False
        PyContext_Enter(self.context)
        try:
            if self._run() is not None:
                raise errors.InternalError("a coroutine in a synchronous run")
            # Not so when something was raised that ends the process: then the record in hand is the suspect.
            self.cell.offset = -1
        finally:
            PyContext_Exit(self.context)

    def run_in_task(self, context):
        """Handle records of the batch in hand until one has to be awaited.

        Called in the worker task, whose contextvars.Context is `context` (None where that can't be known: Python 3.10).
        Returns a coroutine, which the task awaits before it calls this again (or failed(), if it raised); None as run()
        comes back; RETIRE when a handler has changed the context, so that a fresh task has to go on.
        """
        self.context = context
        self.in_task = True
        if self.awaiting:
            self.awaiting = False
            if PyList_GET_SIZE(self.published) == 0 or self._sent(self.current, self._in_hand()):
                self.current.done += 1
                self._advance(self.current, self._in_hand())
        pending = self._run()
        if not self.awaiting:
            self.cell.offset = -1
        return pending

    def failed(self, error):
        """Account the record in hand as failed: the coroutine that run_in_task() returned has raised `error`.

        Also for an Outcome that it has returned.
        """
        if not self.awaiting:
            raise errors.InternalError("failed() with no record in hand")
        self.awaiting = False
        self._failed(self.current, self._in_hand(), "handle", error)

    def record_in_hand(self):
        """The Record that is being handled now; raises LookupError when there is none."""
        if not self.handling or self.index >= self.count:
            raise LookupError("no record is being handled")
        return record_of(self._in_hand())

    @property
    def in_handler(self):
        """Whether a record is being handled now."""
        return self.handling and self.index < self.count

    def position_in_hand(self):
        """(topic, partition, offset) of the record that is being handled now; None: there is none. From any thread."""
        cdef rd_kafka_message_t *message
        if not self.handling or self.index >= self.count:
            return None
        message = self._in_hand()
        if message == NULL or message.rkt == NULL:
            return None  # a row that is an error
        return api.topic_name(message.rkt).decode(), message.partition, message.offset

    cdef rd_kafka_message_t *_in_hand(self) noexcept:
        return self.messages[self.index] if self.payload is None else self.payload.message

    cdef inline void _advance(self, Account *account, rd_kafka_message_t *message) noexcept:
        """The record in hand is accounted: its offset may be stored at the end of the batch."""
        account.next_offset = message.offset + 1
        if self.payload is None:
            account.last = message
        else:
            # A shared value's message may be gone before the batch ends, so its epoch is read now.
            account.leader_epoch = api.message_leader_epoch(message)
            account.last = NULL
            self.payload = None
        self.index += 1

    cdef object _run(self):
        cdef Py_ssize_t count = self.count
        cdef rd_kafka_message_t *message
        cdef Account *account
        cdef DispatchTable table = self.table
        cdef Route route
        cdef void *found
        cdef PyObject *value
        cdef PyObject *result
        cdef bint named = False
        cdef bint coded
        cdef int verdict
        self.handling = True
        while self.index < count and not self.ended:
            self.until_look -= 1
            if self.until_look < 0 and self._slice_over():
                break
            if context_changed(self.context, self.base_context):
                if self.in_task:
                    self.handling = False
                    return RETIRE_MARK
                PyContext_Exit(self.context)
                self.context = self.base_context.copy()
                PyContext_Enter(self.context)

            message = self.messages[self.index]
            if self.index + AHEAD < count:
                keven_prefetch_value(self.messages[self.index + AHEAD].payload)

            account = self.current
            if message.err != 0 or message.rkt != self.current_rkt or message.partition != account.partition:
                account = self._next_account(message)
                if account == NULL:
                    continue
            if account.end_offset != UNBOUNDED and self._is_past_end(account, message):
                continue
            if message.offset <= account.last_suspect:
                verdict = self._at_suspect(account, message)
                if verdict == WAIT:
                    return None
                if verdict == ACCOUNTED:
                    continue
            account.received += 1
            self.bytes += message.len
            if account.parks:
                self._park(account, message)
                continue
            self.cell.offset = message.offset

            # Identify and look up. `found` is borrowed from the table.
            found = account.bound
            if message.payload == NULL:
                pending = self._tombstone(account, message)
                if pending is not None:
                    return pending
                continue
            coded = account.codec != NULL and table.is_coded(
                <object>account.codec, <const char *>message.payload, message.len, message, None)
            if found == NULL and not coded:
                found = table.peek(<const char *>message.payload, message.len, &named)
                if found == NULL:
                    if named and table.unnamed is None:
                        account.skipped += 1
                        self._advance(account, message)
                        continue
                    found = self._identify(account, message, named)
                    if found == NULL:
                        continue

            # Decode.
            if coded:
                value = self._decode_by_codec(account, message, &found)
                if value == NULL:
                    continue
                route = <Route>found
            else:
                route = <Route>found
                if message.len > UNCHECKED and not route.raw and not self._acceptable(account, message):
                    continue
                if route.raw:
                    value = PyBytes_FromStringAndSize_raw(<const char *>message.payload, message.len)
                    if value == NULL:
                        raise MemoryError()
                else:
                    if route.copied or (route.keeps and message.len < SHARE_FROM):
                        value = self._decode_copy(route, message)
                    else:
                        self.window.message = message
                        value = self._decode(route, <PyObject *>self.window, message)
                        if value != NULL and Py_REFCNT(<PyObject *>self.window) > 1:
                            if message.len < SHARE_FROM:
                                route.keeps = True
                                Py_DECREF(<object>value)
                                value = self._decode_copy(route, message)
                            if value != NULL and Py_REFCNT(<PyObject *>self.window) > 1:
                                self._hand_over()
                    if value == NULL:
                        value = self._decode_failed(account, message, &found)
                        if value == NULL:
                            continue
                        route = <Route>found

            # Call.
            if route.with_topic:
                result = self._call_with_topic(route, message, value)
            else:
                result = keven_call(<PyObject *>route.call, value)
            Py_DECREF(<object>value)
            if result == NULL:
                error = take_exception()
                self._failed(account, message, "handle", error)
            elif route.is_async:
                pending = <object>result
                Py_DECREF(pending)
                self.awaiting = True
                return pending
            elif result == <PyObject *>None or self._plain_result(account, message, route, <object>result):
                Py_DECREF(<object>result)
                if PyList_GET_SIZE(self.published) == 0 or self._sent(account, message):
                    account.done += 1
                    self._advance(account, message)
            else:
                Py_DECREF(<object>result)
        self.handling = False
        return None

    cdef Account *_next_account(self, rd_kafka_message_t *message) except? NULL:
        """The account of a row that is of another partition than the one before it.

        NULL: it is an error, or its partition is not assigned; it has been seen to.
        """
        cdef Account *account = NULL
        if message.err != 0:
            self._error_row(message)
        else:
            account = self._account(message)
        if account == NULL:
            self.index += 1
        return account

    cdef bint _is_past_end(self, Account *account, rd_kafka_message_t *message) noexcept:
        """Whether a bounded run ends before this record; then it has been passed over."""
        if message.offset >= account.end_offset:
            account.end_offset = REACHED
        if account.end_offset != REACHED:
            return False
        self.index += 1
        return True

    cdef inline PyObject *_decode(self, Route route, PyObject *value, rd_kafka_message_t *message) noexcept:
        """A new reference to the decoded value, or NULL with the exception set."""
        if message.len and (<uint8_t *>message.payload)[0] < 0x80:
            return keven_call(<PyObject *>route.decode_json, value)
        return keven_call(<PyObject *>route.decode_msgpack, value)

    cdef PyObject *_decode_copy(self, Route route, rd_kafka_message_t *message) noexcept:
        """As _decode, from bytes made of the value."""
        cdef PyObject *value
        cdef PyObject *copy = PyBytes_FromStringAndSize_raw(<const char *>message.payload, message.len)
        if copy == NULL:
            return NULL
        value = self._decode(route, copy, message)
        Py_DECREF(<object>copy)
        return value

    cdef PyObject *_decode_by_codec(self, Account *account, rd_kafka_message_t *message, void **found) except? NULL:
        """As _decode, by the topic's codec, which finds the Route as well; NULL: the record has been accounted for."""
        cdef PyObject *value
        cdef tuple decoded
        try:
            decoded = self.table.decode_by_codec(
                <object>account.codec, PyBytes_FromStringAndSize(<const char *>message.payload, message.len),
                <Route>account.bound if account.bound != NULL else None)
        except errors.UndecodableError as error:
            self._failed(account, message, "decode", error)
            return NULL
        if decoded is None:
            account.skipped += 1
            self._advance(account, message)
            return NULL
        found[0] = <void *>decoded[0]  # kept by the table
        event = decoded[1]
        value = <PyObject *>event
        Py_INCREF(event)
        return value

    cdef int _hand_over(self) except -1:
        """Give the message in hand to the window that shows it, because something refers to that: it gets a new one."""
        cdef Payload window = Payload.of(self.handle)
        self.window.own()
        self.payload = self.window
        self.messages[self.index] = NULL
        self.window = window
        return 0

    cdef PyObject *_call_with_topic(self, Route route, rd_kafka_message_t *message, PyObject *value) noexcept:
        cdef PyObject *result = NULL
        try:
            outcome = route.call(<object>value, topic=api.topic_name(message.rkt).decode())
            result = <PyObject *>outcome
            Py_INCREF(outcome)
            return result
        except BaseException as error:
            _restore_exception(error)
            return NULL

    cdef void *_identify(self, Account *account, rd_kafka_message_t *message, bint named) except? NULL:
        """The slow way to a Route, for what peek() could not decide; NULL: the record has been accounted for."""
        cdef void *found = NULL
        error = self._find_route(message, named, &found)
        if error is not None:
            self._failed(account, message, "decode", error)
        elif found == NULL:
            account.skipped += 1
            self._advance(account, message)
        return found

    cdef object _find_route(self, rd_kafka_message_t *message, bint named, void **found):
        """Identify a message that peek() could not decide on; `found` stays NULL when nobody handles it.

        Returns what is wrong with the message, or None.
        """
        if named:
            found[0] = <void *>self.table.unnamed if self.table.unnamed is not None else NULL
            return None
        try:
            route = self.table.identify(<const char *>message.payload, message.len, message, None)
        except errors.UndecodableError as error:
            return error
        if route is not None:
            found[0] = <void *>route  # kept by the table
        return None

    cdef object _find_route_by_codec(self, Account *account, rd_kafka_message_t *message, void **found):
        """As _find_route, for a value that its topic's codec reads."""
        found[0] = NULL
        try:
            opened = self.table.open_by_codec(
                <object>account.codec, PyBytes_FromStringAndSize(<const char *>message.payload, message.len),
                <Route>account.bound if account.bound != NULL else None)
        except errors.UndecodableError as error:
            return error
        if opened is not None:
            found[0] = <void *>opened[0]  # kept by the table
        return None

    cdef bint _acceptable(self, Account *account, rd_kafka_message_t *message) except -1:
        try:
            self.table.check(<const char *>message.payload, message.len)
        except errors.UndecodableError as error:
            self._failed(account, message, "decode", error)
            return False
        return True

    cdef PyObject *_decode_failed(self, Account *account, rd_kafka_message_t *message, void **found) except? NULL:
        """Decoding has raised. Tries the event that the value itself names; NULL: the record has been accounted for."""
        cdef PyObject *value = NULL
        error = take_exception()
        if Py_REFCNT(<PyObject *>self.window) > 1:  # by a frame of the traceback, say
            self._hand_over()
        error = self._decode_otherwise(account, message, error, found, &value)
        if error is not None:
            self._failed(account, message, "decode", error)
        elif value == NULL:
            account.skipped += 1
            self._advance(account, message)
        return value

    cdef object _decode_otherwise(self, Account *account, rd_kafka_message_t *message, object error, void **found,
                                  PyObject **value):
        """After decoding has raised `error`: decode as what the value itself names, on a topic that is bound.

        Returns what is wrong with the message, or None: then `found` and `value` are set, or nobody handles it.
        """
        cdef Route route = <Route>found[0]
        if isinstance(error, MemoryError) or not isinstance(error, Exception):
            raise error
        if message.len == 0:
            error = errors.UndecodableError("the value is empty")
        elif account != NULL and account.bound != NULL:
            other = self.table.other_route(route, <const char *>message.payload, message.len)
            if other is False:
                return None
            if other is not None:
                try:
                    event = self.table.decode(
                        other, PyBytes_FromStringAndSize(<const char *>message.payload, message.len),
                        <const char *>message.payload)
                except MemoryError:
                    raise
                except Exception as second:
                    error = second
                else:
                    found[0] = <void *>other
                    Py_INCREF(event)
                    value[0] = <PyObject *>event
                    return None
        if not isinstance(error, errors.UndecodableError):
            cause = error
            error = errors.UndecodableError(f"{route.name}: {type(cause).__name__}: {cause}")
            error.__cause__ = cause
        return error

    cdef bint _plain_result(self, Account *account, rd_kafka_message_t *message, Route route, object result) except -1:
        """Whether a synchronous handler's result can be ignored; else the record has been accounted as failed."""
        error = result_error(route.name, result)
        if error is not None:
            self._failed(account, message, "handle", error)
        return error is None

    cdef bint _sent(self, Account *account, rd_kafka_message_t *message) except -1:
        """Send what a handler has published and succeeded with; false: that failed, and so has the record."""
        try:
            self.outbox.send()
        except Exception as error:
            self._failed(account, message, "handle", error)
            return False
        return True

    cdef object _tombstone(self, Account *account, rd_kafka_message_t *message):
        """Account a null value, or hand its Record to the handler that asked for tombstones; may return a coroutine."""
        cdef void *found = self._tombstone_route(account, message)
        if found == NULL:
            account.tombstones += 1
            self._advance(account, message)
            return None
        try:
            result = (<Route>found).on_tombstone(record_of(message))
        except Exception as error:
            self._failed(account, message, "handle", error)
            return None
        if (<Route>found).tombstone_is_async:
            self.awaiting = True
            return result
        if result is None or self._plain_result(account, message, <Route>found, result):
            if PyList_GET_SIZE(self.published) == 0 or self._sent(account, message):
                account.done += 1
                self._advance(account, message)
        return None

    cdef void *_tombstone_route(self, Account *account, rd_kafka_message_t *message) noexcept:
        """The Route whose handler asked for the tombstones of a message's event or topic; NULL: nobody did."""
        cdef rd_kafka_headers_t *headers = NULL
        cdef const void *name = NULL
        cdef size_t size = 0
        cdef void *found = account.bound
        if (found == NULL and api.message_headers(message, &headers) == 0
                and api.header_get_last(headers, self.table.tag_name(), &name, &size) == 0 and name != NULL):
            found = self.table.find(<const char *>name, size)
        return found if found != NULL and (<Route>found).on_tombstone is not None else NULL

    cdef int _failed(self, Account *account, rd_kafka_message_t *message, str stage, object error) except -1:
        """Hand a failed record over. It is accounted only when on_failure returns: then its copy has been submitted."""
        if PyList_GET_SIZE(self.published):
            self.outbox.drop()
        if not isinstance(error, Exception):
            raise error
        self.cell.offset = -1  # handled, if not well
        # Records that were handled meanwhile are not looked at: they cost nothing here.
        self.failures_in_a_row = self.failures_in_a_row + 1 if self.index == self.next_failure else 1
        self.next_failure = self.index + 1
        became = self.on_failure(record_of(message), stage, error)
        if became == "skipped":
            account.skipped += 1
        else:
            if became == "retried":
                account.retried += 1
            else:
                account.dead += 1
            if account.failed_from < 0:
                account.failed_from = message.offset
        self._advance(account, message)
        return 0

    cdef int _at_suspect(self, Account *account, rd_kafka_message_t *message) except -1:
        """HANDLE: the record is no suspect, or admitted; ACCOUNTED: it was condemned; WAIT: for admit_suspect()."""
        topic = account.topic.decode()
        found = self.suspects.find(topic, account.partition, message.offset)
        if found is None:
            return HANDLE
        deaths, condemned, why = found
        if condemned:
            account.received += 1
            self.bytes += message.len
            self._failed(account, message, "handle", errors.WorkerDiedError(deaths, why))
            return ACCOUNTED
        if not self.suspect_ahead and self.admitted == account and self.admitted_offset == message.offset:
            self.admitted = NULL
            self.ended = True
            return HANDLE
        self.admitted = account
        self.admitted_offset = message.offset
        self.suspect_ahead = True
        return WAIT

    def admit_suspect(self):
        """Have the next run() handle the suspect that it came back for, alone.

        To be called when `suspect_ahead` is true and all before it is committed, so that nothing else is handled again
        if the process dies with it.
        """
        self.suspect_ahead = False

    cdef int _park(self, Account *account, rd_kafka_message_t *message) except -1:
        self.on_parked(record_of(message), api.message_leader_epoch(message))
        self._advance(account, message)
        return 0

    def look_at_clock(self):
        """Have run() do so after the record in hand, however quick those before it were. From any thread.

        So a stride of records that suddenly take long does not go on until max_poll_interval has passed.
        """
        self.until_look = 0

    def end_batch(self):
        """Have run() come back after the record in hand. Owner thread, while that is being handled."""
        self.ended = True

    cdef int _error_row(self, rd_kafka_message_t *message) except -1:
        """A row that is not a message: the end of a partition, or an error of a topic or partition."""
        cdef Account *account
        topic = api.topic_name(message.rkt).decode() if message.rkt != NULL else None
        if message.err == RD_KAFKA_RESP_ERR__PARTITION_EOF:
            account = self._account_of(topic, message.partition)
            if account.end_offset >= 0 and message.offset >= account.end_offset:
                account.end_offset = REACHED
            return 0
        if message.err == RD_KAFKA_RESP_ERR__FATAL:
            self.row_errors.append((None, -1, self._fatal_error()))
            return 0
        where = f"{topic} [{message.partition}]" if topic else "consumer"
        # The text of an error row is NUL-terminated (rdkafka.h, rd_kafka_message_errstr).
        error = error_of(message.err, where, <const char *>message.payload, False)
        self.row_errors.append((topic, message.partition, error))
        return 0

    def take_errors(self):
        """Errors of topics and partitions since the last call, as (topic or None, partition, KafkaError) tuples."""
        found = self.row_errors
        if found:
            self.row_errors = []
        return found

    # --- finish -------------------------------------------------------------------------------------------------------

    def finish_batch(self):
        """Store the offsets of what was accounted, and give it back; returns how many offsets were stored.

        What run() did not come to stays in hand.
        """
        return self._finish(None)

    def first_failures(self):
        """By (topic, partition), the first record of the batch in hand whose copy has to be acknowledged."""
        cdef Account *account
        found = {}
        for address in self.touched:
            account = <Account *><uintptr_t>address
            if account.failed_from >= 0:
                found[account.topic.decode(), account.partition] = account.failed_from
        return found

    def finish_batch_unstored(self):
        """finish_batch(), but the offsets are returned for store(): (topic, partition, offset, leader epoch) tuples."""
        offsets = []
        self._finish(offsets)
        return offsets

    cdef int _finish(self, list unstored) except -1:
        cdef Account *account
        cdef rd_kafka_topic_partition_list_t *parts = NULL
        cdef int64_t offset
        cdef int stored = 0
        # While the offsets are stored other threads may land records in flight: they begin a list of their own.
        touched, self.touched = self.touched, []
        for address in touched:
            (<Account *><uintptr_t>address).touched = False
        try:
            for address in touched:
                account = <Account *><uintptr_t>address
                if account.last != NULL:
                    account.leader_epoch = api.message_leader_epoch(account.last)
                    account.last = NULL
                offset = account.next_offset
                account.failed_from = -1
                if (not self.store_offsets or account.parks or not account.assigned
                        or offset <= account.stored_offset):
                    continue
                if unstored is not None:
                    unstored.append((account.topic.decode(), account.partition, offset, account.leader_epoch))
                    continue
                if parts == NULL:
                    parts = api.topic_partition_list_new(len(touched))
                    alive.partition_lists += 1
                _add_offset(parts, account, offset, account.leader_epoch)
            if parts != NULL:
                stored = self._store(parts)
        finally:
            free_partition_list(parts)
            self._release(self.index)
        return stored

    def store(self, offsets):
        """Store offsets that finish_batch_unstored() has returned, oldest first; not those of partitions given up."""
        cdef Account *account
        cdef rd_kafka_topic_partition_list_t *parts = NULL
        self._rk()
        latest = {(topic, partition): (offset, epoch) for topic, partition, offset, epoch in offsets}
        if not latest:
            return
        parts = api.topic_partition_list_new(len(latest))
        alive.partition_lists += 1
        try:
            for (topic, partition), (offset, epoch) in latest.items():
                account = self._account_of(topic, partition)
                if account.assigned and offset > account.stored_offset:
                    _add_offset(parts, account, offset, epoch)
            self._store(parts)
        finally:
            free_partition_list(parts)

    cdef int _store(self, rd_kafka_topic_partition_list_t *parts) noexcept:
        cdef int i
        cdef int stored = 0
        with nogil:
            api.offsets_store(self.handle.rk, parts)
        for i in range(parts.cnt):
            # A partition that has just been taken away refuses: expected, its records come again elsewhere.
            if parts.elems[i].err != 0:
                self.store_refused += 1
            else:
                (<Account *>parts.elems[i].opaque).stored_offset = parts.elems[i].offset
                stored += 1
        return stored

    cdef int _release(self, Py_ssize_t count) noexcept:
        """Give the first `count` messages in hand back, to be freed. Those that were not accounted come again."""
        cdef Py_ssize_t i
        cdef Py_ssize_t left = 0
        if self.window is not None:
            self.window.message = NULL
        self.payload = None
        self.handling = False
        self.awaiting = False
        self.ended = False
        self.current = &self.nowhere
        self.current_rkt = NULL
        if count:
            for i in range(count):
                left += self.messages[i] != NULL
            self.batch.bytes = self.bytes + count * MESSAGE_OVERHEAD
            self._give_back(count)
            alive.messages -= left
        self.count -= count
        self.index = 0
        if self.flow is None:
            self.finished += count
        self.next_failure -= count
        self.bytes = 0
        return 0

    cdef void _give_back(self, Py_ssize_t count) noexcept nogil:
        """Have the first messages of the batch freed, and go on with a batch of the others."""
        cdef Batch *fresh = new_batch(self.returns, self.batch_size)
        cdef size_t rest = (self.count - count) * sizeof(void *)
        self.batch.count = count
        if fresh == NULL:
            free_messages(self.returns, self.batch)
            memmove(self.messages, self.messages + count, rest)
            return
        memcpy(fresh.messages, self.messages + count, rest)
        give_back(self.returns, self.batch)
        self.batch = fresh
        self.messages = <rd_kafka_message_t **>fresh.messages
        if self.returns.waiting_bytes > RETURNED_BYTES:
            free_returned(self.returns)

    cdef int _abandon(self, Account *account) except -1:
        if self.flow is not None:
            self.flow.drop(account.topic.decode(), account.partition)
        return 0

    cdef int _drop_unassigned(self) except -1:
        cdef rd_kafka_message_t *message
        cdef Py_ssize_t i
        # What was handled of the batch stays where it is, and so does what is being handled.
        cdef Py_ssize_t kept = self.index + (1 if self.handling and self.index < self.count else 0)
        for i in range(kept, self.count):
            message = self.messages[i]
            if message == NULL:
                continue  # its Payload owns it: the handler of this record was cut off
            if message.err == 0 and not self._account_of(
                    api.topic_name(message.rkt).decode(), message.partition).assigned:
                with nogil:
                    api.message_destroy(message)
                alive.messages -= 1
            else:
                self.messages[kept] = message
                kept += 1
        self.count = kept
        return 0

    @property
    def in_hand(self):
        """Messages that were fetched and not finished."""
        return self.count

    @property
    def returned_bytes(self):
        """Size of the finished messages that wait to be freed by the thread that allocated them. At most 8 MiB."""
        return self.returns.waiting_bytes if self.handle is not None else 0

    def serve(self):
        """Events of the main queue since the last call, or None: see Client._serve for the tuples."""
        self._rk()
        return self._serve()

    # --- end ----------------------------------------------------------------------------------------------------------

    def close(self, int timeout_ms=10_000):
        """Leave the group and free everything; returns whether that was confirmed within `timeout_ms`.

        The batch in hand is dropped (its unaccounted records come again). A broker that does not answer is not waited
        for past the deadline: the client is abandoned, False returned. May be called twice.
        """
        cdef rd_kafka_queue_t *queue
        cdef rd_kafka_event_t *event
        cdef rd_kafka_error_t *error
        cdef rd_kafka_t *rk
        cdef char reason[512]
        cdef int closed = 0
        cdef int64_t left
        if self.closed:
            return True
        rk = self._rk()
        deadline = time.monotonic() + timeout_ms / 1000
        self._release(self.count)
        if self.flow is not None:
            self.flow.clear()
            self.flow = None
        with nogil:
            queue = api.queue_new(rk)
        self._drop_consumer_queue()
        with nogil:
            error = api.consumer_close_queue(rk, queue)
        if error != NULL:
            failure = error_of_object(error, "close")
            # rdkafka.c, rd_kafka_consumer_close_q: after a fatal error it does nothing but return that.
            closed = api.fatal_error(rk, reason, sizeof(reason)) != 0 or failure.code == RD_KAFKA_RESP_ERR__STATE
        try:
            while not closed:
                with nogil:
                    # As events: what was still being fetched arrives here too, and has no callback.
                    event = api.queue_poll(queue, 20)
                    if event != NULL:
                        if api.event_type(event) == RD_KAFKA_EVENT_REBALANCE:
                            _answer_while_closing(rk, event)
                        api.event_destroy(event)
                    closed = api.consumer_closed(rk)
                if not closed and time.monotonic() > deadline:
                    break
        finally:
            self.closed = True
            if not closed:
                self.handle.abandoned = True
            with nogil:
                api.queue_destroy(queue)
            self._drop_queues()
            self._unassign_all()
        # rd_kafka_destroy waits for every message.
        with nogil:
            free_returned(self.returns)
        if closed:
            left = max(100, <int64_t>((deadline - time.monotonic()) * 1000))
            closed = self.handle.destroy(left)
        self.handle = None
        return bool(closed)
