# The loops over rows: nothing here touches Python. Compiled once for each instruction set.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from cpython.pycapsule cimport PyCapsule_New

from xfast._area cimport (
    AVX, COMPONENTS, EXTENDED, FCW_INIT, FP, LEGACY, MXCSR_INIT, PKRU, PKRU_DEFAULT, PKRU_SIZE,
    SSE, Place, Slots, bit, compacted, has_mxcsr, load16, load32, load64, locate, store32, store64,
    take_lowest,
)
from xfast._loops cimport Loops, Scan
from xfast._plan cimport (
    CARRY, COPY, PACKED, PART, PATCH, RING, ZERO, Blend, Job, Plan, Range, Step, find,
)
from xfast._simd cimport (
    LINE, line_and, line_any, line_copy_part, line_load, line_merge, line_or, line_store,
    line_store_part, line_stream, line_t, line_xor, line_zero, prefetch_far, stream_fence,
)

cdef enum:
    HEADERS_AHEAD = 24  # rows by which a header is fetched before its row is planned
    AUDIT_AHEAD = 64  # rows whose two lines an audit fetches ahead
    KEEP_AHEAD = 32  # the same where little else of a row is touched
    PAGE = 4096  # bytes by which a comparison fetches ahead
    HOLE = 512  # bytes between rows that a scan does not skip
    LEGACY_LINES = 0x7F  # one bit each: those with x87 and XMM registers
    SSE_LINES = 0x38  # those of which XMM registers are all


# --- runs of lines --------------------------------------------------------------------------


cdef inline void put(uint8_t *dst, line_t line, bint stream) noexcept nogil:
    if stream:
        line_stream(dst, line)
    else:
        line_store(dst, line)


cdef inline void copy_few(
    uint8_t *dst, const uint8_t *src, uint32_t lines, bint stream
) noexcept nogil:
    """Copy 1, 2 or 4 lines: `lines` is a constant."""
    cdef line_t line[4]
    cdef uint32_t i
    for i in range(lines):
        line[i] = line_load(src + i * LINE)
    for i in range(lines):
        put(dst + i * LINE, line[i], stream)


cdef inline void copy_lines(
    uint8_t *dst, const uint8_t *src, uint32_t lines, bint stream
) noexcept nogil:
    """Copy a run, the odd lines last: few branches, and none that depends on another."""
    while lines >= 8:
        copy_few(dst, src, 4, stream)
        copy_few(dst + 4 * LINE, src + 4 * LINE, 4, stream)
        src += 8 * LINE
        dst += 8 * LINE
        lines -= 8
    if lines & 4:
        copy_few(dst, src, 4, stream)
        src += 4 * LINE
        dst += 4 * LINE
    if lines & 2:
        copy_few(dst, src, 2, stream)
        src += 2 * LINE
        dst += 2 * LINE
    if lines & 1:
        copy_few(dst, src, 1, stream)


cdef inline void zero_few(uint8_t *dst, uint32_t lines, bint stream) noexcept nogil:
    cdef uint32_t i
    for i in range(lines):
        put(dst + i * LINE, line_zero(), stream)


cdef inline void zero_lines(uint8_t *dst, uint32_t lines, bint stream) noexcept nogil:
    while lines >= 8:
        zero_few(dst, 8, stream)
        dst += 8 * LINE
        lines -= 8
    if lines & 4:
        zero_few(dst, 4, stream)
        dst += 4 * LINE
    if lines & 2:
        zero_few(dst, 2, stream)
        dst += 2 * LINE
    if lines & 1:
        zero_few(dst, 1, stream)


cdef inline void wipe(uint8_t *dst, uint32_t n, bint stream) noexcept nogil:
    """Zero `n` bytes."""
    cdef uint32_t lines = n // LINE
    if lines:
        zero_lines(dst, lines, stream and <size_t>dst & (LINE - 1) == 0)
    dst += lines * LINE
    n -= lines * LINE
    while n >= 8:
        store64(dst, 0)
        dst += 8
        n -= 8
    while n:
        dst[0] = 0
        dst += 1
        n -= 1


cdef inline bint nonzero(
    const uint8_t *p, uint32_t n, bint early, Py_ssize_t ahead
) noexcept nogil:
    """Whether one of `n` bytes is not 0; `early`: read no further than needed.

    Each line asks for the one `ahead` bytes on, unless that is 0.
    """
    cdef line_t any = line_zero()
    cdef uint64_t rest = 0
    while not early and n >= 4 * LINE:
        if ahead:
            prefetch_far(p + ahead)
            prefetch_far(p + ahead + LINE)
            prefetch_far(p + ahead + 2 * LINE)
            prefetch_far(p + ahead + 3 * LINE)
        any = line_or(any, line_or(line_load(p), line_load(p + LINE)))
        any = line_or(any, line_or(line_load(p + 2 * LINE), line_load(p + 3 * LINE)))
        p += 4 * LINE
        n -= 4 * LINE
    while n >= LINE:
        if ahead:
            prefetch_far(p + ahead)
        any = line_or(any, line_load(p))
        if early and line_any(any):
            return True
        p += LINE
        n -= LINE
    while n >= 8:
        rest |= load64(p)
        p += 8
        n -= 8
    while n:
        rest |= p[0]
        p += 1
        n -= 1
    return (rest != 0) | line_any(any)


cdef inline bint differ(
    const uint8_t *a, const uint8_t *b, uint32_t n, bint stream
) noexcept nogil:
    """Whether `n` bytes differ; lines are read to the end, in order, as prefetchers like it.

    `stream`: each asks for the one a page on, where another row is.
    """
    cdef line_t any = line_zero()
    cdef line_t more = line_zero()
    while n >= 2 * LINE:
        if stream:
            prefetch_far(a + PAGE)
            prefetch_far(b + PAGE)
            prefetch_far(a + PAGE + LINE)
            prefetch_far(b + PAGE + LINE)
        any = line_or(any, line_xor(line_load(a), line_load(b)))
        more = line_or(more, line_xor(line_load(a + LINE), line_load(b + LINE)))
        a += 2 * LINE
        b += 2 * LINE
        n -= 2 * LINE
    if n >= LINE:
        any = line_or(any, line_xor(line_load(a), line_load(b)))
        a += LINE
        b += LINE
        n -= LINE
    return line_any(line_or(any, more)) | (n != 0 and memcmp(a, b, n) != 0)


cdef inline void fetch(const uint8_t *row, const Range *ranges, uint32_t n) noexcept nogil:
    cdef uint32_t i, j
    for i in range(n):
        for j in range(ranges[i].lines):
            prefetch_far(row + ranges[i].start + j * LINE)


# --- following a plan -----------------------------------------------------------------------


cdef inline line_t take(line_t line, const Blend *blend, const uint8_t *src) noexcept nogil:
    """Lay the blend's bytes of the source over a line; there may be none."""
    return line_merge(line, src + blend.src, blend.first, blend.to, blend.whole)


cdef inline void follow(
    const Plan *plan, const uint8_t *src, uint8_t *dst, uint8_t *carry, bint stream
) noexcept nogil:
    """Write one area; `dst` is where its first line begins."""
    cdef line_t line = line_zero()
    cdef const Blend *blend
    cdef const Step *step = plan.step
    cdef uint32_t i
    for i in range(plan.steps):
        if step.kind == COPY:
            copy_lines(dst + step.dst, src + step.src, step.lines, stream)
        elif step.kind == ZERO:
            zero_lines(dst + step.dst, step.lines, stream)
        else:
            blend = plan.blend + step.src
            if step.kind == PATCH:
                put(dst + step.dst, take(line_load(blend.value), blend, src), stream)
            elif step.kind == PART:
                line_copy_part(dst + step.dst, src + blend.src, blend.first, blend.to)
            else:
                if blend.opens:
                    line = line_load(blend.value)
                    if blend.base == CARRY:
                        line = line_or(line, line_load(carry))
                line = take(line, blend, src)
                if blend.carries:
                    line_store(carry, line)
                elif blend.closes and blend.room != LINE:
                    line_store_part(dst + step.dst, line, blend.room)
                elif blend.closes:
                    put(dst + step.dst, line, stream)
        step += 1


cdef inline void set_pkru(Plan *plan, uint32_t value) noexcept nogil:
    if plan.pkru:
        store32(plan.blend[plan.pkru - 1].value + plan.pkru_at, value)


cdef inline uint32_t phase_of(const Job *job, Py_ssize_t i) noexcept nogil:
    return (<size_t>job.dst + i * job.dst_stride) & (LINE - 1)


cdef inline Plan *plan_of(const Job *job, Py_ssize_t i, bint packed) noexcept nogil:
    cdef const uint8_t *row = job.src + i * job.src_stride + LEGACY
    return find(
        job.cache, load64(row), load64(row + 8), PACKED | phase_of(job, i) if packed and i else 0
    )


cdef inline void convert_row(
    Job *job, Py_ssize_t i, Plan *plan, uint8_t *carry, bint stream
) noexcept nogil:
    cdef uint32_t phase = plan.key[2] & (LINE - 1)
    if job.pkru:
        set_pkru(plan, job.pkru[i])
    if job.lost:
        job.lost[i] = plan.lost
    if plan.lost:
        job.failed |= plan.lost
    follow(
        plan, job.src + i * job.src_stride, job.dst + i * job.dst_stride - phase, carry, stream
    )


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
            if job.ahead:
                fetch(job.src + j * job.src_stride, plan.read, plan.reads)
        if i < 0:
            continue
        if packed and i == 0:
            convert_row(job, i, ring[0], carry, False)
            open_carry(job, carry)
        else:
            convert_row(job, i, ring[i & (RING - 1)], carry, True)
    if packed and n > 1:
        close_carry(job, carry)
    stream_fence()


cdef void open_carry(const Job *job, uint8_t *carry) noexcept nogil:
    """Take back the end of row 0, which the first line of row 1 goes on from."""
    cdef uint32_t n = phase_of(job, 1)
    memset(carry, 0, LINE)
    memcpy(carry, job.dst + job.dst_stride - n, n)


cdef void close_carry(const Job *job, const uint8_t *carry) noexcept nogil:
    """Write the end of the last row."""
    cdef uint32_t n = phase_of(job, job.n)
    memcpy(job.dst + job.n * job.dst_stride - n, carry, n)


cdef inline uint32_t fault_of(const Job *job, const uint8_t *row) noexcept nogil:
    """What KVM_SET_XSAVE would object to; codes of `xfast.area.UabiFault`."""
    cdef uint64_t bv = load64(row + LEGACY)
    if bv & ~job.user_xfeatures:
        return 1
    if load64(row + LEGACY + 8):
        return 2
    if line_any(line_merge(line_zero(), row + LEGACY, 16, LINE, True)):
        return 3
    if bv & (FP | SSE | AVX) and load32(row + 24) & ~job.mxcsr_mask:
        return 4
    return 0


cdef inline Plan *merge_plan(const Job *job, Py_ssize_t i) noexcept nogil:
    cdef const uint8_t *src = job.src + i * job.src_stride + LEGACY
    cdef const uint8_t *dst = job.dst + i * job.dst_stride + LEGACY
    return find(job.cache, load64(src), load64(src + 8), load64(dst + 8))


cdef inline void merge_row(Job *job, Py_ssize_t i, const Plan *plan, bint stream) noexcept nogil:
    cdef const uint8_t *src = job.src + i * job.src_stride
    cdef uint8_t *dst = job.dst + i * job.dst_stride
    cdef uint32_t fault = fault_of(job, src) if job.validate else 0
    if plan.lost and not fault:
        fault = 5
    if job.status:
        job.status[i] = fault
    if job.lost:
        job.lost[i] = plan.lost
    if fault:
        job.failed |= fault
        return
    follow(plan, src, dst, dst, stream)
    store64(dst + LEGACY, (load64(dst + LEGACY) & ~job.mask) | plan.stored)


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
            if job.ahead:
                fetch(job.src + j * job.src_stride, plan.read, plan.reads)
                fetch(job.dst + j * job.dst_stride, plan.hold, plan.holds)
        if i < 0:
            continue
        if job.stream:
            merge_row(job, i, ring[i & (RING - 1)], True)
        else:
            merge_row(job, i, ring[i & (RING - 1)], False)
    if job.stream:
        stream_fence()


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


# --- reading and trimming -------------------------------------------------------------------


cdef void audit(const Scan *scan) noexcept nogil:
    """Branch-free, both lines fetched far ahead: this loop is as fast as memory answers."""
    cdef const uint8_t *row = scan.rows
    cdef uint8_t *flags = <uint8_t *>scan.out
    cdef uint64_t mask = scan.mask, bv, reserved
    cdef uint32_t mxcsr_mask = scan.mxcsr_mask
    cdef Py_ssize_t i, n = scan.n, stride = scan.stride
    for i in range(n):
        prefetch_far(row + AUDIT_AHEAD * stride)
        prefetch_far(row + AUDIT_AHEAD * stride + LEGACY)
        bv = load64(row + LEGACY)
        reserved = (
            load64(row + LEGACY + 16) | load64(row + LEGACY + 24) | load64(row + LEGACY + 32)
            | load64(row + LEGACY + 40) | load64(row + LEGACY + 48) | load64(row + LEGACY + 56)
        )
        flags[i] = (
            (bv & ~mask != 0) | (load64(row + LEGACY + 8) != 0) << 1 | (reserved != 0) << 2
            | ((bv & (FP | SSE | AVX) != 0) & (load32(row + 24) & ~mxcsr_mask != 0)) << 3
        )
        row += stride


# Bytes of the first three lines that belong to the x87 registers, FCW left out: it has an
# init value other than 0, byte 5 is reserved, and six bytes of each ST slot are.
cdef uint8_t X87[3 * 64]
cdef uint8_t HALF[64]  # the upper one of a line


cdef void mark_legacy() noexcept:
    cdef int i
    memset(X87, 0, sizeof(X87))
    memset(X87 + 2, 0xFF, 3)
    memset(X87 + 6, 0xFF, 18)
    for i in range(8):
        memset(X87 + 32 + 16 * i, 0xFF, 10)
    memset(HALF, 0, 32)
    memset(HALF + 32, 0xFF, 32)


mark_legacy()


cdef inline bint x87_in_use(const uint8_t *row, bint early) noexcept nogil:
    """Whether an x87 byte other than FCW is not 0; `early`: read no further than needed."""
    cdef line_t any = line_and(line_load(row), line_load(X87))
    if early and line_any(any):
        return True
    any = line_or(any, line_and(line_load(row + LINE), line_load(X87 + LINE)))
    any = line_or(any, line_and(line_load(row + 2 * LINE), line_load(X87 + 2 * LINE)))
    return line_any(any)


cdef inline bint sse_in_use(const uint8_t *row, bint early) noexcept nogil:
    """Whether a byte of the XMM registers is not 0: half a line, three lines, half a line."""
    cdef line_t any = line_and(line_load(row + 2 * LINE), line_load(HALF))
    if early and line_any(any):
        return True
    any = line_or(any, line_or(line_load(row + 3 * LINE), line_load(row + 4 * LINE)))
    any = line_or(any, line_or(line_load(row + 5 * LINE), line_load(row + 6 * LINE - 32)))
    return line_any(any)


cdef inline bint fcw_in_use(const uint8_t *row, bint clear) noexcept nogil:
    """Whether FCW differs from its init value; where x87 is `clear`, from 0 as well."""
    cdef uint32_t fcw = load16(row)
    return (fcw != FCW_INIT) & ((fcw != 0) | (not clear))


cdef struct Dense:
    # Rows that follow each other with few lines between their components: these are read line by
    # line, holes and all, as prefetchers like it, and components asked afterwards.
    uint32_t lines  # of each row, up to 64; 0: go from component to component
    uint64_t xcomp  # of the rows that the rest holds for
    uint64_t whole  # components that own whole lines among them
    uint64_t own[COMPONENTS]  # those lines, one bit each


cdef void plan_dense(const Place *at, const Scan *scan, Dense *dense) noexcept nogil:
    cdef const Slots *slots = scan.slots
    cdef uint64_t rest = at.found & ~<uint64_t>(FP | SSE)
    cdef uint32_t end = EXTENDED
    cdef int c
    dense.lines = 0
    dense.xcomp = at.xcomp
    dense.whole = 0
    if not scan.stream:
        return
    while rest:
        c = take_lowest(&rest)
        end = max(end, at.offset[c] + slots.size[c])
        if (
            slots.size[c] and (at.offset[c] | slots.size[c]) % LINE == 0 and end <= LINE * LINE
        ):
            dense.whole |= bit(c)
            dense.own[c] = (
                ~<uint64_t>0 >> (LINE - slots.size[c] // LINE) << at.offset[c] // LINE
            )
    if end <= LINE * LINE and scan.stride < end + HOLE:
        dense.lines = min((end + LINE - 1) // LINE, <uint32_t>(scan.size // LINE))


cdef inline uint64_t lines_in_use(
    const uint8_t *row, uint32_t lines, Py_ssize_t ahead
) noexcept nogil:
    """One bit for each line that is not all 0."""
    cdef uint64_t bits = 0
    cdef uint32_t i
    for i in range(lines):
        prefetch_far(row + ahead)
        bits |= <uint64_t>line_any(line_load(row)) << i
        row += LINE
    return bits


cdef inline uint64_t lines_that_differ(
    const uint8_t *a, const uint8_t *b, uint32_t lines, Py_ssize_t ahead
) noexcept nogil:
    """One bit for each line in which two rows differ."""
    cdef uint64_t bits = 0
    cdef uint32_t i
    for i in range(lines):
        prefetch_far(a + ahead)
        prefetch_far(b + ahead)
        bits |= <uint64_t>line_any(line_xor(line_load(a), line_load(b))) << i
        a += LINE
        b += LINE
    return bits


cdef inline uint64_t in_lines(
    const Dense *dense, const Place *at, uint64_t bits, uint64_t *rest
) noexcept nogil:
    """Take the components that own whole lines from `rest`; return those with a bit set."""
    cdef uint64_t whole = rest[0] & dense.whole if at.xcomp == dense.xcomp else 0
    cdef uint64_t out = 0
    cdef int c
    rest[0] ^= whole
    while whole:
        c = take_lowest(&whole)
        out |= <uint64_t>(bits & dense.own[c] != 0) << c
    return out


cdef inline uint64_t xinuse_one(
    const uint8_t *row, const Place *at, const Slots *slots, bint early, Py_ssize_t ahead,
    const Dense *dense,
) noexcept nogil:
    """Find the components that are not init; `ahead`: fetch the same lines so many bytes on."""
    cdef uint64_t rest = at.found & at.bv if early else at.found
    cdef uint64_t used = 0, bits = 0
    cdef int c
    if dense != NULL:
        bits = lines_in_use(row, dense.lines, ahead)
        used = in_lines(dense, at, bits, &rest)
        if bits & SSE_LINES:
            rest &= ~<uint64_t>SSE
            used |= SSE & at.found
        ahead = 0
    elif ahead:
        for c in range(EXTENDED // LINE):
            prefetch_far(row + ahead + c * LINE)
    if rest & FP:
        used |= x87_in_use(row, early) | fcw_in_use(row, not at.bv & FP)
    if rest & SSE:
        used |= <uint64_t>sse_in_use(row, early) << 1
    rest &= ~<uint64_t>(FP | SSE)
    while rest:
        c = take_lowest(&rest)
        if c == 9:
            if ahead:
                prefetch_far(row + ahead + at.offset[c])
            used |= <uint64_t>(load32(row + at.offset[c]) != 0) << c
        elif slots.size[c] == LINE:
            if ahead:
                prefetch_far(row + ahead + at.offset[c])
            used |= <uint64_t>line_any(line_load(row + at.offset[c])) << c
        else:
            used |= <uint64_t>nonzero(row + at.offset[c], slots.size[c], early, ahead) << c
    rest = used & ~at.bv & slots.shared
    while rest and not compacted(at.xcomp):  # bytes that are another component's
        c = take_lowest(&rest)
        if slots.overlap[c] & at.bv:
            used &= ~bit(c)
    return used


cdef void classify(const Scan *scan) noexcept nogil:
    """Fill four masks a row: in use, default, stale, unreadable."""
    cdef const uint8_t *row = scan.rows
    cdef uint64_t *used = <uint64_t *>scan.out
    cdef uint64_t *usual = used + scan.n
    cdef uint64_t *stale = usual + scan.n
    cdef uint64_t *unreadable = stale + scan.n
    cdef uint64_t data
    cdef uint32_t csr
    cdef Py_ssize_t i
    cdef Place at
    at.found = 0
    for i in range(scan.n):
        locate(scan.slots, row, scan.size, &at)
        data = xinuse_one(row, &at, scan.slots, False, 0, NULL)
        csr = load32(row + 24)
        if csr != MXCSR_INIT and (csr or has_mxcsr(at.bv, at.xcomp)):
            data |= AVX if has_mxcsr(at.bv, at.xcomp) and not at.bv & SSE else SSE
        used[i] = data & at.bv
        stale[i] = data & ~at.bv
        unreadable[i] = at.bv & ~at.found
        usual[i] = 0
        if used[i] & PKRU and load32(row + at.offset[9]) == PKRU_DEFAULT:
            usual[i] = PKRU
        row += scan.stride


cdef inline void fetch_starts(
    const uint8_t *row, const Place *at, Py_ssize_t ahead
) noexcept nogil:
    """Fetch the first line of each component of a row; its header came when `ahead` was two."""
    cdef uint64_t rest = load64(row + LEGACY) & at.found & ~<uint64_t>(FP | SSE)
    prefetch_far(row + ahead + LEGACY)
    prefetch_far(row)
    prefetch_far(row + 2 * LINE)
    while rest:
        prefetch_far(row + at.offset[take_lowest(&rest)])


cdef void xinuse(const Scan *scan) noexcept nogil:
    cdef const uint8_t *row = scan.rows
    cdef uint64_t *used = <uint64_t *>scan.out
    cdef Py_ssize_t i, ahead
    cdef Dense dense
    cdef Place at
    at.found = 0
    for i in range(scan.n):
        locate(scan.slots, row, scan.size, &at)
        if i == 0:
            plan_dense(&at, scan, &dense)
        ahead = scan.ahead * scan.stride if i + scan.ahead < scan.n else 0
        if not scan.flag and dense.lines:
            used[i] = xinuse_one(row, &at, scan.slots, False, ahead, &dense)
        elif not scan.flag:
            used[i] = xinuse_one(row, &at, scan.slots, False, ahead, NULL)
        else:
            if ahead:
                fetch_starts(row + ahead, &at, ahead)
            used[i] = xinuse_one(row, &at, scan.slots, True, 0, NULL)
        row += scan.stride


cdef inline uint64_t diff_one(
    const uint8_t *a, const Place *p, const Slots *pslots, const uint8_t *b, const Place *q,
    const Slots *qslots, bint stream, uint64_t bits, const Dense *dense,
) noexcept nogil:
    """Compare by value: a clear bit is the init value, whatever bytes lie there.

    `dense`: `bits` tells which lines differ.
    """
    cdef uint64_t unread = (p.bv & ~p.found) | (q.bv & ~q.found)
    cdef uint64_t both = p.bv & q.bv & ~unread
    cdef uint64_t out = unread, legacy = both
    cdef uint64_t rest = both & ~<uint64_t>(FP | SSE)
    cdef uint32_t n
    cdef int c
    if dense != NULL and bits & LEGACY_LINES == 0:
        legacy = 0
    if legacy & FP and (memcmp(a, b, 24) or differ(a + 32, b + 32, 128, stream)):
        out |= FP
    if (load32(a + 24) if has_mxcsr(p.bv, p.xcomp) else MXCSR_INIT) != (
        load32(b + 24) if has_mxcsr(q.bv, q.xcomp) else MXCSR_INIT
    ):
        out |= SSE
    if legacy & SSE and differ(a + 160, b + 160, 256, stream):
        out |= SSE
    if dense != NULL and p.xcomp == q.xcomp:
        out |= in_lines(dense, p, bits, &rest)
    while rest:
        c = take_lowest(&rest)
        n = PKRU_SIZE if c == 9 else min(pslots.size[c], qslots.size[c])
        if differ(a + p.offset[c], b + q.offset[c], n, stream):
            out |= bit(c)
    if p.bv & ~both:
        out |= xinuse_one(a, p, pslots, True, 0, NULL) & ~both
    if q.bv & ~both:
        out |= xinuse_one(b, q, qslots, True, 0, NULL) & ~both
    return out


cdef void diff(const Scan *scan) noexcept nogil:
    cdef const uint8_t *a = scan.rows
    cdef const uint8_t *b = scan.other
    cdef uint64_t *out = <uint64_t *>scan.out
    cdef Place p, q
    cdef Py_ssize_t i
    cdef uint64_t bits
    cdef Dense dense
    p.found = q.found = 0
    for i in range(scan.n):
        locate(scan.slots, a, scan.size, &p)
        locate(scan.other_slots, b, scan.other_size, &q)
        if i == 0:
            plan_dense(&p, scan, &dense)
            if not (
                scan.other_slots == scan.slots and scan.other_size == scan.size
                and scan.other_stride == scan.stride
            ):
                dense.lines = 0
        if dense.lines:
            bits = lines_that_differ(a, b, dense.lines, scan.ahead * scan.stride)
            out[i] = diff_one(a, &p, scan.slots, b, &q, scan.other_slots, False, bits, &dense)
        elif scan.stream:
            out[i] = diff_one(a, &p, scan.slots, b, &q, scan.other_slots, True, 0, NULL)
        else:
            out[i] = diff_one(a, &p, scan.slots, b, &q, scan.other_slots, False, 0, NULL)
        a += scan.stride
        b += scan.other_stride


cdef inline void scrub_one(
    uint8_t *row, const Place *at, const Slots *slots, uint64_t drop, uint64_t kept, bint stream
) noexcept nogil:
    """Give dropped components their init value, and leave the bytes of kept ones alone."""
    cdef uint64_t rest = drop & at.found & ~<uint64_t>(FP | SSE)
    cdef uint32_t start = 0, end = 0
    cdef int c
    if drop & FP:
        memset(row, 0, 24)
        memset(row + 32, 0, 128)
        row[0] = FCW_INIT & 0xFF
        row[1] = FCW_INIT >> 8
    if drop & SSE:
        memset(row + 160, 0, 256)
    if drop & (SSE | AVX) and not has_mxcsr(kept, at.xcomp):
        store32(row + 24, MXCSR_INIT)
    while rest:  # components that lie side by side are wiped at once
        c = take_lowest(&rest)
        if not compacted(at.xcomp) and slots.overlap[c] & kept:
            continue
        if at.offset[c] != end:
            wipe(row + start, end - start, stream)
            start = at.offset[c]
        end = at.offset[c] + slots.size[c]
    wipe(row + start, end - start, stream)


cdef void keep_headers(const Scan *scan) noexcept nogil:
    """Trim headers alone. Few instructions a row: the more rows wait for memory at a time."""
    cdef uint8_t *row = scan.rows
    cdef uint64_t *dropped = <uint64_t *>scan.out
    cdef uint64_t mask = scan.mask, bv
    cdef Py_ssize_t i, n = scan.n, stride = scan.stride
    cdef Py_ssize_t ahead = (KEEP_AHEAD if scan.stream else 0) * stride
    for i in range(n):
        prefetch_far(row + ahead + LEGACY)
        bv = load64(row + LEGACY)
        dropped[i] = bv & ~mask
        if bv & ~mask:
            store64(row + LEGACY, bv & mask)
        row += stride


cdef void keep(const Scan *scan) noexcept nogil:
    cdef uint8_t *row = scan.rows
    cdef uint64_t *dropped = <uint64_t *>scan.out
    cdef const uint8_t *next
    cdef uint64_t rest, mask = scan.mask, bv
    cdef Py_ssize_t i, n = scan.n, stride = scan.stride
    cdef bint stream = scan.stream
    cdef Place at
    if not scan.flag:
        keep_headers(scan)
        return
    at.found = at.xcomp = 0
    for i in range(n):
        if stream and i + KEEP_AHEAD < n:
            next = row + KEEP_AHEAD * stride
            prefetch_far(next + KEEP_AHEAD * stride + LEGACY)
            rest = load64(next + LEGACY) & at.found & scan.slots.ragged & ~mask
            while rest:  # lines of which only a part is wiped have to be read
                prefetch_far(next + at.offset[take_lowest(&rest)])
        bv = load64(row + LEGACY)
        dropped[i] = bv & ~mask
        if bv & ~mask:
            locate(scan.slots, row, scan.size, &at)
            scrub_one(row, &at, scan.slots, bv & ~mask, bv & mask, stream)
            store64(row + LEGACY, bv & mask)
        row += stride
    if stream:
        stream_fence()


# --- the limits of the machine --------------------------------------------------------------


cdef void copy(uint8_t *dst, const uint8_t *src, Py_ssize_t n, bint stream) noexcept nogil:
    """Copy `n` bytes, a multiple of 64; the benchmarks' denominator."""
    if stream:
        copy_lines(dst, src, <uint32_t>(n // LINE), True)
        stream_fence()
    else:
        copy_lines(dst, src, <uint32_t>(n // LINE), False)


cdef bint read(const uint8_t *src, Py_ssize_t n) noexcept nogil:
    """Read `n` bytes; the benchmarks' other denominator."""
    return nonzero(src, <uint32_t>n, False, 0)


cdef uint64_t touch(const uint8_t *row, Py_ssize_t stride, Py_ssize_t n) noexcept nogil:
    """Load from the two lines that an audit needs, fetched as far ahead."""
    cdef uint64_t any = 0
    cdef Py_ssize_t i
    for i in range(n):
        prefetch_far(row + AUDIT_AHEAD * stride)
        prefetch_far(row + AUDIT_AHEAD * stride + LEGACY)
        any |= load64(row) | load64(row + LEGACY)
        row += stride
    return any


cdef Loops LOOPS
LOOPS.convert = convert
LOOPS.merge = merge
LOOPS.swap = swap
LOOPS.audit = audit
LOOPS.classify = classify
LOOPS.xinuse = xinuse
LOOPS.diff = diff
LOOPS.keep = keep
LOOPS.copy = copy
LOOPS.read = read
LOOPS.touch = touch


def loops():
    """Return the table of loops, for `_core`."""
    return PyCapsule_New(&LOOPS, "xfast.loops", NULL)
