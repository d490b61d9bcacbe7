# Finding the plan for a header: the table of `cache.pxd`, looked up. Part of `loops.pxi`.

cdef extern from *:
    """
    #define ODD 0x9E3779B97F4A7C15ull /* 2**64 / golden ratio: spreads bits upwards */
    """
    const uint64_t ODD


cdef Plan *search(
    Cache *cache, uint64_t xstate_bv, uint64_t xcomp_bv, uint64_t target
) noexcept nogil:
    """Look a plan up in the table, and make it if it is not there.

    A call of its own: inlined, it takes registers from the loop, and rows that share lines, each
    with another plan than the one before, lose a tenth.
    """
    cdef uint64_t turned = target << 32 | target >> 32
    cdef uint64_t home = (xstate_bv ^ xcomp_bv * ODD ^ turned * ODD) * ODD >> 54
    cdef Plan *plan = NULL
    cdef Key key
    cdef int i
    for i in range(PROBES):
        plan = cache.plan[(home + i) & (CACHE - 1)]
        if plan == NULL or is_for(plan, xstate_bv, xcomp_bv, target):
            break
    else:
        plan = NULL
    if plan == NULL:
        key = Key(xstate_bv, xcomp_bv, target)
        plan = cache.make(cache, &key)
        if plan:
            keep_plan(cache, home, plan)
    cache.last = plan
    cache.followable = plan if plan and plan.followable else NULL
    return plan


cdef inline Plan *find_plan(
    Cache *cache, uint64_t xstate_bv, uint64_t xcomp_bv, uint64_t target
) noexcept nogil:
    """Return the plan for a header; NULL only if memory is out."""
    if cache.last and is_for(cache.last, xstate_bv, xcomp_bv, target):
        return cache.last
    return search(cache, xstate_bv, xcomp_bv, target)
