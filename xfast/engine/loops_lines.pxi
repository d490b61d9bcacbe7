# Runs of lines and bytes: copied, zeroed, looked at. Part of `loops.pxi`.


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
    """Copy a run, the odd lines last: few branches, and none that depends on another.

    In portable C nothing goes past the caches. Far from them, lines written one after the other to
    the end of each row cost less than calls of memcpy; with holes between, it is the reverse.
    """
    if PORTABLE and not stream:
        memcpy(dst, src, <size_t>lines * LINE)
        return
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
    if PORTABLE and not stream:
        memset(dst, 0, <size_t>lines * LINE)
        return
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


cdef inline line_t any_of(const uint8_t *p, uint32_t lines, Py_ssize_t ahead) noexcept nogil:
    """Combine lines by or. Each asks for the one `ahead` bytes on, unless that is 0."""
    cdef line_t any = line_zero()
    while lines >= 4:
        if ahead:
            prefetch_far(p + ahead)
            prefetch_far(p + ahead + LINE)
            prefetch_far(p + ahead + 2 * LINE)
            prefetch_far(p + ahead + 3 * LINE)
        any = line_or(any, line_or(line_load(p), line_load(p + LINE)))
        any = line_or(any, line_or(line_load(p + 2 * LINE), line_load(p + 3 * LINE)))
        p += 4 * LINE
        lines -= 4
    while lines:
        if ahead:
            prefetch_far(p + ahead)
        any = line_or(any, line_load(p))
        p += LINE
        lines -= 1
    return any


cdef inline bint nonzero(
    const uint8_t *p, uint32_t n, bint early, Py_ssize_t ahead
) noexcept nogil:
    """Whether one of `n` bytes is not 0; `early`: read no further than needed."""
    cdef line_t any = line_zero()
    cdef uint64_t rest = 0
    if not early:
        any = any_of(p, n // LINE, ahead)
        p += n // LINE * LINE
        n %= LINE
    while n >= LINE:
        any = line_load(p)
        if line_any(any):
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


cdef inline line_t difference(
    const uint8_t *a, const uint8_t *b, uint32_t lines, Py_ssize_t ahead
) noexcept nogil:
    """Combine what lines differ in; they are read to the end, in order, as prefetchers like it.

    Each asks for the one `ahead` bytes on, unless that is 0.
    """
    cdef line_t any = line_zero()
    cdef line_t more = line_zero()
    while lines >= 2:
        if ahead:
            prefetch_far(a + ahead)
            prefetch_far(b + ahead)
            prefetch_far(a + ahead + LINE)
            prefetch_far(b + ahead + LINE)
        any = line_or(any, line_xor(line_load(a), line_load(b)))
        more = line_or(more, line_xor(line_load(a + LINE), line_load(b + LINE)))
        a += 2 * LINE
        b += 2 * LINE
        lines -= 2
    if lines:
        if ahead:
            prefetch_far(a + ahead)
            prefetch_far(b + ahead)
        any = line_or(any, line_xor(line_load(a), line_load(b)))
    return line_or(any, more)


cdef inline bint differ(
    const uint8_t *a, const uint8_t *b, uint32_t n, Py_ssize_t ahead
) noexcept nogil:
    """Whether `n` bytes differ."""
    cdef uint32_t lines = n // LINE
    cdef bint out = line_any(difference(a, b, lines, ahead))
    n %= LINE
    return out | (n != 0 and memcmp(a + lines * LINE, b + lines * LINE, n) != 0)


cdef inline void fetch(
    const uint8_t *row, const Range *ranges, uint32_t n, bint pace
) noexcept nogil:
    """Fetch the lines of some ranges; `pace`: not all at once, see `line_later`."""
    cdef const uint8_t *line
    cdef uint32_t i, _j
    for i in range(n):
        line = row + ranges[i].start
        for _j in range(ranges[i].lines):
            prefetch_far(line)
            line = line_later(line) if pace else line + LINE
