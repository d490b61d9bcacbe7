"""Parts of files, mapped: a file that is cut off meanwhile gives an error, and no SIGBUS.

Copying a file before it is looked at takes several times as long as looking at it.

*Source*: mmap(2) on SIGBUS; `guard.h`.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.stdint cimport uint8_t, uintptr_t
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, madvise, mmap, munmap

cdef extern from "guard.h" nogil:
    enum:
        XFAST_WINDOWS
    cdef struct window_t "struct xfast_window":
        uintptr_t start
        uintptr_t end
        int broken
    window_t xfast_window[]
    int xfast_guard()

cdef enum:
    PAGE = 4096
    MADV_SEQUENTIAL = 2

cdef cython.pymutex lock


cdef class Window:
    """Part of a file, mapped for reading, with the buffer protocol.

    Parameters
    ----------
    fd : int
        A file or block device.
    offset, size : int
        The part (bytes); `size` is not 0.

    Raises
    ------
    OSError
        If it can't be mapped, or if too many are mapped at a time.
    """

    cdef uint8_t *start
    cdef size_t before, size  # bytes mapped before the part, and its own
    cdef int number

    def __cinit__(self, int fd, long long offset, size_t size):
        cdef int i
        cdef void *start
        self.number = -1
        self.before = offset & (PAGE - 1)
        self.size = size
        with lock:
            if xfast_guard():
                raise OSError("expected to handle SIGBUS, which the kernel refused")
            for i in range(XFAST_WINDOWS):
                if not xfast_window[i].end:
                    break
            else:
                raise OSError(f"expected at most {XFAST_WINDOWS} windows at a time, got more")
            start = mmap(
                NULL, self.before + size, PROT_READ, MAP_SHARED, fd, offset - self.before
            )
            if start == MAP_FAILED:
                raise OSError("mmap refused")
            madvise(start, self.before + size, MADV_SEQUENTIAL)
            self.start = <uint8_t *>start
            self.number = i
            xfast_window[i].start = <uintptr_t>start
            xfast_window[i].broken = 0
            xfast_window[i].end = <uintptr_t>start + self.before + size

    def __dealloc__(self):
        if self.number < 0:
            return
        with lock:
            xfast_window[self.number].end = 0
            munmap(self.start, self.before + self.size)

    @property
    def broken(self):
        """How many pages could not be read so far, and were zeros instead."""
        return xfast_window[self.number].broken

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.start + self.before, self.size, True, flags)
