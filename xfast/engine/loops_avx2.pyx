# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: freethreading_compatible=True
"""The loops of `loops.pxi`, compiled for: avx2."""

include "loops.pxi"
