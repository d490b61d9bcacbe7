"""Rows that a judgement can't tell apart: each is described, and the same descriptions counted.

A fleet of 10**6 areas has some hundred different `Facts`; judging one area of each is enough.
Areas are described a block at a time, and each description is looked up in a hash table that
lives on between calls. So memory grows with the classes, not with the rows, and the lookup
costs little beside reading an area: its line of facts is in the nearest cache.

Rejected: numpy.unique over the facts of all rows (it sorts them: 20 times as long as reading the
areas, and 64 bytes a row); a dictionary (an object a row).

*Source*: Lemire, Kaser: Strongly universal string hashing is fast (multilinear hashing).
"""

import os

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy

cimport numpy as cnp

from xfast._core cimport TRIAL_CLASSIFY, Table, check_vector, loops, run_scan, scan_of
from xfast.engine.area cimport Facts
from xfast.engine.loops cimport Scan

cnp.import_array()

cdef enum:
    WORDS = sizeof(Facts) // 8
    BLOCK = 256  # rows described at a time: 16 KiB of facts
    MOST = 30  # bits of a group's number

cdef struct Group:
    # One class; `xfast.xsave.area.GROUPS` is the same for numpy.
    Facts facts
    int64_t first  # row that showed it first, counted over all calls
    int64_t count  # rows


cdef class Groups:
    """The classes found so far. Threads that share one take turns.

    The hash is multilinear with secret odd factors, so that no file can be made whose areas all
    meet in one place of the table.
    """

    cdef Group *group
    cdef uint32_t *slot  # 1 + index of a group, 0: free; a power of two of them
    cdef Py_ssize_t n, room  # groups there are, and groups before the table grows
    cdef int64_t rows
    cdef int bits  # of a group's number; a slot's has one more
    cdef uint64_t factor[WORDS]
    cdef cython.pymutex lock

    def __cinit__(self):
        cdef const uint8_t *secret
        cdef int i
        random = os.urandom(sizeof(self.factor))
        secret = random
        memcpy(self.factor, secret, sizeof(self.factor))
        for i in range(WORDS):
            self.factor[i] |= 1
        self.grow()

    def __dealloc__(self):
        free(self.group)
        free(self.slot)

    cdef int grow(self) except -1 nogil:
        """Double the room, from 128 groups on; the table is at most half full."""
        cdef int bits = self.bits + 1 if self.room else 7
        cdef Py_ssize_t i, room = <Py_ssize_t>1 << bits
        cdef uint32_t *slot
        cdef Group *group
        if bits > MOST:
            raise MemoryError(f"expected at most 2**{MOST} classes, got more")
        group = <Group *>realloc(self.group, room * sizeof(Group))
        if group == NULL:
            raise MemoryError
        self.group = group
        slot = <uint32_t *>calloc(room, 2 * sizeof(uint32_t))
        if slot == NULL:
            raise MemoryError
        free(self.slot)
        self.slot = slot
        self.bits = bits
        self.room = room
        for i in range(self.n):
            slot[self.find(&self.group[i].facts)] = <uint32_t>(i + 1)
        return 0

    cdef inline Py_ssize_t find(self, const Facts *facts) noexcept nogil:
        """Return the slot of these facts: that of their group, or the one where it belongs."""
        cdef const uint64_t *word = <const uint64_t *>facts
        cdef const uint64_t *other
        cdef uint64_t mixed = 0, differs
        cdef Py_ssize_t at, last = 2 * self.room - 1
        cdef int i
        for i in range(WORDS):
            mixed += word[i] * self.factor[i]
        at = <Py_ssize_t>(mixed >> (63 - self.bits))
        while self.slot[at]:
            other = <const uint64_t *>&self.group[self.slot[at] - 1].facts
            differs = 0
            for i in range(WORDS):
                differs |= word[i] ^ other[i]
            if not differs:
                break
            at = (at + 1) & last
        return at

    cdef int add_block(self, const Facts *facts, Py_ssize_t n, uint32_t *index) except -1 nogil:
        cdef Py_ssize_t i, at
        cdef uint32_t found
        for i in range(n):
            at = self.find(&facts[i])
            found = self.slot[at]
            if found == 0:
                if self.n == self.room:
                    self.grow()
                    at = self.find(&facts[i])
                self.group[self.n].facts = facts[i]
                self.group[self.n].first = self.rows + i
                self.group[self.n].count = 0
                self.n += 1
                self.slot[at] = found = <uint32_t>self.n
            self.group[found - 1].count += 1
            index[i] = found - 1
        self.rows += n
        return 0

    def add(self, cnp.ndarray areas, Table table not None, cnp.ndarray index):
        """Describe areas, and write the number of each one's class to `index`, (n,) uint32."""
        cdef Scan scan = scan_of(areas, "areas", False, table)
        cdef uint32_t *number = <uint32_t *>check_vector(index, "index", cnp.NPY_UINT32, scan.n)
        cdef Facts facts[BLOCK]
        cdef Py_ssize_t left = scan.n
        scan.out = facts
        with self.lock, nogil:
            while left:
                scan.n = min(left, <Py_ssize_t>BLOCK)
                scan.beyond = left - scan.n
                run_scan(&scan, loops.classify, TRIAL_CLASSIFY, sizeof(Facts))
                self.add_block(facts, scan.n, number)
                scan.rows += scan.n * scan.stride
                number += scan.n
                left -= scan.n

    def __len__(self):
        return self.n

    def groups(self):
        """Return the bytes of all groups, in the order in which they showed up."""
        with self.lock:
            return (<uint8_t *>self.group)[: self.n * sizeof(Group)]
