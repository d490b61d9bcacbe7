"""QEMU snapshots: migration streams in files, in libvirt's images, and inside qcow2 images.

*Source*: QEMU migration/savevm.c, target/i386/machine.c; libvirt src/qemu/qemu_saveimage.c.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xfast.errors import FormatError, PolicyError
from xfast.kernels.uapi import CR4_PKE
from xfast.snapshots.bytes import libvirt, qcow2
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import Snapshot, Splice, Vcpu
from xfast.snapshots.qemu.cpu import INTEL, Section
from xfast.snapshots.qemu.forward import located
from xfast.snapshots.qemu.stream import Sections, configuration, start_of
from xfast.xsave.layout import Layout


class _Stream(NamedTuple):
    """One stream of a file, where in it it begins (bytes), and what is around it."""

    source: Source
    start: int
    container: tuple[str, ...] = ()
    internal: tuple[str, str] | None = None
    domain: libvirt.Domain | None = None


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
    if len(snapshots) > 1:
        for snapshot in snapshots:
            snapshot.part = "/".join(snapshot.facts["internal_snapshot"])
    return snapshots


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
    internal = snapshot.facts.get("internal_snapshot")
    stream = next(s for s in _streams(source) if s.internal == (internal and tuple(internal)))
    place, _, sections = located(stream.source, stream.start)
    stream = stream._replace(source=place)
    kvm = snapshot.producer == "qemu-kvm"
    edits = []
    for position, area in areas.items():
        place = sections.cpus[position]
        old = Section(stream.source.read(place.offset, place.size), place, kvm)
        if np.array_equal(old.area(), area):
            continue
        try:
            new = old.edited(area)
        except PolicyError as problem:
            raise PolicyError(f"{source.path}: vCPU {place.instance}: {problem}") from None
        for name, (start, length) in old.zones.items():
            before, after = (data[start : start + length] for data in (old.data, new.data))
            if before != after:
                edits += _mapped(stream.source, place.offset + start, before, after, name)
    return edits


def _mapped(source: Source, offset: int, old: bytes, new: bytes, field: str) -> list[Splice]:
    """Return one edit of a stream as edits of the file: one for each piece where it lies."""
    edits = []
    done = 0
    for place, length in source.to_file(offset, len(old)):
        part = slice(done, done + length)
        edits.append(Splice(place, old[part], new[part], field))
        done += length
    return edits


def _libvirt(source: Source) -> _Stream | None:
    """Return the stream of a libvirt image, or of what was the compressed body of one."""
    image = source.outer if source.outer and source.body else source
    header = libvirt.header(image)
    if header is None:
        return None
    domain = libvirt.domain(image, header)
    if image is source:
        return _Stream(source, header.body, ("libvirt-save",), domain=domain)
    return _Stream(source, 0, domain=domain)


def _streams(source: Source) -> list[_Stream]:
    if qcow2.is_qcow2(source):
        found = [
            _Stream(one.stream, 0, ("qcow2",), (one.id, one.name))
            for one in qcow2.internals(source)
        ]
        if not found:
            raise FormatError(source.path, 60, "found no snapshot with a VM state, needed one")
        return found
    stream = _libvirt(source)
    if stream is None:
        stream = _Stream(source, start_of(source) or 0)
    return [stream]


def from_sections(stream: Source, found: Sections) -> Snapshot:
    """Return the snapshot in a stream at the beginning of `stream`, whose vCPUs were found."""
    return _read(_Stream(stream, 0), found)


def _read(stream: _Stream, found: Sections | None = None) -> Snapshot:
    source, domain = stream.source, stream.domain
    config = configuration(source, stream.start)
    sections = found
    if sections is None:
        source, _, sections = located(source, stream.start)
    data = [source.read(place.offset, place.size) for place in sections.cpus]
    producer, basis = _producer(sections, data, domain)
    facts: dict[str, Any] = {
        "machine": config.machine,
        "capabilities": config.capabilities,
        "producer_basis": basis,
        "description": sections.description,
    }
    if stream.internal:
        facts["internal_snapshot"] = stream.internal
    if domain:
        facts |= {"domain": domain.name, "cpu_model": domain.model}
    mapped_ram = ("mapped-ram",) if "mapped-ram" in config.capabilities else ()
    vcpus = []
    for place, section in zip(sections.cpus, data, strict=True):
        vcpu = _vcpu(source, Section(section, place, producer == "qemu-kvm"))
        vcpu.guest_mask = domain.components if domain else None
        vcpus.append(vcpu)
    container = (*source.container, *stream.container, *mapped_ram)
    return Snapshot(source.path, "qemu", "vm", producer, vcpus, container, facts)


def _producer(
    sections: Sections, data: list[bytes], domain: libvirt.Domain | None
) -> tuple[str, str]:
    """Return who wrote the stream, and what tells so: the stream itself does not say."""
    if domain:
        return ("qemu-kvm" if domain.kvm else "qemu-tcg"), "the domain's type"
    if sections.kvmclock:
        return "qemu-kvm", "a kvmclock device"
    if any("cpu/tsc_khz" in place.subsections for place in sections.cpus):
        return "qemu-kvm", "a cpu/tsc_khz subsection"
    if any(
        Section(section, place, True).xstate_bv
        for place, section in zip(sections.cpus, data, strict=True)
    ):
        return "qemu-kvm", "an XSTATE_BV that is not 0"
    return "qemu-tcg", "no trace of KVM"


def _vcpu(source: Source, section: Section) -> Vcpu:
    place = section.place
    if {"cpu/mpx", "cpu/apx"} <= place.subsections.keys():
        raise FormatError(
            source.path, place.offset, "found cpu/mpx and cpu/apx, which share a place; needed one"
        )
    where = {}
    for name, (start, length) in section.zones.items():
        with contextlib.suppress(FormatError):  # zeros that a disk image does not store
            where[name] = (source.to_file(place.offset + start, length)[0][0], length)
    return Vcpu(
        index=place.instance,
        area=section.area(),
        layout=INTEL,
        layout_source="format",
        portable=True,
        xcr0=section.xcr0,
        xss=section.number("cpu/xss", 0),
        xfd=section.number("cpu/msr_xfd", None),
        pkru_enabled=bool(section.cr4 & CR4_PKE),
        mode=64 if section.form.registers == 16 else 32,
        where=where,
        facts={
            "stream_xstate_bv": section.stream_xstate_bv,
            "cr4": section.cr4,
            "subsections": sorted(place.subsections),
        },
    )
