"""Not one byte outside the rows: guard pages, sanitizers (make san), and bad arguments."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_areas import LAYOUTS, ODD, available, random_areas

from xfast import _core
from xfast.errors import LayoutError
from xfast.xsave import area
from xfast.xsave.layout import PRESETS, Layout

ROOT = Path(__file__).parents[2]
INTEL = PRESETS["intel"]
PAGE = mmap.PAGESIZE
SIZES = (576, 577, 832, 840, 1001, 2440, 2696, 2752, 4096)

libc = ctypes.CDLL(None, use_errno=True)


def between_guards(n, size, at_end):
    """`n` packed rows that end, or begin, at a page that may not be touched."""
    pages = -(-n * size // PAGE)
    block = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(block))
    for guard in (start, start + (pages + 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) == 0
    first = PAGE + (pages * PAGE - n * size if at_end else 0)
    return np.frombuffer(block, np.uint8)[first : first + n * size].reshape(n, size)


def on_the_heap(n, size, _):
    """`n` packed rows in a block of their own, which a sanitizer watches."""
    return np.empty(n * size, np.uint8).reshape(n, size)


def one_after_another(layout, areas, out):
    """Convert and merge the first and the last area, and again with the plan that is there."""
    convert = area.converter(layout, layout).convert
    merge = area.merger(layout, layout, user_xfeatures=0x2E7, mxcsr_mask=0xFFFF).merge
    for i in (0, 0, -1, -1):
        convert(areas[i], out[i])
        merge(areas[i], out[i])


def every_operation(allocate):
    """Run each operation on rows of every size, at both ends of what they may touch."""
    rng = np.random.default_rng(7)
    for layout in LAYOUTS:
        for size in SIZES:
            for at_end in (False, True):
                areas, other = allocate(7, size, at_end), allocate(7, size, at_end)
                areas[:] = random_areas(rng, layout, 7, size, True)
                other[:] = areas
                area.headers(areas)
                area.classify(areas, layout)
                area.audit(areas, 7, 0xFFFF)
                area.xinuse(areas, layout)
                area.xinuse(areas, layout, early=True)
                area.diff(areas, other, layout)
                for out_size in (576, 840, 2696):
                    out = allocate(7, out_size, at_end)
                    area.relayout(areas, layout, layout, out=out, lossy=True)
                    area.relayout(areas, layout, layout, xcomp_bv=0, out=out, lossy=True)
                    area.relayout(
                        areas, layout, layout, xcomp_bv=7 & layout.mask, out=out, lossy=True
                    )
                    area.set_uabi(areas, layout, out, user_xfeatures=0x2E7, mxcsr_mask=0xFFFF)
                    one_after_another(layout, areas, out)
                area.keep(areas, layout, 3)


@pytest.mark.parametrize(("stream_above", "whole_rows"), [(0, False), (0, True), (16 << 20, False)])
def test_guard_pages(stream_above, whole_rows):
    area.tune(stream_above=stream_above, whole_rows=whole_rows)
    try:
        every_operation(between_guards)
    finally:
        area.tune(stream_above=16 << 20, whole_rows="measure")


@pytest.mark.skipif("XFAST_ISA" in os.environ, reason="this is the run for one instruction set")
@pytest.mark.parametrize("isa", available())
def test_guard_pages_with_other_instruction_sets(isa):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "guard"],
        env={**os.environ, "XFAST_ISA": isa},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:]


@pytest.mark.skipif("XFAST_SANITIZED" not in os.environ, reason="make san runs this")
def test_sanitizers_find_nothing():
    """Each row in a block of its own; a report ends the process."""
    assert "build/san" in _core.__file__
    for stream_above, whole_rows in ((0, False), (0, True), (16 << 20, False)):
        area.tune(stream_above=stream_above, whole_rows=whole_rows)
        every_operation(on_the_heap)
    area.tune(stream_above=16 << 20, whole_rows="measure")


# --- bad arguments --------------------------------------------------------------------------


GOOD = np.zeros((4, 2752), np.uint8)


def read_only():
    out = GOOD.copy()
    out.flags.writeable = False
    return out


BAD = [
    (np.zeros((4, 2752), np.int8), "areas: expected dtype uint8, got int8"),
    (np.zeros((4, 2752), np.uint16), "areas: expected dtype uint8, got uint16"),
    (np.zeros((2, 2, 2752), np.uint8), "areas: expected (n, size) or (size,), got 3 dimensions"),
    (np.zeros((4, 575), np.uint8), "areas: expected rows of 576 bytes or more, got 575"),
    (
        np.zeros((4, 5504), np.uint8)[:, ::2],
        "areas: expected a byte stride of 1 inside a row, got 2",
    ),
    (np.zeros((2752, 4), np.uint8).T, "areas: expected a byte stride of 1 inside a row, got 4"),
    ("text", "areas: expected areas, got str"),
    (None, "areas: expected areas, got NoneType"),
    (b"", "areas: expected rows of 576 bytes or more, got 0"),
]


@pytest.mark.parametrize(("areas", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_areas(areas, words):
    for call in (
        area.headers,
        lambda a: area.classify(a, INTEL),
        lambda a: area.audit(a, 7, 0xFFFF),
        lambda a: area.xinuse(a, INTEL),
        lambda a: area.keep(a, INTEL, 7),
        lambda a: area.diff(a, a, INTEL).sum(),
        lambda a: area.relayout(a, INTEL, INTEL),
        lambda a: area.get_uabi(a, INTEL, mask=7),
    ):
        with pytest.raises(ValueError, match="got ") as caught:
            call(areas)
        message = str(caught.value)
        assert words in message or words.partition(":")[2] in message


def test_bad_targets():
    short = np.zeros((4, 500), np.uint8)
    for out, words in (
        (read_only(), "out: expected a writable array, got a read-only one"),
        (np.zeros((3, 2752), np.uint8), "out: expected 4 areas.*, got 3"),
        (short, "out: expected rows of 576 bytes or more, got 500"),
        (np.lib.stride_tricks.as_strided(GOOD.copy(), (4, 2752), (64, 1)), "rows may not overlap"),
        (GOOD, "out: expected memory of its own, got memory that src uses too"),
        (GOOD[::-1], "out: expected memory of its own, got memory that src uses too"),
        (np.zeros((4, 2752), np.uint16), "out: expected dtype uint8, got uint16"),
    ):
        before = out.tobytes()
        with pytest.raises(ValueError, match=words):
            area.relayout(GOOD, INTEL, INTEL, out=out)
        assert out.tobytes() == before
    with pytest.raises(ValueError, match=r"into: expected 4 areas.*, got 3"):
        area.set_uabi(GOOD, INTEL, GOOD[:3].copy(), user_xfeatures=7, mxcsr_mask=0)
    with pytest.raises(ValueError, match=r"into: expected .* own, got memory that src uses too"):
        area.set_uabi(GOOD, INTEL, GOOD, user_xfeatures=7, mxcsr_mask=0)
    with pytest.raises(ValueError, match=r"two: expected 4 areas.*, got 2"):
        area.diff(GOOD, GOOD[:2], INTEL)
    with pytest.raises(ValueError, match="areas: expected a writable array, got a read-only one"):
        area.keep(bytes(2752), INTEL, 7)
    with pytest.raises(ValueError, match=r"foreign_pkru: expected .*, got compacted ones"):
        area.converter(INTEL, INTEL, xcomp_bv=0x207, foreign_pkru=True)


def test_areas_that_plans_do_not_reach():
    huge = np.empty((1, 1 << 30), np.uint8)  # of which only the header is touched
    huge[0, 512:576] = 0
    with pytest.raises(ValueError, match=r"out: expected areas of less than .*, got 1073741824"):
        area.relayout(GOOD[:1], INTEL, INTEL, out=huge)
    with pytest.raises(ValueError, match=r"into: expected areas of less than .*, got 1073741824"):
        area.set_uabi(huge, INTEL, GOOD[:1].copy(), user_xfeatures=7, mxcsr_mask=0)


def test_no_areas_touch_nothing():
    """An empty slice still points at its array; the plan for what lies there may be at hand."""
    src = GOOD.copy()
    src[:, 512] = 7
    for call in (area.converter(INTEL, INTEL).convert, area.merger(INTEL, INTEL).merge):
        out = GOOD.copy()
        call(src[0], out[0])
        out[:, :512] = 0xEE
        before = out.tobytes()
        call(src[:0], out[:0])
        assert out.tobytes() == before


@pytest.mark.parametrize("areas", [np.zeros((0, 2752), np.uint8), GOOD[:0]], ids=["new", "slice"])
def test_empty_batches_give_empty_results(areas):
    assert [column.tolist() for column in area.headers(areas)] == [[]] * 4
    assert [column.tolist() for column in area.classify(areas, INTEL)] == [[]] * 5
    assert area.audit(areas, 7, 0xFFFF).tolist() == []
    assert (
        area.xinuse(areas, INTEL).tolist() == area.xinuse(areas, INTEL, early=True).tolist() == []
    )
    assert area.diff(areas, areas, INTEL).tolist() == []
    assert area.keep(areas, INTEL, 7).tolist() == []
    into = np.zeros((0, 4096), np.uint8)
    assert area.set_uabi(areas, INTEL, into, user_xfeatures=7, mxcsr_mask=0).tolist() == []
    assert area.relayout(areas, INTEL, INTEL).shape == (0, 576)
    assert area.compact(areas, INTEL).shape == (0, 576)
    assert area.get_uabi(areas, INTEL, mask=7, pkru=1).shape == (0, 11008)
    assert area.relayout(areas, INTEL, INTEL, out=into) is into
    area.swap(areas, areas, areas, INTEL, save_mask=7, restore_mask=7)
    assert [part.tolist() for part in area.group(areas, INTEL)] == [[], []]


def test_bad_numbers():
    for mask in (-1, 1 << 63, 1 << 70):
        with pytest.raises(ValueError, match=r"mask: expected bits 0 to 62 only, got"):
            area.relayout(GOOD, INTEL, INTEL, mask=mask)
    with pytest.raises(
        LayoutError, match=r"xcomp_bv: expected components of layout intel .*, got 0x"
    ):
        area.relayout(GOOD, INTEL, INTEL, xcomp_bv=1 << 40)
    with pytest.raises(ValueError, match="expected n >= 0 and size >= 576"):
        area.empty(1, 64)
    with pytest.raises((ValueError, MemoryError, OverflowError)):
        area.empty(1 << 60, 4096)
    unaligned = np.zeros(2752, np.uint8)
    moved = Layout((*ODD.slots[:3], ODD.slots[3]._replace(offset=1100)))
    with pytest.raises(ValueError, match="target: expected PKRU at a multiple of 8, got 1100"):
        area.get_uabi(unaligned, moved, mask=0x200, pkru=1)


def test_lost_components_are_named():
    areas = GOOD.copy()
    areas[2, 512:514] = (0x07, 0x02)
    with pytest.raises(LayoutError, match=r"areas\[2\]: components 9 can't be brought"):
        area.relayout(areas, INTEL, INTEL, size=1000)
