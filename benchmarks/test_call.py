"""What one call from Python costs, against doing nothing and against np.copyto."""

import numpy as np
import pytest

from xfast.bench.engine import INTEL, KVM_MASK, fill
from xfast.xsave import area


@pytest.fixture(scope="module")
def one():
    rows = area.empty(1, 2752)
    fill(rows, INTEL, "full")
    return rows[0]


def nothing(one, two):
    pass


CALLS = {
    "nothing": nothing,
    "copyto": lambda one, two: np.copyto(two, one),
    "convert": area.converter(INTEL, INTEL, mask=KVM_MASK, kernel=True).convert,
    "merge": area.merger(INTEL, INTEL, user_xfeatures=KVM_MASK, mxcsr_mask=0xFFFF).merge,
    "get_uabi": lambda one, two: area.get_uabi(one, INTEL, mask=KVM_MASK, out=two),
}


@pytest.mark.parametrize("name", CALLS)
def test_call(benchmark, one, name):
    two = area.empty(1, 2752)[0]
    benchmark(CALLS[name], one, two)
    if name not in ("nothing", "merge"):
        assert (two[576:832] == one[576:832]).all()
