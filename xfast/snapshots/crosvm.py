"""crosvm's snapshots: a file a vCPU, in CBOR (since March 2025) or JSON (before).

A snapshot is a directory, in which ``vcpu`` is the one with vcpu0, vcpu1 ...: that directory, or
one of its files, is read. crosvm calls the format unstable, and no real file was to be had: the
reader follows crosvm's source, and was never checked against a file that crosvm wrote. So it reads
only, and refuses to edit. Encrypted snapshots can't be read.

*Source*: crosvm hypervisor/src/x86_64.rs (struct VcpuSnapshot, struct Xsave),
snapshot/src/lib.rs (SnapshotWriter); RFC 8949 (CBOR).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xfast.errors import FormatError, PolicyError
from xfast.kernels.uapi import CR4_PKE, MSR_IA32_XFD, MSR_IA32_XSS
from xfast.snapshots import infer
from xfast.snapshots.bytes.folder import Folder
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import Snapshot, Splice, Vcpu, misnumbered
from xfast.xsave.features import EXTENDED_OFFSET
from xfast.xsave.layout import Layout

NAME = re.compile(r"vcpu(\d{1,4})")
CBOR_START = re.compile(rb"[\xa5-\xb7\xbf]\x67vcpu_id")
JSON_START = b'{"vcpu_id":'
SIZE_LIMIT = 1 << 20
"""Bytes of a vCPU's file: some 25 KB, 60 KB with AMX."""
ITEM_LIMIT = 1 << 17
DEPTH_LIMIT = 16
AREA_LIMIT = 1 << 16

NO_EDITS = "crosvm's snapshots are read only: no real one was to be had to check an edit against"


class Broken(ValueError):
    """Data do not decode; turned into a FormatError where the file is known."""


class Cbor:
    """A decoder of the part of CBOR that serde writes: numbers, texts, arrays, maps, null.

    Parameters
    ----------
    data : bytes
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.items = 0

    def _take(self, count: int) -> bytes:
        if self.position + count > len(self.data):
            raise Broken(f"expected {count} bytes at {self.position}, got the end")
        self.position += count
        return self.data[self.position - count : self.position]

    def whole(self) -> Any:
        """Return the one item that the data are. Raises Broken as `value` does."""
        value = self.value()
        if self.position < len(self.data):
            raise Broken(f"expected one item, got more at {self.position}")
        return value

    def value(self, depth: int = 0) -> Any:
        """Return the next item.

        Raises
        ------
        Broken
            If there is none, or too many, or too deep.
        """
        self.items += 1
        if self.items > ITEM_LIMIT or depth > DEPTH_LIMIT:
            raise Broken(f"expected up to {ITEM_LIMIT} items, {DEPTH_LIMIT} deep; got more")
        (first,) = self._take(1)
        major, short = first >> 5, first & 31
        if major == 7:
            return self._simple(short)
        if short > 27:
            raise Broken(f"expected items of a known length, got {first:#x} at {self.position - 1}")
        number = short
        if short >= 24:
            number = int.from_bytes(self._take(1 << short - 24), "big")
        if major < 2:
            return number if major == 0 else -1 - number
        if major in (2, 3):
            data = self._take(number)
            return data if major == 2 else data.decode("utf-8", "replace")
        if major == 4:
            return [self.value(depth + 1) for _ in range(self._fitting(number))]
        if major == 5:
            pairs = (self._pair(depth + 1) for _ in range(self._fitting(number)))
            return dict(pairs)
        return self.value(depth + 1)  # a tag, and what it is of

    def _fitting(self, count: int) -> int:
        """Return a number of items, if the data can hold so many."""
        if count > len(self.data) - self.position:
            raise Broken(f"expected items within the data, got {count} at {self.position}")
        return count

    def _pair(self, depth: int) -> tuple[Any, Any]:
        key = self.value(depth)
        if not isinstance(key, (int, str)):
            raise Broken(f"expected a key, got another item at {self.position}")
        return key, self.value(depth)

    def _simple(self, short: int) -> Any:
        if short in (25, 26, 27):
            size = 1 << short - 24
            return struct.unpack({2: ">e", 4: ">f", 8: ">d"}[size], self._take(size))[0]
        if short in (20, 21, 22, 23):
            return {20: False, 21: True}.get(short)
        raise Broken(f"expected a value, got simple {short} at {self.position - 1}")


def claims(names: Sequence[str]) -> str | None:
    """Return "", the whole, for a directory of files vcpu0, vcpu1 ... and no others."""
    return "" if names and all(NAME.fullmatch(name) for name in names) else None


def sniff(source: Source) -> bool:
    """Tell whether a file is the state of a vCPU."""
    start = source.read(0, min(16, source.size))
    return start.startswith(JSON_START) or CBOR_START.match(start) is not None


def read(
    source: Source | Folder, *, layout: Layout | None = None, size: int | None = None
) -> list[Snapshot]:
    """Read a vCPU's file, or all in a directory.

    Parameters
    ----------
    source : Source or Folder
    layout : Layout, optional
        The layout of every area; default: inferred, for a snapshot has no CPUID.
    size : None
        The file tells the size of its area.

    Returns
    -------
    list of Snapshot
        One. A file that is named by itself and is not vCPU 0's raises doubts.

    Raises
    ------
    FormatError
        If a file is damaged, or a vCPU of the directory is missing.
    """
    vcpus = [_vcpu(file, layout) for file in _files(source)]
    vcpus.sort(key=lambda vcpu: vcpu.index)
    numbers = [vcpu.index for vcpu in vcpus]
    if isinstance(source, Folder) and numbers != list(range(len(numbers))):
        raise FormatError(
            source.path, None, f"expected vCPUs 0 to {len(numbers) - 1}, got {numbers[:16]}"
        )
    doubts = misnumbered(numbers)
    return [Snapshot(source.path, "crosvm", "vm", "kvm", vcpus, source.container, doubts=doubts)]


def _files(source: Source | Folder) -> Iterator[Source]:
    if isinstance(source, Source):
        yield source
        return
    for name in source.names:
        with source.file(name) as file:
            yield file


def _vcpu(source: Source, given: Layout | None) -> Vcpu:
    if source.size > SIZE_LIMIT:
        raise FormatError(
            source.path, None, f"expected up to {SIZE_LIMIT} bytes, got {source.size}"
        )
    data = source.read(0, source.size)
    try:
        state = json.loads(data) if data[:1] == b"{" else Cbor(data).whole()
        number, area, xcr0, msrs, cr4 = _parts(state)
    except (Broken, RecursionError, ValueError) as problem:
        raise FormatError(source.path, 0, f"found damage: {problem}") from None
    if not infer.headed(area):
        raise FormatError(source.path, 0, "expected an area of known components, got others")
    place = infer.place(area, given=given, mask=xcr0 or 0)
    return Vcpu(
        index=number,
        area=area,
        layout=place.layout,
        layout_source=place.source,
        layout_note=place.note,
        xcr0=xcr0,
        xss=msrs.get(MSR_IA32_XSS),
        xfd=msrs.get(MSR_IA32_XFD),
        pkru_enabled=None if cr4 is None else bool(cr4 & CR4_PKE),
        msrs=tuple(sorted(msrs)) or None,
    )


def _parts(state: Any) -> tuple[int, NDArray[np.uint8], int | None, dict[int, int], int | None]:
    """Return a state's number, area, XCR0, MSRs and CR4.

    Raises
    ------
    Broken
        If one is missing, or of another type.
    """
    if not isinstance(state, dict) or type(state.get("vcpu_id")) is not int:
        raise Broken("expected a map with vcpu_id")
    xsave = state.get("xsave")
    words = xsave.get("data") if isinstance(xsave, dict) else None
    length = xsave.get("len") if isinstance(xsave, dict) else None
    if not isinstance(words, list) or not all(_is(word, 32) for word in words):
        raise Broken("expected xsave.data, a list of 32-bit numbers")
    if type(length) is not int or not EXTENDED_OFFSET <= length <= min(4 * len(words), AREA_LIMIT):
        raise Broken(f"expected xsave.len from {EXTENDED_OFFSET} to that of the data")
    area = np.array(words, "<u4").view(np.uint8)[:length].copy()
    sregs = state.get("sregs")
    cr4 = sregs.get("cr4") if isinstance(sregs, dict) else None
    cr4 = cr4 if _is(cr4, 64) else None
    xcr0 = _registers(state.get("xcrs")).get(0)
    return (
        state["vcpu_id"],
        area,
        xcr0,
        _registers(state.get("msrs")),
        cr4 if _is(cr4, 64) else None,
    )


def _registers(value: Any) -> dict[int, int]:
    """Return {number: value} of a map, the keys of which are texts in JSON."""
    if not isinstance(value, dict):
        return {}
    if not all(str(key).isdecimal() and len(str(key)) < 11 for key in value):
        raise Broken("expected numbers of registers as keys")
    if not all(_is(one, 64) for one in value.values()):
        raise Broken("expected 64-bit values of registers")
    return {int(key): one for key, one in value.items()}


def _is(value: Any, width: int) -> bool:
    return type(value) is int and 0 <= value < 1 << width


def splices(
    source: Source | Folder, snapshot: Snapshot, areas: Mapping[int, NDArray[np.uint8]]
) -> list[Splice]:
    """Refuse: nobody could check an edit.

    Raises
    ------
    PolicyError
        Always.
    """
    raise PolicyError(f"{source.path}: {NO_EDITS}")
