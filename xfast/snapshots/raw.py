"""Raw areas of KVM_GET_XSAVE(2), ptrace and FXSAVE: plain files, .npy stacks, companions.

A plain file has no header: it is n areas of one size. Without anybody's word for the size, a file
of 512 bytes is an FXSAVE area, one of a standard area's size below a page is ptrace's, and zeros
that fill up 2 or 3 pages behind one area are padding. A file ``NAME.xsave`` may have
``NAME.xcrs`` (struct kvm_xcrs) and ``NAME.cpuid2`` (struct kvm_cpuid2) beside it; areas
``NAME-VARIANT.xsave`` may share those of NAME.

*Source*: Linux include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h (struct kvm_xsave,
kvm_xcrs, kvm_cpuid2); numpy.lib.format for .npy.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from xfast.engine import files
from xfast.errors import FormatError, LayoutError, PolicyError, XfastError
from xfast.snapshots import fxsave, infer, sorts
from xfast.snapshots.bytes import edit
from xfast.snapshots.bytes.entry import found_as
from xfast.snapshots.bytes.folder import Folder
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import Snapshot, Span, Splice, Stack, Unseen, Vcpu, kept
from xfast.xsave.cpuid import ENTRY, Cpuid, Entry
from xfast.xsave.features import EXTENDED_OFFSET, KVM_XSAVE_SIZE, TILEDATA
from xfast.xsave.layout import PRESETS, Layout

NPY_MAGIC = b"\x93NUMPY"
NPY_HEADER_LIMIT = 4096
AREA_LIMIT = 1 << 20
CPUID_LIMIT = 256
"""KVM_MAX_CPUID_ENTRIES: the kernel takes no longer list."""
COMPRESSION = (".bz2", ".gz", ".lz4", ".xz", ".zst")
COMPANION_LIMIT = 8 + ENTRY.size * CPUID_LIMIT
PTRACE_SIZES = {EXTENDED_OFFSET} | {
    end
    for layout in PRESETS.values()
    for slot in layout.slots
    if slot.offset and (end := slot.offset + slot.size) < KVM_XSAVE_SIZE
}
"""Bytes of a standard area that ends with one of its components, and not with a page."""
PADDED_SIZES = (2 * KVM_XSAVE_SIZE, 3 * KVM_XSAVE_SIZE)
XSAVE2_SIZES = (11008, 12288)
"""Bytes of KVM_GET_XSAVE2's area with room for AMX tiles, and as VMMs round it up to pages."""
RESERVED = bytes(48)
"""What the header has behind XCOMP_BV, as all CPUs so far write it."""
FEW = 8
"""Areas up to which each is asked for its layout by itself: sorting them would take longer."""
STACK_FROM = 256
"""Areas from which on a file is a stack, whose vCPUs are made when they are asked for."""
READ_UP_TO = 64 << 20
"""Files up to this size (bytes) are read; of larger ones the areas stay where they are."""


class Beside(NamedTuple):
    """What the companion files tell; None where there are none."""

    xcr0: int | None
    cpuid: Cpuid | None


ALONE = Beside(None, None)


@dataclass(frozen=True)
class Origin:
    """Where an area lies."""

    area: Span

    def places(self) -> dict[str, Span]:
        """Return it by name."""
        return {"area": self.area}


@dataclass(frozen=True)
class Wrapping:
    """What is around the areas of one file."""

    npy: bool


PLAIN, NPY = Wrapping(False), Wrapping(True)


Lie = tuple[int, int, int]
"""Where areas lie in a file: the first one's offset, how many there are, the bytes of each."""


def is_npy(snapshot: Snapshot) -> bool:
    """Tell whether a raw snapshot is a .npy file."""
    return kept(snapshot, Wrapping).npy


def xcr0_of(data: bytes) -> int | None:
    """Return XCR0 from a struct kvm_xcrs, or None where it holds none.

    Raises
    ------
    ValueError
        If the bytes are no such structure.
    """
    if len(data) < 392:
        raise ValueError(f"expected struct kvm_xcrs (392 bytes), got {len(data)}")
    (count,) = struct.unpack_from("<I", data)
    if count > 16:
        raise ValueError("expected at most 16 registers, got more")
    for i in range(count):
        register, _, value = struct.unpack_from("<2IQ", data, 8 + 16 * i)
        if register == 0:
            return int(value)
    return None


def cpuid_of(data: bytes) -> Cpuid:
    """Return the CPUID that a struct kvm_cpuid2 holds.

    Raises
    ------
    ValueError
        If the bytes are no such structure.
    """
    if len(data) < 8:
        raise ValueError(f"expected struct kvm_cpuid2 (8 bytes or more), got {len(data)}")
    (count,) = struct.unpack_from("<I", data)
    if count > CPUID_LIMIT or len(data) < 8 + ENTRY.size * count:
        raise ValueError(
            f"expected a struct kvm_cpuid2 of at most {CPUID_LIMIT} entries, got something else "
            f"of {len(data)} bytes"
        )
    return _cpuid_in(data[8 : 8 + ENTRY.size * count])


@lru_cache(maxsize=128)
def _cpuid_in(entries: bytes) -> Cpuid:
    """Return the CPUID of a list of entries: what areas of a fleet share, and keep one copy of."""
    return Cpuid(tuple(Entry(*row) for row in ENTRY.iter_unpack(entries)))


COMPANIONS: dict[str, Callable[[bytes], object]] = {".xcrs": xcr0_of, ".cpuid2": cpuid_of}
"""The ends of the names of files that only go with raw areas, and what parses each."""


def sniff(source: Source) -> bool:
    """Tell whether a file may be raw: .npy, named .xsave, or an XSAVE header where one belongs."""
    return _is_shaped(source) or _has_npy_magic(source) or _name(source).endswith(".xsave")


def _is_shaped(source: Source) -> bool:
    """Tell whether a file begins like an area, and has a size that fits."""
    size = source.size
    if size == fxsave.SIZE:
        return fxsave.plausible(source.read(0, size))
    paged = size >= KVM_XSAVE_SIZE and not (size % KVM_XSAVE_SIZE and size % XSAVE2_SIZES[0])
    if not paged and size not in PTRACE_SIZES:
        return False
    area = source.read(0, EXTENDED_OFFSET)
    return area[528:576] == RESERVED and infer.headed(area) and infer.controlled(area)


def read(
    source: Source, *, layout: Layout | None = None, size: int | None = None
) -> list[Snapshot]:
    """Read raw areas.

    Parameters
    ----------
    source : Source
    layout : Layout, optional
        The layout of every area; default: from the CPUID beside the file, or inferred.
    size : int, optional
        Bytes of an area in a plain file; default: 4096, or where AMX tiles ask for more, or the
        file's size for it, 11008; below a page the size of the file.

    Returns
    -------
    list of Snapshot
        One, with an area a vCPU, in the file's order. Of kind ``process`` where the areas are
        smaller than KVM's and no companion tells of a vCPU.

    Raises
    ------
    FormatError
        If the file does not hold areas of that size, or a companion is damaged.
    """
    if source.size == fxsave.SIZE and size is None:
        return [_fxsave(source)]
    beside = _beside(source.path)
    npy = _has_npy_magic(source)
    where = _stacked(source) if npy else _plain(source, size, beside)
    _, count, size = where
    find = _few if count <= FEW else _many
    vcpus = find(source, where, layout, beside)
    process = size < KVM_XSAVE_SIZE and not any(beside)
    whose = ("process", "ptrace") if process else ("vm", "kvm")
    snapshot = Snapshot(source.path, "raw", *whose, vcpus, source.container)
    snapshot.origin = NPY if npy else PLAIN
    return [snapshot]


def _few(source: Source, where: Lie, layout: Layout | None, beside: Beside) -> Sequence[Vcpu]:
    """Return the vCPUs of a few areas, made when somebody looks."""
    start, count, size = where
    data = source.read(start, count * size)
    found = []
    told: list[Hashable] = ["raw", size, beside.xcr0]
    for at in range(0, count * size, size):
        one, facts = _seen(source, start + at, data, at, size, layout, beside)
        found.append(one)
        told += one.number, facts

    def make() -> list[Vcpu]:
        rows = np.frombuffer(data, np.uint8).reshape(count, size)
        return [
            _vcpu(one.place, i, rows[i], start + i * size, beside) for i, one in enumerate(found)
        ]

    return Unseen(tuple(told), count, make)


def _many(source: Source, where: Lie, layout: Layout | None, beside: Beside) -> Sequence[Vcpu]:
    """Return the vCPUs of many areas; of very many, a Stack."""
    areas, start = _areas(source, where), where[0]

    def place(area: NDArray[np.uint8], row: int) -> tuple[infer.Place, bool]:
        found = _place(source, start + row * area.size, area, layout, beside)
        return found, infer.asks_bytes(
            area, given=layout, cpuid=beside.cpuid, mask=beside.xcr0 or 0
        )

    def make(kind: Vcpu, i: int, area: NDArray[np.uint8]) -> Vcpu:
        origin = Origin((start + i * area.size, area.size))
        return replace(kind, index=i, area=area, origin=origin, facts={})

    sort_of = np.zeros(len(areas), np.uint32)  # pages of zeros take no memory
    places, classes = sorts.sort(areas, place, sort_of)
    kinds = [_vcpu(one, 0, areas[0], start, beside) for one in places]
    stack = Stack(areas, kinds, classes, sort_of, make)
    return stack if len(areas) >= STACK_FROM else list(stack)


def _vcpu(
    found: infer.Place, index: int, area: NDArray[np.uint8], offset: int, beside: Beside
) -> Vcpu:
    """Return the vCPU of an area that lies at `offset`."""
    return Vcpu(
        index=index,
        area=area,
        layout=found.layout,
        layout_source=found.source,
        layout_note=found.note,
        xcr0=beside.xcr0,
        cpuid=beside.cpuid,
        origin=Origin((offset, area.size)),
    )


def _fxsave(source: Source) -> Snapshot:
    """Read a file that is one FXSAVE area."""
    data = source.read(0, fxsave.SIZE)
    if not fxsave.plausible(data):
        raise FormatError(
            source.path, 0, "expected an FXSAVE area, got no FCW and MXCSR as a CPU writes them"
        )
    origin = Origin((0, fxsave.SIZE))
    vcpu = Vcpu(0, fxsave.as_area(data), fxsave.LAYOUT, "format", origin=origin)
    snapshot = Snapshot(source.path, "raw", "process", "", [vcpu], source.container)
    snapshot.origin = Wrapping(False)
    return snapshot


def companion(folder: Folder, name: str) -> bool:
    """Tell whether a file only goes with areas."""
    return name.endswith(tuple(COMPANIONS))


def _place(
    source: Source, offset: int, area: NDArray[np.uint8], layout: Layout | None, beside: Beside
) -> infer.Place:
    """Find the layout of the area at `offset`, if it is one."""
    return _seen(source, offset, area.tobytes(), 0, area.size, layout, beside)[0].place


def _seen(
    source: Source,
    offset: int,
    data: bytes,
    at: int,
    size: int,
    layout: Layout | None,
    beside: Beside,
) -> tuple[infer.Seen, bytes]:
    """Find the layout and the facts of an area: it lies at `offset`, which is `at` in `data`."""
    xcr0, cpuid = beside
    try:
        found = infer.seen(data, at, size, layout, cpuid, xcr0 or 0)
    except LayoutError as problem:
        raise FormatError(source.path, None, f"its .cpuid2: {problem}") from None
    if found[0].headed:
        return found
    area = np.frombuffer(data, np.uint8, size, at)
    if not infer.headed(area) and not infer.controlled(area):
        raise FormatError(
            source.path,
            offset,
            "expected known components in an XSAVE area, got no FCW, MXCSR and header as a CPU "
            "writes them; see --size",
        )
    if infer.blank(area):
        raise FormatError(
            source.path,
            offset,
            "expected an XSAVE area, got no FCW, MXCSR nor XSTATE_BV; see --size",
        )
    return found


def _name(source: Source) -> str:
    """Return the file's name without what says that it is compressed."""
    name = os.path.basename(source.path)
    stem, suffix = os.path.splitext(name)
    return stem if suffix in COMPRESSION else name


def _has_npy_magic(source: Source) -> bool:
    return source.size >= 6 and source.read(0, 6) == NPY_MAGIC


def _plain(source: Source, size: int | None, beside: Beside) -> Lie:
    """Return where the areas of a plain file lie."""
    whole = source.size
    if size is None:
        size = _area_size(source, beside)
        if whole in PADDED_SIZES and size == KVM_XSAVE_SIZE:
            rest = source.read(size, whole - size)
            whole = whole if any(rest) else size
    if not EXTENDED_OFFSET <= size <= AREA_LIMIT:
        raise FormatError(
            source.path, None, f"expected areas of {EXTENDED_OFFSET} bytes to 1 MiB, got {size}"
        )
    if not source.size or source.size % size:
        raise FormatError(
            source.path, 0, f"expected a multiple of {size} bytes, got {source.size}; see --size"
        )
    return 0, whole // size, size


def _area_size(source: Source, beside: Beside) -> int:
    """Return the size of an area (bytes) in a plain file, where nobody says it."""
    if source.size <= KVM_XSAVE_SIZE:
        return source.size if source.size in PTRACE_SIZES else KVM_XSAVE_SIZE
    head = np.frombuffer(source.read(0, KVM_XSAVE_SIZE), np.uint8)
    mask = infer.header(head)[0] | infer.software_mask(head) | (beside.xcr0 or 0)
    if mask & TILEDATA:
        return next((size for size in XSAVE2_SIZES if not source.size % size), source.size)
    unpaged = source.size % KVM_XSAVE_SIZE and not source.size % XSAVE2_SIZES[0]
    return XSAVE2_SIZES[0] if unpaged else KVM_XSAVE_SIZE


def _stacked(source: Source) -> Lie:
    """Return where the areas of a .npy file lie: an (n, size) or (size,) array of uint8."""
    start = io.BytesIO(source.read(0, min(source.size, NPY_HEADER_LIMIT)))
    try:
        version = npy.read_magic(start)
        reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = reader(start, max_header_size=NPY_HEADER_LIMIT)
    except Exception as problem:  # the header is a Python literal: its parser raises many kinds
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise FormatError(source.path, 0, f"found a damaged .npy header: {reason}") from None
    if dtype != np.uint8 or fortran or len(shape) not in (1, 2):
        raise FormatError(
            source.path, 0, f"expected (n, size) of uint8, by rows, got an array {shape} of {dtype}"
        )
    size = shape[-1]
    offset = start.tell()
    if not EXTENDED_OFFSET <= size <= AREA_LIMIT or min(shape) < 1:
        raise FormatError(
            source.path,
            0,
            f"expected rows of {EXTENDED_OFFSET} bytes to 1 MiB, got an array {shape}",
        )
    if math.prod(shape) != source.size - offset:
        raise FormatError(
            source.path,
            offset,
            f"expected {math.prod(shape)} bytes for {shape}, got {source.size - offset}",
        )
    return offset, shape[0] if len(shape) == 2 else 1, size


def _areas(source: Source, where: Lie) -> sorts.Rows:
    """Return the areas in part of a file: an array, or where that is large, its place."""
    start, count, size = where
    if count * size <= READ_UP_TO:
        return np.frombuffer(source.read(start, count * size), np.uint8).reshape(-1, size)
    return sorts.FileRows(source, start, count, size)


def _beside(path: str) -> Beside:
    """Read the companion files, where there are any."""
    if path == "-":
        return ALONE
    paths = [stem + end for stem in _stems(path) for end in COMPANIONS]
    there = files.present("\0".join(paths))
    if not there:
        return ALONE
    found = [one for i, one in enumerate(paths) if there >> i & 1]
    return Beside(_companion(path, found, ".xcrs"), _companion(path, found, ".cpuid2"))


def _companion(path: str, found: Iterable[str], suffix: str) -> Any:
    """Return what the first of the files tells that has this suffix; None if none has."""
    for name in found:
        if not name.endswith(suffix):
            continue
        other = found_as(path, name)
        try:
            file = Source.open(other)
        except XfastError:
            if os.path.isfile(other):
                raise
            continue
        with file:
            data = file.read(0, min(file.size, COMPANION_LIMIT))
        try:
            return COMPANIONS[suffix](data)
        except ValueError as problem:
            raise FormatError(other, 0, str(problem)) from None
    return None


def _stems(path: str) -> list[str]:
    """Return what the paths of companions begin with: a file's own, and that it is a variant of."""
    start = path.rfind("/") + 1
    stem = path
    if "." in path[start:]:
        stem, end = os.path.splitext(path)
        if end in COMPRESSION:
            stem = os.path.splitext(stem)[0]
    dash = stem.rfind("-", start)
    return [stem, stem[:dash]] if dash > start else [stem]


def companion_paths(path: str, suffix: str) -> list[str]:
    """Return where a companion of a file is looked for: under its own name, and its variant's."""
    return [found_as(path, stem + suffix) for stem in _stems(path)]


def splices(
    source: Source, snapshot: Snapshot, areas: Mapping[int, NDArray[np.uint8]]
) -> list[Splice]:
    """Return the edits that put `areas` into the file.

    Parameters
    ----------
    areas : mapping of int to (size,) uint8
        New areas by position in ``snapshot.vcpus``. They may be of another size if all are.

    Raises
    ------
    PolicyError
        If only some of the areas change their size, so that the file would no longer hold
        areas of one size.
    """
    if kept(snapshot.vcpus[0], Origin).area == (0, fxsave.SIZE):
        old = source.read(0, fxsave.SIZE)
        new = fxsave.renewed(old, areas[0], source.path) if areas else old
        was, now = (np.frombuffer(data, np.uint8) for data in (old, new))
        return list(edit.changes(0, was, now, "area"))
    size = snapshot.vcpus[0].area.size
    sizes = {areas[i].size if i in areas else size for i in range(len(snapshot.vcpus))}
    if len(sizes) > 1:
        raise PolicyError(f"{source.path}: expected areas of one size, got {sorted(sizes)} bytes")
    if sizes == {size}:
        return [
            splice
            for i, area in areas.items()
            for splice in edit.changes(
                kept(snapshot.vcpus[i], Origin).area[0],
                snapshot.vcpus[i].area,
                area,
                f"area {i}",
            )
        ]
    whole = np.stack([areas[i] for i in range(len(areas))])
    old = source.read(0, source.size)
    return [Splice(0, old, stacked(whole) if is_npy(snapshot) else whole.tobytes(), "areas")]


def stacked(areas: NDArray[np.uint8]) -> bytes:
    """Return areas as the bytes of a .npy file.

    Parameters
    ----------
    areas : (n, size) uint8
    """
    file = io.BytesIO()
    np.save(file, areas, allow_pickle=False)
    return file.getvalue()
