"""QEMU snapshots: migration streams in files, in libvirt's images, and inside qcow2 images.

*Source*: QEMU migration/savevm.c, target/i386/machine.c; libvirt src/qemu/qemu_saveimage.c.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast.errors import FormatError, PolicyError
from xfast.kernels.uapi import CR4_PKE
from xfast.snapshots.bytes import libvirt, qcow2
from xfast.snapshots.bytes.source import Source, View
from xfast.snapshots.model import Snapshot, Span, Splice, Unseen, Vcpu, kept
from xfast.snapshots.qemu.cpu import INTEL, Section
from xfast.snapshots.qemu.domain import UNREADABLE, Domain, domain
from xfast.snapshots.qemu.forward import located
from xfast.snapshots.qemu.plans import Followed, Sections, cpu_shape, follow
from xfast.snapshots.qemu.stream import MAGIC, configuration, start_of
from xfast.xsave.layout import Layout


class _Stream(NamedTuple):
    """One stream of a file, where in it it begins (bytes), and what is around it."""

    source: Source
    start: int
    container: tuple[str, ...] = ()
    internal: tuple[str, str] | None = None
    domain: Domain | None = None


def sniff(source: Source) -> bool:
    """Tell whether `source` is a QEMU stream, a libvirt save image or a qcow2 image."""
    return qcow2.is_qcow2(source) or _libvirt(source) is not None or start_of(source) is not None


def read(
    source: Source, *, layout: Layout | None = None, size: int | None = None
) -> list[Snapshot]:
    """Read every snapshot of a file: one of a stream, any number of a qcow2 image.

    Parameters
    ----------
    source : Source
    layout, size
        Not used: the stream holds registers, not areas.

    Raises
    ------
    FormatError
        If there is none, or one is damaged.
    """
    snapshots = [_read(stream) for stream in _streams(source)]
    if len(snapshots) == 1:
        snapshots[0].part = ""
    return snapshots


@dataclass(frozen=True)
class Origin:
    """One vCPU's section as it was read, and where it lies in the file.

    `runs` are pieces of the file, (offset, length) each; the offset of zeros that a disk image
    does not store is None.
    """

    section: Section
    runs: tuple[tuple[int | None, int], ...]

    def places(self) -> dict[str, Span]:
        """Return where in the file each field begins, and its bytes."""
        found = {}
        for name, (start, length) in self.section.zones.items():
            offset = next(self.pieces(start, length))[0]
            if offset is not None:
                found[name] = (offset, length)
        return found

    def pieces(self, start: int, length: int) -> Iterator[tuple[int | None, int]]:
        """Yield where in the file bytes of the section lie: (offset, length) of each piece."""
        end = 0
        for offset, size in self.runs:
            begin, end = end, end + size
            if start < end and length:
                skip = start - begin
                count = min(end - start, length)
                yield None if offset is None else offset + skip, count
                start += count
                length -= count


def splices(
    source: Source, snapshot: Snapshot, areas: Mapping[int, NDArray[np.uint8]]
) -> list[Splice]:
    """Return the edits of the file that give vCPUs new areas.

    Parameters
    ----------
    snapshot : Snapshot
        What `read` returned for `source`.
    areas : mapping of int to (size,) uint8
        By position in `snapshot.vcpus`; standard format, Intel's layout, size as read.

    Returns
    -------
    list of Splice
        Offsets in the file, after decompression. Empty where nothing differs.

    Raises
    ------
    PolicyError
        If an area holds something for which the stream has no place.
    """
    edits: list[Splice] = []
    for position, area in areas.items():
        vcpu = snapshot.vcpus[position]
        if np.array_equal(vcpu.area, area):
            continue
        origin = kept(vcpu, Origin)
        old = origin.section
        try:
            new = old.edited(area)
            for name, (start, length) in old.zones.items():
                before, after = (data[start : start + length] for data in (old.data, new.data))
                if before != after:
                    edits += _mapped(origin.pieces(start, length), before, after, name)
        except PolicyError as problem:
            raise PolicyError(f"{source.path}: vCPU {vcpu.index}: {problem}") from None
    return edits


def _mapped(
    pieces: Iterable[tuple[int | None, int]], old: bytes, new: bytes, field: str
) -> Iterator[Splice]:
    """Yield one edit of a stream as edits of the file: one for each piece where it lies."""
    done = 0
    for offset, length in pieces:
        part = slice(done, done + length)
        done += length
        if offset is not None:
            yield Splice(offset, old[part], new[part], field)
        elif any(new[part]):
            raise PolicyError(f"the disk image stores no bytes of {field}, only zeros")


def _libvirt(source: Source) -> _Stream | None:
    """Return the stream of a libvirt image, or of what was the compressed body of one."""
    image = source.outer if source.outer and source.body else source
    header = libvirt.header(image)
    if header is None:
        return None
    guest = domain(image.path, header)
    if image is source:
        return _Stream(source, header.body, ("libvirt-save",), domain=guest)
    return _Stream(source, 0, domain=guest)


def _streams(source: Source) -> list[_Stream]:
    if source.outer is None and source.size >= len(MAGIC) and source.read(0, len(MAGIC)) == MAGIC:
        return [_Stream(source, 0)]
    if qcow2.is_qcow2(source):
        found = [
            _Stream(one.stream, 0, ("qcow2",), (one.id, one.name))
            for one in qcow2.internals(source)
        ]
        if not found:
            raise FormatError(source.path, 60, "expected a snapshot with a VM state, got none")
        return found
    stream = _libvirt(source)
    if stream is None:
        stream = _Stream(source, start_of(source) or 0)
    return [stream]


def from_sections(stream: Source, found: Sections) -> Snapshot:
    """Return the snapshot in a stream at the beginning of `stream`, whose vCPUs were found."""
    return _read(_Stream(stream, 0), found)


def _read(stream: _Stream, found: Sections | None = None) -> Snapshot:
    source, guest = stream.source, stream.domain
    config = configuration(source, stream.start)
    size = end = source.size
    known = None
    if found is None:
        known = None if source.is_device else follow(source, guest.kvm if guest else None)
        if known is None:
            source, found, end = located(source, stream.start)
        else:
            found = known.plan.found
    vcpus: Sequence[Vcpu]
    if known is not None and known.key is not None:
        vcpus, told = _unseen(source, known, guest)
    else:
        vcpus, told = _seen(source, known, known.sections() if known else found, guest)
    kvm, basis = told
    facts: dict[str, Any] = {
        "machine": config.machine,
        "capabilities": config.capabilities,
        "producer_basis": basis,
        "description": found.description,
    }
    if end < size:
        facts["stream_end"] = end
    if stream.internal:
        facts["internal_snapshot"] = stream.internal
    if guest:
        facts |= {"domain": guest.name, "cpu_model": guest.model}
    container = (*source.container, *stream.container)
    if "mapped-ram" in config.capabilities:
        container += ("mapped-ram",)
    doubts = found.doubts
    if guest and guest.vcpus == UNREADABLE:
        doubts += ("expected the domain's number of vCPUs, got a text that is none",)
    elif guest and guest.vcpus not in (None, len(vcpus)):
        doubts += (f"expected {guest.vcpus} vCPUs, as the domain has, got {len(vcpus)}",)
    return Snapshot(
        source.path,
        "qemu",
        "vm",
        "qemu-kvm" if kvm else "qemu-tcg",
        vcpus,
        container,
        facts,
        "/".join(stream.internal or ()),
        doubts,
    )


def _unseen(
    source: Source, known: Followed, guest: Domain | None
) -> tuple[Sequence[Vcpu], tuple[bool, str]]:
    """Return the vCPUs that a plan found, made when somebody looks, and who wrote them."""
    cpus = known.plan.found.cpus
    mask = guest.components if guest else None
    places = [(known.start + cpu.offset, cpu.size) for cpu in cpus]
    runs: list[Sequence[tuple[int | None, int]]] | None = None  # a file's: the places
    if isinstance(source, View):
        runs = [source.runs(*place) for place in places]

    def make() -> list[Vcpu]:
        pieces = runs or [(place,) for place in places]
        parts = zip(cpus, known.data, known.plan.shapes, pieces, strict=True)
        return [
            _vcpu(cpu.instance, Section(data, shape, known.kvm), where, mask)
            for cpu, data, shape, where in parts
        ]

    return Unseen((known.key, mask), len(cpus), make), _is_kvm(known.plan.found, known.kvm, guest)


def _seen(
    source: Source, known: Followed | None, found: Sections, guest: Domain | None
) -> tuple[list[Vcpu], tuple[bool, str]]:
    """Return the vCPUs of sections, and who wrote them."""
    data = known.data if known else [source.read(one.offset, one.size) for one in found.cpus]
    shapes = known.plan.shapes if known else map(cpu_shape, found.cpus)
    sections = [Section(section, shape, True) for section, shape in zip(data, shapes, strict=True)]
    told = _is_kvm(found, any(section.stream_xstate_bv for section in sections), guest)
    mask = guest.components if guest else None
    vcpus = []
    for place, section in zip(found.cpus, sections, strict=True):
        if section.shape.overlaps:
            raise FormatError(
                source.path,
                place.offset,
                "expected cpu/mpx or cpu/apx, got both, which share a place",
            )
        section.kvm = told[0]
        runs = source.runs(place.offset, place.size)
        vcpus.append(_vcpu(place.instance, section, runs, mask))
    return vcpus, told


def _is_kvm(found: Sections, headed: bool, guest: Domain | None) -> tuple[bool, str]:
    """Tell whether KVM wrote the stream, and what tells so: the stream itself does not say.

    `headed`: whether a section has an XSTATE_BV other than 0.
    """
    if guest:
        return guest.kvm, "the domain's type"
    if found.kvmclock:
        return True, "a kvmclock device"
    if any("cpu/tsc_khz" in place.subsections for place in found.cpus):
        return True, "a cpu/tsc_khz subsection"
    if headed:
        return True, "an XSTATE_BV that is not 0"
    return False, "no trace of KVM"


def _vcpu(
    number: int, section: Section, runs: Sequence[tuple[int | None, int]], guest_mask: int | None
) -> Vcpu:
    xcr0, stream_xstate_bv, cr4, xss, xfd = section.control()
    return Vcpu(
        index=number,
        area=section.area(),
        layout=INTEL,
        layout_source="format",
        portable=True,
        xcr0=xcr0,
        xss=xss or 0,
        xfd=xfd,
        guest_mask=guest_mask,
        pkru_enabled=bool(cr4 & CR4_PKE),
        mode=64 if section.form.registers == 16 else 32,
        origin=Origin(section, tuple(runs)),
        facts={
            "stream_xstate_bv": stream_xstate_bv,
            "cr4": cr4,
            "subsections": list(section.shape.subsections),
        },
    )
