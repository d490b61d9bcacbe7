"""Firecracker's two files about CPUs: fingerprints, which describe one, and CPU templates.

*Source*: Firecracker docs/cpu_templates/cpu-templates.md, cpu-template-helper.md.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from xfast.errors import FormatError
from xfast.hosts.derive import from_cpuid, kernel_of
from xfast.hosts.description import integer, read_json
from xfast.hosts.model import Host
from xfast.xsave.cpuid import FEATURES, Cpuid, Entry
from xfast.xsave.features import TILEDATA

REGISTERS = ("eax", "ebx", "ecx", "edx")


class Modifier(NamedTuple):
    """One register of a Firecracker CPU template: the bits it sets, and those it keeps."""

    leaf: int
    subleaf: int
    flags: int
    register: str
    value: int
    keep: int


def _hexadecimal(value: object) -> int:
    if not isinstance(value, str):
        raise ValueError(f"expected hexadecimal text, got {value!r:.40}")
    return integer(value, 1 << 32)


def read_modifiers(config: object, path: str) -> list[Modifier]:
    """Read the ``cpuid_modifiers`` of a Firecracker template or fingerprint."""
    try:
        modifiers = []
        for row in config["cpuid_modifiers"]:  # type: ignore[index]
            leaf, subleaf = (_hexadecimal(row[key]) for key in ("leaf", "subleaf"))
            flags = integer(row["flags"], 1 << 32)
            for item in row["modifiers"]:
                bitmap = re.fullmatch(r"0b([01x]{32})", item["bitmap"])
                if bitmap is None or item["register"] not in REGISTERS:
                    raise ValueError(f"expected a register and 32 bits 0, 1 or x, got {item!r:.80}")
                value = int(bitmap[1].replace("x", "0"), 2)
                keep = int(bitmap[1].replace("1", "0").replace("x", "1"), 2)
                modifiers.append(Modifier(leaf, subleaf, flags, item["register"], value, keep))
    except (KeyError, TypeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise FormatError(path, None, f"cpuid_modifiers: {what}") from None
    return modifiers


def read_fingerprint(document: dict[str, Any], name: str, path: str) -> Host:
    """Read a Firecracker fingerprint: the CPUID that KVM on this host gives a guest."""
    rows: dict[tuple[int, int, int], dict[str, int]] = {}
    for m in read_modifiers(document.get("guest_cpu_config"), path):
        rows.setdefault((m.leaf, m.subleaf, m.flags), {})[m.register] = m.value
    entries = (Entry(*key, *(row.get(r, 0) for r in REGISTERS)) for key, row in rows.items())
    host = from_cpuid(Cpuid(tuple(entries)), name, path, by_kvm=True)
    kernel = kernel_of(document.get("kernel_version"), path)
    if kernel is None:
        return host
    return host.replace(
        kernel=kernel,
        guest_permission=None if host.kvm_xcr0 is None else host.kvm_xcr0 & TILEDATA,
        provenance=host.provenance | {"kernel": kernel.provenance, "guest_permission": "derived"},
    )


def apply_template(host: Host, path: str) -> Host:
    """Return what guests of `host` have under a Firecracker CPU template.

    Only takes away: a bit that the template sets and the host lacks stays absent.

    Raises
    ------
    FormatError
        If the file at `path` is no CPU template.
    """
    modifiers = read_modifiers(read_json(Path(path).read_text("utf-8", "replace"), path), path)
    cleared = {(*m[:2], m.register): ~(m.keep | m.value) & 0xFFFFFFFF for m in modifiers}
    lost = cleared.get((0xD, 0, "eax"), 0) | cleared.get((0xD, 0, "edx"), 0) << 32
    features = host.features
    if features is not None:
        bits = {
            f.name: cleared.get((f.leaf, f.subleaf, f.register), 0) >> f.bit & 1
            for f in FEATURES.values()
        }
        features = frozenset(name for name in features if not bits[name])
    return host.replace(
        name=f"{host.name}+{Path(path).stem}",
        features=features,
        xsave=host.xsave if features is None else host.xsave & features,
        kvm_xcr0=None if host.kvm_xcr0 is None else host.kvm_xcr0 & ~lost,
        cpuid=None,
        source=f"{host.source} under {path}",
        provenance=host.provenance | dict.fromkeys(("features", "xsave", "kvm_xcr0"), "derived"),
    )
