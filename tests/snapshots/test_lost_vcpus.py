"""A vCPU or thread that is lost is never silent: what a file says of their number must agree."""

import random
import struct

import pytest
from mutations import MUTATORS, mutated
from snapshot_files import BUILDERS, area, elf_core, elf_notes, firecracker_state, sealed

from xfast import plan_fix, snapshots
from xfast.errors import PolicyError, XfastError
from xfast.hosts.catalogue import catalogue

RUNS = 150
"""Mutations of each format; docs/security.md has the figures of longer runs."""


def found_in(path, name):
    """Return what XMM0 tells of each vCPU that was read, and the doubts; None if refused."""
    try:
        (snapshot,) = snapshots.read(path, format=name)
    except XfastError:
        return None
    marks = {struct.unpack_from("<Q", vcpu.area, 168)[0] for vcpu in snapshot.vcpus}
    return marks, snapshot.doubts


def try_one(folder, name, seed):
    """Damage a snapshot, and require that both vCPUs are there, or that something is said."""
    rng = random.Random(f"{name} {seed}")
    files, target = mutated(name, rng)
    folder.mkdir()
    for file, data in files.items():
        (folder / file).write_bytes(data)
    found = found_in(folder / target if target else folder, name)
    for file in files:
        (folder / file).unlink()
    folder.rmdir()
    assert found is None or found[0] >= {1, 2} or found[1], f"{name}, seed {seed}: {found}"
    return found


@pytest.mark.parametrize("name", MUTATORS)
def test_structural_damage_loses_none_in_silence(tmp_path, name):
    answers = [try_one(tmp_path / "x", name, seed) for seed in range(RUNS)]
    assert any(found is None for found in answers)
    assert any(found and found[0] >= {1, 2} for found in answers)
    if name not in ("minidump", "crosvm"):  # which refuse what does not agree
        assert any(found and found[1] for found in answers)


def test_a_length_that_moves_an_area_is_doubted(tmp_path):
    """4104 became 4096, which other versions write: the area was read from 8 bytes too early."""
    data = bytearray(firecracker_state())
    data[data.index(struct.pack("<2Q", 4104, 0))] = 0
    (tmp_path / "vm").write_bytes(sealed("firecracker", bytes(data)))
    (snapshot,) = snapshots.read(tmp_path / "vm")
    assert "expected kvm_xsave of 4104 bytes in version 8.0.0, got 4096, 4104" in snapshot.doubts


def test_a_second_area_of_a_thread_is_doubted(tmp_path):
    """What was left of the second thread's NT_PRSTATUS hid that there was one."""
    core = bytearray(elf_core(*elf_notes(100, area(1)), *elf_notes(101, area(2))))
    struct.pack_into("<2I", core, core.index(b"CORE", 1800) - 8, 80, 0)
    (tmp_path / "core").write_bytes(core)
    (snapshot,) = snapshots.read(tmp_path / "core")
    assert len(snapshot.vcpus) == 1
    assert "expected 2 notes NT_X86_XSTATE, as their headers lie there, got 1" in snapshot.doubts


@pytest.mark.parametrize("name", BUILDERS)
def test_a_whole_snapshot_raises_no_doubt(tmp_path, name):
    files = BUILDERS[name]()
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    (snapshot,) = snapshots.read(tmp_path if len(files) > 1 else tmp_path / next(iter(files)))
    assert snapshot.doubts == ()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lost-vcpu0.qemustate", "expected vCPUs 0 to 0, got 1"),
        ("lost-vcpu1-no-description.qemustate", "vCPU 1, got only its section cpu_common"),
    ],
)
def test_the_cases_of_lost_vcpus_are_doubted(shared, name, words):
    (snapshot,) = snapshots.read(shared / "cases" / "hostile" / name)
    assert words in snapshot.doubts[0]
    with pytest.raises(PolicyError, match="not every vCPU may have been read"):
        plan_fix(snapshot, catalogue()["intel-broadwell"])
