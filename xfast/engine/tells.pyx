"""The few words of an area that tell which layout it is of, for many areas at a time.

They lie in three lines of each. numpy would wait for each line; here they are asked for ahead.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from *:
    void prefetch "__builtin_prefetch" (const void *) nogil

cdef enum:
    AHEAD = 12  # rows
    CONTROL = 24
    SOFTWARE = 464
    HEADER = 512


def words(const uint8_t[:, :] areas, uint64_t[:, ::1] out, uint32_t mxcsr_mask):
    """Put XSTATE_BV, XCOMP_BV, the kernel's word of components, and the rest of what tells.

    The rest is MXCSR_MASK in bits 2 to 33, whether FCW and MXCSR are 0 (bit 1), and whether they
    can be a CPU's (bit 0), of which `mxcsr_mask` has the bits that MXCSR may have.

    Parameters
    ----------
    areas : (n, size) uint8
        Bytes of a row are contiguous.
    out : (n, 4) uint64
    """
    cdef Py_ssize_t i, n = areas.shape[0]
    cdef const uint8_t *row
    cdef uint16_t fcw
    cdef uint32_t control[2]
    if areas.shape[1] < 576 or areas.strides[1] != 1:
        raise ValueError("areas: expected rows of 576 bytes or more, got shorter or scattered ones")
    if out.shape[0] != n or out.shape[1] != 4:
        raise ValueError("out: expected 4 words a row, got another shape")
    with nogil:
        for i in range(n):
            if i + AHEAD < n:
                row = &areas[i + AHEAD, 0]
                prefetch(row)
                prefetch(row + SOFTWARE)
                prefetch(row + HEADER)
            row = &areas[i, 0]
            memcpy(&fcw, row, 2)
            memcpy(control, row + CONTROL, 8)
            memcpy(&out[i, 0], row + HEADER, 16)
            memcpy(&out[i, 2], row + SOFTWARE, 8)
            out[i, 3] = (
                <uint64_t>control[1] << 2
                | <uint64_t>(fcw == 0 and control[0] == 0) << 1
                | (fcw & 0xE0C0 == 0x40 and not control[0] & ~mxcsr_mask)
            )
