"""Areas in other layouts, formats and wrappings: raw blobs, .npy, QEMU's fields, ELF cores."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from numpy.typing import NDArray

from xfast.errors import LayoutError, PolicyError, XfastError
from xfast.snapshots import elfcore, format_named, splices
from xfast.snapshots.bytes.entry import opened_folder
from xfast.snapshots.bytes.source import EXPAND_LIMIT, Source
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.snapshots.qemu import cpu as qemu_cpu
from xfast.snapshots.raw import stacked
from xfast.store.access import access_below, access_of
from xfast.store.names import Directory
from xfast.store.put import Check, Fill, Original, Put
from xfast.store.staged import sweep
from xfast.xsave import area as engine
from xfast.xsave.features import (
    KVM_XSAVE_SIZE,
    LEGACY_SIZE,
    MXCSR_MASK_AMD,
    MXCSR_MASK_INTEL,
    XFEATURE_MASK_FPSSE,
    names_of,
)
from xfast.xsave.layout import PRESETS, Layout, candidates

MXCSR_MASK_FIELD = slice(28, 32)
SOFTWARE_FIELD = slice(464, 472)
MXCSR_MASKS = {"intel": MXCSR_MASK_INTEL, "amd": MXCSR_MASK_AMD}
"""What CPUs with a preset's layout have, by the beginning of its name."""

NT_FPREGSET = 2
NT_PRSTATUS_SIZE = 336
ELF_HEADER = struct.Struct("<4s5B7x2HI3QI6H")
PROGRAM_HEADER = struct.Struct("<2I6Q")


def areas_in(
    snapshot: Snapshot,
    to: Layout | None = None,
    *,
    compacted: bool = False,
    size: int | None = KVM_XSAVE_SIZE,
) -> NDArray[np.uint8]:
    """Return the areas of a snapshot in another layout or format.

    Parameters
    ----------
    snapshot : Snapshot
    to : Layout, optional
        Default: each area's own.
    compacted : bool
        Compacted format, every area with space for the components of all.
    size : int or None
        Bytes of a row at least; None: as long as the components that XCR0 enables need.

    Returns
    -------
    (n, size) uint8
        MXCSR_MASK, from which a reader infers the layout, tells of no vendor whose CPUs lack
        the new layout. The kernel's word of user components (byte 464) stays, as far as the
        layout has them.

    Raises
    ------
    PolicyError
        If the layout of an area is not known.
    LayoutError
        If a component has no place in `to`, or MXCSR none in the compacted format: there it goes
        with SSE only.
    """
    sources = [_known(snapshot, vcpu) for vcpu in snapshot.vcpus]
    targets = [to or layout for layout in sources]
    masks = [engine.headers(vcpu.area).xstate_bv for vcpu in snapshot.vcpus]
    everything = int(np.bitwise_or.reduce(np.array(masks, "u8")))
    enabled = everything
    for vcpu in snapshot.vcpus:
        enabled |= vcpu.xcr0 or 0
    need = max(
        layout.compacted_size(everything)
        if compacted
        else layout.standard_size(enabled & layout.user_mask)
        for layout in targets
    )
    rows = engine.empty(len(snapshot.vcpus), max(need, size or 0))
    for row, vcpu, source, target in zip(rows, snapshot.vcpus, sources, targets, strict=True):
        kept = int.from_bytes(vcpu.area[SOFTWARE_FIELD].tobytes(), "little") & target.mask
        engine.relayout(
            vcpu.area,
            source,
            target,
            xcomp_bv=everything if compacted else None,
            out=row,
            software=kept,
        )
        if engine.diff(vcpu.area, row, source, target):
            raise LayoutError(
                f"{snapshot.path}: vCPU {vcpu.index}: MXCSR without SSE's bit has no place in the "
                "compacted format"
            )
        row[MXCSR_MASK_FIELD] = _mxcsr_mask(vcpu.area, target, enabled)
    return rows


def _known(snapshot: Snapshot, vcpu: Vcpu) -> Layout:
    unplaced = engine.headers(vcpu.area).xstate_bv & ~(vcpu.layout or Layout(())).mask
    if vcpu.layout is None or unplaced:
        what = f"where {names_of(unplaced)} lies" if vcpu.layout else "the layout"
        raise PolicyError(
            f"{snapshot.path}: vCPU {vcpu.index}: {what} is not known ({vcpu.layout_note}); "
            "--layout names it"
        )
    return vcpu.layout


def _mxcsr_mask(area: NDArray[np.uint8], layout: Layout, enabled: int) -> NDArray[np.uint8]:
    """Return the MXCSR_MASK (4 bytes) for an area's registers in a layout.

    It stays where the vendor it tells has CPUs that place what is enabled so, or it tells none.
    Else it becomes that of the vendor who has; 0 where none has, or where MXCSR needs more.
    """
    mxcsr, old = struct.unpack_from("<2I", area.data, 24)
    held = enabled & layout.user_mask
    makers = {
        name.partition("-")[0] for name in candidates(held) if not PRESETS[name].moved(layout, held)
    }
    masks = [MXCSR_MASKS[maker] for maker in sorted(makers)]
    if old in MXCSR_MASKS.values() and old not in masks:
        old = next((mask for mask in masks if not mxcsr & ~mask), 0)
    return np.frombuffer(old.to_bytes(4, "little"), np.uint8)


def as_raw(areas: NDArray[np.uint8]) -> bytes:
    """Return areas one behind the other."""
    return areas.tobytes()


def as_npy(areas: NDArray[np.uint8]) -> bytes:
    """Return areas as a .npy file."""
    return stacked(areas)


def as_qemu(snapshot: Snapshot) -> bytes:
    """Return the fields of QEMU's `cpu` sections as JSON: the stream's bytes, hexadecimal.

    Fields of the fixed part come with their offset in it; `subsections` with their data only.

    *Source*: QEMU target/i386/machine.c vmstate_x86_cpu.
    """
    areas = areas_in(snapshot, PRESETS["intel"])
    zones = qemu_cpu.FORMS[1817].zones
    vcpus = []
    for vcpu, area in zip(snapshot.vcpus, areas, strict=True):
        found = qemu_cpu.fields(area, vcpu.xcr0 or 0)
        vcpus.append(
            {
                "vcpu": vcpu.index,
                "fields": {
                    name: {"offset": offset, "data": found[name].hex()}
                    for name, (offset, _) in zones.items()
                },
                "subsections": {
                    name: data.hex() for name, data in found.items() if name not in zones
                },
            }
        )
    answer = {"schema": "xfast/1", "snapshot": snapshot.path, "vcpus": vcpus}
    return json.dumps(answer, indent=1).encode() + b"\n"


def as_core(snapshot: Snapshot, to: Layout | None = None) -> bytes:
    """Return an ELF core with the extended state of every vCPU, a thread each, and the layout.

    The general registers are zero: a snapshot's are not read here.

    *Source*: Linux fs/binfmt_elf.c fill_note_info(); commit ba386777a30b ("x86/elf: Add a new
    FPU buffer layout info to x86 core files") (in v6.12).
    """
    areas = areas_in(snapshot, to, size=None)
    layout = to or _known(snapshot, snapshot.vcpus[0])
    notes = b""
    for vcpu, area in zip(snapshot.vcpus, areas, strict=True):
        enabled = (vcpu.xcr0 or 0) | engine.headers(area).xstate_bv | XFEATURE_MASK_FPSSE
        area[SOFTWARE_FIELD] = np.frombuffer(enabled.to_bytes(8, "little"), np.uint8)
        status = bytearray(NT_PRSTATUS_SIZE)
        thread = vcpu.index + (snapshot.kind == "vm")  # a vCPU may be 0, no thread is
        struct.pack_into("<I", status, elfcore.PID_OFFSET["CORE", 8], thread)
        notes += elfcore.note(elfcore.NT_PRSTATUS, b"CORE", bytes(status))
        notes += elfcore.note(NT_FPREGSET, b"CORE", area[:LEGACY_SIZE].tobytes())
        notes += elfcore.note(elfcore.NT_X86_XSTATE, b"LINUX", area.tobytes())
    rows = [struct.pack("<4I", s.nr, s.size, s.offset, 0) for s in layout.slots if s.offset]
    notes += elfcore.note(elfcore.NT_X86_XSAVE_LAYOUT, b"LINUX", b"".join(rows))
    start = ELF_HEADER.size + PROGRAM_HEADER.size
    size = PROGRAM_HEADER.size
    machine = 62
    return (
        ELF_HEADER.pack(
            *(elfcore.MAGIC, 2, 1, 1, 0, 0, elfcore.ET_CORE, machine, 1),
            *(0, ELF_HEADER.size, 0, 0, ELF_HEADER.size, size, 1, 0, 0, 0),
        )
        + PROGRAM_HEADER.pack(elfcore.PT_NOTE, 0, start, 0, 0, len(notes), 0, 4)
        + notes
    )


def convert(
    snapshot: Snapshot,
    output: str,
    to: Layout | None = None,
    *,
    wrapping: str = "same",
    compacted: bool = False,
    expand_limit: int = EXPAND_LIMIT,
) -> bool:
    """Write a snapshot's areas to a new file, in another layout, format or wrapping.

    Parameters
    ----------
    snapshot : Snapshot
    output : str
        The new file, which must not exist.
    to : Layout, optional
        Default: each area's own; the result differs where an area was compacted.
    wrapping : str
        ``same`` (the file with other areas), ``raw``, ``npy``, ``qemu`` or ``elfcore``.
    compacted : bool
        Compacted format, for ``raw`` and ``npy``.
    expand_limit : int
        What compressed data may expand to (bytes).

    Returns
    -------
    bool
        Whether the guest's CPUID in the file now tells another layout than the areas have.

    Raises
    ------
    PolicyError
        If the file holds registers, or a note that fixes the layout.
    LayoutError
        If a component has no place in `to`.
    XfastError
        If the snapshot changed since it was read, or the output can't be written.
    """
    stale = wrapping == "same" and _changes_layout(snapshot, to)
    try:
        folder, name = Directory.around(output)
        with folder, _source(snapshot, expand_limit) as source:
            if folder.status(name) is not None:
                raise XfastError(f"{output}: exists; expected a new name")
            sweep(folder, name)
            put = Put(folder, name, expand_limit=expand_limit)
            if source:
                put.original = Original(snapshot.path, source.base.fd, stamp=snapshot.stamp)
            elif snapshot.path == "-":
                put.access = access_of(0)
            else:
                with opened_folder(snapshot.path) as fd:
                    put.access = access_below(fd)
            put.write(*_ways(snapshot, to, wrapping, compacted, source))
    except OSError as problem:
        where = problem.filename if isinstance(problem.filename, str) else output
        raise XfastError(f"{where}: can't be written: {problem.strerror or problem}") from None
    return stale


@contextlib.contextmanager
def _source(snapshot: Snapshot, expand_limit: int) -> Iterator[Source | None]:
    """Open a snapshot's file again; None for a directory, and for standard input."""
    if snapshot.path == "-" or os.path.isdir(snapshot.path):
        yield None
        return
    with Source.open(snapshot.path, expand_limit=expand_limit) as source:
        yield source


def _changes_layout(snapshot: Snapshot, to: Layout | None) -> bool:
    """Tell whether the areas of a file move away from the layout that its CPUID tells.

    Raises
    ------
    PolicyError
        If the file holds registers, or a note that fixes the layout.
    """
    stale = False
    for vcpu in snapshot.vcpus:
        moves = to is not None and _known(snapshot, vcpu).moved(to, engine.ALL)
        if vcpu.portable:
            raise PolicyError(
                f"{snapshot.path}: holds registers, not areas in a layout; expected --as raw, npy "
                "or elfcore, which lay them out"
            )
        if moves and vcpu.layout_source == "note":
            raise PolicyError(
                f"{snapshot.path}: its NT_X86_XSAVE_LAYOUT fixes the layout; expected --as "
                "elfcore, which writes a core with another"
            )
        stale |= bool(moves) and vcpu.cpuid is not None and snapshot.format != "raw"
    return stale


def _ways(
    snapshot: Snapshot,
    to: Layout | None,
    wrapping: str,
    compacted: bool,
    source: Source | None,
) -> tuple[Fill, Check]:
    """Return what writes the result, and what reads it back."""
    if wrapping == "same":
        if source is None:
            raise XfastError(
                f"{snapshot.path}: expected a file, got a directory or standard input; "
                "--as raw, npy, qemu or elfcore writes a new file"
            )
        areas = _resized(snapshot, to)
        edits = splices(source, snapshot, areas)
        return (
            lambda out: source.rewrite(edits, out),
            lambda again: _require_areas(again, snapshot.format, list(areas.values()), to),
        )
    if wrapping == "qemu":
        data = as_qemu(snapshot)
        return lambda out: _write(out, data), lambda again: _require_bytes(again, data)
    if wrapping == "elfcore":
        data = as_core(snapshot, to)
        return (
            lambda out: _write(out, data),
            lambda again: _require_areas(again, "elfcore", None, None),
        )
    rows = np.ascontiguousarray(areas_in(snapshot, to, compacted=compacted))
    data = as_npy(rows) if wrapping == "npy" else as_raw(rows)
    return (
        lambda out: _write(out, data),
        lambda again: _require_areas(again, "raw", list(rows), to),
    )


def _write(out: IO[bytes], data: bytes) -> None:
    out.write(data)


def _require_bytes(source: Source, data: bytes) -> None:
    if source.read(0, source.size) != data:
        raise XfastError(f"{source.path}: what was written reads back otherwise")


def _require_areas(
    source: Source, name: str, areas: Sequence[NDArray[np.uint8]] | None, layout: Layout | None
) -> None:
    """Raise XfastError unless a file, read back, holds these areas (None: any)."""
    size = None if areas is None else len(areas[0])
    (found,) = format_named(name).read(source, layout=layout, size=size)
    back = [vcpu.area for vcpu in found.vcpus]
    if areas is not None and not all(map(np.array_equal, back, areas)):
        raise XfastError(f"{source.path}: what was written reads back otherwise")


def _resized(snapshot: Snapshot, to: Layout | None) -> dict[int, NDArray[np.uint8]]:
    """Return the areas in another layout, each as long as the snapshot's format has it."""
    sizes = [len(vcpu.area) for vcpu in snapshot.vcpus]
    rows = areas_in(snapshot, to, size=max(sizes))
    return {
        i: row if snapshot.format == "raw" else _cut(row, size)
        for i, (row, size) in enumerate(zip(rows, sizes, strict=True))
    }


def _cut(area: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return an area without the zeros behind `size`; what is not zero stays."""
    return area if area[size:].any() else area[:size]
