"""Readers of the files that tell a CPU: CPUID dumps of five kinds, and the kernel's boot log.

Each returns hosts, or raises FormatError. A dump of several CPUs that differ (hybrid parts)
gives one host with what all of them have.

*Source*: the output of `cpuid -r`; InstLatx64's dumps; libvirt tests/cputestdata; Linux
Documentation/virt/kvm/api.rst (struct kvm_cpuid2), arch/x86/kernel/fpu/xstate.c (boot log);
Firecracker docs/cpu_templates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.parsers import expat

from xfast.errors import FormatError, LayoutError
from xfast.hosts.baseline import common
from xfast.hosts.derive import NEWEST, from_cpuid, kernel_of
from xfast.hosts.description import hosts_of, read_json, read_toml
from xfast.hosts.firecracker import REGISTERS, read_fingerprint
from xfast.hosts.model import Host
from xfast.kernels.behaviour import kvm_supported_xcr0
from xfast.xsave.cpuid import ENTRY, Cpuid, Entry
from xfast.xsave.features import SUPERVISOR_MASK
from xfast.xsave.layout import Layout, Slot

KINDS = (
    "a host description (JSON, TOML), a CPUID dump (cpuid -r, InstLatx64, libvirt's <cpudata>, "
    "struct kvm_cpuid2), a Firecracker fingerprint, or a boot log with x86/fpu lines"
)

CPUID2_LIMIT = 4096
"""Entries in a struct kvm_cpuid2, at most; KVM itself takes 256."""

CPU_LIMIT = 8192
"""Logical CPUs in a dump, at most: as many as Linux can be built for."""

Row = tuple[int, int, int, int, int, int]
"""Leaf, sub-leaf, eax, ebx, ecx, edx."""

_CPUID_R = re.compile(
    r"^[ \t]*0x([0-9a-f]{8}) 0x([0-9a-f]{1,8}): "
    r"eax=0x([0-9a-f]{8}) ebx=0x([0-9a-f]{8}) ecx=0x([0-9a-f]{8}) edx=0x([0-9a-f]{8})",
    re.MULTILINE,
)
_INSTLAT = re.compile(
    r"^CPUID ([0-9A-F]{8}): ([0-9A-F]{8})-([0-9A-F]{8})-([0-9A-F]{8})-([0-9A-F]{8})"
    r"(?: \[SL ([0-9A-F]{1,8})\])?",
    re.MULTILINE,
)


def cpuid_r_rows(text: str) -> Iterator[Row]:
    """Yield the rows of `cpuid -r`."""
    for match in _CPUID_R.finditer(text):
        leaf, subleaf, eax, ebx, ecx, edx = (int(group, 16) for group in match.groups())
        yield leaf, subleaf, eax, ebx, ecx, edx


def instlat_rows(text: str) -> Iterator[Row]:
    """Yield the rows of an InstLatx64 dump."""
    for match in _INSTLAT.finditer(text):
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
        raise FormatError(path, None, f"found {len(cpus)} CPUs, needed {CPU_LIMIT} at most")
    kinds: dict[tuple[Any, ...], Host] = {}
    for cpuid in cpus:
        host = from_cpuid(cpuid, name, path)
        kinds.setdefault((host.features, host.layout, host.xcr0, host.xss), host)
    hosts = list(kinds.values())
    if len(hosts) == 1:
        return hosts[0]
    return common(hosts, name).replace(source=f"{path} (common to {len(hosts)} kinds of CPU)")


def read_libvirt(text: str, name: str, path: str) -> Host:
    """Read libvirt's ``<cpudata>``; entities and document types are refused."""
    rows: dict[tuple[int, int], list[int]] = {}
    root: list[str] = []

    def element(tag: str, attributes: dict[str, str]) -> None:
        if not root:
            root.append(tag)
        if tag == "cpuid":
            keys = ("eax_in", "ecx_in", *REGISTERS)
            leaf, subleaf, *registers = (int(attributes.get(key, "0"), 16) for key in keys)
            if not all(0 <= value < 1 << 32 for value in (leaf, subleaf, *registers)):
                raise ValueError(f"got {attributes!r:.100}, needed numbers of 32 bits")
            rows[leaf, subleaf] = registers

    def doctype(*_: object) -> None:
        raise ValueError("got a DOCTYPE, needed plain <cpudata>")

    parser = expat.ParserCreate()
    parser.StartElementHandler = element
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(text, True)
    except (expat.ExpatError, ValueError) as error:
        raise FormatError(path, None, f"XML: {error}") from None
    if root[0] != "cpudata" or not rows:
        raise FormatError(path, None, f"found <{root[0]:.40}>, needed <cpudata> with <cpuid> rows")
    return from_cpuid(Cpuid.from_rows(rows), name, path)


def is_cpuid2(data: bytes) -> bool:
    """Return whether `data` has the length that its head, as a struct kvm_cpuid2, tells."""
    if len(data) < 8:
        return False
    nent = int.from_bytes(data[:4], "little")
    return 0 < nent <= CPUID2_LIMIT and len(data) == 8 + ENTRY.size * nent


def read_cpuid2(data: bytes) -> Cpuid:
    """Read a struct kvm_cpuid2, for which `is_cpuid2` holds."""
    return Cpuid(tuple(map(Entry._make, ENTRY.iter_unpack(data[8:]))))


_DMESG_FEATURES = re.compile(
    r"x86/fpu: Enabled xstate features 0x([0-9a-f]{1,16}), "
    r"context size is (?:0x)?[0-9a-f]+(?: bytes)?, using '(standard|compacted)' format"
)
_DMESG_SLOT = re.compile(
    r"x86/fpu: xstate_offset\[ ?(\d{1,2})\]: +(\d{1,5}), xstate_sizes\[ ?\d{1,2}\]: +(\d{1,5})"
)
_DMESG_RELEASE = re.compile(r"Linux version (\d\S{1,99})")


def read_dmesg(text: str, name: str, path: str) -> Host:
    """Read the ``x86/fpu:`` lines of a kernel's boot log.

    They give what the kernel enabled. Offsets are those of its own buffers: they tell the
    standard format only where that is what it uses.
    """
    match = _DMESG_FEATURES.search(text)
    if match is None:
        raise FormatError(path, None, "found no 'x86/fpu: Enabled xstate features', needed it")
    enabled = int(match[1], 16)
    facts: dict[str, Any] = {"xcr0": enabled & ~SUPERVISOR_MASK, "xss": enabled & SUPERVISOR_MASK}
    if match[2] == "standard":
        slots = {
            int(nr): Slot(int(nr), int(size), int(offset))
            for nr, offset, size in _DMESG_SLOT.findall(text)
        }
        try:
            facts["layout"] = Layout(tuple(slots[nr] for nr in sorted(slots)), "dmesg")
        except LayoutError as error:
            raise FormatError(path, None, str(error)) from None
    provenance = dict.fromkeys(facts, "dump")
    release = _DMESG_RELEASE.search(text)
    kernel = kernel_of(release[1], path) if release else None
    facts["kvm_xcr0"] = kvm_supported_xcr0(NEWEST, facts["xcr0"])
    provenance["kvm_xcr0"] = "derived"
    host = Host(name, source=path, provenance=provenance, **facts)
    return host.with_kernel(kernel).replace(xcr0=host.xcr0, xss=host.xss) if kernel else host


_TOML = re.compile(r"^[ \t]*schema[ \t]*=", re.MULTILINE)
_TEXTS: tuple[tuple[re.Pattern[str], Callable[[str, str, str], Host]], ...] = (
    (_CPUID_R, lambda text, name, path: of_cpus(by_cpu(cpuid_r_rows(text)), name, path)),
    (_INSTLAT, lambda text, name, path: of_cpus(by_cpu(instlat_rows(text)), name, path)),
    (re.compile(r"\A\s*<"), read_libvirt),
    (re.compile(r"x86/fpu: "), read_dmesg),
)
"""What tells each kind of text, and its reader; the first that is found."""


def parse(data: bytes, path: str) -> list[Host]:
    """Return the hosts that `data` describes; `xfast.hosts.parse` says what it may be."""
    name = Path(path).stem
    if is_cpuid2(data):
        return [from_cpuid(read_cpuid2(data), name, path, by_kvm=True)]
    if b"\0" in data:
        found = data.index(b"\0")
        raise FormatError(path, found, "found binary data, needed a struct kvm_cpuid2 or text")
    text = data.decode("utf-8-sig", "replace")
    if text.lstrip().startswith("{"):
        return _parse_json(text, name, path)
    if _TOML.search(text):
        return read_toml(text, path)
    for pattern, read in _TEXTS:
        if pattern.search(text):
            return [read(text, name, path)]
    raise FormatError(path, 0, f"found {text[:20]!r}, needed {KINDS}")


def _parse_json(text: str, name: str, path: str) -> list[Host]:
    document = read_json(text, path)
    if "guest_cpu_config" in document:
        return [read_fingerprint(document, name, path)]
    if "cpuid_modifiers" in document:
        raise FormatError(
            path, None, f"found a CPU template, needed a host: apply it to one, HOST+{path}"
        )
    return hosts_of(document, path)
