"""What is fuzzed: each target takes bytes, and raises nothing but what is documented.

To add one: a function of bytes, and a line in `TARGETS` with its seeds. What a target raises
beyond XfastError (or asserts) is a finding.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import deeper
import forging
import inside
import mutators
import numpy as np
import parsing
import passing
import state_texts
from snapshot_files import BUILDERS, READ_ONLY

from xfast import hosts, snapshots
from xfast.errors import PolicyError, XfastError
from xfast.snapshots.bytes.source import Source
from xfast.xsave.area import classify, headers, keep
from xfast.xsave.layout import PRESETS, Layout
from xfast.xsave.registers import as_integers, without_place

for name in snapshots.FORMATS:  # modules imported later are not instrumented
    snapshots.format_named(name)
HOST_MODULES = [
    import_module(f"xfast.hosts.{path.stem}") for path in Path(hosts.__path__[0]).glob("[a-z]*.py")
]

HERE = Path(__file__).parent
VCPU_LIMIT = 4
"""vCPUs of an input whose registers are looked at: the rest would only repeat them."""


class Target(NamedTuple):
    """A function of bytes; what it starts from; the modules whose coverage counts."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    modules: tuple[str, ...]


def opened(data: bytes, name: str = "input") -> Source:
    """Return bytes as the file of a Source."""
    fd = os.memfd_create(name)
    os.write(fd, data)
    return Source(name, fd)


def reader(name: str) -> Callable[[bytes], None]:
    """Return a target: what a format reads is looked at, and edited."""

    def run(data: bytes) -> None:
        form = snapshots.format_named(name)
        with opened(data) as source:
            try:
                form.sniff(source)
                found = form.read(source)
            except XfastError as problem:
                check_line(problem)
                return
            for snapshot in found:
                for vcpu in snapshot.vcpus[:VCPU_LIMIT]:
                    look_at(vcpu)
                edit(source, snapshot, name in READ_ONLY)

    return run


def check_line(problem: XfastError) -> None:
    """Check that an error is one line that fits on a screen."""
    text = str(problem)
    assert "\n" not in text, text
    assert len(text) < 1000, len(text)


def look_at(vcpu: snapshots.Vcpu) -> None:
    """Take a vCPU's components and registers, as `show` does."""
    layout = vcpu.layout or Layout(())
    classify(vcpu.area, layout)
    names = as_integers(vcpu.area, layout, vcpu.mode)
    assert not set(names) & set(without_place(vcpu.area, layout, vcpu.mode))


def edit(source: Source, snapshot: snapshots.Snapshot, read_only: bool) -> None:
    """Clear each vCPU's highest component, and read what the edited file would hold."""
    areas = {}
    for i, vcpu in enumerate(snapshot.vcpus[:VCPU_LIMIT]):
        new = np.array(vcpu.area)
        highest = int(headers(new).xstate_bv).bit_length() - 1
        if highest > 1:
            keep(new, vcpu.layout or PRESETS["intel"], (1 << highest) - 1)
        areas[i] = new
    try:
        splices = snapshots.splices(source, snapshot, areas)
    except PolicyError as problem:
        check_line(problem)
        return
    assert not read_only
    end = 0
    for splice in sorted(splices):
        assert splice.offset >= end, splice
        assert source.read(splice.offset, len(splice.old)) == splice.old, splice
        end = splice.offset + len(splice.old)


def anything(data: bytes) -> None:
    """Open a file of any kind, packed ones and folders too, and read it by whatever takes it."""
    path = deeper.fresh() / "vm"
    inside.written(data, path)
    try:
        for found in snapshots.walk([str(path)]):
            snapshots.read(found, expand_limit=4 << 20)
    except XfastError as problem:
        check_line(problem)


def host(data: bytes) -> None:
    """Read a host's description of any kind."""
    try:
        hosts.parse(data)
    except XfastError as problem:
        check_line(problem)


def built(*names: str) -> Callable[[], Iterable[bytes]]:
    """Return the files of the formats' examples as seeds."""
    return lambda: (data for name in names for data in BUILDERS[name]().values())


def states() -> Iterable[bytes]:
    """Return state files of Cloud Hypervisor, of every generation."""
    yield from built("cloud-hypervisor")()
    for i in range(6):
        text = state_texts.texts(random.Random(i))
        yield text.encode()
        outer = json.loads(text)
        for vcpu in outer["snapshots"]["cpu-manager"]["snapshots"].values():
            state = json.loads(vcpu["snapshot_data"]["state"])
            old = list(json.dumps(state["Kvm"] if i % 2 else state).encode())
            vcpu["snapshot_data"] = {"vcpu": {"snapshot": old}} if i % 2 else {"state": old}
        yield json.dumps(outer, separators=(",", ":")).encode()


def images() -> Iterable[bytes]:
    """Return images of CRIU, alone and in an archive."""
    found = [*BUILDERS["criu"]().items(), ("core-9.img", BUILDERS["criu"]()["core-100.img"])]
    yield from (data for _, data in found)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in found:
            header = tarfile.TarInfo(name if name[5] == "1" else "checkpoint/" * 12 + name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    yield out.getvalue()


def packed() -> Iterable[bytes]:
    """Return every format's example, folders, and one in each compression."""
    area = BUILDERS["raw"]()["vm.xsave"]
    yield from built(*BUILDERS)()
    yield from (pack(area) for _, _, pack in mutators.PACKERS)
    yield from inside.folders()
    yield from images()
    yield from passing.images()
    yield from map(gzip.compress, passing.images())


def descriptions() -> Iterable[bytes]:
    """Return host descriptions: the examples', and small ones of other kinds."""
    yield from (path.read_bytes() for path in (HERE.parent / "examples" / "hosts").iterdir())
    yield b"CPU 0:\n   0x0000000d 0x00: eax=0x00000007 ebx=0x00000340 ecx=0x00000340 edx=0x0\n"
    yield b"CPUID 0000000D: 00000007-00000340-00000340-00000000 [SL 00]\n"
    yield b"x86/fpu: xstate_offset[2]:  576, xstate_sizes[2]:  256\n"
    yield b'{"schema": "xfast/1", "name": "x", "xcr0": "0x7"}'
    yield b'schema = "xfast/1"\nname = "x"\nxcr0 = 0x7\n[cpu]\nvendor = "amd"\n'
    yield b'{"lscpu": [{"field": "Flags:", "data": "fpu sse avx avx512f pku"}]}'
    yield b'{"return": {"model": {"name": "max", "props": {"avx": true, "xsave": true}}}}'
    yield b"<cpu><arch>x86_64</arch><model>Skylake</model><feature name='pku'/></cpu>"
    yield b"vendor_id : GenuineIntel\nflags : fpu sse sse2 xsave avx avx2\nmodel : 85\n"
    yield b"00:00:01.1 VirtualBox VM 7.0\n00:00:02.1 Leaf 0000000d/0000: 00000007 00000340\n"


TARGETS: dict[str, Target] = {
    **{name: Target(reader(name), built(name), ("xfast.snapshots",)) for name in BUILDERS},
    "cloud-hypervisor": Target(reader("cloud-hypervisor"), states, ("xfast.snapshots",)),
    "criu": Target(reader("criu"), images, ("xfast.snapshots",)),
    "anything": Target(anything, packed, ("xfast.snapshots",)),
    "host": Target(host, descriptions, ("xfast.hosts", "xfast.xsave")),
    "plan": Target(deeper.plan, deeper.fixable, ("xfast.repair", "xfast.judge")),
    "fix": Target(deeper.fix, deeper.fixable, ("xfast.repair", "xfast.store")),
    "undo": Target(forging.taken_back, forging.changes, ("xfast.store",)),
    "convert": Target(deeper.converted, deeper.fixable, ("xfast.repair", "xfast.snapshots")),
    "forward": Target(passing.forward, passing.streams, ("xfast.snapshots.qemu",)),
    "filter": Target(passing.through, passing.streams, ("xfast.repair", "xfast.snapshots.qemu")),
    "explain": Target(passing.explain, passing.pasted, ("xfast.messages",)),
    "core": Target(deeper.core, deeper.areas, ("xfast.xsave",)),
    "parsers": Target(parsing.parsers, parsing.texts_and_files, ("xfast.snapshots",)),
}
