"""Rows of areas: memory for them, the checks of what is passed as areas, and threads over them.

What `xfast.xsave.area` builds on; its users find `empty` and `tune` there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from xfast import _core
from xfast.engine import memory
from xfast.xsave.features import KVM_XSAVE_SIZE
from xfast.xsave.layout import Layout, layout_of

Areas = NDArray[np.uint8]
Masks = NDArray[np.uint64]

ALL = (1 << 63) - 1
PAGE = 4096

DEFAULT_THREADS = min(2, len(os.sched_getaffinity(0)))

_threads = {"above": 32 << 20, "most": DEFAULT_THREADS}


def tune(
    *,
    stream_above: int | None = None,
    rows_ahead: int | None = None,
    whole_rows: bool | Literal["measure"] | None = None,
    thread_above: int | None = None,
    threads: int | None = None,
    pool_limit: int | None = None,
) -> None:
    """Adjust how the engine treats large batches, for the whole process.

    Parameters
    ----------
    stream_above : int
        Bytes read and written above which a batch bypasses the caches. Default: 16 MiB; about
        half of the last-level cache that a core has to itself is right.
    rows_ahead : int
        Areas that such a batch fetches ahead of the one it works on. Default: 4.
    whole_rows : bool or "measure"
        Whether such a batch fetches whole rows where more than half of their bytes are needed,
        or just the lines that are. Default: measured with the first large batch of each kind.
    thread_above : int
        Bytes read in a batch from which it is shared among threads. Default: 32 MiB.
    threads : int
        Threads that share a batch, the calling one included. Default: 2, or 1 where this
        process has only one CPU: memory, not the core, is the limit.
    pool_limit : int
        Bytes of freed areas kept for the next `empty`. Default: 512 MiB.
    """
    _core.tune(
        -1 if stream_above is None else stream_above,
        -1 if rows_ahead is None else rows_ahead,
        -1 if whole_rows is None else 2 if whole_rows == "measure" else int(whole_rows),
    )
    if thread_above is not None:
        _threads["above"] = thread_above
    if threads is not None:
        _threads["most"] = threads
    if pool_limit is not None:
        memory.pool_limit(pool_limit)


@lru_cache(maxsize=512)
def table_of(layout: Layout | str) -> _core.Table:
    """Return the engine's form of a layout, or of the preset of this name."""
    return _core.Table(layout_of(layout).slots)


def empty(n: int, layout: Layout | str | int, *, zero: bool = True) -> Areas:
    """Return `n` areas of zeros, each in its own row, aligned to 4 KiB (batches: to 2 MiB).

    Parameters
    ----------
    n : int
    layout : Layout or int
        Bytes of a row, or the layout whose standard-format size they are to have, at least
        4096 (struct kvm_xsave). Rows start at multiples of 4096 bytes.
    zero : bool
        False: the bytes are not cleared, which saves time where all are written anyway.

    Returns
    -------
    (n, size) uint8
        A view whose row stride is `size` rounded up to 4096. Its memory is reused once the
        last view is gone.

    Raises
    ------
    ValueError
        If `n` is negative or `size` is below 576.
    """
    size = layout
    if not isinstance(size, int):
        size = max(layout_of(size).standard_size(), KVM_XSAVE_SIZE)
    if n < 0 or size < 576:
        raise ValueError(f"empty: expected n >= 0 and size >= 576, got n={n}, size={size}")
    stride = -(-size // PAGE) * PAGE
    block = np.frombuffer(memoryview(memory.Block(max(n, 1) * stride, zero)), np.uint8)
    return block[: max(n, 1) * stride].reshape(-1, stride)[:n, :size]


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
                f"{name}: expected areas, got {type(areas).__name__}: {problem}"
            ) from None
    if areas.dtype != np.uint8:
        raise ValueError(f"{name}: expected dtype uint8, got {areas.dtype}")
    if areas.ndim == 1:
        return areas[np.newaxis], True
    if areas.ndim != 2:
        raise ValueError(f"{name}: expected (n, size) or (size,), got {areas.ndim} dimensions")
    return areas, False


def check_mask(mask: int, name: str = "mask") -> int:
    """Return `mask` if it is one of components 0 to 62.

    Raises
    ------
    ValueError
        If it is negative or has bit 63 or above.
    """
    if not 0 <= mask <= ALL:
        raise ValueError(f"{name}: expected bits 0 to 62 only, got {mask:#x}")
    return int(mask)


def spread(touched: int, run: Callable[..., int], *arrays: Any) -> int:
    """Run over arrays of as many rows, in several threads if enough bytes are touched.

    Returns
    -------
    int
        What `run`, called with the same part of each array (None stays None), returned; ored.

    The calling thread takes the first part itself, and starts the others for this batch only. A
    batch takes so long that starting them costs nothing, and no thread is left when the process
    forks.
    """
    n = len(arrays[0])
    parts = _threads["most"] if touched >= _threads["above"] else 1
    if parts <= 1 or n < parts:
        return run(*arrays)
    bounds = [n * i // parts for i in range(parts + 1)]
    results: list[int | BaseException] = []

    def work(part: slice) -> None:
        try:
            results.append(run(*(None if each is None else each[part] for each in arrays)))
        except BaseException as problem:
            results.append(problem)

    workers = [threading.Thread(target=work, args=(slice(*pair),)) for pair in pairwise(bounds[1:])]
    for worker in workers:
        worker.start()
    work(slice(0, bounds[1]))
    for worker in workers:
        worker.join()
    combined = 0
    for result in results:
        if isinstance(result, BaseException):
            raise result
        combined |= result
    return combined
