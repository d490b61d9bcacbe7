"""libvirt's save image: a header, the domain's XML and a cookie in front of a QEMU stream.

*Source*: libvirt src/qemu/qemu_saveimage.h (struct _virQEMUSaveHeader) and qemu_saveimage.c.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from xfast.errors import FormatError

MAGIC = b"LibvirtQemudSave"
MAGIC_PARTIAL = b"LibvirtQemudPart"
HEADER_SIZE = 92
XML_LIMIT = 4 << 20
"""No domain XML with its cookie is larger than this (bytes); most take some 20 KB."""

COMPRESSION = {0: "", 1: "gzip", 2: "bzip2", 3: "xz", 4: "lzop", 5: "zstd", 6: "sparse"}
"""enum virQEMUSaveFormat; `sparse` is a mapped-ram stream that QEMU wrote itself."""


class Readable(Protocol):
    """What a header is read from: a Source, which itself asks for the header when it opens."""

    path: str
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes."""

    def unpack(self, fmt: str, offset: int) -> tuple[Any, ...]:
        """Return numbers."""


class Header(NamedTuple):
    """What precedes the stream: offsets in bytes, of the file."""

    compression: str
    body: int
    xml: bytes
    cookie: bytes


def header(source: Readable) -> Header | None:
    """Return the header of a libvirt save image, or None where `source` is something else.

    Raises
    ------
    FormatError
        If the save was never finished, or the header contradicts the file.

    *Source*: libvirt src/qemu/qemu_saveimage.c qemuSaveImageOpen().
    """
    if source.size < HEADER_SIZE:
        return None
    magic = source.read(0, 16)
    if magic == MAGIC_PARTIAL:
        raise FormatError(source.path, 0, "expected a whole libvirt save, got an unfinished one")
    if magic != MAGIC:
        return None
    order = "<" if source.unpack("<I", 16)[0] <= 0xFFFF else ">"
    version, length, _, compression, cookie = source.unpack(order + "5I", 16)
    if version != 2:
        raise FormatError(source.path, 16, f"expected libvirt save version 2, got {version}")
    if compression not in COMPRESSION:
        raise FormatError(
            source.path, 28, f"expected libvirt save format 0 to 6, got {compression}"
        )
    if length > XML_LIMIT:
        raise FormatError(
            source.path, 20, f"expected at most {XML_LIMIT} bytes of XML, got {length}"
        )
    if cookie > length:
        raise FormatError(
            source.path, 32, f"expected the cookie within {length} bytes, got it at {cookie}"
        )
    data = source.read(HEADER_SIZE, length)
    xml = data[: cookie or length].split(b"\0", 1)[0]
    return Header(
        COMPRESSION[compression],
        HEADER_SIZE + length,
        xml,
        data[cookie:].split(b"\0", 1)[0] if cookie else b"",
    )
