"""The grammar of a QEMU migration stream, read from its end: where the `cpu` sections lie.

RAM comes first and the devices last, and the description at the very end says how long each
device is; so the vCPUs are found from the tail, at a cost that guest memory plays no part in.

*Source*: QEMU migration/savevm.c, migration/vmstate.c; docs/devel/migration/main.rst.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from xfast.errors import FormatError
from xfast.snapshots.bytes.source import Source

MAGIC = b"QEVM\0\0\0\3"
CONFIGURATION, FULL, FOOTER, SUBSECTION = 7, 4, 0x7E, 5
DESCRIPTION_LIMIT = 16 << 20
"""No description is longer (bytes): it takes about 8 KB a vCPU."""
SEARCH_LIMIT = 16 << 20
"""How far from its end a stream without description is searched for vCPUs (bytes)."""
CONFIGURATION_PARTS = 8
"""The configuration record has three subsections; one that is not known ends it too."""
HEAD_LIMIT = 1 << 20
"""How far from the file's start a stream may begin (bytes)."""
WINDOW = 1 << 17
DEPTH_LIMIT = 16
CPU_VERSION = 12
CPU_HEADER = 17
"""Bytes of a `cpu` section's header: type, section id, name, instance, version."""
FIXED_SIZES = (1817, 1313)
"""Bytes of a `cpu` section before its subsections: x86_64, i386."""

SUBSECTION_SIZES = {
    "cpu/" + name: sizes
    for names, sizes in (
        ("triple_fault", (1,)),
        ("error_code umwait pkru pkrs svm_guest msr_tsx_ctrl", (4,)),
        ("async_pf_msr async_pf_int_msr async_pv_eoi_msr steal_time_msr poll_control_msr", (8,)),
        ("msr_tsc_adjust msr_tscdeadline msr_ia32_misc_enable msr_ia32_feature_control", (8,)),
        ("msr_hyperv_vapic msr_hyperv_time msr_hyperv_runtime tsc_khz msr_smi_count", (8,)),
        ("spec_ctrl amd_tsc_scale_msr mcg_ext_ctl virt_ssbd xss msr_pl0_ssp msr_hwcr", (8,)),
        ("exception_info", (11,)),
        ("svn_npt", (12,)),
        ("msr_hyperv_hypercall msr_xfd cet", (16,)),
        ("fpop_ip_dp", (18,)),
        ("msr_hyperv_reenlightenment", (24,)),
        ("pdptrs intel_sgx", (32,)),
        ("msr_hyperv_crash cet_shstk", (40,)),
        ("msr_hyperv_stimer", (64,)),
        ("fred", (72,)),
        ("mpx", (88,)),
        ("xen_vcpu", (97,)),
        ("intel_pt", (104,)),
        ("apx", (128,)),
        ("msr_hyperv_synic", (152,)),
        ("msr_architectural_pmu", (344,)),
        ("arch_lbr", (784,)),
        ("avx512", (1600, 320)),
        ("intel_amx_xtile", (8256,)),
    )
    for name in names.split()
}
"""Bytes of each subsection's data, for streams that have no description to tell them."""

HEADER = re.compile(rb"\x04(.{4})\x03cpu(.{4})" + struct.pack(">I", CPU_VERSION), re.DOTALL)
"""A `cpu` section's header: section id and instance."""
DESCRIPTION = re.compile(rb'(?=\0\x06(\0.{3})\{")', re.DOTALL)
"""EOF, the description's type, its length (below 2^24), its first two characters."""
NEXT = re.compile(rb"\x7e|\x05|\x04.{4}[\x01-\xff][\x21-\x7e]", re.DOTALL)
"""What may follow a subsection: a footer, another one, or (without footers) a section."""
OTHER_DEVICE = re.compile(
    rb"\x04.{4}([\x03-\x7f])(?!cpu|apic|kvm-tpr-opt)([\x21-\x7e]{3,})\0\0\0.\0\0\0.", re.DOTALL
)
"""The header of a section that is no part of a vCPU: the length of its name, and the name."""
SECTION_END = re.compile(
    rb"\x7e(?=(.{4})(?:\x04.{4}[\x01-\xff][\x21-\x7e]|\0(?:\x06|\0*\Z)))", re.DOTALL
)
"""A footer and its section id, before another section or EOF, which ends the stream or comes
before the description; a disk image or O_DIRECT may pad it with zeros."""


class Configuration(NamedTuple):
    """What the stream's first record says."""

    machine: str = ""
    capabilities: tuple[str, ...] = ()


class CpuSection(NamedTuple):
    """Where one vCPU's section lies; offsets in the stream, bytes.

    `fixed` bytes of registers at `offset`, then subsections: {name: (offset of the data, bytes)}.
    """

    instance: int
    offset: int
    fixed: int
    size: int
    subsections: dict[str, tuple[int, int]]


class Sections(NamedTuple):
    """The vCPUs of a stream, and what the devices around them tell.

    `description` is ``whole``, ``damaged`` or ``none``.
    """

    cpus: list[CpuSection]
    kvmclock: bool
    description: str


def start_of(source: Source) -> int | None:
    """Return where a stream begins, or None; `migrate file:` can leave room before it."""
    if source.size >= len(MAGIC) and source.read(0, len(MAGIC)) == MAGIC:
        return 0
    at = source.read(0, min(HEAD_LIMIT, source.size)).find(MAGIC + bytes([CONFIGURATION]))
    return None if at < 0 else at


def configuration(stream: Source, start: int) -> Configuration:
    """Read the configuration record of the stream at `start`; machine types up to 2.3 have none.

    Raises
    ------
    FormatError
        If no stream begins there, or it ends within the record.

    *Source*: QEMU migration/savevm.c vmstate_configuration.
    """
    if stream.read(start, len(MAGIC)) != MAGIC:
        raise FormatError(stream.path, start, "found no QEMU stream, needed QEVM and version 3")
    at = start + len(MAGIC)
    if stream.read(at, 1)[0] != CONFIGURATION:
        return Configuration()
    (length,) = stream.unpack(">I", at + 1)
    if length > 1024:
        raise FormatError(
            stream.path, at + 1, f"found a machine name of {length} bytes, needed 1024"
        )
    machine = stream.read(at + 5, length).decode("ascii", "replace")
    at += 5 + length
    capabilities: list[str] = []
    for _ in range(CONFIGURATION_PARTS):
        if stream.read(at, 1)[0] != SUBSECTION:
            break
        name = stream.read(at + 2, stream.read(at + 1, 1)[0])
        at += 6 + len(name)
        if name == b"configuration/target-page-bits":
            at += 4
        elif name == b"configuration/uuid":
            at += 16
        elif name == b"configuration/capabilities":
            (count,) = stream.unpack(">I", at)
            at += 4
            if count > 256:
                raise FormatError(stream.path, at - 4, f"found {count} capabilities, needed 256")
            for _ in range(count):
                word = stream.read(at + 1, stream.read(at, 1)[0])
                capabilities.append(word.decode("ascii", "replace"))
                at += 1 + len(word)
        else:
            break
    return Configuration(machine, tuple(capabilities))


def find_cpus(stream: Source) -> Sections:
    """Find the `cpu` sections of a stream from its end.

    Returns
    -------
    Sections
        One CpuSection a vCPU, ascending by instance (cpu_index).

    Raises
    ------
    FormatError
        If there are none, or fewer than the description lists, or the stream is cut off.

    *Source*: QEMU migration/savevm.c qemu_savevm_state_complete_precopy().
    """
    end, devices = _description(stream)
    if devices is None:
        cpus, kvmclock, description = _search(stream)
        described = 0
    else:
        description = "whole"
        described = sum(device.get("name") == "cpu" for device in devices)
        kvmclock = any(device.get("name") == "kvmclock" for device in devices)
        cpus = _walk(stream, devices, end)
        if len(cpus) < described:
            cpus, _, _ = _search(stream)
    if not cpus or len(cpus) < described:
        hint = "" if devices else " (cut off? it does not end with its description)"
        needed = described or "at least one"
        raise FormatError(
            stream.path,
            stream.size,
            f"found {len(cpus)} vCPUs in the QEMU stream{hint}, needed {needed}",
        )
    return Sections(sorted(cpus), kvmclock, description)


def _description(stream: Source) -> tuple[int, list[dict[str, Any]] | None]:
    """Return the offset of the EOF record and the devices that the JSON at the end lists.

    The JSON starts where the length before it says that it ends with the stream; a search for
    the first brace after a NUL goes wrong where the length itself holds a 0x7b.
    """
    tail = b""
    size = WINDOW
    while True:
        start = max(0, stream.size - size)
        tail = stream.read(start, stream.size - start - len(tail)) + tail
        end = start + len(tail.rstrip(b"\0"))
        if not tail.endswith(b"}", 0, end - start):
            return end, None
        for match in DESCRIPTION.finditer(tail):
            text = start + match.start() + 6
            if text + int.from_bytes(match[1], "big") == end:
                return text - 6, _devices(stream, text, tail[text - start : end - start])
        if start == 0 or size >= DESCRIPTION_LIMIT:
            return end, None
        size *= 2


def _devices(stream: Source, offset: int, text: bytes) -> list[dict[str, Any]]:
    try:
        description = json.loads(text)
        devices = description["devices"]
        if not isinstance(devices, list) or not all(isinstance(d["name"], str) for d in devices):
            raise TypeError("no list, or a device without a name")
    except (ValueError, KeyError, TypeError, RecursionError) as problem:
        raise FormatError(
            stream.path, offset, f"found a description that is none: {type(problem).__name__}"
        ) from None
    return devices


def measure(stream: Source, entry: Mapping[str, Any], text: int) -> int:
    """Return the bytes that a device or subsection takes, by the description at `text`."""
    try:
        return _size(entry, 0)
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise FormatError(
            stream.path, text, f"found a description that makes no sense: {problem}"
        ) from None


def _size(entry: Mapping[str, Any], depth: int) -> int:
    total = 0
    for kind in ("fields", "subsections"):
        if not isinstance(entry.get(kind, []), list):
            raise ValueError(f"{kind} that are no list")
    for field in entry.get("fields", ()):
        total += _count(field["size"]) * _count(field.get("array_len", 1))
    for part in entry.get("subsections", ()):
        if depth > DEPTH_LIMIT or not isinstance(part["vmsd_name"], str):
            raise ValueError(f"a subsection {depth} deep, or without a name")
        total += 6 + len(part["vmsd_name"]) + _size(part, depth + 1)
    return total


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise ValueError(f"a size of {str(value)[:40]}")
    return value


def _walk(stream: Source, devices: Sequence[dict[str, Any]], end: int) -> list[CpuSection]:
    """Go over the devices from last to first; `end` is where the last one ends.

    Stops at the first that is not where its description puts it: devices with early_setup are
    listed, but lie before RAM.
    """
    cpus = []
    text = end + 6
    for device in reversed(devices):
        size = measure(stream, device, text)
        name = device["name"].encode(errors="replace")
        found = _section(stream, name, size, end)
        if found is None:
            break
        if name == b"cpu":
            cpus.append(described_cpu(stream, device, text, found, size))
        end = found[2] - 14 - len(name)
    return cpus


def _section(stream: Source, name: bytes, size: int, end: int) -> tuple[int, int, int] | None:
    """Return instance, version and payload offset of the section that ends at `end`, or None."""
    length = 14 + len(name)
    for footer in (5, 0):  # none on machine types up to 2.3
        start = end - footer - size - length
        if start < 0:
            continue
        head = stream.read(start, length)
        if head[:1] + head[5:-8] != bytes([FULL, len(name) & 0xFF]) + name:
            continue
        if not footer or stream.read(end - 5, 5) == bytes([FOOTER]) + head[1:5]:
            instance, version = struct.unpack(">II", head[-8:])
            return instance, version, start + length
    return None


def described_cpu(
    stream: Source,
    device: Mapping[str, Any],
    text: int,
    found: tuple[int, int, int],
    size: int,
) -> CpuSection:
    """Return the cpu section at (instance, version, offset of the payload), as described.

    Raises
    ------
    FormatError
        If it is of another version, or not as described.
    """
    instance, version, offset = found
    fixed = measure(stream, {"fields": device.get("fields", [])}, text)
    if version != CPU_VERSION or fixed not in FIXED_SIZES:
        raise FormatError(
            stream.path,
            offset,
            f"found a cpu section of version {version} with {fixed} bytes, needed version "
            f"{CPU_VERSION} with {FIXED_SIZES[0]} (x86_64) or {FIXED_SIZES[1]} (i386)",
        )
    subsections = {}
    at = offset + fixed
    for part in device.get("subsections", ()):
        name = part["vmsd_name"].encode(errors="replace")
        length = measure(stream, part, text)
        head = bytes([SUBSECTION, len(name) & 0xFF]) + name
        if stream.read(at, len(head)) != head:
            raise FormatError(stream.path, at, f"found no {part['vmsd_name'][:40]}, as described")
        at += len(head) + 4
        subsections[part["vmsd_name"]] = (at, length)
        at += length
    return CpuSection(instance, offset, fixed, size, subsections)


def _search(stream: Source) -> tuple[list[CpuSection], bool, str]:
    """Find the `cpu` sections of a stream without description, window by window from the end.

    QEMU saves vCPU 0 first, so that the search ends where it is found; what looks like a vCPU
    before it is guest memory. Returns the sections, whether there is a kvmclock, and what became
    of the description.
    """
    found: dict[int, CpuSection] = {}
    refused: list[int] = []
    window = b""
    start = stream.size
    while start and 0 not in found and stream.size - start < SEARCH_LIMIT:
        size = min(WINDOW, start)
        start -= size
        window = stream.read(start, size) + window
        for match in reversed(list(HEADER.finditer(window, 0, size + 16))):
            section = _bare_cpu(window, match, start)
            if section:
                found.setdefault(section.instance, section)
            else:
                refused.append(start + match.end())
    first = found[0].offset if 0 in found else stream.size
    for offset in refused:
        if offset > first:
            raise FormatError(
                stream.path,
                offset,
                "found a cpu section with parts that are not known here, needed the description "
                "that QEMU writes at the end of a stream",
            )
    cpus = sorted(section for section in found.values() if section.offset >= first)
    if not cpus:
        return [], False, "none"
    end = _end(window, cpus, start)
    if end is None:
        raise FormatError(
            stream.path,
            stream.size,
            f"found {len(cpus)} vCPUs and no EOF record behind the devices, needed a whole stream",
        )
    description = "damaged" if window[end + 1 : end + 2] == b"\x06" else "none"
    return cpus, window.find(b"\x08kvmclock", first - start) >= 0, description


def _end(window: bytes, cpus: Sequence[CpuSection], start: int) -> int | None:
    """Return where in `window` the EOF record lies, or None for a stream that is cut off.

    Without description a section's length is not known, but its footer names it: from the first
    vCPU's on, each has to lead to the next. Where there are no footers (machine types up to 2.3)
    all that can be asked for is every vCPU up to the last, another device, and EOF's zero.
    """
    first, last = cpus[0], cpus[-1]
    if window[first.offset + first.size - start] != FOOTER:
        others = OTHER_DEVICE.finditer(window, last.offset + last.size - start)
        whole = [cpu.instance for cpu in cpus] == list(range(len(cpus)))
        whole = whole and any(match[1][0] == len(match[2]) for match in others)
        return len(window) - 1 if whole and not window[-1] else None
    header = first.offset - start - CPU_HEADER
    for match in SECTION_END.finditer(window, header):
        if match[1] == window[header + 1 : header + 5]:
            header = match.start() + 5
            if not window[header]:
                return header
    return None


def _bare_cpu(window: bytes, match: re.Match[bytes], start: int) -> CpuSection | None:
    """Return the cpu section whose header is at `match`, if it ends as one does."""
    (instance,) = struct.unpack(">I", match[2])
    for fixed in FIXED_SIZES:
        at = match.end() + fixed
        subsections = {}
        for name, offset, size in _bare_subsections(window, at):
            subsections[name] = (start + offset, size)
            at = offset + size
        following = NEXT.match(window, at)
        if following and (
            following[0][0] == FULL or window[at : at + 5] == bytes([FOOTER]) + match[1]
        ):
            return CpuSection(instance, start + match.end(), fixed, at - match.end(), subsections)
    return None


def _bare_subsections(window: bytes, at: int) -> Iterator[tuple[str, int, int]]:
    while window[at : at + 1] == bytes([SUBSECTION]):
        length = window[at + 1] if at + 1 < len(window) else 0
        name = window[at + 2 : at + 2 + length].decode("latin-1")
        at += 6 + length
        for size in SUBSECTION_SIZES.get(name, ()):
            if NEXT.match(window, at + size):
                yield name, at, size
                at += size
                break
        else:
            return
