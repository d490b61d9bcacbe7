"""What a pool of hosts has in common, and how to say so to QEMU and Firecracker.

*Source*: QEMU target/i386/cpu.c builtin_x86_defs (qemu64); Firecracker docs/cpu_templates.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import reduce
from operator import and_, or_
from typing import Any

from xfast.errors import XfastError
from xfast.hosts.derive import common_layout
from xfast.hosts.model import Host
from xfast.hosts.models import qemu_name
from xfast.xsave.cpuid import FEATURES, PSABI_LEVELS

QEMU_MODEL_FEATURES = PSABI_LEVELS["x86-64"] | {"sep", "clflush", "pni", "cx16", "lahf_lm", "nx"}
"""What ``-cpu qemu64`` has without being asked (SVM apart, which is switched off)."""

QEMU_LACKS = frozenset(["enqcmd", "hreset", "mwaitx", "rao_int", "rdpru", "uintr", "user_msr"])
"""Features that QEMU has no name for, and so never shows a guest."""

_MASKS = ("xcr0", "xss", "kvm_xcr0", "guest_permission", "mxcsr_mask")


def common(hosts: Sequence[Host], name: str = "baseline") -> Host:
    """Return what all of `hosts` have: the intersection, and unknown where any is unknown.

    Raises
    ------
    ValueError
        If there are no hosts.
    """
    if not hosts:
        raise ValueError("hosts: expected one or more, got none")
    facts: dict[str, Any] = {}
    for field in (*_MASKS, "features"):
        values = [getattr(host, field) for host in hosts]
        facts[field] = None if None in values else reduce(and_, values)
    layouts = [host.layout for host in hosts if host.layout is not None]
    facts["layout"] = common_layout(layouts) if len(layouts) == len(hosts) else None
    facts["xsave"] = reduce(and_, (host.xsave for host in hosts))
    for field in ("vendor", "kernel", "x87_pointer_bits"):
        values = [getattr(host, field) for host in hosts]
        facts[field] = values[0] if all(value == values[0] for value in values) else None
    known = {field: "derived" for field, value in facts.items() if value is not None}
    source = ", ".join(host.name for host in hosts)
    return Host(name, source=source, provenance=known, **facts)


def qemu_cpu(features: Collection[str]) -> str:
    """Return the ``-cpu`` argument that gives a QEMU guest these features and no others.

    Only what `xfast.xsave.cpuid.FEATURES` lists is considered.
    """
    add = sorted(set(features) - QEMU_MODEL_FEATURES - QEMU_LACKS)
    drop = sorted(QEMU_MODEL_FEATURES - set(features))
    flags = [f"+{qemu_name(f)}" for f in add] + [f"-{qemu_name(f)}" for f in drop]
    return ",".join(["qemu64", "-svm", *flags])


def firecracker_template(hosts: Sequence[Host]) -> dict[str, Any]:
    """Return a Firecracker custom CPU template that levels `hosts`: what not all have is cleared.

    Every other bit is left alone. Where no host's features of leaf 7, sub-leaf 1, are common,
    that sub-leaf is hidden through its count instead: hosts without it refuse to have it edited.

    Raises
    ------
    XfastError
        If the features or the XCR0 of a host are not known.
    """
    unknown = [host.name for host in hosts if host.features is None or host.kvm_xcr0 is None]
    if unknown or not hosts:
        raise XfastError(f"features and XCR0: not known of {', '.join(unknown) or 'no host'}")
    features = [host.features or frozenset() for host in hosts]
    masks = [host.kvm_xcr0 or 0 for host in hosts]
    cleared: dict[tuple[int, int, str], int] = {}

    def clear(leaf: int, subleaf: int, register: str, bits: int) -> None:
        key = (leaf, subleaf, register)
        cleared[key] = cleared.get(key, 0) | bits

    level = reduce(and_, features)
    hidden = not any((FEATURES[f].leaf, FEATURES[f].subleaf) == (7, 1) for f in level)
    for feature in (FEATURES[name] for name in reduce(or_, features) - level):
        if hidden and (feature.leaf, feature.subleaf) == (7, 1):
            clear(7, 0, "eax", 0xFFFFFFFF)
        else:
            clear(feature.leaf, feature.subleaf, feature.register, 1 << feature.bit)
    lost = reduce(or_, masks) & ~reduce(and_, masks)
    for register, bits in (("eax", lost & 0xFFFFFFFF), ("edx", lost >> 32)):
        if bits:
            clear(0xD, 0, register, bits)
    return {"cpuid_modifiers": _modifiers(cleared)}


def _modifiers(cleared: dict[tuple[int, int, str], int]) -> list[dict[str, Any]]:
    """Write cleared bits as Firecracker does: one entry a sub-leaf, 32 characters a register."""
    entries: dict[tuple[int, int], list[dict[str, str]]] = {}
    for (leaf, subleaf, register), bits in sorted(cleared.items()):
        bitmap = "".join("0" if bits >> (31 - i) & 1 else "x" for i in range(32))
        entries.setdefault((leaf, subleaf), []).append(
            {"register": register, "bitmap": f"0b{bitmap}"}
        )
    return [
        {
            "leaf": hex(leaf),
            "subleaf": hex(subleaf),
            "flags": int(leaf in (7, 0xD, 0x1E)),
            "modifiers": modifiers,
        }
        for (leaf, subleaf), modifiers in entries.items()
    ]
