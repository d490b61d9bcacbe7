"""What a plan is: how to write one area, line by line, from another with a given header.

The package's head has one drawn. Data only: `planner.pxi` makes plans, `cache.pxd` keeps them, the
loops follow them.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    PACKED = 64  # in a key: the row goes on in the line where the one before it ended
    DENSE = 36  # lines of 64 from which reading a whole row may be quicker than picking them

cdef struct Key:
    # What decides how an area is written
    uint64_t xstate_bv
    uint64_t xcomp_bv
    uint64_t target  # merge: the target's XCOMP_BV; convert: 0, or PACKED | bytes into its line

cdef struct Range:
    uint32_t start, lines

cdef struct Plan:
    # Its steps (`follow.pxd`) lie behind it in memory.
    Key key
    uint64_t stored  # XSTATE_BV of the result, of components that come from the source
    uint64_t lost  # components that have no place, in the source or in the target
    uint32_t steps, blends, reads, holds
    bint dense  # it reads DENSE lines or more
    bint ragged  # it writes a row only as far as its components go
    bint whole_blends  # each blend makes one line, and all of it
    bint followable  # `follow` can do it, and nothing is lost, packed or comes from elsewhere
    void *blend  # blend_t
    uint8_t *pkru  # where in a blend PKRU from elsewhere goes, or NULL
    # merge only
    uint64_t kept  # of the target's XSTATE_BV
    uint32_t fault  # of every source with this header; UabiFault
    bint validate  # the header's reserved bytes
    uint32_t mxcsr_mask  # bits that MXCSR may have
    Range *read  # source lines to fetch
    Range *hold  # target lines of which a part stays
