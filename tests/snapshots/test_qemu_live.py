"""The judge of every edit: QEMU loads the file, and says what its registers hold."""

import contextlib
import json
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from qemu_files import registers_of
from qemu_machine import GUESTS, PROGRAM, Machine, guest, restored

from xfast.snapshots.bytes.source import Source
from xfast.snapshots.qemu import reader as qemu
from xfast.xsave import area as engine

pytestmark = pytest.mark.skipif(not shutil.which(PROGRAM), reason=f"{PROGRAM} is not here")


def filled(area, seed):
    """Return an area whose x87 and SSE state is all new."""
    random = np.random.default_rng(seed).integers(0, 256, area.size).astype(np.uint8)
    area = area.copy()
    area[160:416] = random[160:416]
    for i in range(8):
        area[32 + 16 * i :][:10] = random[32 + 16 * i :][:10]
        area[39 + 16 * i] |= 0x80
    area[:5] = np.frombuffer(struct.pack("<HHB", 0x37F, 0x1800, 0xFF), np.uint8)
    area[24:28] = np.frombuffer(struct.pack("<I", 0x1FA0), np.uint8)
    area[512] |= 3
    return area


def assert_holds(registers, area, kvm):
    data = area.tobytes()
    words = [registers[name][0] for name in ("FCW", "FSW", "FTW", "MXCSR")]
    assert words == [0x37F, 0x1800, 0xFF, 0x1FA0]
    for i in range(8):
        slot = i if kvm else (i + 3) & 7
        assert registers[f"FPR{slot}"] == list(struct.unpack_from("<QH", data, 32 + 16 * i))
    for i in range(8):  # as many as are shown outside 64-bit mode
        high_and_low = list(struct.unpack_from("<QQ", data, 160 + 16 * i))[::-1]
        assert registers[f"XMM{i:02}"] == high_and_low


def edit(path, target, seed):
    """Fill every vCPU with new values; return the areas."""
    with Source.open(path) as source, open(target, "wb") as out:
        (snapshot,) = qemu.read(source)
        areas = {i: filled(vcpu.area, seed + i) for i, vcpu in enumerate(snapshot.vcpus)}
        source.rewrite(qemu.splices(source, snapshot, areas), out)
    return snapshot, areas


@pytest.mark.parametrize("accelerator", GUESTS)
def test_edits_arrive_in_qemu_and_come_back(tmp_path, accelerator):
    kvm = accelerator == "kvm"
    arguments = guest(accelerator)
    with Machine(*arguments) as machine:
        machine.save(tmp_path / "first")
    snapshot, areas = edit(tmp_path / "first", tmp_path / "second", 1)
    assert snapshot.producer == f"qemu-{accelerator}"
    with Machine(*arguments, "-incoming", f"exec:cat {tmp_path / 'second'}") as machine:
        assert machine.migrated() == "completed"
        for registers, area in zip(machine.registers(), areas.values(), strict=True):
            assert_holds(registers, area, kvm)
        machine.save(tmp_path / "third")
    with Source.open(tmp_path / "third") as source:
        (snapshot,) = qemu.read(source)
    for vcpu, area in zip(snapshot.vcpus, areas.values(), strict=True):
        assert np.array_equal(vcpu.area[:28], area[:28])
        assert np.array_equal(vcpu.area[32:416], area[32:416])


@pytest.mark.parametrize("accelerator", GUESTS)
def test_edits_arrive_by_way_of_a_disk_image(tmp_path, accelerator):
    if not shutil.which("qemu-img"):
        pytest.skip("qemu-img is not here")
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "64M"], check=True)
    drive = ("-drive", f"file={disk},if=none,id=disk,format=qcow2")
    with Machine(*guest(accelerator), *drive) as machine:
        assert machine.monitor("savevm first") == ""
    _, areas = edit(disk, tmp_path / "edited.qcow2", 7)
    os.replace(tmp_path / "edited.qcow2", disk)
    subprocess.run(["qemu-img", "check", "-q", disk], check=True)
    with Machine(*guest(accelerator), *drive) as machine:
        assert machine.monitor("loadvm first") == ""
        for registers, area in zip(machine.registers(), areas.values(), strict=True):
            assert_holds(registers, area, accelerator == "kvm")


def test_the_leak_costs_the_guest_its_registers_and_the_edit_keeps_them(shared, tmp_path):
    arguments = guest("kvm")
    if re.search(r"\bpku\b", Path("/proc/cpuinfo").read_text()):
        pytest.skip("this host has PKU and takes the leaked bit")
    path = shared / "samples/qemu/kvm/q72-kvm-pkru-leak-bv207.qemustate"
    with Source.open(path) as source, open(tmp_path / "edited", "wb") as out:
        (snapshot,) = qemu.read(source)
        area = snapshot.vcpus[0].area.copy()
        engine.keep(area, snapshot.vcpus[0].layout, 7)
        source.rewrite(qemu.splices(source, snapshot, {0: area}), out)
    arguments += ("-m", "128", "-machine", "pc-i440fx-7.2")
    with contextlib.suppress(EOFError):  # QEMU 10 refuses it; QEMU 7.2 says that all is well
        assert restored(arguments, path)["MXCSR"] == [0x1F80]
    registers = restored(arguments, tmp_path / "edited")
    assert registers["MXCSR"] == [0x1FA0]
    low, high = 0x1111222233334444, 0x5555666677778888
    assert registers["YMM00"] == [0, 0x9999AAAABBBBCCCC, high, low]


def test_a_guest_with_memory_keeps_every_other_register(shared, tmp_path):
    path = shared / "samples/qemu/q72-max-smp2-pc-fullram.qemustate.zst"
    truth = json.loads(path.with_name(path.name.split(".")[0] + ".json").read_text())["regs"]
    edited = tmp_path / "edited"
    with Source.open(path) as source, open(edited, "wb") as out:
        out.writelines(source.chunks())
    with Source.open(edited) as source, open(edited, "r+b") as file:
        (snapshot,) = qemu.read(source)
        area = snapshot.vcpus[1].area.copy()
        area[160:168] = 0x11
        source.patch(qemu.splices(source, snapshot, {1: area}), file.fileno())
    machine = "pc-i440fx-7.2"
    arguments = [*GUESTS["tcg"], "-m", "128", "-machine", machine, "-serial", "null"]
    with Machine(*arguments, "-incoming", f"exec:cat {edited}") as machine:
        assert machine.migrated() == "completed"
        text = machine.monitor("info registers -a")
    changed = re.compile(r"(CPU#1.*YMM00=\S+ \S+ \S+) (\S+)", re.DOTALL)
    assert changed.search(text)[2] == "11" * 8
    restored = changed.sub(rf"\1 {changed.search(truth)[2]}", text)
    assert list(registers_of(restored)) == list(registers_of(truth))
    assert restored.split() == truth.split()
