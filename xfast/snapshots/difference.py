"""Which components and registers differ between two snapshots, vCPU by vCPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xfast.snapshots.model import Snapshot, Vcpu
from xfast.xsave.area import classify, diff, headers
from xfast.xsave.features import HEADER_OFFSET, XFEATURE_MASK_FPSSE, bits, name_of
from xfast.xsave.layout import Layout
from xfast.xsave.registers import REGISTERS, as_integers

CONTROL = ("xcr0", "xss", "xfd")


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference. The fields are those of the JSON answer, and stable.

    `register` is empty where a component differs in bytes that belong to no register, in being
    absent or init, or where its layout is unknown; `one` and `two` are then words, else
    hexadecimal.
    """

    vcpu: int
    component: str
    register: str
    one: str
    two: str

    def as_json(self) -> dict[str, Any]:
        """Return the difference as the JSON answer has it."""
        return {name: getattr(self, name) for name in self.__slots__}


def compare(
    one: Sequence[Snapshot], two: Sequence[Snapshot], *, values_only: bool = False
) -> list[Difference]:
    """Compare the extended state of two files by value.

    Layouts, formats and containers take no part. Where a component is absent here and holds its
    init value there, that is told, without registers.

    Parameters
    ----------
    one, two : sequence of Snapshot
        As `xfast.read` returns them; compared in their order, vCPUs by number, and vCPUs with
        threads by position.
    values_only : bool
        Take an absent component for one that holds its init value, as a restore does.

    Returns
    -------
    list of Difference
        Empty where the guests would see the same registers.
    """
    found: list[Difference] = []
    if len(one) != len(two):
        found.append(Difference(0, "", "snapshots", f"{len(one)}", f"{len(two)}"))
    for first, second in zip(one, two, strict=False):
        ours, theirs = _by_number(first.vcpus), _by_number(second.vcpus)
        if first.kind != second.kind:  # a VM's vCPUs and a core's threads: by position
            theirs = dict(zip(ours, second.vcpus, strict=False))
        for key in sorted(ours.keys() | theirs.keys()):
            if key in ours and key in theirs:
                found += _vcpus(ours[key], theirs[key], values_only)
            else:
                sides = ("present" if key in side else "absent" for side in (ours, theirs))
                found.append(Difference(key[0], "", "vcpu", *sides))
    return found


def _by_number(vcpus: Sequence[Vcpu]) -> dict[tuple[int, int], Vcpu]:
    """Return vCPUs by their number, and by how many of that number came before."""
    found: dict[tuple[int, int], Vcpu] = {}
    before = Counter[int]()
    for vcpu in vcpus:
        found[vcpu.index, before[vcpu.index]] = vcpu
        before[vcpu.index] += 1
    return found


def _vcpus(one: Vcpu, two: Vcpu, values_only: bool) -> Iterator[Difference]:
    for name in CONTROL:
        values = getattr(one, name), getattr(two, name)
        if None not in values and values[0] != values[1]:
            yield Difference(one.index, "", name, *(f"{value:#x}" for value in values))
    layouts = one.layout or Layout(()), two.layout or Layout(())
    unplaced = 0
    for vcpu, layout in zip((one, two), layouts, strict=True):
        unplaced |= headers(vcpu.area).xstate_bv & ~layout.mask
    differing = diff(one.area, two.area, *layouts) & ~unplaced
    if unplaced:
        yield from _unknown(one, two)
    if differing:
        yield from _registers(one, two, layouts, differing)
    if values_only:
        return
    classes = classify(one.area, layouts[0]), classify(two.area, layouts[1])
    for nr in bits((classes[0].xstate_bv ^ classes[1].xstate_bv) & ~differing & ~unplaced):
        yield Difference(one.index, name_of(nr), "", *(side.state(nr) for side in classes))


def _registers(
    one: Vcpu, two: Vcpu, layouts: tuple[Layout, Layout], differing: int
) -> Iterator[Difference]:
    """Compare the registers of the components that differ (mask)."""
    sides = (
        as_integers(one.area, layouts[0], one.mode),
        as_integers(two.area, layouts[1], two.mode),
    )
    for nr in bits(differing):
        rows = [
            Difference(one.index, name_of(nr), name, *(_value(side, name) for side in sides))
            for name, register in REGISTERS.items()
            if register.component == nr
            and any(name in side for side in sides)
            and _number(sides[0], name) != _number(sides[1], name)
        ]
        yield from rows or [Difference(one.index, name_of(nr), "", "other bytes", "other bytes")]


def _unknown(one: Vcpu, two: Vcpu) -> Iterator[Difference]:
    """Compare what lies at unknown places: bytes with bytes, where both are alike."""
    masks = [headers(vcpu.area).xstate_bv for vcpu in (one, two)]
    same = np.array_equal(one.area[HEADER_OFFSET:], two.area[HEADER_OFFSET:])
    if any(mask & ~XFEATURE_MASK_FPSSE for mask in masks) and not same:
        yield Difference(
            one.index, "extended", "", *(f"xstate_bv {mask:#x}, layout unknown" for mask in masks)
        )


def _number(side: dict[str, tuple[int, int]], name: str) -> int | None:
    return side[name][0] if name in side else None


def _value(side: dict[str, tuple[int, int]], name: str) -> str:
    if name not in side:
        return "absent"
    value, size = side[name]
    return f"{value:#0{2 + 2 * size}x}"
