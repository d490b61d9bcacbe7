"""The change record: what was changed in a file, why, and how to tell the two files apart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

from xfast.hosts.model import Host
from xfast.repair.plan import Change
from xfast.snapshots.model import Splice

SCHEMA = "xfast/1"
SUFFIX = ".xfast.json"
VALUE_LIMIT = 16384
"""Longer values (bytes) are recorded by their SHA-256."""

CHUNK = 1 << 20


def sha256(fd: int, edits: Iterable[Splice] = ()) -> str:
    """Return the SHA-256 of a file, as it is or as edits of equal length will make it.

    Parameters
    ----------
    fd : int
        Open for reading; its position stays.
    edits : iterable of Splice
        Sorted by offset.
    """
    digest = hashlib.sha256()
    rest = list(edits)
    offset = 0
    while True:
        chunk = bytearray(os.pread(fd, CHUNK, offset))
        if not chunk:
            return digest.hexdigest()
        end = offset + len(chunk)
        for edit in rest:
            if edit.offset >= end:
                break
            start = max(edit.offset, offset)
            stop = min(edit.offset + len(edit.new), end)
            piece = edit.new[start - edit.offset : stop - edit.offset]
            chunk[start - offset : stop - offset] = piece
        rest = [edit for edit in rest if edit.offset + len(edit.new) > end]
        digest.update(chunk)
        offset = end


def _value(data: bytes) -> str:
    return data.hex() if len(data) <= VALUE_LIMIT else f"sha256:{hashlib.sha256(data).hexdigest()}"


def edit_as_json(edit: Splice) -> dict[str, Any]:
    """Return one edit of the bytes, which count after decompression."""
    return {
        "member": edit.member,
        "field": edit.field,
        "offset": edit.offset,
        "length": [len(edit.old), len(edit.new)],
        "before": _value(edit.old),
        "after": _value(edit.new),
    }


def record_of(
    snapshot: str,
    output: str,
    host: Host,
    changes: Sequence[Change],
    notes: Iterable[str],
    edits: Sequence[Splice],
) -> dict[str, Any]:
    """Return the record of one rewrite; ``files`` is filled in when the hashes are known."""
    return {
        "schema": SCHEMA,
        "xfast": version("xfast"),
        "snapshot": snapshot,
        "output": output,
        "host": {"name": host.name, "source": host.source},
        "changes": [change.as_json() for change in changes],
        "notes": list(dict.fromkeys(notes)),
        "edits": [edit_as_json(edit) for edit in edits],
        "files": [],
    }
