"""What the XML in a libvirt save image tells of the guest: its name, its type, its CPU.

*Source*: libvirt docs/formatdomain.rst "CPU model and topology"; src/qemu/qemu_domain.c
qemuDomainSaveCookieFormatBuf().
"""

from __future__ import annotations

from typing import NamedTuple

from xfast.errors import FormatError
from xfast.snapshots.bytes.libvirt import HEADER_SIZE, Header
from xfast.xsave.features import (
    AVX,
    BY_NAME,
    PKRU,
    XFEATURE_MASK_AVX512,
    XFEATURE_MASK_FPSSE,
    XFEATURE_MASK_MPX,
    XFEATURE_MASK_XTILE,
)

FEATURES = {
    "avx": AVX,
    "mpx": XFEATURE_MASK_MPX,
    "avx512f": XFEATURE_MASK_AVX512,
    "pku": PKRU,
    "amx-tile": XFEATURE_MASK_XTILE,
    "apxf": BY_NAME["apx"].bit,
}
"""The components that a feature, in libvirt's spelling, brings."""

MODELS = {
    name: features
    for features, names in {
        "": "qemu32 kvm32 qemu64 kvm64 coreduo core2duo Conroe Penryn Nehalem Westmere "
        "phenom Opteron_G1 Opteron_G2 Opteron_G3",
        "xsave avx": "SandyBridge IvyBridge Haswell Broadwell Opteron_G4 Opteron_G5 "
        "EPYC EPYC-Rome Dhyana",
        "xsave avx mpx": "Skylake-Client",
        "xsave avx avx512f mpx pku": "Skylake-Server Cascadelake-Server Cooperlake Icelake-Server",
        "xsave avx pku": "EPYC-Milan SierraForest ClearwaterForest",
        "xsave avx avx512f pku": "EPYC-Genoa EPYC-Turin",
        "xsave avx avx512f pku amx-tile": "SapphireRapids GraniteRapids",
    }.items()
    for name in names.split()
}
"""What a CPU model may have at most: versions of QEMU and libvirt differ in MPX.

*Source*: QEMU target/i386/cpu.c builtin_x86_defs; libvirt src/cpu_map/x86_*.xml.
"""


class Domain(NamedTuple):
    """What the XML tells of the guest.

    `kvm` is whether the domain ran under KVM; `components` the user components that its CPU may
    have (bits), None where the XML does not tell.
    """

    name: str
    kvm: bool
    model: str
    components: int | None


def domain(path: str, head: Header) -> Domain:
    """Read the domain's XML and the cookie, which lists the CPU that the guest really got.

    Raises
    ------
    FormatError
        If one is no XML.

    *Source*: libvirt docs/formatdomain.rst "CPU model and topology"; src/qemu/qemu_domain.c
    qemuDomainSaveCookieFormatBuf().
    """
    from xml.etree import ElementTree

    try:
        outer = ElementTree.fromstring(head.xml)
        root = outer if outer.tag == "domain" else outer.find("domain")
        if root is None:
            raise ElementTree.ParseError("no domain")
        cookie = ElementTree.fromstring(head.cookie) if head.cookie else root
    except (ElementTree.ParseError, ValueError) as problem:
        raise FormatError(path, HEADER_SIZE, f"found XML that is no domain's: {problem}") from None
    cpu = cookie.find("cpu")
    if cpu is None:
        cpu = root.find("cpu")
    model, components = "", None
    if cpu is not None:
        model = (cpu.findtext("model") or "").strip()
        features = {
            feature.get("name", ""): feature.get("policy", "require") not in ("disable", "forbid")
            for feature in cpu.findall("feature")
        }
        components = _components(model, features)
    return Domain(
        (root.findtext("name") or "").strip(), root.get("type") == "kvm", model, components
    )


def _components(model: str, features: dict[str, bool]) -> int | None:
    """Return the user components of a CPU model with features added and removed."""
    known = [name for name in MODELS if model == name or model.startswith(name + "-")]
    if not known:
        return None
    has = dict.fromkeys(MODELS[max(known, key=len)].split(), True) | features
    mask = XFEATURE_MASK_FPSSE
    if has.get("xsave"):
        for name, component in FEATURES.items():
            mask |= component if has.get(name) else 0
    return mask
