"""CRIU's images: core-TID.img of each thread, and cpuinfo.img, in a directory or a tar archive.

The images hold registers, field by field, in protobuf messages; they are laid out here as an area
in Intel's layout. Podman's and CRI-O's checkpoints are tar archives with these files in it; the
names of tar members are compared, never used as paths.

*Source*: CRIU images/core-x86.proto, core.proto, cpuinfo.proto, criu/include/magic.h;
Protocol Buffers "Encoding".
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast.errors import FormatError, PolicyError
from xfast.snapshots import infer
from xfast.snapshots.bytes import edit, tar
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.bytes.tar import Member
from xfast.snapshots.model import Snapshot, Splice, Vcpu
from xfast.xsave.cpuid import Cpuid
from xfast.xsave.features import SSE, X87, XFEATURE_MASK_FPSSE
from xfast.xsave.layout import PRESETS, Layout

IMG_COMMON_MAGIC = 0x54564319
CORE_MAGIC = 0x55053847
CPUINFO_MAGIC = 0x61404013
MARCH_X86_64 = 1
IMAGE_LIMIT = 4 << 20
CORE_NAME = re.compile(r"core-(\d{1,10})\.img")
CPUINFO_NAME = "cpuinfo.img"

LAYOUT = PRESETS["intel"].restricted(0x2FF)
"""Where the registers are laid out here; an image has no layout and no other components."""
AREA_SIZE = LAYOUT.standard_size()

THREAD_INFO, FPREGS, XSAVE, CET = 2, 3, 13, 9
XSTATE_BV_OFFSET = 512
Row = tuple[str, int, str, int]
FPREGS_FIELDS: dict[int, Row] = {
    1: ("cwd", 0, "<u2", 1),
    2: ("swd", 2, "<u2", 1),
    3: ("twd", 4, "<u2", 1),
    4: ("fop", 6, "<u2", 1),
    5: ("rip", 8, "<u8", 1),
    6: ("rdp", 16, "<u8", 1),
    7: ("mxcsr", 24, "<u4", 1),
    8: ("mxcsr_mask", 28, "<u4", 1),
    9: ("st_space", 32, "<u4", 32),
    10: ("xmm_space", 160, "<u4", 64),
}
XSAVE_FIELDS: dict[int, Row] = {
    1: ("xstate_bv", 512, "<u8", 1),
    2: ("ymmh_space", 576, "<u4", 64),
    3: ("bndreg_state", 960, "<u8", 8),
    4: ("bndcsr_state", 1024, "<u8", 8),
    5: ("opmask_reg", 1088, "<u8", 8),
    6: ("zmm_upper", 1152, "<u8", 64),
    7: ("hi16_zmm", 1664, "<u8", 128),
    8: ("pkru", 2688, "<u4", 2),
}
"""Field number -> its name, where its numbers lie in the area, their type, how many there are."""
CET_FIELDS = {1: "cet", 2: "ssp"}
TABLES = {(THREAD_INFO, FPREGS): FPREGS_FIELDS, (THREAD_INFO, FPREGS, XSAVE): XSAVE_FIELDS}
NESTED = {(THREAD_INFO,), *TABLES}

CPUINFO_FIELDS = {
    1: "vendor_id",
    2: "cpu_family",
    3: "model",
    4: "stepping",
    5: "capability_ver",
    6: "capability",
    7: "model_id",
    8: "xfeatures_mask",
    9: "xsave_size",
    10: "xsave_size_max",
}

VENDOR_TEXT = {1: b"GenuineIntel", 2: b"AuthenticAMD"}
REGISTERS = ("eax", "ebx", "ecx", "edx")
CAPABILITY = {
    0: (1, 0, "edx"),
    1: (0x80000001, 0, "edx"),
    4: (1, 0, "ecx"),
    6: (0x80000001, 0, "ecx"),
    9: (7, 0, "ebx"),
    10: (0xD, 1, "eax"),
    11: (7, 0, "ecx"),
    13: (0x80000008, 0, "ebx"),
    18: (7, 0, "edx"),
}
"""Word of `capability` -> the CPUID leaf, sub-leaf and register that it is a copy of."""


class Field(NamedTuple):
    """One field of a protobuf message: `raw` is all its bytes, tag included."""

    number: int
    value: int | bytes
    raw: bytes


class Broken(ValueError):
    """A message does not decode; turned into a FormatError where the file is known."""


def varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the varint at `position` and the position behind it.

    Raises
    ------
    Broken
        If it does not end within 10 bytes.
    """
    value = 0
    for shift, byte in enumerate(data[position : position + 10]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, position + shift + 1
    raise Broken(f"found no end of the number at {position}, needed one in 10 bytes")


def encoded(value: int) -> bytes:
    """Return a varint's bytes."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def fields(data: bytes) -> Iterator[Field]:
    """Yield the fields of a protobuf message in order; numbers as int, the rest as bytes.

    Raises
    ------
    Broken
        If it is none.
    """
    position = 0
    while position < len(data):
        start = position
        tag, position = varint(data, position)
        if tag & 7 == 0:
            value, position = varint(data, position)
            yield Field(tag >> 3, value, data[start:position])
            continue
        size = {1: 8, 5: 4}.get(tag & 7)
        if tag & 7 == 2:
            size, position = varint(data, position)
        if size is None or position + size > len(data):
            raise Broken(f"found a field of type {tag & 7} at {start}, needed it within the data")
        position += size
        yield Field(tag >> 3, data[position - size : position], data[start:position])


def _message(data: bytes, *path: int) -> bytes | None:
    """Return the message that lies in `data` under the field numbers `path`, or None."""
    for number in path:
        found = [f.value for f in fields(data) if f.number == number and isinstance(f.value, bytes)]
        if not found:
            return None
        data = found[-1]
    return data


def _lay_out(message: bytes, table: Mapping[int, Row], area: NDArray[np.uint8]) -> set[str]:
    """Put the numbers of a message where `table` says; return the names of the fields found."""
    counts: dict[int, int] = {}
    for number, value, _ in fields(message):
        if number not in table:
            continue
        name, offset, dtype, most = table[number]
        item = np.dtype(dtype).itemsize
        index = counts.get(number, 0)
        if not isinstance(value, int) or index >= most or value >> 8 * item:
            raise Broken(
                f"found {name}[{index}] out of range, needed {most} numbers of {item} bytes"
            )
        counts[number] = index + 1
        area[offset + index * item :][:item] = list(value.to_bytes(item, "little"))
    return {table[number][0] for number in counts}


def _area(core: bytes) -> tuple[NDArray[np.uint8], dict[str, Any]] | None:
    """Return a thread's registers as an area, and facts; None for a task that has none."""
    machine = next((f.value for f in fields(core) if f.number == 1), None)
    if machine != MARCH_X86_64:
        raise Broken(f"found machine type {machine!r}, needed {MARCH_X86_64} (x86-64)")
    fpregs = _message(core, THREAD_INFO, FPREGS)
    if fpregs is None:
        return None
    area = np.zeros(AREA_SIZE, np.uint8)
    found = _lay_out(fpregs, FPREGS_FIELDS, area)
    xsave = _message(fpregs, XSAVE)
    if xsave is None:
        area[XSTATE_BV_OFFSET] = X87 | SSE
    else:
        found |= _lay_out(xsave, XSAVE_FIELDS, area)
    facts: dict[str, Any] = {"fields": sorted(found)}
    cet = _message(xsave, CET) if xsave is not None else None
    if cet is not None:
        facts["cet"] = {
            CET_FIELDS[f.number]: f.value for f in fields(cet) if f.number in CET_FIELDS
        }
    return area, facts


def sniff(source: Source) -> bool:
    """Tell whether a file is one of CRIU's images, or a tar archive."""
    if source.size < 8:
        return False
    return source.unpack("<I", 0)[0] in (IMG_COMMON_MAGIC, CORE_MAGIC) or tar.sniff(source)


def read(
    source: Source, *, layout: Layout | None = None, size: int | None = None
) -> list[Snapshot]:
    """Read the threads of a checkpoint in a tar archive, or of one core-TID.img.

    Parameters
    ----------
    source : Source
    layout, size : None
        The images hold registers, not areas.

    Returns
    -------
    list of Snapshot
        One, of kind ``process``; see `read_folder`.

    Raises
    ------
    FormatError
        If an image is damaged, of another architecture, or there is none.
    """
    return [_snapshot(source.path, _members(source), source.container)]


def _members(source: Source) -> Iterator[tuple[Source, Member]]:
    """Yield the images in a file, each with the source in which it lies."""
    if not tar.sniff(source):
        yield source, Member(os.path.basename(source.path), 0, source.size)
        return
    seen = set()
    for member in tar.members(source):
        if _wanted(member.name):
            if member.name in seen:
                raise FormatError(
                    source.path, member.offset, f"found {member.name} twice, needed it once"
                )
            seen.add(member.name)
            yield source, member


def _wanted(name: str) -> bool:
    return name == CPUINFO_NAME or CORE_NAME.fullmatch(name) is not None


def read_folder(path: str) -> list[Snapshot]:
    """Read the threads of a checkpoint in a directory.

    Returns
    -------
    list of Snapshot
        One, of kind ``process``, a Vcpu a thread, in the order of their ids. A vcpu's `facts`
        name its file (``member``) and the registers it has (``fields``); the snapshot's hold
        ``cpuinfo``, the dumping machine's CPUs as cpuinfo.img tells them. The first of them is
        in each vcpu's `facts` too, and is its `cpuid`. CRIU leaves SSE out of its
        ``xfeatures_mask`` (0xe5 where XCR0 is 0xe7).

    Raises
    ------
    FormatError
        If an image is damaged or of another architecture.
    """
    return [_snapshot(path, _files(path), ())]


def _files(folder: str) -> Iterator[tuple[Source, Member]]:
    """Yield the images in a directory, one open at a time."""
    for name in sorted(os.listdir(folder)):
        if _wanted(name):
            with Source.open(os.path.join(folder, name)) as source:
                yield source, Member(name, 0, source.size)


def _snapshot(
    path: str, members: Iterable[tuple[Source, Member]], container: tuple[str, ...]
) -> Snapshot:
    vcpus = []
    facts: dict[str, Any] = {"threads_without_state": 0}
    for source, member in members:
        try:
            if member.name == CPUINFO_NAME:
                facts["cpuinfo"] = _cpuinfo(_entry(source, member, CPUINFO_MAGIC)[1])
                continue
            offset, core = _entry(source, member, CORE_MAGIC)
            found = _area(core)
        except Broken as problem:
            raise FormatError(source.path, member.offset, f"{member.name}: {problem}") from None
        if found is None:
            facts["threads_without_state"] += 1
            continue
        thread = CORE_NAME.fullmatch(member.name)
        vcpus.append(
            Vcpu(
                index=int(thread[1]) if thread else 0,
                area=found[0],
                layout=LAYOUT,
                layout_source="format",
                portable=True,
                where={"entry": (offset, 4 + len(core))},
                facts={"member": member.name, **found[1]},
            )
        )
    if facts.get("cpuinfo"):
        used = 0
        for vcpu in vcpus:
            used |= infer.header(vcpu.area)[0]
        cpuid = _cpuid(facts["cpuinfo"][0], used)
        for vcpu in vcpus:
            vcpu.cpuid = cpuid
            vcpu.facts["cpuinfo"] = facts["cpuinfo"][0]
    if not vcpus:
        raise FormatError(path, None, "found no core-TID.img with registers, needed one a thread")
    vcpus.sort(key=lambda vcpu: vcpu.index)
    return Snapshot(path, "criu", "process", "criu", vcpus, container, facts)


def _entry(source: Source, member: Member, magic: int) -> tuple[int, bytes]:
    """Return where the first entry of an image lies (its length's offset), and its message.

    Raises
    ------
    Broken
        If the image is of another kind.
    """
    position = member.offset
    (found,) = source.unpack("<I", position)
    if found == IMG_COMMON_MAGIC:
        position += 4
        (found,) = source.unpack("<I", position)
    if found != magic:
        raise Broken(f"found an image with the magic {found:#x}, needed {magic:#x}")
    position += 4
    (length,) = source.unpack("<I", position)
    end = member.offset + member.size
    if length > IMAGE_LIMIT or position + 4 + length > end:
        raise Broken(f"found an entry of {length} bytes, needed at most {end - position - 4}")
    return position, source.read(position + 4, length)


def _cpuinfo(message: bytes) -> list[dict[str, Any]]:
    """Return what cpuinfo.img tells, a dict a CPU."""
    cpus = []
    for number, entry, _ in fields(message):
        if number != 1 or not isinstance(entry, bytes):
            continue
        cpu: dict[str, Any] = {"capability": []}
        for item in fields(entry):
            name = CPUINFO_FIELDS.get(item.number, "")
            if name and isinstance(item.value, bytes) is not (name == "model_id"):
                raise Broken(f"found {name} of another type, needed a number (a text of model_id)")
            if name == "capability":
                cpu[name].append(item.value)
            elif name:
                value = item.value
                cpu[name] = value if isinstance(value, int) else value.decode("latin-1")
        cpus.append(cpu)
    return cpus


def _cpuid(cpu: Mapping[str, Any], used: int) -> Cpuid:
    """Return the dumping CPU's CPUID as far as cpuinfo.img tells it.

    Components in `used`, and x87 and SSE, are there whether ``xfeatures_mask`` has them or not.

    *Source*: CRIU compel/arch/x86/src/lib/include/uapi/asm/cpu.h (enum cpuid_leafs).
    """
    family, model = (int(cpu.get(name, 0)) for name in ("cpu_family", "model"))
    signature = (model & 0xF) << 4 | (model >> 4 & 0xF) << 16 | int(cpu.get("stepping", 0)) & 0xF
    signature |= min(family, 0xF) << 8 | (max(family - 0xF, 0) & 0xFF) << 20
    leaves = [(leaf, subleaf) for leaf, subleaf, _ in CAPABILITY.values()]
    registers = {(*leaf, name): 0 for leaf in leaves for name in REGISTERS}
    for word, place in CAPABILITY.items():
        if word < len(cpu["capability"]):
            registers[place] = int(cpu["capability"][word]) & 0xFFFFFFFF
    registers[1, 0, "eax"] = signature
    rows = {leaf: [registers[*leaf, name] for name in REGISTERS] for leaf in leaves}
    ebx, edx, ecx = struct.unpack("<3I", VENDOR_TEXT.get(cpu.get("vendor_id", 0), bytes(12)))
    rows[0, 0] = [0xD, ebx, ecx, edx]
    mask = int(cpu.get("xfeatures_mask", 0)) | used | XFEATURE_MASK_FPSSE
    sizes = [int(cpu.get(name, 0)) & 0xFFFFFFFF for name in ("xsave_size", "xsave_size_max")]
    rows[0xD, 0] = [mask & 0xFFFFFFFF, *sizes, mask >> 32 & 0xFFFFFFFF]
    return Cpuid.from_rows(rows)


def splices(
    source: Source, snapshot: Snapshot, areas: Mapping[int, NDArray[np.uint8]]
) -> list[Splice]:
    """Return the edits that put `areas` into the images: a whole entry for each that changes.

    Parameters
    ----------
    source : Source
        The archive or image; for a directory, whatever: each edit names its file in `member`.
    areas : mapping of int to (size,) uint8
        New areas by position in ``snapshot.vcpus``, in Intel's layout.

    Raises
    ------
    PolicyError
        If an area holds what the image has no field for.
    """
    found = []
    folder = os.path.isdir(snapshot.path)
    packed = not folder and tar.sniff(source)
    for i, area in areas.items():
        vcpu = snapshot.vcpus[i]
        name = vcpu.facts["member"]
        new = edit.fitted(area, AREA_SIZE, f"{snapshot.path}: {name}")
        if np.array_equal(new, vcpu.area):
            continue
        with Source.open(os.path.join(snapshot.path, name)) if folder else source.view(0) as file:
            offset, length = vcpu.where["entry"]
            old = file.read(offset, length)
            core = _renewed(old[4:], vcpu.area, new)
            _check_holds(core, new, f"{snapshot.path}: {name}")
            splice = Splice(offset, old, struct.pack("<I", len(core)) + core, name)
            if folder:
                splice = splice._replace(member=name)
            elif packed:
                member = next(m for _, m in _members(source) if m.name == name)
                splice = tar.resized(source, member, splice)
            found.append(splice)
    return found


def _renewed(
    message: bytes, old: NDArray[np.uint8], new: NDArray[np.uint8], at: tuple[int, ...] = ()
) -> bytes:
    """Return a message with the registers that changed; every other byte as it was."""
    table = TABLES.get(at, {})
    counts: dict[int, int] = {}
    parts = []
    for number, value, raw in fields(message):
        part = raw
        if number in table:
            _, offset, dtype, _ = table[number]
            item = np.dtype(dtype).itemsize
            offset += counts.get(number, 0) * item
            counts[number] = counts.get(number, 0) + 1
            register = new[offset : offset + item].tobytes()
            if register != old[offset : offset + item].tobytes():
                part = encoded(number << 3) + encoded(int.from_bytes(register, "little"))
        elif isinstance(value, bytes) and (*at, number) in NESTED:
            inner = _renewed(value, old, new, (*at, number))
            if inner != value:
                part = encoded(number << 3 | 2) + encoded(len(inner)) + inner
        parts.append(part)
    return b"".join(parts)


def _check_holds(core: bytes, area: NDArray[np.uint8], where: str) -> None:
    """Raise PolicyError unless `core` holds all of `area`."""
    found = _area(core)
    if found is None or not np.array_equal(found[0], area):
        raise PolicyError(
            f"{where}: got registers that the image has no field for, needed those that the "
            "dumping machine had"
        )
