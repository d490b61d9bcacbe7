"""Compressed files: opened for reading, or for writing like one that was read.

A codec takes the compressed file, the mode ("rb" or "wb"), and for writing the first bytes of
the file to be like and how many bytes there are to pack (None: not known). It keeps what the
header holds: a check, a name, a time. The header does not say how hard the packer tried.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import IO, Any

from xfast.errors import XfastError

HEAD_SIZE = 4096
"""Bytes that hold a compressed file's header, whatever name is in it."""

MISSING = "{0}: expected a package that reads it, got none: pip install 'xfast[{0}]'"

LZOP = ("/usr/bin/lzop", "/bin/lzop", "/usr/local/bin/lzop")

GZIP_FEXTRA, GZIP_FNAME = 4, 8
XZ_CHECK_OFFSET = 7
ZSTD_CHECKSUM = 4


def _gzip(file: IO[bytes], mode: str, head: bytes = b"", size: int | None = None) -> Any:
    """Keep FNAME and MTIME. *Source*: RFC 1952 section 2.3."""
    import gzip

    flags = head[3] if head else 0
    start = 10
    if flags & GZIP_FEXTRA:
        start += 2 + int.from_bytes(head[10:12], "little")
    end = head.find(b"\0", start)
    name = head[start:end].decode("latin-1") if flags & GZIP_FNAME and end > start else ""
    name += ".gz" * bool(name)  # which GzipFile takes off
    mtime = int.from_bytes(head[4:8], "little")
    return gzip.GzipFile(filename=name, mode=mode, fileobj=file, mtime=mtime)


def _bzip2(file: IO[bytes], mode: str, head: bytes = b"", size: int | None = None) -> Any:
    import bz2

    return bz2.open(file, mode)


def _xz(file: IO[bytes], mode: str, head: bytes = b"", size: int | None = None) -> Any:
    """Keep the check. *Source*: The .xz File Format, section 2.1.1.2 (stream flags)."""
    import lzma

    check = head[XZ_CHECK_OFFSET] & 0xF if head else -1
    return lzma.open(file, mode, check=check if lzma.is_check_supported(check) else -1)


def _zstd(file: Any, mode: Any, head: bytes = b"", size: int | None = None) -> Any:
    """Keep the checksum and the content size. *Source*: RFC 8878 section 3.1.1.1."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise XfastError(MISSING.format("zstd")) from None
    if mode == "rb":
        return zstd.open(file)
    options = {int(zstd.CompressionParameter.checksum_flag): int(bool(head[4] & ZSTD_CHECKSUM))}
    packer = zstd.ZstdCompressor(options=options)
    if zstd.get_frame_info(head).decompressed_size is not None:
        packer.set_pledged_input_size(size)
    return _packing(file, packer)


def _lz4(file: Any, mode: Any, head: bytes = b"", size: int | None = None) -> Any:
    """Keep the checksums, the block mode and the content size.

    *Source*: LZ4 Frame Format Description, "Frame Descriptor". Decoding is left to the lz4
    package: in Python alone, blocks and xxHash checksums of a gigabyte would take minutes.
    """
    try:
        import lz4.frame
    except ImportError:
        raise XfastError(MISSING.format("lz4")) from None
    if mode == "rb":
        return lz4.frame.open(file)
    info = lz4.frame.get_frame_info(head)
    packer = lz4.frame.LZ4FrameCompressor(
        block_size=info["block_size_id"],
        block_linked=info["block_linked"],
        content_checksum=bool(info["content_checksum"]),
        block_checksum=bool(info["block_checksum"]),
    )
    file.write(packer.begin(size if size and info["content_size"] else 0))
    return _packing(file, packer)


@contextlib.contextmanager
def _packing(file: IO[bytes], packer: Any) -> Iterator[Any]:
    """Yield what writes into `file` through a compressor object."""
    yield SimpleNamespace(write=lambda data: file.write(packer.compress(data)))
    file.write(packer.flush())


def _lzop_program() -> str:
    """Return where lzop is: never sought by PATH, and nobody but root can have put it there."""
    for path in map(os.path.realpath, LZOP):
        parts = [path]
        while parts[-1] != "/":
            parts.append(os.path.dirname(parts[-1]))
        if os.path.isfile(path) and all(map(_is_roots, parts)):
            return path
    raise XfastError(
        f"lzop: expected a program that only root can write, got none at {' or '.join(LZOP)}: "
        "install lzop"
    )


def _is_roots(path: str) -> bool:
    """Tell whether only root can write a file, or exchange what lies in a directory."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    return not status.st_uid and bool(sticky or not status.st_mode & 0o022)


@contextlib.contextmanager
def _lzop(file: IO[bytes], mode: str, head: bytes = b"", size: int | None = None) -> Iterator[Any]:
    """Run the lzop program, which alone knows its format, beside `file`."""
    import subprocess

    command = [_lzop_program(), "-dc" if mode == "rb" else "-c"]
    ends = {"stdin": file, "stdout": subprocess.PIPE}
    if mode == "wb":
        file.flush()
        ends = {"stdin": subprocess.PIPE, "stdout": file}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **ends)  # type: ignore[call-overload]
    with process:
        try:
            yield process.stdout or process.stdin
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise XfastError(f"lzop: expected status 0, ended with {process.returncode}")


CODECS: dict[str, Callable[..., Any]] = {
    "gzip": _gzip,
    "bzip2": _bzip2,
    "xz": _xz,
    "lz4": _lz4,
    "lzop": _lzop,
    "zstd": _zstd,
}
"""How to open a compressed file, for reading ("rb") or writing ("wb")."""

MAGICS = {
    b"\x1f\x8b\x08": "gzip",
    **{b"BZh%d1A" % level: "bzip2" for level in range(1, 10)},
    b"\xfd7zXZ\0": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""What a compressed file begins with. lzop's occurs in libvirt images only."""
