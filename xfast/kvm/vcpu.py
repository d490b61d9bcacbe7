"""KVM's half of the model: a vCPU, and the ioctls that touch its FPU.

Methods bear the ioctls' names. An error is an OSError with the kernel's errno, and a call that
fails has changed nothing. Buffers are struct kvm_xsave, in the host's own layout.

*Source*: Linux arch/x86/kvm/x86.c and cpuid.c; each function names its own.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from xfast.kernels.behaviour import (
    CET_S,
    CET_U,
    loaded,
    needs_permission,
    refusal,
    reported,
    user_xfeatures,
)
from xfast.kernels.guest import cr4_reserved, xcr0_problem
from xfast.kernels.uapi import (
    CR4_CET,
    CR4_OSXSAVE,
    CR4_PKE,
    KVM_EXIT_HLT,
    KVM_FPU,
    KVM_MAX_CPUID_ENTRIES,
    KVM_MAX_XCRS,
    MSR_IA32_U_CET,
    MSR_IA32_XFD,
    MSR_IA32_XFD_ERR,
    MSR_IA32_XSS,
)
from xfast.kvm.arguments import bytes_of, cpuid_of, one_area, unsigned, xcrs_of
from xfast.kvm.cpuid import find, with_runtime_fields
from xfast.kvm.fpu import FpuGuest, refuse
from xfast.kvm.module import Module
from xfast.kvm.msrs import CET_MSRS, cet_problem, store, word
from xfast.kvm.processor import Processor
from xfast.xsave.area import Areas, headers
from xfast.xsave.cpuid import Cpuid, Entry
from xfast.xsave.features import (
    KVM_XSAVE_SIZE,
    MXCSR_INIT,
    PKRU,
    PKRU_NR,
    SSE,
    X87,
    XFEATURE_MASK_MPX,
    XFEATURE_MASK_USER_DYNAMIC,
)


class Vcpu:
    """One vCPU.

    Attributes
    ----------
    cpuid : Cpuid
        What KVM_GET_CPUID2 returns.
    guest_supported_xcr0, guest_supported_xss : int
        What XCR0 and IA32_XSS may become (masks).
    xcr0, xss, pkru, cr4 : int
        The guest's registers, as KVM holds them while the guest does not run.
    has_run : bool
        Whether it has entered the guest.
    """

    def __init__(self, kernel: Module, confidential: bool, protected_vm: bool) -> None:
        self._kernel = kernel
        self._guest_fpu = kernel.fpu.fpu_alloc_guest_fpstate()
        self.guest_fpu.fpstate.is_confidential = confidential
        self.has_protected_state = protected_vm and "protected-state" in kernel.behaviours
        self.cpuid = Cpuid(())
        self.guest_supported_xcr0 = self.guest_supported_xss = 0
        self.xcr0, self.xss, self.pkru, self.cr4 = X87, 0, 0, 0
        self.has_run = False

    @property
    def kernel(self) -> Module:
        """The kernel that it is of. Raises KernelPanic if that is down."""
        self._kernel.fpu.check_alive()
        return self._kernel

    @property
    def guest_fpu(self) -> FpuGuest:
        """Its struct fpu_guest. Raises KernelPanic if the kernel is down."""
        self._kernel.fpu.check_alive()
        return self._guest_fpu

    # CPUID

    def set_cpuid2(self, entries: Cpuid | Iterable[Iterable[int]]) -> None:
        """KVM_SET_CPUID2.

        Parameters
        ----------
        entries : Cpuid, or iterable of (function, index, flags, eax, ebx, ecx, edx)

        Raises
        ------
        OSError
            E2BIG for more than 256 entries; EINVAL for a bad address width, or for another
            list once the vCPU has run; EPERM for AMX without permission.

        *Source*: Linux arch/x86/kvm/cpuid.c kvm_set_cpuid(), kvm_check_cpuid(),
        kvm_vcpu_after_set_cpuid().
        """
        entries = cpuid_of(entries)
        if len(entries.entries) > KVM_MAX_CPUID_ENTRIES:
            raise refuse(errno.E2BIG, f"{len(entries.entries)} CPUID entries")
        behaviours, fpu = self.kernel.behaviours, self.kernel.fpu
        cpuid = self._with_runtime_fields(entries)
        if self.has_run and "cpuid-frozen" in behaviours:
            stored = self._with_runtime_fields(self.cpuid)
            if "cpuid-frozen-equal" not in behaviours or cpuid != stored:
                raise refuse(errno.EINVAL, "this vCPU has run")
            return
        width = find(behaviours, cpuid, 0x80000008)
        if width and width.eax >> 8 & 0xFF not in (0, 48, 57):
            raise refuse(errno.EINVAL, f"leaf 0x80000008 has {width.eax >> 8 & 0xFF} address bits")
        fpu.fpu_enable_guest_xfd_features(self.guest_fpu, needs_permission(behaviours, cpuid.xcr0))
        self.cpuid = cpuid
        self.guest_supported_xcr0 = cpuid.xcr0 & self.kernel.supported_xcr0
        self.guest_supported_xss = cpuid.xss & self.kernel.supported_xss
        fpstate = self.guest_fpu.fpstate
        fpstate.user_xfeatures = user_xfeatures(
            behaviours, fpstate.user_xfeatures, self.guest_supported_xcr0
        )

    def get_cpuid2(self, nent: int = KVM_MAX_CPUID_ENTRIES) -> tuple[Entry, ...]:
        """KVM_GET_CPUID2: the entries, sizes of leaf 0xD as of now.

        Parameters
        ----------
        nent : int
            How many entries the caller has room for.

        Raises
        ------
        OSError
            E2BIG if there are more.

        *Source*: Linux arch/x86/kvm/cpuid.c kvm_vcpu_ioctl_get_cpuid2().
        """
        self.cpuid = self._with_runtime_fields(self.cpuid)
        if nent < len(self.cpuid.entries):
            raise refuse(errno.E2BIG, f"{len(self.cpuid.entries)} CPUID entries, room for {nent}")
        return self.cpuid.entries

    def _with_runtime_fields(self, cpuid: Cpuid) -> Cpuid:
        return with_runtime_fields(self.kernel, cpuid, xcr0=self.xcr0, xss=self.xss, cr4=self.cr4)

    def set_cr4(self, value: int) -> None:
        """Set CR4 (KVM_SET_SREGS, all other registers as they are).

        Raises
        ------
        OSError
            EINVAL for a bit that the host's CPU or the guest's CPUID does not have.

        *Source*: Linux arch/x86/kvm/x86.c kvm_is_valid_cr4(), x86.h __cr4_reserved_bits().
        """
        unsigned(value, 64, "CR4")
        host, guest = self.kernel.host.features, self.cpuid.features
        reserved = cr4_reserved(guest) if self.cpuid.entries else 0
        if host is not None:
            reserved |= cr4_reserved(host)
        if not self.kernel.supported_xss:
            reserved |= CR4_CET
        if value & reserved:
            raise refuse(errno.EINVAL, f"CR4 {value:#x}: CPUID does not have {value & reserved:#x}")
        self.cr4 = value

    def _out_of_reach(self) -> bool:
        """Return whether KVM can't read the state; raise EINVAL where that is an error."""
        if not self.guest_fpu.fpstate.is_confidential:
            return False
        if self.has_protected_state:
            raise refuse(errno.EINVAL, "the guest's state is protected")
        return True

    # XSAVE areas

    def get_xsave(self, out: Any = None) -> bytes:
        """KVM_GET_XSAVE: 4096 bytes, in the host's standard layout.

        Parameters
        ----------
        out : writable buffer, optional
            Where userspace wants them.

        Raises
        ------
        OSError
            EINVAL if the vCPU's area is larger (AMX), EFAULT if `out` is too short or read-only.

        *Source*: Linux arch/x86/kvm/x86.c kvm_vcpu_ioctl_x86_get_xsave().
        """
        if self.guest_fpu.uabi_size > KVM_XSAVE_SIZE:
            raise refuse(errno.EINVAL, f"the area has {self.guest_fpu.uabi_size} bytes")
        return self._get_xsave(KVM_XSAVE_SIZE, out)

    def get_xsave2(self, out: Any = None) -> bytes:
        """KVM_GET_XSAVE2: as `get_xsave`, but all the bytes that the vCPU's area has."""
        if "xsave2" not in self.kernel.behaviours:
            raise refuse(errno.EINVAL, "KVM_GET_XSAVE2 came with Linux 5.17")
        return self._get_xsave(self.guest_fpu.uabi_size, out)

    def _get_xsave(self, size: int, out: Any) -> bytes:
        guest = self.guest_fpu
        mask = reported(
            self.kernel.behaviours, guest.fpstate.user_xfeatures, self.guest_supported_xcr0
        )
        if self._out_of_reach():
            area = np.zeros(size, np.uint8)
        else:
            area = self.kernel.fpu.fpu_copy_guest_fpstate_to_uabi(guest, size, mask, self.pkru)
        if out is not None:
            view = bytes_of(out)
            if view.readonly or len(view) < size:
                raise refuse(errno.EFAULT, f"expected {size} writable bytes")
            view[:size] = area.data
        return area.tobytes()

    def set_xsave(self, buffer: Any) -> None:
        """KVM_SET_XSAVE.

        Parameters
        ----------
        buffer : (size,) uint8, or buffer
            In the host's standard layout; bytes after the vCPU's own size are not looked at.

        Raises
        ------
        OSError
            EFAULT if the buffer is shorter than the vCPU's area; EINVAL if it breaks a rule,
            see `xfast.kernels.behaviour.refusal`.

        *Source*: Linux arch/x86/kvm/x86.c kvm_vcpu_ioctl_x86_set_xsave().
        """
        size, kernel, fpstate = self.guest_fpu.uabi_size, self.kernel, self.guest_fpu.fpstate
        row = one_area(buffer)
        if len(row) < size:
            raise refuse(errno.EFAULT, f"expected {size} readable bytes, got {len(row)}")
        if self._out_of_reach():
            return
        row = self._parse(row[:size])
        header = headers(row)
        broken = refusal(
            kernel.behaviours,
            xstate_bv=header.xstate_bv,
            xcomp_bv=header.xcomp_bv,
            reserved=header.reserved,
            mxcsr=header.mxcsr,
            user=fpstate.user_xfeatures,
            kvm_xcr0=kernel.supported_xcr0,
            mxcsr_mask=kernel.fpu.mxcsr_mask,
            xsave=kernel.fpu.has_xsave,
        )
        if broken:
            raise refuse(errno.EINVAL, f"{broken.rule} {broken.bits:#x}")
        kernel.fpu.fpu_copy_uabi_to_guest_fpstate(self.guest_fpu, row)
        if header.xstate_bv & PKRU:
            at = kernel.fpu.layout.slot(PKRU_NR).offset
            self.pkru = int(row[at : at + 4].view("<u4")[0])

    def _parse(self, row: Areas) -> Areas:
        """Return a buffer as KVM_SET_XSAVE goes on with it: XFD may clear bits of the header."""
        header = headers(row)
        kept = loaded(self.kernel.behaviours, header.xstate_bv, self.guest_fpu.fpstate.xfd)
        if kept != header.xstate_bv:
            row = row.copy()
            row[512:520].view("<u8")[0] = kept
        return row

    # XCR0

    def get_xcrs(self) -> list[tuple[int, int]]:
        """KVM_GET_XCRS: [(0, XCR0)], or nothing on a host without XSAVE."""
        return [(0, self.xcr0)] if self.kernel.fpu.has_xsave else []

    def set_xcrs(
        self, xcrs: Iterable[tuple[int, int]], *, nr: int | None = None, flags: int = 0
    ) -> None:
        """KVM_SET_XCRS.

        Parameters
        ----------
        xcrs : iterable of (number, value)
        nr : int, optional
            nr_xcrs, if it is to differ from their count; struct kvm_xcrs has zeros after them.

        Raises
        ------
        OSError
            EINVAL without XSAVE, for more than 16 registers, flags, or an XCR0 that the guest
            may not have.

        *Source*: Linux arch/x86/kvm/x86.c kvm_vcpu_ioctl_x86_set_xcrs().
        """
        rows, nr, flags = xcrs_of(xcrs, nr, flags)
        if not self.kernel.fpu.has_xsave or nr > KVM_MAX_XCRS or flags:
            raise refuse(errno.EINVAL, f"nr_xcrs {nr}, flags {flags:#x}")
        rows += [(0, 0)] * (nr - len(rows))
        value = next((value for number, value in rows[:nr] if number == 0), None)
        if value is not None:
            problem = xcr0_problem(value, self.xcr0_limit)
            if problem:
                raise refuse(errno.EINVAL, f"XCR0 {value:#x}: {problem}")
            self.xcr0 = value

    def xsetbv(self, index: int, value: int, *, cpl: int = 0) -> bool:
        """Take the guest's XSETBV; return whether it was taken, or else raised #GP there.

        *Source*: Linux arch/x86/kvm/x86.c kvm_emulate_xsetbv().
        """
        if cpl or index or xcr0_problem(unsigned(value, 64, "XCR0"), self.xcr0_limit):
            return False
        self.xcr0 = value
        if self.guest_fpu.fpstate.in_use:
            self.kernel.fpu.processor.xcr0 = value
        return True

    @property
    def xcr0_limit(self) -> int:
        """The bits that XCR0 may have (mask); IA32_XFD, the dynamic ones of them."""
        behaviours = self.kernel.behaviours
        if "xcr0-by-user-xfeatures" in behaviours and "guest-supported-xcr0" not in behaviours:
            return self.guest_fpu.fpstate.user_xfeatures
        return self.guest_supported_xcr0

    # x87 and SSE, the old way

    def get_fpu(self) -> bytes:
        """KVM_GET_FPU: struct kvm_fpu, straight from the image; XSTATE_BV does not matter.

        *Source*: Linux arch/x86/kvm/x86.c kvm_arch_vcpu_ioctl_get_fpu().
        """
        regs = self.guest_fpu.fpstate.regs
        if self._out_of_reach():
            return bytes(KVM_FPU.size)
        fcw, fsw, ftw, fop, fip, fdp = struct.unpack("<HHBxHQQ", regs[:24].tobytes())
        st, xmm = regs[32:160].tobytes(), regs[160:416].tobytes()
        return KVM_FPU.pack(st, fcw, fsw, ftw, fop, fip, fdp, xmm, 0)

    def set_fpu(self, buffer: Any) -> None:
        """KVM_SET_FPU: struct kvm_fpu (416 bytes) into the image; MXCSR is ignored.

        Raises
        ------
        OSError
            EFAULT if `buffer` is shorter.
        """
        data = bytes_of(buffer)
        if len(data) < KVM_FPU.size:
            raise refuse(errno.EFAULT, f"expected {KVM_FPU.size} readable bytes, got {len(data)}")
        if self._out_of_reach():
            return
        st, fcw, fsw, ftw, fop, fip, fdp, xmm, _ = KVM_FPU.unpack_from(data)
        regs = self.guest_fpu.fpstate.regs
        head = struct.pack("<HHBxHQQ", fcw, fsw, ftw, fop, fip, fdp)
        for at, part in ((0, head), (32, st), (160, xmm)):
            regs[at : at + len(part)] = np.frombuffer(part, np.uint8)

    @property
    def mxcsr(self) -> int:
        """MXCSR as the guest will find it at the next entry.

        *Source*: Intel SDM vol. 1 section 13.8: a compacted area has it as a part of SSE.
        """
        fpstate = self.guest_fpu.fpstate
        if self.kernel.fpu.compacted and not fpstate.xstate_bv & SSE:
            return MXCSR_INIT
        return int(headers(fpstate.regs).mxcsr)

    # MSRs

    def get_msr(self, index: int) -> int:
        """Read IA32_XFD, IA32_XFD_ERR, IA32_XSS or a CET MSR (KVM_GET_MSRS of one)."""
        if index in CET_MSRS:
            nr, at = self._cet(index)
            return int(self._with_guest_fpu(lambda p: word(p, nr, at)[0]))
        guest = self.guest_fpu
        msrs = {
            MSR_IA32_XFD: guest.fpstate.xfd,
            MSR_IA32_XFD_ERR: guest.xfd_err,
            MSR_IA32_XSS: self.xss,
        }
        self._check_msr(index, 0, known=msrs)
        return msrs[index]

    def set_msr(self, index: int, value: int) -> None:
        """Write an MSR of those that `get_msr` reads (KVM_SET_MSRS of one).

        Raises
        ------
        OSError
            EINVAL where KVM_SET_MSRS would not take it, and the guest would get #GP.

        *Source*: Linux arch/x86/kvm/x86.c kvm_set_msr_common(), kvm_set_xstate_msr().
        """
        unsigned(value, 64, f"MSR {index:#x}")
        if index in CET_MSRS:
            nr, at = self._cet(index)
            problem = cet_problem(index, value, self._cet_features, self.kernel.linear_bits)
            if problem:
                raise refuse(errno.EINVAL, f"MSR {index:#x} can't be {value:#x}: {problem}")
            self._with_guest_fpu(lambda p: store(p, nr, at, value))
            return
        dynamic = self.xcr0_limit & XFEATURE_MASK_USER_DYNAMIC
        limits = {
            MSR_IA32_XFD: dynamic,
            MSR_IA32_XFD_ERR: dynamic,
            MSR_IA32_XSS: self.guest_supported_xss,
        }
        self._check_msr(index, value, known=limits)
        if index == MSR_IA32_XFD:
            self.kernel.fpu.fpu_update_guest_xfd(self.guest_fpu, value)
        elif index == MSR_IA32_XFD_ERR:
            self.guest_fpu.xfd_err = value
        else:
            self.xss = value

    def _check_msr(self, index: int, value: int, known: dict[int, int]) -> None:
        xfd = index in (MSR_IA32_XFD, MSR_IA32_XFD_ERR)
        if index not in known or (xfd and "kvm-xfd" not in self.kernel.behaviours):
            raise refuse(errno.EINVAL, f"MSR {index:#x} is not here")
        if value & ~known[index] and value:
            raise refuse(errno.EINVAL, f"MSR {index:#x} can't be {value:#x}")

    @property
    def _cet_features(self) -> frozenset[str]:
        """Which of CET's two features the guest has."""
        offered = self.kernel.supported_xss & CET_U
        return self.cpuid.features & {"user_shstk", "ibt"} if offered else frozenset()

    def _cet(self, index: int) -> tuple[int, int]:
        """Return where a CET MSR is; of the two features, its own must be the guest's."""
        needed = {"user_shstk", "ibt"} if index == MSR_IA32_U_CET else {"user_shstk"}
        if not needed & self._cet_features:
            raise refuse(errno.EINVAL, f"MSR {index:#x} is not here")
        return CET_MSRS[index]

    def _with_guest_fpu(self, action: Callable[[Processor], Any]) -> Any:
        """Do something to the registers while they are the guest's."""
        fpu = self.kernel.fpu
        if self.guest_fpu.fpstate.in_use:
            return action(fpu.processor)
        fpu.fpu_swap_kvm_fpstate(self.guest_fpu, True)
        try:
            return action(fpu.processor)
        finally:
            fpu.fpu_swap_kvm_fpstate(self.guest_fpu, False)

    # running

    def run(
        self, guest: Callable[[Processor], Any] | None = None, *, immediate_exit: bool = False
    ) -> int:
        """KVM_RUN: enter the guest until it halts.

        Parameters
        ----------
        guest : callable, optional
            What the guest does to the processor: execute instructions of
            `xfast.kvm.instructions`, or write registers with `Processor.write`, which also
            marks them as in use and modified; the CPU's saves go by these marks. Default: HLT
            at once.
        immediate_exit : bool
            kvm_run.immediate_exit: swap the FPU and return without an entry.

        Returns
        -------
        int
            KVM_EXIT_HLT.

        Raises
        ------
        OSError
            EINTR for an immediate exit.

        *Source*: Linux arch/x86/kvm/x86.c kvm_arch_vcpu_ioctl_run(), vcpu_enter_guest().
        """
        self._with_guest_fpu(lambda p: None if immediate_exit else self._enter(p, guest))
        if immediate_exit:
            raise refuse(errno.EINTR, "immediate_exit")
        return KVM_EXIT_HLT

    def _enter(self, processor: Processor, guest: Callable[[Processor], Any] | None) -> None:
        """Switch what KVM switches around the entry: XCR0, IA32_XSS and PKRU.

        *Source*: Linux arch/x86/kvm/x86.c kvm_load_guest_xsave_state(),
        kvm_load_host_xsave_state().
        """
        fpu = self.kernel.fpu
        self.has_run = True
        host = processor.xcr0, processor.xss, processor.cpl
        has_pku = bool(fpu.user_cfg.max_features & PKRU)
        host_pkru = fpu.rdpkru() if has_pku else 0
        if self.cr4 & CR4_OSXSAVE:
            processor.xcr0, processor.xss = self.xcr0, self.xss
        switches = has_pku and bool(self.xcr0 & PKRU or self.cr4 & CR4_PKE)
        if switches and self.pkru != host_pkru:
            fpu.wrpkru(self.pkru)
        try:
            if guest:
                guest(processor)
        finally:
            if fpu.user_cfg.max_features & XFEATURE_MASK_USER_DYNAMIC:
                # fpu_sync_guest_vmexit_xfd_state(): the guest may write the MSR without an exit
                self.guest_fpu.fpstate.xfd = processor.xfd
            if switches:
                self.pkru = fpu.rdpkru()
                if self.pkru != host_pkru:
                    fpu.wrpkru(host_pkru)
            processor.xcr0, processor.xss, processor.cpl = host

    def init(self) -> None:
        """Take an INIT: registers other than CPUID's and most of the FPU's start anew.

        *Source*: Linux arch/x86/kvm/x86.c kvm_vcpu_reset(), kvm_xstate_reset().
        """
        supported = self.kernel.supported_xcr0 | self.kernel.supported_xss
        zeroed = XFEATURE_MASK_MPX
        if "init-by-features" in self.kernel.behaviours:
            zeroed |= CET_U | CET_S
        self.kernel.fpu.zero(self.guest_fpu, supported & zeroed)
        self.cr4 = 0
