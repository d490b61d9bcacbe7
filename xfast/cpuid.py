"""CPUID as a value: what a CPU, a guest or a dump says, whatever file it came from.

Feature names are /proc/cpuinfo's.

*Source*: Intel SDM vol. 2 CPUID; AMD APM vol. 3 appendix E; Linux
arch/x86/include/asm/cpufeatures.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from xfast.layout import Layout, from_leaf_d

SIGNIFICANT_INDEX = 1
"""KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the entry answers for its own sub-leaf only."""

ENTRY = struct.Struct("<7I12x")
"""struct kvm_cpuid_entry2: function, index (sub-leaf), flags, eax, ebx, ecx, edx."""


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
