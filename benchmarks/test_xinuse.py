"""Which components hold other than init data, against numpy."""

import baselines
import pytest
import reference
from baselines import MASK

from xfast.bench.engine import INTEL
from xfast.xsave import area


def check(areas, used, early):
    expected = [reference.xinuse(row.tobytes(), INTEL, early) for row in areas[:50]]
    assert used[:50].tolist() == expected


@pytest.mark.parametrize("early", [False, True])
def test_xfast(measure, areas, early):
    check(areas, measure(area.xinuse, areas, INTEL, early), early)


def test_vectorised(measure, areas):
    check(areas, measure(baselines.xinuse_vectorised, areas, INTEL, MASK), True)


@pytest.mark.usefixtures("few")
def test_area_by_area(measure, areas):
    check(areas, measure(baselines.xinuse_by_area, areas, INTEL, MASK), True)
