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
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from xfast.errors import XfastError
from xfast.fleet.judging import (
    COLUMNS,
    FINDING,
    Question,
    Result,
    finding_rows,
    verdict_rows,
)

SCHEMA = "xfast/scan/1"
TABLES = ("snapshots", "verdicts", "findings")


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
        self.lock = -1
        self.used: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Dataset:
        try:
            os.makedirs(self.folder, exist_ok=True)
            known = {*TABLES, "_work", "manifest.json", ".lock"}
            foreign = sorted(set(os.listdir(self.folder)) - known)
            if foreign:
                raise XfastError(
                    f"{self.folder}: expected an empty folder or a scan's results, "
                    f"found {foreign[0]!r}"
                )
            for name in (*TABLES, "_work"):
                os.makedirs(os.path.join(self.folder, name), exist_ok=True)
            self.lock = os.open(
                os.path.join(self.folder, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.lock)
            raise XfastError(f"{self.folder}: another scan is writing here") from None
        except OSError as problem:
            raise XfastError(f"{self.folder}: can't be written: {problem.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self.lock >= 0:
            os.close(self.lock)

    def key(self, names: Sequence[str]) -> str:
        """Return what a chunk is called: it depends on its names and the question."""
        digest = hashlib.sha256(self.name.encode())
        for name in names:
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()[:24]

    def finished(self, key: str) -> dict[str, Any] | None:
        """Return what is kept of a chunk that is finished, and count it as used."""
        try:
            with open(self._path("_work", f"{key}.json"), "rb") as file:
                kept: dict[str, Any] = json.loads(file.read())
            if not os.path.exists(self._path("snapshots", f"{key}.parquet")):
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
        self._write("_work", f"{key}.json", json.dumps(kept).encode())
        self.used[key] = kept
        return kept

    def finish(self) -> dict[str, Any]:
        """Write the tables of classes and the manifest; remove what belongs to neither."""
        for table in ("verdicts", "findings"):
            rows = {json.dumps(row): row for kept in self.used.values() for row in kept[table]}
            self._write_table(table, "part-0.parquet", [rows[key] for key in sorted(rows)])
        for folder, end in (("snapshots", ".parquet"), ("_work", ".json")):
            for name in os.listdir(os.path.join(self.folder, folder)):
                if name.removesuffix(end) not in self.used:
                    with contextlib.suppress(OSError):
                        os.unlink(self._path(folder, name))
        manifest = {
            "schema": SCHEMA,
            "tool": version("xfast"),
            "hosts": [host.name for host in self.question.hosts],
            "level": self.question.policy.level,
            "ignore": sorted(self.question.policy.ignore),
            "parts": sorted(f"snapshots/{key}.parquet" for key in self.used),
            **totals(self.used),
        }
        self._write("", "manifest.json", json.dumps(manifest, indent=1).encode() + b"\n")
        return manifest

    def _path(self, *names: str) -> str:
        return os.path.join(self.folder, *names)

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
        self._write(table, name, sink.getvalue())

    def _write(self, folder: str, name: str, data: Any) -> None:
        """Write a file beside its place, bring it to the disk, and give it its place."""
        temporary = self._path(folder, f".{name}.new")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, self._path(folder, name))
        except OSError as problem:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise XfastError(
                f"{self._path(folder, name)}: can't be written: {problem.strerror}; what is "
                "finished stays, and the same command goes on from there"
            ) from None


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
        raise XfastError(f"{folder}: expected a finished scan, found no manifest.json")
    for name in names:
        try:
            yield dataset.dataset(os.path.join(folder, name), format="parquet").to_table()
        except (OSError, ValueError) as problem:
            raise XfastError(f"{folder}/{name}: can't be read: {problem}") from None
