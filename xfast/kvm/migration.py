"""What a VMM does when it moves a vCPU to another host, and what the guest has afterwards."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np

from xfast.hosts.model import Host
from xfast.kernels.behaviour import Behaviours
from xfast.kernels.uapi import MSR_IA32_XFD, MSR_IA32_XFD_ERR, MSR_IA32_XSS
from xfast.kvm.fpu import ARCH_REQ_XCOMP_GUEST_PERM
from xfast.kvm.kernel import Kernel
from xfast.kvm.vcpu import Vcpu
from xfast.xsave import area
from xfast.xsave.features import (
    KVM_XSAVE_SIZE,
    PKRU,
    SSE,
    TILEDATA,
    XFEATURE_MASK_FPSSE,
    XFEATURE_MASK_USER_DYNAMIC,
    names_of,
)
from xfast.xsave.layout import Layout

MSRS = {"IA32_XSS": MSR_IA32_XSS, "IA32_XFD": MSR_IA32_XFD, "IA32_XFD_ERR": MSR_IA32_XFD_ERR}
"""What belongs to the FPU, besides CET's, of the MSRs that KVM tells VMMs to save.

*Source*: Linux arch/x86/kvm/x86.c msrs_to_save_base.
"""


class Vmm(NamedTuple):
    """How a VMM restores a vCPU.

    The MSRs of MSRS are put where the source's kernel has them; those of CET are left out, as
    by VMMs of before Linux 6.18. That Firecracker's own list of MSRs names them is inferred.

    `portable`: it stores registers and builds the area in the target's layout; otherwise it
    passes the source's bytes. `stops`: it gives up when a call fails; otherwise it starts the
    guest, with whatever has been set by then.
    """

    name: str
    order: tuple[str, ...]
    portable: bool
    stops: bool
    source: str


_ORDER = ("set_cpuid2", "set_xsave", "set_xcrs", "set_msrs")
_THEN_FPU = ("set_cpuid2", "set_xsave", "set_xcrs", "set_fpu", "set_msrs")

_VMMS = (
    Vmm("qemu-7.2", _ORDER, True, False, "QEMU 7.2 target/i386/kvm/kvm.c kvm_arch_put_registers()"),
    Vmm("qemu", _ORDER, True, True, "QEMU 11 accel/kvm/kvm-all.c: a failed put is fatal"),
    Vmm("firecracker", _ORDER, False, True, "Firecracker src/vmm vcpu restore_state()"),
    Vmm(
        "cloud-hypervisor",
        _THEN_FPU,
        False,
        True,
        "Cloud Hypervisor src/kvm set_state()",
    ),
)

VMMS: dict[str, Vmm] = {vmm.name: vmm for vmm in _VMMS}


class Migration(NamedTuple):
    """How a migration went.

    Parameters
    ----------
    vcpu : Vcpu or None
        The vCPU on the target; None where the VMM gave up.
    failed : str
        The call that failed, and its error; empty where none did.
    xstate_bv : int
        XSTATE_BV of the area that went over (mask).
    lost : int
        Components whose values the guest had and no longer has (mask).
    xcr0_lost : int
        XCR0 bits that it had and no longer has (mask).
    registers_lost : tuple of str
        ``MXCSR`` or names of MSRS: registers that had another value. MXCSR is named where the
        rest of SSE is as it was.
    """

    vcpu: Vcpu | None
    failed: str
    xstate_bv: int
    lost: int
    xcr0_lost: int
    registers_lost: tuple[str, ...] = ()

    @property
    def silent(self) -> bool:
        """Whether the guest runs, and has lost something."""
        return self.vcpu is not None and bool(self.lost or self.xcr0_lost or self.registers_lost)

    def __str__(self) -> str:
        if self.vcpu is None:
            return f"failed: {self.failed}"
        if self.silent:
            gone = names_of(self.lost) if self.lost else ""
            xcr0 = f"XCR0 bits {self.xcr0_lost:#x}" if self.xcr0_lost else ""
            what = ", ".join(filter(None, (gone, xcr0, *self.registers_lost)))
            why = f" ({self.failed})" if self.failed else ""
            return f"reported as done, lost {what}{why}"
        return "done"


def migrate(
    vcpu: Vcpu,
    other_host: Host,
    vmm: str = "qemu",
    *,
    kernel: Behaviours | str | None = None,
) -> Migration:
    """Move a vCPU to another host, as a VMM does.

    Parameters
    ----------
    vcpu : Vcpu
        Stays as it is.
    other_host : Host
    vmm : str
        Of VMMS: ``qemu``, ``qemu-7.2`` (which starts the guest anyway when a call
        fails), ``firecracker``, ``cloud-hypervisor``.
    kernel : Behaviours or str, optional
        Of the target; default: the host's.

    Raises
    ------
    ValueError
        If there is no such VMM.

    *Source*: the functions that VMMS names.
    """
    if vmm not in VMMS:
        raise ValueError(f"vmm: expected one of {', '.join(VMMS)}, got {vmm!r}")
    how = VMMS[vmm]
    here, there = vcpu.kernel, Kernel(other_host, kernel)
    saved = np.frombuffer(vcpu.get_xsave2() if here.xsave2_size else vcpu.get_xsave(), np.uint8)
    if vcpu.cpuid.xcr0 & XFEATURE_MASK_USER_DYNAMIC:
        with contextlib.suppress(OSError):  # SET_CPUID2 will then say EPERM
            there.arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM, TILEDATA.bit_length() - 1)
    target = there.create_vcpu()
    size = max(target.guest_fpu.uabi_size, there.xsave2_size, KVM_XSAVE_SIZE, len(saved))
    arguments = {
        "set_cpuid2": vcpu.cpuid,
        "set_xsave": sent(saved, here.fpu.layout, there.fpu.layout, size, portable=how.portable),
        "set_xcrs": vcpu.get_xcrs(),
        "set_fpu": vcpu.get_fpu(),
        "set_msrs": {index: value for name, index in MSRS.items() if (value := _msr(vcpu, name))},
    }
    failed = ""
    for call in how.order:
        try:
            _put(target, call, arguments[call])
        except OSError as refused:
            failed = f"KVM_{call.upper()}: {refused.strerror} ({refused.filename})"
            break
    lost = _lost(vcpu, target)
    xcr0_lost = vcpu.xcr0 & ~target.xcr0
    bv = area.headers(saved).xstate_bv
    registers = _registers_lost(vcpu, target, lost)
    left = None if failed and how.stops else target
    return Migration(left, failed, bv, lost, xcr0_lost, registers)


def _put(target: Vcpu, call: str, argument: Any) -> None:
    if call != "set_msrs":
        getattr(target, call)(argument)
        return
    for index, value in argument.items():
        target.set_msr(index, value)


def _msr(vcpu: Vcpu, name: str) -> int:
    """Return an MSR of MSRS; 0 where the kernel does not have it."""
    try:
        return vcpu.get_msr(MSRS[name])
    except OSError:
        return 0


def sent(
    saved: area.Areas, layout: Layout, target: Layout, size: int, *, portable: bool
) -> area.Areas:
    """Return the `size` bytes that a VMM passes to KVM_SET_XSAVE for a saved area.

    A portable VMM (QEMU) builds the area with the target's offsets and sends XSTATE_BV over as
    it is: a component that the target has no place for keeps its bit and loses its data.
    Others pass on the saved bytes.

    *Source*: QEMU target/i386/xsave_helper.c x86_cpu_xsave_all_areas().
    """
    if not portable:
        out: area.Areas = area.empty(1, size)[0]
        out[: len(saved)] = saved
        return out
    out = area.relayout(saved, layout, target, size=size, lossy=True)
    out[512:520] = saved[512:520]
    return out


def _lost(source: Vcpu, target: Vcpu) -> int:
    """Return the guest's components that differ between two vCPUs (mask).

    What the image holds beyond the guest's CPUID was never the guest's.
    """
    mine = source.guest_supported_xcr0 | XFEATURE_MASK_FPSSE | source.guest_supported_xss
    one, two = source.guest_fpu.fpstate, target.guest_fpu.fpstate
    differ: int = area.diff(one.regs, two.regs, source.kernel.fpu.layout, target.kernel.fpu.layout)
    pkru = PKRU if source.pkru != target.pkru else 0
    return mine & one.xstate_bv & ~PKRU & differ | mine & pkru


def _registers_lost(source: Vcpu, target: Vcpu, lost: int) -> tuple[str, ...]:
    """Return the names of registers that differ between two vCPUs and are no component."""
    names = [name for name in MSRS if _msr(source, name) != _msr(target, name)]
    if not lost & SSE and source.mxcsr != target.mxcsr:
        names.insert(0, "MXCSR")
    return tuple(names)
