"""What in a CPUID list or boot log contradicts itself, or is known to end badly: warnings.

Each rule is one row of LINTS: a name, what it means, and a function that says what is wrong with
a host, or nothing. No rule changes a fact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from itertools import combinations
from operator import or_
from typing import NamedTuple

from xfast.errors import LayoutError
from xfast.hosts.model import Host
from xfast.kernels.guest import announced_problem
from xfast.xsave.cpuid import Cpuid
from xfast.xsave.features import (
    BY_NAME,
    BY_NR,
    SUPERVISOR_MASK,
    XFEATURE_MASK_AVX512,
    XFEATURE_MASK_FPSSE,
    XFEATURE_MASK_MPX,
    XFEATURE_MASK_XTILE,
    bits,
    names_of,
)
from xfast.xsave.layout import Layout, Slot

LBR = BY_NAME["lbr"].nr
"""The one supervisor component whose size differs from CPU to CPU."""

UNITS = (0x4, XFEATURE_MASK_MPX, XFEATURE_MASK_AVX512, XFEATURE_MASK_XTILE)
"""User components that XCR0 has together or not at all."""

COMBINATIONS_LIMIT = 4096
"""How many sets of components are tried to find those that make a size."""


class Lint(NamedTuple):
    """One rule: its name, what it means, and who finds it."""

    name: str
    meaning: str
    find: Callable[[Host, Cpuid], Iterable[str]]


def subsets(parts: Iterable[int]) -> Iterator[int]:
    """Yield every union of some of `parts` (masks), the largest first."""
    parts = list(parts)
    for count in range(len(parts), -1, -1):
        for chosen in combinations(parts, count):
            yield reduce(or_, chosen, 0)


def parts_of(mask: int) -> list[int]:
    """Return the parts that XCR0 can have of `mask`: units, and single components."""
    units = [unit for unit in UNITS if mask & unit == unit]
    alone = mask & ~reduce(or_, units, 0) & ~XFEATURE_MASK_FPSSE
    return units + [1 << nr for nr in bits(alone)]


def masks_of_size(layout: Layout, size: int, user: int, supervisor: int) -> int | None:
    """Return the components whose compacted area has `size` bytes, or None.

    The largest set that does, of those that XCR0 and IA32_XSS can have (masks).
    """
    tried = 0
    for xss in subsets(1 << nr for nr in bits(supervisor)):
        for xcr0 in subsets(parts_of(user)):
            tried += 1
            if tried > COMBINATIONS_LIMIT:
                return None
            mask = xcr0 | xss
            if layout.compacted_size(mask) == size:
                return mask | XFEATURE_MASK_FPSSE
    return None


def _illegal_xcr0(_: Host, cpuid: Cpuid) -> Iterator[str]:
    problem = announced_problem(cpuid.xcr0)
    if cpuid.xcr0 & XFEATURE_MASK_XTILE in (0x20000, 0x40000):
        yield (
            "leaf 0xD has one component of AMX without the other, as Linux 5.17 to 6.3 offer it "
            "to guests without permission (ended by 55cd57b596e8 in v6.4): a guest that enables "
            "all that it is offered faults at XSETBV"
        )
    elif problem:
        yield f"leaf 0xD announces XCR0 {cpuid.xcr0:#x}, which XSETBV refuses: {problem}"


def _area_size(host: Host, cpuid: Cpuid) -> Iterator[str]:
    row, layout = cpuid.find(0xD), host.layout
    if row is None or layout is None or cpuid.unplaced or not row.ecx:
        return
    expected = layout.standard_size(cpuid.xcr0)
    if row.ecx != expected:
        yield f"leaf 0xD ECX is {row.ecx}; its sub-leaves make {expected} of XCR0 {cpuid.xcr0:#x}"
    ends = {layout.standard_size(1 << nr) for nr in bits(cpuid.xcr0)} | {expected}
    if row.ebx not in ends:
        yield f"leaf 0xD EBX is {row.ebx}, where none of its sub-leaves ends"


def _compacted_size(host: Host, cpuid: Cpuid) -> Iterator[str]:
    row, layout = cpuid.find(0xD, 1), host.layout
    if row is None or layout is None or not row.ebx or not row.eax & 0xA:
        return
    layout = _with_supervisor(layout, cpuid.unplaced)
    if cpuid.unplaced & ~layout.mask:
        return
    user, supervisor = cpuid.xcr0, cpuid.xss
    made_by = masks_of_size(layout, row.ebx, user, supervisor)
    if made_by is None:
        whole = layout.compacted_size(user | supervisor)
        yield (
            f"leaf 0xD.1 EBX is {row.ebx}, which no set of its components makes: {whole} is "
            f"{user:#x} | {supervisor:#x} compacted; Linux calls it an XSAVE consistency problem"
        )
    elif made_by & supervisor and host.provenance.get("kvm_xcr0") in ("dump", "assumed"):
        yield (
            f"leaf 0xD.1 EBX is {row.ebx}, the size with {names_of(made_by & supervisor)}: a "
            "guest starts with IA32_XSS 0, and finds another size"
        )


def _with_supervisor(layout: Layout, mask: int) -> Layout:
    """Return `layout` and those of its missing components in `mask` whose size is the SDM's."""
    more = [
        Slot(nr, BY_NR[nr].size, 0, True, BY_NR[nr].align64)
        for nr in bits(mask & SUPERVISOR_MASK & ~(1 << LBR))
    ]
    return Layout(tuple(sorted((*layout.slots, *more))), layout.name)


def _feature_alone(_: Host, cpuid: Cpuid) -> Iterator[str]:
    if cpuid.find(1) is None or cpuid.find(7) is None or cpuid.find(0xD) is None:
        return
    for mask, flag in ((0x4, "avx"), (0xE0, "avx512f"), (0x200, "pku"), (0x60000, "amx_tile")):
        if flag in cpuid.features and cpuid.xcr0 & mask != mask:
            lost = names_of(mask & ~cpuid.xcr0)
            yield f"{flag} is announced and leaf 0xD lacks {lost}: nothing can save its state"


def _component_alone(_: Host, cpuid: Cpuid) -> Iterator[str]:
    if cpuid.find(1) is None or cpuid.find(7) is None:
        return
    components = [BY_NR[nr] for nr in bits(cpuid.xcr0 & ~XFEATURE_MASK_FPSSE) if nr in BY_NR]
    lost = sum(c.bit for c in components if c.flag and c.flag not in cpuid.features)
    if lost:
        yield f"leaf 0xD has {names_of(lost)} without its feature: Linux does not enable it"


def _unplaced(_: Host, cpuid: Cpuid) -> Iterator[str]:
    if cpuid.unplaced:
        yield f"leaf 0xD announces {names_of(cpuid.unplaced)} and has no sub-leaf that places it"


LINTS: tuple[Lint, ...] = (
    Lint("xcr0", "the components announced are no value that XCR0 can have", _illegal_xcr0),
    Lint("size", "the standard size disagrees with the sub-leaves", _area_size),
    Lint("compacted-size", "the compacted size disagrees with the sub-leaves", _compacted_size),
    Lint("feature-alone", "a feature is announced without its state", _feature_alone),
    Lint("component-alone", "a component is announced without its feature", _component_alone),
    Lint("unplaced", "a component has no sub-leaf", _unplaced),
)
"""The rules, in the order in which their warnings are printed."""


def warnings(host: Host) -> list[str]:
    """Return what is odd about a host's CPUID list: ``NAME: what is wrong``, one clause each."""
    if host.cpuid is None:
        return []
    try:
        return [f"{rule.name}: {text}" for rule in LINTS for text in rule.find(host, host.cpuid)]
    except LayoutError as error:
        return [f"layout: {error}"]
