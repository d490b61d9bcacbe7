"""libvirt's documents: capabilities, domcapabilities, a domain's ``<cpu>``, and ``<cpudata>``.

A model's name stands for features (`xfast.hosts.models`); the ``<feature>`` elements add to
them and take away. None of the first three tells offsets: layouts are assumed.

*Source*: libvirt docs/formatcaps, formatdomaincaps, formatdomain; tests/cputestdata.
"""

from __future__ import annotations

from typing import NamedTuple

from xfast.errors import FormatError
from xfast.hosts.derive import from_cpuid, from_features
from xfast.hosts.firecracker import REGISTERS
from xfast.hosts.model import Host
from xfast.hosts.models import kernel_name, model_named, vendor_text
from xfast.hosts.xml import Element, elements
from xfast.xsave.cpuid import Cpuid
from xfast.xsave.layout import PRESETS


class Place(NamedTuple):
    """Where a kind of document has its CPU, whose facts those are, and what to know of them."""

    path: tuple[str, ...]
    mode: str
    note: str


PLACES = (
    Place(
        ("capabilities", "host", "cpu"), "",
        "libvirt lists what the CPU has; what KVM offers of it is assumed",
    ),
    Place(
        ("domainCapabilities", "cpu", "mode"), "host-model",
        "libvirt lists what KVM offers with the model host-model",
    ),
    Place(
        ("domain", "cpu"), "",
        "these are a guest's features: the machine it runs on has at least them",
    ),
    Place(
        ("cpu",), "",
        "these are a guest's features: the machine it runs on has at least them",
    ),
)  # fmt: skip
"""The kinds of document that name a model, each with the path of the element that has it."""

ROOTS = "<cpudata>, <capabilities>, <domainCapabilities>, <domain> or <cpu>"


def read(text: str, name: str, path: str) -> Host:
    """Read any of libvirt's documents about CPUs.

    Raises
    ------
    FormatError
        If it is none of them, or does not say which features a CPU has.
    """
    texts: list[str] = []
    found = elements(text, path, texts)
    root = found[0][0][0]
    if root == "cpudata":
        return _of_cpudata(found, name, path)
    emulated = any(
        tags == ("domainCapabilities", "domain") and text == "qemu"
        for (tags, _), text in zip(found, texts, strict=True)
    )
    for place in PLACES:
        for i, (tags, attributes) in enumerate(found):
            if tags == place.path and place.mode in ("", attributes.get("name")):
                host = _of_cpu(found[i:], texts[i:], place, name, path)
                return _emulated(host) if emulated else host
    raise FormatError(path, None, f"expected {ROOTS} with a CPU in it, got <{root:.40}>")


def _emulated(host: Host) -> Host:
    """Return a host whose guests run in QEMU's own emulation, which has Intel's layout always."""
    layout = None if host.xcr0 is None else PRESETS["intel"].restricted(host.xcr0)
    return host.replace(layout=layout, notes=(*host.notes, "guests run in QEMU's own emulation"))


def _of_cpudata(found: list[Element], name: str, path: str) -> Host:
    """Read ``<cpudata>``: CPUID itself."""
    rows: dict[tuple[int, int], list[int]] = {}
    for tags, attributes in found:
        if tags[-1] != "cpuid":
            continue
        texts = [attributes.get(key, "0") for key in ("eax_in", "ecx_in", *REGISTERS)]
        try:
            if max(map(len, texts)) > 20:
                raise ValueError
            leaf, subleaf, *registers = (int(text, 16) for text in texts)
            if not all(0 <= value < 1 << 32 for value in (leaf, subleaf, *registers)):
                raise ValueError
        except ValueError:
            raise FormatError(
                path, None, f"XML: expected numbers of 32 bits, got {attributes!r:.100}"
            ) from None
        rows[leaf, subleaf] = registers
    if not rows:
        raise FormatError(path, None, "expected <cpudata> with <cpuid> rows, got none of them")
    return from_cpuid(Cpuid.from_rows(rows), name, path)


def _of_cpu(found: list[Element], texts: list[str], place: Place, name: str, path: str) -> Host:
    """Read the element that `found` starts with: a model, and features more or less."""
    base = found[0][0]
    model_name, vendor, arch = "", None, ""
    more: set[str] = set()
    less: set[str] = set()
    signature: tuple[int | None, int | None] = (None, None)
    for i, ((tags, attributes), text) in enumerate(zip(found, texts, strict=True)):
        if i and len(tags) <= len(base):
            break
        if len(tags) != len(base) + 1:
            continue
        if tags[-1] == "model":
            model_name = text
        elif tags[-1] == "vendor":
            vendor = vendor_text(text)
        elif tags[-1] == "arch":
            arch = text
        elif tags[-1] == "signature":
            signature = _number(attributes.get("family")), _number(attributes.get("model"))
        elif tags[-1] == "feature":
            feature = kernel_name(attributes.get("name", ""))
            away = attributes.get("policy") in ("disable", "forbid")
            (less if away else more).update({feature} if feature else ())
    if arch not in ("", "x86_64", "i686"):
        raise FormatError(path, None, f"expected an x86 machine, got {arch!r:.40}")
    if not model_name:
        mode = found[0][1].get("mode", found[0][1].get("name", "no model"))
        raise FormatError(path, None, f"expected a CPU model, got {mode!r:.40}, which names none")
    return _of_model(model_name, more, less, vendor, signature, place, name, path)


def _of_model(
    model_name: str,
    more: set[str],
    less: set[str],
    vendor: str | None,
    signature: tuple[int | None, int | None],
    place: Place,
    name: str,
    path: str,
) -> Host:
    """Return the host of a model with features more or less."""
    model = model_named(model_name)
    if model is None:
        note = f"the CPU model {model_name} is not known, and so its features are not"
        provenance = {} if vendor is None else {"vendor": "dump"}
        return Host(name, vendor=vendor, source=path, provenance=provenance, notes=(note,))
    family, number = signature
    if family is None and model.signatures:
        family, number = model.signatures[0]
    host = from_features(
        (model.features | more) - less, name, path,
        vendor=vendor or model.vendor, family=family, model=number,
    )  # fmt: skip
    return host.replace(notes=(place.note, f"the features of {model_name} are from {model.source}"))


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() and text.isascii() and len(text) < 5 else None
