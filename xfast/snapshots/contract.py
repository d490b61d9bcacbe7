"""What a format is: the functions that its module offers, and what each of them promises.

A format is a module (or any object) with `Format`'s three functions. Two more are for those that
have a say in directories: `Whole` for formats whose snapshot is a directory, `Accompanied` for
formats with files that only go with a snapshot. ``tests/snapshots/test_contract.py`` holds every
format to all this.

To add one: a module here, a line in ``FORMATS``, and a builder in that test. Another package adds
its own through the entry point group ``xfast.formats``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from xfast.snapshots.bytes.folder import Folder
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import Snapshot, Splice
from xfast.xsave.layout import Layout


class Format(Protocol):
    """What every format offers.

    Bytes are hostile: each function checks every offset and length before use, and what is
    damaged raises FormatError with one line, whatever else is in the file.
    """

    def sniff(self, source: Source) -> bool:
        """Tell cheaply whether a file is of this format: by its first bytes, if those tell.

        The answer is no verdict: `read` may still find the file damaged, and say how. Raises
        FormatError for a file that is of this format for certain and can't be read.
        """

    def read(
        self, source: Source, *, layout: Layout | None = None, size: int | None = None
    ) -> list[Snapshot]:
        """Return the snapshots that a file holds: one, but for containers of several.

        Each vCPU gets an `origin`, in which the format keeps what it parsed; `splices` finds
        its way by that alone. `layout` and `size` are the user's word for areas that don't tell
        theirs.
        """

    def splices(
        self, source: Source, snapshot: Snapshot, areas: Mapping[int, NDArray[np.uint8]]
    ) -> list[Splice]:
        """Return the edits that give vCPUs new areas: none where nothing changes.

        `areas` goes by position in ``snapshot.vcpus``. The edited file, read again, holds
        exactly these areas, and every other byte of it is as it was, checksums aside. Raises
        PolicyError where the file has no place for an area: nothing is cut off or left out.
        """


@runtime_checkable
class Whole(Protocol):
    """A format whose snapshot is a directory, or a file that has its name there."""

    def claims(self, names: Sequence[str]) -> str | None:
        """Tell what is the snapshot in a directory with files of these names.

        Returns the name of one of the files; "" for the directory as a whole, in which case
        `read` and `splices` take a Folder; None where there is none of this format.
        """


@runtime_checkable
class Accompanied(Protocol):
    """A format with files that only go with a snapshot, and are none themselves."""

    def companion(self, folder: Folder, name: str) -> bool:
        """Tell whether the file `name` of a directory is such a file."""
