# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, binding=False, freethreading_compatible=True
"""What the benchmarks measure the engine against, and with: clocks inside the core.

Every function returns seconds. Built on the functions that other Cython code may cimport.
"""

from libc.stdint cimport uint8_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cimport numpy as cnp

from xfast.engine.convert cimport Converter, Merger, acquire, fill_job, release
from xfast._core cimport Rows, loops, rows
from xfast.engine.plan cimport Cache, Job

cnp.import_array()

# Where results of reads go, so that no compiler drops the read
cdef bint sink = False


cdef double now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <double>t.tv_sec + 1e-9 * <double>t.tv_nsec


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
        raise ValueError("copy: needed contiguous arrays, `out` writable and 64-byte aligned")
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
        raise ValueError("read: needed a contiguous array")
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
    rows(&r, areas, "areas", False)
    cdef double start
    cdef uint64_t any
    with nogil:
        start = now()
        any = loops.touch(r.data, r.stride, r.n)
        start = now() - start
    sink = any != 0
    return start


def convert(Converter how not None, cnp.ndarray src, cnp.ndarray out, Py_ssize_t times=1):
    """Convert the same batch again and again."""
    cdef Rows r, w
    rows(&r, src, "src", False)
    rows(&w, out, "out", True)
    cdef const uint8_t *s = r.data
    cdef uint8_t *d = w.data
    cdef bint one
    cdef Cache *cache
    cdef Job job
    cdef Py_ssize_t _i
    cdef double start
    fill_job(&job, &r, &w)
    one = r.n == 1 and not job.stream
    job.cache = cache = acquire(how, r.size, w.size, True)
    if cache == NULL:
        raise MemoryError
    start = now()
    for _i in range(times):
        if not (one and loops.convert_one(cache, s, d)):
            loops.convert(&job)
    start = now() - start
    release(how, cache, True)
    return start


def merge(Merger how not None, cnp.ndarray src, cnp.ndarray into, Py_ssize_t times=1):
    """Merge the same batch again and again."""
    cdef Rows r, w
    rows(&r, src, "src", False)
    rows(&w, into, "into", True)
    cdef const uint8_t *s = r.data
    cdef uint8_t *d = w.data
    cdef bint one
    cdef Cache *cache
    cdef Job job
    cdef Py_ssize_t _i
    cdef double start
    fill_job(&job, &r, &w)
    one = r.n == 1 and not job.stream
    job.cache = cache = acquire(how, r.size, w.size, True)
    if cache == NULL:
        raise MemoryError
    start = now()
    for _i in range(times):
        if not (one and loops.merge_one(cache, s, d)):
            loops.merge(&job)
    start = now() - start
    release(how, cache, True)
    return start
