"""A host as a value: what its CPU, its kernel and its KVM can hold, and how each fact is known."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from xfast.errors import printable
from xfast.kernels.behaviour import (
    Behaviours,
    kvm_supported_xcr0,
    supervisor_supported,
    user_supported,
    uses_xsave,
    without_xfd,
)
from xfast.xsave.cpuid import Cpuid
from xfast.xsave.features import TILEDATA, XFEATURE_MASK_FPSSE
from xfast.xsave.layout import Layout


class Doubt(NamedTuple):
    """A fact that is not certain: ``assumed`` or ``unknown``, and what would settle it."""

    fact: str
    how: str
    remedy: str


REMEDIES: dict[str, str] = {
    "layout": "the output of `cpuid -r` there",
    "xcr0": "the output of `cpuid -r`, or the boot log, there",
    "kvm_xcr0": "`xfast host dump` there",
    "features": "the output of `cpuid -r` there",
}
"""{fact: what makes it certain}, for the facts that verdicts rest on."""

KERNEL_REMEDY = "HOST@RELEASE, or `xfast host dump` there"


@dataclass(frozen=True)
class Host:
    """Where a snapshot may be restored. What is not known is None.

    Parameters
    ----------
    name : str
    layout : Layout or None
        The CPU's standard format. A component of `xcr0` that it lacks has an unknown place.
    xcr0 : int or None
        User components that the host's kernel enables (its fpu_user_cfg.max_features).
    xss : int or None
        Supervisor components that the host's kernel enables.
    kvm_xcr0 : int or None
        User components that its KVM lets a guest have (kvm_caps.supported_xcr0); 0 where the
        CPU has no XSAVE.
    mxcsr_mask : int or None
        The CPU's MXCSR_MASK.
    features : frozenset of str or None
        CPUID features, by the names in `xfast.xsave.cpuid.FEATURES`; judge ISA differences by
        these. Those that an OS switches at run time (osxsave, ospke) are never among them.
    xsave : frozenset of str
        Of ``xsave``, ``xsaveopt``, ``xsavec``, ``xgetbv1``, ``xsaves``, ``xfd``, by CPUID.
    kernel : Behaviours or None
        The kernel's behaviours; see `xfast.kernels.behaviour`.
    xsave2_size : int or None
        Bytes that KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) reports.
    guest_permission : int or None
        Dynamic components (XTILE_DATA) that guests may be given here (mask).
    vendor : str or None
        CPUID's vendor text.
    cpuid : Cpuid or None
        All that is known of the CPU's, or KVM's supported, CPUID.
    x87_pointer_bits : int or None
        The bits of x87's instruction pointer, 48 or 57; CPUID does not tell.
    provenance : dict
        {field: how it is known}: ``probed`` on the machine, told by a ``dump`` or ``given`` by
        a person, ``derived`` (inferred) by the kernel's rules, or ``assumed``.
    source : str
        Where the description came from: a file, a catalogue entry, ``this machine``.
    notes : tuple of str
        What whoever relies on the description should know; one clause each.

    Names, vendors, sources and notes are fit for a terminal: what is not printable in them is
    escaped, for they come from files.
    """

    name: str
    layout: Layout | None = None
    xcr0: int | None = None
    xss: int | None = None
    kvm_xcr0: int | None = None
    mxcsr_mask: int | None = None
    features: frozenset[str] | None = None
    xsave: frozenset[str] = frozenset()
    kernel: Behaviours | None = None
    xsave2_size: int | None = None
    guest_permission: int | None = None
    vendor: str | None = None
    cpuid: Cpuid | None = None
    x87_pointer_bits: int | None = None
    provenance: dict[str, str] = field(default_factory=dict, compare=False)
    source: str = ""
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for text in ("name", "source", "vendor"):
            value = getattr(self, text)
            if value is not None and not value.isprintable():
                object.__setattr__(self, text, printable(value))
        object.__setattr__(self, "notes", tuple(map(printable, self.notes)))

    @property
    def doubts(self) -> list[Doubt]:
        """The facts that are assumed or not known, and what would settle each."""
        settled = [
            Doubt(name, "unknown" if getattr(self, name) is None else "assumed", remedy)
            for name, remedy in REMEDIES.items()
            if getattr(self, name) is None or self.provenance.get(name) == "assumed"
        ]
        kernel = self.kernel
        if kernel is None or kernel.provenance == "assumed":
            how = "unknown" if kernel is None else "assumed"
            settled.append(Doubt("kernel", how, KERNEL_REMEDY))
        return settled

    @property
    def caveat(self) -> str:
        """What to know of a verdict on this host: facts it assumes and the notes; empty if none."""
        assumed: dict[str, list[str]] = {}
        for doubt in self.doubts:
            if doubt.how == "assumed" and doubt.fact in ("layout", "xcr0", "kvm_xcr0"):
                assumed.setdefault(doubt.remedy, []).append(doubt.fact)
        told = [
            f"{' and '.join(facts)} assumed (certain with {remedy})"
            for remedy, facts in assumed.items()
        ] + list(self.notes)
        return "; ".join(told)

    @property
    def has_xsave(self) -> bool:
        """Whether the CPU has XSAVE; where no feature tells, whether a mask needs it."""
        if self.features is not None:
            return "xsave" in self.features
        beyond = self.xcr0 is None or self.xcr0 & ~XFEATURE_MASK_FPSSE
        return bool(self.xsave or self.kvm_xcr0 or beyond)

    def uses_xsave(self, kernel: Behaviours) -> bool:
        """Return whether a kernel uses XSAVE here; without it, KVM moves x87 and SSE only."""
        return self.has_xsave and uses_xsave(kernel, self.xcr0 or 0)

    def enabled_by(self, kernel: Behaviours) -> int | None:
        """Return the components of `xcr0` that stay enabled under a kernel (mask).

        Dynamic ones go where the CPU is known to lack XFD.
        """
        if self.xcr0 is None:
            return None
        if not self.uses_xsave(kernel):
            return XFEATURE_MASK_FPSSE
        told = self.xsave | (self.features or frozenset())
        return self.xcr0 if "xfd" in told or not told else without_xfd(self.xcr0)

    def with_kernel(self, kernel: Behaviours) -> Host:
        """Return this host under another kernel: its masks are cut to what that can enable.

        Masks that were probed or given stay as they are: distributions back-port.
        """
        masks = {
            "xcr0": user_supported(kernel),
            "xss": supervisor_supported(kernel),
            "kvm_xcr0": kvm_supported_xcr0(kernel, ~0, self.vendor),
        }
        changes: dict[str, Any] = {"kernel": kernel}
        for name, mask in masks.items():
            value = getattr(self, name)
            if value is not None and self.provenance.get(name) in ("derived", "dump", "assumed"):
                changes[name] = value & mask
        provenance = {**self.provenance, "kernel": kernel.provenance}
        kvm_xcr0 = changes.get("kvm_xcr0", self.kvm_xcr0)
        if kvm_xcr0 is not None and self.provenance.get("guest_permission", "derived") == "derived":
            changes["guest_permission"] = kvm_xcr0 & TILEDATA
            provenance["guest_permission"] = "derived"
        return self.replace(provenance=provenance, **changes)

    def replace(self, **changes: Any) -> Host:
        """Return a copy with some fields changed."""
        return replace(self, **changes)
