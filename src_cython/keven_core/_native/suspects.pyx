"""Records in hand and suspects, in memory that a worker and its supervisor share. The layout stands in suspects.pxd."""

cimport cython
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memcpy
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap

import os


@cython.final
cdef class Suspects:
    """Either side of the memory; needs no Kafka. One process and one thread at each side.

    Arguments:
        fd: a file of at least SIZE bytes; it may be closed afterwards.
        fresh: the supervisor's side: the file is new, nothing is in hand.

    Raises OSError when the file can't be mapped, ValueError when it is too small.
    """

    SIZE = sizeof(Shared)

    def __cinit__(self):
        self.shared = NULL

    def __init__(self, int fd, *, bint fresh=False):
        cdef void *address
        cdef int i
        if self.shared != NULL:
            raise ValueError("a Suspects can't be initialized twice")
        if os.fstat(fd).st_size < <int64_t>sizeof(Shared):
            raise ValueError(f"the file of suspects has less than {sizeof(Shared)} bytes")
        address = mmap(NULL, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if address == MAP_FAILED:
            raise OSError("the file of suspects can't be mapped")
        self.shared = <Shared *>address
        self.place_indexes = {}
        self.free_count = CELLS
        for i in range(CELLS):
            self.free_cells[i] = CELLS - 1 - i
            if fresh:
                self.shared.cells[i].offset = -1

    def __dealloc__(self):
        if self.shared != NULL:
            munmap(self.shared, sizeof(Shared))

    cdef int _check(self) except -1:
        if self.shared == NULL:
            raise ValueError("this Suspects was never initialized")
        return 0

    # --- the worker's side --------------------------------------------------------------------------------------------

    cdef Cell *cell(self, int index) noexcept:
        return &self.shared.cells[index]

    cpdef int place_of(self, str topic, int32_t partition) except -2:
        """The index of a partition, for enter(); -1: there is no room for it, so its records are not tracked."""
        cdef Place *place
        cdef bytes name
        cdef int64_t index
        self._check()
        known = self.place_indexes.get((topic, partition))
        if known is not None:
            return known
        name = topic.encode()
        index = self.shared.place_count
        if not 0 <= index < PLACES or len(name) > TOPIC_BYTES:
            return -1
        place = &self.shared.places[index]
        place.partition = partition
        place.topic_size = <int32_t>len(name)
        memcpy(place.topic, <const char *>name, len(name))
        self.shared.place_count = index + 1
        self.place_indexes[topic, partition] = index
        return <int>index

    cpdef int enter(self, int64_t place, int64_t offset) noexcept:
        """A record is in hand from now on; returns what leave() wants, -1 when it is not tracked."""
        cdef int index
        if self.shared == NULL or self.free_count == 0:
            return -1
        self.free_count -= 1
        index = self.free_cells[self.free_count]
        self.shared.cells[index].place = place
        self.shared.cells[index].offset = offset
        return index

    cpdef int leave(self, int index) except -1:
        """The record is not in hand any more: it has been accounted for, or its handler has returned."""
        self._check()
        if index < 0:
            return 0
        if index >= CELLS or self.free_count >= CELLS:
            raise ValueError(f"no record entered at {index}")
        self.shared.cells[index].offset = -1
        self.free_cells[self.free_count] = <int16_t>index
        self.free_count += 1
        return 0

    cpdef int beat(self) noexcept:
        """Say that this worker is alive, whether or not it has a record in hand."""
        if self.shared != NULL:
            self.shared.beats += 1
        return 0

    def last_suspect(self, str topic, int32_t partition):
        """The highest offset of a suspect in a partition; -1: there is none."""
        return max((entry[2] for entry in self.suspects() if entry[0] == topic and entry[1] == partition), default=-1)

    def find(self, str topic, int32_t partition, int64_t offset):
        """(deaths, condemned, why) of a suspect; None: the record is none."""
        for entry in self.suspects():
            if entry[:3] == (topic, partition, offset):
                return entry[3:]
        return None

    # --- the supervisor's side ----------------------------------------------------------------------------------------

    def in_hand(self):
        """By cell, the records in hand as (topic, partition, offset)."""
        cdef Cell *cell
        cdef Place *place
        cdef int64_t offset
        cdef int i
        self._check()
        found = {}
        for i in range(CELLS):
            cell = &self.shared.cells[i]
            offset = cell.offset
            if offset < 0 or not 0 <= cell.place < min(self.shared.place_count, PLACES):
                continue
            place = &self.shared.places[cell.place]
            if 0 < place.topic_size <= TOPIC_BYTES:
                topic = place.topic[:place.topic_size].decode("utf-8", "replace")
                found[i] = (topic, place.partition, offset)
        return found

    def write_suspects(self, entries):
        """Replace the suspects by (topic, partition, offset, deaths, condemned, why) tuples; the last 64 count."""
        cdef Suspect *suspect
        cdef bytes name
        cdef bytes reason
        cdef int i
        self._check()
        kept = list(entries)[-SUSPECTS:]
        self.shared.revision += 1
        self.shared.suspect_count = 0
        for i, (topic, partition, offset, deaths, condemned, why) in enumerate(kept):
            suspect = &self.shared.suspects[i]
            name = topic.encode()[:TOPIC_BYTES]
            reason = why.encode()[:WHY_BYTES]
            suspect.offset = offset
            suspect.partition = partition
            suspect.deaths = deaths
            suspect.condemned = bool(condemned)
            suspect.topic_size = <int32_t>len(name)
            suspect.why_size = <int32_t>len(reason)
            memcpy(suspect.topic, <const char *>name, len(name))
            memcpy(suspect.why, <const char *>reason, len(reason))
        self.shared.suspect_count = len(kept)
        self.shared.revision += 1

    def suspects(self):
        """The suspects as (topic, partition, offset, deaths, condemned, why) tuples."""
        cdef Suspect *suspect
        cdef int64_t revision
        cdef int i
        self._check()
        found = []
        # The supervisor needs microseconds to write them. If it was killed meanwhile, what is there has to do.
        for _ in range(1000):
            revision = self.shared.revision
            found = []
            for i in range(min(max(self.shared.suspect_count, 0), SUSPECTS)):
                suspect = &self.shared.suspects[i]
                if not (0 <= suspect.topic_size <= TOPIC_BYTES and 0 <= suspect.why_size <= WHY_BYTES):
                    continue
                found.append((
                    suspect.topic[:suspect.topic_size].decode("utf-8", "replace"), suspect.partition, suspect.offset,
                    suspect.deaths, bool(suspect.condemned), suspect.why[:suspect.why_size].decode("utf-8", "replace"),
                ))
            if revision % 2 == 0 and revision == self.shared.revision:
                break
        return found

    @property
    def beats(self):
        """How often beat() was called."""
        self._check()
        return self.shared.beats

    @property
    def phase(self):
        """How far the worker is: see keven_core.kafka._supervised.Phase."""
        self._check()
        return self.shared.phase

    @phase.setter
    def phase(self, int64_t phase):
        self._check()
        self.shared.phase = phase
