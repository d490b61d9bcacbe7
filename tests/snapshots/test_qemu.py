"""QEMU streams in every container: values, costs, edits."""

import gzip
import io
import json
import lzma
import re
import shutil
import struct
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qemu_files import description_at, qcow2_image, registers_of, undescribed

from xfast.errors import FormatError, PolicyError
from xfast.snapshots.bytes.libvirt import Header
from xfast.snapshots.bytes.source import Source
from xfast.snapshots.model import Splice
from xfast.snapshots.qemu import plans
from xfast.snapshots.qemu import reader as qemu
from xfast.snapshots.qemu.domain import domain
from xfast.xsave import area as engine
from xfast.xsave.layout import preset

INTEL = preset("intel")
KVM_STREAMS = ("q72-kvm-bv7-xcr7-smp1", "q72-kvm-pkru-leak-bv207")
RULE_STREAMS = {
    "q11-max-smp4-q35.qemustate": 0x21F,
    "q72-max-smp2-q35.qemustate": 0x21F,
    "q72-haswell-smp2-pc.qemustate": 0x7,
    "q72-nehalem-smp1-pc.qemustate": 0x3,
    "xf-max-smp2-raw-trimmed.save": 0x21F,
    "xf-max-smp2-gzip-trimmed.save": 0x21F,
    "xf-max-smp2-xz-trimmed.save": 0x21F,
    "xf2-haswell-pku-smp1-raw-trimmed.save": 0x207,
}


@pytest.fixture(scope="session")
def streams(data, tmp_path_factory):
    """Return a folder with the project's streams, expanded."""
    folder = tmp_path_factory.mktemp("qemu")
    for path in (data / "qemu").iterdir():
        if path.suffix == ".xz":
            (folder / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def read(path):
    with Source.open(path) as source:
        assert qemu.sniff(source)
        (snapshot,) = qemu.read(source)
        return snapshot


def read_bytes(folder, data):
    path = folder / "stream"
    path.write_bytes(data)
    return read(path)


def u(area, fmt, offset):
    return struct.unpack_from("<" + fmt, area.tobytes(), offset)


def rule(c, comp, reg, q):
    return 0xA5 << 56 | c << 48 | comp << 40 | reg << 32 | q << 24 | 0x00F00D


def assert_rule(vcpu, mask):
    """Compare every register with the rule that made the samples."""
    c, area = vcpu.index, vcpu.area
    assert engine.headers(area)[:3] == (mask, 0, 0x1FA0)
    assert u(area, "HHB", 0) == (0x37F, 0x1800, 0xFF)
    for i in range(8):
        assert u(area, "QH", 32 + 16 * i) == (rule(c, 0, i, 0), 0x3FFF + i + c)
    for i in range(16):
        assert u(area, "QQ", 160 + 16 * i) == (rule(c, 1, i, 0), rule(c, 1, i, 1))
        if mask >> 2 & 1:
            assert u(area, "QQ", 576 + 16 * i) == (rule(c, 2, i, 2), rule(c, 2, i, 3))
    if mask >> 3 & 1:
        assert u(area, "8Q", 960) == tuple(rule(c, 3, j, 0) for j in range(8))
        assert u(area, "QQ", 1024) == (3, 0x770000000000 + c)
    if mask >> 9 & 1:
        assert u(area, "I", 2688) == (0x12345670 + 4 * (c & 3),)


@pytest.mark.parametrize("name", RULE_STREAMS)
def test_every_register_of_every_stream(streams, name):
    snapshot = read(streams / name)
    assert snapshot.format == "qemu"
    assert snapshot.kind == "vm"
    assert snapshot.producer == "qemu-tcg"
    count = int(re.search(r"smp(\d)", name)[1])
    assert [vcpu.index for vcpu in snapshot.vcpus] == list(range(count))
    for vcpu in snapshot.vcpus:
        assert_rule(vcpu, RULE_STREAMS[name])
        assert vcpu.xcr0 | 3 == RULE_STREAMS[name]
        assert vcpu.portable
        assert (vcpu.layout, vcpu.layout_source) == (INTEL, "format")
        assert vcpu.pkru_enabled == bool(RULE_STREAMS[name] & 0x200)


def test_kvm_streams_keep_the_leaked_bit_in_sight(streams):
    for name, mask in zip(KVM_STREAMS, (0x7, 0x207), strict=True):
        snapshot = read(streams / f"{name}.qemustate")
        assert snapshot.producer == "qemu-kvm"
        assert snapshot.facts["producer_basis"] == "a kvmclock device"
        (vcpu,) = snapshot.vcpus
        assert vcpu.xcr0 == 7
        assert vcpu.facts["stream_xstate_bv"] == mask
        assert engine.headers(vcpu.area)[:3] == (mask, 0, 0x1FA0)
        assert u(vcpu.area, "QQ", 160) == (0x1111222233334444, 0x5555666677778888)
        assert u(vcpu.area, "QQ", 576) == (0x9999AAAABBBBCCCC, 0)
        assert engine.xinuse(vcpu.area, INTEL) & 0x200 == 0
        assert vcpu.pkru_enabled is False


def test_avx512_subsections_are_components_5_to_7(streams):
    (vcpu,) = read(streams / "q72-avx512-reinjected-S.qemustate").vcpus
    assert engine.headers(vcpu.area).xstate_bv == vcpu.xcr0 == 0x2E7
    assert vcpu.xss == 0x1800
    assert u(vcpu.area, "8Q", 1088) == tuple(rule(0, 5, k, 0) for k in range(8))
    for i in range(16):
        assert u(vcpu.area, "4Q", 1152 + 32 * i) == tuple(rule(0, 6, i, q) for q in range(4, 8))
        assert u(vcpu.area, "8Q", 1664 + 64 * i) == tuple(rule(0, 7, 16 + i, q) for q in range(8))


@pytest.mark.parametrize(
    "name",
    [
        "kvm/q72-kvm-reset-smp1.qemustate",
        "kvm/q11-kvm-reset-smp1.qemustate",
        "q72-savevm-tiny-S-smp2.qcow2",
        "q11-mappedram-tiny-S-smp2.qemustate.zst",
    ],
)
def test_vcpus_after_reset(shared, name):
    snapshot = read(shared / "samples/qemu" / name)
    assert len(snapshot.vcpus) == int(re.search(r"smp(\d)", name)[1])
    for vcpu in snapshot.vcpus:
        assert vcpu.xcr0 == 1
        assert u(vcpu.area, "HHB", 0) == (0x37F, 0, 0)
        assert u(vcpu.area, "I", 24) == (0x1F80,)
        assert not vcpu.area[32:416].any()
        assert not vcpu.area[576:].any()


def test_an_i386_stream_takes_edits_where_it_has_registers(shared, tmp_path):
    path = shared / "samples/qemu/q72-i386-max-bios-pc.qemustate"
    (vcpu,) = read(path).vcpus
    assert vcpu.mode == 32
    area = vcpu.area.copy()
    area[160 + 16 * 7 : 160 + 16 * 8] = 0x5A
    edits, _, after = edited(path, {0: area}, tmp_path)
    assert [edit.field for edit in edits] == ["xmm"]
    assert np.array_equal(after.vcpus[0].area, area)
    area[160 + 16 * 8] = 1
    with pytest.raises(PolicyError, match="no place for sse"):
        edited(path, {0: area}, tmp_path)


def test_libvirt_tells_the_guests_cpu(streams):
    snapshot = read(streams / "xf2-haswell-pku-smp1-raw-trimmed.save")
    assert snapshot.container == ("libvirt-save",)
    assert snapshot.facts["domain"] == "xf2"
    assert snapshot.facts["cpu_model"] == "Haswell-noTSX"
    assert snapshot.vcpus[0].guest_mask == 0x207
    snapshot = read(streams / "xf-max-smp2-gzip-trimmed.save")
    assert snapshot.container == ("libvirt-save", "gzip")
    assert snapshot.vcpus[0].guest_mask is None


@pytest.mark.parametrize(
    ("model", "features", "mask"),
    [
        ("Haswell-noTSX", "+pku", 0x207),
        ("Nehalem", "", 3),
        ("qemu64", "+xsave +avx", 7),
        ("Skylake-Server-IBRS", "-mpx", 0x2E7),
        ("EPYC-Rome-v4", "", 7),
        ("EPYC-Milan", "-pku", 7),
        ("SapphireRapids", "", 0x602E7),
        ("Haswell", "-xsave", 3),
        ("FutureLake", "+avx", None),
    ],
)
def test_components_of_cpu_models(model, features, mask):
    policies = {"+": "require", "-": "disable"}
    words = "".join(
        f"<feature policy='{policies[word[0]]}' name='{word[1:]}'/>" for word in features.split()
    )
    cpu = f"<cpu mode='custom'><model> {model}\n</model>{words}</cpu>"
    head = Header("", 0, f"<domain type='kvm'>{cpu}</domain>".encode(), b"")
    assert domain("image", head) == ("", True, model, mask, None)
    other = b"<domain type='kvm'><cpu mode='host-model'/></domain>"
    head = Header("", 0, other, f"<cookie>{cpu}</cookie>".encode())
    assert domain("image", head) == ("", True, model, mask, None)


def test_samples_hold_what_info_registers_said(shared):
    compared = 0
    for path in sorted((shared / "samples/qemu").glob("*.json")):
        stream = next(path.parent.glob(path.stem + ".qemustate*"))
        truth = list(registers_of(json.loads(path.read_text())["regs"]))
        vcpus = read(stream).vcpus
        assert len(vcpus) == len(truth)
        for vcpu, registers in zip(vcpus, truth, strict=True):
            area = vcpu.area
            assert u(area, "HHB", 0) == tuple(registers[n][0] for n in ("FCW", "FSW", "FTW"))
            assert u(area, "I", 24) == tuple(registers["MXCSR"])
            top = registers["FSW"][0] >> 11 & 7
            for i in range(8):
                assert list(u(area, "QH", 32 + 16 * i)) == registers[f"FPR{(i + top) & 7}"]
            for i in range(16 if vcpu.mode == 64 else 8):
                words = [*u(area, "QQ", 576 + 16 * i)[::-1], *u(area, "QQ", 160 + 16 * i)[::-1]]
                name = f"YMM{i:02}" if f"YMM{i:02}" in registers else f"XMM{i:02}"
                assert words[-2:] == registers[name][-2:]
                assert words == registers[name] or len(registers[name]) == 2
                compared += 1
    assert compared >= 200


def test_every_sample_can_be_read_and_put_back(shared, tmp_path):
    paths = [
        path
        for pattern in ("*.qemustate*", "*.qcow2", "kvm/*", "libvirt/*", "trimmed/*")
        for path in (shared / "samples/qemu").glob(pattern)
        if "fullram" not in path.name
    ]
    assert len(paths) >= 25
    for path in paths:
        with Source.open(path) as source, open(tmp_path / "out", "wb") as out:
            for snapshot in qemu.read(source):
                areas = {i: vcpu.area.copy() for i, vcpu in enumerate(snapshot.vcpus)}
                assert qemu.splices(source, snapshot, areas) == []
            source.rewrite([], out)
        assert (tmp_path / "out").read_bytes() == path.read_bytes()


def cost(path):
    plans.forget()
    with Source.open(path) as source:
        before = source.bytes_read
        qemu.read(source)
        return source.size, source.bytes_read - before


def test_75_megabytes_cost_what_300_kilobytes_cost(shared):
    folder = shared / "samples/qemu"
    small, few = cost(folder / "q72-max-smp2-q35.qemustate")
    large, many = cost(folder / "q72-max-smp2-pc-fullram.qemustate.zst")
    assert large > 200 * small
    assert many < 2 << 20
    assert many < 2 * few


def test_16_gigabytes_cost_what_90_kilobytes_cost(streams, tmp_path):
    small = streams / "q72-max-smp2-q35.qemustate"
    data = small.read_bytes()
    with open(tmp_path / "large", "wb") as file:
        file.write(data[:4096])
        file.seek(16 << 30)
        file.write(data)
    size, count = cost(tmp_path / "large")
    assert size > 16 << 30
    assert count < 2 * cost(small)[1] < 2 << 20
    for vcpu in read(tmp_path / "large").vcpus:
        assert_rule(vcpu, 0x21F)


def test_a_stream_behind_other_bytes(streams, tmp_path):
    data = (streams / "q72-max-smp2-q35.qemustate").read_bytes()
    snapshot = read_bytes(tmp_path, bytes(70_000) + data)
    assert_rule(snapshot.vcpus[1], 0x21F)
    assert snapshot.facts["machine"] == "pc-q35-7.2"
    assert snapshot.facts["capabilities"] == ("x-ignore-shared",)


def test_a_stream_filled_up_with_zeros(streams, tmp_path):
    data = (streams / "q72-max-smp2-q35.qemustate").read_bytes()
    assert_rule(read_bytes(tmp_path, data + bytes(3000)).vcpus[1], 0x21F)


def test_a_length_with_a_brace_in_it_does_not_mislead(streams, tmp_path):
    data = (streams / "q72-max-smp2-q35.qemustate").read_bytes()
    start = description_at(data)
    text = data[start:]
    need = (len(text) & ~0xFF) + 0x17B - len(text)
    text = text[:1] + b'"' + b"x" * (need - 5) + b'":0,' + text[1:]
    data = data[: start - 4] + struct.pack(">I", len(text)) + text
    assert data[start - 1 : start + 1] == b"{{"
    snapshot = read_bytes(tmp_path, data)
    assert snapshot.facts["description"] == "whole"
    assert_rule(snapshot.vcpus[1], 0x21F)


@pytest.mark.parametrize(
    "name", [n for n in RULE_STREAMS if n.endswith("qemustate")] + ["q72-avx512-reinjected-S"]
)
def test_streams_without_description(streams, tmp_path, name):
    path = (streams / name).with_suffix(".qemustate")
    expected = read(path)
    snapshot = read_bytes(tmp_path, undescribed(path.read_bytes()))
    assert snapshot.producer == expected.producer
    assert snapshot.facts["description"] == "none"
    for vcpu, other in zip(snapshot.vcpus, expected.vcpus, strict=True):
        assert np.array_equal(vcpu.area, other.area)
        assert vcpu.facts == other.facts
        assert vcpu.where == other.where


def test_kvm_streams_without_description(streams, tmp_path):
    data = (streams / f"{KVM_STREAMS[1]}.qemustate").read_bytes()
    snapshot = read_bytes(tmp_path, undescribed(data))
    assert snapshot.facts["producer_basis"] == "a kvmclock device"
    assert engine.headers(snapshot.vcpus[0].area).xstate_bv == 0x207


def test_streams_of_machines_without_footers(streams, tmp_path):
    data = undescribed((streams / "q72-max-smp2-q35.qemustate").read_bytes())
    for at in [m.start() for m in re.finditer(rb"\x04.{4}\x03cpu.{4}\0\0\0\x0c", data, re.S)][::-1]:
        footer = data.index(b"\x7e" + data[at + 1 : at + 5], at)
        data = data[:footer] + data[footer + 5 :]
    snapshot = read_bytes(tmp_path, data)
    for vcpu in snapshot.vcpus:
        assert_rule(vcpu, 0x21F)


def test_old_vcpus_in_guest_memory_are_not_read(streams, tmp_path):
    data = undescribed((streams / "q72-max-smp2-q35.qemustate").read_bytes())
    at = re.search(rb"\x04.{4}\x03cpu\0{4}\0\0\0\x0c", data, re.DOTALL)
    end = data.index(b"\x7e" + at[0][1:5], at.start()) + 5
    stale = bytearray(data[at.start() : end])
    stale[40:2000:8] = b"x" * len(stale[40:2000:8])
    for instance in (0, 1, 5):
        stale[9:13] = struct.pack(">I", instance)
        data = data[:600] + bytes(stale) + data[600:]
    snapshot = read_bytes(tmp_path, data)
    assert len(snapshot.vcpus) == 2
    for vcpu in snapshot.vcpus:
        assert_rule(vcpu, 0x21F)


def test_a_vcpu_with_unknown_parts_is_not_left_out_in_silence(streams, tmp_path):
    data = undescribed((streams / "q72-max-smp2-q35.qemustate").read_bytes())
    at = data.rindex(b"\x08cpu/pkru")
    with pytest.raises(FormatError, match="got a cpu section with parts that are not known"):
        read_bytes(tmp_path, data[:at] + b"\x08cpu/pkrX" + data[at + 9 :])


@pytest.mark.parametrize(("cluster_bits", "extra"), [(9, 16), (9, 0), (16, 16), (12, 8)])
def test_snapshots_inside_a_qcow2_image(streams, tmp_path, cluster_bits, extra):
    states = [
        (name, (streams / f"{name}.qemustate").read_bytes())
        for name in ("q72-max-smp2-q35", "q72-haswell-smp2-pc")
    ]
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2_image(states, cluster_bits, extra=extra))
    with Source.open(path) as source:
        first, second = qemu.read(source)
        assert first.container == ("qcow2",)
        assert second.facts["internal_snapshot"] == ("1", "q72-haswell-smp2-pc")
        assert second.name == f"{path}#1/q72-haswell-smp2-pc"
        for vcpu in first.vcpus:
            assert_rule(vcpu, 0x21F)
        for vcpu in second.vcpus:
            assert_rule(vcpu, 0x7)
        area = second.vcpus[1].area.copy()
        area[160 : 160 + 256] ^= 0xFF
        area[576:832] ^= 0xFF
        with open(path, "r+b") as file:
            source.patch(qemu.splices(source, second, {1: area}), file.fileno())
    with Source.open(path) as source:
        third, fourth = qemu.read(source)
    assert np.array_equal(fourth.vcpus[1].area, area)
    assert np.array_equal(fourth.vcpus[0].area, second.vcpus[0].area)
    assert np.array_equal(third.vcpus[1].area, first.vcpus[1].area)


def edited(path, areas, folder):
    """Return a file with new areas in it, and what it reads to."""
    with Source.open(path) as source, open(folder / "edited", "wb") as out:
        edits = qemu.splices(source, *qemu.read(source), areas)
        source.rewrite(edits, out)
    return edits, (folder / "edited").read_bytes(), read(folder / "edited")


@pytest.mark.parametrize("number", [0, 2, 4, 5, 6])
def test_every_libvirt_compression(streams, tmp_path, number):
    raw = (streams / "xf-max-smp2-raw-trimmed.save").read_bytes()
    body = 92 + struct.unpack_from("<I", raw, 20)[0]
    program = {2: ["bzip2", "-c"], 4: ["lzop", "-c"], 5: ["zstd", "-q", "-c"]}.get(number)
    packed = raw[body:]
    if program:
        if shutil.which(program[0]) is None:
            pytest.skip(f"{program[0]} is not here")
        packed = subprocess.run(program, input=packed, stdout=-1, check=True).stdout
    path = tmp_path / "image"
    path.write_bytes(raw[:28] + struct.pack("<I", number) + raw[32:body] + packed)
    before = read(path)
    assert before.container == ("libvirt-save", *(program or [])[:1])
    for vcpu in before.vcpus:
        assert_rule(vcpu, 0x21F)
    area = before.vcpus[0].area.copy()
    area[160:176] = 7
    _, data, after = edited(path, {0: area}, tmp_path)
    assert data[:body] == path.read_bytes()[:body]
    assert np.array_equal(after.vcpus[0].area, area)
    assert np.array_equal(after.vcpus[1].area, before.vcpus[1].area)


def test_dropping_the_leaked_bit_changes_one_byte(streams, tmp_path):
    path = streams / f"{KVM_STREAMS[1]}.qemustate"
    (vcpu,) = read(path).vcpus
    area = vcpu.area.copy()
    engine.keep(area, INTEL, 7)
    edits, data, snapshot = edited(path, {0: area}, tmp_path)
    offset, length = vcpu.where["xstate_bv"]
    assert edits == [Splice(offset, struct.pack(">Q", 0x207), struct.pack(">Q", 7), "xstate_bv")]
    old = path.read_bytes()
    assert [i for i in range(len(old)) if old[i] != data[i]] == [offset + length - 2]
    assert data == (streams / f"{KVM_STREAMS[0]}.qemustate").read_bytes()
    assert np.array_equal(snapshot.vcpus[0].area, area[:832])


@pytest.mark.parametrize("scrub", [True, False])
@pytest.mark.parametrize("codec", ["", "gzip", "xz"])
def test_dropping_a_component_zeroes_it_in_every_container(streams, tmp_path, codec, scrub):
    path = streams / f"xf-max-smp2-{codec or 'raw'}-trimmed.save"
    before = read(path)
    area = before.vcpus[1].area.copy()
    engine.keep(area, INTEL, 7, scrub=scrub)
    edits, data, after = edited(path, {1: area}, tmp_path)
    assert {edit.field for edit in edits} == {"cpu/pkru", "cpu/mpx"}
    assert not any(any(edit.new) for edit in edits)
    assert np.array_equal(after.vcpus[0].area, before.vcpus[0].area)
    assert engine.headers(after.vcpus[1].area).xstate_bv == 7
    assert not engine.diff(after.vcpus[1].area, area, INTEL)
    assert after.container == before.container
    header = 92 + struct.unpack_from("<I", data, 20)[0]
    assert data[:header] == path.read_bytes()[:header]
    if codec == "gzip":
        assert gzip.GzipFile(fileobj=io.BytesIO(data[header:])).read(4) == b"QEVM"
    with Source.open(tmp_path / "edited") as source:
        assert qemu.splices(source, after, {1: after.vcpus[1].area}) == []


def test_what_the_stream_has_no_place_for_is_refused(streams):
    path = streams / f"{KVM_STREAMS[1]}.qemustate"
    with Source.open(path) as source:
        (snapshot,) = qemu.read(source)
        area = snapshot.vcpus[0].area.copy()
        area[2688] = 4
        with pytest.raises(PolicyError, match="vCPU 0: the stream has no place for pkru"):
            qemu.splices(source, snapshot, {0: area})
        with pytest.raises(ValueError, match=r"expected shape \(2696,\), got \(4096,\)"):
            qemu.splices(source, snapshot, {0: np.zeros(4096, np.uint8)})


@pytest.mark.parametrize(
    "name", ["q72-avx512-reinjected-S", "q72-max-smp2-q35", "q72-haswell-smp2-pc"]
)
@given(seed=st.integers(0, 1 << 32), drop=st.integers(0, 0x3FF))
def test_any_values_go_in_and_come_out(tmp_path_factory, streams, name, seed, drop):
    path = streams / f"{name}.qemustate"
    with Source.open(path) as source:
        (snapshot,) = qemu.read(source)
        vcpu = snapshot.vcpus[0]
        area = vcpu.area.copy()
        mask = engine.headers(area).xstate_bv
        random = np.random.default_rng(seed).integers(0, 256, area.size).astype(np.uint8)
        for start, end in ((0, 5), (24, 28), (160, 416), (576, 1040), (1088, area.size)):
            area[start:end] = random[start:end]
        for i in range(8):
            area[32 + 16 * i :][:10] = random[32 + 16 * i :][:10]
        mask &= ~drop
        area[512:520] = np.frombuffer(struct.pack("<Q", mask), np.uint8)
        edits = qemu.splices(source, snapshot, {0: area})
        out = tmp_path_factory.getbasetemp() / "out"
        with open(out, "wb") as file:
            source.rewrite(edits, file)
    result = read(out).vcpus[0].area
    assert not engine.diff(result, area, INTEL) & INTEL.user_mask
    if snapshot.producer == "qemu-kvm" and mask:
        assert engine.headers(result).xstate_bv == mask
