"""Group membership of a consumer: assignment, accounts of its partitions, offsets, rebalance notes.

An Account is the ledger of one partition. The hot path (consumer.pyx) counts in it; here it is made, found, read, and
its offsets are committed. Accounts live as long as the consumer, so the ledger outlasts a rebalance.

Threads: the owner thread calls everything but ledger(), offsets(), assignment() and uncommitted(), which any thread
may. Callbacks of librdkafka run inside fetch() on the owner's thread, without the GIL, and only take note; the owner
acts on the notes when the batch in hand is finished.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int32_t, int64_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport strcmp, strdup

from keven_core._native.handle cimport (
    Client, error_of, error_of_object, free_partition_list, partition_list, tuples_of
)
from keven_core._native.library cimport api
from rdkafka cimport *

import time

from keven_core.kafka import errors

cdef enum:
    NOTE_REBALANCE = 1
    NOTE_COMMIT = 2

ASSIGN = "assign"
REVOKE = "revoke"
COMMITTED = "committed"


cdef void _take_note(Notes *notes, int kind, int err, bint lost, rd_kafka_topic_partition_list_t *parts) noexcept nogil:
    cdef Note *note = <Note *>calloc(1, sizeof(Note))
    if note == NULL:
        return
    note.kind = kind
    note.err = err
    note.lost = lost
    note.parts = api.topic_partition_list_copy(parts) if parts != NULL else NULL
    if notes.last != NULL:
        notes.last.next = note
    else:
        notes.first = note
    notes.last = note


cdef void _on_rebalance(rd_kafka_t *rk, int err, rd_kafka_topic_partition_list_t *parts, void *opaque) noexcept nogil:
    # Runs inside consume_batch_queue or close, on the owner's thread. Never yields (a record already taken from the
    # queue would be dropped) and never runs Python.
    _take_note(<Notes *>opaque, NOTE_REBALANCE, err, api.assignment_lost(rk) != 0, parts)


cdef void _on_commit(rd_kafka_t *rk, int err, rd_kafka_topic_partition_list_t *parts, void *opaque) noexcept nogil:
    _take_note(<Notes *>opaque, NOTE_COMMIT, err, False, parts)


@cython.no_gc_clear
cdef class Membership(Client):
    """Base of Consumer: what it owns of its topics and what it knows of them."""

    def __cinit__(self):
        self.slot_mask = 63
        self.slots = <AccountSlot *>calloc(self.slot_mask + 1, sizeof(AccountSlot))
        if self.slots == NULL:
            raise MemoryError()
        self.accounts = {}
        self.nowhere.partition = -1
        self.current = &self.nowhere
        self.current_rkt = NULL
        self.cell = &self.own_cell
        self.notes.first = self.notes.last = NULL
        self.touched = []
        self.parked_topics = ()

    def __dealloc__(self):
        self._free_accounts()
        free(self.slots)

    cdef void _take_callbacks(self, rd_kafka_conf_t *conf) noexcept:
        api.conf_set_opaque(conf, &self.notes)
        api.conf_set_rebalance_cb(conf, _on_rebalance)
        api.conf_set_offset_commit_cb(conf, _on_commit)

    cdef void _free_accounts(self) noexcept:
        cdef Note *note
        if self.accounts is not None:
            for address in self.accounts.values():
                free((<Account *><uintptr_t>address).topic)
                free(<void *><uintptr_t>address)
            self.accounts = {}
        while self.notes.first != NULL:
            note = self.notes.first
            self.notes.first = note.next
            if note.parts != NULL:
                api.topic_partition_list_destroy(note.parts)
            free(note)
        self.notes.last = NULL

    cdef int _on_commit_result(self, rd_kafka_event_t *event) except -1:
        # The main queue is not forwarded to the consumer queue, so results of background commits arrive there.
        _take_note(&self.notes, NOTE_COMMIT, api.event_error(event), False, api.event_topic_partition_list(event))
        return 0

    # --- accounts -----------------------------------------------------------------------------------------------------

    cdef Account *_account_of(self, str topic, int32_t partition) except NULL:
        cdef Account *account
        address = self.accounts.get((topic, partition))
        if address is not None:
            return <Account *><uintptr_t>address
        account = <Account *>calloc(1, sizeof(Account))
        if account == NULL:
            raise MemoryError()
        name = topic.encode()
        account.topic = strdup(name)
        account.partition = partition
        account.leader_epoch = -1
        account.next_offset = account.stored_offset = account.committed_offset = -1
        account.failed_from = account.end_offset = account.last_suspect = account.place = -1
        if self.suspects is not None:
            account.place = self.suspects.place_of(topic, partition)
        if self.table is not None:
            bound = self.table.bound.get(topic)
            if self.table.everything is not None:
                bound = self.table.everything
            account.bound = <void *>bound if bound is not None else NULL
            codec = self.table.codec_for(topic)
            account.codec = <void *>codec if codec is not None else NULL
        account.parks = topic in self.parked_topics
        self.accounts[topic, partition] = <uintptr_t>account
        return account

    cdef void _forget_topics(self) noexcept:
        # A topic handle can be freed and its address used for another topic: never keep one over a rebalance.
        cdef uint64_t i
        for i in range(self.slot_mask + 1):
            self.slots[i].rkt = NULL
        self.slot_count = 0
        self.current = &self.nowhere
        self.current_rkt = NULL

    cdef int _remember(self, rd_kafka_topic_t *rkt, int32_t partition, Account *account) except -1:
        cdef AccountSlot *old = self.slots
        cdef uint64_t old_size = self.slot_mask + 1
        cdef uint64_t i, j
        if 2 * (self.slot_count + 1) > old_size:
            self.slots = <AccountSlot *>calloc(2 * old_size, sizeof(AccountSlot))
            if self.slots == NULL:
                self.slots = old
                raise MemoryError()
            self.slot_mask = 2 * old_size - 1
            self.slot_count = 0
            for j in range(old_size):
                if old[j].rkt != NULL:
                    self._remember(old[j].rkt, old[j].partition, old[j].account)
            free(old)
        i = (<uint64_t><uintptr_t>rkt // 64 * 31 + <uint64_t>partition) & self.slot_mask
        while self.slots[i].rkt != NULL:
            i = (i + 1) & self.slot_mask
        self.slots[i].rkt = rkt
        self.slots[i].partition = partition
        self.slots[i].account = account
        self.slot_count += 1
        return 0

    cdef Account *_account(self, rd_kafka_message_t *message) except? NULL:
        """The account of a message's partition, which becomes the current one; NULL when it is not assigned (stale)."""
        cdef Account *account = NULL
        cdef uint64_t i = (<uint64_t><uintptr_t>message.rkt // 64 * 31 + <uint64_t>message.partition) & self.slot_mask
        while self.slots[i].rkt != NULL:
            if self.slots[i].rkt == message.rkt and self.slots[i].partition == message.partition:
                account = self.slots[i].account
                break
            i = (i + 1) & self.slot_mask
        if account == NULL:
            account = self._account_of(api.topic_name(message.rkt).decode(), message.partition)
            self._remember(message.rkt, message.partition, account)
        if not account.assigned:
            account.received += 1
            account.stale += 1
            return NULL
        self._touch(account)
        self.current = account
        self.current_rkt = message.rkt
        self.cell.offset = -1
        self.cell.place = account.place
        return account

    cdef void _touch(self, Account *account):
        """Have the end of the batch look at a partition."""
        if not account.touched:
            account.touched = True
            self.touched.append(<uintptr_t>account)

    def ledger(self):
        """What became of each record, by (topic, partition): a dict of counts that add up.

        received = done + skipped + tombstones + dead + retried + stale + in_flight. From any thread.
        """
        cdef Account *account
        result = {}
        for key, address in self.accounts.items():
            account = <Account *><uintptr_t>address
            result[key] = {
                "received": account.received, "done": account.done, "skipped": account.skipped,
                "tombstones": account.tombstones, "dead": account.dead, "retried": account.retried,
                "stale": account.stale,
                "in_flight": <int64_t>(account.received - account.done - account.skipped - account.tombstones
                                       - account.dead - account.retried - account.stale),
            }
        return result

    def settle(self, str topic, int partition, str outcome, int count=1):
        """Count parked records of a partition: "done", "skipped", "dead", "retried" or "stale"."""
        cdef Account *account = self._account_of(topic, partition)
        if outcome == "done":
            account.done += count
        elif outcome == "skipped":
            account.skipped += count
        elif outcome == "dead":
            account.dead += count
        elif outcome == "retried":
            account.retried += count
        elif outcome == "stale":
            account.stale += count
        else:
            raise errors.InternalError(f"no such outcome: {outcome}")

    def offsets(self):
        """(position, stored, committed) by (topic, partition) for the current assignment; -1: none yet."""
        cdef Account *account
        result = {}
        for key, address in self.accounts.items():
            account = <Account *><uintptr_t>address
            if account.assigned:
                result[key] = (account.next_offset, account.stored_offset, account.committed_offset)
        return result

    # --- commit -------------------------------------------------------------------------------------------------------

    def uncommitted(self):
        """What is stored but not known to be committed, as (topic, partition, offset) tuples."""
        cdef Account *account
        found = []
        for (topic, partition), address in self.accounts.items():
            account = <Account *><uintptr_t>address
            if account.assigned and account.stored_offset > account.committed_offset:
                found.append((topic, partition, account.stored_offset))
        return found

    def commit(self, int timeout_ms):
        """Commit what is stored and wait for the broker's answer, at most `timeout_ms`, GIL released.

        Raises CommitError, whose `offsets` names what is not known to be committed.
        """
        cdef rd_kafka_topic_partition_list_t *parts
        cdef rd_kafka_queue_t *queue
        cdef rd_kafka_event_t *event = NULL
        cdef rd_kafka_t *rk = self._rk()
        cdef Account *account
        cdef int code, i
        offsets = self.uncommitted()
        if not offsets:
            return
        parts = partition_list(offsets)
        for i in range(parts.cnt):
            account = self._account_of(offsets[i][0], offsets[i][1])
            api.topic_partition_set_leader_epoch(&parts.elems[i], account.leader_epoch)
        # rd_kafka_commit(async=0) takes no time limit and hangs against a stalled broker: a queue of its own does not.
        with nogil:
            queue = api.queue_new(rk)
            code = api.commit_queue(rk, parts, queue, NULL, NULL)
        free_partition_list(parts)
        deadline = time.monotonic() + timeout_ms / 1000
        try:
            if code == 0:
                while event == NULL and time.monotonic() < deadline:
                    with nogil:
                        event = api.queue_poll(queue, 50)
                    PyErr_CheckSignals()
                if event == NULL:
                    code = RD_KAFKA_RESP_ERR__TIMED_OUT
                else:
                    code = api.event_error(event)
                    parts = api.event_topic_partition_list(event)
                    if parts != NULL:
                        self._committed(parts, code)
                    if code == 0 and parts != NULL:
                        for i in range(parts.cnt):
                            code = code or parts.elems[i].err
        finally:
            with nogil:
                if event != NULL:
                    api.event_destroy(event)
                api.queue_destroy(queue)
        if code != 0:
            left = self.uncommitted()
            names = ", ".join(f"{topic} [{partition}] @ {offset}" for topic, partition, offset in left)
            reason = api.err2str(code).decode()
            raise errors.CommitError(
                f"offsets not confirmed as committed: {names}: {reason}; these records will be handled again",
                left, code=code, name=api.err2name(code).decode())

    cdef void _committed(self, rd_kafka_topic_partition_list_t *parts, int code):
        cdef Account *account
        cdef int i
        for i in range(parts.cnt):
            if code == 0 and parts.elems[i].err == 0 and parts.elems[i].offset >= 0:
                account = self._account_of(parts.elems[i].topic.decode(), parts.elems[i].partition)
                if parts.elems[i].offset > account.committed_offset:
                    account.committed_offset = parts.elems[i].offset

    # --- assignment ---------------------------------------------------------------------------------------------------

    @property
    def noted(self):
        """Whether a callback has left a note for take_notes()."""
        return self.notes.first != NULL

    def take_notes(self):
        """What the callbacks saw since the last call, oldest first.

        Tuples (kind, partitions, detail): ("assign", [(topic, partition, offset)], False),
        ("revoke", [...], lost), ("committed", [...], KafkaError or None).
        """
        cdef Note *note
        found = []
        while self.notes.first != NULL:
            note = self.notes.first
            partitions = [entry[:3] for entry in tuples_of(note.parts)]
            if note.kind == NOTE_COMMIT:
                error = None
                if note.err == 0 and note.parts != NULL:
                    self._committed(note.parts, 0)
                # No offset to commit is not an error: nothing was handled since the last commit.
                elif note.err not in (0, RD_KAFKA_RESP_ERR__NO_OFFSET):
                    error = error_of(note.err, "background commit", NULL, False)
                found.append((COMMITTED, partitions, error))
            elif note.err == RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS:
                found.append((ASSIGN, partitions, False))
            else:
                found.append((REVOKE, partitions, bool(note.lost)))
            self.notes.first = note.next
            if note.next == NULL:
                self.notes.last = NULL
            if note.parts != NULL:
                api.topic_partition_list_destroy(note.parts)
            free(note)
        return found

    def subscribe(self, topics):
        """Join the group for these topics; a name that starts with ^ is a regular expression."""
        cdef rd_kafka_t *rk = self._rk()
        cdef rd_kafka_topic_partition_list_t *parts = partition_list([(topic, RD_KAFKA_PARTITION_UA)
                                                                      for topic in topics])
        cdef int code
        with nogil:
            code = api.subscribe(rk, parts)
        free_partition_list(parts)
        if code != 0:
            raise error_of(code, f"can't subscribe to {', '.join(topics)}", NULL, False)

    def assign(self, partitions, bint manual=False):
        """Take over partitions, (topic, partition, offset) tuples, after an "assign" note or without a group.

        `offset` may be logical (-2 beginning, -1 end, -1001 the committed one). Starts a new generation.
        """
        cdef rd_kafka_t *rk = self._rk()
        cdef rd_kafka_topic_partition_list_t *parts
        cdef rd_kafka_error_t *error = NULL
        cdef int code = 0
        cdef bint incremental = not manual and self._incremental()
        cdef Account *account
        parts = partition_list(partitions)
        with nogil:
            if incremental:
                error = api.incremental_assign(rk, parts)
            else:
                code = api.assign(rk, parts)
        free_partition_list(parts)
        if error != NULL:
            raise error_of_object(error, "can't take over the assigned partitions")
        if code != 0:
            raise error_of(code, "can't take over the assigned partitions", NULL, False)
        self.generation += 1
        self._forget_topics()
        if not incremental:
            self._unassign_all()
            self._drop_unassigned()
        for topic, partition, *_ in partitions:
            account = self._account_of(topic, partition)
            self._abandon(account)
            account.assigned = True
            # What this consumer knew of the partition may be older than what another member did meanwhile.
            account.next_offset = account.stored_offset = account.committed_offset = account.failed_from = -1
            if self.suspects is not None and not account.parks:
                account.last_suspect = self.suspects.last_suspect(topic, partition)

    def unassign(self, partitions):
        """Give partitions up after a "revoke" note; what was to be committed must have been committed before."""
        cdef rd_kafka_t *rk = self._rk()
        cdef rd_kafka_topic_partition_list_t *parts = NULL
        cdef rd_kafka_error_t *error = NULL
        cdef int code = 0
        cdef Account *account
        if self._incremental():
            parts = partition_list(partitions)
            with nogil:
                error = api.incremental_unassign(rk, parts)
            free_partition_list(parts)
            for topic, partition, *_ in partitions:
                account = self._account_of(topic, partition)
                account.assigned = False
                self._abandon(account)
        else:
            with nogil:
                code = api.assign(rk, NULL)
            self._unassign_all()
        self.generation += 1
        self._forget_topics()
        self._drop_unassigned()
        if error != NULL:
            raise error_of_object(error, "can't give the revoked partitions up")
        if code != 0:
            raise error_of(code, "can't give the revoked partitions up", NULL, False)

    cdef int _drop_unassigned(self) except -1:
        """Drop what is in hand of partitions that are not assigned. It comes again, here or elsewhere."""
        return 0

    cdef int _abandon(self, Account *account) except -1:
        """Give up what is in flight of a partition."""
        return 0

    cdef int _unassign_all(self) except -1:
        for address in self.accounts.values():
            (<Account *><uintptr_t>address).assigned = False
            self._abandon(<Account *><uintptr_t>address)
        return 0

    cdef bint _incremental(self):
        cdef const char *protocol = api.rebalance_protocol(self.handle.rk)
        return protocol != NULL and strcmp(protocol, b"COOPERATIVE") == 0

    def rebalance_protocol(self):
        """"NONE", "EAGER" or "COOPERATIVE"."""
        cdef const char *protocol = api.rebalance_protocol(self._rk())
        return protocol.decode() if protocol != NULL else "NONE"

    @property
    def assignment_lost(self):
        """Whether the group has given the assignment away already, so that nothing of it can be committed."""
        return bool(api.assignment_lost(self._rk()))

    def assignment(self):
        """The (topic, partition) pairs that this consumer owns now."""
        return [key for key, address in self.accounts.items() if (<Account *><uintptr_t>address).assigned]

    def set_end(self, str topic, int32_t partition, int64_t offset):
        """Bound a partition: records from `offset` on are neither handled nor accounted."""
        self._account_of(topic, partition).end_offset = offset if offset > 0 else REACHED

    def ended_partitions(self):
        """Whether every assigned partition has reached the end that set_end() gave it; False without assignment."""
        cdef Account *account
        cdef bint any_assigned = False
        for address in self.accounts.values():
            account = <Account *><uintptr_t>address
            if account.assigned:
                any_assigned = True
                if account.end_offset != REACHED and not (0 <= account.end_offset <= account.next_offset):
                    return False
        return any_assigned

    def pause(self, partitions):
        """Stop fetching (topic, partition) pairs; what was prefetched of them is thrown away (librdkafka#5343)."""
        self._pause_or_resume(partitions, True)

    def resume(self, partitions):
        """Fetch paused (topic, partition) pairs again."""
        self._pause_or_resume(partitions, False)

    def _pause_or_resume(self, partitions, bint pause):
        cdef rd_kafka_t *rk = self._rk()
        cdef rd_kafka_topic_partition_list_t *parts = partition_list(partitions)
        cdef int code
        with nogil:
            code = api.pause_partitions(rk, parts) if pause else api.resume_partitions(rk, parts)
        bad = [entry for entry in tuples_of(parts) if entry[3] != 0]
        free_partition_list(parts)
        if code != 0 or bad:
            where = ", ".join(f"{topic} [{partition}]" for topic, partition, _, _ in bad)
            raise error_of(code or bad[0][3], f"can't {'pause' if pause else 'resume'} {where}", NULL, False)

    def seek(self, partitions, int timeout_ms=5000):
        """Go on at (topic, partition, offset) tuples. Blocks up to `timeout_ms`, GIL released."""
        cdef rd_kafka_t *rk = self._rk()
        cdef rd_kafka_topic_partition_list_t *parts = partition_list(partitions)
        cdef rd_kafka_error_t *error
        cdef Account *account
        with nogil:
            error = api.seek_partitions(rk, parts, timeout_ms)
        bad = [entry for entry in tuples_of(parts) if entry[3] != 0]
        free_partition_list(parts)
        if error != NULL:
            raise error_of_object(error, "can't seek")
        if bad:
            raise error_of(bad[0][3], f"can't seek {bad[0][0]} [{bad[0][1]}]", NULL, False)
        for topic, partition, _ in partitions:
            account = self._account_of(topic, partition)
            account.next_offset = account.stored_offset = -1
            account.assigned = False
            self._abandon(account)
        self._drop_unassigned()
        for topic, partition, _ in partitions:
            self._account_of(topic, partition).assigned = True

    def committed(self, partitions, int timeout_ms):
        """Committed offsets of (topic, partition) pairs as tuples; -1001: none. Blocks, GIL released."""
        cdef rd_kafka_t *rk = self._rk()
        cdef rd_kafka_topic_partition_list_t *parts = partition_list(partitions)
        cdef int code
        with nogil:
            code = api.committed(rk, parts, timeout_ms)
        found = [entry[:3] for entry in tuples_of(parts)]
        free_partition_list(parts)
        if code != 0:
            raise error_of(code, "the committed offsets can't be read", NULL, False)
        return found

    def offsets_for_times(self, partitions, int timeout_ms):
        """First offsets at or after (topic, partition, timestamp_ms); the end where there is none. Blocks."""
        cdef rd_kafka_t *rk = self._rk()
        cdef rd_kafka_topic_partition_list_t *parts = partition_list(partitions)
        cdef int code
        with nogil:
            code = api.offsets_for_times(rk, parts, timeout_ms)
        found = tuples_of(parts)
        free_partition_list(parts)
        code = code or next((entry[3] for entry in found if entry[3] != 0), 0)
        if code != 0:
            raise error_of(code, "offsets can't be looked up by time", NULL, False)
        return [entry[:3] for entry in found]

    def watermarks(self, str topic, int32_t partition, int timeout_ms):
        """(low, high) of a partition, asked from the broker. Blocks up to `timeout_ms`, GIL released."""
        cdef rd_kafka_t *rk = self._rk()
        cdef bytes name = topic.encode()
        cdef const char *name_data = name
        cdef int64_t low = 0
        cdef int64_t high = 0
        cdef int code
        with nogil:
            code = api.query_watermark_offsets(rk, name_data, partition, &low, &high, timeout_ms)
        if code != 0:
            raise error_of(code, f"the end of {topic} [{partition}] can't be read", NULL, False)
        return low, high
