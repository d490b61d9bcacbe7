"""CRIU's images: core-TID.img of each thread, and cpuinfo.img, in a directory or a tar archive.

The images hold registers, field by field, in protobuf messages; they are laid out here as an area
in Intel's layout. Podman's and CRI-O's checkpoints are tar archives with these files in it; the
names of tar members are compared, never used as paths.

*Source*: CRIU images/core-x86.proto, core.proto, cpuinfo.proto, criu/include/magic.h;
Protocol Buffers "Encoding"; POSIX pax "ustar Interchange Format".
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast.errors import FormatError, PolicyError
from xfast.features import SSE, X87
from xfast.layout import PRESETS, Layout
from xfast.snapshots import edit
from xfast.snapshots.model import Snapshot, Splice, Vcpu
from xfast.snapshots.source import Source

IMG_COMMON_MAGIC = 0x54564319
CORE_MAGIC = 0x55053847
CPUINFO_MAGIC = 0x61404013
MARCH_X86_64 = 1
IMAGE_LIMIT = 4 << 20
CORE_NAME = re.compile(r"core-(\d{1,10})\.img")
CPUINFO_NAME = "cpuinfo.img"

TAR_BLOCK = 512
TAR_MAGIC_OFFSET = 257
TAR_NAME_LIMIT = 1 << 16
TAR_MEMBER_LIMIT = 1 << 20

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
    8: ("pkru", 2688, "<u4", 1),
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


class Field(NamedTuple):
    """One field of a protobuf message: `raw` is all its bytes, tag included."""

    number: int
    value: int | bytes
    raw: bytes


class Member(NamedTuple):
    """One image: its bytes lie at `offset` of the file; `name` is its last path component."""

    name: str
    offset: int
    size: int


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
    return source.unpack("<I", 0)[0] in (IMG_COMMON_MAGIC, CORE_MAGIC) or _is_tar(source)


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
    if _is_tar(source):
        members = [(source, member) for member in _tar(source)]
    else:
        members = [(source, Member(os.path.basename(source.path), 0, source.size))]
    return [_snapshot(source.path, members, source.container)]


def read_folder(path: str) -> list[Snapshot]:
    """Read the threads of a checkpoint in a directory.

    Returns
    -------
    list of Snapshot
        One, of kind ``process``, a Vcpu a thread, in the order of their ids. A vcpu's `facts`
        name its file (``member``) and the registers it has (``fields``); the snapshot's hold
        ``cpuinfo``, the dumping machine's CPUs as cpuinfo.img tells them. CRIU 4.2 leaves SSE
        out of its ``xfeatures_mask`` (0xe5 where XCR0 is 0xe7).

    Raises
    ------
    FormatError
        If an image is damaged or of another architecture.
    """
    with contextlib.ExitStack() as stack:
        members = []
        for name in sorted(os.listdir(path)):
            if CORE_NAME.fullmatch(name) or name == CPUINFO_NAME:
                source = stack.enter_context(Source.open(os.path.join(path, name)))
                members.append((source, Member(name, 0, source.size)))
        return [_snapshot(path, members, ())]


def _snapshot(
    path: str, members: list[tuple[Source, Member]], container: tuple[str, ...]
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
    for number, value, _ in fields(message):
        if number != 1 or not isinstance(value, bytes):
            continue
        cpu: dict[str, Any] = {"capability": []}
        for item in fields(value):
            name = CPUINFO_FIELDS.get(item.number)
            if name == "capability":
                cpu[name].append(item.value)
            elif name:
                known = item.value
                cpu[name] = known.decode("latin-1") if isinstance(known, bytes) else known
        cpus.append(cpu)
    return cpus


def _is_tar(source: Source) -> bool:
    return source.size >= TAR_BLOCK and source.read(TAR_MAGIC_OFFSET, 5) == b"ustar"


def _tar(source: Source) -> list[Member]:
    """Return the images in a tar archive.

    Raises
    ------
    FormatError
        If the archive is damaged, or has an image twice.
    """
    found: dict[str, Member] = {}
    position, name = 0, ""
    for _ in range(TAR_MEMBER_LIMIT):
        header = source.read(position, TAR_BLOCK) if position < source.size else b""
        if not any(header):
            return list(found.values())
        size = _tar_number(source, position, header[124:136])
        checksum = sum(header[:148]) + sum(header[156:]) + 8 * 0x20
        if checksum != _tar_number(source, position + 148, header[148:156]):
            raise FormatError(source.path, position + 148, "found a wrong checksum of a tar header")
        data = position + TAR_BLOCK
        if data + size > source.size:
            raise FormatError(
                source.path,
                position,
                f"found a member of {size} bytes, needed at most {source.size - data}",
            )
        kind = header[156:157]
        if kind in (b"L", b"x"):
            text = source.read(data, min(size, TAR_NAME_LIMIT)).decode("utf-8", "replace")
            longer = re.search(r"\d+ path=([^\n]*)\n", text) if kind == b"x" else None
            name = longer[1] if longer else text.rstrip("\0") if kind == b"L" else name
        else:
            name = name or header[:100].split(b"\0")[0].decode("utf-8", "replace")
            base = name.rpartition("/")[2]
            if kind in (b"0", b"\0") and (CORE_NAME.fullmatch(base) or base == CPUINFO_NAME):
                if base in found:
                    raise FormatError(source.path, position, f"found {base} twice, needed it once")
                found[base] = Member(base, data, size)
            name = ""
        position = data + -(-size // TAR_BLOCK) * TAR_BLOCK
    raise FormatError(source.path, position, f"found over {TAR_MEMBER_LIMIT} members")


def _tar_number(source: Source, offset: int, digits: bytes) -> int:
    """Return a number of a tar header: octal digits, or (bit 7 set) bytes."""
    if digits[0] & 0x80:
        return int.from_bytes(digits, "big") & (1 << 8 * len(digits) - 1) - 1
    text = digits.strip(b" \0") or b"0"
    if not re.fullmatch(rb"[0-7]+", text):
        raise FormatError(source.path, offset, f"found {digits!r}, needed octal digits")
    return int(text, 8)


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
    tar = not folder and _is_tar(source)
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
                found.append(splice._replace(member=name))
            else:
                found.append(_in_tar(file, splice, name) if tar else splice)
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


def _in_tar(source: Source, splice: Splice, name: str) -> Splice:
    """Return an edit of a tar archive's member, with the header and the padding that it needs."""
    member = next(member for member in _tar(source) if member.name == name)
    start = member.offset - TAR_BLOCK
    old = source.read(start, TAR_BLOCK + -(-member.size // TAR_BLOCK) * TAR_BLOCK)
    begin = splice.offset - start
    content = old[TAR_BLOCK:begin] + splice.new
    content += old[begin + len(splice.old) : TAR_BLOCK + member.size]
    header = bytearray(old[:TAR_BLOCK])
    header[124:136] = b"%011o\0" % len(content)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    padding = bytes(-len(content) % TAR_BLOCK)
    return splice._replace(offset=start, old=old, new=bytes(header) + content + padding)
