"""Mutations that know structure: numbers that lie, pieces that move, JSON trees, checksums.

Random bytes seldom get past a magic; these keep what the readers check first, and change what
they believe.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from snapshot_files import sealed

BOUNDS = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 512, 576, 832, 4096, 0x7FF0, 0xFFFF, 1 << 20)


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


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Return every place in a JSON tree: its parent and its key there."""
    found = []
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            found += _nodes(value[key])
    return found


def tree(data: bytes, rng: random.Random, depth: int = 0) -> bytes | None:
    """Change a place in JSON text, or in the text inside a string of it; None if it is none."""
    try:
        value = json.loads(data)
        places = _nodes(value) if isinstance(value, (dict, list)) else []
    except (ValueError, RecursionError):
        return None
    if not places:
        return None
    parent, key = rng.choice(places)
    old = parent[key]
    if isinstance(old, str) and depth < 3 and (inner := tree(old.encode(), rng, depth + 1)):
        parent[key] = inner.decode()
    elif rng.random() < 0.3:
        del parent[key]
    else:
        parent[key] = rng.choice(
            (
                rng.choice(BOUNDS),
                -1,
                1 << 64,
                1.5,
                None,
                True,
                "x",
                [],
                {},
                [old],
                [old] * 9,
                {"a": old},
            )
        )
    return json.dumps(value).encode()


WAYS: tuple[Callable[[bytearray, random.Random], None], ...] = (
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
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 4))):
            text = tree(bytes(changed), rng) if changed[:1] in (b"{", b"[") else None
            if text is not None and rng.random() < 0.9:
                changed = bytearray(text)
            else:
                rng.choice(WAYS)(changed, rng)
        return sealed(name, bytes(changed))[:most] if len(changed) > 8 else bytes(changed)

    return mutate
