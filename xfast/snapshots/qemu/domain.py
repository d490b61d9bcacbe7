"""What the XML in a libvirt save image tells of the guest: its name, its type, its CPU.

*Source*: libvirt docs/formatdomain.rst "CPU model and topology"; src/qemu/qemu_domain.c
qemuDomainSaveCookieFormatBuf().
"""

from __future__ import annotations

import re
from typing import NamedTuple
from xml.parsers import expat

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


UNREADABLE = -1
"""In the place of a number that is there and is none."""


class Domain(NamedTuple):
    """What the XML tells of the guest.

    `kvm` is whether the domain ran under KVM; `components` the user components that its CPU may
    have (bits), None where the XML does not tell; `vcpus` how many it had, None likewise, and
    UNREADABLE where the XML tells it in no number.
    """

    name: str
    kvm: bool
    model: str
    components: int | None
    vcpus: int | None = None


class _Wanted:
    """What is collected of a document while it is parsed; no tree is built.

    Parameters
    ----------
    data : bytes
        XML. A document type, and with it every entity, is refused.

    Raises
    ------
    ValueError
        If it is no XML, or has a document type.
    """

    TEXTS = frozenset({"name", "vcpu", "cpu/model"})
    TEXT_LIMIT = 1024
    DEPTH = 5
    """Of what is looked at: <domstatus><domain><cpu><feature>, and one more."""

    def __init__(self, data: bytes) -> None:
        self.root = ""
        self.attributes: dict[str, dict[str, str]] = {}
        self.texts: dict[str, str] = {}
        self.features: dict[str, bool] = {}
        self._path: list[tuple[str, bool]] = []
        self._depth = 0
        parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text
        parser.StartDoctypeDeclHandler = self._doctype
        try:
            parser.Parse(data, True)
        except expat.ExpatError as problem:
            raise ValueError(str(problem)) from None

    def _doctype(self, *_: object) -> None:
        raise ValueError("expected XML without a DOCTYPE, got one")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > self.DEPTH:
            return
        if self._depth == 1:
            self.root = name
        place = self._place(name)
        feature = place == "cpu/feature"
        first = (feature or place not in self.attributes) and (not self._path or self._path[-1][1])
        self._path.append((name, first))
        if not first:
            return
        if feature:
            policy = attributes.get("policy", "require")
            self.features[attributes.get("name", "")] = policy not in ("disable", "forbid")
        else:
            self.attributes[place] = attributes

    def _end(self, name: str) -> None:
        if self._depth <= self.DEPTH:
            self._path.pop()
        self._depth -= 1

    def _text(self, text: str) -> None:
        place = self._place() if self._depth <= self.DEPTH and self._path[-1][1] else ""
        if place in self.TEXTS and len(self.texts.get(place, "")) < self.TEXT_LIMIT:
            self.texts[place] = self.texts.get(place, "") + text

    def _place(self, *more: str) -> str:
        """Return where the parser is, from the domain (or the cookie's root) on."""
        inner = [name for name, _ in self._path[1:]]
        inner += more if self._path else []
        if self.root in ("domain", "cookie"):
            return "/".join(inner)
        return (
            "/".join(inner[1:]) or "domain" if inner[:1] == ["domain"] else "../" + "/".join(inner)
        )


def domain(path: str, head: Header) -> Domain:
    """Read the domain's XML and the cookie, which lists the CPU that the guest really got.

    Raises
    ------
    FormatError
        If one is no XML, or has a document type.
    """
    try:
        outer = _Wanted(head.xml)
        cookie = _Wanted(head.cookie) if head.cookie else outer
        if outer.root != "domain" and "domain" not in outer.attributes:
            raise ValueError("no domain")
    except ValueError as problem:
        raise FormatError(path, HEADER_SIZE, f"found XML that is no domain's: {problem}") from None
    told = cookie if "cpu" in cookie.attributes else outer
    model, components = "", None
    if "cpu" in told.attributes:
        model = told.texts.get("cpu/model", "").strip()
        components = _components(model, told.features)
    kind = outer.attributes["" if outer.root == "domain" else "domain"].get("type")
    return Domain(
        outer.texts.get("name", "").strip(), kind == "kvm", model, components, _vcpus(outer)
    )


def _vcpus(outer: _Wanted) -> int | None:
    """Return how many vCPUs the domain had: those plugged in, where it tells both numbers."""
    count = outer.attributes.get("vcpu", {}).get("current") or outer.texts.get("vcpu", "")
    if "vcpu" not in outer.attributes:
        return None
    return int(count) if re.fullmatch(r"\s*\d{1,6}\s*", count) else UNREADABLE


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
