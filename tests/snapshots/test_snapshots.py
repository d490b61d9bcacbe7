"""Every sample of every format: found by content, read to its known values, edited and back."""

import lzma
import os
import shutil
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xfast import snapshots
from xfast.errors import FormatError, XfastError
from xfast.snapshots import registry
from xfast.snapshots.bytes.source import Source
from xfast.xsave.area import diff, keep
from xfast.xsave.features import bits
from xfast.xsave.layout import PRESETS
from xfast.xsave.registers import Registers

DATA = Path(__file__).parents[1] / "data"

BY_MASK = {0xE7: 0, 0x67: 0, 7: 1, 3: 2}
"""Which thread of the 3-thread program has which components."""

SAMPLES = {
    "raw/kvm618-guestxcr0_07-setbve7.xsave": ("raw", [0]),
    "raw/kvm618-guestxcr0_e7-bv00.xsave": ("raw", [0]),
    "raw/kvm618-guestxcr0_e7-bv01.xsave": ("raw", [0]),
    "raw/kvm618-guestxcr0_e7-bv03.xsave": ("raw", [0]),
    "raw/kvm618-guestxcr0_e7-bv07.xsave": ("raw", [0]),
    "raw/kvm618-guestxcr0_e7-bve5.xsave": ("raw", [0]),
    "raw/kvm618-guestxcr0_e7-bve7.xsave": ("raw", [0]),
    "elf/kernel618-regs64-3thr.core.xz": ("elfcore", BY_MASK),
    "elf/kernel618-regs32-3thr.core.xz": ("elfcore", BY_MASK),
    "elf/kernel618-regs64-1thr-noavx512.core.xz": ("elfcore", [0]),
    "elf/gdb13-regs64-3thr.core.xz": ("elfcore", [0, 1, 2]),
    "vmm/ch-state.json": ("cloud-hypervisor", [0, 1]),
    "vmm/fc-bincode1-v4.vmstate": ("firecracker", [0, 1]),
    "vmm/fc-bincode2-v8.vmstate": ("firecracker", [0, 1]),
    "criu/criu42-regs64s-3thr": ("criu", BY_MASK),
}
"""Each sample's format, and the number that its vCPUs or threads wrote into their registers."""

EDITABLE = [name for name in SAMPLES if "bv00" not in name]


def word(c: int, component: int, register: int, q: int) -> int:
    return 0xA5 << 56 | c << 48 | component << 40 | register << 32 | q << 24 | 0x00F00D


def words(c: int, component: int, register: int, qs: range) -> int:
    return sum(word(c, component, register, q) << 64 * i for i, q in enumerate(qs))


def expected(name: str, c: int, mask: int):
    """Yield (name, value) of the registers in the components of `mask` of a sample."""
    registers = range(8 if "regs32" in name else 16)
    exponent = 0x3FFF + (0 if "vmm" in name else c)
    if mask & 1:
        yield from (("fctrl", 0x37F), ("fstat", 0x1800), ("ftw", 0xFF))
        for i in range(8):
            yield f"st{i}", word(c, 0, i, 0) | exponent + i << 64
    if mask & 6:
        yield "mxcsr", 0x1FA0
    for i in registers:
        xmm = words(c, 1, i, range(2)) if mask & 2 else 0
        ymm = xmm | (words(c, 2, i, range(2, 4)) << 128 if mask & 4 else 0)
        if mask & 2:
            yield f"xmm{i}", xmm
        if mask & 4:
            yield f"ymm{i}", ymm
        if mask & 0x40:
            yield f"zmm{i}", ymm | words(c, 6, i, range(4, 8)) << 256
    if mask & 0x20:
        yield from ((f"k{i}", word(c, 5, i, 0)) for i in range(8))
    if mask & 0x80:
        yield from ((f"zmm{i}", words(c, 7, i, range(8))) for i in range(16, 32))


def number(value) -> int:
    return int.from_bytes(np.asarray(value).tobytes(), "little")


def mask_of(vcpu) -> int:
    return int.from_bytes(vcpu.area[512:520].tobytes(), "little")


def read(name: str):
    (snapshot,) = snapshots.read(DATA / name)
    return snapshot


def rewritten(snapshot, areas, folder: Path) -> Path:
    """Apply edits to a copy of the snapshot, as a file or a directory; return the copy."""
    out = folder / Path(snapshot.path).name
    if not os.path.isdir(snapshot.path):
        with Source.open(snapshot.path) as source, open(out, "w+b") as file:
            source.rewrite(snapshots.splices(source, snapshot, areas), file)
        for beside in Path(snapshot.path).parent.glob("*.cpuid2"):
            shutil.copy(beside, folder)
        return out
    shutil.copytree(snapshot.path, out)
    for splice in snapshots.splices(None, snapshot, areas):
        with (
            Source.open(os.path.join(snapshot.path, splice.member)) as source,
            open(out / splice.member, "w+b") as file,
        ):
            source.rewrite([splice._replace(member="")], file)
    return out


@pytest.mark.parametrize("name", SAMPLES)
def test_every_register_has_its_known_value(name):
    snapshot = read(name)
    kind, numbers = SAMPLES[name]
    assert snapshot.format == kind
    assert snapshot.kind == ("process" if kind in ("elfcore", "criu") else "vm")
    assert len(snapshot.vcpus) == (3 if "3thr" in name else 2 if "vmm" in name else 1)
    for i, vcpu in enumerate(snapshot.vcpus):
        mask = mask_of(vcpu)
        c = numbers[mask] if isinstance(numbers, dict) else numbers[i]
        if "gdb13" in name:  # what all layouts agree on; XSTATE_BV says more than is
            assert vcpu.layout.mask == 7
            mask = 3 if c == 2 else 7
        registers = Registers(vcpu.area, vcpu.layout)
        values = dict(expected(name, c, mask))
        assert {n: number(registers[n]) for n in values} == values
        if not mask & 6:
            assert "mxcsr" not in registers
        assert vcpu.index == i if snapshot.kind == "vm" else vcpu.index > 0


def test_samples_beside_the_project_are_the_same(shared):
    """The copies under tests/data are those files, and the rest there is read too."""
    folder = shared / "samples"
    found = {path.name for sub in ("raw", "elf", "vmm") for path in (folder / sub).iterdir()}
    ours = {Path(name).name.removesuffix(".xz") for name in SAMPLES if "criu" not in name}
    assert ours == {n for n in found if n.endswith((".xsave", ".core", ".vmstate", ".json"))}
    for name in SAMPLES:
        theirs = folder / name.removesuffix(".xz")
        if theirs.is_file():
            data = (DATA / name).read_bytes()
            assert theirs.read_bytes() == (lzma.decompress(data) if name.endswith("xz") else data)


@pytest.mark.parametrize("name", SAMPLES)
def test_nothing_changed_leaves_every_byte(name, tmp_path):
    snapshot = read(name)
    areas = {i: vcpu.area.copy() for i, vcpu in enumerate(snapshot.vcpus)}
    out = rewritten(snapshot, areas, tmp_path)
    if out.is_dir():
        assert snapshots.splices(None, snapshot, areas) == []
        for file in (DATA / name).iterdir():
            assert (out / file.name).read_bytes() == file.read_bytes()
    else:
        assert out.read_bytes() == (DATA / name).read_bytes()


@pytest.mark.parametrize("name", EDITABLE)
def test_an_edited_snapshot_reads_back_and_the_rest_is_as_it_was(name, tmp_path):
    snapshot = read(name)
    layout = snapshot.vcpus[0].layout or PRESETS["amd-zen4"]
    areas = {}
    for i, vcpu in enumerate(snapshot.vcpus):
        areas[i] = vcpu.area.copy()
        highest = max(bits(mask_of(vcpu)))
        keep(areas[i], layout, ~(1 << highest) & (1 << 63) - 1)
        assert mask_of(vcpu) != int.from_bytes(areas[i][512:520].tobytes(), "little")
    out = rewritten(snapshot, areas, tmp_path)
    (again,) = snapshots.read(out)
    assert len(again.vcpus) == len(snapshot.vcpus)
    for i, vcpu in enumerate(again.vcpus):
        assert np.array_equal(vcpu.area, areas[i])
        assert vcpu.index == snapshot.vcpus[i].index
    if out.is_file():
        with Source.open(DATA / name) as old, Source.open(out) as new:
            before, after = old.read(0, old.size), new.read(0, new.size)
            moved = 0
            end = 0
            for splice in sorted(snapshots.splices(old, snapshot, areas)):
                assert before[end : splice.offset] == after[end + moved : splice.offset + moved]
                assert after[splice.offset + moved :].startswith(splice.new)
                end = splice.offset + len(splice.old)
                moved += len(splice.new) - len(splice.old)
            assert before[end:] == after[end + moved :]


def test_formats_differ_in_bytes_but_not_in_registers():
    """One program's state, by way of the kernel, KVM and CRIU: the same values everywhere."""
    core, criu, raw = (
        read(name).vcpus[0]
        for name in (
            "elf/kernel618-regs64-3thr.core.xz",
            "criu/criu42-regs64s-3thr",
            "raw/kvm618-guestxcr0_e7-bve7.xsave",
        )
    )
    assert not diff(core.area, criu.area, core.layout, criu.layout)
    # the KVM state was set with an FOP, FIP and FDP of its own
    assert diff(core.area, raw.area, core.layout, raw.layout) in (0, 1)


class TestRegistry:
    def test_walk_passes_over_companions_only(self, tmp_path):
        for name in ("raw", "vmm", "criu"):
            shutil.copytree(DATA / name, tmp_path / name)
        (tmp_path / "raw" / "notes.json").write_text("{}")
        (tmp_path / "vmm" / "memory-ranges").write_bytes(bytes(8))
        (tmp_path / "ch").mkdir()
        shutil.copy(DATA / "vmm" / "ch-state.json", tmp_path / "ch" / "state.json")
        (tmp_path / "ch" / "memory-ranges").write_bytes(bytes(8))
        (tmp_path / "ch" / "config.json").write_text("{}")
        found = [os.path.relpath(path, tmp_path) for path in snapshots.walk([tmp_path])]
        assert found == sorted(found)
        assert {"ch/state.json", "criu/criu42-regs64s-3thr", "vmm/ch-state.json"} <= set(found)
        assert not [n for n in found if n.endswith((".xcrs", ".cpuid2", "notes.json"))]
        assert "ch/memory-ranges" not in found
        assert "vmm/memory-ranges" in found  # no state.json beside it: a file like any other
        assert sum(n.startswith("raw/") for n in found) == 8

    def test_a_thousand_good_files_and_three_bad_ones(self, tmp_path):
        area = (DATA / "raw" / "kvm618-guestxcr0_e7-bve7.xsave").read_bytes()
        for i in range(1000):
            (tmp_path / f"{i:04}.xsave").write_bytes(area)
        (tmp_path / "empty.xsave").write_bytes(b"")
        (tmp_path / "random.core").write_bytes(bytes(range(256)) * 3)
        (tmp_path / "short.xsave").write_bytes(area[:1000])
        good, bad = 0, []
        for path in snapshots.walk([tmp_path]):
            try:
                good += len(snapshots.read(path))
            except XfastError as problem:
                bad.append(str(problem))
        assert good == 1000
        assert [line.split(":")[0].rpartition("/")[2] for line in bad] == [
            "empty.xsave",
            "random.core",
            "short.xsave",
        ]
        assert "not a snapshot format that xfast knows (it is binary data)" in bad.pop(1)
        assert all(": expected " in line and ", got " in line and "\n" not in line for line in bad)

    def test_a_directory_of_cloud_hypervisor_is_its_state(self, tmp_path):
        shutil.copy(DATA / "vmm" / "ch-state.json", tmp_path / "state.json")
        (snapshot,) = snapshots.read(tmp_path)
        assert snapshot.format == "cloud-hypervisor"
        assert snapshot.path == str(tmp_path / "state.json")

    def test_what_is_no_snapshot_says_what_was_found(self, tmp_path):
        path = tmp_path / "file"
        path.write_bytes(b"hello, world")
        with pytest.raises(FormatError, match=r"knows \(it is a text\); .* give --layout"):
            snapshots.read(path)
        path.write_bytes(b"")
        with pytest.raises(FormatError, match="it is empty"):
            snapshots.read(path)
        with pytest.raises(FormatError, match=r"expected a snapshot .*, got a directory"):
            snapshots.read(tmp_path)
        with pytest.raises(XfastError, match="No such file"):
            snapshots.read(tmp_path / "nothing")
        with pytest.raises(XfastError, match=r"format: expected one of.*, got 'parallels'"):
            snapshots.read(path, format="parallels")

    def test_memory_that_looks_like_nothing_is_not_raw(self, tmp_path):
        """A file of guest memory is a multiple of 4096 bytes too."""
        path = tmp_path / "memory"
        for page in (bytes(4096), struct.pack("<I", 0xF000FF53) * 1024, b"\x40" * 4096):
            path.write_bytes(page * 4)
            with pytest.raises(FormatError, match="not a snapshot format that xfast knows"):
                snapshots.read(path)

    def test_a_format_may_be_forced(self, tmp_path):
        area = bytearray(4096)
        area[0:2], area[530] = b"\x7f\x03", 1  # a dirty header, and no name that helps
        path = tmp_path / "areas"
        path.write_bytes(area * 2)
        with pytest.raises(FormatError, match="not a snapshot format that xfast knows"):
            snapshots.read(path)
        (snapshot,) = snapshots.read(path, format="raw")
        assert [mask_of(vcpu) for vcpu in snapshot.vcpus] == [0, 0]

    def test_another_package_adds_a_format(self, tmp_path, monkeypatch):
        (tmp_path / "theirs.py").write_text(
            "from xfast.snapshots import Snapshot\n"
            "def sniff(source): return source.read(0, 4) == b'MINE'\n"
            "def read(source, *, layout=None, size=None):\n"
            "    return [Snapshot(source.path, 'mine', 'vm', '', [])]\n"
            "def splices(source, snapshot, areas): return []\n"
        )
        package = tmp_path / "theirs-1.0.dist-info"
        package.mkdir()
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
        (package / "entry_points.txt").write_text("[xfast.formats]\nmine = theirs\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setenv("XFAST_PLUGINS", "1")
        registry._others.cache_clear()
        try:
            (tmp_path / "one").write_bytes(b"MINE and more")
            (snapshot,) = snapshots.read(tmp_path / "one")
            assert snapshot.format == "mine"
            assert isinstance(snapshots.format_named("mine"), types.ModuleType)
            monkeypatch.delenv("XFAST_PLUGINS")
            monkeypatch.setattr(os, "geteuid", lambda: 0)
            registry._others.cache_clear()
            with pytest.raises(FormatError, match="not a snapshot format"):  # root loads none
                snapshots.read(tmp_path / "one")
            monkeypatch.setattr(os, "geteuid", lambda: 1000)
            registry._others.cache_clear()
            assert snapshots.read(tmp_path / "one")[0].format == "mine"
        finally:
            registry._others.cache_clear()
            registry.format_named.cache_clear()
            sys.modules.pop("theirs", None)

    @pytest.mark.parametrize("name", ["vmm/ch-state.json", "raw/kvm618-guestxcr0_e7-bve7.xsave"])
    def test_a_compressed_snapshot_expands_within_the_limit(self, name, tmp_path):
        path = tmp_path / "packed.xz"
        path.write_bytes(lzma.compress((DATA / name).read_bytes()))
        assert snapshots.read(path)[0].container == ("xz",)
        with pytest.raises(FormatError, match="expected at most 1000 bytes, got more"):
            snapshots.read(path, expand_limit=1000)


def small(name: str) -> bytes:
    """Return a sample's bytes; of a core only the part up to the end of its notes."""
    data = (DATA / name).read_bytes()
    return lzma.decompress(data)[: 64 << 10] if name.endswith(".xz") else data


@pytest.mark.parametrize(
    "name",
    [
        "elf/kernel618-regs64-3thr.core.xz",
        "elf/kernel618-regs32-3thr.core.xz",
        "vmm/ch-state.json",
        "vmm/fc-bincode2-v8.vmstate",
        "criu/criu42-regs64s-3thr/core-23807.img",
        "raw/kvm618-guestxcr0_e7-bve7.xsave",
    ],
)
@settings(
    max_examples=60,
    deadline=5000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(random=st.randoms(use_true_random=False), cut=st.booleans())
def test_damage_gives_one_clear_line_or_a_snapshot(name, random, cut, tmp_path):
    data = bytearray(small(name))
    for _ in range(random.randint(0 if cut else 1, 8)):
        at = random.randrange(min(len(data), 8192))
        new = random.choice([b"\xff" * 8, b"\0" * 8, bytes([random.randrange(256)]), b"]", b'"'])
        data[at : at + len(new)] = new
    if cut:
        del data[random.randrange(len(data)) :]
    path = tmp_path / Path(name).name.removesuffix(".xz")
    path.write_bytes(data)
    problem, size = "", 0
    try:
        (snapshot,) = snapshots.read(path)
        size = sum(vcpu.area.size for vcpu in snapshot.vcpus)
    except XfastError as raised:
        problem = str(raised)
    assert not problem or problem.startswith(str(path))
    assert "\n" not in problem
    assert size <= len(data) + 2696
