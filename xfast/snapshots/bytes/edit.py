"""From two states of the same bytes to the splices that lead from one to the other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from xfast.errors import PolicyError
from xfast.snapshots.model import Splice

GAP = 16
"""Changes closer than this (bytes) are one splice."""


def changes(
    offset: int, old: NDArray[np.uint8], new: NDArray[np.uint8], field: str
) -> Iterator[Splice]:
    """Yield the splices that make `new` of `old`, which lies at `offset` and is as long."""
    differing = np.flatnonzero(old != new)
    if not differing.size:
        return
    for run in np.split(differing, np.flatnonzero(np.diff(differing) > GAP) + 1):
        start, end = int(run[0]), int(run[-1]) + 1
        yield Splice(offset + start, old[start:end].tobytes(), new[start:end].tobytes(), field)


def fitted(area: NDArray[np.uint8], size: int, where: str) -> NDArray[np.uint8]:
    """Return `area` with exactly `size` bytes, filled up with zeros.

    Raises
    ------
    PolicyError
        If it is longer: nothing is cut off here.
    """
    if area.size > size:
        raise PolicyError(f"{where}: expected an area of at most {size} bytes, got {area.size}")
    whole = np.zeros(size, np.uint8)
    whole[: area.size] = area
    return whole
