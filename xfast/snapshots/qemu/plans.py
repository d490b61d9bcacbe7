"""One plan a description: where the vCPUs lie in every stream that ends with the same one.

Streams of a fleet share a few descriptions. What a description says is worked out once; after that
a stream that ends with the same bytes is read with one read of its tail, without JSON, and every
header and footer that the plan rests on is compared:

    ... memory | look-back | header, content, footer | ... | EOF, description |
                            '-- `size` bytes: the sections that were walked --'

A stream in which anything of that differs is left to the slow way, and so is one where a `cpu`
header lies in the look-back, or where the walk would have gone further.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xfast.engine.files import Marks
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.qemu.cpu import Shape, shape_of
from xfast.snapshots.qemu.search import FOOTER, FULL, LOOK_BACK, CpuSection

PLANS_LIMIT = 16
"""Descriptions that are kept: a fleet has a few for each machine type."""
MARK = 6
"""Bytes of the EOF record, and of the description's type and length: what tells plans apart."""
TEXT_LIMIT = 4 << 20
"""Longer ones (bytes) are not kept: 512 vCPUs' are as long."""


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

    `description` is ``whole``, ``damaged`` or ``none``; `doubts` are those of a Snapshot. `data`
    are the sections' bytes, and `shapes` their Shapes, where they are known already.
    """

    cpus: list[CpuSection]
    kvmclock: bool
    description: str
    doubts: tuple[str, ...] = ()
    data: list[bytes] | None = None
    shapes: tuple[Shape, ...] = ()


class Plan(NamedTuple):
    """What is the same in all streams with one description; offsets from the first section on.

    `text` is the stream's end from its EOF record on, and `size` the bytes of the sections before
    it. `marks` are the headers' and footers' bytes, where a footer repeats its header's id; `more`
    is the device that the walk did not find, and how far before the sections
    its header would begin.
    """

    text: bytes
    size: int
    marks: Marks
    more: tuple[bytes, int]
    found: Sections


def cpu_shape(cpu: CpuSection) -> Shape:
    """Return the Shape of a section that was found."""
    return shape_of(cpu.fixed, tuple(cpu.subsections.items()))


_plans: list[Plan] = []


def forget() -> None:
    """Empty the cache: for those who measure, or compare."""
    _plans.clear()


def follow(stream: Source) -> Sections | None:
    """Return the vCPUs of a stream whose description was seen before; None for any other."""
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
            return _followed(plan, tail, stream.size - len(tail))
    return None


def _followed(plan: Plan, tail: bytes, start: int) -> Sections | None:
    """Follow a plan in the last bytes of a stream, which begin at `start` of it."""
    first = len(tail) - len(plan.text) - plan.size
    if not plan.marks.hold(tail, first):
        return None
    if tail.find(b"\x03cpu", max(0, first - LOOK_BACK), first + 4) >= 0:
        return None
    name, before = plan.more
    if name and (before > first or tail.startswith(name, first - before + 5)):
        return None
    cpus = []
    data = []
    for instance, offset, fixed, size, subsections in plan.found.cpus:
        offset += first
        cpus.append(CpuSection(instance, start + offset, fixed, size, subsections))
        data.append(tail[offset : offset + size])
    _, kvmclock, description, doubts, _, shapes = plan.found
    return Sections(cpus, kvmclock, description, doubts, data, shapes)


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
    first = sections[-1].start
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
            Marks(
                np.array(places),
                fixed,
                (heads[:, None] + steps).reshape(-1),
                (ends[:, None] + steps).reshape(-1),
            ),
            more,
            found._replace(
                cpus=[cpu._replace(offset=cpu.offset - first) for cpu in found.cpus],
                shapes=tuple([cpu_shape(cpu) for cpu in found.cpus]),
            ),
        ),
    )
    del _plans[PLANS_LIMIT:]
