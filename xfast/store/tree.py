"""Whole directories: copied and removed folder by folder, however deep, through held descriptors.

No recursion, and no more than two folders open at a time: neither Python's stack nor the limit of
open files bounds the depth.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from xfast.errors import XfastError
from xfast.snapshots.bytes.copying import copy_bytes
from xfast.snapshots.bytes.source import JOURNAL
from xfast.store.access import access_of, restrict
from xfast.store.names import SAFE_FOLDER_MODE, SUFFIX, Directory, same
from xfast.store.put import stamp_of
from xfast.store.staged import TEMPORARY, Staged

OURS = (SUFFIX, JOURNAL)
"""How records and journals end. They are not copied: a copy would be ours, and be trusted."""


class StagedTree:
    """A copy of a directory in the making, beside the place that `publish` gives it.

    A context manager; leaving it removes what was not published.

    Parameters
    ----------
    folder, name : Directory, str
        Where it is to be.
    source : Directory
        What is copied into it.

    Attributes
    ----------
    tree : Directory
        The copy.

    Raises
    ------
    XfastError
        If the source holds a device, pipe or socket.
    OSError
        If it can't be read or written.
    """

    def __init__(self, folder: Directory, name: str, source: Directory) -> None:
        self.folder = folder
        self.name = name
        self.temporary = TEMPORARY.format(name)
        remove_tree(folder, self.temporary)  # what a killed process left
        folder.make_folder(self.temporary, 0o700)
        self.tree = folder.below(self.temporary)
        self.source = source
        try:
            self._require_new()
            _copy(source, self.tree)
        except BaseException:
            self.__exit__()
            raise

    @property
    def published(self) -> bool:
        """Whether the copy has its place, even if a step after that failed, or a signal came."""
        return same(self.folder.status(self.name), os.fstat(self.tree.fd))

    def _require_new(self) -> None:
        """Raise XfastError if somebody put another directory in the place of ours."""
        status = os.fstat(self.tree.fd)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077 or os.listdir(self.tree.fd):
            raise XfastError(f"{self.tree.path}: somebody exchanged the directory in the making")

    def publish(self) -> None:
        """Give the copy its place, with the original's permissions as far as they are safe.

        Raises
        ------
        XfastError
            If the name is taken, or somebody meddled with the copy.
        """
        restrict(self.tree.fd, access_of(self.source.fd), safe=SAFE_FOLDER_MODE)
        own = os.fstat(self.tree.fd)
        path = self.folder.path_of(self.name)
        if not same(self.folder.status(self.temporary), own):
            raise XfastError(f"{path}: somebody exchanged the directory in the making")
        try:
            self.folder.rename(self.temporary, self.name, replace=False)
        except FileExistsError:
            raise XfastError(f"{path}: exists; expected a new name") from None
        self.temporary = ""
        self.folder.sync()

    def __enter__(self) -> StagedTree:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.tree.fd)
        if self.temporary:
            remove_tree(self.folder, self.temporary)


def folders(top: Directory) -> Iterator[tuple[str, Directory, list[str]]]:
    """Yield a folder and all below it, parents first: its path, it held open, its names."""
    waiting = [""]
    while waiting:
        path = waiting.pop()
        with top.below(path) as folder:
            names = sorted(os.listdir(folder.fd))
            yield path, folder, names
            for name in reversed(names):
                status = folder.status(name)
                if status is not None and stat.S_ISDIR(status.st_mode):
                    waiting.append(os.path.join(path, name))


def _copy(source: Directory, target: Directory) -> None:
    """Copy what is in a folder to the disk, permissions as far as they are safe."""
    done = []
    for path, old, names in folders(source):
        if path:  # made when the source's is open: what can't be opened again can't be removed
            head, name = os.path.split(path)
            with target.below(head) as above:
                above.make_folder(name, 0o700)
        with target.below(path) as new:
            for name in names:
                if not name.endswith(OURS):
                    _copy_entry(old, new, name)
            new.sync()
        done.append(path)
    for path in reversed(done[1:]):  # a folder may close itself to us: those in it first
        with source.below(path) as old, target.below(path) as new:
            restrict(new.fd, access_of(old.fd), safe=SAFE_FOLDER_MODE)


def _copy_entry(old: Directory, new: Directory, name: str) -> None:
    status = old.status(name)
    if status is None:
        raise XfastError(f"{old.path_of(name)}: vanished while it was copied")
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(name, dir_fd=old.fd), name, dir_fd=new.fd)
    elif stat.S_ISREG(status.st_mode):
        with open(old.open_file(name), "rb") as file, Staged(new, name) as staged:
            before = stamp_of(file.fileno())
            if not same(os.fstat(file.fileno()), status):
                raise XfastError(f"{old.path_of(name)}: was exchanged while it was copied")
            copy_bytes(file.fileno(), staged.file.fileno(), before[2])
            if stamp_of(file.fileno()) != before:
                raise XfastError(f"{old.path_of(name)}: changed while it was copied")
            staged.resemble(file.fileno(), strict=False)
            staged.publish()
    elif not stat.S_ISDIR(status.st_mode):
        raise XfastError(f"{old.path_of(name)}: is a device or pipe, which can't be copied")


def remove_tree(folder: Directory, name: str) -> None:
    """Remove a directory with all that is in it, if there is one.

    Raises
    ------
    OSError
        If it can't be removed, or is no directory.
    """
    status = folder.status(name)
    if status is None:
        return
    with folder.below(name) as top:
        done = []
        for path, one, names in folders(top):
            done.append(path)
            for entry in names:
                found = one.status(entry)
                if found is not None and not stat.S_ISDIR(found.st_mode):
                    one.remove(entry)
        for path in reversed(done[1:]):
            head, tail = os.path.split(path)
            with top.below(head) as parent:
                os.rmdir(tail, dir_fd=parent.fd)
    os.rmdir(name, dir_fd=folder.fd)
