"""What goes into the ioctls of the model and of the real thing: limits, structs, checks.

*Source*: Linux arch/x86/include/uapi/asm/kvm.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from xfast.cpuid import Cpuid, Entry

KVM_MAX_CPUID_ENTRIES = 256
KVM_MAX_XCRS = 16
KVM_EXIT_HLT = 5

KVM_FPU = struct.Struct("<128sHHBxHQQ256sI4x")
"""struct kvm_fpu: fpr, fcw, fsw, ftwx, last_opcode, last_ip, last_dp, xmm, mxcsr."""


def unsigned(value: int, width: int, name: str) -> int:
    """Return `value`, if it is a number that C's u32 or u64 can hold.

    Raises
    ------
    ValueError
        If it is not: the kernel never sees such a number.
    """
    if not 0 <= value < 1 << width:
        raise ValueError(f"{name}: got {value:#x}, needed {width} bits, unsigned")
    return value


def cpuid_of(entries: Cpuid | Iterable[Iterable[int]]) -> Cpuid:
    """Return a CPUID list as a value; each field is a u32.

    Raises
    ------
    ValueError
        If a row has not seven numbers, or one of them is no u32.
    """
    if isinstance(entries, Cpuid):
        return entries
    rows = [tuple(unsigned(field, 32, "CPUID entry") for field in entry) for entry in entries]
    for row in rows:
        if len(row) != 7:
            raise ValueError(f"CPUID entry: got {len(row)} numbers, needed 7")
    return Cpuid(tuple(Entry(*row) for row in rows))


def xcrs_of(
    xcrs: Iterable[tuple[int, int]], nr: int | None, flags: int
) -> tuple[list[tuple[int, int]], int, int]:
    """Return the rows, nr_xcrs and flags of a struct kvm_xcrs; ValueError if they don't fit."""
    rows = [(unsigned(n, 32, "xcr"), unsigned(value, 64, f"XCR{n}")) for n, value in xcrs]
    count = len(rows) if nr is None else unsigned(nr, 32, "nr")
    return rows, count, unsigned(flags, 32, "flags")
