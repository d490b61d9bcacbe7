"""A booted kernel with its KVM: what a process finds when it opens /dev/kvm."""

from __future__ import annotations

from xfast.hosts.model import Host
from xfast.kernels.behaviour import Behaviours, kvm_supported_xcr0, kvm_supported_xss, of_release
from xfast.kvm.fpu import Fpu, linear_bits
from xfast.kvm.processor import Processor
from xfast.kvm.vcpu import Vcpu
from xfast.xsave.features import KVM_XSAVE_SIZE, XFEATURE_MASK_USER_DYNAMIC, XFEATURE_MASK_XTILE


class Kernel:
    """One booted kernel with its KVM, as one process sees it.

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

    Examples
    --------
    >>> kernel = Kernel(host, "5.16.2")                                     # doctest: +SKIP
    >>> vcpu = kernel.create_vcpu()                                         # doctest: +SKIP

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
            raise ValueError(f"host {host.name}: its kernel is not known, needed behaviours")
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
        permitted = self.supported_xcr0
        if permitted & XFEATURE_MASK_USER_DYNAMIC:
            permitted &= self.fpu.guest_perm.state_perm
            if not permitted & XFEATURE_MASK_USER_DYNAMIC:
                permitted &= ~XFEATURE_MASK_XTILE
        return permitted

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

    def create_vcpu(self, *, confidential: bool = False, protected_vm: bool = False) -> Vcpu:
        """Create a vCPU.

        Parameters
        ----------
        confidential : bool
            Its state is one that KVM can't read (SEV-ES, SEV-SNP, TDX).
        protected_vm : bool
            It is in a VM of a type made for that, where its FPU's ioctls are errors; in a VM
            that KVM_SEV_ES_INIT made so, they do nothing.

        *Source*: Linux arch/x86/kvm/x86.c kvm_arch_vcpu_create().
        """
        self.fpu.check_alive()
        return Vcpu(self, confidential, protected_vm)


def supported_xcr0(host: Host, behaviours: Behaviours, enabled: int) -> int:
    """Return KVM's supported_xcr0 on a host whose kernel enables `enabled` (masks).

    What the host says of its KVM, as far as the behaviours allow it; nothing without XSAVE.
    """
    if not host.uses_xsave(behaviours):
        return 0
    derived = kvm_supported_xcr0(behaviours, enabled, host.vendor)
    return derived if host.kvm_xcr0 is None else derived & host.kvm_xcr0
