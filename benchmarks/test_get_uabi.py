"""Kernel images to user buffers, against numpy and struct."""

import baselines
import pytest
import reference
from baselines import HOST, MASK, MXCSR_MASK

from xfast.bench.engine import INTEL
from xfast.xsave import area


def check(areas, out):
    for i in range(0, len(areas), max(len(areas) // 7, 1)):
        expected, _ = reference.relayout(
            areas[i].tobytes(), INTEL, INTEL, 4096, mask=MASK, mxcsr_mask=MXCSR_MASK,
            software=HOST, kernel=True,
        )  # fmt: skip
        assert out[i].tobytes() == expected


def test_xfast(measure, areas, out):
    how = area.converter(INTEL, INTEL, mask=MASK, mxcsr_mask=MXCSR_MASK, software=HOST, kernel=True)
    measure(how.convert, areas, out)
    check(areas, out)


def test_xfast_into_new_memory(measure, areas):
    out = measure(
        lambda: area.get_uabi(
            areas, INTEL, mask=MASK, features=HOST, mxcsr_mask=MXCSR_MASK, size=4096
        )
    )
    check(areas, out)


def test_vectorised(measure, areas, out):
    measure(baselines.get_uabi_vectorised, areas, out, INTEL, MASK, MXCSR_MASK, HOST)
    check(areas, out)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("how", [baselines.get_uabi_by_area, baselines.get_uabi_struct])
def test_area_by_area(measure, areas, out, how):
    measure(how, areas, out, INTEL, MASK, MXCSR_MASK, HOST)
    check(areas, out)
