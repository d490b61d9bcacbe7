"""From one layout or format into another: expand, and Intel to AMD Zen 4."""

import pytest
import reference

from xfast.bench.engine import COMPACTED, INTEL, fill
from xfast.xsave import area
from xfast.xsave.layout import preset

ZEN4 = preset("amd-zen4")


@pytest.mark.parametrize("to", [INTEL, ZEN4], ids=["expand", "zen4"])
def test_xfast(measure, areas, out, mix, to):
    if to is INTEL:
        fill(areas, INTEL, mix, COMPACTED)
    measure(area.converter(INTEL, to).convert, areas, out)
    for row, got in zip(areas[:50], out, strict=False):
        expected, lost = reference.relayout(row.tobytes(), INTEL, to, 4096)
        assert not lost
        assert got.tobytes() == expected
