"""A thread's registers in a core image: laid out as an XSAVE area, and an area put back.

An image holds registers, field by field, and no area; they are laid out in Intel's layout. One
table says which field is which bytes of the area; it is read in both directions.

*Source*: CRIU images/core-x86.proto, core.proto.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast.errors import PolicyError
from xfast.snapshots.criu.wire import Broken, Field, encoded, fields, inner
from xfast.xsave.features import (
    AVX,
    HEADER_OFFSET,
    PKRU,
    XFEATURE_MASK_AVX512,
    XFEATURE_MASK_FPSSE,
    XFEATURE_MASK_MPX,
)
from xfast.xsave.layout import PRESETS

MARCH_X86_64 = 1

LAYOUT = PRESETS["intel"].restricted(
    XFEATURE_MASK_FPSSE | AVX | XFEATURE_MASK_MPX | XFEATURE_MASK_AVX512 | PKRU
)
"""Where the registers are laid out here; an image has no layout and no other components."""
AREA_SIZE = LAYOUT.standard_size()

THREAD_INFO, FPREGS, XSAVE, CET = 2, 3, 13, 9
Row = tuple[str, int, str, int]
FPREGS_FIELDS: dict[int, Row] = {
    1: ("cwd", 0, "<u2", 1),
    2: ("swd", 2, "<u2", 1),
    3: ("twd", 4, "<u2", 1),
    4: ("fop", 6, "<u2", 1),
    5: ("rip", 8, "<u8", 1),
    6: ("rdp", 16, "<u8", 1),
    7: ("mxcsr", 24, "<u4", 1),
    8: ("mxcsr_mask", 28, "<u4", 1),
    9: ("st_space", 32, "<u4", 32),
    10: ("xmm_space", 160, "<u4", 64),
}
XSAVE_FIELDS: dict[int, Row] = {
    1: ("xstate_bv", HEADER_OFFSET, "<u8", 1),
    2: ("ymmh_space", 576, "<u4", 64),
    3: ("bndreg_state", 960, "<u8", 8),
    4: ("bndcsr_state", 1024, "<u8", 8),
    5: ("opmask_reg", 1088, "<u8", 8),
    6: ("zmm_upper", 1152, "<u8", 64),
    7: ("hi16_zmm", 1664, "<u8", 128),
    8: ("pkru", 2688, "<u4", 2),
}
"""Field number -> its name, where its numbers lie in the area, their type, how many there are."""
CET_FIELDS = {1: "cet", 2: "ssp"}
TABLES = {(THREAD_INFO, FPREGS): FPREGS_FIELDS, (THREAD_INFO, FPREGS, XSAVE): XSAVE_FIELDS}
NESTED = {(THREAD_INFO,), *TABLES}


def _lay_out(
    message: Iterable[Field], table: Mapping[int, Row], area: NDArray[np.uint8], *, whole: bool
) -> set[str]:
    """Put the numbers of a message where `table` says; return the names of the fields found.

    `whole`: each of them has to be there, with all its numbers.
    """
    counts: dict[int, int] = {}
    for number, value, _ in message:
        if number not in table:
            continue
        name, offset, dtype, most = table[number]
        item = np.dtype(dtype).itemsize
        index = counts.get(number, 0)
        if not isinstance(value, int) or index >= most or value >> 8 * item:
            raise Broken(
                f"expected {most} numbers of {item} bytes, got {name}[{index}] out of range"
            )
        counts[number] = index + 1
        area[offset + index * item :][:item] = list(value.to_bytes(item, "little"))
    for number, (name, _, _, most) in table.items() if whole else ():
        if counts.get(number, 0) != most:
            raise Broken(f"expected {most} numbers of {name}, got {counts.get(number, 0)}")
    return {table[number][0] for number in counts}


class Thread(NamedTuple):
    """A thread's area, the names of the fields that it was made of, and CET's fields if any."""

    area: NDArray[np.uint8]
    fields: frozenset[str]
    cet: dict[str, Any] | None


def area_of(core: bytes) -> Thread | None:
    """Return what a core message holds; None for a task without registers.

    Raises
    ------
    Broken
        If it is of another machine, or a field holds more than its register does.
    """
    machine = next((f.value for f in fields(core) if f.number == 1), None)
    if machine != MARCH_X86_64:
        raise Broken(f"expected machine type {MARCH_X86_64} (x86-64), got {machine!r}")
    info = inner(fields(core), THREAD_INFO)
    fpregs = None if info is None else inner(fields(info), FPREGS)
    if fpregs is None:
        return None
    area = np.zeros(AREA_SIZE, np.uint8)
    registers = list(fields(fpregs))
    found = _lay_out(registers, FPREGS_FIELDS, area, whole=True)
    cet = None
    xsave = inner(registers, XSAVE)
    if xsave is None:
        area[HEADER_OFFSET] = XFEATURE_MASK_FPSSE
    else:
        extended = list(fields(xsave))
        found |= _lay_out(extended, XSAVE_FIELDS, area, whole=False)
        cet = inner(extended, CET)
    named = (
        None
        if cet is None
        else {CET_FIELDS[f.number]: f.value for f in fields(cet) if f.number in CET_FIELDS}
    )
    return Thread(area, frozenset(found), named)


def renewed(
    data: bytes, old: NDArray[np.uint8], new: NDArray[np.uint8], at: tuple[int, ...] = ()
) -> bytes:
    """Return a message with the registers that changed; every other byte as it was."""
    table = TABLES.get(at, {})
    counts: dict[int, int] = {}
    parts = []
    for number, value, raw in fields(data):
        part = raw
        if number in table:
            _, offset, dtype, _ = table[number]
            item = np.dtype(dtype).itemsize
            offset += counts.get(number, 0) * item
            counts[number] = counts.get(number, 0) + 1
            register = new[offset : offset + item].tobytes()
            if register != old[offset : offset + item].tobytes():
                part = encoded(number << 3) + encoded(int.from_bytes(register, "little"))
        elif isinstance(value, bytes) and (*at, number) in NESTED:
            nested = renewed(value, old, new, (*at, number))
            if nested != value:
                part = encoded(number << 3 | 2) + encoded(len(nested)) + nested
        parts.append(part)
    return b"".join(parts)


def check_holds(core: bytes, area: NDArray[np.uint8], where: str) -> None:
    """Raise PolicyError unless `core` holds all of `area`."""
    found = area_of(core)
    if found is None or not np.array_equal(found.area, area):
        raise PolicyError(
            f"{where}: expected registers that the dumping machine had, got some that the "
            "image has no field for"
        )
