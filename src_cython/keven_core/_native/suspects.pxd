"""The memory that a worker process shares with its supervisor: which records it has in hand, and which are suspects.

One file for each life of a worker, made by the supervisor and mapped by both, so that it outlives the worker:

    shared   = beats phase place_count revision suspect_count suspect[64] cell[1024] place[4096]
    suspect  = a record that workers have died with; written by the supervisor, all at once
    cell     = a record in hand, as the index of its place and its offset; offset -1: free; written by the worker
    place    = topic and partition; written by the worker, each once, when it first meets them

The worker can die between any two stores. So a cell is freed before its place changes, and its offset is stored last;
a place is written before it is counted. The supervisor believes no index and no length that it finds.
"""

cimport cython
from libc.stdint cimport int16_t, int32_t, int64_t, uint64_t

cdef enum:
    # How many suspects are kept; the oldest go first.
    SUSPECTS = 64
    # Records in hand at a time; those that find no cell are handled all the same, but can't be suspected.
    CELLS = 1024
    # Partitions of one worker's life; records of others can't be suspected. Pages that are not used take no memory.
    PLACES = 4096
    # Kafka allows 249 characters.
    TOPIC_BYTES = 256
    WHY_BYTES = 160


cdef struct Cell:
    int64_t offset
    int64_t place


cdef struct Place:
    int32_t partition
    int32_t topic_size
    char topic[TOPIC_BYTES]


cdef struct Suspect:
    int64_t offset
    int32_t partition
    int32_t deaths
    int32_t condemned
    int32_t topic_size
    int32_t why_size
    char topic[TOPIC_BYTES]
    char why[WHY_BYTES]


cdef struct Shared:
    uint64_t beats          # goes up while the worker is alive to Kafka
    int64_t phase           # keven_core.kafka._supervised.Phase
    int64_t place_count
    int64_t revision        # of the suspects; odd while they are being written
    int64_t suspect_count
    Suspect suspects[SUSPECTS]
    Cell cells[CELLS]
    Place places[PLACES]


@cython.final
cdef class Suspects:
    cdef Shared *shared
    cdef dict place_indexes
    cdef int16_t free_cells[CELLS]
    cdef int free_count

    cdef int _check(self) except -1
    cdef Cell *cell(self, int index) noexcept
    cpdef int place_of(self, str topic, int32_t partition) except -2
    cpdef int enter(self, int64_t place, int64_t offset) noexcept
    cpdef int leave(self, int index) except -1
    cpdef int beat(self) noexcept
