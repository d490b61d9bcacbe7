"""The story of ad856280ddea, told by the model: how a guest without PKU came by PKRU.

Seven steps, the same on each kernel, side by side. Every mask comes from a vCPU of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from xfast.hosts.model import Host
from xfast.kernels.behaviour import BEHAVIOURS, CET_S, CET_U, PASID
from xfast.kvm.kernel import Kernel
from xfast.kvm.migration import Migration, migrate
from xfast.kvm.processor import Processor
from xfast.kvm.vcpu import Vcpu
from xfast.xsave.area import headers
from xfast.xsave.features import AVX, PKRU, XFEATURE_MASK_AVX512, XFEATURE_MASK_FPSSE, names_of
from xfast.xsave.layout import preset

KERNELS = {
    "5.15": "KVM's own code",
    "5.16": "bf5d00470787, the leak",
    "5.18.2": "ad856280ddea",
    "6.1": "a1020a25e697",
    "6.6": "8647c52e9504",
}
"""Releases that stand for a behaviour each, and what brought it."""

INTRODUCTION = (
    "A CPU's registers are saved as state components, each with a number: x87 is 0, SSE 1, AVX 2, "
    "PKRU 9.",
    "A saved area has a mask at byte 512, XSTATE_BV: bit n says that component n is in it, so "
    "0x207 is these four.",
    "user_xfeatures is the mask of what KVM moves between a guest's FPU and the VMM.",
    "Too wide a mask, and PKRU shows in the area of a guest that has none; too narrow, and x87 "
    "and SSE get lost.",
)

GUEST_XCR0 = XFEATURE_MASK_FPSSE | AVX
NO_XSAVE = [(1, 0, 0, 0x106A3, 0, 0x80982201, 0x78BFBFF)]
"""CPUID of a Nehalem: it has no leaf 0xD."""


class Row(NamedTuple):
    """One step: its number, what happens, and what each kernel shows for it."""

    step: int
    what: str
    cells: tuple[str, ...]


def host(pkru: bool) -> Host:
    """Return a host of the story: an Intel server, with or without PKU."""
    mask = XFEATURE_MASK_FPSSE | AVX | XFEATURE_MASK_AVX512 | (PKRU if pkru else 0)
    return Host(
        "with PKU" if pkru else "without PKU",
        preset("intel").restricted(mask | PASID | CET_U | CET_S),
        xcr0=mask,
        xss=0,
        mxcsr_mask=0xFFFF,
        xsave=frozenset({"xsave", "xsaveopt", "xsavec", "xgetbv1", "xsaves"}),
        vendor="GenuineIntel",
    )


def _use_avx(processor: Processor) -> None:
    """Stand for the guest: it puts something into x87's, SSE's and AVX's registers."""
    for nr in (0, 1, 2):
        processor.write(nr, 2, b"\x38")


def _leaf_d(mask: int) -> list[tuple[int, ...]]:
    return [(0xD, 0, 1, mask, 0, 0, 0)]


def _show(mask: int) -> str:
    return f"{mask:#x} {names_of(mask)}" if mask else "0"


def _moved(migration: Migration) -> str:
    return f"XSTATE_BV {migration.xstate_bv:#x}: {migration}"


def _tell(release: str) -> list[str]:
    """Return one kernel's cells."""
    kernel = Kernel(host(pkru=True), release)
    fpu = kernel.fpu
    cells = [f"host components {_show(fpu.user_cfg.max_features)}"]
    vcpu = kernel.create_vcpu()
    guest = vcpu.guest_fpu
    vcpu.set_cpuid2(_leaf_d(GUEST_XCR0))
    vcpu.set_xcrs([(0, GUEST_XCR0)])
    may = f"guest may have {_show(vcpu.guest_supported_xcr0)}"
    if "fpu-core-uabi" in kernel.behaviours:  # KVM's own code knew no such mask
        may += f"; user_xfeatures {guest.fpstate.user_xfeatures:#x}"
    cells.append(may)
    fpu.fpu_swap_kvm_fpstate(guest, True)
    cells.append(
        f"image XSTATE_BV {guest.fpstate.xstate_bv:#x}; PKRU is still the VMM's: {fpu.rdpkru():#x}"
    )
    _use_avx(fpu.processor)
    cells.append(f"in use {_show(fpu.processor.xinuse & fpu.user_cfg.max_features)}")
    fpu.fpu_swap_kvm_fpstate(guest, False)
    cells.append(f"image XSTATE_BV {_show(guest.fpstate.xstate_bv)}")
    reported = headers(vcpu.get_xsave()).xstate_bv
    leak = reported & ~(GUEST_XCR0 | XFEATURE_MASK_FPSSE)
    cells.append(f"XSTATE_BV {_show(reported)}" + (": the leak" if leak else ""))
    plain = host(pkru=False)
    cells.append(_moved(migrate(vcpu, plain, kernel=release)))
    cells.append(_moved(migrate(vcpu, plain, "qemu-7.2", kernel=release)))
    leaked = _leaked_by("5.16")
    cells.append(_moved(migrate(leaked, host(pkru=True), kernel=release)))
    cells.append(_moved(migrate(_without_xsave(kernel), plain, kernel=release)))
    return cells


def _leaked_by(release: str) -> Vcpu:
    """Return the story's vCPU as that kernel leaves it."""
    vcpu = Kernel(host(pkru=True), release).create_vcpu()
    vcpu.set_cpuid2(_leaf_d(GUEST_XCR0))
    vcpu.set_xcrs([(0, GUEST_XCR0)])
    vcpu.run(_use_avx)
    return vcpu


def _without_xsave(kernel: Kernel) -> Vcpu:
    """Return a vCPU whose CPUID has no XSAVE; its guest has used x87 and SSE."""
    vcpu = kernel.create_vcpu()
    vcpu.set_cpuid2(NO_XSAVE)
    vcpu.run(_use_avx)
    return vcpu


STEPS = (
    (1, "a host with PKU"),
    (2, "a guest without it: KVM_SET_CPUID2"),
    (3, "first switch to the guest"),
    (4, "the guest runs, and uses AVX"),
    (5, "switch back to the VMM"),
    (6, "KVM_GET_XSAVE"),
    (7, "migration to a host without PKU"),
    (7, "the same, by QEMU 7.2"),
    (7, "what 5.16 saved, loaded by this kernel on a host with PKU"),
    (7, "a guest without XSAVE at all, to a host without PKU"),
)


def story(kernels: Iterable[str] = tuple(KERNELS)) -> list[Row]:
    """Return the steps of the story, a row each, with one cell for each kernel.

    Parameters
    ----------
    kernels : iterable of str
        Releases; default: KERNELS.

    *Source*: Linux kernel commit ad856280ddea ("x86/kvm/fpu: Limit guest user_xfeatures to
    supported bits of XCR0") (in v5.17), and those of KERNELS.
    """
    columns = [_tell(release) for release in kernels]
    return [
        Row(step, what, tuple(column[i] for column in columns))
        for i, (step, what) in enumerate(STEPS)
    ]


def _columns(kernels: Iterable[str]) -> list[str]:
    """Return a line for each of KERNELS: which releases it stands for."""
    since = {behaviour.commit: ", ".join(behaviour.since) for behaviour in BEHAVIOURS.values()}
    firsts = [since.get(what.partition(",")[0], "") for what in KERNELS.values()]
    lines = []
    for i, (name, what) in enumerate(KERNELS.items()):
        first = f"from {firsts[i]}" if firsts[i] else ""
        last = f"until {firsts[i + 1]}" if i + 1 < len(firsts) else "and on"
        if name in kernels:
            lines.append(f"  {name}: {what} ({' '.join(filter(None, (first, last)))})")
    return lines


def render(rows: Iterable[Row], kernels: Iterable[str] = tuple(KERNELS)) -> str:
    """Return the story as text: each step once, and under it what each kernel shows.

    Kernels that show the same share a line. Before the steps: the commit, what the words mean,
    and which releases a kernel stands for ("until" is the first that it does not).
    """
    kernels = tuple(kernels)
    names = [f"{name} ({KERNELS[name]})" if name in KERNELS else name for name in kernels]
    columns = _columns(kernels)
    lines = [BEHAVIOURS["user-xfeatures-guest"].ref, "", *INTRODUCTION, ""]
    lines += ["Each kernel stands for a range of releases:", *columns, ""] if columns else []
    for row in rows:
        lines.append(f"{row.step}. {row.what}")
        told: dict[str, list[str]] = {}
        for name, cell in zip(names, row.cells, strict=True):
            told.setdefault(cell, []).append(name)
        for cell, who in told.items():
            lines.append(f"     {cell}" if len(told) == 1 else f"     {', '.join(who)}:")
            if len(told) > 1:
                lines.append(f"       {cell}")
    return "\n".join(lines)


__all__ = ["KERNELS", "Row", "render", "story"]
