"""One XSAVE area: its fixed offsets, and where its components lie.

*Source*: Intel SDM vol. 1 section 13.4.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:  # as in `xfast.xsave.features`, `Audit` and `UabiFault`; a test compares them
    PAGE = 4096
    LEGACY = 512
    EXTENDED = 576
    COMPONENTS = 64
    FP = 1
    SSE = 2
    AVX = 4
    PKRU = 1 << 9
    PKRU_SIZE = 4  # the rest of component 9 is padding
    FCW_INIT = 0x37F
    MXCSR_INIT = 0x1F80
    PKRU_DEFAULT = 0x55555554

cdef enum:
    AUDIT_XSTATE_BV = 1
    AUDIT_XCOMP_BV = 2
    AUDIT_RESERVED = 4
    AUDIT_MXCSR = 8

cdef enum:
    FAULT_XSTATE_BV = 1
    FAULT_XCOMP_BV = 2
    FAULT_RESERVED = 3
    FAULT_MXCSR = 4
    FAULT_STORAGE = 5

cdef struct Slots:
    # A layout as the loops read it; `offset` is that of the standard format, 0: none.
    uint32_t size[COMPONENTS]
    uint32_t offset[COMPONENTS]
    uint64_t overlap[COMPONENTS]
    uint64_t shared  # components that overlap another
    uint64_t ragged  # components that do not fill their last line
    uint64_t known
    uint64_t align64

cdef struct Place:
    # Where the components of one area lie; `found`: those that lie inside the row.
    uint64_t bv
    uint64_t xcomp
    uint64_t found
    uint32_t offset[COMPONENTS]

cdef struct Facts:
    # All that a judgement reads from one area; 64 bytes without padding, compared as such.
    # `xfast.xsave.area.FACTS` is the same for numpy.
    uint64_t xstate_bv
    uint64_t xcomp_bv
    uint64_t inuse
    uint64_t default
    uint64_t stale
    uint64_t unreadable
    uint32_t mxcsr
    uint32_t pkru  # 0 where XSTATE_BV has no PKRU, or its place can't be read
    uint64_t reserved  # 1: one of the header's reserved bytes is not 0


cdef inline uint64_t load64(const uint8_t *p) noexcept nogil:
    cdef uint64_t v
    memcpy(&v, p, 8)
    return v


cdef inline uint32_t load32(const uint8_t *p) noexcept nogil:
    cdef uint32_t v
    memcpy(&v, p, 4)
    return v


cdef inline uint16_t load16(const uint8_t *p) noexcept nogil:
    cdef uint16_t v
    memcpy(&v, p, 2)
    return v


cdef inline void store64(uint8_t *p, uint64_t v) noexcept nogil:
    memcpy(p, &v, 8)


cdef inline void store32(uint8_t *p, uint32_t v) noexcept nogil:
    memcpy(p, &v, 4)


cdef extern from *:
    int __builtin_ctzll(unsigned long long) nogil


cdef inline int take_lowest(uint64_t *mask) noexcept nogil:
    """Return the number of the lowest bit set, and clear it."""
    cdef int i = __builtin_ctzll(mask[0])
    mask[0] &= mask[0] - 1
    return i


cdef inline uint64_t bit(int i) noexcept nogil:
    return <uint64_t>1 << i


cdef inline bint is_compacted(uint64_t xcomp) noexcept nogil:
    return xcomp >> 63 != 0


cdef inline bint has_mxcsr(uint64_t bv, uint64_t xcomp) noexcept nogil:
    """MXCSR belongs to SSE, and in the standard format to AVX as well."""
    return bv & (SSE if is_compacted(xcomp) else SSE | AVX) != 0


cdef inline void place(
    const Slots *slots, uint64_t bv, uint64_t xcomp, Py_ssize_t size, Place *at
) noexcept nogil:
    """Find every component that the area's format gives a place inside `size` bytes."""
    cdef uint64_t rest, position = EXTENDED
    cdef int i
    at.bv = bv
    at.xcomp = xcomp
    at.found = FP | SSE
    rest = xcomp & ~bit(63) if is_compacted(xcomp) else slots.known
    rest &= ~<uint64_t>(FP | SSE)
    while rest:
        i = take_lowest(&rest)
        if not slots.known & bit(i):
            break  # a compacted area: what follows an unknown component can't be placed
        if is_compacted(xcomp):
            if slots.align64 & bit(i):
                position = (position + 63) & ~<uint64_t>63
            at.offset[i] = <uint32_t>position
            position += slots.size[i]
        elif slots.offset[i] == 0:
            continue
        else:
            at.offset[i] = slots.offset[i]
        if <uint64_t>at.offset[i] + slots.size[i] <= <uint64_t>size:
            at.found |= bit(i)


cdef inline void locate(
    const Slots *slots, const uint8_t *area, Py_ssize_t size, Place *at
) noexcept nogil:
    """`place` for the area's own header; quick where `at` comes from one of the same format."""
    cdef uint64_t xcomp = load64(area + LEGACY + 8)
    if at.found == 0 or at.xcomp != xcomp:
        place(slots, 0, xcomp, size, at)
    at.bv = load64(area + LEGACY)
