"""What Cython code elsewhere may cimport: layouts as C structs, and functions on one area.

None of these functions raises; all run without the GIL. `size` is the bytes of the area: not
one byte beyond is read or written. See also `xfast.engine.convert`.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cimport numpy as cnp

from xfast.engine.area cimport Slots
from xfast.engine.loops cimport Loops, Scan
from xfast.engine.trial cimport Trial

cdef const Loops *loops
cdef Py_ssize_t stream_above  # bytes from which a batch bypasses the caches
cdef int rows_ahead  # whose data such a batch fetches ahead

cdef enum:  # batches that are tried out: an operation, reading ones on dense rows and on pages
    TRIAL_CONVERT
    TRIAL_MERGE
    TRIAL_CLASSIFY
    TRIAL_CLASSIFY_PAGES
    TRIAL_XINUSE
    TRIAL_XINUSE_PAGES
    TRIAL_DIFF
    TRIAL_DIFF_PAGES
    TRIALS
cdef Trial trials[TRIALS]  # whether such a batch fetches whole rows

cdef class Table:
    cdef Slots slots

cdef uint32_t audit_one(
    const uint8_t *area, Py_ssize_t size, uint64_t mask, uint32_t mxcsr_mask
) noexcept nogil
cdef uint64_t xinuse_one(
    const uint8_t *area, Py_ssize_t size, const Slots *slots, bint early
) noexcept nogil
cdef uint64_t diff_one(
    const uint8_t *one, Py_ssize_t size, const Slots *slots,
    const uint8_t *two, Py_ssize_t two_size, const Slots *two_slots,
) noexcept nogil
cdef uint64_t keep_one(
    uint8_t *area, Py_ssize_t size, const Slots *slots, uint64_t mask, bint scrub
) noexcept nogil

cdef struct Rows:
    # An array of areas, checked
    uint8_t *data
    Py_ssize_t n
    Py_ssize_t size
    Py_ssize_t stride

cdef void run_scan(
    Scan *scan, void (*loop)(const Scan *scan) noexcept nogil, int trial, Py_ssize_t value
) noexcept nogil
cdef Scan scan_of(cnp.ndarray areas, str name, bint writes, Table table) except *
cdef int check_rows(Rows *r, cnp.ndarray array, str name, bint writes) except -1
cdef void *check_vector(cnp.ndarray array, str name, int typenum, Py_ssize_t n) except NULL
cdef bint overlap(const Rows *one, const Rows *two) noexcept nogil
