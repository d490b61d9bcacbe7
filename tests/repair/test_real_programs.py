"""Repairs and conversions before their judges: QEMU, gdb, KVM and crit. Skipped where absent."""

import contextlib
import errno
import json
import lzma
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from qemu_files import registers_of
from qemu_machine import GUESTS, PROGRAM, Machine, guest, restored

import xfast
from xfast.cli.main import main
from xfast.errors import PolicyError
from xfast.repair.plan import plan_fix
from xfast.snapshots import splices
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.store import put
from xfast.xsave import area as engine
from xfast.xsave.cpuid import Cpuid, Entry
from xfast.xsave.features import (
    BY_NAME,
    PKRU_NR,
    XFEATURE_MASK_AVX512,
    XFEATURE_MASK_FPSSE,
    XFEATURE_MASK_XTILE,
)
from xfast.xsave.layout import PRESETS, Layout, Slot

needs_qemu = pytest.mark.skipif(not shutil.which(PROGRAM), reason=f"{PROGRAM} is not here")
needs_gdb = pytest.mark.skipif(not shutil.which("gdb"), reason="gdb is not here")
needs_crit = pytest.mark.skipif(not shutil.which("crit"), reason="crit is not here")
needs_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm can't be opened"
)

LEAK = "samples/qemu/kvm/q72-kvm-pkru-leak-bv207.qemustate"
YMM0 = [0, 0x9999AAAABBBBCCCC, 0x5555666677778888, 0x1111222233334444]


@needs_qemu
@needs_kvm
@pytest.mark.parametrize("way", ["new file", "replaced", "patched", "xz"])
def test_a_leaked_stream_restores_under_kvm_after_a_fix(shared, tmp_path, monkeypatch, way):
    if re.search(r"\bpku\b", Path("/proc/cpuinfo").read_text()):
        pytest.skip("this host has PKU and takes the leaked bit")
    arguments = (*guest("kvm"), "-m", "128", "-machine", "pc-i440fx-7.2")
    path = tmp_path / "leak"
    shutil.copyfile(shared / LEAK, path)
    if way == "new file":
        with contextlib.suppress(EOFError):  # QEMU 10 refuses it; QEMU 7.2 says that all is well
            assert restored(arguments, path)["MXCSR"] == [0x1F80]
    monkeypatch.setattr(put, "PATCH_FROM", 0 if way == "patched" else 1 << 40)
    out = path
    words = ["fix", str(path), "--host", "this"]
    if way == "new file":
        out = tmp_path / "out"
        assert main([*words, "-o", str(out)]) == 0
    elif way == "xz":
        packed = tmp_path / "leak.xz"
        packed.write_bytes(lzma.compress(path.read_bytes(), preset=0))
        assert main(["fix", str(packed), "--host", "this", "--in-place"]) == 0
        out.write_bytes(lzma.decompress(packed.read_bytes()))
    else:
        assert main([*words, "--in-place"]) == 0
    registers = restored(arguments, out)
    assert registers["MXCSR"] == [0x1FA0]
    assert registers["YMM00"] == YMM0
    assert main(["check", str(out), "--host", "this"]) == 0


@needs_qemu
def test_a_guest_with_memory_after_a_fix_and_edits_in_place(shared, tmp_path, monkeypatch):
    """What QEMU shows is what was saved: fixed where it lay, edited there and back, repacked."""
    monkeypatch.setattr(put, "PATCH_FROM", 0)
    packed = shared / "samples/qemu/q72-max-smp2-pc-fullram.qemustate.zst"
    truth = json.loads(packed.with_name("q72-max-smp2-pc-fullram.json").read_text())["regs"]
    path = tmp_path / "stream"
    with Source.open(packed) as source, path.open("wb") as out:
        out.writelines(source.chunks())
    size = path.stat().st_size
    host = xfast.resolve("qemu-tcg-max")
    plan = plan_fix(xfast.read(path)[0], host, drop=["bndregs", "bndcsr"], even_if_live=True)
    record = plan.apply(in_place=True)
    assert {edit["field"] for edit in record["edits"]} == {"cpu/mpx"}
    (snapshot,) = xfast.read(path)
    areas = {}
    for i, vcpu in enumerate(snapshot.vcpus):
        areas[i] = vcpu.area.copy()
        areas[i][160:416] ^= 0xFF
    for edited in (areas, {i: vcpu.area for i, vcpu in enumerate(snapshot.vcpus)}):
        with Source.open(path) as source, path.open("r+b") as file:
            (now,) = xfast.read(path)
            source.patch(splices(source, now, edited), file.fileno())
    assert path.stat().st_size == size
    machine = ["-m", "128", "-machine", "pc-i440fx-7.2", "-serial", "null"]
    with Machine(*GUESTS["tcg"], *machine, "-incoming", f"exec:cat {path}") as qemu:
        assert qemu.migrated() == "completed"
        text = qemu.monitor("info registers -a")
    assert list(registers_of(text)) == list(registers_of(truth))


@needs_qemu
def test_a_stream_that_qemu_made_loads_with_the_fields_that_convert_wrote(tmp_path):
    """`convert --as qemu` gives the bytes of QEMU's own sections."""
    saved = tmp_path / "saved"
    with Machine(*guest("tcg")) as qemu:
        qemu.save(saved)
    stream = saved.read_bytes()
    assert main(["convert", str(saved), "--as", "qemu", "-o", str(tmp_path / "fields")]) == 0
    answer = json.loads((tmp_path / "fields").read_text())
    (snapshot,) = xfast.read(saved)
    for vcpu, row in zip(snapshot.vcpus, answer["vcpus"], strict=True):
        for name, (offset, length) in vcpu.where.items():
            if name in row["fields"] and name != "xstate_bv":  # TCG leaves it 0
                data = stream[offset : offset + length].hex()
                assert row["fields"][name]["data"] == data, name


REGISTERS = re.compile(r"^(?:Thread |(?:[xyz]mm|k|st)\d|mxcsr|fctrl|fstat|ftag|pkru)")


def gdb_registers(core: Path) -> list[str]:
    """Return the lines in which gdb shows the extended state of a core's threads."""
    command = ["gdb", "-nx", "-q", "-batch", "-ex", "thread apply all info all-registers"]
    done = subprocess.run([*command, "--core", core], capture_output=True, text=True, timeout=60)
    found = [line for line in done.stdout.splitlines() if REGISTERS.match(line)]
    return [re.sub(r" \(.*?\)", "", line) for line in found]


def value_of(lines: list[str], name: str) -> list[str]:
    return [line.split(None, 1)[1] for line in lines if line.split()[0] == name]


def core_for_gdb(data: Path, tmp_path: Path) -> Path:
    """Return a core of three threads in Intel's layout, which every gdb reads."""
    kernels = tmp_path / "kernels"
    packed = (data / "elf" / "kernel618-regs64-3thr.core.xz").read_bytes()
    kernels.write_bytes(lzma.decompress(packed))
    core = tmp_path / "core"
    words = ["convert", str(kernels), "--to", "intel", "--as", "elfcore", "-o", str(core)]
    assert main(words) == 0
    return core


@needs_gdb
def test_gdb_shows_a_converted_core_as_the_original(data, tmp_path):
    core = core_for_gdb(data, tmp_path)
    shown = gdb_registers(core)
    assert len(value_of(shown, "mxcsr")) == 3
    assert any("0x1fa0" in value for value in value_of(shown, "mxcsr"))
    assert any("0xa50002000300f00d" in value for value in value_of(shown, "zmm0"))
    assert any("0xa50005030000f00d" in value for value in value_of(shown, "k3"))
    steps = [("amd-zen4", "there"), ("intel", "back")]
    path = core
    for layout, name in steps:
        out = tmp_path / name
        assert main(["convert", str(path), "--to", layout, "--as", "elfcore", "-o", str(out)]) == 0
        path = out
    assert gdb_registers(path) == shown
    assert path.read_bytes() == core.read_bytes()
    original = gdb_registers(tmp_path / "kernels")  # of AMD's layout gdb 13 shows x87 and SSE
    for name in ("mxcsr", "fctrl", "fstat", "st0", "st7"):
        assert value_of(original, name) == value_of(shown, name)


@needs_gdb
def test_gdb_shows_a_fixed_core_without_what_was_dropped(data, tmp_path):
    core = core_for_gdb(data, tmp_path)
    before = gdb_registers(core)
    dropped = [word for name in ("hi16_zmm",) for word in ("--drop", name)]
    words = ["fix", str(core), "--host", "intel-sapphirerapids", "--in-place", "--backup"]
    assert main([*words, *dropped, "--even-if-live"]) == 0
    after = gdb_registers(core)
    high = re.compile(r"[xyz]mm(1[6-9]|2\d|3[01])\b")
    assert [line for line in after if not high.match(line)] == [
        line for line in before if not high.match(line)
    ]
    assert not any("a5000710" in line for line in after if high.match(line))
    assert any("a5000710" in line for line in before if high.match(line))
    assert gdb_registers(Path(str(core) + ".orig")) == before


def test_a_core_that_gdb_13_wrote_on_amd_is_refused(data, tmp_path, capsys):
    core = tmp_path / "core"
    core.write_bytes(lzma.decompress((data / "elf" / "gdb13-regs64-3thr.core.xz").read_bytes()))
    out = str(tmp_path / "out")
    assert main(["convert", str(core), "--to", "intel", "--as", "raw", "-o", out]) == 2
    assert "opmask+zmm_hi256+hi16_zmm lies is not known" in capsys.readouterr().err
    assert main(["fix", str(core), "--host", "intel-haswell", "-o", out]) != 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["core"]


def filled(mask: int, layout) -> np.ndarray:
    """Return an area of 4096 bytes with values in every component of `mask`."""
    image = np.zeros(4096, np.uint8)
    random = np.random.default_rng(mask)
    image[:5] = 0x7F, 0x03, 0, 0x18, 0xFF
    image[24:26] = 0xA0, 0x1F
    for i in range(8):
        image[32 + 16 * i : 42 + 16 * i] = random.integers(0, 256, 10)
    image[160:416] = random.integers(0, 256, 256)
    image[512:520] = np.frombuffer(mask.to_bytes(8, "little"), "u1")
    for slot in layout.slots:
        if mask >> slot.nr & 1 and slot.offset:
            size = 4 if slot.nr == PKRU_NR else slot.size  # KVM keeps 4 bytes of PKRU
            image[slot.offset : slot.offset + size] = random.integers(0, 256, size)
    return image


def guest_cpuid(mask: int) -> Cpuid:
    """Return the CPUID of a guest that may have the components in `mask`."""
    return Cpuid((Entry(0xD, 0, 1, mask, 0, 0, 0),))


@needs_kvm
def test_kvm_takes_a_fixed_area_and_gives_it_back():
    from xfast.kvm.live import confirm

    host = xfast.resolve("this")
    have = host.kvm_xcr0 & ~XFEATURE_MASK_XTILE
    lacks = (BY_NAME[name] for name in ("pkru", "bndregs", "opmask"))
    component = next(one for one in lacks if not host.kvm_xcr0 & one.bit)
    lacking, own = component.bit, host.layout.restricted(have)
    last = Slot(component.nr, component.size, own.standard_size())
    layout = Layout(tuple(sorted((*own.slots, last))))
    image = filled(have, layout)
    image[512:520] = np.frombuffer((have | lacking).to_bytes(8, "little"), "u1")
    snapshot = Snapshot("area", "raw", "vm", "kvm", [Vcpu(0, image, layout, "given", xcr0=have)])
    refused = confirm(image, layout, guest_cpuid(have))
    assert refused.errno == errno.EINVAL
    plan = plan_fix(snapshot, host)
    plan.require_restorable()
    taken = confirm(plan.areas[0], host.layout, guest_cpuid(have))
    assert taken.accepted
    assert taken.changed == 0
    assert taken.reported == have
    batch = xfast.fix_areas(image[np.newaxis], layout, host)
    assert np.array_equal(batch.areas[0], plan.areas[0])


@needs_kvm
def test_kvm_reads_an_area_of_another_vendor_where_fix_put_it():
    from xfast.kvm.live import confirm

    host = xfast.resolve("this")
    have = host.kvm_xcr0 & ~XFEATURE_MASK_XTILE
    other = next((p for p in PRESETS.values() if host.layout.moved(p, have & p.user_mask)), None)
    if other is None:
        pytest.skip(f"no known CPU has a component of XCR0 {have:#x} at another place")
    have &= other.user_mask | XFEATURE_MASK_FPSSE
    image = filled(have, other)
    given = confirm(image, host.layout, guest_cpuid(have))  # accepted, and read at the wrong places
    assert given.accepted
    plan = plan_fix(
        Snapshot("area", "raw", "vm", "kvm", [Vcpu(0, image, other, "given", xcr0=have)]), host
    )
    assert {change.rule for change in plan.changes} == {"LAYOUT"}
    taken = confirm(plan.areas[0], host.layout, guest_cpuid(have))
    assert taken.accepted
    assert taken.changed == 0
    assert engine.diff(image, plan.areas[0], other, host.layout) == 0


@needs_crit
def test_crit_decodes_a_fixed_image(data, tmp_path):
    folder = tmp_path / "dump"
    shutil.copytree(data / "criu" / "criu42-regs64s-3thr", folder)

    def decoded(path: Path):
        command = ["crit", "decode", "-i", path]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return json.loads(done.stdout)

    before = {path.name: decoded(path) for path in sorted(folder.glob("core-*.img"))}
    (snapshot,) = xfast.read(folder)
    host = xfast.resolve("amd-genoa")
    names = ["opmask", "zmm_hi256", "hi16_zmm"]
    plan_fix(snapshot, host, drop=names, even_if_live=True).apply(in_place=True)
    dropped = {"opmask_reg", "zmm_upper", "hi16_zmm"}
    for name, old in before.items():
        new = decoded(folder / name)
        was = old["entries"][0]["thread_info"]["fpregs"]
        now = new["entries"][0]["thread_info"]["fpregs"]
        assert now["xsave"]["xstate_bv"] == was["xsave"]["xstate_bv"] & 7
        for field in dropped & now["xsave"].keys():
            if was["xsave"]["xstate_bv"] & XFEATURE_MASK_AVX512:
                assert {int(str(value), 0) for value in now["xsave"][field]} == {0}
        for side in (was, now):
            for field in dropped | {"xstate_bv"}:
                side["xsave"].pop(field, None)
        assert new == old


def test_a_plan_without_a_way_is_not_brought_to_a_file(tmp_path):
    """The judges above are asked about results only; this is what keeps the others away."""
    image = filled(0xE7, PRESETS["intel"])
    vcpu = Vcpu(0, image, PRESETS["intel"], "given", xcr0=0xE7)
    plan = plan_fix(
        Snapshot("area", "raw", "vm", "kvm", [vcpu]), xfast.resolve("intel-haswell@6.6")
    )
    with pytest.raises(PolicyError):
        plan.apply(str(tmp_path / "out"))
