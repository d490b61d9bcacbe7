"""Targets behind the readers: plans, writes of `fix`, and the engine against its slow reference.

The engine's areas lie between pages that may not be touched.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import zlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import inside
import lz4.frame
import numpy as np
import reference
import snapshot_files as files
from backports import zstd
from guard_pages import between_guards
from numpy.typing import NDArray
from random_areas import COMPACTED, LAYOUTS

from xfast import check, plan_fix, snapshots
from xfast.errors import PolicyError, XfastError
from xfast.hosts.model import Host
from xfast.kernels.behaviour import of_release
from xfast.repair.convert import convert
from xfast.repair.plan import Plan
from xfast.snapshots.bytes.codecs import CODECS
from xfast.snapshots.difference import compare
from xfast.store import put
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


def fresh() -> Path:
    """Return an empty folder."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    return FOLDER


def plans(data: bytes) -> Iterator[Plan]:
    """Yield every plan for what bytes hold, as a file or folder; what is refused is passed over."""
    path = fresh() / "vm"
    inside.written(data, path)
    try:
        found = snapshots.read(str(path), expand_limit=4 << 20)
    except XfastError:
        return
    live = zlib.crc32(data) >> 16 & 1  # a bit that WAYS does not go by
    how: dict[str, Any] = {"drop": ["avx"], "even_if_live": True} if live else {}
    for snapshot, target in product(found, HOSTS):
        if len(snapshot.vcpus) > VCPU_LIMIT:
            continue
        try:
            plan = plan_fix(snapshot, target, **how)
            plan.require_restorable()
        except PolicyError:
            continue
        yield plan


def areas_of(path: str, form: str) -> list[bytes]:
    """Return the areas of a file or folder, read anew; without zeros at the end, where none are."""
    found = snapshots.read(path, format=form, expand_limit=4 << 20)
    return [vcpu.area.tobytes().rstrip(b"\0") for one in found for vcpu in one.vcpus]


def plan(data: bytes) -> None:
    """Judge the edited file again, read anew: the host takes it, or the plan was refused."""
    for made in plans(data):
        result = FOLDER / "new"
        try:
            if made.apply(str(result)) is None:
                continue
        except XfastError:
            continue
        (again,) = snapshots.read(str(result), format=made.snapshot.format)
        assert len(again.vcpus) == len(made.snapshot.vcpus)
        (verdict,) = check(again, made.host)
        refused = [finding for finding in verdict.findings if finding.severity == "blocks"]
        assert not refused, (made.host.name, refused[0])
        for path in (result, FOLDER / "new.xfast.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def held() -> dict[str, bytes]:
    """Return what lies in the folder: the files' paths and bytes."""
    return {str(path): path.read_bytes() for path in FOLDER.rglob("*") if path.is_file()}


WAYS: tuple[tuple[int, dict[str, Any]], ...] = (
    (1 << 40, {"in_place": True}),
    (1 << 40, {"in_place": True, "backup": True}),
    (0, {"in_place": True}),
    (0, {"in_place": True, "backup": True}),
    (1 << 40, {"output": f"{FOLDER}/out"}),
    (1 << 40, {"in_place": True, "journal": f"{FOLDER}/journal"}),
)
"""From which size on files are patched, and how a plan is brought to them."""


def fix(data: bytes) -> None:
    """Write what is planned: the file is as it was, or whole and new; undo takes it back.

    Nothing but the file, its record and its backup lies there afterwards.
    """
    put.PATCH_FROM, how = WAYS[zlib.crc32(data) % len(WAYS)]
    for made in plans(data):
        if "journal" in how:
            Path(how["journal"]).mkdir(mode=0o700, exist_ok=True)
        old, form, path = held(), made.snapshot.format, made.snapshot.path
        before = areas_of(path, form)
        try:
            record = made.apply(**how)
        except XfastError:
            record = None
        if record is None:
            assert held() == old
            continue
        result = how.get("output", path)
        after = [*before]
        for i, area in made.areas.items():
            after[i] = bytes(area).rstrip(b"\0")
        assert len(made.snapshot.vcpus) < len(before) or areas_of(result, form) == after
        more = {f"{result}.xfast.json"}
        if "journal" in how:
            more = {str(one) for one in Path(how["journal"]).glob("*.xfast.json")}
        if "output" in how:
            assert old.items() <= held().items()
            more |= {name.replace(path, result, 1) for name in old if name.startswith(path)}
        left = {name for name in held().keys() - old.keys() if not name.endswith(".orig")}
        assert left == more, left
        (name,) = (name for name in more if name.endswith(".xfast.json"))
        undo(name)
        if "output" not in how:
            assert areas_of(path, form) == before
            if not CODECS.keys() & set(made.snapshot.container):  # else it is packed anew
                assert old.items() <= held().items()
        return


CONVERSIONS: tuple[tuple[str, str, bool], ...] = (
    ("same", "", False),
    ("same", "intel", False),
    ("same", "amd-zen4", False),
    ("raw", "amd-zen3", False),
    ("raw", "intel", True),
    ("npy", "intel", False),
    ("elfcore", "intel", False),
)
"""What a snapshot is converted into: the wrapping, the layout (none: its own), compacted or not."""


def converted(data: bytes) -> None:
    """Convert a snapshot: nothing is left where that is refused, and no register is another."""
    path = fresh() / "vm"
    inside.written(data, path)
    wrapping, name, compacted = CONVERSIONS[zlib.crc32(data) % len(CONVERSIONS)]
    to = PRESETS[name] if name else None
    try:
        found = snapshots.read(str(path), expand_limit=4 << 20)
    except XfastError:
        return
    old = held()
    for snapshot in found[:1]:
        if len(snapshot.vcpus) > VCPU_LIMIT:
            continue
        try:
            convert(snapshot, f"{FOLDER}/out", to, wrapping=wrapping, compacted=compacted)
        except XfastError:
            assert held() == old
            continue
        assert old.items() <= held().items()
        form = {"same": snapshot.format, "npy": "raw"}.get(wrapping, wrapping)
        again = snapshots.read(f"{FOLDER}/out", format=form, layout=to)
        for one, other in zip(snapshot.vcpus, again[0].vcpus, strict=True):
            other.index = one.index  # a raw file has no numbers
        differ = compare([snapshot], again, values_only=True)
        assert {one.register for one in differ} <= {"xcr0"}, (wrapping, name, differ)


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
    yield from inside.folders()
    for pack in (gzip.compress, bz2.compress, lzma.compress, zstd.compress, lz4.frame.compress):
        yield pack(files.qemu_stream(files.qemu_devices(xstate_bv=0x207)))
        yield pack(files.area(1, 4096, 0x207))


def areas() -> Iterator[bytes]:
    """Yield what `core` starts from."""
    for layout, to in product(range(4), range(4)):
        numbers = (1000 * layout).to_bytes(2, "little") + (2696).to_bytes(2, "little")
        masks = (0x2E7).to_bytes(8, "little") + (0x602E7).to_bytes(8, "little")
        yield bytes([layout, to]) + numbers + masks + bytes([to]) + files.area(layout + 1, 2696)
