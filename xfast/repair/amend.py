"""Plans brought to files: read again, staged, read back, recorded, and only then published."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xfast import snapshots
from xfast.errors import PolicyError, XfastError
from xfast.repair.plan import Plan
from xfast.repair.record import SUFFIX, record_of, sha256
from xfast.snapshots.bytes.folder import Folder
from xfast.snapshots.bytes.source import EXPAND_LIMIT, JOURNAL, Source, copy_bytes
from xfast.snapshots.model import Snapshot, Splice, Stamp
from xfast.store.rewrite import Staged, clone, make_like, patch, refuse_if_busy, stamp_of, sweep
from xfast.xsave.area import headers

BACKUP = ".orig"
RECORD_LIMIT = 256 << 20
"""No record that is read again is larger than this (bytes)."""

PATCH_FROM = 64 << 20
"""Files from this size on (bytes) are patched where they lie, unless a copy shares its blocks."""


def apply(
    plans: Sequence[Plan],
    output: str | None = None,
    *,
    in_place: bool = False,
    backup: bool = False,
    record: str | None = None,
    expand_limit: int = EXPAND_LIMIT,
) -> dict[str, Any] | None:
    """Write repaired snapshots: a new file, or the old one replaced.

    Parameters
    ----------
    plans : sequence of Plan
        Of one file, or of one CRIU directory; all its snapshots.
    output : str, optional
        The new file (directory), which must not exist.
    in_place : bool
        Change the file itself: a new one renamed over it or, from 64 MiB on, if not compressed
        and the file system can't share blocks, only the pages that change, under a journal. The
        files of a directory change one by one.
    backup : bool
        Keep what was there as ``NAME.orig``.
    record : str, optional
        Where the change record goes; default: ``OUTPUT.xfast.json``.
    expand_limit : int
        What compressed data may expand to (bytes).

    Returns
    -------
    dict or None
        The change record; None where there was nothing to change, and so nothing was written.

    Raises
    ------
    PolicyError
        If the host would refuse the result all the same, or the format has no place for it.
    FormatError
        If the file is damaged.
    XfastError
        If the file is being written or changed since it was read, if something stands in the
        way, or something can't be written.
    """
    if in_place == (output is not None) or (backup and not in_place):
        raise ValueError("apply: needed either output, or in_place with or without backup")
    for plan in plans:
        plan.require_restorable()
    path = plans[0].snapshot.path
    target = path.rstrip("/") if output is None else output.rstrip("/")
    note = record or target + SUFFIX
    rewrite = _Rewrite(plans, path, target, note, in_place, backup, expand_limit)
    try:
        for name in (target, note, path + JOURNAL, path + BACKUP):
            sweep(name)
        if in_place and os.path.isdir(path):
            for name in os.listdir(path):
                sweep(os.path.join(path, name))
        if output is not None and os.path.lexists(target):
            raise XfastError(f"{target}: exists; needed a new name")
        return rewrite.folder() if os.path.isdir(path) else rewrite.file()
    except OSError as problem:
        name = problem.filename if isinstance(problem.filename, str) else target
        raise XfastError(f"{name}: can't be written: {problem.strerror or problem}") from None


@dataclass(frozen=True)
class _Rewrite:
    """One call of `apply`: its parameters, and its two ways."""

    plans: Sequence[Plan]
    path: str
    target: str
    note: str
    in_place: bool
    backup: bool
    expand_limit: int

    def file(self) -> dict[str, Any] | None:
        """Rewrite a file."""
        with Source.open(self.path, expand_limit=self.expand_limit) as source:
            stamp = stamp_of(source.base.fd)
            if self.plans[0].snapshot.stamp not in (None, stamp):
                raise XfastError(f"{self.path}: changed since it was read; nothing was written")
            if self.in_place:
                _require_one_name(self.path, source.base.fd)
            size = len(self.plans[0].snapshot.vcpus[0].area)
            found = self._read(source, size)
            edits = self._edits(source, found)
            if not edits:
                self._check(found)
                return None
            record = self._record(edits)
            fd = source.base.fd
            record["files"] = [{"name": os.path.basename(self.path), "before": sha256(fd)}]
            if not self._patches(source, edits):
                self._replace(source, stamp, edits, record)
                return record
            record["files"][0]["after"] = sha256(fd, edits)
            with self._recorded(record, _mode(fd)):
                if self.backup and not self._has_backup(record):
                    self._copy(source, self.path + BACKUP)
                refuse_if_busy(self.path, fd, stamp, named=True)
                patch(source, edits, lambda: self._check_source(source))
            return record

    def _replace(
        self,
        source: Source,
        stamp: Stamp,
        edits: list[Splice],
        record: dict[str, Any],
    ) -> None:
        """Write the whole file anew, read it back, and give it its place."""
        base = source.base
        refuse_if_busy(self.path, base.fd, stamp, named=self.in_place)
        with Staged(self.target, _mode(base.fd)) as staged:
            source.rewrite(edits, staged.file)
            staged.file.flush()
            with Source.open(staged.temporary_path, expand_limit=self.expand_limit) as again:
                self._check_source(again)
            record["files"][0]["after"] = sha256(staged.file.fileno())
            if self.in_place:
                make_like(staged.file.fileno(), base.fd)
            with self._recorded(record, _mode(base.fd)):
                refuse_if_busy(self.path, base.fd, stamp, named=self.in_place)
                if self.backup:
                    _keep(self.path)
                staged.publish(replace=self.in_place)

    def folder(self) -> dict[str, Any] | None:
        """Rewrite the images in a CRIU directory."""
        with snapshots.open_input(self.path, expand_limit=self.expand_limit) as source:
            edits = self._edits(source, snapshots.read(self.path))
        if not edits:
            return None
        record = self._record(edits)
        if self.in_place:
            record["files"] = self._hashes(self.path, edits)
            with self._recorded(record, 0o600):
                self._members(self.path, edits)
            return record
        folder, name = os.path.split(self.target)
        staged = os.path.join(folder, f".{name}.xfast-new")
        shutil.rmtree(staged, ignore_errors=True)  # what a killed process left
        try:
            shutil.copytree(self.path, staged, symlinks=True, copy_function=_copy_into)
            record["files"] = self._hashes(staged, edits)
            self._members(staged, edits)
            self._check(snapshots.read(staged))
            with self._recorded(record, 0o600):
                os.rename(staged, self.target)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        _sync_folder(folder or ".")
        return record

    def _hashes(self, folder: str, edits: list[Splice]) -> list[dict[str, str]]:
        """Return the record's ``files`` of a directory: each image as it is, and as it will be."""
        rows = []
        for name, own in _by_member(edits).items():
            path = os.path.join(folder, name)
            with Source.open(path) as source, Staged(path) as trial:
                _require_one_name(path, source.fd)
                source.rewrite(own, trial.file)
                trial.file.flush()
                after = sha256(trial.file.fileno())
                rows.append({"name": name, "before": sha256(source.fd), "after": after})
        return rows

    def _members(self, folder: str, edits: list[Splice]) -> None:
        """Replace the images in a directory that change, one by one, each as a whole."""
        for name, own in _by_member(edits).items():
            path = os.path.join(folder, name)
            with Source.open(path) as source, Staged(path) as staged:
                stamp = stamp_of(source.fd)
                source.rewrite(own, staged.file)
                staged.file.flush()
                make_like(staged.file.fileno(), source.fd)
                refuse_if_busy(path, source.fd, stamp, named=True)
                if self.backup:
                    _keep(path)
                staged.publish(replace=True)

    @contextlib.contextmanager
    def _recorded(self, record: dict[str, Any], mode: int) -> Iterator[None]:
        """Publish the record, then let the data follow; whatever is changed has its record.

        The record of a run that was killed stays where it tells of this change too, and makes
        way where its change never came about.
        """
        self._require_apart(record)
        old = self._old_record()
        if old is not None and _covers(old, record):
            yield
            return
        if old is not None and not _covers(record, old, sides=("before",)):
            raise XfastError(f"{self.note}: exists; needed a new name")
        with Staged(self.note, mode) as note:
            note.file.write(json.dumps(record, indent=1).encode() + b"\n")
            note.publish(replace=old is not None)
        try:
            yield
        except BaseException:
            if not self._begun(record):
                os.unlink(self.note)
            raise

    def _old_record(self) -> dict[str, Any] | None:
        """Return the record that stands where this one is to go, if any."""
        if not os.path.lexists(self.note):
            return None
        try:
            fd = os.open(self.note, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb") as file:
                record = json.loads(file.read(RECORD_LIMIT))
            rows = {row["name"]: (row["before"], row["after"]) for row in record["files"]}
            if rows and record["output"] == self.target:
                return dict(record)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        raise XfastError(f"{self.note}: exists; needed a new name")

    def _begun(self, record: dict[str, Any]) -> bool:
        """Tell whether any file of a record is already what it is to be."""
        if not self.in_place:
            return False
        inside = os.path.isdir(self.path)
        for row in record["files"]:
            path = os.path.join(self.path, row["name"]) if inside else self.path
            with open(path, "rb") as file:
                if sha256(file.fileno()) == row["after"]:
                    return True
        return False

    def _has_backup(self, record: dict[str, Any]) -> bool:
        """Tell whether a run that was interrupted made the copy already."""
        try:
            fd = os.open(self.path + BACKUP, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        with open(fd, "rb"):
            regular = stat.S_ISREG(os.fstat(fd).st_mode)
            return regular and sha256(fd) == record["files"][0]["before"]

    def _require_apart(self, record: dict[str, Any]) -> None:
        """Raise XfastError if the record would take the name of another file of this run."""
        paths = [self.path, self.target]
        if os.path.isdir(self.path):
            paths += [os.path.join(self.path, row["name"]) for row in record["files"]]
        names = {path + end for path in paths for end in ("", BACKUP, JOURNAL)}
        if os.path.realpath(self.note) in {os.path.realpath(name) for name in names}:
            raise XfastError(f"{self.note}: is needed for another file; the record needs its own")

    def _patches(self, source: Source, edits: list[Splice]) -> bool:
        """Tell whether to edit the file where it lies: a whole new one would cost its size."""
        moving = any(len(edit.old) != len(edit.new) for edit in edits)
        if not self.in_place or source.outer or moving or source.size < PATCH_FROM:
            return False
        with Staged(self.target) as trial:
            return not clone(source.fd, trial.file.fileno())

    def _edits(self, source: Source | Folder, now: list[Snapshot]) -> list[Splice]:
        """Return the edits of all plans, after a look that the file still holds what was read."""
        edits: list[Splice] = []
        if len(self.plans) != len(now):
            raise XfastError(
                f"{self.path}: holds {len(now)} snapshots, got {len(self.plans)} plans"
            )
        for plan, found in zip(self.plans, now, strict=True):
            if _differs(found, plan.snapshot, {}):
                raise XfastError(f"{self.path}: changed since it was read; nothing was written")
            edits += snapshots.splices(source, plan.snapshot, plan.areas)
        return sorted(edits, key=lambda edit: (edit.member, edit.offset))

    def _read(self, source: Source, size: int) -> list[Snapshot]:
        """Read a file as that of the plans was read; `size` is that of a raw area (bytes)."""
        like = self.plans[0].snapshot
        reader = snapshots.format_named(like.format)
        return reader.read(source, layout=like.vcpus[0].layout, size=size)

    def _check(self, found: list[Snapshot]) -> None:
        """Raise PolicyError unless what was written holds what was planned."""
        for plan, now in zip(self.plans, found, strict=True):
            difference = _differs(now, plan.snapshot, plan.areas)
            if difference:
                raise PolicyError(f"{self.path}: the format can't hold the plan: {difference}")

    def _check_source(self, source: Source) -> None:
        plan = self.plans[0]
        self._check(self._read(source, len(plan.areas.get(0, plan.snapshot.vcpus[0].area))))

    def _record(self, edits: list[Splice]) -> dict[str, Any]:
        changes = [change for plan in self.plans for change in plan.changes]
        notes = [note for plan in self.plans for note in plan.notes]
        return record_of(self.path, self.target, self.plans[0].host, changes, notes, edits)

    def _copy(self, source: Source, path: str) -> None:
        """Copy a file as it is."""
        with Staged(path, _mode(source.fd)) as staged:
            stamp = stamp_of(source.fd)
            copy_bytes(source.fd, staged.file.fileno(), source.size)
            if self.in_place:
                make_like(staged.file.fileno(), source.fd)
            refuse_if_busy(self.path, source.fd, stamp, named=self.in_place)
            staged.publish()


def _differs(found: Snapshot, snapshot: Snapshot, areas: dict[int, Any]) -> str:
    """Say in what a file differs from a snapshot with new areas, zeros behind them aside."""
    if len(found.vcpus) != len(snapshot.vcpus):
        return f"found {len(found.vcpus)} vCPUs, needed {len(snapshot.vcpus)}"
    for i, (one, two) in enumerate(zip(found.vcpus, snapshot.vcpus, strict=True)):
        area = areas.get(i, two.area)
        shared = min(len(area), len(one.area))
        same = np.array_equal(area[:shared], one.area[:shared])
        if not same or area[shared:].any() or one.area[shared:].any():
            masks = (headers(side).xstate_bv for side in (one.area, area))
            return "vCPU {}: found XSTATE_BV {:#x}, needed {:#x}".format(one.index, *masks)
    return ""


def _by_member(edits: list[Splice]) -> dict[str, list[Splice]]:
    """Return the edits of each file of a directory."""
    members: dict[str, list[Splice]] = {}
    for edit in edits:
        members.setdefault(edit.member, []).append(edit)
    return members


def _covers(
    record: dict[str, Any], other: dict[str, Any], *, sides: Sequence[str] = ("before", "after")
) -> bool:
    """Tell whether a record tells of all files of another, with the same hashes."""
    rows = {row["name"]: row for row in record["files"]}
    return all(
        row["name"] in rows and all(rows[row["name"]][side] == row[side] for side in sides)
        for row in other["files"]
    )


def _keep(path: str) -> None:
    """Give a file that is about to be replaced a second name, unless it has it already."""
    try:
        os.link(path, path + BACKUP, follow_symlinks=False)
    except FileExistsError:
        if not os.path.samestat(os.lstat(path), os.lstat(path + BACKUP)):
            raise XfastError(f"{path + BACKUP}: exists; needed a new name") from None


def _require_one_name(path: str, fd: int) -> None:
    """Raise XfastError if a file has other names (hard links) than its own and its backup's."""
    status = os.fstat(fd)
    names = [path]
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.lstat(path + BACKUP), status):
            names.append(path + BACKUP)
    if status.st_nlink > len(names):
        raise XfastError(f"{path}: has other names too (hard links); needed -o, or a file of one")


def _mode(fd: int) -> int:
    return stat.S_IMODE(os.fstat(fd).st_mode)


def _copy_into(path: str, target: str) -> None:
    """Copy one file of a directory to the disk, with all that it has."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    with (
        open(path, "rb", opener=lambda name, _: os.open(name, flags)) as source,
        open(target, "xb") as copy,
    ):
        if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
            raise XfastError(f"{path}: is a device or pipe, which can't be copied")
        copy_bytes(source.fileno(), copy.fileno(), os.fstat(source.fileno()).st_size)
        make_like(copy.fileno(), source.fileno())
        os.fsync(copy.fileno())


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
