"""The compiled producer: values go to librdkafka without a copy and are released by their delivery reports.

    application thread: append() --> sender thread: librdkafka, delivery reports --> application thread: collect()

append() takes references and returns. The sender thread never takes the GIL: it hands messages to librdkafka and takes
the delivery reports. What has come back is released, counted and told of by collect(), in bulk, in whichever thread
enters next: each caller of append() now and then, those that wait, and the attendant.

Ownership: a message owns references to its value and key from append() until collect() has seen its delivery report;
librdkafka reads the caller's bytes from its own threads meanwhile, so they must be immutable. The Sender and what it
holds are freed by close(), or by the destructor of a producer that was never closed.
Threads: everything but close() may be called from any thread; close() once, by the owner.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from keven_core._native.handle cimport Client, error_of, new_conf, prepare_thread
from keven_core._native.library cimport alive, api
from keven_core._native.outbox cimport *
from rdkafka cimport *

import os
import time
import warnings
from collections.abc import Mapping

from keven_core.kafka import errors

cdef extern from "unistd.h" nogil:
    int usleep(unsigned int microseconds)

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef extern from *:
    """
    #define keven_prefetch(p) __builtin_prefetch((p), 1, 3)
    """
    void keven_prefetch(const void *p) nogil


NOT_DELIVERED = "not delivered"
POSSIBLY_DELIVERED = "possibly delivered"

cdef enum:
    ALL = 0x7FFFFFFF
    # Messages that the sender hands over before it looks for delivery reports.
    RUN = 256
    # How often the sender comes back after 1 ms, while there is nothing to send, before it sleeps until it is woken:
    # an application that logs every now and then is spared the system call.
    DOZES = 5
    # Messages without a key change their partition after a pause in sending, this often at most: as librdkafka's
    # sticky.partitioning.linger.ms, which reads the clock for every message (a quarter of the sender's time).
    LULL_MS = 10
    # After so many times 20 ms a client that does not give its messages back is abandoned.
    PURGE_ROUNDS = 100
    # How long a waiting thread stays away from signals and from what others may have collected for it.
    SLICE_MS = 50

# Failed messages of accounts with `announce`, logged outside of handlers, that no take_failures() has handed out: told
# of when the process ends.
cdef int64_t untold = 0


# --- the sender thread ------------------------------------------------------------------------------------------------


cdef void _give_back(Sender *sender, Slot *slot) noexcept nogil:
    while queue_push(&sender.returned, slot) != 0:
        usleep(1000)  # no memory for 2 kB: nothing may be lost, so it is waited for


cdef bint _take_reports(Sender *sender, int timeout_ms) noexcept nogil:
    """Take what is on the main queue; waits up to `timeout_ms` for the first. Whether messages have come back."""
    cdef const rd_kafka_message_t *messages[256]
    cdef rd_kafka_event_t *event
    cdef Slot *slot
    cdef size_t n, i
    cdef bint moved = False
    cdef bint call = False
    while True:
        event = api.queue_poll(sender.queue, timeout_ms)
        if event == NULL:
            break
        timeout_ms = 0
        if api.event_type(event) != RD_KAFKA_EVENT_DR:
            if api.event_type(event) == RD_KAFKA_EVENT_ERROR and api.event_error_is_fatal(event):
                sender.ended = 1
            while queue_push(&sender.events, event) != 0:
                usleep(1000)
            queue_publish(&sender.events)
            call = True
            continue
        while True:
            n = api.event_message_array(event, messages, 256)
            for i in range(n):
                slot = <Slot *>messages[i]._private
                if messages[i].err != 0:
                    slot.err = <int16_t>messages[i].err
                    slot.status = <uint8_t>api.message_status(messages[i])
                    if slot.extra != NULL:
                        # Handed back with the rest; there are none: nothing is changed.
                        api.message_detach_headers(<rd_kafka_message_t *>messages[i], &slot.extra.headers)
                    call = True
                _give_back(sender, slot)
            if n < 256:
                break
        api.event_destroy(event)
        moved = True
    if moved:
        tell(sender)
    if call or (moved and sender.watched):
        call_attendant(sender)
    return moved


cdef inline bint _is_plain(Slot *slot) noexcept nogil:
    """Whether librdkafka's plain calls take all of a message: it has neither headers nor timestamp nor partition."""
    cdef Extra *extra = slot.extra
    return extra == NULL or (extra.headers == NULL and extra.timestamp_ms <= 0 and extra.partition < 0)


cdef int _hand_over(Sender *sender, Slot *slot) noexcept nogil:
    """Give one message to librdkafka; its error code."""
    cdef rd_kafka_vu_t vus[7]
    cdef rd_kafka_error_t *error
    cdef Extra *extra = slot.extra
    cdef rd_kafka_headers_t *headers = extra.headers if extra != NULL else NULL
    cdef size_t count = 4
    cdef int code
    cdef size_t key_size
    cdef const char *key = key_of(slot, &key_size)
    if _is_plain(slot):
        if api.produce(slot.rkt, RD_KAFKA_PARTITION_UA, 0, <void *>slot.data, slot.size, key, key_size, slot) == 0:
            return 0
        return api.last_error()
    memset(vus, 0, sizeof(vus))
    vus[0].vtype = RD_KAFKA_VTYPE_RKT
    vus[0].u.rkt = slot.rkt
    vus[1].vtype = RD_KAFKA_VTYPE_PARTITION
    vus[1].u.i32 = extra.partition
    vus[2].vtype = RD_KAFKA_VTYPE_OPAQUE
    vus[2].u.ptr = slot
    vus[3].vtype = RD_KAFKA_VTYPE_VALUE
    vus[3].u.mem.ptr = <void *>slot.data
    vus[3].u.mem.size = slot.size
    if key != NULL:
        vus[count].vtype = RD_KAFKA_VTYPE_KEY
        vus[count].u.mem.ptr = <void *>key
        vus[count].u.mem.size = key_size
        count += 1
    if extra.timestamp_ms > 0:
        vus[count].vtype = RD_KAFKA_VTYPE_TIMESTAMP
        vus[count].u.i64 = extra.timestamp_ms
        count += 1
    if headers != NULL:
        vus[count].vtype = RD_KAFKA_VTYPE_HEADERS
        vus[count].u.headers = headers
        count += 1
    # They are librdkafka's from here on. Before the call returns, another thread may have taken the message's report,
    # put its headers back and freed it: nothing of it is touched afterwards.
    extra.headers = NULL
    error = api.produceva(sender.rk, vus, count)
    if error == NULL:
        return 0
    # rdkafka.h, rd_kafka_produceva: on error the message and its headers stay the caller's.
    extra.headers = headers
    code = api.error_code(error)
    api.error_destroy(error)
    return code


cdef bint _take_turn(Sender *sender, int timeout_ms, bint wait) noexcept nogil:
    """_take_reports(), by one thread at a time; false: another one does it, and it was not to be waited for."""
    if not start_taking(sender, wait):
        return False
    _take_reports(sender, timeout_ms)
    stop_taking(sender)
    return True


cdef void _refuse(Sender *sender, Slot *slot, int code) noexcept nogil:
    slot.err = <int16_t>code
    slot.status = RD_KAFKA_MSG_STATUS_NOT_PERSISTED
    start_taking(sender, True)
    _give_back(sender, slot)
    tell(sender)
    stop_taking(sender)


cdef int32_t _partition_of(const rd_kafka_topic_t *rkt, const void *key, size_t key_len, int32_t count, void *opaque,
                           void *message) noexcept nogil:
    """The partitioner, as Java's: murmur2 of the key; without a key, one partition for a batch's worth of bytes.

    Called by librdkafka in produce(), or on its main thread for messages that waited for the topic's metadata. It may
    call nothing of librdkafka but rd_kafka_topic_partition_available (rdkafka.h); murmur2 is a partitioner itself.
    """
    cdef Sticky *sticky = <Sticky *>opaque
    cdef int32_t partition, first, i
    if key != NULL:
        return api.msg_partitioner_murmur2(rkt, key, key_len, count, NULL, NULL)
    if sticks(sticky, (<Slot *>message).size, &partition) and partition < count:
        return partition
    first = <int32_t>(random_of(sticky) % <uint32_t>count)
    partition = first
    for i in range(count):
        if api.topic_partition_available(rkt, (first + i) % count):
            partition = (first + i) % count
            break
    stick(sticky, partition)
    return partition


cdef bint _send_one(Sender *sender, Slot *slot) noexcept nogil:
    """Hand over one message, or give it back as refused; whether it was handed over."""
    cdef int code = _hand_over(sender, slot)
    # One FIFO: while librdkafka's queue is full, this very message is tried again before any later one.
    while code == RD_KAFKA_RESP_ERR__QUEUE_FULL and not sender.stop:
        _take_turn(sender, 10, True)
        code = _hand_over(sender, slot)
    if code != 0:
        _refuse(sender, slot, code)
    return code == 0


cdef bint _send_run(Sender *sender, rd_kafka_message_t *run, int count) noexcept nogil:
    """Hand over messages of one topic together, which reads the clock and takes the topic's lock once for all.

    Measured: 0.1 us less for each than rd_kafka_produce(). Whether all were handed over.
    """
    cdef rd_kafka_topic_t *rkt
    cdef bint all_sent = True
    cdef int i
    if count == 0:
        return True
    rkt = (<Slot *>run[0]._private).rkt
    if api.produce_batch(rkt, RD_KAFKA_PARTITION_UA, 0, run, count) < count:
        for i in range(count):
            # From the first one on that finds the queue full, none is taken: the order holds.
            if run[i].err == RD_KAFKA_RESP_ERR__QUEUE_FULL:
                all_sent = _send_one(sender, <Slot *>run[i]._private) and all_sent
            elif run[i].err != 0:
                _refuse(sender, <Slot *>run[i]._private, run[i].err)
                all_sent = False
    return all_sent


cdef bint _send_some(Sender *sender) noexcept nogil:
    """Hand over what has been appended, RUN messages at most; whether there were any."""
    cdef rd_kafka_message_t run[256]
    cdef uint64_t ready = queue_ready(&sender.outbox)
    cdef uint64_t left
    cdef Slot *slot
    cdef int count = 0
    cdef bint all_sent = True
    cdef bint plain
    if ready == 0:
        return False
    if ready > RUN:
        ready = RUN
    left = ready
    while left:
        left -= 1
        slot = <Slot *>queue_pop(&sender.outbox)
        plain = _is_plain(slot)
        if count and (not plain or slot.rkt != (<Slot *>run[0]._private).rkt):
            all_sent = _send_run(sender, run, count) and all_sent
            count = 0
        if not plain:
            all_sent = _send_one(sender, slot) and all_sent
            continue
        run[count].err = 0
        run[count].payload = <void *>slot.data
        run[count].len = slot.size
        run[count].key = <void *>key_of(slot, &run[count].key_len)
        run[count]._private = slot
        count += 1
    all_sent = _send_run(sender, run, count) and all_sent
    sender.handed = sender.handed + ready
    if not all_sent:
        call_attendant(sender)
    return True


cdef void _note_lull(Sender *sender) noexcept nogil:
    cdef int64_t now_ms = monotonic_ms()
    if now_ms - sender.lull_ms >= LULL_MS:
        sender.lull_ms = now_ms
        sender.lulls = sender.lulls + 1


cdef void _send_eagerly(Sender *sender) noexcept nogil:
    """One turn of the sender thread of an eager producer.

    A thread that waits for its message hands it over and takes the answer itself, which saves two changes of threads.
    What is left for this one: messages that event loops wait for, many at once, and what nobody waits for any more.
    """
    if _send_some(sender):
        _take_turn(sender, 0, False)
        return
    _note_lull(sender)
    sender.asleep = 1
    fence()
    if queue_ready(&sender.outbox) == 0 and not sender.stop:
        if sender.awaited and not sender.takers:
            _take_turn(sender, 100, True)
        else:
            await_push(sender, 100)
            if not sender.takers:
                _take_turn(sender, 0, False)
    sender.asleep = 0


cdef void _rouse(Sender *sender, bint to_send) noexcept nogil:
    """Wake the sender of an eager producer; `to_send`: also when it waits for delivery reports."""
    sender.asleep = 0
    wake_sender(sender)
    if to_send:
        api.queue_yield(sender.queue)


cdef void *_send(void *argument) noexcept nogil:
    """The sender thread: ends when `stop` is set; what was not handed over by then goes back as purged."""
    cdef Sender *sender = <Sender *>argument
    cdef int idle = 0
    name_thread()
    prepare_thread()
    while not sender.stop:
        if sender.eager:
            _send_eagerly(sender)
        elif _send_some(sender):
            idle = 0
            _take_turn(sender, 0, True)
        elif idle < DOZES:
            if idle == 0:
                _note_lull(sender)
            idle += 1
            _take_turn(sender, 1, True)
        else:
            sender.asleep = 1
            # Without a fence in append(): whoever did not see `asleep` has published its message by the end of 1 ms.
            _take_turn(sender, 1, True)
            if queue_ready(&sender.outbox) == 0 and not sender.stop:
                _take_turn(sender, 1000, True)
            sender.asleep = 0
            idle = 0 if queue_ready(&sender.outbox) else DOZES
    while queue_ready(&sender.outbox):
        _refuse(sender, <Slot *>queue_pop(&sender.outbox), RD_KAFKA_RESP_ERR__PURGE_QUEUE)
    return NULL


# --- messages ---------------------------------------------------------------------------------------------------------


cdef list pairs_of(object headers):
    """Headers that were given as pairs or as a mapping, as a list of pairs."""
    if type(headers) is list:
        return headers
    try:
        return list(headers.items() if isinstance(headers, Mapping) else headers)
    except TypeError:
        raise errors.UsageError(
            f"headers have to be (str, bytes or None) pairs or a mapping, not {type(headers).__name__}") from None


cdef rd_kafka_headers_t *_new_headers(object headers) except NULL:
    cdef rd_kafka_headers_t *native
    cdef const char *name
    cdef Py_ssize_t name_size
    cdef list pairs = pairs_of(headers)
    native = api.headers_new(len(pairs))
    try:
        for pair in pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str) or not (
                    pair[1] is None or isinstance(pair[1], bytes)):
                raise errors.UsageError(
                    f"a header has to be a (str, bytes or None) pair, not {type(pair).__name__}: {pair!r:.80}")
            try:
                name = PyUnicode_AsUTF8AndSize(pair[0], &name_size)
            except UnicodeEncodeError as error:
                raise errors.UsageError(f"a header's name has to be valid Unicode text: {error}") from None
            if pair[1] is None:
                api.header_add(native, name, name_size, NULL, 0)
            else:
                api.header_add(native, name, name_size, PyBytes_AS_STRING(pair[1]), PyBytes_GET_SIZE(pair[1]))
    except BaseException:
        api.headers_destroy(native)
        raise
    return native


cdef Extra *new_extra(object headers, int64_t timestamp_ms, int32_t partition) except NULL:
    """What a message has beside topic, value and key; freed with it."""
    cdef rd_kafka_headers_t *native = _new_headers(headers) if headers else NULL
    cdef Extra *extra = <Extra *>calloc(1, sizeof(Extra))
    if extra == NULL:
        if native != NULL:
            api.headers_destroy(native)
        raise MemoryError()
    extra.headers = native
    extra.timestamp_ms = timestamp_ms
    extra.partition = partition
    return extra


cdef void set_waiter(Extra *extra, object future, LoopGate gate) noexcept:
    """Have a future of the gate's loop settled when the message has come back."""
    Py_INCREF(future)
    extra.waiter = <PyObject *>future
    extra.gate = <PyObject *>gate


cdef list _headers_of(Extra *extra):
    cdef const char *name
    cdef const void *value
    cdef size_t size
    cdef size_t index = 0
    cdef list found = []
    if extra == NULL or extra.headers == NULL:
        return found
    while api.header_get_all(extra.headers, index, &name, &value, &size) == 0:
        found.append((
            name.decode("utf-8", "replace"),
            PyBytes_FromStringAndSize(<const char *>value, size) if value != NULL else None,
        ))
        index += 1
    return found


cdef bint _is_raised(Slot *slot) noexcept:
    """Whether the failure of a message becomes an exception where it was logged, so that the handler decides."""
    if slot.extra != NULL and slot.extra.waiter != NULL:
        return not (<object>slot.extra.waiter).done()  # otherwise it has been cancelled, or has run out of time
    return slot.account.owner != NULL and (<DeliveryAccount>slot.account.owner).raises


cdef object _delivery_of(Slot *slot):
    """The Delivery of a message that has come back."""
    owner = <object>slot.owner
    topic = api.topic_name(slot.rkt).decode()
    if slot.data == NULL:
        value = None
    elif isinstance(owner, bytes) and len(owner) == slot.size:
        value = owner
    else:
        value = PyBytes_FromStringAndSize(slot.data, slot.size)
    key = <object>slot.key if slot.key != NULL else None
    error = None
    outcome = "delivered"
    if slot.err != 0:
        error = error_of(slot.err, None, NULL, False)
        possibly = slot.status == RD_KAFKA_MSG_STATUS_POSSIBLY_PERSISTED
        outcome = POSSIBLY_DELIVERED if possibly else NOT_DELIVERED
    timestamp_ms = slot.extra.timestamp_ms if slot.extra != NULL else 0
    return errors.Delivery(topic, value, key, error, outcome, _headers_of(slot.extra), timestamp_ms)


@cython.final
cdef class DeliveryAccount:
    """Counts what became of the messages of one sender: pending = produced - delivered - failed.

    Arguments:
        keep_failures: how many failed messages are kept for take_failures().
        max_messages, max_bytes: bounds of what is pending; 0: none.
        on_delivery: a callable that is told of every message, see Producer.attend().
        only_failures: whether on_delivery is told only of messages that were not delivered.
        announce: whether the producer's on_failure is told of failed messages.
        raises: whether whoever logs a message waits for it and gets its failure as an exception; it is no failure of
            the handler's scope then.
        numbered: whether `failures` and what on_delivery is told are (number, Delivery) pairs: the how manieth of this
            account the message was, from 1; 0: it was logged in a handler.
        producer: counts this one's messages alone: a logger that has got another refuses them with ClosedError.

    `failures` keeps the first failed messages, as errors.Delivery, in the order in which they came back, which need not
    be that of the calls. Counts move when a thread collects what has come back: Producer.wait(), Producer.serve(), a
    call that produces.
    """

    def __cinit__(self):
        self.account = <Account *>calloc(1, sizeof(Account))
        if self.account == NULL:
            raise MemoryError()
        self.account.owner = <void *>self

    def __init__(self, Py_ssize_t keep_failures=10, *, Py_ssize_t max_messages=0, Py_ssize_t max_bytes=0,
                 on_delivery=None, bint only_failures=False, bint announce=False, bint raises=False,
                 bint numbered=False, Producer producer=None):
        self.keep_failures = keep_failures
        self.producer = producer
        self.numbered = numbered
        self.announce = announce
        self.raises = raises
        self.account.max_messages = max_messages or (1 << 62)
        self.account.max_bytes = max_bytes or (1 << 62)
        self.failures = []
        self.reports = []
        self.on_delivery = on_delivery
        self.told_of_all = on_delivery is not None and not only_failures

    def __dealloc__(self):
        cdef Account *account = self.account
        if account == NULL:
            return
        account.owner = NULL
        if account.produced == account.delivered + account.failed:
            free(account)  # otherwise with its last message

    cdef void _told(self, Slot *slot) noexcept:
        """A message has come back that failed, or that on_delivery is to be told of.

        Whatever makes Python objects may run Python code, by a garbage collection for one, and let another thread take
        the next message meanwhile: reports carry the order in which they began.
        """
        cdef object story
        cdef uint64_t place = self.places
        self.places += 1
        self.telling += 1
        try:
            story = _delivery_of(slot)
            if self.numbered:
                story = (0 if slot.in_scope else slot.number, story)
            if slot.err != 0 and len(self.failures) < self.keep_failures:
                self.failures.append(story)
            if self.on_delivery is not None:
                self.reports.append((place, story))
        except Exception as error:  # no memory, most likely: it is still counted
            warnings.warn(f"a message that came back could not be kept: {error}", RuntimeWarning, stacklevel=1)
        finally:
            self.telling -= 1

    cdef list _take_reports(self):
        """What on_delivery is to be told, in order. Nothing while a thread makes a report: it asks for this again."""
        if self.telling:
            return []
        reports, self.reports = self.reports, []
        reports.sort()
        return [story for _, story in reports]

    @property
    def produced(self):
        """Messages taken so far."""
        return self.account.produced

    @property
    def delivered(self):
        """Messages that the broker has acknowledged."""
        return self.account.delivered

    @property
    def failed(self):
        """Messages that were not delivered, or only possibly."""
        return self.account.failed

    @property
    def untaken(self):
        """Failed messages that take_failures() has not handed out yet."""
        return self.account.failed - self.taken

    @property
    def pending(self):
        """Messages whose fate is not known yet."""
        return self.account.produced - self.account.delivered - self.account.failed

    @property
    def pending_bytes(self):
        """Size of their values and keys."""
        return self.account.held_bytes

    def take_failures(self):
        """(number of failed messages, the kept ones) since the last call."""
        global untold
        cdef int64_t count = self.account.failed - self.taken
        kept = self.failures
        self.taken = self.account.failed
        self.failures = []
        untold -= self.untold
        self.untold = 0
        return count, kept


def untold_failures():
    """Messages of accounts with `announce` that were not delivered and that no take_failures() has handed out."""
    return untold


@cython.final
cdef class Topic:
    """A topic of one producer. Owns librdkafka's handle, which the producer's close() destroys."""


@cython.final
cdef class LoopGate:
    """Brings acknowledgements into an event loop: the futures of messages that have come back are settled there.

    The sender thread writes to the gate's pipe, once until the loop has heeded it. Made and heeded in the loop's
    thread; collect() adds to `done` in any thread. Messages refer to their gate without owning it: the producer does.
    """

    cdef void _shut(self) noexcept:
        """End it, in any thread: the loop settles what is left and gives the pipe back."""
        if self.native == NULL:
            return
        set_loop(self.producer.sender, self.native, -1)
        self.native = NULL
        try:
            self.loop.call_soon_threadsafe(self._leave)
        except RuntimeError:  # the loop is closed
            self._close_pipe()

    def _leave(self):
        self.loop.remove_reader(self.read_fd)
        self._close_pipe()
        self._settle()

    def _close_pipe(self):
        os.close(self.read_fd)
        os.close(self.write_fd)

    def heed(self):
        """Settle the futures of what has come back; called by the loop when the pipe is readable."""
        try:
            os.read(self.read_fd, 4096)
        except BlockingIOError:
            pass
        if self.native != NULL:
            self.native.armed = 1  # before collecting: what comes back from here on writes again
            self.producer.collect(ALL)
        self._settle()

    cdef int hurry(self) except -1:
        """Have the sender told of what was appended, at the end of this turn of the loop. In the loop's thread.

        Waking it for each message costs both more than handing the message over.
        """
        if not self.hurries:
            self.hurries = True
            self.loop.call_soon(self._tell_sender)
        return 0

    def _tell_sender(self):
        cdef Sender *sender = self.producer.sender
        self.hurries = False
        if self.native == NULL:
            return  # the producer is closed
        fence()
        if sender.asleep:
            _rouse(sender, True)

    def _settle(self):
        cdef list done
        done, self.done = self.done, []
        for future, story in done:
            if future.done():
                continue  # given up
            if story is None:
                future.set_result(None)
            else:
                future.set_exception(errors.delivery_error(1, [story]))


@cython.no_gc_clear
cdef class Producer(Client):
    """A Kafka producer with its sender thread.

    Arguments:
        options: librdkafka settings, str to str; log queue and delivery events are set here.
        on_event: called with each tuple of Client._serve (errors, logs, statistics, token requests): in the thread that
            calls attend(), or, as long as nobody does, in those that call serve() and wait().

    `replaced` may be set: another producer takes the place of this one, which is about to be closed.
    Two more attributes may be set to callables: `on_topic(name)`, called when a topic is used for the first time, by
    the thread that uses it, and `on_failure(count, delivery)`, called by attend() for messages that failed of accounts
    with `announce`; `delivery` is that of the first.
    """

    def __cinit__(self):
        self.kind = "producer"
        self.sender = NULL
        self.topics = {}
        self.gates = []
        self.reporting = []

    def __init__(self, dict options not None, on_event=None):
        cdef rd_kafka_conf_t *conf
        if self.handle is not None:
            raise errors.UsageError("a Producer can't be initialized twice")
        self.on_event = on_event
        self.on_topic = None
        self.on_failure = None
        self.replaced = False
        own_partitioner = options.get("partitioner") == "murmur2_random"
        if own_partitioner:
            # Otherwise librdkafka would not ask the partitioner for messages without a key.
            options = {**options, "sticky.partitioning.linger.ms": "0"}
        conf = new_conf({**options, "log.queue": "true"})
        api.conf_set_events(conf, RD_KAFKA_EVENT_DR | RD_KAFKA_EVENT_LOG | RD_KAFKA_EVENT_ERROR | RD_KAFKA_EVENT_STATS
                            | RD_KAFKA_EVENT_OAUTHBEARER_TOKEN_REFRESH)
        self._start(RD_KAFKA_PRODUCER, conf)
        self.sender = new_sender()
        if self.sender == NULL:
            raise MemoryError()
        self.linger_ms = int(float(options.get("linger.ms", "5")))
        self.sender.eager = self.linger_ms == 0
        self.sender.max_message_bytes = int(options.get("message.max.bytes", "1000000"))
        if own_partitioner:
            self.sender.run_bytes = int(options.get("batch.size", "1000000"))
        self.sender.rk = self.handle.rk
        self.sender.queue = self.main_queue
        if start_thread(self.sender, _send) != 0:
            raise errors.KevenError("the operating system refuses another thread: the sender thread can't be started")

    def __dealloc__(self):
        if self.handle is None or self.handle.forked():
            return
        if not self.closed:
            warnings.warn("unclosed producer: call close()", ResourceWarning, stacklevel=1)
            self._halt()
            self._drop_queues()
        if self.sender != NULL and not self.handle.abandoned:
            free_sender(self.sender)

    cdef rd_kafka_event_t *_next_event(self) noexcept:
        return <rd_kafka_event_t *>queue_pop(&self.sender.events) if queue_ready(&self.sender.events) else NULL

    cdef void _pass_events(self) except *:
        events = self._serve()
        if events is not None and self.on_event is not None:
            for event in events:
                self.on_event(event)

    # --- out ----------------------------------------------------------------------------------------------------------

    cdef Topic topic(self, str name):
        """The handle of a topic, made at its first use."""
        cdef Topic topic = self.topics.get(name)
        cdef rd_kafka_topic_conf_t *conf
        cdef rd_kafka_t *rk
        cdef Sticky *sticky
        cdef bytes encoded
        cdef const char *text
        if topic is None:
            rk = self._rk()
            encoded = name.encode()
            text = encoded
            topic = Topic.__new__(Topic)
            topic.name = name
            conf = NULL
            if self.sender.run_bytes:
                sticky = new_sticky(self.sender)
                if sticky == NULL:
                    raise MemoryError()
                conf = api.default_topic_conf_dup(rk)
                api.topic_conf_set_partitioner_cb(conf, _partition_of)
                api.topic_conf_set_opaque(conf, sticky)
            with nogil:
                topic.rkt = api.topic_new(rk, text, conf)
            if topic.rkt == NULL:
                raise error_of(api.last_error(), f"topic {name!r:.260}", NULL, False)
            # setdefault: another thread may have made it while this one had no GIL.
            made = self.topics.setdefault(name, topic)
            if made is not topic:
                with nogil:
                    api.topic_destroy(topic.rkt)
                topic = made
            elif self.on_topic is not None:
                self.on_topic(name)
        return topic

    cdef int append(self, Account *account, Account *scope, rd_kafka_topic_t *rkt, object owner, const char *data,
                    Py_ssize_t size, object key, Extra *extra) except -1:
        """Queue one message. Takes references to `owner` and `key` (bytes or None), and `extra` over, also on error.

        Returns 1 when the sender has yet to be told of it, by LoopGate.hurry().
        """
        cdef Sender *sender = self.sender
        cdef Slot *slot = take_slot(sender)
        cdef bint awaited = extra != NULL and extra.waiter != NULL
        cdef bint direct = False
        if slot == NULL:
            free_extra(extra)
            raise MemoryError()
        Py_INCREF(owner)
        slot.owner = <PyObject *>owner
        slot.data = data
        slot.size = <uint32_t>size
        slot.err = 0
        slot.status = 0
        slot.rkt = rkt
        slot.account = account
        slot.in_scope = scope != NULL
        if scope != NULL:
            slot.scope = scope
        else:
            slot.number = account.produced + 1
        slot.extra = extra
        slot.key = NULL
        if key is not None:
            Py_INCREF(key)
            slot.key = <PyObject *>key
            size += PyBytes_GET_SIZE(key)
        # Of messages that an event loop awaits only the first one: those of a turn of the loop go together.
        if sender.eager and sender.handed == queue_pushed(&sender.outbox) and not (awaited and sender.awaited):
            # Nothing is before it. What librdkafka refuses goes to the sender, which knows what to do with it.
            direct = _hand_over(sender, slot) == 0
        if not direct and queue_push(&sender.outbox, slot) != 0:
            free_slot(sender, slot)
            free_extra(extra)
            Py_XDECREF(slot.key)
            Py_XDECREF(slot.owner)
            raise MemoryError()
        account.produced += 1
        account.held_bytes += size
        if scope != NULL:
            scope.produced += 1
        sender.held += 1
        alive.deliveries += 1
        if not sender.eager:
            queue_publish(&sender.outbox)
            if sender.asleep:
                sender.asleep = 0
                api.queue_yield(sender.queue)
            return 0
        if awaited:
            sender.awaited = sender.awaited + 1
        if not direct:
            queue_publish(&sender.outbox)
            if awaited:
                return 1
            fence()
        if sender.asleep and (awaited or not direct):
            _rouse(sender, not direct)
        return 0

    cdef bint has_room(self, Account *account, Py_ssize_t size) noexcept:
        """Whether an account's bounds allow another message. One that is larger than the bound may be alone."""
        cdef int64_t pending = account.produced - account.delivered - account.failed
        return pending < account.max_messages and (pending == 0 or account.held_bytes + size <= account.max_bytes)

    cdef bint wait_for_room(self, Account *account, Py_ssize_t size, double timeout_s) except -1:
        """Wait, GIL released, until the bounds of an account allow another message; false: not in time."""
        cdef uint64_t seen
        deadline = time.monotonic() + timeout_s
        while True:
            seen = self.sender.moves
            self.collect(ALL)
            if self.has_room(account, size):
                return True
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            self._await_moves(seen, left_s)

    def _await_moves(self, uint64_t seen, double left_s):
        """Wait for messages to come back, for a slice at most; then signals and, without an attendant, events."""
        cdef long slice_ms = SLICE_MS if left_s * 1000 > SLICE_MS else <long>(left_s * 1000) + 1
        cdef Sender *sender = self.sender
        self._rk()
        self.handle.calls += 1
        if sender.eager:
            sender.takers = sender.takers + 1
            with nogil:
                if sender.moves == seen and not _take_turn(sender, slice_ms, False):
                    await_moves(sender, seen, slice_ms)
            sender.takers = sender.takers - 1
            if sender.awaited and not sender.takers:
                wake_sender(sender)
        else:
            with nogil:
                await_moves(sender, seen, slice_ms)
        self.handle.calls -= 1
        PyErr_CheckSignals()
        self._rk()
        if not self.attended:
            self._pass_events()

    def produce(self, str topic not None, bytes value, DeliveryAccount account not None, *, bytes key=None,
                headers=None, int partition=-1, long long timestamp_ms=0, int timeout_ms=0):
        """Queue one message, without a copy; the sender thread hands it to librdkafka.

        When the account's bounds are reached, waits up to `timeout_ms` with the GIL released and then raises
        QueueFullError. `value` None is a tombstone. Raises MessageTooLargeError, UsageError; nothing is queued then.
        What the broker or librdkafka refuses later is counted as failed.
        """
        cdef Py_ssize_t size = 0 if value is None else PyBytes_GET_SIZE(value)
        cdef Py_ssize_t key_size = 0 if key is None else PyBytes_GET_SIZE(key)
        cdef Extra *extra = NULL
        cdef Topic handle
        self._rk()
        self.check_size(topic, size + key_size)
        handle = self.topic(topic)
        if not self.has_room(account.account, size + key_size) and not self.wait_for_room(
                account.account, size + key_size, timeout_ms / 1000):
            raise errors.QueueFullError(
                f"the send queue stayed full for {timeout_ms} ms; the message for {topic} was not queued")
        if headers or timestamp_ms > 0 or partition >= 0:
            extra = new_extra(headers, timestamp_ms, partition)
        self.append(account.account, NULL, handle.rkt, value, NULL if value is None else PyBytes_AS_STRING(value), size,
                    key, extra)
        self.collect(RUN)

    def check_size(self, str topic, Py_ssize_t size):
        """Raise MessageTooLargeError when value and key are together larger than message.max.bytes."""
        if size > self.sender.max_message_bytes:
            raise errors.MessageTooLargeError(
                f"a message of {size} bytes for {topic} is larger than message.max.bytes allows "
                f"({self.sender.max_message_bytes}); raise KEVEN_MAX_MESSAGE_BYTES and the topic's max.message.bytes, "
                f"or send less")

    # --- back ---------------------------------------------------------------------------------------------------------

    cdef void collect(self, Py_ssize_t limit) noexcept:
        """Release, count and tell of up to `limit` messages that have come back. Needs the GIL, never waits.

        What is released may run a destructor, which may log: each message is off the queue before it is released.
        """
        cdef Sender *sender = self.sender
        cdef uint64_t ready
        cdef Slot *ahead
        while limit > 0:
            ready = queue_ready(&sender.returned)
            if ready == 0:
                return
            if ready > 16:
                # Slots, and what they own, were last in the cache when they were sent.
                ahead = <Slot *>queue_peek(&sender.returned, 16)
                if ahead != NULL:
                    keven_prefetch(ahead)
                ahead = <Slot *>queue_peek(&sender.returned, 8)
                if ahead != NULL:
                    keven_prefetch(ahead.owner)
            self._take_back(<Slot *>queue_pop(&sender.returned))
            limit -= 1

    cdef void _take_back(self, Slot *slot) noexcept:
        global untold
        cdef Account *account = slot.account
        cdef Account *scope = slot.scope if slot.in_scope else NULL
        cdef Extra *extra = slot.extra
        cdef PyObject *owner = slot.owner
        cdef PyObject *key = slot.key
        cdef DeliveryAccount counted
        cdef LoopGate gate
        cdef bint raised = slot.err != 0 and _is_raised(slot)
        account.held_bytes -= slot.size
        if key != NULL:
            account.held_bytes -= PyBytes_GET_SIZE(<object>key)
        # This comes before everything that may run Python code: it takes the message's place in the order of reports.
        if account.owner != NULL and (slot.err != 0 or (<DeliveryAccount>account.owner).told_of_all):
            counted = <DeliveryAccount>account.owner
            counted._told(slot)
            if counted.on_delivery is not None and counted not in self.reporting:
                self.reporting.append(counted)
            if counted.announce and slot.err != 0:
                if self.announced == 0:
                    self.first_failure = _delivery_of(slot)
                self.announced += 1
        if slot.err != 0 and not raised and scope != NULL and scope.owner != NULL:
            (<DeliveryAccount>scope.owner)._told(slot)
        if extra != NULL and extra.waiter != NULL:
            self.sender.awaited = self.sender.awaited - 1
            try:
                gate = <LoopGate>extra.gate
                gate.done.append((<object>extra.waiter, None if slot.err == 0 else _delivery_of(slot)))
                if gate.native != NULL:
                    wake_loop(gate.native)
            except Exception as error:
                warnings.warn(f"a waiting task could not be told: {error}", RuntimeWarning, stacklevel=1)
        if scope != NULL:
            if slot.err == 0 or raised:
                scope.delivered += 1
            else:
                scope.failed += 1
        if slot.err == 0:
            account.delivered += 1
        else:
            account.failed += 1
            # What a handler wrote is told of by its server, which keeps the offset.
            if account.owner != NULL and (<DeliveryAccount>account.owner).announce and scope == NULL:
                (<DeliveryAccount>account.owner).untold += 1
                untold += 1
        if account.owner == NULL and account.produced == account.delivered + account.failed:
            free(account)
        if scope != NULL and scope.owner == NULL and scope.produced == scope.delivered + scope.failed:
            free(scope)
        self.sender.held -= 1
        alive.deliveries -= 1
        free_slot(self.sender, slot)
        free_extra(extra)
        Py_XDECREF(key)
        Py_XDECREF(owner)

    def serve(self, int timeout_ms=0):
        """Collect what has come back and pass on events; waits up to `timeout_ms` for messages, GIL released."""
        cdef uint64_t seen
        self._rk()
        seen = self.sender.moves
        self.collect(ALL)
        if timeout_ms and self.sender.held:
            self._await_moves(seen, timeout_ms / 1000)
            self.collect(ALL)
        if not self.attended:
            self._pass_events()

    def wait(self, DeliveryAccount account not None, double timeout_s):
        """Wait until nothing of `account` is pending; returns whether that was so within `timeout_s`, GIL released.

        Signal handlers run meanwhile. Raises what on_event raises.
        """
        cdef uint64_t seen
        cdef rd_kafka_t *rk = self._rk()
        deadline = time.monotonic() + timeout_s
        while True:
            self._rk()
            seen = self.sender.moves
            self.collect(ALL)
            if account.pending == 0:
                return True
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            if self.linger_ms > SLICE_MS:
                # Nobody wants to wait for a fuller batch now.
                self.handle.calls += 1
                with nogil:
                    api.flush(rk, 1)
                self.handle.calls -= 1
            self._await_moves(seen, left_s)

    def attend(self, int timeout_ms):
        """What the attendant does, again and again: wait for something to heed, GIL released, and heed it.

        Passes on events, and tells each account's on_delivery of its messages, as a list of errors.Delivery. Called by
        one thread, in a loop, until close(); once it was called, other threads leave events to it. Returns whether
        messages are still under way.
        """
        cdef bint called
        self._rk()
        self.attended = True
        self.handle.calls += 1
        with nogil:
            called = await_call(self.sender, timeout_ms)
        self.handle.calls -= 1
        self._rk()
        if called or self.seen_pushed == queue_pushed(&self.sender.outbox):
            self.collect(ALL)  # while the application logs, it collects by itself
        self.seen_pushed = queue_pushed(&self.sender.outbox)
        self._pass_events()
        self._report_deliveries()
        return self.sender.held > 0

    def _report_deliveries(self):
        cdef DeliveryAccount account
        if self.announced:
            count, story = self.announced, self.first_failure
            self.announced = 0
            self.first_failure = None
            if self.on_failure is not None:
                self.on_failure(count, story)
        while self.reporting:
            account = self.reporting.pop(0)
            reports = account._take_reports()
            if reports:
                account.on_delivery(reports)

    def call_attendant(self):
        """Have attend() return soon. From any thread."""
        self._rk()
        call_attendant(self.sender)

    def watch(self):
        """Have the attendant called for every message that comes back, not only for those that failed."""
        self.sender.watched = 1

    @property
    def fatal(self):
        """Whether librdkafka can't go on: the producer has to be replaced by a new one."""
        return not self.closed and self.sender.ended != 0

    @property
    def queued(self):
        """Messages that have not come back."""
        self._rk()
        return self.sender.held

    cdef LoopGate gate_of(self, object loop):
        """The gate into an event loop; called in its thread."""
        cdef LoopGate gate
        for gate in self.gates:
            if gate.loop is loop:
                return gate
        for gate in self.gates:
            if gate.loop.is_closed():
                gate._shut()
        if self.sender.held == 0:
            self.gates = [gate for gate in self.gates if gate.native != NULL]
        gate = LoopGate.__new__(LoopGate)
        gate.producer = self
        gate.loop = loop
        gate.done = []
        gate.read_fd, gate.write_fd = os.pipe()
        os.set_blocking(gate.read_fd, False)
        os.set_blocking(gate.write_fd, False)
        gate.native = use_loop(self.sender, gate.write_fd)
        if gate.native == NULL:
            gate._close_pipe()
            raise MemoryError()
        self.gates.append(gate)
        loop.add_reader(gate.read_fd, gate.heed)
        return gate

    # --- end ----------------------------------------------------------------------------------------------------------

    def close(self, int timeout_ms=10_000):
        """Send what is pending, at most `timeout_ms`, then free everything; returns how many messages were not sent.

        Those are reported as failed to their accounts. Blocks, GIL released. May be called twice.
        """
        cdef int left
        if self.closed:
            return 0
        self._rk()
        deadline = time.monotonic() + timeout_ms / 1000
        self._await_all(deadline)
        # From here on every call of another thread is refused; those under way end by themselves within their slice.
        self.closed = True
        self.sender.ended = 1
        call_attendant(self.sender)
        while self.handle.calls:
            with nogil:
                usleep(200)
        left = self._halt()
        self._drop_queues()
        self.handle.destroy(max(1000, int((deadline - time.monotonic()) * 1000)))
        self._report_deliveries()
        return left

    cdef int _await_all(self, double deadline) except -1:
        cdef rd_kafka_t *rk = self._rk()
        cdef uint64_t seen
        while True:
            seen = self.sender.moves
            self.collect(ALL)
            left_s = deadline - time.monotonic()
            if self.sender.held == 0 or left_s <= 0:
                return 0
            with nogil:
                api.flush(rk, 0)
            self._await_moves(seen, left_s)

    cdef int _halt(self) noexcept:
        """End the sender thread, take back what was not sent, and let go of topics and gates; how many there were."""
        cdef Sender *sender = self.sender
        cdef rd_kafka_event_t *event
        cdef LoopGate gate
        cdef Topic topic
        cdef int left
        cdef int rounds = 0
        if sender == NULL:
            return 0
        with nogil:
            sender.stop = 1
            wake_sender(sender)
            api.queue_yield(sender.queue)
            join_thread(sender)
        self.collect(ALL)
        left = sender.held
        # What was handed over comes back by its delivery reports, purged. Not waited for inside librdkafka: that would
        # last as long as a name lookup of one of its threads.
        while sender.held and rounds < PURGE_ROUNDS:
            with nogil:
                api.purge(
                    sender.rk,
                    RD_KAFKA_PURGE_F_QUEUE | RD_KAFKA_PURGE_F_INFLIGHT | RD_KAFKA_PURGE_F_NON_BLOCKING)
                _take_reports(sender, 20)
            self.collect(ALL)
            rounds += 1
        if sender.held:
            self.handle.abandoned = True  # librdkafka may still read what these messages own
        # Not passed on: the application is told of failures by the messages themselves.
        while queue_ready(&sender.events):
            event = <rd_kafka_event_t *>queue_pop(&sender.events)
            with nogil:
                api.event_destroy(event)
        for topic in self.topics.values():
            with nogil:
                api.topic_destroy(topic.rkt)
        self.topics.clear()
        for gate in self.gates:
            gate._shut()
        self.gates = []
        return left


cdef void free_extra(Extra *extra) noexcept:
    if extra == NULL:
        return
    if extra.headers != NULL:
        api.headers_destroy(extra.headers)
    Py_XDECREF(extra.waiter)
    free(extra)
