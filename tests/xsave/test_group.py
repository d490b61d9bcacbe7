"""Rows that no judgement can tell apart: found, counted, and described as one by one."""

import threading

import numpy as np
import pytest
import reference
from random_areas import LAYOUTS, random_areas

from xfast.engine import tells
from xfast.xsave import area
from xfast.xsave.layout import PRESETS, Layout

INTEL = PRESETS["intel"]


@pytest.fixture(params=["cached", "streamed"])
def streamed(request):
    if request.param == "streamed":
        area.tune(stream_above=0)
    yield
    area.tune(stream_above=16 << 20)


def facts_of(row, layout):
    """What one area tells, by the slow reference."""
    data = row.tobytes()
    bv, xcomp = reference.header(data)
    inuse, default, stale, unreadable = reference.classify(data, layout)
    pkru = 0
    if bv >> 9 & 1 and not unreadable >> 9 & 1:
        at = reference.offsets(layout, xcomp, len(data))[9]
        pkru = int.from_bytes(data[at : at + 4], "little")
    mxcsr = int.from_bytes(data[24:28], "little")
    return bv, xcomp, inuse, default, stale, unreadable, mxcsr, pkru, int(any(data[528:576]))


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(())], ids=lambda layout: layout.name)
def test_each_row_is_described_by_its_class(layout, compacted):
    rng = np.random.default_rng(5)
    areas = np.repeat(random_areas(rng, layout, 80, 2752, compacted), 5, axis=0)
    areas = areas[rng.permutation(len(areas))]
    classes, index = area.group(areas, layout)
    for row, number in zip(areas, index, strict=True):
        assert tuple(classes[list(area.FACTS.names)][number]) == facts_of(row, layout)
    assert len(np.unique(classes[list(area.FACTS.names)])) == len(classes)
    assert classes["count"].tolist() == np.bincount(index).tolist()
    assert classes["first"].tolist() == np.unique(index, return_index=True)[1].tolist()


def test_the_table_grows():
    """Every row differs, in PKRU alone."""
    n = 50_000
    areas = area.empty(n, 2752)
    areas[:, 513] = 2
    values = np.arange(n, dtype="<u4") * 0x10001
    areas[:, 2688:2692] = values.view(np.uint8).reshape(n, 4)
    found = area.Groups(INTEL)
    assert found.add(areas[: n // 2]).tolist() == list(range(n // 2))
    assert found.add(areas).tolist() == list(range(n))
    classes = found.classes
    assert classes["pkru"].tolist() == values.tolist()
    assert classes["count"].tolist() == [2] * (n // 2) + [1] * (n // 2)
    assert classes["first"].tolist() == [*range(n // 2), *range(n, n + n // 2)]


def test_equal_rows_are_one_class_however_many():
    areas = np.zeros((10_000, 576), np.uint8)
    classes, index = area.group(areas, INTEL)
    assert len(classes) == 1
    assert not index.any()
    assert classes["count"][0] == 10_000


def test_no_rows_and_one_row():
    classes, index = area.group(np.zeros((0, 4096), np.uint8), INTEL)
    assert classes.shape == index.shape == (0,)
    classes, index = area.group(bytes(4096), INTEL)
    assert (len(classes), index.tolist()) == (1, [0])


def test_what_is_no_area_is_refused():
    with pytest.raises(ValueError, match="expected rows of 576 bytes or more, got 500"):
        area.group(np.zeros((3, 500), np.uint8), INTEL)


def test_threads_share_one():
    rng = np.random.default_rng(1)
    found = area.Groups(INTEL)
    parts = [random_areas(rng, INTEL, 200, 2752, True) for _ in range(4)]
    indices = {}

    def work(i):
        for _ in range(5):
            indices[i] = found.add(parts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    classes = found.classes
    assert classes["count"].sum() == 4 * 5 * 200
    for i, part in enumerate(parts):
        names = list(area.FACTS.names)
        assert [tuple(classes[names][k]) for k in indices[i]] == [
            facts_of(row, INTEL) for row in part
        ]


@pytest.mark.usefixtures("streamed")
def test_rows_of_several_layouts_are_described_each_by_its_own():
    rng = np.random.default_rng(9)
    layouts = [*LAYOUTS, Layout(())]
    areas = random_areas(rng, INTEL, 300, 2752, False)
    sorts = rng.integers(0, len(layouts), len(areas)).astype(np.uint32)
    sorts[50:80] = 1
    found = area.Groups(*layouts)
    index = np.concatenate([found.add(areas[:77], sorts[:77]), found.add(areas[77:], sorts[77:])])
    classes = found.classes
    for row, sort, number in zip(areas, sorts.tolist(), index, strict=True):
        assert classes["sort"][number] == sort
        assert tuple(classes[list(area.FACTS.names)][number]) == facts_of(row, layouts[sort])
    assert classes["count"].tolist() == np.bincount(index).tolist()
    assert classes["first"].tolist() == np.unique(index, return_index=True)[1].tolist()


def test_a_sort_without_a_layout_is_refused():
    areas = np.zeros((3, 576), np.uint8)
    with pytest.raises(ValueError, match="expected numbers below 1, got 1"):
        area.Groups(INTEL).add(areas, np.array([0, 1, 0], np.uint32))
    with pytest.raises(ValueError, match="sorts"):
        area.Groups(INTEL).add(areas, np.zeros(2, np.uint32))


def test_what_is_known_of_areas_is_asked_once_each():
    """More different ones than the table begins with, sought again among others."""
    known = tells.Known()
    rng = np.random.default_rng(3)
    told = rng.integers(0, 1 << 63, (1000, 5), np.uint64)
    order = rng.integers(0, len(told), 5000)
    asked = []

    def new(row):
        asked.append(int(order[row]))
        return -int(order[row])

    index = np.empty(len(order), np.int64)
    known.look_up(told[order].ravel(), index, new)
    assert index.tolist() == (-order).tolist()
    assert sorted(asked) == np.unique(order).tolist()
