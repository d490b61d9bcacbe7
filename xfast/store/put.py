"""The one safe writer: every result goes through `Put`, whoever made it.

A new file is staged, read back, checked, recorded and only then published; a large one is patched
where it lies, under a journal. Before anything changes the original must still be the file that
was read, and nobody may have it open for writing.
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from xfast.errors import XfastError
from xfast.snapshots.bytes.copying import copy_bytes
from xfast.snapshots.bytes.source import EXPAND_LIMIT, JOURNAL, Source
from xfast.snapshots.model import Splice, Stamp
from xfast.store.access import Access, access_of
from xfast.store.journal import Site, Warrant, patch
from xfast.store.names import BACKUP, SAFE_MODE, Directory, require_one_name, same
from xfast.store.record import Note, complete, sha256
from xfast.store.staged import Staged

PATCH_FROM = 64 << 20
"""Files from this size on (bytes) are patched where they lie, unless a copy shares its blocks."""

FICLONE = 0x40049409
"""The ioctl that makes a file share the blocks of another (Linux include/uapi/linux/fs.h)."""

Fill = Callable[[IO[bytes]], None]
"""Writes all that a file is to hold."""

Check = Callable[[Source], None]
"""Raises where what was written is not what was meant."""


def stamp_of(fd: int) -> Stamp:
    """Return what tells that a file is the same one, unchanged."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class Original:
    """The file that is read, and what tells that it stays as it was.

    Parameters
    ----------
    path : str
        What it is called in messages.
    fd : int
        It, open for reading.
    folder, name : Directory, str, optional
        Where it lies, if it is to be changed there. Then its name must go on to be this file's.
    stamp : Stamp, optional
        What it was when it was read; default: what it is now.

    Raises
    ------
    XfastError
        If it changed since it was read.
    """

    def __init__(
        self,
        path: str,
        fd: int,
        folder: Directory | None = None,
        name: str = "",
        stamp: Stamp | None = None,
    ) -> None:
        self.path = path
        self.fd = fd
        self.folder = folder
        self.name = name
        self.status = os.fstat(fd)
        self.access = access_of(fd)
        self.stamp = stamp or stamp_of(fd)
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        if stamp_of(self.fd) != self.stamp:
            raise XfastError(f"{self.path}: changed since it was read; nothing was written")

    def require_at_rest(self) -> None:
        """Raise XfastError if the file is open for writing, or is not what was read.

        *Source*: fcntl(2), "Leases": a read lease is refused while anyone has the file open for
        writing. Where leases do not work (another owner's file, a network file system) only
        changes are noticed.
        """
        if self.folder and not same(self.folder.status(self.name), self.status):
            raise XfastError(f"{self.path}: another file has taken its place since it was read")
        self._require_unchanged()
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETSIG, signal.SIGURG)  # SIGIO, the default, would end us
            fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except BlockingIOError:
            raise XfastError(f"{self.path}: is open for writing; expected a file at rest") from None
        except OSError:
            return
        fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def open_in(folder: Directory, name: str) -> int:
    """Open a file that is to be changed in place.

    Raises
    ------
    XfastError
        If it is a symbolic link or no regular file, or is being patched.
    OSError
        If it can't be opened.
    """
    path = folder.path_of(name)
    status = folder.status(name)
    if status is not None and stat.S_ISLNK(status.st_mode):
        raise XfastError(f"{path}: is a symbolic link; name the file itself")
    if status is not None and not stat.S_ISREG(status.st_mode):  # opening a device may act
        raise XfastError(f"{path}: is no regular file, which alone can be changed in place")
    if folder.status(name + JOURNAL) is not None:
        raise XfastError(
            f"{path}: expected a whole file, got an interrupted edit ({JOURNAL} beside it): "
            "xfast fix --in-place undoes it first"
        )
    fd = folder.open_file(name)
    if not same(os.fstat(fd), status):
        os.close(fd)
        raise XfastError(f"{path}: somebody exchanged it while it was opened")
    return fd


@dataclass
class Put:
    """One result on its way to its place.

    Parameters
    ----------
    folder, name : Directory, str
        Where it is to be.
    original : Original or None
        What it was made from; in place: what it replaces.
    access : Access or None
        What it may give where it has no one original.
    in_place : bool
    backup : bool
        Keep what is replaced as ``NAME.orig``.
    note : Note or None
        The record of the change, which is published first.
    row : dict or None
        The file's row in a record, completed when the result is there.
    expand_limit : int
        What compressed data may expand to (bytes), when the result is read back.
    """

    folder: Directory
    name: str
    original: Original | None = None
    access: Access | None = None
    in_place: bool = False
    backup: bool = False
    note: Note | None = None
    row: dict[str, str] | None = None
    expand_limit: int = EXPAND_LIMIT

    @property
    def path(self) -> str:
        """What the result is called in messages."""
        return self.folder.path_of(self.name)

    def write(self, fill: Fill, check: Check) -> None:
        """Write the whole file, read it back, and give it its place.

        Raises
        ------
        XfastError
            If the original is in use or changed, or something stands in the way.
        OSError
            If something can't be written.
        """
        if self.in_place:
            self._require_one_name()
        self._require_at_rest()
        with Staged(self.folder, self.name) as staged:
            fill(staged.file)
            again = os.dup(staged.flush())
            with Source.open(self.path, fd=again, expand_limit=self.expand_limit) as source:
                check(source)
                if self.row is not None:
                    complete(self.row, source)
            if self.original and self.in_place:
                staged.resemble(self.original.fd)
            else:
                staged.take_over(self.original.access if self.original else self.access)
            if not self.note:
                self._publish(staged)
                return
            with self.note.standing(lambda: staged.published):
                self._publish(staged)

    def _publish(self, staged: Staged) -> None:
        self._require_at_rest()
        linked = self.backup and self._keep()
        try:
            staged.publish(instead_of=self._replaced())
        except BaseException:
            if linked and not staged.published:
                self.folder.remove(self.name + BACKUP)
            raise

    def patch(self, source: Source, edits: Sequence[Splice], check: Callable[[], None]) -> None:
        """Write edits of equal length where they lie; `check` reads them back.

        Raises
        ------
        XfastError, FormatError, OSError
            As `xfast.store.journal.patch` and `write` do.
        """
        assert self.original
        assert self.note
        assert self.row is not None
        require_one_name(self.path, self.original.status)
        self.row["after"] = sha256(self.original.fd, edits)
        with self.note.standing(self._is_done) as nonce:
            copied = self.backup and not self._has_backup()
            if copied:
                self._copy_backup()
            try:
                self.patch_under(Warrant(self.note.path, nonce), source, edits, check)
            except BaseException:
                if copied and not self._is_done() and self._has_backup():
                    self.folder.remove(self.name + BACKUP)
                raise

    def patch_under(
        self,
        warrant: Warrant,
        source: Source,
        edits: Sequence[Splice],
        check: Callable[[], None],
    ) -> None:
        """Write edits where they lie, under a record that is there already."""
        self._require_at_rest()
        patch(Site.beside(self.folder, self.name), source, edits, check, warrant)

    def patches(self, source: Source, edits: Sequence[Splice]) -> bool:
        """Tell whether to edit the file where it lies: a whole new one would cost its size."""
        moving = any(len(edit.old) != len(edit.new) for edit in edits)
        if not self.in_place or source.outer or moving or source.size < PATCH_FROM:
            return False
        with Staged(self.folder, self.name) as trial:
            return not clone(source.fd, trial.file.fileno())

    def _replaced(self) -> int | None:
        """Return the open file that the result replaces; None for a new one."""
        return self.original.fd if self.original and self.in_place else None

    def _require_at_rest(self) -> None:
        if self.original:
            self.original.require_at_rest()

    def _require_one_name(self) -> None:
        """Raise XfastError if a file has other names than its own and its backup's."""
        assert self.original
        kept = same(self.folder.status(self.name + BACKUP), self.original.status)
        require_one_name(self.path, os.fstat(self.original.fd), 1 + kept)

    def _is_done(self) -> bool:
        """Tell whether the file is already what it is to be, or a journal waits for its record."""
        assert self.row is not None
        if self.folder.status(self.name + JOURNAL) is not None:
            return True
        with open(self.folder.open_file(self.name), "rb") as file:
            return sha256(file.fileno()) == self.row["after"]

    def _keep(self) -> bool:
        """Give the file that is about to be replaced a second name; False if it has it already."""
        assert self.original
        if self.original.status.st_mode & ~SAFE_MODE & 0o7777:
            os.fchmod(self.original.fd, stat.S_IMODE(self.original.status.st_mode) & SAFE_MODE)
        name = self.name + BACKUP
        try:
            self.folder.link(self.name, name)
        except FileExistsError:
            if not same(self.folder.status(name), self.original.status):
                raise XfastError(
                    f"{self.folder.path_of(name)}: exists; expected a new name"
                ) from None
            return False
        return True

    def _has_backup(self) -> bool:
        """Tell whether a run that was interrupted made the copy already."""
        assert self.row is not None
        try:
            fd = self.folder.open_file(self.name + BACKUP)
        except OSError:
            return False
        with open(fd, "rb"):
            status = os.fstat(fd)
            alone = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            return alone and sha256(fd) == self.row["before"]

    def _copy_backup(self) -> None:
        assert self.original
        with Staged(self.folder, self.name + BACKUP) as staged:
            copy_bytes(self.original.fd, staged.file.fileno(), self.original.status.st_size)
            staged.resemble(self.original.fd)
            self._require_at_rest()
            staged.publish()


def clone(source: int, target: int) -> bool:
    """Make an empty file share the blocks of another; return whether the file system can."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError:
        return False
    return True
