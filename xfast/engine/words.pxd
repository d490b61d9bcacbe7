"""Words that are copied with their bytes in reverse order, and where they lie."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from *:
    """
    #define swapped16(x) __builtin_bswap16(x)
    #define swapped32(x) __builtin_bswap32(x)
    #define swapped64(x) __builtin_bswap64(x)
    """
    uint16_t swapped16(uint16_t word) nogil
    uint32_t swapped32(uint32_t word) nogil
    uint64_t swapped64(uint64_t word) nogil

cdef struct Run:
    # As rows of int32: where it begins, its bytes, those of a word, and where it goes.
    int32_t start, length, unit, target

cdef struct Number:
    int32_t start, length


cdef inline void swap_words(
    const uint8_t* source, uint8_t* to, Py_ssize_t length, Py_ssize_t unit
) noexcept nogil:
    """Copy `length` bytes, words of `unit` (1, 2, 4 or 8) of them."""
    cdef Py_ssize_t k
    cdef uint16_t word16
    cdef uint32_t word32
    cdef uint64_t word64
    if unit == 1:
        memcpy(to, source, length)
    elif unit == 2:
        for k in range(0, length, 2):
            memcpy(&word16, source + k, 2)
            word16 = swapped16(word16)
            memcpy(to + k, &word16, 2)
    elif unit == 4:
        for k in range(0, length, 4):
            memcpy(&word32, source + k, 4)
            word32 = swapped32(word32)
            memcpy(to + k, &word32, 4)
    else:
        for k in range(0, length, 8):
            memcpy(&word64, source + k, 8)
            word64 = swapped64(word64)
            memcpy(to + k, &word64, 8)
