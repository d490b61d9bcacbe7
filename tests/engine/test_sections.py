"""Register sections described in one go: as building each area and describing it does."""

import random

import numpy as np
import pytest

from xfast.engine import files
from xfast.engine.sections import Sections
from xfast.xsave.area import facts, table_of
from xfast.xsave.features import PKRU, XFEATURE_MASK_FPSSE, XFEATURE_MASK_XTILE
from xfast.xsave.layout import preset

INTEL = preset("intel")
SIZE = INTEL.standard_size(PKRU)
RUNS = [(0, 2, 2, 0), (2, 8, 4, 24), (10, 64, 8, 160), (80, 4, 4, 2688), (84, 5, 1, 600)]
NUMBERS = [(90, 8), (98, 8), (106, 1), (107, 4), (-1, 0)]
HELD = 0x207
LENGTH = 111


def made(count, held=HELD):
    """Return Sections of sections that lie one behind the other."""
    shift = [at * LENGTH for at in range(count)]
    runs = [(a + s, n, u, to + i * SIZE) for i, s in enumerate(shift) for a, n, u, to in RUNS]
    numbers = [(a + s if a >= 0 else -1, n) for s in shift for a, n in NUMBERS]
    return Sections(
        np.empty((count, SIZE), np.uint8), table_of(INTEL), np.array(runs, np.int32),
        np.array(numbers, np.int32), np.full(count, held, np.uint64), XFEATURE_MASK_XTILE,
    )  # fmt: skip


def slow(data, count, kvm):
    """Return what `Sections.key` is to return, section by section."""
    numbers, found = [], []
    for i in range(count):
        one = data[i * LENGTH : (i + 1) * LENGTH]
        numbers.append([int.from_bytes(one[at : at + n], "big") if n else 0 for at, n in NUMBERS])
    if kvm < 0:
        kvm = int(any(row[1] for row in numbers))
    for i, (xcr0, xstate_bv, *_) in enumerate(numbers):
        if kvm and xstate_bv & ~HELD & XFEATURE_MASK_XTILE:
            return None, True
        area = np.zeros(SIZE, np.uint8)
        one = data[i * LENGTH : (i + 1) * LENGTH]
        files.swap_runs(one, np.array(RUNS, np.int32), area)
        header = xstate_bv if kvm else (xcr0 | XFEATURE_MASK_FPSSE) & HELD
        area[512:520] = np.frombuffer(header.to_bytes(8, "little"), np.uint8)
        found.append(facts(area, INTEL).tobytes())
    words = np.array(numbers, np.uint64).tobytes()
    return words + b"".join(found), bool(kvm)


@pytest.mark.parametrize("seed", range(60))
def test_sections_are_described_as_their_areas_are(seed):
    rng = random.Random(f"sections {seed}")
    count = rng.choice((1, 2, 5))
    sections = made(count)
    for _ in range(20):
        data = bytearray(count * LENGTH)
        for _ in range(rng.choice((0, 3, 40))):
            data[rng.randrange(len(data))] = rng.choice((1, 2, 3, 7, 0x80, 0xFF))
        if rng.random() < 0.5:
            for i in range(count):
                data[i * LENGTH + 98 : i * LENGTH + 106] = rng.choice(
                    (bytes(8), b"\0" * 7 + b"\7", b"\0" * 6 + b"\2\7", b"\0" * 5 + b"\6\0\3")
                )
        before, behind = rng.randbytes(rng.randrange(9)), rng.randbytes(rng.randrange(9))
        for kvm in (1, 0, -1):
            whole = before + bytes(data) + behind
            assert sections.key(whole, len(before), kvm) == slow(data, count, kvm)


def test_sections_that_are_not_all_there_have_no_key():
    sections = made(2)
    data = bytes(2 * LENGTH)
    assert sections.key(data, 0, 1)[0] is not None
    for first in (-1, 1, 2 * LENGTH, 1 << 40, -(1 << 40)):
        assert sections.key(data, first, 1) == (None, True)
    assert sections.key(b"", 0, 0) == (None, False)


@pytest.mark.parametrize(
    ("run", "number", "words"),
    [
        ((0, 8, 3, 0), (0, 8), "whole words"), ((0, 7, 2, 0), (0, 8), "whole words"),
        ((0, 0, 1, 0), (0, 8), "whole words"), ((-1, 8, 8, 0), (0, 8), "outside"),
        ((0, 8, 8, SIZE - 7), (0, 8), "outside"), ((0, 8, 8, -8), (0, 8), "outside"),
        ((0, 8, 8, 0), (0, 9), "number 0"), ((0, 8, 8, 0), (-2, 0), "number 0"),
        ((0, 8, 8, 0), (-1, 1), "number 0"), ((0, 8, 8, 0), (1, 0), "number 0"),
    ],
)  # fmt: skip
def test_places_that_cannot_be_are_refused(run, number, words):
    rows = np.empty((1, SIZE), np.uint8)
    numbers = np.array([number] * 5, np.int32)
    one = np.ones(1, np.uint64)
    with pytest.raises(ValueError, match=words):
        Sections(rows, table_of(INTEL), np.array([run], np.int32), numbers, one, 0)


def test_shapes_that_do_not_fit_are_refused():
    runs, numbers = np.zeros((0, 4), np.int32), np.array([(0, 8)] * 5, np.int32)
    one = np.ones(1, np.uint64)
    wide = np.empty((2, 2 * SIZE), np.uint8)
    for rows, some, held in (
        (np.empty((2, SIZE), np.uint8), numbers, one), (wide[:1, :SIZE], numbers[:4], one),
        (wide[:, :SIZE], np.concatenate([numbers] * 2), np.ones(2, np.uint64)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            Sections(rows, table_of(INTEL), runs, some, held, 0)
