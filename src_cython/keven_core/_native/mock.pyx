"""librdkafka's mock cluster: real protocol on loopback ports, inside this process.

Ownership: a MockCluster owns the cluster and the client that drives it; both end in close().
"""

cimport cython
from libc.stdint cimport int16_t, int32_t
from libc.stdlib cimport free, malloc

from keven_core._native.handle cimport Client, error_of, new_conf
from keven_core._native.library cimport alive, api
from rdkafka cimport *

from keven_core.kafka import errors


@cython.final
cdef class MockCluster(Client):
    """A cluster of `brokers` mock brokers. One owner thread; the brokers run on a thread of librdkafka."""

    cdef rd_kafka_mock_cluster_t *cluster
    cdef bint tracking

    def __cinit__(self):
        self.cluster = NULL
        self.kind = "embedded cluster"

    def __init__(self, int brokers=1):
        cdef rd_kafka_conf_t *conf = new_conf({"log.queue": "true", "client.id": "keven-embedded"})
        self._start(RD_KAFKA_PRODUCER, conf)
        with nogil:
            self.cluster = api.mock_cluster_new(self.handle.rk, brokers)
        if self.cluster == NULL:
            self.close()
            raise errors.InternalError("librdkafka could not start its mock cluster")
        alive.mock_clusters += 1
        with nogil:
            # The mock's default of 3 s only makes tests slow.
            api.mock_group_initial_rebalance_delay_ms(self.cluster, 0)

    def __dealloc__(self):
        if self.handle is not None and not self.handle.forked():
            self._end()

    cdef void _end(self) noexcept:
        if self.cluster != NULL:
            with nogil:
                api.mock_cluster_destroy(self.cluster)
            self.cluster = NULL
            alive.mock_clusters -= 1
        self._drop_queues()

    cdef rd_kafka_mock_cluster_t *_cluster(self) except NULL:
        self._rk()
        return self.cluster

    def bootstrap_servers(self):
        """Addresses of the brokers, comma-separated."""
        return api.mock_cluster_bootstraps(self._cluster()).decode()

    def create_topic(self, str topic, int partitions, int replication_factor):
        """Create a topic; raises KafkaError when it exists."""
        cdef bytes name = topic.encode()
        cdef int code = api.mock_topic_create(self._cluster(), name, partitions, replication_factor)
        if code != 0:
            raise error_of(code, f"topic {topic}", NULL, False)

    def set_topic_error(self, str topic, int code):
        """Answer metadata and produce requests for a topic with an error; 0 ends it."""
        cdef bytes name = topic.encode()
        api.mock_topic_set_error(self._cluster(), name, code)

    def push_errors(self, int16_t api_key, codes):
        """Answer the next requests of a kind with these errors, one each (0: no error; -195: drop the connection)."""
        cdef size_t count = len(codes)
        cdef int *array = <int *>malloc(count * sizeof(int))
        if array == NULL:
            raise MemoryError()
        try:
            for i, code in enumerate(codes):
                array[i] = code
            api.mock_push_request_errors_array(self._cluster(), api_key, count, array)
        finally:
            free(array)

    def clear_errors(self, int16_t api_key):
        """Forget the errors that push_errors() left over for a kind of request."""
        api.mock_clear_request_errors(self._cluster(), api_key)

    def set_down(self, int32_t broker_id, bint down):
        """Take a broker (1, 2, ...) off its port, or bring it back."""
        cdef int code
        if down:
            code = api.mock_broker_set_down(self._cluster(), broker_id)
        else:
            code = api.mock_broker_set_up(self._cluster(), broker_id)
        if code != 0:
            raise error_of(code, f"broker {broker_id}", NULL, False)

    def set_rtt(self, int32_t broker_id, int rtt_ms):
        """Delay every answer of a broker by `rtt_ms`."""
        cdef int code = api.mock_broker_set_rtt(self._cluster(), broker_id, rtt_ms)
        if code != 0:
            raise error_of(code, f"broker {broker_id}", NULL, False)

    def set_leader(self, str topic, int32_t partition, int32_t broker_id):
        """Move a partition's leader; -1: no leader."""
        cdef bytes name = topic.encode()
        cdef int code = api.mock_partition_set_leader(self._cluster(), name, partition, broker_id)
        if code != 0:
            raise error_of(code, f"{topic} [{partition}]", NULL, False)

    def set_coordinator(self, str group, int32_t broker_id):
        """Move a consumer group's coordinator."""
        cdef bytes name = group.encode()
        cdef int code = api.mock_coordinator_set(self._cluster(), b"group", name, broker_id)
        if code != 0:
            raise error_of(code, f"group {group}", NULL, False)

    def requests(self):
        """How many requests of each kind have come since the first call, by API key; it keeps all of them in memory."""
        cdef rd_kafka_mock_request_t **found
        cdef size_t count = 0
        cdef size_t i
        cdef rd_kafka_mock_cluster_t *cluster = self._cluster()
        with nogil:
            if not self.tracking:
                self.tracking = True
                api.mock_start_request_tracking(cluster)
            found = api.mock_get_requests(cluster, &count)
        counts = {}
        for i in range(count):
            key = api.mock_request_api_key(found[i])
            counts[key] = counts.get(key, 0) + 1
        if found != NULL:
            api.mock_request_destroy_array(found, count)
        return counts

    def close(self):
        """End the cluster. May be called twice."""
        if self.closed:
            return
        self._rk()
        self._end()
        self.closed = True
        self.handle.destroy(5000)
        self.handle = None
