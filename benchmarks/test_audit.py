"""Header and MXCSR of every area, against numpy and struct."""

import baselines
import pytest
import reference
from baselines import MASK, MXCSR_MASK

from xfast.xsave import area


def check(areas, status):
    assert status.tolist() == [
        reference.audit(row.tobytes(), MASK, MXCSR_MASK) for row in areas[:200]
    ] + [0] * len(areas[200:])


def test_xfast(measure, areas):
    check(areas, measure(area.audit, areas, MASK, MXCSR_MASK))


def test_vectorised(measure, areas):
    check(areas, measure(baselines.audit_vectorised, areas, MASK, MXCSR_MASK))


@pytest.mark.usefixtures("few")
def test_struct(measure, areas):
    check(areas, measure(baselines.audit_struct, areas, MASK, MXCSR_MASK))
