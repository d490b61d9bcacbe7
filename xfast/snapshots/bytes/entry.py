"""Paths that were found and not named: what lies below a directory is opened through no link.

Who names a path means what it leads to. What a walk finds in a directory may be somebody else's,
and may become a link at any moment: each component below the directory that was named is opened
relative to the one before it, with O_NOFOLLOW.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

WAY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


class Entry(str):
    """A path found below `root`, a directory that was named."""

    root: str

    def __new__(cls, path: str, root: str = "") -> Entry:
        """Return `path` as found below `root`."""
        entry = super().__new__(cls, path)
        entry.root = root
        return entry


def found(folder: str, name: str) -> Entry:
    """Return the path of `name` in a directory, which was named or found itself."""
    return Entry(os.path.join(folder, name), folder.root if isinstance(folder, Entry) else folder)


def found_as(path: str, other: str) -> str:
    """Return another path in the directory of `path`, found as that is, or named."""
    return Entry(other, path.root) if isinstance(path, Entry) else other


@contextlib.contextmanager
def way_to(path: str) -> Iterator[tuple[int | None, str, int]]:
    """Yield how to open a path: the directory's descriptor, the name in it, and further flags.

    For a path that was named: no directory, the whole path, and no flags.

    Raises
    ------
    OSError
        If a component between is a link, or no directory.
    """
    if not isinstance(path, Entry):
        yield None, path, 0
        return
    fd = os.open(path.root, WAY)
    try:
        *between, last = path[len(path.root) :].strip("/").split("/")
        for name in between:
            below = os.open(name, WAY | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd, last, os.O_NOFOLLOW
    finally:
        os.close(fd)


def status_of(path: str) -> os.stat_result:
    """Return the status of what a path leads to, or of the entry itself if it was found.

    Raises
    ------
    OSError
        If there is none.
    """
    with way_to(path) as (folder, name, flags):
        return os.stat(name, dir_fd=folder, follow_symlinks=not flags)


def is_folder(path: str) -> bool:
    """Tell whether a path is a directory; one that was found is none if it is a link."""
    try:
        return stat.S_ISDIR(status_of(path).st_mode)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def opened_folder(path: str) -> Iterator[int]:
    """Yield a directory's descriptor, to list it.

    Raises
    ------
    OSError
        If it can't be opened.
    """
    with way_to(path) as (folder, name, flags):
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | flags, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)
