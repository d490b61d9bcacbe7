"""Firecracker's vCPUs in one walk, against loops in Python."""

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfast.engine import vmstate
from xfast.snapshots.firecracker import TABLE_LIMIT, XCRS

CR4 = 248
MSRS = 0xDA0, 0x1C4


def u64(data, at):
    return int.from_bytes(data[at : at + 8], "little") if 0 <= at <= len(data) - 8 else -1


def tables(data, start, end, size):
    """Yield where each list of structures of `size` bytes begins and ends."""
    at = start
    while at <= end - 24:
        word, count, padding, again = struct.unpack_from("<QIIQ", data, at)
        stop = at + 24 + count * (8 + size)
        if (
            (word, padding, again) == (8, 0, count)
            and 0 < count <= TABLE_LIMIT
            and stop <= end
            and all(u64(data, row) == size for row in range(at + 24, stop, 8 + size))
        ):
            yield at + 24, stop
            at = stop
        else:
            at += 1


def slow_walk(data):
    found, start, xcrs = [], 0, data.find(XCRS)
    while xcrs >= 0:
        at = xcrs + 400
        size, area, words = u64(data, at), at + 8, 0
        extra = area + 4096
        if size == 4104:
            area, extra = at + 16, at + 16 + 4096 + 8
            words = u64(data, extra - 8)
        end = extra + 4 * words
        fits = size == 4096 or (size == 4104 and words >= 0 and u64(data, at + 8) == words)
        if not fits or data[end : end + 1] not in (b"\0", b"\1"):
            xcrs = data.find(XCRS, xcrs + 1)
            continue
        begin, stop = next(tables(data, start, xcrs, 40), (0, 0))
        msrs = b""
        for first, past in tables(data, start, xcrs, 16):
            for row in range(first + 8, past, 24):
                index, _, value = struct.unpack_from("<2IQ", data, row)
                msrs += struct.pack("<2IQ", index, 0, value if index in MSRS else 0)
        register, value = struct.unpack_from("<I4xQ", data, xcrs + 16)
        sregs = xcrs - 392
        cr4 = u64(data, sregs + 8 + CR4) if u64(data, sregs) == 312 else None
        xcr0 = None if register else value
        row = start, xcrs, area, extra, 4 * words, end, begin, data[begin:stop], msrs, xcr0, cr4
        found.append(row)
        start = end
        xcrs = data.find(XCRS, end)
    return found


def table(rng, size, count=None, padding=0, again=0):
    rows = rng.choice((1, 1, 2, 3, 256))
    body = b"".join(struct.pack("<Q", size) + rng.randbytes(size) for _ in range(rows))
    if size == 16 and rng.random() < 0.5:
        body += struct.pack("<Q2IQ", 16, rng.choice(MSRS), 0, 5)
        rows += 1
    return struct.pack("<QIIQ", 8, rows if count is None else count, padding, rows + again) + body


def part(rng):
    """Return a piece of a vmstate, or one that is like it."""
    words = rng.choice((0, 0, 1, 3))
    pieces = [
        lambda: bytes(rng.randrange(40)),
        lambda: b"\x08" * rng.randrange(20),
        lambda: rng.randbytes(rng.randrange(9)),
        lambda: table(rng, 40),
        lambda: table(rng, 16),
        lambda: table(rng, rng.choice((16, 40, 41)), rng.choice((None, 0, 1, 257)), padding=1),
        lambda: table(rng, rng.choice((16, 40)), again=1),
        lambda: struct.pack("<Q", 312) + rng.randbytes(312 + 72),
        lambda: XCRS,
        lambda: XCRS[: rng.randrange(1, 12)],
    ]
    xcrs = XCRS + bytes(4) + struct.pack("<2IQ", rng.choice((0, 0, 1)), 0, 7) + bytes(368)
    size = rng.choice((4096, 4096, 4104, 4104, 4095))
    whole = xcrs + struct.pack("<Q", size)
    if size == 4104:
        whole += struct.pack("<Q", words)
    whole += rng.randbytes(64) + bytes(4032)
    if size == 4104:
        whole += struct.pack("<Q", rng.choice((words, words, words, words + 1, 1 << 62)))
        whole += bytes(4 * words)
    pieces += [lambda: whole + rng.choice((b"\0", b"\1", b"\1", b"\2", b""))] * 4
    return rng.choice(pieces)()


@pytest.mark.parametrize("seed", range(300))
def test_the_walk_finds_what_a_slow_one_finds(seed):
    rng = random.Random(f"walk {seed}")
    data = b"".join(part(rng) for _ in range(rng.randrange(14)))
    for end in (len(data), rng.randrange(len(data) + 1)):
        piece = data[:end]
        assert vmstate.walk(piece, XCRS, CR4, MSRS) == slow_walk(piece)


@pytest.mark.parametrize("name", ["fc-bincode1-v4.vmstate", "fc-bincode2-v8.vmstate"])
def test_samples_with_changes_are_walked_as_slowly(data, name):
    sample = (data / "vmm" / name).read_bytes()
    assert len(vmstate.walk(sample, XCRS, CR4, MSRS)) == 2
    rng = random.Random(name)
    for _ in range(60):
        image = bytearray(sample)
        for _ in range(rng.choice((0, 1, 5))):
            image[rng.randrange(len(image))] = rng.choice((0, 1, 8, rng.randrange(256)))
        if rng.random() < 0.3:
            del image[rng.randrange(len(image)) :]
        assert vmstate.walk(bytes(image), XCRS, CR4, MSRS) == slow_walk(bytes(image))


def test_equal_rows_are_one_object(data):
    sample = (data / "vmm" / "fc-bincode2-v8.vmstate").read_bytes()
    ((*_, one, msrs, _, _), _), ((*_, again, others, _, _), _) = (
        vmstate.walk(sample, XCRS, CR4, MSRS) for _ in range(2)
    )
    assert one is again
    assert msrs is others


@given(st.binary(max_size=40))
def test_any_bytes_can_be_walked(data):
    assert vmstate.walk(data, XCRS, CR4, MSRS) == []
    assert vmstate.walk(XCRS + data, XCRS, CR4, MSRS) == []


def test_what_can_not_be_walked_is_refused():
    for xcrs, cr4 in ((b"1234567", CR4), (XCRS, -1), (XCRS, 305)):
        with pytest.raises(ValueError, match="expected CR4"):
            vmstate.walk(b"", xcrs, cr4, MSRS)
