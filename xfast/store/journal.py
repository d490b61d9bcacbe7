"""Patches under a journal: a large file is changed where it lies, or left as it was.

What the edits replace is first written into a journal beside the file; while it lies there no
verb reads the file. After a crash `recover` puts the old bytes back. A journal is trusted where
only root or this user can have written it and it bears the nonce of the change's own record.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from xfast.errors import XfastError
from xfast.snapshots.bytes.copying import read_at, write_all
from xfast.snapshots.bytes.source import JOURNAL, Source
from xfast.snapshots.model import Splice
from xfast.store.names import Directory, doubt, require_one_name, same
from xfast.store.record import read_record
from xfast.store.staged import Staged

JOURNAL_SCHEMA = "xfast-journal/1"
JOURNAL_LIMIT = 64 << 20
"""No journal is larger than this (bytes): areas are small, and one edit touches few."""


class Warrant(NamedTuple):
    """What makes a journal trusted: a record's nonce, and where that record lies."""

    record: str
    nonce: str


def patch(
    folder: Directory,
    name: str,
    source: Source,
    edits: Sequence[Splice],
    check: Callable[[], None],
    warrant: Warrant,
) -> None:
    """Write edits where they lie in a file: only the pages they touch.

    Parameters
    ----------
    folder, name
        Where the file is.
    source : Source
        The same file, not compressed; the edits leave its length as it is.
    edits : sequence of Splice
    check : callable
        Called when the edits are written; where it raises they are undone.
    warrant : Warrant

    Raises
    ------
    XfastError
        If another process is writing the file, or there is a journal already.
    FormatError
        If an edit's old bytes are not what the file holds.
    OSError
        If it can't be written; what was written is undone.
    """
    journal = {
        "schema": JOURNAL_SCHEMA,
        "name": name,
        "record": warrant.record,
        "nonce": warrant.nonce,
        "size": source.size,
        "edits": [{"offset": e.offset, "old": e.old.hex(), "new": e.new.hex()} for e in edits],
    }
    data = json.dumps(journal).encode()
    if len(data) > JOURNAL_LIMIT:
        raise XfastError(
            f"{source.path}: expected a journal of at most {JOURNAL_LIMIT} bytes, got {len(data)}; "
            "-o writes a new file"
        )
    with _locked(folder, name) as fd:
        if not os.path.samestat(os.fstat(fd), os.fstat(source.fd)):
            raise XfastError(f"{source.path}: another file has taken its place since it was read")
        with Staged(folder, name + JOURNAL) as staged:
            staged.file.write(data)
            staged.publish()
        try:
            source.patch(edits, fd)
            check()
        except BaseException:
            _put_back(folder, name, fd, source.size, edits)
            _finish(folder, name, fd)
            raise
        _finish(folder, name, fd)


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
    folder, name = Directory.around(path)
    with folder:
        return recover_in(folder, name)


def recover_in(folder: Directory, name: str) -> bool:
    """Undo a patch of a file in a folder; see `recover`."""
    if folder.status(name + JOURNAL) is None:
        return False
    with _locked(folder, name) as fd:
        if folder.status(name + JOURNAL) is None:  # the patch came to its end just now
            return False
        size, edits = _read(folder, name)
        _put_back(folder, name, fd, size, edits)
        _finish(folder, name, fd)
    return True


def _read(folder: Directory, name: str) -> tuple[int, list[Splice]]:
    """Return the size and the edits that a file's journal tells."""
    path = folder.path_of(name + JOURNAL)
    try:
        with open(folder.open_file(name + JOURNAL), "rb") as file:
            why = doubt(os.fstat(file.fileno()), closed=0o077)
            if not why:
                journal = json.loads(file.read(JOURNAL_LIMIT + 1))
                size, edits = _parsed(journal)
                why = _unwarranted(journal, name)
    except (OSError, XfastError) as problem:
        why = str(problem)
    except (ValueError, KeyError, TypeError, RecursionError):
        why = "it does not parse"
    if why:
        raise XfastError(f"{path}: found no journal of ours: {why}")
    return size, edits


def _unwarranted(journal: dict[str, Any], name: str) -> str:
    """Say why a journal is not the one of this file's change, or ""."""
    if journal["schema"] != JOURNAL_SCHEMA or journal["name"] != name:
        return "it is another file's"
    folder, record = Directory.around(journal["record"])
    with folder:
        named = read_record(folder, record)["nonce"]
    return "" if named == journal["nonce"] else "the change record names another one"


def _parsed(journal: dict[str, Any]) -> tuple[int, list[Splice]]:
    """Return the size and the edits in a journal; ValueError, KeyError, ... where it has none."""
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
def _locked(folder: Directory, name: str) -> Iterator[int]:
    """Yield a file opened for writing, which no other process of ours writes; its times stay."""
    path = folder.path_of(name)
    fd = folder.open_file(name, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(fd)
        require_one_name(path, status)
        try:
            yield fd
        finally:
            os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
    except BlockingIOError:
        raise XfastError(f"{path}: another process is writing it") from None
    finally:
        os.close(fd)


def _put_back(folder: Directory, name: str, fd: int, size: int, edits: Sequence[Splice]) -> None:
    """Put old bytes back, after a look that every byte is still an old or a new one."""
    fits = os.fstat(fd).st_size == size
    for edit in edits:
        found = read_at(fd, len(edit.old), edit.offset)
        bytewise = zip(found, edit.old, edit.new, strict=False)
        fits &= len(found) == len(edit.old) == len(edit.new)
        fits &= all(byte in (old, new) for byte, old, new in bytewise)
    if not fits:
        path = folder.path_of(name)
        raise XfastError(f"{path}: is not the file that {path + JOURNAL} belongs to")
    for edit in edits:
        write_all(fd, edit.old, edit.offset)


def _finish(folder: Directory, name: str, fd: int) -> None:
    """Bring a file to the disk, and then remove its journal."""
    os.fsync(fd)
    if not same(folder.status(name), os.fstat(fd)):
        raise XfastError(f"{folder.path_of(name)}: another file has taken its place meanwhile")
    folder.remove(name + JOURNAL)
    folder.sync()
