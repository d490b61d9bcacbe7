"""Protocol Buffers on the wire, as far as CRIU's images need them: field by field, no schema.

*Source*: Protocol Buffers "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

FIELD_LIMIT = 1 << 12
"""Fields of one message: a core has some 600 at most, cpuinfo.img one for each CPU."""


class Field(NamedTuple):
    """One field of a protobuf message: `raw` is all its bytes, tag included."""

    number: int
    value: int | bytes
    raw: bytes


class Broken(ValueError):
    """A message does not decode; turned into a FormatError where the file is known."""


def varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the varint at `position` and the position behind it.

    Raises
    ------
    Broken
        If it does not end within 10 bytes.
    """
    value = 0
    for shift, byte in enumerate(data[position : position + 10]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, position + shift + 1
    raise Broken(f"expected the end of the number at {position} in 10 bytes, got none")


def encoded(value: int) -> bytes:
    """Return a varint's bytes."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def fields(data: bytes, limit: int = FIELD_LIMIT) -> Iterator[Field]:
    """Yield the fields of a protobuf message in order; numbers as int, the rest as bytes.

    Raises
    ------
    Broken
        If it is none, or has more fields than `limit`.
    """
    position, end = 0, len(data)
    for _ in range(limit):
        if position == end:
            return
        start = position
        tag = data[position]
        if tag < 0x80:
            position += 1
        else:
            tag, position = varint(data, position)
        kind = tag & 7
        if kind == 0:
            if position < end and data[position] < 0x80:  # most numbers are one byte
                value = data[position]
                position += 1
            else:
                value, position = varint(data, position)
            yield Field(tag >> 3, value, data[start:position])
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, position = varint(data, position)
        if size is None or position + size > end:
            raise Broken(f"expected a field within the data, got one of type {kind} at {start}")
        position += size
        yield Field(tag >> 3, data[position - size : position], data[start:position])
    if position < end:
        raise Broken(f"expected at most {limit} fields in a message, got more")


def inner(message: Iterable[Field], number: int) -> bytes | None:
    """Return the message in the field of this number, or None.

    Raises
    ------
    Broken
        If there are several: a program would merge them, which no image needs.
    """
    found = None
    for field in message:
        if field.number == number and isinstance(field.value, bytes):
            if found is not None:
                raise Broken(f"expected one message in field {number}, got another")
            found = field.value
    return found
