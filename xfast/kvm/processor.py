"""A modelled logical processor: the register file that the XSAVE family moves, and what rules it.

`Cpu` is a description, data only: what Intel and AMD do differently is a field of it.
`Processor` is one logical processor: every state component as bytes, and the control registers
that the instructions consult. `xfast.kvm.instructions` holds the instructions themselves.

*Source*: Intel SDM vol. 1 sections 13.1 to 13.6; AMD APM vol. 2 section 11.5.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from xfast.hosts.silicon import generation
from xfast.xsave.features import (
    EXTENDED_OFFSET,
    FCW_INIT,
    MXCSR_INIT,
    MXCSR_MASK_AMD,
    MXCSR_MASK_INTEL,
    PKRU_NR,
    bits,
)
from xfast.xsave.layout import PRESETS, Layout

X87_HEAD = slice(0, 24)
X87_STACK = slice(32, 160)
X87_HEAD_FORM = struct.Struct("<HHBxHQQ")
"""FCW, FSW, the abridged FTW, FOP, FIP, FDP."""
X87_HEAD_INIT = X87_HEAD_FORM.pack(FCW_INIT, 0, 0, 0, 0, 0)
FSW_EXCEPTIONS, FSW_ES, FSW_B = 0x3F, 0x80, 0x8000
PKRU_SIZE = 4
"""Bytes of PKRU that hold the register; the component has 8."""
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
    saves_x87_pointers : bool
        Saves write FOP, FIP and FDP whatever x87's flags are. Without it (AMD) they write 0
        unless an unmasked exception is pending; the registers keep what was loaded.
    keeps_x87_selectors : bool
        FCS and FDS exist: the 32-bit forms load and save them, and a 64-bit restore makes them
        0. Without it (CPUID leaf 7 EBX bit 13) they are always 0.
    works_out_es : bool
        FSW's ES and B follow from its exception flags and FCW's masks, whatever memory says of
        them. Without it, memory's ES stays, and B follows it.
    x87_pointer_bits : int or None
        FIP has so many bits, 48 or 57; the topmost is repeated up to bit 63. Neither CPUID nor
        CR4 tells. None: not known, and pointers stay as they were loaded, which is right for
        those that are canonical with 48 bits.
    extends_fdp : bool
        FDP is sign-extended as FIP is. Without it, FDP keeps its 64 bits.
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
        Bits of a linear address, 57 with LA57: what XRSTORS takes for canonical in CET's state.
    pkru_bytes : int or None
        Of PKRU's 8 bytes, saves write so many: 4, or 8 of which the upper ones are 0. None: not
        known; the model writes 8.
    pkru_always_modified : bool or None
        The modified optimisation of XSAVEOPT never leaves PKRU out. None: not known; the model
        treats it as any other component.
    """

    name: str
    layout: Layout
    xsave: frozenset[str] = frozenset({"xsaveopt", "xsavec", "xgetbv1", "xsaves"})
    mxcsr_mask: int = MXCSR_MASK_INTEL
    saves_x87_pointers: bool = True
    keeps_x87_selectors: bool = False
    works_out_es: bool = True
    x87_pointer_bits: int | None = None
    extends_fdp: bool = False
    finds_init: bool = True
    mxcsr_counts_as_sse: bool = False
    refuses_bv63: bool = True
    always_saves_mxcsr: bool = False
    linear_bits: int = 48
    pkru_bytes: int | None = None
    pkru_always_modified: bool | None = None


# Measured on Sapphire Rapids (family 6, user mode): components loaded with their initial value
# count as in use, MXCSR alone does not for XSAVE and XSAVEOPT, XSTATE_BV[63] = 1 faults, and FDP
# keeps its 64 bits. FCS and FDS are gone since Haswell.
INTEL = Cpu("intel", PRESETS["intel"], finds_init=False)
SAPPHIRE_RAPIDS = replace(INTEL, name="sapphire-rapids", x87_pointer_bits=57)

# PKRU was measured on Emerald Rapids: four bytes, and left out by XSAVEOPT where unmodified.
EMERALD_RAPIDS = replace(
    INTEL, name="emerald-rapids", x87_pointer_bits=57, pkru_bytes=4, pkru_always_modified=False
)

# Measured on Zen 3 and Zen 4 (family 25, user mode). PKRU on Zen 3 only: the Zen 4 had none.
AMD = Cpu(
    "amd",
    PRESETS["amd-zen4"],
    mxcsr_mask=MXCSR_MASK_AMD,
    saves_x87_pointers=False,
    keeps_x87_selectors=True,
    extends_fdp=True,
    always_saves_mxcsr=True,
)
ZEN3 = replace(
    AMD,
    name="amd-zen3",
    layout=PRESETS["amd-zen3"],
    x87_pointer_bits=48,
    pkru_bytes=4,
    pkru_always_modified=True,
)
ZEN4 = replace(AMD, name="amd-zen4", x87_pointer_bits=57)

BY_GENERATION = {
    "zen3": ZEN3,
    "zen4": ZEN4,
    "sapphire-rapids": SAPPHIRE_RAPIDS,
    "emerald-rapids": EMERALD_RAPIDS,
}
"""CPUs that were measured, by the names of `xfast.hosts.silicon`."""

BY_VENDOR = {"GenuineIntel": INTEL, "AuthenticAMD": AMD, "HygonGenuine": AMD}
"""What is known of a vendor's CPUs; of others, `Cpu`'s defaults, which are the SDM's rules."""


def cpu_by_model(vendor: str | None, family: int | None = None, model: int | None = None) -> Cpu:
    """Return what is known of a CPU: measured on its like, or true of all of its vendor's.

    Family and model are those that CPUID leaf 1 works out to.
    """
    known = generation(vendor, family, model)
    common = BY_VENDOR.get(vendor or "", Cpu(vendor or "unknown", PRESETS["intel"]))
    if known is None:
        return common
    return BY_GENERATION.get(known.name) or replace(common, x87_pointer_bits=known.x87_pointer_bits)


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
    fcs, fds : int
        x87's selectors, for the 32-bit forms; FIP and FDP in `values` have 64 bits.
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
                    f"{name}: expected components of {cpu.name}, {room:#x}, got {mask:#x}"
                )
        self.offsets = {0: 0, 1: 160, **layout.compacted_offsets(layout.mask)}
        self.sizes = {**LEGACY_SIZES, **{slot.nr: slot.size for slot in layout.slots}}
        self._initial = _initial(layout)
        self.values = self._initial.copy()
        self.tracked = 0
        self.xmodified = layout.mask
        self.xrstor_info: tuple[int, bool, int, int] | None = None
        self.fcs = self.fds = 0
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
            return self._x87_head() == X87_HEAD_INIT and not values[X87_STACK].any()
        at = self.offsets[nr]
        return not values[at : at + self.size(nr)].any()

    def store(self, area: NDArray[np.uint8], nr: int, at: int, *, init: bool, rex_w: bool) -> None:
        """Copy component `nr`, or its initial value, to `area`, from byte `at` on."""
        source = self._initial if init else self.values
        if nr == 0:
            head = X87_HEAD_INIT if init else self._x87_head(rex_w)
            area[X87_HEAD] = np.frombuffer(head, np.uint8)
            area[X87_STACK] = source[X87_STACK]
        else:
            own, size = self.offsets[nr], self.size(nr)
            if nr == PKRU_NR and self.cpu.pkru_bytes:
                size = self.cpu.pkru_bytes
            area[at : at + size] = source[own : own + size]

    def load(self, area: NDArray[np.uint8], nr: int, at: int, *, rex_w: bool = True) -> None:
        """Copy component `nr` from `area`, where it starts at byte `at`."""
        if nr == 0:
            self._load_x87(area, rex_w)
        else:
            own, size = self.offsets[nr], PKRU_SIZE if nr == PKRU_NR else self.size(nr)
            self.values[own : own + size] = area[at : at + size]
            if nr == TILECFG_NR and not is_tilecfg(area[at : at + size].tobytes()):
                self.init(nr)
                return
        self.tracked |= 1 << nr

    def write(self, nr: int, at: int, data: bytes) -> None:
        """Do what an instruction does that writes component `nr`, from its byte `at` on.

        The component is in use and modified from then on.
        """
        start = self.offsets[nr] + at
        self.values[start : start + len(data)] = np.frombuffer(data, np.uint8)
        self.tracked |= 1 << nr
        self.xmodified |= 1 << nr

    def init(self, nr: int) -> None:
        """Give component `nr` its initial value; MXCSR stays."""
        if nr == 0:
            self.values[X87_HEAD] = self.values[X87_STACK] = 0
            self.values[:2] = FCW_INIT & 0xFF, FCW_INIT >> 8
            self.fcs = self.fds = 0
        else:
            own = self.offsets[nr]
            self.values[own : own + self.size(nr)] = 0
        if self.size(nr) == self.sizes[nr]:
            self.tracked &= ~(1 << nr)

    def _load_x87(self, area: NDArray[np.uint8], rex_w: bool) -> None:
        """Load x87, in the form in which the registers hold it.

        FCW bit 6 is 1, reserved bits are 0; FOP has 11 bits; each ST slot has 10 bytes. The
        32-bit form has pointers of 32 bits, and selectors.

        *Source*: Intel SDM vol. 1 sections 8.1.3 to 8.1.9; AMD APM vol. 2 section 11.4.4.
        """
        fcw, fsw, ftw, fop, fip, fdp = X87_HEAD_FORM.unpack(area[X87_HEAD].tobytes())
        self.fcs = self.fds = 0
        if not rex_w:
            if self.cpu.keeps_x87_selectors:
                self.fcs, self.fds = fip >> 32 & 0xFFFF, fdp >> 32 & 0xFFFF
            fip, fdp = fip & 0xFFFFFFFF, fdp & 0xFFFFFFFF
        width = self.cpu.x87_pointer_bits or 64
        fip = sign_extend(fip, width)
        fdp = sign_extend(fdp, width) if self.cpu.extends_fdp else fdp
        fcw = fcw & 0x1F7F | 0x40
        head = X87_HEAD_FORM.pack(fcw, self.status_word(fcw, fsw), ftw, fop & 0x7FF, fip, fdp)
        self.values[X87_HEAD] = np.frombuffer(head, np.uint8)
        self.values[X87_STACK] = area[X87_STACK]
        self.values[X87_STACK].reshape(8, 16)[:, 10:] = 0

    def status_word(self, fcw: int, fsw: int) -> int:
        """Return FSW with its summary bits, ES and B, as they are for these flags and masks."""
        pending = fsw & ~fcw & FSW_EXCEPTIONS if self.cpu.works_out_es else fsw & FSW_ES
        return fsw | FSW_ES | FSW_B if pending else fsw & ~(FSW_ES | FSW_B)

    def _x87_head(self, rex_w: bool = True) -> bytes:
        """Return the bytes before MXCSR as a save writes them.

        *Source*: Intel SDM vol. 1 section 8.1.3 (ES and B); AMD APM vol. 2 section 11.4.4 (the
        pointers); measured on Zen 3: with ES = 0 the registers keep the pointers, and an FLDCW
        that unmasks the exception brings them back to what a save writes.
        """
        fcw, fsw, ftw, fop, fip, fdp = X87_HEAD_FORM.unpack(self.values[X87_HEAD].tobytes())
        fsw = self.status_word(fcw, fsw)
        if not (fsw & FSW_ES or self.cpu.saves_x87_pointers):
            fop = fip = fdp = 0
        elif not rex_w:
            fip, fdp = fip & 0xFFFFFFFF | self.fcs << 32, fdp & 0xFFFFFFFF | self.fds << 32
        return X87_HEAD_FORM.pack(fcw, fsw, ftw, fop, fip, fdp)


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


__all__ = [
    "AMD",
    "BY_VENDOR",
    "INTEL",
    "SAPPHIRE_RAPIDS",
    "ZEN3",
    "ZEN4",
    "Cpu",
    "Processor",
    "cpu_by_model",
    "is_tilecfg",
    "sign_extend",
]
