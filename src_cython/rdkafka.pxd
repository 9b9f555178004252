# The part of librdkafka's public C API that keven_core uses: types, constants and signatures, nothing else.
#
# No header is compiled against: the functions are resolved at import from the librdkafka that confluent-kafka brings
# (see keven_core/_native/library.pyx), so every public struct stands here in full. Sizes and offsets are asserted
# against a real rdkafka.h in tests/unit/test_abi.py. Remarks of the header that shaped a caller stand at the caller.

from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t
from libc.stdio cimport FILE

cdef extern from "netdb.h":
    struct addrinfo:
        pass


cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>

    typedef struct rd_kafka_s rd_kafka_t;
    typedef struct rd_kafka_conf_s rd_kafka_conf_t;
    typedef struct rd_kafka_topic_s rd_kafka_topic_t;
    typedef struct rd_kafka_topic_conf_s rd_kafka_topic_conf_t;
    typedef struct rd_kafka_queue_s rd_kafka_queue_t;
    typedef struct rd_kafka_op_s rd_kafka_event_t;
    typedef struct rd_kafka_headers_s rd_kafka_headers_t;
    typedef struct rd_kafka_error_s rd_kafka_error_t;
    typedef struct rd_kafka_UserScramCredentialAlteration_s rd_kafka_UserScramCredentialAlteration_t;
    typedef struct rd_kafka_mock_cluster_s rd_kafka_mock_cluster_t;
    typedef struct rd_kafka_mock_request_s rd_kafka_mock_request_t;

    typedef struct rd_kafka_message_s {
        int err;
        rd_kafka_topic_t *rkt;
        int32_t partition;
        void *payload;
        size_t len;
        void *key;
        size_t key_len;
        int64_t offset;
        void *_private;
    } rd_kafka_message_t;

    typedef struct rd_kafka_topic_partition_s {
        char *topic;
        int32_t partition;
        int64_t offset;
        void *metadata;
        size_t metadata_size;
        void *opaque;
        int err;
        void *_private;
    } rd_kafka_topic_partition_t;

    typedef struct rd_kafka_topic_partition_list_s {
        int cnt;
        int size;
        rd_kafka_topic_partition_t *elems;
    } rd_kafka_topic_partition_list_t;

    typedef struct rd_kafka_err_desc_s {
        int code;
        const char *name;
        const char *desc;
    } rd_kafka_err_desc_t;

    typedef struct rd_kafka_vu_s {
        int vtype;
        union {
            const char *cstr;
            rd_kafka_topic_t *rkt;
            int i;
            int32_t i32;
            int64_t i64;
            struct { void *ptr; size_t size; } mem;
            struct { const char *name; const void *val; ptrdiff_t size; } header;
            rd_kafka_headers_t *headers;
            void *ptr;
            char _pad[64];
        } u;
    } rd_kafka_vu_t;

    typedef struct rd_kafka_metadata_broker_s {
        int32_t id;
        char *host;
        int port;
    } rd_kafka_metadata_broker_t;

    typedef struct rd_kafka_metadata_partition_s {
        int32_t id;
        int err;
        int32_t leader;
        int replica_cnt;
        int32_t *replicas;
        int isr_cnt;
        int32_t *isrs;
    } rd_kafka_metadata_partition_t;

    typedef struct rd_kafka_metadata_topic_s {
        char *topic;
        int partition_cnt;
        rd_kafka_metadata_partition_t *partitions;
        int err;
    } rd_kafka_metadata_topic_t;

    typedef struct rd_kafka_metadata_s {
        int broker_cnt;
        rd_kafka_metadata_broker_t *brokers;
        int topic_cnt;
        rd_kafka_metadata_topic_t *topics;
        int32_t orig_broker_id;
        char *orig_broker_name;
    } rd_kafka_metadata_t;
    """
    ctypedef struct rd_kafka_t
    ctypedef struct rd_kafka_conf_t
    ctypedef struct rd_kafka_topic_t
    ctypedef struct rd_kafka_topic_conf_t
    ctypedef struct rd_kafka_queue_t
    ctypedef struct rd_kafka_event_t
    ctypedef struct rd_kafka_headers_t
    ctypedef struct rd_kafka_error_t
    ctypedef struct rd_kafka_UserScramCredentialAlteration_t
    ctypedef struct rd_kafka_mock_cluster_t
    ctypedef struct rd_kafka_mock_request_t

    ctypedef struct rd_kafka_message_t:
        int err
        rd_kafka_topic_t *rkt
        int32_t partition
        void *payload
        size_t len
        void *key
        size_t key_len
        int64_t offset
        void *_private

    ctypedef struct rd_kafka_topic_partition_t:
        char *topic
        int32_t partition
        int64_t offset
        void *metadata
        size_t metadata_size
        void *opaque
        int err
        void *_private

    ctypedef struct rd_kafka_topic_partition_list_t:
        int cnt
        int size
        rd_kafka_topic_partition_t *elems

    ctypedef struct rd_kafka_err_desc_t:
        int code
        const char *name
        const char *desc

    ctypedef struct _vu_mem:
        void *ptr
        size_t size

    ctypedef struct _vu_header:
        const char *name
        const void *val
        ptrdiff_t size

    ctypedef union _vu_union:
        const char *cstr
        rd_kafka_topic_t *rkt
        int i
        int32_t i32
        int64_t i64
        _vu_mem mem
        _vu_header header
        rd_kafka_headers_t *headers
        void *ptr

    ctypedef struct rd_kafka_vu_t:
        int vtype
        _vu_union u

    ctypedef struct rd_kafka_metadata_broker_t:
        int32_t id
        char *host
        int port

    ctypedef struct rd_kafka_metadata_partition_t:
        int32_t id
        int err
        int32_t leader
        int replica_cnt
        int32_t *replicas
        int isr_cnt
        int32_t *isrs

    ctypedef struct rd_kafka_metadata_topic_t:
        char *topic
        int partition_cnt
        rd_kafka_metadata_partition_t *partitions
        int err

    ctypedef struct rd_kafka_metadata_t:
        int broker_cnt
        rd_kafka_metadata_broker_t *brokers
        int topic_cnt
        rd_kafka_metadata_topic_t *topics
        int32_t orig_broker_id
        char *orig_broker_name


cdef enum:
    # rd_kafka_type_t
    RD_KAFKA_PRODUCER = 0
    RD_KAFKA_CONSUMER = 1
    # rd_kafka_conf_res_t
    RD_KAFKA_CONF_OK = 0
    # rd_kafka_timestamp_type_t
    RD_KAFKA_TIMESTAMP_NOT_AVAILABLE = 0
    # rd_kafka_resp_err_t: only those that a decision hangs on; names and texts come from rd_kafka_get_err_descs
    RD_KAFKA_RESP_ERR__BAD_MSG = -199
    RD_KAFKA_RESP_ERR__TRANSPORT = -195
    RD_KAFKA_RESP_ERR__RESOLVE = -193
    RD_KAFKA_RESP_ERR__MSG_TIMED_OUT = -192
    RD_KAFKA_RESP_ERR__PARTITION_EOF = -191
    RD_KAFKA_RESP_ERR__UNKNOWN_PARTITION = -190
    RD_KAFKA_RESP_ERR__UNKNOWN_TOPIC = -188
    RD_KAFKA_RESP_ERR__ALL_BROKERS_DOWN = -187
    RD_KAFKA_RESP_ERR__TIMED_OUT = -185
    RD_KAFKA_RESP_ERR__QUEUE_FULL = -184
    RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS = -175
    RD_KAFKA_RESP_ERR__REVOKE_PARTITIONS = -174
    RD_KAFKA_RESP_ERR__STATE = -172
    RD_KAFKA_RESP_ERR__AUTHENTICATION = -169
    RD_KAFKA_RESP_ERR__NO_OFFSET = -168
    RD_KAFKA_RESP_ERR__PURGE_QUEUE = -152
    RD_KAFKA_RESP_ERR__FATAL = -150
    RD_KAFKA_RESP_ERR__MAX_POLL_EXCEEDED = -147
    RD_KAFKA_RESP_ERR__AUTO_OFFSET_RESET = -140
    RD_KAFKA_RESP_ERR_NO_ERROR = 0
    RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART = 3
    RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED = 29
    RD_KAFKA_RESP_ERR_GROUP_AUTHORIZATION_FAILED = 30
    # rd_kafka_vtype_t
    RD_KAFKA_VTYPE_RKT = 2
    RD_KAFKA_VTYPE_PARTITION = 3
    RD_KAFKA_VTYPE_VALUE = 4
    RD_KAFKA_VTYPE_KEY = 5
    RD_KAFKA_VTYPE_OPAQUE = 6
    RD_KAFKA_VTYPE_MSGFLAGS = 7
    RD_KAFKA_VTYPE_TIMESTAMP = 8
    RD_KAFKA_VTYPE_HEADERS = 10
    # RD_KAFKA_EVENT_..
    RD_KAFKA_EVENT_NONE = 0x0
    RD_KAFKA_EVENT_DR = 0x1
    RD_KAFKA_EVENT_LOG = 0x4
    RD_KAFKA_EVENT_ERROR = 0x8
    RD_KAFKA_EVENT_REBALANCE = 0x10
    RD_KAFKA_EVENT_OFFSET_COMMIT = 0x20
    RD_KAFKA_EVENT_STATS = 0x40
    RD_KAFKA_EVENT_OAUTHBEARER_TOKEN_REFRESH = 0x100
    # rd_kafka_msg_status_t
    RD_KAFKA_MSG_STATUS_NOT_PERSISTED = 0
    RD_KAFKA_MSG_STATUS_POSSIBLY_PERSISTED = 1
    RD_KAFKA_MSG_STATUS_PERSISTED = 2
    # rd_kafka_purge flags
    RD_KAFKA_PURGE_F_QUEUE = 0x1
    RD_KAFKA_PURGE_F_INFLIGHT = 0x2
    RD_KAFKA_PURGE_F_NON_BLOCKING = 0x4
    # rd_kafka_ScramMechanism_t
    RD_KAFKA_SCRAM_MECHANISM_SHA_256 = 1
    # rd_kafka_destroy_flags
    RD_KAFKA_DESTROY_F_NO_CONSUMER_CLOSE = 0x8
    # logical offsets and partitions
    RD_KAFKA_OFFSET_BEGINNING = -2
    RD_KAFKA_OFFSET_END = -1
    RD_KAFKA_OFFSET_STORED = -1000
    RD_KAFKA_OFFSET_INVALID = -1001
    RD_KAFKA_PARTITION_UA = -1


ctypedef void (*rebalance_cb_t)(rd_kafka_t *rk, int err, rd_kafka_topic_partition_list_t *parts,
                                void *opaque) noexcept nogil
ctypedef void (*offset_commit_cb_t)(rd_kafka_t *rk, int err, rd_kafka_topic_partition_list_t *parts,
                                    void *opaque) noexcept nogil
ctypedef int (*resolve_cb_t)(const char *node, const char *service, const addrinfo *hints, addrinfo **res,
                             void *opaque) noexcept nogil
ctypedef int (*on_new_t)(rd_kafka_t *rk, const rd_kafka_conf_t *conf, void *opaque, char *errstr,
                         size_t errstr_size) noexcept nogil
ctypedef int (*on_thread_start_t)(rd_kafka_t *rk, int thread_type, const char *thread_name,
                                  void *opaque) noexcept nogil
ctypedef int (*on_response_received_t)(rd_kafka_t *rk, int sockfd, const char *broker_name, int32_t broker_id,
                                       int16_t api_key, int16_t api_version, int32_t correlation_id, size_t size,
                                       int64_t rtt, int err, void *opaque) noexcept nogil
ctypedef int32_t (*partitioner_t)(const rd_kafka_topic_t *rkt, const void *key, size_t key_len, int32_t partition_cnt,
                                  void *rkt_opaque, void *msg_opaque) noexcept nogil
