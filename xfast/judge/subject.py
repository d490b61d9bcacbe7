"""What a vCPU's file tells, and what a host would do with it: the two sides of a judgement."""

from __future__ import annotations

from dataclasses import dataclass

from xfast.hosts.model import Host
from xfast.kernels import behaviour
from xfast.kernels.behaviour import Behaviours
from xfast.snapshots.model import Vcpu
from xfast.xsave.area import ALL, classify, headers
from xfast.xsave.features import (
    PKRU,
    SUPERVISOR_MASK,
    XCOMP_BV_COMPACTED,
    XFEATURE_MASK_FPSSE,
)
from xfast.xsave.layout import Layout


@dataclass(frozen=True)
class State:
    """What one vCPU's file tells, worked out once for all hosts. Masks are ints."""

    vcpu: Vcpu
    kind: str
    producer: str
    bv: int
    xcomp: int
    reserved: bool
    mxcsr: int
    live: int
    stale: int
    unreadable: int
    pkru: int | None
    may: int | None
    may_from: str

    @property
    def guest_cpuid_mask(self) -> int | None:
        """The user components of the guest's CPUID, where the file tells them."""
        if self.vcpu.cpuid is not None:
            return self.vcpu.cpuid.xcr0
        return self.vcpu.guest_mask

    @property
    def unplaced(self) -> int:
        """The components in XSTATE_BV whose place in the area is not known."""
        return self.bv & ALL & ~(self.vcpu.layout or Layout(())).mask


def state_of(vcpu: Vcpu, kind: str = "vm", producer: str = "") -> State:
    """Work out what a vCPU's area holds and what its guest may have."""
    head = headers(vcpu.area)
    layout = vcpu.layout or Layout(())  # only the legacy region's place is certain then
    found = classify(vcpu.area, layout)
    pkru = None
    if head.xstate_bv & PKRU and not found.unreadable & PKRU:
        pkru = _pkru(vcpu, head.xcomp_bv)
    may, may_from = _may(vcpu, kind)
    return State(
        vcpu,
        kind,
        producer,
        head.xstate_bv,
        head.xcomp_bv,
        head.reserved,
        head.mxcsr,
        found.live | head.xstate_bv & ALL & ~layout.mask,  # bit 63 is no component's
        found.stale,
        found.unreadable & ALL,
        pkru,
        may,
        may_from,
    )


def _pkru(vcpu: Vcpu, xcomp: int) -> int:
    assert vcpu.layout is not None
    if xcomp & XCOMP_BV_COMPACTED:
        offset = vcpu.layout.compacted_offsets(xcomp & vcpu.layout.mask)[9]
    else:
        offset = vcpu.layout.by_nr[9].offset
    return int.from_bytes(vcpu.area[offset : offset + 4].tobytes(), "little")


def _may(vcpu: Vcpu, kind: str) -> tuple[int | None, str]:
    """Return the components that the guest may have, and which fact says so."""
    if kind != "vm":
        return None, ""
    if vcpu.cpuid is not None:
        return vcpu.cpuid.xcr0 | XFEATURE_MASK_FPSSE, "CPUID"
    if vcpu.guest_mask is not None:
        return vcpu.guest_mask | XFEATURE_MASK_FPSSE, "CPU definition"
    if vcpu.xcr0 is not None:
        reachable = PKRU if vcpu.pkru_enabled else 0
        return vcpu.xcr0 | XFEATURE_MASK_FPSSE | reachable, "XCR0"
    return None, ""


TYPICAL = tuple(behaviour.of_release(r) for r in ("5.15", "5.16", "5.18", "6.0", "6.6", "6.19"))
"""One kernel of each generation: what an unknown kernel may do."""


@dataclass(frozen=True)
class Target:
    """What one host does with one vCPU's XSTATE_BV. Masks are ints.

    `host` holds the components the host can give; `accepts` those that its KVM_SET_XSAVE takes
    for certain; `refused` the area's bits that it refuses for certain; `doubtful` those that it
    may refuse; `kept` those that it takes for certain and the next KVM_GET_XSAVE reports again.
    """

    host: int | None
    accepts: int
    refused: int
    doubtful: int
    kept: int


def kernels_of(host: Host) -> tuple[Behaviours, ...]:
    """Return the kernel that `host` runs; where it is unknown, one of each generation."""
    return TYPICAL if host.kernel is None else (host.kernel,)


def target_of(state: State, host: Host) -> Target:
    """Ask every kernel that `host` may run what it does with the area."""
    supported = host.kvm_xcr0 if state.kind == "vm" else host.xcr0
    kernels = kernels_of(host)
    if not any(host.uses_xsave(kernel) for kernel in kernels):
        supported = XFEATURE_MASK_FPSSE
    if supported is None:
        return Target(None, 0, 0, state.bv, 0)
    if state.kind != "vm":
        return Target(supported, supported, state.bv & ~supported, 0, state.bv & supported)
    guests = guests_of(state)
    all_take, any_takes, all_report = ALL, 0, ALL
    for kernel in kernels:
        for guest in guests:
            takes, reports = kernel_masks(host, kernel, supported, guest)
            takes |= state.bv & ~behaviour.loaded(kernel, state.bv, state.vcpu.xfd or 0)
            all_take &= takes
            any_takes |= takes
            all_report &= reports
    refused = state.bv & ~any_takes
    doubtful = state.bv & ~all_take & ~refused
    return Target(supported, all_take, refused, doubtful, state.bv & all_take & all_report)


def guests_of(state: State) -> tuple[int, ...]:
    """Return the component masks that the guest's CPUID may have: one if the file tells it.

    XCR0 bounds them from below; XCR0 1 is that of a guest without XSAVE, too.
    """
    if state.guest_cpuid_mask is not None:
        return (state.guest_cpuid_mask,)
    xcr0 = state.vcpu.xcr0 or 0
    return (xcr0 if xcr0 > 1 else 0, ALL)


def kernel_masks(host: Host, kernel: Behaviours, supported: int, guest: int) -> tuple[int, int]:
    """Return what KVM_SET_XSAVE accepts and KVM_GET_XSAVE reports after KVM_SET_CPUID2."""
    if not host.uses_xsave(kernel):
        return XFEATURE_MASK_FPSSE, XFEATURE_MASK_FPSSE
    user = host.enabled_by(kernel)
    if user is None:
        user = supported
    supported &= user
    enabled = behaviour.enabled_for_guest(user, guest)
    narrowed = behaviour.user_xfeatures(kernel, enabled, guest & supported)
    return (
        behaviour.accepted(kernel, narrowed, supported),
        behaviour.reported(kernel, narrowed, guest & supported),
    )


def leaked(state: State) -> int:
    """Return the bits of XSTATE_BV that the guest may not have, as far as the file tells."""
    if state.kind != "vm":
        return 0
    if state.may is None:
        return state.bv & PKRU if state.pkru == 0 else 0
    return state.bv & ~state.may & ~SUPERVISOR_MASK


def refuses(host: Host, state: State, **header: int) -> tuple[bool, bool]:
    """Ask whether KVM_SET_XSAVE refuses an area for what its header has besides XSTATE_BV.

    Parameters
    ----------
    header : int
        ``xcomp_bv``, ``reserved`` or ``mxcsr``: what to ask about; the others count as clean.

    Returns
    -------
    (bool, bool)
        Whether every kernel that the host may run refuses it, and whether some does.
    """
    clean = {"xcomp_bv": 0, "reserved": 0, "mxcsr": 0}
    mask = ALL if host.mxcsr_mask is None else host.mxcsr_mask
    answers = [
        behaviour.refusal(
            kernel,
            xstate_bv=state.bv,
            user=ALL,
            kvm_xcr0=ALL,
            mxcsr_mask=mask,
            xsave=host.uses_xsave(kernel),
            **(clean | header),  # type: ignore[arg-type]
        )
        for kernel in kernels_of(host)
    ]
    broken = [answer is not None and answer.rule in header for answer in answers]
    return all(broken), any(broken)
