"""libvirt's save image: a header, the domain's XML and a cookie in front of a QEMU stream.

*Source*: libvirt src/qemu/qemu_saveimage.h (struct _virQEMUSaveHeader) and qemu_saveimage.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from xfast.errors import FormatError
from xfast.xsave.features import XFEATURE_MASK_AVX512, XFEATURE_MASK_FPSSE, XFEATURE_MASK_MPX

if TYPE_CHECKING:
    from xfast.snapshots.bytes.source import Source

MAGIC = b"LibvirtQemudSave"
MAGIC_PARTIAL = b"LibvirtQemudPart"
HEADER_SIZE = 92
XML_LIMIT = 16 << 20
"""No domain XML with its cookie is larger than this (bytes)."""

COMPRESSION = {0: "", 1: "gzip", 2: "bzip2", 3: "xz", 4: "lzop", 5: "zstd", 6: "sparse"}
"""enum virQEMUSaveFormat; `sparse` is a mapped-ram stream that QEMU wrote itself."""

FEATURES = {
    "avx": 1 << 2,
    "mpx": XFEATURE_MASK_MPX,
    "avx512f": XFEATURE_MASK_AVX512,
    "pku": 1 << 9,
    "amx-tile": 3 << 17,
    "apxf": 1 << 19,
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


class Header(NamedTuple):
    """What precedes the stream: offsets in bytes, of the file."""

    compression: str
    body: int
    xml: bytes
    cookie: bytes


def header(source: Source) -> Header | None:
    """Return the header of a libvirt save image, or None where `source` is something else.

    Raises
    ------
    FormatError
        If the save was never finished, or the header contradicts the file.

    *Source*: libvirt src/qemu/qemu_saveimage.c qemuSaveImageOpen().
    """
    if source.size < HEADER_SIZE:
        return None
    magic = source.read(0, 16)
    if magic == MAGIC_PARTIAL:
        raise FormatError(source.path, 0, "found an unfinished libvirt save, needed a whole one")
    if magic != MAGIC:
        return None
    order = "<" if source.unpack("<I", 16)[0] <= 0xFFFF else ">"
    version, length, _, compression, cookie = source.unpack(order + "5I", 16)
    if version != 2:
        raise FormatError(source.path, 16, f"found libvirt save version {version}, needed 2")
    if compression not in COMPRESSION:
        raise FormatError(
            source.path, 28, f"found libvirt save format {compression}, needed 0 to 6"
        )
    if length > XML_LIMIT:
        raise FormatError(
            source.path, 20, f"found {length} bytes of XML, needed at most {XML_LIMIT}"
        )
    if cookie > length:
        raise FormatError(
            source.path, 32, f"found a cookie at {cookie}, needed it within {length} bytes"
        )
    data = source.read(HEADER_SIZE, length)
    xml = data[: cookie or length].split(b"\0", 1)[0]
    return Header(
        COMPRESSION[compression],
        HEADER_SIZE + length,
        xml,
        data[cookie:].split(b"\0", 1)[0] if cookie else b"",
    )


class Domain(NamedTuple):
    """What the XML tells of the guest.

    `kvm` is whether the domain ran under KVM; `components` the user components that its CPU may
    have (bits), None where the XML does not tell.
    """

    name: str
    kvm: bool
    model: str
    components: int | None


def domain(source: Source, head: Header) -> Domain:
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
        raise FormatError(
            source.path, HEADER_SIZE, f"found XML that is no domain's: {problem}"
        ) from None
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
