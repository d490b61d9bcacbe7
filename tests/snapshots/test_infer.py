"""A layout that was found once is found again where a look would find the same, and only there."""

import random
import struct

import numpy as np
import pytest
import snapshot_files as files

from xfast.snapshots import infer
from xfast.xsave.area import facts as facts_of
from xfast.xsave.cpuid import Cpuid
from xfast.xsave.features import MXCSR_MASK_AMD, MXCSR_MASK_INTEL
from xfast.xsave.layout import PRESETS

VENDORS = b"GenuntelineI", b"AuthcAMDenti", b"unknnownwn  "
CPUIDS = [
    Cpuid.from_rows({(0, 0): (0xD, *struct.unpack("<3I", vendor)), **rows})
    for vendor in VENDORS
    for rows in ({}, {(0xD, 0): (7, 832, 832, 0), (0xD, 2): (256, 576, 0, 0)})
]
BVS = (3, 7, 0x207, 0xE7, 0x2E7, 0x200, 0x602E7, 1 << 62 | 7, 0x1F, 1 << 40, 0)


@pytest.fixture(autouse=True)
def nothing_seen():
    infer.forget()
    yield
    infer.forget()


def looked(area, cpuid, mask):
    """Return what an area's layout is by itself, with nothing remembered."""
    infer.forget()
    return infer.place(area, cpuid=cpuid, mask=mask)


def areas(rng):
    """Return areas that differ in nothing but a few bytes of components, and in their size."""
    bounds = np.frombuffer(infer.PIECES, np.int32).tolist()
    control = rng.choice((0, 0, MXCSR_MASK_INTEL, MXCSR_MASK_AMD))
    software, xcomp_bv = rng.choice((0, 0, 0x2E7, 0x207)), rng.choice((0, 0, 0, 1 << 63 | 7))
    bvs = rng.choice(BVS), rng.choice((0x207, 0xE7, 0x2E7))
    found = []
    for _ in range(60):
        size = rng.choice((832, 2440, 2696, 4096, 11008))
        area = np.frombuffer(files.area(0, 11008, rng.choice(bvs)), np.uint8)[:size].copy()
        struct.pack_into("<I", area, 28, control)
        struct.pack_into("<Q", area, 464, software)
        struct.pack_into("<Q", area, 520, xcomp_bv)
        area[576:] = 0
        for _ in range(rng.choice((0, 1, 1, 2))):
            place = rng.choice(bounds) + rng.choice((-1, 0, 1))
            if 576 <= place < size:
                area[place] = rng.randrange(1, 256)
        found.append(area)
    return found


@pytest.mark.parametrize("seed", range(80))
def test_what_was_seen_is_what_a_look_finds(seed):
    rng = random.Random(f"seen {seed}")
    found = areas(rng)
    cpuid = rng.choice((None, None, *CPUIDS))
    mask = rng.choice((0, 7, 0x207, 0xE7))
    wanted = [looked(area, cpuid, mask) for area in found]
    infer.forget()
    numbers = {}
    for _ in range(2):
        for area, place in zip(found, wanted, strict=True):
            data = b"xy" + area.tobytes()
            seen, facts = infer.seen(data, 2, area.size, cpuid=cpuid, mask=mask)
            assert facts == facts_of(area, place.layout or infer.NOWHERE).tobytes()
            assert seen.place == place
            assert (seen.place.layout and seen.place.layout.name) == (
                place.layout and place.layout.name
            )
            assert numbers.setdefault(seen.number, seen) is seen
            assert seen.xstate_bv == infer.header(area)[0]
            assert seen.headed == (infer.headed(area) and seen.xstate_bv != 0)
    assert len(numbers) <= len(found)


def test_the_user_s_word_is_what_is_seen():
    data = files.area(1, 4096, 7)
    one, two = (infer.seen(data, 0, 4096, PRESETS[name])[0] for name in ("intel", "amd-zen3"))
    assert one.place == infer.Place(PRESETS["intel"], "given")
    assert two.place == infer.Place(PRESETS["amd-zen3"], "given")
    assert one.number != two.number
    assert infer.seen(data, 0, 4096, PRESETS["intel"])[0] is one


def test_a_number_is_never_given_again():
    """What a full cache forgets is numbered anew: an old key stands for what it stood for."""
    numbers = set()
    for _ in range(3):
        infer.forget()
        for bv in BVS:
            numbers.add(infer.seen(files.area(1, 4096, bv), 0, 4096)[0].number)
    assert len(numbers) == 3 * len(BVS)
