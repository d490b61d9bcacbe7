"""The loops of `loops.pxi`, compiled for: avx2."""

include "loops.pxi"
