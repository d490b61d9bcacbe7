"""What a KVM module knows before there is a vCPU: the FPU core, and what guests may have.

*Source*: Linux arch/x86/kvm/x86.c, `struct kvm_caps`.
"""

from __future__ import annotations

from xfast.hosts.model import Host
from xfast.kernels.behaviour import (
    Behaviours,
    kvm_supported_xcr0,
    kvm_supported_xss,
    of_release,
)
from xfast.kernels.guest import permitted_xcr0
from xfast.kvm.fpu import Fpu, linear_bits
from xfast.kvm.processor import Processor
from xfast.xsave.features import KVM_XSAVE_SIZE


class Module:
    """KVM in one booted kernel, as one process sees it; `xfast.kvm.kernel.Kernel` adds vCPUs.

    Parameters
    ----------
    host : Host
        Needs layout, xcr0 and mxcsr_mask; kvm_xcr0 is derived where the host does not say it,
        an xss that it does not say counts as none.
    behaviours : Behaviours or str, optional
        The kernel's behaviours, or a release that has them; default: the host's.
    processor : Processor, optional
        The CPU to run on; default: one as the host describes it.

    Attributes
    ----------
    linear_bits : int
        What the kernel takes for canonical in CET's MSRs: 57 bits with LA57, otherwise 48.

    Raises
    ------
    ValueError
        If a fact is missing.

    *Source*: Linux arch/x86/kvm/x86.c kvm_x86_vendor_init().
    """

    def __init__(
        self,
        host: Host,
        behaviours: Behaviours | str | None = None,
        processor: Processor | None = None,
    ) -> None:
        if isinstance(behaviours, str):
            behaviours = of_release(behaviours)
        behaviours = behaviours or host.kernel
        if behaviours is None:
            raise ValueError(
                f"host {host.name}: expected behaviours, given or of the host, got none"
            )
        self.host = host
        self.linear_bits = linear_bits(host)
        self.behaviours = behaviours
        self.fpu = Fpu(host, behaviours, processor)
        self.supported_xcr0 = supported_xcr0(host, behaviours, self.fpu.user_cfg.max_features)
        self.supported_xss = kvm_supported_xss(behaviours, self.fpu.kernel_cfg.max_features)

    @property
    def permitted_xcr0(self) -> int:
        """What KVM_GET_SUPPORTED_CPUID offers guests of this process (mask).

        *Source*: Linux arch/x86/kvm/x86.h kvm_get_filtered_xcr0().
        """
        return permitted_xcr0(self.behaviours, self.supported_xcr0, self.fpu.guest_perm.state_perm)

    @property
    def xsave2_size(self) -> int:
        """What KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) returns, in bytes; 0 without KVM_GET_XSAVE2."""
        if "xsave2" not in self.behaviours:
            return 0
        return max(KVM_XSAVE_SIZE, self.xstate_required_size(self.permitted_xcr0))

    def xstate_required_size(self, mask: int, compacted: bool = False) -> int:
        """Return the bytes that an area with the components of `mask` takes on this host.

        *Source*: Linux arch/x86/kvm/cpuid.c xstate_required_size().
        """
        layout = self.fpu.layout
        known = mask & layout.mask
        return layout.compacted_size(known) if compacted else layout.standard_size(known)

    def arch_prctl(self, code: int, arg: int = 0) -> int:
        """Ask for, or about, dynamic components; see `xfast.kvm.fpu.Fpu.arch_prctl`."""
        return self.fpu.arch_prctl(code, arg)


def supported_xcr0(host: Host, behaviours: Behaviours, enabled: int) -> int:
    """Return KVM's supported_xcr0 on a host whose kernel enables `enabled` (masks).

    What the host says of its KVM, as far as the behaviours allow it; nothing without XSAVE.
    """
    if not host.uses_xsave(behaviours):
        return 0
    derived = kvm_supported_xcr0(behaviours, enabled, host.vendor)
    return derived if host.kvm_xcr0 is None else derived & host.kvm_xcr0
