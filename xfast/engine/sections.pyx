"""What the register sections of a migration stream tell, without an area or a vCPU of their own.

The areas of all sections are built side by side in one buffer, which is kept, and described by the
loop that describes every other area; what comes out is a few numbers, and equal for sections that
no judgement can tell apart.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, uint8_t, uint64_t
from libc.string cimport memcpy, memset

cimport numpy as cnp

from xfast._core cimport Table, loops, scan_of
from xfast.engine.area cimport Facts
from xfast.engine.flat cimport flat
from xfast.engine.loops cimport Scan
from xfast.engine.words cimport Number, Run, swap_words

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
    cdef object views  # which hold what the pointers are into
    cdef const Run *run
    cdef const Number *number
    cdef const uint64_t *held
    cdef Py_ssize_t runs, numbers
    cdef uint64_t longer
    cdef Py_ssize_t reach
    cdef cython.pymutex lock

    def __init__(
        self, cnp.ndarray rows not None, Table table not None, runs, numbers, held,
        uint64_t longer,
    ):
        cdef Py_ssize_t i, room = rows.size
        cdef Run run
        cdef Number number
        self.views = memoryview(runs), memoryview(numbers), memoryview(held)
        cdef Py_buffer *of_runs = flat(self.views[0], 2, sizeof(int32_t), False)
        cdef Py_buffer *of_numbers = flat(self.views[1], 2, sizeof(int32_t), False)
        cdef Py_buffer *of_held = flat(self.views[2], 1, sizeof(uint64_t), False)
        self.rows, self.table, self.longer = rows, table, longer
        self.scan = scan_of(rows, "rows", True, table)
        self.run, self.runs = <const Run *>of_runs.buf, of_runs.shape[0]
        self.number, self.numbers = <const Number *>of_numbers.buf, of_numbers.shape[0]
        self.held = <const uint64_t *>of_held.buf
        if not cnp.PyArray_IS_C_CONTIGUOUS(rows) or self.scan.n != of_held.shape[0]:
            raise ValueError("rows: expected one a section, without gaps")
        if of_runs.shape[1] != 4 or of_numbers.shape[1] != 2:
            raise ValueError("runs, numbers: expected 4 and 2 columns")
        if self.numbers != NUMBERS * self.scan.n:
            raise ValueError(f"numbers: expected {NUMBERS} a section, got {self.numbers}")
        for i in range(self.runs):
            run = self.run[i]
            if run.unit not in (1, 2, 4, 8) or run.length <= 0 or run.length % run.unit:
                raise ValueError(f"runs: expected whole words of 1, 2, 4 or 8 bytes, got run {i}")
            if min(run.start, run.target) < 0 or run.target > room - run.length:
                raise ValueError(f"runs: expected them in {room} bytes, got run {i} outside")
            self.reach = max(self.reach, <Py_ssize_t>run.start + run.length)
        for i in range(self.numbers):
            number = self.number[i]
            if (
                number.start < -1 or not 0 <= number.length <= 8
                or (number.start < 0) != (number.length == 0)
            ):
                raise ValueError(f"numbers: expected places and up to 8 bytes, got number {i}")
            self.reach = max(self.reach, <Py_ssize_t>number.start + number.length)

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
        cdef Run run
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
            for k in range(self.number[i].length):
                value = value << 8 | at[self.number[i].start + k]
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
            for i in range(self.runs):
                run = self.run[i]
                swap_words(at + run.start, self.scan.rows + run.target, run.length, run.unit)
            for i in range(n):
                row = self.scan.rows + i * self.scan.stride
                value = number[NUMBERS * i + 1]
                if not kvm:
                    value = (number[NUMBERS * i] | FPSSE) & self.held[i]
                memcpy(row + HEADER, &value, 8)
            self.scan.out = &number[NUMBERS * n]
            loops.classify(&self.scan)
        return key, kvm > 0
