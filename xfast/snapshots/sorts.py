"""Very many areas in one pass: which layout each is of, and what no judgement can tell apart.

A file of 10**7 areas is neither copied nor kept: a window of it is mapped at a time. What decides
on a layout is a few words of an area and, where these leave a choice, which stretches between the
places of known layouts hold anything. Areas that agree in that are of one sort, and one of them is
asked. Then the engine groups each sort's areas by all that a judgement reads.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray

from xfast.engine.guard import Window
from xfast.errors import FormatError, XfastError
from xfast.snapshots import infer
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import Class
from xfast.xsave.area import Groups, xinuse
from xfast.xsave.features import EXTENDED_OFFSET, MXCSR_MASK_AMD, XFEATURE_MASK_FPSSE
from xfast.xsave.layout import PRESETS, Layout, Slot

WINDOW = 32 << 20
"""Bytes of areas that are looked at together, and of a file that are mapped at a time."""


class FileRows:
    """Areas of one size in a file, which are read, or mapped, when they are asked for.

    Parameters
    ----------
    source : Source
        Whose file stays open for as long as this is used.
    offset, count, size : int
        Where the first lies (bytes), how many there are, and the bytes of each.
    """

    def __init__(self, source: Source, offset: int, count: int, size: int) -> None:
        self.path = source.path
        self.fd = os.dup(source.fd)
        weakref.finalize(self, os.close, self.fd)
        self.offset = offset
        self.shape = count, size

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        size = self.shape[1]
        start = self.offset + range(len(self))[row] * size
        data = os.pread(self.fd, size, start)
        if len(data) < size:
            raise self._shrunk(start + len(data))
        return np.frombuffer(data, np.uint8)

    def windows(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield the number of a row and the areas from there on, mapped for that long.

        Raises
        ------
        FormatError
            After a window of which not all could be read: the file shrank, or its disk fails.
        """
        count, size = self.shape
        step = max(1, WINDOW // size)
        for first in range(0, count, step):
            rows = min(step, count - first)
            start = self.offset + first * size
            try:
                window = Window(self.fd, start, rows * size)
            except OSError as problem:
                raise XfastError(f"{self.path}: can't be mapped: {problem}") from None
            yield first, np.frombuffer(memoryview(window), np.uint8).reshape(rows, size)
            now = os.fstat(self.fd).st_size
            if window.broken or 0 < now < start + rows * size:
                raise self._shrunk(min(now, start + rows * size))

    def _shrunk(self, offset: int) -> FormatError:
        return FormatError(
            self.path, offset, "found the end, needed what was there when it was opened"
        )


Rows = NDArray[np.uint8] | FileRows


def _blocks(areas: Rows) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield the number of a row and the areas from there on, some MiB at a time."""
    if isinstance(areas, FileRows):
        yield from areas.windows()
        return
    step = max(1, WINDOW // areas.shape[1])
    for first in range(0, len(areas), step):
        yield first, areas[first : first + step]


def sort(
    areas: Rows,
    place: Callable[[NDArray[np.uint8], int], tuple[infer.Place, bool]],
    sort_of: NDArray[np.uint32],
) -> tuple[list[infer.Place], list[Class]]:
    """Find the layouts of areas, and group the areas by what a judgement reads.

    Parameters
    ----------
    areas : (n, size) uint8, or FileRows
    place : callable
        Finds the layout of one area, and whether its components' bytes were asked for it; also
        gets the number of its row.
    sort_of : (n,) uint32
        Zeros; receives each row's index into the places.

    Returns
    -------
    places : list of Place
    classes : list of Class
        In the order in which they first occur; `kind` is an index into the places.
    """
    sorts, grouping = _Sorts(place), Grouping()
    for first, block in _blocks(areas):
        index = sorts.find(block, first)
        grouping.know(place.layout for place in sorts.places)
        grouping.add(block, first, index)
        if index.any():
            sort_of[first : first + len(block)] = index
    return list(sorts.places), grouping.classes()


class Grouping:
    """Areas of several sorts, grouped by all that a judgement reads."""

    def __init__(self) -> None:
        self.groups: list[_Group] = []

    def know(self, layouts: Iterable[Layout | None]) -> None:
        """Tell the layouts of all sorts so far, in their order."""
        self.groups += [_Group(layout) for layout in islice(layouts, len(self.groups), None)]

    def add(self, areas: NDArray[np.uint8], first: int, index: NDArray[np.uint32]) -> None:
        """Add areas, whose rows are `first` and after; `index` has their sorts."""
        kinds = np.flatnonzero(np.bincount(index, minlength=len(self.groups))).tolist()
        if len(kinds) == 1:
            self.groups[kinds[0]].add(areas, first, None)
            return
        for kind in kinds:
            mine = np.flatnonzero(index == kind)
            self.groups[kind].add(areas[mine], first, mine)

    def classes(self) -> list[Class]:
        """Return the classes, in the order in which they first occur."""
        found = [one for kind, group in enumerate(self.groups) for one in group.classes(kind)]
        return sorted(found, key=lambda one: one.first)


class _Group:
    """The classes of the areas of one layout, and the row that showed each first."""

    def __init__(self, layout: Layout | None) -> None:
        self.groups = Groups(layout or Layout(()))
        self.first: list[int] = []

    def add(self, areas: NDArray[np.uint8], start: int, numbers: NDArray[np.intp] | None) -> None:
        """Add areas; `numbers` are their rows, counted from `start`, if they are not all."""
        index = self.groups.add(areas)
        for new in range(len(self.first), int(index.max()) + 1):
            row = int((index == new).argmax())
            self.first.append(start + (row if numbers is None else int(numbers[row])))

    def classes(self, kind: int) -> Iterator[Class]:
        """Yield the classes."""
        found = self.groups.classes.tolist()
        for first, (*facts, _, count) in zip(self.first, found, strict=True):
            yield Class(kind, first, count, tuple(facts))


class _Sorts:
    """The layouts of areas, found once for all areas that tell the same of theirs.

    `places` has them in the order in which they first occur.
    """

    def __init__(self, place: Callable[[NDArray[np.uint8], int], tuple[infer.Place, bool]]) -> None:
        self.place = place
        self.places: dict[infer.Place, int] = {}
        self._known: dict[bytes, int] = {}
        """By what areas tell; -1: their bytes are to be asked as well."""

    def find(self, areas: NDArray[np.uint8], first: int) -> NDArray[np.uint32]:
        """Return each area's index into `places`; the areas are `first` and after."""
        tells = _tells(areas)
        rows, which = _distinct(tells)
        found = np.empty(len(rows), np.int64)
        for i in sorted(range(len(rows)), key=rows.__getitem__):
            row = int(rows[i])
            key = tells[row].tobytes()
            if key not in self._known:
                place, asks = self.place(areas[row], first + row)
                self._known[key] = -1 if asks else self._index(place)
            found[i] = self._known[key]
        index = found[which]
        if (found < 0).any():
            left = np.flatnonzero(index < 0)
            index[left] = self._by_bytes(areas, left, tells, first)
        return index.astype(np.uint32)

    def _by_bytes(
        self,
        areas: NDArray[np.uint8],
        left: NDArray[np.intp],
        tells: NDArray[np.uint64],
        first: int,
    ) -> NDArray[np.int64]:
        """Return the indices of the areas numbered `left`, whose bytes are to be asked."""
        mine = areas if len(left) == len(areas) else areas[left]
        filled = xinuse(mine, _stretches(areas.shape[1])) & ~np.uint64(XFEATURE_MASK_FPSSE)
        tells = np.column_stack([tells[left], filled])
        rows, which = _distinct(tells)
        found = np.empty(len(rows), np.int64)
        for i in sorted(range(len(rows)), key=rows.__getitem__):
            row = int(rows[i])
            key = tells[row].tobytes()
            if key not in self._known:
                number = int(left[row])
                self._known[key] = self._index(self.place(areas[number], first + number)[0])
            found[i] = self._known[key]
        return found[which]

    def _index(self, place: infer.Place) -> int:
        return self.places.setdefault(place, len(self.places))


def _tells(areas: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return what areas tell of their layouts, a row of words each.

    That is the header, the kernel's word of components, MXCSR_MASK, and whether the control words
    can be a CPU's.
    """
    out = np.empty((len(areas), 4), np.uint64)
    out[:, :2] = areas[:, 512:528].copy().view("<u8")
    out[:, 2] = areas[:, infer.SOFTWARE_OFFSET :][:, :8].copy().view("<u8")[:, 0]
    control = areas[:, 24:32].copy().view("<u4")
    fcw = areas[:, :2].copy().view("<u2")[:, 0]
    sound = (fcw & 0xE0C0 == 0x40) & (control[:, 0] & ~np.uint32(MXCSR_MASK_AMD) == 0)
    empty = (fcw == 0) & (control[:, 0] == 0)
    out[:, 3] = control[:, 1].astype(np.uint64) << np.uint64(2)
    out[:, 3] |= sound.astype(np.uint64) | empty.astype(np.uint64) << np.uint64(1)
    return out


def _distinct(words: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the first row of each sort of rows, and each row's index into these.

    Rows are told apart by a sum with secret factors; should two sums ever meet, by others.
    """
    while True:
        factors = np.frombuffer(os.urandom(8 * words.shape[1]), np.uint64) | np.uint64(1)
        sums = words @ factors
        if (sums == sums[0]).all() and (words == words[0]).all():
            return np.zeros(1, np.intp), np.zeros(len(words), np.intp)
        _, first, which = np.unique(sums, return_index=True, return_inverse=True)
        if (words[first[which]] == words).all():
            return first, which


@lru_cache(maxsize=64)
def _stretches(size: int) -> Layout:
    """Return the stretches of an area that known layouts tell apart, as if they were components."""
    cuts = {EXTENDED_OFFSET, size}
    for layout in PRESETS.values():
        for slot in layout.slots:
            if slot.offset:
                cuts |= {slot.offset, slot.offset + slot.size}
    ends = sorted(cut for cut in cuts if EXTENDED_OFFSET <= cut <= size)
    spans = enumerate(pairwise(ends), 2)
    return Layout(tuple(Slot(nr, end - start, start) for nr, (start, end) in spans))


__all__ = ["FileRows", "Grouping", "Rows", "sort"]
