"""The change record: what was changed in a file, why, and how to tell the two files apart.

It is on the disk before the first byte changes, so whatever is changed has its record. A nonce in
it is what a journal has to name to be trusted. `xfast.store.undo` reads it back.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from xfast.errors import XfastError
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import Splice
from xfast.store.access import Access
from xfast.store.names import Directory, doubt
from xfast.store.staged import Staged
from xfast.version import __version__

SCHEMA = "xfast/1"
HASH = re.compile("(?:[0-9a-f]{64})?")  # none yet, where a change has just begun
NUMBER = re.compile("[0-9]{1,18}")
RECORD_LIMIT = 256 << 20
"""No record is larger than this (bytes)."""

PLAIN_LIMIT = 16384
"""Longer values (bytes) are packed."""

PACKED = "zlib:"
HASHED = "sha256:"
CHUNK = 1 << 20


def sha256(fd: int, edits: Iterable[Splice] = (), end: int | None = None) -> str:
    """Return the SHA-256 of a file, as it is or as edits of equal length will make it.

    Parameters
    ----------
    fd : int
        Open for reading; its position stays.
    edits : iterable of Splice
        Sorted by offset.
    end : int, optional
        How many bytes count; default: all.
    """
    digest = hashlib.sha256()
    rest = list(edits)
    offset = 0
    while True:
        size = CHUNK if end is None else min(CHUNK, end - offset)
        chunk = bytearray(os.pread(fd, size, offset))
        if not chunk:
            return digest.hexdigest()
        edge = offset + len(chunk)
        for edit in rest:
            if edit.offset >= edge:
                break
            start = max(edit.offset, offset)
            stop = min(edit.offset + len(edit.new), edge)
            piece = edit.new[start - edit.offset : stop - edit.offset]
            chunk[start - offset : stop - offset] = piece
        rest = [edit for edit in rest if edit.offset + len(edit.new) > edge]
        digest.update(chunk)
        offset = edge


def row_of(name: str, source: Source) -> dict[str, str]:
    """Return a file's row in a record's ``files``, as far as it is known before the change."""
    row = {"name": name, "before": sha256(source.base.fd), "after": ""}
    if source.outer:
        row |= {"content_before": sha256(source.fd), "content_after": ""}
    return row


def complete(row: dict[str, str], source: Source) -> None:
    """Fill in what a row says of the file as it is after the change."""
    row["after"] = sha256(source.base.fd)
    if "content_after" in row:
        row["content_after"] = sha256(source.fd)


def pack(data: bytes) -> str:
    """Return bytes as a record has them: hexadecimal, or packed where they are long."""
    if len(data) <= PLAIN_LIMIT:
        return data.hex()
    return PACKED + base64.b64encode(zlib.compress(data)).decode()


def unpack(text: str, length: int) -> bytes:
    """Return the bytes in a record's value.

    Raises
    ------
    ValueError
        If it is not that many bytes, or only their hash.
    """
    if not text.startswith(PACKED):
        data = bytes.fromhex(text)
    else:
        unpacker = zlib.decompressobj()
        try:
            packed = base64.b64decode(text.removeprefix(PACKED), validate=True)
            data = unpacker.decompress(packed, length + 1)
        except zlib.error as problem:
            raise ValueError(str(problem)) from None
    if len(data) != length:
        raise ValueError(f"expected {length} bytes, got {len(data)}")
    return data


def edit_as_json(edit: Splice) -> dict[str, Any]:
    """Return one edit of the bytes, which count after decompression."""
    after = edit.new.hex()
    if len(edit.new) > PLAIN_LIMIT:  # the file itself has them
        after = HASHED + hashlib.sha256(edit.new).hexdigest()
    return {
        "member": edit.member,
        "field": edit.field,
        "offset": edit.offset,
        "length": [len(edit.old), len(edit.new)],
        "before": pack(edit.old),
        "after": after,
    }


def record_of(
    snapshot: str,
    output: str,
    host: dict[str, Any],
    changes: Sequence[dict[str, Any]],
    notes: Iterable[str],
    edits: Sequence[Splice],
) -> dict[str, Any]:
    """Return the record of one change; ``files`` is filled in when the hashes are known.

    Raises
    ------
    XfastError
        If it would be too long to be read again.
    """
    rows = [edit_as_json(edit) for edit in edits]
    if sum(len(row["before"]) + len(row["after"]) for row in rows) > RECORD_LIMIT // 2:
        raise XfastError(
            f"{snapshot}: expected changes that fit into a record of {RECORD_LIMIT} bytes, got more"
        )
    return {
        "schema": SCHEMA,
        "xfast": __version__,
        "nonce": secrets.token_hex(16),
        "snapshot": os.path.abspath(snapshot),
        "output": os.path.abspath(output),
        "host": host,
        "changes": list(changes),
        "notes": list(dict.fromkeys(notes)),
        "edits": rows,
        "files": [],
    }


def read_record(folder: Directory, name: str) -> dict[str, Any]:
    """Return a record that only root or this user can have written.

    Raises
    ------
    XfastError
        If it is none, or another's work.
    OSError
        If it can't be opened.
    """
    path = folder.path_of(name)
    with open(folder.open_file(name), "rb") as file:
        why = doubt(os.fstat(file.fileno()))
        if why:
            raise XfastError(
                f"{path}: {why}; expected a change record that only root or you can have written"
            )
        data = file.read(RECORD_LIMIT + 1)
    try:
        record = json.loads(data)
        rows = [(row["name"], row["before"], row["after"]) for row in record["files"]]
        words = [record["output"], record["snapshot"], record["nonce"], *sum(rows, ())]
        fits = (
            record["schema"] == SCHEMA,
            bool(rows),
            all(isinstance(word, str) for word in words),
            all(HASH.fullmatch(word) for row in rows for word in row[1:]),
            all(NUMBER.fullmatch(row.get("end", "0")) for row in record["files"]),
            all(isinstance(row.get("journal", ""), str) for row in record["files"]),
            all(type(edit["offset"]) is int for edit in record["edits"]),
            all(0 <= edit["offset"] < 1 << 63 for edit in record["edits"]),
            all(isinstance(one, dict) for one in record["changes"]),
        )
        if all(fits):
            return dict(record)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise XfastError(f"{path}: expected a change record of xfast, got something else")


@dataclass
class Note:
    """A record on its way to its place.

    Parameters
    ----------
    folder, name
        Where it is to be.
    record : dict
        With its ``files``, by the time it is published.
    access : Access
        What every file gives that it tells of: it holds their bytes. Its owner is who wrote it, so
        that it can be trusted.
    """

    folder: Directory
    name: str
    record: dict[str, Any]
    access: Access

    @property
    def path(self) -> str:
        """Where it is to be, in full."""
        return os.path.abspath(self.folder.path_of(self.name))

    def require_apart(self, folder: Directory, names: Iterable[str]) -> None:
        """Raise XfastError if the record would take the place of one of these files."""
        if os.path.samestat(os.fstat(self.folder.fd), os.fstat(folder.fd)) and self.name in names:
            raise XfastError(
                f"{self.path}: is needed for another file; expected a place of its own for the "
                "record"
            )

    @contextlib.contextmanager
    def standing(self, begun: Callable[[], bool]) -> Iterator[str]:
        """Publish the record, then let the data follow; yield the nonce of the one that stands.

        The record of a run that was killed stays if it tells of this change too. It is replaced
        if its own change never happened.

        Parameters
        ----------
        begun : callable
            Tells whether any file is already changed; otherwise the record goes when the
            change fails.
        """
        old = self._old()
        if old is not None and _covers(old, self.record):
            yield old["nonce"]
            return
        if old is not None and not _covers(self.record, old, sides=("before",)):
            raise XfastError(f"{self.path}: exists; expected a new name")
        with Staged(self.folder, self.name) as staged:
            staged.file.write(json.dumps(self.record, indent=1).encode() + b"\n")
            staged.take_over(self.access, owned=False)
            staged.publish(replace=old is not None)
        try:
            yield self.record["nonce"]
        except BaseException:
            if not begun():
                self.folder.remove(self.name)
            raise

    def _old(self) -> dict[str, Any] | None:
        """Return the record that stands where this one is to go, if any."""
        if self.folder.status(self.name) is None:
            return None
        try:
            old = read_record(self.folder, self.name)
            if os.path.basename(old["output"]) == os.path.basename(self.record["output"]):
                return old
        except (OSError, XfastError):
            pass
        raise XfastError(f"{self.path}: exists; expected a new name")


def _covers(
    record: dict[str, Any], other: dict[str, Any], *, sides: Sequence[str] = ("before", "after")
) -> bool:
    """Tell whether a record tells of all files of another, with the same hashes."""
    rows = {row["name"]: row for row in record["files"]}
    return all(
        row["name"] in rows and all(rows[row["name"]][side] == row[side] for side in sides)
        for row in other["files"]
    )
