"""Where the components of a bare area lie, from what the area itself and its CPUID tell.

"Standard format" is several layouts. What fixes the layout is used first (given, or CPUID leaf
0xD); the rest is evidence, and each answer names it. Where evidence is missing or contradicts
itself, only what lies at one place in every layout that is left is placed; the rest stays unknown.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast.engine import keys
from xfast.xsave.cpuid import Cpuid
from xfast.xsave.features import (
    BY_NAME,
    COMPONENTS,
    EXTENDED_OFFSET,
    MXCSR_MASK_AMD,
    MXCSR_MASK_INTEL,
    PKRU,
    XCOMP_BV_COMPACTED,
    names_of,
)
from xfast.xsave.layout import PRESETS, Layout, Slot, candidates
from xfast.xsave.rows import table_of

KNOWN_MASK = sum(c.bit for c in COMPONENTS)
MXCSR_MASK_OFFSET = 28
SOFTWARE_OFFSET = 464
"""Where Linux and FreeBSD note the user components that the kernel knows (sw_bytes.xfeatures)."""

VENDORS = {
    "GenuineIntel": "intel",
    "CentaurHauls": "intel",
    "  Shanghai  ": "intel",
    "AuthenticAMD": "amd",
    "HygonGenuine": "amd",
}
"""CPUID's vendor text -> the beginning of the names of its presets."""


NOWHERE = Layout(())
"""Only the legacy region's place is certain where the layout is not known."""


class Place(NamedTuple):
    """A layout and how it is known: the fields `layout*` of Vcpu."""

    layout: Layout | None
    source: str
    note: str = ""


BY_BYTES = "where its bytes lie"


def asks_bytes(
    area: NDArray[np.uint8],
    *,
    given: Layout | None = None,
    cpuid: Cpuid | None = None,
    mask: int = 0,
) -> bool:
    """Tell whether `place` asks the components' bytes, so that areas with equal headers may differ.

    The parameters are those of `place`.
    """
    if given is not None:
        return False
    xstate_bv, xcomp_bv = header(area)
    known, vendor = _told(cpuid)
    if known.slots and not xstate_bv & ~known.mask:
        return False
    wanted = mask | software_mask(area) | xstate_bv | known.user_mask
    names, _ = _left(area, wanted, None, known, vendor, by_bytes=False)
    return len(_groups(names, wanted, bool(xcomp_bv & XCOMP_BV_COMPACTED))) != 1


_BOUNDS = sorted(
    {
        bound
        for layout in PRESETS.values()
        for slot in layout.slots
        if slot.offset
        for bound in (slot.offset, slot.offset + slot.size)
    }
)
PIECES = struct.pack(f"<{len(_BOUNDS)}i", *_BOUNDS)
"""Where the presets' components begin and end: of the components' bytes, a layout is told by
nothing but which of these pieces are all zeros."""
SEEN_LIMIT = 1024


class Seen(NamedTuple):
    """A place that was found, and a number that no other has.

    `headed` tells whether the areas have a header with at least one component, and known ones only.
    """

    place: Place
    number: int
    xstate_bv: int
    headed: bool


_numbers = itertools.count()
_seen = keys.Seen(PIECES, SEEN_LIMIT)

forget = _seen.clear
"""Empty the cache: for those who measure, or compare."""


def seen(
    data: bytes,
    start: int,
    size: int,
    given: Layout | None = None,
    cpuid: Cpuid | None = None,
    mask: int = 0,
) -> tuple[Seen, bytes]:
    """Return what `place` finds for the `size` bytes at `start`, worked out once for all alike.

    Returns
    -------
    Seen
    bytes
        The area's `xfast.xsave.area.FACTS` by that layout. With the number they are all that
        there is to know of the area but its registers' values: what a key is made of.

    Raises
    ------
    LayoutError
        As `place` does.
    """
    owner = cpuid if given is None else given
    return _seen.find(data, start, size, owner, mask) or _learn(
        data, start, size, given, cpuid, mask
    )


def _learn(
    data: bytes, start: int, size: int, given: Layout | None, cpuid: Cpuid | None, mask: int
) -> tuple[Seen, bytes]:
    area = np.frombuffer(data, np.uint8, size, start)
    place = Place(given, "given") if given is not None else _sought(area, cpuid, mask, None)
    xstate_bv, _ = header(area)
    one = Seen(place, next(_numbers), xstate_bv, headed(area) and xstate_bv != 0)
    asks = asks_bytes(area, given=given, cpuid=cpuid, mask=mask)
    owner = cpuid if given is None else given
    table = table_of(place.layout or NOWHERE)
    return _seen.add(data, start, size, owner, mask, asks, table, one)


def _told(cpuid: Cpuid | None) -> tuple[Layout, str]:
    """Return the layout that CPUID describes, and the beginning of its vendor's presets' names."""
    if cpuid is None:
        return Layout(()), ""
    return cpuid.layout, VENDORS.get(cpuid.vendor or "", "")


def header(area: Any) -> tuple[int, int]:
    """Return XSTATE_BV and XCOMP_BV of one area, any buffer of at least 576 bytes."""
    xstate_bv, xcomp_bv = struct.unpack_from("<2Q", area, 512)
    return xstate_bv, xcomp_bv


def software_mask(area: NDArray[np.uint8]) -> int:
    """Return the kernel's word of user components at byte 464, or 0 where it is implausible.

    *Source*: Linux arch/x86/include/uapi/asm/sigcontext.h struct _fpx_sw_bytes.
    """
    (mask,) = struct.unpack_from("<Q", area.data, SOFTWARE_OFFSET)
    plausible = mask & 3 == 3 and not mask & ~KNOWN_MASK and not header(area)[0] & ~mask
    return int(mask) if plausible else 0


def headed(area: Any) -> bool:
    """Tell whether bytes have the header of an XSAVE area, with known components only."""
    xstate_bv, xcomp_bv = header(area)
    known = not (xstate_bv | xcomp_bv & ~XCOMP_BV_COMPACTED) & ~KNOWN_MASK
    return known and (not xcomp_bv or bool(xcomp_bv & XCOMP_BV_COMPACTED))


def controlled(area: Any) -> bool:
    """Tell whether bytes have FCW and MXCSR as a CPU can have written them.

    *Source*: Intel SDM vol. 1 section 8.1.5 (FCW bit 6 is always set), section 10.2.3.
    """
    fcw, mxcsr = struct.unpack_from("<H22xI", area)
    return fcw & 0xE0C0 == 0x40 and not mxcsr & ~MXCSR_MASK_AMD


def blank(area: NDArray[np.uint8]) -> bool:
    """Tell whether an area has neither control words nor a component, as no kernel writes it."""
    return not any(struct.unpack_from("<H22xI", area.data)) and not header(area)[0]


def place(
    area: NDArray[np.uint8],
    *,
    given: Layout | None = None,
    cpuid: Cpuid | None = None,
    mask: int = 0,
    size: int | None = None,
) -> Place:
    """Find the layout of one area.

    Parameters
    ----------
    area : (size,) uint8
    given : Layout, optional
        What the user says; nothing else is asked then.
    cpuid : Cpuid, optional
        The guest's CPUID. KVM writes areas in the host's layout, and gives guests the host's
        leaf 0xD; a component that the guest may not have is sought by inference.
    mask : int
        Components that the area was made for, where something tells (XCR0).
    size : int, optional
        Bytes, where the producer made the area exactly as long as `mask` needs.

    Returns
    -------
    Place

    Raises
    ------
    LayoutError
        If leaf 0xD describes an impossible layout.
    """
    if given is not None:
        return Place(given, "given")
    if size:
        return _sought(area, cpuid, mask, size)
    return seen(area.tobytes(), 0, area.size, cpuid=cpuid, mask=mask)[0].place


def _sought(area: NDArray[np.uint8], cpuid: Cpuid | None, mask: int, size: int | None) -> Place:
    """Find the layout of an area as `place` does, whether or not it was found before."""
    xstate_bv, _ = header(area)
    known, vendor = _told(cpuid)
    if known.slots and not xstate_bv & ~known.mask:
        return Place(known, "cpuid")
    wanted = mask | software_mask(area) | xstate_bv | known.user_mask
    found = infer(area, wanted, size=size, agrees=known, vendor=vendor)
    if found.layout is None:
        present = xstate_bv | known.user_mask
        fewer = infer(area, present, agrees=known, vendor=vendor) if present != wanted else found
        if fewer.layout is not None:
            found = fewer
    if found.layout is not None:
        return found
    if header(area)[1] & XCOMP_BV_COMPACTED:  # there, a place depends on all before it
        return Place(known, "cpuid", found.note) if known.slots else found
    left = _left(area, wanted & KNOWN_MASK, size, known, vendor)[0]
    return _partly(area, left, known, mask, found)


def _partly(
    area: NDArray[np.uint8], left: tuple[str, ...], known: Layout, may: int, found: Place
) -> Place:
    """Place what is certain though the presets that are `left` differ.

    That is what CPUID places, what lies at one place in all of them, and PKRU of value 0 that
    the guest may not have (`may` lacks it): Linux 5.16's leak, of which the value is what counts.
    """
    xstate_bv, _ = header(area)
    missing = xstate_bv & ~known.mask
    slots = [*known.slots, *common(left, missing).slots]
    note = (
        f"it has no place for {names_of(missing)}, and {found.note}" if known.slots else found.note
    )
    if PKRU & missing & ~may and (zeros := _pkru_of_zeros(area, left)):
        slots = [*(slot for slot in slots if slot.nr != zeros.nr), zeros]
        note += "; pkru is 0 wherever it may lie"
    if not slots:
        return found
    layout = Layout(tuple(sorted(slots)), known.name or "common")
    return Place(layout, "cpuid" if known.slots else "inferred", note)


def common(names: Iterable[str], mask: int) -> Layout:
    """Return which components of `mask` lie at one place in every preset of `names`."""
    layouts = [PRESETS[name].restricted(mask) for name in names]
    slots = set(layouts[0].slots).intersection(*(one.slots for one in layouts)) if layouts else ()
    return Layout(tuple(sorted(slots)), "common")


def _pkru_of_zeros(area: NDArray[np.uint8], names: tuple[str, ...]) -> Slot | None:
    """Return a place of PKRU, if it holds 0 in every preset of `names`: then any will do."""
    nr = BY_NAME["pkru"].nr
    slots = [PRESETS[name].by_nr[nr] for name in names if nr in PRESETS[name].by_nr]
    ends = [slot.offset + slot.size for slot in slots]
    if not slots or max(ends) > area.size:
        return None
    filled = any(area[slot.offset : end].any() for slot, end in zip(slots, ends, strict=True))
    return None if filled else slots[0]


def infer(
    area: NDArray[np.uint8],
    mask: int,
    *,
    size: int | None = None,
    agrees: Layout | None = None,
    vendor: str = "",
) -> Place:
    """Find which of the known layouts can have produced an area with the components in `mask`.

    Layouts that put all of `mask` in the same places count as one. In this order: the size, the
    vendor by CPUID, the vendor by MXCSR_MASK, and where the bytes lie (a producer zeroes what
    belongs to no component).

    *Source*: CPUID dumps of 404 machines; Linux arch/x86/kernel/fpu/xstate.c
    __copy_xstate_to_uabi_buf().
    """
    compacted = bool(header(area)[1] & XCOMP_BV_COMPACTED)
    names, evidence = _left(area, mask, size, agrees, vendor)
    if not names:
        size_clause = f" in {size} bytes" if size else ""
        return Place(
            None, "unknown", f"no known layout holds {mask:#x} ({names_of(mask)}){size_clause}"
        )
    groups = _groups(names, mask, compacted)
    if len(groups) > 1:
        return Place(None, "unknown", f"mask {mask:#x} fits each of {', '.join(groups)}")
    everywhere = len(_groups(tuple(candidates(mask)), mask, compacted)) == 1
    name = names[0] if len(names) == 1 else "common"
    layout = _layout(names[0], mask, name)
    why = " and ".join([f"mask {mask:#x}", *evidence])
    who = "the same on every known machine" if everywhere else ", ".join(names)
    return Place(layout, "inferred", f"from {why}: {who}")


def _left(
    area: NDArray[np.uint8],
    mask: int,
    size: int | None,
    agrees: Layout | None,
    vendor: str,
    by_bytes: bool = True,
) -> tuple[tuple[str, ...], list[str]]:
    """Return the presets that can have produced an area, and the evidence against the others."""
    compacted = bool(header(area)[1] & XCOMP_BV_COMPACTED)
    names = tuple(
        name
        for name in candidates(mask, None if compacted else size)
        if agrees is None or not PRESETS[name].moved(agrees, mask)
    )
    evidence = [f"{size} bytes"] if size and not compacted else []
    for clue, fits in _clues(area, mask, vendor, by_bytes and not compacted):
        if len(_groups(names, mask, compacted)) <= 1:
            break
        left = tuple(name for name in names if fits(name))
        if left and len(left) < len(names):
            names = left
            evidence.append(clue)
    return names, evidence


@lru_cache(maxsize=1024)
def _layout(preset: str, mask: int, name: str) -> Layout:
    """Return what of a preset is in `mask`, under a name of its own."""
    return Layout(PRESETS[preset].restricted(mask).slots, name)


@lru_cache(maxsize=1024)
def _groups(names: tuple[str, ...], mask: int, compacted: bool) -> tuple[str, ...]:
    """Return one of each group of presets that agree on the places of `mask` (or its sizes)."""
    groups: dict[tuple[tuple[int, ...], ...], str] = {}
    for name in names:
        slots = PRESETS[name].restricted(mask).slots
        key = tuple((s.nr, s.size) if compacted else (s.nr, s.size, s.offset) for s in slots)
        groups.setdefault(key, name)
    return tuple(groups.values())


def _clues(
    area: NDArray[np.uint8], mask: int, vendor: str, by_bytes: bool
) -> list[tuple[str, Callable[[str], bool]]]:
    """Return what tells layouts apart, the firmest first: its name, and which presets fit."""
    (mxcsr_mask,) = struct.unpack_from("<I", area.data, MXCSR_MASK_OFFSET)
    maker = {MXCSR_MASK_INTEL: "intel", MXCSR_MASK_AMD: "amd"}.get(mxcsr_mask, "")
    clues: list[tuple[str, Callable[[str], bool]]] = [
        ("CPUID's vendor", lambda name: name.startswith(vendor)),
        (f"MXCSR_MASK {mxcsr_mask:#x}", lambda name: name.startswith(maker)),
    ]
    if by_bytes:
        filled = np.flatnonzero(area[EXTENDED_OFFSET:]) + EXTENDED_OFFSET
        clues.append((BY_BYTES, lambda name: _explains(_layout(name, mask, name), filled)))
    return clues


def _explains(layout: Layout, filled: NDArray[np.intp]) -> bool:
    """Tell whether every byte that is not zero belongs to a component."""
    rest = filled
    for slot in layout.slots:
        rest = rest[(rest < slot.offset) | (rest >= slot.offset + slot.size)]
    return not rest.size
