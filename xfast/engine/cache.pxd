"""A hash table of plans: one for each header met, and room for a thousand.

Open addressing with linear probing over `PROBES` neighbours; the last plan found is asked first,
since areas of one machine come in runs. Where all neighbours are taken the first one is replaced:
it is retired, not freed, as a loop that looks ahead may still hold it (at most `RING` plans).

`loops_find.pxi` looks plans up, since that has to be compiled with each of the loops.

Rejected: an index by XSTATE_BV alone (XCOMP_BV and the place in the line are part of the key),
and a chained table (a second cache miss at each row of a mixed batch).
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport free
from libc.string cimport memset

from xfast.engine.plan cimport Key, Plan

cdef enum:
    CACHE = 1024  # plans kept; a power of two
    PROBES = 8  # neighbours in which a plan may be found
    RING = 64  # rows that a loop may look ahead; a power of two

cdef struct Cache:
    Plan *last
    Plan *followable  # the last one, if it is
    Plan *plan[CACHE]
    Plan *retired[RING]
    uint64_t retirements
    Py_ssize_t src_size, dst_size  # of the rows these plans are for
    const void *config  # what `make` works from
    Plan *(*make)(const Cache *cache, const Key *key) noexcept nogil  # NULL if memory is out

cdef inline bint is_for(
    const Plan *plan, uint64_t xstate_bv, uint64_t xcomp_bv, uint64_t target
) noexcept nogil:
    return (
        plan.key.xstate_bv == xstate_bv and plan.key.xcomp_bv == xcomp_bv
        and plan.key.target == target
    )


cdef inline void keep_plan(Cache *cache, uint64_t home, Plan *plan) noexcept nogil:
    """Put a plan at the first free place from `home` on, or in the place of the one there."""
    cdef Plan **slot = &cache.plan[home & (CACHE - 1)]
    cdef Plan **retired
    cdef int i
    for i in range(PROBES):
        if cache.plan[(home + i) & (CACHE - 1)] == NULL:
            slot = &cache.plan[(home + i) & (CACHE - 1)]
            break
    else:
        retired = &cache.retired[cache.retirements & (RING - 1)]
        free(retired[0])
        retired[0] = slot[0]
        cache.retirements += 1
    slot[0] = plan


cdef inline void clear(Cache *cache) noexcept nogil:
    """Forget all plans."""
    cdef int i
    for i in range(CACHE):
        free(cache.plan[i])
    for i in range(RING):
        free(cache.retired[i])
    cache.last = cache.followable = NULL
    memset(cache.plan, 0, sizeof(cache.plan))
    memset(cache.retired, 0, sizeof(cache.retired))
    cache.retirements = 0


cdef inline void destroy(Cache *cache) noexcept nogil:
    if cache:
        clear(cache)
        free(cache)
