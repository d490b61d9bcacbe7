"""The loops of `loops.pxi`, compiled for: baseline."""

include "loops.pxi"
