"""Files in the making: written beside their place under a name of their own, then published.

A reader finds the old file, or the new one with all its bytes on the disk; never a part.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from typing import IO

from xfast.errors import XfastError
from xfast.store.access import (
    LIST,
    Access,
    access_of,
    drop_lists,
    give,
    restrict,
    safe_list,
    without_group,
)
from xfast.store.names import PRIVATE, SAFE_MODE, Directory, same, umask

TEMPORARY = ".{}.xfast-new"
"""What a file is called until it is published."""

KEPT_ATTRIBUTES = ("user.", LIST, "security.selinux")
"""The extended attributes that a new file takes over. Not, above all, security.capability."""


class Staged:
    """A file in the making, beside the place that `publish` gives it. A context manager.

    Until then only its owner can open it. Leaving the context removes what was not published,
    whatever happened.

    Parameters
    ----------
    folder : Directory
    name : str
        What it is to be called there.

    Raises
    ------
    XfastError
        If another process is writing the same file.
    OSError
        If the folder can't be written.
    """

    def __init__(self, folder: Directory, name: str) -> None:
        self.folder = folder
        self.name = name
        self.path = folder.path_of(name)
        self.temporary = TEMPORARY.format(name)
        self.file: IO[bytes] = os.fdopen(self._create(), "w+b")

    def _create(self) -> int:
        """Create the temporary file; one that a killed process left is removed first."""
        for _ in range(2):
            with contextlib.suppress(FileExistsError):
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
                fd = self.folder.open_file(self.temporary, flags, PRIVATE)
                fcntl.flock(fd, fcntl.LOCK_EX)
                return fd
            if not _remove_left_over(self.folder, self.temporary):
                break
        raise XfastError(f"{self.path}: another process is writing it")

    @property
    def published(self) -> bool:
        """Whether the file has its place, even if a step after that failed, or a signal came."""
        return same(self.folder.status(self.name), os.fstat(self.file.fileno()))

    def flush(self) -> int:
        """Hand over what Python holds back; return the descriptor, to read it again."""
        self.file.flush()
        return self.file.fileno()

    def take_over(self, original: Access | None, *, owned: bool = True) -> None:
        """Take over an original's permissions, under the umask, and its owner if we may."""
        if original is not None:
            restrict(self.flush(), original, owned=owned)
        else:
            os.fchmod(self.flush(), SAFE_MODE & ~umask())

    def resemble(self, original: int, *, strict: bool = True) -> None:
        """Take over permissions, owner, times and extended attributes of an open file.

        Raises
        ------
        OSError
            If this process may not give it that owner, and `strict` asks for it.
        """
        status, access = os.fstat(original), access_of(original)
        fd = self.file.fileno()
        drop_lists(fd)
        mode = access.mode
        names: list[str] = []
        with contextlib.suppress(OSError, AttributeError):  # a system without them
            names = [name for name in os.listxattr(original) if name.startswith(KEPT_ATTRIBUTES)]
        for name in names:
            with contextlib.suppress(OSError):  # not ours to give
                value = os.getxattr(original, name)
                os.setxattr(fd, name, safe_list(value) if name == LIST else value)
                if name == LIST:
                    mode = stat.S_IMODE(status.st_mode)  # the group's bits are the list's mask
        if not give(fd, status.st_uid, status.st_gid):
            mode = without_group(mode)
        own = os.fstat(fd)
        if strict and (own.st_uid, own.st_gid) != (status.st_uid, status.st_gid):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), self.path)
        os.fchmod(fd, mode & SAFE_MODE)
        os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))

    def publish(self, *, replace: bool = False, instead_of: int | None = None) -> None:
        """Give the file its place, with all its bytes on the disk.

        Parameters
        ----------
        replace : bool
            A file that has its name is replaced.
        instead_of : int, optional
            That open file is replaced, and no other which came there meanwhile.

        Raises
        ------
        XfastError
            If there is a file of this name, unless it is to be replaced; or if somebody
            meddled with the temporary file.
        """
        os.fsync(self.flush())
        own = os.fstat(self.file.fileno())
        if own.st_nlink != 1 or not same(self.folder.status(self.temporary), own):
            raise XfastError(f"{self.path}: somebody exchanged or linked the file in the making")
        try:
            if instead_of is None or not self._exchange(instead_of):
                replace = replace or instead_of is not None
                self.folder.rename(self.temporary, self.name, replace=replace)
        except FileExistsError:
            raise XfastError(f"{self.path}: exists; expected a new name") from None
        self.temporary = ""
        self.folder.sync()
        if not same(self.folder.status(self.name), own):
            raise XfastError(f"{self.path}: somebody exchanged the file that was published")

    def _exchange(self, original: int) -> bool:
        """Take the place of an open file, and of no other; return False where the system can't.

        Between a look at what has the name and a rename() to it somebody may put a newer file
        there, which would be lost. The old one is locked while it has the temporary name, so that
        no other process takes it for one that a killed process left.

        *Source*: rename(2), RENAME_EXCHANGE.
        """
        temporary = self.temporary
        try:
            fcntl.flock(original, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise XfastError(f"{self.path}: another process is writing it") from None
        try:
            if not self.folder.exchange(temporary, self.name):
                return False
            if not same(self.folder.status(temporary), os.fstat(original)):
                self.temporary = ""  # another's, which stays, should it not go back
                self.folder.exchange(temporary, self.name)
                self.temporary = temporary
                raise XfastError(f"{self.path}: another file has taken its place since it was read")
            with contextlib.suppress(FileNotFoundError):
                self.folder.remove(temporary)
        finally:
            fcntl.flock(original, fcntl.LOCK_UN)
        return True

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):  # a full disk: flushing would fail again
            self.file.close()
        if self.temporary:
            with contextlib.suppress(FileNotFoundError):
                self.folder.remove(self.temporary)


def write_text(path: str, text: str, *, replace: bool = False) -> None:
    """Write a file of its own: an answer that is kept instead of printed.

    Raises
    ------
    XfastError
        If it can't be written, if a symbolic link lies on the way, or if something stands there:
        a regular file may be replaced, if that is asked for, and nothing else.
    """
    try:
        folder, name = Directory.around(path)
        with folder, Staged(folder, name) as staged:
            status = folder.status(name)
            if status is not None and not (replace and stat.S_ISREG(status.st_mode)):
                raise XfastError(f"{path}: exists; expected a new name")
            staged.file.write(text.encode("utf-8", "surrogateescape"))
            staged.take_over(None)
            staged.publish(replace=replace)
    except OSError as problem:
        raise XfastError(f"{path}: {problem.strerror}") from None


def _remove_left_over(folder: Directory, name: str) -> bool:
    """Remove a temporary file, unless a process that lives has it locked; return whether."""
    try:
        fd = folder.open_file(name, os.O_RDWR)  # a lock on NFS needs it
    except PermissionError:
        fd = folder.open_file(name)  # its permissions were set already
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.remove(name)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def sweep(folder: Directory, *names: str) -> None:
    """Remove what a killed process left of files with these names, where nobody writes them."""
    for name in names:
        temporary = TEMPORARY.format(name)
        if folder.status(temporary):
            with contextlib.suppress(OSError):  # reported when the name is needed
                _remove_left_over(folder, temporary)
