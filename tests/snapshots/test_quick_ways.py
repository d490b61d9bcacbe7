"""What readers take from the engine's quick loops is what their slow ways give."""

import random
import struct

import pytest
import snapshot_files as files
from mutations import mutated
from state_texts import NUMBERS, changed_numbers, texts

from xfast import snapshots
from xfast.engine import files as engine
from xfast.errors import XfastError
from xfast.snapshots import cloud_hypervisor, raw, state_plans
from xfast.snapshots.model import Unseen


def answer(path, form):
    """Return all that reading gives, or the error's line."""
    try:
        (snapshot,) = snapshots.read(path, format=form)
    except XfastError as problem:
        return str(problem)
    rows = [
        (v.index, v.area.tobytes(), v.layout, v.layout_source, v.layout_note, v.xcr0, v.xss, v.xfd,
         v.cpuid, v.pkru_enabled, v.msrs, v.fpu_differs, v.facts, v.where)
        for v in snapshot.vcpus
    ]  # fmt: skip
    return snapshot.producer, snapshot.facts, snapshot.doubts, rows


def both(path, form, monkeypatch):
    """Return the quick answer, and the one without any quick way."""
    quick = answer(path, form)
    cloud_hypervisor._cpuid_in.cache_clear()
    state_plans.forget()
    with monkeypatch.context() as patch:
        for name in ("members", "unescaped", "byte_list", "records"):
            patch.setattr(engine, name, lambda *_: None)
        patch.setattr(engine, "numbers", lambda *_: -1)
        patch.setattr(cloud_hypervisor, "CPUID_TEXT_LIMIT", -1)
        return quick, answer(path, form)


@pytest.mark.parametrize("seed", range(120))
def test_a_mutated_state_json_reads_the_same_both_ways(tmp_path, monkeypatch, seed):
    rng = random.Random(f"quick {seed}")
    path = tmp_path / "state.json"
    path.write_bytes(mutated("cloud-hypervisor", rng)[0]["state.json"])
    quick, slow = both(path, "cloud-hypervisor", monkeypatch)
    assert quick == slow


@pytest.mark.parametrize("seed", range(120))
def test_a_state_json_with_one_byte_changed_reads_the_same_both_ways(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    path = tmp_path / "state.json"
    data = bytearray(files.cloud_hypervisor_state())
    for _ in range(rng.choice((1, 1, 4))):
        data[rng.randrange(len(data))] = rng.choice(b'0123456789,-.[]{}"\\ :e\xe9\n')
    path.write_bytes(data)
    quick, slow = both(path, "cloud-hypervisor", monkeypatch)
    assert quick == slow


@pytest.mark.parametrize("seed", range(150))
def test_numbers_of_a_state_json_read_the_same_by_a_plan(tmp_path, monkeypatch, seed):
    rng = random.Random(f"plan {seed}")
    path = tmp_path / "vm.json"
    data = texts(rng).encode()
    path.write_bytes(data)
    for _ in range(5):
        state_plans.forget()
        path.write_bytes(data)
        snapshots.read(path)
        path.write_bytes(changed_numbers(data, rng))
        quick, slow = both(path, "cloud-hypervisor", monkeypatch)
        assert quick == slow


def test_most_numbers_of_a_state_json_may_be_others(tmp_path, data):
    """All but CPUID's, XCR0's, an MSR's index, and the byte of CR4 with PKE."""
    sample = (data / "vmm" / "ch-state.json").read_bytes()
    path = tmp_path / "vm.json"
    path.write_bytes(sample)
    state_plans.forget()
    snapshots.read(path)
    start = sample.index(b"vcpu_events")
    places = [one.span() for one in NUMBERS.finditer(sample, start, sample.index(b"xcrs"))]
    followed = 0
    for begin, end in places[::7]:
        path.write_bytes(sample[:begin] + b"3" + sample[end:])
        followed += isinstance(snapshots.read(path)[0].vcpus, Unseen)
    assert followed >= len(places[::7]) - 1
    for word in (b'ebx\\":1752', b'\\"index\\":16', b"231"):
        changed = sample.replace(word, word[:-1] + (b"2" if word[-1:] != b"2" else b"3"), 1)
        assert changed != sample
        assert state_plans.follow(changed) is None


def test_who_changes_a_vcpu_changes_no_plan(tmp_path, data):
    path = tmp_path / "vm.json"
    path.write_bytes((data / "vmm" / "ch-state.json").read_bytes())
    state_plans.forget()
    (first,) = snapshots.read(path)
    expected = answer(path, "cloud-hypervisor")
    for vcpu in first.vcpus:
        vcpu.index, vcpu.cpuid, vcpu.xcr0, vcpu.area[:] = 99, None, 0, 1
    assert answer(path, "cloud-hypervisor") == expected
    (plan,) = state_plans._plans
    assert [(vcpu.nr, vcpu.xcr0) for vcpu in plan.vcpus] == [(0, 0xE7), (1, 0xE7)]


def test_few_plans_are_made_of_texts_that_have_nothing_in_common(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(state_plans, "Template", lambda *_: made.append(1) or FakeTemplate())
    state_plans.forget()
    path = tmp_path / "vm.json"
    for number in range(40):
        path.write_bytes(b'{"%d": 1, ' % number + files.cloud_hypervisor_state()[1:])
        snapshots.read(path)
    state_plans.forget()
    assert len(made) == 6  # the 1st, 2nd, 4th, 8th, 16th and 32nd


class FakeTemplate:
    text = b""

    def follow(self, data):
        return None


@pytest.mark.parametrize("name", ["ch-state.json"])
def test_samples_read_the_same_both_ways(data, monkeypatch, name):
    quick, slow = both(data / "vmm" / name, "cloud-hypervisor", monkeypatch)
    assert quick == slow
    assert not isinstance(quick, str)


@pytest.mark.parametrize("seed", range(80))
def test_a_few_raw_areas_read_the_same_one_by_one_and_sorted(tmp_path, monkeypatch, seed):
    rng = random.Random(f"raw {seed}")
    path = tmp_path / "areas"
    images = []
    for number in range(rng.randrange(1, 5)):
        image = bytearray(files.area(number, 4096, rng.choice((7, 3, 0xE7, 0x207))))
        for _ in range(rng.choice((0, 0, 1, 3))):
            place = rng.choice((rng.randrange(4096), rng.randrange(512, 528), 464, 24, 28, 0))
            image[place] = rng.randrange(256)
        images.append(bytes(image))
    path.write_bytes(b"".join(images))
    quick = answer(path, "raw")
    monkeypatch.setattr(raw, "FEW", 0)
    assert quick == answer(path, "raw")


def test_one_description_of_a_machine_serves_streams_of_others(tmp_path):
    """The first record is kept by its bytes: another machine's is read anew."""
    path = tmp_path / "vm"
    found = []
    stream = files.qemu_stream()
    for machine in (b"pc-q35-7.2", b"pc-q35-7.1", b"pc-q35-7.2", b"pc-q35-11"):
        start = stream.index(b"\x07", 8)
        (length,) = struct.unpack_from(">I", stream, start + 1)
        record = b"\x07" + struct.pack(">I", len(machine)) + machine
        path.write_bytes(stream[:start] + record + stream[start + 5 + length :])
        found.append(snapshots.read(path)[0].facts["machine"].encode())
    assert found == [b"pc-q35-7.2", b"pc-q35-7.1", b"pc-q35-7.2", b"pc-q35-11"]
