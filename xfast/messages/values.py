"""The numbers in a message: which MSR, CPUID register, mask, size or offset it speaks of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import combinations

from xfast.messages.reading import search
from xfast.xsave.cpuid import FEATURES
from xfast.xsave.features import (
    BY_NAME,
    COMPONENTS,
    EXTENDED_OFFSET,
    KVM_XSAVE_SIZE,
    SUPERVISOR_MASK,
    XFEATURE_MASK_AVX512,
    XFEATURE_MASK_FPSSE,
    XFEATURE_MASK_MPX,
    XFEATURE_MASK_XTILE,
    Component,
    bits,
    name_of,
    names_of,
)
from xfast.xsave.layout import PRESETS

XSTATE_MSRS = {
    0xDA0: "IA32_XSS, which enables supervisor components (CET, ...)",
    0x1C4: "IA32_XFD, which disables AMX tile data",
    0x1C5: "IA32_XFD_ERR, which tells which disabled component faulted",
    0x6A0: "IA32_U_CET, the user part of CET",
    0x6A2: "IA32_S_CET, the supervisor part of CET",
    0x6A4: "IA32_PL0_SSP, a shadow stack pointer of CET",
    0x6A5: "IA32_PL1_SSP, a shadow stack pointer of CET",
    0x6A6: "IA32_PL2_SSP, a shadow stack pointer of CET",
    0x6A7: "IA32_PL3_SSP, a shadow stack pointer of CET",
    0x6A8: "IA32_INTERRUPT_SSP_TABLE_ADDR of CET",
    0x6E1: "IA32_PKRS, protection keys of the supervisor",
    0xD93: "IA32_PASID",
}
"""MSRs that are extended state or control it. *Source*: Intel SDM vol. 4 chapter 2."""

OTHER_MSRS = (
    (range(0x480, 0x494), "a VMX capability: nested virtualisation"),
    (range(0x186, 0x18A), "a performance counter's control"),
    (range(0xC1, 0xC9), "a performance counter"),
    (range(0x309, 0x310), "a fixed performance counter"),
    (range(0x38D, 0x392), "the control of performance counters"),
    (range(0x3F1, 0x3F3), "the PEBS of performance counters"),
    (range(0x122, 0x123), "IA32_TSX_CTRL"),
    (range(0x10A, 0x10B), "IA32_ARCH_CAPABILITIES"),
    (range(0x48, 0x4A), "speculation control"),
    (range(0x10, 0x11), "the TSC"),
    (range(0x3B, 0x3C), "IA32_TSC_ADJUST"),
    (range(0x6E0, 0x6E1), "the TSC deadline timer"),
    (range(0x200, 0x210), "an MTRR"),
    (range(0x400, 0x480), "a machine check bank"),
    (range(0x4B564D00, 0x4B564E00), "KVM's paravirtualisation"),
    (range(0x40000000, 0x40000200), "Hyper-V's paravirtualisation"),
)
"""MSRs that people meet in the same messages and that are not extended state."""

OTHER_BITS: dict[tuple[int, int, str], dict[int, str]] = {
    (1, 0, "ecx"): {
        2: "dtes64", 3: "monitor", 4: "ds_cpl", 5: "vmx", 6: "smx", 7: "est", 8: "tm2",
        14: "xtpr", 15: "pdcm", 18: "dca", 21: "x2apic", 24: "tsc_deadline_timer",
        31: "hypervisor",
    },
    (1, 0, "edx"): {
        1: "vme", 2: "de", 3: "pse", 4: "tsc", 5: "msr", 6: "pae", 7: "mce", 9: "apic",
        12: "mtrr", 13: "pge", 14: "mca", 16: "pat", 17: "pse36", 21: "ds", 22: "acpi", 27: "ss",
        28: "ht", 29: "tm", 31: "pbe",
    },
    (7, 0, "ebx"): {
        1: "tsc_adjust", 2: "sgx", 6: "fdp_excptn_only", 9: "erms", 12: "cqm", 13: "zero_fcs_fds",
        15: "rdt_a", 22: "pcommit",
    },
    (7, 0, "ecx"): {13: "tme", 24: "bus_lock_detect", 25: "cldemote", 30: "sgxlc", 31: "pks"},
    (7, 0, "edx"): {
        4: "fsrm", 10: "md_clear", 11: "rtm_always_abort", 13: "tsx_force_abort", 15: "hybrid",
        18: "pconfig", 26: "spec_ctrl", 27: "stibp", 28: "flush_l1d", 29: "arch_capabilities",
        30: "core_capability", 31: "ssbd",
    },
    (7, 1, "eax"): {10: "fzrm", 11: "fsrs", 12: "fsrc"},
    (0x80000001, 0, "ecx"): {
        1: "cmp_legacy", 2: "svm", 3: "extapic", 4: "cr8legacy", 8: "3dnowprefetch", 9: "osvw",
        10: "ibs", 12: "skinit", 13: "wdt", 22: "topoext", 23: "perfctr_core", 24: "perfctr_nb",
    },
    (0x80000007, 0, "edx"): {8: "invtsc"},
    (0x80000008, 0, "ebx"): {12: "ibpb", 14: "ibrs", 15: "stibp", 24: "amd_ssbd", 25: "virt_ssbd"},
}  # fmt: skip
"""CPUID bits that no snapshot depends on, so that `FEATURES` leaves them out: {place: names}.

*Source*: Intel SDM vol. 2 CPUID; AMD APM vol. 3 appendix E.
"""

NO_FEATURE = "holds no feature that brings state or instructions"
"""What is said of a CPUID register that holds none of `FEATURES`."""

_MSR = re.compile(
    r"(?:\bmsrs?\b|rdmsr|wrmsr)[^\n]{0,40}?\b0x([0-9a-f]{1,8})\b|\b0x([0-9a-f]{1,8})\b[^\n]{0,12}\bmsr\b",
    re.I,
)
_REGISTER = re.compile(
    r"(?:leaf|level|cpuid)\D{0,8}(0x[0-9a-f]+|\d+)\b(?:[^\n]{0,24}?sub-?leaf\D{0,4}(0x[0-9a-f]+|\d+))?"
    r"[^\n]{0,24}?\b(e[abcd]x)\b",
    re.I,
)
_BOTH = tuple(
    re.compile(pattern, re.I)
    for pattern in (
        r"source|snapshot|src",
        r"0x([0-9a-f]{1,8})\b",
        r"dest|target|dst|host",
        r"0x([0-9a-f]{1,8})\b",
    )
)
"""What a line with two values of a register has, one after another."""
_QEMU_BIT = re.compile(
    r"CPUID(?:\.|\[eax=)([0-9A-F]+)h(?:,ecx=([0-9A-F]+)h\])?[:.\]]*(?:\.|:)?(E[ABCD]X)"
    r"\.?([\w.-]*)\s*\[bit (\d+)\]",
    re.I,
)
_FEATURE_NUMBER = re.compile(r"feature\s+\(?(\d{1,2})\)?(?!\d)", re.I)
_MASK_HINT = re.compile(
    r"(?:xcr0|xfeatures?|xstate_bv|xcomp_bv|xfeature_mask|xcr0_accum|unsupported bits)"
    r"[^\n0]{0,12}(0x[0-9a-f]{1,16})",
    re.I,
)
_MASK_WORD = re.compile(r"xcr0|xfeature|xstate_bv|xcomp_bv", re.I)
_KNOWN = sum(component.bit for component in COMPONENTS)
_HEX = re.compile(r"\b(0x[0-9a-f]{1,8})\b", re.I)
_OFFSETS = re.compile(r"offset\s+(0x[0-9a-f]+|\d+)\D{1,16}(0x[0-9a-f]+|\d+)", re.I)

USER_SETS = tuple(
    XFEATURE_MASK_FPSSE | sum(chosen)
    for count in range(6)
    for chosen in combinations(
        (
            BY_NAME["avx"].bit,
            XFEATURE_MASK_MPX,
            XFEATURE_MASK_AVX512,
            BY_NAME["pkru"].bit,
            XFEATURE_MASK_XTILE,
        ),
        count,
    )
    if not sum(chosen) & (XFEATURE_MASK_AVX512 | XFEATURE_MASK_XTILE)
    or sum(chosen) & BY_NAME["avx"].bit
)
"""The values of XCR0 that real machines have (masks)."""

CET_U, CET_S = BY_NAME["cet_u"].bit, BY_NAME["cet_s"].bit
SUPERVISOR_SETS = (0, CET_U, CET_U | CET_S)
"""The values of IA32_XSS that Linux gives tasks and guests."""


def msrs_in(text: str) -> Iterator[tuple[int, bool, str]]:
    """Yield (number, whether it is extended state, what it is) of the MSRs that a text names."""
    for match in _MSR.finditer(text) if "msr" in text.lower() else ():
        number = int(match[1] or match[2], 16)
        if number in XSTATE_MSRS:
            yield number, True, XSTATE_MSRS[number]
            continue
        for numbers, what in OTHER_MSRS:
            if number in numbers:
                yield number, False, what
                break
        else:
            yield number, False, "not one that goes with XSAVE"


def cpuid_bits_in(text: str) -> list[str]:
    """Return the names of the CPUID features that a text gives by register and bits."""
    names: list[str] = []
    for match in _QEMU_BIT.finditer(text):
        leaf, bit = int(match[1], 16), int(match[5])
        subleaf = int(match[2] or "0", 16)
        names.append(match[4] or _bit_name(leaf, subleaf, match[3].lower(), bit))
    if names:
        return names
    register, both = _REGISTER.search(text), search(_BOTH, text)
    if register and both:
        leaf, subleaf = int(register[1], 0), int(register[2] or "0", 0)
        source, target = both[1], both[3]
        lost = int(source[1], 16) & ~int(target[1], 16)
        names = [_bit_name(leaf, subleaf, register[3].lower(), bit) for bit in bits(lost)]
    return names


def _bit_name(leaf: int, subleaf: int, register: str, bit: int) -> str:
    for feature in FEATURES.values():
        if feature[1:5] == (leaf, subleaf, register, bit):
            return feature.name
    if (leaf, subleaf) == (0xD, 0) and register in ("eax", "edx"):
        return name_of(bit + 32 * (register == "edx"))
    if bit in OTHER_BITS.get((leaf, subleaf, register), ()):
        return OTHER_BITS[leaf, subleaf, register][bit]
    return f"CPUID {leaf:#x}.{subleaf} {register.upper()} bit {bit}"


def register_in(text: str) -> str:
    """Say which CPUID register a text speaks of without its two values, or nothing."""
    match = _REGISTER.search(text)
    if not match:
        return ""
    leaf, register = int(match[1], 0), match[3].lower()
    subleaf = int(match[2] or "0", 0)
    here = [f.name for f in FEATURES.values() if f[1:4] == (leaf, subleaf, register)]
    if leaf == 0xD:
        return "leaf 0xD tells which state components there are, and their sizes and offsets"
    place = f"CPUID {leaf:#x}.{subleaf} {register.upper()}"
    if not here:
        return f"{place} {NO_FEATURE}"
    return f"{place} holds {', '.join(here)}"


def is_elsewhere(text: str) -> bool:
    """Tell whether a text speaks of a CPUID register that no snapshot depends on."""
    return register_in(text).endswith(NO_FEATURE)


def describe_masks(text: str) -> list[str]:
    """Return a line for each component mask that a text names."""
    values = _MASK_HINT.findall(text)
    if values or _MASK_WORD.search(text):
        values += [one for one in dict.fromkeys(_HEX.findall(text)) if _is_mask(int(one, 16))]
    return [f"{value} is {names_of(int(value, 16))}" for value in dict.fromkeys(values)]


def _is_mask(value: int) -> bool:
    """Tell whether a number can be a value of XCR0: it has x87 and known components alone."""
    return bool(value & 1) and not value & ~_KNOWN


def _places(component: Component) -> dict[str, int]:
    """Return {preset: offset} of an extended component in the standard format."""
    return {
        name: layout.slot(component.nr).offset
        for name, layout in PRESETS.items()
        if component.nr in layout.by_nr and not component.supervisor
    }


def describe_components(text: str) -> list[str]:
    """Return a line for each component that a text names by number (``feature 5``)."""
    numbers = {int(word) for word in _FEATURE_NUMBER.findall(text)}
    return [
        f"feature {component.nr} is {component.name}, {component.title}; its offset is "
        + ", ".join(f"{offset} ({name})" for name, offset in _places(component).items())
        for component in COMPONENTS
        if component.nr in numbers and _places(component)
    ]


def describe_offsets(text: str) -> list[str]:
    """Return a line for each of two offsets that a text compares, where layouts have both."""
    lines = []
    for pair in _OFFSETS.findall(text):
        values = [int(word, 0) for word in pair]
        for component in COMPONENTS:
            places = _places(component)
            if len(set(values)) == 2 and set(values) <= set(places.values()):
                lines += [
                    f"{component.name} lies at {value} ({value:#x}) in the layout of "
                    + ", ".join(name for name, offset in places.items() if offset == value)
                    for value in values
                ]
    return lines


def masks_of_size(size: int, aligned: bool = True) -> list[int]:
    """Return the component masks whose compacted area has `size` bytes.

    Parameters
    ----------
    size : int
        Bytes.
    aligned : bool
        Whether CPUID says that TILECFG and TILEDATA are 64-byte aligned (leaf 0xD.17 ECX bit 1).
    """
    return _masks_by_size(aligned).get(size, [])


@cache
def _masks_by_size(aligned: bool) -> dict[int, list[int]]:
    """Return the component masks that there are, by the size of their compacted area (bytes)."""
    intel = PRESETS["intel"]
    found: dict[int, list[int]] = {}
    for user in USER_SETS:
        for supervisor in SUPERVISOR_SETS:
            extended = (user | supervisor) & ~XFEATURE_MASK_FPSSE
            packed = EXTENDED_OFFSET + sum(intel.slot(nr).size for nr in bits(extended))
            size = intel.compacted_size(extended) if aligned else packed
            found.setdefault(size, []).append(user | supervisor)
    return found


@cache
def _standard_sizes() -> dict[int, list[str]]:
    """Return what areas in the standard format end with: ``tiledata (intel)``, by their size."""
    found: dict[int, list[str]] = {}
    for component in COMPONENTS:
        for name, offset in _places(component).items():
            size = offset + PRESETS[name].slot(component.nr).size
            found.setdefault(size, []).append(f"{component.name} ({name})")
    return found


def _named(masks: list[int]) -> str:
    """Say which masks, those with most components first."""
    shown = sorted(masks, key=lambda mask: -mask.bit_count())[:3]
    return " or ".join(
        f"{mask & ~SUPERVISOR_MASK:#x}"
        + (f" | {mask & SUPERVISOR_MASK:#x}" if mask & SUPERVISOR_MASK else "")
        + f" ({names_of(mask)})"
        for mask in shown
    )


def describe_sizes(text: str) -> list[str]:
    """Return a line for each number in a text that is the size of an area, and what makes it."""
    lines = []
    numbers = re.findall(r"(?<![\w.])(\d{3,5}|0x[0-9a-f]{3,4})(?![\w.])", text, re.I)
    for size in dict.fromkeys(
        int(number, 0) for number in numbers if number[0] != "0" or number[1] in "xX"
    ):
        if size == KVM_XSAVE_SIZE:
            lines.append("4096 is what KVM_GET_XSAVE and KVM_SET_XSAVE move")
            continue
        ends, compacted = _standard_sizes().get(size), masks_of_size(size)
        if ends:
            lines.append(f"{size}: standard format, the area ends with {', '.join(ends)}")
        if compacted:
            lines.append(f"{size}: compacted format of {_named(compacted)}")
        loose = [] if compacted else masks_of_size(size, aligned=False)
        if loose and not ends:
            lines.append(
                f"{size}: compacted format of {_named(loose)} where CPUID does not say that "
                "TILECFG is aligned (leaf 0xD.17 ECX bit 1)"
            )
    return lines
