from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Areas = NDArray[np.uint8]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]

class Table:
    def __init__(self, slots: Iterable[tuple[int, ...]]) -> None: ...

def headers(
    areas: Areas, xstate_bv: U64, xcomp_bv: U64, mxcsr: U32, reserved: NDArray[np.bool_]
) -> None: ...
def classify(
    areas: Areas, table: Table, inuse: U64, default: U64, stale: U64, unreadable: U64
) -> None: ...
def keep(areas: Areas, table: Table, mask: int, scrub: bool, dropped: U64) -> None: ...
def relayout(
    src: Areas,
    src_table: Table,
    out: Areas,
    out_table: Table,
    mask: int,
    xcomp_bv: int,
    mxcsr_mask: int,
    software: int,
    lost: U64,
    kernel: bool = False,
    pkru: U32 | None = None,
) -> None: ...
def set_uabi(
    uabi: Areas,
    table: Table,
    into: Areas,
    into_table: Table,
    user_xfeatures: int,
    mxcsr_mask: int,
    supervisor: int,
    status: U32,
) -> None: ...
def swap(
    registers: Areas,
    table: Table,
    leave: Areas,
    leave_table: Table,
    save_mask: int,
    enter: Areas,
    enter_table: Table,
    restore_mask: int,
    lost: U64,
) -> None: ...
def audit(areas: Areas, mask: int, mxcsr_mask: int, status: NDArray[np.uint8]) -> None: ...
def diff(one: Areas, one_table: Table, two: Areas, two_table: Table, differing: U64) -> None: ...
def xinuse(areas: Areas, table: Table, early: bool, inuse: U64) -> None: ...
