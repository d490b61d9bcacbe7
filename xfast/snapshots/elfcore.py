"""ELF cores: NT_X86_XSTATE of each thread, and NT_X86_XSAVE_LAYOUT where the kernel wrote it.

64-bit, i386 and x32 cores of Linux (kernel or gdb) and FreeBSD; notes may be edited freely, a
core has no checksum. A thread without NT_X86_XSTATE has x87 and SSE in an FXSAVE area:
NT_PRFPREG (64-bit) or NT_PRXFPREG (i386).

*Source*: ELF gABI ("Note Section"); Linux fs/binfmt_elf.c fill_note_info() and commit
ba386777a30b ("x86/elf: Add a new FPU buffer layout info to x86 core files") (in v6.12);
include/linux/elfcore.h and FreeBSD sys/sys/procfs.h (the process id in struct prstatus).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast.errors import FormatError, LayoutError
from xfast.snapshots import fxsave, infer
from xfast.snapshots.bytes import edit
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import Snapshot, Span, Splice, Vcpu, kept
from xfast.xsave.features import EXTENDED_OFFSET
from xfast.xsave.layout import PRESETS, Layout, candidates, from_note

MAGIC = b"\x7fELF"
ET_CORE = 4
PT_NOTE = 4
PN_XNUM = 0xFFFF
MACHINES = {3: "i386", 62: "x86-64"}

NT_PRSTATUS = 1
NT_PRFPREG = 2
NT_PRPSINFO = 3
NT_X86_XSTATE = 0x202
NT_X86_XSAVE_LAYOUT = 0x205
NT_PRXFPREG = 0x46E62B7F
FXSAVE_NOTES = {("CORE", NT_PRFPREG), ("FreeBSD", NT_PRFPREG), ("LINUX", NT_PRXFPREG)}
"""Notes that are FXSAVE areas if they have 512 bytes; i386's NT_PRFPREG is FSAVE's 108."""
PID_OFFSET = {("CORE", 8): 32, ("CORE", 4): 24, ("FreeBSD", 8): 40, ("FreeBSD", 4): 24}
"""Where struct prstatus has the thread's id, by the note's name and the bytes of a long."""

HEADER = re.compile(
    rb"(?:\x05\0\0\0.{4}(?P<status>\x01\0\0\0)CORE\0|\x06\0\0\0.{4}\x02\x02\0\0LINUX\0"
    rb"|\x08\0\0\0.{4}(?:(?P<status_>\x01\0\0\0)|\x02\x02\0\0)FreeBSD\0)",
    re.DOTALL,
)
"""The header and name of a note NT_PRSTATUS (of which a group tells), or NT_X86_XSTATE."""
HEADER_SIZE = 20
LOOK_BACK = 1 << 16
"""How far before the notes others are looked for (bytes): as a rule program headers lie there."""

OWNERS = {"CORE", "LINUX", "GDB", "FreeBSD", "NetBSD-CORE", "QEMU", "VMCOREINFO", "XEN"}
"""Names of notes that an error tells; of others it tells that there are some."""
OTHERS = "others"

SEGMENT_LIMIT = 1 << 20
SEGMENTS_AT_ONCE = 1 << 14
NOTED_LIMIT = 1 << 10
"""Segments of notes: a core has one, or a few."""
NOTE_LIMIT = 1 << 18
"""Notes that are looked at: a core has 3 to 6 a thread."""
NAME_LIMIT = 64
AREA_LIMIT = 1 << 20
AREAS_LEAST, AREAS_RATIO = 4 << 20, 4
"""Bytes of all areas together: so many, or so many times what the file takes on the disk."""
WINDOW = 1 << 20


def _segment(itemsize: int, kind: str, offset: int, size: int) -> np.dtype[np.void]:
    formats = ["<u4", kind, kind]
    names = ["type", "offset", "size"]
    places = [0, offset, size]
    return np.dtype({"names": names, "formats": formats, "offsets": places, "itemsize": itemsize})


SEGMENT = _segment(32, "<u4", 4, 16)
WIDE_SEGMENT = _segment(56, "<u8", 8, 32)
"""What is needed of a program header, in 32-bit and 64-bit files."""


class Note(NamedTuple):
    """One note; its descriptor lies at `offset`, `length` bytes."""

    name: str
    type: int
    offset: int
    length: int


@dataclass(frozen=True)
class Origin:
    """Where a thread's NT_X86_XSTATE lies, or its FXSAVE area."""

    area: Span

    def places(self) -> dict[str, Span]:
        """Return it by name."""
        return {"area": self.area}


@dataclass
class Thread:
    """What the notes of one thread tell."""

    tid: int
    area: Note | None = None
    fxsave: Note | None = None


@dataclass
class Found:
    """What all the notes of a core tell."""

    threads: list[Thread] = field(default_factory=list)
    layout: Layout | None = None
    first: int | None = None
    names: set[str] = field(default_factory=set)
    statuses: int = 0
    notes: int = 0


def sniff(source: Source) -> bool:
    """Tell whether a file is an ELF file."""
    return source.size >= 4 and source.read(0, 4) == MAGIC


def read(
    source: Source, *, layout: Layout | None = None, size: int | None = None
) -> list[Snapshot]:
    """Read the extended state of every thread of a core.

    Parameters
    ----------
    source : Source
    layout : Layout, optional
        The layout of every area; default: from the core's note, or inferred.
    size : None
        A core tells the size of its areas.

    Returns
    -------
    list of Snapshot
        One, of kind ``process``, a Vcpu a thread.

    Raises
    ------
    FormatError
        If it is no x86 core, damaged, or without NT_X86_XSTATE.
    """
    abi, long_size, segments = _segments(source)
    found = Found()
    for start, end in segments:
        _take(source, found, long_size, start, end)
    threads = [(thread.tid, thread.area or thread.fxsave) for thread in found.threads]
    noted = [(tid, note) for tid, note in threads if note]
    if not noted:
        notes = ", ".join(sorted(found.names)) or "none"
        raise FormatError(
            source.path,
            segments[0][0] if segments else 0,
            "expected NT_X86_XSTATE or an FXSAVE area of each thread, "
            f"got no extended state (notes: {notes})",
        )
    whole = sum(note.length for _, note in noted)
    source.require_stored(whole, AREAS_LEAST, AREAS_RATIO, noted[0][1].offset)
    producer = _producer(found)
    vcpus = [_vcpu(source, tid, note, found.layout, layout) for tid, note in noted]
    for vcpu in vcpus:
        vcpu.mode = 32 if abi == "i386" else 64
    facts = {
        "abi": abi,
        "os": "freebsd" if "FreeBSD" in found.names else "linux",
        "threads_without_state": len(threads) - len(noted),
    }
    return [
        Snapshot(
            source.path,
            "elfcore",
            "process",
            producer,
            vcpus,
            source.container,
            facts,
            doubts=_doubts(source, found, segments),
        )
    ]


def _doubts(source: Source, found: Found, segments: list[Span]) -> tuple[str, ...]:
    """Compare the threads that were read with all that looks like one of a thread's two notes.

    A length or offset that lies hides notes in another one's descriptor, or before the first note,
    or behind the last.
    """
    read = sum(thread.area is not None for thread in found.threads)
    headers: dict[int, bool] = {}
    for start, end in segments:
        stop = min(end + HEADER_SIZE, source.size)
        for begin, last in source.stored_runs(max(0, start - LOOK_BACK), stop):
            for at in range(begin, last, WINDOW):
                window = source.read(at, min(WINDOW + HEADER_SIZE, stop - at))
                for match in HEADER.finditer(window):
                    headers[at + match.start()] = match.lastgroup is not None
    told = sum(headers.values())
    doubts = []
    if len(found.threads) > read:
        doubts.append(f"expected NT_X86_XSTATE of {len(found.threads)} threads, got {read}")
    if told > found.statuses:
        doubts.append(
            f"expected {told} notes NT_PRSTATUS, as their headers lie there, got {found.statuses}"
        )
    if len(headers) - told > read:
        areas = len(headers) - told
        doubts.append(
            f"expected {areas} notes NT_X86_XSTATE, as their headers lie there, got {read}"
        )
    if found.statuses < read:
        doubts.append(f"expected NT_PRSTATUS of {read} threads, got {found.statuses}")
    return tuple(doubts)


def _segments(source: Source) -> tuple[str, int, list[tuple[int, int]]]:
    """Return the ABI, the bytes of a long, and where the notes lie: (start, end) each."""
    ident = source.read(0, 16)
    if ident[4] not in (1, 2) or ident[5] != 1:
        raise FormatError(
            source.path,
            4,
            f"expected ELF class 1 or 2 and data 1 (x86), got {ident[4]} and {ident[5]}",
        )
    wide = ident[4] == 2
    kind, machine = source.unpack("<2H", 16)
    if kind != ET_CORE or machine not in MACHINES:
        raise FormatError(
            source.path, 16, f"expected an x86 core, got ELF type {kind}, machine {machine}"
        )
    if wide:
        table, sections, _, _, entry, count = source.unpack("<2QI3H", 32)
    else:
        table, sections, _, _, entry, count = source.unpack("<2II3H", 28)
    if count == PN_XNUM:
        (count,) = source.unpack("<I", sections + (44 if wide else 28))
    row = WIDE_SEGMENT if wide else SEGMENT
    if entry != row.itemsize and count:
        raise FormatError(
            source.path,
            54 if wide else 42,
            f"expected program headers of {row.itemsize} bytes, got {entry}",
        )
    if count > SEGMENT_LIMIT:
        raise FormatError(
            source.path, table, f"expected at most {SEGMENT_LIMIT} segments, got {count}"
        )
    if table + entry * count > source.size:
        raise FormatError(
            source.path,
            table,
            f"expected {entry * count} bytes for {count} program headers, "
            f"got {max(0, source.size - table)}",
        )
    segments = []
    for begin in range(0, count, SEGMENTS_AT_ONCE):
        at = table + begin * entry
        headers = source.read(at, min(SEGMENTS_AT_ONCE, count - begin) * entry)
        rows = np.frombuffer(headers, row)
        for i in np.flatnonzero(rows["type"] == PT_NOTE).tolist():
            start, length = int(rows["offset"][i]), int(rows["size"][i])
            if start + length > source.size:
                raise FormatError(
                    source.path,
                    at + i * entry,
                    f"expected notes up to offset {source.size} at most, got {start + length}",
                )
            segments.append((start, start + length))
        if len(segments) > NOTED_LIMIT:
            break
    if sum(end - start for start, end in segments) > source.size:
        raise FormatError(
            source.path, table, "expected notes apart from each other, got some that overlap"
        )
    if len(segments) > NOTED_LIMIT:
        raise FormatError(
            source.path, table, f"expected at most {NOTED_LIMIT} segments of notes, got more"
        )
    abi = MACHINES[machine]
    return ("x32" if abi == "x86-64" and not wide else abi), 8 if wide else 4, segments


def _take(source: Source, found: Found, long_size: int, start: int, end: int) -> None:
    """Add the notes from `start` to `end` to what is found."""
    for note in _notes(source, start, end):
        found.notes += 1
        if found.notes > NOTE_LIMIT:
            raise FormatError(
                source.path, note.offset, f"expected at most {NOTE_LIMIT} notes, got more"
            )
        found.first = note.type if found.first is None else found.first
        found.names.add(note.name if note.name in OWNERS else OTHERS)
        if note.type == NT_PRSTATUS and (note.name, long_size) in PID_OFFSET:
            at = PID_OFFSET[note.name, long_size]
            if note.length < at + 4:
                raise FormatError(
                    source.path, note.offset, f"found NT_PRSTATUS of {note.length} bytes"
                )
            found.threads.append(Thread(*source.unpack("<I", note.offset + at)))
            found.statuses += 1
        elif note.type == NT_X86_XSTATE and note.name in ("LINUX", "FreeBSD"):
            if not EXTENDED_OFFSET <= note.length <= AREA_LIMIT:
                raise FormatError(
                    source.path,
                    note.offset,
                    f"expected NT_X86_XSTATE of {EXTENDED_OFFSET} to {AREA_LIMIT} bytes, "
                    f"got {note.length}",
                )
            if not found.threads or found.threads[-1].area:
                found.threads.append(Thread(len(found.threads)))
            found.threads[-1].area = note
        elif note.length == fxsave.SIZE and (note.name, note.type) in FXSAVE_NOTES:
            if not found.threads or found.threads[-1].fxsave:
                found.threads.append(Thread(len(found.threads)))
            found.threads[-1].fxsave = note
        elif note.type == NT_X86_XSAVE_LAYOUT and note.name == "LINUX":
            try:
                found.layout = from_note(source.read(note.offset, min(note.length, 63 * 16)))
            except LayoutError as problem:
                raise FormatError(source.path, note.offset, str(problem)) from None


def _notes(source: Source, start: int, end: int) -> Iterator[Note]:
    """Yield the notes from `start` to `end`; descriptors are not read."""
    window, base = b"", start
    while start + 12 <= end:
        if start + 12 + NAME_LIMIT > base + len(window):
            base = start
            window = source.read(start, min(WINDOW, end - start))
        name_size, length, kind = struct.unpack_from("<3I", window, start - base)
        if not (name_size or length or kind):
            return  # zeros: what is left is padding, or a hole
        offset = start + 12 + (name_size + 3 & ~3)
        if offset + length > end:
            raise FormatError(
                source.path,
                start,
                f"expected a note of at most {end - start - 12} bytes, got {name_size} + {length}",
            )
        begin = start - base + 12
        name = window[begin : begin + min(name_size, NAME_LIMIT)].rstrip(b"\0")
        yield Note(name.decode("latin-1"), kind, offset, length)
        start = offset + (length + 3 & ~3)


def _producer(found: Found) -> str:
    """Tell who wrote the core: gdb puts NT_PRPSINFO first, Linux NT_PRSTATUS."""
    if "GDB" in found.names or ("CORE" in found.names and found.first == NT_PRPSINFO):
        return "gdb"
    return "kernel" if found.first == NT_PRSTATUS or "FreeBSD" in found.names else ""


def _vcpu(source: Source, tid: int, note: Note, noted: Layout | None, given: Layout | None) -> Vcpu:
    origin = Origin((note.offset, note.length))
    if note.length == fxsave.SIZE:
        image = fxsave.as_area(source.read(note.offset, note.length))
        return Vcpu(tid, image, fxsave.LAYOUT, "format", origin=origin)
    area = np.frombuffer(source.read(note.offset, note.length), np.uint8)
    if not infer.headed(area):
        raise FormatError(
            source.path, note.offset + 512, "found an XSAVE header with unknown components"
        )
    mask = infer.software_mask(area)
    if given is None and noted is not None:
        place = infer.Place(noted, "note")
    elif given is None and _debugger_guessed(area, mask):
        place = infer.Place(
            infer.common(candidates(mask), mask),
            "inferred",
            "beyond what lies at one place everywhere the layout is ambiguous: gdb before 14 "
            "writes Intel's offsets on AMD too, and this core has neither NT_X86_XSAVE_LAYOUT "
            "nor an MXCSR_MASK to tell",
        )
    else:
        place = infer.place(area, given=given, size=note.length)
    return Vcpu(
        index=tid,
        area=area,
        layout=place.layout,
        layout_source=place.source,
        layout_note=place.note,
        xcr0=mask or None,
        origin=origin,
    )


def _debugger_guessed(area: NDArray[np.uint8], mask: int) -> bool:
    """Tell whether gdb may have written Intel's offsets for another machine's components.

    gdb before 14 knew Intel's layout only, and its notes have an MXCSR_MASK of 0 as those of
    later ones do; the kernel's have the CPU's.

    *Source*: gdb commit 054f25955c2b ("gdb: Support variable XSAVE layouts").
    """
    intel = PRESETS["intel"]
    (mxcsr_mask,) = struct.unpack_from("<I", area.data, infer.MXCSR_MASK_OFFSET)
    if mxcsr_mask or not mask or area.size != intel.standard_size(mask):
        return False
    present = infer.header(area)[0]
    return any(intel.moved(PRESETS[name], present) for name in candidates(mask))


def splices(
    source: Source, snapshot: Snapshot, areas: Mapping[int, NDArray[np.uint8]]
) -> list[Splice]:
    """Return the edits that put `areas` into their notes.

    Parameters
    ----------
    areas : mapping of int to (size,) uint8
        New areas by position in ``snapshot.vcpus``; shorter ones are filled up with zeros.

    Raises
    ------
    PolicyError
        If an area is longer than its note, whose length other offsets in the core build on.
    """
    found: list[Splice] = []
    for i, area in areas.items():
        vcpu = snapshot.vcpus[i]
        name = f"thread {vcpu.index}"
        offset, length = kept(vcpu, Origin).area
        if length == fxsave.SIZE:
            old = source.read(offset, length)
            image = fxsave.renewed(old, area, f"{source.path}: {name}")
            was, new = (np.frombuffer(data, np.uint8) for data in (old, image))
        else:
            was, new = vcpu.area, edit.fitted(area, length, f"{source.path}: {name}")
        found += edit.changes(offset, was, new, name)
    return found


def note(kind: int, name: bytes, data: bytes) -> bytes:
    """Return a note: its header, its name, and `data`, padded to multiples of four."""
    owner = name + bytes(4 - len(name) % 4)
    header = struct.pack("<3I", len(name) + 1, len(data), kind)
    return header + owner + data + bytes(-len(data) % 4)
