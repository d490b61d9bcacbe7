"""What the register sections of a migration stream tell, without an area or a vCPU of their own.

The areas of all sections are built side by side in one buffer, which is kept, and described by the
loop that describes every other area; what comes out is a few numbers, and equal for sections that
no judgement can tell apart.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy, memset

cimport numpy as cnp

from xfast._core cimport Table, loops, scan_of
from xfast.engine.area cimport Facts
from xfast.engine.loops cimport Scan
from xfast.engine.words cimport swap_words

cnp.import_array()

cdef enum:
    NUMBERS = 5  # of each section: XCR0, XSTATE_BV, and others that only tell
    HEADER = 512
    FPSSE = 3


cdef class Sections:
    """Where sections lie in a stream's end, and their registers in areas; threads take turns.

    Parameters
    ----------
    rows : (n, size) uint8
        Where the areas are built: no one else may use it.
    table : Table
        The areas' layout.
    runs : (k, 4) int32
        Where each run of big-endian words begins, its bytes, those of a word (1, 2, 4 or 8), and
        where it goes in `rows`.
    numbers : (5 n, 2) int32
        Where five numbers of each section begin, and their bytes, up to 8; XCR0 and XSTATE_BV are
        the first two. -1 and 0 for one that is not there.
    held : (n,) uint64
        The components that each section has bytes for.
    longer : int
        The components that end behind a row.

    Raises
    ------
    ValueError
        If a place or length is impossible.
    """

    cdef cnp.ndarray rows
    cdef Table table
    cdef Scan scan
    cdef const int[:, ::1] runs, numbers
    cdef const uint64_t[::1] held
    cdef uint64_t longer
    cdef Py_ssize_t reach
    cdef cython.pymutex lock

    def __init__(self, cnp.ndarray rows not None, Table table not None,
                 const int[:, ::1] runs not None, const int[:, ::1] numbers not None,
                 const uint64_t[::1] held not None, uint64_t longer):
        cdef Py_ssize_t i, start, length, unit, target, room = rows.size
        self.rows, self.table, self.runs, self.numbers = rows, table, runs, numbers
        self.held, self.longer = held, longer
        self.scan = scan_of(rows, "rows", True, table)
        if not cnp.PyArray_IS_C_CONTIGUOUS(rows) or self.scan.n != held.shape[0]:
            raise ValueError("rows: expected one a section, without gaps")
        if runs.shape[1] != 4 or numbers.shape[1] != 2:
            raise ValueError("runs, numbers: expected 4 and 2 columns")
        if numbers.shape[0] != NUMBERS * self.scan.n:
            raise ValueError(f"numbers: expected {NUMBERS} a section, got {numbers.shape[0]}")
        for i in range(runs.shape[0]):
            start, length, unit, target = runs[i, 0], runs[i, 1], runs[i, 2], runs[i, 3]
            if unit not in (1, 2, 4, 8) or length <= 0 or length % unit:
                raise ValueError(f"runs: expected whole words of 1, 2, 4 or 8 bytes, got run {i}")
            if min(start, target) < 0 or target > room - length:
                raise ValueError(f"runs: expected them in {room} bytes, got run {i} outside")
            self.reach = max(self.reach, start + length)
        for i in range(numbers.shape[0]):
            start, length = numbers[i, 0], numbers[i, 1]
            if start < -1 or not 0 <= length <= 8 or (start < 0) != (length == 0):
                raise ValueError(f"numbers: expected places and up to 8 bytes, got number {i}")
            self.reach = max(self.reach, start + length)

    def key(self, bytes data not None, Py_ssize_t first, int kvm):
        """Tell what is in sections, places counted from `first` of `data`.

        Parameters
        ----------
        data : bytes
        first : int
        kvm : int
            Whether KVM wrote them: 1, 0, or -1 for that an XSTATE_BV other than 0 tells it.

        Returns
        -------
        tuple of bytes or None, bool
            The numbers, and each area's facts; None where they are not all inside of `data`, or
            an area would be longer than a row. And whether KVM wrote them.

        Where KVM did not, an area's XSTATE_BV is what XCR0 enables of what the section holds.
        """
        cdef Py_ssize_t i, k, n = self.scan.n
        cdef const uint8_t* at
        cdef uint8_t* row
        cdef uint64_t* number
        cdef uint64_t value
        cdef bytes key
        if first < 0 or first > PyBytes_GET_SIZE(data) - self.reach:
            return None, kvm > 0
        at = <const uint8_t*>PyBytes_AS_STRING(data) + first
        key = PyBytes_FromStringAndSize(NULL, n * (8 * NUMBERS + sizeof(Facts)))
        number = <uint64_t*>PyBytes_AS_STRING(key)
        for i in range(NUMBERS * n):
            value = 0
            for k in range(self.numbers[i, 1]):
                value = value << 8 | at[self.numbers[i, 0] + k]
            number[i] = value
        if kvm < 0:
            kvm = 0
            for i in range(n):
                kvm |= number[NUMBERS * i + 1] != 0
        if kvm:
            for i in range(n):
                if number[NUMBERS * i + 1] & ~self.held[i] & self.longer:
                    return None, True
        with self.lock:
            memset(self.scan.rows, 0, n * self.scan.size)
            for i in range(self.runs.shape[0]):
                swap_words(
                    at + self.runs[i, 0], self.scan.rows + self.runs[i, 3], self.runs[i, 1],
                    self.runs[i, 2],
                )
            for i in range(n):
                row = self.scan.rows + i * self.scan.stride
                value = number[NUMBERS * i + 1]
                if not kvm:
                    value = (number[NUMBERS * i] | FPSSE) & self.held[i]
                memcpy(row + HEADER, &value, 8)
            self.scan.out = &number[NUMBERS * n]
            loops.classify(&self.scan)
        return key, kvm > 0
