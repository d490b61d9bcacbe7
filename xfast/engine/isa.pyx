"""Which instruction set this CPU has for the loops; needs no numpy, for those who only ask."""

from xfast.engine.simd cimport widest_isa

import os

ISAS = ("plain", "baseline", "avx2", "avx512")
"""The instruction sets that the loops are compiled for, narrowest first."""


def chosen() -> str:
    """Return the instruction set to use: the widest, or the one that XFAST_ISA names.

    Raises
    ------
    ImportError
        If XFAST_ISA names one that this CPU does not have.
    """
    widest = widest_isa().decode()
    usable = ISAS[: ISAS.index(widest) + 1]
    wanted = os.environ.get("XFAST_ISA", widest)
    if wanted not in usable:
        raise ImportError(f"XFAST_ISA: expected one of {', '.join(usable)}, got {wanted!r}")
    return wanted
