"""Lists of flags: /proc/cpuinfo, lscpu (text and JSON), and what Xen's `xe` tells of a host.

Flags tell features and no more: see `xfast.hosts.derive.from_features`.

*Source*: Linux arch/x86/kernel/cpu/proc.c show_cpuinfo(); util-linux sys-utils/lscpu.c; Xen
xen/include/public/arch-x86/cpufeatureset.h (the order of a feature set's words).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from xfast.errors import FormatError
from xfast.hosts.baseline import common
from xfast.hosts.derive import from_features
from xfast.hosts.model import Host
from xfast.xsave.cpuid import FEATURES, RUNTIME_FEATURES

FIELDS = {
    "vendor_id": "vendor", "vendor id": "vendor", "vendor": "vendor",
    "cpu family": "family", "family": "family",
    "model": "model",
    "model name": "title", "modelname": "title",
    "flags": "flags",
    "architecture": "architecture",
    "features_hvm": "features_hvm", "features": "features",
}  # fmt: skip
"""{a tool's name of a field, in lower case: ours}."""

_LINE = re.compile(
    r"[ \t]{0,40}([^\W\d][^:\uff1a]{0,40}?)[ \t]{0,40}(?:\([ A-Z]{2,4}\))?[:\uff1a](.*)"
)
_IS_FLAGS = re.compile(
    r"^[ \t]{0,40}(?:flags|features_hvm)[ \t]{0,40}(?:\([ A-Z]{2,4}\))?:"
    r"|[:\uff1a][ \t]{0,40}fpu (?:vme|de|pse|tsc) ",
    re.M | re.I,
)
_STARTS_FLAGS = re.compile(r"fpu (?:vme|de|pse|tsc) ")
_MORE_FLAGS = re.compile(r"[ \t]{0,80}[a-z0-9_]+(?: [a-z0-9_]+)*[ \t]{0,80}")
_VENDORS = frozenset({"GenuineIntel", "AuthenticAMD", "HygonGenuine", "CentaurHauls", "Shanghai"})
_FOREIGN = re.compile(r"^(?:Architecture:[ \t]*(?!x86|i[3-6]86)\S+|Features[ \t]*: )", re.M)

KIND_LIMIT = 64
"""Kinds of CPU in one list, at most: hybrid parts have two or three."""

XEN_WORDS = (
    (1, 0, "edx"), (1, 0, "ecx"), (0x80000001, 0, "edx"), (0x80000001, 0, "ecx"),
    (0xD, 1, "eax"), (7, 0, "ebx"), (7, 0, "ecx"), (0x80000007, 0, "edx"),
    (0x80000008, 0, "ebx"), (7, 0, "edx"), (7, 1, "eax"), (0x80000021, 0, "eax"),
    (7, 1, "ebx"), (7, 2, "edx"), (7, 1, "ecx"), (7, 1, "edx"),
)  # fmt: skip
"""Leaf, sub-leaf and register of each word of a Xen feature set."""

OLD_KERNEL = "flags that this kernel is too old to know are missing from its list"
ENDS_HERE = "the text ends with its flags: if it was cut off there, the last ones are missing"


_BARE = re.compile(r"\s*fpu [a-z0-9_ \n]+\Z")
_ONE_LINE = re.compile(r"[;:] (?:flags|features_hvm): ")


def is_flags(text: str) -> bool:
    """Return whether `text` has a line of flags, or is such a list of another architecture."""
    return any(pattern.search(text) for pattern in (_IS_FLAGS, _ONE_LINE, _FOREIGN)) or bool(
        _BARE.match(text)
    )


def read(text: str, name: str, path: str) -> Host:
    """Read /proc/cpuinfo, lscpu's text, or the text of `xe host-cpu-info`.

    Raises
    ------
    FormatError
        If there are no flags, or they are of another architecture.
    """
    kinds = {
        tuple(sorted((k, v) for k, v in cpu.items() if k != "processor")): cpu
        for cpu in _cpus(text)
    }
    hosts = [of_fields(cpu, name, path) for cpu in list(kinds.values())[: KIND_LIMIT + 1]]
    if len(hosts) > KIND_LIMIT:
        raise FormatError(path, None, f"expected at most {KIND_LIMIT} kinds of CPU, got more")
    if not hosts:
        why = "the end within them" if _IS_FLAGS.search(text) else "another machine's"
        raise FormatError(path, None, f"expected the flags of an x86 CPU, got {why}")
    if len(hosts) == 1:
        cut = _STARTS_FLAGS.search(text[text.rfind("\n") + 1 :]) is not None
        return hosts[0].replace(notes=(*hosts[0].notes, *[ENDS_HERE] * cut))
    source = f"{path} (common to {len(hosts)} kinds of CPU)"
    return common(hosts, name).replace(source=source, notes=hosts[0].notes)


def _cpus(text: str) -> Iterator[dict[str, str]]:
    """Yield the fields of each CPU that has flags; each ``processor`` starts another.

    `xe host-param-get` puts all of them in one line, and people copy the flags alone.
    """
    if _BARE.match(text):
        text = f"flags: {' '.join(text.split())}"
    elif _ONE_LINE.search(text):
        text = text.replace("; ", "\n").replace("cpu_info (MRO): ", "\n")
    cpu: dict[str, str] = {}
    field = ""
    for line in text.splitlines():
        if field == "flags" and _MORE_FLAGS.fullmatch(line):  # a mail's lines are shorter
            cpu["flags"] += f" {line.strip()}"
            continue
        match = _LINE.match(line)
        if match is None:
            continue
        key, value = match[1], match[2].strip()
        if key == "processor":
            if "flags" in cpu:
                yield cpu
            cpu = {"processor": value}
        field = field_of(key, value)
        if field:
            cpu.setdefault(field, value)
    if field == "flags" and "processor" in cpu and not text.endswith("\n"):
        return  # /proc/cpuinfo has more behind the flags: these are cut off
    if "flags" in cpu or "features_hvm" in cpu:
        yield cpu


def field_of(key: str, value: str) -> str:
    """Return our name of a field, by its own name or by what it holds; empty if none is known.

    `lscpu` speaks the user's language, and calls its flags ``Markierungen`` or ``Drapaux``.
    """
    if _STARTS_FLAGS.match(value):
        return "flags"
    return FIELDS.get(key.lower(), "vendor" if value in _VENDORS else "")


def read_lscpu(document: Mapping[str, Any], name: str, path: str) -> Host:
    """Read lscpu's JSON, nested or not.

    Raises
    ------
    FormatError
        If there are no flags in it.
    """
    fields: dict[str, str] = {}
    waiting = [document.get("lscpu")]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += reversed(item)
        elif isinstance(item, dict):
            key, value = item.get("field"), item.get("data")
            if isinstance(key, str) and isinstance(value, str):
                field = field_of(key.rstrip(":\uff1a "), value)
                if field:
                    fields.setdefault(field, value)
            waiting.append(item.get("children"))
    return of_fields(fields, name, path)


def renamed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a tool's JSON object by our names."""
    return {FIELDS[key]: value for key, value in document.items() if key in FIELDS}


def of_fields(fields: Mapping[str, Any], name: str, path: str) -> Host:
    """Return the host of one CPU's fields, by our names.

    Raises
    ------
    FormatError
        If there are no flags, or they are no text.
    """
    vendor, words = fields.get("vendor"), fields.get("flags", "")
    if vendor is not None and not isinstance(vendor, str):
        raise FormatError(path, None, f"vendor: expected text, got {vendor!r:.40}")
    machine = str(fields.get("architecture", "x86"))
    if not machine.startswith(("x86", "i386", "i486", "i586", "i686")):
        raise FormatError(path, None, f"expected an x86 machine, got {machine!r:.40}")
    xen = fields.get("features_hvm")
    if xen is not None:
        features = xen_features(xen, path)
    elif isinstance(words, str) and words.split():
        features = frozenset(words.split())
    else:
        raise FormatError(path, None, "flags: expected a list of an x86 CPU's, got none")
    host = from_features(
        features, name, path, vendor=vendor or None,
        family=_number(fields.get("family")), model=_number(fields.get("model")),
    )  # fmt: skip
    notes = [
        "flags tell features alone: the layout and what KVM offers are assumed",
        "the feature set is what Xen gives its HVM guests" if xen is not None else OLD_KERNEL,
    ]
    if "hypervisor" in features or "hypervisor" in str(words).split():
        notes.append("the list is of a virtual machine: it tells what that was given")
    return host.replace(notes=tuple(notes))


def xen_features(text: object, path: str) -> frozenset[str]:
    """Return the features in a Xen feature set: words of 32 bits, joined by hyphens.

    Raises
    ------
    FormatError
        If it is none.
    """
    words = text.split("-") if isinstance(text, str) else []
    if not 4 <= len(words) <= 64 or not all(re.fullmatch("[0-9a-f]{8}", word) for word in words):
        raise FormatError(
            path, None, f"features_hvm: expected words of 8 hexadecimal digits, got {text!r:.40}"
        )
    values = dict(zip(XEN_WORDS, (int(word, 16) for word in words), strict=False))
    set_here: Iterable[str] = (
        f.name
        for f in FEATURES.values()
        if values.get((f.leaf, f.subleaf, f.register), 0) >> f.bit & 1
    )
    return frozenset(set_here) - RUNTIME_FEATURES


def _number(value: object) -> int | None:
    """Return a family or model, or None where it is not told as a number."""
    text = str(value).strip()
    return int(text) if text.isdecimal() and text.isascii() and len(text) < 5 else None
