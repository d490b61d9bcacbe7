"""A directory as the input of a format: the names in it, and each file's bytes as a Source."""

from __future__ import annotations

import os

from xfast.errors import XfastError
from xfast.snapshots.bytes.entry import found, opened_folder
from xfast.snapshots.bytes.source import EXPAND_LIMIT, Source


class Folder:
    """One directory; what lies in its subdirectories is not looked at.

    Parameters
    ----------
    path : str
        The name as the user gave it.
    names : tuple of str
        The names in it, sorted.
    expand_limit : int
        What a compressed file in it may expand to (bytes).

    Attributes
    ----------
    stamp : None
        A directory has none: each file in it has its own.
    container : tuple of str
        Empty: nothing is wrapped around a directory.
    """

    stamp = None
    container: tuple[str, ...] = ()

    def __init__(
        self, path: str, names: tuple[str, ...], *, expand_limit: int = EXPAND_LIMIT
    ) -> None:
        self.path = path
        self.names = names
        self.expand_limit = expand_limit

    @classmethod
    def open(cls, path: str, *, expand_limit: int = EXPAND_LIMIT) -> Folder:
        """List a directory.

        Raises
        ------
        XfastError
            If it can't be listed.
        """
        try:
            with opened_folder(path) as fd:
                return cls(path, tuple(sorted(os.listdir(fd))), expand_limit=expand_limit)
        except OSError as problem:
            raise XfastError(f"{path}: can't be opened: {problem.strerror}") from None

    def file(self, name: str) -> Source:
        """Open one of the files, which may be no link; the caller closes it.

        Raises
        ------
        XfastError
            If it can't be opened.
        """
        return Source.open(found(self.path, name), expand_limit=self.expand_limit)

    def close(self) -> None:
        """Do nothing: no file is open between calls."""

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
