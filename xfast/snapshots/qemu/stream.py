"""The grammar of a QEMU migration stream, read from its end: where the `cpu` sections lie.

RAM comes first and the devices last, and the description at the very end says how long each
device is; so the vCPUs are found from the tail, at a cost that guest memory plays no part in.

*Source*: QEMU migration/savevm.c, migration/vmstate.c; docs/devel/migration/main.rst.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xfast.engine import files
from xfast.errors import FormatError
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import misnumbered
from xfast.snapshots.qemu import plans
from xfast.snapshots.qemu.plans import Sections
from xfast.snapshots.qemu.search import (
    CPU_VERSION,
    FIXED_SIZES,
    FOOTER,
    FULL,
    LOOK_BACK,
    SUBSECTION,
    WINDOW,
    CpuSection,
    Found,
    Window,
    ends_at,
    search,
)

MAGIC = b"QEVM\0\0\0\3"
CONFIGURATION = 7
FAR = MAGIC + bytes([CONFIGURATION])
"""What a stream that does not begin at the file's start begins with."""
DESCRIPTION_LIMIT = 16 << 20
"""No description is longer (bytes): it takes about 8 KB a vCPU."""
DESCRIBED_LEAST, DESCRIBED_RATIO = 4 << 20, 4
"""Nor than so many bytes, or so many times what the file takes on the disk: guest memory, which
packs worse, lies beside it."""
VCPU_LIMIT = 4096
"""KVM_MAX_VCPUS. More of them in a description cost what no machine needs."""
CONFIGURATION_PARTS = 8
"""The configuration record has three subsections; one that is not known ends it too."""
HEAD_LIMIT = 1 << 20
"""How far from the file's start a stream may begin (bytes)."""
DEPTH_LIMIT = 16

DESCRIPTION = re.compile(rb'(?=\0\x06(\0.{3})\{")', re.DOTALL)
"""EOF, the description's type, its length (below 2^24), its first two characters."""


CONFIGURATIONS_LIMIT = 4
"""Records that are kept: all streams of one machine type and QEMU have the same."""


class Configuration(NamedTuple):
    """What the stream's first record says."""

    machine: str = ""
    capabilities: tuple[str, ...] = ()


def start_of(source: Source) -> int | None:
    """Return where a stream begins, or None; `migrate file:` can leave room before it."""
    if source.size >= len(MAGIC) and source.read(0, len(MAGIC)) == MAGIC:
        return 0
    head = source.read(0, min(HEAD_LIMIT, source.size))
    return head.find(FAR) if files.holds(head, FAR, 0, len(head)) else None


def configuration(stream: Source, start: int) -> Configuration:
    """Read the configuration record of the stream at `start`; machine types up to 2.3 have none.

    Raises
    ------
    FormatError
        If no stream begins there, or it ends within the record.

    *Source*: QEMU migration/savevm.c vmstate_configuration.
    """
    for record, known in _configurations:
        if start + len(record) <= stream.size and stream.read(start, len(record)) == record:
            return known
    if stream.read(start, len(MAGIC)) != MAGIC:
        raise FormatError(
            stream.path, start, "expected a QEMU stream (QEVM and version 3), got none"
        )
    at = start + len(MAGIC)
    if stream.read(at, 1)[0] != CONFIGURATION:
        return Configuration()
    (length,) = stream.unpack(">I", at + 1)
    if length > 1024:
        raise FormatError(
            stream.path, at + 1, f"expected a machine name of at most 1024 bytes, got {length}"
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
                raise FormatError(
                    stream.path, at - 4, f"expected at most 256 capabilities, got {count}"
                )
            for _ in range(count):
                word = stream.read(at + 1, stream.read(at, 1)[0])
                capabilities.append(word.decode("ascii", "replace"))
                at += 1 + len(word)
        else:
            break
    found = Configuration(machine, tuple(capabilities))
    if at < stream.size:
        _configurations.insert(0, (stream.read(start, at + 1 - start), found))
        del _configurations[CONFIGURATIONS_LIMIT:]
    return found


_configurations: list[tuple[bytes, Configuration]] = []
"""Records with the byte behind them, which says that there is no more: what was looked at."""


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
    known = plans.follow(stream)
    if known is not None:
        return known.sections()
    end, devices = _description(stream)
    walked: list[plans.Section] = []
    if devices is None:
        found = search(stream)
        described = 0
    else:
        described = sum(device["name"] == "cpu" for device in devices)
        cpus, doubts, more = _walk(stream, devices, end, walked)
        found = Found(cpus) if len(cpus) >= described else search(stream)
        kvmclock = any(device["name"] == "kvmclock" for device in devices)
        found = found._replace(
            kvmclock=kvmclock, description="whole", doubts=(*found.doubts, *doubts)
        )
    if not found.cpus or len(found.cpus) < described:
        hint = "" if devices else " (cut off? it does not end with its description)"
        least = f"{described} vCPUs" if described else "at least one vCPU"
        raise FormatError(
            stream.path,
            stream.size,
            f"expected {least} in the QEMU stream, got {len(found.cpus)}{hint}",
        )
    result = checked(found, devices)
    if devices is not None and found.cpus == cpus:
        plans.remember(stream, walked, end, more, result)
    return result


def checked(found: Found, devices: Sequence[Mapping[str, Any]] | None) -> Sections:
    """Return what was found, and what makes one doubt that it is all.

    QEMU writes a section ``cpu_common`` for every vCPU, of the same instance, and an ``apic``
    (whose instance is the APIC's id) for every one that has one.

    Parameters
    ----------
    found : Found
    devices : sequence of mapping, optional
        What the description lists.

    *Source*: QEMU hw/core/cpu-system.c cpu_vmstate_register(); hw/intc/apic_common.c.
    """
    count = len(found.cpus)
    commons, apics = set(found.commons), found.apics
    doubts = list(misnumbered(cpu.instance for cpu in found.cpus))
    if devices is not None:
        names = [device["name"] for device in devices]
        described = names.count("cpu")
        if described != count:
            doubts.append(f"expected {described} vCPUs, as the description lists, got {count}")
        commons.update(_instances(devices, "cpu_common"))
        apics = max(apics, names.count("apic"))
    alone = sorted(commons - {cpu.instance for cpu in found.cpus})
    if alone:
        doubts.append(
            f"expected the cpu section of vCPU {alone[0]}, got only its section cpu_common"
        )
    if apics > count:
        doubts.append(f"expected {apics} vCPUs, as many as have an apic, got {count}")
    return Sections(sorted(found.cpus), found.kvmclock, found.description, (*doubts, *found.doubts))


def _instances(devices: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    """Return the instances of a device, as far as the description tells them."""
    found = [device.get("instance_id") for device in devices if device["name"] == name]
    return [instance for instance in found if isinstance(instance, int)]


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
                stream.require_stored(end - text, DESCRIBED_LEAST, DESCRIBED_RATIO, text)
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


def _walk(
    stream: Source, devices: Sequence[dict[str, Any]], end: int, walked: list[plans.Section]
) -> tuple[list[CpuSection], list[str], tuple[bytes, int]]:
    """Go over the devices from last to first; `end` is where the last one ends.

    Stops at the first that is not where its description puts it: devices with early_setup are
    listed, but lie before RAM. Returns the `cpu` sections, what makes one doubt that they are
    all, and which device it stopped at (see `plans.remember`); adds the sections to `walked`.
    """
    cpus: list[CpuSection] = []
    doubts = []
    text = end + 6
    more = b"", 0
    for device in reversed(devices):
        size = measure(stream, device, text)
        name = device["name"].encode(errors="replace")
        found = _section(stream, name, size, end)
        if found is None:
            more = bytes([len(name) & 0xFF]) + name, 19 + len(name) + size
            break
        instance, version, offset = found
        if device.get("instance_id", instance) != instance:
            doubts.append(
                f"expected instance {str(device['instance_id'])[:20]} of {device['name'][:40]}, "
                f"as the description lists, got {instance}"
            )
        head = bytes([len(name) & 0xFF]) + name + struct.pack(">I", instance)
        if name == b"cpu":
            if len(cpus) == VCPU_LIMIT:
                words = f"expected at most {VCPU_LIMIT} vCPUs, got more"
                raise FormatError(stream.path, offset, words)
            cpus.append(described_cpu(stream, device, text, found, size))
            head += struct.pack(">I", version)
        start = offset - 14 - len(name)
        walked.append(plans.Section(start, name, head, end, end != offset + size))
        end = start
    if cpus and _is_cpu_before(stream, end):
        doubts.append("got a cpu section that the description does not list")
    return cpus, doubts, more


def _is_cpu_before(stream: Source, end: int) -> bool:
    """Tell whether a `cpu` section ends where the sections begin that the description lists."""
    start = max(0, end - LOOK_BACK)
    data = stream.read(start, min(end + 8, stream.size) - start)
    return ends_at(Window(stream.path, data, start), end)


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
            f"expected a cpu section of version {CPU_VERSION} with {FIXED_SIZES[0]} (x86_64) or "
            f"{FIXED_SIZES[1]} (i386) bytes, got version {version} with {fixed} bytes",
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
        subsections[part["vmsd_name"]] = (at - offset, length)
        at += length
    return CpuSection(instance, offset, fixed, size, subsections)
