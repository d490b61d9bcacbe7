"""What a host would do with a State: the host's side of a judgement, as a small value.

A Target holds what the rules need of a host for one State, and nothing else: a fact that makes
no difference to that State is left out. So hosts that would do the same are one Target, and
are judged once. What kernels do comes from `xfast.kernels.behaviour`.
"""

from __future__ import annotations

from typing import NamedTuple

from xfast.hosts.model import Host
from xfast.judge.subject import State
from xfast.kernels import behaviour
from xfast.kernels.behaviour import Behaviours
from xfast.xsave.area import ALL
from xfast.xsave.features import (
    KVM_XSAVE_SIZE,
    PKRU,
    TILEDATA,
    X87,
    XFEATURE_MASK_FPSSE,
)
from xfast.xsave.layout import Layout

TYPICAL = tuple(behaviour.of_release(r) for r in ("5.15", "5.16", "5.18", "6.0", "6.6", "6.19"))
"""One kernel of each generation: what an unknown kernel may do."""


class Answer(NamedTuple):
    """Whether every kernel that the host may run does something, and whether some does."""

    every: bool
    some: bool


NEVER = Answer(False, False)


class Target(NamedTuple):
    """What one host does with one State. Masks are ints; None is unknown.

    Parameters
    ----------
    host : int or None
        The components that the host can give.
    accepts, refused, doubtful, kept : int
        The components that its KVM_SET_XSAVE takes for certain; the area's bits that it
        refuses for certain; those that it may refuse; those that it takes for certain and the
        next KVM_GET_XSAVE reports again.
    same : bool
        Whether it gives the guest exactly what the snapshot's guest had.
    release : str or None
        Its kernel's release (where something is doubtful); None where the kernel is not known.
    layout, layout_name : Layout or None, str
        Where it looks for components; None where it builds the area itself.
    need, room : int, int or None
        Bytes of the area as KVM_SET_XSAVE will get it where they are more than 4096, else 0;
        and what KVM_CAP_XSAVE2 allows.
    buffer : int or None
        Bytes of the XSAVE areas that it tells processes of.
    xcomp, reserved, mxcsr, xfd : Answer
        Whether KVM_SET_XSAVE refuses the area for its XCOMP_BV, for its reserved header bytes,
        for its MXCSR; whether it leaves set what IA32_XFD disables.
    mxcsr_mask, xss : int or None
        The CPU's MXCSR_MASK, and the supervisor components that it enables.
    asks, granted : int, int or None
        Dynamic components that the guest needs permission for, and those that are granted.
    missing : tuple of str
        CPUID features that the guest was told of and that the host lacks.
    refuses_cr4 : bool
        Whether KVM_SET_SREGS refuses the guest's CR4.
    """

    host: int | None
    accepts: int
    refused: int
    doubtful: int
    kept: int
    same: bool
    release: str | None
    layout: Layout | None
    layout_name: str
    need: int
    room: int | None
    buffer: int | None
    xcomp: Answer
    reserved: Answer
    mxcsr: Answer
    xfd: Answer
    mxcsr_mask: int | None
    xss: int | None
    asks: int
    granted: int | None
    missing: tuple[str, ...]
    refuses_cr4: bool


class Facts:
    """A host as the judge keeps it, and what can be worked out before any State is seen.

    Parameters
    ----------
    host : Host
        Its name and where its description came from make no difference.
    """

    __slots__ = ("_moves", "_users", "host", "kernels", "supported", "uses_xsave")

    def __init__(self, host: Host) -> None:
        self.host = host
        self.kernels = TYPICAL if host.kernel is None else (host.kernel,)
        self.uses_xsave = tuple(host.uses_xsave(kernel) for kernel in self.kernels)
        self.supported = host.kvm_xcr0 if any(self.uses_xsave) else XFEATURE_MASK_FPSSE
        self._users = tuple(host.enabled_by(kernel) for kernel in self.kernels)
        self._moves: dict[int, tuple[tuple[int, int], ...]] = {}

    def moves(self, guest: int) -> tuple[tuple[int, int], ...]:
        """Return what each kernel's KVM_SET_XSAVE accepts, and KVM_GET_XSAVE then reports.

        `guest` is the mask of the guest's CPUID; as after KVM_SET_CPUID2 (masks).
        """
        found = self._moves.get(guest)
        if found is None:
            kernels = zip(self.kernels, self.uses_xsave, self._users, strict=True)
            found = tuple([self._masks(*kernel, guest) for kernel in kernels])
            self._moves[guest] = found
        return found

    def _masks(
        self, kernel: Behaviours, uses_xsave: bool, user: int | None, guest: int
    ) -> tuple[int, int]:
        if not uses_xsave:
            return XFEATURE_MASK_FPSSE, XFEATURE_MASK_FPSSE
        supported = self.supported or 0
        if user is None:
            user = supported
        supported &= user
        enabled = behaviour.enabled_for_guest(user, guest)
        narrowed = behaviour.user_xfeatures(kernel, enabled, guest & supported)
        return (
            behaviour.accepted(kernel, narrowed, supported),
            behaviour.reported(kernel, narrowed, guest & supported),
        )


def target_of(state: State, facts: Facts) -> Target:
    """Work out what a host would do with a State."""
    host = facts.host
    vm = state.kind == "vm"
    supported = facts.supported if vm or not any(facts.uses_xsave) else host.xcr0
    accepts, refused, doubtful, kept = _set_xsave(state, facts, supported)
    need, room = _room(state, host) if vm else (0, None)
    asks, granted = _permission(state, host, supported) if vm else (0, None)
    alien = host.mxcsr_mask is not None and state.mxcsr & ~host.mxcsr_mask
    layout = host.layout if state.extended else None
    release = None if host.kernel is None else host.kernel.release if doubtful else ""
    return Target(
        supported,
        accepts,
        refused,
        doubtful,
        kept,
        _same(state, host),
        release,
        layout,
        layout.name if layout else "",
        need,
        room,
        None if vm else _buffer(host),
        _refuses(state, facts, xcomp_bv=state.xcomp) if state.xcomp else NEVER,
        _refuses(state, facts, reserved=1) if state.reserved else NEVER,
        _refuses(state, facts, mxcsr=state.mxcsr) if alien else NEVER,
        _leaves_disabled(state, facts.kernels) if state.bv & state.xfd else NEVER,
        host.mxcsr_mask if alien else None,
        host.xss if state.xss else None,
        asks,
        granted,
        _missing(state, host),
        vm and _refuses_cr4(state, facts, supported),
    )


def _same(state: State, host: Host) -> bool:
    asked = state.guest_cpuid_mask if state.guest_cpuid_mask is not None else state.xcr0
    have = host.kvm_xcr0 if state.kind == "vm" else host.xcr0
    return asked is not None and asked == have


def _set_xsave(state: State, facts: Facts, supported: int | None) -> tuple[int, int, int, int]:
    """Ask every kernel that the host may run what it accepts, refuses, may refuse and keeps."""
    bv = state.bv
    if supported is None:
        return 0, 0, bv, 0
    if state.kind != "vm":
        return supported, bv & ~supported, 0, bv & supported
    all_take, any_takes, all_report = ALL, 0, ALL
    for guest in guests_of(state):
        for kernel, (takes, reports) in zip(facts.kernels, facts.moves(guest), strict=True):
            if bv & state.xfd:
                takes |= bv & ~behaviour.loaded(kernel, bv, state.xfd)
            all_take &= takes
            any_takes |= takes
            all_report &= reports
    refused = bv & ~any_takes
    doubtful = bv & ~all_take & ~refused
    return all_take & supported, refused, doubtful, bv & all_take & all_report


def guests_of(state: State) -> tuple[int, ...]:
    """Return the component masks that the guest's CPUID may have: one if the file tells it.

    XCR0 bounds them from below; XCR0 1 is that of a guest without XSAVE, too.
    """
    if state.guest_cpuid_mask is not None:
        return (state.guest_cpuid_mask,)
    xcr0 = state.xcr0 or 0
    return (xcr0 if xcr0 > 1 else 0, ALL)


def _refuses(state: State, facts: Facts, **header: int) -> Answer:
    """Ask whether KVM_SET_XSAVE refuses an area for what its header has besides XSTATE_BV.

    `header` is ``xcomp_bv``, ``reserved`` or ``mxcsr``: what to ask about; the others count as
    clean.
    """
    clean = {"xcomp_bv": 0, "reserved": 0, "mxcsr": 0}
    mask = facts.host.mxcsr_mask
    answers = [
        behaviour.refusal(
            kernel,
            xstate_bv=state.bv,
            user=ALL,
            kvm_xcr0=ALL,
            mxcsr_mask=ALL if mask is None else mask,
            xsave=uses_xsave,
            **(clean | header),  # type: ignore[arg-type]
        )
        for kernel, uses_xsave in zip(facts.kernels, facts.uses_xsave, strict=True)
    ]
    broken = [answer is not None and answer.rule in header for answer in answers]
    return Answer(all(broken), any(broken))


def _leaves_disabled(state: State, kernels: tuple[Behaviours, ...]) -> Answer:
    stays = [bool(behaviour.loaded(kernel, state.xfd, state.xfd)) for kernel in kernels]
    return Answer(all(stays), any(stays))


def _room(state: State, host: Host) -> tuple[int, int | None]:
    """Return what the area needs, and what KVM_CAP_XSAVE2 allows if that matters (bytes)."""
    layout = host.layout if state.portable else state.layout
    need = layout.standard_size(state.bv & layout.user_mask) if layout else 0
    if need <= KVM_XSAVE_SIZE:
        return 0, None
    room = host.xsave2_size
    if room is None and host.kernel is not None and "xsave2" not in host.kernel:
        room = KVM_XSAVE_SIZE
    return need, room


def _buffer(host: Host) -> int | None:
    if host.layout is None or host.xcr0 is None:
        return None
    return host.layout.standard_size(host.xcr0)


def _permission(state: State, host: Host, supported: int | None) -> tuple[int, int | None]:
    """Return which dynamic components need permission here, and which are granted."""
    wants = (state.bv | (state.xcr0 or 0) | (state.guest_cpuid_mask or 0)) & TILEDATA
    if not wants or supported is None or not supported & TILEDATA:
        return 0, None
    if host.kernel is not None and not behaviour.needs_permission(host.kernel, wants):
        return 0, None  # such a kernel takes the CPUID as it is, and gives no guest the component
    granted = host.guest_permission
    if granted is None and host.kernel is not None and "guest-permission" not in host.kernel:
        granted = 0
    return wants, granted


def _refuses_cr4(state: State, facts: Facts, supported: int | None) -> bool:
    """Tell whether CR4 has PKE without PKU, or OSXSAVE (as a guest that set XCR0) without XSAVE.

    *Source*: Linux arch/x86/kvm/x86.c kvm_is_valid_sregs(), __cr4_reserved_bits().
    """
    pke = bool(state.pkru_enabled) and supported is not None and not supported & PKRU
    return pke or ((state.xcr0 or 0) > X87 and not any(facts.uses_xsave))


def _missing(state: State, host: Host) -> tuple[str, ...]:
    if state.guest is None or host.features is None:
        return ()
    missing = state.guest.features - host.features
    return tuple(sorted(missing)) if missing else ()
