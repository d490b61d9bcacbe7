# Trimming areas in place. Part of `loops.pxi`.


cdef inline void scrub_one(
    uint8_t *row, const Place *at, const Slots *slots, uint64_t drop, uint64_t kept, bint stream
) noexcept nogil:
    """Give dropped components their init value, and leave the bytes of kept ones alone.

    A kept component that reaches beyond the row has none: what lies in its place is wiped.
    """
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
        if not is_compacted(at.xcomp) and slots.overlap[c] & kept & at.found:
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
    if not scan.scrub:
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
