"""Folders held open, and the names in them: no path is followed twice, and no link at all.

Whoever may write one of the folders on the way to a file can exchange it for a symbolic link
while root works there. So the folder is resolved once, without links, and held by a descriptor;
files are opened, renamed, linked and removed by their names in it.

The alternative was to check the path before each step: it leaves a moment between check and use.

*Source*: openat2(2), RESOLVE_NO_SYMLINKS (Linux 5.6).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator

from xfast.errors import XfastError

SUFFIX = ".xfast.json"
"""What a change record is called, behind the name of the file that was written."""

BACKUP = ".orig"
"""What the old file is called where it is kept."""

SAFE_MODE = 0o644
"""All permissions that anything written here may have: never executable, setuid, setgid, or
writable for others than the owner."""

SAFE_FOLDER_MODE = 0o755
PRIVATE = 0o600

NOFOLLOW = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
DIRECTORY = os.O_DIRECTORY | os.O_CLOEXEC
O_PATH = getattr(os, "O_PATH", os.O_RDONLY)
"""Open a folder only to go on from it: that needs no right to list it."""

AT_FDCWD = -100
SYS_OPENAT2 = 437
RESOLVE_NO_SYMLINKS = 4
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


class OpenHow(ctypes.Structure):
    """struct open_how (Linux include/uapi/linux/openat2.h)."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


_libc = ctypes.CDLL(None, use_errno=True)


def _openat2(path: str, at: int) -> int:
    """Open a folder whose path holds no symbolic link; OSError where the kernel can't."""
    how = OpenHow(os.O_RDONLY | DIRECTORY, 0, RESOLVE_NO_SYMLINKS)
    size = ctypes.c_size_t(ctypes.sizeof(how))
    fd = _libc.syscall(
        ctypes.c_long(SYS_OPENAT2), at, ctypes.c_char_p(os.fsencode(path)), ctypes.byref(how), size
    )
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return int(fd)


def _step_by_step(path: str, at: int) -> int:
    """Open a folder component by component, none of which may be a symbolic link."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    start = "/" if path.startswith("/") else "."
    fd = os.open(start, O_PATH | DIRECTORY, dir_fd=None if at == AT_FDCWD else at)
    for part in parts:
        try:
            below = os.open(part, O_PATH | DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
        except OSError as problem:
            if problem.errno == errno.ENOTDIR and stat.S_ISLNK(os.lstat(part, dir_fd=fd).st_mode):
                problem.errno = errno.ELOOP
            raise OSError(problem.errno, os.strerror(problem.errno or 0), path) from None
        finally:
            os.close(fd)
        fd = below
    try:
        return os.open(".", os.O_RDONLY | DIRECTORY, dir_fd=fd)
    finally:
        os.close(fd)


def open_folder(path: str, at: int = AT_FDCWD, told: str = "") -> int:
    """Return a descriptor of a folder, to which no symbolic link leads.

    Parameters
    ----------
    path : str
        Empty is the current folder.
    at : int
        A folder's descriptor, from which a relative path starts.
    told : str, optional
        What it is called in messages; default: `path`.

    Raises
    ------
    XfastError
        If a symbolic link lies on the way.
    OSError
        If there is no such folder.
    """
    try:
        try:
            return _openat2(path or ".", at)
        except OSError as problem:
            if problem.errno not in (errno.ENOSYS, errno.EPERM):  # EPERM: an old sandbox's answer
                raise
        return _step_by_step(path or ".", at)
    except OSError as problem:
        if problem.errno == errno.ELOOP:
            raise XfastError(
                f"{told or path}: a symbolic link lies on the way to this folder; "
                "expected the folder's own path"
            ) from None
        raise


class Directory:
    """A folder held open. A context manager, which closes it.

    Parameters
    ----------
    fd : int
        Its descriptor, which the Directory owns from here on.
    path : str
        What it is called in messages.
    """

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path

    @classmethod
    def open(cls, path: str) -> Directory:
        """Open a folder; see `open_folder` for what is raised."""
        return cls(open_folder(path), path)

    @classmethod
    def around(cls, path: str) -> tuple[Directory, str]:
        """Open the folder that a file lies in; return it and the file's name.

        Raises
        ------
        XfastError
            If the path ends in no name, or a symbolic link lies on the way.
        OSError
            If there is no such folder.
        """
        head, name = os.path.split(path)
        if name in ("", ".", "..") or path == "-":  # elsewhere that is a pipe
            raise XfastError(f"{path or '(nothing)'}: expected the name of a file")
        return cls.open(head), name

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.fd)

    def path_of(self, name: str) -> str:
        """Return what a file in it is called in messages."""
        return os.path.join(self.path, name)

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Make errors tell the whole path."""
        try:
            yield
        except OSError as problem:
            problem.filename = self.path_of(name)
            raise

    def status(self, name: str) -> os.stat_result | None:
        """Return the status of what is called `name`, links not followed; None for nothing."""
        with contextlib.suppress(FileNotFoundError), self._naming(name):
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        return None

    def open_file(self, name: str, flags: int = os.O_RDONLY, mode: int = PRIVATE) -> int:
        """Return a descriptor of a file; a symbolic link is an OSError, a pipe does not block."""
        with self._naming(name):
            return os.open(name, flags | NOFOLLOW, mode, dir_fd=self.fd)

    def below(self, path: str) -> Directory:
        """Open a folder in this one."""
        whole = self.path_of(path) if path else self.path
        with self._naming(path):
            return Directory(open_folder(path, self.fd, whole), whole)

    def make_folder(self, name: str, mode: int) -> None:
        """Make a folder in this one; a setgid bit does not come down to it."""
        with self._naming(name):
            os.mkdir(name, mode, dir_fd=self.fd)
            fd = os.open(name, DIRECTORY | os.O_NOFOLLOW, dir_fd=self.fd)
            try:
                status = os.fstat(fd)
                if status.st_mode & stat.S_ISGID and status.st_uid == os.geteuid():
                    os.fchmod(fd, stat.S_IMODE(status.st_mode) & SAFE_FOLDER_MODE)
            finally:
                os.close(fd)

    def rename(self, old: str, new: str, *, replace: bool) -> None:
        """Give a file or folder another name.

        Raises
        ------
        FileExistsError
            If the name is taken, unless it is to be replaced.
        """
        with self._naming(new):
            if replace:
                os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            elif not self._renameat2(old, new, RENAME_NOREPLACE):
                self._rename_by_other_calls(old, new)

    def exchange(self, one: str, two: str) -> bool:
        """Exchange two names at once; return False where the system can't."""
        with self._naming(two):
            return self._renameat2(one, two, RENAME_EXCHANGE)

    def _renameat2(self, old: str, new: str, flag: int) -> bool:
        """Rename in a way that is not rename()'s; False where the system does not know it."""
        one, two = (ctypes.c_char_p(os.fsencode(name)) for name in (old, new))
        try:
            done = not _libc.renameat2(self.fd, one, self.fd, two, flag)
        except AttributeError:  # a C library without it
            return False
        number = ctypes.get_errno()
        if not done and number not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(number, os.strerror(number), new)
        return done

    def _rename_by_other_calls(self, old: str, new: str) -> None:
        """Rename where the new name is free; an empty folder may stand where a folder goes."""
        status = self.status(old)
        if status is not None and stat.S_ISDIR(status.st_mode):
            os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        else:
            self.link(old, new)
            self.remove(old)

    def link(self, name: str, new: str) -> None:
        """Give a file a second name; FileExistsError if it is taken."""
        with self._naming(new):
            os.link(name, new, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)

    def remove(self, name: str) -> None:
        """Remove a file's name."""
        with self._naming(name):
            os.unlink(name, dir_fd=self.fd)

    def sync(self) -> None:
        """Bring the names in it to the disk."""
        os.fsync(self.fd)


def make_folder(path: str) -> None:
    """Make a directory, unless it is there.

    Raises
    ------
    XfastError
        If a symbolic link lies on the way, or something else has the name.
    """
    folder, name = Directory.around(path.rstrip("/"))
    with folder:
        status = folder.status(name)
        if status is None:
            folder.make_folder(name, SAFE_FOLDER_MODE & ~umask())
        elif not stat.S_ISDIR(status.st_mode):
            raise XfastError(f"{path}: expected a directory, or a name that is free")


def make_folders(path: str) -> None:
    """Make a directory and those above it, as far as they are missing; see `make_folder`."""
    head = os.path.dirname(path.rstrip("/"))
    if head and not os.path.isdir(head):
        make_folders(head)
    make_folder(path)


def same(one: os.stat_result | None, two: os.stat_result | None) -> bool:
    """Tell whether two statuses are of one file."""
    return one is not None and two is not None and os.path.samestat(one, two)


def is_ours(folder: Directory) -> bool:
    """Tell whether only root and this user can exchange what lies in a folder, or the folder."""
    fd = os.dup(folder.fd)
    try:
        while True:
            status = os.fstat(fd)
            shared = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
            if status.st_uid not in (0, os.geteuid()) or shared:
                return False
            above = os.open("..", os.O_RDONLY | DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = above
            if os.path.samestat(os.fstat(fd), status):
                return True
    finally:
        os.close(fd)


def umask() -> int:
    """Return the process's umask."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def doubt(status: os.stat_result, *, closed: int = 0o022) -> str:
    """Say why a file may be another's work, or "" where only root or we can have written it.

    Parameters
    ----------
    status : os.stat_result
    closed : int
        The permission bits that it must not have.
    """
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file"
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to user {status.st_uid}"
    if status.st_nlink != 1:
        return f"has {status.st_nlink} names (hard links)"
    if status.st_mode & closed:
        return f"has the mode {stat.S_IMODE(status.st_mode):04o}"
    return ""


def require_one_name(path: str, status: os.stat_result, names: int = 1) -> None:
    """Raise XfastError unless a file is a regular one without hard links beyond `names`."""
    if not stat.S_ISREG(status.st_mode):
        raise XfastError(f"{path}: is no regular file, which alone can be changed in place")
    if status.st_nlink > names:
        raise XfastError(f"{path}: has other names too (hard links); expected a file of one, or -o")
