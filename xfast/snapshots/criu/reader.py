"""CRIU's checkpoints: core-TID.img of each thread, and cpuinfo.img, in a directory or an archive.

Podman's and CRI-O's checkpoints are tar archives with these files in it; the names of tar members
are compared, never used as paths.

*Source*: CRIU criu/include/magic.h, criu/image.c (the magics and the length of an entry).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xfast.errors import FormatError
from xfast.snapshots import infer
from xfast.snapshots.bytes import edit, tar
from xfast.snapshots.bytes.folder import Folder
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.bytes.tar import Member
from xfast.snapshots.criu.cpuinfo import cpuid_of, cpus_of
from xfast.snapshots.criu.pstree import is_dead, threads_of
from xfast.snapshots.criu.registers import AREA_SIZE, LAYOUT, Thread, area_of, check_holds, renewed
from xfast.snapshots.criu.wire import Broken
from xfast.snapshots.model import CpuInfo, Snapshot, Span, Splice, Vcpu, kept
from xfast.xsave.layout import Layout

IMG_COMMON_MAGIC = 0x54564319
CORE_MAGIC = 0x55053847
CPUINFO_MAGIC = 0x61404013
PSTREE_MAGIC = 0x50273030
IMAGE_LIMIT = 4 << 20
PSTREE_LIMIT = 1 << 20
"""Bytes of pstree.img: a thread takes up to 6."""
IMAGES_LEAST, IMAGES_RATIO = 2 << 20, 2
"""Bytes that the images which are looked at take in a packed archive, headers and padding included:
so many, or twice what the archive takes on the disk. A thread takes 1 to 5 KiB, and up to a
thousandth of a second. Its stack alone, which is not looked at, takes 8 KiB and packs worse."""
CORE_NAME = re.compile(r"core-(\d{1,10})\.img")
CPUINFO_NAME = "cpuinfo.img"
PSTREE_NAME = "pstree.img"


@dataclass(frozen=True)
class Origin:
    """Where a thread's core entry lies, and its bytes: length and message.

    `member` is the image in its archive, or directory; `single` is True where the file itself
    is the image, `packed` where it is an archive.
    """

    member: Member
    offset: int
    entry: bytes
    packed: bool
    single: bool

    def places(self) -> dict[str, Span]:
        """Return the entry's place by name."""
        return {"entry": (self.offset, len(self.entry))}


def claims(names: Sequence[str]) -> str | None:
    """Return "", the whole, for a directory with CRIU's images: they are one snapshot together."""
    images = any(name.startswith("core-") and name.endswith(".img") for name in names)
    return "" if images else None


def sniff(source: Source) -> bool:
    """Tell whether a file is one of CRIU's images, or a tar archive."""
    if source.size < 8:
        return False
    return source.unpack("<I", 0)[0] in (IMG_COMMON_MAGIC, CORE_MAGIC) or tar.sniff(source)


def read(
    source: Source | Folder, *, layout: Layout | None = None, size: int | None = None
) -> list[Snapshot]:
    """Read the threads of a checkpoint in a directory or archive, or of one core-TID.img.

    Parameters
    ----------
    source : Source or Folder
    layout, size : None
        The images hold registers, not areas.

    Returns
    -------
    list of Snapshot
        One, of kind ``process``, a Vcpu a thread, in the order of their ids. A vcpu's `facts`
        name its file (``member``) and the registers it has (``fields``); the snapshot's hold
        ``cpuinfo``, what cpuinfo.img tells of each of the machine's CPUs. The first of them is
        each vcpu's `cpuinfo`, and makes its `cpuid`.

    Raises
    ------
    FormatError
        If an image is damaged, of another architecture, or there is none.
    """
    packed = isinstance(source, Source) and tar.sniff(source)
    single = isinstance(source, Source) and not packed
    threads: list[Vcpu] = []
    cpus: list[CpuInfo] = []
    told: set[int] = set()
    gone: set[int] = set()
    empty = 0
    for file, member in _members(source, packed):
        try:
            if member.name == CPUINFO_NAME:
                cpus = cpus_of(_entry(file, member, CPUINFO_MAGIC)[1][4:])
                continue
            if member.name == PSTREE_NAME:
                for _, entry in _entries(file, member, PSTREE_MAGIC):
                    told |= threads_of(entry[4:])
                continue
            offset, entry = _entry(file, member, CORE_MAGIC)
            thread = area_of(entry[4:])
            dead = thread is None and is_dead(entry[4:])
        except Broken as problem:
            raise FormatError(file.path, member.offset, f"{member.name}: {problem}") from None
        tid = _tid(member)
        if thread is None:
            empty += 1
            (gone if dead else told).add(tid)
        else:
            threads.append(_vcpu(tid, thread, Origin(member, offset, entry, packed, single)))
    if not threads:
        raise FormatError(
            source.path, None, "expected a core-TID.img with registers for each thread, got none"
        )
    threads.sort(key=lambda vcpu: vcpu.index)
    if cpus:
        _dumped_on(threads, cpus[0])
    facts: dict[str, Any] = {"threads_without_state": empty}
    if cpus:
        facts["cpuinfo"] = [_told(cpu) for cpu in cpus]
    missing = sorted(told - gone - {vcpu.index for vcpu in threads})
    shown = ", ".join(map(str, missing[:8])) + (", ..." if missing[8:] else "")
    return [
        Snapshot(
            source.path,
            "criu",
            "process",
            "criu",
            threads,
            source.container,
            facts,
            doubts=(f"expected the registers of thread {shown}, got none",) if missing else (),
        )
    ]


def _members(source: Source | Folder, packed: bool) -> Iterator[tuple[Source, Member]]:
    """Yield the images, each with the file in which it lies; of a directory one open at a time."""
    if isinstance(source, Folder):
        for name in filter(_wanted, source.names):
            with source.file(name) as file:
                yield file, Member(name, 0, file.size)
        return
    if not packed:
        yield source, Member(os.path.basename(source.path), 0, source.size)
        return
    seen = set()
    total = 0
    for member in tar.members(source):
        if _wanted(member.name):
            total += tar.room(member)
            if source.outer:
                source.require_stored(total, IMAGES_LEAST, IMAGES_RATIO, member.offset)
            if member.name in seen:
                raise FormatError(
                    source.path, member.offset, f"expected each image once, got {member.name} twice"
                )
            seen.add(member.name)
            yield source, member


def _wanted(name: str) -> bool:
    return name in (CPUINFO_NAME, PSTREE_NAME) or CORE_NAME.fullmatch(name) is not None


def _tid(member: Member) -> int:
    """Return the thread's id, which its image's name has; 0 for an image of another name."""
    name = CORE_NAME.fullmatch(member.name)
    return int(name[1]) if name else 0


def _entry(source: Source, member: Member, magic: int) -> tuple[int, bytes]:
    """Return where the first entry of an image lies, and its bytes: length and message."""
    return next(_entries(source, member, magic))


def _entries(source: Source, member: Member, magic: int) -> Iterator[tuple[int, bytes]]:
    """Yield where each entry of an image lies, and its bytes; there is one at least.

    Raises
    ------
    Broken
        If the image is of another kind, or an entry longer than it can be.
    """
    position = member.offset
    (found,) = source.unpack("<I", position)
    if found == IMG_COMMON_MAGIC:
        position += 4
        (found,) = source.unpack("<I", position)
    if found != magic:
        raise Broken(f"expected an image with the magic {magic:#x}, got {found:#x}")
    position += 4
    end = member.offset + member.size
    if found == PSTREE_MAGIC and member.size > PSTREE_LIMIT:
        raise Broken(f"expected at most {PSTREE_LIMIT} bytes, got {member.size}")
    while True:
        (length,) = source.unpack("<I", position)
        if length > IMAGE_LIMIT or position + 4 + length > end:
            raise Broken(f"expected an entry of at most {end - position - 4} bytes, got {length}")
        yield position, source.read(position, 4 + length)
        position += 4 + length
        if position == end:
            return


def _vcpu(tid: int, thread: Thread, origin: Origin) -> Vcpu:
    facts: dict[str, Any] = {"member": origin.member.name, "fields": sorted(thread.fields)}
    if thread.cet is not None:
        facts["cet"] = thread.cet
    return Vcpu(
        index=tid,
        area=thread.area,
        layout=LAYOUT,
        layout_source="format",
        portable=True,
        has_xsave="xstate_bv" in thread.fields,
        origin=origin,
        facts=facts,
    )


def _dumped_on(threads: Iterable[Vcpu], cpu: CpuInfo) -> None:
    """Tell every thread on which CPU it ran."""
    used = 0
    for vcpu in threads:
        used |= infer.header(vcpu.area)[0]
    cpuid = cpuid_of(cpu, used)
    for vcpu in threads:
        vcpu.cpuinfo, vcpu.cpuid = cpu, cpuid


def _told(cpu: CpuInfo) -> dict[str, Any]:
    """Return a CPU's fields that cpuinfo.img has."""
    return {
        name: list(value) if name == "capability" else value
        for name, value in asdict(cpu).items()
        if value is not None
    }


def splices(
    source: Source | Folder | None, snapshot: Snapshot, areas: Mapping[int, NDArray[np.uint8]]
) -> list[Splice]:
    """Return the edits that put `areas` into the images: a whole entry for each that changes.

    Parameters
    ----------
    source : Source, Folder or None
        Looked into only where it is an archive; of a directory each edit names its file.
    areas : mapping of int to (size,) uint8
        New areas by position in ``snapshot.vcpus``, in Intel's layout.

    Raises
    ------
    PolicyError
        If an area holds what the image has no field for.
    """
    found = []
    for i, area in areas.items():
        vcpu = snapshot.vcpus[i]
        origin = kept(vcpu, Origin)
        where = f"{snapshot.path}: {origin.member.name}"
        new = edit.fitted(area, AREA_SIZE, where)
        if np.array_equal(new, vcpu.area):
            continue
        core = renewed(origin.entry[4:], vcpu.area, new)
        check_holds(core, new, where)
        splice = Splice(
            origin.offset,
            origin.entry,
            struct.pack("<I", len(core)) + core,
            origin.member.name,
            "" if origin.packed or origin.single else origin.member.name,
        )
        if origin.packed:
            assert isinstance(source, Source)
            splice = tar.resized(source, origin.member, splice)
        found.append(splice)
    return found
