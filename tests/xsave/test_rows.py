"""Memory for areas, and threads over them."""

import os
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from xfast import _core
from xfast.engine import memory
from xfast.xsave import area, rows
from xfast.xsave.layout import PRESETS

INTEL = PRESETS["intel"]


def address(array):
    return array.__array_interface__["data"][0]


@pytest.mark.parametrize(
    ("n", "layout", "size"), [(1, 576, 576), (3, 4097, 4097), (2, INTEL, 11008)]
)
def test_rows_are_zero_and_on_pages_of_their_own(n, layout, size):
    areas = area.empty(n, layout)
    assert areas.shape == (n, size)
    assert not areas.any()
    assert all(address(row) % 4096 == 0 for row in areas)
    assert areas.strides[0] % 4096 == 0


def test_batches_are_aligned_to_huge_pages():
    assert address(area.empty(1024, 4096)) % (2 << 20) == 0


def test_no_areas_is_an_empty_batch():
    areas = area.empty(0, 4096)
    assert areas.shape == (0, 4096)
    assert area.get_uabi(areas, INTEL, mask=7).shape == (0, 11008)
    assert area.audit(areas, 7, 0).tolist() == []


def test_memory_is_used_again_and_zero_again():
    first = area.empty(1000, 4096)
    first[:] = 7
    start = address(first)
    view = first[10:20]
    del first
    assert address(area.empty(1000, 4096)) != start  # the view holds it
    del view
    again = area.empty(1000, 4096)
    assert address(again) == start
    assert not again.any()
    again[:] = 9
    del again
    assert area.empty(1000, 4096, zero=False)[0, 0] == 9


def test_pool_gives_back_what_it_may_not_keep():
    area.tune(pool_limit=0)
    try:
        first = area.empty(1000, 4096)
        first[:] = 7
        del first
        assert area.empty(1000, 4096, zero=False)[0, 0] == 0
        for _ in range(100):
            area.empty(1, 4096)
    finally:
        area.tune(pool_limit=512 << 20)


def test_pool_keeps_few_blocks():
    held = [area.empty(1, 576 + 4096 * i) for i in range(100)]
    del held
    assert area.empty(1, 4096)[0, 0] == 0


def test_threads_that_let_go_at_once_stay_within_the_pool():
    """Where no GIL orders them, one trimmed and another then wrote beyond the pool's end."""
    area.tune(pool_limit=16 << 20)

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(300):
            held = [area.empty(1, 576 + 4096 * int(i)) for i in rng.integers(0, 90, 4)]
            held[0][:] = seed
            del held
            blocks, size = memory.pool_state()
            assert blocks <= 32
            assert size <= 16 << 20

    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        area.tune(pool_limit=0)
        assert memory.pool_state() == (0, 0)
    finally:
        area.tune(pool_limit=512 << 20)


@pytest.fixture
def threaded():
    area.tune(thread_above=1, threads=3)
    yield
    area.tune(thread_above=32 << 20, threads=rows.DEFAULT_THREADS)


def sample(n=101):
    areas = area.empty(n, 4096)
    rng = np.random.default_rng(3)
    areas[:] = rng.integers(0, 256, areas.shape)
    areas[:, 512:576] = 0
    areas[:, 512] = rng.integers(0, 8, n)
    areas[:, 24:28] = (0x80, 0x1F, 0, 0)
    return areas


def results(areas):
    images = area.empty(len(areas), 4096)
    trimmed = areas.copy()
    return [
        area.get_uabi(areas, INTEL, mask=7, size=4096, pkru=5).tobytes(),
        area.set_uabi(areas, INTEL, images, user_xfeatures=6, mxcsr_mask=0xFFFF).tobytes(),
        images.tobytes(),
        area.audit(areas, 3, 0xFFFF).tobytes(),
        area.xinuse(areas, INTEL).tobytes(),
        area.diff(areas, areas[::-1], INTEL).tobytes(),
        area.keep(trimmed, INTEL, 1).tobytes(),
        trimmed.tobytes(),
    ]


def test_threads_give_the_same_results(threaded):
    areas = sample()
    many = results(areas)
    area.tune(threads=1)
    assert results(areas) == many


def test_what_a_thread_raises_reaches_the_caller(threaded):
    def fail(part):
        if part[0]:
            raise KeyError(part[0])
        return 0

    others = threading.active_count()
    with pytest.raises(KeyError):
        rows.spread(9 * 4096, fail, np.arange(9))
    assert threading.active_count() == others


def test_one_converter_serves_many_threads():
    areas = sample(2000)
    how = area.converter(INTEL, INTEL, mask=7).convert
    expected = area.relayout(areas, INTEL, INTEL, mask=7, size=4096)
    outs = [area.empty(2000, 4096) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda out=out: [how(areas, out) for _ in range(20)])
        for out in outs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((out == expected).all() for out in outs)


def test_threads_share_plans_and_memory_one_area_at_a_time():
    areas = sample(400)
    how = area.converter(INTEL, INTEL, mask=7).convert
    expected = area.relayout(areas, INTEL, INTEL, mask=7, size=4096)

    def work(_):
        for one, wanted in zip(areas, expected, strict=True):
            out = area.empty(1, 4096, zero=False)[0]
            how(one, out)
            assert (out == wanted).all()
        return area.xinuse(expected, INTEL).tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(work, range(8))) == {area.xinuse(expected, INTEL).tobytes()}


def test_threads_that_read_the_same_areas_find_the_same():
    areas = sample(300)
    expected = results(areas)
    with ThreadPoolExecutor(4) as pool:
        assert all(found == expected for found in pool.map(results, [areas] * 12))


RACE = """
from concurrent.futures import ThreadPoolExecutor
from xfast.xsave import area
from xfast.xsave.layout import PRESETS

areas, out = area.empty(2000, 4096), area.empty(2000, 4096)
areas[:, 512] = 7
areas[:, :160] = 9
with ThreadPoolExecutor(2) as pool:
    for _ in range(20):
        pool.submit(area.converter(PRESETS["intel"], PRESETS["intel"], mask=7).convert, areas, out)
"""


@pytest.mark.skipif(os.environ.get("XFAST_SANITIZED") != "thread", reason="make san runs this")
def test_the_thread_sanitizer_would_see_a_race():
    """Two threads write the same rows, which nothing forbids a caller: it must be reported."""
    run = subprocess.run([sys.executable, "-c", RACE], capture_output=True, text=True)
    assert run.returncode == 66
    assert "WARNING: ThreadSanitizer: data race" in run.stderr


def test_many_headers_outlast_the_plans_that_are_kept():
    n = 5000
    areas = area.empty(n, 4096)
    masks = np.random.default_rng(5).integers(0, 1 << 62, n, dtype="u8")
    areas[:, 512:520] = masks.view(np.uint8).reshape(n, 8)
    areas[:, 576:1000] = 3
    how = area.converter(INTEL, INTEL, mask=area.ALL)
    for stream_above in (0, 1 << 40):
        area.tune(stream_above=stream_above)
        out = area.empty(n, 4096)
        lost = np.zeros(n, "u8")
        how.convert(areas, out, lost)
        fits = sum(1 << s.nr for s in INTEL.slots if s.offset and s.offset + s.size <= 4096) | 3
        mpx = masks & 0x18 != 0
        stored = masks & np.uint64(fits)
        stored[mpx] &= ~np.uint64(1 << 19)
        assert (out[:, 512:520].copy().view("u8")[:, 0] == stored).all()
        assert (lost == masks & ~stored).all()
    area.tune(stream_above=16 << 20)


def test_no_gil_where_there_is_none():
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("this interpreter has a GIL")
    assert _core.ISA
    assert not sys._is_gil_enabled()
