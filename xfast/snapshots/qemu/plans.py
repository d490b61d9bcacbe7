"""One plan a description: where the vCPUs lie in every stream that ends with the same one.

Streams of a fleet share a few descriptions. What a description says is worked out once; after that
a stream that ends with the same bytes is read with one read of its tail, without JSON, and every
header and footer that the plan rests on is compared:

    ... memory | look-back | header, content, footer | ... | EOF, description |
                            '-- `size` bytes: the sections that were walked --'

A stream in which anything of that differs is left to the slow way, and so is one where a `cpu`
header lies in the look-back, or where the walk would have gone further.

A plan also gives the key of a stream's vCPUs (`xfast.snapshots.model.Unseen`): all areas are built
side by side in one go and described at once, and no vCPU is made.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from xfast.engine import files
from xfast.engine.sections import Sections as Fields
from xfast.kernels.uapi import CR4_PKE
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.qemu.cpu import INTEL, Shape, shape_of
from xfast.snapshots.qemu.search import FOOTER, FULL, LOOK_BACK, CpuSection
from xfast.xsave.area import table_of
from xfast.xsave.features import PKRU

PLANS_LIMIT = 16
"""Descriptions that are kept: a fleet has a few for each machine type."""
MARK = 6
"""Bytes of the EOF record, and of the description's type and length: what tells plans apart."""
TEXT_LIMIT = 4 << 20
"""Longer ones (bytes) are not kept: 512 vCPUs' are as long."""
PKE_BYTE = (CR4_PKE.bit_length() - 1) // 8
LEAST = INTEL.standard_size(PKRU)
"""Bytes of a row: a leaked PKRU, for which a section has no bytes, makes areas as long."""


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


class Plan(NamedTuple):
    """What is the same in all streams with one description; offsets from the first section on.

    `text` is the stream's end from its EOF record on, and `size` the bytes of the sections before
    it. `marks` are the headers' and footers' bytes, where a footer repeats its header's id; `more`
    is the device that the walk did not find, and how far before the sections its header would
    begin. `shapes` are the vCPUs', `sort` each one's number, the components that it has bytes for,
    how many vector registers, and whether it tells IA32_XFD; `fields` tells what is in them. `kvm`
    is True where the description alone tells that KVM wrote the streams, else None.
    """

    text: bytes
    size: int
    marks: files.Marks
    more: tuple[bytes, int]
    found: Sections
    shapes: tuple[Shape, ...]
    sort: tuple[tuple[int, int, int, bool], ...]
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
    kvm = plan.kvm if kvm is None else kvm
    told, kvm = plan.fields.key(tail, first, -1 if kvm is None else kvm)
    return Followed(plan, start + first, data, told and (plan.sort, told), kvm)


def _fields_of(cpus: Sequence[CpuSection], shapes: Sequence[Shape]) -> Fields:
    """Return where the fields of sections lie that tell what is in the vCPUs.

    The numbers are those of `Shape.controls`, but of CR4 only the byte with PKE. Where an area is
    shorter than a row, what lies behind its end is zeros, as if it were not there. TCG's areas have
    components that are all zeros (`Section.xstate_bv` leaves them out) and x87 registers in
    another order, but neither makes two areas one that are judged differently.
    """
    width = max(LEAST, *(INTEL.standard_size(shape.held) for shape in shapes))
    runs: list[tuple[int, ...]] = []
    numbers: list[tuple[int, int]] = []
    for row, (cpu, shape) in enumerate(zip(cpus, shapes, strict=True)):
        places = [
            (cpu.offset + at, size) if at >= 0 else (-1, 0) for at, size in shape.controls.tolist()
        ]
        runs += [
            (at + cpu.offset, length, unit, row * width + target)
            for at, length, unit, target in shape.swaps(0).tolist()
        ]
        at, size = places[2]
        places[2] = at + size - 1 - PKE_BYTE, 1
        numbers += places
    return Fields(
        np.empty((len(cpus), width), np.uint8),
        table_of(INTEL),
        np.array(runs, np.int32),
        np.array(numbers, np.int32),
        np.array([shape.held for shape in shapes], np.uint64),
        sum(1 << slot.nr for slot in INTEL.slots if slot.offset + slot.size > width),
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
            tuple(
                (cpu.instance, shape.held, shape.form.registers, int(shape.controls[4, 0]) >= 0)
                for cpu, shape in zip(cpus, shapes, strict=True)
            ),
            _fields_of(cpus, shapes),
            kvm_described(found),
        ),
    )
    del _plans[PLANS_LIMIT:]
