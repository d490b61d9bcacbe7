"""The Python face of the engine: what goes in, what comes out, and what survives a round trip."""

import mmap

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from xfast.xsave import area
from xfast.xsave.features import bits
from xfast.xsave.layout import PRESETS

INTEL, ZEN4 = PRESETS["intel"], PRESETS["amd-zen4"]
COMMON = 0x2E7


def make(bv, seed=0, size=2752):
    """One standard-format Intel area: random data in `bv`, poison elsewhere."""
    rng = np.random.default_rng(seed)
    row = np.full(size, 0xA5, np.uint8)
    data = rng.integers(1, 256, size, np.uint8)
    spans = {0: [(0, 24), (32, 160)], 1: [(160, 416)]}
    for nr in bits(bv):
        slot = INTEL.by_nr.get(nr)
        for start, end in spans.get(nr) or [(slot.offset, slot.offset + slot.size)]:
            row[start:end] = data[start:end]
    row[24:32] = np.array([0x1FA0, 0xFFFF], "<u4").view(np.uint8)
    row[512:576] = 0
    row[512:520] = np.array([bv], "<u8").view(np.uint8)
    return row


masks = st.integers(0, 0x3FF).map(lambda bv: bv & COMMON)


@settings(max_examples=200)
@given(bv=masks, seed=st.integers(0, 99))
def test_round_trips_change_no_value(bv, seed):
    one = make(bv, seed)
    packed = area.compact(one, INTEL)
    assert reference.header(packed.tobytes()) == (bv, bv | 1 << 63)
    roomy = area.compact(packed, INTEL, xcomp_bv=COMMON)
    there = area.relayout(roomy, INTEL, ZEN4)
    back = area.relayout(there, ZEN4, INTEL, size=2752)
    lost_mxcsr = 2 if bv & 6 == 4 else 0  # a compacted area keeps MXCSR with SSE only
    assert area.diff(one, back, INTEL) & ~lost_mxcsr == 0
    assert area.headers(back).xstate_bv == bv
    assert area.classify(back, INTEL).stale == 0


@settings(max_examples=100)
@given(bv=masks, mask=masks, seed=st.integers(0, 99))
def test_nothing_of_a_clear_component_is_copied(bv, mask, seed):
    out = area.relayout(make(bv, seed), INTEL, INTEL, mask=mask, size=4096)
    assert area.headers(out).xstate_bv == bv & mask
    assert area.classify(out, INTEL).stale == 0
    assert not (out[416:464] != 0).any()


@settings(max_examples=100)
@given(bv=masks, kept=masks)
def test_keeping_is_relayout_in_place(bv, kept):
    one, two = make(bv), make(bv)
    assert area.keep(one, INTEL, kept) == bv & ~kept
    fresh = area.relayout(two, INTEL, INTEL, mask=kept)
    assert area.diff(one, fresh, INTEL) == 0


def test_words_for_components():
    row = make(0x287)
    row[160:416] = 0
    row[24:28] = (0x80, 0x1F, 0, 0)
    row[2688:2692] = np.array([0x55555554], "<u4").view(np.uint8)
    classes = area.classify(row[:2700], INTEL)
    states = {nr: classes.state(nr) for nr in (0, 1, 2, 5, 7, 9)}
    assert states == {0: "live", 1: "init", 2: "live", 5: "absent", 7: "live", 9: "default"}
    assert area.classify(row[:2000], INTEL).state(7) == "unknown"
    assert classes.live == 0x85
    assert classes.stale == 0x80078


def test_any_buffer_will_do():
    row = make(0x207)
    wide = np.zeros((3, 8192), np.uint8)
    wide[:, :2752] = row
    mapped = mmap.mmap(-1, 4096)
    mapped[:2752] = row.tobytes()
    expected = area.headers(row)
    for one in (bytes(row), bytearray(row), memoryview(row.tobytes()), mapped, wide[1]):
        assert area.headers(one) == expected
    for many in (wide, wide[:, :2752], wide[::-1, 0:4096], wide[::2]):
        assert area.headers(many).xstate_bv.tolist() == [0x207] * len(many)
        assert area.audit(many, 0x207, 0xFFFF).tolist() == [0] * len(many)


def test_a_single_area_gives_scalars():
    row = make(0x7)
    assert area.audit(row, 0x3, 0xFFFF) == area.Audit.XSTATE_BV
    assert area.audit(row, 0x7, 0x1F80) == area.Audit.MXCSR
    row[528], row[520] = 1, 1
    assert area.audit(row, 0x7, 0xFFFF) == area.Audit.RESERVED | area.Audit.XCOMP_BV
    assert area.xinuse(row, INTEL, early=True) == 7
    assert area.relayout(row, INTEL, INTEL).shape == (832,)
    image = make(0x2E7, 1)
    before = image.tobytes()
    fault = area.set_uabi(row, INTEL, image, user_xfeatures=0x7, mxcsr_mask=0xFFFF)
    assert fault == area.UabiFault.XCOMP_BV
    assert image.tobytes() == before


def test_set_uabi_keeps_supervisor_states():
    image = area.compact(make(0x2E7), INTEL, xcomp_bv=0x1AE7, size=4096)
    offset = INTEL.compacted_offsets(0x1AE7)[11]
    image[offset : offset + 16] = 0x77
    image[513] |= 0x08
    status = area.set_uabi(make(0x5, 3), INTEL, image, user_xfeatures=0x2E7, mxcsr_mask=0xFFFF)
    assert status == area.UabiFault.OK
    assert area.headers(image).xstate_bv == 0x805
    assert (image[offset : offset + 16] == 0x77).all()


def test_a_component_without_storage_is_a_fault():
    image = area.compact(make(0x7), INTEL, xcomp_bv=0x7, size=4096)
    before = image.tobytes()
    fault = area.set_uabi(make(0x2E7), INTEL, image, user_xfeatures=0x2E7, mxcsr_mask=0xFFFF)
    assert fault == area.UabiFault.STORAGE
    assert image.tobytes() == before


@pytest.mark.parametrize("value", [0, 0x55555554, 0xFFFFFFFF])
def test_get_uabi_writes_the_vcpus_pkru(value):
    rows = np.stack([make(0x207), make(0x7)])
    out = area.get_uabi(rows, INTEL, mask=0x207, pkru=np.array([value, 1], "u4"))
    assert out[:, 2688:2696].copy().view("<u8")[:, 0].tolist() == [value, 0]
    assert area.headers(out).xstate_bv.tolist() == [0x207, 0x7]


def test_results_are_as_long_as_their_components_need():
    """AVX data came out as rows of 11,008 bytes, since the layout knows AMX."""
    rows = np.stack([make(0x3), make(0x7), make(0x23)])
    assert area.relayout(rows, INTEL, INTEL).shape == (3, 1152)
    assert area.relayout(rows[:2], INTEL, INTEL).shape == (2, 832)
    assert area.relayout(rows, INTEL, INTEL, mask=3).shape == (3, 576)
    assert area.relayout(rows, INTEL, ZEN4).shape == (3, ZEN4.standard_size(0x27))
    assert area.compact(rows, INTEL).shape == (3, 576 + 256 + 64)
    assert area.compact(rows[:1], INTEL).shape == (1, 576)
    assert area.compact(rows, INTEL, xcomp_bv=0x2E7).shape == (3, INTEL.compacted_size(0x2E7))
    assert area.relayout(rows, INTEL, INTEL, size=4096).shape == (3, 4096)
