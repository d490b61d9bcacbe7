"""Standard to compacted format, each area for the components it holds, against numpy."""

import baselines
import pytest
import reference

from xfast.bench.engine import INTEL
from xfast.xsave import area


def check(areas, out):
    for row, got in zip(areas[:50], out, strict=False):
        bv, xcomp = reference.header(got.tobytes())
        expected, lost = reference.relayout(row.tobytes(), INTEL, INTEL, 4096, xcomp=xcomp)
        assert not lost
        assert xcomp == bv | 1 << 63
        reach = INTEL.compacted_size(bv)
        assert got[:reach].tobytes() == expected[:reach]


def test_xfast(measure, areas, out):
    measure(area.converter(INTEL, INTEL, xcomp_bv=0).convert, areas, out)
    check(areas, out)


@pytest.mark.usefixtures("few")
def test_area_by_area(measure, areas, out):
    measure(baselines.compact_by_area, areas, out, INTEL)
    check(areas, out)
