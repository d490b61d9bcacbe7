"""What readers take from the engine's quick loops is what their slow ways give."""

import random

import pytest
import snapshot_files as files
from mutations import mutated

from xfast import snapshots
from xfast.engine import files as engine
from xfast.errors import XfastError
from xfast.snapshots import cloud_hypervisor


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
