"""Every operation of the engine against the slow reference, on areas of all kinds."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
from random_areas import COMPACTED, LAYOUTS, MASKS, ODD, available, random_areas

from xfast.xsave import area
from xfast.xsave.features import SUPERVISOR_MASK
from xfast.xsave.layout import PRESETS

CASES = [
    (layout, size, compacted)
    for layout in LAYOUTS
    for size, compacted in ((2696, False), (4096, True), (2752, True), (11008, True))
]
IDS = [f"{layout.name}-{size}-{compacted}" for layout, size, compacted in CASES]


@pytest.fixture(params=["cached", "streamed", "whole rows"])
def streamed(request):
    """Run with and without streaming stores and fetching ahead, lines as needed or whole rows."""
    if request.param != "cached":
        area.tune(stream_above=0, whole_rows=request.param == "whole rows")
    yield request.param
    area.tune(stream_above=16 << 20, whole_rows="measure")


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize(("layout", "size", "compacted"), CASES, ids=IDS)
def test_readers(layout, size, compacted):
    rng = np.random.default_rng(size)
    areas = random_areas(rng, layout, 60, size, compacted)
    rows = [row.tobytes() for row in areas]
    mask = int(rng.choice(MASKS))
    assert area.audit(areas, mask, 0xFFFF).tolist() == [
        reference.audit(row, mask, 0xFFFF) for row in rows
    ]
    for early in (False, True):
        assert area.xinuse(areas, layout, early).tolist() == [
            reference.xinuse(row, layout, early) for row in rows
        ]
    classes = area.classify(areas, layout)
    assert list(zip(*(m.tolist() for m in classes[1:]), strict=True)) == [
        reference.classify(row, layout) for row in rows
    ]
    other = random_areas(rng, layout, 60, size, compacted)
    for i in range(0, 60, 2):
        other[i] = areas[i]
        if i % 4:
            other[i, rng.integers(0, 512)] ^= 1
    assert area.diff(areas, other, layout).tolist() == [
        reference.diff(a, layout, b.tobytes(), layout) for a, b in zip(rows, other, strict=True)
    ]


@pytest.mark.usefixtures("streamed")
def test_padding_behind_pkru_does_not_count():
    """Zen 2 gives PKRU a line of its own, of which four bytes are the register."""
    layout = PRESETS["amd-zen2"]
    assert layout.by_nr[9].size == 64
    areas = np.zeros((300, 896), np.uint8)
    areas[:, 513] = 2
    others = areas.copy()
    others[:, 836:896] = 7
    others[::2, 832] = 1
    expected = [0x200, 0] * 150
    assert area.xinuse(others, layout).tolist() == expected
    assert area.classify(others, layout).inuse.tolist() == expected
    assert area.diff(areas, others, layout).tolist() == expected


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize(("layout", "size", "compacted"), CASES, ids=IDS)
def test_keep(layout, size, compacted):
    rng = np.random.default_rng(size)
    for scrub in (False, True):
        areas = random_areas(rng, layout, 40, size, compacted)
        rows = [row.tobytes() for row in areas]
        mask = int(rng.choice(MASKS))
        dropped = area.keep(areas, layout, mask, scrub=scrub)
        expected = [reference.keep(row, layout, mask, scrub) for row in rows]
        assert [row.tobytes() for row in areas] == [row for row, _ in expected]
        assert dropped.tolist() == [drop for _, drop in expected]


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("size", [1023, 1024, 1063, 1087, 1088])
def test_keep_where_the_area_ends_within_a_kept_component(size):
    """APX lies where MPX does: as long as it does not fit, dropped MPX is wiped all the same."""
    layout = PRESETS["intel"]
    mpx, apx = layout.by_nr[3], layout.by_nr[19]
    assert mpx.offset + mpx.size == 1024
    assert (apx.offset, apx.offset + apx.size) == (960, 1088)
    areas = np.full((40, size), 7, np.uint8)
    areas[:, 512:576] = 0
    areas[:, [512, 514]] = (0xF, 0x8)
    expected, dropped = reference.keep(areas[0].tobytes(), layout, 0x80007, True)
    assert area.keep(areas, layout, 0x80007).tolist() == [dropped] * 40
    assert [row.tobytes() for row in areas] == [expected] * 40
    assert any(expected[960:1024]) == (size in (1023, 1088))


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("to", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize(("layout", "size", "compacted"), CASES, ids=IDS)
def test_relayout(layout, size, compacted, to):
    rng = np.random.default_rng(size)
    areas = random_areas(rng, layout, 30, size, compacted)
    for out_size in (576, 2696, 4096, 11008, 1001):
        xcomp = int(rng.choice(MASKS)) & to.mask
        xcomp = COMPACTED | xcomp if xcomp and out_size % 3 else 0
        mask = int(rng.choice(MASKS)) | 0x207
        backing = area.empty(30, 12288).reshape(-1)
        backing[:] = 0xEE
        for stride in (out_size, -(-out_size // 64) * 64):
            out = np.lib.stride_tricks.as_strided(backing, (30, out_size), (stride, 1))
            area.relayout(
                areas, layout, to, mask=mask, xcomp_bv=xcomp or None, out=out, mxcsr_mask=0xFFFF,
                software=0x2E7, lossy=True,
            )  # fmt: skip
            for row, got in zip(areas, out, strict=True):
                expected, _ = reference.relayout(
                    row.tobytes(), layout, to, out_size, mask=mask, xcomp=xcomp,
                    mxcsr_mask=0xFFFF, software=0x2E7,
                )  # fmt: skip
                assert got.tobytes() == expected
            end = stride * 29 + out_size
            assert (backing[end : end + 4096] == 0xEE).all()


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize(("layout", "size", "compacted"), CASES, ids=IDS)
def test_ragged_compact(layout, size, compacted):
    rng = np.random.default_rng(size)
    areas = random_areas(rng, layout, 30, size, compacted)
    out = area.empty(30, 12288)
    out[:] = 0xEE
    area.relayout(areas, layout, layout, xcomp_bv=0, out=out, lossy=True)
    for row, got in zip(areas, out, strict=True):
        bv, _ = reference.header(got.tobytes())
        expected, _ = reference.relayout(
            row.tobytes(), layout, layout, 12288, xcomp=COMPACTED | bv, mask=bv
        )
        reach = -(-layout.compacted_size(bv) // 64) * 64
        assert got[:reach].tobytes() == expected[:reach]
        assert (got[reach:] == 0xEE).all()
        come = reference.header(row.tobytes())[0] & layout.mask
        found = reference.offsets(layout, reference.header(row.tobytes())[1], size)
        assert bv == come & (3 | sum(1 << nr for nr in found))


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("pkru", [None, 0x55555554, 0])
@pytest.mark.parametrize(("layout", "size", "compacted"), CASES, ids=IDS)
def test_get_uabi(layout, size, compacted, pkru):
    rng = np.random.default_rng(size)
    areas = random_areas(rng, layout, 30, size, compacted)
    mask = 0x2E7 & layout.user_mask
    areas = areas[
        [not reference.movable(r.tobytes(), layout, layout, mask, 0, 4096)[1] for r in areas]
    ]
    got = area.get_uabi(areas, layout, mask=mask, features=0xE7, mxcsr_mask=0x2FFFF, pkru=pkru)
    for row, out in zip(areas, got, strict=True):
        expected, lost = reference.relayout(
            row.tobytes(), layout, layout, max(4096, layout.standard_size()), mask=mask,
            mxcsr_mask=0x2FFFF, software=0xE7, kernel=True, pkru=pkru,
        )  # fmt: skip
        assert not lost
        assert out.tobytes() == expected


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("into_layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize(("layout", "size", "compacted"), CASES, ids=IDS)
def test_set_uabi(layout, size, compacted, into_layout):
    rng = np.random.default_rng(size)
    areas = random_areas(rng, layout, 40, size, compacted)
    into = random_areas(rng, into_layout, 40, 4096, True)
    images = [row.tobytes() for row in into]
    status = area.set_uabi(
        areas, layout, into, into_layout=into_layout, user_xfeatures=0xE02FF, mxcsr_mask=0x1FFFF
    )
    expected = [
        reference.set_uabi(
            row.tobytes(), layout, image, into_layout, 0xE02FF, 0x1FFFF, SUPERVISOR_MASK
        )
        for row, image in zip(areas, images, strict=True)
    ]
    assert status.tolist() == [code for code, _ in expected]
    assert [row.tobytes() for row in into] == [image for _, image in expected]


def like(rng, row):
    """Another area with the same header: other data, MXCSR and reserved bytes good or bad."""
    other = rng.integers(1, 256, row.size, np.uint8)
    other[512:576] = row[512:576]
    other[24:28] = rng.choice([row[24:28], np.frombuffer(b"\xff\xff\x02\0", np.uint8)])
    if row[528:576].any():
        other[528:576] = 0
    elif rng.random() < 0.2:
        other[528 + rng.integers(48)] = 1
    return other


@pytest.mark.parametrize("to", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize(("layout", "size", "compacted"), CASES, ids=IDS)
def test_one_area_after_others_like_it(layout, size, compacted, to):
    """The plan of the area before is followed again, in another way."""
    rng = np.random.default_rng(size)
    for out_size in (576, 1001, 2696, 2752, 4096, 11008):
        xcomp = int(rng.choice(MASKS)) & to.mask
        mask = int(rng.choice(MASKS) | rng.choice([0x207, 0x7FFFFFFF]))
        options = {"mxcsr_mask": 0xFFFF, "software": 0x2E7, "mask": mask}
        xcomp = COMPACTED | xcomp if xcomp and out_size % 3 else 0
        how = area.converter(layout, to, xcomp_bv=xcomp or None, **options)
        for first in random_areas(rng, layout, 12, size, compacted):
            for row in (first, like(rng, first), like(rng, first)):
                out = np.full(out_size + 64, 0xEE, np.uint8)
                lost = how.convert(row, out[:out_size])
                expected = reference.relayout(
                    row.tobytes(), layout, to, out_size, xcomp=xcomp, **options
                )
                assert (out[:out_size].tobytes(), lost) == expected
                assert (out[out_size:] == 0xEE).all()


@pytest.mark.parametrize("into_layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize(("layout", "size", "compacted"), CASES, ids=IDS)
def test_set_uabi_of_one_area_after_others_like_it(layout, size, compacted, into_layout):
    rng = np.random.default_rng(size)
    valid = {"user_xfeatures": 0xE02FF, "mxcsr_mask": 0x1FFFF}
    for into_size in (576, 1001, 2752, 4096):
        how = area.merger(layout, into_layout, **valid)
        rows = random_areas(rng, layout, 16, size, compacted)
        images = random_areas(rng, into_layout, 16, into_size, True)
        for first, image in zip(rows, images, strict=True):
            for row in (first, like(rng, first), like(rng, first)):
                into = like(rng, image)
                expected = reference.set_uabi(
                    row.tobytes(), layout, into, into_layout, *valid.values(), SUPERVISOR_MASK
                )
                assert how.merge(row, into) == expected[0]
                assert into.tobytes() == expected[1]


@pytest.mark.parametrize("layout", [PRESETS["intel"], ODD], ids=lambda layout: layout.name)
@pytest.mark.parametrize("into_layout", LAYOUTS, ids=lambda layout: layout.name)
def test_merging_one_area_without_questions(into_layout, layout):
    rng = np.random.default_rng(3)
    for mask in (*MASKS, 0x7FFFFFFF):
        how = area.merger(layout, into_layout, mask=mask, mxcsr=bool(mask & 2))
        for first in random_areas(rng, layout, 6, 4096, True):
            for row in (first, like(rng, first)):
                (into,) = random_areas(np.random.default_rng(4), into_layout, 1, 2752, True)
                expected, lost = reference.merge(
                    row.tobytes(), layout, into, into_layout, mask, mask & 2
                )
                assert how.merge(row, into) == (5 if lost else 0)
                assert into.tobytes() == expected


@pytest.mark.usefixtures("streamed")
def test_swap():
    rng = np.random.default_rng(1)
    layout = PRESETS["intel"]
    for save_mask, restore_mask in ((0x2E7, 0xE7), (7, 0x2E7), (0x200, 1), (0, 0)):
        live = random_areas(rng, layout, 40, 4096, False)
        leave = random_areas(rng, layout, 40, 4096, False)
        enter = random_areas(rng, layout, 40, 2752, False)
        rows = [[r.tobytes() for r in areas] for areas in (live, leave, enter)]
        enough = [not reference.header(r)[0] & restore_mask & 0x60000 for r in rows[2]]
        assert all(enough)
        area.swap(live, leave, enter, layout, save_mask=save_mask, restore_mask=restore_mask)
        for i, (regs, out, load) in enumerate(zip(*rows, strict=True)):
            left, _ = reference.merge(regs, layout, out, layout, save_mask, save_mask & 6)
            after, _ = reference.merge(load, layout, regs, layout, restore_mask, restore_mask & 6)
            assert leave[i].tobytes() == left
            assert live[i].tobytes() == after


@pytest.mark.skipif("XFAST_ISA" in os.environ, reason="this is the run for one instruction set")
@pytest.mark.parametrize("isa", available())
def test_other_instruction_sets(isa):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "XFAST_ISA": isa},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert run.returncode == 0, run.stdout[-2000:]


def test_an_instruction_set_that_is_not_there():
    run = subprocess.run(
        [sys.executable, "-c", "import xfast._core"],
        env={**os.environ, "XFAST_ISA": "avx10"},
        capture_output=True,
        text=True,
    )
    assert "XFAST_ISA: expected one of plain" in run.stderr
    assert "got 'avx10'" in run.stderr
