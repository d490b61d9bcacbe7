"""XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR, XRSTORS and XGETBV on a modelled processor.

Each function is one section of the SDM, in its order: faults first, then the header, then the
components. An area is a (size,) uint8 array: the memory from the operand's address on. A fault
raises `Fault`, which names the rule that was broken; FAULTS lists them all.

After a fault nothing has changed. Of faults over the *content* of a component (MXCSR, CET,
UINTR) a CPU promises less: other components may already be loaded.

*Source*: Intel SDM vol. 1 sections 13.7 to 13.14; AMD APM vol. 4 (the same instructions).
Checked against recordings of Zen 3, Zen 4, Emerald Rapids and emulated Intel CPUs, and live.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast.errors import XfastError
from xfast.kvm.processor import UINTR_NR, UINV_AT, Processor, sign_extend
from xfast.xsave.features import (
    AVX,
    EXTENDED_OFFSET,
    MXCSR_INIT,
    PKRU,
    SSE,
    XCOMP_BV_COMPACTED,
    XFEATURE_MASK_FPSSE,
    bits,
    names_of,
)

Area = NDArray[np.uint8]

CET_U_NR, CET_S_NR = 11, 12
CET_RESERVED, CET_SUPPRESS, CET_TRACKER = 0x3C0, 0x400, 0x800
"""IA32_U_CET: bits 9:6 are reserved, and SUPPRESS may not meet a TRACKER that waits.

*Source*: Intel SDM vol. 1 chapter 17 (the CET MSRs); the recordings of emulated CPUs.
"""


class Rule(NamedTuple):
    """One reason to fault. `vector` is the exception's mnemonic."""

    name: str
    vector: str
    when: str
    ref: str


_RULES = (
    Rule("lock", "#UD", "the LOCK prefix is used", "SDM vol. 2, Exceptions of each instruction"),
    Rule("osxsave", "#UD", "CR4.OSXSAVE is 0", "SDM vol. 1 section 13.7"),
    Rule("unsupported", "#UD", "CPUID leaf 0xD.1 does not announce it", "SDM vol. 1 section 13.2"),
    Rule("task-switched", "#NM", "CR0.TS is 1", "SDM vol. 1 section 13.7"),
    Rule("cpl", "#GP", "XSAVES or XRSTORS outside CPL 0", "SDM vol. 1 sections 13.11, 13.12"),
    Rule("alignment", "#GP", "the address is no multiple of 64", "SDM vol. 1 section 13.7"),
    Rule("bv-xcr0", "#GP", "standard: XSTATE_BV has bits outside XCR0", "SDM vol. 1 13.8.1"),
    Rule("header-8-23", "#GP", "standard: header bytes 8 to 23 are not 0", "SDM vol. 1 13.8.1"),
    Rule("standard", "#GP", "XRSTORS from a standard-format area", "SDM vol. 1 section 13.12"),
    Rule("xcomp", "#GP", "XCOMP_BV has bits outside XCR0 (XRSTORS: and XSS)", "SDM vol. 1 13.8.2"),
    Rule("bv-xcomp", "#GP", "compacted: XSTATE_BV has bits outside XCOMP_BV", "SDM vol. 1 13.8.2"),
    Rule("header-16-63", "#GP", "compacted: header bytes 16 to 63 are not 0", "SDM vol. 1 13.8.2"),
    Rule("mxcsr", "#GP", "MXCSR has bits outside MXCSR_MASK", "SDM vol. 1 section 13.8"),
    Rule("cet", "#GP", "reserved or non-canonical CET state", "SDM vol. 1 section 13.5.9"),
    Rule("uintr", "#GP", "UINTR would be loaded while UINV is not 0", "SDM vol. 1 13.5.11"),
    Rule("xfd", "#NM", "a component to load is disabled by IA32_XFD", "SDM vol. 1 section 13.14"),
    Rule("xcr", "#GP", "XGETBV of a register that is not there", "SDM vol. 2, XGETBV"),
)

FAULTS: dict[str, Rule] = {rule.name: rule for rule in _RULES}


class Fault(XfastError):
    """An instruction faulted.

    Attributes
    ----------
    rule : Rule
        The row of FAULTS.
    """

    def __init__(self, name: str, detail: str = "") -> None:
        self.rule = FAULTS[name]
        super().__init__(
            f"{self.rule.vector} ({name}): {detail or self.rule.when} [{self.rule.ref}]"
        )


def xgetbv(cpu: Processor, index: int) -> int:
    """Return XCR0 (`index` 0), or XINUSE limited to XCR0 (`index` 1).

    With index 1, bit 1 is also set where MXCSR is not 0x1F80.

    *Source*: Intel SDM vol. 1 sections 13.3 and 13.6.
    """
    if not cpu.osxsave:
        raise Fault("osxsave")
    if index == 0:
        return cpu.xcr0
    if index != 1 or "xgetbv1" not in cpu.cpu.xsave:
        raise Fault("xcr", f"XCR{index}")
    return cpu.xcr0 & _with_mxcsr(cpu, cpu.xinuse)


def xsave(
    cpu: Processor,
    area: Area,
    rfbm: int,
    *,
    address: int = 0,
    rex_w: bool = True,
    lock: bool = False,
) -> None:
    """Save every component of `rfbm` & XCR0, in standard format.

    Parameters
    ----------
    cpu : Processor
    area : (size,) uint8
    rfbm : int
        The instruction mask, EDX:EAX.
    address : int
        The operand's address, for alignment and the modified optimisation.
    rex_w : bool
        The 64-bit form (XSAVE64): without it, FIP and FDP have 32 bits.
    lock : bool
        A LOCK prefix, which faults.

    Raises
    ------
    Fault
        If the instruction would fault.
    ValueError
        If `area` is shorter than what the instruction accesses.

    *Source*: Intel SDM vol. 1 section 13.7.
    """
    rfbm = _begin(cpu, "xsave", address, lock) & rfbm
    _save_standard(cpu, area, rfbm, rfbm, rex_w)


def xsaveopt(
    cpu: Processor,
    area: Area,
    rfbm: int,
    *,
    address: int = 0,
    rex_w: bool = True,
    lock: bool = False,
) -> None:
    """Save as `xsave` does, but write only what is in use and was modified since it was loaded.

    *Source*: Intel SDM vol. 1 section 13.9.
    """
    rfbm = _begin(cpu, "xsaveopt", address, lock) & rfbm
    write = rfbm & _in_use_standard(cpu) & _modified(cpu, address, 0)
    _save_standard(cpu, area, rfbm, write, rex_w)


def xsavec(
    cpu: Processor,
    area: Area,
    rfbm: int,
    *,
    address: int = 0,
    rex_w: bool = True,
    lock: bool = False,
) -> None:
    """Save the components of `rfbm` & XCR0 that are in use, in compacted format.

    *Source*: Intel SDM vol. 1 section 13.10.
    """
    rfbm = _begin(cpu, "xsavec", address, lock) & rfbm
    _save_compacted(cpu, area, rfbm, cpu.cpu.layout.mask, rex_w)


def xsaves(
    cpu: Processor,
    area: Area,
    rfbm: int,
    *,
    address: int = 0,
    rex_w: bool = True,
    lock: bool = False,
) -> None:
    """Save the components of `rfbm` & (XCR0 | IA32_XSS) that are in use and were modified.

    *Source*: Intel SDM vol. 1 section 13.11.
    """
    rfbm = _begin(cpu, "xsaves", address, lock) & rfbm
    _save_compacted(cpu, area, rfbm, _modified(cpu, address, rfbm | XCOMP_BV_COMPACTED), rex_w)
    if rfbm >> UINTR_NR & 1:
        cpu.values[cpu.offsets[UINTR_NR] + UINV_AT] = 0


def xrstor(
    cpu: Processor,
    area: Area,
    rfbm: int,
    *,
    address: int = 0,
    rex_w: bool = True,
    lock: bool = False,
) -> None:
    """Load the components of `rfbm` & XCR0; the format is the area's.

    *Source*: Intel SDM vol. 1 section 13.8.
    """
    rfbm = _begin(cpu, "xrstor", address, lock) & rfbm
    if "xsavec" in cpu.cpu.xsave and _load64(area, 520) & XCOMP_BV_COMPACTED:
        _restore_compacted(cpu, area, rfbm, cpu.xcr0, address, rex_w)
    else:
        _restore_standard(cpu, area, rfbm, address, rex_w)


def xrstors(
    cpu: Processor,
    area: Area,
    rfbm: int,
    *,
    address: int = 0,
    rex_w: bool = True,
    lock: bool = False,
) -> None:
    """Load the components of `rfbm` & (XCR0 | IA32_XSS) from a compacted area.

    *Source*: Intel SDM vol. 1 section 13.12.
    """
    rfbm = _begin(cpu, "xrstors", address, lock) & rfbm
    if not _load64(area, 520) & XCOMP_BV_COMPACTED:
        raise Fault("standard")
    _restore_compacted(cpu, area, rfbm, cpu.xcr0 | cpu.xss, address, rex_w)


def _begin(cpu: Processor, name: str, address: int, lock: bool) -> int:
    """Raise the faults that come before memory is accessed; return the components in reach."""
    supervisor = name in ("xsaves", "xrstors")
    needed = "xsaves" if supervisor else name
    if lock:
        raise Fault("lock")
    if not cpu.osxsave:
        raise Fault("osxsave")
    if needed not in cpu.cpu.xsave | {"xsave", "xrstor"}:
        raise Fault("unsupported", name.upper())
    if cpu.task_switched:
        raise Fault("task-switched")
    if supervisor and cpu.cpl:
        raise Fault("cpl", f"CPL {cpu.cpl}")
    if address % 64:
        raise Fault("alignment", f"address {address:#x}")
    return cpu.xcr0 | cpu.xss if supervisor else cpu.xcr0


def _with_mxcsr(cpu: Processor, inuse: int) -> int:
    """Return XINUSE with SSE's bit also set where MXCSR is not 0x1F80."""
    return inuse | SSE if cpu.mxcsr != MXCSR_INIT else inuse


def _in_use_standard(cpu: Processor) -> int:
    """Return what the standard-format saves count as in use; XFD makes a component initial."""
    inuse = cpu.xinuse & ~cpu.xfd
    return _with_mxcsr(cpu, inuse) if cpu.cpu.mxcsr_counts_as_sse else inuse


def _modified(cpu: Processor, address: int, xcomp_bv: int) -> int:
    """Return the components that the modified optimisation does not leave out (mask).

    *Source*: Intel SDM vol. 1 sections 13.9 and 13.11, the conditions on XRSTOR_INFO.
    """
    if cpu.xrstor_info == (cpu.cpl, cpu.guest, address, xcomp_bv):
        return cpu.xmodified | (PKRU if cpu.cpu.pkru_always_modified else 0)
    return cpu.cpu.layout.mask


def _save_standard(cpu: Processor, area: Area, rfbm: int, write: int, rex_w: bool) -> None:
    """Write the components in `write`, and the header for those in `rfbm`."""
    layout = cpu.cpu.layout
    _check_size(area, layout.standard_size(write))
    inuse = _in_use_standard(cpu)
    if rfbm & (SSE | AVX):
        _store_mxcsr(cpu, area)
    for nr in bits(write):
        at = layout.slot(nr).offset if nr > 1 else cpu.offsets[nr]
        cpu.store(area, nr, at, init=not inuse >> nr & 1, rex_w=rex_w)
    _store64(area, 512, _load64(area, 512) & ~rfbm | inuse & rfbm)


def _save_compacted(cpu: Processor, area: Area, rfbm: int, modified: int, rex_w: bool) -> None:
    """Write what is in use of `rfbm` and in `modified`; init components leave a hole."""
    layout = cpu.cpu.layout
    _check_size(area, layout.compacted_size(rfbm))
    inuse = _with_mxcsr(cpu, cpu.xinuse & ~cpu.xfd) & rfbm
    offsets = {**cpu.offsets, **layout.compacted_offsets(rfbm)}
    unmodified = not modified & SSE and cpu.mxcsr == MXCSR_INIT
    if inuse & SSE and (cpu.cpu.always_saves_mxcsr or not unmodified):
        _store_mxcsr(cpu, area)
    for nr in bits(inuse & modified):
        cpu.store(area, nr, offsets[nr], init=False, rex_w=rex_w)
    _store64(area, 512, inuse)
    _store64(area, 520, rfbm | XCOMP_BV_COMPACTED)


def _restore_standard(cpu: Processor, area: Area, rfbm: int, address: int, rex_w: bool) -> None:
    """Restore from a standard-format area. *Source*: Intel SDM vol. 1 section 13.8.1."""
    layout = cpu.cpu.layout
    xstate_bv = _load64(area, 512)
    if xstate_bv & ~cpu.xcr0:
        raise Fault("bv-xcr0", f"XSTATE_BV {xstate_bv:#x}, XCR0 {cpu.xcr0:#x}")
    if area[520:536].any():
        raise Fault("header-8-23")
    load = rfbm & xstate_bv
    _check_size(area, layout.standard_size(load))
    _check_xfd(cpu, load)
    mxcsr = _load32(area, 24)
    if rfbm & (SSE | AVX):
        _check_mxcsr(cpu, mxcsr)
    offsets = {nr: layout.slot(nr).offset for nr in bits(load & ~XFEATURE_MASK_FPSSE)}
    if rfbm & (SSE | AVX):
        cpu.mxcsr = mxcsr
    _load(cpu, area, rfbm, load, {**cpu.offsets, **offsets}, rex_w)
    cpu.xrstor_info = (cpu.cpl, cpu.guest, address, 0)


def _restore_compacted(
    cpu: Processor, area: Area, rfbm: int, reach: int, address: int, rex_w: bool
) -> None:
    """Restore from a compacted area. *Source*: Intel SDM vol. 1 sections 13.8.2 and 13.12."""
    layout = cpu.cpu.layout
    xstate_bv, xcomp_bv = _load64(area, 512), _load64(area, 520)
    if xcomp_bv & ~reach & ~XCOMP_BV_COMPACTED:
        raise Fault("xcomp", f"XCOMP_BV {xcomp_bv:#x}, enabled {reach:#x}")
    if xstate_bv & ~xcomp_bv or (cpu.cpu.refuses_bv63 and xstate_bv >> 63):
        raise Fault("bv-xcomp", f"XSTATE_BV {xstate_bv:#x}, XCOMP_BV {xcomp_bv:#x}")
    if area[528:576].any():
        raise Fault("header-16-63")
    load = rfbm & xstate_bv
    offsets = {**cpu.offsets, **layout.compacted_offsets(xcomp_bv)}
    _check_size(area, layout.compacted_size(xcomp_bv))
    _check_xfd(cpu, load)
    if load & SSE:
        _check_mxcsr(cpu, _load32(area, 24))
    _check_supervisor(cpu, area, load, offsets)
    if rfbm & SSE:
        cpu.mxcsr = _load32(area, 24) if load & SSE else MXCSR_INIT
    _load(cpu, area, rfbm, load, offsets, rex_w)
    cpu.xrstor_info = (cpu.cpl, cpu.guest, address, xcomp_bv)


def _load(
    cpu: Processor, area: Area, rfbm: int, load: int, offsets: dict[int, int], rex_w: bool
) -> None:
    """Load or initialise the components of `rfbm`. *Source*: Intel SDM vol. 1 section 13.8.3."""
    for nr in bits(rfbm):
        if load >> nr & 1:
            cpu.load(area, nr, offsets[nr], rex_w=rex_w)
        else:
            cpu.init(nr)
    cpu.xmodified = cpu.cpu.layout.mask & ~rfbm


def _check_mxcsr(cpu: Processor, mxcsr: int) -> None:
    if mxcsr & ~cpu.cpu.mxcsr_mask:
        raise Fault("mxcsr", f"MXCSR {mxcsr:#x}, mask {cpu.cpu.mxcsr_mask:#x}")


def _check_xfd(cpu: Processor, load: int) -> None:
    """Fault if a component to load is disabled; IA32_XFD_ERR then tells which."""
    if load & cpu.xfd:
        cpu.xfd_err = load & cpu.xfd
        raise Fault("xfd", f"IA32_XFD_ERR {names_of(cpu.xfd_err)}")


def _check_supervisor(cpu: Processor, area: Area, load: int, offsets: dict[int, int]) -> None:
    """Fault on contents that the MSRs behind CET and UINTR would refuse."""
    width = cpu.cpu.linear_bits
    if load >> CET_U_NR & 1:
        u_cet, ssp = (_load64(area, offsets[CET_U_NR] + 8 * i) for i in range(2))
        suspended = u_cet & CET_SUPPRESS and u_cet & CET_TRACKER
        if u_cet & CET_RESERVED or suspended or sign_extend(u_cet, width) != u_cet:
            raise Fault("cet", f"IA32_U_CET {u_cet:#x}")
        _check_ssp(ssp, width)
    if load >> CET_S_NR & 1:
        for i in range(3):
            _check_ssp(_load64(area, offsets[CET_S_NR] + 8 * i), width)
    if load >> UINTR_NR & 1 and cpu.values[cpu.offsets[UINTR_NR] + UINV_AT]:
        raise Fault("uintr")


def _check_ssp(ssp: int, width: int) -> None:
    if ssp & 3 or sign_extend(ssp, width) != ssp:
        raise Fault("cet", f"shadow stack pointer {ssp:#x}")


def _check_size(area: Area, size: int) -> None:
    if len(area) < size:
        raise ValueError(f"area: expected {size} bytes, got {len(area)}")


def _store_mxcsr(cpu: Processor, area: Area) -> None:
    area[24:32].view("<u4")[:] = cpu.mxcsr, cpu.cpu.mxcsr_mask


def _load32(area: Area, at: int) -> int:
    return int.from_bytes(area[at : at + 4].tobytes(), "little")


def _load64(area: Area, at: int) -> int:
    _check_size(area, EXTENDED_OFFSET)
    return int.from_bytes(area[at : at + 8].tobytes(), "little")


def _store64(area: Area, at: int, value: int) -> None:
    area[at : at + 8] = np.frombuffer(value.to_bytes(8, "little"), np.uint8)


INSTRUCTIONS: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (xsave, xsaveopt, xsavec, xsaves, xrstor, xrstors)
}
