"""Write `xfast/hosts/catalogue.toml` from a folder of public CPUID dumps.

    python docs/make_catalogue.py ../shared/samples > xfast/hosts/catalogue.toml

Only facts are taken: the layout and masks of leaf 0xD, and the names of CPUID features. CPUs
without a full dump take their layout from the table LAYOUTS.tsv, distilled from 404 dumps, and
their features, marked ``assumed``, from the CPU that they descend from.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from xfast.hosts import Host, load
from xfast.hosts.derive import from_cpuid
from xfast.hosts.description import to_toml
from xfast.hosts.models import qemu_name
from xfast.xsave.cpuid import FEATURES, XSAVE_FEATURES, Cpuid, Entry
from xfast.xsave.layout import PRESETS

DUMPS = {
    "intel-core2": "libvirt/x86_64-cpuid-Core2-E6850.xml",
    "intel-haswell": "libvirt/x86_64-cpuid-Xeon-E5-2630-v3.xml",
    "intel-broadwell": "libvirt/x86_64-cpuid-Xeon-E5-2650-v4.xml",
    "intel-skylake-server": "libvirt/x86_64-cpuid-Xeon-Gold-6130.xml",
    "intel-cascadelake": "libvirt/x86_64-cpuid-Xeon-Platinum-9242.xml",
    "intel-cooperlake": "libvirt/x86_64-cpuid-Cooperlake.xml",
    "intel-icelake-server": "firecracker/fingerprint_INTEL_ICELAKE_6.1host.json",
    "intel-sapphirerapids": "instlatx64/GenuineIntel00806F8_SapphireRapids_05_CPUID.txt",
    "intel-graniterapids": "firecracker/fingerprint_INTEL_GRANITE_RAPIDS_6.18host.json",
    "intel-snowridge": "libvirt/x86_64-cpuid-Atom-P5362.xml",
    "intel-knightslanding": "instlatx64/GenuineIntel0050670_KnightsLanding_CPUID.txt",
    "intel-coffeelake": "libvirt/x86_64-cpuid-Core-i7-8700.xml",
    "intel-tigerlake": "instlatx64/GenuineIntel00806C1_TigerLake_01_CPUID.txt",
    "intel-alderlake": "instlatx64/GenuineIntel0090672_AlderLake_01_LC_BC_CPUID.txt",
    "intel-pantherlake": "instlatx64/GenuineIntel00C06C3_PantherLakeL_01_CPUID.txt",
    "amd-bulldozer": "libvirt/x86_64-cpuid-Opteron-6282.xml",
    "amd-naples": "libvirt/x86_64-cpuid-Ryzen-7-1800X-Eight-Core.xml",
    "amd-rome": "libvirt/x86_64-cpuid-EPYC-7502-32-Core.xml",
    "amd-milan": "firecracker/fingerprint_AMD_MILAN_6.18host.json",
    "amd-genoa": "firecracker/fingerprint_AMD_GENOA_6.18host.json",
    "hygon-dhyana": "libvirt/x86_64-cpuid-Hygon-C86-7185-32-core.xml",
    "zhaoxin-kx7000": "instlatx64/CentaurHauls00607B1_KX7000_05_CPUID.txt",
}
"""{name: dump}. A Zen 1 desktop part stands for Naples: the cores are the same."""

DESCENDANTS = {
    "intel-nehalem": ("intel-core2", None, "sse4_1 sse4_2 popcnt rdtscp"),
    "intel-westmere": ("intel-nehalem", None, "aes pclmulqdq pcid pdpe1gb"),
    "intel-sandybridge": (
        "intel-westmere",
        "x86_64-cpuid-Xeon-E5-2650.xml",
        "avx xsave xsaveopt",
    ),
    "intel-ivybridge": (
        "intel-sandybridge",
        "x86_64-cpuid-Xeon-E5-2650.xml",
        "f16c fsgsbase rdrand smep",
    ),
    "intel-emeraldrapids": (
        "intel-sapphirerapids",
        "GenuineIntel00C06F2_EmeraldRapids_01_CPUID.txt",
        "",
    ),
    "amd-turin": (
        "amd-genoa",
        "AuthenticAMD0B00F21_K20_Turin_01_CPUID.txt",
        "avx512_vp2intersect avx_vnni movdir64b movdiri",
    ),
}
"""{name: (ancestor, row of LAYOUTS.tsv, features it has more)}; no row: no XSAVE."""


def of_dump(name: str, samples: Path, dump: str) -> Host:
    """Return a catalogue entry from a dump, its CPUID rows left out."""
    (host,) = load(samples / "cpuid" / dump)
    masks = dict.fromkeys(("xcr0", "xss", "kvm_xcr0"), "derived")
    provenance = host.provenance | masks
    for field in ("cpuid", "kernel", "guest_permission"):
        provenance.pop(field, None)
    return host.replace(
        name=name,
        cpuid=None,
        kernel=None,
        guest_permission=None,
        provenance=provenance,
        source=Path(dump).name,
    )


def of_row(row: dict[str, str]) -> Cpuid:
    """Return leaf 0xD, and its vendor, as a row of LAYOUTS.tsv has them."""
    xcr0, xss = int(row["xcr0_mask"], 16), int(row["xss_mask"], 16)
    vendor = row["vendor"].encode()
    ebx, edx, ecx = (int.from_bytes(vendor[i : i + 4], "little") for i in (0, 4, 8))
    entries = [
        Entry(0, 0, 1, 0xD, ebx, ecx, edx),
        Entry(0xD, 0, 1, xcr0 & 0xFFFFFFFF, int(row["ebx"]), int(row["ecx_max_size"]), xcr0 >> 32),
        Entry(0xD, 1, 1, int(row["D1_eax"], 16), 0, xss & 0xFFFFFFFF, xss >> 32),
    ]
    for item in row["subleaves(comp:offset+size/ecx)"].split():
        nr, rest = item.split(":")
        offset, rest = rest.split("+")
        size, ecx_text = rest.split("/")
        entries.append(Entry(0xD, int(nr), 1, int(size), int(offset), int(ecx_text), 0))
    return Cpuid(tuple(entries))


def of_ancestor(name: str, ancestor: Host, row: dict[str, str] | None, more: str) -> Host:
    """Return a catalogue entry from an ancestor's features and a row of the survey."""
    features = (ancestor.features or frozenset()) | set(more.split())
    assumed = f"features as {ancestor.name}" + (f" and {more}" if more else "")
    if row is None:
        facts = ancestor.replace(name=name, features=features, source=assumed)
    else:
        from_leaf_d = from_cpuid(of_row(row), name, row["file"])
        facts = from_leaf_d.replace(
            cpuid=None,
            features=features,
            mxcsr_mask=ancestor.mxcsr_mask,
            xsave=features & XSAVE_FEATURES,
            source=f"{row['file']}; {assumed}",
        )
    provenance = facts.provenance | {"features": "assumed", "xsave": "assumed"}
    provenance.pop("cpuid", None)
    return facts.replace(provenance=provenance | {"mxcsr_mask": "assumed"})


def of_qemu(samples: Path) -> Host:
    """Return QEMU's own CPU emulation, ``-accel tcg -cpu max``, from its expanded model."""
    dump = "q11-max-smp4-q35.json"
    props = json.loads((samples / "qemu" / dump).read_text())["model"]["model"]["props"]
    features = frozenset(name for name in FEATURES if props.get(qemu_name(name)) is True)
    layout = PRESETS["intel"].restricted(0x21F)
    return Host(
        "qemu-tcg-max",
        layout,
        0x21F,
        0,
        0x21F,
        0xFFFF,
        features,
        features & XSAVE_FEATURES,
        provenance=dict.fromkeys(
            ("layout", "xcr0", "xss", "kvm_xcr0", "mxcsr_mask", "features", "xsave"), "dump"
        ),
        source=f"QEMU 11.1 query-cpu-model-expansion ({dump})",
    )


def main(samples: Path) -> None:
    """Print the catalogue."""
    with open(samples / "cpuid" / "LAYOUTS.tsv", encoding="utf-8") as file:
        rows = {row["file"]: row for row in csv.DictReader(file, delimiter="\t")}
    hosts = {name: of_dump(name, samples, dump) for name, dump in DUMPS.items()}
    for name, (ancestor, row, more) in DESCENDANTS.items():
        hosts[name] = of_ancestor(name, hosts[ancestor], rows.get(row or ""), more)
    tcg = of_qemu(samples)
    hosts[tcg.name] = tcg
    print("# Written by docs/make_catalogue.py; see there.")
    print(to_toml(hosts[name] for name in sorted(hosts)), end="")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
