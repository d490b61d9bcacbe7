"""What KVM_SET_XSAVE does with an area on a host, without a vCPU: the formulas alone.

Fast enough for a scheduler: the header is read, no component is moved.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from xfast.hosts.model import Host
from xfast.kernels.behaviour import (
    Behaviours,
    Refusal,
    enabled_for_guest,
    loaded,
    refusal,
    reported,
    user_supported,
    user_xfeatures,
)
from xfast.kvm.arguments import check_host, one_area, unsigned
from xfast.kvm.module import supported_xcr0
from xfast.xsave.area import headers
from xfast.xsave.features import XFEATURE_MASK_FPSSE


class Outcome(NamedTuple):
    """What becomes of an area that is set.

    Parameters
    ----------
    refused : Refusal or None
        Why the answer is EINVAL; None where the area is accepted.
    loaded : int
        XSTATE_BV of the guest's image afterwards, of user components.
    cleared : int
        Components that were dropped in silence, because IA32_XFD disables them.
    trimmed : int
        Components that are loaded, and that KVM_GET_XSAVE will not report (masks).
    panics : int
        Components that IA32_XFD disables and that stay: the next entry brings the host down.
    """

    refused: Refusal | None
    loaded: int
    cleared: int
    trimmed: int
    panics: int


def outcome(
    area: Any,
    host: Host,
    guest_xcr0: int | None,
    *,
    kernel: Behaviours | None = None,
    xfd: int = 0,
) -> Outcome:
    """Return what KVM_SET_XSAVE does with an area.

    Parameters
    ----------
    area : (size,) uint8, or buffer
        One area; only its first 576 bytes are read.
    host : Host
        Needs xcr0 and mxcsr_mask; kvm_xcr0 is derived where it is unknown.
    guest_xcr0 : int or None
        What the guest's CPUID leaf 0xD.0 announces (mask); None before any KVM_SET_CPUID2.
    kernel : Behaviours, optional
        Default: the host's.
    xfd : int
        The guest's IA32_XFD at the time (mask).

    Raises
    ------
    ValueError
        If the host does not say what is needed, or a mask can't be.

    *Source*: Linux arch/x86/kvm/x86.c kvm_vcpu_ioctl_x86_set_xsave(), as in
    `xfast.kvm.Vcpu.set_xsave`.
    """
    kernel = kernel or host.kernel
    if kernel is None or host.xcr0 is None or host.mxcsr_mask is None:
        raise ValueError(f"host {host.name}: expected its kernel, xcr0 and mxcsr_mask, got less")
    check_host(host)
    unsigned(guest_xcr0 or 0, 64, "guest_xcr0")
    unsigned(xfd, 64, "xfd")
    xsave = host.uses_xsave(kernel)
    enabled = (host.enabled_by(kernel) or 0) & user_supported(kernel)
    supported = supported_xcr0(host, kernel, enabled)
    guest = None if guest_xcr0 is None else guest_xcr0 & supported
    user = user_xfeatures(kernel, enabled_for_guest(enabled, guest_xcr0 or 0), guest)
    header = headers(one_area(area))
    kept = loaded(kernel, header.xstate_bv, xfd)
    refused = refusal(
        kernel,
        xstate_bv=kept,
        xcomp_bv=header.xcomp_bv,
        reserved=header.reserved,
        mxcsr=header.mxcsr,
        user=user,
        kvm_xcr0=supported,
        mxcsr_mask=host.mxcsr_mask,
        xsave=xsave,
    )
    if refused:
        return Outcome(refused, 0, 0, 0, 0)
    if not xsave:  # the legacy region goes over whole, whatever XSTATE_BV says
        return Outcome(None, XFEATURE_MASK_FPSSE, 0, 0, 0)
    trimmed = kept & ~reported(kernel, user, guest or 0)
    return Outcome(None, kept, header.xstate_bv & ~kept, trimmed, kept & xfd)
