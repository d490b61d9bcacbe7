"""Volumes: patched where they lie, their journals and records in a folder of their own.

A block device can't be renamed, and no folder of ours lies beside it. So its journal and its
record are kept in `STATE`, or where ``--journal`` says, a folder that only its owner can enter.
They are named by the device's number and the hash of the stream before the change, and they are
believed by their content: a device's number may be another one after the next start.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence

from xfast.errors import XfastError
from xfast.snapshots.bytes.copying import read_at, write_all
from xfast.snapshots.bytes.source import JOURNAL, Source
from xfast.snapshots.model import Splice
from xfast.store.journal import (
    Site,
    Warrant,
    in_use,
    is_between,
    patch,
    read_journal,
    recover_at,
)
from xfast.store.names import Directory, is_ours
from xfast.store.put import Original
from xfast.store.record import Note, sha256
from xfast.store.staged import Staged, sweep

STATE = "/var/lib/xfast"
"""Where root's journals and records of volumes are kept."""

PAGE = 4096
HASH_DIGITS = 16
"""So much of the hash is in a name."""


def is_volume(path: str) -> bool:
    """Tell whether a path leads to a block device."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


class Volume:
    """A block device (or a file treated as one), open, with where its journals lie.

    A context manager.

    Parameters
    ----------
    path : str
        It, or a symbolic link to it, as /dev has many.
    journals : str, optional
        The folder; default: `STATE`, for root.

    Raises
    ------
    XfastError
        If the folder is open to others, or what the path leads to is neither device nor file.
    OSError
        If something can't be opened.
    """

    def __init__(self, path: str, journals: str | None = None) -> None:
        self.path = path
        self.journals = _private_folder(journals)
        self.folder, self.name = Directory.around(os.path.realpath(path))
        self.fd = self.folder.open_file(self.name)
        self.status = os.fstat(self.fd)
        self.is_device = stat.S_ISBLK(self.status.st_mode)
        if not self.is_device and not stat.S_ISREG(self.status.st_mode):
            self.close()
            raise XfastError(f"{path}: expected a block device or a file")

    def close(self) -> None:
        """Close what is open."""
        os.close(self.fd)
        self.folder.__exit__()
        self.journals.__exit__()

    def __enter__(self) -> Volume:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def number(self) -> str:
        """What the system knows it by: MAJOR-MINOR of a device, MAJOR-MINOR-INODE of a file."""
        device = self.status.st_rdev if self.is_device else self.status.st_dev
        inode = "" if self.is_device else f"-{self.status.st_ino}"
        return f"{os.major(device)}-{os.minor(device)}{inode}"

    def site(self, before: str) -> Site:
        """Return where it and the journal lie of a change of the stream with this SHA-256."""
        stem = f"{self.number}-{before[:HASH_DIGITS]}"
        return Site(self.folder, self.name, self.journals, stem)

    def recover(self) -> bool:
        """Undo every patch of it that was interrupted; return whether there was one.

        A journal whose bytes are not here is of a volume that had the same number: it stays.

        Raises
        ------
        XfastError
            If a journal is not to be trusted, or its bytes are here and others have changed.
        """
        found = False
        for name in sorted(os.listdir(self.journals.fd)):
            if name.startswith(f"{self.number}-") and name.endswith(JOURNAL):
                stem = name.removesuffix(JOURNAL)
                site = Site(self.folder, self.name, self.journals, stem)
                size, edits, _ = read_journal(site)
                if is_between(self.fd, size, edits):
                    found |= recover_at(site)
        return found

    def patch(
        self,
        original: Original,
        source: Source,
        edits: Sequence[Splice],
        check: Callable[[], None],
        note: Note,
        backup: str | None = None,
    ) -> None:
        """Write edits of equal length where they lie, under a journal, after the record.

        Parameters
        ----------
        note : Note
            Its record has one row, which is completed.
        backup : str, optional
            A new file, which receives the pages that change.

        Raises
        ------
        XfastError, FormatError, OSError
            As `xfast.store.journal.patch` does; or if it is in use, or changed.
        """
        (row,) = note.record["files"]
        end = int(row["end"])
        row["after"] = sha256(self.fd, edits, end)
        site = self.site(row["before"])
        row["journal"] = os.path.abspath(site.journal_path)

        def has_begun() -> bool:
            return site.is_interrupted() or sha256(self.fd, (), end) == row["after"]

        self.require_at_rest(original)
        sweep(self.journals, site.journal)
        with note.standing(has_begun) as nonce:
            if backup:
                keep_pages(backup, self.fd, edits)
            self.require_at_rest(original)
            patch(site, source, edits, check, Warrant(note.path, nonce))

    def require_at_rest(self, original: Original) -> None:
        """Raise XfastError if it is in use, or is not what was read."""
        original.require_at_rest()
        require_free(self.folder, self.name)


def require_free(folder: Directory, name: str) -> None:
    """Raise XfastError if a device is mounted, or any process here has it open for writing.

    *Source*: open(2), O_EXCL; proc_pid_fdinfo(5). What other machines do with a shared volume
    can't be seen.
    """
    status = folder.status(name)
    if status is None or not stat.S_ISBLK(status.st_mode):
        return
    path = folder.path_of(name)
    try:
        os.close(folder.open_file(name, os.O_RDONLY | os.O_EXCL))
    except OSError as problem:
        raise in_use(path, problem) from None
    process = _writer(status.st_rdev)
    if process:
        raise XfastError(
            f"{path}: process {process} has it open for writing; expected a volume at rest"
        )


def _private_folder(path: str | None) -> Directory:
    """Open the folder of journals, which only its owner can enter; make it if it is not there."""
    if path is None and os.geteuid():
        raise XfastError(f"expected --journal DIR, where {STATE} is root's alone")
    folder, name = Directory.around((path or STATE).rstrip("/"))
    with folder:
        if folder.status(name) is None:
            folder.make_folder(name, 0o700)
        state = folder.below(name)
    mode = stat.S_IMODE(os.fstat(state.fd).st_mode)
    if mode & 0o077 or not is_ours(state):
        state.__exit__()
        raise XfastError(
            f"{state.path}: expected a folder that only you can enter (0700) and nobody else can "
            f"exchange, got the mode {mode:04o}"
        )
    return state


def _writer(device: int) -> int:
    """Return a process that has a device open for writing, 0 for none that can be seen."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        if int(process) == os.getpid():
            continue
        try:
            for fd in os.listdir(f"/proc/{process}/fd"):
                status = os.stat(f"/proc/{process}/fd/{fd}")
                if stat.S_ISBLK(status.st_mode) and status.st_rdev == device:
                    with open(f"/proc/{process}/fdinfo/{fd}", encoding="ascii") as file:
                        words = dict(line.split(":", 1) for line in file if ":" in line)
                    if int(words["flags"], 8) & os.O_ACCMODE != os.O_RDONLY:
                        return int(process)
        except OSError:  # another user's, or gone
            continue
    return 0


def keep_pages(path: str, fd: int, edits: Sequence[Splice]) -> None:
    """Copy the pages that edits touch into a new sparse file, each to its own offset.

    Raises
    ------
    XfastError
        If there is a file of that name with other content; a killed run may have left this one.
    """
    pages = sorted(
        {
            page
            for edit in edits
            for page in range(edit.offset // PAGE, (edit.offset + len(edit.old) - 1) // PAGE + 1)
        }
    )
    folder, name = Directory.around(path)
    size = os.lseek(fd, 0, os.SEEK_END)
    with folder:
        sweep(folder, name)
        if folder.status(name) is not None:
            with open(folder.open_file(name), "rb") as there:
                status = os.fstat(there.fileno())
                if (
                    stat.S_ISREG(status.st_mode)
                    and status.st_size == size
                    and all(
                        read_at(there.fileno(), PAGE, page * PAGE) == read_at(fd, PAGE, page * PAGE)
                        for page in pages
                    )
                ):
                    return
            raise XfastError(f"{path}: exists; expected a new name")
        with Staged(folder, name) as staged:
            os.truncate(staged.file.fileno(), size)
            for page in pages:
                write_all(staged.file.fileno(), read_at(fd, PAGE, page * PAGE), page * PAGE)
            staged.publish()
