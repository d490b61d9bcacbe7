"""Which components of two areas differ, against numpy."""

import baselines
import pytest
import reference
from baselines import MASK

from xfast.bench.engine import INTEL
from xfast.xsave import area


@pytest.fixture
def others(areas):
    rows = area.empty(*areas.shape)
    rows[:] = areas
    rows[::3, 700] ^= 1
    return rows


def check(one, two, differing):
    assert differing[:50].tolist() == [
        reference.diff(a.tobytes(), INTEL, b.tobytes(), INTEL)
        for a, b in zip(one[:50], two[:50], strict=True)
    ]


def test_xfast(measure, areas, others):
    check(areas, others, measure(area.diff, areas, others, INTEL))


def test_vectorised(measure, areas, others):
    check(areas, others, measure(baselines.diff_vectorised, areas, others, INTEL, MASK))


@pytest.mark.usefixtures("few")
def test_area_by_area(measure, areas, others):
    check(areas, others, measure(baselines.diff_by_area, areas, others, INTEL, MASK))
