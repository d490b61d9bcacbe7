"""A text that differs in numbers alone, against a regular expression."""

import random
import re
import struct

import numpy as np
import pytest

from xfast.engine.template import Template

CODES = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}


def slow_follow(text, slots, size, data):
    """Return the values by a regular expression made of the text, or None."""
    pattern, at = b"", 0
    for start, end, _, _ in slots:
        pattern += re.escape(text[at:start]) + rb"(0|[1-9][0-9]*)(?![0-9])"
        at = end
    match = re.fullmatch(pattern + re.escape(text[at:]), data, re.DOTALL)
    if match is None:
        return None
    values = bytearray(size)
    for number, (_, _, width, place) in zip(match.groups(), slots, strict=True):
        if int(number) >> 8 * width or int(number) == (1 << 64) - 1:
            return None
        if place >= 0:
            values[place : place + width] = struct.pack(CODES[width], int(number))
    return bytes(values)


def made(rng):
    """Return a text, its slots, and the bytes of the values."""
    text, slots, size = bytearray(), [], 0
    for _ in range(rng.randrange(1, 12)):
        text += rng.choice((b"x", b",", b" ", b"a" * rng.choice((7, 63, 64, 130)), b"-"))
        width = rng.choice((1, 2, 4, 8))
        number = str(rng.randrange(1 << rng.choice((1, 4, 8 * width - 1)))).encode()
        if rng.random() < 0.8:
            kept = rng.random() < 0.7
            slots.append((len(text), len(text) + len(number), width, size if kept else -1))
            size += width * kept
        text += number + rng.choice((b",", b"}", b"."))
    return bytes(text), slots, size


def template(text, slots, size):
    return Template(text, np.array(slots, np.int32).reshape(-1, 4), size)


@pytest.mark.parametrize("seed", range(400))
def test_a_text_is_followed_as_a_regular_expression_says(seed):
    rng = random.Random(seed)
    text, slots, size = made(rng)
    plan = template(text, slots, size)
    assert plan.follow(text) == plan.values == slow_follow(text, slots, size, text)
    for _ in range(20):
        data, moved = bytearray(text), rng.sample(slots, min(len(slots), rng.choice((0, 1, 3))))
        for start, end, width, _ in sorted(moved, reverse=True):
            number = rng.choice(
                (
                    0,
                    7,
                    255,
                    256,
                    65536,
                    1 << 32,
                    (1 << 8 * width) - 1,
                    (1 << 64) - 2,
                    10**19,
                    10**20,
                    1 << 64,
                    3 << 64,
                )
            )
            data[start:end] = rng.choice((b"", b"", b"", b"0", b"-")) + str(number).encode()
        for _ in range(rng.choice((0, 0, 1, 2))):
            at = rng.randrange(len(data))
            piece = rng.choice((b"", b"0", b"5", b",", b"55", b"\0"))
            data[at : at + rng.choice((0, 1))] = piece
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        data = bytes(data)
        assert plan.follow(data) == slow_follow(text, slots, size, data)


@pytest.mark.parametrize(
    "slots",
    [
        [(1, 2, 4, 0)], [(0, 1, 4, 0), (0, 1, 4, 4)], [(2, 4, 3, 0)], [(2, 4, 4, 5)],
        [(2, 4, 4, -2)], [(2, 3, 4, 0)], [(2, 99, 4, 0)], [(-1, 1, 4, 0)], [(5, 8, 1, 0)],
        [(9, 11, 4, 0)], [(12, 13, 4, 0)],
    ],
)  # fmt: skip
def test_slots_that_are_no_numbers_of_the_text_are_refused(slots):
    text = b"1,23,256,05,7"
    assert template(text, [(2, 4, 4, 0)], 8).values == b"\x17" + bytes(7)
    with pytest.raises(ValueError, match=r"expected numbers in the text, got another slot"):
        template(text, slots, 8)


def test_slots_have_four_columns():
    with pytest.raises(ValueError, match="expected 4 columns, got 3"):
        Template(b"1", np.zeros((1, 3), np.int32), 8)
    with pytest.raises(ValueError, match="expected 4 columns"):
        Template(b"1", np.zeros((0, 4), np.int32), -1)
