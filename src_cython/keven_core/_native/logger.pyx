"""What KafkaLogger and KafkaBatchLogger inherit: log(), which takes a message in about a tenth of a microsecond.

Threads: log() and submit() may be called from any thread; they hold the GIL but while they wait for room.
Ownership: a logger refers to its producer and its DeliveryAccount; messages on their way belong to the producer.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_GET_SIZE
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t

from keven_core._native.handle cimport fork_generation
from keven_core._native.outbox cimport Account, Extra, Sender
from keven_core._native.producer cimport (
    DeliveryAccount, LoopGate, Producer, Topic, free_extra, new_extra, pairs_of, set_waiter
)
from rdkafka cimport *

from contextvars import ContextVar

from keven_core.kafka import errors
from keven_core.kafka.topics import check_topic

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL


cdef enum:
    # A call of log() in this many releases up to COLLECTED messages that have come back.
    COLLECT_EVERY = 64
    COLLECTED = 128
    ALL = 0x7FFFFFFF

# How long _log_and_wait() waits by itself.
cdef double FIRST_WAIT_S = 0.2

# The scope of the handler that runs, looked at only while one is entered anywhere in the process: reading a context
# variable costs as much as half a log().
_scope = ContextVar("keven_core.handler_scope", default=None)
cdef int scopes = 0


@cython.final
cdef class HandlerScope:
    """Knows what the handlers of one server, or of one dispatch(), write with any logger.

    Made and entered by whoever runs handlers; found by log() through a context variable, also in the threads and tasks
    that a handler starts with its context.

    Arguments:
        capture: messages go into `captured`, as (topic, value, key, headers) tuples, instead of to Kafka.

    `account` counts what was written since the last take().
    """

    def __init__(self, bint capture=False):
        self.captured = [] if capture else None
        self.account = DeliveryAccount()
        self.producers = []

    def enter(self):
        """Have log() look for scopes; returns the token for leave(). Sets the context variable of this context."""
        global scopes
        scopes += 1
        return _scope.set(self)

    def leave(self, token=None):
        """End enter(); with its token the context variable is put back too."""
        global scopes
        scopes -= 1
        if token is not None:
            _scope.reset(token)

    def take(self):
        """The account of what was written so far; what follows is counted in a new one."""
        account, self.account = self.account, DeliveryAccount()
        return account

    def collect(self):
        """Bring the counts of all accounts up to date, without waiting."""
        cdef Producer client
        for client in list(self.producers):
            if client.closed:
                self.producers.remove(client)
            else:
                client.collect(ALL)

    def wait(self, DeliveryAccount account not None, double timeout_s):
        """Wait until nothing of an account of this scope is pending; whether that was so in time. GIL released."""
        import time

        deadline = time.monotonic() + timeout_s
        while True:
            self.collect()
            if account.pending == 0:
                return True
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            waited = False
            for client in list(self.producers):
                try:
                    (<Producer>client).wait(account, min(left_s, 0.1))
                    waited = True
                except errors.ClosedError:
                    pass  # what it had comes back in the thread that closes it
            if not waited:
                time.sleep(min(left_s, 0.005))

    cdef int _uses(self, Producer client) except -1:
        if client not in self.producers:
            self.producers.append(client)
        self.last_used = client
        return 0


cdef bint _find_scope(Producer client, Account **account) except -1:
    """The account of the handler that runs, if one does; false: it is to be found in the slow way."""
    cdef HandlerScope handler = _scope.get()
    if handler is None:
        return True
    if handler.captured is not None or handler.last_used is not client:
        return False
    account[0] = handler.account.account
    return True


cdef class NativeLogger:
    """Base of the loggers, which are Python classes and give it what it asks for: _open(), _shape(), _encode_into(),
    _stand_in_for(), _keep(), _overflow().

    Arguments of __init__: those of KafkaLogger and KafkaBatchLogger.
    """

    def __cinit__(self, *args, **kwargs):
        self.shapes = {}
        self.buffer = bytearray(1024)
        self.generation = -1

    @property
    def topic(self):
        """Where messages go that name no topic of their own; may be changed. None: there is no such topic."""
        return self.default_topic

    @topic.setter
    def topic(self, value):
        self.default_topic = None if value is None else check_topic(value)
        self.sender = NULL  # the next log() looks the topic up

    def log(self, data, topic=None, *, key=None, headers=None, timestamp_ms=None):
        """Take one message; it is sent in the background.

        Arguments:
            data: bytes (not copied), bytearray, memoryview or str, sent as they are; or an event, or anything that
                msgspec can encode. None is a tombstone and needs a key.
            topic: None: the logger's; without one, an event goes to its own.
            key: bytes or str; None: an event's own key.
            headers: (name, value) pairs or a mapping; str to bytes or None.
            timestamp_ms: milliseconds since the epoch; None: now.

        From any thread. Blocks only while the queue is full (KEVEN_LOG_QUEUE_BYTES, KEVEN_LOG_QUEUE_MESSAGES), GIL
        released, and raises QueueFullError after `timeout`. Raises UsageError, ConfigurationError (a topic's name),
        MessageTooLargeError and ClosedError, before anything is queued. What the broker refuses is told by flush() and
        on_delivery.
        """
        cdef Sender *sender = self.sender
        cdef Account *account
        cdef Account *scope = NULL
        cdef Py_ssize_t size
        cdef int64_t pending
        if (type(data) is bytes and sender != NULL and not sender.ended and self.generation == fork_generation
                and topic is None and key is None and headers is None and timestamp_ms is None
                and (scopes == 0 or _find_scope(self.client, &scope))):
            account = self.account
            size = PyBytes_GET_SIZE(data)
            pending = account.produced - account.delivered - account.failed
            if (size <= sender.max_message_bytes and pending < account.max_messages
                    and account.held_bytes + size <= account.max_bytes):
                self.client.append(account, scope, self.rkt, data, PyBytes_AS_STRING(data), size, None, NULL)
                if account.produced % COLLECT_EVERY == 0:
                    self.client.collect(COLLECTED)
                return
        self._take(data, topic, key, headers, timestamp_ms, None, None)

    def submit(self, data, topic=None, *, key=None, headers=None, timestamp_ms=None, DeliveryAccount deliveries=None,
               loop=None):
        """log() for the loggers themselves: counted in `deliveries`; `loop`: returns a future of that loop.

        Returns whether there is something to wait for: not when the message was captured, dropped or handed to a
        stand-in. With a loop nothing is waited for: QueueFullError at once.
        """
        return self._take(data, topic, key, headers, timestamp_ms, deliveries, loop)

    def _log_and_wait(self, data, topic):
        """Take one message and wait for its acknowledgement: the short way; what takes long goes to _settle()."""
        cdef DeliveryAccount account = DeliveryAccount()
        account.raises = True
        if self._take(data, topic, None, None, None, account, None) is not True:
            return
        try:
            self.client.wait(account, min(self.timeout, FIRST_WAIT_S))
        except errors.ClosedError:
            pass  # what is said of it stands in the account
        if account.account.delivered == 0:
            self._settle(account, "the message")

    cdef int _connect(self) except -1:
        """Have a producer: the shared one of this process, a new one after a fork or when librdkafka gave up."""
        cdef Topic topic
        if (self.client is not None and self.generation == fork_generation and self.client.closed
                and not self.client.replaced):
            raise errors.ClosedError("the producer of this logger was closed with its cluster: make a new logger")
        if self.client is None or self.generation != fork_generation or self.client.sender.ended:
            client, deliveries = self._open()
            self.client = client
            self.deliveries = deliveries
            self.account = self.deliveries.account
            self.generation = fork_generation
            self.sender = NULL
        if self.default_topic is not None:
            topic = self.client.topic(self.default_topic)
            self.rkt = topic.rkt
            # With a stand-in or a store in between, every message takes the slow way.
            if self.stand_in is None and not self.detour:
                self.sender = self.client.sender
        return 0

    cdef object _take(self, object data, object topic, object key, object headers, object timestamp_ms,
                      DeliveryAccount deliveries, object loop):
        cdef HandlerScope handler = None
        cdef const char *text = NULL
        cdef Py_ssize_t size = 0
        cdef Py_ssize_t key_size = 0
        cdef Extra *extra = NULL
        cdef Producer client
        cdef LoopGate gate
        cdef Topic target
        cdef bint own
        cdef object owner
        cdef object future = True
        cdef Py_buffer view
        if self.closed:
            raise errors.ClosedError("this logger is closed: make a new one")
        if scopes:
            handler = _scope.get()

        # What: `owner` keeps the bytes alive that `text` points to.
        if isinstance(data, bytes):
            owner = data
        elif isinstance(data, str):
            owner = data
            try:
                text = PyUnicode_AsUTF8AndSize(data, &size)
            except UnicodeEncodeError as error:
                raise errors.UsageError(f"a message has to be valid Unicode text: {error}") from None
        elif isinstance(data, (bytearray, memoryview)):
            try:
                owner = data.obj if isinstance(data, memoryview) else None
            except ValueError as error:  # it was released
                raise errors.UsageError(f"a message can't be read: {error}") from None
            if type(owner) is bytes and data.c_contiguous:
                PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
                text, size = <const char *>view.buf, view.len
                PyBuffer_Release(&view)
            else:
                owner = bytes(data)  # it may be changed once log() has returned
        elif data is None:
            owner = None
            if key is None:
                raise errors.UsageError("a message of None is a tombstone and needs a key: log(None, key=...)")
        else:
            own_topic, own_key, encode = self._shape_of(type(data))
            owner = encode(data) if encode is not None else self._encoded(data)
            if key is None and own_key is not None:
                key = own_key(data)
            if topic is None and self.default_topic is None and own_topic is not None:
                topic = own_topic if isinstance(own_topic, str) else own_topic(data)
        if text == NULL and owner is not None:
            text, size = PyBytes_AS_STRING(owner), PyBytes_GET_SIZE(owner)

        # Where.
        if topic is None:
            topic = self.default_topic
            if topic is None:
                raise errors.UsageError("the message has no topic: give the logger one, or log(data, topic=...)")
        elif not isinstance(topic, str):
            check_topic(topic)
        if key is not None:
            key = _key_of(key)
            key_size = PyBytes_GET_SIZE(key)
        if timestamp_ms is not None and not (type(timestamp_ms) is int and 0 < timestamp_ms < 1 << 62):
            raise errors.UsageError(f"timestamp_ms has to be milliseconds since the epoch, not {timestamp_ms!r:.80}")
        if headers is not None and not isinstance(headers, (list, tuple)):
            headers = pairs_of(headers)  # more than one reader follows
        if (handler is not None and handler.captured is not None) or self.stand_in is not None:
            free_extra(new_extra(headers, 0, RD_KAFKA_PARTITION_UA))  # refuses what a producer would refuse
            return self._divert(handler, check_topic(topic), text, size, owner, key, headers, timestamp_ms)

        if loop is not None:
            future = loop.create_future()
        if headers or timestamp_ms is not None or loop is not None:
            extra = new_extra(headers, timestamp_ms or 0, RD_KAFKA_PARTITION_UA)
        try:
            own = deliveries is None
            while True:
                self._connect()
                client = self.client
                if own:
                    deliveries = self.deliveries
                elif deliveries.producer is not None and deliveries.producer is not client:
                    raise errors.ClosedError("the producer of these messages was replaced")
                target = client.topics.get(topic)
                if target is None:
                    target = client.topic(check_topic(topic))
                client.check_size(target.name, size + key_size)
                # A handler's messages are kept by its record, whose offset waits for them.
                if self.detour and handler is None and own and self._keep(
                        target.name, _value_of(owner, text, size), key, headers, timestamp_ms):
                    free_extra(extra)
                    return False
                if not client.has_room(deliveries.account, size + key_size):
                    client.collect(ALL)
                if not client.has_room(deliveries.account, size + key_size):
                    if self.yields and handler is None and own and self._overflow(
                            target.name, _value_of(owner, text, size), key, headers, timestamp_ms):
                        free_extra(extra)
                        return False
                    self._wait_for_room(client, deliveries, target.name, size + key_size, loop is not None)
                gate = None if loop is None else client.gate_of(loop)
                if handler is not None:
                    handler._uses(client)
                # What was called so far may have run anything. From here to append() nothing can come in between.
                if not client.sender.ended and client.has_room(deliveries.account, size + key_size):
                    break
        except BaseException:
            free_extra(extra)
            raise
        if gate is not None:
            set_waiter(extra, future, gate)
        if client.append(deliveries.account, NULL if handler is None else handler.account.account, target.rkt, owner,
                         text, size, key, extra):
            gate.hurry()
        if deliveries.account.produced % COLLECT_EVERY == 0:
            client.collect(COLLECTED)
        return future

    cdef object _encoded(self, object data):
        if self.busy:
            return bytes(self._encode_into(data, bytearray()))  # by what encoding calls: a property that logs
        self.busy = True
        try:
            self._encode_into(data, self.buffer)
            return PyBytes_FromStringAndSize(PyByteArray_AS_STRING(self.buffer), PyByteArray_GET_SIZE(self.buffer))
        finally:
            self.busy = False
            if PyByteArray_GET_SIZE(self.buffer) > 1 << 20:
                self.buffer = bytearray(1024)

    cdef tuple _shape_of(self, cls):
        shape = self.shapes.get(cls)
        if shape is None:
            shape = self.shapes[cls] = self._shape(cls)
        return shape

    cdef object _divert(self, HandlerScope handler, str topic, const char *text, Py_ssize_t size, owner, key, headers,
                        timestamp_ms):
        value = _value_of(owner, text, size)
        if handler is not None and handler.captured is not None:
            handler.captured.append((topic, value, key, list(headers or ())))
        else:
            self._stand_in_for(self.stand_in, topic, value, key, headers, timestamp_ms)
        return False

    cdef int _wait_for_room(self, Producer client, DeliveryAccount deliveries, str topic, Py_ssize_t size,
                            bint at_once) except -1:
        timeout_s = 0 if at_once else self.timeout
        try:
            if client.wait_for_room(deliveries.account, size, timeout_s):
                return 0
        except errors.ClosedError:
            if not client.replaced:
                raise
        else:
            raise errors.QueueFullError(
                f"the send queue stayed full for {timeout_s:g} s ({deliveries.pending} messages, "
                f"{deliveries.pending_bytes} bytes; see KEVEN_LOG_QUEUE_MESSAGES and KEVEN_LOG_QUEUE_BYTES); the "
                f"message for {topic} was not queued")
        return 0

    def _end(self):
        """Refuse further messages."""
        self.closed = True
        self.sender = NULL

    def _configure(self, *, stand_in=None, bint detour=False, bint yields=False):
        """Set what stands between log() and the producer.

        Arguments:
            stand_in: takes the producer's place; _stand_in_for() is called with each message.
            detour: _keep() is asked first whether it takes a message.
            yields: when the queue is full, _overflow() is asked whether it takes the message.
        """
        self.stand_in = stand_in
        self.detour = detour
        self.yields = yields
        self.sender = NULL

    def _client(self):
        """The producer of this process, if there is one."""
        return self.client if self.generation == fork_generation else None


cdef object _value_of(object owner, const char *text, Py_ssize_t size):
    if owner is None or (isinstance(owner, bytes) and PyBytes_AS_STRING(owner) == text and len(owner) == size):
        return owner
    return PyBytes_FromStringAndSize(text, size)


cdef bytes _key_of(object key):
    if isinstance(key, str):
        try:
            return key.encode()
        except UnicodeEncodeError as error:
            raise errors.UsageError(f"a key has to be valid Unicode text: {error}") from None
    if not isinstance(key, bytes):
        raise errors.UsageError(f"a key has to be bytes or str, not {type(key).__name__}")
    return key if type(key) is bytes else bytes(key)
