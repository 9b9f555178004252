"""Declarations of handle.pyx: what consumer, producer and mock cluster share."""

from rdkafka cimport *


# Counted up in each forked child: what was made before the fork must not be touched there.
cdef long fork_generation

cdef object error_of(int code, str context, const char *detail, bint fatal)
cdef object error_of_object(rd_kafka_error_t *error, str context)
cdef void prepare_thread() noexcept nogil
cdef rd_kafka_conf_t *new_conf(object options) except NULL
cdef rd_kafka_topic_partition_list_t *partition_list(object partitions) except NULL
cdef void free_partition_list(rd_kafka_topic_partition_list_t *parts) noexcept
cdef list tuples_of(rd_kafka_topic_partition_list_t *parts)


cdef class Handle:
    cdef rd_kafka_t *rk
    cdef long generation
    cdef bint abandoned
    cdef Py_ssize_t payloads  # messages that live on in Payload objects
    cdef Py_ssize_t calls     # calls of other threads under way
    cdef void *attached       # what callbacks of the client refer to: freed after it
    cdef void (*free_attached)(void *) noexcept nogil

    @staticmethod
    cdef Handle create(int kind, rd_kafka_conf_t *conf)
    cdef bint forked(self) noexcept
    cdef bint destroy(self, long timeout_ms) except -1
    cdef void _gone(self) noexcept


cdef class Client:
    cdef Handle handle
    cdef rd_kafka_queue_t *main_queue
    cdef int wake_read
    cdef int wake_write
    cdef readonly bint closed
    cdef readonly str kind

    cdef int _start(self, int kind, rd_kafka_conf_t *conf) except -1
    cdef int _open_pipe(self) except -1
    cdef rd_kafka_t *_rk(self) except NULL
    cdef int _wait(self, int timeout_ms) except -1
    cdef list _serve(self)
    cdef object _fatal_error(self)
    cdef rd_kafka_event_t *_next_event(self) noexcept
    cdef int _on_commit_result(self, rd_kafka_event_t *event) except -1
    cdef void _drop_queues(self) noexcept
