"""Bring areas into another layout, format, buffer or kernel image: the face of `engine.convert`.

Part of `xfast.xsave.area`, whose users find all of it there.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np

from xfast import _core
from xfast.engine import convert
from xfast.errors import LayoutError
from xfast.xsave.features import (
    AVX,
    KVM_XSAVE_SIZE,
    SSE,
    SUPERVISOR_MASK,
    XCOMP_BV_COMPACTED,
    bits,
)
from xfast.xsave.layout import Layout, layout_of
from xfast.xsave.rows import ALL, Areas, Masks, check_mask, empty, rows_of, spread, table_of


class UabiFault(IntEnum):
    """Why KVM_SET_XSAVE answers -EINVAL; the first rule that an area breaks.

    *Source*: Linux arch/x86/kernel/fpu/xstate.c validate_user_xstate_header(),
    copy_uabi_to_xstate().
    """

    OK = 0
    XSTATE_BV = 1
    XCOMP_BV = 2
    RESERVED = 3
    MXCSR = 4
    STORAGE = 5
    """One of the two areas has no place for a component in XSTATE_BV (xfast's own rule)."""


@lru_cache(maxsize=256)
def converter(
    layout: Layout,
    to: Layout,
    *,
    mask: int = ALL,
    xcomp_bv: int | None = None,
    mxcsr_mask: int = 0,
    software: int = 0,
    kernel: bool = False,
    foreign_pkru: bool = False,
) -> convert.Converter:
    """Return what `relayout` and `get_uabi` call, for callers to whom microseconds count.

    Its method ``convert(src, out, lost=None, pkru=None)`` takes arrays of one area or of many,
    always needs `out`, and returns the mask of components lost instead of raising.

    Parameters
    ----------
    kernel : bool
        Take MXCSR from the area with SSE or AVX whatever its format, as the kernel does.
    foreign_pkru : bool
        Each call gives PKRU, a (n,) uint32 array.

    Other parameters are those of `relayout`.
    """
    fmt = 0 if xcomp_bv is None else check_mask(xcomp_bv & ALL, "xcomp_bv") | XCOMP_BV_COMPACTED
    if fmt & ~to.mask & ALL:
        raise LayoutError(
            f"xcomp_bv: expected components of layout {to.name} ({to.mask:#x}), got {fmt:#x}"
        )
    return convert.Converter(
        table_of(layout),
        table_of(to),
        check_mask(mask),
        xcomp_bv=fmt,
        ragged=fmt == XCOMP_BV_COMPACTED,
        kernel=kernel,
        foreign_pkru=foreign_pkru,
        mxcsr_mask=mxcsr_mask,
        software=software,
    )


def _convert_rows(
    areas: Any,
    how: convert.Converter,
    where: str,
    size: int | None,
    out: Areas | None,
    *,
    zero: bool = False,
    lossy: bool = False,
    pkru: Any = None,
) -> Areas:
    """Convert areas into `out`, or into new ones of `size` bytes."""
    rows, single = rows_of(areas)
    if out is None:
        assert size is not None
        into = empty(len(rows), size, zero=zero)
        out = into[0] if single else into
    else:
        into, _ = rows_of(out, "out")
    if len(into) != len(rows):
        raise ValueError(f"out: expected {len(rows)} areas, as many as areas has, got {len(into)}")
    values = None if pkru is None else np.full(len(rows), pkru, np.uint32)
    lost = np.zeros(len(rows), "u8")
    if spread(rows.size, how.convert, rows, into, lost, values) and not lossy:
        refuse_lost(lost, "areas", f"{where} in {into.shape[1]} bytes; lossy=True drops them")
    return out


def _result_size(areas: Any, to: Layout, mask: int, xcomp_bv: int | None) -> int:
    """Return the bytes that hold any of the areas in `to`."""
    if xcomp_bv is not None and xcomp_bv & ALL:
        return to.compacted_size(xcomp_bv & ALL)
    rows, _ = rows_of(areas)
    n = len(rows)
    present = np.empty(n, "u8")
    _core.headers(rows, present, np.empty(n, "u8"), np.empty(n, "u4"), np.empty(n, bool))
    come = int(np.bitwise_or.reduce(present)) & mask & to.mask
    return to.standard_size(come) if xcomp_bv is None else to.compacted_size(come)


def relayout(
    areas: Any,
    layout: Layout | str,
    to: Layout | str,
    *,
    mask: int = ALL,
    xcomp_bv: int | None = None,
    size: int | None = None,
    out: Areas | None = None,
    mxcsr_mask: int = 0,
    software: int = 0,
    lossy: bool = False,
) -> Areas:
    """Copy areas into another layout or format.

    Absent components come out as their init value, whatever bytes lay there; every byte of
    the result is written. The source may be standard or compacted, row by row.

    Parameters
    ----------
    to : Layout
    mask : int
        Components to bring over; the rest become absent.
    xcomp_bv : int, optional
        Components of a compacted result (bit 63 need not be set). 0: see `compact`. Default:
        standard format.
    size : int, optional
        Bytes of a result row. Default: that of `out`, else what the components in XSTATE_BV and
        `mask` of all areas need in `to`, or the compacted size of `xcomp_bv`.
    out : (n, size) uint8, optional
        Where to write; must not overlap `areas`.
    mxcsr_mask : int
        MXCSR_MASK to write where the source has no MXCSR.
    software : int
        u64 to write at byte 464 (the kernel's word of user features).
    lossy : bool
        Drop what `to` can't hold, or what the source announces but does not hold, instead of
        raising.

    Returns
    -------
    (n, size) uint8, or (size,)

    Raises
    ------
    LayoutError
        If a component of `mask` would be lost; names area, component and both layouts.
    """
    layout, to = layout_of(layout), layout_of(to)
    how = converter(
        layout, to, mask=mask, xcomp_bv=xcomp_bv, mxcsr_mask=mxcsr_mask, software=software
    )
    ragged = xcomp_bv is not None and not xcomp_bv & ALL
    if size is None and out is None:
        size = _result_size(areas, to, mask, xcomp_bv)
    where = f"layout {to.name} from {layout.name}"
    return _convert_rows(areas, how, where, size, out, zero=ragged, lossy=lossy)


def expand(areas: Any, layout: Layout | str, **how: Any) -> Areas:
    """Bring areas into standard format; `relayout` to the layout they have."""
    return relayout(areas, layout, layout, **how)


def compact(areas: Any, layout: Layout | str, *, xcomp_bv: int = 0, **how: Any) -> Areas:
    """Bring areas into compacted format.

    Parameters
    ----------
    xcomp_bv : int
        Components to reserve space for. 0: each row for the components it holds, so that rows
        differ in length.

    Other parameters, result and errors are those of `relayout`.
    """
    return relayout(areas, layout, layout, xcomp_bv=xcomp_bv, **how)


def get_uabi(
    areas: Any,
    layout: Layout | str,
    *,
    mask: int,
    features: int = 0,
    mxcsr_mask: int = 0,
    pkru: Any = None,
    to: Layout | str | None = None,
    size: int | None = None,
    out: Areas | None = None,
) -> Areas:
    """Fill standard-format buffers from kernel images, as KVM_GET_XSAVE does.

    Parameters
    ----------
    areas : (n, size) uint8
        Standard or compacted, row by row.
    mask : int
        Components to report: fpstate.user_xfeatures & (guest_supported_xcr0 | 3).
    features : int
        u64 at byte 464: the user features of the host.
    mxcsr_mask : int
        MXCSR_MASK where MXCSR itself is the init value.
    pkru : int or (n,) uint32, optional
        vcpu->arch.pkru, written where bit 9 is reported. Default: the image's.
    to : Layout, optional
        Layout of the result; default: `layout`.
    size : int, optional
        Bytes of a result row; default: that of `out`, else the standard size of `to`, at least
        4096.

    Returns
    -------
    (n, size) uint8, or (size,)
        Every byte is written.

    Raises
    ------
    LayoutError
        If a component would have to be reported that `to` or a row can't hold.

    *Source*: Linux arch/x86/kernel/fpu/xstate.c __copy_xstate_to_uabi_buf().
    """
    layout = layout_of(layout)
    to = layout_of(to or layout)
    how = converter(
        layout,
        to,
        mask=mask,
        mxcsr_mask=mxcsr_mask,
        software=features,
        kernel=True,
        foreign_pkru=pkru is not None,
    )
    if size is None:
        size = max(to.standard_size(), KVM_XSAVE_SIZE)
    return _convert_rows(areas, how, f"layout {to.name}", size, out, pkru=pkru)


@lru_cache(maxsize=256)
def merger(
    layout: Layout,
    into_layout: Layout,
    *,
    mask: int = ALL & ~SUPERVISOR_MASK,
    mxcsr: bool | None = None,
    user_xfeatures: int | None = None,
    mxcsr_mask: int = 0,
) -> convert.Merger:
    """Return what `set_uabi` and `swap` call, for callers to whom microseconds count.

    Its method ``merge(src, into, status=None)`` copies the components in XSTATE_BV and `mask`,
    sets XSTATE_BV to (old & ~mask) | (source & mask) and leaves all other bytes alone. It
    returns the `UabiFault` codes of all rows, combined by or.

    Parameters
    ----------
    mxcsr : bool, optional
        Whether MXCSR comes over. Default: with x87, SSE or AVX.
    user_xfeatures, mxcsr_mask : int
        Validate as `set_uabi` does.
    """
    return convert.Merger(
        table_of(layout),
        table_of(into_layout),
        check_mask(mask),
        mxcsr=mxcsr,
        user_xfeatures=user_xfeatures,
        mxcsr_mask=mxcsr_mask,
    )


def set_uabi(
    uabi: Any,
    layout: Layout | str,
    into: Any,
    *,
    into_layout: Layout | str | None = None,
    user_xfeatures: int,
    mxcsr_mask: int,
    supervisor: int = SUPERVISOR_MASK,
) -> Any:
    """Validate standard-format buffers and load them into kernel images, as KVM_SET_XSAVE does.

    Parameters
    ----------
    uabi : (n, size) uint8
        In `layout`.
    into : (n, size) uint8
        The images, written in place: standard, or compacted as their XCOMP_BV says. Bytes of
        components that `uabi` does not hold stay as they are, supervisor states too.
    into_layout : Layout, optional
        Default: `layout`.
    user_xfeatures : int
        Components that XSTATE_BV may have.
    mxcsr_mask : int
        Bits that MXCSR may have; checked where x87, SSE or AVX is present.
    supervisor : int
        Bits of the image's XSTATE_BV that survive.

    Returns
    -------
    uint32 array, or int
        `UabiFault` codes. A row with a fault leaves its image untouched. PKRU's value is
        stored in the image; a vCPU keeps its own elsewhere.

    *Source*: Linux arch/x86/kernel/fpu/xstate.c copy_uabi_to_xstate().
    """
    rows, single = rows_of(uabi, "uabi")
    images, _ = rows_of(into, "into")
    if len(images) != len(rows):
        raise ValueError(
            f"into: expected {len(rows)} areas, as many as uabi has, got {len(images)}"
        )
    how = merger(
        layout_of(layout),
        layout_of(into_layout or layout),
        mask=ALL & ~check_mask(supervisor, "supervisor"),
        user_xfeatures=check_mask(user_xfeatures, "user_xfeatures"),
        mxcsr_mask=mxcsr_mask,
    )
    status = np.empty(len(rows), "u4")
    spread(rows.size, how.merge, rows, images, status)
    return status[0].item() if single else status


def swap(
    registers: Any,
    leave: Any,
    enter: Any,
    layout: Layout | str,
    *,
    save_mask: int,
    restore_mask: int,
    leave_layout: Layout | str | None = None,
    enter_layout: Layout | str | None = None,
) -> None:
    """Save one state and load another, as fpu_swap_kvm_fpstate() does.

    Parameters
    ----------
    registers : (n, size) uint8
        The registers, as standard-format areas in `layout`, changed in place.
    leave : (n, size) uint8
        Receives the components of `registers` in `save_mask`; others stay.
    enter : (n, size) uint8
        Components in `restore_mask` come from here; others stay in `registers`.
    leave_layout, enter_layout : Layout, optional
        Default: `layout`. Either may be compacted.

    Raises
    ------
    LayoutError
        If a component has no place where it is to go; that row is left alone.

    *Source*: Linux arch/x86/kernel/fpu/core.c fpu_swap_kvm_fpstate().
    """
    live, out, load = (
        rows_of(area, name)[0]
        for area, name in ((registers, "registers"), (leave, "leave"), (enter, "enter"))
    )
    here, there = layout_of(layout), layout_of(leave_layout or layout)
    save = merger(here, there, mask=save_mask, mxcsr=save_mask & (SSE | AVX) != 0)
    there = layout_of(enter_layout or layout)
    restore = merger(there, here, mask=restore_mask, mxcsr=restore_mask & (SSE | AVX) != 0)
    lost = np.empty(len(live), "u8")
    if convert.swap(save, restore, live, out, load, lost):
        refuse_lost(lost, "registers", "where they are to go")


def refuse_lost(lost: Masks, name: str, where: str) -> None:
    """Raise LayoutError if a mask of components without a place is not 0."""
    if lost.any():
        row = int(np.flatnonzero(lost)[0])
        numbers = ", ".join(str(nr) for nr in bits(int(lost[row])))
        raise LayoutError(f"{name}[{row}]: components {numbers} can't be brought to {where}")
