"""Bare areas made such as a host takes them, a whole batch in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast.errors import PolicyError
from xfast.hosts.model import Host
from xfast.judge.judgement import host_of
from xfast.xsave import area as engine
from xfast.xsave.features import SUPERVISOR_MASK, XFEATURE_MASK_FPSSE, names_of
from xfast.xsave.layout import Layout, layout_of

MXCSR_MASK_FIELD = slice(28, 32)
SOFTWARE_FIELD = slice(464, 472)
"""The kernel's word of user components, where it writes one."""


def move_areas(
    areas: Any,
    layout: Layout,
    to: Layout,
    host: Host,
    *,
    size: int | None = None,
    out: Any = None,
    mask: int = engine.ALL,
) -> NDArray[np.uint8]:
    """Return areas in standard format, in another layout or their own.

    What tells of the machine that wrote them (MXCSR_MASK and the kernel's word of user
    components) becomes the host's where they move to another layout. `size`, `out`, `mask` and
    LayoutError are those of `xfast.relayout`.
    """
    result = engine.relayout(areas, layout, to, mask=mask, size=size, out=out)
    for field in (MXCSR_MASK_FIELD, SOFTWARE_FIELD):
        result[..., field] = areas[..., field]
    if layout.moved(to, engine.ALL):
        for field, value in ((MXCSR_MASK_FIELD, host.mxcsr_mask), (SOFTWARE_FIELD, host.xcr0)):
            length = field.stop - field.start
            result[..., field] = np.frombuffer((value or 0).to_bytes(length, "little"), np.uint8)
    return result


class Fixed(NamedTuple):
    """What `fix_areas` returns: (n, size) areas, and the components dropped from each (u64)."""

    areas: NDArray[np.uint8]
    dropped: Any


def fix_areas(
    areas: Any,
    layout: Layout | str,
    host: Host | str,
    *,
    guest: int | None = None,
    drop: int = 0,
    out: Any = None,
) -> Fixed:
    """Make bare areas such as a host's KVM_SET_XSAVE takes, a whole batch in one call.

    Parameters
    ----------
    areas : (n, size) or (size,) uint8
        In `layout`, standard or compacted format row by row. They stay as they are.
    layout : Layout or str
    host : Host or str
        A name is resolved as `xfast.resolve` does. Its kvm_xcr0 must be known. Where its layout
        is, the result is in that.
    guest : int, optional
        User components that the guests may have (mask); default: all that the host can give.
    drop : int
        Components that may go even where they are live (mask).
    out : (n, size) or (size,) uint8, optional
        Receives the areas; default: a new array, rows as long as they were, or longer where
        the host's layout needs it.

    Returns
    -------
    Fixed
        Areas in standard format with clean headers, and the mask that was dropped from each.

    Raises
    ------
    PolicyError
        If live data outside `drop` would be lost; names the first such row. Nothing is done then.
    LayoutError
        If the host's layout has no place for a component.
    """
    layout, host = layout_of(layout), host_of(host)
    if host.kvm_xcr0 is None:
        raise PolicyError(f"host {host.name}: its KVM components are not known, expected kvm_xcr0")
    rows, single = engine.rows_of(areas)
    may = host.kvm_xcr0 if guest is None else host.kvm_xcr0 & guest
    may = (may | XFEATURE_MASK_FPSSE) & ~SUPERVISOR_MASK
    found = engine.classify(rows, layout)
    dropped = found.xstate_bv & np.uint64(~may & engine.ALL)
    lost = dropped & (found.live | found.unreadable) & np.uint64(~drop & engine.ALL)
    if lost.any():
        row = int(np.flatnonzero(lost)[0])
        count = int(np.count_nonzero(lost))
        raise PolicyError(
            f"areas[{row}]: {names_of(int(lost[row]))} holds live data that {host.name} can't take "
            f"or the guest may not have ({count} area{'s' * (count != 1)}); drop= gives them up"
        )
    to = host.layout if host.layout is not None else layout
    if out is None:
        kept = int(np.bitwise_or.reduce(found.xstate_bv, initial=0)) & may
        out = engine.empty(len(rows), max(to.standard_size(kept), rows.shape[1]))
        out = out[0] if single else out
    move_areas(rows, layout, to, host, out=engine.rows_of(out, "out")[0], mask=may)
    return Fixed(out, dropped[0].item() if single else dropped)
