"""Layouts: where each component lies in an XSAVE area. "Standard format" is several layouts.

Bytes never travel without their layout: the mask 0x207 puts PKRU at 2688 on Intel, at 832 on
AMD Zen 2 and at 2432 on Zen 3. A layout is a value; it comes from CPUID leaf 0xD, from a
core file's NT_X86_XSAVE_LAYOUT note, or from a named preset.

*Source*: Intel SDM vol. 1 section 13.4 and vol. 2 CPUID leaf 0DH; Linux
arch/x86/kernel/fpu/xstate.c xfeature_uncompact_order, xstate_calculate_size().
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import combinations
from typing import NamedTuple

from xfast.errors import LayoutError
from xfast.xsave.features import (
    BY_NR,
    COMPONENTS,
    EXTENDED_OFFSET,
    XFEATURE_MASK_FPSSE,
    bits,
    name_of,
)

COMPONENT_LIMIT = 1 << 20
"""No component is larger than this (bytes): a dump that says otherwise is damaged."""


class Slot(NamedTuple):
    """Where one extended component lies: bytes, `offset` of the standard format (0: none)."""

    nr: int
    size: int
    offset: int
    supervisor: bool = False
    align64: bool = False
    xfd: bool = False


@dataclass(frozen=True)
class Layout:
    """The extended components of one machine, and where each lies.

    Parameters
    ----------
    slots : tuple of Slot
        Components 2..62, ascending by number, no number twice.
    name : str
        A preset's name, or what the layout was read from; takes no part in comparisons.

    Raises
    ------
    LayoutError
        If a slot lies outside what an XSAVE area can hold, or two user slots overlap
        (MPX and APX share their bytes and are the one exception).
    """

    slots: tuple[Slot, ...]
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        ends = [(slot.offset, slot.offset + slot.size, slot) for slot in self.slots if slot.offset]
        numbers = [slot.nr for slot in self.slots]
        if sorted(set(numbers)) != numbers:
            raise LayoutError(f"layout: expected components, each once, ascending, got {numbers}")
        for slot in self.slots:
            if not 2 <= slot.nr <= 62:
                raise LayoutError(f"layout: expected components 2 to 62, got {slot.nr}")
            if not 0 < slot.size <= COMPONENT_LIMIT or slot.offset > COMPONENT_LIMIT:
                raise LayoutError(
                    f"layout: expected a size of 1 to {COMPONENT_LIMIT} and an offset below, got "
                    f"size {slot.size}, offset {slot.offset} of component {slot.nr} "
                    f"({name_of(slot.nr)})"
                )
            if slot.offset < EXTENDED_OFFSET and (slot.offset or not slot.supervisor):
                raise LayoutError(
                    f"layout: expected {EXTENDED_OFFSET} or more, got offset {slot.offset} of "
                    f"component {slot.nr} ({name_of(slot.nr)})"
                )
        ends.sort()
        for (_, end, one), (start, _, two) in combinations(ends, 2):
            if start < end and {one.nr, two.nr} not in ({3, 19}, {4, 19}):
                raise LayoutError(
                    f"layout: components {one.nr} ({name_of(one.nr)}) and {two.nr} "
                    f"({name_of(two.nr)}) overlap at offset {start}"
                )

    @cached_property
    def _hash(self) -> int:
        return hash(self.slots)

    def __hash__(self) -> int:
        """Hash the slots, once: the engine's tables are found by layout on every call."""
        return self._hash

    @cached_property
    def by_nr(self) -> dict[int, Slot]:
        """The slots by component number."""
        return {slot.nr: slot for slot in self.slots}

    @cached_property
    def user_mask(self) -> int:
        """Mask of the components that a standard-format area can hold, x87 and SSE included."""
        return XFEATURE_MASK_FPSSE | sum(1 << slot.nr for slot in self.slots if slot.offset)

    @cached_property
    def mask(self) -> int:
        """Mask of all components, supervisor ones included."""
        return XFEATURE_MASK_FPSSE | sum(1 << slot.nr for slot in self.slots)

    def slot(self, nr: int) -> Slot:
        """Return the slot of component `nr`.

        Raises
        ------
        LayoutError
            If this layout has none.
        """
        try:
            return self.by_nr[nr]
        except KeyError:
            raise LayoutError(
                f"layout {self.name or 'unnamed'}: no component {nr} ({name_of(nr)}); "
                f"it has {', '.join(str(slot.nr) for slot in self.slots)}"
            ) from None

    @cached_property
    def _whole_size(self) -> int:
        return self.standard_size(self.user_mask)

    def standard_size(self, mask: int | None = None) -> int:
        """Return the bytes of a standard-format area with the components in `mask`.

        The end of the component that ends last, which is not the one of the highest number
        where APX is concerned. Components that this layout does not know count for nothing.
        """
        if mask is None:
            return self._whole_size
        ends = [s.offset + s.size for s in self.slots if s.offset and mask >> s.nr & 1]
        return max(ends, default=EXTENDED_OFFSET)

    def compacted_offsets(self, xcomp_bv: int) -> dict[int, int]:
        """Return {component: offset} of a compacted area with this XCOMP_BV, ascending.

        Raises
        ------
        LayoutError
            If XCOMP_BV names an extended component that this layout does not have.
        """
        offsets = {}
        position = EXTENDED_OFFSET
        for nr in bits(xcomp_bv & ~XFEATURE_MASK_FPSSE & ((1 << 63) - 1)):
            slot = self.slot(nr)
            if slot.align64:
                position = (position + 63) & ~63
            offsets[nr] = position
            position += slot.size
        return offsets

    def compacted_size(self, xcomp_bv: int) -> int:
        """Return the bytes of a compacted area with this XCOMP_BV."""
        offsets = self.compacted_offsets(xcomp_bv)
        if not offsets:
            return EXTENDED_OFFSET
        last = max(offsets)
        return offsets[last] + self.slot(last).size

    def moved(self, other: Layout, mask: int) -> int:
        """Return which components of `mask` lie or measure otherwise in `other` (bits).

        A component that either of the two lacks has not moved: it is missing.
        """
        moved = 0
        for slot in self.slots:
            there = other.by_nr.get(slot.nr)
            if (
                there
                and mask >> slot.nr & 1
                and (slot.offset, slot.size) != (there.offset, there.size)
            ):
                moved |= 1 << slot.nr
        return moved

    def restricted(self, mask: int) -> Layout:
        """Return this layout with only the components in `mask`."""
        return Layout(tuple(s for s in self.slots if mask >> s.nr & 1), self.name)


def from_leaf_d(
    rows: Mapping[int, tuple[int, int, int, int]], name: str = "cpuid"
) -> tuple[Layout, int]:
    """Return the layout that CPUID leaf 0xD describes, and the components it leaves open.

    Parameters
    ----------
    rows : mapping of int to (eax, ebx, ecx, edx)
        Sub-leaves of leaf 0xD. Dumps often stop at the first empty one.

    Returns
    -------
    (Layout, int)
        The mask names components that sub-leaf 0 or 1 announces without a sub-leaf of their
        own: their place is unknown, and is not guessed.

    Raises
    ------
    LayoutError
        If the sub-leaves describe an impossible layout.

    *Source*: Intel SDM vol. 2, CPUID leaf 0DH.
    """
    none = (0, 0, 0, 0)
    eax, _, _, edx = rows.get(0, none)
    _, _, xss_low, xss_high = rows.get(1, none)
    announced = (eax | edx << 32 | xss_low | xss_high << 32) & ~XFEATURE_MASK_FPSSE & ~(1 << 63)
    slots = []
    for nr in bits(announced):
        size, offset, ecx, _ = rows.get(nr, none)
        if size:
            supervisor = bool(ecx & 1)
            slots.append(
                Slot(
                    nr, size, 0 if supervisor else offset, supervisor, bool(ecx & 2), bool(ecx & 4)
                )
            )
    layout = Layout(tuple(slots), name)
    return layout, announced & ~layout.mask


def from_note(desc: bytes, name: str = "NT_X86_XSAVE_LAYOUT") -> Layout:
    """Return the layout that a core file's NT_X86_XSAVE_LAYOUT note holds.

    Parameters
    ----------
    desc : bytes
        The note's descriptor: records of four u32, {type, size, offset, flags}.

    Raises
    ------
    LayoutError
        If the length is no multiple of 16, or the records describe an impossible layout.

    *Source*: Linux commit ba386777a30b ("x86/elf: Add a new FPU buffer layout info to x86
    core files") (in v6.12).
    """
    if len(desc) % 16:
        raise LayoutError(f"NT_X86_XSAVE_LAYOUT: expected a multiple of 16, got {len(desc)} bytes")
    slots = []
    for nr, size, offset, _ in struct.iter_unpack("<4I", desc):
        known = BY_NR.get(nr)
        slots.append(Slot(nr, size, offset, False, *(known[7:9] if known else ())))
    return Layout(tuple(sorted(slots)), name)


def _intel(mask: int, name: str, **moved: tuple[int, int]) -> Layout:
    """Build a layout from the component table; `moved` gives {name: (size, offset)}."""
    slots = []
    for c in COMPONENTS:
        if c.nr >= 2 and mask >> c.nr & 1:
            size, offset = moved.get(c.name, (c.size, c.offset))
            slots.append(Slot(c.nr, size, offset, c.supervisor, c.align64, c.xfd))
    return Layout(tuple(slots), name)


PRESETS: dict[str, Layout] = {
    "intel": _intel(0xFFFFC, "intel"),
    "amd-zen2": _intel(0x204, "amd-zen2", pkru=(64, 832)),
    "amd-zen3": _intel(0x1A04, "amd-zen3", pkru=(8, 2432)),
    "amd-zen4": _intel(
        0x1AE4,
        "amd-zen4",
        opmask=(64, 832),
        zmm_hi256=(512, 896),
        hi16_zmm=(1024, 1408),
        pkru=(8, 2432),
    ),
    "amd-bulldozer": _intel(1 << 62 | 4, "amd-bulldozer"),
}
"""Layouts by name. A preset holds all that its CPUs may have; each CPU has a subset.

*Source*: CPUID dumps of 404 machines; tests compare every one of them.
"""


def preset(name: str) -> Layout:
    """Return the preset called `name`.

    Raises
    ------
    LayoutError
        If there is none of that name.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise LayoutError(f"layout: expected one of {', '.join(PRESETS)}, got {name!r}") from None


def layout_of(layout: Layout | str) -> Layout:
    """Return a Layout, or the preset of this name: how public functions take a layout.

    Raises
    ------
    LayoutError
        If there is no preset of that name.
    """
    return preset(layout) if isinstance(layout, str) else layout


@lru_cache(maxsize=512)
def recognise(layout: Layout) -> str | None:
    """Return the preset of which `layout` is a subset, or None. The first match in the table."""
    for name, known in PRESETS.items():
        if all(slot == known.by_nr.get(slot.nr) for slot in layout.slots):
            return name
    return None


def candidates(mask: int, size: int | None = None) -> Iterable[str]:
    """Yield the presets that can hold `mask`, and whose standard size for it is `size`.

    What a bare area tells of its layout; more than one answer means that it does not tell.
    """
    for name, known in PRESETS.items():
        if not mask & ~known.user_mask and size in (None, known.standard_size(mask)):
            yield name


__all__ = [
    "PRESETS",
    "Layout",
    "Slot",
    "candidates",
    "from_leaf_d",
    "from_note",
    "preset",
    "recognise",
]
