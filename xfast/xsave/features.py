"""The component table: every XSAVE state component that xfast knows. Imports nothing.

One row a component; numbers and names are the SDM's, masks are the kernel's.

*Source*: Intel SDM vol. 1 section 13.1 and 13.4; AMD APM vol. 2 section 11.5;
Linux arch/x86/include/asm/fpu/types.h (enum xfeature) and xstate.h (the masks).
"""

from collections.abc import Iterator
from typing import NamedTuple


class Component(NamedTuple):
    """One state component, as the SDM and Intel CPUs describe it.

    `size` and `offset` (of the standard format, bytes) are Intel's; AMD differs, see
    `xfast.xsave.layout`. `offset` is 0 for supervisor components: they live in compacted areas
    only. `flag` is the CPUID feature, in /proc/cpuinfo's spelling, without which the kernel
    does not enable the component (empty: Linux never does).
    """

    nr: int
    name: str
    title: str
    size: int
    offset: int
    flag: str
    supervisor: bool = False
    align64: bool = False
    xfd: bool = False

    @property
    def bit(self) -> int:
        """The component's bit in XSTATE_BV, XCR0 or IA32_XSS."""
        return 1 << self.nr


COMPONENTS: tuple[Component, ...] = (
    Component(0, "x87", "x87 registers", 160, 0, "fpu"),
    Component(1, "sse", "XMM registers and MXCSR", 256, 160, "sse"),
    Component(2, "avx", "upper halves of YMM0-15", 256, 576, "avx"),
    Component(3, "bndregs", "MPX bounds registers", 64, 960, "mpx"),
    Component(4, "bndcsr", "MPX configuration and status", 64, 1024, "mpx"),
    Component(5, "opmask", "AVX-512 mask registers k0-k7", 64, 1088, "avx512f"),
    Component(6, "zmm_hi256", "upper halves of ZMM0-15", 512, 1152, "avx512f"),
    Component(7, "hi16_zmm", "ZMM16-31", 1024, 1664, "avx512f"),
    Component(8, "pt", "Processor Trace MSRs", 128, 0, "intel_pt", supervisor=True),
    Component(9, "pkru", "protection keys rights", 8, 2688, "pku"),
    Component(10, "pasid", "IA32_PASID", 8, 0, "enqcmd", supervisor=True),
    Component(11, "cet_u", "CET user state", 16, 0, "user_shstk", supervisor=True),
    Component(12, "cet_s", "CET supervisor state", 24, 0, "user_shstk", supervisor=True),
    Component(13, "hdc", "hardware duty cycling", 8, 0, "", supervisor=True),
    Component(14, "uintr", "user interrupts", 48, 0, "", supervisor=True),
    Component(15, "lbr", "architectural last branch records", 808, 0, "arch_lbr", supervisor=True),
    Component(16, "hwp", "hardware P-states request", 8, 0, "", supervisor=True),
    Component(17, "tilecfg", "AMX tile configuration", 64, 2752, "amx_tile", align64=True),
    Component(18, "tiledata", "AMX tile data", 8192, 2816, "amx_tile", align64=True, xfd=True),
    Component(19, "apx", "APX registers R16-R31", 128, 960, "apx_f"),
    Component(62, "lwp", "AMD lightweight profiling", 128, 832, ""),
)

BY_NR: dict[int, Component] = {c.nr: c for c in COMPONENTS}
BY_NAME: dict[str, Component] = {c.name: c for c in COMPONENTS}

X87, SSE, AVX, PKRU, TILEDATA, APX = (
    BY_NAME[name].bit for name in ("x87", "sse", "avx", "pkru", "tiledata", "apx")
)
SSE_NR, PKRU_NR, TILEDATA_NR = (BY_NAME[name].nr for name in ("sse", "pkru", "tiledata"))

PKRU_NR = BY_NAME["pkru"].nr

XFEATURE_MASK_FPSSE = X87 | SSE
XFEATURE_MASK_AVX512 = 0xE0
XFEATURE_MASK_MPX = 0x18
XFEATURE_MASK_XTILE = 0x60000
XFEATURE_MASK_USER_DYNAMIC = TILEDATA
SUPERVISOR_MASK = sum(c.bit for c in COMPONENTS if c.supervisor)
XCOMP_BV_COMPACTED = 1 << 63

LEGACY_SIZE = 512
HEADER_OFFSET = 512
HEADER_SIZE = 64
EXTENDED_OFFSET = 576
KVM_XSAVE_SIZE = 4096

FCW_INIT = 0x37F
MXCSR_INIT = 0x1F80
PKRU_DEFAULT = 0x55555554
"""What Linux gives every new task: access to key 0 only (mm/pkeys.c init_pkru_value)."""

MISALIGNED_SSE = 1 << 17
"""MXCSR's bit for misaligned operands, AMD's only."""

MXCSR_MASK_INTEL = 0xFFFF
MXCSR_MASK_AMD = 0x2FFFF


def bits(mask: int) -> Iterator[int]:
    """Yield the numbers of the bits set in `mask`, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def name_of(nr: int) -> str:
    """Return the name of component `nr`, or ``bit<nr>`` for one that nobody has defined."""
    component = BY_NR.get(nr)
    return component.name if component else f"bit{nr}"


def names_of(mask: int) -> str:
    """Return the names of the components in `mask`, ascending, joined by a plus sign."""
    return "+".join(name_of(nr) for nr in bits(mask)) or "none"


def parse_component(text: str) -> int:
    """Return the component number that `text` (a name, ``bit<nr>`` or a number) stands for.

    Raises
    ------
    ValueError
        If `text` names no component.
    """
    word = text.strip().lower()
    if word in BY_NAME:
        return BY_NAME[word].nr
    digits = word.removeprefix("bit")
    if digits.isdecimal() and int(digits) < 64:
        return int(digits)
    known = ", ".join(BY_NAME)
    raise ValueError(f"component: expected a number from 0 to 63 or one of {known}, got {text!r}")
