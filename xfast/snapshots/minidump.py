"""Windows minidumps (MDMP) of x86-64 and x86: the extended state in each thread's CONTEXT.

A CONTEXT has an FXSAVE area (FltSave, or ExtendedRegisters in 32-bit mode). Where its flags have
CONTEXT_XSTATE, a CONTEXT_EX behind it says where the XSAVE header and the extended components
lie; the stream MISC_INFO_5 has their offsets. Public dumps of that kind were not to be had: only
the FXSAVE part was checked against real files.

Nobody restores a minidump, so it is read and never edited.

*Source*: Microsoft minidumpapiset.h (MINIDUMP_HEADER to MINIDUMP_MISC_INFO_5) and winnt.h (CONTEXT,
CONTEXT_EX, XSAVE_AREA_HEADER); Wine dlls/ntdll/signal_x86_64.c RtlLocateExtendedFeature2();
Breakpad src/google_breakpad/common/minidump_format.h (streams and platforms of its own).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast.errors import FormatError, LayoutError, PolicyError
from xfast.snapshots import fxsave, infer
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import Snapshot, Splice, Vcpu
from xfast.xsave.features import (
    BY_NR,
    EXTENDED_OFFSET,
    LEGACY_SIZE,
    SUPERVISOR_MASK,
    XFEATURE_MASK_FPSSE,
    bits,
)
from xfast.xsave.layout import Layout, Slot

MAGIC = b"MDMP"
VERSION = 0xA793

THREAD_LIST, SYSTEM_INFO, MISC_INFO = 3, 7, 15
DIRECTORY_ENTRY, THREAD_ENTRY = 12, 48
STREAM_LIMIT = 1 << 12
THREAD_LIMIT = 1 << 16
AREA_LIMIT = 1 << 16

XSTATE_CONFIG_OFFSET = 832
XSTATE_FEATURES = 64
XSTATE_CONFIG = struct.Struct(f"<2IQ{2 * XSTATE_FEATURES}I")
"""SizeOfInfo, ContextSize, EnabledFeatures, then offset and size of each feature."""

CONTEXT_XSTATE = 0x40
CONTEXT_EX = struct.Struct("<iIiIiI")
"""Offset (from the CONTEXT_EX on) and length of all, of the CONTEXT, and of the XSTATE."""


class Machine(NamedTuple):
    """Where a processor's CONTEXT has what is read here (bytes)."""

    abi: str
    size: int
    flags: int
    family: int
    """The bit of ContextFlags that says whose CONTEXT it is."""
    floats: int
    """The bits of ContextFlags that say that the FXSAVE area is filled."""
    area: int


MACHINES = {
    9: Machine("x86-64", 1232, 48, 0x100000, 0x8, 256),
    0: Machine("i386", 716, 0, 0x10000, 0x20, 204),
}
"""ProcessorArchitecture of the stream SYSTEM_INFO -> its CONTEXT."""

OTHER_MACHINES = {3: "PowerPC", 5: "ARM", 6: "IA-64", 12: "ARM64", 0x8003: "ARM64"}

WRITERS = {0x4350: "crashpad", 0x4767: "breakpad"}
"""The high halves of stream types -> the writer that defines them."""

PLATFORMS = {2: "windows", 0x8101: "macos", 0x8102: "ios", 0x8201: "linux", 0x8203: "android"}
NO_EDITS = "a minidump is read only, for nobody restores one"


class Stream(NamedTuple):
    """A stream of the directory: its bytes lie at `offset`."""

    type: int
    size: int
    offset: int


def sniff(source: Source) -> bool:
    """Tell whether a file is a minidump."""
    return source.size >= 4 and source.read(0, 4) == MAGIC


def read(
    source: Source, *, layout: Layout | None = None, size: int | None = None
) -> list[Snapshot]:
    """Read the extended state of every thread of a minidump.

    Parameters
    ----------
    source : Source
    layout : Layout, optional
        The layout of the XSTATE; default: from the dump, or inferred.
    size : None
        A dump tells the size of its contexts.

    Returns
    -------
    list of Snapshot
        One, of kind ``process``, a Vcpu a thread.

    Raises
    ------
    FormatError
        If it is damaged, of another processor, or no thread has a filled FXSAVE area.
    """
    streams = list(_streams(source))
    machine, system = _system(source, streams)
    enabled, noted = _config(source, streams)
    vcpus = []
    without = 0
    for tid, start, length in _threads(source, streams):
        context = _context(source, machine, start, length)
        if context is None:
            without += 1
            continue
        area, place = _area(source, machine, context, start, layout or noted, layout is not None)
        vcpus.append(
            Vcpu(
                index=tid,
                area=area,
                layout=place.layout,
                layout_source=place.source,
                layout_note=place.note,
                xcr0=enabled & ~SUPERVISOR_MASK or None,
                mode=32 if machine.abi == "i386" else 64,
            )
        )
    if not vcpus:
        raise FormatError(
            source.path,
            None,
            f"this can't be judged: expected a CONTEXT with floating point of each thread, got "
            f"{without} threads without",
        )
    marks = {stream.type >> 16 for stream in streams}
    writer = next((name for mark, name in WRITERS.items() if mark in marks), system)
    facts = {"abi": machine.abi, "os": system, "threads_without_state": without}
    doubts = (f"expected the CONTEXT of {len(vcpus) + without} threads, got {len(vcpus)}",)
    return [
        Snapshot(
            source.path,
            "minidump",
            "process",
            writer,
            vcpus,
            source.container,
            facts,
            doubts=doubts if without else (),
        )
    ]


def _streams(source: Source) -> Iterator[Stream]:
    """Yield the directory's streams, each inside the file."""
    _, version, count, start = source.unpack("<4I", 0)
    if version & 0xFFFF != VERSION:
        raise FormatError(
            source.path, 4, f"expected minidump version {VERSION:#x}, got {version & 0xFFFF:#x}"
        )
    if count > STREAM_LIMIT:
        raise FormatError(source.path, 8, f"expected up to {STREAM_LIMIT} streams, got {count}")
    table = source.read(start, DIRECTORY_ENTRY * count)
    for at, (kind, size, offset) in enumerate(struct.iter_unpack("<3I", table)):
        if kind and offset + size > source.size:
            raise FormatError(
                source.path,
                start + DIRECTORY_ENTRY * at,
                f"expected stream {kind} to end at {source.size} or before, got {offset + size}",
            )
        yield Stream(kind, size, offset)


def _only(source: Source, streams: list[Stream], kind: int, least: int) -> Stream | None:
    """Return the stream of a type, at least so many bytes long, or None if there is none."""
    found = [stream for stream in streams if stream.type == kind]
    if len(found) > 1:
        raise FormatError(
            source.path, found[1].offset, f"expected one stream {kind}, got {len(found)}"
        )
    if found and found[0].size < least:
        raise FormatError(
            source.path,
            found[0].offset,
            f"expected a stream {kind} of {least} bytes or more, got {found[0].size}",
        )
    return found[0] if found else None


def _system(source: Source, streams: list[Stream]) -> tuple[Machine, str]:
    """Return the processor's CONTEXT, and the system's name."""
    stream = _only(source, streams, SYSTEM_INFO, 24)
    if stream is None:
        raise FormatError(source.path, None, "this can't be judged: it has no stream SYSTEM_INFO")
    (processor,) = source.unpack("<H", stream.offset)
    (platform,) = source.unpack("<I", stream.offset + 20)
    if processor not in MACHINES:
        name = OTHER_MACHINES.get(processor, f"processor architecture {processor:#x}")
        raise FormatError(
            source.path, stream.offset, f"this can't be judged: expected x86, got {name}"
        )
    return MACHINES[processor], PLATFORMS.get(platform, "")


def _config(source: Source, streams: list[Stream]) -> tuple[int, Layout | None]:
    """Return the enabled components, and where MISC_INFO_5 says that they lie in an XSAVE area."""
    stream = _only(source, streams, MISC_INFO, 4)
    if stream is None or stream.size < XSTATE_CONFIG_OFFSET + XSTATE_CONFIG.size:
        return 0, None
    at = stream.offset + XSTATE_CONFIG_OFFSET
    _, _, enabled, *places = source.unpack(XSTATE_CONFIG.format, at)
    slots = []
    for nr in bits(enabled >> 2 << 2):
        offset, length = places[2 * nr : 2 * nr + 2]
        if not length:
            continue
        known = BY_NR.get(nr)
        supervisor = bool(known and known.supervisor)
        flags = (known.align64, known.xfd) if known else ()
        slots.append(Slot(nr, length, 0 if supervisor else offset, supervisor, *flags))
    try:
        return enabled, Layout(tuple(slots), "XSTATE_CONFIG") if slots else None
    except LayoutError as problem:
        raise FormatError(source.path, at, str(problem)) from None


def _threads(source: Source, streams: list[Stream]) -> Iterator[tuple[int, int, int]]:
    """Yield each thread's id, and where its CONTEXT lies: offset and bytes."""
    stream = _only(source, streams, THREAD_LIST, 4)
    if stream is None:
        raise FormatError(source.path, None, "this can't be judged: it has no list of threads")
    (count,) = source.unpack("<I", stream.offset)
    padding = stream.size - 4 - THREAD_ENTRY * count
    if count > THREAD_LIMIT or padding not in (0, 4):  # 4: some writers align the entries
        raise FormatError(
            source.path,
            stream.offset,
            f"expected a list of up to {THREAD_LIMIT} threads in {stream.size} bytes, got {count}",
        )
    table = source.read(stream.offset + 4 + padding, THREAD_ENTRY * count)
    threads = list(struct.iter_unpack("<I36x2I", table))
    if sum(length for _, length, _ in threads) > source.size:
        raise FormatError(
            source.path,
            stream.offset,
            "expected a CONTEXT of its own for each thread, got overlaps",
        )
    for tid, length, start in threads:
        yield tid, start, length


def _context(source: Source, machine: Machine, start: int, length: int) -> bytes | None:
    """Return a thread's CONTEXT, or None where it has no filled FXSAVE area."""
    if length < machine.size:
        return None
    (flags,) = source.unpack("<I", start + machine.flags)
    if not flags & machine.family or not flags & machine.floats:
        return None
    if length > AREA_LIMIT:
        raise FormatError(
            source.path, start, f"expected a CONTEXT of up to {AREA_LIMIT} bytes, got {length}"
        )
    return source.read(start, length if flags & CONTEXT_XSTATE else machine.size)


def _area(
    source: Source,
    machine: Machine,
    context: bytes,
    start: int,
    layout: Layout | None,
    given: bool,
) -> tuple[NDArray[np.uint8], infer.Place]:
    """Return a thread's area, and where the components lie in it."""
    legacy = context[machine.area :][:LEGACY_SIZE]
    xstate = _xstate(source, machine, context, start)
    if xstate is None:
        return fxsave.as_area(legacy), infer.Place(fxsave.LAYOUT, "format")
    area = np.frombuffer(legacy + xstate, np.uint8)
    if not infer.headed(area):
        raise FormatError(
            source.path, start, "expected an XSTATE header with known components, got others"
        )
    # The flags of the CONTEXT say that the FXSAVE area is filled, whatever the header says.
    area = area.copy()
    area[fxsave.RESERVED_OFFSET : LEGACY_SIZE] = 0
    area[fxsave.HEADER_OFFSET] |= XFEATURE_MASK_FPSSE
    if layout is None:
        return area, infer.place(area)
    return area, infer.Place(layout, "given" if given else "note")


def _xstate(source: Source, machine: Machine, context: bytes, start: int) -> bytes | None:
    """Return the XSAVE header and what follows it, or None where a CONTEXT has none."""
    (flags,) = struct.unpack_from("<I", context, machine.flags)
    if not flags & CONTEXT_XSTATE or len(context) < machine.size + CONTEXT_EX.size:
        return None
    *_, offset, length = CONTEXT_EX.unpack_from(context, machine.size)
    begin = machine.size + offset
    if length < EXTENDED_OFFSET - LEGACY_SIZE or begin < 0 or begin + length > len(context):
        raise FormatError(
            source.path,
            start + machine.size,
            f"expected XSTATE inside a CONTEXT of {len(context)} bytes, got {length} bytes at "
            f"{begin}",
        )
    return context[begin : begin + length]


def splices(
    source: Source, snapshot: Snapshot, areas: Mapping[int, NDArray[np.uint8]]
) -> list[Splice]:
    """Refuse: a minidump is never edited.

    Raises
    ------
    PolicyError
        Always.
    """
    raise PolicyError(f"{source.path}: {NO_EDITS}")
