"""How large batches fetch ahead: measured once, and the same answers either way."""

import numpy as np
import pytest

from xfast import _core
from xfast.bench.engine import INTEL, fill
from xfast.engine import clock
from xfast.xsave import area, rows

ROWS = 5000
"""More than the sixteen slices of 256 that a trial takes, and no multiple of 256."""


@pytest.fixture(autouse=True)
def measured_anew():
    area.tune(stream_above=0, whole_rows="measure", threads=1)
    yield
    area.tune(stream_above=16 << 20, whole_rows="measure", threads=rows.DEFAULT_THREADS)


def areas_of(mix, size=4096, n=ROWS):
    areas = area.empty(n, 4096).reshape(-1)[: n * size].reshape(n, size)
    fill(areas, INTEL, mix)
    return areas


def operations(areas):
    """Run each operation that has a trial; return what it gives."""
    images = np.zeros_like(areas)
    fill(images, INTEL, "full", seed=2)
    packed = area.empty(len(areas), 4096)
    packed[:] = 0
    lost = np.zeros(len(areas), "u8")
    area.converter(INTEL, INTEL, xcomp_bv=0).convert(areas, packed, lost)
    return {
        "convert": area.get_uabi(areas, INTEL, mask=0xE7, size=4096, pkru=None).tobytes(),
        "compact": (packed.tobytes(), lost.tobytes()),
        "merge": area.set_uabi(areas, INTEL, images, user_xfeatures=0x2E7, mxcsr_mask=0).tobytes(),
        "images": images.tobytes(),
        "classify": [column.tobytes() for column in area.classify(areas, INTEL)],
        "xinuse": area.xinuse(areas, INTEL).tobytes(),
        "diff": area.diff(areas, images, INTEL).tobytes(),
        "group": [part.tobytes() for part in area.group(areas, INTEL)],
    }


@pytest.mark.parametrize("size", [4096, 2752])
def test_a_large_batch_is_its_own_measurement(size):
    areas = areas_of("full", size)
    assert set(_core.whole_rows().values()) == {-1}
    first = operations(areas)
    pages = " pages" if size == 4096 else ""
    measured = {"convert", "merge", "classify" + pages, "xinuse" + pages, "diff" + pages}
    assert {kind for kind, choice in _core.whole_rows().items() if choice >= 0} == measured
    for whole in (True, False):
        area.tune(whole_rows=whole)
        assert set(_core.whole_rows().values()) == {int(whole)}
        assert operations(areas) == first
        assert set(_core.whole_rows().values()) == {int(whole)}


def test_rows_that_share_lines_are_measured_too():
    """Each slice ends in the middle of a line, which the next one goes on from."""
    areas, out = areas_of("full", 2696), np.zeros((ROWS, 2696), np.uint8)
    how = area.converter(INTEL, INTEL, mask=0x2E7)
    how.convert(areas, out)
    assert _core.whole_rows()["convert"] in (0, 1)
    for whole in (True, False):
        area.tune(whole_rows=whole)
        again = np.zeros_like(out)
        how.convert(areas, again)
        assert (again == out).all()


def test_rows_with_little_in_them_leave_the_question_open():
    out = area.empty(ROWS, 4096)
    area.converter(INTEL, INTEL).convert(areas_of("avx"), out)
    assert _core.whole_rows()["convert"] == -1


@pytest.mark.parametrize(("first", "last", "measured"), [("avx", "full", 1), ("full", "avx", 0)])
def test_the_last_slices_are_measured(first, last, measured):
    """The first rows meet caches full of what was written before them, which misled the choice."""
    areas, out = areas_of(first), area.empty(ROWS, 4096)
    areas[ROWS - 16 * 256 :] = areas_of(last, n=16 * 256)
    area.converter(INTEL, INTEL, mask=0x2E7).convert(areas, out)
    assert (_core.whole_rows()["convert"] >= 0) == measured
    assert (out[:, 512:520] == areas[:, 512:520]).all()


@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000])
def test_small_batches_measure_together(n):
    areas = areas_of("full", n=n)
    out = area.empty(n, 4096)
    how = area.converter(INTEL, INTEL)
    for _ in range(20):
        how.convert(areas, out)
        assert (out[:, 1088:2696] == areas[:, 1088:2696]).all()
    assert (_core.whole_rows()["convert"] == -1) == (n < 256)


def test_rows_backwards_and_rows_apart_are_not_measured():
    areas = areas_of("full")
    area.xinuse(areas[::-1], INTEL)
    area.xinuse(areas[::2], INTEL)
    area.xinuse(areas[:, :2752], INTEL)
    assert set(_core.whole_rows().values()) == {-1}


def test_the_clock_times_what_calls_do():
    """It had a dispatch of its own, which knew nothing of new ways."""
    areas, out, called = areas_of("full"), area.empty(ROWS, 4096), area.empty(ROWS, 4096)
    how = area.converter(INTEL, INTEL, mask=0xE7)
    assert clock.convert(how, areas, out) > 0
    assert _core.whole_rows()["convert"] >= 0
    how.convert(areas, called)
    assert (out == called).all()
    images, merged = area.empty(ROWS, 4096), area.empty(ROWS, 4096)
    how = area.merger(INTEL, INTEL, user_xfeatures=0x2E7, mxcsr_mask=0xFFFF)
    assert clock.merge(how, areas, images) > 0
    assert _core.whole_rows()["merge"] >= 0
    how.merge(areas, merged)
    assert (images == merged).all()
