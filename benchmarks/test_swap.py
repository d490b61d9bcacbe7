"""Host state out, guest state in: two merges, against two straight copies."""

import numpy as np
import reference

from xfast.bench.engine import INTEL, fill
from xfast.xsave import area


def test_xfast(measure, areas, n):
    live, saved = area.empty(n, 4096), area.empty(n, 4096)
    fill(live, INTEL, "full", seed=2)
    first = live[0].tobytes()
    measure(
        lambda: area.swap(live, saved, areas, INTEL, save_mask=0x2E7, restore_mask=0xE7),
        rounds=1 if n > 1024 else 20,
    )
    after, _ = reference.merge(areas[0].tobytes(), INTEL, first, INTEL, 0xE7, True)
    bv = reference.header(after)[0]
    assert reference.header(live[0].tobytes())[0] == bv


def test_two_copies(measure, areas, out):
    def both():
        np.copyto(out, areas)
        np.copyto(areas, out)

    measure(both)
