"""The MSRs of a guest's FPU: where those of CET live, and what KVM lets them be.

*Source*: Linux arch/x86/kvm/x86.c and x86.h.
"""

from __future__ import annotations

from typing import Any

from xfast.kernels.uapi import MSR_IA32_U_CET
from xfast.kvm.instructions import CET_RESERVED, CET_SUPPRESS, CET_TRACKER
from xfast.kvm.processor import Processor, sign_extend

CET_MSRS = {
    MSR_IA32_U_CET: (11, 0),
    0x6A7: (11, 8),
    0x6A4: (12, 0),
    0x6A5: (12, 8),
    0x6A6: (12, 16),
}
"""MSRs that live in a guest's CET components: {index: (component, byte)}; S_CET does not."""

U_CET_SHSTK = 0x3
U_CET_IBT = 0x3C | ~0x3FF & (1 << 64) - 1
"""Bits of IA32_U_CET that belong to one of the two features."""


def cet_problem(index: int, value: int, features: frozenset[str], linear_bits: int) -> str:
    """Return the first rule that a value for a CET MSR breaks, or an empty string.

    *Source*: Linux arch/x86/kvm/x86.h kvm_is_valid_u_s_cet(), x86.c __kvm_set_msr().
    """
    rules: tuple[tuple[object, str], ...]
    if index != MSR_IA32_U_CET:
        rules = (
            (sign_extend(value, linear_bits) != value, "not canonical"),
            (value & 3, "not a multiple of 4"),
        )
    else:
        rules = (
            (value & CET_RESERVED, "bits 9:6 are reserved"),
            ("user_shstk" not in features and value & U_CET_SHSTK, "CPUID has no SHSTK"),
            ("ibt" not in features and value & U_CET_IBT, "CPUID has no IBT"),
            (value >> 12 & 3, "the bitmap's page number is not a multiple of 4"),
            (value & CET_SUPPRESS and value & CET_TRACKER, "SUPPRESS while TRACKER waits"),
            (sign_extend(value, linear_bits) != value, "not canonical"),
        )
    return next((why for broken, why in rules if broken), "")


def word(processor: Processor, nr: int, at: int) -> Any:
    """Return a u64 view of a component's byte `at`."""
    start = processor.offsets[nr] + at
    return processor.values[start : start + 8].view("<u8")


def store(processor: Processor, nr: int, at: int, value: int) -> None:
    """Write a u64 into a component's byte `at`."""
    processor.write(nr, at, value.to_bytes(8, "little"))
