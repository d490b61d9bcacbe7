"""Trimming in place, header only and with scrub, against numpy."""

import baselines
import pytest
import reference

from xfast.bench.engine import INTEL
from xfast.xsave import area

KEPT = 0x7


@pytest.fixture
def again(areas):
    """Put the headers back before every round, outside the clock."""
    headers = areas[:, 512:576].copy()

    def setup():
        areas[:, 512:576] = headers

    return {"setup": setup, "rounds": 20}


@pytest.fixture
def check(areas):
    rows = [row.tobytes() for row in areas[:50]]

    def compare(scrub):
        for row, got in zip(rows, areas, strict=False):
            assert got.tobytes() == reference.keep(row, INTEL, KEPT, scrub)[0]

    return compare


@pytest.mark.parametrize("scrub", [False, True])
def test_xfast(measure, areas, again, check, scrub):
    measure(lambda: area.keep(areas, INTEL, KEPT, scrub=scrub), **again)
    check(scrub)


def test_vectorised(measure, areas, again, check):
    measure(lambda: baselines.keep_vectorised(areas, INTEL, KEPT), **again)
    check(True)


@pytest.mark.usefixtures("few")
def test_area_by_area(measure, areas, again, check):
    measure(lambda: baselines.keep_by_area(areas, INTEL, KEPT), **again)
    check(True)
