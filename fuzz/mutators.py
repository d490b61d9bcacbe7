"""Mutations that know structure: numbers that lie, pieces that move, texts, packers, checksums.

Random bytes seldom get past a magic; these keep what the readers check first, and change what
they believe.
"""

from __future__ import annotations

import bz2
import lzma
import random
import re
import zlib
from collections.abc import Callable, Sequence

import inside
from backports import zstd
from inside import BOUNDS
from snapshot_files import sealed


def number(data: bytearray, rng: random.Random) -> None:
    """Replace a number of any width and order by one at a boundary, or near what it was."""
    width = rng.choice((1, 2, 4, 8))
    if len(data) < width:
        return
    at = rng.randrange(len(data) - width + 1)
    order = rng.choice(("little", "big"))
    top = 1 << 8 * width
    old = int.from_bytes(data[at : at + width], order)
    new = rng.choice(
        (rng.choice(BOUNDS), old + rng.choice((-8, -1, 1, 8)), top - 1, top // 2, len(data))
    )
    data[at : at + width] = (new % top).to_bytes(width, order)


def bit(data: bytearray, rng: random.Random) -> None:
    """Turn a bit over."""
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def piece(data: bytearray, rng: random.Random) -> None:
    """Cut a piece out, or put it in once more, where records often begin and end."""
    step = rng.choice((1, 4, 8, 64, 512))
    start = rng.randrange(0, len(data) + 1, step)
    end = min(len(data), start + step * rng.randrange(1, 9))
    if rng.random() < 0.5:
        del data[start:end]
    else:
        at = rng.randrange(0, len(data) + 1, step)
        data[at:at] = data[start:end] * rng.choice((1, 1, 2, 16))


def cut(data: bytearray, rng: random.Random) -> None:
    """Cut the end off, or fill it up with zeros."""
    if rng.random() < 0.7:
        del data[rng.randrange(len(data) + 1) :]
    else:
        data += bytes(rng.choice((1, 64, 512, 4096)))


def text_of(data: bytearray, rng: random.Random) -> None:
    """Change a text: a line twice or gone or moved, a word for another, a number of any length."""
    if not data or b"\0" in data[:512]:
        return bit(data, rng)
    if rng.random() < 0.4:
        lines = data.split(b"\n")
        line = lines.pop(rng.randrange(len(lines)))
        for _ in range(rng.choice((0, 1, 2, 2, 40))):
            lines.insert(rng.randrange(len(lines) + 1), line)
        data[:] = b"\n".join(lines)
        return None
    words = list(WORD.finditer(data))
    if words:
        one, other = rng.choice(words), rng.choice(words)
        new = rng.choice((other[0], other[0], rng.choice(WORDS), one[0] * rng.choice((2, 99))))
        data[one.start() : one.end()] = new
    return None


WORD = re.compile(rb"[\w.+-]+|[^\w\s]")
WORDS = (
    *(b"0", b"-1", b"0x", b"0xffffffffffffffff", b"1e999", b"NaN", b"9" * 70, b"a.b.c", b"true"),
    *(b"\x1b[31m", b"'", b'"', b"<", b"]]>", b"&#x41;", b"\xff\xfe", b"[[", b"}", b"\xe2\x80\xa8"),
)
"""What stands for a word in a text sometimes."""


def packed(data: bytes, change: Callable[[bytearray], bytearray]) -> bytes | None:
    """Change what is packed inside of bytes, and pack it again; None if nothing is."""
    for magic, unpack, pack in PACKERS:
        if data.startswith(magic):
            try:
                inner = unpack(data)
            except Exception:  # damage is another way's work
                return None
            return pack(bytes(change(bytearray(inner[: 1 << 16]))))
    return None


PACKERS: tuple[tuple[bytes, Callable[[bytes], bytes], Callable[[bytes], bytes]], ...] = (
    (
        b"\x1f\x8b\x08",
        lambda data: zlib.decompressobj(31).decompress(data, 1 << 16),
        lambda data: (
            b"\x1f\x8b\x08" + bytes(7) + zlib.compress(data, wbits=-15) + crc_and_size(data)
        ),
    ),
    (
        b"BZh",
        lambda data: bz2.BZ2Decompressor().decompress(data, 1 << 16),
        bz2.compress,
    ),
    (
        b"\xfd7zXZ\0",
        lambda data: lzma.LZMADecompressor().decompress(data, 1 << 16),
        lambda data: lzma.compress(data, preset=0),
    ),
    (
        b"\x28\xb5\x2f\xfd",
        lambda data: zstd.ZstdDecompressor().decompress(data, 1 << 16),
        zstd.compress,
    ),
)
"""What packed bytes begin with, and how they are unpacked (as far as 64 KiB) and packed."""


def crc_and_size(data: bytes) -> bytes:
    """Return what a gzip member ends with."""
    return zlib.crc32(data).to_bytes(4, "little") + len(data).to_bytes(4, "little")


Way = Callable[[bytearray, random.Random], None]
WAYS: tuple[Way, ...] = (
    number,
    number,
    number,
    bit,
    piece,
    cut,
)


def mutator(name: str) -> Callable[[bytes, int, int], bytes]:
    """Return a mutator for a target."""

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.8:
            new = packed(data, lambda inner: changed(inner, rng, ways))
            if new is not None:
                return new[:most]
        return bytes(changed(bytearray(data), rng, ways))[:most]

    ways = (*WAYS, *(text_of,) * len(WAYS) * 2) if name in TEXTS else (*WAYS, text_of)
    return mutate


TEXTS = ("host", "explain")
"""Targets whose inputs are texts, most of them."""

STATE = b"\0\0\x84\x66\x84\x19\x10\x07"
"""What a snapshot of Firecracker begins with; it ends with its checksum."""


def changed(data: bytearray, rng: random.Random, ways: Sequence[Way]) -> bytearray:
    """Return bytes with up to four changes, and a checksum that fits them."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        new = within(bytes(data), rng, ways) if rng.random() < 0.9 else None
        if new is not None:
            data = bytearray(new)
        else:
            rng.choice(ways)(data, rng)
    if data.startswith(STATE) and rng.random() < 0.95:
        data = bytearray(sealed("firecracker", bytes(data)))
    return data


def within(data: bytes, rng: random.Random, ways: Sequence[Way]) -> bytes | None:
    """Change what lies within bytes that have lengths of their own; None if they have none."""

    def change(inner: bytearray) -> bytearray:
        return changed(inner, rng, ways)

    for kind in (inside.tree, inside.cbor, inside.image):
        new = kind(data, rng)
        if new is not None:
            return new
    try:
        new = inside.archive(data, rng, change)
    except ValueError:  # a header's numbers are damaged, or no header is left
        return None
    return new or inside.several(data, rng, change)
