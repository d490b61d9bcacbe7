"""A hash table of rows of words, kept in the order in which they came.

The first words of a row are its key; whoever keeps it may count in the others. The hash is
multilinear with secret odd factors, so that no file can be made whose keys all meet in one place.
`keyed` and `width`, the words of a key and of a row, are constants where a table is used: so the
compiler unrolls what goes over them.

*Source*: Lemire, Kaser: Strongly universal string hashing is fast (multilinear hashing).
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy

cdef enum:
    KEYED_MOST = 16  # words of a key
    BITS_MOST = 30  # of a row's number
    SECRET = 8 * KEYED_MOST  # bytes

cdef struct Distinct:
    uint64_t *row  # `width` words each
    uint32_t *slot  # 1 + number of a row, 0: free; a power of two of them
    Py_ssize_t n, room  # rows there are, and rows before the table grows
    int bits  # of a row's number; a slot's has one more
    uint64_t factor[KEYED_MOST]


cdef inline int begin_distinct(Distinct *seen, bytes secret, int width) except -1:
    """Make an empty table of what is all zeros; `secret` is SECRET random bytes."""
    cdef int i
    if len(secret) != SECRET:
        raise ValueError(f"secret: expected {SECRET} bytes, got {len(secret)}")
    memcpy(seen.factor, <const uint8_t *>secret, SECRET)
    for i in range(KEYED_MOST):
        seen.factor[i] |= 1
    return grow_distinct(seen, 0, width)


cdef inline void end_distinct(Distinct *seen) noexcept:
    free(seen.row)
    free(seen.slot)


cdef inline Py_ssize_t place_distinct(
    const Distinct *seen, const uint64_t *key, int keyed, int width
) noexcept nogil:
    """Return the slot of a key: that of its row, or the free one where it belongs."""
    cdef const uint64_t *other
    cdef uint64_t mixed = 0, differs
    cdef Py_ssize_t at, last = 2 * seen.room - 1
    cdef int i
    for i in range(keyed):
        mixed += key[i] * seen.factor[i]
    at = <Py_ssize_t>(mixed >> (63 - seen.bits))
    while seen.slot[at]:
        other = seen.row + (seen.slot[at] - 1) * width
        differs = 0
        for i in range(keyed):
            differs |= key[i] ^ other[i]
        if not differs:
            break
        at = (at + 1) & last
    return at


cdef inline uint64_t *add_distinct(
    Distinct *seen, Py_ssize_t at, const uint64_t *key, int keyed, int width
) except NULL nogil:
    """Put a new key into its free slot; return its row, whose other words are not set."""
    cdef uint64_t *row
    if seen.n == seen.room:
        grow_distinct(seen, keyed, width)
        at = place_distinct(seen, key, keyed, width)
    row = seen.row + seen.n * width
    memcpy(row, key, keyed * sizeof(uint64_t))
    seen.n += 1
    seen.slot[at] = <uint32_t>seen.n
    return row


cdef inline int grow_distinct(Distinct *seen, int keyed, int width) except -1 nogil:
    """Double the room, from 128 rows on; the table is at most half full."""
    cdef int bits = seen.bits + 1 if seen.room else 7
    cdef Py_ssize_t i, room = <Py_ssize_t>1 << bits
    cdef uint32_t *slot
    cdef uint64_t *row
    if bits > BITS_MOST:
        raise MemoryError(f"expected at most 2**{BITS_MOST} different rows, got more")
    row = <uint64_t *>realloc(seen.row, room * width * sizeof(uint64_t))
    if row == NULL:
        raise MemoryError
    seen.row = row
    slot = <uint32_t *>calloc(room, 2 * sizeof(uint32_t))
    if slot == NULL:
        raise MemoryError
    free(seen.slot)
    seen.slot = slot
    seen.bits = bits
    seen.room = room
    for i in range(seen.n):
        slot[place_distinct(seen, row + i * width, keyed, width)] = <uint32_t>(i + 1)
    return 0
