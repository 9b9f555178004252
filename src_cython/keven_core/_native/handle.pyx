"""Life cycle of a librdkafka client: configuration, wake-up pipe, main-queue events, destruction, fork.

Ownership: a Client owns its queues and its pipe, if it has one, and drops them in close(). The rd_kafka_t belongs to a
Handle, which payloads that outlive their batch also reference: rd_kafka_destroy waits for every message still alive, so
it runs only when the last of them is gone.

GIL: every call of librdkafka is made without it, even short ones (a librdkafka thread that wanted the GIL would
deadlock otherwise; none of ours does). No librdkafka callback of this package runs Python.
"""

from cpython.exc cimport PyErr_CheckSignals

from keven_core._native.forks cimport allow_forks, hold_forks, look_up, thread_is_new, watch_forks
from keven_core._native.library cimport alive, api, load
from rdkafka cimport *

import os

from keven_core.kafka import errors

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout)
    short POLLIN

cdef extern from "unistd.h" nogil:
    ssize_t read(int fd, void *buf, size_t count)
    ssize_t write(int fd, const void *buf, size_t count)


cdef extern from *:
    """
    #include <pthread.h>
    #include <stdatomic.h>
    #include <stdlib.h>
    #include <time.h>

    typedef struct {
        void (*destroy)(void *rk, int flags);
        void *rk;
        atomic_int state;  /* 0 running, 1 done, 2 given up: whoever comes second frees the job */
    } keven_destroy_job;

    static void *keven_destroy_main(void *arg) {
        keven_destroy_job *job = (keven_destroy_job *)arg;
        job->destroy(job->rk, 8);  /* RD_KAFKA_DESTROY_F_NO_CONSUMER_CLOSE: closed before, or never */
        if (atomic_exchange(&job->state, 1) == 2) free(job);
        return NULL;
    }

    /* Destroy a client on a thread of its own; 1 when it ended within timeout_ms, 0 when it was given up. */
    static int keven_destroy(void (*destroy)(void *, int), void *rk, long timeout_ms) {
        keven_destroy_job *job = (keven_destroy_job *)calloc(1, sizeof(*job));
        pthread_t thread;
        struct timespec pause = {0, 200000};
        long waited_us = 0;
        if (!job) return 0;
        job->destroy = destroy;
        job->rk = rk;
        if (pthread_create(&thread, NULL, keven_destroy_main, job) != 0) { free(job); return 0; }
        pthread_detach(thread);
        while (atomic_load(&job->state) == 0 && waited_us < timeout_ms * 1000) {
            nanosleep(&pause, NULL);
            waited_us += 250;
        }
        if (atomic_exchange(&job->state, 2) == 1) { free(job); return 1; }
        return 0;
    }
    """
    int keven_destroy(void (*destroy)(void *, int) noexcept nogil, void *rk, long timeout_ms) nogil


# Bumped in each forked child: librdkafka's threads do not come along, so an inherited client must not be touched.
cdef long fork_generation = 0


def _after_fork_in_child():
    global fork_generation
    fork_generation += 1


os.register_at_fork(after_in_child=_after_fork_in_child)
if watch_forks():
    raise MemoryError("pthread_atfork")


SECRET_WORDS = ("password", "secret", "token", "ssl.key.pem", "certificate.pem", "jaas", "keytab", "assertion")


def is_secret(key):
    """Whether a librdkafka setting holds a secret, by its name: such values never appear in a message."""
    return any(word in key for word in SECRET_WORDS)


cdef object error_of(int code, str context, const char *detail, bint fatal):
    """The exception for a librdkafka code. `detail` may be NULL; it is librdkafka's own text, never a payload."""
    name = api.err2name(code).decode()
    text = detail.decode("utf-8", "replace") if detail != NULL else api.err2str(code).decode("utf-8", "replace")
    return errors.kafka_error(code, name, f"{context}: {text} ({name})" if context else f"{text} ({name})", fatal=fatal)


cdef object error_of_object(rd_kafka_error_t *error, str context):
    """The exception for an rd_kafka_error_t, which is destroyed here. NULL gives None: no error."""
    if error == NULL:
        return None
    exception = error_of(api.error_code(error), context, api.error_string(error), False)
    api.error_destroy(error)
    return exception


cdef void prepare_thread() noexcept nogil:
    """Have OpenSSL know this thread before librdkafka asks it for a random number on it: see forks.pxd.

    A random salt is what librdkafka's public functions offer to that end.
    """
    cdef rd_kafka_UserScramCredentialAlteration_t *salted
    if not thread_is_new():
        return
    hold_forks()
    salted = api.UserScramCredentialUpsertion_new(b"", RD_KAFKA_SCRAM_MECHANISM_SHA_256, 4096, b"", 0, NULL, 0)
    if salted != NULL:
        api.UserScramCredentialAlteration_destroy(salted)
    allow_forks()


cdef int _on_thread_start(rd_kafka_t *rk, int thread_type, const char *thread_name, void *opaque) noexcept nogil:
    prepare_thread()
    return 0


cdef int _on_new(rd_kafka_t *rk, const rd_kafka_conf_t *conf, void *opaque, char *errstr,
                 size_t errstr_size) noexcept nogil:
    return api.interceptor_add_on_thread_start(rk, b"keven-threads", _on_thread_start, NULL)


cdef rd_kafka_conf_t *new_conf(object options) except NULL:
    """A configuration from a mapping of str to str. The caller passes it to Handle.create, which takes it over."""
    cdef char errstr[512]
    cdef rd_kafka_conf_t *conf
    cdef bytes name, value
    load()
    conf = api.conf_new()
    api.conf_set_resolve_cb(conf, look_up)
    api.conf_interceptor_add_on_new(conf, b"keven-threads", _on_new, NULL)
    try:
        for key, text in options.items():
            name = key.encode()
            value = text.encode()
            if api.conf_set(conf, name, value, errstr, sizeof(errstr)) != RD_KAFKA_CONF_OK:
                if is_secret(key):
                    raise errors.ConfigurationError(f"librdkafka does not accept the value of {key}")
                reason = errstr.decode("utf-8", "replace")
                raise errors.ConfigurationError(f"librdkafka does not accept {key}={text!r}: {reason}")
    except BaseException:
        api.conf_destroy(conf)
        raise
    return conf


cdef rd_kafka_topic_partition_list_t *partition_list(object partitions) except NULL:
    """A list from (topic, partition) or (topic, partition, offset) tuples; freed by free_partition_list."""
    cdef rd_kafka_topic_partition_list_t *parts = api.topic_partition_list_new(len(partitions))
    cdef rd_kafka_topic_partition_t *part
    cdef bytes topic
    alive.partition_lists += 1
    try:
        for entry in partitions:
            if len(entry) not in (2, 3):
                raise errors.UsageError(f"a partition is (topic, partition[, offset]), not {entry!r}")
            topic = entry[0].encode()
            part = api.topic_partition_list_add(parts, topic, entry[1])
            part.offset = entry[2] if len(entry) > 2 else RD_KAFKA_OFFSET_INVALID
    except BaseException:
        free_partition_list(parts)
        raise
    return parts


cdef void free_partition_list(rd_kafka_topic_partition_list_t *parts) noexcept:
    if parts != NULL:
        api.topic_partition_list_destroy(parts)
        alive.partition_lists -= 1


cdef list tuples_of(rd_kafka_topic_partition_list_t *parts):
    """(topic, partition, offset, error code) of each element; NULL gives an empty list."""
    if parts == NULL:
        return []
    return [
        (parts.elems[i].topic.decode("utf-8", "replace"), parts.elems[i].partition, parts.elems[i].offset,
         parts.elems[i].err)
        for i in range(parts.cnt)
    ]


cdef void _destroy(void *rk, int flags) noexcept nogil:
    hold_forks()
    api.destroy_flags(<rd_kafka_t *>rk, flags)
    allow_forks()


cdef class Handle:
    """Owns one rd_kafka_t. Destroys it when the last reference goes, unless abandoned or inherited by fork."""

    def __cinit__(self):
        self.rk = NULL
        self.generation = fork_generation

    @staticmethod
    cdef Handle create(int kind, rd_kafka_conf_t *conf):
        """Start a client. Takes `conf` over, also on failure. Does not connect yet, so it does not block."""
        cdef char errstr[512]
        cdef Handle handle = Handle.__new__(Handle)
        with nogil:
            hold_forks()
            handle.rk = api.new(kind, conf, errstr, sizeof(errstr))
            allow_forks()
        if handle.rk == NULL:
            # rdkafka.h, rd_kafka_new: the conf is freed by librdkafka only on success.
            api.conf_destroy(conf)
            raise errors.ConfigurationError(
                f"librdkafka refuses this combination of settings: {errstr.decode('utf-8', 'replace')}"
            )
        alive.clients += 1
        return handle

    cdef bint forked(self) noexcept:
        return self.generation != fork_generation

    cdef bint destroy(self, long timeout_ms) except -1:
        """Destroy the client, unless payloads or calls still need it (then the last of them does); false: given up.

        rd_kafka_destroy takes no time limit and has hung before (librdkafka#4519), so it runs on a thread of its own.
        """
        cdef rd_kafka_t *rk = self.rk
        cdef bint ended
        if rk == NULL or self.forked() or self.payloads or self.calls:
            return True
        self.rk = NULL
        if self.abandoned:
            return False
        with nogil:
            ended = keven_destroy(_destroy, rk, timeout_ms)
        if ended:
            self._gone()
        return ended

    cdef void _gone(self) noexcept:
        alive.clients -= 1
        if self.attached != NULL:
            self.free_attached(self.attached)
            self.attached = NULL

    def __dealloc__(self):
        # Reached with a client only when it was never closed or when a payload outlived it.
        if self.rk != NULL and self.generation == fork_generation and not self.abandoned:
            with nogil:
                _destroy(self.rk, RD_KAFKA_DESTROY_F_NO_CONSUMER_CLOSE)
            self._gone()
        self.rk = NULL


cdef class Client:
    """Base of consumer and producer: main queue, wake-up pipe, events.

    Threads: wake() and closed may be used from any thread; everything else by the owner's docstring.
    """

    def __cinit__(self):
        self.main_queue = NULL
        self.wake_read = -1
        self.wake_write = -1
        self.closed = True

    cdef int _start(self, int kind, rd_kafka_conf_t *conf) except -1:
        self.handle = Handle.create(kind, conf)
        self.closed = False
        with nogil:
            # Logs become events of the main queue: no Python on librdkafka's threads ("log.queue" is set by the owner).
            api.set_log_queue(self.handle.rk, NULL)
            self.main_queue = api.queue_get_main(self.handle.rk)
        alive.queues += 1
        return 0

    cdef int _open_pipe(self) except -1:
        """Have events of the main queue, and wake(), write to a pipe that _wait() and event loops watch."""
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        os.set_blocking(self.wake_write, False)
        with nogil:
            api.queue_io_event_enable(self.main_queue, self.wake_write, b"m", 1)
        return 0

    cdef rd_kafka_t *_rk(self) except NULL:
        """The client, checked: raises ClosedError after close, ForkedProcessError in a forked child."""
        if self.handle is not None and self.handle.generation != fork_generation:
            raise errors.ForkedProcessError(
                f"this {self.kind} was made before os.fork() and can't be used in the child: "
                f"make a new one there, or start workers with start_events_receiver_process()"
            )
        if self.closed:
            raise errors.ClosedError(f"this {self.kind} is closed: make a new one")
        prepare_thread()
        return self.handle.rk

    cdef void _drop_queues(self) noexcept:
        """Give back the main queue and the pipe. librdkafka must not write to the pipe afterwards."""
        if self.main_queue != NULL:
            with nogil:
                api.queue_io_event_enable(self.main_queue, -1, NULL, 0)
                api.queue_destroy(self.main_queue)
            self.main_queue = NULL
            alive.queues -= 1
        if self.wake_read >= 0 and not self.handle.abandoned:
            os.close(self.wake_read)
            os.close(self.wake_write)
            self.wake_read = self.wake_write = -1

    @property
    def wake_fd(self):
        """Descriptor that becomes readable when there is something to serve (for loop.add_reader)."""
        self._rk()
        return self.wake_read

    @property
    def name(self):
        """librdkafka's name of this client, as it stands in its logs."""
        return api.name(self._rk()).decode()

    def wake(self):
        """Make a waiting owner return at once. From any thread and from signal handlers; never blocks."""
        if self.wake_write >= 0 and not self.closed and not self.handle.forked():
            # A full pipe (EAGAIN) already wakes the owner, so the result does not matter.
            write(self.wake_write, b"w", 1)

    def drain_wake(self):
        """Empty the pipe. Owner only, before it drains the queues."""
        cdef char sink[256]
        if self.wake_read >= 0:
            while read(self.wake_read, sink, sizeof(sink)) == sizeof(sink):
                pass

    def rest(self, int timeout_ms):
        """Wait until wake() is called or events have come, at most so long, GIL released. Owner only."""
        self._wait(timeout_ms)

    cdef int _wait(self, int timeout_ms) except -1:
        """Wait for the pipe, GIL released; returns early on a signal, whose Python handler has then run."""
        cdef pollfd fds
        cdef char sink[256]
        cdef int ready
        fds.fd = self.wake_read
        fds.events = POLLIN
        fds.revents = 0
        with nogil:
            ready = poll(&fds, 1, timeout_ms)
            if ready > 0:
                while read(fds.fd, sink, sizeof(sink)) == sizeof(sink):
                    pass
        PyErr_CheckSignals()
        return ready if ready > 0 else 0  # EINTR: the signal has been dealt with

    cdef rd_kafka_event_t *_next_event(self) noexcept:
        """The next event of the main queue, or NULL; without waiting."""
        cdef rd_kafka_event_t *event
        with nogil:
            event = api.queue_poll(self.main_queue, 0)
        return event

    cdef int _on_commit_result(self, rd_kafka_event_t *event) except -1:
        raise errors.InternalError(f"commit results on a {self.kind}")

    cdef list _serve(self):
        """Take every event that has come, without waiting.

        Returns tuples: ("error", exception), ("log", level, facility, text), ("stats", json), ("token", config).
        """
        cdef rd_kafka_event_t *event
        cdef int kind
        cdef const char *facility
        cdef const char *text
        cdef int level
        cdef list found = None
        while True:
            event = self._next_event()
            if event == NULL:
                return found
            try:
                kind = api.event_type(event)
                if kind == RD_KAFKA_EVENT_OFFSET_COMMIT:
                    self._on_commit_result(event)
                    continue
                if found is None:
                    found = []
                if kind == RD_KAFKA_EVENT_LOG:
                    if api.event_log(event, &facility, &text, &level) == 0:
                        found.append(("log", level, facility.decode(), text.decode("utf-8", "replace")))
                elif kind == RD_KAFKA_EVENT_ERROR:
                    found.append(("error", self._event_error(<size_t>event)))
                elif kind == RD_KAFKA_EVENT_STATS:
                    found.append(("stats", api.event_stats(event).decode("utf-8", "replace")))
                elif kind == RD_KAFKA_EVENT_OAUTHBEARER_TOKEN_REFRESH:
                    text = api.event_config_string(event)
                    found.append(("token", text.decode() if text != NULL else ""))
            finally:
                api.event_destroy(event)

    def _event_error(self, size_t address):
        cdef rd_kafka_event_t *event = <rd_kafka_event_t *>address
        cdef int code = api.event_error(event)
        if code == RD_KAFKA_RESP_ERR__FATAL or api.event_error_is_fatal(event):
            return self._fatal_error()
        return error_of(code, None, api.event_error_string(event), False)

    cdef object _fatal_error(self):
        """The error that the client can't go on after."""
        cdef char reason[512]
        # rdkafka.h: the underlying code and reason of a fatal error come from rd_kafka_fatal_error.
        cdef int code = api.fatal_error(self.handle.rk, reason, sizeof(reason))
        return error_of(code, f"the {self.kind} can't go on", reason, True)

    def set_token(self, str token, object expires_at_ms, str principal, dict extensions):
        """Hand over an OAUTHBEARER token. Raises ConfigurationError when librdkafka refuses it."""
        cdef char errstr[512]
        cdef rd_kafka_t *rk = self._rk()
        cdef const char *pairs[64]
        cdef size_t count = 0
        cdef bytes token_bytes = token.encode()
        cdef bytes principal_bytes = principal.encode()
        cdef list keep = [text.encode() for pair in extensions.items() for text in pair]
        if len(keep) > 64:
            raise errors.ConfigurationError("an OAUTHBEARER token has more than 32 extensions")
        for text in keep:
            pairs[count] = <bytes>text
            count += 1
        if api.oauthbearer_set_token(rk, token_bytes, expires_at_ms, principal_bytes, pairs, count, errstr,
                                     sizeof(errstr)) != 0:
            raise errors.ConfigurationError("librdkafka refuses the OAUTHBEARER token: "
                                            + errstr.decode("utf-8", "replace"))

    def set_token_failure(self, str reason):
        """Say that no OAUTHBEARER token could be had; librdkafka asks again after 10 s."""
        cdef bytes text = reason.encode()
        api.oauthbearer_set_token_failure(self._rk(), text)

    def add_brokers(self, str addresses not None):
        """Make these brokers known again, comma-separated; those that are known are left as they are. Any thread."""
        cdef bytes text = addresses.encode()
        cdef const char *data = text
        cdef rd_kafka_t *rk = self._rk()
        with nogil:
            api.brokers_add(rk, data)

    def metadata(self, int timeout_ms, *, bint used_only=False):
        """Partition counts by topic: {name: count}; a topic in error has a negative KafkaError code instead.

        `used_only`: of the topics that this client has a handle of, instead of all of the cluster, which may be tens
        of thousands. A broker that creates topics by itself creates those that are missing then.

        Blocks up to `timeout_ms` with the GIL released. From any thread. Raises KafkaError.
        """
        cdef rd_kafka_t *rk = self._rk()
        cdef const rd_kafka_metadata_t *meta = NULL
        cdef int code
        # A close() meanwhile leaves the client to this reference: it is destroyed when the call has returned.
        cdef Handle handle = self.handle
        handle.calls += 1
        with nogil:
            code = api.metadata(rk, not used_only, NULL, &meta, timeout_ms)
        handle.calls -= 1
        if code != 0:
            raise error_of(code, "the cluster's topics can't be listed", NULL, False)
        try:
            return {
                meta.topics[i].topic.decode("utf-8", "replace"):
                    meta.topics[i].partition_cnt if meta.topics[i].err == 0 else -abs(meta.topics[i].err)
                for i in range(meta.topic_cnt)
            }
        finally:
            api.metadata_destroy(meta)

    def trigger_fatal_error(self, int code, str reason):
        """Put the client into its fatal state, as a broker's answer would (rd_kafka_test_fatal_error): for tests."""
        cdef bytes encoded = reason.encode()
        cdef const char *text = encoded
        cdef rd_kafka_t *rk = self._rk()
        with nogil:
            api.test_fatal_error(rk, code, text)
