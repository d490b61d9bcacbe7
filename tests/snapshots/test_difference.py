"""What differs between two snapshots, and what only looks different."""

import json
import lzma
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xfast
from xfast.cli.main import main
from xfast.snapshots.difference import Difference, compare
from xfast.snapshots.model import Snapshot, Vcpu
from xfast.xsave import area as engine
from xfast.xsave.features import BY_NR
from xfast.xsave.layout import PRESETS
from xfast.xsave.registers import REGISTERS, Registers

INTEL, GENOA = PRESETS["intel"], PRESETS["amd-zen4"]


def area(mask=0xE7):
    image = np.zeros(11008, np.uint8)
    image[0:2] = 0x7F, 0x03
    image[24:26] = 0x80, 0x1F
    image[512:520] = np.frombuffer(mask.to_bytes(8, "little"), "u1")
    return image


def snapshot(*images, layout=INTEL, **facts):
    vcpus = [Vcpu(i, image, layout, "given", **facts) for i, image in enumerate(images)]
    return Snapshot("blob", "raw", "vm", "kvm", vcpus)


def test_the_same_is_no_difference(data):
    for path in sorted((data / "raw").glob("*.xsave")):
        one = xfast.read(path)
        assert compare(one, xfast.read(path)) == []


def test_a_register_with_both_values():
    one, two = area(0x207), area(0x207)
    Registers(two, INTEL)["pkru"] = 0xC
    assert compare([snapshot(one)], [snapshot(two)]) == [
        Difference(0, "pkru", "pkru", "0x00000000", "0x0000000c")
    ]


def test_absent_is_init_where_values_only_count():
    """microsoft/openvmm #1254: two areas that a restore makes the same registers of."""
    one, two = area(0x1F), area(0x7)
    assert {d.component for d in compare([snapshot(one)], [snapshot(two)])} == {"bndregs", "bndcsr"}
    assert compare([snapshot(one)], [snapshot(two)], values_only=True) == []
    Registers(one, INTEL)["bndcfgu"] = 1
    assert compare([snapshot(one)], [snapshot(two)], values_only=True)


@settings(max_examples=120)
@given(st.sampled_from(sorted(REGISTERS)), st.integers(1, 255))
def test_every_register_is_found(name, value):
    register = REGISTERS[name]
    mask = 0x80003 if register.component == 19 else 0x602FF
    one, two = area(mask), area(mask)
    raw = np.zeros(register.size, np.uint8)
    raw[0] = value
    whole = int.from_bytes(raw.tobytes(), "little")
    Registers(two, INTEL)[name] = whole if register.dtype else raw
    found = compare([snapshot(one)], [snapshot(two)])
    if Registers(one, INTEL)[name].tobytes() == Registers(two, INTEL)[name].tobytes():
        assert not found
    else:
        assert found
        lowest = register.parts[0].component
        assert {row.component for row in found} == {BY_NR[lowest].name}
        assert {row.vcpu for row in found} == {0}


def test_absent_and_init_are_told_without_registers():
    assert compare([snapshot(area(0x7))], [snapshot(area(0x3))]) == [
        Difference(0, "avx", "", "init", "absent")
    ]


def test_live_and_absent():
    one = area(0x7)
    Registers(one, INTEL)["ymm3"] = 1 << 200
    rows = compare([snapshot(one)], [snapshot(area(0x3))])
    by_name = {row.register: (row.one, row.two) for row in rows}
    assert by_name["ymm3"] == (f"0x{1 << 200:064x}", "absent")


def test_control_registers_where_both_tell():
    one, two = snapshot(area(), xcr0=0x7, xfd=0), snapshot(area(), xcr0=0xE7, xfd=None)
    assert compare([one], [two]) == [Difference(0, "", "xcr0", "0x7", "0xe7")]


def test_layouts_take_no_part():
    image = area(0xE7)[:4096]
    Registers(image, INTEL)["k1"] = 5
    moved = engine.relayout(image, INTEL, GENOA, size=4096)
    assert compare([snapshot(image)], [snapshot(moved, layout=GENOA)]) == []


def test_unknown_layouts_are_compared_as_bytes():
    one, two = area(0x207)[:4096], area(0x207)[:4096]
    assert compare([snapshot(one, layout=None)], [snapshot(two, layout=None)]) == []
    two[900] = 1
    (row,) = compare([snapshot(one, layout=None)], [snapshot(two, layout=None)])
    assert (row.component, row.register) == ("extended", "")
    assert "layout unknown" in row.one


def test_what_a_layout_does_not_place_is_compared_as_bytes():
    one, two = area(0x207)[:4096], area(0x207)[:4096]
    sides = [snapshot(one, layout=INTEL.restricted(7))], [snapshot(two, layout=INTEL.restricted(7))]
    assert compare(*sides) == []
    two[900] = 1
    (row,) = compare(*sides)
    assert (row.component, row.register) == ("extended", "")
    two[576] ^= 1
    assert {row.component for row in compare(*sides)} == {"avx", "extended"}


def test_a_vcpu_that_only_one_side_has():
    rows = compare([snapshot(area(), area())], [snapshot(area())])
    assert rows == [Difference(1, "", "vcpu", "present", "absent")]
    assert compare([snapshot(area())] * 2, [snapshot(area())])[0].register == "snapshots"


@pytest.fixture
def pair(data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    packed = data / "qemu" / "q72-kvm-pkru-leak-bv207.qemustate.xz"
    one.write_bytes(lzma.decompress(packed.read_bytes()))
    assert main(["fix", str(one), "--host", "intel-haswell@6.1", "-o", str(two)]) == 0
    return str(one), str(two)


def test_the_verb(pair, capsys):
    capsys.readouterr()
    assert main(["diff", *pair]) == 1
    assert capsys.readouterr().out == "vCPU 0: pkru: init -> absent\n"
    assert main(["diff", pair[0], pair[0]]) == 0
    assert capsys.readouterr().out == ""
    assert main(["diff", *pair, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == "xfast/1"
    (row,) = answer["differences"]
    assert row == {
        "vcpu": 0, "component": "pkru", "register": "", "one": "init", "two": "absent",
    }  # fmt: skip
    assert main(["diff", pair[0], pair[0] + "-nothing"]) == 2


def test_threads_of_two_dumps(data, tmp_path, capsys):
    one, two = data / "criu" / "criu42-regs64s-3thr", tmp_path / "two"
    shutil.copytree(one, two)
    core = sorted(two.glob("core-*.img"))[-1]
    core.unlink()
    assert main(["diff", str(one), str(two)]) == 1
    thread = core.name.removeprefix("core-").removesuffix(".img")
    assert capsys.readouterr().out == f"vCPU {thread}: vcpu: present -> absent\n"


def test_vcpus_of_one_number_are_compared_each():
    """The second one of a number was left out, and could differ unseen."""
    one, two = snapshot(area(), area()), snapshot(area(), area())
    Registers(two.vcpus[0].area, INTEL)["mxcsr"] = 0x1FA0
    for vcpu in (*one.vcpus, *two.vcpus):
        vcpu.index = 3
    assert [(found.vcpu, found.register) for found in compare([one], [two])] == [(3, "mxcsr")]
    two.vcpus.append(two.vcpus[1])
    assert compare([one], [two])[-1] == Difference(3, "", "vcpu", "absent", "present")
