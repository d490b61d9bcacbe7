"""A booted kernel with its KVM: what a process finds when it opens /dev/kvm."""

from __future__ import annotations

from xfast.kvm.module import Module
from xfast.kvm.vcpu import Vcpu


class Kernel(Module):
    """One booted kernel with its KVM, as one process sees it; it is made as a `Module` is.

    Examples
    --------
    >>> kernel = Kernel(host, "5.16.2")                                     # doctest: +SKIP
    >>> vcpu = kernel.create_vcpu()                                         # doctest: +SKIP
    """

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
