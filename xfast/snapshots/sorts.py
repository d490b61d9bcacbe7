"""Very many areas in one pass: which layout each is of, and what no judgement can tell apart.

A file of 10**7 areas is neither copied nor kept: a window of it is mapped at a time. What decides
on a layout is a few words of an area and, where these leave a choice, which stretches between the
places of known layouts hold anything. Areas that agree in that are of one sort, and one of them is
asked. Then the engine groups each sort's areas by all that a judgement reads.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from xfast.engine import tells
from xfast.engine.guard import Window
from xfast.errors import FormatError, XfastError
from xfast.snapshots import infer
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import Class
from xfast.xsave.area import Groups, xinuse
from xfast.xsave.features import EXTENDED_OFFSET, MXCSR_MASK_AMD, XFEATURE_MASK_FPSSE
from xfast.xsave.layout import PRESETS, Layout, Slot

WINDOW = 64 << 20
"""Bytes of a file that are mapped at a time."""

BLOCK = 1 << 20
"""Bytes of areas that are looked at together: what a core's own cache holds."""


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
            self.path, offset, "expected what was there when the file was opened, got the end"
        )


Rows = NDArray[np.uint8] | FileRows


def _blocks(areas: Rows) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield the number of a row and the areas from there on, as many as a cache holds."""
    windows = areas.windows() if isinstance(areas, FileRows) else iter([(0, areas)])
    step = max(1, BLOCK // areas.shape[1])
    for start, window in windows:
        for first in range(0, len(window), step):
            yield start + first, window[first : first + step]


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
    sorts, groups = _Sorts(place), Groups()
    known = 0
    for first, block in _blocks(areas):
        index = sorts.find(block, first)
        for found in list(sorts.places)[known:]:
            groups.know(found.layout or Layout(()))
        known = len(sorts.places)
        groups.add(block, index)
        if index.any():  # pages of zeros take no memory
            sort_of[first : first + len(block)] = index
    return list(sorts.places), classes_of(groups)


def classes_of(groups: Groups) -> list[Class]:
    """Return what was grouped, in the order in which it first occurs."""
    return [
        Class(sort, first, count, tuple(facts))
        for *facts, sort, first, count in groups.classes.tolist()
    ]


class _Sorts:
    """The layouts of areas, found once for all areas that tell the same of theirs.

    `places` has them in the order in which they first occur.
    """

    def __init__(self, place: Callable[[NDArray[np.uint8], int], tuple[infer.Place, bool]]) -> None:
        self.place = place
        self.places: dict[infer.Place, int] = {}
        self._by_words = tells.Known()
        self._by_stretches = tells.Known()

    def find(self, areas: NDArray[np.uint8], first: int) -> NDArray[np.uint32]:
        """Return each area's index into `places`; the areas are `first` and after."""
        told = np.empty(5 * len(areas), np.uint64)
        tells.words(areas, told, MXCSR_MASK_AMD)

        def place(row: int) -> int:
            found, asks = self.place(areas[row], first + row)
            return -1 if asks else self._index(found)

        index = np.empty(len(areas), np.int64)
        self._by_words.look_up(told, index, place)
        if index.min() < 0:
            left = np.flatnonzero(index < 0)
            mine = areas if len(left) == len(areas) else areas[left]
            more = told.reshape(-1, 5)[left]
            more[:, 4] = xinuse(mine, _stretches(areas.shape[1])) & ~np.uint64(XFEATURE_MASK_FPSSE)
            found = np.empty(len(left), np.int64)
            self._by_stretches.look_up(
                more.ravel(),
                found,
                lambda i: self._index(self.place(mine[i], first + int(left[i]))[0]),
            )
            index[left] = found
        return index.astype(np.uint32)

    def _index(self, place: infer.Place) -> int:
        return self.places.setdefault(place, len(self.places))


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


__all__ = ["FileRows", "Rows", "classes_of", "sort"]
