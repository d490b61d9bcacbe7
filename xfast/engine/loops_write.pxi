# Following plans: whole areas, and areas into areas. Part of `loops.pxi`.


cdef inline const step_t *steps_of(const Plan *plan) noexcept nogil:
    return <const step_t *>(plan + 1)


cdef inline const blend_t *blends_of(const Plan *plan) noexcept nogil:
    return <const blend_t *>plan.blend


cdef inline void walk(
    const Plan *plan, const uint8_t *src, uint8_t *dst, uint8_t *carry, bint into, bint stream
) noexcept nogil:
    """Follow a plan of any kind, in loops; far from the caches they lose nothing to `follow`.

    Blends that make whole lines are made in their turn: memory takes a row more slowly if streaming
    stores go back and forth in it.
    """
    cdef const step_t *step = steps_of(plan)
    cdef const blend_t *blend = blends_of(plan)
    cdef const blend_t *end = blend + plan.blends
    cdef bint in_turn = not into and plan.whole_blends
    cdef uint32_t _i
    cdef size_t size
    for _i in range(plan.steps):
        size = <size_t>step.lines * LINE
        while in_turn and blend != end and blend.dst < step.dst_end:
            put(dst + blend.dst, blend_line(blend, src), stream)
            blend += 1
        if step.code <= ZERO:
            copy_lines(
                dst + step.dst_end - size, src + step.src_end - size, step.lines, stream
            )
        else:
            zero_lines(dst + step.dst_end - size, step.lines, stream)
        step += 1
    if not into and not plan.whole_blends:
        weave(plan, src, dst, carry, stream)
        return
    while blend != end:
        if into:
            blend_into(blend, src, dst)
        else:
            put(dst + blend.dst, blend_line(blend, src), stream)
        blend += 1


cdef void weave(
    const Plan *plan, const uint8_t *src, uint8_t *dst, uint8_t *carry, bint stream
) noexcept nogil:
    """Make blends of which several share a line, or whose line belongs to two rows."""
    cdef const blend_t *blend = blends_of(plan)
    cdef line_t line = line_zero()
    cdef uint32_t _i
    for _i in range(plan.blends):
        if blend.opens:
            line = line_load(blend.value)
            if blend.carried:
                line = line_or(line, line_load(carry))
        line = line_merge(line, src + blend.src, blend.taken, blend.whole)
        if blend.carries:
            line_store(carry, line)
        elif blend.closes and blend.room != LINE:
            line_store_part(dst + blend.dst, line, blend.room)
        elif blend.closes:
            put(dst + blend.dst, line, stream)
        blend += 1


cdef inline uint32_t phase_of(const Job *job, Py_ssize_t i) noexcept nogil:
    return (<size_t>job.dst + i * job.dst_stride) & (LINE - 1)


cdef inline Plan *plan_of(const Job *job, Py_ssize_t i, bint packed) noexcept nogil:
    cdef const uint8_t *row = job.src + i * job.src_stride + LEGACY
    return find_plan(
        job.cache, load64(row), load64(row + 8), PACKED | phase_of(job, i) if packed and i else 0
    )


cdef inline void convert_row(
    Job *job, Py_ssize_t i, Plan *plan, uint8_t *carry, bint stream
) noexcept nogil:
    cdef const uint8_t *src = job.src + i * job.src_stride
    cdef uint8_t *dst = job.dst + i * job.dst_stride - (plan.key.target & (LINE - 1))
    if job.pkru and plan.pkru:
        store32(plan.pkru, job.pkru[i])
    if job.lost:
        job.lost[i] = plan.lost
    if plan.lost:
        job.failed |= plan.lost
    walk(plan, src, dst, carry, False, stream)


cdef inline void fetch_lines(
    Job *job, Py_ssize_t j, const Plan *plan, bint pace
) noexcept nogil:
    """Fetch what row `j` needs, unless all of it will be fetched when it is next."""
    job.dense += plan.dense
    if job.ahead and not (job.whole and plan.dense):
        fetch(job.src + j * job.src_stride, plan.read, plan.reads, pace)


cdef inline void fetch_row(const Job *job, Py_ssize_t i, Plan **ring) noexcept nogil:
    """Fetch the whole of row `i`, the next one, if most of it is needed; see `trial.pxd`."""
    cdef uint32_t line
    if job.whole and i < job.n and ring[i & (RING - 1)].dense:
        for line in range(job.row_lines):
            prefetch_far(job.src + i * job.src_stride + line * LINE)


cdef void convert(Job *job) noexcept nogil:
    """Write whole areas: every byte of a row, or as far as its compacted form reaches."""
    cdef uint8_t carry[LINE]
    cdef Plan *ring[RING]
    cdef Plan *plan
    cdef Py_ssize_t i, j, n = job.n
    cdef bint packed
    if not job.stream:
        for i in range(n):
            plan = plan_of(job, i, False)
            if plan == NULL:
                job.no_memory = True
                return
            convert_row(job, i, plan, carry, False)
        return
    packed = phase_of(job, 1) != 0 or phase_of(job, 0) != 0
    for j in range(n + job.ahead):
        i = j - job.ahead
        if j + HEADERS_AHEAD < n:
            prefetch_far(job.src + (j + HEADERS_AHEAD) * job.src_stride + LEGACY)
        if j < n:
            plan = plan_of(job, j, packed)
            if plan == NULL:
                job.no_memory = True
                return
            ring[j & (RING - 1)] = plan
            if packed:  # whose blends leave the core no time to wait
                fetch_lines(job, j, plan, False)
            else:
                fetch_lines(job, j, plan, True)
        if i < 0:
            continue
        fetch_row(job, i + 1, ring)
        if packed and i == 0:
            convert_row(job, i, ring[0], carry, False)
            open_carry(job, carry)
        elif PORTABLE and ring[i & (RING - 1)].ragged:
            convert_row(job, i, ring[i & (RING - 1)], carry, False)
        else:
            convert_row(job, i, ring[i & (RING - 1)], carry, True)
    if packed and n > 1:
        close_carry(job, carry)
    stream_fence()


cdef bint convert_one(const Cache *cache, const uint8_t *src, uint8_t *dst) noexcept nogil:
    """Write one area, not past the caches, if the last plan is for it and `follow` can."""
    cdef const Plan *plan = cache.followable
    if plan and is_for(plan, load64(src + LEGACY), load64(src + LEGACY + 8), 0):
        follow(steps_of(plan), blends_of(plan), src, dst, False)
        return True
    return False


cdef void open_carry(const Job *job, uint8_t *carry) noexcept nogil:
    """Take back the end of row 0, which the first line of row 1 goes on from."""
    cdef uint32_t n = phase_of(job, 1)
    memset(carry, 0, LINE)
    memcpy(carry, job.dst + job.dst_stride - n, n)


cdef void close_carry(const Job *job, const uint8_t *carry) noexcept nogil:
    """Write the end of the last row."""
    cdef uint32_t n = phase_of(job, job.n)
    memcpy(job.dst + job.n * job.dst_stride - n, carry, n)


cdef inline uint32_t fault_of(const Plan *plan, const uint8_t *row) noexcept nogil:
    """What KVM_SET_XSAVE would object to; codes of `xfast.xsave.area.UabiFault`."""
    if plan.fault:
        return plan.fault
    if plan.validate and line_any(
        line_merge(line_zero(), row + LEGACY, ~<uint64_t>0xFFFF, True)
    ):
        return FAULT_RESERVED
    if load32(row + 24) & ~plan.mxcsr_mask:
        return FAULT_MXCSR
    return FAULT_STORAGE if plan.lost else 0


cdef inline Plan *merge_plan(const Job *job, Py_ssize_t i) noexcept nogil:
    cdef const uint8_t *src = job.src + i * job.src_stride + LEGACY
    cdef const uint8_t *dst = job.dst + i * job.dst_stride + LEGACY
    return find_plan(job.cache, load64(src), load64(src + 8), load64(dst + 8))


cdef inline void merge_row(Job *job, Py_ssize_t i, const Plan *plan, bint stream) noexcept nogil:
    cdef const uint8_t *src = job.src + i * job.src_stride
    cdef uint8_t *dst = job.dst + i * job.dst_stride
    cdef uint32_t fault = fault_of(plan, src)
    if job.status:
        job.status[i] = fault
    if job.lost:
        job.lost[i] = plan.lost
    if fault:
        job.failed |= fault
        return
    walk(plan, src, dst, NULL, True, stream)
    store64(dst + LEGACY, (load64(dst + LEGACY) & plan.kept) | plan.stored)


cdef void merge(Job *job) noexcept nogil:
    """Copy present components into areas; all other bytes of a row stay."""
    cdef Plan *ring[RING]
    cdef Plan *plan
    cdef Py_ssize_t i, j, n = job.n
    for j in range(n + job.ahead):
        i = j - job.ahead
        if job.ahead and j + HEADERS_AHEAD < n:
            prefetch_far(job.src + (j + HEADERS_AHEAD) * job.src_stride + LEGACY)
            prefetch_far(job.dst + (j + HEADERS_AHEAD) * job.dst_stride + LEGACY)
        if j < n:
            plan = merge_plan(job, j)
            if plan == NULL:
                job.no_memory = True
                return
            ring[j & (RING - 1)] = plan
            fetch_lines(job, j, plan, True)
            if job.ahead:
                fetch(job.dst + j * job.dst_stride, plan.hold, plan.holds, True)
        if i < 0:
            continue
        fetch_row(job, i + 1, ring)
        if job.stream and not PORTABLE:
            merge_row(job, i, ring[i & (RING - 1)], True)
        else:
            merge_row(job, i, ring[i & (RING - 1)], False)
    if job.stream:
        stream_fence()


cdef bint merge_one(const Cache *cache, const uint8_t *src, uint8_t *dst) noexcept nogil:
    """Merge into one area as `convert_one` writes one, if it is valid as well."""
    cdef const Plan *plan = cache.followable
    if (
        plan
        and is_for(plan, load64(src + LEGACY), load64(src + LEGACY + 8), load64(dst + LEGACY + 8))
        and not fault_of(plan, src)
    ):
        follow(steps_of(plan), blends_of(plan), src, dst, True)
        store64(dst + LEGACY, (load64(dst + LEGACY) & plan.kept) | plan.stored)
        return True
    return False


cdef void swap(Job *save, Job *load) noexcept nogil:
    """Merge `load.dst`, the registers, into `save.dst`, and `load.src` into the registers."""
    cdef const Plan *leave
    cdef const Plan *enter
    cdef Py_ssize_t i
    for i in range(save.n):
        leave = merge_plan(save, i)
        enter = merge_plan(load, i)
        if leave == NULL or enter == NULL:
            save.no_memory = True
            return
        save.lost[i] = leave.lost | enter.lost
        save.failed |= save.lost[i]
        if not save.lost[i]:
            merge_row(save, i, leave, False)
            merge_row(load, i, enter, False)
