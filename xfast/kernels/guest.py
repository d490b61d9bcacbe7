"""What KVM announces to a guest, and what the guest's XCR0 and CR4 may then become."""

from __future__ import annotations

from xfast.kernels.behaviour import Behaviours
from xfast.kernels.uapi import (
    CR4_CET,
    CR4_FSGSBASE,
    CR4_LA57,
    CR4_OSXSAVE,
    CR4_PCIDE,
    CR4_PKE,
    CR4_SMAP,
    CR4_SMEP,
    CR4_UMIP,
)
from xfast.xsave.features import (
    AVX,
    SSE,
    X87,
    XFEATURE_MASK_AVX512,
    XFEATURE_MASK_MPX,
    XFEATURE_MASK_USER_DYNAMIC,
    XFEATURE_MASK_XTILE,
)

_CR4_FEATURES = {
    CR4_OSXSAVE: {"xsave"},
    CR4_PKE: {"pku"},
    CR4_LA57: {"la57"},
    CR4_UMIP: {"umip"},
    CR4_FSGSBASE: {"fsgsbase"},
    CR4_SMEP: {"smep"},
    CR4_SMAP: {"smap"},
    CR4_PCIDE: {"pcid"},
    CR4_CET: {"user_shstk", "ibt"},
}
"""CR4 bits, and the CPUID features of which each needs one."""


def permitted_xcr0(kernel: Behaviours, supported: int, permission: int) -> int:
    """Return the components that KVM_GET_SUPPORTED_CPUID has in leaf 0xD (masks).

    Parameters
    ----------
    supported : int
        KVM's supported_xcr0.
    permission : int
        What the process may give to guests.

    *Source*: Linux arch/x86/kvm/x86.h kvm_get_filtered_xcr0().
    """
    if not supported & XFEATURE_MASK_USER_DYNAMIC:
        return supported
    permitted = supported & (permission | ~XFEATURE_MASK_USER_DYNAMIC)
    if permitted & XFEATURE_MASK_USER_DYNAMIC or "xtilecfg-with-xtiledata" not in kernel:
        return permitted
    return permitted & ~XFEATURE_MASK_XTILE


def cr4_reserved(features: frozenset[str]) -> int:
    """Return the bits of CR4 that KVM refuses where CPUID has these features (mask).

    Those that need nothing of `features` are not among them.

    *Source*: Linux arch/x86/kvm/x86.h __cr4_reserved_bits().
    """
    return sum(bit for bit, needed in _CR4_FEATURES.items() if not needed & features)


def xcr0_problem(value: int, limit: int) -> str:
    """Return the first rule of XSETBV that `value` breaks, or an empty string.

    `limit` holds the bits that the guest may set (mask).

    *Source*: Linux arch/x86/kvm/x86.c __kvm_set_xcr(); Intel SDM vol. 1 section 13.3.
    """
    avx512, mpx, xtile = XFEATURE_MASK_AVX512, XFEATURE_MASK_MPX, XFEATURE_MASK_XTILE
    rules = (
        (not value & X87, "x87 can't be off"),
        (value & AVX and not value & SSE, "AVX needs SSE"),
        (value & ~(limit | X87), f"CPUID does not announce {value & ~(limit | X87):#x}"),
        (value & mpx not in (0, mpx), "MPX needs both of its components"),
        (
            value & avx512 and value & (avx512 | AVX) != avx512 | AVX,
            "AVX-512 needs AVX and all three of its components",
        ),
        (value & xtile not in (0, xtile), "AMX needs both of its components"),
    )
    return next((why for broken, why in rules if broken), "")


def announced_problem(xcr0: int) -> str:
    """Return why a guest that enables all that its CPUID announces gets #GP, or an empty string.

    `xcr0` is what leaf 0xD.0 announces to it (mask). Guests do enable all of it: Linux panics at
    boot where XSETBV faults.

    *Source*: as `xcr0_problem`; Linux kernel commit 55cd57b596e8 for XTILE_CFG alone.
    """
    return xcr0_problem(xcr0, xcr0) if xcr0 else ""
