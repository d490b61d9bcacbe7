"""cpuinfo.img: the CPUs of the machine that made the dump, and the CPUID that they tell.

*Source*: CRIU images/cpuinfo.proto; compel/arch/x86/src/lib/include/uapi/asm/cpu.h.
"""

from __future__ import annotations

import struct
from typing import Any

from xfast.snapshots.criu.wire import Broken, fields
from xfast.snapshots.model import CpuInfo
from xfast.xsave.cpuid import Cpuid
from xfast.xsave.features import XFEATURE_MASK_FPSSE

CPUINFO_FIELDS = {
    1: "vendor_id",
    2: "cpu_family",
    3: "model",
    4: "stepping",
    5: "capability_ver",
    6: "capability",
    7: "model_id",
    8: "xfeatures_mask",
    9: "xsave_size",
    10: "xsave_size_max",
}

VENDOR_TEXT = {1: b"GenuineIntel", 2: b"AuthenticAMD"}
REGISTERS = ("eax", "ebx", "ecx", "edx")
CAPABILITY = {
    0: (1, 0, "edx"),
    1: (0x80000001, 0, "edx"),
    4: (1, 0, "ecx"),
    6: (0x80000001, 0, "ecx"),
    9: (7, 0, "ebx"),
    10: (0xD, 1, "eax"),
    11: (7, 0, "ecx"),
    13: (0x80000008, 0, "ebx"),
    18: (7, 0, "edx"),
}
"""Word of `capability` -> the CPUID leaf, sub-leaf and register that it is a copy of."""


def cpus_of(message: bytes) -> list[CpuInfo]:
    """Return what cpuinfo.img tells of each CPU.

    Raises
    ------
    Broken
        If a field is of another type than it is there.
    """
    cpus = []
    for number, entry, _ in fields(message):
        if number != 1 or not isinstance(entry, bytes):
            continue
        told: dict[str, Any] = {}
        words: list[int] = []
        for item in fields(entry):
            name = CPUINFO_FIELDS.get(item.number, "")
            value = item.value
            if name and isinstance(value, bytes) is not (name == "model_id"):
                raise Broken(
                    f"expected a number for {name} (a text for model_id), got another type"
                )
            if name == "capability":
                assert isinstance(value, int)
                words.append(value)
            elif name:
                told[name] = value if isinstance(value, int) else value.decode("latin-1")
        cpus.append(CpuInfo(capability=tuple(words), **told))
    return cpus


def cpuid_of(cpu: CpuInfo, used: int) -> Cpuid:
    """Return the dumping CPU's CPUID as far as cpuinfo.img tells it.

    Components in `used`, and x87 and SSE, are there whether ``xfeatures_mask`` has them or not.

    *Source*: CRIU compel/arch/x86/src/lib/include/uapi/asm/cpu.h (enum cpuid_leafs).
    """
    family, model, stepping = (cpu.cpu_family or 0, cpu.model or 0, cpu.stepping or 0)
    signature = (model & 0xF) << 4 | (model >> 4 & 0xF) << 16 | stepping & 0xF
    signature |= min(family, 0xF) << 8 | (max(family - 0xF, 0) & 0xFF) << 20
    leaves = [(leaf, subleaf) for leaf, subleaf, _ in CAPABILITY.values()]
    registers = {(*leaf, name): 0 for leaf in leaves for name in REGISTERS}
    for word, place in CAPABILITY.items():
        if word < len(cpu.capability):
            registers[place] = cpu.capability[word] & 0xFFFFFFFF
    registers[1, 0, "eax"] = signature
    rows = {leaf: [registers[*leaf, name] for name in REGISTERS] for leaf in leaves}
    ebx, edx, ecx = struct.unpack("<3I", VENDOR_TEXT.get(cpu.vendor_id or 0, bytes(12)))
    rows[0, 0] = [0xD, ebx, ecx, edx]
    mask = (cpu.xfeatures_mask or 0) | used | XFEATURE_MASK_FPSSE
    sizes = [(size or 0) & 0xFFFFFFFF for size in (cpu.xsave_size, cpu.xsave_size_max)]
    rows[0xD, 0] = [mask & 0xFFFFFFFF, *sizes, mask >> 32 & 0xFFFFFFFF]
    return Cpuid.from_rows(rows)
