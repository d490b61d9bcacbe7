# Making plans: which parts of a row come from where, and then its lines one by one. Part of
# `convert.pyx`.
#
# 1. choose() decides from the header which components come over, and writes them down as Parts
#    (bytes from the source; neighbours are joined) and Constants (FCW, MXCSR, XSTATE_BV and so on).
# 2. draw_lines() goes over the target's lines. A line that one part fills becomes a copy step, one
#    that nothing touches a zero step (merging: none), both joined to runs. Any other line becomes
#    a chain of Blends: a line of constants and zeros, into which part after part is merged.
# 3. settle() puts it all into one block of memory, just as large as needed.
#
# Why lines: whole lines are what streaming stores and the widest registers move. Rejected: a list
# of (memcpy, memset) calls, one a component, as kernels and VMMs do (short and odd-sized calls cost
# more than the bytes they move, and a line of which memory has a part must be read before it is
# written), and code made at run time (nothing is gained over `follow`, which jumps to as many
# lines as it needs).
#
# A plan for packed rows (`phase` bytes of a line belong to the row before) is drawn as if the row
# began at the line: all offsets are shifted by `phase`, and the blend of the shared line takes over
# what the row before left (`carried`), as that row's last blend leaves it (`carries`).

cdef enum:
    PARTS = COMPONENTS + 4
    STEPS = 4 * PARTS + 16
    BLENDS = 2 * PARTS + 16


cdef struct Part:
    # Bytes that come from the source
    uint32_t dst, src, size

cdef struct Constant:
    # Bytes that are the same in every row with this header
    uint32_t dst
    uint64_t value

cdef struct Draft:
    # A plan in the making; the arrays are as long as any layout can make them
    Part part[PARTS]
    Constant constant[8]
    step_t step[STEPS]
    blend_t blend[BLENDS]
    Range read[PARTS]
    Range hold[BLENDS]
    uint32_t parts, constants
    uint32_t end  # bytes of the row that the plan decides on
    uint32_t pkru_at  # bytes into the row where PKRU from elsewhere goes; 0: none does
    uint32_t pkru_blend, pkru_byte  # the same as a blend, and bytes into it
    Plan plan


# --- which components, from where to where ----------------------------------------------------


cdef void add_part(Draft *draft, uint32_t dst, uint32_t src, uint32_t size) noexcept nogil:
    """Add a part; parts stay in the order of the target, and those that touch become one."""
    cdef Part *part = draft.part
    cdef uint32_t i = draft.parts
    cdef Part *last = part + i - 1 if i else NULL
    if last and last.dst + last.size == dst and last.src + last.size == src:
        last.size += size
        return
    while i and part[i - 1].dst > dst:
        part[i] = part[i - 1]
        i -= 1
    part[i] = Part(dst, src, size)
    draft.parts += 1


cdef void add_constant(Draft *draft, uint32_t dst, uint64_t value) noexcept nogil:
    if value:
        draft.constant[draft.constants] = Constant(dst, value)
        draft.constants += 1


cdef bint takes_mxcsr(const Config *config, const Key *key, uint64_t have) noexcept nogil:
    """Whether MXCSR comes over with the components in `have`."""
    if not config.merge:
        return have & (SSE | AVX) != 0 and (
            config.kernel or has_mxcsr(key.xstate_bv, key.xcomp_bv)
        )
    if config.mxcsr >= 0:
        return config.mxcsr
    return key.xstate_bv & config.mask & (FP | SSE | AVX) != 0


cdef void choose(
    const Config *config, const Cache *cache, const Key *key, Draft *draft
) noexcept nogil:
    """Decide which components come over, and what else the row holds."""
    cdef uint64_t want = key.xstate_bv & config.mask
    cdef uint64_t xcomp = key.target if config.merge else config.xcomp
    cdef uint64_t have, rest
    cdef bint mxcsr
    cdef Place at, to
    cdef int c
    draft.end = <uint32_t>cache.dst_size
    place(&config.src, key.xstate_bv, key.xcomp_bv, cache.src_size, &at)
    if config.ragged:
        xcomp = bit(63) | (want & at.found & config.dst.known)
    place(&config.dst, key.xstate_bv, xcomp, cache.dst_size, &to)
    have = want & at.found & to.found
    if is_compacted(xcomp):
        have &= xcomp
    else:
        rest = have
        while rest:  # MPX and APX have one place between them: the first comes over
            c = take_lowest(&rest)
            if config.dst.overlap[c] & have & (bit(c) - 1):
                have ^= bit(c)
    if config.ragged:
        xcomp = bit(63) | have
        draft.end = EXTENDED
    draft.plan.ragged = config.ragged
    draft.plan.stored = have
    draft.plan.lost = want & ~have

    mxcsr = takes_mxcsr(config, key, have)
    if have & FP:
        add_part(draft, 0, 0, 24)
    if mxcsr:
        add_part(draft, 24, 24, 8)
    if have & FP:
        add_part(draft, 32, 32, 128)
    if have & SSE:
        add_part(draft, 160, 160, 256)
    rest = have & ~<uint64_t>(FP | SSE)
    while rest:
        c = take_lowest(&rest)
        if config.ragged:
            draft.end = to.offset[c] + config.dst.size[c]
        if c != 9 or not config.foreign_pkru:
            add_part(
                draft, to.offset[c], at.offset[c], min(config.src.size[c], config.dst.size[c])
            )
    if config.ragged:
        draft.end = min((draft.end + LINE - 1) & ~<uint32_t>(LINE - 1), cache.dst_size)
    if config.merge:
        add_checks(draft, config, key)
        return
    add_constant(draft, 0, 0 if have & FP else FCW_INIT)
    if not mxcsr:
        add_constant(draft, 24, MXCSR_INIT | <uint64_t>config.mxcsr_mask << 32)
    add_constant(draft, 464, config.software)
    add_constant(draft, LEGACY, have)
    add_constant(draft, LEGACY + 8, xcomp)
    if have & bit(9) and config.foreign_pkru:
        draft.pkru_at = to.offset[9]
        add_constant(draft, to.offset[9], 1)  # any but 0: the line has to be blended


cdef void add_checks(Draft *draft, const Config *config, const Key *key) noexcept nogil:
    """Note what a merge keeps of the target, and what its source has to be checked for."""
    draft.plan.kept = ~config.mask
    draft.plan.mxcsr_mask = <uint32_t>-1
    if config.validate:
        draft.plan.validate = True
        if key.xstate_bv & ~config.user_xfeatures:
            draft.plan.fault = FAULT_XSTATE_BV
        elif key.xcomp_bv:
            draft.plan.fault = FAULT_XCOMP_BV
        if key.xstate_bv & (FP | SSE | AVX):
            draft.plan.mxcsr_mask = config.mxcsr_mask


# --- line by line ---------------------------------------------------------------------------


cdef void add_run(Draft *draft, bint copied, uint32_t dst, uint32_t src) noexcept nogil:
    """Add a line that is copied or zeroed whole, to the step before it if it goes on from there."""
    cdef step_t *step = draft.step + draft.plan.steps
    cdef step_t *last = step - 1 if draft.plan.steps else NULL
    cdef uint32_t kind = COPY if copied else ZERO
    if (
        last and (last.code <= ZERO) == copied and last.dst_end == dst
        and (last.src_end == src or not copied)
    ):
        step = last
    else:
        step[0] = step_t(kind, 0, 0, 0)
        draft.plan.steps += 1
    step.lines += 1
    step.code = kind + min(step.lines, <uint32_t>STEP_LINES)
    step.dst_end = dst + LINE
    step.src_end = src + LINE
    if step.lines > STEP_LINES:
        draft.plan.followable = False


cdef blend_t *add_blend(Draft *draft, uint32_t dst) noexcept nogil:
    cdef blend_t *blend = &draft.blend[draft.plan.blends]
    memset(blend, 0, sizeof(blend_t))
    blend.dst = dst
    blend.whole = True  # nothing to take from the row's first line
    draft.plan.blends += 1
    return blend


cdef void take_part(
    blend_t *blend, const Part *part, uint32_t line, uint32_t phase, Py_ssize_t src_size
) noexcept nogil:
    """Let a blend take the bytes of a part that fall into `line`."""
    cdef uint32_t dst = part.dst + phase
    cdef uint32_t first = dst - line if dst > line else 0
    cdef uint32_t end = min(dst + part.size - line, <uint32_t>LINE)
    blend.taken = <uint64_t>-1 >> (LINE - end) & <uint64_t>-1 << first
    blend.src = <int64_t>part.src + line - dst
    blend.whole = blend.src >= 0 and blend.src + LINE <= src_size


cdef uint32_t write_constants(
    Draft *draft, uint32_t line, uint32_t phase, blend_t *blend
) noexcept nogil:
    """Put the constants that fall into `line` into a blend; return how many there are."""
    cdef uint32_t i, n = 0
    cdef uint32_t at
    for i in range(draft.constants):
        at = draft.constant[i].dst + phase
        if at & ~<uint32_t>(LINE - 1) == line:
            n += 1
            if blend != NULL:
                memcpy(blend.value + at - line, &draft.constant[i].value, 8)
                if draft.pkru_at and draft.constant[i].dst == draft.pkru_at:
                    draft.pkru_blend = draft.plan.blends - 1
                    draft.pkru_byte = at - line
                    memset(blend.value + at - line, 0, 8)
    return n


cdef void blend_line(
    Draft *draft, const Cache *cache, uint32_t line, uint32_t phase, bint packed, uint32_t p
) noexcept nogil:
    """Add the blends of one line: its constants, then part after part from `p` on."""
    cdef uint32_t room = min(<uint32_t>LINE, draft.end + phase - line)
    cdef blend_t *blend = add_blend(draft, line)
    blend.opens = True
    blend.carried = line < phase
    write_constants(draft, line, phase, blend)
    while p < draft.parts and draft.part[p].dst + phase < line + LINE:
        if blend.taken:
            blend = add_blend(draft, line)
        take_part(blend, &draft.part[p], line, phase, cache.src_size)
        p += 1
    blend.room = room
    blend.closes = True
    blend.carries = packed and room < LINE
    if not blend.opens or blend.carried or room != LINE:
        draft.plan.whole_blends = False


cdef void merge_line(Draft *draft, const Cache *cache, uint32_t line, uint32_t p) noexcept nogil:
    """Add the parts of one line, from `p` on; its other bytes stay."""
    draft.hold[draft.plan.holds] = Range(line, 1)
    draft.plan.holds += 1
    while p < draft.parts and draft.part[p].dst < line + LINE:
        take_part(add_blend(draft, line), &draft.part[p], line, 0, cache.src_size)
        p += 1


cdef void add_last_step(Draft *draft, const Config *config, bint packed) noexcept nogil:
    """Add the step that makes the blends, and decide whether `follow` can do it all."""
    cdef Plan *plan = &draft.plan
    draft.step[plan.steps] = step_t(BLEND + min(plan.blends, <uint32_t>STEP_BLENDS), 0, 0, 0)
    if plan.blends > STEP_BLENDS or packed or plan.lost or draft.pkru_at:
        plan.followable = False
    if not plan.whole_blends and not config.merge:  # which makes each blend by itself
        plan.followable = False


cdef void list_reads(Draft *draft) noexcept nogil:
    """List the source's lines that the parts lie in."""
    cdef uint32_t i, start, lines = 0
    cdef const Part *part
    for i in range(draft.parts):
        part = &draft.part[i]
        start = part.src & ~<uint32_t>(LINE - 1)
        draft.read[i] = Range(start, (part.src + part.size - start + LINE - 1) // LINE)
        lines += draft.read[i].lines
    draft.plan.reads = draft.parts
    draft.plan.dense = lines >= DENSE


cdef void draw_lines(
    Draft *draft, const Config *config, const Cache *cache, uint32_t phase, bint packed
) noexcept nogil:
    """Turn parts and constants into steps, one line after the other."""
    cdef uint32_t line, p = 0
    cdef uint32_t end = draft.end + phase
    cdef Part *part
    cdef bint bare
    draft.plan.whole_blends = draft.plan.followable = True
    for line in range(0, end, 64):
        while p < draft.parts and draft.part[p].dst + draft.part[p].size + phase <= line:
            p += 1
        part = &draft.part[p]
        bare = write_constants(draft, line, phase, NULL) == 0
        if p == draft.parts or part.dst + phase >= line + LINE:
            if config.merge:
                continue
            if line >= phase and line + LINE <= end and bare:
                add_run(draft, False, line, 0)
                continue
        elif (
            bare and part.dst + phase <= line and line + LINE <= part.dst + phase + part.size
        ):
            add_run(draft, True, line, part.src + line - part.dst - phase)
            continue
        if config.merge:
            merge_line(draft, cache, line, p)
        else:
            blend_line(draft, cache, line, phase, packed, p)
    add_last_step(draft, config, packed)


cdef Plan *settle(const Draft *draft) noexcept nogil:
    """Copy a draft into one block of just the size it needs."""
    cdef const Plan *p = &draft.plan
    cdef size_t steps = (p.steps + 1) * sizeof(step_t)
    cdef size_t head = (sizeof(Plan) + steps + LINE - 1) & ~<size_t>(LINE - 1)
    cdef size_t blends = p.blends * sizeof(blend_t)
    cdef size_t reads = p.reads * sizeof(Range)
    cdef size_t holds = p.holds * sizeof(Range)
    cdef Plan *plan
    if posix_memalign(<void **>&plan, LINE, head + blends + reads + holds):
        return NULL
    plan[0] = p[0]
    plan.blend = <uint8_t *>plan + head
    plan.read = <Range *>(<uint8_t *>plan.blend + blends)
    plan.hold = plan.read + p.reads
    memcpy(plan + 1, draft.step, steps)
    memcpy(plan.blend, draft.blend, blends)
    memcpy(plan.read, draft.read, reads)
    memcpy(plan.hold, draft.hold, holds)
    if draft.pkru_at:
        plan.pkru = (<blend_t *>plan.blend)[draft.pkru_blend].value + draft.pkru_byte
    return plan


cdef Plan *make_plan(const Cache *cache, const Key *key) noexcept nogil:
    """Make the plan for a header; NULL if memory is out."""
    cdef const Config *config = <const Config *>cache.config
    cdef bint packed = not config.merge and key.target & PACKED
    cdef uint32_t phase = key.target & (LINE - 1) if packed else 0
    cdef Draft draft
    memset(&draft.plan, 0, sizeof(Plan))
    draft.parts = draft.constants = draft.pkru_at = 0
    draft.plan.key = key[0]
    choose(config, cache, key, &draft)
    draw_lines(&draft, config, cache, phase, packed)
    list_reads(&draft)
    return settle(&draft)
