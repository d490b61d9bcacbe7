"""Streams with a description that was seen before: read in one go, to exactly the same answer."""

import lzma
import random

import numpy as np
import pytest
import snapshot_files as files
from mutations import mutated

from xfast import snapshots
from xfast.errors import XfastError
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.qemu import plans, stream

SAMPLES = [
    "q11-max-smp4-q35",
    "q72-avx512-reinjected-S",
    "q72-haswell-smp2-pc",
    "q72-kvm-bv7-xcr7-smp1",
    "q72-kvm-pkru-leak-bv207",
    "q72-max-smp2-q35",
    "q72-nehalem-smp1-pc",
]


@pytest.fixture(autouse=True)
def nothing_seen():
    plans.forget()
    yield
    plans.forget()


def answer(path):
    """Return all that reading gives, or the error's line."""
    try:
        (snapshot,) = snapshots.read(path, format="qemu")
    except XfastError as problem:
        return str(problem)
    rows = [
        (vcpu.index, vcpu.area.tobytes(), vcpu.xcr0, vcpu.xss, vcpu.xfd, vcpu.mode, vcpu.facts,
         vcpu.pkru_enabled, vcpu.guest_mask, vcpu.where, vcpu.origin.section.data)
        for vcpu in snapshot.vcpus
    ]  # fmt: skip
    return snapshot.producer, snapshot.facts, snapshot.container, snapshot.doubts, rows


def both(path):
    """Return the slow answer and, with the plans that are kept, the fast one."""
    kept = list(plans._plans)
    plans.forget()
    slow = answer(path)
    plans._plans[:] = kept
    return slow, answer(path)


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_read_the_same_with_a_plan(tmp_path, data, name):
    path = tmp_path / "stream"
    path.write_bytes(lzma.decompress((data / f"qemu/{name}.qemustate.xz").read_bytes()))
    first = answer(path)
    assert len(plans._plans) == 1
    with Source.open(path) as source:
        assert plans.follow(source) is not None
    assert answer(path) == first


def test_one_description_serves_streams_of_other_content_and_length(tmp_path):
    seen = tmp_path / "seen"
    seen.write_bytes(files.qemu_stream())
    snapshots.read(seen)
    for number in range(8):
        rng = random.Random(number)
        devices = files.qemu_devices()
        for at, (entry, content) in enumerate(devices):
            if entry["name"] == "cpu":
                new = bytearray(content)
                new[8 + 1561 : 8 + 1561 + 256] = rng.randbytes(256)
                devices[at] = entry, bytes(new)
        path = tmp_path / "other"
        path.write_bytes(files.qemu_stream(devices, ram=rng.randbytes(300 * number)))
        slow, fast = both(path)
        assert slow == fast
        with Source.open(path) as source:
            assert plans.follow(source) is not None


def test_a_known_description_costs_one_read_of_the_tail(tmp_path, monkeypatch):
    path = tmp_path / "stream"
    path.write_bytes(files.qemu_stream(ram=bytes(100_000)))
    snapshots.read(path)
    monkeypatch.setattr(stream, "_description", None)  # no JSON
    with Source.open(path) as source:
        before = source.bytes_read
        found = plans.follow(source)
        (plan,) = plans._plans
        limit = plan.size + len(plan.text) + plans.LOOK_BACK + plans.MARK
        assert source.bytes_read - before <= limit
    assert [cpu.instance for cpu in found.sections().cpus] == [0, 1]
    assert len(snapshots.read(path)[0].vcpus) == 2


def test_a_tail_that_lies_is_caught(tmp_path):
    """Every byte of the sections' structure, and the registers, changed behind a known end."""
    path = tmp_path / "stream"
    whole = files.qemu_stream()
    path.write_bytes(whole)
    snapshots.read(path)
    assert plans._plans
    end = whole.rindex(b"\0\x06")
    for at in range(end - plans._plans[0].size - 40, end, 3):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        slow, fast = both(path)
        assert slow == fast, at


@pytest.mark.parametrize("seed", range(250))
def test_damage_is_read_the_same_way_whatever_was_seen(tmp_path, seed):
    path = tmp_path / "stream"
    for apics in (True, False):
        path.write_bytes(files.qemu_stream(files.qemu_devices(apics=apics)))
        snapshots.read(path)
    path.write_bytes(mutated("qemu", random.Random(f"plans {seed}"))[0]["vm"])
    slow, fast = both(path)
    assert slow == fast


def test_edits_through_a_plan_are_those_without(tmp_path):
    path = tmp_path / "stream"
    path.write_bytes(files.qemu_stream())
    edits = []
    for _ in range(2):
        (snapshot,) = snapshots.read(path)
        area = snapshot.vcpus[1].area.copy()
        area[576:832] = 0
        with Source.open(path) as source:
            edits.append(snapshots.splices(source, snapshot, {1: area}))
    assert edits[0] == edits[1] != []


def test_few_plans_are_kept_and_the_latest_comes_first(tmp_path):
    for number in range(plans.PLANS_LIMIT + 4):
        path = tmp_path / str(number)
        devices = [*files.qemu_devices(), files.qemu_device(f"d{number}", bytes(number))]
        path.write_bytes(files.qemu_stream(devices))
        snapshots.read(path)
    assert len(plans._plans) == plans.PLANS_LIMIT
    old = tmp_path / "7"
    snapshots.read(old)
    assert old.read_bytes().endswith(plans._plans[0].text)
    assert np.array_equal(*(snapshots.read(old)[0].vcpus[1].area for _ in range(2)))
