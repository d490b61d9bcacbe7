"""What the engine should reach on which CPU, and where each number comes from.

A ratio to the machine's own limit still depends on the silicon: how far it fetches ahead by
itself, whether it has AVX-512, what a software prefetch costs. So targets are set by class of CPU;
a CPU of no class below is measured without being told that it falls short.
"""

from __future__ import annotations

from typing import NamedTuple


class CpuClass(NamedTuple):
    """CPUs that share targets."""

    name: str
    cpus: str
    source: str


ZEN4 = CpuClass(
    "zen4",
    "AMD Zen 4 and Zen 5",
    "prototypes in C, and what they reached beside the bare loads and stores, on a Zen 4",
)
ZEN3 = CpuClass(
    "zen3",
    "AMD Zen 2 and Zen 3",
    "probes on a Zen 3: reading a full row alone takes 250 of the 320 ns that copying 4096 bytes "
    "takes, and a software prefetch 7",
)
INTEL = CpuClass(
    "intel",
    "Intel with AVX-512",
    "the lesser of what this engine reached on two of them (up to Emerald Rapids), less 5 %",
)
CLASSES = (ZEN4, ZEN3, INTEL)

TARGETS: dict[tuple[str, str, str], tuple[float, float, float]] = {
    ("get_uabi", "mixed, 4096 -> 4096", "copy"): (1.5, 1.05, 1.2),
    ("get_uabi", "full, 4096 -> 4096", "copy"): (1.3, 1.0, 1.04),
    ("get_uabi", "64 keys, 4096 -> 4096", "copy"): (1.28, 0.95, 1.2),
    ("get_uabi", "mixed, 2496 -> 2752", "copy"): (1.05, 0.95, 1.18),
    ("get_uabi", "full, 2496 -> 2752", "copy"): (0.95, 0.85, 1.05),
    ("get_uabi", "mixed, 2440 -> 2696", "copy"): (0.85, 0.75, 1.14),
    ("get_uabi", "full, 2440 -> 2696", "copy"): (0.85, 0.8, 1.06),
    ("get_uabi", "amx, 11008 -> 11008", "copy"): (1.05, 0.9, 0.87),
    ("set_uabi", "mixed, 4096 -> 4096", "copy"): (1.4, 1.3, 1.7),
    ("set_uabi", "full, 4096 -> 4096", "copy"): (1.0, 1.1, 1.25),
    ("compact", "mixed, 4096 -> 4096", "copy"): (1.5, 1.3, 2.0),
    ("compact", "full, 4096 -> 4096", "copy"): (1.05, 1.15, 1.3),
    ("relayout zen4", "mixed, 4096 -> 4096", "copy"): (1.5, 1.05, 1.24),
    ("relayout zen4", "full, 4096 -> 4096", "copy"): (1.05, 1.0, 1.1),
    ("audit", "mixed, 4096", "read"): (14, 8, 5),
    ("audit", "mixed, 4096", "2 lines"): (0.9, 0.85, 0.75),
    ("xinuse", "mixed, 4096", "read"): (1.0, 0.85, 0.95),
    ("xinuse", "full, 4096", "read"): (1.0, 0.85, 0.95),
    ("xinuse", "mixed, 2752", "read"): (0.95, 0.85, 0.84),
    ("xinuse", "full, 2752", "read"): (0.95, 0.85, 0.84),
    ("xinuse early", "mixed, 4096", "read"): (2.8, 2.2, 2.7),
    ("diff", "full, 4096 -> 4096", "read2"): (0.9, 0.85, 1.05),
    ("diff", "full, 2752 -> 2752", "read2"): (1.0, 0.85, 0.97),
    ("keep scrub", "full, 4096 -> 4096", "copy"): (4.5, 4.0, 3.5),
    ("keep scrub", "mixed, 4096 -> 4096", "copy"): (8.0, 7.0, 7.5),
    ("keep header", "full, 4096 -> 4096", "copy"): (13, 13, 19),
}
"""(operation, case, limit) -> the target of each class."""

ANY_CPU: dict[tuple[str, str, str], float] = {
    ("get_uabi", "full, 4096", "Linux"): 2.0,
    ("get_uabi", "mixed, 4096", "Linux"): 1.5,
    ("get_uabi", "full, 4096", "Xen"): 2.0,
    ("get_uabi", "mixed, 4096", "Xen"): 1.5,
    ("get_uabi", "full, 4096", "QEMU"): 2.0,
    ("get_uabi", "mixed, 4096", "QEMU"): 1.5,
    ("get_uabi", "full, 4096", "memcpy"): 1.0,
    ("get_uabi", "mixed, 4096", "memcpy"): 1.0,
    ("set_uabi", "full, 4096", "Linux"): 1.2,
    ("set_uabi", "mixed, 4096", "Linux"): 1.2,
    ("compact", "full, 4096", "Xen"): 1.5,
    ("compact", "mixed, 4096", "Xen"): 1.5,
}
"""Times as fast as others' algorithms: being ahead of them is no question of silicon."""

CORE = "a copy in the nearest cache, or a call: the same on every CPU that has its own vector ISA"


def class_of(vendor: str, family: int, model: int, isa: str) -> CpuClass | None:
    """Return the class of a CPU; None for one of no class, or held to a narrower ISA.

    *Source*: family and model numbers as in Linux arch/x86/kernel/cpu/amd.c and
    arch/x86/include/asm/intel-family.h.
    """
    if vendor == "AuthenticAMD":
        zen4 = family == 26 or (family == 25 and (0x10 <= model < 0x20 or model >= 0x60))
        if zen4 and isa == "avx512":
            return ZEN4
        if not zen4 and family in (23, 25) and isa == "avx2":
            return ZEN3
    elif vendor == "GenuineIntel" and isa == "avx512":
        return INTEL
    return None


def target_of(op: str, case: str, limit: str, of: CpuClass | None) -> float | None:
    """Return what a line should reach; None if nobody knows it for this CPU."""
    key = op, case, limit
    if key in ANY_CPU:
        return ANY_CPU[key]
    if of is None or key not in TARGETS:
        return None
    return TARGETS[key][CLASSES.index(of)]
