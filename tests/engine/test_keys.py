"""What areas tell that lie in a file's bytes: as arrays of them do, and a piece at a time."""

import random
import struct

import numpy as np
import pytest
import snapshot_files as files

from xfast.engine import keys
from xfast.xsave.area import facts, table_of
from xfast.xsave.layout import PRESETS, Layout

LAYOUTS = [Layout(()), *PRESETS.values()]


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
    found = keys.facts(data, len(before), size, table_of(layout))
    assert found == facts(np.frombuffer(area, np.uint8), layout).tobytes()


@pytest.mark.parametrize("seed", range(60))
def test_pieces_are_filled_where_a_byte_is_not_zero(seed):
    rng = random.Random(f"filled {seed}")
    size = rng.randrange(700)
    bounds = sorted(rng.sample(range(900), rng.randrange(12)))
    area = np.zeros(size, np.uint8)
    for _ in range(rng.choice((0, 1, 3, 9)) if size else 0):
        area[rng.randrange(size)] = rng.randrange(1, 256)
    before = rng.randbytes(rng.randrange(9))
    data = before + area.tobytes() + b"\1"
    mask = keys.filled(data, len(before), size, struct.pack(f"<{len(bounds)}i", *bounds))
    for i, start in enumerate(bounds):
        assert mask >> i & 1 == area[start : [*bounds, size][i + 1]].any()
    assert not mask >> len(bounds)


def test_tuples_are_the_same_where_each_object_is():
    one, other = [1], [1]
    assert keys.same((), ())
    assert keys.same((one, other), (one, other))
    assert not keys.same((one,), (other,))
    assert not keys.same((one,), (one, other))
    assert not keys.same((one, one), (one,))


def test_what_is_not_inside_is_refused():
    table, data = table_of(PRESETS["intel"]), bytes(1000)
    for start, size in ((-1, 576), (425, 576), (0, 1001), (0, 575), (1 << 62, 1 << 62), (0, -1)):
        with pytest.raises(ValueError, match="area: expected 576 of 1000 bytes or more"):
            keys.facts(data, start, size, table)
    for start, size in ((-1, 10), (0, 1001), (991, 10), (0, -1)):
        with pytest.raises(ValueError, match="area: expected 0 of 1000"):
            keys.filled(data, start, size, b"")
    for bounds in ((2, 1), (-1, 3), (4, 0)):
        with pytest.raises(ValueError, match="bounds: expected them ascending"):
            keys.filled(data, 0, 1000, struct.pack("<2i", *bounds))
    with pytest.raises(ValueError, match="bounds: expected at most 64, got 65"):
        keys.filled(data, 0, 1000, struct.pack("<65i", *range(65)))
