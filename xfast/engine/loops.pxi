# The loops over rows: nothing here touches Python. Compiled once for each instruction set.

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from cpython.pycapsule cimport PyCapsule_New

from xfast.engine.area cimport (
    AUDIT_MXCSR, AUDIT_RESERVED, AUDIT_XCOMP_BV, AUDIT_XSTATE_BV, AVX, COMPONENTS, EXTENDED,
    FAULT_MXCSR, FAULT_RESERVED, FAULT_STORAGE, FCW_INIT, FP, LEGACY, MXCSR_INIT, PAGE, PKRU,
    PKRU_DEFAULT, PKRU_SIZE, SSE, Facts, Place, Slots, bit, has_mxcsr, is_compacted, load16, load32,
    load64, locate, store32, store64, take_lowest,
)
from xfast.engine.follow cimport ZERO, blend_into, blend_line, blend_t, follow, step_t
from xfast.engine.cache cimport CACHE, PROBES, RING, Cache, is_for, keep_plan
from xfast.engine.loops cimport Job, Loops, Scan
from xfast.engine.plan cimport PACKED, Key, Plan, Range
from xfast.engine.simd cimport (
    LINE, PORTABLE, line_and, line_any, line_copy_part, line_later, line_load, line_merge, line_or,
    line_store, line_store_part, line_stream, line_t, line_xor, line_zero, prefetch_far,
    stream_fence,
)

cdef Loops LOOPS

cdef enum:
    HEADERS_AHEAD = 12  # rows by which a header is fetched before its row is planned
    AUDIT_AHEAD = 64  # rows whose two lines an audit fetches ahead
    KEEP_AHEAD = 32  # the same where little else of a row is touched
    HOLE = 512  # bytes between rows that a scan does not skip
    LEGACY_LINES = 7  # that x87 and XMM registers lie in

include "loops_lines.pxi"
include "loops_find.pxi"
include "loops_write.pxi"
include "loops_read.pxi"
include "loops_trim.pxi"

# --- the limits of the machine --------------------------------------------------------------


cdef void copy(uint8_t *dst, const uint8_t *src, Py_ssize_t n, bint stream) noexcept nogil:
    """Copy `n` bytes, a multiple of 64; the benchmarks' denominator."""
    if stream:
        copy_lines(dst, src, <uint32_t>(n // LINE), True)
        stream_fence()
    else:
        copy_lines(dst, src, <uint32_t>(n // LINE), False)


cdef bint read(const uint8_t *src, Py_ssize_t n) noexcept nogil:
    """Read `n` bytes; the benchmarks' other denominator."""
    return nonzero(src, <uint32_t>n, False, 0)


cdef uint64_t touch(const uint8_t *row, Py_ssize_t stride, Py_ssize_t n) noexcept nogil:
    """Load from the two lines that an audit needs, fetched as far ahead."""
    cdef uint64_t any = 0
    cdef Py_ssize_t i
    for i in range(n):
        prefetch_far(row + AUDIT_AHEAD * stride)
        prefetch_far(row + AUDIT_AHEAD * stride + LEGACY)
        any |= load64(row) | load64(row + LEGACY)
        row += stride
    return any


# Every slot by its name: Cython refuses a struct of which a member is missing.
LOOPS = Loops(
    convert=convert,
    convert_one=convert_one,
    merge=merge,
    merge_one=merge_one,
    swap=swap,
    audit=audit,
    classify=classify,
    xinuse=xinuse,
    diff=diff,
    keep=keep,
    copy=copy,
    read=read,
    touch=touch,
)


def loops():
    """Return the table of loops, for `_core`."""
    return PyCapsule_New(&LOOPS, "xfast.loops", NULL)
