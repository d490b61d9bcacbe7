"""KVM's guest FPU, modelled: a Kernel is made from a Host, and vCPUs on it take the ioctls.

>>> from xfast.kvm import Kernel
>>> vcpu = Kernel(host, "5.16.2").create_vcpu()                             # doctest: +SKIP
>>> vcpu.set_xsave(area)                                                    # doctest: +SKIP
"""

from xfast.kvm.fpu import KernelPanic
from xfast.kvm.kernel import Kernel
from xfast.kvm.vcpu import Vcpu

__all__ = ["Kernel", "KernelPanic", "Vcpu"]
