"""What readers take from the engine's quick loops is what their slow ways give."""

import random
import struct

import pytest
import snapshot_files as files
from mutations import mutated

from xfast import snapshots
from xfast.engine import files as engine
from xfast.errors import XfastError
from xfast.snapshots import cloud_hypervisor, raw


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
