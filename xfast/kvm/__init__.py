"""KVM's guest FPU, modelled: a Kernel is made from a Host, and vCPUs on it take the ioctls.

>>> from xfast.kvm import Kernel, migrate
>>> vcpu = Kernel(host, "5.16.2").create_vcpu()                             # doctest: +SKIP
>>> vcpu.set_xsave(area)                                                    # doctest: +SKIP
>>> print(migrate(vcpu, other_host, "firecracker"))                         # doctest: +SKIP

`xfast.kvm.live` has the same interface to a real /dev/kvm.
"""

from xfast.kvm.fpu import KernelPanic
from xfast.kvm.history import render, story
from xfast.kvm.kernel import Kernel
from xfast.kvm.migration import VMMS, Migration, migrate
from xfast.kvm.prediction import Outcome, outcome
from xfast.kvm.vcpu import Vcpu

__all__ = [
    "VMMS",
    "Kernel",
    "KernelPanic",
    "Migration",
    "Outcome",
    "Vcpu",
    "migrate",
    "outcome",
    "render",
    "story",
]
