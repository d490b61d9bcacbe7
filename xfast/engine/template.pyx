"""Texts that differ from one another in numbers alone: one, where its numbers lie, a follower.

What is equal is compared and not parsed; a number that differs is parsed and put where the
text's own would go. Any other difference is left to the caller.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, uint8_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from xfast.engine.flat cimport flat

cdef enum:
    PAGE = 2048
    BLOCK = 64
    DIGITS = 20  # of 2^64


cdef uint64_t MOST = 0xFFFFFFFFFFFFFFFE


cdef inline Py_ssize_t _alike(
    const uint8_t* one, const uint8_t* other, Py_ssize_t n
) noexcept nogil:
    """Return how many bytes are the same, up to `n`."""
    cdef Py_ssize_t i = 0
    while i <= n - PAGE and memcmp(one + i, other + i, PAGE) == 0:
        i += PAGE
    while i <= n - BLOCK and memcmp(one + i, other + i, BLOCK) == 0:
        i += BLOCK
    while i < n and one[i] == other[i]:
        i += 1
    return i


cdef struct Slot:
    int32_t start, end  # in the text
    int32_t width, target  # of its value; -1: it goes nowhere


cdef class Template:
    """A text in which certain numbers may be others.

    Parameters
    ----------
    text : bytes
    slots : (n, 4) int32
        Of each number, in their order: its start and end in the text; how many bytes it has as a
        value (1, 2, 4 or 8); and where it goes in the values, -1 if nowhere.
    size : int
        Bytes of the values.

    Raises
    ------
    ValueError
        If the slots are not numbers in the text, apart from each other, or go beyond `size`.
    """

    cdef readonly bytes text
    cdef readonly bytes values
    cdef object view  # which holds what the slots are in
    cdef const Slot *slot
    cdef Py_ssize_t slots

    def __init__(self, bytes text not None, slots, Py_ssize_t size):
        cdef Py_ssize_t i, before = -1, n = PyBytes_GET_SIZE(text)
        cdef const uint8_t* at = <const uint8_t*>PyBytes_AS_STRING(text)
        cdef char* to
        cdef const Slot *slot
        self.view = memoryview(slots)
        cdef Py_buffer *given = flat(self.view, 2, sizeof(int32_t), False)
        if given.shape[1] != 4 or size < 0:
            raise ValueError(f"slots: expected 4 columns, got {given.shape[1]}")
        self.text, self.slot, self.slots = text, <const Slot *>given.buf, given.shape[0]
        self.values = PyBytes_FromStringAndSize(NULL, size)  # with bytes, one byte would be shared
        to = PyBytes_AS_STRING(self.values)
        memset(to, 0, size)
        for i in range(self.slots):
            slot = self.slot + i
            if (
                not before < slot.start < slot.end < n
                or slot.width not in (1, 2, 4, 8)
                or slot.target < -1
                or 0 <= slot.target and slot.target > size - slot.width
                or _put(at, slot.start, n, slot, to) != slot.end
            ):
                raise ValueError(f"slots: expected numbers in the text, got another slot {i}")
            before = slot.end

    def follow(self, bytes data not None):
        """Return the values of another text: of its numbers where they differ; None if others do.

        A number that differs has no leading zero, and is below 2^64 - 1 and what its bytes hold.
        """
        cdef Py_ssize_t n = PyBytes_GET_SIZE(self.text), m = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t i = 0, j = 0, run, low = 0, high, middle, count = self.slots
        cdef const uint8_t* ours = <const uint8_t*>PyBytes_AS_STRING(self.text)
        cdef const uint8_t* theirs = <const uint8_t*>PyBytes_AS_STRING(data)
        cdef bytes values = PyBytes_FromStringAndSize(NULL, PyBytes_GET_SIZE(self.values))
        cdef char* to = PyBytes_AS_STRING(values)
        memcpy(to, PyBytes_AS_STRING(self.values), PyBytes_GET_SIZE(values))
        while True:
            run = _alike(ours + i, theirs + j, min(n - i, m - j))
            i += run
            j += run
            if i == n:
                return values if j == m else None
            high = count
            while low < high:  # the first slot that ends here or later
                middle = (low + high) // 2
                if self.slot[middle].end < i:
                    low = middle + 1
                else:
                    high = middle
            if low == count or self.slot[low].start > i:
                return None
            j = _put(theirs, j - (i - self.slot[low].start), m, self.slot + low, to)
            if j < 0:
                return None
            i = self.slot[low].end
            low += 1


cdef Py_ssize_t _put(
    const uint8_t* at, Py_ssize_t i, Py_ssize_t n, const Slot *slot, char* values
) noexcept:
    """Put the number at `i` where its slot says; return where it ends, or -1 if it does not fit."""
    cdef Py_ssize_t first = i
    cdef uint64_t value = 0, digit
    cdef int32_t width = slot.width
    while i < n and 48 <= at[i] <= 57:
        digit = at[i] - 48
        if i - first >= DIGITS or value > (MOST - digit) // 10:
            return -1
        value = 10 * value + digit
        i += 1
    if i == first or at[first] == 48 and i > first + 1 or width < 8 and value >> 8 * width:
        return -1
    if slot.target >= 0:
        memcpy(values + slot.target, &value, width)  # little-endian, as the values are
    return i
