"""The engine: layouts in C, the checks of what comes in, and the loops that read areas.

Holds no policy and imports nothing of xfast but its own loops, compiled for several
instruction sets; the widest that the CPU has is taken, or the one that XFAST_ISA names
(plain, baseline, avx2, avx512). Shapes and types are checked, and errors raised, before the
GIL is released and before a byte is written.

*Source*: Intel SDM vol. 1 chapter 13; Linux arch/x86/kernel/fpu/xstate.c.
"""

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

cimport numpy as cnp

from xfast.engine.area cimport EXTENDED, FP, LEGACY, PAGE, SSE, Facts, Slots, bit, load32, load64
from xfast.engine.loops cimport Loops, Scan
from xfast.engine.cache cimport RING
from xfast.engine.plan cimport DENSE
from xfast.engine.simd cimport LINE
from xfast.engine.trial cimport (
    SLICE, UNKNOWN, Trial, begin, end, force, next_way, note, now, untried,
)

from importlib import import_module

from xfast.engine.isa import ISAS, chosen  # no-cython-lint: ISAS is for importers

cnp.import_array()

ISA = chosen()
loops = <const Loops *>PyCapsule_GetPointer(
    import_module(f"xfast.engine.loops_{ISA}").loops(), "xfast.loops"
)


def tune(Py_ssize_t stream_above_, int rows_ahead_, int whole_rows):
    """Set from how many bytes on a batch bypasses the caches, and how it fetches ahead.

    A negative number leaves a setting as it is. `whole_rows`: 0 no, 1 yes, 2 measure (again).
    """
    global stream_above, rows_ahead
    cdef int i
    if stream_above_ >= 0:
        stream_above = stream_above_
    if rows_ahead_ >= 0:
        rows_ahead = min(rows_ahead_, RING - 1)
    if whole_rows >= 0:
        for i in range(TRIALS):
            force(&trials[i], UNKNOWN if whole_rows == 2 else whole_rows)


tune(16 << 20, 4, 2)


def whole_rows():
    """Return for each kind of batch whether it fetches whole rows; -1: not measured yet."""
    names = (
        "convert", "merge", "classify", "classify pages", "xinuse", "xinuse pages", "diff",
        "diff pages",
    )
    return {name: trials[i].choice for i, name in enumerate(names)}


cdef class Table:
    """A layout as the loops read it.

    Parameters
    ----------
    slots : iterable of (nr, size, offset, supervisor, align64, ...)
        Extended components, as in `xfast.xsave.layout.Slot`.
    """

    def __cinit__(self, slots):
        cdef Slots *s = &self.slots
        cdef int i, j
        memset(s, 0, sizeof(Slots))
        s.known = FP | SSE
        for slot in slots:
            i = slot[0]
            if not 2 <= i <= 62:
                raise ValueError(f"slots: expected components 2 to 62, got {i}")
            s.size[i] = slot[1]
            s.offset[i] = slot[2]
            s.known |= bit(i)
            if s.size[i] % 64:
                s.ragged |= bit(i)
            if slot[4]:
                s.align64 |= bit(i)
        for i in range(2, 63):
            for j in range(2, 63):
                if (
                    i != j and s.offset[i] and s.offset[j]
                    and s.offset[i] < s.offset[j] + s.size[j]
                    and s.offset[j] < s.offset[i] + s.size[i]
                ):
                    s.overlap[i] |= bit(j)
                    s.shared |= bit(i)


# --- one area -------------------------------------------------------------------------------


cdef inline Scan scan_one(const uint8_t *area, Py_ssize_t size, void *out) noexcept nogil:
    cdef Scan scan
    memset(&scan, 0, sizeof(scan))
    scan.rows = <uint8_t *>area
    scan.size = size
    scan.n = 1
    scan.out = out
    return scan


cdef uint32_t audit_one(
    const uint8_t *area, Py_ssize_t size, uint64_t mask, uint32_t mxcsr_mask
) noexcept nogil:
    """Return `xfast.xsave.area.Audit` flags."""
    cdef uint8_t flags = 0
    cdef Scan scan = scan_one(area, size, &flags)
    scan.mask = mask
    scan.mxcsr_mask = mxcsr_mask
    loops.audit(&scan)
    return flags


cdef uint64_t xinuse_one(
    const uint8_t *area, Py_ssize_t size, const Slots *slots, bint early
) noexcept nogil:
    """Return the components whose bytes are not their init value, as `xfast.xsave.area.xinuse`."""
    cdef uint64_t used = 0
    cdef Scan scan = scan_one(area, size, &used)
    scan.slots = slots
    scan.early = early
    loops.xinuse(&scan)
    return used


cdef uint64_t diff_one(
    const uint8_t *one, Py_ssize_t size, const Slots *slots,
    const uint8_t *two, Py_ssize_t two_size, const Slots *two_slots,
) noexcept nogil:
    """Return the components whose values differ, as `xfast.xsave.area.diff`."""
    cdef uint64_t differing = 0
    cdef Scan scan = scan_one(one, size, &differing)
    scan.slots = slots
    scan.other = <uint8_t *>two
    scan.other_size = two_size
    scan.other_slots = two_slots
    loops.diff(&scan)
    return differing


cdef uint64_t keep_one(
    uint8_t *area, Py_ssize_t size, const Slots *slots, uint64_t mask, bint scrub
) noexcept nogil:
    """Clear XSTATE_BV bits outside `mask` and return them; `scrub` wipes their data."""
    cdef uint64_t dropped = 0
    cdef Scan scan = scan_one(area, size, &dropped)
    scan.slots = slots
    scan.mask = mask
    scan.scrub = scrub
    loops.keep(&scan)
    return dropped


# --- many areas -----------------------------------------------------------------------------


cdef Scan scan_of(cnp.ndarray areas, str name, bint writes, Table table) except *:
    cdef Scan scan
    cdef Rows r
    check_rows(&r, areas, name, writes)
    memset(&scan, 0, sizeof(scan))
    scan.rows = r.data
    scan.n = r.n
    scan.size = r.size
    scan.stride = r.stride
    if table is not None:
        scan.slots = &table.slots
    if r.n * r.size > stream_above:
        scan.stream = True
        scan.ahead = rows_ahead
    return scan


cdef void start_at(
    Scan *part, const Scan *scan, Py_ssize_t first, Py_ssize_t n, Py_ssize_t value
) noexcept nogil:
    """Make `part` do `n` rows of a scan, from `first` on; `value`: bytes of each result."""
    part[0] = scan[0]
    part.rows += first * scan.stride
    part.other += first * scan.other_stride
    part.out = <uint8_t *>scan.out + first * value
    part.n = n
    part.beyond = scan.n - first - n + scan.beyond


cdef void run_scan(
    Scan *scan, void (*loop)(const Scan *scan) noexcept nogil, int trial, Py_ssize_t value
) noexcept nogil:
    """Run a loop that reads all of its rows; while the way to is open, its last slices try both."""
    cdef Trial *tried = &trials[trial + (scan.stride == PAGE)]
    cdef Scan part
    cdef Py_ssize_t done = 0
    cdef double start
    cdef bint dense = (
        scan.stream and scan.ahead and scan.size >= DENSE * LINE
        and scan.size <= scan.stride < scan.size + LINE and scan.stride <= PAGE
    )
    if dense and begin(tried):
        done = untried(scan.n)
        start_at(&part, scan, 0, done, value)
        set_way(&part, False)
        loop(&part)
        while tried.choice == UNKNOWN and done + SLICE <= scan.n:
            start_at(&part, scan, done, SLICE, value)
            set_way(&part, next_way(tried))
            start = now()
            loop(&part)
            note(tried, part.whole, now() - start)
            done += SLICE
        end(tried)
    if done and done == scan.n:
        return
    start_at(&part, scan, done, scan.n - done, value)
    set_way(&part, dense and tried.choice == 1)
    loop(&part)


cdef void set_way(Scan *scan, bint whole) noexcept nogil:
    scan.whole = whole
    if whole:
        scan.ahead = 0


def headers(
    cnp.ndarray areas, cnp.ndarray xstate_bv, cnp.ndarray xcomp_bv, cnp.ndarray mxcsr,
    cnp.ndarray reserved,
):
    """Read XSTATE_BV, XCOMP_BV, MXCSR and whether reserved header bytes are set, a row each."""
    cdef Rows r
    check_rows(&r, areas, "areas", False)
    cdef uint64_t *bv = <uint64_t *>check_vector(xstate_bv, "xstate_bv", cnp.NPY_UINT64, r.n)
    cdef uint64_t *xcomp = <uint64_t *>check_vector(xcomp_bv, "xcomp_bv", cnp.NPY_UINT64, r.n)
    cdef uint32_t *mx = <uint32_t *>check_vector(mxcsr, "mxcsr", cnp.NPY_UINT32, r.n)
    cdef uint8_t *dirty = <uint8_t *>check_vector(reserved, "reserved", cnp.NPY_BOOL, r.n)
    cdef const uint8_t *row = r.data
    cdef uint64_t any
    cdef Py_ssize_t i, j
    with nogil:
        for i in range(r.n):
            bv[i] = load64(row + LEGACY)
            xcomp[i] = load64(row + LEGACY + 8)
            mx[i] = load32(row + 24)
            any = 0
            for j in range(16, 64, 8):
                any |= load64(row + LEGACY + j)
            dirty[i] = any != 0
            row += r.stride


def classify(cnp.ndarray areas, Table table not None, cnp.ndarray facts):
    """Compare every component with its init value; `facts`: 8 times n uint64, n times `Facts`.

    In use: XSTATE_BV bit set, and the data are not the init value. Default: of those, PKRU
    with Linux's default value. Stale: bit clear, and yet other than init data lie there.
    Unreadable: bit set, and the component is not in the layout or not inside the row.
    """
    cdef Scan scan = scan_of(areas, "areas", False, table)
    scan.out = check_vector(facts, "facts", cnp.NPY_UINT64, sizeof(Facts) // 8 * scan.n)
    with nogil:
        run_scan(&scan, loops.classify, TRIAL_CLASSIFY, sizeof(Facts))


def audit(cnp.ndarray areas, uint64_t mask, uint32_t mxcsr_mask, cnp.ndarray status):
    """Check header and MXCSR of every area; `status` receives `xfast.xsave.area.Audit` flags."""
    cdef Scan scan = scan_of(areas, "areas", False, None)
    scan.mask = mask
    scan.mxcsr_mask = mxcsr_mask
    scan.out = check_vector(status, "status", cnp.NPY_UINT8, scan.n)
    with nogil:
        loops.audit(&scan)
    return 0


def xinuse(cnp.ndarray areas, Table table not None, bint early, cnp.ndarray inuse):
    """Find the components whose bytes differ from their init value; MXCSR takes no part.

    `early`: look only at components in XSTATE_BV.
    """
    cdef Scan scan = scan_of(areas, "areas", False, table)
    scan.early = early
    scan.out = check_vector(inuse, "inuse", cnp.NPY_UINT64, scan.n)
    with nogil:
        if early:
            loops.xinuse(&scan)
        else:
            run_scan(&scan, loops.xinuse, TRIAL_XINUSE, 8)
    return 0


def diff(
    cnp.ndarray one, Table one_table not None, cnp.ndarray two, Table two_table not None,
    cnp.ndarray differing,
):
    """Find the components whose values differ, row by row; what can't be read differs."""
    cdef Scan scan = scan_of(one, "one", False, one_table)
    cdef Rows other
    check_rows(&other, two, "two", False)
    if other.n != scan.n:
        raise ValueError(f"two: expected {scan.n} areas, as many as one has, got {other.n}")
    scan.other = other.data
    scan.other_size = other.size
    scan.other_stride = other.stride
    scan.other_slots = &two_table.slots
    scan.out = check_vector(differing, "differing", cnp.NPY_UINT64, scan.n)
    with nogil:
        run_scan(&scan, loops.diff, TRIAL_DIFF, 8)
    return 0


def keep(cnp.ndarray areas, Table table not None, uint64_t mask, bint scrub, cnp.ndarray dropped):
    """Clear the XSTATE_BV bits outside `mask` in place; `scrub` wipes their data as well."""
    cdef Scan scan = scan_of(areas, "areas", True, table)
    scan.mask = mask
    scan.scrub = scrub
    scan.out = check_vector(dropped, "dropped", cnp.NPY_UINT64, scan.n)
    with nogil:
        loops.keep(&scan)
    return 0


# --- what comes in --------------------------------------------------------------------------


cdef int check_rows(Rows *r, cnp.ndarray array, str name, bint writes) except -1:
    """Check an array of areas, (n, size) or (size,), and fill in its rows."""
    cdef int ndim
    if array is None:
        raise ValueError(f"{name}: expected an array of areas, got None")
    ndim = cnp.PyArray_NDIM(array)
    if cnp.PyArray_TYPE(array) != cnp.NPY_UINT8:
        raise ValueError(f"{name}: expected dtype uint8, got {array.dtype}")
    if ndim != 1 and ndim != 2:
        raise ValueError(f"{name}: expected shape (n, size) or (size,), got {ndim} dimensions")
    r.data = <uint8_t *>cnp.PyArray_DATA(array)
    r.n = cnp.PyArray_DIM(array, 0) if ndim == 2 else 1
    r.size = cnp.PyArray_DIM(array, ndim - 1)
    r.stride = cnp.PyArray_STRIDE(array, 0) if ndim == 2 else r.size
    if r.size < EXTENDED:
        raise ValueError(f"{name}: expected rows of {EXTENDED} bytes or more, got {r.size}")
    if cnp.PyArray_STRIDE(array, ndim - 1) != 1 and r.n:  # numpy gives empty arrays others
        raise ValueError(
            f"{name}: expected a byte stride of 1 inside a row, "
            f"got {cnp.PyArray_STRIDE(array, ndim - 1)}"
        )
    if writes:
        if not cnp.PyArray_ISWRITEABLE(array):
            raise ValueError(f"{name}: expected a writable array, got a read-only one")
        if r.n > 1 and -r.size < r.stride < r.size:
            raise ValueError(
                f"{name}: expected a row stride of {r.size} or more, got {r.stride}: "
                "rows may not overlap"
            )
    return 0


cdef void *check_vector(cnp.ndarray array, str name, int typenum, Py_ssize_t n) except NULL:
    """Check a contiguous, writable result array of length `n`."""
    if array is None or (
        cnp.PyArray_TYPE(array) != typenum or cnp.PyArray_NDIM(array) != 1
        or not cnp.PyArray_IS_C_CONTIGUOUS(array) or not cnp.PyArray_ISWRITEABLE(array)
    ):
        raise ValueError(
            f"{name}: expected a contiguous, writable 1-D array of the documented type, "
            f"got {None if array is None else array.dtype}"
        )
    if cnp.PyArray_DIM(array, 0) != n:
        raise ValueError(f"{name}: expected {n} values, got {cnp.PyArray_DIM(array, 0)}")
    return cnp.PyArray_DATA(array)


cdef bint overlap(const Rows *one, const Rows *two) noexcept nogil:
    """Whether two arrays of areas may share memory: their bounds do."""
    cdef size_t a = <size_t>one.data, b = <size_t>two.data
    cdef size_t a_last = a, b_last = b
    if one.n == 0 or two.n == 0:
        return False
    if one.stride < 0:
        a += (one.n - 1) * one.stride
    else:
        a_last += (one.n - 1) * one.stride
    if two.stride < 0:
        b += (two.n - 1) * two.stride
    else:
        b_last += (two.n - 1) * two.stride
    return a < b_last + two.size and b < a_last + one.size
