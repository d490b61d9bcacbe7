"""The tables of a scan, and the folder they lie in.

    RESULTS/
      manifest.json          what was asked, and which parts there are, when all is done
      snapshots/*.parquet    a row a vCPU: what it carries, and its class; or why it has none;
                             of a stack of areas a row for all that are alike: `count` of them
      verdicts/*.parquet     a row a class and host: the answer
      findings/*.parquet     a row a class, host and finding: why
      _work/                 one file a finished chunk, so that a scan can be taken up again

A *class* is one answer of all hosts. Ten million snapshots have a few hundred, so an answer is kept
once and not once a snapshot; ``JOIN ... USING (class)`` brings the two together. Every file is
written beside its place and renamed into it, so what has its name is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xfast.errors import XfastError, escape
from xfast.fleet.judging import (
    COLUMNS,
    FINDING,
    Question,
    Result,
    finding_rows,
    verdict_rows,
)
from xfast.store.names import SAFE_FOLDER_MODE, Directory, make_folders, umask
from xfast.store.staged import TEMPORARY, Staged
from xfast.version import __version__

SCHEMA = "xfast/scan/1"
TABLES = ("snapshots", "verdicts", "findings")

NAMES = {
    "": r"manifest\.json|\.lock|snapshots|verdicts|findings|_work",
    "snapshots": r"[0-9a-f]{24}\.parquet",
    "verdicts": r"part-0\.parquet",
    "findings": r"part-0\.parquet",
    "_work": r"[0-9a-f]{24}\.json",
}
"""What a scan calls things in each of its folders. It takes no folder that holds anything else, and
removes nothing else."""


def arrow() -> Any:
    """Return pyarrow.

    Raises
    ------
    XfastError
        If it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise XfastError("scan needs pyarrow: pip install 'xfast[arrow]'") from None
    return pyarrow


def schemas() -> dict[str, Any]:
    """Return {table: its Arrow schema}; names and types are stable."""
    pa = arrow()
    masks = dict.fromkeys(("xcr0", "xstate_bv", "xcomp_bv", "live", "default"), pa.uint64())
    kinds = {
        **dict.fromkeys(COLUMNS, pa.string()),
        **masks,
        "vcpu": pa.int64(),
        "size": pa.int64(),
        "count": pa.int64(),
        "mxcsr": pa.uint32(),
    }
    finding = {**dict.fromkeys(FINDING, pa.string()), "vcpu": pa.int64()}
    return {
        "snapshots": pa.schema([(name, kinds[name]) for name in COLUMNS]),
        "verdicts": pa.schema(
            [
                ("class", pa.string()),
                ("host", pa.string()),
                ("verdict", pa.string()),
                ("fixable", pa.string()),
                ("risky", pa.bool_()),
                ("codes", pa.list_(pa.string())),
            ]
        ),
        "findings": pa.schema(
            [("class", pa.string()), ("host", pa.string()), *((n, finding[n]) for n in FINDING)]
        ),
    }


class Dataset:
    """A results folder, held by one scan at a time. A context manager.

    Parameters
    ----------
    folder : str
        Made where it is missing.
    question : Question
        What is asked; chunks of another question are not taken over.

    Raises
    ------
    XfastError
        If another scan holds the folder, if it holds something else than a scan's results, or if
        it can't be written.
    """

    def __init__(self, folder: str, question: Question) -> None:
        self.folder = folder
        self.question = question
        self.packed = question.packed()
        self.name = question.name()
        self.schemas = schemas()
        self.stack = contextlib.ExitStack()
        self.folders: dict[str, Directory] = {}
        self.used: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Dataset:
        try:
            make_folders(self.folder)
            self.root = self.stack.enter_context(Directory.open(self.folder))
            self._require_own()
            there = [name for name in NAMES if not name or self.root.status(name)]
            for name in there:
                self._require_only(name)
            for name in (*TABLES, "_work"):
                if name not in there:
                    self.root.make_folder(name, SAFE_FOLDER_MODE & ~umask())
                self.folders[name] = self.stack.enter_context(self.root.below(name))
            lock = self.root.open_file(".lock", os.O_RDWR | os.O_CREAT)
            self.stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._begin()
        except BaseException as problem:
            self.stack.close()
            if isinstance(problem, BlockingIOError):
                raise XfastError(f"{self.folder}: another scan is writing here") from None
            if isinstance(problem, OSError):
                raise XfastError(f"{self.folder}: can't be written: {problem.strerror}") from None
            raise
        return self

    def _require_own(self) -> None:
        """Raise XfastError if somebody else can write the folder: what is kept there is trusted."""
        status = os.fstat(self.root.fd)
        writers = 0o002 if status.st_gid == os.getegid() else 0o022
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & writers:
            raise XfastError(
                f"{self.folder}: others can write it (user {status.st_uid}, group {status.st_gid}, "
                f"mode {stat.S_IMODE(status.st_mode):04o}); expected a folder of your own"
            )

    def _begin(self) -> None:
        """Forget a scan that was complete: it has a manifest. One that was stopped has none."""
        if self.root.status("manifest.json") is None:
            return
        for name in os.listdir(self.folders["_work"].fd):
            if is_own("_work", name):
                self.folders["_work"].remove(name)
        self.root.remove("manifest.json")

    def _require_only(self, name: str) -> None:
        """Raise XfastError if there is anything in a folder that no scan has put there."""
        with self.root.below(name) as folder:
            foreign = sorted(one for one in os.listdir(folder.fd) if not is_own(name, one))
        if foreign:
            raise XfastError(
                f"{self.folder}: expected an empty folder or a scan's results, "
                f"got {os.path.join(name, foreign[0])!r}"
            )

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def key(self, names: Sequence[str]) -> str:
        """Return what a chunk is called: it depends on its names and the question."""
        digest = hashlib.sha256(self.name.encode())
        for name in names:
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()[:24]

    def finished(self, key: str) -> dict[str, Any] | None:
        """Return what is kept of a chunk that is finished, and count it as used."""
        try:
            with open(self.folders["_work"].open_file(f"{key}.json"), "rb") as file:
                kept: dict[str, Any] = json.loads(file.read())
            if self.folders["snapshots"].status(f"{key}.parquet") is None:
                return None
        except (OSError, ValueError):
            return None
        self.used[key] = kept
        return kept

    def add(self, key: str, result: Result) -> dict[str, Any]:
        """Keep what a chunk has come to: its part first, then the note that it is finished."""
        self._write_table("snapshots", f"{key}.parquet", result.rows)
        kept = {
            "snapshots": result.snapshots,
            "failed": result.failed,
            "words": result.words,
            "verdicts": [
                row for name, own in result.classes.items() for row in verdict_rows(name, own)
            ],
            "findings": [
                row for name, own in result.classes.items() for row in finding_rows(name, own)
            ],
        }
        self._write(self.folders["_work"], f"{key}.json", json.dumps(kept).encode())
        self.used[key] = kept
        return kept

    def finish(self) -> dict[str, Any]:
        """Write the tables of classes and the manifest; remove what belongs to neither."""
        for table in ("verdicts", "findings"):
            rows = {json.dumps(row): row for kept in self.used.values() for row in kept[table]}
            self._write_table(table, "part-0.parquet", [rows[key] for key in sorted(rows)])
        for folder, end in (("snapshots", ".parquet"), ("_work", ".json")):
            for name in os.listdir(self.folders[folder].fd):
                if name.removesuffix(end) not in self.used and is_own(folder, name):
                    with contextlib.suppress(OSError):
                        self.folders[folder].remove(name)
        manifest = {
            "schema": SCHEMA,
            "tool": __version__,
            "hosts": [escape(host.name) for host in self.question.hosts],
            "level": self.question.policy.level,
            "ignore": sorted(self.question.policy.ignore),
            "parts": sorted(f"snapshots/{key}.parquet" for key in self.used),
            **totals(self.used),
        }
        self._write(self.root, "manifest.json", json.dumps(manifest, indent=1).encode() + b"\n")
        return manifest

    def _write_table(self, table: str, name: str, rows: Sequence[Sequence[Any]]) -> None:
        pa, schema = arrow(), self.schemas[table]
        columns = list(zip(*rows, strict=True)) or [()] * len(schema)
        arrays = [
            pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)
        ]
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(
            pa.table(arrays, schema=schema), sink, compression="zstd", store_schema=True
        )
        self._write(self.folders[table], name, sink.getvalue())

    def _write(self, folder: Directory, name: str, data: Any) -> None:
        """Write a file beside its place, bring it to the disk, and give it its place."""
        try:
            with Staged(folder, name) as staged:
                staged.file.write(data)
                staged.take_over(None)
                staged.publish(replace=True)
        except OSError as problem:
            raise XfastError(
                f"{folder.path_of(name)}: can't be written: {problem.strerror}; what is "
                "finished stays, and the same command goes on from there"
            ) from None


def is_own(folder: str, name: str) -> bool:
    """Tell whether a scan calls something so in one of its folders, temporary files included."""
    own = f"({NAMES[folder]})"
    return bool(re.fullmatch(f"{own}|{TEMPORARY.format(own)}", name))


def totals(used: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many snapshots were judged in chunks, how many were not, and the verdicts."""
    words: dict[str, int] = {}
    for kept in used.values():
        for word, number in kept["words"].items():
            words[word] = words.get(word, 0) + number
    return {
        "snapshots": sum(kept["snapshots"] for kept in used.values()),
        "failed": sum(kept["failed"] for kept in used.values()),
        "verdicts": dict(sorted(words.items())),
    }


def tables(folder: str, *names: str) -> Iterator[Any]:
    """Yield tables of a scan's results, as pyarrow.

    Raises
    ------
    XfastError
        If the folder holds no finished scan.
    """
    arrow()
    from pyarrow import dataset

    if not os.path.exists(os.path.join(folder, "manifest.json")):
        raise XfastError(f"{folder}: expected a finished scan, got no manifest.json")
    for name in names:
        try:
            yield dataset.dataset(os.path.join(folder, name), format="parquet").to_table()
        except (OSError, ValueError) as problem:
            raise XfastError(f"{folder}/{name}: can't be read: {problem}") from None
