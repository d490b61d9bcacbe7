"""What areas tell that lie in a file's bytes, as the small values that keys are made of.

A file holds one area, or a few: an array for each would take longer than all that is asked here.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, uint8_t, uint64_t
from libc.string cimport memcpy, memset

from xfast._core cimport Table, loops
from xfast.engine.area cimport EXTENDED, Facts
from xfast.engine.loops cimport Scan

cdef enum:
    STEP = 64


def same(tuple one not None, tuple other not None) -> bool:
    """Tell whether two tuples hold the same objects, not only equal ones."""
    cdef Py_ssize_t i
    if len(one) != len(other):
        return False
    for i in range(len(one)):
        if one[i] is not other[i]:
            return False
    return True


def facts(bytes data not None, Py_ssize_t start, Py_ssize_t size, Table table not None) -> bytes:
    """Return what a judgement reads from one area, as `xfast.xsave.area.facts` does.

    Parameters
    ----------
    data : bytes
    start, size : int
        Where in `data` the area lies: 576 bytes or more.
    table : Table
        Its layout.

    Raises
    ------
    ValueError
        If it is not all inside.
    """
    cdef bytes found = PyBytes_FromStringAndSize(NULL, sizeof(Facts))
    cdef Scan scan
    _check(data, start, size, EXTENDED)
    memset(&scan, 0, sizeof(scan))
    scan.rows = <uint8_t*>PyBytes_AS_STRING(data) + start
    scan.size, scan.n, scan.slots = size, 1, &table.slots
    scan.out = PyBytes_AS_STRING(found)
    loops.classify(&scan)
    return found


cdef int _check(bytes data, Py_ssize_t start, Py_ssize_t size, Py_ssize_t least) except -1:
    cdef Py_ssize_t n = PyBytes_GET_SIZE(data)
    if size < least or start < 0 or start > n - size:
        raise ValueError(f"area: expected {least} of {n} bytes or more, got {size} at {start}")
    return 0


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


def filled(bytes data not None, Py_ssize_t start, Py_ssize_t size, bytes bounds not None) -> int:
    """Tell which pieces of an area hold anything but zeros: a mask, a bit a piece.

    Parameters
    ----------
    data : bytes
    start, size : int
        Where in `data` the area lies.
    bounds : bytes
        int32 each, at most 64, ascending: where in an area each piece begins. It ends where the
        next one begins, or the area ends.

    Raises
    ------
    ValueError
        If the area is not all inside, or the bounds are not as they should be.
    """
    cdef Py_ssize_t i, n = PyBytes_GET_SIZE(bounds) // 4, least = 0
    cdef const uint8_t* at
    cdef int32_t begin, end
    cdef uint64_t mask = 0
    _check(data, start, size, 0)
    if n > 64:
        raise ValueError(f"bounds: expected at most 64, got {n}")
    at = <const uint8_t*>PyBytes_AS_STRING(data) + start
    for i in range(n):
        memcpy(&begin, PyBytes_AS_STRING(bounds) + 4 * i, 4)
        end = 0x7FFFFFFF
        if i + 1 < n:
            memcpy(&end, PyBytes_AS_STRING(bounds) + 4 * i + 4, 4)
        if begin < least or end < begin:
            raise ValueError("bounds: expected them ascending, got others")
        least = begin
        if begin < size and _is_filled(at + begin, at + min(<Py_ssize_t>end, size)):
            mask |= <uint64_t>1 << i
    return mask
