"""What Cython code elsewhere may cimport to convert and merge areas; see `convert.pyx`.

The functions on one area run without the GIL and never raise: they return the mask of
components that had no place, and ``1 << 63`` if memory is out.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from xfast._core cimport Rows
from xfast.engine.area cimport Slots
from xfast.engine.cache cimport Cache
from xfast.engine.loops cimport Job

cdef struct Config:
    # What the plans of one Converter or Merger have in common
    Slots src
    Slots dst
    uint64_t mask
    bint merge
    uint32_t mxcsr_mask  # convert: where MXCSR is init; merge: bits that it may have
    # convert only
    uint64_t xcomp  # of the result; 0: standard format
    bint ragged  # XCOMP_BV of each result is its XSTATE_BV
    bint kernel  # MXCSR comes with SSE or AVX whatever the format
    bint foreign_pkru
    uint64_t software
    # merge only
    bint validate
    uint64_t user_xfeatures
    int mxcsr  # 1: MXCSR comes over, 0: it does not, -1: with x87, SSE or AVX

cdef class Plans:
    cdef Config config
    cdef Cache *idle  # for callers with the GIL
    cdef Cache *spare  # for those without

cdef class Converter(Plans):
    pass

cdef class Merger(Plans):
    pass

cdef Cache *acquire(
    Plans plans, Py_ssize_t src_size, Py_ssize_t dst_size, bint gil
) noexcept nogil
cdef void release(Plans plans, Cache *cache, bint gil) noexcept nogil
cdef void fill_job(Job *job, const Rows *src, const Rows *dst) noexcept nogil
cdef void convert_rows(Job *job) noexcept nogil
cdef void merge_rows(Job *job) noexcept nogil
cdef uint64_t convert_one(
    Converter how, const uint8_t *src, Py_ssize_t src_size, uint8_t *dst, Py_ssize_t dst_size
) noexcept nogil
cdef uint64_t merge_one(
    Merger how, const uint8_t *src, Py_ssize_t src_size, uint8_t *dst, Py_ssize_t dst_size
) noexcept nogil
