"""CPUID dumps: `cpuid -r`, InstLatx64's, and struct kvm_cpuid2.

A dump of several CPUs that differ (hybrid parts) gives one host with what all of them have.

*Source*: the output of `cpuid -r`; InstLatx64's dumps; Linux Documentation/virt/kvm/api.rst
(struct kvm_cpuid2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from xfast.errors import FormatError
from xfast.hosts.baseline import common
from xfast.hosts.derive import from_cpuid
from xfast.hosts.model import Host
from xfast.xsave.cpuid import ENTRY, Cpuid, Entry

CPUID2_LIMIT = 4096
"""Entries in a struct kvm_cpuid2, at most; KVM itself takes 256."""

KIND_LIMIT = 64
"""Kinds of CPU in a dump, at most: hybrid parts have two or three."""

CPU_LIMIT = 8192
"""Logical CPUs in a dump, at most: as many as Linux can be built for."""

Row = tuple[int, int, int, int, int, int]
"""Leaf, sub-leaf, eax, ebx, ecx, edx."""

CPUID_R = re.compile(
    r"^[ \t]*0x([0-9a-f]{8}) 0x([0-9a-f]{1,8}): "
    r"eax=0x([0-9a-f]{8}) ebx=0x([0-9a-f]{8}) ecx=0x([0-9a-f]{8}) edx=0x([0-9a-f]{8})",
    re.MULTILINE,
)
INSTLAT = re.compile(
    r"^CPUID ([0-9A-F]{8}): ([0-9A-F]{8})-([0-9A-F]{8})-([0-9A-F]{8})-([0-9A-F]{8})"
    r"(?: \[SL ([0-9A-F]{1,8})\])?",
    re.MULTILINE,
)


def cpuid_r_rows(text: str) -> Iterator[Row]:
    """Yield the rows of `cpuid -r`."""
    for match in CPUID_R.finditer(text):
        leaf, subleaf, eax, ebx, ecx, edx = (int(group, 16) for group in match.groups())
        yield leaf, subleaf, eax, ebx, ecx, edx


def instlat_rows(text: str) -> Iterator[Row]:
    """Yield the rows of an InstLatx64 dump."""
    for match in INSTLAT.finditer(text):
        leaf, eax, ebx, ecx, edx, subleaf = (int(group or "0", 16) for group in match.groups())
        yield leaf, subleaf, eax, ebx, ecx, edx


def by_cpu(rows: Iterable[Row]) -> list[Cpuid]:
    """Return one Cpuid a logical CPU: a new one starts wherever leaf 0 comes again."""
    cpus: list[dict[tuple[int, int], tuple[int, ...]]] = []
    for leaf, subleaf, *registers in rows:
        if not cpus or (leaf, subleaf) == (0, 0):
            cpus.append({})
        cpus[-1].setdefault((leaf, subleaf), tuple(registers))
    return [Cpuid.from_rows(rows) for rows in cpus]


def of_cpus(cpus: list[Cpuid], name: str, path: str) -> Host:
    """Return the host of a dump: its first CPU, or what all kinds of its CPUs have in common."""
    if len(cpus) > CPU_LIMIT:
        raise FormatError(path, None, f"expected at most {CPU_LIMIT} CPUs, got {len(cpus)}")
    seen: dict[frozenset[tuple[int, ...]], Cpuid] = {}
    for cpuid in cpus:
        seen.setdefault(frozenset(map(_telling, cpuid.entries)), cpuid)
    if len(seen) > KIND_LIMIT:
        raise FormatError(path, None, f"expected at most {KIND_LIMIT} kinds of CPU, got more")
    kinds: dict[tuple[Any, ...], Host] = {}
    for cpuid in seen.values():
        host = from_cpuid(cpuid, name, path)
        kinds.setdefault((host.features, host.layout, host.xcr0, host.xss), host)
    hosts = list(kinds.values())
    if len(hosts) == 1:
        return hosts[0]
    return common(hosts, name).replace(source=f"{path} (common to {len(hosts)} kinds of CPU)")


def _telling(entry: Entry) -> tuple[int, ...]:
    """Return what of a row tells kinds of CPU apart: not APIC ids, and not what an OS switches."""
    if entry.function not in (1, 7, 0xD, 0x1E, 0x80000001, 0x80000008):
        return (0,)
    if entry.function in (1, 0xD):
        return entry.function, entry.subleaf, entry.eax, entry.ecx, entry.edx
    return entry


def read_cpuid_r(text: str, name: str, path: str) -> Host:
    """Return the host of the output of `cpuid -r`."""
    return of_cpus(by_cpu(cpuid_r_rows(text)), name, path)


def read_instlat(text: str, name: str, path: str) -> Host:
    """Return the host of an InstLatx64 dump."""
    return of_cpus(by_cpu(instlat_rows(text)), name, path)


def is_cpuid2(data: bytes) -> bool:
    """Return whether `data` has the length that its head, as a struct kvm_cpuid2, tells."""
    if len(data) < 8:
        return False
    nent = int.from_bytes(data[:4], "little")
    return 0 < nent <= CPUID2_LIMIT and len(data) == 8 + ENTRY.size * nent


def read_cpuid2(data: bytes) -> Cpuid:
    """Read a struct kvm_cpuid2, for which `is_cpuid2` holds."""
    return Cpuid(tuple(map(Entry._make, ENTRY.iter_unpack(data[8:]))))
