"""What KVM does with a guest's CPUID list: how it finds an entry, and what it keeps up to date.

*Source*: Linux arch/x86/kvm/cpuid.c.
"""

from __future__ import annotations

from xfast.kernels.behaviour import Behaviours
from xfast.kernels.uapi import CR4_OSXSAVE, CR4_PKE
from xfast.kvm.module import Module
from xfast.xsave.cpuid import Cpuid, Entry
from xfast.xsave.features import PKRU

APIC = 1 << 9
OSXSAVE = 1 << 27
OSPKE = 1 << 4
"""Bits that KVM keeps up to date: CPUID leaf 1 EDX and ECX, and leaf 7 ECX."""

XSAVEC_OR_XSAVES = 0b1010
"""CPUID leaf 0xD.1 EAX: with one of these, EBX is the size of a compacted area."""


def find(behaviours: Behaviours, cpuid: Cpuid, function: int, index: int = 0) -> Entry | None:
    """Return the entry that KVM goes by; of a leaf without sub-leaves, any will do.

    *Source*: Linux arch/x86/kvm/cpuid.c cpuid_entry2_find().
    """
    if "cpuid-index-ignored" in behaviours and function not in (7, 0xD):
        return next(cpuid.leaf(function), None)
    return cpuid.find(function, index)


def with_runtime_fields(module: Module, cpuid: Cpuid, *, xcr0: int, xss: int, cr4: int) -> Cpuid:
    """Return a list with the fields that KVM itself keeps up to date.

    `xcr0`, `xss` and `cr4` are the vCPU's registers.

    *Source*: Linux arch/x86/kvm/cpuid.c kvm_update_cpuid_runtime().
    """
    entries = list(cpuid.entries)
    always = "os-bits-always" in module.behaviours
    has_pku = bool(module.fpu.user_cfg.max_features & PKRU)
    size = module.xstate_required_size
    for leaf in ((1, 0), (7, 0), (0xD, 0), (0xD, 1)):
        entry = find(module.behaviours, Cpuid(tuple(entries)), *leaf)
        if entry is None:
            continue
        at = entries.index(entry)
        if leaf == (1, 0):
            if always or module.fpu.has_xsave:
                entry = entry._replace(ecx=_switched(entry.ecx, OSXSAVE, cr4 & CR4_OSXSAVE))
            entry = entry._replace(edx=entry.edx | APIC)  # it is enabled at reset
        elif leaf == (7, 0) and (always or has_pku):
            entry = entry._replace(ecx=_switched(entry.ecx, OSPKE, cr4 & CR4_PKE))
        elif leaf == (0xD, 0):
            entry = entry._replace(ebx=size(xcr0))
        elif leaf == (0xD, 1) and entry.eax & XSAVEC_OR_XSAVES:
            entry = entry._replace(ebx=size(xcr0 | xss, True))
        entries[at] = entry
    return Cpuid(tuple(entries))


def _switched(register: int, bit: int, on: int) -> int:
    """Return a register with one bit set or cleared."""
    return register | bit if on else register & ~bit
