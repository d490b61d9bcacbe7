"""Protocol Buffers on the wire, as far as CRIU's images need them: field by field, no schema.

*Source*: Protocol Buffers "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


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
    raise Broken(f"found no end of the number at {position}, needed one in 10 bytes")


def encoded(value: int) -> bytes:
    """Return a varint's bytes."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def fields(data: bytes) -> Iterator[Field]:
    """Yield the fields of a protobuf message in order; numbers as int, the rest as bytes.

    Raises
    ------
    Broken
        If it is none.
    """
    position = 0
    while position < len(data):
        start = position
        tag, position = varint(data, position)
        if tag & 7 == 0:
            value, position = varint(data, position)
            yield Field(tag >> 3, value, data[start:position])
            continue
        size = {1: 8, 5: 4}.get(tag & 7)
        if tag & 7 == 2:
            size, position = varint(data, position)
        if size is None or position + size > len(data):
            raise Broken(f"found a field of type {tag & 7} at {start}, needed it within the data")
        position += size
        yield Field(tag >> 3, data[position - size : position], data[start:position])


def message(data: bytes, *path: int) -> bytes | None:
    """Return the message that lies in `data` under the field numbers `path`, or None."""
    for number in path:
        found = [f.value for f in fields(data) if f.number == number and isinstance(f.value, bytes)]
        if not found:
            return None
        data = found[-1]
    return data
