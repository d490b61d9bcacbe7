"""XSAVE areas in numpy arrays: what is in them, trimming, comparing; with `rows` and `transfer`.

Every function takes ``areas``, an (n, size) uint8 array with one area a row and any row
stride, or a (size,) array or buffer with one area, and the Layout that says where the
components lie. Results of a batch are arrays with one element a row; of a single area, scalars.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast import _core
from xfast.xsave.layout import Layout
from xfast.xsave.rows import ALL, Areas, Masks, check_mask, empty, rows_of, spread, table_of, tune
from xfast.xsave.transfer import (
    UabiFault,
    compact,
    converter,
    expand,
    get_uabi,
    merger,
    relayout,
    set_uabi,
    swap,
)


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


_MASKS = ("xstate_bv", "xcomp_bv", "inuse", "default", "stale", "unreadable")
FACTS = np.dtype(
    [*((name, "<u8") for name in _MASKS), ("mxcsr", "<u4"), ("pkru", "<u4"), ("reserved", "<u8")]
)
"""All that a judgement reads from one area; the masks are those of `Classes`.

`pkru` is 0 where XSTATE_BV has no PKRU or it is `unreadable`; `reserved` is 1 where one of the
header's reserved bytes is not zero.
"""

GROUPS = np.dtype([*FACTS.descr, ("sort", "<i8"), ("first", "<i8"), ("count", "<i8")])
"""Areas of one sort that have the same `FACTS`: the row that showed them first, and how many do.

`sort` is the number of their layout; it is 0 where all rows are of one.
"""


class Groups:
    """The different areas among any number of batches; for one batch, see `group`.

    Its memory grows with what is different, not with the rows. Threads that share one take
    turns, and `first` counts rows in the order in which batches came.

    Parameters
    ----------
    *layouts : Layout
        Where the components of these areas lie, for each sort of area.
    """

    def __init__(self, *layouts: Layout | str) -> None:
        from xfast.engine import group  # which only those load who group

        self._found = group.Groups()
        for layout in layouts:
            self.know(layout)

    def know(self, layout: Layout | str) -> None:
        """Learn the layout of the next sort of area."""
        self._found.know(table_of(layout))

    def add(self, areas: Any, sorts: NDArray[np.uint32] | None = None) -> NDArray[np.uint32]:
        """Return each row's class: an index into `classes`, the same for equal facts.

        Parameters
        ----------
        areas : (n, size) uint8
        sorts : (n,) uint32, optional
            Of which sort each is: the number of its layout. All are of the first if it is left out.
        """
        rows, _ = rows_of(areas)
        index = np.empty(len(rows), np.uint32)
        self._found.add(rows, sorts, index)
        return index

    @property
    def classes(self) -> NDArray[np.void]:
        """The classes so far, in the order in which they showed up: (k,) of `GROUPS`."""
        return np.frombuffer(self._found.groups(), GROUPS)


def group(areas: Any, layout: Layout | str) -> tuple[NDArray[np.void], NDArray[np.uint32]]:
    """Find the rows that no judgement can tell apart.

    Returns
    -------
    classes : (k,) GROUPS
        What `headers` and `classify` tell of each class, PKRU's value, the first row that has
        it, and how many have.
    index : (n,) uint32
        Each row's class.

    Takes little longer than one `classify`.
    """
    found = Groups(layout)
    index = found.add(areas)
    return found.classes, index


def facts(areas: Any, layout: Layout | str) -> NDArray[np.void]:
    """Find all that a judgement reads from each area: (n,) of `FACTS`, one for a single area."""
    rows, _ = rows_of(areas)
    found = np.empty(len(rows), FACTS)
    _core.classify(rows, table_of(layout), found.view("u8"))
    return found


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


def classify(areas: Any, layout: Layout | str) -> Classes:
    """Find which components are absent, init, default and live.

    Returns
    -------
    Classes
        ints for a single area, uint64 arrays for a batch.

    *Source*: Intel SDM vol. 1 section 13.6 (init values); MXCSR counts for SSE, or for AVX
    where only AVX's bit is set.
    """
    rows, single = rows_of(areas)
    found = facts(rows, layout)
    out = Classes(*(found[name] for name in Classes._fields))
    return Classes(*(column[0].item() for column in out)) if single else out


def keep(areas: Any, layout: Layout | str, mask: int, *, scrub: bool = True) -> Any:
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
    table, mask = table_of(layout), check_mask(mask)
    spread(
        rows.size if scrub else 64 * len(rows),
        lambda rows, dropped: _core.keep(rows, table, mask, scrub, dropped),
        rows,
        dropped,
    )
    return dropped[0].item() if single else dropped


def diff(one: Any, two: Any, layout: Layout | str, two_layout: Layout | str | None = None) -> Any:
    """Find the components whose values differ; a clear bit stands for the init value.

    Returns
    -------
    uint64 array, or int
        MXCSR counts for SSE; a component that can't be read differs.
    """
    a, single = rows_of(one, "one")
    b, _ = rows_of(two, "two")
    differing = np.empty(len(a), "u8")
    if len(a) != len(b):
        raise ValueError(f"two: expected {len(a)} areas, as many as one, got {len(b)}")
    tables = table_of(layout), table_of(two_layout or layout)
    spread(
        2 * a.size,
        lambda a, b, differing: _core.diff(a, tables[0], b, tables[1], differing),
        a,
        b,
        differing,
    )
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
    mask = check_mask(mask)
    two_lines = 128 * len(rows)
    spread(
        two_lines,
        lambda rows, status: _core.audit(rows, mask, mxcsr_mask, status),
        rows,
        status,
    )
    return status[0].item() if single else status


def xinuse(areas: Any, layout: Layout | str, early: bool = False) -> Any:
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
    table = table_of(layout)
    spread(rows.size, lambda rows, inuse: _core.xinuse(rows, table, early, inuse), rows, inuse)
    return inuse[0].item() if single else inuse


__all__ = [
    "ALL",
    "FACTS",
    "GROUPS",
    "Areas",
    "Audit",
    "Classes",
    "Groups",
    "Headers",
    "Masks",
    "UabiFault",
    "audit",
    "check_mask",
    "classify",
    "compact",
    "converter",
    "diff",
    "empty",
    "expand",
    "facts",
    "get_uabi",
    "group",
    "headers",
    "keep",
    "merger",
    "relayout",
    "rows_of",
    "set_uabi",
    "swap",
    "table_of",
    "tune",
    "xinuse",
]
