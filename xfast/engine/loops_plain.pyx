"""The loops of `loops.pxi`, compiled for: plain."""

include "loops.pxi"
