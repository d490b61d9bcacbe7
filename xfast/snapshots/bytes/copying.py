"""Bytes read, written and copied by descriptor: however many calls that takes."""

from __future__ import annotations

import errno
import os

CHUNK = 1 << 20


def read_at(fd: int, length: int, offset: int) -> bytes:
    """Return the bytes at an offset, however many calls that takes; fewer where the file ends."""
    piece = os.pread(fd, length, offset)
    if len(piece) in (0, length):
        return piece
    pieces = [piece]
    while piece:
        length -= len(piece)
        offset += len(piece)
        piece = os.pread(fd, length, offset) if length else b""
        pieces.append(piece)
    return b"".join(pieces)


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write bytes at an offset, however many calls that takes."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(fd, rest, offset)
        rest = rest[count:]
        offset += count


def copy_bytes(source: int, target: int, size: int) -> None:
    """Copy a file: holes stay holes, and where the file system shares blocks no data moves."""
    os.truncate(target, size)
    done = 0
    while done < size:
        try:
            done = os.lseek(source, done, os.SEEK_DATA)
        except OSError as problem:
            if problem.errno == errno.ENXIO:  # only a hole is left
                break
            if problem.errno == errno.EINVAL:  # a block device, which knows of no holes
                return _copy_device(source, target, size)
            raise
        end = min(size, os.lseek(source, done, os.SEEK_HOLE))
        while done < end:
            done += _copy_part(source, target, done, end - done)


def _copy_device(source: int, target: int, size: int) -> None:
    """Copy a block device; what is zeros becomes holes."""
    for offset in range(0, size, CHUNK):
        piece = read_at(source, min(CHUNK, size - offset), offset)
        if piece.count(0) < len(piece):
            write_all(target, piece, offset)


def _copy_part(source: int, target: int, offset: int, length: int) -> int:
    try:
        count = os.copy_file_range(source, target, length, offset, offset)
    except OSError:  # two file systems, or one that can't
        piece = os.pread(source, min(length, CHUNK), offset)
        write_all(target, piece, offset)
        count = len(piece)
    if not count:
        words = f"the original shrank to {offset} bytes while it was copied"
        raise OSError(errno.EIO, words)  # whoever copies knows what it is called
    return count
