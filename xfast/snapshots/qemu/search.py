"""The `cpu` sections of a stream that has no description, or none that helps: found by their looks.

A header tells a section's name and its footer repeats the header's id; how long it is, no one says.
So a `cpu` section is one whose known subsections lead from its header to its own footer. QEMU saves
vCPU 0 first: the search goes back from the end until it is found, and what looks like a vCPU before
it is guest memory.

The work is linear in what is searched: where a chain of subsections ends is noted once for every
place in it, however many headers lead into it.

*Source*: QEMU migration/savevm.c, target/i386/machine.c.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from xfast.errors import FormatError
from xfast.snapshots.bytes.source import Source

FULL, FOOTER, SUBSECTION = 4, 0x7E, 5
CPU_VERSION = 12
CPU_HEADER = 17
"""Bytes of a `cpu` section's header: type, section id, name, instance, version."""
FIXED_SIZES = (1817, 1313)
"""Bytes of a `cpu` section before its subsections: x86_64, i386."""
SEARCH_LIMIT = 16 << 20
"""How far from its end a stream without description is searched for vCPUs (bytes)."""
WINDOW = 1 << 17

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
COMMON = re.compile(rb"\x04.{4}\x0acpu_common(.{4})\0\0\0.", re.DOTALL)
APIC = re.compile(rb"\x04.{4}\x04apic.{4}\0\0\0.", re.DOTALL)
"""The headers of two sections that QEMU writes beside each `cpu`; the first has its instance."""
LOOK_BACK = 1 << 14
"""A `cpu` section with every subsection is shorter (bytes)."""
COMMON_SIZE = 64
"""`cpu_common` 0 lies at most so far before the header of `cpu` 0 (bytes)."""


class CpuSection(NamedTuple):
    """Where one vCPU's section lies; its content begins at `offset` of the stream.

    It has `fixed` bytes of registers, then subsections: {name: (where the data begin in the
    content, bytes)}.
    """

    instance: int
    offset: int
    fixed: int
    size: int
    subsections: dict[str, tuple[int, int]]


class Found(NamedTuple):
    """The vCPUs of a stream, and what else in it tells of them.

    `commons` are the instances of ``cpu_common``, `apics` is the number of APICs.
    """

    cpus: list[CpuSection]
    commons: Sequence[int] = ()
    apics: int = 0
    kvmclock: bool = False
    description: str = "none"
    doubts: tuple[str, ...] = ()


class Window:
    """Bytes of a stream, from `start` on, and what is known of the chains in them."""

    def __init__(self, data: bytes, start: int) -> None:
        self.data = data
        self.start = start
        self._ends: dict[int, int] = {}

    def subsections(self, at: int) -> Iterator[tuple[str, int, int]]:
        """Yield name, place and bytes of the data of every known subsection from `at` on."""
        data = self.data
        while data[at : at + 1] == bytes([SUBSECTION]):
            length = data[at + 1] if at + 1 < len(data) else 0
            name = data[at + 2 : at + 2 + length].decode("latin-1")
            at += 6 + length
            for size in SUBSECTION_SIZES.get(name, ()):
                if NEXT.match(data, at + size):
                    yield name, at, size
                    at += size
                    break
            else:
                return

    def chain_end(self, at: int) -> int:
        """Return where the chain of subsections at `at` ends: behind the last that is known."""
        passed = [at]
        for _, offset, size in self.subsections(at):
            at = offset + size
            if at in self._ends:
                at = self._ends[at]
                break
            passed.append(at)
        self._ends.update(dict.fromkeys(passed, at))
        return at

    def extent(self, match: re.Match[bytes]) -> tuple[int, int, bool] | None:
        """Tell how the section whose header is at `match` ends, as `cpu` sections do.

        Returns
        -------
        tuple of int, int, bool, or None
            Its fixed bytes, where its content ends, and whether a footer follows.
        """
        for fixed in FIXED_SIZES:
            end = self.chain_end(match.end() + fixed)
            following = NEXT.match(self.data, end)
            footer = self.data[end : end + 5] == bytes([FOOTER]) + match[1]
            if following and (footer or following[0][0] == FULL):
                return fixed, end, footer
        return None

    def headers(self) -> Iterator[re.Match[bytes]]:
        """Yield the headers of `cpu` sections, the last first."""
        for start in reversed([match.start() for match in HEADER.finditer(self.data)]):
            match = HEADER.match(self.data, start)
            assert match
            yield match

    def cpu(self, match: re.Match[bytes], fixed: int, end: int) -> CpuSection:
        """Return the section whose header is at `match`."""
        begin = match.end()
        parts = {
            name: (offset - begin, size) for name, offset, size in self.subsections(begin + fixed)
        }
        (instance,) = struct.unpack(">I", match[2])
        return CpuSection(instance, self.start + begin, fixed, end - begin, parts)


def search(stream: Source) -> Found:
    """Find the `cpu` sections of a stream without description.

    Raises
    ------
    FormatError
        If one has parts that are not known here, or two of them overlap, or no EOF record
        follows.
    """
    size = WINDOW
    while True:
        start = max(0, stream.size - size)
        window = Window(stream.read(start, stream.size - start), start)
        cpus, refused = _candidates(window)
        first = next((cpu.offset for cpu in cpus if cpu.instance == 0), stream.size)
        if first < stream.size or not start or size == SEARCH_LIMIT:
            break
        size = min(4 * size, SEARCH_LIMIT)
    for offset, why in refused:
        if offset > first:
            raise FormatError(
                stream.path,
                offset,
                "expected the description that QEMU writes at the end of a stream, "
                f"got a cpu section {why}",
            )
    earlier = max(
        (cpu for cpu in cpus if cpu.offset < first), key=lambda cpu: cpu.offset, default=None
    )
    doubts: tuple[str, ...] = ()
    if earlier and first < stream.size and _leads_to(window, earlier, first):
        doubts = (f"got a cpu section of vCPU {earlier.instance} before that of vCPU 0",)
    cpus = sorted(cpu for cpu in cpus if cpu.offset >= first or first == stream.size)
    if not cpus:
        return Found([])
    end = _end(window.data, cpus, start)
    if end is None:
        raise FormatError(
            stream.path,
            stream.size,
            f"expected a whole stream, got {len(cpus)} vCPUs and no EOF record behind the devices",
        )
    begin = max(0, min(cpu.offset for cpu in cpus) - CPU_HEADER - COMMON_SIZE - start)
    return Found(
        cpus,
        [int.from_bytes(match[1], "big") for match in COMMON.finditer(window.data, begin)],
        sum(1 for _ in APIC.finditer(window.data, begin)),
        window.data.find(b"\x08kvmclock", begin) >= 0,
        "damaged" if window.data[end + 1 : end + 2] == b"\x06" else "none",
        doubts,
    )


def _leads_to(window: Window, cpu: CpuSection, first: int) -> bool:
    """Tell whether the sections from `cpu` on lead to that of vCPU 0, and not through memory.

    Where sections have no footers nothing leads anywhere: what lies close by is doubted.
    """
    data = window.data
    target = first - window.start - CPU_HEADER
    header = cpu.offset - window.start - CPU_HEADER
    if data[cpu.offset + cpu.size - window.start] != FOOTER:
        return target - header < LOOK_BACK
    for match in SECTION_END.finditer(data, header, target + 32):
        if match[1] == data[header + 1 : header + 5]:
            header = match.start() + 5
            if header >= target:
                break
    return header == target


def _candidates(window: Window) -> tuple[list[CpuSection], list[tuple[int, str]]]:
    """Return what looks like `cpu` sections, the last first, and what is none, and why.

    A guest can write a header into its registers, and with luck its bytes lead to another
    section: two that overlap can't both be, and nothing tells which is.
    """
    found: list[tuple[CpuSection, bool]] = []
    refused = []
    after = len(window.data)
    for match in window.headers():
        extent = window.extent(match)
        if extent is None:
            refused.append((window.start + match.end(), "with parts that are not known here"))
            continue
        fixed, end, footer = extent
        if end > after:
            refused.append((found[-1][0].offset + 1, "that overlaps another"))
            continue
        found.append((window.cpu(match, fixed, end), footer))
        after = match.start()
    footers = any(footer for _, footer in found)  # where sections have them, all do
    return [cpu for cpu, footer in found if footer or not footers], refused


def ends_at(window: Window, end: int) -> bool:
    """Tell whether a `cpu` section, footer included, ends at `end` of the stream."""
    for match in window.headers():
        extent = window.extent(match)
        if extent and window.start + extent[1] + 5 * extent[2] == end:
            return True
    return False


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
