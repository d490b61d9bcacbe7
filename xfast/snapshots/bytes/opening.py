"""Opening a file by its path: a regular one or a block device, and none that waits for its journal.

Most files are opened by one call of the engine. Where that declines, each step is taken by itself,
and the one that fails says why.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from xfast.engine import files
from xfast.errors import FormatError, XfastError
from xfast.snapshots.bytes.entry import Entry, way_to

if TYPE_CHECKING:
    from xfast.snapshots.model import Stamp

HEAD = 512
"""Bytes that are read when a file is opened: all that most formats are told by."""

JOURNAL = ".xfast-journal"
"""What the journal of an edit in place is called, behind the file's name."""

Found = tuple[int, "Stamp", bytes]
"""What is known of a file when it is opened: its mode, its stamp, and its head."""

Opened = tuple[int, Found]
"""The same behind its descriptor."""


class DirectoryError(FormatError):
    """Where a file was expected there is a directory."""


def status_of(fd: int) -> Found:
    """Return what is to be known of a file from the start: its mode, stamp and head."""
    status = os.fstat(fd)
    stamp = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    return status.st_mode, stamp, os.pread(fd, HEAD, 0)


def regular(name: str) -> Opened:
    """Open a regular file or a block device; anything else might never end, or act when opened.

    Raises
    ------
    DirectoryError
        If it is a directory.
    """
    try:
        if not isinstance(name, Entry):
            return files.opened(name, name + JOURNAL) or _opened(name, None, name, 0)
        with way_to(name) as (folder, last, flags):
            quick = files.opened(last, name + JOURNAL, folder)
            return quick or _opened(name, folder, last, flags)
    except (OSError, ValueError) as problem:
        if isinstance(problem, XfastError):
            raise
        reason = getattr(problem, "strerror", None) or problem
        raise XfastError(f"{name}: can't be opened: {reason}") from None


def _opened(name: str, folder: int | None, last: str, flags: int) -> Opened:
    """Open `last` in a folder, after a look at what it is; see `way_to`."""
    _check_kind(name, os.stat(last, dir_fd=folder, follow_symlinks=not flags).st_mode)
    if _is_there(name + JOURNAL):
        raise FormatError(
            name,
            None,
            f"expected a whole file, got an interrupted edit ({JOURNAL} beside it): "
            "xfast fix --in-place undoes it first",
        )
    fd = os.open(last, flags | os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
    try:
        found = status_of(fd)
        _check_kind(name, found[0])  # it may be another one by now
    except FormatError:
        os.close(fd)
        raise
    return fd, found


def _is_there(path: str) -> bool:
    """Tell whether there is anything of this name, or it can't be told that there is nothing."""
    try:
        os.lstat(path)
    except OSError as problem:
        return problem.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
    return True


def _check_kind(name: str, mode: int) -> None:
    """Raise FormatError unless a mode is that of a file or a block device."""
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return
    if stat.S_ISDIR(mode):
        raise DirectoryError(name, None, "expected a file or a block device, got a directory")
    kind = "a character device, pipe or socket"
    if stat.S_ISLNK(mode):
        kind = "a symbolic link, which is followed only where it is named"
    raise FormatError(name, None, f"expected a file or a block device, got {kind}")
