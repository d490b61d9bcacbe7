"""The inline wrappers of `simd.h`, for the loops and for nobody else."""

from libc.stdint cimport uint8_t, uint64_t

cdef extern from "simd.h" nogil:
    ctypedef struct line_t:
        pass
    enum:
        LINE
        PORTABLE
    line_t line_load(const void *p)
    line_t line_zero()
    line_t line_merge(line_t a, const uint8_t *p, uint64_t taken, bint whole)
    line_t line_or(line_t a, line_t b)
    line_t line_and(line_t a, line_t b)
    line_t line_xor(line_t a, line_t b)
    bint line_any(line_t a)
    void line_store(void *p, line_t a)
    void line_store_part(uint8_t *p, line_t a, unsigned to)
    void line_copy_part(uint8_t *to, const uint8_t *src, uint64_t taken)
    void line_stream(void *p, line_t a)
    void stream_fence()
    void prefetch_far(const void *p)
    const uint8_t *line_later(const uint8_t *p)
    void *pointer_exchange(void **p, void *value)
    void *pointer_exchange_gil(void **p, void *value)
    const char *widest_isa()
    bint cpu_is_amd()
