"""Resolves librdkafka's functions, once, from the library that confluent-kafka brings with it.

There is one librdkafka in the process, no header is needed to build, and its security fixes arrive with
confluent-kafka. Objects of confluent-kafka never cross into this binding, nor ours into theirs.

That means importing confluent-kafka (about 100 ms), so it is done by load() when the first client is made.
"""

cdef extern from "dlfcn.h" nogil:
    void *dlopen(const char *filename, int flags)
    void *dlsym(void *handle, const char *symbol)
    char *dlerror()
    int RTLD_NOW
    int RTLD_NOLOAD


# The order of the fields of Api in library.pxd; tests/unit/test_abi.py compares the two.
SYMBOLS = """
version version_str get_err_descs err2str err2name conf_new conf_destroy conf_set conf_set_opaque conf_set_events
conf_set_resolve_cb conf_set_rebalance_cb conf_set_offset_commit_cb conf_interceptor_add_on_new
interceptor_add_on_thread_start interceptor_add_on_response_received new destroy_flags name set_log_queue fatal_error
test_fatal_error UserScramCredentialUpsertion_new UserScramCredentialAlteration_destroy brokers_add queue_new
queue_get_main queue_get_consumer
queue_destroy queue_io_event_enable queue_yield queue_poll event_type event_destroy event_message_array event_error
event_error_string event_error_is_fatal event_log event_stats event_config_string event_topic_partition_list
error_code error_string error_destroy topic_partition_list_new topic_partition_list_destroy topic_partition_list_copy
topic_partition_list_add topic_partition_set_leader_epoch subscribe assign incremental_assign incremental_unassign
rebalance_protocol assignment_lost consume_batch_queue message_destroy message_timestamp message_headers
message_leader_epoch message_status message_detach_headers topic_name header_get_all header_get_last headers_new
headers_destroy header_add offsets_store commit_queue committed pause_partitions resume_partitions seek_partitions
offsets_for_times query_watermark_offsets metadata metadata_destroy consumer_close_queue consumer_closed topic_new
topic_destroy default_topic_conf_dup topic_conf_set_partitioner_cb topic_conf_set_opaque topic_partition_available
msg_partitioner_murmur2 last_error produce produce_batch produceva flush purge oauthbearer_set_token
oauthbearer_set_token_failure mock_cluster_new mock_cluster_destroy mock_cluster_bootstraps mock_topic_create
mock_topic_set_error mock_push_request_errors_array mock_clear_request_errors mock_broker_set_down mock_broker_set_up
mock_broker_set_rtt mock_partition_set_leader mock_coordinator_set mock_group_initial_rebalance_delay_ms
mock_start_request_tracking mock_get_requests mock_request_api_key mock_request_destroy_array
""".split()

MINIMUM_VERSION = 0x020F00FF  # 2.15.0: fixes of the KIP-848 consumer and of close (librdkafka's change log)


cdef int _resolve(str path) except -1:
    cdef void **fields = <void **>&api
    cdef void *handle
    cdef void *symbol
    cdef bytes encoded = path.encode()
    cdef bytes name
    if sizeof(Api) != len(SYMBOLS) * sizeof(void *):
        raise ImportError("keven_core._native.library: SYMBOLS and Api differ; rebuild the package")
    # RTLD_NOLOAD: the very copy that confluent_kafka loaded; dlsym on it also searches its dependencies.
    handle = dlopen(encoded, RTLD_NOW | RTLD_NOLOAD)
    if handle == NULL:
        raise ImportError(f"librdkafka of confluent-kafka can't be reached through {path}: {dlerror().decode()}")
    missing = []
    for i, short_name in enumerate(SYMBOLS):
        name = b"rd_kafka_" + short_name.encode()
        symbol = dlsym(handle, name)
        if symbol == NULL:
            missing.append(name.decode())
        fields[i] = symbol
    if missing:
        raise ImportError(
            f"the librdkafka that confluent-kafka brings lacks {', '.join(missing)}; "
            f"install confluent-kafka >= 2.15 from its wheels (pip install 'confluent-kafka>=2.15')"
        )
    if api.version() < MINIMUM_VERSION:
        raise ImportError(
            f"librdkafka {api.version_str().decode()} is too old, 2.15.0 or newer is needed: "
            f"pip install 'confluent-kafka>=2.15'"
        )
    return 0


cdef bint loaded = False


cdef int load() except -1:
    """Fill the table of functions; every call after the first costs nothing. Raises ImportError."""
    global loaded
    if not loaded:
        from confluent_kafka import cimpl
        _resolve(cimpl.__file__)
        loaded = True
    return 0


def version():
    """Version of the librdkafka in use, for example "2.16.0"."""
    load()
    return api.version_str().decode()


def error_descriptions():
    """Every error that this librdkafka knows, as (code, name, description) tuples."""
    cdef const rd_kafka_err_desc_t *descs
    cdef size_t count, i
    load()
    api.get_err_descs(&descs, &count)
    return [
        (descs[i].code, descs[i].name.decode(), (descs[i].desc or b"").decode())
        for i in range(count)
        if descs[i].name != NULL
    ]


def live_objects():
    """How many native objects are alive, by kind. All are zero once every client is closed and nothing is held."""
    return dict(alive)


def struct_layout():
    """Size of each public struct of librdkafka as compiled here, and the offsets of its fields, in bytes.

    Compared with a real rdkafka.h by tests/unit/test_abi.py.
    """
    cdef rd_kafka_message_t m
    cdef rd_kafka_topic_partition_t p
    cdef rd_kafka_topic_partition_list_t t
    cdef rd_kafka_err_desc_t e
    cdef rd_kafka_vu_t v
    cdef rd_kafka_metadata_t d
    cdef rd_kafka_metadata_topic_t dt
    cdef rd_kafka_metadata_partition_t dp
    return {
        "rd_kafka_message_t": {
            "sizeof": sizeof(m), "err": <char *>&m.err - <char *>&m, "rkt": <char *>&m.rkt - <char *>&m,
            "partition": <char *>&m.partition - <char *>&m, "payload": <char *>&m.payload - <char *>&m,
            "len": <char *>&m.len - <char *>&m, "key": <char *>&m.key - <char *>&m,
            "key_len": <char *>&m.key_len - <char *>&m, "offset": <char *>&m.offset - <char *>&m,
            "_private": <char *>&m._private - <char *>&m,
        },
        "rd_kafka_topic_partition_t": {
            "sizeof": sizeof(p), "topic": <char *>&p.topic - <char *>&p,
            "partition": <char *>&p.partition - <char *>&p, "offset": <char *>&p.offset - <char *>&p,
            "metadata": <char *>&p.metadata - <char *>&p, "metadata_size": <char *>&p.metadata_size - <char *>&p,
            "opaque": <char *>&p.opaque - <char *>&p, "err": <char *>&p.err - <char *>&p,
        },
        "rd_kafka_topic_partition_list_t": {
            "sizeof": sizeof(t), "cnt": <char *>&t.cnt - <char *>&t, "elems": <char *>&t.elems - <char *>&t,
        },
        "struct rd_kafka_err_desc": {
            "sizeof": sizeof(e), "code": <char *>&e.code - <char *>&e, "name": <char *>&e.name - <char *>&e,
            "desc": <char *>&e.desc - <char *>&e,
        },
        "rd_kafka_vu_t": {"sizeof": sizeof(v), "vtype": <char *>&v.vtype - <char *>&v, "u": <char *>&v.u - <char *>&v},
        "rd_kafka_metadata_t": {
            "sizeof": sizeof(d), "topic_cnt": <char *>&d.topic_cnt - <char *>&d,
            "topics": <char *>&d.topics - <char *>&d,
        },
        "rd_kafka_metadata_topic_t": {
            "sizeof": sizeof(dt), "topic": <char *>&dt.topic - <char *>&dt,
            "partition_cnt": <char *>&dt.partition_cnt - <char *>&dt,
            "partitions": <char *>&dt.partitions - <char *>&dt, "err": <char *>&dt.err - <char *>&dt,
        },
        "rd_kafka_metadata_partition_t": {
            "sizeof": sizeof(dp), "id": <char *>&dp.id - <char *>&dp, "err": <char *>&dp.err - <char *>&dp,
            "leader": <char *>&dp.leader - <char *>&dp,
        },
    }
