"""Plans brought to files: checked against what lies there, and handed to the safe writer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from xfast import snapshots
from xfast.errors import FormatError, PolicyError, XfastError
from xfast.hosts import description
from xfast.hosts.model import Host
from xfast.snapshots import raw
from xfast.snapshots.bytes.entry import found_as, way_to
from xfast.snapshots.bytes.folder import Folder
from xfast.snapshots.bytes.source import EXPAND_LIMIT, JOURNAL, Source
from xfast.snapshots.model import Snapshot, Splice
from xfast.store.access import Access, access_below
from xfast.store.names import (
    BACKUP,
    NOFOLLOW,
    PRIVATE,
    SUFFIX,
    Directory,
    require_one_name,
    same,
)
from xfast.store.put import Check, Fill, Original, Put, open_in
from xfast.store.record import Note, record_of, row_of, sha256
from xfast.store.staged import Staged, sweep
from xfast.store.tree import StagedTree
from xfast.store.volume import Volume, is_volume
from xfast.xsave.area import headers


class Repaired(Protocol):
    """What is asked of a plan here; see `xfast.repair.plan.Plan`."""

    @property
    def snapshot(self) -> Snapshot:
        """What was planned for."""

    @property
    def host(self) -> Host:
        """Who is to take it."""

    @property
    def areas(self) -> Mapping[int, NDArray[np.uint8]]:
        """The new areas by position in ``snapshot.vcpus``."""

    @property
    def changes(self) -> Sequence[Any]:
        """What changes, for the record."""

    @property
    def notes(self) -> Sequence[str]:
        """What whoever restores the result should know."""

    def require_restorable(self) -> None:
        """Raise PolicyError if the host would refuse the result."""


def apply(
    plans: Sequence[Repaired],
    output: str | None = None,
    *,
    in_place: bool = False,
    backup: bool | str = False,
    record: str | None = None,
    journal: str | None = None,
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
    backup : bool or str
        Keep what was there as ``NAME.orig``; of a volume the pages that change, in a new file of
        this name.
    record : str, optional
        Where the change record goes; default: ``OUTPUT.xfast.json``, or beside the journal.
    journal : str, optional
        The folder of the journal, in place: the file is then patched as a block device is, whose
        journals are in `xfast.store.volume.STATE` by default.
    expand_limit : int
        What compressed data may expand to (bytes).

    Returns
    -------
    dict or None
        The change record; None where there was nothing to change, and so nothing was written.

    Raises
    ------
    PolicyError
        If the host would still refuse the result, or the format has no place for it.
    FormatError
        If the file is damaged.
    XfastError
        If the file is being written or changed since it was read, if something stands in the
        way, or something can't be written.
    """
    if in_place == (output is not None) or (backup and not in_place):
        raise ValueError("apply: expected either output, or in_place with or without backup")
    for plan in plans:
        plan.require_restorable()
    named = plans[0].snapshot.path
    path = found_as(named, named.rstrip("/"))
    target = path if output is None else output.rstrip("/")
    try:
        if in_place and (journal or is_volume(path)):
            with Volume(path, journal) as volume:
                return _patch_volume(plans, volume, backup, record, expand_limit)
        if isinstance(backup, str):
            raise XfastError(f"{path}: expected --backup without FILE: it becomes NAME{BACKUP}")
        with ExitStack() as stack:
            folder, name = Directory.around(target)
            stack.enter_context(folder)
            note_folder, note_name = Directory.around(record or target + SUFFIX)
            stack.enter_context(note_folder)
            sweep(note_folder, note_name)
            sweep(folder, name, name + JOURNAL, name + BACKUP)
            job = _Job(plans, path, folder, name, note_folder, note_name, in_place, bool(backup))
            if not in_place and folder.status(name) is not None:
                raise XfastError(f"{target}: exists; expected a new name")
            return job.tree() if os.path.isdir(path) else job.file(expand_limit)
    except OSError as problem:
        where = problem.filename if isinstance(problem.filename, str) else target
        raise XfastError(f"{where}: can't be written: {problem.strerror or problem}") from None


@dataclass(frozen=True)
class _Job:
    """One call of `apply`: its parameters, and its two ways."""

    plans: Sequence[Repaired]
    path: str
    directory: Directory
    name: str
    note_folder: Directory
    note_name: str
    in_place: bool
    backup: bool

    def file(self, expand_limit: int) -> dict[str, Any] | None:
        """Rewrite a file."""
        fd = open_in(self.directory, self.name) if self.in_place else None
        with Source.open(self.path, fd=fd, expand_limit=expand_limit) as source:
            fd = source.base.fd
            place = self.directory if self.in_place else None
            stamp = self.plans[0].snapshot.stamp
            original = Original(self.path, fd, place, self.name, stamp)
            edits = self._edits(source)
            if not edits:
                self._require_nothing_to_do(source)
                return None
            note = self._note(edits, original.access)
            row = row_of(os.path.basename(self.path), source)
            note.record["files"] = [row]
            names = [self.name + end for end in ("", BACKUP, JOURNAL)]
            note.require_apart(self.directory, names)
            put = Put(
                self.directory, self.name, original, None, self.in_place, self.backup, note, row,
                expand_limit,
            )  # fmt: skip
            if put.patches(source, edits):
                put.patch(source, edits, lambda: self._check(source))
                return note.record
            with self._companions():
                put.write(lambda out: source.rewrite(edits, out), self._check)
            return note.record

    @contextmanager
    def _companions(self) -> Iterator[None]:
        """Copy what lies beside a raw file along; take it away again where the rest fails."""
        made: list[str] = []
        try:
            if not self.in_place and self.plans[0].snapshot.format == "raw":
                for suffix, parse in raw.COMPANIONS.items():
                    made += self._copy_companion(suffix, parse)
            yield
        except BaseException:
            if self.directory.status(self.name) is None:
                for name in made:
                    self.directory.remove(name)
            raise

    def _copy_companion(self, suffix: str, parse: Callable[[bytes], object]) -> Iterator[str]:
        """Copy one companion, if there is one; yield the name of what was made."""
        found = [p for p in raw.companion_paths(self.path, suffix) if os.path.isfile(p)]
        if not found:
            return
        with way_to(found[0]) as (folder, last, _):
            fd = os.open(last, NOFOLLOW, dir_fd=folder)
        with Source.open(found[0], fd=fd) as source:
            data = source.read(0, min(source.size, raw.COMPANION_LIMIT))
            try:
                parse(data)
            except ValueError as problem:
                raise FormatError(found[0], 0, str(problem)) from None
            name = raw.companion_paths(self.name, suffix)[0]
            if self.directory.status(name) is not None:
                with Source.open(name, fd=open_in(self.directory, name)) as there:
                    if there.read(0, there.size) == data:
                        return
                raise XfastError(f"{self.directory.path_of(name)}: exists; expected a new name")
            put = Put(self.directory, name, Original(found[0], source.base.fd))
            put.write(_writing(data), _comparing(data))
        yield name

    def tree(self) -> dict[str, Any] | None:
        """Rewrite the files of a directory that change."""
        with Directory.open(self.path) as source:
            if self.in_place:
                sweep(source, *os.listdir(source.fd))
            edits = self._edits(_Listed(source))
            if not edits:
                self._require_nothing_to_do(_Listed(source))
                return None
            note = self._note(edits, access_below(source.fd, _by_member(edits)))
            if self.in_place:
                self._change_members(source, edits, note)
                return note.record
            with StagedTree(self.directory, self.name, source) as staged:
                note.record["files"] = _rows(staged.tree, edits)
                self._change_members(staged.tree, edits, None)
                self._check(_Listed(staged.tree))
                with note.standing(lambda: staged.published):
                    staged.publish()
            return note.record

    def _change_members(self, folder: Directory, edits: list[Splice], note: Note | None) -> None:
        """Replace the images in a directory that change, one by one, each as a whole."""
        if note:
            note.record["files"] = _rows(folder, edits)
            members = [row["name"] for row in note.record["files"]]
            ends = ("", BACKUP, JOURNAL)
            note.require_apart(folder, [member + end for member in members for end in ends])
            note.require_apart(self.directory, [self.name])
            with note.standing(lambda: _any_done(folder, note.record["files"])):
                self._change_members(folder, edits, None)
            return
        for member, own in _by_member(edits).items():
            path = folder.path_of(member)
            with Source.open(path, fd=open_in(folder, member)) as source:
                original = Original(path, source.fd, folder, member)
                put = Put(folder, member, original, in_place=True, backup=self.backup)
                put.write(_filling(source, own), lambda again: None)

    def _edits(self, source: Source | Folder) -> list[Splice]:
        """Return the edits of all plans; old bytes that a file no longer holds stop them later."""
        edits: list[Splice] = []
        for plan in self.plans:
            edits += snapshots.splices(source, plan.snapshot, plan.areas)
        return sorted(edits, key=lambda edit: (edit.member, edit.offset))

    def _require_nothing_to_do(self, source: Source | Folder) -> None:
        """Raise PolicyError if the areas change and the format's edits don't tell of it."""
        if any(plan.areas for plan in self.plans):
            self._check(source)

    def _check(self, source: Source | Folder) -> None:
        """Raise PolicyError unless a file, read back, holds what was planned."""
        plan = self.plans[0]
        first = plan.snapshot.vcpus[0]
        size = len(plan.areas.get(0, first.area))
        reader = snapshots.format_named(plan.snapshot.format)
        self._require_planned(reader.read(cast(Source, source), layout=first.layout, size=size))

    def _require_planned(self, found: list[Snapshot]) -> None:
        if len(found) != len(self.plans):
            raise XfastError(f"{self.path}: expected {len(self.plans)} snapshots, got {len(found)}")
        for plan, now in zip(self.plans, found, strict=True):
            difference = _differs(now, plan.snapshot, plan.areas)
            if difference:
                raise PolicyError(f"{self.path}: the format can't hold the plan: {difference}")

    def _note(self, edits: list[Splice], access: Access) -> Note:
        changes = [change.as_json() for plan in self.plans for change in plan.changes]
        notes = [note for plan in self.plans for note in plan.notes]
        host = self.plans[0].host
        told = {"name": host.name, "source": host.source, "description": description.to_dict(host)}
        target = self.directory.path_of(self.name)
        record = record_of(self.path, target, told, changes, notes, edits)
        return Note(self.note_folder, self.note_name, record, access)


def _patch_volume(
    plans: Sequence[Repaired],
    volume: Volume,
    backup: bool | str,
    record: str | None,
    expand_limit: int,
) -> dict[str, Any] | None:
    """Rewrite a volume where it lies; see `apply`."""
    if backup is True:
        raise XfastError(f"{volume.path}: expected --backup FILE, for the pages that change")
    original = Original(volume.path, volume.fd, volume.folder, volume.name, plans[0].snapshot.stamp)
    with Source.open(volume.path, fd=os.dup(volume.fd), expand_limit=expand_limit) as source:
        if source.outer:
            raise XfastError(f"{volume.path}: is compressed ({source.codec}); -o writes a new file")
        ends = [plan.snapshot.facts.get("stream_end", source.size) for plan in plans]
        before = sha256(volume.fd, (), max(ends))
        folder, name = Directory.around(
            record or volume.journals.path_of(volume.site(before).stem + SUFFIX)
        )
        with folder:
            sweep(folder, name)
            job = _Job(
                plans, volume.path, volume.folder, volume.name, folder, name, True, False
            )  # fmt: skip
            edits = job._edits(source)
            if not edits:
                job._require_nothing_to_do(source)
                return None
            if any(len(edit.old) != len(edit.new) for edit in edits):
                raise XfastError(f"{volume.path}: its length would change; -o writes a new file")
            note = job._note(edits, Access(PRIVATE, None, None))
            note.record["output"] = os.path.abspath(volume.path)
            row = {"name": volume.name, "before": before, "after": "", "end": str(max(ends))}
            note.record["files"] = [row]

            def check() -> None:
                with Source(volume.path, os.dup(volume.fd)) as again:
                    job._check(again)

            volume.patch(original, source, edits, check, note, backup or None)
            return note.record


class _Listed(Folder):
    """A directory that is held open, as an input: wherever its path leads by now."""

    def __init__(self, held: Directory) -> None:
        super().__init__(held.path, tuple(sorted(os.listdir(held.fd))))
        self.held = held

    def file(self, name: str) -> Source:
        """Open one of the files; the caller closes it."""
        return Source.open(self.held.path_of(name), fd=self.held.open_file(name))


def _writing(data: bytes) -> Fill:
    def fill(out: IO[bytes]) -> None:
        out.write(data)

    return fill


def _comparing(data: bytes) -> Check:
    def check(again: Source) -> None:
        if again.read(0, again.size) != data:
            raise XfastError(f"{again.path}: what was written reads back otherwise")

    return check


def _filling(source: Source, edits: list[Splice]) -> Any:
    return lambda out: source.rewrite(edits, out)


def _rows(folder: Directory, edits: list[Splice]) -> list[dict[str, str]]:
    """Return the record's ``files`` of a directory: each image as it is, and as it will be."""
    rows = []
    for name, own in _by_member(edits).items():
        path = folder.path_of(name)
        with Source.open(path, fd=open_in(folder, name)) as source, Staged(folder, name) as trial:
            kept = same(folder.status(name + BACKUP), os.fstat(source.fd))
            require_one_name(path, os.fstat(source.fd), 1 + kept)
            source.rewrite(own, trial.file)
            row = row_of(name, source)
            row["after"] = sha256(trial.flush())
            rows.append(row)
    return rows


def _any_done(folder: Directory, rows: Iterable[dict[str, str]]) -> bool:
    """Tell whether any file of a record is already what it is to be."""
    for row in rows:
        with open(folder.open_file(row["name"]), "rb") as file:
            if sha256(file.fileno()) == row["after"]:
                return True
    return False


def _by_member(edits: list[Splice]) -> dict[str, list[Splice]]:
    """Return the edits of each file of a directory."""
    members: dict[str, list[Splice]] = {}
    for edit in edits:
        members.setdefault(edit.member, []).append(edit)
    return members


def _differs(found: Snapshot, snapshot: Snapshot, areas: Mapping[int, Any]) -> str:
    """Say in what a file differs from a snapshot with new areas, zeros behind them aside."""
    if len(found.vcpus) != len(snapshot.vcpus):
        return f"expected {len(snapshot.vcpus)} vCPUs, got {len(found.vcpus)}"
    for i, (one, two) in enumerate(zip(found.vcpus, snapshot.vcpus, strict=True)):
        area = areas.get(i, two.area)
        shared = min(len(area), len(one.area))
        same_bytes = np.array_equal(area[:shared], one.area[:shared])
        if not same_bytes or area[shared:].any() or one.area[shared:].any():
            masks = (headers(side).xstate_bv for side in (area, one.area))
            return "vCPU {}: expected XSTATE_BV {:#x}, got {:#x}".format(one.index, *masks)
    return ""
