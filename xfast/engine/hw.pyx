"""The real XSAVE family in user mode: for comparing the model with the CPU, and for timing.

Everything here needs x86-64 Linux with XSAVE enabled; `available` tells. A PKRU that forbids key
0, the caller's own memory, would end the process: none is loaded.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

cimport cython
cimport numpy as cnp

cnp.import_array()

cdef extern from "hw.h":
    struct xfast_step:
        uint32_t op
        uint32_t signal
        uint32_t trap
        uint32_t length
        uint8_t *area
        uint64_t mask
        uint64_t xinuse
    int xfast_hw_available() nogil
    void xfast_hw_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t *out) nogil
    uint64_t xfast_hw_xgetbv(uint32_t index) nogil
    int xfast_hw_arch_prctl(int code, unsigned long argument) nogil
    uint64_t xfast_hw_run(
        xfast_step *steps, int n, uint64_t rounds, int observe, uint8_t *own, uint64_t own_mask
    ) noexcept

cdef enum:
    LIMIT = 16
    ARCH_REQ_XCOMP_PERM = 0x1023

cdef uint64_t PKRU = 1 << 9
cdef cython.pymutex signals  # while a run has its own handlers for them

OPS = (
    "xsave64", "xsaveopt64", "xsavec64", "xrstor64", "xsave", "xsaveopt", "xsavec", "xrstor",
    "fldcw", "fill", "set_xmm15", "set_ymm15", "set_k7", "fldz", "xgetbv", "set_pkru",
)

cdef dict _CODES = {name: code for code, name in enumerate(OPS)}
cdef dict _NEEDS = {"set_xmm15": 2, "set_ymm15": 4, "set_k7": 0x20, "fldz": 1, "set_pkru": PKRU}


def available():
    """Return whether this machine runs the XSAVE family, and the kernel has enabled it."""
    return xfast_hw_available() != 0


def cpuid(uint32_t leaf, uint32_t subleaf=0):
    """Return (eax, ebx, ecx, edx) of a CPUID leaf; zeros on other architectures."""
    cdef uint32_t out[4]
    xfast_hw_cpuid(leaf, subleaf, out)
    return out[0], out[1], out[2], out[3]


def xgetbv(uint32_t index):
    """Return XCR0 (`index` 0) or, where CPUID leaf 0xD.1 announces it, XINUSE (`index` 1)."""
    _need()
    if index > (cpuid(0xD, 1)[0] >> 2 & 1):
        raise ValueError(f"index: expected 0, or 1 where the CPU has XGETBV(1), got {index}")
    return xfast_hw_xgetbv(index)


def request_permission(int nr):
    """Ask the kernel for a dynamic component (18, AMX tile data); return whether it agreed."""
    return xfast_hw_available() != 0 and xfast_hw_arch_prctl(ARCH_REQ_XCOMP_PERM, nr) == 0


def run(list steps, uint64_t rounds=1):
    """Run steps one after the other on this CPU, the caller's registers put aside.

    Parameters
    ----------
    steps : list of (op, area, mask)
        `op` is one of OPS; `area` a contiguous, writable 1-D uint8 array, or None; `mask`
        EDX:EAX (``fill``: the byte; ``set_pkru``: the value, of which key 0's bits are cleared).
        At most 16. Instructions access `area` at its own address, and may only be given areas
        that hold all they write. A restore from an area whose PKRU forbids key 0 leaves PKRU
        alone.
    rounds : int
        How often to run them all.

    Returns
    -------
    list of (signal, trap, xinuse)
        Of the last round: the signal that a fault became (or 0), the exception's vector, and
        XGETBV(1) afterwards (0 where the CPU has none).

    Raises
    ------
    ValueError
        If a step is none of these, or the machine can't run it.
    """
    cdef xfast_step program[LIMIT]
    _run(steps, rounds, 2 if cpuid(0xD, 1)[0] >> 2 & 1 else 1, program)
    return [(program[i].signal, program[i].trap, program[i].xinuse) for i in range(len(steps))]


def time(list steps, uint64_t rounds):
    """Return the nanoseconds that `rounds` rounds of the steps take; as `run`, unobserved."""
    cdef xfast_step program[LIMIT]
    return _run(steps, rounds, 0, program)


cdef _need():
    if not xfast_hw_available():
        raise ValueError("this machine or its kernel has no XSAVE")


cdef uint64_t _run(list steps, uint64_t rounds, int observe, xfast_step *program) except 0:
    cdef Py_ssize_t i, n = len(steps), need
    cdef cnp.ndarray area
    cdef uint64_t own_mask, nanoseconds
    cdef uint8_t *block
    _need()
    if n > LIMIT:
        raise ValueError(f"steps: expected at most {LIMIT}, got {n}")
    own_mask = xfast_hw_xgetbv(0)
    for i in range(n):
        op, memory, mask = steps[i]
        if op not in _CODES:
            raise ValueError(f"steps[{i}]: expected one of {', '.join(OPS)}, got {op!r}")
        if _NEEDS.get(op, 0) & ~xfast_hw_xgetbv(0):
            raise ValueError(f"steps[{i}]: {op} needs components {_NEEDS[op]:#x} in XCR0")
        if op == "set_pkru" and not cpuid(7)[2] >> 4 & 1:
            raise ValueError(f"steps[{i}]: expected CR4.PKE to be 1, got 0")
        if op == "xgetbv" and not cpuid(0xD, 1)[0] & 4:
            raise ValueError(f"steps[{i}]: this CPU has no XGETBV(1)")
        program[i].op = _CODES[op]
        program[i].mask = mask
        program[i].signal = program[i].trap = 0
        program[i].xinuse = 0
        program[i].area = NULL
        program[i].length = 0
        if program[i].op <= _CODES["fill"]:
            area = memory
            if (
                cnp.PyArray_TYPE(area) != cnp.NPY_UINT8 or cnp.PyArray_NDIM(area) != 1
                or not cnp.PyArray_IS_C_CONTIGUOUS(area) or not cnp.PyArray_ISWRITEABLE(area)
            ):
                raise ValueError(f"steps[{i}]: expected a contiguous, writable 1-D uint8 array")
            need = {"fill": 0, "fldcw": 2}.get(op, cpuid(0xD, 0)[1])
            if cnp.PyArray_DIM(area, 0) < need:
                raise ValueError(
                    f"steps[{i}]: expected an area of {need} bytes, got {cnp.PyArray_DIM(area, 0)}"
                )
            program[i].area = <uint8_t *>cnp.PyArray_DATA(area)
            program[i].length = <uint32_t>cnp.PyArray_DIM(area, 0)
    block = <uint8_t *>calloc(1, cpuid(0xD, 0)[1] + 64)
    if block == NULL:
        raise MemoryError
    try:
        with signals:
            nanoseconds = xfast_hw_run(
                program, <int>n, rounds, observe, block + (-<Py_ssize_t>block & 63), own_mask
            )
    finally:
        free(block)
    if not nanoseconds:
        raise ValueError("signals can't be caught here")
    return nanoseconds
