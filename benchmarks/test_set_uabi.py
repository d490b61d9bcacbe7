"""User buffers into kernel images, against numpy."""

import baselines
import pytest
import reference
from baselines import MASK, MXCSR_MASK

from xfast.bench.engine import INTEL, fill
from xfast.xsave import area
from xfast.xsave.features import SUPERVISOR_MASK


@pytest.fixture
def images(n):
    rows = area.empty(n, 4096)
    fill(rows, INTEL, "full", seed=2)
    return rows


@pytest.fixture
def check(areas, images):
    chosen = range(0, len(areas), max(len(areas) // 7, 1))
    expected = {
        i: reference.set_uabi(
            areas[i].tobytes(), INTEL, images[i].tobytes(), INTEL, MASK, MXCSR_MASK, SUPERVISOR_MASK
        )
        for i in chosen
    }
    yield
    assert all(images[i].tobytes() == image for i, (_, image) in expected.items())


def test_xfast(measure, areas, images, check):
    how = area.merger(INTEL, INTEL, user_xfeatures=MASK, mxcsr_mask=MXCSR_MASK)
    assert measure(how.merge, areas, images) == 0


def test_vectorised(measure, areas, images, check):
    call = baselines.set_uabi_vectorised
    assert not measure(call, areas, images, INTEL, MASK, MXCSR_MASK).any()


@pytest.mark.usefixtures("few")
def test_area_by_area(measure, areas, images, check):
    call = baselines.set_uabi_by_area
    assert not measure(call, areas, images, INTEL, MASK, MXCSR_MASK).any()
