"""Targets behind the readers: plans, writes of `fix`, and the engine against its slow reference.

The engine's areas lie between pages that may not be touched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import reference
import snapshot_files as files
from guard_pages import between_guards
from numpy.typing import NDArray
from random_areas import COMPACTED, LAYOUTS

from xfast import check, plan_fix, snapshots
from xfast.errors import PolicyError, XfastError
from xfast.hosts.model import Host
from xfast.kernels.behaviour import of_release
from xfast.repair.plan import Plan
from xfast.snapshots.bytes.source import Source
from xfast.store.undo import undo
from xfast.xsave import area as engine
from xfast.xsave.features import SUPERVISOR_MASK
from xfast.xsave.layout import PRESETS

FOLDER = Path(f"/dev/shm/xfast-fuzz-deeper-{os.getpid()}")
VCPU_LIMIT = 4
"""vCPUs of a snapshot that is planned for: more would only repeat them."""


def host(name: str, mask: int, release: str) -> Host:
    """Return a host with a preset's places for a mask of components."""
    kernel = of_release(release)
    return Host(
        f"{name}-{mask:x}",
        layout=PRESETS[name].restricted(mask),
        xcr0=mask,
        kvm_xcr0=mask,
        mxcsr_mask=0xFFFF,
        kernel=kernel,
    )


HOSTS = (
    host("intel", 0x3, "6.1"),
    host("intel", 0x7, "6.12"),
    host("intel", 0x2E7, "5.15"),
    host("amd-zen4", 0x207, "6.6"),
)


def plans(data: bytes) -> Iterator[tuple[Source, Plan]]:
    """Yield every plan for what bytes hold, as a file; what is refused is passed over."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    path = FOLDER / "vm"
    path.write_bytes(data)
    try:
        found = snapshots.read(str(path), expand_limit=4 << 20)
    except XfastError:
        return
    for snapshot, target in product(found, HOSTS):
        if len(snapshot.vcpus) > VCPU_LIMIT:
            continue
        try:
            plan = plan_fix(snapshot, target)
            plan.require_restorable()
        except PolicyError:
            continue
        with Source.open(str(path), expand_limit=4 << 20) as source:
            yield source, plan


def edited(source: Source, made: Plan) -> bytes | None:
    """Return what the file is to hold after a plan, expanded; None if its format refuses."""
    try:
        splices = snapshots.splices(source, made.snapshot, dict(made.areas))
    except PolicyError:
        return None
    new = bytearray(source.read(0, source.size))
    for splice in sorted(splices, reverse=True):
        new[splice.offset : splice.offset + len(splice.old)] = splice.new
    return bytes(new)


def plan(data: bytes) -> None:
    """Judge the edited file again, read anew: the host takes it, or the plan was refused."""
    for source, made in plans(data):
        new = edited(source, made)
        if new is None:
            continue
        (FOLDER / "new").write_bytes(new)
        (again,) = snapshots.read(str(FOLDER / "new"), format=made.snapshot.format)
        assert len(again.vcpus) == len(made.snapshot.vcpus)
        (verdict,) = check(again, made.host)
        refused = [finding for finding in verdict.findings if finding.severity == "blocks"]
        assert not refused, (made.host.name, refused[0])


def fix(data: bytes) -> None:
    """Write what is planned in place: the file is as it was, or whole and new; undo takes it back.

    Nothing but the file and its record lies there afterwards.
    """
    path = FOLDER / "vm"
    for source, made in plans(data):
        new = edited(source, made)
        try:
            record = made.apply(in_place=True)
        except XfastError:
            record = None
        if record is None:
            assert path.read_bytes() == data
            assert os.listdir(FOLDER) == ["vm"]
            continue
        with Source.open(str(path), expand_limit=4 << 20) as written:
            assert written.read(0, written.size) == new
        assert sorted(os.listdir(FOLDER)) == ["vm", "vm.xfast.json"]
        undo(f"{path}.xfast.json")
        with Source.open(str(path), expand_limit=4 << 20) as back:
            assert back.read(0, back.size) == source.read(0, source.size)
        return


def guarded(data: bytes) -> NDArray[np.uint8]:
    """Return a copy of an area that ends, or begins, at a page that may not be touched."""
    row = between_guards(1, len(data), at_end=not data[-1] & 1)[0]
    row[:] = np.frombuffer(data, np.uint8)
    return row


def _ways(area: bytes, into: bytes, layout: Any, to: Any, mask: int) -> Iterator[tuple[Any, Any]]:
    """Yield what each operation of the engine gives, and what the reference does."""
    one = guarded(area)
    yield engine.audit(one, mask, 0xFFFF), reference.audit(area, mask, 0xFFFF)
    for early in (False, True):
        yield engine.xinuse(one, layout, early), reference.xinuse(area, layout, early)
    yield tuple(map(int, engine.classify(one, layout)[1:])), reference.classify(area, layout)
    other = guarded(into)
    yield engine.diff(one, other, layout, to), reference.diff(area, layout, into, to)
    for scrub in (False, True):
        kept = guarded(area)
        dropped = engine.keep(kept, layout, mask, scrub=scrub)
        yield (kept.tobytes(), dropped), reference.keep(area, layout, mask, scrub)
    out = guarded(bytes(len(into)))
    options = {"mask": mask, "mxcsr_mask": 0xFFFF, "software": 0x2E7}
    lost = engine.converter(layout, to, **options).convert(one, out)
    expected = reference.relayout(area, layout, to, len(into), **options)
    yield (out.tobytes(), lost), expected
    merged = guarded(into)
    valid = (0xE02FF, 0x1FFFF)
    how = engine.merger(layout, to, user_xfeatures=valid[0], mxcsr_mask=valid[1])
    code = how.merge(one, merged)
    expected = reference.set_uabi(area, layout, into, to, *valid, SUPERVISOR_MASK)
    yield (code, merged.tobytes()), expected


def core(data: bytes) -> None:
    """Compare every operation with the reference, on areas, sizes and masks out of the bytes."""
    if len(data) < 28:
        return
    layout, to = LAYOUTS[data[0] % len(LAYOUTS)], LAYOUTS[data[1] % len(LAYOUTS)]
    size, other = (576 + int.from_bytes(data[i : i + 2], "little") % 11008 for i in (2, 4))
    mask = int.from_bytes(data[6:14], "little") & (1 << 63) - 1
    bv = int.from_bytes(data[14:22], "little") & (1 << 63) - 1
    compacted = COMPACTED if data[22] & 1 else 0
    rest = data[23:] * (1 + (size + other) // len(data[23:]))
    area, into = bytearray(rest[:size]), bytearray(rest[size : size + other])
    for image, places in ((area, layout), (into, to)):
        image[512:520] = (bv & places.mask).to_bytes(8, "little")
        xcomp = compacted and compacted | (bv | mask) & places.mask
        image[520:528] = xcomp.to_bytes(8, "little")
    if data[22] & 2:
        area[528:576] = bytes(48)
    for got, expected in _ways(bytes(area), bytes(into), layout, to, mask):
        assert got == expected, (layout.name, to.name, got, expected)


def fixable() -> Iterator[bytes]:
    """Yield snapshots that some host refuses as they are, and every format's example."""
    yield files.area(1, 4096, 0x207) + files.area(2, 4096, 0x207)
    yield files.qemu_stream(files.qemu_devices(xstate_bv=0x207))
    yield files.elf_core(*files.elf_notes(7, files.area(1, 2696, 0x207)))
    yield from (data for build in files.BUILDERS.values() for data in build().values())


def areas() -> Iterator[bytes]:
    """Yield what `core` starts from."""
    for layout, to in product(range(4), range(4)):
        numbers = (1000 * layout).to_bytes(2, "little") + (2696).to_bytes(2, "little")
        masks = (0x2E7).to_bytes(8, "little") + (0x602E7).to_bytes(8, "little")
        yield bytes([layout, to]) + numbers + masks + bytes([to]) + files.area(layout + 1, 2696)
