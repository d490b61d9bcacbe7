"""What areas tell that lie in a file's bytes, and what was found out about others like them.

A file holds one area, or a few: an array for each would take longer than all that is asked here.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, uint8_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from xfast._core cimport Table, loops
from xfast.engine.area cimport EXTENDED, Facts, load32
from xfast.engine.loops cimport Scan

cdef enum:
    STEP = 64
    MXCSR_MASK = 28
    SOFTWARE = 464
    HEADER = 512


def same(tuple one not None, tuple other not None) -> bool:
    """Tell whether two tuples hold the same objects, not only equal ones."""
    cdef Py_ssize_t i
    if len(one) != len(other):
        return False
    for i in range(len(one)):
        if one[i] is not other[i]:
            return False
    return True


def alike(bytes data not None, Py_ssize_t one, Py_ssize_t other, bytes runs not None) -> bool:
    """Tell whether runs of bytes at two places of `data` are the same.

    Parameters
    ----------
    data : bytes
    one, other : int
        The two places.
    runs : bytes
        Pairs of int32: where each run begins, counted from either place, and where it ends.

    Raises
    ------
    ValueError
        If one is not all inside.
    """
    cdef const char* at = PyBytes_AS_STRING(data)
    cdef const int32_t* run = <const int32_t*>PyBytes_AS_STRING(runs)
    cdef Py_ssize_t i, room = PyBytes_GET_SIZE(data) - max(one, other)
    for i in range(0, PyBytes_GET_SIZE(runs) // 8 * 2, 2):
        if one < 0 or other < 0 or not 0 <= run[i] <= run[i + 1] <= room:
            raise ValueError(f"runs: expected them in {room} bytes, got {run[i]} to {run[i + 1]}")
        if memcmp(at + one + run[i], at + other + run[i], run[i + 1] - run[i]):
            return False
    return True


cdef const uint8_t* _area(bytes data, Py_ssize_t start, Py_ssize_t size) except NULL:
    """Return where an area lies, all of which is inside."""
    cdef Py_ssize_t n = PyBytes_GET_SIZE(data)
    if size < EXTENDED or start < 0 or start > n - size:
        raise ValueError(f"area: expected 576 of {n} bytes or more, got {size} at {start}")
    return <const uint8_t*>PyBytes_AS_STRING(data) + start


cdef bytes _facts(const uint8_t* area, Py_ssize_t size, Table table):
    """Return what a judgement reads from one area."""
    cdef bytes found = PyBytes_FromStringAndSize(NULL, sizeof(Facts))
    cdef Scan scan
    memset(&scan, 0, sizeof(scan))
    scan.rows = <uint8_t*>area
    scan.size, scan.n, scan.slots = size, 1, &table.slots
    scan.out = PyBytes_AS_STRING(found)
    loops.classify(&scan)
    return found


cdef inline bint _is_filled(const uint8_t* at, const uint8_t* end) noexcept nogil:
    """Tell whether a byte is not zero."""
    cdef uint64_t word, some = 0
    cdef int i
    while at <= end - STEP:
        for i in range(0, STEP, 8):
            memcpy(&word, at + i, 8)
            some |= word
        if some:
            return True
        at += STEP
    while at < end:
        some |= at[0]
        at += 1
    return some != 0


cdef uint64_t _filled(
    const uint8_t* area, Py_ssize_t size, const int32_t* bounds, Py_ssize_t n
) noexcept nogil:
    """Tell which pieces of an area hold anything but zeros: a mask, a bit a piece."""
    cdef Py_ssize_t i, end
    cdef uint64_t mask = 0
    for i in range(n):
        end = min(size, bounds[i + 1]) if i + 1 < n else size
        if bounds[i] < end and _is_filled(area + bounds[i], area + end):
            mask |= <uint64_t>1 << i
    return mask


cdef struct Words:
    # All that an area's layout is told by, besides its components' bytes.
    uint64_t header[2]
    uint64_t software
    uint64_t mask
    uint64_t owner
    uint64_t control


cdef struct Pieces:
    uint64_t size
    uint64_t filled


cdef class Seen:
    """What was worked out for areas, found again for others that are alike in what it rests on.

    That is the header, the kernel's word of components, MXCSR_MASK, an object and a number that
    the caller gives; for some it is also the size, and which pieces of the area are all zeros.

    Parameters
    ----------
    bounds : bytes
        int32 each, at most 64, ascending: where in an area each piece begins. It ends where the
        next one begins, or the area ends.
    limit : int
        How many are kept; where there are more, it begins anew.

    Raises
    ------
    ValueError
        If the bounds are not as they should be.
    """

    cdef dict found
    cdef bytes bounds
    cdef Py_ssize_t limit

    def __init__(self, bytes bounds not None, Py_ssize_t limit):
        cdef Py_ssize_t i, n = PyBytes_GET_SIZE(bounds) // 4
        cdef const int32_t* at = <const int32_t*>PyBytes_AS_STRING(bounds)
        cdef int32_t least = 0
        if n > 64:
            raise ValueError(f"bounds: expected at most 64, got {n}")
        for i in range(n):
            if at[i] < least:
                raise ValueError(f"bounds: expected them ascending, got {at[i]} after {least}")
            least = at[i]
        self.found, self.bounds, self.limit = {}, bounds, limit

    cdef bytes key(self, const uint8_t* area, object owner, uint64_t mask):
        cdef bytes key = PyBytes_FromStringAndSize(NULL, sizeof(Words))
        cdef Words* words = <Words*>PyBytes_AS_STRING(key)
        memcpy(words.header, area + HEADER, 16)
        memcpy(&words.software, area + SOFTWARE, 8)
        words.control = load32(area + MXCSR_MASK)
        words.mask = mask
        words.owner = <uint64_t><void*>owner  # which is kept, so that this stays its own
        return key

    cdef bytes longer(self, const uint8_t* area, Py_ssize_t size, bytes key):
        cdef bytes whole = PyBytes_FromStringAndSize(NULL, sizeof(Words) + sizeof(Pieces))
        cdef Pieces pieces
        pieces.size = size
        pieces.filled = _filled(
            area, size, <const int32_t*>PyBytes_AS_STRING(self.bounds),
            PyBytes_GET_SIZE(self.bounds) // 4,
        )
        memcpy(PyBytes_AS_STRING(whole), PyBytes_AS_STRING(key), sizeof(Words))
        memcpy(PyBytes_AS_STRING(whole) + sizeof(Words), &pieces, sizeof(Pieces))
        return whole

    def find(self, bytes data not None, Py_ssize_t start, Py_ssize_t size, owner, uint64_t mask):
        """Return what was worked out for areas like this one, and this one's own facts.

        Parameters
        ----------
        data : bytes
        start, size : int
            Where in `data` the area lies: 576 bytes or more.
        owner, mask : object, int
            As they were added.

        Returns
        -------
        tuple of object and bytes, or None
            The facts are what a judgement reads from an area (`xfast.xsave.area.facts`).

        Raises
        ------
        ValueError
            If the area is not all inside.
        """
        cdef const uint8_t* area = _area(data, start, size)
        cdef bytes key = self.key(area, owner, mask)
        cdef tuple known = self.found.get(key)
        if known is not None and known[1] is None:
            known = self.found.get(self.longer(area, size, key))
        if known is None:
            return None
        return known[2], _facts(area, size, <Table?>known[1])

    def add(
        self, bytes data not None, Py_ssize_t start, Py_ssize_t size, owner, uint64_t mask,
        bint by_bytes, Table table not None, what,
    ):
        """Keep what was worked out for an area, and all that are like it; return as `find` does.

        Parameters
        ----------
        data, start, size, owner, mask
            As for `find`.
        by_bytes : bool
            Whether it also rests on the size, and on which pieces are all zeros.
        table : Table
            The layout of these areas.
        what : object
        """
        cdef const uint8_t* area = _area(data, start, size)
        cdef bytes key = self.key(area, owner, mask)
        if len(self.found) >= self.limit:
            self.found.clear()
        if by_bytes:
            self.found[key] = owner, None, None
            key = self.longer(area, size, key)
        self.found[key] = owner, table, what
        return what, _facts(area, size, table)

    def clear(self) -> None:
        """Forget all."""
        self.found.clear()
