"""The contract of a format (xfast/snapshots/contract.py), kept by every one of them.

A new format is a line in FORMATS and a builder in tests/helpers/snapshot_files.py.
"""

import os
import pickle
import random
import struct

import numpy as np
import pytest
from effort import at_most
from snapshot_files import BUILDERS, READ_ONLY, sealed

from xfast import snapshots
from xfast.errors import PolicyError, XfastError
from xfast.snapshots import FORMATS, registry
from xfast.snapshots.bytes.folder import Folder
from xfast.snapshots.bytes.source import Source
from xfast.xsave.area import headers, keep
from xfast.xsave.features import XFEATURE_MASK_FPSSE, bits
from xfast.xsave.layout import PRESETS

EDITABLE = [name for name in FORMATS if name not in READ_ONLY]
SECONDS = 10


def put(folder, files):
    """Write a snapshot's files; return the path to read: the file, or the directory."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder if len(files) > 1 else folder / name


def attempt(path, name):
    """Return the vCPUs that `path` gives, or None where it is refused in one clear line."""
    line, vcpus = str(path), None
    with at_most(SECONDS):
        try:
            (snapshot,) = snapshots.read(path, format=name)
            vcpus = snapshot.vcpus
        except XfastError as problem:
            line = str(problem)
    assert line.startswith(str(path))
    assert "\n" not in line
    return vcpus


@pytest.fixture
def built(tmp_path):
    """Return a function that writes a format's example: its path and its files."""

    def build(name):
        files = BUILDERS[name]()
        return put(tmp_path / "example", files), files

    return build


def rewritten(source, snapshot, areas, folder):
    """Apply a format's edits to a copy; return its path, and each file's edits by name."""
    edits = snapshots.splices(source, snapshot, areas)
    by_file = {}
    for edit in edits:
        by_file.setdefault(edit.member, []).append(edit._replace(member=""))
    folder.mkdir()
    whole = isinstance(source, Folder)
    for name in source.names if whole else [""]:
        file = source.file(name) if whole else source
        with open(folder / (name or os.path.basename(source.path)), "w+b") as out:
            file.rewrite(by_file.get(name, []), out)
        if whole:
            file.close()
    return folder if whole else folder / os.path.basename(source.path), by_file


def test_every_format_has_an_example():
    assert set(BUILDERS) == set(FORMATS)


def asked_one_by_one(source):
    """Return the first format that says it is its file, of all of them."""
    start = source.read(0, min(8, source.size))
    certain = registry.MAGICS.get(start[:4]) or registry.MAGICS.get(start)
    names = registry.JSON_FIRST if start.startswith(b"{") else FORMATS
    names = [certain] if certain else names
    return next((name for name in names if registry.format_named(name).sniff(source)), "none")


@pytest.mark.parametrize("seed", range(300))
def test_no_format_is_passed_over_that_would_take_the_file(tmp_path, seed):
    """Whatever a file begins with, and wherever in it a stream or an archive's mark lies."""
    rng = random.Random(f"recognise {seed}")
    starts = [data for build in BUILDERS.values() for data in build().values()]
    starts += [b"QFI\xfb" + bytes(80), bytes(257) + b"ustar" + bytes(300), b"", b" \n{", b"\x7f"]
    starts += [b"libvirt-xml\n \0 \r" + bytes(40), b"Xen saved domain, xl format\n \0 \r", bytes(9)]
    starts += [bytes.fromhex("a567") + b"vcpu_id", b'{"vcpu_id":', sealed("firecracker", bytes(99))]
    data = bytearray(rng.choice(starts))
    for _ in range(rng.choice((0, 0, 1, 3))):
        if data:
            data[rng.randrange(min(len(data), 300))] = rng.choice((0, 0x7B, rng.randrange(256)))
    if rng.random() < 0.3:
        data[rng.randrange(len(data) + 1) :] = b"QEVM\0\0\0\3\7" + rng.randbytes(20)
    data += bytes(rng.choice((0, 0, 70_000)))
    path = tmp_path / rng.choice(("file", "file.xsave"))
    path.write_bytes(data)
    with Source.open(path) as source:
        assert registry.recognise(source, "none") == asked_one_by_one(source)


@pytest.mark.parametrize("name", FORMATS)
class TestReading:
    def test_it_is_recognised_and_by_no_other_format_before_it(self, built, name):
        path, _ = built(name)
        with registry.open_input(path) as source:
            assert registry.recognise(source) == name

    def test_it_is_read(self, built, name):
        path, _ = built(name)
        (snapshot,) = snapshots.read(path)
        assert (snapshot.format, snapshot.path) == (name, str(path))
        assert (snapshot.stamp is None) == path.is_dir()
        assert len(snapshot.vcpus) == 2
        first, second = snapshot.vcpus
        assert first.index < second.index
        for i, vcpu in enumerate(snapshot.vcpus, 1):
            assert headers(vcpu.area).xstate_bv & XFEATURE_MASK_FPSSE == XFEATURE_MASK_FPSSE
            assert vcpu.area[168:176].tobytes() == struct.pack("<Q", i)  # XMM0's upper half
            assert vcpu.layout is not None

    def test_what_it_returns_can_be_sent_to_another_process(self, built, name):
        path, _ = built(name)
        (snapshot,) = snapshots.read(path)
        again = pickle.loads(pickle.dumps(snapshot))
        for one, two in zip(snapshot.vcpus, again.vcpus, strict=True):
            assert np.array_equal(one.area, two.area)
            assert one.where == two.where

    def test_cut_off_anywhere_it_is_refused_or_read(self, built, name, tmp_path):
        path, files = built(name)
        target, data = max(files.items(), key=lambda item: len(item[1]))
        file = path / target if path.is_dir() else path
        for size in range(0, len(data), 64):
            file.write_bytes(data[:size])
            vcpus = attempt(path, name)
            assert vcpus is None or len(vcpus) <= 2

    def test_lengths_that_lie_are_refused_or_harmless(self, built, name):
        """Numbers of every width, at places all over the file, become huge, zero or off by one."""
        path, files = built(name)
        target, data = max(files.items(), key=lambda item: len(item[1]))
        file = path / target if path.is_dir() else path
        rng = random.Random(name)
        places = [*range(0, min(len(data), 256), 2), *rng.sample(range(len(data) - 8), 200)]
        for at in places:
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice((0, (1 << 8 * width) - 1, 1 << 8 * width - 1, 0x7FF0, 1 << 20))
            order = rng.choice(("little", "big"))
            lie = (value & (1 << 8 * width) - 1).to_bytes(width, order)
            file.write_bytes(sealed(name, data[:at] + lie + data[at + width :]))
            vcpus = attempt(path, name)
            assert vcpus is None or sum(v.area.nbytes for v in vcpus) <= len(data) + 2 * 11008


@pytest.mark.parametrize("name", EDITABLE)
class TestEditing:
    def test_nothing_changed_yields_no_edit_and_every_byte_stays(self, built, name, tmp_path):
        path, files = built(name)
        (snapshot,) = snapshots.read(path)
        areas = {i: vcpu.area.copy() for i, vcpu in enumerate(snapshot.vcpus)}
        with registry.open_input(path) as source:
            out, edits = rewritten(source, snapshot, areas, tmp_path / "out")
        assert edits == {}
        for file, data in files.items():
            assert (out / file if out.is_dir() else out).read_bytes() == data

    def test_a_fixed_snapshot_reads_back_and_the_rest_is_as_it_was(self, built, name, tmp_path):
        path, files = built(name)
        (snapshot,) = snapshots.read(path)
        vcpu = snapshot.vcpus[1]
        new = vcpu.area.copy()
        highest = max(bits(headers(new).xstate_bv))
        keep(new, vcpu.layout or PRESETS["intel"], ~(1 << highest) & (1 << 63) - 1)
        with registry.open_input(path) as source:
            out, edits = rewritten(source, snapshot, {1: new}, tmp_path / "out")
        assert edits
        (again,) = snapshots.read(out)
        assert np.array_equal(again.vcpus[0].area, snapshot.vcpus[0].area)
        assert np.array_equal(again.vcpus[1].area, new)
        for file, before in files.items():
            after = (out / file if out.is_dir() else out).read_bytes()
            old_end = new_end = 0
            for edit in sorted(edits.get(file if out.is_dir() else "", [])):
                length = edit.offset - old_end
                assert before[old_end : edit.offset] == after[new_end : new_end + length]
                assert before[edit.offset :].startswith(edit.old)
                old_end = edit.offset + len(edit.old)
                new_end += length + len(edit.new)
            assert before[old_end:] == after[new_end:]

    def test_edits_need_nothing_but_what_was_read(self, built, name, monkeypatch):
        """`splices` follows each vCPU's origin: the file is read for old bytes only."""
        path, files = built(name)
        (snapshot,) = snapshots.read(path)
        new = snapshot.vcpus[0].area.copy()
        new[160] ^= 0xFF
        with registry.open_input(path) as source:
            before = getattr(source, "bytes_read", 0)
            assert snapshots.splices(source, snapshot, {0: new})
            read = getattr(source, "bytes_read", 0) - before
        assert read <= (len(files["vm.vmstate"]) if name == "firecracker" else 64)

    def test_an_area_that_does_not_fit_is_refused(self, built, name):
        path, _ = built(name)
        (snapshot,) = snapshots.read(path)
        with (
            registry.open_input(path) as source,
            pytest.raises((PolicyError, ValueError), match="expected"),
        ):
            snapshots.splices(source, snapshot, {0: np.zeros(1 << 16, np.uint8)})


@pytest.mark.parametrize("name", sorted(READ_ONLY))
def test_what_nobody_restores_is_not_edited(built, name):
    path, _ = built(name)
    (snapshot,) = snapshots.read(path)
    with registry.open_input(path) as source, pytest.raises(PolicyError):
        snapshots.splices(source, snapshot, {0: snapshot.vcpus[0].area})


def test_an_origin_of_another_format_is_refused(built, tmp_path):
    (core,) = snapshots.read(put(tmp_path / "core", BUILDERS["elfcore"]()))
    path, _ = built("firecracker")
    (state,) = snapshots.read(path)
    new = state.vcpus[0].area.copy()
    new[160] ^= 0xFF
    state.vcpus[0].origin = core.vcpus[0].origin
    with (
        Source.open(path) as source,
        pytest.raises(ValueError, match=r"expected what xfast\.snapshots\.firecracker keeps"),
    ):
        snapshots.splices(source, state, {0: new})
