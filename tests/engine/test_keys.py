"""What is found again for areas that are alike: by what it rests on, and by nothing else."""

import random
import struct

import numpy as np
import pytest
import snapshot_files as files

from xfast.engine import keys
from xfast.xsave.area import facts, table_of
from xfast.xsave.layout import PRESETS, Layout

LAYOUTS = [Layout(()), *PRESETS.values()]
TABLE = table_of(PRESETS["intel"])


def packed(bounds):
    return struct.pack(f"<{len(bounds)}i", *bounds)


@pytest.mark.parametrize("seed", range(60))
def test_facts_are_those_of_an_array(seed):
    rng = random.Random(f"facts {seed}")
    layout = rng.choice(LAYOUTS)
    size = rng.choice((576, 832, 4096, 11008))
    bv = rng.choice((0, 3, 7, 0xE7, 0x2E7))
    area = bytearray(files.area(rng.randrange(3), 11008, bv)[:size])
    for _ in range(rng.choice((0, 1, 20))):
        area[rng.choice((rng.randrange(size), rng.randrange(512, 576)))] = rng.randrange(256)
    before = rng.randbytes(rng.randrange(9))
    data = before + bytes(area) + rng.randbytes(rng.randrange(9))
    seen = keys.Seen(packed([576]), 10)
    asked = data, len(before), size, layout, 7
    assert seen.find(*asked) is None
    seen.add(*asked, rng.random() < 0.5, table_of(layout), "what")
    expected = facts(np.frombuffer(area, np.uint8), layout).tobytes()
    assert seen.find(*asked) == ("what", expected)


def rests_on(area, bounds, by_bytes):
    """Return all that decides whether an area is alike."""
    words = area[28:32], area[464:472], area[512:528]
    ends = [*bounds[1:], len(area)]
    pieces = [any(area[start : ends[i]]) for i, start in enumerate(bounds)]
    return (*words, len(area), tuple(pieces)) if by_bytes else words


@pytest.mark.parametrize("by_bytes", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_areas_are_alike_in_all_that_is_rested_on(seed, by_bytes):
    rng = random.Random(f"alike {seed}")
    bounds = sorted(rng.sample(range(528, 900), rng.randrange(12)))
    seen, wanted = keys.Seen(packed(bounds), 10_000), {}
    for _ in range(60):
        area = bytearray(rng.choice((600, 832)))
        for _ in range(rng.choice((0, 1, 1, 2))):
            place = rng.choice((28, 31, 464, 471, 512, 519, 520, 527, 5, 540, *bounds))
            place += rng.choice((-1, 0, 0, 1))
            if place < len(area):
                area[place] = rng.choice((1, 1, 0x80))
        owner, mask = rng.choice(LAYOUTS[:2]), rng.choice((0, 7, (1 << 64) - 1))
        key = id(owner), mask, *rests_on(bytes(area), bounds, by_bytes)
        before = rng.randbytes(rng.randrange(9))
        asked = before + bytes(area) + b"\1", len(before), len(area), owner, mask
        found = seen.find(*asked)
        assert (found and found[0]) == wanted.get(key)
        if found is None:
            wanted[key] = len(wanted) + 1
            seen.add(*asked, by_bytes, TABLE, wanted[key])
    seen.clear()
    assert seen.find(*asked) is None


def test_a_full_table_begins_anew():
    seen = keys.Seen(b"", 3)
    data = bytes(600)
    for mask in range(4):
        seen.add(data, 0, 600, None, mask, False, TABLE, mask)
    assert [seen.find(data, 0, 600, None, mask) is None for mask in range(4)] == [True] * 3 + [
        False
    ]


def test_what_is_not_inside_is_refused():
    seen, data = keys.Seen(b"", 3), bytes(1000)
    for start, size in ((-1, 576), (425, 576), (0, 1001), (0, 575), (1 << 62, 1 << 62), (0, -1)):
        with pytest.raises(ValueError, match="area: expected 576 of 1000 bytes or more"):
            seen.find(data, start, size, None, 0)
        with pytest.raises(ValueError, match="area: expected 576 of 1000 bytes or more"):
            seen.add(data, start, size, None, 0, False, TABLE, 1)
    for mask in (-1, 1 << 64):
        with pytest.raises(OverflowError):
            seen.find(data, 0, 600, None, mask)
    for bounds in ((2, 1), (-1, 3), (4, 0)):
        with pytest.raises(ValueError, match="bounds: expected them ascending"):
            keys.Seen(packed(bounds), 3)
    with pytest.raises(ValueError, match="bounds: expected at most 64, got 65"):
        keys.Seen(packed(range(65)), 3)


@pytest.mark.parametrize("seed", range(40))
def test_runs_are_alike_where_each_byte_is(seed):
    rng = random.Random(f"runs {seed}")
    data = bytearray(rng.choices((0, 0, 0, 1), k=200))
    one, other = rng.randrange(100), rng.randrange(100)
    data[other : other + 100] = data[one : one + 100]
    for _ in range(rng.randrange(3)):
        data[rng.randrange(200)] ^= 1
    ends = [sorted(rng.choices(range(101), k=2)) for _ in range(rng.randrange(4))]
    same = all(data[one + a : one + b] == data[other + a : other + b] for a, b in ends)
    assert keys.alike(bytes(data), one, other, packed([x for run in ends for x in run])) == same


def test_runs_outside_are_refused():
    for one, other, run in ((-1, 0, (0, 1)), (0, -1, (0, 1)), (0, 5, (0, 6)), (0, 0, (-1, 2)),
                            (0, 0, (3, 2)), (1 << 62, 0, (0, 1))):  # fmt: skip
        with pytest.raises(ValueError, match="runs: expected them in"):
            keys.alike(bytes(10), one, other, packed(run))


def test_tuples_are_the_same_where_each_object_is():
    one, other = [1], [1]
    assert keys.same((), ())
    assert keys.same((one, other), (one, other))
    assert not keys.same((one,), (other,))
    assert not keys.same((one,), (one, other))
    assert not keys.same((one, one), (one,))
