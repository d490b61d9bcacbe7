"""Registers: values of real blobs, views that write through, and refusals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfast import snapshots
from xfast.errors import XfastError
from xfast.report import rows as report
from xfast.snapshots import difference
from xfast.xsave import area as xa
from xfast.xsave.layout import preset
from xfast.xsave.registers import REGISTERS, Registers, as_integers, ftag, without_place

INTEL = preset("intel")
ZEN4 = preset("amd-zen4")


def q(comp: int, reg: int, word: int, c: int = 0) -> int:
    """Return the value rule of the samples' README."""
    return 0xA5 << 56 | c << 48 | comp << 40 | reg << 32 | word << 24 | 0x00F00D


def filled(bv: int, layout=INTEL, n: int = 1) -> np.ndarray:
    rows = xa.empty(n, layout)
    rows[:] = np.arange(rows.shape[1], dtype=np.uint32).astype(np.uint8) | 1
    rows[:, 512:576] = 0
    rows[:, 512:520].view("<u8")[:] = bv
    return rows


def test_every_register_of_a_zen4_blob(data):
    area = np.fromfile(data / "raw" / "kvm618-guestxcr0_e7-bve7.xsave", np.uint8)
    values = {name: value for name, (value, _) in as_integers(area, ZEN4).items()}
    assert values["fctrl"] == 0x37F
    assert values["fstat"] == 0x1800
    assert values["mxcsr"] == 0x1FA0
    for i in range(8):
        assert values[f"st{i}"] == (0x3FFF + i) << 64 | q(0, i, 0)
        assert values[f"k{i}"] == q(5, i, 0)
    for i in range(16):
        words = [q(1, i, 0), q(1, i, 1), q(2, i, 2), q(2, i, 3)]
        words += [q(6, i, w) for w in range(4, 8)]
        assert values[f"zmm{i}"] == sum(w << 64 * k for k, w in enumerate(words))
        assert values[f"ymm{i}"] == values[f"zmm{i}"] & (1 << 256) - 1
        assert values[f"xmm{i}"] == values[f"zmm{i}"] & (1 << 128) - 1
        assert values[f"zmm{16 + i}"] == sum(q(7, 16 + i, w) << 64 * w for w in range(8))
    assert "pkru" not in values


def test_clear_components_are_never_shown():
    area = filled(0)[0]
    assert as_integers(area, INTEL) == {}
    area = filled(4)[0]
    ymm0 = as_integers(area, INTEL)["ymm0"][0]
    assert ymm0 & (1 << 128) - 1 == 0
    assert ymm0 >> 128


@pytest.mark.parametrize(
    ("name", "bv", "component"),
    [("ymm0", 3, "2 (avx)"), ("k3", 7, "5 (opmask)"), ("pkru", 7, "9 (pkru)"), ("mxcsr", 1, "sse")],
)
def test_an_absent_component_is_named(name, bv, component):
    with pytest.raises(XfastError, match=name) as error:
        Registers(filled(bv), INTEL)[name]
    assert component in str(error.value)


def test_unknown_names_are_refused():
    with pytest.raises(XfastError, match="gdb's names"):
        Registers(filled(7), INTEL)["eax"]


def test_views_write_through_and_spanning_registers_by_assignment():
    rows = filled(0x207, n=3)
    registers = Registers(rows, INTEL)
    registers["pkru"][1] = 0x55555554
    assert rows[1, 2688:2692].tolist() == [0x54, 0x55, 0x55, 0x55]
    registers["ymm5"] = (1 << 255) | 7
    assert Registers(rows[2], INTEL)["ymm5"].tobytes() == ((1 << 255) | 7).to_bytes(32, "little")
    with pytest.raises(ValueError, match="read-only"):
        registers["ymm5"][0, 0] = 1
    with pytest.raises(ValueError, match="xmm0"):
        registers["xmm0"] = 1 << 128


def test_writing_a_part_that_would_be_lost_is_refused():
    with pytest.raises(XfastError, match="would be lost"):
        Registers(filled(4), INTEL)["ymm0"] = 0


def test_a_component_past_the_row_is_absent():
    rows = filled(0x207)[:, :832]
    assert "pkru" not in Registers(rows, INTEL)
    assert "ymm0" in Registers(rows, INTEL)


def test_compacted_areas_have_the_same_registers():
    area = filled(0x2E7)[0]
    packed = xa.relayout(area, INTEL, ZEN4, xcomp_bv=0x2E7)
    assert as_integers(packed, ZEN4) == as_integers(area, INTEL)


@given(st.sampled_from(sorted(REGISTERS)), st.data())
def test_what_is_written_is_read(name, data):
    rows = filled(0xE02E7 & ~(1 << 19) if REGISTERS[name].component != 19 else 0xE02E7, n=2)
    if REGISTERS[name].component in (3, 4):
        rows[:, 512:520].view("<u8")[:] = 0x602FF
    registers = Registers(rows, INTEL)
    value = data.draw(st.integers(0, (1 << 8 * REGISTERS[name].size) - 1))
    registers[name] = value
    assert int.from_bytes(registers[name][1].tobytes(), "little") == value


def test_32_bit_mode_has_eight_vector_registers():
    area = filled(0xA02E7 & ~(1 << 17))[0]
    wide, narrow = as_integers(area, INTEL), as_integers(area, INTEL, 32)
    assert narrow.items() < wide.items()
    numbers = {name for name in narrow if name.startswith(("xmm", "ymm", "zmm", "r"))}
    assert numbers == {f"{kind}{i}" for kind in ("xmm", "ymm", "zmm") for i in range(8)}
    assert {"k7", "st7", "mxcsr", "pkru"} < narrow.keys()


def test_ftag_tells_empty_zero_special_and_valid():
    st_regs = [bytes(10)] * 8
    st_regs[0] = (1 << 63).to_bytes(8, "little") + b"\xff\x3f"
    st_regs[1] = (1 << 63).to_bytes(8, "little") + b"\xff\x7f"
    assert ftag(0x07, 0, st_regs) == 0xFFFF & ~0x3F | 0b011000
    assert ftag(0, 0, st_regs) == 0xFFFF


def test_a_register_whose_lower_part_the_layout_lacks():
    """zmm0 without AVX in layout and XSTATE_BV: KeyError: 2 ended show, diff and show --json."""
    layout = INTEL.restricted(0xE0)
    area = filled(0xE0, layout)[0]
    registers = Registers(area, layout)
    assert registers["zmm0"][:32].tobytes() == bytes(32)
    assert registers["zmm0"][32:].tobytes() == area[1152:1184].tobytes()
    assert "zmm31" in as_integers(area, layout)
    assert without_place(area, layout) == []


def test_a_register_with_a_part_at_no_known_place_is_not_shown_as_if_that_were_zero():
    layout = INTEL.restricted(0xE0)
    area = filled(0xE4, layout)[0]  # AVX is there, who knows where
    registers = Registers(area, layout)
    assert "zmm0" not in registers
    assert "zmm16" in registers
    names = without_place(area, layout)
    assert {f"zmm{i}" for i in range(16)} | {f"ymm{i}" for i in range(16)} == set(names)
    assert without_place(area, layout, 32) == [
        *(f"ymm{i}" for i in range(8)),
        *(f"zmm{i}" for i in range(8)),
    ]


def test_the_hostile_area_shows_what_it_has_and_names_the_rest(shared):
    (snapshot,) = snapshots.read(shared / "cases/hostile/registers-keyerror.xsave")
    (answer,) = report.snapshot_as_json(snapshot)["vcpus"]
    assert {"zmm0", "zmm31", "k0"} <= answer["registers"].keys()
    assert "tmm0" in answer["registers_without_place"]
    assert "tmm0" not in answer["registers"]
    rows = difference.compare([snapshot], [snapshot])
    assert {row.component for row in rows} <= {"tiledata"}  # of which nothing is in the area


@given(st.integers(0, (1 << 20) - 1), st.booleans(), st.sampled_from([INTEL, ZEN4]))
def test_the_numbers_are_those_of_the_views(bv, compacted, layout):
    row = filled(bv, layout)[0]
    if compacted:
        row[520:528].view("<u8")[0] = 1 << 63 | bv
    registers = Registers(row, layout)
    slow = {name: int.from_bytes(registers[name].tobytes(), "little") for name in registers}
    assert registers.values() == slow
