"""Firecracker's vmstate file of releases 1.8 to 1.14 (bincode): found by the shape of KVM's data.

The file is a serialized MicrovmState whose fields differ from release to release; but since 1.8
every KVM structure in it is a blob behind its length, so that a vCPU is recognised by its
kvm_xcrs followed by its kvm_xsave. The CRC64 at the end is checked, and renewed by edits.
Other releases are named, not guessed at.

*Source*: Firecracker src/vmm/src/snapshot/mod.rs and crc.rs; src/vmm/src/arch/x86_64/vcpu.rs
(struct VcpuState), tags v1.8.0 to v1.14.0; rust-vmm kvm-bindings src/x86_64/serialize.rs.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast.engine import vmstate
from xfast.errors import FormatError, LayoutError
from xfast.kernels.uapi import CR4_PKE, MSR_IA32_XFD, MSR_IA32_XSS, SREGS_CR4
from xfast.snapshots import infer
from xfast.snapshots.bytes import edit
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import Snapshot, Span, Splice, Unseen, Vcpu, kept
from xfast.xsave.cpuid import ENTRY, Cpuid, Entry
from xfast.xsave.features import KVM_XSAVE_SIZE
from xfast.xsave.layout import Layout

MAGIC = 0x0710_1984_8664_0000
"""Its low 16 bits are the version of the format before 1.7 (versionize), 0 since."""
MAGIC_ARM = 0x0710_1984_AAAA_0000

U64 = struct.Struct("<Q")
HEAD = struct.Struct("<2Q")
"""The magic, and the length of the version that follows."""
VERSION_LIMIT = 64

SIZE_LIMIT = 10 << 20
"""Firecracker reads no larger file either."""

SNIFF_LIMIT = 1 << 20
"""Files without a magic are counted through up to this size (bytes)."""

MAJORS = {2: "1.8", 3: "1.9 or 1.10.0", 4: "1.10.1", 5: "1.11", 6: "1.12", 8: "1.13 or 1.14"}
"""Snapshot versions that are read, and the releases that write them."""

XCRS = struct.pack("<QI", 392, 1)
"""A blob of struct kvm_xcrs with one register: its length, then nr_xcrs."""
XSAVE_LENGTHS = {"4": KVM_XSAVE_SIZE, "8": KVM_XSAVE_SIZE + 8}
"""What precedes a kvm_xsave, in the versions of which a file was seen: with 8 more, the number of
words that AMX adds. In a file of another version all have the same."""
LENGTH_FROM_PLACES = KVM_XSAVE_SIZE - (8 + 392) - 8
"""From where an area lies behind its kvm_xcrs to what precedes it: both have a length in front."""
TABLE_LIMIT = 256
"""KVM_MAX_CPUID_ENTRIES and KVM_MAX_MSR_ENTRIES: the walk takes no longer list, as the kernel."""
MSR = struct.Struct("<I4xQ")
"""struct kvm_msr_entry: its index, and its value."""
CPUID_BEHIND_COUNT = 8 + 24
"""From the number of vCPUs to the first one's CPUID: the list's own head lies between."""
TOLD_MSRS = MSR_IA32_XSS, MSR_IA32_XFD
"""Of all others no more is read than that they were saved."""

WAY_OUT = (
    "this can't be judged; print it with that release's snapshot-editor (info-vmstate "
    "vcpu-states) and give the XSAVE areas as a raw file"
)


Found = tuple[int, int, int, int, int, int, int, bytes, bytes, int | None, int | None]
"""A Hit's fields, as the engine finds them: most files are never looked into any further."""


class Hit(NamedTuple):
    """A vCPU as it was found: offsets in the file (bytes), and what lies there.

    `cpuid_at` is where the CPUID's first row begins, each behind its size: 0 where there is none.
    `msrs` are struct kvm_msr_entry, with the values of `TOLD_MSRS` alone. `cpuid` and `msrs` are
    one object each for all vCPUs that have the same.
    """

    start: int
    xcrs: int
    area: int
    extra: int
    extra_size: int
    end: int
    cpuid_at: int
    cpuid: bytes
    msrs: bytes
    xcr0: int | None
    cr4: int | None

    @property
    def pkru_enabled(self) -> bool | None:
        """CR4.PKE."""
        return None if self.cr4 is None else bool(self.cr4 & CR4_PKE)


@dataclass(frozen=True)
class Origin:
    """Where a vCPU's area lies: its first 4096 bytes, and what AMX adds to them."""

    area: Span
    extra: Span

    def places(self) -> dict[str, Span]:
        """Return both by name."""
        return {"area": self.area, "extra": self.extra}


def crc64(data: bytes | memoryview) -> int:
    """Return the CRC-64/Jones of `data`; that of data with its own CRC behind it is 0.

    *Source*: Firecracker src/vmm/src/snapshot/crc.rs; the crate crc64.
    """
    return vmstate.crc64(bytes(data))


def sniff(source: Source) -> bool:
    """Tell whether a file has Firecracker's magic, or ends with its CRC64 (1.15 and later)."""
    if source.size < 16:
        return False
    (magic,) = source.unpack("<Q", 0)
    if magic & ~0xFFFF in (MAGIC, MAGIC_ARM):
        return True
    return source.size <= SNIFF_LIMIT and _sealed(source)


def _sealed(source: Source) -> bool:
    """Tell whether a file without the magic ends with its CRC64, as bitcode snapshots do."""
    return any(source.read(source.size - 8, 8)) and not crc64(source.read(0, source.size))


def read(
    source: Source, *, layout: Layout | None = None, size: int | None = None
) -> list[Snapshot]:
    """Read the vCPUs of a vmstate file.

    Parameters
    ----------
    source : Source
    layout : Layout, optional
        The layout of every area; default: from each vCPU's CPUID.
    size : None
        The file tells the size of its areas.

    Returns
    -------
    list of Snapshot
        One, the vCPUs in the file's order.

    Raises
    ------
    FormatError
        If it is of a release that can't be read, or damaged.
    """
    version, release = _version(source)
    data = source.read(0, source.size)
    if vmstate.crc64(data):
        (stored,), counted = U64.unpack_from(data, len(data) - 8), crc64(data[:-8])
        raise FormatError(
            source.path, len(data) - 8, f"expected the CRC64 {counted:#x}, got {stored:#x}"
        )
    hits = vmstate.walk(data, XCRS, SREGS_CR4, TOLD_MSRS)
    if not hits:
        raise FormatError(
            source.path,
            None,
            "expected at least one vCPU (kvm_xcrs followed by kvm_xsave), got none",
        )
    vcpus = _unseen(source.path, data, hits) if layout is None else None
    if vcpus is None:
        vcpus = _vcpus(source.path, data, hits, layout)
    facts = {"version": version, "release": release}
    return [
        Snapshot(
            source.path,
            "firecracker",
            "vm",
            "kvm",
            vcpus,
            source.container,
            facts,
            doubts=_doubts(data, hits, version),
        )
    ]


def _doubts(data: bytes, hits: Sequence[Found], version: str) -> tuple[str, ...]:
    """Compare the number of vCPUs with that of their vector, and the lengths of their kvm_xsave.

    The number precedes the first one's CPUID. A length that lies moves the area by 8 bytes.
    """
    at = hits[0][6]
    told = U64.unpack_from(data, max(at - CPUID_BEHIND_COUNT, 0))[0] if at else None
    shown = f"{told} vCPUs, as the file counts them" if told is not None else "a CPUID of vCPU 0"
    doubts = [f"expected {shown}, got {len(hits)} vCPUs"] if told != len(hits) else []
    lengths = {hit[2] - hit[1] + LENGTH_FROM_PLACES for hit in hits}
    wanted = XSAVE_LENGTHS.get(version.partition(".")[0], min(lengths))
    if lengths != {wanted}:
        got = ", ".join(map(str, sorted(lengths)))
        doubts.append(f"expected kvm_xsave of {wanted} bytes in version {version}, got {got}")
    return tuple(doubts)


def _version(source: Source) -> tuple[str, str]:
    """Return the snapshot version of a file that can be read, and the releases that write it.

    Raises
    ------
    FormatError
        If it can't; says which release wrote it.
    """
    magic, length = HEAD.unpack(source.read(0, HEAD.size))
    if magic & ~0xFFFF == MAGIC_ARM:
        raise FormatError(source.path, 0, "expected a snapshot of x86_64, got one of aarch64")
    if magic & ~0xFFFF != MAGIC:
        what = "a bitcode snapshot (Firecracker 1.15 or later)" if _sealed(source) else "no magic"
        raise FormatError(
            source.path, 0, f"expected Firecracker 1.8 to 1.14, got {what}: {WAY_OUT}"
        )
    if magic != MAGIC:
        raise FormatError(
            source.path,
            0,
            "expected Firecracker 1.8 to 1.14, got a versionize snapshot (Firecracker 1.6 or "
            f"before): {WAY_OUT}",
        )
    text, major = _major_of(source.read(16, length) if length <= VERSION_LIMIT else b"")
    if major is None:
        raise FormatError(
            source.path, 8, "expected the version as MAJOR.MINOR.PATCH, got another text"
        )
    if major not in MAJORS:
        raise FormatError(
            source.path,
            16,
            f"expected snapshot version {', '.join(f'{m}.x' for m in MAJORS)} "
            f"(Firecracker 1.8 to 1.14), got {text}: {WAY_OUT}",
        )
    if source.size > SIZE_LIMIT:
        raise FormatError(
            source.path, None, f"expected at most {SIZE_LIMIT} bytes, got {source.size}"
        )
    return text, MAJORS[major]


@lru_cache(maxsize=64)
def _major_of(version: bytes) -> tuple[str, int | None]:
    """Return a version as text, and its first number; None where it is no version."""
    text = version.decode("latin-1")
    known = re.fullmatch(r"(\d{1,9})\.\d{1,9}\.\d{1,9}", text)
    return text, int(known[1]) if known else None


def _vcpus(path: str, data: bytes, hits: Sequence[Found], given: Layout | None) -> list[Vcpu]:
    return [_vcpu(path, data, i, Hit(*hit), given) for i, hit in enumerate(hits)]


def _unseen(path: str, data: bytes, hits: Sequence[Found]) -> Sequence[Vcpu] | None:
    """Return the vCPUs, made when somebody looks; None where a look says what is wrong."""
    told: list[Hashable] = ["firecracker"]
    for hit in hits:
        _, _, at, _, more, _, _, cpuid, msrs, xcr0, cr4 = hit
        area, at = (_area(data, Hit(*hit)), 0) if more else (data, at)
        size = KVM_XSAVE_SIZE + more
        try:
            one, facts = infer.seen(area, at, size, None, _cpuid_of(cpuid), xcr0 or 0)
        except LayoutError:
            return None
        told += one.number, msrs, xcr0, cr4 if cr4 is None else cr4 & CR4_PKE, size, facts
    return Unseen(tuple(told), len(hits), lambda: _vcpus(path, data, hits, None))


def _vcpu(path: str, data: bytes, index: int, hit: Hit, given: Layout | None) -> Vcpu:
    cpuid = _cpuid_of(hit.cpuid)
    msrs = dict(MSR.iter_unpack(hit.msrs))
    area = np.frombuffer(_area(data, hit), np.uint8)
    try:
        place = infer.place(area, given=given, cpuid=cpuid, mask=hit.xcr0 or 0)
    except LayoutError as problem:
        raise FormatError(path, hit.start, f"CPUID of vCPU {index}: {problem}") from None
    return Vcpu(
        index=index,
        area=area,
        layout=place.layout,
        layout_source=place.source,
        layout_note=place.note,
        xcr0=hit.xcr0,
        xss=msrs.get(MSR_IA32_XSS),
        xfd=msrs.get(MSR_IA32_XFD),
        cpuid=cpuid,
        pkru_enabled=hit.pkru_enabled,
        msrs=tuple(sorted(msrs)) if msrs else None,
        origin=Origin((hit.area, KVM_XSAVE_SIZE), (hit.extra, hit.extra_size)),
    )


def _area(data: bytes, hit: Hit) -> bytes:
    extra = data[hit.extra : hit.extra + hit.extra_size]
    return data[hit.area : hit.area + KVM_XSAVE_SIZE] + extra


@lru_cache(maxsize=1024)
def _cpuid_of(rows: bytes) -> Cpuid | None:
    """Return the CPUID in a table's rows: what vCPUs of a fleet share, and keep one copy of."""
    step = 8 + ENTRY.size
    places = range(8, len(rows), step)
    entries = tuple(Entry(*ENTRY.unpack_from(rows, place)) for place in places)
    return Cpuid(entries) if entries else None


def splices(
    source: Source, snapshot: Snapshot, areas: Mapping[int, NDArray[np.uint8]]
) -> list[Splice]:
    """Return the edits that put `areas` into the file, and its new CRC64.

    Parameters
    ----------
    areas : mapping of int to (size,) uint8
        New areas by position in ``snapshot.vcpus``; shorter ones are filled up with zeros.

    Raises
    ------
    PolicyError
        If an area is longer than the one in the file.
    """
    found: list[Splice] = []
    for i, area in areas.items():
        vcpu = snapshot.vcpus[i]
        name = f"vcpu {vcpu.index}"
        new = edit.fitted(area, vcpu.area.size, f"{source.path}: {name}")
        origin = kept(vcpu, Origin)
        for part, (offset, length), begin in (
            ("area", origin.area, 0),
            ("extra", origin.extra, KVM_XSAVE_SIZE),
        ):
            piece = slice(begin, begin + length)
            found += edit.changes(offset, vcpu.area[piece], new[piece], f"{name} {part}")
    if found:
        data = bytearray(source.read(0, source.size))
        for splice in found:
            data[splice.offset : splice.offset + len(splice.new)] = splice.new
        crc = struct.pack("<Q", crc64(bytes(data[:-8])))
        found.append(Splice(source.size - 8, bytes(data[-8:]), crc, "crc64"))
    return found
