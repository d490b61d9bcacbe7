"""Areas there and back: layouts, formats, wrappings; every register stays what it was."""

import json
import lzma
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xfast
from xfast.cli.main import main
from xfast.errors import LayoutError, PolicyError, XfastError
from xfast.repair import convert
from xfast.snapshots import walk
from xfast.snapshots.difference import compare
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.xsave import area as engine
from xfast.xsave.features import bits
from xfast.xsave.layout import PRESETS

INTEL, GENOA, ROME, MILAN = (PRESETS[n] for n in ("intel", "amd-zen4", "amd-zen2", "amd-zen3"))
ZEN4 = "raw/kvm618-guestxcr0_e7-bve7.xsave"


def area(mask, layout, seed=1, size=4096):
    """Return an area with random bytes in every component of `mask`."""
    random = np.random.default_rng(seed)
    image = np.zeros(size, np.uint8)
    image[0:2] = 0x7F, 0x03
    image[24:26] = 0xA0, 0x1F
    for nr in bits(mask):
        if nr == 0:
            image[32:42] = random.integers(0, 256, 10)
        elif nr == 1:
            image[160:416] = random.integers(0, 256, 256)
        else:
            slot = layout.slot(nr)
            known = 8 if nr == 9 else slot.size
            image[slot.offset : slot.offset + known] = random.integers(0, 256, known)
    image[512:520] = np.frombuffer(mask.to_bytes(8, "little"), "u1")
    return image


def snapshot(*images, layout, **facts):
    facts = {"xcr0": None, **facts}
    vcpus = [Vcpu(i, image, layout, "given", **facts) for i, image in enumerate(images)]
    return Snapshot("blob", "raw", "vm", "kvm", vcpus)


PAIRS = [(ROME, MILAN, 0x207), (ROME, INTEL, 0x207), (INTEL, GENOA, 0x2E7), (GENOA, MILAN, 0x207)]


@settings(max_examples=60)
@given(st.sampled_from(PAIRS), st.integers(0, 1 << 20), st.integers(0, 0x2E7), st.booleans())
def test_there_and_back(pair, seed, mask, compacted):
    one, two, most = pair
    image = area(mask & most, one, seed)
    if compacted and mask & most & 6 == 4:
        with pytest.raises(LayoutError, match="MXCSR"):
            convert.areas_in(snapshot(image, layout=one), two, compacted=True)
        return
    there = convert.areas_in(snapshot(image, layout=one), two, compacted=compacted)
    assert engine.diff(there, image, two, one).tolist() == [0]
    back = convert.areas_in(snapshot(there[0], layout=two), one)
    assert engine.diff(back, image, one).tolist() == [0]
    again = convert.areas_in(snapshot(back[0], layout=one), two, compacted=compacted)
    assert np.array_equal(again, there)


@pytest.mark.parametrize("to", [None, *PRESETS])
def test_no_area_is_read_back_in_another_layout(data, tmp_path, to):
    out = tmp_path / "out.npy"
    target = to and PRESETS[to]
    known = tried = 0
    for path in walk(data / part for part in ("criu", "elf", "qemu", "raw", "vmm")):
        try:
            (found,) = xfast.read(path)
            out.write_bytes(convert.as_npy(convert.areas_in(found, target)))
        except XfastError:
            continue
        (there,) = xfast.read(out)
        for vcpu, back in zip(found.vcpus, there.vcpus, strict=True):
            tried += 1
            known += back.layout is not None
            present = engine.headers(back.area).xstate_bv
            if back.layout and "pkru is 0 wherever" not in back.layout_note:
                assert not back.layout.moved(target or vcpu.layout, present), path
    assert known >= tried // 2 > 2


def test_mxcsr_mask_tells_the_layouts_vendor():
    image = area(0xE7, GENOA)
    image[28:32] = 0xFF, 0xFF, 2, 0
    blob = snapshot(image, layout=GENOA)
    assert convert.areas_in(blob)[0][28:32].tolist() == [0xFF, 0xFF, 2, 0]
    (row,) = convert.areas_in(blob, INTEL)
    assert row[28:32].tolist() == [0xFF, 0xFF, 0, 0]
    row[28:32] = 0xFF, 0xFF, 2, 0  # registers of an AMD machine in Intel's places, as CRIU's are
    (row,) = convert.areas_in(snapshot(row, layout=INTEL))
    assert row[28:32].tolist() == [0xFF, 0xFF, 0, 0]
    image[26] = 2  # MXCSR.MM, which Intel's CPUs lack
    assert not convert.areas_in(blob, INTEL)[0][28:32].any()


def test_a_component_without_a_place_is_named():
    with pytest.raises(LayoutError, match="components 3"):
        convert.areas_in(snapshot(area(0x1F, INTEL), layout=INTEL), GENOA)


def test_an_unknown_layout_is_not_guessed():
    blob = snapshot(area(0x207, MILAN), layout=None, layout_note="three layouts fit")
    with pytest.raises(PolicyError, match="three layouts fit"):
        convert.areas_in(blob, INTEL)
    partly = snapshot(area(0x207, MILAN), layout=MILAN.restricted(7), layout_note="two fit")
    with pytest.raises(PolicyError, match=r"where pkru lies is not known \(two fit\)"):
        convert.areas_in(partly, INTEL)


def test_rows_are_as_long_as_the_longest_needs():
    images = area(0x3, INTEL, size=576), area(0x600E7, INTEL, size=11008)
    assert convert.areas_in(snapshot(*images, layout=INTEL)).shape == (2, 11008)
    packed = convert.areas_in(snapshot(*images, layout=INTEL), compacted=True)
    assert engine.headers(packed).xcomp_bv.tolist() == [1 << 63 | 0x600E7] * 2


def test_a_real_area_comes_back_to_the_byte(data, tmp_path):
    there, back = tmp_path / "there.xsave", tmp_path / "back.xsave"
    words = ["convert", str(data / ZEN4)]
    assert main([*words, "--to", "intel", "-o", str(there)]) == 0
    (found,) = xfast.read(there)
    assert found.vcpus[0].layout.name == "intel"
    assert found.vcpus[0].layout_source == "inferred"
    assert main(["convert", str(there), "--to", "amd-zen4", "-o", str(back)]) == 0
    assert back.read_bytes() == (data / ZEN4).read_bytes()
    assert main(["diff", str(there), str(back)]) == 0


@pytest.mark.parametrize("wrapping", ["raw", "npy", "elfcore"])
@pytest.mark.parametrize(
    "name",
    [
        "qemu/q72-kvm-pkru-leak-bv207.qemustate.xz",
        "qemu/q72-max-smp2-q35.qemustate.xz",
        "vmm/fc-bincode2-v8.vmstate",
        "vmm/ch-state.json",
        "criu/criu42-regs64s-3thr",
        "elf/kernel618-regs64-3thr.core.xz",
    ],
)
def test_every_format_in_every_wrapping(data, tmp_path, name, wrapping):
    source = data / name
    (found,) = xfast.read(source)
    layout = found.vcpus[0].layout
    out = tmp_path / f"out.{'npy' if wrapping == 'npy' else 'xsave'}"
    words = ["convert", str(source), "--as", wrapping, "-o", str(out)]
    if wrapping == "raw":
        found_size = len(convert.areas_in(found)[0])
    assert main(words) == 0
    size = found_size if wrapping == "raw" else None
    given = None if wrapping == "elfcore" else layout
    (there,) = xfast.read(out, layout=given, size=size)
    if wrapping == "elfcore":
        assert {vcpu.layout_source for vcpu in there.vcpus} == {"note"}
    for one, two in zip(found.vcpus, there.vcpus, strict=True):
        assert engine.diff(one.area, two.area, one.layout, two.layout) == 0
        assert engine.headers(one.area).xstate_bv == engine.headers(two.area).xstate_bv
    assert not [row for row in compare([found], [there]) if row.component]


def test_a_vmms_file_keeps_all_but_its_areas(data, tmp_path, capsys):
    out = tmp_path / "state.json"
    words = ["convert", str(data / "vmm" / "ch-state.json"), "--to", "intel", "-o", str(out)]
    assert main(words) == 0
    assert "--layout intel" in capsys.readouterr().err
    (before,) = xfast.read(data / "vmm" / "ch-state.json")
    (after,) = xfast.read(out, layout=INTEL)
    for one, two in zip(before.vcpus, after.vcpus, strict=True):
        assert engine.diff(one.area, two.area, one.layout, two.layout) == 0
        assert one.cpuid == two.cpuid
    back = tmp_path / "back.json"
    words = ["convert", str(out), "--layout", "intel", "--to", "amd-zen4", "-o", str(back)]
    assert main(words) == 0
    assert json.loads(back.read_text()) == json.loads((data / "vmm/ch-state.json").read_text())


def test_a_file_of_registers_has_no_layout_to_change(data, tmp_path, capsys):
    out = str(tmp_path / "out")
    stream = str(data / "qemu" / "q72-max-smp2-q35.qemustate.xz")
    assert main(["convert", stream, "--to", "intel", "-o", out]) == 2
    assert "expected --as raw, npy or elfcore" in capsys.readouterr().err
    core = str(data / "elf" / "kernel618-regs64-3thr.core.xz")
    assert main(["convert", core, "--to", "intel", "-o", out]) == 2
    assert "NT_X86_XSAVE_LAYOUT fixes the layout" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_compacted_areas(data, tmp_path):
    out = tmp_path / "out.npy"
    words = ["convert", str(data / ZEN4), "--as", "npy", "--compacted", "-o", str(out)]
    assert main(words) == 0
    (row,) = np.load(out)
    assert int(row[520:528].view("<u8")[0]) == 1 << 63 | 0xE7
    back = tmp_path / "back.xsave"
    words = ["convert", str(out), "--layout", "amd-zen4", "--as", "raw", "-o", str(back)]
    assert main(words) == 0
    assert back.read_bytes() == (data / ZEN4).read_bytes()


def test_the_outputs_suffix_tells_its_wrapping(data, tmp_path):
    area_file = data / ZEN4
    words = ["convert", str(area_file), "--layout", "amd-zen4", "-o"]
    for name in ("a.npy", "a.raw", "a.xsave", "a.bin"):
        assert main([*words, str(tmp_path / name)]) == 0
    assert np.load(tmp_path / "a.npy").tobytes() == area_file.read_bytes()
    assert main(["convert", str(tmp_path / "a.npy"), "-o", str(tmp_path / "b.xsave")]) == 0
    assert main(["convert", str(tmp_path / "a.npy"), "-o", str(tmp_path / "b.npy")]) == 0
    assert (tmp_path / "b.npy").read_bytes() == (tmp_path / "a.npy").read_bytes()
    assert main([*words, str(tmp_path / "c.npy"), "--as", "raw"]) == 0
    assert main(["convert", str(data / "vmm/ch-state.json"), "-o", str(tmp_path / "d.npy")]) == 0
    assert np.load(tmp_path / "d.npy").shape[1] == 4096
    for name in ("a.raw", "a.xsave", "a.bin", "b.xsave", "c.npy"):
        assert (tmp_path / name).read_bytes() == area_file.read_bytes()


def test_a_short_area_stays_short(data, tmp_path):
    short = tmp_path / "short.xsave"
    short.write_bytes((data / ZEN4).read_bytes()[:2440])
    words = ["convert", str(short), "--size", "2440", "-o", str(tmp_path / "out.xsave")]
    assert main(words) == 0
    assert (tmp_path / "out.xsave").read_bytes() == short.read_bytes()


def test_complaints(data, tmp_path, capsys):
    area_file = str(data / ZEN4)
    out = tmp_path / "out"
    out.write_bytes(b"mine")
    assert main(["convert", area_file, "-o", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    words = ["convert", area_file, "--compacted", "--as", "elfcore", "-o", str(tmp_path / "new")]
    assert main(words) == 2
    assert "expected --as raw or npy" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_qemus_fields_are_the_streams_bytes(data, tmp_path):
    path = tmp_path / "stream"
    packed = data / "qemu" / "q72-avx512-reinjected-S.qemustate.xz"
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    stream = path.read_bytes()
    (found,) = xfast.read(path)
    answer = json.loads(convert.as_qemu(found))
    assert answer["schema"] == "xfast/1"
    for vcpu, row in zip(found.vcpus, answer["vcpus"], strict=True):
        for name in ("cpu/avx512", "cpu/pkru"):
            if name in vcpu.where and name in row["subsections"]:
                offset, length = vcpu.where[name]
                assert row["subsections"][name] == stream[offset : offset + length].hex()
        for name in ("xmm", "ymm_hi128", "mxcsr"):
            offset, length = vcpu.where[name]
            assert row["fields"][name]["data"] == stream[offset : offset + length].hex()
    assert any("cpu/avx512" in row["subsections"] for row in answer["vcpus"])


def test_a_copy_in_the_same_format_is_the_same(data, tmp_path):
    source = tmp_path / "state.vmstate"
    shutil.copy(data / "vmm" / "fc-bincode1-v4.vmstate", source)
    assert main(["convert", str(source), "-o", str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
