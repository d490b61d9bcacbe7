"""A modelled logical processor: the register file that the XSAVE family moves, and what rules it.

`Cpu` is a description, data only: what Intel and AMD do differently is a field of it.
`Processor` is one logical processor: every state component as bytes, and the control registers
that the instructions consult. `xfast.kvm.instructions` holds the instructions themselves.

*Source*: Intel SDM vol. 1 sections 13.1 to 13.6; AMD APM vol. 2 section 11.5.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xfast.xsave.features import (
    EXTENDED_OFFSET,
    FCW_INIT,
    MXCSR_INIT,
    MXCSR_MASK_AMD,
    MXCSR_MASK_INTEL,
    PKRU,
    bits,
)
from xfast.xsave.layout import PRESETS, Layout

X87_HEAD = slice(0, 24)
X87_STACK = slice(32, 160)
MXCSR_AT = slice(24, 28)
TILECFG_NR = 17
UINTR_NR = 14
UINV_AT = 20
"""Where the user-interrupt notification vector lies in the UINTR component."""

LEGACY_SIZES = {0: 160, 1: 256}
SIZES_OUTSIDE_64BIT = {1: 128, 2: 128, 6: 256, 7: 0}
"""Bytes of a component that exist outside 64-bit mode: XMM0-7, YMM0-7 and ZMM0-7.

*Source*: Intel SDM vol. 1 sections 13.5.2, 13.5.3 and 13.5.5.
"""


@dataclass(frozen=True)
class Cpu:
    """What CPUID says of a CPU's XSAVE family, and what CPUs do differently.

    Parameters
    ----------
    name : str
    layout : Layout
        The components that exist, and where each lies.
    xsave : frozenset of str
        The instructions beyond XSAVE and XRSTOR: ``xsaveopt``, ``xsavec``, ``xgetbv1``,
        ``xsaves``.
    mxcsr_mask : int
        MXCSR bits that may be set.
    keeps_x87_pointers : bool
        FOP, FIP and FDP are always loaded. Without it (AMD) they become 0 unless an unmasked
        exception is pending.
    extends_fdp : bool
        FDP is sign-extended to a canonical address, as FIP always is.
    finds_init : bool
        XINUSE is exact: a component whose value is the initial one is not in use, even where
        it was loaded from memory. The SDM allows either (section 13.6).
    mxcsr_counts_as_sse : bool
        XSAVE and XSAVEOPT, too, say that SSE is in use where only MXCSR is not 0x1F80.
    refuses_bv63 : bool
        XSTATE_BV[63] = 1 in a compacted area faults, though XCOMP_BV[63] = 1.
    always_saves_mxcsr : bool
        XSAVES writes MXCSR wherever SSE is in use. Without it (Intel), an unmodified MXCSR of
        0x1F80 is left out. Seen under KVM on Zen 4 and on Sapphire Rapids.
    linear_bits : int
        Bits of a linear address; pointers are sign-extended from the topmost.
    """

    name: str
    layout: Layout
    xsave: frozenset[str] = frozenset({"xsaveopt", "xsavec", "xgetbv1", "xsaves"})
    mxcsr_mask: int = MXCSR_MASK_INTEL
    keeps_x87_pointers: bool = True
    extends_fdp: bool = False
    finds_init: bool = True
    mxcsr_counts_as_sse: bool = False
    refuses_bv63: bool = True
    always_saves_mxcsr: bool = False
    linear_bits: int = 48


# Measured on Sapphire Rapids (family 6, user mode): components loaded with their initial value
# count as in use, MXCSR alone does not for XSAVE and XSAVEOPT, XSTATE_BV[63] = 1 faults, FIP is
# sign-extended from bit 56 and FDP keeps its 64 bits.
INTEL = Cpu("intel", PRESETS["intel"], finds_init=False, linear_bits=57)
AMD_ZEN4 = Cpu(
    "amd-zen4",
    PRESETS["amd-zen4"],
    mxcsr_mask=MXCSR_MASK_AMD,
    keeps_x87_pointers=False,
    extends_fdp=True,
    always_saves_mxcsr=True,
    linear_bits=57,
)

BY_VENDOR = {"GenuineIntel": INTEL, "AuthenticAMD": AMD_ZEN4, "HygonGenuine": AMD_ZEN4}
"""What is known of a vendor's CPUs; of others, `Cpu`'s defaults, which are the SDM's rules."""


class Processor:
    """One logical processor: a register file, XCR0 and the other registers that rule it.

    Parameters
    ----------
    cpu : Cpu
    xcr0, xss : int
        XCR0 and IA32_XSS (masks); by default every user component, and no supervisor one.

    Attributes
    ----------
    values : (size,) uint8
        The register file: every component's value, in the order and the form of a compacted
        area with all of the CPU's components. MXCSR is bytes 24 to 27; the rest of the header
        and of the legacy region is not used.
    tracked : int
        Components that may be in use (mask); `xinuse` says which are.
    xmodified : int
        Components written since the last XRSTOR or XRSTORS (SDM's XMODIFIED).
    xrstor_info : tuple or None
        (CPL, in VMX non-root operation, address, XCOMP_BV) of that last restore.
    xfd, xfd_err : int
        IA32_XFD and IA32_XFD_ERR.
    cpl, long_mode, guest, task_switched, osxsave : int and bool
        CPL, CS.L (64-bit mode), VMX non-root operation, CR0.TS, CR4.OSXSAVE.

    Raises
    ------
    ValueError
        If XCR0 or IA32_XSS have bits that the layout does not place.
    """

    def __init__(self, cpu: Cpu, xcr0: int | None = None, xss: int = 0) -> None:
        layout = cpu.layout
        self.cpu = cpu
        self.xcr0 = layout.user_mask if xcr0 is None else xcr0
        self.xss = xss
        for name, mask, room in (
            ("xcr0", self.xcr0, layout.user_mask),
            ("xss", xss, layout.mask & ~layout.user_mask),
        ):
            if mask & ~room:
                raise ValueError(
                    f"{name}: got {mask:#x}, needed components of {cpu.name}: {room:#x}"
                )
        self.offsets = {0: 0, 1: 160, **layout.compacted_offsets(layout.mask)}
        self.sizes = {**LEGACY_SIZES, **{slot.nr: slot.size for slot in layout.slots}}
        self._initial = _initial(layout)
        self.values = self._initial.copy()
        self.tracked = 0
        self.xmodified = layout.mask
        self.xrstor_info: tuple[int, bool, int, int] | None = None
        self.xfd = self.xfd_err = 0
        self.cpl = 3
        self.long_mode = self.osxsave = True
        self.guest = self.task_switched = False

    @property
    def mxcsr(self) -> int:
        """The MXCSR register."""
        return int.from_bytes(self.values[MXCSR_AT].tobytes(), "little")

    @mxcsr.setter
    def mxcsr(self, value: int) -> None:
        self.values[MXCSR_AT] = np.frombuffer(value.to_bytes(4, "little"), np.uint8)

    @property
    def xinuse(self) -> int:
        """The components that are not in their initial configuration (SDM's XINUSE; a mask).

        MXCSR takes no part. *Source*: Intel SDM vol. 1 section 13.6.
        """
        if not self.cpu.finds_init:
            return self.tracked
        return sum(1 << nr for nr in bits(self.tracked) if not self.is_init(nr))

    def size(self, nr: int) -> int:
        """Return the bytes of component `nr` that exist in the present mode."""
        return self.sizes[nr] if self.long_mode else SIZES_OUTSIDE_64BIT.get(nr, self.sizes[nr])

    def is_init(self, nr: int) -> bool:
        """Return whether component `nr` has its initial value, as far as the mode shows it."""
        values = self.values
        if nr == 0:
            head = FCW_INIT.to_bytes(2, "little") + bytes(22)
            return values[X87_HEAD].tobytes() == head and not values[X87_STACK].any()
        at = self.offsets[nr]
        return not values[at : at + self.size(nr)].any()

    def store(self, area: NDArray[np.uint8], nr: int, at: int, *, init: bool, rex_w: bool) -> None:
        """Copy component `nr`, or its initial value, to `area`, from byte `at` on."""
        source = self._initial if init else self.values
        if nr == 0:
            area[X87_HEAD] = source[X87_HEAD]
            area[X87_STACK] = source[X87_STACK]
            if not rex_w:
                area[12:16] = area[20:24] = 0
        else:
            own, size = self.offsets[nr], self.size(nr)
            area[at : at + size] = source[own : own + size]

    def load(self, area: NDArray[np.uint8], nr: int, at: int, *, rex_w: bool = True) -> None:
        """Copy component `nr` from `area`, where it starts at byte `at`."""
        if nr == 0:
            self.values[X87_HEAD] = area[X87_HEAD]
            self.values[X87_STACK] = area[X87_STACK]
            if not rex_w:
                self.values[12:16] = self.values[20:24] = 0
            self._settle_x87()
        else:
            own, size = self.offsets[nr], 4 if 1 << nr == PKRU else self.size(nr)
            self.values[own : own + size] = area[at : at + size]
            if nr == TILECFG_NR and not is_tilecfg(area[at : at + size].tobytes()):
                self.init(nr)
                return
        self.tracked |= 1 << nr

    def init(self, nr: int) -> None:
        """Give component `nr` its initial value; MXCSR stays."""
        if nr == 0:
            self.values[X87_HEAD] = self.values[X87_STACK] = 0
            self.values[:2] = FCW_INIT & 0xFF, FCW_INIT >> 8
        else:
            own = self.offsets[nr]
            self.values[own : own + self.size(nr)] = 0
        if self.size(nr) == self.sizes[nr]:
            self.tracked &= ~(1 << nr)

    def _settle_x87(self) -> None:
        """Give what was loaded the form in which the registers hold it.

        FCW bit 6 is 1, reserved bits are 0; FSW's ES and B follow from its exception flags and
        FCW's masks; FOP has 11 bits; pointers are canonical; each ST slot has 10 bytes.

        *Source*: Intel SDM vol. 1 sections 8.1.3 to 8.1.9; AMD APM vol. 2 section 11.4.4.
        """
        values = self.values
        fcw, fsw, _, fop = (int(word) for word in values[:8].view("<u2"))
        fcw = fcw & 0x1F7F | 0x40
        pending = fsw & ~fcw & 0x3F
        fsw = fsw & 0x7F7F | (0x8080 if pending else 0)
        if pending or self.cpu.keeps_x87_pointers:
            fip, fdp = (int(pointer) for pointer in values[8:24].view("<u8"))
            fip = sign_extend(fip, self.cpu.linear_bits)
            fdp = sign_extend(fdp, self.cpu.linear_bits) if self.cpu.extends_fdp else fdp
            fop &= 0x7FF
        else:
            fop = fip = fdp = 0
        values[:8].view("<u2")[:] = fcw, fsw, int(values[4]), fop
        values[8:24].view("<u8")[:] = fip, fdp
        values[X87_STACK].reshape(8, 16)[:, 10:] = 0


def _initial(layout: Layout) -> NDArray[np.uint8]:
    """Return a register file in its initial configuration."""
    values = np.zeros(max(layout.compacted_size(layout.mask), EXTENDED_OFFSET), np.uint8)
    values[:2] = FCW_INIT & 0xFF, FCW_INIT >> 8
    values[MXCSR_AT] = np.frombuffer(MXCSR_INIT.to_bytes(4, "little"), np.uint8)
    return values


def is_tilecfg(config: bytes) -> bool:
    """Return whether a TILECFG configures tiles; what does not is loaded as the initial value.

    Palette 1 has 8 tiles of up to 16 rows of 64 bytes; either both numbers are 0 or neither.
    A start_row beyond the rows is accepted.

    *Source*: Intel SDM vol. 2 LDTILECFG, CPUID leaf 1DH; measured on Sapphire Rapids: XRSTOR
    never faults over it.
    """
    rows, widths = config[48:56], struct.unpack_from("<8H", config, 16)
    return (
        config[0] == 1
        and not any(config[2:16] + config[32:48] + config[56:64])
        and all(row <= 16 and width <= 64 for row, width in zip(rows, widths, strict=True))
        and all(bool(row) == bool(width) for row, width in zip(rows, widths, strict=True))
    )


def sign_extend(pointer: int, width: int) -> int:
    """Return the low `width` bits of a pointer, the topmost of them repeated up to bit 63."""
    pointer &= (1 << width) - 1
    return pointer | -(pointer >> (width - 1)) << width & (1 << 64) - 1


__all__ = ["AMD_ZEN4", "BY_VENDOR", "INTEL", "Cpu", "Processor", "is_tilecfg", "sign_extend"]
