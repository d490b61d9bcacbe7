"""What to change in a snapshot so that a host takes it, and why. A pure function: no file.

A plan drops state that the guest may not have or the target can't take, clears what XFD
disables, moves components to the target's places, trims and cleans. Only what loses nothing
(absent, init or default by value) goes by itself; live data go when they are named.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xfast.errors import LayoutError, PolicyError
from xfast.hosts.model import Host
from xfast.judge.criu import criu_findings
from xfast.judge.judgement import check, facts_of, findings_of, host_of
from xfast.judge.rules import RULES
from xfast.judge.subject import State, state_of, subject_of
from xfast.judge.target import target_of
from xfast.judge.verdict import Finding, Policy, Verdict
from xfast.repair.batch import MXCSR_MASK_FIELD, SOFTWARE_FIELD, move_areas
from xfast.snapshots.infer import KNOWN_MASK
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.xsave import area as engine
from xfast.xsave.features import (
    AVX,
    BY_NAME,
    EXTENDED_OFFSET,
    FCW_INIT,
    HEADER_OFFSET,
    KVM_XSAVE_SIZE,
    MXCSR_INIT,
    MXCSR_MASK_AMD,
    MXCSR_MASK_INTEL,
    PKRU,
    PKRU_NR,
    SSE,
    SUPERVISOR_MASK,
    TILEDATA,
    X87,
    XCOMP_BV_COMPACTED,
    XFEATURE_MASK_FPSSE,
    bits,
    name_of,
    names_of,
    parse_component,
)
from xfast.xsave.layout import PRESETS, Layout, recognise

LEGACY_FIELDS = {0: slice(32, 160), 1: slice(160, 416)}
"""Where ST0-ST7 and XMM0-XMM15 lie."""

X87_CONTROL, MXCSR_FIELD = slice(0, 24), slice(24, 28)
HEADER = slice(HEADER_OFFSET, HEADER_OFFSET + 64)
HEADER_REST = slice(HEADER_OFFSET + 8, HEADER_OFFSET + 64)
"""XCOMP_BV and the reserved bytes, zero in what KVM takes."""

PKRU_NOTES = {
    "vm": "a KVM_SET_XSAVE without the PKRU bit leaves the vCPU's PKRU as it was; it does not "
    "reset it",
    "process": "where the PKRU bit is clear, sigreturn and ptrace set PKRU to 0 (Linux 6.2 and "
    "later)",
}
"""What becomes of PKRU on restore after its bit was dropped, by the snapshot's kind.

*Source*: Linux arch/x86/kernel/fpu/core.c fpu_copy_uabi_to_guest_fpstate(); xstate.c
copy_uabi_to_xstate().
"""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one vCPU. The fields are those of the change record, and stable.

    `field` is ``xstate_bv``, ``layout``, ``header`` or ``size`` (of the area, bytes); `state`
    tells what a dropped component held: ``init``, ``default``, ``live`` or ``unknown``.
    """

    vcpu: int
    component: str
    rule: str
    field: str
    before: str
    after: str
    state: str
    why: str

    def as_json(self) -> dict[str, Any]:
        """Return the change as the change record has it."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True)
class Plan:
    """What to change in one snapshot for one host.

    Parameters
    ----------
    snapshot, host
        What was planned for.
    areas : dict
        {position in ``snapshot.vcpus``: new area}, of the vCPUs that change.
    changes : tuple of Change
    before, after : Verdict
        The host's verdict on the snapshot as it is, and as it will be.
    notes : tuple of str
        What whoever restores the result should know.
    ransom : tuple of str
        The components whose live data would have to be given up for the host to take the
        snapshot; empty where nothing blocks, and where that would not do.
    """

    snapshot: Snapshot = field(repr=False)
    host: Host = field(repr=False)
    areas: dict[int, NDArray[np.uint8]] = field(repr=False, compare=False)
    changes: tuple[Change, ...]
    before: Verdict
    after: Verdict
    notes: tuple[str, ...]
    ransom: tuple[str, ...] = ()

    def __str__(self) -> str:
        count = len(self.changes)
        return (
            f"{self.snapshot.name} on {self.host.name}: {count} change{'s' * (count != 1)}, "
            f"{self.before.verdict} before, {self.after.verdict} after"
        )

    @property
    def left(self) -> tuple[Finding, ...]:
        """The findings that block even after the changes."""
        return tuple(f for f in self.after.findings if f.severity == "blocks")

    def require_restorable(self) -> None:
        """Raise PolicyError if the host would refuse the result, or might read other bytes."""
        for finding in self.after.findings:
            if finding.open and finding.code in ("LAYOUT", "PARTIAL"):
                raise PolicyError(
                    f"{self.snapshot.path}: whether {self.host.name} reads it right stays unknown: "
                    f"vCPU {finding.vcpu}: {finding.why}"
                )
        if not self.left:
            return
        finding = self.left[0]
        way = "choose another host"
        if self.ransom:
            words = " ".join(f"--drop {name}" for name in self.ransom)
            way = f"{words} --even-if-live gives the data up"
        elif finding.code == "LAYOUT":
            way = "the guest's own CPUID has the old places too; --layout NAME overrules it"
        raise PolicyError(
            f"{self.snapshot.path}: {self.host.name} would still refuse it: vCPU "
            f"{finding.vcpu}: {finding.code}: {finding.why}; {way}"
        )

    def apply(self, output: str | None = None, **how: Any) -> dict[str, Any] | None:
        """Write the repaired snapshot; see `xfast.repair.apply.apply` for parameters and errors."""
        from xfast.repair.apply import apply

        return apply([self], output, **how)


def plan_fix(
    snapshot: Snapshot,
    host: Host | str,
    *,
    drop: Iterable[str] = (),
    even_if_live: bool = False,
    policy: Policy | str = "xstate",
) -> Plan:
    """Plan the changes that make a host take a snapshot.

    Parameters
    ----------
    snapshot : Snapshot
        It stays as it is.
    host : Host or str
        A name is resolved as `xfast.resolve` does.
    drop : iterable of str
        Components to drop, besides those that the host's verdict asks for.
    even_if_live : bool
        Give up the data of `drop` where they are live.
    policy : Policy or str
        What to ask of the host.

    Returns
    -------
    Plan
        Without changes where there is nothing to do. A component that is live and not in
        `drop` stays, and is in `Plan.left`.

    Raises
    ------
    PolicyError
        If a component of `drop` is live and `even_if_live` is not given, or if its place is not
        known, so that its data would stay; or if an area that is to move contradicts the layout
        that was given, or has no place for a component that it claims; or if there may be vCPUs
        that were not read (`Snapshot.doubts`).
    ValueError
        If a word of `drop` names no component.

    *Source*: Linux arch/x86/kernel/fpu/xstate.c copy_uabi_to_xstate(): what KVM_SET_XSAVE takes.
    """
    rules = policy if isinstance(policy, Policy) else Policy(policy)
    asked = sum({1 << parse_component(word) for word in drop})
    if snapshot.doubts:
        raise PolicyError(
            f"{snapshot.path}: not every vCPU may have been read: {snapshot.doubts[0]}"
        )
    host = host_of(host)
    plan = _plan(snapshot, host, asked, even_if_live, rules)
    lossy = {finding.component for finding in plan.left if finding.fix == "lossy"}
    if not lossy:
        return plan
    words = [word for component in sorted(lossy) for word in component.split("+")]
    more = asked | sum({1 << parse_component(word) for word in words if word})
    with contextlib.suppress(PolicyError, ValueError):
        if not _plan(snapshot, host, more, True, rules).left:
            return replace(plan, ransom=tuple(words))
    return plan


def _plan(snapshot: Snapshot, host: Host, asked: int, even_if_live: bool, rules: Policy) -> Plan:
    """Plan the changes for a mask of components that are to go."""
    (before,) = check(snapshot, host, policy=rules)
    findings: dict[State, list[Finding]] = {}
    repairs = []
    for vcpu in snapshot.vcpus:
        state = state_of(vcpu, snapshot.kind, snapshot.producer)
        _require_droppable(f"{snapshot.path}: vCPU {vcpu.index}: ", state, asked, even_if_live)
        if state not in findings:  # many vCPUs are alike
            findings[state] = _actionable(state, host, rules)
        repair = _Repair(vcpu, state, host, findings[state], asked)
        against = repair.moves and _contradiction(vcpu)
        if against:
            raise PolicyError(
                f"{snapshot.path}: vCPU {vcpu.index}: --layout is contradicted: {against}; "
                "it may have been moved already"
            )
        repairs.append(repair)
    trims = any(repair.trims for repair in repairs)
    sizes = [repair.size(trims) for repair in repairs]
    grows = any(size > len(vcpu.area) for size, vcpu in zip(sizes, snapshot.vcpus, strict=True))
    try:
        vcpus = [repair.result(max(sizes) if trims or grows else None) for repair in repairs]
    except LayoutError as problem:  # an XCOMP_BV that gives a component of XSTATE_BV no place
        raise PolicyError(f"{snapshot.path}: an area can't be moved: {problem}") from None
    mended = replace(snapshot, vcpus=vcpus)
    (after,) = check(mended, host, policy=rules)
    areas = {
        i: new.area
        for i, (old, new) in enumerate(zip(snapshot.vcpus, vcpus, strict=True))
        if not np.array_equal(old.area, new.area)
    }
    changes = [change for repair in repairs for change in repair.changes()]
    changes += _resized(snapshot.vcpus, vcpus)
    lost_pkru = any(repair.dropped & PKRU for repair in repairs)
    notes: tuple[str, ...] = (PKRU_NOTES[snapshot.kind],) if lost_pkru else ()
    notes += tuple(
        f"vCPU {repair.vcpu.index}: what lay in {names_of(repair.wiped)}, whose XSTATE_BV "
        "bits are clear, is not passed on: zeroed"
        for repair in repairs
        if repair.wiped
    )
    notes += tuple(
        f"cpuinfo.img stays as it is: {finding.why}"
        for finding in criu_findings(subject_of(mended), host, rules)
        if finding.severity != "note"
    )
    return Plan(snapshot, host, areas, tuple(changes), before, after, notes)


def _resized(before: Sequence[Vcpu], after: Sequence[Vcpu]) -> Iterator[Change]:
    """Yield the changes of size; all areas of a file have the same."""
    for old, new in zip(before, after, strict=True):
        if len(old.area) != len(new.area):
            sizes = f"{len(old.area)}", f"{len(new.area)}"
            yield Change(old.index, "", "SIZE", "size", *sizes, "", "as long as the host takes it")


def _require_droppable(where: str, state: State, asked: int, even_if_live: bool) -> None:
    """Raise PolicyError if a component that is asked for may not be dropped."""
    live = asked & state.bv & (state.live | state.unreadable)
    if live and not even_if_live:
        raise PolicyError(f"{where}{names_of(live)} holds live data; --even-if-live gives them up")
    unplaced = live & state.unplaced & KNOWN_MASK
    if unplaced:
        raise PolicyError(
            f"{where}where {names_of(unplaced)} lies is not known "
            f"({state.layout_note}); --layout names the layout"
        )


def _contradiction(vcpu: Vcpu) -> str:
    """Say what in an area speaks against the layout that was given for it, if anything."""
    layout, area = vcpu.layout, vcpu.area
    if layout is None or vcpu.layout_source != "given":
        return ""
    header = engine.headers(area)
    written = int.from_bytes(area[MXCSR_MASK_FIELD].tobytes(), "little")
    maker = {MXCSR_MASK_INTEL: "intel", MXCSR_MASK_AMD: "amd"}.get(written)
    makers = {
        name.split("-")[0]
        for name, preset in PRESETS.items()
        if not preset.moved(layout, int(header.xstate_bv))
    }
    if maker and makers and maker not in makers:
        return (
            f"MXCSR_MASK {written:#x} is of {maker}, the layout of {' and '.join(sorted(makers))}"
        )
    if int(header.xcomp_bv) & XCOMP_BV_COMPACTED:
        return ""
    rest = area.copy()
    rest[:EXTENDED_OFFSET] = 0
    for slot in layout.slots:
        rest[slot.offset : slot.offset + slot.size] = 0
    return f"byte {np.flatnonzero(rest)[0]} is of none of its components" if rest.any() else ""


def _actionable(state: State, host: Host, policy: Policy) -> list[Finding]:
    """Return the findings that are to be mended, if they can be."""
    return [
        finding
        for finding in findings_of(state, target_of(state, facts_of(host)), policy)
        if finding.fix != "none"
        and (finding.severity == "blocks" or finding.open or RULES[finding.code].mends_notes)
    ]


class _Repair:
    """The repair of one vCPU: what its findings ask for, worked out step by step."""

    def __init__(
        self, vcpu: Vcpu, state: State, host: Host, findings: list[Finding], asked: int
    ) -> None:
        self.vcpu = vcpu
        self.state = state
        self.host = host
        self.reasons: dict[int, Finding] = {}
        for finding in findings:
            if RULES[finding.code].mends in ("drop", "trim"):
                for nr in _components(finding, state):
                    if finding.open and 1 << nr & XFEATURE_MASK_FPSSE:
                        continue  # every guest has them; a doubt about the kernel takes none away
                    if finding.fix == "safe" or asked >> nr & 1:
                        self.reasons.setdefault(nr, finding)
        self.dropped = state.bv & (asked | sum(1 << nr for nr in self.reasons))
        self.kept = state.bv & ~self.dropped
        codes = {finding.code: finding for finding in findings}
        self.layout = host.layout if "LAYOUT" in codes else state.layout
        self.moves = self.layout != state.layout
        self.why_moved = codes.get("LAYOUT")
        self.unclean = codes.get("FORMAT")
        self.expands = bool(self.unclean and state.xcomp & XCOMP_BV_COMPACTED)
        self.wiped = 0
        self.trims = TILEDATA & self.dropped and "SIZE" in codes and not state.portable

    def size(self, trims: bool) -> int:
        """Return the bytes that the result needs at least; `trims` cuts it to the host's size."""
        have = len(self.vcpu.area)
        if trims:
            have = min(have, max(self.host.xsave2_size or 0, KVM_XSAVE_SIZE))
        if self.layout is not None and (trims or self.moves or self.expands):
            have = max(have, self.layout.standard_size(self.kept))
        return have

    def result(self, size: int | None) -> Vcpu:
        """Return the repaired vCPU; where its file can take another size, in `size` bytes."""
        vcpu, known = self.vcpu, self.vcpu.layout or Layout(())
        area = vcpu.area.copy()
        engine.keep(area, known, engine.ALL & ~self.dropped)
        if self.layout is not None and (self.moves or self.expands):
            area = move_areas(area, known, self.layout, self.host, size=size or len(area))
        elif self.unclean:
            area[HEADER_REST] = 0
        if not vcpu.portable and not np.array_equal(area, vcpu.area):
            self.wiped = _leftover(vcpu, self.state.bv)
            _clear_rest(area, self.layout or known, self.kept)
        if size is not None and not vcpu.portable:
            whole = np.zeros(size, np.uint8)
            whole[: area.size] = area[:size]
            area = whole
        source = "given" if self.moves else vcpu.layout_source
        return replace(vcpu, area=area, layout=self.layout, layout_source=source)

    def changes(self) -> Iterator[Change]:
        """Yield what differs from before, with its reason."""
        state, index = self.state, self.vcpu.index
        for nr in bits(self.dropped):
            reason = self.reasons.get(nr)
            yield Change(
                index,
                name_of(nr),
                reason.code if reason else "",
                "xstate_bv",
                f"{state.bv:#x}",
                f"{self.kept:#x}",
                _held(state, nr),
                reason.why if reason else "its removal was asked for",
            )
        if self.moves and self.why_moved and self.layout and state.layout:
            there = state.layout.moved(self.layout, self.kept)
            names = _name(state.layout), _name(self.layout)
            yield Change(index, names_of(there), "LAYOUT", "layout", *names, "", self.why_moved.why)
        if self.unclean:
            found = f"xcomp_bv {state.xcomp:#x}" + ", reserved bytes" * state.reserved
            yield Change(index, "", "FORMAT", "header", found, "zero", "", self.unclean.why)


def _bytes_of(nr: int, layout: Layout) -> slice:
    """Return where the registers of a component lie, all of them zero in the init state."""
    if nr in LEGACY_FIELDS:
        return LEGACY_FIELDS[nr]
    slot = layout.slot(nr)
    return slice(slot.offset, slot.offset + slot.size)


def _leftover(vcpu: Vcpu, bv: int) -> int:
    """Return the components outside `bv` with bytes other than zero.

    What is present may lie at the same place (APX lies at MPX's), and counts.
    """
    known = vcpu.layout or Layout(())
    if engine.headers(vcpu.area).xcomp_bv:
        return 0  # there, components whose bits are clear need have no place
    area = vcpu.area.copy()
    placed = known.mask & ~SUPERVISOR_MASK | XFEATURE_MASK_FPSSE
    for nr in bits(placed & bv):
        area[_bytes_of(nr, known)] = 0
    return sum(1 << nr for nr in bits(placed & ~bv) if area[_bytes_of(nr, known)].any())


def _clear_rest(area: NDArray[np.uint8], layout: Layout, kept: int) -> None:
    """Zero all that belongs to none of the components in `kept`, so that no old byte goes along.

    The control registers of x87 and SSE get their init values where nothing needs them. Where
    the place of a present component is not known, or the area stays compacted, only the
    components whose place is known are zeroed.
    """
    placed = layout.mask & ~SUPERVISOR_MASK | XFEATURE_MASK_FPSSE
    present = [_bytes_of(nr, layout) for nr in bits(placed & kept)]
    fields = [MXCSR_MASK_FIELD, SOFTWARE_FIELD, HEADER, *present]
    clean = np.zeros_like(area)
    if kept & ~SUPERVISOR_MASK & ~placed or engine.headers(area).xcomp_bv:
        clean[:] = area
        for nr in bits(placed & ~kept):
            clean[_bytes_of(nr, layout)] = 0
    for given, place, init in (
        (kept & X87, X87_CONTROL, FCW_INIT),
        (kept & (SSE | AVX), MXCSR_FIELD, MXCSR_INIT),
    ):
        if given:
            fields.append(place)
        else:
            clean[place] = np.frombuffer(init.to_bytes(place.stop - place.start, "little"), "u1")
    for place in fields:
        clean[place] = area[place]
    area[:] = clean


def _name(layout: Layout) -> str:
    return recognise(layout) or layout.name


def _components(finding: Finding, state: State) -> Iterator[int]:
    """Yield the numbers of the components that a finding names, as far as they are present."""
    for word in filter(None, finding.component.split("+")):
        if word in BY_NAME or word.startswith("bit"):
            nr = parse_component(word)
            if state.bv >> nr & 1:
                yield nr


def _held(state: State, nr: int) -> str:
    """Say in a word what a present component holds."""
    if nr == PKRU_NR and state.pkru and not state.live & PKRU:
        return "default"
    if state.unreadable >> nr & 1:
        return "unknown"
    return "live" if state.live >> nr & 1 else "init"
