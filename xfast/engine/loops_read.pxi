# Reading areas: headers checked, contents classified and compared. Part of `loops.pxi`.


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
            (bv & ~mask != 0) * AUDIT_XSTATE_BV
            | (load64(row + LEGACY + 8) != 0) * AUDIT_XCOMP_BV
            | (reserved != 0) * AUDIT_RESERVED
            | ((bv & (FP | SSE | AVX) != 0) & (load32(row + 24) & ~mxcsr_mask != 0)) * AUDIT_MXCSR
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


cdef struct Run:
    uint32_t lines
    uint64_t of  # components that own each of them whole; FP stands for the legacy region

cdef struct Dense:
    # Rows that follow each other with few lines between their components, or that are to be read
    # whole: run by run, holes and all, as prefetchers like it, and other components afterwards.
    uint32_t runs  # 0: go from component to component
    uint64_t xcomp  # of the rows that the rest holds for
    uint64_t whole  # components that own runs
    Run run[LINE]


cdef void plan_dense(const Place *at, const Scan *scan, Dense *dense) noexcept nogil:
    cdef const Slots *slots = scan.slots
    cdef uint64_t rest = at.found & ~<uint64_t>(FP | SSE)
    cdef uint64_t of[LINE]  # each line's owners
    cdef uint32_t end = EXTENDED, lines = 0
    cdef int c, i
    dense.runs = 0
    dense.xcomp = at.xcomp
    dense.whole = 0
    if not scan.stream:
        return
    for i in range(LINE):
        of[i] = FP if i < LEGACY_LINES else 0
    while rest:
        c = take_lowest(&rest)
        end = max(end, at.offset[c] + slots.size[c])
        if c == 9:
            continue  # of which only four bytes count
        if (
            slots.size[c] and (at.offset[c] | slots.size[c]) % LINE == 0 and end <= LINE * LINE
        ):
            dense.whole |= bit(c)
            for i in range(<int>(slots.size[c] // LINE)):
                of[at.offset[c] // LINE + i] |= bit(c)
    if scan.whole:
        lines = <uint32_t>min(scan.size // LINE, <Py_ssize_t>LINE)
    elif end <= LINE * LINE and scan.stride < end + HOLE:
        lines = min((end + LINE - 1) // LINE, <uint32_t>(scan.size // LINE))
    for i in range(<int>lines):
        if i == 0 or of[i] != of[i - 1]:
            dense.run[dense.runs] = Run(0, of[i])
            dense.runs += 1
        dense.run[dense.runs - 1].lines += 1


cdef inline uint64_t runs_in_use(
    const uint8_t *row, const Dense *dense, Py_ssize_t ahead
) noexcept nogil:
    """Return the owners of the runs that are not all 0.

    One load walks the whole row: AMD's prefetcher goes by the instruction, and four that take turns
    are slower by a tenth. So is a look at the header before its line's turn comes.
    """
    cdef uint64_t used = 0
    cdef line_t any
    cdef uint32_t i, _j
    for i in range(dense.runs):
        any = line_zero()
        for _j in range(dense.run[i].lines):
            if ahead:
                prefetch_far(row + ahead)
            any = line_or(any, line_load(row))
            row += LINE
        used |= dense.run[i].of if line_any(any) else 0
    return used


cdef inline uint64_t runs_that_differ(
    const uint8_t *a, const uint8_t *b, const Dense *dense, Py_ssize_t ahead
) noexcept nogil:
    """Return the owners of the runs in which two rows differ; see `runs_in_use`."""
    cdef uint64_t out = 0
    cdef line_t any
    cdef uint32_t i, _j
    for i in range(dense.runs):
        any = line_zero()
        for _j in range(dense.run[i].lines):
            if ahead:
                prefetch_far(a + ahead)
                prefetch_far(b + ahead)
            any = line_or(any, line_xor(line_load(a), line_load(b)))
            a += LINE
            b += LINE
        out |= dense.run[i].of if line_any(any) else 0
    return out


cdef inline uint64_t told(const Dense *dense, const Place *at, uint64_t *rest) noexcept nogil:
    """Take the components that runs tell about from `rest`, and return them."""
    cdef uint64_t whole = rest[0] & dense.whole if at.xcomp == dense.xcomp else 0
    rest[0] ^= whole
    return whole


cdef inline uint64_t xinuse_one(
    const uint8_t *row, const Place *at, const Slots *slots, bint early, Py_ssize_t ahead,
    uint64_t runs, const Dense *dense,
) noexcept nogil:
    """Find the components that are not init.

    `dense`: `runs` tells the owners of runs that are not 0. Else fetch the same lines `ahead` bytes
    on, unless that is 0.
    """
    cdef uint64_t rest = at.found & at.bv if early else at.found
    cdef uint64_t used = 0
    cdef int c
    if dense != NULL:
        used = runs & told(dense, at, &rest)
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
    while rest and not is_compacted(at.xcomp):  # bytes that are another component's
        c = take_lowest(&rest)
        if slots.overlap[c] & at.bv:
            used &= ~bit(c)
    return used


cdef inline void describe(
    const uint8_t *row, const Place *at, const Slots *slots, Py_ssize_t ahead,
    uint64_t runs, const Dense *dense, Facts *facts,
) noexcept nogil:
    """Fill in all that a judgement reads from one area."""
    cdef uint64_t data = xinuse_one(row, at, slots, False, ahead, runs, dense)
    cdef uint64_t reserved = 0
    cdef uint32_t csr = load32(row + 24)
    cdef int i
    if csr != MXCSR_INIT and (csr or has_mxcsr(at.bv, at.xcomp)):
        data |= AVX if has_mxcsr(at.bv, at.xcomp) and not at.bv & SSE else SSE
    for i in range(16, 64, 8):
        reserved |= load64(row + LEGACY + i)
    facts.xstate_bv = at.bv
    facts.xcomp_bv = at.xcomp
    facts.inuse = data & at.bv
    facts.stale = data & ~at.bv
    facts.unreadable = at.bv & ~at.found
    facts.mxcsr = csr
    facts.pkru = load32(row + at.offset[9]) if at.bv & at.found & PKRU else 0
    facts.default = PKRU if facts.pkru == PKRU_DEFAULT else 0
    facts.reserved = reserved != 0


cdef void classify(const Scan *scan) noexcept nogil:
    """Describe each row: see `Facts`."""
    cdef const uint8_t *row = scan.rows
    cdef Facts *facts = <Facts *>scan.out
    cdef Py_ssize_t i, ahead
    cdef uint64_t runs
    cdef Dense dense
    cdef Place at
    at.found = 0
    for i in range(scan.n):
        if i == 0:
            locate(scan.slots, row, scan.size, &at)
            plan_dense(&at, scan, &dense)
        ahead = scan.ahead * scan.stride if i + scan.ahead < scan.n + scan.beyond else 0
        if dense.runs:
            runs = runs_in_use(row, &dense, ahead)
            locate(scan.slots, row, scan.size, &at)
            describe(row, &at, scan.slots, 0, runs, &dense, &facts[i])
        else:
            locate(scan.slots, row, scan.size, &at)
            describe(row, &at, scan.slots, ahead, 0, NULL, &facts[i])
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
    cdef uint64_t runs
    cdef Dense dense
    cdef Place at
    at.found = 0
    for i in range(scan.n):
        if i == 0:
            locate(scan.slots, row, scan.size, &at)
            plan_dense(&at, scan, &dense)
        ahead = scan.ahead * scan.stride if i + scan.ahead < scan.n else 0
        if dense.runs and not scan.early:
            runs = runs_in_use(row, &dense, ahead)
            locate(scan.slots, row, scan.size, &at)
            used[i] = xinuse_one(row, &at, scan.slots, False, 0, runs, &dense)
        elif not scan.early:
            locate(scan.slots, row, scan.size, &at)
            used[i] = xinuse_one(row, &at, scan.slots, False, ahead, 0, NULL)
        else:
            locate(scan.slots, row, scan.size, &at)
            if ahead:
                fetch_starts(row + ahead, &at, ahead)
            used[i] = xinuse_one(row, &at, scan.slots, True, 0, 0, NULL)
        row += scan.stride


cdef inline uint64_t diff_one(
    const uint8_t *a, const Place *p, const Slots *pslots, const uint8_t *b, const Place *q,
    const Slots *qslots, Py_ssize_t ahead, uint64_t runs, const Dense *dense,
) noexcept nogil:
    """Compare by value: a clear bit is the init value, whatever bytes lie there.

    `dense`: `runs` tells the owners of runs that differ. Else fetch the same lines `ahead` bytes
    on, unless that is 0.
    """
    cdef uint64_t unread = (p.bv & ~p.found) | (q.bv & ~q.found)
    cdef uint64_t both = p.bv & q.bv & ~unread
    cdef uint64_t out = unread, legacy = both
    cdef uint64_t rest = both & ~<uint64_t>(FP | SSE)
    cdef uint32_t n
    cdef int c
    if dense != NULL and not runs & FP:
        legacy = 0
    if legacy & FP and (memcmp(a, b, 24) or differ(a + 32, b + 32, 128, ahead)):
        out |= FP
    if (load32(a + 24) if has_mxcsr(p.bv, p.xcomp) else MXCSR_INIT) != (
        load32(b + 24) if has_mxcsr(q.bv, q.xcomp) else MXCSR_INIT
    ):
        out |= SSE
    if legacy & SSE and differ(a + 160, b + 160, 256, ahead):
        out |= SSE
    if dense != NULL and p.xcomp == q.xcomp:
        out |= runs & told(dense, p, &rest)
    while rest:
        c = take_lowest(&rest)
        n = PKRU_SIZE if c == 9 else min(pslots.size[c], qslots.size[c])
        if differ(a + p.offset[c], b + q.offset[c], n, ahead):
            out |= bit(c)
    if p.bv & ~both:
        out |= xinuse_one(a, p, pslots, True, 0, 0, NULL) & ~both
    if q.bv & ~both:
        out |= xinuse_one(b, q, qslots, True, 0, 0, NULL) & ~both
    return out


cdef void diff(const Scan *scan) noexcept nogil:
    cdef const uint8_t *a = scan.rows
    cdef const uint8_t *b = scan.other
    cdef uint64_t *out = <uint64_t *>scan.out
    cdef Place p, q
    cdef Py_ssize_t i
    cdef uint64_t runs = 0
    cdef Dense dense
    p.found = q.found = 0
    for i in range(scan.n):
        if i == 0:
            locate(scan.slots, a, scan.size, &p)
            plan_dense(&p, scan, &dense)
            if not (
                scan.other_slots == scan.slots and scan.other_size == scan.size
                and scan.other_stride == scan.stride
            ):
                dense.runs = 0
        if dense.runs:
            runs = runs_that_differ(a, b, &dense, scan.ahead * scan.stride)
        locate(scan.slots, a, scan.size, &p)
        locate(scan.other_slots, b, scan.other_size, &q)
        if dense.runs:
            out[i] = diff_one(a, &p, scan.slots, b, &q, scan.other_slots, 0, runs, &dense)
        elif scan.stream:
            out[i] = diff_one(a, &p, scan.slots, b, &q, scan.other_slots, PAGE, 0, NULL)
        else:
            out[i] = diff_one(a, &p, scan.slots, b, &q, scan.other_slots, 0, 0, NULL)
        a += scan.stride
        b += scan.other_stride
