"""Tar archives, as far as reading and resizing a member needs: offsets, never file names.

*Source*: POSIX pax "ustar Interchange Format"; GNU tar's long names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from xfast.errors import FormatError
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import Splice

BLOCK = 512
MAGIC_OFFSET = 257
NAME_LIMIT = 1 << 16
MEMBER_LIMIT = 1 << 16
HEADERS_LEAST, HEADERS_RATIO = 4 << 20, 2
"""Bytes of headers in a packed archive: so many, or twice what the archive takes on the disk."""

REGULAR = (b"0", b"\0")
GNU_LONG_NAME = b"L"
PAX_HEADER = b"x"
PAX_PATH = re.compile(r"(?:\A|\n)\d{1,5} path=([^\n]*)\n")
"""A record begins where the text or a line does: sought anywhere, digits would be tried from each
of them on, and a header of nothing but digits take quadratic time."""


class Member(NamedTuple):
    """A file within a file: its bytes lie at `offset`; `name` is its last path component."""

    name: str
    offset: int
    size: int


def room(member: Member) -> int:
    """Return what a member takes in its archive: header, bytes and padding."""
    return BLOCK + -(-member.size // BLOCK) * BLOCK


def sniff(source: Source) -> bool:
    """Tell whether a file is a tar archive."""
    return source.size >= BLOCK and source.read(MAGIC_OFFSET, 5) == b"ustar"


def members(source: Source) -> Iterator[Member]:
    """Yield the regular files in an archive.

    Raises
    ------
    FormatError
        If it is damaged, has more than `MEMBER_LIMIT` members, or was made to pack too well.
    """
    position, name = 0, ""
    for number in range(MEMBER_LIMIT):
        source.require_stored(number * BLOCK, HEADERS_LEAST, HEADERS_RATIO, position)
        header = source.read(position, BLOCK) if position < source.size else b""
        if not any(header):
            return
        size = _number(source, position + 124, header[124:136])
        checksum = sum(header[:148]) + sum(header[156:]) + 8 * 0x20
        if checksum != _number(source, position + 148, header[148:156]):
            raise FormatError(source.path, position + 148, "found a wrong checksum of a tar header")
        data = position + BLOCK
        if data + size > source.size:
            raise FormatError(
                source.path,
                position,
                f"expected a member of at most {source.size - data} bytes, got {size}",
            )
        kind = header[156:157]
        if kind in (GNU_LONG_NAME, PAX_HEADER):
            text = source.read(data, min(size, NAME_LIMIT)).decode("utf-8", "replace")
            longer = PAX_PATH.search(text) if kind == PAX_HEADER else None
            name = longer[1] if longer else name if kind == PAX_HEADER else text.rstrip("\0")
        else:
            name = name or header[:100].split(b"\0")[0].decode("utf-8", "replace")
            if kind in REGULAR:
                yield Member(name.rpartition("/")[2], data, size)
            name = ""
        position = data + -(-size // BLOCK) * BLOCK
    raise FormatError(source.path, position, f"expected at most {MEMBER_LIMIT} members, got more")


def _number(source: Source, offset: int, digits: bytes) -> int:
    """Return a number of a header: octal digits, or (bit 7 set) bytes."""
    if digits[0] & 0x80:
        return int.from_bytes(digits, "big") & (1 << 8 * len(digits) - 1) - 1
    text = digits.strip(b" \0") or b"0"
    if not re.fullmatch(rb"[0-7]+", text):
        raise FormatError(source.path, offset, f"expected octal digits, got {digits!r}")
    return int(text, 8)


def resized(source: Source, member: Member, splice: Splice) -> Splice:
    """Return an edit within a member as one of the archive, with the header that it needs."""
    start = member.offset - BLOCK
    old = source.read(start, min(room(member), source.size - start))  # the last may lack padding
    begin = splice.offset - start
    content = old[BLOCK:begin] + splice.new + old[begin + len(splice.old) : BLOCK + member.size]
    header = bytearray(old[:BLOCK])
    header[124:136] = b"%011o\0" % len(content)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    padding = bytes(-len(content) % BLOCK)
    return splice._replace(offset=start, old=old, new=bytes(header) + content + padding)
