"""VirtualBox's log: the host's CPUID as VirtualBox saw it, raw rows where it prints them.

*Source*: VirtualBox src/VBox/VMM/VMMR3/CPUMR3CpuId.cpp cpumR3CpuIdInfo.
"""

from __future__ import annotations

import re

from xfast.errors import FormatError
from xfast.hosts.derive import from_cpuid, likely_layout
from xfast.hosts.model import Host
from xfast.xsave.cpuid import Cpuid
from xfast.xsave.features import XFEATURE_MASK_FPSSE

_ROW = re.compile(
    r"\b(Gst|Hst): (?:([0-9a-f]{8})/([0-9a-f]{4})|[ ]{13})[* ] ?"
    r"([0-9a-f]{8}) ([0-9a-f]{8}) ([0-9a-f]{8}) ([0-9a-f]{8})"
)
_MASK = re.compile(
    r"Valid (XCR0|IA32_XSS) bits, {1,4}Host: 0x([0-9a-f]{8})`([0-9a-f]{8})", re.IGNORECASE
)
_SIZE = re.compile(
    r"XSAVE area cur/max size by XCR0, {1,4}host: 0x([0-9a-f]{1,6})/0x([0-9a-f]{1,6})",
    re.IGNORECASE,
)
_STATE = re.compile(
    r"State #(\d{1,2}), {1,4}host: {1,4}off=0x([0-9a-f]{1,6}), cb=0x([0-9a-f]{1,6})",
    re.IGNORECASE,
)
_VENDOR = re.compile(r"\b(GenuineIntel|AuthenticAMD|HygonGenuine|CentaurHauls)\b")


def is_log(text: str) -> bool:
    """Return whether `text` is a log of VirtualBox with what this reads."""
    return "Valid XCR0 bits, " in text or ("Raw Standard CPUID Leaves" in text)


def read(text: str, name: str, path: str) -> Host:
    """Return the host, not the guest, of a VirtualBox log.

    Raises
    ------
    FormatError
        If the log does not tell the host's leaf 0xD, or it is impossible.
    """
    rows = _rows(text)
    if (0xD, 0) not in rows:
        rows |= _summary(text, path)
    host = from_cpuid(Cpuid.from_rows(rows), name, path)
    vendor = _VENDOR.search(text)
    if host.vendor is None and vendor:
        host = host.replace(vendor=vendor[1], provenance={**host.provenance, "vendor": "dump"})
    if host.layout is not None and not host.layout.slots and host.xcr0:
        layout = likely_layout(host.xcr0, host.vendor, None, rows[0xD, 0][2] or None)
        how = {} if layout is None else {"layout": "assumed"}
        host = host.replace(layout=layout, provenance={**host.provenance, **how})
    note = "VirtualBox's own monitor runs the guests: what KVM would offer here is derived"
    return host.replace(notes=(note,))


def _rows(text: str) -> dict[tuple[int, int], tuple[int, ...]]:
    """Return the host's raw rows; a line without a leaf belongs to the one above."""
    rows: dict[tuple[int, int], tuple[int, ...]] = {}
    leaf = None
    for match in _ROW.finditer(text):
        if match[2]:
            leaf = int(match[2], 16), int(match[3], 16)
        if match[1] == "Hst" and leaf is not None:
            rows.setdefault(leaf, tuple(int(match[i], 16) for i in (4, 5, 6, 7)))
    return rows


def _summary(text: str, path: str) -> dict[tuple[int, int], tuple[int, ...]]:
    """Return leaf 0xD as the log's summary tells it.

    Logs print IA32_XSS with its halves exchanged, and the word for user and supervisor states
    too: a state without an offset is a supervisor's, and the mask is the half that has its bit.
    """
    masks = {m[1].upper(): (int(m[2], 16), int(m[3], 16)) for m in _MASK.finditer(text)}
    if "XCR0" not in masks:
        raise FormatError(path, None, "expected 'Valid XCR0 bits, Host', got none in this log")
    high, low = masks["XCR0"]
    if not low & 1 and high & 1:
        high, low = low, high
    states = {int(nr): (int(off, 16), int(size, 16)) for nr, off, size in _STATE.findall(text)}
    supervisor = sum(1 << nr for nr, (offset, _) in states.items() if not offset and nr < 64)
    xss_high, xss_low = masks.get("IA32_XSS", (0, 0))
    if not supervisor & xss_low and supervisor & xss_high:
        xss_high, xss_low = xss_low, xss_high
    sizes = _SIZE.search(text)
    current, most = (int(sizes[1], 16), int(sizes[2], 16)) if sizes else (0, 0)
    rows: dict[tuple[int, int], tuple[int, ...]] = {
        (0xD, 0): (low | XFEATURE_MASK_FPSSE, current, most, high),
        (0xD, 1): (0, 0, xss_low, xss_high),
    }
    for nr, (offset, size) in states.items():
        rows[0xD, nr] = (size, offset, int(not offset), 0)
    return rows
