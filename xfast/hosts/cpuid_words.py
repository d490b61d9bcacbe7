"""The output of `cpuid` without ``-r``: CPUID in words, from which the rows are worked out again.

*Source*: the labels of `cpuid` 20230120 (etallen.com/cpuid.html); each was found by decoding a
dump with one bit set.
"""

from __future__ import annotations

from collections.abc import Iterator

from xfast.errors import FormatError
from xfast.hosts.derive import likely_layout
from xfast.hosts.dumps import Row, by_cpu, of_cpus
from xfast.hosts.model import Host
from xfast.xsave.cpuid import FEATURES

LABELS = {
    "PNI/SSE3: Prescott New Instructions": "pni",
    "PCLMULDQ instruction": "pclmulqdq",
    "SSSE3 extensions": "ssse3",
    "FMA instruction": "fma",
    "CMPXCHG16B instruction": "cx16",
    "PCID: process context identifiers": "pcid",
    "SSE4.1 extensions": "sse4_1",
    "SSE4.2 extensions": "sse4_2",
    "MOVBE instruction": "movbe",
    "POPCNT instruction": "popcnt",
    "AES instruction": "aes",
    "XSAVE/XSTOR states": "xsave",
    "OS-enabled XSAVE/XSTOR": "osxsave",
    "AVX: advanced vector extensions": "avx",
    "F16C half-precision convert instruction": "f16c",
    "RDRAND instruction": "rdrand",
    "x87 FPU on chip": "fpu",
    "CMPXCHG8B inst.": "cx8",
    "SYSENTER and SYSEXIT": "sep",
    "CMOV: conditional move/compare instr": "cmov",
    "CLFLUSH instruction": "clflush",
    "MMX Technology": "mmx",
    "FXSAVE/FXRSTOR": "fxsr",
    "SSE extensions": "sse",
    "SSE2 extensions": "sse2",
    "FSGSBASE instructions": "fsgsbase",
    "BMI1 instructions": "bmi1",
    "HLE hardware lock elision": "hle",
    "AVX2: advanced vector extensions 2": "avx2",
    "SMEP supervisor mode exec protection": "smep",
    "BMI2 instructions": "bmi2",
    "INVPCID instruction": "invpcid",
    "RTM: restricted transactional memory": "rtm",
    "MPX: intel memory protection extensions": "mpx",
    "AVX512F: AVX-512 foundation instructions": "avx512f",
    "AVX512DQ: double & quadword instructions": "avx512dq",
    "RDSEED instruction": "rdseed",
    "ADX instructions": "adx",
    "SMAP: supervisor mode access prevention": "smap",
    "AVX512IFMA: integer fused multiply add": "avx512ifma",
    "CLFLUSHOPT instruction": "clflushopt",
    "CLWB instruction": "clwb",
    "Intel processor trace": "intel_pt",
    "AVX512PF: prefetch instructions": "avx512pf",
    "AVX512ER: exponent & reciprocal instrs": "avx512er",
    "AVX512CD: conflict detection instrs": "avx512cd",
    "SHA instructions": "sha_ni",
    "AVX512BW: byte & word instructions": "avx512bw",
    "AVX512VL: vector length": "avx512vl",
    "AVX512VBMI: vector byte manipulation": "avx512vbmi",
    "UMIP: user-mode instruction prevention": "umip",
    "PKU protection keys for user-mode": "pku",
    "OSPKE CR4.PKE and RDPKRU/WRPKRU": "ospke",
    "WAITPKG instructions": "waitpkg",
    "AVX512_VBMI2: byte VPCOMPRESS, VPEXPAND": "avx512_vbmi2",
    "CET_SS: CET shadow stack": "user_shstk",
    "GFNI: Galois Field New Instructions": "gfni",
    "VAES instructions": "vaes",
    "VPCLMULQDQ instruction": "vpclmulqdq",
    "AVX512_VNNI: neural network instructions": "avx512_vnni",
    "AVX512_BITALG: bit count/shiffle": "avx512_bitalg",
    "AVX512: VPOPCNTDQ instruction": "avx512_vpopcntdq",
    "LA57: 57-bit addrs & 5-level paging": "la57",
    "RDPID: read processor ID supported": "rdpid",
    "MOVDIRI instruction": "movdiri",
    "MOVDIR64B instruction": "movdir64b",
    "ENQCMD instruction": "enqcmd",
    "AVX512_4VNNIW: neural network instrs": "avx512_4vnniw",
    "AVX512_4FMAPS: multiply acc single prec": "avx512_4fmaps",
    "UINTR: user interrupts": "uintr",
    "AVX512_VP2INTERSECT: intersect mask regs": "avx512_vp2intersect",
    "SERIALIZE instruction": "serialize",
    "TSXLDTRK: TSX suspend load addr tracking": "tsxldtrk",
    "LBR: architectural last branch records": "arch_lbr",
    "CET_IBT: CET indirect branch tracking": "ibt",
    "AMX-BF16: tile bfloat16 support": "amx_bf16",
    "AVX512_FP16: fp16 support": "avx512_fp16",
    "AMX-TILE: tile architecture support": "amx_tile",
    "AMX-INT8: tile 8-bit integer support": "amx_int8",
    "RAO-INT atomic instructions": "rao_int",
    "AVX-VNNI: AVX VNNI neural network instrs": "avx_vnni",
    "AVX512_BF16: bfloat16 instructions": "avx512_bf16",
    "CMPccXADD instructions": "cmpccxadd",
    "WRMSRNS instruction": "wrmsrns",
    "AMX-FP16: FP16 tile operations": "amx_fp16",
    "HRESET: history reset support": "hreset",
    "AVX-IFMA: integer fused multiply add": "avx_ifma",
    "LAM: linear address masking": "lam",
    "AVX-VNNI-INT8 instructions": "avx_vnni_int8",
    "AVX-NE-CONVERT instructions": "avx_ne_convert",
    "XSAVEOPT instruction": "xsaveopt",
    "XSAVEC instruction": "xsavec",
    "XGETBV instruction": "xgetbv1",
    "XSAVES/XRSTORS instructions": "xsaves",
    "XFD: extended feature disable supported": "xfd",
    "LAHF/SAHF supported in 64-bit mode": "lahf_lm",
    "LZCNT advanced bit manipulation": "abm",
    "SSE4A support": "sse4a",
    "misaligned SSE mode": "misalignsse",
    "XOP support": "xop",
    "lightweight profiling support": "lwp",
    "4-operand FMA instruction": "fma4",
    "TBM support": "tbm",
    "MWAITX/MONITORX supported": "mwaitx",
    "SYSCALL and SYSRET instructions": "syscall",
    "execution disable": "nx",
    "no-execute page protection": "nx",
    "AMD multimedia instruction extensions": "mmxext",
    "1-GB large page support": "pdpe1gb",
    "RDTSCP": "rdtscp",
    "64-bit extensions technology available": "lm",
    "long mode (AA-64)": "lm",
    "3DNow! instruction extensions": "3dnowext",
    "3DNow! instructions": "3dnow",
    "CLZERO instruction": "clzero",
    "always save/restore error pointers": "xsaveerptr",
    "RDPRU instruction": "rdpru",
    "WBNOINVD instruction": "wbnoinvd",
}
"""{what `cpuid` calls a feature: its name in FEATURES}."""

AMD_SSE = "SSE extensions"
"""The label of ``sse`` in leaf 1, and of ``fxsr_opt`` in AMD's leaf 0x80000001."""

VERSION_FIELDS = {
    "stepping id": 0, "model": 4, "family": 8, "extended model": 16, "extended family": 20,
}  # fmt: skip
"""{field of leaf 1 EAX: its shift}."""

STATE_NUMBERS = {
    "XCR0 valid bit field mask": "xcr0",
    "bytes required by fields in XCR0": "ebx",
    "bytes required by XSAVE/XRSTOR area": "ecx",
    "SAVE area size in bytes": "size",
    "IA32_XSS valid bit field mask": "xss",
}


def is_words(text: str) -> bool:
    """Return whether `text` is of this kind."""
    return "   vendor_id = " in text or "XCR0 valid bit field mask" in text


def read(text: str, name: str, path: str) -> Host:
    """Return the host that the output of `cpuid` describes.

    Raises
    ------
    FormatError
        If there is no CPU in it.
    """
    rows = [row for cpu in _cpus(text) for row in cpu.rows()]
    if not rows:
        raise FormatError(path, None, "expected the output of cpuid, got no CPU in it")
    host = of_cpus(by_cpu(rows), name, path)
    if host.xcr0 is None or host.layout is None or host.layout.slots or host.cpuid is None:
        return host
    total = host.cpuid.find(0xD)
    size = total.ecx if total and total.ecx else None
    layout = likely_layout(host.xcr0, host.vendor, None, size)
    how = {} if layout is None else {"layout": "assumed"}
    return host.replace(layout=layout, provenance={**host.provenance, **how})


class _Cpu:
    """The rows of one CPU, as its lines are read."""

    def __init__(self) -> None:
        self.vendor = ""
        self.signature = 0
        self.features: set[str] = set()
        self.leaves: set[tuple[int, int]] = set()
        self.state: dict[str, int] = {}
        self.slots: dict[int, list[int]] = {}
        self.section = ""

    def take(self, line: str) -> None:
        """Read one line: the head of a section, or a label and its value."""
        label, equals, value = line.partition("=")
        label, value = label.strip(), value.strip()
        if not equals:
            self.section = label
        elif label == "vendor_id":
            self.vendor = value.strip('"')
        elif label in VERSION_FIELDS and self.section.startswith("version information"):
            self.signature |= (_number(value) & 0xFF) << VERSION_FIELDS[label]
        elif label in STATE_NUMBERS:
            self.state[STATE_NUMBERS[label]] = _number(value)
        elif "(0xd/" in self.section:
            self._take_state(label, value)
        if label in LABELS and value in ("true", "false"):
            name = LABELS[label]
            if label == AMD_SSE and self.section.startswith("extended feature flags"):
                name = "fxsr_opt"
            self.leaves.add((FEATURES[name].leaf, FEATURES[name].subleaf))
            self.features |= {name} if value == "true" else set()

    def _take_state(self, label: str, value: str) -> None:
        """Read one line of a sub-leaf of leaf 0xD: [size, offset, ecx]."""
        nr = _number(self.section.partition("(0xd/")[2].partition(")")[0])
        if not 2 <= nr < 64:
            return
        slot = self.slots.setdefault(nr, [0, 0, 0])
        if label.endswith("byte size"):
            slot[0] = _number(value) & 0xFFFFFFFF
        elif label.endswith("byte offset"):
            slot[1] = _number(value) & 0xFFFFFFFF
        elif label == "supported in IA32_XSS or XCR0":
            slot[2] |= int(value.startswith("IA32_XSS"))
        elif label.startswith("64-byte alignment"):
            slot[2] |= int(value == "true") << 1
        elif label.startswith("XFD faulting"):
            slot[2] |= int(value == "true") << 2

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the leaves that were told."""
        text = self.vendor.encode("ascii", "replace")[:12].ljust(12, b"\0")
        ebx, edx, ecx = (int.from_bytes(text[i : i + 4], "little") for i in (0, 4, 8))
        yield 0, 0, 0xD if self.leaves or self.state else 0, ebx, ecx, edx
        registers = {
            (*leaf, name): 0 for leaf in self.leaves for name in ("eax", "ebx", "ecx", "edx")
        }
        for name in self.features:
            feature = FEATURES[name]
            registers[feature.leaf, feature.subleaf, feature.register] |= 1 << feature.bit
        if (1, 0) in self.leaves:
            registers[1, 0, "eax"] = self.signature
        state = self.state
        if "xcr0" in state:
            low, high = state["xcr0"] & 0xFFFFFFFF, state["xcr0"] >> 32 & 0xFFFFFFFF
            yield 0xD, 0, low, state.get("ebx", 0), state.get("ecx", 0), high
            flags = registers.get((0xD, 1, "eax"), 0)
            xss = state.get("xss", 0)
            yield 0xD, 1, flags, state.get("size", 0), xss & 0xFFFFFFFF, xss >> 32 & 0xFFFFFFFF
        for nr, (size, offset, ecx) in sorted(self.slots.items()):
            yield 0xD, nr, size, offset, ecx, 0
        for leaf in sorted(self.leaves - {(0xD, 1)}):
            eax, ebx, ecx, edx = (registers[*leaf, name] for name in ("eax", "ebx", "ecx", "edx"))
            yield *leaf, eax, ebx, ecx, edx


def _cpus(text: str) -> Iterator[_Cpu]:
    """Yield the CPUs of the output; ``CPU:`` or ``CPU 3:`` begins each."""
    cpu: _Cpu | None = None
    for line in text.splitlines():
        if (line.startswith("CPU") and line.rstrip().endswith(":")) or cpu is None:
            if cpu is not None and cpu.vendor:
                yield cpu
            cpu = _Cpu()
        cpu.take(line[:200])
    if cpu is not None and (cpu.vendor or cpu.state):
        yield cpu


def _number(text: str) -> int:
    """Return the number at the start of ``0x0000000f (15)``, or 0."""
    word = text.split(maxsplit=1)[0] if text else ""
    try:
        return int(word, 0) if len(word) <= 18 else 0
    except ValueError:
        return 0
