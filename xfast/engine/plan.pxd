"""What a plan is: how to write one area, line by line, from another with a given header.

Areas with the same header are written alike, so the decisions (which components, where from,
where to, init or not) are taken once for each header and kept. Data only: `convert` makes
plans, `loops` follow them.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    CACHE = 1024  # plans kept; a power of two
    PROBES = 8  # neighbours in which a plan may be found
    PACKED = 64  # in a key: the row goes on in the line where the one before it ended
    RING = 64  # rows that a loop may look ahead; a power of two

cdef struct Range:
    uint32_t start, lines

cdef struct Plan:
    # Its steps (`follow.pxd`) lie behind it in memory.
    uint64_t key[3]
    uint64_t stored  # XSTATE_BV of the result, of components that come from the source
    uint64_t lost  # components that have no place, in the source or in the target
    uint32_t steps, blends, reads, holds
    bint plain  # each blend makes one line, and all of it
    bint simple  # `follow` can do it, and nothing is lost, packed or comes from elsewhere
    uint32_t pkru  # 1 + index of the blend into which a PKRU from elsewhere goes
    uint32_t pkru_at
    void *blend  # blend_t
    # merge only
    uint64_t kept  # of the target's XSTATE_BV
    uint32_t fault  # of every source with this header; UabiFault
    bint validate  # the header's reserved bytes
    uint32_t mxcsr_mask  # bits that MXCSR may have
    Range *read  # source lines to fetch
    Range *hold  # target lines of which a part stays

cdef struct Cache:
    Plan *last
    Plan *simple  # the last one, if it is
    Plan *plan[CACHE]
    Plan *retired[RING]  # replaced, but a loop may still look at them
    uint32_t retirements
    Py_ssize_t src_size, dst_size  # of the rows these plans are for
    const void *config
    Plan *(*miss)(
        Cache *cache, uint64_t home, uint64_t bv, uint64_t xcomp, uint64_t third
    ) noexcept nogil

cdef struct Job:
    # One call: rows to read, rows to write, and how.
    const uint8_t *src
    Py_ssize_t src_stride
    uint8_t *dst
    Py_ssize_t dst_stride
    Py_ssize_t n
    Cache *cache
    bint stream  # past the caches
    int ahead  # rows whose data to fetch ahead
    bint no_memory  # out: stopped early
    uint64_t failed  # out: of all rows, what is lost, or the first status
    uint64_t *lost  # out, or NULL: components lost, n masks
    # convert only
    const uint32_t *pkru  # n values, or NULL
    # merge only
    uint32_t *status  # out, or NULL: UabiFault, n codes
