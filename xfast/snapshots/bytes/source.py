"""Bytes of a file, each offset and length checked before use; compressed files read through.

A Source is read where it is needed and never as a whole. What is compressed (the whole file, or
the body of a libvirt save image) is first expanded into an anonymous temporary file; the Source
is then that file, and remembers what was around it, so that `Source.rewrite` can put it back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, NoReturn

from xfast.engine.files import Reader
from xfast.errors import FormatError, XfastError
from xfast.snapshots.bytes import libvirt
from xfast.snapshots.bytes.codecs import CODECS, HEAD_SIZE, MAGICS
from xfast.snapshots.bytes.copying import copy_bytes, read_at, write_all
from xfast.snapshots.bytes.opening import JOURNAL, Found, regular, status_of

if TYPE_CHECKING:
    from xfast.snapshots.model import Splice, Stamp

Watch = Callable[[int, int], None]
"""Called before each read of a pipe, with its descriptor and the bytes so far; it may wait."""

CHUNK = 1 << 20
NESTING_LIMIT = 4

EXPAND_LIMIT = 4 << 30
"""What one compressed file may expand to (bytes), unless the caller says otherwise."""
EXPAND_LEAST, EXPAND_RATIO = 64 << 20, 64
"""Without anybody's word it is no more than that many times the file's own size, or 64 MiB: a
mebibyte of packed zeros would be expanded for ten seconds before it is found to be nothing."""

PACKED = (libvirt.MAGIC, libvirt.MAGIC_PARTIAL, *MAGICS)
"""What files begin with whose bytes are packed, or may be."""

Locate = Callable[[int], tuple[int | None, int]]
"""Offset in a view -> (offset in the source, or None for zeros; bytes left of the run)."""


class Source(Reader):
    """Read-only random access to the bytes of one input, after decompression.

    Parameters
    ----------
    path : str
        The name as the user gave it; ``-`` is standard input.
    fd : int
        A regular file or block device, which the Source owns from here on.
    found : tuple, optional
        Its mode, stamp and head, where they are known already; see `files.opened`.
    outer, codec, body : Source or None, str, int
        What was around the bytes: they were found compressed by `codec` at offset `body` of
        `outer`.

    Attributes
    ----------
    size : int
        Bytes.
    head : bytes
        The first ones, as far as they are known: all of a small file.
    container : tuple of str
        What was taken off so far, outermost first.
    bytes_read : int
        How much was asked for until now (decompression reads are not counted).
    lifted : bool
        Whether somebody said to what it may expand, so that state may pack as well as it does.
    """

    outer: Source | None
    codec = ""
    body = 0
    lifted = False
    container: tuple[str, ...] = ()

    def __init__(
        self,
        path: str,
        fd: int,
        found: Found | None = None,
        outer: Source | None = None,
        codec: str = "",
        body: int = 0,
    ) -> None:
        self.hold(path, fd, found or status_of(fd))
        if outer:
            self.outer, self.codec, self.body = outer, codec, body
            self.container = (*outer.container, *(["libvirt-save"] if body else []), codec)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        fd: int | None = None,
        expand_limit: int = EXPAND_LIMIT,
    ) -> Source:
        """Open a file, or standard input for ``-``, and take compression off.

        Parameters
        ----------
        path : str or path
        fd : int, optional
            The file, open already; the Source owns it from here on, and `path` only names it.
        expand_limit : int
            What a compressed file, or standard input, may expand to (bytes).

        Raises
        ------
        FormatError
            If it is damaged, or expands beyond the limit.
        XfastError
            If it can't be opened, is no regular file, or needs a module that is missing.
        """
        name = os.fspath(path)
        if fd is not None or name == "-":
            return cls(name, _stdin(expand_limit) if fd is None else fd).expanded(expand_limit)
        source = cls.__new__(cls)
        source.hold(name, *regular(name))
        return source.expanded(expand_limit) if source.head.startswith(PACKED) else source

    @classmethod
    def of(cls, data: Any, name: str = "<bytes>", *, expand_limit: int = EXPAND_LIMIT) -> Source:
        """Take bytes in memory (any buffer), or a binary file opened for reading, as an input.

        Raises
        ------
        FormatError
            If it is damaged, or expands beyond the limit.
        """
        if hasattr(data, "read"):
            return cls(name, _spool(name, data, expand_limit)).expanded(expand_limit)
        try:
            view = memoryview(data)
        except TypeError:
            kind = type(data).__name__
            raise TypeError(
                f"expected a path, bytes, an array or a binary file to read, got {kind}"
            ) from None
        fd = os.memfd_create("xfast", os.MFD_CLOEXEC)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(view.cast("B"))
        except BaseException:
            os.close(fd)
            raise
        return cls(name, fd).expanded(expand_limit)

    def expanded(self, limit: int) -> Source:
        """Return the bytes without what they are packed in; this Source is closed with that one.

        Raises
        ------
        FormatError
            If it is damaged, or expands beyond the limit.
        XfastError
            If it needs a module that is missing.
        """
        source = self
        try:
            for _ in range(NESTING_LIMIT):
                codec, body = _compression(source)
                if not codec:
                    return source
                fd = _expand(source, codec, body, limit)
                source = Source(self.path, fd, None, source, codec, body)
                source.lifted = limit != EXPAND_LIMIT
            raise FormatError(self.path, 0, f"expected fewer layers, got {source.container}")
        except BaseException:
            source.close()
            raise

    def whole(self) -> IO[bytes]:
        """Return all bytes as a file, to be read from its start and closed."""
        return os.fdopen(os.dup(self.fd), "rb")

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_device(self) -> bool:
        """Whether the bytes lie on a block device, which has room behind them."""
        return stat.S_ISBLK(self.mode)

    @property
    def base(self) -> Source:
        """The file itself, as it lies on the disk."""
        return self.outer.base if self.outer else self

    @property
    def stamp(self) -> Stamp:
        """What tells that the file is the same one, unchanged: as it was when it was opened."""
        return self.outer.stamp if self.outer else self.stamp_here

    @property
    def stored(self) -> int:
        """How many bytes the file itself takes on the disk.

        Holes, and what packs well, cost nothing to make, and count nothing.
        """
        base = self.base
        return base.size if base.is_device else os.fstat(base.fd).st_blocks * 512

    def require_stored(self, total: int, least: int, ratio: float, offset: int | None) -> None:
        """Check that state takes no more bytes than `least`, or `ratio` times the file's own.

        Raises
        ------
        FormatError
            If it does, and nobody gave an --expand-limit: it was made of holes, or packs too well
            to be anybody's.
        """
        if not self.lifted and total > least and total > ratio * self.stored:
            raise FormatError(
                self.path,
                offset,
                f"expected areas that are stored, got {total} bytes of it in a file that takes "
                f"{self.stored} on the disk" + "; see --expand-limit" * bool(self.outer),
            )

    def _refuse(self, offset: int, length: int) -> NoReturn:
        raise FormatError(
            self.path,
            offset,
            f"expected {length} bytes, got {max(0, self.size - max(0, offset))} "
            f"(of {self.size} in all)",
        )

    def _fetch(self, offset: int, length: int) -> bytes:
        self.bytes_read += length
        data = read_at(self.fd, length, offset)
        if len(data) < length:
            raise FormatError(
                self.path,
                offset + len(data),
                f"expected {length - len(data)} bytes more, got the end",
            )
        if not offset and length <= CHUNK:
            self.head = data  # whoever tells formats apart reads this, and the format again
        return data

    def unpack(self, fmt: str, offset: int) -> tuple[Any, ...]:
        """Return the values that lie at `offset` in the struct format `fmt`."""
        return struct.unpack(fmt, self.read(offset, struct.calcsize(fmt)))

    def chunks(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield the bytes from `start` to `end` in pieces of bounded size."""
        end = self.size if end is None else end
        for offset in range(start, end, CHUNK):
            yield self.read(offset, min(CHUNK, end - offset))

    def stored_runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield start and end of what lies between two offsets, without the file's holes."""
        while start < end:
            try:
                start = os.lseek(self.fd, start, os.SEEK_DATA)
                stop = os.lseek(self.fd, start, os.SEEK_HOLE)
            except OSError as problem:
                if problem.errno == errno.ENXIO:  # only a hole is left
                    return
                stop = end  # a file system, or device, that can't tell
            if start < end:
                yield start, min(stop, end)
            start = stop

    def view(self, offset: int, length: int | None = None) -> View:
        """Return a part as a Source of its own: `length` bytes (or all the rest) at `offset`."""
        length = self.size - offset if length is None else length
        return View(self, length, lambda at: (offset + at, length - at))

    def runs(self, offset: int, length: int) -> list[tuple[int | None, int]]:
        """Return where bytes lie in the file, after decompression: (offset, length) of each run.

        The offset of zeros that the file does not store is None.
        """
        self.read(offset, 0)
        return [(offset, length)]

    def rewrite(self, splices: Iterable[Splice], out: IO[bytes]) -> None:
        """Write the whole file anew, with edits, packed as it was.

        Parameters
        ----------
        splices : iterable of Splice
            Edits, of the bytes after decompression. None of them: the file as it is.
        out : binary file
            Empty, opened for writing; a real file.

        Raises
        ------
        FormatError
            If a splice's old bytes are not what the file holds.
        """
        edits = self._checked(splices)
        if not edits or (self.outer is None and not _moving(edits)):
            base = self.base
            copy_bytes(base.fd, out.fileno(), base.size)
            for edit in edits:
                write_all(out.fileno(), edit.new, edit.offset)
            return
        size = self.size + sum(len(edit.new) - len(edit.old) for edit in edits)
        with self._packer(out, size) as file:
            position = 0
            for edit in edits:
                for piece in self.chunks(position, edit.offset):
                    file.write(piece)
                file.write(edit.new)
                position = edit.offset + len(edit.old)
            for piece in self.chunks(position):
                file.write(piece)

    def patch(self, splices: Iterable[Splice], fd: int) -> None:
        """Write edits into `fd`, the same file opened for writing: only the pages they touch.

        Raises
        ------
        FormatError
            If the file is compressed, a splice's old bytes are not what it holds, or an edit
            changes its length.
        """
        edits = self._checked(splices)
        if self.outer or _moving(edits):
            raise FormatError(
                self.path,
                None,
                "expected a file to edit in place, "
                f"got {self.codec or 'edits that change its length'}",
            )
        for edit in edits:
            write_all(fd, edit.new, edit.offset)
        self.head = b""

    def _checked(self, splices: Iterable[Splice]) -> list[Splice]:
        self.head = b""  # what the file holds counts, not what it held
        edits = sorted(splices)
        end = 0
        for edit in edits:
            if edit.offset < end:
                raise ValueError(f"splices: expected edits apart from each other, got {edit}")
            if self.read(edit.offset, len(edit.old)) != edit.old:
                raise FormatError(
                    self.path, edit.offset, f"found other bytes than {edit.field} had when read"
                )
            end = edit.offset + len(edit.old)
        return edits

    @contextlib.contextmanager
    def _packer(self, out: IO[bytes], size: int | None) -> Iterator[IO[bytes]]:
        """Yield where to write this source's `size` bytes, so that `out` is packed as it was."""
        if self.outer is None:
            yield out
            return
        head = self.outer.read(self.body, min(HEAD_SIZE, self.outer.size - self.body))
        with self.outer._packer(out, None) as around:
            for piece in self.outer.chunks(0, self.body):
                around.write(piece)
            with CODECS[self.codec](around, "wb", head, size) as file:
                yield file


class View(Source):
    """A part of a Source, or pieces of it in another order (a disk image's clusters).

    Parameters
    ----------
    source : Source
    size : int
        Bytes.
    locate : callable
        Where each byte of the view lies in `source`.

    Raises
    ------
    FormatError
        If no file has so many bytes.
    """

    def __init__(self, source: Source, size: int, locate: Locate) -> None:
        if size > sys.maxsize:  # as a file may say
            raise FormatError(
                source.path, None, f"expected at most {sys.maxsize} bytes, got {size}"
            )
        self.path = source.path
        self.source = source
        self.size = size
        self.locate = locate
        self.container = source.container

    @property
    def is_device(self) -> bool:
        """Whether the bytes lie on a block device, which has room behind them."""
        return self.source.is_device

    def close(self) -> None:
        """Leave the file to its owner."""

    @property
    def stored(self) -> int:
        """How many bytes the source truly takes; see `Source.stored`."""
        return self.source.stored

    def require_stored(self, total: int, least: int, ratio: float, offset: int | None) -> None:
        """Check that state takes no more bytes than it can; see `Source.require_stored`."""
        self.source.require_stored(total, least, ratio, offset)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int | None, int]]:
        while length:
            start, left = self.locate(offset)
            count = min(left, length)
            yield start, count
            offset += count
            length -= count

    def _fetch(self, offset: int, length: int) -> bytes:
        self.bytes_read += length
        return b"".join(
            bytes(count) if start is None else self.source.read(start, count)
            for start, count in self._pieces(offset, length)
        )

    def stored_runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield start and end of what lies between two offsets: all of it."""
        if start < end:
            yield start, end

    def runs(self, offset: int, length: int) -> list[tuple[int | None, int]]:
        """Return where bytes lie in the file; see `Source.runs`."""
        self.read(offset, 0)
        found: list[tuple[int | None, int]] = []
        for start, count in self._pieces(offset, length):
            found += [(None, count)] if start is None else self.source.runs(start, count)
        return found

    def rewrite(self, splices: Iterable[Splice], out: IO[bytes]) -> None:
        """Write the whole file anew; see `Source.rewrite`. Offsets are the file's."""
        self.source.rewrite(splices, out)

    def patch(self, splices: Iterable[Splice], fd: int) -> None:
        """Write edits in place; see `Source.patch`. Offsets are the file's."""
        self.source.patch(splices, fd)
        self.head = b""


def _stdin(limit: int) -> int:
    """Return standard input as a regular file."""
    if stat.S_ISREG(os.fstat(0).st_mode):
        return os.dup(0)
    with os.fdopen(os.dup(0), "rb") as file:
        return _spool("-", file, limit)


def _compression(source: Source) -> tuple[str, int]:
    """Return the codec and the offset of what is compressed in `source`, or ("", 0)."""
    start = source.read(0, min(16, source.size))
    if not start.startswith(PACKED):
        return "", 0
    header = libvirt.header(source)
    if header:
        return (header.compression, header.body) if header.compression in CODECS else ("", 0)
    return next((name for magic, name in MAGICS.items() if start.startswith(magic)), ""), 0


def _expand(source: Source, codec: str, body: int, limit: int) -> int:
    if limit == EXPAND_LIMIT:
        limit = min(limit, max(EXPAND_LEAST, EXPAND_RATIO * source.base.size))
    with source.whole() as packed:
        packed.seek(body)
        try:
            with CODECS[codec](packed, "rb") as file:
                return _spool(source.path, file, limit)
        except FormatError:
            raise
        except XfastError as problem:
            raise XfastError(f"{source.path}: {problem}") from None


def _spool(path: str, file: IO[bytes], limit: int) -> int:
    """Copy `file` into an anonymous temporary file and return its descriptor."""
    import tempfile

    with tempfile.TemporaryFile() as spool:
        total = 0
        while True:
            try:
                chunk = file.read(CHUNK)
            except Exception as problem:  # each codec has errors of its own
                raise FormatError(
                    path, total, f"found damage in what is compressed: {problem}"
                ) from None
            if not chunk:
                break
            total += len(chunk)
            if total > limit:
                raise FormatError(
                    path,
                    limit,
                    f"expected at most {limit} bytes, got more: "
                    "raise the limit with --expand-limit",
                )
            try:
                spool.write(chunk)
            except OSError as problem:
                raise XfastError(
                    f"no room to expand it in {tempfile.gettempdir()}: {problem.strerror}"
                ) from None
        spool.flush()
        return os.dup(spool.fileno())


def _moving(edits: list[Splice]) -> bool:
    """Tell whether edits move what lies behind them."""
    return any(len(edit.old) != len(edit.new) for edit in edits)


__all__ = ["EXPAND_LIMIT", "JOURNAL", "Source", "View"]
