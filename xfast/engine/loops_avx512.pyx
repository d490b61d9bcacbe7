"""The loops of `loops.pxi`, compiled for: avx512."""

include "loops.pxi"
