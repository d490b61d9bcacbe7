"""The loops over rows that `loops.pxi` compiles for each instruction set, and what they work on."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from xfast.engine.area cimport Slots
from xfast.engine.cache cimport Cache

cdef struct Job:
    # One call that writes rows: which, from which, and how.
    const uint8_t *src
    Py_ssize_t src_stride
    uint8_t *dst
    Py_ssize_t dst_stride
    Py_ssize_t n
    Cache *cache
    bint stream  # past the caches
    int ahead  # rows whose data to fetch ahead
    uint32_t row_lines  # from one source row to the next, or 0 if they are not for fetching whole
    bint whole  # fetch whole rows where most of their lines are needed
    Py_ssize_t dense  # out: rows of that kind
    bint no_memory  # out: stopped early
    uint64_t failed  # out: of all rows, what is lost, or the first status
    uint64_t *lost  # out, or NULL: components lost, n masks
    # convert only
    const uint32_t *pkru  # n values, or NULL
    # merge only
    uint32_t *status  # out, or NULL: UabiFault, n codes

cdef struct Scan:
    # One call that reads rows, or trims them in place, and fills one value a row.
    uint8_t *rows
    Py_ssize_t stride
    Py_ssize_t size
    Py_ssize_t n
    Py_ssize_t beyond  # rows behind them that may be fetched ahead
    const Slots *slots
    uint8_t *other  # diff: the rows to compare with
    Py_ssize_t other_stride
    Py_ssize_t other_size
    const Slots *other_slots
    uint64_t mask
    uint32_t mxcsr_mask
    bint early  # xinuse: stop early
    bint scrub  # keep: wipe the data as well
    bint stream
    int ahead
    bint whole  # read rows to their end, and let the hardware fetch ahead
    void *out

cdef struct Loops:
    void (*convert)(Job *job) noexcept nogil
    bint (*convert_one)(const Cache *cache, const uint8_t *src, uint8_t *dst) noexcept nogil
    void (*merge)(Job *job) noexcept nogil
    bint (*merge_one)(const Cache *cache, const uint8_t *src, uint8_t *dst) noexcept nogil
    void (*swap)(Job *save, Job *load) noexcept nogil
    void (*audit)(const Scan *scan) noexcept nogil
    void (*classify)(const Scan *scan) noexcept nogil
    void (*xinuse)(const Scan *scan) noexcept nogil
    void (*diff)(const Scan *scan) noexcept nogil
    void (*keep)(const Scan *scan) noexcept nogil
    # The limits of the machine, to measure the others against
    void (*copy)(uint8_t *dst, const uint8_t *src, Py_ssize_t n, bint stream) noexcept nogil
    bint (*read)(const uint8_t *src, Py_ssize_t n) noexcept nogil
    uint64_t (*touch)(const uint8_t *row, Py_ssize_t stride, Py_ssize_t n) noexcept nogil
