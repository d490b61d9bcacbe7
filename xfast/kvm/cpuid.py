"""What KVM does with a guest's CPUID list: how it finds an entry, and what it keeps up to date.

*Source*: Linux arch/x86/kvm/cpuid.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xfast.kernels.behaviour import Behaviours
from xfast.kernels.uapi import CR4_OSXSAVE, CR4_PKE
from xfast.xsave.cpuid import Cpuid, Entry
from xfast.xsave.features import PKRU

if TYPE_CHECKING:
    from xfast.kvm.vcpu import Vcpu


XSAVEC_OR_XSAVES = 0b1010
"""CPUID leaf 0xD.1 EAX: with one of these, EBX is the size of a compacted area."""


def find(behaviours: Behaviours, cpuid: Cpuid, function: int, index: int = 0) -> Entry | None:
    """Return the entry that KVM goes by; of a leaf without sub-leaves, any will do.

    *Source*: Linux arch/x86/kvm/cpuid.c cpuid_entry2_find().
    """
    if "cpuid-index-ignored" in behaviours and function not in (7, 0xD):
        return next(cpuid.leaf(function), None)
    return cpuid.find(function, index)


def with_runtime_fields(vcpu: Vcpu, cpuid: Cpuid) -> Cpuid:
    """Return a list with the fields that KVM itself keeps up to date.

    *Source*: Linux arch/x86/kvm/cpuid.c kvm_update_cpuid_runtime().
    """
    entries = list(cpuid.entries)
    has_pku = bool(vcpu.kernel.fpu.user_cfg.max_features & PKRU)
    size = vcpu.kernel.xstate_required_size
    for leaf in ((1, 0), (7, 0), (0xD, 0), (0xD, 1)):
        entry = find(vcpu.kernel.behaviours, Cpuid(tuple(entries)), *leaf)
        if entry is None:
            continue
        at = entries.index(entry)
        if leaf == (1, 0):
            osxsave = bool(vcpu.cr4 & CR4_OSXSAVE)
            if vcpu.kernel.fpu.has_xsave:
                entry = entry._replace(ecx=entry.ecx & ~(1 << 27) | osxsave << 27)
            entry = entry._replace(edx=entry.edx | 1 << 9)  # the APIC is enabled at reset
        elif leaf == (7, 0) and has_pku:
            ospke = bool(vcpu.cr4 & CR4_PKE)
            entry = entry._replace(ecx=entry.ecx & ~(1 << 4) | ospke << 4)
        elif leaf == (0xD, 0):
            entry = entry._replace(ebx=size(vcpu.xcr0))
        elif leaf == (0xD, 1) and entry.eax & XSAVEC_OR_XSAVES:
            entry = entry._replace(ebx=size(vcpu.xcr0 | vcpu.xss, True))
        entries[at] = entry
    return Cpuid(tuple(entries))
