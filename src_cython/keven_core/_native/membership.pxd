"""Declarations of membership.pyx: accounts, notes and the base class of Consumer."""

from libc.stdint cimport int32_t, int64_t, uint64_t

from keven_core._native.dispatch cimport DispatchTable
from keven_core._native.handle cimport Client
from keven_core._native.suspects cimport Cell, Suspects
from rdkafka cimport *


cdef enum:
    # Values of Account.end_offset that are not offsets.
    UNBOUNDED = -1
    REACHED = -2


cdef struct Account:
    # One per partition that this consumer has ever been assigned; freed with the consumer.
    char *topic
    int32_t partition
    bint assigned
    bint touched            # has records accounted in the batch in hand
    bint parks              # its records are handed to on_parked and handled later
    int32_t leader_epoch    # of the last accounted record; -1 unknown
    int64_t next_offset     # last accounted + 1; -1 none yet
    int64_t stored_offset
    int64_t committed_offset
    int64_t failed_from     # first dead-lettered offset whose copy is not confirmed yet; -1 none
    int64_t end_offset      # a bounded run ends here; or UNBOUNDED, REACHED
    int64_t last_suspect    # up to this offset there are records that killed a worker; -1 none
    int32_t place           # of the partition in the memory shared with the supervisor
    uint64_t received
    uint64_t done
    uint64_t skipped
    uint64_t tombstones
    uint64_t dead
    uint64_t retried
    uint64_t stale
    rd_kafka_message_t *last
    # Of what is in flight (flow.pyx): linked in the order of offsets, from the first that has not landed on.
    void *first_open
    void *last_open
    Py_ssize_t span         # how many are linked
    Py_ssize_t open         # of these, how many have not landed
    size_t open_bytes
    Py_ssize_t held_open    # that number when the partition was paused
    bint held
    bint leaving            # its last records were given up: what comes behind them is not to be taken over
    uint64_t landings
    uint64_t landings_seen
    void *bound             # the Route of the topic, borrowed from the table; NULL: identify each record
    void *codec             # what may read its values beside JSON and MessagePack, likewise; NULL: nothing


cdef struct AccountSlot:
    rd_kafka_topic_t *rkt
    int32_t partition
    Account *account


cdef struct Note:
    # What a callback saw, for the owner: linked, oldest first.
    int kind
    int err
    bint lost
    rd_kafka_topic_partition_list_t *parts
    Note *next


cdef struct Notes:
    Note *first
    Note *last


cdef class Membership(Client):
    cdef DispatchTable table
    cdef dict accounts          # (topic, partition) -> address of its Account
    cdef object parked_topics
    cdef list touched           # addresses of the Accounts of the batch in hand
    cdef Py_ssize_t count       # messages in hand
    cdef Notes notes
    cdef AccountSlot *slots     # accounts by topic handle and partition: emptied at each rebalance
    cdef uint64_t slot_mask
    cdef uint64_t slot_count
    cdef Account *current       # of the record in hand; &nowhere when there is none
    cdef Account nowhere
    cdef rd_kafka_topic_t *current_rkt
    cdef Suspects suspects      # None: no supervisor
    cdef Cell *cell             # the record in hand, for the supervisor; without one it is own_cell
    cdef Cell own_cell
    cdef readonly uint64_t generation

    cdef void _take_callbacks(self, rd_kafka_conf_t *conf) noexcept
    cdef void _free_accounts(self) noexcept
    cdef int _on_commit_result(self, rd_kafka_event_t *event) except -1
    cdef Account *_account_of(self, str topic, int32_t partition) except NULL
    cdef void _forget_topics(self) noexcept
    cdef int _remember(self, rd_kafka_topic_t *rkt, int32_t partition, Account *account) except -1
    cdef Account *_account(self, rd_kafka_message_t *message) except? NULL
    cdef void _committed(self, rd_kafka_topic_partition_list_t *parts, int code)
    cdef int _drop_unassigned(self) except -1
    cdef int _abandon(self, Account *account) except -1
    cdef int _unassign_all(self) except -1
    cdef void _touch(self, Account *account)
    cdef bint _incremental(self)
