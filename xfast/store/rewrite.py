"""Files that change as a whole or not at all: staged, published, patched with a journal.

A new file is written beside its place under a name of its own, brought to the disk, and only
then linked or renamed to where it belongs. A large file is patched where it lies: what the edits
replace is first written into a journal, from which `recover` puts it back.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from xfast.errors import XfastError
from xfast.snapshots.bytes.source import JOURNAL, Source
from xfast.snapshots.model import Splice, Stamp

NOFOLLOW = os.O_NOFOLLOW | os.O_CLOEXEC
JOURNAL_LIMIT = 64 << 20
"""No journal is larger than this (bytes): areas are small, and one edit touches few."""

FICLONE = 0x40049409
"""The ioctl that makes a file share the blocks of another (Linux include/uapi/linux/fs.h)."""

TEMPORARY = ".{}.xfast-new"
"""What a file is called until it is published."""


class Staged:
    """A file in the making, beside the place that `publish` gives it. A context manager.

    Leaving the context removes what was not published, whatever happened.

    Parameters
    ----------
    path : str
        Where it is to be; never followed where it is a symbolic link.
    mode : int
        Its permissions.

    Raises
    ------
    XfastError
        If another process is writing the same file.
    OSError
        If the folder can't be written.
    """

    def __init__(self, path: str, mode: int = 0o644) -> None:
        self.path = path
        folder, self.name = os.path.split(path)
        self.folder = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.temporary = TEMPORARY.format(self.name)
        try:
            self.file: IO[bytes] = os.fdopen(self._create(), "w+b")
            os.fchmod(self.file.fileno(), mode)
        except BaseException:
            os.close(self.folder)
            raise

    @property
    def temporary_path(self) -> str:
        """Where the file is until it is published."""
        return os.path.join(os.path.dirname(self.path), self.temporary)

    def _create(self) -> int:
        """Create the temporary file; one that a killed process left is removed first."""
        for _ in range(2):
            with contextlib.suppress(FileExistsError):
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | NOFOLLOW
                fd = os.open(self.temporary, flags, 0o600, dir_fd=self.folder)
                fcntl.flock(fd, fcntl.LOCK_EX)
                return fd
            if not _removed(self.temporary, self.folder):
                break
        raise XfastError(f"{self.path}: another process is writing it")

    def publish(self, *, replace: bool = False) -> None:
        """Give the file its place, with all its bytes on the disk.

        Raises
        ------
        XfastError
            If there is a file of this name, unless it is to be replaced.
        """
        self.file.flush()
        os.fsync(self.file.fileno())
        at = {"src_dir_fd": self.folder, "dst_dir_fd": self.folder}
        if replace:
            os.rename(self.temporary, self.name, **at)
        else:
            try:
                os.link(self.temporary, self.name, follow_symlinks=False, **at)
            except FileExistsError:
                raise XfastError(f"{self.path}: exists; needed a new name") from None
            os.unlink(self.temporary, dir_fd=self.folder)
        self.temporary = ""
        os.fsync(self.folder)

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            with contextlib.suppress(OSError):  # a full disk: flushing would fail again
                self.file.close()
            if self.temporary:
                os.unlink(self.temporary, dir_fd=self.folder)
        finally:
            os.close(self.folder)


def _removed(name: str, folder: int) -> bool:
    """Remove a temporary file, unless a process that lives has it locked; return whether."""
    fd = os.open(name, os.O_RDWR | os.O_NONBLOCK | NOFOLLOW, dir_fd=folder)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=folder)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def sweep(path: str) -> None:
    """Remove what a killed process left beside `path`, where nobody is writing it."""
    where, name = os.path.split(path)
    if not os.path.lexists(os.path.join(where, TEMPORARY.format(name))):
        return
    folder = os.open(where or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # reported when the name is needed
            _removed(TEMPORARY.format(name), folder)
    finally:
        os.close(folder)


def stamp_of(fd: int) -> Stamp:
    """Return what tells that a file is the same one, unchanged."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def refuse_if_busy(path: str, fd: int, stamp: Stamp, *, named: bool) -> None:
    """Raise XfastError if a file is open for writing, or changed since it was read.

    Parameters
    ----------
    path, fd
        The file, and it opened for reading.
    stamp : Stamp
        What it was when it was read.
    named : bool
        `path` itself must still be this file, and no symbolic link to it.

    *Source*: fcntl(2), "Leases": a read lease is refused while anyone has the file open for
    writing. Where leases do not work (another owner's file, a network file system) only
    changes are noticed.
    """
    if named:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            raise XfastError(f"{path}: is a symbolic link; name the file itself")
        if (status.st_dev, status.st_ino) != stamp[:2]:
            raise XfastError(f"{path}: another file has taken its place since it was read")
    if stamp_of(fd) != stamp:
        raise XfastError(f"{path}: changed since it was read; nothing was written")
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # SIGIO, the default, would end us
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        raise XfastError(f"{path}: is open for writing; needed a file at rest") from None
    except OSError:
        return
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def make_like(fd: int, original: int) -> None:
    """Give a file the owner, mode, times and extended attributes of another.

    Raises
    ------
    OSError
        If this process may not give it that owner.
    """
    status = os.fstat(original)
    if (status.st_uid, status.st_gid) != (os.fstat(fd).st_uid, os.fstat(fd).st_gid):
        os.fchown(fd, status.st_uid, status.st_gid)
    os.fchmod(fd, stat.S_IMODE(status.st_mode))
    with contextlib.suppress(OSError):  # a file system without them, or not ours to set
        for name in os.listxattr(original):
            os.setxattr(fd, name, os.getxattr(original, name))
    os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))


def clone(source: int, target: int) -> bool:
    """Make an empty file share the blocks of another; return whether the file system can."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError:
        return False
    return True


def patch(source: Source, edits: Sequence[Splice], check: Callable[[], None]) -> None:
    """Write edits where they lie in a file: only the pages they touch.

    While they are written a journal lies beside the file, and nothing of ours reads it; after a
    crash `recover` undoes what was written.

    Parameters
    ----------
    source : Source
        The file, not compressed; the edits leave its length as it is.
    edits : sequence of Splice
    check : callable
        Called when the edits are written; where it raises they are undone.

    Raises
    ------
    XfastError
        If another process is writing the file, or there is a journal already.
    FormatError
        If an edit's old bytes are not what the file holds.
    OSError
        If it can't be written; what was written is undone.
    """
    rows = [{"offset": e.offset, "old": e.old.hex(), "new": e.new.hex()} for e in edits]
    with _locked(source.path) as fd:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        with Staged(source.path + JOURNAL, mode) as staged:
            staged.file.write(json.dumps({"size": source.size, "edits": rows}).encode())
            staged.publish()
        try:
            source.patch(edits, fd)
            check()
        except BaseException:
            _undo(source.path, fd, source.size, edits)
            _finish(source.path, fd)
            raise
        _finish(source.path, fd)


def recover(path: str) -> bool:
    """Undo a patch that was interrupted; return whether there was one.

    Raises
    ------
    XfastError
        If the journal is not ours or does not fit the file, or if its patch goes on.
    OSError
        If the file can't be written.
    """
    if not os.path.lexists(path + JOURNAL):
        return False
    with _locked(path) as fd:
        try:
            journal_fd = os.open(path + JOURNAL, os.O_RDONLY | os.O_NONBLOCK | NOFOLLOW)
        except FileNotFoundError:  # the patch came to its end just now
            return False
        except OSError as problem:
            raise XfastError(
                f"{path + JOURNAL}: found no journal of ours: {problem.strerror}"
            ) from None
        try:
            size, edits = _parsed(_trusted(journal_fd))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise XfastError(f"{path + JOURNAL}: found no journal of ours, needed one") from None
        finally:
            os.close(journal_fd)
        _undo(path, fd, size, edits)
        _finish(path, fd)
    return True


def _trusted(fd: int) -> bytes:
    """Return what a journal holds, if it is a file of root's or of our own; else nothing."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()):
        return b""
    with open(fd, "rb", closefd=False) as file:
        return file.read(JOURNAL_LIMIT)


def _parsed(data: bytes) -> tuple[int, list[Splice]]:
    """Return the size and the edits in a journal; ValueError, KeyError, ... where it has none."""
    journal = json.loads(data)
    size = journal["size"]
    if type(size) is not int or not 0 <= size < 1 << 63:
        raise ValueError
    edits = []
    for row in journal["edits"]:
        offset = row["offset"]
        if type(offset) is not int or not 0 <= offset <= size:
            raise ValueError
        edits.append(Splice(offset, bytes.fromhex(row["old"]), bytes.fromhex(row["new"])))
    return size, edits


@contextlib.contextmanager
def _locked(path: str) -> Iterator[int]:
    """Yield a file opened for writing, which no other process of ours writes; its times stay."""
    fd = os.open(path, os.O_RDWR | NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(fd)
        try:
            yield fd
        finally:
            os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
    except BlockingIOError:
        raise XfastError(f"{path}: another process is writing it") from None
    finally:
        os.close(fd)


def _undo(path: str, fd: int, size: int, edits: Sequence[Splice]) -> None:
    """Put old bytes back, after a look that every byte is still an old or a new one."""
    fits = os.fstat(fd).st_size == size
    for edit in edits:
        found = os.pread(fd, len(edit.old), edit.offset)
        bytewise = zip(found, edit.old, edit.new, strict=False)
        fits &= len(found) == len(edit.old) == len(edit.new)
        fits &= all(byte in (old, new) for byte, old, new in bytewise)
    if not fits:
        raise XfastError(f"{path}: is not the file that {path + JOURNAL} belongs to")
    for edit in edits:
        os.pwrite(fd, edit.old, edit.offset)


def _finish(path: str, fd: int) -> None:
    """Bring a file to the disk, and then remove its journal."""
    os.fsync(fd)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.unlink(os.path.basename(path) + JOURNAL, dir_fd=folder)
        os.fsync(folder)
    finally:
        os.close(folder)
