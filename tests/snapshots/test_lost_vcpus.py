"""A vCPU or thread that is lost is never silent: what a file says of their number must agree."""

import json
import random
import struct

import pytest
import snapshot_files as files
from mutations import MUTATORS, mutated
from snapshot_files import BUILDERS, area, elf_core, elf_notes, firecracker_state, sealed

from xfast import plan_fix, snapshots
from xfast.errors import FormatError, PolicyError, XfastError
from xfast.hosts import resolve
from xfast.hosts.catalogue import catalogue
from xfast.judge.judgement import check

HOST = resolve("intel-sapphirerapids@6.12")
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


def _entries(*numbers):
    """Return the entries of an HVM context for these vCPUs."""
    for number in numbers:
        image = files.area(number + 1)
        yield files.xen_entry(2, number, image[:512] + bytes(488))
        yield files.xen_entry(16, number, struct.pack("<3Q", 0, 7, 7) + image)


def _saved_by_libvirt(xml):
    text = xml.encode() + b"\0"
    head = b"LibvirtQemudSave" + struct.pack("<5I56x", 2, len(text), 1, 0, 0)
    return head + text + files.qemu_stream()


def _vcpus_of(state):
    return state["snapshots"]["cpu-manager"]["snapshots"]


def _moved(state):
    """Hide the last vCPU below another name."""
    vcpu = _vcpus_of(state).popitem()
    state["snapshots"]["cpu-manager2"] = {"snapshots": dict([vcpu])}


def _nested(state):
    """Hide the last vCPU in the one before it."""
    key, vcpu = _vcpus_of(state).popitem()
    _vcpus_of(state)["0"]["snapshots"][key] = vcpu


def _state(change):
    state = json.loads(files.cloud_hypervisor_state())
    change(state)
    return json.dumps(state).encode()


CONTEXT = files.xen_context
EXTENDED = files.xen_record(5, struct.pack("<2I", 1, 0) + bytes(64))
PV = (
    files.xen_record(4, struct.pack("<2I", 0, 0) + bytes(64)),
    files.xen_record(6, struct.pack("<2I2Q", 0, 0, 7, 7) + files.area()),
)
LOST = {
    "a context of Xen that follows has fewer vCPUs": (
        "xen", files.xen_image(CONTEXT(*_entries(0, 1)), CONTEXT(*_entries(0))), "of vCPU 1"
    ),
    "a context of Xen within a record that nobody knows": (
        "xen",
        files.xen_image(files.xen_record(99, CONTEXT(*_entries(1))), CONTEXT(*_entries(0))),
        "known types, got 0x63",
    ),
    "a record of Xen about a vCPU without state": (
        "xen", files.xen_image(*PV, EXTENDED, domain=1), "of vCPU 1"
    ),
    "an area of Xen that swallows the next vCPU": (
        "xen",
        files.xen_image(
            CONTEXT(
                next(_entries(0)),
                files.xen_entry(
                    16, 0, struct.pack("<3Q", 0, 7, 7) + files.area() + b"".join(_entries(1))
                ),
            )
        ),
        "zeros behind the area of vCPU 0",
    ),
    "registers of Xen that swallow the next vCPU": (
        "xen",
        files.xen_image(
            CONTEXT(files.xen_entry(2, 0, bytes(1000) + b"".join(_entries(1))), *_entries(0))
        ),
        "CPU 0 once, whole",
    ),
    "the second vCPU of crosvm by itself": (
        "crosvm", files.cbor(files.crosvm_vcpu(1, files.area(1, 4096))), "vCPUs 0 to 0, got 1"
    ),
    "two vCPUs of crosvm in one file": (
        "crosvm",
        b"".join(files.cbor(files.crosvm_vcpu(i, files.area(1, 4096))) for i in range(2)),
        "one item, got more",
    ),
    "a vCPU of Cloud Hypervisor below another name": (
        "cloud-hypervisor", _state(_moved), "2 vCPUs, as many as have a state, got 1"
    ),
    "a vCPU of Cloud Hypervisor within another": (
        "cloud-hypervisor", _state(_nested), "2 vCPUs, as many as have a state, got 1"
    ),
    "two states of Cloud Hypervisor in one file": (
        "cloud-hypervisor", 2 * files.cloud_hypervisor_state(), "one JSON object, got more"
    ),
    "a domain whose number of vCPUs is none": (
        "qemu", _saved_by_libvirt("<domain type='kvm'><vcpu>0x3</vcpu></domain>"), "that is none"
    ),
}  # fmt: skip
"""What hides a vCPU: the format, the file, and words of the doubt or the error."""


@pytest.mark.parametrize("story", LOST)
def test_a_vcpu_that_hides_is_told_of(tmp_path, story):
    """All were judged as if there were one vCPU."""
    name, data, words = LOST[story]
    path = tmp_path / "vcpu1"
    path.write_bytes(data)
    for _ in range(2):  # the second time, as something like it was read before
        try:
            (snapshot,) = snapshots.read(path, format=name)
        except FormatError as problem:
            assert words in str(problem)  # noqa: PT017
            continue
        assert words in " ".join(snapshot.doubts)
        (verdict,) = check(snapshot, HOST)
        assert verdict.verdict == "unknown"
        with pytest.raises(XfastError):
            plan_fix(snapshot, HOST)
