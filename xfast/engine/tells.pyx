"""The few words of an area that tell which layout it is of, for many areas at a time.

They lie in three lines of each. numpy would wait for each line; here they are asked for ahead.
What was found out about an area is then looked up for all that tell the same.
"""

import os

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cimport numpy as cnp

from xfast._core cimport Rows, check_rows, check_vector
from xfast.engine.distinct cimport (
    SECRET, Distinct, add_distinct, begin_distinct, end_distinct, place_distinct,
)

cdef extern from *:
    void prefetch "__builtin_prefetch" (const void *) nogil

cnp.import_array()

cdef enum:
    AHEAD = 12  # rows
    CONTROL = 24
    SOFTWARE = 464
    HEADER = 512
    WORDS = 5  # that tell of an area; its number follows


def words(cnp.ndarray areas, cnp.ndarray out, uint32_t mxcsr_mask):
    """Put XSTATE_BV, XCOMP_BV, the kernel's word of components, and the rest of what tells.

    The rest is MXCSR_MASK in bits 2 to 33, whether FCW and MXCSR are 0 (bit 1), and whether they
    can be a CPU's (bit 0), of which `mxcsr_mask` has the bits that MXCSR may have. The fifth word
    is 0.

    Parameters
    ----------
    areas : (n, size) uint8
        Bytes of a row are contiguous.
    out : (5 * n,) uint64
    """
    cdef Rows r
    check_rows(&r, areas, "areas", False)
    cdef uint64_t *told = <uint64_t *>check_vector(out, "out", cnp.NPY_UINT64, WORDS * r.n)
    cdef Py_ssize_t i
    cdef uint16_t fcw
    cdef uint32_t control[2]
    with nogil:
        for i in range(r.n):
            if i + AHEAD < r.n:
                prefetch(r.data + AHEAD * r.stride)
                prefetch(r.data + AHEAD * r.stride + SOFTWARE)
                prefetch(r.data + AHEAD * r.stride + HEADER)
            memcpy(&fcw, r.data, 2)
            memcpy(control, r.data + CONTROL, 8)
            memcpy(told, r.data + HEADER, 16)
            memcpy(told + 2, r.data + SOFTWARE, 8)
            told[3] = (
                <uint64_t>control[1] << 2
                | <uint64_t>(fcw == 0 and control[0] == 0) << 1
                | (fcw & 0xE0C0 == 0x40 and not control[0] & ~mxcsr_mask)
            )
            told[4] = 0
            told += WORDS
            r.data += r.stride


cdef class Known:
    """A table from what areas tell to numbers. It belongs to one thread."""

    cdef Distinct seen

    def __cinit__(self):
        begin_distinct(&self.seen, os.urandom(SECRET), WORDS + 1)

    def __dealloc__(self):
        end_distinct(&self.seen)

    def look_up(self, cnp.ndarray told, cnp.ndarray index, new):
        """Write each row's number to `index`, (n,) int64; ``new(row)`` gives it where it is new.

        Parameters
        ----------
        told : (5 * n,) uint64
        """
        cdef Py_ssize_t row, at, n = cnp.PyArray_SIZE(index)
        cdef int64_t *number = <int64_t *>check_vector(index, "index", cnp.NPY_INT64, n)
        cdef const uint64_t *key = (
            <const uint64_t *>check_vector(told, "told", cnp.NPY_UINT64, WORDS * n)
        )
        for row in range(n):
            at = place_distinct(&self.seen, key, WORDS, WORDS + 1)
            if self.seen.slot[at]:
                number[row] = self.seen.row[(self.seen.slot[at] - 1) * (WORDS + 1) + WORDS]
            else:
                number[row] = new(row)
                add_distinct(&self.seen, at, key, WORDS, WORDS + 1)[WORDS] = number[row]
            key += WORDS
