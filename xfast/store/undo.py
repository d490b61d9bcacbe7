"""A change taken back: the bytes that its record names, after a look that nothing else changed.

A record names files, and whoever could forge one could have root write anywhere. So a record is
trusted only where root or this user alone can have written it, and it changes the file that lies
beside it; a path in it counts only where nobody else can write the folder that the record is in.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any

from xfast.errors import XfastError
from xfast.snapshots.bytes.copying import copy_bytes
from xfast.snapshots.bytes.source import EXPAND_LIMIT, JOURNAL, Source
from xfast.snapshots.model import Splice
from xfast.store.journal import Site, Warrant, patch, recover_at
from xfast.store.names import BACKUP, Directory, is_ours
from xfast.store.put import Original, Put, open_in
from xfast.store.record import HASHED, read_record, sha256, unpack
from xfast.store.staged import sweep
from xfast.store.volume import require_free


@dataclass(frozen=True)
class Undone:
    """What `undo` found, and did.

    Parameters
    ----------
    record : dict
        The change record.
    files : tuple of (str, bool)
        Each file of it, and whether it still held the change.
    """

    record: dict[str, Any]
    files: tuple[tuple[str, bool], ...]


def undo(
    record: str,
    *,
    file: str | None = None,
    dry_run: bool = False,
    expand_limit: int = EXPAND_LIMIT,
) -> Undone:
    """Put back what a change record says was changed.

    A compressed file is packed anew: what it expands to is what it was, to the byte; its packed
    bytes are only where ``NAME.orig`` still has them.

    Parameters
    ----------
    record : str
        The record. It stays.
    file : str, optional
        The file (directory) that it tells of, where it does not lie beside the record.
    dry_run : bool
        Only verify that the file is what the record says, and leads back to what was before.
    expand_limit : int
        What compressed data may expand to (bytes).

    Raises
    ------
    XfastError
        If the record is not to be trusted, a file is not what it left, or something can't be
        read or written. Nothing is changed then.
    """
    try:
        with ExitStack() as stack:
            note, note_name = Directory.around(record)
            stack.enter_context(note)
            told = read_record(note, note_name)
            folder, name = _target(note, told, file)
            stack.enter_context(folder)
            warrant = Warrant(os.path.abspath(record), told["nonce"])
            changes = _changes(stack, told, folder, name, warrant, expand_limit, dry_run)
            files = tuple((change.path, change.is_to_do()) for change in changes)
            for change, (_, to_do) in zip(changes, files, strict=True):
                if to_do and not dry_run:
                    change.run()
            return Undone(told, files)
    except OSError as problem:
        where = problem.filename if isinstance(problem.filename, str) else record
        raise XfastError(f"{where}: can't be undone: {problem.strerror or problem}") from None


def _target(note: Directory, record: dict[str, Any], file: str | None) -> tuple[Directory, str]:
    """Return where the file lies that a record tells of."""
    if "journal" in record["files"][0]:
        return _volume(note, record, file)
    if file is not None:
        return Directory.around(file.rstrip("/"))
    name = os.path.basename(record["output"])
    if _is_name(name) and note.status(name) is not None:
        return note.below(""), name
    if os.path.isabs(record["output"]) and is_ours(note):
        return Directory.around(record["output"])
    raise XfastError(
        f"{note.path_of(name)}: expected the file of the record beside it; --file names another"
    )


def _volume(note: Directory, record: dict[str, Any], file: str | None) -> tuple[Directory, str]:
    """Return where the volume lies that a record tells of, whatever links lead to it."""
    if file is None and not (os.path.isabs(record["output"]) and is_ours(note)):
        raise XfastError(f"{note.path}: expected a folder that is yours alone; --file names it")
    return Directory.around(os.path.realpath(file or record["output"]))


def _is_name(name: object) -> bool:
    """Tell whether a word is the name of a file, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\0"}


def _changes(
    stack: ExitStack,
    record: dict[str, Any],
    folder: Directory,
    name: str,
    warrant: Warrant,
    expand_limit: int,
    dry_run: bool,
) -> list[_Change]:
    """Return the change of each file that a record names."""
    status = folder.status(name)
    rows = record["files"]
    inside = status is not None and stat.S_ISDIR(status.st_mode)
    if not all(_is_name(row["name"]) for row in rows) or (len(rows) > 1 and not inside):
        raise XfastError(f"{warrant.record}: expected a record of {folder.path_of(name)}")
    if inside:
        folder = stack.enter_context(folder.below(name))
    changes: list[_Change] = []
    for row in rows:
        own = row["name"] if inside else name
        edits = [edit for edit in record["edits"] if not inside or edit.get("member") == own]
        if "journal" in row:
            changes.append(_volume_change(stack, folder, own, row, edits, warrant, dry_run))
            continue
        if not dry_run:
            sweep(folder, own)
            recover_at(Site.beside(folder, own))
        changes.append(_Change(folder, own, row, edits, warrant, expand_limit))
    return changes


def _volume_change(
    stack: ExitStack,
    folder: Directory,
    name: str,
    row: dict[str, str],
    edits: list[dict[str, Any]],
    warrant: Warrant,
    dry_run: bool,
) -> _VolumeChange:
    """Return the change of a volume; one that was interrupted is finished first."""
    journals, journal = Directory.around(row["journal"])
    stack.enter_context(journals)
    site = Site(folder, name, journals, journal.removesuffix(JOURNAL))
    if not dry_run:
        sweep(journals, journal)
        recover_at(site)
    elif site.is_interrupted():
        raise XfastError(f"{site.path}: found an interrupted edit ({site.journal_path})")
    return _VolumeChange(folder, name, row, edits, warrant, EXPAND_LIMIT, site)


@dataclass(frozen=True)
class _Change:
    """The change of one file, as its record tells it."""

    folder: Directory
    name: str
    row: dict[str, str]
    edits: list[dict[str, Any]]
    warrant: Warrant
    expand_limit: int

    @property
    def path(self) -> str:
        """What the file is called in messages."""
        return self.folder.path_of(self.name)

    @property
    def end(self) -> int | None:
        """How many bytes of the file the hashes are of; None for all."""
        return None

    def is_to_do(self) -> bool:
        """Tell whether the file holds the change; False if it is as it was before.

        Raises
        ------
        XfastError
            If it is neither.
        """
        with self._open() as source:
            found = sha256(source.base.fd, (), self.end)
            content = self.row.get("content_before")
            if found == self.row["before"] or (source.outer and sha256(source.fd) == content):
                return False
            if found != self.row["after"]:
                raise XfastError(
                    f"{self.path}: is not what the record left: expected SHA-256 "
                    f"{self.row['after']}, got {found}; nothing was changed"
                )
            edits = self._reversed(source)
            if _hash_with(source, edits, self.end) != self._wanted(source):
                raise XfastError(
                    f"{self.warrant.record}: its edits don't lead back to the file it tells of"
                )
        return True

    def run(self) -> None:
        """Put the old bytes back."""
        with self._open() as source:
            fd = source.base.fd
            original = Original(self.path, fd, self.folder, self.name)
            put = Put(
                self.folder, self.name, original, in_place=True, expand_limit=self.expand_limit
            )
            edits, wanted = self._reversed(source), self._wanted(source)

            def check(again: Source) -> None:
                if sha256(again.fd) != wanted:
                    raise XfastError(f"{self.path}: what was put back reads back otherwise")

            if put.patches(source, edits):
                put.patch_under(self.warrant, source, edits, lambda: check(source))
                return
            with self._backup(source) as kept:

                def fill(out: IO[bytes]) -> None:
                    if kept is None:
                        source.rewrite(edits, out)
                    else:
                        copy_bytes(kept, out.fileno(), os.fstat(kept).st_size)

                put.write(fill, check)

    def _open(self) -> Source:
        fd = open_in(self.folder, self.name)
        return Source.open(self.path, fd=fd, expand_limit=self.expand_limit)

    def _wanted(self, source: Source) -> str:
        """Return the hash that the (expanded) bytes are to have in the end."""
        return self.row.get("content_before", "") if source.outer else self.row["before"]

    @contextmanager
    def _backup(self, source: Source) -> Iterator[int | None]:
        """Yield the old file's packed bytes, open, where the backup still has them."""
        name = self.name + BACKUP
        status = self.folder.status(name)
        if not source.outer or status is None or not stat.S_ISREG(status.st_mode):
            yield None
            return
        with open(self.folder.open_file(name), "rb") as file:
            fits = sha256(file.fileno()) == self.row["before"]
            yield file.fileno() if fits else None

    def _reversed(self, source: Source) -> list[Splice]:
        """Return the edits that lead back, in the file as it is now."""
        try:
            found, shift = [], 0
            for row in sorted(self.edits, key=lambda row: int(row["offset"])):
                old, new = (int(length) for length in row["length"])
                offset = int(row["offset"]) + shift
                now = source.read(offset, new)
                after = str(row["after"])
                held = HASHED + hashlib.sha256(now).hexdigest() if HASHED in after else now.hex()
                if held != after:
                    raise XfastError(
                        f"{self.path}: offset {offset}: expected the bytes that the record left"
                    )
                found.append(Splice(offset, now, unpack(row["before"], old), str(row["field"])))
                shift += new - old
            return found
        except XfastError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise XfastError(
                f"{self.warrant.record}: expected edits with their bytes: {problem}"
            ) from None


@dataclass(frozen=True)
class _VolumeChange(_Change):
    """The change of a volume, which is always patched where it lies.

    Its hashes are of what comes before the end of its stream.
    """

    site: Site

    @property
    def end(self) -> int:
        """How many bytes the hashes are of."""
        return int(self.row["end"])

    def run(self) -> None:
        """Put the old bytes back."""
        with self._open() as source:
            edits = self._reversed(source)

            def check() -> None:
                if sha256(source.fd, (), self.end) != self.row["before"]:
                    raise XfastError(f"{self.path}: what was put back reads back otherwise")

            Original(self.path, source.fd, self.folder, self.name).require_at_rest()
            require_free(self.folder, self.name)
            patch(self.site, source, edits, check, self.warrant)

    def _open(self) -> Source:
        return Source(self.path, self.folder.open_file(self.name))


def _hash_with(source: Source, edits: list[Splice], end: int | None = None) -> str:
    """Return the SHA-256 of a source's bytes with edits, which lie in order and apart."""
    digest, position = hashlib.sha256(), 0
    for edit in edits:
        if edit.offset < position:
            raise XfastError(f"{source.path}: expected edits apart from each other")
        for piece in source.chunks(position, edit.offset):
            digest.update(piece)
        digest.update(edit.new)
        position = edit.offset + len(edit.old)
    for piece in source.chunks(position, end):
        digest.update(piece)
    return digest.hexdigest()
