"""The machine that wrote a snapshot, as far as the snapshot tells of it.

A CRIU checkpoint has the machine's CPUID words, a core of Linux 6.12 and later its layout; the
state of a virtual machine has what its guest was told, which the machine has at least.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from xfast.errors import FormatError, XfastError
from xfast.hosts.derive import NEWEST, from_cpuid, likely_layout
from xfast.hosts.model import Host
from xfast.kernels.behaviour import kvm_supported_xcr0
from xfast.snapshots.criu.cpuinfo import cpuid_of, cpus_of
from xfast.snapshots.criu.wire import Broken
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.xsave.cpuid import Cpuid

CPUINFO_MAGIC = struct.pack("<II", 0x54564319, 0x61404013)
"""IMG_COMMON_MAGIC and CPUINFO_MAGIC. *Source*: CRIU criu/include/magic.h."""

CPUINFO_LIMIT = 64 << 10
"""Bytes of a cpuinfo.img's message, at most: CRIU writes 150 for a CPU, and one CPU."""

GUEST_NOTE = "these are a guest's facts: the machine that wrote the snapshot has at least them"
CORE_NOTE = "a core tells the layout and XCR0 of its machine, and no features"


def is_folder(path: str) -> bool:
    """Return whether a directory is one snapshot: CRIU's images, or Cloud Hypervisor's state."""
    try:
        names = os.listdir(path)
    except OSError:
        return False
    return "state.json" in names or any(n.startswith("core-") and n.endswith(".img") for n in names)


def is_cpuinfo(data: bytes) -> bool:
    """Return whether `data` is CRIU's cpuinfo.img, with or without the common magic."""
    return data[:8] == CPUINFO_MAGIC or data[:4] == CPUINFO_MAGIC[4:]


def read_cpuinfo(data: bytes, name: str, path: str) -> Host:
    """Return the machine of CRIU's cpuinfo.img.

    Raises
    ------
    FormatError
        If it is damaged, or names no CPU.
    """
    start = 8 if data[:4] == CPUINFO_MAGIC[:4] else 4
    length = int.from_bytes(data[start : start + 4], "little")
    message = data[start + 4 : start + 4 + length]
    if len(message) < length or length > CPUINFO_LIMIT:
        have = max(len(data) - start - 4, 0)
        raise FormatError(
            path, start, f"expected {length} bytes of CPUs, at most {CPUINFO_LIMIT}, got {have}"
        )
    try:
        cpus = cpus_of(message)
    except Broken as problem:
        raise FormatError(path, start, str(problem)) from None
    if not cpus:
        raise FormatError(path, start, "expected a CPU, got none")
    return _of_words(cpuid_of(cpus[0], 0), name, path)


def read(path: str) -> list[Host]:
    """Return the machine that wrote the snapshot at `path`; of several snapshots, each one's.

    Raises
    ------
    XfastError
        If it is no snapshot, or does not tell of the machine.
    OSError
        If it can't be read.
    """
    from xfast.snapshots.registry import read as read_snapshots

    return [_machine(snapshot) for snapshot in read_snapshots(path)]


def _machine(snapshot: Snapshot) -> Host:
    """Return the machine that wrote a snapshot."""
    path = snapshot.name
    name = Path(path).stem
    for vcpu in snapshot.vcpus:
        if vcpu.cpuinfo is not None and vcpu.cpuid is not None:
            return _of_words(vcpu.cpuid, name, path)
        if vcpu.layout_source == "note" and vcpu.layout is not None:
            return _of_core(vcpu, name, path)
        if snapshot.kind == "vm" and vcpu.cpuid is not None:
            return _of_guest(vcpu.cpuid, name, path)
    raise XfastError(
        f"host: {path} is a snapshot that does not tell which machine wrote it: it has no CPUID "
        "and no layout"
    )


def _of_words(cpuid: Cpuid, name: str, path: str) -> Host:
    """Return the machine of a CRIU dump: its features and mask, and a layout by vendor and size."""
    host = from_cpuid(cpuid, name, path)
    row = cpuid.find(0xD)
    size = row.ebx if row and row.ebx else None
    layout = likely_layout(host.xcr0 or 0, host.vendor, None, size)
    how = {} if layout is None else {"layout": "assumed"}
    provenance = {**host.provenance, **how}
    if layout is None:
        provenance.pop("layout", None)
    return host.replace(layout=layout, provenance=provenance)


def _of_core(vcpu: Vcpu, name: str, path: str) -> Host:
    """Return the machine of a core with NT_X86_XSAVE_LAYOUT: its layout, and the kernel's XCR0."""
    assert vcpu.layout is not None
    xcr0 = vcpu.xcr0
    facts = {"layout": vcpu.layout, "xcr0": xcr0}
    provenance = {fact: "dump" for fact, value in facts.items() if value is not None}
    kvm_xcr0 = None if xcr0 is None else kvm_supported_xcr0(NEWEST, xcr0)
    if kvm_xcr0 is not None:
        provenance["kvm_xcr0"] = "assumed"
    return Host(
        name, vcpu.layout, xcr0, kvm_xcr0=kvm_xcr0, source=path, provenance=provenance,
        notes=(CORE_NOTE,),
    )  # fmt: skip


def _of_guest(cpuid: Cpuid, name: str, path: str) -> Host:
    """Return the least that the machine has which gave a guest this CPUID."""
    host = from_cpuid(cpuid, name, path, by_kvm=True)
    least = {"features", "xsave", "xcr0", "xss", "kvm_xcr0"}
    provenance = {f: "assumed" if f in least else how for f, how in host.provenance.items()}
    return host.replace(provenance=provenance, notes=(GUEST_NOTE,))
