"""Declarations of library.pyx: the table of librdkafka's functions and the live-object counters."""

from libc.stdint cimport int16_t, int32_t, int64_t

from rdkafka cimport *


cdef struct Api:
    # One field per function, named as the symbol without "rd_kafka_", in the order of SYMBOLS in library.pyx.
    int (*version)() noexcept nogil
    const char *(*version_str)() noexcept nogil
    void (*get_err_descs)(const rd_kafka_err_desc_t **descs, size_t *cnt) noexcept nogil
    const char *(*err2str)(int err) noexcept nogil
    const char *(*err2name)(int err) noexcept nogil
    rd_kafka_conf_t *(*conf_new)() noexcept nogil
    void (*conf_destroy)(rd_kafka_conf_t *conf) noexcept nogil
    int (*conf_set)(
        rd_kafka_conf_t *conf, const char *name, const char *value, char *errstr, size_t size) noexcept nogil
    void (*conf_set_opaque)(rd_kafka_conf_t *conf, void *opaque) noexcept nogil
    void (*conf_set_events)(rd_kafka_conf_t *conf, int events) noexcept nogil
    void (*conf_set_resolve_cb)(rd_kafka_conf_t *conf, resolve_cb_t cb) noexcept nogil
    void (*conf_set_rebalance_cb)(rd_kafka_conf_t *conf, rebalance_cb_t cb) noexcept nogil
    void (*conf_set_offset_commit_cb)(rd_kafka_conf_t *conf, offset_commit_cb_t cb) noexcept nogil
    int (*conf_interceptor_add_on_new)(
        rd_kafka_conf_t *conf, const char *ic_name, on_new_t on_new, void *opaque) noexcept nogil
    int (*interceptor_add_on_thread_start)(
        rd_kafka_t *rk, const char *ic_name, on_thread_start_t on_thread_start, void *opaque) noexcept nogil
    int (*interceptor_add_on_response_received)(
        rd_kafka_t *rk, const char *ic_name, on_response_received_t on_response, void *opaque) noexcept nogil
    rd_kafka_t *(*new)(int type, rd_kafka_conf_t *conf, char *errstr, size_t size) noexcept nogil
    void (*destroy_flags)(rd_kafka_t *rk, int flags) noexcept nogil
    const char *(*name)(const rd_kafka_t *rk) noexcept nogil
    int (*set_log_queue)(rd_kafka_t *rk, rd_kafka_queue_t *rkqu) noexcept nogil
    int (*fatal_error)(rd_kafka_t *rk, char *errstr, size_t size) noexcept nogil
    int (*test_fatal_error)(rd_kafka_t *rk, int err, const char *reason) noexcept nogil
    rd_kafka_UserScramCredentialAlteration_t *(*UserScramCredentialUpsertion_new)(
        const char *username, int mechanism, int32_t iterations, const unsigned char *password, size_t password_size,
        const unsigned char *salt, size_t salt_size) noexcept nogil
    void (*UserScramCredentialAlteration_destroy)(rd_kafka_UserScramCredentialAlteration_t *alteration) noexcept nogil
    int (*brokers_add)(rd_kafka_t *rk, const char *brokerlist) noexcept nogil
    rd_kafka_queue_t *(*queue_new)(rd_kafka_t *rk) noexcept nogil
    rd_kafka_queue_t *(*queue_get_main)(rd_kafka_t *rk) noexcept nogil
    rd_kafka_queue_t *(*queue_get_consumer)(rd_kafka_t *rk) noexcept nogil
    void (*queue_destroy)(rd_kafka_queue_t *rkqu) noexcept nogil
    void (*queue_io_event_enable)(rd_kafka_queue_t *rkqu, int fd, const void *payload, size_t size) noexcept nogil
    void (*queue_yield)(rd_kafka_queue_t *rkqu) noexcept nogil
    rd_kafka_event_t *(*queue_poll)(rd_kafka_queue_t *rkqu, int timeout_ms) noexcept nogil
    int (*event_type)(const rd_kafka_event_t *rkev) noexcept nogil
    void (*event_destroy)(rd_kafka_event_t *rkev) noexcept nogil
    size_t (*event_message_array)(
        rd_kafka_event_t *rkev, const rd_kafka_message_t **messages, size_t size) noexcept nogil
    int (*event_error)(rd_kafka_event_t *rkev) noexcept nogil
    const char *(*event_error_string)(rd_kafka_event_t *rkev) noexcept nogil
    int (*event_error_is_fatal)(rd_kafka_event_t *rkev) noexcept nogil
    int (*event_log)(rd_kafka_event_t *rkev, const char **fac, const char **text, int *level) noexcept nogil
    const char *(*event_stats)(rd_kafka_event_t *rkev) noexcept nogil
    const char *(*event_config_string)(rd_kafka_event_t *rkev) noexcept nogil
    rd_kafka_topic_partition_list_t *(*event_topic_partition_list)(rd_kafka_event_t *rkev) noexcept nogil
    int (*error_code)(const rd_kafka_error_t *error) noexcept nogil
    const char *(*error_string)(const rd_kafka_error_t *error) noexcept nogil
    void (*error_destroy)(rd_kafka_error_t *error) noexcept nogil
    rd_kafka_topic_partition_list_t *(*topic_partition_list_new)(int size) noexcept nogil
    void (*topic_partition_list_destroy)(rd_kafka_topic_partition_list_t *parts) noexcept nogil
    rd_kafka_topic_partition_list_t *(*topic_partition_list_copy)(
        const rd_kafka_topic_partition_list_t *parts) noexcept nogil
    rd_kafka_topic_partition_t *(*topic_partition_list_add)(
        rd_kafka_topic_partition_list_t *parts, const char *topic, int32_t partition) noexcept nogil
    void (*topic_partition_set_leader_epoch)(rd_kafka_topic_partition_t *part, int32_t epoch) noexcept nogil
    int (*subscribe)(rd_kafka_t *rk, const rd_kafka_topic_partition_list_t *topics) noexcept nogil
    int (*assign)(rd_kafka_t *rk, const rd_kafka_topic_partition_list_t *parts) noexcept nogil
    rd_kafka_error_t *(*incremental_assign)(rd_kafka_t *rk, const rd_kafka_topic_partition_list_t *parts) noexcept nogil
    rd_kafka_error_t *(*incremental_unassign)(
        rd_kafka_t *rk, const rd_kafka_topic_partition_list_t *parts) noexcept nogil
    const char *(*rebalance_protocol)(rd_kafka_t *rk) noexcept nogil
    int (*assignment_lost)(rd_kafka_t *rk) noexcept nogil
    ssize_t (*consume_batch_queue)(
        rd_kafka_queue_t *rkqu, int timeout_ms, rd_kafka_message_t **messages, size_t size) noexcept nogil
    void (*message_destroy)(rd_kafka_message_t *message) noexcept nogil
    int64_t (*message_timestamp)(const rd_kafka_message_t *message, int *tstype) noexcept nogil
    int (*message_headers)(const rd_kafka_message_t *message, rd_kafka_headers_t **headers) noexcept nogil
    int32_t (*message_leader_epoch)(const rd_kafka_message_t *message) noexcept nogil
    int (*message_status)(const rd_kafka_message_t *message) noexcept nogil
    int (*message_detach_headers)(rd_kafka_message_t *message, rd_kafka_headers_t **headers) noexcept nogil
    const char *(*topic_name)(const rd_kafka_topic_t *rkt) noexcept nogil
    int (*header_get_all)(
        const rd_kafka_headers_t *headers, size_t idx, const char **name, const void **value,
        size_t *size) noexcept nogil
    int (*header_get_last)(
        const rd_kafka_headers_t *headers, const char *name, const void **value, size_t *size) noexcept nogil
    rd_kafka_headers_t *(*headers_new)(size_t initial_count) noexcept nogil
    void (*headers_destroy)(rd_kafka_headers_t *headers) noexcept nogil
    int (*header_add)(
        rd_kafka_headers_t *headers, const char *name, ssize_t name_size, const void *value,
        ssize_t value_size) noexcept nogil
    int (*offsets_store)(rd_kafka_t *rk, rd_kafka_topic_partition_list_t *offsets) noexcept nogil
    int (*commit_queue)(
        rd_kafka_t *rk, const rd_kafka_topic_partition_list_t *offsets, rd_kafka_queue_t *rkqu, offset_commit_cb_t cb,
        void *opaque) noexcept nogil
    int (*committed)(rd_kafka_t *rk, rd_kafka_topic_partition_list_t *parts, int timeout_ms) noexcept nogil
    int (*pause_partitions)(rd_kafka_t *rk, rd_kafka_topic_partition_list_t *parts) noexcept nogil
    int (*resume_partitions)(rd_kafka_t *rk, rd_kafka_topic_partition_list_t *parts) noexcept nogil
    rd_kafka_error_t *(*seek_partitions)(
        rd_kafka_t *rk, rd_kafka_topic_partition_list_t *parts, int timeout_ms) noexcept nogil
    int (*offsets_for_times)(rd_kafka_t *rk, rd_kafka_topic_partition_list_t *parts, int timeout_ms) noexcept nogil
    int (*query_watermark_offsets)(
        rd_kafka_t *rk, const char *topic, int32_t partition, int64_t *low, int64_t *high,
        int timeout_ms) noexcept nogil
    int (*metadata)(
        rd_kafka_t *rk, int all_topics, rd_kafka_topic_t *only_rkt, const rd_kafka_metadata_t **metadata,
        int timeout_ms) noexcept nogil
    void (*metadata_destroy)(const rd_kafka_metadata_t *metadata) noexcept nogil
    rd_kafka_error_t *(*consumer_close_queue)(rd_kafka_t *rk, rd_kafka_queue_t *rkqu) noexcept nogil
    int (*consumer_closed)(rd_kafka_t *rk) noexcept nogil
    rd_kafka_topic_t *(*topic_new)(
        rd_kafka_t *rk, const char *topic, rd_kafka_topic_conf_t *conf) noexcept nogil
    void (*topic_destroy)(rd_kafka_topic_t *rkt) noexcept nogil
    rd_kafka_topic_conf_t *(*default_topic_conf_dup)(rd_kafka_t *rk) noexcept nogil
    void (*topic_conf_set_partitioner_cb)(rd_kafka_topic_conf_t *conf, partitioner_t partitioner) noexcept nogil
    void (*topic_conf_set_opaque)(rd_kafka_topic_conf_t *conf, void *opaque) noexcept nogil
    int (*topic_partition_available)(const rd_kafka_topic_t *rkt, int32_t partition) noexcept nogil
    int32_t (*msg_partitioner_murmur2)(
        const rd_kafka_topic_t *rkt, const void *key, size_t keylen, int32_t partition_cnt, void *rkt_opaque,
        void *msg_opaque) noexcept nogil
    int (*last_error)() noexcept nogil
    int (*produce)(
        rd_kafka_topic_t *rkt, int32_t partition, int msgflags, void *payload, size_t len, const void *key,
        size_t keylen, void *msg_opaque) noexcept nogil
    int (*produce_batch)(
        rd_kafka_topic_t *rkt, int32_t partition, int msgflags, rd_kafka_message_t *messages,
        int message_cnt) noexcept nogil
    rd_kafka_error_t *(*produceva)(rd_kafka_t *rk, const rd_kafka_vu_t *vus, size_t cnt) noexcept nogil
    int (*flush)(rd_kafka_t *rk, int timeout_ms) noexcept nogil
    int (*purge)(rd_kafka_t *rk, int flags) noexcept nogil
    int (*oauthbearer_set_token)(
        rd_kafka_t *rk, const char *token, int64_t lifetime_ms, const char *principal, const char **extensions,
        size_t extension_size, char *errstr, size_t errstr_size) noexcept nogil
    int (*oauthbearer_set_token_failure)(rd_kafka_t *rk, const char *errstr) noexcept nogil
    rd_kafka_mock_cluster_t *(*mock_cluster_new)(rd_kafka_t *rk, int broker_count) noexcept nogil
    void (*mock_cluster_destroy)(rd_kafka_mock_cluster_t *cluster) noexcept nogil
    const char *(*mock_cluster_bootstraps)(const rd_kafka_mock_cluster_t *cluster) noexcept nogil
    int (*mock_topic_create)(
        rd_kafka_mock_cluster_t *cluster, const char *topic, int partitions, int replication_factor) noexcept nogil
    void (*mock_topic_set_error)(rd_kafka_mock_cluster_t *cluster, const char *topic, int err) noexcept nogil
    void (*mock_push_request_errors_array)(
        rd_kafka_mock_cluster_t *cluster, int16_t api_key, size_t cnt, const int *errors) noexcept nogil
    void (*mock_clear_request_errors)(rd_kafka_mock_cluster_t *cluster, int16_t api_key) noexcept nogil
    int (*mock_broker_set_down)(rd_kafka_mock_cluster_t *cluster, int32_t broker_id) noexcept nogil
    int (*mock_broker_set_up)(rd_kafka_mock_cluster_t *cluster, int32_t broker_id) noexcept nogil
    int (*mock_broker_set_rtt)(rd_kafka_mock_cluster_t *cluster, int32_t broker_id, int rtt_ms) noexcept nogil
    int (*mock_partition_set_leader)(
        rd_kafka_mock_cluster_t *cluster, const char *topic, int32_t partition, int32_t broker_id) noexcept nogil
    int (*mock_coordinator_set)(
        rd_kafka_mock_cluster_t *cluster, const char *key_type, const char *key, int32_t broker_id) noexcept nogil
    void (*mock_group_initial_rebalance_delay_ms)(rd_kafka_mock_cluster_t *cluster, int32_t delay_ms) noexcept nogil
    void (*mock_start_request_tracking)(rd_kafka_mock_cluster_t *cluster) noexcept nogil
    rd_kafka_mock_request_t **(*mock_get_requests)(rd_kafka_mock_cluster_t *cluster, size_t *count) noexcept nogil
    int16_t (*mock_request_api_key)(rd_kafka_mock_request_t *request) noexcept nogil
    void (*mock_request_destroy_array)(rd_kafka_mock_request_t **requests, size_t count) noexcept nogil


cdef Api api

cdef int load() except -1


cdef struct Counters:
    # Objects alive right now. Changed under the GIL, except where the owner's docstring says otherwise.
    Py_ssize_t clients
    Py_ssize_t queues
    Py_ssize_t messages
    Py_ssize_t payloads
    Py_ssize_t flights
    Py_ssize_t partition_lists
    Py_ssize_t deliveries
    Py_ssize_t mock_clusters


cdef Counters alive
