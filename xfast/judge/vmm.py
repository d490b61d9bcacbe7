"""Which call of a VMM fails first, and the text that it prints then.

A VMM sets a vCPU's state call by call, and stops at the first that KVM refuses. KVM_SET_SREGS
comes before KVM_SET_XSAVE, so a CR4 that the host can't have hides what the area would have met.

*Source*: QEMU target/i386/kvm/kvm.c kvm_arch_put_registers(); Firecracker
src/vmm/src/arch/x86_64/vcpu.rs KvmVcpu::restore_state(); Cloud Hypervisor
hypervisor/src/kvm/mod.rs KvmVcpu::set_state().
"""

from __future__ import annotations

_EINVAL = "Invalid argument (os error 22)"
_QEMU_8_2 = "Failed to put registers after init: Invalid argument"
_QEMU_9_2 = "Putting registers after init: Failed to set {}: Invalid argument"
_SILENT = "nothing: the guest goes on without its x87, SSE and AVX state, and without XCR0"

TEXTS: dict[str, dict[str, str]] = {
    "KVM_SET_SREGS": {
        "QEMU to 8.1": _SILENT,
        "QEMU 8.2 to 9.1": _QEMU_8_2,
        "QEMU 9.2 and later": _QEMU_9_2.format("special registers"),
        "Firecracker": f"Failed to set KVM vcpu sregs: {_EINVAL}",
        "Cloud Hypervisor": f"Could not set the vCPU state SetSpecialRegs({_EINVAL})",
    },
    "KVM_SET_XSAVE": {
        "QEMU to 8.1": _SILENT,
        "QEMU 8.2 to 9.1": _QEMU_8_2,
        "QEMU 9.2 and later": _QEMU_9_2.format("XSAVE"),
        "Firecracker": f"Failed to set KVM vcpu xsave: {_EINVAL}",
        "Cloud Hypervisor": f"Could not set the vCPU state SetXsaveState({_EINVAL})",
    },
    "KVM_SET_XCRS": {
        "QEMU to 8.1": "nothing: the guest goes on without its XCR0",
        "QEMU 8.2 to 9.1": _QEMU_8_2,
        "QEMU 9.2 and later": _QEMU_9_2.format("XCRs"),
        "Firecracker": f"Failed to set KVM vcpu xcrs: {_EINVAL}",
        "Cloud Hypervisor": f"Could not set the vCPU state SetXcrs({_EINVAL})",
    },
    "KVM_SET_MSRS": {
        "QEMU": "error: failed to set MSR 0xda0 to 0x{xss:x}",
    },
    "KVM_SET_CPUID2": {
        "Cloud Hypervisor": "SetCpuid(Operation not permitted (os error 1))",
    },
}
"""{call: {program: what it prints}}; a program of which nobody knows its text is left out."""

PROGRAMS = {"qemu": "QEMU", "cloud-hypervisor": "Cloud Hypervisor", "firecracker": "Firecracker"}
"""The programs that load a format, by the beginning of their names in TEXTS."""


def texts(call: str, form: str, xss: int) -> dict[str, str]:
    """Return {program: what it prints}; of a snapshot's format, if that tells who loads it."""
    told = TEXTS[call]
    program = PROGRAMS.get(form, "")
    mine = {name: text for name, text in told.items() if name.startswith(program)}
    return {name: text.format(xss=xss) for name, text in (mine or told).items()}
