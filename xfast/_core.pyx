# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, binding=False, embedsignature=False
"""The engine: every loop over XSAVE areas. Imports nothing of xfast and holds no policy.

Two floors: ``noexcept nogil`` functions on one area, and batch loops above them over the rows
of a 2-D uint8 array with any row stride. Loops report into arrays; shapes and types are
checked, and errors raised, before the GIL is released and before a byte is written.

*Source*: Intel SDM vol. 1 chapter 13; Linux arch/x86/kernel/fpu/xstate.c.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

cimport numpy as cnp

cnp.import_array()

cdef enum:
    LEGACY = 512
    EXTENDED = 576
    COMPONENTS = 64

cdef uint64_t COMPACTED = <uint64_t>1 << 63
cdef uint64_t FP = 1
cdef uint64_t SSE = 2
cdef uint64_t AVX = 4
cdef uint64_t PKRU = 1 << 9
cdef uint32_t MXCSR_INIT = 0x1F80
cdef uint32_t PKRU_DEFAULT = 0x55555554


cdef class Table:
    """A layout as the loops read it.

    Parameters
    ----------
    slots : iterable of (nr, size, offset, supervisor, align64, ...)
        Extended components, as in `xfast.layout.Slot`.
    """

    cdef uint32_t size[COMPONENTS]
    cdef uint32_t offset[COMPONENTS]
    cdef uint64_t overlap[COMPONENTS]
    cdef uint64_t known
    cdef uint64_t align64

    def __cinit__(self, slots):
        cdef int i, j
        memset(self.size, 0, sizeof(self.size))
        memset(self.offset, 0, sizeof(self.offset))
        memset(self.overlap, 0, sizeof(self.overlap))
        self.known = FP | SSE
        self.align64 = 0
        for slot in slots:
            i = slot[0]
            if not 2 <= i <= 62:
                raise ValueError(f"slots: got component {i}, needed 2 to 62")
            self.size[i] = slot[1]
            self.offset[i] = slot[2]
            self.known |= <uint64_t>1 << i
            if slot[4]:
                self.align64 |= <uint64_t>1 << i
        for i in range(2, 63):
            for j in range(2, 63):
                if (
                    i != j and self.offset[i] and self.offset[j]
                    and self.offset[i] < self.offset[j] + self.size[j]
                    and self.offset[j] < self.offset[i] + self.size[i]
                ):
                    self.overlap[i] |= <uint64_t>1 << j


cdef struct Place:
    # Where the components of one area lie; 0: not to be found inside the row.
    uint64_t bv
    uint64_t xcomp
    uint64_t found
    uint32_t offset[COMPONENTS]


cdef inline uint64_t load64(const uint8_t *p) noexcept nogil:
    cdef uint64_t v
    memcpy(&v, p, 8)
    return v


cdef inline uint32_t load32(const uint8_t *p) noexcept nogil:
    cdef uint32_t v
    memcpy(&v, p, 4)
    return v


cdef inline void store64(uint8_t *p, uint64_t v) noexcept nogil:
    memcpy(p, &v, 8)


cdef inline void store32(uint8_t *p, uint32_t v) noexcept nogil:
    memcpy(p, &v, 4)


cdef inline int lowest(uint64_t mask) noexcept nogil:
    cdef int i = 0
    while not mask & 1:
        mask >>= 1
        i += 1
    return i


cdef void place(
    Table t, uint64_t bv, uint64_t xcomp, Py_ssize_t size, Place *at
) noexcept nogil:
    """Find every component that the area's format gives a place inside `size` bytes."""
    cdef uint64_t rest, bit
    cdef uint64_t position = EXTENDED
    cdef int i
    at.bv = bv
    at.xcomp = xcomp
    at.found = FP | SSE
    rest = (xcomp & ~COMPACTED if xcomp & COMPACTED else t.known) & ~<uint64_t>3
    while rest:
        i = lowest(rest)
        bit = <uint64_t>1 << i
        rest ^= bit
        if not t.known & bit:
            break  # a compacted area: what follows an unknown component can't be placed
        if xcomp & COMPACTED:
            if t.align64 & bit:
                position = (position + 63) & ~<uint64_t>63
            at.offset[i] = <uint32_t>position
            position += t.size[i]
        elif t.offset[i] == 0:
            continue
        else:
            at.offset[i] = t.offset[i]
        if <uint64_t>at.offset[i] + t.size[i] <= <uint64_t>size:
            at.found |= bit


cdef inline bint has_mxcsr(const Place *at) noexcept nogil:
    """MXCSR belongs to SSE, and in the standard format to AVX as well."""
    return at.bv & (SSE if at.xcomp & COMPACTED else SSE | AVX) != 0


cdef inline bint nonzero(const uint8_t *p, Py_ssize_t n) noexcept nogil:
    cdef uint64_t acc = 0
    cdef Py_ssize_t i = 0
    while i + 8 <= n:
        acc |= load64(p + i)
        i += 8
    while i < n:
        acc |= p[i]
        i += 1
    return acc != 0


cdef inline bint x87_in_use(const uint8_t *row, bint clear) noexcept nogil:
    """Whether the x87 bytes differ from their init value; a `clear` one may also be all zero."""
    cdef int i
    cdef uint32_t fcw = load32(row) & 0xFFFF
    if fcw != 0x37F and not (clear and fcw == 0):
        return True
    if nonzero(row + 2, 3) or nonzero(row + 6, 18):
        return True
    for i in range(8):
        if nonzero(row + 32 + 16 * i, 10):
            return True
    return False


def headers(
    cnp.ndarray areas, cnp.ndarray xstate_bv, cnp.ndarray xcomp_bv, cnp.ndarray mxcsr,
    cnp.ndarray reserved,
):
    """Read XSTATE_BV, XCOMP_BV, MXCSR and whether reserved header bytes are set, a row each."""
    cdef Py_ssize_t n, size, stride, i
    cdef uint8_t *row = rows(areas, "areas", EXTENDED, False, &n, &size, &stride)
    cdef uint64_t *bv = <uint64_t *>vector(xstate_bv, "xstate_bv", cnp.NPY_UINT64, n)
    cdef uint64_t *xcomp = <uint64_t *>vector(xcomp_bv, "xcomp_bv", cnp.NPY_UINT64, n)
    cdef uint32_t *mx = <uint32_t *>vector(mxcsr, "mxcsr", cnp.NPY_UINT32, n)
    cdef uint8_t *dirty = <uint8_t *>vector(reserved, "reserved", cnp.NPY_BOOL, n)
    with nogil:
        for i in range(n):
            bv[i] = load64(row + LEGACY)
            xcomp[i] = load64(row + LEGACY + 8)
            mx[i] = load32(row + 24)
            dirty[i] = nonzero(row + LEGACY + 16, 48)
            row += stride


def classify(
    cnp.ndarray areas, Table table, cnp.ndarray inuse, cnp.ndarray default, cnp.ndarray stale,
    cnp.ndarray unreadable,
):
    """Compare every component with its init value; results are masks, a row each.

    `inuse`: XSTATE_BV bit set, and the data are not the init value. `default`: of those, PKRU
    with Linux's default value. `stale`: bit clear, and yet other than init data lie there.
    `unreadable`: bit set, and the component is not in the layout or not inside the row.
    """
    cdef Py_ssize_t n, size, stride, i
    cdef uint8_t *row = rows(areas, "areas", EXTENDED, False, &n, &size, &stride)
    cdef uint64_t *used = <uint64_t *>vector(inuse, "inuse", cnp.NPY_UINT64, n)
    cdef uint64_t *usual = <uint64_t *>vector(default, "default", cnp.NPY_UINT64, n)
    cdef uint64_t *left = <uint64_t *>vector(stale, "stale", cnp.NPY_UINT64, n)
    cdef uint64_t *lost = <uint64_t *>vector(unreadable, "unreadable", cnp.NPY_UINT64, n)
    cdef Place at
    cdef uint64_t rest, bit, data
    cdef uint32_t csr
    cdef int c
    with nogil:
        for i in range(n):
            place(table, load64(row + LEGACY), load64(row + LEGACY + 8), size, &at)
            data = FP if x87_in_use(row, not at.bv & FP) else 0
            if nonzero(row + 160, 256):
                data |= SSE
            csr = load32(row + 24)
            if csr != MXCSR_INIT and (csr or has_mxcsr(&at)):
                data |= AVX if at.bv & (SSE | AVX) == AVX and has_mxcsr(&at) else SSE
            rest = at.found & ~<uint64_t>3
            while rest:
                c = lowest(rest)
                bit = <uint64_t>1 << c
                rest ^= bit
                if nonzero(row + at.offset[c], 4 if c == 9 else table.size[c]):
                    if at.bv & bit or at.xcomp & COMPACTED or not table.overlap[c] & at.bv:
                        data |= bit
            used[i] = data & at.bv
            left[i] = data & ~at.bv
            lost[i] = at.bv & ~at.found
            usual[i] = 0
            if data & at.bv & PKRU and load32(row + at.offset[9]) == PKRU_DEFAULT:
                usual[i] = PKRU
            row += stride


def xinuse(cnp.ndarray areas, Table table, bint early, cnp.ndarray inuse):
    """Find the components whose bytes differ from their init value; MXCSR takes no part.

    `early`: look only at components in XSTATE_BV.
    """
    cdef Py_ssize_t n, size, stride, i
    cdef uint8_t *row = rows(areas, "areas", EXTENDED, False, &n, &size, &stride)
    cdef uint64_t *used = <uint64_t *>vector(inuse, "inuse", cnp.NPY_UINT64, n)
    cdef Place at
    cdef uint64_t rest, bit, data
    cdef int c
    with nogil:
        for i in range(n):
            place(table, load64(row + LEGACY), load64(row + LEGACY + 8), size, &at)
            rest = at.found & (at.bv if early else ~<uint64_t>0)
            data = 0
            if rest & FP and x87_in_use(row, not at.bv & FP):
                data = FP
            if rest & SSE and nonzero(row + 160, 256):
                data |= SSE
            rest &= ~<uint64_t>3
            while rest:
                c = lowest(rest)
                bit = <uint64_t>1 << c
                rest ^= bit
                if nonzero(row + at.offset[c], 4 if c == 9 else table.size[c]):
                    if at.bv & bit or at.xcomp & COMPACTED or not table.overlap[c] & at.bv:
                        data |= bit
            used[i] = data
            row += stride


cdef inline void scrub_one(
    uint8_t *row, Table t, const Place *at, uint64_t drop, uint64_t kept
) noexcept nogil:
    """Give dropped components their init value, and leave the bytes of kept ones alone."""
    cdef uint64_t rest, bit
    cdef int c
    if drop & FP:
        memset(row, 0, 24)
        row[0] = 0x7F
        row[1] = 0x03
        memset(row + 32, 0, 128)
    if drop & SSE:
        memset(row + 160, 0, 256)
    if drop & (SSE | AVX) and not kept & (SSE if at.xcomp & COMPACTED else SSE | AVX):
        store32(row + 24, MXCSR_INIT)
    rest = drop & at.found & ~<uint64_t>3
    while rest:
        c = lowest(rest)
        bit = <uint64_t>1 << c
        rest ^= bit
        if at.xcomp & COMPACTED or not t.overlap[c] & kept:
            memset(row + at.offset[c], 0, t.size[c])


def keep(cnp.ndarray areas, Table table, uint64_t mask, bint scrub, cnp.ndarray dropped):
    """Clear the XSTATE_BV bits outside `mask` in place; `scrub` wipes their data as well."""
    cdef Py_ssize_t n, size, stride, i
    cdef uint8_t *row = rows(areas, "areas", EXTENDED, True, &n, &size, &stride)
    cdef uint64_t *drop = <uint64_t *>vector(dropped, "dropped", cnp.NPY_UINT64, n)
    cdef Place at
    cdef uint64_t bv
    with nogil:
        for i in range(n):
            bv = load64(row + LEGACY)
            drop[i] = bv & ~mask
            if drop[i]:
                store64(row + LEGACY, bv & mask)
                if scrub:
                    place(table, bv, load64(row + LEGACY + 8), size, &at)
                    scrub_one(row, table, &at, drop[i], bv & mask)
            row += stride


cdef inline uint64_t relayout_one(
    const uint8_t *src, Py_ssize_t src_size, Table st, uint8_t *dst, Py_ssize_t dst_size,
    Table dt, uint64_t mask, uint64_t xcomp, uint32_t mxcsr_mask, uint64_t software,
    bint kernel,
) noexcept nogil:
    """Write every byte of one area; return the components that could not be brought over."""
    cdef Place at, to
    cdef uint64_t rest, bit, want
    cdef uint32_t size
    cdef int c
    place(st, load64(src + LEGACY), load64(src + LEGACY + 8), src_size, &at)
    place(dt, at.bv, xcomp, dst_size, &to)
    want = at.bv & mask
    rest = want & at.found & to.found
    if xcomp == COMPACTED:  # ragged: only what is there gets a place
        place(dt, at.bv, xcomp | rest, dst_size, &to)
        rest &= to.found
        xcomp |= rest
    elif xcomp & COMPACTED:
        rest &= xcomp
    memset(dst, 0, dst_size)
    if rest & FP:
        memcpy(dst, src, 24)
        memcpy(dst + 32, src + 32, 128)
    else:
        dst[0] = 0x7F
        dst[1] = 0x03
    if rest & (SSE | AVX) and (kernel or has_mxcsr(&at)):
        memcpy(dst + 24, src + 24, 8)
    else:
        store32(dst + 24, MXCSR_INIT)
        store32(dst + 28, mxcsr_mask)
    if rest & SSE:
        memcpy(dst + 160, src + 160, 256)
    store64(dst + 464, software)
    store64(dst + LEGACY, rest)
    store64(dst + LEGACY + 8, xcomp)
    want &= ~rest
    rest &= ~<uint64_t>3
    while rest:
        c = lowest(rest)
        bit = <uint64_t>1 << c
        rest ^= bit
        size = min(st.size[c], dt.size[c])
        memcpy(dst + to.offset[c], src + at.offset[c], size)
    return want


def relayout(
    cnp.ndarray src, Table src_table, cnp.ndarray out, Table out_table, uint64_t mask,
    uint64_t xcomp_bv, uint32_t mxcsr_mask, uint64_t software, cnp.ndarray lost,
    bint kernel=False, cnp.ndarray pkru=None,
):
    """Copy the components in XSTATE_BV and `mask` into areas of another layout or format.

    Every byte of every `out` row is written; absent components get their init value. With
    `xcomp_bv` 0 the rows come out in standard format. `lost` receives the components that
    `out` can't hold or `src` does not hold. `kernel`: MXCSR comes from the area with SSE or
    AVX, whatever its format. `pkru`: values to write in place of the areas' own.
    """
    cdef Py_ssize_t n, size, stride, m, out_size, out_stride, i
    cdef uint8_t *row = rows(src, "src", EXTENDED, False, &n, &size, &stride)
    cdef uint8_t *to = rows(out, "out", EXTENDED, True, &m, &out_size, &out_stride)
    cdef uint64_t *left = <uint64_t *>vector(lost, "lost", cnp.NPY_UINT64, n)
    cdef uint32_t *value = NULL
    cdef uint8_t *slot
    if m != n:
        raise ValueError(f"out: got {m} areas, needed {n}, as many as src")
    if pkru is not None:
        value = <uint32_t *>vector(pkru, "pkru", cnp.NPY_UINT32, n)
    with nogil:
        for i in range(n):
            left[i] = relayout_one(
                row, size, src_table, to, out_size, out_table, mask, xcomp_bv, mxcsr_mask, software,
                kernel,
            )
            if value and load64(to + LEGACY) & PKRU:
                slot = to + out_table.offset[9]
                memset(slot, 0, out_table.size[9])
                store32(slot, value[i])
            row += stride
            to += out_stride


cdef inline uint64_t diff_one(
    const uint8_t *a, const Place *p, Table ta, const uint8_t *b, const Place *q,
    Table tb
) noexcept nogil:
    """Compare by value: a clear bit is the init value, whatever bytes lie there."""
    cdef uint64_t rest, bit, out = 0, both = p.bv & q.bv
    cdef uint64_t unread = (p.bv & ~p.found) | (q.bv & ~q.found)
    cdef uint32_t mxa, mxb, n
    cdef int c
    if both & FP:
        if memcmp(a, b, 24) or memcmp(a + 32, b + 32, 128):
            out |= FP
    elif (p.bv & FP and x87_in_use(a, False)) or (q.bv & FP and x87_in_use(b, False)):
        out |= FP
    mxa = load32(a + 24) if has_mxcsr(p) else MXCSR_INIT
    mxb = load32(b + 24) if has_mxcsr(q) else MXCSR_INIT
    if mxa != mxb:
        out |= SSE
    if both & SSE:
        if memcmp(a + 160, b + 160, 256):
            out |= SSE
    elif (p.bv & SSE and nonzero(a + 160, 256)) or (q.bv & SSE and nonzero(b + 160, 256)):
        out |= SSE
    rest = (p.bv | q.bv) & ~unread & ~<uint64_t>3
    while rest:
        c = lowest(rest)
        bit = <uint64_t>1 << c
        rest ^= bit
        if both & bit:
            n = 4 if c == 9 else min(ta.size[c], tb.size[c])
            if memcmp(a + p.offset[c], b + q.offset[c], n):
                out |= bit
        elif p.bv & bit:
            if nonzero(a + p.offset[c], 4 if c == 9 else ta.size[c]):
                out |= bit
        elif nonzero(b + q.offset[c], 4 if c == 9 else tb.size[c]):
            out |= bit
    return out | unread


def diff(
    cnp.ndarray one, Table one_table, cnp.ndarray two, Table two_table, cnp.ndarray differing
):
    """Find the components whose values differ, row by row; what can't be read differs."""
    cdef Py_ssize_t n, size, stride, m, size2, stride2, i
    cdef uint8_t *a = rows(one, "one", EXTENDED, False, &n, &size, &stride)
    cdef uint8_t *b = rows(two, "two", EXTENDED, False, &m, &size2, &stride2)
    cdef uint64_t *mask = <uint64_t *>vector(differing, "differing", cnp.NPY_UINT64, n)
    cdef Place p, q
    if m != n:
        raise ValueError(f"two: got {m} areas, needed {n}, as many as one")
    with nogil:
        for i in range(n):
            place(one_table, load64(a + LEGACY), load64(a + LEGACY + 8), size, &p)
            place(two_table, load64(b + LEGACY), load64(b + LEGACY + 8), size2, &q)
            mask[i] = diff_one(a, &p, one_table, b, &q, two_table)
            a += stride
            b += stride2


cdef inline uint64_t merge_one(
    const uint8_t *src, const Place *at, Table st, uint8_t *dst, const Place *to, Table dt,
    uint64_t mask, bint mxcsr
) noexcept nogil:
    """Copy the components in XSTATE_BV and `mask`; every other byte of `dst` stays."""
    cdef uint64_t bit, rest = at.bv & mask
    cdef int c
    if rest & ~(at.found & to.found):
        return rest & ~(at.found & to.found)
    if rest & FP:
        memcpy(dst, src, 24)
        memcpy(dst + 32, src + 32, 128)
    if mxcsr:
        memcpy(dst + 24, src + 24, 8)
    if rest & SSE:
        memcpy(dst + 160, src + 160, 256)
    store64(dst + LEGACY, (to.bv & ~mask) | rest)
    rest &= ~<uint64_t>3
    while rest:
        c = lowest(rest)
        bit = <uint64_t>1 << c
        rest ^= bit
        memcpy(dst + to.offset[c], src + at.offset[c], min(st.size[c], dt.size[c]))
    return 0


def set_uabi(
    cnp.ndarray uabi, Table table, cnp.ndarray into, Table into_table, uint64_t user_xfeatures,
    uint32_t mxcsr_mask, uint64_t supervisor, cnp.ndarray status,
):
    """Validate standard-format areas and copy them into kernel images, row by row.

    `status` receives `xfast.area.UabiFault` codes; a row with a fault leaves `into` alone.
    """
    cdef Py_ssize_t n, size, stride, m, into_size, into_stride, i
    cdef uint8_t *row = rows(uabi, "uabi", EXTENDED, False, &n, &size, &stride)
    cdef uint8_t *to = rows(into, "into", EXTENDED, True, &m, &into_size, &into_stride)
    cdef uint32_t *fault = <uint32_t *>vector(status, "status", cnp.NPY_UINT32, n)
    cdef Place at, dst
    if m != n:
        raise ValueError(f"into: got {m} areas, needed {n}, as many as uabi")
    with nogil:
        for i in range(n):
            place(table, load64(row + LEGACY), 0, size, &at)
            place(into_table, load64(to + LEGACY), load64(to + LEGACY + 8), into_size, &dst)
            if at.bv & ~user_xfeatures:
                fault[i] = 1
            elif load64(row + LEGACY + 8):
                fault[i] = 2
            elif nonzero(row + LEGACY + 16, 48):
                fault[i] = 3
            elif at.bv & (FP | SSE | AVX) and load32(row + 24) & ~mxcsr_mask:
                fault[i] = 4
            else:
                fault[i] = 5 if merge_one(
                    row, &at, table, to, &dst, into_table, ~supervisor,
                    at.bv & (FP | SSE | AVX) != 0,
                ) else 0
            row += stride
            to += into_stride


def swap(
    cnp.ndarray registers, Table table, cnp.ndarray leave, Table leave_table, uint64_t save_mask,
    cnp.ndarray enter, Table enter_table, uint64_t restore_mask, cnp.ndarray lost,
):
    """Save `registers` into `leave` under a mask, then load `enter` under another, row by row.

    A row whose components one of the areas can't hold is left alone, and `lost` names them.
    """
    cdef Py_ssize_t n, size, stride, m, out_size, out_stride, k, in_size, in_stride, i
    cdef uint8_t *row = rows(registers, "registers", EXTENDED, True, &n, &size, &stride)
    cdef uint8_t *out = rows(leave, "leave", EXTENDED, True, &m, &out_size, &out_stride)
    cdef uint8_t *load = rows(enter, "enter", EXTENDED, False, &k, &in_size, &in_stride)
    cdef uint64_t *left = <uint64_t *>vector(lost, "lost", cnp.NPY_UINT64, n)
    cdef Place live, old, new
    if m != n or k != n:
        raise ValueError(f"leave, enter: got {m} and {k} areas, needed {n}, as many as registers")
    with nogil:
        for i in range(n):
            place(table, load64(row + LEGACY), 0, size, &live)
            place(leave_table, load64(out + LEGACY), load64(out + LEGACY + 8), out_size, &old)
            place(enter_table, load64(load + LEGACY), load64(load + LEGACY + 8), in_size, &new)
            left[i] = live.bv & save_mask & ~(live.found & old.found)
            left[i] |= new.bv & restore_mask & ~(new.found & live.found)
            if not left[i]:
                merge_one(
                    row, &live, table, out, &old, leave_table, save_mask,
                    save_mask & (SSE | AVX) != 0,
                )
                merge_one(
                    load, &new, enter_table, row, &live, table, restore_mask,
                    restore_mask & (SSE | AVX) != 0,
                )
            row += stride
            out += out_stride
            load += in_stride


def audit(cnp.ndarray areas, uint64_t mask, uint32_t mxcsr_mask, cnp.ndarray status):
    """Check header and MXCSR of every area; `status` receives `xfast.area.Audit` flags."""
    cdef Py_ssize_t n, size, stride, i
    cdef uint8_t *row = rows(areas, "areas", EXTENDED, False, &n, &size, &stride)
    cdef uint8_t *flags = <uint8_t *>vector(status, "status", cnp.NPY_UINT8, n)
    cdef uint64_t bv
    with nogil:
        for i in range(n):
            bv = load64(row + LEGACY)
            flags[i] = (
                (bv & ~mask != 0) | (load64(row + LEGACY + 8) != 0) << 1
                | nonzero(row + LEGACY + 16, 48) << 2
                | (bv & (FP | SSE | AVX) and load32(row + 24) & ~mxcsr_mask) << 3
            )
            row += stride


cdef uint8_t *rows(
    cnp.ndarray array, str name, Py_ssize_t least, bint writes, Py_ssize_t *n, Py_ssize_t *size,
    Py_ssize_t *stride,
) except NULL:
    """Check a 2-D array of areas and hand out its rows."""
    if cnp.PyArray_TYPE(array) != cnp.NPY_UINT8:
        raise ValueError(f"{name}: got dtype {array.dtype}, needed uint8")
    if cnp.PyArray_NDIM(array) != 2:
        raise ValueError(f"{name}: got {cnp.PyArray_NDIM(array)} dimensions, needed 2 (n, size)")
    n[0] = cnp.PyArray_DIM(array, 0)
    size[0] = cnp.PyArray_DIM(array, 1)
    stride[0] = cnp.PyArray_STRIDE(array, 0)
    if size[0] < least:
        raise ValueError(f"{name}: got rows of {size[0]} bytes, needed {least} or more")
    if cnp.PyArray_STRIDE(array, 1) != 1:
        raise ValueError(
            f"{name}: got a byte stride of {cnp.PyArray_STRIDE(array, 1)}, needed 1 inside a row"
        )
    if writes:
        if not cnp.PyArray_ISWRITEABLE(array):
            raise ValueError(f"{name}: got a read-only array, needed a writable one")
        if n[0] > 1 and -size[0] < stride[0] < size[0]:
            raise ValueError(
                f"{name}: got a row stride of {stride[0]}, needed {size[0]} or more: "
                "rows may not overlap"
            )
    return <uint8_t *>cnp.PyArray_DATA(array)


cdef void *vector(cnp.ndarray array, str name, int typenum, Py_ssize_t n) except NULL:
    """Check a contiguous, writable result array of length `n`."""
    if (
        cnp.PyArray_TYPE(array) != typenum or cnp.PyArray_NDIM(array) != 1
        or not cnp.PyArray_IS_C_CONTIGUOUS(array) or not cnp.PyArray_ISWRITEABLE(array)
    ):
        raise ValueError(f"{name}: got {array.dtype} {cnp.PyArray_NDIM(array)}-D, needed a "
                         "contiguous, writable 1-D array of the documented type")
    if cnp.PyArray_DIM(array, 0) != n:
        raise ValueError(f"{name}: got {cnp.PyArray_DIM(array, 0)} values, needed {n}")
    return cnp.PyArray_DATA(array)
