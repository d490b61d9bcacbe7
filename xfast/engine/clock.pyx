"""What the benchmarks measure the engine against, and with: clocks inside the core.

Every function returns seconds. Built on the functions that other Cython code may cimport.
"""

from libc.stdint cimport uint8_t, uint64_t

cimport numpy as cnp

from xfast._core cimport Rows, check_rows, loops
from xfast.engine.convert cimport (
    Converter, Merger, acquire, convert_rows, fill_job, merge_rows, release,
)
from xfast.engine.loops cimport Job
from xfast.engine.trial cimport now

cnp.import_array()

# Where results of reads go, so that no compiler drops the read
cdef bint sink = False


def copy(cnp.ndarray src not None, cnp.ndarray out not None, bint stream, Py_ssize_t times=1):
    """Copy `out.nbytes` bytes (whole lines), past the caches or not."""
    cdef Py_ssize_t _i, n = cnp.PyArray_NBYTES(out) // 64 * 64
    cdef const uint8_t *s = <const uint8_t *>cnp.PyArray_DATA(src)
    cdef uint8_t *d = <uint8_t *>cnp.PyArray_DATA(out)
    cdef double start
    if not (
        cnp.PyArray_IS_C_CONTIGUOUS(src) and cnp.PyArray_IS_C_CONTIGUOUS(out)
        and cnp.PyArray_NBYTES(src) >= n and cnp.PyArray_ISWRITEABLE(out) and <size_t>d % 64 == 0
    ):
        raise ValueError("copy: expected contiguous arrays, `out` writable and 64-byte aligned")
    with nogil:
        start = now()
        for _i in range(times):
            loops.copy(d, s, n, stream)
        start = now() - start
    return start


def read(cnp.ndarray src not None):
    """Read all bytes."""
    global sink
    cdef Py_ssize_t n = cnp.PyArray_NBYTES(src)
    cdef const uint8_t *s = <const uint8_t *>cnp.PyArray_DATA(src)
    cdef double start
    cdef bint any
    if not cnp.PyArray_IS_C_CONTIGUOUS(src):
        raise ValueError("read: expected a contiguous array")
    with nogil:
        start = now()
        any = loops.read(s, n)
        start = now() - start
    sink = any
    return start


def touch(cnp.ndarray areas):
    """Load from the two lines of each area that an audit needs."""
    global sink
    cdef Rows r
    check_rows(&r, areas, "areas", False)
    cdef double start
    cdef uint64_t any
    with nogil:
        start = now()
        any = loops.touch(r.data, r.stride, r.n)
        start = now() - start
    sink = any != 0
    return start


cdef int prepare(
    Job *job, Rows *r, Rows *w, cnp.ndarray src, cnp.ndarray out
) except -1:
    check_rows(r, src, "src", False)
    check_rows(w, out, "out", True)
    if w.n != r.n:
        raise ValueError(f"out: expected {r.n} areas, got {w.n}")
    fill_job(job, r, w)
    return 0


def convert(Converter how not None, cnp.ndarray src, cnp.ndarray out, Py_ssize_t times=1):
    """Convert the same batch again and again, as `Converter.convert` does after its checks."""
    cdef Rows r, w
    cdef Job job
    cdef Py_ssize_t _i
    cdef double start
    prepare(&job, &r, &w, src, out)
    job.cache = acquire(how, r.size, w.size, True)
    if job.cache == NULL:
        raise MemoryError
    start = now()
    for _i in range(times):
        convert_rows(&job)
    start = now() - start
    release(how, job.cache, True)
    return start


def merge(Merger how not None, cnp.ndarray src, cnp.ndarray into, Py_ssize_t times=1):
    """Merge the same batch again and again, as `Merger.merge` does after its checks."""
    cdef Rows r, w
    cdef Job job
    cdef Py_ssize_t _i
    cdef double start
    prepare(&job, &r, &w, src, into)
    job.cache = acquire(how, r.size, w.size, True)
    if job.cache == NULL:
        raise MemoryError
    start = now()
    for _i in range(times):
        merge_rows(&job)
    start = now() - start
    release(how, job.cache, True)
    return start
