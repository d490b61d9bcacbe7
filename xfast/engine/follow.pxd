"""The steps and blends of a plan, and how to follow them at one go; see `follow.h`."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from xfast.engine.simd cimport line_t

cdef extern from "follow.h" nogil:
    enum:
        COPY
        ZERO
        BLEND
        STEP_LINES
        STEP_BLENDS
    ctypedef struct step_t:
        uint32_t code
        uint32_t dst_end
        uint32_t src_end
        uint32_t lines
    ctypedef struct blend_t:
        uint8_t value[64]
        uint64_t taken
        int64_t src
        uint32_t dst
        uint32_t room
        bint whole
        bint opens
        bint closes
        bint carried
        bint carries
    line_t blend_line(const blend_t *blend, const uint8_t *src)
    void blend_into(const blend_t *blend, const uint8_t *src, uint8_t *dst)
    void follow(
        const step_t *step, const blend_t *blend, const uint8_t *src, uint8_t *dst, bint into
    )
