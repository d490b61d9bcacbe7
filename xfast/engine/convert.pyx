# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, binding=False, embedsignature=False
# cython: freethreading_compatible=True
"""The engine's writers: plans made and kept, and the calls that follow them over rows.

A Converter writes whole areas in another layout or format, a Merger copies what is present
into areas that are already there. Each keeps the plan for every header that it has met.

*Source*: Linux arch/x86/kernel/fpu/xstate.c __copy_xstate_to_uabi_buf(),
copy_uabi_to_xstate(); Intel SDM vol. 1 section 13.4.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.stdlib cimport posix_memalign

cimport numpy as cnp

from xfast.engine.area cimport (
    AVX, COMPONENTS, EXTENDED, FCW_INIT, FP, LEGACY, MXCSR_INIT, SSE, Place, bit, compacted,
    has_mxcsr, place, take_lowest,
)
from xfast._core cimport Rows, Table, loops, overlap, rows, rows_ahead, stream_above, vector
from xfast.engine.follow cimport BLEND, COPY, STEP_BLENDS, STEP_LINES, ZERO, blend_t, step_t
from xfast.engine.plan cimport CACHE, PACKED, PROBES, RING, Cache, Job, Plan, Range
from xfast.engine.simd cimport LINE, cpu_is_amd, pointer_exchange, pointer_exchange_gil

cnp.import_array()

cdef enum:
    PARTS = COMPONENTS + 4
    STEPS = 4 * PARTS + 16
    BLENDS = 2 * PARTS + 16
    LONG_ROW = 8192  # bytes; AMD's hardware fetches these ahead better than we do
    ROW_LIMIT = 1 << 30  # bytes; plans count in 32 bits
    SMALL = 1 << 16  # bytes below which letting go of the GIL costs more than it gives


cdef struct Part:
    # Bytes that come from the source
    uint32_t dst, src, size

cdef struct Constant:
    # Bytes that are the same in every row with this header
    uint32_t dst
    uint64_t value

cdef struct Draft:
    # A plan in the making
    Part part[PARTS]
    Constant constant[8]
    step_t step[STEPS]
    blend_t blend[BLENDS]
    Range read[PARTS]
    Range hold[BLENDS]
    uint32_t parts, constants
    uint32_t end  # bytes of the row that the plan decides on
    Plan plan


# --- which components, from where to where ----------------------------------------------------


cdef void add_part(Draft *draft, uint32_t dst, uint32_t src, uint32_t size) noexcept nogil:
    """Add a part; parts stay in the order of the target, and those that touch become one."""
    cdef Part *part = draft.part
    cdef uint32_t i = draft.parts
    cdef Part *last = &part[i - 1]
    if i and last.dst + last.size == dst and last.src + last.size == src:
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


cdef void choose(
    const Config *config, const Cache *cache, const uint64_t *key, Draft *draft
) noexcept nogil:
    """Decide which components come over, and what else the row holds."""
    cdef uint64_t bv = key[0], want = key[0] & config.mask
    cdef uint64_t xcomp = key[2] if config.merge else config.xcomp
    cdef uint64_t have, rest
    cdef bint mxcsr
    cdef Place at, to
    cdef int c
    draft.end = <uint32_t>cache.dst_size
    place(&config.src, bv, key[1], cache.src_size, &at)
    if config.ragged:
        xcomp = bit(63) | (want & at.found & config.dst.known)
    place(&config.dst, bv, xcomp, cache.dst_size, &to)
    have = want & at.found & to.found
    if compacted(xcomp):
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
    draft.plan.stored = have
    draft.plan.lost = want & ~have

    if config.merge:
        mxcsr = config.mxcsr > 0 or (config.mxcsr < 0 and want & (FP | SSE | AVX) != 0)
    else:
        mxcsr = have & (SSE | AVX) != 0 and (config.kernel or has_mxcsr(bv, key[1]))
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
        draft.plan.kept = ~config.mask
        draft.plan.mxcsr_mask = <uint32_t>-1
        if config.validate:
            draft.plan.validate = True
            draft.plan.fault = 1 if bv & ~config.user_xfeatures else 2 if key[1] else 0
            if bv & (FP | SSE | AVX):
                draft.plan.mxcsr_mask = config.mxcsr_mask
        return
    add_constant(draft, 0, 0 if have & FP else FCW_INIT)
    if not mxcsr:
        add_constant(draft, 24, MXCSR_INIT | <uint64_t>config.mxcsr_mask << 32)
    add_constant(draft, 464, config.software)
    add_constant(draft, LEGACY, have)
    add_constant(draft, LEGACY + 8, xcomp)
    if have & bit(9) and config.foreign_pkru:
        draft.plan.pkru_at = to.offset[9]
        add_constant(draft, to.offset[9], 1)  # any but 0: the line has to be blended


# --- line by line ---------------------------------------------------------------------------


cdef void add_run(Draft *draft, bint copied, uint32_t dst, uint32_t src) noexcept nogil:
    """Add a line that is copied or zeroed whole, to the step before it if it goes on from there."""
    cdef step_t *last = draft.step + draft.plan.steps - 1
    cdef uint32_t kind = COPY if copied else ZERO
    if not (
        draft.plan.steps and (last.code <= ZERO) == copied and last.dst_end == dst
        and (last.src_end == src or not copied)
    ):
        last += 1
        last[0] = step_t(kind, 0, 0, 0)
        draft.plan.steps += 1
    last.lines += 1
    last.code = kind + min(last.lines, <uint32_t>STEP_LINES)
    last.dst_end = dst + LINE
    last.src_end = src + LINE
    if last.lines > STEP_LINES:
        draft.plan.simple = False


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
                if draft.plan.pkru_at and draft.constant[i].dst == draft.plan.pkru_at:
                    draft.plan.pkru = draft.plan.blends
                    draft.plan.pkru_at = at - line
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
        draft.plan.plain = False


cdef void merge_line(Draft *draft, const Cache *cache, uint32_t line, uint32_t p) noexcept nogil:
    """Add the parts of one line, from `p` on; its other bytes stay."""
    draft.hold[draft.plan.holds] = Range(line, 1)
    draft.plan.holds += 1
    while p < draft.parts and draft.part[p].dst < line + LINE:
        take_part(add_blend(draft, line), &draft.part[p], line, 0, cache.src_size)
        p += 1


cdef void add_blends(Draft *draft, const Config *config, bint packed) noexcept nogil:
    """Add the last step, and decide whether the plan is simple."""
    cdef Plan *plan = &draft.plan
    draft.step[plan.steps] = step_t(BLEND + min(plan.blends, <uint32_t>STEP_BLENDS), 0, 0, 0)
    if plan.blends > STEP_BLENDS or packed or plan.lost or plan.pkru:
        plan.simple = False
    if not plan.plain and not config.merge:  # which makes each blend by itself
        plan.simple = False


cdef void draw(
    Draft *draft, const Config *config, const Cache *cache, uint32_t phase, bint packed
) noexcept nogil:
    """Turn parts and constants into steps, one line after the other."""
    cdef uint32_t line, p = 0, i, start
    cdef uint32_t end = draft.end + phase
    cdef Part *part
    cdef bint bare
    draft.plan.plain = draft.plan.simple = True
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
    add_blends(draft, config, packed)
    for i in range(draft.parts):
        part = &draft.part[i]
        start = part.src & ~<uint32_t>(LINE - 1)
        draft.read[i] = Range(start, (part.src + part.size - start + LINE - 1) // LINE)
    draft.plan.reads = draft.parts


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
    return plan


cdef Plan *miss(
    Cache *cache, uint64_t home, uint64_t bv, uint64_t xcomp, uint64_t third
) noexcept nogil:
    """Make the plan for a header that has not been met before, and keep it."""
    cdef const Config *config = <const Config *>cache.config
    cdef bint packed = not config.merge and third & PACKED
    cdef uint32_t phase = third & (LINE - 1) if packed else 0
    cdef Draft draft
    cdef Plan *plan
    cdef Plan **slot = &cache.plan[home & (CACHE - 1)]
    cdef Plan **retired
    cdef int i
    memset(&draft.plan, 0, sizeof(Plan))
    draft.parts = draft.constants = 0
    draft.plan.key[0] = bv
    draft.plan.key[1] = xcomp
    draft.plan.key[2] = third
    choose(config, cache, draft.plan.key, &draft)
    draw(&draft, config, cache, phase, packed)
    plan = settle(&draft)
    if plan == NULL:
        return NULL
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
    return plan


cdef void forget(Cache *cache) noexcept nogil:
    cdef int i
    for i in range(CACHE):
        free(cache.plan[i])
    for i in range(RING):
        free(cache.retired[i])
    cache.last = cache.simple = NULL
    memset(cache.plan, 0, sizeof(cache.plan))
    memset(cache.retired, 0, sizeof(cache.retired))
    cache.retirements = 0


cdef void drop(Cache *cache) noexcept nogil:
    if cache:
        forget(cache)
        free(cache)


cdef class Plans:
    """The plans of one kind of conversion. Any number of threads may use it at a time."""

    def __cinit__(self):
        self.idle = self.spare = NULL

    def __dealloc__(self):
        drop(self.idle)
        drop(self.spare)


cdef Cache *acquire(
    Plans plans, Py_ssize_t src_size, Py_ssize_t dst_size, bint gil
) noexcept nogil:
    """Take the plans for this call alone; a second thread starts with none.

    `gil`: the caller holds the GIL, and needs no atomic exchange, which would have to wait
    for all that was written before.
    """
    cdef Cache *cache = <Cache *>(
        pointer_exchange_gil(<void **>&plans.idle, NULL) if gil
        else pointer_exchange(<void **>&plans.spare, NULL)
    )
    if cache == NULL:
        cache = <Cache *>calloc(1, sizeof(Cache))
        if cache == NULL:
            return NULL
        cache.config = &plans.config
        cache.miss = miss
    elif cache.src_size != src_size or cache.dst_size != dst_size:
        forget(cache)
    cache.src_size = src_size
    cache.dst_size = dst_size
    return cache


cdef void release(Plans plans, Cache *cache, bint gil) noexcept nogil:
    drop(<Cache *>(
        pointer_exchange_gil(<void **>&plans.idle, cache) if gil
        else pointer_exchange(<void **>&plans.spare, cache)
    ))


cdef void fill_job(Job *job, const Rows *src, const Rows *dst) noexcept nogil:
    """Fill in every field; compilers clear a struct of this size with a slow string instruction."""
    job.src = src.data
    job.src_stride = src.stride
    job.dst = dst.data
    job.dst_stride = dst.stride
    job.n = src.n
    job.cache = NULL
    job.stream = job.no_memory = False
    job.ahead = 0
    job.failed = 0
    job.lost = NULL
    job.pkru = job.status = NULL
    if src.n * (src.size + dst.size) > stream_above:
        job.stream = (<size_t>dst.data | <size_t>dst.stride) & (LINE - 1) == 0
        if src.size < LONG_ROW or not cpu_is_amd():
            job.ahead = rows_ahead


cdef void convert_rows(Job *job) noexcept nogil:
    """Convert many rows, or one as fast as can be."""
    if (
        job.n != 1 or job.stream or job.lost or job.pkru
        or not loops.convert_one(job.cache, job.src, job.dst)
    ):
        loops.convert(job)


cdef void merge_rows(Job *job) noexcept nogil:
    """Merge many rows, or one as fast as can be."""
    if (
        job.n != 1 or job.stream or job.lost or job.status
        or not loops.merge_one(job.cache, job.src, job.dst)
    ):
        loops.merge(job)


cdef int check_pair(const Rows *src, str src_name, const Rows *dst, str dst_name) except -1:
    if dst.n != src.n:
        raise ValueError(f"{dst_name}: got {dst.n} areas, needed {src.n}, as many as {src_name}")
    if max(src.size, dst.size) >= ROW_LIMIT:
        raise ValueError(
            f"{dst_name}: got areas of {max(src.size, dst.size)} bytes, "
            f"needed less than {ROW_LIMIT}"
        )
    if overlap(src, dst):
        raise ValueError(
            f"{dst_name}: got memory that {src_name} uses too, needed separate memory"
        )
    return 0


cdef class Converter(Plans):
    """Write whole areas: the components in XSTATE_BV and `mask`, everything else init.

    Parameters
    ----------
    source, target : Table
    mask : int
    xcomp_bv : int
        Format of the result; 0: standard.
    ragged : bool
        Compacted results with XCOMP_BV = XSTATE_BV | 1 << 63, each written as far as it goes
        (up to the next multiple of 64 bytes).
    kernel : bool
        MXCSR comes from the area with SSE or AVX, whatever its format.
    foreign_pkru : bool
        Each call gives the values of PKRU.
    mxcsr_mask : int
        MXCSR_MASK where MXCSR is init.
    software : int
        u64 at byte 464.
    """

    def __init__(
        self, Table source not None, Table target not None, uint64_t mask, *, uint64_t xcomp_bv=0,
        bint ragged=False, bint kernel=False, bint foreign_pkru=False, uint32_t mxcsr_mask=0,
        uint64_t software=0,
    ):
        self.config.src = source.slots
        self.config.dst = target.slots
        self.config.mask = mask
        self.config.xcomp = xcomp_bv
        self.config.ragged = ragged
        self.config.kernel = kernel
        self.config.foreign_pkru = foreign_pkru
        self.config.mxcsr_mask = mxcsr_mask
        self.config.software = software
        if foreign_pkru and (xcomp_bv or ragged):
            raise ValueError("foreign_pkru: got compacted results, needed the standard format")
        if foreign_pkru and target.slots.offset[9] % 8:
            raise ValueError(
                f"target: got PKRU at {target.slots.offset[9]}, needed a multiple of 8"
            )

    def convert(
        self, cnp.ndarray src, cnp.ndarray out, cnp.ndarray lost=None, cnp.ndarray pkru=None
    ):
        """Convert `src` into `out`, row by row.

        Returns
        -------
        int
            Components that `out` could not hold or `src` does not hold, of all rows; `lost`,
            (n,) uint64, receives them row by row.
        """
        cdef Rows r, w
        cdef Job job
        rows(&r, src, "src", False)
        rows(&w, out, "out", True)
        check_pair(&r, "src", &w, "out")
        fill_job(&job, &r, &w)
        if (
            job.ahead and not job.stream and not self.config.ragged and w.stride == w.size
            and (<size_t>w.data | <size_t>w.stride) & 7 == 0
        ):
            job.stream = True  # rows that share lines
        if lost is not None:
            job.lost = <uint64_t *>vector(lost, "lost", cnp.NPY_UINT64, r.n)
        if (pkru is not None) != self.config.foreign_pkru:
            raise ValueError("pkru: needed with foreign_pkru, and only then")
        if pkru is not None:
            job.pkru = <uint32_t *>vector(pkru, "pkru", cnp.NPY_UINT32, r.n)
        job.cache = acquire(self, r.size, w.size, True)
        if job.cache == NULL:
            raise MemoryError
        if r.n * r.size < SMALL:
            convert_rows(&job)
        else:
            with nogil:
                convert_rows(&job)
        release(self, job.cache, True)
        if job.no_memory:
            raise MemoryError
        return job.failed


cdef class Merger(Plans):
    """Copy the components in XSTATE_BV and `mask` into areas; all their other bytes stay.

    XSTATE_BV becomes (old & ~mask) | (source & mask); the targets' XCOMP_BV says where their
    components lie.

    Parameters
    ----------
    source, target : Table
    mask : int
    mxcsr : bool, optional
        Whether MXCSR comes over. Default: if x87, SSE or AVX does.
    user_xfeatures, mxcsr_mask : int, optional
        Validate the source as KVM_SET_XSAVE does: a row with a fault is left alone.
    """

    def __init__(
        self, Table source not None, Table target not None, uint64_t mask, *, mxcsr=None,
        user_xfeatures=None, uint32_t mxcsr_mask=0,
    ):
        self.config.merge = True
        self.config.src = source.slots
        self.config.dst = target.slots
        self.config.mask = mask
        self.config.mxcsr = -1 if mxcsr is None else bool(mxcsr)
        self.config.mxcsr_mask = mxcsr_mask
        self.config.validate = user_xfeatures is not None
        if self.config.validate:
            self.config.user_xfeatures = user_xfeatures

    def merge(self, cnp.ndarray src, cnp.ndarray into, cnp.ndarray status=None):
        """Merge `src` into `into`, row by row.

        Returns
        -------
        int
            `xfast.xsave.area.UabiFault` codes of all rows, combined by or; `status`, (n,) uint32,
            receives them row by row.
        """
        cdef Rows r, w
        cdef Job job
        rows(&r, src, "src", False)
        rows(&w, into, "into", True)
        check_pair(&r, "src", &w, "into")
        fill_job(&job, &r, &w)
        if status is not None:
            job.status = <uint32_t *>vector(status, "status", cnp.NPY_UINT32, r.n)
        job.cache = acquire(self, r.size, w.size, True)
        if job.cache == NULL:
            raise MemoryError
        if r.n * r.size < SMALL:
            merge_rows(&job)
        else:
            with nogil:
                merge_rows(&job)
        release(self, job.cache, True)
        if job.no_memory:
            raise MemoryError
        return job.failed


def swap(
    Merger save not None, Merger load not None, cnp.ndarray registers, cnp.ndarray leave,
    cnp.ndarray enter, cnp.ndarray lost,
):
    """Merge `registers` into `leave`, then `enter` into `registers`, row by row.

    A row in which a component has no place is left alone; `lost`, (n,) uint64, names it.
    Return the components lost of all rows.
    """
    cdef Rows live, old, new
    cdef Job out, into
    rows(&live, registers, "registers", True)
    rows(&old, leave, "leave", True)
    rows(&new, enter, "enter", False)
    check_pair(&live, "registers", &old, "leave")
    check_pair(&new, "enter", &live, "registers")
    check_pair(&new, "enter", &old, "leave")
    fill_job(&out, &live, &old)
    fill_job(&into, &new, &live)
    out.lost = <uint64_t *>vector(lost, "lost", cnp.NPY_UINT64, live.n)
    out.cache = acquire(save, live.size, old.size, True)
    into.cache = acquire(load, new.size, live.size, True)
    if out.cache == NULL or into.cache == NULL:
        out.no_memory = True
    else:
        with nogil:
            loops.swap(&out, &into)
    if out.cache:
        release(save, out.cache, True)
    if into.cache:
        release(load, into.cache, True)
    if out.no_memory:
        raise MemoryError
    return out.failed


cdef uint64_t convert_one(
    Converter how, const uint8_t *src, Py_ssize_t src_size, uint8_t *dst, Py_ssize_t dst_size
) noexcept nogil:
    """Write one whole area; not for a Converter with foreign PKRU."""
    cdef Rows r = Rows(<uint8_t *>src, 1, src_size, src_size)
    cdef Rows w = Rows(dst, 1, dst_size, dst_size)
    cdef Job job
    fill_job(&job, &r, &w)
    job.cache = acquire(how, src_size, dst_size, False)
    if job.cache == NULL:
        return bit(63)
    convert_rows(&job)
    release(how, job.cache, False)
    return bit(63) if job.no_memory else job.failed


cdef uint64_t merge_one(
    Merger how, const uint8_t *src, Py_ssize_t src_size, uint8_t *dst, Py_ssize_t dst_size
) noexcept nogil:
    """Copy what is present into one area; return the `xfast.xsave.area.UabiFault` code."""
    cdef Rows r = Rows(<uint8_t *>src, 1, src_size, src_size)
    cdef Rows w = Rows(dst, 1, dst_size, dst_size)
    cdef Job job
    fill_job(&job, &r, &w)
    job.cache = acquire(how, src_size, dst_size, False)
    if job.cache == NULL:
        return bit(63)
    merge_rows(&job)
    release(how, job.cache, False)
    return bit(63) if job.no_memory else job.failed
