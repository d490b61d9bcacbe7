"""What a file tells of its vCPUs, as small values: the snapshot's side of a judgement.

Everything that the rules look at in a vCPU is in its `State`. Equal states get equal answers,
so each is judged once a host, however many vCPUs, areas of a stack and files have it:

    Snapshot ── subject_of ──> Subject (its Parts: a State, vCPUs) ──┐
                                                                       ├──> findings, a verdict
    Host ─────── target_of ──> Target, what it would do with a State ──┘

A State holds no area, no file's name and no vCPU's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from xfast.snapshots.model import CpuInfo, Snapshot, Stack, Vcpu
from xfast.xsave.area import ALL, facts
from xfast.xsave.cpuid import RUNTIME_FEATURES, Cpuid
from xfast.xsave.features import (
    PKRU,
    SUPERVISOR_MASK,
    XCOMP_BV_COMPACTED,
    XFEATURE_MASK_FPSSE,
)
from xfast.xsave.layout import Layout

NO_LAYOUT = Layout(())
"""Only the legacy region's place is certain where the layout is not known."""


class Guest(NamedTuple):
    """What the CPUID of a guest, or of a process's first CPU, says.

    `size` is leaf 0xD's EBX (bytes; 0 without the leaf), `features` leaves out what an OS
    switches at run time; masks are ints.
    """

    xcr0: int
    xss: int
    size: int
    features: frozenset[str]


class State(NamedTuple):
    """What one vCPU's area and its file tell, worked out once for all hosts. Masks are ints.

    `kind` and `producer` are the snapshot's; `layout` to `pkru_enabled` are as in `Vcpu`, with
    `guest` in place of its CPUID; `layout_name`, which layouts that are equal need not share, is
    what findings cite. `has_msrs`: the file lists the vCPU's MSRs. `fpu_differs`:
    fields in which its two copies of the legacy registers differ. `size` is the area's (bytes).
    `live` holds the components with something other than their init or default value, `stale`
    those that are absent although other bytes lie there, `unreadable` those whose data lie
    past the area's end. `pkru` is PKRU's value where it is present and can be read.
    """

    kind: str
    producer: str
    layout: Layout | None
    layout_name: str
    layout_source: str
    layout_note: str
    portable: bool
    xcr0: int | None
    xss: int | None
    xfd: int
    guest: Guest | None
    guest_mask: int | None
    pkru_enabled: bool | None
    has_msrs: bool
    fpu_differs: tuple[str, ...]
    size: int
    bv: int
    xcomp: int
    reserved: bool
    mxcsr: int
    live: int
    stale: int
    unreadable: int
    pkru: int | None

    @property
    def guest_cpuid_mask(self) -> int | None:
        """The user components of the guest's CPUID, where the file tells them."""
        return self.guest_mask if self.guest is None else self.guest.xcr0

    @property
    def may(self) -> int | None:
        """The components that the guest may have, as far as the file tells."""
        if self.kind != "vm":
            return None
        if self.guest_cpuid_mask is not None:
            return self.guest_cpuid_mask | XFEATURE_MASK_FPSSE
        if self.xcr0 is not None:
            return self.xcr0 | XFEATURE_MASK_FPSSE | (PKRU if self.pkru_enabled else 0)
        return None

    @property
    def may_from(self) -> str:
        """Which fact says what the guest may have."""
        if self.guest is not None:
            return "CPUID"
        return "CPU definition" if self.guest_mask is not None else "XCR0"

    @property
    def unplaced(self) -> int:
        """The components in XSTATE_BV whose place in the area is not known."""
        return self.bv & ALL & ~(self.layout or NO_LAYOUT).mask

    @property
    def leaked(self) -> int:
        """The bits of XSTATE_BV that the guest may not have, as far as the file tells."""
        if self.kind != "vm":
            return 0
        if self.may is None:
            return self.bv & PKRU if self.pkru == 0 else 0
        return self.bv & ~self.may & ~SUPERVISOR_MASK

    @property
    def extended(self) -> int:
        """The components whose places matter: the guest's own, beyond x87 and SSE."""
        return 0 if self.portable else self.bv & ~XFEATURE_MASK_FPSSE & ~self.leaked

    @property
    def compacted(self) -> bool:
        """Whether the area is in compacted format."""
        return bool(self.xcomp & XCOMP_BV_COMPACTED)


class Part(NamedTuple):
    """The vCPUs of one State: `vcpu` is the number of the first, `alike` how many there are."""

    state: State
    vcpu: int
    alike: int = 1


class Machine(NamedTuple):
    """What CRIU's images tell of the machine that dumped: its CPUID, and cpuinfo.img.

    `has_area` says whether a thread has an XSAVE area.
    """

    cpuid: Cpuid | None
    cpuinfo: CpuInfo
    has_area: bool


class Subject(NamedTuple):
    """A snapshot as the rules see it: a hashable value.

    Its `parts` are one for each vCPU; of a stack of areas, one for each State (`stacked`).
    `doubts` say why there may be vCPUs that were not read.
    """

    kind: str
    parts: tuple[Part, ...]
    stacked: bool = False
    machine: Machine | None = None
    doubts: tuple[str, ...] = ()


@lru_cache(maxsize=4096)
def _guest(cpuid: Cpuid) -> Guest:
    row = cpuid.find(0xD)
    return Guest(cpuid.xcr0, cpuid.xss, row.ebx if row else 0, cpuid.features - RUNTIME_FEATURES)


def state_of(vcpu: Vcpu, kind: str = "vm", producer: str = "") -> State:
    """Work out what a vCPU's area holds and what its guest may have."""
    (found,) = facts(vcpu.area, vcpu.layout or NO_LAYOUT)
    return _state(vcpu, kind, producer, len(vcpu.area), found.item())


def _state(vcpu: Vcpu, kind: str, producer: str, size: int, found: tuple[int, ...]) -> State:
    """Return the State of a vCPU whose area of `size` bytes holds what `found` (FACTS) says."""
    bv, xcomp, inuse, default, stale, unreadable, mxcsr, pkru, reserved, *_ = found
    layout = vcpu.layout or NO_LAYOUT
    return State(
        kind,
        producer,
        vcpu.layout,
        layout.name,
        vcpu.layout_source,
        vcpu.layout_note,
        vcpu.portable,
        vcpu.xcr0,
        vcpu.xss,
        vcpu.xfd or 0,
        _guest(vcpu.cpuid) if vcpu.cpuid is not None else None,
        vcpu.guest_mask,
        vcpu.pkru_enabled,
        vcpu.msrs is not None,
        vcpu.fpu_differs,
        size,
        bv,
        xcomp,
        bool(reserved),
        mxcsr,
        inuse & ~default | bv & ALL & ~layout.mask,  # bit 63 is no component's
        stale,
        unreadable & ALL,
        pkru if bv & layout.mask & PKRU & ~unreadable else None,
    )


def subject_of(snapshot: Snapshot) -> Subject:
    """Work out what the rules look at in a snapshot."""
    kind, producer = snapshot.kind, snapshot.producer
    doubts = snapshot.doubts
    if isinstance(snapshot.vcpus, Stack):
        return Subject(kind, _parts(snapshot.vcpus, kind, producer), True, None, doubts)
    parts = tuple([Part(state_of(v, kind, producer), v.index) for v in snapshot.vcpus])
    machine = _machine(snapshot.vcpus) if producer == "criu" and parts else None
    return Subject(kind, parts, False, machine, doubts)


def _parts(stack: Stack, kind: str, producer: str) -> tuple[Part, ...]:
    """Return a part for each State in a stack, in the order in which they first occur."""
    return tuple(
        Part(
            _state(stack.kinds[one.kind], kind, producer, stack.size, one.facts),
            one.first,
            one.alike,
        )
        for one in stack.classes
    )


def _machine(threads: Sequence[Vcpu]) -> Machine:
    has_area = any(thread.has_xsave for thread in threads)
    return Machine(threads[0].cpuid, threads[0].cpuinfo or CpuInfo(), has_area)
