"""Ways to switch between host and guest FPU state, and what each moves and lets out.

A strategy is a row of STRATEGIES; a guest is a row of GUESTS. `consequence` plays one round
trip, host to guest and back, on the instruction model and counts bytes and leaks; rows that a
kernel has shipped are put to `xfast.kvm` as well.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from xfast.hosts.model import Host
from xfast.kvm import Kernel
from xfast.kvm.fpu import ARCH_REQ_XCOMP_GUEST_PERM
from xfast.kvm.instructions import INSTRUCTIONS, xrstor
from xfast.kvm.processor import INTEL, Processor
from xfast.xsave.area import Areas, empty, headers
from xfast.xsave.cpuid import Cpuid
from xfast.xsave.features import (
    HEADER_SIZE,
    PKRU,
    PKRU_DEFAULT,
    SSE,
    TILEDATA,
    XFEATURE_MASK_FPSSE,
    bits,
)
from xfast.xsave.layout import Layout, preset

HOST_XCR0 = 0x602E7
"""The modelled host: an Intel CPU with AVX-512, PKU and AMX, in Intel's layout."""

HOST_LIVE = 0x207
"""What its VMM thread has in use: x87, SSE, AVX, and Linux's default PKRU."""

CPU = replace(INTEL, layout=preset("intel").restricted(HOST_XCR0))
COMPACTING = ("xsavec", "xsaves")
MXCSR_BYTES = 8


class Strategy(NamedTuple):
    """One way to switch.

    `save` is the instruction; `mask` what it is asked to save of the guest: ``host`` all that
    the host enables, ``cpuid`` guest_supported_xcr0 | 3, ``xcr0`` the guest's XCR0 | 3, ``live``
    what XGETBV(1) says is in use. Restores ask for every host component but PKRU
    (XFEATURE_MASK_FPSTATE), or with PKRU if `restores_pkru`. `lazy` leaves the registers alone
    until the guest uses them. Without `xfd`, tile data is saved and restored for every guest.
    `trims_at_get` cuts KVM_GET_XSAVE's answer down to the guest's components. `unmodified`: the
    guest changed nothing, and saves may leave out what they find unmodified. `kernel` is the
    release that does so.
    """

    name: str
    save: str
    mask: str = "host"
    restores_pkru: bool = False
    lazy: bool = False
    xfd: bool = True
    trims_at_get: bool = True
    unmodified: bool = False
    kernel: str = ""


STRATEGIES: tuple[Strategy, ...] = (
    Strategy("Linux 5.17-rc5", "xsaves", trims_at_get=False, kernel="5.17-rc5"),
    Strategy("Linux 6.0", "xsaves", kernel="6.0.8"),
    Strategy("Linux 6.12", "xsaves", kernel="6.12.57"),
    Strategy("XSAVES, guest CPUID", "xsaves", "cpuid", trims_at_get=False),
    Strategy("XSAVE", "xsave", trims_at_get=False),
    Strategy("XSAVE, trimmed at GET", "xsave"),
    Strategy("XSAVE, guest CPUID", "xsave", "cpuid", trims_at_get=False),
    Strategy("XSAVE, no XFD", "xsave", xfd=False, trims_at_get=False),
    Strategy("XSAVEOPT", "xsaveopt", trims_at_get=False),
    Strategy("XSAVEOPT, unmodified", "xsaveopt", trims_at_get=False, unmodified=True),
    Strategy("XSAVEC", "xsavec", trims_at_get=False),
    Strategy("XSAVEC, no XFD", "xsavec", xfd=False, trims_at_get=False),
    Strategy("XSAVEC, guest CPUID", "xsavec", "cpuid", trims_at_get=False),
    Strategy("XSAVEC, guest XCR0", "xsavec", "xcr0", trims_at_get=False),
    Strategy("XSAVEC, live only", "xsavec", "live", trims_at_get=False),
    Strategy("XSAVEC, PKRU restored", "xsavec", restores_pkru=True, trims_at_get=False),
    Strategy("XSAVEC, lazy", "xsavec", lazy=True, trims_at_get=False),
)


class Guest(NamedTuple):
    """A guest: components in use, guest_supported_xcr0 and XCR0 (masks). None of them has PKU."""

    name: str
    live: int
    cpuid: int
    xcr0: int


GUESTS: tuple[Guest, ...] = (
    Guest("idle", 0, 0xE7, 1),
    Guest("sse", 3, 0xE7, 3),
    Guest("avx2", 7, 0xE7, 7),
    Guest("avx512", 0xE7, 0xE7, 0xE7),
    Guest("amx", 0x600E7, 0x600E7, 0x600E7),
)


class Consequence(NamedTuple):
    """What one round trip does: bytes, and components (masks) that get where they should not.

    `reported`: in KVM_GET_XSAVE's answer, though the guest's CPUID lacks them. `seen`: host
    values that the guest can read. `source` is ``kvm`` where `xfast.kvm` confirmed the former.
    """

    saved: int
    restored: int
    reported: int
    seen: int
    source: str


def save_mask(strategy: Strategy, guest: Guest, xcr0: int, live: int) -> int:
    """Return the RFBM of a save (mask); `live` is what is in use, `xcr0` all that there is."""
    mask = {
        "host": xcr0,
        "cpuid": guest.cpuid | XFEATURE_MASK_FPSSE,
        "xcr0": guest.xcr0 | XFEATURE_MASK_FPSSE,
        "live": live,
    }[strategy.mask]
    if strategy.xfd and not guest.cpuid & TILEDATA:
        mask &= ~TILEDATA
    return mask & xcr0


def host_mask(strategy: Strategy, xcr0: int, live: int) -> int:
    """Return the RFBM with which the host's own state is saved (mask)."""
    mask = live if strategy.mask == "live" else xcr0
    return mask & ~TILEDATA if strategy.xfd else mask


def restore_mask(strategy: Strategy, xcr0: int) -> int:
    """Return the RFBM of the restores (mask)."""
    return xcr0 if strategy.restores_pkru else xcr0 & ~PKRU


def skips(strategy: Strategy, guest: Guest) -> bool:
    """Return whether nothing is moved, as the guest never uses what is lazily switched."""
    return strategy.lazy and not guest.live


def random_area(layout: Layout, xstate_bv: int, seed: int) -> Areas:
    """Return one standard-format area: non-zero random bytes, x87 and tiles in valid form."""
    room = max(layout.standard_size(), 4096)
    memory: Areas = empty(1, room)[0]
    memory[:] = np.random.default_rng(seed).integers(1, 255, room, np.uint8)
    memory[416:576] = memory[:32] = 0
    memory[32:160].reshape(8, 16)[:, 10:] = 0
    memory[:2] = 0x7F, 0x03
    memory[4] = 0xFF
    memory[24:26] = 0xA0 if xstate_bv & SSE else 0x80, 0x1F
    memory[512:520].view("<u8")[0] = xstate_bv
    for nr in bits(xstate_bv & layout.mask & ~XFEATURE_MASK_FPSSE):
        slot = layout.slot(nr)
        value = memory[slot.offset : slot.offset + slot.size]
        if slot.nr == 9:
            value[:] = np.frombuffer(PKRU_DEFAULT.to_bytes(8, "little"), np.uint8)
        if slot.nr == 17:
            value[:] = 0
            value[0] = 1
            value[16:32].view("<u2")[:] = 64
            value[48:56] = 16
    return memory


def consequence(strategy: Strategy, guest: Guest) -> Consequence:
    """Play one round trip on the model, and return what it moved and what it let out.

    *Source*: Linux arch/x86/kernel/fpu/core.c fpu_swap_kvm_fpstate().
    """
    allowed = guest.cpuid | XFEATURE_MASK_FPSSE
    if skips(strategy, guest):
        return Consequence(0, 0, 0, HOST_LIVE & allowed, "masks")
    cpu = Processor(CPU, HOST_XCR0)
    cpu.cpl = 0
    restore = restore_mask(strategy, HOST_XCR0)
    xrstor(cpu, random_area(CPU.layout, HOST_LIVE, 1), HOST_XCR0, address=64)
    host = cpu.values.copy()
    saved, host_area = save(cpu, strategy.save, host_mask(strategy, HOST_XCR0, HOST_LIVE), 64 * 2)

    xrstor(cpu, random_area(CPU.layout, guest.live, 2), restore, address=64 * 3)
    seen = sum(1 << nr for nr in bits(HOST_LIVE & allowed) if holds(cpu, nr, host))
    if strategy.lazy:  # until the first use, and to speculation (CVE-2018-3665)
        seen = HOST_LIVE & allowed
    if not strategy.unmodified:
        cpu.xmodified = CPU.layout.mask
    mask = save_mask(strategy, guest, HOST_XCR0, cpu.xinuse)
    more, guest_area = save(cpu, strategy.save, mask, 64 * 3)

    xrstor(cpu, host_area, restore, address=64 * 2)
    if not holds(cpu, 1, host):
        raise AssertionError(f"{strategy.name}: the host's XMM registers did not come back")
    xstate_bv = int(guest_area[512:520].view("<u8")[0])
    reported = 0 if strategy.trims_at_get else xstate_bv & ~allowed
    return Consequence(
        saved + more,
        read_by_restore(restore & guest.live) + read_by_restore(restore & HOST_LIVE),
        reported_by_kvm(strategy.kernel, guest) if strategy.kernel else reported,
        seen,
        "kvm" if strategy.kernel else "masks",
    )


def holds(cpu: Processor, nr: int, values: Areas) -> bool:
    """Return whether component `nr` has the value, not an initial one, that `values` has."""
    at = cpu.offsets[nr]
    here = slice(at, at + cpu.sizes[nr])
    return not cpu.is_init(nr) and bool((cpu.values[here] == values[here]).all())


def save(cpu: Processor, instruction: str, mask: int, address: int) -> tuple[int, Areas]:
    """Save into a fresh area; return the bytes that were written, and the area."""
    one, two = empty(2, CPU.layout)
    one[:], two[:] = 0x55, 0xAA
    for memory in (one, two):
        memory[512:576] = 0
        INSTRUCTIONS[instruction](cpu, memory, mask, address=address)
    written = int((one == two).sum()) - HEADER_SIZE
    return written + (16 if instruction in COMPACTING else 8), one


def read_by_restore(mask: int) -> int:
    """Return the bytes that a restore reads to load the components of `mask`: header, data."""
    sizes = {0: 152, 1: 256} | {slot.nr: slot.size for slot in CPU.layout.slots}
    return HEADER_SIZE + MXCSR_BYTES + sum(sizes[nr] for nr in bits(mask))


@lru_cache
def reported_by_kvm(release: str, guest: Guest) -> int:
    """Return what KVM_GET_XSAVE2 reports after a run beyond the guest's CPUID (mask)."""
    family = frozenset({"xsave", "xsaveopt", "xsavec", "xgetbv1", "xsaves", "xfd"})
    host = Host(
        "modelled",
        CPU.layout,
        HOST_XCR0,
        mxcsr_mask=CPU.mxcsr_mask,
        xsave=family,
        vendor="GenuineIntel",
    )
    kernel = Kernel(host, release)
    kernel.arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM, 18)
    vcpu = kernel.create_vcpu()
    vcpu.set_cpuid2(Cpuid.from_rows({(0xD, 0): (guest.cpuid, 0, 0, 0)}))
    vcpu.run()
    return int(headers(vcpu.get_xsave2()).xstate_bv) & ~(guest.cpuid | XFEATURE_MASK_FPSSE)
