"""Memory for batches: aligned, faulted in once, and kept for the next batch.

Page faults cost more than the engine's own work: a fresh page is about ten times as dear as
converting the areas on it. Blocks that are let go stay in a pool of limited size.

*Source*: madvise(2), MADV_HUGEPAGE and MADV_POPULATE_WRITE (Linux 5.14).
"""

cimport cython
from libc.stdint cimport uint8_t
from libc.string cimport memset
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap, munmap,
)

cdef enum:
    PAGE = 4096
    HUGE = 2 << 20
    MADV_HUGEPAGE = 14
    MADV_POPULATE_WRITE = 23
    KEPT = 32  # blocks

cdef struct Span:
    uint8_t *start
    size_t size

cdef Span pool[KEPT]
cdef int kept = 0
cdef size_t pooled = 0
cdef size_t limit = 512 << 20
cdef cython.pymutex lock


def pool_limit(size_t limit_bytes) -> None:
    """Keep at most this many bytes for later; 0 gives all of them back now."""
    global limit
    with lock:
        limit = limit_bytes
        trim(limit, KEPT)


def pool_state():
    """Return how many blocks the pool keeps, and their bytes."""
    with lock:
        return kept, pooled


cdef void trim(size_t most, int blocks) noexcept:
    """Give back the oldest blocks until no more than so many bytes and blocks are kept.

    The caller holds the lock, and keeps it until what it makes room for is in its place.
    """
    global kept, pooled
    cdef int i, oldest = 0
    while oldest < kept and (pooled > most or kept - oldest > blocks):
        pooled -= pool[oldest].size
        munmap(pool[oldest].start, pool[oldest].size)
        oldest += 1
    kept -= oldest
    for i in range(kept):
        pool[i] = pool[i + oldest]


cdef uint8_t *reuse(size_t size) noexcept:
    """Take the block of this size that was let go last, or NULL."""
    global kept, pooled
    cdef uint8_t *start = NULL
    cdef int i, j
    with lock:
        for i in range(kept - 1, -1, -1):
            if pool[i].size == size:
                start = pool[i].start
                pooled -= size
                kept -= 1
                for j in range(i, kept):
                    pool[j] = pool[j + 1]
                break
    return start


cdef uint8_t *fresh(size_t size) except NULL:
    """Map zeros: from 2 MiB on, aligned to 2 MiB, huge pages where the kernel has them."""
    cdef size_t spare = HUGE if size >= HUGE else 0
    cdef size_t before
    cdef uint8_t *start = <uint8_t *>mmap(
        NULL, size + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0
    )
    if start == <uint8_t *>MAP_FAILED:
        raise MemoryError(f"empty: got no {size} bytes")
    if spare:
        before = -<size_t>start & (HUGE - 1)
        if before:
            munmap(start, before)
        start += before
        munmap(start + size, spare - before)
        madvise(start, size, MADV_HUGEPAGE)
        madvise(start, size, MADV_POPULATE_WRITE)  # older kernels fault on use
    return start


cdef class Block:
    """A block of memory with the buffer protocol; whole pages.

    Parameters
    ----------
    size : int
        Bytes, rounded up to pages, or to 2 MiB from there on.
    zero : bool
        Whether the bytes are 0; otherwise they may be those of an earlier block.
    """

    cdef uint8_t *start
    cdef size_t size

    def __cinit__(self, size_t size, bint zero):
        cdef size_t unit = HUGE if size >= HUGE else PAGE
        self.size = (size + unit - 1) & ~(unit - 1)
        self.start = reuse(self.size)
        if self.start == NULL:
            self.start = fresh(self.size)
        elif zero:
            memset(self.start, 0, self.size)

    def __dealloc__(self):
        global kept, pooled
        if self.start == NULL:
            return
        with lock:
            if self.size <= limit:
                trim(limit - self.size, KEPT - 1)
                pool[kept] = Span(self.start, self.size)
                kept += 1
                pooled += self.size
                self.start = NULL
        if self.start:
            munmap(self.start, self.size)

    def __getbuffer__(self, Py_buffer *view, int flags):
        cdef int failed = PyBuffer_FillInfo(view, self, self.start, self.size, False, flags)
        if failed:
            raise BufferError("Block: this kind of buffer can't be had")


cdef extern from "Python.h":
    int PyBuffer_FillInfo(
        Py_buffer *view, object exporter, void *buf, Py_ssize_t n, bint readonly, int flags
    ) except -1
