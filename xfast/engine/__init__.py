"""The engine's Cython floor: loops over areas that follow plans, one plan a header.

A *plan* says how to write one area from another, line of 64 bytes by line. Areas with the same
header are laid out alike, so the plan is made once for each (XSTATE_BV, XCOMP_BV) and kept. This is
the one for XSTATE_BV 0x207 (x87, SSE, AVX, PKRU) from the compacted format (XCOMP_BV
1 << 63 | 0x207) into Intel's standard format in 2752 bytes, as KVM_GET_XSAVE writes it::

    line    bytes      comes from                                       in the plan
    0-5     0-383      x87, MXCSR, XMM0-13: source lines 0-5, whole     step: copy 6 lines
    6       384-447    XMM14-15, source line 6; then zeros              blend
    7       448-511    zeros, and the word of user features at 464      blend
    8       512-575    constants: XSTATE_BV = 0x207, XCOMP_BV = 0       blend
    9-12    576-831    AVX: source lines 9-12, whole                    step: copy 4 lines
    13-41   832-2687   absent, so their init value: MPX, AVX-512        step: zero 29 lines
    42      2688-2751  PKRU, source line 13; then zeros                 blend

    reads   source lines 0-6, 9-12 and 13: fetched ahead of the row's turn

- A *step* copies or zeroes a run of whole lines; *blends* make the rest: a line of constants and
  zeros, of which some bytes are taken from the source. Two parts in one line are two blends.
- `follow` (one area in the caches) jumps into straight code for just as many lines; `walk` (many
  areas) loops, and streams past the caches where the batch is large.
- *merging* (KVM_SET_XSAVE) has copy steps and blends that leave all other bytes; *packed* rows
  share lines, so a line is *carried* from one row to the next.

Where things are, from below::

    simd.h       a line in the widest registers: SSE2, AVX2, AVX-512, or portable C
    area.pxd     one area: offsets, where components lie, Facts
    plan.pxd     what a plan is          planner.pxi  makes them      cache.pxd  keeps them
    follow.h     follows one at one go   loops*.pxi   find and follow them over rows; read, trim
    trial.pxd    measures how to fetch ahead
    convert.pyx  Converter, Merger, swap: calls that follow plans     _core  calls that read or trim
    group.pyx    equal areas counted     memory.pyx   aligned memory  hw.pyx the real instructions
    clock.pyx    times the engine        peers.pyx    what others do  walk.pyx  QEMU's stream
    files.pyx    what readers of files repeat: CRC64, numbers in JSON, swapped registers

`loops.pxi` is compiled once for each instruction set (`loops_*.pyx`), and the widest that the CPU
has is taken. Rejected: one build with -march=native (wheels are built elsewhere), ifunc and
target_clones (glibc only, and not for inlined code), intrinsics in all loops (a copy for each).
"""
