"""From CPUID to a host: what a kernel makes of a CPU, and KVM of the two.

*Source*: Linux arch/x86/kernel/fpu/xstate.c fpu__init_system_xstate(), xsave_cpuid_features;
arch/x86/kvm/x86.c kvm_x86_vendor_init(); Intel SDM vol. 1 section 10.2.3 (MXCSR.MM: AMD APM
vol. 1 section 4.2.2).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xfast.errors import FormatError, LayoutError, printable
from xfast.hosts.model import Host
from xfast.hosts.silicon import family_and_model, generation
from xfast.kernels.behaviour import (
    BEHAVIOURS,
    Behaviours,
    kvm_supported_xcr0,
    of_release,
    supervisor_supported,
    user_supported,
    without_xfd,
)
from xfast.xsave.cpuid import FEATURES, RUNTIME_FEATURES, XSAVE_FEATURES, Cpuid
from xfast.xsave.features import (
    COMPONENTS,
    MXCSR_MASK_AMD,
    MXCSR_MASK_INTEL,
    XFEATURE_MASK_FPSSE,
)
from xfast.xsave.layout import PRESETS, Layout, candidates

NEWEST = Behaviours(frozenset(BEHAVIOURS))
"""The newest kernel: what a CPU is taken to run where its kernel is not known."""


def known_features(cpuid: Cpuid) -> frozenset[str] | None:
    """Return the features that these rows announce, or None where they can't be believed.

    That is where leaf 1, or a leaf 7 that must be there, is missing; or where leaf 0xD has
    components while XSAVE is not announced, as some out-of-tree KVMs do.
    """
    first = cpuid.find(0)
    if cpuid.find(1) is None or (first and first.eax >= 7 and cpuid.find(7) is None):
        return None
    if cpuid.xcr0 and "xsave" not in cpuid.features:
        return None
    features = cpuid.features - RUNTIME_FEATURES
    # Intel announces SYSCALL to 64-bit code only, and dumps are often made by 32-bit programs.
    return features | {"syscall"} if "lm" in features else features


def enabled_by_kernel(mask: int, features: frozenset[str] | None) -> int:
    """Return which components of the CPU's `mask` a kernel that knows them all enables (masks).

    A component without its CPUID feature is dropped, XTILE_DATA without XFD too. Where the
    features are not known, nothing is dropped for want of one.
    """
    kept = 0
    for component in COMPONENTS:
        allowed = bool(component.flag) and (features is None or component.flag in features)
        kept |= mask & component.bit if allowed else 0
    if features is not None and "xfd" not in features:
        kept = without_xfd(kept)
    return kept


def from_cpuid(
    cpuid: Cpuid,
    name: str,
    source: str,
    *,
    by_kvm: bool = False,
) -> Host:
    """Return the host that a list of CPUID rows describes.

    Parameters
    ----------
    cpuid : Cpuid
    name, source : str
        The host's name, and the file (for errors and `Host.source`).
    by_kvm : bool
        The rows are what KVM offers or gives a guest (KVM_GET_SUPPORTED_CPUID, a Firecracker
        fingerprint), not what the CPU says. What the CPU says is what the newest kernel would
        enable of it; `Host.with_kernel` cuts that.

    Raises
    ------
    FormatError
        If leaf 0xD describes an impossible layout.
    """
    features = known_features(cpuid)
    facts: dict[str, Any] = {"features": features, "vendor": cpuid.vendor, "cpuid": cpuid}
    if features is not None:
        facts["xsave"] = features & XSAVE_FEATURES
    provenance = dict.fromkeys((k for k, v in facts.items() if v is not None), "dump")
    extended = cpuid.find(0x80000001)
    if features is not None and (extended or cpuid.vendor == "GenuineIntel"):
        facts["mxcsr_mask"] = MXCSR_MASK_AMD if "misalignsse" in features else MXCSR_MASK_INTEL
        provenance["mxcsr_mask"] = "derived"
    signature = cpuid.signature
    known = generation(cpuid.vendor, *family_and_model(signature)) if signature else None
    if known:
        facts["x87_pointer_bits"] = known.x87_pointer_bits
        provenance["x87_pointer_bits"] = "derived"
    try:
        masks = _masks(cpuid, features, by_kvm)
        layout: Layout | None = cpuid.layout if masks else None
    except LayoutError as error:
        raise FormatError(source, None, f"CPUID leaf 0xd: {error}") from None
    if layout is not None:
        facts["layout"] = layout
        provenance["layout"] = "dump"
    facts.update(masks)
    provenance.update(dict.fromkeys(masks, "derived"))
    if by_kvm and "kvm_xcr0" in masks:
        provenance["kvm_xcr0"] = "dump"
    return Host(name, source=source, provenance=provenance, **facts)


def _masks(cpuid: Cpuid, features: frozenset[str] | None, by_kvm: bool) -> dict[str, int]:
    """Return xcr0, xss and kvm_xcr0, or nothing where leaf 0xD is missing though it exists."""
    if cpuid.find(0xD) is None:
        if features is None or "xsave" in features:
            return {}
        return {"xcr0": XFEATURE_MASK_FPSSE, "xss": 0, "kvm_xcr0": 0}
    if by_kvm:
        return {"xcr0": cpuid.xcr0, "xss": cpuid.xss, "kvm_xcr0": cpuid.xcr0}
    xcr0 = enabled_by_kernel(cpuid.xcr0, features) & user_supported(NEWEST)
    xss = enabled_by_kernel(cpuid.xss, features) & supervisor_supported(NEWEST)
    kvm_xcr0 = kvm_supported_xcr0(NEWEST, xcr0, cpuid.vendor)
    return {"xcr0": xcr0, "xss": xss, "kvm_xcr0": kvm_xcr0}


LAYOUTS_BY_CPU: tuple[tuple[str, int | None, str], ...] = (
    ("GenuineIntel", None, "intel"),
    ("CentaurHauls", None, "intel"),
    ("  Shanghai  ", None, "intel"),
    ("AuthenticAMD", 21, "amd-bulldozer"),
    ("AuthenticAMD", 23, "amd-zen2"),
    ("AuthenticAMD", 25, "amd-zen4"),
    ("AuthenticAMD", 26, "amd-zen4"),
    ("HygonGenuine", 24, "amd-zen2"),
)
"""Vendor, family, and the preset of which all its CPUs have a part; Zen 3 has one of Zen 4's.

*Source*: CPUID dumps of 404 machines; tests compare every one of them.
"""


def likely_layout(
    mask: int, vendor: str | None, family: int | None = None, size: int | None = None
) -> Layout | None:
    """Return the layout that a CPU has where nothing tells it, or None.

    Where several are possible, only the components are placed that lie alike in all of them.

    Parameters
    ----------
    mask : int
        Its user components.
    vendor, family
        CPUID's, as far as they are known.
    size : int, optional
        Bytes of a standard-format area with `mask`, where that is known.
    """
    rows = [row for row in LAYOUTS_BY_CPU if row[0] == vendor]
    names = [preset for _, known, preset in rows if known in (None, family)]
    possible = names or [preset for *_, preset in rows] or list(PRESETS)
    fitting = [
        PRESETS[name].restricted(mask) for name in candidates(mask, size) if name in possible
    ]
    if not fitting and size is not None:
        return likely_layout(mask, vendor, family)
    return common_layout(fitting) if fitting else None


def from_features(
    features: frozenset[str],
    name: str,
    source: str,
    *,
    vendor: str | None = None,
    family: int | None = None,
    model: int | None = None,
    how: str = "dump",
) -> Host:
    """Return the host that a list of feature names describes: low confidence, and marked so.

    The features are certain, as far as `how` is. Which components the kernel enables is derived
    from them; the layout is assumed, by vendor and family, and so is what KVM offers.

    Parameters
    ----------
    features : frozenset of str
        By the names in `xfast.xsave.cpuid.FEATURES`; others are left out.
    name, source : str
        The host's name, and where the list came from.
    vendor, family, model
        CPUID's, as far as they are known.
    how : str
        How the features are known; see `Host.provenance`.
    """
    known = frozenset(features & FEATURES.keys()) - RUNTIME_FEATURES
    if "amx_tile" in known:
        known |= {"xfd"}  # the kernel shows no flag for it, and enables no tiles without it
    xcr0 = XFEATURE_MASK_FPSSE
    if "xsave" in known:
        xcr0 |= enabled_by_kernel(user_supported(NEWEST), known)
    facts: dict[str, Any] = {
        "features": known,
        "xsave": known & XSAVE_FEATURES,
        "vendor": vendor,
        "xcr0": xcr0,
        "kvm_xcr0": kvm_supported_xcr0(NEWEST, xcr0, vendor) if "xsave" in known else 0,
        "layout": likely_layout(xcr0, vendor, family),
        "xss": None if "xsave" in known else 0,
    }
    provenance = {"features": how, "xsave": how, "vendor": how, "xcr0": "derived"}
    provenance |= {"kvm_xcr0": "assumed", "layout": "assumed", "xss": "derived"}
    if "misalignsse" in known or vendor == "GenuineIntel":
        facts["mxcsr_mask"] = MXCSR_MASK_AMD if "misalignsse" in known else MXCSR_MASK_INTEL
        provenance["mxcsr_mask"] = "derived"
    known_core = generation(vendor, family, model)
    if known_core:
        facts["x87_pointer_bits"] = known_core.x87_pointer_bits
        provenance["x87_pointer_bits"] = "derived"
    provenance = {fact: how for fact, how in provenance.items() if facts[fact] is not None}
    return Host(name, source=source, provenance=provenance, **facts)


def common_layout(layouts: Iterable[Layout]) -> Layout:
    """Return the slots that are the same in all of `layouts`."""
    first, *others = layouts
    same = (s for s in first.slots if all(other.by_nr.get(s.nr) == s for other in others))
    return Layout(tuple(same), first.name)


def kernel_of(release: object, path: str) -> Behaviours | None:
    """Return the behaviours of the release that a file names, None where it names none."""
    try:
        return of_release(printable(release)) if isinstance(release, str) else None
    except ValueError as error:
        raise FormatError(path, None, str(error)) from None
