"""The kernel's boot log: what a kernel enabled, and as much of the CPU as it tells.

Twenty years of wordings are read: ``x86/fpu: Enabled xstate features`` since 4.2, ``xsave:
enabled xstate_bv`` before, ``x87 FPU will use FXSAVE`` where there is no XSAVE, and the table of
CPUID leaves that the kernel prints when they contradict each other. A log of several boots
describes the last one.

*Source*: Linux arch/x86/kernel/fpu/xstate.c setup_xstate_features(), print_xstate_features(),
__xstate_dump_leaves(), fpu__init_system_xstate(); arch/x86/kernel/xsave.c of 3.10;
arch/x86/kernel/fpu/init.c; arch/x86/kernel/cpu/common.c print_cpu_info().
"""

from __future__ import annotations

import re
from typing import Any

from xfast.errors import FormatError, LayoutError
from xfast.hosts.derive import NEWEST, from_cpuid, kernel_of, likely_layout
from xfast.hosts.model import Host
from xfast.kernels.behaviour import kvm_supported_xcr0
from xfast.xsave.cpuid import Cpuid
from xfast.xsave.features import SUPERVISOR_MASK, XFEATURE_MASK_FPSSE, name_of, names_of
from xfast.xsave.layout import Layout, Slot

_ENABLED = re.compile(
    r"x86/fpu: Enabled xstate features 0x([0-9a-f]{1,16}), context size is "
    r"(0x[0-9a-f]{1,6}|[0-9]{1,6})(?: bytes)?, using '(standard|compacted)' format"
    r"|enabled xstate_bv 0x([0-9a-f]{1,16}), cntxt size (0x[0-9a-f]{1,6})"
    r"(?: using (standard|compacted) form)?"
)
_SLOT = re.compile(
    r"xstate_offset\[ ?(\d{1,2})\]: {1,9}([0-9a-f]{1,5}), "
    r"xstate_sizes\[ ?\d{1,2}\]: {1,9}([0-9a-f]{1,5})"
)
_LEAF = re.compile(
    r"CPUID\[0d, ([0-9a-f]{2})\]: eax=([0-9a-f]{8}) ebx=([0-9a-f]{8}) "
    r"ecx=([0-9a-f]{8}) edx=([0-9a-f]{8})"
)
_NO_XSAVE = re.compile(
    r"x87 FPU will use F(?:X)?SAVE|Legacy x87 FPU detected|XSAVE[^\n]{0,80}disabled"
)
_RELEASE = re.compile(r"Linux version (\d\S{1,99})")
_CPU = re.compile(
    r"CPU0: ([^\n(]{0,40}(?:\([A-Za-z]{1,4}\)[^\n(]{0,60}){0,4})"
    r"\(fam(?:ily)?: (?:0x)?([0-9a-f]{1,3}), model: (?:0x)?([0-9a-f]{1,3})"
)
_FIRST = re.compile(r"Supporting XSAVE feature 0x0*1:")
_BOOT = re.compile(r"Linux version \d")

VENDORS = {"Intel": "GenuineIntel", "AMD": "AuthenticAMD", "Hygon": "HygonGenuine"}
"""{word of a CPU's name: CPUID's vendor text}."""


def is_boot_log(text: str) -> bool:
    """Return whether `text` has lines that tell of the FPU."""
    return any(p.search(text) for p in (_ENABLED, _LEAF, _NO_XSAVE)) or "x86/fpu: " in text


def boots_in(text: str) -> list[str]:
    """Split a log at the boots in it: at each ``Linux version``, else where features start anew."""
    starts = [text.rfind("\n", 0, match.start()) + 1 for match in _BOOT.finditer(text)]
    if not starts:
        last_end = -1
        for match in re.finditer(f"{_ENABLED.pattern}|{_FIRST.pattern}", text):
            if match[0].startswith("Supporting"):
                if last_end >= 0:
                    starts.append(text.rfind("\n", 0, match.start()) + 1)
                last_end = -1
            else:
                last_end = match.end()
    first = len(text) - len(text.lstrip())
    starts = [0, *(start for start in starts if start > first)]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def read(text: str, name: str, path: str) -> Host:
    """Return the host that a boot log describes; of several boots, the last that tells of it.

    Raises
    ------
    FormatError
        If no boot tells which components the kernel enabled, or a layout is impossible.
    """
    boots = boots_in(text)
    telling = [boot for boot in boots if any(p.search(boot) for p in (_ENABLED, _LEAF, _NO_XSAVE))]
    if not telling:
        raise FormatError(
            path, None, "expected a line 'x86/fpu: Enabled xstate features', got none"
        )
    boot = telling[-1]
    host = _of_boot(boot, name, path)
    release = _RELEASE.search(boot)
    kernel = kernel_of(release[1], path) if release else None
    if kernel:
        host = host.with_kernel(kernel).replace(xcr0=host.xcr0, xss=host.xss)
    notes = list(host.notes)
    if len(boots) > 1:
        which = f"Linux {release[1]}" if release else "of no release"
        last = "last one" if boots[-1] is boot else "last one that tells of the FPU"
        notes.insert(0, f"{len(boots)} boots in this log: the {last} is taken, {which}")
    if "Hypervisor detected" in boot:
        notes.append("the log is of a virtual machine: it tells what that was given")
    return host.replace(notes=tuple(notes))


def _of_boot(boot: str, name: str, path: str) -> Host:
    """Return the host that one boot's lines describe, its kernel left open."""
    vendor, family = _processor(boot)
    enabled = _ENABLED.search(boot)
    leaves = {
        int(m[1], 16): tuple(int(m[i], 16) for i in (2, 3, 4, 5)) for m in _LEAF.finditer(boot)
    }
    if leaves:
        return _of_leaves(leaves, vendor, name, path)
    if enabled is None:
        facts: dict[str, Any] = {
            "xcr0": XFEATURE_MASK_FPSSE, "xss": 0, "kvm_xcr0": 0, "layout": Layout((), "no XSAVE")
        }  # fmt: skip
        known = dict.fromkeys(facts, "dump") | ({"vendor": "derived"} if vendor else {})
        note = "this kernel uses FXSAVE: it has no XSAVE, or was told not to use it"
        return Host(name, source=path, provenance=known, vendor=vendor, notes=(note,), **facts)
    return _of_enabled(boot, enabled, vendor, family, name, path)


def _of_enabled(
    boot: str,
    enabled: re.Match[str],
    vendor: str | None,
    family: int | None,
    name: str,
    path: str,
) -> Host:
    """Return the host whose kernel says which components it enabled."""
    mask = int(enabled[1] or enabled[4], 16)
    size = int(enabled[2] or enabled[5], 0)
    form = enabled[3] or enabled[6] or "standard"
    xcr0, xss = mask & ~SUPERVISOR_MASK, mask & SUPERVISOR_MASK
    slots = _slots(boot)
    provenance = {"xcr0": "dump", "xss": "dump", "kvm_xcr0": "derived", "layout": "dump"}
    notes: tuple[str, ...] = ()
    try:
        if form == "standard" and slots:
            layout: Layout | None = Layout(tuple(slots[nr] for nr in sorted(slots)), "dmesg")
            expected = layout.standard_size(xcr0) if layout else size
        else:
            layout = likely_layout(xcr0, vendor, family, size if form == "standard" else None)
            provenance["layout"] = "assumed"
            expected = size
            if form == "standard" and layout is not None:
                expected = layout.standard_size(xcr0)
    except LayoutError as error:
        raise FormatError(path, None, str(error)) from None
    if layout is None:
        provenance.pop("layout")
    elif expected != size:
        without = [nr for nr in layout.by_nr if layout.standard_size(xcr0 & ~(1 << nr)) == size]
        hint = f": that is the size without {name_of(without[0])}" if without else ""
        notes = (
            f"{names_of(xcr0)} takes {expected} bytes, and this kernel's context is {size} bytes"
            + hint,
        )
    if vendor:
        provenance["vendor"] = "derived"
    kvm_xcr0 = kvm_supported_xcr0(NEWEST, xcr0, vendor)
    return Host(
        name, layout, xcr0, xss, kvm_xcr0,
        vendor=vendor, source=path, provenance=provenance, notes=notes,
    )  # fmt: skip


def _of_leaves(
    leaves: dict[int, tuple[int, ...]], vendor: str | None, name: str, path: str
) -> Host:
    """Return the host of the kernel's own table of leaf 0xD."""
    rows = {(0xD, subleaf): registers for subleaf, registers in leaves.items()}
    host = from_cpuid(Cpuid.from_rows(rows), name, path)
    provenance = host.provenance
    if vendor:
        provenance = provenance | {"vendor": "derived"}
        masks = {"kvm_xcr0": kvm_supported_xcr0(NEWEST, host.xcr0 or 0, vendor)}
        host = host.replace(vendor=vendor, **(masks if host.kvm_xcr0 is not None else {}))
    return host.replace(provenance=provenance)


def _slots(boot: str) -> dict[int, Slot]:
    """Return the components whose offsets and sizes the log lists.

    Linux 4.2 and 4.3 print them in hexadecimal, four digits each; later kernels in decimal.
    """
    found: dict[int, Slot] = {}
    for nr, offset, size in _SLOT.findall(boot):
        base = 16 if offset[0] == "0" and len(offset) == 4 else 10
        try:
            slot = Slot(int(nr), int(size, base), int(offset, base))
        except ValueError:
            continue
        if slot.size:  # RHEL 7 lists components that the CPU lacks as 0000
            found[slot.nr] = slot
    return found


def _processor(boot: str) -> tuple[str | None, int | None]:
    """Return the vendor text and family of the line that names the boot CPU."""
    match = _CPU.search(boot)
    if match is None:
        return None, None
    vendor = next((text for word, text in VENDORS.items() if word in match[1]), None)
    return vendor, int(match[2], 16)
