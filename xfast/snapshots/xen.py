"""Xen's domain save images: what xl, libxl, libvirt and xc write; HVM, PVH and PV guests.

::

    xl header | libvirt header    optional: magic, lengths, configuration
    libxl header, records         optional: up to the record LIBXC_CONTEXT
    libxc image and domain header
    records                       PAGE_DATA is passed over; HVM_CONTEXT, X86_CPUID_POLICY and
                                  X86_PV_VCPU_XSAVE have what is read here; END

No real image was to be had: the reader follows the public specification, and was never checked
against a file that Xen wrote. So it reads only, and refuses to edit.

*Source*: Xen docs/specs/libxc-migration-stream.pandoc (Draft G and later), libxl-migration-
stream.pandoc; xen/include/public/hvm/save.h and arch-x86/hvm/save.h (struct hvm_hw_cpu,
hvm_hw_cpu_xsave, hvm_msr); xen/arch/x86/domctl.c (XEN_DOMCTL_getvcpuextstate); tools/xl/xl.h
(struct save_file_header); libvirt src/libxl/libxl_conf.h (libxlSavefileHeader).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast.errors import FormatError, LayoutError, PolicyError
from xfast.kernels.uapi import CR4_PKE, MSR_IA32_XFD, MSR_IA32_XSS
from xfast.snapshots import fxsave, infer
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import Snapshot, Splice, Vcpu
from xfast.xsave.cpuid import Cpuid
from xfast.xsave.features import EXTENDED_OFFSET, XFEATURE_MASK_FPSSE
from xfast.xsave.layout import PRESETS, Layout

XL_MAGIC = b"Xen saved domain, xl format\n \0 \r"
XL_HEADER, XL_LENGTH_OFFSET = 48, 44
LIBVIRT_MAGIC = b"libvirt-xml\n \0 \r"
LIBVIRT_HEADER, LIBVIRT_LENGTH_OFFSET = 64, 20
LIBXL_MAGIC = b"LibxlFmt"
LIBXL_HEADER = 16
LIBXC_MAGIC = b"\xff" * 8 + b"XENF"
LIBXC_HEADER, DOMAIN_HEADER = 24, 16
BIG_ENDIAN = 1

LIBXL_END, LIBXC_CONTEXT = 0, 1
END, PV_VCPU_BASIC, PV_VCPU_XSAVE, HVM_CONTEXT, CPUID_POLICY = 0, 4, 6, 9, 0x11
PV_VCPU_EXTENDED, PV_VCPU_MSRS, LAST_KNOWN, OPTIONAL = 5, 0xC, 0x12, 1 << 31
DOMAINS = {1: "PV", 2: "HVM", 3: "PVH"}
BODY_LIMIT = 16 << 20
"""Bytes of a record that is read; PAGE_DATA is not."""
LEAF_LIMIT = 1 << 12
ENTRY_LIMIT = 1 << 17
"""Entries of an HVM context: a vCPU has some ten."""

CPU, CPU_XSAVE, CPU_MSR = 2, 16, 20
CPU_CR4_OFFSET = 680
CPU_MOST = 2048
"""Bytes of a vCPU's registers, at most; less than two such entries take."""
XSAVE_HEADER = struct.Struct("<3Q")
"""xfeature_mask, xcr0, xcr0_accum; the area follows."""
PV_XSAVE_HEADER = struct.Struct("<2I2Q")
"""vcpu_id, reserved, xcr0, xcr0_accum; the area follows."""
LEAF = struct.Struct("<6I")
NO_SUBLEAF = 0xFFFFFFFF
MSR = struct.Struct("<2IQ")
VCPU_LIMIT = 8192
"""HVM_MAX_VCPUS is far less."""

RECORD_LIMIT, RECORD_LEAST = 1 << 16, 8
"""Records: so many, or one for so many bytes that the file takes on the disk. Those of memory hold
up to 1,024 pages each."""

NO_EDITS = (
    "Xen's images are read only: no real one was to be had to check an edit against; "
    "restrict the guest's CPUID on the Xen side"
)


class Piece(NamedTuple):
    """A record: its body lies at `offset`."""

    type: int
    offset: int
    length: int


@dataclass
class Found:
    """What the records tell: {vCPU: its entry}."""

    cpus: dict[int, bytes] = field(default_factory=dict)
    areas: dict[int, tuple[int, int, bytes]] = field(default_factory=dict)
    msrs: dict[int, dict[int, int]] = field(default_factory=dict)
    cpuid: Cpuid | None = None
    behind: bool = False
    """Whether anything but zeros lies behind the HVM context's END."""
    told: set[int] = field(default_factory=set)
    """The vCPUs that records speak of without their state, or that an earlier context had."""
    strange: int = 0
    """A record that a restore must know and refuses."""


def sniff(source: Source) -> bool:
    """Tell whether a file is a save image of Xen 4.6 or later."""
    start = source.read(0, min(32, source.size))
    return start.startswith((XL_MAGIC, LIBVIRT_MAGIC, LIBXL_MAGIC, LIBXC_MAGIC))


def read(
    source: Source, *, layout: Layout | None = None, size: int | None = None
) -> list[Snapshot]:
    """Read the vCPUs of a save image.

    Parameters
    ----------
    source : Source
    layout : Layout, optional
        The layout of every area; default: from the image's CPUID policy, or inferred.
    size : None
        The image tells the size of its areas.

    Returns
    -------
    list of Snapshot
        One. Xen saves no vCPU that is offline, so that their numbers may have gaps.

    Raises
    ------
    FormatError
        If it is damaged, cut off, or a vCPU has no extended state.
    """
    start = _image(source)
    domain, version = _header(source, start)
    found = Found()
    for piece in _records(source, start + LIBXC_HEADER + DOMAIN_HEADER):
        _take(source, found, piece)
    if not found.cpus and not found.areas:
        raise FormatError(source.path, start, "expected vCPUs in the Xen image, got none")
    vcpus = [_vcpu(source, i, found, layout) for i in sorted({*found.cpus, *found.areas})]
    facts = {"domain": domain, "xen": version}
    return [
        Snapshot(
            source.path,
            "xen",
            "vm",
            "xen",
            vcpus,
            source.container,
            facts,
            doubts=_doubts(found, vcpus),
        )
    ]


def _doubts(found: Found, vcpus: list[Vcpu]) -> tuple[str, ...]:
    """Return what makes one doubt that the vCPUs are whole, and all that are online.

    vCPU 0 always is. Each has its registers, and its XSAVE state if any has; how many are offline,
    and so not saved, nothing tells.
    """
    doubts = []
    if found.behind:
        doubts.append("expected END to end the HVM context, got more behind it")
    if 0 not in found.cpus and 0 not in found.areas:
        doubts.append(f"expected vCPU 0, got {min([*found.cpus, *found.areas])} as the first")
    for what, some, others in (
        ("the registers", found.cpus, found.areas),
        ("the XSAVE state", found.areas, found.cpus),
    ):
        missing = sorted(others.keys() - some.keys())
        if missing and some:
            doubts.append(f"expected {what} of vCPU {missing[0]}, got none")
    lost = sorted(found.told - found.cpus.keys() - found.areas.keys())
    if lost:
        doubts.append(f"expected the state of vCPU {lost[0]}, of which records speak, got none")
    if found.strange:
        doubts.append(f"expected records of known types, got {found.strange:#x}")
    long = [vcpu.index for vcpu in vcpus if vcpu.index in found.areas and _is_long(vcpu, found)]
    if long:
        doubts.append(f"expected zeros behind the area of vCPU {long[0]}, as Xen does, got others")
    return tuple(doubts)


def _is_long(vcpu: Vcpu, found: Found) -> bool:
    """Tell whether anything lies behind the components that the guest ever had enabled.

    *Source*: Xen xen/arch/x86/hvm/hvm.c hvm_load_cpu_xsave_states().
    """
    _, accumulated, data = found.areas[vcpu.index]
    layouts = [vcpu.layout] if vcpu.layout else PRESETS.values()
    slots = [slot for layout in layouts for slot in layout.slots if accumulated >> slot.nr & 1]
    if accumulated & ~XFEATURE_MASK_FPSSE & ~sum(1 << nr for nr in {slot.nr for slot in slots}):
        return False
    return any(data[max((slot.offset + slot.size for slot in slots), default=EXTENDED_OFFSET) :])


def _image(source: Source) -> int:
    """Return where the libxc image begins."""
    start = source.read(0, min(32, source.size))
    position = 0
    for magic, header, at in (
        (XL_MAGIC, XL_HEADER, XL_LENGTH_OFFSET),
        (LIBVIRT_MAGIC, LIBVIRT_HEADER, LIBVIRT_LENGTH_OFFSET),
    ):
        if start.startswith(magic):
            length: int = source.unpack("<I", at)[0]
            position = header + length
    if source.read(position, 8) != LIBXL_MAGIC:
        return position
    kind: int
    version, options = source.unpack(">2I", position + 8)
    if version != 2 or options & BIG_ENDIAN:
        raise FormatError(
            source.path, position + 8, "expected libxl image version 2, little-endian; got another"
        )
    position += LIBXL_HEADER
    for _ in range(_most(source)):
        kind, length = source.unpack("<2I", position)
        position += 8 + (length + 7 & ~7)
        if kind == LIBXC_CONTEXT:
            return position
        if kind == LIBXL_END:
            raise FormatError(source.path, position, "expected the record LIBXC_CONTEXT, got END")
    raise _crowded(source, position)


def _header(source: Source, start: int) -> tuple[str, str]:
    """Return the kind of domain, and the version of Xen."""
    if source.read(start, len(LIBXC_MAGIC)) != LIBXC_MAGIC:
        raise FormatError(
            source.path, start, "expected a Xen domain image (XENF), got none: Xen before 4.6?"
        )
    version, options = source.unpack(">IH", start + 12)
    if version not in (2, 3) or options & BIG_ENDIAN:
        raise FormatError(
            source.path, start + 12, "expected image version 2 or 3, little-endian; got another"
        )
    kind, _, _, major, minor = source.unpack("<I2H2I", start + LIBXC_HEADER)
    if kind not in DOMAINS:
        raise FormatError(
            source.path, start + LIBXC_HEADER, f"expected an x86 domain, got type {kind}"
        )
    return DOMAINS[kind], f"{major}.{minor}"


def _most(source: Source) -> int:
    """Return how many records a file can have."""
    return max(RECORD_LIMIT, source.stored // RECORD_LEAST)


def _crowded(source: Source, position: int) -> FormatError:
    """Return the error for a file that has more."""
    return FormatError(source.path, position, f"expected at most {_most(source)} records, got more")


def _records(source: Source, position: int) -> Iterator[Piece]:
    """Yield the records up to END; bodies are not read."""
    for _ in range(_most(source)):
        kind, length = source.unpack("<2I", position)
        if kind == END:
            return
        body = position + 8
        position = body + (length + 7 & ~7)
        if position > source.size:
            raise FormatError(
                source.path,
                body - 8,
                f"expected record {kind:#x} to end at {source.size} or before, got {position}",
            )
        yield Piece(kind, body, length)
    raise _crowded(source, position)


def _take(source: Source, found: Found, piece: Piece) -> None:
    """Add what a record tells; of records that come again (checkpoints) the last counts.

    *Source*: Xen docs/specs/libxc-migration-stream.pandoc: a record without the bit `OPTIONAL`
    must be known.
    """
    if piece.type > LAST_KNOWN and not piece.type & OPTIONAL:
        found.strange = piece.type
    if piece.type in (PV_VCPU_EXTENDED, PV_VCPU_MSRS) and piece.length >= 4:
        found.told.add(source.unpack("<I", piece.offset)[0])
    if piece.type not in (PV_VCPU_BASIC, PV_VCPU_XSAVE, HVM_CONTEXT, CPUID_POLICY):
        return
    if piece.length > BODY_LIMIT:
        raise FormatError(
            source.path, piece.offset, f"expected up to {BODY_LIMIT} bytes, got {piece.length}"
        )
    body = source.read(piece.offset, piece.length)
    if piece.type == CPUID_POLICY:
        found.cpuid = _cpuid(source, piece, body)
    elif piece.type == HVM_CONTEXT:
        found.told.update(found.cpus, found.areas)
        found.cpus, found.areas, found.msrs = {}, {}, {}
        _take_context(source, found, piece, body)
    elif piece.type == PV_VCPU_BASIC and len(body) >= 4:
        found.cpus.setdefault(_number(source, piece, struct.unpack_from("<I", body)[0]), b"")
    elif len(body) >= PV_XSAVE_HEADER.size + EXTENDED_OFFSET:
        number, _, xcr0, accumulated = PV_XSAVE_HEADER.unpack_from(body)
        area = body[PV_XSAVE_HEADER.size :]
        found.areas[_number(source, piece, number)] = (xcr0, accumulated, area)


def _number(source: Source, piece: Piece, number: int) -> int:
    if number >= VCPU_LIMIT:
        raise FormatError(
            source.path, piece.offset, f"expected a vCPU below {VCPU_LIMIT}, got {number}"
        )
    return number


def _take_context(source: Source, found: Found, piece: Piece, body: bytes) -> None:
    """Add the entries of an HVM context: type, instance and length before each."""
    at = 0
    for _ in range(ENTRY_LIMIT):
        if at + 8 > len(body):
            raise FormatError(source.path, piece.offset + at, "expected END of the HVM context")
        kind, number, length = struct.unpack_from("<2HI", body, at)
        if kind == 0:
            found.behind = any(body[at + 8 :])
            return
        data = body[at + 8 : at + 8 + length]
        if len(data) < length:
            raise FormatError(
                source.path,
                piece.offset + at,
                f"expected HVM entry {kind} within {len(body) - at - 8} bytes, got {length}",
            )
        where = piece.offset + at
        if kind == CPU:
            if not CPU_CR4_OFFSET + 8 <= length <= CPU_MOST or number in found.cpus:
                raise FormatError(
                    source.path, where, f"expected CPU {number} once, whole; got {length} bytes"
                )
            found.cpus[_number(source, piece, number)] = data
        elif kind == CPU_XSAVE:
            if length < XSAVE_HEADER.size + EXTENDED_OFFSET:
                raise FormatError(
                    source.path, where, f"expected CPU_XSAVE of 600 bytes or more, got {length}"
                )
            _, xcr0, accumulated = XSAVE_HEADER.unpack_from(data)
            area = data[XSAVE_HEADER.size :]
            found.areas[_number(source, piece, number)] = (xcr0, accumulated, area)
        elif kind == CPU_MSR and length >= 8:
            rows = data[8 : 8 + (length - 8) // MSR.size * MSR.size]
            found.msrs[number] = {index: value for index, _, value in MSR.iter_unpack(rows)}
        at += 8 + length
    raise FormatError(
        source.path, piece.offset + at, f"expected at most {ENTRY_LIMIT} HVM entries, got more"
    )


def _cpuid(source: Source, piece: Piece, body: bytes) -> Cpuid:
    if len(body) % LEAF.size or len(body) > LEAF.size * LEAF_LIMIT:
        raise FormatError(
            source.path,
            piece.offset,
            f"expected up to {LEAF_LIMIT} leaves of {LEAF.size} bytes, got {len(body)} bytes",
        )
    return Cpuid.from_rows(
        {
            (leaf, 0 if subleaf == NO_SUBLEAF else subleaf): registers
            for leaf, subleaf, *registers in LEAF.iter_unpack(body)
        }
    )


def _vcpu(source: Source, number: int, found: Found, given: Layout | None) -> Vcpu:
    cpu, msrs = found.cpus.get(number, b""), found.msrs.get(number, {})
    xcr0: int | None = None
    if number in found.areas:
        xcr0, accumulated, data = found.areas[number]
        area = np.frombuffer(data, np.uint8)
        if not infer.headed(area):
            raise FormatError(
                source.path, None, f"vCPU {number}: expected known components, got others"
            )
        try:
            size = None if found.cpuid else area.size
            place = infer.place(area, given=given, cpuid=found.cpuid, mask=accumulated, size=size)
        except LayoutError as problem:
            raise FormatError(source.path, None, f"its CPUID policy: {problem}") from None
    elif cpu:
        area, place = fxsave.as_area(cpu), infer.Place(fxsave.LAYOUT, "format")
    else:
        raise FormatError(
            source.path, None, f"vCPU {number} can't be judged: its XSAVE state is missing"
        )
    cr4 = struct.unpack_from("<Q", cpu, CPU_CR4_OFFSET)[0] if cpu else None
    return Vcpu(
        index=number,
        area=area,
        layout=place.layout,
        layout_source=place.source,
        layout_note=place.note,
        xcr0=xcr0,
        xss=msrs.get(MSR_IA32_XSS),
        xfd=msrs.get(MSR_IA32_XFD),
        cpuid=found.cpuid,
        pkru_enabled=None if cr4 is None else bool(cr4 & CR4_PKE),
    )


def splices(
    source: Source, snapshot: Snapshot, areas: Mapping[int, NDArray[np.uint8]]
) -> list[Splice]:
    """Refuse: nobody could check an edit.

    Raises
    ------
    PolicyError
        Always.
    """
    raise PolicyError(f"{source.path}: {NO_EDITS}")
