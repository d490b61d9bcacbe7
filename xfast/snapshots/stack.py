"""Many areas in one array, as vCPUs that are made when somebody asks for one.

A file of ten million areas is one array and a few layouts. A Stack is the sequence of its vCPUs:
whoever walks it pays for each, and whoever can work on arrays takes `areas` and `runs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from xfast.snapshots.model import Vcpu

CHUNK = 16 << 20
"""Bytes of areas that `runs` yields at most at a time."""


class Stack(Sequence[Vcpu]):
    """The vCPUs of an array of areas.

    Parameters
    ----------
    areas : (n, size) uint8
    kinds : sequence of Vcpu
        One for each sort of row: what the file tells of such a vCPU besides its area.
    sort_of : (n,) unsigned, or None
        Each row's index into `kinds`; None where there is one for all.
    make : callable
        Returns the vCPU of a row from its kind, number and area.
    """

    def __init__(
        self,
        areas: NDArray[np.uint8],
        kinds: Sequence[Vcpu],
        sort_of: NDArray[np.uint8] | NDArray[np.uint32] | None,
        make: Callable[[Vcpu, int, NDArray[np.uint8]], Vcpu],
    ) -> None:
        self.areas = areas
        self.kinds = tuple(kinds)
        self.sort_of = sort_of
        self._make = make

    def __len__(self) -> int:
        return len(self.areas)

    @overload
    def __getitem__(self, index: int) -> Vcpu: ...
    @overload
    def __getitem__(self, index: slice) -> list[Vcpu]: ...
    def __getitem__(self, index: int | slice) -> Vcpu | list[Vcpu]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        kind = self.kinds[0 if self.sort_of is None else int(self.sort_of[row])]
        return self._make(kind, row, self.areas[row])

    def __iter__(self) -> Iterator[Vcpu]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(other) != len(self):
            return NotImplemented
        return all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def runs(self, kind: int) -> Iterator[tuple[NDArray[np.intp], NDArray[np.uint8]]]:
        """Yield the rows of one kind, a chunk at a time: their numbers, and their areas."""
        step = max(1, CHUNK // self.areas.shape[1])
        for start in range(0, len(self), step):
            areas = self.areas[start : start + step]
            rows = np.arange(start, start + len(areas))
            if self.sort_of is not None:
                mine = self.sort_of[start : start + step] == kind
                if not mine.any():
                    continue
                if not mine.all():
                    rows, areas = rows[mine], areas[mine]
            yield rows, areas
