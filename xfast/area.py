"""XSAVE areas in numpy arrays: allocation, headers, classification, trimming, relayout, diff.

Every function takes ``areas``, an (n, size) uint8 array with one area a row and any row
stride, or a (size,) array or buffer with one area, and the Layout that says where the
components lie. Results of a batch are arrays with one element a row; of a single area, scalars.
"""

from __future__ import annotations

import mmap
from enum import IntEnum, IntFlag
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast import _core
from xfast.errors import LayoutError
from xfast.features import KVM_XSAVE_SIZE, SUPERVISOR_MASK, XCOMP_BV_COMPACTED, bits
from xfast.layout import Layout

Areas = NDArray[np.uint8]
Masks = NDArray[np.uint64]

ALL = (1 << 63) - 1
PAGE = 4096


@lru_cache(maxsize=512)
def table_of(layout: Layout) -> _core.Table:
    """Return the engine's form of a layout."""
    return _core.Table(layout.slots)


def empty(n: int, layout: Layout | int) -> Areas:
    """Return `n` areas of zeros, 4 KiB aligned, each in its own row.

    Parameters
    ----------
    n : int
    layout : Layout or int
        Bytes of a row, or the layout whose standard-format size they are to have, at least
        4096 (struct kvm_xsave). Rows start at multiples of 4096 bytes.

    Returns
    -------
    (n, size) uint8
        A view whose row stride is `size` rounded up to 4096.

    Raises
    ------
    ValueError
        If `n` is negative or `size` is below 576.
    """
    size = layout if isinstance(layout, int) else max(layout.standard_size(), KVM_XSAVE_SIZE)
    if n < 0 or size < 576:
        raise ValueError(f"empty: got n={n}, size={size}, needed n >= 0 and size >= 576")
    stride = -(-size // PAGE) * PAGE
    block = np.frombuffer(mmap.mmap(-1, max(n, 1) * stride), np.uint8)
    return block.reshape(-1, stride)[:n, :size]


def rows_of(areas: Any, name: str = "areas") -> tuple[Areas, bool]:
    """Return `areas` as a 2-D array, and whether it was a single area.

    Raises
    ------
    ValueError
        If it is neither a 1-D or 2-D uint8 array nor a C-contiguous buffer.
    """
    if not isinstance(areas, np.ndarray):
        try:
            areas = np.frombuffer(areas, np.uint8)
        except (TypeError, BufferError) as problem:
            raise ValueError(
                f"{name}: got {type(areas).__name__}, needed areas: {problem}"
            ) from None
    if areas.dtype != np.uint8:
        raise ValueError(f"{name}: got dtype {areas.dtype}, needed uint8")
    if areas.ndim == 1:
        return areas[np.newaxis], True
    if areas.ndim != 2:
        raise ValueError(f"{name}: got {areas.ndim} dimensions, needed (n, size) or (size,)")
    return areas, False


def check_mask(mask: int, name: str = "mask") -> int:
    """Return `mask` if it is one of components 0 to 62.

    Raises
    ------
    ValueError
        If it is negative or has bit 63 or above.
    """
    if not 0 <= mask <= ALL:
        raise ValueError(f"{name}: got {mask:#x}, needed bits 0 to 62 only")
    return int(mask)


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


class Audit(IntFlag):
    """What `audit` finds wrong with an area."""

    XSTATE_BV = 1
    XCOMP_BV = 2
    RESERVED = 4
    MXCSR = 8


class Headers(NamedTuple):
    """What `headers` reads, an element a row: u64, u64, u32 and bool."""

    xstate_bv: Any
    xcomp_bv: Any
    mxcsr: Any
    reserved: Any


class Classes(NamedTuple):
    """What `classify` finds, each a mask (uint64) a row.

    A component is ``absent`` if its bit is not in `xstate_bv`, ``live`` if it is in `inuse`
    but not in `default`, ``default`` if it is in `default` (PKRU 0x55555554), ``unknown`` if
    in `unreadable`, else ``init``. `stale`: absent, and yet other than init bytes lie there.
    """

    xstate_bv: Any
    inuse: Any
    default: Any
    stale: Any
    unreadable: Any

    @property
    def live(self) -> Any:
        """Components that hold something other than their init or default value."""
        return self.inuse & ~self.default

    def state(self, nr: int) -> str:
        """Return the state of component `nr` of a single area, in a word."""
        for word, mask in (
            ("unknown", self.unreadable),
            ("default", self.default),
            ("live", self.inuse),
            ("init", self.xstate_bv),
        ):
            if mask >> nr & 1:
                return word
        return "absent"


def headers(areas: Any) -> Headers:
    """Read the header of every area.

    Returns
    -------
    Headers
        `reserved` is True where one of the header's 48 reserved bytes is not zero.

    Raises
    ------
    ValueError
        If `areas` is no array of areas, or rows are shorter than 576 bytes.

    *Source*: Intel SDM vol. 1 section 13.4.2.
    """
    rows, single = rows_of(areas)
    n = len(rows)
    out = Headers(np.empty(n, "u8"), np.empty(n, "u8"), np.empty(n, "u4"), np.empty(n, bool))
    _core.headers(rows, *out)
    return Headers(*(column[0].item() for column in out)) if single else out


def classify(areas: Any, layout: Layout) -> Classes:
    """Find which components are absent, init, default and live.

    Returns
    -------
    Classes
        ints for a single area, uint64 arrays for a batch.

    *Source*: Intel SDM vol. 1 section 13.6 (init values); MXCSR counts for SSE, or for AVX
    where only AVX's bit is set.
    """
    rows, single = rows_of(areas)
    out = Classes(headers(rows).xstate_bv, *(np.empty(len(rows), "u8") for _ in range(4)))
    _core.classify(rows, table_of(layout), *out[1:])
    return Classes(*(column[0].item() for column in out)) if single else out


def keep(areas: Any, layout: Layout, mask: int, *, scrub: bool = True) -> Any:
    """Intersect XSTATE_BV with `mask`, in place.

    Parameters
    ----------
    scrub : bool
        Give the dropped components' bytes their init value too.

    Returns
    -------
    uint64 array, or int
        The bits that were dropped from each area.
    """
    rows, single = rows_of(areas)
    dropped = np.empty(len(rows), "u8")
    _core.keep(rows, table_of(layout), check_mask(mask), scrub, dropped)
    return dropped[0].item() if single else dropped


def relayout(
    areas: Any,
    layout: Layout,
    to: Layout,
    *,
    mask: int = ALL,
    xcomp_bv: int | None = None,
    size: int | None = None,
    out: Areas | None = None,
    mxcsr_mask: int = 0,
    software: int = 0,
    lossy: bool = False,
    kernel: bool = False,
    pkru: Any = None,
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
        Components of a compacted result (bit 63 need not be set). Default: standard format.
    size : int, optional
        Bytes of a result row; default: that of `out`, else the standard size of `to` or the
        compacted size of `xcomp_bv`.
    mxcsr_mask : int
        MXCSR_MASK to write where the source has no MXCSR.
    software : int
        u64 to write at byte 464 (the kernel's word of user features).
    lossy : bool
        Drop what `to` can't hold, or what the source announces but does not hold, instead of
        raising.
    kernel : bool
        Take MXCSR from the area with SSE or AVX whatever its format, as the kernel does.
    pkru : int or (n,) uint32, optional
        PKRU to write where the component is present; default: the area's own.

    Returns
    -------
    (n, size) uint8, or (size,)

    Raises
    ------
    LayoutError
        If a component of `mask` would be lost; names area, component and both layouts.
    """
    rows, single = rows_of(areas)
    fmt = 0 if xcomp_bv is None else check_mask(xcomp_bv & ALL, "xcomp_bv") | XCOMP_BV_COMPACTED
    if fmt & ~to.mask & ALL:
        raise LayoutError(
            f"xcomp_bv: got {fmt:#x}, needed components of layout {to.name}: {to.mask:#x}"
        )
    if out is None:
        need = to.compacted_size(fmt & ALL or to.mask) if fmt else to.standard_size()
        out = empty(len(rows), need if size is None else size)
        result = out[0] if single else out
    else:
        result = out
        out, _ = rows_of(out, "out")
    check_apart(rows, out, "out")
    if pkru is not None:
        pkru = np.full(len(rows), pkru, np.uint32)
    lost = np.empty(len(rows), "u8")
    tables = table_of(layout), table_of(to)
    _core.relayout(
        rows,
        tables[0],
        out,
        tables[1],
        check_mask(mask),
        fmt,
        mxcsr_mask,
        software,
        lost,
        kernel,
        pkru,
    )
    if not lossy:
        refuse_lost(
            lost, "areas", f"layout {to.name} in {out.shape[1]} bytes; lossy=True drops them"
        )
    return result


def diff(one: Any, two: Any, layout: Layout, two_layout: Layout | None = None) -> Any:
    """Find the components whose values differ; a clear bit stands for the init value.

    Returns
    -------
    uint64 array, or int
        MXCSR counts for SSE; a component that can't be read differs.
    """
    a, single = rows_of(one, "one")
    b, _ = rows_of(two, "two")
    differing = np.empty(len(a), "u8")
    _core.diff(a, table_of(layout), b, table_of(two_layout or layout), differing)
    return differing[0].item() if single else differing


def audit(areas: Any, mask: int, mxcsr_mask: int) -> Any:
    """Check the header and MXCSR of every area, as a kernel that supports `mask` would.

    Returns
    -------
    uint8 array, or int
        `Audit` flags: XSTATE_BV outside `mask`, XCOMP_BV not 0 (no standard format), reserved
        header bytes not 0, MXCSR outside `mxcsr_mask` while x87, SSE or AVX is present.
    """
    rows, single = rows_of(areas)
    status = np.empty(len(rows), np.uint8)
    _core.audit(rows, check_mask(mask), mxcsr_mask, status)
    return status[0].item() if single else status


def xinuse(areas: Any, layout: Layout, early: bool = False) -> Any:
    """Find the components whose bytes differ from their init value; MXCSR takes no part.

    Parameters
    ----------
    early : bool
        Look only at components in XSTATE_BV, and at each no further than needed. Otherwise all
        are read, and stale data show as well.

    Returns
    -------
    uint64 array, or int

    *Source*: Intel SDM vol. 1 section 13.6.
    """
    rows, single = rows_of(areas)
    inuse = np.empty(len(rows), "u8")
    _core.xinuse(rows, table_of(layout), early, inuse)
    return inuse[0].item() if single else inuse


def expand(areas: Any, layout: Layout, **how: Any) -> Areas:
    """Bring areas into standard format; `relayout` to the layout they have."""
    return relayout(areas, layout, layout, **how)


def compact(areas: Any, layout: Layout, *, xcomp_bv: int = 0, **how: Any) -> Areas:
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
    layout: Layout,
    *,
    mask: int,
    features: int = 0,
    mxcsr_mask: int = 0,
    pkru: Any = None,
    to: Layout | None = None,
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
    to = to or layout
    if size is None and out is None:
        size = max(to.standard_size(), KVM_XSAVE_SIZE)
    return relayout(
        areas,
        layout,
        to,
        mask=mask,
        size=size,
        out=out,
        mxcsr_mask=mxcsr_mask,
        software=features,
        kernel=True,
        pkru=pkru,
    )


def set_uabi(
    uabi: Any,
    layout: Layout,
    into: Any,
    *,
    into_layout: Layout | None = None,
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
    image, _ = rows_of(into, "into")
    check_apart(rows, image, "into")
    status = np.empty(len(rows), "u4")
    _core.set_uabi(
        rows,
        table_of(layout),
        image,
        table_of(into_layout or layout),
        check_mask(user_xfeatures, "user_xfeatures"),
        mxcsr_mask,
        check_mask(supervisor, "supervisor"),
        status,
    )
    return status[0].item() if single else status


def swap(
    registers: Any,
    leave: Any,
    enter: Any,
    layout: Layout,
    *,
    save_mask: int,
    restore_mask: int,
    leave_layout: Layout | None = None,
    enter_layout: Layout | None = None,
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
    check_apart(live, out, "leave")
    check_apart(live, load, "enter")
    check_apart(load, out, "leave")
    lost = np.empty(len(live), "u8")
    _core.swap(
        live,
        table_of(layout),
        out,
        table_of(leave_layout or layout),
        check_mask(save_mask, "save_mask"),
        load,
        table_of(enter_layout or layout),
        check_mask(restore_mask, "restore_mask"),
        lost,
    )
    refuse_lost(lost, "registers", "its target")


def check_apart(one: Areas, two: Areas, name: str) -> None:
    """Raise ValueError if two arrays use the same memory."""
    if np.may_share_memory(one, two):
        raise ValueError(f"{name}: got memory that the other areas use too, needed separate memory")


def refuse_lost(lost: Masks, name: str, where: str) -> None:
    """Raise LayoutError if a mask of components without a place is not 0."""
    if lost.any():
        row = int(np.flatnonzero(lost)[0])
        numbers = ", ".join(str(nr) for nr in bits(int(lost[row])))
        raise LayoutError(f"{name}[{row}]: components {numbers} can't be brought to {where}")
