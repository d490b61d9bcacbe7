"""Cloud Hypervisor's state.json, in its generations: JSON text inside JSON.

The state of vCPU n lies at snapshots/cpu-manager/snapshots/n, as JSON text of its own: in a
string (from v39), in an array of bytes (v30 to v38) or in a section with such an array (up to
v28). Edits replace numbers where they stand, so that every other byte stays as it is. x87 and
SSE are also in the object ``fpu``, which a restore applies after the XSAVE area: both are edited.

*Source*: Cloud Hypervisor vm-migration/src/lib.rs (Snapshot, SnapshotData),
hypervisor/src/kvm/x86_64/mod.rs (VcpuKvmState) and hypervisor/src/kvm/mod.rs
KvmVcpu::set_state().
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xfast.engine import files
from xfast.errors import FormatError, LayoutError, XfastError
from xfast.kernels.uapi import CR4_PKE, MSR_IA32_XFD, MSR_IA32_XSS, SREGS_CR4
from xfast.snapshots import infer, raw, state_plans
from xfast.snapshots.bytes import edit
from xfast.snapshots.bytes.entry import found_as
from xfast.snapshots.bytes.folder import Folder
from xfast.snapshots.bytes.json_text import DECODER, SHOWN, Span, Text
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.kvm_fpu import FPU, IMAGE, differing, span_of, value_of
from xfast.snapshots.model import Snapshot, Splice, Unseen, Vcpu, kept, misnumbered
from xfast.xsave.cpuid import Cpuid, Entry
from xfast.xsave.features import KVM_XSAVE_SIZE
from xfast.xsave.layout import Layout

STATE = "state.json"
CONFIG = "config.json"
MEMORY = "memory-ranges"
"""The files of a snapshot's directory: the vCPUs, the machine's definition, its memory."""
XSAVE_MEMBER = b'\\"xsave\\":'
"""What each vCPU's state has, which is JSON in a string."""

CONFIG_LIMIT = 1 << 20
CONFIG_SHORT = 1 << 14
"""Bytes of a definition that is kept for others which are the same: most take a tenth of it."""

SIZE_LIMIT = 32 << 20
VCPU_LIMIT = 4096
"""KVM_MAX_VCPUS; Cloud Hypervisor's own is 254."""
CPUID_TEXT_LIMIT = 1 << 15
"""Characters of a CPUID that is kept for others which are the same: 256 entries take as many."""

NUMBER = re.compile(r"-?\d+")
RECENT = "v39 or later"


@dataclass(frozen=True)
class Origin:
    """Where a vCPU's numbers lie in the text of its state.

    `xsave` are the lists that make up the area, `fpu` the fields of that object, and `whole` is
    the object itself.
    """

    text: Text
    xsave: tuple[Span, ...]
    fpu: Mapping[str, Span]
    whole: Span | None

    def places(self) -> dict[str, Span]:
        """Return offset and length in the file of ``xsave`` and ``fpu``."""
        ends = self.words()[1]
        found = {"xsave": self.text.span((ends[0][0], ends[-1][1]))}
        if self.whole:
            found["fpu"] = self.text.span(self.whole)
        return found

    def area(self) -> NDArray[np.uint8]:
        """Return the XSAVE area."""
        parts = [
            _array(self.text, span, None if i else KVM_XSAVE_SIZE // 4, 1 << 32)
            for i, span in enumerate(self.xsave)
        ]
        return np.concatenate(parts).astype("<u4").view(np.uint8)

    def words(self) -> tuple[NDArray[np.uint8], list[Span]]:
        """Return the XSAVE area, and where each of its u32 lies."""
        words, spans = _numbers(self.text, self.xsave[0], KVM_XSAVE_SIZE // 4, 1 << 32)
        for more in self.xsave[1:]:
            extra, extra_spans = _numbers(self.text, more, None, 1 << 32)
            words += extra
            spans += extra_spans
        return np.array(words, "<u4").view(np.uint8), spans


def claims(names: Sequence[str]) -> str | None:
    """Return state.json where a directory has it: that is the snapshot."""
    return STATE if STATE in names else None


def companion(folder: Folder, name: str) -> bool:
    """Tell whether a file is guest memory beside a state.json, or JSON without vCPUs."""
    if not name.endswith(".json"):
        return name == MEMORY and STATE in folder.names
    try:
        with folder.file(name) as source:
            return not sniff(source)
    except XfastError:
        return False


def sniff(source: Source) -> bool:
    """Tell whether a file is JSON with a member "cpu-manager"."""
    start = source.read(0, min(64, source.size)).lstrip()
    if not start.startswith(b"{"):
        return False
    data = source.read(0, min(source.size, SIZE_LIMIT))
    return files.holds(data, b'"cpu-manager"', 0, len(data))


def read(
    source: Source, *, layout: Layout | None = None, size: int | None = None
) -> list[Snapshot]:
    """Read the vCPUs of a state.json.

    Parameters
    ----------
    source : Source
    layout : Layout, optional
        The layout of every area; default: from each vCPU's CPUID.
    size : None
        The file tells the size of its areas.

    Returns
    -------
    list of Snapshot
        One. A vCPU's `facts` hold its ``fpu`` object.

    Raises
    ------
    FormatError
        If the JSON is damaged, or lacks what a vCPU must have.
    """
    if source.size > SIZE_LIMIT:
        raise FormatError(
            source.path, None, f"expected at most {SIZE_LIMIT} bytes, got {source.size}"
        )
    data = source.read(0, source.size)
    known = state_plans.follow(data) if layout is None else None
    vcpus: Sequence[Vcpu]
    if known:
        vcpus = _unseen(source.path, data, *known)
        doubts, generation = known[0].doubts, RECENT
    else:
        parts = list(_parts(source.path, data, layout))
        vcpus = [part.vcpu for part in parts]
        generation = RECENT if parts[-1].text.numbers is None else "v38 or earlier"
        doubts = misnumbered(vcpu.index for vcpu in vcpus)
        states = data.count(XSAVE_MEMBER)
        if states > len(vcpus):
            doubts += (f"expected {states} vCPUs, as many as have a state, got {len(vcpus)}",)
        elif layout is None:
            state_plans.remember(data, parts, _counting)
    told = _boot_vcpus(source)
    if told not in (None, len(vcpus)):
        doubts += (f"expected {told} vCPUs, as {CONFIG} beside it says, got {len(vcpus)}",)
    return [
        Snapshot(
            source.path,
            "cloud-hypervisor",
            "vm",
            "kvm",
            vcpus,
            source.container,
            {"generation": generation},
            doubts=doubts,
        )
    ]


def _parts(path: str, data: bytes, given: Layout | None) -> Iterator[state_plans.Part]:
    """Yield the vCPUs of a state.json."""
    for index, state, text in _states(path, data):
        vcpu = _vcpu(index, text, state, given)
        yield state_plans.Part(vcpu, text, state, tuple(kept(vcpu, Origin).fpu))


def _counting(part: state_plans.Part) -> Iterator[tuple[Span, int, bool, int]]:
    """Yield the numbers that make up a vCPU's area and the image of its fpu object."""
    origin = kept(part.vcpu, Origin)
    for i, place in enumerate(origin.words()[1]):
        yield place, 4, False, 4 * i
    for name, span in origin.fpu.items():
        offset, width = span_of(name)
        for i, place in enumerate(_numbers(part.text, span, FPU[name][3], 1 << 64)[1]):
            yield place, width, True, offset + width * i


def _unseen(path: str, data: bytes, plan: state_plans.Plan, values: bytes) -> Sequence[Vcpu]:
    """Return the vCPUs that a plan found, made when somebody looks."""
    told: list[Hashable] = ["cloud-hypervisor", plan.number]
    size, start, behind = plan.size, 0, len(plan.vcpus) * plan.size
    for vcpu in plan.vcpus:
        one, facts = infer.seen(values, start, size, None, vcpu.cpuid, vcpu.xcr0 or 0)
        differs = differing(values, start, behind, one.xstate_bv, vcpu.fpu)
        told += one.number, differs, facts
        start += size
        behind += IMAGE
    return Unseen(
        tuple(told), len(plan.vcpus), lambda: [part.vcpu for part in _parts(path, data, None)]
    )


def _boot_vcpus(source: Source) -> int | None:
    """Return how many vCPUs the config.json beside a state.json tells, or None.

    *Source*: Cloud Hypervisor vmm/src/vm_config.rs (struct CpusConfig); vmm/src/vm.rs
    Vm::resize() keeps it up to date.
    """
    if not source.path.endswith(STATE) or os.path.basename(source.path) != STATE:
        return None
    path = found_as(source.path, os.path.join(os.path.dirname(source.path), CONFIG))
    try:
        with Source.open(path) as file:
            config = file.read(0, min(file.size, CONFIG_LIMIT))
    except XfastError:
        return None
    return (_count_in_short if len(config) <= CONFIG_SHORT else _count_in)(config)


def _count_in(config: bytes) -> int | None:
    """Return how many vCPUs a config.json tells, or None."""
    try:
        count = json.loads(config)["cpus"]["boot_vcpus"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return count if type(count) is int else None


_count_in_short = lru_cache(maxsize=64)(_count_in)
"""The same, worked out once for what a fleet's machines share."""


def _states(path: str, data: bytes) -> Iterator[tuple[int, dict[str, Span], Text]]:
    """Yield every vCPU's number, where the members of its state lie, and in which text."""
    file = Text(path, data.decode("latin-1")).checked()
    members = file.members(0)
    end = file.end(0)
    if file.text[end:].strip(" \t\r\n"):
        raise FormatError(path, end, "expected one JSON object, got more behind it")
    for step in ("snapshots", "cpu-manager", "snapshots"):
        if step not in members:
            raise FormatError(path, None, f"expected the vCPUs in {step!r}, got no such member")
        members = file.members(members[step][0])
    if not members:
        raise FormatError(path, None, "expected at least one vCPU, got none")
    if len(members) > VCPU_LIMIT:
        raise FormatError(path, None, f"expected at most {VCPU_LIMIT} vCPUs, got {len(members)}")
    for i, (key, span) in enumerate(members.items()):
        number = re.search(r"\d{1,9}$", key)
        held = file.members(span[0]).get("snapshot_data")
        if held is None:
            raise file.error(span[0], f"vCPU {key[:SHOWN]!r}: found no 'snapshot_data'")
        text = file.inner(held).checked()
        state = text.members(0)
        if "Mshv" in state:
            raise file.error(span[0], "expected a vCPU of KVM, got one of the mshv hypervisor")
        if "Kvm" in state:
            state = text.members(state["Kvm"][0])
        yield int(number.group()) if number else i, state, text


def _vcpu(index: int, text: Text, state: dict[str, Span], given: Layout | None) -> Vcpu:
    fpu = _fpu(text, state) if "fpu" in state else {}
    origin = Origin(text, _xsave(text, state), fpu, state.get("fpu"))
    area = origin.area()
    value = {k: _value(text, state[k]) for k in ("xcrs", "sregs") if k in state}
    try:
        cpuid = _cpuid(text, state["cpuid"]) if "cpuid" in state else None
        msrs = _msrs(text, state["msrs"]) if "msrs" in state else {}
        xcr0 = _xcr0(value.get("xcrs"))
        place = infer.place(area, given=given, cpuid=cpuid, mask=xcr0 or 0)
        cr4 = _cr4(value.get("sregs"))
    except (ValueError, LayoutError, struct.error) as problem:
        raise text.error(0, f"vCPU {index}: {problem}") from None
    held = {name: _held(text, span, name) for name, span in fpu.items()}
    facts: dict[str, Any] = {}
    if "fpu" in state:
        facts["fpu"] = {
            name: values if len(values) > 1 else values[0] for name, values in held.items()
        }
    return Vcpu(
        index=index,
        area=area,
        layout=place.layout,
        layout_source=place.source,
        layout_note=place.note,
        xcr0=xcr0,
        xss=msrs.get(MSR_IA32_XSS),
        xfd=msrs.get(MSR_IA32_XFD),
        cpuid=cpuid,
        pkru_enabled=None if cr4 is None else bool(cr4 & CR4_PKE),
        msrs=tuple(sorted(msrs)) if msrs else None,
        fpu_differs=tuple(sorted(name for name in held if held[name] != value_of(area, name))),
        origin=origin,
        facts=facts,
    )


def _numbers(text: Text, span: Span, count: int | None, limit: int) -> tuple[list[int], list[Span]]:
    """Return the numbers of a value, lists within it flattened, and where each lies."""
    commas = text.text.count(",", *span)
    if commas >= (count or raw.AREA_LIMIT // 4):
        raise text.error(
            span[0], f"expected at most {count or raw.AREA_LIMIT // 4} numbers, got {commas + 1}"
        )
    spans = [m.span() for m in NUMBER.finditer(text.text, *span)]
    try:
        values = [int(text.text[a:b]) for a, b in spans]
    except ValueError as problem:
        raise text.error(span[0], str(problem)) from None
    rest = NUMBER.sub("", text.text[slice(*span)])
    if rest.strip("[], \t\r\n") or (count is not None and len(values) != count):
        raise text.error(span[0], f"expected {count or 'only'} numbers, got {len(values)}")
    if any(not 0 <= value < limit for value in values):
        raise text.error(span[0], f"expected numbers from 0 to {limit - 1:#x}, got another")
    return values, spans


def _array(text: Text, span: Span, count: int | None, limit: int) -> NDArray[np.uint64]:
    """Return the numbers of a value as `_numbers` does, and not where they lie."""
    room = count or min(raw.AREA_LIMIT // 4, span[1] - span[0])
    values = np.empty(room, np.uint64)
    found = files.numbers(text.text, *span, limit, values)
    if found < 0 or (count is not None and found != count):
        return np.array(_numbers(text, span, count, limit)[0], np.uint64)
    return values[:found]


def _value(text: Text, span: Span) -> Any:
    """Return the value at `span`; a list of bytes as bytes."""
    data = files.byte_list(text.text, *span)
    return text.value(span[0])[0] if data is None else data


def _msrs(text: Text, span: Span) -> dict[int, int]:
    """Return the MSRs in the list at `span`: {index: value}."""
    fields = "index", "data"
    rows = files.records(text.text, *span, fields)
    if rows is not None:
        return {row[0]: row[1] for row in rows}
    value = text.value(span[0])[0]
    return {row["index"]: row["data"] for row in _rows(value, fields)}


def _cpuid(text: Text, span: Span) -> Cpuid | None:
    """Return the CPUID at `span`: what vCPUs of a fleet share, and keep one copy of."""
    if span[1] - span[0] <= CPUID_TEXT_LIMIT:
        try:
            return _cpuid_in(text.text[slice(*span)])
        except (ValueError, RecursionError):
            pass  # the slow way says where
    return _cpuid_of(text.value(span[0])[0])


@lru_cache(maxsize=128)
def _cpuid_in(text: str) -> Cpuid | None:
    return _cpuid_of(DECODER.raw_decode(text)[0])


def _xsave(text: Text, state: dict[str, Span]) -> tuple[Span, ...]:
    """Return where the lists lie that make up the XSAVE area."""
    xsave = text.members(state["xsave"][0]) if "xsave" in state else {}
    if "region" not in xsave:
        raise text.error(0, "expected xsave.region of every vCPU, got none")
    return tuple(xsave[name] for name in ("region", "extra") if name in xsave)


def _rows(value: Any, fields: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """Yield the rows of a list of structures, or of a header followed by such a list.

    Raises
    ------
    ValueError
        If a row has no number in one of `fields`.
    """
    if isinstance(value, list) and len(value) == 2 and isinstance(value[1], list):
        value = value[1]
    if value is not None and not isinstance(value, list):
        raise ValueError(f"expected a list, got {str(value)[:60]}")
    for row in value or ():
        if not isinstance(row, dict) or not all(_is_u64(row.get(name)) for name in fields):
            raise ValueError(f"expected numbers {', '.join(fields)}, got the row {str(row)[:60]}")
        yield row


def _is_u64(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def _cpuid_of(value: Any) -> Cpuid | None:
    fields = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
    rows = [[row[f] for f in fields] for row in _rows(value, fields)]
    if any(number >> 32 for row in rows for number in row):
        raise ValueError("expected CPUID registers of 32 bits, got a longer one")
    return Cpuid(tuple(Entry(*row) for row in rows)) if rows else None


def _xcr0(value: Any) -> int | None:
    """Return XCR0 from kvm_xcrs: its bytes, or (old) its fields."""
    if isinstance(value, dict):
        rows = _rows(value.get("xcrs"), ("xcr", "value"))
        return next((row["value"] for row in rows if row["xcr"] == 0), None)
    return None if value is None else raw.xcr0_of(_bytes(value))


def _cr4(value: Any) -> int | None:
    """Return CR4 from kvm_sregs: its bytes, or (old) its fields."""
    if isinstance(value, dict):
        return value["cr4"] if _is_u64(value.get("cr4")) else None
    return None if value is None else int(struct.unpack_from("<Q", _bytes(value), SREGS_CR4)[0])


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, list) or not all(isinstance(v, int) and 0 <= v < 256 for v in value):
        raise ValueError(f"expected an array of bytes, got {str(value)[:60]}")
    return bytes(value)


def _fpu(text: Text, state: dict[str, Span]) -> dict[str, Span]:
    """Return where the fields of the fpu object lie."""
    members = text.members(state["fpu"][0])
    return {name: members[name] for name in FPU if name in members}


def _held(text: Text, span: Span, name: str) -> list[int]:
    """Return the numbers of one field of the fpu object."""
    _, _, dtype, count, _ = FPU[name]
    limit = 1 << 8 * np.dtype(dtype).itemsize
    found: list[int] = _array(text, span, count, min(limit, (1 << 64) - 1)).tolist()
    return found


def splices(
    source: Source, snapshot: Snapshot, areas: Mapping[int, NDArray[np.uint8]]
) -> list[Splice]:
    """Return the edits that put `areas` into the JSON: the numbers that change, no others.

    Parameters
    ----------
    areas : mapping of int to (size,) uint8
        New areas by position in ``snapshot.vcpus``. A field of ``fpu`` changes where the
        register that it mirrors does.

    Raises
    ------
    PolicyError
        If an area is longer than the one in the file.
    """
    found = []
    for i, area in areas.items():
        vcpu = snapshot.vcpus[i]
        where = f"vcpu {vcpu.index}"
        new = edit.fitted(area, vcpu.area.size, f"{snapshot.path}: {where}")
        if np.array_equal(new, vcpu.area):
            continue
        origin = kept(vcpu, Origin)
        text = origin.text
        old, spans = origin.words()
        words = new.view("<u4")
        for word in np.flatnonzero(old.view("<u4") != words).tolist():
            found.append(text.splice(source, spans[word], str(words[word]), f"{where} xsave"))
        for name, span in origin.fpu.items():
            before, after = value_of(old, name), value_of(new, name)
            if before == after:
                continue
            _, places = _numbers(text, span, len(after), 1 << 64)
            for place, one, two in zip(places, before, after, strict=True):
                if one != two:
                    found.append(text.splice(source, place, str(two), f"{where} fpu.{name}"))
    return found
