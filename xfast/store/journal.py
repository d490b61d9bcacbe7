"""Patches under a journal: a large file is changed where it lies, or left as it was.

What the edits replace is first written into a journal beside the file (a volume's lies in a
folder of its own); while it lies there no verb reads the file. After a crash `recover` puts the
old bytes back. A journal is trusted where only root or this user can have written it and it bears
the nonce of the change's own record.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from xfast.errors import XfastError
from xfast.snapshots.bytes.copying import read_at, write_all
from xfast.snapshots.bytes.source import JOURNAL, Source
from xfast.snapshots.model import Splice
from xfast.store.names import Directory, doubt, require_one_name, same
from xfast.store.record import read_record, sha256
from xfast.store.staged import Staged

JOURNAL_SCHEMA = "xfast-journal/1"
JOURNAL_LIMIT = 64 << 20
"""No journal is larger than this (bytes): areas are small, and one edit touches few."""


class Warrant(NamedTuple):
    """What makes a journal trusted: a record's nonce, and where that record lies."""

    record: str
    nonce: str


class Site(NamedTuple):
    """Where a file lies that is patched, and where its journal: ``STEM.xfast-journal``."""

    folder: Directory
    name: str
    journals: Directory
    stem: str

    @classmethod
    def beside(cls, folder: Directory, name: str) -> Site:
        """Return the site of a file whose journal lies beside it."""
        return cls(folder, name, folder, name)

    @property
    def path(self) -> str:
        """What the file is called in messages."""
        return self.folder.path_of(self.name)

    @property
    def journal(self) -> str:
        """The journal's name."""
        return self.stem + JOURNAL

    @property
    def journal_path(self) -> str:
        """What the journal is called in messages."""
        return self.journals.path_of(self.journal)

    def is_interrupted(self) -> bool:
        """Tell whether there is a journal."""
        return self.journals.status(self.journal) is not None


def patch(
    site: Site,
    source: Source,
    edits: Sequence[Splice],
    check: Callable[[], None],
    warrant: Warrant,
) -> None:
    """Write edits where they lie in a file: only the pages they touch.

    Parameters
    ----------
    site : Site
        Where the file and its journal are.
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
        "name": site.stem,
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
    with _locked(site) as fd:
        if not os.path.samestat(os.fstat(fd), os.fstat(source.fd)):
            raise XfastError(f"{source.path}: another file has taken its place since it was read")
        with Staged(site.journals, site.journal) as staged:
            staged.file.write(data)
            staged.publish()
        try:
            source.patch(edits, fd)
            check()
        except BaseException:
            _require_between(site, fd, source.size, edits)
            _put_back(site, fd, edits)
            raise
        _finish(site, fd)


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
        return recover_at(Site.beside(folder, name))


def recover_at(site: Site) -> bool:
    """Undo a patch of a file; see `recover`.

    They must lead back to what the record's hash says, to the byte: a journal that was moved to
    another file, or kept from an earlier day, does not. Of a volume only its own bytes count.
    """
    if not site.is_interrupted():
        return False
    with _locked(site) as fd:
        if not site.is_interrupted():  # the patch came to its end just now
            return False
        size, edits, rows = read_journal(site)
        _require_between(site, fd, size, edits)
        back = sorted(Splice(edit.offset, edit.new, edit.old) for edit in edits)
        end = int(rows[0]["end"]) if "end" in rows[0] else None
        if sha256(fd, back, end) not in {row[side] for row in rows for side in ("before", "after")}:
            raise _stranger(site)
        _put_back(site, fd, edits)
    return True


def read_journal(site: Site) -> tuple[int, list[Splice], list[dict[str, str]]]:
    """Return the size and the edits that a file's journal tells, and the record's rows.

    Raises
    ------
    XfastError
        If it is not to be trusted.
    """
    try:
        with open(site.journals.open_file(site.journal), "rb") as file:
            why = doubt(os.fstat(file.fileno()), closed=0o077)
            if not why:
                journal = json.loads(file.read(JOURNAL_LIMIT + 1))
                size, edits = _parsed(journal)
                why, rows = _unwarranted(journal, site.stem)
    except XfastError as problem:
        why = str(problem)
    except OSError as problem:
        where = problem.filename if isinstance(problem.filename, str) else site.journal_path
        why = f"{where}: {problem.strerror}"
    except (ValueError, KeyError, TypeError, RecursionError):
        why = "it does not parse"
    if why:
        raise XfastError(f"{site.journal_path}: expected a journal of ours: {why}")
    return size, edits, rows


def _unwarranted(journal: dict[str, Any], stem: str) -> tuple[str, list[dict[str, str]]]:
    """Say why a journal is not the one of this file's change, or "", and what the record tells."""
    if journal["schema"] != JOURNAL_SCHEMA or journal["name"] != stem:
        return "it is another file's", []
    folder, name = Directory.around(journal["record"])
    with folder:
        record = read_record(folder, name)
    why = "" if record["nonce"] == journal["nonce"] else "the change record names another one"
    return why, record["files"]


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
def _locked(site: Site) -> Iterator[int]:
    """Yield a file opened for writing, which no other process of ours writes; its times stay."""
    status = site.folder.status(site.name)
    device = status is not None and stat.S_ISBLK(status.st_mode)
    try:
        fd = site.folder.open_file(site.name, os.O_RDWR | (os.O_EXCL if device else 0))
    except OSError as problem:
        raise in_use(site.path, problem) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(fd)
        if not device:
            require_one_name(site.path, status)
        try:
            yield fd
        finally:
            with contextlib.suppress(*([PermissionError] if device else [])):
                os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
    except BlockingIOError:
        raise XfastError(f"{site.path}: another process is writing it") from None
    finally:
        os.close(fd)


def in_use(path: str, problem: OSError) -> Exception:
    """Return the error for a device that could not be opened for this process alone.

    *Source*: open(2), O_EXCL: "If the block device is in use by the system (e.g., mounted),
    open() fails with the error EBUSY."
    """
    if problem.errno == errno.EBUSY:
        return XfastError(f"{path}: is in use (mounted, or another program holds it)")
    return problem


def _stranger(site: Site) -> XfastError:
    return XfastError(f"{site.path}: is not the file that {site.journal_path} belongs to")


def _require_between(site: Site, fd: int, size: int, edits: Sequence[Splice]) -> None:
    """Raise XfastError unless every byte is still an old or a new one."""
    if not is_between(fd, size, edits):
        raise _stranger(site)


def is_between(fd: int, size: int, edits: Sequence[Splice]) -> bool:
    """Tell whether a file is as long as it was, and every byte of the edits an old or a new one."""
    if os.lseek(fd, 0, os.SEEK_END) != size:
        return False
    for edit in edits:
        found = read_at(fd, len(edit.old), edit.offset)
        if not len(found) == len(edit.old) == len(edit.new):
            return False
        bytewise = zip(found, edit.old, edit.new, strict=True)
        if not all(byte in (old, new) for byte, old, new in bytewise):
            return False
    return True


def _put_back(site: Site, fd: int, edits: Sequence[Splice]) -> None:
    """Put old bytes back."""
    for edit in edits:
        write_all(fd, edit.old, edit.offset)
    _finish(site, fd)


def _finish(site: Site, fd: int) -> None:
    """Bring a file to the disk, and then remove its journal."""
    os.fsync(fd)
    if not same(site.folder.status(site.name), os.fstat(fd)):
        raise XfastError(f"{site.path}: another file has taken its place meanwhile")
    site.journals.remove(site.journal)
    site.journals.sync()
