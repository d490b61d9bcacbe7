"""Layouts of all kinds and areas with random contents, for the tests of the engine."""

import os

import numpy as np

from xfast import _core
from xfast.xsave.layout import PRESETS, Layout, Slot

COMPACTED = 1 << 63
ODD = Layout(
    (Slot(2, 256, 576), Slot(5, 12, 835), Slot(7, 130, 900), Slot(9, 8, 1096),
     Slot(11, 16, 0, True), Slot(17, 64, 1152, False, True), Slot(20, 8, 1408), Slot(21, 24, 1500),
     Slot(22, 90, 1600), Slot(23, 9, 1750), Slot(24, 64, 1801), Slot(30, 77, 1301)),
    "odd",
)  # fmt: skip
LAYOUTS = [*PRESETS.values(), ODD]
MASKS = (
    0,
    1,
    2,
    3,
    4,
    7,
    0x207,
    0x2E7,
    0x2FF,
    0x602E7,
    0xE00E7,
    0x1A07,
    0x18,
    0x203,
    0x80007,
    0x41F002E7,
)


def random_areas(rng, layout, n, size, compacted):
    """Areas with random headers and non-zero data everywhere, and some with much of it zero."""
    areas = rng.integers(1, 256, (n, size), np.uint8)
    mxcsr = (0x1F80, 0, 0x1FA0, 0x2FFFF)
    for i, row in enumerate(areas):
        if i % 3 == 0:
            zeros = rng.integers(0, size, 12)
            for start in zeros:
                row[start : start + 300] = 0
        if i % 5 == 0:
            row[:512] = 0
            row[:2] = (0x7F, 0x03) if i % 2 else (0, 0)
        row[24:28] = np.frombuffer(np.uint32(mxcsr[i % 4]).tobytes(), np.uint8)
        bv = int(rng.choice(MASKS)) & layout.mask
        xcomp = 0
        if compacted and i % 2:
            xcomp = COMPACTED | bv | int(rng.choice(MASKS)) & layout.mask
        else:
            bv &= layout.user_mask
        row[512:528] = np.frombuffer(np.array([bv, xcomp], "<u8").tobytes(), np.uint8)
        if i % 7:
            row[528:576] = 0
    return areas


def available():
    return _core.ISAS[: _core.ISAS.index(os.environ.get("XFAST_ISA", _core.ISA))]
