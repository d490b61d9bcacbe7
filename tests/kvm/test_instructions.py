"""The XSAVE family rule by rule; `test_recordings` compares it with what CPUs did."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfast.kvm.instructions import (
    FAULTS,
    Fault,
    xgetbv,
    xrstor,
    xrstors,
    xsave,
    xsavec,
    xsaveopt,
    xsaves,
)
from xfast.kvm.processor import (
    INTEL,
    SAPPHIRE_RAPIDS,
    ZEN3,
    ZEN4,
    Processor,
    cpu_by_model,
    sign_extend,
)
from xfast.xsave.layout import PRESETS

ALL = (1 << 64) - 1
ROOM = 12288
COMPACTED = 1 << 63
TILECFG, TILEDATA, UINTR = 1 << 17, 1 << 18, 1 << 14


def blank(fill=0):
    """Return memory with a zero header."""
    area = np.full(ROOM, fill, np.uint8)
    area[512:576] = 0
    return area


def put64(area, at, value):
    area[at : at + 8] = np.frombuffer(value.to_bytes(8, "little"), np.uint8)


def get64(area, at):
    return int.from_bytes(area[at : at + 8].tobytes(), "little")


def image(xstate_bv, xcomp_bv=0, **components):
    """Return an area with this header, MXCSR 0x1F80 and {name: (offset, bytes)}."""
    area = blank()
    area[:2] = 0x7F, 3
    area[24:26] = 0x80, 0x1F
    put64(area, 512, xstate_bv)
    put64(area, 520, xcomp_bv)
    for at, data in components.values():
        area[at : at + len(data)] = np.frombuffer(data, np.uint8)
    return area


def amx(xcr0=0x600E7, **changes):
    """Return an Intel CPU with AMX."""
    return Processor(
        replace(INTEL, layout=PRESETS["intel"].restricted(~(1 << 19)), **changes), xcr0
    )


def with_tiles(**changes):
    cpu = amx(**changes)
    config = bytes([1, 0]) + bytes(14) + b"\x40\x00" + bytes(30) + b"\x10" + bytes(15)
    area = image(0x60007, c=(2752, config), d=(2816, b"\x5a" * 8192), x=(160, b"\x11" * 256))
    xrstor(cpu, area, ALL)
    return cpu


# Intel SDM vol. 1 section 13.14: XFD. What the saves and a refused restore do was also measured
# on Sapphire Rapids, in a process without permission for tile data.


@pytest.mark.parametrize("instruction", [xsave, xsaveopt, xsavec, xsaves])
def test_xfd_makes_a_save_see_the_initial_value(instruction):
    cpu = with_tiles()
    cpu.cpl, cpu.xfd = 0, TILEDATA
    area = blank(0xCC)
    instruction(cpu, area, 0x60000)
    assert get64(area, 512) == TILECFG
    start = 2816 if instruction in (xsave, xsaveopt) else 640
    written = 0 if instruction is xsave else 0xCC
    assert (area[start : start + 8192] == written).all()
    cpu.xfd = 0
    instruction(cpu, area, 0x60000)
    assert get64(area, 512) == TILECFG | TILEDATA
    assert (area[start : start + 8192] == 0x5A).all()


@pytest.mark.parametrize("instruction", [xrstor, xrstors])
def test_xfd_refuses_to_load_a_disabled_component(instruction):
    cpu = with_tiles()
    before = cpu.values.copy()
    cpu.cpl, cpu.xfd = 0, TILEDATA
    with pytest.raises(Fault, match=r"#NM \(xfd\).*tiledata") as caught:
        instruction(cpu, image(0x40003, 0x60007 | COMPACTED), ALL)
    assert caught.value.rule.vector == "#NM"
    assert cpu.xfd_err == TILEDATA
    assert (cpu.values == before).all()


@pytest.mark.parametrize(("rfbm", "xstate_bv"), [(0x60007, 3), (7, 0x40003)])
def test_xfd_allows_to_initialise_and_to_leave_alone(rfbm, xstate_bv):
    cpu = with_tiles()
    cpu.xfd = TILEDATA
    xrstor(cpu, image(xstate_bv), rfbm)
    assert cpu.xfd_err == 0
    assert cpu.is_init(18) == bool(rfbm & TILEDATA)


# Intel SDM vol. 2 LDTILECFG, CPUID leaf 1DH; what XRSTOR does was measured on Sapphire Rapids.


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({1: 200}, True),
        ({0: 0}, False),
        ({0: 2}, False),
        ({5: 1}, False),
        ({16: 65}, False),
        ({48: 17}, False),
        ({48: 0}, False),
        ({16: 0}, False),
        ({32: 1}, False),
        ({57: 1}, False),
    ],
)
def test_a_tile_configuration_that_is_not_supported_is_loaded_as_initial(change, kept):
    config = bytearray(64)
    config[0], config[16], config[48] = 1, 64, 16
    for at, value in change.items():
        config[at] = value
    cpu = amx()
    xrstor(cpu, image(TILECFG, c=(2752, config)), ALL)
    assert xgetbv(cpu, 1) == (TILECFG if kept else 0)
    area = blank(0xCC)
    xsave(cpu, area, TILECFG)
    assert area[2752:2816].tobytes() == (bytes(config) if kept else bytes(64))


def test_tile_data_is_kept_whatever_the_configuration():
    cpu = amx()
    xrstor(cpu, image(TILEDATA, d=(2816, b"\x09" * 8192)), ALL)
    assert xgetbv(cpu, 1) == TILEDATA
    area = blank()
    xsavec(cpu, area, 0x60000)
    assert (area[640 : 640 + 8192] == 9).all()


# Intel APX Architecture Specification, section on XSAVE: component 19 takes MPX's place in the
# standard format, and follows tile data in the compacted one.


def apx_cpu():
    return Processor(replace(INTEL, layout=PRESETS["intel"].restricted(0xE02E7)), 0xE02E7)


def test_apx_takes_mpx_place_in_the_standard_format():
    cpu = apx_cpu()
    registers = bytes(range(128))
    xrstor(cpu, image(1 << 19, r=(960, registers)), ALL)
    area = blank(0xCC)
    xsave(cpu, area, 1 << 19)
    assert area[960:1088].tobytes() == registers
    assert (area[1088:] == 0xCC).all()


def test_apx_comes_last_in_the_compacted_format():
    cpu = apx_cpu()
    registers = bytes(range(128))
    xrstor(cpu, image(1 << 19, r=(960, registers)), ALL)
    area = blank(0xCC)
    xsavec(cpu, area, 0xE0007)
    assert get64(area, 512) == 1 << 19
    assert area[9088:9216].tobytes() == registers
    assert (area[576:9088] == 0xCC).all()
    other = apx_cpu()
    xrstor(other, area, ALL)
    assert (other.values == cpu.values).all()


# Intel SDM vol. 1 sections 13.9 and 13.11: the modified optimisation.


def restored(instruction, area, address=0, **state):
    cpu = Processor(replace(INTEL, layout=PRESETS["intel"].restricted(0x1AE7)), 0xE7, 0x1800)
    cpu.cpl = 0
    for name, value in state.items():
        setattr(cpu, name, value)
    instruction(cpu, area, ALL, address=address)
    return cpu


LIVE = image(7, 0, x=(160, b"\x22" * 256), y=(576, b"\x33" * 256))
PACKED = image(7, 7 | COMPACTED, x=(160, b"\x22" * 256), y=(576, b"\x33" * 256))


def test_xsaveopt_leaves_out_what_was_not_modified():
    cpu = restored(xrstor, LIVE)
    cpu.xmodified |= 2
    area = blank(0xCC)
    xsaveopt(cpu, area, ALL)
    assert (area[160:416] == 0x22).all()
    assert (area[576:832] == 0xCC).all()
    assert get64(area, 512) == 7


@pytest.mark.parametrize(
    ("restore", "source", "address", "change"),
    [
        (xrstor, LIVE, 64, {}),
        (xrstor, PACKED, 0, {}),
        (xrstor, LIVE, 0, {"cpl": 3}),
        (xrstor, LIVE, 0, {"guest": True}),
    ],
)
def test_xsaveopt_writes_everything_after_another_restore(restore, source, address, change):
    cpu = restored(restore, source, address)
    for name, value in change.items():
        setattr(cpu, name, value)
    area = blank(0xCC)
    xsaveopt(cpu, area, ALL)
    assert (area[576:832] == 0x33).all()


def test_xsaves_leaves_out_only_under_the_same_xcomp_bv():
    area = blank(0xCC)
    cpu = restored(xrstors, PACKED)
    xsaves(cpu, area, 7)
    assert (area[576:832] == 0xCC).all()
    assert (area[24:32] == 0xCC).all()
    xsaves(cpu, area, ALL)
    assert (area[576:832] == 0x33).all()


@pytest.mark.parametrize(
    ("always", "mxcsr", "written"),
    [(False, 0x1F80, False), (False, 0x1FA0, True), (True, 0x1F80, True)],
)
def test_xsaves_of_an_unmodified_mxcsr(always, mxcsr, written):
    # Seen under KVM: Sapphire Rapids leaves out 0x1F80 only, Zen 4 nothing.
    area = PACKED.copy()
    area[24:26].view("<u2")[:] = mxcsr
    cpu = restored(xrstors, area)
    cpu.cpu = replace(cpu.cpu, always_saves_mxcsr=always)
    area[24:32] = area[160:416] = 0xCC
    xsaves(cpu, area, 7)
    assert (area[160:416] == 0xCC).all()
    assert area[24:32].tobytes() == (
        mxcsr.to_bytes(4, "little") + b"\xff\xff\0\0" if written else b"\xcc" * 8
    )


def test_a_restore_leaves_components_it_was_not_asked_for_modified():
    cpu = restored(xrstor, LIVE)
    xrstor(cpu, LIVE, 2)
    area = blank(0xCC)
    xsaveopt(cpu, area, 7)
    assert (area[160:416] == 0xCC).all()
    assert (area[576:832] == 0x33).all()


# Every row of FAULTS, on the recorded rules' own terms.


def faulty(**state):
    return restored(lambda *a, **k: None, None, **state)


FAULTY = {
    "lock": (xsave, {}, LIVE, {"lock": True}),
    "osxsave": (xsave, {"osxsave": False}, LIVE, {}),
    "unsupported": (xsavec, {"cpu": replace(INTEL, xsave=frozenset())}, LIVE, {}),
    "task-switched": (xrstor, {"task_switched": True}, LIVE, {}),
    "cpl": (xsaves, {"cpl": 3}, LIVE, {}),
    "alignment": (xrstor, {}, LIVE, {"address": 32}),
    "bv-xcr0": (xrstor, {}, image(0x207), {}),
    "header-8-23": (xrstor, {}, image(7, 1), {}),
    "standard": (xrstors, {}, LIVE, {}),
    "xcomp": (xrstor, {}, image(7, 0x807 | COMPACTED), {}),
    "bv-xcomp": (xrstor, {}, image(0x27, 7 | COMPACTED), {}),
    "header-16-63": (xrstors, {}, image(7, 7 | COMPACTED, r=(575, b"\1")), {}),
    "mxcsr": (xrstor, {}, image(0, m=(26, b"\2")), {}),
    "cet": (xrstors, {}, image(0x800, 0x800 | COMPACTED, u=(576, b"\x40")), {}),
    "xfd": (xrstor, {"xfd": 4}, LIVE, {}),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_names_its_rule_and_changes_nothing(name):
    instruction, state, area, how = FAULTY[name]
    cpu = faulty(**state)
    before = cpu.values.copy(), cpu.tracked, area.copy()
    with pytest.raises(Fault) as caught:
        instruction(cpu, area, ALL, **how)
    assert caught.value.rule is FAULTS[name]
    assert str(caught.value).startswith(f"{FAULTS[name].vector} ({name})")
    assert (cpu.values == before[0]).all()
    assert cpu.tracked == before[1]
    assert (area == before[2]).all()


def test_uintr_is_not_loaded_while_its_vector_is_set_and_xsaves_clears_it():
    cpu = Processor(INTEL, 7, UINTR)
    cpu.cpl = 0
    state = bytes(20) + b"\x20" + bytes(27)
    xrstors(cpu, image(UINTR, UINTR | COMPACTED, u=(576, state)), ALL)
    with pytest.raises(Fault, match=r"#GP \(uintr\)"):
        xrstors(cpu, image(UINTR, UINTR | COMPACTED), ALL)
    area = blank()
    xsaves(cpu, area, UINTR, address=64)
    assert area[596] == 0x20
    xrstors(cpu, image(UINTR, UINTR | COMPACTED), ALL)


@pytest.mark.parametrize(("index", "cpu"), [(2, INTEL), (1, replace(INTEL, xsave=frozenset()))])
def test_xgetbv_of_a_register_that_is_not_there(index, cpu):
    with pytest.raises(Fault, match=r"#GP \(xcr\)"):
        xgetbv(Processor(cpu, 7), index)


def test_every_fault_has_a_test():
    assert FAULTY.keys() | {"uintr", "xcr"} == FAULTS.keys()


def test_without_xsavec_a_compacted_area_breaks_the_standard_format():
    # Intel SDM vol. 1 section 13.8: the compacted form exists only where CPUID has XSAVEC.
    cpu = Processor(replace(INTEL, xsave=frozenset({"xsaveopt"})), 7)
    with pytest.raises(Fault, match="header-8-23"):
        xrstor(cpu, PACKED, ALL)


def test_pkru_has_32_bits():
    # Intel SDM vol. 1 section 13.5.7: bytes 7:4 of the component are not used.
    cpu = Processor(INTEL, 0x203)
    xrstor(cpu, image(0x200, k=(2688, b"\x55" * 8)), ALL)
    area = blank()
    xsave(cpu, area, 0x200)
    assert area[2688:2696].tobytes() == b"\x55" * 4 + bytes(4)


# x87, on a Zen 3 as measured, and on CPUs that differ in one thing.

POINTER = 0x1234_8765_4321_0FED


def x87(fcw=0x37F, fsw=0, fip=POINTER, fdp=POINTER, fop=0x7FF, selectors=None):
    """Return an area with this x87 state; with `selectors`, in the 32-bit form."""
    area = image(1)
    area[:2].view("<u2")[0], area[2:4].view("<u2")[0] = fcw, fsw
    area[6:8].view("<u2")[0] = fop
    put64(area, 8, fip)
    put64(area, 16, fdp)
    if selectors:
        put64(area, 8, fip & 0xFFFFFFFF | selectors[0] << 32 | 0xABCD << 48)
        put64(area, 16, fdp & 0xFFFFFFFF | selectors[1] << 32 | 0xABCD << 48)
    return area


def saved(cpu, *, rex_w=True):
    area = blank(0xCC)
    xsave(cpu, area, 1, rex_w=rex_w)
    return area


PENDING = {"fcw": 0x37E, "fsw": 1}


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(48, 0xFFFF_8765_4321_0FED), (57, 0x0034_8765_4321_0FED), (None, POINTER)],
)
def test_pointers_are_extended_from_the_top_bit_that_the_silicon_has(bits, expected):
    cpu = Processor(replace(ZEN3, x87_pointer_bits=bits), 0x207)
    xrstor(cpu, x87(**PENDING), 1)
    area = saved(cpu)
    assert get64(area, 8) == get64(area, 16) == expected


def test_without_a_pending_exception_the_save_zeroes_the_pointers_and_the_registers_keep_them():
    cpu = Processor(ZEN3, 0x207)
    xrstor(cpu, x87(fsw=1), 1)
    assert not saved(cpu)[6:24].any()
    cpu.values[:2].view("<u2")[0] = 0x37E  # FLDCW unmasks the exception
    area = saved(cpu)
    assert get64(area, 8) == 0xFFFF_8765_4321_0FED
    assert area[6:8].view("<u2")[0] == 0x7FF
    assert area[2:4].view("<u2")[0] == 0x8081
    intel = Processor(SAPPHIRE_RAPIDS, 7)
    xrstor(intel, x87(fsw=1), 1)
    assert get64(saved(intel), 8) == 0x0034_8765_4321_0FED


@pytest.mark.parametrize(
    ("fcw", "fsw", "expected"),
    [
        (0x37F, 0x8080, 0),  # memory says pending, but all are masked
        (0x37E, 0x0001, 0x8081),
        (0x37E, 0x0040, 0x0040),  # SF alone does not pend
        (0x33F, 0x0020, 0x0020),
        (0x31F, 0x0020, 0x80A0),
    ],
)
def test_es_and_b_follow_from_flags_and_masks(fcw, fsw, expected):
    cpu = Processor(ZEN3, 0x207)
    xrstor(cpu, x87(fcw, fsw), 1)
    assert saved(cpu)[2:4].view("<u2")[0] == expected
    believing = Processor(replace(ZEN3, works_out_es=False), 0x207)
    xrstor(believing, x87(fcw, fsw), 1)
    kept = fsw & ~0x8000 | (0x8000 if fsw & 0x80 else 0)
    assert saved(believing)[2:4].view("<u2")[0] == kept


@pytest.mark.parametrize("keeps", [True, False])
def test_the_32_bit_forms_move_selectors_where_the_cpu_has_them(keeps):
    cpu = Processor(replace(ZEN3, keeps_x87_selectors=keeps), 0x207)
    xrstor(cpu, x87(**PENDING, selectors=(0x1111, 0x2222)), 1, rex_w=False)
    area = saved(cpu, rex_w=False)
    assert area[8:24].view("<u4").tolist() == [
        0x43210FED, 0x1111 if keeps else 0, 0x43210FED, 0x2222 if keeps else 0,
    ]  # fmt: skip
    assert get64(saved(cpu), 8) == 0x43210FED  # the 64-bit form has no selector
    xrstor(cpu, x87(**PENDING), 1)  # and its restore makes them 0
    assert get64(saved(cpu, rex_w=False), 8) == 0x43210FED


# PKRU: what the manuals leave open


@pytest.mark.parametrize(("written", "rest"), [(4, 0xCC), (8, 0), (None, 0)])
def test_how_many_bytes_of_pkru_a_save_writes(written, rest):
    cpu = Processor(replace(ZEN3, pkru_bytes=written), 0x207)
    xrstor(cpu, image(0x200, k=(2432, b"\x54\x55\x55\x55ABCD")), ALL)
    area = blank(0xCC)
    xsave(cpu, area, 0x200)
    assert area[2432:2436].tobytes() == b"\x54\x55\x55\x55"
    assert (area[2436:2440] == rest).all()


@pytest.mark.parametrize("always", [True, False, None])
def test_whether_xsaveopt_leaves_out_an_unmodified_pkru(always):
    cpu = Processor(replace(ZEN3, pkru_always_modified=always), 0x207)
    area = image(0x205, k=(2432, b"\x54\x55\x55\x55"), y=(576, b"\x33" * 256))
    xrstor(cpu, area, ALL)
    area[576:832] = area[2432:2440] = 0xCC
    xsaveopt(cpu, area, ALL)
    assert (area[2432] == 0x54) == bool(always)
    assert (area[576:832] == 0xCC).all()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("AuthenticAMD", 25, 1), (48, 4, True, False)),
        (("AuthenticAMD", 25, 17), (57, None, None, False)),
        (("AuthenticAMD", 23, 49), (48, None, None, False)),
        (("AuthenticAMD",), (None, None, None, False)),
        (("GenuineIntel", 6, 85), (48, None, None, True)),
        (("GenuineIntel", 6, 143), (57, None, None, True)),
        (("GenuineIntel", 6, 207), (57, 4, False, True)),
        (("GenuineIntel",), (None, None, None, True)),
        (("CentaurHauls", 7, 0x5B), (None, None, None, True)),
    ],
)
def test_what_is_known_of_a_cpu_and_what_is_not(names, expected):
    cpu = cpu_by_model(*names)
    found = (
        cpu.x87_pointer_bits,
        cpu.pkru_bytes,
        cpu.pkru_always_modified,
        cpu.saves_x87_pointers,
    )
    assert found == expected


def test_bv63_in_a_compacted_area_is_a_matter_of_the_cpu():
    area = image(7 | COMPACTED, 7 | COMPACTED)
    with pytest.raises(Fault, match="bv-xcomp"):
        xrstor(Processor(ZEN4, 7), area, ALL)
    xrstor(Processor(replace(INTEL, refuses_bv63=False), 7), area, ALL)


def test_init_data_that_was_loaded_counts_as_in_use_on_intel_and_not_on_amd():
    assert xgetbv(restored(xrstor, image(4)), 1) == 4
    cpu = Processor(ZEN4, 0xE7)
    xrstor(cpu, image(4), ALL)
    assert xgetbv(cpu, 1) == 0


def test_an_area_that_is_too_short_is_refused_before_anything_is_written():
    cpu = amx()
    area = np.full(2816, 0xCC, np.uint8)
    with pytest.raises(ValueError, match="area: expected 11008 bytes, got 2816"):
        xsave(cpu, area, ALL)
    assert (area == 0xCC).all()
    with pytest.raises(ValueError, match="area: expected 576 bytes, got 575"):
        xrstor(cpu, area[:575], ALL)


def test_xcr0_beyond_the_layout_is_refused():
    with pytest.raises(ValueError, match=r"xcr0: expected components of amd-zen4.*got 0x60007"):
        Processor(ZEN4, 0x60007)
    with pytest.raises(ValueError, match=r"xss: expected components of intel.*got 0x4"):
        Processor(INTEL, 7, 4)


@given(st.integers(0, ALL), st.integers(1, 64))
def test_sign_extension_keeps_the_low_bits_and_repeats_the_top_one(pointer, width):
    low = pointer & (1 << width) - 1
    signed = low - (1 << width) if low >> (width - 1) else low
    assert sign_extend(pointer, width) == signed & ALL


@given(
    st.integers(0, 0xE7),
    st.integers(0, 2**32),
    st.sampled_from([(xsave, xrstor), (xsaveopt, xrstor), (xsavec, xrstor), (xsaves, xrstors)]),
    st.sampled_from([ZEN4, replace(INTEL, layout=PRESETS["intel"].restricted(0xE7))]),
)
def test_what_is_saved_is_restored(xstate_bv, seed, pair, description):
    save, restore = pair
    source = np.random.default_rng(seed).integers(0, 256, ROOM, np.uint8)
    source[24:28] = 0x80, 0x1F, 0, 0
    source[512:576] = 0
    put64(source, 512, xstate_bv & 0xE7)
    one, two = Processor(description, 0xE7), Processor(description, 0xE7)
    one.cpl = two.cpl = 0
    xrstor(one, source, ALL, address=64)
    area = blank(0xCC)
    save(one, area, ALL)
    restore(two, area, ALL)
    again = [blank(0xCC), blank(0xCC)]
    for cpu, memory in zip((one, two), again, strict=True):
        xsave(cpu, memory, ALL)
    assert (again[0] == again[1]).all()
    if not description.saves_x87_pointers:
        for cpu in (one, two):  # a save may have left them out
            cpu.values[6:24] = 0
    assert (one.values == two.values).all()
    assert one.xinuse == two.xinuse
