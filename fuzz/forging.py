"""A target behind `undo`: change records and journals that somebody has changed.

An input is JSON: a record, a journal (or null), and how many bytes of the file the change that was
interrupted had written. ``@`` stands for the folder that they lie in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import deeper
import snapshot_files as files

from xfast import plan_fix, snapshots
from xfast.errors import XfastError
from xfast.store import put
from xfast.store.undo import undo

OLD = files.area(1, 4096, 0x207)
FILE = deeper.FOLDER / "vm"
RECORD = deeper.FOLDER / "vm.xfast.json"
JOURNAL = deeper.FOLDER / "vm.xfast-journal"


@cache
def change(backup: bool = False) -> tuple[bytes, dict[str, Any]]:
    """Return the file after a change where it lies, and the change's record."""
    put.PATCH_FROM = 0
    deeper.fresh()
    FILE.write_bytes(OLD)
    (found,) = snapshots.read(str(FILE))
    plan_fix(found, deeper.HOSTS[1]).apply(in_place=True, backup=backup)
    return FILE.read_bytes(), json.loads(RECORD.read_text())


def changes() -> Iterator[bytes]:
    """Yield records, with the journal of a change that is over, begins, or is in the middle."""
    new, record = change()
    differ = [i for i, (one, other) in enumerate(zip(OLD, new, strict=True)) if one != other]
    first, end = differ[0], differ[-1] + 1
    journal = {
        "schema": "xfast-journal/1",
        "name": FILE.name,
        "record": str(RECORD),
        "nonce": record["nonce"],
        "size": len(OLD),
        "edits": [{"offset": first, "old": OLD[first:end].hex(), "new": new[first:end].hex()}],
    }
    for told, found, written in (
        (record, None, len(new)),
        (record, journal, 0),
        (record, journal, first + 5),
        (change(backup=True)[1], None, len(new)),
    ):
        text = json.dumps({"record": told, "journal": found, "written": written})
        yield text.replace(str(deeper.FOLDER), "@").encode()


def taken_back(data: bytes) -> None:
    """Undo a change by what is told of it: where that succeeds the file is what the record says.

    Its length stays in any case, and nothing else is left beside it.
    """
    try:
        told = json.loads(data.replace(b"@", bytes(deeper.FOLDER)))
        record, journal, written = told["record"], told["journal"], int(told["written"])
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return
    new, _ = change()
    deeper.fresh()
    written = max(0, min(written, len(OLD)))
    FILE.write_bytes(new[:written] + OLD[written:])
    for path, content in ((RECORD, record), (JOURNAL, journal)):
        if content is not None:
            path.write_text(json.dumps(content))
            path.chmod(0o600)
    try:
        done = undo(str(RECORD))
    except XfastError as problem:
        text = str(problem)
        assert "\n" not in text, text
        assert len(text) < 1000, len(text)
    else:
        if done.files == ((str(FILE), True),):
            assert hashlib.sha256(FILE.read_bytes()).hexdigest() == record["files"][0]["before"]
    assert FILE.stat().st_size == len(OLD)
    assert set(deeper.FOLDER.iterdir()) <= {FILE, RECORD, JOURNAL}
