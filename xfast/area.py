"""XSAVE areas in numpy arrays: allocation, headers, classification, trimming, relayout, diff.

Every function takes ``areas``, an (n, size) uint8 array with one area a row and any row
stride, or a (size,) array or buffer with one area, and the Layout that says where the
components lie. Results of a batch are arrays with one element a row; of a single area, scalars.
"""

from __future__ import annotations

import mmap
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast import _core
from xfast.errors import LayoutError
from xfast.features import KVM_XSAVE_SIZE, XCOMP_BV_COMPACTED, bits
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
        need = to.compacted_size(fmt) if fmt else to.standard_size()
        out = empty(len(rows), need if size is None else size)
        result = out[0] if single else out
    else:
        result = out
        out, _ = rows_of(out, "out")
    if np.shares_memory(rows, out):
        raise ValueError("out: got memory that areas uses too, needed separate memory")
    lost = np.empty(len(rows), "u8")
    tables = table_of(layout), table_of(to)
    _core.relayout(
        rows, tables[0], out, tables[1], check_mask(mask), fmt, mxcsr_mask, software, lost
    )
    if not lossy and lost.any():
        row = int(np.flatnonzero(lost)[0])
        numbers = ", ".join(str(nr) for nr in bits(int(lost[row])))
        raise LayoutError(
            f"areas[{row}]: components {numbers} can't be brought from layout {layout.name} "
            f"to {to.name} in {out.shape[1]} bytes; lossy=True drops them"
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
