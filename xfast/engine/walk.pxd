"""What a Walker is, for Cython code that feeds it."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    LIVE_LIMIT = 64

cdef enum State:
    HEADER, TOP, PARTS, CAPABILITIES, RAM, BLOCKS, BITMAPS, STOPPED

cdef enum Kind:
    NO_KIND, RAM_KIND, BITMAP_KIND


cdef class Walker:
    cdef readonly uint64_t position
    cdef readonly uint64_t skip
    cdef readonly long long devices
    cdef readonly bint early
    cdef readonly uint64_t head
    cdef readonly bint return_path
    cdef readonly bint last
    cdef readonly bint ended
    cdef readonly object trouble
    cdef uint64_t start, total, entered
    cdef State state
    cdef bint ignore_shared, mapped_ram, started
    cdef uint32_t capabilities, section
    cdef uint32_t ids[LIVE_LIMIT]
    cdef Kind kinds[LIVE_LIMIT]
    cdef int live

    cdef uint64_t under_way(self) noexcept
    cdef Py_ssize_t over(self, const uint8_t *p, Py_ssize_t n) except -1
    cdef Py_ssize_t record(self, const uint8_t *p, Py_ssize_t n) except -1
    cdef Py_ssize_t stop(self, Py_ssize_t at, str found, str expected) except -1
    cdef Py_ssize_t header(self, const uint8_t *p, Py_ssize_t n) except -1
    cdef Py_ssize_t part(self, const uint8_t *p, Py_ssize_t n) except -1
    cdef Py_ssize_t capability(self, const uint8_t *p, Py_ssize_t n) except -1
    cdef Py_ssize_t top(self, const uint8_t *p, Py_ssize_t n) except -1
    cdef Py_ssize_t begin(self, const uint8_t *p, Py_ssize_t n, uint32_t section) except -1
    cdef Py_ssize_t enter(self, Kind kind, uint32_t section, Py_ssize_t length) except -1
    cdef Py_ssize_t pages(self, const uint8_t *p, Py_ssize_t n) except -1
    cdef Py_ssize_t stopped_at(self, Py_ssize_t at, str found, str expected) except -1
    cdef Py_ssize_t block(self, const uint8_t *p, Py_ssize_t n) except -1
    cdef Py_ssize_t bitmap(self, const uint8_t *p, Py_ssize_t n) except -1
