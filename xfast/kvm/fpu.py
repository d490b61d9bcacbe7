"""The FPU core's half of the model: what arch/x86/kernel/fpu does for a guest.

Containers, permissions and the swap, in the kernel's names. A register image is a real XSAVE
area in the host's layout and format; the registers are a `xfast.processor.Processor`, moved by
the instructions of `xfast.kvm.instructions`; user buffers are moved by the engine.

*Source*: Linux arch/x86/kernel/fpu/core.c and xstate.c; each function names its own.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from xfast.errors import XfastError
from xfast.hosts.model import Host
from xfast.hosts.silicon import family_and_model
from xfast.kernels.behaviour import (
    CET_S,
    Behaviours,
    supervisor_kept,
    supervisor_supported,
    user_supported,
)
from xfast.kvm.arguments import check_host, unsigned
from xfast.kvm.instructions import Fault, xrstor, xrstors, xsave, xsavec, xsaveopt, xsaves
from xfast.kvm.processor import Cpu, Processor, cpu_by_model
from xfast.xsave import area
from xfast.xsave.area import Areas
from xfast.xsave.features import (
    FCW_INIT,
    HEADER_OFFSET,
    KVM_XSAVE_SIZE,
    LEGACY_SIZE,
    MXCSR_INIT,
    PKRU,
    PKRU_DEFAULT,
    PKRU_NR,
    XCOMP_BV_COMPACTED,
    XFEATURE_MASK_FPSSE,
    XFEATURE_MASK_USER_DYNAMIC,
    bits,
)
from xfast.xsave.layout import Layout

FPU_GUEST_PERM_LOCKED = 1 << 63
ARCH_GET_XCOMP_SUPP = 0x1021
ARCH_GET_XCOMP_PERM = 0x1022
ARCH_REQ_XCOMP_PERM = 0x1023
ARCH_GET_XCOMP_GUEST_PERM = 0x1024
ARCH_REQ_XCOMP_GUEST_PERM = 0x1025

NO_FCS_FDS = 1 << 13
"""CPUID leaf 7 EBX: the CPU deprecates FCS and FDS."""


class KernelPanic(XfastError):
    """What was asked for would bring the host down."""


def refuse(code: int, why: str) -> OSError:
    """Return the OSError for an errno; `why` takes the place of a file name."""
    return OSError(code, os.strerror(code), why)


class Config(NamedTuple):
    """struct fpu_state_config: components (masks) and the bytes of a buffer for the default."""

    max_features: int
    default_features: int
    default_size: int


@dataclass
class Permission:
    """struct fpu_state_perm: what a process may use, and the sizes that go with it."""

    state_perm: int
    state_size: int
    user_state_size: int


@dataclass
class Fpstate:
    """struct fpstate: one register image.

    Attributes
    ----------
    regs : (size,) uint8
        An XSAVE area, 4 KiB aligned, at least a page.
    size, user_size : int
        Bytes of the image, and of it in standard format.
    xfeatures, user_xfeatures : int
        Components with storage, and those valid in a user buffer (masks).
    xfd : int
        IA32_XFD that belongs to it.
    """

    regs: Areas
    size: int
    user_size: int
    xfeatures: int
    user_xfeatures: int
    xfd: int = 0
    is_guest: bool = False
    is_confidential: bool = False
    in_use: bool = False
    address: int = field(init=False)

    def __post_init__(self) -> None:
        self.address = self.regs.ctypes.data

    @property
    def xstate_bv(self) -> int:
        """XSTATE_BV of the image."""
        return int(self.regs[HEADER_OFFSET : HEADER_OFFSET + 8].view("<u8")[0])

    @xstate_bv.setter
    def xstate_bv(self, value: int) -> None:
        self.regs[HEADER_OFFSET : HEADER_OFFSET + 8].view("<u8")[0] = value


@dataclass
class FpuGuest:
    """struct fpu_guest: a vCPU's FPU. `uabi_size` is what its user buffers measure, in bytes."""

    fpstate: Fpstate
    xfeatures: int
    uabi_size: int
    xfd_err: int = 0


def cpu_of(host: Host) -> Cpu:
    """Return the CPU that a host describes, with what is known of its like."""
    if host.layout is None or host.mxcsr_mask is None:
        raise ValueError(f"host {host.name}: expected layout and mxcsr_mask, got less")
    signature = host.cpuid.signature if host.cpuid else None
    model = (None, None) if signature is None else family_and_model(signature)
    cpu = replace(
        cpu_by_model(host.vendor, *model),
        name=host.name,
        layout=host.layout,
        xsave=host.xsave & {"xsaveopt", "xsavec", "xgetbv1", "xsaves"},
        mxcsr_mask=host.mxcsr_mask,
    )
    if host.x87_pointer_bits is not None:
        cpu = replace(cpu, x87_pointer_bits=host.x87_pointer_bits)
    leaf7 = host.cpuid.find(7) if host.cpuid else None
    if leaf7 is not None:
        cpu = replace(cpu, keeps_x87_selectors=not leaf7.ebx & NO_FCS_FDS)
    return replace(cpu, linear_bits=linear_bits(host))


def linear_bits(host: Host) -> int:
    """Return the bits of a linear address, by CPUID: 57 with LA57, otherwise 48.

    *Source*: Linux arch/x86/kvm/x86.h max_host_virt_addr_bits(), since 9245fd6b8531 (in v6.13).
    """
    return 57 if "la57" in (host.features or ()) else 48


class Fpu:
    """The FPU core of one booted kernel, and one thread on it: the one that drives the vCPUs.

    Parameters
    ----------
    host : Host
    behaviours : Behaviours
    processor : Processor, optional
        The CPU to run on; default: one as the host describes it.

    Attributes
    ----------
    need_fpu_load : bool
        TIF_NEED_FPU_LOAD: whether the thread's registers are in memory when it makes an ioctl.
        An interrupt or another thread decides that; a kernel can't be relied on for either.
    panic : KernelPanic or None
        What brought the host down; nothing more can be asked of it.

    Raises
    ------
    ValueError
        If the host does not say what a kernel must know: layout, XCR0, MXCSR_MASK; or if one
        of its masks can't be.

    *Source*: Linux arch/x86/kernel/fpu/xstate.c fpu__init_system_xstate().
    """

    def __init__(self, host: Host, behaviours: Behaviours, processor: Processor | None) -> None:
        if host.layout is None or host.xcr0 is None or host.mxcsr_mask is None:
            raise ValueError(f"host {host.name}: expected layout, xcr0 and mxcsr_mask, got less")
        check_host(host)
        self.behaviours = behaviours
        self.panic: KernelPanic | None = None
        self.need_fpu_load = True
        self.layout: Layout = host.layout
        self.mxcsr_mask: int = host.mxcsr_mask
        self.has_xsave = host.uses_xsave(behaviours)
        user = (host.enabled_by(behaviours) or 0) & user_supported(behaviours)
        self.has_xsaves = self.has_xsave and "xsaves" in host.xsave
        supervisor = (host.xss or 0) & supervisor_supported(behaviours) if self.has_xsaves else 0
        self.has_xsavec = "xsavec" in host.xsave and "kernel-xsavec" in behaviours
        self.compacted = self.has_xsave and (self.has_xsaves or self.has_xsavec)
        self.has_xsaveopt = "xsaveopt" in host.xsave
        guest = (user | supervisor) & ~XFEATURE_MASK_USER_DYNAMIC
        default = guest & ~CET_S
        self.kernel_cfg = self._config(user | supervisor, default)
        self.guest_cfg = self._config(
            user | supervisor, guest if "guest-defaults" in behaviours else default
        )
        self.user_cfg = Config(
            user,
            user & ~XFEATURE_MASK_USER_DYNAMIC,
            self.layout.standard_size(user & ~XFEATURE_MASK_USER_DYNAMIC),
        )
        self.perm = self._permission(default)
        self.guest_perm = self._permission(self.guest_cfg.default_features)
        self.processor = processor or Processor(cpu_of(host), user, supervisor)
        self.processor.cpl = 0
        self.task = self._fpstate(default, self.user_cfg.default_features)
        self.task.xfd = user & XFEATURE_MASK_USER_DYNAMIC
        self.processor.xfd = self.task.xfd
        self.fpstate = self.task
        if user & PKRU:
            self.wrpkru(PKRU_DEFAULT)

    def _config(self, maximum: int, default: int) -> Config:
        return Config(maximum, default, self.image_size(default))

    def _permission(self, mask: int) -> Permission:
        return Permission(mask, self.image_size(mask), self.layout.standard_size(mask))

    def image_size(self, mask: int) -> int:
        """Return the bytes of a kernel image with the components of `mask`."""
        return (
            self.layout.compacted_size(mask) if self.compacted else self.layout.standard_size(mask)
        )

    def _fpstate(self, xfeatures: int, user_xfeatures: int) -> Fpstate:
        """Allocate an image as vzalloc() and fpstate_init_user() leave it.

        *Source*: Linux arch/x86/kernel/fpu/core.c __fpstate_reset(), fpstate_init_user().
        """
        size = self.image_size(xfeatures)
        regs = area.empty(1, max(size, KVM_XSAVE_SIZE))[0]
        if self.compacted:
            regs[520:528].view("<u8")[0] = xfeatures | XCOMP_BV_COMPACTED
        regs[:2].view("<u2")[0] = FCW_INIT
        regs[24:28].view("<u4")[0] = MXCSR_INIT
        return Fpstate(
            regs, size, self.layout.standard_size(user_xfeatures), xfeatures, user_xfeatures
        )

    def check_alive(self) -> None:
        """Raise KernelPanic again if there was one."""
        if self.panic:
            raise KernelPanic(f"the host is down: {self.panic}")

    def _pkru(self) -> Areas:
        """Return the PKRU register, (1,) u32; ValueError where the CPU has none."""
        at = self.processor.offsets.get(9)
        if at is None:
            raise ValueError(f"pkru: {self.processor.cpu.name} has none")
        return self.processor.values[at : at + 4].view("<u4")

    def rdpkru(self) -> int:
        """Return the PKRU register."""
        return int(self._pkru()[0])

    def wrpkru(self, value: int) -> None:
        """Write the PKRU register (u32)."""
        self._pkru()[0] = unsigned(value, 32, "PKRU")
        self.processor.tracked |= PKRU
        self.processor.xmodified |= PKRU

    def arch_prctl(self, code: int, arg: int = 0) -> int:
        """Ask for, or about, dynamic components; return the mask that an ARCH_GET stores.

        Raises
        ------
        OSError
            EINVAL for a code or number that this kernel does not know, EOPNOTSUPP for one that
            nobody can ask for, EBUSY for guests once the process has a vCPU.

        *Source*: Linux arch/x86/kernel/fpu/xstate.c fpu_xstate_prctl(),
        xstate_request_perm(), __xstate_request_perm().
        """
        guest = code in (ARCH_GET_XCOMP_GUEST_PERM, ARCH_REQ_XCOMP_GUEST_PERM)
        known = "guest-permission" if guest else "dynamic-features"
        if not ARCH_GET_XCOMP_SUPP <= code <= ARCH_REQ_XCOMP_GUEST_PERM or (
            known not in self.behaviours
        ):
            raise refuse(errno.EINVAL, f"arch_prctl {code:#x}")
        if code == ARCH_GET_XCOMP_SUPP:
            return self.user_cfg.max_features | XFEATURE_MASK_FPSSE
        perm = self.guest_perm if guest else self.perm
        if code in (ARCH_GET_XCOMP_PERM, ARCH_GET_XCOMP_GUEST_PERM):
            return perm.state_perm & user_supported(self.behaviours)
        if not 0 <= arg < (20 if "host-apx" in self.behaviours else 19):
            raise refuse(errno.EINVAL, f"component {arg}")
        asked = 1 << arg & XFEATURE_MASK_USER_DYNAMIC & self.user_cfg.max_features
        if not asked:
            raise refuse(errno.EOPNOTSUPP, f"component {arg}")
        if asked & ~perm.state_perm:
            if guest and perm.state_perm & FPU_GUEST_PERM_LOCKED:
                raise refuse(errno.EBUSY, "this process has a vCPU")
            self._grant(perm, asked)
        return 0

    def _grant(self, perm: Permission, asked: int) -> None:
        mask = (perm.state_perm | asked) & ~FPU_GUEST_PERM_LOCKED
        user = mask & user_supported(self.behaviours)
        perm.state_size = self.image_size(mask)
        perm.user_state_size = self.layout.standard_size(user)
        if "perm-keeps-bits" in self.behaviours:
            perm.state_perm |= asked
        else:
            perm.state_perm = user

    def fpu_alloc_guest_fpstate(self) -> FpuGuest:
        """Return a new vCPU's FPU; the first of a process freezes the guest permissions.

        *Source*: Linux arch/x86/kernel/fpu/core.c fpu_alloc_guest_fpstate().
        """
        features = self.guest_cfg.default_features
        fpstate = self._fpstate(features, self.user_cfg.default_features)
        fpstate.is_guest = True
        uabi_size = KVM_XSAVE_SIZE
        if "xsave2" in self.behaviours:
            uabi_size = self.user_cfg.default_size
            if "uabi-size-4096" in self.behaviours:
                uabi_size = max(uabi_size, KVM_XSAVE_SIZE)
        if "guest-permission" in self.behaviours:
            self.guest_perm.state_perm |= FPU_GUEST_PERM_LOCKED
        return FpuGuest(fpstate, features, uabi_size)

    def fpu_enable_guest_xfd_features(self, guest: FpuGuest, features: int) -> None:
        """Give a vCPU the dynamic components of `features` (mask) that it lacks.

        Raises
        ------
        OSError
            EPERM if the process has no permission for guests to use them.

        *Source*: Linux arch/x86/kernel/fpu/xstate.c __xfd_enable_feature().
        """
        event = features & ~guest.xfeatures & XFEATURE_MASK_USER_DYNAMIC
        if not event:
            return
        if event & ~self.guest_perm.state_perm:
            raise refuse(errno.EPERM, "XTILE_DATA needs ARCH_REQ_XCOMP_GUEST_PERM")
        self._fpstate_realloc(event, guest)

    def _fpstate_realloc(self, event: int, guest: FpuGuest) -> None:
        """Replace a guest's image by a larger one. What is not in registers is not copied.

        *Source*: Linux arch/x86/kernel/fpu/xstate.c fpstate_realloc().
        """
        old = guest.fpstate
        new = self._fpstate(old.xfeatures | event, old.user_xfeatures)
        new.regs[:HEADER_OFFSET] = 0  # fpstate_realloc() does not call fpstate_init_user()
        new.size, new.user_size = self.guest_perm.state_size, self.guest_perm.user_state_size
        # 5.17 to 6.5 leave this to KVM_SET_CPUID2, which sets it right after
        new.user_xfeatures |= event
        new.is_guest, new.is_confidential = True, old.is_confidential
        guest.fpstate = new
        guest.xfeatures |= event
        guest.uabi_size = self.guest_perm.user_state_size

    def fpu_update_guest_xfd(self, guest: FpuGuest, xfd: int) -> None:
        """Set a guest's IA32_XFD.

        With b45f72177594, XSTATE_BV loses what XFD disables only if the *thread's* registers
        happen to be in memory; otherwise the next switch to the guest is a panic, as before.

        *Source*: Linux arch/x86/kernel/fpu/core.c fpu_update_guest_xfd().
        """
        guest.fpstate.xfd = xfd
        if guest.fpstate.in_use:
            self.processor.xfd = xfd
        elif "xfd-clears-bv" in self.behaviours and self.need_fpu_load:
            guest.fpstate.xstate_bv &= ~xfd

    def fpu_swap_kvm_fpstate(self, guest: FpuGuest, enter: bool) -> None:
        """Save the thread's registers and load the guest's, or the other way round.

        Every component the host has is loaded, but PKRU, which KVM switches by itself around
        the entry: the saved image's bit 9 tells of the *thread's* PKRU.

        Raises
        ------
        KernelPanic
            If XRSTOR would raise #NM: XSTATE_BV and IA32_XFD contradict each other.

        *Source*: Linux arch/x86/kernel/fpu/core.c fpu_swap_kvm_fpstate().
        """
        if not self.fpstate.is_confidential:
            self._save(self.fpstate)
        guest.fpstate.in_use = enter
        self.fpstate = guest.fpstate if enter else self.task
        self.processor.xfd = self.fpstate.xfd
        if not self.fpstate.is_confidential:
            self._restore(self.fpstate)

    def _save(self, fpstate: Fpstate) -> None:
        """*Source*: Linux arch/x86/kernel/fpu/core.c save_fpregs_to_fpstate()."""
        processor, regs, address = self.processor, fpstate.regs, fpstate.address
        if not self.has_xsave:
            image = area.empty(1, KVM_XSAVE_SIZE)[0]
            xsave(processor, image, XFEATURE_MASK_FPSSE)
            regs[:416] = image[:416]
        elif self.has_xsaves:
            xsaves(processor, regs, fpstate.xfeatures, address=address)
        elif self.has_xsavec:
            xsavec(processor, regs, fpstate.xfeatures, address=address)
        elif self.has_xsaveopt:
            xsaveopt(processor, regs, fpstate.xfeatures, address=address)
        else:
            xsave(processor, regs, fpstate.xfeatures, address=address)

    def _restore(self, fpstate: Fpstate) -> None:
        """*Source*: Linux arch/x86/kernel/fpu/core.c restore_fpregs_from_fpstate()."""
        mask = self.kernel_cfg.max_features & ~PKRU
        if not self.has_xsave:
            image = area.empty(1, KVM_XSAVE_SIZE)[0]
            image[:416] = fpstate.regs[:416]
            image[HEADER_OFFSET] = XFEATURE_MASK_FPSSE
            xrstor(self.processor, image, XFEATURE_MASK_FPSSE)
            return
        load = xrstors if self.has_xsaves else xrstor
        try:
            load(self.processor, fpstate.regs, mask, address=fpstate.address)
        except Fault as fault:
            if fault.rule.vector != "#NM":  # "Bad FPU state detected": ex_handler_fprestore()
                for nr in bits(mask):
                    self.processor.init(nr)
                self.processor.mxcsr = MXCSR_INIT
                return
            self.panic = KernelPanic(
                f"#NM in restore_fpregs_from_fpstate(): XSTATE_BV {fpstate.xstate_bv:#x}, "
                f"IA32_XFD {fpstate.xfd:#x} [Linux kernel commit b45f72177594]"
            )
            raise self.panic from fault

    def fpu_copy_guest_fpstate_to_uabi(
        self, guest: FpuGuest, size: int, mask: int, pkru: int
    ) -> Areas:
        """Fill a user buffer of `size` bytes with a guest's components of `mask`.

        *Source*: Linux arch/x86/kernel/fpu/core.c fpu_copy_guest_fpstate_to_uabi(); before
        5.16, arch/x86/kvm/x86.c fill_xsave().
        """
        fpstate = guest.fpstate
        out = np.zeros(size, np.uint8)
        if not self.has_xsave:
            out[:LEGACY_SIZE] = fpstate.regs[:LEGACY_SIZE]
            out[HEADER_OFFSET] = XFEATURE_MASK_FPSSE
            return out
        area.get_uabi(
            fpstate.regs,
            self.layout,
            mask=mask,
            features=self.user_cfg.max_features,
            mxcsr_mask=self.mxcsr_mask,
            pkru=pkru,
            out=out,
        )
        if "fpu-core-uabi" not in self.behaviours:
            out[:LEGACY_SIZE] = fpstate.regs[:LEGACY_SIZE]
        elif "copies-header-bits" not in self.behaviours and fpstate.user_xfeatures & PKRU:
            at = self.layout.slot(PKRU_NR).offset
            out[at : at + 4].view("<u4")[0] = pkru
        return out

    def fpu_copy_uabi_to_guest_fpstate(self, guest: FpuGuest, buffer: Areas) -> None:
        """Load a user buffer that `xfast.kernels.behaviour.refusal` passed into a guest's image.

        *Source*: Linux arch/x86/kernel/fpu/core.c fpu_copy_uabi_to_guest_fpstate(); before
        5.16, arch/x86/kvm/x86.c load_xsave().
        """
        regs = guest.fpstate.regs
        if not self.has_xsave:
            regs[:LEGACY_SIZE] = buffer[:LEGACY_SIZE]
            return
        core = "fpu-core-uabi" in self.behaviours
        if not core:
            buffer = buffer.copy()
            buffer[HEADER_OFFSET + 8 : HEADER_OFFSET + 64] = 0
        fault = area.set_uabi(
            buffer,
            self.layout,
            regs,
            user_xfeatures=self.user_cfg.max_features,
            mxcsr_mask=0xFFFFFFFF,
            supervisor=supervisor_kept(self.behaviours),
        )
        if fault:  # only a set of behaviours that no kernel ever had accepts such a buffer
            raise refuse(errno.EINVAL, f"the image has no place: {area.UabiFault(fault).name}")
        if not core:
            regs[:LEGACY_SIZE] = buffer[:LEGACY_SIZE]

    def zero(self, guest: FpuGuest, mask: int) -> None:
        """Zero the data of the components of `mask` that are in a guest's image; bits stay."""
        fpstate = guest.fpstate
        offsets = (
            self.layout.compacted_offsets(fpstate.xfeatures)
            if self.compacted
            else {slot.nr: slot.offset for slot in self.layout.slots}
        )
        for nr in bits(mask & fpstate.xstate_bv & fpstate.xfeatures):
            fpstate.regs[offsets[nr] : offsets[nr] + self.layout.slot(nr).size] = 0
