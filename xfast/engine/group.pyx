"""Rows that a judgement can't tell apart: each is described, and the same descriptions counted.

A fleet of 10**6 areas has some hundred different `Facts`; judging one area of each is enough.
Areas are described a block at a time, and each description is looked up in a hash table that
lives on between calls. So memory grows with the classes, not with the rows, and the lookup
costs little beside reading an area: its line of facts is in the nearest cache.

Rejected: numpy.unique over the facts of all rows (it sorts them: 20 times as long as reading the
areas, and 64 bytes a row); a dictionary (an object a row); a copy of the rows of each layout (as
long as describing them).
"""

import os

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, realloc

cimport numpy as cnp

from xfast._core cimport TRIAL_CLASSIFY, Table, check_vector, loops, run_scan, scan_of
from xfast.engine.area cimport Facts, Slots
from xfast.engine.distinct cimport (
    SECRET, Distinct, add_distinct, begin_distinct, end_distinct, place_distinct,
)
from xfast.engine.loops cimport Scan

cnp.import_array()

cdef enum:
    BLOCK = 256  # rows described at a time: 16 KiB of facts
    KEYED = sizeof(Facts) // 8 + 1  # words that make a class: facts and sort
    WIDTH = KEYED + 2

cdef struct Group:
    # One class; `xfast.xsave.area.GROUPS` is the same for numpy.
    Facts facts
    uint64_t sort
    int64_t first  # row that showed it first, counted over all calls
    int64_t count  # rows


cdef inline Py_ssize_t equal_from(const uint32_t *sort, Py_ssize_t most) noexcept nogil:
    """Return how many rows in a row are of one sort, up to `most`."""
    cdef Py_ssize_t n = 1
    while n < most and sort[n] == sort[0]:
        n += 1
    return n


cdef class Groups:
    """The classes found so far, of rows of any number of layouts: one for each sort of row.

    Threads that share one take turns.
    """

    cdef Distinct seen
    cdef Slots *slots  # of each sort of row
    cdef uint32_t sorts
    cdef int64_t rows
    cdef cython.pymutex lock

    def __cinit__(self):
        begin_distinct(&self.seen, os.urandom(SECRET), WIDTH)

    def __dealloc__(self):
        end_distinct(&self.seen)
        free(self.slots)

    cdef int add_block(
        self, const Facts *facts, uint64_t sort, Py_ssize_t n, uint32_t *index
    ) except -1 nogil:
        cdef Py_ssize_t i, at
        cdef Group *group
        cdef Group one
        cdef const uint64_t *key = <const uint64_t *>&one
        one.sort = sort
        for i in range(n):
            one.facts = facts[i]
            at = place_distinct(&self.seen, key, KEYED, WIDTH)
            if self.seen.slot[at]:
                index[i] = self.seen.slot[at] - 1
                group = <Group *>self.seen.row + index[i]
            else:
                index[i] = <uint32_t>self.seen.n
                group = <Group *>add_distinct(&self.seen, at, key, KEYED, WIDTH)
                group.first = self.rows + i
                group.count = 0
            group.count += 1
        self.rows += n
        return 0

    def know(self, Table table not None):
        """Learn where components lie in the rows of the next sort."""
        cdef Slots *slots
        with self.lock:
            slots = <Slots *>realloc(self.slots, (self.sorts + 1) * sizeof(Slots))
            if slots == NULL:
                raise MemoryError
            self.slots = slots
            slots[self.sorts] = table.slots
            self.sorts += 1

    def add(self, cnp.ndarray areas, cnp.ndarray sorts, cnp.ndarray index):
        """Describe areas, and write the number of each one's class to `index`, (n,) uint32.

        `sorts`, (n,) uint32, tells of which sort each row is; None: all are of the first.
        """
        cdef Scan scan = scan_of(areas, "areas", False, None)
        cdef Py_ssize_t left = scan.n
        cdef uint32_t *number = <uint32_t *>check_vector(index, "index", cnp.NPY_UINT32, left)
        cdef const uint32_t *sort = NULL
        cdef uint32_t of = 0
        cdef Facts facts[BLOCK]
        if sorts is not None:
            sort = <const uint32_t *>check_vector(sorts, "sorts", cnp.NPY_UINT32, left)
        scan.out = facts
        with self.lock, nogil:
            while left:
                scan.n = min(left, <Py_ssize_t>BLOCK)
                if sort != NULL:
                    of = sort[0]
                    scan.n = equal_from(sort, scan.n)
                    sort += scan.n
                if of >= self.sorts:
                    raise ValueError(f"sorts: expected numbers below {self.sorts}, got {of}")
                scan.slots = &self.slots[of]
                scan.beyond = left - scan.n
                run_scan(&scan, loops.classify, TRIAL_CLASSIFY, sizeof(Facts))
                self.add_block(facts, of, scan.n, number)
                scan.rows += scan.n * scan.stride
                number += scan.n
                left -= scan.n

    def __len__(self):
        return self.seen.n

    def groups(self):
        """Return the bytes of all groups, in the order in which they showed up."""
        with self.lock:
            return (<uint8_t *>self.seen.row)[: self.seen.n * sizeof(Group)]
