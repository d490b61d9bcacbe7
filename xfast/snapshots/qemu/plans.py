"""One plan a description: where the vCPUs lie in every stream that ends with the same one.

Streams of a fleet share a few descriptions. What a description says is worked out once; after that
a stream that ends with the same bytes is read with one read of its tail, without JSON, and every
header and footer that the plan rests on is compared:

    ... memory | look-back | header, content, footer | ... | EOF, description |
                            '-- `size` bytes: the sections that were walked --'

A stream in which anything of that differs is left to the slow way, and so is one where a `cpu`
header lies in the look-back, or where the walk would have gone further.

A plan also gives the key of a stream's vCPUs (`xfast.snapshots.model.Unseen`): all areas are built
side by side in one go and classified at once, and no vCPU is made.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast.engine import files
from xfast.kernels.uapi import CR4_PKE
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.qemu.cpu import INTEL, Shape, shape_of
from xfast.snapshots.qemu.search import FOOTER, FULL, LOOK_BACK, CpuSection
from xfast.xsave.area import packed_facts
from xfast.xsave.features import HEADER_OFFSET, PKRU, XFEATURE_MASK_FPSSE

PLANS_LIMIT = 16
"""Descriptions that are kept: a fleet has a few for each machine type."""
MARK = 6
"""Bytes of the EOF record, and of the description's type and length: what tells plans apart."""
TEXT_LIMIT = 4 << 20
"""Longer ones (bytes) are not kept: 512 vCPUs' are as long."""
PKE_BYTE = (CR4_PKE.bit_length() - 1) // 8
LEAST = INTEL.standard_size(PKRU)
"""Bytes of a row: a leaked PKRU, for which a section has no bytes, makes areas as long."""
CONTROLS = 5
"""The control fields of a vCPU: see `Shape.controls`."""


class Section(NamedTuple):
    """A section that was walked: where its header begins, its name, and where its footer ends.

    `footer` tells whether there is one.
    """

    start: int
    name: bytes
    head: bytes
    end: int
    footer: bool


class Sections(NamedTuple):
    """The vCPUs of a stream, and what the devices around them tell.

    `description` is ``whole``, ``damaged`` or ``none``; `doubts` are those of a Snapshot.
    """

    cpus: list[CpuSection]
    kvmclock: bool
    description: str
    doubts: tuple[str, ...] = ()


class Fields(NamedTuple):
    """Where all the fields lie that tell what is in the vCPUs, counted from the first section.

    The areas are built in `rows` of equal length: `runs` are as `files.swap_runs` takes them.
    `controls` are XCR0, XSTATE_BV, the byte of CR4 with PKE, IA32_XSS and IA32_XFD of each vCPU.
    `sort` is each vCPU's number, the components that it has bytes for, and how many vector
    registers.
    """

    rows: tuple[int, int]
    runs: NDArray[np.int32]
    controls: NDArray[np.int32]
    sort: tuple[tuple[int, int, int], ...]

    def key(self, data: memoryview, kvm: bool | None) -> tuple[Hashable | None, bool]:
        """Return the key of vCPUs whose sections begin where `data` does, and who wrote them.

        `kvm`: whether KVM did, where it is known; else an XSTATE_BV that is not 0 tells it. The
        key is None where an area is longer than a row. In one that is shorter, the components
        behind its end are zeros, as if they were not there.
        """
        controls: tuple[Any, ...] = files.big_endian(data, self.controls)
        headers = controls[1::CONTROLS]
        if kvm is None:
            kvm = any(headers)
        rows = np.empty(self.rows, np.uint8)
        width = self.rows[1]
        files.swap_runs(data, self.runs, rows.reshape(-1))
        if kvm:
            for (_, held, _), xstate_bv in zip(self.sort, headers, strict=True):
                if xstate_bv & ~held and INTEL.standard_size(xstate_bv | held) > width:
                    return None, kvm
        else:
            # Components that are all zeros count as left out (`Section.xstate_bv`), which these
            # headers don't say. The key does: they are not in use. Nor does it matter to any of
            # its masks in which order TCG has the x87 registers.
            for row, (_, held, _) in enumerate(self.sort):
                xstate_bv = (controls[CONTROLS * row] | XFEATURE_MASK_FPSSE) & held
                struct.pack_into("<Q", rows.data, row * width + HEADER_OFFSET, xstate_bv)
        return (self.sort, controls, packed_facts(rows, INTEL)), kvm


class Plan(NamedTuple):
    """What is the same in all streams with one description; offsets from the first section on.

    `text` is the stream's end from its EOF record on, and `size` the bytes of the sections before
    it. `marks` are the headers' and footers' bytes, where a footer repeats its header's id; `more`
    is the device that the walk did not find, and how far before the sections
    its header would begin. `shapes` are the vCPUs'; `kvm` is True where the description alone
    tells that KVM wrote the streams, else None.
    """

    text: bytes
    size: int
    marks: files.Marks
    more: tuple[bytes, int]
    found: Sections
    shapes: tuple[Shape, ...]
    fields: Fields
    kvm: bool | None


class Followed(NamedTuple):
    """What a plan found in a stream.

    `start` is where in it the first section begins, and `data` are the vCPUs' bytes. `key` tells
    what is in them, as `xfast.snapshots.model.Unseen` wants it; None where not all is as it was
    planned. `kvm` tells whether KVM wrote them.
    """

    plan: Plan
    start: int
    data: list[bytes]
    key: Hashable | None
    kvm: bool

    def sections(self) -> Sections:
        """Return where the vCPUs lie."""
        found = self.plan.found
        cpus = [cpu._replace(offset=cpu.offset + self.start) for cpu in found.cpus]
        return found._replace(cpus=cpus)


def cpu_shape(cpu: CpuSection) -> Shape:
    """Return the Shape of a section that was found."""
    return shape_of(cpu.fixed, tuple(cpu.subsections.items()))


def kvm_described(found: Sections) -> bool | None:
    """Return True where the devices tell that KVM wrote a stream, else None."""
    tsc = any("cpu/tsc_khz" in cpu.subsections for cpu in found.cpus)
    return True if found.kvmclock or tsc else None


_plans: list[Plan] = []


def forget() -> None:
    """Empty the cache: for those who measure, or compare."""
    _plans.clear()


def follow(stream: Source, kvm: bool | None = None) -> Followed | None:
    """Return the vCPUs of a stream whose description was seen before; None for any other.

    `kvm`: whether KVM wrote it, where something around the stream tells.
    """
    for number, plan in enumerate(_plans):
        length = plan.size + len(plan.text)
        eof = stream.size - len(plan.text)
        if length > stream.size:
            continue
        if number and stream.read(eof, MARK) != plan.text[:MARK]:
            continue
        wanted = min(length + LOOK_BACK, stream.size)
        tail = stream.read(stream.size - wanted, wanted)
        if tail.endswith(plan.text):
            if number:
                _plans.insert(0, _plans.pop(number))
            return _followed(plan, tail, stream.size - len(tail), kvm)
    return None


def _followed(plan: Plan, tail: bytes, start: int, kvm: bool | None) -> Followed | None:
    """Follow a plan in the last bytes of a stream, which begin at `start` of it."""
    first = len(tail) - len(plan.text) - plan.size
    if not plan.marks.hold(tail, first):
        return None
    if files.holds(tail, b"\x03cpu", max(0, first - LOOK_BACK), first + 4):
        return None
    name, before = plan.more
    if name and (before > first or tail.startswith(name, first - before + 5)):
        return None
    data = [
        tail[first + offset : first + offset + size] for _, offset, _, size, _ in plan.found.cpus
    ]
    key, kvm = plan.fields.key(memoryview(tail)[first:], plan.kvm if kvm is None else kvm)
    return Followed(plan, start + first, data, key, kvm)


def _fields_of(cpus: Sequence[CpuSection], shapes: Sequence[Shape]) -> Fields:
    """Return where the fields of sections lie."""
    width = max(LEAST, *(INTEL.standard_size(shape.held) for shape in shapes))
    runs: list[tuple[int, ...]] = []
    controls: list[tuple[int, int]] = []
    for row, (cpu, shape) in enumerate(zip(cpus, shapes, strict=True)):
        places = [
            (at + cpu.offset if at >= 0 else -1, size) for at, size in shape.controls.tolist()
        ]
        runs += [
            (at + cpu.offset, length, unit, row * width + target)
            for at, length, unit, target in shape.swaps(0).tolist()
        ]
        runs.append((*places[1], 8, row * width + HEADER_OFFSET))
        at, size = places[2]
        places[2] = at + size - 1 - PKE_BYTE, 1
        controls += places
    return Fields(
        (len(cpus), width),
        np.array(runs, np.int32),
        np.array(controls, np.int32),
        tuple(
            (cpu.instance, shape.held, shape.form.registers)
            for cpu, shape in zip(cpus, shapes, strict=True)
        ),
    )


def remember(
    stream: Source,
    sections: Sequence[Section],
    eof: int,
    more: tuple[bytes, int],
    found: Sections,
) -> None:
    """Keep the plan of a stream that raised no doubt, and whose sections all have footers.

    Parameters
    ----------
    stream : Source
    sections : sequence of Section
        Those that were walked, the last first.
    eof : int
        Where the EOF record lies.
    more : tuple of bytes, int
        The device that the walk did not find (empty: it found all), and the bytes that it would
        take, header and footer included.
    found : Sections
    """
    length = stream.size - eof
    if found.doubts or not all(one.footer for one in sections) or length > TEXT_LIMIT:
        return
    if any(cpu_shape(cpu).overlaps for cpu in found.cpus):
        return
    first = sections[-1].start
    cpus = [cpu._replace(offset=cpu.offset - first) for cpu in found.cpus]
    shapes = tuple([cpu_shape(cpu) for cpu in cpus])
    places: list[int] = []
    fixed = b""
    for one in sections:
        start, end = one.start - first, one.end - first - 5
        places += [start, *range(start + 5, start + 5 + len(one.head)), end]
        fixed += bytes([FULL]) + one.head + bytes([FOOTER])
    heads = np.array([one.start - first for one in sections])
    ends = np.array([one.end - first - 5 for one in sections])
    steps = np.arange(1, 5)
    for cpu in found.cpus:
        for name, (offset, _) in cpu.subsections.items():
            word = b"\5" + bytes([len(name) & 0xFF]) + name.encode(errors="replace")
            begin = cpu.offset - first + offset - 4 - len(word)
            places += range(begin, begin + len(word))
            fixed += word
    _plans.insert(
        0,
        Plan(
            stream.read(eof, length),
            eof - first,
            files.Marks(
                np.array(places),
                fixed,
                (heads[:, None] + steps).reshape(-1),
                (ends[:, None] + steps).reshape(-1),
            ),
            more,
            found._replace(cpus=cpus),
            shapes,
            _fields_of(cpus, shapes),
            kvm_described(found),
        ),
    )
    del _plans[PLANS_LIMIT:]
