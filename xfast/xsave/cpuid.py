"""CPUID as a value: what a CPU, a guest or a dump says, whatever file it came from.

Feature names are /proc/cpuinfo's.

*Source*: Intel SDM vol. 2 CPUID; AMD APM vol. 3 appendix E; Linux
arch/x86/include/asm/cpufeatures.h.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from xfast.xsave.features import PKRU, XFEATURE_MASK_AVX512, XFEATURE_MASK_MPX, XFEATURE_MASK_XTILE
from xfast.xsave.layout import Layout, from_leaf_d

SIGNIFICANT_INDEX = 1
"""KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the entry answers for its own sub-leaf only."""

ENTRY = struct.Struct("<7I12x")
"""struct kvm_cpuid_entry2: function, index (sub-leaf), flags, eax, ebx, ecx, edx."""


class Feature(NamedTuple):
    """One CPUID feature bit, and the state components that its instructions need (mask)."""

    name: str
    leaf: int
    subleaf: int
    register: str
    bit: int
    components: int = 0


_SSE, _AVX, _AVX512 = 0x2, 0x4, XFEATURE_MASK_AVX512
_MPX, _XTILE, _CET = XFEATURE_MASK_MPX, XFEATURE_MASK_XTILE, 0x1800

_TABLE: dict[tuple[int, int, str], dict[str, tuple[int, int] | int]] = {
    (1, 0, "ecx"): {
        "pni": (0, _SSE),
        "pclmulqdq": (1, _SSE),
        "ssse3": (9, _SSE),
        "fma": (12, _AVX),
        "cx16": 13,
        "pcid": 17,
        "sse4_1": (19, _SSE),
        "sse4_2": (20, _SSE),
        "movbe": 22,
        "popcnt": 23,
        "aes": (25, _SSE),
        "xsave": 26,
        "osxsave": 27,
        "avx": (28, _AVX),
        "f16c": (29, _AVX),
        "rdrand": 30,
    },
    (1, 0, "edx"): {
        "fpu": (0, 0x1),
        "cx8": 8,
        "sep": 11,
        "cmov": 15,
        "clflush": 19,
        "mmx": (23, 0x1),
        "fxsr": 24,
        "sse": (25, _SSE),
        "sse2": (26, _SSE),
    },
    (7, 0, "ebx"): {
        "fsgsbase": 0,
        "bmi1": 3,
        "hle": 4,
        "avx2": (5, _AVX),
        "smep": 7,
        "bmi2": 8,
        "invpcid": 10,
        "rtm": 11,
        "mpx": (14, _MPX),
        "avx512f": (16, _AVX512),
        "avx512dq": (17, _AVX512),
        "rdseed": 18,
        "adx": 19,
        "smap": 20,
        "avx512ifma": (21, _AVX512),
        "clflushopt": 23,
        "clwb": 24,
        "intel_pt": (25, 0x100),
        "avx512pf": (26, _AVX512),
        "avx512er": (27, _AVX512),
        "avx512cd": (28, _AVX512),
        "sha_ni": (29, _SSE),
        "avx512bw": (30, _AVX512),
        "avx512vl": (31, _AVX512),
    },
    (7, 0, "ecx"): {
        "avx512vbmi": (1, _AVX512),
        "umip": 2,
        "pku": (3, PKRU),
        "ospke": (4, PKRU),
        "waitpkg": 5,
        "avx512_vbmi2": (6, _AVX512),
        "user_shstk": (7, _CET),
        "gfni": (8, _SSE),
        "vaes": (9, _AVX),
        "vpclmulqdq": (10, _AVX),
        "avx512_vnni": (11, _AVX512),
        "avx512_bitalg": (12, _AVX512),
        "avx512_vpopcntdq": (14, _AVX512),
        "la57": 16,
        "rdpid": 22,
        "movdiri": 27,
        "movdir64b": 28,
        "enqcmd": (29, 0x400),
    },
    (7, 0, "edx"): {
        "avx512_4vnniw": (2, _AVX512),
        "avx512_4fmaps": (3, _AVX512),
        "uintr": (5, 0x4000),
        "avx512_vp2intersect": (8, _AVX512),
        "serialize": 14,
        "tsxldtrk": 16,
        "arch_lbr": (19, 0x8000),
        "ibt": (20, _CET),
        "amx_bf16": (22, _XTILE),
        "avx512_fp16": (23, _AVX512),
        "amx_tile": (24, _XTILE),
        "amx_int8": (25, _XTILE),
    },
    (7, 1, "eax"): {
        "sha512": (0, _AVX),
        "sm3": (1, _AVX),
        "sm4": (2, _AVX),
        "rao_int": 3,
        "avx_vnni": (4, _AVX),
        "avx512_bf16": (5, _AVX512),
        "cmpccxadd": 7,
        "fred": 17,
        "lkgs": 18,
        "wrmsrns": 19,
        "amx_fp16": (21, _XTILE),
        "hreset": 22,
        "avx_ifma": (23, _AVX),
        "lam": 26,
        "movrs": 31,
    },
    (7, 1, "edx"): {
        "avx_vnni_int8": (4, _AVX),
        "avx_ne_convert": (5, _AVX),
        "amx_complex": (8, _XTILE),
        "avx_vnni_int16": (10, _AVX),
        "user_msr": 15,
        "avx10": (19, _AVX512),
        "apx_f": (21, 0x80000),
    },
    (0xD, 1, "eax"): {"xsaveopt": 0, "xsavec": 1, "xgetbv1": 2, "xsaves": 3, "xfd": 4},
    (0x1E, 1, "eax"): {
        "amx_fp8": (4, _XTILE),
        "amx_tf32": (6, _XTILE),
        "amx_avx512": (7, _XTILE | _AVX512),
        "amx_movrs": (8, _XTILE),
    },
    (0x80000001, 0, "ecx"): {
        "lahf_lm": 0,
        "abm": 5,
        "sse4a": (6, _SSE),
        "misalignsse": (7, _SSE),
        "xop": (11, _AVX),
        "lwp": (15, 1 << 62),
        "fma4": (16, _AVX),
        "tbm": 21,
        "mwaitx": 29,
    },
    (0x80000001, 0, "edx"): {
        "syscall": 11,
        "nx": 20,
        "mmxext": 22,
        "fxsr_opt": 25,
        "pdpe1gb": 26,
        "rdtscp": 27,
        "lm": 29,
        "3dnowext": (30, 0x1),
        "3dnow": (31, 0x1),
    },
    (0x80000008, 0, "ebx"): {"clzero": 0, "xsaveerptr": 2, "rdpru": 4, "wbnoinvd": 9},
}

FEATURES: dict[str, Feature] = {
    name: Feature(name, leaf, subleaf, register, *(bit if isinstance(bit, tuple) else (bit,)))
    for (leaf, subleaf, register), names in _TABLE.items()
    for name, bit in names.items()
}
"""{name: Feature}: what code compiled for one CPU may need of another.

Features that change only speed (erms, fsrm, prefetch hints) and those of the hypervisor are
left out on purpose: no snapshot depends on them.
"""

RUNTIME_FEATURES = frozenset({"osxsave", "ospke"})
"""Bits that mirror CR4: they tell what an OS has switched on, not what the CPU can do."""

XSAVE_FEATURES = frozenset({"xsave", "xsaveopt", "xsavec", "xgetbv1", "xsaves", "xfd"})
"""The features that are instructions or registers of the XSAVE family themselves."""

PSABI_LEVELS: dict[str, frozenset[str]] = {
    "x86-64": frozenset(["cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2", "lm"]),
    "x86-64-v2": frozenset(["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"]),
    "x86-64-v3": frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"]),
    "x86-64-v4": frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]),
}
"""What each level asks for beyond the one before it. *Source*: x86-64 psABI, table 3.1."""


def psabi_level(features: Collection[str]) -> str | None:
    """Return the highest x86-64 psABI level that `features` reach, or None if not even the first.

    *Source*: x86-64 psABI, section 3.1.1.
    """
    reached = None
    for level, needed in PSABI_LEVELS.items():
        if not needed <= set(features):
            break
        reached = level
    return reached


class Entry(NamedTuple):
    """One row, as in struct kvm_cpuid_entry2 (all u32)."""

    function: int
    subleaf: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


@dataclass(frozen=True)
class Cpuid:
    """A list of CPUID rows, in the order in which they were found.

    Parameters
    ----------
    entries : tuple of Entry
    """

    entries: tuple[Entry, ...]

    @classmethod
    def from_rows(cls, rows: Mapping[tuple[int, int], Iterable[int]]) -> Cpuid:
        """Build from {(leaf, sub-leaf): (eax, ebx, ecx, edx)}; every row is significant."""
        return cls(tuple(Entry(f, i, SIGNIFICANT_INDEX, *regs) for (f, i), regs in rows.items()))

    def find(self, function: int, subleaf: int = 0) -> Entry | None:
        """Return the row that answers for a leaf, as KVM's cpuid_entry2_find() does, or None."""
        for entry in self.entries:
            if entry.function == function and (
                entry.subleaf == subleaf or not entry.flags & SIGNIFICANT_INDEX
            ):
                return entry
        return None

    def leaf(self, function: int) -> Iterator[Entry]:
        """Yield the rows of one leaf."""
        return (entry for entry in self.entries if entry.function == function)

    @cached_property
    def _layout(self) -> tuple[Layout, int]:
        return from_leaf_d({e.subleaf: e[3:7] for e in self.leaf(0xD)})

    @property
    def layout(self) -> Layout:
        """The layout of leaf 0xD. Raises LayoutError where that is impossible."""
        return self._layout[0]

    @property
    def unplaced(self) -> int:
        """Components that leaf 0xD announces without saying where they lie (mask)."""
        return self._layout[1]

    @property
    def xcr0(self) -> int:
        """The user components that leaf 0xD.0 announces: the bits XCR0 may have (mask)."""
        row = self.find(0xD, 0)
        return row.eax | row.edx << 32 if row else 0

    @property
    def xss(self) -> int:
        """The supervisor components that leaf 0xD.1 announces (mask)."""
        row = self.find(0xD, 1)
        return row.ecx | row.edx << 32 if row else 0

    @cached_property
    def features(self) -> frozenset[str]:
        """The names in FEATURES whose bit is set. A leaf that is not here announces nothing."""
        rows = {(leaf, subleaf): self.find(leaf, subleaf) for leaf, subleaf, _ in _TABLE}
        return frozenset(
            f.name
            for f in FEATURES.values()
            if (row := rows[f.leaf, f.subleaf]) and getattr(row, f.register) >> f.bit & 1
        )

    @property
    def vendor(self) -> str | None:
        """The vendor text of leaf 0 (``GenuineIntel``), or None where the leaf is missing."""
        row = self.find(0)
        if row is None:
            return None
        text = struct.pack("<3I", row.ebx, row.edx, row.ecx)
        return text.decode("ascii", "replace").rstrip("\0")

    @property
    def signature(self) -> int | None:
        """Family, model and stepping as leaf 1 has them in EAX, or None."""
        row = self.find(1)
        return row.eax if row else None
